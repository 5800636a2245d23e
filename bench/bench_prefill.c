/* `ifkv bench prefill`: time to first token of methods over lengths, in one start.
 *
 * Inside the window: what results call ttft, from ids in memory behind a barrier to the first token
 * id.  Outside: start-up, model load, warm-up, and filling the chunk store of a warm method.  The
 * methods of a length alternate, so that a slow minute hits all of them.  With --project the ranks
 * take turns on one device, and the rows are what as many devices with given links would take. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "random.h"
#include "status.h"

enum { PROMPT_TOKENS = 32, FIRST_ID = 10 };

typedef struct measurement {
    bench_row row; /* of measured rows */
    double stage[BENCH_MAX_REPEAT][IFKV_N_STAGE];
    ifkv_projection projected[CLI_MAX_LINK][BENCH_MAX_REPEAT];
} measurement;

typedef struct bench_run {
    ifkv_comm *comm;
    const cli_options *options;
    ifkv_engine *engine;
    ifkv_model_info info;
    bench_method method[BENCH_MAX_METHOD];
    int64_t length[BENCH_MAX_LENGTH];
    int n_length, n_method, n_repeat, n_link;
    cli_link link[CLI_MAX_LINK];
    bench_rates rates;
    ifkv_timeline *timeline; /* owned by rank 0, shared by its threads; NULL: measured */
    bench_report *report;    /* rank 0 */
    bench_store *store;      /* of the case under way */
    measurement *of;         /* [n_method] */
    float *exact;            /* [n_vocab] first logits of `full`, rank 0 */
    bool has_exact;
} bench_run;

/* ---- what to run ---- */

static ifkv_status parse_method(const char *text, size_t n, bench_method *method) {
    char shown[IFKV_QUOTE_BYTES];
    IFKV_REQUIRE(n > 0 && n < sizeof method->label, IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "--methods: got \"%s\", expected method[/exchange][/warm], ...",
                 ifkv_quote(text, n, shown));
    *method = (bench_method){.label = ""};
    memcpy(method->label, text, n);
    const size_t head = strcspn(method->label, "/");
    memcpy(method->method, method->label, head);
    for (char *part = method->label + head; *part == '/';) {
        const size_t length = strcspn(++part, "/");
        IFKV_REQUIRE(length && !method->is_warm, IFKV_ERR_USAGE, IFKV_E_VALUE,
                     "--methods: got \"%s\", expected method[/exchange][/warm]", method->label);
        if (length == 4 && !strncmp(part, "warm", 4))
            method->is_warm = true;
        else
            snprintf(method->exchange, sizeof method->exchange, "%.*s", (int)length, part);
        part += length;
    }
    return IFKV_OK;
}

static ifkv_status parse_methods(bench_run *run) {
    const char *text = run->options->methods;
    if (!text)
        text = ifkv_comm_size(run->comm) > 1
                   ? "full,allgather,ring,infoflow/query,infoflow/delta,infoflow/warm"
                   : "full,infoflow,infoflow/warm";
    for (;; text++) {
        const size_t n = strcspn(text, ",");
        IFKV_REQUIRE(run->n_method < BENCH_MAX_METHOD, IFKV_ERR_USAGE, IFKV_E_VALUE,
                     "--methods: expected at most %d", BENCH_MAX_METHOD);
        IFKV_TRY(parse_method(text, n, &run->method[run->n_method++]));
        if (!*(text += n)) return IFKV_OK;
    }
}

static bool is_full(const bench_method *method) {
    return !strcmp(method->method, "full");
}

