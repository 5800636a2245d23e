/* Placement of chunks and dealing of rows: closed forms, and counts that must add up. */
#include "test.h"

#include "placement.h"

static const ifkv_encode_cost rows_only = {.per_row = 1, .per_pair = 0};

static ifkv_placement placed(ifkv_placement_kind kind, int size, int64_t n_prefix, int64_t n_chunk,
                             const int64_t *length, ifkv_encode_cost cost) {
    int64_t bounds[130] = {0};
    ifkv_placement placement;
    for (int64_t i = 0; i < n_chunk; i++) bounds[i + 1] = bounds[i] + length[i];
    assert_ok(ifkv_placement_init(&placement, kind, size, n_prefix, n_chunk, bounds, cost));
    return placement;
}

/* The same with all chunks of equal length. */
static ifkv_placement placed_equal(ifkv_placement_kind kind, int size, int64_t n_prefix,
                                   int64_t n_chunk, int64_t length) {
    int64_t lengths[129];
    for (int64_t i = 0; i < n_chunk; i++) lengths[i] = length;
    return placed(kind, size, n_prefix, n_chunk, lengths, rows_only);
}

static void offsets_put_the_prefix_in_chunk_0(void **state) {
    (void)state;
    ifkv_placement placement = placed(IFKV_PLACE_ZIGZAG, 3, 5, 3, (int64_t[]){7, 1, 10}, rows_only);
    const int64_t want[] = {0, 12, 13, 23};
    assert_memory_equal(placement.offset, want, sizeof want);
    assert_int_equal(placement.n_context, 23);
    assert_int_equal(placement.n_prefix, 5);
    assert_int_equal(placement.n_chunk, 3);
    assert_int_equal(ifkv_placement_dropped(&placement, 0), 0);
    assert_int_equal(ifkv_placement_dropped(&placement, 1), 5);
    assert_int_equal(ifkv_placement_dropped(&placement, 2), 5);
    ifkv_placement_fini(&placement);
    assert_null(placement.offset);
}

static void zigzag_pairs_slice_r_with_2p_minus_1_minus_r(void **state) {
    (void)state;
    for (int size = 1; size <= 8; size++)
        for (int per_slice = 1; per_slice <= 3; per_slice++) {
            const int64_t n_chunk = 2 * (int64_t)size * per_slice;
            ifkv_placement placement = placed_equal(IFKV_PLACE_ZIGZAG, size, 0, n_chunk, 2048);
            for (int64_t i = 0; i < n_chunk; i++) {
                const int slice = (int)(i / per_slice);
                assert_int_equal(placement.rank[i], slice < size ? slice : 2 * size - 1 - slice);
            }
            for (int r = 0; r < size; r++)
                assert_int_equal(ifkv_placement_kept_rows(&placement, r), 2 * 2048 * per_slice);
            ifkv_placement_fini(&placement);
        }
}

static void slots_are_the_shard_rows_of_a_rank_s_chunks(void **state) {
    (void)state;
    ifkv_placement placement = placed(IFKV_PLACE_ZIGZAG, 2, 5, 3, (int64_t[]){7, 1, 10}, rows_only);
    const int64_t first[] = {0, 10}, second[] = {0, 12, 13}; /* ranks 1, 1, 0 */
    int64_t slot[4] = {-1, -1, -1, -77};
    ifkv_placement_slots(&placement, 0, slot);
    assert_memory_equal(slot, first, sizeof first);
    ifkv_placement_slots(&placement, 1, slot);
    assert_memory_equal(slot, second, sizeof second);
    assert_int_equal(slot[3], -77);
    ifkv_placement_fini(&placement);
}

/* floor(2P (o + len/2) / T) by hand: P = 2, T = 23, middles 6, 12.5, 18 of slices of 5.75 */
static void zigzag_goes_by_the_middle_of_a_chunk(void **state) {
    (void)state;
    ifkv_placement placement = placed(IFKV_PLACE_ZIGZAG, 2, 5, 3, (int64_t[]){7, 1, 10}, rows_only);
    const int want[] = {1, 1, 0};
    assert_memory_equal(placement.rank, want, sizeof want);
    ifkv_placement_fini(&placement);
}

