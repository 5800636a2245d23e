/* How much the question looks at every key: probabilities A = exp(scale q.k - lse) reduced over the
 * question rows and heads (algorithm 1.4), without ever storing A.
 *
 * A block owns KEYS keys and walks through all question rows, ROWS at a time, and through all
 * heads; a warp owns 16 of the rows.  S = Q K^T by mma.sync, A in registers, summed there over
 * heads.  After the last head the form is applied and rows are added up: a lane's two, lanes,
 * warps, then, in float64, the tiles of rows.  So a key's score depends on its own row of K and on
 * the question alone, not on the other keys of its tile, and chunks may lie in any tile.  The next
 * head's Q, and the next K/V head's K, arrive by cp.async meanwhile.  Bound by exponentials: one
 * for 2 d_head multiplications. */
#include "common.cuh"
#include "cuda_check.h"
#include "kernels.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace {

constexpr int KEYS = 64, ROWS = 64;
constexpr int WARPS = ROWS / 16, THREADS = WARPS * IFKV_WARP_LANES;
constexpr int MAX_D_HEAD = 128;
constexpr int CHUNK = 8; // bfloat16 in 16 bytes

/* Tiles are [rows, pitch], the 16-byte chunks of row r at place c ^ (r % 8): eight rows of one
 * column then lie in different banks. */
struct SharedMemory {
    __nv_bfloat16 q[2][ROWS * MAX_D_HEAD];
    __nv_bfloat16 k[2][KEYS * MAX_D_HEAD];
    float rows_sum[WARPS][KEYS];
};
static_assert(sizeof(SharedMemory) <= 99 * 1024,
              "what every device from compute capability 8.0 has");

struct score_args {
    const __nv_bfloat16 *q, *k;
    const float *lse;
    float *score;
    int64_t q_stride, k_stride, lse_stride, n_row, n_key;
    int n_head, group, d_head;
    ifkv_score_form form;
    float scale_log2; // scale * log2(e)
    float weight;
};

__device__ __forceinline__ int pitch_of(const score_args &args) {
    return args.d_head <= 64 ? 64 : 128;
}

__device__ __forceinline__ __nv_bfloat16 *chunk_at(__nv_bfloat16 *tile, int pitch, int row,
                                                   int chunk) {
    return tile + row * pitch + (chunk ^ (row & 7)) * CHUNK;
}

/* Start copying rows [first, first + 64) of one head; rows from n on become zeros. */
__device__ void load_tile(const score_args &args, __nv_bfloat16 *tile, const __nv_bfloat16 *from,
                          int64_t stride, int64_t first, int64_t n) {
    const int n_chunk = args.d_head / CHUNK, pitch = pitch_of(args);
    for (int i = static_cast<int>(threadIdx.x); i < 64 * n_chunk; i += THREADS) {
        const int row = i / n_chunk, chunk = i % n_chunk;
        const bool is_in = first + row < n;
        const __nv_bfloat16 *source = from + (is_in ? first + row : 0) * stride + chunk * CHUNK;
        ptx_cp_async_16_zfill(chunk_at(tile, pitch, row, chunk), source, is_in ? 16 : 0);
    }
}

/* Position in the walk: heads inside, tiles of rows outside. */
struct step {
    int64_t row; // first of the tile
    int head;
    int q_stage, k_stage;
};

__device__ __forceinline__ step next_step(const score_args &args, step s) {
    s.q_stage ^= 1;
    if (++s.head == args.n_head) {
        s.head = 0;
        s.row += ROWS;
    }
    if (s.head % args.group == 0) s.k_stage ^= 1;
    return s;
}

__device__ void load_step(const score_args &args, SharedMemory &shared, const step &s,
                          int64_t key) {
    if (s.row < args.n_row) {
        load_tile(args, shared.q[s.q_stage], args.q + static_cast<int64_t>(s.head) * args.d_head,
                  args.q_stride, s.row, args.n_row);
        if (s.head % args.group == 0)
            load_tile(args, shared.k[s.k_stage],
                      args.k + static_cast<int64_t>(s.head / args.group) * args.d_head,
                      args.k_stride, key, args.n_key);
    }
    ptx_cp_async_commit();
}

