/* The k largest of a list of scores, in a total order: larger value first, then lower index.
 *
 * Reads the values a fixed number of times whatever they are and needs no scratch: the k-th largest
 * is found digit by digit from histograms of an integer key that orders like the float. */
#include "cpu_backend.h"

#include <string.h>

enum { DIGIT_BITS = 11, N_DIGIT = 1 << DIGIT_BITS };

/* Unsigned integer that orders like the value; -0 first becomes +0. */
static uint32_t order_key(float value) {
    const float plain = value + 0.0f;
    uint32_t bits;
    memcpy(&bits, &plain, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* The k-th largest key, 1 <= k <= n; *n_equal_p is how many keys equal to it belong to the k. */
static uint32_t kth_key(const float *value, int64_t n, int64_t k, int64_t *n_equal_p) {
    uint32_t prefix = 0, known = 0; /* digits found so far, and the mask of their bits */
    for (int shift = 32; shift > 0;) {
        const int bits = shift < DIGIT_BITS ? shift : DIGIT_BITS;
        shift -= bits;
        int64_t count[N_DIGIT] = {0};
        const uint32_t mask = (1u << bits) - 1;
        for (int64_t i = 0; i < n; i++) {
            const uint32_t key = order_key(value[i]);
            if ((key & known) == prefix) count[key >> shift & mask]++;
        }
        uint32_t digit = mask;
        while (count[digit] < k) k -= count[digit--];
        prefix |= digit << shift;
        known |= mask << shift;
    }
    *n_equal_p = k;
    return prefix;
}

ifkv_status ifkv_cpu_top_k(ifkv_backend *backend, const float *value, int64_t n, int64_t k,
                           int64_t *scratch, int64_t *index) {
    (void)backend, (void)scratch;
    IFKV_REQUIRE(k >= 0 && k <= n, IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "top_k: got %lld of %lld values", (long long)k, (long long)n);
    if (k == 0) return IFKV_OK;
    int64_t n_equal;
    const uint32_t least = kth_key(value, n, k, &n_equal);
    for (int64_t i = 0; i < n; i++) {
        const uint32_t key = order_key(value[i]);
        if (key < least || (key == least && n_equal-- <= 0)) continue;
        *index++ = i;
    }
    return IFKV_OK;
}
