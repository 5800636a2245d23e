/* CUDA's keywords, built-in variables and functions, for the host execution model.
 *
 * Read by cuda/common.cuh under IFKV_EMU before any kernel.  Owns the language; instructions are in
 * emu_ptx.h, launches in emu_launch.h.  Has what the project's kernels use and nothing else: what
 * is missing does not compile.  float atomics are left out on purpose, because a sum must have a
 * fixed order. */
#ifndef IFKV_EMU_EMU_H
#define IFKV_EMU_EMU_H

#include "emu_place.h"

#include <cuda_runtime_api.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <vector_functions.h>

#include <type_traits>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__                                                                                 \
    static_assert(                                                                                 \
        false,                                                                                     \
        "shared memory comes through ifkv_shared of common.cuh, which the model can poison");

/* The running thread's built-in variables. */
struct emu_builtins {
    uint3 thread_idx, block_idx;
    dim3 block_dim, grid_dim;
};
extern __thread const emu_builtins *emu_now;
#define threadIdx (emu_now->thread_idx)
#define blockIdx (emu_now->block_idx)
#define blockDim (emu_now->block_dim)
#define gridDim (emu_now->grid_dim)
constexpr int warpSize = 32;

unsigned char *emu_dynamic_shared();

/* Barriers.  All threads of the block, all lanes named by the mask. */
void __syncthreads(emu_place at = emu_here());
void __syncwarp(unsigned mask = 0xffffffffu, emu_place at = emu_here());
int __syncthreads_count(int predicate, emu_place at = emu_here());
int __syncthreads_and(int predicate, emu_place at = emu_here());
int __syncthreads_or(int predicate, emu_place at = emu_here());

/* Shuffles, of at most 8 bytes. */
enum emu_shuffle { EMU_SHUFFLE_INDEX, EMU_SHUFFLE_UP, EMU_SHUFFLE_DOWN, EMU_SHUFFLE_XOR };
uint64_t emu_shuffle_bits(emu_shuffle kind, unsigned mask, uint64_t bits, int by, int width,
                          emu_place at);

template <typename T>
T emu_shuffle_value(emu_shuffle kind, unsigned mask, T value, int by, int width, emu_place at) {
    static_assert(std::is_arithmetic<T>::value, "CUDA shuffles numbers");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = emu_shuffle_bits(kind, mask, bits, by, width, at);
    memcpy(&value, &bits, sizeof value);
    return value;
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, emu_place at = emu_here()) {
    return emu_shuffle_value(EMU_SHUFFLE_INDEX, mask, value, lane, width, at);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, emu_place at = emu_here()) {
    return emu_shuffle_value(EMU_SHUFFLE_UP, mask, value, static_cast<int>(by), width, at);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, emu_place at = emu_here()) {
    return emu_shuffle_value(EMU_SHUFFLE_DOWN, mask, value, static_cast<int>(by), width, at);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int by, int width = 32, emu_place at = emu_here()) {
    return emu_shuffle_value(EMU_SHUFFLE_XOR, mask, value, by, width, at);
}

/* Votes, matches and reductions over a warp. */
unsigned __ballot_sync(unsigned mask, int predicate, emu_place at = emu_here());
int __all_sync(unsigned mask, int predicate, emu_place at = emu_here());
int __any_sync(unsigned mask, int predicate, emu_place at = emu_here());
unsigned emu_match_bits(unsigned mask, uint64_t bits, emu_place at);
template <typename T> unsigned __match_any_sync(unsigned mask, T value, emu_place at = emu_here()) {
    static_assert(std::is_arithmetic<T>::value, "CUDA matches numbers");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return emu_match_bits(mask, bits, at);
}
unsigned __reduce_add_sync(unsigned mask, unsigned value, emu_place at = emu_here());
int __reduce_add_sync(unsigned mask, int value, emu_place at = emu_here());
unsigned __reduce_min_sync(unsigned mask, unsigned value, emu_place at = emu_here());
int __reduce_min_sync(unsigned mask, int value, emu_place at = emu_here());
unsigned __reduce_max_sync(unsigned mask, unsigned value, emu_place at = emu_here());
int __reduce_max_sync(unsigned mask, int value, emu_place at = emu_here());
unsigned __reduce_and_sync(unsigned mask, unsigned value, emu_place at = emu_here());
unsigned __reduce_or_sync(unsigned mask, unsigned value, emu_place at = emu_here());
unsigned __reduce_xor_sync(unsigned mask, unsigned value, emu_place at = emu_here());

