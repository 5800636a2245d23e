/* Launches: limits of the device, blocks over OS threads, the time in force. */
#include "emu_launch.h"

#include "emu_block.h"
#include "emu_report.h"
#include "emu_stream.h"

#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <thread>

/* Blocks that ran before, kept for their stacks and memory. */
static std::mutex pool_lock;
static std::vector<std::unique_ptr<emu_block>> pool;

static std::mutex time_lock;
static emu_time time_chosen;
static bool is_time_chosen;
static std::string time_name;

static bool parse_time(const char *text, emu_time *time) {
    if (strcmp(text, "early") == 0)
        *time = {EMU_EARLY, 0};
    else if (strcmp(text, "late") == 0)
        *time = {EMU_LATE, 0};
    else if (strncmp(text, "random:", 7) == 0) {
        char *end = nullptr;
        *time = {EMU_RANDOM, strtoull(text + 7, &end, 10)};
        return end != text + 7 && *end == 0;
    } else
        return false;
    return true;
}

bool emu_set_time(const char *text) {
    const std::lock_guard<std::mutex> lock(time_lock);
    emu_time time;
    if (!parse_time(text, &time)) return false;
    time_chosen = time;
    time_name = text;
    is_time_chosen = true;
    return true;
}

emu_time emu_time_now() {
    const char *text = getenv("IFKV_EMU_TIME");
    if (!text) text = "early";
    {
        const std::lock_guard<std::mutex> lock(time_lock);
        if (is_time_chosen) return time_chosen;
    }
    if (!emu_set_time(text)) {
        fprintf(stderr, "emu: IFKV_EMU_TIME=%s, expected early, late or random:SEED\n", text);
        abort();
    }
    return emu_time_now();
}

const char *emu_time_name() {
    emu_time_now();
    return time_name.c_str();
}

static unsigned thread_count() {
    const char *text = getenv("IFKV_EMU_THREADS");
    const int n = text ? atoi(text) : static_cast<int>(std::thread::hardware_concurrency());
    return n > 0 ? static_cast<unsigned>(n) : 1;
}

static std::unique_ptr<emu_block> block_acquire() {
    const std::lock_guard<std::mutex> lock(pool_lock);
    if (pool.empty()) return std::make_unique<emu_block>();
    std::unique_ptr<emu_block> block = std::move(pool.back());
    pool.pop_back();
    return block;
}

/* Blocks come in any order: late runs them backwards, random starts somewhere. */
static uint3 block_index(const emu_grid &grid, uint64_t i, uint64_t n) {
    if (grid.time.kind == EMU_LATE) i = n - 1 - i;
    if (grid.time.kind == EMU_RANDOM) i = (i + grid.time.seed) % n;
    const uint64_t x = grid.grid.x, y = grid.grid.y;
    return {static_cast<unsigned>(i % x), static_cast<unsigned>(i / x % y),
            static_cast<unsigned>(i / x / y)};
}

static void run_grid(emu_grid *grid) {
    const uint64_t n = static_cast<uint64_t>(grid->grid.x) * grid->grid.y * grid->grid.z;
    std::atomic<uint64_t> next{0};
    std::atomic<bool> is_failed{false};
    const auto work = [&] {
        std::unique_ptr<emu_block> block = block_acquire();
        for (uint64_t i = next++; i < n && !is_failed; i = next++) {
            emu_block_run(block.get(), grid, block_index(*grid, i, n));
            if (block->is_failed) is_failed = true;
        }
        const std::lock_guard<std::mutex> lock(pool_lock);
        pool.push_back(std::move(block));
    };
    const uint64_t n_worker = n < thread_count() ? n : thread_count();
    std::vector<std::thread> others;
    for (uint64_t i = 1; i < n_worker; i++) others.emplace_back(work);
    work();
    for (std::thread &other : others) other.join();
}

/* The kernel's name: the launch's text up to the first comma outside of brackets. */
static std::string kernel_name(const char *text) {
    int depth = 0;
    size_t n = 0;
    for (; text[n] && !(text[n] == ',' && depth == 0); n++) {
        if (strchr("<([{", text[n])) depth++;
        if (strchr(">)]}", text[n])) depth--;
    }
    return std::string(text, n);
}

cudaError_t emu_launch_grid(const char *text, emu_place at, dim3 grid, dim3 block,
                            size_t shared_bytes, cudaStream_t stream,
                            std::function<void()> thread) {
    const uint64_t n_thread = static_cast<uint64_t>(block.x) * block.y * block.z;
    const bool is_valid = grid.x > 0 && grid.x <= 0x7fffffffu && grid.y > 0 && grid.y <= 65535 &&
                          grid.z > 0 && grid.z <= 65535 && n_thread > 0 &&
                          n_thread <= emu_max_threads && block.z <= 64;
    if (!is_valid) return cudaErrorInvalidConfiguration;
    if (shared_bytes > emu_max_shared_bytes) return cudaErrorInvalidValue;
    auto launch = std::make_shared<emu_grid>();
    launch->kernel = kernel_name(text);
    launch->at = at;
    launch->grid = grid;
    launch->block = block;
    launch->shared_bytes = static_cast<uint32_t>(shared_bytes);
    launch->thread = std::move(thread);
    launch->time = emu_time_now();
    emu_enqueue(stream, [launch] { run_grid(launch.get()); });
    return cudaSuccess;
}

__attribute__((weak)) void emu_enqueue(cudaStream_t, std::function<void()> work) {
    work();
}
