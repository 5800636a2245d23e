/* Measure an engine's rates: products at the model's shapes, attention, element-wise passes, and
 * messages of a few sizes, to whose times a line is fitted, on all ranks at once.  See ifkv.h.
 *
 * Buffers live for the measurement only; weights are those of layer 0.  Best of a few repeats, the
 * slowest rank's of each rate: the clock of a busy machine errs upwards. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "arena.h"
#include "cost.h"
#include "engine.h"

enum { N_REPEAT = 4, MIN_ROW = 128, MAX_ROW = 512, N_SIZE = 5, LEAST_SIZE = 2 };
static const double row_flop = 4e9;  /* rows are as many as make so many FLOP in a layer */
static const double shortest = 1e-9; /* seconds: a clock can tell no less */
/* NVLink comes to its bandwidth at megabytes, which is also what K/V of a layer are (hopper 11). */
static const size_t message_bytes[N_SIZE] = {1 << 10, 1 << 16, 1 << 20, 1 << 22, 1 << 24};
static const size_t most_bytes = 64 << 20; /* of all ranks' pieces, from the fourth size on */
static const double messages_s = 0.25;     /* what messages may take: slow links stop early */

typedef struct bench {
    ifkv_engine *engine;
    int64_t n_row;
    int64_t *row, *begin, *end; /* back-end memory */
    ifkv_view norm, qkv, attended, gate_up, act, lse;
} bench;

static void layout(bench *b, ifkv_arena *arena) {
    const ifkv_config *c = &b->engine->model.config;
    const ifkv_dtype dtype = b->engine->backend->ops->dtype;
    const int64_t n = b->n_row, d_head = c->d_head;
    b->row = ifkv_arena_take(arena, n, sizeof *b->row);
    b->begin = ifkv_arena_take(arena, n, sizeof *b->begin);
    b->end = ifkv_arena_take(arena, n, sizeof *b->end);
    b->norm = ifkv_arena_view(arena, dtype, n, c->d_model);
    b->qkv = ifkv_arena_view(arena, dtype, n, (c->n_head + 2 * c->n_kv_head) * d_head);
    b->attended = ifkv_arena_view(arena, dtype, n, c->n_head * d_head);
    b->gate_up = ifkv_arena_view(arena, dtype, n, 2 * (int64_t)c->d_ff);
    b->act = ifkv_arena_view(arena, dtype, n, c->d_ff);
    b->lse = ifkv_arena_view(arena, IFKV_DTYPE_F32, n, c->n_head);
}

/* Rows of real embeddings; every row of attention sees all keys. */
static ifkv_status fill(bench *b) {
    ifkv_backend *backend = b->engine->backend;
    const size_t bytes = (size_t)b->n_row * sizeof(int64_t);
    int64_t *stage = calloc((size_t)b->n_row, sizeof *stage);
    IFKV_REQUIRE(stage, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "measure: out of host memory");
    ifkv_status status = backend->ops->upload(backend, b->begin, stage, bytes);
    for (int64_t i = 0; i < b->n_row; i++) stage[i] = i % b->engine->model.config.n_vocab;
    if (status == IFKV_OK) status = backend->ops->upload(backend, b->row, stage, bytes);
    for (int64_t i = 0; i < b->n_row; i++) stage[i] = b->n_row;
    if (status == IFKV_OK) status = backend->ops->upload(backend, b->end, stage, bytes);
    if (status == IFKV_OK)
        status = backend->ops->gather(backend, &b->engine->model.embed, b->row, &b->norm);
    if (status == IFKV_OK) status = backend->ops->sync(backend);
    free(stage);
    return status;
}

static ifkv_status products(bench *b, int64_t n) {
    ifkv_backend *backend = b->engine->backend;
    const ifkv_layer_weights *weights = &b->engine->model.layer[0];
    const ifkv_view norm = ifkv_view_rows(&b->norm, 0, n), qkv = ifkv_view_rows(&b->qkv, 0, n);
    const ifkv_view gate_up = ifkv_view_rows(&b->gate_up, 0, n);
    IFKV_TRY(backend->ops->matmul(backend, &norm, &weights->qkv, false, &qkv));
    return backend->ops->matmul(backend, &norm, &weights->gate_up, false, &gate_up);
}

