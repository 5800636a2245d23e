/* Prefill with a chunk store (I6, I26), the store being a list in memory: what is found in it
 * changes no bit, whatever it gives.  Ranks are threads and share the store. */
#include "tiny.h"

#include "memory_store.h"
#include "model_files.h"
#include "status.h"

static const int sizes[] = {1, 2, 3, 5};
enum { N_SIZE = sizeof sizes / sizeof *sizes };

static memory_store memory;
static const ifkv_store *const store = &memory.table;
static uint64_t seed;
static char *dir, *model;
static tiny_request request;
static const tiny_shape *shape = &tiny_shapes[3]; /* per-head norm, three query heads a K/V head */
enum { N_PREFIX = 2, N_CHUNK = 5 };

static int set_up(void **state) {
    if (dir_setup(state) || !memory_store_init(&memory)) return -1;
    dir = *state;
    model = tiny_model(dir, shape, -1);
    request = tiny_request_make(&seed, shape->n_vocab, N_PREFIX, N_CHUNK,
                                (int64_t[]){17, 1, 40, 5, 33}, 4, 3);
    return 0;
}

static int tear_down(void **state) {
    memory_store_fini(&memory);
    tiny_request_fini(&request);
    free(model);
    return dir_teardown(state);
}

static tiny_run prefill(int size, const ifkv_store *with, const char *method, uint64_t weights) {
    tiny_run run = {.model = model,
                    .weight_seed = weights,
                    .request = &request.request,
                    .options = {.method = method, .ratio = "0.3", .max_new = 4, .store = with}};
    assert_ok(tiny_run_on(size, &run));
    return run;
}

static void i26_cold_warm_and_mixed_are_the_same_bits(void **state) {
    (void)state;
    tiny_run first = {0};
    for (int s = 0; s < N_SIZE; s++) {
        memory_store_empty(&memory);
        tiny_run cold = prefill(sizes[s], store, "infoflow", 7);
        assert_int_equal(memory.n_entry, N_CHUNK + 1);
        tiny_run warm = prefill(sizes[s], store, "infoflow", 7);
        assert_int_equal(memory.n_load, N_CHUNK + 1);
        memory.is_forgetful = true;
        tiny_run mixed = prefill(sizes[s], store, "infoflow", 7);
        memory.is_forgetful = false;
        assert_int_equal(memory.n_load, N_CHUNK + 1 + (N_CHUNK + 1) / 2);
        tiny_assert_same(&warm, &cold, true);
        tiny_assert_same(&mixed, &cold, true);
        if (s == 0) first = cold;
        if (s > 0) tiny_assert_same(&cold, &first, false);
        tiny_run_fini(&warm);
        tiny_run_fini(&mixed);
        if (s > 0) tiny_run_fini(&cold);
    }
    tiny_run_fini(&first);
}

static void i26_an_entry_of_other_ranks_is_the_same_bits(void **state) {
    (void)state;
    memory_store_empty(&memory);
    tiny_run cold = prefill(3, store, "none", 7);
    for (int s = 0; s < N_SIZE; s++) {
        tiny_run warm = prefill(sizes[s], store, "none", 7);
        assert_true(tiny_same_rows(&warm, &cold));
        tiny_run_fini(&warm);
    }
    assert_int_equal(memory.n_load, N_SIZE * (N_CHUNK + 1));
    tiny_run_fini(&cold);
}

static void i06_with_a_store_agrees_with_without(void **state) {
    (void)state;
    for (int s = 0; s < N_SIZE; s++) {
        memory_store_empty(&memory);
        tiny_run without = prefill(sizes[s], NULL, "none", 7);
        for (int warm = 0; warm < 2; warm++) {
            tiny_run with = prefill(sizes[s], store, "none", 7);
            assert_within(tiny_rows_error(&with, &without, 0, with.n_context), TINY_TOLERANCE);
            assert_within(tiny_error(with.logits, without.logits, with.n_vocab), TINY_TOLERANCE);
            tiny_run_fini(&with);
        }
        tiny_run_fini(&without);
    }
}

static void i26_what_a_damaged_entry_gave_is_written_over(void **state) {
    (void)state;
    memory_store_empty(&memory);
    tiny_run cold = prefill(2, store, "infoflow", 7);
    for (int n = 1; n <= shape->n_layer; n++) {
        memory.n_layer_given = n;
        tiny_run run = prefill(2, store, "infoflow", 7);
        tiny_assert_same(&run, &cold, true);
        tiny_run_fini(&run);
    }
    memory.n_layer_given = 0;
    assert_int_equal(memory.n_load, 0);
    tiny_run_fini(&cold);
}

static void i26_a_document_is_found_at_any_position(void **state) {
    (void)state;
    memory_store_empty(&memory);
    tiny_run cold = prefill(1, store, "none", 7);
    /* the same documents, last first: only the order differs */
    tiny_request turned = tiny_request_permute(&request, (int64_t[N_CHUNK]){4, 3, 2, 1, 0});
    tiny_run run[2];
    for (int warm = 0; warm < 2; warm++) {
        if (warm == 0) memory_store_empty(&memory);
        run[warm] = (tiny_run){.model = model,
                               .weight_seed = 7,
                               .request = &turned.request,
                               .options = {.method = "none", .store = store}};
        if (warm == 1) {
            memory_store_empty(&memory);
            tiny_run other = prefill(1, store, "none", 7);
            tiny_run_fini(&other);
        }
        assert_ok(tiny_run_on(2, &run[warm]));
    }
    assert_int_equal(memory.n_load, N_CHUNK + 1);
    assert_true(tiny_same_rows(&run[1], &run[0]));
    tiny_run_fini(&run[0]);
    tiny_run_fini(&run[1]);
    tiny_run_fini(&cold);
    tiny_request_fini(&turned);
}

