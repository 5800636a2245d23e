/* `ifkv bench gemm`: the products of a layer and the logits, at a model's shapes.
 *
 * T rows meet each matrix in the blocks of rows that a pass would cut; the logits are those of one
 * row.  A product is out = x w^T: the sums onto the residual stream that o and down end with are
 * not in it.  Calls of a batch take turns over copies of w, as layers do, so that none finds its
 * weights in a cache.  Sampled rows are poisoned before every batch and checked after the last: all
 * numbers finite, some against float64 on the same operands. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "placement.h"
#include "random.h"

enum { N_ROW_SAMPLE = 32, N_COL_SAMPLE = 32, MOST_COPIES = 64 };
static const double copies_bytes = 128e6; /* more than caches hold: 50 MB in an H100 */

typedef struct product {
    const char *name;
    int64_t n_out, n_in;
    bool is_logits;
} product;

typedef struct gemm {
    bench_stand stand;
    bench_table *table; /* rank 0 */
    int64_t n_row, n_copy;
    uint64_t key;
    product shape;
    double w_spread;
    ifkv_view x, w, out; /* owned */
} gemm;

static ifkv_status prepare(void *arg) {
    gemm *g = arg;
    for (int64_t i = 0; i < N_ROW_SAMPLE; i++)
        IFKV_TRY(
            bench_row_poison(g->stand.backend, &g->out, bench_sample(g->key, i, g->out.n_row)));
    return IFKV_OK;
}

static ifkv_status run(void *arg, int64_t i_call) {
    gemm *g = arg;
    ifkv_backend *backend = g->stand.backend;
    const int64_t n_block = ifkv_even_blocks(g->n_row, backend->ops->row_block);
    const ifkv_view w = ifkv_view_rows(&g->w, i_call % g->n_copy * g->shape.n_out, g->shape.n_out);
    for (int64_t i = 0; i < n_block; i++) {
        const int64_t begin = ifkv_even_begin(g->n_row, n_block, i),
                      n = ifkv_even_begin(g->n_row, n_block, i + 1) - begin;
        const ifkv_view x = ifkv_view_rows(&g->x, begin, n),
                        out = ifkv_view_rows(&g->out, begin, n);
        IFKV_TRY(backend->ops->matmul(backend, &x, &w, false, &out));
    }
    return IFKV_OK;
}

/* A result of n_in terms: each step of the sum may lose BENCH_SUM_EPS of what it has summed, at
 * most the sum of magnitudes; then it is rounded. */
static void check_element(const gemm *g, const float *x, const float *w, float got,
                          bench_check *check) {
    double want = 0, magnitude = 0;
    for (int64_t i = 0; i < g->shape.n_in; i++) {
        const double term = (double)x[i] * (double)w[i];
        want += term;
        magnitude += fabs(term);
    }
    const double bound = bench_rounding(g->out.dtype) * fabs(want) +
                         (double)g->shape.n_in * BENCH_SUM_EPS * magnitude;
    bench_check_add(check, (double)got, want, bound);
}

static ifkv_status check_rows(const gemm *g, float *x, float *w, float *out, bench_check *check) {
    const ifkv_dtype dtype = g->x.dtype;
    const int64_t n_in = g->shape.n_in, n_out = g->shape.n_out;
    const int64_t copy = (g->stand.n_call - 1) % g->n_copy;
    for (int64_t s = 0; s < N_ROW_SAMPLE; s++) {
        const int64_t row = bench_sample(g->key, s, g->n_row);
        IFKV_TRY(bench_row_read(g->stand.backend, &g->out, row, out));
        bench_elements(dtype, g->key, 1, row * n_in, n_in, x);
        for (int64_t i = 0; i < n_out; i++)
            if (!isfinite(out[i])) check->n_wrong++;
        for (int64_t c = 0; c < N_COL_SAMPLE; c++) {
            const int64_t col = bench_sample(g->key + (uint64_t)s, c, n_out);
            bench_elements(dtype, g->key + 1, g->w_spread, (copy * n_out + col) * n_in, n_in, w);
            check_element(g, x, w, out[col], check);
        }
    }
    return IFKV_OK;
}

static ifkv_status check_product(gemm *g, bench_check *check, double *error_p) {
    float *buffer = malloc((size_t)(2 * g->shape.n_in + g->shape.n_out) * sizeof *buffer);
    ifkv_status status =
        buffer ? check_rows(g, buffer, buffer + g->shape.n_in, buffer + 2 * g->shape.n_in, check)
               : IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "bench: out of host memory");
    free(buffer);
    IFKV_TRY(ifkv_comm_agree(g->stand.comm, status, NULL));
    return bench_check_finish(check, g->stand.comm, error_p);
}

static ifkv_status report(gemm *g, double flop, double rate, double error,
                          const bench_check *check) {
    const bench_stand *t = &g->stand;
    const double share = t->peak > 0 ? rate / t->peak : NAN;
    char cell[4][32], line[256];
    json_t *row = json_pack(
        "{s:s, s:s, s:I, s:I, s:I, s:f, s:o, s:o, s:o, s:o, s:o, s:I, s:I}", "label", g->shape.name,
        "model", t->options->model, "tokens", (json_int_t)g->n_row, "n_out",
        (json_int_t)g->shape.n_out, "n_in", (json_int_t)g->shape.n_in, "flop", flop, "time_ms",
        bench_real(t->median_ms), "min_ms", bench_real(t->min_ms), "tflops",
        bench_real(1e-12 * rate), "peak_share", bench_real(share), "error", bench_real(error),
        "checked", (json_int_t)check->n_checked, "wrong", (json_int_t)check->n_wrong);
    snprintf(line, sizeof line, "  %8lld %-10s %8lld %8lld %s %s %s %s %9.1e %8lld",
             (long long)g->n_row, g->shape.name, (long long)g->shape.n_out,
             (long long)g->shape.n_in, bench_cell(cell[0], 10, "%.4f", t->median_ms),
             bench_cell(cell[1], 10, "%.4f", t->min_ms),
             bench_cell(cell[2], 9, "%.4g", 1e-12 * rate),
             bench_cell(cell[3], 8, "%.2f", 100 * share), error, (long long)check->n_wrong);
    return bench_table_row(g->table, row, line);
}

