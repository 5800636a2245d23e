/* Exchange `delta`: every rank holds all K/V, and only what changes travels.
 *
 * While the context is encoded each layer's static K/V go to every rank, which keeps a full copy,
 * sorted by index; in a pass only the fresh rows go to all ranks, and a row attends over the full
 * copy at home: static and fresh keys together, no partial results.  Exact, and even for any
 * distribution of the rows.  Bytes received by a rank: share (T - n_kept) * kvb for T context rows,
 * store (n - n_home) * kvb for n rows of the pass.  One rank alone attends over its shard. */
#include "exchange.h"

#include <stdlib.h>
#include <string.h>

typedef struct exchange_delta {
    ifkv_exchange base;
    int64_t n_row, n_home, n_owned; /* of this pass */
    size_t *bytes, *offset;         /* [size] host: messages of share, later of store */
    int64_t *stage;                 /* [max(T, 2 * max_row)] host */
    int64_t *next;                  /* [size] host scratch of a route */

    /* Back-end memory. */
    ifkv_kvcache full;   /* all context rows; row i has index i */
    ifkv_view message;   /* [T, 2 kv] K, V of a layer's static rows, or of fresh rows, rank-major */
    int64_t *static_row; /* [T] index of each row of a static message */
    int64_t *fresh_row;  /* [n_row] index of each row of a fresh message */
    int64_t *owned_row;  /* [n_owned] rows of a fresh message that this rank stores */
    int64_t *owned_slot; /* [n_owned] and where in its shard */
    int64_t *begin, *end; /* [n_home] spans on the full copy */
    ifkv_view owned;      /* [max_row, 2 kv] */
    ifkv_view lse;        /* [max_home, n_head] written, never read */
} exchange_delta;

static int64_t kv_cols(const exchange_delta *x) {
    return (int64_t)x->base.shape.n_kv_head * x->base.shape.d_head;
}

static size_t row_bytes(const exchange_delta *x) {
    return (size_t)(2 * kv_cols(x)) * ifkv_dtype_bytes(x->base.backend->ops->dtype);
}

/* Without others, or without rows to come, nothing is copied. */
static bool has_copy(const exchange_delta *x) {
    return x->base.comm->size > 1 && x->base.shape.max_row > 0;
}

static ifkv_status delta_init(ifkv_exchange *exchange) {
    exchange_delta *x = (exchange_delta *)exchange;
    const size_t size = (size_t)exchange->comm->size, rows = (size_t)exchange->shape.max_row,
                 context = has_copy(x) ? (size_t)exchange->shape.placement->n_context : 0;
    x->bytes = calloc(2 * size, sizeof *x->bytes);
    x->next = calloc(size, sizeof *x->next);
    x->stage = malloc(((context > 2 * rows ? context : 2 * rows) + 1) * sizeof *x->stage);
    IFKV_REQUIRE(x->bytes && x->next && x->stage, IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                 "exchange delta: out of host memory");
    x->offset = x->bytes + size;
    return IFKV_OK;
}

static void delta_fini(ifkv_exchange *exchange) {
    exchange_delta *x = (exchange_delta *)exchange;
    free(x->bytes);
    free(x->next);
    free(x->stage);
}

static void delta_layout_shared(ifkv_exchange *exchange, ifkv_arena *arena) {
    exchange_delta *x = (exchange_delta *)exchange;
    const ifkv_dtype dtype = exchange->backend->ops->dtype;
    const int64_t n = exchange->shape.placement->n_context, kv = kv_cols(x);
    x->full = *exchange->cache;
    if (!has_copy(x)) return;
    ifkv_kvcache_layout(&x->full, arena, dtype, exchange->shape.n_layer, kv, n);
    x->full.n_row = n;
    x->full.index = NULL; /* row i has index i */
    x->message = ifkv_arena_view(arena, dtype, n, 2 * kv);
    x->static_row = ifkv_arena_take(arena, n, sizeof *x->static_row);
}

static void delta_layout(ifkv_exchange *exchange, ifkv_arena *arena) {
    exchange_delta *x = (exchange_delta *)exchange;
    const int64_t rows = exchange->shape.max_row, home = exchange->shape.max_home;
    x->fresh_row = ifkv_arena_take(arena, rows, sizeof *x->fresh_row);
    x->owned_row = ifkv_arena_take(arena, rows, sizeof *x->owned_row);
    x->owned_slot = ifkv_arena_take(arena, rows, sizeof *x->owned_slot);
    x->begin = ifkv_arena_take(arena, home, sizeof *x->begin);
    x->end = ifkv_arena_take(arena, home, sizeof *x->end);
    x->owned = ifkv_arena_view(arena, exchange->backend->ops->dtype, rows, 2 * kv_cols(x));
    x->lse = ifkv_arena_view(arena, IFKV_DTYPE_F32, home, exchange->shape.n_head);
}

/* Messages of next[r] rows from rank r, one rank after the other; next[r] becomes the first of
 * them. */