static void i26_other_weights_and_prefixes_are_never_served(void **state) {
    (void)state;
    memory_store_empty(&memory);
    tiny_run one = prefill(2, store, "none", 7), two = prefill(2, store, "none", 8);
    const int32_t id = request.token[N_PREFIX - 1];
    request.token[N_PREFIX - 1] = (id + 1) % shape->n_vocab;
    tiny_run other_prefix = prefill(2, store, "none", 7);
    request.token[N_PREFIX - 1] = id;
    assert_int_equal(memory.n_load, 0);
    assert_int_equal(memory.n_entry, 3 * (N_CHUNK + 1));
    tiny_run_fini(&one);
    tiny_run_fini(&two);
    tiny_run_fini(&other_prefix);
}

static void rows_of_an_exact_prefill_are_never_kept(void **state) {
    (void)state;
    static const char *const exact[] = {"full", "ring", "allgather"};
    memory_store_empty(&memory);
    for (size_t i = 0; i < sizeof exact / sizeof *exact; i++) {
        tiny_run run = prefill(2, store, exact[i], 7);
        assert_int_equal(memory.n_entry, 0);
        tiny_run_fini(&run);
    }
}

static ifkv_status count_entries(ifkv_session *session) {
    ifkv_result result = {.size = sizeof result};
    IFKV_TRY(ifkv_session_result(session, &result));
    const int64_t n = memory.n_load ? N_CHUNK + 1 : 0;
    IFKV_REQUIRE(result.has_store && result.store_hits == n &&
                     result.store_hits + result.store_misses == N_CHUNK + 1 &&
                     result.store_tokens_hit == (n ? result.n_context : 0),
                 IFKV_ERR_UNEXPECTED, 0, "hits %lld, misses %lld, tokens %lld",
                 (long long)result.store_hits, (long long)result.store_misses,
                 (long long)result.store_tokens_hit);
    return IFKV_OK;
}

static void counts_are_summed_over_ranks(void **state) {
    (void)state;
    memory_store_empty(&memory);
    for (int warm = 0; warm < 2; warm++) {
        tiny_run run = {.model = model,
                        .request = &request.request,
                        .options = {.method = "none", .store = store},
                        .after = count_entries};
        assert_ok(tiny_run_on(3, &run));
        tiny_run_fini(&run);
    }
}

/* The first look and the move come between the entries and their rotation. */
static void i20_reorder_with_a_store_is_the_same_bits(void **state) {
    (void)state;
    for (int s = 0; s < N_SIZE; s++) {
        memory_store_empty(&memory);
        tiny_run run[3];
        for (int i = 0; i < 3; i++) { /* without, cold, warm */
            run[i] = (tiny_run){
                .model = model,
                .weight_seed = 7,
                .request = &request.request,
                .options = {
                    .reorder = "on", .ratio = "0.3", .max_new = 4, .store = i ? store : NULL}};
            assert_ok(tiny_run_on(sizes[s], &run[i]));
            if (i) tiny_assert_same(&run[i], &run[0], true);
        }
        assert_int_equal(memory.n_save, N_CHUNK + 1);
        assert_int_equal(memory.n_load, N_CHUNK + 1);
        for (int i = 0; i < 3; i++) tiny_run_fini(&run[i]);
    }
}

static void auto_counts_what_the_store_holds(void **state) {
    (void)state;
    for (int s = 0; s < N_SIZE; s++) {
        memory_store_empty(&memory);
        for (int warm = 0; warm < 2; warm++) {
            tiny_run run = {.model = model,
                            .weight_seed = 7,
                            .request = &request.request,
                            .options = {.method = "auto", .ratio = "0.1", .store = store},
                            .before = tiny_slow_products};
            assert_ok(tiny_run_on(sizes[s], &run));
            assert_int_equal(run.n_selected > 0, warm); /* an exact method selects nothing */
            tiny_run_fini(&run);
            tiny_run fill = prefill(sizes[s], store, "none", 7);
            tiny_run_fini(&fill);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(i26_cold_warm_and_mixed_are_the_same_bits),
        cmocka_unit_test(i26_an_entry_of_other_ranks_is_the_same_bits),
        cmocka_unit_test(i06_with_a_store_agrees_with_without),
        cmocka_unit_test(i26_what_a_damaged_entry_gave_is_written_over),
        cmocka_unit_test(i26_a_document_is_found_at_any_position),
        cmocka_unit_test(i26_other_weights_and_prefixes_are_never_served),
        cmocka_unit_test(rows_of_an_exact_prefill_are_never_kept),
        cmocka_unit_test(counts_are_summed_over_ranks),
        cmocka_unit_test(i20_reorder_with_a_store_is_the_same_bits),
        cmocka_unit_test(auto_counts_what_the_store_holds),
    };
    seed = tiny_seed();
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
