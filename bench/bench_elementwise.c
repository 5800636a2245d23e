/* `ifkv bench elementwise`: the row-wise operations of a layer at a model's shapes, beside a copy.
 *
 * A call takes all T rows, which a pass would cut into blocks.  Its bytes are those of every
 * operand once and of every result once, so that what is changed in place counts twice: rows of the
 * back end's type, weights, angles and log-sum-exps (float32) and row numbers (8 bytes), all of
 * them. All are held against `copy`, T rows of the residual stream copied by the same run.  Calls
 * of a batch take turns over copies of rows, angles and log-sum-exps, so that none finds them in a
 * cache; weights and row numbers are shared.  Where a result lies over its operand the last call of
 * a batch has a copy to itself.
 *
 * Sampled rows of what the last call of a batch writes are poisoned before it, or all rows written
 * anew where they are its operands; after the last batch every element of the sampled rows is
 * checked against float64 on the same operands. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "convert.h"
#include "random.h"

enum { N_ROW_SAMPLE = 16, MOST_COPIES = 64, N_PART = 2, GATE_SPREAD = 4, LSE_SPREAD = 2 };
static const double copies_bytes = 256e6; /* of all calls that take turns; an H100 caches 50 MB */
static const double double_eps = 0x1p-48; /* what sixteen steps in float64 may lose */

typedef struct elementwise elementwise;
typedef struct oracle oracle;

typedef struct operation {
    const char *name;
    void (*plan)(elementwise *e); /* shape and bytes */
    ifkv_status (*run)(const elementwise *e, int64_t copy);
    /* What row `row` of all copies becomes. */
    void (*expect)(const elementwise *e, int64_t row, oracle *o);
} operation;

typedef struct shape {
    int64_t in_rows, in_cols, out_rows, out_cols; /* rows: of a token */
    double in_spread;
    int64_t n_weight;
    bool is_in_place; /* in is kept to write out anew */
    bool has_angles, has_list;
    bool has_lse; /* and operands in float32: parts */
} shape;

struct elementwise {
    bench_stand stand;
    bench_table *table; /* rank 0 */
    const ifkv_config *config;
    const double *frequency; /* borrowed [d_head / 2] */
    const operation *op;
    shape shape;
    int64_t n_row, n_turn, n_copy, bytes; /* bytes of a call */
    double copy_rate;                     /* bytes/s at this length; NaN: none */
    uint64_t key;
    ifkv_view in, out, weight, angles, lse_in, lse_out; /* owned, back-end memory */
    void *device_list;                                  /* owned: the same in back-end memory */
    int64_t *list;                                      /* owned, host: [n_row] row numbers */
};

struct oracle {
    float *in, *lse;      /* of one row, or of as many as there are parts */
    double *want, *bound; /* [out_cols], then [n_head] of log-sum-exps */
    float *got;           /* the same */
};

static int64_t q_cols(const elementwise *e) {
    return (int64_t)e->config->n_head * e->config->d_head;
}
static int64_t kv_cols(const elementwise *e) {
    return (int64_t)e->config->n_kv_head * e->config->d_head;
}
static int64_t element(const elementwise *e) {
    return (int64_t)ifkv_dtype_bytes(e->stand.backend->ops->dtype);
}

/* The rows of one copy. */
static ifkv_view of_copy(const elementwise *e, const ifkv_view *all, int64_t copy) {
    const int64_t n = all->n_row / e->n_copy;
    return ifkv_view_rows(all, copy * n, n);
}

static int64_t copy_of_call(const elementwise *e, int64_t i_call) {
    const bool is_last = i_call == e->stand.n_call - 1;
    return e->shape.is_in_place && is_last ? e->n_turn : i_call % e->n_turn;
}

/* ---- copy ---- */

static void plan_copy(elementwise *e) {
    const int64_t d = e->config->d_model;
    e->shape = (shape){.in_rows = 1, .in_cols = d, .out_rows = 1, .out_cols = d};
    e->bytes = 2 * e->n_row * d * element(e);
}

