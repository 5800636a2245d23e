/* Exchange `kv`: what selected rows have to see of each other travels, rows stay with their owners.
 *
 * A row sees its owner's shard, the rows of the pass before it that others own, and the lent
 * prefix: not exact for more than one rank, and its results depend on the number of ranks.  Per
 * pair of ranks h, o either fresh K/V rows of o go to h or queries of h go to o and partial (out,
 * lse) come back, whichever keeps the bytes of the busiest rank low (exchange_kv_route.h); a row
 * sees the same keys either way.  Bytes received by a rank h in a layer: over the o that it pulls
 * from kvb for every row of o below h's last one, over those that it asks q + 4 n_head for every
 * row of h above o's first one, and q for every row that asks h; never more than the (n - n_home) *
 * kvb of the rank with the fewest rows of the pass, and nothing without any.  Rows travel before
 * they are seen, not when they are stored: of layer 0, whose K/V never change, too, and not of the
 * last one, which nothing attends to. */
#include "exchange_kv_route.h"
#include "exchange_owned.h"

#include <stdlib.h>
#include <string.h>

enum { N_PART = IFKV_OWNED_MORE + 1 };

/* What an all_to_all takes. */
typedef struct messages {
    size_t *out_bytes, *out_offset, *in_bytes, *in_offset; /* [size] host */
} messages;

typedef struct exchange_kv {
    ifkv_exchange_owned owned;
    ifkv_kv_route route;
    messages fresh, queries, answers;
    size_t *message_bytes;               /* [3, 4, size] host, owned: theirs */
    int64_t n_pulled, n_asked;           /* of this pass: K/V rows and queries that come here */
    int64_t *stage;                      /* host, owned: the scratch of a route */
    int64_t *next_row, *next_query;      /* [size] each */
    int64_t *place, *row_end, *ask_span; /* [max_row], [max_home], [most_asked] */

    /* Back-end memory. */
    ifkv_view mine;     /* [max_home, 2 kv] K, V of my rows of the pass, in index order */
    ifkv_view message;  /* [max_row, 2 kv] those that I pull, rank-major */
    ifkv_view other;    /* [max_row, 2 kv] and in index order */
    int64_t *other_row; /* [n_pulled] message row of each */
    int64_t *other_end; /* [n_home] spans on them */
    ifkv_view query;    /* [max_home, q] of my rows */
    ifkv_view asked;    /* [most_asked, q] queries that ask me, rank-major */
    int64_t *asked_begin, *asked_end; /* [n_asked] their spans on my rows */
    ifkv_view answer;                 /* [most_asked, q + n_head] out and lse of each, float32 */
    ifkv_view answered; /* [most_answered, q + n_head] those that I asked for, rank-major */
} exchange_kv;

static int64_t kv_cols(const ifkv_exchange *exchange) {
    return (int64_t)exchange->shape.n_kv_head * exchange->shape.d_head;
}

static int64_t query_cols(const ifkv_exchange *exchange) {
    return (int64_t)exchange->shape.n_head * exchange->shape.d_head;
}

static int64_t others_rows(const ifkv_exchange *exchange) {
    return exchange->comm->size > 1 ? exchange->shape.max_row : 0;
}

/* Rows of so many bytes that a rank may receive: no more bytes than if it pulled all rows. */
static int64_t most_rows(const exchange_kv *x, int64_t row_bytes) {
    return others_rows(&x->owned.base) * x->route.pull_bytes / row_bytes;
}

