/* The quality harness of bench/ on tiny random models: its zeros are zeros, its forced logits are
 * those of decoding, its own combination of layers is the library's, and it resumes. */
#include "tiny.h"

#include <unistd.h>

#include "engine.h"
#include "error_codes.h"
#include "model_files.h"
#include "quality_loop.h"
#include "quality_measure.h"

enum { MAX_ANSWER = 5, N_GOLD = 4 };
static const int32_t gold[N_GOLD] = {7, 3, 3, 11};
static uint64_t seed;
static char *dir, *model;
static ifkv_comm *comm;
static ifkv_engine *engine;

static int open_engine(void **state) {
    if (dir_setup(state)) return -1;
    dir = *state;
    model = tiny_model(dir, &tiny_shapes[1], -1);
    const ifkv_engine_options options = {.size = sizeof options,
                                         .model_dir = model,
                                         .backend = "cpu",
                                         .n_thread = 1,
                                         .random_weights = true,
                                         .seed = (uint64_t)tiny_below(&seed, 1 << 30)};
    assert_ok(ifkv_comm_open("self", &comm));
    assert_ok(ifkv_engine_open(comm, &options, &engine));
    return 0;
}

static int close_engine(void **state) {
    ifkv_engine_close(engine);
    ifkv_comm_close(comm);
    free(model);
    return dir_teardown(state);
}

static tiny_request request_of(int64_t n_chunk, const int64_t *length) {
    return tiny_request_make(&seed, tiny_shapes[1].n_vocab, 2, n_chunk, length, 6, 3);
}

static quality_case open_case(const tiny_request *request) {
    quality_case it;
    assert_ok(quality_open(engine, &request->request, 0, MAX_ANSWER, gold, N_GOLD, NULL, &it));
    return it;
}

static quality_result measure(quality_case *it, quality_config config) {
    quality_result result;
    assert_ok(quality_measure(it, &config, &result));
    return result;
}

/* KL is a difference of log-probabilities near 1e-7 of logits of order 1, squared in effect; what
 * is left is the float64 sum's rounding.  Row errors: algorithm section 8. */
static void assert_equals_full(const quality_case *it, const quality_result *result) {
    assert_within(fabs(result->kl_first), 1e-8);
    assert_within(fabs(result->kl_greedy), 1e-8);
    assert_within(fabs(result->kl_gold), 1e-8);
    for (int layer = 0; layer < it->n_layer; layer++) {
        assert_within(result->k_error[layer], TINY_TOLERANCE);
        assert_within(result->v_error[layer], TINY_TOLERANCE);
    }
}

static void kl_of_two_tokens_is_the_closed_form(void **state) {
    (void)state;
    double log_p[2], log_q[2];
    quality_log_softmax((float[]){1.5f, 1.5f}, 2, log_p);       /* 1/2, 1/2 */
    quality_log_softmax((float[]){0, (float)log(3)}, 2, log_q); /* 1/4, 3/4 */
    assert_within(fabs(quality_kl(log_p, log_q, 2) - 0.5 * log(4.0 / 3)), 1e-7);
    assert_true(quality_kl(log_p, log_p, 2) == 0);
}

static void full_prefill_differs_from_itself_by_nothing(void **state) {
    (void)state;
    tiny_request request = request_of(3, (int64_t[]){20, 1, 31});
    quality_case it = open_case(&request);
    quality_result full = measure(&it, (quality_config){.method = "full"});
    assert_true(full.kl_first == 0 && full.kl_greedy == 0 && full.kl_gold == 0);
    for (int layer = 0; layer < it.n_layer; layer++)
        assert_true(full.k_error[layer] == 0 && full.v_error[layer] == 0);
    quality_result_fini(&full);
    quality_close(&it);
    tiny_request_fini(&request);
}

static void all_equals_full_prefill_and_none_does_not(void **state) {
    (void)state;
    tiny_request request = request_of(4, (int64_t[]){17, 40, 5, 33});
    quality_case it = open_case(&request);
    quality_result all = measure(&it, (quality_config){.method = "all"}),
                   none = measure(&it, (quality_config){.method = "none"}),
                   again = measure(&it, (quality_config){.method = "all"});
    assert_equals_full(&it, &all);
    assert_equals_full(&it, &again); /* a snapshot survives the configurations before */
    assert_true(none.kl_gold > 1e-6 && none.k_error[it.n_layer - 1] > 1e-3);
    assert_true(none.k_error[0] <= TINY_TOLERANCE);
    quality_result_fini(&all);
    quality_result_fini(&none);
    quality_result_fini(&again);
    quality_close(&it);
    tiny_request_fini(&request);
}

