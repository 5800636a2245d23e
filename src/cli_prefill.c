/* Commands prefill and check.  See cli.h. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli.h"
#include "output.h"
#include "output_record.h"
#include "status.h"

enum { CONTEXT_CHUNK = 2048 }; /* of a request that gives its context uncut */

ifkv_engine_options cli_engine_options(const cli_options *options, bool check_only) {
    return (ifkv_engine_options){
        .size = sizeof(ifkv_engine_options),
        .model_dir = options->model,
        .backend = options->backend,
        .n_thread = (int)options->threads,
        .random_weights = options->has_random_weights,
        .seed = options->random_weights,
        .check_only = check_only,
        .pool_bytes = options->store_device,
    };
}

ifkv_prefill_options cli_prefill_options(const cli_options *options, const ifkv_request_item *item,
                                         const ifkv_store *store) {
    ifkv_prefill_options prefill = {
        .size = sizeof prefill,
        .method = options->method,
        .exchange = options->exchange,
        .ratio = options->ratio,
        .score = options->score,
        .score_rows = options->score_rows,
        .score_layers = options->score_layers,
        .geometry = options->geometry,
        .hp = options->hp,
        .scoring = options->scoring,
        .local_sink = options->local_sink,
        .reorder = options->reorder_force ? "force"
                   : options->reorder     ? "on"
                                          : NULL,
        .placement = options->placement,
        .chunk = options->chunk,
        .max_new = options->max_new,
        .seed = options->seed,
        .keep_scores = options->save_scores,
        .store = store,
        .epic_k = options->epic_k,
        .ride = options->ride,
        .refit = options->refit,
    };
    if (item && item->max_new >= 0) prefill.max_new = item->max_new;
    if (item && item->is_context && !options->chunk) prefill.chunk = CONTEXT_CHUNK;
    return prefill;
}

ifkv_status cli_requests_load(ifkv_comm *comm, const char *path, int64_t n_vocab,
                              ifkv_request_list **list_p) {
    struct {
        uint64_t bytes;
        bool is_h5;
    } head = {0, false};
    char *text = NULL;
    size_t bytes = 0;
    ifkv_status status = IFKV_OK;
    if (ifkv_comm_rank(comm) == 0) {
        status = ifkv_requests_read(path, &text, &bytes, &head.is_h5);
        head.bytes = bytes;
    }
    IFKV_TRY_GOTO(status, ifkv_comm_agree(comm, status, NULL), out);
    IFKV_TRY_GOTO(status, ifkv_comm_bcast(comm, &head, sizeof head, 0), out);
    if (!text) text = malloc((size_t)head.bytes + 1);
    if (!text)
        status =
            IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "requests: out of memory for %llu bytes",
                      (unsigned long long)head.bytes);
    IFKV_TRY_GOTO(status, ifkv_comm_agree(comm, status, NULL), out);
    IFKV_TRY_GOTO(status, ifkv_comm_bcast(comm, text, (size_t)head.bytes, 0), out);
    status = ifkv_requests_parse(path, text, (size_t)head.bytes, head.is_h5, n_vocab, list_p);
    status = ifkv_comm_agree(comm, status, NULL);
out:
    free(text);
    return status;
}

ifkv_status cli_requests_plan(ifkv_engine *engine, const cli_options *options,
                              const ifkv_request_list *list, const ifkv_store *store,
                              size_t *bytes_p) {
    size_t most = 0;
    for (int64_t i = 0; i < list->n; i++) {
        const ifkv_request_item *item = &list->item[i];
        const ifkv_prefill_options prefill = cli_prefill_options(options, item, store);
        size_t bytes = 0;
        const ifkv_status status = ifkv_engine_plan(engine, &item->request, &prefill, &bytes);
        if (status != IFKV_OK) {
            const ifkv_error error = *ifkv_last_error();
            char text[1024];
            snprintf(text, sizeof text, "%s", error.text);
            return IFKV_FAIL(status, error.code, "%s: %s", item->where,
                             text); /* the engine knows no files */
        }
        if (bytes > most) most = bytes;
    }
    *bytes_p = most;
    return IFKV_OK;
}

/* ---- progress ---- */

void cli_progress_init(cli_progress *progress, ifkv_comm *comm, const cli_options *options,
                       int64_t n_request) {
    /* ranks see a terminal on standard output even where mpirun writes to a file: only standard
     * error is honest, and under a launcher lines of several processes would mix */
    const bool is_launched =
        getenv("OMPI_COMM_WORLD_SIZE") || getenv("PMIX_RANK") || getenv("SLURM_STEP_ID");
    *progress = (cli_progress){
        .is_on = ifkv_comm_rank(comm) == 0 && !options->quiet && isatty(2) && !is_launched,
        .n_request = n_request,
    };
}

