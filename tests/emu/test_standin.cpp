/* The stand-ins for cudart and cuBLASLt: that they do what the real ones do, and that what they are
 * there to find is found: a missing wait, an overrun, host code that touches device memory.  What
 * ends the process is planted in a child, whose words are read. */
#include "test_standin.h"

#include "emu_stream.h"
#include "emu_tensor_map.h"
#include "standin.h"

#include <cublasLt.h>

#include <csignal>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unistd.h>
#include <vector>

static const char *const times[] = {"early", "late", "random:1", "random:2", "random:3"};

template <typename T> static T *device(size_t n) {
    void *address = nullptr;
    assert_int_equal(cudaMalloc(&address, n * sizeof(T)), cudaSuccess);
    return (T *)address;
}

template <typename T> static T *pinned(size_t n) {
    void *address = nullptr;
    assert_int_equal(cudaMallocHost(&address, n * sizeof(T)), cudaSuccess);
    return (T *)address;
}

static cudaStream_t stream() {
    cudaStream_t s = nullptr;
    assert_int_equal(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking), cudaSuccess);
    return s;
}

static void add(int *to, int n, int value, cudaStream_t s) {
    emu_enqueue(s, [=] {
        for (int i = 0; i < n; i++) to[i] += value;
    });
}

static void work_of_a_stream_keeps_its_order(void **) {
    for (const char *time : times) {
        emu_time(time);
        const int n = 1000;
        int *data = device<int>(n), *host = pinned<int>(n);
        cudaStream_t s = stream();
        assert_int_equal(cudaMemsetAsync(data, 0, n * sizeof(int), s), cudaSuccess);
        for (int i = 0; i < 5; i++) add(data, n, 1 << i, s);
        assert_int_equal(cudaMemcpyAsync(host, data, n * sizeof(int), cudaMemcpyDeviceToHost, s),
                         cudaSuccess);
        assert_int_equal(cudaStreamSynchronize(s), cudaSuccess);
        for (int i = 0; i < n; i++) assert_int_equal(host[i], 31);
        cudaStreamDestroy(s);
        assert_int_equal(cudaFreeHost(host), cudaSuccess);
        assert_int_equal(cudaFree(data), cudaSuccess);
    }
}

/* The same program with and without the wait between two streams. */
static int across_streams(bool is_waited) {
    int *data = device<int>(1), *host = pinned<int>(1);
    cudaStream_t a = stream(), b = stream();
    cudaEvent_t event = nullptr;
    assert_int_equal(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), cudaSuccess);
    assert_int_equal(cudaMemset(data, 0, sizeof(int)), cudaSuccess);
    assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
    add(data, 1, 7, a);
    assert_int_equal(cudaEventRecord(event, a), cudaSuccess);
    if (is_waited) assert_int_equal(cudaStreamWaitEvent(b, event, 0), cudaSuccess);
    assert_int_equal(cudaMemcpyAsync(host, data, sizeof(int), cudaMemcpyDeviceToHost, b),
                     cudaSuccess);
    assert_int_equal(cudaStreamSynchronize(b), cudaSuccess);
    const int got = *host;
    assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
    cudaEventDestroy(event);
    cudaStreamDestroy(a);
    cudaStreamDestroy(b);
    cudaFreeHost(host);
    cudaFree(data);
    return got;
}

static void an_event_orders_two_streams(void **) {
    for (const char *time : times) {
        emu_time(time);
        assert_int_equal(across_streams(true), 7);
    }
}

static void a_missing_event_shows_when_late(void **) {
    emu_time("early");
    assert_int_equal(across_streams(false), 7); /* luck, as on a device */
    emu_time("late");
    assert_int_equal(across_streams(false), 0);
}