/* Seeded ids of a length, in chunks behind a prefix of one id, the last of them the prompt. */
static ifkv_status make_request(const bench_run *run, int64_t n_token, ifkv_request *request) {
    const int64_t chunk = bench_chunk(run->options);
    const int64_t n_context = n_token - PROMPT_TOKENS, n_own = n_context - 1;
    const int64_t n_chunk = (n_own + chunk - 1) / chunk;
    int32_t *token = malloc((size_t)(n_token + 1) * sizeof *token);
    int64_t *offset = malloc((size_t)(n_chunk + 1) * sizeof *offset);
    if (!token || !offset) {
        free(token);
        free(offset);
        return IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "bench: out of memory");
    }
    const uint64_t n_id = (uint64_t)(run->info.n_vocab - FIRST_ID),
                   key = ifkv_random_u64(run->options->seed, (uint64_t)n_token);
    for (int64_t i = 0; i < n_token; i++)
        token[i] = FIRST_ID + (int32_t)(ifkv_random_u64(key, (uint64_t)i) % n_id);
    for (int64_t i = 0; i <= n_chunk; i++) offset[i] = i * chunk < n_own ? i * chunk : n_own;
    *request = (ifkv_request){.size = sizeof *request,
                              .prefix = token,
                              .n_prefix = 1,
                              .chunk_tokens = token + 1,
                              .chunk_offsets = offset,
                              .n_chunk = n_chunk,
                              .prompt = token + n_context,
                              .n_prompt = PROMPT_TOKENS};
    return IFKV_OK;
}

static void free_request(ifkv_request *request) {
    free((void *)request->prefix);
    free((void *)request->chunk_offsets);
    *request = (ifkv_request){0};
}

/* ---- one run ---- */

static double distance(const float *a, const float *b, int64_t n) {
    double square = 0, reference = 0;
    for (int64_t i = 0; i < n; i++) {
        const double d = (double)a[i] - (double)b[i];
        square += d * d;
        reference += (double)b[i] * (double)b[i];
    }
    return sqrt(square / (reference > 0 ? reference : 1));
}

/* The logits of the first run of `full` are what every other run of the length is held against. */
static void judge(bench_run *run, int i_method, const ifkv_result *result) {
    bench_row *row = &run->of[i_method].row;
    if (!run->exact) return;
    if (!run->has_exact)
        memcpy(run->exact, result->first_logits, (size_t)result->n_vocab * sizeof(float));
    run->has_exact = true;
    const double error = distance(result->first_logits, run->exact, result->n_vocab);
    if (!(error <= row->error)) row->error = error; /* NaN counts as the worst */
}

static void file_result(measurement *of, const ifkv_result *result, int i_repeat, bool has_time) {
    bench_row *row = &of->row;
    snprintf(row->exchange, sizeof row->exchange, "%s", result->exchange);
    row->n_token = result->n_context + result->n_prompt;
    row->n_selected = result->n_selected;
    row->bytes_total = result->bytes_total;
    memcpy(row->bytes, result->bytes, sizeof row->bytes);
    row->ttft_ms[i_repeat] = has_time ? result->ttft_ms : NAN;
    for (int stage = 0; stage < IFKV_N_STAGE; stage++)
        of->stage[i_repeat][stage] = has_time ? result->ms[stage] : NAN;
}

/* i_repeat < 0: not measured. */
static ifkv_status run_once(bench_run *run, const ifkv_request *request, int i_method,
                            int i_repeat) {
    const bench_method *method = &run->method[i_method];
    const bool is_recorded = run->timeline && i_repeat >= 0;
    ifkv_prefill_options options = cli_prefill_options(run->options, NULL, NULL);
    options.method = method->method;
    if (*method->exchange) options.exchange = method->exchange;
    if (!run->options->requests) options.chunk = 0; /* cut already */
    options.max_new = 0;
    options.store = method->is_warm ? bench_store_table(run->store) : NULL;
    ifkv_session *session = NULL;
    ifkv_result result = {.size = sizeof result};
    if (is_recorded) ifkv_timeline_begin(run->timeline, run->comm);
    ifkv_status status = ifkv_session_open(run->engine, request, &options, &session);
    ifkv_timeline_end(run->comm);
    IFKV_TRY(status);
    IFKV_TRY_GOTO(status, ifkv_session_result(session, &result), out);
    judge(run, i_method, &result);
    if (i_repeat >= 0) {
        bench_row *row = &run->of[i_method].row;
        file_result(&run->of[i_method], &result, i_repeat, !run->engine->backend->is_emulated);
        IFKV_TRY_GOTO(status, bench_cost(session, &run->rates, &row->flop, &row->floor_ms), out);
    }
    for (int i = 0; i < run->n_link && is_recorded && status == IFKV_OK; i++)
        if (ifkv_comm_rank(run->comm) == 0)
            status = ifkv_timeline_project(run->timeline, &run->link[i].link,
                                           &run->of[i_method].projected[i][i_repeat]);
    status = ifkv_comm_agree(run->comm, status, NULL);
out:
    ifkv_session_close(session);
    return status;
}

