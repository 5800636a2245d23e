/* `ifkv bench attention`: one layer's attention at a model's heads, over the spans that a prefill
 * has.
 *
 * Spans: causal, as exact prefill; full, as a shard of earlier keys; chunk, as encode; selected, as
 * recompute, rows evenly drawn.  Sampled rows are poisoned before every batch and checked after the
 * last: all numbers finite, and for some heads all of them, and the log-sum-exp, against float64 on
 * the same operands.  Scores have a spread of SPREAD, so that a few keys weigh much. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "random.h"
#include "select.h"

enum { N_ROW_SAMPLE = 16, N_HEAD_SAMPLE = 2, SPREAD = 3, DEFAULT_CHUNK = 2048, MOST_D_HEAD = 1024 };

typedef enum spans { CAUSAL, FULL, CHUNK, SELECTED, N_SPANS } spans;

typedef struct attention {
    bench_stand stand;
    bench_table *table; /* rank 0 */
    const ifkv_config *config;
    int64_t num, den, chunk; /* ratio; tokens */
    spans kind;
    char label[48];
    int64_t n_key, n_row;
    double n_pair;
    uint64_t key;
    ifkv_view q, k, v, out, lse; /* owned, back-end memory */
    int64_t *span;               /* owned, host: [2, n_row] begin, end */
    void *device_span;           /* owned: the same in back-end memory */
    ifkv_attention_args args;
} attention;

static int64_t q_cols(const attention *a) {
    return (int64_t)a->config->n_head * a->config->d_head;
}
static int64_t kv_cols(const attention *a) {
    return (int64_t)a->config->n_kv_head * a->config->d_head;
}

/* ---- the case ---- */

static void name_case(attention *a) {
    static const char *const names[N_SPANS] = {"causal", "full", "chunk", "selected"};
    const char *name = names[a->kind], *ratio = a->stand.options->ratio;
    if (a->kind == CHUNK)
        snprintf(a->label, sizeof a->label, "%s %lld", name, (long long)a->chunk);
    else if (a->kind == SELECTED)
        snprintf(a->label, sizeof a->label, "%s %.16s", name, ratio ? ratio : "0.15");
    else
        snprintf(a->label, sizeof a->label, "%s", name);
}

/* Row i of n_row lies anywhere in the i-th of as many equal parts of the sequence. */
static void make_spans(attention *a) {
    for (int64_t i = 0; i < a->n_row; i++) {
        int64_t row = i;
        if (a->kind == SELECTED) {
            const int64_t begin = i * a->n_key / a->n_row, end = (i + 1) * a->n_key / a->n_row;
            row = begin +
                  (int64_t)(ifkv_random_u64(a->key + 4, (uint64_t)i) % (uint64_t)(end - begin));
        }
        a->span[i] = a->kind == CHUNK ? row / a->chunk * a->chunk : 0;
        a->span[a->n_row + i] = a->kind == FULL ? a->n_key : row + 1;
        a->n_pair += (double)(a->span[a->n_row + i] - a->span[i]);
    }
}

static ifkv_status make_operands(attention *a) {
    ifkv_backend *backend = a->stand.backend;
    const ifkv_dtype dtype = backend->ops->dtype;
    const size_t bytes = 2 * (size_t)a->n_row * sizeof *a->span;
    a->span = malloc(bytes);
    IFKV_REQUIRE(a->span, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "bench: out of host memory");
    make_spans(a);
    IFKV_TRY(backend->ops->alloc(backend, bytes, &a->device_span));
    IFKV_TRY(backend->ops->upload(backend, a->device_span, a->span, bytes));
    IFKV_TRY(bench_matrix(backend, dtype, a->n_row, q_cols(a), a->key, SPREAD, &a->q));
    IFKV_TRY(bench_matrix(backend, dtype, a->n_key, kv_cols(a), a->key + 1, 1, &a->k));
    IFKV_TRY(bench_matrix(backend, dtype, a->n_key, kv_cols(a), a->key + 2, 1, &a->v));
    IFKV_TRY(bench_matrix(backend, dtype, a->n_row, q_cols(a), 0, 0, &a->out));
    IFKV_TRY(bench_matrix(backend, IFKV_DTYPE_F32, a->n_row, a->config->n_head, 0, 0, &a->lse));
    a->args = (ifkv_attention_args){.n_head = a->config->n_head,
                                    .n_kv_head = a->config->n_kv_head,
                                    .d_head = a->config->d_head,
                                    .scale = 1.0f / sqrtf((float)a->config->d_head),
                                    .q = a->q,
                                    .k = a->k,
                                    .v = a->v,
                                    .begin = a->device_span,
                                    .end = (const int64_t *)a->device_span + a->n_row,
                                    .out = a->out,
                                    .lse = a->lse};
    return IFKV_OK;
}

