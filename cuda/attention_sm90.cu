/* Attention over spans on Hopper (sm_90a): bulk tensor copies, wgmma, one persistent block of
 * specialised warpgroups a multiprocessor.  d_head 64 or 128.
 *
 *   S = scale Q K^T   P = exp(S - max)   out = P V / sum P   lse = max + ln sum P
 *
 * Warpgroup 0 gives up its registers; its first warp takes pieces of the plan from a counter in
 * global memory, finds the runs of each (attention.cuh) and copies: Q of a run into one of two
 * slots, K and V in blocks of 128 keys that start at the run's first key, through rings of stages.
 * The other warpgroups, three at d_head 64 and two at 128, take 64 of the tile's stacked rows each.
 * They have the tensor cores in turn: one issues P V of a block and S of the next while the others
 * compute their softmax.  All work on every block of the run, so that turns stay even, whatever
 * their own rows see.
 *
 * Shared memory holds rows of 64 elements with a 128-byte swizzle, wider heads as two such halves:
 * what the copies write and the descriptors of wgmma read.  S and P stay in registers.
 *
 * Keys past the last one a run sees but within the last block are copied: in K they are masked, in
 * V they are cleared before use, so what lies there may be NaN (beyond n_key the copy gives zeros).
 * A key that some row of a run sees must be finite in V, or all of its tile is NaN.
 *
 * Budget at d_head 128: Q 2 x 32 KB, K and V 2 x 2 x 32 KB of 227 KB; 40 and 232 of 168 x 384
 * registers: S 64, O 64, P 32 and addresses.  At d_head 64: Q 2 x 24 KB, K and V 2 x 4 x 16 KB; 32
 * and 160 of 128 x 512 registers: S 64, O 32, P 32 and addresses.  Bound by the tensor cores at
 * d_head 128, by the exponentials at 64: these take as long as the products there, and a third
 * warpgroup computes its own while another does what comes before and after.
 * Source: FlashAttention-3 (arXiv 2407.08608), sections 3.1 and 3.2; PTX ISA 9.0. */
#include "attention.cuh"
#include "cuda_check.h"
#include "launch.cuh"
#include "tensor_map.h"

namespace {

constexpr int WARPGROUP = 128, WARPGROUP_ROWS = 64; // threads, and rows of a wgmma
constexpr int BLOCK_KEYS = IFKV_ATTENTION_BLOCK_KEYS;
constexpr int SLOTS = 2;                           // tiles whose queries are in shared memory
constexpr int CHUNK = 64;                          // elements of a swizzled row of 128 bytes
constexpr int ROW_BYTES = 128;                     // of it
constexpr int ATOM_BYTES = 1024;                   // eight rows: the period of the swizzle
constexpr int BARRIER_CLEAR = 1, BARRIER_TURN = 2; // named barriers; TURN + w is warpgroup w's

// What d_head decides; rows of the tile are stacked rows.
template <int d> struct config {
    static constexpr int ROWS = d == 64 ? IFKV_ATTENTION_SM90_D64_M : IFKV_ATTENTION_SM90_D128_M;
    static constexpr int CONSUMERS = ROWS / WARPGROUP_ROWS; // warpgroups
    static constexpr int CONSUMER_THREADS = CONSUMERS * WARPGROUP,
                         CONSUMER_WARPS = CONSUMER_THREADS / IFKV_WARP_LANES;
    static constexpr int THREADS = WARPGROUP + CONSUMER_THREADS;
    static constexpr int STAGES = d == 64 ? 4 : 2;
    static constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 ? 32 : 40, // of a thread
        CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : 232;
    static_assert(ROWS % WARPGROUP_ROWS == 0 && ROWS <= IFKV_ATTENTION_MAX_M, "whole warpgroups");
    static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <=
                      (1 + CONSUMERS) * (65536 / THREADS / 8 * 8),
                  "what a block has at its start");
};

template <int d, int rows> struct swizzled_rows { __nv_bfloat16 chunk[d / CHUNK][rows][CHUNK]; };
template <int d> using query_rows = swizzled_rows<d, config<d>::ROWS>;

template <int d> struct tile_slot {
    attention_run run; // n_row 0: there is no more work
    int kv_head, part;
    int length[config<d>::ROWS]; // keys each row of the run sees
};

