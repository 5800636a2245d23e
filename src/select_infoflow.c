/* Selector `infoflow`: rows through which the question's attention flows (arXiv 2603.05353).
 *
 * The question's rows are replicated on every rank and run through the layers up to the last
 * scoring layer, in a pass of their own or riding in encode's.  In each layer they see every
 * context row, wherever it is, and the question causally; nothing of theirs is kept.  Positions are
 * those of the geometry: keys lie in the shard rotated at their index, and are rotated on by the
 * difference, exact up to rounding (or unrotated while chunks may still change places).  In the
 * scoring layers the exact probabilities of this rank's keys are reduced to a score per row; scores
 * are then gathered. Every sum over context keys is cut at chunk boundaries and carried between
 * ranks in the back end's part dtype (float64 on the CPU), so that scores do not depend on the
 * number of ranks: near-ties at the threshold lie as close as a relative 1e-7.
 *
 * Local scoring, offered for comparison, sends nothing but scores: each rank's question sees that
 * rank's chunks alone, so hidden states, probabilities and hence S depend on the placement.  A rank
 * without chunk 0 has no sink row unless the prefix is lent to it.  Source: algorithm 1.4, 1.5. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "select.h"

/* Question rows as an exchange: store keeps the question's K/V for the layer, attend merges context
 * parts of all ranks. */
typedef struct question_exchange {
    ifkv_exchange base;
    int64_t n_question, n_chunk; /* chunks of this rank */
    int64_t *chunk_slot;         /* [n_chunk + 1] host, owned: shard rows of each */
    ifkv_view *views;            /* host, owned: parts to merge, out and lse */
    size_t *bytes, *offset;      /* [size] host, owned: messages */
    int last_layer;              /* that scores */
    bool is_lse_only;            /* in it: nothing reads the question's output */
    ifkv_view k, v;              /* the question's own, of this layer */
    bool is_shifted;             /* the geometry moves keys */
    bool is_local;               /* nothing but the prefix comes from other ranks */
    int64_t n_lent;              /* prefix rows lent to ranks that do not store them */
    int lender;                  /* the rank that stores them, in its first slots */

    /* Back-end memory. */
    int64_t *copy_row;                /* [n_chunk * n_question] question row of each copy */
    int64_t *chunk_begin, *chunk_end; /* spans of the copies: one chunk each */
    int64_t *own_begin, *own_end;     /* [n_question] spans on the question itself: causal */
    ifkv_view copies;                 /* [n_chunk * n_question, q] */
    ifkv_view chunk_part; /* [n_chunk * n_question, q + n_head] float32: out, lse over each chunk */
    ifkv_view rank_part;  /* [size * n_question, q + n_head] part dtype: out, lse over each rank */
    ifkv_view rank_lse;   /* [size * n_question, n_head] part dtype, where only the lse travels */
    ifkv_view own_part;   /* [n_question, q + n_head] float32: over the question itself */
    ifkv_view lse;        /* [n_question, n_head] float32: over everything */
    ifkv_view shifted_k;  /* [kept rows, kv] keys of this layer in the geometry, if it moves them */
    int64_t *shift_position; /* [kept rows] the way there, */
    ifkv_view shift;         /*   and its angles: [kept rows, d_head] float32 */
    ifkv_view lent;          /* [n_lent, 2 kv] K as placed, V, of this layer */
    ifkv_view lent_part;     /* [n_question, q + n_head] float32: over the lent rows */
    int64_t *lent_end;       /* [n_question] spans on them */
} question_exchange;

typedef struct select_infoflow {
    ifkv_selector base;
    question_exchange exchange;
    ifkv_pass own_pass; /* unless the question rides */
    ifkv_pass *pass;    /* the one it is in, */
    int64_t first;      /*   from this row on */
    int n_scored;       /* scoring layers so far */
    ifkv_status bad;    /* of them; kept, so that this rank does not miss the next collective */
    ifkv_scores scores;
} select_infoflow;

static int64_t kept_rows(const ifkv_select_input *input) {
    return ifkv_placement_kept_rows(input->placement, input->comm->rank);
}

