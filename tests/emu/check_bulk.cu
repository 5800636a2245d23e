/* mbarriers and bulk tensor copies: boxes at the edges of a tensor, swizzles, clipping, bytes
 * counted. */
#include "checks.h"
#include "device.h"
#include "ptx.cuh"

#include <algorithm>

namespace {

constexpr int max_box = 8 * 1024; // bytes

struct BoxMemory {
    __align__(1024) unsigned char box[max_box];
    uint64_t full;
};

__device__ void wait(uint64_t *barrier, uint32_t parity) {
    while (!ptx_mbarrier_try_wait(barrier, parity)) {
    }
}

/* Load one box and write shared memory out as it is. */
template <int rank>
__global__ void __launch_bounds__(64) load_kernel(const __grid_constant__ CUtensorMap map, int4 at,
                                                  uint32_t bytes, unsigned char *out) {
    BoxMemory &memory = ifkv_shared<BoxMemory>();
    if (threadIdx.x == 0) {
        ptx_tensormap_prefetch(&map);
        ptx_mbarrier_init(&memory.full, 1);
        ptx_fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx_mbarrier_arrive_expect_tx(&memory.full, bytes);
        if (rank == 2) ptx_tma_load_2d(memory.box, &map, &memory.full, at.x, at.y);
        if (rank == 3) ptx_tma_load_3d(memory.box, &map, &memory.full, at.x, at.y, at.z);
        if (rank == 4) ptx_tma_load_4d(memory.box, &map, &memory.full, at.x, at.y, at.z, at.w);
    }
    wait(&memory.full, 0);
    for (uint32_t i = threadIdx.x; i < bytes; i += blockDim.x) out[i] = memory.box[i];
}

/* Store one box whose dense element i is 1 + i, placed by the swizzle; then a second one through
 * the same memory. */
template <int rank>
__global__ void __launch_bounds__(64) store_kernel(const __grid_constant__ CUtensorMap map, int4 at,
                                                   uint32_t bytes, int swizzle_bits) {
    BoxMemory &memory = ifkv_shared<BoxMemory>();
    for (int pass = 0; pass < 2; pass++) {
        for (uint32_t i = threadIdx.x; i < bytes / 2; i += blockDim.x) {
            const uint32_t linear = 2 * i,
                           swizzled = linear ^ (linear >> 7 & ((1u << swizzle_bits) - 1)) << 4;
            *reinterpret_cast<uint16_t *>(memory.box + swizzled) = static_cast<uint16_t>(1 + i);
        }
        ptx_fence_proxy_async();
        __syncthreads();
        if (threadIdx.x == 0) {
            if (rank == 2) ptx_tma_store_2d(&map, memory.box, at.x, at.y);
            if (rank == 3) ptx_tma_store_3d(&map, memory.box, at.x, at.y, at.z);
            if (rank == 4) ptx_tma_store_4d(&map, memory.box, at.x, at.y, at.z, at.w);
            ptx_bulk_commit();
            ptx_bulk_wait_read<0>();
        }
        __syncthreads();
        at.y += 1; // overlaps the first: the later one must come to lie on top
        if (threadIdx.x == 0) ptx_bulk_wait<0>();
    }
}

/* A tensor with a gap after each row, and a box of it. */
struct Shape {
    int rank;
    int dims[4], box[4], pitch; // elements; pitch of a row
    CUtensorMapSwizzle swizzle;
    int swizzle_bits;
};

const Shape shapes[] = {
    {2, {100, 37, 1, 1}, {64, 16, 1, 1}, 104, CU_TENSOR_MAP_SWIZZLE_128B, 3},
    {2, {100, 37, 1, 1}, {32, 8, 1, 1}, 104, CU_TENSOR_MAP_SWIZZLE_64B, 2},
    {2, {100, 37, 1, 1}, {16, 8, 1, 1}, 112, CU_TENSOR_MAP_SWIZZLE_32B, 1},
    {2, {100, 37, 1, 1}, {40, 5, 1, 1}, 104, CU_TENSOR_MAP_SWIZZLE_NONE, 0},
    {3, {64, 11, 5, 1}, {64, 8, 2, 1}, 64, CU_TENSOR_MAP_SWIZZLE_128B, 3},
    {4, {128, 9, 3, 2}, {64, 4, 2, 2}, 136, CU_TENSOR_MAP_SWIZZLE_128B, 3},
};

// Corners: inside, before the start, across the end, wholly outside.
const int corners[][4] = {{0, 0, 0, 0},   {8, 3, 1, 0},   {-16, -2, 0, 0}, {80, 30, 2, 1},
                          {40, 35, 4, 1}, {200, 0, 0, 0}, {0, -100, 0, 0}};

size_t tensor_elements(const Shape &shape) {
    return static_cast<size_t>(shape.pitch) *
           static_cast<size_t>(shape.dims[1] * shape.dims[2] * shape.dims[3]);
}

CUtensorMap tensor_map(const Shape &shape, void *address) {
    std::vector<cuuint64_t> dims, strides;
    std::vector<cuuint32_t> box;
    cuuint64_t stride = static_cast<cuuint64_t>(shape.pitch) * 2;
    for (int i = 0; i < shape.rank; i++) {
        dims.push_back(static_cast<cuuint64_t>(shape.dims[i]));
        box.push_back(static_cast<cuuint32_t>(shape.box[i]));
        if (i == 0) continue;
        strides.push_back(stride);
        stride *= dims.back();
    }
    return device_tensor_map(address, dims, strides, box, shape.swizzle);
}

/* Call work(element of the tensor or -1, element of the dense box). */
template <typename F> void each_element(const Shape &shape, const int (&corner)[4], F work) {
    int dense = 0;
    for (int w = 0; w < shape.box[3]; w++)
        for (int z = 0; z < shape.box[2]; z++)
            for (int y = 0; y < shape.box[1]; y++)
                for (int x = 0; x < shape.box[0]; x++, dense++) {
                    const int at[4] = {corner[0] + x, corner[1] + y, corner[2] + z, corner[3] + w};
                    bool is_inside = true;
                    for (int i = 0; i < 4; i++)
                        is_inside =
                            is_inside && (i >= shape.rank || (at[i] >= 0 && at[i] < shape.dims[i]));
                    const int z_at = shape.rank > 2 ? at[2] : 0, w_at = shape.rank > 3 ? at[3] : 0;
                    work(is_inside ? ((w_at * shape.dims[2] + z_at) * shape.dims[1] + at[1]) *
                                             shape.pitch +
                                         at[0]
                                   : -1,
                         dense);
                }
}

uint32_t box_bytes(const Shape &shape) {
    return static_cast<uint32_t>(2 * shape.box[0] * shape.box[1] * shape.box[2] * shape.box[3]);
}

template <int rank> void check_load(const Shape &shape, const int (&corner)[4]) {
    std::vector<uint16_t> tensor(tensor_elements(shape));
    for (size_t i = 0; i < tensor.size(); i++) tensor[i] = static_cast<uint16_t>(1 + i % 60000);
    device_array<uint16_t> device_tensor(tensor);
    const uint32_t bytes = box_bytes(shape);
    device_array<unsigned char> out(bytes);
    const CUtensorMap map = tensor_map(shape, device_tensor.data());
    const int4 at = make_int4(corner[0], corner[1], corner[2], corner[3]);
    CHECK(ifkv_launch(load_kernel<rank>, dim3(1), dim3(64), sizeof(BoxMemory), nullptr, map, at,
                      bytes, out.data()) == cudaSuccess,
          "launch");
    const std::vector<unsigned char> got = out.fetch();
    each_element(shape, corner, [&](int element, int dense) {
        const uint32_t linear = static_cast<uint32_t>(2 * dense),
                       at_byte = linear ^ (linear >> 7 & ((1u << shape.swizzle_bits) - 1)) << 4;
        const int want = element < 0 ? 0 : tensor[static_cast<size_t>(element)],
                  is = got[at_byte] | got[at_byte + 1] << 8;
        CHECK(is == want, "load rank %d swizzle %d from (%d, %d, %d, %d), element %d: %d, want %d",
              rank, shape.swizzle_bits, corner[0], corner[1], corner[2], corner[3], dense, is,
              want);
    });
}

template <int rank> void check_store(const Shape &shape, const int (&corner)[4]) {
    const std::vector<uint16_t> before(tensor_elements(shape), 7);
    device_array<uint16_t> device_tensor(before);
    const CUtensorMap map = tensor_map(shape, device_tensor.data());
    const int4 at = make_int4(corner[0], corner[1], corner[2], corner[3]);
    CHECK(ifkv_launch(store_kernel<rank>, dim3(1), dim3(64), sizeof(BoxMemory), nullptr, map, at,
                      box_bytes(shape), shape.swizzle_bits) == cudaSuccess,
          "launch");
    std::vector<uint16_t> want = before;
    for (int pass = 0; pass < 2; pass++) {
        const int moved[4] = {corner[0], corner[1] + pass, corner[2], corner[3]};
        each_element(shape, moved, [&](int element, int dense) {
            if (element >= 0) want[static_cast<size_t>(element)] = static_cast<uint16_t>(1 + dense);
        });
    }
    const std::vector<uint16_t> got = device_tensor.fetch();
    for (size_t i = 0; i < want.size(); i++)
        CHECK(got[i] == want[i],
              "store rank %d swizzle %d to (%d, %d, %d, %d), tensor element %zu: %d, want %d", rank,
              shape.swizzle_bits, corner[0], corner[1], corner[2], corner[3], i, got[i], want[i]);
}

template <int rank> void check_boxes() {
    for (const Shape &shape : shapes)
        for (const auto &corner : corners) {
            if (shape.rank != rank) continue;
            check_load<rank>(shape, corner);
            check_store<rank>(shape, corner);
        }
}

/* What the driver refuses: one thing wrong at a time. */
void check_refusals() {
    device_array<uint16_t> memory(64 * 64);
    unsigned char *address = reinterpret_cast<unsigned char *>(memory.data());
    const CUtensorMapSwizzle wide = CU_TENSOR_MAP_SWIZZLE_128B, none = CU_TENSOR_MAP_SWIZZLE_NONE;
    CUtensorMap map;
    const auto is_refused = [&](unsigned char *at, cuuint64_t stride, cuuint32_t inner,
                                cuuint32_t rows, CUtensorMapSwizzle swizzle) {
        return device_encode(&map, at, {64, 32}, {stride}, {inner, rows}, swizzle) ==
               CUDA_ERROR_INVALID_VALUE;
    };
    CHECK(!is_refused(address, 128, 64, 32, wide), "a map without fault is made");
    CHECK(is_refused(address + 8, 128, 64, 32, wide), "an address off 16 bytes is refused");
    CHECK(is_refused(address, 136, 64, 32, wide), "a stride off 16 bytes is refused");
    CHECK(is_refused(address, 128, 72, 32, wide), "rows of a box beyond the swizzle are refused");
    CHECK(is_refused(address, 128, 64, 257, wide), "a box of 257 rows is refused");
    CHECK(is_refused(address, 128, 4, 32, none), "rows of 8 bytes are refused");
}

struct PhaseMemory {
    uint64_t full, empty;
    int value;
};

/* One thread hands numbers to 32 others, one place, `n` times: parities turn with every phase. */
__global__ void __launch_bounds__(64) phase_kernel(int *out, int n) {
    PhaseMemory &memory = ifkv_shared<PhaseMemory>();
    if (threadIdx.x == 0) {
        ptx_mbarrier_init(&memory.full, 1);
        ptx_mbarrier_init(&memory.empty, 32);
        ptx_fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x == 32) {
        for (int i = 0; i < n; i++) {
            wait(&memory.empty, (i & 1) ^ 1); // passes on the fresh barrier
            memory.value = 100 + i;
            ptx_mbarrier_arrive(&memory.full);
        }
    } else if (threadIdx.x < 32) {
        for (int i = 0; i < n; i++) {
            wait(&memory.full, i & 1);
            out[i * 32 + static_cast<int>(threadIdx.x)] = memory.value;
            ptx_mbarrier_arrive(&memory.empty);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx_mbarrier_inval(&memory.full);
        ptx_mbarrier_inval(&memory.empty);
    }
}

void check_phases() {
    constexpr int n = 9;
    device_array<int> out(n * 32);
    CHECK(ifkv_launch(phase_kernel, dim3(1), dim3(64), sizeof(PhaseMemory), nullptr, out.data(),
                      n) == cudaSuccess,
          "launch");
    const std::vector<int> got = out.fetch();
    for (size_t i = 0; i < got.size(); i++)
        CHECK(got[i] == 100 + static_cast<int>(i / 32), "phase %zu thread %zu: %d", i / 32, i % 32,
              got[i]);
}

__global__ void __launch_bounds__(96) elect_kernel(unsigned *out) {
    const unsigned first = __ballot_sync(IFKV_ALL_LANES, ptx_elect_one());
    const unsigned second = __ballot_sync(IFKV_ALL_LANES, ptx_elect_one());
    if (lane_index() == 0) out[warp_index()] = first == second && __popc(first) == 1;
}

void check_elect() {
    device_array<unsigned> out(3);
    CHECK(ifkv_launch(elect_kernel, dim3(1), dim3(96), 0, nullptr, out.data()) == cudaSuccess,
          "launch");
    for (unsigned is_one : out.fetch())
        CHECK(is_one == 1, "elect.sync elects one lane, the same each time");
}

} // namespace

void check_bulk() {
    check_boxes<2>();
    check_boxes<3>();
    check_boxes<4>();
    check_refusals();
    check_phases();
    check_elect();
}
