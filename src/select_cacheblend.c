/* Selector `cacheblend`: rows whose V deviates most from what full prefill has (arXiv 2405.16444).
 *
 * Layer 0 runs on all context rows with exact causal attention over all shards, so that K and V of
 * the check layer, 1, can be computed as full prefill has them; a row's score is the squared
 * distance of its fresh V from the cached one, over all K/V heads.  The fresh K and V of the check
 * layer then replace the cached ones of every row.  Recompute starts S from its embeddings again:
 * layer 0 and the projections of layer 1 run twice on S, with the same result.
 *
 * Rows stay with the rank that stores them.  To see all keys every rank gathers K and V of layer 0,
 * which are right already and at most half of what queries and partial results would take; a rank
 * then works chunk by chunk.  No sum depends on the number of ranks, so neither do the scores, to
 * the bit.  Source: algorithm 5.2. */
#include <math.h>
#include <stdlib.h>

#include "select.h"

/* All rows of the shard as an exchange: attend sees every rank's keys of layer 0, store measures
 * the deviation of the check layer and replaces its rows. */
typedef struct check_exchange {
    ifkv_exchange base;
    int64_t n_row, n_chunk, n_context;
    int64_t *chunk_slot;    /* [n_chunk + 1] host, owned: shard rows of each chunk of this rank */
    int64_t *stage;         /* [n_context + 2 n_row] host, owned: the three arrays below */
    size_t *bytes, *offset; /* [size] host, owned: messages */
    bool is_writing;        /* replace the shard's rows */
    float *deviation;       /* [n_row] back-end memory */

    /* Back-end memory. */
    int64_t *order;       /* [n_context] place of each index among the gathered rows */
    int64_t *begin, *end; /* [n_row] spans: everything up to the row itself */
    ifkv_view gathered;   /* [n_context, kv] rank-major */
    ifkv_view k, v;       /* [n_context, kv] in index order */
    ifkv_view lse;        /* [n_row, n_head] float32: written, never read */
} check_exchange;

typedef struct select_cacheblend {
    ifkv_selector base;
    check_exchange exchange;
    ifkv_pass pass;
    ifkv_scores scores;
} select_cacheblend;

/* Messages of the shards, where each index lands among them, and what each row of this rank sees:
 * functions of the placement. */
static void route(check_exchange *x, const ifkv_placement *placement) {
    const ifkv_backend_ops *ops = x->base.backend->ops;
    const size_t row_bytes = (size_t)x->base.shape.n_kv_head * (size_t)x->base.shape.d_head *
                             ifkv_dtype_bytes(ops->dtype);
    int64_t *order = x->stage, *begin = order + x->n_context, *end = begin + x->n_row, at = 0;
    for (int r = 0; r < x->base.comm->size; r++) {
        x->offset[r] = (size_t)at * row_bytes;
        for (int64_t i = 0; i < placement->n_chunk; i++) {
            if (placement->rank[i] != r) continue;
            for (int64_t index = placement->offset[i]; index < placement->offset[i + 1]; index++) {
                if (r == x->base.comm->rank) {
                    *begin++ = 0;
                    *end++ = index + 1;
                }
                order[index] = at++;
            }
        }
        x->bytes[r] = (size_t)at * row_bytes - x->offset[r];
    }
}

static ifkv_status check_init(check_exchange *x, const ifkv_select_input *input) {
    const ifkv_config *config = &input->model->config;
    const ifkv_placement *placement = input->placement;
    const int rank = input->comm->rank, size = input->comm->size;
    x->base.backend = input->backend;
    x->base.comm = input->data;
    x->base.cache = (ifkv_kvcache *)input->cache; /* the one selector that writes */
    x->base.scale = 1.0f / sqrtf((float)config->d_head);
    x->base.shape.n_head = config->n_head;
    x->base.shape.n_kv_head = config->n_kv_head;
    x->base.shape.d_head = config->d_head;
    x->n_context = placement->n_context;
    x->n_row = ifkv_placement_kept_rows(placement, rank);
    x->n_chunk = ifkv_placement_chunks(placement, rank);
    x->is_writing = input->budget > 0;
    x->chunk_slot = malloc(((size_t)x->n_chunk + 1) * sizeof *x->chunk_slot);
    x->stage = malloc((size_t)(x->n_context + 2 * x->n_row) * sizeof *x->stage);
    x->bytes = malloc(2 * (size_t)size * sizeof *x->bytes);
    IFKV_REQUIRE(x->chunk_slot && x->stage && x->bytes, IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                 "selector cacheblend: out of host memory");
    x->offset = x->bytes + size;
    ifkv_placement_slots(placement, rank, x->chunk_slot);
    route(x, placement);
    return IFKV_OK;
}