static ifkv_status question_init(question_exchange *x, const ifkv_select_input *input) {
    const ifkv_placement *placement = input->placement;
    const int rank = input->comm->rank, size = input->comm->size;
    x->base.backend = input->backend;
    x->base.comm = input->data;
    x->base.scale = 1.0f / sqrtf((float)input->model->config.d_head);
    x->base.shape.n_head = input->model->config.n_head;
    x->base.shape.n_kv_head = input->model->config.n_kv_head;
    x->base.shape.d_head = input->model->config.d_head;
    x->n_question = input->n_question;
    x->is_shifted = input->geometry != IFKV_GEOMETRY_GLOBAL || input->is_unrotated;
    x->is_local = input->is_local;
    x->n_lent = input->is_local && input->has_sink && size > 1 ? placement->n_prefix : 0;
    x->lender = placement->rank[0];
    x->n_chunk = ifkv_placement_chunks(placement, rank);
    const int64_t n_part = (x->n_chunk > size ? x->n_chunk : size) + 2;
    x->chunk_slot = malloc(((size_t)x->n_chunk + 1) * sizeof *x->chunk_slot);
    x->views = malloc(2 * (size_t)n_part * sizeof *x->views);
    x->bytes = malloc(2 * (size_t)size * sizeof *x->bytes);
    IFKV_REQUIRE(x->chunk_slot && x->views && x->bytes, IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                 "selector infoflow: out of host memory");
    x->offset = x->bytes + size;
    return IFKV_OK;
}

static void question_layout(question_exchange *x, int64_t n_kept, ifkv_arena *arena) {
    const ifkv_backend_ops *ops = x->base.backend->ops;
    const int64_t n = x->n_question, copies = x->n_chunk * n, size = x->base.comm->size;
    const int64_t n_head = x->base.shape.n_head, q = n_head * x->base.shape.d_head;
    x->copy_row = ifkv_arena_take(arena, copies, sizeof(int64_t));
    x->chunk_begin = ifkv_arena_take(arena, copies, sizeof(int64_t));
    x->chunk_end = ifkv_arena_take(arena, copies, sizeof(int64_t));
    x->own_begin = ifkv_arena_take(arena, n, sizeof(int64_t));
    x->own_end = ifkv_arena_take(arena, n, sizeof(int64_t));
    x->copies = ifkv_arena_view(arena, ops->dtype, copies, q);
    x->chunk_part = ifkv_arena_view(arena, IFKV_DTYPE_F32, copies, q + n_head);
    x->rank_part = ifkv_arena_view(arena, ops->part_dtype, size * n, q + n_head);
    x->rank_lse = ifkv_arena_view(arena, ops->part_dtype, size * n, n_head);
    x->own_part = ifkv_arena_view(arena, IFKV_DTYPE_F32, n, q + n_head);
    x->lse = ifkv_arena_view(arena, IFKV_DTYPE_F32, n, n_head);
    if (x->n_lent) {
        const int64_t kv = (int64_t)x->base.shape.n_kv_head * x->base.shape.d_head;
        x->lent = ifkv_arena_view(arena, ops->dtype, x->n_lent, 2 * kv);
        x->lent_part = ifkv_arena_view(arena, IFKV_DTYPE_F32, n, q + n_head);
        x->lent_end = ifkv_arena_take(arena, n, sizeof(int64_t));
    }
    if (!x->is_shifted) return;
    x->shifted_k = ifkv_arena_view(arena, ops->dtype, n_kept,
                                   (int64_t)x->base.shape.n_kv_head * x->base.shape.d_head);
    x->shift_position = ifkv_arena_take(arena, n_kept, sizeof(int64_t));
    x->shift = ifkv_arena_view(arena, IFKV_DTYPE_F32, n_kept, x->base.shape.d_head);
}

/* Upload the spans; stage holds 3 * copies or 2 * n_question values. */
static ifkv_status question_begin(question_exchange *x, int64_t *stage) {
    ifkv_backend *backend = x->base.backend;
    const int64_t n = x->n_question, copies = x->n_chunk * n;
    for (int64_t i = 0; i < copies; i++) {
        stage[i] = i % n;
        stage[copies + i] = x->chunk_slot[i / n];
        stage[2 * copies + i] = x->chunk_slot[i / n + 1];
    }
    const size_t bytes = (size_t)copies * sizeof *stage;
    IFKV_TRY(backend->ops->upload(backend, x->copy_row, stage, bytes));
    IFKV_TRY(backend->ops->upload(backend, x->chunk_begin, stage + copies, bytes));
    IFKV_TRY(backend->ops->upload(backend, x->chunk_end, stage + 2 * copies, bytes));
    for (int64_t i = 0; i < n; i++) {
        stage[i] = 0;
        stage[n + i] = i + 1;
    }
    IFKV_TRY(backend->ops->upload(backend, x->own_begin, stage, (size_t)n * sizeof *stage));
    IFKV_TRY(backend->ops->upload(backend, x->own_end, stage + n, (size_t)n * sizeof *stage));
    if (!x->n_lent) return IFKV_OK;
    for (int64_t i = 0; i < n; i++) stage[i] = x->n_lent;
    return backend->ops->upload(backend, x->lent_end, stage, (size_t)n * sizeof *stage);
}

