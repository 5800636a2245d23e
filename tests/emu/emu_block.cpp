/* The scheduler of a block: who runs next, meetings of a warp, a thread's start and end.
 *
 * A fiber that gives way picks its successor itself, so that a collective of 32 lanes costs 32
 * switches.  Knows no instruction: those meet, wait and wake through emu_block.h. */
#include "emu_block.h"

#include "emu_async.h"
#include "emu_report.h"

#include <stdlib.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define FENCE(address, bytes) ASAN_POISON_MEMORY_REGION(address, bytes)
#define UNFENCE(address, bytes) ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#else
#define FENCE(address, bytes) ((void)(address), (void)(bytes))
#define UNFENCE(address, bytes) ((void)(address), (void)(bytes))
#endif

__thread const emu_builtins *emu_now;

constexpr uint32_t canary_bytes = 256; // behind shared memory
constexpr int max_idle = 10000; // rounds in which threads poll in vain before that is a deadlock

emu_block::emu_block() {
    window = static_cast<unsigned char *>(aligned_alloc(1024, emu_window_bytes));
    async_view = static_cast<unsigned char *>(malloc(emu_window_bytes));
    if (!window || !async_view) abort();
    granules.resize(emu_window_bytes / emu_granule_bytes);
}

emu_block::~emu_block() {
    UNFENCE(window, emu_window_bytes);
    free(window);
    free(async_view);
    for (emu_thread &thread : threads) emu_fiber_destroy(&thread.fiber);
}

static int pick_bit(emu_block *block, uint32_t mask) {
    switch (block->grid->time.kind) {
    case EMU_EARLY: return __builtin_ctz(mask);
    case EMU_LATE: return 31 - __builtin_clz(mask);
    case EMU_RANDOM: break;
    }
    for (uint32_t skip = block->random.below(static_cast<uint32_t>(__builtin_popcount(mask)));
         skip > 0; skip--)
        mask &= mask - 1;
    return __builtin_ctz(mask);
}

void emu_wake(emu_thread *thread) {
    if (thread->state == EMU_LAZY) thread->block->n_lazy--;
    thread->state = EMU_READY;
    thread->warp->ready |= 1u << thread->lane;
    thread->block->ready_warps |= 1u << thread->warp->index;
}

void emu_progress(emu_block *block) {
    block->has_polled = false;
    block->n_idle = 0;
}

static void wake_lazy(emu_block *block) {
    block->has_polled = true;
    for (int i = 0; i < block->n_thread; i++)
        if (block->threads[i].state == EMU_LAZY) emu_wake(&block->threads[i]);
}

static void fail_deadlock(emu_block *block) {
    emu_fail_at_end(block, "%s", emu_deadlock_text(block).c_str());
}

/* Nobody is ready: let those who gave way go on, then the slowest copy arrive.  False if neither is
 * there. */
static bool is_revived(emu_block *block) {
    if (block->n_lazy > 0 && !block->has_polled) {
        wake_lazy(block);
        return true;
    }
    if (emu_complete_load(block)) return true;
    if (block->n_lazy > 0 && ++block->n_idle < max_idle) {
        wake_lazy(block);
        return true;
    }
    return false;
}

/* Next thread to run, of `warp` if it has one: a warp runs as far as it can before another gets its
 * turn. */
static emu_thread *pick(emu_block *block, emu_warp *warp) {
    while (block->ready_warps == 0) {
        if (!is_revived(block)) {
            fail_deadlock(block);
            return nullptr;
        }
    }
    const bool is_staying = warp && warp->ready &&
                            !(block->grid->time.kind == EMU_RANDOM && block->random.below(8) == 0);
    if (!is_staying) warp = &block->warps[pick_bit(block, block->ready_warps)];
    const int lane = pick_bit(block, warp->ready);
    warp->ready &= ~(1u << lane);
    if (warp->ready == 0) block->ready_warps &= ~(1u << warp->index);
    return warp->lanes[lane];
}

static void run_next(emu_thread *self, bool is_last) {
    emu_thread *next = pick(self->block, self->warp);
    if (next == self) return;
    if (next) emu_now = next;
    emu_fiber_switch(&self->fiber, next ? &next->fiber : &self->block->native, is_last || !next);
}

void emu_wait_for(emu_thread *self, const emu_wait &wait) {
    self->wait = wait;
    self->state = EMU_WAITING;
    run_next(self, false);
}

void emu_wait_lazily(emu_thread *self, const char *what, emu_place at) {
    self->wait = {what, at, nullptr, 0};
    self->state = EMU_LAZY;
    self->block->n_lazy++;
    run_next(self, false);
}

