/* Blocked attention with the online softmax, and the merge of partial results.
 *
 * A task is a tile of rows with equal begin times one K/V head.  The query heads of that K/V head
 * are stacked as rows of the tile, so that each key read serves all of them; key blocks start at
 * the tile's begin.  Per block: S = Q K^T, P = exp(S - m) with m the running row maximum, O = O
 * e^(m' - m)
 * + P V.  Only rows whose span reaches into a block take part in it, and only keys up to the tile's
 * largest end are read.  What a tile computes depends on its own rows and keys alone.
 * Source: FlashAttention-2 (arXiv 2307.08691), section 3.1. */
#include "cpu_backend.h"

#include <limits.h>
#include <math.h>
#include <omp.h>
#include <string.h>

typedef struct tile_shape {
    int64_t rows;       /* rows of the call; stacked rows are group times as many */
    int64_t keys;       /* a block of the online softmax */
    int64_t value_keys; /* keys of one product P V */
} tile_shape;

enum {
    STACKED_ROWS = 240, /* enough to pay for packing the keys of a block */
    BLOCK_KEYS = 512,   /* S [240, 512] is half of a 1 MiB second level cache */
    /* OpenBLAS multiplies without packing its operands up to this many products (100^3), which is
     * 15 % faster for P V; with fewer than 32 keys a product rewriting O costs more than that. */
    UNPACKED_PRODUCTS = 1000000,
    MIN_VALUE_KEYS = 32
};

static tile_shape tile_for(int group, int d_head) {
    const int64_t rows = group < STACKED_ROWS ? STACKED_ROWS / group : 1;
    const int64_t fit = UNPACKED_PRODUCTS / (rows * group * d_head) / 16 * 16;
    return (tile_shape){
        .rows = rows, .keys = BLOCK_KEYS, .value_keys = fit < MIN_VALUE_KEYS ? BLOCK_KEYS : fit};
}

typedef struct tile_scratch {
    float *q;         /* [rows * group, d_head] times scale */
    float *s;         /* [rows * group, keys] */
    float *o;         /* [rows * group, d_head] */
    float *max, *sum; /* [rows * group] */
} tile_scratch;

/* Lay the tile's buffers into data; returns the bytes they take.  data NULL only counts. */
static size_t layout(int group, int d_head, char *data, tile_scratch *scratch) {
    const tile_shape shape = tile_for(group, d_head);
    const size_t stacked = (size_t)shape.rows * (size_t)group;
    const size_t count[] = {stacked * (size_t)d_head, stacked * (size_t)shape.keys,
                            stacked * (size_t)d_head, stacked, stacked};
    float **part[] = {&scratch->q, &scratch->s, &scratch->o, &scratch->max, &scratch->sum};
    size_t used = 0;
    for (size_t i = 0; i < sizeof count / sizeof *count; i++) {
        *part[i] = data ? (float *)(void *)(data + used) : NULL;
        used += (count[i] * sizeof(float) + 63) / 64 * 64;
    }
    return used;
}

size_t ifkv_cpu_attention_bytes(int group, int d_head) {
    tile_scratch unused;
    return layout(group, d_head, NULL, &unused);
}

typedef struct tile_task {
    const ifkv_attention_args *args;
    int group, kv_head;
    int64_t row, n_row; /* of the call */
} tile_task;

static void load_q(const tile_task *task, const tile_scratch *scratch) {
    const ifkv_attention_args *args = task->args;
    const int64_t width = (int64_t)task->group * args->d_head;
    const float *q = args->q.data;
    for (int64_t i = 0; i < task->n_row; i++) {
        const float *from = q + (task->row + i) * args->q.stride + task->kv_head * width;
        float *to = scratch->q + i * width;
        for (int64_t c = 0; c < width; c++) to[c] = from[c] * args->scale;
    }
}

/* Turn the n_valid leading scores of a row into probabilities relative to the running maximum and
 * clear the rest; scale what was summed before to the new maximum. */
