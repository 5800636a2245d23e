/* Rows that ride (I17): scoring rows in encode, the prompt in recompute, against passes of their
 * own.
 *
 * Where riders keep their products, as on the CPU, nothing may differ by a bit.  Where they join
 * them, which is forced here by a table with `joins_riders`, rounding may.  Requests are awkward:
 * fewer tokens than ranks, one chunk, a prompt of one token, a prompt longer than the first tail
 * block. */
#include "tiny.h"

#include "agree.h"
#include "comm.h"
#include "engine.h"
#include "model_files.h"
#include "prefill.h"

static const int sizes[] = {1, 2, 4, 7};
static const char *const exchanges[] = {"query", "delta", "kv", "local"};
/* the last layer scores too; the first alone or the first two, and encode goes on without riders */
static const char *const score_layers[] = {NULL, "0", "0,1"};
enum {
    N_SIZE = 4,
    N_EXCHANGE = 4,
    N_LAYERS = 3,
    N_CASE = 6,
    MAX_SIZE = 7,
    CONTROL_BYTES = 64 * MAX_SIZE /* of a stage: statuses and the first token */
};

static uint64_t seed;
static tiny_case cases[N_CASE];
static ifkv_backend_ops joining; /* the CPU's table, but riders join */

static int set_up(void **state) {
    if (dir_setup(state)) return -1;
    const char *dir = *state;
    int64_t random_length[9];
    for (int i = 0; i < 9; i++) random_length[i] = 1 + tiny_below(&seed, 30);
    cases[0] = tiny_case_make(dir, &seed, &tiny_shapes[0], 3, 7,
                              (int64_t[]){17, 1, 40, 5, 33, 64, 9}, 7, 4);
    cases[1] = tiny_case_make(dir, &seed, &tiny_shapes[1], 0, 3, (int64_t[]){20, 1, 31}, 1, 3);
    cases[2] = tiny_case_make(dir, &seed, &tiny_shapes[3], 0, 2, (int64_t[]){1, 2}, 3, 1);
    /* nothing can be selected */
    cases[3] = tiny_case_make(dir, &seed, &tiny_shapes[3], 1, 1, (int64_t[]){37}, 4, 2);
    cases[4] = tiny_case_make(dir, &seed, &tiny_shapes[2], 2, 9, random_length, 5, 0);
    cases[5] =
        tiny_case_make(dir, &seed, &tiny_shapes[0], 1, 4, (int64_t[]){90, 57, 20, 56}, 290, 9);
    ifkv_backend *backend = NULL;
    if (ifkv_backend_open("cpu", 1, 0, &backend) != IFKV_OK) return -1;
    joining = *backend->ops;
    joining.joins_riders = true;
    ifkv_backend_close(backend);
    return 0;
}

static int tear_down(void **state) {
    for (int i = 0; i < N_CASE; i++) tiny_case_fini(&cases[i]);
    return dir_teardown(state);
}

/* What each rank's session did; ranks are threads and write their own. */
static struct {
    double ms[IFKV_N_STAGE];
    int64_t bytes[IFKV_N_STAGE], score_plan, prompt_plan;
    bool rides[IFKV_N_STAGE];
} seen[MAX_SIZE];

/* Section 1.4 with parts in float64: outputs and lse of every rank's part in the layers before the
 * last one, there the lse alone; then a score of every row. */
static int64_t score_plan(const ifkv_session *session) {
    const ifkv_config *config = &session->engine->model.config;
    if (!session->scores) return 0;
    const ifkv_select_input *input = &session->selector->input;
    const int64_t last = input->score_layer[input->n_score_layer - 1], n_head = config->n_head;
    const int64_t part = last * n_head * (config->d_head + 1) + n_head;
    return (session->engine->comm->size - 1) * session->n_question * part * 8 +
           (session->n_context - session->n_kept) * 4;
}

static ifkv_status look(ifkv_session *session) {
    const int rank = session->engine->comm->rank;
    const ifkv_exchange *prompt = session->prompt_exchange;
    const ifkv_exchange_bytes plan = prompt->ops->bytes(prompt);
    memcpy(seen[rank].ms, session->ms, sizeof session->ms);
    memcpy(seen[rank].bytes, session->bytes, sizeof session->bytes);
    memcpy(seen[rank].rides, session->rides, sizeof session->rides);
    seen[rank].score_plan = score_plan(session);
    seen[rank].prompt_plan = session->cache.n_layer * (plan.store + plan.attend);
    return IFKV_OK;
}