static void check_layout(check_exchange *x, ifkv_arena *arena) {
    const ifkv_exchange_shape *shape = &x->base.shape;
    const ifkv_dtype dtype = x->base.backend->ops->dtype;
    const int64_t kv = (int64_t)shape->n_kv_head * shape->d_head;
    x->order = ifkv_arena_take(arena, x->n_context, sizeof *x->order);
    x->begin = ifkv_arena_take(arena, x->n_row, sizeof *x->begin);
    x->end = ifkv_arena_take(arena, x->n_row, sizeof *x->end);
    x->gathered = ifkv_arena_view(arena, dtype, x->n_context, kv);
    x->k = ifkv_arena_view(arena, dtype, x->n_context, kv);
    x->v = ifkv_arena_view(arena, dtype, x->n_context, kv);
    x->lse = ifkv_arena_view(arena, IFKV_DTYPE_F32, x->n_row, shape->n_head);
}

static ifkv_status check_begin(check_exchange *x) {
    ifkv_backend *backend = x->base.backend;
    const int64_t *order = x->stage, *begin = order + x->n_context, *end = begin + x->n_row;
    const size_t bytes = (size_t)x->n_row * sizeof *end;
    IFKV_TRY(backend->ops->upload(backend, x->order, order, (size_t)x->n_context * sizeof *order));
    IFKV_TRY(backend->ops->upload(backend, x->begin, begin, bytes));
    return backend->ops->upload(backend, x->end, end, bytes);
}

/* The context rows of a layer; prompt rows may follow them. */
static ifkv_view shard_rows(const check_exchange *x, ifkv_view layer) {
    return ifkv_view_rows(&layer, 0, x->n_row);
}

static ifkv_status check_store(ifkv_exchange *exchange, int layer, const ifkv_view *k,
                               const ifkv_view *v) {
    check_exchange *x = (check_exchange *)exchange;
    ifkv_backend *backend = exchange->backend;
    const ifkv_view k_shard = shard_rows(x, ifkv_kvcache_k(exchange->cache, layer)),
                    v_shard = shard_rows(x, ifkv_kvcache_v(exchange->cache, layer));
    IFKV_TRY(backend->ops->row_distance(backend, v, &v_shard, x->deviation));
    if (!x->is_writing) return IFKV_OK;
    IFKV_TRY(backend->ops->gather(backend, k, NULL, &k_shard));
    return backend->ops->gather(backend, v, NULL, &v_shard);
}

/* All ranks' rows of one matrix, in index order. */
static ifkv_status gather_shards(check_exchange *x, const ifkv_view *own, const ifkv_view *all) {
    IFKV_TRY(ifkv_comm_all_gather(x->base.comm, own->data, x->gathered.data, x->bytes, x->offset));
    return x->base.backend->ops->gather(x->base.backend, &x->gathered, x->order, all);
}

static ifkv_status attend_chunk(check_exchange *x, int64_t chunk, const ifkv_view *q,
                                const ifkv_view *out) {
    const int64_t row = x->chunk_slot[chunk], n = x->chunk_slot[chunk + 1] - row;
    const ifkv_attention_args args = {
        .n_head = x->base.shape.n_head,
        .n_kv_head = x->base.shape.n_kv_head,
        .d_head = x->base.shape.d_head,
        .scale = x->base.scale,
        .q = ifkv_view_rows(q, row, n),
        .k = x->k,
        .v = x->v,
        .begin = x->begin + row,
        .end = x->end + row,
        .out = ifkv_view_rows(out, row, n),
        .lse = ifkv_view_rows(&x->lse, row, n),
    };
    return x->base.backend->ops->attention(x->base.backend, &args);
}

/* A call for each chunk: which rows share a tile must not depend on what else is on the rank. */
static ifkv_status check_attend(ifkv_exchange *exchange, int layer, const ifkv_view *q,
                                const ifkv_view *out) {
    check_exchange *x = (check_exchange *)exchange;
    const ifkv_view k_shard = shard_rows(x, ifkv_kvcache_k(exchange->cache, layer)),
                    v_shard = shard_rows(x, ifkv_kvcache_v(exchange->cache, layer));
    IFKV_TRY(gather_shards(x, &k_shard, &x->k));
    IFKV_TRY(gather_shards(x, &v_shard, &x->v));
    for (int64_t i = 0; i < x->n_chunk; i++) IFKV_TRY(attend_chunk(x, i, q, out));
    return IFKV_OK;
}

