/* The invariants of the pipeline (algorithm section 8), one process, random weights.
 *
 * Each test is named after its claim, with the invariant's number.  Ranks are threads: 1, 2, 3, 5
 * and 8 of them.
 * Not here: I13 of one operation, I18's question mass (test_attention); I15 and what else is true
 * of exact methods (test_exact); I25 of one exchange (test_exchange); I6's store and I26
 * (test_reuse); I17 (test_ride); I19 and cacheblend (test_selectors); I20 (test_reorder); I21's
 * keep selectors, I27: the forms that they compare do not exist yet. */
#include "pipeline.h"

#include "agree.h"
#include "comm.h"
#include "engine.h"
#include "error_codes.h"
#include "prefill.h"

static const int sizes[] = {1, 2, 3, 5, 8};
enum { N_SIZE = sizeof sizes / sizeof *sizes, MAX_SIZE = 8 };

static tiny_run full_prefill(const tiny_case *it) {
    return tiny_prefill(it, 1, (ifkv_prefill_options){.method = "full"});
}

static bool same_logits(const tiny_run *got, const tiny_run *want) {
    return !memcmp(got->logits, want->logits, (size_t)want->n_vocab * sizeof *want->logits);
}

/* Everything a run puts out is the same bits. */
static bool same_bits(const tiny_run *got, const tiny_run *want) {
    const size_t scores = (size_t)want->n_context * sizeof *want->scores;
    return tiny_same_rows(got, want) && same_logits(got, want) && got->n_answer == want->n_answer &&
           !memcmp(got->answer, want->answer, (size_t)want->n_answer * sizeof *want->answer) &&
           got->selected_digest == want->selected_digest && !got->scores == !want->scores &&
           (!got->scores || !memcmp(got->scores, want->scores, scores));
}

static void i01_layer_0_equals_full_prefill(void **state) {
    (void)state;
    for (int c = 0; c < N_CASE; c++) {
        tiny_run full = full_prefill(&cases[c]);
        for (int s = 0; s < N_SIZE; s++) {
            tiny_run none =
                tiny_prefill(&cases[c], sizes[s], (ifkv_prefill_options){.method = "none"});
            const int64_t n = full.n_context * full.n_col;
            assert_within(tiny_error(none.k, full.k, n), TINY_TOLERANCE);
            assert_within(tiny_error(none.v, full.v, n), TINY_TOLERANCE);
            tiny_run_fini(&none);
        }
        tiny_run_fini(&full);
    }
}

static const char *const exact[] = {"query", "delta"}, *const inexact[] = {"kv", "local"};

static void i02_ratio_one_equals_full_prefill(void **state) {
    (void)state;
    for (int c = 0; c < N_CASE; c++) {
        tiny_run full = full_prefill(&cases[c]);
        for (int s = 0; s < 2 * N_SIZE; s++) {
            tiny_run all =
                tiny_prefill(&cases[c], sizes[s / 2],
                             (ifkv_prefill_options){.ratio = "1", .exchange = exact[s % 2]});
            assert_int_equal(all.n_selected,
                             all.n_context - tiny_request_end(&cases[c].request, 0));
            assert_equals_full(&all, &full, full.n_context);
            tiny_run_fini(&all);
        }
        tiny_run_fini(&full);
    }
}

static void i02_method_all_equals_full_prefill_in_tiles_and_units(void **state) {
    (void)state;
    tiny_run full = full_prefill(&large);
    for (int i = 0; i < 6; i++) {
        tiny_run all = tiny_prefill(
            &large, 1 + i / 2, (ifkv_prefill_options){.method = "all", .exchange = exact[i % 2]});
        assert_equals_full(&all, &full, full.n_context);
        tiny_run_fini(&all);
    }
    tiny_run_fini(&full);
}

static void i02_full_prefill_is_the_same_bits_on_any_ranks(void **state) {
    (void)state;
    for (int c = 0; c < N_CASE; c++) {
        const ifkv_prefill_options options = {.method = "full", .max_new = 3};
        tiny_run one = tiny_prefill(&cases[c], 0, options);
        for (int s = 0; s < N_SIZE; s++) {
            tiny_run full = tiny_prefill(&cases[c], sizes[s], options);
            assert_true(same_bits(&full, &one));
            tiny_run_fini(&full);
        }
        tiny_run_fini(&one);
    }
}

static void i03_empty_selection_leaves_the_cache_unchanged(void **state) {
    (void)state;
    static const int64_t nothing[1];
    static const ifkv_prefill_options ways[] = {{.ratio = "0", .exchange = "delta"},
                                                {.ratio = "0", .exchange = "kv"},
                                                {.method = "random", .ratio = "0.000"},
                                                {.selected = nothing}};
    for (int c = 0; c < N_CASE; c++)
        for (int s = 0; s < N_SIZE; s += 2) {
            tiny_run none =
                tiny_prefill(&cases[c], sizes[s], (ifkv_prefill_options){.method = "none"});
            assert_int_equal(none.n_selected, 0);
            for (size_t w = 0; w < sizeof ways / sizeof *ways; w++) {
                tiny_run empty = tiny_prefill(&cases[c], sizes[s], ways[w]);
                assert_int_equal(empty.n_selected, 0);
                assert_true(tiny_same_rows(&empty, &none));
                assert_true(same_logits(&empty, &none));
                tiny_run_fini(&empty);
            }
            tiny_run_fini(&none);
        }
}

static void i04_chunk_0_equals_full_prefill(void **state) {
    (void)state;
    static const ifkv_prefill_options ways[] = {{.method = "none"},
                                                {.ratio = "0.3"},
                                                {.method = "random", .ratio = "0.5", .seed = 7},
                                                {.method = "cacheblend", .ratio = "0.4"}};
    for (int c = 0; c < N_CASE; c++) {
        tiny_run full = full_prefill(&cases[c]);
        const int64_t end = tiny_request_end(&cases[c].request, 0);
        for (int s = 0; s < N_SIZE; s++) {
            tiny_run run = tiny_prefill(&cases[c], sizes[s], ways[(c + s) % 4]);
            assert_equals_full(&run, &full, end);
            tiny_run_fini(&run);
        }
        tiny_run_fini(&full);
    }
}

