/* Rotary frequencies and tables.  See rope.h. */
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

void ifkv_rope_table(const double *frequency, int d_head, int64_t n_row, const int64_t *position,
                     float *cos_sin) {
    const int n_pair = d_head / 2;
    for (int64_t i = 0; i < n_row; i++) {
        float *row = cos_sin + i * d_head;
        for (int j = 0; j < n_pair; j++) {
            /* At position 2^31 a double angle is still good to 2e-7 radians; float would not be
             * good to one turn. */
            const double angle = (double)position[i] * frequency[j];
            row[j] = (float)cos(angle);
            row[n_pair + j] = (float)sin(angle);
        }
    }
}
