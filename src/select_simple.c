/* Selectors without scores: none, all, and a seeded random set of the same budget to compare with.
 */
#include <stdlib.h>

#include "random.h"
#include "select.h"

static int64_t budget_none(const ifkv_select_input *input, int64_t num, int64_t den) {
    (void)input, (void)num, (void)den;
    return 0;
}

static int64_t budget_all(const ifkv_select_input *input, int64_t num, int64_t den) {
    (void)num, (void)den;
    return input->placement->n_context - ifkv_select_first(input->placement);
}

/* The first `budget` eligible rows: nothing for none, everything for all. */
static ifkv_status choose_first(ifkv_selector *selector, const float *score, int64_t *selected) {
    (void)score;
    const int64_t first = ifkv_select_first(selector->input.placement);
    for (int64_t i = 0; i < selector->input.budget; i++) selected[i] = first + i;
    return IFKV_OK;
}

typedef struct keyed_row {
    uint64_t key;
    int64_t index;
} keyed_row;

static int by_key(const void *a, const void *b) {
    const keyed_row *x = a, *y = b;
    if (x->key != y->key) return x->key < y->key ? -1 : 1;
    return x->index < y->index ? -1 : 1;
}

static int by_index(const void *a, const void *b) {
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static ifkv_status choose_random(ifkv_selector *selector, const float *score, int64_t *selected) {
    (void)score;
    const int64_t first = ifkv_select_first(selector->input.placement), k = selector->input.budget;
    const int64_t n = selector->input.placement->n_context - first;
    if (k == 0) return IFKV_OK;
    keyed_row *row = malloc((size_t)n * sizeof *row);
    IFKV_REQUIRE(row, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "selector random: out of host memory");
    for (int64_t i = 0; i < n; i++)
        row[i] =
            (keyed_row){ifkv_random_u64(selector->input.seed, (uint64_t)(first + i)), first + i};
    qsort(row, (size_t)n, sizeof *row, by_key);
    for (int64_t i = 0; i < k; i++) selected[i] = row[i].index;
    free(row);
    qsort(selected, (size_t)k, sizeof *selected, by_index);
    return IFKV_OK;
}

const ifkv_select_ops ifkv_select_none_ops = {
    .name = "none",
    .struct_bytes = sizeof(ifkv_selector),
    .has_scores = false,
    .budget = budget_none,
    .init = ifkv_select_init_nothing,
    .fini = ifkv_select_fini_nothing,
    .layout = ifkv_select_layout_nothing,
    .score = ifkv_select_no_score,
    .choose = choose_first,
    .explain = "recompute nothing: the chunks as each saw only itself",
};

const ifkv_select_ops ifkv_select_all_ops = {
    .name = "all",
    .struct_bytes = sizeof(ifkv_selector),
    .has_scores = false,
    .budget = budget_all,
    .init = ifkv_select_init_nothing,
    .fini = ifkv_select_fini_nothing,
    .layout = ifkv_select_layout_nothing,
    .score = ifkv_select_no_score,
    .choose = choose_first,
    .explain = "recompute every row: equals full prefill",
};

const ifkv_select_ops ifkv_select_random_ops = {
    .name = "random",
    .struct_bytes = sizeof(ifkv_selector),
    .has_scores = false,
    .budget = ifkv_select_ratio_budget,
    .init = ifkv_select_init_nothing,
    .fini = ifkv_select_fini_nothing,
    .layout = ifkv_select_layout_nothing,
    .score = ifkv_select_no_score,
    .choose = choose_random,
    .explain = "a seeded random set of the same size, to compare with",
};
