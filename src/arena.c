/* Plan, then carve.  See arena.h. */
#include "arena.h"

enum { ARENA_ALIGN = 64 }; /* a cache line, and the widest vector load */

void *ifkv_arena_take(ifkv_arena *arena, int64_t n_item, size_t item_bytes) {
    uint64_t bytes = 0, end = 0;
    if (n_item < 0 || ifkv_mul_overflow((uint64_t)n_item, item_bytes, &bytes) ||
        ifkv_add_overflow(bytes, ARENA_ALIGN - 1, &bytes) ||
        ifkv_add_overflow(arena->used, bytes & ~(uint64_t)(ARENA_ALIGN - 1), &end)) {
        arena->is_overflown = true;
        return NULL;
    }
    void *taken = arena->base ? (char *)arena->base + arena->used : NULL;
    arena->used = (size_t)end;
    if (arena->used > arena->peak) arena->peak = arena->used;
    return taken;
}

ifkv_view ifkv_arena_view(ifkv_arena *arena, ifkv_dtype dtype, int64_t n_row, int64_t n_col) {
    void *data = NULL;
    uint64_t row_bytes = 0;
    if (n_col < 0 || ifkv_mul_overflow((uint64_t)n_col, ifkv_dtype_bytes(dtype), &row_bytes))
        arena->is_overflown = true;
    else
        data = ifkv_arena_take(arena, n_row, (size_t)row_bytes);
    return ifkv_view_make(data, dtype, n_row, n_col, n_col);
}
