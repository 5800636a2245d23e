/* Placement of chunks and dealing of rows.  See placement.h. */
#include "placement.h"

#include <stdlib.h>
#include <string.h>

int64_t ifkv_even_blocks(int64_t n, int64_t max_rows) {
    return (n + max_rows - 1) / max_rows;
}

int64_t ifkv_even_begin(int64_t n, int64_t n_block, int64_t i) {
    const int64_t small = n / n_block, n_large = n % n_block;
    return i * small + (i < n_large ? i : n_large);
}

/* Slice of n_slice equal token slices in which a chunk's middle lies, in integers: floor(n_slice *
 * (o + len/2) / T). */
static int64_t slice_of(const ifkv_placement *placement, int64_t chunk, int64_t n_slice) {
    const int64_t twice_middle = placement->offset[chunk] + placement->offset[chunk + 1];
    return n_slice * twice_middle / (2 * placement->n_context);
}

static void place_zigzag(ifkv_placement *placement) {
    const int size = placement->size;
    for (int64_t i = 0; i < placement->n_chunk; i++) {
        const int slice = (int)slice_of(placement, i, 2 * (int64_t)size);
        placement->rank[i] = slice < size ? slice : 2 * size - 1 - slice;
    }
}

static void place_contiguous(ifkv_placement *placement) {
    for (int64_t i = 0; i < placement->n_chunk; i++)
        placement->rank[i] = (int)slice_of(placement, i, placement->size);
}

static int64_t encoded_rows(const ifkv_placement *placement, int64_t chunk) {
    return placement->offset[chunk + 1] - placement->offset[chunk] +
           ifkv_placement_dropped(placement, chunk);
}

static double encode_cost(ifkv_encode_cost cost, int64_t rows) {
    const double m = (double)rows;
    return cost.per_row * m + cost.per_pair * m * (m + 1) / 2;
}

static void place_slices(ifkv_placement *placement) {
    const int size = placement->size;
    for (int slice = 0; slice < (int)placement->n_chunk; slice++)
        placement->rank[slice] = slice < size ? slice : 2 * size - 1 - slice;
}

typedef struct sized_chunk {
    int64_t rows, chunk;
} sized_chunk;

static int longest_first(const void *a, const void *b) {
    const sized_chunk *x = a, *y = b;
    if (x->rows != y->rows) return x->rows < y->rows ? 1 : -1;
    return x->chunk < y->chunk ? -1 : 1;
}

static ifkv_status place_longest(ifkv_placement *placement, ifkv_encode_cost cost) {
    const int64_t n = placement->n_chunk;
    sized_chunk *order = malloc((size_t)n * sizeof *order);
    double *load = calloc((size_t)placement->size, sizeof *load);
    if (!order || !load) {
        free(order);
        free(load);
        return IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "placement: out of host memory");
    }
    for (int64_t i = 0; i < n; i++) {
        order[i].rows = encoded_rows(placement, i);
        order[i].chunk = i;
    }
    qsort(order, (size_t)n, sizeof *order, longest_first);
    for (int64_t i = 0; i < n; i++) {
        int best = 0;
        for (int r = 1; r < placement->size; r++)
            if (load[r] < load[best]) best = r;
        load[best] += encode_cost(cost, order[i].rows);
        placement->rank[order[i].chunk] = best;
    }
    free(order);
    free(load);
    return IFKV_OK;
}

/* Largest encode work of a rank; load [size] is scratch. */
static double largest_load(const ifkv_placement *placement, ifkv_encode_cost cost, double *load) {
    double most = 0;
    for (int r = 0; r < placement->size; r++) load[r] = 0;
    for (int64_t i = 0; i < placement->n_chunk; i++) {
        double *of = &load[placement->rank[i]];
        *of += encode_cost(cost, encoded_rows(placement, i));
        most = *of > most ? *of : most;
    }
    return most;
}

