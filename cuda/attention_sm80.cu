/* Attention over spans with mma.sync: any device from sm_80 on, d_head a multiple of 16 up to 128.
 *
 *   S = scale Q K^T   P = exp(S - max)   out = P V / sum P   lse = max + ln sum P
 *
 * A block of four warps works on one piece of the plan (attention_plan.h): a tile of 64 stacked
 * rows, a warp on sixteen of them, over blocks of 64 keys that start at the tile's first key.  Q
 * stays in registers as left operand, K is loaded a block ahead into two buffers, V while S is
 * computed; P never leaves registers.  A tile with rows of several begins is worked on one begin
 * after the other.  Rows of shared memory are padded by 16 bytes: an odd number of 16-byte pieces,
 * so that ldmatrix and cp.async meet no bank twice.
 *
 * Keys past the last one a tile sees are not read but taken for zeros: what lies there may be NaN.
 * A key that some row of the tile sees must be finite in V, or the whole tile's results are NaN.
 *
 * Budget at d_head 128: 52 KB of shared memory and 247 registers, two blocks a multiprocessor of
 * sm_80 or sm_90; bound by reading K and V fragments from shared memory.
 * Source: FlashAttention-2 (arXiv 2307.08691), section 3.1. */
#include "attention.cuh"
#include "cuda_check.h"
#include "launch.cuh"

namespace {

constexpr int TILE_M = IFKV_ATTENTION_SM80_M, BLOCK_KEYS = 64, THREADS = 128;
static_assert(TILE_M == 16 * THREADS / IFKV_WARP_LANES, "a warp has sixteen rows");

template <int d> struct padded_rows { __nv_bfloat16 row[BLOCK_KEYS][d + 8]; };

template <int d> struct shared_memory {
    padded_rows<d> k[2];
    padded_rows<d> v; // and Q on its way to registers
    attention_run run;
    int length[TILE_M]; // keys each row of the run sees
};
static_assert(2 * sizeof(shared_memory<128>) <= 163 * 1024, "two blocks a multiprocessor");

// Start to copy keys [first, first + BLOCK_KEYS) of a head, zeros from n_key on.
template <int d>
__device__ __forceinline__ void load_keys(padded_rows<d> &to, const __nv_bfloat16 *from,
                                          int64_t stride, int first, int n_key) {
    constexpr int row_pieces = d / 8;
#pragma unroll
    for (int i = 0; i < ceil_div(BLOCK_KEYS * row_pieces, THREADS); i++) {
        const int piece = static_cast<int>(threadIdx.x) + i * THREADS;
        if (piece >= BLOCK_KEYS * row_pieces) break;
        const int row = piece / row_pieces, column = piece % row_pieces * 8;
        const bool is_in = first + row < n_key;
        const int64_t at = is_in ? (first + row) * stride + column : 0;
        ptx_cp_async_16_zfill(&to.row[row][column], from + at, is_in ? 16 : 0);
    }
}

// The same for the stacked rows of a run: row r, head g of the group is r * group + g.
template <int d>
__device__ __forceinline__ void load_queries(padded_rows<d> &to, const ifkv_attention_call &call,
                                             const attention_run &run, int kv_head) {
    constexpr int row_pieces = d / 8;
    const int group = call.plan.group;
    const __nv_bfloat16 *from = static_cast<const __nv_bfloat16 *>(call.q) +
                                run.first * call.q_stride +
                                static_cast<int64_t>(kv_head) * group * d;
    for (int piece = static_cast<int>(threadIdx.x); piece < TILE_M * row_pieces; piece += THREADS) {
        const int stacked = piece / row_pieces, column = piece % row_pieces * 8;
        const int row = stacked / group;
        const bool is_in = row < run.n_row;
        const int64_t at = is_in ? row * call.q_stride + stacked % group * d + column : 0;
        ptx_cp_async_16_zfill(&to.row[stacked][column], from + at, is_in ? 16 : 0);
    }
}

template <int d>
__device__ __forceinline__ void read_queries(const padded_rows<d> &from, uint32_t (&q)[d / 16][4]) {
    const int row = 16 * warp_index() + lane_index() % 16, column = lane_index() / 16 * 8;
#pragma unroll
    for (int k = 0; k < d / 16; k++) ptx_ldmatrix_x4(q[k], &from.row[row][16 * k + column]);
}

template <int n>
__device__ __forceinline__ void multiply_8_columns(float (&x)[n], int j, const uint32_t (&a)[4],
                                                   uint32_t b0, uint32_t b1) {
    float part[4] = {x[4 * j], x[4 * j + 1], x[4 * j + 2], x[4 * j + 3]};
    ptx_mma_m16n8k16(part, a, b0, b1);
#pragma unroll
    for (int i = 0; i < 4; i++) x[4 * j + i] = part[i];
}

// s [16, BLOCK_KEYS] = q k^T; sixteen keys and sixteen columns of K per ldmatrix.
template <int d>
__device__ __forceinline__ void multiply_keys(const uint32_t (&q)[d / 16][4],
                                              const padded_rows<d> &keys,
                                              float (&s)[BLOCK_KEYS / 2]) {
    const int lane = lane_index(), row = lane / 16 * 8 + lane % 8, column = lane / 8 % 2 * 8;
#pragma unroll
    for (int i = 0; i < BLOCK_KEYS / 2; i++) s[i] = 0;
#pragma unroll
    for (int k = 0; k < d / 16; k++)
#pragma unroll
        for (int j = 0; j < BLOCK_KEYS / 16; j++) {
            uint32_t b[4];
            ptx_ldmatrix_x4(b, &keys.row[16 * j + row][16 * k + column]);
            multiply_8_columns(s, 2 * j, q[k], b[0], b[1]);
            multiply_8_columns(s, 2 * j + 1, q[k], b[2], b[3]);
        }
}

// o [16, d] += p v.
template <int d>
__device__ __forceinline__ void multiply_values(const uint32_t (&p)[BLOCK_KEYS / 16][4],
                                                const padded_rows<d> &values, float (&o)[d / 2]) {
    const int lane = lane_index(), row = lane % 16, column = lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < BLOCK_KEYS / 16; k++)
#pragma unroll
        for (int j = 0; j < d / 16; j++) {
            uint32_t b[4];
            ptx_ldmatrix_x4_trans(b, &values.row[16 * k + row][16 * j + column]);
            multiply_8_columns(o, 2 * j, p[k], b[0], b[1]);
            multiply_8_columns(o, 2 * j + 1, p[k], b[2], b[3]);
        }
}

