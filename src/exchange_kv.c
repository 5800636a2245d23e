/* Exchange `kv`: fresh K/V of the selected rows travel, rows stay with their owners.
 *
 * A row sees its owner's shard, the rows of the pass that others own, and the lent prefix: not
 * exact for more than one rank, and its results depend on the number of ranks.  Rows travel before
 * they are seen, not when they are stored: of layer 0, whose K/V never change, too, and not of the
 * last one, which nothing attends to.  Bytes received by a rank: (n - n_home) * kvb for n rows of
 * the pass, and the prefix once.  The fewest of the exchanges that let rows see other shards. */
#include "exchange_owned.h"

#include <stdlib.h>
#include <string.h>

enum { N_PART = IFKV_OWNED_MORE + 1 };

typedef struct exchange_kv {
    ifkv_exchange_owned owned;
    int64_t n_row, n_other;       /* of this pass: all, and those that others own */
    size_t *bytes, *offset;       /* [size] host: messages of fresh rows */
    int64_t *next, *place, *seen; /* [size], [max_row], [max_home] host scratch of a route */

    /* Back-end memory. */
    ifkv_view message;  /* [max_row, 2 kv] K, V of the pass, rank-major */
    ifkv_view other;    /* [max_row, 2 kv] those that others own, in index order */
    int64_t *other_row; /* [n_other] message row of each */
    int64_t *other_end; /* [n_home] spans on them */
} exchange_kv;

static int64_t kv_cols(const ifkv_exchange *exchange) {
    return (int64_t)exchange->shape.n_kv_head * exchange->shape.d_head;
}

static size_t row_bytes(const ifkv_exchange *exchange) {
    return (size_t)(2 * kv_cols(exchange)) * ifkv_dtype_bytes(exchange->backend->ops->dtype);
}

static ifkv_status kv_init(ifkv_exchange *exchange) {
    exchange_kv *x = (exchange_kv *)exchange;
    const size_t size = (size_t)exchange->comm->size;
    const size_t rows = (size_t)(exchange->shape.max_row + exchange->shape.max_home);
    IFKV_TRY(ifkv_exchange_owned_init(exchange));
    x->bytes = calloc(2 * size, sizeof *x->bytes);
    x->next = malloc((size + rows) * sizeof *x->next);
    IFKV_REQUIRE(x->bytes && x->next, IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                 "exchange kv: out of host memory");
    x->offset = x->bytes + size;
    x->place = x->next + size;
    x->seen = x->place + exchange->shape.max_row;
    return IFKV_OK;
}

static void kv_fini(ifkv_exchange *exchange) {
    exchange_kv *x = (exchange_kv *)exchange;
    free(x->bytes);
    free(x->next);
    ifkv_exchange_owned_fini(exchange);
}

static void kv_layout(ifkv_exchange *exchange, ifkv_arena *arena) {
    exchange_kv *x = (exchange_kv *)exchange;
    const ifkv_dtype dtype = exchange->backend->ops->dtype;
    const int64_t rows = exchange->shape.max_row, kv = kv_cols(exchange);
    ifkv_exchange_owned_layout(&x->owned, arena, N_PART);
    x->message = ifkv_arena_view(arena, dtype, rows, 2 * kv);
    x->other = ifkv_arena_view(arena, dtype, rows, 2 * kv);
    x->other_row = ifkv_arena_take(arena, rows, sizeof *x->other_row);
    x->other_end = ifkv_arena_take(arena, exchange->shape.max_home, sizeof *x->other_end);
}

/* Every owner's rows to all ranks, one rank after the other. */
static void route_messages(exchange_kv *x, const ifkv_exchange_rows *rows) {
    const ifkv_exchange *exchange = &x->owned.base;
    const int size = exchange->comm->size;
    int64_t begin = 0;
    memset(x->next, 0, (size_t)size * sizeof *x->next);
    for (int64_t i = 0; i < rows->n_row; i++) x->next[rows->owner[i]]++;
    for (int r = 0; r < size; r++) {
        const int64_t n = x->next[r];
        x->bytes[r] = (size_t)n * row_bytes(exchange);
        x->offset[r] = (size_t)begin * row_bytes(exchange);
        x->next[r] = begin;
        begin += n;
    }
}

