/* A shard of K and V.  See kvcache.h. */
#include "kvcache.h"

void ifkv_kvcache_layout(ifkv_kvcache *cache, ifkv_arena *arena, ifkv_dtype dtype, int n_layer,
                         int64_t n_col, int64_t capacity) {
    cache->n_layer = n_layer;
    cache->n_col = n_col;
    cache->capacity = capacity;
    cache->k = ifkv_arena_view(arena, dtype, n_layer * capacity, n_col);
    cache->v = ifkv_arena_view(arena, dtype, n_layer * capacity, n_col);
}

ifkv_view ifkv_kvcache_k(const ifkv_kvcache *cache, int layer) {
    return ifkv_view_rows(&cache->k, layer * cache->capacity, cache->n_row);
}

ifkv_view ifkv_kvcache_v(const ifkv_kvcache *cache, int layer) {
    return ifkv_view_rows(&cache->v, layer * cache->capacity, cache->n_row);
}

int64_t ifkv_kvcache_visible(const ifkv_kvcache *cache, int64_t x) {
    int64_t low = 0, high = cache->n_row;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (cache->index[middle] <= x)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

ifkv_status ifkv_kvcache_append(ifkv_kvcache *cache, int64_t index) {
    IFKV_REQUIRE(
        cache->n_row < cache->capacity && (!cache->n_row || cache->index[cache->n_row - 1] < index),
        IFKV_ERR_INTERNAL, IFKV_E_SHAPE, "kvcache: cannot append index %lld as row %lld of %lld",
        (long long)index, (long long)cache->n_row, (long long)cache->capacity);
    cache->index[cache->n_row++] = index;
    return IFKV_OK;
}