static ifkv_status place_auto(ifkv_placement *placement, ifkv_encode_cost cost) {
    const size_t bytes = (size_t)placement->n_chunk * sizeof *placement->rank;
    double *load = malloc((size_t)placement->size * sizeof *load);
    int *zigzag = malloc(bytes);
    ifkv_status status;
    if (!load || !zigzag) {
        status = IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "placement: out of host memory");
        goto out;
    }
    place_zigzag(placement);
    const double balanced = largest_load(placement, cost, load);
    memcpy(zigzag, placement->rank, bytes);
    IFKV_TRY_GOTO(status, place_longest(placement, cost), out);
    /* zigzag also balances what comes after encode, so it gives way to a clear gain only */
    if (largest_load(placement, cost, load) >= 0.95 * balanced)
        memcpy(placement->rank, zigzag, bytes);
out:
    free(load);
    free(zigzag);
    return status;
}

ifkv_status ifkv_placement_init(ifkv_placement *placement, ifkv_placement_kind kind, int size,
                                int64_t n_prefix, int64_t n_chunk, const int64_t *chunk_offsets,
                                ifkv_encode_cost cost) {
    memset(placement, 0, sizeof *placement);
    placement->size = size;
    placement->n_prefix = n_prefix;
    placement->n_chunk = n_chunk;
    placement->n_tail_rank = kind == IFKV_PLACE_FIRST ? 1 : size;
    placement->offset = malloc(((size_t)n_chunk + 1) * sizeof *placement->offset);
    placement->rank = calloc((size_t)n_chunk, sizeof *placement->rank);
    if (!placement->offset || !placement->rank) {
        ifkv_placement_fini(placement);
        return IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "placement: out of host memory");
    }
    placement->offset[0] = 0;
    for (int64_t i = 1; i <= n_chunk; i++) placement->offset[i] = n_prefix + chunk_offsets[i];
    placement->n_context = placement->offset[n_chunk];

    ifkv_status status = IFKV_OK;
    if (kind == IFKV_PLACE_AUTO) status = place_auto(placement, cost);
    if (kind == IFKV_PLACE_ZIGZAG) place_zigzag(placement);
    if (kind == IFKV_PLACE_CONTIGUOUS) place_contiguous(placement);
    if (kind == IFKV_PLACE_LONGEST) status = place_longest(placement, cost);
    if (kind == IFKV_PLACE_SLICES || kind == IFKV_PLACE_SLICES_ZIGZAG) place_slices(placement);
    if (status != IFKV_OK) ifkv_placement_fini(placement);
    return status;
}

ifkv_status ifkv_placement_init_slices(ifkv_placement *placement, ifkv_placement_kind kind,
                                       int size, int64_t n_context) {
    const int64_t n_slice = (kind == IFKV_PLACE_SLICES_ZIGZAG ? 2 : 1) * (int64_t)size;
    int64_t *offset = malloc(((size_t)n_slice + 1) * sizeof *offset);
    IFKV_REQUIRE(offset, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "placement: out of host memory");
    for (int64_t i = 0; i <= n_slice; i++) offset[i] = ifkv_even_begin(n_context, n_slice, i);
    const ifkv_status status =
        ifkv_placement_init(placement, kind, size, 0, n_slice, offset, (ifkv_encode_cost){0, 0});
    free(offset);
    return status;
}

void ifkv_placement_fini(ifkv_placement *placement) {
    free(placement->offset);
    free(placement->rank);
    memset(placement, 0, sizeof *placement);
}

ifkv_status ifkv_placement_split_prefix(ifkv_placement *placement) {
    const size_t n = (size_t)placement->n_chunk + 1;
    if (placement->n_prefix == 0) return IFKV_OK;
    int64_t *offset = malloc((n + 1) * sizeof *offset);
    int *rank = malloc(n * sizeof *rank);
    if (!offset || !rank) {
        free(offset);
        free(rank);
        return IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "placement: out of host memory");
    }
    memcpy(offset + 1, placement->offset, n * sizeof *offset);
    memcpy(rank + 1, placement->rank, (n - 1) * sizeof *rank);
    offset[0] = 0;
    offset[1] = placement->n_prefix;
    rank[0] = rank[1];
    free(placement->offset);
    free(placement->rank);
    placement->offset = offset;
    placement->rank = rank;
    placement->n_chunk++;
    placement->has_prefix_chunk = true;
    return IFKV_OK;
}

