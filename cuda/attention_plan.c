/* Shapes to work.  See attention_plan.h. */
#include "attention_plan.h"

/* K and V of a section take at most this much of an L2 cache of 40 to 50 MB; the rest is for
 * queries, results and what runs beside. */
static const int64_t SECTION_BYTES = 32 << 20;

static int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

static int section_heads(int64_t n_key, int n_kv_head, int d_head) {
    const int64_t head_bytes = 2 * 2 * n_key * d_head; /* K and V, bfloat16 */
    const int64_t fit = head_bytes ? SECTION_BYTES / head_bytes : n_kv_head;
    return fit < 1 ? 1 : fit < n_kv_head ? (int)fit : n_kv_head;
}

void ifkv_attention_plan_cut(ifkv_attention_plan *plan, int64_t n_key, int64_t part_keys) {
    plan->part_keys = part_keys;
    plan->n_part = n_key > part_keys ? (int)ceil_div(n_key, part_keys) : 1;
    plan->n_item = plan->n_tile * plan->n_kv_head * plan->n_part;
}

ifkv_attention_plan ifkv_attention_plan_make(int64_t n_row, int64_t n_key, int n_head,
                                             int n_kv_head, int d_head, int tile_m, int n_sm) {
    ifkv_attention_plan plan;
    plan.group = n_head / n_kv_head;
    plan.tile_rows = tile_m / plan.group;
    plan.n_kv_head = n_kv_head;
    plan.section_heads = section_heads(n_key, n_kv_head, d_head);
    plan.n_tile = ceil_div(n_row, plan.tile_rows);
    ifkv_attention_plan_cut(&plan, n_key, n_key > 1 ? n_key : 1);

    /* Small tiles share a multiprocessor.  Four fifths of a wave is full enough: merging parts
     * costs a launch.  Of the parts that fit into one wave the fewest are taken that keep 85 % of
     * the device busy compared with the most. */
    const int64_t n_slot = (int64_t)n_sm * (tile_m > IFKV_ATTENTION_SMALL_M ? 1 : 2);
    const int64_t n_uncut = plan.n_item;
    if (n_uncut == 0 || 5 * n_uncut >= 4 * n_slot || n_row > IFKV_ATTENTION_MIN_PART) return plan;
    int64_t most = ceil_div(n_key, IFKV_ATTENTION_MIN_PART);
    if (most > n_slot / n_uncut) most = n_slot / n_uncut;
    if (most > IFKV_ATTENTION_MAX_PARTS) most = IFKV_ATTENTION_MAX_PARTS;
    const int64_t n_part = ceil_div(85 * most, 100);
    if (n_part < 2) return plan;
    const int64_t even = ceil_div(ceil_div(n_key, n_part), IFKV_ATTENTION_BLOCK_KEYS);
    const int64_t keys = even * IFKV_ATTENTION_BLOCK_KEYS;
    ifkv_attention_plan_cut(&plan, n_key,
                            keys > IFKV_ATTENTION_MIN_PART ? keys : IFKV_ATTENTION_MIN_PART);
    return plan;
}

/* What a multiprocessor holds at once is written in parts: one tile or two small ones. */
_Static_assert(2 * IFKV_ATTENTION_SMALL_M <= IFKV_ATTENTION_MAX_M, "two are no more than one");

size_t ifkv_attention_part_bytes(int d_head, int n_sm) {
    return (size_t)n_sm * IFKV_ATTENTION_MAX_M * ((size_t)d_head + 1) * sizeof(float);
}