static void i05_one_chunk_selects_nothing_and_equals_full_prefill(void **state) {
    (void)state;
    for (int prefix = 0; prefix <= 3; prefix += 3) {
        tiny_case it =
            tiny_case_make(dir, &seed, &tiny_shapes[2], prefix, 1, (int64_t[]){29}, 1, 5);
        tiny_run full = full_prefill(&it);
        for (int s = 0; s < N_SIZE; s++) {
            tiny_run run = tiny_prefill(&it, sizes[s], (ifkv_prefill_options){.ratio = "0.9"});
            assert_int_equal(run.n_selected, 0);
            assert_equals_full(&run, &full, full.n_context);
            tiny_run_fini(&run);
        }
        tiny_run_fini(&full);
        tiny_case_fini(&it);
    }
}

/* Rotate the half-split pairs of every K head by `shift` positions, in float64. */
static void rotate(float *k, int64_t n_row, const tiny_shape *shape, int64_t shift) {
    const int half = shape->d_head / 2;
    for (int64_t row = 0; row < n_row; row++)
        for (int h = 0; h < shape->n_kv_head; h++)
            for (int i = 0; i < half; i++) {
                float *low = k + (row * shape->n_kv_head + h) * shape->d_head + i;
                const double angle = (double)shift * pow(10000.0, -2.0 * i / shape->d_head);
                const double a = low[0], b = low[half];
                low[0] = (float)(a * cos(angle) - b * sin(angle));
                low[half] = (float)(b * cos(angle) + a * sin(angle));
            }
}

static void i06_encode_with_shift_equals_local_encode_rotated(void **state) {
    (void)state;
    for (int c = 0; c < 3; c++) {
        const tiny_case *it = &cases[c];
        tiny_run placed = tiny_prefill(it, 3, (ifkv_prefill_options){.method = "none"});
        for (int64_t i = 1; i < it->request.request.n_chunk; i++) {
            /* the chunk alone behind the prefix: rows 0 .. p + n_i - 1, rotated at their index */
            const int64_t bounds[] = {0, it->request.offset[i + 1] - it->request.offset[i]};
            const int64_t begin = tiny_request_end(&it->request, i - 1), n = bounds[1];
            ifkv_request request = it->request.request;
            request.chunk_tokens += it->request.offset[i];
            request.chunk_offsets = bounds;
            request.n_chunk = 1;
            tiny_run local = tiny_run_of(it, (ifkv_prefill_options){.method = "none"});
            local.request = &request;
            assert_ok(tiny_run_on(0, &local));
            for (int layer = 0; layer < placed.n_layer; layer++) {
                const int64_t from = (layer * local.n_context + request.n_prefix) * local.n_col,
                              to = (layer * placed.n_context + begin) * placed.n_col;
                rotate(local.k + from, n, it->shape, begin - request.n_prefix);
                assert_within(tiny_error(placed.k + to, local.k + from, n * local.n_col),
                              TINY_TOLERANCE);
                assert_within(tiny_error(placed.v + to, local.v + from, n * local.n_col),
                              TINY_TOLERANCE);
            }
            tiny_run_fini(&local);
        }
        tiny_run_fini(&placed);
    }
}

/* The dealing is a function of the number of ranks: other ranks, other homes, other order. */
static void i07_recompute_ignores_the_dealing_of_rows(void **state) {
    (void)state;
    for (int c = 0; c < N_CASE; c++) {
        int64_t n = 0, *selected = tiny_case_rows(&cases[c], &seed, 3, &n);
        const ifkv_prefill_options options = {.selected = selected, .n_selected = n};
        tiny_run one = tiny_prefill(&cases[c], 0, options);
        assert_int_equal(one.n_selected, n);
        for (int s = 0; s < N_SIZE; s++) {
            tiny_run run = tiny_prefill(&cases[c], sizes[s], options);
            assert_true(run.selected_digest == one.selected_digest);
            assert_equals_full(&run, &one, one.n_context);
            tiny_run_fini(&run);
        }
        tiny_run_fini(&one);
        free(selected);
    }
}

static ifkv_status read_rows(ifkv_session *session, float *rows) {
    ifkv_kv_rows shape = {.size = sizeof shape};
    IFKV_TRY(ifkv_session_kv_rows(session, &shape));
    const int64_t n = shape.n_row * shape.n_kv_head * shape.d_head;
    for (int layer = 0; layer < shape.n_layer; layer++)
        IFKV_TRY(
            ifkv_session_kv_read(session, layer, rows + 2 * layer * n, rows + (2 * layer + 1) * n));
    return IFKV_OK;
}

static ifkv_status recompute_again(ifkv_session *session) {
    ifkv_comm *comm = session->engine->comm;
    const size_t n = (size_t)(2 * session->cache.n_layer * session->n_kept * session->cache.n_col);
    float *before = calloc(2 * n + 1, sizeof *before), *after = before + n;
    if (!before) abort();
    ifkv_status status = agree_ok(comm, read_rows(session, before));
    if (status == IFKV_OK) status = ifkv_prefill_recompute(session);
    if (status == IFKV_OK) status = read_rows(session, after);
    const bool is_same = status == IFKV_OK && !memcmp(before, after, n * sizeof *before);
    status = agree_ok(comm, status);
    if (status == IFKV_OK) status = agree_true(comm, is_same);
    free(before);
    return status;
}

static void i08_recompute_twice_changes_no_bit(void **state) {
    (void)state;
    for (int c = 0; c < N_CASE; c++)
        for (int s = 0; s < N_SIZE; s++) {
            tiny_run run = tiny_run_of(
                &cases[c],
                (ifkv_prefill_options){.ratio = "0.4", .exchange = exact[s % 2], .ride = "score"});
            run.after = recompute_again;
            assert_ok(tiny_run_on(sizes[s], &run));
            tiny_run_fini(&run);
        }
}

/* The request without its rows above x. */
static ifkv_request cut_after(const tiny_request *of, int64_t x, int64_t *bounds) {
    ifkv_request request = of->request;
    const int64_t n_token = x + 1 - request.n_prefix;
    int64_t n = 0;
    bounds[0] = 0;
    while (bounds[n] < n_token) {
        n++;
        bounds[n] = of->offset[n] < n_token ? of->offset[n] : n_token;
    }
    request.chunk_offsets = bounds;
    request.n_chunk = n;
    return request;
}

