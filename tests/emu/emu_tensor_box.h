/* Boxes of tensors in global memory, as a tensor map describes them. */
#ifndef IFKV_EMU_TENSOR_BOX_H
#define IFKV_EMU_TENSOR_BOX_H

#include <cuda.h>
#include <stdint.h>

#include <vector>

constexpr int emu_max_rank = 5;

/* One box at its place.  The box in shared memory is dense, innermost dimension first, then
 * swizzled by address. */
struct emu_tensor_box {
    unsigned char *address;
    int rank, element_bytes,
        swizzle_bits; // swizzle: 16-byte chunk number ^= low bits of the 128-byte line number
    int64_t dims[emu_max_rank],
        strides[emu_max_rank]; // elements; bytes, strides[0] = element_bytes
    int box[emu_max_rank];
    int64_t origin[emu_max_rank];
};

/* False if `map` is not one of emu_tensor_map_encode, or not of this rank. */
bool emu_tensor_box_at(const CUtensorMap *map, int rank, const int *coordinates,
                       emu_tensor_box *box);
uint32_t emu_tensor_box_bytes(const emu_tensor_box &box);

/* The box as dense bytes, zeros outside the tensor; and back, leaving out what is outside. */
std::vector<unsigned char> emu_tensor_box_gather(const emu_tensor_box &box);
void emu_tensor_box_scatter(const emu_tensor_box &box, const unsigned char *dense);

/* Where byte `at` of the dense box lies when the box starts at offset `start` of shared memory. */
inline uint32_t emu_tensor_box_swizzle(const emu_tensor_box &box, uint32_t start, uint32_t at) {
    const uint32_t linear = start + at;
    return linear ^ ((linear >> 7 & ((1u << box.swizzle_bits) - 1)) << 4);
}

#endif
