/* The communicator over NCCL when something is wrong, on the emulated device and with ranks as
 * threads: peers that do not come, errors of the library, calls that fail one by one.  The claims
 * are that every rank returns in time, with the status that faults J names, and that what is left
 * can be closed.  Moving right is test_comm's business. */
#include "test.h"

#include "agree.h"
#include "comm.h"
#include "device_backend.h"
#include "engine.h"
#include "model_files.h"
#include "nccl_check.h"
#include "standin.h"
#include "tiny.h"

#include <time.h>

enum { SIZE = 3, BYTES = 1000 };
static const double limit_s = 0.3;
static int first_device; /* of the ranks: tests that lose devices leave them behind */

typedef struct outcome {
    ifkv_status attach, first, again; /* of opening, of movements, of one more behind them */
    char text[256];                   /* of the first failure */
    double waited_s;
} outcome;

typedef struct scene {
    int absent; /* the rank that makes no movement, or -1 */
    outcome seen[SIZE];
} scene;

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* A movement of every kind, and a look at what came. */
static ifkv_status move(ifkv_comm *data, ifkv_backend *device, char *memory) {
    const int size = data->size, next = (data->rank + 1) % size,
              previous = (data->rank + size - 1) % size;
    size_t even[SIZE], odd[SIZE], place[SIZE];
    char host[SIZE * BYTES];
    for (int r = 0; r < size; r++) {
        even[r] = BYTES;
        odd[r] = (size_t)(BYTES - r);
        place[r] = (size_t)r * BYTES;
    }
    IFKV_TRY(ifkv_comm_bcast(data, memory, BYTES, 0));
    IFKV_TRY(ifkv_comm_all_gather(data, memory + place[data->rank], memory, even, place));
    IFKV_TRY(ifkv_comm_all_gather(data, memory + place[data->rank], memory, odd, place));
    IFKV_TRY(ifkv_comm_all_to_all(data, memory, even, place, memory + SIZE * BYTES, even, place));
    IFKV_TRY(
        ifkv_comm_shift_begin(data, memory, BYTES, next, memory + SIZE * BYTES, BYTES, previous));
    IFKV_TRY(ifkv_comm_shift_wait(data));
    return device->ops->download(device, host, memory, sizeof host);
}

static ifkv_status body(ifkv_comm *comm, void *arg) {
    scene *it = arg;
    outcome *seen = &it->seen[comm->rank];
    ifkv_backend *device = NULL;
    ifkv_comm *data = NULL;
    void *memory = NULL;
    ifkv_comm_set_timeout(comm, limit_s);
    comm->is_nccl = true;
    IFKV_TRY(ifkv_comm_agree(comm, device_backend_open(first_device + comm->rank, &device), NULL));
    const double begin = now_s();
    seen->attach = ifkv_comm_attach(comm, device, true, &data);
    if (seen->attach == IFKV_OK && comm->rank != it->absent) {
        seen->first = ifkv_comm_alloc(data, device, 2 * SIZE * BYTES, &memory);
        if (seen->first == IFKV_OK) seen->first = move(data, device, memory);
    }
    seen->waited_s = now_s() - begin;
    if (seen->attach || seen->first)
        snprintf(seen->text, sizeof seen->text, "%s", ifkv_last_error()->text);
    if (memory) seen->again = ifkv_comm_bcast(data, memory, 1, 0);
    if (memory && seen->first == IFKV_OK && seen->again == IFKV_OK)
        seen->again = device->ops->sync(device);
    if (data) ifkv_comm_free(data, device, memory);
    if (seen->attach == IFKV_OK) ifkv_comm_detach(data);
    device->ops->close(device);
    return IFKV_OK;
}

static scene play(const char *failures, int absent) {
    scene it = {.absent = absent};
    emu_fail(failures);
    assert_ok(ifkv_comm_thread_run(SIZE, body, &it));
    emu_fail(NULL);
    return it;
}

static void assert_outcome(const outcome *seen, ifkv_status attach, ifkv_status first,
                           const char *words) {
    if (seen->attach != attach || seen->first != first || !strstr(seen->text, words))
        fail_msg("got %d, %d '%s', want %d, %d with '%s'", seen->attach, seen->first, seen->text,
                 attach, first, words);
    assert_true(seen->waited_s < limit_s + 5);
    if (first) assert_int_equal(seen->again, IFKV_ERR_PEER);
}

static void nothing_fails_where_nothing_is_planned(void **state) {
    (void)state;
    const scene it = play(NULL, -1);
    for (int r = 0; r < SIZE; r++) {
        assert_outcome(&it.seen[r], IFKV_OK, IFKV_OK, "");
        assert_int_equal(it.seen[r].again, IFKV_OK);
    }
}

