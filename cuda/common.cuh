/* What every kernel needs: rounding up, 16-byte accesses, bf16 conversions, reductions in a fixed
 * order, shared memory.
 *
 * Knows no operation.  Compiled by nvcc for the device and, with IFKV_EMU, by the host compiler for
 * the host execution model (tests/emu).  Shared memory comes through ifkv_shared only: the model
 * poisons and fences what it hands out, and refuses __shared__, which it could not. */
#ifndef IFKV_CUDA_COMMON_CUH
#define IFKV_CUDA_COMMON_CUH

#ifdef IFKV_EMU
#include "emu.h"
#endif

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define IFKV_WARP_LANES 32
#define IFKV_ALL_LANES 0xffffffffu

template <typename T> __host__ __device__ constexpr T ceil_div(T value, T unit) {
    return (value + unit - 1) / unit;
}

template <typename T> __host__ __device__ constexpr T round_up(T value, T unit) {
    return ceil_div(value, unit) * unit;
}

/* Start of the block's dynamic shared memory, 1024-byte aligned (what a 128-byte swizzle needs). */
#ifdef IFKV_EMU
inline unsigned char *ifkv_dynamic_shared() {
    return emu_dynamic_shared();
}
#else
__device__ __forceinline__ unsigned char *ifkv_dynamic_shared() {
    extern __shared__ __align__(1024) unsigned char ifkv_dynamic_shared_bytes[];
    return ifkv_dynamic_shared_bytes;
}
#endif

/* The block's shared memory as the kernel's own struct; sizeof(T) bytes must have been asked for at
 * the launch. */
template <typename T> __device__ __forceinline__ T &ifkv_shared() {
    return *reinterpret_cast<T *>(ifkv_dynamic_shared());
}

__device__ __forceinline__ int lane_index() {
    return static_cast<int>(threadIdx.x) % IFKV_WARP_LANES;
}

__device__ __forceinline__ int warp_index() {
    return static_cast<int>(threadIdx.x) / IFKV_WARP_LANES;
}

/* 16 bytes at a 16-byte aligned address, in one access. */
__device__ __forceinline__ uint4 load_16(const void *from) {
    return *static_cast<const uint4 *>(from);
}

__device__ __forceinline__ void store_16(void *to, uint4 value) {
    *static_cast<uint4 *>(to) = value;
}

/* Two bf16 in a word, the first in the low half, as mma operands want them; rounded to nearest,
 * ties to even. */
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t word;
    memcpy(&word, &pair, sizeof word);
    return word;
}

__device__ __forceinline__ float bf16_low(uint32_t word) {
    return __uint_as_float(word << 16);
}

__device__ __forceinline__ float bf16_high(uint32_t word) {
    return __uint_as_float(word & 0xffff0000u);
}

__device__ __forceinline__ float bf16_to_float(__nv_bfloat16 value) {
    return __bfloat162float(value);
}

__device__ __forceinline__ __nv_bfloat16 float_to_bf16(float value) {
    return __float2bfloat16_rn(value);
}

/* Eight bf16 of one 16-byte access. */
__device__ __forceinline__ void unpack_bf16x8(uint4 from, float (&to)[8]) {
    const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[2 * i] = bf16_low(words[i]);
        to[2 * i + 1] = bf16_high(words[i]);
    }
}

__device__ __forceinline__ uint4 pack_bf16x8(const float (&from)[8]) {
    return make_uint4(pack_bf16(from[0], from[1]), pack_bf16(from[2], from[3]),
                      pack_bf16(from[4], from[5]), pack_bf16(from[6], from[7]));
}

/* Sum and maximum over a warp, the same bits in every lane: a butterfly adds the same pairs on both
 * sides.  All 32 lanes take part. */
template <typename T> __device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int offset = IFKV_WARP_LANES / 2; offset > 0; offset /= 2)
        value += __shfl_xor_sync(IFKV_ALL_LANES, value, offset);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int offset = IFKV_WARP_LANES / 2; offset > 0; offset /= 2)
        value = fmaxf(value, __shfl_xor_sync(IFKV_ALL_LANES, value, offset));
    return value;
}

/* Sum and maximum over a one-dimensional block of whole warps, the same bits in every thread: warps
 * first, then their results in the order of warps.  `scratch` [32] in shared memory; may be used
 * again at once. */
__device__ __forceinline__ float block_sum(float value, float *scratch) {
    value = warp_sum(value);
    if (lane_index() == 0) scratch[warp_index()] = value;
    __syncthreads();
    float sum = scratch[0];
    for (int warp = 1; warp < static_cast<int>(blockDim.x) / IFKV_WARP_LANES; warp++)
        sum += scratch[warp];
    __syncthreads(); // before anybody writes scratch again
    return sum;
}

__device__ __forceinline__ float block_max(float value, float *scratch) {
    value = warp_max(value);
    if (lane_index() == 0) scratch[warp_index()] = value;
    __syncthreads();
    float max = scratch[0];
    for (int warp = 1; warp < static_cast<int>(blockDim.x) / IFKV_WARP_LANES; warp++)
        max = fmaxf(max, scratch[warp]);
    __syncthreads(); // before anybody writes scratch again
    return max;
}

#endif