static void route_messages(exchange_delta *x) {
    int64_t begin = 0;
    for (int r = 0; r < x->base.comm->size; r++) {
        const int64_t n = x->next[r];
        x->bytes[r] = (size_t)n * row_bytes(x);
        x->offset[r] = (size_t)begin * row_bytes(x);
        x->next[r] = begin;
        begin += n;
    }
}

static ifkv_status route_static(exchange_delta *x) {
    const ifkv_placement *placement = x->base.shape.placement;
    for (int r = 0; r < x->base.comm->size; r++)
        x->next[r] = ifkv_placement_kept_rows(placement, r);
    route_messages(x);
    for (int64_t i = 0; i < placement->n_chunk; i++)
        for (int64_t index = placement->offset[i]; index < placement->offset[i + 1]; index++)
            x->stage[x->next[placement->rank[i]]++] = index;
    return x->base.backend->ops->upload(x->base.backend, x->static_row, x->stage,
                                        (size_t)placement->n_context * sizeof *x->stage);
}

/* K and V in this rank's piece of the message, to all ranks, into the full copy of a layer. */
static ifkv_status send(exchange_delta *x, int layer, const ifkv_view *k, const ifkv_view *v,
                        int64_t n_row, const int64_t *row) {
    const ifkv_backend_ops *ops = x->base.backend->ops;
    const int rank = x->base.comm->rank;
    const int64_t kv = kv_cols(x);
    const int64_t first = (int64_t)(x->offset[rank] / row_bytes(x)),
                  n = (int64_t)(x->bytes[rank] / row_bytes(x));
    const ifkv_view k_mine = ifkv_view_block(&x->message, first, n, 0, kv),
                    v_mine = ifkv_view_block(&x->message, first, n, kv, kv);
    const ifkv_view k_all = ifkv_view_block(&x->message, 0, n_row, 0, kv),
                    v_all = ifkv_view_block(&x->message, 0, n_row, kv, kv);
    const ifkv_view k_full = ifkv_kvcache_k(&x->full, layer),
                    v_full = ifkv_kvcache_v(&x->full, layer);
    IFKV_TRY(ops->gather(x->base.backend, k, NULL, &k_mine));
    IFKV_TRY(ops->gather(x->base.backend, v, NULL, &v_mine));
    IFKV_TRY(ifkv_comm_all_gather(x->base.comm, k_mine.data, x->message.data, x->bytes, x->offset));
    IFKV_TRY(ops->scatter(x->base.backend, &k_all, row, &k_full));
    return ops->scatter(x->base.backend, &v_all, row, &v_full);
}

static ifkv_status delta_share(ifkv_exchange *exchange, int layer) {
    exchange_delta *x = (exchange_delta *)exchange;
    if (!has_copy(x)) return IFKV_OK;
    if (layer == 0) IFKV_TRY(route_static(x));
    const ifkv_view k = ifkv_kvcache_k(exchange->cache, layer),
                    v = ifkv_kvcache_v(exchange->cache, layer);
    return send(x, layer, &k, &v, x->full.n_row, x->static_row);
}

static ifkv_status check_rows(exchange_delta *x, const ifkv_exchange_rows *rows) {
    const ifkv_exchange_shape *shape = &x->base.shape;
    const int64_t n = rows->n_row, n_context = shape->placement->n_context;
    IFKV_REQUIRE(
        n <= shape->max_row && x->n_home <= shape->max_home, IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
        "exchange delta: got %lld rows, %lld at home, expected at most %lld, %lld", (long long)n,
        (long long)x->n_home, (long long)shape->max_row, (long long)shape->max_home);
    IFKV_REQUIRE(n == 0 || rows->index[n - 1] < n_context, IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "exchange delta: got row %lld, expected context rows below %lld",
                 (long long)rows->index[n - 1], (long long)n_context);
    return IFKV_OK;
}

/* The fresh message: where its rows go in the full copy, and which of them this rank stores. */
static ifkv_status route_fresh(exchange_delta *x, const ifkv_exchange_rows *rows) {
    const ifkv_backend_ops *ops = x->base.backend->ops;
    const size_t item = sizeof *x->stage;
    int64_t *row = x->stage, *at = row + rows->n_row;
    for (int64_t i = 0; i < rows->n_row; i++) {
        at[i] = x->next[rows->home[i]]++; /* rank-major place of the i-th row */
        row[at[i]] = rows->index[i];
    }
    IFKV_TRY(ops->upload(x->base.backend, x->fresh_row, row, (size_t)rows->n_row * item));
    x->n_owned = 0;
    for (int64_t i = 0; i < rows->n_row; i++) {
        if (rows->owner[i] != x->base.comm->rank) continue;
        at[x->n_owned] = at[i];
        row[x->n_owned++] = ifkv_kvcache_visible(x->base.cache, rows->index[i]) - 1;
    }
    IFKV_TRY(ops->upload(x->base.backend, x->owned_row, at, (size_t)x->n_owned * item));
    return ops->upload(x->base.backend, x->owned_slot, row, (size_t)x->n_owned * item);
}

