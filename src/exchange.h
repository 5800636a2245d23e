/* How a row comes to see keys held elsewhere: the table every exchange fills.
 *
 * A pass is a list of rows, the same on every rank.  Each row has a home (the rank that holds its
 * hidden state) and an owner (the rank that stores its K/V).  In every layer the homes first
 * `store` fresh K and V, then `attend`.  Who sends what in between is all that differs between
 * exchanges.  Calls are Collective: every rank makes them, also with no rows of its own. */
#ifndef IFKV_SRC_EXCHANGE_H
#define IFKV_SRC_EXCHANGE_H

#include "backend.h"
#include "comm.h"
#include "kvcache.h"

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
    int64_t max_row;  /* rows of a pass, all ranks */
    int64_t max_home; /* rows at home on this rank */
    int64_t n_prefix; /* rows 0 .. n_prefix - 1 ... */
    int prefix_rank;  /* ... are stored here */
} ifkv_exchange_shape;

typedef struct ifkv_exchange_ops {
    const char *name;
    size_t struct_bytes; /* of the exchange's own struct */
    bool is_home_owner;  /* rows must be at home where their K/V are stored */
    /* Allocate and release the host arrays of a fresh, zeroed struct; fini takes a half-made one.
     */
    ifkv_status (*init)(ifkv_exchange *exchange);
    void (*fini)(ifkv_exchange *exchange);
    /* Take what the exchange needs for passes up to the shape.  Local; runs twice (see arena.h). */
    void (*layout)(ifkv_exchange *exchange, ifkv_arena *arena);
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
    const char *explain; /* one sentence: what moves, and whether the result is exact */
} ifkv_exchange_ops;

/* Every exchange begins with this; the rest of its struct is its own. */
struct ifkv_exchange {
    const ifkv_exchange_ops *ops;
    ifkv_backend *backend; /* borrowed */
    ifkv_comm *comm;       /* borrowed */
    ifkv_kvcache *cache;   /* borrowed: this rank's shard */
    ifkv_exchange_shape shape;
    float scale; /* 1 / sqrt(d_head) */
};

/* Create an exchange by name, "query" or "local", laid out by the caller afterwards.  The caller
 * owns *exchange_p. Errors: USAGE if unknown. */
ifkv_status ifkv_exchange_create(const char *name, ifkv_backend *backend, ifkv_comm *comm,
                                 ifkv_kvcache *cache, const ifkv_exchange_shape *shape,
                                 ifkv_exchange **exchange_p);
void ifkv_exchange_destroy(ifkv_exchange *exchange);

/* NULL if there is no exchange of that name. */
const ifkv_exchange_ops *ifkv_exchange_find(const char *name);

extern const ifkv_exchange_ops ifkv_exchange_query_ops, ifkv_exchange_local_ops;

#endif
