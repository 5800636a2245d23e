/* Bulk tensor copies between global and shared memory, their mbarriers and groups. */
#include "emu_async.h"
#include "emu_ptx.h"

constexpr uint32_t bulk_alignment = 128;

static emu_tensor_box decode(const CUtensorMap *map, int rank, const int *coordinates,
                             const char *what, emu_place at) {
    emu_tensor_box box;
    if (!emu_tensor_box_at(map, rank, coordinates, &box))
        emu_fail(at, "%s: %p is no tensor map of rank %d", what, static_cast<const void *>(map),
                 rank);
    return box;
}

static std::vector<unsigned char> read_shared(const emu_block *block, const emu_tensor_box &box,
                                              uint32_t from) {
    std::vector<unsigned char> dense(emu_tensor_box_bytes(box));
    for (uint32_t i = 0; i < dense.size(); i += emu_granule_bytes)
        memcpy(&dense[i], block->window + emu_tensor_box_swizzle(box, from, i), emu_granule_bytes);
    return dense;
}

static void complete(emu_block *block, emu_bulk_load *load) {
    const emu_place at = block->flights[static_cast<size_t>(load->flight)].at;
    const std::vector<unsigned char> dense = emu_tensor_box_gather(load->box);
    const uint32_t bytes = static_cast<uint32_t>(dense.size());
    if (dense != load->before)
        emu_fail(at, "the source of %s was overwritten while it was in flight",
                 emu_flight_text(block, load->flight).c_str());
    for (uint32_t i = 0; i < bytes; i += emu_granule_bytes) {
        const uint32_t to = emu_tensor_box_swizzle(load->box, load->to, i);
        memcpy(block->window + to, &dense[i], emu_granule_bytes);
        memcpy(block->async_view + to, &dense[i], emu_granule_bytes);
    }
    emu_write_end(block, load->to, bytes, load->flight);
    emu_flight_end(block, load->flight);
    emu_mbarrier_complete_tx(block, load->barrier, bytes, at);
}

static bool is_waited_for(const emu_block *block, const emu_bulk_load &load) {
    for (int i = 0; i < block->n_thread; i++)
        if (block->threads[i].state == EMU_WAITING &&
            block->threads[i].wait.object == block->window + load.barrier)
            return true;
    return false;
}

/* Bulk copies keep no order.  The latest comes first, of those that somebody waits for: the others
 * may take longer still. */
bool emu_complete_load(emu_block *block) {
    if (block->loads.empty()) return false;
    size_t i = block->loads.size() - 1;
    if (block->grid->time.kind == EMU_LATE)
        while (i > 0 && !is_waited_for(block, *block->loads[i])) i--;
    if (block->grid->time.kind == EMU_RANDOM)
        i = block->random.below(static_cast<uint32_t>(block->loads.size()));
    const std::unique_ptr<emu_bulk_load> load = std::move(block->loads[i]);
    block->loads.erase(block->loads.begin() + static_cast<std::ptrdiff_t>(i));
    complete(block, load.get());
    emu_progress(block);
    return true;
}

void emu_tma_load(int rank, void *shared, const CUtensorMap *map, uint64_t *barrier,
                  const int *coordinates, emu_place at) {
    const char *const what = "bulk tensor load";
    emu_thread *self = emu_self();
    emu_block *block = self->block;
    auto load = std::make_unique<emu_bulk_load>();
    load->box = decode(map, rank, coordinates, what, at);
    const uint32_t bytes = emu_tensor_box_bytes(load->box);
    load->to = emu_shared_offset(shared, bytes, bulk_alignment, what, at);
    load->barrier = emu_shared_offset(barrier, sizeof *barrier, alignof(uint64_t), what, at);
    emu_mbarrier_at(block, load->barrier, what, at);
    emu_check_write(block, load->to, bytes, what, at);
    load->before = emu_tensor_box_gather(load->box);
    load->flight = emu_flight_begin(block, what, at);
    emu_write_begin(block, load->to, bytes, load->flight);
    memset(block->window + load->to, emu_poison, bytes);
    memset(block->async_view + load->to, emu_poison, bytes);
    block->loads.push_back(std::move(load));
    const emu_time_kind time = block->grid->time.kind;
    if (time == EMU_EARLY || (time == EMU_RANDOM && block->random.below(3) == 0))
        emu_complete_load(block);
}

void emu_tma_store(int rank, const CUtensorMap *map, const void *shared, const int *coordinates,
                   emu_place at) {
    const char *const what = "bulk tensor store";
    emu_thread *self = emu_self();
    emu_block *block = self->block;
    auto store = std::make_unique<emu_bulk_store>();
    store->box = decode(map, rank, coordinates, what, at);
    const uint32_t bytes = emu_tensor_box_bytes(store->box);
    store->from = emu_shared_offset(shared, bytes, bulk_alignment, what, at);
    emu_check_read(block, store->from, bytes, what, at);
    emu_proxy_check(self, store->from, bytes, what, at);
    store->before = read_shared(block, store->box, store->from);
    store->group = self->store_group;
    store->is_read = false;
    store->flight = emu_flight_begin(block, what, at);
    emu_read_begin(block, store->from, bytes);
    const emu_time_kind time = block->grid->time.kind;
    store->is_written = time == EMU_EARLY || (time == EMU_RANDOM && block->random.below(2) == 0);
    const std::vector<unsigned char> poison(bytes, emu_poison);
    emu_tensor_box_scatter(store->box, store->is_written ? store->before.data() : poison.data());
    self->stores.push_back(std::move(store));
}

void ptx_tensormap_prefetch(const CUtensorMap *, emu_place) {
}

void ptx_bulk_commit(emu_place) {
    emu_self()->store_group++;
}

static void finish_read(emu_block *block, emu_bulk_store *store, emu_place at) {
    if (store->is_read) return;
    if (read_shared(block, store->box, store->from) != store->before)
        emu_fail(at, "shared memory was overwritten while %s still read it, before this wait",
                 emu_flight_text(block, store->flight).c_str());
    store->is_read = true;
    emu_read_end(block, store->from, emu_tensor_box_bytes(store->box));
}

static void finish_write(emu_bulk_store *store) {
    if (!store->is_written) emu_tensor_box_scatter(store->box, store->before.data());
    store->is_written = true;
}

void emu_bulk_wait(int n, bool is_read, emu_place at) {
    emu_thread *self = emu_self();
    emu_block *block = self->block;
    auto &stores = self->stores;
    const auto is_due = [&](const std::unique_ptr<emu_bulk_store> &store) {
        return store->group + static_cast<uint32_t>(n) < self->store_group;
    };
    if (stores.empty() || !is_due(stores[0])) return;
    if (block->grid->time.kind != EMU_EARLY) emu_wait_lazily(self, "cp.async.bulk.wait_group", at);
    size_t n_due = 0;
    for (; n_due < stores.size() && is_due(stores[n_due]); n_due++) {
        finish_read(block, stores[n_due].get(), at);
        if (is_read) continue;
        finish_write(stores[n_due].get());
        emu_flight_end(block, stores[n_due]->flight);
    }
    if (!is_read) stores.erase(stores.begin(), stores.begin() + static_cast<std::ptrdiff_t>(n_due));
}

void emu_copies_leave(emu_thread *self) {
    for (const auto &store : self->stores) {
        if (!store->is_read)
            emu_fail(self->block->flights[static_cast<size_t>(store->flight)].at,
                     "thread leaves the kernel before it waited for its bulk store to read shared "
                     "memory");
        finish_write(store.get());
    }
    // copies by cp.async that nobody waited for do no harm: their memory goes with the block
}