static void free_operands(attention *a) {
    ifkv_backend *backend = a->stand.backend;
    void *const owned[] = {a->q.data,   a->k.data,   a->v.data,
                           a->out.data, a->lse.data, a->device_span};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) backend->ops->free(backend, owned[i]);
    free(a->span);
}

static ifkv_status prepare(void *arg) {
    attention *a = arg;
    for (int64_t i = 0; i < N_ROW_SAMPLE; i++) {
        const int64_t row = bench_sample(a->key, i, a->n_row);
        IFKV_TRY(bench_row_poison(a->stand.backend, &a->out, row));
        IFKV_TRY(bench_row_poison(a->stand.backend, &a->lse, row));
    }
    return IFKV_OK;
}

static ifkv_status run(void *arg, int64_t i_call) {
    attention *a = arg;
    (void)i_call;
    return a->stand.backend->ops->attention(a->stand.backend, &a->args);
}

/* ---- the check ---- */

typedef struct oracle {
    float q[MOST_D_HEAD], kv[MOST_D_HEAD];
    double *score;                                    /* [n_key] */
    double want[MOST_D_HEAD], magnitude[MOST_D_HEAD]; /* sum of p v; of p |v| */
    double lse, most;                                 /* most: of scale * sum |q| |k| */
} oracle;

/* One row and head, from the definition. */
static void attend(const attention *a, int64_t row, int head, oracle *o) {
    const int d = a->config->d_head, group = a->config->n_head / a->config->n_kv_head;
    const int64_t begin = a->span[row], end = a->span[a->n_row + row];
    const ifkv_dtype dtype = a->q.dtype;
    const double scale = 1 / sqrt((double)d);
    double top = -INFINITY, total = 0;
    bench_elements(dtype, a->key, SPREAD, row * q_cols(a) + (int64_t)head * d, d, o->q);
    o->most = 0;
    for (int64_t key = begin; key < end; key++) {
        double sum = 0, magnitude = 0;
        bench_elements(dtype, a->key + 1, 1, key * kv_cols(a) + (int64_t)(head / group) * d, d,
                       o->kv);
        for (int i = 0; i < d; i++) {
            sum += (double)o->q[i] * (double)o->kv[i];
            magnitude += fabs((double)o->q[i] * (double)o->kv[i]);
        }
        o->score[key] = sum * scale;
        o->most = fmax(o->most, magnitude * scale);
        top = fmax(top, o->score[key]);
    }
    for (int64_t key = begin; key < end; key++) total += exp(o->score[key] - top);
    o->lse = top + log(total);
    memset(o->want, 0, sizeof o->want);
    memset(o->magnitude, 0, sizeof o->magnitude);
    for (int64_t key = begin; key < end; key++) {
        const double p = exp(o->score[key] - o->lse);
        bench_elements(dtype, a->key + 2, 1, key * kv_cols(a) + (int64_t)(head / group) * d, d,
                       o->kv);
        for (int i = 0; i < d; i++) {
            o->want[i] += p * (double)o->kv[i];
            o->magnitude[i] += p * fabs((double)o->kv[i]);
        }
    }
}

