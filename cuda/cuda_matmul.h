/* Matrix products of the CUDA back end: bfloat16 operands, float32 sums, over cuBLASLt.
 *
 * Owns the library's handle, its workspace, and the algorithm chosen for every shape met so far.
 * The bits of a row depend on the row and the weights alone in products of more than
 * IFKV_CUDA_FEW_ROWS rows, else also on the power of two that the number of rows is rounded up to;
 * never on what was multiplied before, nor on the clock. */
#ifndef IFKV_CUDA_CUDA_MATMUL_H
#define IFKV_CUDA_CUDA_MATMUL_H

#include <cuda_runtime_api.h>

#include "backend.h"

enum {
    IFKV_CUDA_FEW_ROWS = 16,
    IFKV_CUDA_ROW_BLOCK = 4096 /* rows that algorithms are chosen for, if more than a few */
};

typedef struct ifkv_cuda_matmul ifkv_cuda_matmul;

/* The caller owns *matmul_p.  Errors: RESOURCE. */
ifkv_status ifkv_cuda_matmul_create(ifkv_cuda_matmul **matmul_p);
void ifkv_cuda_matmul_destroy(ifkv_cuda_matmul *matmul);

/* matmul of backend.h; out may be float32 too.  Asynchronous on the back end's stream, but the
 * first product of a shape that has several algorithms, which waits while they are timed. Errors:
 * INTERNAL if shapes do not fit. */
ifkv_status ifkv_cuda_matmul_run(ifkv_cuda_matmul *matmul, const ifkv_backend *backend,
                                 const ifkv_view *x, const ifkv_view *w, bool add_to_out,
                                 const ifkv_view *out);

#endif
