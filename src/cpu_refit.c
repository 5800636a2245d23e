/* An affine map per K/V head, fitted on some rows and applied to the others (backend.h, refit).
 *
 * With x a stale row of a head and y its change, both less their means, W = (sum x x' + lambda)^-1
 * sum x y', lambda = ridge * trace / d_head.  Moments and the Cholesky solution are float64 and sum
 * in row order; a head is one task.  Rows are then moved in blocks of fixed size, in float32. */
#include "cpu_backend.h"

#include <math.h>
#include <string.h>

enum { BLOCK_ROWS = 32, D = IFKV_CPU_MAX_D_HEAD };

/* What a head's piece of scratch holds, d = d_head. */
typedef struct head_fit {
    double *gram;     /* [d, d], then its Cholesky factor */
    double *product;  /* [d, d], then W */
    double *mean;     /* [2, d] of x and y */
    float *w, *shift; /* [d, d], [d]: y = shift + W' x; over gram, which is done with by then */
} head_fit;

static head_fit fit_of(const ifkv_refit_args *args, int head) {
    const int64_t d = args->d_head;
    double *gram = args->scratch + head * ifkv_refit_scratch(args->d_head);
    float *w = (float *)(void *)gram;
    return (head_fit){gram, gram + d * d, gram + 2 * d * d, w, w + d * d};
}

/* to [d] = from, turned back by a row's angles where there are any. */
static void unrotate(const ifkv_refit_args *args, int64_t row, const float *from, float *to) {
    const int half = args->d_head / 2;
    if (!args->cos_sin.data) {
        memcpy(to, from, (size_t)args->d_head * sizeof *to);
        return;
    }
    const float *cosine = (const float *)args->cos_sin.data + row * args->cos_sin.stride,
                *sine = cosine + half;
    for (int i = 0; i < half; i++) {
        to[i] = from[i] * cosine[i] + from[half + i] * sine[i];
        to[half + i] = from[half + i] * cosine[i] - from[i] * sine[i];
    }
}

static void add_rotated(const ifkv_refit_args *args, int64_t row, const float *change, float *to) {
    const int d = args->d_head, half = d / 2;
    if (!args->cos_sin.data) {
        for (int i = 0; i < d; i++) to[i] += change[i];
        return;
    }
    const float *cosine = (const float *)args->cos_sin.data + row * args->cos_sin.stride,
                *sine = cosine + half;
    for (int i = 0; i < half; i++) {
        to[i] += change[i] * cosine[i] - change[half + i] * sine[i];
        to[half + i] += change[half + i] * cosine[i] + change[i] * sine[i];
    }
}

/* x and y of fitted row i, less those of `mean`: [d] each. */
static void fitted_row(const ifkv_refit_args *args, int head, int64_t i, const double *mean,
                       double *x, double *y) {
    const int64_t d = args->d_head, row = args->row[i];
    float stale[D], fresh[D];
    unrotate(args, row, (const float *)args->stale.data + i * args->stale.stride + head * d, stale);
    unrotate(args, row, (const float *)args->fresh.data + i * args->fresh.stride + head * d, fresh);
    for (int64_t c = 0; c < d; c++) {
        x[c] = (double)stale[c] - mean[c];
        y[c] = (double)fresh[c] - (double)stale[c] - mean[d + c];
    }
}

IFKV_CPU_CLONES
static void add_outer(int64_t d, const double *restrict x, const double *restrict y,
                      double *restrict gram, double *restrict product) {
    for (int64_t a = 0; a < d; a++)
        for (int64_t b = 0; b < d; b++) {
            gram[a * d + b] += x[a] * x[b];
            product[a * d + b] += x[a] * y[b];
        }
}

/* Means are counted from the first row: those of equal rows are that row to the bit, so that their
 * variance is 0 and not the square of a rounding, which would be fitted. */
static void add_moments(const ifkv_refit_args *args, int head, const head_fit *fit) {
    const int64_t d = args->d_head, n = args->stale.n_row;
    double x[D], y[D], origin[2 * D] = {0}; /* of the first row */
    memset(fit->gram, 0, (size_t)(2 * d * d + 2 * d) * sizeof *fit->gram);
    fitted_row(args, head, 0, origin, x, y);
    memcpy(origin, x, (size_t)d * sizeof *x);
    memcpy(origin + d, y, (size_t)d * sizeof *y);
    for (int64_t i = 0; i < n; i++) {
        fitted_row(args, head, i, origin, x, y);
        for (int64_t c = 0; c < d; c++) {
            fit->mean[c] += x[c] / (double)n;
            fit->mean[d + c] += y[c] / (double)n;
        }
    }
    for (int64_t c = 0; c < 2 * d; c++) fit->mean[c] += origin[c];
    for (int64_t i = 0; i < n; i++) {
        fitted_row(args, head, i, fit->mean, x, y);
        add_outer(d, x, y, fit->gram, fit->product);
    }
}

