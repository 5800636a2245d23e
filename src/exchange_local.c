/* Exchange `local`: nothing travels, a row sees its own rank's shard.
 *
 * The control experiment: not exact for more than one rank, and its results depend on the number of
 * ranks.  The prefix rows are lent to every rank once a pass, because attention without a sink row
 * fails (algorithm 3, rule a). */
#include "exchange.h"

#include <stdlib.h>

typedef struct exchange_local {
    ifkv_exchange base;
    int64_t n_home;
    int64_t *stage; /* [max_home] host */
    /* Back-end memory. */
    int64_t *slot;        /* [max_home] shard row of each of my rows */
    int64_t *begin, *end; /* [max_home] spans on this shard */
    int64_t *prefix_end;  /* [max_home] spans on the lent prefix: all of it, or nothing where the
                             shard holds it */
    ifkv_view prefix_k, prefix_v; /* [n_layer * n_prefix, kv] */
    ifkv_view part[2], lse[2];    /* over the lent prefix, over the shard */
} exchange_local;

static ifkv_status local_init(ifkv_exchange *exchange) {
    exchange_local *x = (exchange_local *)exchange;
    x->stage = malloc(((size_t)exchange->shape.max_home + 1) * sizeof *x->stage);
    IFKV_REQUIRE(x->stage, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "exchange local: out of host memory");
    return IFKV_OK;
}

static void local_fini(ifkv_exchange *exchange) {
    free(((exchange_local *)exchange)->stage);
}

static void local_layout(ifkv_exchange *exchange, ifkv_arena *arena) {
    exchange_local *x = (exchange_local *)exchange;
    const ifkv_exchange_shape *shape = &exchange->shape;
    const ifkv_dtype dtype = exchange->backend->ops->dtype;
    const int64_t home = shape->max_home, kv = (int64_t)shape->n_kv_head * shape->d_head;
    x->slot = ifkv_arena_take(arena, home, sizeof *x->slot);
    x->begin = ifkv_arena_take(arena, home, sizeof *x->begin);
    x->end = ifkv_arena_take(arena, home, sizeof *x->end);
    x->prefix_end = ifkv_arena_take(arena, home, sizeof *x->prefix_end);
    x->prefix_k = ifkv_arena_view(arena, dtype, shape->n_layer * shape->n_prefix, kv);
    x->prefix_v = ifkv_arena_view(arena, dtype, shape->n_layer * shape->n_prefix, kv);
    for (int i = 0; i < 2; i++) {
        x->part[i] = ifkv_arena_view(arena, dtype, home, (int64_t)shape->n_head * shape->d_head);
        x->lse[i] = ifkv_arena_view(arena, IFKV_DTYPE_F32, home, shape->n_head);
    }
}

/* Lend the prefix rows of every layer: the rank of chunk 0 holds them in its first slots. */
static ifkv_status lend_prefix(exchange_local *x) {
    ifkv_exchange *exchange = &x->base;
    const ifkv_backend_ops *ops = exchange->backend->ops;
    const int64_t n = exchange->shape.n_prefix;
    if (n == 0 || exchange->comm->size == 1) return IFKV_OK;
    for (int layer = 0; layer < exchange->shape.n_layer; layer++) {
        const ifkv_view k = ifkv_view_rows(&x->prefix_k, layer * n, n),
                        v = ifkv_view_rows(&x->prefix_v, layer * n, n);
        if (exchange->comm->rank == exchange->shape.prefix_rank) {
            const ifkv_view shard_k = ifkv_kvcache_k(exchange->cache, layer);
            const ifkv_view shard_v = ifkv_kvcache_v(exchange->cache, layer);
            IFKV_TRY(ops->gather(exchange->backend, &shard_k, NULL, &k));
            IFKV_TRY(ops->gather(exchange->backend, &shard_v, NULL, &v));
        }
        const size_t bytes = (size_t)(n * k.n_col) * ifkv_dtype_bytes(k.dtype);
        IFKV_TRY(ifkv_comm_bcast(exchange->comm, k.data, bytes, exchange->shape.prefix_rank));
        IFKV_TRY(ifkv_comm_bcast(exchange->comm, v.data, bytes, exchange->shape.prefix_rank));
    }
    return IFKV_OK;
}

static ifkv_status upload_each(exchange_local *x, const ifkv_exchange_rows *rows, int64_t *to,
                               int64_t (*value)(const exchange_local *x, int64_t index)) {
    int64_t n = 0;
    for (int64_t i = 0; i < rows->n_row; i++)
        if (rows->home[i] == x->base.comm->rank) x->stage[n++] = value(x, rows->index[i]);
    return x->base.backend->ops->upload(x->base.backend, to, x->stage, (size_t)n * sizeof *to);
}

