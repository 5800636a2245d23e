/* The CUDA back end: its table, its device, its memory, its stream and its clock.
 *
 * Owns the handle, one stream, the staging buffers of uploads and the workspace of the kernels.
 * Knows no kernel but by its launcher (kernels.h) and no product but by cuda_matmul.h.  One handle
 * belongs to one host thread at a time and makes its device the current one.  Activations, weights
 * and K/V are bfloat16, sums float32; parts that cross ranks while scoring are float64, so that
 * scores do not depend on how keys were dealt to ranks. */
#include "cuda_check.h"
#include "cuda_matmul.h"
#include "kernels.h"
#include "tensor_map.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    LEAST_ARCH = 80, /* bfloat16 in mma.sync and cp.async */
    /* Uploads pass through pinned memory piece by piece: two pieces move while a third is filled,
     * and 1 MiB is long enough for the full rate of the bus. */
    N_STAGE = 3,
    STAGE_BYTES = 1 << 20,
    LEAST_WORKSPACE = 1 << 20,
};

typedef struct cuda_backend {
    ifkv_backend base;
    ifkv_cuda_context context;
    int device;
    ifkv_cuda_matmul *matmul;   /* owns */
    char *stage;                /* owns, pinned: [N_STAGE, STAGE_BYTES], then one fault word */
    cudaEvent_t taken[N_STAGE]; /* owns: the piece has left its stage */
    int n_event;
    int next_stage;
    int n_head, n_kv_head, d_head; /* what prepare was called for; 0: not yet */
} cuda_backend;

static int32_t *seen_fault(const cuda_backend *cuda) {
    return (int32_t *)(void *)(cuda->stage + (size_t)N_STAGE * STAGE_BYTES);
}

static ifkv_status cuda_alloc(ifkv_backend *backend, size_t bytes, void **data_p) {
    cuda_backend *cuda = (cuda_backend *)backend;
    void *data = NULL;
    size_t n_free = 0, total = 0;
    IFKV_TRY(IFKV_CUDA(cudaSetDevice(cuda->device)));
    const cudaError_t error = cudaMalloc(&data, bytes ? bytes : 1);
    if (error == cudaErrorMemoryAllocation) {
        cudaGetLastError(); /* it does not stick */
        cudaMemGetInfo(&n_free, &total);
        return IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                         "back end cuda: no memory for %zu bytes: %zu of %zu are free on %s", bytes,
                         n_free, total, backend->device);
    }
    IFKV_TRY(IFKV_CUDA(error));
    *data_p = data;
    return IFKV_OK;
}

static void cuda_free(ifkv_backend *backend, void *data) {
    if (!backend->is_lost) cudaFree(data); /* would wait for the stream */
}

/* The next piece of staging memory, once what it last held has left it. */
static ifkv_status next_stage(cuda_backend *cuda, int *stage_p) {
    const int stage = cuda->next_stage;
    cuda->next_stage = (stage + 1) % N_STAGE;
    *stage_p = stage;
    if (cudaEventQuery(cuda->taken[stage]) != cudaErrorNotReady)
        return IFKV_CUDA(cudaEventSynchronize(cuda->taken[stage]));
    IFKV_TRY(ifkv_backend_before_wait(&cuda->base));
    return IFKV_CUDA(cudaEventSynchronize(cuda->taken[stage]));
}

static ifkv_status cuda_upload(ifkv_backend *backend, void *to, const void *from_host,
                               size_t bytes) {
    cuda_backend *cuda = (cuda_backend *)backend;
    for (size_t at = 0; at < bytes; at += STAGE_BYTES) {
        const size_t n = bytes - at < STAGE_BYTES ? bytes - at : STAGE_BYTES;
        int stage = 0;
        IFKV_TRY(next_stage(cuda, &stage));
        char *piece = cuda->stage + (size_t)stage * STAGE_BYTES;
        memcpy(piece, (const char *)from_host + at, n);
        IFKV_TRY(IFKV_CUDA(cudaMemcpyAsync((char *)to + at, piece, n, cudaMemcpyHostToDevice,
                                           cuda->context.stream)));
        IFKV_TRY(IFKV_CUDA(cudaEventRecord(cuda->taken[stage], cuda->context.stream)));
    }
    return IFKV_OK;
}

