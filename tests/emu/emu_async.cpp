/* Operations in flight: who they are, what shared memory they concern, cp.async and its groups, the
 * async proxy. */
#include "emu_async.h"

#include "emu_ptx.h"

#include <time.h>

int emu_flight_begin(emu_block *block, const char *what, emu_place at) {
    int flight = static_cast<int>(block->flights.size());
    if (block->free_flights.empty()) {
        if (flight == UINT16_MAX - 1)
            emu_fail(at, "%d asynchronous operations in flight, more than the model can name",
                     flight);
        block->flights.emplace_back();
    } else {
        flight = block->free_flights.back();
        block->free_flights.pop_back();
    }
    block->flights[static_cast<size_t>(flight)] = {what, at, emu_self()->index};
    return flight;
}

void emu_flight_end(emu_block *block, int flight) {
    block->free_flights.push_back(flight);
}

std::string emu_flight_text(emu_block *block, int flight) {
    const emu_flight &its = block->flights[static_cast<size_t>(flight)];
    return emu_format("%s of thread %d at %s", its.what, its.thread,
                      emu_place_text(its.at).c_str());
}

uint32_t emu_shared_offset(const void *address, uint32_t bytes, uint32_t alignment,
                           const char *what, emu_place at) {
    const emu_block *block = emu_self()->block;
    const intptr_t offset = static_cast<const unsigned char *>(address) - block->window;
    if (offset < emu_reserved_bytes || offset + bytes > block->shared_end())
        emu_fail(at, "%s: %p is not %u bytes of the block's shared memory (%u bytes from %p on)",
                 what, address, bytes, block->grid->shared_bytes,
                 static_cast<void *>(block->window + emu_reserved_bytes));
    if (offset % alignment != 0)
        emu_fail(at, "%s: shared offset %ld is not a multiple of %u", what,
                 static_cast<long>(offset) - emu_reserved_bytes, alignment);
    return static_cast<uint32_t>(offset);
}

template <typename F>
static void each_granule(emu_block *block, uint32_t offset, uint32_t bytes, F work) {
    const uint32_t end = (offset + bytes + emu_granule_bytes - 1) / emu_granule_bytes;
    for (uint32_t g = offset / emu_granule_bytes; g < end; g++)
        work(block->granules[g], g * emu_granule_bytes);
}

void emu_write_begin(emu_block *block, uint32_t offset, uint32_t bytes, int flight) {
    each_granule(block, offset, bytes, [&](emu_granule &granule, uint32_t) {
        granule.writer = static_cast<uint16_t>(flight + 1);
        granule.is_written = true;
    });
}

void emu_write_end(emu_block *block, uint32_t offset, uint32_t bytes, int flight) {
    each_granule(block, offset, bytes, [&](emu_granule &granule, uint32_t) {
        if (granule.writer == flight + 1) granule.writer = 0;
    });
}

void emu_read_begin(emu_block *block, uint32_t offset, uint32_t bytes) {
    each_granule(block, offset, bytes, [](emu_granule &granule, uint32_t) { granule.readers++; });
}

void emu_read_end(emu_block *block, uint32_t offset, uint32_t bytes) {
    each_granule(block, offset, bytes, [](emu_granule &granule, uint32_t) { granule.readers--; });
}

static bool is_unwritten(const emu_block *block, uint32_t at) {
    for (uint32_t i = 0; i < emu_granule_bytes; i += 2)
        if (block->window[at + i] == emu_poison && block->window[at + i + 1] == emu_poison)
            return true;
    return false;
}

void emu_check_read(emu_block *block, uint32_t offset, uint32_t bytes, const char *what,
                    emu_place at) {
    each_granule(block, offset, bytes, [&](const emu_granule &granule, uint32_t start) {
        if (granule.writer)
            emu_fail(at, "%s reads shared offset %u while %s is in flight to it", what,
                     start - emu_reserved_bytes,
                     emu_flight_text(block, granule.writer - 1).c_str());
        if (!granule.is_written && is_unwritten(block, start))
            emu_fail(at, "%s reads shared offset %u, which nobody wrote", what,
                     start - emu_reserved_bytes);
    });
}

int emu_reader_of(emu_block *block, uint32_t offset) {
    int flight = -1;
    if (emu_wgmma_reads(block, offset, &flight)) return flight;
    for (int i = 0; i < block->n_thread; i++)
        for (const auto &store : block->threads[i].stores)
            if (!store->is_read && offset >= store->from &&
                offset < store->from + emu_tensor_box_bytes(store->box))
                return store->flight;
    return -1;
}

