/* Conformance of a back end, second part: attention over spans, merge of partial results, scores.
 *
 *   test_attention cpu | cuda
 *
 * Against float64 computations from the definitions, written here.  Inputs are uniform in [-1, 1),
 * so a scaled score s = q.k / sqrt(d) has deviation 1/3 and errs by about EPS: d roundings of
 * partial sums that grow to it.  The tolerances below are that, the 2 ulp of the exponential and
 * the roundings of a sum over the span, times a factor of about ten deviations.  A back end of
 * bfloat16 multiplies V with probabilities rounded to it, each within 2^-8: no output is off by
 * more than 2^-8, the largest |v| being 1, besides its own rounding. */
#include "conformance.h"

#include "attention_problem.h"

/* What probabilities and result lose where K/V have this type, beyond float32. */
static double narrowing(ifkv_dtype kv, ifkv_dtype to, double want) {
    return (kv == IFKV_DTYPE_BF16 ? 0x1p-8 : 0) + (to == IFKV_DTYPE_BF16 ? 0x1p-8 * fabs(want) : 0);
}

/* Heads that the back end computes; others are refused by prepare, which has its own test. */
static bool is_served(heads h) {
    return is_cpu() || (h.d_head % 16 == 0 && h.d_head <= 128);
}

static problem problem_create_to(ifkv_backend *backend, ifkv_dtype to, heads h, int64_t n_row,
                                 int64_t n_key) {
    const ifkv_dtype dtype = backend->ops->dtype;
    const int64_t q_cols = (int64_t)h.n_head * h.d_head, kv_cols = (int64_t)h.n_kv_head * h.d_head;
    problem p = {.h = h, .n_row = n_row, .n_key = n_key};
    /* only the CPU reads rows that begin anywhere; results may lie anywhere */
    gen_matrix (*create)(gen *, ifkv_backend *, ifkv_dtype, int64_t, int64_t, int64_t, gen_fill) =
        is_cpu() ? gen_matrix_create : gen_matrix_create_aligned;
    p.q = create(&noise, backend, dtype, n_row, q_cols, 3, GEN_UNIFORM);
    p.k = create(&noise, backend, dtype, n_key, kv_cols, 5, GEN_UNIFORM);
    p.v = create(&noise, backend, dtype, n_key, kv_cols, 1, GEN_UNIFORM);
    p.out = gen_matrix_create(&noise, backend, to, n_row, q_cols, 2, GEN_POISON);
    p.lse = gen_matrix_create(&noise, backend, IFKV_DTYPE_F32, n_row, h.n_head, 1, GEN_POISON);
    p.begin = calloc((size_t)n_row + 1, sizeof *p.begin);
    p.end = calloc((size_t)n_row + 1, sizeof *p.end);
    assert_true(p.begin && p.end);
    assert_ok(backend->ops->prepare(backend, h.n_head, h.n_kv_head, h.d_head));
    return p;
}

static problem problem_create(ifkv_backend *backend, heads h, int64_t n_row, int64_t n_key) {
    return problem_create_to(backend, backend->ops->dtype, h, n_row, n_key);
}

/* Attend rows [row, row + n) of the problem into the same rows of its results. */
static void attend_rows(ifkv_backend *backend, problem *p, int64_t row, int64_t n) {
    const ifkv_attention_args args = problem_rows(p, row, n);
    assert_ok(backend->ops->attention(backend, &args));
    assert_ok(backend->ops->sync(backend)); /* need not be the one that reads */
    problem_read(p, &args);
}

static double score_of(const problem *p, int64_t row, int head, int64_t key) {
    const int d = p->h.d_head, kv = head / (p->h.n_head / p->h.n_kv_head);
    double s = 0;
    for (int c = 0; c < d; c++)
        s += *gen_at(&p->q, row, (int64_t)head * d + c) * *gen_at(&p->k, key, (int64_t)kv * d + c);
    return s * (double)(float)(1 / sqrt((double)d));
}

/* The definition, for one row and head: out [d_head] and the log-sum-exp. */
static double attend_naively(const problem *p, int64_t row, int head, double *out) {
    const int d = p->h.d_head, kv = head / (p->h.n_head / p->h.n_kv_head);
    double total = 0;
    for (int c = 0; c < d; c++) out[c] = 0;
    for (int64_t key = p->begin[row]; key < p->end[row]; key++) {
        const double e = exp(score_of(p, row, head, key)); /* |s| <= sqrt(d): no overflow */
        total += e;
        for (int c = 0; c < d; c++) out[c] += e * *gen_at(&p->v, key, (int64_t)kv * d + c);
    }
    for (int c = 0; c < d && total > 0; c++) out[c] /= total;
    return log(total);
}