static tiny_run run_of(const tiny_case *it, ifkv_prefill_options options) {
    options.max_new = 3;
    tiny_run run = tiny_run_of(it, options);
    run.after = look;
    return run;
}

static tiny_run prefill(const tiny_case *it, int size, ifkv_prefill_options options) {
    tiny_run run = run_of(it, options);
    assert_ok(tiny_run_on(size, &run));
    return run;
}

static bool has_prompt_riding(const tiny_run *run) {
    return run->n_selected > 0;
}

static void i17_riding_changes_no_bit(void **state) {
    (void)state;
    for (int c = 0; c < N_CASE; c++)
        for (int s = 0; s < N_SIZE; s++)
            for (int e = 0; e < N_EXCHANGE; e++) {
                ifkv_prefill_options options = {.ratio = "0.4",
                                                .exchange = exchanges[e],
                                                .score_layers = score_layers[(c + s) % N_LAYERS],
                                                .ride = "none"};
                tiny_run apart = prefill(&cases[c], sizes[s], options);
                assert_false(seen[0].rides[IFKV_STAGE_SCORE] || seen[0].rides[IFKV_STAGE_PROMPT]);
                static const char *const rides[] = {NULL, "score", "prompt"};
                for (int r = 0; r < (e == (c + s) % N_EXCHANGE ? 3 : 1); r++) {
                    options.ride = rides[r];
                    tiny_run run = prefill(&cases[c], sizes[s], options);
                    assert_int_equal(seen[0].rides[IFKV_STAGE_SCORE], r != 2);
                    assert_int_equal(seen[0].rides[IFKV_STAGE_PROMPT],
                                     r != 1 && has_prompt_riding(&apart));
                    tiny_assert_same(&run, &apart, true);
                    tiny_run_fini(&run);
                }
                tiny_run_fini(&apart);
            }
}

/* The time of what rode is 0; bytes stay where they are counted apart, which is what section 1.4
 * and the prompt's exchange say. */
static void riding_moves_time_and_no_bytes(void **state) {
    (void)state;
    for (int c = 0; c < N_CASE; c++)
        for (int s = 0; s < N_SIZE; s++) {
            int64_t bytes[MAX_SIZE][IFKV_N_STAGE];
            ifkv_prefill_options options = {.ratio = "0.4",
                                            .exchange = exchanges[c % N_EXCHANGE],
                                            .score_layers = score_layers[(c + s) % N_LAYERS],
                                            .ride = "none"};
            tiny_run apart = prefill(&cases[c], sizes[s], options);
            for (int r = 0; r < sizes[s]; r++) {
                memcpy(bytes[r], seen[r].bytes, sizeof bytes[r]);
                assert_in_range(bytes[r][IFKV_STAGE_SCORE] - seen[r].score_plan, 0, CONTROL_BYTES);
            }
            options.ride = "both";
            tiny_run run = prefill(&cases[c], sizes[s], options);
            const bool has_prompt = has_prompt_riding(&run);
            for (int r = 0; r < sizes[s]; r++) {
                assert_true(seen[r].ms[IFKV_STAGE_SCORE] == 0 && seen[r].ms[IFKV_STAGE_ENCODE] > 0);
                assert_int_equal(seen[r].ms[IFKV_STAGE_PROMPT] == 0, has_prompt);
                assert_memory_equal(seen[r].bytes, bytes[r], sizeof bytes[r]);
                assert_in_range(bytes[r][IFKV_STAGE_PROMPT] - seen[r].prompt_plan, 0,
                                CONTROL_BYTES);
            }
            tiny_run_fini(&run);
            tiny_run_fini(&apart);
        }
}

static ifkv_status join_riders(ifkv_engine *engine) {
    engine->backend->ops = &joining;
    return IFKV_OK;
}

/* Riders share the row blocks of what carries them. */
static ifkv_status look_for_joined(ifkv_session *session) {
    const ifkv_pass *encode = &session->encode, *recompute = &session->recompute;
    int64_t n_block = 0;
    for (int64_t i = 0; i < session->n_encode_group; i++)
        n_block += session->encode_begin[i + 1] > session->encode_begin[i];
    const bool is_score_joined = !session->rides[IFKV_STAGE_SCORE] ||
                                 (encode->n_block == n_block &&
                                  n_block == (session->n_chunk > 0 ? session->n_chunk : 1)),
               is_prompt_joined = !session->rides[IFKV_STAGE_PROMPT] || recompute->n_block <= 1;
    IFKV_TRY(look(session));
    return agree_true(session->engine->comm, is_score_joined && is_prompt_joined);
}

