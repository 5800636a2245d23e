/* Method `auto`.  See auto.h. */
#include "auto.h"

#include <stdlib.h>
#include <string.h>

#include "digest.h"

enum { SINGLE = 4, DOUBLE = 8 }; /* bytes of a number of a part, see exchange_query.c, backend.h */

bool ifkv_auto_is_asked(const ifkv_prefill_options *options) {
    ifkv_prefill_options own;
    return options && options->size <= sizeof own &&
           options->size >= offsetof(ifkv_prefill_options, method) + sizeof own.method &&
           options->method && !strcmp(options->method, "auto");
}

/* The caller's options with a method that can run. */
static ifkv_status with_method(const ifkv_prefill_options *options, const char *method,
                               ifkv_prefill_options *own) {
    IFKV_TRY(ifkv_prefill_options_check(options)); /* of auto, not of what it may become */
    IFKV_TRY(ifkv_struct_read(own, sizeof *own, options, "prefill_options"));
    own->size = sizeof *own;
    own->method = method;
    return IFKV_OK;
}

static const char *exact_method(const ifkv_engine *engine) {
    return engine->comm->size > 1 ? "ring" : "full";
}

static ifkv_status make_session(const ifkv_engine *engine, const ifkv_request *request,
                                const ifkv_prefill_options *options, const char *method,
                                ifkv_session **session_p, size_t *bytes_p) {
    ifkv_prefill_options own;
    IFKV_TRY(with_method(options, method, &own));
    return ifkv_session_create(engine, request, &own, session_p, bytes_p);
}

ifkv_status ifkv_auto_plan(const ifkv_engine *engine, const ifkv_request *request,
                           const ifkv_prefill_options *options, size_t *bytes_p) {
    const char *const methods[] = {"infoflow", exact_method(engine)};
    *bytes_p = 0;
    for (int i = 0; i < 2; i++) {
        ifkv_session *session = NULL;
        size_t bytes = 0;
        IFKV_TRY(make_session(engine, request, options, methods[i], &session, &bytes));
        ifkv_session_destroy(session);
        if (bytes > *bytes_p) *bytes_p = bytes;
    }
    return IFKV_OK;
}

void ifkv_session_cost(const ifkv_session *session, const bool *is_loaded, ifkv_cost_model *model,
                       ifkv_cost_plan *plan, ifkv_cost_way *way_p) {
    const ifkv_engine *engine = session->engine;
    const ifkv_backend_ops *ops = engine->backend->ops;
    *model = (ifkv_cost_model){
        .config = &engine->model.config,
        .element_bytes = (double)ifkv_dtype_bytes(ops->dtype),
        .part_bytes = SINGLE,
        .score_part_bytes = ops->part_dtype == IFKV_DTYPE_F64 ? DOUBLE : SINGLE,
    };
    const ifkv_select_input *input = *session->score_layers ? &session->selector->input : NULL;
    *plan = (ifkv_cost_plan){
        .placement = &session->placement,
        .n_selected = session->n_selected,
        .n_question = session->n_question,
        .n_prompt = session->n_prompt,
        .n_score_layer = input ? input->score_layer[input->n_score_layer - 1] + 1 : 0,
        .is_loaded = is_loaded,
        .has_riders = ops->joins_riders && session->rides[IFKV_STAGE_PROMPT],
    };
    const bool is_full = !strcmp(session->method, "full");
    *way_p = IFKV_COST_EXACT;
    ifkv_cost_way_find(is_full ? "full" : session->exchange_name, way_p);
}

/* Milliseconds to the first token of a session that has been planned. */
static double estimate(const ifkv_session *session, const bool *is_loaded) {
    ifkv_cost_model model;
    ifkv_cost_plan plan;
    ifkv_cost_way way;
    ifkv_session_cost(session, is_loaded, &model, &plan, &way);
    return 1e3 * ifkv_cost_time(&model, &plan, way, &session->engine->rates, NULL);
}

/* What any rank's store holds of its chunks, on every rank. */
static ifkv_status gather_loaded(ifkv_session *session, bool *is_loaded) {
    const int64_t n = session->placement.n_chunk;
    int64_t *value = malloc((size_t)n * sizeof *value);
    ifkv_status status =
        value ? ifkv_reuse_probe(session, is_loaded)
              : IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "method auto: out of host memory");
    IFKV_TRY_GOTO(status, ifkv_comm_agree(session->engine->comm, status, NULL), out);
    for (int64_t i = 0; i < n; i++) value[i] = is_loaded[i];
    IFKV_TRY_GOTO(status,
                  ifkv_comm_all_reduce_i64(session->engine->comm, value, (int)n, IFKV_REDUCE_MAX),
                  out);
    for (int64_t i = 0; i < n; i++) is_loaded[i] = value[i] != 0;
out:
    free(value);
    return status;
}

ifkv_status ifkv_auto_choose(ifkv_engine *engine, const ifkv_request *request,
                             const ifkv_prefill_options *options, ifkv_auto_choice *choice) {
    ifkv_session *approximate = NULL, *exact = NULL;
    bool *is_loaded = NULL;
    size_t bytes;
    ifkv_status status = make_session(engine, request, options, "infoflow", &approximate, &bytes);
    if (status == IFKV_OK)
        status = make_session(engine, request, options, exact_method(engine), &exact, &bytes);
    if (status == IFKV_OK) {
        is_loaded = malloc((size_t)approximate->placement.n_chunk * sizeof *is_loaded);
        if (!is_loaded)
            status = IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "method auto: out of host memory");
    }
    IFKV_TRY_GOTO(status, ifkv_comm_agree(engine->comm, status, NULL), out);
    IFKV_TRY_GOTO(
        status, ifkv_comm_same(engine->comm, approximate->plan_digest, "chunks and options"), out);
    IFKV_TRY_GOTO(status, gather_loaded(approximate, is_loaded), out);
    *choice = (ifkv_auto_choice){.exact = exact_method(engine),
                                 .exact_ms = estimate(exact, NULL),
                                 .infoflow_ms = estimate(approximate, is_loaded)};
    const double agreed[] = {choice->exact_ms, choice->infoflow_ms};
    IFKV_TRY_GOTO(status,
                  ifkv_comm_same(engine->comm, ifkv_digest_bytes(agreed, sizeof agreed),
                                 "estimates of method auto"),
                  out);
    choice->method = ifkv_cost_takes_infoflow(choice->exact_ms, choice->infoflow_ms)
                         ? "infoflow"
                         : choice->exact;
out:
    free(is_loaded);
    ifkv_session_destroy(approximate);
    ifkv_session_destroy(exact);
    return status;
}
