/* Find and create exchanges by name; what those over whole contexts share.  See exchange.h. */
#include "exchange.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const ifkv_exchange_ops *const exchanges[] = {
    &ifkv_exchange_query_ops, &ifkv_exchange_delta_ops, &ifkv_exchange_kv_ops,
    &ifkv_exchange_local_ops, &ifkv_exchange_ring_ops,  &ifkv_exchange_allgather_ops};

const ifkv_exchange_ops *ifkv_exchange_find(const char *name) {
    for (size_t i = 0; i < sizeof exchanges / sizeof *exchanges; i++)
        if (!strcmp(exchanges[i]->name, name)) return exchanges[i];
    return NULL;
}

ifkv_status ifkv_exchange_create(const char *name, ifkv_backend *backend, ifkv_comm *comm,
                                 ifkv_kvcache *cache, const ifkv_exchange_shape *shape,
                                 ifkv_exchange **exchange_p) {
    const ifkv_exchange_ops *ops = ifkv_exchange_find(name);
    IFKV_REQUIRE(ops, IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "exchange: unknown name: got \"%s\", expected query, delta, kv, local, ring or "
                 "allgather",
                 name);
    ifkv_exchange *exchange = calloc(1, ops->struct_bytes);
    IFKV_REQUIRE(exchange, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "exchange %s: out of host memory",
                 name);
    exchange->ops = ops;
    exchange->backend = backend;
    exchange->comm = comm;
    exchange->cache = cache;
    exchange->shape = *shape;
    exchange->scale = 1.0f / sqrtf((float)shape->d_head);
    const ifkv_status status = ops->init(exchange);
    if (status != IFKV_OK) {
        ifkv_exchange_destroy(exchange);
        return status;
    }
    *exchange_p = exchange;
    return IFKV_OK;
}

ifkv_status ifkv_exchange_init_nothing(ifkv_exchange *exchange) {
    (void)exchange;
    return IFKV_OK;
}

void ifkv_exchange_fini_nothing(ifkv_exchange *exchange) {
    (void)exchange;
}

ifkv_status ifkv_exchange_begin_nothing(ifkv_exchange *exchange, const ifkv_exchange_rows *rows) {
    (void)exchange, (void)rows;
    return IFKV_OK;
}

void ifkv_exchange_layout_nothing(ifkv_exchange *exchange, ifkv_arena *arena) {
    (void)exchange, (void)arena;
}

ifkv_status ifkv_exchange_share_nothing(ifkv_exchange *exchange, int layer) {
    (void)exchange, (void)layer;
    return IFKV_OK;
}

ifkv_exchange_bytes ifkv_exchange_no_bytes(const ifkv_exchange *exchange) {
    (void)exchange;
    return (ifkv_exchange_bytes){0};
}

void ifkv_exchange_destroy(ifkv_exchange *exchange) {
    if (!exchange) return;
    exchange->ops->fini(exchange);
    free(exchange);
}

ifkv_status ifkv_exchange_check_whole(const ifkv_exchange *exchange,
                                      const ifkv_exchange_rows *rows) {
    const ifkv_kvcache *cache = exchange->cache;
    int64_t n = 0;
    for (int64_t i = 0; i < rows->n_row; i++) {
        IFKV_REQUIRE(rows->home[i] == rows->owner[i], IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                     "exchange %s: row %lld is at home on rank %d and stored on rank %d",
                     exchange->ops->name, (long long)rows->index[i], rows->home[i], rows->owner[i]);
        if (rows->home[i] != exchange->comm->rank) continue;
        IFKV_REQUIRE(n < cache->n_row && cache->index[n] == rows->index[i], IFKV_ERR_INTERNAL,
                     IFKV_E_SHAPE, "exchange %s: row %lld is not row %lld of the shard",
                     exchange->ops->name, (long long)rows->index[i], (long long)n);
        n++;
    }
    IFKV_REQUIRE(n == cache->n_row && n <= exchange->shape.max_home &&
                     rows->n_row <= exchange->shape.max_row,
                 IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "exchange %s: got %lld rows, %lld at home, expected at most %lld and all %lld of "
                 "the shard",
                 exchange->ops->name, (long long)rows->n_row, (long long)n,
                 (long long)exchange->shape.max_row, (long long)cache->n_row);
    return IFKV_OK;
}

ifkv_status ifkv_exchange_store_whole(ifkv_exchange *exchange, int layer, const ifkv_view *k,
                                      const ifkv_view *v) {
    const ifkv_view k_shard = ifkv_kvcache_k(exchange->cache, layer),
                    v_shard = ifkv_kvcache_v(exchange->cache, layer);
    IFKV_TRY(exchange->backend->ops->gather(exchange->backend, k, NULL, &k_shard));
    return exchange->backend->ops->gather(exchange->backend, v, NULL, &v_shard);
}

ifkv_exchange_bytes ifkv_exchange_whole_bytes(const ifkv_exchange *exchange) {
    const ifkv_exchange_shape *shape = &exchange->shape;
    const int64_t row = 2 * (int64_t)shape->n_kv_head * shape->d_head *
                        (int64_t)ifkv_dtype_bytes(exchange->backend->ops->dtype);
    return (ifkv_exchange_bytes){.attend = (shape->max_row - shape->max_home) * row};
}

ifkv_status ifkv_exchange_pack(ifkv_exchange *exchange, int layer, const ifkv_view *block,
                               int64_t row) {
    const ifkv_view k_shard = ifkv_kvcache_k(exchange->cache, layer),
                    v_shard = ifkv_kvcache_v(exchange->cache, layer);
    const ifkv_view k = ifkv_view_block(block, row, k_shard.n_row, 0, k_shard.n_col),
                    v = ifkv_view_block(block, row, v_shard.n_row, k_shard.n_col, v_shard.n_col);
    IFKV_TRY(exchange->backend->ops->gather(exchange->backend, &k_shard, NULL, &k));
    return exchange->backend->ops->gather(exchange->backend, &v_shard, NULL, &v);
}