/* ---- one length ---- */

/* The measured row, or with links one projected row for each. */
static bench_row row_of(const bench_run *run, const measurement *of, int i_link) {
    bench_row row = of->row;
    if (run->timeline) {
        const ifkv_projection *projected = of->projected[i_link];
        row.link = &run->link[i_link];
        for (int i = 0; i < row.n_repeat; i++) row.ttft_ms[i] = projected[i].total_ms;
        const int median = bench_statistics(&row);
        memcpy(row.ms, projected[median].ms, sizeof row.ms);
        row.exposed_ms = projected[median].exposed_ms;
        row.compute_ms = projected[median].compute_ms;
    } else {
        memcpy(row.ms, of->stage[bench_statistics(&row)], sizeof row.ms);
    }
    return row;
}

static ifkv_status report_case(bench_run *run) {
    ifkv_status status = IFKV_OK;
    for (int i_link = 0; i_link < (run->timeline ? run->n_link : 1); i_link++) {
        double full_ms = 0;
        for (int i = 0; i < run->n_method; i++)
            if (is_full(&run->method[i])) full_ms = row_of(run, &run->of[i], i_link).median_ms;
        for (int i = 0; i < run->n_method && status == IFKV_OK; i++) {
            bench_row row = row_of(run, &run->of[i], i_link);
            row.speedup = full_ms > 0 || isnan(full_ms) ? full_ms / row.median_ms : 0;
            status = bench_report_row(run->report, &row);
        }
    }
    return status;
}

/* Exact logits first, then warm-up, which fills the store, then the rounds. */
static ifkv_status measure_case(bench_run *run, const ifkv_request *request) {
    int i_full = 0;
    for (int i = 0; i < run->n_method; i++) {
        run->of[i].row = (bench_row){.method = &run->method[i],
                                     .n_rank = ifkv_comm_size(run->comm),
                                     .n_repeat = run->n_repeat};
        if (is_full(&run->method[i])) i_full = i;
    }
    run->has_exact = false;
    IFKV_TRY(run_once(run, request, i_full, -1));
    for (int i = 0; i < run->n_method; i++)
        if (run->method[i].is_warm && run->options->warm_up == 0) {
            IFKV_TRY(run_once(run, request, i, -1));
            break;
        }
    for (int round = -(int)run->options->warm_up; round < run->n_repeat; round++)
        for (int i = 0; i < run->n_method; i++) {
            if (round < 0 && i == i_full) continue; /* had its own */
            IFKV_TRY(run_once(run, request, i, round));
        }
    return IFKV_OK;
}

static ifkv_status run_case(bench_run *run, const ifkv_request *request) {
    ifkv_status status = bench_store_create(&run->store);
    status = ifkv_comm_agree(run->comm, status, NULL);
    if (status == IFKV_OK) status = measure_case(run, request);
    if (status == IFKV_OK && run->report) status = report_case(run);
    bench_store_destroy(run->store);
    run->store = NULL;
    return ifkv_comm_agree(run->comm, status, NULL);
}

/* ---- all lengths ---- */

static ifkv_status run_lengths(bench_run *run) {
    ifkv_status status = IFKV_OK;
    for (int i = 0; i < run->n_length && status == IFKV_OK; i++) {
        ifkv_request request = {0};
        status = ifkv_comm_agree(run->comm, make_request(run, run->length[i], &request), NULL);
        if (status == IFKV_OK) status = run_case(run, &request);
        free_request(&request);
    }
    return status;
}

static ifkv_status run_requests(bench_run *run) {
    ifkv_request_list *list = NULL;
    IFKV_TRY(cli_requests_load(run->comm, run->options->requests, run->info.n_vocab, &list));
    ifkv_status status = IFKV_OK;
    for (int64_t i = 0; i < list->n && status == IFKV_OK; i++)
        status = run_case(run, &list->item[i].request);
    ifkv_requests_free(list);
    return status;
}

