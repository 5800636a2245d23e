/* Products over cuBLASLt: the only file that knows it.  See cuda_matmul.h.
 *
 * The library counts in columns: out [n_row, n_out] row-major is its D [n_out, n_row], so D = A^T B
 * with A the weights and B the rows, neither copied nor transposed.  Rows are counted in buckets
 * (powers of two): an algorithm is asked for at the end of a bucket and used for all of it.  What
 * it must compute to the bit is what the library's first choice for a full block of rows computes,
 * or, for few rows, its first choice for the bucket; among candidates that do, the clock decides.
 * Products of many rows are never split along their sum, whose parts would depend on their number.
 */
#include "cuda_matmul.h"

#include "cuda_check.h"

#include <cublasLt.h>
#include <float.h>
#include <stdlib.h>
#include <string.h>

enum {
    N_PLAN = 256,
    N_CANDIDATE = 16,
    N_TIMED = 5,
    COMPARED_ROWS = 64,
    ALIGNMENT = 16, /* bytes; the widest that decides about an algorithm */
};
#define WORKSPACE_BYTES ((size_t)32 << 20) /* what the library asks for on Hopper */
#define SCRATCH_BYTES ((size_t)64 << 20)   /* results of candidates: 4096 rows of 8192 columns */

/* What an algorithm is chosen by. */
typedef struct plan_key {
    int64_t bucket, n_out, n_in, x_stride, w_stride, out_stride;
    int32_t x_alignment, w_alignment, out_alignment, out_dtype, is_sum, is_reference;
} plan_key;

typedef struct plan {
    plan_key key;
    cublasLtMatmulAlgo_t algo;
} plan;

struct ifkv_cuda_matmul {
    cublasLtHandle_t handle;
    void *workspace; /* owns, device memory */
    plan *plan;      /* owns, [N_PLAN] */
    int n_plan;
};

/* One product as the library sees it. */
typedef struct product {
    cublasLtMatmulDescOpaque_t desc;
    cublasLtMatrixLayoutOpaque_t a, b, d;
    const void *w, *x;
    const void *c; /* added with weight beta */
    float beta;
} product;

#define IFKV_CUBLAS(call) cublas_status((call), #call, __FILE__, __LINE__)

static ifkv_status cublas_status(cublasStatus_t error, const char *call, const char *file,
                                 int line) {
    if (error == CUBLAS_STATUS_SUCCESS) return IFKV_OK;
    const bool is_lack =
        error == CUBLAS_STATUS_NOT_INITIALIZED || error == CUBLAS_STATUS_ALLOC_FAILED;
    return ifkv_fail(is_lack ? IFKV_ERR_RESOURCE : IFKV_ERR_INTERNAL, IFKV_E_BACKEND, file, line,
                     "back end cuda: %s: %s", cublasLtGetStatusName(error), call);
}

ifkv_status ifkv_cuda_matmul_create(ifkv_cuda_matmul **matmul_p) {
    ifkv_cuda_matmul *matmul = calloc(1, sizeof *matmul);
    ifkv_status status;
    IFKV_REQUIRE(matmul, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "back end cuda: out of host memory");
    matmul->plan = calloc(N_PLAN, sizeof *matmul->plan);
    if (!matmul->plan) {
        status = IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "back end cuda: out of host memory");
        goto err_free;
    }
    IFKV_TRY_GOTO(status, IFKV_CUBLAS(cublasLtCreate(&matmul->handle)), err_free_plan);
    IFKV_TRY_GOTO(status, IFKV_CUDA(cudaMalloc(&matmul->workspace, WORKSPACE_BYTES)), err_destroy);
    *matmul_p = matmul;
    return IFKV_OK;
err_destroy:
    cublasLtDestroy(matmul->handle);
err_free_plan:
    free(matmul->plan);
err_free:
    free(matmul);
    return status;
}

void ifkv_cuda_matmul_destroy(ifkv_cuda_matmul *matmul) {
    if (!matmul) return;
    cudaFree(matmul->workspace);
    cublasLtDestroy(matmul->handle);
    free(matmul->plan);
    free(matmul);
}

static int64_t bucket_of(int64_t n_row) {
    int64_t bucket = 1;
    while (bucket < n_row) bucket *= 2;
    return bucket;
}

static int32_t alignment_of(const ifkv_view *view) {
    const uintptr_t bits = (uintptr_t)view->data | ALIGNMENT;
    return (int32_t)(bits & -bits);
}

static cudaDataType_t type_of(ifkv_dtype dtype) {
    return dtype == IFKV_DTYPE_F32 ? CUDA_R_32F : CUDA_R_16BF;
}