static void check_against_naive(const problem *p) {
    double want[256];
    for (int64_t row = 0; row < p->n_row; row++)
        for (int head = 0; head < p->h.n_head; head++) {
            const double lse = attend_naively(p, row, head, want);
            const int64_t span = p->end[row] - p->begin[row];
            const double tolerance = EPS * (12 + 4 * sqrt((double)span / (double)(span + 64)));
            for (int c = 0; c < p->h.d_head; c++)
                assert_near(*gen_at(&p->out, row, (int64_t)head * p->h.d_head + c), want[c],
                            tolerance + narrowing(p->k.view.dtype, p->out.view.dtype, want[c]),
                            "attention", row, (int64_t)head * p->h.d_head + c);
            assert_near(*gen_at(&p->lse, row, head), lse, EPS * (12 + fabs(lse)), "lse", row, head);
        }
}

static const heads all_heads[] = {{3, 3, 64}, {9, 3, 64},  {5, 1, 128}, {16, 2, 128},
                                  {6, 2, 96}, {7, 1, 256}, {2, 1, 2},   {4, 4, 1}};

/* Into the back end's type, and into float32 as partial results are. */
static void causal_attention_matches_float64(void **state) {
    ifkv_backend *backend = *state;
    const ifkv_dtype to[] = {backend->ops->dtype, IFKV_DTYPE_F32};
    for (size_t i = 0; i < 2 * sizeof all_heads / sizeof *all_heads; i++) {
        if (!is_served(all_heads[i / 2])) continue;
        const int64_t n = 1 + gen_below(&noise, 200);
        problem p = problem_create_to(backend, to[i % 2], all_heads[i / 2], n, n);
        for (int64_t r = 0; r < n; r++) p.end[r] = r + 1;
        attend_rows(backend, &p, 0, n);
        check_against_naive(&p);
        problem_destroy(&p);
    }
}

/* Spans across several key blocks, groups with begins of their own, rows that see nothing. */
static void any_spans_match_float64(void **state) {
    for (size_t i = 0; i < sizeof all_heads / sizeof *all_heads; i++) {
        if (!is_served(all_heads[i])) continue;
        const int64_t n_row = 90, n_key = 1100;
        problem p = problem_create(*state, all_heads[i], n_row, n_key);
        int64_t begin = 0, end = 0;
        for (int64_t r = 0; r < n_row; r++) {
            if (r % 31 == 0) begin = end = gen_below(&noise, n_key);
            if (r % 31 > 2) end += gen_below(&noise, 1 + (n_key - end) / 4);
            p.begin[r] = begin;
            p.end[r] = r % 31 == 30 ? n_key : end;
        }
        attend_rows(*state, &p, 0, n_row);
        check_against_naive(&p);
        problem_destroy(&p);
    }
}

static void ends_need_not_ascend(void **state) {
    problem p = problem_create(*state, (heads){9, 3, 64}, 100, 700);
    for (int64_t r = 0; r < 100; r++) p.end[r] = gen_below(&noise, 701);
    attend_rows(*state, &p, 0, 100);
    check_against_naive(&p);
    problem_destroy(&p);
}

static void one_key_gives_its_value_bitwise(void **state) {
    problem p = problem_create(*state, (heads){6, 2, 64}, 50, 50);
    for (int64_t r = 0; r < 50; r++) p.begin[r] = r, p.end[r] = r + 1;
    attend_rows(*state, &p, 0, 50);
    for (int64_t r = 0; r < 50; r++)
        for (int64_t c = 0; c < 6 * 64; c++)
            assert_true(*gen_at(&p.out, r, c) == *gen_at(&p.v, r, c / 64 / 3 * 64 + c % 64));
    check_against_naive(&p);
    problem_destroy(&p);
}

/* Equal keys weigh the same: the mean of 1024 integers and ln 1024, with no rounding in the sum;
 * the logarithm itself may be off by an ulp. */
static void equal_keys_give_the_mean_exactly(void **state) {
    problem p = problem_create(*state, (heads){4, 2, 64}, 3, 1024);
    for (int64_t i = 0; i < 1024 * 128; i++) p.k.value[i] = 0;
    for (int64_t i = 0; i < 1024 * 128; i++) p.v.value[i] = (double)(gen_below(&noise, 9) - 4);
    gen_matrix_write(&p.k);
    gen_matrix_write(&p.v);
    for (int64_t r = 0; r < 3; r++) p.end[r] = 1024;
    attend_rows(*state, &p, 0, 3);
    for (int64_t c = 0; c < 4 * 64; c++) {
        double sum = 0;
        for (int64_t key = 0; key < 1024; key++) sum += *gen_at(&p.v, key, c / 128 * 64 + c % 64);
        for (int64_t r = 0; r < 3; r++)
            assert_true(*gen_at(&p.out, r, c) == gen_round(p.out.view.dtype, sum / 1024));
    }
    for (int64_t i = 0; i < 3 * 4; i++)
        assert_near(p.lse.value[i], log(1024.0), 8 * EPS, "lse", i / 4, i % 4);
    problem_destroy(&p);
}