static void a_missing_sync_shows_when_late(void **) {
    for (const char *time : {"early", "late"}) {
        emu_time(time);
        int *data = device<int>(1), *host = pinned<int>(1);
        *host = 1;
        cudaStream_t s = stream();
        cudaMemsetAsync(data, 0, sizeof(int), s);
        cudaMemcpyAsync(host, data, sizeof(int), cudaMemcpyDeviceToHost, s);
        assert_int_equal(*host, strcmp(time, "late") ? 0 : 1);
        cudaStreamSynchronize(s);
        assert_int_equal(*host, 0);
        cudaStreamDestroy(s);
        cudaFreeHost(host);
        cudaFree(data);
    }
}

/* Pageable memory is free again when the call returns, pinned memory only when the copy is done. */
static void pinned_memory_is_read_when_the_stream_comes_to_it(void **) {
    emu_time("late");
    int *data = device<int>(2), *fixed = pinned<int>(1), loose = 3, got[2] = {0, 0};
    cudaStream_t s = stream();
    *fixed = 3;
    cudaMemcpyAsync(data, fixed, sizeof(int), cudaMemcpyHostToDevice, s);
    cudaMemcpyAsync(data + 1, &loose, sizeof(int), cudaMemcpyHostToDevice, s);
    *fixed = loose = 4;
    cudaMemcpyAsync(got, data, sizeof got, cudaMemcpyDeviceToHost, s); /* returns when done */
    assert_int_equal(got[0], 4);
    assert_int_equal(got[1], 3);
    cudaStreamDestroy(s);
    cudaFreeHost(fixed);
    cudaFree(data);
}

static void stream_0_waits_for_blocking_streams_only(void **) {
    emu_time("late");
    for (const unsigned flags : {cudaStreamDefault, cudaStreamNonBlocking}) {
        int *data = device<int>(1), *host = pinned<int>(1);
        cudaStream_t s = nullptr;
        cudaMemset(data, 0, sizeof(int));
        cudaDeviceSynchronize();
        cudaStreamCreateWithFlags(&s, flags);
        add(data, 1, 5, s);
        cudaMemcpy(host, data, sizeof(int), cudaMemcpyDeviceToHost);
        assert_int_equal(*host, flags == cudaStreamDefault ? 5 : 0);
        cudaDeviceSynchronize();
        cudaStreamDestroy(s);
        cudaFreeHost(host);
        cudaFree(data);
    }
}

static void a_query_says_not_ready_and_in_the_end_ready(void **) {
    emu_time("late");
    int *data = device<int>(1), n = 1;
    cudaStream_t s = stream();
    cudaEvent_t event = nullptr;
    cudaEventCreate(&event);
    assert_int_equal(cudaStreamQuery(s), cudaSuccess);
    assert_int_equal(cudaEventQuery(event), cudaSuccess); /* never recorded */
    cudaMemsetAsync(data, 0, sizeof(int), s);
    cudaEventRecord(event, s);
    assert_int_equal(cudaStreamQuery(s), cudaErrorNotReady);
    while (cudaEventQuery(event) == cudaErrorNotReady) n++;
    assert_true(n > 1 && n < 10);
    assert_int_equal(cudaGetLastError(), cudaSuccess); /* not ready is no error to keep */
    cudaEventDestroy(event);
    cudaStreamDestroy(s);
    cudaFree(data);
}

static void elapsed_time_is_there_when_both_events_are(void **) {
    emu_time("late");
    cudaStream_t s = stream();
    cudaEvent_t a = nullptr, b = nullptr;
    float ms = -1;
    cudaEventCreate(&a);
    cudaEventCreate(&b);
    assert_int_equal(cudaEventElapsedTime(&ms, a, b), cudaErrorInvalidResourceHandle);
    cudaEventRecord(a, s);
    emu_enqueue(s, [] { usleep(20000); });
    cudaEventRecord(b, s);
    assert_int_equal(cudaEventElapsedTime(&ms, a, b), cudaErrorNotReady);
    cudaEventSynchronize(b);
    assert_int_equal(cudaEventElapsedTime(&ms, a, b), cudaSuccess);
    assert_true(ms >= 20);
    cudaEventDestroy(a);
    cudaEventDestroy(b);
    cudaStreamDestroy(s);
}

