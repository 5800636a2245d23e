/* Names, shapes and places of the weights.  See weights.h. */
#include "weights.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LAYER_PREFIX "model.layers."
#define FIRST_OF_LAYER IFKV_WEIGHT_ATTENTION_NORM

/* llama and qwen3 share every name; llama has no head norms. */
static const char *const NAME[IFKV_N_WEIGHT] = {
    [IFKV_WEIGHT_EMBED] = "model.embed_tokens.weight",
    [IFKV_WEIGHT_FINAL_NORM] = "model.norm.weight",
    [IFKV_WEIGHT_LM_HEAD] = "lm_head.weight",
    [IFKV_WEIGHT_ATTENTION_NORM] = "input_layernorm.weight",
    [IFKV_WEIGHT_Q] = "self_attn.q_proj.weight",
    [IFKV_WEIGHT_K] = "self_attn.k_proj.weight",
    [IFKV_WEIGHT_V] = "self_attn.v_proj.weight",
    [IFKV_WEIGHT_Q_NORM] = "self_attn.q_norm.weight",
    [IFKV_WEIGHT_K_NORM] = "self_attn.k_norm.weight",
    [IFKV_WEIGHT_O] = "self_attn.o_proj.weight",
    [IFKV_WEIGHT_MLP_NORM] = "post_attention_layernorm.weight",
    [IFKV_WEIGHT_GATE] = "mlp.gate_proj.weight",
    [IFKV_WEIGHT_UP] = "mlp.up_proj.weight",
    [IFKV_WEIGHT_DOWN] = "mlp.down_proj.weight",
};

static void set_shape(ifkv_weight_plan *plan, ifkv_weight_kind kind, int64_t n_row, int64_t n_col) {
    ifkv_weight *weight = &plan->weight[kind];
    weight->is_needed = true;
    weight->n_dim = n_row == 0 ? 1 : 2;
    weight->n_row = n_row == 0 ? 1 : n_row;
    weight->n_col = n_col;
}

static void set_shapes(const ifkv_config *c, ifkv_weight_plan *plan) {
    const int64_t n_q = (int64_t)c->n_head * c->d_head, n_kv = (int64_t)c->n_kv_head * c->d_head;
    set_shape(plan, IFKV_WEIGHT_EMBED, c->n_vocab, c->d_model);
    set_shape(plan, IFKV_WEIGHT_FINAL_NORM, 0, c->d_model);
    if (!c->is_tied) set_shape(plan, IFKV_WEIGHT_LM_HEAD, c->n_vocab, c->d_model);
    set_shape(plan, IFKV_WEIGHT_ATTENTION_NORM, 0, c->d_model);
    set_shape(plan, IFKV_WEIGHT_Q, n_q, c->d_model);
    set_shape(plan, IFKV_WEIGHT_K, n_kv, c->d_model);
    set_shape(plan, IFKV_WEIGHT_V, n_kv, c->d_model);
    if (c->has_head_norm) set_shape(plan, IFKV_WEIGHT_Q_NORM, 0, c->d_head);
    if (c->has_head_norm) set_shape(plan, IFKV_WEIGHT_K_NORM, 0, c->d_head);
    set_shape(plan, IFKV_WEIGHT_O, c->d_model, n_q);
    set_shape(plan, IFKV_WEIGHT_MLP_NORM, 0, c->d_model);
    set_shape(plan, IFKV_WEIGHT_GATE, c->d_ff, c->d_model);
    set_shape(plan, IFKV_WEIGHT_UP, c->d_ff, c->d_model);
    set_shape(plan, IFKV_WEIGHT_DOWN, c->d_model, c->d_ff);
}

/* Matrices that are multiplied as one must touch; every other tensor begins on 64 bytes. */
static bool follows_closely(int kind) {
    return kind == IFKV_WEIGHT_K || kind == IFKV_WEIGHT_V || kind == IFKV_WEIGHT_UP;
}

/* Lay out kinds [first, end) from *at on; true if the sum does not fit. */
static bool place(ifkv_weight_plan *plan, int first, int end, uint64_t *at, uint64_t *n_element) {
    for (int i = first; i < end; i++) {
        ifkv_weight *weight = &plan->weight[i];
        uint64_t n, bytes;
        if (!weight->is_needed) continue;
        if (!follows_closely(i)) {
            if (ifkv_add_overflow(*at, 63, at)) return true;
            *at &= ~(uint64_t)63;
        }
        weight->offset = *at;
        if (ifkv_mul_overflow((uint64_t)weight->n_row, (uint64_t)weight->n_col, &n)) return true;
        if (ifkv_mul_overflow(n, ifkv_dtype_bytes(plan->dtype), &bytes)) return true;
        if (ifkv_add_overflow(*at, bytes, at)) return true;
        if (ifkv_add_overflow(*n_element, n, n_element)) return true;
    }
    if (ifkv_add_overflow(*at, 63, at)) return true;
    *at &= ~(uint64_t)63;
    return false;
}

