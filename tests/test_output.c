/* The output directory: what a finished request leaves, what a kill leaves, what a resume keeps. */
#include "test.h"

#include "digest.h"
#include "error_codes.h"
#include "file_fixture.h"
#include "h5.h"
#include "output.h"
#include "status.h"

#include <fcntl.h>
#include <jansson.h>
#include <signal.h>
#include <strings.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define N_CONTEXT 5
#define RUN "method=infoflow;ratio=0.15"

static char *dir;
static ifkv_request_list *list;
static ifkv_output *out;

static const char requests_text[] = "{\"id\":\"a\",\"chunks\":[[1,2],[3,4,5]],\"prompt\":[4],"
                                    "\"answers\":[\"x\"],\"meta\":{\"k\":1}}\n"
                                    "{\"id\":\"../B\",\"chunks\":[[1]],\"prompt\":[4]}\n"
                                    "{\"id\":\"c\",\"chunks\":[[1]],\"prompt\":[4]}\n";

static void load(const char *text) {
    ifkv_requests_free(list);
    list = NULL;
    assert_ok(ifkv_requests_parse("q.jsonl", text, strlen(text), false, 0, &list));
}

static int make_dir(void **state) {
    (void)state;
    dir = fixture_dir();
    load(requests_text);
    return 0;
}

static int remove_dir(void **state) {
    (void)state;
    ifkv_output_close(out);
    out = NULL;
    ifkv_requests_free(list);
    list = NULL;
    fixture_remove(dir);
    return 0;
}

/* ---- a run ---- */

static ifkv_output_options options_for(ifkv_output_mode mode, const char *run) {
    return (ifkv_output_options){.dir = dir,
                                 .mode = mode,
                                 .fingerprint = 0x1234,
                                 .run = run,
                                 .requests = list,
                                 .save_scores = true,
                                 .save_logits = true};
}

static ifkv_status open_run(ifkv_output_mode mode, const char *run) {
    const ifkv_output_options options = options_for(mode, run);
    return ifkv_output_open(&options, &out);
}

static void close_run(void) {
    ifkv_output_close(out);
    out = NULL;
}

static ifkv_result fake_result(int64_t n_selected) {
    static const int64_t selected[] = {1, 3, 4};
    static const float scores[N_CONTEXT] = {0, 0.5f, 0, 1.5f, 2.5f}, logits[3] = {1, -2, 3};
    static const int32_t answer[] = {42, 43};
    ifkv_result r = {.size = sizeof r,
                     .method = "infoflow",
                     .exchange = "query",
                     .backend = "cpu",
                     .comm = "thread",
                     .finish = "length",
                     .n_rank = 2,
                     .n_context = N_CONTEXT,
                     .n_chunk = 2,
                     .n_prompt = 1,
                     .n_selected = n_selected,
                     .selected = selected,
                     .scores = scores,
                     .first_logits = logits,
                     .n_vocab = 3,
                     .answer = answer,
                     .n_answer = 2,
                     .ttft_ms = 12.5,
                     .bytes_total = 99,
                     .memory_weights = 1000,
                     .memory_planned = 2000,
                     .memory_peak = 1500,
                     .score_layers = "1,2"};
    r.selected_digest = ifkv_digest_indices(selected, n_selected);
    r.ms[IFKV_STAGE_ENCODE] = 7.25;
    r.bytes[IFKV_STAGE_RECOMPUTE] = 64;
    return r;
}

static ifkv_status fill_layer(void *arg, int layer, float *k, float *v) {
    const ifkv_kv_rows *rows = arg;
    const int64_t n = rows->n_row * rows->n_kv_head * rows->d_head;
    for (int64_t i = 0; i < n; i++) {
        k[i] = (float)(1000 * layer + i);
        v[i] = -k[i];
    }
    return IFKV_OK;
}

static ifkv_status write_kv_of(const char *id, int rank, int64_t n_row, uint64_t *digest) {
    static const int64_t index[] = {0, 1, 2, 3, 4}, position[] = {10, 11, 12, 13, 14};
    static const int64_t offsets[] = {0, 2, 5};
    static const int32_t token[] = {1, 2, 3, 4, 5};
    static const uint8_t recomputed[] = {0, 1, 0, 1, 1};
    ifkv_kv_rows rows = {.size = sizeof rows,
                         .n_layer = 2,
                         .n_kv_head = 3,
                         .d_head = 4,
                         .n_row = n_row,
                         .n_chunk = 2,
                         .index = index,
                         .position = position,
                         .token = token,
                         .recomputed = recomputed,
                         .chunk_offsets = offsets};
    const ifkv_output_kv_options options = {.dir = dir,
                                            .id = id,
                                            .fingerprint = 0x1234,
                                            .rank = rank,
                                            .n_rank = 2,
                                            .rows = &rows,
                                            .read = fill_layer,
                                            .read_arg = &rows};
    return ifkv_output_kv(&options, digest);
}

