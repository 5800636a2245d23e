/* The exact methods on several ranks, `ring` and `allgather`, against full prefill on one (I15),
 * and what they move (I25).
 *
 * Their exchange alone is test_exchange's business. */
#include "pipeline.h"

#include "agree.h"
#include "comm.h"
#include "engine.h"
#include "error_codes.h"
#include "prefill.h"

static const char *const rivals[] = {"ring", "allgather"};
enum { N_RIVAL = sizeof rivals / sizeof *rivals };

/* K/V, logits and answer of both exact methods on these ranks against full prefill on one. */
static void assert_exact(const tiny_case *it, const int *n_rank, int n) {
    tiny_run full = tiny_prefill(it, 0, (ifkv_prefill_options){.method = "full", .max_new = 5});
    const int64_t n_clear = check_answer(it, "full", &full);
    for (int i = 0; i < n; i++)
        for (int m = 0; m < N_RIVAL; m++) {
            tiny_run run = tiny_prefill(it, n_rank[i],
                                        (ifkv_prefill_options){.method = rivals[m], .max_new = 5});
            assert_int_equal(run.n_selected, 0);
            assert_int_equal(run.n_answer, full.n_answer);
            assert_equals_full(&run, &full, full.n_context);
            assert_memory_equal(run.answer, full.answer, (size_t)n_clear * sizeof *full.answer);
            tiny_run_fini(&run);
        }
    tiny_run_fini(&full);
}

static const int exact_sizes[] = {1, 2, 3, 4, 5, 8};
enum { N_EXACT_SIZE = sizeof exact_sizes / sizeof *exact_sizes };

static void i15_exact_methods_equal_full_prefill(void **state) {
    (void)state;
    for (int c = 0; c < N_CASE; c++) assert_exact(&cases[c], exact_sizes, N_EXACT_SIZE);
}

/* One token, fewer rows than ranks, fewer than slices; with and without a prefix. */
static void i15_exact_methods_take_empty_shards(void **state) {
    (void)state;
    tiny_case few[] = {
        tiny_case_make(dir, &seed, &tiny_shapes[0], 0, 1, (int64_t[]){1}, 1, 0),
        tiny_case_make(dir, &seed, &tiny_shapes[2], 2, 1, (int64_t[]){1}, 3, 0),
        tiny_case_make(dir, &seed, &tiny_shapes[1], 0, 2, (int64_t[]){4, 1}, 2, 1),
        tiny_case_make(dir, &seed, &tiny_shapes[3], 1, 3, (int64_t[]){2, 5, 1}, 1, 2),
    };
    for (size_t i = 0; i < sizeof few / sizeof *few; i++) {
        assert_exact(&few[i], exact_sizes, N_EXACT_SIZE);
        tiny_case_fini(&few[i]);
    }
}

static void i15_exact_methods_equal_full_prefill_in_tiles_and_tail_blocks(void **state) {
    (void)state;
    assert_exact(&large, exact_sizes + 1, 2);
}

/* Every case, on every number of ranks, by every method. */
static void hold_after_all(tiny_session_fn claim) {
    for (int c = 0; c < N_CASE; c++)
        for (int s = 0; s < N_EXACT_SIZE; s++)
            for (int m = 0; m < N_RIVAL; m++) {
                tiny_run run = tiny_run_of(&cases[c], (ifkv_prefill_options){.method = rivals[m]});
                run.after = claim;
                assert_ok(tiny_run_on(exact_sizes[s], &run));
                tiny_run_fini(&run);
            }
}

/* Sessions that were opened on the ranks of a run: what encode received is what the plan says,
 * which with equal slices is (P - 1) / P of the context's K/V in every layer but the last. */
static ifkv_status received_the_plan(ifkv_session *session) {
    const ifkv_config *config = &session->engine->model.config;
    ifkv_comm *comm = session->engine->comm;
    const int64_t row = 8 * (int64_t)config->n_kv_head * config->d_head, n = session->n_context,
                  n_layer = config->n_layer, size = comm->size;
    bool ok = session->bytes[IFKV_STAGE_ENCODE] == (n_layer - 1) * (n - session->n_kept) * row;
    ok = ok && session->n_kept >= n / size && session->n_kept <= (n + size - 1) / size;
    ok = ok && session->bytes[IFKV_STAGE_SCORE] == 0 && session->bytes[IFKV_STAGE_SELECT] == 0 &&
         session->bytes[IFKV_STAGE_RECOMPUTE] == 0;
    return agree_true(comm, ok);
}

static void i25_exact_methods_receive_the_bytes_of_the_plan(void **state) {
    (void)state;
    hold_after_all(received_the_plan);
}

/* Description of a shard as --save-kv writes it: rows ascend and cover the context, chunks are the
 * request's. */
static ifkv_status describes_its_rows(ifkv_session *session) {
    ifkv_comm *comm = session->engine->comm;
    ifkv_kv_rows rows = {.size = sizeof rows};
    IFKV_TRY(ifkv_session_kv_rows(session, &rows));
    const ifkv_request *request = &session->request;
    int64_t sum[2] = {rows.n_row, 0};
    bool ok = rows.n_chunk == request->n_chunk && rows.chunk_offsets[0] == 0;
    for (int64_t i = 1; i <= request->n_chunk; i++)
        ok = ok && rows.chunk_offsets[i] == request->n_prefix + request->chunk_offsets[i];
    for (int64_t i = 0; i < rows.n_row; i++) {
        const int64_t index = rows.index[i];
        ok = ok && (i == 0 || index > rows.index[i - 1]) && rows.position[i] == index &&
             rows.token[i] == session->token[index] && !rows.recomputed[i];
        sum[1] += index;
    }
    IFKV_TRY(ifkv_comm_all_reduce_i64(comm, sum, 2, IFKV_REDUCE_SUM));
    const int64_t n = session->n_context;
    return agree_true(comm, ok && sum[0] == n && sum[1] == n * (n - 1) / 2);
}

static void exact_methods_describe_their_rows(void **state) {
    (void)state;
    hold_after_all(describes_its_rows);
}

static void exact_methods_select_nothing_and_take_no_selection(void **state) {
    (void)state;
    static const int64_t row[] = {30};
    for (int m = 0; m < N_RIVAL; m++) {
        tiny_run run = tiny_run_of(
            &cases[0],
            (ifkv_prefill_options){.method = rivals[m], .selected = row, .n_selected = 1});
        assert_fails(tiny_run_on(2, &run), IFKV_ERR_USAGE, IFKV_E_VALUE, "n_selected");
        run.options = (ifkv_prefill_options){.exchange = rivals[m]};
        assert_fails(tiny_run_on(2, &run), IFKV_ERR_USAGE, IFKV_E_VALUE, "exchange");
    }
}

int main(void) {
    seed = tiny_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(i15_exact_methods_equal_full_prefill),
        cmocka_unit_test(i15_exact_methods_take_empty_shards),
        cmocka_unit_test(i15_exact_methods_equal_full_prefill_in_tiles_and_tail_blocks),
        cmocka_unit_test(i25_exact_methods_receive_the_bytes_of_the_plan),
        cmocka_unit_test(exact_methods_describe_their_rows),
        cmocka_unit_test(exact_methods_select_nothing_and_take_no_selection),
    };
    return cmocka_run_group_tests_name("exact", tests, make_cases, free_cases);
}
