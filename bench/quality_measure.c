/* Measure configurations of one request.  See quality_measure.h. */
#include "quality_measure.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define NO_MEMORY(what) IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, what ": out of host memory")

void quality_log_softmax(const float *logits, int64_t n, double *log_p) {
    double top = -INFINITY, sum = 0;
    for (int64_t i = 0; i < n; i++) top = logits[i] > top ? (double)logits[i] : top;
    for (int64_t i = 0; i < n; i++) sum += exp((double)logits[i] - top);
    const double lse = top + log(sum);
    for (int64_t i = 0; i < n; i++) log_p[i] = (double)logits[i] - lse;
}

double quality_kl(const double *log_p, const double *log_q, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += exp(log_p[i]) * (log_p[i] - log_q[i]);
    return sum;
}

const float *quality_rows(const quality_case *it, const float *snapshot, bool is_v, int layer) {
    const int64_t n = it->n_context * it->n_col;
    return snapshot + ((is_v ? it->n_layer : 0) + layer) * n;
}

static size_t layer_bytes(const quality_case *it) {
    return (size_t)(it->n_context * it->n_col) * sizeof(float);
}

static ifkv_status load_rows(const quality_case *it, ifkv_session *session, const float *snapshot) {
    ifkv_backend *backend = it->engine->backend;
    for (int layer = 0; layer < it->n_layer; layer++) {
        const ifkv_view k = ifkv_kvcache_k(&session->cache, layer),
                        v = ifkv_kvcache_v(&session->cache, layer);
        IFKV_TRY(backend->ops->upload(backend, k.data, quality_rows(it, snapshot, false, layer),
                                      layer_bytes(it)));
        IFKV_TRY(backend->ops->upload(backend, v.data, quality_rows(it, snapshot, true, layer),
                                      layer_bytes(it)));
    }
    return IFKV_OK;
}

static ifkv_status save_rows(const quality_case *it, ifkv_session *session, float **snapshot_p) {
    float *snapshot = malloc(2 * (size_t)it->n_layer * layer_bytes(it));
    if (!snapshot) return NO_MEMORY("quality snapshot");
    *snapshot_p = snapshot;
    for (int layer = 0; layer < it->n_layer; layer++)
        IFKV_TRY(ifkv_session_kv_read(session, layer,
                                      (float *)quality_rows(it, snapshot, false, layer),
                                      (float *)quality_rows(it, snapshot, true, layer)));
    return IFKV_OK;
}

ifkv_status quality_session(quality_case *it, const ifkv_prefill_options *options,
                            const float *snapshot, bool has_question, ifkv_session **session_p) {
    ifkv_request request = it->planned;
    if (!has_question) { /* the prompt scores, without the room behind it */
        request.question = it->request->prompt;
        request.n_question = it->request->n_prompt;
    }
    ifkv_prefill_options apart = *options;
    apart.ride = "none"; /* stages run one by one, over rows that are there already */
    ifkv_session *session = NULL;
    size_t bytes = 0;
    ifkv_status status = ifkv_session_create(it->engine, &request, &apart, &session, &bytes);
    if (status != IFKV_OK) return status;
    IFKV_TRY_GOTO(status, ifkv_engine_reserve(it->engine, bytes), err_destroy);
    ifkv_arena arena = {.base = it->engine->arena};
    ifkv_session_layout(session, &arena);
    ifkv_session_spread_tokens(session);
    if (snapshot) IFKV_TRY_GOTO(status, load_rows(it, session, snapshot), err_destroy);
    *session_p = session;
    return IFKV_OK;
err_destroy:
    ifkv_session_destroy(session);
    return status;
}

/* Run the prompt and n forced tokens behind it as one pass over the context as it is now. */
static ifkv_status run_prompt(const quality_case *it, ifkv_session *session, const int32_t *token,
                              int64_t n) {
    if (n) memcpy(session->token + it->n_context + it->n_prompt, token, (size_t)n * sizeof *token);
    session->cache.n_row = session->n_kept; /* forget the rows of an earlier pass */
    session->n_prompt = it->n_prompt + n;
    return ifkv_prefill_prompt(session);
}

