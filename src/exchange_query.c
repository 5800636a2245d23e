/* Exchange `query`: queries travel, K/V stay.
 *
 * Per layer every rank receives the queries of all rows, attends with them over its own shard, and
 * sends each row's partial (out, lse) back to the row's home, which merges the parts in rank order;
 * fresh K/V rows go from home to owner.  Exact. Bytes received by a rank: (n - n_home) * q + (P -
 * 1) * n_home * (q + 4 n_head) for n rows, and the fresh rows it owns. */
#include "exchange.h"

#include <stdlib.h>
#include <string.h>

typedef struct exchange_query {
    ifkv_exchange base;
    int64_t n_row, n_home, n_owned; /* of this pass */

    /* Host, [size] each: rows at home per rank and where they start in rank-major order; bytes and
     * offsets of messages. */
    int64_t *home_rows, *home_begin;
    size_t *query_bytes, *query_offset;         /* all_gather of q */
    size_t *part_out_bytes, *part_out_offset;   /* partial results I send to each home */
    size_t *part_in_bytes, *part_in_offset;     /* and receive for my rows */
    size_t *fresh_out_bytes, *fresh_out_offset; /* fresh K/V rows I send to each owner */
    size_t *fresh_in_bytes, *fresh_in_offset;   /* and receive as owner */
    int64_t *stage;                             /* [5 * max_row] host staging of the routes below */

    /* Back-end memory. */
    int64_t *to_sorted;   /* [n_row] rank-major place of the i-th row in index order */
    int64_t *to_rank;     /* [n_row] index-order place of the i-th row in rank-major order */
    int64_t *begin, *end; /* [n_row] spans on this shard, in index order */
    int64_t *fresh_row;   /* [n_home] my rows in the order in which they are sent to their owners */
    int64_t *fresh_slot;  /* [n_owned] shard row of each fresh row received */
    ifkv_view query;      /* [max_row, q] rank-major */
    ifkv_view sorted;     /* [max_row, q] in index order */
    ifkv_view
        part; /* [max_row, q + n_head] out and lse of every row over my shard, in index order */
    ifkv_view part_out;    /* the same, rank-major */
    ifkv_view part_in;     /* [size * max_home, q + n_head] by rank, my rows */
    ifkv_view fresh_out;   /* [max_home, 2 kv] K, V */
    ifkv_view fresh_in;    /* [max_row, 2 kv] */
    ifkv_view *part_views; /* [2 * size] host: out and lse part of every rank */
} exchange_query;

static int64_t query_cols(const ifkv_exchange_shape *shape) {
    return (int64_t)shape->n_head * shape->d_head;
}

static int64_t kv_cols(const ifkv_exchange_shape *shape) {
    return (int64_t)shape->n_kv_head * shape->d_head;
}

static ifkv_status query_init(ifkv_exchange *exchange) {
    exchange_query *x = (exchange_query *)exchange;
    const size_t size = (size_t)exchange->comm->size, rows = (size_t)exchange->shape.max_row;
    /* one block of counts and one of bytes, cut below */
    x->home_rows = calloc(2 * size, sizeof *x->home_rows);
    x->query_bytes = calloc(10 * size, sizeof *x->query_bytes);
    x->stage = malloc((5 * rows + 1) * sizeof *x->stage);
    x->part_views = calloc(2 * size, sizeof *x->part_views);
    IFKV_REQUIRE(x->home_rows && x->query_bytes && x->stage && x->part_views, IFKV_ERR_RESOURCE,
                 IFKV_E_MEMORY, "exchange query: out of host memory");
    x->home_begin = x->home_rows + size;
    size_t *next = x->query_bytes;
    size_t **const cut[] = {&x->query_bytes,     &x->query_offset,     &x->part_out_bytes,
                            &x->part_out_offset, &x->part_in_bytes,    &x->part_in_offset,
                            &x->fresh_out_bytes, &x->fresh_out_offset, &x->fresh_in_bytes,
                            &x->fresh_in_offset};
    for (size_t i = 0; i < sizeof cut / sizeof *cut; i++, next += size) *cut[i] = next;
    return IFKV_OK;
}

static void query_fini(ifkv_exchange *exchange) {
    exchange_query *x = (exchange_query *)exchange;
    free(x->home_rows);
    free(x->query_bytes);
    free(x->stage);
    free(x->part_views);
}

