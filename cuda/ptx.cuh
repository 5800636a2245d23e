/* Each PTX instruction that a kernel uses, as one function of its name; the only file with inline
 * assembly.
 *
 * Knows nothing of what the instructions are used for.  The host execution model has the same
 * functions (tests/emu/emu_ptx.h) and takes this file's place under IFKV_EMU.  Pointers to shared
 * memory are ordinary pointers here; the 32-bit address the instruction wants is taken inside.
 *
 * From ptx_stmatrix on everything needs sm_90, wgmma and setmaxnreg sm_90a: they are not declared
 * when a device pass for an older architecture reads this file, so that a use in the wrong
 * translation unit does not compile.
 *
 * Fragments (r = lane/4, c = 2*(lane%4); a word holds two bf16, lower column first):
 *   mma m16n8k16  a[0] (r, c) a[1] (r+8, c) a[2] (r, c+8) a[3] (r+8, c+8); b0 (k c, n r) b1 (k c+8,
 * n r); d[0..1] (r, c and c+1) d[2..3] (r+8, c and c+1) wgmma m64nNk16, warp w of the warpgroup
 * rows 16w + r and 16w + r + 8, d[4j..4j+1] columns 8j+c and 8j+c+1 of the first, d[4j+2..4j+3] of
 * the second; a[0..3] as above Source: PTX ISA 9.0, "Warp Level Matrix Instructions", "Asynchronous
 * Warpgroup Level Matrix Instructions", "Data Movement: Asynchronous copy", "Parallel
 * Synchronization: mbarrier". */
#ifndef IFKV_CUDA_PTX_CUH
#define IFKV_CUDA_PTX_CUH

#include <cuda.h>
#include <stdint.h>

#ifdef IFKV_EMU
#include "emu_ptx.h"
#else

__device__ __forceinline__ uint32_t ptx_shared_address(const void *shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// 2^x with a relative error of 2^-22, denormals flushed; 2^-inf = 0.
__device__ __forceinline__ float ptx_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Nanoseconds of a clock that all SMs share.
__device__ __forceinline__ uint64_t ptx_globaltimer() {
    uint64_t t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}

/* ldmatrix: 8x8 matrices of bf16.  Lane 8m + i gives the address of row i of matrix m (16 bytes,
 * 16-byte aligned); lane l gets of each matrix elements c, c+1 of row r, with _trans elements (c,
 * r) and (c+1, r). */
__device__ __forceinline__ void ptx_ldmatrix_x1(uint32_t &frag, const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(frag)
                 : "r"(ptx_shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void ptx_ldmatrix_x1_trans(uint32_t &frag, const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(frag)
                 : "r"(ptx_shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void ptx_ldmatrix_x2(uint32_t (&frag)[2], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(frag[0]), "=r"(frag[1])
                 : "r"(ptx_shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void ptx_ldmatrix_x2_trans(uint32_t (&frag)[2], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(frag[0]), "=r"(frag[1])
                 : "r"(ptx_shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void ptx_ldmatrix_x4(uint32_t (&frag)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(frag[0]), "=r"(frag[1]), "=r"(frag[2]), "=r"(frag[3])
                 : "r"(ptx_shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void ptx_ldmatrix_x4_trans(uint32_t (&frag)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(frag[0]), "=r"(frag[1]), "=r"(frag[2]), "=r"(frag[3])
                 : "r"(ptx_shared_address(row))
                 : "memory");
}

// d [16, 8] float += a [16, 16] bf16 * b [16, 8] bf16 over a warp.
__device__ __forceinline__ void ptx_mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                 uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, "
                 "%6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Copy 16 bytes from global to shared memory, both 16-byte aligned, past the registers.  _zfill
 * reads `bytes` <= 16 of them and writes zeros for the rest; with 0 the source is not touched.  A
 * thread's copies since its last commit form a group; wait<n> returns when at most the n latest
 * groups of this thread are under way.  Other threads need a barrier after that. */
__device__ __forceinline__ void ptx_cp_async_16(void *shared, const void *global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(ptx_shared_address(shared)),
                 "l"(global)
                 : "memory");
}
__device__ __forceinline__ void ptx_cp_async_16_zfill(void *shared, const void *global,
                                                      uint32_t bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(ptx_shared_address(shared)),
                 "l"(global), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void ptx_cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int n> __device__ __forceinline__ void ptx_cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

/* Named barriers 0..15 (0 is __syncthreads): `threads`, a multiple of 32, arrive or wait; whole
 * warps at a time. */
__device__ __forceinline__ void ptx_bar_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void ptx_bar_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// stmatrix: the inverse of ldmatrix.
__device__ __forceinline__ void ptx_stmatrix_x1(void *row, uint32_t frag) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(ptx_shared_address(row)),
        "r"(frag)
        : "memory");
}
__device__ __forceinline__ void ptx_stmatrix_x1_trans(void *row, uint32_t frag) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(ptx_shared_address(row)),
        "r"(frag)
        : "memory");
}
__device__ __forceinline__ void ptx_stmatrix_x2(void *row, const uint32_t (&frag)[2]) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(ptx_shared_address(row)),
        "r"(frag[0]), "r"(frag[1])
        : "memory");
}
__device__ __forceinline__ void ptx_stmatrix_x2_trans(void *row, const uint32_t (&frag)[2]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(
                     ptx_shared_address(row)),
                 "r"(frag[0]), "r"(frag[1])
                 : "memory");
}
__device__ __forceinline__ void ptx_stmatrix_x4(void *row, const uint32_t (&frag)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     ptx_shared_address(row)),
                 "r"(frag[0]), "r"(frag[1]), "r"(frag[2]), "r"(frag[3])
                 : "memory");
}
__device__ __forceinline__ void ptx_stmatrix_x4_trans(void *row, const uint32_t (&frag)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     ptx_shared_address(row)),
                 "r"(frag[0]), "r"(frag[1]), "r"(frag[2]), "r"(frag[3])
                 : "memory");
}

