/* Selections put together from the scores of single layers: the experiments beside the library's.
 *
 * Knows full prefill where a configuration says so (`source`, `weight`): such an oracle can never
 * run in earnest and says how far a score of that form could go. */
#include "quality_measure.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* One layer's scores into score [n_context]: the selector is told that this layer is all. */
static ifkv_status score_layer(ifkv_session *session, int layer, float *score) {
    session->selector->input.n_score_layer = 1;
    session->selector->input.score_layer[0] = layer;
    return session->selector->ops->score(session->selector, score);
}

ifkv_status quality_layer_scores(quality_case *it, bool of_full, const float **score_p) {
    if (!it->layer_score[of_full]) {
        const ifkv_prefill_options options = {.size = sizeof options,
                                              .method = "infoflow",
                                              .score = "l2",
                                              .chunk = it->chunk,
                                              .keep_scores = true};
        float *score = malloc((size_t)(it->n_layer * it->n_context) * sizeof *score);
        ifkv_session *session = NULL;
        IFKV_REQUIRE(score, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "quality scores: out of host memory");
        ifkv_status status =
            quality_session(it, &options, of_full ? it->full : it->encoded, true, &session);
        for (int layer = 0; layer < it->n_layer && status == IFKV_OK; layer++)
            status = score_layer(session, layer, score + layer * it->n_context);
        ifkv_session_destroy(session);
        if (status != IFKV_OK) {
            free(score);
            return status;
        }
        it->layer_score[of_full] = score;
    }
    *score_p = it->layer_score[of_full];
    return IFKV_OK;
}

static double row_error(const quality_case *it, bool is_v, int layer, int64_t row) {
    const int64_t at = row * it->n_col;
    const float *got = quality_rows(it, it->encoded, is_v, layer) + at,
                *want = quality_rows(it, it->full, is_v, layer) + at;
    double sum = 0;
    for (int64_t i = 0; i < it->n_col; i++) {
        const double d = (double)got[i] - (double)want[i];
        sum += d * d;
    }
    return sqrt(sum);
}

static double row_weight(const quality_case *it, const quality_config *config, int layer,
                         int64_t row) {
    if (!config->weight || !strcmp(config->weight, "none")) return 1;
    const double v = row_error(it, true, layer, row);
    return strcmp(config->weight, "kv") ? v : v + row_error(it, false, layer, row);
}

/* Add one layer to value [first, n_context). */
static void add_layer(const quality_case *it, const quality_config *config, int layer,
                      const float *score, int64_t first, double *value) {
    const bool is_max = config->reduce && !strcmp(config->reduce, "max");
    double scale = 1;
    if (config->norm && !strcmp(config->norm, "sum")) {
        double sum = 0;
        for (int64_t i = first; i < it->n_context; i++) sum += (double)score[i];
        scale = sum > 0 ? 1 / sum : 1;
    }
    for (int64_t i = first; i < it->n_context; i++) {
        const double here = scale * (double)score[i] * row_weight(it, config, layer, i);
        if (is_max)
            value[i] = here > value[i] ? here : value[i];
        else
            value[i] += here;
    }
}

/* Neighbours of a chunk share their mean, so that spans are taken instead of rows. */
static void level_blocks(const ifkv_placement *placement, int64_t block, double *value) {
    for (int64_t c = 1; c < placement->n_chunk && block > 1; c++)
        for (int64_t i = placement->offset[c]; i < placement->offset[c + 1]; i += block) {
            const int64_t above = placement->offset[c + 1],
                          end = i + block < above ? i + block : above;
            double sum = 0;
            for (int64_t j = i; j < end; j++) sum += value[j];
            for (int64_t j = i; j < end; j++) value[j] = sum / (double)(end - i);
        }
}

/* The first rows of every chunk come before all scores. */
static void raise_heads(const ifkv_placement *placement, int64_t heads, double *value) {
    for (int64_t c = 1; c < placement->n_chunk; c++)
        for (int64_t i = placement->offset[c];
             i < placement->offset[c] + heads && i < placement->offset[c + 1]; i++)
            value[i] += 1e30;
}

typedef struct ranked {
    double value;
    int64_t index;
} ranked;

static int by_value(const void *a, const void *b) {
    const ranked *x = a, *y = b;
    if (x->value != y->value) return x->value < y->value ? 1 : -1;
    return (x->index > y->index) - (x->index < y->index);
}

static int ascending(const void *a, const void *b) {
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* The k best of value [first, n), ties to the lower index. */
static ifkv_status take_best(const double *value, int64_t first, int64_t n, int64_t k,
                             int64_t **selected_p) {
    ranked *order = malloc((size_t)(n - first) * sizeof *order + 1);
    int64_t *selected = malloc((size_t)k * sizeof *selected + 1);
    if (!order || !selected) {
        free(order);
        free(selected);
        return IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "quality combine: out of host memory");
    }
    for (int64_t i = first; i < n; i++) order[i - first] = (ranked){value[i], i};
    qsort(order, (size_t)(n - first), sizeof *order, by_value);
    for (int64_t i = 0; i < k; i++) selected[i] = order[i].index;
    qsort(selected, (size_t)k, sizeof *selected, ascending);
    free(order);
    *selected_p = selected;
    return IFKV_OK;
}

static ifkv_status combine_layers(quality_case *it, const quality_config *config,
                                  const ifkv_placement *placement, double *value) {
    ifkv_select_input *input = calloc(1, sizeof *input);
    IFKV_REQUIRE(input, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "quality combine: out of host memory");
    const float *score = NULL;
    ifkv_status status = ifkv_score_layers_parse(config->layers, it->n_layer, input);
    if (status == IFKV_OK)
        status =
            quality_layer_scores(it, config->source && !strcmp(config->source, "full"), &score);
    for (int i = 0; i < input->n_score_layer && status == IFKV_OK; i++)
        add_layer(it, config, input->score_layer[i], score + input->score_layer[i] * it->n_context,
                  ifkv_select_first(placement), value);
    if (status == IFKV_OK) level_blocks(placement, config->block, value);
    if (status == IFKV_OK) raise_heads(placement, config->heads, value);
    free(input);
    return status;
}

ifkv_status quality_combine(quality_case *it, const quality_config *config, int64_t **selected_p,
                            int64_t *n_p) {
    const ifkv_prefill_options options = {
        .size = sizeof options, .method = "none", .chunk = it->chunk};
    ifkv_session *session = NULL; /* knows the chunks */
    int64_t num = 0, den = 1;
    IFKV_TRY(ifkv_ratio_parse(config->ratio ? config->ratio : "0.15", &num, &den));
    IFKV_TRY(quality_session(it, &options, NULL, true, &session));
    const int64_t first = ifkv_select_first(&session->placement),
                  k = ifkv_select_by_ratio(num, den, it->n_context, it->n_context - first);
    double *value = calloc((size_t)it->n_context, sizeof *value);
    ifkv_status status =
        value ? combine_layers(it, config, &session->placement, value)
              : IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "quality combine: out of host memory");
    if (status == IFKV_OK) status = take_best(value, first, it->n_context, k, selected_p);
    if (status == IFKV_OK) *n_p = k;
    ifkv_session_destroy(session);
    free(value);
    return status;
}