template <int d> struct shared_memory {
    static constexpr int STAGES = config<d>::STAGES;
    query_rows<d> q[SLOTS];
    swizzled_rows<d, BLOCK_KEYS> k[STAGES], v[STAGES];
    tile_slot<d> tile[SLOTS];
    uint64_t tile_full[SLOTS], tile_empty[SLOTS];
    uint64_t k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
};
static_assert(sizeof(shared_memory<128>) <= 227 * 1024, "a block's shared memory");
static_assert(sizeof(shared_memory<64>) <= 227 * 1024, "a block's shared memory");

struct tensor_maps {
    CUtensorMap q, k, v;
};

// A place in a ring of n stages, and the parity of its barriers' phase there.
template <int n> struct ring {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == n) {
            stage = 0;
            parity ^= 1;
        }
    }
};

__device__ __forceinline__ void wait(uint64_t &barrier, uint32_t parity) {
    while (!ptx_mbarrier_try_wait(&barrier, parity)) {
    }
}

// Zeros for wgmma to read from row `first` on, written by n_thread threads; a barrier must follow.
template <int d, int rows>
__device__ __forceinline__ void clear_rows(swizzled_rows<d, rows> &in, int first, int thread,
                                           int n_thread) {
    constexpr int row_pieces = ROW_BYTES / 16;
#pragma unroll
    for (int c = 0; c < d / CHUNK; c++)
        for (int i = thread; i < (rows - first) * row_pieces; i += n_thread)
            store_16(&in.chunk[c][first + i / row_pieces][i % row_pieces * 8],
                     make_uint4(0, 0, 0, 0));
    ptx_fence_proxy_async();
}

template <int d>
__device__ __forceinline__ void copy_block(swizzled_rows<d, BLOCK_KEYS> &to, const CUtensorMap &map,
                                           uint64_t &full, int key, int kv_head) {
    ptx_mbarrier_arrive_expect_tx(&full, sizeof to);
#pragma unroll
    for (int c = 0; c < d / CHUNK; c++)
        ptx_tma_load_3d(to.chunk[c], &map, &full, c * CHUNK, key, kv_head);
}

template <int d> struct producer {
    ring<SLOTS> tile;
    ring<config<d>::STAGES> k, v;

    // One lane: K and V of a run, in the order in which they are used.
    __device__ __forceinline__ void copy_keys(shared_memory<d> &shared, const tensor_maps &maps,
                                              const attention_run &run, int kv_head) {
        const int first = static_cast<int>(run.first_key);
        const int n_block = ceil_div(run.n_key, BLOCK_KEYS);
        for (int b = 0; b <= n_block; b++) {
            if (b < n_block) {
                wait(shared.k_empty[k.stage], k.parity ^ 1);
                copy_block<d>(shared.k[k.stage], maps.k, shared.k_full[k.stage],
                              first + b * BLOCK_KEYS, kv_head);
                k.advance();
            }
            if (b > 0) {
                wait(shared.v_empty[v.stage], v.parity ^ 1);
                copy_block<d>(shared.v[v.stage], maps.v, shared.v_full[v.stage],
                              first + (b - 1) * BLOCK_KEYS, kv_head);
                v.advance();
            }
        }
    }

    // The warp: all runs of a piece.
    __device__ __forceinline__ void copy_item(const ifkv_attention_call &call,
                                              shared_memory<d> &shared, const tensor_maps &maps,
                                              const ifkv_attention_item &item) {
        int64_t row = item.tile * call.plan.tile_rows;
        const int64_t limit = min(row + call.plan.tile_rows, call.n_row);
        while (row < limit) {
            tile_slot<d> &slot = shared.tile[tile.stage];
            wait(shared.tile_empty[tile.stage], tile.parity ^ 1);
            const attention_run run = find_run(call, row, limit, item.part, slot.length);
            __syncwarp(); // all lengths are written
            if (lane_index() == 0) {
                uint64_t &full = shared.tile_full[tile.stage];
                slot.run = run;
                slot.kv_head = item.kv_head;
                slot.part = item.part;
                const int stacked = call.plan.tile_rows * call.plan.group;
                ptx_mbarrier_arrive_expect_tx(
                    &full, static_cast<uint32_t>(stacked * ROW_BYTES * (d / CHUNK)));
#pragma unroll
                for (int c = 0; c < d / CHUNK; c++)
                    ptx_tma_load_4d(shared.q[tile.stage].chunk[c], &maps.q, &full, c * CHUNK, 0,
                                    static_cast<int>(row), item.kv_head);
                copy_keys(shared, maps, run, item.kv_head);
            }
            __syncwarp();
            tile.advance();
            row += run.n_row;
        }
    }

    __device__ __forceinline__ void run(const ifkv_attention_call &call, shared_memory<d> &shared,
                                        const tensor_maps &maps) {
        for (;;) {
            unsigned next = 0;
            if (lane_index() == 0) next = atomicAdd(call.next_item, 1u);
            next = __shfl_sync(IFKV_ALL_LANES, next, 0);
            if (next >= call.plan.n_item) break;
            copy_item(call, shared, maps, ifkv_attention_item_at(&call.plan, next));
        }
        if (lane_index() == 0) {
            wait(shared.tile_empty[tile.stage], tile.parity ^ 1);
            shared.tile[tile.stage].run.n_row = 0;
            ptx_mbarrier_arrive(&shared.tile_full[tile.stage]);
        }
    }
};

