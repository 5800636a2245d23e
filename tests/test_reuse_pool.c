/* Sessions of one engine that leave their chunks to each other in back-end memory (I6, I26): what
 * is found there changes no bit, wherever a chunk stands and whatever went wrong before.  The
 * oracle is a run that encodes every chunk as an entry of a store and finds nothing. */
#include "tiny.h"

#include "agree.h"
#include "memory_store.h"
#include "model_files.h"
#include "session.h"

static const int sizes[] = {1, 2, 3};
enum { N_SIZE = sizeof sizes / sizeof *sizes, N_PREFIX = 2, N_CHUNK = 5, N_UNIT = N_CHUNK + 1 };
static const int64_t lengths[N_CHUNK] = {17, 1, 40, 5, 33};
static const tiny_shape *shape = &tiny_shapes[3]; /* per-head norm, three query heads a K/V head */
enum { PADDING = 2 * 63 }; /* bytes that lines of K and of V may take beside their rows */

static uint64_t seed;
static char *dir, *model;
static memory_store memory;
static tiny_request request, other; /* other: documents 1 and 3 are not those of request */

static uint64_t bytes_of_rows(int64_t n) {
    return (uint64_t)(n * 2 * shape->n_layer * shape->n_kv_head * shape->d_head) * sizeof(float) +
           PADDING;
}

/* All documents of a request fit on one rank, twice. */
static uint64_t roomy(void) {
    return bytes_of_rows(2 * request.n_context);
}

static tiny_request copy_of(const tiny_request *from) {
    uint64_t any = 1;
    tiny_request made = tiny_request_make(&any, shape->n_vocab, N_PREFIX, N_CHUNK, lengths, 4, 3);
    memcpy(made.token, from->token, (size_t)(from->n_context + 4 + 3) * sizeof *made.token);
    return made;
}

static void change_id(tiny_request *of, int64_t index) {
    of->token[index] = (of->token[index] + 1) % shape->n_vocab;
}

static int set_up(void **state) {
    if (dir_setup(state) || !memory_store_init(&memory)) return -1;
    dir = *state;
    model = tiny_model(dir, shape, -1);
    request = tiny_request_make(&seed, shape->n_vocab, N_PREFIX, N_CHUNK, lengths, 4, 3);
    other = copy_of(&request);
    change_id(&other, tiny_request_end(&other, 1) - 1);
    change_id(&other, tiny_request_end(&other, 3) - 1);
    return 0;
}

static int tear_down(void **state) {
    memory_store_fini(&memory);
    tiny_request_fini(&request);
    tiny_request_fini(&other);
    free(model);
    return dir_teardown(state);
}

static tiny_run asking(const tiny_request *of, const char *method, uint64_t pool_bytes) {
    return (tiny_run){.model = model,
                      .weight_seed = 7,
                      .pool_bytes = pool_bytes,
                      .request = &of->request,
                      .options = {.method = method, .ratio = "0.3", .max_new = 4}};
}

/* Every chunk encoded as an entry, nothing found. */
static tiny_run oracle(int size, const tiny_request *of, const char *method) {
    tiny_run run = asking(of, method, 0);
    memory_store_empty(&memory);
    run.options.store = &memory.table;
    assert_ok(tiny_run_on(size, &run));
    assert_int_equal(run.n_hit, 0);
    memory_store_empty(&memory);
    return run;
}

static void fini_all(tiny_run *run, int n) {
    for (int i = 0; i < n; i++) tiny_run_fini(&run[i]);
}

static void i26_cold_warm_and_mixed_are_the_same_bits(void **state) {
    (void)state;
    for (int s = 0; s < N_SIZE; s++) {
        tiny_run want = oracle(sizes[s], &request, "infoflow");
        tiny_run run[] = {asking(&request, "infoflow", roomy()), /* cold */
                          asking(&request, "infoflow", roomy()), /* warm */
                          asking(&other, "infoflow", roomy()),
                          asking(&request, "infoflow", roomy())};
        assert_ok(tiny_runs_on(sizes[s], run, 4));
        assert_int_equal(run[0].n_miss, N_UNIT);
        assert_int_equal(run[2].n_miss, 2);
        for (int i = 0; i < 4; i++) {
            assert_int_equal(run[i].n_hit + run[i].n_miss, N_UNIT);
            assert_int_equal(run[i].n_row_hit, run[i].n_row_pooled);
            if (i == 2) continue;
            assert_int_equal(run[i].n_row_pooled, i ? request.n_context : 0);
            tiny_assert_same(&run[i], &want, true);
        }
        tiny_run mixed[] = {asking(&other, "infoflow", roomy()),
                            asking(&request, "infoflow", roomy())};
        tiny_run other_want = oracle(sizes[s], &other, "infoflow");
        assert_ok(tiny_runs_on(sizes[s], mixed, 2));
        assert_int_equal(mixed[1].n_row_pooled, request.n_context - lengths[1] - lengths[3]);
        tiny_assert_same(&mixed[0], &other_want, true);
        tiny_assert_same(&mixed[1], &want, true);
        tiny_assert_same(&run[2], &other_want, true);
        fini_all(run, 4);
        fini_all(mixed, 2);
        tiny_run_fini(&want);
        tiny_run_fini(&other_want);
    }
}

