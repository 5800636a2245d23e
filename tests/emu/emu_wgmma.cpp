/* wgmma of one warpgroup: operations matched between its four warps, their operands and
 * accumulators watched until the wait.
 *
 * Each warp issues for itself; an operation can finish when all four have issued it, and is
 * finished for all once one warp waited for it (so one elected thread of a warpgroup may release a
 * stage).  Accumulators come back to a warp at its own wait.  While an operation is in flight its
 * accumulators hold NaN (early: the result), its operands in shared memory and registers must not
 * change; both are compared at the wait, so a violation is found at any time. */
#include "emu_matrix.h"

#include "emu_async.h"
#include "emu_ptx.h"

#include <deque>

constexpr int group_warps = 4;
constexpr int m_rows = 64, k_columns = 16, warp_rows = 16;

/* A warp's part of an accumulator array in use. */
struct accumulator {
    float *registers[emu_lanes];
    int n_float;                        // a lane's
    std::vector<emu_float8> value;      // [16, N]
    std::vector<float> left[emu_lanes]; // what we left in the registers
    bool is_shown = false;              // the registers hold the value and not NaN
    int n_pending = 0;                  // operations on it that its warp has not waited for
    emu_place at;                       // of the latest
};

struct operation {
    int n, scale_d;
    bool trans_b, is_rs;
    uint64_t a, b;
    emu_place at;
    int flight;
    uint32_t issued, waited; // warps
    bool is_executed, is_finished;
    uint32_t group[group_warps];
    // operands as the first warp to issue found them; fragments of a as each warp brings them
    std::vector<uint16_t> a_value, b_value;            // [64, 16]; [N, 16], with trans_b [16, N]
    std::vector<uint32_t> chunks;                      // 16-byte granules of shared memory it reads
    const uint32_t *fragments[group_warps][emu_lanes]; // where a's registers are
    uint32_t fragment_words[group_warps][emu_lanes][4];
    std::shared_ptr<accumulator> accumulators[group_warps];
};

struct warp_state {
    uint32_t n_issued = 0, group = 0; // operations issued, group being filled
    uint32_t n_waited = 0;
    bool is_fenced = false;                                 // since its latest wait
    std::vector<std::shared_ptr<accumulator>> accumulators; // in flight, and used before
};

struct emu_wgmma_group {
    std::deque<std::unique_ptr<operation>> operations; // number `first` on
    uint32_t first = 0;
    warp_state warps[group_warps];
};

struct wgmma_arguments {
    float *d;
    const uint32_t *a_frag;
    uint64_t a, b;
    int scale_d;
};

void emu_wgmma_reset(emu_block *block) {
    block->wgmma.clear();
    for (int i = 0; i < (block->n_warp + group_warps - 1) / group_warps; i++)
        block->wgmma.push_back(std::make_shared<emu_wgmma_group>());
}

static emu_wgmma_group *group_of(const emu_thread *self) {
    return self->block->wgmma[static_cast<size_t>(self->warp->index / group_warps)].get();
}

static int warp_of(const emu_thread *self) {
    return self->warp->index % group_warps;
}

/* A 128-byte swizzled operand. */
struct descriptor {
    uint32_t start, leading, stride;
};

static descriptor decode(uint64_t bits, const char *name, emu_place at) {
    const descriptor out = {static_cast<uint32_t>(bits & 0x3fff) << 4,
                            static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4,
                            static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4};
    if (bits >> 62 != 1)
        emu_fail(at, "wgmma: descriptor of %s says swizzle %d, the model knows 1 (128 bytes)", name,
                 static_cast<int>(bits >> 62));
    if (bits >> 49 & 7)
        emu_fail(at, "wgmma: descriptor of %s has base offset %d, the model knows 0", name,
                 static_cast<int>(bits >> 49 & 7));
    if (out.start >> 7 & 7)
        emu_fail(at,
                 "wgmma: descriptor of %s starts at shared offset %u, not in the first line of a "
                 "1024-byte swizzle pattern",
                 name, out.start - emu_reserved_bytes);
    return out;
}

/* Address of the 16 bytes that hold element (line, 8 eight) of an operand: a line has k contiguous
 * (K-major) or the rows of a or columns of b (MN-major). */
static uint32_t chunk_address(const descriptor &its, bool is_mn_major, int line, int eight) {
    const uint32_t l = static_cast<uint32_t>(line), e = static_cast<uint32_t>(eight);
    const uint32_t linear = its.start + l / 8 * its.stride + l % 8 * 128 +
                            (is_mn_major ? e / 8 * its.leading + e % 8 * 16 : e * 16);
    return linear ^ (linear >> 7 & 7) << 4;
}

