/* What both attention kernels do alike: find the runs of a tile, the online softmax over a block of
 * scores, and the store of finished rows.
 *
 * Knows nothing of how keys and values reach shared memory or which instruction multiplies.  Both
 * kernels hold scores and results in the fragment of mma m16n8 (ptx.cuh): a thread owns stacked
 * rows r = lane / 4 and r + 8 of its warp's sixteen, of every eight columns the two from
 * 2 * (lane % 4) on; x[4 * j + 2 * half + i] is column 8 * j + 2 * (lane % 4) + i of row
 * r + 8 * half.
 *
 * Maxima and log-sum-exps are kept in base 2, scores times scale * log2(e), until they are stored.
 * A row that sees no key is worked on with the others (its numbers may be NaN: rows never mix) and
 * replaced when stored. */
#ifndef IFKV_CUDA_ATTENTION_CUH
#define IFKV_CUDA_ATTENTION_CUH

#include "attention.h"
#include "common.cuh"
#include "ptx.cuh"

namespace {

// Consecutive rows of a tile with one begin, clipped to one part of their spans.
struct attention_run {
    int64_t first;     // row of the call
    int64_t first_key; // where the first key block starts
    int n_row;
    int n_key;    // most keys any of the rows sees, from first_key on
    int n_shared; // keys that all rows see that see any: blocks within need no mask
};

/* The run from row `first` on, at most up to row `limit`, and the number of keys each of its rows
 * sees, written to length [.].  By one warp; the same result in all lanes.  Rows with an impossible
 * span raise the fault word and see nothing. */
__device__ __forceinline__ attention_run find_run(const ifkv_attention_call &call, int64_t first,
                                                  int64_t limit, int part, int *length) {
    const int64_t begin = call.begin[first], skipped = part * call.plan.part_keys;
    int n_row = 0, longest = 0, shortest = INT32_MAX, in_run;
    do {
        const int64_t row = first + n_row + lane_index();
        const bool is_in = row < limit && call.begin[row] == begin;
        const uint32_t out = ~__ballot_sync(IFKV_ALL_LANES, is_in);
        in_run = out ? __ffs(static_cast<int>(out)) - 1 : IFKV_WARP_LANES;
        if (lane_index() < in_run) {
            const int64_t end = call.end[row];
            const bool is_possible = 0 <= begin && begin <= end && end <= call.n_key;
            if (!is_possible) *call.fault = IFKV_CUDA_FAULT_ATTENTION;
            int64_t keys = is_possible ? end - begin - skipped : 0;
            if (keys < 0) keys = 0;
            if (keys > call.plan.part_keys) keys = call.plan.part_keys;
            const int n = static_cast<int>(keys);
            length[n_row + lane_index()] = n;
            if (n > longest) longest = n;
            if (n > 0 && n < shortest) shortest = n;
        }
        n_row += in_run;
    } while (in_run == IFKV_WARP_LANES);
    return {first, begin + skipped, n_row, __reduce_max_sync(IFKV_ALL_LANES, longest),
            __reduce_min_sync(IFKV_ALL_LANES, shortest)};
}

// Hide from a block of scores the columns from left[half] on.
template <int n> __device__ __forceinline__ void mask_scores(float (&s)[n], const int (&left)[2]) {
    const int column = 2 * (lane_index() % 4);
#pragma unroll
    for (int j = 0; j < n / 4; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (8 * j + column + i % 2 >= left[i / 2]) s[4 * j + i] = -INFINITY;
}

// What is known of a thread's two rows so far.
struct softmax_rows {
    float max[2]; // of scores times scale_log2; the same in the four threads of a row
    float sum[2]; // of this thread's columns only
};

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(IFKV_ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(IFKV_ALL_LANES, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(IFKV_ALL_LANES, x, 1);
    return x + __shfl_xor_sync(IFKV_ALL_LANES, x, 2);
}

/* Turn a block of scores into probabilities relative to the running maximum; decay is what earlier
 * sums and results are to be multiplied by.  Sums are of float32 probabilities, before they are
 * rounded for the product with V.  The first block has a key of every row that sees any, so that no
 * maximum is -inf where it counts. */
template <int n>
__device__ __forceinline__ void softmax_block(float (&s)[n], float scale_log2, softmax_rows &rows,
                                              float (&decay)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float top = s[2 * half];
#pragma unroll
        for (int j = 0; j < n / 4; j++)
            top = fmaxf(top, fmaxf(s[4 * j + 2 * half], s[4 * j + 2 * half + 1]));
        const float max = fmaxf(rows.max[half], quad_max(top) * scale_log2);
        decay[half] = ptx_exp2(rows.max[half] - max);
        float sum[2] = {0, 0};
#pragma unroll
        for (int j = 0; j < n / 4; j++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float &x = s[4 * j + 2 * half + i];
                x = ptx_exp2(fmaf(x, scale_log2, -max));
                sum[i] += x;
            }
        rows.sum[half] = rows.sum[half] * decay[half] + (sum[0] + sum[1]);
        rows.max[half] = max;
    }
}

template <int n>
__device__ __forceinline__ void scale_rows(float (&o)[n], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < n; i++) o[i] *= factor[i / 2 % 2];
}

/* Probabilities as the left operand of the product with V: p[k] is columns 16k .. 16k + 15. */
template <int n>
__device__ __forceinline__ void pack_probabilities(const float (&s)[n], uint32_t (&p)[n / 8][4]) {
#pragma unroll
    for (int k = 0; k < n / 8; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) p[k][i] = pack_bf16(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
}

/* Exchange words among the four threads of a row: afterwards word i of thread t is what was word t
 * of thread i. */
__device__ __forceinline__ void quad_transpose(uint32_t (&word)[4]) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool is_upper = lane_index() & bit;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & bit) continue;
            const uint32_t theirs =
                __shfl_xor_sync(IFKV_ALL_LANES, is_upper ? word[i] : word[i + bit], bit);
            if (is_upper)
                word[i] = theirs;
            else
                word[i + bit] = theirs;
        }
    }
}