static void fresh_memory_is_nan(void **) {
    float *data = device<float>(100), *host = pinned<float>(100);
    for (int i = 0; i < 100; i++) assert_true(host[i] != host[i]);
    memset(host, 0, 100 * sizeof *host);
    cudaMemcpy(host, data, 100 * sizeof *host, cudaMemcpyDeviceToHost);
    for (int i = 0; i < 100; i++) assert_true(host[i] != host[i]);
    assert_int_equal((uintptr_t)data % 256, 0);
    cudaFreeHost(host);
    cudaFree(data);
}

static void copies_refuse_what_does_not_fit(void **) {
    char *data = device<char>(100), *other = device<char>(100), host[200];
    assert_int_equal(cudaMemcpy(data, host, 101, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    assert_int_equal(cudaMemcpy(data + 1, host, 100, cudaMemcpyHostToDevice),
                     cudaErrorInvalidValue);
    assert_int_equal(cudaMemcpy(data, other, 100, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    assert_int_equal(cudaMemcpy(host, other, 100, cudaMemcpyDeviceToDevice), cudaErrorInvalidValue);
    assert_int_equal(cudaMemset(data, 0, 101), cudaErrorInvalidValue);
    assert_int_equal(cudaGetLastError(), cudaErrorInvalidValue);
    assert_int_equal(cudaGetLastError(), cudaSuccess);
    assert_int_equal(cudaMemcpy(data, other, 100, cudaMemcpyDefault), cudaSuccess);
    assert_int_equal(cudaFree(data + 1), cudaErrorInvalidValue);
    assert_int_equal(cudaFreeHost(data), cudaErrorInvalidValue);
    assert_int_equal(cudaFree(nullptr), cudaSuccess);
    assert_int_equal(cudaFree(data), cudaSuccess);
    assert_int_equal(cudaFree(data), cudaErrorInvalidValue);
    cudaFree(other);
    cudaGetLastError();
}

static void memory_is_as_much_as_the_device_has(void **) {
    setenv("IFKV_EMU_MEMORY", "100000", 1);
    size_t left = 0, total = 0;
    void *more = nullptr;
    char *data = device<char>(60000);
    assert_int_equal(cudaMemGetInfo(&left, &total), cudaSuccess);
    assert_int_equal(total, 100000);
    assert_int_equal(left, 40000);
    assert_int_equal(cudaMalloc(&more, 40001), cudaErrorMemoryAllocation);
    assert_int_equal(cudaGetLastError(), cudaErrorMemoryAllocation);
    assert_int_equal(cudaFree(data), cudaSuccess);
    assert_int_equal(cudaMalloc(&more, 40001), cudaSuccess);
    assert_int_equal(cudaFree(more), cudaSuccess);
    unsetenv("IFKV_EMU_MEMORY");
}

static void a_small_overrun_is_reported_at_the_sync(void **) {
    for (const int at : {1000, 1001, -1}) {
        int signal = 0;
        const std::string said = in_child(
            [at] {
                char *data = device<char>(1000);
                emu_enqueue(nullptr, [=] { data[at] = 1; });
                cudaDeviceSynchronize();
            },
            &signal);
        assert_int_equal(signal, SIGABRT);
        const std::string words =
            "byte " + std::to_string(at) + " was written, of an allocation of 1000";
        assert_says(said, words.c_str());
    }
}

static void a_large_overrun_is_reported_at_once(void **) {
    int signal = 0;
    const std::string said = in_child(
        [] {
            char *data = device<char>(1000);
            emu_time("early");
            emu_enqueue(nullptr, [=] { data[2000] = 1; });
        },
        &signal);
    assert_int_equal(signal, SIGSEGV);
    assert_says(said, "stream work touched byte 2000 of device memory of 1000 bytes");
}

static void host_code_cannot_touch_device_memory(void **) {
    for (const bool is_read : {true, false}) {
        int signal = 0;
        const std::string said = in_child(
            [is_read] {
                volatile char *data = device<char>(1000);
                cudaMemset((void *)data, 0, 1000);
                cudaDeviceSynchronize();
                if (is_read && data[17] == 0) _exit(1);
                data[17] = 1;
            },
            &signal);
        assert_int_equal(signal, SIGSEGV);
        assert_says(said, "host code touched byte 17 of device memory of 1000 bytes");
    }
}

static void freed_memory_cannot_be_touched(void **) {
    int signal = 0;
    const std::string said = in_child(
        [] {
            char *data = device<char>(1000);
            emu_time("late");
            cudaFree(data);
            emu_enqueue(nullptr, [=] { data[3] = 1; });
            cudaDeviceSynchronize();
        },
        &signal);
    assert_int_equal(signal, SIGSEGV);
    assert_says(said, "stream work touched byte 3 of freed device memory of 1000 bytes");
}

static void calls_fail_as_planned(void **) {
    void *a = nullptr;
    emu_fail("cudaMalloc:2,cudaMemGetInfo:1+=35");
    size_t left, total;
    assert_int_equal(cudaMalloc(&a, 8), cudaSuccess);
    cudaFree(a);
    assert_int_equal(cudaMalloc(&a, 8), cudaErrorMemoryAllocation);
    assert_int_equal(cudaMalloc(&a, 8), cudaSuccess);
    cudaFree(a);
    for (int i = 0; i < 3; i++)
        assert_int_equal(cudaMemGetInfo(&left, &total), cudaErrorInsufficientDriver);
    assert_int_equal(emu_calls("cudaMalloc"), 3);
    emu_fail(nullptr);
    assert_int_equal(cudaMemGetInfo(&left, &total), cudaSuccess);
    cudaGetLastError();
    int signal = 0;
    assert_says(in_child([] { emu_fail("cudaMalloc"); }, &signal), "expected NAME:N");
    assert_int_equal(signal, SIGABRT);
}

/* In a child, because nothing mends a broken device within a process. */
static void a_fault_in_a_kernel_stays(void **) {
    int signal = 0;
    const std::string said = in_child(
        [] {
            emu_time("late");
            emu_fail("kernel:2=214");
            int *data = device<int>(1), ran = 0;
            cudaStream_t s = stream();
            for (int i = 0; i < 3; i++) emu_enqueue(s, [&ran] { ran++; });
            const cudaError_t at_sync = cudaStreamSynchronize(s), later = cudaMemset(data, 0, 4),
                              last = cudaGetLastError();
            fprintf(stderr, "ran %d: %d %d %d %d", ran, at_sync, later, last, cudaGetLastError());
        },
        &signal);
    assert_int_equal(signal, 0);
    assert_string_equal(said.c_str(), "ran 1: 214 214 214 214");
}

static void the_driver_has_an_encoder_of_tensor_maps(void **) {
    void *function = nullptr;
    cudaDriverEntryPointQueryResult found;
    assert_int_equal(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                      cudaEnableDefault, &found),
                     cudaSuccess);
    assert_true(found == cudaDriverEntryPointSuccess && function == (void *)&emu_tensor_map_encode);
    assert_int_equal(
        cudaGetDriverEntryPointByVersion("cuNothing", &function, 12000, cudaEnableDefault, &found),
        cudaErrorSymbolNotFound);
    assert_true(found == cudaDriverEntryPointSymbolNotFound && !function);
    cudaGetLastError();
}

static void the_device_says_that_it_is_emulated(void **) {
    cudaDeviceProp p;
    int n = 0, can = 0;
    setenv("IFKV_EMU_DEVICES", "2", 1);
    assert_int_equal(cudaGetDeviceCount(&n), cudaSuccess);
    assert_int_equal(n, 2);
    assert_int_equal(cudaDeviceCanAccessPeer(&can, 0, 1), cudaSuccess);
    assert_int_equal(can, 1);
    assert_int_equal(cudaSetDevice(2), cudaErrorInvalidDevice);
    assert_int_equal(cudaGetDeviceProperties(&p, 2), cudaErrorInvalidDevice);
    for (const char *arch : {"8.0", "9.0"}) {
        setenv("IFKV_EMU_ARCH", arch, 1);
        assert_int_equal(cudaGetDeviceProperties(&p, 1), cudaSuccess);
        assert_non_null(strstr(p.name, "emulated device"));
        assert_int_equal(p.major, arch[0] - '0');
    }
    unsetenv("IFKV_EMU_ARCH");
    unsetenv("IFKV_EMU_DEVICES");
    cudaGetLastError();
}

/* --- cuBLASLt --- */

static uint16_t bf16(int small) { /* integers up to 256 are exact */
    const float value = (float)small;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)(bits >> 16);
}

static int value_at(int i, int j, int seed) {
    return (i * 7 + j * 3 + seed) % 9 - 4;
}

struct matrix {
    int rows, cols, ld;
    bool is_row, is_wide;
    cublasLtMatrixLayout_t layout;
    size_t place(int i, int j) const {
        return is_row ? (size_t)i * ld + j : (size_t)j * ld + i;
    }
    size_t size() const {
        return (size_t)ld * (is_row ? rows : cols);
    }
};

static matrix make(int rows, int cols, bool is_row, bool is_wide) {
    matrix m = {rows, cols, (is_row ? cols : rows) + 3, is_row, is_wide, nullptr};
    const int32_t order = is_row ? CUBLASLT_ORDER_ROW : CUBLASLT_ORDER_COL;
    assert_int_equal(
        cublasLtMatrixLayoutCreate(&m.layout, is_wide ? CUDA_R_32F : CUDA_R_16BF, rows, cols, m.ld),
        CUBLAS_STATUS_SUCCESS);
    assert_int_equal(cublasLtMatrixLayoutSetAttribute(m.layout, CUBLASLT_MATRIX_LAYOUT_ORDER,
                                                      &order, sizeof order),
                     CUBLAS_STATUS_SUCCESS);
    return m;
}

static void *upload(const matrix &m, int seed) {
    const size_t item = m.is_wide ? 4 : 2;
    std::vector<char> host(m.size() * item, (char)0xff); /* gaps are NaN */
    for (int i = 0; i < m.rows; i++)
        for (int j = 0; j < m.cols; j++) {
            const int v = value_at(i, j, seed);
            if (m.is_wide)
                ((float *)host.data())[m.place(i, j)] = (float)v;
            else
                ((uint16_t *)host.data())[m.place(i, j)] = bf16(v);
        }
    char *data = device<char>(host.size());
    assert_int_equal(cudaMemcpy(data, host.data(), host.size(), cudaMemcpyHostToDevice),
                     cudaSuccess);
    return data;
}

/* One product over awkward sizes in every combination of order and transposition, against integer
 * sums, which bfloat16 holds up to 256 and float32 always. */
static void check_product(int bits, bool is_wide, bool is_out_wide, float beta) {
    const int m = 5, n = 7, k = 11;
    const bool ta = bits & 1, tb = bits & 2;
    const matrix a = make(ta ? k : m, ta ? m : k, bits & 4, is_wide),
                 b = make(tb ? n : k, tb ? k : n, bits & 8, is_wide),
                 d = make(m, n, bits & 16, is_out_wide);
    cublasLtHandle_t handle = nullptr;
    cublasLtMatmulDesc_t desc = nullptr;
    cublasLtMatmulPreference_t preferred = nullptr;
    cublasLtMatmulHeuristicResult_t result;
    const int32_t op_a = ta ? CUBLAS_OP_T : CUBLAS_OP_N, op_b = tb ? CUBLAS_OP_T : CUBLAS_OP_N;
    const uint64_t most = 4096;
    const float alpha = 1;
    int n_result = 0;
    cublasLtCreate(&handle);
    cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &op_a, sizeof op_a);
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSB, &op_b, sizeof op_b);
    cublasLtMatmulPreferenceCreate(&preferred);
    cublasLtMatmulPreferenceSetAttribute(preferred, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &most,
                                         sizeof most);
    assert_int_equal(cublasLtMatmulAlgoGetHeuristic(handle, desc, a.layout, b.layout, d.layout,
                                                    d.layout, preferred, 1, &result, &n_result),
                     CUBLAS_STATUS_SUCCESS);
    assert_int_equal(n_result, 1);
    assert_true(result.workspaceSize <= most);
    void *pa = upload(a, 1), *pb = upload(b, 2), *pd = upload(d, 3),
         *workspace = device<char>(most);
    assert_int_equal(cublasLtMatmul(handle, desc, &alpha, pa, a.layout, pb, b.layout, &beta, pd,
                                    d.layout, pd, d.layout, &result.algo, workspace, most, nullptr),
                     CUBLAS_STATUS_SUCCESS);
    std::vector<char> got(d.size() * (is_out_wide ? 4 : 2));
    assert_int_equal(cudaMemcpy(got.data(), pd, got.size(), cudaMemcpyDeviceToHost), cudaSuccess);
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            int want = beta != 0 ? value_at(i, j, 3) : 0;
            for (int l = 0; l < k; l++)
                want += value_at(ta ? l : i, ta ? i : l, 1) * value_at(tb ? j : l, tb ? l : j, 2);
            if (is_out_wide)
                assert_true(((float *)got.data())[d.place(i, j)] == (float)want);
            else
                assert_int_equal(((uint16_t *)got.data())[d.place(i, j)], bf16(want));
        }
    for (void *p : {pa, pb, pd, workspace}) cudaFree(p);
    for (const matrix &x : {a, b, d}) cublasLtMatrixLayoutDestroy(x.layout);
    cublasLtMatmulPreferenceDestroy(preferred);
    cublasLtMatmulDescDestroy(desc);
    cublasLtDestroy(handle);
}

