/* What the attention kernels and the host code that chooses between them agree on.
 *
 * Private to the attention of the CUDA back end and its tests; the back end calls
 * ifkv_cuda_attention of kernels.h.  Who may call a kernel with what is checked once, in
 * attention.c. */
#ifndef IFKV_CUDA_ATTENTION_H
#define IFKV_CUDA_ATTENTION_H

#include "attention_plan.h"
#include "kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum ifkv_attention_kernel {
    IFKV_ATTENTION_FASTEST, /* of those the device and d_head allow: never a matter of row counts */
    IFKV_ATTENTION_SM80,    /* any device, d_head a multiple of 16 up to 128 */
    IFKV_ATTENTION_SM90     /* compute capability 9.x, d_head 64 or 128 */
} ifkv_attention_kernel;

/* Stacked rows of a kernel's tile; the group of query heads of a K/V head must fit.  The sm_90
 * kernel has a warpgroup for every 64 of them: at d_head 64 the registers of three fit, and 128
 * works as well. */
enum {
    IFKV_ATTENTION_SM80_M = 64,
    IFKV_ATTENTION_SM90_D64_M = 192,
    IFKV_ATTENTION_SM90_D128_M = 128
};

static inline int ifkv_attention_tile_m(ifkv_attention_kernel kernel, int d_head) {
    if (kernel == IFKV_ATTENTION_SM80) return IFKV_ATTENTION_SM80_M;
    return d_head == 64 ? IFKV_ATTENTION_SM90_D64_M : IFKV_ATTENTION_SM90_D128_M;
}

/* One call as its kernel gets it.  Pointers are borrowed device memory, strides count elements. */
typedef struct ifkv_attention_call {
    const void *q, *k, *v; /* bfloat16, 16-byte aligned rows */
    int64_t q_stride, k_stride, v_stride;
    const int64_t *begin, *end; /* [n_row] */
    int64_t n_row, n_key;
    int d_head;
    float scale_log2;                         /* scale * log2(e): scores become powers of two */
    void *out;                                /* [n_part, n_row, n_head * d_head] */
    bool is_out_float;                        /* float32, else bfloat16 */
    float *lse;                               /* [n_part, n_row, n_head] */
    int64_t out_stride, lse_stride;           /* between rows */
    int64_t out_part_stride, lse_part_stride; /* between parts */
    int32_t *fault;
    uint32_t *next_item; /* counter for dynamic scheduling */
    ifkv_attention_plan plan;
} ifkv_attention_call;

/* Enqueue one kernel for all of call->plan. */
ifkv_status ifkv_cuda_attention_sm80(const ifkv_cuda_context *context,
                                     const ifkv_attention_call *call);
ifkv_status ifkv_cuda_attention_sm90(const ifkv_cuda_context *context,
                                     const ifkv_attention_call *call);

/* ifkv_cuda_attention by the kernel named, with spans cut into parts of part_keys keys; 0: as
 * planned.  UNSUPPORTED where that kernel cannot, INTERNAL where the parts exceed the workspace. */
ifkv_status ifkv_cuda_attention_by(const ifkv_cuda_context *context,
                                   const ifkv_attention_args *args, ifkv_attention_kernel kernel,
                                   int64_t part_keys);

#ifdef __cplusplus
}
#endif
#endif
