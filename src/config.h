/* config.json of a Hugging Face model directory, normalised and validated.
 *
 * Owns the model's shape: every number the rest of the library needs to know about the
 * architecture.  Refuses by name whatever is not implemented (UNSUPPORTED) or does not make sense
 * (DATA).  Knows nothing of weights, back ends or ranks. */
#ifndef IFKV_SRC_CONFIG_H
#define IFKV_SRC_CONFIG_H

#include "status.h"

#ifdef __cplusplus
extern "C" {
#endif

#define IFKV_MAX_EOS 16

typedef enum ifkv_family { IFKV_FAMILY_LLAMA, IFKV_FAMILY_QWEN3 } ifkv_family;

typedef enum ifkv_rope_kind { IFKV_ROPE_PLAIN, IFKV_ROPE_LLAMA3 } ifkv_rope_kind;

typedef struct ifkv_config {
    ifkv_family family;
    int n_layer, n_head, n_kv_head, d_head, d_model, d_ff;
    int64_t n_vocab, max_position;
    double norm_eps;
    double rope_theta;
    ifkv_rope_kind rope_kind;
    double rope_factor, rope_low, rope_high; /* of llama3 scaling */
    int64_t rope_original; /* original_max_position_embeddings of llama3 scaling */
    bool is_tied;          /* LM head = embedding */
    bool has_head_norm;    /* RMS norm of size d_head on every head of Q and K, before rotation */
    int n_eos;
    int32_t eos[IFKV_MAX_EOS]; /* end-of-turn ids, of config.json and, where it exists,
                                  generation_config.json */
    char stated_dtype[16];     /* "dtype" or "torch_dtype", "" if absent: information, the tensors'
                                  own type wins */
    uint64_t digest;           /* XXH3-64 of config.json as read */
} ifkv_config;

/* Read and validate DIR/config.json (and DIR/generation_config.json if present).  Local.
 * Errors: NO_INPUT, PERMISSION, DATA, UNSUPPORTED, each naming file, field, value and expectation
 * (faults group B). */
ifkv_status ifkv_config_load(const char *model_dir, ifkv_config *config);

/* "llama" or "qwen3". */
const char *ifkv_family_name(ifkv_family family);

#ifdef __cplusplus
}
#endif
#endif
