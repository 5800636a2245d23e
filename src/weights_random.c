/* Weights drawn from a seed.  See weights_random.h. */
#include "weights_random.h"

#include "digest.h"
#include "random.h"

#include <math.h>
#include <string.h>

/* Sum of the four 16-bit fields about its mean: bell-shaped, an exact integer. */
static inline int32_t bell(uint64_t z) {
    const int32_t sum = (int32_t)(z & 0xffff) + (int32_t)(z >> 16 & 0xffff) +
                        (int32_t)(z >> 32 & 0xffff) + (int32_t)(z >> 48);
    return sum - 2 * 65535;
}

/* Mean and spread of a tensor's elements.  A norm's gain is about 1; a projection of inputs of rms
 * 1 has an output of rms `gain`; 1.4 for Q and K makes the spread of q.k / sqrt(d_head) about 2. */
static void moments(ifkv_weight_kind kind, int64_t n_col, double *mean, double *spread) {
    double gain = 1.0;
    *mean = 0.0;
    switch (kind) {
    case IFKV_WEIGHT_FINAL_NORM:
    case IFKV_WEIGHT_ATTENTION_NORM:
    case IFKV_WEIGHT_MLP_NORM: *mean = 1.0, *spread = 0.2; return;
    case IFKV_WEIGHT_Q_NORM:
    case IFKV_WEIGHT_K_NORM: *mean = 1.4, *spread = 0.28; return;
    case IFKV_WEIGHT_EMBED: *spread = 1.0; return;
    case IFKV_WEIGHT_Q:
    case IFKV_WEIGHT_K: gain = 1.4; break;
    case IFKV_WEIGHT_O: gain = 1.5; break;
    case IFKV_WEIGHT_GATE: gain = 1.2; break;
    default: break;
    }
    *spread = gain / sqrt((double)n_col);
}

ifkv_draw ifkv_weights_stream(const ifkv_weight_plan *plan, uint64_t seed, ifkv_weight_kind kind,
                              int layer) {
    char name[IFKV_WEIGHT_NAME_BYTES];
    double mean, spread;
    ifkv_weight_name(kind, layer, name);
    moments(kind, plan->weight[kind].n_col, &mean, &spread);
    return (ifkv_draw){
        .key = ifkv_random_mix(ifkv_random_u64(seed, 0) ^ ifkv_digest_bytes(name, strlen(name))),
        /* A uniform 16-bit field has variance (2^32 - 1)/12, and four of them add up. */
        .scale = (float)(spread / sqrt(4294967295.0 / 3.0)),
        .centre = (float)mean,
    };
}

void ifkv_weights_draw(const ifkv_draw *draw, int64_t first, int64_t n, float *to) {
    for (int64_t i = 0; i < n; i++)
        to[i] = (float)bell(ifkv_random_u64(draw->key, (uint64_t)(first + i))) * draw->scale;
    /* A pass of its own: product and sum are rounded one by one on every machine, where one
     * expression might be contracted. */
    if (draw->centre != 0.0f)
        for (int64_t i = 0; i < n; i++) to[i] += draw->centre;
}
