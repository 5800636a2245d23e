/* Rotary positions while scoring.  See geometry.h. */
#include "geometry.h"

#include <string.h>

static const struct {
    const char *name, *hp;
} names[] = {[IFKV_GEOMETRY_GLOBAL] = {"global", ""},
             [IFKV_GEOMETRY_HL_TP] = {"hl-tp", ""},
             [IFKV_GEOMETRY_HL_HP] = {"hl-hp", "shared"},
             [IFKV_GEOMETRY_HL_HP_PER_CHUNK] = {"hl-hp", "per_chunk"},
             [IFKV_GEOMETRY_TL_TP] = {"tl-tp", ""}};

ifkv_status ifkv_geometry_parse(const char *name, const char *hp, ifkv_geometry *geometry_p) {
    enum { N_NAME = sizeof names / sizeof *names };
    char shown[IFKV_QUOTE_BYTES];
    size_t i = 0;
    if (!name) name = "global";
    while (i < N_NAME && strcmp(names[i].name, name)) i++; /* the first of hl-hp is its default */
    IFKV_REQUIRE(i < N_NAME, IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "geometry: got \"%s\", expected global, hl-tp, hl-hp or tl-tp",
                 ifkv_quote(name, strlen(name), shown));
    IFKV_REQUIRE(!hp || !strcmp(hp, "shared") || !strcmp(hp, "per_chunk"), IFKV_ERR_USAGE,
                 IFKV_E_VALUE, "hp: got \"%s\", expected shared or per_chunk",
                 ifkv_quote(hp, strlen(hp), shown));
    const bool is_per_chunk = hp && !strcmp(hp, "per_chunk");
    IFKV_REQUIRE(!is_per_chunk || i == IFKV_GEOMETRY_HL_HP, IFKV_ERR_USAGE, IFKV_E_CONFLICT,
                 "hp: per_chunk goes with geometry hl-hp, got %s", name);
    *geometry_p = is_per_chunk ? IFKV_GEOMETRY_HL_HP_PER_CHUNK : (ifkv_geometry)i;
    return IFKV_OK;
}

const char *ifkv_geometry_name(ifkv_geometry geometry) {
    return names[geometry].name;
}

const char *ifkv_geometry_hp_name(ifkv_geometry geometry) {
    return names[geometry].hp;
}

/* Where the rows of a chunk begin that are not the prefix, and how many they are. */
static int64_t chunk_begin(const ifkv_placement *placement, int64_t chunk) {
    return chunk == 0 ? placement->n_prefix : placement->offset[chunk];
}

static int64_t chunk_rows(const ifkv_placement *placement, int64_t chunk) {
    return placement->offset[chunk + 1] - chunk_begin(placement, chunk);
}

static int64_t longest_chunk(const ifkv_placement *placement) {
    int64_t longest = 0;
    for (int64_t i = 0; i < placement->n_chunk; i++) {
        const int64_t n = chunk_rows(placement, i);
        longest = n > longest ? n : longest;
    }
    return longest;
}

int64_t ifkv_geometry_question(ifkv_geometry geometry, const ifkv_placement *placement) {
    const bool is_head =
        geometry == IFKV_GEOMETRY_HL_HP || geometry == IFKV_GEOMETRY_HL_HP_PER_CHUNK;
    return is_head ? placement->n_prefix + longest_chunk(placement) : placement->n_context;
}

int64_t ifkv_geometry_shift(ifkv_geometry geometry, const ifkv_placement *placement, int64_t chunk,
                            int64_t index) {
    const int64_t to_head = placement->n_prefix - chunk_begin(placement, chunk);
    switch (geometry) {
    case IFKV_GEOMETRY_HL_TP:
    case IFKV_GEOMETRY_HL_HP: return to_head;
    case IFKV_GEOMETRY_HL_HP_PER_CHUNK: /* the prefix is part of chunk 0 */
        return to_head + longest_chunk(placement) - chunk_rows(placement, chunk);
    case IFKV_GEOMETRY_TL_TP:
        return index < placement->n_prefix ? 0
                                           : placement->n_context - placement->offset[chunk + 1];
    case IFKV_GEOMETRY_GLOBAL: break;
    }
    return 0;
}