static void i09_cut_after_a_row_leaves_the_rows_before_it(void **state) {
    (void)state;
    for (int c = 0; c < N_CASE; c++) {
        const tiny_case *it = &cases[c];
        int64_t n = 0, *selected = tiny_case_rows(it, &seed, 3, &n), bounds[16];
        for (int s = 0; s < N_SIZE; s++) {
            const int64_t first = it->request.request.n_prefix;
            const int64_t x = first + tiny_below(&seed, it->request.n_context - first);
            tiny_run whole = tiny_prefill(
                it, sizes[s], (ifkv_prefill_options){.selected = selected, .n_selected = n});
            const ifkv_request request = cut_after(&it->request, x, bounds);
            int64_t n_kept = 0;
            while (n_kept < n && selected[n_kept] <= x) n_kept++;
            tiny_run cut =
                tiny_run_of(it, (ifkv_prefill_options){.selected = selected, .n_selected = n_kept});
            cut.request = &request;
            assert_ok(tiny_run_on(sizes[s], &cut));
            assert_int_equal(cut.n_context, x + 1);
            assert_within(tiny_rows_error(&cut, &whole, 0, x + 1), TINY_TOLERANCE);
            tiny_run_fini(&cut);
            tiny_run_fini(&whole);
        }
        free(selected);
    }
}

/* l1 scores of the context rows, one chunk, for a question of n_question tokens behind it. */
static tiny_run score_one_chunk(const tiny_case *it, int size, const int64_t *bounds,
                                const int32_t *question, int64_t n_question) {
    const ifkv_request request = {.size = sizeof request,
                                  .chunk_tokens = it->request.token,
                                  .chunk_offsets = bounds,
                                  .n_chunk = 1,
                                  .prompt = question,
                                  .n_prompt = n_question};
    tiny_run run = tiny_run_of(it, (ifkv_prefill_options){.ratio = "0", .score = "l1"});
    run.request = &request;
    assert_ok(tiny_run_on(size, &run));
    return run;
}

/* Question [a, b] behind context C = question [a] behind C and question [b] behind C ++ [a]: row b
 * is at T + 1 and sees row a at T, whoever holds a. */
static void i09_question_rows_see_earlier_ones_as_if_they_were_context(void **state) {
    (void)state;
    static const int64_t short_bounds[] = {0, 31}, long_bounds[] = {0, 32};
    for (int c = 0; c < N_CASE; c++)
        for (int s = 0; s < N_SIZE; s += 2) {
            const tiny_case *it = &cases[c];
            const int32_t *token = it->request.token + 31;
            tiny_run both = score_one_chunk(it, sizes[s], short_bounds, token, 2),
                     a = score_one_chunk(it, sizes[s], short_bounds, token, 1),
                     b = score_one_chunk(it, sizes[s], long_bounds, token + 1, 1);
            for (int64_t i = 0; i < 31; i++) a.scores[i] += b.scores[i];
            assert_within(tiny_error(a.scores, both.scores, 31), TINY_TOLERANCE);
            tiny_run_fini(&both);
            tiny_run_fini(&a);
            tiny_run_fini(&b);
        }
}

static void i10_first_chunks_selected_equal_full_prefill(void **state) {
    (void)state;
    for (int c = 0; c < 3; c++) {
        const tiny_case *it = &cases[c];
        tiny_run full = full_prefill(it);
        int64_t n_all = 0, *selected = tiny_case_rows(it, &seed, 1, &n_all);
        for (int s = 0; s < N_SIZE; s++) {
            const int64_t m = 1 + tiny_below(&seed, it->request.request.n_chunk - 1);
            const int64_t end = tiny_request_end(&it->request, m);
            const int64_t n = end - tiny_request_end(&it->request, 0);
            tiny_run run = tiny_prefill(
                it, sizes[s], (ifkv_prefill_options){.selected = selected, .n_selected = n});
            assert_equals_full(&run, &full, end);
            tiny_run_fini(&run);
        }
        free(selected);
        tiny_run_fini(&full);
    }
}

/* Score descending, then index ascending, over the eligible rows. */
static bool is_better(const float *scores, int64_t a, int64_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
}

static void assert_best_selected(const tiny_case *it, const tiny_run *run) {
    const int64_t first = tiny_request_end(&it->request, 0);
    bool *is_selected = calloc((size_t)run->n_context, 1);
    assert_non_null(is_selected);
    for (int64_t i = 0; i < run->n_selected; i++) is_selected[run->selected[i]] = true;
    for (int64_t a = first; a < run->n_context; a++)
        for (int64_t b = first; b < run->n_context; b++)
            if (is_selected[a] && !is_selected[b] && !is_better(run->scores, a, b))
                fail_msg("row %lld (%.9g) selected before row %lld (%.9g)", (long long)a,
                         (double)run->scores[a], (long long)b, (double)run->scores[b]);
    free(is_selected);
}

/* Scores that agree to the bit, or all but.  Sums over context keys are carried between ranks in
 * float64 and rounded to float32 once; the order of the sum depends on ranks and placement, so one
 * value in about 2^29 lies so near the middle of two float32 that it is rounded the other way.  A
 * run makes about 10^4 such values: differing bits are rare, never more than a relative 1e-6, and
 * counted. */
static int differs_from(const tiny_run *got, const tiny_run *want) {
    assert_int_equal(got->n_selected, want->n_selected);
    for (int64_t i = 0; i < want->n_context; i++)
        assert_within(fabs((double)got->scores[i] - (double)want->scores[i]),
                      1e-6 * (double)want->scores[i]);
    const size_t bytes = (size_t)want->n_context * sizeof *want->scores;
    if (memcmp(got->scores, want->scores, bytes)) return 1;
    assert_true(got->selected_digest == want->selected_digest);
    assert_memory_equal(got->selected, want->selected,
                        (size_t)want->n_selected * sizeof *want->selected);
    return 0;
}

static void i11_selection_and_scores_ignore_ranks_and_placement(void **state) {
    (void)state;
    static const char *const placements[] = {"auto", "zigzag", "contiguous", "longest"};
    int n_differ = 0;
    for (int c = 0; c < N_CASE; c++) {
        ifkv_prefill_options options = {.ratio = "0.25"};
        tiny_run one = tiny_prefill(&cases[c], 0, options);
        assert_best_selected(&cases[c], &one);
        for (int s = 0; s < N_SIZE; s++)
            for (int p = 0; p < 4; p++) {
                options.placement = placements[p];
                tiny_run run = tiny_prefill(&cases[c], sizes[s], options);
                n_differ += differs_from(&run, &one);
                tiny_run_fini(&run);
            }
        tiny_run_fini(&one);
    }
    assert_true(n_differ <= 1); /* of 80 */
}

