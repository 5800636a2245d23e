/* Selectors `epic` and `epic_budget`: the heads of chunks (arXiv 2410.15332), nothing scored.
 *
 * A chunk's first rows suffer most from having been encoded without what stands before them.
 * `epic` takes the same number of rows from every chunk but the first and ignores the ratio;
 * `epic_budget` deals the ratio's budget in proportion to the chunks' lengths, to compare methods
 * at equal cost.  Pure arithmetic on the placement: the same set on every rank. Source:
 * algorithm 5.2.
 */
#include "select.h"

#include <stdlib.h>

static int64_t chunk_rows(const ifkv_placement *placement, int64_t chunk) {
    return placement->offset[chunk + 1] - placement->offset[chunk];
}

static int64_t head_rows(const ifkv_select_input *input, int64_t chunk) {
    const int64_t n = chunk_rows(input->placement, chunk);
    return n < input->epic_k ? n : input->epic_k;
}

static int64_t epic_rows(const ifkv_select_input *input, int64_t num, int64_t den) {
    (void)num, (void)den;
    int64_t k = 0;
    for (int64_t i = 1; i < input->placement->n_chunk; i++) k += head_rows(input, i);
    return k;
}

/* Append the first n rows of a chunk to the list that ends at `to`. */
static int64_t *take_head(const ifkv_placement *placement, int64_t chunk, int64_t n, int64_t *to) {
    for (int64_t i = 0; i < n; i++) *to++ = placement->offset[chunk] + i;
    return to;
}

static ifkv_status epic_choose(ifkv_selector *selector, const float *score, int64_t *selected) {
    (void)score;
    const ifkv_select_input *input = &selector->input;
    for (int64_t i = 1; i < input->placement->n_chunk; i++)
        selected = take_head(input->placement, i, head_rows(input, i), selected);
    return IFKV_OK;
}

typedef struct chunk_share {
    int64_t chunk, rows, remainder;
} chunk_share;

static int by_remainder(const void *a, const void *b) {
    const chunk_share *x = a, *y = b;
    if (x->remainder != y->remainder) return x->remainder > y->remainder ? -1 : 1;
    return x->chunk < y->chunk ? -1 : 1;
}

static int by_chunk(const void *a, const void *b) {
    const chunk_share *x = a, *y = b;
    return x->chunk < y->chunk ? -1 : 1;
}

/* Largest remainder: floor(k n_i / N) rows each, what is left one by one to the largest remainders.
 * k <= N, so a share that is not whole is below n_i, and no chunk gets more rows than it has. */
static ifkv_status epic_budget_choose(ifkv_selector *selector, const float *score,
                                      int64_t *selected) {
    (void)score;
    const ifkv_placement *placement = selector->input.placement;
    const int64_t k = selector->input.budget, n = placement->n_chunk - 1;
    const int64_t n_eligible = placement->n_context - ifkv_select_first(placement);
    if (k == 0) return IFKV_OK;
    chunk_share *share = malloc((size_t)n * sizeof *share);
    IFKV_REQUIRE(share, IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                 "selector epic_budget: out of host memory");
    int64_t left = k;
    for (int64_t i = 0; i < n; i++) {
        const int64_t product = k * chunk_rows(placement, i + 1); /* below 2^62 */
        share[i] = (chunk_share){i + 1, product / n_eligible, product % n_eligible};
        left -= share[i].rows;
    }
    qsort(share, (size_t)n, sizeof *share, by_remainder);
    for (int64_t i = 0; i < left; i++) share[i].rows++;
    qsort(share, (size_t)n, sizeof *share, by_chunk);
    for (int64_t i = 0; i < n; i++)
        selected = take_head(placement, share[i].chunk, share[i].rows, selected);
    free(share);
    return IFKV_OK;
}

const ifkv_select_ops ifkv_select_epic_ops = {
    .name = "epic",
    .struct_bytes = sizeof(ifkv_selector),
    .has_scores = false,
    .budget = epic_rows,
    .init = ifkv_select_init_nothing,
    .fini = ifkv_select_fini_nothing,
    .layout = ifkv_select_layout_nothing,
    .score = ifkv_select_no_score,
    .choose = epic_choose,
    .explain = "recompute the first epic_k rows of every chunk but the first",
};

const ifkv_select_ops ifkv_select_epic_budget_ops = {
    .name = "epic_budget",
    .struct_bytes = sizeof(ifkv_selector),
    .has_scores = false,
    .budget = ifkv_select_ratio_budget,
    .init = ifkv_select_init_nothing,
    .fini = ifkv_select_fini_nothing,
    .layout = ifkv_select_layout_nothing,
    .score = ifkv_select_no_score,
    .choose = epic_budget_choose,
    .explain = "recompute the first rows of every chunk but the first, the ratio's budget in "
               "proportion to length",
};
