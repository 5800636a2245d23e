/* Exchange `ring`: blocks of K/V travel round the ranks, behind the attention over them.
 *
 * Exact prefill with zigzag slices: the pass is the whole context.  In each layer a rank's K/V make
 * P - 1 hops; hop h brings the block of rank r - h, while the block of rank r - h + 1 is attended
 * to and passed on at the same time, from two buffers that take turns.  Rows see a prefix of a
 * block; those that see none of it are the first ones, since rows ascend, and cost nothing. Partial
 * results are merged by LSE in the order of arrival, in float32, so a fixed P gives fixed bits.
 *
 * Bytes received by a rank and layer: (T - n_home) rows of K and V, which is (P - 1) / P * T of
 * them with equal slices, counted exactly.  A layer that only stores K/V sends nothing.  Source:
 * Ring Attention (arXiv 2310.01889); zigzag as in algorithm 2.4. */
#include "exchange.h"

#include <stdlib.h>
#include <string.h>

typedef struct exchange_ring {
    ifkv_exchange base;
    int64_t n_home;      /* of this pass */
    int64_t *n_of;       /* [size] host: rows of each rank */
    int64_t *first;      /* [size] host: my rows from here on see keys of that rank */
    int64_t *stage;      /* [size * max_home] host */
    int64_t *begin;      /* [max_home] back-end memory: zeros */
    int64_t *end;        /* [size, max_home] back-end memory: keys of each rank that my rows see */
    ifkv_view block[2];  /* [max_shard, 2 kv] K, V: at hand, and on its way */
    ifkv_view sum, part; /* [max_home, q] float32: merged so far, over the block at hand */
    ifkv_view sum_lse, part_lse; /* [max_home, n_head] */
} exchange_ring;

static ifkv_status ring_init(ifkv_exchange *exchange) {
    exchange_ring *x = (exchange_ring *)exchange;
    const size_t size = (size_t)exchange->comm->size;
    x->n_of = calloc(2 * size, sizeof *x->n_of);
    x->stage = malloc((size * (size_t)exchange->shape.max_home + 1) * sizeof *x->stage);
    IFKV_REQUIRE(x->n_of && x->stage, IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                 "exchange ring: out of host memory");
    x->first = x->n_of + size;
    return IFKV_OK;
}

static void ring_fini(ifkv_exchange *exchange) {
    exchange_ring *x = (exchange_ring *)exchange;
    free(x->n_of);
    free(x->stage);
}

static void ring_layout(ifkv_exchange *exchange, ifkv_arena *arena) {
    exchange_ring *x = (exchange_ring *)exchange;
    const ifkv_exchange_shape *shape = &exchange->shape;
    const int64_t home = shape->max_home, q = (int64_t)shape->n_head * shape->d_head;
    x->begin = ifkv_arena_take(arena, home, sizeof *x->begin);
    x->end = ifkv_arena_take(arena, exchange->comm->size * home, sizeof *x->end);
    for (int i = 0; i < 2; i++)
        x->block[i] = ifkv_arena_view(arena, exchange->backend->ops->dtype, shape->max_shard,
                                      2 * (int64_t)shape->n_kv_head * shape->d_head);
    x->sum = ifkv_arena_view(arena, IFKV_DTYPE_F32, home, q);
    x->part = ifkv_arena_view(arena, IFKV_DTYPE_F32, home, q);
    x->sum_lse = ifkv_arena_view(arena, IFKV_DTYPE_F32, home, shape->n_head);
    x->part_lse = ifkv_arena_view(arena, IFKV_DTYPE_F32, home, shape->n_head);
}

/* What each of my rows sees of each rank: the rows of that rank at or below it, counted while all
 * rows pass by in ascending index. */
static ifkv_status ring_begin(ifkv_exchange *exchange, const ifkv_exchange_rows *rows) {
    exchange_ring *x = (exchange_ring *)exchange;
    const ifkv_backend_ops *ops = exchange->backend->ops;
    const int size = exchange->comm->size, rank = exchange->comm->rank;
    const int64_t max = exchange->shape.max_home;
    IFKV_TRY(ifkv_exchange_check_whole(exchange, rows));
    memset(x->n_of, 0, 2 * (size_t)size * sizeof *x->n_of);
    x->n_home = 0;
    for (int64_t i = 0; i < rows->n_row; i++) {
        x->n_of[rows->home[i]]++;
        if (rows->home[i] != rank) continue;
        for (int r = 0; r < size; r++) {
            x->stage[r * max + x->n_home] = x->n_of[r];
            x->first[r] += x->n_of[r] == 0;
        }
        x->n_home++;
    }
    for (int r = 0; r < size; r++)
        IFKV_REQUIRE(x->n_of[r] <= exchange->shape.max_shard, IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                     "exchange ring: got %lld rows of rank %d, expected at most %lld",
                     (long long)x->n_of[r], r, (long long)exchange->shape.max_shard);
    const size_t bytes = (size_t)x->n_home * sizeof *x->stage;
    for (int r = 0; r < size; r++)
        IFKV_TRY(ops->upload(exchange->backend, x->end + r * max, x->stage + r * max, bytes));
    memset(x->stage, 0, bytes);
    return ops->upload(exchange->backend, x->begin, x->stage, bytes);
}

