/* What communicators do when something is wrong: calls or sizes that do not fit, ranks that fail,
 * abort or return early, wrong names, wrong launches.  Without an argument self and thread; under
 * mpirun with "mpi" what MPI can detect; with "abort" rank 0 ends the job with status 81 while the
 * others wait.  Ranks record what they saw; the main thread asserts after the run. */
#include "test.h"

#include "agree.h"
#include "comm.h"
#if IFKV_HAVE_MPI
#include "mpi_check.h"
#endif

#include <time.h>

enum { SIZE = 5 };

typedef struct outcome {
    ifkv_status status;
    int code, rank;
    char text[256];
} outcome;

typedef struct record {
    int odd;        /* the rank that does something else */
    int which;      /* case number */
    double slept_s; /* before the odd rank acts */
    outcome seen[SIZE];
    outcome after[SIZE]; /* of a barrier behind it */
} record;

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void sleep_s(double s) {
    struct timespec t = {(time_t)s, (long)((s - (double)(time_t)s) * 1e9)};
    nanosleep(&t, NULL);
}

static outcome outcome_of(ifkv_status status) {
    outcome seen = {.status = status};
    if (status == IFKV_OK) return seen;
    seen.code = ifkv_last_error()->code;
    seen.rank = ifkv_last_error()->rank;
    snprintf(seen.text, sizeof seen.text, "%s", ifkv_last_error()->text);
    return seen;
}

static void assert_outcome(const outcome *seen, ifkv_status status, int code, const char *text) {
    if (seen->status != status || seen->code != code || !strstr(seen->text, text))
        fail_msg("got %d E%04d '%s', want %d E%04d with '%s'", seen->status, seen->code, seen->text,
                 status, code, text);
}

/* A shift by one rank in which the odd rank sends more, or to a rank further on. */
static ifkv_status shift_that_differs(ifkv_comm *comm, size_t bytes, int hops) {
    char data[64] = {0}, recv[64] = {0};
    const int size = ifkv_comm_size(comm), rank = ifkv_comm_rank(comm);
    IFKV_TRY(ifkv_comm_shift_begin(comm, data, bytes, (rank + hops) % size, recv, 4,
                                   (rank + size - 1) % size));
    return ifkv_comm_shift_wait(comm);
}

/* One collective in which the odd rank's call differs: case 0 the kind, then one size each. */
static ifkv_status call_that_differs(ifkv_comm *comm, int which, bool is_odd) {
    char data[64] = {0}, recv[64] = {0};
    size_t one[SIZE] = {1, 1, 1, 1, 1}, place[SIZE] = {0, 8, 16, 24, 32};
    int64_t value[2] = {0, 0};
    switch (which) {
    case 0:
        if (is_odd) return ifkv_comm_all_gather(comm, data, recv, one, place);
        return ifkv_comm_barrier(comm);
    case 1: return ifkv_comm_bcast(comm, data, is_odd ? 8 : 16, 1);
    case 2: return ifkv_comm_bcast(comm, data, 8, is_odd ? 0 : 1);
    case 3:
        if (is_odd) one[4] = 5;
        return ifkv_comm_all_gather(comm, data, recv, one, place);
    case 4: { /* the odd rank sends rank 4 more than that expects: its buffer must stay whole */
        size_t send[SIZE] = {1, 1, 1, 1, 1};
        if (is_odd) send[4] = 64;
        return ifkv_comm_all_to_all(comm, data, send, place, recv, one, place);
    }
    case 5: return ifkv_comm_all_reduce_i64(comm, value, is_odd ? 1 : 2, IFKV_REDUCE_MIN);
    case 6: return shift_that_differs(comm, is_odd ? 64 : 4, 1);
    case 7: return shift_that_differs(comm, is_odd ? 0 : 4, 1);
    case 8: return shift_that_differs(comm, 4, is_odd ? 2 : 1);
    case 9: return is_odd ? ifkv_comm_barrier(comm) : shift_that_differs(comm, 4, 1);
    default:
        return ifkv_comm_all_reduce_i64(comm, value, 2, is_odd ? IFKV_REDUCE_MAX : IFKV_REDUCE_MIN);
    }
}

