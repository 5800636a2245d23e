/* Rows that were not recomputed follow those that were: per head, W = (sum x x' + lambda)^-1 sum x
 * y' of a stale row x and its change y, both less their means, lambda = ridge * trace / d_head;
 * then every other row x moves by shift + W' x (backend.h, refit).  x is a row as it was before
 * rotation.
 *
 * Three launches.  add_moments: a block owns a tile of 64 x 64 of sum x x' or of sum x y' of one
 * head over one of IFKV_REFIT_PIECE pieces of the fitted rows, or the sums of 64 columns; a thread
 * 4 x 4 of it, in float64, rows in their order.  Columns of a tile are 32 rotation pairs, so that a
 * block turns its rows back by itself.  x and y are counted from those of the first fitted row:
 * that row is near the mean, so that the means may be taken out of the sums afterwards, and sums of
 * equal rows are exact zeros.
 * solve_map: a block owns 32 columns of one head's W.  It adds the pieces up in their order, takes
 * the means out and eliminates in shared memory: Cholesky without roots.  The blocks of a head
 * repeat the elimination, whose d_head steps are one after the other anyway.  W leaves as two
 * bfloat16 whose sum is within 2^-17 of it, the shift as float32.
 * move_rows: a warp owns 16 rows of one head at a time, W in shared memory.  Turned back, rows are
 * operands of mma.sync where they are: a step of 16 takes eight pairs, whose halves a lane both
 * has.  x = high + low, W = high + low, and low * low is left out: products err by 2^-15 at most,
 * which is a hundredth of how the result is rounded.  Without angles x is bfloat16 and has no low
 * part.
 *
 * For one K or V of Qwen3-14B (8 heads of 128) at 4.9K fitted of 32K rows: moments 2.2 GFLOP in
 * float64, which bounds them; solving 256 barriers in a row; moving 134 MB and, three bfloat16
 * products for one, 26 GFLOP, which on sm_90 take about as long.  Three blocks of move_rows fit a
 * multiprocessor there.  d_head is a multiple of 16 up to 128; rows begin on 16 bytes. */
#include "common.cuh"
#include "cuda_check.h"
#include "kernels.h"
#include "launch.cuh"
#include "piece.cuh"
#include "ptx.cuh"

