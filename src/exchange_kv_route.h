/* Who sends what to whom in one pass of exchange `kv`: arithmetic on the rows of the pass, the same
 * on every rank.
 *
 * Rows of rank h look at the rows of rank o that stand before them.  Either the K/V of o's rows
 * travel to h, those below h's last row (pull), or the queries of h's rows travel to o, those above
 * o's first row, attend there, and their partial results come back (ask).  What a row sees is the
 * same.  All pairs pull at first; then the rank that receives most asks instead where that leaves
 * the fuller of the two ranks with least, ties by their sum and by the lower owner, as long as both
 * stay below what that rank received before.  So no rank ever receives more than the fullest one
 * would if all pulled, and at most size^2 pairs change, in O(size) each.  Moves nothing; private to
 * the exchange. */
#ifndef IFKV_SRC_EXCHANGE_KV_ROUTE_H
#define IFKV_SRC_EXCHANGE_KV_ROUTE_H

#include "exchange.h"

typedef struct ifkv_kv_route {
    int size;
    int64_t pull_bytes, query_bytes, answer_bytes; /* of one row that travels */
    bool is_asking;                                /* some pair asks */
    int64_t *pull; /* [size, size] owned; [h, o]: first rows of o that h pulls, 0 if it asks */
    int64_t *ask;  /* [size, size] owned; [h, o]: last rows of h that ask o, 0 if it pulls */
    int64_t *load; /* [size] owned; bytes that each rank receives in a layer */
    int64_t *seen; /* [size] owned scratch */
    int64_t *all;  /* [size] owned scratch */
} ifkv_kv_route;

/* Take host memory for `size` ranks; a failed one may be given to fini.  Errors: RESOURCE. */
ifkv_status ifkv_kv_route_init(ifkv_kv_route *route, int size);
void ifkv_kv_route_fini(ifkv_kv_route *route);

/* Route rows at home with their owners, the bytes of a row being set.  Allocates nothing. */
void ifkv_kv_route_plan(ifkv_kv_route *route, const ifkv_exchange_rows *rows);

#endif