void cli_progress_show(void *arg, ifkv_stage stage, int64_t done, int64_t total) {
    const cli_progress *progress = arg;
    if (progress->is_on)
        fprintf(stderr, "\r\033[K%.40s (%lld of %lld): %s %lld/%lld", progress->id,
                (long long)progress->i_request + 1, (long long)progress->n_request,
                ifkv_stage_name(stage), (long long)done, (long long)total);
}

void cli_progress_clear(const cli_progress *progress) {
    if (progress->is_on) fputs("\r\033[K", stderr);
}

/* ---- table ---- */

static void print_head(const ifkv_result *result) {
    printf("# method %s, exchange %s, backend %s on %s, comm %s, ranks %d; milliseconds, maximum "
           "over ranks\n",
           result->method, result->exchange, result->backend, result->device, result->comm,
           result->n_rank);
    printf("%-24s %8s %8s", "# request", "tokens", "selected");
    for (int stage = 0; stage < IFKV_STAGE_DECODE; stage++)
        printf(" %9s", ifkv_stage_name((ifkv_stage)stage));
    printf(" %9s %9s %6s %9s%s%s%s\n", "ttft", "decode", "answer", "MB moved",
           result->has_store ? "     disk" : "", result->has_pool ? "   device" : "",
           result->has_store || result->has_pool ? "   store" : "");
}

/* Tokens from each tier; then cold, warm, or the share of the context that was found. */
static void print_store(const ifkv_result *result) {
    const long long device = result->store_tokens_device;
    if (!result->has_store && !result->has_pool) return;
    if (result->has_store) printf(" %8lld", (long long)result->store_tokens_hit - device);
    if (result->has_pool) printf(" %8lld", device);
    if (result->store_hits > 0 && result->store_misses > 0)
        printf(" %6.1f%%", 100.0 * (double)result->store_tokens_hit / (double)result->n_context);
    else
        printf(" %7s", result->store_hits > 0 ? "warm" : "cold");
}

static void print_row(const ifkv_request_item *item, const ifkv_result *result) {
    char shown[IFKV_QUOTE_BYTES];
    printf("%-24.24s %8lld %8lld", ifkv_quote(item->id, strlen(item->id), shown),
           (long long)(result->n_context + result->n_prompt), (long long)result->n_selected);
    for (int stage = 0; stage < IFKV_STAGE_DECODE; stage++) {
        if (result->rode[stage])
            printf(" %9s", "rode"); /* its zero is not a time */
        else
            printf(" %9.1f", result->ms[stage]);
    }
    printf(" %9.1f %9.1f %6lld %9.2f", result->ttft_ms, result->ms[IFKV_STAGE_DECODE],
           (long long)result->n_answer, (double)result->bytes_total / 1e6);
    print_store(result);
    putchar('\n');
    fflush(stdout);
}

/* What was left to ifkv, and what it goes by. */
static void print_choices(const cli_options *options, const ifkv_request_item *item,
                          const ifkv_result *result) {
    char shown[IFKV_QUOTE_BYTES];
    ifkv_quote(item->id, strlen(item->id), shown);
    if (options->quiet) return;
    if (*result->auto_exact)
        fprintf(stderr, "ifkv: %s: method auto: %s: estimates: %s %.1f ms, infoflow %.1f ms\n",
                shown, result->method, result->auto_exact, result->auto_exact_ms,
                result->auto_infoflow_ms);
    if (options->exchange && *result->exchange_choice)
        fprintf(stderr, "ifkv: %s: exchange auto: %s\n", shown, result->exchange_choice);
}

static ifkv_status print_result(const cli_options *options, const ifkv_request_item *item,
                                const ifkv_result *result, bool is_first) {
    if (options->json) {
        char *line = NULL;
        IFKV_TRY(ifkv_output_result_line(item, result, &line));
        fputs(line, stdout);
        fflush(stdout);
        free(line);
    } else if (!options->quiet) {
        if (is_first) print_head(result);
        print_row(item, result);
    }
    return IFKV_OK;
}

/* ---- prefill ---- */

typedef struct prefill_run {
    ifkv_comm *comm;
    const cli_options *options;
    ifkv_request_list *list;
    ifkv_engine *engine;
    ifkv_output *output;     /* rank 0 */
    ifkv_chunk_store *store; /* NULL: none */
    ifkv_output_options output_options;
    uint64_t fingerprint;
    uint8_t *is_done; /* [list->n] by an earlier run */
    cli_progress progress;
    char what[1024]; /* options that the results depend on */
} prefill_run;