static ifkv_status question_store(ifkv_exchange *exchange, int layer, const ifkv_view *k,
                                  const ifkv_view *v) {
    question_exchange *x = (question_exchange *)exchange;
    (void)layer;
    x->k = *k;
    x->v = *v;
    return IFKV_OK;
}

static ifkv_status attend_part(question_exchange *x, const ifkv_view *q, const ifkv_view *k,
                               const ifkv_view *v, const int64_t *begin, const int64_t *end,
                               const ifkv_view *part) {
    const ifkv_exchange_shape *shape = &x->base.shape;
    const int64_t cols = (int64_t)shape->n_head * shape->d_head;
    const ifkv_attention_args args = {
        .n_head = shape->n_head,
        .n_kv_head = shape->n_kv_head,
        .d_head = shape->d_head,
        .scale = x->base.scale,
        .q = *q,
        .k = *k,
        .v = *v,
        .begin = begin,
        .end = end,
        .out = ifkv_view_block(part, 0, part->n_row, 0, cols),
        .lse = ifkv_view_block(part, 0, part->n_row, cols, shape->n_head),
    };
    return x->base.backend->ops->attention(x->base.backend, &args);
}

/* Merge n_part parts of n_question rows each, listed in x->views as outs, then lses. */
static ifkv_status merge_parts(question_exchange *x, int n_part, const ifkv_view *out,
                               const ifkv_view *lse) {
    const ifkv_merge_args args = {
        .n_head = x->base.shape.n_head,
        .d_head = x->base.shape.d_head,
        .n_part = n_part,
        .out_part = x->views,
        .lse_part = x->views + n_part,
        .out = *out,
        .lse = *lse,
    };
    return x->base.backend->ops->merge(x->base.backend, &args);
}

/* Split part i of n_part, rows of q + n_head columns, into the lists of views. */
static void list_part(question_exchange *x, int64_t i, int64_t n_part, const ifkv_view *part) {
    const int64_t n_head = x->base.shape.n_head, cols = n_head * x->base.shape.d_head;
    x->views[i] = ifkv_view_block(part, 0, part->n_row, 0, cols);
    x->views[n_part + i] = ifkv_view_block(part, 0, part->n_row, cols, n_head);
}

/* Keys of this rank as the geometry places them; rotated by `shift_keys` before. */
static ifkv_view placed_keys(const question_exchange *x, int layer) {
    return x->is_shifted ? x->shifted_k : ifkv_kvcache_k(x->base.cache, layer);
}

static ifkv_status shift_keys(question_exchange *x, int layer) {
    ifkv_backend *backend = x->base.backend;
    const ifkv_view k = ifkv_kvcache_k(x->base.cache, layer);
    IFKV_TRY(backend->ops->gather(backend, &k, NULL, &x->shifted_k));
    return backend->ops->rope(backend, &x->shifted_k, x->base.shape.n_kv_head, NULL, 0, &x->shift);
}

/* This rank's part: attention over each of its chunks, merged in chunk order. */
static ifkv_status attend_chunks(question_exchange *x, int layer, const ifkv_view *q,
                                 const ifkv_kvcache *cache) {
    ifkv_backend *backend = x->base.backend;
    const int64_t n = x->n_question, rank = x->base.comm->rank, n_head = x->base.shape.n_head;
    if (x->is_shifted) IFKV_TRY(shift_keys(x, layer));
    const ifkv_view k = placed_keys(x, layer), v = ifkv_kvcache_v(cache, layer);
    IFKV_TRY(backend->ops->gather(backend, q, x->copy_row, &x->copies));
    IFKV_TRY(attend_part(x, &x->copies, &k, &v, x->chunk_begin, x->chunk_end, &x->chunk_part));
    for (int64_t i = 0; i < x->n_chunk; i++) {
        const ifkv_view part = ifkv_view_rows(&x->chunk_part, i * n, n);
        list_part(x, i, x->n_chunk, &part);
    }
    const int64_t cols = n_head * x->base.shape.d_head;
    ifkv_view out = ifkv_view_block(&x->rank_part, rank * n, n, 0, cols);
    ifkv_view lse = ifkv_view_block(&x->rank_part, rank * n, n, cols, n_head);
    if (x->is_lse_only) {
        out.data = NULL;
        lse = ifkv_view_rows(&x->rank_lse, rank * n, n);
    }
    return merge_parts(x, (int)x->n_chunk, &out, &lse);
}

