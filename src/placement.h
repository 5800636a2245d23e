/* Which rank holds which chunk, which rank works on which row: pure arithmetic, the same answer on
 * every rank.
 *
 * Owns chunk offsets in the sequence, the chunk-to-rank map and the dealing of rows
 * (algorithm 1.2, 2.4, 4).  Placement changes time, never results.  Knows nothing of tokens, memory
 * or communicators. */
#ifndef IFKV_SRC_PLACEMENT_H
#define IFKV_SRC_PLACEMENT_H

#include "status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum ifkv_placement_kind {
    IFKV_PLACE_AUTO, /* zigzag, or longest first where that lowers the largest encode work of a rank
                        by more than 5 % */
    IFKV_PLACE_ZIGZAG,     /* slices r and 2P-1-r of 2P equal token slices: balances causal work */
    IFKV_PLACE_CONTIGUOUS, /* slice r of P */
    IFKV_PLACE_LONGEST,    /* longest chunk first, to the rank with the least encode work */
    IFKV_PLACE_FIRST,      /* everything on rank 0: exact prefill on one rank */
    IFKV_PLACE_SLICES,     /* exact prefill on all ranks: chunk i is slice i of P, on rank i ... */
    IFKV_PLACE_SLICES_ZIGZAG /* ... slice i of 2P, on rank i or 2P-1-i */
} ifkv_placement_kind;

typedef struct ifkv_placement {
    int size;              /* ranks */
    int64_t n_prefix;      /* p */
    int64_t n_chunk;       /* n, one more with a prefix chunk */
    bool has_prefix_chunk; /* chunk 0 is the prefix alone, document i chunk i + 1 */
    int64_t n_context;     /* T, prefix included */
    int64_t *offset; /* [n_chunk + 1] o_i: chunk i keeps indices [offset[i], offset[i+1]); owned */
    int *rank;       /* [n_chunk] owned */
    int n_tail_rank; /* ranks that share prompt and generated rows: size, or 1 under FIRST */
} ifkv_placement;

/* FLOP of encoding m rows as one causal chunk: per_row * m + per_pair * m * (m + 1) / 2. */
typedef struct ifkv_encode_cost {
    double per_row, per_pair;
} ifkv_encode_cost;

/* Place n_chunk chunks of chunk_offsets[i+1] - chunk_offsets[i] tokens behind n_prefix prefix
 * tokens.  cost is read for LONGEST only.  Allocates; release with ifkv_placement_fini.  Errors:
 * RESOURCE. */
ifkv_status ifkv_placement_init(ifkv_placement *placement, ifkv_placement_kind kind, int size,
                                int64_t n_prefix, int64_t n_chunk, const int64_t *chunk_offsets,
                                ifkv_encode_cost cost);
/* Cut n_context rows, a prefix being the first of them, into equal slices, whose lengths differ by
 * at most one, empty ones last, and place them as a kind of SLICES says.  The rows of two ranks,
 * too, differ by at most one.  Allocates; release with ifkv_placement_fini.  Errors: RESOURCE. */
ifkv_status ifkv_placement_init_slices(ifkv_placement *placement, ifkv_placement_kind kind,
                                       int size, int64_t n_context);
void ifkv_placement_fini(ifkv_placement *placement);
/* Make the prefix, if there is one, a chunk of its own, on the rank that had it: so documents can
 * change places and every rank still keeps as many rows.  Errors: RESOURCE. */
ifkv_status ifkv_placement_split_prefix(ifkv_placement *placement);
/* Put document order[i] in place i; each stays on its rank.  order [documents] is a permutation; a
 * prefix has been split off.  Errors: RESOURCE. */
ifkv_status ifkv_placement_reorder(ifkv_placement *placement, const int64_t *order);
/* Chunk number of document 0: 1 behind a prefix chunk. */
int64_t ifkv_placement_first_document(const ifkv_placement *placement);

/* Rows of chunk i that are encoded and dropped: its copy of the prefix, except in chunk 0, which
 * keeps it or is it. */
int64_t ifkv_placement_dropped(const ifkv_placement *placement, int64_t chunk);
/* Context rows a rank keeps, and rows it encodes. */
int64_t ifkv_placement_kept_rows(const ifkv_placement *placement, int rank);
int64_t ifkv_placement_encoded_rows(const ifkv_placement *placement, int rank);
int64_t ifkv_placement_chunks(const ifkv_placement *placement, int rank);
/* slot [chunks of the rank + 1]: where each of its chunks begins among its kept rows, and their
 * number. */
void ifkv_placement_slots(const ifkv_placement *placement, int rank, int64_t *slot);
/* The chunk that holds a context index. */
int64_t ifkv_placement_chunk_of(const ifkv_placement *placement, int64_t index);
/* The rank that stores the K/V of an index: its chunk's rank, or for prompt and generated rows
 * blocks of 256 in turn. */
int ifkv_placement_owner(const ifkv_placement *placement, int64_t index);

enum { IFKV_TAIL_BLOCK = 256 };
/* Rows of n_tail prompt and generated rows that a rank owns. */
int64_t ifkv_placement_tail_rows(const ifkv_placement *placement, int rank, int64_t n_tail);

/* Home of row i of k ascending rows dealt over size ranks: units of 64 rows (1 below 256 rows a
 * rank) back and forth, the rest row by row, so that counts differ by at most one and every rank
 * spans the whole sequence. */
int ifkv_deal_home(int64_t i, int64_t k, int size);
/* Rows a rank gets of k; of fewer rows never more. */
int64_t ifkv_deal_count(int64_t k, int size, int rank);

/* Cut n rows into blocks of at most max_rows, as even as possible: a function of n alone.  Returns
 * the number of blocks; block i starts at ifkv_even_begin(n, n_block, i). */
int64_t ifkv_even_blocks(int64_t n, int64_t max_rows);
int64_t ifkv_even_begin(int64_t n, int64_t n_block, int64_t i);

#ifdef __cplusplus
}
#endif
#endif
