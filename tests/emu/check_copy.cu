/* cp.async: bytes, zero fill, groups. */
#include "checks.h"
#include "device.h"
#include "ptx.cuh"

namespace {

constexpr int n_thread = 64, n_stage = 3, n_round = 7;

struct Stages {
    __align__(16) unsigned char bytes[n_stage][n_thread][16];
};

/* A ring of stages: round r is asked for two rounds ahead and read by the neighbour of the thread
 * that copied it. */
__global__ void __launch_bounds__(n_thread)
    ring_kernel(const unsigned char *in, const uint32_t *sizes, unsigned char *out) {
    Stages &stages = ifkv_shared<Stages>();
    const int i = static_cast<int>(threadIdx.x);
    const auto ask = [&](int round) {
        if (round < n_round) {
            const int at = round * n_thread + i;
            if (sizes[at] == 16)
                ptx_cp_async_16(stages.bytes[round % n_stage][i], in + at * 16);
            else
                ptx_cp_async_16_zfill(stages.bytes[round % n_stage][i], in + at * 16, sizes[at]);
        }
        ptx_cp_async_commit(); // also an empty group, so that the count below holds
    };
    ask(0);
    ask(1);
    for (int round = 0; round < n_round; round++) {
        ptx_cp_async_wait<1>();
        __syncthreads(); // everybody's part of this round is here, and everybody is done with the
                         // round before
        ask(round + 2);
        const int neighbour = (i + 33) % n_thread;
        for (int byte = 0; byte < 16; byte++)
            out[(round * n_thread + neighbour) * 16 + byte] =
                stages.bytes[round % n_stage][neighbour][byte];
    }
    ptx_cp_async_wait<0>();
}

} // namespace

void check_copy() {
    const size_t n = n_round * n_thread;
    check_random random = {3};
    std::vector<unsigned char> in(n * 16);
    std::vector<uint32_t> sizes(n);
    for (unsigned char &byte : in) byte = static_cast<unsigned char>(random.between(1, 255));
    for (uint32_t &size : sizes)
        size = static_cast<uint32_t>(random.between(0, 3) ? 16 : random.between(0, 15));
    device_array<unsigned char> device_in(in), out(n * 16);
    device_array<uint32_t> device_sizes(sizes);
    CHECK(ifkv_launch(ring_kernel, dim3(1), dim3(n_thread), sizeof(Stages), nullptr,
                      device_in.data(), device_sizes.data(), out.data()) == cudaSuccess,
          "launch");
    const std::vector<unsigned char> got = out.fetch();
    for (size_t i = 0; i < n; i++)
        for (size_t byte = 0; byte < 16; byte++) {
            const int want = byte < sizes[i] ? in[i * 16 + byte] : 0;
            CHECK(got[i * 16 + byte] == want,
                  "cp.async of %u bytes, copy %zu byte %zu: %d, want %d", sizes[i], i, byte,
                  got[i * 16 + byte], want);
        }
}
