/* The loop of a quality run.  See quality_loop.h. */
#include "quality_loop.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "quality_measure.h"
#include "request.h"

typedef struct quality_run {
    ifkv_engine *engine;
    const quality_options *options;
    ifkv_request_list *requests;
    quality_config_list configs;
    json_t *gold, *done; /* gold NULL: none given */
    FILE *out;
    int64_t n_made;
} quality_run;

static void show_progress(int64_t request, const quality_run *run, const char *config) {
    if (isatty(STDERR_FILENO))
        fprintf(stderr, "\rquality: request %lld of %lld, %s\033[K", (long long)request + 1,
                (long long)run->requests->n, config);
}

/* JSON has no NaN: what was not measured is null. */
static json_t *number(double value) {
    return value == value ? json_real(value) : json_null();
}

static json_t *numbers(const double *value, int64_t n) {
    json_t *list = json_array();
    for (int64_t i = 0; i < n && list; i++) json_array_append_new(list, number(value[i]));
    return list;
}

static json_t *ids(const int32_t *id, int64_t n) {
    json_t *list = json_array();
    for (int64_t i = 0; i < n && list; i++) json_array_append_new(list, json_integer(id[i]));
    return list;
}

static json_t *line_of(const quality_case *it, const char *id, int64_t position,
                       const quality_config *config, const quality_result *result) {
    char digest[17];
    snprintf(digest, sizeof digest, "%016llx", (unsigned long long)result->selected_digest);
    json_t *answer = result->answer ? ids(result->answer, result->n_answer) : json_null();
    return json_pack(
        "{s:s, s:I, s:s, s:O, s:I, s:I, s:I, s:s, s:I, s:I, s:o, s:o, s:o, s:o, s:o, s:o, s:o, "
        "s:o, s:o, s:o, s:{s:f, s:f, s:f, s:f, s:f, s:f}}",
        "id", id, "position", (json_int_t)position, "name", config->name, "config", config->json,
        "chunk", (json_int_t)it->chunk, "n_context", (json_int_t)it->n_context, "n_selected",
        (json_int_t)result->n_selected, "digest", digest, "n_greedy", (json_int_t)it->greedy.n,
        "n_gold", (json_int_t)it->gold.n, "kl_first", number(result->kl_first), "kl_greedy",
        number(result->kl_greedy), "nll_greedy", number(result->nll_greedy), "kl_gold",
        number(result->kl_gold), "nll_gold", number(result->nll_gold), "k_error",
        numbers(result->k_error, it->n_layer), "v_error", numbers(result->v_error, it->n_layer),
        "answer", answer, "stale_error", numbers(result->stale_error, 2), "fresh_error",
        numbers(result->fresh_error, 2), "ms", "full", it->full_ms, "encode", it->encode_ms,
        "score", result->score_ms, "recompute", result->recompute_ms, "prompt", result->prompt_ms,
        "decode", result->decode_ms);
}

static ifkv_status write_line(quality_run *run, json_t *line) {
    char *text = line ? json_dumps(line, JSON_COMPACT | JSON_REAL_PRECISION(7)) : NULL;
    json_decref(line);
    IFKV_REQUIRE(text, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "quality: out of host memory");
    const bool is_written = fprintf(run->out, "%s\n", text) > 0 && !fflush(run->out);
    free(text);
    IFKV_REQUIRE(is_written, IFKV_ERR_IO, IFKV_E_OUT_WRITE, "%s: cannot write: %s",
                 run->options->out, strerror(errno));
    run->n_made++;
    return IFKV_OK;
}

static ifkv_status save_scores(quality_case *it, const char *dir, const char *id) {
    const float *score = NULL;
    char path[4096];
    IFKV_TRY(quality_layer_scores(it, false, &score));
    snprintf(path, sizeof path, "%s/%s.f32", dir, id);
    FILE *file = fopen(path, "wb");
    IFKV_REQUIRE(file, IFKV_ERR_CANT_CREATE, IFKV_E_OUT_CREATE, "%s: cannot create: %s", path,
                 strerror(errno));
    const size_t n = (size_t)(it->n_layer * it->n_context);
    const bool is_written = fwrite(score, sizeof *score, n, file) == n;
    IFKV_REQUIRE(!fclose(file) && is_written, IFKV_ERR_IO, IFKV_E_OUT_WRITE, "%s: cannot write",
                 path);
    return IFKV_OK;
}