namespace {

constexpr int MAX_D_HEAD = 128;
constexpr int PAIRS = 32, COLUMNS = 2 * PAIRS;       // of a tile of moments
constexpr int ROWS = 32;                             // that a tile takes at a time
constexpr int SUM_THREADS = 256;                     // 4 x 4 elements each; a piece of a row each
constexpr int SOLVE_COLUMNS = IFKV_WARP_LANES;       // a lane's each
constexpr int SOLVE_THREADS = 512, SOLVE_WARPS = 16; // half as many rows a step as eight warps
constexpr int MOVE_WARPS = 4, MOVE_THREADS = MOVE_WARPS * IFKV_WARP_LANES, MOVE_ROWS = 16;
constexpr int MOVE_BLOCKS = 3; // on a multiprocessor: 3 x 64 KiB of 227

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

/* ---- moments ---- */

enum moment_kind { GRAM, PRODUCT, SUMS };

/* What a block adds up: columns of tile `left` of x times those of tile `right` of x or y. */
struct moment_job {
    moment_kind kind;
    int left, right, head, piece;
};

/* Rows are padded by 16 bytes: eight rows of one column then lie in different banks. */
struct MomentMemory {
    double side[2][ROWS][COLUMNS + 2];
    double origin[2][COLUMNS];
};
static_assert(sizeof(MomentMemory) <= 48 * 1024, "more must be asked for");

__host__ __device__ constexpr int tiles_of(int d_head) {
    return ceil_div(d_head / 2, PAIRS);
}

__device__ moment_job job_of(const refit_args &args) {
    const int n = tiles_of(args.d_head), i = static_cast<int>(blockIdx.x);
    moment_job job = {SUMS, i - 2 * n * n, i - 2 * n * n, static_cast<int>(blockIdx.z),
                      static_cast<int>(blockIdx.y)};
    if (i >= 2 * n * n) return job;
    job.kind = i < n * n ? GRAM : PRODUCT;
    job.left = i / n % n;
    job.right = i % n;
    return job;
}

/* The head's column that is column c of a tile, or -1. */
__device__ __forceinline__ int column_of(const refit_args &args, int tile, int c) {
    const int pair = tile * PAIRS + c % PAIRS, half = args.d_head / 2;
    return pair >= half ? -1 : pair + c / PAIRS * half;
}

/* Columns that a thread has of the 64 in one direction: neighbours are read in one access, and 16
 * threads together read 256 bytes. */
__device__ __forceinline__ int owned_column(int thread, int i) {
    return i / 2 * PAIRS + thread * 2 + i % 2;
}

/* Eight pairs of a row of a head, turned back by the row's angles where there are any. */
__device__ void load_pairs(const __nv_bfloat16 *head, const float *angle, int half, int pair,
                           float (&low)[IFKV_WIDE], float (&high)[IFKV_WIDE]) {
    load_piece<IFKV_WIDE>(head + pair, low);
    load_piece<IFKV_WIDE>(head + half + pair, high);
    if (!angle) return;
    float cosine[IFKV_WIDE], sine[IFKV_WIDE];
    load_floats(angle + pair, cosine);
    load_floats(angle + half + pair, sine);
#pragma unroll
    for (int i = 0; i < IFKV_WIDE; i++) {
        const float a = low[i], b = high[i];
        low[i] = a * cosine[i] + b * sine[i];
        high[i] = b * cosine[i] - a * sine[i];
    }
}

/* False, and the fault word is raised, where fitted row i does not lie in x behind row i - 1. */
__device__ bool is_row(const refit_args &args, int64_t i) {
    const int64_t row = args.row[i];
    if (row >= 0 && row < args.n_row && (i == 0 || args.row[i - 1] < row)) return true;
    *args.fault = IFKV_CUDA_FAULT_REFIT;
    return false;
}

/* Eight pairs of x or y of fitted row i; false where there are none. */
__device__ bool load_fitted(const refit_args &args, int head, bool is_change, int64_t i, int pair,
                            double (&low)[IFKV_WIDE], double (&high)[IFKV_WIDE]) {
    const int half = args.d_head / 2;
    const int64_t at = static_cast<int64_t>(head) * args.d_head;
    if (pair >= half || !is_row(args, i)) return false;
    const float *angle = args.cos_sin ? args.cos_sin + args.row[i] * args.angle_stride : nullptr;
    float stale[2][IFKV_WIDE], fresh[2][IFKV_WIDE] = {};
    load_pairs(args.stale + i * args.stale_stride + at, angle, half, pair, stale[0], stale[1]);
    if (is_change)
        load_pairs(args.fresh + i * args.fresh_stride + at, angle, half, pair, fresh[0], fresh[1]);
#pragma unroll
    for (int j = 0; j < IFKV_WIDE; j++) {
        const double x[2] = {static_cast<double>(stale[0][j]), static_cast<double>(stale[1][j])};
        low[j] = is_change ? static_cast<double>(fresh[0][j]) - x[0] : x[0];
        high[j] = is_change ? static_cast<double>(fresh[1][j]) - x[1] : x[1];
    }
    return true;
}

/* A thread's piece of a side: eight pairs of one row. */
struct side_piece {
    int side, pair, row; // pair of the tile
};

__device__ __forceinline__ side_piece piece_of_thread() {
    const int thread = static_cast<int>(threadIdx.x);
    return {thread / (SUM_THREADS / 2), thread / ROWS % (PAIRS / IFKV_WIDE) * IFKV_WIDE,
            thread % ROWS};
}
static_assert(SUM_THREADS == 2 * ROWS * PAIRS / IFKV_WIDE, "a piece a thread");

__device__ bool load_piece_of(const refit_args &args, const moment_job &job, const side_piece &it,
                              int64_t i, double (&low)[IFKV_WIDE], double (&high)[IFKV_WIDE]) {
    const int tile = it.side == 0 ? job.left : job.right;
    return load_fitted(args, job.head, it.side == 1 && job.kind != GRAM, i, tile * PAIRS + it.pair,
                       low, high);
}

__device__ void load_origin(const refit_args &args, const moment_job &job, MomentMemory &shared) {
    const side_piece it = piece_of_thread();
    double low[IFKV_WIDE] = {}, high[IFKV_WIDE] = {};
    if (it.row != 0) return;
    load_piece_of(args, job, it, 0, low, high);
#pragma unroll
    for (int j = 0; j < IFKV_WIDE; j++) {
        shared.origin[it.side][it.pair + j] = low[j];
        shared.origin[it.side][PAIRS + it.pair + j] = high[j];
    }
}

/* Both sides of fitted rows [first, first + ROWS), counted from the origin; zeros from `end` on. */
__device__ void load_sides(const refit_args &args, const moment_job &job, MomentMemory &shared,
                           int64_t first, int64_t end) {
    const side_piece it = piece_of_thread();
    const int64_t i = first + it.row;
    double low[IFKV_WIDE] = {}, high[IFKV_WIDE] = {};
    const bool is_in = i < end && load_piece_of(args, job, it, i, low, high);
    double *to = shared.side[it.side][it.row] + it.pair;
    const double *origin = shared.origin[it.side] + it.pair;
#pragma unroll
    for (int j = 0; j < IFKV_WIDE; j++) {
        to[j] = is_in ? low[j] - origin[j] : 0;
        to[PAIRS + j] = is_in ? high[j] - origin[PAIRS + j] : 0;
    }
}

__device__ void add_outer(const MomentMemory &shared, double (&sum)[4][4]) {
    const int left = static_cast<int>(threadIdx.x) / 16, right = static_cast<int>(threadIdx.x) % 16;
    for (int row = 0; row < ROWS; row++) {
        double a[4], b[4];
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = shared.side[0][row][owned_column(left, i)];
#pragma unroll
        for (int i = 0; i < 4; i++) b[i] = shared.side[1][row][owned_column(right, i)];
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) sum[i][j] = fma(a[i], b[j], sum[i][j]);
    }
}