static ifkv_status kv_init(ifkv_exchange *exchange) {
    exchange_kv *x = (exchange_kv *)exchange;
    const size_t size = (size_t)exchange->comm->size,
                 item = ifkv_dtype_bytes(exchange->backend->ops->dtype);
    const int64_t q = query_cols(exchange), max_row = exchange->shape.max_row,
                  max_home = exchange->shape.max_home;
    x->route.pull_bytes = 2 * kv_cols(exchange) * (int64_t)item;
    x->route.query_bytes = q * (int64_t)item;
    x->route.answer_bytes = (q + exchange->shape.n_head) * (int64_t)sizeof(float);
    IFKV_TRY(ifkv_exchange_owned_init(exchange));
    IFKV_TRY(ifkv_kv_route_init(&x->route, exchange->comm->size));
    x->message_bytes = calloc(3 * 4 * size, sizeof *x->message_bytes);
    const int64_t n_ask = most_rows(x, x->route.query_bytes);
    x->stage = malloc((2 * size + (size_t)(max_row + max_home + n_ask)) * sizeof *x->stage);
    IFKV_REQUIRE(x->message_bytes && x->stage, IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                 "exchange kv: out of host memory");
    messages *const all[] = {&x->fresh, &x->queries, &x->answers};
    for (size_t i = 0; i < 3; i++) {
        size_t *first = x->message_bytes + 4 * i * size;
        *all[i] = (messages){first, first + size, first + 2 * size, first + 3 * size};
    }
    x->next_row = x->stage;
    x->next_query = x->next_row + size;
    x->place = x->next_query + size;
    x->row_end = x->place + max_row;
    x->ask_span = x->row_end + max_home;
    return IFKV_OK;
}

static void kv_fini(ifkv_exchange *exchange) {
    exchange_kv *x = (exchange_kv *)exchange;
    free(x->message_bytes);
    free(x->stage);
    ifkv_kv_route_fini(&x->route);
    ifkv_exchange_owned_fini(exchange);
}

static void kv_layout(ifkv_exchange *exchange, ifkv_arena *arena) {
    exchange_kv *x = (exchange_kv *)exchange;
    const ifkv_dtype dtype = exchange->backend->ops->dtype;
    const int64_t home = exchange->shape.max_home, others = others_rows(exchange),
                  kv = kv_cols(exchange), q = query_cols(exchange),
                  answer = q + exchange->shape.n_head;
    const int64_t n_ask = most_rows(x, x->route.query_bytes),
                  n_answer = most_rows(x, x->route.answer_bytes);
    ifkv_exchange_owned_layout(&x->owned, arena, N_PART);
    x->mine = ifkv_arena_view(arena, dtype, home, 2 * kv);
    x->message = ifkv_arena_view(arena, dtype, others, 2 * kv);
    x->other = ifkv_arena_view(arena, dtype, others, 2 * kv);
    x->other_row = ifkv_arena_take(arena, others, sizeof *x->other_row);
    x->other_end = ifkv_arena_take(arena, home, sizeof *x->other_end);
    x->query = ifkv_arena_view(arena, dtype, home, q);
    x->asked = ifkv_arena_view(arena, dtype, n_ask, q);
    x->asked_begin = ifkv_arena_take(arena, n_ask, sizeof *x->asked_begin);
    x->asked_end = ifkv_arena_take(arena, n_ask, sizeof *x->asked_end);
    x->answer = ifkv_arena_view(arena, IFKV_DTYPE_F32, n_ask, answer);
    x->answered = ifkv_arena_view(arena, IFKV_DTYPE_F32, n_answer, answer);
}

/* n_out rows from row `out` on go to rank r, and its n_in arrive at row `in`. */
static void set(const messages *it, int r, int64_t row_bytes, int64_t out, int64_t n_out,
                int64_t in, int64_t n_in) {
    it->out_bytes[r] = (size_t)(n_out * row_bytes);
    it->out_offset[r] = (size_t)(out * row_bytes);
    it->in_bytes[r] = (size_t)(n_in * row_bytes);
    it->in_offset[r] = (size_t)(in * row_bytes);
}

/* Rows in my rank's order: what others pull are my first ones, what I ask about my last ones. */
static void route_messages(exchange_kv *x) {
    const ifkv_kv_route *route = &x->route;
    const size_t size = (size_t)route->size, rank = (size_t)x->owned.base.comm->rank;
    int64_t n_answered = 0;
    x->n_pulled = x->n_asked = 0;
    for (int r = 0; r < route->size; r++) {
        const size_t here = rank * size + (size_t)r, there = (size_t)r * size + rank;
        const int64_t n_pull = route->pull[here], n_given = route->pull[there],
                      n_ask = route->ask[here], n_asked = route->ask[there];
        set(&x->fresh, r, route->pull_bytes, 0, n_given, x->n_pulled, n_pull);
        set(&x->queries, r, route->query_bytes, x->owned.n_home - n_ask, n_ask, x->n_asked,
            n_asked);
        set(&x->answers, r, route->answer_bytes, x->n_asked, n_asked, n_answered, n_ask);
        x->next_row[r] = x->n_pulled;
        x->next_query[r] = x->n_asked;
        x->n_pulled += n_pull;
        x->n_asked += n_asked;
        n_answered += n_ask;
    }
}