/* s [8 tiles of 8 keys][4] = q k^T of this warp's 16 rows. */
__device__ void multiply(const score_args &args, __nv_bfloat16 *q, __nv_bfloat16 *k,
                         float (&s)[KEYS / 8][4]) {
    const int pitch = pitch_of(args), lane = lane_index();
    const int q_row = warp_index() * 16 + lane % 16, k_row = lane / 16 * 8 + lane % 8;
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[j][i] = 0;
    for (int chunk = 0; chunk < args.d_head / CHUNK; chunk += 2) {
        uint32_t a[4];
        ptx_ldmatrix_x4(a, chunk_at(q, pitch, q_row, chunk + lane / 16));
#pragma unroll
        for (int j = 0; j < KEYS / 8; j += 2) {
            uint32_t b[4];
            ptx_ldmatrix_x4(b, chunk_at(k, pitch, j * 8 + k_row, chunk + lane / 8 % 2));
            ptx_mma_m16n8k16(s[j], a, b[0], b[1]);
            ptx_mma_m16n8k16(s[j + 1], a, b[2], b[3]);
        }
    }
}

/* lse of a row in powers of two; a row that is not there looks at nothing. */
__device__ __forceinline__ float shift_of(const score_args &args, int64_t row, int head) {
    constexpr float LOG2_E = 1.44269504f;
    return row < args.n_row ? args.lse[row * args.lse_stride + head] * LOG2_E : INFINITY;
}

/* heads += A or A^2 of one head. */
__device__ void add_head(const score_args &args, const step &at, const float (&s)[KEYS / 8][4],
                         float (&heads)[KEYS / 8][4]) {
    const int64_t row = at.row + warp_index() * 16 + lane_index() / 4;
    const float shift[2] = {shift_of(args, row, at.head), shift_of(args, row + 8, at.head)};
    const bool is_squared = args.form == IFKV_SCORE_L2H;
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float a = ptx_exp2(fmaf(s[j][i], args.scale_log2, -shift[i / 2]));
            heads[j][i] += is_squared ? a * a : a;
        }
}

/* Sum over the 16 rows of each warp of what the form makes of a row, into shared memory; clears
 * heads. */
__device__ void add_rows(const score_args &args, SharedMemory &shared,
                         float (&heads)[KEYS / 8][4]) {
    const bool is_mean = args.form == IFKV_SCORE_L2 || args.form == IFKV_SCORE_L1;
    const float per_head = is_mean ? 1.0f / static_cast<float>(args.n_head) : 1.0f;
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
        for (int col = 0; col < 2; col++) {
            const float upper = heads[j][col] * per_head, lower = heads[j][2 + col] * per_head;
            float sum = args.form == IFKV_SCORE_L2 ? upper * upper + lower * lower : upper + lower;
#pragma unroll
            for (int offset = 4; offset < IFKV_WARP_LANES; offset *= 2)
                sum += __shfl_xor_sync(IFKV_ALL_LANES, sum, offset);
            if (lane_index() < 4)
                shared.rows_sum[warp_index()][j * 8 + lane_index() * 2 + col] = sum;
            heads[j][col] = heads[j][2 + col] = 0;
        }
}

