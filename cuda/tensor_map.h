/* Tensor maps of bfloat16 tensors for bulk copies, each encoded once.
 *
 * Owns a table of what was encoded last: a layer loop asks for the same few maps again and again,
 * and the driver takes about as long for one as a launch takes.  A map depends on address and shape
 * alone, never on what lies there, so memory may come and go behind it.  Knows no kernel. */
#ifndef IFKV_CUDA_TENSOR_MAP_H
#define IFKV_CUDA_TENSOR_MAP_H

#include <cuda.h>
#include <stdint.h>

#include "status.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { IFKV_TENSOR_MAPS = 512 }; /* kept; the next one forgets them all */

/* Innermost dimension first, which is dense; all the same words where the map is the same. */
typedef struct ifkv_tensor_shape {
    const void *data;    /* device memory, 16-byte aligned */
    uint64_t rank;       /* dimensions, 1 to 4; what follows is 0 beyond them */
    uint64_t dims[4];    /* elements */
    uint64_t strides[3]; /* elements, of all dimensions but the innermost */
    uint32_t box[4];     /* elements of one copy; the innermost make up 128 swizzled bytes */
} ifkv_tensor_shape;

typedef struct ifkv_tensor_maps ifkv_tensor_maps;

ifkv_status ifkv_tensor_maps_create(ifkv_tensor_maps **maps_p);
void ifkv_tensor_maps_destroy(ifkv_tensor_maps *maps);
/* Copy the map of a tensor to *map, zeros beyond its ends.  Local, allocates nothing.  Errors:
 * RESOURCE where the driver has no encoder, INTERNAL where it refuses the shape. */
ifkv_status ifkv_tensor_maps_get(ifkv_tensor_maps *maps, const ifkv_tensor_shape *shape,
                                 CUtensorMap *map);
/* How often the driver was asked so far. */
int64_t ifkv_tensor_maps_encoded(const ifkv_tensor_maps *maps);

#ifdef __cplusplus
}
#endif
#endif