/* The first 128 threads: a column of a side each. */
__device__ void add_columns(const MomentMemory &shared, double &sum) {
    const int c = static_cast<int>(threadIdx.x);
    if (c >= 2 * COLUMNS) return;
    for (int row = 0; row < ROWS; row++) sum += shared.side[c / COLUMNS][row][c % COLUMNS];
}

/* A tile of the gram matrix off its diagonal stands for the one across as well. */
__device__ void store_outer(const refit_args &args, const moment_job &job,
                            const double (&sum)[4][4]) {
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t d = args.d_head;
    double *to =
        scratch_of(args, job.head).moment + (job.piece * 2 + (job.kind == PRODUCT)) * d * d;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int a = column_of(args, job.left, owned_column(thread / 16, i)),
                      b = column_of(args, job.right, owned_column(thread % 16, j));
            if (a < 0 || b < 0) continue;
            to[a * d + b] = sum[i][j];
            if (job.kind == GRAM && job.left != job.right) to[b * d + a] = sum[i][j];
        }
}

__device__ void store_columns(const refit_args &args, const moment_job &job,
                              const MomentMemory &shared, double sum) {
    const int thread = static_cast<int>(threadIdx.x), side = thread / COLUMNS;
    const int64_t d = args.d_head;
    const head_scratch to = scratch_of(args, job.head);
    if (side >= 2) return;
    const int c = column_of(args, job.left, thread % COLUMNS);
    if (c < 0) return;
    to.sum[(job.piece * 2 + side) * d + c] = sum;
    if (job.piece == 0) to.origin[side * d + c] = shared.origin[side][thread % COLUMNS];
}