static void query_layout(ifkv_exchange *exchange, ifkv_arena *arena) {
    exchange_query *x = (exchange_query *)exchange;
    const ifkv_exchange_shape *shape = &exchange->shape;
    const ifkv_dtype dtype = exchange->backend->ops->dtype;
    const int64_t q = query_cols(shape), kv = kv_cols(shape), rows = shape->max_row,
                  home = shape->max_home;
    x->to_sorted = ifkv_arena_take(arena, rows, sizeof *x->to_sorted);
    x->to_rank = ifkv_arena_take(arena, rows, sizeof *x->to_rank);
    x->begin = ifkv_arena_take(arena, rows, sizeof *x->begin);
    x->end = ifkv_arena_take(arena, rows, sizeof *x->end);
    x->fresh_row = ifkv_arena_take(arena, home, sizeof *x->fresh_row);
    x->fresh_slot = ifkv_arena_take(arena, rows, sizeof *x->fresh_slot);
    x->query = ifkv_arena_view(arena, dtype, rows, q);
    x->sorted = ifkv_arena_view(arena, dtype, rows, q);
    x->part = ifkv_arena_view(arena, IFKV_DTYPE_F32, rows, q + shape->n_head);
    x->part_out = ifkv_arena_view(arena, IFKV_DTYPE_F32, rows, q + shape->n_head);
    x->part_in =
        ifkv_arena_view(arena, IFKV_DTYPE_F32, exchange->comm->size * home, q + shape->n_head);
    x->fresh_out = ifkv_arena_view(arena, dtype, home, 2 * kv);
    x->fresh_in = ifkv_arena_view(arena, dtype, rows, 2 * kv);
}

/* Rank-major order of the rows, and messages of queries and partial results. */
static void route_queries(exchange_query *x, const ifkv_exchange_rows *rows, int64_t *to_sorted,
                          int64_t *to_rank) {
    const ifkv_exchange_shape *shape = &x->base.shape;
    const int size = x->base.comm->size, rank = x->base.comm->rank;
    const size_t query_row = (size_t)query_cols(shape) * ifkv_dtype_bytes(x->query.dtype);
    const size_t part_row = (size_t)x->part.n_col * ifkv_dtype_bytes(x->part.dtype);
    memset(x->home_rows, 0, (size_t)size * sizeof *x->home_rows);
    for (int64_t i = 0; i < rows->n_row; i++) x->home_rows[rows->home[i]]++;
    x->n_home = x->home_rows[rank];
    int64_t begin = 0;
    for (int r = 0; r < size; r++) {
        x->home_begin[r] = begin;
        x->query_bytes[r] = (size_t)x->home_rows[r] * query_row;
        x->query_offset[r] = (size_t)begin * query_row;
        x->part_out_bytes[r] = (size_t)x->home_rows[r] * part_row;
        x->part_out_offset[r] = (size_t)begin * part_row;
        x->part_in_bytes[r] = (size_t)x->n_home * part_row;
        x->part_in_offset[r] = (size_t)(r * x->n_home) * part_row;
        begin += x->home_rows[r];
    }
    memset(x->home_rows, 0, (size_t)size * sizeof *x->home_rows);
    for (int64_t i = 0; i < rows->n_row; i++) {
        const int home = rows->home[i];
        to_sorted[i] = x->home_begin[home] + x->home_rows[home]++;
        to_rank[to_sorted[i]] = i;
    }
}

/* Messages of fresh K/V rows: mine by owner, then those I own by home. */
static void route_fresh(exchange_query *x, const ifkv_exchange_rows *rows, int64_t *fresh_row,
                        int64_t *fresh_slot) {
    const int size = x->base.comm->size, rank = x->base.comm->rank;
    const size_t row_bytes = (size_t)x->fresh_out.n_col * ifkv_dtype_bytes(x->fresh_out.dtype);
    int64_t n_out = 0, n_in = 0;
    for (int r = 0; r < size; r++) {
        const int64_t out_begin = n_out, in_begin = n_in;
        int64_t at_home = 0;
        for (int64_t i = 0; i < rows->n_row; i++) {
            if (rows->home[i] == rank && rows->owner[i] == r) fresh_row[n_out++] = at_home;
            if (rows->home[i] == r && rows->owner[i] == rank)
                fresh_slot[n_in++] = ifkv_kvcache_visible(x->base.cache, rows->index[i]) - 1;
            at_home += rows->home[i] == rank;
        }
        x->fresh_out_bytes[r] = (size_t)(n_out - out_begin) * row_bytes;
        x->fresh_out_offset[r] = (size_t)out_begin * row_bytes;
        x->fresh_in_bytes[r] = (size_t)(n_in - in_begin) * row_bytes;
        x->fresh_in_offset[r] = (size_t)in_begin * row_bytes;
    }
    x->n_owned = n_in;
}

