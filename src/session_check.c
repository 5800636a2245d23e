/* What can be said of a request and of options before anything is planned.  See session.h. */
#include "session.h"

#include <stdlib.h>
#include <string.h>

static const int64_t max_tokens = INT32_MAX;

static ifkv_status check_tokens(const char *name, const int32_t *token, int64_t n,
                                int64_t n_vocab) {
    IFKV_REQUIRE(n == 0 || token, IFKV_ERR_USAGE, IFKV_E_STRUCT,
                 "request.%s: got NULL for %lld tokens", name, (long long)n);
    for (int64_t i = 0; i < n; i++)
        IFKV_REQUIRE(token[i] >= 0 && token[i] < n_vocab, IFKV_ERR_DATA, IFKV_E_REQUEST_TOKEN,
                     "request /%s/%lld: token id out of range: got %d, expected 0 to %lld", name,
                     (long long)i, token[i], (long long)n_vocab - 1);
    return IFKV_OK;
}

static ifkv_status check_chunks(const ifkv_request *request) {
    IFKV_REQUIRE(request->n_chunk >= 1 && request->n_chunk <= IFKV_MAX_CHUNKS &&
                     request->chunk_offsets && request->chunk_offsets[0] == 0,
                 IFKV_ERR_DATA, IFKV_E_REQUEST_LENGTH,
                 "request /chunks: got %lld chunks, expected 1 to %d", (long long)request->n_chunk,
                 IFKV_MAX_CHUNKS);
    for (int64_t i = 0; i < request->n_chunk; i++)
        IFKV_REQUIRE(request->chunk_offsets[i] < request->chunk_offsets[i + 1] &&
                         request->chunk_offsets[i + 1] <= max_tokens,
                     IFKV_ERR_DATA, IFKV_E_REQUEST_LENGTH,
                     "request /chunks/%lld: got %lld tokens, expected at least 1", (long long)i,
                     (long long)(request->chunk_offsets[i + 1] - request->chunk_offsets[i]));
    return IFKV_OK;
}

ifkv_status ifkv_request_check(const ifkv_config *config, const ifkv_request *request,
                               int64_t max_new) {
    IFKV_TRY(check_chunks(request));
    const int64_t n_chunk_token = request->chunk_offsets[request->n_chunk];
    IFKV_REQUIRE(request->n_prompt >= 1 && request->n_prompt <= max_tokens, IFKV_ERR_DATA,
                 IFKV_E_REQUEST_LENGTH, "request /prompt: got %lld tokens, expected at least 1",
                 (long long)request->n_prompt);
    IFKV_REQUIRE(request->n_prefix >= 0 && request->n_prefix <= max_tokens &&
                     request->n_question >= 0 && request->n_question <= max_tokens,
                 IFKV_ERR_DATA, IFKV_E_REQUEST_LENGTH, "request: got a negative length");
    IFKV_TRY(check_tokens("prefix", request->prefix, request->n_prefix, config->n_vocab));
    IFKV_TRY(check_tokens("chunks", request->chunk_tokens, n_chunk_token, config->n_vocab));
    IFKV_TRY(check_tokens("prompt", request->prompt, request->n_prompt, config->n_vocab));
    IFKV_TRY(check_tokens("question", request->question, request->n_question, config->n_vocab));
    const int64_t total = request->n_prefix + n_chunk_token + request->n_prompt + max_new;
    IFKV_REQUIRE(total <= config->max_position, IFKV_ERR_DATA, IFKV_E_REQUEST_LENGTH,
                 "request: sequence too long for the model: got %lld tokens (prefix %lld, context "
                 "%lld, prompt %lld, "
                 "new %lld), expected at most max_position_embeddings %lld",
                 (long long)total, (long long)request->n_prefix, (long long)n_chunk_token,
                 (long long)request->n_prompt, (long long)max_new, (long long)config->max_position);
    return IFKV_OK;
}

ifkv_status ifkv_session_placement(const char *name, ifkv_placement_kind *kind_p) {
    static const char *const names[] = {[IFKV_PLACE_AUTO] = "auto",
                                        [IFKV_PLACE_ZIGZAG] = "zigzag",
                                        [IFKV_PLACE_CONTIGUOUS] = "contiguous",
                                        [IFKV_PLACE_LONGEST] = "longest"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (name && strcmp(name, names[i])) continue;
        *kind_p = (ifkv_placement_kind)i; /* without a name the first */
        return IFKV_OK;
    }
    char shown[IFKV_QUOTE_BYTES];
    return IFKV_FAIL(IFKV_ERR_USAGE, IFKV_E_VALUE,
                     "placement: got \"%s\", expected auto, zigzag, contiguous or longest",
                     ifkv_quote(name, strlen(name), shown));
}

