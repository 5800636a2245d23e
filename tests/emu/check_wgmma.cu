/* wgmma: descriptors, all k steps and chunks of 64, shared and register operands, every N; and a
 * warp-specialised product in which loads, products, registers and stores overlap. */
#include "checks.h"
#include "device.h"
#include "ptx.cuh"

namespace {

constexpr int m = 64, depth = 128, chunk = 64, k_step = 16,
              row_bytes = 128; // a row of a 64-wide chunk of bf16

struct Operands {
    __align__(1024) unsigned char a[depth / chunk * m * row_bytes];
    __align__(1024) unsigned char b[depth / chunk * 256 * row_bytes];
};

/* Write [n_row, n_col] bf16 as [n_col/64][n_row][64], the 16-byte pieces of a row swizzled by its
 * number. */
__device__ void store_swizzled(unsigned char *to, const uint16_t *from, int n_row, int n_col) {
    for (int i = static_cast<int>(threadIdx.x); i < n_row * n_col;
         i += static_cast<int>(blockDim.x)) {
        const int row = i / n_col, col = i % n_col, piece = col % chunk / 8;
        *reinterpret_cast<uint16_t *>(to + (col / chunk * n_row + row) * row_bytes +
                                      (piece ^ (row & 7)) * 16 + col % 8 * 2) = from[i];
    }
}

/* d [64, n] = a [64, 128] * b, b [n, 128] K-major or [128, n] MN-major, in eight k steps. */
template <int n, int trans_b, bool is_rs>
__global__ void __launch_bounds__(128)
    product_kernel(const uint16_t *a, const uint16_t *b, float *d) {
    Operands &memory = ifkv_shared<Operands>();
    store_swizzled(memory.a, a, m, depth);
    if (trans_b)
        store_swizzled(memory.b, b, depth, n);
    else
        store_swizzled(memory.b, b, n, depth);
    ptx_fence_proxy_async();
    __syncthreads();

    const int row = 16 * warp_index() + lane_index() / 4, col = 2 * (lane_index() % 4);
    const auto word = [&](int r, int k) {
        return a[r * depth + k] | static_cast<uint32_t>(a[r * depth + k + 1]) << 16;
    };
    uint32_t a_frag[depth / k_step][4];
#pragma unroll
    for (int step = 0; step < depth / k_step; step++) {
        const int k = step * k_step + col;
        a_frag[step][0] = word(row, k);
        a_frag[step][1] = word(row + 8, k);
        a_frag[step][2] = word(row, k + 8);
        a_frag[step][3] = word(row + 8, k + 8);
    }
    float sum[n / 2];
#pragma unroll
    for (int i = 0; i < n / 2; i++) sum[i] = 12345.0f; // what scale-d 0 must ignore
    ptx_pin(sum);
    ptx_wgmma_fence();
#pragma unroll
    for (int step = 0; step < depth / k_step; step++) {
        const int k_chunk = step / (chunk / k_step), k_in = step % (chunk / k_step);
        const uint64_t a_from =
            ptx_wgmma_descriptor(memory.a + k_chunk * m * row_bytes + k_in * 32, 16, 1024);
        const uint64_t b_from =
            trans_b
                ? ptx_wgmma_descriptor(memory.b + step * k_step * row_bytes, depth * row_bytes,
                                       1024)
                : ptx_wgmma_descriptor(memory.b + k_chunk * n * row_bytes + k_in * 32, 16, 1024);
        if (is_rs)
            ptx_wgmma_rs<trans_b>(sum, a_frag[step], b_from, step > 0);
        else
            ptx_wgmma_ss<trans_b>(sum, a_from, b_from, step > 0);
    }
    ptx_wgmma_commit();
    ptx_wgmma_wait<0>();
    ptx_pin(sum);
#pragma unroll
    for (int i = 0; i < n / 2; i++) // the table of ptx.cuh
        d[(row + i / 2 % 2 * 8) * n + i / 4 * 8 + col + i % 2] = sum[i];
}

void check_product(const char *what, int n, const std::vector<int> &a, const std::vector<int> &b,
                   bool trans_b, const std::vector<float> &d) {
    for (int row = 0; row < m; row++)
        for (int col = 0; col < n; col++) {
            int want = 0;
            for (int k = 0; k < depth; k++)
                want += a[static_cast<size_t>(row * depth + k)] *
                        b[static_cast<size_t>(trans_b ? k * n + col : col * depth + k)];
            const float is = d[static_cast<size_t>(row * n + col)];
            CHECK(is == static_cast<float>(want), "%s N %d trans %d (%d, %d): %g, want %d", what, n,
                  trans_b, row, col, static_cast<double>(is), want);
        }
}

template <int n, int trans_b, bool is_rs> void check_products() {
    std::vector<int> a, b;
    std::vector<uint16_t> a_bits = random_bf16(m * depth, 100, 4, &a);
    const std::vector<uint16_t> b_bits = random_bf16(static_cast<size_t>(n * depth), 100, 5, &b);
    for (int shift = -1; shift < depth;
         shift += 43) { // then one-hot rows: row r picks line r + shift of b
        for (int i = 0; shift >= 0 && i < m * depth; i++) {
            a[static_cast<size_t>(i)] = i % depth == (i / depth + shift) % depth;
            a_bits[static_cast<size_t>(i)] =
                bf16_bits(static_cast<float>(a[static_cast<size_t>(i)]));
        }
        device_array<uint16_t> device_a(a_bits), device_b(b_bits);
        device_array<float> d(static_cast<size_t>(m * n));
        CHECK(ifkv_launch(product_kernel<n, trans_b, is_rs>, dim3(1), dim3(128), sizeof(Operands),
                          nullptr, device_a.data(), device_b.data(), d.data()) == cudaSuccess,
              "launch");
        check_product(is_rs ? "wgmma rs" : "wgmma ss", n, a, b, trans_b, d.fetch());
    }
}

template <int n> void check_width() {
    check_products<n, 0, false>();
    check_products<n, 0, true>();
    if constexpr (n % chunk == 0) { // MN-major comes in chunks of 64
        check_products<n, 1, false>();
        check_products<n, 1, true>();
    }
}

constexpr int tile_n = 128, n_stage = 2, n_consumer = 2, n_thread = 128 * (1 + n_consumer);

struct Pipeline {
    __align__(1024) unsigned char a[n_stage][n_consumer][m * row_bytes];
    __align__(1024) unsigned char b[n_stage][tile_n * row_bytes];
    __align__(1024) uint16_t d[n_consumer][m * chunk];
    uint64_t full[n_stage], empty[n_stage];
};

__device__ void wait(uint64_t *barrier, uint32_t parity) {
    while (!ptx_mbarrier_try_wait(barrier, parity)) {
    }
}

__device__ void produce(Pipeline &memory, const CUtensorMap *a, const CUtensorMap *b, int n_block) {
    for (int i = 0; i < n_block; i++) {
        const int stage = i % n_stage;
        wait(&memory.empty[stage], (static_cast<uint32_t>(i / n_stage) & 1) ^ 1);
        ptx_mbarrier_arrive_expect_tx(
            &memory.full[stage], static_cast<uint32_t>(sizeof memory.a[0] + sizeof memory.b[0]));
        for (int c = 0; c < n_consumer; c++)
            ptx_tma_load_2d(memory.a[stage][c], a, &memory.full[stage], i * chunk, c * m);
        ptx_tma_load_2d(memory.b[stage], b, &memory.full[stage], i * chunk, 0);
    }
}

/* Columns 0..63 of this consumer's rows, rounded to bf16, through shared memory and the map's
 * clipping. */
__device__ void store_half(Pipeline &memory, const CUtensorMap *d, int c,
                           const float (&sum)[tile_n / 2], int half) {
    const int warp = warp_index() % 4, lane = lane_index(), matrix = lane / 8,
              row = 16 * warp + lane % 8 + 8 * (matrix % 2);
#pragma unroll
    for (int i = 0; i < 4; i++) { // 16 columns at a time: four 8x8 matrices
        const int base = half * 32 + i * 8;
        const uint32_t frag[4] = {
            pack_bf16(sum[base], sum[base + 1]), pack_bf16(sum[base + 2], sum[base + 3]),
            pack_bf16(sum[base + 4], sum[base + 5]), pack_bf16(sum[base + 6], sum[base + 7])};
        const int piece = 2 * i + matrix / 2;
        ptx_stmatrix_x4(&memory.d[c][row * chunk + (piece ^ (row & 7)) * 8], frag);
    }
    ptx_fence_proxy_async();
    ptx_bar_sync(1 + c, 128);
    if (warp == 0 && ptx_elect_one()) {
        ptx_tma_store_2d(d, memory.d[c], half * chunk, c * m);
        ptx_bulk_commit();
        ptx_bulk_wait_read<0>();
    }
    ptx_bar_sync(1 + c, 128);
}

__device__ void consume(Pipeline &memory, const CUtensorMap *d, int c, int n_block) {
    float sum[tile_n / 2];
    for (int i = 0; i < n_block; i++) {
        const int stage = i % n_stage;
        wait(&memory.full[stage], static_cast<uint32_t>(i / n_stage) & 1);
        const uint64_t a = ptx_wgmma_descriptor(memory.a[stage][c], 16, 1024),
                       b = ptx_wgmma_descriptor(memory.b[stage], 16, 1024);
        ptx_pin(sum);
        ptx_wgmma_fence();
#pragma unroll
        for (int k = 0; k < chunk / k_step; k++)
            ptx_wgmma_ss<0>(sum, ptx_wgmma_descriptor_advance(a, static_cast<uint32_t>(k) * 32),
                            ptx_wgmma_descriptor_advance(b, static_cast<uint32_t>(k) * 32),
                            i + k > 0);
        ptx_wgmma_commit();
        ptx_wgmma_wait<0>();
        ptx_pin(sum);
        if (threadIdx.x % 128 == 0) ptx_mbarrier_arrive(&memory.empty[stage]);
    }
    store_half(memory, d, c, sum, 0);
    store_half(memory, d, c, sum, 1);
}

/* d [128, 128] bf16 = a [128, 64 n_block] * b [128, 64 n_block]^T: one warp loads, two warpgroups
 * multiply. */
__global__ void __launch_bounds__(n_thread, 1)
    pipeline_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
                    const __grid_constant__ CUtensorMap d, int n_block) {
    Pipeline &memory = ifkv_shared<Pipeline>();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < n_stage; stage++) {
            ptx_mbarrier_init(&memory.full[stage], 1);
            ptx_mbarrier_init(&memory.empty[stage], n_consumer);
        }
        ptx_fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        ptx_setmaxnreg_dec<24>();
        if (warp_index() == 0 && ptx_elect_one()) produce(memory, &a, &b, n_block);
    } else {
        ptx_setmaxnreg_inc<240>();
        consume(memory, &d, static_cast<int>(threadIdx.x) / 128 - 1, n_block);
    }
}