static void contiguous_keeps_order(void **state) {
    (void)state;
    for (int size = 1; size <= 8; size++) {
        ifkv_placement placement =
            placed_equal(IFKV_PLACE_CONTIGUOUS, size, 0, 3 * (int64_t)size, 17);
        for (int64_t i = 0; i < placement.n_chunk; i++) assert_int_equal(placement.rank[i], i / 3);
        ifkv_placement_fini(&placement);
    }
}

/* 7 -> 0, 5 -> 1, 4 -> 1 (5 < 7), 3 -> 0 (7 < 9), 2 -> 1 (9 < 10) */
static void longest_goes_to_the_least_loaded_rank(void **state) {
    (void)state;
    ifkv_placement placement =
        placed(IFKV_PLACE_LONGEST, 2, 0, 5, (int64_t[]){3, 4, 7, 2, 5}, rows_only);
    const int want[] = {0, 1, 0, 1, 1};
    assert_memory_equal(placement.rank, want, sizeof want);
    ifkv_placement_fini(&placement);
}

static void longest_breaks_ties_by_lower_rank_and_lower_chunk(void **state) {
    (void)state;
    ifkv_placement placement = placed_equal(IFKV_PLACE_LONGEST, 3, 0, 7, 10);
    const int want[] = {0, 1, 2, 0, 1, 2, 0};
    assert_memory_equal(placement.rank, want, sizeof want);
    ifkv_placement_fini(&placement);
}

/* Every chunk is encoded behind its copy of the prefix: 11, 12 and 11 rows, not 11, 3 and 2. */
static void longest_counts_the_prefix_of_every_chunk(void **state) {
    (void)state;
    ifkv_placement placement = placed(IFKV_PLACE_LONGEST, 2, 9, 3, (int64_t[]){2, 3, 2}, rows_only);
    const int want[] = {1, 0, 1}; /* chunk 1, then 0, then 2 where 11 < 12 */
    assert_memory_equal(placement.rank, want, sizeof want);
    ifkv_placement_fini(&placement);
}

/* One chunk of 10 rows costs 10 + 55 pairs, two of 6 together 12 + 42: pairs decide. */
static void longest_counts_pairs(void **state) {
    (void)state;
    const ifkv_encode_cost pairs = {.per_row = 1, .per_pair = 1};
    const int64_t length[] = {10, 6, 6, 6};
    ifkv_placement by_pairs = placed(IFKV_PLACE_LONGEST, 2, 0, 4, length, pairs);
    const int want[] = {0, 1, 1, 1};
    assert_memory_equal(by_pairs.rank, want, 3 * sizeof *want);
    assert_int_equal(by_pairs.rank[3], 1); /* 54 < 65 */
    ifkv_placement by_rows = placed(IFKV_PLACE_LONGEST, 2, 0, 4, length, rows_only);
    assert_int_equal(by_rows.rank[3], 0); /* 10 < 12 */
    ifkv_placement_fini(&by_rows);
    ifkv_placement_fini(&by_pairs);
}

static void first_puts_everything_on_rank_0(void **state) {
    (void)state;
    ifkv_placement placement = placed_equal(IFKV_PLACE_FIRST, 5, 2, 1, 40);
    assert_int_equal(placement.n_tail_rank, 1);
    assert_int_equal(ifkv_placement_kept_rows(&placement, 0), 42);
    for (int r = 1; r < 5; r++) {
        assert_int_equal(ifkv_placement_kept_rows(&placement, r), 0);
        assert_int_equal(ifkv_placement_tail_rows(&placement, r, 10000), 0);
    }
    for (int64_t index = 0; index < 10000; index += 37)
        assert_int_equal(ifkv_placement_owner(&placement, index), 0);
    assert_int_equal(ifkv_placement_tail_rows(&placement, 0, 10000), 10000);
    ifkv_placement_fini(&placement);
}

