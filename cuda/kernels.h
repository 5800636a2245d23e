/* The whole border between the C and the CUDA of the back end: one asynchronous launcher per
 * operation, each in the .cu file of its name.
 *
 * Launchers mean what backend.h says, in bfloat16 with float32 sums unless a comment says
 * otherwise.  They check shapes on the host, enqueue on the context's stream, and never allocate,
 * synchronise or read the environment.  What only the device can see (a row number outside its
 * matrix, a span outside the keys) is not touched: the kernel raises the context's fault word, and
 * the next sync reports it.  Rows may start anywhere; where all operands and strides are multiples
 * of 16 bytes, memory is read and written in pieces of 16 bytes. */
#ifndef IFKV_CUDA_KERNELS_H
#define IFKV_CUDA_KERNELS_H

#include <cuda_runtime_api.h>

#include "backend.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What a kernel saw, raised by the first thread that sees one; several may race, all are true. */
typedef enum ifkv_cuda_fault {
    IFKV_CUDA_FAULT_NONE,
    IFKV_CUDA_FAULT_GATHER,    /* row[i] outside `from` */
    IFKV_CUDA_FAULT_SCATTER,   /* row[i] outside `to` */
    IFKV_CUDA_FAULT_ATTENTION, /* not 0 <= begin <= end <= n_key */
    IFKV_CUDA_FAULT_REFIT,     /* row[i] outside x, or not above row[i - 1] */
} ifkv_cuda_fault;

/* Borrowed from the back end by every launch. */
typedef struct ifkv_cuda_context {
    cudaStream_t stream;
    int n_sm;        /* multiprocessors of the device */
    int arch;        /* 10 * major + minor of its compute capability: 80, 90, ... */
    int32_t *fault;  /* device memory: an ifkv_cuda_fault */
    void *workspace; /* device memory, 256-byte aligned, of at least what prepare asked for; used
                        by one launch after another in stream order */
    size_t workspace_bytes;
    struct ifkv_tensor_maps *maps; /* of tensor_map.h; belongs to the host thread */
} ifkv_cuda_context;

ifkv_status ifkv_cuda_rms_norm(const ifkv_cuda_context *context, const ifkv_view *x,
                               const ifkv_view *weight, double eps, const ifkv_view *out);
/* Widths up to 128. */
ifkv_status ifkv_cuda_angles(const ifkv_cuda_context *context, const double *frequency,
                             const int64_t *position, const ifkv_view *cos_sin);
ifkv_status ifkv_cuda_rope(const ifkv_cuda_context *context, const ifkv_view *x, int n_head,
                           const ifkv_view *weight, double eps, const ifkv_view *cos_sin);
ifkv_status ifkv_cuda_swiglu(const ifkv_cuda_context *context, const ifkv_view *gate_up,
                             const ifkv_view *out);
ifkv_status ifkv_cuda_gather(const ifkv_cuda_context *context, const ifkv_view *from,
                             const int64_t *row, const ifkv_view *to);
ifkv_status ifkv_cuda_scatter(const ifkv_cuda_context *context, const ifkv_view *from,
                              const int64_t *row, const ifkv_view *to);
/* Parts float32 or float64, output bfloat16, float32 or float64. */
ifkv_status ifkv_cuda_merge(const ifkv_cuda_context *context, const ifkv_merge_args *args);
ifkv_status ifkv_cuda_score(const ifkv_cuda_context *context, const ifkv_score_args *args);
ifkv_status ifkv_cuda_row_distance(const ifkv_cuda_context *context, const ifkv_view *a,
                                   const ifkv_view *b, float *out);
ifkv_status ifkv_cuda_top_k(const ifkv_cuda_context *context, const float *value, int64_t n,
                            int64_t k, int64_t *scratch, int64_t *index);

/* Moments and solution float64; d_head a multiple of 16 up to 128, all rows and the scratch begin
 * on 16 bytes.  Nothing moves where the fault word stands, by whatever operation. */
ifkv_status ifkv_cuda_refit(const ifkv_cuda_context *context, const ifkv_refit_args *args);
ifkv_status ifkv_cuda_draw(const ifkv_cuda_context *context, const ifkv_draw *draw, int64_t n,
                           void *to);

/* Attention over spans; out bfloat16 or float32 (partial results), lse float32.  d_head a multiple
 * of 16 up to 128, at most 64 query heads a K/V head; q, k, v: pointers and strides multiples of 16
 * bytes (out and lse anywhere).  begin and end lie in device memory: nothing about them is known on
 * the host.  V must be finite where any row looks; what no row of a tile sees may be anything. */
ifkv_status ifkv_cuda_attention(const ifkv_cuda_context *context, const ifkv_attention_args *args);
/* Workspace bytes attention needs with these heads, whatever the number of rows and keys.  Local,
 * called once by prepare. */
size_t ifkv_cuda_attention_bytes(const ifkv_cuda_context *context, int n_head, int n_kv_head,
                                 int d_head);

#ifdef __cplusplus
}
#endif
#endif