/* One request with two ranks' KV files, the second without a row. */
static ifkv_status write_request(int64_t i) {
    const ifkv_result result = fake_result(3);
    uint64_t digest[2];
    IFKV_TRY(ifkv_output_begin(out));
    IFKV_TRY(write_kv_of(list->item[i].id, 0, N_CONTEXT, &digest[0]));
    IFKV_TRY(write_kv_of(list->item[i].id, 1, 0, &digest[1]));
    return ifkv_output_record(out, i, &result, 2, digest);
}

static void write_run(ifkv_output_mode mode, int64_t n) {
    assert_ok(open_run(mode, RUN));
    for (int64_t i = 0; i < n; i++)
        if (!ifkv_output_is_done(out, i)) assert_ok(write_request(i));
    assert_ok(ifkv_output_finish(out));
    close_run();
}

static json_t *json_line(const char *name, int i_line) {
    char *text = fixture_read(fixture_path(dir, name), NULL), *at = text;
    for (; at && i_line > 0; i_line--) {
        at = strchr(at, '\n');
        at = at ? at + 1 : NULL;
    }
    json_t *root = at && *at ? json_loads(at, JSON_DISABLE_EOF_CHECK, NULL) : NULL;
    free(text);
    return root;
}

static bool line_is(const char *name, int i_line, const char *id) {
    json_t *root = json_line(name, i_line);
    const char *found = json_string_value(json_object_get(root, "id"));
    const bool is_equal = id ? found && strcmp(found, id) == 0 : !root;
    json_decref(root);
    return is_equal;
}

static void assert_lines(const char *name, const char *first, const char *second,
                         const char *third) {
    assert_true(line_is(name, 0, first));
    if (first) assert_true(line_is(name, 1, second));
    if (first && second) assert_true(line_is(name, 2, third));
}

/* ---- names and keys ---- */

static void plain_ids_are_their_own_names(void **state) {
    (void)state;
    char name[IFKV_OUTPUT_NAME_BYTES];
    assert_string_equal(ifkv_output_name("musique-12_b", name), "musique-12_b");
}

static void names_are_never_paths_and_never_meet(void **state) {
    (void)state;
    static char long_a[6000], long_b[6000];
    memset(long_a, 'x', 5000);
    memset(long_b, 'x', 5001);
    const char *ids[] = {"a",      "A",   "a.kv0", "../../etc/x", "..",       ".",
                         "/",      "a/b", "a_b",   "a b",         "\xc3\xa9", "\xc3",
                         "con.h5", "~",   "a\nb",  long_a,        long_b,     "a.0123456789abcdef"};
    enum { N = sizeof ids / sizeof *ids };
    char name[N][IFKV_OUTPUT_NAME_BYTES];
    for (int i = 0; i < N; i++) {
        ifkv_output_name(ids[i], name[i]);
        assert_true(strlen(name[i]) < 80 && name[i][0] != '.');
        assert_null(strchr(name[i], '/'));
        for (int j = 0; j < i; j++) assert_true(strcasecmp(name[i], name[j]) != 0);
    }
}

static void the_key_depends_on_model_request_and_run(void **state) {
    (void)state;
    char key[4][IFKV_OUTPUT_KEY_BYTES];
    ifkv_output_options options = options_for(IFKV_OUTPUT_FRESH, RUN);
    ifkv_output_key(&options, &list->item[0], key[0]);
    ifkv_output_key(&options, &list->item[1], key[1]);
    options.fingerprint++;
    ifkv_output_key(&options, &list->item[0], key[2]);
    options.fingerprint--;
    options.run = "method=infoflow;ratio=0.16";
    ifkv_output_key(&options, &list->item[0], key[3]);
    for (int i = 0; i < 4; i++) {
        assert_int_equal(strlen(key[i]), 32);
        for (int j = 0; j < i; j++) assert_string_not_equal(key[i], key[j]);
    }
}

/* ---- what a finished request leaves ---- */

static void a_result_line_has_exactly_the_fields_of_the_contract(void **state) {
    (void)state;
    static const char *const names[] = {
        "id",          "answers",  "meta",     "answer_ids", "finish",
        "method",      "exchange", "backend",  "comm",       "size",
        "n_context",   "n_chunk",  "n_prompt", "n_selected", "selected_digest",
        "ms",          "rode",     "bytes",    "memory",     "store",
        "chunk_order", "auto"};
    write_run(IFKV_OUTPUT_FRESH, 3);
    json_t *line = json_line("results.jsonl", 0);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!json_object_get(line, names[i])) fail_msg("missing %s", names[i]);
    assert_int_equal(json_object_size(line), sizeof names / sizeof *names);
    json_t *ms = json_object_get(line, "ms"), *bytes = json_object_get(line, "bytes");
    assert_int_equal(json_object_size(ms), 8);
    assert_true(json_real_value(json_object_get(ms, "encode")) == 7.25);
    assert_true(json_real_value(json_object_get(ms, "ttft")) == 12.5);
    assert_int_equal(json_object_size(bytes), 8);
    assert_int_equal(json_integer_value(json_object_get(bytes, "recompute")), 64);
    assert_int_equal(json_integer_value(json_object_get(bytes, "total")), 99);
    assert_int_equal(
        json_integer_value(json_object_get(json_object_get(line, "memory"), "planned")), 2000);
    assert_string_equal(json_string_value(json_array_get(json_object_get(line, "answers"), 0)),
                        "x");
    assert_int_equal(json_integer_value(json_array_get(json_object_get(line, "answer_ids"), 1)),
                     43);
    json_decref(line);
    line = json_line("results.jsonl", 1);
    assert_true(json_is_null(json_object_get(line, "answers")));
    json_decref(line);
}

