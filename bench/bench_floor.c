/* What a prefill was worth: its FLOP, and the least time that the rates allow.  See bench.h.
 *
 * A floor counts products and attention, and the reading of the weights where that takes longer; no
 * element-wise pass, no message, no wait.  The ranks meet when rows are selected, so what comes
 * before and what comes after count apart.  In each part no rank is done before its own work, were
 * it alone, nor are all of them before the sum of the work, at what they do together: of the two
 * the later time is the floor, whether or not ranks share cores. */
#include <math.h>
#include <stdlib.h>

#include "auto.h"
#include "bench.h"

/* A device is divided among the ranks that compute in its memory: the fewest count. */
static ifkv_status read_rates(ifkv_engine *engine, const char *path, bool is_projected,
                              bench_rates *rates) {
    cli_device device;
    int64_t n_sharing = is_projected ? 1 : engine->n_sharing;
    const ifkv_status status = cli_device_read(path, &device);
    IFKV_TRY(ifkv_comm_agree(engine->comm, status, NULL));
    IFKV_TRY(ifkv_comm_all_reduce_i64(engine->comm, &n_sharing, 1, IFKV_REDUCE_MIN));
    rates->source = path;
    rates->alone = rates->shared = device.fast;
    rates->shared.matmul /= (double)n_sharing;
    rates->shared.attention /= (double)n_sharing;
    rates->shared.memory /= (double)n_sharing;
    return IFKV_OK;
}

ifkv_status bench_rates_find(ifkv_engine *engine, const cli_options *options, bool is_projected,
                             bench_rates *rates) {
    if (engine->backend->is_emulated) {
        *rates = (bench_rates){.source = "none"};
        return IFKV_OK;
    }
    if (options->device) return read_rates(engine, options->device, is_projected, rates);
    rates->source = "measured";
    rates->shared = (ifkv_rates){.size = sizeof rates->shared};
    IFKV_TRY(ifkv_engine_measure_alone(engine, &rates->alone));
    if (is_projected) {
        rates->shared = rates->alone;
        return IFKV_OK;
    }
    IFKV_TRY(ifkv_engine_measure(engine, &rates->shared));
    rates->alone.matmul = fmax(rates->alone.matmul, rates->shared.matmul); /* but for noise it is */
    rates->alone.attention = fmax(rates->alone.attention, rates->shared.attention);
    rates->alone.memory = fmax(rates->alone.memory, rates->shared.memory);
    return IFKV_OK;
}

/* Which chunks of the placement came from the store, of all ranks. */
static ifkv_status gather_loaded(const ifkv_session *session, bool *is_loaded) {
    const ifkv_placement *placement = &session->placement;
    const ifkv_reuse *reuse = &session->reuse;
    int64_t *value = calloc((size_t)placement->n_chunk, sizeof *value);
    ifkv_status status =
        value ? IFKV_OK : IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "bench: out of memory");
    IFKV_TRY_GOTO(status, ifkv_comm_agree(session->engine->comm, status, NULL), out);
    for (int64_t i = 0; i < reuse->n_unit; i++)
        if (reuse->unit[i].is_hit && reuse->unit[i].index >= placement->n_prefix)
            value[ifkv_placement_chunk_of(placement, reuse->unit[i].index)] = 1;
    IFKV_TRY_GOTO(status,
                  ifkv_comm_all_reduce_i64(session->engine->comm, value, (int)placement->n_chunk,
                                           IFKV_REDUCE_MAX),
                  out);
    for (int64_t i = 0; i < placement->n_chunk; i++) is_loaded[i] = value[i] != 0;
out:
    free(value);
    return status;
}

/* Of a rank, before rows are selected and after. */
static void add_seconds(const ifkv_rates *rates, const ifkv_cost_work *work, double part[2]) {
    const ifkv_rates bare = {
        .matmul = rates->matmul, .attention = rates->attention, .memory = rates->memory};
    part[0] = part[1] = 0;
    for (int stage = 0; stage < IFKV_N_STAGE; stage++)
        part[stage > IFKV_STAGE_SELECT] += ifkv_cost_seconds(&bare, &work[stage]);
}

static void count(const ifkv_session *session, const bool *is_loaded, const bench_rates *rates,
                  double *flop_p, double *floor_ms_p) {
    const int size = session->placement.size;
    ifkv_cost_model model;
    ifkv_cost_plan plan;
    ifkv_cost_way way;
    double flop = 0, last[2] = {0}, mean[2] = {0};
    ifkv_session_cost(session, is_loaded, &model, &plan, &way);
    for (int r = 0; r < size; r++) {
        ifkv_cost_work work[IFKV_N_STAGE];
        double alone[2], shared[2];
        ifkv_cost_count(&model, &plan, way, r, work);
        for (int stage = 0; stage < IFKV_N_STAGE; stage++)
            flop += work[stage].matmul + work[stage].attention;
        add_seconds(&rates->alone, work, alone);
        add_seconds(&rates->shared, work, shared);
        for (int part = 0; part < 2; part++) {
            last[part] = fmax(last[part], alone[part]);
            mean[part] += shared[part] / size;
        }
    }
    *flop_p = flop;
    *floor_ms_p = 1e3 * (fmax(last[0], mean[0]) + fmax(last[1], mean[1]));
}

ifkv_status bench_cost(const ifkv_session *session, const bench_rates *rates, double *flop_p,
                       double *floor_ms_p) {
    bool *is_loaded = calloc((size_t)session->placement.n_chunk, sizeof *is_loaded);
    ifkv_status status =
        is_loaded ? IFKV_OK : IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "bench: out of memory");
    status = ifkv_comm_agree(session->engine->comm, status, NULL);
    if (status == IFKV_OK) status = gather_loaded(session, is_loaded);
    if (status == IFKV_OK) count(session, is_loaded, rates, flop_p, floor_ms_p);
    free(is_loaded);
    return status;
}
