/* Selectors that run layers of their own, against full prefill and themselves: cacheblend, and
 * infoflow under its geometries and with local scoring.
 *
 * One process, random weights, ranks as threads; invariants by the numbers of algorithm section 8.
 * Values against the float64 reference: test_selectors.py. */
#include "tiny.h"

#include "agree.h"
#include "engine.h"
#include "error_codes.h"
#include "model_files.h"
#include "session.h"

static const int sizes[] = {1, 2, 3, 5, 8};
enum { N_SIZE = sizeof sizes / sizeof *sizes, N_CASE = 4 };

static uint64_t seed;
static char *dir;
static tiny_case cases[N_CASE];

static int make_cases(void **state) {
    if (dir_setup(state)) return -1;
    dir = *state;
    /* more rows than a tile of attention, a chunk of one token, fewer chunks than ranks, one chunk
     */
    cases[0] =
        tiny_case_make(dir, &seed, &tiny_shapes[0], 3, 6, (int64_t[]){17, 1, 290, 5, 64, 9}, 7, 4);
    cases[1] = tiny_case_make(dir, &seed, &tiny_shapes[1], 0, 3, (int64_t[]){20, 1, 31}, 1, 3);
    cases[2] =
        tiny_case_make(dir, &seed, &tiny_shapes[2], 2, 5, (int64_t[]){8, 30, 2, 19, 40}, 5, 0);
    cases[3] = tiny_case_make(dir, &seed, &tiny_shapes[3], 1, 1, (int64_t[]){37}, 4, 2);
    return 0;
}

static int free_cases(void **state) {
    for (int i = 0; i < N_CASE; i++) tiny_case_fini(&cases[i]);
    return dir_teardown(state);
}

static ifkv_prefill_options blend(const char *ratio) {
    return (ifkv_prefill_options){.method = "cacheblend", .ratio = ratio};
}

static void assert_same_selection(const tiny_run *got, const tiny_run *want) {
    assert_int_equal(got->n_selected, want->n_selected);
    assert_memory_equal(got->selected, want->selected,
                        (size_t)want->n_selected * sizeof *want->selected);
    assert_memory_equal(got->scores, want->scores, (size_t)want->n_context * sizeof *want->scores);
}

/* Layer 1 of every row, selected or not: the check write. */
static void cacheblend_layer_1_equals_full_prefill(void **state) {
    (void)state;
    for (int c = 0; c < 3; c++) {
        tiny_run full = tiny_prefill(&cases[c], 1, (ifkv_prefill_options){.method = "full"});
        const int64_t n = full.n_context * full.n_col;
        for (int s = 0; s < N_SIZE; s++) {
            tiny_run run = tiny_prefill(&cases[c], sizes[s], blend("0.2"));
            assert_true(run.n_selected > 0 && run.n_selected < run.n_context);
            for (int layer = 0; layer < 2; layer++) {
                assert_within(tiny_error(run.k + layer * n, full.k + layer * n, n), TINY_TOLERANCE);
                assert_within(tiny_error(run.v + layer * n, full.v + layer * n, n), TINY_TOLERANCE);
            }
            tiny_run_fini(&run);
        }
        tiny_run_fini(&full);
    }
}

/* Layers above the check layer change in selected rows only. */
static void cacheblend_leaves_other_rows_of_upper_layers(void **state) {
    (void)state;
    for (int c = 0; c < 3; c++) {
        tiny_run none = tiny_prefill(&cases[c], 2, (ifkv_prefill_options){.method = "none"}),
                 run = tiny_prefill(&cases[c], 2, blend("0.2"));
        for (int layer = 2; layer < none.n_layer; layer++)
            for (int64_t row = 0, i = 0; row < none.n_context; row++) {
                const int64_t at = (layer * none.n_context + row) * none.n_col;
                const bool is_selected = i < run.n_selected && run.selected[i] == row;
                i += is_selected;
                assert_true(is_selected ||
                            !memcmp(run.k + at, none.k + at, (size_t)none.n_col * sizeof *none.k));
            }
        tiny_run_fini(&run);
        tiny_run_fini(&none);
    }
}

