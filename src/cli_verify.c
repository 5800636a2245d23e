/* Commands verify, inspect and version.  See cli.h. */
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "cli.h"
#include "h5.h"
#include "output.h"
#include "status.h"

/* ---- verify OUT ---- */

static void say_finding(void *arg, bool is_error, const char *line) {
    (void)arg;
    fprintf(stderr, "ifkv: %s: %s\n", is_error ? "damaged" : "warning", line);
}

static ifkv_status verify_output(ifkv_comm *comm, const char *dir) {
    ifkv_status status = IFKV_OK;
    if (ifkv_comm_rank(comm) == 0) {
        ifkv_output_counts counts = {0};
        status = ifkv_output_verify(dir, say_finding, NULL, &counts);
        if (status == IFKV_OK)
            printf("%s: %lld requests, %lld files, all as they were written\n", dir,
                   (long long)counts.n_request, (long long)counts.n_file);
    }
    return ifkv_comm_agree(comm, status, NULL);
}

/* ---- verify --model --requests: recompute everything, compare with full prefill ---- */

/* Tolerance of algorithm section 8 for float32: relative L2 error of a tensor. */
static const double tolerance = 2e-5;

typedef struct distance {
    double difference, reference; /* sums of squares */
} distance;

static void add_distance(distance *sum, const float *a, const float *b, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const double d = (double)a[i] - (double)b[i];
        sum->difference += d * d;
        sum->reference += (double)b[i] * (double)b[i];
    }
}

static double relative(distance sum) {
    return sum.reference > 0 ? sqrt(sum.difference / sum.reference) : sqrt(sum.difference);
}

/* One method's K/V of all layers and its first logits, on rank 0. */
typedef struct outcome {
    float *kv;     /* [n_layer, 2, n_context, n_col] */
    float *logits; /* [n_vocab] */
} outcome;

static ifkv_status run_method(ifkv_comm *comm, ifkv_engine *engine, const ifkv_model_info *info,
                              const ifkv_request_item *item, const ifkv_prefill_options *options,
                              outcome *to) {
    const ifkv_request *request = &item->request;
    const int64_t n_context = request->n_prefix + request->chunk_offsets[request->n_chunk];
    const size_t layer = (size_t)(n_context * info->n_kv_head * info->d_head);
    ifkv_session *session = NULL;
    ifkv_result result = {.size = sizeof result};
    ifkv_status status = IFKV_OK;
    if (ifkv_comm_rank(comm) == 0) {
        to->kv = malloc(2 * (size_t)info->n_layer * layer * sizeof *to->kv);
        to->logits = malloc((size_t)info->n_vocab * sizeof *to->logits);
        if (!to->kv || !to->logits)
            status =
                IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                          "verify: out of memory for the K/V of %lld tokens", (long long)n_context);
    }
    IFKV_TRY(ifkv_comm_agree(comm, status, NULL));
    IFKV_TRY(ifkv_session_open(engine, request, options, &session));
    for (int l = 0; l < info->n_layer && status == IFKV_OK; l++) {
        float *k = to->kv ? to->kv + 2 * (size_t)l * layer : NULL;
        status = ifkv_session_kv_gather(session, l, k, k ? k + layer : NULL);
    }
    if (status == IFKV_OK) status = ifkv_session_result(session, &result);
    if (status == IFKV_OK && to->logits)
        memcpy(to->logits, result.first_logits, (size_t)info->n_vocab * sizeof *to->logits);
    ifkv_session_close(session);
    return status;
}

static ifkv_status compare(const ifkv_model_info *info, const ifkv_request_item *item,
                           const outcome *all, const outcome *full) {
    const ifkv_request *request = &item->request;
    const int64_t n_context = request->n_prefix + request->chunk_offsets[request->n_chunk];
    const int64_t layer = n_context * info->n_kv_head * info->d_head;
    double worst = 0;
    int worst_layer = 0;
    for (int l = 0; l < info->n_layer; l++)
        for (int is_v = 0; is_v < 2; is_v++) {
            distance sum = {0};
            const int64_t at = (2 * l + is_v) * layer;
            add_distance(&sum, all->kv + at, full->kv + at, layer);
            if (!(relative(sum) <= worst)) { /* also where it is NaN */
                worst = relative(sum);
                worst_layer = l;
            }
        }
    distance sum = {0};
    add_distance(&sum, all->logits, full->logits, info->n_vocab);
    const double logits = relative(sum);
    const bool is_good = worst <= tolerance && logits <= tolerance;
    printf("%-24.24s %8lld tokens: K/V %.2e (layer %d), logits %.2e, tolerance %.0e: %s\n",
           item->id, (long long)(n_context + request->n_prompt), worst, worst_layer, logits,
           tolerance, is_good ? "ok" : "FAILED");
    fflush(stdout);
    IFKV_REQUIRE(is_good, IFKV_ERR_NUMERIC, IFKV_E_MISMATCH,
                 "%s: every row recomputed against full prefill: got relative error %.2e, "
                 "expected at most %.0e",
                 item->where, worst > logits ? worst : logits, tolerance);
    return IFKV_OK;
}