static void a_peer_that_does_not_come_is_missed_in_time(void **state) {
    (void)state;
    const scene it = play(NULL, 1);
    assert_outcome(&it.seen[0], IFKV_OK, IFKV_ERR_PEER, "a movement did not end within 0.3 s");
    assert_outcome(&it.seen[2], IFKV_OK, IFKV_ERR_PEER, "a movement did not end within 0.3 s");
    assert_outcome(&it.seen[1], IFKV_OK, IFKV_OK, "");
}

static void an_error_of_the_network_is_a_lost_peer(void **state) {
    (void)state;
    const scene it = play("ncclAsync/1:2=6", -1);
    assert_outcome(&it.seen[1], IFKV_OK, IFKV_ERR_PEER, "remote process exited");
    /* NCCL tells only the rank that sees it */
    assert_outcome(&it.seen[0], IFKV_OK, IFKV_ERR_PEER, "a movement did not end within");
    assert_outcome(&it.seen[2], IFKV_OK, IFKV_ERR_PEER, "a movement did not end within");
}

static void a_movement_that_hangs_ends_at_the_limit(void **state) {
    (void)state;
    const scene it = play("ncclHang/2:3", -1);
    for (int r = 0; r < SIZE; r++) {
        assert_outcome(&it.seen[r], IFKV_OK, IFKV_ERR_PEER, "a movement did not end within");
        assert_true(it.seen[r].waited_s > limit_s);
    }
}

static void an_initialisation_that_hangs_ends_at_the_limit(void **state) {
    (void)state;
    const scene it = play("ncclInitHang/1:1", -1);
    for (int r = 0; r < SIZE; r++)
        assert_outcome(&it.seen[r], IFKV_ERR_PEER, IFKV_OK,
                       "ncclCommInitRankConfig: the other ranks did not come within 0.3 s");
}

static void every_rank_needs_the_version_it_was_built_for(void **state) {
    (void)state;
    scene it = play("ncclVersion:1+=22703", -1);
    for (int r = 0; r < SIZE; r++)
        assert_outcome(&it.seen[r], IFKV_ERR_RESOURCE, IFKV_OK, "got NCCL 22703, expected");
    it = play("ncclVersion:2=23000", -1); /* one of the ranks */
    for (int r = 0; r < SIZE; r++)
        assert_outcome(&it.seen[r], IFKV_ERR_RESOURCE, IFKV_OK,
                       "got NCCL 22809 on one rank and 23000 on another");
}

static bool has_failed_anywhere(const scene *it) {
    for (int r = 0; r < SIZE; r++)
        if (it->seen[r].attach || it->seen[r].first || it->seen[r].again) return true;
    return false;
}

/* Each call that matters fails its first, second, ... time on whichever rank makes it, until the
 * plan comes to nothing; in the end everything is closed. */
static void any_call_may_fail(void **state) {
    (void)state;
    static const char *const names[] = {
        "cudaStreamCreateWithFlags",
        "cudaEventCreateWithFlags",
        "cudaEventRecord",
        "cudaStreamWaitEvent",
        "cudaMemcpyAsync",
        "ncclGetVersion",
        "ncclGetUniqueId",
        "ncclCommInitRankConfig",
        "ncclGroupStart",
        "ncclGroupEnd",
        "ncclSend",
        "ncclRecv",
        "ncclAllGather",
        "ncclBroadcast",
        "ncclMemAlloc",
        "ncclCommGetAsyncError",
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char plan[64];
        bool has_failed = false;
        for (int n = 1; n <= 16; n += n < 4 ? 1 : 6) {
            snprintf(plan, sizeof plan, "%s:%d", names[i], n);
            /* a test's own back end opens streams, too: what it cannot open is no claim here */
            scene it = {.absent = -1};
            emu_fail(plan);
            const ifkv_status run = ifkv_comm_thread_run(SIZE, body, &it);
            const bool was_reached = emu_calls(names[i]) >= n;
            emu_fail(NULL);
            has_failed = has_failed || run || has_failed_anywhere(&it);
            if (was_reached && !run && !has_failed_anywhere(&it))
                fail_msg("%s: nobody noticed", plan);
            for (int r = 0; r < SIZE; r++) assert_true(it.seen[r].waited_s < 4 * limit_s + 5);
            if (!was_reached) break;
        }
        if (!has_failed) fail_msg("%s: never called", names[i]);
    }
}

/* What comes back is no better for these, but nobody may hang or crash. */
static void leaving_may_fail(void **state) {
    (void)state;
    static const char *const plans[] = {
        "ncclCommFinalize:1+",  "ncclCommDestroy:1+", "ncclCommRegister:1+",
        "ncclCommDeregister:1", "ncclMemFree:1+",     "ncclAsync/1:2,ncclCommAbort:1+",
    };
    for (size_t i = 0; i < sizeof plans / sizeof *plans; i++) {
        const double begin = now_s();
        play(plans[i], -1);
        assert_true(now_s() - begin < 15);
    }
    first_device += SIZE; /* the last of them */
}