static int64_t visible_of(const exchange_local *x, int64_t index) {
    return ifkv_kvcache_visible(x->base.cache, index);
}
static int64_t slot_of(const exchange_local *x, int64_t index) {
    return ifkv_kvcache_visible(x->base.cache, index) - 1;
}
static int64_t zero_of(const exchange_local *x, int64_t index) {
    (void)x, (void)index;
    return 0;
}
static int64_t prefix_of(const exchange_local *x, int64_t index) {
    (void)index;
    const bool is_lent = x->base.comm->size > 1 && x->base.comm->rank != x->base.shape.prefix_rank;
    return is_lent ? x->base.shape.n_prefix : 0;
}

static ifkv_status local_begin(ifkv_exchange *exchange, const ifkv_exchange_rows *rows) {
    exchange_local *x = (exchange_local *)exchange;
    x->n_home = 0;
    for (int64_t i = 0; i < rows->n_row; i++) {
        IFKV_REQUIRE(rows->home[i] == rows->owner[i], IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                     "exchange local: row %lld is at home on rank %d and stored on rank %d",
                     (long long)rows->index[i], rows->home[i], rows->owner[i]);
        x->n_home += rows->home[i] == exchange->comm->rank;
    }
    IFKV_REQUIRE(x->n_home <= exchange->shape.max_home, IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "exchange local: got %lld rows at home, expected at most %lld",
                 (long long)x->n_home, (long long)exchange->shape.max_home);
    IFKV_TRY(upload_each(x, rows, x->slot, slot_of));
    IFKV_TRY(upload_each(x, rows, x->begin, zero_of));
    IFKV_TRY(upload_each(x, rows, x->end, visible_of));
    IFKV_TRY(upload_each(x, rows, x->prefix_end, prefix_of));
    return lend_prefix(x);
}

static ifkv_status local_store(ifkv_exchange *exchange, int layer, const ifkv_view *k,
                               const ifkv_view *v) {
    exchange_local *x = (exchange_local *)exchange;
    const ifkv_view k_shard = ifkv_kvcache_k(exchange->cache, layer),
                    v_shard = ifkv_kvcache_v(exchange->cache, layer);
    IFKV_TRY(exchange->backend->ops->scatter(exchange->backend, k, x->slot, &k_shard));
    return exchange->backend->ops->scatter(exchange->backend, v, x->slot, &v_shard);
}

static ifkv_status local_attend(ifkv_exchange *exchange, int layer, const ifkv_view *q,
                                const ifkv_view *out) {
    exchange_local *x = (exchange_local *)exchange;
    const ifkv_exchange_shape *shape = &exchange->shape;
    const int64_t n = x->n_home, p = shape->n_prefix;
    ifkv_view part[2], lse[2];
    for (int i = 0; i < 2; i++) {
        part[i] = ifkv_view_rows(&x->part[i], 0, n);
        lse[i] = ifkv_view_rows(&x->lse[i], 0, n);
    }
    ifkv_attention_args args = {
        .n_head = shape->n_head,
        .n_kv_head = shape->n_kv_head,
        .d_head = shape->d_head,
        .scale = exchange->scale,
        .q = *q,
        .k = ifkv_view_rows(&x->prefix_k, layer * p, p),
        .v = ifkv_view_rows(&x->prefix_v, layer * p, p),
        .begin = x->begin,
        .end = x->prefix_end,
        .out = part[0],
        .lse = lse[0],
    };
    IFKV_TRY(exchange->backend->ops->attention(exchange->backend, &args));
    args.k = ifkv_kvcache_k(exchange->cache, layer);
    args.v = ifkv_kvcache_v(exchange->cache, layer);
    args.end = x->end;
    args.out = part[1];
    args.lse = lse[1];
    IFKV_TRY(exchange->backend->ops->attention(exchange->backend, &args));
    const ifkv_merge_args merge = {
        .n_head = shape->n_head,
        .d_head = shape->d_head,
        .n_part = 2,
        .out_part = part,
        .lse_part = lse,
        .out = *out,
    };
    return exchange->backend->ops->merge(exchange->backend, &merge);
}

const ifkv_exchange_ops ifkv_exchange_local_ops = {
    .name = "local",
    .struct_bytes = sizeof(exchange_local),
    .is_home_owner = true,
    .init = local_init,
    .fini = local_fini,
    .layout = local_layout,
    .begin = local_begin,
    .store = local_store,
    .attend = local_attend,
    .explain = "a row sees its own rank's keys and the prefix only; nothing travels; not exact, "
               "for comparison",
};
