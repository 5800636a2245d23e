/* When asynchronous work completes, and who runs first: as early as it may, as late as it may, or
 * at seeded random. */
#ifndef IFKV_EMU_TIME_H
#define IFKV_EMU_TIME_H

#include <stdint.h>

enum emu_time_kind { EMU_EARLY, EMU_LATE, EMU_RANDOM };

struct emu_time {
    emu_time_kind kind;
    uint64_t seed;
};

/* SplitMix64: every seed is a good one. */
struct emu_random {
    uint64_t state = 0;
    uint64_t next() {
        uint64_t z = state += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return z ^ z >> 31;
    }
    uint32_t below(uint32_t n) {
        return static_cast<uint32_t>((next() >> 32) * n >> 32);
    }
};

/* The time in force: IFKV_EMU_TIME, or what emu_set_time chose since. */
emu_time emu_time_now();

#endif
