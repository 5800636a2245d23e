/* Chunks that a rank keeps in the memory of its back end from one session to the next: the device
 * tier of the chunk store (algorithm 1.3).
 *
 * Owns the rows, K before rotation and V, taken once when the engine is opened, and the table of
 * what lies in them.  An entry has any rows of the pool, so that nothing fragments; those used
 * longest ago give up theirs, those that the session under way uses never do.  An entry is found
 * by the key of the store and served only where description and ids are the asked ones, compared
 * whole: they take 4 bytes a row beside its K and V, and then no digest stands between a request
 * and another one's keys.  What has been put is served once it is known to be written.
 *
 * Knows neither sessions nor files, and moves no row: the caller does, in reuse_pool.c.  All calls
 * are Local; ranks need not hold the same. */
#ifndef IFKV_SRC_POOL_H
#define IFKV_SRC_POOL_H

#include "backend.h"
#include "kvcache.h"

typedef struct ifkv_pool_entry ifkv_pool_entry;

enum { IFKV_POOL_BUCKETS = 1024 };

typedef struct ifkv_pool {
    bool is_on;         /* asked for, even if too small for a row: what bits depend on */
    size_t bytes;       /* of back-end memory */
    ifkv_kvcache cache; /* views of base; its rows in each layer are the pool's */
    void *base;         /* owned, back-end memory; NULL: planned, or too small for a row */
    int64_t *free_row;  /* [capacity] owned host memory: the first n_free are numbers of free rows,
                           the last one taken first */
    int64_t n_free;
    int64_t n_used;                /* rows of entries that the session under way uses */
    int64_t session;               /* number of the session under way */
    ifkv_pool_entry *first, *last; /* in the order of last use, latest first; owned */
    ifkv_pool_entry *bucket[IFKV_POOL_BUCKETS]; /* by key */
    int64_t n_entry;
} ifkv_pool;

/* Bytes that a pool of n_row rows takes; SIZE_MAX if they cannot be counted. */
size_t ifkv_pool_bytes(ifkv_dtype dtype, int n_layer, int64_t n_col, int64_t n_row);
/* Fill a pool that is all zero: as many rows of n_layer layers as `bytes` can hold, without memory
 * yet; 0 bytes: it stays off.  Errors: RESOURCE. */
ifkv_status ifkv_pool_init(ifkv_pool *pool, ifkv_dtype dtype, int n_layer, int64_t n_col,
                           uint64_t bytes);
/* Take the memory.  Errors: RESOURCE. */
ifkv_status ifkv_pool_alloc(ifkv_pool *pool, ifkv_backend *backend);
/* backend: the one that alloc took from; may be NULL where nothing was taken. */
void ifkv_pool_fini(ifkv_pool *pool, ifkv_backend *backend);

/* A session begins: what earlier ones used may go from now on, and what they put without a commit
 * is dropped. */
void ifkv_pool_begin(ifkv_pool *pool);
/* Whether an entry would be served; changes nothing. */
bool ifkv_pool_has(const ifkv_pool *pool, const ifkv_store_entry *entry);
/* The rows of an entry [n_row], borrowed until the next session begins, and a use of it; NULL: it
 * is not here. */
const int64_t *ifkv_pool_use(ifkv_pool *pool, const ifkv_store_entry *entry);
/* Rows for an entry to be written to [n_row], borrowed likewise.  NULL: it is here already, or does
 * not fit beside what this session uses, and then nothing has gone for it; or host memory is out.
 */
const int64_t *ifkv_pool_put(ifkv_pool *pool, const ifkv_store_entry *entry);
/* All that was put since the session began has been written: from now on it is served. */
void ifkv_pool_commit(ifkv_pool *pool);

#endif
