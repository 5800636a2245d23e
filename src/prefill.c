/* The stages of a prefill.  See prefill.h. */
#include "prefill.h"

#include <math.h>
#include <string.h>

#include "digest.h"

static void report(const ifkv_session *session, ifkv_stage stage, int64_t done, int64_t total) {
    if (session->options.progress)
        session->options.progress(session->options.progress_arg, stage, done, total);
}

static ifkv_status chunk_store(ifkv_exchange *exchange, int layer, const ifkv_view *k,
                               const ifkv_view *v) {
    ifkv_session *session =
        (ifkv_session *)((char *)exchange - offsetof(ifkv_session, chunk_exchange));
    const ifkv_backend_ops *ops = exchange->backend->ops;
    const ifkv_view k_shard = ifkv_kvcache_k(&session->cache, layer),
                    v_shard = ifkv_kvcache_v(&session->cache, layer);
    IFKV_TRY(ops->gather(exchange->backend, k, session->kept_row, &k_shard));
    IFKV_TRY(ops->gather(exchange->backend, v, session->kept_row, &v_shard));
    return session->exchange->ops->share(session->exchange, layer);
}

static ifkv_status chunk_attend(ifkv_exchange *exchange, int layer, const ifkv_view *q,
                                const ifkv_view *out) {
    ifkv_session *session =
        (ifkv_session *)((char *)exchange - offsetof(ifkv_session, chunk_exchange));
    const ifkv_config *config = &session->engine->model.config;
    const int64_t q_cols = (int64_t)config->n_head * config->d_head, n_row = session->n_encoded;
    const int64_t kv_cols = (int64_t)config->n_kv_head * config->d_head;
    (void)layer;
    const ifkv_attention_args args = {
        .n_head = config->n_head,
        .n_kv_head = config->n_kv_head,
        .d_head = config->d_head,
        .scale = 1.0f / sqrtf((float)config->d_head),
        .q = *q,
        .k = ifkv_view_block(&session->encode.qkv, 0, n_row, q_cols, kv_cols),
        .v = ifkv_view_block(&session->encode.qkv, 0, n_row, q_cols + kv_cols, kv_cols),
        .begin = session->span_begin,
        .end = session->span_end,
        .out = *out,
        .lse = session->encode_lse,
    };
    return exchange->backend->ops->attention(exchange->backend, &args);
}

const ifkv_exchange_ops ifkv_exchange_chunk_ops = {
    .name = "chunk",
    .struct_bytes = sizeof(ifkv_exchange),
    .is_home_owner = true,
    .is_exact = false,
    .init = ifkv_exchange_init_nothing,
    .fini = ifkv_exchange_fini_nothing,
    .layout_shared = ifkv_exchange_layout_nothing,
    .layout = ifkv_exchange_layout_nothing,
    .share = ifkv_exchange_share_nothing,
    .begin = ifkv_exchange_begin_nothing,
    .store = chunk_store,
    .attend = chunk_attend,
    .bytes = ifkv_exchange_no_bytes,
    .explain = "a row sees its own chunk; kept rows go to this rank's shard",
};

static ifkv_status begin_chunks(ifkv_session *session) {
    ifkv_backend *backend = session->engine->backend;
    const int64_t n = session->n_encoded;
    session->chunk_exchange.ops = &ifkv_exchange_chunk_ops;
    session->chunk_exchange.backend = backend;
    session->chunk_exchange.comm = session->engine->data;
    const size_t bytes = (size_t)n * sizeof(int64_t);
    IFKV_TRY(backend->ops->upload(backend, session->span_begin, session->encode_stage, bytes));
    IFKV_TRY(backend->ops->upload(backend, session->span_end, session->encode_stage + n, bytes));
    return backend->ops->upload(backend, session->kept_row, session->encode_stage + 2 * n,
                                (size_t)session->n_kept * sizeof(int64_t));
}

/* The pass of an exact method: every row of the context, where its slice is. */
static ifkv_status begin_slices(ifkv_session *session) {
    for (int64_t i = 0; i < session->n_context; i++) {
        session->pass_index[i] = i;
        session->pass_home[i] = session->pass_owner[i] =
            ifkv_placement_owner(&session->placement, i);
    }
    const ifkv_exchange_rows rows = {
        .n_row = session->n_context,
        .index = session->pass_index,
        .home = session->pass_home,
        .owner = session->pass_owner,
    };
    return session->exchange->ops->begin(session->exchange, &rows);
}