static ifkv_status describe(product *p, const ifkv_view *x, const ifkv_view *w, bool add_to_out,
                            const ifkv_view *out, int64_t n_row) {
    const cublasOperation_t transposed = CUBLAS_OP_T;
    p->w = w->data;
    p->x = x->data;
    p->c = out->data;
    p->beta = add_to_out ? 1.0f : 0.0f;
    IFKV_TRY(IFKV_CUBLAS(cublasLtMatmulDescInit(&p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F)));
    IFKV_TRY(IFKV_CUBLAS(cublasLtMatmulDescSetAttribute(&p->desc, CUBLASLT_MATMUL_DESC_TRANSA,
                                                        &transposed, sizeof transposed)));
    IFKV_TRY(IFKV_CUBLAS(cublasLtMatrixLayoutInit(&p->a, CUDA_R_16BF, (uint64_t)w->n_col,
                                                  (uint64_t)w->n_row, w->stride)));
    IFKV_TRY(IFKV_CUBLAS(cublasLtMatrixLayoutInit(&p->b, CUDA_R_16BF, (uint64_t)x->n_col,
                                                  (uint64_t)n_row, x->stride)));
    return IFKV_CUBLAS(cublasLtMatrixLayoutInit(&p->d, type_of(out->dtype), (uint64_t)out->n_col,
                                                (uint64_t)n_row, out->stride));
}

/* D = A^T B + beta C into d. */
static cublasStatus_t multiply(const ifkv_cuda_matmul *matmul, const product *p,
                               const cublasLtMatmulAlgo_t *algo, void *d, cudaStream_t stream) {
    const float alpha = 1.0f;
    return cublasLtMatmul(
        matmul->handle, (cublasLtMatmulDesc_t)&p->desc, &alpha, p->w, (cublasLtMatrixLayout_t)&p->a,
        p->x, (cublasLtMatrixLayout_t)&p->b, &p->beta, p->c, (cublasLtMatrixLayout_t)&p->d, d,
        (cublasLtMatrixLayout_t)&p->d, algo, matmul->workspace, WORKSPACE_BYTES, stream);
}

/* What the library offers for a bucket, its own favourite first. */
static ifkv_status list_candidates(const ifkv_cuda_matmul *matmul, const plan_key *key,
                                   const product *p, int max,
                                   cublasLtMatmulHeuristicResult_t *candidate, int *n_p) {
    cublasLtMatmulPreferenceOpaque_t preference;
    const uint64_t workspace = WORKSPACE_BYTES;
    /* partial sums of a split product stay float32 */
    const uint32_t reduction = key->bucket > IFKV_CUDA_FEW_ROWS
                                   ? CUBLASLT_REDUCTION_SCHEME_NONE
                                   : CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    const uint32_t w = (uint32_t)key->w_alignment, x = (uint32_t)key->x_alignment,
                   out = (uint32_t)key->out_alignment;
    const struct {
        cublasLtMatmulPreferenceAttributes_t name;
        const void *value;
        size_t bytes;
    } wish[] = {
        {CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace},
        {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduction, sizeof reduction},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &w, sizeof w},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &x, sizeof x},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &out, sizeof out},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &out, sizeof out},
    };
    IFKV_TRY(IFKV_CUBLAS(cublasLtMatmulPreferenceInit(&preference)));
    for (size_t i = 0; i < sizeof wish / sizeof *wish; i++)
        IFKV_TRY(IFKV_CUBLAS(cublasLtMatmulPreferenceSetAttribute(&preference, wish[i].name,
                                                                  wish[i].value, wish[i].bytes)));
    IFKV_TRY(IFKV_CUBLAS(cublasLtMatmulAlgoGetHeuristic(
        matmul->handle, (cublasLtMatmulDesc_t)&p->desc, (cublasLtMatrixLayout_t)&p->a,
        (cublasLtMatrixLayout_t)&p->b, (cublasLtMatrixLayout_t)&p->d, (cublasLtMatrixLayout_t)&p->d,
        &preference, max, candidate, n_p)));
    IFKV_REQUIRE(*n_p > 0, IFKV_ERR_UNSUPPORTED, IFKV_E_BACKEND,
                 "back end cuda: cuBLASLt has no product of [%lld, %lld] by [%lld, %lld]",
                 (long long)key->bucket, (long long)key->n_in, (long long)key->n_out,
                 (long long)key->n_in);
    return IFKV_OK;
}

/* Where candidates put what they make, and how they are compared. */
typedef struct trial {
    void *to;          /* device memory, [n_row, stride of out] */
    void *made, *want; /* host, the first rows: of this candidate, of the first one */
    size_t bytes;      /* of these rows */
    cudaEvent_t begin, end;
} trial;

