/* Claims of tests that run on the model and on a GPU.
 *
 * CMocka is not asked for: these tests must also run on a bare machine with a GPU.  A failed claim
 * prints and counts, it does not jump out. */
#ifndef IFKV_EMU_CHECK_H
#define IFKV_EMU_CHECK_H

#include <stdint.h>
#include <stdio.h>

inline int check_failed = 0, check_passed = 0;

/* CHECK(condition, format, values...): the text tells what is wrong, with the values. */
#define CHECK(condition, ...)                                                                      \
    do {                                                                                           \
        if (condition) {                                                                           \
            check_passed++;                                                                        \
        } else if (check_failed++ < 20) {                                                          \
            printf("%s:%d: ", __FILE__, __LINE__);                                                 \
            printf(__VA_ARGS__);                                                                   \
            printf("\n");                                                                          \
        }                                                                                          \
    } while (0)

/* Small integers that bf16 holds exactly, the same on every machine. */
struct check_random {
    uint64_t state;
    uint32_t next() {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return static_cast<uint32_t>(state >> 33);
    }
    int between(int low, int high) {
        return low + static_cast<int>(next() % static_cast<uint32_t>(high - low + 1));
    }
};

#endif
