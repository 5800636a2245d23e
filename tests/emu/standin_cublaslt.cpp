/* The stand-in for cuBLASLt: matrix products in float32 over OpenBLAS.
 *
 * Inputs are bfloat16 or float32 in either order, with transposition, strides and batches; sums are
 * float32 and rounded once.  Refuses what it does not do, so that nobody relies on it.  The
 * workspace it asks for is overwritten, as the real one may: two streams cannot share one. */
#include "standin.h"

#include "emu_stream.h"

#include <atomic>
#include <cblas.h>
#include <chrono>
#include <cstring>
#include <cublasLt.h>
#include <thread>
#include <vector>

struct cublasLtContext {
    int device;
};

namespace {

constexpr size_t WORKSPACE = 1 << 20;
std::atomic<int> n_algorithm{2};
enum { OTHER_BITS = 2 }; /* the third algorithm */

struct layout {
    cudaDataType type;
    int32_t order, batch;
    uint64_t rows, cols;
    int64_t ld, batch_stride;
};

struct operation {
    cublasComputeType_t compute;
    cudaDataType scale;
    int32_t transpose_a, transpose_b, epilogue, pointer_mode;
    const void *bias;
    int32_t bias_type;
};

struct preference {
    size_t workspace;
    uint32_t alignment[4]; /* of A, B, C, D; bytes */
};

/* Our structs live in the library's opaque ones. */
template <typename T, typename Opaque> T &inside(Opaque *opaque) {
    static_assert(sizeof(T) <= sizeof(Opaque), "the opaque struct is too small");
    return *reinterpret_cast<T *>(opaque);
}

cublasStatus_t enter(const char *name) {
    int code = CUBLAS_STATUS_INTERNAL_ERROR;
    return emu::is_failing(name, &code) ? (cublasStatus_t)code : CUBLAS_STATUS_SUCCESS;
}

template <typename T> cublasStatus_t set(T *to, const void *from, size_t bytes) {
    if (bytes != sizeof *to) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(to, from, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

size_t bytes_of(cudaDataType type) {
    return type == CUDA_R_32F ? 4 : type == CUDA_R_16BF ? 2 : 0;
}

float load(const void *data, cudaDataType type, size_t i) {
    if (type == CUDA_R_32F) return ((const float *)data)[i];
    const uint32_t bits = (uint32_t)((const uint16_t *)data)[i] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* To nearest, ties to even; a NaN stays one. */
uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void save(void *data, cudaDataType type, size_t i, float value) {
    if (type == CUDA_R_32F)
        ((float *)data)[i] = value;
    else
        ((uint16_t *)data)[i] = to_bf16(value);
}

size_t place(const layout &l, size_t row, size_t col) {
    return l.order == CUBLASLT_ORDER_ROW ? row * (size_t)l.ld + col : col * (size_t)l.ld + row;
}

const void *batch_of(const void *data, const layout &l, int b) {
    return (const char *)data + (int64_t)bytes_of(l.type) * l.batch_stride * b;
}

/* op(A) as dense rows. */
std::vector<float> dense(const void *data, const layout &l, bool is_transposed) {
    const size_t rows = is_transposed ? l.cols : l.rows, cols = is_transposed ? l.rows : l.cols;
    std::vector<float> out(rows * cols);
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < cols; j++)
            out[i * cols + j] = load(data, l.type, is_transposed ? place(l, j, i) : place(l, i, j));
    return out;
}

struct product {
    operation op;
    layout a, b, c, d;
    const void *a_data, *b_data, *c_data;
    void *d_data, *workspace;
    float alpha, beta;
    int algorithm;
};

void multiply(const product &p, int batch) {
    const std::vector<float> a = dense(batch_of(p.a_data, p.a, batch), p.a, p.op.transpose_a),
                             b = dense(batch_of(p.b_data, p.b, batch), p.b, p.op.transpose_b);
    const size_t m = p.d.rows, n = p.d.cols, k = p.op.transpose_a ? p.a.rows : p.a.cols;
    std::vector<float> sum(m * n);
    /* column by column, so that the bits of one do not depend on the others; and in two parts, or
     * one */
    const size_t first = p.algorithm == OTHER_BITS ? k / 3 : k;
    for (size_t j = 0; j < n; j++) {
        cblas_sgemv(CblasRowMajor, CblasNoTrans, (int)m, (int)first, 1, a.data(), (int)k,
                    b.data() + j, (int)n, 0, sum.data() + j, (int)n);
        if (first < k)
            cblas_sgemv(CblasRowMajor, CblasNoTrans, (int)m, (int)(k - first), 1, a.data() + first,
                        (int)k, b.data() + first * n + j, (int)n, 1, sum.data() + j, (int)n);
    }
    if (n_algorithm > OTHER_BITS && p.algorithm != OTHER_BITS)
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
    const void *c = batch_of(p.c_data, p.c, batch);
    void *d = (void *)batch_of(p.d_data, p.d, batch);
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < n; j++) {
            float value = p.alpha * sum[i * n + j];
            if (p.beta != 0) value += p.beta * load(c, p.c.type, place(p.c, i, j));
            if (p.op.epilogue & CUBLASLT_EPILOGUE_BIAS)
                value += load(p.op.bias, (cudaDataType)p.op.bias_type, i);
            if (p.op.epilogue & CUBLASLT_EPILOGUE_RELU) value = value > 0 ? value : 0;
            save(d, p.d.type, place(p.d, i, j), value);
        }
}

bool is_layout(const layout &l) {
    const uint64_t least = l.order == CUBLASLT_ORDER_ROW ? l.cols : l.rows;
    return bytes_of(l.type) && (l.order == CUBLASLT_ORDER_ROW || l.order == CUBLASLT_ORDER_COL) &&
           l.rows && l.cols && l.ld >= (int64_t)least && l.batch >= 1;
}

bool is_same_shape(const layout &x, const layout &y) {
    return x.rows == y.rows && x.cols == y.cols && x.batch == y.batch;
}

cublasStatus_t check(const operation &op, const layout &a, const layout &b, const layout &c,
                     const layout &d) {
    const int known = CUBLASLT_EPILOGUE_DEFAULT | CUBLASLT_EPILOGUE_BIAS | CUBLASLT_EPILOGUE_RELU;
    if (!is_layout(a) || !is_layout(b) || !is_layout(c) || !is_layout(d))
        return CUBLAS_STATUS_INVALID_VALUE;
    const uint64_t m = op.transpose_a ? a.cols : a.rows, k = op.transpose_a ? a.rows : a.cols,
                   k_b = op.transpose_b ? b.cols : b.rows, n = op.transpose_b ? b.rows : b.cols;
    if (k != k_b || d.rows != m || d.cols != n || !is_same_shape(c, d) || c.type != d.type ||
        a.batch != d.batch || b.batch != d.batch)
        return CUBLAS_STATUS_INVALID_VALUE;
    if (op.scale != CUDA_R_32F || op.pointer_mode != CUBLASLT_POINTER_MODE_HOST ||
        (op.epilogue & ~known) || a.type != b.type ||
        (a.type == CUDA_R_32F && d.type != CUDA_R_32F))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    return CUBLAS_STATUS_SUCCESS;
}

/* Does the matrix lie in device memory, all of it? */
bool is_held(const void *data, const layout &l) {
    const emu::place where = emu::place_of(data);
    const size_t last = place(l, l.rows - 1, l.cols - 1) + (size_t)(l.batch_stride * (l.batch - 1));
    return where.kind == emu::kind::device && where.left >= (last + 1) * bytes_of(l.type);
}

} // namespace

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle_p) {
    if (const cublasStatus_t status = enter(__func__)) return status;
    *handle_p = new cublasLtContext{emu::current_device()};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}

