/* One rank's shard of K and V, all layers.
 *
 * Rows are sorted by index, so what a query at index x may see is a prefix of the shard, found by
 * binary search.  Context rows come first and are fixed; prompt and generated rows are appended in
 * ascending index, up to the capacity, and never move. Knows positions in the sequence only: which
 * rows are fresh is the session's business. */
#ifndef IFKV_SRC_KVCACHE_H
#define IFKV_SRC_KVCACHE_H

#include "arena.h"
#include "status.h"

typedef struct ifkv_kvcache {
    int n_layer;
    int64_t n_col;    /* n_kv_head * d_head */
    int64_t capacity; /* rows a layer can hold */
    int64_t n_row;    /* rows it holds, the same in every layer */
    ifkv_view k, v;   /* [n_layer * capacity, n_col] views of the arena */
    int64_t *index;   /* [capacity] host, ascending; borrowed from the session */
} ifkv_kvcache;

/* Take the memory of a shard from the arena; index and n_row are the caller's to fill. */
void ifkv_kvcache_layout(ifkv_kvcache *cache, ifkv_arena *arena, ifkv_dtype dtype, int n_layer,
                         int64_t n_col, int64_t capacity);

/* All rows of one layer: [n_row, n_col]. */
ifkv_view ifkv_kvcache_k(const ifkv_kvcache *cache, int layer);
ifkv_view ifkv_kvcache_v(const ifkv_kvcache *cache, int layer);

/* Number of rows with index <= x: the span of a causal query at x is [0, that). */
int64_t ifkv_kvcache_visible(const ifkv_kvcache *cache, int64_t x);
/* Append one row slot for `index`, which is above all present ones.  Its contents are unspecified
 * until written. */
ifkv_status ifkv_kvcache_append(ifkv_kvcache *cache, int64_t index);

#endif
