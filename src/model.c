/* Weights into back-end memory.  See model.h. */
#include "model.h"

#include "convert.h"
#include "digest.h"
#include "model_check.h"
#include "weights_random.h"

#include <stdlib.h>
#include <string.h>

/* A block is read, converted and uploaded while it is in the cache: on a 2 MiB L2, 512 KiB of
 * source and as much of result run fastest, and for a device larger copies gain little. */
#define BLOCK_ELEMENTS ((int64_t)128 << 10)

typedef struct loader {
    const ifkv_weight_plan *plan; /* borrowed */
    ifkv_backend *backend;        /* borrowed */
    char *base;                   /* borrowed: back-end memory */
    void *source, *result;        /* owned: BLOCK_ELEMENTS of at most 4 and 8 bytes */
} loader;

static ifkv_status loader_init(loader *l, const ifkv_weight_plan *plan, ifkv_backend *backend,
                               void *base) {
    l->plan = plan;
    l->backend = backend;
    l->base = base;
    l->source = malloc((size_t)BLOCK_ELEMENTS * sizeof(float));
    l->result = malloc((size_t)BLOCK_ELEMENTS * sizeof(double));
    if (l->source && l->result) return IFKV_OK;
    free(l->source);
    free(l->result);
    return IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "model: out of memory for blocks");
}

static void loader_fini(loader *l) {
    free(l->source);
    free(l->result);
}

static ifkv_status upload_block(const loader *l, ifkv_weight_kind kind, int layer, int64_t first,
                                const void *block, int64_t n) {
    const size_t bytes = ifkv_dtype_bytes(l->plan->dtype);
    char *to = l->base + ifkv_weights_offset(l->plan, kind, layer) + (size_t)first * bytes;
    return l->backend->ops->upload(l->backend, to, block, (size_t)n * bytes);
}

static ifkv_status not_finite(const ifkv_safetensors *set, const ifkv_tensor *tensor,
                              ifkv_dtype dtype, const void *block, int64_t first, int64_t n) {
    char where[IFKV_QUOTE_BYTES];
    const size_t bytes = ifkv_dtype_bytes(dtype);
    int64_t i = 0;
    while (i < n - 1 && ifkv_is_finite(dtype, (const char *)block + (size_t)i * bytes, 1)) i++;
    return IFKV_FAIL(IFKV_ERR_NUMERIC, IFKV_E_WEIGHT_VALUE,
                     "%s tensor \"%s\": element %lld: got NaN or infinity, expected a finite "
                     "number",
                     ifkv_path_quote(set->shard[tensor->shard].path, where), tensor->name,
                     (long long)(first + i));
}

static ifkv_status load_tensor(const loader *l, ifkv_safetensors *set, const ifkv_tensor *tensor,
                               ifkv_weight_kind kind, int layer) {
    const ifkv_weight *weight = &l->plan->weight[kind];
    const int64_t n = weight->n_row * weight->n_col;
    ifkv_dtype from = IFKV_DTYPE_F32;
    ifkv_tensor_dtype(tensor, &from); /* the check has seen that it has one */
    const size_t bytes = ifkv_dtype_bytes(from);
    const bool is_same = from == l->plan->dtype;
    for (int64_t i = 0; i < n; i += BLOCK_ELEMENTS) {
        const int64_t m = n - i < BLOCK_ELEMENTS ? n - i : BLOCK_ELEMENTS;
        const void *block = is_same ? l->source : l->result;
        IFKV_TRY(
            ifkv_safetensors_read(set, tensor, (uint64_t)i * bytes, l->source, (size_t)m * bytes));
        const bool is_finite = is_same
                                   ? ifkv_is_finite(from, l->source, m)
                                   : ifkv_convert(from, l->source, l->plan->dtype, l->result, m);
        if (!is_finite) return not_finite(set, tensor, l->plan->dtype, block, i, m);
        IFKV_TRY(upload_block(l, kind, layer, i, block, m));
    }
    return IFKV_OK;
}

/* In file order, so that a disk reads straight on. */
static ifkv_status load_files(const loader *l, ifkv_safetensors *set) {
    for (int64_t i = 0; i < set->n_tensor; i++) {
        ifkv_weight_kind kind;
        int layer;
        if (!ifkv_weights_find(l->plan, set->tensor[i].name, &kind, &layer)) continue;
        IFKV_TRY(load_tensor(l, set, &set->tensor[i], kind, layer));
    }
    return ifkv_safetensors_finish(set);
}