/* The device is given up then: nothing waits for it any more. */
static void an_abort_that_hangs_is_left_behind(void **state) {
    (void)state;
    const double begin = now_s();
    const scene it = play("ncclHang/0:1,ncclAbortHang/0:1", -1);
    for (int r = 0; r < SIZE; r++) assert_int_equal(it.seen[r].first, IFKV_ERR_PEER);
    assert_true(now_s() - begin > 9 && now_s() - begin < 20);
}

static void results_become_the_status_that_is_promised(void **state) {
    (void)state;
    static const struct {
        ncclResult_t result;
        ifkv_status status;
    } cases[] = {
        {ncclSuccess, IFKV_OK},
        {ncclInProgress, IFKV_OK},
        {ncclRemoteError, IFKV_ERR_PEER},
        {ncclSystemError, IFKV_ERR_PEER},
        {ncclUnhandledCudaError, IFKV_ERR_RESOURCE},
        {ncclInvalidUsage, IFKV_ERR_RESOURCE},
        {ncclInternalError, IFKV_ERR_INTERNAL},
        {ncclInvalidArgument, IFKV_ERR_INTERNAL},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert_int_equal(IFKV_NCCL(cases[i].result), cases[i].status);
    assert_int_equal(IFKV_NCCL_CUDA(cudaErrorECCUncorrectable), IFKV_ERR_RESOURCE);
    assert_int_equal(IFKV_NCCL_CUDA(cudaErrorLaunchFailure), IFKV_ERR_INTERNAL);
}

/* Where memory is the host's, and where ranks share a device. */
static ifkv_status choice_body(ifkv_comm *comm, void *arg) {
    ifkv_backend host = {.ops = NULL}, *device = NULL;
    const ifkv_backend_ops ops = {.name = "cpu"};
    ifkv_comm *data = NULL;
    (void)arg;
    host.ops = &ops;
    comm->is_auto = true;
    ifkv_comm_set_timeout(comm, limit_s);
    IFKV_TRY(ifkv_comm_attach(comm, &host, true, &data));
    IFKV_TRY(agree_true(comm, data == comm && !strcmp(ifkv_comm_name(comm), "thread")));
    IFKV_TRY(ifkv_comm_agree(comm, device_backend_open(first_device + comm->rank, &device), NULL));
    IFKV_TRY(ifkv_comm_attach(comm, device, false, &data));
    IFKV_TRY(agree_true(comm, data != comm && !strcmp(ifkv_comm_name(comm), "thread")));
    ifkv_comm_detach(data);
    IFKV_TRY(ifkv_comm_attach(comm, device, true, &data));
    IFKV_TRY(agree_true(comm, !strcmp(ifkv_comm_name(comm), "nccl")));
    ifkv_comm_detach(data);
    device->ops->close(device);
    comm->is_auto = false; /* and nccl asked for by name */
    const bool is_refused = ifkv_comm_attach(comm, &host, true, &data) == IFKV_ERR_USAGE;
    return agree_true(comm, is_refused && strstr(ifkv_last_error()->text, "got back end cpu"));
}

static void nccl_is_taken_where_each_rank_has_a_device(void **state) {
    (void)state;
    assert_ok(ifkv_comm_thread_run(2, choice_body, NULL));
}

/* Movements that go wrong with nobody waiting for them. */
typedef enum mistake { SIZE_MISMATCH, FREED_UNDER_WAY } mistake;

typedef struct mistake_scene {
    mistake mistake;
    ifkv_status moved[SIZE], again[SIZE];
    double waited_s[SIZE];
} mistake_scene;

/* Every rank expects less of itself than it sends; or one does not come, and the others free. */
static ifkv_status mistake_body(ifkv_comm *comm, void *arg) {
    mistake_scene *it = arg;
    const int me = comm->rank, next = (me + 1) % SIZE, previous = (me + SIZE - 1) % SIZE;
    size_t send[SIZE] = {BYTES, BYTES, BYTES}, recv[SIZE] = {BYTES, BYTES, BYTES},
           place[SIZE] = {0, BYTES, 2 * BYTES};
    ifkv_backend *device = NULL;
    ifkv_comm *data = NULL;
    void *memory = NULL;
    ifkv_comm_set_timeout(comm, limit_s);
    comm->is_nccl = true;
    recv[me]--;
    IFKV_TRY(ifkv_comm_agree(comm, device_backend_open(first_device + me, &device), NULL));
    IFKV_TRY(ifkv_comm_attach(comm, device, true, &data));
    IFKV_TRY(ifkv_comm_agree(comm, ifkv_comm_alloc(data, device, 2 * SIZE * BYTES, &memory), NULL));
    const double begin = now_s();
    char *const to = (char *)memory + SIZE * BYTES;
    if (it->mistake == SIZE_MISMATCH) {
        it->moved[me] = ifkv_comm_all_to_all(data, memory, send, place, to, recv, place);
        it->again[me] = ifkv_comm_bcast(data, memory, 1, 0);
    } else if (me != 1) {
        it->moved[me] = ifkv_comm_shift_begin(data, memory, BYTES, next, to, BYTES, previous);
    }
    ifkv_comm_free(data, device, memory);
    ifkv_comm_detach(data);
    it->waited_s[me] = now_s() - begin;
    device->ops->close(device);
    return IFKV_OK;
}

static void an_exchange_that_fits_nobody_ends_the_communicator(void **state) {
    (void)state;
    mistake_scene it = {.mistake = SIZE_MISMATCH};
    assert_ok(ifkv_comm_thread_run(SIZE, mistake_body, &it));
    for (int r = 0; r < SIZE; r++) {
        assert_int_equal(it.moved[r], IFKV_ERR_INTERNAL);
        assert_int_equal(it.again[r], IFKV_ERR_PEER);
        assert_true(it.waited_s[r] < limit_s + 5);
    }
}

static void memory_is_freed_in_time_where_a_peer_does_not_come(void **state) {
    (void)state;
    mistake_scene it = {.mistake = FREED_UNDER_WAY};
    assert_ok(ifkv_comm_thread_run(SIZE, mistake_body, &it));
    for (int r = 0; r < SIZE; r++) {
        assert_int_equal(it.moved[r], IFKV_OK);
        assert_true(it.waited_s[r] < limit_s + 5);
    }
}

typedef struct link_scene {
    const char *model;
    ifkv_status status[2];
} link_scene;

static ifkv_status link_body(ifkv_comm *comm, void *arg) {
    link_scene *it = arg;
    const ifkv_engine_options options = {.size = sizeof options,
                                         .model_dir = it->model,
                                         .backend = "cuda",
                                         .n_thread = 1,
                                         .random_weights = true};
    ifkv_rates rates = {.size = sizeof rates};
    ifkv_engine *engine = NULL;
    ifkv_comm_set_timeout(comm, 20 * limit_s); /* products are measured in between */
    comm->is_nccl = true;
    IFKV_TRY(ifkv_engine_open(comm, &options, &engine));
    it->status[comm->rank] = ifkv_engine_measure(engine, &rates);
    ifkv_engine_close(engine);
    return IFKV_OK;
}

/* A link is measured by what moves K/V over it, to the end of the movement. */
static void links_are_measured_by_nccl(void **state) {
    link_scene it = {.model = tiny_model(*state, &tiny_shapes[0], -1)};
    emu_fail("");
    assert_ok(ifkv_comm_thread_run(2, link_body, &it));
    assert_true(emu_calls("ncclAllGather") > 0);
    assert_true(it.status[0] == IFKV_OK && it.status[1] == IFKV_OK);
    emu_fail("ncclHang/1:1");
    assert_ok(ifkv_comm_thread_run(2, link_body, &it));
    emu_fail(NULL);
    assert_true(it.status[0] == IFKV_ERR_PEER && it.status[1] == IFKV_ERR_PEER);
    free((char *)it.model);
}

int main(void) {
    setenv("IFKV_EMU_DEVICES", "9", 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(nothing_fails_where_nothing_is_planned),
        cmocka_unit_test(a_peer_that_does_not_come_is_missed_in_time),
        cmocka_unit_test(an_error_of_the_network_is_a_lost_peer),
        cmocka_unit_test(a_movement_that_hangs_ends_at_the_limit),
        cmocka_unit_test(an_initialisation_that_hangs_ends_at_the_limit),
        cmocka_unit_test(every_rank_needs_the_version_it_was_built_for),
        cmocka_unit_test(any_call_may_fail),
        cmocka_unit_test(an_exchange_that_fits_nobody_ends_the_communicator),
        cmocka_unit_test(memory_is_freed_in_time_where_a_peer_does_not_come),
        cmocka_unit_test_setup_teardown(links_are_measured_by_nccl, dir_setup, dir_teardown),
        cmocka_unit_test(leaving_may_fail),
        cmocka_unit_test(results_become_the_status_that_is_promised),
        cmocka_unit_test(nccl_is_taken_where_each_rank_has_a_device),
        cmocka_unit_test(an_abort_that_hangs_is_left_behind), /* last: a thread stays in it */
    };
    return cmocka_run_group_tests_name("communicator nccl, faults", tests, NULL, NULL);
}
