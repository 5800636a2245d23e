/* The stages of a prefill by name.  Each works on an open session, in this order; the session's API
 * runs them all.
 *
 * The rows of two stages may ride in an earlier one (algorithm 1.4, 1.8), where `rides` of the
 * session says so: they join its pass as a second part with an exchange of their own, the same as
 * in a pass of their own, so that every exchange of S will do.  The stage that rode is then not
 * run.
 *
 * The only code in the library that calls `sync`.  All Collective. */
#ifndef IFKV_SRC_PREFILL_H
#define IFKV_SRC_PREFILL_H

#include "session.h"

/* Layer by layer, K and V of every context row into the shard: as its chunk alone sees it
 * (algorithm 1.3), or under an exact method as the whole context does. */
ifkv_status ifkv_prefill_encode(ifkv_session *session);
/* Scores of all context rows on every rank, where the method scores (1.4); with reorder, the
 * chunks' new places before (1.6). */
ifkv_status ifkv_prefill_score(ifkv_session *session);
/* The set S, the same on every rank or an error on every rank (1.5). */
ifkv_status ifkv_prefill_select(ifkv_session *session);
/* K and V of S again, with sight of the whole context (1.7).  May be repeated unless the prompt
 * rides. */
ifkv_status ifkv_prefill_recompute(ifkv_session *session);
/* The prompt's rows over the whole context, and the first answer token (1.8). */
ifkv_status ifkv_prefill_prompt(ifkv_session *session);
/* Greedy decode up to max_new tokens (1.8). */
ifkv_status ifkv_prefill_decode(ifkv_session *session);

#endif