static void empty_span_gives_zero_and_minus_infinity(void **state) {
    for (int64_t n_key = 0; n_key < 8; n_key += 7) {
        problem p = problem_create(*state, (heads){9, 3, 64}, 5, n_key);
        for (int64_t r = 0; r < 5; r++) p.begin[r] = p.end[r] = n_key / 2;
        attend_rows(*state, &p, 0, 5);
        for (int64_t i = 0; i < 5 * 9 * 64; i++) assert_true(p.out.value[i] == 0);
        for (int64_t i = 0; i < 5 * 9; i++) assert_true(p.lse.value[i] == -INFINITY);
        problem_destroy(&p);
    }
    problem none = problem_create(*state, (heads){9, 3, 64}, 1, 4);
    attend_rows(*state, &none, 0, 0);
    assert_true(isnan(none.out.value[0]));
    problem_destroy(&none);
}

static void keys_outside_the_union_are_not_read(void **state) {
    problem p = problem_create(*state, (heads){9, 3, 64}, 40, 900);
    for (int64_t r = 0; r < 40; r++) p.begin[r] = 100, p.end[r] = 700 + r;
    for (int64_t key = 0; key < 900; key++)
        for (int64_t c = 0; c < 3 * 64 && (key < 100 || key >= 739); c++)
            *gen_at(&p.k, key, c) = *gen_at(&p.v, key, c) = (double)NAN;
    gen_matrix_write(&p.k);
    gen_matrix_write(&p.v);
    attend_rows(*state, &p, 0, 40);
    check_against_naive(&p);
    problem_destroy(&p);
}

static void a_nan_is_not_hidden(void **state) {
    problem p = problem_create(*state, (heads){9, 3, 64}, 4, 600);
    for (int64_t r = 0; r < 4; r++) p.end[r] = 600;
    *gen_at(&p.k, 555, 3) = (double)NAN;
    gen_matrix_write(&p.k);
    attend_rows(*state, &p, 0, 4);
    assert_true(isnan(*gen_at(&p.out, 2, 0)) && isnan(*gen_at(&p.lse, 2, 0)));
    assert_false(isnan(*gen_at(&p.out, 2, 8 * 64)));
    problem_destroy(&p);
}

/* The bits of a chunk's rows are those it has alone. */
static void a_group_ignores_its_neighbours(void **state) {
    const heads some[] = {{9, 3, 64}, {5, 1, 128}, {8, 8, 96}};
    for (size_t i = 0; i < sizeof some / sizeof *some; i++) {
        const int64_t cut[] = {0, 1, 130, 131, 700, 943};
        problem p = problem_create(*state, some[i], 943, 943);
        for (int g = 0; g < 5; g++)
            for (int64_t r = cut[g]; r < cut[g + 1]; r++) p.begin[r] = cut[g], p.end[r] = r + 1;
        attend_rows(*state, &p, 0, 943);
        unsigned char *together = malloc(p.out.bytes), *lse = malloc(p.lse.bytes);
        memcpy(together, p.out.image, p.out.bytes);
        memcpy(lse, p.lse.image, p.lse.bytes);
        for (int g = 4; g >= 0; g--) attend_rows(*state, &p, cut[g], cut[g + 1] - cut[g]);
        assert_memory_equal(together, p.out.image, p.out.bytes);
        assert_memory_equal(lse, p.lse.image, p.lse.bytes);
        free(together), free(lse);
        problem_destroy(&p);
    }
}

static void merge_parts(ifkv_backend *backend, heads h, int n_part,
                        const gen_matrix *const *out_part, const gen_matrix *const *lse_part,
                        gen_matrix *out, gen_matrix *lse) {
    ifkv_view out_view[4], lse_view[4];
    for (int i = 0; i < n_part; i++) {
        if (out_part) out_view[i] = out_part[i]->view;
        lse_view[i] = lse_part[i]->view;
    }
    ifkv_merge_args args = {.n_head = h.n_head,
                            .d_head = h.d_head,
                            .n_part = n_part,
                            .out_part = out_part ? out_view : NULL,
                            .lse_part = lse_view};
    if (out) args.out = out->view;
    if (lse) args.lse = lse->view;
    assert_ok(backend->ops->merge(backend, &args));
    if (out) assert_true(gen_matrix_read(out));
    if (lse) assert_true(gen_matrix_read(lse));
}

