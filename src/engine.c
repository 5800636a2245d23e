/* Engines: open, describe, reserve.  See ifkv.h and engine.h. */
#include "engine.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "log.h"
#include "rope.h"

ifkv_status ifkv_struct_read(void *to, size_t to_size, const void *from, const char *name) {
    size_t size = 0;
    IFKV_REQUIRE(from, IFKV_ERR_USAGE, IFKV_E_STRUCT, "%s: got NULL", name);
    memcpy(&size, from, sizeof size);
    IFKV_REQUIRE(size >= sizeof size && size <= to_size, IFKV_ERR_USAGE, IFKV_E_STRUCT,
                 "%s.size: got %zu, expected %zu to %zu", name, size, sizeof size, to_size);
    memset(to, 0, to_size);
    memcpy(to, from, size);
    return IFKV_OK;
}

ifkv_status ifkv_struct_write(void *to, const void *from, size_t from_size, const char *name) {
    size_t size = 0;
    IFKV_REQUIRE(to, IFKV_ERR_USAGE, IFKV_E_STRUCT, "%s: got NULL", name);
    memcpy(&size, to, sizeof size);
    IFKV_REQUIRE(size >= sizeof size && size <= from_size, IFKV_ERR_USAGE, IFKV_E_STRUCT,
                 "%s.size: got %zu, expected %zu to %zu", name, size, sizeof size, from_size);
    memcpy((char *)to + sizeof size, (const char *)from + sizeof size, size - sizeof size);
    return IFKV_OK;
}

size_t ifkv_resident_bytes(void) {
    unsigned long long total = 0, resident = 0;
    FILE *file = fopen("/proc/self/statm", "re");
    if (!file) return 0;
    const int n = fscanf(file, "%llu %llu", &total, &resident);
    fclose(file);
    return n == 2 ? (size_t)resident * (size_t)sysconf(_SC_PAGESIZE) : 0;
}

size_t ifkv_resident_peak_bytes(void) {
    struct rusage usage;
    return getrusage(RUSAGE_SELF, &usage) == 0 ? (size_t)usage.ru_maxrss * 1024 : 0;
}

/* Bytes for each of the ranks that share a memory. */
static uint64_t memory_share(const ifkv_engine *engine) {
    return engine->backend->memory_bytes / (uint64_t)engine->n_sharing;
}

/* Count who shares the memory of this rank's back end, and learn the least share.  Collective. */
static ifkv_status share_memory(ifkv_engine *engine) {
    ifkv_comm *comm = engine->comm;
    const uint64_t mine = engine->backend->unit;
    engine->n_sharing = ifkv_comm_node_size(comm);
    IFKV_TRY(ifkv_comm_gather(comm, &mine, sizeof mine, engine->unit));
    if (mine) engine->n_sharing = 0;
    for (int r = 0; r < comm->size && mine; r++) engine->n_sharing += engine->unit[r] == mine;
    int64_t share = (int64_t)memory_share(engine);
    IFKV_TRY(ifkv_comm_all_reduce_i64(comm, &share, 1, IFKV_REDUCE_MIN));
    engine->least_share = (uint64_t)share;
    return IFKV_OK;
}

static int default_threads(const ifkv_comm *comm) {
    cpu_set_t set;
    int n = 1;
    if (sched_getaffinity(0, sizeof set, &set) == 0) n = CPU_COUNT(&set);
    n /= ifkv_comm_node_size(comm);
    return n > 0 ? n : 1;
}

/* The first rank of this process that computes in the same memory: it loads weights for all of
 * them. */
static int loading_rank(const ifkv_engine *engine) {
    const ifkv_comm *comm = engine->comm;
    int r = 0;
    if (strcmp(ifkv_comm_name(comm), "thread")) return comm->rank;
    while (engine->unit[r] != engine->unit[comm->rank]) r++;
    return r;
}

static ifkv_status load(ifkv_engine *engine, const ifkv_engine_options *options) {
    const ifkv_model_options model = {.random_weights = options->random_weights,
                                      .seed = options->seed};
    ifkv_backend *backend = engine->backend;
    if (options->check_only)
        return ifkv_model_check(options->model_dir, &model, backend->ops->dtype, &engine->model);
    if (loading_rank(engine) != engine->comm->rank) return IFKV_OK;
    return ifkv_model_load(options->model_dir, &model, backend, &engine->model);
}

/* Take the weights from the rank that has loaded them.  Collective. */
static ifkv_status share_weights(ifkv_engine *engine) {
    ifkv_comm *comm = engine->comm;
    const ifkv_model *mine = &engine->model, **model = malloc((size_t)comm->size * sizeof *model);
    ifkv_status status = IFKV_OK;
    const int from = loading_rank(engine);
    if (!model) status = IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "engine: out of host memory");
    IFKV_TRY_GOTO(status, ifkv_comm_agree(comm, status, NULL), out);
    IFKV_TRY_GOTO(status, ifkv_comm_gather(comm, &mine, sizeof mine, model), out);
    if (from != comm->rank) status = ifkv_model_share(model[from], engine->backend, &engine->model);
    status = ifkv_comm_agree(comm, status, NULL);