// The products are issued here and waited for later.  Each has a fence of its own: ptxas serialises
// one that stands in a branch without (C7520).

// s [64, BLOCK_KEYS] = q k^T of a warpgroup.
template <int d>
__device__ __forceinline__ void issue_scores(const query_rows<d> &q, int first_row,
                                             const swizzled_rows<d, BLOCK_KEYS> &k,
                                             float (&s)[BLOCK_KEYS / 2]) {
    ptx_wgmma_fence();
#pragma unroll
    for (int c = 0; c < d / CHUNK; c++) {
        const uint64_t a = ptx_wgmma_descriptor(q.chunk[c][first_row], 0, ATOM_BYTES);
        const uint64_t b = ptx_wgmma_descriptor(k.chunk[c], 0, ATOM_BYTES);
#pragma unroll
        for (int step = 0; step < CHUNK / 16; step++)
            ptx_wgmma_ss<0>(s, ptx_wgmma_descriptor_advance(a, 32 * step),
                            ptx_wgmma_descriptor_advance(b, 32 * step), c + step > 0);
    }
    ptx_wgmma_commit();
}

// o [64, d] += p v.
template <int d>
__device__ __forceinline__ void issue_values(const uint32_t (&p)[BLOCK_KEYS / 16][4],
                                             const swizzled_rows<d, BLOCK_KEYS> &v,
                                             float (&o)[d / 2]) {
    ptx_wgmma_fence();
    const uint64_t b = ptx_wgmma_descriptor(v.chunk, BLOCK_KEYS * ROW_BYTES, ATOM_BYTES);
#pragma unroll
    for (int step = 0; step < BLOCK_KEYS / 16; step++)
        ptx_wgmma_rs<1>(o, p[step], ptx_wgmma_descriptor_advance(b, 16 * ROW_BYTES * step), 1);
    ptx_wgmma_commit();
}