/* Everything that needs no other rank. */
static ifkv_status check_options(bench_run *run) {
    const cli_options *options = run->options;
    bool has_full = false;
    IFKV_REQUIRE(options->model, IFKV_ERR_USAGE, IFKV_E_ARGUMENT, "--model: got none; see --help");
    IFKV_TRY(bench_repeat_check(options));
    run->n_repeat = (int)options->repeat;
    IFKV_TRY(bench_lengths(options->lengths ? options->lengths : "2048,4096,8192",
                           PROMPT_TOKENS + 2, run->length, &run->n_length));
    IFKV_TRY(parse_methods(run));
    for (int i = 0; i < run->n_method; i++) has_full = has_full || is_full(&run->method[i]);
    IFKV_REQUIRE(has_full, IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "--methods: expected full among them: every error is held against it");
    if (!options->project) return IFKV_OK;
    IFKV_REQUIRE(!strcmp(ifkv_comm_name(run->comm), "thread"), IFKV_ERR_USAGE, IFKV_E_CONFLICT,
                 "--project: got communicator %s, expected thread: --ranks P",
                 ifkv_comm_name(run->comm));
    return cli_links_read(options->links ? options->links : "configs/links/nvlink4.json", run->link,
                          &run->n_link);
}

/* Rank 0 makes what its threads share. */
static ifkv_status share_timeline(bench_run *run) {
    ifkv_status status = IFKV_OK;
    if (!run->options->project) return IFKV_OK;
    if (ifkv_comm_rank(run->comm) == 0)
        status = ifkv_timeline_create(ifkv_comm_size(run->comm), &run->timeline);
    IFKV_TRY(ifkv_comm_agree(run->comm, status, NULL));
    return ifkv_comm_bcast(run->comm, &run->timeline, sizeof run->timeline, 0);
}

static ifkv_status open_run(bench_run *run) {
    const cli_options *options = run->options;
    const ifkv_engine_options engine_options = cli_engine_options(options, false);
    const bool is_first = ifkv_comm_rank(run->comm) == 0;
    IFKV_TRY(ifkv_comm_agree(run->comm, check_options(run), NULL));
    IFKV_TRY(share_timeline(run));
    IFKV_TRY(ifkv_engine_open(run->comm, &engine_options, &run->engine));
    run->info.size = sizeof run->info;
    ifkv_status status = ifkv_engine_info(run->engine, &run->info);
    run->of = calloc((size_t)run->n_method, sizeof *run->of);
    if (is_first) run->exact = malloc((size_t)run->info.n_vocab * sizeof *run->exact);
    if (!run->of || (is_first && !run->exact))
        status = IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "bench: out of memory");
    IFKV_TRY(ifkv_comm_agree(run->comm, status, NULL));
    if (run->timeline && run->engine->backend->is_emulated)
        status = IFKV_FAIL(IFKV_ERR_USAGE, IFKV_E_CONFLICT,
                           "--project: got an emulated device, whose times mean nothing");
    IFKV_TRY(ifkv_comm_agree(run->comm, status, NULL));
    IFKV_TRY(bench_rates_find(run->engine, options, run->timeline != NULL, &run->rates));
    if (is_first)
        status = bench_report_open(options, &run->info, ifkv_comm_name(run->comm),
                                   ifkv_comm_size(run->comm), &run->rates,
                                   run->engine->backend->is_emulated, &run->report);
    return ifkv_comm_agree(run->comm, status, NULL);
}

ifkv_status bench_prefill(ifkv_comm *comm, const cli_options *options) {
    bench_run run = {.comm = comm, .options = options};
    ifkv_status status = open_run(&run);
    if (status == IFKV_OK) status = options->requests ? run_requests(&run) : run_lengths(&run);
    if (status == IFKV_OK && run.report) status = bench_report_finish(run.report);
    if (status == IFKV_OK) status = ifkv_comm_agree(comm, status, NULL);
    bench_report_close(run.report);
    if (ifkv_comm_rank(comm) == 0) ifkv_timeline_destroy(run.timeline);
    ifkv_engine_close(run.engine);
    free(run.exact);
    free(run.of);
    return status;
}