/* Log-probabilities of the whole vocabulary at every forced token: [n, n_vocab]. */
static ifkv_status force(const quality_case *it, ifkv_session *session,
                         const quality_forced *forced, double *log_p) {
    ifkv_backend *backend = it->engine->backend;
    if (!forced->n) return IFKV_OK;
    IFKV_TRY(run_prompt(it, session, forced->token, forced->n - 1));
    for (int64_t i = 0; i < forced->n; i++) {
        IFKV_TRY(ifkv_pass_logits(&session->prompt, backend, it->n_prompt - 1 + i,
                                  &session->logits_view));
        IFKV_TRY(backend->ops->download(backend, session->logits, session->logits_view.data,
                                        (size_t)it->n_vocab * sizeof *session->logits));
        quality_log_softmax(session->logits, it->n_vocab, log_p + i * it->n_vocab);
    }
    return IFKV_OK;
}

static ifkv_status decode(const quality_case *it, ifkv_session *session) {
    IFKV_TRY(run_prompt(it, session, NULL, 0));
    session->n_answer = 0;
    session->is_stopped = false;
    return ifkv_prefill_decode(session);
}

/* The answer that full prefill gives, its end-of-turn id included: never empty. */
static ifkv_status keep_greedy(quality_case *it, const ifkv_session *session) {
    quality_forced *greedy = &it->greedy;
    greedy->n = session->n_answer + session->is_stopped;
    greedy->token = malloc((size_t)greedy->n * sizeof *greedy->token + 1);
    if (!greedy->token) return NO_MEMORY("quality answer");
    memcpy(greedy->token, session->answer, (size_t)session->n_answer * sizeof *greedy->token);
    if (session->is_stopped) greedy->token[session->n_answer] = session->next_token;
    return IFKV_OK;
}

static ifkv_status alloc_log_p(const quality_case *it, int64_t n, double **log_p) {
    *log_p = malloc((size_t)(n * it->n_vocab) * sizeof **log_p + 1);
    return *log_p ? IFKV_OK : NO_MEMORY("quality logits");
}

static ifkv_status run_full(quality_case *it) {
    const ifkv_prefill_options options = {
        .size = sizeof options, .method = "full", .chunk = it->chunk, .max_new = it->max_answer};
    ifkv_backend *backend = it->engine->backend;
    ifkv_session *session = NULL;
    IFKV_TRY(quality_session(it, &options, NULL, true, &session));
    ifkv_status status;
    const double begin = backend->ops->clock_ms(backend);
    IFKV_TRY_GOTO(status, ifkv_prefill_encode(session), err_close);
    it->full_ms = backend->ops->clock_ms(backend) - begin;
    IFKV_TRY_GOTO(status, save_rows(it, session, &it->full), err_close);
    IFKV_TRY_GOTO(status, decode(it, session), err_close);
    IFKV_TRY_GOTO(status, keep_greedy(it, session), err_close);
    IFKV_TRY_GOTO(status, alloc_log_p(it, it->greedy.n, &it->greedy.log_p), err_close);
    IFKV_TRY_GOTO(status, alloc_log_p(it, it->gold.n, &it->gold.log_p), err_close);
    IFKV_TRY_GOTO(status, force(it, session, &it->greedy, it->greedy.log_p), err_close);
    status = force(it, session, &it->gold, it->gold.log_p);
err_close:
    ifkv_session_destroy(session);
    return status;
}

static ifkv_status run_encode(quality_case *it) {
    const ifkv_prefill_options options = {
        .size = sizeof options, .method = "none", .chunk = it->chunk};
    ifkv_backend *backend = it->engine->backend;
    ifkv_session *session = NULL;
    IFKV_TRY(quality_session(it, &options, NULL, true, &session));
    const double begin = backend->ops->clock_ms(backend);
    ifkv_status status = ifkv_prefill_encode(session);
    it->encode_ms = backend->ops->clock_ms(backend) - begin;
    if (status == IFKV_OK) status = save_rows(it, session, &it->encoded);
    ifkv_session_destroy(session);
    return status;
}