static ifkv_status many_rows(bench *b) {
    return products(b, b->n_row);
}
static ifkv_status one_row(bench *b) {
    return products(b, 1);
}
static ifkv_status passes(bench *b) {
    ifkv_backend *backend = b->engine->backend;
    const ifkv_layer_weights *weights = &b->engine->model.layer[0];
    const double eps = b->engine->model.config.norm_eps;
    IFKV_TRY(backend->ops->rms_norm(backend, &b->norm, &weights->mlp_norm, eps, &b->norm));
    return backend->ops->swiglu(backend, &b->gate_up, &b->act);
}
static ifkv_status attention(bench *b) {
    ifkv_backend *backend = b->engine->backend;
    const ifkv_config *c = &b->engine->model.config;
    const int64_t q = (int64_t)c->n_head * c->d_head, kv = (int64_t)c->n_kv_head * c->d_head;
    const ifkv_attention_args args = {
        .n_head = c->n_head,
        .n_kv_head = c->n_kv_head,
        .d_head = c->d_head,
        .scale = 1.0f / sqrtf((float)c->d_head),
        .q = ifkv_view_block(&b->qkv, 0, b->n_row, 0, q),
        .k = ifkv_view_block(&b->qkv, 0, b->n_row, q, kv),
        .v = ifkv_view_block(&b->qkv, 0, b->n_row, q + kv, kv),
        .begin = b->begin,
        .end = b->end,
        .out = b->attended,
        .lse = b->lse,
    };
    return backend->ops->attention(backend, &args);
}

static double now(const ifkv_engine *engine) {
    return 1e-3 * engine->backend->ops->clock_ms(engine->backend);
}

/* Seconds of the fastest of a few repeats, the first of which also warms up. */
static ifkv_status best_of(bench *b, ifkv_status (*run)(bench *), double *seconds_p) {
    ifkv_backend *backend = b->engine->backend;
    double best = INFINITY;
    for (int i = 0; i < N_REPEAT; i++) {
        const double begin = now(b->engine);
        IFKV_TRY(run(b));
        IFKV_TRY(backend->ops->sync(backend));
        best = fmin(best, now(b->engine) - begin);
    }
    *seconds_p = fmax(best, shortest);
    return IFKV_OK;
}

/* What one rank does alone, while the others do the same. */
static ifkv_status measure_arithmetic(bench *b, ifkv_rates *rates) {
    const ifkv_config *c = &b->engine->model.config;
    const double e = (double)ifkv_dtype_bytes(b->engine->backend->ops->dtype), n = (double)b->n_row;
    const double parameters =
        (double)c->d_model * ((double)b->qkv.n_col + (double)b->gate_up.n_col);
    double seconds = 0;
    IFKV_TRY(fill(b));
    IFKV_TRY(best_of(b, many_rows, &seconds));
    rates->matmul = 2 * n * parameters / seconds;
    IFKV_TRY(best_of(b, attention, &seconds));
    rates->attention = 4 * n * n * c->n_head * c->d_head / seconds;
    IFKV_TRY(best_of(b, passes, &seconds));
    rates->passes = e * n * (2.0 * c->d_model + 3.0 * c->d_ff) / seconds;
    IFKV_TRY(best_of(b, one_row, &seconds));
    rates->memory = e * parameters / seconds;
    return IFKV_OK;
}

/* Gathers of back-end memory, as the exchanges move it. */
typedef struct pings {
    ifkv_engine *engine;
    char *buffer;           /* back-end memory */
    size_t *bytes, *offset; /* [ranks] */
    double spent;           /* seconds of all so far */
} pings;

static void set_length(pings *p, size_t length) {
    for (int r = 0; r < p->engine->comm->size; r++) {
        p->bytes[r] = length;
        p->offset[r] = (size_t)r * length;
    }
}

/* Seconds of one gather on the slowest rank, the same on every rank: they decide on what follows.
 */
static ifkv_status ping(const pings *p, double *seconds_p) {
    ifkv_engine *engine = p->engine;
    IFKV_TRY(ifkv_comm_barrier(engine->comm));
    const double begin = now(engine);
    IFKV_TRY(ifkv_comm_all_gather(engine->data, p->buffer + p->offset[engine->comm->rank],
                                  p->buffer, p->bytes, p->offset));
    IFKV_TRY(engine->backend->ops->sync(engine->backend));
    int64_t ps = (int64_t)(1e12 * (now(engine) - begin));
    IFKV_TRY(ifkv_comm_all_reduce_i64(engine->comm, &ps, 1, IFKV_REDUCE_MAX));
    *seconds_p = fmax(1e-12 * (double)ps, shortest);
    return IFKV_OK;
}

/* The fastest of a few, of which one is sent in any case. */
static ifkv_status best_ping(pings *p, size_t length, double *best_p) {
    double best = INFINITY;
    set_length(p, length);
    for (int i = 0; i < N_REPEAT && (i == 0 || p->spent < messages_s); i++) {
        double seconds = 0;
        IFKV_TRY(ping(p, &seconds));
        p->spent += seconds;
        best = fmin(best, seconds);
    }
    *best_p = best;
    return IFKV_OK;
}

