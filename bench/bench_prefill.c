/* `ifkv bench prefill`: time to first token of methods over lengths, in one start.
 *
 * Inside the window: what results call ttft, from ids in memory behind a barrier to the first token
 * id.  Outside: start-up, model load, warm-up, and filling the chunk store of a warm method, in
 * host memory or in that of the device.  The methods of a length alternate, so that a slow minute
 * hits all of them.  With --project the ranks take turns on one device, and the rows are what as
 * many devices with given links would take. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "random.h"
#include "session.h"
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
    ifkv_request_list *list; /* of --requests; NULL: lengths */
    ifkv_model_info info;
    bench_method method[BENCH_MAX_METHOD];
    int64_t length[BENCH_MAX_LENGTH];
    int n_length, n_method, n_repeat, n_link;
    cli_link link[CLI_MAX_LINK];
    bench_rates rates;
    ifkv_timeline *timeline; /* owned by rank 0, shared by its threads; NULL: measured */
    bench_report *report;    /* rank 0 */
    bench_store *store;      /* of the case under way */
    int64_t n_pool_row;      /* rows of the largest share of a rank in any case */
    measurement *of;         /* [n_method] */
    float *exact;            /* [n_vocab] first logits of `full`, rank 0 */
    bool has_exact;
} bench_run;

/* ---- what to run ---- */

/* One part behind the method's name. */
static ifkv_status parse_part(const char *part, size_t n, bench_method *method) {
    IFKV_REQUIRE(n && !method->tier, IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "--methods: got \"%s\", expected method[/exchange][/warm|/warm-device]",
                 method->label);
    if (n == strlen("warm") && !strncmp(part, "warm", n))
        method->tier = BENCH_HOST;
    else if (n == strlen("warm-device") && !strncmp(part, "warm-device", n))
        method->tier = BENCH_DEVICE;
    else
        snprintf(method->exchange, sizeof method->exchange, "%.*s", (int)n, part);
    return IFKV_OK;
}

static ifkv_status parse_method(const char *text, size_t n, bench_method *method) {
    char shown[IFKV_QUOTE_BYTES];
    IFKV_REQUIRE(n > 0 && n < sizeof method->label, IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "--methods: got \"%s\", expected method[/exchange][/warm|/warm-device], ...",
                 ifkv_quote(text, n, shown));
    *method = (bench_method){.label = ""};
    memcpy(method->label, text, n);
    const size_t head = strcspn(method->label, "/");
    memcpy(method->method, method->label, head);
    for (char *part = method->label + head; *part == '/';) {
        const size_t length = strcspn(++part, "/");
        IFKV_TRY(parse_part(part, length, method));
        part += length;
    }
    return IFKV_OK;
}

static ifkv_status parse_methods(bench_run *run, const char *text) {
    for (;; text++) {
        const size_t n = strcspn(text, ",");
        IFKV_REQUIRE(run->n_method < BENCH_MAX_METHOD, IFKV_ERR_USAGE, IFKV_E_VALUE,
                     "--methods: expected at most %d", BENCH_MAX_METHOD);
        IFKV_TRY(parse_method(text, n, &run->method[run->n_method++]));
        if (!*(text += n)) return IFKV_OK;
    }
}

