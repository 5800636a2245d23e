/* Barriers of a block: __syncthreads, named barriers, mbarriers, and the registers that warps hand
 * to each other. */
#include "emu_async.h"
#include "emu_block.h"
#include "emu_ptx.h"

static void wake_waiters(emu_block *block, const void *object) {
    for (int i = 0; i < block->n_thread; i++) {
        emu_thread *thread = &block->threads[i];
        if (thread->state == EMU_WAITING && thread->wait.object == object) emu_wake(thread);
    }
}

/* Count this thread at barrier `id`; true if it was the last and the barrier is open again. */
static bool arrive(emu_thread *self, int id, uint32_t expected, bool is_block, bool is_true,
                   const char *what, emu_place at) {
    emu_block *block = self->block;
    emu_barrier *barrier = &block->barriers[id];
    if (barrier->arrived == 0)
        *barrier = {expected, 0, is_block, at, 0, barrier->result};
    else if (barrier->expected != expected || barrier->is_block != is_block)
        emu_fail(at, "%s: barrier %d is used for %u threads here and for %u at %s", what, id,
                 expected, barrier->expected, emu_place_text(barrier->at).c_str());
    else if (is_block && !emu_same_place(barrier->at, at))
        emu_fail(at, "divergent %s: %u threads wait for this one at %s", what, barrier->arrived,
                 emu_place_text(barrier->at).c_str());
    emu_proxy_barrier(self);
    barrier->n_true += is_true;
    if (++barrier->arrived < barrier->expected) return false;
    barrier->arrived = 0;
    barrier->result = barrier->n_true;
    wake_waiters(block, barrier);
    emu_progress(block);
    return true;
}

static int sync_block(const char *what, bool is_true, emu_place at) {
    emu_thread *self = emu_self();
    emu_block *block = self->block;
    emu_barrier *barrier = &block->barriers[0];
    if (block->n_done > 0)
        emu_fail(at, "%s waits for %d threads that have left the kernel", what, block->n_done);
    if (!arrive(self, 0, static_cast<uint32_t>(block->n_thread), true, is_true, what, at))
        emu_wait_for(self, {what, at, barrier, 0});
    return barrier->result; // stands until all have arrived again
}

void __syncthreads(emu_place at) {
    sync_block("__syncthreads", false, at);
}
int __syncthreads_count(int predicate, emu_place at) {
    return sync_block("__syncthreads_count", predicate != 0, at);
}
int __syncthreads_and(int predicate, emu_place at) {
    return sync_block("__syncthreads_and", predicate != 0, at) == emu_self()->block->n_thread;
}
int __syncthreads_or(int predicate, emu_place at) {
    return sync_block("__syncthreads_or", predicate != 0, at) != 0;
}

static void check_named(const emu_thread *self, int id, int threads, const char *what,
                        emu_place at) {
    if (id < 0 || id >= emu_named_barriers)
        emu_fail(at, "%s: barrier %d, expected 0..15", what, id);
    if (threads <= 0 || threads % emu_lanes != 0 || threads > self->block->n_thread)
        emu_fail(at,
                 "%s: barrier %d for %d threads, expected a multiple of 32 up to the block's %d",
                 what, id, threads, self->block->n_thread);
}

void ptx_bar_sync(int id, int threads, emu_place at) {
    emu_thread *self = emu_self();
    check_named(self, id, threads, "bar.sync", at);
    if (!arrive(self, id, static_cast<uint32_t>(threads), false, false, "bar.sync", at))
        emu_wait_for(self, {"bar.sync", at, &self->block->barriers[id], 0});
}

void ptx_bar_arrive(int id, int threads, emu_place at) {
    emu_thread *self = emu_self();
    check_named(self, id, threads, "bar.arrive", at);
    arrive(self, id, static_cast<uint32_t>(threads), false, false, "bar.arrive", at);
}

/* What the model writes into an mbarrier's 8 bytes, so that it notices when somebody else does. */
static uint64_t mbarrier_mark(uint32_t offset) {
    return 0x6d62617272696572u ^ offset;
}

static emu_mbarrier *find_mbarrier(emu_block *block, uint32_t offset) {
    for (emu_mbarrier &barrier : block->mbarriers)
        if (barrier.offset == offset) return &barrier;
    return nullptr;
}

emu_mbarrier *emu_mbarrier_at(emu_block *block, uint32_t offset, const char *what, emu_place at) {
    emu_mbarrier *barrier = find_mbarrier(block, offset);
    if (!barrier)
        emu_fail(at, "%s: no mbarrier was initialised at shared offset %u", what,
                 offset - emu_reserved_bytes);
    uint64_t mark;
    memcpy(&mark, block->window + offset, sizeof mark);
    if (mark != mbarrier_mark(offset))
        emu_fail(at, "%s: something overwrote the mbarrier set up at %s", what,
                 emu_place_text(barrier->at).c_str());
    return barrier;
}

static uint32_t mbarrier_offset(const uint64_t *barrier, const char *what, emu_place at) {
    return emu_shared_offset(barrier, sizeof *barrier, alignof(uint64_t), what, at);
}

void ptx_mbarrier_init(uint64_t *address, uint32_t arrivals, emu_place at) {
    emu_block *block = emu_self()->block;
    const uint32_t offset = mbarrier_offset(address, "mbarrier.init", at);
    if (const emu_mbarrier *old = find_mbarrier(block, offset))
        emu_fail(at, "mbarrier.init of an mbarrier that is in use since %s",
                 emu_place_text(old->at).c_str());
    if (arrivals == 0 || arrivals >= 1u << 20)
        emu_fail(at, "mbarrier.init for %u arrivals, expected 1..2^20-1", arrivals);
    block->mbarriers.push_back({offset, arrivals, arrivals, 0, 0, at});
    const uint64_t mark = mbarrier_mark(offset);
    memcpy(block->window + offset, &mark, sizeof mark);
}