/* Milliseconds of an algorithm; FLT_MAX if it cannot run or makes other bits than the first. */
static ifkv_status time_algo(const ifkv_cuda_matmul *matmul, const product *p,
                             const cublasLtMatmulAlgo_t *algo, bool is_first, const trial *t,
                             cudaStream_t stream, float *ms_p) {
    *ms_p = FLT_MAX;
    if (multiply(matmul, p, algo, t->to, stream) != CUBLAS_STATUS_SUCCESS) return IFKV_OK;
    IFKV_TRY(IFKV_CUDA(cudaMemcpyAsync(is_first ? t->want : t->made, t->to, t->bytes,
                                       cudaMemcpyDeviceToHost, stream)));
    IFKV_TRY(IFKV_CUDA(cudaStreamSynchronize(stream)));
    if (!is_first && memcmp(t->made, t->want, t->bytes)) return IFKV_OK;
    IFKV_TRY(IFKV_CUDA(cudaEventRecord(t->begin, stream)));
    for (int i = 0; i < N_TIMED; i++)
        IFKV_TRY(IFKV_CUBLAS(multiply(matmul, p, algo, t->to, stream)));
    IFKV_TRY(IFKV_CUDA(cudaEventRecord(t->end, stream)));
    IFKV_TRY(IFKV_CUDA(cudaEventSynchronize(t->end)));
    return IFKV_CUDA(cudaEventElapsedTime(ms_p, t->begin, t->end));
}

static ifkv_status pick_fastest(const ifkv_cuda_matmul *matmul, const product *p,
                                const cublasLtMatmulHeuristicResult_t *candidate, int n,
                                const trial *t, cudaStream_t stream, int *best_p) {
    float best = FLT_MAX;
    for (int i = 0; i < n; i++) {
        float ms;
        IFKV_TRY(time_algo(matmul, p, &candidate[i].algo, i == 0, t, stream, &ms));
        if (i == 0 && ms == FLT_MAX) break; /* nothing to compare with */
        if (ms >= best) continue;
        best = ms;
        *best_p = i;
    }
    return IFKV_OK;
}

/* The fastest of n candidates that make the bits of the first, on the operands at hand.  A product
 * that adds to out must not do so again and again: it is tried into scratch memory, taken for this
 * once. */
static ifkv_status time_candidates(const ifkv_cuda_matmul *matmul, const product *p,
                                   const cublasLtMatmulHeuristicResult_t *candidate, int n,
                                   const ifkv_view *out, cudaStream_t stream, int *best_p) {
    const size_t row = (size_t)out->stride * ifkv_dtype_bytes(out->dtype);
    const int64_t n_compared = out->n_row < COMPARED_ROWS ? out->n_row : COMPARED_ROWS;
    const size_t all =
        (size_t)(out->n_row - 1) * row + (size_t)out->n_col * ifkv_dtype_bytes(out->dtype);
    trial t = {.to = out->data, .bytes = (size_t)n_compared * row};
    ifkv_status status;
    if (p->beta != 0 && all > SCRATCH_BYTES) return IFKV_OK; /* the first is as good a guess */
    if (t.bytes > all) t.bytes = all;
    void *scratch = NULL;
    t.made = malloc(2 * t.bytes);
    IFKV_REQUIRE(t.made, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "back end cuda: out of host memory");
    t.want = (char *)t.made + t.bytes;
    if (p->beta != 0) {
        IFKV_TRY_GOTO(status, IFKV_CUDA(cudaMalloc(&scratch, all)), err_free);
        /* the gaps between rows are compared too */
        IFKV_TRY_GOTO(status, IFKV_CUDA(cudaMemsetAsync(scratch, 0, all, stream)),
                      err_free_scratch);
        t.to = scratch;
    }
    IFKV_TRY_GOTO(status, IFKV_CUDA(cudaEventCreate(&t.begin)), err_free_scratch);
    IFKV_TRY_GOTO(status, IFKV_CUDA(cudaEventCreate(&t.end)), err_destroy_begin);
    status = pick_fastest(matmul, p, candidate, n, &t, stream, best_p);
    cudaEventDestroy(t.end);
err_destroy_begin:
    cudaEventDestroy(t.begin);
err_free_scratch:
    if (scratch) cudaFree(scratch);
err_free:
    free(t.made);
    return status;
}

static plan *look_up(ifkv_cuda_matmul *matmul, const plan_key *key) {
    for (int i = 0; i < matmul->n_plan; i++)
        if (!memcmp(&matmul->plan[i].key, key, sizeof *key)) return &matmul->plan[i];
    return NULL;
}