template <int d> struct consumer {
    static constexpr int CONSUMERS = config<d>::CONSUMERS,
                         CONSUMER_THREADS = config<d>::CONSUMER_THREADS;
    const int warpgroup; // 0 .. CONSUMERS - 1
    ring<SLOTS> tile;
    ring<config<d>::STAGES> k, v;

    __device__ __forceinline__ explicit consumer(int index) : warpgroup(index) {
    }

    __device__ __forceinline__ void take_turn() const {
        ptx_bar_sync(BARRIER_TURN + warpgroup, 2 * WARPGROUP);
    }
    __device__ __forceinline__ void pass_turn() const {
        ptx_bar_arrive(BARRIER_TURN + (warpgroup + 1) % CONSUMERS, 2 * WARPGROUP);
    }
    // By each warp for itself: another's reads may still be under way.
    __device__ __forceinline__ static void release(uint64_t &empty) {
        __syncwarp();
        if (lane_index() == 0) ptx_mbarrier_arrive(&empty);
    }

    // Rows from `first` on of the stage of V that all warpgroups are about to use.
    __device__ __forceinline__ void clear_values(shared_memory<d> &shared, int first) const {
        const int thread = static_cast<int>(threadIdx.x) - WARPGROUP;
        clear_rows(shared.v[v.stage], first, thread, CONSUMER_THREADS);
        ptx_bar_sync(BARRIER_CLEAR, CONSUMER_THREADS);
    }

    // All blocks of a run that has keys.
    __device__ __forceinline__ void attend(const ifkv_attention_call &call,
                                           shared_memory<d> &shared, const attention_run &run,
                                           const int (&length)[2], softmax_rows &rows,
                                           float (&o)[d / 2]) {
        const query_rows<d> &q = shared.q[tile.stage];
        float s[BLOCK_KEYS / 2];
        uint32_t p[BLOCK_KEYS / 16][4];
        const auto weigh = [&](int first) { // s of the block that starts there becomes p
            if (first + BLOCK_KEYS > run.n_shared) {
                const int left[2] = {length[0] - first, length[1] - first};
                mask_scores(s, left);
            }
            float decay[2];
            softmax_block(s, call.scale_log2, rows, decay);
            scale_rows(o, decay);
            pack_probabilities(s, p);
        };

        wait(shared.k_full[k.stage], k.parity);
        take_turn();
        issue_scores<d>(q, WARPGROUP_ROWS * warpgroup, shared.k[k.stage], s);
        pass_turn();
        ptx_wgmma_wait<0>();
        ptx_pin(s);
        release(shared.k_empty[k.stage]);
        k.advance();

        int first = 0;
        for (; first + BLOCK_KEYS < run.n_key; first += BLOCK_KEYS) {
            weigh(first);
            wait(shared.v_full[v.stage], v.parity);
            wait(shared.k_full[k.stage], k.parity);
            take_turn();
            issue_values<d>(p, shared.v[v.stage], o);
            issue_scores<d>(q, WARPGROUP_ROWS * warpgroup, shared.k[k.stage], s);
            pass_turn();
            ptx_wgmma_wait<0>();
            ptx_pin(o);
            ptx_pin(s);
            release(shared.v_empty[v.stage]);
            release(shared.k_empty[k.stage]);
            v.advance();
            k.advance();
        }

        weigh(first); // of the last block, without a next
        wait(shared.v_full[v.stage], v.parity);
        if (first + BLOCK_KEYS > run.n_key) clear_values(shared, run.n_key - first);
        take_turn();
        issue_values<d>(p, shared.v[v.stage], o);
        pass_turn();
        ptx_wgmma_wait<0>();
        ptx_pin(o);
        release(shared.v_empty[v.stage]);
        v.advance();
    }

    __device__ __forceinline__ void run(const ifkv_attention_call &call, shared_memory<d> &shared) {
        const int stacked = WARPGROUP_ROWS * warpgroup + 16 * (warp_index() % 4) + lane_index() / 4;
        if (warpgroup == CONSUMERS - 1) pass_turn(); // the first is warpgroup 0's
        for (;;) {
            const tile_slot<d> &slot = shared.tile[tile.stage];
            wait(shared.tile_full[tile.stage], tile.parity);
            const attention_run run = slot.run;
            if (run.n_row == 0) break;
            const store_place place =
                place_rows(call, run, slot.kv_head, slot.part, stacked, slot.length);
            softmax_rows rows = {{-INFINITY, -INFINITY}, {0, 0}};
            float o[d / 2];
#pragma unroll
            for (int i = 0; i < d / 2; i++) o[i] = 0;
            if (run.n_key > 0) attend(call, shared, run, place.length, rows, o);
            release(shared.tile_empty[tile.stage]);
            tile.advance();
            store_rows(call, place, rows, o);
        }
        if (warpgroup == 0) take_turn(); // the last one, which nobody needs
    }
};

