/* Budgets, ratios, score layers by their closed forms; the selectors that need no model. */
#include "test.h"

#include "error_codes.h"
#include "select.h"

static void assert_ratio(const char *text, int64_t want_num, int64_t want_den) {
    int64_t num = -1, den = -1;
    assert_ok(ifkv_ratio_parse(text, &num, &den));
    assert_int_equal(num, want_num);
    assert_int_equal(den, want_den);
}

static int64_t budget_of(const char *ratio, int64_t n_context, int64_t n_eligible) {
    int64_t num, den;
    assert_ok(ifkv_ratio_parse(ratio, &num, &den));
    return ifkv_select_by_ratio(num, den, n_context, n_eligible);
}

static void ratio_is_an_exact_decimal(void **state) {
    (void)state;
    assert_ratio("0", 0, 1);
    assert_ratio("1", 1, 1);
    assert_ratio("0.0", 0, 10);
    assert_ratio("1.000", 1000, 1000);
    assert_ratio("0.15", 15, 100);
    assert_ratio("00.5", 5, 10);
    assert_ratio("0.123456789012345", 123456789012345, 1000000000000000);
}

static void ratio_refuses_everything_else(void **state) {
    (void)state;
    static const char *const bad[] = {"",
                                      " 0.1",
                                      "0.1 ",
                                      "-0.1",
                                      "+0.1",
                                      ".5",
                                      "1.",
                                      "0.",
                                      "1e-1",
                                      "0,15",
                                      "nan",
                                      "inf",
                                      "15%",
                                      "1.001",
                                      "2",
                                      "0x1",
                                      "10",
                                      "99999999999999999999",
                                      "0.1234567890123456",
                                      "1.0000000000000001",
                                      "0.\xff"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        int64_t num = 77, den = 78;
        assert_fails(ifkv_ratio_parse(bad[i], &num, &den), IFKV_ERR_USAGE, IFKV_E_VALUE, "ratio");
        assert_int_equal(num, 77);
        assert_int_equal(den, 78);
    }
}

/* In doubles 0.35 * 180 is 62.99..., 0.29 * 100 is 28.99..., 0.07 * 100 is 7.000000000000001. */
static void budget_is_exact_where_doubles_are_not(void **state) {
    (void)state;
    assert_int_equal(budget_of("0.35", 180, 1000), 63);
    assert_int_equal(budget_of("0.29", 100, 1000), 29);
    assert_int_equal(budget_of("0.07", 100, 1000), 7);
    assert_int_equal(budget_of("0.57", 100, 1000), 57);
    for (int64_t n = 1; n < 3000; n++) {
        assert_int_equal(budget_of("0.15", n, n), n * 15 / 100 ? n * 15 / 100 : 1);
        assert_int_equal(budget_of("0.005", n, n), n * 5 / 1000 ? n * 5 / 1000 : 1);
    }
}

/* 128-bit products, by an oracle that does not split them. */
static void budget_is_exact_at_the_limits(void **state) {
    (void)state;
    static const int64_t lengths[] = {1, 999999, 1000000007, 2147483646, 2147483647};
    static const char *const ratios[] = {"0.999999999999999", "0.000000000000001",
                                         "0.123456789012345", "0.500000000000000",
                                         "0.333333333333333", "0.0000001"};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
        for (size_t r = 0; r < sizeof ratios / sizeof *ratios; r++) {
            int64_t num, den;
            assert_ok(ifkv_ratio_parse(ratios[r], &num, &den));
            __extension__ typedef unsigned __int128 wide;
            const int64_t floor_of = (int64_t)((wide)num * (wide)lengths[i] / (wide)den);
            assert_int_equal(ifkv_select_by_ratio(num, den, lengths[i], INT64_MAX),
                             floor_of ? floor_of : 1);
        }
}

static void budget_keeps_to_its_bounds(void **state) {
    (void)state;
    assert_int_equal(budget_of("0", 1000, 900), 0);
    assert_int_equal(budget_of("0.000", 1000, 900), 0);
    assert_int_equal(budget_of("0.000001", 1000, 900), 1); /* at least one */
    assert_int_equal(budget_of("0.000001", 1000, 0), 0);   /* unless there is none */
    assert_int_equal(budget_of("1", 1000, 900), 900);      /* at most all */
    assert_int_equal(budget_of("0.95", 1000, 900), 900);
    assert_int_equal(budget_of("0.9", 1000, 900), 900);
    assert_int_equal(budget_of("0.899", 1000, 900), 899);
}