__global__ void __launch_bounds__(THREADS) score_keys(score_args args) {
    SharedMemory &shared = ifkv_shared<SharedMemory>();
    const int64_t key = static_cast<int64_t>(blockIdx.x) * KEYS, mine = key + threadIdx.x;
    const bool is_owner = threadIdx.x < KEYS && mine < args.n_key; // of one key's sum
    float heads[KEYS / 8][4] = {};
    double sum = 0;
    step now = {0, 0, 0, 0};
    load_step(args, shared, now, key);
    while (now.row < args.n_row) {
        const step next = next_step(args, now);
        load_step(args, shared, next, key);
        ptx_cp_async_wait<1>(); // all but the next step's
        __syncthreads();
        float s[KEYS / 8][4];
        multiply(args, shared.q[now.q_stage], shared.k[now.k_stage], s);
        add_head(args, now, s, heads);
        if (next.head == 0) add_rows(args, shared, heads);
        __syncthreads(); // before this step's tiles are overwritten; rows_sum is complete
        if (next.head == 0 && is_owner)
            for (int warp = 0; warp < WARPS; warp++)
                sum += static_cast<double>(shared.rows_sum[warp][threadIdx.x]);
        now = next;
    }
    if (!is_owner) return;
    const bool is_root = args.form == IFKV_SCORE_L2 || args.form == IFKV_SCORE_L2H;
    args.score[mine] += static_cast<float>(args.weight * (is_root ? sqrt(sum) : sum));
}

ifkv_status check_score(const ifkv_score_args *args) {
    const int64_t n_row = args->q.n_row, n_key = args->k.n_row;
    IFKV_REQUIRE(args->n_kv_head >= 1 && args->n_head % args->n_kv_head == 0 &&
                     args->d_head % 16 == 0 && args->d_head >= 16 && args->d_head <= MAX_D_HEAD,
                 IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "score: got %d heads on %d of width %d, expected a multiple of 16 up to %d",
                 args->n_head, args->n_kv_head, args->d_head, MAX_D_HEAD);
    IFKV_TRY(ifkv_view_check("score", "q", &args->q, IFKV_DTYPE_BF16, n_row,
                             static_cast<int64_t>(args->n_head) * args->d_head));
    IFKV_TRY(ifkv_view_check("score", "lse", &args->lse, IFKV_DTYPE_F32, n_row, args->n_head));
    IFKV_TRY(ifkv_view_check("score", "k", &args->k, IFKV_DTYPE_BF16, n_key,
                             static_cast<int64_t>(args->n_kv_head) * args->d_head));
    const uintptr_t all =
        reinterpret_cast<uintptr_t>(args->q.data) | reinterpret_cast<uintptr_t>(args->k.data) |
        static_cast<uintptr_t>(2 * args->q.stride) | static_cast<uintptr_t>(2 * args->k.stride);
    IFKV_REQUIRE(all % 16 == 0, IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "score: got rows of q or k that do not begin on 16 bytes");
    IFKV_REQUIRE(args->n_block >= 0 && args->block[0] == 0 && args->block[args->n_block] == n_key,
                 IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "score: %lld blocks cover [%lld, %lld) of %lld keys",
                 static_cast<long long>(args->n_block), static_cast<long long>(args->block[0]),
                 static_cast<long long>(args->block[args->n_block]), static_cast<long long>(n_key));
    return IFKV_OK;
}

} // namespace

extern "C" ifkv_status ifkv_cuda_score(const ifkv_cuda_context *context,
                                       const ifkv_score_args *args) {
    IFKV_TRY(check_score(args));
    const int64_t n_key = args->k.n_row;
    if (n_key == 0) return IFKV_OK;
    const score_args score = {
        static_cast<const __nv_bfloat16 *>(args->q.data),
        static_cast<const __nv_bfloat16 *>(args->k.data),
        static_cast<const float *>(args->lse.data),
        args->score,
        args->q.stride,
        args->k.stride,
        args->lse.stride,
        args->q.n_row,
        n_key,
        args->n_head,
        args->n_head / args->n_kv_head,
        args->d_head,
        args->form,
        static_cast<float>(static_cast<double>(args->scale) * 1.4426950408889634),
        args->weight};
    return IFKV_CUDA(ifkv_launch(score_keys,
                                 dim3(static_cast<unsigned>(ceil_div(n_key, int64_t{KEYS}))),
                                 dim3(THREADS), sizeof(SharedMemory), context->stream, score));
}