/* I13: a span cut anywhere into three, parts in any order, is the span. */
static void a_span_may_be_cut_anywhere(void **state) {
    ifkv_backend *backend = *state;
    const heads h = {9, 3, 64};
    const int64_t n = 37, n_key = 777;
    problem whole = problem_create_to(backend, IFKV_DTYPE_F32, h, n, n_key);
    int64_t first[37], second[37];
    for (int64_t r = 0; r < n; r++) {
        whole.end[r] = n_key - n + r + 1;
        first[r] = gen_below(&noise, whole.end[r] + 1);
        second[r] = first[r] + gen_below(&noise, whole.end[r] - first[r] + 1);
    }
    attend_rows(backend, &whole, 0, n);
    problem part[3];
    for (int i = 0; i < 3; i++) {
        part[i] = problem_create_to(backend, IFKV_DTYPE_F32, h, n, n_key);
        gen_matrix *const to[] = {&part[i].q, &part[i].k, &part[i].v};
        const gen_matrix *const from[] = {&whole.q, &whole.k, &whole.v};
        for (int m = 0; m < 3; m++) {
            const int64_t count = from[m]->view.n_row * from[m]->view.n_col;
            memcpy(to[m]->value, from[m]->value, (size_t)count * sizeof(double));
            gen_matrix_write(to[m]);
        }
        for (int64_t r = 0; r < n; r++) {
            part[i].begin[r] = i == 0 ? 0 : i == 1 ? first[r] : second[r];
            part[i].end[r] = i == 0 ? first[r] : i == 1 ? second[r] : whole.end[r];
        }
        attend_rows(backend, &part[i], 0, n);
    }
    const int orders[][3] = {{0, 1, 2}, {2, 1, 0}, {1, 2, 0}};
    for (int o = 0; o < 3; o++) {
        const gen_matrix *outs[3], *lses[3];
        for (int i = 0; i < 3; i++)
            outs[i] = &part[orders[o][i]].out, lses[i] = &part[orders[o][i]].lse;
        gen_matrix out =
            gen_matrix_create(&noise, backend, IFKV_DTYPE_F32, n, 9 * 64, 1, GEN_POISON);
        gen_matrix lse = gen_matrix_create(&noise, backend, IFKV_DTYPE_F32, n, 9, 1, GEN_POISON);
        merge_parts(backend, h, 3, outs, lses, &out, &lse);
        for (int64_t i = 0; i < n * 9 * 64; i++)
            assert_near(out.value[i], whole.out.value[i],
                        24 * EPS + 2 * narrowing(whole.k.view.dtype, IFKV_DTYPE_F32, 0), "cut span",
                        i / 576, i % 576);
        for (int64_t i = 0; i < n * 9; i++)
            assert_near(lse.value[i], whole.lse.value[i], EPS * (16 + fabs(lse.value[i])), "lse",
                        i / 9, i % 9);
        gen_matrix_destroy(&out), gen_matrix_destroy(&lse);
    }
    for (int i = 0; i < 3; i++) problem_destroy(&part[i]);
    problem_destroy(&whole);
}

enum { M_ROW = 11, M_HEAD = 3, M_DIM = 40, M_COL = M_HEAD * M_DIM };
static const heads merge_heads = {M_HEAD, 1, M_DIM};

/* A random part; every empty_every-th row saw no key, and its output is then poison. */
static void create_part(ifkv_backend *backend, ifkv_dtype dtype, int empty_every, gen_matrix *out,
                        gen_matrix *lse) {
    *out = gen_matrix_create(&noise, backend, dtype, M_ROW, M_COL, 2, GEN_UNIFORM);
    *lse = gen_matrix_create(&noise, backend, dtype, M_ROW, M_HEAD, 1, GEN_UNIFORM);
    for (int64_t r = 0; r < M_ROW; r++)
        for (int64_t h = 0; h < M_HEAD; h++) {
            *gen_at(lse, r, h) *= 5;
            if ((r + h) % empty_every) continue;
            *gen_at(lse, r, h) = -INFINITY;
            for (int64_t c = 0; c < M_DIM; c++) *gen_at(out, r, h * M_DIM + c) = (double)NAN;
        }
    gen_matrix_write(out);
    gen_matrix_write(lse);
}

/* Float64 inside: four terms of at most 1 round at 2^-53, then the type of the output once. */
static void merge_matches_float64(void **state) {
    ifkv_backend *backend = *state;
    for (int way = 0; way < 6; way++) {
        const ifkv_dtype in = way & 1 ? IFKV_DTYPE_F64 : IFKV_DTYPE_F32,
                         lse_to = way & 2 ? IFKV_DTYPE_F64 : IFKV_DTYPE_F32,
                         to = way < 4 ? lse_to : backend->ops->dtype;
        const double unit = way & 2 ? 0x1p-50 : EPS / 2 + 0x1p-50;
        gen_matrix part[4], lse_part[4];
        const gen_matrix *outs[4], *lses[4];
        for (int i = 0; i < 4; i++) {
            create_part(backend, i == 3 ? IFKV_DTYPE_F64 : in, 2 + i, &part[i], &lse_part[i]);
            outs[i] = &part[i], lses[i] = &lse_part[i];
        }
        gen_matrix out = gen_matrix_create(&noise, backend, to, M_ROW, M_COL, 1, GEN_POISON);
        gen_matrix lse = gen_matrix_create(&noise, backend, lse_to, M_ROW, M_HEAD, 3, GEN_POISON);
        gen_matrix lse_alone =
            gen_matrix_create(&noise, backend, lse_to, M_ROW, M_HEAD, 0, GEN_POISON);
        merge_parts(backend, merge_heads, 4, outs, lses, &out, &lse);
        merge_parts(backend, merge_heads, 4, NULL, lses, NULL, &lse_alone);
        for (int64_t r = 0; r < M_ROW; r++)
            for (int64_t c = 0; c < M_COL; c++) {
                const int64_t h = c / M_DIM;
                double total = 0, sum = 0;
                for (int i = 0; i < 4; i++) {
                    const double w = exp(*gen_at(lses[i], r, h));
                    total += w;
                    if (w > 0) sum += w * *gen_at(outs[i], r, c);
                }
                const double want = total > 0 ? sum / total : 0;
                assert_near(*gen_at(&out, r, c), want,
                            unit * fabs(want) + 0x1p-50 + narrowing(IFKV_DTYPE_F32, to, want),
                            "merge", r, c);
                assert_near(*gen_at(&lse, r, h), log(total), unit * (1 + fabs(log(total))), "lse",
                            r, h);
                assert_true(*gen_at(&lse_alone, r, h) == *gen_at(&lse, r, h));
            }
        for (int i = 0; i < 4; i++) gen_matrix_destroy(&part[i]), gen_matrix_destroy(&lse_part[i]);
        gen_matrix_destroy(&out), gen_matrix_destroy(&lse), gen_matrix_destroy(&lse_alone);
    }
}