static void i06_with_a_pool_agrees_with_neither_pool_nor_store(void **state) {
    (void)state;
    for (int s = 0; s < N_SIZE; s++) {
        tiny_run run[] = {asking(&request, "none", roomy()), asking(&request, "none", roomy()),
                          asking(&request, "none", roomy())};
        run[2].options.pool = "off";
        assert_ok(tiny_runs_on(sizes[s], run, 3));
        for (int i = 0; i < 2; i++) {
            assert_within(tiny_rows_error(&run[i], &run[2], 0, run[i].n_context), TINY_TOLERANCE);
            assert_within(tiny_error(run[i].logits, run[2].logits, run[i].n_vocab), TINY_TOLERANCE);
        }
        fini_all(run, 3);
    }
}

/* Rows of the entries that are kept where so many fit, on one rank: in their order, each if it
 * does.
 */
static int64_t rows_kept(int64_t n_row) {
    int64_t left = n_row;
    if (N_PREFIX <= left) left -= N_PREFIX;
    for (int i = 0; i < N_CHUNK; i++)
        if (lengths[i] <= left) left -= lengths[i];
    return n_row - left;
}

static void i26_a_pool_that_is_too_small_is_the_same_bits(void **state) {
    (void)state;
    const int64_t n_row[] = {0, 1, 3, 20, 45, 60, request.n_context - 1};
    for (int s = 0; s < N_SIZE; s++) {
        tiny_run want = oracle(sizes[s], &request, "infoflow");
        for (size_t n = 0; n < sizeof n_row / sizeof *n_row; n++) {
            const uint64_t bytes = n_row[n] ? bytes_of_rows(n_row[n]) : 1;
            tiny_run run[] = {asking(&request, "infoflow", bytes),
                              asking(&request, "infoflow", bytes),
                              asking(&request, "infoflow", bytes)};
            assert_ok(tiny_runs_on(sizes[s], run, 3));
            for (int i = 0; i < 3; i++) tiny_assert_same(&run[i], &want, true);
            /* what was kept stays: nothing of a request drives the rest of it out */
            assert_int_equal(run[2].n_row_pooled, run[1].n_row_pooled);
            assert_true(run[1].n_row_pooled <= sizes[s] * n_row[n]);
            if (sizes[s] == 1) assert_int_equal(run[1].n_row_pooled, rows_kept(n_row[n]));
            fini_all(run, 3);
        }
        tiny_run_fini(&want);
    }
}

/* Requests take turns in a pool for one of them: each drives the other's documents out. */
static void i26_entries_that_went_are_encoded_again(void **state) {
    (void)state;
    const uint64_t bytes = bytes_of_rows(request.n_context + 3);
    for (int s = 0; s < N_SIZE; s++) {
        tiny_request third = copy_of(&other);
        for (int64_t i = 0; i < third.n_context; i++) change_id(&third, i);
        const tiny_request *const order[] = {&request, &third, &request, &other, &third, &request};
        tiny_run run[6], want[6];
        for (int i = 0; i < 6; i++) run[i] = asking(order[i], "infoflow", bytes);
        for (int i = 0; i < 6; i++) want[i] = oracle(sizes[s], order[i], "infoflow");
        assert_ok(tiny_runs_on(sizes[s], run, 6));
        for (int i = 0; i < 6; i++) tiny_assert_same(&run[i], &want[i], true);
        if (sizes[s] == 1) {
            assert_int_equal(run[2].n_hit, 0);
            assert_int_equal(run[3].n_hit, N_UNIT - 2);
            assert_int_equal(run[4].n_hit, 0);
        }
        fini_all(run, 6);
        fini_all(want, 6);
        tiny_request_fini(&third);
    }
}

