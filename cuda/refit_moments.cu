/* First launch of refit: per head, sums of x, y, x x' and x y' over the fitted rows, x a stale row
 * as it was before rotation and y its change.
 *
 * A block owns a tile of 64 x 64 of sum x x' or of sum x y' of one head over one of
 * IFKV_REFIT_PIECE pieces of the fitted rows, or the sums of 64 columns; a thread 4 x 4 of it, in
 * float64, rows in their order.  Columns of a tile are 32 rotation pairs, so that a block turns its
 * rows back by itself.  x and y are counted from those of the first fitted row: that row is near
 * the mean, so that the means may be taken out of the sums afterwards, and sums of equal rows are
 * exact zeros.
 *
 * Bound by float64: 2.2 GFLOP for one K or V of Qwen3-14B (8 heads of 128) at 4.9K fitted rows. */
#include "cuda_check.h"
#include "launch.cuh"
#include "piece.cuh"
#include "refit.cuh"

namespace {

constexpr int PAIRS = 32, COLUMNS = 2 * PAIRS; // of a tile of moments
constexpr int ROWS = 32;                       // that a tile takes at a time
constexpr int SUM_THREADS = 256;               // 4 x 4 elements each; a piece of a row each

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

} // namespace

ifkv_status ifkv_cuda_refit_moments(const ifkv_cuda_context *context, const ifkv_refit_args *args) {
    const unsigned n_tile = static_cast<unsigned>(tiles_of(args->d_head));
    return IFKV_CUDA(ifkv_launch(
        add_moments,
        dim3(2 * n_tile * n_tile + n_tile, IFKV_REFIT_PIECE, static_cast<unsigned>(args->n_head)),
        dim3(SUM_THREADS), sizeof(MomentMemory), context->stream, device_args(context, args)));
}
