/* Method `auto`: what it runs follows the rates, and is the same on every rank (algorithm 9.4); and
 * the cost model's bytes are those that sessions receive.
 *
 * One process, random weights, ranks as threads.  With a chunk store: test_reuse.c. */
#include "tiny.h"

#include "agree.h"
#include "auto.h"
#include "comm.h"
#include "cost.h"
#include "engine.h"
#include "error_codes.h"
#include "model_files.h"

static const int sizes[] = {1, 2, 3, 5};
enum { N_SIZE = sizeof sizes / sizeof *sizes };

static uint64_t seed;
static char *dir, *model;
static tiny_request request;

static int set_up(void **state) {
    if (dir_setup(state)) return -1;
    dir = *state;
    model = tiny_model(dir, &tiny_shapes[1], -1);
    request = tiny_request_make(&seed, tiny_shapes[1].n_vocab, 3, 6,
                                (int64_t[]){60, 75, 66, 70, 81, 64}, 5, 4);
    return 0;
}

static int tear_down(void **state) {
    tiny_request_fini(&request);
    free(model);
    return dir_teardown(state);
}

static void set_rates(ifkv_engine *engine, double matmul, double attention) {
    engine->rates = (ifkv_rates){
        .size = sizeof engine->rates, .matmul = matmul, .attention = attention, .memory = 1e12};
    engine->has_rates = true;
}

/* Attention is all that takes time: chunks apart have little of it. */
static ifkv_status slow_attention(ifkv_engine *engine) {
    set_rates(engine, 1e15, 1e6);
    return IFKV_OK;
}

static ifkv_status a_rank_apart(ifkv_engine *engine) {
    set_rates(engine, engine->comm->rank == 1 ? 1e6 : 2e6, 1e15);
    return IFKV_OK;
}

static tiny_run run_with(const char *method, tiny_engine_fn before, tiny_session_fn after) {
    return (tiny_run){.model = model,
                      .weight_seed = 5,
                      .request = &request.request,
                      .options = {.method = method, .ratio = "0.1", .max_new = 3},
                      .before = before,
                      .after = after};
}

static void infoflow_must_save_3_percent(void **state) {
    (void)state;
    assert_true(ifkv_cost_takes_infoflow(100, 97));
    assert_false(ifkv_cost_takes_infoflow(100, 97.01));
    assert_false(ifkv_cost_takes_infoflow(100, 100));
}

static const char *expected;

static ifkv_status ran_as_expected(ifkv_session *session) {
    ifkv_comm *comm = session->engine->comm;
    ifkv_result result = {.size = sizeof result};
    IFKV_TRY(ifkv_session_result(session, &result));
    const char *exact = comm->size > 1 ? "ring" : "full";
    const bool is_infoflow = !strcmp(result.method, "infoflow");
    IFKV_TRY(agree_true(comm, !strcmp(result.method, *expected ? expected : exact)));
    IFKV_TRY(agree_true(comm, !strcmp(result.auto_exact, exact)));
    return agree_true(comm, is_infoflow == ifkv_cost_takes_infoflow(result.auto_exact_ms,
                                                                    result.auto_infoflow_ms));
}

/* And leaves what the method itself leaves, to the bit. */
static void what_runs_follows_the_rates(void **state) {
    (void)state;
    static const struct {
        tiny_engine_fn rates;
        const char *method; /* "": the exact one */
    } ways[] = {{slow_attention, "infoflow"}, {tiny_slow_products, ""}};
    for (int s = 0; s < N_SIZE; s++)
        for (int w = 0; w < 2; w++) {
            expected = ways[w].method;
            tiny_run run = run_with("auto", ways[w].rates, ran_as_expected);
            assert_ok(tiny_run_on(sizes[s], &run));
            const char *exact = sizes[s] > 1 ? "ring" : "full";
            tiny_run want = run_with(*expected ? expected : exact, NULL, NULL);
            assert_ok(tiny_run_on(sizes[s], &want));
            assert_true(tiny_same_rows(&run, &want));
            assert_true(run.selected_digest == want.selected_digest);
            assert_memory_equal(run.logits, want.logits,
                                (size_t)want.n_vocab * sizeof *want.logits);
            tiny_run_fini(&run);
            tiny_run_fini(&want);
        }
}

static void i23_rates_that_differ_stop_all(void **state) {
    (void)state;
    tiny_run run = run_with("auto", a_rank_apart, NULL);
    assert_int_equal(tiny_run_on(3, &run), IFKV_ERR_INTERNAL);
    assert_int_equal(ifkv_last_error()->code, IFKV_E_DIVERGED);
    assert_non_null(strstr(ifkv_last_error()->text, "estimates"));
    tiny_run_fini(&run);
}

