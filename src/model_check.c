/* Tensor set against architecture, and the fingerprint.  See model_check.h. */
#include "model_check.h"

#include "digest.h"
#include "log.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

#define N_NAMED 5 /* tensors named in a message; the rest are counted */
/* With random weights no file bounds the number of layers. */
#define RANDOM_LAYER_MAX 65536

/* A message that grows up to a bound. */
typedef struct text {
    char bytes[640];
    size_t n;
} text;

static void text_add(text *t, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void text_add(text *t, const char *format, ...) {
    va_list args;
    va_start(args, format);
    const int n = vsnprintf(t->bytes + t->n, sizeof t->bytes - t->n, format, args);
    va_end(args);
    if (n > 0) t->n += (size_t)n;
    if (t->n >= sizeof t->bytes) t->n = sizeof t->bytes - 1;
}

static bool is_shape(const ifkv_tensor *tensor, const ifkv_weight *weight) {
    if (tensor->n_dim != weight->n_dim) return false;
    if (weight->n_dim == 2 && tensor->dim[0] != (uint64_t)weight->n_row) return false;
    return tensor->dim[weight->n_dim - 1] == (uint64_t)weight->n_col;
}

/* How many needed tensors the files have.  Names are unique, so that counting them from the files'
 * side is exact and takes no time that num_hidden_layers could choose. */
static int64_t count_present(const ifkv_weight_plan *plan, const ifkv_safetensors *files) {
    int64_t n = 0;
    ifkv_weight_kind kind;
    int layer;
    for (int64_t i = 0; i < files->n_tensor; i++)
        n += ifkv_weights_find(plan, files->tensor[i].name, &kind, &layer);
    return n;
}

/* Stops at the fifth missing tensor, so walks at most that many past those that are there. */
static ifkv_status check_missing(const char *where, const ifkv_model_plan *plan) {
    const int64_t n_needed = plan->weights.n_tensor;
    const int64_t n_missing = n_needed - count_present(&plan->weights, plan->files);
    char name[IFKV_WEIGHT_NAME_BYTES];
    text list = {.n = 0};
    int n_named = 0;
    if (n_missing == 0) return IFKV_OK;
    for (int64_t i = 0; i < n_needed && n_named < N_NAMED; i++) {
        ifkv_weight_kind kind;
        int layer;
        ifkv_weights_at(&plan->weights, i, &kind, &layer);
        if (ifkv_safetensors_find(plan->files, ifkv_weight_name(kind, layer, name))) continue;
        text_add(&list, "%s\"%s\"", n_named++ ? ", " : "", name);
    }
    return IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_WEIGHTS,
                     "%s: tensors missing: got none of %s%s (%lld of %lld missing), expected them "
                     "for %s with num_hidden_layers %d, tie_word_embeddings %s",
                     where, list.bytes, n_missing > n_named ? ", ..." : "", (long long)n_missing,
                     (long long)n_needed, ifkv_family_name(plan->config.family),
                     plan->config.n_layer, plan->config.is_tied ? "true" : "false");
}

static void add_wrong_shape(text *list, const ifkv_tensor *tensor, const ifkv_weight *weight) {
    char shape[IFKV_QUOTE_BYTES];
    text_add(list, "%s\"%s\" got %s, expected ", list->n ? "; " : "", tensor->name,
             ifkv_tensor_show_shape(tensor, shape));
    if (weight->n_dim == 1)
        text_add(list, "[%lld]", (long long)weight->n_col);
    else
        text_add(list, "[%lld, %lld]", (long long)weight->n_row, (long long)weight->n_col);
}