static ifkv_status run_copy(const elementwise *e, int64_t copy) {
    const ifkv_view in = of_copy(e, &e->in, copy), out = of_copy(e, &e->out, copy);
    return e->stand.backend->ops->gather(e->stand.backend, &in, NULL, &out);
}

static void expect_same(const elementwise *e, int64_t in_row, oracle *o) {
    const int64_t n = e->shape.in_cols;
    bench_elements(e->in.dtype, e->key, e->shape.in_spread, in_row * n, n, o->in);
    for (int64_t c = 0; c < n; c++) {
        o->want[c] = (double)o->in[c];
        o->bound[c] = 0;
    }
}

/* ---- RMS norm ---- */

/* Near 1, no two in step with lanes, exact in every type; row 1 differs from row 0. */
static float weight_at(int64_t row, int64_t col) {
    return (float)(5 + (col + 3 * row) % 7) / 8;
}

/* The sum of n squares loses at most BENCH_SUM_EPS in each step, its root half of that; division,
 * root and products come on top. */
static double norm_off(int64_t n) {
    return ((double)n / 2 + 4) * BENCH_SUM_EPS;
}

static double norm_of(const elementwise *e, const float *x, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    return sqrt(sum / (double)n + e->config->norm_eps);
}

static void plan_rms_norm(elementwise *e) {
    plan_copy(e);
    e->shape.n_weight = e->config->d_model;
    e->bytes += e->shape.n_weight * element(e);
}

static ifkv_status run_rms_norm(const elementwise *e, int64_t copy) {
    const ifkv_view in = of_copy(e, &e->in, copy), out = of_copy(e, &e->out, copy);
    const ifkv_view weight = ifkv_view_rows(&e->weight, 0, 1);
    return e->stand.backend->ops->rms_norm(e->stand.backend, &in, &weight, e->config->norm_eps,
                                           &out);
}

static void expect_rms_norm(const elementwise *e, int64_t row, oracle *o) {
    const int64_t n = e->shape.out_cols;
    expect_same(e, row, o);
    const double norm = norm_of(e, o->in, n);
    for (int64_t c = 0; c < n; c++) {
        o->want[c] *= (double)weight_at(0, c) / norm;
        o->bound[c] = (norm_off(n) + bench_rounding(e->out.dtype)) * fabs(o->want[c]);
    }
}

/* ---- rotation of Q and of K, where they lie in rows of Q, K, V ---- */

static void plan_rope(elementwise *e) {
    const int64_t q = q_cols(e), kv = kv_cols(e), d = e->config->d_head;
    const int64_t angles = e->n_row * d * (int64_t)sizeof(float);
    e->shape = (shape){.in_rows = 1,
                       .in_cols = q + 2 * kv,
                       .out_rows = 1,
                       .out_cols = q + 2 * kv,
                       .n_weight = e->config->has_head_norm ? d : 0,
                       .is_in_place = true,
                       .has_angles = true};
    e->bytes = 2 * (e->n_row * (q + kv) + e->shape.n_weight) * element(e) + 2 * angles;
}

static ifkv_status rotate(const elementwise *e, int64_t copy, int which, int64_t col, int n_head) {
    const ifkv_view all = of_copy(e, &e->out, copy), angles = of_copy(e, &e->angles, copy);
    const ifkv_view x =
        ifkv_view_block(&all, 0, e->n_row, col, (int64_t)n_head * e->config->d_head);
    const ifkv_view weight =
        e->shape.n_weight ? ifkv_view_rows(&e->weight, which, 1) : (ifkv_view){0};
    return e->stand.backend->ops->rope(e->stand.backend, &x, n_head,
                                       e->shape.n_weight ? &weight : NULL, e->config->norm_eps,
                                       &angles);
}

static ifkv_status run_rope(const elementwise *e, int64_t copy) {
    IFKV_TRY(rotate(e, copy, 0, 0, e->config->n_head));
    return rotate(e, copy, 1, q_cols(e), e->config->n_kv_head);
}

/* One head in place.  Cosine and sine are off by 2^-25, their products and the sum by 2^-24 each,
 * of terms that may cancel. */