out:
    free(model);
    return status;
}

/* Load the weights once for all ranks of a process that can read them.  Collective. */
static ifkv_status open_model(ifkv_engine *engine, const ifkv_engine_options *options) {
    IFKV_TRY(ifkv_comm_agree(engine->comm, load(engine, options), NULL));
    const bool is_shared = !strcmp(ifkv_comm_name(engine->comm), "thread");
    if (is_shared && !options->check_only) IFKV_TRY(share_weights(engine));
    const size_t n = is_shared ? (size_t)engine->n_sharing : 1;
    engine->weight_bytes = (engine->model.bytes + n - 1) / n;
    /* nodes can see different files: a stale mount, a half-copied directory */
    return ifkv_comm_same(engine->comm, engine->model.fingerprint, "model fingerprint");
}

static ifkv_status prepare(ifkv_engine *engine) {
    const ifkv_config *config = &engine->model.config;
    engine->frequency = malloc((size_t)config->d_head / 2 * sizeof *engine->frequency);
    IFKV_REQUIRE(engine->frequency, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "engine: out of host memory");
    ifkv_rope_frequencies(config, engine->frequency);
    return engine->backend->ops->prepare(engine->backend, config->n_head, config->n_kv_head,
                                         config->d_head);
}

/* What one rank needs before it can speak of memory with the others. */
static ifkv_status open_local(ifkv_engine *engine, const ifkv_engine_options *options) {
    IFKV_REQUIRE(options->model_dir, IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "model: got none, expected a directory");
    IFKV_REQUIRE(options->n_thread >= 0 && options->n_thread <= 4096, IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "threads: got %d, expected 0 to 4096", options->n_thread);
    const int n_thread = options->n_thread ? options->n_thread : default_threads(engine->comm);
    IFKV_TRY(ifkv_backend_open(options->backend ? options->backend : "auto", n_thread,
                               ifkv_comm_node_rank(engine->comm), &engine->backend));
    engine->unit = malloc((size_t)engine->comm->size * sizeof *engine->unit);
    IFKV_REQUIRE(engine->unit, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "engine: out of host memory");
    engine->resident_before = ifkv_resident_bytes();
    return IFKV_OK;
}

static ifkv_status plan_pool(ifkv_engine *engine, const ifkv_engine_options *options) {
    const ifkv_config *config = &engine->model.config;
    IFKV_TRY(ifkv_pool_init(&engine->pool, engine->backend->ops->dtype, config->n_layer,
                            (int64_t)config->n_kv_head * config->d_head, options->pool_bytes));
    if (!engine->pool.is_on) return IFKV_OK;
    IFKV_TRY(ifkv_engine_check_memory(engine, 0));
    return options->check_only ? IFKV_OK : ifkv_pool_alloc(&engine->pool, engine->backend);
}

/* Take the memory of the pool, and learn the largest.  Collective. */
static ifkv_status open_pool(ifkv_engine *engine, const ifkv_engine_options *options) {
    ifkv_comm *comm = engine->comm;
    IFKV_TRY(ifkv_comm_agree(comm, plan_pool(engine, options), NULL));
    int64_t most = (int64_t)engine->pool.bytes;
    IFKV_TRY(ifkv_comm_all_reduce_i64(comm, &most, 1, IFKV_REDUCE_MAX));
    engine->most_pool = (uint64_t)most;
    return IFKV_OK;
}

static ifkv_status attach(ifkv_engine *engine) {
    int64_t most = engine->n_sharing;
    IFKV_TRY(ifkv_comm_all_reduce_i64(engine->comm, &most, 1, IFKV_REDUCE_MAX));
    const ifkv_status status =
        ifkv_comm_attach(engine->comm, engine->backend, most == 1, &engine->data);
    return ifkv_comm_agree(engine->comm, status, NULL);
}