static void cacheblend_scores_are_deviations_of_v_at_layer_1(void **state) {
    (void)state;
    for (int c = 0; c < 3; c++) {
        tiny_run none = tiny_prefill(&cases[c], 1, (ifkv_prefill_options){.method = "none"}),
                 full = tiny_prefill(&cases[c], 1, (ifkv_prefill_options){.method = "full"}),
                 run = tiny_prefill(&cases[c], 3, blend("0.2"));
        const int64_t first = tiny_request_end(&cases[c].request, 0);
        for (int64_t row = 0; row < none.n_context; row++) {
            double deviation = 0, norm = 0;
            for (int64_t i = 0; i < none.n_col; i++) {
                const int64_t at = (none.n_context + row) * none.n_col + i;
                const double difference = (double)full.v[at] - (double)none.v[at];
                deviation += difference * difference;
                norm += (double)full.v[at] * (double)full.v[at];
            }
            /* |a + e|^2 - |a|^2 <= 2 |a| |e| + |e|^2, |e| = TINY_TOLERANCE |V|; chunk 0: a = 0 */
            const double e = TINY_TOLERANCE * sqrt(norm);
            assert_within(fabs(run.scores[row] - deviation), 2 * sqrt(deviation) * e + e * e);
            if (row < first) assert_within(run.scores[row], e * e);
        }
        tiny_run_fini(&run);
        tiny_run_fini(&full);
        tiny_run_fini(&none);
    }
}

/* To the bit: no sum of a score crosses chunks of different ranks. */
static void i11_cacheblend_scores_ignore_ranks_and_placement(void **state) {
    (void)state;
    static const char *const placements[] = {"zigzag", "contiguous", "longest"};
    for (int c = 0; c < N_CASE; c++) {
        ifkv_prefill_options options = blend("0.25");
        tiny_run one = tiny_prefill(&cases[c], 0, options);
        for (int s = 0; s < N_SIZE; s++) {
            options.placement = placements[s % 3];
            tiny_run run = tiny_prefill(&cases[c], sizes[s], options);
            assert_same_selection(&run, &one);
            tiny_run_fini(&run);
        }
        options.placement = NULL;
        tiny_run threads = tiny_run_of(&cases[c], options);
        threads.n_thread = 3;
        assert_ok(tiny_run_on(2, &threads));
        assert_same_selection(&threads, &one);
        tiny_run_fini(&threads);
        tiny_run_fini(&one);
    }
}

static void i12_cacheblend_rows_and_logits_ignore_the_number_of_ranks(void **state) {
    (void)state;
    for (int c = 0; c < N_CASE; c++) {
        tiny_run one = tiny_prefill(&cases[c], 0, blend("0.3"));
        for (int s = 1; s < N_SIZE; s++) {
            tiny_run run = tiny_prefill(&cases[c], sizes[s], blend("0.3"));
            assert_within(tiny_rows_error(&run, &one, 0, one.n_context), TINY_TOLERANCE);
            assert_within(tiny_error(run.logits, one.logits, one.n_vocab), TINY_TOLERANCE);
            tiny_run_fini(&run);
        }
        tiny_run_fini(&one);
    }
}

static void i02_cacheblend_of_ratio_one_equals_full_prefill(void **state) {
    (void)state;
    for (int c = 0; c < N_CASE; c++) {
        tiny_run full = tiny_prefill(&cases[c], 1, (ifkv_prefill_options){.method = "full"});
        for (int s = 0; s < N_SIZE; s += 2) {
            tiny_run run = tiny_prefill(&cases[c], sizes[s], blend("1"));
            assert_within(tiny_rows_error(&run, &full, 0, full.n_context), TINY_TOLERANCE);
            assert_within(tiny_error(run.logits, full.logits, full.n_vocab), TINY_TOLERANCE);
            tiny_run_fini(&run);
        }
        tiny_run_fini(&full);
    }
}