static ifkv_status query_begin(ifkv_exchange *exchange, const ifkv_exchange_rows *rows) {
    exchange_query *x = (exchange_query *)exchange;
    const ifkv_backend_ops *ops = exchange->backend->ops;
    const int64_t n = rows->n_row, max = exchange->shape.max_row;
    int64_t *to_sorted = x->stage, *to_rank = to_sorted + max, *end = to_rank + max,
            *row = end + max, *slot = row + max;
    x->n_row = n;
    route_queries(x, rows, to_sorted, to_rank);
    route_fresh(x, rows, row, slot);
    IFKV_REQUIRE(n <= max && x->n_home <= exchange->shape.max_home, IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "exchange query: got %lld rows, %lld at home, expected at most %lld, %lld",
                 (long long)n, (long long)x->n_home, (long long)max,
                 (long long)exchange->shape.max_home);
    for (int64_t i = 0; i < n; i++) end[i] = ifkv_kvcache_visible(exchange->cache, rows->index[i]);
    const size_t bytes = (size_t)n * sizeof(int64_t);
    IFKV_TRY(ops->upload(exchange->backend, x->to_sorted, to_sorted, bytes));
    IFKV_TRY(ops->upload(exchange->backend, x->to_rank, to_rank, bytes));
    IFKV_TRY(ops->upload(exchange->backend, x->end, end, bytes));
    IFKV_TRY(
        ops->upload(exchange->backend, x->fresh_row, row, (size_t)x->n_home * sizeof(int64_t)));
    IFKV_TRY(
        ops->upload(exchange->backend, x->fresh_slot, slot, (size_t)x->n_owned * sizeof(int64_t)));
    memset(end, 0, bytes);
    return ops->upload(exchange->backend, x->begin, end, bytes);
}

static ifkv_status query_store(ifkv_exchange *exchange, int layer, const ifkv_view *k,
                               const ifkv_view *v) {
    exchange_query *x = (exchange_query *)exchange;
    const ifkv_backend_ops *ops = exchange->backend->ops;
    const int64_t kv = kv_cols(&exchange->shape);
    const ifkv_view k_out = ifkv_view_block(&x->fresh_out, 0, x->n_home, 0, kv);
    const ifkv_view v_out = ifkv_view_block(&x->fresh_out, 0, x->n_home, kv, kv);
    IFKV_TRY(ops->gather(exchange->backend, k, x->fresh_row, &k_out));
    IFKV_TRY(ops->gather(exchange->backend, v, x->fresh_row, &v_out));
    IFKV_TRY(ifkv_comm_all_to_all(exchange->comm, x->fresh_out.data, x->fresh_out_bytes,
                                  x->fresh_out_offset, x->fresh_in.data, x->fresh_in_bytes,
                                  x->fresh_in_offset));
    const ifkv_view k_in = ifkv_view_block(&x->fresh_in, 0, x->n_owned, 0, kv);
    const ifkv_view v_in = ifkv_view_block(&x->fresh_in, 0, x->n_owned, kv, kv);
    const ifkv_view k_shard = ifkv_kvcache_k(exchange->cache, layer),
                    v_shard = ifkv_kvcache_v(exchange->cache, layer);
    IFKV_TRY(ops->scatter(exchange->backend, &k_in, x->fresh_slot, &k_shard));
    return ops->scatter(exchange->backend, &v_in, x->fresh_slot, &v_shard);
}

