/* Shuffles, votes, matches, reductions, barriers and atomics against plain loops. */
#include "checks.h"
#include "device.h"
#include "ptx.cuh"

#include <limits.h>

#include <algorithm>

namespace {

constexpr int n_shuffle = 12;

__global__ void __launch_bounds__(32) shuffle_kernel(const int *values, int *out) {
    const int lane = lane_index(), value = values[lane];
    int *mine = out + lane * n_shuffle;
    mine[0] = __shfl_sync(IFKV_ALL_LANES, value, 5);
    mine[1] = __shfl_sync(IFKV_ALL_LANES, value, lane + 3, 8);
    mine[2] = __shfl_up_sync(IFKV_ALL_LANES, value, 3);
    mine[3] = __shfl_up_sync(IFKV_ALL_LANES, value, 3, 16);
    mine[4] = __shfl_down_sync(IFKV_ALL_LANES, value, 7);
    mine[5] = __shfl_down_sync(IFKV_ALL_LANES, value, 7, 8);
    mine[6] = __shfl_xor_sync(IFKV_ALL_LANES, value, 13);
    mine[7] = __shfl_xor_sync(IFKV_ALL_LANES, value, 12, 8);
    mine[8] = static_cast<int>(
        __shfl_xor_sync(IFKV_ALL_LANES, static_cast<long long>(value) << 33, 1) >> 33);
    mine[9] = static_cast<int>(__shfl_down_sync(IFKV_ALL_LANES, static_cast<float>(value), 1));
    mine[10] =
        lane % 2 ? __shfl_xor_sync(0xaaaaaaaau, value, 2) : __shfl_xor_sync(0x55555555u, value, 4);
    mine[11] = static_cast<int>(warp_sum(static_cast<float>(value)) +
                                1000 * warp_max(static_cast<float>(value)));
}

void check_shuffles() {
    std::vector<int> values(32);
    for (int i = 0; i < 32; i++) values[static_cast<size_t>(i)] = i * 37 % 101;
    const auto value = [&](int lane) { return values[static_cast<size_t>(lane)]; };
    device_array<int> device_values(values), out(32 * n_shuffle);
    CHECK(ifkv_launch(shuffle_kernel, dim3(1), dim3(32), 0, nullptr, device_values.data(),
                      out.data()) == cudaSuccess,
          "launch");
    const std::vector<int> got = out.fetch();
    int sum = 0, max = 0;
    for (int i = 0; i < 32; i++) {
        sum += value(i);
        max = std::max(max, value(i));
    }
    for (int lane = 0; lane < 32; lane++) {
        const int eight = lane / 8 * 8, xored = lane ^ 12;
        const int want[n_shuffle] = {
            value(5),
            value(eight + (lane + 3) % 8),
            value(lane >= 3 ? lane - 3 : lane),
            value(lane % 16 >= 3 ? lane - 3 : lane),
            value(lane + 7 < 32 ? lane + 7 : lane),
            value(lane % 8 + 7 < 8 ? lane + 7 : lane),
            value(lane ^ 13),
            value(xored < eight + 8 ? xored
                                    : lane), // earlier groups are reached, later ones are not
            value(lane ^ 1),
            value(lane < 31 ? lane + 1 : lane),
            value(lane % 2 ? lane ^ 2 : lane ^ 4),
            sum + 1000 * max,
        };
        for (int i = 0; i < n_shuffle; i++)
            CHECK(got[static_cast<size_t>(lane * n_shuffle + i)] == want[i],
                  "shuffle %d lane %d: %d, want %d", i, lane,
                  got[static_cast<size_t>(lane * n_shuffle + i)], want[i]);
    }
}

constexpr int n_vote = 14;

__global__ void __launch_bounds__(32) vote_kernel(const int *values, unsigned *out) {
    const int lane = lane_index(), value = values[lane];
    const unsigned bits = static_cast<unsigned>(value);
    unsigned *mine = out + lane * n_vote;
    mine[0] = __ballot_sync(IFKV_ALL_LANES, value % 3 == 0);
    mine[1] = static_cast<unsigned>(__all_sync(IFKV_ALL_LANES, value > -100));
    mine[2] = static_cast<unsigned>(__all_sync(IFKV_ALL_LANES, lane != 7));
    mine[3] = static_cast<unsigned>(__any_sync(IFKV_ALL_LANES, lane == 7));
    mine[4] = static_cast<unsigned>(__any_sync(IFKV_ALL_LANES, lane > 50));
    mine[5] = __match_any_sync(IFKV_ALL_LANES, value % 5);
    mine[6] = __reduce_add_sync(IFKV_ALL_LANES, bits);
    mine[7] = static_cast<unsigned>(__reduce_min_sync(IFKV_ALL_LANES, value));
    mine[8] = static_cast<unsigned>(__reduce_max_sync(IFKV_ALL_LANES, value));
    mine[9] = __reduce_max_sync(IFKV_ALL_LANES, bits);
    mine[10] = __reduce_and_sync(IFKV_ALL_LANES, bits | 64u);
    mine[11] = __reduce_or_sync(IFKV_ALL_LANES, bits & 255u);
    mine[12] = __reduce_xor_sync(IFKV_ALL_LANES, bits);
    mine[13] = lane < 8 ? __ballot_sync(0xffu, lane & 1) : 0;
}

void check_votes() {
    std::vector<int> values(32);
    for (int i = 0; i < 32; i++) values[static_cast<size_t>(i)] = i * 41 % 67 - 30;
    unsigned want[n_vote] = {
        0, 1,   0, 1, 0,   0, 0, static_cast<unsigned>(INT_MAX), static_cast<unsigned>(INT_MIN),
        0, ~0u, 0, 0, 0xaa};
    for (int i = 0; i < 32; i++) {
        const int value = values[static_cast<size_t>(i)];
        const unsigned bits = static_cast<unsigned>(value);
        if (value % 3 == 0) want[0] |= 1u << i;
        want[6] += bits;
        want[7] = static_cast<unsigned>(std::min(static_cast<int>(want[7]), value));
        want[8] = static_cast<unsigned>(std::max(static_cast<int>(want[8]), value));
        want[9] = std::max(want[9], bits);
        want[10] &= bits | 64u;
        want[11] |= bits & 255u;
        want[12] ^= bits;
    }
    device_array<int> device_values(values);
    device_array<unsigned> out(32 * n_vote);
    CHECK(ifkv_launch(vote_kernel, dim3(1), dim3(32), 0, nullptr, device_values.data(),
                      out.data()) == cudaSuccess,
          "launch");
    const std::vector<unsigned> got = out.fetch();
    for (int lane = 0; lane < 32; lane++) {
        want[5] = 0;
        for (int i = 0; i < 32; i++)
            if (values[static_cast<size_t>(i)] % 5 == values[static_cast<size_t>(lane)] % 5)
                want[5] |= 1u << i;
        want[13] = lane < 8 ? 0xaau : 0u;
        for (int i = 0; i < n_vote; i++)
            CHECK(got[static_cast<size_t>(lane * n_vote + i)] == want[i],
                  "vote %d lane %d: %08x, want %08x", i, lane,
                  got[static_cast<size_t>(lane * n_vote + i)], want[i]);
    }
}

__global__ void index_kernel(int *out) {
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const unsigned packed = ((blockIdx.z * 10 + blockIdx.y) * 10 + blockIdx.x) * 1000 +
                            (threadIdx.z * 10 + threadIdx.y) * 10 + threadIdx.x;
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] = static_cast<int>(packed);
}