/* Also where scores are asked for: with nothing selected the check does not write. */
static void i03_cacheblend_of_ratio_zero_leaves_the_cache_unchanged(void **state) {
    (void)state;
    for (int c = 0; c < N_CASE; c++)
        for (int s = 0; s < N_SIZE; s += 2) {
            tiny_run none = tiny_prefill(&cases[c], sizes[s],
                                         (ifkv_prefill_options){.method = "none"}),
                     zero = tiny_prefill(&cases[c], sizes[s], blend("0"));
            assert_non_null(zero.scores);
            assert_int_equal(zero.n_selected, 0);
            assert_true(tiny_same_rows(&zero, &none));
            assert_memory_equal(zero.logits, none.logits,
                                (size_t)none.n_vocab * sizeof *none.logits);
            tiny_run_fini(&zero);
            tiny_run_fini(&none);
        }
}

/* Run the selector of an open session again with the check at layer 0, in memory of its own. */
static ifkv_status check_layer_0(ifkv_session *session) {
    ifkv_select_input input = session->selector->input;
    ifkv_selector *selector = NULL;
    ifkv_arena arena = {0};
    input.check_layer = 0;
    IFKV_TRY(ifkv_selector_create(session->selector->ops, &input, &selector));
    selector->ops->layout(selector, &arena);
    float *score = malloc((size_t)session->n_context * sizeof *score);
    arena = (ifkv_arena){.base = aligned_alloc(64, arena.peak + 64 - arena.peak % 64)};
    if (!score || !arena.base) abort();
    selector->ops->layout(selector, &arena);
    ifkv_status status = selector->ops->score(selector, score);
    for (int64_t i = 0; i < session->n_context && status == IFKV_OK; i++)
        session->scores[i] = score[i];
    ifkv_selector_destroy(selector);
    free(arena.base);
    free(score);
    return status;
}

/* Up to rounding: a projection of other rows in the same call rounds otherwise. */
static void i21_cacheblend_at_layer_0_deviates_nowhere(void **state) {
    (void)state;
    for (int c = 0; c < 3; c++)
        for (int s = 0; s < N_SIZE; s += 2) {
            tiny_run run = tiny_run_of(&cases[c], blend("0.2"));
            run.after = check_layer_0;
            assert_ok(tiny_run_on(sizes[s], &run));
            for (int64_t row = 0; row < run.n_context; row++) {
                double norm = 0;
                for (int64_t i = 0; i < run.n_col; i++)
                    norm += (double)run.v[row * run.n_col + i] * (double)run.v[row * run.n_col + i];
                assert_within(run.scores[row], TINY_TOLERANCE * TINY_TOLERANCE * norm);
            }
            tiny_run_fini(&run);
        }
}

static void cacheblend_needs_two_layers(void **state) {
    (void)state;
    static const tiny_shape shape = {"one_layer", "llama", 1, 40, 2, 2, 64, 56, 97, true};
    tiny_case it = cases[0];
    it.model = tiny_model(dir, &shape, -1);
    tiny_run run = tiny_run_of(&it, blend("0.2"));
    assert_fails(tiny_run_on(2, &run), IFKV_ERR_USAGE, IFKV_E_VALUE, "check layer 1");
    tiny_run_fini(&run);
    free(it.model);
}

static ifkv_status spoil_v(ifkv_engine *engine) {
    if (ifkv_comm_rank(engine->comm) != 1) return IFKV_OK;
    const ifkv_view *qkv = &engine->model.layer[1].qkv; /* the last row is of V */
    const float nan = NAN;
    char *last = (char *)qkv->data + (size_t)((qkv->n_row - 1) * qkv->stride) * sizeof nan;
    return engine->backend->ops->upload(engine->backend, last, &nan, sizeof nan);
}

static void i23_a_deviation_that_is_no_number_stops_all(void **state) {
    (void)state;
    tiny_run run = tiny_run_of(&cases[0], blend("0.2"));
    run.before = spoil_v;
    assert_fails(tiny_run_on(3, &run), IFKV_ERR_NUMERIC, IFKV_E_NOT_FINITE, "score of layer 1");
    tiny_run_fini(&run);
}

static const ifkv_prefill_options geometries[] = {
    {.ratio = "0.25"},
    {.ratio = "0.25", .geometry = "hl-tp"},
    {.ratio = "0.25", .geometry = "hl-hp"},
    {.ratio = "0.25", .geometry = "hl-hp", .hp = "per_chunk"},
    {.ratio = "0.25", .geometry = "tl-tp"},
};
enum { GLOBAL, HL_TP, HL_HP, HL_HP_PER_CHUNK, TL_TP, N_GEOMETRY };