static ifkv_status kv_begin(ifkv_exchange *exchange, const ifkv_exchange_rows *rows) {
    exchange_kv *x = (exchange_kv *)exchange;
    const ifkv_backend_ops *ops = exchange->backend->ops;
    int64_t n_home = 0;
    IFKV_TRY(ifkv_exchange_owned_begin(exchange, rows));
    route_messages(x, rows);
    x->n_row = rows->n_row;
    x->n_other = 0;
    for (int64_t i = 0; i < rows->n_row; i++) {
        const int64_t at = x->next[rows->owner[i]]++;
        if (rows->owner[i] == exchange->comm->rank)
            x->seen[n_home++] = x->n_other; /* rows come in ascending index */
        else
            x->place[x->n_other++] = at;
    }
    IFKV_TRY(
        ops->upload(exchange->backend, x->other_end, x->seen, (size_t)n_home * sizeof *x->seen));
    return ops->upload(exchange->backend, x->other_row, x->place,
                       (size_t)x->n_other * sizeof *x->place);
}

/* Rows of the pass from the shard that stores them to all ranks. */
static ifkv_status send(exchange_kv *x, int layer) {
    ifkv_exchange *exchange = &x->owned.base;
    const ifkv_backend_ops *ops = exchange->backend->ops;
    const int64_t kv = kv_cols(exchange);
    const int64_t first = (int64_t)(x->offset[exchange->comm->rank] / row_bytes(exchange));
    const ifkv_view k_shard = ifkv_kvcache_k(exchange->cache, layer),
                    v_shard = ifkv_kvcache_v(exchange->cache, layer);
    const ifkv_view k = ifkv_view_block(&x->message, first, x->owned.n_home, 0, kv),
                    v = ifkv_view_block(&x->message, first, x->owned.n_home, kv, kv);
    IFKV_TRY(ops->gather(exchange->backend, &k_shard, x->owned.slot, &k));
    IFKV_TRY(ops->gather(exchange->backend, &v_shard, x->owned.slot, &v));
    IFKV_TRY(ifkv_comm_all_gather(exchange->comm, k.data, x->message.data, x->bytes, x->offset));
    const ifkv_view message = ifkv_view_rows(&x->message, 0, x->n_row),
                    other = ifkv_view_rows(&x->other, 0, x->n_other);
    return ops->gather(exchange->backend, &message, x->other_row, &other);
}

static ifkv_status kv_attend(ifkv_exchange *exchange, int layer, const ifkv_view *q,
                             const ifkv_view *out) {
    exchange_kv *x = (exchange_kv *)exchange;
    const int64_t kv = kv_cols(exchange);
    const ifkv_view k = ifkv_view_block(&x->other, 0, x->n_other, 0, kv),
                    v = ifkv_view_block(&x->other, 0, x->n_other, kv, kv);
    IFKV_TRY(send(x, layer));
    IFKV_TRY(ifkv_exchange_owned_attend(&x->owned, layer, q));
    IFKV_TRY(ifkv_exchange_owned_attend_part(&x->owned, IFKV_OWNED_MORE, q, &k, &v, x->other_end));
    return ifkv_exchange_owned_merge(&x->owned, N_PART, out);
}

static ifkv_exchange_bytes kv_bytes(const ifkv_exchange *exchange) {
    const exchange_kv *x = (const exchange_kv *)exchange;
    ifkv_exchange_bytes bytes = ifkv_exchange_owned_bytes(exchange);
    bytes.attend = x->n_other * (int64_t)row_bytes(exchange);
    return bytes;
}

const ifkv_exchange_ops ifkv_exchange_kv_ops = {
    .name = "kv",
    .struct_bytes = sizeof(exchange_kv),
    .is_home_owner = true,
    .is_exact = false,
    .init = kv_init,
    .fini = kv_fini,
    .layout_shared = ifkv_exchange_owned_layout_shared,
    .layout = kv_layout,
    .share = ifkv_exchange_owned_share,
    .begin = kv_begin,
    .store = ifkv_exchange_owned_store,
    .attend = kv_attend,
    .bytes = kv_bytes,
    .explain = "a row sees its own rank's keys, the selected rows of others and the prefix; fresh "
               "K/V rows go to all ranks; not exact",
};
