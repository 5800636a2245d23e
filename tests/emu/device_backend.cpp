/* See device_backend.h. */
#include "device_backend.h"

#include <cuda_runtime_api.h>

#include <cstdlib>
#ifdef IFKV_EMU
#include "emu_stream.h"
#else
#include <unistd.h>
#endif

static ifkv_status check(cudaError_t error, const char *call) {
    IFKV_REQUIRE(error == cudaSuccess, IFKV_ERR_RESOURCE, IFKV_E_BACKEND, "%s: %s", call,
                 cudaGetErrorString(error));
    return IFKV_OK;
}
#define CHECK(call) check(call, #call)

static cudaStream_t stream_of(ifkv_backend *backend) {
    return (cudaStream_t)backend->stream;
}

static ifkv_status device_sync(ifkv_backend *backend) {
    IFKV_TRY(ifkv_backend_before_wait(backend));
    return CHECK(cudaStreamSynchronize(stream_of(backend)));
}

static ifkv_status device_alloc(ifkv_backend *, size_t bytes, void **data_p) {
    return CHECK(cudaMalloc(data_p, bytes));
}

static void device_free(ifkv_backend *backend, void *data) {
    if (!backend->is_lost) cudaFree(data);
}

static ifkv_status device_upload(ifkv_backend *backend, void *to, const void *from, size_t bytes) {
    return CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_of(backend)));
}

static ifkv_status device_download(ifkv_backend *backend, void *to, const void *from,
                                   size_t bytes) {
    IFKV_TRY(ifkv_backend_before_wait(backend));
    return CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_of(backend)));
}

static ifkv_status device_copy(ifkv_backend *backend, void *to, const void *from, size_t bytes) {
    return CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_of(backend)));
}

static void device_close(ifkv_backend *backend) {
    if (!backend->is_lost) cudaStreamDestroy(stream_of(backend));
    free((void *)backend->ops);
    free(backend);
}

ifkv_status device_backend_open(int node_rank, ifkv_backend **backend_p) {
    int n = 0;
    cudaStream_t stream = nullptr;
    IFKV_TRY(CHECK(cudaGetDeviceCount(&n)));
    IFKV_TRY(CHECK(cudaSetDevice(node_rank % n)));
    IFKV_TRY(CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)));
    auto *backend = (ifkv_backend *)calloc(1, sizeof(ifkv_backend));
    auto *ops = (ifkv_backend_ops *)calloc(1, sizeof(ifkv_backend_ops));
    if (!backend || !ops) abort(); /* a test without memory has no verdict */
    ops->name = "device";
    ops->close = device_close;
    ops->alloc = device_alloc;
    ops->free = device_free;
    ops->upload = device_upload;
    ops->download = device_download;
    ops->copy = device_copy;
    ops->sync = device_sync;
    backend->ops = ops;
    backend->stream = stream;
    *backend_p = backend;
    return IFKV_OK;
}

#ifdef IFKV_EMU
void device_backend_delay(ifkv_backend *backend) {
    emu_enqueue(stream_of(backend), [] {});
}
#else
static void pause_stream(void *) {
    usleep(200); /* longer than the calls behind it take to be made */
}

void device_backend_delay(ifkv_backend *backend) {
    if (cudaLaunchHostFunc(stream_of(backend), pause_stream, nullptr) != cudaSuccess) abort();
}
#endif

int device_backend_count(void) {
    int n = 0;
    return cudaGetDeviceCount(&n) == cudaSuccess ? n : 0;
}
