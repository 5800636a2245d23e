/* The device tier of the chunk store.  See pool.h. */
#include "pool.h"

#include <stdlib.h>
#include <string.h>

struct ifkv_pool_entry {
    ifkv_pool_entry *newer, *older; /* neighbours in the order of last use */
    ifkv_pool_entry *next;          /* in its bucket */
    char key[33];
    bool is_written;
    int64_t session; /* number of the last one that used it */
    int64_t n_row, n_prefix, n_token;
    int64_t *row; /* [n_row], as the next two behind this struct */
    int32_t *id;  /* [n_prefix + n_token] */
    char *description;
};

/* ---- memory ---- */

static void layout(ifkv_kvcache *cache, ifkv_arena *arena, ifkv_dtype dtype, int n_layer,
                   int64_t n_col, int64_t n_row) {
    ifkv_kvcache_layout(cache, arena, dtype, n_layer, n_col, n_row);
    cache->n_row = n_row;
}

size_t ifkv_pool_bytes(ifkv_dtype dtype, int n_layer, int64_t n_col, int64_t n_row) {
    ifkv_kvcache cache = {0};
    ifkv_arena arena = {0};
    layout(&cache, &arena, dtype, n_layer, n_col, n_row);
    return arena.is_overflown ? SIZE_MAX : arena.peak;
}

ifkv_status ifkv_pool_init(ifkv_pool *pool, ifkv_dtype dtype, int n_layer, int64_t n_col,
                           uint64_t bytes) {
    const uint64_t row = 2 * (uint64_t)n_layer * (uint64_t)n_col * ifkv_dtype_bytes(dtype);
    pool->is_on = bytes > 0;
    if (!pool->is_on) return IFKV_OK;
    IFKV_REQUIRE(bytes <= INT64_MAX, IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                 "pool: got %llu bytes, expected at most %lld", (unsigned long long)bytes,
                 (long long)INT64_MAX);
    int64_t n_row = (int64_t)(bytes / row);
    /* K and V are padded to whole cache lines, which may cost a row */
    while (ifkv_pool_bytes(dtype, n_layer, n_col, n_row) > bytes) n_row--;
    ifkv_arena arena = {0};
    layout(&pool->cache, &arena, dtype, n_layer, n_col, n_row);
    pool->bytes = arena.peak;
    return IFKV_OK;
}

ifkv_status ifkv_pool_alloc(ifkv_pool *pool, ifkv_backend *backend) {
    ifkv_kvcache *cache = &pool->cache;
    const int64_t n_row = cache->capacity;
    if (n_row == 0) return IFKV_OK;
    pool->free_row = malloc((size_t)n_row * sizeof *pool->free_row);
    IFKV_REQUIRE(pool->free_row, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "pool: out of host memory");
    for (int64_t i = 0; i < n_row; i++) pool->free_row[i] = n_row - 1 - i;
    pool->n_free = n_row;
    IFKV_TRY(backend->ops->alloc(backend, pool->bytes, &pool->base));
    ifkv_arena arena = {.base = pool->base};
    layout(cache, &arena, cache->k.dtype, cache->n_layer, cache->n_col, n_row);
    return IFKV_OK;
}

void ifkv_pool_fini(ifkv_pool *pool, ifkv_backend *backend) {
    for (ifkv_pool_entry *e = pool->first, *older; e; e = older) {
        older = e->older;
        free(e);
    }
    if (pool->base) backend->ops->free(backend, pool->base);
    free(pool->free_row);
    memset(pool, 0, sizeof *pool);
}

/* ---- the table ---- */

/* Keys are hex digits of a digest: any of them tell buckets apart. */
static ifkv_pool_entry **bucket_of(ifkv_pool *pool, const char *key) {
    char digits[9] = {0};
    memcpy(digits, key, sizeof digits - 1);
    return &pool->bucket[strtoul(digits, NULL, 16) % IFKV_POOL_BUCKETS];
}

static bool has_ids(const int32_t *id, const int32_t *asked, int64_t n) {
    return n == 0 || !memcmp(id, asked, (size_t)n * sizeof *id);
}

static bool is_same(const ifkv_pool_entry *e, const ifkv_store_entry *asked) {
    return !strcmp(e->key, asked->key) && e->n_row == asked->n_row &&
           e->n_prefix == asked->n_prefix && e->n_token == asked->n_token &&
           !strcmp(e->description, asked->description) &&
           has_ids(e->id, asked->prefix, e->n_prefix) &&
           has_ids(e->id + e->n_prefix, asked->token, e->n_token);
}

