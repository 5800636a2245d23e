/* Documents that change places (I20): the order, its ties, what is refused, and that a reordered
 * run is the run of the permuted chunk list.
 *
 * One process, random weights, ranks as threads.  Values against the float64 reference, over MPI
 * too: test_selectors.py. */
#include "tiny.h"

#include "comm.h"
#include "engine.h"
#include "error_codes.h"
#include "model_files.h"
#include "reorder.h"
#include "session.h"

static const int sizes[] = {1, 2, 3, 5, 8};
enum { N_SIZE = sizeof sizes / sizeof *sizes, N_CASE = 4, MAX_CHUNK = 16, PLAIN = 1 };

typedef struct reorder_case {
    char *model;
    uint64_t weight_seed;
    tiny_request request, permuted; /* by the order that a run of the first found */
    int64_t order[MAX_CHUNK];
} reorder_case;

static uint64_t seed;
static char *dir;
static reorder_case cases[N_CASE];

/* The order of the last run, of rank 0. */
static int64_t seen_order[MAX_CHUNK];

static ifkv_status see_order(ifkv_session *session) {
    const ifkv_reorder *reorder = &session->reorder;
    if (session->engine->comm->rank == 0 && reorder->order)
        memcpy(seen_order, reorder->order, (size_t)reorder->n_document * sizeof *seen_order);
    return IFKV_OK;
}

static tiny_run prefill(const reorder_case *it, const tiny_request *request, int size,
                        ifkv_prefill_options options) {
    tiny_run run = {.model = it->model,
                    .weight_seed = it->weight_seed,
                    .request = &request->request,
                    .options = options,
                    .after = see_order};
    run.options.ratio = options.ratio ? options.ratio : "0.3";
    run.options.score_layers = "wide";
    run.options.max_new = 3;
    assert_ok(tiny_run_on(size, &run));
    return run;
}

static const ifkv_prefill_options reordered = {.reorder = "on"};

/* Documents are encoded as they are with reorder. */
static const ifkv_prefill_options stored = {.store = &tiny_empty_store};

static bool is_identity(const int64_t *order, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (order[i] != i) return false;
    return true;
}

/* Draws requests until the documents move. */
static reorder_case make_case(int shape, int64_t n_prefix, int64_t n_chunk, const int64_t *length,
                              int64_t n_prompt, int64_t n_question) {
    reorder_case made = {.model = tiny_model(dir, &tiny_shapes[shape], -1)};
    made.weight_seed = (uint64_t)tiny_below(&seed, 1 << 30);
    for (int draw = 0; draw < 50; draw++) {
        made.request = tiny_request_make(&seed, tiny_shapes[shape].n_vocab, n_prefix, n_chunk,
                                         length, n_prompt, n_question);
        tiny_run run = prefill(&made, &made.request, 1, reordered);
        tiny_run_fini(&run);
        memcpy(made.order, seen_order, sizeof made.order);
        made.permuted = tiny_request_permute(&made.request, made.order);
        if (!is_identity(made.order, n_chunk)) return made;
        tiny_request_fini(&made.request);
        tiny_request_fini(&made.permuted);
    }
    fail_msg("no draw moves the documents");
    return made;
}

static int make_cases(void **state) {
    if (dir_setup(state)) return -1;
    dir = *state;
    cases[0] = make_case(0, 3, 6, (int64_t[]){17, 1, 90, 5, 64, 9}, 7, 4);
    cases[PLAIN] = make_case(1, 0, 3, (int64_t[]){20, 1, 31}, 1, 3);
    cases[2] = make_case(2, 2, 5, (int64_t[]){8, 30, 2, 19, 40}, 5, 0);
    cases[3] = make_case(3, 1, 4, (int64_t[]){12, 33, 3, 7}, 4, 2);
    return 0;
}

static int free_cases(void **state) {
    for (int i = 0; i < N_CASE; i++) {
        free(cases[i].model);
        tiny_request_fini(&cases[i].request);
        tiny_request_fini(&cases[i].permuted);
    }
    return dir_teardown(state);
}

static void assert_same_bits(const tiny_run *got, const tiny_run *want) {
    assert_true(tiny_same_rows(got, want));
    assert_memory_equal(got->scores, want->scores, (size_t)want->n_context * sizeof *want->scores);
    assert_memory_equal(got->logits, want->logits, (size_t)want->n_vocab * sizeof *want->logits);
    assert_true(got->selected_digest == want->selected_digest);
    assert_int_equal(got->n_answer, want->n_answer);
    assert_memory_equal(got->answer, want->answer, (size_t)want->n_answer * sizeof *want->answer);
}