static ifkv_status verify_item(ifkv_comm *comm, ifkv_engine *engine, const ifkv_model_info *info,
                               const cli_options *options, const ifkv_store *store,
                               const ifkv_request_item *item) {
    outcome all = {0}, full = {0};
    ifkv_prefill_options prefill = cli_prefill_options(options, item, store);
    prefill.max_new = 0;
    prefill.method = prefill.method ? prefill.method : "infoflow";
    prefill.ratio = "1";
    ifkv_status status = run_method(comm, engine, info, item, &prefill, &all);
    prefill.method = "full";
    if (status == IFKV_OK) status = run_method(comm, engine, info, item, &prefill, &full);
    if (status == IFKV_OK) {
        if (ifkv_comm_rank(comm) == 0) status = compare(info, item, &all, &full);
        status = ifkv_comm_agree(comm, status, NULL);
    }
    free(all.kv);
    free(all.logits);
    free(full.kv);
    free(full.logits);
    return status;
}

static ifkv_status verify_exactness(ifkv_comm *comm, const cli_options *options) {
    ifkv_engine *engine = NULL;
    ifkv_request_list *list = NULL;
    ifkv_chunk_store *store = NULL;
    ifkv_model_info info = {.size = sizeof info};
    const ifkv_engine_options engine_options = cli_engine_options(options, false);
    ifkv_status status;
    IFKV_TRY(cli_store_open(comm, options, &store));
    IFKV_TRY_GOTO(status, ifkv_engine_open(comm, &engine_options, &engine), out);
    IFKV_TRY_GOTO(status, ifkv_engine_info(engine, &info), out);
    IFKV_TRY_GOTO(status, cli_requests_load(comm, options->requests, info.n_vocab, &list), out);
    if (ifkv_comm_rank(comm) == 0)
        printf(
            "# method %s, every row recomputed, on %d ranks against full prefill on one; relative "
            "L2 error, worst layer\n",
            options->method ? options->method : "infoflow", ifkv_comm_size(comm));
    for (int64_t i = 0; i < list->n && status == IFKV_OK; i++)
        status = verify_item(comm, engine, &info, options, ifkv_chunk_store_table(store),
                             &list->item[i]);
out:
    ifkv_requests_free(list);
    ifkv_engine_close(engine);
    ifkv_chunk_store_close(store);
    return status;
}

ifkv_status cli_verify(ifkv_comm *comm, const cli_options *options) {
    ifkv_status status = IFKV_OK;
    if (options->n_argument == 0 && (!options->model || !options->requests))
        status = IFKV_FAIL(
            IFKV_ERR_USAGE, IFKV_E_ARGUMENT,
            "verify: got neither an output directory nor --model and --requests; see --help");
    IFKV_TRY(ifkv_comm_agree(comm, status, NULL));
    if (options->n_argument) IFKV_TRY(verify_output(comm, options->argument[0]));
    return options->requests ? verify_exactness(comm, options) : IFKV_OK;
}

/* ---- inspect ---- */

static ifkv_status inspect_model(ifkv_comm *comm, const char *path) {
    ifkv_engine *engine = NULL;
    ifkv_model_info info = {.size = sizeof info};
    ifkv_engine_options options = {.size = sizeof options, .model_dir = path, .check_only = true};
    ifkv_status status = ifkv_engine_open(comm, &options, &engine);
    if (status == IFKV_ERR_NO_INPUT && ifkv_last_error()->code == IFKV_E_TENSOR_FILE) {
        printf("%s: no weights, only the shape of a model\n", path);
        options.random_weights = true;
        status = ifkv_engine_open(comm, &options, &engine);
    }
    IFKV_TRY(status);
    status = ifkv_engine_info(engine, &info);
    if (status == IFKV_OK)
        printf("%s: model, family %s\n"
               "  layers %d, heads %d, key/value heads %d, d_head %d, d_model %d, d_ff %d\n"
               "  vocabulary %lld, positions %lld, rope theta %g, embeddings %s\n"
               "  parameters %lld, %.1f MB resident on back end %s, K/V %lld bytes a token\n"
               "  fingerprint %016llx\n",
               path, info.family, info.n_layer, info.n_head, info.n_kv_head, info.d_head,
               info.d_model, info.d_ff, (long long)info.n_vocab, (long long)info.max_position,
               info.rope_theta, info.is_tied ? "tied" : "untied", (long long)info.n_parameter,
               (double)info.weight_bytes / 1e6, info.backend,
               2LL * info.n_layer * info.n_kv_head * info.d_head * (int)info.element_bytes,
               (unsigned long long)info.fingerprint);
    ifkv_engine_close(engine);
    return status;
}

