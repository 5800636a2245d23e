/* Rotary position embedding: frequencies per model family, computed in double.
 *
 * Owns what section 6 of the algorithm says about them.  Pure arithmetic: knows nothing of back
 * ends, which make cosines and sines of them, nor of half-split pairs (i, i + d_head/2). */
#ifndef IFKV_SRC_ROPE_H
#define IFKV_SRC_ROPE_H

#include "config.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Radians per position of each pair: frequency [d_head / 2]. */
void ifkv_rope_frequencies(const ifkv_config *config, double *frequency);

#ifdef __cplusplus
}
#endif
#endif