static ifkv_status cuda_copy(ifkv_backend *backend, void *to, const void *from, size_t bytes) {
    cuda_backend *cuda = (cuda_backend *)backend;
    if (bytes == 0) return IFKV_OK;
    return IFKV_CUDA(
        cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, cuda->context.stream));
}

/* What a kernel has seen since the last look, as an error. */
static ifkv_status report_fault(cuda_backend *cuda) {
    const int32_t fault = *seen_fault(cuda);
    static const char *const what[] = {
        [IFKV_CUDA_FAULT_GATHER] = "gather: a row outside the matrix it is read from",
        [IFKV_CUDA_FAULT_SCATTER] = "scatter: a row outside the matrix it is written to",
        [IFKV_CUDA_FAULT_ATTENTION] = "attention: a row whose span leaves the keys",
        [IFKV_CUDA_FAULT_REFIT] = "refit: fitted rows that do not ascend inside the matrix",
    };
    if (fault == IFKV_CUDA_FAULT_NONE) return IFKV_OK;
    IFKV_TRY(
        IFKV_CUDA(cudaMemsetAsync(cuda->context.fault, 0, sizeof fault, cuda->context.stream)));
    IFKV_REQUIRE(fault > 0 && (size_t)fault < sizeof what / sizeof *what, IFKV_ERR_INTERNAL,
                 IFKV_E_SHAPE, "back end cuda: got fault word %d", (int)fault);
    return IFKV_FAIL(IFKV_ERR_INTERNAL, IFKV_E_SHAPE, "%s", what[fault]);
}

static ifkv_status cuda_sync(ifkv_backend *backend) {
    cuda_backend *cuda = (cuda_backend *)backend;
    IFKV_TRY(IFKV_CUDA(cudaMemcpyAsync(seen_fault(cuda), cuda->context.fault, sizeof(int32_t),
                                       cudaMemcpyDeviceToHost, cuda->context.stream)));
    IFKV_TRY(ifkv_backend_before_wait(backend));
    IFKV_TRY(IFKV_CUDA(cudaStreamSynchronize(cuda->context.stream)));
    return report_fault(cuda);
}

static ifkv_status cuda_download(ifkv_backend *backend, void *to_host, const void *from,
                                 size_t bytes) {
    cuda_backend *cuda = (cuda_backend *)backend;
    IFKV_TRY(ifkv_backend_before_wait(backend)); /* a copy into pageable memory waits for itself */
    if (bytes)
        IFKV_TRY(IFKV_CUDA(
            cudaMemcpyAsync(to_host, from, bytes, cudaMemcpyDeviceToHost, cuda->context.stream)));
    return cuda_sync(backend);
}

static double cuda_clock_ms(ifkv_backend *backend) {
    (void)backend;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
}

static ifkv_status cuda_prepare(ifkv_backend *backend, int n_head, int n_kv_head, int d_head) {
    cuda_backend *cuda = (cuda_backend *)backend;
    IFKV_REQUIRE(n_head >= 1 && n_kv_head >= 1 && n_head % n_kv_head == 0, IFKV_ERR_INTERNAL,
                 IFKV_E_SHAPE, "prepare: head count %d is not a multiple of kv heads %d", n_head,
                 n_kv_head);
    IFKV_REQUIRE(d_head >= 16 && d_head <= 128 && d_head % 16 == 0, IFKV_ERR_UNSUPPORTED,
                 IFKV_E_SHAPE,
                 "back end cuda: got head width %d, expected a multiple of 16 up to 128", d_head);
    size_t bytes = ifkv_cuda_attention_bytes(&cuda->context, n_head, n_kv_head, d_head);
    if (bytes < LEAST_WORKSPACE) bytes = LEAST_WORKSPACE;
    if (bytes > cuda->context.workspace_bytes) {
        void *workspace = NULL;
        IFKV_TRY(cuda_alloc(backend, bytes, &workspace));
        cudaFree(cuda->context.workspace); /* waits for whoever still uses it */
        cuda->context.workspace = workspace;
        cuda->context.workspace_bytes = bytes;
    }
    cuda->n_head = n_head;
    cuda->n_kv_head = n_kv_head;
    cuda->d_head = d_head;
    return IFKV_OK;
}

