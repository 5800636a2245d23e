/* What the files of the CPU back end share: the struct behind its handle, its operations, the
 * products of small tiles, and the exponential.
 *
 * Owns nothing; included by cpu_*.c only.  Always holds: work is cut into tasks by the shapes in
 * the call alone and tasks are dealt to threads, so that the bits of a row never depend on
 * n_thread. */
#ifndef IFKV_SRC_CPU_BACKEND_H
#define IFKV_SRC_CPU_BACKEND_H

#include "backend.h"

/* The release build targets plain x86-64; hot loops are compiled for wider vectors as well and
 * picked when the program is loaded.  No loop here lets the compiler contract or reassociate, so
 * all versions of a loop give the same bits. */
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define IFKV_CPU_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define IFKV_CPU_CLONES
#endif

enum {
    IFKV_CPU_MAX_D_HEAD = 256,
    /* Partial sums and maxima a row is reduced over: two 512-bit vectors, enough to hide that each
     * is carried through memory. */
    IFKV_CPU_LANES = 32
};

typedef struct cpu_backend {
    ifkv_backend base;
    int group, d_head; /* what scratch was sized for by prepare; 0: not yet */
    size_t scratch_bytes;
    char *scratch; /* owns: [n_thread, scratch_bytes] */
} cpu_backend;

/* REQUIRE that n_head, n_kv_head, d_head are heads this back end computes. */
ifkv_status ifkv_cpu_check_heads(const char *op, int n_head, int n_kv_head, int d_head);

/* True if an operation on this many elements is worth waking the other threads. */
static inline bool ifkv_cpu_is_large(int64_t n_element) {
    return n_element >= 32768;
}

/* The next task of a list that several threads work off. */
static inline int64_t ifkv_cpu_claim(int64_t *next) {
    int64_t mine;
#pragma omp atomic capture
    mine = (*next)++;
    return mine;
}

/* Scratch bytes a thread needs for attention and score with these heads. */
size_t ifkv_cpu_attention_bytes(int group, int d_head);
size_t ifkv_cpu_score_bytes(int group, int d_head);

/* c [m, n] = alpha a [m, k] b^T [n, k] + beta c, and the same with b [k, n] not transposed.  One
 * thread; rows are lda, ldb, ldc elements apart; c is not read if beta is 0. */
void ifkv_cpu_product_nt(int64_t m, int64_t n, int64_t k, const float *a, int64_t lda,
                         const float *b, int64_t ldb, float beta, float *c, int64_t ldc);
void ifkv_cpu_product_nn(int64_t m, int64_t n, int64_t k, const float *a, int64_t lda,
                         const float *b, int64_t ldb, float beta, float *c, int64_t ldc);
/* Make the BLAS library run each call on the calling thread. */
void ifkv_cpu_blas_init(void);

/* The largest of x [n]; -infinity if n is 0. */
float ifkv_cpu_max(const float *x, int64_t n);
/* x[i] = exp(x[i] - shift), and the sum of the results; shift is a maximum or a log-sum-exp of x,
 * so that no difference exceeds 88.  Within 2 ulp of the true exponential down to 2^-126, 0 far
 * below; a NaN stays one. */
float ifkv_cpu_exp_sum(float *x, int64_t n, float shift);
/* out[i] = gate[i] / (1 + exp(-gate[i])) * up[i] */
void ifkv_cpu_silu_mul(const float *gate, const float *up, float *out, int64_t n);

ifkv_status ifkv_cpu_matmul(ifkv_backend *backend, const ifkv_view *x, const ifkv_view *w,
                            bool add_to_out, const ifkv_view *out);
ifkv_status ifkv_cpu_rms_norm(ifkv_backend *backend, const ifkv_view *x, const ifkv_view *weight,
                              double eps, const ifkv_view *out);
ifkv_status ifkv_cpu_angles(ifkv_backend *backend, const double *frequency, const int64_t *position,
                            const ifkv_view *cos_sin);
ifkv_status ifkv_cpu_rope(ifkv_backend *backend, const ifkv_view *x, int n_head,
                          const ifkv_view *weight, double eps, const ifkv_view *cos_sin);
ifkv_status ifkv_cpu_swiglu(ifkv_backend *backend, const ifkv_view *gate_up, const ifkv_view *out);
ifkv_status ifkv_cpu_gather(ifkv_backend *backend, const ifkv_view *from, const int64_t *row,
                            const ifkv_view *to);
ifkv_status ifkv_cpu_scatter(ifkv_backend *backend, const ifkv_view *from, const int64_t *row,
                             const ifkv_view *to);
ifkv_status ifkv_cpu_row_distance(ifkv_backend *backend, const ifkv_view *a, const ifkv_view *b,
                                  float *out);
ifkv_status ifkv_cpu_attention(ifkv_backend *backend, const ifkv_attention_args *args);
ifkv_status ifkv_cpu_merge(ifkv_backend *backend, const ifkv_merge_args *args);
ifkv_status ifkv_cpu_score(ifkv_backend *backend, const ifkv_score_args *args);
ifkv_status ifkv_cpu_refit(ifkv_backend *backend, const ifkv_refit_args *args);
ifkv_status ifkv_cpu_top_k(ifkv_backend *backend, const float *value, int64_t n, int64_t k,
                           int64_t *scratch, int64_t *index);

#endif
