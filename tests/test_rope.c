/* Rotary frequencies and tables against closed forms. */
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

static void position_zero_rotates_by_nothing(void **state) {
    const ifkv_config config = plain(6, 1e4);
    const int64_t position = 0;
    double f[3];
    float row[6];
    (void)state;
    ifkv_rope_frequencies(&config, f);
    ifkv_rope_table(f, 6, 1, &position, row);
    for (int i = 0; i < 3; i++) {
        assert_true(row[i] == 1.0f);
        assert_true(row[3 + i] == 0.0f);
    }
}

static void rows_hold_cosines_then_sines(void **state) {
    const double f[2] = {1.0, 0.25};
    const int64_t position[2] = {3, -5};
    float row[8];
    (void)state;
    ifkv_rope_table(f, 4, 2, position, row);
    assert_true(row[0] == (float)cos(3.0) && row[1] == (float)cos(0.75));
    assert_true(row[2] == (float)sin(3.0) && row[3] == (float)sin(0.75));
    assert_true(row[4] == (float)cos(-5.0) && row[7] == (float)sin(-1.25));
}

static void negative_positions_rotate_back(void **state) {
    const ifkv_config config = llama31();
    const int64_t position[2] = {1234567, -1234567};
    double f[64];
    float row[2][128];
    (void)state;
    ifkv_rope_frequencies(&config, f);
    ifkv_rope_table(f, 128, 2, position, row[0]);
    for (int i = 0; i < 64; i++) {
        assert_true(row[0][i] == row[1][i]);
        assert_true(row[0][64 + i] == -row[1][64 + i]);
    }
}

/* Beyond 2^24 a float position would be off by whole radians.  The angle of pair 0 is the position
 * itself; cos and sin of 2^30 + 1 are known to 1e-7 from long double. */
static void positions_beyond_2_to_the_24_keep_their_angle(void **state) {
    const double f[1] = {1.0};
    const int64_t position = ((int64_t)1 << 30) + 1;
    float row[2];
    (void)state;
    ifkv_rope_table(f, 2, 1, &position, row);
    assert_near(row[0], (double)cosl(1073741825.0L), 1e-6);
    assert_near(row[1], (double)sinl(1073741825.0L), 1e-6);
}

/* (cos, sin) of a + b from those of a and b, for positions whose sum is a position too. */
static void rotations_add_up(void **state) {
    const ifkv_config config = plain(128, 1e6);
    const int64_t a[] = {0, 1, 17, 40959, 1 << 25}, b[] = {-1, 5, -40000, 131072, 1 << 25};
    double f[64];
    float row[3][128];
    (void)state;
    ifkv_rope_frequencies(&config, f);
    for (int i = 0; i < 5; i++) {
        const int64_t position[3] = {a[i], b[i], a[i] + b[i]};
        ifkv_rope_table(f, 128, 3, position, row[0]);
        for (int j = 0; j < 64; j++) {
            const double ca = row[0][j], sa = row[0][64 + j], cb = row[1][j], sb = row[1][64 + j];
            /* Four factors rounded to 2^-24 each. */
            assert_true(fabs(ca * cb - sa * sb - row[2][j]) < 4 * 0x1p-24 + 1e-8);
            assert_true(fabs(sa * cb + ca * sb - row[2][64 + j]) < 4 * 0x1p-24 + 1e-8);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(plain_frequencies_are_powers_of_theta),
        cmocka_unit_test(llama3_keeps_short_waves),
        cmocka_unit_test(llama3_slows_long_waves_by_the_factor),
        cmocka_unit_test(llama3_blends_between),
        cmocka_unit_test(llama3_scaling_is_monotonic),
        cmocka_unit_test(position_zero_rotates_by_nothing),
        cmocka_unit_test(rows_hold_cosines_then_sines),
        cmocka_unit_test(negative_positions_rotate_back),
        cmocka_unit_test(positions_beyond_2_to_the_24_keep_their_angle),
        cmocka_unit_test(rotations_add_up),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