static ifkv_status gather_parts(question_exchange *x) {
    ifkv_comm *comm = x->base.comm;
    const ifkv_view *all = x->is_lse_only ? &x->rank_lse : &x->rank_part;
    const size_t bytes = (size_t)(x->n_question * all->stride) * ifkv_dtype_bytes(all->dtype);
    for (int r = 0; r < comm->size; r++) {
        x->bytes[r] = bytes;
        x->offset[r] = (size_t)r * bytes;
    }
    return ifkv_comm_all_gather(comm, (char *)all->data + x->offset[comm->rank], all->data,
                                x->bytes, x->offset);
}

/* The prefix rows to every rank; attention over them, where the shard does not hold them. */
static ifkv_status attend_lent(question_exchange *x, int layer, const ifkv_view *q) {
    const ifkv_backend_ops *ops = x->base.backend->ops;
    const int64_t n = x->n_lent, kv = x->lent.n_col / 2;
    const ifkv_view k = ifkv_view_block(&x->lent, 0, n, 0, kv),
                    v = ifkv_view_block(&x->lent, 0, n, kv, kv);
    const bool is_lender = x->base.comm->rank == x->lender;
    if (is_lender) {
        const ifkv_view shard_k = placed_keys(x, layer),
                        shard_v = ifkv_kvcache_v(x->base.cache, layer);
        IFKV_TRY(ops->gather(x->base.backend, &shard_k, NULL, &k));
        IFKV_TRY(ops->gather(x->base.backend, &shard_v, NULL, &v));
    }
    const size_t bytes = (size_t)(n * 2 * kv) * ifkv_dtype_bytes(k.dtype);
    IFKV_TRY(ifkv_comm_bcast(x->base.comm, x->lent.data, bytes, x->lender));
    if (is_lender) return IFKV_OK;
    return attend_part(x, q, &k, &v, x->own_begin, x->lent_end, &x->lent_part);
}

static bool is_borrower(const question_exchange *x) {
    return x->n_lent > 0 && x->base.comm->rank != x->lender;
}

/* List this rank's part of the context, or those of all ranks; returns how many of n_part. */
static int list_context(question_exchange *x, int n_part) {
    const int rank = x->base.comm->rank;
    const int first = x->is_local ? rank : 0, end = x->is_local ? rank + 1 : x->base.comm->size;
    int i = 0;
    if (is_borrower(x)) list_part(x, i++, n_part, &x->lent_part);
    for (int r = first; r < end; r++, i++) {
        const ifkv_view part = ifkv_view_rows(&x->rank_part, r * x->n_question, x->n_question);
        list_part(x, i, n_part, &part);
        if (x->is_lse_only)
            x->views[n_part + i] = ifkv_view_rows(&x->rank_lse, r * x->n_question, x->n_question);
    }
    return i;
}

static ifkv_status question_attend(ifkv_exchange *exchange, int layer, const ifkv_view *q,
                                   const ifkv_view *attended) {
    question_exchange *x = (question_exchange *)exchange;
    const int n_part = (x->is_local ? 1 + is_borrower(x) : exchange->comm->size) + 1;
    x->is_lse_only = layer == x->last_layer;
    IFKV_TRY(attend_chunks(x, layer, q, exchange->cache));
    if (!x->is_local) IFKV_TRY(gather_parts(x));
    if (x->n_lent) IFKV_TRY(attend_lent(x, layer, q));
    IFKV_TRY(attend_part(x, q, &x->k, &x->v, x->own_begin, x->own_end, &x->own_part));
    list_part(x, list_context(x, n_part), n_part, &x->own_part);
    ifkv_view out = *attended;
    if (x->is_lse_only) out.data = NULL;
    return merge_parts(x, n_part, &out, &x->lse);
}

static const ifkv_exchange_ops question_ops = {
    .name = "question",
    .struct_bytes = sizeof(question_exchange),
    .store = question_store,
    .attend = question_attend,
    .explain = "replicated question rows see the context of every rank",
};