static ifkv_status measure(ifkv_engine *engine) {
    ifkv_rates rates = {.size = sizeof rates};
    IFKV_TRY(ifkv_engine_measure(engine, &rates));
    const double arithmetic[] = {rates.matmul, rates.attention, rates.memory, rates.passes};
    bool ok = (engine->comm->size == 1) == (rates.link == 0 && rates.message_s == 0);
    /* a machine that makes less than a million or more than 10^17 a second is not one */
    for (int i = 0; i < 4; i++) ok = ok && arithmetic[i] > 1e6 && arithmetic[i] < 1e17;
    ok = ok && rates.message_s < 10 && rates.link >= 0;
    IFKV_TRY(agree_true(engine->comm, ok));
    ifkv_comm *comm = engine->comm;
    const double each[] = {rates.matmul, rates.attention, rates.memory,
                           rates.passes, rates.link,      rates.message_s};
    for (int i = 0; i < 6; i++) {
        uint64_t bits;
        memcpy(&bits, &each[i], sizeof bits);
        IFKV_TRY(ifkv_comm_same(comm, bits, "rate"));
    }
    return IFKV_OK;
}

static void rates_are_measured_and_equal_on_all_ranks(void **state) {
    (void)state;
    for (int s = 0; s < N_SIZE; s++) {
        tiny_run run = run_with("auto", measure, NULL);
        assert_ok(tiny_run_on(sizes[s], &run));
        tiny_run_fini(&run);
    }
}

/* A link that takes the time of a line, on a clock that nothing else moves. */
typedef struct line_link {
    ifkv_comm_ops comm; /* first: found from a communicator's ops */
    const ifkv_comm_ops *real;
    double message_s, link, *ms;
    size_t longest;
    int n_call;
} line_link;
typedef struct line_clock {
    ifkv_backend_ops backend; /* first */
    double ms;
} line_clock;

static double line_ms(ifkv_backend *backend) {
    return ((const line_clock *)backend->ops)->ms;
}
static ifkv_status line_all_gather(ifkv_comm *comm, const void *send, void *recv,
                                   const size_t *bytes, const size_t *offset) {
    line_link *it = (line_link *)comm->ops;
    for (int r = 0; r < comm->size; r++) {
        if (r != comm->rank) *it->ms += 1e3 * (it->message_s + (double)bytes[r] / it->link);
        if (bytes[r] > it->longest) it->longest = bytes[r];
    }
    it->n_call++;
    return it->real->all_gather(comm, send, recv, bytes, offset);
}

static ifkv_status measure_line(ifkv_engine *engine, double message_s, double link, size_t longest,
                                int n_call) {
    line_clock clock = {.backend = *engine->backend->ops};
    line_link line = {.comm = *engine->data->ops, .real = engine->data->ops, .ms = &clock.ms};
    const ifkv_backend_ops *real = engine->backend->ops;
    ifkv_rates rates = {.size = sizeof rates};
    line.message_s = message_s;
    line.link = link;
    line.comm.all_gather = line_all_gather;
    clock.backend.clock_ms = line_ms;
    engine->data->ops = &line.comm;
    engine->backend->ops = &clock.backend;
    engine->has_rates = false;
    const ifkv_status status = ifkv_engine_measure(engine, &rates);
    engine->data->ops = line.real;
    engine->backend->ops = real;
    IFKV_TRY(status);
    /* times of at least 16 us are told to 1 ps, rates to a byte a second */
    bool ok = fabs(rates.link - link) < 1 + 1e-6 * link;
    ok = ok && fabs(rates.message_s - message_s) < 1e-6 * message_s;
    ok = ok && line.longest == longest && line.n_call == n_call;
    return agree_true(engine->comm, ok);
}

enum { KIB = 1 << 10, MIB = 1 << 20 };

/* Three ranks, two messages a gather, four gathers a size behind one to warm up; 0.25 s in all. */
static ifkv_status lines(ifkv_engine *engine) {
    IFKV_TRY(measure_line(engine, 8e-6, 330e9, 16 * MIB, 1 + 5 * 4));
    IFKV_TRY(measure_line(engine, 1e-3, 1e9, 16 * MIB, 1 + 4 * 4 + 4));
    /* 64 KiB take 15 ms, hence 1 MiB perhaps 0.24 s, and 0.07 s are spent */
    IFKV_TRY(measure_line(engine, 1e-3, 10e6, 64 * KIB, 1 + 2 * 4));
    /* 64 KiB take 1.3 s: once, for without a second size there is no line */
    return measure_line(engine, 1e-3, 1e5, 64 * KIB, 1 + 4 + 1);
}