/* Let other threads go on; a thread that polls must call it. */
void __nanosleep(unsigned nanoseconds, emu_place at = emu_here());
[[noreturn]] void __trap(emu_place at = emu_here());

inline void __threadfence() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
inline void __threadfence_block() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* Integer atomics, of the types CUDA has them for. */
template <typename T>
using emu_if_atomic =
    std::enable_if_t<std::is_same<T, int>::value || std::is_same<T, unsigned>::value ||
                         std::is_same<T, unsigned long long>::value,
                     T>;
template <typename T> emu_if_atomic<T> atomicAdd(T *at, T value) {
    return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);
}
template <typename T> emu_if_atomic<T> atomicOr(T *at, T value) {
    return __atomic_fetch_or(at, value, __ATOMIC_SEQ_CST);
}
template <typename T> emu_if_atomic<T> atomicAnd(T *at, T value) {
    return __atomic_fetch_and(at, value, __ATOMIC_SEQ_CST);
}
template <typename T> emu_if_atomic<T> atomicExch(T *at, T value) {
    return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST);
}
template <typename T> emu_if_atomic<T> atomicCAS(T *at, T expected, T value) {
    __atomic_compare_exchange_n(at, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return expected;
}
template <typename T> emu_if_atomic<T> atomicMax(T *at, T value) {
    T old = __atomic_load_n(at, __ATOMIC_SEQ_CST);
    while (old < value && !__atomic_compare_exchange_n(at, &old, value, false, __ATOMIC_SEQ_CST,
                                                       __ATOMIC_SEQ_CST)) {
    }
    return old;
}
template <typename T> emu_if_atomic<T> atomicMin(T *at, T value) {
    T old = __atomic_load_n(at, __ATOMIC_SEQ_CST);
    while (value < old && !__atomic_compare_exchange_n(at, &old, value, false, __ATOMIC_SEQ_CST,
                                                       __ATOMIC_SEQ_CST)) {
    }
    return old;
}

/* Arithmetic. */
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline int __float_as_int(float x) {
    return static_cast<int>(__float_as_uint(x));
}
inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
inline float __int_as_float(int bits) {
    return __uint_as_float(static_cast<unsigned>(bits));
}
inline float rsqrtf(float x) {
    return 1.0f / sqrtf(x);
}
inline float __expf(float x) {
    return expf(x);
}
inline float __logf(float x) {
    return logf(x);
}
inline float __fdividef(float x, float y) {
    return x / y;
}
inline float __frcp_rn(float x) {
    return 1.0f / x;
}
inline float __fmaf_rn(float x, float y, float z) {
    return fmaf(x, y, z);
}
inline float __fadd_rn(float x, float y) {
    return x + y;
}
inline float __fmul_rn(float x, float y) {
    return x * y;
}
inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
inline int __popcll(unsigned long long x) {
    return __builtin_popcountll(x);
}
inline int __clz(int x) {
    return x ? __builtin_clz(static_cast<unsigned>(x)) : 32;
}
inline int __ffs(int x) {
    return __builtin_ffs(x);
}
template <typename T> T __ldg(const T *at) {
    return *at;
}
template <typename T> constexpr T min(T x, T y) {
    return y < x ? y : x;
}
template <typename T> constexpr T max(T x, T y) {
    return x < y ? y : x;
}

#endif