void check_indices() {
    const dim3 grid(3, 2, 2), block(5, 4, 2); // 40 threads: a warp and a part of one
    device_array<int> out(12 * 40);
    CHECK(ifkv_launch(index_kernel, grid, block, 0, nullptr, out.data()) == cudaSuccess, "launch");
    const std::vector<int> got = out.fetch();
    for (int i = 0; i < 12 * 40; i++) {
        const int b = i / 40, t = i % 40;
        const int want =
            (b / 6 * 100 + b / 3 % 2 * 10 + b % 3) * 1000 + t / 20 * 100 + t / 5 % 4 * 10 + t % 5;
        CHECK(got[static_cast<size_t>(i)] == want, "indices of thread %d: %d, want %d", i,
              got[static_cast<size_t>(i)], want);
    }
}

struct BlockMemory {
    float scratch[32];
    int values[256], order[2];
};

/* Reversal through shared memory, reductions of a block, predicates at barriers, and a hand-over by
 * named barriers: warps 0 and 1 write, arrive and go on, warps 2 and 3 wait and read. */
__global__ void __launch_bounds__(256) block_kernel(int *out, unsigned long long *total) {
    BlockMemory &memory = ifkv_shared<BlockMemory>();
    const int i = static_cast<int>(threadIdx.x);
    memory.values[i] = i * i;
    __syncthreads();
    out[i] = memory.values[255 - i];
    const float sum = block_sum(static_cast<float>(i), memory.scratch);
    const float max = block_max(static_cast<float>(i * 7 % 256), memory.scratch);
    out[256 + i] = static_cast<int>(sum + max);
    out[512 + i] = __syncthreads_count(i % 3 == 0) * 4 + (__syncthreads_or(i == 200) ? 2 : 0) +
                   (__syncthreads_and(i < 255) ? 1 : 0);
    if (i < 64) {
        memory.values[i] = 1000 + i;
        ptx_bar_arrive(3, 128);
    } else if (i < 128) {
        ptx_bar_sync(3, 128);
        out[768 + i - 64] = memory.values[i - 64];
    }
    atomicAdd(total, static_cast<unsigned long long>(i));
    atomicMax(total + 1, static_cast<unsigned long long>(i * 5 % 256));
}