static ifkv_placement place(ifkv_placement_kind kind, int size, int64_t n_prefix, int64_t n_chunk,
                            const int64_t *bounds) {
    ifkv_placement placement;
    const ifkv_encode_cost cost = {.per_row = 1};
    assert_ok(ifkv_placement_init(&placement, kind, size, n_prefix, n_chunk, bounds, cost));
    return placement;
}

static int64_t budget_by(const char *name, const ifkv_placement *placement, int64_t num,
                         int64_t den, int64_t epic_k) {
    static ifkv_select_input input; /* static for its size only */
    memset(&input, 0, sizeof input);
    input.placement = placement;
    input.epic_k = epic_k;
    return ifkv_select_find(name)->budget(&input, num, den);
}

/* 180 rows, 170 of them eligible, in chunks of 10, 1, 100 and 69. */
static void budgets_by_method(void **state) {
    (void)state;
    ifkv_placement placement = place(IFKV_PLACE_ZIGZAG, 2, 2, 4, (int64_t[]){0, 8, 9, 109, 178});
    assert_int_equal(budget_by("none", &placement, 1, 1, 16), 0);
    assert_int_equal(budget_by("all", &placement, 0, 1, 16), 170);
    assert_int_equal(budget_by("random", &placement, 35, 100, 16), 63);
    assert_int_equal(budget_by("infoflow", &placement, 35, 100, 16), 63);
    assert_int_equal(budget_by("cacheblend", &placement, 35, 100, 16), 63);
    assert_int_equal(budget_by("epic_budget", &placement, 35, 100, 16), 63);
    assert_int_equal(budget_by("epic", &placement, 35, 100, 16), 1 + 16 + 16);
    assert_int_equal(budget_by("epic", &placement, 0, 1, 16), 1 + 16 + 16); /* whatever the ratio */
    assert_int_equal(budget_by("epic", &placement, 0, 1, 70), 1 + 70 + 69);
    assert_int_equal(budget_by("epic", &placement, 0, 1, INT32_MAX), 170);
    ifkv_placement_fini(&placement);
    assert_true(ifkv_select_find("infoflow")->has_scores);
    assert_true(ifkv_select_find("cacheblend")->has_scores);
    assert_false(ifkv_select_find("cacheblend")->is_question_scored);
    assert_false(ifkv_select_find("random")->has_scores);
    assert_null(ifkv_select_find("full")); /* a method, not a selector */
    assert_null(ifkv_select_find("Infoflow"));
    assert_null(ifkv_select_find(""));
}

static void assert_layers(const char *text, int n_layer, int n, const int *want) {
    static ifkv_select_input input; /* static for its size only */
    memset(&input, 0xff, sizeof input);
    assert_ok(ifkv_score_layers_parse(text, n_layer, &input));
    if (input.n_score_layer != n || memcmp(input.score_layer, want, (size_t)n * sizeof *want))
        fail_msg("%s of %d layers: got %d from %d", text ? text : "default", n_layer,
                 input.n_score_layer, input.score_layer[0]);
}

static void published_layers(void **state) {
    (void)state;
    for (int n_layer = 26; n_layer <= 80; n_layer++)
        assert_layers("published", n_layer, 4, (int[]){22, 23, 24, 25});
    assert_layers("published", 25, 4, (int[]){13, 14, 15, 16});
    assert_layers("published", 16, 4, (int[]){8, 9, 10, 11});
    assert_layers("published", 5, 3, (int[]){2, 3, 4});
    assert_layers("published", 4, 2, (int[]){2, 3});
    assert_layers("published", 3, 2, (int[]){1, 2});
    assert_layers("published", 2, 1, (int[]){1});
    assert_layers("published", 1, 1, (int[]){0});
}

static void wide_layers(void **state) {
    (void)state;
    assert_layers("wide", 30, 6, (int[]){10, 13, 16, 19, 22, 25});
    assert_layers("wide", 28, 5, (int[]){9, 12, 15, 18, 21});
    assert_layers("wide", 4, 1, (int[]){1});
    assert_layers("wide", 2, 1, (int[]){0});
    assert_layers("wide", 1, 1, (int[]){0});
}