static const char *default_methods(const bench_run *run) {
    return ifkv_comm_size(run->comm) > 1
               ? "full,allgather,ring,infoflow/query,infoflow/delta,infoflow/warm"
               : "full,infoflow,infoflow/warm";
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

static ifkv_prefill_options method_options(const bench_run *run, const bench_method *method) {
    ifkv_prefill_options options = cli_prefill_options(run->options, NULL, NULL);
    options.method = method->method;
    if (*method->exchange) options.exchange = method->exchange;
    if (!run->options->requests) options.chunk = 0; /* cut already */
    options.max_new = 0;
    options.store = method->tier == BENCH_HOST ? bench_store_table(run->store) : NULL;
    options.pool = method->tier == BENCH_DEVICE ? "on" : "off";
    return options;
}

/* A row that names a tier has its whole context from there, as every rank counts. */
static ifkv_status check_tier(const bench_method *method, const ifkv_result *result) {
    const int64_t device = result->store_tokens_device,
                  found = method->tier == BENCH_DEVICE ? device : result->store_tokens_hit - device;
    if (!result->has_store && !result->has_pool) return IFKV_OK;
    IFKV_REQUIRE(found == result->n_context, IFKV_ERR_NUMERIC, IFKV_E_MISMATCH,
                 "bench: %s found %lld of %lld context tokens in its tier, expected all",
                 method->label, (long long)found, (long long)result->n_context);
    return IFKV_OK;
}

/* i_repeat < 0: not measured. */
static ifkv_status run_once(bench_run *run, const ifkv_request *request, int i_method,
                            int i_repeat) {
    const bench_method *method = &run->method[i_method];
    const bool is_recorded = run->timeline && i_repeat >= 0;
    const ifkv_prefill_options options = method_options(run, method);
    ifkv_session *session = NULL;
    ifkv_result result = {.size = sizeof result};
    if (is_recorded) ifkv_timeline_begin(run->timeline, run->comm);
    ifkv_status status = ifkv_session_open(run->engine, request, &options, &session);
    ifkv_timeline_end(run->comm);
    IFKV_TRY(status);
    IFKV_TRY_GOTO(status, ifkv_session_result(session, &result), out);
    judge(run, i_method, &result);
    if (i_repeat >= 0) {
        IFKV_TRY_GOTO(status, check_tier(method, &result), out);
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

/* Exact logits first, then warm-up, which fills store and pool, then the rounds. */
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
    for (int i = 0; i < run->n_method && run->options->warm_up == 0; i++)
        if (run->method[i].tier) IFKV_TRY(run_once(run, request, i, -1));
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

/* ---- all cases ---- */

typedef ifkv_status (*case_fn)(bench_run *run, const ifkv_request *request);

static ifkv_status each_case(bench_run *run, case_fn fn) {
    ifkv_status status = IFKV_OK;
    for (int64_t i = 0; run->list && i < run->list->n && status == IFKV_OK; i++)
        status = fn(run, &run->list->item[i].request);
    for (int i = 0; !run->list && i < run->n_length && status == IFKV_OK; i++) {
        ifkv_request request = {0};
        status = ifkv_comm_agree(run->comm, make_request(run, run->length[i], &request), NULL);
        if (status == IFKV_OK) status = fn(run, &request);
        free_request(&request);
    }
    return status;
}

/* What a rank keeps of a case is what the pool of warm-device has to hold, the same under every
 * selective method. */
static ifkv_status count_pool_rows(bench_run *run, const ifkv_request *request) {
    const bench_method any = {.method = "infoflow", .tier = BENCH_DEVICE};
    const ifkv_prefill_options options = method_options(run, &any);
    ifkv_session *session = NULL;
    size_t bytes;
    const ifkv_status status =
        ifkv_session_create(run->engine, request, &options, &session, &bytes);
    if (status == IFKV_OK && session->n_kept > run->n_pool_row) run->n_pool_row = session->n_kept;
    ifkv_session_destroy(session);
    return ifkv_comm_agree(run->comm, status, NULL);
}

static bool has_device_tier(const bench_run *run) {
    for (int i = 0; i < run->n_method; i++)
        if (run->method[i].tier == BENCH_DEVICE) return true;
    return false;
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
    IFKV_TRY(parse_methods(run, options->methods ? options->methods : default_methods(run)));
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

/* Without loading a model: what the cases and the engine will be.  On the CPU the device's memory
 * is the host's, and its tier has no row unless it is asked for. */
static ifkv_status plan_run(bench_run *run) {
    const ifkv_engine_options options = cli_engine_options(run->options, true);
    IFKV_TRY(ifkv_engine_open(run->comm, &options, &run->engine));
    run->info.size = sizeof run->info;
    ifkv_status status = ifkv_engine_info(run->engine, &run->info);
    if (status == IFKV_OK && !run->options->methods && strcmp(run->info.backend, "cpu"))
        status = parse_methods(run, "infoflow/warm-device");
    IFKV_TRY(ifkv_comm_agree(run->comm, status, NULL));
    if (run->options->requests)
        IFKV_TRY(
            cli_requests_load(run->comm, run->options->requests, run->info.n_vocab, &run->list));
    if (has_device_tier(run)) IFKV_TRY(each_case(run, count_pool_rows));
    IFKV_TRY(ifkv_comm_all_reduce_i64(run->comm, &run->n_pool_row, 1, IFKV_REDUCE_MAX));
    return IFKV_OK;
}

/* The engine of the runs, with a pool that just holds a rank's share of every case. */
static ifkv_status open_engine(bench_run *run) {
    ifkv_engine_options options = cli_engine_options(run->options, false);
    if (run->n_pool_row > 0)
        options.pool_bytes =
            ifkv_pool_bytes(run->engine->backend->ops->dtype, run->info.n_layer,
                            (int64_t)run->info.n_kv_head * run->info.d_head, run->n_pool_row);
    ifkv_engine_close(run->engine);
    run->engine = NULL;
    IFKV_TRY(ifkv_engine_open(run->comm, &options, &run->engine));
    return ifkv_engine_info(run->engine, &run->info);
}

static ifkv_status open_run(bench_run *run) {
    const cli_options *options = run->options;
    const bool is_first = ifkv_comm_rank(run->comm) == 0;
    IFKV_TRY(ifkv_comm_agree(run->comm, check_options(run), NULL));
    IFKV_TRY(share_timeline(run));
    IFKV_TRY(plan_run(run));
    ifkv_status status = open_engine(run);
    run->of = calloc((size_t)run->n_method, sizeof *run->of);
    if (is_first) run->exact = malloc((size_t)run->info.n_vocab * sizeof *run->exact);
    if (status == IFKV_OK && (!run->of || (is_first && !run->exact)))
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
    if (status == IFKV_OK) status = each_case(&run, run_case);
    if (status == IFKV_OK && run.report) status = bench_report_finish(run.report);
    if (status == IFKV_OK) status = ifkv_comm_agree(comm, status, NULL);
    bench_report_close(run.report);
    if (ifkv_comm_rank(comm) == 0) ifkv_timeline_destroy(run.timeline);
    ifkv_engine_close(run.engine);
    ifkv_requests_free(run.list);
    free(run.exact);
    free(run.of);
    return status;
}