static ifkv_status require_option(const char *value, const char *name) {
    IFKV_REQUIRE(value, IFKV_ERR_USAGE, IFKV_E_ARGUMENT, "--%s: got none; see --help", name);
    return IFKV_OK;
}

/* Everything up to the first weight: model directory, requests, plan.  The order is that of
 * faults 2.4. */
static ifkv_status validate(prefill_run *run, size_t *bytes_p, ifkv_engine **engine_p) {
    const ifkv_engine_options options = cli_engine_options(run->options, true);
    ifkv_model_info info = {.size = sizeof info};
    IFKV_TRY(ifkv_engine_open(run->comm, &options, engine_p));
    IFKV_TRY(ifkv_engine_info(*engine_p, &info));
    run->fingerprint = info.fingerprint;
    if (!run->options->requests) return IFKV_OK;
    IFKV_TRY(cli_requests_load(run->comm, run->options->requests, info.n_vocab, &run->list));
    return ifkv_comm_agree(run->comm,
                           cli_requests_plan(*engine_p, run->options, run->list,
                                             ifkv_chunk_store_table(run->store), bytes_p),
                           NULL);
}

static const char *or_default(const char *value, const char *initial) {
    return value ? value : initial;
}

static ifkv_status open_output(prefill_run *run) {
    const cli_options *o = run->options;
    /* what is not exact sees other keys for other ranks; every other result is the same for any
     * number of them */
    const char *exchange = or_default(o->exchange, "auto");
    const bool is_local = o->scoring && !strcmp(o->scoring, "local");
    const bool is_auto = o->method && !strcmp(o->method, "auto");
    const bool is_rank_bound =
        !strcmp(exchange, "kv") || !strcmp(exchange, "local") || is_local || is_auto;
    snprintf(run->what, sizeof run->what,
             "method=%s;ratio=%s;exchange=%s;chunk=%lld;score=%s;score_rows=%s;score_layers=%s;"
             "geometry=%s;hp=%s;max_new=%lld;seed=%llu;epic_k=%lld;%s"
             "weights=%s%llu;backend=%s;ranks=%d;save_kv=%d;save_logits=%d;save_scores=%d%s%s%s",
             or_default(o->method, "infoflow"), or_default(o->ratio, "0.15"), exchange,
             (long long)o->chunk, or_default(o->score, "l2"), or_default(o->score_rows, "question"),
             or_default(o->score_layers, "wide"), or_default(o->geometry, "global"),
             or_default(o->hp, "shared"), (long long)o->max_new, (unsigned long long)o->seed,
             (long long)(o->epic_k ? o->epic_k : 16), o->refit ? "refit=1;" : "",
             o->has_random_weights ? "random-" : "file-", (unsigned long long)o->random_weights,
             or_default(o->backend, "auto"),
             is_rank_bound || o->save_kv ? ifkv_comm_size(run->comm) : 0, o->save_kv,
             o->save_logits, o->save_scores,
             /* what is in it changes nothing, that it is used does, in whatever tier */
             o->store || o->store_device ? ";store=1" : "",
             !is_local       ? ""
             : o->local_sink ? ";scoring=local;local_sink=1"
                             : ";scoring=local",
             o->reorder_force || o->reorder ? ";reorder=1" : "");
    run->output_options = (ifkv_output_options){
        .dir = o->out,
        .mode = o->resume      ? IFKV_OUTPUT_RESUME
                : o->overwrite ? IFKV_OUTPUT_OVERWRITE
                               : IFKV_OUTPUT_FRESH,
        .fingerprint = run->fingerprint,
        .run = run->what,
        .requests = run->list,
        .save_scores = o->save_scores,
        .save_logits = o->save_logits,
    };
    ifkv_status status = IFKV_OK;
    if (ifkv_comm_rank(run->comm) == 0)
        status = ifkv_output_open(&run->output_options, &run->output);
    return ifkv_comm_agree(run->comm, status, NULL);
}

static ifkv_status begin_output(prefill_run *run) {
    ifkv_status status = IFKV_OK;
    run->is_done = calloc((size_t)run->list->n, 1);
    if (!run->is_done) status = IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "out of memory");
    if (status == IFKV_OK && run->output) status = ifkv_output_begin(run->output);
    IFKV_TRY(ifkv_comm_agree(run->comm, status, NULL));
    for (int64_t i = 0; run->output && i < run->list->n; i++)
        run->is_done[i] = ifkv_output_is_done(run->output, i);
    return ifkv_comm_bcast(run->comm, run->is_done, (size_t)run->list->n, 0);
}