/* The CPU path promises more than the invariant: every bit of every output. */
static void i11_no_bit_depends_on_the_number_of_threads(void **state) {
    (void)state;
    for (int c = 0; c < N_CASE; c++)
        for (int size = 0; size <= 2; size += 2) {
            const ifkv_prefill_options options = {.ratio = "0.25", .max_new = 2};
            tiny_run one = tiny_prefill(&cases[c], size, options);
            for (int n_thread = 2; n_thread <= 3; n_thread++) {
                tiny_run run = tiny_run_of(&cases[c], options);
                run.n_thread = n_thread;
                assert_ok(tiny_run_on(size, &run));
                assert_true(same_bits(&run, &one));
                tiny_run_fini(&run);
            }
            tiny_run_fini(&one);
        }
}

static void i12_rows_logits_and_answer_ignore_the_number_of_ranks(void **state) {
    (void)state;
    for (int c = 0; c < N_CASE; c++) {
        const ifkv_prefill_options options = {.ratio = "0.3", .max_new = 6};
        tiny_run one = tiny_prefill(&cases[c], 0, options);
        assert_int_equal(one.n_answer, 6);
        const int64_t n_clear = check_answer(&cases[c], NULL, &one);
        for (int s = 0; s < N_SIZE; s++) {
            tiny_run run = tiny_prefill(&cases[c], sizes[s], options);
            assert_equals_full(&run, &one, one.n_context);
            assert_memory_equal(run.answer, one.answer, (size_t)n_clear * sizeof *one.answer);
            tiny_run_fini(&run);
        }
        tiny_run_fini(&one);
    }
}

static void i12_tiles_units_and_tail_blocks_change_no_result(void **state) {
    (void)state;
    const ifkv_prefill_options options = {.ratio = "0.55", .max_new = 3};
    tiny_run one = tiny_prefill(&large, 0, options);
    assert_true(one.n_selected >= 512); /* so that 2 ranks deal units of 64 rows */
    const int64_t n_clear = check_answer(&large, NULL, &one);
    for (int size = 2; size <= 3; size++) {
        tiny_run run = tiny_prefill(&large, size, options);
        differs_from(&run, &one);
        assert_true(run.selected_digest == one.selected_digest);
        assert_equals_full(&run, &one, one.n_context);
        assert_memory_equal(run.answer, one.answer, (size_t)n_clear * sizeof *one.answer);
        tiny_run_fini(&run);
    }
    tiny_run_fini(&one);
}

/* As many rows as there are, some, and fewer than ranks. */
static const char *const ratios[] = {"0.5", "0.15", "0.001"};

static void i14_delta_equals_query_equals_one_rank(void **state) {
    (void)state;
    for (int c = 0; c < N_CASE; c++) {
        ifkv_prefill_options options = {.ratio = ratios[c % 3], .max_new = 2};
        tiny_run one = tiny_prefill(&cases[c], 0, options);
        for (int s = 0; s < N_SIZE; s++)
            for (int e = 0; e < 2; e++) {
                options.exchange = exact[e];
                tiny_run run = tiny_prefill(&cases[c], sizes[s], options);
                assert_true(run.selected_digest == one.selected_digest);
                assert_equals_full(&run, &one, one.n_context);
                tiny_run_fini(&run);
            }
        tiny_run_fini(&one);
    }
}

static void i14_every_exchange_on_one_rank_gives_the_same_bits(void **state) {
    (void)state;
    static const char *const others[] = {"delta", "kv", "local"};
    for (int c = 0; c < N_CASE; c++) {
        ifkv_prefill_options options = {.ratio = "0.5", .exchange = "query", .max_new = 2};
        tiny_run query = tiny_prefill(&cases[c], 1, options);
        for (int e = 0; e < 3; e++) {
            options.exchange = others[e];
            tiny_run run = tiny_prefill(&cases[c], 1, options);
            assert_true(same_bits(&run, &query));
            tiny_run_fini(&run);
        }
        tiny_run_fini(&query);
    }
}

/* `kv` and `local` approximate on more ranks, but only rows of S may differ, and all stay finite.
 */
static void assert_selected_differ_only(const tiny_case *it, const tiny_run *got,
                                        const tiny_run *none) {
    for (int64_t row = 0, i = 0; row < none->n_context; row++) {
        if (i < got->n_selected && got->selected[i] == row) {
            i++;
            assert_true(row >= tiny_request_end(&it->request, 0));
            assert_true(isfinite(tiny_rows_error(got, none, row, row + 1)));
        } else {
            assert_true(tiny_rows_error(got, none, row, row + 1) == 0);
        }
    }
}

static void i14_inexact_exchanges_change_selected_rows_only(void **state) {
    (void)state;
    for (int c = 0; c < N_CASE; c++)
        for (int s = 1; s < N_SIZE; s++) {
            tiny_run none =
                tiny_prefill(&cases[c], sizes[s], (ifkv_prefill_options){.method = "none"});
            for (int e = 0; e < 2; e++) {
                tiny_run run =
                    tiny_prefill(&cases[c], sizes[s],
                                 (ifkv_prefill_options){.ratio = "0.2", .exchange = inexact[e]});
                assert_selected_differ_only(&cases[c], &run, &none);
                tiny_run_fini(&run);
            }
            tiny_run_fini(&none);
        }
}

/* End of the leading chunks that are on the rank of chunk 0. */
static int64_t end_of_first_shard(const tiny_case *it, int size) {
    ifkv_placement placement;
    const ifkv_request *request = &it->request.request;
    assert_ok(ifkv_placement_init(&placement, IFKV_PLACE_CONTIGUOUS, size, request->n_prefix,
                                  request->n_chunk, request->chunk_offsets, (ifkv_encode_cost){0}));
    int64_t n = 1;
    while (n < placement.n_chunk && placement.rank[n] == placement.rank[0]) n++;
    const int64_t end = placement.offset[n];
    ifkv_placement_fini(&placement);
    return end;
}

/* Rows that see all of their past: up to the first chunk of another rank. */
static void i14_inexact_exchanges_are_exact_up_to_the_second_shard(void **state) {
    (void)state;
    for (int c = 0; c < N_CASE; c++) {
        tiny_run full = full_prefill(&cases[c]);
        for (int s = 1; s < N_SIZE; s++)
            for (int e = 0; e < 2; e++) {
                tiny_run run = tiny_prefill(&cases[c], sizes[s],
                                            (ifkv_prefill_options){.method = "all",
                                                                   .exchange = inexact[e],
                                                                   .placement = "contiguous"});
                assert_equals_full(&run, &full, end_of_first_shard(&cases[c], sizes[s]));
                tiny_run_fini(&run);
            }
        tiny_run_fini(&full);
    }
}