static ifkv_status delta_begin(ifkv_exchange *exchange, const ifkv_exchange_rows *rows) {
    exchange_delta *x = (exchange_delta *)exchange;
    const ifkv_backend_ops *ops = exchange->backend->ops;
    const int rank = exchange->comm->rank;
    x->n_row = rows->n_row;
    memset(x->next, 0, (size_t)exchange->comm->size * sizeof *x->next);
    for (int64_t i = 0; i < rows->n_row; i++) x->next[rows->home[i]]++;
    x->n_home = x->next[rank];
    IFKV_TRY(check_rows(x, rows));
    route_messages(x);
    IFKV_TRY(route_fresh(x, rows));
    int64_t n = 0;
    for (int64_t i = 0; i < rows->n_row; i++)
        if (rows->home[i] == rank) x->stage[n++] = rows->index[i] + 1;
    const size_t bytes = (size_t)n * sizeof *x->stage;
    IFKV_TRY(ops->upload(exchange->backend, x->end, x->stage, bytes));
    memset(x->stage, 0, bytes);
    return ops->upload(exchange->backend, x->begin, x->stage, bytes);
}

static ifkv_status delta_store(ifkv_exchange *exchange, int layer, const ifkv_view *k,
                               const ifkv_view *v) {
    exchange_delta *x = (exchange_delta *)exchange;
    const ifkv_backend_ops *ops = exchange->backend->ops;
    const int64_t kv = kv_cols(x);
    const ifkv_view k_shard = ifkv_kvcache_k(exchange->cache, layer),
                    v_shard = ifkv_kvcache_v(exchange->cache, layer);
    if (!has_copy(x)) {
        IFKV_TRY(ops->scatter(exchange->backend, k, x->fresh_row, &k_shard));
        return ops->scatter(exchange->backend, v, x->fresh_row, &v_shard);
    }
    IFKV_TRY(send(x, layer, k, v, x->n_row, x->fresh_row));
    const ifkv_view owned = ifkv_view_rows(&x->owned, 0, x->n_owned);
    const ifkv_view k_owned = ifkv_view_block(&owned, 0, x->n_owned, 0, kv),
                    v_owned = ifkv_view_block(&owned, 0, x->n_owned, kv, kv);
    IFKV_TRY(ops->gather(exchange->backend, &x->message, x->owned_row, &owned));
    IFKV_TRY(ops->scatter(exchange->backend, &k_owned, x->owned_slot, &k_shard));
    return ops->scatter(exchange->backend, &v_owned, x->owned_slot, &v_shard);
}

static ifkv_status delta_attend(ifkv_exchange *exchange, int layer, const ifkv_view *q,
                                const ifkv_view *out) {
    exchange_delta *x = (exchange_delta *)exchange;
    const ifkv_attention_args args = {
        .n_head = exchange->shape.n_head,
        .n_kv_head = exchange->shape.n_kv_head,
        .d_head = exchange->shape.d_head,
        .scale = exchange->scale,
        .q = ifkv_view_rows(q, 0, x->n_home),
        .k = ifkv_kvcache_k(&x->full, layer),
        .v = ifkv_kvcache_v(&x->full, layer),
        .begin = x->begin,
        .end = x->end,
        .out = ifkv_view_rows(out, 0, x->n_home),
        .lse = ifkv_view_rows(&x->lse, 0, x->n_home),
    };
    return exchange->backend->ops->attention(exchange->backend, &args);
}

static const ifkv_kvcache *delta_whole(const ifkv_exchange *exchange) {
    return &((const exchange_delta *)exchange)->full;
}

static ifkv_exchange_bytes delta_bytes(const ifkv_exchange *exchange) {
    const exchange_delta *x = (const exchange_delta *)exchange;
    const ifkv_placement *placement = exchange->shape.placement;
    if (!has_copy(x)) return (ifkv_exchange_bytes){0};
    const int64_t n_kept = ifkv_placement_kept_rows(placement, exchange->comm->rank);
    return (ifkv_exchange_bytes){
        .share = (placement->n_context - n_kept) * (int64_t)row_bytes(x),
        .store = (x->n_row - x->n_home) * (int64_t)row_bytes(x),
    };
}

const ifkv_exchange_ops ifkv_exchange_delta_ops = {
    .name = "delta",
    .struct_bytes = sizeof(exchange_delta),
    .is_home_owner = false,
    .is_exact = true,
    .init = delta_init,
    .fini = delta_fini,
    .layout_shared = delta_layout_shared,
    .layout = delta_layout,
    .share = delta_share,
    .begin = delta_begin,
    .store = delta_store,
    .attend = delta_attend,
    .whole = delta_whole,
    .bytes = delta_bytes,
    .explain = "all K/V go to every rank once, in encode, then the fresh rows only; exact, "
               "needs memory for all K/V on every rank",
};