static void a_product_equals_integer_sums(void **) {
    for (const char *time : times) {
        emu_time(time);
        for (int bits = 0; bits < 32; bits++)
            for (const float beta : {0.0f, 1.0f}) {
                check_product(bits, false, false, beta);
                check_product(bits, false, true, beta);
                check_product(bits, true, true, beta);
            }
    }
}

/* 256 + 1 and 256 + 3 lie between two bfloat16 numbers. */
static void a_product_rounds_to_nearest_even(void **) {
    cublasLtHandle_t handle = nullptr;
    cublasLtMatmulDesc_t desc = nullptr;
    const float one = 1, zero = 0;
    const uint16_t left[] = {bf16(256), bf16(1), bf16(256), bf16(3)}, right[] = {bf16(1), bf16(1)};
    uint16_t got[2] = {0, 0}, *a = device<uint16_t>(4), *b = device<uint16_t>(2),
             *d = device<uint16_t>(2);
    cublasLtMatrixLayout_t layout[3] = {};
    cublasLtCreate(&handle);
    cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    const int32_t transpose = CUBLAS_OP_T;
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof transpose);
    cublasLtMatrixLayoutCreate(&layout[0], CUDA_R_16BF, 2, 2, 2);
    cublasLtMatrixLayoutCreate(&layout[1], CUDA_R_16BF, 2, 1, 2);
    cublasLtMatrixLayoutCreate(&layout[2], CUDA_R_16BF, 2, 1, 2);
    cudaMemcpy(a, left, sizeof left, cudaMemcpyHostToDevice);
    cudaMemcpy(b, right, sizeof right, cudaMemcpyHostToDevice);
    assert_int_equal(cublasLtMatmul(handle, desc, &one, a, layout[0], b, layout[1], &zero, d,
                                    layout[2], d, layout[2], nullptr, nullptr, 0, nullptr),
                     CUBLAS_STATUS_SUCCESS);
    cudaMemcpy(got, d, sizeof got, cudaMemcpyDeviceToHost);
    assert_int_equal(got[0], bf16(256));
    assert_int_equal(got[1], bf16(260));
    for (cublasLtMatrixLayout_t l : layout) cublasLtMatrixLayoutDestroy(l);
    for (uint16_t *p : {a, b, d}) cudaFree(p);
    cublasLtMatmulDescDestroy(desc);
    cublasLtDestroy(handle);
}