/* Two orders of a pair differ in no bit, two groupings of three by rounding; the empty part is
 * neutral bitwise; the output may be part 0. */
static void merge_is_a_commutative_monoid(void **state) {
    ifkv_backend *backend = *state;
    gen_matrix a, b, c, empty, la, lb, lc, lempty, out[3], lse[3];
    create_part(backend, IFKV_DTYPE_F32, 4, &a, &la);
    create_part(backend, IFKV_DTYPE_F32, 4, &b, &lb); /* empty where a is */
    create_part(backend, IFKV_DTYPE_F32, 3, &c, &lc);
    create_part(backend, IFKV_DTYPE_F32, 1, &empty, &lempty);
    for (int i = 0; i < 3; i++) {
        out[i] = gen_matrix_create(&noise, backend, IFKV_DTYPE_F32, M_ROW, M_COL, 1, GEN_POISON);
        lse[i] = gen_matrix_create(&noise, backend, IFKV_DTYPE_F32, M_ROW, M_HEAD, 1, GEN_POISON);
    }
    const gen_matrix *const ab[] = {&a, &b}, *const lab[] = {&la, &lb};
    const gen_matrix *const ba[] = {&b, &a}, *const lba[] = {&lb, &la};
    merge_parts(backend, merge_heads, 2, ab, lab, &out[0], &lse[0]);
    merge_parts(backend, merge_heads, 2, ba, lba, &out[1], &lse[1]);
    assert_memory_equal(out[0].image, out[1].image, out[0].bytes);
    assert_memory_equal(lse[0].image, lse[1].image, lse[0].bytes);
    for (int64_t r = 0; r < M_ROW; r++)
        for (int64_t h = 0; h < M_HEAD; h++)
            if ((r + h) % 4 == 0)
                assert_true(*gen_at(&lse[0], r, h) == -INFINITY &&
                            *gen_at(&out[0], r, h * M_DIM) == 0);

    const gen_matrix *const ab_c[] = {&out[0], &c}, *const lab_c[] = {&lse[0], &lc};
    const gen_matrix *const bc[] = {&b, &c}, *const lbc[] = {&lb, &lc};
    const gen_matrix *const a_bc[] = {&a, &out[2]}, *const la_bc[] = {&la, &lse[2]};
    merge_parts(backend, merge_heads, 2, ab_c, lab_c, &out[1], &lse[1]);
    merge_parts(backend, merge_heads, 2, bc, lbc, &out[2], &lse[2]);
    merge_parts(backend, merge_heads, 2, a_bc, la_bc, &out[2], &lse[2]);
    for (int64_t i = 0; i < M_ROW * M_COL; i++)
        assert_near(out[2].value[i], out[1].value[i], 8 * EPS, "grouping", i / M_COL, i % M_COL);
    for (int64_t i = 0; i < M_ROW * M_HEAD; i++)
        assert_near(lse[2].value[i], lse[1].value[i], 8 * EPS * (1 + fabs(lse[1].value[i])), "lse",
                    i, 0);

    const gen_matrix *const ec[] = {&empty, &c}, *const lec[] = {&lempty, &lc};
    const gen_matrix *const only[] = {&c}, *const lonly[] = {&lc};
    merge_parts(backend, merge_heads, 2, ec, lec, &out[0], &lse[0]);
    merge_parts(backend, merge_heads, 1, only, lonly, &c, &lc); /* in place */
    assert_memory_equal(lse[0].value, lc.value, sizeof(double) * M_ROW * M_HEAD);
    assert_memory_equal(out[0].value, c.value, sizeof(double) * M_ROW * M_COL);
    gen_matrix *const all[] = {&a, &b, &c, &empty, &la, &lb, &lc, &lempty};
    for (int i = 0; i < 8; i++) gen_matrix_destroy(all[i]);
    for (int i = 0; i < 3; i++) gen_matrix_destroy(&out[i]), gen_matrix_destroy(&lse[i]);
}

static void merge_of_nothing_is_the_empty_part(void **state) {
    ifkv_backend *backend = *state;
    gen_matrix out, lse;
    create_part(backend, IFKV_DTYPE_F32, 2, &out, &lse);
    merge_parts(backend, merge_heads, 0, NULL, NULL, &out, &lse);
    for (int64_t i = 0; i < M_ROW * M_COL; i++) assert_true(out.value[i] == 0);
    for (int64_t i = 0; i < M_ROW * M_HEAD; i++) assert_true(lse.value[i] == -INFINITY);
    gen_matrix_destroy(&out), gen_matrix_destroy(&lse);
}

