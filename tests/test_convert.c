/* Conversions between types: known numbers, every float16, and what must be seen on the way. */
#include "test.h"

#include "convert.h"

static void f16_known_values_convert(void **state) {
    static const struct {
        uint16_t half;
        float value;
    } known[] = {{0x0000, 0.0f},     {0x3c00, 1.0f},      {0xc000, -2.0f},
                 {0x7bff, 65504.0f}, {0x0400, 0x1p-14f},  {0x03ff, 0x1.ff8p-15f},
                 {0x0001, 0x1p-24f}, {0x8001, -0x1p-24f}, {0x3555, 0x1.554p-2f},
                 {0x0200, 0x1p-15f}};
    (void)state;
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        assert_true(ifkv_f16_to_f32(known[i].half) == known[i].value);
        assert_int_equal(ifkv_f32_to_f16(known[i].value), known[i].half);
    }
    assert_true(signbit(ifkv_f16_to_f32(0x8000)) && ifkv_f16_to_f32(0x8000) == 0.0f);
    assert_true(isinf(ifkv_f16_to_f32(0x7c00)) && isinf(ifkv_f16_to_f32(0xfc00)));
    assert_true(isnan(ifkv_f16_to_f32(0x7c01)) && isnan(ifkv_f16_to_f32(0xfe00)));
}

static void every_f16_survives_a_round_trip(void **state) {
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        const float value = ifkv_f16_to_f32((uint16_t)h);
        if (isnan(value))
            assert_true(isnan(ifkv_f16_to_f32(ifkv_f32_to_f16(value))));
        else
            assert_int_equal(ifkv_f32_to_f16(value), h);
    }
}

/* ldexp of the fields, in double, is the definition. */
static void every_f16_has_its_defined_value(void **state) {
    (void)state;
    for (uint32_t h = 0; h < 0x7c00; h++) {
        const int e = (int)(h >> 10), m = (int)(h & 1023);
        const double want = e ? ldexp(1024 + m, e - 25) : ldexp(m, -24);
        assert_true((double)ifkv_f16_to_f32((uint16_t)h) == want);
        assert_true((double)ifkv_f16_to_f32((uint16_t)(h | 0x8000)) == -want);
    }
}

/* Between two neighbours the nearer one, at the middle the even one. */
static void f32_rounds_to_the_nearest_f16(void **state) {
    (void)state;
    for (uint32_t h = 0; h < 0x7bff; h++) {
        const float low = ifkv_f16_to_f32((uint16_t)h), high = ifkv_f16_to_f32((uint16_t)(h + 1));
        const float middle = (float)(((double)low + (double)high) / 2);
        assert_int_equal(ifkv_f32_to_f16(middle), h + (h & 1));
        assert_int_equal(ifkv_f32_to_f16(nextafterf(middle, 0)), h);
        assert_int_equal(ifkv_f32_to_f16(nextafterf(middle, INFINITY)), h + 1);
    }
    assert_int_equal(ifkv_f32_to_f16(65519.996f), 0x7bff);
    assert_int_equal(ifkv_f32_to_f16(65520.0f), 0x7c00);
    assert_int_equal(ifkv_f32_to_f16(0x1p-25f), 0);
    assert_int_equal(ifkv_f32_to_f16(1e30f), 0x7c00);
}

static void bf16_is_the_upper_half_of_f32(void **state) {
    (void)state;
    assert_true(ifkv_bf16_to_f32(0x3f80) == 1.0f);
    assert_true(ifkv_bf16_to_f32(0xc049) == -3.140625f);
    assert_true(ifkv_bf16_to_f32(0x0001) == 0x1p-133f);
    assert_true(isnan(ifkv_bf16_to_f32(0x7fc0)));
    for (uint32_t h = 0; h < 65536; h++) {
        const float value = ifkv_bf16_to_f32((uint16_t)h);
        if (!isnan(value)) assert_int_equal(ifkv_f32_to_bf16(value), h);
    }
}