/* All rows but those of chunk 0, which are right already, replaced by full prefill's. */
static void true_rows_of_all_equal_full_prefill(void **state) {
    (void)state;
    tiny_request request = request_of(3, (int64_t[]){12, 40, 9});
    quality_case it = open_case(&request);
    quality_result all = measure(&it, (quality_config){.method = "all", .write = "full"});
    assert_equals_full(&it, &all);
    quality_result_fini(&all);
    quality_close(&it);
    tiny_request_fini(&request);
}

static void none_of_one_chunk_equals_full_prefill(void **state) {
    (void)state;
    tiny_request request = request_of(1, (int64_t[]){37});
    quality_case it = open_case(&request);
    quality_result none = measure(&it, (quality_config){.method = "none"});
    assert_equals_full(&it, &none);
    quality_result_fini(&none);
    quality_close(&it);
    tiny_request_fini(&request);
}

/* Greedy decoding chose each forced token as the likeliest there, and decodes the same again. */
static void forced_logits_are_those_of_decoding(void **state) {
    (void)state;
    tiny_request request = request_of(2, (int64_t[]){25, 14});
    quality_case it = open_case(&request);
    assert_int_equal(it.greedy.n, MAX_ANSWER);
    for (int64_t i = 0; i < it.greedy.n; i++)
        for (int64_t token = 0; token < it.n_vocab; token++)
            assert_within(it.greedy.log_p[i * it.n_vocab + token],
                          it.greedy.log_p[i * it.n_vocab + it.greedy.token[i]]);
    quality_result full = measure(&it, (quality_config){.method = "full", .has_answer = true});
    assert_int_equal(full.n_answer, it.greedy.n);
    assert_memory_equal(full.answer, it.greedy.token, (size_t)full.n_answer * sizeof(int32_t));
    quality_result_fini(&full);
    quality_close(&it);
    tiny_request_fini(&request);
}

static void combined_layers_select_what_infoflow_selects(void **state) {
    (void)state;
    tiny_request request = request_of(5, (int64_t[]){30, 41, 8, 60, 22});
    quality_case it = open_case(&request);
    quality_config config = {.method = "infoflow", .ratio = "0.2", .layers = "1,3"};
    quality_result library = measure(&it, config);
    config.method = "combine";
    quality_result combined = measure(&it, config);
    assert_int_equal(combined.n_selected, library.n_selected);
    assert_true(combined.selected_digest == library.selected_digest);
    quality_result_fini(&library);
    quality_result_fini(&combined);
    quality_close(&it);
    tiny_request_fini(&request);
}

static void heads_come_before_scores(void **state) {
    (void)state;
    tiny_request request = request_of(3, (int64_t[]){50, 30, 30});
    quality_case it = open_case(&request);
    int64_t *selected = NULL, n = 0;
    const quality_config config = {.ratio = "0.1", .layers = "2", .heads = 5};
    assert_ok(quality_combine(&it, &config, &selected, &n));
    assert_int_equal(n, 11); /* 112 context rows */
    for (int64_t i = 0; i < 5; i++) {
        int found = 0;
        for (int64_t j = 0; j < n; j++) found += selected[j] == 52 + i || selected[j] == 82 + i;
        assert_int_equal(found, 2);
    }
    free(selected);
    quality_close(&it);
    tiny_request_fini(&request);
}

static bool same_measure(const quality_result *a, const quality_result *b, int n_layer) {
    const size_t bytes = (size_t)n_layer * sizeof(double);
    return a->kl_first == b->kl_first && a->kl_greedy == b->kl_greedy && a->kl_gold == b->kl_gold &&
           a->nll_gold == b->nll_gold && !memcmp(a->k_error, b->k_error, bytes) &&
           !memcmp(a->v_error, b->v_error, bytes);
}

/* The file is read instead of running: bits are those of the run, and a file that is cut is no
 * file. */