static void merge_survives_extremes(void **state) {
    ifkv_backend *backend = *state;
    gen_matrix a, b, la, lb;
    create_part(backend, IFKV_DTYPE_F64, 1000, &a, &la);
    create_part(backend, IFKV_DTYPE_F64, 1000, &b, &lb);
    gen_matrix out =
        gen_matrix_create(&noise, backend, IFKV_DTYPE_F64, M_ROW, M_COL, 1, GEN_POISON);
    gen_matrix lse =
        gen_matrix_create(&noise, backend, IFKV_DTYPE_F64, M_ROW, M_HEAD, 1, GEN_POISON);
    for (int64_t i = 0; i < M_ROW * M_HEAD; i++)
        la.value[i] = 1e4, lb.value[i] = i % 2 ? -1e4 : 1e4;
    *gen_at(&lb, 5, 0) = *gen_at(&lb, 6, 0) = (double)NAN;
    *gen_at(&la, 6, 0) = -INFINITY; /* a NaN is not an empty part either */
    gen_matrix_write(&la);
    gen_matrix_write(&lb);
    const gen_matrix *const ab[] = {&a, &b}, *const lab[] = {&la, &lb};
    merge_parts(backend, merge_heads, 2, ab, lab, &out, &lse);
    for (int64_t r = 1; r < M_ROW; r++) {
        const double x = *gen_at(&a, r, M_DIM), y = *gen_at(&b, r, M_DIM);
        const bool alone = (r * M_HEAD + 1) % 2;
        assert_near(*gen_at(&out, r, M_DIM), alone ? x : (x + y) / 2, 0x1p-50, "extreme", r, M_DIM);
        assert_near(*gen_at(&lse, r, 1), alone ? 1e4 : 1e4 + log(2.0), 1e-11, "lse", r, 1);
    }
    for (int64_t r = 5; r < 7; r++)
        assert_true(isnan(*gen_at(&lse, r, 0)) && isnan(*gen_at(&out, r, 0)));
    gen_matrix_destroy(&a), gen_matrix_destroy(&b), gen_matrix_destroy(&la),
        gen_matrix_destroy(&lb);
    gen_matrix_destroy(&out), gen_matrix_destroy(&lse);
}

static const ifkv_score_form forms[] = {IFKV_SCORE_L2, IFKV_SCORE_L1, IFKV_SCORE_MASS,
                                        IFKV_SCORE_L2H};

/* Score the keys of p, whose lse is known, adding to `start` in every key; got [n_key]. */
static void score_keys(ifkv_backend *backend, const problem *p, ifkv_score_form form, float weight,
                       const int64_t *block, int64_t n_block, float start, float *got) {
    const size_t bytes = (size_t)p->n_key * sizeof *got;
    for (int64_t i = 0; i < p->n_key; i++) got[i] = start;
    float *score = gen_upload(backend, got, bytes);
    const ifkv_score_args args = {.n_head = p->h.n_head,
                                  .n_kv_head = p->h.n_kv_head,
                                  .d_head = p->h.d_head,
                                  .scale = (float)(1 / sqrt((double)p->h.d_head)),
                                  .weight = weight,
                                  .form = form,
                                  .q = p->q.view,
                                  .lse = p->lse.view,
                                  .k = p->k.view,
                                  .block = block,
                                  .n_block = n_block,
                                  .score = score};
    assert_ok(backend->ops->score(backend, &args));
    assert_ok(backend->ops->sync(backend));
    assert_ok(backend->ops->download(backend, got, score, bytes));
    assert_ok(backend->ops->sync(backend));
    backend->ops->free(backend, score);
}

/* Attention of every row over all keys, for the log-sum-exp. */
static problem scored_problem(ifkv_backend *backend, heads h, int64_t n_row, int64_t n_key) {
    problem p = problem_create(backend, h, n_row, n_key);
    for (int64_t r = 0; r < n_row; r++) p.end[r] = n_key;
    attend_rows(backend, &p, 0, n_row);
    return p;
}

static double score_naively(const problem *p, ifkv_score_form form, int64_t key) {
    double total = 0;
    for (int64_t r = 0; r < p->n_row; r++) {
        double sum = 0, square = 0;
        for (int h = 0; h < p->h.n_head; h++) {
            const double a = exp(score_of(p, r, h, key) - *gen_at(&p->lse, r, h));
            sum += a;
            square += a * a;
        }
        const double mean = sum / p->h.n_head;
        total += form == IFKV_SCORE_L2     ? mean * mean
                 : form == IFKV_SCORE_L1   ? mean
                 : form == IFKV_SCORE_MASS ? sum
                                           : square;
    }
    return form == IFKV_SCORE_L2 || form == IFKV_SCORE_L2H ? sqrt(total) : total;
}

/* Relative error of a probability: that of s and lse, about EPS (1 + |lse| / 2) each, |lse| < 8.
 * One computed as a power of two has these in units of log2 e, two more of the products with it,
 * and 2 EPS of the power itself: together twice as much. */
