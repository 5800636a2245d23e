/* Measure an engine's rates: products at the model's shapes, attention, element-wise passes, and
 * messages of a few sizes, on all ranks at once.  See ifkv.h.
 *
 * Buffers live for the measurement only; weights are those of layer 0.  Best of a few repeats, the
 * slowest rank's of each rate: the clock of a busy machine errs upwards. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "arena.h"
#include "engine.h"

enum { N_REPEAT = 4, MIN_ROW = 128, MAX_ROW = 512, N_SIZE = 3 };
static const double row_flop = 4e9;  /* rows are as many as make so many FLOP in a layer */
static const double shortest = 1e-9; /* seconds: a clock can tell no less */
static const size_t message_bytes[N_SIZE] = {1 << 10, 1 << 16, 1 << 20};

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

/* Seconds of one gather, of back-end memory and as the exchanges move it. */
static ifkv_status ping(ifkv_engine *engine, char *buffer, const size_t *bytes,
                        const size_t *offset, double *seconds_p) {
    ifkv_backend *backend = engine->backend;
    IFKV_TRY(ifkv_comm_barrier(engine->comm));
    const double begin = now(engine);
    IFKV_TRY(ifkv_comm_all_gather(engine->data, buffer + offset[engine->comm->rank], buffer, bytes,
                                  offset));
    IFKV_TRY(backend->ops->sync(backend));
    *seconds_p = now(engine) - begin;
    return IFKV_OK;
}

/* The smallest message has no length to speak of; of the larger ones the slowest byte counts. */
static ifkv_status measure_messages(ifkv_engine *engine, ifkv_rates *rates) {
    ifkv_comm *comm = engine->comm;
    const size_t size = (size_t)comm->size;
    double first = 0;
    if (size == 1) return IFKV_OK;
    void *buffer = NULL;
    size_t *bytes = calloc(2 * size, sizeof *bytes), *offset = bytes + size;
    ifkv_status status =
        bytes ? ifkv_comm_alloc(engine->data, engine->backend, size * message_bytes[N_SIZE - 1],
                                &buffer)
              : IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "measure: out of host memory");
    IFKV_TRY_GOTO(status, ifkv_comm_agree(comm, status, NULL), out);
    rates->link = INFINITY;
    for (int s = 0; s < N_SIZE; s++) {
        double best = INFINITY;
        for (size_t r = 0; r < size; r++) {
            bytes[r] = message_bytes[s];
            offset[r] = r * message_bytes[s];
        }
        for (int i = 0; i < N_REPEAT; i++) {
            double seconds = 0;
            IFKV_TRY_GOTO(status, ping(engine, buffer, bytes, offset, &seconds), out);
            best = fmin(best, seconds);
        }
        const double others = (double)size - 1;
        if (s == 0) rates->message_s = best / others;
        if (s == 0) first = best;
        if (s > 0)
            rates->link = fmin(rates->link, others * (double)(message_bytes[s] - message_bytes[0]) /
                                                fmax(best - first, shortest));
    }
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