ifkv_status ifkv_prefill_encode(ifkv_session *session) {
    if (session->reuse.is_on) return ifkv_reuse_encode(session);
    ifkv_backend *backend = session->engine->backend;
    const int n_layer = session->engine->model.config.n_layer;
    ifkv_exchange *exchange = session->is_exact ? session->exchange : &session->chunk_exchange;
    IFKV_TRY(session->is_exact ? begin_slices(session) : begin_chunks(session));
    IFKV_TRY(ifkv_pass_begin(&session->encode, backend, session->n_encoded, session->encode_token,
                             session->encode_position, session->n_chunk, session->encode_begin));
    for (int layer = 0; layer < n_layer; layer++) {
        /* nothing reads the context's last hidden state */
        const unsigned what = layer + 1 < n_layer ? IFKV_LAYER_ALL : IFKV_LAYER_KV;
        IFKV_TRY(ifkv_layer_run(&session->encode, layer, exchange, what));
        report(session, IFKV_STAGE_ENCODE, layer + 1, n_layer);
    }
    return backend->ops->sync(backend);
}

ifkv_status ifkv_prefill_score(ifkv_session *session) {
    if (!session->scores) return IFKV_OK;
    ifkv_selector *selector = session->selector;
    IFKV_TRY(selector->ops->score(selector, session->scores));
    /* what other ranks have been given of that layer is out of date */
    if (selector->rewritten_layer < 0) return IFKV_OK;
    return session->exchange->ops->share(session->exchange, selector->rewritten_layer);
}

ifkv_status ifkv_prefill_select(ifkv_session *session) {
    ifkv_comm *comm = session->engine->comm;
    ifkv_status status = IFKV_OK;
    if (session->selector)
        status =
            session->selector->ops->choose(session->selector, session->scores, session->selected);
    IFKV_TRY(ifkv_comm_agree(comm, status, NULL));
    session->selected_digest = ifkv_digest_indices(session->selected, session->n_selected);
    for (int64_t i = 0, row = 0; i < session->n_selected; i++) {
        while (row < session->n_kept && session->cache_index[row] < session->selected[i]) row++;
        if (row < session->n_kept && session->cache_index[row] == session->selected[i])
            session->recomputed[row] = 1;
    }
    const uint64_t agreed[] = {(uint64_t)session->n_context, (uint64_t)session->n_selected,
                               session->selected_digest};
    return ifkv_comm_same(comm, ifkv_digest_bytes(agreed, sizeof agreed), "selection");
}

/* Route a pass of n rows whose pass_index is filled, and start it with this rank's share of them.
 */
static ifkv_status begin_rows(ifkv_session *session, int64_t n, ifkv_exchange *exchange,
                              ifkv_pass *pass) {
    const int rank = session->engine->comm->rank;
    const ifkv_exchange_rows rows = {
        .n_row = n,
        .index = session->pass_index,
        .home = session->pass_home,
        .owner = session->pass_owner,
    };
    int64_t n_home = 0;
    for (int64_t i = 0; i < n; i++) {
        if (session->pass_home[i] != rank) continue;
        session->home_token[n_home] = session->token[session->pass_index[i]];
        session->home_position[n_home++] = session->pass_index[i];
    }
    IFKV_TRY(exchange->ops->begin(exchange, &rows));
    return ifkv_pass_begin(pass, session->engine->backend, n_home, session->home_token,
                           session->home_position, 1, (int64_t[]){0, n_home});
}

ifkv_status ifkv_prefill_recompute(ifkv_session *session) {
    const int64_t k = session->n_selected;
    const int n_layer = session->engine->model.config.n_layer, size = session->engine->comm->size;
    ifkv_exchange *exchange = session->exchange;
    if (k == 0) return IFKV_OK;
    for (int64_t i = 0; i < k; i++) {
        session->pass_index[i] = session->selected[i];
        session->pass_owner[i] = ifkv_placement_owner(&session->placement, session->selected[i]);
        session->pass_home[i] =
            exchange->ops->is_home_owner ? session->pass_owner[i] : ifkv_deal_home(i, k, size);
    }
    IFKV_TRY(begin_rows(session, k, exchange, &session->recompute));
    for (int layer = 0; layer < n_layer; layer++) {
        /* K/V of layer 0 depend on token and position only and are right already; nothing reads the
         * last hidden state */
        unsigned what = IFKV_LAYER_ALL;
        if (layer == 0) what &= ~(unsigned)IFKV_LAYER_KV;
        if (layer + 1 == n_layer) what &= IFKV_LAYER_KV;
        if (what) IFKV_TRY(ifkv_layer_run(&session->recompute, layer, exchange, what));
        report(session, IFKV_STAGE_RECOMPUTE, layer + 1, n_layer);
    }
    return session->engine->backend->ops->sync(session->engine->backend);
}

