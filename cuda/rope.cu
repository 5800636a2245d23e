/* RMS norm of every head (where the model has one), then rotation of the pairs (i, i + d_head/2):
 * low' = low cos - high sin, high' = high cos + low sin.  In place, one pass.
 *
 * A block owns a row.  Wide: eight (d_head 128) or four lanes (64) own a head, each eight pairs,
 * and the sum of squares goes over these lanes by shuffles.  Plain, for any even width and
 * alignment: a warp owns a head.  Sums run over a lane's columns, then lanes, in one order.  Bound
 * by bytes: 4 an element, the angles of a row from the first-level cache for all heads but the
 * first. */
#include "common.cuh"
#include "cuda_check.h"
#include "kernels.h"
#include "launch.cuh"
#include "piece.cuh"

namespace {

constexpr int MAX_THREADS = 512;

struct rope_args {
    __nv_bfloat16 *x;
    const __nv_bfloat16 *weight; // null: no norm
    const float *cos_sin;
    int64_t x_stride, angle_stride;
    int n_head, d_head;
    float eps;
};

__device__ __forceinline__ float inverse_norm(float sum, const rope_args &args) {
    return 1.0f / sqrtf(sum / static_cast<float>(args.d_head) + args.eps);
}

/* Eight pairs of one head: the columns from `col` on, and those d_head/2 above. */
template <int D_HEAD>
__device__ __forceinline__ void rotate_piece(const rope_args &args, __nv_bfloat16 *head,
                                             const float *angle, int col) {
    constexpr int HALF = D_HEAD / 2, LANES = HALF / IFKV_WIDE;
    float low[IFKV_WIDE], high[IFKV_WIDE], cosine[IFKV_WIDE], sine[IFKV_WIDE];
    load_piece<IFKV_WIDE>(head + col, low);
    load_piece<IFKV_WIDE>(head + HALF + col, high);
    if (args.weight) {
        float weight_low[IFKV_WIDE], weight_high[IFKV_WIDE], sum = 0;
#pragma unroll
        for (int i = 0; i < IFKV_WIDE; i++) sum = fmaf(low[i], low[i], sum);
#pragma unroll
        for (int i = 0; i < IFKV_WIDE; i++) sum = fmaf(high[i], high[i], sum);
        // the lanes of this head: others of the warp may have none
        const unsigned mask = ((1u << LANES) - 1) << lane_index() / LANES * LANES;
#pragma unroll
        for (int offset = LANES / 2; offset > 0; offset /= 2)
            sum += __shfl_xor_sync(mask, sum, offset);
        const float inverse = inverse_norm(sum, args);
        load_piece<IFKV_WIDE>(args.weight + col, weight_low);
        load_piece<IFKV_WIDE>(args.weight + HALF + col, weight_high);
#pragma unroll
        for (int i = 0; i < IFKV_WIDE; i++) low[i] *= inverse * weight_low[i];
#pragma unroll
        for (int i = 0; i < IFKV_WIDE; i++) high[i] *= inverse * weight_high[i];
    }
    load_floats(angle + col, cosine);
    load_floats(angle + HALF + col, sine);
#pragma unroll
    for (int i = 0; i < IFKV_WIDE; i++) {
        const float a = low[i], b = high[i];
        low[i] = a * cosine[i] - b * sine[i];
        high[i] = b * cosine[i] + a * sine[i];
    }
    store_piece<IFKV_WIDE>(head + col, low);
    store_piece<IFKV_WIDE>(head + HALF + col, high);
}

template <int D_HEAD> __global__ void __launch_bounds__(MAX_THREADS) rotate_wide(rope_args args) {
    constexpr int LANES = D_HEAD / 2 / IFKV_WIDE;
    __nv_bfloat16 *row = args.x + blockIdx.x * args.x_stride;
    const float *angle = args.cos_sin + blockIdx.x * args.angle_stride;
    for (int piece = static_cast<int>(threadIdx.x); piece < args.n_head * LANES;
         piece += static_cast<int>(blockDim.x))
        rotate_piece<D_HEAD>(args, row + static_cast<int64_t>(piece / LANES) * D_HEAD, angle,
                             piece % LANES * IFKV_WIDE);
}

__global__ void __launch_bounds__(MAX_THREADS) rotate_plain(rope_args args) {
    __nv_bfloat16 *row = args.x + blockIdx.x * args.x_stride;
    const float *angle = args.cos_sin + blockIdx.x * args.angle_stride;
    const int half = args.d_head / 2, n_warp = static_cast<int>(blockDim.x) / IFKV_WARP_LANES;
    for (int h = warp_index(); h < args.n_head; h += n_warp) {
        __nv_bfloat16 *head = row + static_cast<int64_t>(h) * args.d_head;
        float sum = 0;
        for (int i = lane_index(); args.weight && i < args.d_head; i += IFKV_WARP_LANES)
            sum = fmaf(bf16_to_float(head[i]), bf16_to_float(head[i]), sum);
        const float inverse = args.weight ? inverse_norm(warp_sum(sum), args) : 1.0f;
        for (int i = lane_index(); i < half; i += IFKV_WARP_LANES) {
            float a = bf16_to_float(head[i]), b = bf16_to_float(head[half + i]);
            if (args.weight) {
                a *= inverse * bf16_to_float(args.weight[i]);
                b *= inverse * bf16_to_float(args.weight[half + i]);
            }
            head[i] = float_to_bf16(a * angle[i] - b * angle[half + i]);
            head[half + i] = float_to_bf16(b * angle[i] + a * angle[half + i]);
        }
    }
}

} // namespace

extern "C" ifkv_status ifkv_cuda_rope(const ifkv_cuda_context *context, const ifkv_view *x,
                                      int n_head, const ifkv_view *weight, double eps,
                                      const ifkv_view *cos_sin) {
    const int64_t n_row = x->n_row, d_head = cos_sin->n_col;
    IFKV_REQUIRE(n_head >= 1 && d_head >= 2 && d_head % 2 == 0 && d_head <= INT32_MAX,
                 IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "rope: got %d heads of width %lld, expected an even width", n_head,
                 static_cast<long long>(d_head));
    IFKV_TRY(ifkv_view_check("rope", "x", x, IFKV_DTYPE_BF16, n_row, n_head * d_head));
    IFKV_TRY(ifkv_view_check("rope", "cos_sin", cos_sin, IFKV_DTYPE_F32, n_row, d_head));
    if (weight) IFKV_TRY(ifkv_view_check("rope", "weight", weight, IFKV_DTYPE_BF16, 1, d_head));
    if (n_row == 0) return IFKV_OK;
    const rope_args args = {static_cast<__nv_bfloat16 *>(x->data),
                            weight ? static_cast<const __nv_bfloat16 *>(weight->data) : nullptr,
                            static_cast<const float *>(cos_sin->data),
                            x->stride,
                            cos_sin->stride,
                            n_head,
                            static_cast<int>(d_head),
                            static_cast<float>(eps)};
    const bool wide = (d_head == 64 || d_head == 128) && is_wide(d_head, x, cos_sin, weight);
    const int64_t n_thread =
        wide ? n_head * d_head / 2 / IFKV_WIDE : static_cast<int64_t>(n_head) * IFKV_WARP_LANES;
    return IFKV_CUDA(ifkv_launch(!wide          ? rotate_plain
                                 : d_head == 64 ? rotate_wide<64>
                                                : rotate_wide<128>,
                                 dim3(static_cast<unsigned>(n_row)),
                                 dim3(threads_for(n_thread, MAX_THREADS)), 0, context->stream,
                                 args));
}
