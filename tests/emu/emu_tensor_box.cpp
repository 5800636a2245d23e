/* Tensor maps: encoding, decoding, and the copies between a box and dense bytes. */
#include "emu_tensor_box.h"

#include "emu_tensor_map.h"

#include <string.h>

/* What the model keeps in the 128 opaque bytes. */
struct encoded_map {
    char magic[8];
    uint64_t address;
    uint64_t dims[emu_max_rank];
    uint64_t strides[emu_max_rank - 1];
    uint16_t box[emu_max_rank];
    uint8_t rank, element_bytes, swizzle_bits;
};
static_assert(sizeof(encoded_map) <= sizeof(CUtensorMap), "an encoded map fits its 128 bytes");
constexpr char map_magic[8] = {'e', 'm', 'u', ' ', 'm', 'a', 'p', 0};

/* Inner bytes of a box that a swizzle allows; 0 = any. */
static int swizzle_of(CUtensorMapSwizzle swizzle, uint32_t *span) {
    switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE: *span = 0; return 0;
    case CU_TENSOR_MAP_SWIZZLE_32B: *span = 32; return 1;
    case CU_TENSOR_MAP_SWIZZLE_64B: *span = 64; return 2;
    case CU_TENSOR_MAP_SWIZZLE_128B: *span = 128; return 3;
    default: return -1;
    }
}

static bool is_valid(cuuint32_t rank, const void *address, const cuuint64_t *dims,
                     const cuuint64_t *strides, const cuuint32_t *box,
                     const cuuint32_t *element_strides, uint32_t element_bytes, uint32_t span) {
    if (rank < 1 || rank > emu_max_rank || !address ||
        reinterpret_cast<uintptr_t>(address) % 16 != 0)
        return false;
    for (cuuint32_t i = 0; i < rank; i++) {
        if (dims[i] == 0 || dims[i] > 1ull << 32 || box[i] == 0 || box[i] > 256) return false;
        if (element_strides[i] == 0 || element_strides[i] > 8) return false;
        if (i > 0 && (strides[i - 1] % 16 != 0 || strides[i - 1] >= 1ull << 40)) return false;
    }
    const uint32_t inner = box[0] * element_bytes;
    return inner % 16 == 0 && (span == 0 || inner <= span);
}

CUresult emu_tensor_map_encode(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                               void *address, const cuuint64_t *dims, const cuuint64_t *strides,
                               const cuuint32_t *box, const cuuint32_t *element_strides,
                               CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                               CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
    uint32_t span = 0;
    const int swizzle_bits = swizzle_of(swizzle, &span);
    const uint32_t element_bytes = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16  ? 2
                                   : type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4
                                                                             : 0;
    if (element_bytes == 0 || swizzle_bits < 0 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
        fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
        return CUDA_ERROR_NOT_SUPPORTED;
    if (!is_valid(rank, address, dims, strides, box, element_strides, element_bytes, span))
        return CUDA_ERROR_INVALID_VALUE;
    encoded_map out = {};
    memcpy(out.magic, map_magic, sizeof out.magic);
    out.address = reinterpret_cast<uintptr_t>(address);
    out.rank = static_cast<uint8_t>(rank);
    out.element_bytes = static_cast<uint8_t>(element_bytes);
    out.swizzle_bits = static_cast<uint8_t>(swizzle_bits);
    for (cuuint32_t i = 0; i < rank; i++) {
        if (element_strides[i] != 1) return CUDA_ERROR_NOT_SUPPORTED;
        out.dims[i] = dims[i];
        out.box[i] = static_cast<uint16_t>(box[i]);
        if (i > 0) out.strides[i - 1] = strides[i - 1];
    }
    memset(map, 0, sizeof *map);
    memcpy(map, &out, sizeof out);
    return CUDA_SUCCESS;
}

bool emu_tensor_box_at(const CUtensorMap *map, int rank, const int *coordinates,
                       emu_tensor_box *box) {
    encoded_map in;
    memcpy(&in, map, sizeof in);
    if (memcmp(in.magic, map_magic, sizeof in.magic) != 0 || in.rank != rank) return false;
    box->address = reinterpret_cast<unsigned char *>(in.address);
    box->rank = rank;
    box->element_bytes = in.element_bytes;
    box->swizzle_bits = in.swizzle_bits;
    for (int i = 0; i < rank; i++) {
        box->dims[i] = static_cast<int64_t>(in.dims[i]);
        box->strides[i] = i == 0 ? in.element_bytes : static_cast<int64_t>(in.strides[i - 1]);
        box->box[i] = in.box[i];
        box->origin[i] = coordinates[i];
    }
    return true;
}

uint32_t emu_tensor_box_bytes(const emu_tensor_box &box) {
    uint32_t bytes = static_cast<uint32_t>(box.element_bytes);
    for (int i = 0; i < box.rank; i++) bytes *= static_cast<uint32_t>(box.box[i]);
    return bytes;
}

/* Call work(global, dense offset, bytes) for the part of every innermost row that lies inside the
 * tensor. */
template <typename F> static void each_row(const emu_tensor_box &box, F work) {
    const int64_t first = box.origin[0] < 0 ? 0 : box.origin[0];
    int64_t last = box.origin[0] + box.box[0];
    if (last > box.dims[0]) last = box.dims[0];
    if (first >= last) return;
    const int64_t row_bytes = static_cast<int64_t>(box.box[0]) * box.element_bytes;
    int64_t n_row = 1;
    for (int i = 1; i < box.rank; i++) n_row *= box.box[i];
    for (int64_t row = 0; row < n_row; row++) {
        int64_t rest = row, global = first * box.element_bytes;
        bool is_inside = true;
        for (int i = 1; i < box.rank; i++) {
            const int64_t at = box.origin[i] + rest % box.box[i];
            rest /= box.box[i];
            is_inside = is_inside && at >= 0 && at < box.dims[i];
            global += at * box.strides[i];
        }
        if (is_inside)
            work(box.address + global,
                 row * row_bytes + (first - box.origin[0]) * box.element_bytes,
                 static_cast<size_t>((last - first) * box.element_bytes));
    }
}

std::vector<unsigned char> emu_tensor_box_gather(const emu_tensor_box &box) {
    std::vector<unsigned char> dense(emu_tensor_box_bytes(box));
    each_row(box, [&](const unsigned char *global, int64_t at, size_t bytes) {
        memcpy(&dense[static_cast<size_t>(at)], global, bytes);
    });
    return dense;
}

void emu_tensor_box_scatter(const emu_tensor_box &box, const unsigned char *dense) {
    each_row(box, [&](unsigned char *global, int64_t at, size_t bytes) {
        memcpy(global, dense + at, bytes);
    });
}
