/* Conversions in loops without branches, which compilers turn into vector code.  See convert.h. */
#include "convert.h"

#include <string.h>

/* Elements that pass through float32 on the way between two 16-bit types; stays in the L1 cache. */
#define STEP 2048

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* By mask: a conditional whose sides hold float operations becomes a branch, because they might
 * raise a flag. */
static inline uint32_t select_u32(bool condition, uint32_t yes, uint32_t no) {
    const uint32_t mask = 0u - (uint32_t)condition;
    return (yes & mask) | (no & ~mask);
}

static inline uint32_t f32_bits_of_f16(uint32_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
    /* A subnormal is magnitude * 2^-24, normal in float32, so no mode of the processor flushes it.
     */
    const uint32_t small = bits_of((float)(int32_t)magnitude * 0x1p-24f);
    const uint32_t normal = (magnitude << 13) + (112u << 23);
    const uint32_t special = (magnitude << 13) | 0x7f800000u;
    return sign |
           select_u32(magnitude < 0x400u, small, select_u32(magnitude < 0x7c00u, normal, special));
}

static inline uint16_t bf16_of_f32_bits(uint32_t u) {
    const uint32_t nearest = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
    const uint32_t quiet_nan = u >> 16 | 0x40u;
    return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? quiet_nan : nearest);
}

static inline uint16_t f16_of_f32_bits(uint32_t u) {
    const uint32_t sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
    /* Normal: drop 13 bits, nearest even, with the exponent rebased; a carry runs into the exponent
     * and, at the top, into infinity.  Below 2^-14 adding 0.5 lets the adder round to 2^-24. */
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    const uint32_t special = select_u32(magnitude > 0x7f800000u, 0x7e00u, 0x7c00u);
    const uint32_t finite = select_u32(magnitude < 0x38800000u, small, normal);
    return (uint16_t)(sign | select_u32(magnitude < 0x477ff000u, finite, special));
}

float ifkv_bf16_to_f32(uint16_t value) {
    return float_of((uint32_t)value << 16);
}
float ifkv_f16_to_f32(uint16_t value) {
    return float_of(f32_bits_of_f16(value));
}
uint16_t ifkv_f32_to_bf16(float value) {
    return bf16_of_f32_bits(bits_of(value));
}
uint16_t ifkv_f32_to_f16(float value) {
    return f16_of_f32_bits(bits_of(value));
}

/* One bit of `bad` ends up set if an exponent is all ones. */
static bool is_finite_32(const uint32_t *data, int64_t n) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; i++) bad |= (uint32_t)((data[i] & 0x7f800000u) == 0x7f800000u);
    return bad == 0;
}

static bool is_finite_16(const uint16_t *data, int64_t n, uint16_t exponent) {
    uint16_t bad = 0;
    for (int64_t i = 0; i < n; i++)
        bad = (uint16_t)(bad | (uint16_t)((data[i] & exponent) == exponent));
    return bad == 0;
}

static bool is_finite_64(const uint64_t *data, int64_t n) {
    const uint64_t exponent = (uint64_t)0x7ff << 52;
    uint64_t bad = 0;
    for (int64_t i = 0; i < n; i++) bad |= (uint64_t)((data[i] & exponent) == exponent);
    return bad == 0;
}

bool ifkv_is_finite(ifkv_dtype dtype, const void *data, int64_t n) {
    switch (dtype) {
    case IFKV_DTYPE_F32: return is_finite_32(data, n);
    case IFKV_DTYPE_F64: return is_finite_64(data, n);
    case IFKV_DTYPE_BF16: return is_finite_16(data, n, 0x7f80);
    case IFKV_DTYPE_F16: return is_finite_16(data, n, 0x7c00);
    }
    return false;
}

static void to_f32(ifkv_dtype from_dtype, const void *from, uint32_t *to, int64_t n) {
    const uint16_t *from_16 = from;
    if (from_dtype == IFKV_DTYPE_BF16)
        for (int64_t i = 0; i < n; i++) to[i] = (uint32_t)from_16[i] << 16;
    else if (from_dtype == IFKV_DTYPE_F16)
        for (int64_t i = 0; i < n; i++) to[i] = f32_bits_of_f16(from_16[i]);
    else
        memcpy(to, from, (size_t)n * sizeof *to);
}

static void from_f32(const uint32_t *from, ifkv_dtype to_dtype, void *to, int64_t n) {
    uint16_t *to_16 = to;
    double *to_64 = to;
    switch (to_dtype) {
    case IFKV_DTYPE_F32: memcpy(to, from, (size_t)n * sizeof *from); break;
    case IFKV_DTYPE_BF16:
        for (int64_t i = 0; i < n; i++) to_16[i] = bf16_of_f32_bits(from[i]);
        break;
    case IFKV_DTYPE_F16:
        for (int64_t i = 0; i < n; i++) to_16[i] = f16_of_f32_bits(from[i]);
        break;
    case IFKV_DTYPE_F64:
        for (int64_t i = 0; i < n; i++) to_64[i] = float_of(from[i]);
        break;
    }
}

bool ifkv_convert(ifkv_dtype from_dtype, const void *from, ifkv_dtype to_dtype, void *to,
                  int64_t n) {
    const size_t from_bytes = ifkv_dtype_bytes(from_dtype), to_bytes = ifkv_dtype_bytes(to_dtype);
    uint32_t step[STEP];
    bool is_finite = true;
    for (int64_t i = 0; i < n; i += STEP) {
        const int64_t m = n - i < STEP ? n - i : STEP;
        const void *part = (const char *)from + (size_t)i * from_bytes;
        void *result = (char *)to + (size_t)i * to_bytes;
        if (from_dtype == to_dtype) {
            memcpy(result, part, (size_t)m * to_bytes);
        } else if (to_dtype == IFKV_DTYPE_F32) {
            to_f32(from_dtype, part, result, m);
        } else {
            to_f32(from_dtype, part, step, m);
            from_f32(step, to_dtype, result, m);
        }
        is_finite = ifkv_is_finite(to_dtype, result, m) && is_finite;
    }
    return is_finite;
}
