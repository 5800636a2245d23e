/* Third launch of refit: every row x that was not fitted, from `first` on, moves by shift + W' x, x
 * as it was before rotation.
 *
 * A warp owns 16 rows of one head at a time, W in shared memory.  Turned back, rows are operands of
 * mma.sync where they are: a step of 16 takes eight pairs, whose halves a lane both has.  Of x and
 * of W, each a sum high + low, low * low is left out: products err by 2^-15 at most, which is a
 * hundredth of how the result is rounded.  Without angles x is bfloat16 and has no low part.
 *
 * For one K or V of Qwen3-14B (8 heads of 128) of 32K rows: 134 MB and, three bfloat16 products for
 * one, 26 GFLOP, which on sm_90 take about as long.  Three blocks fit a multiprocessor there. */
#include "cuda_check.h"
#include "launch.cuh"
#include "piece.cuh"
#include "ptx.cuh"
#include "refit.cuh"

namespace {

constexpr int MOVE_WARPS = 4, MOVE_THREADS = MOVE_WARPS * IFKV_WARP_LANES, MOVE_ROWS = 16;
constexpr int MOVE_BLOCKS = 3; // on a multiprocessor: 3 x 64 KiB of 227

/* Both parts of W by columns, [d_head, 16 * TILES]; 16-byte chunks of row r at place c ^ (r % 8).
 * Chunks are in the order of the steps: eight columns of the lower half of x, then their partners.
 */
template <int TILES> struct MoveMemory {
    static constexpr int PITCH = 2 * TILES * IFKV_WIDE;
    __nv_bfloat16 map[2][PITCH * PITCH];
};
static_assert(sizeof(MoveMemory<8>) <= 99 * 1024,
              "what every device from compute capability 8.0 has");

template <int TILES>
__device__ __forceinline__ __nv_bfloat16 *chunk_at(MoveMemory<TILES> &shared, int part, int row,
                                                   int chunk) {
    return shared.map[part] + row * shared.PITCH + (chunk ^ (row & 7)) * IFKV_WIDE;
}

template <int TILES>
__device__ void load_map(const refit_args &args, const __nv_bfloat16 *map,
                         MoveMemory<TILES> &shared) {
    const int d = args.d_head, n_chunk = d / IFKV_WIDE, n_low = n_chunk / 2;
    for (int i = static_cast<int>(threadIdx.x); i < 2 * d * n_chunk; i += MOVE_THREADS) {
        const int chunk = i % n_chunk, row = i / n_chunk % d, part = i / n_chunk / d;
        const int place = chunk < n_low ? 2 * chunk : 2 * (chunk - n_low) + 1;
        ptx_cp_async_16(chunk_at(shared, part, row, place), map + i * IFKV_WIDE);
    }
    ptx_cp_async_commit();
    ptx_cp_async_wait<0>();
    __syncthreads();
}

/* Whether a row stays: it was fitted, or lies behind the last. */
__device__ bool stays(const refit_args &args, int64_t row) {
    int64_t low = 0, high = args.n_fit; // the first fitted row at or above is in [low, high]
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (args.row[middle] < row)
            low = middle + 1;
        else
            high = middle;
    }
    return row >= args.n_row || (low < args.n_fit && args.row[low] == row);
}

/* Where a lane's part of 16 rows of a head lies: rows r and r + 8, columns c and c + 1 of each
 * eight, and their partners half a head above.  Words are in the order of an operand of mma. */
struct lane_rows {
    __nv_bfloat16 *x[2];
    const float *angle[2]; // null: no rotation, or the row stays
    bool stays[2];
};

__device__ lane_rows rows_of_lane(const refit_args &args, int head, int64_t first) {
    const unsigned stay =
        __ballot_sync(IFKV_ALL_LANES, stays(args, first + lane_index() % MOVE_ROWS));
    lane_rows rows;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int r = lane_index() / 4 + 8 * h;
        rows.stays[h] = stay >> r & 1;
        rows.x[h] = args.x + (first + r) * args.x_stride +
                    static_cast<int64_t>(head) * args.d_head + lane_index() % 4 * 2;
        rows.angle[h] = args.cos_sin && !rows.stays[h]
                            ? args.cos_sin + (first + r) * args.angle_stride + lane_index() % 4 * 2
                            : nullptr;
    }
    return rows;
}

__device__ __forceinline__ float2 load_two(const float *from) {
    return *reinterpret_cast<const float2 *>(from);
}

/* Words of eight pairs from `pair` on; zeros of a row that stays. */
__device__ void load_words(const lane_rows &rows, int half, int pair, uint32_t (&word)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++)
        word[i] = rows.stays[i % 2]
                      ? 0
                      : *reinterpret_cast<const uint32_t *>(rows.x[i % 2] + pair + i / 2 * half);
}

/* a, b = two values of the lower and of the upper half, turned by the angles, or back. */
__device__ __forceinline__ void turn(const float *angle, int half, int pair, float direction,
                                     float (&a)[2], float (&b)[2]) {
    if (!angle) return;
    const float2 cosines = load_two(angle + pair), sines = load_two(angle + half + pair);
    const float cosine[2] = {cosines.x, cosines.y},
                sine[2] = {direction * sines.x, direction * sines.y};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float low = a[i], high = b[i];
        a[i] = low * cosine[i] - high * sine[i];
        b[i] = high * cosine[i] + low * sine[i];
    }
}

/* high + low = value but for 2^-17 of it. */
__device__ __forceinline__ void split(const float (&value)[2], uint32_t &high, uint32_t &low) {
    high = pack_bf16(value[0], value[1]);
    low = pack_bf16(value[0] - bf16_low(high), value[1] - bf16_high(high));
}