static void a_snapshot_is_what_was_run(void **state) {
    (void)state;
    tiny_request request = request_of(4, (int64_t[]){21, 9, 30, 16});
    const char *path = path_in(dir, "request.snapshot");
    const quality_config config = {.method = "infoflow", .ratio = "0.2"};
    quality_case plain = open_case(&request), it;
    quality_result want = measure(&plain, config);
    for (int i = 0; i < 2; i++) { /* written, then read */
        assert_ok(quality_open(engine, &request.request, 0, MAX_ANSWER, gold, N_GOLD, path, &it));
        quality_result got = measure(&it, config);
        assert_true(same_measure(&got, &want, it.n_layer));
        quality_result_fini(&got);
        quality_close(&it);
    }
    FILE *file = fopen(path, "r+b");
    assert_non_null(file);
    assert_int_equal(fseek(file, -1, SEEK_END), 0);
    assert_int_equal(ftruncate(fileno(file), ftell(file)), 0);
    fclose(file);
    assert_fails(quality_open(engine, &request.request, 0, MAX_ANSWER, gold, N_GOLD, path, &it),
                 IFKV_ERR_DATA, IFKV_E_VALUE, "no snapshot");
    quality_result_fini(&want);
    quality_close(&plain);
    tiny_request_fini(&request);
}

/* Selected rows are part of all rows; of none, nothing is measured; of all, they are right at the
 * end and were not before. */
static void errors_of_selected_rows_are_before_and_after(void **state) {
    (void)state;
    tiny_request request = request_of(3, (int64_t[]){12, 40, 19});
    quality_case it = open_case(&request);
    quality_result all = measure(&it, (quality_config){.method = "all"}),
                   none = measure(&it, (quality_config){.method = "none"});
    for (int i = 0; i < 2; i++) {
        assert_true(none.stale_error[i] == 0 && none.fresh_error[i] == 0);
        assert_within(all.fresh_error[i], TINY_TOLERANCE);
        assert_true(all.stale_error[i] > 1e-3);
    }
    quality_result_fini(&all);
    quality_result_fini(&none);
    quality_close(&it);
    tiny_request_fini(&request);
}

/* The option reaches the library: the same rows, with other K/V around them. */
static void refit_moves_other_rows_than_the_selected(void **state) {
    (void)state;
    tiny_request request = request_of(3, (int64_t[]){12, 40, 19});
    quality_case it = open_case(&request);
    quality_config config = {.method = "infoflow", .ratio = "0.3"};
    quality_result plain = measure(&it, config);
    config.has_refit = true;
    quality_result refit = measure(&it, config);
    assert_true(refit.selected_digest == plain.selected_digest);
    assert_true(refit.v_error[it.n_layer - 1] != plain.v_error[it.n_layer - 1]);
    quality_result_fini(&plain);
    quality_result_fini(&refit);
    quality_close(&it);
    tiny_request_fini(&request);
}

/* Two documents in either order end up in one: of 20 and 23 rows the same share cannot be the best,
 * so no tie keeps the given order. */
static void two_orders_are_reordered_into_one(void **state) {
    (void)state;
    enum { A = 20, B = 23 };
    tiny_request request = request_of(2, (int64_t[]){A, B});
    int32_t *token = request.token + request.request.n_prefix, first[A];
    double nll[2][2];
    for (int order = 0; order < 2; order++) {
        quality_case it = open_case(&request);
        for (int has_reorder = 0; has_reorder < 2; has_reorder++) {
            quality_result result =
                measure(&it, (quality_config){.ratio = "0.25", .has_reorder = has_reorder == 1});
            nll[has_reorder][order] = result.nll_gold;
            assert_int_equal(isnan(result.v_error[0]) != 0, has_reorder);
            assert_int_equal(isnan(result.fresh_error[1]) != 0, has_reorder);
            quality_result_fini(&result);
        }
        quality_close(&it);
        memcpy(first, token, sizeof first);
        memmove(token, token + A, B * sizeof *token);
        memcpy(token + B, first, sizeof first);
        request.offset[1] = B;
    }
    assert_true(fabs(nll[0][0] - nll[0][1]) > 1e-3);
    assert_within(fabs(nll[1][0] - nll[1][1]), TINY_TOLERANCE);
    tiny_request_fini(&request);
}

static void epic_takes_its_own_number_of_rows(void **state) {
    (void)state;
    tiny_request request = request_of(3, (int64_t[]){12, 40, 19});
    quality_case it = open_case(&request);
    quality_result epic = measure(&it, (quality_config){.method = "epic", .epic_k = 7});
    assert_int_equal(epic.n_selected, 2 * 7);
    quality_result_fini(&epic);
    quality_close(&it);
    tiny_request_fini(&request);
}