void check_pipeline() {
    constexpr int rows = n_consumer * m, d_rows = 125, n_block = 7,
                  columns = n_block * chunk; // the last three rows are clipped
    std::vector<int> a, b;
    const std::vector<uint16_t> a_bits = random_bf16(rows * columns, 1, 6, &a),
                                b_bits = random_bf16(tile_n * columns, 1, 7, &b);
    device_array<uint16_t> device_a(a_bits), device_b(b_bits),
        device_d(std::vector<uint16_t>(rows * tile_n, 7));
    const std::vector<cuuint64_t> in_stride = {columns * 2}, out_stride = {tile_n * 2};
    const CUtensorMap a_map = device_tensor_map(device_a.data(), {columns, rows}, in_stride,
                                                {chunk, m}, CU_TENSOR_MAP_SWIZZLE_128B);
    const CUtensorMap b_map = device_tensor_map(device_b.data(), {columns, tile_n}, in_stride,
                                                {chunk, tile_n}, CU_TENSOR_MAP_SWIZZLE_128B);
    const CUtensorMap d_map = device_tensor_map(device_d.data(), {tile_n, d_rows}, out_stride,
                                                {chunk, m}, CU_TENSOR_MAP_SWIZZLE_128B);
    CHECK(ifkv_launch(pipeline_kernel, dim3(1), dim3(n_thread), sizeof(Pipeline), nullptr, a_map,
                      b_map, d_map, n_block) == cudaSuccess,
          "launch");
    const std::vector<uint16_t> d = device_d.fetch();
    for (int row = 0; row < rows; row++)
        for (int col = 0; col < tile_n; col++) {
            int sum = 0; // of 448 products of -1, 0, 1: bf16 rounds it like any number
            for (int k = 0; k < columns; k++)
                sum += a[static_cast<size_t>(row * columns + k)] *
                       b[static_cast<size_t>(col * columns + k)];
            const uint16_t want = row < d_rows ? bf16_bits(static_cast<float>(sum)) : 7,
                           is = d[static_cast<size_t>(row * tile_n + col)];
            CHECK(is == want, "pipeline (%d, %d): %04x, want %04x", row, col, is, want);
        }
}

} // namespace

void check_wgmma() {
    check_width<64>();
    check_width<128>();
    check_width<176>();
    check_width<192>();
    check_width<256>();
    check_pipeline();
}