/* Read an operand of n_line lines of 8 n_eight elements, dense; its granules are appended to
 * `chunks`. */
static std::vector<uint16_t> read_operand(const emu_block *block, const descriptor &its,
                                          bool is_mn_major, int n_line, int n_eight,
                                          std::vector<uint32_t> *chunks) {
    std::vector<uint16_t> value(static_cast<size_t>(n_line) * static_cast<size_t>(n_eight) * 8);
    size_t at = 0;
    for (int line = 0; line < n_line; line++)
        for (int eight = 0; eight < n_eight; eight++, at += 8) {
            const uint32_t address = chunk_address(its, is_mn_major, line, eight);
            if (chunks) chunks->push_back(address);
            memcpy(&value[at], block->window + address, 16);
        }
    return value;
}

static void check_operand(emu_thread *self, const operation &its, const descriptor &operand,
                          bool is_mn_major, int n_line, int n_eight, const char *what) {
    emu_block *block = self->block;
    const uint32_t in_line = operand.start & 127;
    if (is_mn_major ? in_line != 0 : in_line + 32 > 128)
        emu_fail(its.at, "%s starts at byte %u of its 128-byte line and leaves it", what, in_line);
    for (int line = 0; line < n_line; line++)
        for (int eight = 0; eight < n_eight; eight++) {
            const uint32_t address = chunk_address(operand, is_mn_major, line, eight);
            if (address < emu_reserved_bytes || address + 16 > block->shared_end())
                emu_fail(its.at,
                         "%s: the descriptor (start %u, leading %u, stride %u bytes) reaches "
                         "shared offset %u, outside of the "
                         "block's %u bytes",
                         what, operand.start - emu_reserved_bytes, operand.leading, operand.stride,
                         address - emu_reserved_bytes, block->grid->shared_bytes);
            emu_check_read(block, address, 16, what, its.at);
            emu_proxy_check(self, address, 16, what, its.at);
        }
}

static void read_operands(const emu_block *block, const operation &its, std::vector<uint16_t> *a,
                          std::vector<uint16_t> *b, std::vector<uint32_t> *chunks) {
    const int lines = its.trans_b ? k_columns : its.n,
              eights = its.trans_b ? its.n / 8 : k_columns / 8;
    if (!its.is_rs)
        *a = read_operand(block, decode(its.a, "a", its.at), false, m_rows, k_columns / 8, chunks);
    *b = read_operand(block, decode(its.b, "b", its.at), its.trans_b, lines, eights, chunks);
}

/* The first warp to come issues it for the group: what it reads is fixed here. */
static operation *begin_operation(emu_thread *self, int n, bool trans_b,
                                  const wgmma_arguments &first, emu_place at) {
    emu_block *block = self->block;
    auto its = std::make_unique<operation>();
    its->n = n;
    its->scale_d = first.scale_d;
    its->trans_b = trans_b;
    its->is_rs = first.a_frag != nullptr;
    its->a = first.a;
    its->b = first.b;
    its->at = at;
    if (!its->is_rs)
        check_operand(self, *its, decode(its->a, "a", at), false, m_rows, k_columns / 8,
                      "wgmma, operand a");
    check_operand(self, *its, decode(its->b, "b", at), trans_b, trans_b ? k_columns : n,
                  trans_b ? n / 8 : k_columns / 8, "wgmma, operand b");
    read_operands(block, *its, &its->a_value, &its->b_value, &its->chunks);
    if (its->is_rs) its->a_value.resize(m_rows * k_columns);
    its->flight = emu_flight_begin(block, "wgmma", at);
    for (uint32_t chunk : its->chunks) emu_read_begin(block, chunk, emu_granule_bytes);
    group_of(self)->operations.push_back(std::move(its));
    return group_of(self)->operations.back().get();
}

static operation *find_operation(emu_thread *self, int n, bool trans_b, emu_place at) {
    emu_wgmma_group *group = group_of(self);
    const warp_state &state = group->warps[warp_of(self)];
    const auto &first = *static_cast<wgmma_arguments *>(self->warp->lanes[0]->arguments);
    const uint32_t i = state.n_issued - group->first;
    if (i == group->operations.size()) return begin_operation(self, n, trans_b, first, at);
    operation *its = group->operations[i].get();
    const bool is_same = its->n == n && its->trans_b == trans_b &&
                         its->is_rs == (first.a_frag != nullptr) && its->a == first.a &&
                         its->b == first.b && its->scale_d == first.scale_d &&
                         emu_same_place(its->at, at);
    if (!is_same)
        emu_fail(at, "the warps of a warpgroup issue different wgmma: another one issued %s",
                 emu_flight_text(self->block, its->flight).c_str());
    return its;
}