/* Copies with room: the prompt for forced tokens, the gold answer as the forced list it is. */
static ifkv_status plan_answers(quality_case *it, const int32_t *gold, int64_t n_gold) {
    const ifkv_request *request = it->request;
    const int64_t room = n_gold > it->max_answer + 1 ? n_gold : it->max_answer + 1;
    it->prompt = malloc((size_t)(request->n_prompt + room) * sizeof *it->prompt);
    it->gold.token = malloc((size_t)n_gold * sizeof *gold + 1);
    if (!it->prompt || !it->gold.token) return NO_MEMORY("quality request");
    for (int64_t i = 0; i < n_gold; i++) {
        IFKV_REQUIRE(gold[i] >= 0 && gold[i] < it->n_vocab, IFKV_ERR_DATA, IFKV_E_REQUEST_TOKEN,
                     "gold answer, token %lld: got %d, expected 0 to %lld", (long long)i, gold[i],
                     (long long)it->n_vocab - 1);
        it->gold.token[i] = gold[i];
    }
    it->gold.n = n_gold;
    memcpy(it->prompt, request->prompt, (size_t)request->n_prompt * sizeof *it->prompt);
    for (int64_t i = 0; i < room; i++) it->prompt[request->n_prompt + i] = 0;
    it->planned = *request;
    it->planned.prompt = it->prompt;
    it->planned.n_prompt = request->n_prompt + room;
    if (!request->n_question) {
        it->planned.question = request->prompt;
        it->planned.n_question = request->n_prompt;
    }
    return alloc_log_p(it, room, &it->log_q);
}

ifkv_status quality_open(ifkv_engine *engine, const ifkv_request *request, int64_t chunk,
                         int64_t max_answer, const int32_t *gold, int64_t n_gold,
                         const char *snapshot, quality_case *made) {
    const ifkv_config *config = &engine->model.config;
    IFKV_REQUIRE(engine->comm->size == 1, IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "quality: got %d ranks, expected 1", engine->comm->size);
    *made = (quality_case){
        .engine = engine,
        .request = request,
        .n_prompt = request->n_prompt,
        .max_answer = max_answer,
        .chunk = chunk,
        .n_context = request->n_prefix + request->chunk_offsets[request->n_chunk],
        .n_col = (int64_t)config->n_kv_head * config->d_head,
        .n_vocab = config->n_vocab,
        .n_layer = config->n_layer,
    };
    ifkv_status status = plan_answers(made, gold, n_gold);
    bool is_loaded = false;
    if (status == IFKV_OK && snapshot) status = quality_snapshot_load(snapshot, made, &is_loaded);
    if (status == IFKV_OK && !is_loaded) status = run_full(made);
    if (status == IFKV_OK && !is_loaded) status = run_encode(made);
    if (status == IFKV_OK && !is_loaded && snapshot) status = quality_snapshot_save(snapshot, made);
    if (status != IFKV_OK) quality_close(made);
    return status;
}

void quality_close(quality_case *it) {
    free(it->prompt);
    free(it->full);
    free(it->encoded);
    free(it->greedy.token);
    free(it->greedy.log_p);
    free(it->gold.token);
    free(it->gold.log_p);
    free(it->log_q);
    free(it->layer_score[0]);
    free(it->layer_score[1]);
    *it = (quality_case){0};
}

static double relative_error(const float *got, const float *want, int64_t n) {
    double difference = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) {
        const double d = (double)got[i] - (double)want[i];
        difference += d * d;
        norm += (double)want[i] * (double)want[i];
    }
    return difference == 0 ? 0 : sqrt(difference / norm);
}