__global__ void __launch_bounds__(SUM_THREADS, 2) add_moments(refit_args args) {
    MomentMemory &shared = ifkv_shared<MomentMemory>();
    const moment_job job = job_of(args);
    if (job.kind == GRAM && job.left > job.right) return;
    const int64_t begin = args.n_fit * job.piece / IFKV_REFIT_PIECE,
                  end = args.n_fit * (job.piece + 1) / IFKV_REFIT_PIECE;
    double outer[4][4] = {}, column = 0;
    load_origin(args, job, shared);
    __syncthreads();
    for (int64_t first = begin; first < end; first += ROWS) {
        load_sides(args, job, shared, first, end);
        __syncthreads();
        if (job.kind == SUMS)
            add_columns(shared, column);
        else
            add_outer(shared, outer);
        __syncthreads(); // before the next rows
    }
    if (job.kind == SUMS)
        store_columns(args, job, shared, column);
    else
        store_outer(args, job, outer);
}

/* ---- solution ---- */

/* Of the gram matrix the upper triangle, row behind row.  Rows of the product are padded, so that
 * a column, too, lies in different banks. */
struct SolveMemory {
    double upper[MAX_D_HEAD * (MAX_D_HEAD + 1) / 2];
    double product[MAX_D_HEAD][SOLVE_COLUMNS + 1];
    double mean_x[MAX_D_HEAD], mean_y[SOLVE_COLUMNS]; // from the origin
};
static_assert(sizeof(SolveMemory) <= 99 * 1024,
              "what every device from compute capability 8.0 has");

/* Row i, to be indexed by columns from i on. */
__device__ __forceinline__ double *upper_row(SolveMemory &shared, int d, int i) {
    return shared.upper + i * d - i * (i + 1) / 2;
}

/* Sum of n numbers that lie `stride` apart: one of each piece. */
__device__ __forceinline__ double add_pieces(const double *from, int64_t stride) {
    double sum = from[0];
#pragma unroll
    for (int piece = 1; piece < IFKV_REFIT_PIECE; piece++) sum += from[piece * stride];
    return sum;
}

__device__ void load_means(const refit_args &args, const head_scratch &from, SolveMemory &shared,
                           int first_column) {
    const int i = static_cast<int>(threadIdx.x), d = args.d_head, c = first_column + i;
    const double n = static_cast<double>(args.n_fit);
    if (i < d) shared.mean_x[i] = add_pieces(from.sum + i, 2 * d) / n;
    if (i < SOLVE_COLUMNS) shared.mean_y[i] = c < d ? add_pieces(from.sum + d + c, 2 * d) / n : 0;
}

/* sum x x' - n mean mean', and this block's columns of the product likewise. */
__device__ void load_system(const refit_args &args, const head_scratch &from, SolveMemory &shared,
                            int first_column) {
    const int d = args.d_head, lane = lane_index(), c = first_column + lane;
    const int64_t stride = 2 * static_cast<int64_t>(d) * d;
    for (int i = warp_index(); i < d; i += SOLVE_WARPS) {
        const double n_mean = static_cast<double>(args.n_fit) * shared.mean_x[i];
        const double *gram = from.moment + i * d, *product = gram + d * d;
        for (int j = i + lane; j < d; j += IFKV_WARP_LANES)
            upper_row(shared, d, i)[j] = add_pieces(gram + j, stride) - n_mean * shared.mean_x[j];
        shared.product[i][lane] =
            c < d ? add_pieces(product + c, stride) - n_mean * shared.mean_y[lane] : 0;
    }
}

__device__ double trace_of(SolveMemory &shared, int d) {
    double sum = 0;
    for (int i = lane_index(); i < d; i += IFKV_WARP_LANES) sum += upper_row(shared, d, i)[i];
    return warp_sum(sum);
}