static std::string lanes_text(uint32_t mask) {
    std::vector<int> lanes;
    for (int lane = 0; lane < emu_lanes; lane++)
        if (mask >> lane & 1) lanes.push_back(lane);
    return emu_ranges(lanes);
}

[[noreturn]] static void fail_divergence(const emu_meeting &meeting, const char *what,
                                         emu_place at) {
    emu_fail(at, "divergent warp: lanes %s wait for this lane in %s at %s, but it comes to %s",
             lanes_text(meeting.arrived).c_str(), meeting.what, emu_place_text(meeting.at).c_str(),
             what);
}

bool emu_meet(emu_thread *self, const char *what, uint32_t mask, void *arguments, emu_place at) {
    emu_warp *warp = self->warp;
    const uint32_t bit = 1u << self->lane;
    if (!(mask & bit))
        emu_fail(at, "%s with mask %08x, which leaves out the calling lane %d", what, mask,
                 self->lane);
    self->arguments = arguments;
    emu_meeting *meeting = nullptr;
    for (int i = 0; i < warp->n_meeting; i++) {
        emu_meeting *other = &warp->meetings[i];
        if (other->mask == mask && other->what == what && emu_same_place(other->at, at))
            meeting = other;
        // those who wait for this lane there will not come to what it needs them for here
        else if (other->mask & bit && other->arrived & mask)
            fail_divergence(*other, what, at);
    }
    if (!meeting) {
        const uint32_t absent = mask & warp->done;
        if (absent)
            emu_fail(at, "%s waits for lanes %s, which have left the kernel or do not exist", what,
                     lanes_text(absent).c_str());
        meeting = &warp->meetings[warp->n_meeting++];
        *meeting = {what, at, mask, 0};
    }
    meeting->arrived |= bit;
    if (meeting->arrived == mask) return true;
    emu_wait_for(self, {what, at, nullptr, 0});
    return false;
}

void emu_part(emu_thread *self, uint32_t mask) {
    emu_block *block = self->block;
    emu_warp *warp = self->warp;
    int i = 0;
    while (warp->meetings[i].mask != mask) i++;
    warp->meetings[i] = warp->meetings[--warp->n_meeting];
    for (uint32_t rest = mask & ~(1u << self->lane); rest; rest &= rest - 1)
        warp->lanes[__builtin_ctz(rest)]->state = EMU_READY;
    warp->ready |= mask & ~(1u << self->lane);
    if (warp->ready) block->ready_warps |= 1u << warp->index;
    emu_progress(block);
    if (block->grid->time.kind == EMU_RANDOM && !block->loads.empty() &&
        block->random.below(8) == 0)
        emu_complete_load(block);
}

/* The thread's kernel has returned. */
static void leave(emu_thread *self) {
    emu_block *block = self->block;
    emu_warp *warp = self->warp;
    const uint32_t bit = 1u << self->lane;
    for (int i = 0; i < warp->n_meeting; i++)
        if (warp->meetings[i].mask & bit)
            emu_fail(warp->meetings[i].at,
                     "thread leaves the kernel while lanes %s of its warp wait for it in %s",
                     lanes_text(warp->meetings[i].arrived).c_str(), warp->meetings[i].what);
    if (block->barriers[0].is_block && block->barriers[0].arrived > 0)
        emu_fail(block->barriers[0].at,
                 "thread leaves the kernel while %u of %u threads wait for it in __syncthreads",
                 block->barriers[0].arrived, block->barriers[0].expected);
    emu_copies_leave(self);
    emu_wgmma_leave(self);
    warp->done |= bit;
    self->state = EMU_DONE;
    block->n_done++;
    emu_progress(block);
    if (block->n_done < block->n_thread) run_next(self, true);
}

static void thread_main() {
    emu_thread *self = emu_self();
    emu_fiber_begin(&self->block->native);
    try {
        self->block->grid->thread();
        leave(self);
    } catch (const emu_abandoned &) {
    }
    emu_fiber_switch(&self->fiber, &self->block->native, true);
    abort(); // nobody resumes a thread that has ended
}

static void set_up_memory(emu_block *block) {
    const uint32_t end = block->shared_end(), used = end + canary_bytes;
    UNFENCE(block->window, emu_window_bytes);
    memset(block->window, emu_poison, used);
    memset(block->async_view, emu_poison, end);
    FENCE(block->window, emu_reserved_bytes);
    FENCE(block->window + end, emu_window_bytes - end);
    memset(block->granules.data(), 0, used / emu_granule_bytes * sizeof block->granules[0]);
    block->flights.clear();
    block->free_flights.clear();
    block->mbarriers.clear();
    block->loads.clear();
    for (emu_barrier &barrier : block->barriers) barrier = {};
}

