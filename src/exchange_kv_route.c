/* Which pairs of ranks pull and which ask.  See exchange_kv_route.h. */
#include "exchange_kv_route.h"

#include <stdlib.h>
#include <string.h>

ifkv_status ifkv_kv_route_init(ifkv_kv_route *route, int size) {
    const size_t n = (size_t)size;
    route->size = size;
    route->pull = calloc(n * (2 * n + 3), sizeof *route->pull);
    IFKV_REQUIRE(route->pull, IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                 "exchange kv: out of host memory for the routes of %d ranks", size);
    route->ask = route->pull + n * n;
    route->load = route->ask + n * n;
    route->seen = route->load + n;
    route->all = route->seen + n;
    return IFKV_OK;
}

void ifkv_kv_route_fini(ifkv_kv_route *route) {
    free(route->pull);
}

/* What either way would move, for every pair. */
static void count_rows(ifkv_kv_route *route, const ifkv_exchange_rows *rows) {
    const size_t size = (size_t)route->size;
    int64_t *seen = route->seen, *all = route->all;
    memset(route->pull, 0, size * (2 * size + 3) * sizeof *route->pull);
    for (int64_t i = 0; i < rows->n_row; i++) all[rows->owner[i]]++;
    for (int64_t i = 0; i < rows->n_row; i++) {
        const size_t owner = (size_t)rows->owner[i];
        if (seen[owner]++ == 0)
            for (size_t r = 0; r < size; r++)
                if (r != owner) route->ask[r * size + owner] = all[r] - seen[r];
        if (seen[owner] == all[owner])
            for (size_t r = 0; r < size; r++)
                if (r != owner) route->pull[owner * size + r] = seen[r];
    }
    for (size_t h = 0; h < size; h++)
        for (size_t o = 0; o < size; o++)
            route->load[h] += route->pull[h * size + o] * route->pull_bytes;
}

/* What asker and owner would receive in all if the pair asked. */
typedef struct change {
    bool is_any;
    size_t owner;
    int64_t asker_load, owner_load;
} change;

static int64_t fuller(const change *it) {
    return it->asker_load > it->owner_load ? it->asker_load : it->owner_load;
}

static bool is_better(const change *it, const change *than) {
    if (!than->is_any) return true;
    if (fuller(it) != fuller(than)) return fuller(it) < fuller(than);
    return it->asker_load + it->owner_load < than->asker_load + than->owner_load;
}

static change best_change(const ifkv_kv_route *route, size_t asker) {
    const size_t size = (size_t)route->size;
    change best = {.is_any = false};
    for (size_t o = 0; o < size; o++) {
        const int64_t pull = route->pull[asker * size + o], ask = route->ask[asker * size + o];
        if (pull == 0) continue; /* nothing to see, or it asks already */
        const change it = {
            .is_any = true,
            .owner = o,
            .asker_load = route->load[asker] - pull * route->pull_bytes + ask * route->answer_bytes,
            .owner_load = route->load[o] + ask * route->query_bytes,
        };
        if (fuller(&it) < route->load[asker] && is_better(&it, &best)) best = it;
    }
    return best;
}

void ifkv_kv_route_plan(ifkv_kv_route *route, const ifkv_exchange_rows *rows) {
    const size_t size = (size_t)route->size;
    count_rows(route, rows);
    route->is_asking = false;
    for (;;) {
        size_t fullest = 0;
        for (size_t r = 1; r < size; r++)
            if (route->load[r] > route->load[fullest]) fullest = r;
        const change best = best_change(route, fullest);
        if (!best.is_any) break;
        route->load[fullest] = best.asker_load;
        route->load[best.owner] = best.owner_load;
        route->pull[fullest * size + best.owner] = 0;
        route->is_asking = true;
    }
    for (size_t i = 0; i < size * size; i++)
        if (route->pull[i] > 0) route->ask[i] = 0;
}
