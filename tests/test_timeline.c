/* Projection of P devices from one: composition against closed forms, and the record of a run. */
#include "test.h"

#include <time.h>

#include "comm.h"
#include "timeline.h"

#define NEAR(got, want) assert_true(fabs((got) - (want)) <= 1e-12 * (1 + fabs((double)(want))))

/* 1 ms before the first byte, 1 MB/ms, 0.5 ms for a host value */
static const ifkv_link slow = {.alpha_us = 1000, .gbytes_per_s = 1, .control_us = 500};
enum { MB = 1000000 };

static ifkv_projection compose(const ifkv_timeline_event *a, const ifkv_timeline_event *b,
                               int64_t n, const ifkv_link *link, double *ms) {
    const ifkv_timeline_event *const event[] = {a, b};
    ifkv_projection projection = {0};
    assert_ok(ifkv_timeline_compose(event, n, b ? 2 : 1, link, 2, ms, &projection));
    return projection;
}

static void one_rank_takes_the_sum_of_its_work(void **state) {
    (void)state;
    double ms[2];
    const ifkv_timeline_event event[] = {{IFKV_TIMELINE_CONTROL, 3, 0, 0, 0},
                                         {IFKV_TIMELINE_COLLECTIVE, 4, 0, 0, 0},
                                         {IFKV_TIMELINE_MARK, 5, 0, 0, 0},
                                         {IFKV_TIMELINE_MARK, 7, 0, 0, 1}};
    const ifkv_projection p = compose(event, NULL, 4, &slow, ms);
    NEAR(p.total_ms, 19);
    NEAR(p.compute_ms, 19);
    NEAR(p.exposed_ms, 0);
    NEAR(ms[0], 12);
    NEAR(ms[1], 7);
}

static void a_collective_waits_for_the_last_and_for_the_most_bytes(void **state) {
    (void)state;
    double ms[2];
    const ifkv_timeline_event a[] = {{IFKV_TIMELINE_COLLECTIVE, 2, 3 * MB, 0, 0},
                                     {IFKV_TIMELINE_MARK, 1, 0, 0, 0}};
    const ifkv_timeline_event b[] = {{IFKV_TIMELINE_COLLECTIVE, 6, MB, 0, 0},
                                     {IFKV_TIMELINE_MARK, 2, 0, 0, 0}};
    const ifkv_projection p = compose(a, b, 2, &slow, ms);
    NEAR(p.total_ms, 6 + 1 + 3 + 2);
    NEAR(p.exposed_ms, 1 + 3);
    NEAR(p.compute_ms, 11);
}

static void a_collective_without_bytes_costs_the_wait_alone(void **state) {
    (void)state;
    double ms[2];
    const ifkv_timeline_event a[] = {{IFKV_TIMELINE_COLLECTIVE, 2, 0, 0, 0}};
    const ifkv_timeline_event b[] = {{IFKV_TIMELINE_COLLECTIVE, 6, 0, 0, 0}};
    NEAR(compose(a, b, 1, &slow, ms).total_ms, 6);
}

static void a_host_value_costs_its_latency_and_its_bytes(void **state) {
    (void)state;
    double ms[2];
    const ifkv_timeline_event a[] = {{IFKV_TIMELINE_CONTROL, 2, 0, 0, 0}};
    const ifkv_timeline_event b[] = {{IFKV_TIMELINE_CONTROL, 1, 2 * MB, 0, 0}};
    NEAR(compose(a, a, 1, &slow, ms).total_ms, 2.5);
    NEAR(compose(a, b, 1, &slow, ms).total_ms, 4.5);
}

/* A ring step: begin, work, wait.  The transfer takes 1 + 4 ms. */
static void a_shift_hides_behind_work(void **state) {
    (void)state;
    double ms[2];
    for (int work = 0; work <= 10; work++) {
        const ifkv_timeline_event a[] = {{IFKV_TIMELINE_SHIFT_BEGIN, 2, 4 * MB, 1, 0},
                                         {IFKV_TIMELINE_SHIFT_WAIT, work, 0, 0, 0}};
        const ifkv_timeline_event b[] = {{IFKV_TIMELINE_SHIFT_BEGIN, 3, 4 * MB, 0, 0},
                                         {IFKV_TIMELINE_SHIFT_WAIT, work, 0, 0, 0}};
        const ifkv_projection p = compose(a, b, 2, &slow, ms);
        NEAR(p.total_ms, 3 + fmax(work, 5));
    }
}

/* The second piece of a link starts when the first one is through. */
static void shifts_of_one_link_queue(void **state) {
    (void)state;
    double ms[2];
    const ifkv_timeline_event a[] = {{IFKV_TIMELINE_SHIFT_BEGIN, 0, 4 * MB, 1, 0},
                                     {IFKV_TIMELINE_SHIFT_BEGIN, 1, 4 * MB, 1, 0},
                                     {IFKV_TIMELINE_SHIFT_WAIT, 1, 0, 0, 0}};
    NEAR(compose(a, a, 3, &slow, ms).total_ms, 5 + 5);
}

