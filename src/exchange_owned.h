/* What exchanges have in common whose rows stay with the owners of their K/V: a row sees its own
 * rank's shard and the prefix.
 *
 * The prefix rows are lent to every rank while the context is encoded, because attention without a
 * sink row fails (algorithm 3, rule a); nobody recomputes them, so they stay right.  The parts lie
 * over disjoint keys: the rank that stores the prefix sees it in its shard only.  Private to the
 * exchanges that begin with this struct. */
#ifndef IFKV_SRC_EXCHANGE_OWNED_H
#define IFKV_SRC_EXCHANGE_OWNED_H

#include "exchange.h"

/* In the order in which they are merged. */
enum { IFKV_OWNED_PREFIX, IFKV_OWNED_SHARD, IFKV_OWNED_MORE, IFKV_OWNED_MAX_PART };

typedef struct ifkv_exchange_owned {
    ifkv_exchange base;
    int64_t n_home;
    int64_t *stage; /* [max_row] host */
    /* Back-end memory. */
    int64_t *slot;        /* [n_home] shard row of each of my rows */
    int64_t *begin, *end; /* [n_home] spans on this shard; begin is 0 for every part */
    int64_t *prefix_end;  /* [n_home] spans on the lent prefix: all of it, or nothing where the
                             shard holds it */
    ifkv_view prefix;     /* [n_layer * n_prefix, 2 kv] K, V */
    /* [max_home, q] and [max_home, n_head] float32: a rank's own part is not rounded */
    ifkv_view part[IFKV_OWNED_MAX_PART], lse[IFKV_OWNED_MAX_PART];
} ifkv_exchange_owned;

/* Members of the table, for an exchange of this kind. */
ifkv_status ifkv_exchange_owned_init(ifkv_exchange *exchange);
void ifkv_exchange_owned_fini(ifkv_exchange *exchange);
void ifkv_exchange_owned_layout_shared(ifkv_exchange *exchange, ifkv_arena *arena);
ifkv_status ifkv_exchange_owned_share(ifkv_exchange *exchange, int layer);
ifkv_status ifkv_exchange_owned_begin(ifkv_exchange *exchange, const ifkv_exchange_rows *rows);
ifkv_status ifkv_exchange_owned_store(ifkv_exchange *exchange, int layer, const ifkv_view *k,
                                      const ifkv_view *v);
ifkv_exchange_bytes ifkv_exchange_owned_bytes(const ifkv_exchange *exchange);

/* The rest of layout and attend, for exchanges with n_part parts. */
void ifkv_exchange_owned_layout(ifkv_exchange_owned *x, ifkv_arena *arena, int n_part);
/* Attention of my rows over the prefix and this rank's shard, into the parts of these names. */
ifkv_status ifkv_exchange_owned_attend(ifkv_exchange_owned *x, int layer, const ifkv_view *q);
/* Attention over k and v, spans [0, end), into part i. */
ifkv_status ifkv_exchange_owned_attend_part(ifkv_exchange_owned *x, int i, const ifkv_view *q,
                                            const ifkv_view *k, const ifkv_view *v,
                                            const int64_t *end);
ifkv_status ifkv_exchange_owned_merge(ifkv_exchange_owned *x, int n_part, const ifkv_view *out);

#endif