static void expect_head(const elementwise *e, int64_t row, int which, const float *x, double *want,
                        double *bound) {
    const int64_t d = e->config->d_head, half = d / 2;
    const bool is_normed = e->shape.n_weight;
    const double norm = is_normed ? norm_of(e, x, d) : 1;
    for (int64_t i = 0; i < half; i++) {
        const double angle = (double)(row + 1) * e->frequency[i];
        const double a = want[i] / norm * (is_normed ? (double)weight_at(which, i) : 1),
                     b = want[half + i] / norm *
                         (is_normed ? (double)weight_at(which, half + i) : 1);
        const double off =
            (fabs(a) + fabs(b)) * ((is_normed ? norm_off(d) : 0) + 2 * BENCH_SUM_EPS);
        want[i] = a * cos(angle) - b * sin(angle);
        want[half + i] = b * cos(angle) + a * sin(angle);
        bound[i] = off + bench_rounding(e->out.dtype) * fabs(want[i]);
        bound[half + i] = off + bench_rounding(e->out.dtype) * fabs(want[half + i]);
    }
}

static void expect_rope(const elementwise *e, int64_t row, oracle *o) {
    const int n_head = e->config->n_head, n_kv_head = e->config->n_kv_head;
    expect_same(e, row, o); /* which V is to stay */
    for (int h = 0; h < n_head + n_kv_head; h++) {
        const int64_t at = (int64_t)h * e->config->d_head;
        expect_head(e, row, h >= n_head, o->in + at, o->want + at, o->bound + at);
    }
}

/* ---- SwiGLU ---- */

static void plan_swiglu(elementwise *e) {
    const int64_t d_ff = e->config->d_ff;
    e->shape = (shape){.in_rows = 1,
                       .in_cols = 2 * d_ff,
                       .out_rows = 1,
                       .out_cols = d_ff,
                       .in_spread = GATE_SPREAD};
    e->bytes = 3 * e->n_row * d_ff * element(e);
}

static ifkv_status run_swiglu(const elementwise *e, int64_t copy) {
    const ifkv_view in = of_copy(e, &e->in, copy), out = of_copy(e, &e->out, copy);
    return e->stand.backend->ops->swiglu(e->stand.backend, &in, &out);
}

/* CUDA's fast exponential is off by 2 + 1.173 |g| units in the last place, of which silu has no
 * more; a sum, a division and a product come on top. */
static void expect_swiglu(const elementwise *e, int64_t row, oracle *o) {
    const int64_t n = 2 * e->shape.out_cols;
    bench_elements(e->in.dtype, e->key, e->shape.in_spread, row * n, n, o->in);
    for (int64_t c = 0; c < n / 2; c++) {
        const double gate = (double)o->in[c], up = (double)o->in[n / 2 + c];
        o->want[c] = gate / (1 + exp(-gate)) * up;
        o->bound[c] = ((4 + 1.2 * fabs(gate)) * BENCH_SUM_EPS + bench_rounding(e->out.dtype)) *
                      fabs(o->want[c]);
    }
}

/* ---- rows of K out of a cache of twice as many, and into one ---- */

static void plan_gather(elementwise *e) {
    const int64_t kv = kv_cols(e);
    e->shape =
        (shape){.in_rows = 2, .in_cols = kv, .out_rows = 1, .out_cols = kv, .has_list = true};
    e->bytes = e->n_row * (2 * kv * element(e) + (int64_t)sizeof *e->list);
}

static void plan_scatter(elementwise *e) {
    plan_gather(e);
    e->shape.in_rows = 1;
    e->shape.out_rows = 2;
}

static ifkv_status run_gather(const elementwise *e, int64_t copy) {
    const ifkv_view in = of_copy(e, &e->in, copy), out = of_copy(e, &e->out, copy);
    return e->stand.backend->ops->gather(e->stand.backend, &in, e->device_list, &out);
}

static ifkv_status run_scatter(const elementwise *e, int64_t copy) {
    const ifkv_view in = of_copy(e, &e->in, copy), out = of_copy(e, &e->out, copy);
    return e->stand.backend->ops->scatter(e->stand.backend, &in, e->device_list, &out);
}