/* Make the system triangular: step k takes row k out of the rows below. */
__device__ void eliminate(SolveMemory &shared, int d) {
    constexpr int SEGMENTS = MAX_D_HEAD / IFKV_WARP_LANES; // a lane's columns of the triangle
    const int lane = lane_index();
    for (int k = 0; k + 1 < d; k++) {
        const double *pivot_row = upper_row(shared, d, k);
        const double inverse = 1 / pivot_row[k], right = shared.product[k][lane];
        double pivot[SEGMENTS];
#pragma unroll
        for (int s = 0; s < SEGMENTS; s++) {
            const int j = lane + s * IFKV_WARP_LANES;
            pivot[s] = j > k && j < d ? pivot_row[j] : 0;
        }
        for (int i = k + 1 + warp_index(); i < d; i += SOLVE_WARPS) {
            double *row = upper_row(shared, d, i);
            const double factor = pivot_row[i] * inverse;
#pragma unroll
            for (int s = 0; s < SEGMENTS; s++) {
                const int j = lane + s * IFKV_WARP_LANES;
                if (j >= i && j < d) row[j] = fma(-factor, pivot[s], row[j]);
            }
            shared.product[i][lane] = fma(-factor, right, shared.product[i][lane]);
        }
        __syncthreads(); // the next row is whole
    }
}

/* product = upper^-1 product, from the last row up. */
__device__ void substitute(SolveMemory &shared, int d) {
    const int lane = lane_index();
    for (int k = d; k-- > 0;) {
        const double value = shared.product[k][lane] / upper_row(shared, d, k)[k];
        for (int i = warp_index(); i < k; i += SOLVE_WARPS)
            shared.product[i][lane] =
                fma(-upper_row(shared, d, i)[k], value, shared.product[i][lane]);
        __syncthreads(); // everybody has read row k, and row k - 1 is whole
        if (warp_index() == 0) shared.product[k][lane] = value;
    }
    __syncthreads();
}

/* Columns of W, in two parts, and their shift: mean of y - W' mean of x.  A warp a column. */
__device__ void store_map(const refit_args &args, const head_scratch &to, SolveMemory &shared,
                          int first_column) {
    const int d = args.d_head;
    for (int c = warp_index(); c < SOLVE_COLUMNS && first_column + c < d; c += SOLVE_WARPS) {
        const int column = first_column + c;
        double sum = 0;
        for (int i = lane_index(); i < d; i += IFKV_WARP_LANES) {
            const double w = shared.product[i][c];
            const __nv_bfloat16 high = float_to_bf16(static_cast<float>(w));
            to.map[column * d + i] = high;
            to.map[(d + column) * d + i] =
                float_to_bf16(static_cast<float>(w - static_cast<double>(bf16_to_float(high))));
            sum = fma(to.origin[i] + shared.mean_x[i], w, sum);
        }
        sum = warp_sum(sum);
        if (lane_index() == 0)
            to.shift[column] = static_cast<float>(to.origin[d + column] + shared.mean_y[c] - sum);
    }
}

__global__ void __launch_bounds__(SOLVE_THREADS, 1) solve_map(refit_args args) {
    SolveMemory &shared = ifkv_shared<SolveMemory>();
    const int d = args.d_head, first_column = static_cast<int>(blockIdx.x) * SOLVE_COLUMNS;
    const head_scratch scratch = scratch_of(args, static_cast<int>(blockIdx.y));
    if (*args.fault != IFKV_CUDA_FAULT_NONE) return; // moments lack a row
    load_means(args, scratch, shared, first_column);
    __syncthreads();
    load_system(args, scratch, shared, first_column);
    __syncthreads();
    const double trace = trace_of(shared, d);
    __syncthreads(); // before the diagonal changes
    if (trace > 0) { // else all rows are one: product is 0, and so is W
        for (int i = static_cast<int>(threadIdx.x); i < d; i += SOLVE_THREADS)
            upper_row(shared, d, i)[i] += args.ridge * trace / d;
        __syncthreads();
        eliminate(shared, d);
        substitute(shared, d);
    }
    store_map(args, scratch, shared, first_column);
}

/* ---- the move ---- */

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

/* ---- launches ---- */

ifkv_status check_aligned(const char *what, const ifkv_view *view) {
    IFKV_REQUIRE(!view->data || is_aligned(view), IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "refit: got rows of %s that do not begin on 16 bytes", what);
    return IFKV_OK;
}

