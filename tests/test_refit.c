/* Rows that follow the recomputed ones: the invariants of the pipeline that refit must keep
 * (algorithm section 8: I2, I3, I4, I10, I11, I12).
 *
 * The operation is test_backend_refit's business, that a whole prefill with refit equals float64
 * test_selectors.py's, and a device's test_device's. */
#include "tiny.h"

#include "error_codes.h"
#include "model_files.h"

enum { N_CHUNK = 5, N_SIZE = 4 };
static const int sizes[N_SIZE] = {1, 2, 3, 7};
static uint64_t seed;
static char *dir, *model;
static tiny_request request;

static int setup(void **state) {
    if (dir_setup(state)) return -1;
    dir = *state;
    model = tiny_model(dir, &tiny_shapes[0], -1);
    request = tiny_request_make(&seed, tiny_shapes[0].n_vocab, 3, N_CHUNK,
                                (int64_t[]){40, 1, 90, 66, 23}, 6, 4);
    return 0;
}

static int teardown(void **state) {
    free(model);
    tiny_request_fini(&request);
    return dir_teardown(state);
}

static tiny_run run_of(ifkv_prefill_options options) {
    return (tiny_run){
        .model = model, .weight_seed = seed, .request = &request.request, .options = options};
}

static tiny_run prefill(int size, ifkv_prefill_options options) {
    tiny_run run = run_of(options);
    assert_ok(tiny_run_on(size, &run));
    return run;
}

static void i02_all_equals_full_prefill(void **state) {
    (void)state;
    tiny_run full = prefill(1, (ifkv_prefill_options){.method = "full"});
    for (int s = 0; s < N_SIZE; s++) {
        tiny_run all = prefill(sizes[s], (ifkv_prefill_options){.method = "all", .refit = true});
        assert_within(tiny_rows_error(&all, &full, 0, full.n_context), TINY_TOLERANCE);
        assert_within(tiny_error(all.logits, full.logits, full.n_vocab), TINY_TOLERANCE);
        tiny_run_fini(&all);
    }
    tiny_run_fini(&full);
}

static void i03_empty_selection_leaves_the_cache_unchanged(void **state) {
    (void)state;
    for (int s = 0; s < N_SIZE; s++) {
        tiny_run none = prefill(sizes[s], (ifkv_prefill_options){.method = "none"});
        tiny_run run = prefill(sizes[s], (ifkv_prefill_options){.ratio = "0", .refit = true});
        assert_true(tiny_same_rows(&run, &none));
        tiny_run_fini(&run);
        tiny_run_fini(&none);
    }
}

/* Rows of chunks 0 .. m see fresh rows only; those behind are moved. */
static void i04_i10_first_chunks_equal_full_prefill_and_the_rest_moves(void **state) {
    (void)state;
    const int64_t first = tiny_request_end(&request, 0);
    int64_t *selected = malloc((size_t)request.n_context * sizeof *selected);
    for (int64_t i = first; i < request.n_context; i++) selected[i - first] = i;
    tiny_run full = prefill(1, (ifkv_prefill_options){.method = "full"});
    for (int s = 0; s < N_SIZE; s++)
        for (int64_t m = 1; m + 1 < N_CHUNK; m++) {
            const int64_t end = tiny_request_end(&request, m);
            ifkv_prefill_options options = {.selected = selected, .n_selected = end - first};
            tiny_run plain = prefill(sizes[s], options);
            options.refit = true;
            tiny_run run = prefill(sizes[s], options);
            assert_within(tiny_rows_error(&run, &full, 0, end), TINY_TOLERANCE);
            assert_true(tiny_rows_error(&run, &plain, end, run.n_context) > 1e-3);
            tiny_run_fini(&run);
            tiny_run_fini(&plain);
        }
    tiny_run_fini(&full);
    free(selected);
}

static void i11_no_bit_depends_on_the_number_of_threads(void **state) {
    (void)state;
    const ifkv_prefill_options options = {.ratio = "0.25", .refit = true};
    for (int size = 1; size <= 2; size++) {
        tiny_run one = prefill(size, options), three = run_of(options);
        three.n_thread = 3;
        assert_ok(tiny_run_on(size, &three));
        assert_true(tiny_same_rows(&three, &one));
        assert_memory_equal(three.logits, one.logits, (size_t)one.n_vocab * sizeof *one.logits);
        tiny_run_fini(&three);
        tiny_run_fini(&one);
    }
}

static void i12_rows_and_logits_ignore_the_number_of_ranks(void **state) {
    (void)state;
    static const char *const ratios[] = {"0.001", "0.1", "0.5"};
    for (int r = 0; r < 3; r++) {
        const ifkv_prefill_options options = {.ratio = ratios[r], .refit = true};
        tiny_run one = prefill(0, options);
        for (int s = 0; s < N_SIZE; s++) {
            tiny_run run = prefill(sizes[s], options);
            assert_true(run.selected_digest == one.selected_digest);
            assert_within(tiny_rows_error(&run, &one, 0, one.n_context), TINY_TOLERANCE);
            assert_within(tiny_error(run.logits, one.logits, one.n_vocab), TINY_TOLERANCE);
            tiny_run_fini(&run);
        }
        tiny_run_fini(&one);
    }
}

static void exchanges_without_the_whole_context_are_refused(void **state) {
    (void)state;
    static const char *const names[] = {"query", "kv", "local"};
    for (int e = 0; e < 3; e++) {
        const ifkv_prefill_options options = {.exchange = names[e], .refit = true};
        tiny_run several = run_of(options), one = prefill(1, options);
        assert_fails(tiny_run_on(2, &several), IFKV_ERR_USAGE, IFKV_E_VALUE, "expected delta");
        tiny_run_fini(&several);
        tiny_run_fini(&one);
    }
}

int main(void) {
    seed = tiny_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(i02_all_equals_full_prefill),
        cmocka_unit_test(i03_empty_selection_leaves_the_cache_unchanged),
        cmocka_unit_test(i04_i10_first_chunks_equal_full_prefill_and_the_rest_moves),
        cmocka_unit_test(i11_no_bit_depends_on_the_number_of_threads),
        cmocka_unit_test(i12_rows_and_logits_ignore_the_number_of_ranks),
        cmocka_unit_test(exchanges_without_the_whole_context_are_refused),
    };
    return cmocka_run_group_tests_name("refit", tests, setup, teardown);
}