static ifkv_status inspect_h5(const char *path) {
    ifkv_h5_summary *summary = malloc(sizeof *summary);
    IFKV_REQUIRE(summary, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "inspect: out of memory");
    const ifkv_status status = ifkv_h5_inspect(path, summary);
    if (status == IFKV_OK) {
        printf("%s: HDF5, format %s %s\n", path, *summary->format ? summary->format : "not named",
               summary->format_version);
        for (int i = 0; i < summary->n_attribute && i < IFKV_H5_SUMMARY_ITEMS; i++)
            printf("  %-24s %s\n", summary->attribute[i].name, summary->attribute[i].value);
        for (int i = 0; i < summary->n_dataset && i < IFKV_H5_SUMMARY_ITEMS; i++) {
            printf("  /%s %s [",
                   summary->dataset[i].path[0] == '/' ? summary->dataset[i].path + 1
                                                      : summary->dataset[i].path,
                   summary->dataset[i].type);
            for (int d = 0; d < summary->dataset[i].n_dim; d++)
                printf("%s%lld", d ? ", " : "", (long long)summary->dataset[i].dim[d]);
            printf("]\n");
        }
        if (summary->n_dataset > IFKV_H5_SUMMARY_ITEMS)
            printf("  and %lld more datasets\n",
                   (long long)(summary->n_dataset - IFKV_H5_SUMMARY_ITEMS));
    }
    free(summary);
    return status;
}

static ifkv_status inspect_requests(ifkv_comm *comm, const char *path) {
    ifkv_request_list *list = NULL;
    IFKV_TRY(cli_requests_load(comm, path, 0, &list));
    printf("%s: %lld requests\n", path, (long long)list->n);
    for (int64_t i = 0; i < list->n; i++) {
        const ifkv_request *r = &list->item[i].request;
        char shown[IFKV_QUOTE_BYTES];
        printf("  %-24.24s prefix %lld, chunks %lld, context %lld, prompt %lld, question %lld "
               "tokens\n",
               ifkv_quote(list->item[i].id, strlen(list->item[i].id), shown),
               (long long)r->n_prefix, (long long)r->n_chunk,
               (long long)r->chunk_offsets[r->n_chunk], (long long)r->n_prompt,
               (long long)r->n_question);
    }
    ifkv_requests_free(list);
    return IFKV_OK;
}

ifkv_status cli_inspect(ifkv_comm *comm, const cli_options *options) {
    IFKV_REQUIRE(options->n_argument == 1, IFKV_ERR_USAGE, IFKV_E_ARGUMENT,
                 "inspect: got no path; see --help");
    if (ifkv_comm_rank(comm) != 0) return IFKV_OK;
    const char *path = options->argument[0];
    struct stat about;
    char shown[IFKV_QUOTE_BYTES];
    IFKV_REQUIRE(stat(path, &about) == 0, IFKV_ERR_NO_INPUT, IFKV_E_REQUEST_FILE,
                 "%s: no such file or directory", ifkv_quote(path, strlen(path), shown));
    if (S_ISDIR(about.st_mode)) return inspect_model(comm, path);
    unsigned char head[8] = {0};
    FILE *file = S_ISREG(about.st_mode) ? fopen(path, "re") : NULL;
    const size_t n = file ? fread(head, 1, sizeof head, file) : 0;
    if (file) fclose(file);
    return ifkv_h5_is_signature(head, n) ? inspect_h5(path) : inspect_requests(comm, path);
}

/* ---- version ---- */

ifkv_status cli_version(ifkv_comm *comm, const cli_options *options) {
    char hdf5[32];
    (void)options;
    if (ifkv_comm_rank(comm) != 0) return IFKV_OK;
    printf("ifkv %s\n  back ends: cpu%s\n  communicators: self thread%s%s\n  HDF5 %s, jansson %s\n",
           IFKV_VERSION, IFKV_HAVE_CUDA ? " cuda" : "", IFKV_HAVE_MPI ? " mpi" : "",
           IFKV_HAVE_MPI && IFKV_HAVE_NCCL ? " nccl" : "", ifkv_h5_version(hdf5),
           jansson_version_str());
    return IFKV_OK;
}