static tiny_run prefill_joined(const tiny_case *it, int size, ifkv_prefill_options options) {
    tiny_run run = run_of(it, options);
    run.before = join_riders;
    run.after = look_for_joined;
    assert_ok(tiny_run_on(size, &run));
    return run;
}

/* Both forms round anew at most where the shape of a product differs: the tolerance of any other
 * route to the same number (algorithm section 8). */
static void i17_scoring_rows_that_join_products_score_the_same(void **state) {
    (void)state;
    for (int c = 0; c < N_CASE; c++)
        for (int s = 0; s < N_SIZE; s++) {
            ifkv_prefill_options options = {
                .ratio = "0", .score_layers = score_layers[(c + s) % N_LAYERS], .ride = "none"};
            tiny_run apart = prefill(&cases[c], sizes[s], options);
            options.ride = "score";
            tiny_run run = prefill_joined(&cases[c], sizes[s], options);
            assert_within(tiny_error(run.scores, apart.scores, apart.n_context), TINY_TOLERANCE);
            assert_within(tiny_rows_error(&run, &apart, 0, apart.n_context), TINY_TOLERANCE);
            tiny_run_fini(&run);
            tiny_run_fini(&apart);
        }
}

static void i17_prompt_rows_that_join_products_give_the_same_logits(void **state) {
    (void)state;
    for (int c = 0; c < N_CASE; c++)
        for (int s = 0; s < N_SIZE; s++) {
            const tiny_case *it = &cases[c];
            int64_t n = 0, *selected = tiny_case_rows(it, &seed, 3, &n);
            ifkv_prefill_options options = {.exchange = exchanges[(c + s) % N_EXCHANGE],
                                            .selected = selected,
                                            .n_selected = n,
                                            .ride = "none"};
            tiny_run apart = prefill(it, sizes[s], options);
            options.ride = "prompt";
            tiny_run run = prefill_joined(it, sizes[s], options);
            assert_int_equal(seen[0].rides[IFKV_STAGE_PROMPT], n > 0);
            assert_within(tiny_error(run.logits, apart.logits, apart.n_vocab), TINY_TOLERANCE);
            assert_within(tiny_rows_error(&run, &apart, 0, apart.n_context), TINY_TOLERANCE);
            tiny_run_fini(&run);
            tiny_run_fini(&apart);
            free(selected);
        }
}

static void rows_ride_only_where_they_can(void **state) {
    (void)state;
    static const int64_t selected[] = {30, 60};
    static const struct {
        ifkv_prefill_options options;
        bool score, prompt;
    } wanted[] = {
        {{.method = "infoflow"}, true, true},
        {{.ride = "both"}, true, true},
        {{.ride = "score"}, true, false},
        {{.ride = "prompt"}, false, true},
        {{.ride = "none"}, false, false},
        {{.geometry = "hl-tp"}, false, true},
        {{.method = "cacheblend"}, false, true},
        {{.method = "random"}, false, true},
        {{.selected = selected, .n_selected = 2}, false, true},
        {{.ratio = "0"}, true, false}, /* scores are asked for */
        {{.method = "none"}, false, false},
        {{.method = "full"}, false, false},
        {{.method = "ring"}, false, false},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        tiny_run run = prefill(&cases[0], 2, wanted[i].options);
        for (int r = 0; r < 2; r++) {
            assert_int_equal(seen[r].rides[IFKV_STAGE_SCORE], wanted[i].score);
            assert_int_equal(seen[r].rides[IFKV_STAGE_PROMPT], wanted[i].prompt);
        }
        tiny_run_fini(&run);
    }
}

int main(void) {
    seed = tiny_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(i17_riding_changes_no_bit),
        cmocka_unit_test(i17_scoring_rows_that_join_products_score_the_same),
        cmocka_unit_test(i17_prompt_rows_that_join_products_give_the_same_logits),
        cmocka_unit_test(riding_moves_time_and_no_bytes),
        cmocka_unit_test(rows_ride_only_where_they_can),
    };
    return cmocka_run_group_tests_name("ride", tests, set_up, tear_down);
}
