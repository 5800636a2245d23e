/* Exchange `allgather`: all K and V of a layer on every rank, in one collective.
 *
 * Exact prefill with contiguous slices: the pass is the whole context, in ascending ranks.  Every
 * rank then attends with its own rows over the keys at or below them, so the last rank works most
 * (1.75 times the mean of four).  Bytes received by a rank and layer: (T - n_home) rows of K and V,
 * which is (P - 1) / P * T of them with equal slices, counted exactly.  A layer that only stores
 * K/V gathers nothing.  Memory grows with T: one layer's K and V of all ranks. */
#include "exchange.h"

#include <stdlib.h>

typedef struct exchange_allgather {
    ifkv_exchange base;
    int64_t n_row, n_home, first; /* of this pass; first: where my rows begin */
    size_t *bytes, *offset;       /* [size] host: pieces of the gather */
    int64_t *stage;               /* [max_home] host */
    /* Back-end memory. */
    int64_t *begin, *end; /* [max_home] spans over the gathered keys */
    ifkv_view gathered;   /* [max_row, 2 kv] K, V in ascending index */
    ifkv_view lse;        /* [max_home, n_head] written, never read */
} exchange_allgather;

static ifkv_status allgather_init(ifkv_exchange *exchange) {
    exchange_allgather *x = (exchange_allgather *)exchange;
    const size_t size = (size_t)exchange->comm->size;
    x->bytes = calloc(2 * size, sizeof *x->bytes);
    x->stage = malloc(((size_t)exchange->shape.max_home + 1) * sizeof *x->stage);
    IFKV_REQUIRE(x->bytes && x->stage, IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                 "exchange allgather: out of host memory");
    x->offset = x->bytes + size;
    return IFKV_OK;
}

static void allgather_fini(ifkv_exchange *exchange) {
    exchange_allgather *x = (exchange_allgather *)exchange;
    free(x->bytes);
    free(x->stage);
}

static void allgather_layout(ifkv_exchange *exchange, ifkv_arena *arena) {
    exchange_allgather *x = (exchange_allgather *)exchange;
    const ifkv_exchange_shape *shape = &exchange->shape;
    x->begin = ifkv_arena_take(arena, shape->max_home, sizeof *x->begin);
    x->end = ifkv_arena_take(arena, shape->max_home, sizeof *x->end);
    x->gathered = ifkv_arena_view(arena, exchange->backend->ops->dtype, shape->max_row,
                                  2 * (int64_t)shape->n_kv_head * shape->d_head);
    x->lse = ifkv_arena_view(arena, IFKV_DTYPE_F32, shape->max_home, shape->n_head);
}

/* The pieces of all ranks one behind the other are the keys in ascending index. */
static ifkv_status allgather_begin(ifkv_exchange *exchange, const ifkv_exchange_rows *rows) {
    exchange_allgather *x = (exchange_allgather *)exchange;
    const ifkv_backend_ops *ops = exchange->backend->ops;
    const int size = exchange->comm->size, rank = exchange->comm->rank;
    const size_t row = (size_t)x->gathered.n_col * ifkv_dtype_bytes(x->gathered.dtype);
    IFKV_TRY(ifkv_exchange_check_whole(exchange, rows));
    x->n_row = rows->n_row;
    x->n_home = x->first = 0;
    int64_t n = 0;
    for (int r = 0; r < size; r++) {
        const int64_t first = n;
        while (n < rows->n_row && rows->home[n] == r) n++;
        x->bytes[r] = (size_t)(n - first) * row;
        x->offset[r] = (size_t)first * row;
        if (r != rank) continue;
        x->first = first;
        x->n_home = n - first;
    }
    IFKV_REQUIRE(n == rows->n_row, IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "exchange allgather: row %lld of rank %d is behind those of a higher rank",
                 (long long)n, rows->home[n]);
    const size_t bytes = (size_t)x->n_home * sizeof *x->stage;
    for (int64_t i = 0; i < x->n_home; i++) x->stage[i] = 0;
    IFKV_TRY(ops->upload(exchange->backend, x->begin, x->stage, bytes));
    for (int64_t i = 0; i < x->n_home; i++) x->stage[i] = x->first + i + 1;
    return ops->upload(exchange->backend, x->end, x->stage, bytes);
}

static ifkv_status allgather_attend(ifkv_exchange *exchange, int layer, const ifkv_view *q,
                                    const ifkv_view *out) {
    exchange_allgather *x = (exchange_allgather *)exchange;
    const ifkv_exchange_shape *shape = &exchange->shape;
    const int64_t kv = (int64_t)shape->n_kv_head * shape->d_head;
    IFKV_TRY(ifkv_exchange_pack(exchange, layer, &x->gathered, x->first));
    const ifkv_view mine = ifkv_view_rows(&x->gathered, x->first, x->n_home);
    IFKV_TRY(
        ifkv_comm_all_gather(exchange->comm, mine.data, x->gathered.data, x->bytes, x->offset));
    const ifkv_attention_args args = {
        .n_head = shape->n_head,
        .n_kv_head = shape->n_kv_head,
        .d_head = shape->d_head,
        .scale = exchange->scale,
        .q = ifkv_view_rows(q, 0, x->n_home),
        .k = ifkv_view_block(&x->gathered, 0, x->n_row, 0, kv),
        .v = ifkv_view_block(&x->gathered, 0, x->n_row, kv, kv),
        .begin = x->begin,
        .end = x->end,
        .out = ifkv_view_rows(out, 0, x->n_home),
        .lse = ifkv_view_rows(&x->lse, 0, x->n_home),
    };
    return exchange->backend->ops->attention(exchange->backend, &args);
}

const ifkv_exchange_ops ifkv_exchange_allgather_ops = {
    .name = "allgather",
    .struct_bytes = sizeof(exchange_allgather),
    .is_home_owner = true,
    .is_exact = true,
    .n_slice = 1,
    .init = allgather_init,
    .fini = allgather_fini,
    .layout_shared = ifkv_exchange_layout_nothing,
    .layout = allgather_layout,
    .share = ifkv_exchange_share_nothing,
    .begin = allgather_begin,
    .store = ifkv_exchange_store_whole,
    .attend = allgather_attend,
    .bytes = ifkv_exchange_whole_bytes,
    .explain = "K and V of all ranks are gathered in every layer, over contiguous slices; exact",
};
