/* Method `auto`: measure what the machine does in a second, estimate exact prefill and infoflow
 * from lengths, and run the exact one unless the approximation is clearly faster (algorithm 9.4).
 *
 * Every rank takes the same decision: rates are the slowest rank's, what is in the chunk store is
 * put together, and the estimates must be the same bits on all. */
#ifndef IFKV_SRC_AUTO_H
#define IFKV_SRC_AUTO_H

#include "cost.h"
#include "session.h"

typedef struct ifkv_auto_choice {
    const char *method, *exact; /* what runs; the exact method it was compared with */
    double exact_ms, infoflow_ms;
} ifkv_auto_choice;

/* True if options ask for method "auto"; Local, takes any struct. */
bool ifkv_auto_is_asked(const ifkv_prefill_options *options);
/* Bytes of arena that either method needs.  Local. */
ifkv_status ifkv_auto_plan(const ifkv_engine *engine, const ifkv_request *request,
                           const ifkv_prefill_options *options, size_t *bytes_p);
/* What a session that has been planned does, for cost.h; is_loaded [chunks of the placement] is
 * borrowed, and so is what the session owns.  Local. */
void ifkv_session_cost(const ifkv_session *session, const bool *is_loaded, ifkv_cost_model *model,
                       ifkv_cost_plan *plan, ifkv_cost_way *way_p);
/* Estimate both and choose; the engine's rates have been measured.  Collective. */
ifkv_status ifkv_auto_choose(ifkv_engine *engine, const ifkv_request *request,
                             const ifkv_prefill_options *options, ifkv_auto_choice *choice);

#endif