static bool place_all(ifkv_weight_plan *plan) {
    uint64_t layer_n = 0, bytes;
    if (place(plan, 0, FIRST_OF_LAYER, &plan->layer_begin, &plan->n_parameter)) return true;
    if (place(plan, FIRST_OF_LAYER, IFKV_N_WEIGHT, &plan->layer_bytes, &layer_n)) return true;
    if (ifkv_mul_overflow(plan->layer_bytes, (uint64_t)plan->n_layer, &bytes)) return true;
    if (ifkv_add_overflow(plan->layer_begin, bytes, &plan->bytes)) return true;
    if (ifkv_mul_overflow(layer_n, (uint64_t)plan->n_layer, &layer_n)) return true;
    if (ifkv_add_overflow(plan->n_parameter, layer_n, &plan->n_parameter)) return true;
    return plan->bytes > INT64_MAX || plan->n_parameter > INT64_MAX;
}

static int64_t count(const ifkv_weight_plan *plan, int first, int end) {
    int64_t n = 0;
    for (int i = first; i < end; i++) n += plan->weight[i].is_needed;
    return n;
}

ifkv_status ifkv_weights_plan(const ifkv_config *config, ifkv_dtype dtype, ifkv_weight_plan *plan) {
    ifkv_weight_plan planned = {.family = config->family, .dtype = dtype};
    planned.n_layer = config->n_layer;
    set_shapes(config, &planned);
    IFKV_REQUIRE(!place_all(&planned), IFKV_ERR_DATA, IFKV_E_WEIGHTS,
                 "weights: size of the model: got 2^63 bytes or more with num_hidden_layers %d, "
                 "expected less",
                 config->n_layer);
    planned.n_tensor = count(&planned, 0, FIRST_OF_LAYER) +
                       config->n_layer * count(&planned, FIRST_OF_LAYER, IFKV_N_WEIGHT);
    *plan = planned;
    return IFKV_OK;
}

const char *ifkv_weight_name(ifkv_weight_kind kind, int layer, char *buffer) {
    if (kind < FIRST_OF_LAYER)
        snprintf(buffer, IFKV_WEIGHT_NAME_BYTES, "%s", NAME[kind]);
    else
        snprintf(buffer, IFKV_WEIGHT_NAME_BYTES, LAYER_PREFIX "%d.%s", layer, NAME[kind]);
    return buffer;
}

bool ifkv_weights_find(const ifkv_weight_plan *plan, const char *name, ifkv_weight_kind *kind,
                       int *layer) {
    const size_t n_prefix = sizeof LAYER_PREFIX - 1;
    const bool is_layer = strncmp(name, LAYER_PREFIX, n_prefix) == 0;
    const char *rest = name;
    int64_t i_layer = 0;
    if (is_layer) {
        const char *digit = name + n_prefix;
        for (rest = digit; *rest >= '0' && *rest <= '9' && rest - digit < 10; rest++)
            i_layer = 10 * i_layer + (*rest - '0');
        /* "03" names no layer: the inverse of ifkv_weight_name must be unique. */
        const bool is_number = rest > digit && (rest == digit + 1 || *digit != '0');
        if (!is_number || *rest++ != '.' || i_layer >= plan->n_layer) return false;
    }
    for (int i = is_layer ? FIRST_OF_LAYER : 0; i < (is_layer ? IFKV_N_WEIGHT : FIRST_OF_LAYER);
         i++) {
        if (!plan->weight[i].is_needed || strcmp(rest, NAME[i]) != 0) continue;
        *kind = (ifkv_weight_kind)i;
        *layer = (int)i_layer;
        return true;
    }
    return false;
}

void ifkv_weights_at(const ifkv_weight_plan *plan, int64_t i, ifkv_weight_kind *kind, int *layer) {
    const int64_t n_global = count(plan, 0, FIRST_OF_LAYER);
    const int64_t n_layer = count(plan, FIRST_OF_LAYER, IFKV_N_WEIGHT);
    int k = i < n_global ? 0 : FIRST_OF_LAYER;
    int64_t left = i < n_global ? i : (i - n_global) % n_layer;
    for (; !plan->weight[k].is_needed || left > 0; k++) left -= plan->weight[k].is_needed;
    *kind = (ifkv_weight_kind)k;
    *layer = i < n_global ? 0 : (int)((i - n_global) / n_layer);
}

uint64_t ifkv_weights_offset(const ifkv_weight_plan *plan, ifkv_weight_kind kind, int layer) {
    const uint64_t offset = plan->weight[kind].offset;
    if (kind < FIRST_OF_LAYER) return offset;
    return plan->layer_begin + (uint64_t)layer * plan->layer_bytes + offset;
}
