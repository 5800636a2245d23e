/* Counter-based random numbers: a number depends on key and index alone, so what is drawn does not
 * depend on who draws it, or in which order. */
#ifndef IFKV_SRC_RANDOM_H
#define IFKV_SRC_RANDOM_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014). */
static inline uint64_t ifkv_random_mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* Number `index` of the stream `key`. */
static inline uint64_t ifkv_random_u64(uint64_t key, uint64_t index) {
    return ifkv_random_mix(key + 0x9e3779b97f4a7c15u * (index + 1));
}

#ifdef __cplusplus
}
#endif
#endif