ifkv_status check_refit(const ifkv_refit_args *args) {
    const int64_t n_col = static_cast<int64_t>(args->n_head) * args->d_head;
    IFKV_REQUIRE(args->n_head >= 1 && args->d_head % 16 == 0 && args->d_head >= 16 &&
                     args->d_head <= MAX_D_HEAD,
                 IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "refit: got %d heads of width %d, expected a multiple of 16 up to %d",
                 args->n_head, args->d_head, MAX_D_HEAD);
    IFKV_TRY(
        ifkv_view_check("refit", "stale", &args->stale, IFKV_DTYPE_BF16, args->stale.n_row, n_col));
    IFKV_TRY(
        ifkv_view_check("refit", "fresh", &args->fresh, IFKV_DTYPE_BF16, args->stale.n_row, n_col));
    IFKV_TRY(ifkv_view_check("refit", "x", &args->x, IFKV_DTYPE_BF16, args->x.n_row, n_col));
    if (args->cos_sin.data)
        IFKV_TRY(ifkv_view_check("refit", "cos_sin", &args->cos_sin, IFKV_DTYPE_F32, args->x.n_row,
                                 args->d_head));
    IFKV_TRY(check_aligned("stale", &args->stale));
    IFKV_TRY(check_aligned("fresh", &args->fresh));
    IFKV_TRY(check_aligned("x", &args->x));
    IFKV_TRY(check_aligned("cos_sin", &args->cos_sin));
    IFKV_REQUIRE(args->first >= 0, IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "refit: got first row %lld, expected at least 0",
                 static_cast<long long>(args->first));
    IFKV_REQUIRE(reinterpret_cast<uintptr_t>(args->scratch) % 16 == 0, IFKV_ERR_INTERNAL,
                 IFKV_E_SHAPE, "refit: got scratch that does not begin on 16 bytes");
    return IFKV_OK;
}

refit_args device_args(const ifkv_cuda_context *context, const ifkv_refit_args *args) {
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

cudaError_t launch_fit(const ifkv_cuda_context *context, const refit_args &args, int n_head) {
    const unsigned n_tile = static_cast<unsigned>(tiles_of(args.d_head)),
                   heads = static_cast<unsigned>(n_head);
    const cudaError_t error =
        ifkv_launch(add_moments, dim3(2 * n_tile * n_tile + n_tile, IFKV_REFIT_PIECE, heads),
                    dim3(SUM_THREADS), sizeof(MomentMemory), context->stream, args);
    if (error != cudaSuccess) return error;
    return ifkv_launch(solve_map,
                       dim3(static_cast<unsigned>(ceil_div(args.d_head, SOLVE_COLUMNS)), heads),
                       dim3(SOLVE_THREADS), sizeof(SolveMemory), context->stream, args);
}

cudaError_t launch_move(const ifkv_cuda_context *context, const refit_args &args, int n_head) {
    const int64_t n_block = ceil_div(args.n_row - args.first, int64_t{MOVE_WARPS * MOVE_ROWS}),
                  at_once = ceil_div(int64_t{MOVE_BLOCKS} * context->n_sm, int64_t{n_head});
    const dim3 grid(static_cast<unsigned>(n_block < at_once ? n_block : at_once),
                    static_cast<unsigned>(n_head));
    if (n_block <= 0) return cudaSuccess;
    if (args.d_head <= 64)
        return ifkv_launch(move_rows<4>, grid, dim3(MOVE_THREADS), sizeof(MoveMemory<4>),
                           context->stream, args);
    return ifkv_launch(move_rows<8>, grid, dim3(MOVE_THREADS), sizeof(MoveMemory<8>),
                       context->stream, args);
}

} // namespace

extern "C" ifkv_status ifkv_cuda_refit(const ifkv_cuda_context *context,
                                       const ifkv_refit_args *args) {
    IFKV_TRY(check_refit(args));
    if (args->stale.n_row == 0) return IFKV_OK;
    const refit_args refit = device_args(context, args);
    IFKV_TRY(IFKV_CUDA(launch_fit(context, refit, args->n_head)));
    return IFKV_CUDA(launch_move(context, refit, args->n_head));
}