static ifkv_status mismatch_body(ifkv_comm *comm, void *arg) {
    record *seen = arg;
    const int rank = ifkv_comm_rank(comm);
    seen->seen[rank] = outcome_of(call_that_differs(comm, seen->which, rank == seen->odd));
    seen->after[rank] = outcome_of(ifkv_comm_barrier(comm));
    return IFKV_OK;
}

static void mismatch_is_the_same_error_on_every_rank(void **state) {
    (void)state;
    static const char *const words[] = {
        "rank 0 calls barrier while rank 3 calls all_gather",
        "bcast: rank 0 expects 16 bytes from root 1, rank 3 8 from root 1",
        "bcast: rank 0 expects 8 bytes from root 1, rank 3 8 from root 0",
        "all_gather: rank 0 expects 1 bytes of rank 4, rank 3 expects 5",
        "all_to_all: rank 3 sends 64 bytes to rank 4, which expects 1",
        "all_reduce: rank 0 passes 2 values with operation 0, rank 3 1 with 0",
        "shift: rank 3 sends 64 bytes to rank 4, which expects 4 from rank 3",
        "shift: rank 3 sends 0 bytes to rank 4, which expects 4 from rank 3",
        "shift: rank 3 sends 4 bytes to rank 0, which expects 4 from rank 4",
        "rank 0 calls shift while rank 3 calls barrier",
        "all_reduce: rank 0 passes 2 values with operation 0, rank 3 2 with 1",
    };
    for (int which = 0; which < (int)(sizeof words / sizeof *words); which++) {
        record seen = {.odd = 3, .which = which};
        assert_ok(ifkv_comm_thread_run(SIZE, mismatch_body, &seen));
        for (int r = 0; r < SIZE; r++) {
            assert_outcome(&seen.seen[r], IFKV_ERR_INTERNAL, IFKV_E_DIVERGED, words[which]);
            assert_int_equal(seen.seen[r].rank, 0);         /* all know: one of them reports it */
            assert_outcome(&seen.after[r], IFKV_OK, 0, ""); /* and the ranks are still in step */
        }
    }
}

/* The odd rank sleeps, so that the others surely wait, and leaves in the way of the case. */
static ifkv_status leave_body(ifkv_comm *comm, void *arg) {
    record *seen = arg;
    const int rank = ifkv_comm_rank(comm);
    if (rank == seen->odd) {
        sleep_s(seen->slept_s);
        if (seen->which == 0) return IFKV_OK;
        if (seen->which == 1) return IFKV_FAIL(IFKV_ERR_DATA, 203, "layer %d is odd", 7);
        ifkv_comm_abort(comm, IFKV_ERR_NUMERIC);
    }
    int64_t value = 0;
    seen->seen[rank] = outcome_of(ifkv_comm_all_reduce_i64(comm, &value, 1, IFKV_REDUCE_SUM));
    seen->after[rank] = outcome_of(ifkv_comm_barrier(comm));
    return seen->which == 1 ? seen->seen[rank].status : IFKV_OK;
}

/* Every rank but the odd one must see PEER, at once and for good. */
static void assert_peers(const record *seen, const char *first, const char *then) {
    for (int r = 0; r < SIZE; r++) {
        if (r == seen->odd) continue;
        assert_outcome(&seen->seen[r], IFKV_ERR_PEER, IFKV_E_COMM_PEER, first);
        assert_outcome(&seen->after[r], IFKV_ERR_PEER, IFKV_E_COMM_PEER, then);
    }
}