// All of one run; shared.run and shared.length are set.
template <int d>
__device__ __forceinline__ void attend_run(const ifkv_attention_call &call,
                                           const ifkv_attention_item &item,
                                           shared_memory<d> &shared) {
    const attention_run run = shared.run;
    const int64_t column = static_cast<int64_t>(item.kv_head) * d;
    const __nv_bfloat16 *k =
        static_cast<const __nv_bfloat16 *>(call.k) + run.first_key * call.k_stride + column;
    const __nv_bfloat16 *v =
        static_cast<const __nv_bfloat16 *>(call.v) + run.first_key * call.v_stride + column;
    const store_place place = place_rows(call, run, item.kv_head, item.part,
                                         16 * warp_index() + lane_index() / 4, shared.length);

    softmax_rows rows = {{-INFINITY, -INFINITY}, {0, 0}};
    float o[d / 2];
#pragma unroll
    for (int i = 0; i < d / 2; i++) o[i] = 0;

    if (run.n_key > 0) {
        uint32_t q[d / 16][4];
        load_queries<d>(shared.v, call, run, item.kv_head);
        ptx_cp_async_commit();
        load_keys<d>(shared.k[0], k, call.k_stride, 0, run.n_key);
        ptx_cp_async_commit();
        ptx_cp_async_wait<1>();
        __syncthreads(); // Q of all threads is there
        read_queries<d>(shared.v, q);

        for (int first = 0, stage = 0; first < run.n_key; first += BLOCK_KEYS, stage ^= 1) {
            ptx_cp_async_wait<0>();
            __syncthreads(); // K of all threads is there; nobody reads V, Q or the other K any more
            load_keys<d>(shared.v, v, call.v_stride, first, run.n_key);
            ptx_cp_async_commit();
            if (first + BLOCK_KEYS < run.n_key)
                load_keys<d>(shared.k[stage ^ 1], k, call.k_stride, first + BLOCK_KEYS, run.n_key);
            ptx_cp_async_commit(); // empty at the end, so that the wait below always means V

            float s[BLOCK_KEYS / 2], decay[2];
            uint32_t p[BLOCK_KEYS / 16][4];
            multiply_keys<d>(q, shared.k[stage], s);
            if (first + BLOCK_KEYS > run.n_shared) {
                const int left[2] = {place.length[0] - first, place.length[1] - first};
                mask_scores(s, left);
            }
            softmax_block(s, call.scale_log2, rows, decay);
            scale_rows(o, decay);
            pack_probabilities(s, p);
            ptx_cp_async_wait<1>();
            __syncthreads(); // V of all threads is there
            multiply_values<d>(p, shared.v, o);
        }
    }
    store_rows(call, place, rows, o);
}

template <int d>
__global__ void __launch_bounds__(THREADS)
    attention_sm80_kernel(const __grid_constant__ ifkv_attention_call call) {
    shared_memory<d> &shared = ifkv_shared<shared_memory<d>>();
    const ifkv_attention_item item = ifkv_attention_item_at(&call.plan, blockIdx.x);
    int64_t row = item.tile * call.plan.tile_rows;
    const int64_t limit = min(row + call.plan.tile_rows, call.n_row);
    while (row < limit) {
        if (warp_index() == 0) {
            const attention_run run = find_run(call, row, limit, item.part, shared.length);
            if (lane_index() == 0) shared.run = run;
        }
        __syncthreads(); // the run is known
        attend_run<d>(call, item, shared);
        row += shared.run.n_row;
        __syncthreads(); // nobody reads the run any more
    }
}

template <int d>
cudaError_t launch(const ifkv_cuda_context *context, const ifkv_attention_call *call) {
    return ifkv_launch(attention_sm80_kernel<d>, dim3(static_cast<unsigned>(call->plan.n_item)),
                       dim3(THREADS), sizeof(shared_memory<d>), context->stream, *call);
}

} // namespace

extern "C" ifkv_status ifkv_cuda_attention_sm80(const ifkv_cuda_context *context,
                                                const ifkv_attention_call *call) {
    static cudaError_t (*const instance[])(const ifkv_cuda_context *,
                                           const ifkv_attention_call *) = {
        launch<16>, launch<32>, launch<48>,  launch<64>,
        launch<80>, launch<96>, launch<112>, launch<128>};
    return IFKV_CUDA(instance[call->d_head / 16 - 1](context, call));
}