static int64_t count_lines(const char *path) {
    FILE *file = fopen(path, "rb");
    assert_non_null(file);
    int64_t n = 0;
    for (int c; (c = fgetc(file)) != EOF;) n += c == '\n';
    fclose(file);
    return n;
}

static void an_interrupted_run_resumes(void **state) {
    (void)state;
    write_text(dir, "requests.jsonl",
               "{\"id\": \"a\", \"chunks\": [[1, 2, 3], [4, 5]], \"prompt\": [6]}\n"
               "{\"id\": \"b\", \"chunks\": [[9, 8], [7]], \"prompt\": [5, 4]}\n"
               "{\"id\": \"c\", \"chunks\": [[3], [2, 1]], \"prompt\": [5]}\n");
    write_text(dir, "gold.jsonl", "{\"id\": \"c\", \"gold\": [2, 1]}\n");
    write_text(dir, "configs.jsonl",
               "{\"name\": \"none\", \"method\": \"none\"}\n"
               "{\"name\": \"all\", \"method\": \"all\", \"answer\": true}\n");
    char requests[512], gold_path[512], configs[512], out[512];
    snprintf(requests, sizeof requests, "%s/requests.jsonl", dir);
    snprintf(gold_path, sizeof gold_path, "%s/gold.jsonl", dir);
    snprintf(configs, sizeof configs, "%s/configs.jsonl", dir);
    snprintf(out, sizeof out, "%s/out.jsonl", dir);
    const quality_options options = {.requests = requests,
                                     .gold = gold_path,
                                     .configs = configs,
                                     .out = out,
                                     .parity = 0,
                                     .max_answer = 3};
    int64_t n = 0;
    assert_ok(quality_loop(engine, &options, &n));
    assert_int_equal(n, 4); /* a and c stand at even places */
    assert_ok(quality_loop(engine, &options, &n));
    assert_int_equal(n, 0);
    FILE *file = fopen(out, "r+b");
    assert_non_null(file);
    assert_int_equal(fseek(file, -20, SEEK_END), 0);
    assert_int_equal(ftruncate(fileno(file), ftell(file)), 0);
    fclose(file);
    assert_ok(quality_loop(engine, &options, &n));
    assert_int_equal(n, 1);
    assert_int_equal(count_lines(out), 4);
}

static void bad_configurations_are_refused_by_line(void **state) {
    (void)state;
    static const struct {
        const char *text, *part;
    } cases[] = {
        {"{\"method\": \"none\"}\n", ":1/name"},
        {"{\"name\": \"a\"}\n{\"name\": \"a\"}\n", ":2/name"},
        {"{\"name\": \"a\", \"layer\": \"2\"}\n", ":1: got key \"layer\""},
        {"{\"name\": \"a\", \"rows\": \"some\"}\n", ":1/rows: got \"some\""},
        {"[]\n", ":1: got no object"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        quality_config_list list;
        write_text(dir, "bad.jsonl", cases[i].text);
        assert_fails(quality_configs_read(path_in(dir, "bad.jsonl"), &list), IFKV_ERR_DATA,
                     IFKV_E_VALUE, cases[i].part);
    }
}

int main(void) {
    seed = tiny_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(kl_of_two_tokens_is_the_closed_form),
        cmocka_unit_test(full_prefill_differs_from_itself_by_nothing),
        cmocka_unit_test(all_equals_full_prefill_and_none_does_not),
        cmocka_unit_test(true_rows_of_all_equal_full_prefill),
        cmocka_unit_test(none_of_one_chunk_equals_full_prefill),
        cmocka_unit_test(forced_logits_are_those_of_decoding),
        cmocka_unit_test(combined_layers_select_what_infoflow_selects),
        cmocka_unit_test(heads_come_before_scores),
        cmocka_unit_test(a_snapshot_is_what_was_run),
        cmocka_unit_test(errors_of_selected_rows_are_before_and_after),
        cmocka_unit_test(refit_moves_other_rows_than_the_selected),
        cmocka_unit_test(two_orders_are_reordered_into_one),
        cmocka_unit_test(epic_takes_its_own_number_of_rows),
        cmocka_unit_test(an_interrupted_run_resumes),
        cmocka_unit_test(bad_configurations_are_refused_by_line),
    };
    return cmocka_run_group_tests(tests, open_engine, close_engine);
}