static ifkv_status check_prepared(const cuda_backend *cuda, const char *op, int n_head,
                                  int n_kv_head, int d_head) {
    IFKV_REQUIRE(cuda->n_head == n_head && cuda->n_kv_head == n_kv_head && cuda->d_head == d_head,
                 IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "%s: prepared for %d heads on %d of width %d, got %d on %d of %d", op,
                 cuda->n_head, cuda->n_kv_head, cuda->d_head, n_head, n_kv_head, d_head);
    return IFKV_OK;
}

static const ifkv_cuda_context *context_of(const ifkv_backend *backend) {
    return &((const cuda_backend *)backend)->context;
}

static ifkv_status cuda_matmul(ifkv_backend *backend, const ifkv_view *x, const ifkv_view *w,
                               bool add_to_out, const ifkv_view *out) {
    const cuda_backend *cuda = (const cuda_backend *)backend;
    return ifkv_cuda_matmul_run(cuda->matmul, backend, x, w, add_to_out, out);
}

static ifkv_status cuda_rms_norm(ifkv_backend *backend, const ifkv_view *x, const ifkv_view *weight,
                                 double eps, const ifkv_view *out) {
    return ifkv_cuda_rms_norm(context_of(backend), x, weight, eps, out);
}

static ifkv_status cuda_angles(ifkv_backend *backend, const double *frequency,
                               const int64_t *position, const ifkv_view *cos_sin) {
    return ifkv_cuda_angles(context_of(backend), frequency, position, cos_sin);
}

static ifkv_status cuda_rope(ifkv_backend *backend, const ifkv_view *x, int n_head,
                             const ifkv_view *weight, double eps, const ifkv_view *cos_sin) {
    return ifkv_cuda_rope(context_of(backend), x, n_head, weight, eps, cos_sin);
}

static ifkv_status cuda_swiglu(ifkv_backend *backend, const ifkv_view *gate_up,
                               const ifkv_view *out) {
    return ifkv_cuda_swiglu(context_of(backend), gate_up, out);
}

static ifkv_status cuda_gather(ifkv_backend *backend, const ifkv_view *from, const int64_t *row,
                               const ifkv_view *to) {
    return ifkv_cuda_gather(context_of(backend), from, row, to);
}

static ifkv_status cuda_scatter(ifkv_backend *backend, const ifkv_view *from, const int64_t *row,
                                const ifkv_view *to) {
    return ifkv_cuda_scatter(context_of(backend), from, row, to);
}

static ifkv_status cuda_attention(ifkv_backend *backend, const ifkv_attention_args *args) {
    IFKV_TRY(check_prepared((const cuda_backend *)backend, "attention", args->n_head,
                            args->n_kv_head, args->d_head));
    return ifkv_cuda_attention(context_of(backend), args);
}

static ifkv_status cuda_merge(ifkv_backend *backend, const ifkv_merge_args *args) {
    return ifkv_cuda_merge(context_of(backend), args);
}

static ifkv_status cuda_score(ifkv_backend *backend, const ifkv_score_args *args) {
    IFKV_TRY(check_prepared((const cuda_backend *)backend, "score", args->n_head, args->n_kv_head,
                            args->d_head));
    return ifkv_cuda_score(context_of(backend), args);
}

static ifkv_status cuda_row_distance(ifkv_backend *backend, const ifkv_view *a, const ifkv_view *b,
                                     float *out) {
    return ifkv_cuda_row_distance(context_of(backend), a, b, out);
}

