/* One planted bug of each kind that the model must find, and the same kernel without it, which must
 * pass.
 *
 * A case tells at which times the bug must be found.  Found means: reported with the text of the
 * case, or, where plain loads of C++ are all there is to see, an output that is not what the
 * correct kernel writes. */
#include "device.h"
#include "emu_report.h"
#include "ptx.cuh"

#include <string>

namespace {

std::string report; // of the latest launch; empty if there was none

void keep_report(const char *text) {
    report = text;
}

constexpr int chunk = 64, row_bytes = 128, n_out = 1024;

struct Memory {
    __align__(1024) unsigned char a[64 * row_bytes];
    __align__(1024) unsigned char b[64 * row_bytes];
    __align__(1024) unsigned char c[64 * row_bytes];
    int values[128];
    uint64_t full, empty, other;
};

/* What a kernel gets: `bug` 0 is the correct one, the others are its planted bugs. */
struct Arguments {
    int bug;
    float *out;            // [n_out], NaN before
    unsigned char *global; // [64, 64] bf16, each 1
    CUtensorMap map;       // of it, box 64 x 64, 128-byte swizzle
};

__device__ int me() {
    return static_cast<int>(threadIdx.x);
}

__device__ void wait(uint64_t *barrier, uint32_t parity) {
    while (!ptx_mbarrier_try_wait(barrier, parity)) {
    }
}

/* [64, 64] bf16 ones in a tile; all of it is one value, so that the swizzle does not matter. */
__device__ void fill_ones(unsigned char *tile) {
    for (int i = me(); i < 64 * 64; i += static_cast<int>(blockDim.x))
        reinterpret_cast<uint16_t *>(tile)[i] = 0x3f80;
}

// ---- barriers and collectives

__global__ void exchange_kernel(Arguments args) {
    Memory &memory = ifkv_shared<Memory>();
    memory.values[me()] = me();
    if (args.bug == 0) __syncthreads();
    args.out[me()] = static_cast<float>(memory.values[127 - me()]);
}

enum { NEXT_LANE = 1, LAST_LANE };
__global__ void lanes_kernel(Arguments args) {
    Memory &memory = ifkv_shared<Memory>();
    const int next = me() < 31 ? me() + 1 : me(), last = me() > 0 ? me() - 1 : me();
    memory.values[me()] = 100 + me();
    if (args.bug == 0) __syncwarp();
    args.out[me()] = static_cast<float>(args.bug == LAST_LANE ? 0 : memory.values[next] - next);
    args.out[32 + me()] =
        static_cast<float>(args.bug == NEXT_LANE ? 0 : memory.values[last] - last);
    if (args.bug == LAST_LANE) args.out[me()] = 100;
    if (args.bug == NEXT_LANE) args.out[32 + me()] = 100;
}

enum {
    DIVERGENT_BLOCK = 1,
    DIVERGENT_WARP,
    LEAVES_BLOCK,
    LEAVES_WARP,
    LEFT_BEFORE,
    FOREIGN_MASK,
    ABSENT_SOURCE,
    NAMED_COUNTS,
    NAMED_ALONE,
    NAMED_HALF,
    TRAPPED
};
__global__ void collective_kernel(Arguments args) {
    const int i = me();
    if (args.bug == DIVERGENT_BLOCK) {
        if (i < 64)
            __syncthreads();
        else
            __syncthreads();
    }
    int value = i;
    if (args.bug == DIVERGENT_WARP) {
        if (i % 2)
            value = __shfl_xor_sync(IFKV_ALL_LANES, value, 2);
        else
            value = __shfl_xor_sync(IFKV_ALL_LANES, value, 2);
    }
    if (args.bug == LEAVES_BLOCK && i == 77) return;
    if (args.bug == LEAVES_WARP && i == 40) return;
    if (args.bug == FOREIGN_MASK) value = __shfl_xor_sync(0xffu, value, 1);
    if (args.bug == ABSENT_SOURCE && i < 8) value = __shfl_sync(0xffu, value, 20);
    if (args.bug == LEAVES_WARP) value = __shfl_xor_sync(IFKV_ALL_LANES, value, 1);
    if (args.bug == NAMED_COUNTS) {
        if (i < 64)
            ptx_bar_sync(2, 128);
        else
            ptx_bar_sync(2, 96);
    }
    if (args.bug == NAMED_ALONE && i < 64) ptx_bar_sync(2, 128);
    if (args.bug == NAMED_HALF && i < 64) ptx_bar_arrive(2, 128);
    if (args.bug == TRAPPED && i == 3) __trap();
    if (args.bug == LEFT_BEFORE && i < 32) return;
    if (args.bug != NAMED_ALONE && args.bug != NAMED_HALF) __syncthreads();
    args.out[i] = static_cast<float>(__shfl_xor_sync(IFKV_ALL_LANES, value, 1));
}

// ---- cp.async and memory nobody wrote

enum { NO_COPY = 1, NO_WAIT, NO_WAIT_OLD };
__global__ void plain_kernel(Arguments args) {
    Memory &memory = ifkv_shared<Memory>();
    const int i = me();
    if (args.bug == NO_WAIT_OLD) fill_ones(memory.a); // the very values that are to come
    __syncthreads();
    if (args.bug != NO_COPY) ptx_cp_async_16(memory.a + i * 16, args.global + i * 16);
    ptx_cp_async_commit();
    if (args.bug == 0) ptx_cp_async_wait<0>();
    __syncthreads();
    args.out[i] = bf16_to_float(reinterpret_cast<__nv_bfloat16 *>(memory.a)[i]);
}

enum {
    NO_WAIT_MATRIX = 1,
    SOURCE_CHANGES,
    TOO_LONG,
    MISALIGNED,
    UNWRITTEN,
    MISALIGNED_ROW,
    NO_COMMIT,
    WRITTEN_TWICE
};
__global__ void copy_kernel(Arguments args) {
    Memory &memory = ifkv_shared<Memory>();
    const int i = me();
    unsigned char *to = memory.a + i * 16;
    unsigned char *from = args.global + i * 16;
    if (!(args.bug == UNWRITTEN && i == 5))
        ptx_cp_async_16_zfill(to, args.bug == MISALIGNED ? from + 2 : from,
                              args.bug == TOO_LONG ? 17 : 16);
    if (args.bug == WRITTEN_TWICE) ptx_cp_async_16(to, from);
    if (args.bug != NO_COMMIT) ptx_cp_async_commit();
    if (args.bug == SOURCE_CHANGES) from[0] ^= 1;
    if (args.bug != NO_WAIT_MATRIX) ptx_cp_async_wait<0>();
    __syncthreads();
    uint32_t frag[4];
    ptx_ldmatrix_x4(frag, memory.a + i * 16 + (args.bug == MISALIGNED_ROW ? 2 : 0));
    args.out[i] = bf16_low(frag[0]);
}

// ---- bulk copies and mbarriers

enum {
    WRONG_PARITY = 1,
    NEVER_COMES,
    FEW_BYTES,
    MANY_ARRIVALS,
    NOT_SET_UP,
    SET_UP_TWICE,
    MARK_OVERWRITTEN,
    IN_FLIGHT_AT_END,
    NO_READ_WAIT,
    SOURCE_OVERWRITTEN,
    NO_FENCE,
    STORE_UNWRITTEN,
    LOAD_OVER_STORE,
    LOAD_OVER_LOAD,
    WRONG_RANK,
    OUTSIDE,
    UNALIGNED_TILE,
    READ_UNDER_LOAD
};
__global__ void bulk_kernel(const __grid_constant__ Arguments args) {
    Memory &memory = ifkv_shared<Memory>();
    const int bug = args.bug;
    if (me() == 0) {
        if (bug != NOT_SET_UP) ptx_mbarrier_init(&memory.full, 1);
        if (bug == SET_UP_TWICE) ptx_mbarrier_init(&memory.full, 1);
        ptx_mbarrier_init(&memory.other, 1);
        ptx_fence_mbarrier_init();
    }
    __syncthreads();
    if (bug == READ_UNDER_LOAD) fill_ones(memory.a); // the very values that are to come
    __syncthreads();
    if (me() == 0) {
        if (bug == MARK_OVERWRITTEN) memory.full = 0;
        if (bug != NEVER_COMES)
            ptx_mbarrier_arrive_expect_tx(&memory.full, bug == FEW_BYTES ? 8064 : 8192);
        if (bug == MANY_ARRIVALS) ptx_mbarrier_arrive(&memory.full);
        unsigned char *to = bug == OUTSIDE          ? memory.c + sizeof memory.c
                            : bug == UNALIGNED_TILE ? memory.a + 64
                                                    : memory.a;
        if (bug == WRONG_RANK)
            ptx_tma_load_3d(to, &args.map, &memory.full, 0, 0, 0);
        else
            ptx_tma_load_2d(to, &args.map, &memory.full, 0, 0);
        if (bug == LOAD_OVER_LOAD) ptx_tma_load_2d(memory.a, &args.map, &memory.full, 0, 0);
        if (bug == IN_FLIGHT_AT_END) ptx_tma_load_2d(memory.b, &args.map, &memory.other, 0, 0);
    }
    if (bug == READ_UNDER_LOAD)
        __syncthreads();
    else
        wait(&memory.full, bug == WRONG_PARITY ? 1 : 0);
    args.out[me()] = bf16_to_float(reinterpret_cast<__nv_bfloat16 *>(memory.a)[me()]);
    if (bug == READ_UNDER_LOAD) wait(&memory.full, 0);
    __syncthreads();

    if (bug != STORE_UNWRITTEN) fill_ones(memory.c);
    if (bug != NO_FENCE) ptx_fence_proxy_async();
    __syncthreads();
    if (me() == 0) {
        ptx_tma_store_2d(&args.map, memory.c, 0, 0);
        ptx_bulk_commit();
        if (bug == SOURCE_OVERWRITTEN) memory.c[100] = 0;
        if (bug == LOAD_OVER_STORE) ptx_tma_load_2d(memory.c, &args.map, &memory.other, 0, 0);
        if (bug != NO_READ_WAIT) ptx_bulk_wait_read<0>();
    }
}

// ---- wgmma

enum {
    FEW_ROWS = 1,
    ODD_START,
    REACHES_OUT,
    NO_ACCUMULATOR_FENCE,
    NO_PROXY_FENCE,
    EARLY_WRITE,
    EARLY_READ,
    OPERAND_CHANGES,
    REGISTER_CHANGES,
    NO_PRODUCT_WAIT,
    LANES_DIFFER,
    WARPS_DIFFER,
    PARTIAL_GROUP,
    B_UNWRITTEN,
    LOAD_OVER_B,
    OTHER_SWIZZLE,
    LEAVES_LINE,
    CHAIN_TOUCHED,
    PART_OF_ACCUMULATOR
};
__global__ void __launch_bounds__(128) product_kernel(const __grid_constant__ Arguments args) {
    Memory &memory = ifkv_shared<Memory>();
    const int bug = args.bug;
    if (me() == 0) ptx_mbarrier_init(&memory.full, 1);
    fill_ones(memory.a);
    if (bug != B_UNWRITTEN)
        for (int i = me(); i < 64 * 64;
             i += 128) // column n of b holds n: what an offset between groups of rows must respect
            reinterpret_cast<uint16_t *>(memory.b)[i] =
                static_cast<uint16_t>(__float_as_uint(static_cast<float>(i / 64)) >> 16);
    if (bug != NO_PROXY_FENCE) ptx_fence_proxy_async();
    __syncthreads();
    float sum[32] = {}, other[64] = {};
    uint32_t frag[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
    uint64_t a = ptx_wgmma_descriptor(memory.a, 16, 1024);
    uint64_t b = ptx_wgmma_descriptor(memory.b + (bug == ODD_START ? 128 : 0), 16,
                                      bug == FEW_ROWS      ? 512
                                      : bug == REACHES_OUT ? 65536
                                                           : 1024);
    if (bug == LEAVES_LINE) b = ptx_wgmma_descriptor_advance(b, 112);
    if (bug == OTHER_SWIZZLE) b ^= static_cast<uint64_t>(3) << 62;
    if (bug == LANES_DIFFER && me() == 9) a += 2;
    if (bug == WARPS_DIFFER && me() >= 96) b += 2;
    if (bug != NO_ACCUMULATOR_FENCE) ptx_wgmma_fence();
    if (bug == PARTIAL_GROUP && me() < 32) return;
    ptx_wgmma_ss<0>(sum, a, b, 0);
    if (bug == CHAIN_TOUCHED) sum[3] = 0;
    ptx_wgmma_rs<0>(sum, frag, b, 1);
    if (bug == PART_OF_ACCUMULATOR) {
        ptx_wgmma_ss<0>(reinterpret_cast<float(&)[32]>(other[0]), a, b, 1);
        ptx_wgmma_ss<0>(reinterpret_cast<float(&)[32]>(other[16]), a, b, 1);
    }
    ptx_wgmma_commit();
    float early = 0;
    if (bug == EARLY_WRITE) sum[5] = 1;
    if (bug == EARLY_READ) early = sum[5];
    if (bug == REGISTER_CHANGES) frag[2]++;
    if (bug == OPERAND_CHANGES && lane_index() == 5)
        memory.b[warp_index() * 1024] ^= 1; // first line of a pattern
    if (bug == LOAD_OVER_B && me() == 0) ptx_tma_load_2d(memory.b, &args.map, &memory.full, 0, 0);
    if (bug != NO_PRODUCT_WAIT) ptx_wgmma_wait<0>();
    ptx_pin(sum);
    ptx_pin(other);
    for (int i = 0; i < 8; i++)
        args.out[i * 128 + me()] = bug == EARLY_READ && i == 5 ? early : sum[i];
}

// ---- registers

enum { THREE_WARPS = 1, TOO_MANY, WRONG_WAY };
__global__ void __launch_bounds__(384, 1)
    registers_kernel(Arguments args) { // 168 a thread to start with
    if (me() < 128) {
        if (args.bug == WRONG_WAY)
            ptx_setmaxnreg_inc<24>();
        else if (args.bug == TOO_MANY)
            ptx_setmaxnreg_dec<40>();
        else if (args.bug != THREE_WARPS || me() < 96)
            ptx_setmaxnreg_dec<24>();
    } else if (args.bug == THREE_WARPS) {
        ptx_setmaxnreg_inc<216>(); // what three warps gave is enough
    } else {
        ptx_setmaxnreg_inc<240>();
    }
    args.out[me()] = 1;
}

#ifndef __SANITIZE_ADDRESS__ // which would end the program
__global__ void overflow_kernel(Arguments args) {
    if (me() == 0 && args.bug) ifkv_dynamic_shared()[sizeof(Memory) + 3] = 1;
    args.out[me()] = 1;
}
#endif

/* A stage is handed back to the producer before the product that reads it was waited for. */
__global__ void __launch_bounds__(160) release_kernel(const __grid_constant__ Arguments args) {
    Memory &memory = ifkv_shared<Memory>();
    if (me() == 0) {
        ptx_mbarrier_init(&memory.full, 1);
        ptx_mbarrier_init(&memory.empty, 1);
        ptx_fence_mbarrier_init();
    }
    __syncthreads();
    constexpr uint32_t n_round = 3;
    if (me() >= 128) {
        for (uint32_t i = 0; i < n_round && me() == 128; i++) {
            wait(&memory.empty, (i & 1) ^ 1);
            ptx_mbarrier_arrive_expect_tx(&memory.full, 8192);
            ptx_tma_load_2d(memory.a, &args.map, &memory.full, 0, 0);
        }
        return;
    }
    float sum[32];
    for (uint32_t i = 0; i < n_round; i++) {
        wait(&memory.full, i & 1);
        ptx_wgmma_fence();
        const uint64_t a = ptx_wgmma_descriptor(memory.a, 16, 1024);
        ptx_wgmma_ss<0>(sum, a, a, i > 0);
        ptx_wgmma_commit();
        if (args.bug && me() == 0) ptx_mbarrier_arrive(&memory.empty);
        ptx_wgmma_wait<0>();
        if (!args.bug && me() == 0) ptx_mbarrier_arrive(&memory.empty);
    }
    args.out[me()] = sum[0];
}

enum { EARLY = 1, LATE = 2, RANDOM = 4, ALWAYS = 7 };
constexpr const char *wrong_output = nullptr;

struct Case {
    const char *name;
    void (*kernel)(Arguments);
    int n_thread, bug;
    const char *text; // of the report; wrong_output: there is none, the output differs
    int times;        // at which it must be found; random: by one seed of ten at least
};

const Case cases[] = {
    {"missing __syncthreads", exchange_kernel, 128, 1, wrong_output, ALWAYS},
    {"missing __syncwarp, next lane", lanes_kernel, 32, NEXT_LANE, wrong_output, EARLY | RANDOM},
    {"missing __syncwarp, last lane", lanes_kernel, 32, LAST_LANE, wrong_output, LATE | RANDOM},
    {"divergent __syncthreads", collective_kernel, 128, DIVERGENT_BLOCK, "divergent __syncthreads",
     ALWAYS},
    {"divergent shuffle", collective_kernel, 128, DIVERGENT_WARP, "divergent warp", ALWAYS},
    {"thread leaves before __syncthreads", collective_kernel, 128, LEAVES_BLOCK,
     "leaves the kernel while", ALWAYS},
    {"lane leaves before a shuffle", collective_kernel, 128, LEAVES_WARP, "__shfl_xor_sync",
     ALWAYS},
    {"warp leaves before __syncthreads", collective_kernel, 128, LEFT_BEFORE,
     "__syncthreads waits for", EARLY | RANDOM},
    {"mask without the caller", collective_kernel, 128, FOREIGN_MASK, "leaves out the calling lane",
     ALWAYS},
    {"shuffle from a lane outside of the mask", collective_kernel, 128, ABSENT_SOURCE,
     "reads lane 20, which mask", ALWAYS},
    {"named barrier with two counts", collective_kernel, 128, NAMED_COUNTS, "barrier 2 is used for",
     ALWAYS},
    {"named barrier nobody completes", collective_kernel, 128, NAMED_ALONE, "deadlock", ALWAYS},
    {"named barrier left half full", collective_kernel, 128, NAMED_HALF,
     "64 of 128 threads arrived at barrier 2", ALWAYS},
    {"trap", collective_kernel, 128, TRAPPED, "__trap", ALWAYS},
    {"cp.async not waited for, plain read", plain_kernel, 128, NO_WAIT, wrong_output,
     LATE | RANDOM},
    {"cp.async not waited for, ldmatrix", copy_kernel, 128, NO_WAIT_MATRIX,
     "while cp.async of thread", ALWAYS},
    {"cp.async not committed", copy_kernel, 128, NO_COMMIT, "while cp.async of thread", ALWAYS},
    {"source of cp.async overwritten", copy_kernel, 128, SOURCE_CHANGES, "the source of cp.async",
     ALWAYS},
    {"cp.async of 17 bytes", copy_kernel, 128, TOO_LONG, "expected at most 16", ALWAYS},
    {"cp.async misaligned", copy_kernel, 128, MISALIGNED, "not 16-byte aligned", ALWAYS},
    {"two cp.async to one place", copy_kernel, 128, WRITTEN_TWICE, "cp.async writes shared offset",
     ALWAYS},
    {"ldmatrix of memory nobody wrote", copy_kernel, 128, UNWRITTEN, "which nobody wrote", ALWAYS},
    {"cp.async over old data not waited for", plain_kernel, 128, NO_WAIT_OLD, wrong_output,
     LATE | RANDOM},
    {"plain read of memory nobody wrote", plain_kernel, 128, NO_COPY, wrong_output, ALWAYS},
    {"ldmatrix row misaligned", copy_kernel, 128, MISALIGNED_ROW, "not a multiple of 16", ALWAYS},
    {"wrong parity", bulk_kernel, 128, WRONG_PARITY, "block ends before bulk tensor load",
     LATE | RANDOM},
    {"read under a load", bulk_kernel, 128, READ_UNDER_LOAD, wrong_output, LATE | RANDOM},
    {"mbarrier nobody completes", bulk_kernel, 128, NEVER_COMES, "wait at mbarrier.try_wait",
     ALWAYS},
    {"fewer bytes expected than come", bulk_kernel, 128, FEW_BYTES, "deadlock", ALWAYS},
    {"one arrival too many", bulk_kernel, 128, MANY_ARRIVALS, "one arrival more", LATE | RANDOM},
    {"mbarrier not set up", bulk_kernel, 128, NOT_SET_UP, "no mbarrier was initialised", ALWAYS},
    {"mbarrier set up twice", bulk_kernel, 128, SET_UP_TWICE, "in use since", ALWAYS},
    {"mbarrier overwritten", bulk_kernel, 128, MARK_OVERWRITTEN, "overwrote the mbarrier", ALWAYS},
    {"block ends under a load", bulk_kernel, 128, IN_FLIGHT_AT_END,
     "block ends before bulk tensor load", LATE | RANDOM},
    {"thread leaves under its store", bulk_kernel, 128, NO_READ_WAIT,
     "before it waited for its bulk store", ALWAYS},
    {"source of a store overwritten", bulk_kernel, 128, SOURCE_OVERWRITTEN,
     "overwritten while bulk tensor store", ALWAYS},
    {"load over the source of a store", bulk_kernel, 128, LOAD_OVER_STORE,
     "while bulk tensor store", ALWAYS},
    {"two loads to one place", bulk_kernel, 128, LOAD_OVER_LOAD, "while bulk tensor load",
     LATE | RANDOM},
    {"store without proxy fence", bulk_kernel, 128, NO_FENCE, "since the last fence.proxy.async",
     ALWAYS},
    {"store of memory nobody wrote", bulk_kernel, 128, STORE_UNWRITTEN, "which nobody wrote",
     ALWAYS},
    {"map of another rank", bulk_kernel, 128, WRONG_RANK, "no tensor map of rank 3", ALWAYS},
    {"load past shared memory", bulk_kernel, 128, OUTSIDE, "of the block's shared memory", ALWAYS},
    {"load to a misaligned tile", bulk_kernel, 128, UNALIGNED_TILE, "not a multiple of 128",
     ALWAYS},
    {"wrong stride offset", product_kernel, 128, FEW_ROWS, wrong_output, ALWAYS},
    {"descriptor off the swizzle pattern", product_kernel, 128, ODD_START, "not in the first line",
     ALWAYS},
    {"descriptor out of shared memory", product_kernel, 128, REACHES_OUT, "outside of the block's",
     ALWAYS},
    {"k step out of its line", product_kernel, 128, LEAVES_LINE, "of its 128-byte line", ALWAYS},
    {"descriptor of another swizzle", product_kernel, 128, OTHER_SWIZZLE, "says swizzle", ALWAYS},
    {"missing wgmma.fence", product_kernel, 128, NO_ACCUMULATOR_FENCE, "without wgmma.fence",
     ALWAYS},
    {"wgmma without proxy fence", product_kernel, 128, NO_PROXY_FENCE,
     "since the last fence.proxy.async", ALWAYS},
    {"accumulator written early", product_kernel, 128, EARLY_WRITE, "accumulators of wgmma",
     ALWAYS},
    {"accumulator read early", product_kernel, 128, EARLY_READ, wrong_output, LATE | RANDOM},
    {"accumulator touched between k steps", product_kernel, 128, CHAIN_TOUCHED,
     "touched before their wait", ALWAYS},
    {"part of an accumulator in flight", product_kernel, 128, PART_OF_ACCUMULATOR,
     "a part of the accumulators", ALWAYS},
    {"operand overwritten in flight", product_kernel, 128, OPERAND_CHANGES,
     "overwritten while wgmma", ALWAYS},
    {"operand registers changed in flight", product_kernel, 128, REGISTER_CHANGES,
     "registers of operand a", ALWAYS},
    {"load over an operand in flight", product_kernel, 128, LOAD_OVER_B, "while wgmma",
     LATE | RANDOM},
    {"wgmma not waited for", product_kernel, 128, NO_PRODUCT_WAIT, "before it waited for its wgmma",
     ALWAYS},
    {"lanes with two descriptors", product_kernel, 128, LANES_DIFFER, "other descriptors", ALWAYS},
    {"warps with two descriptors", product_kernel, 128, WARPS_DIFFER, "issue different wgmma",
     ALWAYS},
    {"wgmma by three warps", product_kernel, 128, PARTIAL_GROUP, "deadlock", ALWAYS},
    {"wgmma of memory nobody wrote", product_kernel, 128, B_UNWRITTEN, "which nobody wrote",
     ALWAYS},
    {"setmaxnreg by three warps", registers_kernel, 384, THREE_WARPS, "of one warpgroup executed",
     ALWAYS},
    {"more registers than there are", registers_kernel, 384, TOO_MANY, "wait at setmaxnreg.inc",
     ALWAYS},
    {"setmaxnreg the wrong way", registers_kernel, 384, WRONG_WAY, "setmaxnreg.inc to 24", ALWAYS},
#ifndef __SANITIZE_ADDRESS__
    {"write past shared memory", overflow_kernel, 32, 1, "of its", ALWAYS},
#endif
    {"stage released before its wait", release_kernel, 160, 1, "bulk tensor load overwrites",
     LATE | RANDOM},
};

std::vector<float> run(const Case &its, int bug) {
    std::vector<uint16_t> ones(64 * 64, 0x3f80);
    device_array<uint16_t> global(ones);
    device_array<float> out(n_out);
    Arguments args = {bug, out.data(), reinterpret_cast<unsigned char *>(global.data()),
                      device_tensor_map(global.data(), {chunk, 64}, {row_bytes}, {chunk, 64},
                                        CU_TENSOR_MAP_SWIZZLE_128B)};
    report.clear();
    const cudaError_t error =
        ifkv_launch(its.kernel, dim3(1), dim3(static_cast<unsigned>(its.n_thread)), sizeof(Memory),
                    nullptr, args);
    CHECK(error == cudaSuccess, "launch of %s", its.name);
    return out.fetch();
}

bool is_found(const Case &its, const std::vector<float> &want) {
    const std::vector<float> got = run(its, its.bug);
    if (its.text == wrong_output)
        return report.empty() && memcmp(got.data(), want.data(), want.size() * sizeof want[0]) != 0;
    return report.find(its.text) != std::string::npos;
}

void check_case(const Case &its) {
    int n_random = 0;
    std::vector<std::string> times = {"early", "late"};
    for (int seed = 1; seed <= 10; seed++) times.push_back("random:" + std::to_string(seed));
    for (size_t i = 0; i < times.size(); i++) {
        emu_set_time(times[i].c_str());
        const std::vector<float> want = run(its, 0);
        CHECK(report.empty(), "%s: the correct kernel is reported at %s: %s", its.name,
              times[i].c_str(), report.c_str());
        const bool found = is_found(its, want);
        if (i >= 2)
            n_random += found;
        else if (its.times & (i == 0 ? EARLY : LATE))
            CHECK(found, "%s: not found at %s; report: %s", its.name, times[i].c_str(),
                  report.c_str());
    }
    const int n_least = (its.times & EARLY) && (its.times & LATE) ? 10 : 1;
    CHECK(n_random >= n_least, "%s: found by %d of ten seeds; the last report: %s", its.name,
          n_random, report.c_str());
}

/* Both places of a conflict, kernel, block and thread are in the text; a deadlock names every
 * group. */
void check_texts() {
    emu_set_time("late");
    for (const Case &its : cases) {
        if (its.bug == NO_WAIT_MATRIX && its.kernel == copy_kernel) {
            run(its, its.bug);
            const size_t first = report.find("test_emu_reports.cu:");
            CHECK(first != std::string::npos &&
                      report.find("test_emu_reports.cu:", first + 1) != std::string::npos,
                  "two places: %s", report.c_str());
            CHECK(report.find("in its.kernel launched at") != std::string::npos &&
                      report.find("block (0, 0, 0)") != std::string::npos &&
                      report.find("thread (") != std::string::npos &&
                      report.find("time late") != std::string::npos,
                  "kernel, block, thread and time: %s", report.c_str());
        }
        if (its.bug == NAMED_ALONE && its.kernel == collective_kernel) {
            run(its, its.bug);
            CHECK(report.find("threads 0-63 wait at bar.sync") != std::string::npos &&
                      report.find("64 of 128 threads arrived") != std::string::npos &&
                      report.find("threads 64-127 have left") != std::string::npos,
                  "groups of a deadlock: %s", report.c_str());
        }
    }
}

void check_times() {
    CHECK(!emu_set_time("soon") && !emu_set_time("random:") && !emu_set_time("random:1x"),
          "other times are refused");
}

} // namespace

int main() {
    emu_on_report(keep_report);
    for (const Case &its : cases) check_case(its);
    check_texts();
    check_times();
    printf("%zu planted bugs; %d claims held, %d did not\n", sizeof cases / sizeof cases[0],
           check_passed, check_failed);
    return check_failed > 0;
}
