/* Selectors by name, budget, and the options they share.  See select.h. */
#include "select.h"

#include <stdlib.h>
#include <string.h>

static const ifkv_select_ops *const selectors[] = {
    &ifkv_select_infoflow_ops,  &ifkv_select_none_ops, &ifkv_select_all_ops,
    &ifkv_select_random_ops,    &ifkv_select_epic_ops, &ifkv_select_epic_budget_ops,
    &ifkv_select_cacheblend_ops};

const ifkv_select_ops *ifkv_select_find(const char *name) {
    for (size_t i = 0; i < sizeof selectors / sizeof *selectors; i++)
        if (!strcmp(selectors[i]->name, name)) return selectors[i];
    return NULL;
}

ifkv_status ifkv_selector_create(const ifkv_select_ops *ops, const ifkv_select_input *input,
                                 ifkv_selector **selector_p) {
    ifkv_selector *selector = calloc(1, ops->struct_bytes);
    IFKV_REQUIRE(selector, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "selector %s: out of host memory",
                 ops->name);
    selector->ops = ops;
    selector->input = *input;
    selector->rewritten_layer = -1;
    const ifkv_status status = ops->init(selector);
    if (status != IFKV_OK) {
        ifkv_selector_destroy(selector);
        return status;
    }
    *selector_p = selector;
    return IFKV_OK;
}

void ifkv_selector_destroy(ifkv_selector *selector) {
    if (!selector) return;
    selector->ops->fini(selector);
    free(selector);
}

int64_t ifkv_select_first_eligible(const ifkv_select_input *input) {
    return input->excludes_none ? 0 : ifkv_select_first(input->placement);
}

int64_t ifkv_select_first(const ifkv_placement *placement) {
    return placement->offset[ifkv_placement_first_document(placement) + 1];
}

ifkv_status ifkv_ratio_parse(const char *text, int64_t *num_p, int64_t *den_p) {
    int64_t num = 0, den = 1;
    const char *p = text;
    bool is_good = *p >= '0' && *p <= '9';
    for (; *p >= '0' && *p <= '9' && num <= 1; p++) num = 10 * num + (*p - '0');
    if (is_good && *p == '.') {
        p++;
        is_good = *p >= '0' && *p <= '9';
        for (; *p >= '0' && *p <= '9' && den < 1000000000000000; p++) {
            num = 10 * num + (*p - '0');
            den *= 10;
        }
    }
    char shown[IFKV_QUOTE_BYTES];
    IFKV_REQUIRE(is_good && !*p && num <= den, IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "ratio: got \"%s\", expected a decimal number from 0 to 1 such as 0.15",
                 ifkv_quote(text, strlen(text), shown));
    *num_p = num;
    *den_p = den;
    return IFKV_OK;
}

int64_t ifkv_select_by_ratio(int64_t num, int64_t den, int64_t n_context, int64_t n_eligible) {
    if (num == 0) return 0;
    /* num <= den <= 10^15 and n_context < 2^31, so split the product to stay within 64 bits */
    const int64_t whole = n_context / den * num;
    const int64_t rest = n_context % den;
    uint64_t product = 0;
    int64_t k = whole;
    if (!ifkv_mul_overflow((uint64_t)rest, (uint64_t)num, &product)) {
        k += (int64_t)(product / (uint64_t)den);
    } else {
        const int64_t high = rest * (num / 1000000), low = rest * (num % 1000000);
        k += (high + low / 1000000) / (den / 1000000);
    }
    if (k < 1) k = 1;
    return k < n_eligible ? k : n_eligible;
}

int64_t ifkv_select_ratio_budget(const ifkv_select_input *input, int64_t num, int64_t den) {
    const ifkv_placement *placement = input->placement;
    return ifkv_select_by_ratio(num, den, placement->n_context,
                                placement->n_context - ifkv_select_first_eligible(input));
}

static ifkv_status layers_from_list(const char *text, int n_layer, ifkv_select_input *input) {
    char shown[IFKV_QUOTE_BYTES];
    const char *p = text;
    int last = -1;
    input->n_score_layer = 0;
    for (;;) {
        char *end;
        const long layer = *p >= '0' && *p <= '9' ? strtol(p, &end, 10) : -1;
        IFKV_REQUIRE(layer > last && layer < n_layer &&
                         input->n_score_layer < IFKV_MAX_SCORE_LAYER && (*end == ',' || !*end),
                     IFKV_ERR_USAGE, IFKV_E_VALUE,
                     "score-layers: got \"%s\", expected published, wide or an ascending list of "
                     "layers from 0 to %d",
                     ifkv_quote(text, strlen(text), shown), n_layer - 1);
        input->score_layer[input->n_score_layer++] = last = (int)layer;
        if (!*end) return IFKV_OK;
        p = end + 1;
    }
}

ifkv_status ifkv_score_layers_parse(const char *text, int n_layer, ifkv_select_input *input) {
    int first, last, step = 1;
    if (!text) text = "wide";
    if (!strcmp(text, "published")) {
        first = n_layer >= 26 ? 22 : 11 * n_layer / 20;
        last = first + 3 < n_layer ? first + 3 : n_layer - 1;
    } else if (!strcmp(text, "wide")) {
        first = n_layer / 3;
        last = (int)(5 * (int64_t)n_layer / 6); /* options_check asks for INT32_MAX layers */
        step = 3;
    } else {
        return layers_from_list(text, n_layer, input);
    }
    input->n_score_layer = 0;
    for (int layer = first; layer <= last && input->n_score_layer < IFKV_MAX_SCORE_LAYER;
         layer += step)
        input->score_layer[input->n_score_layer++] = layer;
    return IFKV_OK;
}

ifkv_status ifkv_score_form_parse(const char *text, ifkv_score_form *form_p) {
    static const char *const names[] = {[IFKV_SCORE_L2] = "l2",
                                        [IFKV_SCORE_L1] = "l1",
                                        [IFKV_SCORE_MASS] = "mass",
                                        [IFKV_SCORE_L2H] = "l2h"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (strcmp(text, names[i])) continue;
        *form_p = (ifkv_score_form)i;
        return IFKV_OK;
    }
    char shown[IFKV_QUOTE_BYTES];
    return IFKV_FAIL(IFKV_ERR_USAGE, IFKV_E_VALUE,
                     "score: got \"%s\", expected l2, l1, mass or l2h",
                     ifkv_quote(text, strlen(text), shown));
}

ifkv_status ifkv_select_init_nothing(ifkv_selector *selector) {
    (void)selector;
    return IFKV_OK;
}

void ifkv_select_fini_nothing(ifkv_selector *selector) {
    (void)selector;
}

void ifkv_select_layout_nothing(ifkv_selector *selector, ifkv_arena *arena) {
    (void)selector, (void)arena;
}

ifkv_status ifkv_select_no_score(ifkv_selector *selector, float *score) {
    (void)score;
    return IFKV_FAIL(IFKV_ERR_INTERNAL, IFKV_E_STATE, "selector %s has no scores",
                     selector->ops->name);
}