static ifkv_status infoflow_init(ifkv_selector *selector) {
    select_infoflow *self = (select_infoflow *)selector;
    const ifkv_select_input *input = &selector->input;
    self->exchange.base.ops = &question_ops;
    self->exchange.base.cache = (ifkv_kvcache *)input->cache;
    IFKV_TRY(question_init(&self->exchange, input));
    IFKV_TRY(ifkv_scores_init(&self->scores, input));
    if (input->is_riding) return IFKV_OK;
    return ifkv_pass_init(&self->own_pass, input->model, input->backend, input->frequency,
                          input->n_question, 1);
}

static void infoflow_fini(ifkv_selector *selector) {
    select_infoflow *self = (select_infoflow *)selector;
    free(self->exchange.chunk_slot);
    free(self->exchange.views);
    free(self->exchange.bytes);
    ifkv_scores_fini(&self->scores);
    ifkv_pass_fini(&self->own_pass);
}

static void infoflow_layout(ifkv_selector *selector, ifkv_arena *arena) {
    select_infoflow *self = (select_infoflow *)selector;
    const ifkv_select_input *input = &selector->input;
    const size_t mark = ifkv_arena_mark(arena);
    ifkv_scores_layout(&self->scores, input, arena);
    question_layout(&self->exchange, kept_rows(input), arena);
    if (!input->is_riding) ifkv_pass_layout(&self->own_pass, arena, input->backend->ops->dtype);
    ifkv_arena_reset(arena, mark); /* choosing comes after scoring */
    ifkv_scores_layout_best(&self->scores, input, arena);
}

/* The rotation of a row's K to its place in the geometry: from its index, or from none. */
static ifkv_status begin_shift(question_exchange *x, const ifkv_select_input *input) {
    const ifkv_backend_ops *ops = input->backend->ops;
    const int64_t n_row = kept_rows(input);
    int64_t *position = malloc(((size_t)n_row + 1) * sizeof *position);
    IFKV_REQUIRE(position, IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                 "selector infoflow: out of host memory");
    for (int64_t i = 0, row = 0; i < input->placement->n_chunk; i++)
        for (int64_t index = input->placement->offset[i];
             input->placement->rank[i] == input->comm->rank &&
             index < input->placement->offset[i + 1];
             index++)
            position[row++] = ifkv_geometry_shift(input->geometry, input->placement, i, index) +
                              (input->is_unrotated ? index : 0);
    const ifkv_status status =
        ops->upload(input->backend, x->shift_position, position, (size_t)n_row * sizeof *position);
    free(position);
    IFKV_TRY(status);
    return ops->angles(input->backend, input->frequency, x->shift_position, &x->shift);
}

/* Everything but the rows themselves, which are rows [first, ...) of the pass. */
static ifkv_status infoflow_begin(ifkv_selector *selector, ifkv_pass *pass, int64_t first) {
    select_infoflow *self = (select_infoflow *)selector;
    const ifkv_select_input *input = &selector->input;
    const int64_t n = input->n_question, copies = self->exchange.n_chunk * n;
    int64_t *stage = malloc(((size_t)(3 * copies) + 2 * (size_t)n) * sizeof *stage);
    IFKV_REQUIRE(stage, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "selector infoflow: out of host memory");
    self->pass = pass;
    self->first = first;
    self->n_scored = 0;
    self->bad = IFKV_OK;
    self->exchange.last_layer = input->score_layer[input->n_score_layer - 1];
    /* anew for each scoring: chunks may have changed places, though not their rank */
    ifkv_placement_slots(input->placement, input->comm->rank, self->exchange.chunk_slot);
    ifkv_status status = question_begin(&self->exchange, stage);
    if (status == IFKV_OK && self->exchange.is_shifted)
        status = begin_shift(&self->exchange, input);
    free(stage);
    return status == IFKV_OK ? ifkv_scores_clear(&self->scores, input) : status;
}

static ifkv_status begin_own_pass(select_infoflow *self) {
    const ifkv_select_input *input = &self->base.input;
    const int64_t n = input->n_question,
                  first = ifkv_geometry_question(input->geometry, input->placement);
    int64_t *position = malloc((size_t)n * sizeof *position);
    IFKV_REQUIRE(position, IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                 "selector infoflow: out of host memory");
    for (int64_t i = 0; i < n; i++) position[i] = first + i;
    const ifkv_status status = ifkv_pass_begin(&self->own_pass, input->backend, n, input->question,
                                               position, 1, (int64_t[]){0, n});
    free(position);
    return status == IFKV_OK ? infoflow_begin(&self->base, &self->own_pass, 0) : status;
}

