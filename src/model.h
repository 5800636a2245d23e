/* The weights of a model, resident on one back end.
 *
 * Owns one allocation that holds every tensor in the back end's dtype, packed so that a layer needs
 * four products: Q, K and V lie in one matrix, gate and up in another.  Models of one process may
 * read one allocation; the last of them releases it.  Knows the tensor names of each family; knows
 * nothing of requests or ranks.
 * On the CPU the dtype is float32 whatever the checkpoint's: OpenBLAS multiplies bf16 weights only
 * with bf16 activations, which would give up float32 results, and widening them in every pass would
 * read and write the weights once more than the products do.  The price is memory. */
#ifndef IFKV_SRC_MODEL_H
#define IFKV_SRC_MODEL_H

#include <stdatomic.h>

#include "backend.h"
#include "config.h"

typedef struct ifkv_layer_weights {
    ifkv_view attention_norm; /* [1, d_model] */
    ifkv_view qkv; /* [(n_head + 2 n_kv_head) * d_head, d_model]: Q rows, K rows, V rows */
    ifkv_view q_norm, k_norm; /* [1, d_head]; data NULL where the family has none */
    ifkv_view o;              /* [d_model, n_head * d_head] */
    ifkv_view mlp_norm;       /* [1, d_model] */
    ifkv_view gate_up;        /* [2 * d_ff, d_model]: gate rows, up rows */
    ifkv_view down;           /* [d_model, d_ff] */
} ifkv_layer_weights;

typedef struct ifkv_model {
    ifkv_config config;
    ifkv_view embed;           /* [n_vocab, d_model] */
    ifkv_view final_norm;      /* [1, d_model] */
    ifkv_view lm_head;         /* [n_vocab, d_model]; the same data as embed where tied */
    ifkv_layer_weights *layer; /* [n_layer], owned */
    size_t bytes;              /* of the allocation */
    int64_t n_parameter;
    uint64_t fingerprint;  /* XXH3-64 of config.json, then name, dtype and shape of every tensor,
                              then header  digests */
    ifkv_backend *backend; /* borrowed; NULL if only checked */
    void *base;            /* the allocation, back-end memory; owned with those that share it */
    atomic_int *n_user;    /* models that share it, this one included; owned likewise */
} ifkv_model;

typedef struct ifkv_model_options {
    bool random_weights;
    uint64_t seed;
} ifkv_model_options;

/* Validate a model directory in the order of faults 2.4: config.json, index, every shard header,
 * tensor set against the architecture.  Fills config, n_parameter, bytes (as resident in `dtype`)
 * and fingerprint; reads no weight.  Local. The caller releases with ifkv_model_fini. */
ifkv_status ifkv_model_check(const char *model_dir, const ifkv_model_options *options,
                             ifkv_dtype dtype, ifkv_model *model);

/* ifkv_model_check, then read (or draw) the weights into back-end memory.  Local; backend borrowed
 * for the model's life. Errors besides check's: IO, DATA (file changed), NUMERIC (NaN or infinity
 * in the weights), RESOURCE. */
ifkv_status ifkv_model_load(const char *model_dir, const ifkv_model_options *options,
                            ifkv_backend *backend, ifkv_model *model);
/* The same weights for another back end of this process that computes in the same memory: nothing
 * is copied.  `from` must be there until this returns.  Local.  Errors: RESOURCE. */
ifkv_status ifkv_model_share(const ifkv_model *from, ifkv_backend *backend, ifkv_model *model);
/* XXH3-64 of all weights as they are resident.  Local.  Errors: RESOURCE, the back end's. */
ifkv_status ifkv_model_digest(const ifkv_model *model, uint64_t *digest_p);
void ifkv_model_fini(ifkv_model *model);

#endif