/* Every needed tensor has the architecture's shape and a type that can be converted. */
static ifkv_status check_shapes(const char *where, const ifkv_model_plan *plan) {
    const ifkv_safetensors *files = plan->files;
    text list = {.n = 0};
    int64_t n_wrong = 0;
    for (int64_t i = 0; i < files->n_tensor; i++) {
        const ifkv_tensor *tensor = files->by_name[i];
        ifkv_weight_kind kind;
        ifkv_dtype dtype;
        int layer;
        if (!ifkv_weights_find(&plan->weights, tensor->name, &kind, &layer)) continue;
        IFKV_REQUIRE(ifkv_tensor_dtype(tensor, &dtype), IFKV_ERR_UNSUPPORTED, IFKV_E_TENSOR_DTYPE,
                     "%s tensor \"%s\" dtype: not supported for a weight: got \"%s\", expected "
                     "BF16, F16 or F32",
                     where, tensor->name, ifkv_tensor_type_name(tensor->type));
        if (is_shape(tensor, &plan->weights.weight[kind])) continue;
        if (n_wrong++ < N_NAMED) add_wrong_shape(&list, tensor, &plan->weights.weight[kind]);
    }
    IFKV_REQUIRE(n_wrong == 0, IFKV_ERR_DATA, IFKV_E_WEIGHTS,
                 "%s: tensors of the wrong shape (%lld): %s%s", where, (long long)n_wrong,
                 list.bytes, n_wrong > N_NAMED ? "; ..." : "");
    return IFKV_OK;
}

/* Old files carry the rotary frequencies, and some tied ones a copy of the head. */
static bool is_harmless(const ifkv_model_plan *plan, const ifkv_tensor *tensor) {
    static const char inv_freq[] = "rotary_emb.inv_freq";
    const size_t n = strlen(tensor->name), n_inv = sizeof inv_freq - 1;
    if (n >= n_inv && strcmp(tensor->name + n - n_inv, inv_freq) == 0) return true;
    return plan->config.is_tied && strcmp(tensor->name, "lm_head.weight") == 0 &&
           is_shape(tensor, &plan->weights.weight[IFKV_WEIGHT_EMBED]);
}

static void warn_extra(const char *where, const ifkv_model_plan *plan) {
    char quoted[IFKV_QUOTE_BYTES];
    text list = {.n = 0};
    int64_t n_extra = 0;
    for (int64_t i = 0; i < plan->files->n_tensor; i++) {
        const ifkv_tensor *tensor = plan->files->by_name[i];
        ifkv_weight_kind kind;
        int layer;
        if (ifkv_weights_find(&plan->weights, tensor->name, &kind, &layer) ||
            is_harmless(plan, tensor))
            continue;
        if (n_extra++ < N_NAMED)
            text_add(&list, "%s\"%s\"", n_extra > 1 ? ", " : "",
                     ifkv_quote(tensor->name, strlen(tensor->name), quoted));
    }
    if (n_extra > 0)
        ifkv_log(IFKV_LOG_WARN,
                 "%s: %lld tensors that the architecture does not have: %s%s; "
                 "ignored",
                 where, (long long)n_extra, list.bytes, n_extra > N_NAMED ? ", ..." : "");
}

/* config.json may state another type than the files hold; the files are right. */
static void warn_dtype(const char *where, const ifkv_model_plan *plan) {
    static const struct {
        const char *stated, *type;
    } SAME[] = {{"float32", "F32"}, {"bfloat16", "BF16"}, {"float16", "F16"}};
    const char *stated = plan->config.stated_dtype;
    char quoted[IFKV_QUOTE_BYTES];
    const ifkv_tensor *embed = ifkv_safetensors_find(plan->files, "model.embed_tokens.weight");
    const char *type = ifkv_tensor_type_name(embed->type);
    if (strncmp(stated, "torch.", 6) == 0) stated += 6;
    if (!*stated || strcmp(stated, "auto") == 0) return;
    for (size_t i = 0; i < sizeof SAME / sizeof SAME[0]; i++)
        if (strcmp(stated, SAME[i].stated) == 0 && strcmp(type, SAME[i].type) == 0) return;
    ifkv_log(IFKV_LOG_WARN,
             "%s/config.json /torch_dtype: got \"%s\", but the tensors are %s; the tensors' type "
             "is used",
             where, ifkv_quote(stated, strlen(stated), quoted), type);
}

