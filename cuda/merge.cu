/* Merge of partial attentions over disjoint key sets (algorithm 2.2):
 *
 *   M = max lse_i   w_i = e^(lse_i - M)   out = sum w_i out_i / sum w_i   lse = M + ln sum w_i
 *
 * in float64 and in the order given, rounded once when stored.  A warp owns one head of one row:
 * its lanes know the weights, each adds up COLUMNS columns at a time.  Parts are float32 or
 * float64, mixed at will.  Their list travels as a kernel argument, or, where it is too long for
 * that, in pieces into the workspace.  Bound by bytes: those of the parts. */
#include "common.cuh"
#include "cuda_check.h"
#include "kernels.h"
#include "launch.cuh"

namespace {

constexpr int THREADS = 256, WARPS = THREADS / IFKV_WARP_LANES;
constexpr int COLUMNS = 4;     // a lane's: 32 lanes cover a head of 128
constexpr int LIST_PARTS = 64; // 3 KiB of the 4 KiB that every driver passes as arguments

struct matrix {
    void *data;
    int64_t stride;
    ifkv_dtype dtype;
};

struct part {
    matrix out, lse;
};

struct part_list {
    part item[LIST_PARTS];
};

struct merge_args {
    const part *listed; // null: the list is in the argument
    int n_part, n_head, d_head;
    int64_t n_row;
    matrix out, lse; // data null: not wanted
};

__device__ __forceinline__ double load_value(const matrix &from, int64_t row, int64_t col) {
    const int64_t at = row * from.stride + col;
    return from.dtype == IFKV_DTYPE_F64 ? static_cast<const double *>(from.data)[at]
                                        : static_cast<const float *>(from.data)[at];
}

__device__ __forceinline__ void store_value(const matrix &to, int64_t row, int64_t col,
                                            double value) {
    const int64_t at = row * to.stride + col;
    if (to.dtype == IFKV_DTYPE_F64)
        static_cast<double *>(to.data)[at] = value;
    else if (to.dtype == IFKV_DTYPE_F32)
        static_cast<float *>(to.data)[at] = static_cast<float>(value);
    else
        static_cast<__nv_bfloat16 *>(to.data)[at] = __double2bfloat16(value);
}

struct weights {
    double max, total;
};

/* M and sum w_i of a head. */
__device__ weights weigh(const merge_args &args, const part *parts, int64_t row, int head) {
    weights w = {-INFINITY, 0};
    for (int i = 0; i < args.n_part; i++) {
        const double lse = load_value(parts[i].lse, row, head);
        // a NaN must win too, or it would be dropped as if it were an empty part
        if (lse > w.max || isnan(lse)) w.max = lse;
    }
    for (int i = 0; i < args.n_part; i++) {
        const double lse = load_value(parts[i].lse, row, head);
        if (lse != -INFINITY) w.total += exp(lse - w.max);
    }
    return w;
}

/* sum w_i out_i / sum w_i for a lane's columns from `first` on, 32 apart. */
__device__ void merge_columns(const merge_args &args, const part *parts, int64_t row, int head,
                              const weights &w, int first) {
    double sum[COLUMNS] = {};
    for (int i = 0; i < args.n_part; i++) {
        const double lse = load_value(parts[i].lse, row, head);
        if (lse == -INFINITY) continue;
        const double weight = exp(lse - w.max);
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            const int col = first + c * IFKV_WARP_LANES;
            if (col < args.d_head)
                sum[c] += weight * load_value(parts[i].out, row,
                                              static_cast<int64_t>(head) * args.d_head + col);
        }
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        const int col = first + c * IFKV_WARP_LANES;
        if (col < args.d_head)
            store_value(args.out, row, static_cast<int64_t>(head) * args.d_head + col,
                        w.max == -INFINITY ? 0 : sum[c] / w.total);
    }
}

__global__ void __launch_bounds__(THREADS)
    merge_heads(const __grid_constant__ merge_args args, const __grid_constant__ part_list list) {
    const part *parts = args.listed ? args.listed : list.item;
    const int64_t row = blockIdx.x;
    for (int head = warp_index(); head < args.n_head; head += WARPS) {
        const weights w = weigh(args, parts, row, head);
        if (args.out.data)
            for (int first = lane_index(); first < args.d_head; first += COLUMNS * IFKV_WARP_LANES)
                merge_columns(args, parts, row, head, w, first);
        __syncwarp(); // lse may be that of part 0, which all lanes have read now
        if (args.lse.data && lane_index() == 0)
            store_value(args.lse, row, head, w.max == -INFINITY ? -INFINITY : w.max + log(w.total));
    }
}