/* To the bit: a rotation by nothing changes nothing. */
static void i19_geometries_coincide_for_one_chunk(void **state) {
    (void)state;
    for (int size = 1; size <= 2; size++) {
        tiny_run global = tiny_prefill(&cases[3], size, geometries[GLOBAL]);
        for (int g = HL_TP; g < N_GEOMETRY; g++) {
            tiny_run run = tiny_prefill(&cases[3], size, geometries[g]);
            assert_same_selection(&run, &global);
            tiny_run_fini(&run);
        }
        tiny_run_fini(&global);
    }
}

/* Keys stand at other positions, so they are rotated otherwise: as far apart as two roundings. */
static void i19_head_local_per_chunk_is_tail_local_without_a_prefix(void **state) {
    (void)state;
    for (int s = 0; s < N_SIZE; s++) {
        tiny_run head = tiny_prefill(&cases[1], sizes[s], geometries[HL_HP_PER_CHUNK]),
                 tail = tiny_prefill(&cases[1], sizes[s], geometries[TL_TP]);
        assert_within(tiny_error(head.scores, tail.scores, head.n_context), TINY_TOLERANCE);
        tiny_run_fini(&head);
        tiny_run_fini(&tail);
    }
}

static void geometries_differ_for_more_chunks(void **state) {
    (void)state;
    for (int c = 0; c < 3; c += 2) { /* with a prefix */
        tiny_run run[N_GEOMETRY];
        for (int g = 0; g < N_GEOMETRY; g++) run[g] = tiny_prefill(&cases[c], 1, geometries[g]);
        for (int a = 0; a < N_GEOMETRY; a++)
            for (int b = 0; b < a; b++)
                assert_true(tiny_error(run[a].scores, run[b].scores, run[a].n_context) > 1e-4);
        for (int g = 0; g < N_GEOMETRY; g++) tiny_run_fini(&run[g]);
    }
}

/* As under GLOBAL: parts are merged in float64 and rounded once, so bits differ rarely, and never
 * by more than a relative 1e-6. */
static void i11_geometry_scores_ignore_ranks_and_placement(void **state) {
    (void)state;
    static const char *const placements[] = {"zigzag", "contiguous", "longest"};
    for (int c = 0; c < 3; c++)
        for (int g = HL_TP; g < N_GEOMETRY; g++) {
            ifkv_prefill_options options = geometries[g];
            tiny_run one = tiny_prefill(&cases[c], 0, options);
            for (int s = 0; s < N_SIZE; s++) {
                options.placement = placements[(s + g) % 3];
                tiny_run run = tiny_prefill(&cases[c], sizes[s], options);
                for (int64_t i = 0; i < one.n_context; i++)
                    assert_within(fabs((double)run.scores[i] - (double)one.scores[i]),
                                  1e-6 * (double)one.scores[i]);
                tiny_run_fini(&run);
            }
            tiny_run_fini(&one);
        }
}

/* Scoring places keys in a copy: the cache is that of the same selection given. */
static void geometry_leaves_the_cache_alone(void **state) {
    (void)state;
    for (int g = HL_TP; g < N_GEOMETRY; g++) {
        tiny_run run = tiny_prefill(&cases[0], 2, geometries[g]);
        tiny_run given = tiny_prefill(
            &cases[0], 2,
            (ifkv_prefill_options){.selected = run.selected, .n_selected = run.n_selected});
        assert_true(tiny_same_rows(&run, &given));
        tiny_run_fini(&given);
        tiny_run_fini(&run);
    }
}

static ifkv_prefill_options local(bool has_sink) {
    return (ifkv_prefill_options){.ratio = "0.3", .scoring = "local", .local_sink = has_sink};
}