size_t cublasLtGetVersion(void) {
    return CUBLAS_VERSION;
}

const char *cublasLtGetStatusName(cublasStatus_t status) {
    switch (status) {
    case CUBLAS_STATUS_SUCCESS: return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
    case CUBLAS_STATUS_ALLOC_FAILED: return "CUBLAS_STATUS_ALLOC_FAILED";
    case CUBLAS_STATUS_INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_ARCH_MISMATCH: return "CUBLAS_STATUS_ARCH_MISMATCH";
    case CUBLAS_STATUS_EXECUTION_FAILED: return "CUBLAS_STATUS_EXECUTION_FAILED";
    case CUBLAS_STATUS_INTERNAL_ERROR: return "CUBLAS_STATUS_INTERNAL_ERROR";
    case CUBLAS_STATUS_NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
    default: return "CUBLAS_STATUS_unknown";
    }
}

const char *cublasLtGetStatusString(cublasStatus_t status) {
    return cublasLtGetStatusName(status);
}

cublasStatus_t cublasLtMatrixLayoutInit_internal(cublasLtMatrixLayout_t opaque, size_t size,
                                                 cudaDataType type, uint64_t rows, uint64_t cols,
                                                 int64_t ld) {
    if (const cublasStatus_t status = enter(__func__)) return status;
    if (size < sizeof *opaque) return CUBLAS_STATUS_INVALID_VALUE;
    inside<layout>(opaque) = {type, CUBLASLT_ORDER_COL, 1, rows, cols, ld, 0};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout_p, cudaDataType type,
                                          uint64_t rows, uint64_t cols, int64_t ld) {
    if (const cublasStatus_t status = enter(__func__)) return status;
    *layout_p = new cublasLtMatrixLayoutOpaque_t{};
    return cublasLtMatrixLayoutInit_internal(*layout_p, sizeof **layout_p, type, rows, cols, ld);
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t opaque) {
    delete opaque;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t opaque,
                                                cublasLtMatrixLayoutAttribute_t attribute,
                                                const void *from, size_t bytes) {
    layout &l = inside<layout>(opaque);
    switch (attribute) {
    case CUBLASLT_MATRIX_LAYOUT_TYPE: return set(&l.type, from, bytes);
    case CUBLASLT_MATRIX_LAYOUT_ORDER: return set(&l.order, from, bytes);
    case CUBLASLT_MATRIX_LAYOUT_ROWS: return set(&l.rows, from, bytes);
    case CUBLASLT_MATRIX_LAYOUT_COLS: return set(&l.cols, from, bytes);
    case CUBLASLT_MATRIX_LAYOUT_LD: return set(&l.ld, from, bytes);
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT: return set(&l.batch, from, bytes);
    case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET: return set(&l.batch_stride, from, bytes);
    default: return CUBLAS_STATUS_NOT_SUPPORTED;
    }
}

