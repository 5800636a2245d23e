/* Second launch of refit: per head, W = (sum x x' + lambda)^-1 sum x y' of the moments, less their
 * means, lambda = ridge * trace / d_head, and the shift that goes with it.
 *
 * A block owns 32 columns of one head's W.  It adds the pieces up in their order, takes the means
 * out and eliminates in shared memory: Cholesky without roots.  The blocks of a head repeat the
 * elimination, whose d_head steps are one after the other anyway.  W leaves as two bfloat16 whose
 * sum is within 2^-17 of it, the shift as float32.  Bound by its barriers, two times d_head in a
 * row. */
#include "cuda_check.h"
#include "launch.cuh"
#include "refit.cuh"

namespace {

constexpr int SOLVE_COLUMNS = IFKV_WARP_LANES;       // a lane's each
constexpr int SOLVE_THREADS = 512, SOLVE_WARPS = 16; // half as many rows a step as eight warps

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

} // namespace

ifkv_status ifkv_cuda_refit_solve(const ifkv_cuda_context *context, const ifkv_refit_args *args) {
    const int n_block = ceil_div(args->d_head, SOLVE_COLUMNS);
    return IFKV_CUDA(ifkv_launch(
        solve_map, dim3(static_cast<unsigned>(n_block), static_cast<unsigned>(args->n_head)),
        dim3(SOLVE_THREADS), sizeof(SolveMemory), context->stream, device_args(context, args)));
}