static void local_scoring_on_one_rank_is_exact_to_the_bit(void **state) {
    (void)state;
    for (int c = 0; c < N_CASE; c++)
        for (int has_sink = 0; has_sink <= 1; has_sink++) {
            tiny_run exact = tiny_prefill(&cases[c], 1, (ifkv_prefill_options){.ratio = "0.3"});
            tiny_run run = tiny_prefill(&cases[c], 1, local(has_sink));
            assert_same_selection(&run, &exact);
            tiny_run_fini(&run);
            tiny_run_fini(&exact);
        }
}

/* Exempt from I11: the mass that one rank's rows cannot give to another's stays with its own. */
static void local_scoring_depends_on_the_number_of_ranks_and_on_the_sink(void **state) {
    (void)state;
    for (int c = 0; c < 3; c += 2) { /* with a prefix */
        tiny_run one = tiny_prefill(&cases[c], 1, local(false)),
                 two = tiny_prefill(&cases[c], 2, local(false)),
                 lent = tiny_prefill(&cases[c], 2, local(true));
        assert_true(tiny_error(two.scores, one.scores, one.n_context) > 1e-2);
        assert_true(tiny_error(lent.scores, two.scores, one.n_context) > 1e-3);
        tiny_run_fini(&one);
        tiny_run_fini(&two);
        tiny_run_fini(&lent);
    }
}

/* Scores of the rows that others keep, and K and V of the lent rows in every layer up to the last
 * that is scored. */
static ifkv_status receives_scores_and_lent_rows(ifkv_session *session) {
    const ifkv_comm *comm = session->engine->comm;
    const ifkv_config *config = &session->engine->model.config;
    const ifkv_select_input *input = &session->selector->input;
    const bool is_borrower =
        session->options.local_sink && comm->rank != session->placement.rank[0];
    const int64_t n_layer = input->score_layer[input->n_score_layer - 1] + 1,
                  row = 8 * (int64_t)config->n_kv_head * config->d_head;
    const int64_t want = 4 * (session->n_context - session->n_kept) +
                         (is_borrower ? n_layer * session->placement.n_prefix * row : 0);
    return agree_true(session->engine->comm, session->bytes[IFKV_STAGE_SCORE] == want);
}

static void i25_local_scoring_moves_scores_and_lent_rows_only(void **state) {
    (void)state;
    for (int c = 0; c < 3; c++)
        for (int s = 0; s < 2 * N_SIZE; s++) {
            tiny_run run = tiny_run_of(&cases[c], local(s % 2));
            run.after = receives_scores_and_lent_rows;
            assert_ok(tiny_run_on(sizes[s / 2], &run));
            tiny_run_fini(&run);
        }
}

int main(void) {
    seed = tiny_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(cacheblend_layer_1_equals_full_prefill),
        cmocka_unit_test(cacheblend_leaves_other_rows_of_upper_layers),
        cmocka_unit_test(cacheblend_scores_are_deviations_of_v_at_layer_1),
        cmocka_unit_test(i02_cacheblend_of_ratio_one_equals_full_prefill),
        cmocka_unit_test(i03_cacheblend_of_ratio_zero_leaves_the_cache_unchanged),
        cmocka_unit_test(i11_cacheblend_scores_ignore_ranks_and_placement),
        cmocka_unit_test(i12_cacheblend_rows_and_logits_ignore_the_number_of_ranks),
        cmocka_unit_test(i21_cacheblend_at_layer_0_deviates_nowhere),
        cmocka_unit_test(i23_a_deviation_that_is_no_number_stops_all),
        cmocka_unit_test(cacheblend_needs_two_layers),
        cmocka_unit_test(i19_geometries_coincide_for_one_chunk),
        cmocka_unit_test(i19_head_local_per_chunk_is_tail_local_without_a_prefix),
        cmocka_unit_test(geometries_differ_for_more_chunks),
        cmocka_unit_test(i11_geometry_scores_ignore_ranks_and_placement),
        cmocka_unit_test(geometry_leaves_the_cache_alone),
        cmocka_unit_test(local_scoring_on_one_rank_is_exact_to_the_bit),
        cmocka_unit_test(local_scoring_depends_on_the_number_of_ranks_and_on_the_sink),
        cmocka_unit_test(i25_local_scoring_moves_scores_and_lent_rows_only),
    };
    return cmocka_run_group_tests_name("selectors", tests, make_cases, free_cases);
}