cublasStatus_t cublasLtMatmulDescInit_internal(cublasLtMatmulDesc_t opaque, size_t size,
                                               cublasComputeType_t compute, cudaDataType_t scale) {
    if (const cublasStatus_t status = enter(__func__)) return status;
    if (size < sizeof *opaque) return CUBLAS_STATUS_INVALID_VALUE;
    if (compute != CUBLAS_COMPUTE_32F && compute != CUBLAS_COMPUTE_32F_PEDANTIC)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    operation op = {};
    op.compute = compute;
    op.scale = scale;
    op.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    op.bias_type = CUDA_R_16BF;
    inside<operation>(opaque) = op;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *desc_p, cublasComputeType_t compute,
                                        cudaDataType_t scale) {
    if (const cublasStatus_t status = enter(__func__)) return status;
    *desc_p = new cublasLtMatmulDescOpaque_t{};
    return cublasLtMatmulDescInit_internal(*desc_p, sizeof **desc_p, compute, scale);
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t opaque) {
    delete opaque;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t opaque,
                                              cublasLtMatmulDescAttributes_t attribute,
                                              const void *from, size_t bytes) {
    operation &op = inside<operation>(opaque);
    switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA: return set(&op.transpose_a, from, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSB: return set(&op.transpose_b, from, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE: return set(&op.epilogue, from, bytes);
    case CUBLASLT_MATMUL_DESC_POINTER_MODE: return set(&op.pointer_mode, from, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return set(&op.bias, from, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: return set(&op.bias_type, from, bytes);
    default: return CUBLAS_STATUS_NOT_SUPPORTED;
    }
}

cublasStatus_t cublasLtMatmulPreferenceInit_internal(cublasLtMatmulPreference_t opaque,
                                                     size_t size) {
    if (const cublasStatus_t status = enter(__func__)) return status;
    if (size < sizeof *opaque) return CUBLAS_STATUS_INVALID_VALUE;
    inside<preference>(opaque) = {0, {256, 256, 256, 256}};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference_p) {
    if (const cublasStatus_t status = enter(__func__)) return status;
    *preference_p = new cublasLtMatmulPreferenceOpaque_t{};
    return cublasLtMatmulPreferenceInit_internal(*preference_p, sizeof **preference_p);
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t opaque) {
    delete opaque;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t opaque,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void *from, size_t bytes) {
    preference &p = inside<preference>(opaque);
    switch (attribute) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES: {
        uint64_t workspace = 0;
        const cublasStatus_t status = set(&workspace, from, bytes);
        p.workspace = (size_t)workspace;
        return status;
    }
    case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK: return CUBLAS_STATUS_SUCCESS; /* no split */
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES: return set(&p.alignment[0], from, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES: return set(&p.alignment[1], from, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES: return set(&p.alignment[2], from, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES: return set(&p.alignment[3], from, bytes);
    default: return CUBLAS_STATUS_NOT_SUPPORTED;
    }
}

/* What an algorithm remembers: the workspace it needs and the alignment it was chosen for. */
struct chosen {
    uint64_t magic;
    uint32_t workspace, number;
    uint32_t alignment[4];
};
static constexpr uint64_t MAGIC = 0x656d756c61746564; /* "emulated" */

void emu_algorithms(int n) {
    n_algorithm = n;
}

/* The same candidates, whatever is asked; they take up to 1 MiB of workspace. */
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preferred, int max_result,
                                              cublasLtMatmulHeuristicResult_t *result,
                                              int *n_result_p) {
    if (const cublasStatus_t status = enter(__func__)) return status;
    *n_result_p = 0;
    if (const cublasStatus_t status =
            check(inside<operation>(desc), inside<layout>(a), inside<layout>(b), inside<layout>(c),
                  inside<layout>(d)))
        return status;
    if (max_result < 1) return CUBLAS_STATUS_INVALID_VALUE;
    const preference &p = inside<preference>(preferred);
    chosen algo = {MAGIC, (uint32_t)std::min(p.workspace, WORKSPACE), 0, {}};
    memcpy(algo.alignment, p.alignment, sizeof algo.alignment);
    for (int i = 0; i < max_result && i < n_algorithm; i++) {
        algo.number = (uint32_t)i;
        result[i] = {};
        inside<chosen>(&result[i].algo) = algo;
        result[i].workspaceSize = (size_t)algo.workspace;
        result[i].state = CUBLAS_STATUS_SUCCESS;
        result[i].wavesCount = 1;
        *n_result_p = i + 1;
    }
    return CUBLAS_STATUS_SUCCESS;
}

/* Without an algorithm the library looks for one, which may be slow but is legal. */
cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void *alpha,
                              const void *a, cublasLtMatrixLayout_t a_layout, const void *b,
                              cublasLtMatrixLayout_t b_layout, const void *beta, const void *c,
                              cublasLtMatrixLayout_t c_layout, void *d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t *algo,
                              void *workspace, size_t workspace_bytes, cudaStream_t stream) {
    if (const cublasStatus_t status = enter(__func__)) return status;
    product p = {inside<operation>(desc),
                 inside<layout>(a_layout),
                 inside<layout>(b_layout),
                 inside<layout>(c_layout),
                 inside<layout>(d_layout),
                 a,
                 b,
                 c,
                 d,
                 nullptr,
                 *(const float *)alpha,
                 *(const float *)beta,
                 0};
    if (const cublasStatus_t status = check(p.op, p.a, p.b, p.c, p.d)) return status;
    if (!is_held(a, p.a) || !is_held(b, p.b) || !is_held(d, p.d) ||
        (p.beta != 0 && !is_held(c, p.c)))
        return CUBLAS_STATUS_INVALID_VALUE;
    size_t used = 0;
    if (algo) {
        const chosen &how = *reinterpret_cast<const chosen *>(algo);
        const void *const data[] = {a, b, c, d};
        if (how.magic != MAGIC) return CUBLAS_STATUS_INVALID_VALUE;
        p.algorithm = (int)how.number;
        for (int i = 0; i < 4; i++)
            if ((uintptr_t)data[i] % how.alignment[i]) return CUBLAS_STATUS_INVALID_VALUE;
        used = (size_t)how.workspace;
        const emu::place where = emu::place_of(workspace);
        if (used &&
            (workspace_bytes < used || where.kind != emu::kind::device || where.left < used))
            return CUBLAS_STATUS_INVALID_VALUE;
    }
    emu_enqueue(stream, [p, workspace, used] {
        if (used) memset(workspace, 0xff, used);
        for (int batch = 0; batch < p.d.batch; batch++) multiply(p, batch);
    });
    return CUBLAS_STATUS_SUCCESS;
}