static void abort_wakes_waiters_within_a_second(void **state) {
    (void)state;
    /* The rank that aborted calls on at once, before the others have woken: the call that they wait
     * in must not be completed then.  Repeated, because it is a race. */
    for (int i = 0; i < 20; i++) {
        record seen = {.odd = 2, .which = 2, .slept_s = i ? 0.005 : 0.05};
        const double start = now_s();
        assert_ok(ifkv_comm_thread_run(SIZE, leave_body, &seen));
        assert_true(now_s() - start < 1.0);
        assert_peers(&seen, "all_reduce: rank 2 failed (numeric)",
                     "barrier: rank 2 failed (numeric)");
        assert_outcome(&seen.seen[2], IFKV_ERR_PEER, IFKV_E_COMM_PEER, "rank 2 failed (numeric)");
    }
}

static void a_rank_that_returns_early_leaves_nobody_waiting(void **state) {
    (void)state;
    record seen = {.odd = 4, .which = 0, .slept_s = 0.05};
    assert_ok(ifkv_comm_thread_run(SIZE, leave_body, &seen));
    assert_peers(&seen, "all_reduce: rank 4 has returned and will not come",
                 "rank 4 has returned and will not come");
}

static void the_run_fails_with_the_error_of_the_rank_that_failed(void **state) {
    (void)state;
    record seen = {.odd = 3, .which = 1, .slept_s = 0.05};
    assert_fails(ifkv_comm_thread_run(SIZE, leave_body, &seen), IFKV_ERR_DATA, 203,
                 "layer 7 is odd");
    assert_string_equal(ifkv_last_error()->text, "layer 7 is odd");
    assert_non_null(strstr(ifkv_last_error()->file, "test_comm_faults.c"));
    assert_peers(&seen, "all_reduce: rank 3 failed (data)", "rank 3 failed (data)");
}

static ifkv_status two_fail_body(ifkv_comm *comm, void *arg) {
    (void)arg;
    const int rank = ifkv_comm_rank(comm);
    if (rank == 1) return IFKV_FAIL(IFKV_ERR_IO, 702, "rank one");
    if (rank == 3) return IFKV_FAIL(IFKV_ERR_DATA, 203, "rank three");
    return ifkv_comm_barrier(comm);
}

static void the_run_picks_the_lowest_rank_that_failed_by_itself(void **state) {
    (void)state;
    assert_fails(ifkv_comm_thread_run(SIZE, two_fail_body, NULL), IFKV_ERR_IO, 702, "rank one");
}

static ifkv_status only_peers_body(ifkv_comm *comm, void *arg) {
    (void)arg;
    if (ifkv_comm_rank(comm) == 0) return IFKV_OK;
    return ifkv_comm_barrier(comm);
}

static void the_run_reports_peers_if_nobody_else_failed(void **state) {
    (void)state;
    assert_fails(ifkv_comm_thread_run(SIZE, only_peers_body, NULL), IFKV_ERR_PEER, IFKV_E_COMM_PEER,
                 "rank 0 has returned");
}

static ifkv_status bare_body(ifkv_comm *comm, void *arg) {
    (void)arg;
    return ifkv_comm_rank(comm) == 1 ? IFKV_ERR_OS : IFKV_OK;
}

static void the_run_names_a_status_that_nobody_reported(void **state) {
    (void)state;
    assert_fails(ifkv_comm_thread_run(SIZE, bare_body, NULL), IFKV_ERR_OS, 0,
                 "rank 1 returned status os");
}

static ifkv_status last_words_body(ifkv_comm *comm, void *arg) {
    record *seen = arg;
    const int rank = ifkv_comm_rank(comm);
    if (rank == 0) {
        ifkv_comm_abort(comm, IFKV_ERR_INTERNAL);
        return IFKV_OK;
    }
    const ifkv_status mine = rank == 2 ? IFKV_FAIL(IFKV_ERR_DATA, 203, "my own cause") : IFKV_OK;
    int whose = 99;
    const ifkv_status got = ifkv_comm_agree(comm, mine, &whose);
    seen->seen[rank] = outcome_of(got);
    seen->after[rank].code = whose;
    return IFKV_OK;
}