void check_blocks() {
    constexpr int n_block = 3;
    device_array<int> out(768 + 64);
    device_array<unsigned long long> total(std::vector<unsigned long long>(2, 0));
    CHECK(ifkv_launch(block_kernel, dim3(n_block), dim3(256), sizeof(BlockMemory), nullptr,
                      out.data(), total.data()) == cudaSuccess,
          "launch");
    const std::vector<int> got = out.fetch();
    for (int i = 0; i < 256; i++) {
        const size_t at = static_cast<size_t>(i);
        CHECK(got[at] == (255 - i) * (255 - i), "reversed %d: %d", i, got[at]);
        CHECK(got[256 + at] == 255 * 128 + 255, "block_sum + block_max in thread %d: %d", i,
              got[256 + at]);
        CHECK(got[512 + at] == 86 * 4 + 2, "predicates in thread %d: %d", i, got[512 + at]);
        if (i < 64) CHECK(got[768 + at] == 1000 + i, "handed over %d: %d", i, got[768 + at]);
    }
    CHECK(total.fetch()[0] == n_block * 255 * 128, "atomicAdd: %llu", total.fetch()[0]);
    CHECK(total.fetch()[1] == 255, "atomicMax: %llu", total.fetch()[1]);
}

__global__ void exp2_kernel(const float *x, float *y, int n) {
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) y[i] = ptx_exp2(x[i]);
}

/* 2^-22 relative is what the ISA promises; both sides round once more. */
void check_exp2() {
    std::vector<float> x;
    for (int i = 0; i < 490; i++)
        x.push_back(-120.0f + 0.5f * static_cast<float>(i) + 0.013f * static_cast<float>(i % 7));
    device_array<float> device_x(x), device_y(x.size() + 1);
    const int n = static_cast<int>(x.size());
    CHECK(ifkv_launch(exp2_kernel, dim3(ceil_div(n, 64)), dim3(64), 0, nullptr, device_x.data(),
                      device_y.data(), n) == cudaSuccess,
          "launch");
    const std::vector<float> y = device_y.fetch();
    for (size_t i = 0; i < x.size(); i++) {
        const double want = exp2(static_cast<double>(x[i])),
                     error = fabs(static_cast<double>(y[i]) - want);
        CHECK(error <= want * (0x1p-22 + 0x1p-24), "2^%g: %g, want %g", static_cast<double>(x[i]),
              static_cast<double>(y[i]), want);
    }
    device_array<float> special(std::vector<float>{-INFINITY, -200.0f, 0.0f}), result(3);
    CHECK(ifkv_launch(exp2_kernel, dim3(1), dim3(32), 0, nullptr, special.data(), result.data(),
                      3) == cudaSuccess,
          "launch");
    CHECK(result.fetch()[0] == 0 && result.fetch()[1] == 0 && result.fetch()[2] == 1,
          "2^-inf, 2^-200 and 2^0");
}

void check_configurations() {
    device_array<float> x(1);
    CHECK(ifkv_launch(exp2_kernel, dim3(0), dim3(32), 0, nullptr, x.data(), x.data(), 0) !=
              cudaSuccess,
          "a grid of nothing is refused");
    CHECK(ifkv_launch(exp2_kernel, dim3(1), dim3(1025), 0, nullptr, x.data(), x.data(), 0) !=
              cudaSuccess,
          "1025 threads are refused");
    CHECK(ifkv_launch(exp2_kernel, dim3(1), dim3(32), 228 * 1024, nullptr, x.data(), x.data(), 0) !=
              cudaSuccess,
          "228 KiB of shared memory are refused");
}

} // namespace

void check_warp() {
    check_shuffles();
    check_votes();
    check_indices();
    check_blocks();
    check_exp2();
    check_configurations();
}
