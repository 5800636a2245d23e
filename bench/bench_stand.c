/* Operations one at a time: their time, their inputs and the check of their results.  See bench.h.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "convert.h"
#include "random.h"
#include "weights_random.h"

enum { MAX_CALL = 64, BLOCK = 1 << 16 };
static const double batch_ms = 20; /* long beside what a clock and a launch cost */

ifkv_status bench_engine_open(ifkv_comm *comm, const cli_options *options, ifkv_engine **engine_p) {
    ifkv_engine_options engine = cli_engine_options(options, true);
    engine.random_weights = true; /* config.json says it all */
    return ifkv_engine_open(comm, &engine, engine_p);
}

ifkv_status bench_stand_init(bench_stand *stand, ifkv_comm *comm, ifkv_backend *backend,
                             const cli_options *options) {
    *stand = (bench_stand){.options = options, .comm = comm, .backend = backend};
    IFKV_TRY(bench_repeat_check(options));
    if (!options->device) return IFKV_OK;
    cli_device device;
    IFKV_TRY(cli_device_read(options->device, &device));
    stand->peak = device.peak;
    return IFKV_OK;
}

/* Milliseconds of n calls, the slowest rank's. */
static ifkv_status batch(const bench_stand *stand, ifkv_status (*prepare)(void *),
                         ifkv_status (*run)(void *, int64_t), void *arg, int64_t n, double *ms_p) {
    ifkv_backend *backend = stand->backend;
    ifkv_status status = prepare(arg);
    if (status == IFKV_OK) status = backend->ops->sync(backend);
    IFKV_TRY(ifkv_comm_agree(stand->comm, status, NULL));
    IFKV_TRY(ifkv_comm_barrier(stand->comm));
    const double begin = backend->ops->clock_ms(backend);
    for (int64_t i = 0; i < n && status == IFKV_OK; i++) status = run(arg, i);
    if (status == IFKV_OK) status = backend->ops->sync(backend);
    int64_t ns = (int64_t)(1e6 * (backend->ops->clock_ms(backend) - begin));
    IFKV_TRY(ifkv_comm_agree(stand->comm, status, NULL));
    IFKV_TRY(ifkv_comm_all_reduce_i64(stand->comm, &ns, 1, IFKV_REDUCE_MAX));
    *ms_p = 1e-6 * (double)(ns > 0 ? ns : 1);
    return IFKV_OK;
}

ifkv_status bench_time(bench_stand *stand, ifkv_status (*prepare)(void *arg),
                       ifkv_status (*run)(void *arg, int64_t i_call), void *arg) {
    const int n_repeat = (int)stand->options->repeat;
    const bool has_time = !stand->backend->is_emulated;
    double ms = 0, most = 0;
    stand->n_call = 1;
    for (int round = -(int)stand->options->warm_up; round < n_repeat; round++) {
        IFKV_TRY(batch(stand, prepare, run, arg, stand->n_call, &ms));
        ms /= (double)stand->n_call;
        if (round >= 0)
            stand->ms[round] = has_time ? ms : NAN;
        else if (has_time)
            stand->n_call = ms > batch_ms ? 1 : (int64_t)fmin(MAX_CALL, ceil(batch_ms / ms));
    }
    bench_middle(stand->ms, n_repeat, &stand->median_ms, &stand->min_ms, &most);
    return IFKV_OK;
}

ifkv_status bench_rate(const bench_stand *stand, double flop, double *rate_p) {
    *rate_p = 1e3 * flop / stand->median_ms;
    IFKV_REQUIRE(!(stand->peak > 0 && *rate_p > stand->peak), IFKV_ERR_NUMERIC, IFKV_E_MISMATCH,
                 "bench: got %.4g TFLOP/s, expected at most the peak of %s, %.4g", 1e-12 * *rate_p,
                 stand->options->device, 1e-12 * stand->peak);
    return IFKV_OK;
}

/* ---- inputs ---- */

/* The sum of four uniform numbers below 2^16 has this spread. */
static ifkv_draw stream_of(uint64_t key, double spread) {
    return (ifkv_draw){.key = key, .scale = (float)(spread / (65536 / sqrt(3)))};
}

static void narrow(ifkv_dtype dtype, const float *from, int64_t n, float *to) {
    for (int64_t i = 0; i < n; i++)
        to[i] = dtype == IFKV_DTYPE_BF16 ? ifkv_bf16_to_f32(ifkv_f32_to_bf16(from[i])) : from[i];
}

void bench_elements(ifkv_dtype dtype, uint64_t key, double spread, int64_t first, int64_t n,
                    float *to) {
    const ifkv_draw stream = stream_of(key, spread);
    ifkv_weights_draw(&stream, first, n, to);
    narrow(dtype, to, n, to);
}

