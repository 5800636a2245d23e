/* One allocation, planned before it is made.
 *
 * The same layout code runs twice: first over an arena without memory, which only counts, then over
 * one with memory, which hands out views.  A mark and its reset let stages that never live together
 * share bytes; `peak` is what must be allocated. Owns nothing: base belongs to the engine. */
#ifndef IFKV_SRC_ARENA_H
#define IFKV_SRC_ARENA_H

#include "tensor.h"

typedef struct ifkv_arena {
    void *base;        /* back-end memory, borrowed; NULL while planning */
    size_t used;       /* bytes handed out since the last reset */
    size_t peak;       /* largest `used` so far */
    bool is_overflown; /* some size did not fit in size_t: the plan is void */
} ifkv_arena;

/* n_item * item_bytes bytes, 64-byte aligned; NULL while planning. */
void *ifkv_arena_take(ifkv_arena *arena, int64_t n_item, size_t item_bytes);

/* A matrix of dense rows. */
ifkv_view ifkv_arena_view(ifkv_arena *arena, ifkv_dtype dtype, int64_t n_row, int64_t n_col);

static inline size_t ifkv_arena_mark(const ifkv_arena *arena) {
    return arena->used;
}
static inline void ifkv_arena_reset(ifkv_arena *arena, size_t mark) {
    arena->used = mark;
}

#endif
