/* How one attention call is cut into pieces of work, before anything is known about its spans.
 *
 * Pure arithmetic on shapes: spans lie in device memory and are never read on the host.  A tile is
 * `tile_rows` consecutive rows of the call times one K/V head; the query heads of that K/V head are
 * stacked as rows of the matrix product, so that each key read serves all of them and few rows
 * still fill a tile (row r, head g of the group -> r * group + g).  What only the spans can tell,
 * the kernel finds out when it starts a tile: rows of different begins are worked on one begin
 * after the other (runs), key blocks start exactly at that begin and end with the last key any row
 * of the run sees.  So the bits of a row depend on its own query, keys and span alone, and a row
 * among selected ones has the bits it has in the whole sequence.
 *
 * Where tiles are too few to fill the device, spans are cut into parts merged afterwards.  That
 * would change bits with what else is in the call; therefore no part is shorter than
 * IFKV_ATTENTION_MIN_PART keys and no call of more rows is cut.  Rows that see at most that many
 * keys (a chunk, and questions to one) keep their bits in any company. */
#ifndef IFKV_CUDA_ATTENTION_PLAN_H
#define IFKV_CUDA_ATTENTION_PLAN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifdef __CUDACC__
#define IFKV_ATTENTION_BOTH __host__ __device__
#else
#define IFKV_ATTENTION_BOTH
#endif

enum {
    IFKV_ATTENTION_MIN_PART = 4096, /* keys */
    IFKV_ATTENTION_MAX_PARTS = 64,
    IFKV_ATTENTION_BLOCK_KEYS = 128, /* keys of a block, a multiple of every kernel's */
    IFKV_ATTENTION_SMALL_M = 64,     /* tiles of so many stacked rows go two a multiprocessor */
    IFKV_ATTENTION_MAX_M = 192       /* stacked rows of the largest tile of any kernel */
};

typedef struct ifkv_attention_plan {
    int group;         /* query heads of one K/V head */
    int tile_rows;     /* tile_rows * group <= stacked rows of the kernel's tile */
    int n_kv_head;     /* of the call */
    int section_heads; /* K/V heads worked on at a time, so that their keys stay in the L2 cache */
    int n_part;        /* parts of every span; 1: not cut */
    int64_t part_keys; /* keys of a part, counted from the row's begin; the last may be shorter */
    int64_t n_tile;    /* row tiles */
    int64_t n_item;    /* n_tile * n_kv_head * n_part */
} ifkv_attention_plan;

/* What a piece of work is; pieces are started in ascending order. */
typedef struct ifkv_attention_item {
    int64_t tile;
    int kv_head, part;
} ifkv_attention_item;

/* Plan a call of n_row >= 0 rows over n_key keys on a device with n_sm multiprocessors, for tiles
 * of tile_m stacked rows; group = n_head / n_kv_head <= tile_m. */
ifkv_attention_plan ifkv_attention_plan_make(int64_t n_row, int64_t n_key, int n_head,
                                             int n_kv_head, int d_head, int tile_m, int n_sm);

/* Cut every span into parts of part_keys keys. */
void ifkv_attention_plan_cut(ifkv_attention_plan *plan, int64_t n_key, int64_t part_keys);

/* Most bytes that partial results of any call take: per part, row and head d_head + 1 float32. */
size_t ifkv_attention_part_bytes(int d_head, int n_sm);

/* Sections of heads outermost, then tiles from the last to the first: where spans grow along the
 * rows the long ones come first and short ones fill the end.  The heads of a section are adjacent.
 */
static inline IFKV_ATTENTION_BOTH ifkv_attention_item
ifkv_attention_item_at(const ifkv_attention_plan *plan, int64_t i) {
    const int64_t section_items = plan->n_tile * plan->section_heads * plan->n_part;
    const int first_head = (int)(i / section_items) * plan->section_heads;
    const int left = plan->n_kv_head - first_head;
    const int n_head = left < plan->section_heads ? left : plan->section_heads;
    const int64_t in_section = i % section_items, pair = in_section / plan->n_part;
    ifkv_attention_item item;
    item.part = (int)(in_section % plan->n_part);
    item.kv_head = first_head + (int)(pair % n_head);
    item.tile = plan->n_tile - 1 - pair / n_head;
    return item;
}

#ifdef __cplusplus
}
#endif
#endif
