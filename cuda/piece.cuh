/* Rows in pieces: the widest access that all operands of a call allow, eight bfloat16 at a time or
 * one.
 *
 * Owns the choice of the width and the loads and stores of that width; knows no operation.  A
 * kernel is a template on WIDTH and works on pieces of WIDTH elements. */
#ifndef IFKV_CUDA_PIECE_CUH
#define IFKV_CUDA_PIECE_CUH

#include "backend.h"
#include "common.cuh"

constexpr int IFKV_WIDE = 8; // bfloat16 in 16 bytes

template <int WIDTH>
__device__ __forceinline__ void load_piece(const __nv_bfloat16 *from, float (&to)[WIDTH]) {
    static_assert(WIDTH == 1 || WIDTH == IFKV_WIDE, "pieces are 2 or 16 bytes");
    if constexpr (WIDTH == IFKV_WIDE)
        unpack_bf16x8(load_16(from), to);
    else
        to[0] = bf16_to_float(*from);
}

template <int WIDTH>
__device__ __forceinline__ void store_piece(__nv_bfloat16 *to, const float (&from)[WIDTH]) {
    static_assert(WIDTH == 1 || WIDTH == IFKV_WIDE, "pieces are 2 or 16 bytes");
    if constexpr (WIDTH == IFKV_WIDE)
        store_16(to, pack_bf16x8(from));
    else
        *to = float_to_bf16(from[0]);
}

/* Eight float32, in two accesses, from an address on 16 bytes. */
__device__ __forceinline__ void load_floats(const float *from, float (&to)[IFKV_WIDE]) {
#pragma unroll
    for (int i = 0; i < IFKV_WIDE; i += 4) {
        const uint4 bits = load_16(from + i);
        to[i] = __uint_as_float(bits.x);
        to[i + 1] = __uint_as_float(bits.y);
        to[i + 2] = __uint_as_float(bits.z);
        to[i + 3] = __uint_as_float(bits.w);
    }
}

/* True if every row of the view begins on 16 bytes. */
inline bool is_aligned(const ifkv_view *view) {
    const size_t stride = static_cast<size_t>(view->stride) * ifkv_dtype_bytes(view->dtype);
    return reinterpret_cast<uintptr_t>(view->data) % 16 == 0 &&
           (stride % 16 == 0 || view->n_row <= 1);
}

/* True if rows of n_col bfloat16 can be taken in wide pieces from all of these views; NULL counts
 * as aligned. */
inline bool is_wide(int64_t n_col, const ifkv_view *a, const ifkv_view *b, const ifkv_view *c) {
    return n_col % IFKV_WIDE == 0 && is_aligned(a) && (!b || is_aligned(b)) &&
           (!c || is_aligned(c));
}

/* Threads of a block that shares n_piece pieces: at most `most`, whole warps, equally busy. */
inline unsigned threads_for(int64_t n_piece, int64_t most) {
    const int64_t rounds = ceil_div(n_piece > 0 ? n_piece : 1, most);
    return static_cast<unsigned>(
        round_up(ceil_div(n_piece > 0 ? n_piece : 1, rounds), int64_t{IFKV_WARP_LANES}));
}

#endif