/* Spans of my rows on those that I pull, and on mine of the rows that ask me; rows come in
 * ascending index. */
static ifkv_status route_spans(exchange_kv *x, const ifkv_exchange_rows *rows) {
    const ifkv_exchange *exchange = &x->owned.base;
    const ifkv_backend_ops *ops = exchange->backend->ops;
    const size_t size = (size_t)exchange->comm->size, rank = (size_t)exchange->comm->rank;
    int64_t n_mine = 0, n_other = 0; /* before row i */
    for (int64_t i = 0; i < rows->n_row; i++) {
        const size_t owner = (size_t)rows->owner[i];
        if (owner == rank) {
            x->row_end[n_mine++] = n_other;
            continue;
        }
        if (x->route.pull[rank * size + owner] > 0 && n_mine < x->owned.n_home)
            x->place[n_other++] = x->next_row[owner]++;
        if (x->route.ask[owner * size + rank] > 0 && n_mine > 0)
            x->ask_span[x->next_query[owner]++] = n_mine;
    }
    const size_t item = sizeof(int64_t), asked_bytes = (size_t)x->n_asked * item;
    IFKV_TRY(ops->upload(exchange->backend, x->other_end, x->row_end, (size_t)n_mine * item));
    IFKV_TRY(ops->upload(exchange->backend, x->other_row, x->place, (size_t)n_other * item));
    IFKV_TRY(ops->upload(exchange->backend, x->asked_end, x->ask_span, asked_bytes));
    memset(x->ask_span, 0, asked_bytes);
    return ops->upload(exchange->backend, x->asked_begin, x->ask_span, asked_bytes);
}

static ifkv_status kv_begin(ifkv_exchange *exchange, const ifkv_exchange_rows *rows) {
    exchange_kv *x = (exchange_kv *)exchange;
    IFKV_TRY(ifkv_exchange_owned_begin(exchange, rows));
    ifkv_kv_route_plan(&x->route, rows);
    route_messages(x);
    return route_spans(x, rows);
}

static ifkv_status move(const exchange_kv *x, const messages *it, const ifkv_view *from,
                        const ifkv_view *to) {
    return ifkv_comm_all_to_all(x->owned.base.comm, from->data, it->out_bytes, it->out_offset,
                                to->data, it->in_bytes, it->in_offset);
}

/* Rows of the pass from the shards that store them to the ranks that pull them. */
static ifkv_status pull(exchange_kv *x, int layer) {
    ifkv_exchange *exchange = &x->owned.base;
    const ifkv_backend_ops *ops = exchange->backend->ops;
    const int64_t kv = kv_cols(exchange), n = x->owned.n_home;
    const ifkv_view k_shard = ifkv_kvcache_k(exchange->cache, layer),
                    v_shard = ifkv_kvcache_v(exchange->cache, layer);
    const ifkv_view k = ifkv_view_block(&x->mine, 0, n, 0, kv),
                    v = ifkv_view_block(&x->mine, 0, n, kv, kv);
    IFKV_TRY(ops->gather(exchange->backend, &k_shard, x->owned.slot, &k));
    IFKV_TRY(ops->gather(exchange->backend, &v_shard, x->owned.slot, &v));
    IFKV_TRY(move(x, &x->fresh, &x->mine, &x->message));
    const ifkv_view message = ifkv_view_rows(&x->message, 0, x->n_pulled),
                    other = ifkv_view_rows(&x->other, 0, x->n_pulled);
    return ops->gather(exchange->backend, &message, x->other_row, &other);
}