static void a_product_refuses_what_does_not_fit(void **) {
    cublasLtHandle_t handle = nullptr;
    cublasLtMatmulDesc_t desc = nullptr;
    const matrix a = make(4, 6, true, false), b = make(5, 3, true, false),
                 d = make(4, 3, true, false), fit = make(6, 3, true, false);
    const float one = 1, zero = 0;
    cublasLtCreate(&handle);
    cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    void *pa = upload(a, 1), *pb = upload(b, 2), *pd = upload(d, 3), *pf = upload(fit, 4);
    const auto run = [&](const void *x, const matrix &y, const void *py, void *workspace) {
        return cublasLtMatmul(handle, desc, &one, x, a.layout, py, y.layout, &zero, pd, d.layout,
                              pd, d.layout, nullptr, workspace, 0, nullptr);
    };
    assert_int_equal(run(pa, fit, pf, nullptr), CUBLAS_STATUS_SUCCESS);
    assert_int_equal(run(pa, b, pb, nullptr), CUBLAS_STATUS_INVALID_VALUE);
    std::vector<char> host(a.size() * 2);
    assert_int_equal(run(host.data(), fit, pf, nullptr), CUBLAS_STATUS_INVALID_VALUE);
    assert_int_equal(run((char *)pa + 64, fit, pf, nullptr), CUBLAS_STATUS_INVALID_VALUE);
    assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
    emu_fail("cublasLtMatmul:1=13");
    assert_int_equal(run(pa, fit, pf, nullptr), CUBLAS_STATUS_EXECUTION_FAILED);
    emu_fail(nullptr);
    for (void *p : {pa, pb, pd, pf}) cudaFree(p);
    for (const matrix &x : {a, b, d, fit}) cublasLtMatrixLayoutDestroy(x.layout);
    cublasLtMatmulDescDestroy(desc);
    cublasLtDestroy(handle);
}