/* gram = L L', in the lower triangle. */
static void factor(int64_t d, double *gram) {
    for (int64_t i = 0; i < d; i++)
        for (int64_t j = 0; j <= i; j++) {
            double sum = gram[i * d + j];
            for (int64_t k = 0; k < j; k++) sum -= gram[i * d + k] * gram[j * d + k];
            gram[i * d + j] = i == j ? sqrt(sum) : sum / gram[j * d + j];
        }
}

/* product = (L L')^-1 product, row by row. */
IFKV_CPU_CLONES
static void solve(int64_t d, const double *restrict l, double *restrict product) {
    for (int64_t i = 0; i < d; i++) {
        for (int64_t k = 0; k < i; k++)
            for (int64_t c = 0; c < d; c++) product[i * d + c] -= l[i * d + k] * product[k * d + c];
        for (int64_t c = 0; c < d; c++) product[i * d + c] /= l[i * d + i];
    }
    for (int64_t i = d; i-- > 0;) {
        for (int64_t k = i + 1; k < d; k++)
            for (int64_t c = 0; c < d; c++) product[i * d + c] -= l[k * d + i] * product[k * d + c];
        for (int64_t c = 0; c < d; c++) product[i * d + c] /= l[i * d + i];
    }
}

static void fit_head(const ifkv_refit_args *args, int head) {
    const head_fit fit = fit_of(args, head);
    const int64_t d = args->d_head;
    double trace = 0;
    add_moments(args, head, &fit);
    for (int64_t a = 0; a < d; a++) trace += fit.gram[a * d + a];
    if (trace > 0) { /* else all rows are one: product is 0, and so is W */
        for (int64_t a = 0; a < d; a++) fit.gram[a * d + a] += args->ridge * trace / (double)d;
        factor(d, fit.gram);
        solve(d, fit.gram, fit.product);
    }
    for (int64_t c = 0; c < d; c++) {
        double shift = fit.mean[d + c];
        for (int64_t a = 0; a < d; a++) shift -= fit.mean[a] * fit.product[a * d + c];
        fit.shift[c] = (float)shift;
    }
    for (int64_t i = 0; i < d * d; i++) fit.w[i] = (float)fit.product[i];
}

/* First of n ascending rows that is at or above `row`. */
static int64_t lower_bound(const int64_t *rows, int64_t n, int64_t row) {
    int64_t low = 0, high = n;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (rows[middle] < row)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Move the rows of [row, row + n) that were not fitted, one head. */
static void move_block(const ifkv_refit_args *args, int head, int64_t row, int64_t n) {
    const int64_t d = args->d_head, n_fit = args->stale.n_row;
    const head_fit fit = fit_of(args, head);
    float *data = (float *)args->x.data + row * args->x.stride + head * d;
    float x[BLOCK_ROWS * D], change[BLOCK_ROWS * D];
    for (int64_t i = 0; i < n; i++) {
        unrotate(args, row + i, data + i * args->x.stride, x + i * d);
        memcpy(change + i * d, fit.shift, (size_t)d * sizeof *change);
    }
    ifkv_cpu_product_nn(n, d, d, x, d, fit.w, d, 1.0f, change, d);
    int64_t next = lower_bound(args->row, n_fit, row);
    for (int64_t i = 0; i < n; i++) {
        if (next < n_fit && args->row[next] == row + i)
            next++;
        else
            add_rotated(args, row + i, change + i * d, data + i * args->x.stride);
    }
}

static ifkv_status check_refit(const ifkv_refit_args *args) {
    IFKV_TRY(ifkv_cpu_check_heads("refit", args->n_head, args->n_head, args->d_head));
    IFKV_TRY(ifkv_refit_check(args, IFKV_DTYPE_F32));
    for (int64_t i = 0; i < args->stale.n_row; i++)
        IFKV_REQUIRE(args->row[i] >= (i ? args->row[i - 1] + 1 : 0) && args->row[i] < args->x.n_row,
                     IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                     "refit: row[%lld] is %lld, expected ascending rows below %lld", (long long)i,
                     (long long)args->row[i], (long long)args->x.n_row);
    return IFKV_OK;
}

ifkv_status ifkv_cpu_refit(ifkv_backend *backend, const ifkv_refit_args *args) {
    IFKV_TRY(check_refit(args));
    const int64_t n_row = args->x.n_row, first = args->first;
    const int n_head = args->n_head;
    if (args->stale.n_row == 0) return IFKV_OK;
#pragma omp parallel for num_threads(backend->n_thread) schedule(static)
    for (int head = 0; head < n_head; head++) fit_head(args, head);
#pragma omp parallel for num_threads(backend->n_thread) schedule(static)
    for (int64_t row = first; row < n_row; row += BLOCK_ROWS)
        for (int head = 0; head < n_head; head++)
            move_block(args, head, row, n_row - row < BLOCK_ROWS ? n_row - row : BLOCK_ROWS);
    return IFKV_OK;
}
