/* Attention of the CUDA back end: checks operands, chooses a kernel, plans and launches it.
 *
 * Which kernel runs is a matter of the device and d_head only, never of how much there is to do:
 * each has its own rounding, and a chunk must have the same bits alone and among others.  Where
 * spans are cut into parts, their float32 results lie in the workspace until they are merged:
 *
 *   item counter, 256 bytes | out [n_part, n_row, n_head * d_head] | lse [n_part, n_row, n_head]
 */
#include "attention.h"

#include <limits.h>

enum { COUNTER_BYTES = 256 };

size_t ifkv_cuda_attention_bytes(const ifkv_cuda_context *context, int n_head, int n_kv_head,
                                 int d_head) {
    (void)n_head, (void)n_kv_head; /* the bound holds for any heads */
    return COUNTER_BYTES + ifkv_attention_part_bytes(d_head, context->n_sm);
}

static ifkv_status check_rows(const char *what, const ifkv_view *view, int64_t n_row,
                              int64_t n_col) {
    IFKV_TRY(ifkv_view_check("attention", what, view, IFKV_DTYPE_BF16, n_row, n_col));
    IFKV_REQUIRE((uintptr_t)view->data % 16 == 0 && view->stride % 8 == 0, IFKV_ERR_INTERNAL,
                 IFKV_E_SHAPE, "attention: %s starts at %p with stride %lld, expected 16-byte rows",
                 what, view->data, (long long)view->stride);
    return IFKV_OK;
}

static ifkv_status check(const ifkv_attention_args *args) {
    const int n_head = args->n_head, n_kv_head = args->n_kv_head, d_head = args->d_head;
    IFKV_REQUIRE(n_kv_head > 0 && n_head > 0 && n_head % n_kv_head == 0, IFKV_ERR_INTERNAL,
                 IFKV_E_SHAPE, "attention: head count %d is not a multiple of kv heads %d", n_head,
                 n_kv_head);
    IFKV_REQUIRE(n_head / n_kv_head <= IFKV_ATTENTION_SM80_M, IFKV_ERR_UNSUPPORTED, IFKV_E_SHAPE,
                 "attention: got %d query heads a kv head, expected at most %d", n_head / n_kv_head,
                 IFKV_ATTENTION_SM80_M);
    IFKV_REQUIRE(d_head % 16 == 0 && d_head >= 16 && d_head <= 128, IFKV_ERR_UNSUPPORTED,
                 IFKV_E_SHAPE, "attention: got d_head %d, expected a multiple of 16 up to 128",
                 d_head);
    const int64_t n_row = args->q.n_row, n_key = args->k.n_row, q_cols = (int64_t)n_head * d_head,
                  kv_cols = (int64_t)n_kv_head * d_head;
    IFKV_TRY(check_rows("q", &args->q, n_row, q_cols));
    IFKV_TRY(check_rows("k", &args->k, n_key, kv_cols));
    IFKV_TRY(check_rows("v", &args->v, n_key, kv_cols));
    const ifkv_dtype to = args->out.dtype == IFKV_DTYPE_F32 ? IFKV_DTYPE_F32 : IFKV_DTYPE_BF16;
    IFKV_TRY(ifkv_view_check("attention", "out", &args->out, to, n_row, q_cols));
    IFKV_TRY(ifkv_view_check("attention", "lse", &args->lse, IFKV_DTYPE_F32, n_row, n_head));
    IFKV_REQUIRE(n_row <= INT_MAX && n_key <= INT_MAX - IFKV_ATTENTION_BLOCK_KEYS,
                 IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "attention: got %lld rows and %lld keys, expected below 2^31", (long long)n_row,
                 (long long)n_key);
    IFKV_REQUIRE(args->scale > 0, IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "attention: got scale %g, expected a positive one", (double)args->scale);
    return IFKV_OK;
}

static ifkv_attention_call call_of(const ifkv_cuda_context *context,
                                   const ifkv_attention_args *args) {
    return (ifkv_attention_call){
        .q = args->q.data,
        .k = args->k.data,
        .v = args->v.data,
        .q_stride = args->q.stride,
        .k_stride = args->k.stride,
        .v_stride = args->v.stride,
        .begin = args->begin,
        .end = args->end,
        .n_row = args->q.n_row,
        .n_key = args->k.n_row,
        .d_head = args->d_head,
        .scale_log2 = (float)((double)args->scale * 1.4426950408889634074),
        .out = args->out.data,
        .is_out_float = args->out.dtype == IFKV_DTYPE_F32,
        .lse = args->lse.data,
        .out_stride = args->out.stride,
        .lse_stride = args->lse.stride,
        .fault = context->fault,
        .next_item = context->workspace,
    };
}

