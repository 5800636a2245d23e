/* How much the question looks at every key: attention probabilities reduced over question rows and
 * heads (algorithm 1.4).
 *
 * A task is a tile of keys of one block.  It takes the question rows in slabs and, within a slab,
 * one K/V head after the other, so a key's sums run over rows, then heads, in one order whatever
 * the threads.  Probabilities are float32, sums over rows float64; nothing of size n_row * n_key is
 * ever stored. */
#include "cpu_backend.h"

#include <limits.h>
#include <math.h>
#include <omp.h>
#include <string.h>

enum {
    TILE_KEYS = 256,
    STACKED_ROWS = 128 /* slab of question rows times query heads of one K/V head */
};

static int64_t slab_rows(int group) {
    return group < STACKED_ROWS ? STACKED_ROWS / group : 1;
}

typedef struct score_scratch {
    double *sum;  /* [TILE_KEYS] over rows */
    float *q;     /* [slab * group, d_head] times scale */
    float *s;     /* [slab * group, TILE_KEYS] */
    float *heads; /* [slab, TILE_KEYS] sum over heads of A, or of A^2 for l2h */
} score_scratch;

static size_t layout(int group, int d_head, char *data, score_scratch *scratch) {
    const size_t slab = (size_t)slab_rows(group), stacked = slab * (size_t)group;
    const size_t sum = TILE_KEYS * sizeof(double), q = stacked * (size_t)d_head * sizeof(float);
    const size_t s = stacked * TILE_KEYS * sizeof(float), heads = slab * TILE_KEYS * sizeof(float);
    const size_t q_padded = (q + 63) / 64 * 64;
    if (data) {
        scratch->sum = (double *)(void *)data;
        scratch->q = (float *)(void *)(data + sum);
        scratch->s = (float *)(void *)(data + sum + q_padded);
        scratch->heads = (float *)(void *)(data + sum + q_padded + s);
    }
    return sum + q_padded + s + heads;
}

size_t ifkv_cpu_score_bytes(int group, int d_head) {
    return layout(group, d_head, NULL, NULL);
}

/* heads [n] += A or A^2, A = exp(s - lse). */
static void add_head(float *s, int64_t n, float lse, bool is_squared, float *heads) {
    ifkv_cpu_exp_sum(s, n, lse);
    if (is_squared)
        for (int64_t j = 0; j < n; j++) heads[j] += s[j] * s[j];
    else
        for (int64_t j = 0; j < n; j++) heads[j] += s[j];
}

/* Sums over the heads of rows [row, row + n_row) for n_key keys. */
static void reduce_heads(const ifkv_score_args *args, int64_t row, int64_t n_row, int64_t key,
                         int64_t n_key, const score_scratch *scratch) {
    const int group = args->n_head / args->n_kv_head, d_head = args->d_head;
    const int64_t width = (int64_t)group * d_head;
    memset(scratch->heads, 0, (size_t)(n_row * n_key) * sizeof *scratch->heads);
    for (int h = 0; h < args->n_kv_head; h++) {
        for (int64_t i = 0; i < n_row; i++) {
            const float *q = (const float *)args->q.data + (row + i) * args->q.stride + h * width;
            for (int64_t c = 0; c < width; c++) scratch->q[i * width + c] = q[c] * args->scale;
        }
        const float *k = (const float *)args->k.data + key * args->k.stride + (int64_t)h * d_head;
        ifkv_cpu_product_nt(n_row * group, n_key, d_head, scratch->q, d_head, k, args->k.stride,
                            0.0f, scratch->s, n_key);
        for (int64_t i = 0; i < n_row * group; i++) {
            const int64_t head = (int64_t)h * group + i % group;
            const float lse =
                ((const float *)args->lse.data)[(row + i / group) * args->lse.stride + head];
            add_head(scratch->s + i * n_key, n_key, lse, args->form == IFKV_SCORE_L2H,
                     scratch->heads + i / group * n_key);
        }
    }
}

