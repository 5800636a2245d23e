/* Shuffles, votes, matches and reductions of a warp. */
#include "emu_async.h"
#include "emu_block.h"
#include "emu_ptx.h"

template <typename T> static T &arguments_of(emu_warp *warp, int lane) {
    return *static_cast<T *>(warp->lanes[lane]->arguments);
}

/* Call `work(lane)` for the lanes of `mask`, lowest first. */
template <typename F> static void each_lane(uint32_t mask, F work) {
    for (; mask; mask &= mask - 1) work(__builtin_ctz(mask));
}

void __syncwarp(unsigned mask, emu_place at) {
    emu_thread *self = emu_self();
    if (emu_meet(self, "__syncwarp", mask, nullptr, at)) emu_part(self, mask);
    emu_proxy_barrier(self);
}

struct shuffle_arguments {
    uint64_t bits, result;
    int by;
};

static int shuffle_source(emu_shuffle kind, int lane, int by, int width) {
    const int segment = lane & ~(width - 1);
    int source = lane;
    switch (kind) {
    case EMU_SHUFFLE_INDEX: return segment + (by & (width - 1));
    case EMU_SHUFFLE_UP: source = lane - by; break;
    case EMU_SHUFFLE_DOWN: source = lane + by; break;
    case EMU_SHUFFLE_XOR: source = lane ^ by; break;
    }
    // xor reaches earlier segments too; outside a lane keeps its own value
    const bool is_inside =
        source < segment + width && (kind == EMU_SHUFFLE_XOR ? source >= 0 : source >= segment);
    return is_inside ? source : lane;
}

uint64_t emu_shuffle_bits(emu_shuffle kind, unsigned mask, uint64_t bits, int by, int width,
                          emu_place at) {
    static const char *const names[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync",
                                        "__shfl_xor_sync"};
    emu_thread *self = emu_self();
    if (width < 1 || width > emu_lanes || (width & (width - 1)))
        emu_fail(at, "%s with width %d", names[kind], width);
    shuffle_arguments mine = {bits, 0, by};
    if (emu_meet(self, names[kind], mask, &mine, at)) {
        each_lane(mask, [&](int lane) {
            auto &its = arguments_of<shuffle_arguments>(self->warp, lane);
            const int source = shuffle_source(kind, lane, its.by, width);
            if (!(mask >> source & 1))
                emu_fail(at, "%s: lane %d reads lane %d, which mask %08x leaves out", names[kind],
                         lane, source, mask);
            its.result = arguments_of<shuffle_arguments>(self->warp, source).bits;
        });
        emu_part(self, mask);
    }
    return mine.result;
}

static unsigned ballot(const char *what, unsigned mask, int predicate, emu_place at) {
    struct arguments {
        int predicate;
        unsigned result;
    } mine = {predicate, 0};
    emu_thread *self = emu_self();
    if (emu_meet(self, what, mask, &mine, at)) {
        unsigned votes = 0;
        each_lane(mask, [&](int lane) {
            if (arguments_of<arguments>(self->warp, lane).predicate) votes |= 1u << lane;
        });
        each_lane(mask,
                  [&](int lane) { arguments_of<arguments>(self->warp, lane).result = votes; });
        emu_part(self, mask);
    }
    return mine.result;
}

unsigned __ballot_sync(unsigned mask, int predicate, emu_place at) {
    return ballot("__ballot_sync", mask, predicate, at);
}

int __all_sync(unsigned mask, int predicate, emu_place at) {
    return ballot("__all_sync", mask, predicate, at) == mask;
}

int __any_sync(unsigned mask, int predicate, emu_place at) {
    return ballot("__any_sync", mask, predicate, at) != 0;
}

unsigned emu_match_bits(unsigned mask, uint64_t bits, emu_place at) {
    struct arguments {
        uint64_t bits;
        unsigned result;
    } mine = {bits, 0};
    emu_thread *self = emu_self();
    if (emu_meet(self, "__match_any_sync", mask, &mine, at)) {
        each_lane(mask, [&](int lane) {
            auto &its = arguments_of<arguments>(self->warp, lane);
            each_lane(mask, [&](int other) {
                if (arguments_of<arguments>(self->warp, other).bits == its.bits)
                    its.result |= 1u << other;
            });
        });
        emu_part(self, mask);
    }
    return mine.result;
}

template <typename T, typename F>
static T reduce(const char *what, unsigned mask, T value, F combine, emu_place at) {
    emu_thread *self = emu_self();
    T mine = value;
    if (emu_meet(self, what, mask, &mine, at)) {
        T all = arguments_of<T>(self->warp, __builtin_ctz(mask));
        each_lane(mask & (mask - 1),
                  [&](int lane) { all = combine(all, arguments_of<T>(self->warp, lane)); });
        each_lane(mask, [&](int lane) { arguments_of<T>(self->warp, lane) = all; });
        emu_part(self, mask);
    }
    return mine;
}

unsigned __reduce_add_sync(unsigned mask, unsigned value, emu_place at) {
    return reduce(
        "__reduce_add_sync", mask, value, [](unsigned x, unsigned y) { return x + y; }, at);
}
int __reduce_add_sync(unsigned mask, int value, emu_place at) {
    return static_cast<int>(
        __reduce_add_sync(mask, static_cast<unsigned>(value), at)); // wraps, as there
}
unsigned __reduce_min_sync(unsigned mask, unsigned value, emu_place at) {
    return reduce(
        "__reduce_min_sync", mask, value, [](unsigned x, unsigned y) { return min(x, y); }, at);
}
int __reduce_min_sync(unsigned mask, int value, emu_place at) {
    return reduce(
        "__reduce_min_sync", mask, value, [](int x, int y) { return min(x, y); }, at);
}
unsigned __reduce_max_sync(unsigned mask, unsigned value, emu_place at) {
    return reduce(
        "__reduce_max_sync", mask, value, [](unsigned x, unsigned y) { return max(x, y); }, at);
}
int __reduce_max_sync(unsigned mask, int value, emu_place at) {
    return reduce(
        "__reduce_max_sync", mask, value, [](int x, int y) { return max(x, y); }, at);
}
unsigned __reduce_and_sync(unsigned mask, unsigned value, emu_place at) {
    return reduce(
        "__reduce_and_sync", mask, value, [](unsigned x, unsigned y) { return x & y; }, at);
}
unsigned __reduce_or_sync(unsigned mask, unsigned value, emu_place at) {
    return reduce(
        "__reduce_or_sync", mask, value, [](unsigned x, unsigned y) { return x | y; }, at);
}
unsigned __reduce_xor_sync(unsigned mask, unsigned value, emu_place at) {
    return reduce(
        "__reduce_xor_sync", mask, value, [](unsigned x, unsigned y) { return x ^ y; }, at);
}

/* The same lane each time, but which one is nobody's business. */
bool ptx_elect_one(emu_place at) {
    emu_thread *self = emu_self();
    if (emu_meet(self, "elect.sync", emu_all_lanes, nullptr, at)) emu_part(self, emu_all_lanes);
    const emu_time &time = self->block->grid->time;
    int elected = 0;
    if (time.kind == EMU_LATE) elected = emu_lanes - 1;
    if (time.kind == EMU_RANDOM)
        elected = static_cast<int>((time.seed * 7 + static_cast<uint64_t>(self->warp->index) * 13) %
                                   emu_lanes);
    return self->lane == elected;
}