/* One row's `n` / 2 columns of this thread, already divided by the sum, to row `to` of d = 2 n
 * elements.  All lanes take part, those with to NULL store nothing. */
template <int n>
__device__ __forceinline__ void store_row_bf16(const float (&o)[n], int half, float factor,
                                               bool is_empty, __nv_bfloat16 *to, bool is_aligned) {
    const int quad = lane_index() % 4;
#pragma unroll
    for (int j = 0; j < n / 4; j += 4) { // 32 columns: 8 of each thread
        uint32_t word[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int at = 4 * (j + i) + 2 * half;
            word[i] =
                j + i < n / 4 && !is_empty ? pack_bf16(o[at] * factor, o[at + 1] * factor) : 0;
        }
        quad_transpose(word);
        const int column = 8 * (j + quad);
        if (!to || column >= 2 * n) continue;
        if (is_aligned) {
            store_16(to + column, make_uint4(word[0], word[1], word[2], word[3]));
        } else {
            __nv_bfloat16 value[8];
            memcpy(value, word, sizeof value);
#pragma unroll
            for (int i = 0; i < 8; i++) to[column + i] = value[i];
        }
    }
}

template <int n>
__device__ __forceinline__ void store_row_float(const float (&o)[n], int half, float factor,
                                                bool is_empty, float *to) {
    if (!to) return;
#pragma unroll
    for (int j = 0; j < n / 4; j++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            to[8 * j + 2 * (lane_index() % 4) + i] =
                is_empty ? 0.0f : o[4 * j + 2 * half + i] * factor;
}

// Which rows a thread stores, and where they belong.
struct store_place {
    int64_t first_row; // of the run
    int n_row, kv_head, part;
    int stacked;   // the thread's upper row within the tile; the other is eight below
    int length[2]; // keys each of the two sees; 0 where there is no such row
};

/* The place of a thread's two rows; length [n_row] is that of the run. */
__device__ __forceinline__ store_place place_rows(const ifkv_attention_call &call,
                                                  const attention_run &run, int kv_head, int part,
                                                  int stacked, const int *length) {
    store_place place = {run.first, run.n_row, kv_head, part, stacked, {0, 0}};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = (stacked + 8 * half) / call.plan.group;
        if (row < run.n_row) place.length[half] = length[row];
    }
    return place;
}

/* Finish and store a thread's two rows: o divided by the sum, lse = ln(2) * (max + log2(sum)). */
template <int n>
__device__ __forceinline__ void store_rows(const ifkv_attention_call &call,
                                           const store_place &place, const softmax_rows &rows,
                                           const float (&o)[n]) {
    const int group = call.plan.group;
    const bool is_aligned =
        reinterpret_cast<uintptr_t>(call.out) % 16 == 0 && call.out_stride % 8 == 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int stacked = place.stacked + 8 * half, row = stacked / group;
        const bool is_mine = row < place.n_row, is_empty = place.length[half] == 0;
        const float sum = quad_sum(rows.sum[half]), factor = 1.0f / sum;
        const int64_t to_row = place.first_row + row;
        const int head = place.kv_head * group + stacked % group;
        const int64_t at = place.part * call.out_part_stride + to_row * call.out_stride +
                           static_cast<int64_t>(head) * call.d_head;
        if (call.is_out_float)
            store_row_float(o, half, factor, is_empty,
                            is_mine ? static_cast<float *>(call.out) + at : nullptr);
        else
            store_row_bf16(o, half, factor, is_empty,
                           is_mine ? static_cast<__nv_bfloat16 *>(call.out) + at : nullptr,
                           is_aligned);
        if (is_mine && lane_index() % 4 == 0)
            call.lse[place.part * call.lse_part_stride + to_row * call.lse_stride + head] =
                is_empty ? -INFINITY : (rows.max[half] + log2f(sum)) * 0.693147180559945309417f;
    }
}

} // namespace

#endif
