/* Rows that follow the recomputed ones: the operation against closed forms, then the invariants of
 * the pipeline that refit must keep (algorithm section 8: I2, I3, I4, I10, I11, I12).
 *
 * That a whole prefill with refit equals float64 is test_selectors.py's business. */
#include "tiny.h"

#include "error_codes.h"
#include "gen.h"
#include "model_files.h"

#define EPS 0x1p-23

enum { N_CHUNK = 5, N_SIZE = 4 };
static const int sizes[N_SIZE] = {1, 2, 3, 7};
static uint64_t seed;
static gen noise;
static char *dir, *model;
static tiny_request request;

static int setup(void **state) {
    if (dir_setup(state)) return -1;
    dir = *state;
    model = tiny_model(dir, &tiny_shapes[0], -1);
    request = tiny_request_make(&seed, tiny_shapes[0].n_vocab, 3, N_CHUNK,
                                (int64_t[]){40, 1, 90, 66, 23}, 6, 4);
    return 0;
}

static int teardown(void **state) {
    free(model);
    tiny_request_fini(&request);
    return dir_teardown(state);
}

/* ---- the operation ---- */

enum { N_HEAD = 2, D = 64, COLS = N_HEAD * D, N_ROW = 300, FIRST = 37 };

/* Rows of which each fourth from FIRST on was fitted; the truth is an affine map of each head. */
typedef struct refit_case {
    ifkv_backend *backend;
    int64_t n_fit, *row; /* [n_fit] */
    double angle[N_ROW][D / 2], w[N_HEAD][D][D], shift[COLS];
    gen_matrix stale, fresh, x, cos_sin;
    double *before, *want; /* [N_ROW, COLS] before and behind the map, rotated if the case is */
    ifkv_refit_args args;
} refit_case;

static void turn(const double *angle, double *row) {
    for (int h = 0; h < COLS; h += D)
        for (int i = 0; i < D / 2; i++) {
            const double a = row[h + i], b = row[h + D / 2 + i];
            row[h + i] = a * cos(angle[i]) - b * sin(angle[i]);
            row[h + D / 2 + i] = a * sin(angle[i]) + b * cos(angle[i]);
        }
}

static void map_row(const refit_case *it, const double *from, double *to) {
    for (int c = 0; c < COLS; c++) {
        to[c] = from[c] + it->shift[c];
        for (int a = 0; a < D; a++) to[c] += from[c / D * D + a] * it->w[c / D][a][c % D];
    }
}

static void fill(refit_case *it, bool is_rotated) {
    for (int64_t i = 0; i < N_ROW; i++) {
        double row[COLS], *before = it->before + i * COLS, *want = it->want + i * COLS;
        for (int c = 0; c < COLS; c++) row[c] = (double)(gen_below(&noise, 9) - 4);
        memcpy(before, row, sizeof row);
        map_row(it, row, want);
        for (int j = 0; j < D / 2 && is_rotated; j++) {
            it->angle[i][j] = gen_uniform(&noise, -3, 3);
            *gen_at(&it->cos_sin, i, j) = cos(it->angle[i][j]);
            *gen_at(&it->cos_sin, i, D / 2 + j) = sin(it->angle[i][j]);
        }
        if (is_rotated) turn(it->angle[i], before);
        if (is_rotated) turn(it->angle[i], want);
    }
}