/* Words of x, turned back, in two parts. */
__device__ void split_words(const lane_rows &rows, int half, int pair, const uint32_t (&word)[4],
                            uint32_t (&high)[4], uint32_t (&low)[4]) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float a[2] = {bf16_low(word[h]), bf16_high(word[h])},
              b[2] = {bf16_low(word[2 + h]), bf16_high(word[2 + h])};
        turn(rows.angle[h], half, pair, -1, a, b);
        split(a, high[h], low[h]);
        split(b, high[2 + h], low[2 + h]);
    }
}

/* change += W' x over the eight pairs of step t. */
template <int TILES>
__device__ void multiply(const refit_args &args, MoveMemory<TILES> &shared, int t,
                         const uint32_t (&high)[4], const uint32_t (&low)[4],
                         float (&change)[2][TILES][4]) {
    const int half = args.d_head / 2, lane = lane_index();
    const int map_row = lane / 16 * half + lane % 8, chunk = 2 * t + lane / 8 % 2;
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        if (j * IFKV_WIDE >= half) break;
        uint32_t b[4];
        ptx_ldmatrix_x4(b, chunk_at(shared, 0, map_row + j * IFKV_WIDE, chunk));
        ptx_mma_m16n8k16(change[0][j], high, b[0], b[1]);
        ptx_mma_m16n8k16(change[1][j], high, b[2], b[3]);
        if (args.cos_sin) { // else low is zero
            ptx_mma_m16n8k16(change[0][j], low, b[0], b[1]);
            ptx_mma_m16n8k16(change[1][j], low, b[2], b[3]);
        }
        ptx_ldmatrix_x4(b, chunk_at(shared, 1, map_row + j * IFKV_WIDE, chunk));
        ptx_mma_m16n8k16(change[0][j], high, b[0], b[1]);
        ptx_mma_m16n8k16(change[1][j], high, b[2], b[3]);
    }
}

/* x += shift + change, turned, of eight pairs. */
__device__ void store_words(const lane_rows &rows, const float *shift, int half, int pair,
                            const uint32_t (&word)[4], const float (&low)[4],
                            const float (&high)[4]) {
    const float2 shift_low = load_two(shift + pair), shift_high = load_two(shift + half + pair);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if (rows.stays[h]) continue;
        float a[2] = {shift_low.x + low[2 * h], shift_low.y + low[2 * h + 1]},
              b[2] = {shift_high.x + high[2 * h], shift_high.y + high[2 * h + 1]};
        turn(rows.angle[h], half, pair, 1, a, b);
        *reinterpret_cast<uint32_t *>(rows.x[h] + pair) =
            pack_bf16(bf16_low(word[h]) + a[0], bf16_high(word[h]) + a[1]);
        *reinterpret_cast<uint32_t *>(rows.x[h] + half + pair) =
            pack_bf16(bf16_low(word[2 + h]) + b[0], bf16_high(word[2 + h]) + b[1]);
    }
}

/* x is read twice: kept, it would cost the registers of the third block. */
template <int TILES>
__device__ void move_tile(const refit_args &args, MoveMemory<TILES> &shared, int head,
                          const float *shift, int64_t first) {
    const int half = args.d_head / 2;
    const lane_rows rows = rows_of_lane(args, head, first);
    float change[2][TILES][4] = {};
    uint32_t word[4], high[4], low[4];
#pragma unroll 1
    for (int t = 0; t * IFKV_WIDE < half; t++) {
        load_words(rows, half, t * IFKV_WIDE, word);
        split_words(rows, half, t * IFKV_WIDE, word, high, low);
        multiply<TILES>(args, shared, t, high, low, change);
    }
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        if (t * IFKV_WIDE >= half) break;
        load_words(rows, half, t * IFKV_WIDE, word);
        store_words(rows, shift + lane_index() % 4 * 2, half, t * IFKV_WIDE, word, change[0][t],
                    change[1][t]);
    }
}

template <int TILES>
__global__ void __launch_bounds__(MOVE_THREADS, MOVE_BLOCKS) move_rows(refit_args args) {
    MoveMemory<TILES> &shared = ifkv_shared<MoveMemory<TILES>>();
    const int head = static_cast<int>(blockIdx.y);
    const head_scratch scratch = scratch_of(args, head);
    if (*args.fault != IFKV_CUDA_FAULT_NONE) return; // nothing was fitted
    load_map(args, scratch.map, shared);
    const int64_t step = static_cast<int64_t>(gridDim.x) * MOVE_WARPS * MOVE_ROWS;
    for (int64_t first = args.first +
                         (static_cast<int64_t>(blockIdx.x) * MOVE_WARPS + warp_index()) * MOVE_ROWS;
         first < args.n_row; first += step)
        move_tile<TILES>(args, shared, head, scratch.shift, first);
}

} // namespace

ifkv_status ifkv_cuda_refit_move(const ifkv_cuda_context *context, const ifkv_refit_args *args) {
    const int64_t n_block = ceil_div(args->x.n_row - args->first, int64_t{MOVE_WARPS * MOVE_ROWS}),
                  at_once = ceil_div(int64_t{MOVE_BLOCKS} * context->n_sm, int64_t{args->n_head});
    if (n_block <= 0) return IFKV_OK;
    const dim3 grid(static_cast<unsigned>(n_block < at_once ? n_block : at_once),
                    static_cast<unsigned>(args->n_head));
    const bool is_narrow = args->d_head <= 64;
    return IFKV_CUDA(ifkv_launch(is_narrow ? move_rows<4> : move_rows<8>, grid, dim3(MOVE_THREADS),
                                 is_narrow ? sizeof(MoveMemory<4>) : sizeof(MoveMemory<8>),
                                 context->stream, device_args(context, args)));
}
