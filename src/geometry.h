/* Where rows stand while the question scores them: rotary positions of context and scoring rows.
 *
 * Owns the names of the geometries and their arithmetic (algorithm 1.4); visibility is by index and
 * none of its business.  Pure functions of the placement: the same answer on every rank. */
#ifndef IFKV_SRC_GEOMETRY_H
#define IFKV_SRC_GEOMETRY_H

#include "placement.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Head-local: every chunk stands right behind the prefix.  Tail-local: every chunk ends where the
 * context ends.  The question stands behind the context (tail), or behind a chunk (head). */
typedef enum ifkv_geometry {
    IFKV_GEOMETRY_GLOBAL,          /* at the index */
    IFKV_GEOMETRY_HL_TP,           /* head-local, question at the tail */
    IFKV_GEOMETRY_HL_HP,           /* head-local, question behind the longest chunk */
    IFKV_GEOMETRY_HL_HP_PER_CHUNK, /* head-local, question right behind each chunk */
    IFKV_GEOMETRY_TL_TP            /* tail-local, question at the tail; the prefix stays */
} ifkv_geometry;

/* Read --geometry and --hp; NULL is the default.  Errors: USAGE; hp is refused where it means
 * nothing. */
ifkv_status ifkv_geometry_parse(const char *name, const char *hp, ifkv_geometry *geometry_p);
/* "global", "hl-tp", "hl-hp", "tl-tp"; and "shared", "per_chunk" or "". */
const char *ifkv_geometry_name(ifkv_geometry geometry);
const char *ifkv_geometry_hp_name(ifkv_geometry geometry);

/* Position of scoring row 0; row q stands q further. */
int64_t ifkv_geometry_question(ifkv_geometry geometry, const ifkv_placement *placement);
/* Position minus index of a context row.  Only distances matter, so where the question would stand
 * behind each chunk in turn, it is the chunks that move, each to end before the one question. */
int64_t ifkv_geometry_shift(ifkv_geometry geometry, const ifkv_placement *placement, int64_t chunk,
                            int64_t index);

#ifdef __cplusplus
}
#endif
#endif