static refit_case make_case(int n_thread, bool is_rotated, int64_t every) {
    refit_case it = {.row = malloc(N_ROW * sizeof *it.row),
                     .before = malloc(N_ROW * COLS * sizeof(double)),
                     .want = malloc(N_ROW * COLS * sizeof(double))};
    assert_ok(ifkv_backend_open("cpu", n_thread, 0, &it.backend));
    for (int64_t i = FIRST + 1; i < N_ROW; i += every) it.row[it.n_fit++] = i;
    const ifkv_dtype f32 = IFKV_DTYPE_F32;
    it.stale = gen_matrix_create(&noise, it.backend, f32, it.n_fit, COLS, 3, GEN_POISON);
    it.fresh = gen_matrix_create(&noise, it.backend, f32, it.n_fit, COLS, 1, GEN_POISON);
    it.x = gen_matrix_create(&noise, it.backend, f32, N_ROW, COLS, 2, GEN_POISON);
    it.cos_sin = gen_matrix_create(&noise, it.backend, f32, N_ROW, D, 0, GEN_POISON);
    for (int h = 0; h < N_HEAD; h++)
        for (int a = 0; a < D; a++)
            for (int c = 0; c < D; c++) it.w[h][a][c] = (double)(gen_below(&noise, 9) - 4) / 64;
    for (int c = 0; c < COLS; c++) it.shift[c] = (double)(gen_below(&noise, 9) - 4) / 2;
    fill(&it, is_rotated);
    for (int64_t i = 0; i < N_ROW * COLS; i++) it.x.value[i] = it.before[i];
    for (int64_t i = 0; i < it.n_fit; i++)
        for (int c = 0; c < COLS; c++) {
            *gen_at(&it.stale, i, c) = it.before[it.row[i] * COLS + c];
            *gen_at(&it.fresh, i, c) = it.want[it.row[i] * COLS + c];
        }
    gen_matrix_write(&it.stale), gen_matrix_write(&it.fresh), gen_matrix_write(&it.x);
    if (is_rotated) gen_matrix_write(&it.cos_sin);
    it.args = (ifkv_refit_args){
        .n_head = N_HEAD,
        .d_head = D,
        .ridge = 1e-10,
        .stale = it.stale.view,
        .fresh = it.fresh.view,
        .row = it.row,
        .first = FIRST,
        .cos_sin = is_rotated ? it.cos_sin.view : (ifkv_view){0},
        .x = it.x.view,
        .scratch = malloc(N_HEAD * (size_t)ifkv_refit_scratch(D) * sizeof(double)),
    };
    return it;
}

static void free_case(refit_case *it) {
    gen_matrix_destroy(&it->stale), gen_matrix_destroy(&it->fresh);
    gen_matrix_destroy(&it->x), gen_matrix_destroy(&it->cos_sin);
    free(it->args.scratch);
    free(it->row);
    free(it->before);
    free(it->want);
    ifkv_backend_close(it->backend);
}

static bool is_fitted(const refit_case *it, int64_t row) {
    for (int64_t i = 0; i < it->n_fit; i++)
        if (it->row[i] == row) return true;
    return false;
}

/* Rows that stay are bits; the others follow the map.  Products of d_head terms in float32 err by
 * at most (d_head + 1) EPS / 2 of the sum of their absolute values.  Around them lie the turns
 * there and back and the roundings of what was fitted, at most ten more of EPS / 2; twice the sum
 * covers that a turn mixes two columns. */
static void assert_moved(refit_case *it) {
    assert_true(gen_matrix_read(&it->x));
    for (int64_t i = 0; i < N_ROW; i++)
        for (int h = 0; h < N_HEAD; h++) {
            double size = 0;
            for (int a = 0; a < D; a++)
                size += fabs(it->before[i * COLS + h * D + a]) * 4 / 64; /* largest |w| */
            const double tolerance = (D + 11) * EPS * (size + 2 + 4 * sqrt(2));
            for (int c = h * D; c < (h + 1) * D; c++) {
                const double got = *gen_at(&it->x, i, c);
                if (i < FIRST || is_fitted(it, i))
                    assert_true(got == (double)(float)it->before[i * COLS + c]);
                else
                    assert_within(fabs(got - it->want[i * COLS + c]), tolerance);
            }
        }
}

/* 132 rows tell 64 coefficients and a shift apart; the ridge is below what float32 can see. */
static void rows_follow_an_affine_map(void **state) {
    (void)state;
    for (int is_rotated = 0; is_rotated < 2; is_rotated++) {
        refit_case it = make_case(2, is_rotated, 2);
        assert_ok(it.backend->ops->refit(it.backend, &it.args));
        assert_moved(&it);
        free_case(&it);
    }
}