static ifkv_status draw_all(const loader *l, uint64_t seed) {
    for (int64_t i = 0; i < l->plan->n_tensor; i++) {
        ifkv_weight_kind kind;
        int layer;
        ifkv_weights_at(l->plan, i, &kind, &layer);
        const int64_t n = l->plan->weight[kind].n_row * l->plan->weight[kind].n_col;
        const ifkv_draw stream = ifkv_weights_stream(l->plan, seed, kind, layer);
        if (l->backend->ops->draw) {
            IFKV_TRY(l->backend->ops->draw(l->backend, &stream, n,
                                           l->base + ifkv_weights_offset(l->plan, kind, layer)));
            continue;
        }
        for (int64_t first = 0; first < n; first += BLOCK_ELEMENTS) {
            const int64_t m = n - first < BLOCK_ELEMENTS ? n - first : BLOCK_ELEMENTS;
            ifkv_weights_draw(&stream, first, m, l->source);
            ifkv_convert(IFKV_DTYPE_F32, l->source, l->plan->dtype, l->result, m);
            IFKV_TRY(upload_block(l, kind, layer, first, l->result, m));
        }
    }
    return IFKV_OK;
}

static ifkv_view view_of(const ifkv_weight_plan *plan, void *base, ifkv_weight_kind kind,
                         int layer) {
    const ifkv_weight *weight = &plan->weight[kind];
    if (!weight->is_needed) return ifkv_view_make(NULL, plan->dtype, 0, 0, 0);
    return ifkv_view_make((char *)base + ifkv_weights_offset(plan, kind, layer), plan->dtype,
                          weight->n_row, weight->n_col, weight->n_col);
}

static ifkv_layer_weights layer_views(const ifkv_weight_plan *plan, void *base, int layer) {
    ifkv_layer_weights w;
    w.attention_norm = view_of(plan, base, IFKV_WEIGHT_ATTENTION_NORM, layer);
    w.qkv = view_of(plan, base, IFKV_WEIGHT_Q, layer);
    w.qkv.n_row += plan->weight[IFKV_WEIGHT_K].n_row + plan->weight[IFKV_WEIGHT_V].n_row;
    w.q_norm = view_of(plan, base, IFKV_WEIGHT_Q_NORM, layer);
    w.k_norm = view_of(plan, base, IFKV_WEIGHT_K_NORM, layer);
    w.o = view_of(plan, base, IFKV_WEIGHT_O, layer);
    w.mlp_norm = view_of(plan, base, IFKV_WEIGHT_MLP_NORM, layer);
    w.gate_up = view_of(plan, base, IFKV_WEIGHT_GATE, layer);
    w.gate_up.n_row += plan->weight[IFKV_WEIGHT_UP].n_row;
    w.down = view_of(plan, base, IFKV_WEIGHT_DOWN, layer);
    return w;
}

static void set_views(const ifkv_weight_plan *plan, ifkv_model *model) {
    model->embed = view_of(plan, model->base, IFKV_WEIGHT_EMBED, 0);
    model->final_norm = view_of(plan, model->base, IFKV_WEIGHT_FINAL_NORM, 0);
    model->lm_head =
        model->config.is_tied ? model->embed : view_of(plan, model->base, IFKV_WEIGHT_LM_HEAD, 0);
    for (int i = 0; i < model->config.n_layer; i++)
        model->layer[i] = layer_views(plan, model->base, i);
}

static const ifkv_model_options DEFAULTS = {false, 0};

ifkv_status ifkv_model_check(const char *model_dir, const ifkv_model_options *options,
                             ifkv_dtype dtype, ifkv_model *model) {
    ifkv_model_plan plan;
    IFKV_TRY(ifkv_model_plan_init(model_dir, options ? options : &DEFAULTS, dtype, &plan));
    memset(model, 0, sizeof *model);
    model->config = plan.config;
    model->bytes = (size_t)plan.weights.bytes;
    model->n_parameter = (int64_t)plan.weights.n_parameter;
    model->fingerprint = plan.fingerprint;
    ifkv_model_plan_fini(&plan);
    return IFKV_OK;
}

static ifkv_status fill(const ifkv_model_plan *plan, const ifkv_model_options *options,
                        ifkv_backend *backend, void *base) {
    ifkv_status status;
    loader l;
    IFKV_TRY(loader_init(&l, &plan->weights, backend, base));
    status = options->random_weights ? draw_all(&l, options->seed) : load_files(&l, plan->files);
    if (status == IFKV_OK) status = backend->ops->sync(backend);
    loader_fini(&l);
    return status;
}

