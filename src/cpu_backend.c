/* The CPU back end: its table, its memory, its threads and its clock.
 *
 * Owns the handle and the per-thread scratch.  Threads are OpenMP's, as many as the handle says, in
 * every parallel region by a clause: several back ends live in one process, one per rank thread,
 * and none may change a global setting.  The one exception is the BLAS library, told to run on the
 * calling thread once and for the whole process. */
#include "cpu_backend.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { LINE_BYTES = 64, HUGE_BYTES = 2 << 20, PAGE_BYTES = 4096 };

/* The system clears a page when it is first written: here, on all threads, and not within the time
 * of the first request. */
static void touch(int n_thread, char *data, size_t bytes) {
    const int64_t n_page = (int64_t)(bytes / PAGE_BYTES);
#pragma omp parallel for num_threads(n_thread) schedule(static)
    for (int64_t i = 0; i < n_page; i++) ((volatile char *)data)[i * PAGE_BYTES] = 0;
}

static ifkv_status cpu_alloc(ifkv_backend *backend, size_t bytes, void **data_p) {
    const bool is_huge = bytes >= HUGE_BYTES;
    void *data = NULL;
    if (posix_memalign(&data, is_huge ? HUGE_BYTES : LINE_BYTES, bytes ? bytes : 1))
        return IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "back end cpu: no memory for %zu bytes",
                         bytes);
    /* Fewer page faults and TLB misses over weights and K/V; refusal changes nothing else. */
    if (is_huge) {
        (void)madvise(data, bytes & ~(size_t)(HUGE_BYTES - 1), MADV_HUGEPAGE);
        touch(backend->n_thread, data, bytes);
    }
    *data_p = data;
    return IFKV_OK;
}

static void cpu_free(ifkv_backend *backend, void *data) {
    (void)backend;
    free(data);
}

static ifkv_status cpu_copy(ifkv_backend *backend, void *to, const void *from, size_t bytes) {
    (void)backend;
    if (bytes) memmove(to, from, bytes);
    return IFKV_OK;
}

static ifkv_status cpu_sync(ifkv_backend *backend) {
    (void)backend;
    return IFKV_OK;
}

static double cpu_clock_ms(ifkv_backend *backend) {
    (void)backend;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
}

static ifkv_status cpu_prepare(ifkv_backend *backend, int n_head, int n_kv_head, int d_head) {
    cpu_backend *cpu = (cpu_backend *)backend;
    IFKV_TRY(ifkv_cpu_check_heads("prepare", n_head, n_kv_head, d_head));
    const int group = n_head / n_kv_head;
    const size_t attention = ifkv_cpu_attention_bytes(group, d_head),
                 score = ifkv_cpu_score_bytes(group, d_head);
    const size_t bytes = attention > score ? attention : score;
    void *scratch = NULL;
    IFKV_TRY(cpu_alloc(backend, bytes * (size_t)backend->n_thread, &scratch));
    free(cpu->scratch);
    cpu->scratch = scratch;
    cpu->scratch_bytes = bytes;
    cpu->group = group;
    cpu->d_head = d_head;
    return IFKV_OK;
}

static void cpu_close(ifkv_backend *backend) {
    free(((cpu_backend *)backend)->scratch);
    free(backend);
}

static const ifkv_backend_ops cpu_ops = {
    .name = "cpu",
    .dtype = IFKV_DTYPE_F32,
    /* Parts of parts: one rounding to float32 at the end, so that scores and the selection do not
     * depend on how the keys were dealt to ranks. */
    .part_dtype = IFKV_DTYPE_F64,
    .joins_riders = false,
    /* Big enough that packing the weights is small beside the product, small enough that the
     * gate/up scratch stays in the last-level cache. */
    .row_block = 1024,
    .is_row_exact = false,
    .close = cpu_close,
    .prepare = cpu_prepare,
    .alloc = cpu_alloc,
    .free = cpu_free,
    .upload = cpu_copy,
    .download = cpu_copy,
    .copy = cpu_copy,
    .sync = cpu_sync,
    .clock_ms = cpu_clock_ms,
    .matmul = ifkv_cpu_matmul,
    .rms_norm = ifkv_cpu_rms_norm,
    .angles = ifkv_cpu_angles,
    .rope = ifkv_cpu_rope,
    .swiglu = ifkv_cpu_swiglu,
    .gather = ifkv_cpu_gather,
    .scatter = ifkv_cpu_scatter,
    .attention = ifkv_cpu_attention,
    .merge = ifkv_cpu_merge,
    .score = ifkv_cpu_score,
    .row_distance = ifkv_cpu_row_distance,
    .top_k = ifkv_cpu_top_k,
    .refit = ifkv_cpu_refit,
};

ifkv_status ifkv_cpu_backend_open(int n_thread, int node_rank, ifkv_backend **backend_p) {
    (void)node_rank;
    cpu_backend *cpu = calloc(1, sizeof *cpu);
    IFKV_REQUIRE(cpu, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "back end cpu: out of host memory");
    ifkv_cpu_blas_init();
    cpu->base.ops = &cpu_ops;
    cpu->base.n_thread = n_thread;
    strcpy(cpu->base.device, "cpu");
    cpu->base.memory_bytes = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    *backend_p = &cpu->base;
    return IFKV_OK;
}

ifkv_status ifkv_cpu_check_heads(const char *op, int n_head, int n_kv_head, int d_head) {
    IFKV_REQUIRE(n_head >= 1 && n_kv_head >= 1 && n_head % n_kv_head == 0, IFKV_ERR_INTERNAL,
                 IFKV_E_SHAPE, "%s: head count %d is not a multiple of kv heads %d", op, n_head,
                 n_kv_head);
    IFKV_REQUIRE(d_head >= 1 && d_head <= IFKV_CPU_MAX_D_HEAD, IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                 "%s: got head width %d, expected 1 to %d", op, d_head, (int)IFKV_CPU_MAX_D_HEAD);
    return IFKV_OK;
}