/* Relative L2 error of the selected rows alone. */
static double selected_error(const quality_case *it, const ifkv_session *session, const float *got,
                             const float *want) {
    double difference = 0, norm = 0;
    for (int64_t i = 0; i < session->n_selected; i++)
        for (int64_t at = session->selected[i] * it->n_col;
             at < (session->selected[i] + 1) * it->n_col; at++) {
            const double d = (double)got[at] - (double)want[at];
            difference += d * d;
            norm += (double)want[at] * (double)want[at];
        }
    return norm > 0 ? sqrt(difference / norm) : 0;
}

/* Add one layer to the means over layers. */
static void measure_selected(const quality_case *it, const ifkv_session *session, const float *own,
                             int layer, quality_result *result) {
    for (int i = 0; i < 2; i++) {
        const float *want = quality_rows(it, it->full, i, layer),
                    *stale = quality_rows(it, it->encoded, i, layer);
        const float *got = own + i * it->n_context * it->n_col;
        result->stale_error[i] += selected_error(it, session, stale, want) / it->n_layer;
        result->fresh_error[i] += selected_error(it, session, got, want) / it->n_layer;
    }
}

/* Rows of reordered chunks have no counterpart in full prefill: their errors are NaN. */
static ifkv_status measure_rows(const quality_case *it, ifkv_session *session,
                                quality_result *result) {
    const int64_t n = it->n_context * it->n_col;
    const int n_layer = session->reorder.is_on ? 0 : it->n_layer;
    float *own = malloc(2 * layer_bytes(it));
    result->k_error = malloc((size_t)it->n_layer * sizeof *result->k_error);
    result->v_error = malloc((size_t)it->n_layer * sizeof *result->v_error);
    ifkv_status status =
        own && result->k_error && result->v_error ? IFKV_OK : NO_MEMORY("quality errors");
    for (int layer = 0; layer < n_layer && status == IFKV_OK; layer++) {
        status = ifkv_session_kv_read(session, layer, own, own + n);
        if (status != IFKV_OK) break;
        result->k_error[layer] = relative_error(own, quality_rows(it, it->full, false, layer), n);
        result->v_error[layer] =
            relative_error(own + n, quality_rows(it, it->full, true, layer), n);
        measure_selected(it, session, own, layer, result);
    }
    for (int layer = n_layer; layer < it->n_layer && status == IFKV_OK; layer++)
        result->k_error[layer] = result->v_error[layer] = NAN;
    for (int i = 0; i < 2 && n_layer == 0; i++)
        result->stale_error[i] = result->fresh_error[i] = NAN;
    free(own);
    return status;
}

/* Mean KL from full prefill and mean negative log-likelihood over a forced answer. */
static ifkv_status measure_forced(quality_case *it, ifkv_session *session,
                                  const quality_forced *forced, double *kl_p, double *nll_p,
                                  double *kl_first_p) {
    double kl = 0, nll = 0;
    IFKV_TRY(force(it, session, forced, it->log_q));
    for (int64_t i = 0; i < forced->n; i++) {
        const double *log_q = it->log_q + i * it->n_vocab;
        const double here = quality_kl(forced->log_p + i * it->n_vocab, log_q, it->n_vocab);
        if (i == 0 && kl_first_p) *kl_first_p = here;
        kl += here;
        nll -= log_q[forced->token[i]];
    }
    *kl_p = forced->n ? kl / (double)forced->n : NAN;
    *nll_p = forced->n ? nll / (double)forced->n : NAN;
    return IFKV_OK;
}

static ifkv_status keep_answer(const ifkv_session *session, quality_result *result) {
    result->n_answer = session->n_answer;
    result->answer = malloc((size_t)session->n_answer * sizeof *result->answer + 1);
    if (!result->answer) return NO_MEMORY("quality answer");
    memcpy(result->answer, session->answer, (size_t)session->n_answer * sizeof *result->answer);
    return IFKV_OK;
}