/* Put up to LIST_PARTS parts of a long list where all blocks can read it. */
__global__ void __launch_bounds__(LIST_PARTS)
    list_parts(const __grid_constant__ part_list list, part *to, int n) {
    if (static_cast<int>(threadIdx.x) < n) to[threadIdx.x] = list.item[threadIdx.x];
}

matrix matrix_of(const ifkv_view *view) {
    return {view->data, view->stride, view->dtype};
}

part part_of(const ifkv_merge_args *args, int i) {
    part p = {};
    if (args->out.data) p.out = matrix_of(&args->out_part[i]);
    p.lse = matrix_of(&args->lse_part[i]);
    return p;
}

ifkv_status check_part(const char *what, const ifkv_view *view, int64_t n_row, int64_t n_col) {
    const ifkv_dtype dtype = view->dtype == IFKV_DTYPE_F64 ? IFKV_DTYPE_F64 : IFKV_DTYPE_F32;
    return ifkv_view_check("merge", what, view, dtype, n_row, n_col);
}

ifkv_status check_merge(const ifkv_cuda_context *context, const ifkv_merge_args *args,
                        int64_t n_row) {
    const int64_t n_col = static_cast<int64_t>(args->n_head) * args->d_head;
    IFKV_REQUIRE(args->n_head >= 1 && args->d_head >= 1 && args->n_part >= 0, IFKV_ERR_INTERNAL,
                 IFKV_E_SHAPE, "merge: got %d parts of %d heads of width %d", args->n_part,
                 args->n_head, args->d_head);
    for (int i = 0; i < args->n_part; i++) {
        if (args->out.data) IFKV_TRY(check_part("part", &args->out_part[i], n_row, n_col));
        IFKV_TRY(check_part("lse of a part", &args->lse_part[i], n_row, args->n_head));
    }
    if (args->out.data && args->out.dtype == IFKV_DTYPE_BF16)
        IFKV_TRY(ifkv_view_check("merge", "out", &args->out, IFKV_DTYPE_BF16, n_row, n_col));
    else if (args->out.data)
        IFKV_TRY(check_part("out", &args->out, n_row, n_col));
    if (args->lse.data) IFKV_TRY(check_part("lse", &args->lse, n_row, args->n_head));
    IFKV_REQUIRE(args->n_part <= LIST_PARTS ||
                     static_cast<size_t>(args->n_part) * sizeof(part) <= context->workspace_bytes,
                 IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "merge: got %d parts, expected at most %zu, what the workspace holds",
                 args->n_part, context->workspace_bytes / sizeof(part));
    return IFKV_OK;
}

} // namespace

extern "C" ifkv_status ifkv_cuda_merge(const ifkv_cuda_context *context,
                                       const ifkv_merge_args *args) {
    const int64_t n_row = args->out.data ? args->out.n_row : args->lse.n_row;
    IFKV_TRY(check_merge(context, args, n_row));
    if (n_row == 0) return IFKV_OK;
    merge_args merge = {nullptr, args->n_part,          args->n_head,         args->d_head,
                        n_row,   matrix_of(&args->out), matrix_of(&args->lse)};
    part *listed = static_cast<part *>(context->workspace);
    part_list list = {};
    for (int i = 0; i < args->n_part; i++) {
        list.item[i % LIST_PARTS] = part_of(args, i);
        const int n = i % LIST_PARTS + 1;
        if (args->n_part <= LIST_PARTS || (n < LIST_PARTS && i + 1 < args->n_part)) continue;
        merge.listed = listed;
        IFKV_TRY(IFKV_CUDA(ifkv_launch(list_parts, dim3(1), dim3(LIST_PARTS), 0, context->stream,
                                       list, listed + i + 1 - n, n)));
    }
    return IFKV_CUDA(ifkv_launch(merge_heads, dim3(static_cast<unsigned>(n_row)), dim3(THREADS), 0,
                                 context->stream, merge, list));
}