static void a_manifest_line_names_every_file_and_its_digest(void **state) {
    (void)state;
    write_run(IFKV_OUTPUT_FRESH, 1);
    json_t *line = json_line("manifest.jsonl", 0), *xxh3 = json_object_get(line, "xxh3");
    const char *name;
    json_t *value;
    assert_string_equal(json_string_value(json_object_get(line, "record")), "a.h5");
    assert_string_equal(json_string_value(json_array_get(json_object_get(line, "kv"), 1)),
                        "a.kv1.h5");
    assert_int_equal(json_object_size(line), 5);
    assert_int_equal(json_object_size(xxh3), 3);
    json_object_foreach(xxh3, name, value) {
        char hex[17];
        uint64_t digest;
        assert_ok(ifkv_digest_file(fixture_path(dir, name), 0, &digest));
        snprintf(hex, sizeof hex, "%016llx", (unsigned long long)digest);
        assert_string_equal(json_string_value(value), hex);
    }
    json_decref(line);
}

static void a_record_holds_selection_scores_logits_and_scalars(void **state) {
    (void)state;
    ifkv_h5 *file;
    ifkv_h5_dataset dataset;
    int64_t selected[3], n;
    float scores[N_CONTEXT];
    bool is_there;
    char *text;
    write_run(IFKV_OUTPUT_FRESH, 1);
    assert_ok(ifkv_h5_open(fixture_path(dir, "a.h5"), &file));
    assert_ok(ifkv_h5_rows_read(file, "/selected", IFKV_H5_I64, 0, 3, selected));
    assert_true(selected[0] == 1 && selected[2] == 4);
    assert_ok(ifkv_h5_rows_read(file, "/scores", IFKV_H5_F32, 0, N_CONTEXT, scores));
    assert_true(scores[3] == 1.5f);
    assert_ok(ifkv_h5_dataset_describe(file, "/first_logits", &dataset));
    assert_true(dataset.n_dim == 1 && dataset.dim[0] == 3 && dataset.type == IFKV_H5_F32);
    assert_ok(ifkv_h5_text_read(file, "/", "format", &text));
    assert_string_equal(text, "ifkv-record");
    free(text);
    assert_ok(ifkv_h5_i64_read(file, "/", "n_selected", &is_there, &n));
    assert_true(is_there && n == 3);
    ifkv_h5_close(file);
}

static void selecting_nothing_writes_an_empty_dataset(void **state) {
    (void)state;
    const ifkv_result result = fake_result(0);
    ifkv_h5 *file;
    ifkv_h5_dataset dataset;
    assert_ok(open_run(IFKV_OUTPUT_FRESH, RUN));
    assert_ok(ifkv_output_record(out, 0, &result, 0, NULL));
    assert_ok(ifkv_h5_open(fixture_path(dir, "a.h5"), &file));
    assert_ok(ifkv_h5_dataset_describe(file, "/selected", &dataset));
    assert_true(dataset.n_dim == 1 && dataset.dim[0] == 0 && dataset.type == IFKV_H5_I64);
    ifkv_h5_close(file);
}

static void scores_and_logits_are_left_out_unless_asked_for(void **state) {
    (void)state;
    const ifkv_result result = fake_result(3);
    ifkv_output_options options = options_for(IFKV_OUTPUT_FRESH, RUN);
    ifkv_h5 *file;
    bool has_scores, has_logits;
    options.save_scores = options.save_logits = false;
    assert_ok(ifkv_output_open(&options, &out));
    assert_ok(ifkv_output_record(out, 0, &result, 0, NULL));
    assert_ok(ifkv_h5_open(fixture_path(dir, "a.h5"), &file));
    assert_ok(ifkv_h5_find(file, "/scores", &has_scores));
    assert_ok(ifkv_h5_find(file, "/first_logits", &has_logits));
    ifkv_h5_close(file);
    assert_false(has_scores || has_logits);
}