static void agree_without_peers_keeps_the_own_cause(void **state) {
    (void)state;
    record seen = {0};
    assert_ok(ifkv_comm_thread_run(SIZE, last_words_body, &seen));
    assert_outcome(&seen.seen[1], IFKV_ERR_PEER, IFKV_E_COMM_PEER, "rank 0 failed (internal)");
    assert_int_equal(seen.after[1].code, -1);
    assert_outcome(&seen.seen[2], IFKV_ERR_DATA, 203, "my own cause");
    assert_int_equal(seen.after[2].code, 2);
}

/* Ranks leave at changing moments of a run of collectives; the verdict is that the run ends. */
static ifkv_status race_body(ifkv_comm *comm, void *arg) {
    const record *seen = arg;
    char data[128], recv[128 * SIZE];
    size_t bytes[SIZE], offset[SIZE];
    for (size_t r = 0; r < SIZE; r++) {
        bytes[r] = sizeof data;
        offset[r] = r * sizeof data;
    }
    memset(data, ifkv_comm_rank(comm), sizeof data);
    for (int i = 0;; i++) {
        if (ifkv_comm_rank(comm) == seen->odd && i == seen->which)
            return IFKV_FAIL(IFKV_ERR_BUSY, 1, "enough");
        IFKV_TRY(ifkv_comm_all_gather(comm, data, recv, bytes, offset));
    }
}

static void leaving_at_any_moment_ends_the_run(void **state) {
    (void)state;
    for (int i = 0; i < 200; i++) {
        record seen = {.odd = i % SIZE, .which = i % 7};
        assert_fails(ifkv_comm_thread_run(SIZE, race_body, &seen), IFKV_ERR_BUSY, 1, "enough");
    }
}

static void self_refuses_what_the_others_refuse(void **state) {
    (void)state;
    ifkv_comm *comm = NULL;
    const size_t one = 1, two = 2, none = 0;
    char data[4] = "abc";
    assert_ok(ifkv_comm_open("self", &comm));
    assert_fails(ifkv_comm_all_to_all(comm, data, &one, &none, data + 2, &two, &none),
                 IFKV_ERR_INTERNAL, IFKV_E_DIVERGED, "rank 0 sends 1 bytes to rank 0");
    assert_fails(ifkv_comm_bcast(comm, data, 1, 1), IFKV_ERR_USAGE, IFKV_E_VALUE, "root: got 1");
    assert_fails(ifkv_comm_bcast(comm, data, 1, -1), IFKV_ERR_USAGE, IFKV_E_VALUE, "root: got -1");
    assert_fails(ifkv_comm_bcast(comm, NULL, 1, 0), IFKV_ERR_USAGE, IFKV_E_VALUE, "NULL");
    assert_fails(ifkv_comm_gather(comm, NULL, 1, data), IFKV_ERR_USAGE, IFKV_E_VALUE, "NULL");
    assert_ok(ifkv_comm_shift_begin(comm, data, 1, 0, data + 2, 2, 0));
    assert_fails(ifkv_comm_shift_wait(comm), IFKV_ERR_INTERNAL, IFKV_E_DIVERGED,
                 "rank 0 sends 1 bytes to rank 0, which expects 2");
    ifkv_comm_abort(comm, IFKV_ERR_DATA);
    assert_fails(ifkv_comm_barrier(comm), IFKV_ERR_PEER, IFKV_E_COMM_PEER, "aborted");
    assert_fails(ifkv_comm_bcast(comm, data, 1, 0), IFKV_ERR_PEER, IFKV_E_COMM_PEER, "aborted");
    ifkv_comm_close(comm);
    ifkv_comm_close(NULL);
}

static ifkv_status huge_gather_body(ifkv_comm *comm, void *arg) {
    char byte = 0;
    (void)arg;
    return ifkv_comm_gather(comm, &byte, SIZE_MAX / 2 + 1, &byte);
}

static void gather_refuses_a_product_that_wraps(void **state) {
    (void)state;
    assert_fails(ifkv_comm_thread_run(2, huge_gather_body, NULL), IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "2 pieces of 9223372036854775808 bytes");
}