static ifkv_status read_layer(void *session, int layer, float *k, float *v) {
    return ifkv_session_kv_read(session, layer, k, v);
}

/* Every rank writes its own K/V file; digest [size] of all of them on every rank. */
static ifkv_status save_kv(prefill_run *run, ifkv_session *session, const ifkv_request_item *item,
                           uint64_t *digest) {
    const int rank = ifkv_comm_rank(run->comm), size = ifkv_comm_size(run->comm);
    ifkv_kv_rows rows = {.size = sizeof rows};
    uint64_t own = 0;
    ifkv_status status = ifkv_session_kv_rows(session, &rows);
    const ifkv_output_kv_options options = {
        .dir = run->options->out,
        .id = item->id,
        .fingerprint = run->fingerprint,
        .rank = rank,
        .n_rank = size,
        .rows = &rows,
        .read = read_layer,
        .read_arg = session,
    };
    /* threads of one process take turns: the file library need not be thread-safe */
    const bool is_shared = !strcmp(ifkv_comm_name(run->comm), "thread");
    for (int turn = 0; turn < (is_shared ? size : 1); turn++) {
        if (status == IFKV_OK && (!is_shared || turn == rank))
            status = ifkv_output_kv(&options, &own);
        IFKV_TRY(ifkv_comm_agree(run->comm, status, NULL));
    }
    return ifkv_comm_gather(run->comm, &own, sizeof own, digest);
}

static ifkv_status run_session(prefill_run *run, int64_t i, bool is_first, uint64_t *digest) {
    const ifkv_request_item *item = &run->list->item[i];
    ifkv_prefill_options options =
        cli_prefill_options(run->options, item, ifkv_chunk_store_table(run->store));
    run->progress.id = item->id;
    run->progress.i_request = i;
    options.progress = cli_progress_show;
    options.progress_arg = &run->progress;
    options.stop = cli_stop_is_asked;
    ifkv_session *session = NULL;
    ifkv_result result = {.size = sizeof result};
    ifkv_status status;
    IFKV_TRY(ifkv_session_open(run->engine, &item->request, &options, &session));
    IFKV_TRY_GOTO(status, ifkv_session_decode(session), out);
    IFKV_TRY_GOTO(status, ifkv_session_result(session, &result), out);
    if (run->options->save_kv) IFKV_TRY_GOTO(status, save_kv(run, session, item, digest), out);
    if (run->output) {
        const int n_kv = run->options->save_kv ? ifkv_comm_size(run->comm) : 0;
        status = ifkv_output_record(run->output, i, &result, n_kv, digest);
        cli_progress_clear(&run->progress);
        print_choices(run->options, item, &result);
        if (status == IFKV_OK) status = print_result(run->options, item, &result, is_first);
    }
    status = ifkv_comm_agree(run->comm, status, NULL);
out:
    ifkv_session_close(session);
    return status;
}

/* The library knows of one request only. */
static ifkv_status explain_stop(const prefill_run *run, ifkv_status status) {
    if (ifkv_last_error()->code != IFKV_E_INTERRUPTED) return status;
    status = IFKV_FAIL(status, IFKV_E_INTERRUPTED,
                       "stopped by a signal at request %lld of %lld; what is finished is kept, "
                       "--resume goes on from there",
                       (long long)run->progress.i_request + 1, (long long)run->list->n);
    ifkv_error_share(0);
    return status;
}

static ifkv_status run_requests(prefill_run *run) {
    uint64_t *digest = calloc((size_t)ifkv_comm_size(run->comm), sizeof *digest);
    IFKV_REQUIRE(digest, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "out of memory");
    ifkv_status status = IFKV_OK;
    bool is_first = true;
    cli_progress_init(&run->progress, run->comm, run->options, run->list->n);
    for (int64_t i = 0; i < run->list->n && status == IFKV_OK; i++) {
        if (run->is_done[i]) continue;
        status = run_session(run, i, is_first, digest);
        is_first = false;
    }
    free(digest);
    if (status != IFKV_OK) return explain_stop(run, status);
    if (run->output) status = ifkv_output_finish(run->output);
    return ifkv_comm_agree(run->comm, status, NULL);
}

static ifkv_status print_rates(prefill_run *run) {
    ifkv_rates rates = {.size = sizeof rates};
    if (!run->options->method || strcmp(run->options->method, "auto")) return IFKV_OK;
    IFKV_TRY(ifkv_engine_measure(run->engine, &rates));
    if (ifkv_comm_rank(run->comm) > 0 || run->options->quiet) return IFKV_OK;
    fprintf(
        stderr,
        "ifkv: rates of a rank: matmul %.1f GFLOP/s, attention %.1f GFLOP/s, weights %.2f GB/s, "
        "passes %.2f GB/s",
        1e-9 * rates.matmul, 1e-9 * rates.attention, 1e-9 * rates.memory, 1e-9 * rates.passes);
    if (rates.link > 0)
        fprintf(stderr, ", link %.2f GB/s and %.1f us a message", 1e-9 * rates.link,
                1e6 * rates.message_s);
    fputc('\n', stderr);
    return IFKV_OK;
}

