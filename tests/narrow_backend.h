/* The CPU back end in bfloat16: every activation and every row of K and V is rounded when it is
 * written, which is what a back end of that type does by definition and shares no line with its
 * kernels.  What such a back end keeps in float32 stays as it is: logits, partial results, scores.
 *
 * Functions of a tiny run of one rank, called before its prefill (tiny.h); the table of operations
 * is one for the process. */
#ifndef IFKV_TESTS_NARROW_BACKEND_H
#define IFKV_TESTS_NARROW_BACKEND_H

#include "engine.h"

/* The weights are drawn in float32: round them to what a device holds. */
ifkv_status round_weights(ifkv_engine *engine);
/* The same, and let the engine's CPU back end round from here on. */
ifkv_status compute_narrowly(ifkv_engine *engine);

#endif