/* The queries that ask me over my rows of the pass; in each rank's block their spans grow. */
static ifkv_status answer(exchange_kv *x) {
    ifkv_exchange *exchange = &x->owned.base;
    const ifkv_exchange_shape *shape = &exchange->shape;
    const int64_t kv = kv_cols(exchange), q = query_cols(exchange);
    int64_t row = 0;
    for (int r = 0; r < exchange->comm->size; r++) {
        const int64_t n = (int64_t)x->queries.in_bytes[r] / x->route.query_bytes;
        if (n == 0) continue;
        const ifkv_attention_args args = {
            .n_head = shape->n_head,
            .n_kv_head = shape->n_kv_head,
            .d_head = shape->d_head,
            .scale = exchange->scale,
            .q = ifkv_view_rows(&x->asked, row, n),
            .k = ifkv_view_block(&x->mine, 0, x->owned.n_home, 0, kv),
            .v = ifkv_view_block(&x->mine, 0, x->owned.n_home, kv, kv),
            .begin = x->asked_begin + row,
            .end = x->asked_end + row,
            .out = ifkv_view_block(&x->answer, row, n, 0, q),
            .lse = ifkv_view_block(&x->answer, row, n, q, shape->n_head),
        };
        IFKV_TRY(exchange->backend->ops->attention(exchange->backend, &args));
        row += n;
    }
    return IFKV_OK;
}

static ifkv_status ask(exchange_kv *x, const ifkv_view *q) {
    ifkv_exchange *exchange = &x->owned.base;
    const ifkv_view from = ifkv_view_rows(q, 0, x->owned.n_home),
                    to = ifkv_view_rows(&x->query, 0, x->owned.n_home);
    IFKV_TRY(exchange->backend->ops->gather(exchange->backend, &from, NULL, &to));
    IFKV_TRY(move(x, &x->queries, &x->query, &x->asked));
    IFKV_TRY(answer(x));
    return move(x, &x->answers, &x->answer, &x->answered);
}

/* Merge the answers into what my rows see of others, in rank order. */
static ifkv_status add_answers(exchange_kv *x) {
    ifkv_exchange *exchange = &x->owned.base;
    const int n_head = exchange->shape.n_head;
    const int64_t q = query_cols(exchange);
    int64_t row = 0;
    for (int r = 0; r < exchange->comm->size; r++) {
        const int64_t n = (int64_t)x->answers.in_bytes[r] / x->route.answer_bytes;
        if (n == 0) continue;
        const ifkv_view out[] = {
            ifkv_view_rows(&x->owned.part[IFKV_OWNED_MORE], x->owned.n_home - n, n),
            ifkv_view_block(&x->answered, row, n, 0, q)};
        const ifkv_view lse[] = {
            ifkv_view_rows(&x->owned.lse[IFKV_OWNED_MORE], x->owned.n_home - n, n),
            ifkv_view_block(&x->answered, row, n, q, n_head)};
        const ifkv_merge_args args = {
            .n_head = n_head,
            .d_head = exchange->shape.d_head,
            .n_part = 2,
            .out_part = out,
            .lse_part = lse,
            .out = out[0],
            .lse = lse[0],
        };
        IFKV_TRY(exchange->backend->ops->merge(exchange->backend, &args));
        row += n;
    }
    return IFKV_OK;
}

static ifkv_status kv_attend(ifkv_exchange *exchange, int layer, const ifkv_view *q,
                             const ifkv_view *out) {
    exchange_kv *x = (exchange_kv *)exchange;
    const int64_t kv = kv_cols(exchange);
    const ifkv_view k = ifkv_view_block(&x->other, 0, x->n_pulled, 0, kv),
                    v = ifkv_view_block(&x->other, 0, x->n_pulled, kv, kv);
    IFKV_TRY(pull(x, layer));
    if (x->route.is_asking) IFKV_TRY(ask(x, q));
    IFKV_TRY(ifkv_exchange_owned_attend(&x->owned, layer, q));
    IFKV_TRY(ifkv_exchange_owned_attend_part(&x->owned, IFKV_OWNED_MORE, q, &k, &v, x->other_end));
    if (x->route.is_asking) IFKV_TRY(add_answers(x));
    return ifkv_exchange_owned_merge(&x->owned, N_PART, out);
}

static ifkv_exchange_bytes kv_bytes(const ifkv_exchange *exchange) {
    const exchange_kv *x = (const exchange_kv *)exchange;
    ifkv_exchange_bytes bytes = ifkv_exchange_owned_bytes(exchange);
    bytes.attend = x->route.load[exchange->comm->rank];
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
    .explain = "a row sees its own rank's keys, the selected rows of others before it and the "
               "prefix; per pair of ranks fresh K/V rows or queries travel, so that the busiest "
               "rank receives little; not exact",
};