static void score_matches_float64(void **state) {
    const int64_t shapes[][2] = {{1, 1}, {20, 600}, {70, 259}, {150, 30}};
    for (size_t i = 0; i < sizeof all_heads / sizeof *all_heads; i++)
        for (size_t s = 0; s < 4 && is_served(all_heads[i]); s++) {
            problem p = scored_problem(*state, all_heads[i], shapes[s][0], shapes[s][1]);
            const int64_t n = p.n_key, block[] = {0, n / 3, n / 3, n};
            float *got = malloc((size_t)n * sizeof *got);
            for (int f = 0; f < 4; f++) {
                score_keys(*state, &p, forms[f], 0.25f, block, 3, 0.5f, got);
                for (int64_t key = 0; key < n; key++) {
                    const double want = score_naively(&p, forms[f], key) / 4;
                    assert_near((double)got[key], 0.5 + want,
                                EPS * (0.5 + (is_cpu() ? 12 : 24) * want), "score", (int64_t)f,
                                key);
                }
            }
            free(got);
            problem_destroy(&p);
        }
}

/* I18: context and question block together hold all of the probability; l2 <= l1 <= sqrt(Nq) l2,
 * and mass is l1 times the heads, so that it ranks the same. */
static void probabilities_sum_to_one(void **state) {
    const heads h = {9, 3, 64};
    const int64_t n_row = 23, n_key = 517, n_context = 480, block[] = {0, 480, 517};
    problem p = scored_problem(*state, h, n_row, n_key);
    float l1[517], l2[517], mass[517];
    score_keys(*state, &p, IFKV_SCORE_L1, 1, block, 2, 0, l1);
    score_keys(*state, &p, IFKV_SCORE_L2, 1, block, 2, 0, l2);
    score_keys(*state, &p, IFKV_SCORE_MASS, 1, block, 2, 0, mass);
    double context = 0, question = 0;
    for (int64_t key = 0; key < n_key; key++) {
        *(key < n_context ? &context : &question) += (double)mass[key];
        assert_true(l2[key] >= 0 && isfinite(l2[key]));
        assert_true((double)l2[key] <= (double)l1[key] * (1 + EPS));
        assert_true((double)l1[key] <= sqrt((double)n_row) * (double)l2[key] * (1 + EPS));
        assert_near((double)mass[key], h.n_head * (double)l1[key], 2 * EPS * (double)mass[key],
                    "mass", 0, key);
    }
    /* Errors of single probabilities average out; those of an lse are shared by a row. */
    const double all = (double)n_row * h.n_head;
    assert_near(context + question, all, 8 * EPS * all, "mass of context and question", 0, 0);
    problem_destroy(&p);
}

/* A chunk's scores have the bits they have alone, whatever is in front of it. */
static void a_block_ignores_its_neighbours(void **state) {
    problem p = scored_problem(*state, (heads){9, 3, 64}, 20, 1000);
    const int64_t block[] = {0, 1, 333, 333, 650, 1000};
    float together[1000], alone[1000];
    for (int f = 0; f < 4; f++) {
        score_keys(*state, &p, forms[f], 0.25f, block, 5, 0, together);
        for (int b = 0; b < 5; b++) {
            problem one = p;
            one.k.view = ifkv_view_rows(&p.k.view, block[b], block[b + 1] - block[b]);
            one.n_key = one.k.view.n_row;
            const int64_t whole[] = {0, one.n_key};
            score_keys(*state, &one, forms[f], 0.25f, whole, 1, 0, alone + block[b]);
        }
        assert_memory_equal(together, alone, sizeof alone);
    }
    problem_destroy(&p);
}

static void bits_ignore_thread_count(void **state) {
    const heads some[] = {{9, 3, 64}, {8, 1, 128}};
    for (int i = 0; i < 2; i++) {
        const int64_t n = 300, n_key = 1300, block[] = {0, 700, 1300};
        problem p = problem_create(*state, some[i], n, n_key);
        for (int64_t r = 0; r < n; r++) p.begin[r] = r < 200 ? 0 : 700, p.end[r] = 1000 + r;
        unsigned char *out = malloc(p.out.bytes), *lse = malloc(p.lse.bytes);
        float score[3][1300];
        for (int t = 1; t <= 3; t++) {
            ifkv_backend *backend = open_with(t);
            assert_ok(
                backend->ops->prepare(backend, some[i].n_head, some[i].n_kv_head, some[i].d_head));
            attend_rows(backend, &p, 0, n);
            score_keys(backend, &p, IFKV_SCORE_L2, 0.25f, block, 2, 0, score[t - 1]);
            if (t == 1) {
                memcpy(out, p.out.image, p.out.bytes);
                memcpy(lse, p.lse.image, p.lse.bytes);
            }
            assert_memory_equal(out, p.out.image, p.out.bytes);
            assert_memory_equal(lse, p.lse.image, p.lse.bytes);
            assert_memory_equal(score[0], score[t - 1], sizeof score[0]);
            ifkv_backend_close(backend);
        }
        free(out), free(lse);
        problem_destroy(&p);
    }
}

