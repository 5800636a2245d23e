/* A hash table that is never more than half full, so that looking up is short.  See tensor_map.h.
 */
#include "tensor_map.h"

#include "cuda_check.h"

#include <cudaTypedefs.h>
#include <stdlib.h>
#include <string.h>

enum { N_SLOT = 2 * IFKV_TENSOR_MAPS, N_WORD = sizeof(ifkv_tensor_shape) / sizeof(uint64_t) };
_Static_assert(sizeof(ifkv_tensor_shape) == 88, "no padding: shapes are compared as words");
_Static_assert((N_SLOT & (N_SLOT - 1)) == 0, "a power of two");

struct ifkv_tensor_maps {
    CUtensorMap map[N_SLOT];         /* first: aligned */
    ifkv_tensor_shape shape[N_SLOT]; /* rank 0: free */
    int n_map;
    int64_t n_encoded;
    PFN_cuTensorMapEncodeTiled_v12000 encode; /* NULL: not asked for yet */
};

ifkv_status ifkv_tensor_maps_create(ifkv_tensor_maps **maps_p) {
    ifkv_tensor_maps *maps = aligned_alloc(_Alignof(ifkv_tensor_maps), sizeof *maps);
    IFKV_REQUIRE(maps, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "back end cuda: out of host memory");
    memset(maps, 0, sizeof *maps);
    *maps_p = maps;
    return IFKV_OK;
}

void ifkv_tensor_maps_destroy(ifkv_tensor_maps *maps) {
    free(maps);
}

int64_t ifkv_tensor_maps_encoded(const ifkv_tensor_maps *maps) {
    return maps->n_encoded;
}

/* The driver's encoder, asked for at run time: linked to libcuda, the program would not start where
 * there is no driver. */
static ifkv_status find_encoder(ifkv_tensor_maps *maps) {
    void *found = NULL;
    enum cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    if (maps->encode) return IFKV_OK;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &result);
    IFKV_REQUIRE(error == cudaSuccess && result == cudaDriverEntryPointSuccess && found,
                 IFKV_ERR_RESOURCE, IFKV_E_BACKEND,
                 "back end cuda: the driver has no cuTensorMapEncodeTiled");
    memcpy(&maps->encode, &found, sizeof found); /* C has no cast from data to code */
    return IFKV_OK;
}

static ifkv_status encode(ifkv_tensor_maps *maps, const ifkv_tensor_shape *shape,
                          CUtensorMap *map) {
    const cuuint32_t steps[] = {1, 1, 1, 1};
    cuuint64_t dims[4], bytes[3];
    for (int i = 0; i < 4; i++) dims[i] = shape->dims[i];
    for (int i = 0; i < 3; i++) bytes[i] = 2 * shape->strides[i];
    IFKV_TRY(find_encoder(maps));
    maps->n_encoded++;
    const CUresult result = maps->encode(
        map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, (cuuint32_t)shape->rank, (void *)shape->data, dims,
        bytes, shape->box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    IFKV_REQUIRE(result == CUDA_SUCCESS, IFKV_ERR_INTERNAL, IFKV_E_BACKEND,
                 "back end cuda: no tensor map for %p: error %d", shape->data, (int)result);
    return IFKV_OK;
}

static unsigned hash(const ifkv_tensor_shape *shape) {
    uint64_t word[N_WORD], h = 0;
    memcpy(word, shape, sizeof word);
    for (int i = 0; i < N_WORD; i++) {
        h = (h ^ word[i]) * UINT64_C(0x9e3779b97f4a7c15);
        h ^= h >> 32;
    }
    return (unsigned)h & (N_SLOT - 1);
}

ifkv_status ifkv_tensor_maps_get(ifkv_tensor_maps *maps, const ifkv_tensor_shape *shape,
                                 CUtensorMap *map) {
    const unsigned first = hash(shape);
    unsigned slot = first;
    while (maps->shape[slot].rank && memcmp(&maps->shape[slot], shape, sizeof *shape))
        slot = (slot + 1) & (N_SLOT - 1);
    if (!maps->shape[slot].rank) {
        if (maps->n_map == IFKV_TENSOR_MAPS) {
            memset(maps->shape, 0, sizeof maps->shape);
            maps->n_map = 0;
            slot = first;
        }
        IFKV_TRY(encode(maps, shape, &maps->map[slot]));
        maps->shape[slot] = *shape;
        maps->n_map++;
    }
    *map = maps->map[slot];
    return IFKV_OK;
}
