/* Encode with a chunk store: this rank's chunks as entries, loaded where they are there, encoded
 * and kept where they are not (algorithm 1.3).  Without a store, where chunks are about to change
 * places: everything is encoded, nothing kept.
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
    bool is_hit;
} ifkv_reuse_unit;

typedef struct ifkv_reuse {
    bool is_on;
    bool has_store;
    ifkv_store store;      /* the caller's table */
    ifkv_reuse_unit *unit; /* [n_unit] of this rank, in ascending index; owned */
    int64_t n_unit;
    char description[640];
    ifkv_exchange_ops ops;   /* of the encode pass: the chunk exchange, but K arrives unrotated */
    ifkv_view no_angles;     /* [max_block, d_head] float32: rotation by nothing */
    int64_t *shard_position; /* [n_kept] rotary, */
    ifkv_view shard_angles;  /*   and their angles: [n_kept, d_head] float32 */
    int64_t n_hit, n_miss, n_row_hit;
} ifkv_reuse;

/* List this rank's entries and plan to encode them all.  Called while a session is created. */
ifkv_status ifkv_reuse_plan(ifkv_session *session);
/* Take what encode needs besides its pass. */
void ifkv_reuse_layout(ifkv_session *session, ifkv_arena *arena);
/* Which chunks [chunks of the placement] a store says it holds, of this rank's; others false.
 * Local. */
ifkv_status ifkv_reuse_probe(ifkv_session *session, bool *is_loaded);
/* K and V of every context row of this rank into the shard, K unrotated.  Errors: the back end's,
 * RESOURCE; never the store's.  Local. */
ifkv_status ifkv_reuse_encode(ifkv_session *session);
/* Every row of the shard to its place in the sequence, then what other ranks will see of it.
 * Collective. */
ifkv_status ifkv_reuse_place(ifkv_session *session);
void ifkv_reuse_fini(ifkv_reuse *reuse);

#endif