static void f32_rounds_to_the_nearest_bf16(void **state) {
    (void)state;
    assert_int_equal(ifkv_f32_to_bf16(0x1.01p0f), 0x3f80);       /* tie, to even */
    assert_int_equal(ifkv_f32_to_bf16(0x1.03p0f), 0x3f82);       /* tie, to even */
    assert_int_equal(ifkv_f32_to_bf16(0x1.010002p0f), 0x3f81);   /* above the tie */
    assert_int_equal(ifkv_f32_to_bf16(0x1.fffffep127f), 0x7f80); /* overflows */
    assert_true((ifkv_f32_to_bf16(NAN) & 0x7f) != 0);
}

static void conversions_of_blocks_equal_those_of_elements(void **state) {
    enum { N = 5003 }; /* beyond two steps, off any vector */
    static uint16_t half[N], back[N];
    static float value[N];
    static double wide[N];
    (void)state;
    for (int i = 0; i < N; i++) half[i] = (uint16_t)(i * 6 % 0x7c00);
    assert_true(ifkv_convert(IFKV_DTYPE_F16, half, IFKV_DTYPE_F32, value, N));
    for (int i = 0; i < N; i++) assert_true(value[i] == ifkv_f16_to_f32(half[i]));
    assert_true(ifkv_convert(IFKV_DTYPE_F32, value, IFKV_DTYPE_F16, back, N));
    assert_memory_equal(back, half, sizeof half);
    assert_true(ifkv_convert(IFKV_DTYPE_F16, half, IFKV_DTYPE_BF16, back, N));
    for (int i = 0; i < N; i++) assert_int_equal(back[i], ifkv_f32_to_bf16(value[i]));
    assert_true(ifkv_convert(IFKV_DTYPE_F16, half, IFKV_DTYPE_F64, wide, N));
    for (int i = 0; i < N; i++) assert_true(wide[i] == (double)value[i]);
}

static void a_single_nan_anywhere_is_seen(void **state) {
    enum { N = 2100 };
    static float value[N], copy[N];
    static uint16_t half[N];
    (void)state;
    for (int i = 0; i < N; i += 13) {
        value[i] = i % 2 ? NAN : -INFINITY;
        assert_false(ifkv_convert(IFKV_DTYPE_F32, value, IFKV_DTYPE_F32, copy, N));
        assert_false(ifkv_convert(IFKV_DTYPE_F32, value, IFKV_DTYPE_BF16, half, N));
        assert_false(ifkv_is_finite(IFKV_DTYPE_BF16, half, N));
        value[i] = 0;
    }
    assert_true(ifkv_convert(IFKV_DTYPE_F32, value, IFKV_DTYPE_F32, copy, N));
}

static void a_nan_in_float64_is_seen(void **state) {
    const double value[3] = {0, 1e308, NAN};
    (void)state;
    assert_true(ifkv_is_finite(IFKV_DTYPE_F64, value, 2));
    assert_false(ifkv_is_finite(IFKV_DTYPE_F64, value, 3));
}

static void overflow_on_the_way_to_f16_is_seen(void **state) {
    const float value[2] = {1.0f, 70000.0f};
    uint16_t half[2];
    (void)state;
    assert_false(ifkv_convert(IFKV_DTYPE_F32, value, IFKV_DTYPE_F16, half, 2));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(f16_known_values_convert),
        cmocka_unit_test(every_f16_survives_a_round_trip),
        cmocka_unit_test(every_f16_has_its_defined_value),
        cmocka_unit_test(f32_rounds_to_the_nearest_f16),
        cmocka_unit_test(bf16_is_the_upper_half_of_f32),
        cmocka_unit_test(f32_rounds_to_the_nearest_bf16),
        cmocka_unit_test(conversions_of_blocks_equal_those_of_elements),
        cmocka_unit_test(a_single_nan_anywhere_is_seen),
        cmocka_unit_test(a_nan_in_float64_is_seen),
        cmocka_unit_test(overflow_on_the_way_to_f16_is_seen),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