static void kv_rows_come_back_as_written(void **state) {
    (void)state;
    ifkv_h5 *file;
    ifkv_h5_dataset dataset;
    float v[N_CONTEXT * 12];
    uint8_t recomputed[N_CONTEXT];
    char *text;
    write_run(IFKV_OUTPUT_FRESH, 1);
    assert_ok(ifkv_h5_open(fixture_path(dir, "a.kv0.h5"), &file));
    assert_ok(ifkv_h5_dataset_describe(file, "/layers/1/k", &dataset));
    assert_true(dataset.n_dim == 3 && dataset.dim[0] == 5 && dataset.dim[1] == 3 &&
                dataset.dim[2] == 4);
    assert_ok(ifkv_h5_rows_read(file, "/layers/1/v", IFKV_H5_F32, 0, N_CONTEXT, v));
    for (int i = 0; i < N_CONTEXT * 12; i++) assert_true(v[i] == -(float)(1000 + i));
    assert_ok(ifkv_h5_rows_read(file, "/recomputed", IFKV_H5_BOOL, 0, N_CONTEXT, recomputed));
    assert_true(!recomputed[0] && recomputed[1] && recomputed[4]);
    assert_ok(ifkv_h5_text_read(file, "/", "layout", &text));
    assert_string_equal(text, "THD");
    free(text);
    ifkv_h5_close(file);
}

static void a_rank_without_rows_writes_empty_datasets(void **state) {
    (void)state;
    ifkv_h5 *file;
    ifkv_h5_dataset dataset;
    write_run(IFKV_OUTPUT_FRESH, 1);
    assert_ok(ifkv_h5_open(fixture_path(dir, "a.kv1.h5"), &file));
    assert_ok(ifkv_h5_dataset_describe(file, "/layers/0/k", &dataset));
    assert_true(dataset.dim[0] == 0 && dataset.dim[1] == 3);
    assert_ok(ifkv_h5_dataset_describe(file, "/chunk_offsets", &dataset));
    assert_true(dataset.dim[0] == 3);
    ifkv_h5_close(file);
}

static void equal_rows_give_equal_kv_files(void **state) {
    (void)state;
    uint64_t first, second;
    assert_ok(open_run(IFKV_OUTPUT_FRESH, RUN));
    assert_ok(write_kv_of("a", 0, N_CONTEXT, &first));
    sleep(1); /* HDF5 object times have seconds */
    assert_ok(write_kv_of("a", 0, N_CONTEXT, &second));
    assert_true(first == second);
}

static ifkv_status fail_layer(void *arg, int layer, float *k, float *v) {
    (void)arg, (void)k, (void)v;
    return IFKV_FAIL(IFKV_ERR_NUMERIC, IFKV_E_NOT_FINITE, "layer %d", layer);
}

static void a_failing_reader_leaves_no_kv_file(void **state) {
    (void)state;
    const int64_t offsets[] = {0};
    const ifkv_kv_rows rows = {
        .size = sizeof rows, .n_layer = 1, .n_kv_head = 1, .d_head = 1, .chunk_offsets = offsets};
    const ifkv_output_kv_options options = {
        .dir = dir, .id = "a", .n_rank = 1, .rows = &rows, .read = fail_layer};
    uint64_t digest;
    assert_ok(open_run(IFKV_OUTPUT_FRESH, RUN));
    assert_fails(ifkv_output_kv(&options, &digest), IFKV_ERR_NUMERIC, IFKV_E_NOT_FINITE, "layer 0");
    assert_false(fixture_exists(fixture_path(dir, "a.kv0.h5")));
    close_run();
    assert_false(fixture_exists(fixture_path(dir, ".tmp")));
}

/* ---- modes ---- */

static void a_fresh_run_refuses_a_directory_with_results(void **state) {
    (void)state;
    write_run(IFKV_OUTPUT_FRESH, 1);
    assert_fails(open_run(IFKV_OUTPUT_FRESH, RUN), IFKV_ERR_DATA, IFKV_E_OUT_EXISTS,
                 "manifest.jsonl: results of another run are there");
}

static void a_run_that_wrote_nothing_leaves_a_fresh_directory(void **state) {
    (void)state;
    assert_ok(open_run(IFKV_OUTPUT_FRESH, RUN));
    assert_ok(ifkv_output_begin(out));
    close_run();
    assert_ok(open_run(IFKV_OUTPUT_FRESH, "method=other"));
}

static void overwrite_removes_old_results_only_when_it_begins(void **state) {
    (void)state;
    write_run(IFKV_OUTPUT_FRESH, 3);
    assert_ok(open_run(IFKV_OUTPUT_OVERWRITE, "method=none"));
    assert_lines("results.jsonl", "a", "../B", "c");
    assert_true(fixture_exists(fixture_path(dir, "c.kv0.h5")));
    assert_ok(ifkv_output_begin(out));
    assert_false(fixture_exists(fixture_path(dir, "results.jsonl")));
    assert_false(fixture_exists(fixture_path(dir, "manifest.jsonl")));
    assert_false(fixture_exists(fixture_path(dir, "a.h5")));
    assert_false(fixture_exists(fixture_path(dir, "c.kv0.h5")));
}