static void assert_equal(const tiny_run *got, const tiny_run *want) {
    assert_within(tiny_rows_error(got, want, 0, want->n_context), TINY_TOLERANCE);
    assert_within(tiny_error(got->scores, want->scores, want->n_context), TINY_TOLERANCE);
    assert_within(tiny_error(got->logits, want->logits, want->n_vocab), TINY_TOLERANCE);
    assert_true(got->selected_digest == want->selected_digest);
}

static void order_is_ascending_in_exact_ratios(void **state) {
    (void)state;
    /* the last two quotients are one and the same double */
    const int64_t big = INT32_MAX;
    const int64_t chosen[] = {1, 333333333, 0, 2, 0, big - 1, big - 2},
                  length[] = {3, 1000000000, 9, 6, 1, big, big - 1};
    assert_true((double)(big - 1) / (double)big == (double)(big - 2) / (double)(big - 1));
    static const int64_t want[] = {2, 4, 1, 0, 3, 6, 5};
    int64_t order[7];
    assert_ok(ifkv_reorder_sort(7, chosen, length, order));
    assert_memory_equal(order, want, sizeof want);
}

/* The permuted list is in order already: ratios do not depend on places, and equal ones keep
 * theirs. */
static void i20_identity_order_is_no_reorder(void **state) {
    (void)state;
    for (int c = 0; c < N_CASE; c++)
        for (int s = 0; s < N_SIZE; s++) {
            tiny_run run = prefill(&cases[c], &cases[c].permuted, sizes[s], reordered);
            assert_true(is_identity(seen_order, cases[c].request.request.n_chunk));
            tiny_run want = prefill(&cases[c], &cases[c].permuted, sizes[s], stored);
            if (c == PLAIN) /* a prefix is a part of its own in the sums of scores */
                assert_same_bits(&run, &want);
            else
                assert_equal(&run, &want);
            tiny_run without =
                prefill(&cases[c], &cases[c].permuted, sizes[s], (ifkv_prefill_options){0});
            assert_equal(&run, &without);
            tiny_run_fini(&without);
            tiny_run_fini(&run);
            tiny_run_fini(&want);
        }
}

static void i20_reorder_is_the_run_of_the_permuted_list(void **state) {
    (void)state;
    for (int c = 0; c < N_CASE; c++)
        for (int s = 0; s < N_SIZE; s++)
            for (int e = 0; e < 2; e++) {
                ifkv_prefill_options options = reordered;
                options.exchange = e ? "query" : "delta";
                tiny_run run = prefill(&cases[c], &cases[c].request, sizes[s], options);
                assert_memory_equal(seen_order, cases[c].order,
                                    (size_t)cases[c].request.request.n_chunk * sizeof *seen_order);
                tiny_run same = prefill(&cases[c], &cases[c].permuted, sizes[s], options);
                tiny_run want = prefill(&cases[c], &cases[c].permuted, sizes[s], stored);
                if (sizes[s] == 1) /* on more the documents lie on other ranks */
                    assert_same_bits(&run, &same);
                assert_equal(&run, &same);
                assert_equal(&run, &want);
                tiny_run_fini(&run);
                tiny_run_fini(&same);
                tiny_run_fini(&want);
            }
}

static void i20_inexact_exchanges_on_one_rank_change_no_bit(void **state) {
    (void)state;
    static const char *const names[] = {"kv", "local"};
    for (int c = 0; c < N_CASE; c++) {
        tiny_run want = prefill(&cases[c], &cases[c].request, 1, reordered);
        for (int e = 0; e < 2; e++) {
            ifkv_prefill_options options = reordered;
            options.exchange = names[e];
            tiny_run run = prefill(&cases[c], &cases[c].request, 1, options);
            assert_same_bits(&run, &want);
            tiny_run_fini(&run);
            run = prefill(&cases[c], &cases[c].request, 3, options); /* runs, and moves likewise */
            assert_memory_equal(seen_order, cases[c].order,
                                (size_t)cases[c].request.request.n_chunk * sizeof *seen_order);
            assert_within(tiny_error(run.scores, want.scores, want.n_context), TINY_TOLERANCE);
            tiny_run_fini(&run);
        }
        tiny_run_fini(&want);
    }
}

static void i04_the_new_first_document_equals_full_prefill(void **state) {
    (void)state;
    for (int c = 0; c < N_CASE; c++) {
        tiny_run run = prefill(&cases[c], &cases[c].request, 2, reordered);
        tiny_run full =
            prefill(&cases[c], &cases[c].permuted, 1, (ifkv_prefill_options){.method = "full"});
        const int64_t end = tiny_request_end(&cases[c].permuted, 0);
        assert_within(tiny_rows_error(&run, &full, 0, end), TINY_TOLERANCE);
        assert_true(run.n_selected > 0 && run.selected[0] >= end);
        tiny_run_fini(&run);
        tiny_run_fini(&full);
    }
}

