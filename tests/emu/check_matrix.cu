/* ldmatrix, stmatrix and mma.sync against the tables of the PTX ISA (restated in ptx.cuh). */
#include "checks.h"
#include "device.h"
#include "ptx.cuh"

namespace {

struct Tile {
    __align__(16) uint16_t rows[32][8];
};

// Row whose address lane i gives: a permutation, so that addresses and lanes are told apart.
__host__ __device__ int row_of_lane(int lane) {
    return lane * 5 % 32;
}

template <int n, bool trans> __device__ void load(uint32_t (&frag)[4], const void *row) {
    uint32_t two[2];
    if (n == 1 && !trans) ptx_ldmatrix_x1(frag[0], row);
    if (n == 1 && trans) ptx_ldmatrix_x1_trans(frag[0], row);
    if (n == 2) {
        if (trans)
            ptx_ldmatrix_x2_trans(two, row);
        else
            ptx_ldmatrix_x2(two, row);
        frag[0] = two[0];
        frag[1] = two[1];
    }
    if (n == 4 && !trans) ptx_ldmatrix_x4(frag, row);
    if (n == 4 && trans) ptx_ldmatrix_x4_trans(frag, row);
}

template <int n, bool trans> __global__ void __launch_bounds__(32) load_kernel(uint32_t *out) {
    Tile &tile = ifkv_shared<Tile>();
    for (int i = lane_index(); i < 32 * 8; i += 32)
        tile.rows[i / 8][i % 8] = static_cast<uint16_t>(i);
    __syncwarp();
    uint32_t frag[4] = {0, 0, 0, 0};
    load<n, trans>(frag, tile.rows[row_of_lane(lane_index())]);
    for (int m = 0; m < n; m++) out[lane_index() * n + m] = frag[m];
}

// Element (row, col) of matrix m as load_kernel filled it.
uint32_t element(int m, int row, int col) {
    return static_cast<uint32_t>(row_of_lane(8 * m + row) * 8 + col);
}

template <int n, bool trans> void check_load() {
    device_array<uint32_t> out(32 * n);
    CHECK(ifkv_launch(load_kernel<n, trans>, dim3(1), dim3(32), sizeof(Tile), nullptr,
                      out.data()) == cudaSuccess,
          "launch");
    const std::vector<uint32_t> got = out.fetch();
    for (int lane = 0; lane < 32; lane++)
        for (int m = 0; m < n; m++) {
            const int r = lane / 4, c = 2 * (lane % 4);
            const uint32_t want = trans ? element(m, c, r) | element(m, c + 1, r) << 16
                                        : element(m, r, c) | element(m, r, c + 1) << 16;
            const uint32_t is = got[static_cast<size_t>(lane * n + m)];
            CHECK(is == want, "ldmatrix x%d trans %d lane %d matrix %d: %08x, want %08x", n, trans,
                  lane, m, is, want);
        }
}

__global__ void __launch_bounds__(32)
    mma_kernel(const uint16_t *a, const uint16_t *b, float *d, int n_product) {
    const int r = lane_index() / 4, c = 2 * (lane_index() % 4);
    for (int i = 0; i < n_product; i++, a += 16 * 16, b += 16 * 8, d += 16 * 8) {
        const auto a_word = [&](int row, int k) {
            return a[row * 16 + k] | static_cast<uint32_t>(a[row * 16 + k + 1]) << 16;
        };
        const auto b_word = [&](int k) {
            return b[k * 8 + r] | static_cast<uint32_t>(b[(k + 1) * 8 + r]) << 16;
        };
        const uint32_t a_frag[4] = {a_word(r, c), a_word(r + 8, c), a_word(r, c + 8),
                                    a_word(r + 8, c + 8)};
        float d_frag[4] = {d[r * 8 + c], d[r * 8 + c + 1], d[(r + 8) * 8 + c],
                           d[(r + 8) * 8 + c + 1]};
        ptx_mma_m16n8k16(d_frag, a_frag, b_word(c), b_word(c + 8));
        d[r * 8 + c] = d_frag[0];
        d[r * 8 + c + 1] = d_frag[1];
        d[(r + 8) * 8 + c] = d_frag[2];
        d[(r + 8) * 8 + c + 1] = d_frag[3];
    }
}

void check_mma(const std::vector<uint16_t> &a_bits, const std::vector<int> &a,
               const std::vector<uint16_t> &b_bits, const std::vector<int> &b, const char *what) {
    const int n = static_cast<int>(a.size() / 256);
    std::vector<float> c(static_cast<size_t>(n) * 128);
    for (size_t i = 0; i < c.size(); i++) c[i] = static_cast<float>(i % 17) - 8;
    device_array<uint16_t> device_a(a_bits), device_b(b_bits);
    device_array<float> device_d(c);
    CHECK(ifkv_launch(mma_kernel, dim3(1), dim3(32), 0, nullptr, device_a.data(), device_b.data(),
                      device_d.data(), n) == cudaSuccess,
          "launch");
    const std::vector<float> d = device_d.fetch();
    for (int i = 0; i < n; i++)
        for (int row = 0; row < 16; row++)
            for (int col = 0; col < 8; col++) {
                const size_t at = static_cast<size_t>(i * 128 + row * 8 + col);
                float want = c[at];
                for (int k = 0; k < 16; k++)
                    want += static_cast<float>(a[static_cast<size_t>(i * 256 + row * 16 + k)] *
                                               b[static_cast<size_t>(i * 128 + k * 8 + col)]);
                CHECK(d[at] == want, "mma %s, product %d (%d, %d): %g, want %g", what, i, row, col,
                      static_cast<double>(d[at]), static_cast<double>(want));
            }
}

/* A one-hot a for each of its 256 places picks one row of b; random integers: every sum is exact.
 */
void check_mma_all() {
    std::vector<int> a(256 * 256), b, wide;
    std::vector<uint16_t> a_bits(a.size());
    for (size_t i = 0; i < 256; i++) a[i * 256 + i] = 1;
    for (size_t i = 0; i < a.size(); i++) a_bits[i] = bf16_bits(static_cast<float>(a[i]));
    const std::vector<uint16_t> b_bits = random_bf16(256 * 128, 100, 1, &b);
    check_mma(a_bits, a, b_bits, b, "one-hot");
    const std::vector<uint16_t> wide_bits = random_bf16(256 * 256, 100, 2, &wide);
    check_mma(wide_bits, wide, b_bits, b, "integers");
}

#ifdef IFKV_CHECK_SM90

template <int n, bool trans> __device__ void store(void *row, const uint32_t (&frag)[4]) {
    const uint32_t two[2] = {frag[0], frag[1]};
    if (n == 1 && !trans) ptx_stmatrix_x1(row, frag[0]);
    if (n == 1 && trans) ptx_stmatrix_x1_trans(row, frag[0]);
    if (n == 2 && !trans) ptx_stmatrix_x2(row, two);
    if (n == 2 && trans) ptx_stmatrix_x2_trans(row, two);
    if (n == 4 && !trans) ptx_stmatrix_x4(row, frag);
    if (n == 4 && trans) ptx_stmatrix_x4_trans(row, frag);
}

template <int n, bool trans> __global__ void __launch_bounds__(32) store_kernel(uint16_t *out) {
    Tile &tile = ifkv_shared<Tile>();
    for (int i = lane_index(); i < 32 * 8; i += 32) tile.rows[i / 8][i % 8] = 9999;
    __syncwarp();
    uint32_t frag[4];
    for (int m = 0; m < 4; m++) { // halves are numbered (lane, matrix, half)
        const uint32_t low = static_cast<uint32_t>(lane_index() * 8 + m * 2);
        frag[m] = low | (low + 1) << 16;
    }
    store<n, trans>(tile.rows[row_of_lane(lane_index())], frag);
    __syncwarp();
    for (int i = lane_index(); i < 32 * 8; i += 32) out[i] = tile.rows[i / 8][i % 8];
}

template <int n, bool trans> void check_store() {
    device_array<uint16_t> out(32 * 8);
    CHECK(ifkv_launch(store_kernel<n, trans>, dim3(1), dim3(32), sizeof(Tile), nullptr,
                      out.data()) == cudaSuccess,
          "launch");
    std::vector<uint16_t> want(32 * 8, 9999);
    for (int lane = 0; lane < 32; lane++)
        for (int m = 0; m < n; m++)
            for (int half = 0; half < 2; half++) {
                const int r = lane / 4, c = 2 * (lane % 4) + half;
                const int row = row_of_lane(8 * m + (trans ? c : r)), col = trans ? r : c;
                want[static_cast<size_t>(row * 8 + col)] =
                    static_cast<uint16_t>(lane * 8 + m * 2 + half);
            }
    const std::vector<uint16_t> got = out.fetch();
    for (size_t i = 0; i < want.size(); i++)
        CHECK(got[i] == want[i], "stmatrix x%d trans %d element %zu: %d, want %d", n, trans, i,
              got[i], want[i]);
}

#endif

} // namespace

void check_matrix() {
    check_load<1, false>();
    check_load<2, false>();
    check_load<4, false>();
    check_load<1, true>();
    check_load<2, true>();
    check_load<4, true>();
    check_mma_all();
#ifdef IFKV_CHECK_SM90
    check_store<1, false>();
    check_store<2, false>();
    check_store<4, false>();
    check_store<1, true>();
    check_store<2, true>();
    check_store<4, true>();
#endif
}
