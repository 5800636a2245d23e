/* Arithmetic shared by mma.sync and wgmma: bf16 in, float32 sums in the order of k. */
#ifndef IFKV_EMU_MATRIX_H
#define IFKV_EMU_MATRIX_H

#include <stdint.h>
#include <string.h>

typedef float emu_float8 __attribute__((vector_size(32)));

inline float emu_bf16_value(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* c [n_row, 8 n_eight] += a [n_row, 16] b [16, 8 n_eight], all dense; `c` in rows of `n_eight`. */
inline void emu_multiply(int n_row, int n_eight, const float *a, const emu_float8 *b,
                         emu_float8 *c) {
    for (int row = 0; row < n_row; row++)
        for (int j = 0; j < n_eight; j++) {
            emu_float8 sum = c[row * n_eight + j];
            for (int k = 0; k < 16; k++) sum += a[row * 16 + k] * b[k * n_eight + j];
            c[row * n_eight + j] = sum;
        }
}

#endif