static void softmax_row(float *s, int64_t n_valid, int64_t n_key, float *o, int d_head, float *max,
                        float *sum) {
    const float block = ifkv_cpu_max(s, n_valid), next = block > *max ? block : *max;
    const float block_sum = ifkv_cpu_exp_sum(s, n_valid, next);
    memset(s + n_valid, 0, (size_t)(n_key - n_valid) * sizeof *s);
    if (next > *max) {
        const float decay = expf(*max - next);
        *sum *= decay;
        for (int c = 0; c < d_head; c++) o[c] *= decay;
    }
    *sum += block_sum;
    *max = next;
}

static void store(const tile_task *task, const tile_scratch *scratch) {
    const ifkv_attention_args *args = task->args;
    for (int64_t i = 0; i < task->n_row; i++)
        for (int g = 0; g < task->group; g++) {
            const int64_t row = task->row + i, stacked = i * task->group + g;
            const int64_t head = (int64_t)task->kv_head * task->group + g;
            const float sum = scratch->sum[stacked], *o = scratch->o + stacked * args->d_head;
            float *out = (float *)args->out.data + row * args->out.stride + head * args->d_head;
            const bool is_empty = args->begin[row] == args->end[row];
            const float inverse = is_empty ? 0.0f : 1.0f / sum;
            for (int c = 0; c < args->d_head; c++) out[c] = o[c] * inverse;
            ((float *)args->lse.data)[row * args->lse.stride + head] =
                is_empty ? -INFINITY : (float)((double)scratch->max[stacked] + log((double)sum));
        }
}

/* One key block: rows [skip, stacked) of the tile against keys [key, key + n_key). */
static void attend_block(const tile_task *task, const tile_scratch *scratch, int64_t key,
                         int64_t n_key, int64_t skip) {
    const ifkv_attention_args *args = task->args;
    const int group = task->group, d_head = args->d_head;
    const int64_t n = task->n_row * group - skip, head = (int64_t)task->kv_head * d_head;
    const int64_t value_keys = tile_for(group, d_head).value_keys;
    const int64_t *end = args->end + task->row;
    const float *k = (const float *)args->k.data + key * args->k.stride + head;
    const float *v = (const float *)args->v.data + key * args->v.stride + head;
    float *o = scratch->o + skip * d_head;
    ifkv_cpu_product_nt(n, n_key, d_head, scratch->q + skip * d_head, d_head, k, args->k.stride,
                        0.0f, scratch->s, n_key);
    for (int64_t i = 0; i < n; i++) {
        const int64_t left = end[(skip + i) / group] - key;
        const int64_t n_valid = left < 0 ? 0 : left < n_key ? left : n_key;
        softmax_row(scratch->s + i * n_key, n_valid, n_key, o + i * d_head, d_head,
                    scratch->max + skip + i, scratch->sum + skip + i);
    }
    for (int64_t j = 0; j < n_key; j += value_keys)
        ifkv_cpu_product_nn(n, d_head, n_key - j < value_keys ? n_key - j : value_keys,
                            scratch->s + j, n_key, v + j * args->v.stride, args->v.stride, 1.0f, o,
                            d_head);
}

static void attend_tile(const tile_task *task, const tile_scratch *scratch) {
    const ifkv_attention_args *args = task->args;
    const int group = task->group;
    const int64_t stacked = task->n_row * group, begin = args->begin[task->row];
    const int64_t *end = args->end + task->row;
    const int64_t block_keys = tile_for(group, args->d_head).keys;
    int64_t last = begin;
    for (int64_t i = 0; i < task->n_row; i++) last = end[i] > last ? end[i] : last;

    load_q(task, scratch);
    memset(scratch->o, 0, (size_t)(stacked * args->d_head) * sizeof *scratch->o);
    memset(scratch->sum, 0, (size_t)stacked * sizeof *scratch->sum);
    for (int64_t i = 0; i < stacked; i++) scratch->max[i] = -INFINITY;
    int64_t first = 0; /* the rows before it end before this block */
    for (int64_t key = begin; key < last; key += block_keys) {
        while (end[first] <= key) first++;
        attend_block(task, scratch, key, last - key < block_keys ? last - key : block_keys,
                     first * group);
    }
    store(task, scratch);
}