static void default_layers_are_wide(void **state) {
    (void)state;
    assert_layers(NULL, 30, 6, (int[]){10, 13, 16, 19, 22, 25});
}

static void listed_layers(void **state) {
    (void)state;
    assert_layers("22,23,24,25", 28, 4, (int[]){22, 23, 24, 25});
    assert_layers("0", 1, 1, (int[]){0});
    assert_layers("0,29", 30, 2, (int[]){0, 29});
    assert_layers("007", 30, 1, (int[]){7});
}

static void layers_refuse_everything_else(void **state) {
    (void)state;
    static const char *const bad[] = {
        "",    ",",  "1,",   ",1",  "1,,2", "2,1",       "1,1", "30",  "-1",
        "+1",  " 1", "1 ,2", "1;2", "1.5",  "Published", "all", "0x1", "9999999999999999999999",
        "0,30"};
    static ifkv_select_input input;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_fails(ifkv_score_layers_parse(bad[i], 30, &input), IFKV_ERR_USAGE, IFKV_E_VALUE,
                     "score-layers");
    /* one more than there is room for */
    char list[8 * (IFKV_MAX_SCORE_LAYER + 1)];
    size_t n = 0;
    for (int i = 0; i <= IFKV_MAX_SCORE_LAYER; i++)
        n += (size_t)snprintf(list + n, sizeof list - n, "%s%d", i ? "," : "", i);
    assert_fails(ifkv_score_layers_parse(list, 100000, &input), IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "score-layers");
}

/* What options_check asks for when it does not know the model. */
static void layers_parse_without_a_model(void **state) {
    (void)state;
    static ifkv_select_input input;
    static const char *const good[] = {"published", "wide", NULL, "5,600"};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        assert_ok(ifkv_score_layers_parse(good[i], INT32_MAX, &input));
}

static void score_forms_by_name(void **state) {
    (void)state;
    static const struct {
        const char *name;
        ifkv_score_form form;
    } forms[] = {{"l2", IFKV_SCORE_L2},
                 {"l1", IFKV_SCORE_L1},
                 {"mass", IFKV_SCORE_MASS},
                 {"l2h", IFKV_SCORE_L2H}};
    ifkv_score_form form;
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
        assert_ok(ifkv_score_form_parse(forms[i].name, &form));
        assert_int_equal(form, forms[i].form);
    }
    static const char *const bad[] = {"", "L2", "l3", "l2 ", "mas"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_fails(ifkv_score_form_parse(bad[i], &form), IFKV_ERR_USAGE, IFKV_E_VALUE, "score");
}

/* Rows chosen by a selector that reads placement, budget and seed only. */
static void choose_with(const char *name, const ifkv_placement *placement, uint64_t seed,
                        int64_t epic_k, int64_t budget, int64_t *selected) {
    static ifkv_select_input input;
    memset(&input, 0, sizeof input);
    input.placement = placement;
    input.budget = budget;
    input.seed = seed;
    input.epic_k = epic_k;
    ifkv_selector *selector = NULL;
    assert_ok(ifkv_selector_create(ifkv_select_find(name), &input, &selector));
    assert_ok(selector->ops->choose(selector, NULL, selected));
    ifkv_selector_destroy(selector);
}

static void choose(const char *name, const ifkv_placement *placement, uint64_t seed, int64_t budget,
                   int64_t *selected) {
    choose_with(name, placement, seed, 0, budget, selected);
}

static void all_selects_everything_but_chunk_0(void **state) {
    (void)state;
    ifkv_placement placement = place(IFKV_PLACE_ZIGZAG, 2, 3, 3, (int64_t[]){0, 4, 9, 15});
    int64_t selected[16];
    assert_int_equal(ifkv_select_first(&placement), 7);
    choose("all", &placement, 0, 11, selected);
    for (int64_t i = 0; i < 11; i++) assert_int_equal(selected[i], 7 + i);
    ifkv_placement_fini(&placement);
}

static void random_rows_are_eligible_distinct_and_ascending(void **state) {
    (void)state;
    ifkv_placement placement = place(IFKV_PLACE_ZIGZAG, 3, 3, 3, (int64_t[]){0, 20, 21, 220});
    int64_t selected[200];
    for (int64_t budget = 0; budget <= 200; budget += 25)
        for (uint64_t seed = 0; seed < 20; seed++) {
            choose("random", &placement, seed, budget, selected);
            for (int64_t i = 0; i < budget; i++)
                assert_true(selected[i] > (i ? selected[i - 1] : 22) && selected[i] < 223);
        }
    ifkv_placement_fini(&placement);
}