static ifkv_status fill(ifkv_backend *backend, const ifkv_view *view, uint64_t key, double spread,
                        float *drawn, void *result) {
    const ifkv_draw stream = stream_of(key, spread);
    const size_t element = ifkv_dtype_bytes(view->dtype);
    const int64_t n = view->n_row * view->n_col;
    if (spread > 0 && backend->ops->draw && view->dtype == backend->ops->dtype)
        return backend->ops->draw(backend, &stream, n, view->data);
    if (!(spread > 0)) memset(result, 0xff, BLOCK * element);
    for (int64_t first = 0; first < n; first += BLOCK) {
        const int64_t m = n - first < BLOCK ? n - first : BLOCK;
        if (spread > 0) {
            ifkv_weights_draw(&stream, first, m, drawn);
            ifkv_convert(IFKV_DTYPE_F32, drawn, view->dtype, result, m);
        }
        IFKV_TRY(backend->ops->upload(backend, (char *)view->data + (size_t)first * element, result,
                                      (size_t)m * element));
    }
    return IFKV_OK;
}

ifkv_status bench_matrix(ifkv_backend *backend, ifkv_dtype dtype, int64_t n_row, int64_t n_col,
                         uint64_t key, double spread, ifkv_view *view) {
    const size_t bytes = (size_t)(n_row * n_col) * ifkv_dtype_bytes(dtype);
    void *data = NULL;
    IFKV_TRY(backend->ops->alloc(backend, bytes ? bytes : 1, &data));
    *view = ifkv_view_make(data, dtype, n_row, n_col, n_col);
    float *drawn = malloc(2 * BLOCK * sizeof *drawn);
    const ifkv_status status =
        drawn ? fill(backend, view, key, spread, drawn, drawn + BLOCK)
              : IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "bench: out of host memory");
    free(drawn);
    return status;
}

/* ---- results ---- */

int64_t bench_sample(uint64_t key, int64_t i, int64_t n_row) {
    if (i < 2) return i ? n_row - 1 : 0;
    return (int64_t)(ifkv_random_u64(key, (uint64_t)i) % (uint64_t)n_row);
}

static void *row_address(const ifkv_view *view, int64_t row) {
    return ifkv_view_rows(view, row, 1).data;
}

ifkv_status bench_row_poison(ifkv_backend *backend, const ifkv_view *view, int64_t row) {
    const size_t bytes = (size_t)view->n_col * ifkv_dtype_bytes(view->dtype);
    void *bits = malloc(bytes);
    IFKV_REQUIRE(bits, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "bench: out of host memory");
    memset(bits, 0xff, bytes);
    const ifkv_status status = backend->ops->upload(backend, row_address(view, row), bits, bytes);
    free(bits);
    return status;
}

ifkv_status bench_row_read(ifkv_backend *backend, const ifkv_view *view, int64_t row, float *to) {
    const size_t bytes = (size_t)view->n_col * ifkv_dtype_bytes(view->dtype);
    if (view->dtype == IFKV_DTYPE_F32)
        return backend->ops->download(backend, to, row_address(view, row), bytes);
    uint16_t *half = malloc(bytes);
    IFKV_REQUIRE(half, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "bench: out of host memory");
    const ifkv_status status = backend->ops->download(backend, half, row_address(view, row), bytes);
    for (int64_t i = 0; i < view->n_col && status == IFKV_OK; i++)
        to[i] = ifkv_bf16_to_f32(half[i]);
    free(half);
    return status;
}

double bench_rounding(ifkv_dtype dtype) {
    return dtype == IFKV_DTYPE_BF16 ? 0x1p-8 : 0x1p-24;
}

void bench_check_add(bench_check *check, double got, double want, double bound) {
    const double error = fabs(got - want);
    check->n_checked++;
    check->n_wrong += !(error <= bound); /* NaN, too */
    check->square += want * want;
    if (!(error <= check->worst) && !isnan(check->worst)) check->worst = error;
}

/* The bits of numbers that are not negative ascend with them, NaN last. */
ifkv_status bench_check_finish(bench_check *check, ifkv_comm *comm, double *error_p) {
    const double mean = check->square / (double)(check->n_checked ? check->n_checked : 1);
    double error = fabs(check->worst / sqrt(mean > 0 ? mean : 1));
    int64_t bits = 0, count[] = {check->n_checked, check->n_wrong};
    memcpy(&bits, &error, sizeof bits);
    IFKV_TRY(ifkv_comm_all_reduce_i64(comm, &bits, 1, IFKV_REDUCE_MAX));
    IFKV_TRY(ifkv_comm_all_reduce_i64(comm, count, 2, IFKV_REDUCE_SUM));
    memcpy(&error, &bits, sizeof bits);
    check->n_checked = count[0];
    check->n_wrong = count[1];
    *error_p = error;
    return IFKV_OK;
}
