/* Projection of P devices from one: what each rank did between its movements, and when P devices
 * with links of a given speed would have done it.
 *
 * Owns the record of a run whose ranks are threads that take turns: a rank computes only while it
 * holds the turn and gives it away in every call of the communicator, so what is timed between two
 * calls had the device to itself.  Owns also the composition, a discrete-event simulation: a
 * collective starts when its last rank arrives and takes alpha + received bytes / bandwidth, the
 * most of any rank; a shift runs beside the work between its begin and its wait, one transfer after
 * the other on each link.  Knows nothing of what is computed.  What it returns is projected, never
 * measured: contention of transfers with compute, and skew, are not in it. */
#ifndef IFKV_COMM_TIMELINE_H
#define IFKV_COMM_TIMELINE_H

#include "comm.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum ifkv_timeline_kind {
    IFKV_TIMELINE_MARK,    /* a phase ends; no rank waits */
    IFKV_TIMELINE_CONTROL, /* host values: barrier, agreement, reduction */
    IFKV_TIMELINE_COLLECTIVE,
    IFKV_TIMELINE_SHIFT_BEGIN,
    IFKV_TIMELINE_SHIFT_WAIT
} ifkv_timeline_kind;

typedef struct ifkv_timeline_event {
    ifkv_timeline_kind kind;
    double compute_ms; /* since this rank's last event */
    int64_t bytes;     /* received from other ranks; of a shift with its begin */
    int from;          /* of a shift's begin */
    int phase;         /* in which the compute time falls */
} ifkv_timeline_event;

/* Called by comm.c before and after every call, between which the rank's turn is given away: enter
 * closes the compute time, leave files the event, its kind and bytes filled in. */
void ifkv_timeline_enter(ifkv_comm *comm, ifkv_timeline_event *event);
void ifkv_timeline_leave(ifkv_comm *comm, const ifkv_timeline_event *event);
/* What follows belongs to `phase`.  Phase 0 forgets everything before it. */
void ifkv_timeline_phase(ifkv_comm *comm, int phase);

/* Compose given events: event[r] [n] of each of `size` ranks, the same kinds and phases in the same
 * order.  ms [n_phase] receives the time from the end of one phase to that of the next, the last
 * rank of each counting.  Pure but for memory.  Errors: RESOURCE. */
ifkv_status ifkv_timeline_compose(const ifkv_timeline_event *const *event, int64_t n, int size,
                                  const ifkv_link *link, int n_phase, double *ms,
                                  ifkv_projection *projection);

#ifdef __cplusplus
}
#endif
#endif