static void check_lanes_agree(emu_warp *warp, emu_place at) {
    const auto &first = *static_cast<wgmma_arguments *>(warp->lanes[0]->arguments);
    for (int lane = 1; lane < emu_lanes; lane++) {
        const auto &its = *static_cast<wgmma_arguments *>(warp->lanes[lane]->arguments);
        if (its.a != first.a || its.b != first.b || its.scale_d != first.scale_d)
            emu_fail(at, "wgmma: lane %d has other descriptors or another scale-d than lane 0",
                     lane);
    }
}

/* Where element i of a lane lies in its warp's 16 rows. */
static void place_of(int lane, int i, int *row, int *col) {
    *row = lane / 4 + 8 * (i / 2 % 2);
    *col = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
}

static bool is_untouched(const accumulator &its, int lane) {
    return memcmp(its.registers[lane], its.left[lane].data(),
                  sizeof(float) * static_cast<size_t>(its.n_float)) == 0;
}

static void leave_in_registers(accumulator *its, bool is_value) {
    const float *value = reinterpret_cast<const float *>(its->value.data());
    its->is_shown = is_value;
    for (int lane = 0; lane < emu_lanes; lane++) {
        its->left[lane].resize(static_cast<size_t>(its->n_float));
        memset(its->left[lane].data(), emu_poison,
               sizeof(float) * static_cast<size_t>(its->n_float));
        for (int i = 0; is_value && i < its->n_float; i++) {
            int row = 0, col = 0;
            place_of(lane, i, &row, &col);
            its->left[lane][static_cast<size_t>(i)] = value[row * 2 * its->n_float + col];
        }
        memcpy(its->registers[lane], its->left[lane].data(),
               sizeof(float) * static_cast<size_t>(its->n_float));
    }
}

static void take_from_registers(accumulator *its) {
    its->value.assign(static_cast<size_t>(warp_rows * its->n_float / 4), emu_float8{});
    float *value = reinterpret_cast<float *>(its->value.data());
    for (int lane = 0; lane < emu_lanes; lane++)
        for (int i = 0; i < its->n_float; i++) {
            int row = 0, col = 0;
            place_of(lane, i, &row, &col);
            value[row * 2 * its->n_float + col] = its->registers[lane][i];
        }
}

/* The accumulator that this warp's lanes name, new or in use. */
static std::shared_ptr<accumulator> find_accumulator(emu_thread *self, const operation &its,
                                                     warp_state *state, emu_place at) {
    float *d[emu_lanes];
    for (int lane = 0; lane < emu_lanes; lane++)
        d[lane] = static_cast<wgmma_arguments *>(self->warp->lanes[lane]->arguments)->d;
    auto &all = state->accumulators;
    for (size_t i = 0; i < all.size();) {
        accumulator *known = all[i].get();
        if (known->n_float == its.n / 2 && memcmp(known->registers, d, sizeof d) == 0) {
            for (int lane = 0; lane < emu_lanes && known->n_pending > 0; lane++)
                if (!is_untouched(*known, lane))
                    emu_fail(at, "accumulators of the wgmma at %s were touched before their wait",
                             emu_place_text(known->at).c_str());
            return all[i];
        }
        const bool overlaps =
            known->registers[0] < d[0] + its.n / 2 && d[0] < known->registers[0] + known->n_float;
        if (overlaps && known->n_pending > 0)
            emu_fail(at, "wgmma uses a part of the accumulators of the one at %s, still in flight",
                     emu_place_text(known->at).c_str());
        if (overlaps)
            all.erase(all.begin() + static_cast<std::ptrdiff_t>(i)); // an array that is gone
        else
            i++;
    }
    auto fresh = std::make_shared<accumulator>();
    memcpy(fresh->registers, d, sizeof d);
    fresh->n_float = its.n / 2;
    all.push_back(fresh);
    return fresh;
}

/* Without a fence since the latest wait the registers must be exactly what the latest wgmma left.
 */
static void check_fence(const warp_state &state, const operation &its, const accumulator &d,
                        emu_place at) {
    if (state.is_fenced) return;
    bool is_known = !its.is_rs && !d.left[0].empty();
    for (int lane = 0; is_known && lane < emu_lanes; lane++) is_known = is_untouched(d, lane);
    if (!is_known) emu_fail(at, "wgmma without wgmma.fence since its registers were last touched");
}