static void resume_keeps_what_is_done_and_finishes_in_order(void **state) {
    (void)state;
    assert_ok(open_run(IFKV_OUTPUT_FRESH, RUN));
    assert_ok(write_request(2));
    close_run();
    assert_ok(open_run(IFKV_OUTPUT_RESUME, RUN));
    assert_false(ifkv_output_is_done(out, 0));
    assert_true(ifkv_output_is_done(out, 2));
    assert_ok(write_request(0));
    assert_ok(write_request(1));
    assert_lines("results.jsonl", "c", "a", "../B");
    assert_ok(ifkv_output_finish(out));
    assert_lines("results.jsonl", "a", "../B", "c");
    assert_lines("manifest.jsonl", "a", "../B", "c");
}

static void resume_of_nothing_is_a_fresh_run(void **state) {
    (void)state;
    write_run(IFKV_OUTPUT_RESUME, 3);
    assert_lines("results.jsonl", "a", "../B", "c");
}

static void resume_under_another_option_names_it(void **state) {
    (void)state;
    write_run(IFKV_OUTPUT_FRESH, 1);
    assert_fails(open_run(IFKV_OUTPUT_RESUME, "method=infoflow;ratio=0.2"), IFKV_ERR_DATA,
                 IFKV_E_OUT_EXISTS,
                 "run.json /options/ratio: differs from the finished results: got 0.2, expected "
                 "0.15");
    assert_fails(open_run(IFKV_OUTPUT_RESUME, "method=infoflow"), IFKV_ERR_DATA, IFKV_E_OUT_EXISTS,
                 "/options/ratio: differs from the finished results: got nothing, expected 0.15");
    ifkv_output_options options = options_for(IFKV_OUTPUT_RESUME, RUN);
    options.fingerprint = 0x1235;
    assert_fails(ifkv_output_open(&options, &out), IFKV_ERR_DATA, IFKV_E_OUT_EXISTS,
                 "run.json /model_fingerprint: differs");
}

static void resume_of_a_changed_request_names_it(void **state) {
    (void)state;
    write_run(IFKV_OUTPUT_FRESH, 3);
    load("{\"id\":\"a\",\"chunks\":[[1,2],[3,4,6]],\"prompt\":[4]}\n");
    assert_fails(open_run(IFKV_OUTPUT_RESUME, RUN), IFKV_ERR_DATA, IFKV_E_OUT_EXISTS,
                 "q.jsonl:1 /id: request 'a' differs");
}

static void resume_without_a_finished_request_is_refused(void **state) {
    (void)state;
    write_run(IFKV_OUTPUT_FRESH, 3);
    load("{\"id\":\"c\",\"chunks\":[[1]],\"prompt\":[4]}\n");
    assert_fails(open_run(IFKV_OUTPUT_RESUME, RUN), IFKV_ERR_DATA, IFKV_E_OUT_EXISTS,
                 "manifest.jsonl:1 /id: finished request 'a' is not among the requests");
}

static void append_text(const char *name, const char *text) {
    FILE *file = fopen(fixture_path(dir, name), "a");
    fputs(text, file);
    fclose(file);
}

static void resume_ignores_torn_lines(void **state) {
    (void)state;
    write_run(IFKV_OUTPUT_FRESH, 1);
    append_text("results.jsonl", "{\"id\":\"../B\",\"answ");
    append_text("manifest.jsonl", "{\"id\":\"../B\",\"rec");
    write_run(IFKV_OUTPUT_RESUME, 3);
    assert_lines("results.jsonl", "a", "../B", "c");
    assert_lines("manifest.jsonl", "a", "../B", "c");
}

static void resume_drops_a_result_without_a_manifest_line(void **state) {
    (void)state;
    write_run(IFKV_OUTPUT_FRESH, 1);
    append_text("results.jsonl", "{\"id\":\"../B\"}\n");
    assert_ok(open_run(IFKV_OUTPUT_RESUME, RUN));
    assert_false(ifkv_output_is_done(out, 1));
    assert_ok(ifkv_output_begin(out));
    assert_lines("results.jsonl", "a", NULL, NULL);
}

static void resume_computes_a_damaged_request_again(void **state) {
    (void)state;
    const float scores[2] = {1.5f, 2.5f};
    write_run(IFKV_OUTPUT_FRESH, 3);
    assert_true(fixture_flip(fixture_path(dir, "a.h5"), scores, sizeof scores));
    unlink(fixture_path(dir, "c.kv1.h5"));
    assert_ok(open_run(IFKV_OUTPUT_RESUME, RUN));
    assert_false(ifkv_output_is_done(out, 0));
    assert_true(ifkv_output_is_done(out, 1));
    assert_false(ifkv_output_is_done(out, 2));
}

/* ---- the directory ---- */

