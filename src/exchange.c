/* Find and create exchanges by name.  See exchange.h. */
#include "exchange.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const ifkv_exchange_ops *const exchanges[] = {
    &ifkv_exchange_query_ops, &ifkv_exchange_delta_ops, &ifkv_exchange_kv_ops,
    &ifkv_exchange_local_ops};

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
                 "exchange: unknown name: got \"%s\", expected query, delta, kv or local", name);
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