static void slices_are_even_and_cover_the_context(void **state) {
    (void)state;
    for (int size = 1; size <= 8; size++)
        for (int64_t n = 1; n < 200; n += n < 40 ? 1 : 17)
            for (int is_zigzag = 0; is_zigzag < 2; is_zigzag++) {
                const int n_slice = is_zigzag ? 2 * size : size;
                ifkv_placement placement;
                assert_ok(ifkv_placement_init_slices(
                    &placement, is_zigzag ? IFKV_PLACE_SLICES_ZIGZAG : IFKV_PLACE_SLICES, size, n));
                assert_int_equal(placement.n_context, n);
                assert_int_equal(placement.n_tail_rank, size);
                for (int i = 0; i < n_slice; i++) {
                    assert_in_range(placement.offset[i + 1] - placement.offset[i], n / n_slice,
                                    (n + n_slice - 1) / n_slice);
                    assert_int_equal(ifkv_placement_dropped(&placement, i), 0);
                    for (int64_t x = placement.offset[i]; x < placement.offset[i + 1]; x++)
                        assert_int_equal(ifkv_placement_owner(&placement, x),
                                         i < size ? i : 2 * size - 1 - i);
                }
                for (int r = 0; r < size; r++)
                    assert_in_range(ifkv_placement_kept_rows(&placement, r), n / size,
                                    (n + size - 1) / size);
                ifkv_placement_fini(&placement);
            }
}

static void counts_add_up_and_owners_hold_their_chunks(void **state) {
    (void)state;
    static const int64_t length[] = {17, 1, 40, 5, 33, 64, 9, 2, 2, 130, 1};
    static const ifkv_placement_kind kinds[] = {IFKV_PLACE_ZIGZAG, IFKV_PLACE_CONTIGUOUS,
                                                IFKV_PLACE_LONGEST};
    for (int kind = 0; kind < 3; kind++)
        for (int size = 1; size <= 13; size++) /* more ranks than chunks, too */
            for (int64_t prefix = 0; prefix <= 6; prefix += 3) {
                ifkv_placement placement = placed(kinds[kind], size, prefix, 11, length, rows_only);
                int64_t kept = 0, encoded = 0, chunks = 0;
                for (int r = 0; r < size; r++) {
                    kept += ifkv_placement_kept_rows(&placement, r);
                    encoded += ifkv_placement_encoded_rows(&placement, r);
                    chunks += ifkv_placement_chunks(&placement, r);
                }
                assert_int_equal(kept, placement.n_context);
                assert_int_equal(encoded, placement.n_context + 10 * prefix);
                assert_int_equal(chunks, 11);
                for (int64_t i = 0; i < 11; i++)
                    for (int64_t x = placement.offset[i]; x < placement.offset[i + 1]; x++) {
                        assert_int_equal(ifkv_placement_chunk_of(&placement, x), i);
                        assert_int_equal(ifkv_placement_owner(&placement, x), placement.rank[i]);
                    }
                ifkv_placement_fini(&placement);
            }
}

static void tail_rows_go_round_in_blocks_of_256(void **state) {
    (void)state;
    for (int size = 1; size <= 5; size++) {
        ifkv_placement placement = placed_equal(IFKV_PLACE_ZIGZAG, size, 1, 2, 50);
        int64_t count[5] = {0};
        for (int64_t n = 0; n < 3000; n++) {
            for (int r = 0; r < size; r++)
                assert_int_equal(ifkv_placement_tail_rows(&placement, r, n), count[r]);
            const int owner = ifkv_placement_owner(&placement, placement.n_context + n);
            assert_int_equal(owner, n / 256 % size);
            count[owner]++;
        }
        ifkv_placement_fini(&placement);
    }
}