void emu_check_write(emu_block *block, uint32_t offset, uint32_t bytes, const char *what,
                     emu_place at) {
    each_granule(block, offset, bytes, [&](const emu_granule &granule, uint32_t start) {
        if (granule.writer)
            emu_fail(at, "%s writes shared offset %u while %s is in flight to it", what,
                     start - emu_reserved_bytes,
                     emu_flight_text(block, granule.writer - 1).c_str());
        if (granule.readers)
            emu_fail(at, "%s overwrites shared offset %u while %s still reads it", what,
                     start - emu_reserved_bytes,
                     emu_flight_text(block, emu_reader_of(block, start)).c_str());
    });
}

/* The async view of shared memory is renewed as a whole whenever somebody who fenced reaches a
 * barrier or issues an asynchronous operation.  So a kernel that fences too little is found, one in
 * which only some of the writers fence is not. */
static void publish(emu_block *block) {
    memcpy(block->async_view + emu_reserved_bytes, block->window + emu_reserved_bytes,
           block->grid->shared_bytes);
}

void emu_proxy_barrier(emu_thread *thread) {
    if (!thread->has_fenced_proxy) return;
    publish(thread->block);
    thread->has_fenced_proxy = false;
}

void emu_proxy_check(emu_thread *self, uint32_t offset, uint32_t bytes, const char *what,
                     emu_place at) {
    emu_proxy_barrier(self);
    const emu_block *block = self->block;
    for (uint32_t i = offset; i < offset + bytes; i++)
        if (block->window[i] != block->async_view[i])
            emu_fail(at, "%s reads shared offset %u, written since the last fence.proxy.async",
                     what, i - emu_reserved_bytes);
}

void ptx_fence_proxy_async(emu_place) {
    emu_self()->has_fenced_proxy = true;
}

void ptx_fence_proxy_async_global(emu_place) {
}

static void complete_copy(emu_block *block, emu_cp_async *copy) {
    unsigned char *to = block->window + copy->to;
    if (copy->bytes > 0) memcpy(to, copy->from, copy->bytes);
    memset(to + copy->bytes, 0, sizeof copy->before - copy->bytes);
    copy->is_complete = true;
}

void ptx_cp_async_16_zfill(void *shared, const void *global, uint32_t bytes, emu_place at) {
    const char *const what = "cp.async";
    emu_thread *self = emu_self();
    emu_block *block = self->block;
    emu_cp_async copy = {emu_shared_offset(shared, 16, 16, what, at),
                         static_cast<const unsigned char *>(global),
                         bytes,
                         self->copy_group,
                         false,
                         {},
                         0};
    if (bytes > 16) emu_fail(at, "cp.async of %u bytes, expected at most 16", bytes);
    if (reinterpret_cast<uintptr_t>(global) % 16 != 0)
        emu_fail(at, "cp.async from %p, which is not 16-byte aligned", global);
    emu_check_write(block, copy.to, 16, what, at);
    if (bytes > 0) memcpy(copy.before, global, bytes);
    copy.flight = emu_flight_begin(block, what, at);
    emu_write_begin(block, copy.to, 16, copy.flight);
    const emu_time_kind time = block->grid->time.kind;
    if (time == EMU_EARLY || (time == EMU_RANDOM && block->random.below(2) == 0))
        complete_copy(block, &copy);
    else
        memset(shared, emu_poison, 16);
    self->copies.push_back(copy);
}

void ptx_cp_async_commit(emu_place) {
    emu_self()->copy_group++;
}

void emu_cp_async_wait(int n, emu_place at) {
    emu_thread *self = emu_self();
    emu_block *block = self->block;
    const auto is_due = [&](const emu_cp_async &copy) {
        return copy.group + static_cast<uint32_t>(n) < self->copy_group;
    };
    if (self->copies.empty() || !is_due(self->copies[0])) return;
    if (block->grid->time.kind != EMU_EARLY) emu_wait_lazily(self, "cp.async.wait_group", at);
    size_t n_due = 0;
    for (; n_due < self->copies.size() && is_due(self->copies[n_due]); n_due++) {
        emu_cp_async *copy = &self->copies[n_due];
        if (copy->bytes > 0 && memcmp(copy->before, copy->from, copy->bytes) != 0)
            emu_fail(at, "the source of %s was overwritten before this wait",
                     emu_flight_text(block, copy->flight).c_str());
        if (!copy->is_complete) complete_copy(block, copy);
        emu_write_end(block, copy->to, 16, copy->flight);
        emu_flight_end(block, copy->flight);
    }
    self->copies.erase(self->copies.begin(),
                       self->copies.begin() + static_cast<std::ptrdiff_t>(n_due));
}

uint32_t ptx_shared_address(const void *shared, emu_place at) {
    return emu_shared_offset(shared, 1, 1, "a shared address", at);
}

float ptx_exp2(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y; // .ftz
}

uint64_t ptx_globaltimer() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<uint64_t>(now.tv_sec) * 1000000000u + static_cast<uint64_t>(now.tv_nsec);
}