static void i26_a_document_is_found_at_any_position(void **state) {
    (void)state;
    /* the same documents, last first */
    tiny_request turned = tiny_request_permute(&request, (int64_t[N_CHUNK]){4, 3, 2, 1, 0});
    for (int s = 0; s < N_SIZE; s++) {
        tiny_run want = oracle(sizes[s], &request, "infoflow");
        tiny_run run[] = {asking(&turned, "infoflow", roomy()),
                          asking(&request, "infoflow", roomy())};
        assert_ok(tiny_runs_on(sizes[s], run, 2));
        tiny_assert_same(&run[1], &want, true);
        if (sizes[s] == 1) assert_int_equal(run[1].n_hit, N_UNIT);
        fini_all(run, 2);
        tiny_run_fini(&want);
    }
    tiny_request_fini(&turned);
}

static void i26_the_same_document_twice_is_kept_once(void **state) {
    (void)state;
    const int64_t length[] = {9, 12, 9, 12};
    tiny_request twice = tiny_request_make(&seed, shape->n_vocab, N_PREFIX, 4, length, 4, 3);
    memcpy(twice.token + N_PREFIX + 21, twice.token + N_PREFIX, 21 * sizeof *twice.token);
    tiny_run want = oracle(1, &twice, "infoflow");
    const uint64_t bytes = bytes_of_rows(N_PREFIX + 21);
    tiny_run run[] = {asking(&twice, "infoflow", bytes), asking(&twice, "infoflow", bytes)};
    assert_ok(tiny_runs_on(1, run, 2));
    assert_int_equal(run[1].n_hit, 5);
    for (int i = 0; i < 2; i++) tiny_assert_same(&run[i], &want, true);
    fini_all(run, 2);
    tiny_run_fini(&want);
    tiny_request_fini(&twice);
}

static ifkv_status change_weights_digest(ifkv_engine *engine) {
    IFKV_TRY(ifkv_engine_identify(engine));
    engine->weights_digest ^= 1;
    return IFKV_OK;
}

static void i26_other_weights_and_prefixes_are_never_served(void **state) {
    (void)state;
    tiny_request prefixed = copy_of(&request);
    change_id(&prefixed, N_PREFIX - 1);
    tiny_run run[] = {asking(&request, "none", roomy()), asking(&prefixed, "none", roomy()),
                      asking(&request, "none", roomy())};
    run[2].before = change_weights_digest;
    assert_ok(tiny_runs_on(2, run, 3));
    for (int i = 0; i < 3; i++) assert_int_equal(run[i].n_hit, 0);
    fini_all(run, 3);
    tiny_request_fini(&prefixed);
}

static void the_store_is_asked_for_what_the_pool_has_not(void **state) {
    (void)state;
    for (int s = 0; s < N_SIZE; s++) {
        tiny_run want = oracle(sizes[s], &request, "infoflow");
        for (int round = 0; round < 4; round++) {
            /* an empty store, a full one, one that forgets, one that is damaged */
            memory.is_forgetful = round == 2;
            memory.n_layer_given = round == 3 ? 2 : 0;
            memory.n_load = memory.n_save = 0;
            tiny_run run[] = {asking(&request, "infoflow", roomy()),
                              asking(&request, "infoflow", roomy())};
            for (int i = 0; i < 2; i++) run[i].options.store = &memory.table;
            assert_ok(tiny_runs_on(sizes[s], run, 2));
            const int n_loaded = round == 1 ? N_UNIT : round == 2 ? N_UNIT / 2 : 0;
            assert_int_equal(memory.n_load, n_loaded); /* none in the second run */
            assert_int_equal(memory.n_save, N_UNIT - n_loaded);
            assert_int_equal(run[0].n_hit, n_loaded);
            assert_int_equal(run[0].n_row_pooled, 0);
            assert_int_equal(run[1].n_row_pooled, request.n_context);
            for (int i = 0; i < 2; i++) tiny_assert_same(&run[i], &want, true);
            fini_all(run, 2);
        }
        tiny_run_fini(&want);
        memory_store_empty(&memory);
    }
}