static void phases_add_up_to_the_total(void **state) {
    (void)state;
    double ms[2];
    const ifkv_timeline_event a[] = {{IFKV_TIMELINE_MARK, 5, 0, 0, 0},
                                     {IFKV_TIMELINE_COLLECTIVE, 1, MB, 0, 1},
                                     {IFKV_TIMELINE_MARK, 0, 0, 0, 1}};
    const ifkv_timeline_event b[] = {{IFKV_TIMELINE_MARK, 1, 0, 0, 0},
                                     {IFKV_TIMELINE_COLLECTIVE, 8, MB, 0, 1},
                                     {IFKV_TIMELINE_MARK, 0, 0, 0, 1}};
    const ifkv_projection p = compose(a, b, 3, &slow, ms);
    NEAR(ms[0], 5);
    NEAR(ms[0] + ms[1], p.total_ms);
    NEAR(p.total_ms, 9 + 2);
}

/* ---- a run ---- */

enum { RANKS = 3, ROUNDS = 4 };

typedef struct run {
    ifkv_timeline *timeline;
    bool has_failed;
    _Atomic int n_computing;
    _Atomic bool has_overlap;
} run;

static void compute(run *r, int ms) {
    if (r->n_computing++ != 0) r->has_overlap = true;
    const struct timespec time = {0, 1000000L * ms};
    nanosleep(&time, NULL);
    r->n_computing--;
}

static ifkv_status work(ifkv_comm *comm, void *arg) {
    run *r = arg;
    char all[RANKS] = {0};
    const size_t one[RANKS] = {1, 1, 1}, offset[RANKS] = {0, 1, 2};
    ifkv_status status = IFKV_OK;
    ifkv_timeline_begin(r->timeline, comm);
    compute(r, 5); /* before phase 0: does not count */
    IFKV_TRY_GOTO(status, ifkv_comm_barrier(comm), out);
    ifkv_comm_phase(comm, 0);
    for (int i = 0; i < ROUNDS; i++) {
        compute(r, 2 * (1 + comm->rank));
        if (r->has_failed && comm->rank == 1) {
            status = IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_VALUE, "as asked");
            goto out;
        }
        all[comm->rank] = (char)comm->rank;
        IFKV_TRY_GOTO(status, ifkv_comm_all_gather(comm, &all[comm->rank], all, one, offset), out);
    }
    ifkv_comm_phase(comm, 1);
out:
    ifkv_timeline_end(comm);
    return status;
}

static void ranks_compute_one_at_a_time_and_are_timed(void **state) {
    (void)state;
    run r = {0};
    ifkv_projection p;
    const ifkv_link none = {.gbytes_per_s = 1e300};
    assert_ok(ifkv_timeline_create(RANKS, &r.timeline));
    assert_ok(ifkv_comm_thread_run(RANKS, work, &r));
    assert_false(r.has_overlap);
    assert_ok(ifkv_timeline_project(r.timeline, &none, &p));
    /* sleeps are never short: 2 + 4 + 6 ms a round, of which three devices take 6 */
    assert_true(p.compute_ms >= ROUNDS * 12);
    assert_true(p.total_ms >= ROUNDS * 6 && p.total_ms < p.compute_ms);
    NEAR(p.total_ms, p.ms[0]);
    /* each of the rounds moves 2 bytes to every rank */
    const ifkv_link byte = {.gbytes_per_s = 1e-9};
    const double before = p.total_ms;
    assert_ok(ifkv_timeline_project(r.timeline, &byte, &p));
    assert_true(fabs(p.total_ms - before - ROUNDS * 2000) < 1e-6);
    ifkv_timeline_destroy(r.timeline);
}

static void a_rank_that_fails_leaves_no_one_waiting(void **state) {
    (void)state;
    run r = {.has_failed = true};
    ifkv_projection p;
    const ifkv_link none = {.gbytes_per_s = 1e300};
    assert_ok(ifkv_timeline_create(RANKS, &r.timeline));
    assert_fails(ifkv_comm_thread_run(RANKS, work, &r), IFKV_ERR_DATA, IFKV_E_VALUE, "as asked");
    assert_fails(ifkv_timeline_project(r.timeline, &none, &p), IFKV_ERR_INTERNAL, IFKV_E_DIVERGED,
                 "same calls");
    ifkv_timeline_destroy(r.timeline);
}

static void nonsense_is_refused(void **state) {
    (void)state;
    ifkv_timeline *timeline = NULL;
    ifkv_projection p;
    const ifkv_link link = {.gbytes_per_s = 0};
    assert_fails(ifkv_timeline_create(0, &timeline), IFKV_ERR_USAGE, IFKV_E_VALUE, "0 ranks");
    assert_ok(ifkv_timeline_create(1, &timeline));
    assert_fails(ifkv_timeline_project(timeline, &link, &p), IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "bandwidth");
    ifkv_timeline_destroy(timeline);
    ifkv_timeline_destroy(NULL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_rank_takes_the_sum_of_its_work),
        cmocka_unit_test(a_collective_waits_for_the_last_and_for_the_most_bytes),
        cmocka_unit_test(a_collective_without_bytes_costs_the_wait_alone),
        cmocka_unit_test(a_host_value_costs_its_latency_and_its_bytes),
        cmocka_unit_test(a_shift_hides_behind_work),
        cmocka_unit_test(shifts_of_one_link_queue),
        cmocka_unit_test(phases_add_up_to_the_total),
        cmocka_unit_test(ranks_compute_one_at_a_time_and_are_timed),
        cmocka_unit_test(a_rank_that_fails_leaves_no_one_waiting),
        cmocka_unit_test(nonsense_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
