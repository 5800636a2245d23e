/* Rotary frequencies against closed forms. */
#include "test.h"

#include "rope.h"

static ifkv_config plain(int d_head, double theta) {
    ifkv_config config = {0};
    config.d_head = d_head;
    config.rope_theta = theta;
    config.rope_kind = IFKV_ROPE_PLAIN;
    return config;
}

static ifkv_config llama31(void) {
    ifkv_config config = plain(128, 5e5);
    config.rope_kind = IFKV_ROPE_LLAMA3;
    config.rope_factor = 8;
    config.rope_low = 1;
    config.rope_high = 4;
    config.rope_original = 8192;
    return config;
}

static void assert_near(double got, double want, double relative) {
    if (!(fabs(got - want) <= relative * fabs(want)))
        fail_msg("got %.17g, want %.17g within %g", got, want, relative);
}

static void plain_frequencies_are_powers_of_theta(void **state) {
    const ifkv_config config = plain(8, 10000.0);
    double f[4];
    (void)state;
    ifkv_rope_frequencies(&config, f);
    assert_near(f[0], 1.0, 1e-15);
    assert_near(f[1], 0.1, 1e-15);
    assert_near(f[2], 0.01, 1e-15);
    assert_near(f[3], 0.001, 1e-15);
}

static void llama3_keeps_short_waves(void **state) {
    const ifkv_config scaled = llama31(), unscaled = plain(128, 5e5);
    double f[64], g[64];
    (void)state;
    ifkv_rope_frequencies(&scaled, f);
    ifkv_rope_frequencies(&unscaled, g);
    /* Shorter than 8192 / 4 positions: pairs 0 .. 28, as 5e5^(28/64) 2 pi = 1956. */
    for (int i = 0; i <= 28; i++) assert_true(f[i] == g[i]);
    assert_true(f[29] < g[29]);
}

static void llama3_slows_long_waves_by_the_factor(void **state) {
    const ifkv_config scaled = llama31(), unscaled = plain(128, 5e5);
    double f[64], g[64];
    (void)state;
    ifkv_rope_frequencies(&scaled, f);
    ifkv_rope_frequencies(&unscaled, g);
    /* Longer than 8192 / 1 positions: from pair 35 on, as 5e5^(35/64) 2 pi = 8213. */
    for (int i = 35; i < 64; i++) assert_true(f[i] == g[i] / 8);
    assert_true(f[34] > g[34] / 8);
}

static void llama3_blends_between(void **state) {
    const ifkv_config scaled = llama31();
    const double pi = acos(-1.0);
    double f[64];
    (void)state;
    ifkv_rope_frequencies(&scaled, f);
    for (int i = 29; i < 35; i++) {
        const double g = exp(-i / 64.0 * log(5e5));
        const double s = (8192.0 * g / (2 * pi) - 1) / 3;
        assert_true(s > 0 && s < 1);
        assert_near(f[i], g * (s + (1 - s) / 8), 1e-13);
    }
}

static void llama3_scaling_is_monotonic(void **state) {
    const ifkv_config scaled = llama31();
    double f[64];
    (void)state;
    ifkv_rope_frequencies(&scaled, f);
    for (int i = 1; i < 64; i++) assert_true(f[i] < f[i - 1]);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(plain_frequencies_are_powers_of_theta),
        cmocka_unit_test(llama3_keeps_short_waves),
        cmocka_unit_test(llama3_slows_long_waves_by_the_factor),
        cmocka_unit_test(llama3_blends_between),
        cmocka_unit_test(llama3_scaling_is_monotonic),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
