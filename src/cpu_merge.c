/* Merge of partial attentions over disjoint key sets (algorithm 2.2).
 *
 *   M = max lse_i   w_i = e^(lse_i - M)   out = sum w_i out_i / sum w_i   lse = M + ln sum w_i
 *
 * All of it in float64 and in the order given, rounded once when stored. */
#include "cpu_backend.h"

#include <math.h>

static double value_at(const ifkv_view *view, int64_t row, int64_t col) {
    const int64_t at = row * view->stride + col;
    return view->dtype == IFKV_DTYPE_F64 ? ((const double *)view->data)[at]
                                         : (double)((const float *)view->data)[at];
}

static void store_at(const ifkv_view *view, int64_t row, int64_t col, double value) {
    const int64_t at = row * view->stride + col;
    if (view->dtype == IFKV_DTYPE_F64)
        ((double *)view->data)[at] = value;
    else
        ((float *)view->data)[at] = (float)value;
}

/* sum [n] += weight * the n columns from col on. */
static void add_part(const ifkv_view *part, int64_t row, int64_t col, int n, double weight,
                     double *sum) {
    const int64_t at = row * part->stride + col;
    if (part->dtype == IFKV_DTYPE_F64) {
        const double *from = (const double *)part->data + at;
        for (int c = 0; c < n; c++) sum[c] += weight * from[c];
    } else {
        const float *from = (const float *)part->data + at;
        for (int c = 0; c < n; c++) sum[c] += weight * (double)from[c];
    }
}

static void merge_head(const ifkv_merge_args *args, int64_t row, int head) {
    const int d_head = args->d_head;
    double max = -INFINITY, total = 0, sum[IFKV_CPU_MAX_D_HEAD] = {0};
    for (int i = 0; i < args->n_part; i++) {
        const double lse = value_at(&args->lse_part[i], row, head);
        /* A NaN must win too, or it would be dropped as if it were an empty part. */
        if (lse > max || isnan(lse)) max = lse;
    }
    for (int i = 0; i < args->n_part; i++) {
        const double lse = value_at(&args->lse_part[i], row, head);
        if (lse == -INFINITY) continue;
        const double weight = exp(lse - max);
        total += weight;
        if (args->out.data)
            add_part(&args->out_part[i], row, (int64_t)head * d_head, d_head, weight, sum);
    }
    const bool is_empty = max == -INFINITY;
    if (args->out.data)
        for (int c = 0; c < d_head; c++)
            store_at(&args->out, row, (int64_t)head * d_head + c, is_empty ? 0 : sum[c] / total);
    if (args->lse.data) store_at(&args->lse, row, head, is_empty ? -INFINITY : max + log(total));
}

static ifkv_status check_part(const char *what, const ifkv_view *view, int64_t n_row,
                              int64_t n_col) {
    const ifkv_dtype dtype = view->dtype == IFKV_DTYPE_F64 ? IFKV_DTYPE_F64 : IFKV_DTYPE_F32;
    return ifkv_view_check("merge", what, view, dtype, n_row, n_col);
}

ifkv_status ifkv_cpu_merge(ifkv_backend *backend, const ifkv_merge_args *args) {
    IFKV_TRY(ifkv_cpu_check_heads("merge", args->n_head, 1, args->d_head));
    const int n_head = args->n_head;
    const int64_t n_row = args->out.data ? args->out.n_row : args->lse.n_row;
    const int64_t n_col = (int64_t)n_head * args->d_head;
    for (int i = 0; i < args->n_part; i++) {
        if (args->out.data) IFKV_TRY(check_part("part", &args->out_part[i], n_row, n_col));
        IFKV_TRY(check_part("lse of a part", &args->lse_part[i], n_row, n_head));
    }
    if (args->out.data) IFKV_TRY(check_part("out", &args->out, n_row, n_col));
    if (args->lse.data) IFKV_TRY(check_part("lse", &args->lse, n_row, n_head));
#pragma omp parallel for num_threads(backend->n_thread)                                            \
    schedule(static) if (ifkv_cpu_is_large(n_row * n_col))
    for (int64_t row = 0; row < n_row; row++)
        for (int head = 0; head < n_head; head++) merge_head(args, row, head);
    return IFKV_OK;
}