ifkv_status ifkv_session_pool(const char *name, bool *is_on_p) {
    char shown[IFKV_QUOTE_BYTES];
    *is_on_p = !name || !strcmp(name, "on");
    IFKV_REQUIRE(*is_on_p || !strcmp(name, "off"), IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "pool: got \"%s\", expected on or off", ifkv_quote(name, strlen(name), shown));
    return IFKV_OK;
}

bool ifkv_method_is_exact(const char *method) {
    const ifkv_exchange_ops *ops = ifkv_exchange_find(method);
    return ops && ops->n_slice > 0;
}

ifkv_status ifkv_scoring_parse(const ifkv_prefill_options *options, bool *is_local_p) {
    const char *scoring = options->scoring ? options->scoring : "exact";
    char shown[IFKV_QUOTE_BYTES];
    *is_local_p = !strcmp(scoring, "local");
    IFKV_REQUIRE(*is_local_p || !strcmp(scoring, "exact"), IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "scoring: got \"%s\", expected exact or local",
                 ifkv_quote(scoring, strlen(scoring), shown));
    IFKV_REQUIRE(*is_local_p || !options->local_sink, IFKV_ERR_USAGE, IFKV_E_CONFLICT,
                 "local-sink: goes with scoring local, got exact");
    return IFKV_OK;
}

ifkv_status ifkv_prefill_options_check(const ifkv_prefill_options *caller_options) {
    ifkv_prefill_options options;
    IFKV_TRY(ifkv_struct_read(&options, sizeof options, caller_options, "prefill_options"));
    char shown[IFKV_QUOTE_BYTES];
    const char *method = options.method, *exchange = options.exchange, *rows = options.score_rows,
               *ride = options.ride;
    int64_t num, den;
    ifkv_score_form form;
    ifkv_geometry geometry;
    ifkv_placement_kind kind;
    ifkv_select_input *layers;
    bool is_local, is_reordered, is_pool_on;
    IFKV_REQUIRE(!method || !strcmp(method, "full") || !strcmp(method, "auto") ||
                     ifkv_method_is_exact(method) || ifkv_select_find(method),
                 IFKV_ERR_USAGE, IFKV_E_VALUE, "method: got \"%s\", expected " IFKV_METHOD_NAMES,
                 ifkv_quote(method, strlen(method), shown));
    IFKV_REQUIRE(!exchange || !strcmp(exchange, "auto") ||
                     (ifkv_exchange_find(exchange) && !ifkv_method_is_exact(exchange)),
                 IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "exchange: got \"%s\", expected auto, query, delta, kv or local",
                 ifkv_quote(exchange, strlen(exchange), shown));
    IFKV_REQUIRE(!rows || !strcmp(rows, "question") || !strcmp(rows, "prompt"), IFKV_ERR_USAGE,
                 IFKV_E_VALUE, "score-rows: got \"%s\", expected question or prompt",
                 ifkv_quote(rows, strlen(rows), shown));
    IFKV_REQUIRE(!ride || !strcmp(ride, "both") || !strcmp(ride, "score") ||
                     !strcmp(ride, "prompt") || !strcmp(ride, "none"),
                 IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "ride: got \"%s\", expected both, score, prompt or none",
                 ifkv_quote(ride, strlen(ride), shown));
    IFKV_TRY(ifkv_ratio_parse(options.ratio ? options.ratio : "0.15", &num, &den));
    IFKV_TRY(ifkv_score_form_parse(options.score ? options.score : "l2", &form));
    IFKV_TRY(ifkv_geometry_parse(options.geometry, options.hp, &geometry));
    IFKV_TRY(ifkv_scoring_parse(&options, &is_local));
    IFKV_TRY(ifkv_reorder_check(&options, &is_reordered));
    IFKV_TRY(ifkv_session_placement(options.placement, &kind));
    IFKV_TRY(ifkv_session_pool(options.pool, &is_pool_on));
    IFKV_REQUIRE(options.chunk >= 0 && options.chunk <= max_tokens, IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "chunk: got %lld, expected a number of tokens", (long long)options.chunk);
    IFKV_REQUIRE(options.max_new >= 0 && options.max_new <= max_tokens, IFKV_ERR_USAGE,
                 IFKV_E_VALUE, "max-new: got %lld, expected 0 or more", (long long)options.max_new);
    IFKV_REQUIRE(options.epic_k >= 0 && options.epic_k <= max_tokens, IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "epic-k: got %lld, expected a number of rows", (long long)options.epic_k);
    if (!options.score_layers) return IFKV_OK;
    /* the list's form; how many layers there are only the model knows */
    layers = malloc(sizeof *layers);
    IFKV_REQUIRE(layers, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "prefill_options: out of host memory");
    const ifkv_status status = ifkv_score_layers_parse(options.score_layers, INT32_MAX, layers);
    free(layers);
    return status;
}