static void one_row_moves_all_as_it_moved(void **state) {
    (void)state;
    refit_case it = make_case(1, false, N_ROW);
    assert_int_equal(it.n_fit, 1);
    for (int64_t i = 0; i < N_ROW; i++)
        for (int c = 0; c < COLS; c++)
            it.want[i * COLS + c] =
                it.before[i * COLS + c] + *gen_at(&it.fresh, 0, c) - *gen_at(&it.stale, 0, c);
    assert_ok(it.backend->ops->refit(it.backend, &it.args));
    assert_moved(&it);
    free_case(&it);
}

static void no_rows_move_nothing(void **state) {
    (void)state;
    refit_case it = make_case(1, true, 5);
    it.args.stale.n_row = it.args.fresh.n_row = 0;
    assert_ok(it.backend->ops->refit(it.backend, &it.args));
    assert_true(gen_matrix_read(&it.x));
    for (int64_t i = 0; i < N_ROW * COLS; i++)
        assert_true(it.x.value[i] == (double)(float)it.before[i]);
    free_case(&it);
}

static void bits_ignore_thread_count(void **state) {
    (void)state;
    const gen start = noise;
    refit_case one = make_case(1, true, 3);
    assert_ok(one.backend->ops->refit(one.backend, &one.args));
    assert_true(gen_matrix_read(&one.x));
    for (int n_thread = 2; n_thread <= 5; n_thread += 3) {
        noise = start;
        refit_case it = make_case(n_thread, true, 3);
        assert_ok(it.backend->ops->refit(it.backend, &it.args));
        assert_true(gen_matrix_read(&it.x));
        assert_memory_equal(it.x.value, one.x.value, N_ROW * COLS * sizeof(double));
        free_case(&it);
    }
    free_case(&one);
}

static void operands_that_do_not_fit_are_refused(void **state) {
    (void)state;
    refit_case it = make_case(1, true, 3);
    const ifkv_backend_ops *ops = it.backend->ops;
    ifkv_refit_args bad = it.args;
    bad.fresh.n_row--;
    assert_fails(ops->refit(it.backend, &bad), IFKV_ERR_INTERNAL, IFKV_E_SHAPE, "refit: fresh");
    bad = it.args;
    bad.cos_sin.n_row--;
    assert_fails(ops->refit(it.backend, &bad), IFKV_ERR_INTERNAL, IFKV_E_SHAPE, "refit: cos_sin");
    it.row[2] = it.row[1];
    assert_fails(ops->refit(it.backend, &it.args), IFKV_ERR_INTERNAL, IFKV_E_SHAPE, "row[2]");
    it.row[2] = N_ROW;
    assert_fails(ops->refit(it.backend, &it.args), IFKV_ERR_INTERNAL, IFKV_E_SHAPE, "row[2]");
    free_case(&it);
}

/* ---- the pipeline ---- */

static tiny_run run_of(ifkv_prefill_options options) {
    return (tiny_run){
        .model = model, .weight_seed = seed, .request = &request.request, .options = options};
}

static tiny_run prefill(int size, ifkv_prefill_options options) {
    tiny_run run = run_of(options);
    assert_ok(tiny_run_on(size, &run));
    return run;
}

static void i02_all_equals_full_prefill(void **state) {
    (void)state;
    tiny_run full = prefill(1, (ifkv_prefill_options){.method = "full"});
    for (int s = 0; s < N_SIZE; s++) {
        tiny_run all = prefill(sizes[s], (ifkv_prefill_options){.method = "all", .refit = true});
        assert_within(tiny_rows_error(&all, &full, 0, full.n_context), TINY_TOLERANCE);
        assert_within(tiny_error(all.logits, full.logits, full.n_vocab), TINY_TOLERANCE);
        tiny_run_fini(&all);
    }
    tiny_run_fini(&full);
}

static void i03_empty_selection_leaves_the_cache_unchanged(void **state) {
    (void)state;
    for (int s = 0; s < N_SIZE; s++) {
        tiny_run none = prefill(sizes[s], (ifkv_prefill_options){.method = "none"});
        tiny_run run = prefill(sizes[s], (ifkv_prefill_options){.ratio = "0", .refit = true});
        assert_true(tiny_same_rows(&run, &none));
        tiny_run_fini(&run);
        tiny_run_fini(&none);
    }
}