/* Give the selected rows full prefill's own K and V instead of recomputing them. */
static ifkv_status write_true_rows(const quality_case *it, ifkv_session *session) {
    ifkv_backend *backend = it->engine->backend;
    const size_t bytes = (size_t)it->n_col * sizeof(float);
    for (int layer = 0; layer < it->n_layer; layer++)
        for (int64_t i = 0; i < session->n_selected; i++) {
            const int64_t row = session->selected[i], at = row * it->n_col;
            const ifkv_view k = ifkv_kvcache_k(&session->cache, layer),
                            v = ifkv_kvcache_v(&session->cache, layer);
            IFKV_TRY(backend->ops->upload(backend, ifkv_view_rows(&k, row, 1).data,
                                          quality_rows(it, it->full, false, layer) + at, bytes));
            IFKV_TRY(backend->ops->upload(backend, ifkv_view_rows(&v, row, 1).data,
                                          quality_rows(it, it->full, true, layer) + at, bytes));
        }
    return IFKV_OK;
}

static ifkv_status run_stages(quality_case *it, ifkv_session *session, const quality_config *config,
                              quality_result *result) {
    ifkv_backend *backend = it->engine->backend;
    double at = backend->ops->clock_ms(backend);
    IFKV_TRY(ifkv_prefill_score(session));
    IFKV_TRY(ifkv_prefill_select(session));
    result->score_ms = backend->ops->clock_ms(backend) - at;
    result->n_selected = session->n_selected;
    result->selected_digest = session->selected_digest;
    at = backend->ops->clock_ms(backend);
    if (config->write && !strcmp(config->write, "full"))
        IFKV_TRY(write_true_rows(it, session));
    else
        IFKV_TRY(ifkv_prefill_recompute(session));
    result->recompute_ms = backend->ops->clock_ms(backend) - at;
    IFKV_TRY(measure_rows(it, session, result));
    at = backend->ops->clock_ms(backend);
    IFKV_TRY(measure_forced(it, session, &it->greedy, &result->kl_greedy, &result->nll_greedy,
                            &result->kl_first));
    result->prompt_ms = backend->ops->clock_ms(backend) - at;
    IFKV_TRY(measure_forced(it, session, &it->gold, &result->kl_gold, &result->nll_gold, NULL));
    if (!config->has_answer) return IFKV_OK;
    at = backend->ops->clock_ms(backend);
    IFKV_TRY(decode(it, session));
    result->decode_ms = backend->ops->clock_ms(backend) - at;
    return keep_answer(session, result);
}

ifkv_status quality_measure(quality_case *it, const quality_config *config,
                            quality_result *result) {
    const bool is_full = config->method && !strcmp(config->method, "full"),
               is_combined = config->method && !strcmp(config->method, "combine"),
               has_question = !config->rows || !strcmp(config->rows, "question");
    int64_t *selected = NULL, n_selected = 0;
    *result = (quality_result){0};
    if (is_combined) IFKV_TRY(quality_combine(it, config, &selected, &n_selected));
    const ifkv_prefill_options options = {
        .size = sizeof options,
        .method = is_combined ? "infoflow" : config->method,
        .ratio = config->ratio,
        .score = config->score,
        .score_layers = is_combined ? NULL : config->layers,
        .chunk = it->chunk,
        .max_new = it->max_answer,
        .seed = config->seed,
        .geometry = config->geometry,
        .hp = config->hp,
        .refit = config->has_refit,
        .epic_k = config->epic_k,
        .reorder = !config->has_reorder ? NULL
                   : it->chunk          ? "force"
                                        : "on",
        .selected = selected,
        .n_selected = n_selected,
    };
    ifkv_session *session = NULL;
    const float *snapshot = is_full ? it->full : config->has_reorder ? NULL : it->encoded;
    ifkv_status status = quality_session(it, &options, snapshot, has_question, &session);
    if (status == IFKV_OK && !snapshot) status = ifkv_prefill_encode(session); /* K unrotated yet */
    if (status == IFKV_OK) status = run_stages(it, session, config, result);
    if (status != IFKV_OK) quality_result_fini(result);
    ifkv_session_destroy(session);
    free(selected);
    return status;
}

void quality_result_fini(quality_result *result) {
    free(result->k_error);
    free(result->v_error);
    free(result->answer);
    *result = (quality_result){0};
}