static void expect_gather(const elementwise *e, int64_t row, oracle *o) {
    expect_same(e, row / e->n_row * 2 * e->n_row + e->list[row % e->n_row], o);
}

/* ---- merge of two parts ---- */

static void plan_merge(elementwise *e) {
    const int64_t q = q_cols(e), f32 = (int64_t)sizeof(float);
    e->shape =
        (shape){.in_rows = N_PART, .in_cols = q, .out_rows = 1, .out_cols = q, .has_lse = true};
    e->bytes = e->n_row * (N_PART * q * f32 + q * element(e) +
                           (N_PART + 1) * (int64_t)e->config->n_head * f32);
}

static ifkv_status run_merge(const elementwise *e, int64_t copy) {
    const ifkv_view in = of_copy(e, &e->in, copy), lse_in = of_copy(e, &e->lse_in, copy);
    ifkv_view part[N_PART], lse[N_PART];
    for (int p = 0; p < N_PART; p++) {
        part[p] = ifkv_view_rows(&in, p * e->n_row, e->n_row);
        lse[p] = ifkv_view_rows(&lse_in, p * e->n_row, e->n_row);
    }
    const ifkv_merge_args args = {.n_head = e->config->n_head,
                                  .d_head = e->config->d_head,
                                  .n_part = N_PART,
                                  .out_part = part,
                                  .lse_part = lse,
                                  .out = of_copy(e, &e->out, copy),
                                  .lse = of_copy(e, &e->lse_out, copy)};
    return e->stand.backend->ops->merge(e->stand.backend, &args);
}

/* All of it in float64, rounded once. */
static void expect_merge(const elementwise *e, int64_t row, oracle *o) {
    const int64_t n = e->shape.in_cols, d = e->config->d_head, n_head = e->config->n_head;
    const int64_t first = row / e->n_row * N_PART * e->n_row + row % e->n_row;
    for (int64_t p = 0; p < N_PART; p++) {
        const int64_t at = first + p * e->n_row;
        bench_elements(IFKV_DTYPE_F32, e->key, 1, at * n, n, o->in + p * n);
        bench_elements(IFKV_DTYPE_F32, e->key + 1, LSE_SPREAD, at * n_head, n_head,
                       o->lse + p * n_head);
    }
    for (int64_t h = 0; h < n_head; h++) {
        const double a = (double)o->lse[h], b = (double)o->lse[n_head + h], most = fmax(a, b);
        const double total = exp(a - most) + exp(b - most), lse = most + log(total);
        for (int64_t c = h * d; c < (h + 1) * d; c++) {
            const double x = (double)o->in[c], y = (double)o->in[n + c];
            o->want[c] = (exp(a - most) * x + exp(b - most) * y) / total;
            o->bound[c] =
                bench_rounding(e->out.dtype) * fabs(o->want[c]) + double_eps * (fabs(x) + fabs(y));
        }
        o->want[n + h] = lse;
        o->bound[n + h] =
            bench_rounding(IFKV_DTYPE_F32) * fabs(lse) + double_eps * (1 + fabs(most));
    }
}

/* ---- a case ---- */

static const operation operations[] = {{"copy", plan_copy, run_copy, expect_same},
                                       {"rms_norm", plan_rms_norm, run_rms_norm, expect_rms_norm},
                                       {"rope", plan_rope, run_rope, expect_rope},
                                       {"swiglu", plan_swiglu, run_swiglu, expect_swiglu},
                                       {"gather", plan_gather, run_gather, expect_gather},
                                       {"scatter", plan_scatter, run_scatter, expect_same},
                                       {"merge", plan_merge, run_merge, expect_merge}};
enum { N_OPERATION = sizeof operations / sizeof *operations };

static void plan_copies(elementwise *e) {
    const bool has_turns = !e->stand.backend->is_emulated;
    if (!(e->shape.in_spread > 0)) e->shape.in_spread = 1;
    e->n_turn = has_turns ? (int64_t)fmin(MOST_COPIES, ceil(copies_bytes / (double)e->bytes)) : 1;
    e->n_copy = e->n_turn + e->shape.is_in_place;
}

