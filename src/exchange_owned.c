/* Rows that stay with their owners.  See exchange_owned.h. */
#include "exchange_owned.h"

#include <stdlib.h>

static int64_t kv_cols(const ifkv_exchange *exchange) {
    return (int64_t)exchange->shape.n_kv_head * exchange->shape.d_head;
}

static int prefix_rank(const ifkv_exchange *exchange) {
    return exchange->shape.placement->rank[0];
}

/* Prefix rows that travel: none if there is nobody to lend them to, or no row to see them. */
static int64_t lent_rows(const ifkv_exchange *exchange) {
    const bool is_lent = exchange->comm->size > 1 && exchange->shape.max_row > 0;
    return is_lent ? exchange->shape.placement->n_prefix : 0;
}

ifkv_status ifkv_exchange_owned_init(ifkv_exchange *exchange) {
    ifkv_exchange_owned *x = (ifkv_exchange_owned *)exchange;
    x->stage = malloc(((size_t)exchange->shape.max_row + 1) * sizeof *x->stage);
    IFKV_REQUIRE(x->stage, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "exchange %s: out of host memory",
                 exchange->ops->name);
    return IFKV_OK;
}

void ifkv_exchange_owned_fini(ifkv_exchange *exchange) {
    free(((ifkv_exchange_owned *)exchange)->stage);
}

void ifkv_exchange_owned_layout_shared(ifkv_exchange *exchange, ifkv_arena *arena) {
    ifkv_exchange_owned *x = (ifkv_exchange_owned *)exchange;
    x->prefix =
        ifkv_arena_view(arena, exchange->backend->ops->dtype,
                        exchange->shape.n_layer * lent_rows(exchange), 2 * kv_cols(exchange));
}

void ifkv_exchange_owned_layout(ifkv_exchange_owned *x, ifkv_arena *arena, int n_part) {
    const ifkv_exchange_shape *shape = &x->base.shape;
    const int64_t home = shape->max_home;
    x->slot = ifkv_arena_take(arena, home, sizeof *x->slot);
    x->begin = ifkv_arena_take(arena, home, sizeof *x->begin);
    x->end = ifkv_arena_take(arena, home, sizeof *x->end);
    x->prefix_end = ifkv_arena_take(arena, home, sizeof *x->prefix_end);
    for (int i = 0; i < n_part; i++) {
        x->part[i] =
            ifkv_arena_view(arena, IFKV_DTYPE_F32, home, (int64_t)shape->n_head * shape->d_head);
        x->lse[i] = ifkv_arena_view(arena, IFKV_DTYPE_F32, home, shape->n_head);
    }
}

/* The rank of chunk 0 holds the prefix in its first slots. */
ifkv_status ifkv_exchange_owned_share(ifkv_exchange *exchange, int layer) {
    ifkv_exchange_owned *x = (ifkv_exchange_owned *)exchange;
    const ifkv_backend_ops *ops = exchange->backend->ops;
    const int64_t n = lent_rows(exchange), kv = kv_cols(exchange);
    if (n == 0) return IFKV_OK;
    const ifkv_view k = ifkv_view_block(&x->prefix, layer * n, n, 0, kv);
    if (exchange->comm->rank == prefix_rank(exchange)) {
        const ifkv_view v = ifkv_view_block(&x->prefix, layer * n, n, kv, kv);
        const ifkv_view shard_k = ifkv_kvcache_k(exchange->cache, layer),
                        shard_v = ifkv_kvcache_v(exchange->cache, layer);
        IFKV_TRY(ops->gather(exchange->backend, &shard_k, NULL, &k));
        IFKV_TRY(ops->gather(exchange->backend, &shard_v, NULL, &v));
    }
    const size_t bytes = (size_t)(n * 2 * kv) * ifkv_dtype_bytes(k.dtype);
    return ifkv_comm_bcast(exchange->comm, k.data, bytes, prefix_rank(exchange));
}

static ifkv_status upload_each(ifkv_exchange_owned *x, const ifkv_exchange_rows *rows, int64_t *to,
                               int64_t (*value)(const ifkv_exchange_owned *x, int64_t index)) {
    int64_t n = 0;
    for (int64_t i = 0; i < rows->n_row; i++)
        if (rows->home[i] == x->base.comm->rank) x->stage[n++] = value(x, rows->index[i]);
    return x->base.backend->ops->upload(x->base.backend, to, x->stage, (size_t)n * sizeof *to);
}

static int64_t visible_of(const ifkv_exchange_owned *x, int64_t index) {
    return ifkv_kvcache_visible(x->base.cache, index);
}
static int64_t slot_of(const ifkv_exchange_owned *x, int64_t index) {
    return ifkv_kvcache_visible(x->base.cache, index) - 1;
}
static int64_t zero_of(const ifkv_exchange_owned *x, int64_t index) {
    (void)x, (void)index;
    return 0;
}
static int64_t prefix_of(const ifkv_exchange_owned *x, int64_t index) {
    (void)index;
    return x->base.comm->rank == prefix_rank(&x->base) ? 0 : lent_rows(&x->base);
}