static void a_second_job_is_told_who_holds_the_directory(void **state) {
    (void)state;
    char pid[32];
    ifkv_output *second = NULL;
    const ifkv_output_options options = options_for(IFKV_OUTPUT_RESUME, RUN);
    assert_ok(open_run(IFKV_OUTPUT_FRESH, RUN));
    snprintf(pid, sizeof pid, "pid %ld", (long)getpid());
    assert_fails(ifkv_output_open(&options, &second), IFKV_ERR_BUSY, IFKV_E_OUT_LOCKED, pid);
    close_run();
    assert_ok(open_run(IFKV_OUTPUT_FRESH, RUN));
}

static void what_a_dead_job_left_is_removed(void **state) {
    (void)state;
    mkdir(fixture_path(dir, ".tmp"), 0777);
    fixture_write_text(fixture_path(dir, ".tmp/a.h5.nojob.0.99"), "x");
    fixture_write_text(fixture_path(dir, ".lock"), "host gone pid 99 job nojob\n");
    assert_ok(open_run(IFKV_OUTPUT_FRESH, RUN));
    assert_false(fixture_exists(fixture_path(dir, ".tmp/a.h5.nojob.0.99")));
    close_run();
    assert_false(fixture_exists(fixture_path(dir, ".tmp")));
    assert_false(fixture_exists(fixture_path(dir, ".lock")));
}

static void a_path_that_cannot_be_a_directory_is_73(void **state) {
    (void)state;
    ifkv_output_options options = options_for(IFKV_OUTPUT_FRESH, RUN);
    fixture_write_text(fixture_path(dir, "file"), "x");
    const char *const paths[] = {"/dev/null/x", fixture_path(dir, "file"),
                                 fixture_path(dir, "no/such")};
    for (int i = 0; i < 3; i++) {
        options.dir = paths[i];
        assert_fails(ifkv_output_open(&options, &out), IFKV_ERR_CANT_CREATE, IFKV_E_OUT_CREATE,
                     "cannot be created");
    }
}

/* ---- verify and inspect ---- */

static char said[2048];

static void hear(void *arg, bool is_error, const char *line) {
    (void)arg;
    const size_t n = strlen(said);
    snprintf(said + n, sizeof said - n, "%s%s\n", is_error ? "error: " : "warning: ", line);
}

static ifkv_status verify(ifkv_output_counts *counts) {
    said[0] = 0;
    return ifkv_output_verify(dir, hear, NULL, counts);
}

static void verify_accepts_a_finished_run(void **state) {
    (void)state;
    ifkv_output_counts counts;
    write_run(IFKV_OUTPUT_FRESH, 3);
    assert_ok(verify(&counts));
    assert_true(counts.n_request == 3 && counts.n_file == 9 && counts.n_damaged == 0 &&
                counts.n_warning == 0);
}

static void verify_names_file_and_dataset_of_a_flipped_bit(void **state) {
    (void)state;
    ifkv_output_counts counts;
    const float scores[2] = {1.5f, 2.5f}, v[2] = {-1030, -1031};
    write_run(IFKV_OUTPUT_FRESH, 3);
    assert_true(fixture_flip(fixture_path(dir, "a.h5"), scores, sizeof scores));
    assert_fails(verify(&counts), IFKV_ERR_NUMERIC, IFKV_E_OUT_VERIFY, "a.h5 /scores: rows 0..4");
    assert_true(fixture_flip(fixture_path(dir, "c.kv0.h5"), v, sizeof v));
    assert_fails(verify(&counts), IFKV_ERR_NUMERIC, IFKV_E_OUT_VERIFY, "a.h5 /scores");
    assert_int_equal(counts.n_damaged, 2);
    assert_non_null(strstr(said, "c.kv0.h5 /layers/1/v: rows 0..4"));
}

static void verify_finds_a_flipped_bit_in_an_attribute(void **state) {
    (void)state;
    ifkv_output_counts counts;
    write_run(IFKV_OUTPUT_FRESH, 1);
    assert_true(fixture_flip(fixture_path(dir, "a.h5"), "infoflow", 8));
    assert_fails(verify(&counts), IFKV_ERR_NUMERIC, IFKV_E_OUT_VERIFY, "a.h5");
}

static void verify_finds_a_missing_file_and_a_bad_manifest_line(void **state) {
    (void)state;
    ifkv_output_counts counts;
    write_run(IFKV_OUTPUT_FRESH, 3);
    unlink(fixture_path(dir, "c.h5"));
    assert_fails(verify(&counts), IFKV_ERR_NUMERIC, IFKV_E_OUT_VERIFY, "c.h5");
    append_text("manifest.jsonl", "{\"id\":\"d\",\"record\":\"../d.h5\",\"kv\":[],\"xxh3\":"
                                  "{\"../d.h5\":\"0000000000000000\"},\"key\":\"\"}\n");
    assert_fails(verify(&counts), IFKV_ERR_NUMERIC, IFKV_E_OUT_VERIFY, "c.h5");
    assert_non_null(strstr(said, "manifest.jsonl:4: not a manifest line"));
}