/* Attention of all rows over this rank's shard, from rank-major queries to rank-major parts. */
static ifkv_status attend_shard(exchange_query *x, int layer) {
    ifkv_exchange *exchange = &x->base;
    const ifkv_backend_ops *ops = exchange->backend->ops;
    const int64_t q = query_cols(&exchange->shape);
    const ifkv_view query = ifkv_view_rows(&x->query, 0, x->n_row),
                    sorted = ifkv_view_rows(&x->sorted, 0, x->n_row);
    const ifkv_view part = ifkv_view_rows(&x->part, 0, x->n_row);
    const ifkv_view part_out = ifkv_view_rows(&x->part_out, 0, x->n_row);
    IFKV_TRY(ops->gather(exchange->backend, &query, x->to_sorted, &sorted));
    const ifkv_attention_args args = {
        .n_head = exchange->shape.n_head,
        .n_kv_head = exchange->shape.n_kv_head,
        .d_head = exchange->shape.d_head,
        .scale = exchange->scale,
        .q = sorted,
        .k = ifkv_kvcache_k(exchange->cache, layer),
        .v = ifkv_kvcache_v(exchange->cache, layer),
        .begin = x->begin,
        .end = x->end,
        .out = ifkv_view_block(&x->part, 0, x->n_row, 0, q),
        .lse = ifkv_view_block(&x->part, 0, x->n_row, q, exchange->shape.n_head),
    };
    IFKV_TRY(ops->attention(exchange->backend, &args));
    return ops->gather(exchange->backend, &part, x->to_rank, &part_out);
}

static ifkv_status query_attend(ifkv_exchange *exchange, int layer, const ifkv_view *q,
                                const ifkv_view *out) {
    exchange_query *x = (exchange_query *)exchange;
    const int size = exchange->comm->size;
    const int64_t cols = query_cols(&exchange->shape);
    const ifkv_view mine =
        ifkv_view_rows(&x->query, x->home_begin[exchange->comm->rank], x->n_home);
    const ifkv_view from = ifkv_view_rows(q, 0, x->n_home);
    IFKV_TRY(exchange->backend->ops->gather(exchange->backend, &from, NULL, &mine));
    IFKV_TRY(ifkv_comm_all_gather(exchange->comm, mine.data, x->query.data, x->query_bytes,
                                  x->query_offset));
    IFKV_TRY(attend_shard(x, layer));
    IFKV_TRY(ifkv_comm_all_to_all(exchange->comm, x->part_out.data, x->part_out_bytes,
                                  x->part_out_offset, x->part_in.data, x->part_in_bytes,
                                  x->part_in_offset));
    for (int r = 0; r < size; r++) {
        x->part_views[r] = ifkv_view_block(&x->part_in, r * x->n_home, x->n_home, 0, cols);
        x->part_views[size + r] =
            ifkv_view_block(&x->part_in, r * x->n_home, x->n_home, cols, exchange->shape.n_head);
    }
    const ifkv_merge_args merge = {
        .n_head = exchange->shape.n_head,
        .d_head = exchange->shape.d_head,
        .n_part = size,
        .out_part = x->part_views,
        .lse_part = x->part_views + size,
        .out = ifkv_view_rows(out, 0, x->n_home),
    };
    return exchange->backend->ops->merge(exchange->backend, &merge);
}

static int64_t from_others(const exchange_query *x, const size_t *bytes) {
    int64_t sum = 0;
    for (int r = 0; r < x->base.comm->size; r++)
        if (r != x->base.comm->rank) sum += (int64_t)bytes[r];
    return sum;
}

static ifkv_exchange_bytes query_received(const ifkv_exchange *exchange) {
    const exchange_query *x = (const exchange_query *)exchange;
    return (ifkv_exchange_bytes){
        .store = from_others(x, x->fresh_in_bytes),
        .attend = from_others(x, x->query_bytes) + from_others(x, x->part_in_bytes),
    };
}

const ifkv_exchange_ops ifkv_exchange_query_ops = {
    .name = "query",
    .struct_bytes = sizeof(exchange_query),
    .is_home_owner = false,
    .is_exact = true,
    .init = query_init,
    .fini = query_fini,
    .layout_shared = ifkv_exchange_layout_nothing,
    .layout = query_layout,
    .share = ifkv_exchange_share_nothing,
    .begin = query_begin,
    .store = query_store,
    .attend = query_attend,
    .bytes = query_received,
    .explain = "queries of the selected rows go to every rank, partial results come back to be "
               "merged; exact",
};