static ifkv_pool_entry *find(const ifkv_pool *pool, const ifkv_store_entry *asked) {
    ifkv_pool_entry *e = *bucket_of((ifkv_pool *)pool, asked->key);
    while (e && !is_same(e, asked)) e = e->next;
    return e;
}

static void unlink_use(ifkv_pool *pool, ifkv_pool_entry *e) {
    *(e->newer ? &e->newer->older : &pool->first) = e->older;
    *(e->older ? &e->older->newer : &pool->last) = e->newer;
}

static void link_first(ifkv_pool *pool, ifkv_pool_entry *e) {
    e->newer = NULL;
    e->older = pool->first;
    *(e->older ? &e->older->newer : &pool->last) = e;
    pool->first = e;
}

static void use(ifkv_pool *pool, ifkv_pool_entry *e) {
    if (e->session != pool->session) pool->n_used += e->n_row;
    e->session = pool->session;
    unlink_use(pool, e);
    link_first(pool, e);
}

static void drop(ifkv_pool *pool, ifkv_pool_entry *e) {
    ifkv_pool_entry **at = bucket_of(pool, e->key);
    while (*at != e) at = &(*at)->next;
    *at = e->next;
    unlink_use(pool, e);
    for (int64_t i = e->n_row; i-- > 0;) pool->free_row[pool->n_free++] = e->row[i];
    pool->n_entry--;
    free(e);
}

static ifkv_pool_entry *make(const ifkv_store_entry *given) {
    const size_t row_bytes = (size_t)given->n_row * sizeof(int64_t),
                 prefix_bytes = (size_t)given->n_prefix * sizeof(int32_t),
                 token_bytes = (size_t)given->n_token * sizeof(int32_t),
                 text_bytes = strlen(given->description) + 1;
    ifkv_pool_entry *e = malloc(sizeof *e + row_bytes + prefix_bytes + token_bytes + text_bytes);
    if (!e) return NULL;
    *e = (ifkv_pool_entry){
        .n_row = given->n_row, .n_prefix = given->n_prefix, .n_token = given->n_token};
    e->row = (int64_t *)(e + 1);
    e->id = (int32_t *)(e->row + e->n_row);
    e->description = (char *)(e->id + e->n_prefix + e->n_token);
    memcpy(e->key, given->key, sizeof e->key);
    if (prefix_bytes) memcpy(e->id, given->prefix, prefix_bytes);
    if (token_bytes) memcpy(e->id + e->n_prefix, given->token, token_bytes);
    memcpy(e->description, given->description, text_bytes);
    return e;
}

/* ---- what sessions do ---- */

void ifkv_pool_begin(ifkv_pool *pool) {
    pool->session++;
    pool->n_used = 0;
    for (ifkv_pool_entry *e = pool->first, *older; e; e = older) {
        older = e->older;
        if (!e->is_written) drop(pool, e);
    }
}

bool ifkv_pool_has(const ifkv_pool *pool, const ifkv_store_entry *entry) {
    const ifkv_pool_entry *e = find(pool, entry);
    return e && e->is_written;
}

const int64_t *ifkv_pool_use(ifkv_pool *pool, const ifkv_store_entry *entry) {
    ifkv_pool_entry *e = find(pool, entry);
    if (!e || !e->is_written) return NULL;
    use(pool, e);
    return e->row;
}

const int64_t *ifkv_pool_put(ifkv_pool *pool, const ifkv_store_entry *entry) {
    if (find(pool, entry) || entry->n_row > pool->cache.capacity - pool->n_used) return NULL;
    ifkv_pool_entry *e = make(entry);
    if (!e) return NULL;
    while (pool->n_free < e->n_row) drop(pool, pool->last); /* no other one is used: see above */
    for (int64_t i = 0; i < e->n_row; i++) e->row[i] = pool->free_row[--pool->n_free];
    ifkv_pool_entry **bucket = bucket_of(pool, e->key);
    e->next = *bucket;
    *bucket = e;
    e->session = pool->session;
    pool->n_used += e->n_row;
    pool->n_entry++;
    link_first(pool, e);
    return e->row;
}

void ifkv_pool_commit(ifkv_pool *pool) {
    for (ifkv_pool_entry *e = pool->first; e && e->session == pool->session; e = e->older)
        e->is_written = true;
}