static void open_refuses_unknown_names(void **state) {
    (void)state;
    ifkv_comm *comm = NULL;
    assert_fails(ifkv_comm_open("nccl\n", &comm), IFKV_ERR_USAGE, IFKV_E_COMM, "got \"nccl\\x0a\"");
    assert_fails(ifkv_comm_open("", &comm), IFKV_ERR_USAGE, IFKV_E_COMM, "got \"\"");
    assert_fails(ifkv_comm_open(NULL, &comm), IFKV_ERR_USAGE, IFKV_E_COMM, "NULL");
    assert_fails(ifkv_comm_open("self", NULL), IFKV_ERR_USAGE, IFKV_E_COMM, "NULL");
    assert_fails(ifkv_comm_open("thread", &comm), IFKV_ERR_USAGE, IFKV_E_COMM,
                 "only inside ifkv_comm_thread_run");
    assert_null(comm);
}

static void thread_run_refuses_no_ranks_and_no_function(void **state) {
    (void)state;
    assert_fails(ifkv_comm_thread_run(0, bare_body, NULL), IFKV_ERR_USAGE, IFKV_E_VALUE, "0 ranks");
    assert_fails(ifkv_comm_thread_run(-3, bare_body, NULL), IFKV_ERR_USAGE, IFKV_E_VALUE, "-3");
    assert_fails(ifkv_comm_thread_run(2, NULL, NULL), IFKV_ERR_USAGE, IFKV_E_VALUE, "no function");
}

#if IFKV_HAVE_MPI

static void mpi_needs_a_host_that_started_it(void **state) {
    (void)state;
    ifkv_comm *comm = NULL;
    assert_fails(ifkv_comm_open("mpi", &comm), IFKV_ERR_USAGE, IFKV_E_STATE,
                 "opened before MPI_Init_thread");
}

static void chunks_fit_an_mpi_count(void **state) {
    (void)state;
    const size_t max = (size_t)1 << 30, int_max = 2147483647u;
    assert_int_equal(ifkv_mpi_chunk(int_max, max), 1 << 30);
    assert_int_equal(ifkv_mpi_chunk(int_max + 1, max), 1 << 30);
    assert_int_equal(ifkv_mpi_chunk(int_max + 1, int_max), 2147483647);
    assert_int_equal(ifkv_mpi_chunk(SIZE_MAX, max), 1 << 30);
    assert_int_equal(ifkv_mpi_chunk(max, max), 1 << 30);
    assert_int_equal(ifkv_mpi_chunk(max - 1, max), (1 << 30) - 1);
    assert_int_equal(ifkv_mpi_chunk(0, max), 0);
}

static void set_env(const char *const (*pairs)[2]) {
    static const char *const all[] = {
        "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID", "SLURM_PROCID",
        "SLURM_NTASKS",         "PMIX_RANK"};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) unsetenv(all[i]);
    for (; (*pairs)[0]; pairs++) setenv((*pairs)[0], (*pairs)[1], 1);
}

