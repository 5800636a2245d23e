/* out = silu(gate) * up, silu(g) = g / (1 + e^-g); a row of gate_up holds gate, then up.
 *
 * A block owns ROUNDS * THREADS pieces of one row.  Bound by bytes: 6 an output. */
#include "common.cuh"
#include "cuda_check.h"
#include "kernels.h"
#include "launch.cuh"
#include "piece.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int ROUNDS = 2; // four loads a thread and 1024 threads an SM: 64 KiB under way

struct swiglu_args {
    const __nv_bfloat16 *gate_up;
    __nv_bfloat16 *out;
    int64_t in_stride, out_stride, d_ff;
};

template <int WIDTH> __global__ void __launch_bounds__(THREADS) swiglu_rows(swiglu_args args) {
    const __nv_bfloat16 *gate_row = args.gate_up + blockIdx.x * args.in_stride;
    __nv_bfloat16 *out = args.out + blockIdx.x * args.out_stride;
    const int64_t first =
        (static_cast<int64_t>(blockIdx.y) * ROUNDS * THREADS + threadIdx.x) * WIDTH;
    float gate[ROUNDS][WIDTH], up[ROUNDS][WIDTH];
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        const int64_t col = first + i * THREADS * WIDTH;
        if (col >= args.d_ff) continue;
        load_piece<WIDTH>(gate_row + col, gate[i]);
        load_piece<WIDTH>(gate_row + args.d_ff + col, up[i]);
    }
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        const int64_t col = first + i * THREADS * WIDTH;
        if (col >= args.d_ff) continue;
#pragma unroll
        for (int j = 0; j < WIDTH; j++) // e^-g overflows to infinity where silu is 0
            up[i][j] *= gate[i][j] / (1.0f + __expf(-gate[i][j]));
        store_piece<WIDTH>(out + col, up[i]);
    }
}

} // namespace

extern "C" ifkv_status ifkv_cuda_swiglu(const ifkv_cuda_context *context, const ifkv_view *gate_up,
                                        const ifkv_view *out) {
    const int64_t n_row = out->n_row, d_ff = out->n_col;
    IFKV_TRY(ifkv_view_check("swiglu", "gate_up", gate_up, IFKV_DTYPE_BF16, n_row, 2 * d_ff));
    IFKV_TRY(ifkv_view_check("swiglu", "out", out, IFKV_DTYPE_BF16, n_row, d_ff));
    if (n_row == 0 || d_ff == 0) return IFKV_OK;
    const swiglu_args args = {static_cast<const __nv_bfloat16 *>(gate_up->data),
                              static_cast<__nv_bfloat16 *>(out->data), gate_up->stride, out->stride,
                              d_ff};
    const bool wide = is_wide(d_ff, gate_up, out, nullptr);
    const int64_t block = static_cast<int64_t>(ROUNDS) * THREADS * (wide ? IFKV_WIDE : 1);
    const dim3 grid(static_cast<unsigned>(n_row), static_cast<unsigned>(ceil_div(d_ff, block)));
    return IFKV_CUDA(ifkv_launch(wide ? swiglu_rows<IFKV_WIDE> : swiglu_rows<1>, grid,
                                 dim3(THREADS), 0, context->stream, args));
}
