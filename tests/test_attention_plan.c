/* How attention calls are cut into work: every piece once, long ones first, parts within their
 * workspace and never of a short span.  Plain arithmetic: no device, no back end. */
#include "test.h"

#include "attention_plan.h"
#include "gen.h"

static gen noise;

enum { SM = 132 };

static ifkv_attention_plan random_plan(int64_t *n_row, int64_t *n_key, int *d_head) {
    static const int groups[] = {1, 2, 3, 4, 5, 7, 8, 16, 61, 64};
    const int group = groups[gen_below(&noise, 10)];
    const int n_kv_head = 1 + (int)gen_below(&noise, 9),
              tile_m = 64 * (1 + (int)gen_below(&noise, 3));
    *n_row = gen_below(&noise, gen_below(&noise, 3) ? 300 : 40000);
    *n_key = gen_below(&noise, gen_below(&noise, 3) ? 200000 : 300);
    *d_head = 16 * (1 + (int)gen_below(&noise, 8));
    return ifkv_attention_plan_make(*n_row, *n_key, group * n_kv_head, n_kv_head, *d_head, tile_m,
                                    SM);
}

static void every_piece_is_made_once(void **state) {
    (void)state;
    for (int i = 0; i < 300; i++) {
        int64_t n_row, n_key;
        int d_head;
        const ifkv_attention_plan plan = random_plan(&n_row, &n_key, &d_head);
        assert_true(plan.n_tile * plan.tile_rows >= n_row);
        assert_true((plan.n_tile - 1) * plan.tile_rows < n_row);
        assert_true((int64_t)plan.n_part * plan.part_keys >= n_key);
        assert_int_equal(plan.n_item, plan.n_tile * plan.n_kv_head * plan.n_part);
        unsigned char *seen = calloc((size_t)plan.n_item + 1, 1);
        assert_non_null(seen);
        for (int64_t k = 0; k < plan.n_item; k++) {
            const ifkv_attention_item it = ifkv_attention_item_at(&plan, k);
            assert_true(it.tile >= 0 && it.tile < plan.n_tile);
            assert_true(it.kv_head >= 0 && it.kv_head < plan.n_kv_head);
            assert_true(it.part >= 0 && it.part < plan.n_part);
            unsigned char *one =
                &seen[(it.tile * plan.n_kv_head + it.kv_head) * plan.n_part + it.part];
            assert_int_equal(*one, 0);
            *one = 1;
        }
        free(seen);
    }
}

/* Within a section of heads tiles never ascend, and a section's keys and values fit the cache. */
static void long_tiles_come_first(void **state) {
    (void)state;
    for (int i = 0; i < 300; i++) {
        int64_t n_row, n_key;
        int d_head;
        const ifkv_attention_plan plan = random_plan(&n_row, &n_key, &d_head);
        assert_true(plan.section_heads >= 1 && plan.section_heads <= plan.n_kv_head);
        assert_true(plan.section_heads == 1 ||
                    4 * n_key * d_head * plan.section_heads <= (int64_t)32 << 20);
        for (int64_t k = 1; k < plan.n_item; k++) {
            const ifkv_attention_item a = ifkv_attention_item_at(&plan, k - 1),
                                      b = ifkv_attention_item_at(&plan, k);
            const int section_a = a.kv_head / plan.section_heads,
                      section_b = b.kv_head / plan.section_heads;
            assert_true(section_a <= section_b);
            if (section_a == section_b) assert_true(a.tile >= b.tile);
        }
    }
}

/* 8 K/V heads of width 128: 33.6 MB of keys and values at 8192 keys, 134 MB at 32768. */
static void sections_fit_the_cache_at_known_lengths(void **state) {
    (void)state;
    const int64_t n_key[] = {2048, 8191, 8192, 32768, 200000};
    const int heads[] = {8, 8, 8, 2, 1};
    for (int i = 0; i < 5; i++)
        assert_int_equal(
            ifkv_attention_plan_make(4096, n_key[i], 40, 8, 128, 128, SM).section_heads, heads[i]);
}

