#include "narrow_backend.h"

#include "gen.h"

static ifkv_backend_ops narrow_ops;
static const ifkv_backend_ops *wide_ops;
static int64_t n_vocab; /* logits stay float32 */

static void narrow_view(const ifkv_view *view) {
    float *data = view->data;
    for (int64_t r = 0; r < view->n_row; r++)
        for (int64_t c = 0; c < view->n_col; c++) {
            float *at = &data[r * view->stride + c];
            *at = (float)gen_round(IFKV_DTYPE_BF16, (double)*at);
        }
}

static ifkv_status narrow_matmul(ifkv_backend *backend, const ifkv_view *x, const ifkv_view *w,
                                 bool add_to_out, const ifkv_view *out) {
    IFKV_TRY(wide_ops->matmul(backend, x, w, add_to_out, out));
    if (out->n_col != n_vocab) narrow_view(out);
    return IFKV_OK;
}

static ifkv_status narrow_rms_norm(ifkv_backend *backend, const ifkv_view *x,
                                   const ifkv_view *weight, double eps, const ifkv_view *out) {
    IFKV_TRY(wide_ops->rms_norm(backend, x, weight, eps, out));
    narrow_view(out);
    return IFKV_OK;
}

static ifkv_status narrow_rope(ifkv_backend *backend, const ifkv_view *x, int n_head,
                               const ifkv_view *weight, double eps, const ifkv_view *cos_sin) {
    IFKV_TRY(wide_ops->rope(backend, x, n_head, weight, eps, cos_sin));
    narrow_view(x);
    return IFKV_OK;
}

static ifkv_status narrow_swiglu(ifkv_backend *backend, const ifkv_view *gate_up,
                                 const ifkv_view *out) {
    IFKV_TRY(wide_ops->swiglu(backend, gate_up, out));
    narrow_view(out);
    return IFKV_OK;
}

/* Partial results, which stay float32, lie beside their lse: their rows are not dense. */
static void narrow_attended(const ifkv_view *out) {
    if (out->data && out->dtype == IFKV_DTYPE_F32 && out->stride == out->n_col) narrow_view(out);
}

static ifkv_status narrow_attention(ifkv_backend *backend, const ifkv_attention_args *args) {
    IFKV_TRY(wide_ops->attention(backend, args));
    narrow_attended(&args->out);
    return IFKV_OK;
}

static ifkv_status narrow_merge(ifkv_backend *backend, const ifkv_merge_args *args) {
    IFKV_TRY(wide_ops->merge(backend, args));
    narrow_attended(&args->out);
    return IFKV_OK;
}

static ifkv_status narrow_refit(ifkv_backend *backend, const ifkv_refit_args *args) {
    IFKV_TRY(wide_ops->refit(backend, args));
    narrow_view(&args->x);
    return IFKV_OK;
}

ifkv_status round_weights(ifkv_engine *engine) {
    const ifkv_view all = ifkv_view_make(engine->model.base, IFKV_DTYPE_F32, 1,
                                         (int64_t)(engine->model.bytes / sizeof(float)),
                                         (int64_t)(engine->model.bytes / sizeof(float)));
    narrow_view(&all);
    return IFKV_OK;
}

ifkv_status compute_narrowly(ifkv_engine *engine) {
    wide_ops = engine->backend->ops;
    n_vocab = engine->model.config.n_vocab;
    narrow_ops = *wide_ops;
    narrow_ops.matmul = narrow_matmul;
    narrow_ops.rms_norm = narrow_rms_norm;
    narrow_ops.rope = narrow_rope;
    narrow_ops.swiglu = narrow_swiglu;
    narrow_ops.attention = narrow_attention;
    narrow_ops.merge = narrow_merge;
    narrow_ops.refit = narrow_refit;
    engine->backend->ops = &narrow_ops;
    return round_weights(engine);
}