int main() {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(work_of_a_stream_keeps_its_order),
        cmocka_unit_test(an_event_orders_two_streams),
        cmocka_unit_test(a_missing_event_shows_when_late),
        cmocka_unit_test(a_missing_sync_shows_when_late),
        cmocka_unit_test(pinned_memory_is_read_when_the_stream_comes_to_it),
        cmocka_unit_test(stream_0_waits_for_blocking_streams_only),
        cmocka_unit_test(a_query_says_not_ready_and_in_the_end_ready),
        cmocka_unit_test(elapsed_time_is_there_when_both_events_are),
        cmocka_unit_test(fresh_memory_is_nan),
        cmocka_unit_test(copies_refuse_what_does_not_fit),
        cmocka_unit_test(memory_is_as_much_as_the_device_has),
        cmocka_unit_test(a_small_overrun_is_reported_at_the_sync),
        cmocka_unit_test(a_large_overrun_is_reported_at_once),
        cmocka_unit_test(host_code_cannot_touch_device_memory),
        cmocka_unit_test(freed_memory_cannot_be_touched),
        cmocka_unit_test(calls_fail_as_planned),
        cmocka_unit_test(a_fault_in_a_kernel_stays),
        cmocka_unit_test(the_driver_has_an_encoder_of_tensor_maps),
        cmocka_unit_test(the_device_says_that_it_is_emulated),
        cmocka_unit_test(a_product_equals_integer_sums),
        cmocka_unit_test(a_product_rounds_to_nearest_even),
        cmocka_unit_test(a_product_refuses_what_does_not_fit),
    };
    return cmocka_run_group_tests_name("stand-ins", tests, nullptr, nullptr);
}