static void stacked_heads_fill_a_tile(void **state) {
    (void)state;
    const int tile_m[] = {128, 192}, group[] = {1, 3, 4, 5, 7, 8, 64},
              rows[][7] = {{128, 42, 32, 25, 18, 16, 2}, {192, 64, 48, 38, 27, 24, 3}};
    for (int m = 0; m < 2; m++)
        for (int i = 0; i < 7; i++) {
            const ifkv_attention_plan plan =
                ifkv_attention_plan_make(1000, 1000, group[i] * 2, 2, 64, tile_m[m], SM);
            assert_int_equal(plan.group, group[i]);
            assert_int_equal(plan.tile_rows, rows[m][i]);
        }
}

/* What is cut, by hand.  Qwen3-14B (40 heads, 8 K/V heads) on 132 multiprocessors: one row over
 * 32768 keys is 8 tiles, so 16 parts fit a wave, 8 parts of 4096 keys exist, 7 keep 85 % of them
 * busy.  21 row tiles of 25 rows are 168 pieces and fill the device.  120 rows are 80, 40 or
 * 32 pieces of tiles of 64, 128 or 192 stacked rows, of which 264, 132 or 132 run at once: three,
 * three or four parts each. */
static void few_tiles_over_many_keys_are_cut(void **state) {
    (void)state;
    const struct {
        int tile_m;
        int64_t n_row, n_key, part_keys;
        int n_part;
    } of[] = {
        {128, 1, 4096, 4096, 1},     {128, 1, 4097, 4096, 2},    {128, 1, 8192, 4096, 2},
        {128, 1, 32768, 4736, 7},    {128, 25, 32768, 4736, 7},  {128, 26, 32768, 4736, 7},
        {128, 75, 32768, 6656, 5},   {128, 0, 32768, 32768, 1},  {128, 1, 0, 1, 1},
        {128, 525, 32768, 32768, 1}, {128, 1, 131072, 9472, 14}, {64, 120, 32768, 11008, 3},
        {128, 120, 32768, 11008, 3}, {192, 120, 32768, 8192, 4}, {192, 525, 32768, 32768, 1},
    };
    for (size_t i = 0; i < sizeof of / sizeof *of; i++) {
        const ifkv_attention_plan plan =
            ifkv_attention_plan_make(of[i].n_row, of[i].n_key, 40, 8, 128, of[i].tile_m, SM);
        if (plan.n_part != of[i].n_part || plan.part_keys != of[i].part_keys)
            fail_msg("%lld rows over %lld keys, tiles of %d: got %d parts of %lld keys, want %d of "
                     "%lld",
                     (long long)of[i].n_row, (long long)of[i].n_key, of[i].tile_m, plan.n_part,
                     (long long)plan.part_keys, of[i].n_part, (long long)of[i].part_keys);
    }
}

static void short_spans_and_long_calls_are_never_cut(void **state) {
    (void)state;
    for (int i = 0; i < 3000; i++) {
        int64_t n_row, n_key;
        int d_head;
        const ifkv_attention_plan plan = random_plan(&n_row, &n_key, &d_head);
        if (plan.n_part > 1)
            assert_true(plan.part_keys >= IFKV_ATTENTION_MIN_PART &&
                        plan.part_keys % IFKV_ATTENTION_BLOCK_KEYS == 0 &&
                        n_row <= IFKV_ATTENTION_MIN_PART);
    }
}

static void parts_fit_their_workspace(void **state) {
    (void)state;
    int n_cut = 0;
    for (int i = 0; i < 3000; i++) {
        int64_t n_row, n_key;
        int d_head;
        const ifkv_attention_plan plan = random_plan(&n_row, &n_key, &d_head);
        if (plan.n_part == 1) continue;
        n_cut++;
        const int64_t heads = (int64_t)plan.group * plan.n_kv_head;
        assert_true((size_t)(plan.n_part * n_row * heads * (d_head + 1)) * sizeof(float) <=
                    ifkv_attention_part_bytes(d_head, SM));
    }
    assert_true(n_cut > 100);
}

int main(int argc, char **argv) {
    (void)argc;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_piece_is_made_once),
        cmocka_unit_test(long_tiles_come_first),
        cmocka_unit_test(sections_fit_the_cache_at_known_lengths),
        cmocka_unit_test(stacked_heads_fill_a_tile),
        cmocka_unit_test(few_tiles_over_many_keys_are_cut),
        cmocka_unit_test(short_spans_and_long_calls_are_never_cut),
        cmocka_unit_test(parts_fit_their_workspace),
    };
    noise = gen_create(argv[0]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