static ifkv_status check_files(const char *model_dir, ifkv_model_plan *plan) {
    char where[IFKV_QUOTE_BYTES];
    ifkv_path_quote(model_dir, where);
    IFKV_TRY(ifkv_safetensors_open(model_dir, &plan->files));
    IFKV_TRY(check_missing(where, plan));
    IFKV_TRY(check_shapes(where, plan));
    warn_extra(where, plan);
    warn_dtype(where, plan);
    return IFKV_OK;
}

/* Name with its NUL, type, rank and dimensions: no two directories run into the same bytes. */
static void digest_tensor(ifkv_digest *digest, const char *name, const char *type, int n_dim,
                          const uint64_t *dim) {
    ifkv_digest_add(digest, name, strlen(name) + 1);
    ifkv_digest_add(digest, type, strlen(type) + 1);
    ifkv_digest_add_u64(digest, (uint64_t)n_dim);
    for (int i = 0; i < n_dim; i++) ifkv_digest_add_u64(digest, dim[i]);
}

static void digest_files(ifkv_digest *digest, const ifkv_safetensors *files) {
    for (int64_t i = 0; i < files->n_tensor; i++) {
        const ifkv_tensor *t = files->by_name[i];
        digest_tensor(digest, t->name, ifkv_tensor_type_name(t->type), t->n_dim, t->dim);
    }
    for (int i = 0; i < files->n_shard; i++)
        ifkv_digest_add_u64(digest, files->shard[i].header_digest);
}

/* Drawn weights are given by the seed and the set; "random 1" names the generator. */
static void digest_random(ifkv_digest *digest, const ifkv_weight_plan *plan, uint64_t seed) {
    static const char generator[] = "random 1";
    char name[IFKV_WEIGHT_NAME_BYTES];
    ifkv_digest_add(digest, generator, sizeof generator);
    ifkv_digest_add_u64(digest, seed);
    for (int64_t i = 0; i < plan->n_tensor; i++) {
        ifkv_weight_kind kind;
        int layer;
        ifkv_weights_at(plan, i, &kind, &layer);
        const ifkv_weight *w = &plan->weight[kind];
        const uint64_t dim[2] = {(uint64_t)w->n_row, (uint64_t)w->n_col};
        digest_tensor(digest, ifkv_weight_name(kind, layer, name), "F32", w->n_dim,
                      w->n_dim == 2 ? dim : dim + 1);
    }
}

static ifkv_status take_fingerprint(const ifkv_model_options *options, ifkv_model_plan *plan) {
    ifkv_digest *digest;
    IFKV_TRY(ifkv_digest_create(&digest));
    ifkv_digest_add_u64(digest, plan->config.digest);
    if (plan->files)
        digest_files(digest, plan->files);
    else
        digest_random(digest, &plan->weights, options->seed);
    plan->fingerprint = ifkv_digest_value(digest);
    ifkv_digest_destroy(digest);
    return IFKV_OK;
}

ifkv_status ifkv_model_plan_init(const char *model_dir, const ifkv_model_options *options,
                                 ifkv_dtype dtype, ifkv_model_plan *plan) {
    ifkv_model_plan planned = {.files = NULL};
    ifkv_status status;
    IFKV_TRY(ifkv_config_load(model_dir, &planned.config));
    IFKV_TRY(ifkv_weights_plan(&planned.config, dtype, &planned.weights));
    IFKV_REQUIRE(!options->random_weights || planned.config.n_layer <= RANDOM_LAYER_MAX,
                 IFKV_ERR_DATA, IFKV_E_CONFIG_FIELD,
                 "config.json /num_hidden_layers: out of range for random weights: got %d, "
                 "expected at most %d",
                 planned.config.n_layer, RANDOM_LAYER_MAX);
    if (!options->random_weights)
        IFKV_TRY_GOTO(status, check_files(model_dir, &planned), err_close);
    IFKV_TRY_GOTO(status, take_fingerprint(options, &planned), err_close);
    *plan = planned;
    return IFKV_OK;
err_close:
    ifkv_safetensors_close(planned.files);
    return status;
}

void ifkv_model_plan_fini(ifkv_model_plan *plan) {
    ifkv_safetensors_close(plan->files);
    plan->files = NULL;
}