static void operands_that_do_not_fit_are_refused(void **state) {
    ifkv_backend *backend = *state;
    const ifkv_backend_ops *ops = backend->ops;
    const ifkv_status status = IFKV_ERR_INTERNAL;
    assert_fails(ops->prepare(backend, 40, 6, 64), status, IFKV_E_SHAPE, "40 is not a multiple");
    assert_fails(ops->prepare(backend, 8, 8, 257), is_cpu() ? status : IFKV_ERR_UNSUPPORTED,
                 IFKV_E_SHAPE, "257");
    problem p = problem_create_to(backend, IFKV_DTYPE_F32, (heads){9, 3, 64}, 2, 8);
    ifkv_attention_args args = problem_args(&p);
    args.k.n_col = 128;
    assert_fails(ops->attention(backend, &args), status, IFKV_E_SHAPE, "k is [8, 128]");
    args.k.n_col = 192;
    assert_ok(ops->prepare(backend, 8, 8, 64));
    assert_fails(ops->attention(backend, &args), status, IFKV_E_SHAPE, "prepared for");
    int64_t block[] = {0, 7};
    float score[8];
    ifkv_score_args scores = {.n_head = 9,
                              .n_kv_head = 3,
                              .d_head = 64,
                              .q = p.q.view,
                              .lse = p.lse.view,
                              .k = p.k.view,
                              .block = block,
                              .n_block = 1,
                              .score = score};
    assert_fails(ops->score(backend, &scores), status, IFKV_E_SHAPE, "prepared for");
    assert_ok(ops->prepare(backend, 9, 3, 64));
    assert_fails(ops->score(backend, &scores), status, IFKV_E_SHAPE, "[0, 7) of 8");
    ifkv_merge_args merge = {.n_head = 9,
                             .d_head = 64,
                             .n_part = 1,
                             .out_part = &p.out.view,
                             .lse_part = &p.out.view,
                             .out = p.out.view};
    assert_fails(ops->merge(backend, &merge), status, IFKV_E_SHAPE, "lse of a part");
    assert_true(gen_matrix_read(&p.out));
    for (int64_t i = 0; i < 2 * 9 * 64; i++) assert_true(isnan(p.out.value[i]));
    problem_destroy(&p);
}

/* The CPU sees it at once; a device whose spans the host cannot read says so at the next sync. */
static void spans_outside_the_keys_are_refused(void **state) {
    ifkv_backend *backend = *state;
    const ifkv_backend_ops *ops = backend->ops;
    const struct {
        int64_t begin, end;
        const char *words;
    } bad[] = {{5, 9, "row 1 sees [5, 9) of 8"},
               {5, 4, "row 1 sees [5, 4) of 8"},
               {-1, 4, "row 1 sees [-1, 4) of 8"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        problem p = problem_create(backend, (heads){9, 3, 64}, 2, 8);
        const int64_t begin[] = {0, bad[i].begin}, end[] = {4, bad[i].end};
        int64_t *begins = gen_upload(backend, begin, sizeof begin),
                *ends = gen_upload(backend, end, sizeof end);
        ifkv_attention_args args = problem_args(&p);
        args.begin = begins, args.end = ends;
        ifkv_status status = ops->attention(backend, &args);
        assert_true(is_cpu() == (status != IFKV_OK));
        if (!is_cpu()) status = ops->sync(backend);
        assert_fails(status, IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                     is_cpu() ? bad[i].words : "attention: a row whose span");
        assert_ok(ops->sync(backend));
        ops->free(backend, begins), ops->free(backend, ends);
        problem_destroy(&p);
    }
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(causal_attention_matches_float64),
        cmocka_unit_test(any_spans_match_float64),
        cmocka_unit_test(ends_need_not_ascend),
        cmocka_unit_test(one_key_gives_its_value_bitwise),
        cmocka_unit_test(equal_keys_give_the_mean_exactly),
        cmocka_unit_test(empty_span_gives_zero_and_minus_infinity),
        cmocka_unit_test(keys_outside_the_union_are_not_read),
        cmocka_unit_test(a_nan_is_not_hidden),
        cmocka_unit_test(a_group_ignores_its_neighbours),
        cmocka_unit_test(a_span_may_be_cut_anywhere),
        cmocka_unit_test(merge_matches_float64),
        cmocka_unit_test(merge_is_a_commutative_monoid),
        cmocka_unit_test(merge_of_nothing_is_the_empty_part),
        cmocka_unit_test(merge_survives_extremes),
        cmocka_unit_test(score_matches_float64),
        cmocka_unit_test(probabilities_sum_to_one),
        cmocka_unit_test(a_block_ignores_its_neighbours),
        cmocka_unit_test(bits_ignore_thread_count),
        cmocka_unit_test(operands_that_do_not_fit_are_refused),
        cmocka_unit_test(spans_outside_the_keys_are_refused),
    };
    conformance_init(argc, argv);
    return cmocka_run_group_tests(tests, backend_setup, backend_teardown);
}
