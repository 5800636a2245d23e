/* Encode with a chunk store: this rank's chunks as entries, loaded where they are there, encoded
 * and kept where they are not (algorithm 1.3).  There are two tiers: the engine's pool in back-end
 * memory (pool.h) is asked first and gets all that it has not, then the caller's store; either may
 * be missing.  Without both, where chunks are about to change places: everything is encoded,
 * nothing kept.
 *
 * An entry is encoded at positions from 0 as a group of its own, and lies in the shard unrotated
 * until all are there; then every row is rotated to its place, loaded or not.  So no bit depends on
 * what was found.  The prefix rows of the sequence are an entry too: in chunk 0 they are encoded
 * and dropped as everywhere else, so that a document is the same entry at the front.  What was
 * loaded of an entry that turns out damaged is written over by its encoding.  Ranks need not find
 * the same. */
#ifndef IFKV_SRC_REUSE_H
#define IFKV_SRC_REUSE_H

#include "layer.h"

typedef struct ifkv_session ifkv_session;

/* The rows of one entry. */
typedef struct ifkv_reuse_unit {
    int64_t index;      /* in the sequence, of the first row kept */
    int64_t n_dropped;  /* prefix rows encoded in front of them */
    int64_t n_row;      /* rows kept */
    int64_t shard_row;  /* of the first row kept */
    int64_t encode_row; /* of the first row in the pass; of a miss */
    bool is_hit;        /* found in either tier */
    bool is_pooled;     /* found in the pool */
    bool is_kept;       /* the pool has rows for it, to be written */
} ifkv_reuse_unit;

typedef struct ifkv_reuse {
    bool is_on;
    bool has_store, has_pool;
    ifkv_store store;      /* the caller's table */
    ifkv_reuse_unit *unit; /* [n_unit] of this rank, in ascending index; owned */
    int64_t n_unit;
    char description[640];
    ifkv_exchange_ops ops;   /* of the encode pass: the chunk exchange, but K arrives unrotated */
    ifkv_view no_angles;     /* [max_block, d_head] float32: rotation by nothing */
    int64_t *shard_position; /* [n_kept] rotary, */
    ifkv_view shard_angles;  /*   and their angles: [n_kept, d_head] float32 */
    int64_t *pool_row; /* [n_kept] host, owned: the pool's row of a shard row, where it has one */
    int64_t *pool_row_list;           /* the same in back-end memory */
    int64_t n_hit, n_miss, n_row_hit; /* of both tiers */
    int64_t n_row_pooled;             /* of n_row_hit: from the pool */
} ifkv_reuse;

/* List this rank's entries and plan to encode them all.  Called while a session is created. */
ifkv_status ifkv_reuse_plan(ifkv_session *session);
/* Take what encode needs besides its pass. */
void ifkv_reuse_layout(ifkv_session *session, ifkv_arena *arena);
/* Which chunks [chunks of the placement] the pool holds or the store says it does, of this rank's;
 * others false.  Local. */
ifkv_status ifkv_reuse_probe(ifkv_session *session, bool *is_loaded);
/* K and V of every context row of this rank into the shard, K unrotated.  Errors: the back end's,
 * RESOURCE; never the store's.  Local. */
ifkv_status ifkv_reuse_encode(ifkv_session *session);
/* Every row of the shard to its place in the sequence, then what other ranks will see of it.
 * Collective. */
ifkv_status ifkv_reuse_place(ifkv_session *session);
/* What encode kept is written: once the back end has said so.  Local. */
void ifkv_reuse_commit(ifkv_session *session);
void ifkv_reuse_fini(ifkv_reuse *reuse);

/* ---- for reuse_pool.c and by it ---- */

/* Describe a unit as the tiers know it. */
ifkv_status ifkv_reuse_entry(const ifkv_session *session, const ifkv_reuse_unit *unit,
                             ifkv_store_entry *entry);
/* Look a unit up: true, and its rows are noted, if the pool holds it. */
bool ifkv_reuse_pool_find(ifkv_session *session, ifkv_reuse_unit *unit,
                          const ifkv_store_entry *entry);
/* K and V of all units found into the shard. */
ifkv_status ifkv_reuse_pool_load(ifkv_session *session);
/* K and V of all other units, unrotated in the shard, into the pool as far as they fit. */
ifkv_status ifkv_reuse_pool_save(ifkv_session *session);

#endif
