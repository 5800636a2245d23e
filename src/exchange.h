/* How a row comes to see keys held elsewhere: the table every exchange fills.
 *
 * While the context is encoded, `share` moves what does not depend on the rows of any pass.  A pass
 * is a list of rows, the same on every rank.  Each row has a home (the rank that holds its hidden
 * state) and an owner (the rank that stores its K/V).  In every layer the homes first `store` fresh
 * K and V, then `attend`.  Who sends what in between is all that differs between exchanges.  Calls
 * are Collective: every rank makes them, also with no rows of its own. */
#ifndef IFKV_SRC_EXCHANGE_H
#define IFKV_SRC_EXCHANGE_H

#include "backend.h"
#include "comm.h"
#include "kvcache.h"
#include "placement.h"

typedef struct ifkv_exchange ifkv_exchange;

/* The rows of one pass over all ranks, in ascending index; host arrays, borrowed until the pass is
 * over. */
typedef struct ifkv_exchange_rows {
    int64_t n_row;
    const int64_t *index; /* [n_row] */
    const int *home;      /* [n_row] */
    const int *owner;     /* [n_row] */
} ifkv_exchange_rows;

/* What an exchange is laid out for. */
typedef struct ifkv_exchange_shape {
    int n_head, n_kv_head, d_head, n_layer;
    int64_t max_row;                 /* rows of a pass, all ranks */
    int64_t max_home;                /* rows at home on this rank */
    int64_t max_shard;               /* rows at home on any rank; read where n_slice > 0 */
    const ifkv_placement *placement; /* who stores which context row; borrowed */
} ifkv_exchange_shape;

/* Bytes this rank receives from others in one layer; store and attend of the pass begun last. */
typedef struct ifkv_exchange_bytes {
    int64_t share, store, attend;
} ifkv_exchange_bytes;

typedef struct ifkv_exchange_ops {
    const char *name;
    size_t struct_bytes; /* of the exchange's own struct */
    bool is_home_owner;  /* rows must be at home where their K/V are stored */
    bool is_exact;       /* a row sees all keys at or below its index, whatever the ranks */
    /* 0: a pass is any rows.  Else a pass is the whole context, of which a rank holds this many
     * equal slices, contiguous (1) or zigzag (2): an exact prefill method of its own. */
    int n_slice;
    /* Allocate and release the host arrays of a fresh, zeroed struct; fini takes a half-made one.
     */
    ifkv_status (*init)(ifkv_exchange *exchange);
    void (*fini)(ifkv_exchange *exchange);
    /* Take what lives from the first `share` to the end of the last pass.  The cache is laid out
     * before.  Local; runs twice (see arena.h). */
    void (*layout_shared)(ifkv_exchange *exchange, ifkv_arena *arena);
    /* Take what the exchange needs for passes up to the shape.  Local; runs twice. */
    void (*layout)(ifkv_exchange *exchange, ifkv_arena *arena);
    /* The shards hold one more layer of the context: send what other ranks' rows will see of it.
     * Layers come in ascending order from 0, and again where the shards change before the first
     * pass; nothing is sent if the shape has no rows. */
    ifkv_status (*share)(ifkv_exchange *exchange, int layer);
    /* Route a pass: who sends which row to whom.  Allocates nothing. */
    ifkv_status (*begin)(ifkv_exchange *exchange, const ifkv_exchange_rows *rows);
    /* Write K and V [n_home, n_kv_head * d_head] of this rank's rows of the pass where they belong,
     * on all ranks. */
    ifkv_status (*store)(ifkv_exchange *exchange, int layer, const ifkv_view *k,
                         const ifkv_view *v);
    /* out [n_home, n_head * d_head] = attention of this rank's rows q over every key at or below
     * their index that this exchange lets them see. */
    ifkv_status (*attend)(ifkv_exchange *exchange, int layer, const ifkv_view *q,
                          const ifkv_view *out);
    /* (optional) K and V of the whole context on this rank, row i at index i, as rows at home see
     * them from `share` on.  NULL: the exchange keeps no such thing on more than one rank. */
    const ifkv_kvcache *(*whole)(const ifkv_exchange *exchange);
    /* What the calls above receive, from the plan alone.  Local. */
    ifkv_exchange_bytes (*bytes)(const ifkv_exchange *exchange);
    const char *explain; /* one sentence: what moves, and whether the result is exact */
} ifkv_exchange_ops;

/* Every exchange begins with this; the rest of its struct is its own. */
struct ifkv_exchange {
    const ifkv_exchange_ops *ops;
    ifkv_backend *backend; /* borrowed */
    ifkv_comm *comm;       /* borrowed: for back-end memory */
    ifkv_kvcache *cache;   /* borrowed: this rank's shard */
    ifkv_exchange_shape shape;
    float scale; /* 1 / sqrt(d_head) */
};

/* Create an exchange by name, laid out by the caller afterwards.  The caller owns *exchange_p.
 * Errors: USAGE if unknown. */
ifkv_status ifkv_exchange_create(const char *name, ifkv_backend *backend, ifkv_comm *comm,
                                 ifkv_kvcache *cache, const ifkv_exchange_shape *shape,
                                 ifkv_exchange **exchange_p);
void ifkv_exchange_destroy(ifkv_exchange *exchange);

/* NULL if there is no exchange of that name. */
const ifkv_exchange_ops *ifkv_exchange_find(const char *name);

/* For members of the table that have nothing to do at that point. */
ifkv_status ifkv_exchange_init_nothing(ifkv_exchange *exchange);
void ifkv_exchange_fini_nothing(ifkv_exchange *exchange);
ifkv_status ifkv_exchange_begin_nothing(ifkv_exchange *exchange, const ifkv_exchange_rows *rows);
void ifkv_exchange_layout_nothing(ifkv_exchange *exchange, ifkv_arena *arena);
ifkv_status ifkv_exchange_share_nothing(ifkv_exchange *exchange, int layer);
ifkv_exchange_bytes ifkv_exchange_no_bytes(const ifkv_exchange *exchange);

/* What the exchanges over whole contexts share.  Check that the rows are this rank's shard and are
 * stored where they are at home; write K and V into the shard, row by row; what a rank receives,
 * every row of the context that is not its own; put [K, V] of the shard into rows [row, ...) of
 * block [., 2 n_kv_head * d_head]. */
ifkv_status ifkv_exchange_check_whole(const ifkv_exchange *exchange,
                                      const ifkv_exchange_rows *rows);
ifkv_status ifkv_exchange_store_whole(ifkv_exchange *exchange, int layer, const ifkv_view *k,
                                      const ifkv_view *v);
ifkv_exchange_bytes ifkv_exchange_whole_bytes(const ifkv_exchange *exchange);
ifkv_status ifkv_exchange_pack(ifkv_exchange *exchange, int layer, const ifkv_view *block,
                               int64_t row);

extern const ifkv_exchange_ops ifkv_exchange_query_ops, ifkv_exchange_delta_ops,
    ifkv_exchange_kv_ops, ifkv_exchange_local_ops, ifkv_exchange_ring_ops,
    ifkv_exchange_allgather_ops;

#endif