static ifkv_status run_configs(quality_run *run, quality_case *it, const char *id,
                               int64_t position) {
    if (run->options->scores) IFKV_TRY(save_scores(it, run->options->scores, id));
    for (int64_t i = 0; i < run->configs.n; i++) {
        const quality_config *config = &run->configs.item[i];
        quality_result result;
        if (quality_done_has(run->done, id, config)) continue;
        show_progress(position, run, config->name);
        IFKV_TRY(quality_measure(it, config, &result));
        json_t *line = line_of(it, id, position, config, &result);
        quality_result_fini(&result);
        IFKV_TRY(write_line(run, line));
    }
    return IFKV_OK;
}

static bool has_work(const quality_run *run, const char *id) {
    for (int64_t i = 0; i < run->configs.n; i++)
        if (!quality_done_has(run->done, id, &run->configs.item[i])) return true;
    return false;
}

static ifkv_status run_request(quality_run *run, int64_t position) {
    const ifkv_request_item *item = &run->requests->item[position];
    const quality_options *options = run->options;
    const json_t *gold = json_object_get(run->gold, item->id);
    const int64_t n_gold = (int64_t)json_array_size(gold);
    if (!has_work(run, item->id)) return IFKV_OK;
    show_progress(position, run, "full and encode");
    int32_t *token = malloc((size_t)n_gold * sizeof *token + 1);
    IFKV_REQUIRE(token, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "quality: out of host memory");
    for (int64_t i = 0; i < n_gold; i++)
        token[i] = (int32_t)json_integer_value(json_array_get(gold, (size_t)i));
    char path[4096] = "";
    if (options->snapshots)
        snprintf(path, sizeof path, "%s/%s-%lld.snapshot", options->snapshots, item->id,
                 (long long)options->chunk);
    quality_case it;
    ifkv_status status =
        quality_open(run->engine, &item->request, options->chunk, options->max_answer, token,
                     n_gold, options->snapshots ? path : NULL, &it);
    free(token);
    if (status != IFKV_OK) return status;
    status = run_configs(run, &it, item->id, position);
    quality_close(&it);
    return status;
}

static ifkv_status read_requests(quality_run *run) {
    ifkv_model_info info = {.size = sizeof info};
    char *text = NULL;
    size_t bytes = 0;
    bool is_h5 = false;
    IFKV_TRY(ifkv_engine_info(run->engine, &info));
    IFKV_TRY(ifkv_requests_read(run->options->requests, &text, &bytes, &is_h5));
    const ifkv_status status = ifkv_requests_parse(run->options->requests, text, bytes, is_h5,
                                                   info.n_vocab, &run->requests);
    free(text);
    return status;
}

static ifkv_status open_run(quality_run *run) {
    const quality_options *options = run->options;
    IFKV_TRY(read_requests(run));
    IFKV_TRY(quality_configs_read(options->configs, &run->configs));
    if (options->gold) IFKV_TRY(quality_gold_read(options->gold, &run->gold));
    IFKV_TRY(quality_done_read(options->out, &run->done));
    run->out = fopen(options->out, "ab");
    IFKV_REQUIRE(run->out, IFKV_ERR_CANT_CREATE, IFKV_E_OUT_CREATE, "%s: cannot open: %s",
                 options->out, strerror(errno));
    return IFKV_OK;
}

static void close_run(quality_run *run) {
    if (run->out) fclose(run->out); /* every line was flushed and checked */
    if (run->requests) ifkv_requests_free(run->requests);
    quality_configs_free(&run->configs);
    json_decref(run->gold);
    json_decref(run->done);
}

ifkv_status quality_loop(ifkv_engine *engine, const quality_options *options, int64_t *n_made_p) {
    quality_run run = {.engine = engine, .options = options};
    ifkv_status status = open_run(&run);
    for (int64_t i = 0, n = 0; status == IFKV_OK && i < run.requests->n; i++) {
        if (options->parity >= 0 && i % 2 != options->parity) continue;
        if (options->limit && n++ == options->limit) break;
        status = run_request(&run, i);
    }
    if (isatty(STDERR_FILENO)) fputc('\n', stderr);
    close_run(&run);
    *n_made_p = run.n_made;
    return status;
}