/* Environments in which a world of one rank is wrong, and ones in which it is right. */
static void copies_of_one_rank_are_refused(void **state) {
    (void)state;
    static const char *const wrong[][5][2] = {
        {{"OMPI_COMM_WORLD_SIZE", "4"}},
        {{"PMI_SIZE", "2"}},
        {{"PMIX_RANK", "1"}},
        {{"SLURM_STEP_NUM_TASKS", "4"}, {"SLURM_STEP_ID", "0"}, {"SLURM_PROCID", "3"}},
    };
    static const char *const right[][5][2] = {
        {{NULL, NULL}},
        {{"OMPI_COMM_WORLD_SIZE", "1"}},
        {{"PMIX_RANK", "0"}},
        /* shells of salloc and sbatch */
        {{"SLURM_NTASKS", "4"}},
        {{"SLURM_NTASKS", "4"}, {"SLURM_PROCID", "0"}},
        {{"SLURM_STEP_NUM_TASKS", "4"}, {"SLURM_STEP_ID", "4294967290"}, {"SLURM_PROCID", "0"}},
        /* mpirun -n 1 in a job whose daemons are a step of four tasks */
        {{"SLURM_STEP_NUM_TASKS", "4"},
         {"SLURM_STEP_ID", "0"},
         {"SLURM_PROCID", "3"},
         {"OMPI_COMM_WORLD_SIZE", "1"}},
        /* not numbers */
        {{"OMPI_COMM_WORLD_SIZE", "4x"}},
        {{"PMI_SIZE", ""}},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        set_env(wrong[i]);
        assert_fails(ifkv_mpi_check_launch(1), IFKV_ERR_RESOURCE, IFKV_E_COMM_LAUNCH,
                     "MPI counts 1 rank, the launcher");
        assert_ok(ifkv_mpi_check_launch(4));
    }
    for (size_t i = 0; i < sizeof right / sizeof *right; i++) {
        set_env(right[i]);
        assert_ok(ifkv_mpi_check_launch(1));
    }
}

static ifkv_comm *judge; /* carries the verdict while another communicator is broken */

/* Rank 0 sends rank 1 `sent` bytes where it expects `expected`; only rank 1 can see it. */
static ifkv_status check_size(bool is_shift, size_t max_message, size_t sent, size_t expected,
                              const char *text) {
    char send[64] = {0}, recv[64] = {0};
    size_t none[64] = {0}, out[64] = {0}, in[64] = {0};
    ifkv_comm *comm = NULL;
    IFKV_TRY(agree_ok(judge, ifkv_comm_mpi_open_chunked(max_message, &comm)));
    const int rank = ifkv_comm_rank(comm), size = ifkv_comm_size(comm);
    if (rank == 0) out[1] = sent;
    if (rank == 1) in[0] = expected;
    outcome seen;
    if (is_shift) {
        seen = outcome_of(ifkv_comm_shift_begin(comm, send, rank == 0 ? sent : 1, (rank + 1) % size,
                                                recv, rank == 1 ? expected : 1,
                                                (rank + size - 1) % size));
        if (!seen.status) seen = outcome_of(ifkv_comm_shift_wait(comm));
    } else {
        seen = outcome_of(ifkv_comm_all_to_all(comm, send, out, none, recv, in, none));
    }
    bool ok = true;
    if (rank == 1)
        ok = seen.status == IFKV_ERR_INTERNAL && seen.code == IFKV_E_DIVERGED &&
             strstr(seen.text, text) &&
             ifkv_comm_barrier(comm) == IFKV_ERR_PEER; /* and it stays broken */
    if (!ok) fprintf(stderr, "rank 1 saw %d '%s'\n", seen.status, seen.text);
    IFKV_TRY(agree_true(judge, ok));
    /* not closed: closing is collective, and rank 1 would not come */
    return IFKV_OK;
}

static void mpi_names_a_message_of_the_wrong_size(void **state) {
    (void)state;
    if (ifkv_comm_size(judge) < 2) skip();
    for (int is_shift = 0; is_shift < 2; is_shift++) {
        assert_ok(check_size(is_shift, 64, 8, 16, "rank 0 sent 8 bytes where rank 1 expects 16"));
        assert_ok(check_size(is_shift, 64, 32, 16,
                             "rank 0 sent more than the 16 bytes that rank 1 expects"));
        assert_ok(check_size(is_shift, 10, 13, 19, "rank 0 sent 3 bytes where rank 1 expects 9"));
        assert_ok(check_size(is_shift, 10, 19, 13,
                             "rank 0 sent more than the 3 bytes that rank 1 expects"));
    }
    /* a shift also tells nothing from something */
    assert_ok(check_size(true, 64, 0, 16, "rank 0 sent 0 bytes where rank 1 expects 16"));
    assert_ok(check_size(true, 64, 16, 0, "rank 0 sent more than the 0 bytes"));
}