static ifkv_status make_weight(elementwise *e) {
    ifkv_backend *backend = e->stand.backend;
    const ifkv_dtype dtype = backend->ops->dtype;
    const int64_t n = e->shape.n_weight;
    const size_t bytes = 2 * (size_t)n * ifkv_dtype_bytes(dtype);
    float *value = malloc(4 * (size_t)n * sizeof *value);
    IFKV_REQUIRE(value, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "bench: out of host memory");
    void *data = NULL, *narrowed = value + 2 * n;
    for (int64_t i = 0; i < 2 * n; i++) value[i] = weight_at(i / n, i % n);
    ifkv_convert(IFKV_DTYPE_F32, value, dtype, narrowed, 2 * n);
    ifkv_status status = backend->ops->alloc(backend, bytes, &data);
    if (status == IFKV_OK) {
        e->weight = ifkv_view_make(data, dtype, 2, n, n);
        status = backend->ops->upload(backend, data, narrowed, bytes);
    }
    free(value);
    return status;
}

/* Row r of all copies is at position r + 1: where nothing was rotated, that shows. */
static ifkv_status make_angles(elementwise *e) {
    ifkv_backend *backend = e->stand.backend;
    const int64_t n = e->n_copy * e->n_row;
    const size_t bytes = (size_t)n * sizeof(int64_t);
    int64_t *position = malloc(bytes);
    IFKV_REQUIRE(position, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "bench: out of host memory");
    void *on_device = NULL;
    for (int64_t i = 0; i < n; i++) position[i] = i + 1;
    ifkv_status status = backend->ops->alloc(backend, bytes, &on_device);
    if (status == IFKV_OK) status = backend->ops->upload(backend, on_device, position, bytes);
    if (status == IFKV_OK)
        status = bench_matrix(backend, IFKV_DTYPE_F32, n, e->config->d_head, 0, 0, &e->angles);
    if (status == IFKV_OK)
        status = backend->ops->angles(backend, e->frequency, on_device, &e->angles);
    if (status == IFKV_OK) status = backend->ops->sync(backend);
    backend->ops->free(backend, on_device);
    free(position);
    return status;
}

/* One of every two rows, ascending, as rows of a cache are listed. */
static ifkv_status make_list(elementwise *e) {
    ifkv_backend *backend = e->stand.backend;
    const size_t bytes = (size_t)e->n_row * sizeof *e->list;
    e->list = malloc(bytes);
    IFKV_REQUIRE(e->list, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "bench: out of host memory");
    for (int64_t i = 0; i < e->n_row; i++)
        e->list[i] = 2 * i + (int64_t)(ifkv_random_u64(e->key + 2, (uint64_t)i) & 1);
    IFKV_TRY(backend->ops->alloc(backend, bytes, &e->device_list));
    return backend->ops->upload(backend, e->device_list, e->list, bytes);
}

static ifkv_status make_operands(elementwise *e) {
    ifkv_backend *backend = e->stand.backend;
    const shape *s = &e->shape;
    const int64_t n = e->n_copy * e->n_row, n_head = e->config->n_head;
    IFKV_TRY(bench_matrix(backend, s->has_lse ? IFKV_DTYPE_F32 : backend->ops->dtype,
                          s->in_rows * n, s->in_cols, e->key, s->in_spread, &e->in));
    IFKV_TRY(
        bench_matrix(backend, backend->ops->dtype, s->out_rows * n, s->out_cols, 0, 0, &e->out));
    if (s->n_weight) IFKV_TRY(make_weight(e));
    if (s->has_angles) IFKV_TRY(make_angles(e));
    if (s->has_list) IFKV_TRY(make_list(e));
    if (!s->has_lse) return IFKV_OK;
    IFKV_TRY(bench_matrix(backend, IFKV_DTYPE_F32, N_PART * n, n_head, e->key + 1, LSE_SPREAD,
                          &e->lse_in));
    return bench_matrix(backend, IFKV_DTYPE_F32, n, n_head, 0, 0, &e->lse_out);
}

