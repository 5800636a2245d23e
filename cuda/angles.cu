/* cos_sin [n_row, d_head] = cosines, then sines, of position * frequency: float64, rounded once.
 *
 * A thread owns a pair of a row.  Made on the host, the device would wait for them and for their
 * upload at the start of every pass.  Bound by bytes: 4 d_head a row written. */
#include "common.cuh"
#include "cuda_check.h"
#include "kernels.h"
#include "launch.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int MAX_PAIRS = 64; // of d_head 128, the widest that prepare takes

struct angle_args {
    const int64_t *position;
    float *to;
    int64_t stride, n; // n = rows times pairs
    int n_pair;
    double frequency[MAX_PAIRS];
};

__global__ void __launch_bounds__(THREADS) make_angles(const __grid_constant__ angle_args args) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= args.n) return;
    const int64_t row = i / args.n_pair, pair = i % args.n_pair;
    double sine, cosine;
    sincos(static_cast<double>(args.position[row]) * args.frequency[pair], &sine, &cosine);
    float *to = args.to + row * args.stride + pair;
    to[0] = static_cast<float>(cosine);
    to[args.n_pair] = static_cast<float>(sine);
}

} // namespace

extern "C" ifkv_status ifkv_cuda_angles(const ifkv_cuda_context *context, const double *frequency,
                                        const int64_t *position, const ifkv_view *cos_sin) {
    const int64_t n_row = cos_sin->n_row, n_pair = cos_sin->n_col / 2;
    IFKV_TRY(ifkv_view_check("angles", "cos_sin", cos_sin, IFKV_DTYPE_F32, n_row, 2 * n_pair));
    IFKV_REQUIRE(n_pair <= MAX_PAIRS, IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "angles: got %lld pairs, expected at most %d", static_cast<long long>(n_pair),
                 MAX_PAIRS);
    if (n_row == 0 || n_pair == 0) return IFKV_OK;
    angle_args args = {position,
                       static_cast<float *>(cos_sin->data),
                       cos_sin->stride,
                       n_row * n_pair,
                       static_cast<int>(n_pair),
                       {}};
    for (int64_t i = 0; i < n_pair; i++) args.frequency[i] = frequency[i];
    return IFKV_CUDA(ifkv_launch(make_angles,
                                 dim3(static_cast<unsigned>(ceil_div(args.n, int64_t{THREADS}))),
                                 dim3(THREADS), 0, context->stream, args));
}