static void mpi_errors_carry_the_words_of_the_library(void **state) {
    (void)state;
    ifkv_comm *comm = NULL;
    char data[4] = {0};
    assert_ok(agree_ok(judge, ifkv_comm_open("mpi", &comm)));
    /* past the wrapper's check, so that the library itself refuses the root; on every rank */
    const outcome seen = outcome_of(comm->ops->bcast(comm, data, sizeof data, 9999));
    const outcome after = outcome_of(ifkv_comm_barrier(comm));
    const bool ok = seen.status == IFKV_ERR_PEER && seen.code == IFKV_E_COMM &&
                    strstr(seen.text, "MPI_ERR_ROOT") && after.status == IFKV_ERR_PEER;
    ifkv_comm_close(comm);
    assert_ok(agree_true(judge, ok));
}

static int run_mpi(int *argc, char ***argv, bool is_abort) {
    int level = 0, rank = 0;
    MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &level);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    if (rank > 0 && !freopen("/dev/null", "w", stdout)) MPI_Abort(MPI_COMM_WORLD, 1);
    if (ifkv_comm_open("mpi", &judge) != IFKV_OK) {
        fprintf(stderr, "rank %d: %s\n", rank, ifkv_last_error()->text);
        MPI_Abort(MPI_COMM_WORLD, ifkv_last_error()->status);
    }
    if (is_abort) {
        if (rank == 0) sleep_s(0.1);
        if (rank == 0) ifkv_comm_abort(judge, IFKV_ERR_PEER);
        ifkv_comm_barrier(judge);
        return 0;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(mpi_names_a_message_of_the_wrong_size),
        cmocka_unit_test(mpi_errors_carry_the_words_of_the_library),
    };
    const int n_failed = cmocka_run_group_tests_name("comm faults mpi", tests, NULL, NULL);
    ifkv_comm_close(judge);
    MPI_Finalize();
    return n_failed != 0;
}

#else

static void mpi_that_was_not_built_says_so(void **state) {
    (void)state;
    ifkv_comm *comm = NULL;
    assert_fails(ifkv_comm_open("mpi", &comm), IFKV_ERR_UNSUPPORTED, IFKV_E_COMM,
                 "built without MPI");
}

#endif

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(mismatch_is_the_same_error_on_every_rank),
        cmocka_unit_test(abort_wakes_waiters_within_a_second),
        cmocka_unit_test(a_rank_that_returns_early_leaves_nobody_waiting),
        cmocka_unit_test(the_run_fails_with_the_error_of_the_rank_that_failed),
        cmocka_unit_test(the_run_picks_the_lowest_rank_that_failed_by_itself),
        cmocka_unit_test(the_run_reports_peers_if_nobody_else_failed),
        cmocka_unit_test(the_run_names_a_status_that_nobody_reported),
        cmocka_unit_test(agree_without_peers_keeps_the_own_cause),
        cmocka_unit_test(leaving_at_any_moment_ends_the_run),
        cmocka_unit_test(self_refuses_what_the_others_refuse),
        cmocka_unit_test(gather_refuses_a_product_that_wraps),
        cmocka_unit_test(open_refuses_unknown_names),
        cmocka_unit_test(thread_run_refuses_no_ranks_and_no_function),
#if IFKV_HAVE_MPI
        cmocka_unit_test(mpi_needs_a_host_that_started_it),
        cmocka_unit_test(chunks_fit_an_mpi_count),
        cmocka_unit_test(copies_of_one_rank_are_refused),
#else
        cmocka_unit_test(mpi_that_was_not_built_says_so),
#endif
    };
    if (argc < 2) return cmocka_run_group_tests_name("comm faults", tests, NULL, NULL);
#if IFKV_HAVE_MPI
    if (!strcmp(argv[1], "mpi")) return run_mpi(&argc, &argv, false);
    if (!strcmp(argv[1], "abort")) return run_mpi(&argc, &argv, true);
#endif
    fprintf(stderr, "usage: %s [mpi|abort]\n", argv[0]);
    return 2;
}