ifkv_status ifkv_engine_open(ifkv_comm *comm, const ifkv_engine_options *caller_options,
                             ifkv_engine **engine_p) {
    ifkv_engine_options options;
    IFKV_REQUIRE(comm && engine_p, IFKV_ERR_USAGE, IFKV_E_STRUCT, "engine_open: got NULL");
    IFKV_TRY(ifkv_struct_read(&options, sizeof options, caller_options, "engine_options"));
    ifkv_engine *engine = calloc(1, sizeof *engine);
    ifkv_status status = IFKV_OK;
    if (engine) {
        engine->comm = engine->data = comm;
        status = open_local(engine, &options);
    } else {
        status = IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "engine: out of host memory");
    }
    IFKV_TRY_GOTO(status, ifkv_comm_agree(comm, status, NULL), err_close);
    IFKV_TRY_GOTO(status, share_memory(engine), err_close);
    IFKV_TRY_GOTO(status, open_model(engine, &options), err_close);
    IFKV_TRY_GOTO(status, ifkv_comm_agree(comm, prepare(engine), NULL), err_close);
    IFKV_TRY_GOTO(status, open_pool(engine, &options), err_close);
    if (!options.check_only) IFKV_TRY_GOTO(status, attach(engine), err_close);
    *engine_p = engine;
    return IFKV_OK;
err_close:
    ifkv_engine_close(engine);
    return status;
}

void ifkv_engine_close(ifkv_engine *engine) {
    if (!engine) return;
    if (engine->has_session) ifkv_log(IFKV_LOG_WARN, "engine closed while a session is open");
    if (engine->arena) ifkv_comm_free(engine->data, engine->backend, engine->arena);
    ifkv_comm_detach(engine->data);
    ifkv_pool_fini(&engine->pool, engine->backend);
    ifkv_model_fini(&engine->model);
    ifkv_backend_close(engine->backend);
    free(engine->frequency);
    free(engine->unit);
    free(engine);
}

ifkv_status ifkv_engine_identify(ifkv_engine *engine) {
    if (engine->has_weights_digest) return IFKV_OK;
    IFKV_TRY(ifkv_model_digest(&engine->model, &engine->weights_digest));
    engine->has_weights_digest = true;
    return IFKV_OK;
}

ifkv_status ifkv_engine_info(const ifkv_engine *engine, ifkv_model_info *caller_info) {
    IFKV_REQUIRE(engine, IFKV_ERR_USAGE, IFKV_E_STRUCT, "engine_info: got NULL");
    const ifkv_config *config = &engine->model.config;
    const ifkv_model_info info = {
        .family = ifkv_family_name(config->family),
        .n_layer = config->n_layer,
        .n_head = config->n_head,
        .n_kv_head = config->n_kv_head,
        .d_head = config->d_head,
        .d_model = config->d_model,
        .d_ff = config->d_ff,
        .n_vocab = config->n_vocab,
        .max_position = config->max_position,
        .n_parameter = engine->model.n_parameter,
        .rope_theta = config->rope_theta,
        .is_tied = config->is_tied,
        .weight_bytes = engine->model.bytes,
        .fingerprint = engine->model.fingerprint,
        .backend = engine->backend->ops->name,
        .n_thread = engine->backend->n_thread,
        .device = engine->backend->device,
        .element_bytes = ifkv_dtype_bytes(engine->backend->ops->dtype),
        .pool_bytes = engine->pool.bytes,
        .pool_rows = engine->pool.cache.capacity,
    };
    return ifkv_struct_write(caller_info, &info, sizeof info, "model_info");
}

ifkv_status ifkv_engine_check_memory(const ifkv_engine *engine, size_t arena_bytes) {
    /* alloc may promise more than there is; a kill in mid-run would be the only message then */
    const uint64_t share = memory_share(engine), weights = engine->weight_bytes,
                   pool = engine->pool.bytes;
    char kept[64] = "";
    if (pool > 0) snprintf(kept, sizeof kept, " + %.1f MB for chunks it keeps", (double)pool / 1e6);
    IFKV_REQUIRE(
        arena_bytes <= share && weights <= share - arena_bytes &&
            pool <= share - arena_bytes - weights,
        IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
        "memory of a rank: got %.1f MB weights%s + %.1f MB for the request, expected at most "
        "%.1f MB, its share of the memory",
        (double)weights / 1e6, kept, (double)arena_bytes / 1e6, (double)share / 1e6);
    return IFKV_OK;
}

ifkv_status ifkv_engine_reserve(ifkv_engine *engine, size_t bytes) {
    IFKV_REQUIRE(engine, IFKV_ERR_USAGE, IFKV_E_STRUCT, "engine_reserve: got NULL");
    IFKV_REQUIRE(!engine->has_session, IFKV_ERR_USAGE, IFKV_E_STATE,
                 "engine_reserve: a session is open");
    if (bytes <= engine->arena_bytes) return IFKV_OK;
    IFKV_TRY(ifkv_engine_check_memory(engine, bytes));
    if (engine->arena) ifkv_comm_free(engine->data, engine->backend, engine->arena);
    engine->arena = NULL;
    engine->arena_bytes = 0;
    IFKV_TRY(ifkv_comm_alloc(engine->data, engine->backend, bytes, &engine->arena));
    engine->arena_bytes = bytes;
    return IFKV_OK;
}