static void verify_warns_of_strays_and_torn_lines(void **state) {
    (void)state;
    ifkv_output_counts counts;
    write_run(IFKV_OUTPUT_FRESH, 1);
    fixture_write_text(fixture_path(dir, "stray.h5"), "x");
    append_text("manifest.jsonl", "{\"id\":");
    assert_ok(verify(&counts));
    assert_int_equal(counts.n_warning, 2);
    assert_non_null(strstr(said, "warning: "));
    assert_non_null(strstr(said, "stray.h5: not in the manifest"));
}

static void verify_without_a_manifest_is_66(void **state) {
    (void)state;
    ifkv_output_counts counts;
    assert_fails(verify(&counts), IFKV_ERR_NO_INPUT, IFKV_E_OUT_VERIFY, "manifest.jsonl: missing");
}

static void inspect_describes_records_kv_and_request_files(void **state) {
    (void)state;
    ifkv_h5_summary s;
    write_run(IFKV_OUTPUT_FRESH, 1);
    assert_ok(ifkv_h5_inspect(fixture_path(dir, "a.h5"), &s));
    assert_string_equal(s.format, "ifkv-record");
    assert_int_equal(s.n_dataset, 4);
    assert_ok(ifkv_h5_inspect(fixture_path(dir, "a.kv0.h5"), &s));
    assert_string_equal(s.format, "ifkv-kv");
    assert_string_equal(s.format_version, "1.0");
    assert_int_equal(s.n_dataset, 9);
    assert_string_equal(s.dataset[2].path, "/layers/0/k");
    assert_string_equal(s.dataset[2].type, "float32");
    assert_true(s.dataset[2].n_dim == 3 && s.dataset[2].dim[0] == 5);
    fixture_h5_write(fixture_path(dir, "q.h5"), H5_VALID);
    assert_ok(ifkv_h5_inspect(fixture_path(dir, "q.h5"), &s));
    assert_string_equal(s.format, "ifkv-requests");
    assert_fails(ifkv_h5_inspect(fixture_path(dir, "run.json"), &s), IFKV_ERR_DATA, IFKV_E_H5_OPEN,
                 "run.json: not a readable HDF5 file");
}

/* ---- what goes wrong while writing ---- */

#if defined(__SANITIZE_ADDRESS__)
/* HDF5 forgets a buffer when a write fails. */
const char *__lsan_default_suppressions(void);
const char *__lsan_default_suppressions(void) {
    return "leak:libhdf5";
}
#endif

/* A process of its own: HDF5 is not to be trusted after a failed write. */
static int run_under_file_limit(rlim_t limit) {
    const pid_t child = fork();
    if (child == 0) {
        const struct rlimit small = {limit, RLIM_INFINITY}, all = {RLIM_INFINITY, RLIM_INFINITY};
        uint64_t digest;
        signal(SIGXFSZ, SIG_IGN);
        if (open_run(IFKV_OUTPUT_FRESH, RUN) != IFKV_OK) _exit(100);
        setrlimit(RLIMIT_FSIZE, &small);
        const ifkv_status status = write_kv_of("a", 0, N_CONTEXT, &digest);
        setrlimit(RLIMIT_FSIZE, &all);
        if (write_request(1) != IFKV_OK) exit(101);
        if (fixture_exists(fixture_path(dir, "a.kv0.h5"))) exit(102);
        close_run(); /* removes .tmp if it is empty */
        if (fixture_exists(fixture_path(dir, ".tmp"))) exit(103);
        exit((int)status); /* not _exit: HDF5's clean-up at exit is part of what is tested */
    }
    int wait_status;
    waitpid(child, &wait_status, 0);
    return WIFEXITED(wait_status) ? WEXITSTATUS(wait_status) : 1000 + WTERMSIG(wait_status);
}

static void a_full_disk_is_74_leaves_nothing_and_the_next_file_is_whole(void **state) {
    (void)state;
    ifkv_output_counts counts;
    assert_int_equal(run_under_file_limit(3000), IFKV_ERR_IO);
    assert_ok(verify(&counts));
    assert_int_equal(counts.n_file, 3);
}

static void a_line_that_does_not_fit_is_taken_back(void **state) {
    (void)state;
    const pid_t child = fork();
    if (child == 0) {
        /* the record fits, one more line behind what is there does not */
        const struct rlimit small = {1 << 20, RLIM_INFINITY};
        static char blank[(1 << 20) - 100];
        memset(blank, '\n', sizeof blank);
        signal(SIGXFSZ, SIG_IGN);
        if (open_run(IFKV_OUTPUT_FRESH, RUN) != IFKV_OK || ifkv_output_begin(out) != IFKV_OK)
            _exit(100);
        fixture_write(fixture_path(dir, "results.jsonl"), blank, sizeof blank);
        setrlimit(RLIMIT_FSIZE, &small);
        const ifkv_result result = fake_result(3);
        _exit((int)ifkv_output_record(out, 0, &result, 0, NULL));
    }
    int wait_status;
    size_t n;
    waitpid(child, &wait_status, 0);
    assert_int_equal(WEXITSTATUS(wait_status), IFKV_ERR_IO);
    free(fixture_read(fixture_path(dir, "results.jsonl"), &n));
    assert_int_equal(n, (1 << 20) - 100);
    assert_false(fixture_exists(fixture_path(dir, "manifest.jsonl")));
}