/* Rows of chunks 0 .. m see fresh rows only; those behind are moved. */
static void i04_i10_first_chunks_equal_full_prefill_and_the_rest_moves(void **state) {
    (void)state;
    const int64_t first = tiny_request_end(&request, 0);
    int64_t *selected = malloc((size_t)request.n_context * sizeof *selected);
    for (int64_t i = first; i < request.n_context; i++) selected[i - first] = i;
    tiny_run full = prefill(1, (ifkv_prefill_options){.method = "full"});
    for (int s = 0; s < N_SIZE; s++)
        for (int64_t m = 1; m + 1 < N_CHUNK; m++) {
            const int64_t end = tiny_request_end(&request, m);
            ifkv_prefill_options options = {.selected = selected, .n_selected = end - first};
            tiny_run plain = prefill(sizes[s], options);
            options.refit = true;
            tiny_run run = prefill(sizes[s], options);
            assert_within(tiny_rows_error(&run, &full, 0, end), TINY_TOLERANCE);
            assert_true(tiny_rows_error(&run, &plain, end, run.n_context) > 1e-3);
            tiny_run_fini(&run);
            tiny_run_fini(&plain);
        }
    tiny_run_fini(&full);
    free(selected);
}

static void i11_no_bit_depends_on_the_number_of_threads(void **state) {
    (void)state;
    const ifkv_prefill_options options = {.ratio = "0.25", .refit = true};
    for (int size = 1; size <= 2; size++) {
        tiny_run one = prefill(size, options), three = run_of(options);
        three.n_thread = 3;
        assert_ok(tiny_run_on(size, &three));
        assert_true(tiny_same_rows(&three, &one));
        assert_memory_equal(three.logits, one.logits, (size_t)one.n_vocab * sizeof *one.logits);
        tiny_run_fini(&three);
        tiny_run_fini(&one);
    }
}

static void i12_rows_and_logits_ignore_the_number_of_ranks(void **state) {
    (void)state;
    static const char *const ratios[] = {"0.001", "0.1", "0.5"};
    for (int r = 0; r < 3; r++) {
        const ifkv_prefill_options options = {.ratio = ratios[r], .refit = true};
        tiny_run one = prefill(0, options);
        for (int s = 0; s < N_SIZE; s++) {
            tiny_run run = prefill(sizes[s], options);
            assert_true(run.selected_digest == one.selected_digest);
            assert_within(tiny_rows_error(&run, &one, 0, one.n_context), TINY_TOLERANCE);
            assert_within(tiny_error(run.logits, one.logits, one.n_vocab), TINY_TOLERANCE);
            tiny_run_fini(&run);
        }
        tiny_run_fini(&one);
    }
}

static void exchanges_without_the_whole_context_are_refused(void **state) {
    (void)state;
    static const char *const names[] = {"query", "kv", "local"};
    for (int e = 0; e < 3; e++) {
        const ifkv_prefill_options options = {.exchange = names[e], .refit = true};
        tiny_run several = run_of(options), one = prefill(1, options);
        assert_fails(tiny_run_on(2, &several), IFKV_ERR_USAGE, IFKV_E_VALUE, "expected delta");
        tiny_run_fini(&several);
        tiny_run_fini(&one);
    }
}

int main(int argc, char **argv) {
    (void)argc;
    seed = tiny_seed();
    noise = gen_create(argv[0]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rows_follow_an_affine_map),
        cmocka_unit_test(one_row_moves_all_as_it_moved),
        cmocka_unit_test(no_rows_move_nothing),
        cmocka_unit_test(bits_ignore_thread_count),
        cmocka_unit_test(operands_that_do_not_fit_are_refused),
        cmocka_unit_test(i02_all_equals_full_prefill),
        cmocka_unit_test(i03_empty_selection_leaves_the_cache_unchanged),
        cmocka_unit_test(i04_i10_first_chunks_equal_full_prefill_and_the_rest_moves),
        cmocka_unit_test(i11_no_bit_depends_on_the_number_of_threads),
        cmocka_unit_test(i12_rows_and_logits_ignore_the_number_of_ranks),
        cmocka_unit_test(exchanges_without_the_whole_context_are_refused),
    };
    return cmocka_run_group_tests_name("refit", tests, setup, teardown);
}