/* Choose the next token from the logits of the row that rank 0 ran last; every rank learns it. */
static ifkv_status choose_token(ifkv_session *session, int64_t row) {
    ifkv_engine *engine = session->engine;
    ifkv_backend *backend = engine->backend;
    const int64_t n_vocab = engine->model.config.n_vocab;
    int32_t token = -1;
    ifkv_status status = IFKV_OK;
    if (engine->comm->rank == 0) {
        IFKV_TRY(ifkv_pass_logits(&session->prompt, backend, row, &session->logits_view));
        IFKV_TRY(backend->ops->download(backend, session->logits, session->logits_view.data,
                                        (size_t)n_vocab * sizeof *session->logits));
        float best = -INFINITY;
        for (int64_t i = 0; i < n_vocab && status == IFKV_OK; i++) {
            if (!isfinite(session->logits[i]))
                status = IFKV_FAIL(IFKV_ERR_NUMERIC, IFKV_E_NOT_FINITE,
                                   "logit %lld: got %g, expected a finite number", (long long)i,
                                   (double)session->logits[i]);
            if (session->logits[i] > best) { /* the lowest id wins a tie */
                best = session->logits[i];
                token = (int32_t)i;
            }
        }
    }
    IFKV_TRY(ifkv_comm_agree(engine->comm, status, NULL));
    IFKV_TRY(ifkv_comm_bcast(engine->comm, &token, sizeof token, 0));
    session->next_token = token;
    return IFKV_OK;
}

/* Run rows [first, first + n) of the prompt and what follows it through all layers. */
static ifkv_status run_tail(ifkv_session *session, int64_t first, int64_t n, ifkv_stage stage) {
    const int n_layer = session->engine->model.config.n_layer, rank = session->engine->comm->rank;
    for (int64_t i = 0; i < n; i++) {
        const int64_t index = session->n_context + first + i;
        session->pass_index[i] = index;
        session->pass_owner[i] = ifkv_placement_owner(&session->placement, index);
        /* dealt from the last row, so that rank 0 always has the one that meets the LM head */
        session->pass_home[i] = ifkv_deal_home(n - 1 - i, n, session->placement.n_tail_rank);
        if (session->pass_owner[i] == rank) IFKV_TRY(ifkv_kvcache_append(&session->cache, index));
    }
    IFKV_TRY(begin_rows(session, n, session->prompt_exchange, &session->prompt));
    for (int layer = 0; layer < n_layer; layer++) {
        IFKV_TRY(ifkv_layer_run(&session->prompt, layer, session->prompt_exchange, IFKV_LAYER_ALL));
        if (stage == IFKV_STAGE_PROMPT) report(session, stage, layer + 1, n_layer);
    }
    return choose_token(session, session->prompt.n_row - 1);
}

ifkv_status ifkv_prefill_prompt(ifkv_session *session) {
    IFKV_TRY(run_tail(session, 0, session->n_prompt, IFKV_STAGE_PROMPT));
    if (session->engine->comm->rank == 0)
        memcpy(session->first_logits, session->logits,
               (size_t)session->engine->model.config.n_vocab * sizeof *session->logits);
    return IFKV_OK;
}

static bool is_end(const ifkv_config *config, int32_t token) {
    for (int i = 0; i < config->n_eos; i++)
        if (config->eos[i] == token) return true;
    return false;
}

ifkv_status ifkv_prefill_decode(ifkv_session *session) {
    while (session->n_answer < session->max_new) {
        if (is_end(&session->engine->model.config, session->next_token)) {
            session->is_stopped = true;
            break;
        }
        session->answer[session->n_answer++] = session->next_token;
        report(session, IFKV_STAGE_DECODE, session->n_answer, session->max_new);
        if (session->n_answer == session->max_new)
            break; /* nothing needs the row of the last token */
        const int64_t at = session->n_prompt + session->n_answer - 1;
        session->token[session->n_context + at] = session->next_token;
        IFKV_TRY(run_tail(session, at, 1, IFKV_STAGE_DECODE));
    }
    return IFKV_OK;
}
