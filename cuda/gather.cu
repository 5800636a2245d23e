/* Rows copied by a list: to[i] = from[row[i]] (gather), to[row[i]] = from[i] (scatter), bit by bit
 * whatever their type.
 *
 * A warp owns a row and moves it in the widest pieces, 2 to 16 bytes, that pointers, strides and
 * row length allow.  A row number outside its matrix raises the fault word and moves nothing. Bound
 * by bytes: twice those of the rows. */
#include "common.cuh"
#include "cuda_check.h"
#include "kernels.h"
#include "launch.cuh"

namespace {

constexpr int THREADS = 256, WARPS = THREADS / IFKV_WARP_LANES;

struct move_args {
    const char *from;
    char *to;
    const int64_t *row;             // null: row[i] = i
    int64_t from_stride, to_stride; // bytes
    int64_t n, n_piece;             // rows to move, pieces of each
    int64_t n_listed;               // rows of the matrix that `row` points into
    int32_t *fault;
    int32_t fault_code;
    bool is_scatter;
};

template <typename Piece> __global__ void __launch_bounds__(THREADS) move_rows(move_args args) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * WARPS + warp_index();
    if (i >= args.n) return;
    const int64_t listed = args.row ? args.row[i] : i;
    if (listed < 0 || listed >= args.n_listed) {
        if (lane_index() == 0) *args.fault = args.fault_code;
        return;
    }
    const int64_t source = args.is_scatter ? i : listed, target = args.is_scatter ? listed : i;
    const Piece *from = reinterpret_cast<const Piece *>(args.from + source * args.from_stride);
    Piece *to = reinterpret_cast<Piece *>(args.to + target * args.to_stride);
    for (int64_t piece = lane_index(); piece < args.n_piece; piece += IFKV_WARP_LANES)
        to[piece] = from[piece];
}

ifkv_status move(const ifkv_cuda_context *context, const char *op, const ifkv_view *from,
                 const int64_t *row, const ifkv_view *to, bool is_scatter) {
    const size_t element = ifkv_dtype_bytes(to->dtype);
    const int64_t n = is_scatter ? from->n_row : to->n_row;
    const int64_t n_listed = is_scatter ? to->n_row : from->n_row;
    IFKV_TRY(ifkv_view_check(op, "from", from, to->dtype, from->n_row, to->n_col));
    IFKV_TRY(ifkv_view_check(op, "to", to, to->dtype, to->n_row, to->n_col));
    IFKV_REQUIRE(row || n <= n_listed, IFKV_ERR_INTERNAL, IFKV_E_SHAPE, "%s: %lld rows of %lld", op,
                 static_cast<long long>(n), static_cast<long long>(n_listed));
    if (n == 0 || to->n_col == 0) return IFKV_OK;
    const size_t bytes = static_cast<size_t>(to->n_col) * element;
    move_args args = {static_cast<const char *>(from->data),
                      static_cast<char *>(to->data),
                      row,
                      from->stride * static_cast<int64_t>(element),
                      to->stride * static_cast<int64_t>(element),
                      n,
                      0,
                      n_listed,
                      context->fault,
                      is_scatter ? IFKV_CUDA_FAULT_SCATTER : IFKV_CUDA_FAULT_GATHER,
                      is_scatter};
    const uintptr_t all =
        reinterpret_cast<uintptr_t>(from->data) | reinterpret_cast<uintptr_t>(to->data) |
        static_cast<uintptr_t>(args.from_stride) | static_cast<uintptr_t>(args.to_stride) | bytes;
    static const struct {
        uintptr_t piece;
        void (*kernel)(move_args);
    } widths[] = {{16, move_rows<uint4>},
                  {8, move_rows<uint2>},
                  {4, move_rows<uint32_t>},
                  {2, move_rows<uint16_t>}};
    for (const auto &width : widths) {
        if (all % width.piece) continue;
        args.n_piece = static_cast<int64_t>(bytes / width.piece);
        return IFKV_CUDA(ifkv_launch(width.kernel,
                                     dim3(static_cast<unsigned>(ceil_div(n, int64_t{WARPS}))),
                                     dim3(THREADS), 0, context->stream, args));
    }
    return IFKV_FAIL(IFKV_ERR_INTERNAL, IFKV_E_SHAPE, "%s: got an odd address or stride", op);
}

} // namespace

extern "C" ifkv_status ifkv_cuda_gather(const ifkv_cuda_context *context, const ifkv_view *from,
                                        const int64_t *row, const ifkv_view *to) {
    return move(context, "gather", from, row, to, false);
}

extern "C" ifkv_status ifkv_cuda_scatter(const ifkv_cuda_context *context, const ifkv_view *from,
                                         const int64_t *row, const ifkv_view *to) {
    return move(context, "scatter", from, row, to, true);
}