static void links_are_measured_up_to_megabytes_in_a_bounded_time(void **state) {
    (void)state;
    tiny_run run = run_with("auto", lines, NULL);
    assert_ok(tiny_run_on(3, &run));
    tiny_run_fini(&run);
}

static ifkv_status plans_for_both(ifkv_engine *engine) {
    ifkv_prefill_options options = {.size = sizeof options, .ratio = "0.1"};
    const char *const methods[] = {"auto", "infoflow", engine->comm->size > 1 ? "ring" : "full"};
    size_t bytes[3];
    for (int i = 0; i < 3; i++) {
        options.method = methods[i];
        IFKV_TRY(ifkv_engine_plan(engine, &request.request, &options, &bytes[i]));
    }
    return agree_true(engine->comm, bytes[0] == (bytes[1] > bytes[2] ? bytes[1] : bytes[2]));
}

static void memory_is_planned_for_either_method(void **state) {
    (void)state;
    for (int s = 0; s < N_SIZE; s++) {
        tiny_run run = run_with("none", plans_for_both, NULL);
        assert_ok(tiny_run_on(sizes[s], &run));
        tiny_run_fini(&run);
    }
}

/* What does not depend on which rows are selected: to the byte, over all ranks. */
static ifkv_status receives_what_the_model_says(ifkv_session *session) {
    ifkv_comm *comm = session->engine->comm;
    const ifkv_cost_model cost = {&session->engine->model.config, 4, 4, 8, false};
    const ifkv_select_input *input = session->scores ? &session->selector->input : NULL;
    const ifkv_cost_plan plan = {
        .placement = &session->placement,
        .n_selected = session->n_selected,
        .n_question = session->n_question,
        .n_prompt = session->n_prompt,
        .n_score_layer = input ? input->score_layer[input->n_score_layer - 1] + 1 : 0,
    };
    ifkv_cost_way way;
    if (!ifkv_cost_way_find(session->exchange_name, &way)) return IFKV_ERR_UNEXPECTED;
    double want[IFKV_N_STAGE] = {0};
    for (int rank = 0; rank < comm->size; rank++) {
        ifkv_cost_work work[IFKV_N_STAGE];
        ifkv_cost_count(&cost, &plan, way, rank, work);
        for (int i = 0; i < IFKV_N_STAGE; i++) want[i] += work[i].link_bytes;
    }
    int64_t got[IFKV_N_STAGE];
    memcpy(got, session->bytes, sizeof got);
    IFKV_TRY(ifkv_comm_all_reduce_i64(comm, got, IFKV_N_STAGE, IFKV_REDUCE_SUM));
    static const ifkv_stage stages[] = {IFKV_STAGE_ENCODE, IFKV_STAGE_SCORE, IFKV_STAGE_RECOMPUTE};
    for (int i = 0; i < (way == IFKV_COST_QUERY ? 2 : 3); i++)
        if (fabs((double)got[stages[i]] - want[stages[i]]) > 1e-6 * want[stages[i]])
            return IFKV_FAIL(IFKV_ERR_UNEXPECTED, 0, "%s of %s: got %lld bytes, model says %.1f",
                             ifkv_stage_name(stages[i]), session->exchange_name,
                             (long long)got[stages[i]], want[stages[i]]);
    return IFKV_OK;
}

static void i25_sessions_receive_the_bytes_of_the_cost_model(void **state) {
    (void)state;
    static const ifkv_prefill_options ways[] = {
        {.exchange = "delta"}, {.exchange = "query"}, {.method = "ring"}, {.method = "allgather"}};
    for (int s = 0; s < N_SIZE; s++)
        for (int w = 0; w < 4; w++) {
            tiny_run run = run_with(ways[w].method, NULL, receives_what_the_model_says);
            run.options.exchange = ways[w].exchange;
            assert_ok(tiny_run_on(sizes[s], &run));
            tiny_run_fini(&run);
        }
}

int main(void) {
    seed = tiny_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(infoflow_must_save_3_percent),
        cmocka_unit_test(what_runs_follows_the_rates),
        cmocka_unit_test(i23_rates_that_differ_stop_all),
        cmocka_unit_test(rates_are_measured_and_equal_on_all_ranks),
        cmocka_unit_test(links_are_measured_up_to_megabytes_in_a_bounded_time),
        cmocka_unit_test(memory_is_planned_for_either_method),
        cmocka_unit_test(i25_sessions_receive_the_bytes_of_the_cost_model),
    };
    return cmocka_run_group_tests_name("auto", tests, set_up, tear_down);
}
