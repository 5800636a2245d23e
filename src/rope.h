/* Rotary position embedding: angles per model family, computed in double.
 *
 * Owns the frequencies (algorithm section 6) and the tables of cosines and sines for a list of
 * rotary positions.  Pure arithmetic: knows nothing of back ends; half-split pairs (i, i +
 * d_head/2) are the application's business. */
#ifndef IFKV_SRC_ROPE_H
#define IFKV_SRC_ROPE_H

#include "config.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Radians per position of each pair: frequency [d_head / 2]. */
void ifkv_rope_frequencies(const ifkv_config *config, double *frequency);

/* cos_sin [n_row, d_head]: cosines of the d_head/2 pairs, then their sines, of position[i] *
 * frequency[j] in float32. Positions may be any int64, also negative (a shift is a rotation by the
 * difference). */
void ifkv_rope_table(const double *frequency, int d_head, int64_t n_row, const int64_t *position,
                     float *cos_sin);

#ifdef __cplusplus
}
#endif
#endif