static void free_operands(elementwise *e) {
    ifkv_backend *backend = e->stand.backend;
    void *const owned[] = {e->in.data,     e->out.data,     e->weight.data, e->angles.data,
                           e->lse_in.data, e->lse_out.data, e->device_list};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) backend->ops->free(backend, owned[i]);
    free(e->list);
}

/* Where row `row` of all copies lies in the results. */
static int64_t out_row(const elementwise *e, int64_t row) {
    if (e->shape.out_rows == 1) return row;
    return row / e->n_row * e->shape.out_rows * e->n_row + e->list[row % e->n_row];
}

/* Sampled row i of what the last call of a batch writes, of all copies. */
static int64_t sample(const elementwise *e, int64_t i) {
    return copy_of_call(e, e->stand.n_call - 1) * e->n_row + bench_sample(e->key, i, e->n_row);
}

static ifkv_status prepare(void *arg) {
    const elementwise *e = arg;
    ifkv_backend *backend = e->stand.backend;
    if (e->shape.is_in_place)
        return backend->ops->copy(backend, e->out.data, e->in.data,
                                  (size_t)(e->in.n_row * e->in.n_col * element(e)));
    for (int64_t i = 0; i < N_ROW_SAMPLE; i++) {
        IFKV_TRY(bench_row_poison(backend, &e->out, out_row(e, sample(e, i))));
        if (e->shape.has_lse) IFKV_TRY(bench_row_poison(backend, &e->lse_out, sample(e, i)));
    }
    return IFKV_OK;
}

static ifkv_status run(void *arg, int64_t i_call) {
    const elementwise *e = arg;
    return e->op->run(e, copy_of_call(e, i_call));
}

static ifkv_status check_rows(const elementwise *e, oracle *o, bench_check *check) {
    const int64_t n_out = e->shape.out_cols, n_lse = e->shape.has_lse ? e->config->n_head : 0;
    for (int64_t i = 0; i < N_ROW_SAMPLE; i++) {
        const int64_t row = sample(e, i);
        e->op->expect(e, row, o);
        IFKV_TRY(bench_row_read(e->stand.backend, &e->out, out_row(e, row), o->got));
        if (n_lse) IFKV_TRY(bench_row_read(e->stand.backend, &e->lse_out, row, o->got + n_out));
        for (int64_t c = 0; c < n_out + n_lse; c++)
            bench_check_add(check, (double)o->got[c], o->want[c], o->bound[c]);
    }
    return IFKV_OK;
}

static ifkv_status check_results(elementwise *e, bench_check *check, double *error_p) {
    const size_t n_in = N_PART * (size_t)e->shape.in_cols, n_head = (size_t)e->config->n_head;
    const size_t n_out = (size_t)e->shape.out_cols + n_head;
    double *wide = malloc(2 * n_out * sizeof *wide);
    float *single = malloc((n_in + N_PART * n_head + n_out) * sizeof *single);
    ifkv_status status = IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "bench: out of host memory");
    if (wide && single) {
        oracle o = {.in = single,
                    .lse = single + n_in,
                    .got = single + n_in + N_PART * n_head,
                    .want = wide,
                    .bound = wide + n_out};
        status = check_rows(e, &o, check);
    }
    free(wide);
    free(single);
    IFKV_TRY(ifkv_comm_agree(e->stand.comm, status, NULL));
    return bench_check_finish(check, e->stand.comm, error_p);
}

/* ---- rows of the table ---- */