static ifkv_status measure(gemm *g) {
    const double flop = 2 * (double)g->n_row * (double)g->shape.n_out * (double)g->shape.n_in;
    bench_check check = {0};
    double error = 0, rate = 0;
    IFKV_TRY(bench_time(&g->stand, prepare, run, g));
    IFKV_TRY(check_product(g, &check, &error));
    if (check.n_wrong) g->stand.median_ms = g->stand.min_ms = NAN;
    IFKV_TRY(ifkv_comm_agree(g->stand.comm, bench_rate(&g->stand, flop, &rate), NULL));
    const ifkv_status status = g->table ? report(g, flop, rate, error, &check) : IFKV_OK;
    return ifkv_comm_agree(g->stand.comm, status, NULL);
}

static ifkv_status make_operands(gemm *g) {
    ifkv_backend *backend = g->stand.backend;
    const ifkv_dtype dtype = backend->ops->dtype;
    const double w_bytes =
        (double)(g->shape.n_out * g->shape.n_in) * (double)ifkv_dtype_bytes(dtype);
    g->n_copy = backend->is_emulated ? 1 : (int64_t)fmin(MOST_COPIES, ceil(copies_bytes / w_bytes));
    g->w_spread = 1 / sqrt((double)g->shape.n_in);
    IFKV_TRY(bench_matrix(backend, dtype, g->n_row, g->shape.n_in, g->key, 1, &g->x));
    IFKV_TRY(bench_matrix(backend, dtype, g->n_copy * g->shape.n_out, g->shape.n_in, g->key + 1,
                          g->w_spread, &g->w));
    return bench_matrix(backend, g->shape.is_logits ? IFKV_DTYPE_F32 : dtype, g->n_row,
                        g->shape.n_out, 0, 0, &g->out);
}

static ifkv_status run_shape(gemm *g, const product *shape, int64_t n_row) {
    ifkv_backend *backend = g->stand.backend;
    g->shape = *shape;
    g->n_row = n_row;
    g->x = g->w = g->out = (ifkv_view){0};
    g->key =
        ifkv_random_u64(g->stand.options->seed,
                        (uint64_t)n_row ^ (uint64_t)shape->n_out << 32 ^ (uint64_t)shape->n_in);
    ifkv_status status = ifkv_comm_agree(g->stand.comm, make_operands(g), NULL);
    if (status == IFKV_OK) status = measure(g);
    backend->ops->free(backend, g->x.data);
    backend->ops->free(backend, g->w.data);
    backend->ops->free(backend, g->out.data);
    return status;
}

static ifkv_status run_shapes(gemm *g, const ifkv_config *c, const int64_t *length, int n_length) {
    const int64_t q = (int64_t)c->n_head * c->d_head, kv = (int64_t)c->n_kv_head * c->d_head;
    const product logits = {"logits", c->n_vocab, c->d_model, true};
    const product shapes[] = {{"qkv", q + 2 * kv, c->d_model, false},
                              {"o", c->d_model, q, false},
                              {"gate-up", 2 * (int64_t)c->d_ff, c->d_model, false},
                              {"down", c->d_model, c->d_ff, false}};
    for (int i = 0; i < n_length; i++)
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
            IFKV_TRY(run_shape(g, &shapes[s], length[i]));
    return run_shape(g, &logits, 1);
}

static ifkv_status open_table(gemm *g) {
    char columns[256];
    snprintf(columns, sizeof columns, "# %8s %-10s %8s %8s %10s %10s %9s %8s %9s %8s", "tokens",
             "product", "n_out", "n_in", "time ms", "least", "TFLOP/s", "% peak", "error",
             "#wrong");
    return bench_table_open(g->stand.options, "gemm", &g->stand, g->stand.options->model, columns,
                            &g->table);
}

ifkv_status bench_gemm(ifkv_comm *comm, const cli_options *options) {
    gemm g = {.table = NULL};
    int64_t length[BENCH_MAX_LENGTH];
    int n_length = 0;
    ifkv_engine *engine = NULL;
    ifkv_status status =
        bench_lengths(options->lengths ? options->lengths : "2048,8192", 1, length, &n_length);
    IFKV_TRY(ifkv_comm_agree(comm, status, NULL));
    IFKV_TRY(bench_engine_open(comm, options, &engine));
    status = bench_stand_init(&g.stand, comm, engine->backend, options);
    if (status == IFKV_OK && ifkv_comm_rank(comm) == 0) status = open_table(&g);
    status = ifkv_comm_agree(comm, status, NULL);
    if (status == IFKV_OK) status = run_shapes(&g, &engine->model.config, length, n_length);
    if (status == IFKV_OK) {
        if (g.table) status = bench_table_finish(g.table);
        status = ifkv_comm_agree(comm, status, NULL);
    }
    bench_table_close(g.table);
    ifkv_engine_close(engine);
    return status;
}