static ifkv_status load_and_run(prefill_run *run, size_t bytes) {
    const ifkv_engine_options options = cli_engine_options(run->options, false);
    IFKV_TRY(ifkv_engine_open(run->comm, &options, &run->engine));
    IFKV_TRY(ifkv_comm_agree(run->comm, ifkv_engine_reserve(run->engine, bytes), NULL));
    IFKV_TRY(print_rates(run));
    IFKV_TRY(begin_output(run));
    return run_requests(run);
}

static void run_fini(prefill_run *run) {
    ifkv_output_close(run->output);
    ifkv_engine_close(run->engine);
    ifkv_requests_free(run->list);
    ifkv_chunk_store_close(run->store);
    free(run->is_done);
}

ifkv_status cli_prefill(ifkv_comm *comm, const cli_options *options) {
    prefill_run run = {.comm = comm, .options = options};
    cli_stop_watch();
    const ifkv_prefill_options prefill = cli_prefill_options(options, NULL, NULL);
    ifkv_engine *checked = NULL;
    size_t bytes = 0;
    ifkv_status status = require_option(options->model, "model");
    if (status == IFKV_OK) status = require_option(options->requests, "requests");
    if (status == IFKV_OK) status = require_option(options->out, "out");
    if (status == IFKV_OK) status = ifkv_prefill_options_check(&prefill);
    IFKV_TRY(ifkv_comm_agree(comm, status, NULL));
    status = cli_store_open(comm, options, &run.store);
    if (status == IFKV_OK) status = validate(&run, &bytes, &checked);
    if (status == IFKV_OK) status = open_output(&run);
    ifkv_engine_close(checked);
    if (status == IFKV_OK) status = load_and_run(&run, bytes);
    run_fini(&run);
    return status;
}

/* ---- check ---- */

ifkv_status cli_check(ifkv_comm *comm, const cli_options *options) {
    prefill_run run = {.comm = comm, .options = options};
    const ifkv_prefill_options prefill = cli_prefill_options(options, NULL, NULL);
    ifkv_engine *engine = NULL;
    ifkv_model_info info = {.size = sizeof info};
    size_t bytes = 0;
    ifkv_status status = require_option(options->model, "model");
    if (status == IFKV_OK) status = ifkv_prefill_options_check(&prefill);
    IFKV_TRY(ifkv_comm_agree(comm, status, NULL));
    IFKV_TRY_GOTO(status, cli_store_open(comm, options, &run.store), out);
    IFKV_TRY_GOTO(status, validate(&run, &bytes, &engine), out);
    if (options->out && run.list) IFKV_TRY_GOTO(status, open_output(&run), out);
    IFKV_TRY_GOTO(status, ifkv_engine_info(engine, &info), out);
    int64_t most = (int64_t)bytes, *all = malloc((size_t)ifkv_comm_size(comm) * sizeof *all);
    if (!all) status = IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "out of memory");
    IFKV_TRY_GOTO(status, ifkv_comm_agree(comm, status, NULL), out_all);
    IFKV_TRY_GOTO(status, ifkv_comm_gather(comm, &most, sizeof most, all), out_all);
    for (int r = 0; r < ifkv_comm_size(comm); r++)
        if (all[r] > most) most = all[r];
    if (ifkv_comm_rank(comm) == 0) {
        printf("model     %s: %s, %d layers, %.1f M parameters, fingerprint %016llx\n",
               options->model, info.family, info.n_layer, (double)info.n_parameter / 1e6,
               (unsigned long long)info.fingerprint);
        if (run.list)
            printf("requests  %s: %lld valid\n", options->requests, (long long)run.list->n);
        printf("memory    of a rank of %d: %.1f MB weights", ifkv_comm_size(comm),
               (double)info.weight_bytes / 1e6);
        if (info.pool_bytes)
            printf(" + %.1f MB for %lld tokens of chunks it keeps", (double)info.pool_bytes / 1e6,
                   (long long)info.pool_rows);
        if (run.list) printf(" + %.1f MB for the longest request", (double)most / 1e6);
        printf("\nok\n");
    }
out_all:
    free(all);
out:
    ifkv_engine_close(engine);
    run_fini(&run);
    return status;
}