/* Two sizes in any case, then as long as the next in proportion leaves the time within bounds. */
static ifkv_status fit_pings(pings *p, int n_size, ifkv_rates *rates) {
    const double others = p->engine->comm->size - 1;
    double length[N_SIZE], seconds[N_SIZE], warm_up = 0; /* a first gather may make connections */
    int n = 0;
    set_length(p, message_bytes[0]);
    IFKV_TRY(ping(p, &warm_up));
    for (; n < n_size; n++) {
        length[n] = (double)message_bytes[n];
        if (n >= LEAST_SIZE &&
            p->spent + others * seconds[n - 1] * length[n] / length[n - 1] > messages_s)
            break;
        IFKV_TRY(best_ping(p, message_bytes[n], &seconds[n]));
        seconds[n] /= others; /* of a message */
    }
    ifkv_cost_fit_link(n, length, seconds, &rates->message_s, &rates->link);
    return IFKV_OK;
}

static ifkv_status measure_messages(ifkv_engine *engine, ifkv_rates *rates) {
    ifkv_comm *comm = engine->comm;
    const size_t size = (size_t)comm->size;
    if (size == 1) return IFKV_OK;
    int n_size = LEAST_SIZE + 1;
    while (n_size < N_SIZE && size * message_bytes[n_size] <= most_bytes) n_size++;
    void *buffer = NULL;
    size_t *bytes = calloc(2 * size, sizeof *bytes);
    ifkv_status status =
        bytes ? ifkv_comm_alloc(engine->data, engine->backend, size * message_bytes[n_size - 1],
                                &buffer)
              : IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "measure: out of host memory");
    IFKV_TRY_GOTO(status, ifkv_comm_agree(comm, status, NULL), out);
    pings p = {.engine = engine, .buffer = buffer, .bytes = bytes, .offset = bytes + size};
    status = fit_pings(&p, n_size, rates);
out:
    if (buffer) ifkv_comm_free(engine->data, engine->backend, buffer);
    free(bytes);
    return status;
}

/* The slowest rank's of each, the same bits on every rank. */
static ifkv_status agree_on(ifkv_comm *comm, ifkv_rates *rates) {
    double *const rate[] = {&rates->matmul, &rates->attention, &rates->memory, &rates->passes,
                            &rates->link};
    enum { N_RATE = sizeof rate / sizeof *rate };
    int64_t value[N_RATE + 1];
    for (int i = 0; i < N_RATE; i++) value[i] = (int64_t)*rate[i];
    value[N_RATE] = -(int64_t)(1e12 * rates->message_s);
    IFKV_TRY(ifkv_comm_all_reduce_i64(comm, value, N_RATE + 1, IFKV_REDUCE_MIN));
    for (int i = 0; i < N_RATE; i++) *rate[i] = (double)value[i];
    rates->message_s = -1e-12 * (double)value[N_RATE];
    return IFKV_OK;
}

/* Of all ranks at once, or of rank 0 alone, which then tells the others. */
static ifkv_status measure(ifkv_engine *engine, bool is_alone, ifkv_rates *rates_p) {
    const ifkv_config *c = &engine->model.config;
    const double row =
        2.0 * c->d_model * (((double)c->n_head + 2 * c->n_kv_head) * c->d_head + 2.0 * c->d_ff);
    const double n_row = row_flop / row;
    bench b = {.engine = engine,
               .n_row = n_row < MIN_ROW   ? MIN_ROW
                        : n_row > MAX_ROW ? MAX_ROW
                                          : (int64_t)n_row};
    ifkv_rates rates = {.size = sizeof rates};
    ifkv_arena arena = {0};
    void *base = NULL;
    layout(&b, &arena);
    ifkv_status status = engine->backend->ops->alloc(engine->backend, arena.peak, &base);
    IFKV_TRY_GOTO(status, ifkv_comm_agree(engine->comm, status, NULL), out);
    arena = (ifkv_arena){.base = base};
    layout(&b, &arena);
    if (!is_alone || engine->comm->rank == 0) status = measure_arithmetic(&b, &rates);
    IFKV_TRY_GOTO(status, ifkv_comm_agree(engine->comm, status, NULL), out);
    if (is_alone) {
        IFKV_TRY_GOTO(status, ifkv_comm_bcast(engine->comm, &rates, sizeof rates, 0), out);
    } else {
        IFKV_TRY_GOTO(status, measure_messages(engine, &rates), out);
        IFKV_TRY_GOTO(status, agree_on(engine->comm, &rates), out);
    }
    *rates_p = rates;
out:
    if (base) engine->backend->ops->free(engine->backend, base);
    return status;
}

ifkv_status ifkv_engine_measure_alone(ifkv_engine *engine, ifkv_rates *rates) {
    return measure(engine, true, rates);
}

ifkv_status ifkv_engine_measure(ifkv_engine *engine, ifkv_rates *rates) {
    IFKV_REQUIRE(engine && engine->model.base, IFKV_ERR_USAGE, IFKV_E_STATE,
                 "engine_measure: got no engine with weights");
    if (!engine->has_rates) IFKV_TRY(measure(engine, false, &engine->rates));
    engine->has_rates = true;
    return ifkv_struct_write(rates, &engine->rates, sizeof engine->rates, "rates");
}