static ifkv_status cuda_top_k(ifkv_backend *backend, const float *value, int64_t n, int64_t k,
                              int64_t *scratch, int64_t *index) {
    return ifkv_cuda_top_k(context_of(backend), value, n, k, scratch, index);
}

static ifkv_status cuda_refit(ifkv_backend *backend, const ifkv_refit_args *args) {
    return ifkv_cuda_refit(context_of(backend), args);
}

static ifkv_status cuda_draw(ifkv_backend *backend, const ifkv_draw *draw, int64_t n, void *to) {
    return ifkv_cuda_draw(context_of(backend), draw, n, to);
}

static void release_device(cuda_backend *cuda) {
    if (cuda->context.stream) cudaStreamSynchronize(cuda->context.stream);
    ifkv_cuda_matmul_destroy(cuda->matmul);
    for (int i = 0; i < cuda->n_event; i++) cudaEventDestroy(cuda->taken[i]);
    cudaFreeHost(cuda->stage);
    cudaFree(cuda->context.workspace);
    cudaFree(cuda->context.fault);
    if (cuda->context.stream) cudaStreamDestroy(cuda->context.stream);
}

static void cuda_close(ifkv_backend *backend) {
    /* a lost stream would be waited for without end: what hangs on it goes with the process */
    if (!backend->is_lost) release_device((cuda_backend *)backend);
    ifkv_tensor_maps_destroy(((cuda_backend *)backend)->context.maps);
    free(backend);
}

static const ifkv_backend_ops cuda_ops = {
    .name = "cuda",
    .dtype = IFKV_DTYPE_BF16,
    .part_dtype = IFKV_DTYPE_F64,
    .row_block = IFKV_CUDA_ROW_BLOCK, /* tiles of 128 x 256 then fill 132 multiprocessors evenly */
    .is_row_exact = true,
    .joins_riders = true,
    .close = cuda_close,
    .prepare = cuda_prepare,
    .alloc = cuda_alloc,
    .free = cuda_free,
    .upload = cuda_upload,
    .download = cuda_download,
    .copy = cuda_copy,
    .sync = cuda_sync,
    .clock_ms = cuda_clock_ms,
    .matmul = cuda_matmul,
    .rms_norm = cuda_rms_norm,
    .angles = cuda_angles,
    .rope = cuda_rope,
    .swiglu = cuda_swiglu,
    .gather = cuda_gather,
    .scatter = cuda_scatter,
    .attention = cuda_attention,
    .merge = cuda_merge,
    .score = cuda_score,
    .row_distance = cuda_row_distance,
    .top_k = cuda_top_k,
    .refit = cuda_refit,
    .draw = cuda_draw,
};

/* The number of devices, or what is missing. */
static ifkv_status count_devices(int *n_p) {
    int driver = 0, n = 0;
    const cudaError_t error = cudaGetDeviceCount(&n);
    if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice || n == 0) {
        cudaGetLastError();
        cudaDriverGetVersion(&driver);
        IFKV_REQUIRE(driver != 0, IFKV_ERR_RESOURCE, IFKV_E_BACKEND,
                     "back end cuda: no NVIDIA driver on this machine, expected one for CUDA "
                     "%d.%d or later",
                     CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
        IFKV_REQUIRE(error != cudaErrorInsufficientDriver, IFKV_ERR_RESOURCE, IFKV_E_BACKEND,
                     "back end cuda: the NVIDIA driver is for CUDA %d.%d, expected %d.%d or later",
                     driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000,
                     CUDART_VERSION % 1000 / 10);
        return IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_BACKEND,
                         "back end cuda: no device is visible, expected at least one");
    }
    IFKV_TRY(IFKV_CUDA(error));
    *n_p = n;
    return IFKV_OK;
}

bool ifkv_cuda_backend_is_wanted(void) {
#ifdef IFKV_EMU
    return false; /* the emulated device is taken only where it is asked for */
#else
    int n = 0;
    const bool has_device = cudaGetDeviceCount(&n) == cudaSuccess && n > 0;
    cudaGetLastError(); /* what failed here is nobody's error */
    return has_device;
#endif
}

