/* Matrix products of the CUDA back end: bfloat16 operands, float32 sums, over cuBLASLt.
 *
 * Owns the library's handle, its workspace, and the algorithm chosen for every shape met so far.
 * Which algorithm a product uses depends on its shape and on the library, never on what was
 * multiplied before. */
#ifndef IFKV_CUDA_CUDA_MATMUL_H
#define IFKV_CUDA_CUDA_MATMUL_H

#include <cuda_runtime_api.h>

#include "backend.h"

typedef struct ifkv_cuda_matmul ifkv_cuda_matmul;

/* The caller owns *matmul_p.  Errors: RESOURCE. */
ifkv_status ifkv_cuda_matmul_create(ifkv_cuda_matmul **matmul_p);
void ifkv_cuda_matmul_destroy(ifkv_cuda_matmul *matmul);

/* matmul of backend.h; out may be float32 too.  Asynchronous on the stream, but the first product
 * of a shape that has several algorithms, which waits while they are timed.
 * Errors: INTERNAL if shapes do not fit. */
ifkv_status ifkv_cuda_matmul_run(ifkv_cuda_matmul *matmul, cudaStream_t stream, const ifkv_view *x,
                                 const ifkv_view *w, bool add_to_out, const ifkv_view *out);

#endif