static ifkv_status little_memory(ifkv_engine *engine) {
    engine->least_share = 2 * engine->weight_bytes;
    return IFKV_OK;
}

static ifkv_status runs_query(ifkv_session *session) {
    return agree_true(session->engine->comm, !strcmp(session->exchange_name, "query"));
}

static ifkv_status runs_delta(ifkv_session *session) {
    return agree_true(session->engine->comm, !strcmp(session->exchange_name, "delta"));
}

static void auto_takes_delta_if_all_kv_fit_and_query_if_not(void **state) {
    (void)state;
    const ifkv_prefill_options options = {.ratio = "0.2", .exchange = "auto"};
    for (int s = 0; s < N_SIZE; s++) {
        tiny_run fits = tiny_run_of(&cases[0], options), does_not = fits;
        fits.after = runs_delta;
        does_not.after = runs_query;
        does_not.before = little_memory;
        assert_ok(tiny_run_on(sizes[s], &fits));
        assert_ok(tiny_run_on(sizes[s], &does_not));
        tiny_run_fini(&fits);
        tiny_run_fini(&does_not);
    }
}

/* One allocation; each rank counts its share of it. */
static ifkv_status reads_the_weights_of_rank_0(ifkv_engine *engine) {
    void *base[16];
    const int size = engine->comm->size;
    IFKV_TRY(ifkv_comm_gather(engine->comm, &engine->model.base, sizeof base[0], base));
    bool is_shared = engine->weight_bytes * (size_t)size >= engine->model.bytes &&
                     engine->weight_bytes * (size_t)size < engine->model.bytes + (size_t)size;
    for (int r = 0; r < size; r++) is_shared = is_shared && base[r] == base[0];
    return agree_true(engine->comm, is_shared);
}

static void ranks_of_one_process_share_their_weights(void **state) {
    (void)state;
    for (int s = 0; s < N_SIZE; s++) {
        assert_true(sizes[s] <= 16);
        tiny_run run = tiny_run_of(&cases[0], (ifkv_prefill_options){.method = "none"});
        run.before = reads_the_weights_of_rank_0;
        assert_ok(tiny_run_on(sizes[s], &run));
        tiny_run_fini(&run);
    }
}

static void i16_placement_changes_no_result(void **state) {
    (void)state;
    static const char *const placements[] = {"auto", "contiguous", "longest"};
    for (int c = 0; c < N_CASE; c++)
        for (int s = 1; s < N_SIZE; s++) {
            ifkv_prefill_options options = {.ratio = "0.35"};
            options.placement = "zigzag";
            tiny_run zigzag = tiny_prefill(&cases[c], sizes[s], options);
            for (int p = 0; p < 3; p++) {
                options.placement = placements[p];
                tiny_run run = tiny_prefill(&cases[c], sizes[s], options);
                assert_equals_full(&run, &zigzag, zigzag.n_context);
                tiny_run_fini(&run);
            }
            tiny_run_fini(&zigzag);
        }
}

static int n_score_layers(const tiny_case *it) {
    const int n = it->shape->n_layer; /* wide */
    return (5 * n / 6 - n / 3) / 3 + 1;
}

static void i18_score_forms_bound_each_other(void **state) {
    (void)state;
    static const char *const forms[] = {"l2", "l1", "mass", "l2h"};
    for (int c = 0; c < N_CASE; c++) {
        const ifkv_request *request = &cases[c].request.request;
        const double n_row =
            (double)(request->n_question ? request->n_question : request->n_prompt);
        const double n_layer = n_score_layers(&cases[c]), n_head = cases[c].shape->n_head;
        tiny_run run[4];
        for (int f = 0; f < 4; f++)
            run[f] =
                tiny_prefill(&cases[c], 3, (ifkv_prefill_options){.ratio = "0", .score = forms[f]});
        double mass_sum = 0;
        const double slack = 1 + 1e-6; /* four float32 roundings and n_row float64 ones */
        for (int64_t i = 0; i < run[0].n_context; i++) {
            const double l2 = run[0].scores[i], l1 = run[1].scores[i], mass = run[2].scores[i],
                         l2h = run[3].scores[i];
            assert_true(isfinite(l2) && isfinite(l1) && isfinite(mass) && isfinite(l2h));
            assert_true(l2 >= 0 && l1 >= 0 && mass >= 0 && l2h >= 0);
            assert_true(l2 <= l1 * slack && l1 <= sqrt(n_row) * l2 * slack);
            assert_within(fabs(mass - n_layer * n_head * l1), 1e-6 * mass);
            assert_true(l2 * sqrt(n_head) <= l2h * slack && l2h * n_layer <= mass * slack);
            mass_sum += mass;
        }
        /* the rest is what the question looks at itself */
        assert_true(mass_sum > 0 && mass_sum < n_layer * n_head * n_row);
        for (int f = 0; f < 4; f++) tiny_run_fini(&run[f]);
    }
}

static void i21_epic_with_heads_as_long_as_chunks_is_all(void **state) {
    (void)state;
    for (int c = 0; c < N_CASE; c++)
        for (int s = 0; s < N_SIZE; s += 2) {
            tiny_run all =
                tiny_prefill(&cases[c], sizes[s], (ifkv_prefill_options){.method = "all"});
            tiny_run epic = tiny_prefill(&cases[c], sizes[s],
                                         (ifkv_prefill_options){.method = "epic", .epic_k = 64});
            assert_true(same_bits(&epic, &all));
            tiny_run_fini(&epic);
            tiny_run_fini(&all);
        }
}

static void i22_same_inputs_give_the_same_bits(void **state) {
    (void)state;
    static const char *const methods[] = {"infoflow", "ring", "allgather"};
    for (int c = 0; c < N_CASE; c++)
        for (int s = 0; s < N_SIZE; s++)
            for (size_t m = 0; m < sizeof methods / sizeof *methods; m++) {
                const ifkv_prefill_options options = {
                    .method = methods[m], .ratio = "0.3", .max_new = 4};
                tiny_run first = tiny_run_of(&cases[c], options), second = first;
                first.n_thread = second.n_thread = 2;
                assert_ok(tiny_run_on(sizes[s], &first));
                assert_ok(tiny_run_on(sizes[s], &second));
                assert_true(same_bits(&second, &first));
                tiny_run_fini(&second);
                tiny_run_fini(&first);
            }
}

