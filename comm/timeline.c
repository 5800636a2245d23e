/* Projection of P devices from one.  See timeline.h. */
#include "timeline.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <threads.h>
#include <time.h>

enum { FIRST_CAPACITY = 4096 };

typedef struct rank_record {
    ifkv_timeline_event *event; /* [capacity] owned */
    int64_t n, capacity;
    double begin_ms; /* of the compute time under way */
    int phase;
    bool is_holding; /* the turn */
    bool is_short;   /* out of memory: the record is not whole */
} rank_record;

struct ifkv_timeline {
    mtx_t turn;
    int size;
    rank_record *rank; /* [size] owned */
};

ifkv_status ifkv_timeline_create(int size, ifkv_timeline **timeline_p) {
    IFKV_REQUIRE(size >= 1 && timeline_p, IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "timeline: got %d ranks, expected at least 1", size);
    ifkv_timeline *timeline = calloc(1, sizeof *timeline);
    rank_record *rank = calloc((size_t)size, sizeof *rank);
    if (!timeline || !rank || mtx_init(&timeline->turn, mtx_plain) != thrd_success) {
        free(rank);
        free(timeline);
        return IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "timeline: out of memory");
    }
    timeline->size = size;
    timeline->rank = rank;
    *timeline_p = timeline;
    return IFKV_OK;
}

void ifkv_timeline_destroy(ifkv_timeline *timeline) {
    if (!timeline) return;
    for (int r = 0; r < timeline->size; r++) free(timeline->rank[r].event);
    mtx_destroy(&timeline->turn);
    free(timeline->rank);
    free(timeline);
}

/* ---- the record ---- */

static double now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1e3 * (double)now.tv_sec + 1e-6 * (double)now.tv_nsec;
}

static rank_record *record_of(ifkv_comm *comm) {
    return &comm->timeline->rank[comm->rank];
}

/* What was computed so far, asynchronous operations included, closes an event. */
static double stop_clock(ifkv_comm *comm) {
    if (comm->backend) comm->backend->ops->sync(comm->backend);
    return now_ms() - record_of(comm)->begin_ms;
}

static void append(rank_record *record, const ifkv_timeline_event *event) {
    if (record->n == record->capacity) {
        const int64_t capacity = record->capacity ? 2 * record->capacity : FIRST_CAPACITY;
        ifkv_timeline_event *grown = realloc(record->event, (size_t)capacity * sizeof *grown);
        if (!grown) {
            record->is_short = true;
            return;
        }
        record->event = grown;
        record->capacity = capacity;
    }
    record->event[record->n++] = *event;
}

static void take_turn(ifkv_comm *comm) {
    mtx_lock(&comm->timeline->turn);
    record_of(comm)->is_holding = true;
}

static void give_turn(ifkv_comm *comm) {
    rank_record *record = record_of(comm);
    if (!record->is_holding) return;
    record->is_holding = false;
    mtx_unlock(&comm->timeline->turn);
}

void ifkv_timeline_begin(ifkv_timeline *timeline, ifkv_comm *comm) {
    comm->timeline = timeline;
    rank_record *record = record_of(comm);
    record->n = 0;
    record->phase = 0;
    record->is_short = false;
    take_turn(comm);
    record->begin_ms = now_ms();
}

void ifkv_timeline_end(ifkv_comm *comm) {
    if (!comm->timeline) return;
    give_turn(comm);
    comm->timeline = NULL;
}

void ifkv_timeline_enter(ifkv_comm *comm, ifkv_timeline_event *event) {
    rank_record *record = record_of(comm);
    *event = (ifkv_timeline_event){.compute_ms = stop_clock(comm), .phase = record->phase};
    give_turn(comm);
}

void ifkv_timeline_leave(ifkv_comm *comm, const ifkv_timeline_event *event) {
    rank_record *record = record_of(comm);
    append(record, event);
    take_turn(comm);
    record->begin_ms = now_ms();
}

void ifkv_timeline_phase(ifkv_comm *comm, int phase) {
    rank_record *record = record_of(comm);
    const ifkv_timeline_event mark = {
        .kind = IFKV_TIMELINE_MARK, .compute_ms = stop_clock(comm), .phase = record->phase};
    if (phase == 0)
        record->n = 0; /* the time that counts begins here */
    else
        append(record, &mark);
    record->phase = phase;
    record->begin_ms = now_ms();
}

/* ---- composition ---- */

typedef struct composer {
    const ifkv_link *link;
    int size;
    double *now, *waited;       /* [size] ms */
    double *link_free, *arrive; /* [size] when a rank's incoming link is free, and its shift done */
    int *to;                    /* [size] receiver of the shift under way */
} composer;

static double transfer_ms(const ifkv_link *link, int64_t bytes) {
    return bytes > 0 ? 1e-3 * link->alpha_us + (double)bytes / (1e6 * link->gbytes_per_s) : 0;
}

static void wait_until(composer *c, int r, double ms) {
    if (ms <= c->now[r]) return;
    c->waited[r] += ms - c->now[r];
    c->now[r] = ms;
}