ifkv_status ifkv_model_load(const char *model_dir, const ifkv_model_options *options,
                            ifkv_backend *backend, ifkv_model *model) {
    ifkv_model loaded = {.backend = backend};
    ifkv_model_plan plan;
    ifkv_status status;
    if (!options) options = &DEFAULTS;
    IFKV_TRY(ifkv_model_plan_init(model_dir, options, backend->ops->dtype, &plan));
    loaded.config = plan.config;
    loaded.bytes = (size_t)plan.weights.bytes;
    loaded.n_parameter = (int64_t)plan.weights.n_parameter;
    loaded.fingerprint = plan.fingerprint;
    loaded.layer = calloc((size_t)plan.config.n_layer, sizeof *loaded.layer);
    loaded.n_user = malloc(sizeof *loaded.n_user);
    if (loaded.n_user) atomic_init(loaded.n_user, 1);
    if (!loaded.layer || !loaded.n_user) {
        status = IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "model: out of memory for %d layers",
                           plan.config.n_layer);
        goto err_fini;
    }
    IFKV_TRY_GOTO(status, backend->ops->alloc(backend, loaded.bytes, &loaded.base), err_fini);
    IFKV_TRY_GOTO(status, fill(&plan, options, backend, loaded.base), err_fini);
    set_views(&plan.weights, &loaded);
    ifkv_model_plan_fini(&plan);
    *model = loaded;
    return IFKV_OK;
err_fini:
    ifkv_model_fini(&loaded);
    ifkv_model_plan_fini(&plan);
    return status;
}

ifkv_status ifkv_model_share(const ifkv_model *from, ifkv_backend *backend, ifkv_model *model) {
    const size_t bytes = (size_t)from->config.n_layer * sizeof *from->layer;
    ifkv_layer_weights *layer = malloc(bytes);
    IFKV_REQUIRE(layer, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "model: out of memory for %d layers",
                 from->config.n_layer);
    memcpy(layer, from->layer, bytes);
    *model = *from;
    model->layer = layer;
    model->backend = backend;
    atomic_fetch_add(model->n_user, 1);
    return IFKV_OK;
}

/* Rows of one tensor, a block at a time: what lies between tensors is nobody's. */
static ifkv_status digest_view(const ifkv_model *model, const ifkv_view *view, void *block,
                               ifkv_digest *digest) {
    const ifkv_backend_ops *ops = model->backend->ops;
    const size_t element = ifkv_dtype_bytes(view->dtype);
    if (!view->data) return IFKV_OK;
    IFKV_REQUIRE(view->stride == view->n_col, IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "model: got weights of stride %lld, expected %lld", (long long)view->stride,
                 (long long)view->n_col);
    const int64_t n = view->n_row * view->n_col;
    for (int64_t at = 0; at < n; at += BLOCK_ELEMENTS) {
        const size_t bytes = (size_t)(n - at < BLOCK_ELEMENTS ? n - at : BLOCK_ELEMENTS) * element;
        IFKV_TRY(
            ops->download(model->backend, block, (char *)view->data + (size_t)at * element, bytes));
        ifkv_digest_add(digest, block, bytes);
    }
    return IFKV_OK;
}

ifkv_status ifkv_model_digest(const ifkv_model *model, uint64_t *digest_p) {
    ifkv_digest *digest;
    ifkv_status status;
    IFKV_TRY(ifkv_digest_create(&digest));
    void *block = malloc((size_t)BLOCK_ELEMENTS * sizeof(double));
    if (!block) {
        status = IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "model: out of memory for a block");
        goto out;
    }
    const ifkv_view ends[] = {model->embed, model->final_norm, model->lm_head};
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++)
        IFKV_TRY_GOTO(status, digest_view(model, &ends[i], block, digest), out);
    for (int l = 0; l < model->config.n_layer; l++) {
        const ifkv_layer_weights *w = &model->layer[l];
        const ifkv_view views[] = {w->attention_norm, w->qkv,     w->q_norm, w->k_norm, w->o,
                                   w->mlp_norm,       w->gate_up, w->down};
        for (size_t i = 0; i < sizeof views / sizeof *views; i++)
            IFKV_TRY_GOTO(status, digest_view(model, &views[i], block, digest), out);
    }
    *digest_p = ifkv_digest_value(digest);
    status = IFKV_OK;
out:
    free(block);
    ifkv_digest_destroy(digest);
    return status;
}

void ifkv_model_fini(ifkv_model *model) {
    if (!model) return;
    if (!model->n_user || atomic_fetch_sub(model->n_user, 1) == 1) {
        if (model->base) model->backend->ops->free(model->backend, model->base);
        free(model->n_user);
    }
    free(model->layer);
    memset(model, 0, sizeof *model);
}