ifkv_status ifkv_exchange_owned_begin(ifkv_exchange *exchange, const ifkv_exchange_rows *rows) {
    ifkv_exchange_owned *x = (ifkv_exchange_owned *)exchange;
    x->n_home = 0;
    for (int64_t i = 0; i < rows->n_row; i++) {
        IFKV_REQUIRE(rows->home[i] == rows->owner[i], IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                     "exchange %s: row %lld is at home on rank %d and stored on rank %d",
                     exchange->ops->name, (long long)rows->index[i], rows->home[i], rows->owner[i]);
        IFKV_REQUIRE(rows->index[i] >= lent_rows(exchange), IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                     "exchange %s: row %lld is of the prefix, whose copies would go stale",
                     exchange->ops->name, (long long)rows->index[i]);
        x->n_home += rows->home[i] == exchange->comm->rank;
    }
    IFKV_REQUIRE(rows->n_row <= exchange->shape.max_row && x->n_home <= exchange->shape.max_home,
                 IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "exchange %s: got %lld rows, %lld at home, expected at most %lld, %lld",
                 exchange->ops->name, (long long)rows->n_row, (long long)x->n_home,
                 (long long)exchange->shape.max_row, (long long)exchange->shape.max_home);
    IFKV_TRY(upload_each(x, rows, x->slot, slot_of));
    IFKV_TRY(upload_each(x, rows, x->begin, zero_of));
    IFKV_TRY(upload_each(x, rows, x->end, visible_of));
    return upload_each(x, rows, x->prefix_end, prefix_of);
}

ifkv_status ifkv_exchange_owned_store(ifkv_exchange *exchange, int layer, const ifkv_view *k,
                                      const ifkv_view *v) {
    const ifkv_exchange_owned *x = (ifkv_exchange_owned *)exchange;
    const ifkv_view k_shard = ifkv_kvcache_k(exchange->cache, layer),
                    v_shard = ifkv_kvcache_v(exchange->cache, layer);
    IFKV_TRY(exchange->backend->ops->scatter(exchange->backend, k, x->slot, &k_shard));
    return exchange->backend->ops->scatter(exchange->backend, v, x->slot, &v_shard);
}

ifkv_status ifkv_exchange_owned_attend_part(ifkv_exchange_owned *x, int i, const ifkv_view *q,
                                            const ifkv_view *k, const ifkv_view *v,
                                            const int64_t *end) {
    const ifkv_exchange_shape *shape = &x->base.shape;
    const ifkv_attention_args args = {
        .n_head = shape->n_head,
        .n_kv_head = shape->n_kv_head,
        .d_head = shape->d_head,
        .scale = x->base.scale,
        .q = *q,
        .k = *k,
        .v = *v,
        .begin = x->begin,
        .end = end,
        .out = ifkv_view_rows(&x->part[i], 0, x->n_home),
        .lse = ifkv_view_rows(&x->lse[i], 0, x->n_home),
    };
    return x->base.backend->ops->attention(x->base.backend, &args);
}

ifkv_status ifkv_exchange_owned_attend(ifkv_exchange_owned *x, int layer, const ifkv_view *q) {
    const int64_t n = lent_rows(&x->base), kv = kv_cols(&x->base);
    const ifkv_view prefix_k = ifkv_view_block(&x->prefix, layer * n, n, 0, kv),
                    prefix_v = ifkv_view_block(&x->prefix, layer * n, n, kv, kv);
    const ifkv_view k = ifkv_kvcache_k(x->base.cache, layer),
                    v = ifkv_kvcache_v(x->base.cache, layer);
    IFKV_TRY(ifkv_exchange_owned_attend_part(x, IFKV_OWNED_PREFIX, q, &prefix_k, &prefix_v,
                                             x->prefix_end));
    return ifkv_exchange_owned_attend_part(x, IFKV_OWNED_SHARD, q, &k, &v, x->end);
}

ifkv_status ifkv_exchange_owned_merge(ifkv_exchange_owned *x, int n_part, const ifkv_view *out) {
    ifkv_view part[IFKV_OWNED_MAX_PART], lse[IFKV_OWNED_MAX_PART];
    for (int i = 0; i < n_part; i++) {
        part[i] = ifkv_view_rows(&x->part[i], 0, x->n_home);
        lse[i] = ifkv_view_rows(&x->lse[i], 0, x->n_home);
    }
    const ifkv_merge_args merge = {
        .n_head = x->base.shape.n_head,
        .d_head = x->base.shape.d_head,
        .n_part = n_part,
        .out_part = part,
        .lse_part = lse,
        .out = *out,
    };
    return x->base.backend->ops->merge(x->base.backend, &merge);
}

ifkv_exchange_bytes ifkv_exchange_owned_bytes(const ifkv_exchange *exchange) {
    const ifkv_exchange_owned *x = (const ifkv_exchange_owned *)exchange;
    const size_t row = (size_t)(2 * kv_cols(exchange)) * ifkv_dtype_bytes(x->prefix.dtype);
    const bool is_lender = exchange->comm->rank == prefix_rank(exchange);
    return (ifkv_exchange_bytes){.share = is_lender ? 0 : lent_rows(exchange) * (int64_t)row};
}