static void random_depends_on_seed_and_index_only(void **state) {
    (void)state;
    ifkv_placement one = place(IFKV_PLACE_ZIGZAG, 1, 3, 3, (int64_t[]){0, 20, 21, 220});
    ifkv_placement other =
        place(IFKV_PLACE_LONGEST, 5, 11, 4, (int64_t[]){0, 12, 100, 190, 212}); /* same T, first */
    int64_t first[50], second[50], more[90], third[50];
    choose("random", &one, 99, 50, first);
    choose("random", &other, 99, 50, second);
    assert_memory_equal(first, second, sizeof first);
    /* keys, not draws: a larger budget only adds rows */
    choose("random", &one, 99, 90, more);
    for (int i = 0, j = 0; i < 50; i++) {
        while (j < 90 && more[j] < first[i]) j++;
        assert_true(j < 90 && more[j] == first[i]);
    }
    choose("random", &one, 100, 50, third);
    assert_true(memcmp(first, third, sizeof first) != 0);
    ifkv_placement_fini(&other);
    ifkv_placement_fini(&one);
}

/* Over n seeds a row is chosen n/4 times, give or take 6 sqrt(n * 1/4 * 3/4); fixed seeds, so no
 * chance is left in it. */
static void random_is_uniform(void **state) {
    (void)state;
    enum { N_SEED = 4000, N_ROW = 200, BUDGET = 50 };
    ifkv_placement placement = place(IFKV_PLACE_ZIGZAG, 2, 0, 2, (int64_t[]){0, 24, 24 + N_ROW});
    int count[N_ROW] = {0}, pairs = 0;
    int64_t selected[BUDGET];
    for (uint64_t seed = 0; seed < N_SEED; seed++) {
        choose("random", &placement, seed, BUDGET, selected);
        for (int i = 0; i < BUDGET; i++) {
            count[selected[i] - 24]++;
            pairs += i && selected[i] == selected[i - 1] + 1;
        }
    }
    const double spread = 6 * sqrt(N_SEED * 0.25 * 0.75);
    for (int i = 0; i < N_ROW; i++) assert_true(fabs(count[i] - N_SEED * 0.25) < spread);
    /* neighbours are no likelier than chance: 199 pairs with 50/200 * 49/199 each */
    const double want = N_SEED * 199.0 * (50.0 / 200) * (49.0 / 199);
    assert_true(fabs(pairs - want) < 0.02 * want);
    ifkv_placement_fini(&placement);
}

static void epic_takes_the_heads_of_all_chunks_but_the_first(void **state) {
    (void)state;
    /* chunks of 3 + 4, 5, 1 and 6 rows at 0, 7, 12, 13 */
    ifkv_placement placement = place(IFKV_PLACE_ZIGZAG, 2, 3, 4, (int64_t[]){0, 4, 9, 10, 16});
    const int64_t want[] = {7, 8, 12, 13, 14};
    int64_t selected[16];
    const int64_t k = budget_by("epic", &placement, 15, 100, 2);
    assert_int_equal(k, 5);
    choose_with("epic", &placement, 0, 2, k, selected);
    assert_memory_equal(selected, want, sizeof want);
    ifkv_placement_fini(&placement);
}

static void epic_with_heads_as_long_as_chunks_is_all(void **state) {
    (void)state;
    ifkv_placement placement = place(IFKV_PLACE_ZIGZAG, 2, 3, 4, (int64_t[]){0, 4, 9, 10, 16});
    for (int64_t epic_k = 6; epic_k <= INT32_MAX; epic_k *= 7) {
        int64_t all[12], epic[12];
        assert_int_equal(budget_by("epic", &placement, 15, 100, epic_k), 12);
        choose("all", &placement, 0, 12, all);
        choose_with("epic", &placement, 0, epic_k, 12, epic);
        assert_memory_equal(epic, all, sizeof all);
    }
    ifkv_placement_fini(&placement);
}

/* Rows chosen from each chunk but the first; they must be its first rows, and ascend. */
static void count_heads(const ifkv_placement *placement, const int64_t *selected, int64_t k,
                        int64_t *quota) {
    int64_t at = 0;
    for (int64_t i = 1; i < placement->n_chunk; i++) {
        quota[i] = 0;
        while (at < k && selected[at] < placement->offset[i + 1])
            assert_int_equal(selected[at++], placement->offset[i] + quota[i]++);
    }
    assert_int_equal(at, k);
}