static void set_up_thread(emu_block *block, int i) {
    const dim3 size = block->grid->block;
    emu_thread *thread = &block->threads[i];
    const unsigned x = static_cast<unsigned>(i);
    thread->thread_idx = {x % size.x, x / size.x % size.y, x / size.x / size.y};
    thread->block_idx = block->index;
    thread->block_dim = size;
    thread->grid_dim = block->grid->grid;
    thread->block = block;
    thread->warp = &block->warps[i / emu_lanes];
    thread->index = i;
    thread->lane = i % emu_lanes;
    thread->state = EMU_READY;
    thread->copies.clear();
    thread->copy_group = 0;
    thread->stores.clear();
    thread->store_group = 0;
    thread->has_fenced_proxy = false;
    if (!thread->fiber.stack) emu_fiber_create(&thread->fiber);
    emu_fiber_reset(&thread->fiber, thread_main);
    thread->warp->lanes[thread->lane] = thread;
    thread->warp->ready |= 1u << thread->lane;
}

static void set_up(emu_block *block, emu_grid *grid, uint3 index) {
    block->grid = grid;
    block->index = index;
    block->random.state = grid->time.seed + 0x10001u * index.x + 0x20011u * index.y +
                          0x40031u * index.z + std::hash<std::string>()(grid->kernel);
    block->native.stack = nullptr;
    block->n_thread = static_cast<int>(grid->block.x * grid->block.y * grid->block.z);
    block->n_warp = (block->n_thread + emu_lanes - 1) / emu_lanes;
    block->n_done = block->n_lazy = block->n_idle = 0;
    block->has_polled = block->is_failed = false;
    block->ready_warps = 0;
    set_up_memory(block);
    // what ptxas gives a kernel whose launch bounds are its size and one block an SM
    const uint32_t registers = 65536u / static_cast<uint32_t>(block->n_thread) / 8 * 8;
    block->free_registers = 0;
    for (int w = 0; w < block->n_warp; w++) {
        emu_warp *warp = &block->warps[w];
        *warp = {};
        warp->index = w;
        warp->registers = registers < 256 ? registers : 256;
        block->ready_warps |= 1u << w;
    }
    for (int i = 0; i < block->n_thread; i++) set_up_thread(block, i);
    const int tail = block->n_thread % emu_lanes;
    if (tail)
        block->warps[block->n_warp - 1].done = ~0u << tail; // lanes that do not exist never come
    emu_wgmma_reset(block);
}

static void check_end(emu_block *block) {
    for (int id = 0; id < emu_named_barriers; id++)
        if (block->barriers[id].arrived > 0)
            return emu_fail_at_end(
                block, "block ends with %u of %u threads arrived at barrier %d, first at %s",
                block->barriers[id].arrived, block->barriers[id].expected, id,
                emu_place_text(block->barriers[id].at).c_str());
    if (!block->loads.empty())
        return emu_fail_at_end(block, "block ends before %s has come",
                               emu_flight_text(block, block->loads[0]->flight).c_str());
    for (int w = 0; w + 1 < block->n_warp; w++)
        if (w / 4 == (w + 1) / 4 &&
            block->warps[w].n_setmaxnreg != block->warps[w + 1].n_setmaxnreg)
            return emu_fail_at_end(
                block, "warps %d and %d of one warpgroup executed %d and %d setmaxnreg", w, w + 1,
                block->warps[w].n_setmaxnreg, block->warps[w + 1].n_setmaxnreg);
#ifndef __SANITIZE_ADDRESS__
    for (uint32_t at = block->shared_end(); at < block->shared_end() + canary_bytes; at++)
        if (block->window[at] != emu_poison)
            return emu_fail_at_end(block, "block wrote byte %u of its %u bytes of shared memory",
                                   at - emu_reserved_bytes, block->grid->shared_bytes);
#endif
}

void emu_block_run(emu_block *block, emu_grid *grid, uint3 index) {
    set_up(block, grid, index);
    emu_thread *first = pick(block, nullptr);
    const emu_builtins *outer = emu_now;
    emu_now = first;
    emu_fiber_switch(&block->native, &first->fiber, false);
    emu_now = outer;
    if (!block->is_failed) check_end(block);
}

unsigned char *emu_dynamic_shared() {
    return emu_self()->block->window + emu_reserved_bytes;
}