/* The prompt rides with as many rows as there turn out to be; scoring cannot ride. */
static void i17_riding_changes_no_bit(void **state) {
    (void)state;
    for (int c = 0; c < N_CASE; c++)
        for (int s = 0; s < N_SIZE; s++) {
            ifkv_prefill_options apart = reordered;
            apart.ride = "none";
            tiny_run run = prefill(&cases[c], &cases[c].request, sizes[s], reordered),
                     want = prefill(&cases[c], &cases[c].request, sizes[s], apart);
            assert_same_bits(&run, &want);
            tiny_run_fini(&run);
            tiny_run_fini(&want);
        }
}

/* Nothing to go by: no score, or one document. */
static void nothing_moves_without_a_selection(void **state) {
    (void)state;
    ifkv_prefill_options options = reordered;
    options.ratio = "0";
    for (int c = 0; c < N_CASE; c++) {
        tiny_run run = prefill(&cases[c], &cases[c].request, 2, options);
        assert_true(is_identity(seen_order, cases[c].request.request.n_chunk));
        tiny_run none =
            prefill(&cases[c], &cases[c].request, 2,
                    (ifkv_prefill_options){.method = "none", .store = &tiny_empty_store});
        assert_true(tiny_same_rows(&run, &none));
        tiny_run_fini(&run);
        tiny_run_fini(&none);
    }
    tiny_request one =
        tiny_request_make(&seed, tiny_shapes[0].n_vocab, 2, 1, (int64_t[]){23}, 2, 2);
    tiny_run run = prefill(&cases[0], &one, 2, reordered);
    assert_int_equal(run.n_selected, 0);
    tiny_run_fini(&run);
    tiny_request_fini(&one);
}

/* The bound is the first document's: the longer it is, the fewer rows are left. */
static void budget_follows_the_document_that_comes_first(void **state) {
    (void)state;
    ifkv_prefill_options options = reordered;
    options.ratio = "0.97";
    for (int c = 0; c < N_CASE; c++)
        for (int size = 1; size <= 3; size += 2) {
            tiny_run run = prefill(&cases[c], &cases[c].request, size, options);
            const tiny_request *request = &cases[c].request;
            const int64_t first = request->offset[seen_order[0] + 1] -
                                  request->offset[seen_order[0]] + request->request.n_prefix;
            const int64_t share = 97 * run.n_context / 100, left = run.n_context - first;
            assert_int_equal(run.n_selected, share < left ? share : left);
            tiny_run_fini(&run);
        }
}

static void what_it_cannot_order_is_refused(void **state) {
    (void)state;
    static const int64_t some[] = {40};
    static const ifkv_prefill_options bad[] = {
        {.reorder = "yes"},
        {.reorder = "on", .method = "random"},
        {.reorder = "force", .method = "cacheblend"},
        {.reorder = "on", .method = "full"},
        {.reorder = "on", .geometry = "tl-tp"},
        {.reorder = "on", .chunk = 20},
        {.reorder = "on", .selected = some, .n_selected = 1},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        ifkv_prefill_options options = bad[i];
        options.size = sizeof options;
        assert_int_equal(ifkv_prefill_options_check(&options), IFKV_ERR_USAGE);
        assert_non_null(strstr(ifkv_last_error()->text, "reorder: "));
    }
    ifkv_prefill_options forced = {.size = sizeof forced, .reorder = "force", .chunk = 20};
    assert_ok(ifkv_prefill_options_check(&forced));
    tiny_run run = prefill(&cases[0], &cases[0].request, 2, forced);
    tiny_run_fini(&run);
}

int main(void) {
    seed = tiny_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(order_is_ascending_in_exact_ratios),
        cmocka_unit_test(i20_identity_order_is_no_reorder),
        cmocka_unit_test(i20_reorder_is_the_run_of_the_permuted_list),
        cmocka_unit_test(i20_inexact_exchanges_on_one_rank_change_no_bit),
        cmocka_unit_test(i04_the_new_first_document_equals_full_prefill),
        cmocka_unit_test(i17_riding_changes_no_bit),
        cmocka_unit_test(nothing_moves_without_a_selection),
        cmocka_unit_test(budget_follows_the_document_that_comes_first),
        cmocka_unit_test(what_it_cannot_order_is_refused),
    };
    return cmocka_run_group_tests_name("reorder", tests, make_cases, free_cases);
}