ifkv_status ifkv_placement_reorder(ifkv_placement *placement, const int64_t *order) {
    const int64_t first = ifkv_placement_first_document(placement), n = placement->n_chunk - first;
    int64_t *offset = malloc(((size_t)n + 1) * sizeof *offset);
    int *rank = malloc((size_t)n * sizeof *rank);
    ifkv_status status = IFKV_OK;
    if (!offset || !rank) {
        status = IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "placement: out of host memory");
        goto out;
    }
    offset[0] = placement->offset[first];
    for (int64_t i = 0; i < n; i++) {
        const int64_t from = first + order[i];
        offset[i + 1] = offset[i] + placement->offset[from + 1] - placement->offset[from];
        rank[i] = placement->rank[from];
    }
    memcpy(placement->offset + first, offset, ((size_t)n + 1) * sizeof *offset);
    memcpy(placement->rank + first, rank, (size_t)n * sizeof *rank);
out:
    free(offset);
    free(rank);
    return status;
}

int64_t ifkv_placement_first_document(const ifkv_placement *placement) {
    return placement->has_prefix_chunk ? 1 : 0;
}

int64_t ifkv_placement_dropped(const ifkv_placement *placement, int64_t chunk) {
    return chunk == 0 ? 0 : placement->n_prefix;
}

int64_t ifkv_placement_kept_rows(const ifkv_placement *placement, int rank) {
    int64_t n = 0;
    for (int64_t i = 0; i < placement->n_chunk; i++)
        if (placement->rank[i] == rank) n += placement->offset[i + 1] - placement->offset[i];
    return n;
}

int64_t ifkv_placement_chunks(const ifkv_placement *placement, int rank) {
    int64_t n = 0;
    for (int64_t i = 0; i < placement->n_chunk; i++) n += placement->rank[i] == rank;
    return n;
}

int64_t ifkv_placement_encoded_rows(const ifkv_placement *placement, int rank) {
    int64_t n = ifkv_placement_kept_rows(placement, rank);
    for (int64_t i = 0; i < placement->n_chunk; i++)
        if (placement->rank[i] == rank) n += ifkv_placement_dropped(placement, i);
    return n;
}

void ifkv_placement_slots(const ifkv_placement *placement, int rank, int64_t *slot) {
    *slot = 0;
    for (int64_t i = 0; i < placement->n_chunk; i++) {
        if (placement->rank[i] != rank) continue;
        slot[1] = slot[0] + placement->offset[i + 1] - placement->offset[i];
        slot++;
    }
}

int64_t ifkv_placement_chunk_of(const ifkv_placement *placement, int64_t index) {
    int64_t low = 0, high = placement->n_chunk - 1;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (index < placement->offset[middle + 1])
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

int ifkv_placement_owner(const ifkv_placement *placement, int64_t index) {
    if (index < placement->n_context)
        return placement->rank[ifkv_placement_chunk_of(placement, index)];
    return (int)((index - placement->n_context) / IFKV_TAIL_BLOCK % placement->n_tail_rank);
}

int64_t ifkv_placement_tail_rows(const ifkv_placement *placement, int rank, int64_t n_tail) {
    if (rank >= placement->n_tail_rank) return 0;
    const int64_t round = (int64_t)IFKV_TAIL_BLOCK * placement->n_tail_rank;
    int64_t rest = n_tail % round - (int64_t)IFKV_TAIL_BLOCK * rank;
    rest = rest < 0 ? 0 : rest > IFKV_TAIL_BLOCK ? IFKV_TAIL_BLOCK : rest;
    return n_tail / round * IFKV_TAIL_BLOCK + rest;
}

int ifkv_deal_home(int64_t i, int64_t k, int size) {
    if (k <= 0) return 0;
    const int64_t unit = k >= 256 * (int64_t)size ? 64 : 1;
    const int64_t n_round = k / (unit * size), dealt = n_round * unit * size;
    int64_t round, seat;
    if (i < dealt) {
        round = i / (unit * size);
        seat = i / unit % size;
    } else {
        round = n_round + (i - dealt) / size;
        seat = (i - dealt) % size;
    }
    return (int)(round % 2 == 0 ? seat : size - 1 - seat);
}

int64_t ifkv_deal_count(int64_t k, int size, int rank) {
    int64_t n = 0;
    for (int64_t i = 0; i < k; i++) n += ifkv_deal_home(i, k, size) == rank;
    return n;
}