/* What one rank of several is given instead of what the others have, and how all must end. */
typedef struct odd_rank {
    const char *what;
    ifkv_prefill_options options;
    ifkv_status status;
    int code;
    int32_t bad_token; /* if not 0: in place of the first chunk token */
    int64_t n_less;    /* prompt tokens, question tokens or chunk tokens that are missing */
    char from;         /* 'p', 'q', 'c' */
    tiny_engine_fn before;
} odd_rank;

typedef struct odd_run {
    const tiny_case *it;
    const odd_rank *odd;
    ifkv_prefill_options options; /* of the other ranks */
    int rank;                     /* the odd one */
    ifkv_status status[MAX_SIZE];
    int code[MAX_SIZE];
} odd_run;

static ifkv_status open_close(ifkv_engine *engine, const ifkv_request *request,
                              const ifkv_prefill_options *options) {
    ifkv_session *session = NULL;
    IFKV_TRY(ifkv_session_open(engine, request, options, &session));
    const ifkv_status status = ifkv_session_decode(session);
    ifkv_session_close(session);
    return status;
}

static ifkv_status run_odd(ifkv_comm *comm, void *arg) {
    odd_run *run = arg;
    const int rank = ifkv_comm_rank(comm);
    const bool is_odd = rank == run->rank;
    const ifkv_request *asked = &run->it->request.request;
    ifkv_request request = *asked;
    ifkv_prefill_options options = is_odd ? run->odd->options : run->options;
    options.size = sizeof options;
    int32_t *chunk_tokens = malloc((size_t)run->it->request.n_context * sizeof *chunk_tokens);
    if (!chunk_tokens) abort();
    memcpy(chunk_tokens, asked->chunk_tokens,
           (size_t)asked->chunk_offsets[asked->n_chunk] * sizeof *chunk_tokens);
    if (is_odd) {
        request.chunk_tokens = chunk_tokens;
        if (run->odd->bad_token) chunk_tokens[0] = run->odd->bad_token;
        if (run->odd->from == 'p') request.n_prompt -= run->odd->n_less;
        if (run->odd->from == 'q') request.n_question -= run->odd->n_less;
        if (run->odd->from == 'c') request.n_chunk -= run->odd->n_less;
    }
    const ifkv_engine_options engine_options = {.size = sizeof engine_options,
                                                .model_dir = run->it->model,
                                                .n_thread = 1,
                                                .random_weights = true,
                                                .seed = run->it->weight_seed};
    ifkv_engine *engine = NULL;
    ifkv_status status = ifkv_engine_open(comm, &engine_options, &engine);
    if (status == IFKV_OK && is_odd && run->odd->before) status = run->odd->before(engine);
    if (status == IFKV_OK) {
        run->status[rank] = open_close(engine, &request, &options);
        run->code[rank] = ifkv_last_error()->code;
        /* and the engines are none the worse for it */
        if (!run->odd->before) {
            ifkv_prefill_options good = run->options;
            good.size = sizeof good;
            status = open_close(engine, asked, &good);
        }
    }
    ifkv_engine_close(engine);
    free(chunk_tokens);
    return status;
}

static void assert_all_stop(const tiny_case *it, const odd_rank *odd, ifkv_prefill_options others,
                            int size, int rank) {
    odd_run run = {.it = it, .odd = odd, .options = others, .rank = rank};
    assert_ok(ifkv_comm_thread_run(size, run_odd, &run));
    for (int r = 0; r < size; r++)
        if (run.status[r] != odd->status || run.code[r] != odd->code)
            fail_msg("%s on rank %d of %d: rank %d got status %d E%04d, want %d E%04d", odd->what,
                     rank, size, r, (int)run.status[r], run.code[r], (int)odd->status, odd->code);
}

/* NaN in the K projection of layer 0: scores of the rank's rows. */
static ifkv_status spoil_weights(ifkv_engine *engine) {
    const ifkv_config *config = &engine->model.config;
    const ifkv_view *qkv = &engine->model.layer[0].qkv;
    const float nan = NAN;
    char *k_row = (char *)qkv->data +
                  (size_t)((int64_t)config->n_head * config->d_head * qkv->stride) * sizeof nan;
    return engine->backend->ops->upload(engine->backend, k_row, &nan, sizeof nan);
}

static void i23_error_on_one_rank_stops_all(void **state) {
    (void)state;
    static const odd_rank odds[] = {
        {"method", {.method = "best"}, IFKV_ERR_USAGE, IFKV_E_VALUE, 0, 0, 0, NULL},
        {"ratio", {.ratio = "1.5"}, IFKV_ERR_USAGE, IFKV_E_VALUE, 0, 0, 0, NULL},
        {"token", {.ratio = "0.2"}, IFKV_ERR_DATA, IFKV_E_REQUEST_TOKEN, 100000, 0, 0, NULL},
        {"length", {.max_new = 5000}, IFKV_ERR_DATA, IFKV_E_REQUEST_LENGTH, 0, 0, 0, NULL},
        {"NaN", {.ratio = "0.2"}, IFKV_ERR_NUMERIC, IFKV_E_NOT_FINITE, 0, 0, 0, spoil_weights},
    };
    for (size_t i = 0; i < sizeof odds / sizeof *odds; i++)
        for (int rank = 0; rank < 3; rank += 2)
            assert_all_stop(&cases[0], &odds[i], (ifkv_prefill_options){.ratio = "0.2"}, 3, rank);
    static const odd_rank first_look = {"NaN in the first look",
                                        {.reorder = "on"},
                                        IFKV_ERR_NUMERIC,
                                        IFKV_E_NOT_FINITE,
                                        0,
                                        0,
                                        0,
                                        spoil_weights};
    assert_all_stop(&cases[0], &first_look, (ifkv_prefill_options){.reorder = "on"}, 3, 1);
}

