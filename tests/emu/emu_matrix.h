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

/* The two bf16 of a word, the low half first. */
inline void emu_bf16_pair(uint32_t word, float *pair) {
    const uint32_t wide[2] = {word << 16, word & 0xffff0000u};
    memcpy(pair, wide, sizeof wide);
}

/* c [4 n_four, 8 n_eight] += a [4 n_four, 16] b [16, 8 n_eight], all dense; four rows at a time to
 * keep the adders busy. */
inline void emu_multiply(int n_four, int n_eight, const float *a, const emu_float8 *b,
                         emu_float8 *c) {
    for (int four = 0; four < n_four; four++, a += 4 * 16, c += 4 * n_eight)
        for (int j = 0; j < n_eight; j++) {
            emu_float8 sum[4];
            for (int i = 0; i < 4; i++) sum[i] = c[i * n_eight + j];
            for (int k = 0; k < 16; k++)
                for (int i = 0; i < 4; i++) sum[i] += a[i * 16 + k] * b[k * n_eight + j];
            for (int i = 0; i < 4; i++) c[i * n_eight + j] = sum[i];
        }
}

#endif