static void meet(composer *c, const ifkv_timeline_event *const *event, int64_t i) {
    double latest = 0, longest = 0;
    for (int r = 0; r < c->size; r++) {
        latest = fmax(latest, c->now[r]);
        longest = fmax(longest, transfer_ms(c->link, event[r][i].bytes));
    }
    if (event[0][i].kind == IFKV_TIMELINE_CONTROL && c->size > 1)
        longest = 1e-3 * c->link->control_us + fmax(0, longest - 1e-3 * c->link->alpha_us);
    for (int r = 0; r < c->size; r++) wait_until(c, r, latest + longest);
}

static void begin_shift(composer *c, const ifkv_timeline_event *const *event, int64_t i) {
    for (int r = 0; r < c->size; r++) {
        const int from = event[r][i].from;
        const double start = fmax(fmax(c->now[r], c->now[from]), c->link_free[r]);
        c->arrive[r] = start + transfer_ms(c->link, event[r][i].bytes);
        c->link_free[r] = c->arrive[r];
        c->to[from] = r;
    }
}

/* A rank's shift is done when its own piece has come and its neighbour has the one it sent. */
static void end_shift(composer *c) {
    for (int r = 0; r < c->size; r++) wait_until(c, r, fmax(c->arrive[r], c->arrive[c->to[r]]));
}

static double latest(const composer *c, int *rank_p) {
    *rank_p = 0;
    for (int r = 1; r < c->size; r++)
        if (c->now[r] > c->now[*rank_p]) *rank_p = r;
    return c->now[*rank_p];
}

ifkv_status ifkv_timeline_compose(const ifkv_timeline_event *const *event, int64_t n, int size,
                                  const ifkv_link *link, int n_phase, double *ms,
                                  ifkv_projection *projection) {
    double *state = calloc(4 * (size_t)size, sizeof *state);
    int *to = calloc((size_t)size, sizeof *to), last_rank = 0;
    if (!state || !to) {
        free(state);
        free(to);
        return IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "timeline: out of memory");
    }
    composer c = {.link = link,
                  .size = size,
                  .now = state,
                  .waited = state + size,
                  .link_free = state + 2 * size,
                  .arrive = state + 3 * size,
                  .to = to};
    double last = 0, compute = 0;
    memset(ms, 0, (size_t)n_phase * sizeof *ms);
    for (int64_t i = 0; i < n; i++) {
        for (int r = 0; r < size; r++) {
            c.now[r] += event[r][i].compute_ms;
            compute += event[r][i].compute_ms;
        }
        switch (event[0][i].kind) {
        case IFKV_TIMELINE_MARK: {
            const double end = latest(&c, &last_rank);
            ms[event[0][i].phase] += end - last;
            last = end;
            break;
        }
        case IFKV_TIMELINE_CONTROL:
        case IFKV_TIMELINE_COLLECTIVE: meet(&c, event, i); break;
        case IFKV_TIMELINE_SHIFT_BEGIN: begin_shift(&c, event, i); break;
        case IFKV_TIMELINE_SHIFT_WAIT: end_shift(&c); break;
        }
    }
    projection->total_ms = latest(&c, &last_rank);
    projection->exposed_ms = c.waited[last_rank];
    projection->compute_ms = compute;
    free(state);
    free(to);
    return IFKV_OK;
}

ifkv_status ifkv_timeline_project(const ifkv_timeline *timeline, const ifkv_link *link,
                                  ifkv_projection *caller_projection) {
    IFKV_REQUIRE(timeline && link && caller_projection, IFKV_ERR_USAGE, IFKV_E_STRUCT,
                 "timeline_project: got NULL");
    IFKV_REQUIRE(link->alpha_us >= 0 && link->control_us >= 0 && link->gbytes_per_s > 0,
                 IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "link: got alpha %g us, control %g us, %g GB/s, expected none negative and a "
                 "bandwidth",
                 link->alpha_us, link->control_us, link->gbytes_per_s);
    const int64_t n = timeline->rank[0].n;
    const ifkv_timeline_event **event = malloc((size_t)timeline->size * sizeof *event);
    IFKV_REQUIRE(event, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "timeline: out of memory");
    bool is_whole = true;
    for (int r = 0; r < timeline->size; r++) {
        const rank_record *record = &timeline->rank[r];
        event[r] = record->event;
        is_whole = is_whole && !record->is_short && record->n == n;
        for (int64_t i = 0; i < n && is_whole; i++)
            is_whole = record->event[i].kind == timeline->rank[0].event[i].kind &&
                       record->event[i].phase == timeline->rank[0].event[i].phase;
    }
    ifkv_status status =
        is_whole ? IFKV_OK
                 : IFKV_FAIL(IFKV_ERR_INTERNAL, IFKV_E_DIVERGED,
                             "timeline: the ranks did not make the same calls, or the record is "
                             "not whole");
    ifkv_projection projection = {0};
    if (status == IFKV_OK)
        status = ifkv_timeline_compose(event, n, timeline->size, link, IFKV_N_STAGE, projection.ms,
                                       &projection);
    free(event);
    if (status == IFKV_OK) *caller_projection = projection;
    return status;
}