/* A launcher may show each rank its own device, or all of them to every rank. */
static ifkv_status pick_device(int node_rank, int *device_p) {
    int n = 0;
    IFKV_TRY(count_devices(&n));
    IFKV_REQUIRE(n == 1 || node_rank < n, IFKV_ERR_RESOURCE, IFKV_E_BACKEND,
                 "back end cuda: got %d devices for rank %d of this node, expected one a rank, or "
                 "one for all",
                 n, node_rank);
    *device_p = n == 1 ? 0 : node_rank;
    return IFKV_OK;
}

/* A number for a device, the same in every process and other than 0. */
static uint64_t unit_of(const struct cudaDeviceProp *device) {
    uint64_t half[2];
    memcpy(half, device->uuid.bytes, sizeof half);
    return (half[0] ^ half[1]) | 1;
}

static ifkv_status describe_device(cuda_backend *cuda) {
    struct cudaDeviceProp device;
    IFKV_TRY(IFKV_CUDA(cudaGetDeviceProperties(&device, cuda->device)));
    cuda->context.arch = 10 * device.major + device.minor;
    cuda->context.n_sm = device.multiProcessorCount;
    cuda->base.memory_bytes = device.totalGlobalMem;
    cuda->base.unit = unit_of(&device);
    snprintf(cuda->base.device, sizeof cuda->base.device, "%s", device.name);
#ifdef IFKV_EMU
    cuda->base.is_emulated = true;
#endif
    IFKV_REQUIRE(cuda->context.arch >= LEAST_ARCH, IFKV_ERR_RESOURCE, IFKV_E_BACKEND,
                 "back end cuda: %s has compute capability %d.%d, expected %d.%d or later",
                 device.name, device.major, device.minor, LEAST_ARCH / 10, LEAST_ARCH % 10);
    return IFKV_OK;
}

static ifkv_status create_staging(cuda_backend *cuda) {
    IFKV_TRY(IFKV_CUDA(
        cudaMallocHost((void **)&cuda->stage, (size_t)N_STAGE * STAGE_BYTES + sizeof(int32_t))));
    for (; cuda->n_event < N_STAGE; cuda->n_event++)
        IFKV_TRY(IFKV_CUDA(
            cudaEventCreateWithFlags(&cuda->taken[cuda->n_event], cudaEventDisableTiming)));
    IFKV_TRY(IFKV_CUDA(cudaMalloc((void **)&cuda->context.fault, sizeof(int32_t))));
    return IFKV_CUDA(
        cudaMemsetAsync(cuda->context.fault, 0, sizeof(int32_t), cuda->context.stream));
}

static ifkv_status open_device(cuda_backend *cuda, int node_rank) {
    IFKV_TRY(pick_device(node_rank, &cuda->device));
    IFKV_TRY(describe_device(cuda));
    IFKV_TRY(IFKV_CUDA(cudaSetDevice(cuda->device)));
    IFKV_TRY(IFKV_CUDA(cudaStreamCreateWithFlags(&cuda->context.stream, cudaStreamNonBlocking)));
    cuda->base.stream = cuda->context.stream;
    IFKV_TRY(create_staging(cuda));
    IFKV_TRY(ifkv_tensor_maps_create(&cuda->context.maps));
    return ifkv_cuda_matmul_create(&cuda->matmul);
}

ifkv_status ifkv_cuda_backend_open(int n_thread, int node_rank, ifkv_backend **backend_p) {
    cuda_backend *cuda = calloc(1, sizeof *cuda);
    IFKV_REQUIRE(cuda, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "back end cuda: out of host memory");
    cuda->base.ops = &cuda_ops;
    cuda->base.n_thread = n_thread;
    const ifkv_status status = open_device(cuda, node_rank);
    if (status != IFKV_OK) {
        cuda_close(&cuda->base);
        return status;
    }
    *backend_p = &cuda->base;
    return IFKV_OK;
}