// True in one lane of the warp, always the same one; all 32 lanes take part.
__device__ __forceinline__ bool ptx_elect_one() {
    uint32_t is_elected;
    asm volatile("{\n\t"
                 ".reg .pred p;\n\t"
                 "elect.sync _|p, 0xffffffff;\n\t"
                 "selp.u32 %0, 1, 0, p;\n\t"
                 "}"
                 : "=r"(is_elected)::"memory");
    return is_elected != 0;
}

/* mbarrier, 8 bytes of shared memory.  A phase ends when `arrivals` threads have arrived and the
 * bytes expected have come; the first phase has parity 0.  try_wait is true once the phase of that
 * parity has ended (so parity 1 passes on a fresh barrier) and may be false any number of times
 * before. */
__device__ __forceinline__ void ptx_mbarrier_init(uint64_t *barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(ptx_shared_address(barrier)),
                 "r"(arrivals)
                 : "memory");
}
__device__ __forceinline__ void ptx_mbarrier_inval(uint64_t *barrier) {
    asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(ptx_shared_address(barrier))
                 : "memory");
}
__device__ __forceinline__ void ptx_mbarrier_arrive(uint64_t *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(ptx_shared_address(barrier))
                 : "memory");
}
__device__ __forceinline__ void ptx_mbarrier_arrive_expect_tx(uint64_t *barrier, uint32_t bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(ptx_shared_address(barrier)),
        "r"(bytes)
        : "memory");
}
__device__ __forceinline__ void ptx_mbarrier_expect_tx(uint64_t *barrier, uint32_t bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(
                     ptx_shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ bool ptx_mbarrier_try_wait(uint64_t *barrier, uint32_t parity) {
    uint32_t is_done;
    asm volatile("{\n\t"
                 ".reg .pred p;\n\t"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
                 "selp.u32 %0, 1, 0, p;\n\t"
                 "}"
                 : "=r"(is_done)
                 : "r"(ptx_shared_address(barrier)), "r"(parity)
                 : "memory");
    return is_done != 0;
}

/* Fences: of what this thread wrote to shared (global) memory before bulk copies or wgmma read it;
 * of mbarrier.init before bulk copies use the barrier. */
__device__ __forceinline__ void ptx_fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void ptx_fence_proxy_async_global() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
}
__device__ __forceinline__ void ptx_fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/* Bulk tensor copies of the box and swizzle that the map describes; coordinates in elements,
 * innermost first.  A load writes the whole box (zeros outside the tensor) and completes all its
 * bytes on `barrier`; a store leaves out what lies outside.  One thread issues.  The map lies in a
 * __grid_constant__ parameter.  A thread's stores since its last commit form a group; wait_read<n>
 * returns when all but the n latest groups have read shared memory, wait<n> when they are written.
 */
__device__ __forceinline__ void ptx_tensormap_prefetch(const CUtensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ __forceinline__ void ptx_tma_load_2d(void *shared, const CUtensorMap *map,
                                                uint64_t *barrier, int c0, int c1) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];" ::"r"(ptx_shared_address(shared)),
                 "l"(map), "r"(c0), "r"(c1), "r"(ptx_shared_address(barrier))
                 : "memory");
}
__device__ __forceinline__ void ptx_tma_load_3d(void *shared, const CUtensorMap *map,
                                                uint64_t *barrier, int c0, int c1, int c2) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(ptx_shared_address(shared)),
                 "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(ptx_shared_address(barrier))
                 : "memory");
}
__device__ __forceinline__ void ptx_tma_load_4d(void *shared, const CUtensorMap *map,
                                                uint64_t *barrier, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(ptx_shared_address(shared)),
                 "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(ptx_shared_address(barrier))
                 : "memory");
}
__device__ __forceinline__ void ptx_tma_store_2d(const CUtensorMap *map, const void *shared, int c0,
                                                 int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(
            map),
        "r"(c0), "r"(c1), "r"(ptx_shared_address(shared))
        : "memory");
}
__device__ __forceinline__ void ptx_tma_store_3d(const CUtensorMap *map, const void *shared, int c0,
                                                 int c1, int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3}], [%4];" ::
            "l"(map),
        "r"(c0), "r"(c1), "r"(c2), "r"(ptx_shared_address(shared))
        : "memory");
}
__device__ __forceinline__ void ptx_tma_store_4d(const CUtensorMap *map, const void *shared, int c0,
                                                 int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, "
                 "%4}], [%5];" ::"l"(map),
                 "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(ptx_shared_address(shared))
                 : "memory");
}
__device__ __forceinline__ void ptx_bulk_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
template <int n> __device__ __forceinline__ void ptx_bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(n) : "memory");
}
template <int n> __device__ __forceinline__ void ptx_bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(n) : "memory");
}

#endif

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "ptx_wgmma.cuh"
#endif

#endif
#endif
