/* Texts of reports: the first of a launch counts, from whatever OS thread it comes. */
#include "emu_report.h"

#include "emu_block.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <mutex>

static std::mutex report_lock;
static void (*report_handler)(const char *text);

void emu_on_report(void (*handler)(const char *text)) {
    const std::lock_guard<std::mutex> lock(report_lock);
    report_handler = handler;
}

static void report(emu_grid *grid, const std::string &text) {
    const std::lock_guard<std::mutex> lock(report_lock);
    if (grid->is_failed)
        return; // one report a launch: what other blocks find next to it is the same bug
    grid->is_failed = true;
    if (report_handler) {
        report_handler(text.c_str());
        return;
    }
    fprintf(stderr, "%s", text.c_str());
    abort();
}

static std::string format_list(const char *format, va_list list) {
    char text[1024];
    vsnprintf(text, sizeof text, format, list);
    return text;
}

std::string emu_format(const char *format, ...) {
    va_list list;
    va_start(list, format);
    std::string text = format_list(format, list);
    va_end(list);
    return text;
}

std::string emu_place_text(emu_place at) {
    const std::string file = at.file;
    return file.substr(file.rfind('/') + 1) + ":" + std::to_string(at.line);
}

static std::string where_text(const emu_block *block) {
    const emu_grid *grid = block->grid;
    return emu_format("\n  in %s launched at %s, block (%u, %u, %u), time %s", grid->kernel.c_str(),
                      emu_place_text(grid->at).c_str(), block->index.x, block->index.y,
                      block->index.z, emu_time_name());
}

bool emu_same_place(emu_place a, emu_place b) {
    return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0);
}

static void report_from_thread(emu_thread *self, emu_place at, const char *format, va_list list) {
    report(self->block->grid, "emu: " + format_list(format, list) + "\n  at " + emu_place_text(at) +
                                  where_text(self->block) +
                                  emu_format(", thread (%u, %u, %u) = %d\n", self->thread_idx.x,
                                             self->thread_idx.y, self->thread_idx.z, self->index));
}

void emu_fail(emu_place at, const char *format, ...) {
    emu_thread *self = emu_self();
    va_list list;
    va_start(list, format);
    report_from_thread(self, at, format, list);
    va_end(list);
    self->block->is_failed = true;
    throw emu_abandoned(); // its frames own texts and buffers
}

void emu_fail_at_end(emu_block *block, const char *format, ...) {
    va_list list;
    va_start(list, format);
    report(block->grid, "emu: " + format_list(format, list) + where_text(block) + "\n");
    va_end(list);
    block->is_failed = true;
}

std::string emu_ranges(const std::vector<int> &sorted) {
    std::string text;
    for (size_t i = 0; i < sorted.size();) {
        size_t end = i;
        while (end + 1 < sorted.size() && sorted[end + 1] == sorted[end] + 1) end++;
        text += (text.empty() ? "" : " ") + std::to_string(sorted[i]);
        if (end > i) text += "-" + std::to_string(sorted[end]);
        i = end + 1;
    }
    return text;
}

static std::string wait_text(const emu_thread &thread) {
    const emu_block *block = thread.block;
    const emu_wait &wait = thread.wait;
    std::string text = std::string(wait.what) + " at " + emu_place_text(wait.at);
    for (const emu_mbarrier &barrier : block->mbarriers)
        if (wait.object == block->window + barrier.offset)
            text += emu_format(" for parity %u; that mbarrier, set up at %s, is in phase %u with "
                               "%u of %u arrivals "
                               "and %lld bytes still to come",
                               wait.value, emu_place_text(barrier.at).c_str(), barrier.phase,
                               barrier.pending, barrier.expected,
                               static_cast<long long>(barrier.tx_bytes));
    for (int id = 0; id < emu_named_barriers; id++)
        if (wait.object == &block->barriers[id])
            text += emu_format(" (barrier %d, %u of %u threads arrived)", id,
                               block->barriers[id].arrived, block->barriers[id].expected);
    return text;
}

std::string emu_deadlock_text(emu_block *block) {
    std::vector<std::pair<std::string, std::vector<int>>> groups;
    for (int i = 0; i < block->n_thread; i++) {
        const emu_thread &thread = block->threads[i];
        const std::string text =
            thread.state == EMU_DONE ? "have left" : "wait at " + wait_text(thread);
        size_t g = 0;
        while (g < groups.size() && groups[g].first != text) g++;
        if (g == groups.size()) groups.push_back({text, {}});
        groups[g].second.push_back(i);
    }
    std::string text = "deadlock: no thread can go on";
    for (const auto &group : groups)
        text += "\n  threads " + emu_ranges(group.second) + " " + group.first;
    return text;
}