static void take_fragments(emu_warp *warp, int w, operation *its) {
    for (int lane = 0; lane < emu_lanes; lane++) {
        const uint32_t *frag = static_cast<wgmma_arguments *>(warp->lanes[lane]->arguments)->a_frag;
        its->fragments[w][lane] = frag;
        memcpy(its->fragment_words[w][lane], frag, sizeof its->fragment_words[w][lane]);
        for (int i = 0; i < 4; i++)
            for (int half = 0; half < 2; half++) {
                const int row = warp_rows * w + lane / 4 + 8 * (i % 2),
                          col = 2 * (lane % 4) + 8 * (i / 2) + half;
                its->a_value[static_cast<size_t>(row * k_columns + col)] =
                    static_cast<uint16_t>(frag[i] >> 16 * half);
            }
    }
}

/* All four warps have issued: compute. */
static void execute(operation *its) {
    const int n_eight = its->n / 8;
    std::vector<float> a(static_cast<size_t>(m_rows * k_columns));
    std::vector<emu_float8> b(static_cast<size_t>(k_columns * n_eight));
    float *b_float = reinterpret_cast<float *>(b.data());
    for (size_t i = 0; i < a.size(); i++) a[i] = emu_bf16_value(its->a_value[i]);
    for (int k = 0; k < k_columns; k++)
        for (int col = 0; col < its->n; col++)
            b_float[k * its->n + col] = emu_bf16_value(its->b_value[static_cast<size_t>(
                its->trans_b ? k * its->n + col : col * k_columns + k)]);
    for (int w = 0; w < group_warps; w++) {
        accumulator *d = its->accumulators[w].get();
        if (!its->scale_d) d->value.assign(static_cast<size_t>(warp_rows * n_eight), emu_float8{});
        emu_multiply(warp_rows / 4, n_eight, &a[static_cast<size_t>(w * warp_rows * k_columns)],
                     b.data(), d->value.data());
    }
    its->is_executed = true;
}

constexpr uint32_t all_warps = (1u << group_warps) - 1;

/* Execute operations up to number `end`, in order; those not issued by all warps stop it. */
static void execute_until(emu_wgmma_group *group, uint32_t end, bool is_shown) {
    for (uint32_t i = 0; group->first + i < end && i < group->operations.size(); i++) {
        operation *its = group->operations[i].get();
        if (its->is_executed) continue;
        if (its->issued != all_warps) return;
        execute(its);
        for (int w = 0; is_shown && w < group_warps; w++)
            leave_in_registers(its->accumulators[w].get(), true);
    }
}

static void issue(emu_thread *self, int n, bool trans_b, emu_place at) {
    emu_block *block = self->block;
    emu_wgmma_group *group = group_of(self);
    const int w = warp_of(self);
    warp_state *state = &group->warps[w];
    check_lanes_agree(self->warp, at);
    operation *its = find_operation(self, n, trans_b, at);
    std::shared_ptr<accumulator> d = find_accumulator(self, *its, state, at);
    check_fence(*state, *its, *d, at);
    if (d->n_pending == 0) take_from_registers(d.get());
    d->n_pending++;
    d->at = at;
    its->accumulators[w] = d;
    its->group[w] = state->group;
    if (its->is_rs) take_fragments(self->warp, w, its);
    if (d->n_pending == 1 || d->is_shown) leave_in_registers(d.get(), false);
    its->issued |= 1u << w;
    state->n_issued++;
    const emu_time_kind time = block->grid->time.kind;
    if (its->issued == all_warps &&
        (time == EMU_EARLY || (time == EMU_RANDOM && block->random.below(2) == 0)))
        execute_until(group, group->first + static_cast<uint32_t>(group->operations.size()), true);
    if (its->issued == all_warps) // a warp may wait for the others' part
        for (int i = 0; i < block->n_thread; i++)
            if (block->threads[i].state == EMU_WAITING && block->threads[i].wait.object == group)
                emu_wake(&block->threads[i]);
}

void emu_wgmma(int n, bool trans_b, float *d, uint64_t a, const uint32_t *a_frag, uint64_t b,
               int scale_d, emu_place at) {
    emu_thread *self = emu_self();
    wgmma_arguments mine = {d, a_frag, a, b, scale_d};
    if (!emu_meet(self, "wgmma", emu_all_lanes, &mine, at)) return;
    if (self->warp->index / group_warps * group_warps + group_warps > self->block->n_warp)
        emu_fail(at, "wgmma in a warpgroup of less than four warps");
    issue(self, n, trans_b, at);
    emu_part(self, emu_all_lanes);
}

void ptx_wgmma_fence(emu_place at) {
    emu_thread *self = emu_self();
    if (!emu_meet(self, "wgmma.fence", emu_all_lanes, nullptr, at)) return;
    group_of(self)->warps[warp_of(self)].is_fenced = true;
    emu_part(self, emu_all_lanes);
}