static void epic_budget_deals_by_largest_remainder(void **state) {
    (void)state;
    /* 10 rows, then 3, 3, 3 and 1: 5 of 10 are 1.5, 1.5, 1.5, 0.5: ties go to the lower chunk */
    ifkv_placement placement =
        place(IFKV_PLACE_ZIGZAG, 3, 0, 5, (int64_t[]){0, 10, 13, 16, 19, 20});
    static const int64_t want[][5] = {{1, 1, 0, 0, 0}, /* 0.3 0.3 0.3 0.1 */
                                      {2, 1, 1, 0, 0}, /* 0.6 0.6 0.6 0.2 */
                                      {3, 1, 1, 1, 0}, /* 0.9 0.9 0.9 0.3 */
                                      {4, 1, 1, 1, 1}, /* 1.2 1.2 1.2 0.4 */
                                      {5, 2, 2, 1, 0}, /* 1.5 1.5 1.5 0.5 */
                                      {9, 3, 3, 2, 1}, /* 2.7 2.7 2.7 0.9 */
                                      {10, 3, 3, 3, 1}};
    for (size_t w = 0; w < sizeof want / sizeof *want; w++) {
        int64_t selected[10], quota[5];
        choose("epic_budget", &placement, 0, want[w][0], selected);
        count_heads(&placement, selected, want[w][0], quota);
        assert_memory_equal(quota + 1, want[w] + 1, 4 * sizeof *quota);
    }
    ifkv_placement_fini(&placement);
}

/* A quota is the share rounded down or up, and never above the chunk. */
static void epic_budget_stays_within_one_of_the_share(void **state) {
    (void)state;
    ifkv_placement placement =
        place(IFKV_PLACE_LONGEST, 3, 5, 6, (int64_t[]){0, 7, 8, 208, 211, 240, 241});
    const int64_t n = placement.n_context - ifkv_select_first(&placement);
    for (int64_t k = 0; k <= n; k++) {
        int64_t selected[241], quota[6];
        choose("epic_budget", &placement, 0, k, selected);
        count_heads(&placement, selected, k, quota);
        for (int64_t i = 1; i < placement.n_chunk; i++) {
            const int64_t product = k * (placement.offset[i + 1] - placement.offset[i]);
            assert_true(quota[i] * n > product - n && quota[i] * n < product + n);
        }
    }
    ifkv_placement_fini(&placement);
}

static void geometries_by_name(void **state) {
    (void)state;
    static const struct {
        const char *name, *hp;
        ifkv_geometry geometry;
        const char *hp_shown;
    } good[] = {{NULL, NULL, IFKV_GEOMETRY_GLOBAL, ""},
                {"global", "shared", IFKV_GEOMETRY_GLOBAL, ""},
                {"hl-tp", NULL, IFKV_GEOMETRY_HL_TP, ""},
                {"hl-hp", NULL, IFKV_GEOMETRY_HL_HP, "shared"},
                {"hl-hp", "shared", IFKV_GEOMETRY_HL_HP, "shared"},
                {"hl-hp", "per_chunk", IFKV_GEOMETRY_HL_HP_PER_CHUNK, "per_chunk"},
                {"tl-tp", NULL, IFKV_GEOMETRY_TL_TP, ""}};
    ifkv_geometry geometry;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        assert_ok(ifkv_geometry_parse(good[i].name, good[i].hp, &geometry));
        assert_int_equal(geometry, good[i].geometry);
        assert_string_equal(ifkv_geometry_name(geometry), good[i].name ? good[i].name : "global");
        assert_string_equal(ifkv_geometry_hp_name(geometry), good[i].hp_shown);
    }
    static const char *const bad[] = {"", "GLOBAL", "hl", "tl-hp", "hl_tp", "hl-hp "};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_fails(ifkv_geometry_parse(bad[i], NULL, &geometry), IFKV_ERR_USAGE, IFKV_E_VALUE,
                     "geometry");
        assert_fails(ifkv_geometry_parse("hl-hp", bad[i], &geometry), IFKV_ERR_USAGE, IFKV_E_VALUE,
                     "hp");
    }
    assert_fails(ifkv_geometry_parse("tl-tp", "per_chunk", &geometry), IFKV_ERR_USAGE,
                 IFKV_E_CONFLICT, "hl-hp");
    assert_fails(ifkv_geometry_parse(NULL, "per_chunk", &geometry), IFKV_ERR_USAGE, IFKV_E_CONFLICT,
                 "hl-hp");
}