static void who_is_to_leave_it_alone_does(void **state) {
    (void)state;
    tiny_run run[] = {
        asking(&request, "full", roomy()),      asking(&request, "ring", roomy()),
        asking(&request, "allgather", roomy()), asking(&request, "infoflow", roomy()),
        asking(&request, "none", roomy()),      asking(&request, "infoflow", roomy())};
    run[3].options.pool = run[5].options.pool = "off";
    assert_ok(tiny_runs_on(2, run, 6));
    for (int i = 0; i < 6; i++) assert_int_equal(run[i].n_miss, i == 4 ? N_UNIT : 0);
    for (int i = 0; i < 6; i++) assert_int_equal(run[i].n_hit, 0);
    fini_all(run, 6);
    tiny_run wrong = asking(&request, "none", 0);
    wrong.options.pool = "maybe";
    assert_int_equal(tiny_run_on(1, &wrong), IFKV_ERR_USAGE);
}

static void i20_reorder_with_a_pool_is_the_same_bits(void **state) {
    (void)state;
    for (int s = 0; s < N_SIZE; s++) {
        tiny_run run[3]; /* cold, warm, without */
        for (int i = 0; i < 3; i++) {
            run[i] = asking(&request, "infoflow", roomy());
            run[i].options.reorder = "on";
            run[i].options.pool = i == 2 ? "off" : "on";
        }
        assert_ok(tiny_runs_on(sizes[s], run, 3));
        assert_int_equal(run[1].n_row_pooled, request.n_context);
        for (int i = 0; i < 2; i++) tiny_assert_same(&run[i], &run[2], true);
        fini_all(run, 3);
    }
}

static void auto_counts_what_the_pool_holds(void **state) {
    (void)state;
    for (int s = 0; s < N_SIZE; s++) {
        tiny_run run[] = {asking(&request, "auto", roomy()), asking(&request, "none", roomy()),
                          asking(&request, "auto", roomy())};
        for (int i = 0; i < 3; i++) run[i].options.ratio = "0.1";
        for (int i = 0; i < 3; i++) run[i].before = tiny_slow_products;
        assert_ok(tiny_runs_on(sizes[s], run, 3));
        assert_int_equal(run[0].n_selected, 0); /* an exact method selects nothing */
        assert_true(run[2].n_selected > 0);
        assert_int_equal(run[2].n_hit, N_UNIT);
        fini_all(run, 3);
    }
}

/* ---- a back end that fails ---- */

static ifkv_backend_ops failing;
static const ifkv_backend_ops *sound;
static int n_scatter_left, n_sync_left;

static ifkv_status failing_scatter(ifkv_backend *backend, const ifkv_view *from, const int64_t *row,
                                   const ifkv_view *to) {
    if (n_scatter_left > 0 && --n_scatter_left == 0)
        return IFKV_FAIL(IFKV_ERR_INTERNAL, IFKV_E_SHAPE, "planned failure of scatter");
    return sound->scatter(backend, from, row, to);
}

static ifkv_status failing_sync(ifkv_backend *backend) {
    if (n_sync_left > 0 && --n_sync_left == 0)
        return IFKV_FAIL(IFKV_ERR_INTERNAL, IFKV_E_SHAPE, "planned failure of sync");
    return sound->sync(backend);
}

/* A session with documents that the engine has not seen, which ends while it keeps them. */
static ifkv_status fail_a_session(ifkv_engine *engine) {
    const ifkv_prefill_options options = {.size = sizeof options, .method = "none"};
    ifkv_session *session = NULL;
    sound = engine->backend->ops;
    failing = *sound;
    failing.scatter = failing_scatter;
    failing.sync = failing_sync;
    engine->backend->ops = &failing;
    const ifkv_status status = ifkv_session_open(engine, &request.request, &options, &session);
    engine->backend->ops = sound;
    IFKV_REQUIRE(status == IFKV_ERR_INTERNAL && strstr(ifkv_last_error()->text, "planned"),
                 IFKV_ERR_UNEXPECTED, 0, "the session did not fail as planned");
    return IFKV_OK;
}

static void nothing_half_written_is_served_after_a_fault(void **state) {
    (void)state;
    const int n_scatter = 2 * 2 * shape->n_layer; /* K and V, of two runs of rows */
    tiny_run want = oracle(1, &request, "infoflow");
    for (int n = 1; n <= n_scatter + 1; n++) {
        tiny_run run[] = {asking(&other, "infoflow", roomy()),
                          asking(&request, "infoflow", roomy()),
                          asking(&request, "infoflow", roomy())};
        n_scatter_left = n <= n_scatter ? n : 0;
        n_sync_left = n <= n_scatter ? 0 : 1;
        run[1].before = fail_a_session;
        assert_ok(tiny_runs_on(1, run, 3));
        assert_int_equal(run[1].n_hit, N_UNIT - 2); /* of the first: they were read alone */
        assert_int_equal(run[2].n_hit, N_UNIT);
        for (int i = 1; i < 3; i++) tiny_assert_same(&run[i], &want, true);
        fini_all(run, 3);
    }
    tiny_run_fini(&want);
}

