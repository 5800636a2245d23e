/* The instructions of cuda/ptx.cuh on the host execution model: same names, same arguments, and the
 * place of the call.
 *
 * What each does is written in ptx.cuh and the PTX ISA; what the model checks stands beside the
 * implementations. */
#ifndef IFKV_EMU_PTX_H
#define IFKV_EMU_PTX_H

#include "emu_place.h"

#include <cuda.h>
#include <stddef.h>
#include <stdint.h>

/* Offset in the block's shared window, which is what the 32-bit address is on a GPU. */
uint32_t ptx_shared_address(const void *shared, emu_place at = emu_here());
float ptx_exp2(float x);
uint64_t ptx_globaltimer();

/* Warp-level matrices. */
void emu_ldmatrix(int n, bool trans, uint32_t *frag, const void *row, emu_place at);
void emu_stmatrix(int n, bool trans, const uint32_t *frag, void *row, emu_place at);
inline void ptx_ldmatrix_x1(uint32_t &frag, const void *row, emu_place at = emu_here()) {
    emu_ldmatrix(1, false, &frag, row, at);
}
inline void ptx_ldmatrix_x1_trans(uint32_t &frag, const void *row, emu_place at = emu_here()) {
    emu_ldmatrix(1, true, &frag, row, at);
}
inline void ptx_ldmatrix_x2(uint32_t (&frag)[2], const void *row, emu_place at = emu_here()) {
    emu_ldmatrix(2, false, frag, row, at);
}
inline void ptx_ldmatrix_x2_trans(uint32_t (&frag)[2], const void *row, emu_place at = emu_here()) {
    emu_ldmatrix(2, true, frag, row, at);
}
inline void ptx_ldmatrix_x4(uint32_t (&frag)[4], const void *row, emu_place at = emu_here()) {
    emu_ldmatrix(4, false, frag, row, at);
}
inline void ptx_ldmatrix_x4_trans(uint32_t (&frag)[4], const void *row, emu_place at = emu_here()) {
    emu_ldmatrix(4, true, frag, row, at);
}
inline void ptx_stmatrix_x1(void *row, uint32_t frag, emu_place at = emu_here()) {
    emu_stmatrix(1, false, &frag, row, at);
}
inline void ptx_stmatrix_x1_trans(void *row, uint32_t frag, emu_place at = emu_here()) {
    emu_stmatrix(1, true, &frag, row, at);
}
inline void ptx_stmatrix_x2(void *row, const uint32_t (&frag)[2], emu_place at = emu_here()) {
    emu_stmatrix(2, false, frag, row, at);
}
inline void ptx_stmatrix_x2_trans(void *row, const uint32_t (&frag)[2], emu_place at = emu_here()) {
    emu_stmatrix(2, true, frag, row, at);
}
inline void ptx_stmatrix_x4(void *row, const uint32_t (&frag)[4], emu_place at = emu_here()) {
    emu_stmatrix(4, false, frag, row, at);
}
inline void ptx_stmatrix_x4_trans(void *row, const uint32_t (&frag)[4], emu_place at = emu_here()) {
    emu_stmatrix(4, true, frag, row, at);
}
void ptx_mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                      emu_place at = emu_here());
bool ptx_elect_one(emu_place at = emu_here());

/* cp.async. */
void ptx_cp_async_16_zfill(void *shared, const void *global, uint32_t bytes,
                           emu_place at = emu_here());
inline void ptx_cp_async_16(void *shared, const void *global, emu_place at = emu_here()) {
    ptx_cp_async_16_zfill(shared, global, 16, at);
}
void ptx_cp_async_commit(emu_place at = emu_here());
void emu_cp_async_wait(int n, emu_place at);
template <int n> void ptx_cp_async_wait(emu_place at = emu_here()) {
    emu_cp_async_wait(n, at);
}

/* Barriers. */
void ptx_bar_sync(int id, int threads, emu_place at = emu_here());
void ptx_bar_arrive(int id, int threads, emu_place at = emu_here());
void ptx_mbarrier_init(uint64_t *barrier, uint32_t arrivals, emu_place at = emu_here());
void ptx_mbarrier_inval(uint64_t *barrier, emu_place at = emu_here());
void ptx_mbarrier_arrive(uint64_t *barrier, emu_place at = emu_here());
void ptx_mbarrier_arrive_expect_tx(uint64_t *barrier, uint32_t bytes, emu_place at = emu_here());
void ptx_mbarrier_expect_tx(uint64_t *barrier, uint32_t bytes, emu_place at = emu_here());
bool ptx_mbarrier_try_wait(uint64_t *barrier, uint32_t parity, emu_place at = emu_here());
void ptx_fence_proxy_async(emu_place at = emu_here());
void ptx_fence_proxy_async_global(emu_place at = emu_here());
void ptx_fence_mbarrier_init(emu_place at = emu_here());