/* Positions of all context rows, then of scoring row 0. */
static void assert_positions(ifkv_geometry geometry, const ifkv_placement *placement,
                             const int64_t *want) {
    for (int64_t i = 0; i < placement->n_chunk; i++)
        for (int64_t index = placement->offset[i]; index < placement->offset[i + 1]; index++)
            assert_int_equal(index + ifkv_geometry_shift(geometry, placement, i, index),
                             want[index]);
    assert_int_equal(ifkv_geometry_question(geometry, placement), want[placement->n_context]);
}

/* A prefix of 2, chunks of 3, 1 and 4. */
static void geometry_positions_by_hand(void **state) {
    (void)state;
    ifkv_placement placement = place(IFKV_PLACE_ZIGZAG, 2, 2, 3, (int64_t[]){0, 3, 4, 8});
    assert_positions(IFKV_GEOMETRY_GLOBAL, &placement,
                     (int64_t[]){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10});
    assert_positions(IFKV_GEOMETRY_HL_TP, &placement,
                     (int64_t[]){0, 1, 2, 3, 4, 2, 2, 3, 4, 5, 10});
    assert_positions(IFKV_GEOMETRY_HL_HP, &placement, (int64_t[]){0, 1, 2, 3, 4, 2, 2, 3, 4, 5, 6});
    /* distances of a question at 5, 3 and 6: chunks end before 6, the prefix stays before chunk 0
     */
    assert_positions(IFKV_GEOMETRY_HL_HP_PER_CHUNK, &placement,
                     (int64_t[]){1, 2, 3, 4, 5, 5, 2, 3, 4, 5, 6});
    assert_positions(IFKV_GEOMETRY_TL_TP, &placement,
                     (int64_t[]){0, 1, 7, 8, 9, 9, 6, 7, 8, 9, 10});
    ifkv_placement_fini(&placement);
}

static void geometries_coincide_for_one_chunk(void **state) {
    (void)state;
    ifkv_placement placement = place(IFKV_PLACE_ZIGZAG, 2, 2, 1, (int64_t[]){0, 5});
    for (int g = IFKV_GEOMETRY_GLOBAL; g <= IFKV_GEOMETRY_TL_TP; g++)
        assert_positions((ifkv_geometry)g, &placement, (int64_t[]){0, 1, 2, 3, 4, 5, 6, 7});
    ifkv_placement_fini(&placement);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ratio_is_an_exact_decimal),
        cmocka_unit_test(ratio_refuses_everything_else),
        cmocka_unit_test(budget_is_exact_where_doubles_are_not),
        cmocka_unit_test(budget_is_exact_at_the_limits),
        cmocka_unit_test(budget_keeps_to_its_bounds),
        cmocka_unit_test(budgets_by_method),
        cmocka_unit_test(published_layers),
        cmocka_unit_test(wide_layers),
        cmocka_unit_test(default_layers_are_wide),
        cmocka_unit_test(listed_layers),
        cmocka_unit_test(layers_refuse_everything_else),
        cmocka_unit_test(layers_parse_without_a_model),
        cmocka_unit_test(score_forms_by_name),
        cmocka_unit_test(all_selects_everything_but_chunk_0),
        cmocka_unit_test(random_rows_are_eligible_distinct_and_ascending),
        cmocka_unit_test(random_depends_on_seed_and_index_only),
        cmocka_unit_test(random_is_uniform),
        cmocka_unit_test(geometries_by_name),
        cmocka_unit_test(geometry_positions_by_hand),
        cmocka_unit_test(geometries_coincide_for_one_chunk),
        cmocka_unit_test(epic_takes_the_heads_of_all_chunks_but_the_first),
        cmocka_unit_test(epic_with_heads_as_long_as_chunks_is_all),
        cmocka_unit_test(epic_budget_deals_by_largest_remainder),
        cmocka_unit_test(epic_budget_stays_within_one_of_the_share),
    };
    return cmocka_run_group_tests_name("select", tests, NULL, NULL);
}