/* ---- memory ---- */

static ifkv_status planned_is_all(ifkv_session *session) {
    const ifkv_engine *engine = session->engine;
    ifkv_result result = {.size = sizeof result};
    IFKV_TRY(ifkv_session_result(session, &result));
    return agree_true(engine->comm,
                      result.has_pool && engine->pool.bytes > 0 &&
                          result.memory_planned ==
                              engine->weight_bytes + engine->pool.bytes + engine->arena_bytes);
}

/* Plans of a rank whose memory is a byte too small, then large enough. */
static ifkv_status plan_at_the_limit(ifkv_engine *engine) {
    const ifkv_prefill_options options = {.size = sizeof options, .method = "none"};
    const uint64_t memory_bytes = engine->backend->memory_bytes;
    size_t bytes = 0, again = 0;
    IFKV_TRY(ifkv_engine_plan(engine, &request.request, &options, &bytes));
    engine->backend->memory_bytes = engine->weight_bytes + engine->pool.bytes + bytes - 1;
    const ifkv_status small = ifkv_engine_plan(engine, &request.request, &options, &again);
    engine->backend->memory_bytes++;
    const ifkv_status large = ifkv_engine_plan(engine, &request.request, &options, &again);
    engine->backend->memory_bytes = memory_bytes;
    return agree_true(engine->comm, small == IFKV_ERR_RESOURCE && large == IFKV_OK);
}

static void memory_of_the_pool_is_in_the_plan(void **state) {
    (void)state;
    tiny_run run = asking(&request, "none", roomy());
    run.before = plan_at_the_limit;
    run.after = planned_is_all;
    assert_ok(tiny_run_on(1, &run));
    tiny_run_fini(&run);
}

static ifkv_status open_too_large(ifkv_comm *comm, void *arg) {
    const bool *is_checked = arg;
    const ifkv_engine_options options = {.size = sizeof options,
                                         .model_dir = model,
                                         .backend = "cpu",
                                         .n_thread = 1,
                                         .random_weights = true,
                                         .check_only = *is_checked,
                                         .pool_bytes = (uint64_t)1 << 60};
    ifkv_engine *engine = NULL;
    const ifkv_status status = ifkv_engine_open(comm, &options, &engine);
    IFKV_REQUIRE(status == IFKV_ERR_RESOURCE && strstr(ifkv_last_error()->text, "chunks it keeps"),
                 IFKV_ERR_UNEXPECTED, 0, "got %s", ifkv_status_name(status));
    return IFKV_OK;
}

static void a_pool_beyond_memory_is_refused(void **state) {
    (void)state;
    for (int is_checked = 0; is_checked < 2; is_checked++)
        assert_ok(ifkv_comm_thread_run(2, open_too_large, &(bool){is_checked}));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(i26_cold_warm_and_mixed_are_the_same_bits),
        cmocka_unit_test(i06_with_a_pool_agrees_with_neither_pool_nor_store),
        cmocka_unit_test(i26_a_pool_that_is_too_small_is_the_same_bits),
        cmocka_unit_test(i26_entries_that_went_are_encoded_again),
        cmocka_unit_test(i26_a_document_is_found_at_any_position),
        cmocka_unit_test(i26_the_same_document_twice_is_kept_once),
        cmocka_unit_test(i26_other_weights_and_prefixes_are_never_served),
        cmocka_unit_test(the_store_is_asked_for_what_the_pool_has_not),
        cmocka_unit_test(who_is_to_leave_it_alone_does),
        cmocka_unit_test(i20_reorder_with_a_pool_is_the_same_bits),
        cmocka_unit_test(auto_counts_what_the_pool_holds),
        cmocka_unit_test(nothing_half_written_is_served_after_a_fault),
        cmocka_unit_test(memory_of_the_pool_is_in_the_plan),
        cmocka_unit_test(a_pool_beyond_memory_is_refused),
    };
    seed = tiny_seed();
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
