/* out = x / sqrt(mean(x^2) + eps) * weight, row by row.
 *
 * A block owns a row and a thread every blockDim-th piece of it; the first HELD of them stay in
 * registers between the two passes, so that rows of up to 8192 columns are read once.  The sum of
 * squares runs over a thread's pieces, lanes, then warps, always in this order.  Bound by bytes: 4
 * an element, and the weights from the first-level cache. */
#include "common.cuh"
#include "cuda_check.h"
#include "kernels.h"
#include "launch.cuh"
#include "piece.cuh"

namespace {

constexpr int MAX_THREADS =
    256; // eight blocks an SM, each with up to four loads a thread under way
constexpr int HELD = 4;

struct SharedMemory {
    float warp_sums[IFKV_WARP_LANES];
};

struct norm_args {
    const __nv_bfloat16 *x, *weight;
    __nv_bfloat16 *out;
    int64_t x_stride, out_stride, n_col;
    float eps;
};

template <int WIDTH> __device__ __forceinline__ float sum_squares(const float (&x)[WIDTH]) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < WIDTH; i++) sum = fmaf(x[i], x[i], sum);
    return sum;
}

template <int WIDTH>
__device__ __forceinline__ void store_normed(const norm_args &args, float inverse,
                                             const float (&x)[WIDTH], int64_t col,
                                             __nv_bfloat16 *out) {
    float weight[WIDTH], y[WIDTH];
    load_piece<WIDTH>(args.weight + col, weight);
#pragma unroll
    for (int i = 0; i < WIDTH; i++) y[i] = x[i] * inverse * weight[i];
    store_piece<WIDTH>(out + col, y);
}

template <int WIDTH> __global__ void __launch_bounds__(MAX_THREADS) norm_rows(norm_args args) {
    SharedMemory &shared = ifkv_shared<SharedMemory>();
    const __nv_bfloat16 *x = args.x + blockIdx.x * args.x_stride;
    __nv_bfloat16 *out = args.out + blockIdx.x * args.out_stride;
    const int64_t step = static_cast<int64_t>(blockDim.x) * WIDTH;
    const int64_t first = static_cast<int64_t>(threadIdx.x) * WIDTH, rest = first + HELD * step;
    float held[HELD][WIDTH], again[WIDTH], sum = 0;
#pragma unroll
    for (int i = 0; i < HELD; i++)
        if (first + i * step < args.n_col) load_piece<WIDTH>(x + first + i * step, held[i]);
#pragma unroll
    for (int i = 0; i < HELD; i++)
        if (first + i * step < args.n_col) sum += sum_squares<WIDTH>(held[i]);
    for (int64_t col = rest; col < args.n_col; col += step) {
        load_piece<WIDTH>(x + col, again);
        sum += sum_squares<WIDTH>(again);
    }
    sum = block_sum(sum, shared.warp_sums);
    const float inverse = 1.0f / sqrtf(sum / static_cast<float>(args.n_col) + args.eps);
#pragma unroll
    for (int i = 0; i < HELD; i++)
        if (first + i * step < args.n_col)
            store_normed<WIDTH>(args, inverse, held[i], first + i * step, out);
    for (int64_t col = rest; col < args.n_col; col += step) {
        load_piece<WIDTH>(x + col, again);
        store_normed<WIDTH>(args, inverse, again, col, out);
    }
}

} // namespace

extern "C" ifkv_status ifkv_cuda_rms_norm(const ifkv_cuda_context *context, const ifkv_view *x,
                                          const ifkv_view *weight, double eps,
                                          const ifkv_view *out) {
    const int64_t n_row = x->n_row, n_col = x->n_col;
    IFKV_TRY(ifkv_view_check("rms_norm", "x", x, IFKV_DTYPE_BF16, n_row, n_col));
    IFKV_TRY(ifkv_view_check("rms_norm", "weight", weight, IFKV_DTYPE_BF16, 1, n_col));
    IFKV_TRY(ifkv_view_check("rms_norm", "out", out, IFKV_DTYPE_BF16, n_row, n_col));
    if (n_row == 0 || n_col == 0) return IFKV_OK;
    const norm_args args = {static_cast<const __nv_bfloat16 *>(x->data),
                            static_cast<const __nv_bfloat16 *>(weight->data),
                            static_cast<__nv_bfloat16 *>(out->data),
                            x->stride,
                            out->stride,
                            n_col,
                            static_cast<float>(eps)};
    const bool wide = is_wide(n_col, x, weight, out);
    return IFKV_CUDA(ifkv_launch(wide ? norm_rows<IFKV_WIDE> : norm_rows<1>,
                                 dim3(static_cast<unsigned>(n_row)),
                                 dim3(threads_for(wide ? n_col / IFKV_WIDE : n_col, MAX_THREADS)),
                                 sizeof(SharedMemory), context->stream, args));
}
