/* What the three launches of refit and the host code that puts them one behind the other agree on:
 * the call as kernels get it, and what a head's scratch holds from one launch to the next.
 *
 * Private to refit_*.cu; the back end calls ifkv_cuda_refit of kernels.h, which alone checks
 * operands (refit.cu).  Knows no kernel. */
#ifndef IFKV_CUDA_REFIT_CUH
#define IFKV_CUDA_REFIT_CUH

#include "common.cuh"
#include "kernels.h"

/* Each enqueues its one kernel, for at least one fitted row.  What a launch reads of scratch the
 * one before it wrote. */
ifkv_status ifkv_cuda_refit_moments(const ifkv_cuda_context *context, const ifkv_refit_args *args);
ifkv_status ifkv_cuda_refit_solve(const ifkv_cuda_context *context, const ifkv_refit_args *args);
ifkv_status ifkv_cuda_refit_move(const ifkv_cuda_context *context, const ifkv_refit_args *args);

namespace {

constexpr int MAX_D_HEAD = 128;

struct refit_args {
    const __nv_bfloat16 *stale, *fresh;
    __nv_bfloat16 *x;
    const float *cos_sin; // null: rows are not rotated
    const int64_t *row;
    double *scratch;
    int32_t *fault;
    int64_t stale_stride, fresh_stride, x_stride, angle_stride;
    int64_t scratch_stride; // from head to head
    int64_t n_fit, n_row, first;
    double ridge;
    int d_head;
};

inline refit_args device_args(const ifkv_cuda_context *context, const ifkv_refit_args *args) {
    return {static_cast<const __nv_bfloat16 *>(args->stale.data),
            static_cast<const __nv_bfloat16 *>(args->fresh.data),
            static_cast<__nv_bfloat16 *>(args->x.data),
            static_cast<const float *>(args->cos_sin.data),
            args->row,
            args->scratch,
            context->fault,
            args->stale.stride,
            args->fresh.stride,
            args->x.stride,
            args->cos_sin.stride,
            ifkv_refit_scratch(args->d_head),
            args->stale.n_row,
            args->x.n_row,
            args->first,
            args->ridge,
            args->d_head};
}

/* What a head's piece of scratch holds, d = d_head; x, then y, or x x', then x y'. */
struct head_scratch {
    double *moment;     // [IFKV_REFIT_PIECE, 2, d, d], counted from the origin
    double *sum;        // [IFKV_REFIT_PIECE, 2, d], likewise
    double *origin;     // [2, d] of the first fitted row
    __nv_bfloat16 *map; // [2, d, d] column c of W is row c: high part, then low part
    float *shift;       // [d]
};

__device__ __forceinline__ head_scratch scratch_of(const refit_args &args, int head) {
    const int64_t d = args.d_head;
    head_scratch it;
    it.moment = args.scratch + head * args.scratch_stride;
    it.sum = it.moment + IFKV_REFIT_PIECE * 2 * d * d;
    it.origin = it.sum + IFKV_REFIT_PIECE * 2 * d;
    it.map = reinterpret_cast<__nv_bfloat16 *>(it.origin + 2 * d);
    it.shift = reinterpret_cast<float *>(it.map + 2 * d * d);
    return it;
}

} // namespace

#endif