/* Rows [row, row + n) of what is merged so far, with the part over the block at hand if n_part is
 * 2. */
static ifkv_status fold(exchange_ring *x, int64_t row, int64_t n, int n_part, const ifkv_view *to) {
    const ifkv_view out[2] = {ifkv_view_rows(&x->sum, row, n), ifkv_view_rows(&x->part, row, n)};
    const ifkv_view lse[2] = {ifkv_view_rows(&x->sum_lse, row, n),
                              ifkv_view_rows(&x->part_lse, row, n)};
    const ifkv_merge_args args = {
        .n_head = x->base.shape.n_head,
        .d_head = x->base.shape.d_head,
        .n_part = n_part,
        .out_part = out,
        .lse_part = lse,
        .out = ifkv_view_rows(to, row, n),
        .lse = lse[0],
    };
    return x->base.backend->ops->merge(x->base.backend, &args);
}

/* My rows from `first` on over the block of a rank, into the same rows of out and lse. */
static ifkv_status attend_block(exchange_ring *x, const ifkv_view *block, int source, int64_t first,
                                const ifkv_view *q, const ifkv_view *out, const ifkv_view *lse) {
    const ifkv_exchange_shape *shape = &x->base.shape;
    const int64_t n = x->n_home - first, kv = (int64_t)shape->n_kv_head * shape->d_head;
    const ifkv_attention_args args = {
        .n_head = shape->n_head,
        .n_kv_head = shape->n_kv_head,
        .d_head = shape->d_head,
        .scale = x->base.scale,
        .q = ifkv_view_rows(q, first, n),
        .k = ifkv_view_block(block, 0, x->n_of[source], 0, kv),
        .v = ifkv_view_block(block, 0, x->n_of[source], kv, kv),
        .begin = x->begin,
        .end = x->end + source * shape->max_home + first,
        .out = ifkv_view_rows(out, first, n),
        .lse = ifkv_view_rows(lse, first, n),
    };
    return x->base.backend->ops->attention(x->base.backend, &args);
}

/* Attend to the block of a rank and merge; the last one also hands over the result. */
static ifkv_status attend_hop(exchange_ring *x, int hop, int source, const ifkv_view *q,
                              const ifkv_view *out) {
    const ifkv_view *block = &x->block[hop % 2];
    const bool is_last = hop + 1 == x->base.comm->size;
    const int64_t n = x->n_home, first = hop ? x->first[source] : n;
    if (hop == 0) IFKV_TRY(attend_block(x, block, source, 0, q, &x->sum, &x->sum_lse));
    if (first < n) {
        IFKV_TRY(attend_block(x, block, source, first, q, &x->part, &x->part_lse));
        IFKV_TRY(fold(x, first, n - first, 2, is_last ? out : &x->sum));
    }
    return is_last ? fold(x, 0, first, 1, out) : IFKV_OK;
}

static size_t block_bytes(const exchange_ring *x, int source) {
    return (size_t)(x->n_of[source] * x->block[0].n_col) * ifkv_dtype_bytes(x->block[0].dtype);
}

static ifkv_status ring_attend(ifkv_exchange *exchange, int layer, const ifkv_view *q,
                               const ifkv_view *out) {
    exchange_ring *x = (exchange_ring *)exchange;
    ifkv_comm *comm = exchange->comm;
    const int size = comm->size, next = (comm->rank + 1) % size,
              previous = (comm->rank + size - 1) % size;
    IFKV_TRY(ifkv_exchange_pack(exchange, layer, &x->block[0], 0));
    for (int hop = 0; hop < size; hop++) {
        const int source = (comm->rank + size - hop) % size, coming = (source + size - 1) % size;
        const bool is_moving = hop + 1 < size;
        if (is_moving)
            IFKV_TRY(ifkv_comm_shift_begin(comm, x->block[hop % 2].data, block_bytes(x, source),
                                           next, x->block[(hop + 1) % 2].data,
                                           block_bytes(x, coming), previous));
        ifkv_status status = attend_hop(x, hop, source, q, out);
        if (is_moving) { /* in any case: until then the buffers are the message's */
            const ifkv_status moved = ifkv_comm_shift_wait(comm);
            if (status == IFKV_OK) status = moved;
        }
        IFKV_TRY(status);
    }
    return IFKV_OK;
}

const ifkv_exchange_ops ifkv_exchange_ring_ops = {
    .name = "ring",
    .struct_bytes = sizeof(exchange_ring),
    .is_home_owner = true,
    .is_exact = true,
    .n_slice = 2,
    .init = ring_init,
    .fini = ring_fini,
    .layout_shared = ifkv_exchange_layout_nothing,
    .layout = ring_layout,
    .share = ifkv_exchange_share_nothing,
    .begin = ring_begin,
    .store = ifkv_exchange_store_whole,
    .attend = ring_attend,
    .bytes = ifkv_exchange_whole_bytes,
    .explain =
        "K and V of zigzag slices travel round the ranks in every layer, behind the attention "
        "over them; exact",
};
