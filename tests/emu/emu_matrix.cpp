/* ldmatrix, stmatrix and mma.sync: one lane does the warp's work (PTX ISA, "Warp Level Matrix
 * Instructions"). */
#include "emu_matrix.h"

#include "emu_async.h"
#include "emu_block.h"
#include "emu_ptx.h"

constexpr uint32_t row_bytes = 16; // eight bf16

struct row_arguments {
    const void *row;
    uint32_t *frag;
};

/* Word of lane `lane`: elements c and c+1 of row r, transposed rows c and c+1 of column r. */
static void element_of(int lane, bool trans, int half, int *row, int *col) {
    const int r = lane / 4, c = 2 * (lane % 4) + half;
    *row = trans ? c : r;
    *col = trans ? r : c;
}

static uint32_t row_offset(emu_warp *warp, int lane, const char *what, emu_place at) {
    return emu_shared_offset(static_cast<row_arguments *>(warp->lanes[lane]->arguments)->row,
                             row_bytes, row_bytes, what, at);
}

static void load(emu_block *block, emu_warp *warp, int n, bool trans, emu_place at) {
    uint16_t rows[4][8][8];
    for (int m = 0; m < n; m++)
        for (int i = 0; i < 8; i++) {
            const uint32_t offset = row_offset(warp, 8 * m + i, "ldmatrix", at);
            emu_check_read(block, offset, row_bytes, "ldmatrix", at);
            memcpy(rows[m][i], block->window + offset, row_bytes);
        }
    for (int lane = 0; lane < emu_lanes; lane++)
        for (int m = 0; m < n; m++) {
            uint32_t word = 0;
            for (int half = 0; half < 2; half++) {
                int row = 0, col = 0;
                element_of(lane, trans, half, &row, &col);
                word |= static_cast<uint32_t>(rows[m][row][col]) << 16 * half;
            }
            static_cast<row_arguments *>(warp->lanes[lane]->arguments)->frag[m] = word;
        }
}

void emu_ldmatrix(int n, bool trans, uint32_t *frag, const void *row, emu_place at) {
    emu_thread *self = emu_self();
    row_arguments mine = {row, frag};
    if (!emu_meet(self, "ldmatrix", emu_all_lanes, &mine, at)) return;
    load(self->block, self->warp, n, trans, at);
    emu_part(self, emu_all_lanes);
}

static void store(emu_block *block, emu_warp *warp, int n, bool trans, emu_place at) {
    for (int m = 0; m < n; m++)
        for (int i = 0; i < 8; i++) {
            const uint32_t offset = row_offset(warp, 8 * m + i, "stmatrix", at);
            emu_check_write(block, offset, row_bytes, "stmatrix", at);
            block->granules[offset / emu_granule_bytes].is_written = true;
        }
    for (int lane = 0; lane < emu_lanes; lane++)
        for (int m = 0; m < n; m++)
            for (int half = 0; half < 2; half++) {
                int row = 0, col = 0;
                element_of(lane, trans, half, &row, &col);
                const uint32_t word =
                    static_cast<row_arguments *>(warp->lanes[lane]->arguments)->frag[m];
                const uint16_t value = static_cast<uint16_t>(word >> 16 * half);
                const uint32_t offset = row_offset(warp, 8 * m + row, "stmatrix", at);
                memcpy(block->window + offset + 2 * col, &value, sizeof value);
            }
}

void emu_stmatrix(int n, bool trans, const uint32_t *frag, void *row, emu_place at) {
    emu_thread *self = emu_self();
    row_arguments mine = {row, const_cast<uint32_t *>(frag)}; // only read
    if (!emu_meet(self, "stmatrix", emu_all_lanes, &mine, at)) return;
    store(self->block, self->warp, n, trans, at);
    emu_part(self, emu_all_lanes);
}

struct mma_arguments {
    float *d;
    const uint32_t *a;
    uint32_t b[2];
};

static void multiply(emu_warp *warp) {
    float a[16][16];
    emu_float8 b[16], d[16];
    for (int lane = 0; lane < emu_lanes; lane++) {
        const auto &its = *static_cast<mma_arguments *>(warp->lanes[lane]->arguments);
        const int r = lane / 4, c = 2 * (lane % 4);
        for (int i = 0; i < 4;
             i++) // words: rows r, r+8 of the left eight columns, then of the right
            emu_bf16_pair(its.a[i], &a[r + 8 * (i % 2)][c + 8 * (i / 2)]);
        for (int i = 0; i < 2; i++) {
            float pair[2];
            emu_bf16_pair(its.b[i], pair);
            b[c + 8 * i][r] = pair[0];
            b[c + 8 * i + 1][r] = pair[1];
            memcpy(reinterpret_cast<float *>(&d[r + 8 * i]) + c, its.d + 2 * i, 2 * sizeof(float));
        }
    }
    emu_multiply(4, 1, a[0], b, d);
    for (int lane = 0; lane < emu_lanes; lane++) {
        const auto &its = *static_cast<mma_arguments *>(warp->lanes[lane]->arguments);
        for (int i = 0; i < 2; i++)
            memcpy(its.d + 2 * i, reinterpret_cast<float *>(&d[lane / 4 + 8 * i]) + 2 * (lane % 4),
                   2 * sizeof(float));
    }
}

void ptx_mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                      emu_place at) {
    emu_thread *self = emu_self();
    mma_arguments mine = {d, a, {b0, b1}};
    if (!emu_meet(self, "mma.sync", emu_all_lanes, &mine, at)) return;
    multiply(self->warp);
    emu_part(self, emu_all_lanes);
}