static void i23_options_that_differ_stop_all(void **state) {
    (void)state;
    static const int64_t some[] = {40, 41, 60}, other[] = {40, 42, 60};
    const ifkv_prefill_options common = {.ratio = "0.2", .max_new = 2};
    static const odd_rank odds[] = {
#define ODD(name, ...)                                                                             \
    {                                                                                              \
        name,                                                                                      \
        {.ratio = "0.2", .max_new = 2, __VA_ARGS__},                                               \
        IFKV_ERR_INTERNAL,                                                                         \
        IFKV_E_DIVERGED,                                                                           \
        0,                                                                                         \
        0,                                                                                         \
        0,                                                                                         \
        NULL}
        ODD("method none", .method = "none"),
        ODD("method random", .method = "random"),
        ODD("method full", .method = "full"),
        ODD("method ring", .method = "ring"),
        ODD("method auto", .method = "auto"),
        ODD("method cacheblend", .method = "cacheblend"),
        ODD("exchange", .exchange = "local"),
        ODD("exchange of auto", .exchange = "query"),
        ODD("score", .score = "l1"),
        ODD("score_rows", .score_rows = "prompt"),
        ODD("score_layers", .score_layers = "0"),
        ODD("geometry", .geometry = "hl-tp"),
        ODD("scoring", .scoring = "local"),
        ODD("reorder", .reorder = "on"),
        ODD("refit", .refit = true),
        ODD("placement", .placement = "contiguous"),
        ODD("chunk", .chunk = 19),
        ODD("selected", .selected = some, .n_selected = 3),
        ODD("ride of the prompt", .ride = "score"),
        ODD("ride of scores", .ride = "prompt"),
#undef ODD
        {"ratio", {.ratio = "0.3", .max_new = 2}, IFKV_ERR_INTERNAL, IFKV_E_DIVERGED, 0, 0, 0, 0},
        {"max_new", {.ratio = "0.2", .max_new = 4}, IFKV_ERR_INTERNAL, IFKV_E_DIVERGED, 0, 0, 0, 0},
        {"prompt",
         {.ratio = "0.2", .max_new = 2},
         IFKV_ERR_INTERNAL,
         IFKV_E_DIVERGED,
         0,
         1,
         'p',
         0},
        {"quest.",
         {.ratio = "0.2", .max_new = 2},
         IFKV_ERR_INTERNAL,
         IFKV_E_DIVERGED,
         0,
         1,
         'q',
         0},
        {"chunks",
         {.ratio = "0.2", .max_new = 2},
         IFKV_ERR_INTERNAL,
         IFKV_E_DIVERGED,
         0,
         1,
         'c',
         0},
    };
    for (size_t i = 0; i < sizeof odds / sizeof *odds; i++)
        assert_all_stop(&cases[0], &odds[i], common, 3, (int)(i % 3));

    static const odd_rank random = {
        "seed", {.method = "random", .seed = 2}, IFKV_ERR_INTERNAL, IFKV_E_DIVERGED, 0, 0, 0, NULL};
    assert_all_stop(&cases[0], &random, (ifkv_prefill_options){.method = "random", .seed = 1}, 3,
                    1);
    static const odd_rank lent = {"sink",
                                  {.scoring = "local", .local_sink = true},
                                  IFKV_ERR_INTERNAL,
                                  IFKV_E_DIVERGED,
                                  0,
                                  0,
                                  0,
                                  NULL};
    assert_all_stop(&cases[0], &lent, (ifkv_prefill_options){.scoring = "local"}, 3, 1);
    static const odd_rank given = {"selected rows",
                                   {.selected = other, .n_selected = 3},
                                   IFKV_ERR_INTERNAL,
                                   IFKV_E_DIVERGED,
                                   0,
                                   0,
                                   0,
                                   NULL};
    assert_all_stop(&cases[0], &given, (ifkv_prefill_options){.selected = some, .n_selected = 3}, 2,
                    1);
}

static ifkv_status clear_queries(ifkv_engine *engine) {
    const ifkv_config *config = &engine->model.config;
    for (int layer = 0; layer < config->n_layer; layer++) {
        const ifkv_view *qkv = &engine->model.layer[layer].qkv;
        memset(qkv->data, 0,
               (size_t)((int64_t)config->n_head * config->d_head * qkv->stride) * sizeof(float));
    }
    return IFKV_OK;
}

/* With queries of zero every visible key has the same weight: row q of the question sees T + q + 1
 * keys, and a key counted twice or not at all would show in every score. */
static void i24_scoring_counts_each_key_once(void **state) {
    (void)state;
    static const char *const forms[] = {"l1", "l2", "mass", "l2h"};
    for (int c = 0; c < N_CASE; c++) {
        const ifkv_request *request = &cases[c].request.request;
        const int64_t n_row = request->n_question ? request->n_question : request->n_prompt;
        double sum = 0, squares = 0;
        for (int64_t q = 0; q < n_row; q++) {
            const double weight = 1.0 / (double)(cases[c].request.n_context + q + 1);
            sum += weight;
            squares += weight * weight;
        }
        const double n_head = cases[c].shape->n_head;
        const double want[] = {sum, sqrt(squares), n_score_layers(&cases[c]) * n_head * sum,
                               sqrt(n_head * squares)};
        for (int s = 0; s < N_SIZE; s++) {
            const int form = s % 4;
            tiny_run run = tiny_run_of(
                &cases[c], (ifkv_prefill_options){.ratio = "0.2", .score = forms[form]});
            run.before = clear_queries;
            assert_ok(tiny_run_on(sizes[s], &run));
            /* all are equal: the lowest indices win */
            for (int64_t i = 0; i < run.n_selected; i++)
                assert_int_equal(run.selected[i], tiny_request_end(&cases[c].request, 0) + i);
            for (int64_t i = 0; i < run.n_context; i++) /* some roundings of 6e-8 */
                assert_within(fabs(run.scores[i] - want[form]), 1e-6 * want[form]);
            tiny_run_fini(&run);
        }
    }
}

/* Rows of S whose K/V are stored elsewhere than computed: P - 1 of P, as a rule. */
static int64_t n_away(const ifkv_session *session) {
    const int64_t k = session->n_selected;
    int64_t n = 0;
    for (int64_t i = 0; i < k; i++)
        n += ifkv_placement_owner(&session->placement, session->selected[i]) !=
             ifkv_deal_home(i, k, session->engine->comm->size);
    return n;
}

static int64_t kv_row_bytes(const ifkv_session *session) {
    const ifkv_config *config = &session->engine->model.config;
    return (int64_t)2 * 4 * config->n_kv_head * config->d_head;
}

/* What section 3 says all ranks receive together in one layer of encode, and of recompute. */
typedef struct byte_formula {
    int64_t encode, recompute;
} byte_formula;

static byte_formula formula_of(const ifkv_session *session) {
    const ifkv_config *config = &session->engine->model.config;
    const int64_t others = session->engine->comm->size - 1, k = session->n_selected,
                  kvb = kv_row_bytes(session), qb = (int64_t)4 * config->n_head * config->d_head;
    const char *name = session->exchange_name;
    if (!strcmp(name, "local") || !strcmp(name, "kv"))
        return (byte_formula){others * session->request.n_prefix * kvb, 0};
    if (!strcmp(name, "delta"))
        return (byte_formula){others * session->n_context * kvb, others * k * kvb};
    return (byte_formula){0, others * k * (2 * qb + 4 * config->n_head) + n_away(session) * kvb};
}

