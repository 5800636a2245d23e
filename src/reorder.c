/* Documents change places.  See reorder.h. */
#include "reorder.h"

#include <stdlib.h>
#include <string.h>

#include "digest.h"
#include "session.h"

ifkv_status ifkv_reorder_check(const ifkv_prefill_options *options, bool *is_on_p) {
    const char *text = options->reorder ? options->reorder : "off",
               *method = options->method ? options->method : "infoflow",
               *geometry = options->geometry ? options->geometry : "global";
    const bool is_forced = !strcmp(text, "force");
    char shown[IFKV_QUOTE_BYTES];
    *is_on_p = is_forced || !strcmp(text, "on");
    IFKV_REQUIRE(*is_on_p || !strcmp(text, "off"), IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "reorder: got \"%s\", expected off, on or force",
                 ifkv_quote(text, strlen(text), shown));
    if (!*is_on_p) return IFKV_OK;
    IFKV_REQUIRE(!strcmp(method, "infoflow") && !options->selected, IFKV_ERR_USAGE, IFKV_E_CONFLICT,
                 "reorder: goes by the question's scores of method infoflow, got %s",
                 options->selected ? "a given selection" : method);
    IFKV_REQUIRE(!strcmp(geometry, "global"), IFKV_ERR_USAGE, IFKV_E_CONFLICT,
                 "reorder: scores under hl-tp, then global, got geometry %s", geometry);
    IFKV_REQUIRE(is_forced || options->chunk == 0, IFKV_ERR_USAGE, IFKV_E_CONFLICT,
                 "reorder: expected chunks as given, independent documents, got a context that is "
                 "cut every %lld tokens",
                 (long long)options->chunk);
    return IFKV_OK;
}

int64_t ifkv_reorder_eligible(const ifkv_placement *placement) {
    const int64_t first = ifkv_placement_first_document(placement);
    int64_t shortest = placement->n_context;
    for (int64_t i = first; i < placement->n_chunk; i++) {
        const int64_t n = placement->offset[i + 1] - placement->offset[i];
        if (n < shortest) shortest = n;
    }
    return placement->n_context - placement->n_prefix - shortest;
}

ifkv_status ifkv_reorder_plan(ifkv_session *session, const ifkv_select_input *input, int64_t num,
                              int64_t den) {
    ifkv_reorder *reorder = &session->reorder;
    const size_t n = (size_t)session->n_given;
    reorder->n_document = session->n_given;
    reorder->num = num;
    reorder->den = den;
    reorder->order = malloc(n * sizeof *reorder->order);
    reorder->shard_row = malloc(n * sizeof *reorder->shard_row);
    reorder->moved_token = malloc((size_t)session->n_context * sizeof *reorder->moved_token);
    IFKV_REQUIRE(reorder->order && reorder->shard_row && reorder->moved_token, IFKV_ERR_RESOURCE,
                 IFKV_E_MEMORY, "reorder: out of host memory");
    for (int64_t i = 0; i < reorder->n_document; i++) reorder->order[i] = i;
    if (num == 0 || reorder->n_document == 1) return IFKV_OK;
    ifkv_select_input first = *input;
    first.geometry = IFKV_GEOMETRY_HL_TP;
    first.is_unrotated = first.excludes_none = true;
    first.budget = ifkv_select_ratio_budget(&first, num, den);
    reorder->best = malloc((size_t)first.budget * sizeof *reorder->best);
    IFKV_REQUIRE(reorder->best, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "reorder: out of host memory");
    return ifkv_selector_create(&ifkv_select_infoflow_ops, &first, &reorder->first);
}

void ifkv_reorder_layout(ifkv_session *session, ifkv_arena *arena) {
    ifkv_reorder *reorder = &session->reorder;
    const size_t mark = ifkv_arena_mark(arena); /* looking comes before moving */
    if (!reorder->first) return;
    reorder->first->ops->layout(reorder->first, arena);
    ifkv_arena_reset(arena, mark);
    reorder->from = ifkv_arena_take(arena, session->n_kept, sizeof *reorder->from);
    reorder->staged =
        ifkv_arena_view(arena, session->cache.k.dtype, session->n_kept, session->cache.n_col);
}

void ifkv_reorder_fini(ifkv_reorder *reorder) {
    ifkv_selector_destroy(reorder->first);
    free(reorder->order);
    free(reorder->best);
    free(reorder->shard_row);
    free(reorder->moved_token);
    memset(reorder, 0, sizeof *reorder);
}

/* ---- the order ---- */

typedef struct rated {
    int64_t chosen, length, document;
} rated;

static int by_ratio(const void *a, const void *b) {
    const rated *x = a, *y = b;
    const int64_t left = x->chosen * y->length, right = y->chosen * x->length;
    if (left != right) return left < right ? -1 : 1;
    return x->document < y->document ? -1 : 1;
}

ifkv_status ifkv_reorder_sort(int64_t n, const int64_t *chosen, const int64_t *length,
                              int64_t *order) {
    rated *list = malloc((size_t)n * sizeof *list);
    IFKV_REQUIRE(list, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "reorder: out of host memory");
    for (int64_t i = 0; i < n; i++) list[i] = (rated){chosen[i], length[i], i};
    qsort(list, (size_t)n, sizeof *list, by_ratio);
    for (int64_t i = 0; i < n; i++) order[i] = list[i].document;
    free(list);
    return IFKV_OK;
}

