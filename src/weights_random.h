/* Weights drawn from a seed, for runs that need a model's shape and not its answers.
 *
 * A counter-based generator keyed by seed and tensor name: element i depends on nothing else, so
 * any block of any tensor is the same on every machine, back end and order of filling.  Gains are
 * chosen so that attention is uneven and no layer drowns the others. */
#ifndef IFKV_SRC_WEIGHTS_RANDOM_H
#define IFKV_SRC_WEIGHTS_RANDOM_H

#include "weights.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Elements [first, first + n) of a tensor, row-major. */
void ifkv_weights_draw(const ifkv_weight_plan *plan, uint64_t seed, ifkv_weight_kind kind,
                       int layer, int64_t first, int64_t n, float *to);

#ifdef __cplusplus
}
#endif
#endif
