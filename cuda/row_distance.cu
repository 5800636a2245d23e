/* out[i] = sum over columns of (a[i] - b[i])^2.
 *
 * A warp owns a row.  Differences and sums are float64: nearly equal rows are told apart, and a
 * distance is one rounding from the exact value.  Sums run over a lane's columns, then lanes, in
 * one order.  Bound by bytes: 4 an element. */
#include "common.cuh"
#include "cuda_check.h"
#include "kernels.h"
#include "launch.cuh"
#include "piece.cuh"

namespace {

constexpr int THREADS = 256, WARPS = THREADS / IFKV_WARP_LANES;

struct distance_args {
    const __nv_bfloat16 *a, *b;
    float *out;
    int64_t a_stride, b_stride, n_row, n_col;
};

template <int WIDTH> __global__ void __launch_bounds__(THREADS) measure_rows(distance_args args) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + warp_index();
    if (row >= args.n_row) return;
    double sum = 0;
    for (int64_t col = static_cast<int64_t>(lane_index()) * WIDTH; col < args.n_col;
         col += IFKV_WARP_LANES * WIDTH) {
        float a[WIDTH], b[WIDTH];
        load_piece<WIDTH>(args.a + row * args.a_stride + col, a);
        load_piece<WIDTH>(args.b + row * args.b_stride + col, b);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            const double difference = static_cast<double>(a[i]) - static_cast<double>(b[i]);
            sum = fma(difference, difference, sum);
        }
    }
    sum = warp_sum(sum);
    if (lane_index() == 0) args.out[row] = static_cast<float>(sum);
}

} // namespace

extern "C" ifkv_status ifkv_cuda_row_distance(const ifkv_cuda_context *context, const ifkv_view *a,
                                              const ifkv_view *b, float *out) {
    const int64_t n_row = a->n_row, n_col = a->n_col;
    IFKV_TRY(ifkv_view_check("row_distance", "a", a, IFKV_DTYPE_BF16, n_row, n_col));
    IFKV_TRY(ifkv_view_check("row_distance", "b", b, IFKV_DTYPE_BF16, n_row, n_col));
    if (n_row == 0) return IFKV_OK;
    const distance_args args = {static_cast<const __nv_bfloat16 *>(a->data),
                                static_cast<const __nv_bfloat16 *>(b->data),
                                out,
                                a->stride,
                                b->stride,
                                n_row,
                                n_col};
    return IFKV_CUDA(
        ifkv_launch(is_wide(n_col, a, b, nullptr) ? measure_rows<IFKV_WIDE> : measure_rows<1>,
                    dim3(static_cast<unsigned>(ceil_div(n_row, int64_t{WARPS}))), dim3(THREADS), 0,
                    context->stream, args));
}