/* Rows of each document among the best; those of the prefix count for none. */
static ifkv_status sort_documents(ifkv_session *session) {
    ifkv_reorder *reorder = &session->reorder;
    const ifkv_placement *placement = &session->placement;
    const int64_t n = reorder->n_document, first = ifkv_placement_first_document(placement);
    int64_t *chosen = calloc(2 * (size_t)n, sizeof *chosen), *length = chosen + n;
    IFKV_REQUIRE(chosen, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "reorder: out of host memory");
    for (int64_t i = 0; i < n; i++)
        length[i] = placement->offset[first + i + 1] - placement->offset[first + i];
    for (int64_t i = 0; i < reorder->first->input.budget; i++) {
        const int64_t chunk = ifkv_placement_chunk_of(placement, reorder->best[i]);
        if (chunk >= first) chosen[chunk - first]++;
    }
    const ifkv_status status = ifkv_reorder_sort(n, chosen, length, reorder->order);
    free(chosen);
    return status;
}

static ifkv_status look(ifkv_session *session) {
    ifkv_reorder *reorder = &session->reorder;
    ifkv_comm *comm = session->engine->comm;
    ifkv_selector *first = reorder->first;
    IFKV_TRY(first->ops->score(first, session->scores));
    ifkv_status status = first->ops->choose(first, session->scores, reorder->best);
    if (status == IFKV_OK) status = sort_documents(session);
    IFKV_TRY(ifkv_comm_agree(comm, status, NULL));
    return ifkv_comm_same(comm, ifkv_digest_indices(reorder->order, reorder->n_document),
                          "order of chunks");
}

/* ---- the move ---- */

static void list_shard_rows(ifkv_session *session) {
    const ifkv_placement *placement = &session->placement;
    const int64_t first = ifkv_placement_first_document(placement);
    int64_t row = 0;
    for (int64_t i = 0; i < placement->n_chunk; i++) {
        if (i >= first) session->reorder.shard_row[i - first] = row;
        if (placement->rank[i] == session->engine->comm->rank)
            row += placement->offset[i + 1] - placement->offset[i];
    }
}

static void move_tokens(ifkv_session *session) {
    const ifkv_reorder *reorder = &session->reorder;
    const ifkv_placement *placement = &session->placement;
    const int64_t n_prefix = placement->n_prefix, first = ifkv_placement_first_document(placement);
    int32_t *documents = session->token + n_prefix, *to = reorder->moved_token;
    for (int64_t i = 0; i < reorder->n_document; i++) {
        const int64_t begin = session->given_offsets[reorder->order[i]];
        const int64_t n = session->given_offsets[reorder->order[i] + 1] - begin;
        memcpy(to, documents + begin, (size_t)n * sizeof *to);
        to += n;
    }
    memcpy(documents, reorder->moved_token,
           (size_t)(session->n_context - n_prefix) * sizeof *documents);
    for (int64_t i = 1; i <= reorder->n_document; i++) {
        session->chunk_index[i] = placement->offset[first + i];
        session->given_offsets[i] = placement->offset[first + i] - n_prefix;
    }
    ifkv_session_list_rows(session);
    ifkv_session_spread_tokens(session);
}

/* Rows of K and V of every layer to where their documents went. */
static ifkv_status move_rows(ifkv_session *session) {
    ifkv_reorder *reorder = &session->reorder;
    ifkv_backend *backend = session->engine->backend;
    const ifkv_placement *placement = &session->placement;
    const int64_t first = ifkv_placement_first_document(placement);
    int64_t *from = session->encode_stage, row = 0; /* of n_kept rows at least */
    for (int64_t i = 0; i < placement->n_chunk; i++) {
        if (placement->rank[i] != session->engine->comm->rank) continue;
        const int64_t n = placement->offset[i + 1] - placement->offset[i];
        const int64_t begin = i < first ? 0 : reorder->shard_row[reorder->order[i - first]];
        for (int64_t j = 0; j < n; j++) from[row++] = begin + j;
    }
    IFKV_TRY(
        backend->ops->upload(backend, reorder->from, from, (size_t)session->n_kept * sizeof *from));
    for (int layer = 0; layer < session->cache.n_layer; layer++) {
        const ifkv_view each[] = {ifkv_kvcache_k(&session->cache, layer),
                                  ifkv_kvcache_v(&session->cache, layer)};
        for (int i = 0; i < 2; i++) {
            const ifkv_view rows = ifkv_view_rows(&each[i], 0, session->n_kept);
            IFKV_TRY(backend->ops->gather(backend, &rows, reorder->from, &reorder->staged));
            IFKV_TRY(backend->ops->gather(backend, &reorder->staged, NULL, &rows));
        }
    }
    return IFKV_OK;
}

static ifkv_status move(ifkv_session *session) {
    ifkv_reorder *reorder = &session->reorder;
    list_shard_rows(session);
    const ifkv_status status = ifkv_placement_reorder(&session->placement, reorder->order);
    IFKV_TRY(ifkv_comm_agree(session->engine->comm, status, NULL));
    move_tokens(session);
    return move_rows(session);
}

ifkv_status ifkv_reorder_run(ifkv_session *session) {
    const ifkv_reorder *reorder = &session->reorder;
    if (reorder->first) {
        IFKV_TRY(look(session));
        IFKV_TRY(move(session));
        /* the document that is out now may be longer or shorter than the one that was */
        session->n_selected =
            ifkv_select_by_ratio(reorder->num, reorder->den, session->n_context,
                                 session->n_context - ifkv_select_first(&session->placement));
        session->selector->input.budget = session->n_selected;
    }
    return ifkv_reuse_place(session);
}