/* Let the kernel write parts into the workspace; parts [2 * n_part] receives the views for merge,
 * outs before lses. */
static ifkv_status place_parts(const ifkv_cuda_context *context, const ifkv_attention_args *args,
                               ifkv_attention_call *call, ifkv_view *part) {
    const int64_t n_part = call->plan.n_part, n_row = call->n_row, n_head = args->n_head,
                  q_cols = n_head * args->d_head;
    const size_t bytes =
        COUNTER_BYTES + (size_t)(n_part * n_row * (q_cols + n_head)) * sizeof(float);
    IFKV_REQUIRE(n_part <= IFKV_ATTENTION_MAX_PARTS && bytes <= context->workspace_bytes,
                 IFKV_ERR_INTERNAL, IFKV_E_MEMORY,
                 "attention: %lld parts take %zu bytes, got a workspace of %zu", (long long)n_part,
                 bytes, context->workspace_bytes);
    float *out = (float *)(void *)((char *)context->workspace + COUNTER_BYTES);
    float *lse = out + n_part * n_row * q_cols;
    call->out = out;
    call->lse = lse;
    call->is_out_float = true;
    call->out_stride = q_cols;
    call->lse_stride = n_head;
    call->out_part_stride = n_row * q_cols;
    call->lse_part_stride = n_row * n_head;
    for (int64_t i = 0; i < n_part; i++) {
        part[i] = ifkv_view_make(out + i * n_row * q_cols, IFKV_DTYPE_F32, n_row, q_cols, q_cols);
        part[n_part + i] =
            ifkv_view_make(lse + i * n_row * n_head, IFKV_DTYPE_F32, n_row, n_head, n_head);
    }
    return IFKV_OK;
}

static ifkv_status choose(const ifkv_cuda_context *context, const ifkv_attention_args *args,
                          ifkv_attention_kernel *kernel) {
    const bool can_sm90 = context->arch / 10 == 9 && (args->d_head == 64 || args->d_head == 128);
    IFKV_REQUIRE(*kernel != IFKV_ATTENTION_SM90 || can_sm90, IFKV_ERR_UNSUPPORTED, IFKV_E_BACKEND,
                 "attention: the sm_90 kernel does d_head 64 and 128 on sm_90, got %d on sm_%d",
                 args->d_head, context->arch);
    if (*kernel == IFKV_ATTENTION_FASTEST)
        *kernel = can_sm90 ? IFKV_ATTENTION_SM90 : IFKV_ATTENTION_SM80;
    /* no tensor map describes nothing, and without keys there is nothing to round either */
    if (args->k.n_row == 0) *kernel = IFKV_ATTENTION_SM80;
    return IFKV_OK;
}

static ifkv_status launch(const ifkv_cuda_context *context, const ifkv_attention_call *call,
                          ifkv_attention_kernel kernel) {
    return kernel == IFKV_ATTENTION_SM90 ? ifkv_cuda_attention_sm90(context, call)
                                         : ifkv_cuda_attention_sm80(context, call);
}

ifkv_status ifkv_cuda_attention_by(const ifkv_cuda_context *context,
                                   const ifkv_attention_args *args, ifkv_attention_kernel kernel,
                                   int64_t part_keys) {
    IFKV_TRY(check(args));
    IFKV_TRY(choose(context, args, &kernel));
    const int tile_m = ifkv_attention_tile_m(kernel, args->d_head);
    ifkv_attention_call call = call_of(context, args);
    call.plan = ifkv_attention_plan_make(call.n_row, call.n_key, args->n_head, args->n_kv_head,
                                         args->d_head, tile_m, context->n_sm);
    if (part_keys) ifkv_attention_plan_cut(&call.plan, call.n_key, part_keys);
    if (call.plan.n_item == 0) return IFKV_OK;
    IFKV_REQUIRE(call.plan.n_item <= INT_MAX, IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "attention: got %lld tiles, expected below 2^31", (long long)call.plan.n_item);
    if (call.plan.n_part == 1) return launch(context, &call, kernel);
    ifkv_view part[2 * IFKV_ATTENTION_MAX_PARTS];
    IFKV_TRY(place_parts(context, args, &call, part));
    IFKV_TRY(launch(context, &call, kernel));
    const ifkv_merge_args merge = {
        .n_head = args->n_head,
        .d_head = args->d_head,
        .n_part = call.plan.n_part,
        .out_part = part,
        .lse_part = part + call.plan.n_part,
        .out = args->out,
        .lse = args->lse,
    };
    return ifkv_cuda_merge(context, &merge);
}

ifkv_status ifkv_cuda_attention(const ifkv_cuda_context *context, const ifkv_attention_args *args) {
    return ifkv_cuda_attention_by(context, args, IFKV_ATTENTION_FASTEST, 0);
}