static void score_tile(const ifkv_score_args *args, int64_t key, int64_t n_key,
                       const score_scratch *scratch) {
    const int64_t slab = slab_rows(args->n_head / args->n_kv_head), n_row = args->q.n_row;
    const bool is_mean = args->form == IFKV_SCORE_L2 || args->form == IFKV_SCORE_L1;
    const double per_head = is_mean ? 1.0 / args->n_head : 1.0;
    for (int64_t j = 0; j < n_key; j++) scratch->sum[j] = 0;
    for (int64_t row = 0; row < n_row; row += slab) {
        const int64_t n = n_row - row < slab ? n_row - row : slab;
        reduce_heads(args, row, n, key, n_key, scratch);
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < n_key; j++) {
                const double a = per_head * (double)scratch->heads[i * n_key + j];
                scratch->sum[j] += args->form == IFKV_SCORE_L2 ? a * a : a;
            }
    }
    const bool is_root = args->form == IFKV_SCORE_L2 || args->form == IFKV_SCORE_L2H;
    for (int64_t j = 0; j < n_key; j++) {
        const double value = is_root ? sqrt(scratch->sum[j]) : scratch->sum[j];
        args->score[key + j] += (float)((double)args->weight * value);
    }
}

/* Every thread walks the same list of tiles and runs those it claims. */
static void score_claimed(const cpu_backend *cpu, const ifkv_score_args *args, int64_t *next) {
    score_scratch scratch = {0};
    layout(cpu->group, args->d_head,
           cpu->scratch + (size_t)omp_get_thread_num() * cpu->scratch_bytes, &scratch);
    int64_t mine = ifkv_cpu_claim(next), task = 0;
    for (int64_t b = 0; b < args->n_block; b++)
        for (int64_t key = args->block[b]; key < args->block[b + 1]; key += TILE_KEYS) {
            if (task++ != mine) continue;
            const int64_t left = args->block[b + 1] - key;
            score_tile(args, key, left < TILE_KEYS ? left : TILE_KEYS, &scratch);
            mine = ifkv_cpu_claim(next);
        }
}

static ifkv_status check_score(const cpu_backend *cpu, const ifkv_score_args *args) {
    IFKV_TRY(ifkv_cpu_check_heads("score", args->n_head, args->n_kv_head, args->d_head));
    const int64_t n_row = args->q.n_row, n_key = args->k.n_row;
    IFKV_TRY(ifkv_view_check("score", "q", &args->q, IFKV_DTYPE_F32, n_row,
                             (int64_t)args->n_head * args->d_head));
    IFKV_TRY(ifkv_view_check("score", "lse", &args->lse, IFKV_DTYPE_F32, n_row, args->n_head));
    IFKV_TRY(ifkv_view_check("score", "k", &args->k, IFKV_DTYPE_F32, n_key,
                             (int64_t)args->n_kv_head * args->d_head));
    IFKV_REQUIRE(args->k.stride <= INT_MAX, IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "score: got stride %lld, expected at most %d", (long long)args->k.stride, INT_MAX);
    IFKV_REQUIRE(cpu->group == args->n_head / args->n_kv_head && cpu->d_head == args->d_head,
                 IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "score: prepared for groups of %d heads of width %d, got %d of %d", cpu->group,
                 cpu->d_head, args->n_head / args->n_kv_head, args->d_head);
    IFKV_REQUIRE(args->n_block >= 0 && args->block[0] == 0 && args->block[args->n_block] == n_key,
                 IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "score: %lld blocks cover [%lld, %lld) of %lld keys", (long long)args->n_block,
                 (long long)args->block[0], (long long)args->block[args->n_block],
                 (long long)n_key);
    for (int64_t b = 0; b < args->n_block; b++)
        IFKV_REQUIRE(args->block[b] <= args->block[b + 1], IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                     "score: block %lld begins at %lld and ends at %lld", (long long)b,
                     (long long)args->block[b], (long long)args->block[b + 1]);
    return IFKV_OK;
}

ifkv_status ifkv_cpu_score(ifkv_backend *backend, const ifkv_score_args *args) {
    const cpu_backend *cpu = (const cpu_backend *)backend;
    IFKV_TRY(check_score(cpu, args));
    int64_t next = 0;
#pragma omp parallel num_threads(backend->n_thread)
    score_claimed(cpu, args, &next);
    return IFKV_OK;
}