template <int d> __device__ __forceinline__ void init_barriers(shared_memory<d> &shared) {
    for (int i = 0; i < SLOTS; i++) {
        ptx_mbarrier_init(&shared.tile_full[i], 1);
        ptx_mbarrier_init(&shared.tile_empty[i], config<d>::CONSUMER_WARPS);
    }
    for (int i = 0; i < config<d>::STAGES; i++) {
        ptx_mbarrier_init(&shared.k_full[i], 1);
        ptx_mbarrier_init(&shared.v_full[i], 1);
        ptx_mbarrier_init(&shared.k_empty[i], config<d>::CONSUMER_WARPS);
        ptx_mbarrier_init(&shared.v_empty[i], config<d>::CONSUMER_WARPS);
    }
    ptx_fence_mbarrier_init();
}

template <int d>
__global__ void __launch_bounds__(config<d>::THREADS, 1)
    attention_sm90_kernel(const __grid_constant__ ifkv_attention_call call,
                          const __grid_constant__ tensor_maps maps) {
    shared_memory<d> &shared = ifkv_shared<shared_memory<d>>();
    if (threadIdx.x == 0) init_barriers<d>(shared);
    // rows of Q that no copy fills, where the group does not divide the tile: never stored, but
    // what was never written must not be multiplied either
    for (int i = 0; i < SLOTS; i++)
        clear_rows(shared.q[i], call.plan.tile_rows * call.plan.group,
                   static_cast<int>(threadIdx.x), config<d>::THREADS);
    __syncthreads(); // barriers and spare rows are ready
    // by a shuffle: what the compiler knows to be the same in a warp takes no register of its lanes
    const int warpgroup = __shfl_sync(IFKV_ALL_LANES, static_cast<int>(threadIdx.x) / WARPGROUP, 0);
    if (warpgroup == 0) {
        ptx_setmaxnreg_dec<config<d>::PRODUCER_REGISTERS>();
        if (warp_index() == 0) producer<d>{}.run(call, shared, maps);
    } else {
        ptx_setmaxnreg_inc<config<d>::CONSUMER_REGISTERS>();
        consumer<d>(warpgroup - 1).run(call, shared);
    }
}

ifkv_status make_maps(const ifkv_cuda_context *context, const ifkv_attention_call &call,
                      tensor_maps *maps) {
    const uint64_t d = static_cast<uint64_t>(call.d_head), n_kv_head = call.plan.n_kv_head,
                   group = call.plan.group, n_key = call.n_key, n_row = call.n_row;
    const ifkv_tensor_shape q = {
        call.q,
        4,
        {d, group, n_row, n_kv_head},
        {d, static_cast<uint64_t>(call.q_stride), group * d},
        {CHUNK, static_cast<uint32_t>(group), static_cast<uint32_t>(call.plan.tile_rows), 1}};
    ifkv_tensor_shape keys = {call.k,
                              3,
                              {d, n_key, n_kv_head},
                              {static_cast<uint64_t>(call.k_stride), d},
                              {CHUNK, BLOCK_KEYS, 1}};
    IFKV_TRY(ifkv_tensor_maps_get(context->maps, &q, &maps->q));
    IFKV_TRY(ifkv_tensor_maps_get(context->maps, &keys, &maps->k));
    keys.data = call.v;
    keys.strides[0] = static_cast<uint64_t>(call.v_stride);
    return ifkv_tensor_maps_get(context->maps, &keys, &maps->v);
}

template <int d>
cudaError_t launch(const ifkv_cuda_context *context, const ifkv_attention_call *call,
                   const tensor_maps &maps) {
    const int64_t n_block = call->plan.n_item < context->n_sm ? call->plan.n_item : context->n_sm;
    return ifkv_launch(attention_sm90_kernel<d>, dim3(static_cast<unsigned>(n_block)),
                       dim3(config<d>::THREADS), sizeof(shared_memory<d>), context->stream, *call,
                       maps);
}

} // namespace

extern "C" ifkv_status ifkv_cuda_attention_sm90(const ifkv_cuda_context *context,
                                                const ifkv_attention_call *call) {
    tensor_maps maps;
    IFKV_TRY(make_maps(context, *call, &maps));
    IFKV_TRY(
        IFKV_CUDA(cudaMemsetAsync(call->next_item, 0, sizeof *call->next_item, context->stream)));
    return IFKV_CUDA(call->d_head == 64 ? launch<64>(context, call, maps)
                                        : launch<128>(context, call, maps));
}