/* What the busiest rank of `kv` would receive in a layer if all fresh K/V that rows look at
 * travelled: those that others own below its last row.  It may receive less. */
static int64_t most_of_kv(const ifkv_session *session) {
    int64_t most = 0;
    for (int r = 0; r < session->engine->comm->size; r++) {
        int64_t n = 0, n_below = 0; /* rows of others so far, and up to r's last row */
        for (int64_t i = 0; i < session->n_selected; i++)
            if (ifkv_placement_owner(&session->placement, session->selected[i]) == r)
                n_below = n;
            else
                n++;
        most = n_below > most ? n_below : most;
    }
    return most * kv_row_bytes(session);
}

/* Sum of a number over the ranks. */
static ifkv_status sum_over_ranks(const ifkv_session *session, int64_t *value) {
    return ifkv_comm_all_reduce_i64(session->engine->comm, value, 1, IFKV_REDUCE_SUM);
}

/* Every rank received what its plan says; together, what section 3 says: K/V of layer 0 are not
 * stored again and the last layer does not attend, so a pass sends L - 1 times. */
static ifkv_status counts_as_planned(ifkv_session *session) {
    const int64_t n_layer = session->cache.n_layer;
    const ifkv_exchange *exchange = session->exchange;
    const ifkv_exchange_bytes plan = exchange->ops->bytes(exchange);
    int64_t encode = session->bytes[IFKV_STAGE_ENCODE],
            recompute = session->bytes[IFKV_STAGE_RECOMPUTE];
    const bool is_planned =
        encode == n_layer * plan.share && recompute == (n_layer - 1) * (plan.store + plan.attend);
    IFKV_TRY(agree_true(exchange->comm, is_planned));
    const byte_formula formula = formula_of(session);
    IFKV_TRY(sum_over_ranks(session, &encode));
    IFKV_TRY(agree_true(exchange->comm, encode == n_layer * formula.encode));
    if (!strcmp(session->exchange_name, "kv"))
        return agree_true(exchange->comm, recompute <= (n_layer - 1) * most_of_kv(session));
    IFKV_TRY(sum_over_ranks(session, &recompute));
    return agree_true(exchange->comm, recompute == (n_layer - 1) * formula.recompute);
}

static void i25_counted_bytes_equal_section_3(void **state) {
    (void)state;
    static const char *const names[] = {"query", "delta", "kv", "local"};
    for (int c = 0; c < N_CASE - 1; c++) /* the last one selects nothing */
        for (int s = 0; s < N_SIZE; s++)
            for (int e = 0; e < 4; e++) {
                tiny_run run = tiny_run_of(
                    &cases[c],
                    (ifkv_prefill_options){.ratio = "0.4", .exchange = names[e], .ride = "none"});
                run.after = counts_as_planned;
                assert_ok(tiny_run_on(sizes[s], &run));
                tiny_run_fini(&run);
            }
}

static ifkv_status received_nothing(ifkv_session *session) {
    return agree_true(session->engine->comm, session->bytes[IFKV_STAGE_ENCODE] == 0 &&
                                                 session->bytes[IFKV_STAGE_RECOMPUTE] == 0);
}

static void i25_empty_selection_moves_nothing(void **state) {
    (void)state;
    static const char *const names[] = {"query", "delta", "kv", "local"};
    for (int c = 0; c < N_CASE; c++)
        for (int e = 0; e < 4; e++) {
            tiny_run run = tiny_run_of(
                &cases[c],
                (ifkv_prefill_options){.ratio = "0", .exchange = names[e], .ride = "prompt"});
            run.after = received_nothing;
            assert_ok(tiny_run_on(5, &run));
            tiny_run_fini(&run);
        }
}

int main(void) {
    seed = tiny_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(i01_layer_0_equals_full_prefill),
        cmocka_unit_test(i02_ratio_one_equals_full_prefill),
        cmocka_unit_test(i02_method_all_equals_full_prefill_in_tiles_and_units),
        cmocka_unit_test(i02_full_prefill_is_the_same_bits_on_any_ranks),
        cmocka_unit_test(i03_empty_selection_leaves_the_cache_unchanged),
        cmocka_unit_test(i04_chunk_0_equals_full_prefill),
        cmocka_unit_test(i05_one_chunk_selects_nothing_and_equals_full_prefill),
        cmocka_unit_test(i06_encode_with_shift_equals_local_encode_rotated),
        cmocka_unit_test(i07_recompute_ignores_the_dealing_of_rows),
        cmocka_unit_test(i08_recompute_twice_changes_no_bit),
        cmocka_unit_test(i09_cut_after_a_row_leaves_the_rows_before_it),
        cmocka_unit_test(i09_question_rows_see_earlier_ones_as_if_they_were_context),
        cmocka_unit_test(i10_first_chunks_selected_equal_full_prefill),
        cmocka_unit_test(i11_selection_and_scores_ignore_ranks_and_placement),
        cmocka_unit_test(i11_no_bit_depends_on_the_number_of_threads),
        cmocka_unit_test(i12_rows_logits_and_answer_ignore_the_number_of_ranks),
        cmocka_unit_test(i12_tiles_units_and_tail_blocks_change_no_result),
        cmocka_unit_test(i14_delta_equals_query_equals_one_rank),
        cmocka_unit_test(i14_every_exchange_on_one_rank_gives_the_same_bits),
        cmocka_unit_test(i14_inexact_exchanges_change_selected_rows_only),
        cmocka_unit_test(i14_inexact_exchanges_are_exact_up_to_the_second_shard),
        cmocka_unit_test(auto_takes_delta_if_all_kv_fit_and_query_if_not),
        cmocka_unit_test(ranks_of_one_process_share_their_weights),
        cmocka_unit_test(i16_placement_changes_no_result),
        cmocka_unit_test(i18_score_forms_bound_each_other),
        cmocka_unit_test(i21_epic_with_heads_as_long_as_chunks_is_all),
        cmocka_unit_test(i22_same_inputs_give_the_same_bits),
        cmocka_unit_test(i23_error_on_one_rank_stops_all),
        cmocka_unit_test(i23_options_that_differ_stop_all),
        cmocka_unit_test(i24_scoring_counts_each_key_once),
        cmocka_unit_test(i25_counted_bytes_equal_section_3),
        cmocka_unit_test(i25_empty_selection_moves_nothing),
    };
    return cmocka_run_group_tests_name("invariants", tests, make_cases, free_cases);
}