/* Add one scoring layer, and look at what has come so far: a score that is not finite and >= 0
 * names its layer and row. */
static ifkv_status score_layer(select_infoflow *self, int layer) {
    const ifkv_select_input *input = &self->base.input;
    const question_exchange *x = &self->exchange;
    const ifkv_exchange_shape *shape = &x->base.shape;
    const int64_t n_row = kept_rows(input);
    ifkv_view k = placed_keys(x, layer);
    k.n_row = n_row;
    const ifkv_score_args args = {
        .n_head = shape->n_head,
        .n_kv_head = shape->n_kv_head,
        .d_head = shape->d_head,
        .scale = x->base.scale,
        .weight = input->form == IFKV_SCORE_MASS ? 1.0f : 1.0f / (float)input->n_score_layer,
        .form = input->form,
        .q = ifkv_view_block(&self->pass->qkv, self->first, x->n_question, 0,
                             (int64_t)shape->n_head * shape->d_head),
        .lse = x->lse,
        .k = k,
        .block = x->chunk_slot,
        .n_block = x->n_chunk,
        .score = self->scores.own,
    };
    IFKV_TRY(input->backend->ops->score(input->backend, &args));
    return ifkv_scores_check(&self->scores, input, layer);
}

/* In the last scoring layer only Q, K and the probabilities; nothing behind it. */
static ifkv_layer_part infoflow_part(ifkv_selector *selector, int layer) {
    question_exchange *x = &((select_infoflow *)selector)->exchange;
    ifkv_layer_part part = {&x->base, x->n_question, IFKV_LAYER_ALL, 0};
    if (layer == x->last_layer) part.what &= ~(unsigned)IFKV_LAYER_FINISH;
    if (layer > x->last_layer) part.what = 0;
    return part;
}

static ifkv_status infoflow_layer(ifkv_selector *selector, int layer) {
    select_infoflow *self = (select_infoflow *)selector;
    const ifkv_select_input *input = &selector->input;
    if (self->n_scored == input->n_score_layer || layer != input->score_layer[self->n_scored])
        return IFKV_OK;
    self->n_scored++;
    if (self->bad == IFKV_OK) self->bad = score_layer(self, layer);
    return self->bad == IFKV_ERR_PEER ? self->bad : IFKV_OK;
}

static ifkv_status run_own_pass(select_infoflow *self) {
    const ifkv_select_input *input = &self->base.input;
    IFKV_TRY(begin_own_pass(self));
    const int last = self->exchange.last_layer;
    for (int layer = 0; layer <= last; layer++) {
        ifkv_layer_part part = infoflow_part(&self->base, layer);
        IFKV_TRY(ifkv_layer_run_parts(self->pass, layer, &part, 1));
        IFKV_TRY(infoflow_layer(&self->base, layer));
        if (input->progress)
            input->progress(input->progress_arg, IFKV_STAGE_SCORE, layer + 1, last + 1);
    }
    return IFKV_OK;
}

static ifkv_status infoflow_score(ifkv_selector *selector, float *score) {
    select_infoflow *self = (select_infoflow *)selector;
    const ifkv_select_input *input = &selector->input;
    if (!input->is_riding) IFKV_TRY(run_own_pass(self));
    IFKV_TRY(ifkv_comm_agree(input->comm, self->bad, NULL));
    return ifkv_scores_gather(&self->scores, input, score);
}

static ifkv_status infoflow_choose(ifkv_selector *selector, const float *score, int64_t *selected) {
    return ifkv_scores_best(&((select_infoflow *)selector)->scores, &selector->input, score,
                            selected);
}

const ifkv_select_ops ifkv_select_infoflow_ops = {
    .name = "infoflow",
    .struct_bytes = sizeof(select_infoflow),
    .has_scores = true,
    .is_question_scored = true,
    .budget = ifkv_select_ratio_budget,
    .init = infoflow_init,
    .fini = infoflow_fini,
    .layout = infoflow_layout,
    .score = infoflow_score,
    .ride_begin = infoflow_begin,
    .ride_part = infoflow_part,
    .ride_layer = infoflow_layer,
    .choose = infoflow_choose,
    .explain = "recompute the rows that the question attends to most",
};
