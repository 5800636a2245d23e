/* The model's tensor maps: what cuTensorMapEncodeTiled is on a GPU. */
#ifndef IFKV_EMU_TENSOR_MAP_H
#define IFKV_EMU_TENSOR_MAP_H

#include <cuda.h>

/* Same signature, same refusals (CUDA_ERROR_INVALID_VALUE) as cuTensorMapEncodeTiled of CUDA 12 and
 * later, in the driver's own alignment, stride and box limits; a stand-in for
 * cudaGetDriverEntryPointByVersion hands it out under that name.  Only bf16 and float32 without
 * interleave are modelled, the rest is refused with CUDA_ERROR_NOT_SUPPORTED. */
extern "C" CUresult
emu_tensor_map_encode(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                      const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                      const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                      CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                      CUtensorMapFloatOOBfill fill);

#endif