static ifkv_status report(elementwise *e, double rate, double error, const bench_check *check) {
    const bench_stand *t = &e->stand;
    const double share = rate / e->copy_rate;
    char cell[4][32], line[256];
    json_t *row = json_pack("{s:s, s:s, s:I, s:I, s:o, s:o, s:o, s:o, s:o, s:I, s:I}", "label",
                            e->op->name, "model", t->options->model, "tokens", (json_int_t)e->n_row,
                            "bytes", (json_int_t)e->bytes, "time_ms", bench_real(t->median_ms),
                            "min_ms", bench_real(t->min_ms), "gb_per_s", bench_real(1e-9 * rate),
                            "copy_share", bench_real(share), "error", bench_real(error), "checked",
                            (json_int_t)check->n_checked, "wrong", (json_int_t)check->n_wrong);
    snprintf(line, sizeof line, "  %8lld %-10s %14lld %s %s %s %s %9.1e %8lld", (long long)e->n_row,
             e->op->name, (long long)e->bytes, bench_cell(cell[0], 10, "%.4f", t->median_ms),
             bench_cell(cell[1], 10, "%.4f", t->min_ms),
             bench_cell(cell[2], 9, "%.4g", 1e-9 * rate),
             bench_cell(cell[3], 8, "%.1f", 100 * share), error, (long long)check->n_wrong);
    return bench_table_row(e->table, row, line);
}

static ifkv_status measure(elementwise *e) {
    bench_check check = {0};
    double error = 0;
    IFKV_TRY(bench_time(&e->stand, prepare, run, e));
    IFKV_TRY(check_results(e, &check, &error));
    if (check.n_wrong) e->stand.median_ms = e->stand.min_ms = NAN;
    const double rate = 1e3 * (double)e->bytes / e->stand.median_ms;
    if (e->op == operations) e->copy_rate = rate;
    const ifkv_status status = e->table ? report(e, rate, error, &check) : IFKV_OK;
    return ifkv_comm_agree(e->stand.comm, status, NULL);
}

/* The rate of the copy is handed on from the first case of a length to the others. */
static ifkv_status run_case(elementwise *common, const operation *op, int64_t n_row) {
    elementwise e = *common;
    e.op = op;
    e.n_row = n_row;
    e.key = ifkv_random_u64(e.stand.options->seed,
                            (uint64_t)n_row * N_OPERATION + (uint64_t)(op - operations));
    op->plan(&e);
    plan_copies(&e);
    ifkv_status status = ifkv_comm_agree(e.stand.comm, make_operands(&e), NULL);
    if (status == IFKV_OK) status = measure(&e);
    free_operands(&e);
    common->copy_rate = e.copy_rate;
    return status;
}

static ifkv_status run_cases(elementwise *e, const int64_t *length, int n_length) {
    for (int i = 0; i < n_length; i++)
        for (int op = 0; op < N_OPERATION; op++) IFKV_TRY(run_case(e, &operations[op], length[i]));
    if (e->table) return bench_table_finish(e->table);
    return IFKV_OK;
}

static ifkv_status open_table(elementwise *e) {
    char columns[256];
    snprintf(columns, sizeof columns, "# %8s %-10s %14s %10s %10s %9s %8s %9s %8s", "tokens",
             "operation", "bytes", "time ms", "least", "GB/s", "% copy", "error", "#wrong");
    return bench_table_open(e->stand.options, "elementwise", &e->stand, e->stand.options->model,
                            columns, &e->table);
}

ifkv_status bench_elementwise(ifkv_comm *comm, const cli_options *options) {
    elementwise e = {.table = NULL};
    int64_t length[BENCH_MAX_LENGTH];
    int n_length = 0;
    ifkv_engine *engine = NULL;
    ifkv_status status =
        bench_lengths(options->lengths ? options->lengths : "2048,8192", 1, length, &n_length);
    IFKV_TRY(ifkv_comm_agree(comm, status, NULL));
    IFKV_TRY(bench_engine_open(comm, options, &engine));
    e.config = &engine->model.config;
    e.frequency = engine->frequency;
    status = bench_stand_init(&e.stand, comm, engine->backend, options);
    if (status == IFKV_OK && ifkv_comm_rank(comm) == 0) status = open_table(&e);
    status = ifkv_comm_agree(comm, status, NULL);
    if (status == IFKV_OK) status = ifkv_comm_agree(comm, run_cases(&e, length, n_length), NULL);
    bench_table_close(e.table);
    ifkv_engine_close(engine);
    return status;
}
