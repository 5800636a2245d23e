/* Products of matrices over the BLAS library: the only file that knows it.
 *
 * A product is cut into tasks of fixed size by its shape; each task is one call of the library on
 * one thread, so the bits of a row depend on the shape of the product and on nothing else.  The
 * library is told to use no threads of its own: several rank threads, each with OpenMP threads of
 * its own, may be inside it at once. */
#include "cpu_backend.h"

#include <limits.h>
#include <string.h>

#include <cblas.h>

enum {
    /* Up to this many rows one pass over the weights per row is as fast as a matrix product. */
    FEW_ROWS = 4,
    /* Outputs of a matrix-vector task: 64 rows of weights stay in the second level cache while they
     * meet all of the FEW_ROWS rows. */
    FEW_COLS = 64,
    /* Rows and outputs of a task: small enough that 576 outputs of 512 rows feed eight threads, and
     * that a task's rows stay in the second level cache. */
    TASK_ROWS = 256,
    TASK_COLS = 96,
    /* Where OpenBLAS has kernels for AVX-512, a product of at most 1200 outputs and 100^3 products
     * runs on the operands as they lie.  Cut into such tiles a matrix product is 7 % faster than
     * one that packs, five times at eight rows, and its sums are more accurate. */
    TILE_OUTPUTS = 1152,
    TILE_ROWS = 48,
    TILE_DEPTH = 832, /* 1152 * 832 < 100^3 */
};

/* The product of a task, in tiles of rows x cols outputs over depth inputs at a time. */
typedef struct tile_shape {
    int64_t rows, cols, depth;
} tile_shape;

static tile_shape tile_for(int64_t n_row, int64_t n_in) {
    static const char *const with_small_kernels[] = {"SkylakeX", "Cooperlake", "SapphireRapids"};
    const char *core = openblas_get_corename();
    const int64_t rows = n_row < TILE_ROWS ? n_row : TILE_ROWS;
    const int64_t n_part = (n_in + TILE_DEPTH - 1) / TILE_DEPTH;
    for (size_t i = 0; i < sizeof with_small_kernels / sizeof *with_small_kernels; i++)
        if (!strcmp(core, with_small_kernels[i]))
            return (tile_shape){rows, TILE_OUTPUTS / rows, (n_in + n_part - 1) / n_part};
    return (tile_shape){TASK_ROWS, TASK_COLS, n_in};
}

void ifkv_cpu_blas_init(void) {
    openblas_set_num_threads(1);
}

void ifkv_cpu_product_nt(int64_t m, int64_t n, int64_t k, const float *a, int64_t lda,
                         const float *b, int64_t ldb, float beta, float *c, int64_t ldc) {
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (blasint)m, (blasint)n, (blasint)k, 1.0f,
                a, (blasint)lda, b, (blasint)ldb, beta, c, (blasint)ldc);
}

void ifkv_cpu_product_nn(int64_t m, int64_t n, int64_t k, const float *a, int64_t lda,
                         const float *b, int64_t ldb, float beta, float *c, int64_t ldc) {
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (blasint)m, (blasint)n, (blasint)k, 1.0f,
                a, (blasint)lda, b, (blasint)ldb, beta, c, (blasint)ldc);
}

static int64_t min_of(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static void matmul_few_rows(int n_thread, const ifkv_view *x, const ifkv_view *w, float beta,
                            const ifkv_view *out) {
    const int64_t n_out = out->n_col, n_task = (n_out + FEW_COLS - 1) / FEW_COLS;
    const float *weights = w->data, *in = x->data;
    float *to = out->data;
#pragma omp parallel for num_threads(n_thread)                                                     \
    schedule(static) if (ifkv_cpu_is_large(n_out * x->n_col))
    for (int64_t task = 0; task < n_task; task++) {
        const int64_t col = task * FEW_COLS, n = min_of(FEW_COLS, n_out - col);
        for (int64_t row = 0; row < x->n_row; row++)
            cblas_sgemv(CblasRowMajor, CblasNoTrans, (blasint)n, (blasint)x->n_col, 1.0f,
                        weights + col * w->stride, (blasint)w->stride, in + row * x->stride, 1,
                        beta, to + row * out->stride + col, 1);
    }
}

static void multiply_task(const tile_shape *tile, int64_t n_row, int64_t n_out, int64_t n_in,
                          const float *x, int64_t x_stride, const float *w, int64_t w_stride,
                          float beta, float *out, int64_t out_stride) {
    for (int64_t row = 0; row < n_row; row += tile->rows)
        for (int64_t col = 0; col < n_out; col += tile->cols)
            for (int64_t in = 0; in < n_in; in += tile->depth)
                ifkv_cpu_product_nt(min_of(tile->rows, n_row - row),
                                    min_of(tile->cols, n_out - col), min_of(tile->depth, n_in - in),
                                    x + row * x_stride + in, x_stride, w + col * w_stride + in,
                                    w_stride, in ? 1.0f : beta, out + row * out_stride + col,
                                    out_stride);
}

static void matmul_many_rows(int n_thread, const ifkv_view *x, const ifkv_view *w, float beta,
                             const ifkv_view *out) {
    const int64_t n_row = out->n_row, n_out = out->n_col, n_in = x->n_col;
    const int64_t row_tasks = (n_row + TASK_ROWS - 1) / TASK_ROWS,
                  col_tasks = (n_out + TASK_COLS - 1) / TASK_COLS;
    const tile_shape tile = tile_for(n_row, n_in);
    const float *weights = w->data, *in = x->data;
    float *to = out->data;
#pragma omp parallel for num_threads(n_thread)                                                     \
    schedule(dynamic, 1) if (ifkv_cpu_is_large(n_row * n_out * n_in / 16))
    for (int64_t task = 0; task < row_tasks * col_tasks; task++) {
        const int64_t row = task / col_tasks * TASK_ROWS, col = task % col_tasks * TASK_COLS;
        multiply_task(&tile, min_of(TASK_ROWS, n_row - row), min_of(TASK_COLS, n_out - col), n_in,
                      in + row * x->stride, x->stride, weights + col * w->stride, w->stride, beta,
                      to + row * out->stride + col, out->stride);
    }
}

ifkv_status ifkv_cpu_matmul(ifkv_backend *backend, const ifkv_view *x, const ifkv_view *w,
                            bool add_to_out, const ifkv_view *out) {
    const int64_t n_row = out->n_row, n_out = out->n_col, n_in = x->n_col;
    IFKV_TRY(ifkv_view_check("matmul", "x", x, IFKV_DTYPE_F32, n_row, n_in));
    IFKV_TRY(ifkv_view_check("matmul", "w", w, IFKV_DTYPE_F32, n_out, n_in));
    IFKV_TRY(ifkv_view_check("matmul", "out", out, IFKV_DTYPE_F32, n_row, n_out));
    IFKV_REQUIRE(
        n_in >= 1 && x->stride <= INT_MAX && w->stride <= INT_MAX && out->stride <= INT_MAX,
        IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
        "matmul: got width %lld and strides %lld, %lld, %lld, expected 1 to %d", (long long)n_in,
        (long long)x->stride, (long long)w->stride, (long long)out->stride, INT_MAX);
    const float beta = add_to_out ? 1.0f : 0.0f;
    if (n_row <= FEW_ROWS)
        matmul_few_rows(backend->n_thread, x, w, beta, out);
    else
        matmul_many_rows(backend->n_thread, x, w, beta, out);
    return IFKV_OK;
}