/* A score is off by at most a float32 sum's steps over d terms, an exponential by that and a few
 * roundings, and so is their sum, in as many steps as there are keys.  Probabilities may be rounded
 * to the type of V before they meet it; the result is rounded once more. */
static void check_head(const attention *a, const oracle *o, int64_t row, const float *out,
                       float lse, bench_check *check) {
    const int d = a->config->d_head;
    const double n = (double)(a->span[a->n_row + row] - a->span[row]);
    const double off_score = o->most * (d + 8) * BENCH_SUM_EPS;
    const double off_sum = off_score + (n + 16) * BENCH_SUM_EPS;
    const double round = bench_rounding(a->out.dtype);
    for (int i = 0; i < d; i++)
        bench_check_add(check, (double)out[i], o->want[i],
                        2 * (off_sum + round) * o->magnitude[i] + round * fabs(o->want[i]));
    const double off_lse = fabs((double)lse - o->lse);
    check->n_checked++;
    check->n_wrong += !(off_lse <= off_sum + 2 * BENCH_SUM_EPS * fabs(o->lse));
}

static ifkv_status check_rows(const attention *a, oracle *o, float *out, float *lse,
                              bench_check *check) {
    const int n_head = a->config->n_head, d = a->config->d_head;
    for (int64_t s = 0; s < N_ROW_SAMPLE; s++) {
        const int64_t row = bench_sample(a->key, s, a->n_row);
        IFKV_TRY(bench_row_read(a->stand.backend, &a->out, row, out));
        IFKV_TRY(bench_row_read(a->stand.backend, &a->lse, row, lse));
        for (int64_t i = 0; i < q_cols(a); i++)
            if (!isfinite(out[i])) check->n_wrong++;
        for (int i = 0; i < n_head; i++)
            if (!isfinite(lse[i])) check->n_wrong++;
        for (int64_t h = 0; h < N_HEAD_SAMPLE; h++) {
            const int head = (int)(ifkv_random_u64(a->key + 3, (uint64_t)(s * N_HEAD_SAMPLE + h)) %
                                   (uint64_t)n_head);
            attend(a, row, head, o);
            check_head(a, o, row, out + (int64_t)head * d, lse[head], check);
        }
    }
    return IFKV_OK;
}

static ifkv_status check_attention(attention *a, bench_check *check, double *error_p) {
    oracle *o = malloc(sizeof *o);
    double *score = malloc((size_t)a->n_key * sizeof *score);
    float *rows = malloc((size_t)(q_cols(a) + a->config->n_head) * sizeof *rows);
    ifkv_status status = IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "bench: out of host memory");
    if (o && score && rows) {
        o->score = score;
        status = check_rows(a, o, rows, rows + q_cols(a), check);
    }
    free(o);
    free(score);
    free(rows);
    IFKV_TRY(ifkv_comm_agree(a->stand.comm, status, NULL));
    return bench_check_finish(check, a->stand.comm, error_p);
}

/* ---- rows of the table ---- */

static ifkv_status report(attention *a, double flop, double rate, double error,
                          const bench_check *check) {
    const bench_stand *t = &a->stand;
    const double share = t->peak > 0 ? rate / t->peak : NAN;
    char cell[4][32], line[256];
    json_t *row = json_pack(
        "{s:s, s:s, s:I, s:I, s:i, s:i, s:i, s:f, s:o, s:o, s:o, s:o, s:o, s:I, s:I}", "label",
        a->label, "model", t->options->model, "tokens", (json_int_t)a->n_key, "rows",
        (json_int_t)a->n_row, "heads", a->config->n_head, "kv_heads", a->config->n_kv_head,
        "d_head", a->config->d_head, "flop", flop, "time_ms", bench_real(t->median_ms), "min_ms",
        bench_real(t->min_ms), "tflops", bench_real(1e-12 * rate), "peak_share", bench_real(share),
        "error", bench_real(error), "checked", (json_int_t)check->n_checked, "wrong",
        (json_int_t)check->n_wrong);
    snprintf(line, sizeof line, "  %8lld %8lld %3d/%d/%d %-14s %s %s %s %s %9.1e %8lld",
             (long long)a->n_key, (long long)a->n_row, a->config->n_head, a->config->n_kv_head,
             a->config->d_head, a->label, bench_cell(cell[0], 10, "%.4f", t->median_ms),
             bench_cell(cell[1], 10, "%.4f", t->min_ms),
             bench_cell(cell[2], 9, "%.4g", 1e-12 * rate),
             bench_cell(cell[3], 8, "%.2f", 100 * share), error, (long long)check->n_wrong);
    return bench_table_row(a->table, row, line);
}