static void dealt_counts_differ_by_at_most_one(void **state) {
    (void)state;
    for (int size = 1; size <= 8; size++)
        for (int64_t k = 0; k <= 2100; k += k < 40 ? 1 : 29) {
            int64_t count[8] = {0}, low = k, high = 0;
            for (int64_t i = 0; i < k; i++) {
                const int home = ifkv_deal_home(i, k, size);
                assert_in_range(home, 0, size - 1);
                count[home]++;
            }
            for (int r = 0; r < size; r++) {
                assert_int_equal(ifkv_deal_count(k, size, r), count[r]);
                low = count[r] < low ? count[r] : low;
                high = count[r] > high ? count[r] : high;
            }
            assert_true(high - low <= 1);
        }
}

/* Seats 0 .. P-1, P-1 .. 0, ... */
static int back_and_forth(int64_t turn, int size) {
    const int seat = (int)(turn % (2 * (int64_t)size));
    return seat < size ? seat : 2 * size - 1 - seat;
}

/* So what is planned for a bound holds what turns out to be less (reorder). */
static void a_share_of_fewer_rows_is_never_larger(void **state) {
    (void)state;
    for (int size = 1; size <= 8; size++)
        for (int r = 0; r < size; r++)
            for (int64_t k = 1, last = 0; k < 256 * size + 200; k++) {
                const int64_t n = ifkv_deal_count(k, size, r);
                assert_true(n >= last);
                last = n;
            }
}

static void few_rows_are_dealt_one_by_one_back_and_forth(void **state) {
    (void)state;
    for (int size = 1; size <= 8; size++)
        for (int64_t i = 0, k = 256 * (int64_t)size - 1; i < k; i++)
            assert_int_equal(ifkv_deal_home(i, k, size), back_and_forth(i, size));
}

static void many_rows_are_dealt_in_units_of_64(void **state) {
    (void)state;
    for (int size = 1; size <= 8; size++)
        for (int64_t extra = 0; extra < 64 * (int64_t)size; extra += 13) {
            const int64_t k = 256 * (int64_t)size + extra;
            for (int64_t i = 0; i < 256 * (int64_t)size; i++)
                assert_int_equal(ifkv_deal_home(i, k, size), back_and_forth(i / 64, size));
            /* less than a round is left: row by row, and still back and forth (4 rounds before) */
            for (int64_t i = 0; i < extra; i++)
                assert_int_equal(ifkv_deal_home(k - extra + i, k, size), back_and_forth(i, size));
        }
}

static void even_blocks_are_even_and_cover(void **state) {
    (void)state;
    static const int64_t max_rows[] = {1, 7, 64, 1024};
    assert_int_equal(ifkv_even_blocks(0, 1024), 0);
    for (size_t m = 0; m < sizeof max_rows / sizeof *max_rows; m++)
        for (int64_t n = 1; n < 5000; n += n < 70 ? 1 : 101) {
            const int64_t max = max_rows[m], blocks = ifkv_even_blocks(n, max);
            assert_int_equal(blocks, (n + max - 1) / max);
            assert_int_equal(ifkv_even_begin(n, blocks, 0), 0);
            assert_int_equal(ifkv_even_begin(n, blocks, blocks), n);
            for (int64_t i = 0; i < blocks; i++) {
                const int64_t rows =
                    ifkv_even_begin(n, blocks, i + 1) - ifkv_even_begin(n, blocks, i);
                assert_in_range(rows, n / blocks, (n + blocks - 1) / blocks);
                assert_true(rows <= max);
            }
        }
}