static const ifkv_exchange_ops check_ops = {
    .name = "check",
    .struct_bytes = sizeof(check_exchange),
    .is_home_owner = true,
    .store = check_store,
    .attend = check_attend,
    .explain = "all rows at home with their owners see K and V gathered from every rank; exact",
};

static ifkv_status cacheblend_init(ifkv_selector *selector) {
    select_cacheblend *self = (select_cacheblend *)selector;
    const ifkv_select_input *input = &selector->input;
    IFKV_REQUIRE(input->check_layer < input->model->config.n_layer, IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "method cacheblend: the model has %d layers, expected more than check layer %d",
                 input->model->config.n_layer, input->check_layer);
    self->exchange.base.ops = &check_ops;
    IFKV_TRY(check_init(&self->exchange, input));
    IFKV_TRY(ifkv_scores_init(&self->scores, input));
    return ifkv_pass_init(&self->pass, input->model, input->backend, input->frequency,
                          self->exchange.n_row, self->exchange.n_chunk);
}

static void cacheblend_fini(ifkv_selector *selector) {
    select_cacheblend *self = (select_cacheblend *)selector;
    free(self->exchange.chunk_slot);
    free(self->exchange.stage);
    free(self->exchange.bytes);
    ifkv_scores_fini(&self->scores);
    ifkv_pass_fini(&self->pass);
}

static void cacheblend_layout(ifkv_selector *selector, ifkv_arena *arena) {
    select_cacheblend *self = (select_cacheblend *)selector;
    const ifkv_select_input *input = &selector->input;
    const size_t mark = ifkv_arena_mark(arena);
    ifkv_scores_layout(&self->scores, input, arena);
    check_layout(&self->exchange, arena);
    ifkv_pass_layout(&self->pass, arena, input->backend->ops->dtype);
    self->exchange.deviation = self->scores.own;
    ifkv_arena_reset(arena, mark); /* choosing comes after scoring */
    ifkv_scores_layout_best(&self->scores, input, arena);
}

static void report(const ifkv_select_input *input, int done) {
    if (input->progress)
        input->progress(input->progress_arg, IFKV_STAGE_SCORE, done, input->check_layer + 1);
}

static ifkv_status cacheblend_score(ifkv_selector *selector, float *score) {
    select_cacheblend *self = (select_cacheblend *)selector;
    const ifkv_select_input *input = &selector->input;
    check_exchange *x = &self->exchange;
    IFKV_TRY(check_begin(x));
    IFKV_TRY(ifkv_pass_begin(&self->pass, input->backend, x->n_row, input->token,
                             input->cache->index, x->n_chunk, x->chunk_slot));
    if (input->check_layer > 0) {
        IFKV_TRY(ifkv_layer_run(&self->pass, 0, &x->base,
                                IFKV_LAYER_Q | IFKV_LAYER_ATTEND | IFKV_LAYER_FINISH));
        report(input, 1);
    }
    IFKV_TRY(ifkv_layer_run(&self->pass, input->check_layer, &x->base, IFKV_LAYER_KV));
    if (x->is_writing) selector->rewritten_layer = input->check_layer;
    report(input, input->check_layer + 1);
    const ifkv_status bad = ifkv_scores_check(&self->scores, input, input->check_layer);
    IFKV_TRY(ifkv_comm_agree(input->comm, bad, NULL));
    return ifkv_scores_gather(&self->scores, input, score);
}

static ifkv_status cacheblend_choose(ifkv_selector *selector, const float *score,
                                     int64_t *selected) {
    return ifkv_scores_best(&((select_cacheblend *)selector)->scores, &selector->input, score,
                            selected);
}

const ifkv_select_ops ifkv_select_cacheblend_ops = {
    .name = "cacheblend",
    .struct_bytes = sizeof(select_cacheblend),
    .has_scores = true,
    .budget = ifkv_select_ratio_budget,
    .init = cacheblend_init,
    .fini = cacheblend_fini,
    .layout = cacheblend_layout,
    .score = cacheblend_score,
    .choose = cacheblend_choose,
    .explain = "recompute the rows whose V at layer 1 deviates most from full prefill's",
};
