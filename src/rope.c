/* Rotary frequencies.  See rope.h. */
#include "rope.h"

#include <math.h>

static const double PI = 3.14159265358979323846;

/* Llama 3 scaling: long waves are slowed by `factor`, short ones kept, those between blended
 * linearly in original_length / wavelength. */
static double llama3_scale(const ifkv_config *config, double f) {
    const double wavelength = 2.0 * PI / f;
    const double original = (double)config->rope_original;
    if (wavelength < original / config->rope_high) return f;
    if (wavelength > original / config->rope_low) return f / config->rope_factor;
    const double smooth =
        (original / wavelength - config->rope_low) / (config->rope_high - config->rope_low);
    return (1.0 - smooth) * f / config->rope_factor + smooth * f;
}

void ifkv_rope_frequencies(const ifkv_config *config, double *frequency) {
    const int n_pair = config->d_head / 2;
    for (int i = 0; i < n_pair; i++) {
        const double f = pow(config->rope_theta, -2.0 * i / config->d_head);
        frequency[i] = config->rope_kind == IFKV_ROPE_LLAMA3 ? llama3_scale(config, f) : f;
    }
}