/* Of more than N_PLAN shapes the last is made anew each time. */
static plan *keep(ifkv_cuda_matmul *matmul, const plan_key *key, const cublasLtMatmulAlgo_t *algo) {
    if (matmul->n_plan == N_PLAN) matmul->n_plan--;
    plan *made = &matmul->plan[matmul->n_plan++];
    *made = (plan){.key = *key, .algo = *algo};
    return made;
}

/* The algorithm whose bits count: the library's first choice for a block of rows, or for few. */
static ifkv_status find_reference(ifkv_cuda_matmul *matmul, plan_key key, const ifkv_view *x,
                                  const ifkv_view *w, const ifkv_view *out,
                                  cublasLtMatmulAlgo_t *algo_p) {
    cublasLtMatmulHeuristicResult_t first;
    product block;
    int n = 0;
    if (key.bucket > IFKV_CUDA_FEW_ROWS) key.bucket = IFKV_CUDA_ROW_BLOCK;
    key.is_reference = 1;
    const plan *known = look_up(matmul, &key);
    if (!known) {
        IFKV_TRY(describe(&block, x, w, key.is_sum, out, key.bucket));
        IFKV_TRY(list_candidates(matmul, &key, &block, 1, &first, &n));
        known = keep(matmul, &key, &first.algo);
    }
    *algo_p = known->algo;
    return IFKV_OK;
}

/* The plan of a shape, made where there is none yet. */
static ifkv_status find_plan(ifkv_cuda_matmul *matmul, const ifkv_backend *backend,
                             const product *p, const ifkv_view *x, const ifkv_view *w,
                             const ifkv_view *out, const plan **plan_p) {
    const plan_key key = {.bucket = bucket_of(out->n_row),
                          .n_out = out->n_col,
                          .n_in = x->n_col,
                          .x_stride = x->stride,
                          .w_stride = w->stride,
                          .out_stride = out->stride,
                          .x_alignment = alignment_of(x),
                          .w_alignment = alignment_of(w),
                          .out_alignment = alignment_of(out),
                          .out_dtype = (int32_t)out->dtype,
                          .is_sum = p->beta != 0};
    cublasLtMatmulHeuristicResult_t candidate[1 + N_CANDIDATE]; /* the reference, then others */
    product bucket;
    int n = 0, best = 0;
    *plan_p = look_up(matmul, &key);
    if (*plan_p) return IFKV_OK;
    IFKV_TRY(find_reference(matmul, key, x, w, out, &candidate[0].algo));
    IFKV_TRY(describe(&bucket, x, w, key.is_sum, out, key.bucket));
    IFKV_TRY(list_candidates(matmul, &key, &bucket, N_CANDIDATE, candidate + 1, &n));
    const bool is_choice =
        n > 1 || memcmp(&candidate[0].algo, &candidate[1].algo, sizeof candidate[0].algo);
    if (is_choice) {
        IFKV_TRY(ifkv_backend_before_wait(backend)); /* timing waits for the stream */
        IFKV_TRY(time_candidates(matmul, p, candidate, 1 + n, out, backend->stream, &best));
    }
    *plan_p = keep(matmul, &key, &candidate[best].algo);
    return IFKV_OK;
}

ifkv_status ifkv_cuda_matmul_run(ifkv_cuda_matmul *matmul, const ifkv_backend *backend,
                                 const ifkv_view *x, const ifkv_view *w, bool add_to_out,
                                 const ifkv_view *out) {
    const int64_t n_row = out->n_row, n_out = out->n_col, n_in = x->n_col;
    const cudaStream_t stream = backend->stream;
    const plan *chosen = NULL;
    product p;
    IFKV_TRY(ifkv_view_check("matmul", "x", x, IFKV_DTYPE_BF16, n_row, n_in));
    IFKV_TRY(ifkv_view_check("matmul", "w", w, IFKV_DTYPE_BF16, n_out, n_in));
    IFKV_TRY(ifkv_view_check("matmul", "out", out,
                             out->dtype == IFKV_DTYPE_F32 ? IFKV_DTYPE_F32 : IFKV_DTYPE_BF16, n_row,
                             n_out));
    IFKV_REQUIRE(n_in >= 1, IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "matmul: got width %lld, expected 1 or more", (long long)n_in);
    if (n_row == 0 || n_out == 0) return IFKV_OK;
    IFKV_TRY(describe(&p, x, w, add_to_out, out, n_row));
    IFKV_TRY(find_plan(matmul, backend, &p, x, w, out, &chosen));
    const cublasStatus_t status = multiply(matmul, &p, &chosen->algo, out->data, stream);
    /* an algorithm of the bucket's end need not fit all of it: the library then looks for another
     */
    if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE)
        return IFKV_CUBLAS(multiply(matmul, &p, NULL, out->data, stream));
    return IFKV_CUBLAS(status);
}
