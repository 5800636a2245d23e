/* The tensors an architecture needs: names, shapes, and their places in the packed allocation.
 *
 * Owns the table of names per family and the layout that model.h describes; all layers are alike,
 * so the plan is a few rows whatever the number of layers.  Knows nothing of files and reads
 * nothing: plan only. */
#ifndef IFKV_SRC_WEIGHTS_H
#define IFKV_SRC_WEIGHTS_H

#include "config.h"
#include "tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum ifkv_weight_kind {
    IFKV_WEIGHT_EMBED,
    IFKV_WEIGHT_FINAL_NORM,
    IFKV_WEIGHT_LM_HEAD,
    IFKV_WEIGHT_ATTENTION_NORM, /* from here on: one a layer */
    IFKV_WEIGHT_Q,
    IFKV_WEIGHT_K,
    IFKV_WEIGHT_V,
    IFKV_WEIGHT_Q_NORM,
    IFKV_WEIGHT_K_NORM,
    IFKV_WEIGHT_O,
    IFKV_WEIGHT_MLP_NORM,
    IFKV_WEIGHT_GATE,
    IFKV_WEIGHT_UP,
    IFKV_WEIGHT_DOWN,
    IFKV_N_WEIGHT
} ifkv_weight_kind;

typedef struct ifkv_weight {
    bool is_needed;
    int n_dim;            /* 1: a vector of n_col */
    int64_t n_row, n_col; /* n_row 1 for a vector */
    uint64_t offset;      /* bytes, from the allocation or from the layer's begin */
} ifkv_weight;

typedef struct ifkv_weight_plan {
    ifkv_family family;
    ifkv_dtype dtype;
    int n_layer;
    ifkv_weight weight[IFKV_N_WEIGHT];
    uint64_t layer_begin, layer_bytes; /* layer i at layer_begin + i * layer_bytes */
    uint64_t bytes;                    /* of the allocation */
    uint64_t n_parameter;              /* a tied head counted once */
    int64_t n_tensor;                  /* needed */
} ifkv_weight_plan;

/* Compute the plan.  Errors: DATA if the model's size does not fit 63 bits. */
ifkv_status ifkv_weights_plan(const ifkv_config *config, ifkv_dtype dtype, ifkv_weight_plan *plan);

#define IFKV_WEIGHT_NAME_BYTES 96
/* "model.layers.3.self_attn.q_proj.weight"; layer is ignored for the three global ones. */
const char *ifkv_weight_name(ifkv_weight_kind kind, int layer, char *buffer);
/* The inverse: false if no needed tensor has this name. */
bool ifkv_weights_find(const ifkv_weight_plan *plan, const char *name, ifkv_weight_kind *kind,
                       int *layer);
/* Number the needed tensors 0 .. n_tensor - 1: the globals, then layer by layer. */
void ifkv_weights_at(const ifkv_weight_plan *plan, int64_t i, ifkv_weight_kind *kind, int *layer);

/* Byte in the allocation where a tensor begins. */
uint64_t ifkv_weights_offset(const ifkv_weight_plan *plan, ifkv_weight_kind kind, int layer);

#ifdef __cplusplus
}
#endif
#endif