/* Bulk tensor copies. */
void emu_tma_load(int rank, void *shared, const CUtensorMap *map, uint64_t *barrier,
                  const int *coordinates, emu_place at);
void emu_tma_store(int rank, const CUtensorMap *map, const void *shared, const int *coordinates,
                   emu_place at);
void ptx_tensormap_prefetch(const CUtensorMap *map, emu_place at = emu_here());
inline void ptx_tma_load_2d(void *shared, const CUtensorMap *map, uint64_t *barrier, int c0, int c1,
                            emu_place at = emu_here()) {
    const int coordinates[] = {c0, c1};
    emu_tma_load(2, shared, map, barrier, coordinates, at);
}
inline void ptx_tma_load_3d(void *shared, const CUtensorMap *map, uint64_t *barrier, int c0, int c1,
                            int c2, emu_place at = emu_here()) {
    const int coordinates[] = {c0, c1, c2};
    emu_tma_load(3, shared, map, barrier, coordinates, at);
}
inline void ptx_tma_load_4d(void *shared, const CUtensorMap *map, uint64_t *barrier, int c0, int c1,
                            int c2, int c3, emu_place at = emu_here()) {
    const int coordinates[] = {c0, c1, c2, c3};
    emu_tma_load(4, shared, map, barrier, coordinates, at);
}
inline void ptx_tma_store_2d(const CUtensorMap *map, const void *shared, int c0, int c1,
                             emu_place at = emu_here()) {
    const int coordinates[] = {c0, c1};
    emu_tma_store(2, map, shared, coordinates, at);
}
inline void ptx_tma_store_3d(const CUtensorMap *map, const void *shared, int c0, int c1, int c2,
                             emu_place at = emu_here()) {
    const int coordinates[] = {c0, c1, c2};
    emu_tma_store(3, map, shared, coordinates, at);
}
inline void ptx_tma_store_4d(const CUtensorMap *map, const void *shared, int c0, int c1, int c2,
                             int c3, emu_place at = emu_here()) {
    const int coordinates[] = {c0, c1, c2, c3};
    emu_tma_store(4, map, shared, coordinates, at);
}
void ptx_bulk_commit(emu_place at = emu_here());
void emu_bulk_wait(int n, bool is_read, emu_place at);
template <int n> void ptx_bulk_wait(emu_place at = emu_here()) {
    emu_bulk_wait(n, false, at);
}
template <int n> void ptx_bulk_wait_read(emu_place at = emu_here()) {
    emu_bulk_wait(n, true, at);
}

/* wgmma. */
uint64_t ptx_wgmma_descriptor(const void *shared, uint32_t leading, uint32_t stride,
                              emu_place at = emu_here());
inline uint64_t ptx_wgmma_descriptor_advance(uint64_t descriptor, uint32_t bytes) {
    return descriptor + (bytes >> 4);
}
void ptx_wgmma_fence(emu_place at = emu_here());
void ptx_wgmma_commit(emu_place at = emu_here());
void emu_wgmma_wait(int n, emu_place at);
template <int n> void ptx_wgmma_wait(emu_place at = emu_here()) {
    emu_wgmma_wait(n, at);
}
/* `a_frag` nullptr: a comes from shared memory through `a`. */
void emu_wgmma(int n, bool trans_b, float *d, uint64_t a, const uint32_t *a_frag, uint64_t b,
               int scale_d, emu_place at);
template <int trans_b, size_t half>
void ptx_wgmma_ss(float (&d)[half], uint64_t a, uint64_t b, int scale_d,
                  emu_place at = emu_here()) {
    static_assert(half % 4 == 0 && half <= 128, "N is a multiple of 8 up to 256");
    emu_wgmma(2 * static_cast<int>(half), trans_b != 0, d, a, nullptr, b, scale_d, at);
}
template <int trans_b, size_t half>
void ptx_wgmma_rs(float (&d)[half], const uint32_t (&a)[4], uint64_t b, int scale_d,
                  emu_place at = emu_here()) {
    static_assert(half % 4 == 0 && half <= 128, "N is a multiple of 8 up to 256");
    emu_wgmma(2 * static_cast<int>(half), trans_b != 0, d, 0, a, b, scale_d, at);
}
template <int n> void ptx_pin(float (&values)[n]) {
    asm volatile("" : : "r"(values) : "memory");
}

/* Registers. */
void emu_setmaxnreg(int n, bool is_increase, emu_place at);
template <int n> void ptx_setmaxnreg_inc(emu_place at = emu_here()) {
    static_assert(n % 8 == 0 && n >= 24 && n <= 256, "a multiple of 8 in 24..256");
    emu_setmaxnreg(n, true, at);
}
template <int n> void ptx_setmaxnreg_dec(emu_place at = emu_here()) {
    static_assert(n % 8 == 0 && n >= 24 && n <= 256, "a multiple of 8 in 24..256");
    emu_setmaxnreg(n, false, at);
}

#endif