/* No rank's number of rows changes, whatever the order. */
static void reordered_documents_stay_on_their_ranks(void **state) {
    (void)state;
    static const int64_t length[] = {7, 2, 9, 4}, order[] = {2, 0, 3, 1};
    const int64_t offsets[] = {0, 7, 9, 18, 22};
    for (int64_t n_prefix = 0; n_prefix <= 3; n_prefix += 3)
        for (int size = 1; size <= 5; size++) {
            ifkv_placement was, now;
            assert_ok(ifkv_placement_init(&was, IFKV_PLACE_ZIGZAG, size, n_prefix, 4, offsets,
                                          (ifkv_encode_cost){0, 0}));
            assert_ok(ifkv_placement_init(&now, IFKV_PLACE_ZIGZAG, size, n_prefix, 4, offsets,
                                          (ifkv_encode_cost){0, 0}));
            assert_ok(ifkv_placement_split_prefix(&now));
            const int64_t first = ifkv_placement_first_document(&now);
            assert_int_equal(first, n_prefix > 0);
            assert_ok(ifkv_placement_reorder(&now, order));
            int64_t at = n_prefix;
            for (int i = 0; i < 4; at += length[order[i++]]) {
                assert_int_equal(now.offset[first + i], at);
                assert_int_equal(now.rank[first + i], was.rank[order[i]]);
            }
            assert_int_equal(now.offset[now.n_chunk], now.n_context);
            assert_int_equal(now.n_context, was.n_context);
            if (n_prefix) assert_int_equal(now.rank[0], was.rank[0]);
            for (int r = 0; r < size; r++)
                assert_int_equal(ifkv_placement_kept_rows(&now, r),
                                 ifkv_placement_kept_rows(&was, r));
            ifkv_placement_fini(&was);
            ifkv_placement_fini(&now);
        }
}

static void auto_leaves_zigzag_for_a_gain_above_5_percent_only(void **state) {
    (void)state;
    /* equal chunks: nothing to gain */
    ifkv_placement even = placed_equal(IFKV_PLACE_AUTO, 2, 0, 8, 10);
    ifkv_placement zigzag = placed_equal(IFKV_PLACE_ZIGZAG, 2, 0, 8, 10);
    assert_memory_equal(even.rank, zigzag.rank, 8 * sizeof *even.rank);
    /* slices of 25: the two chunks of 40 both fall to rank 1, 80 rows against 50 */
    const int64_t length[] = {10, 40, 40, 10};
    ifkv_placement split = placed(IFKV_PLACE_AUTO, 2, 0, 4, length, rows_only);
    ifkv_placement longest = placed(IFKV_PLACE_LONGEST, 2, 0, 4, length, rows_only);
    ifkv_placement uneven = placed(IFKV_PLACE_ZIGZAG, 2, 0, 4, length, rows_only);
    assert_memory_equal(split.rank, longest.rank, 4 * sizeof *split.rank);
    assert_memory_not_equal(split.rank, uneven.rank, 4 * sizeof *split.rank);
    ifkv_placement *all[] = {&even, &zigzag, &split, &longest, &uneven};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) ifkv_placement_fini(all[i]);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(offsets_put_the_prefix_in_chunk_0),
        cmocka_unit_test(zigzag_pairs_slice_r_with_2p_minus_1_minus_r),
        cmocka_unit_test(slots_are_the_shard_rows_of_a_rank_s_chunks),
        cmocka_unit_test(zigzag_goes_by_the_middle_of_a_chunk),
        cmocka_unit_test(reordered_documents_stay_on_their_ranks),
        cmocka_unit_test(auto_leaves_zigzag_for_a_gain_above_5_percent_only),
        cmocka_unit_test(contiguous_keeps_order),
        cmocka_unit_test(longest_goes_to_the_least_loaded_rank),
        cmocka_unit_test(longest_breaks_ties_by_lower_rank_and_lower_chunk),
        cmocka_unit_test(longest_counts_the_prefix_of_every_chunk),
        cmocka_unit_test(longest_counts_pairs),
        cmocka_unit_test(first_puts_everything_on_rank_0),
        cmocka_unit_test(slices_are_even_and_cover_the_context),
        cmocka_unit_test(counts_add_up_and_owners_hold_their_chunks),
        cmocka_unit_test(tail_rows_go_round_in_blocks_of_256),
        cmocka_unit_test(dealt_counts_differ_by_at_most_one),
        cmocka_unit_test(a_share_of_fewer_rows_is_never_larger),
        cmocka_unit_test(few_rows_are_dealt_one_by_one_back_and_forth),
        cmocka_unit_test(many_rows_are_dealt_in_units_of_64),
        cmocka_unit_test(even_blocks_are_even_and_cover),
    };
    return cmocka_run_group_tests_name("placement", tests, NULL, NULL);
}