static pid_t start_writer(void) {
    const pid_t child = fork();
    if (child != 0) return child;
    if (open_run(IFKV_OUTPUT_RESUME, RUN) != IFKV_OK) _exit(100);
    for (int64_t i = 0; i < list->n; i++)
        if (!ifkv_output_is_done(out, i) && write_request(i) != IFKV_OK) _exit(101);
    _exit(ifkv_output_finish(out) == IFKV_OK ? 0 : 102);
}

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void start_over(void) {
    fixture_remove(dir);
    dir = fixture_dir();
}

static void a_kill_at_any_time_leaves_only_whole_files(void **state) {
    (void)state;
    enum { N_KILL = 50 };
    ifkv_output_counts counts;
    int wait_status, n_killed = 0;
    double whole = now_s();
    waitpid(start_writer(), &wait_status, 0);
    whole = now_s() - whole;
    assert_int_equal(wait_status, 0);
    for (int i = 0; i < N_KILL; i++) {
        start_over();
        const pid_t writer = start_writer();
        usleep((useconds_t)(1e6 * whole * (i + 1) / N_KILL));
        kill(writer, SIGKILL);
        waitpid(writer, &wait_status, 0);
        n_killed += WIFSIGNALED(wait_status);
        const ifkv_status status = verify(&counts);
        if (status != IFKV_ERR_NO_INPUT && status != IFKV_OK)
            fail_msg("killed at %d/%d: %s", i, N_KILL, said);
        write_run(IFKV_OUTPUT_RESUME, 3);
        assert_ok(verify(&counts));
        assert_true(counts.n_request == 3 && counts.n_file == 9 && counts.n_warning == 0);
        assert_lines("results.jsonl", "a", "../B", "c");
        assert_false(fixture_exists(fixture_path(dir, ".tmp")));
    }
    assert_true(n_killed > N_KILL / 4);
}

int main(void) {
    ifkv_h5_process_init();
#define TEST(name) cmocka_unit_test_setup_teardown(name, make_dir, remove_dir)
    const struct CMUnitTest tests[] = {
        TEST(plain_ids_are_their_own_names),
        TEST(names_are_never_paths_and_never_meet),
        TEST(the_key_depends_on_model_request_and_run),
        TEST(a_result_line_has_exactly_the_fields_of_the_contract),
        TEST(a_manifest_line_names_every_file_and_its_digest),
        TEST(a_record_holds_selection_scores_logits_and_scalars),
        TEST(selecting_nothing_writes_an_empty_dataset),
        TEST(scores_and_logits_are_left_out_unless_asked_for),
        TEST(kv_rows_come_back_as_written),
        TEST(a_rank_without_rows_writes_empty_datasets),
        TEST(equal_rows_give_equal_kv_files),
        TEST(a_failing_reader_leaves_no_kv_file),
        TEST(a_fresh_run_refuses_a_directory_with_results),
        TEST(a_run_that_wrote_nothing_leaves_a_fresh_directory),
        TEST(overwrite_removes_old_results_only_when_it_begins),
        TEST(resume_keeps_what_is_done_and_finishes_in_order),
        TEST(resume_of_nothing_is_a_fresh_run),
        TEST(resume_under_another_option_names_it),
        TEST(resume_of_a_changed_request_names_it),
        TEST(resume_without_a_finished_request_is_refused),
        TEST(resume_ignores_torn_lines),
        TEST(resume_drops_a_result_without_a_manifest_line),
        TEST(resume_computes_a_damaged_request_again),
        TEST(a_second_job_is_told_who_holds_the_directory),
        TEST(what_a_dead_job_left_is_removed),
        TEST(a_path_that_cannot_be_a_directory_is_73),
        TEST(verify_accepts_a_finished_run),
        TEST(verify_names_file_and_dataset_of_a_flipped_bit),
        TEST(verify_finds_a_flipped_bit_in_an_attribute),
        TEST(verify_finds_a_missing_file_and_a_bad_manifest_line),
        TEST(verify_warns_of_strays_and_torn_lines),
        TEST(verify_without_a_manifest_is_66),
        TEST(inspect_describes_records_kv_and_request_files),
        TEST(a_full_disk_is_74_leaves_nothing_and_the_next_file_is_whole),
        TEST(a_line_that_does_not_fit_is_taken_back),
        TEST(a_kill_at_any_time_leaves_only_whole_files),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