/* Every thread walks the same list of tasks and runs those it claims.  The list goes from the last
 * tile to the first: where spans grow along the rows the long tasks come first and the short ones
 * fill the end. */
static void attend_claimed(const cpu_backend *cpu, const ifkv_attention_args *args, int64_t *next) {
    const int group = args->n_head / args->n_kv_head;
    const int64_t tile_rows = tile_for(group, args->d_head).rows;
    tile_scratch scratch;
    layout(group, args->d_head, cpu->scratch + (size_t)omp_get_thread_num() * cpu->scratch_bytes,
           &scratch);
    int64_t mine = ifkv_cpu_claim(next), n_seen = 0, group_begin;
    for (int64_t group_end = args->q.n_row; group_end > 0; group_end = group_begin) {
        group_begin = group_end - 1;
        while (group_begin > 0 && args->begin[group_begin - 1] == args->begin[group_end - 1])
            group_begin--;
        const int64_t n_tile = (group_end - group_begin + tile_rows - 1) / tile_rows;
        for (int64_t i = n_tile - 1; i >= 0; i--)
            for (int h = 0; h < args->n_kv_head; h++) {
                if (n_seen++ != mine) continue;
                const int64_t row = group_begin + i * tile_rows, left = group_end - row;
                const tile_task it = {.args = args,
                                      .group = group,
                                      .kv_head = h,
                                      .row = row,
                                      .n_row = left < tile_rows ? left : tile_rows};
                attend_tile(&it, &scratch);
                mine = ifkv_cpu_claim(next);
            }
    }
}

static ifkv_status check_attention(const cpu_backend *cpu, const ifkv_attention_args *args) {
    IFKV_TRY(ifkv_cpu_check_heads("attention", args->n_head, args->n_kv_head, args->d_head));
    const int64_t n_row = args->q.n_row, n_key = args->k.n_row;
    const int64_t q_cols = (int64_t)args->n_head * args->d_head,
                  kv_cols = (int64_t)args->n_kv_head * args->d_head;
    IFKV_TRY(ifkv_view_check("attention", "q", &args->q, IFKV_DTYPE_F32, n_row, q_cols));
    IFKV_TRY(ifkv_view_check("attention", "k", &args->k, IFKV_DTYPE_F32, n_key, kv_cols));
    IFKV_TRY(ifkv_view_check("attention", "v", &args->v, IFKV_DTYPE_F32, n_key, kv_cols));
    IFKV_TRY(ifkv_view_check("attention", "out", &args->out, IFKV_DTYPE_F32, n_row, q_cols));
    IFKV_TRY(ifkv_view_check("attention", "lse", &args->lse, IFKV_DTYPE_F32, n_row, args->n_head));
    IFKV_REQUIRE(args->k.stride <= INT_MAX && args->v.stride <= INT_MAX, IFKV_ERR_INTERNAL,
                 IFKV_E_SHAPE, "attention: got strides %lld, %lld, expected at most %d",
                 (long long)args->k.stride, (long long)args->v.stride, INT_MAX);
    IFKV_REQUIRE(cpu->group == args->n_head / args->n_kv_head && cpu->d_head == args->d_head,
                 IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "attention: prepared for groups of %d heads of width %d, got %d of %d", cpu->group,
                 cpu->d_head, args->n_head / args->n_kv_head, args->d_head);
    for (int64_t i = 0; i < n_row; i++)
        IFKV_REQUIRE(0 <= args->begin[i] && args->begin[i] <= args->end[i] && args->end[i] <= n_key,
                     IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                     "attention: row %lld sees [%lld, %lld) of %lld keys", (long long)i,
                     (long long)args->begin[i], (long long)args->end[i], (long long)n_key);
    return IFKV_OK;
}

ifkv_status ifkv_cpu_attention(ifkv_backend *backend, const ifkv_attention_args *args) {
    const cpu_backend *cpu = (const cpu_backend *)backend;
    IFKV_TRY(check_attention(cpu, args));
    int64_t next = 0;
#pragma omp parallel num_threads(backend->n_thread)
    attend_claimed(cpu, args, &next);
    return IFKV_OK;
}
