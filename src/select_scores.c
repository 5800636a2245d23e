/* What selectors with scores share: a score per row of this rank's shard, checked, put together in
 * index order on every rank, and the best of them.
 *
 * Knows nothing of where scores come from.  Every rank ranks the same vector, so the set is the
 * same everywhere. Source: algorithm 1.5. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "select.h"

static int64_t kept_rows(const ifkv_select_input *input) {
    return ifkv_placement_kept_rows(input->placement, input->comm->rank);
}

ifkv_status ifkv_scores_init(ifkv_scores *scores, const ifkv_select_input *input) {
    scores->gathered = malloc((size_t)input->placement->n_context * sizeof *scores->gathered);
    scores->bytes = malloc(2 * (size_t)input->comm->size * sizeof *scores->bytes);
    IFKV_REQUIRE(scores->gathered && scores->bytes, IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                 "selector: out of host memory");
    scores->offset = scores->bytes + input->comm->size;
    return IFKV_OK;
}

void ifkv_scores_fini(ifkv_scores *scores) {
    free(scores->gathered);
    free(scores->bytes);
}

void ifkv_scores_layout(ifkv_scores *scores, const ifkv_select_input *input, ifkv_arena *arena) {
    scores->own = ifkv_arena_take(arena, kept_rows(input), sizeof *scores->own);
}

void ifkv_scores_layout_best(ifkv_scores *scores, const ifkv_select_input *input,
                             ifkv_arena *arena) {
    const int64_t n = input->placement->n_context;
    scores->value = ifkv_arena_take(arena, n, sizeof *scores->value);
    scores->scratch = ifkv_arena_take(arena, n, sizeof *scores->scratch);
    scores->chosen = ifkv_arena_take(arena, input->budget, sizeof *scores->chosen);
}

ifkv_status ifkv_scores_clear(ifkv_scores *scores, const ifkv_select_input *input) {
    const size_t bytes = (size_t)kept_rows(input) * sizeof *scores->own;
    memset(scores->gathered, 0, bytes);
    return input->backend->ops->upload(input->backend, scores->own, scores->gathered, bytes);
}

ifkv_status ifkv_scores_check(ifkv_scores *scores, const ifkv_select_input *input, int layer) {
    const int64_t n_row = kept_rows(input);
    float *seen = scores->gathered;
    IFKV_TRY(input->backend->ops->download(input->backend, seen, scores->own,
                                           (size_t)n_row * sizeof *seen));
    for (int64_t i = 0; i < n_row; i++)
        IFKV_REQUIRE(
            isfinite(seen[i]) && seen[i] >= 0, IFKV_ERR_NUMERIC, IFKV_E_NOT_FINITE,
            "score of layer %d, index %lld: got %g, expected a finite number of at least 0", layer,
            (long long)input->cache->index[i], (double)seen[i]);
    return IFKV_OK;
}

ifkv_status ifkv_scores_gather(ifkv_scores *scores, const ifkv_select_input *input, float *score) {
    const ifkv_placement *placement = input->placement;
    size_t *bytes = scores->bytes, *offset = scores->offset, total = 0;
    for (int r = 0; r < input->comm->size; r++) {
        bytes[r] = (size_t)ifkv_placement_kept_rows(placement, r) * sizeof *score;
        offset[r] = total;
        total += bytes[r];
    }
    char *all = (char *)scores->gathered, *own = all + offset[input->comm->rank];
    IFKV_TRY(
        input->backend->ops->download(input->backend, own, scores->own, bytes[input->comm->rank]));
    IFKV_TRY(ifkv_comm_all_gather(input->comm, own, all, bytes, offset));
    for (int64_t i = 0; i < placement->n_chunk; i++) {
        const size_t n = (size_t)(placement->offset[i + 1] - placement->offset[i]) * sizeof *score;
        size_t *from = &offset[placement->rank[i]]; /* chunks of a rank come in ascending order */
        memcpy(score + placement->offset[i], all + *from, n);
        *from += n;
    }
    return IFKV_OK;
}

ifkv_status ifkv_scores_best(ifkv_scores *scores, const ifkv_select_input *input,
                             const float *score, int64_t *selected) {
    ifkv_backend *backend = input->backend;
    const int64_t first = ifkv_select_first_eligible(input), k = input->budget;
    const int64_t n = input->placement->n_context - first;
    IFKV_TRY(
        backend->ops->upload(backend, scores->value, score + first, (size_t)n * sizeof *score));
    IFKV_TRY(backend->ops->top_k(backend, scores->value, n, k, scores->scratch, scores->chosen));
    IFKV_TRY(
        backend->ops->download(backend, selected, scores->chosen, (size_t)k * sizeof *selected));
    for (int64_t i = 0; i < k; i++) selected[i] += first;
    return IFKV_OK;
}