void ptx_mbarrier_inval(uint64_t *address, emu_place at) {
    emu_block *block = emu_self()->block;
    const uint32_t offset = mbarrier_offset(address, "mbarrier.inval", at);
    emu_mbarrier *barrier = emu_mbarrier_at(block, offset, "mbarrier.inval", at);
    *barrier = block->mbarriers.back();
    block->mbarriers.pop_back();
    memset(block->window + offset, emu_poison, sizeof(uint64_t));
}

/* End the phase if nothing is outstanding. */
static void turn(emu_block *block, emu_mbarrier *barrier) {
    if (barrier->pending > 0 || barrier->tx_bytes != 0) return;
    barrier->phase++;
    barrier->pending = barrier->expected;
    wake_waiters(block, block->window + barrier->offset);
    emu_progress(block);
}

static void expect_tx(emu_mbarrier *barrier, uint32_t bytes, emu_place at) {
    barrier->tx_bytes += bytes;
    if (barrier->tx_bytes >= 1 << 20)
        emu_fail(at, "mbarrier expects %lld bytes, more than 2^20-1",
                 static_cast<long long>(barrier->tx_bytes));
}

static void mbarrier_arrive(uint64_t *address, uint32_t bytes, const char *what, emu_place at) {
    emu_thread *self = emu_self();
    emu_mbarrier *barrier =
        emu_mbarrier_at(self->block, mbarrier_offset(address, what, at), what, at);
    if (barrier->pending == 0)
        emu_fail(at,
                 "%s: one arrival more than the %u that the mbarrier was set up for at %s; its "
                 "phase %u still lacks %lld bytes",
                 what, barrier->expected, emu_place_text(barrier->at).c_str(), barrier->phase,
                 static_cast<long long>(barrier->tx_bytes));
    emu_proxy_barrier(self);
    expect_tx(barrier, bytes, at);
    barrier->pending--;
    turn(self->block, barrier);
}

void ptx_mbarrier_arrive(uint64_t *barrier, emu_place at) {
    mbarrier_arrive(barrier, 0, "mbarrier.arrive", at);
}

void ptx_mbarrier_arrive_expect_tx(uint64_t *barrier, uint32_t bytes, emu_place at) {
    mbarrier_arrive(barrier, bytes, "mbarrier.arrive.expect_tx", at);
}

void ptx_mbarrier_expect_tx(uint64_t *address, uint32_t bytes, emu_place at) {
    emu_block *block = emu_self()->block;
    expect_tx(emu_mbarrier_at(block, mbarrier_offset(address, "mbarrier.expect_tx", at),
                              "mbarrier.expect_tx", at),
              bytes, at);
}

void emu_mbarrier_complete_tx(emu_block *block, uint32_t offset, uint32_t bytes, emu_place at) {
    emu_mbarrier *barrier = emu_mbarrier_at(block, offset, "complete_tx of a bulk copy", at);
    barrier->tx_bytes -= bytes;
    if (barrier->tx_bytes <= -(1 << 20))
        emu_fail(at, "more than 2^20-1 bytes came to an mbarrier that expects none");
    turn(block, barrier);
}

bool ptx_mbarrier_try_wait(uint64_t *address, uint32_t parity, emu_place at) {
    emu_thread *self = emu_self();
    emu_block *block = self->block;
    const uint32_t offset = mbarrier_offset(address, "mbarrier.try_wait", at);
    if (parity > 1) emu_fail(at, "mbarrier.try_wait for parity %u, expected 0 or 1", parity);
    if (block->grid->time.kind == EMU_RANDOM && block->random.below(4) == 0)
        return false; // as it may
    // a phase has ended if the one under way has the other parity
    while ((emu_mbarrier_at(block, offset, "mbarrier.try_wait", at)->phase & 1) == parity)
        emu_wait_for(self, {"mbarrier.try_wait", at, block->window + offset, parity});
    return true;
}

void ptx_fence_mbarrier_init(emu_place) {
}

/* Threads that wait for registers wait on the pool. */
void emu_setmaxnreg(int n, bool is_increase, emu_place at) {
    const char *const what = is_increase ? "setmaxnreg.inc" : "setmaxnreg.dec";
    const uint32_t count = static_cast<uint32_t>(n);
    emu_thread *self = emu_self();
    emu_block *block = self->block;
    emu_warp *warp = self->warp;
    if (!emu_meet(self, what, emu_all_lanes, nullptr, at)) return;
    warp->n_setmaxnreg++;
    if (is_increase ? count < warp->registers : count > warp->registers)
        emu_fail(at, "%s to %d, but the warp has %u registers a thread", what, n, warp->registers);
    if (is_increase) {
        while (block->free_registers < (count - warp->registers) * emu_lanes)
            emu_wait_for(self, {what, at, &block->free_registers, count});
        block->free_registers -= (count - warp->registers) * emu_lanes;
    } else {
        block->free_registers += (warp->registers - count) * emu_lanes;
        wake_waiters(block, &block->free_registers);
    }
    warp->registers = count;
    emu_part(self, emu_all_lanes);
}

void __nanosleep(unsigned, emu_place at) {
    emu_wait_lazily(emu_self(), "__nanosleep", at);
}

void __trap(emu_place at) {
    emu_fail(at, "__trap");
}