void ptx_wgmma_commit(emu_place at) {
    emu_thread *self = emu_self();
    if (!emu_meet(self, "wgmma.commit_group", emu_all_lanes, nullptr, at)) return;
    group_of(self)->warps[warp_of(self)].group++;
    emu_part(self, emu_all_lanes);
}

/* Once for the whole group: the operands are free. */
static void finish(emu_block *block, operation *its, emu_place at) {
    std::vector<uint16_t> a, b;
    read_operands(block, *its, &a, &b, nullptr);
    if (b != its->b_value || (!its->is_rs && a != its->a_value))
        emu_fail(at, "shared memory was overwritten while %s still read it, before this wait",
                 emu_flight_text(block, its->flight).c_str());
    for (uint32_t chunk : its->chunks) emu_read_end(block, chunk, emu_granule_bytes);
    its->is_finished = true;
}

/* Read without AddressSanitizer: an array that has left its scope is a report of ours. */
__attribute__((no_sanitize("address"))) static bool are_fragments_untouched(const operation &its,
                                                                            int w) {
    for (int lane = 0; lane < emu_lanes; lane++)
        for (int i = 0; i < 4; i++)
            if (its.fragments[w][lane][i] != its.fragment_words[w][lane][i]) return false;
    return true;
}

/* For one warp: its registers are free. */
static void give_back(emu_thread *self, operation *its, int w, emu_place at) {
    accumulator *d = its->accumulators[w].get();
    if (its->is_rs && !are_fragments_untouched(*its, w))
        emu_fail(at,
                 "registers of operand a were touched while %s still read them, before this wait",
                 emu_flight_text(self->block, its->flight).c_str());
    for (int lane = 0; lane < emu_lanes; lane++)
        if (!is_untouched(*d, lane))
            emu_fail(at, "accumulators of %s were touched before this wait",
                     emu_flight_text(self->block, its->flight).c_str());
    its->waited |= 1u << w;
    if (--d->n_pending == 0) leave_in_registers(d, true);
}

void emu_wgmma_wait(int n, emu_place at) {
    const char *const what = "wgmma.wait_group";
    emu_thread *self = emu_self();
    emu_block *block = self->block;
    if (!emu_meet(self, what, emu_all_lanes, nullptr, at)) return;
    emu_wgmma_group *group = group_of(self);
    const int w = warp_of(self);
    warp_state *state = &group->warps[w];
    const auto is_due = [&](const operation &its) {
        return its.group[w] + static_cast<uint32_t>(n) < state->group;
    };
    const emu_time_kind time = block->grid->time.kind;
    if (time == EMU_LATE || (time == EMU_RANDOM && block->random.below(2) == 0))
        emu_wait_lazily(self, what, at);
    while (state->n_waited < state->n_issued) {
        operation *its = group->operations[state->n_waited - group->first].get();
        if (!is_due(*its)) break;
        while (its->issued != all_warps) emu_wait_for(self, {what, at, group, 0});
        execute_until(group, state->n_waited + 1, false);
        if (!its->is_finished) finish(block, its, at);
        give_back(self, its, w, at);
        state->n_waited++;
        state->is_fenced = false;
        while (!group->operations.empty() && group->operations[0]->waited == all_warps) {
            emu_flight_end(block, group->operations[0]->flight);
            group->operations.pop_front();
            group->first++;
        }
    }
    emu_part(self, emu_all_lanes);
}

bool emu_wgmma_reads(emu_block *block, uint32_t offset, int *flight) {
    for (const auto &group : block->wgmma)
        for (const auto &its : group->operations)
            for (uint32_t chunk : its->chunks)
                if (!its->is_finished && chunk == offset) {
                    *flight = its->flight;
                    return true;
                }
    return false;
}

void emu_wgmma_leave(emu_thread *self) {
    const emu_wgmma_group *group = group_of(self);
    const warp_state &state = group->warps[warp_of(self)];
    if (state.n_waited < state.n_issued)
        emu_fail(group->operations[state.n_waited - group->first]->at,
                 "thread leaves the kernel before it waited for its wgmma");
}

uint64_t ptx_wgmma_descriptor(const void *shared, uint32_t leading, uint32_t stride, emu_place at) {
    const uint64_t start = ptx_shared_address(shared, at);
    return (start & 0x3ffff) >> 4 | static_cast<uint64_t>((leading & 0x3ffff) >> 4) << 16 |
           static_cast<uint64_t>((stride & 0x3ffff) >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}
