/* A model directory, validated as far as that goes without reading a weight.
 *
 * Owns the order of validation (config.json, index, headers, tensor set against architecture) and
 * the fingerprint.  Private to model.c. */
#ifndef IFKV_SRC_MODEL_CHECK_H
#define IFKV_SRC_MODEL_CHECK_H

#include "model.h"
#include "safetensors.h"
#include "weights.h"

typedef struct ifkv_model_plan {
    ifkv_config config;
    ifkv_weight_plan weights;
    ifkv_safetensors *files; /* owned; NULL with random weights */
    uint64_t fingerprint;
} ifkv_model_plan;

/* Errors: those of ifkv_model_check.  The caller releases with fini. */
ifkv_status ifkv_model_plan_init(const char *model_dir, const ifkv_model_options *options,
                                 ifkv_dtype dtype, ifkv_model_plan *plan);
void ifkv_model_plan_fini(ifkv_model_plan *plan);

#endif
