/* One block on one OS thread: its threads, warps, shared memory, and what is in flight.
 *
 * The heart of the model, read by its own files only.  Threads are fibers that give way at
 * collective points; nothing here is locked, because a block never leaves its OS thread.  Waits are
 * either for a set of lanes (a meeting), for an object (barrier, mbarrier, registers), or lazy (go
 * on when nobody else can: how late completion is provoked). */
#ifndef IFKV_EMU_BLOCK_H
#define IFKV_EMU_BLOCK_H

#include "emu.h"
#include "emu_fiber.h"
#include "emu_time.h"

#include <functional>
#include <memory>
#include <string>
#include <vector>

constexpr int emu_lanes = 32;
constexpr unsigned emu_all_lanes = 0xffffffffu;
constexpr int emu_max_threads = 1024;
constexpr int emu_max_warps = emu_max_threads / emu_lanes;
constexpr uint32_t emu_window_bytes = 256 * 1024; // what 18 bits of a wgmma descriptor reach
constexpr uint32_t emu_reserved_bytes = 1024;     // the system's part at the start of the window
constexpr uint32_t emu_max_shared_bytes = 227 * 1024; // of a block, compute capability 9.0
constexpr unsigned char emu_poison = 0xff;            // NaN as bf16 and as float
constexpr uint32_t emu_granule_bytes = 16;            // unit of the bookkeeping of shared memory
constexpr int emu_named_barriers = 16;

struct emu_block;
struct emu_warp;

/* A launch. */
struct emu_grid {
    std::string kernel; // as the launch wrote it
    emu_place at;
    dim3 grid, block;
    uint32_t shared_bytes;
    std::function<void()> thread;
    emu_time time;
    bool is_failed = false; // guarded by the lock of reports
};

/* What a thread waits for; text for reports, object and value for whoever wakes it. */
struct emu_wait {
    const char *what;
    emu_place at;
    const void *object;
    uint32_t value;
};

enum emu_state { EMU_READY, EMU_WAITING, EMU_LAZY, EMU_DONE };

struct emu_cp_async {
    uint32_t to; // offset in the window
    const unsigned char *from;
    uint32_t bytes;
    uint32_t group;
    bool is_complete;
    unsigned char before[16]; // the source when it was issued
    int flight;
};

struct emu_bulk_store;

struct emu_thread : emu_builtins {
    emu_block *block;
    emu_warp *warp;
    int index, lane; // in the block, in the warp
    emu_state state;
    emu_wait wait;
    void *arguments; // of the collective it stands at, on its own stack
    emu_fiber fiber;
    std::vector<emu_cp_async> copies; // not yet waited for, oldest first
    uint32_t copy_group;              // the one being filled
    std::vector<std::unique_ptr<emu_bulk_store>> stores;
    uint32_t store_group;
    bool has_fenced_proxy; // since its writes were last made visible to the async proxy
};

/* Lanes on their way to one collective. */
struct emu_meeting {
    const char *what;
    emu_place at;
    uint32_t mask, arrived;
};

struct emu_warp {
    int index;
    emu_thread *lanes[emu_lanes]; // nullptr beyond the block
    uint32_t ready, done;
    int n_meeting;
    emu_meeting meetings[emu_lanes];
    uint32_t registers; // a thread may use
    int n_setmaxnreg;
};

struct emu_barrier {
    uint32_t expected, arrived; // threads
    bool is_block;              // __syncthreads: one place for all
    emu_place at;
    int n_true, result; // of __syncthreads_count
};

struct emu_mbarrier {
    uint32_t offset;
    uint32_t expected, pending;
    int64_t tx_bytes;
    uint32_t phase;
    emu_place at;
};

/* An asynchronous operation, as reports name it. */
struct emu_flight {
    const char *what;
    emu_place at;
    int thread;
};

struct emu_granule {
    uint16_t writer;  // 1 + flight that writes it
    uint16_t readers; // operations in flight that read it
    bool is_written;  // by something the model saw
};

struct emu_bulk_load;
struct emu_wgmma_group;

struct emu_block {
    emu_grid *grid = nullptr;
    uint3 index;
    emu_random random;
    emu_fiber native;
    emu_thread threads[emu_max_threads];
    emu_warp warps[emu_max_warps];
    int n_thread = 0, n_warp = 0, n_done = 0, n_lazy = 0;
    uint32_t ready_warps = 0;
    bool has_polled = false; // lazy threads ran since something last completed
    int n_idle = 0;          // rounds in which only lazy threads ran
    bool is_failed = false;

    unsigned char *window = nullptr;     // shared memory as 32-bit addresses see it
    unsigned char *async_view = nullptr; // the same bytes as the async proxy sees them
    std::vector<emu_granule> granules;
    std::vector<emu_flight> flights;
    std::vector<int> free_flights;

    emu_barrier barriers[emu_named_barriers];
    std::vector<emu_mbarrier> mbarriers;
    std::vector<std::unique_ptr<emu_bulk_load>> loads; // in flight
    std::vector<std::shared_ptr<emu_wgmma_group>> wgmma;
    uint32_t free_registers = 0;

    emu_block();
    ~emu_block();
    emu_block(const emu_block &) = delete;
    emu_block &operator=(const emu_block &) = delete;

    uint32_t shared_end() const {
        return emu_reserved_bytes + grid->shared_bytes;
    }
};

/* Run block `index` of the grid from start to end. */
void emu_block_run(emu_block *block, emu_grid *grid, uint3 index);

inline emu_thread *emu_self() {
    return static_cast<emu_thread *>(const_cast<emu_builtins *>(emu_now));
}

/* Thrown by emu_fail to unwind the thread that fails; the others stay where they stand, for good.
 */
struct emu_abandoned {};

/* Report, abandon the block, never return.  Called by a running thread. */
[[noreturn]] void emu_fail(emu_place at, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
/* The same from the OS thread's own stack, after the threads have ended; returns. */
void emu_fail_at_end(emu_block *block, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
std::string emu_format(const char *format, ...) __attribute__((format(printf, 1, 2)));
std::string emu_place_text(emu_place at);

/* Waiting and waking. */
void emu_wait_for(emu_thread *self, const emu_wait &wait);
void emu_wake(emu_thread *thread);
void emu_wait_lazily(emu_thread *self, const char *what, emu_place at);
/* Something asynchronous came to pass: whoever polls may find it. */
void emu_progress(emu_block *block);
bool emu_same_place(emu_place a, emu_place b);

/* A collective of the lanes in `mask`: true for the last to arrive, who does the work for all
 * (their `arguments` point into their stacks) and then calls emu_part; the others return false
 * after that. */
bool emu_meet(emu_thread *self, const char *what, uint32_t mask, void *arguments, emu_place at);
void emu_part(emu_thread *self, uint32_t mask);

/* Threads of the group that a report lists, as ranges: "0-31 64". */
std::string emu_ranges(const std::vector<int> &sorted);
std::string emu_deadlock_text(emu_block *block);

#endif