static ifkv_status measure(attention *a) {
    const double flop = 4 * a->n_pair * (double)q_cols(a);
    bench_check check = {0};
    double error = 0, rate = 0;
    IFKV_TRY(bench_time(&a->stand, prepare, run, a));
    IFKV_TRY(check_attention(a, &check, &error));
    if (check.n_wrong) a->stand.median_ms = a->stand.min_ms = NAN;
    IFKV_TRY(ifkv_comm_agree(a->stand.comm, bench_rate(&a->stand, flop, &rate), NULL));
    const ifkv_status status = a->table ? report(a, flop, rate, error, &check) : IFKV_OK;
    return ifkv_comm_agree(a->stand.comm, status, NULL);
}

static ifkv_status run_case(const attention *common, spans kind, int64_t n_key) {
    attention a = *common;
    a.kind = kind;
    a.n_key = a.n_row = n_key;
    a.key = ifkv_random_u64(a.stand.options->seed, (uint64_t)n_key * N_SPANS + kind);
    if (kind == SELECTED) a.n_row = ifkv_select_by_ratio(a.num, a.den, n_key, n_key);
    if (a.n_row == 0) return IFKV_OK;
    name_case(&a);
    ifkv_status status = ifkv_comm_agree(a.stand.comm, make_operands(&a), NULL);
    if (status == IFKV_OK) status = measure(&a);
    free_operands(&a);
    return status;
}

static ifkv_status open_table(attention *a) {
    char columns[256];
    snprintf(columns, sizeof columns, "# %8s %8s %-9s %-14s %10s %10s %9s %8s %9s %8s", "tokens",
             "rows", "heads", "spans", "time ms", "least", "TFLOP/s", "% peak", "error", "#wrong");
    return bench_table_open(a->stand.options, "attention", &a->stand, a->stand.options->model,
                            columns, &a->table);
}

static ifkv_status run_cases(attention *a, const int64_t *length, int n_length) {
    for (int i = 0; i < n_length; i++)
        for (int kind = 0; kind < N_SPANS; kind++)
            if (kind != CHUNK || a->chunk < length[i])
                IFKV_TRY(run_case(a, (spans)kind, length[i]));
    if (a->table) return bench_table_finish(a->table);
    return IFKV_OK;
}

ifkv_status bench_attention(ifkv_comm *comm, const cli_options *options) {
    attention a = {.chunk = options->chunk ? options->chunk : DEFAULT_CHUNK};
    int64_t length[BENCH_MAX_LENGTH];
    int n_length = 0;
    ifkv_engine *engine = NULL;
    ifkv_status status =
        bench_lengths(options->lengths ? options->lengths : "2048,8192", 1, length, &n_length);
    if (status == IFKV_OK)
        status = ifkv_ratio_parse(options->ratio ? options->ratio : "0.15", &a.num, &a.den);
    IFKV_TRY(ifkv_comm_agree(comm, status, NULL));
    IFKV_TRY(bench_engine_open(comm, options, &engine));
    a.config = &engine->model.config;
    status = bench_stand_init(&a.stand, comm, engine->backend, options);
    if (status == IFKV_OK && ifkv_comm_rank(comm) == 0) status = open_table(&a);
    status = ifkv_comm_agree(comm, status, NULL);
    if (status == IFKV_OK) status = ifkv_comm_agree(comm, run_cases(&a, length, n_length), NULL);
    bench_table_close(a.table);
    ifkv_engine_close(engine);
    return status;
}
