/* A stream of numbers, each a function of its place alone (ifkv_draw of backend.h), as bfloat16.
 *
 * A thread owns every n_thread-th number.  Product and sum are rounded one by one, as on the host,
 * so that the weights of a seed are the same everywhere.  Bound by bytes: 2 a number. */
#include "common.cuh"
#include "cuda_check.h"
#include "kernels.h"
#include "launch.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int BLOCKS_PER_SM = 8; // all the threads an SM holds

__device__ __forceinline__ uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

__device__ __forceinline__ float bell(uint64_t z) {
    const int sum = static_cast<int>(z & 0xffff) + static_cast<int>(z >> 16 & 0xffff) +
                    static_cast<int>(z >> 32 & 0xffff) + static_cast<int>(z >> 48);
    return static_cast<float>(sum - 2 * 65535);
}

__global__ void __launch_bounds__(THREADS)
    draw_numbers(ifkv_draw draw, int64_t n, __nv_bfloat16 *to) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * THREADS;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; i < n; i += step) {
        const float x = bell(mix(draw.key + static_cast<uint64_t>(i + 1) * 0x9e3779b97f4a7c15u));
        to[i] = float_to_bf16(__fadd_rn(__fmul_rn(x, draw.scale), draw.centre));
    }
}

} // namespace

extern "C" ifkv_status ifkv_cuda_draw(const ifkv_cuda_context *context, const ifkv_draw *draw,
                                      int64_t n, void *to) {
    if (n <= 0) return IFKV_OK;
    const int64_t needed = ceil_div(n, int64_t{THREADS}),
                  most = static_cast<int64_t>(context->n_sm) * BLOCKS_PER_SM;
    return IFKV_CUDA(ifkv_launch(draw_numbers, dim3(static_cast<unsigned>(min(needed, most))),
                                 dim3(THREADS), 0, context->stream, *draw, n,
                                 static_cast<__nv_bfloat16 *>(to)));
}
