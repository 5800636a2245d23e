/* Weights drawn from a seed, for runs that need a model's shape and not its answers.
 *
 * A counter-based generator keyed by seed and tensor name: element i depends on nothing else, so
 * any block of any tensor is the same on every machine, back end and order of filling.  Gains are
 * chosen so that attention is uneven and no layer drowns the others. */
#ifndef IFKV_SRC_WEIGHTS_RANDOM_H
#define IFKV_SRC_WEIGHTS_RANDOM_H

#include "backend.h"
#include "weights.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The stream of a tensor's elements, row-major. */
ifkv_draw ifkv_weights_stream(const ifkv_weight_plan *plan, uint64_t seed, ifkv_weight_kind kind,
                              int layer);
/* Elements [first, first + n) of a stream. */
void ifkv_weights_draw(const ifkv_draw *draw, int64_t first, int64_t n, float *to);

#ifdef __cplusplus
}
#endif
#endif
