/* Attention over spans on a CUDA device: every kernel, every shape of span, against float64.
 *
 *   test_attention_cuda [sm80|sm90|both [0|64|128 [TEST]]]      that kernel only, or one against
 * the other; that d_head only, 0 for all; tests of that name only, in which * and ? match
 *
 * Without a GPU the device is the host execution model.  What no kernel may read is NaN, what it
 * may not use is garbage.
 *
 * Bounds.  Inputs are bfloat16, so products are exact; float32 sums of d of them err by at most
 * d 2^-23 of the sum of magnitudes (tensor cores may truncate: twice the half ulp).  Hence a score
 * errs by DELTA = (d + 4) 2^-23 max_key sum_c |q_c k_c| scale, four more for scale_log2 and fma,
 * and with it lse; the exponential adds 2^-22, its sum one 2^-23 per addition in a row, at most
 * SUM_STEPS.  A probability is rounded to bfloat16 (2^-8) before the product with V, whose float32
 * sum adds SUM_STEPS 2^-23; a bfloat16 result adds 2^-8 of itself.  These are worst cases; of all
 * results together the relative norm stays below 4e-3, as two roundings of 2^-8 at most have a
 * deviation of about 1.6e-3 each. */
#include "test.h"

#include "attention.h"
#include "attention_problem.h"
#include "gen.h"
#include "tensor_map.h"

static gen noise;
static ifkv_attention_kernel kernel;
static int only_d;            /* 0: every d_head */
static ifkv_backend *backend; /* for memory only */
static ifkv_cuda_context context;

/* Longest chain of float32 additions over n keys: within a thread's columns of a block, over
 * blocks, over the threads of a row; a multiply of K blocks each. */
static double sum_steps(int64_t n_key) {
    return 64 + 2.0 * (double)(n_key / 64) + 8;
}

static void must(cudaError_t error) {
    if (error != cudaSuccess) fail_msg("CUDA: %s", cudaGetErrorString(error));
}

/* Bytes of a matrix's image in front of a row. */
static size_t row_offset(const gen_matrix *m, int64_t row) {
    return (size_t)(m->fence + row * m->view.stride) * ifkv_dtype_bytes(m->view.dtype);
}

/* Queries are uniform in [-q_size, q_size), keys and values in [-1, 1). */
static problem create_problem(heads h, int64_t n_row, int64_t n_key, double q_size, ifkv_dtype to) {
    const ifkv_dtype dtype = IFKV_DTYPE_BF16;
    const int64_t q_cols = (int64_t)h.n_head * h.d_head, kv_cols = (int64_t)h.n_kv_head * h.d_head;
    problem p = {.h = h, .n_row = n_row, .n_key = n_key};
    p.q = gen_matrix_create_aligned(&noise, backend, dtype, n_row, q_cols, 8, GEN_UNIFORM);
    p.k = gen_matrix_create_aligned(&noise, backend, dtype, n_key, kv_cols, 24, GEN_UNIFORM);
    p.v = gen_matrix_create_aligned(&noise, backend, dtype, n_key, kv_cols, 16, GEN_UNIFORM);
    /* results are stored in two ways: in pieces of 16 bytes, and anywhere */
    p.out = (gen_below(&noise, 2) ? gen_matrix_create_aligned : gen_matrix_create)(
        &noise, backend, to, n_row, q_cols, 5, GEN_POISON);
    p.lse = gen_matrix_create(&noise, backend, IFKV_DTYPE_F32, n_row, h.n_head, 1, GEN_POISON);
    for (int64_t i = 0; i < n_row * q_cols; i++) p.q.value[i] *= q_size;
    gen_matrix_write(&p.q);
    p.begin = calloc((size_t)n_row + 1, sizeof *p.begin);
    p.end = calloc((size_t)n_row + 1, sizeof *p.end);
    assert_true(p.begin && p.end);
    return p;
}

/* Attend rows [row, row + n) into the same rows of the results, spans in parts of part_keys. */
static void attend_rows(problem *p, int64_t row, int64_t n, int64_t part_keys) {
    const ifkv_attention_args args = problem_rows(p, row, n);
    assert_ok(ifkv_cuda_attention_by(&context, &args, kernel, part_keys));
    must(cudaDeviceSynchronize());
    problem_read(p, &args);
}

static void attend(problem *p) {
    attend_rows(p, 0, p->n_row, 0);
}

static void assert_no_fault(void) {
    int32_t fault;
    must(cudaMemcpy(&fault, context.fault, sizeof fault, cudaMemcpyDeviceToHost));
    assert_int_equal(fault, IFKV_CUDA_FAULT_NONE);
}

/* What a row and head should give, and how far its numbers may be off. */
typedef struct expected {
    double out[128], magnitude[128]; /* sum p v, sum p |v| */
    double lse, delta;               /* largest error of a score */
} expected;

static void expect(const problem *p, int64_t row, int head, expected *e) {
    const int d = p->h.d_head, kv = head / (p->h.n_head / p->h.n_kv_head);
    const int64_t n = p->end[row] - p->begin[row];
    const double scale = (double)(float)(1 / sqrt((double)d));
    double *s = malloc((size_t)(n + 1) * sizeof *s), top = -INFINITY, total = 0, size = 0;
    assert_non_null(s);
    for (int64_t i = 0; i < n; i++) {
        double sum = 0, absolute = 0;
        for (int c = 0; c < d; c++) {
            const double x = *gen_at(&p->q, row, (int64_t)head * d + c) *
                             *gen_at(&p->k, p->begin[row] + i, (int64_t)kv * d + c);
            sum += x;
            absolute += fabs(x);
        }
        s[i] = sum * scale;
        top = fmax(top, s[i]);
        size = fmax(size, absolute * scale);
    }
    memset(e->out, 0, sizeof e->out);
    memset(e->magnitude, 0, sizeof e->magnitude);
    for (int64_t i = 0; i < n; i++) {
        const double w = exp(s[i] - top);
        total += w;
        for (int c = 0; c < d; c++) {
            const double x = w * *gen_at(&p->v, p->begin[row] + i, (int64_t)kv * d + c);
            e->out[c] += x;
            e->magnitude[c] += fabs(x);
        }
    }
    for (int c = 0; c < d && n > 0; c++) e->out[c] /= total, e->magnitude[c] /= total;
    e->lse = n > 0 ? top + log(total) : -INFINITY;
    e->delta = (d + 4) * 0x1p-23 * size;
    free(s);
}

static void assert_close(const char *what, int64_t row, int64_t col, double got, double want,
                         double bound) {
    if (!(got == want || fabs(got - want) <= bound))
        fail_msg("%s [%lld, %lld]: got %.9g, want %.9g within %.3g", what, (long long)row,
                 (long long)col, got, want, bound);
}

static void check_rows(const problem *p, int64_t first, int64_t n) {
    const int d = p->h.d_head;
    double error = 0, norm = 0;
    for (int64_t row = first; row < first + n; row++)
        for (int head = 0; head < p->h.n_head; head++) {
            expected e;
            expect(p, row, head, &e);
            const double steps = sum_steps(p->end[row] - p->begin[row]);
            const double weight = 2 * e.delta + 0x1p-8 + (2 * steps + 4) * 0x1p-23;
            for (int c = 0; c < d; c++) {
                const double got = *gen_at(&p->out, row, (int64_t)head * d + c);
                const double rounding =
                    p->out.view.dtype == IFKV_DTYPE_BF16 ? 0x1p-8 * fabs(e.out[c]) : 0;
                assert_close("out", row, (int64_t)head * d + c, got, e.out[c],
                             1.01 * (weight * e.magnitude[c] + rounding));
                error += (got - e.out[c]) * (got - e.out[c]);
                norm += e.out[c] * e.out[c];
            }
            assert_close("lse", row, head, *gen_at(&p->lse, row, head), e.lse,
                         e.delta + (steps + 4) * 0x1p-23 + 0x1p-22 * fabs(e.lse));
        }
    if (sqrt(error) > 4e-3 * sqrt(norm))
        fail_msg("relative norm of the error %.3g, expected at most 4e-3", sqrt(error / norm));
    assert_no_fault();
}

static void check(const problem *p) {
    check_rows(p, 0, p->n_row);
}

/* Rows of the call that a tile of the kernel holds. */
static int64_t tile_rows(heads h) {
    return ifkv_attention_tile_m(kernel, h.d_head) / (h.n_head / h.n_kv_head);
}

typedef void span_rule(problem *p);

static void causal_spans(problem *p) {
    for (int64_t r = 0; r < p->n_row; r++) p->begin[r] = 0, p->end[r] = p->n_key - p->n_row + r + 1;
}

static void whole_spans(problem *p) {
    for (int64_t r = 0; r < p->n_row; r++) p->begin[r] = 0, p->end[r] = p->n_key;
}

static void single_keys(problem *p) {
    for (int64_t r = 0; r < p->n_row; r++) p->begin[r] = r % p->n_key, p->end[r] = p->begin[r] + 1;
}

/* Causal chunks with edges at every end of a tile and of 64 of its stacked rows, and one row
 * beside. */
static void chunks_at_tile_edges(problem *p) {
    const int64_t tile = tile_rows(p->h), rows_64 = 64 / (p->h.n_head / p->h.n_kv_head);
    int64_t begin = 0;
    for (int64_t r = 0; r < p->n_row; r++) {
        const int64_t at = r % tile;
        if ((at + 1) % rows_64 <= 2 || at == tile - 1) begin = r;
        p->begin[r] = begin < p->n_key ? begin : p->n_key;
        p->end[r] = r + 1 < p->n_key ? r + 1 : p->n_key;
    }
}

/* Every row has a begin of its own, some beyond the end of a neighbour. */
static void windows(problem *p) {
    for (int64_t r = 0; r < p->n_row; r++) {
        p->begin[r] = gen_below(&noise, p->n_key + 1);
        p->end[r] = p->begin[r] + gen_below(&noise, p->n_key - p->begin[r] + 1);
    }
}

static void ends_in_any_order(problem *p) {
    const int64_t begin = gen_below(&noise, p->n_key + 1);
    for (int64_t r = 0; r < p->n_row; r++)
        p->begin[r] = begin, p->end[r] = begin + gen_below(&noise, p->n_key - begin + 1);
}

/* The last row of a tile sees least, the first one all. */
static void descending_ends(problem *p) {
    for (int64_t r = 0; r < p->n_row; r++) {
        p->begin[r] = 0;
        p->end[r] = 3 * r < p->n_key ? p->n_key - 3 * r : 0;
    }
}

/* The first row of a tile sees least; within 32 rows the ends cross a block. */
static void steep_ends(problem *p) {
    for (int64_t r = 0; r < p->n_row; r++) {
        const int64_t end = p->n_key - 3 * (p->n_row - 1 - r);
        p->begin[r] = 0, p->end[r] = end > 0 ? end : 0;
    }
}

/* Groups that start off every block, with empty rows among them and an empty group. */
static void groups_with_empty_rows(problem *p) {
    int64_t begin = 0;
    for (int64_t r = 0; r < p->n_row; r++) {
        if (r % 37 == 0) begin = gen_below(&noise, p->n_key + 1);
        const bool is_empty = r % 5 == 2 || r / 37 == 1;
        p->begin[r] = begin;
        p->end[r] = is_empty ? begin : begin + gen_below(&noise, p->n_key - begin + 1);
    }
}

static const heads all_heads[] = {{2, 2, 64},  {4, 1, 64},  {5, 1, 64},  {8, 1, 64},
                                  {14, 2, 64}, {1, 1, 128}, {2, 1, 128}, {3, 1, 128},
                                  {5, 1, 128}, {2, 1, 16},  {6, 2, 32},  {3, 1, 48},
                                  {1, 1, 80},  {2, 2, 96},  {4, 2, 112}, {64, 1, 16}};
enum { N_HEADS = sizeof all_heads / sizeof *all_heads };

static bool can(heads h) {
    return (kernel != IFKV_ATTENTION_SM90 || h.d_head == 64 || h.d_head == 128) &&
           (!only_d || h.d_head == only_d);
}

static void spans_match(span_rule *rule) {
    for (int i = 0; i < N_HEADS; i++) {
        if (!can(all_heads[i])) continue;
        const int64_t n_rows[] = {1, 3, 64, 129, 50, tile_rows(all_heads[i]) + 1},
                      n_keys[] = {7, 300, 200, 257, 64, 230};
        const int s = (int)gen_below(&noise, 6);
        const int64_t n_key = n_keys[s], n_row = n_rows[s] < n_key ? n_rows[s] : n_key;
        problem p = create_problem(all_heads[i], n_row, n_key, gen_below(&noise, 2) ? 1 : 8,
                                   gen_below(&noise, 3) ? IFKV_DTYPE_BF16 : IFKV_DTYPE_F32);
        rule(&p);
        attend(&p);
        check(&p);
        problem_destroy(&p);
    }
}

#define SPAN_TEST(rule)                                                                            \
    static void rule##_match_float64(void **state) {                                               \
        (void)state;                                                                               \
        spans_match(rule);                                                                         \
    }
SPAN_TEST(causal_spans)
SPAN_TEST(whole_spans)
SPAN_TEST(single_keys)
SPAN_TEST(chunks_at_tile_edges)
SPAN_TEST(windows)
SPAN_TEST(ends_in_any_order)
SPAN_TEST(descending_ends)
SPAN_TEST(steep_ends)
SPAN_TEST(groups_with_empty_rows)

/* The last tile is short of one row, full, or has only one. */
static void rows_about_a_tile_match_float64(void **state) {
    (void)state;
    span_rule *const rules[] = {causal_spans, chunks_at_tile_edges};
    for (int i = 0; i < 6 * N_HEADS; i++) {
        const heads h = all_heads[i / 6];
        if (!can(h)) continue;
        const int64_t n_row = tile_rows(h) - 1 + i % 3;
        problem p = create_problem(h, n_row, n_row, 4, IFKV_DTYPE_BF16);
        rules[i % 6 / 3](&p);
        attend(&p);
        check(&p);
        problem_destroy(&p);
    }
}

static const heads some_heads[] = {{5, 1, 128}, {6, 2, 64}, {3, 1, 32}};

#define FOR_SOME_HEADS(h)                                                                          \
    for (const heads *h = some_heads; h < some_heads + 3; h++)                                     \
        if (can(*h))

static void keys_no_tile_sees_may_be_nan(void **state) {
    (void)state;
    FOR_SOME_HEADS(h) {
        problem p = create_problem(*h, 70, 400, 1, IFKV_DTYPE_BF16);
        for (int64_t r = 0; r < 70; r++) p.begin[r] = 33, p.end[r] = 230 + r;
        for (int64_t key = 0; key < 400; key++)
            for (int64_t c = 0; c < p.k.view.n_col && (key < 33 || key >= 299); c++)
                *gen_at(&p.k, key, c) = *gen_at(&p.v, key, c) = (double)NAN;
        gen_matrix_write(&p.k);
        gen_matrix_write(&p.v);
        attend(&p);
        check(&p);
        problem_destroy(&p);
    }
}

static void save(const problem *p, unsigned char **out, unsigned char **lse) {
    *out = malloc(p->out.bytes);
    *lse = malloc(p->lse.bytes);
    assert_true(*out && *lse);
    memcpy(*out, p->out.image, p->out.bytes);
    memcpy(*lse, p->lse.image, p->lse.bytes);
}

static void assert_saved(const problem *p, unsigned char *out, unsigned char *lse) {
    assert_memory_equal(out, p->out.image, p->out.bytes);
    assert_memory_equal(lse, p->lse.image, p->lse.bytes);
    free(out), free(lse);
}

/* Keys that a row's tile loads but the row does not see: large garbage changes no bit of it. */
static void masked_keys_change_no_bit(void **state) {
    (void)state;
    FOR_SOME_HEADS(h) {
        problem p = create_problem(*h, 30, 300, 1, IFKV_DTYPE_BF16);
        for (int64_t r = 0; r < 30; r++) p.end[r] = r < 29 ? 100 : 300;
        attend(&p);
        unsigned char *out, *lse;
        const size_t out_bytes = row_offset(&p.out, 29), lse_bytes = row_offset(&p.lse, 29);
        save(&p, &out, &lse);
        for (int64_t key = 100; key < 300; key++)
            for (int64_t c = 0; c < p.k.view.n_col; c++)
                *gen_at(&p.k, key, c) = *gen_at(&p.v, key, c) = gen_below(&noise, 2) ? 1e30 : -1e30;
        gen_matrix_write(&p.k);
        gen_matrix_write(&p.v);
        gen_matrix_write(&p.out);
        attend(&p);
        assert_memory_equal(out, p.out.image, out_bytes);
        assert_memory_equal(lse, p.lse.image, lse_bytes);
        free(out), free(lse);
        problem_destroy(&p);
    }
}

static void a_nan_is_not_hidden(void **state) {
    (void)state;
    FOR_SOME_HEADS(h) {
        problem p = create_problem(*h, 4, 300, 1, IFKV_DTYPE_BF16);
        for (int64_t r = 0; r < 4; r++) p.end[r] = 300;
        *gen_at(&p.k, 222, 3) = (double)NAN;
        gen_matrix_write(&p.k);
        attend(&p);
        for (int64_t r = 0; r < 4; r++)
            assert_true(isnan(*gen_at(&p.out, r, 0)) && isnan(*gen_at(&p.lse, r, 0)));
        if (h->n_kv_head > 1) assert_false(isnan(*gen_at(&p.lse, 2, h->n_head - 1)));
        problem_destroy(&p);
    }
}

static void two_runs_give_the_same_bits(void **state) {
    (void)state;
    FOR_SOME_HEADS(h) {
        problem p = create_problem(*h, 150, 333, 4, IFKV_DTYPE_BF16);
        groups_with_empty_rows(&p);
        attend(&p);
        unsigned char *out, *lse;
        save(&p, &out, &lse);
        for (int64_t i = 0; i < p.n_row * p.out.view.n_col; i++) p.out.value[i] = (double)NAN;
        gen_matrix_write(&p.out);
        attend(&p);
        assert_saved(&p, out, lse);
        problem_destroy(&p);
    }
}

static void assert_row_equal(const gen_matrix *a, int64_t row_a, const gen_matrix *b,
                             int64_t row_b) {
    const size_t bytes = (size_t)a->view.n_col * ifkv_dtype_bytes(a->view.dtype);
    assert_memory_equal(a->image + row_offset(a, row_a), b->image + row_offset(b, row_b), bytes);
}

static void copy_row(const gen_matrix *from, int64_t row_from, gen_matrix *to, int64_t row_to) {
    memcpy(gen_at(to, row_to, 0), gen_at(from, row_from, 0),
           (size_t)from->view.n_col * sizeof *from->value);
}

/* The same operands with rows taken from p; row may repeat. */
static problem take_rows(const problem *p, const int64_t *row, int64_t n) {
    problem taken = create_problem(p->h, n, p->n_key, 1, p->out.view.dtype);
    for (int64_t key = 0; key < p->n_key; key++)
        copy_row(&p->k, key, &taken.k, key), copy_row(&p->v, key, &taken.v, key);
    for (int64_t i = 0; i < n; i++) {
        copy_row(&p->q, row[i], &taken.q, i);
        taken.begin[i] = p->begin[row[i]], taken.end[i] = p->end[row[i]];
    }
    gen_matrix_write(&taken.q), gen_matrix_write(&taken.k), gen_matrix_write(&taken.v);
    return taken;
}

/* Bits of a row depend on its query, keys and span alone: rows selected from a causal pass, in any
 * order, have the bits they have in it. */
static void selected_rows_have_the_bits_of_the_whole(void **state) {
    (void)state;
    FOR_SOME_HEADS(h) {
        problem p = create_problem(*h, 280, 280, 4, IFKV_DTYPE_BF16);
        causal_spans(&p);
        attend(&p);
        int64_t ascending[40], any[40];
        for (int64_t i = 0; i < 40; i++)
            ascending[i] = 7 * i + gen_below(&noise, 7), any[i] = gen_below(&noise, 280);
        const int64_t *const selections[] = {ascending, any};
        for (int s = 0; s < 2; s++) {
            problem selected = take_rows(&p, selections[s], 40);
            attend(&selected);
            for (int64_t i = 0; i < 40; i++) {
                assert_row_equal(&selected.out, i, &p.out, selections[s][i]);
                assert_row_equal(&selected.lse, i, &p.lse, selections[s][i]);
            }
            problem_destroy(&selected);
        }
        problem_destroy(&p);
    }
}

/* The bits of a chunk's rows are those it has alone. */
static void a_group_ignores_its_neighbours(void **state) {
    (void)state;
    FOR_SOME_HEADS(h) {
        const int64_t cut[] = {0, 1, 70, 71, 200, 263};
        problem p = create_problem(*h, 263, 263, 1, IFKV_DTYPE_BF16);
        for (int g = 0; g < 5; g++)
            for (int64_t r = cut[g]; r < cut[g + 1]; r++) p.begin[r] = cut[g], p.end[r] = r + 1;
        attend(&p);
        unsigned char *out, *lse;
        save(&p, &out, &lse);
        for (int g = 4; g >= 0; g--) attend_rows(&p, cut[g], cut[g + 1] - cut[g], 0);
        assert_saved(&p, out, lse);
        problem_destroy(&p);
    }
}

/* An average of one value is that value, but for the rounding of probabilities. */
static void constant_values_come_back(void **state) {
    (void)state;
    FOR_SOME_HEADS(h) {
        problem p = create_problem(*h, 67, 200, 8, IFKV_DTYPE_BF16);
        windows(&p);
        for (int64_t key = 0; key < 200; key++)
            for (int64_t c = 0; c < p.v.view.n_col; c++)
                *gen_at(&p.v, key, c) = (double)(c % 7 - 3);
        gen_matrix_write(&p.v);
        attend(&p);
        check(&p);
        problem_destroy(&p);
    }
}

static void one_key_gives_its_value_bitwise(void **state) {
    (void)state;
    FOR_SOME_HEADS(h) {
        problem p = create_problem(*h, 50, 50, 1, IFKV_DTYPE_BF16);
        single_keys(&p);
        attend(&p);
        const int d = h->d_head, group = h->n_head / h->n_kv_head;
        for (int64_t r = 0; r < 50; r++)
            for (int64_t c = 0; c < p.q.view.n_col; c++)
                assert_true(*gen_at(&p.out, r, c) == *gen_at(&p.v, r, c / d / group * d + c % d));
        check(&p);
        problem_destroy(&p);
    }
}

/* Row r asks for dimension c(r), key j answers to dimension j modulo d: softmax gives weight one to
 * one key and the row gets its value, to the bit.  Every step of both products, every half of a
 * wide head and every column shows in some number. */
static void one_hot_queries_fetch_their_value(void **state) {
    (void)state;
    FOR_SOME_HEADS(h) {
        const int d = h->d_head, group = h->n_head / h->n_kv_head;
        problem p = create_problem(*h, 2 * d, 3 * d, 1, IFKV_DTYPE_BF16);
        for (int64_t r = 0; r < p.n_row; r++) p.begin[r] = d / 2, p.end[r] = d / 2 + d;
        for (int64_t i = 0; i < p.n_row * p.q.view.n_col; i++) {
            const int64_t row = i / p.q.view.n_col, head = i % p.q.view.n_col / d;
            p.q.value[i] = i % d == (5 * row + head) % d ? 64 : 0;
        }
        for (int64_t i = 0; i < p.n_key * p.k.view.n_col; i++) {
            const int64_t key = i / p.k.view.n_col, head = i % p.k.view.n_col / d;
            p.k.value[i] = i % d == key % d ? 64 : 0;
            p.v.value[i] = (double)((131 * key + 37 * (i % d) + 61 * head) % 257 - 128);
        }
        gen_matrix_write(&p.q), gen_matrix_write(&p.k), gen_matrix_write(&p.v);
        attend(&p);
        for (int64_t r = 0; r < p.n_row; r++)
            for (int64_t c = 0; c < p.q.view.n_col; c++) {
                int64_t key = (5 * r + c / d) % d;
                if (key < d / 2) key += d;
                const double want = *gen_at(&p.v, key, c / d / group * d + c % d);
                assert_close("out", r, c, *gen_at(&p.out, r, c), want, 0);
            }
        assert_no_fault();
        problem_destroy(&p);
    }
}

/* Equal keys weigh the same: the mean of 256 integers and ln 256, with no rounding in the sum. */
static void equal_keys_give_the_mean_exactly(void **state) {
    (void)state;
    FOR_SOME_HEADS(h) {
        problem p = create_problem(*h, 3, 256, 1, IFKV_DTYPE_F32);
        whole_spans(&p);
        for (int64_t i = 0; i < 256 * p.k.view.n_col; i++)
            p.k.value[i] = 0, p.v.value[i] = (double)(gen_below(&noise, 9) - 4);
        gen_matrix_write(&p.k);
        gen_matrix_write(&p.v);
        attend(&p);
        const int d = h->d_head, group = h->n_head / h->n_kv_head;
        for (int64_t c = 0; c < p.q.view.n_col; c++) {
            double sum = 0;
            for (int64_t key = 0; key < 256; key++)
                sum += *gen_at(&p.v, key, c / d / group * d + c % d);
            for (int64_t r = 0; r < 3; r++) assert_true(*gen_at(&p.out, r, c) == sum / 256);
        }
        for (int64_t i = 0; i < 3 * h->n_head; i++)
            assert_close("lse", i, 0, p.lse.value[i], log(256.0), 0x1p-22 * log(256.0));
        problem_destroy(&p);
    }
}

/* Scores of +-1e4 from exact integers: nothing overflows, and only nearness to the top counts.  The
 * scale and the maximum are rounded once for all keys of a row, 2^-23 each of 1e4 log2(e), which
 * cancels between keys but not in lse. */
static void large_scores_are_safe(void **state) {
    (void)state;
    FOR_SOME_HEADS(h) {
        problem p = create_problem(*h, 20, 200, 1, IFKV_DTYPE_BF16);
        whole_spans(&p);
        const double size = gen_round(IFKV_DTYPE_BF16, 1e4 * sqrt((double)h->d_head) / 256);
        for (int64_t i = 0; i < 20 * p.q.view.n_col; i++)
            p.q.value[i] = i % h->d_head == 0 ? 256 : i % h->d_head == 1 ? 1 : 0;
        for (int64_t i = 0; i < 200 * p.k.view.n_col; i++) {
            const int64_t key = i / p.k.view.n_col, c = i % h->d_head;
            p.k.value[i] = c == 0   ? (key % 3 ? -size : size)
                           : c == 1 ? (double)(gen_below(&noise, 9) - 4)
                                    : 0;
        }
        gen_matrix_write(&p.q);
        gen_matrix_write(&p.k);
        attend(&p);
        for (int64_t r = 0; r < 20; r++)
            for (int head = 0; head < h->n_head; head++) {
                expected e;
                expect(&p, r, head, &e);
                for (int c = 0; c < h->d_head; c++)
                    assert_close("out", r, (int64_t)head * h->d_head + c,
                                 *gen_at(&p.out, r, (int64_t)head * h->d_head + c), e.out[c],
                                 1.01 * (0x1p-8 + 0x1p-15) * e.magnitude[c] +
                                     1.01 * 0x1p-8 * fabs(e.out[c]));
                assert_close("lse", r, head, *gen_at(&p.lse, r, head), e.lse, 1e4 * 0x1p-21);
            }
        problem_destroy(&p);
    }
}

static void empty_calls_write_what_is_due(void **state) {
    (void)state;
    FOR_SOME_HEADS(h) for (int64_t n_key = 0; n_key < 8; n_key += 7) {
        problem p = create_problem(*h, 5, n_key, 1, IFKV_DTYPE_BF16);
        for (int64_t r = 0; r < 5; r++) p.begin[r] = p.end[r] = n_key / 2;
        attend_rows(&p, 1, 0, 0);
        assert_true(isnan(p.out.value[0]));
        attend(&p);
        for (int64_t i = 0; i < 5 * p.q.view.n_col; i++) assert_true(p.out.value[i] == 0);
        for (int64_t i = 0; i < 5 * h->n_head; i++) assert_true(p.lse.value[i] == -INFINITY);
        problem_destroy(&p);
    }
}

/* A merge in float32 of float32 parts adds no more than a few roundings to their own bounds. */
static void parts_give_the_whole(void **state) {
    (void)state;
    FOR_SOME_HEADS(h) for (int64_t part_keys = 64; part_keys <= 192; part_keys += 128) {
        problem p = create_problem(*h, 40, 420, 4, IFKV_DTYPE_BF16);
        groups_with_empty_rows(&p);
        attend_rows(&p, 0, 40, part_keys);
        check(&p);
        problem_destroy(&p);
    }
}

/* Few rows over many keys: the plan itself cuts. */
static void planned_parts_give_the_whole(void **state) {
    (void)state;
    const heads of[] = {{3, 1, 64}, {2, 1, 128}};
    for (int i = 0; i < 2; i++) {
        if (!can(of[i])) continue;
        problem p = create_problem(of[i], 2, 9000, 2, IFKV_DTYPE_BF16);
        p.begin[0] = 17, p.end[0] = 8900;
        p.begin[1] = 17, p.end[1] = 4000;
        const int tile_m = ifkv_attention_tile_m(kernel, of[i].d_head);
        assert_true(
            ifkv_attention_plan_make(2, 9000, of[i].n_head, 1, of[i].d_head, tile_m, context.n_sm)
                .n_part > 1);
        attend(&p);
        check(&p);
        problem_destroy(&p);
    }
}

/* Keys that pass by in four blocks, as in a ring; float32 parts merged as they come are the whole.
 */
static void ring_steps_give_the_whole(void **state) {
    (void)state;
    FOR_SOME_HEADS(h) {
        problem p = create_problem(*h, 90, 330, 4, IFKV_DTYPE_F32);
        causal_spans(&p);
        int64_t *begin = malloc(90 * sizeof *begin), *end = malloc(90 * sizeof *end);
        assert_true(begin && end);
        memcpy(begin, p.begin, 90 * sizeof *begin);
        memcpy(end, p.end, 90 * sizeof *end);
        gen_matrix sum =
            gen_matrix_create(&noise, backend, IFKV_DTYPE_F32, 90, p.q.view.n_col, 3, GEN_UNIFORM);
        gen_matrix sum_lse =
            gen_matrix_create(&noise, backend, IFKV_DTYPE_F32, 90, h->n_head, 1, GEN_POISON);
        for (int64_t i = 0; i < 90 * h->n_head; i++) sum_lse.value[i] = -INFINITY;
        gen_matrix_write(&sum_lse);
        const int64_t cut[] = {0, 100, 101, 250, 330};
        for (int step = 0; step < 4; step++) {
            for (int64_t r = 0; r < 90; r++) {
                p.begin[r] = cut[step];
                p.end[r] = end[r] < cut[step]       ? cut[step]
                           : end[r] < cut[step + 1] ? end[r]
                                                    : cut[step + 1];
            }
            attend(&p);
            const ifkv_view outs[] = {sum.view, p.out.view}, lses[] = {sum_lse.view, p.lse.view};
            const ifkv_merge_args merge = {.n_head = h->n_head,
                                           .d_head = h->d_head,
                                           .n_part = 2,
                                           .out_part = outs,
                                           .lse_part = lses,
                                           .out = sum.view,
                                           .lse = sum_lse.view};
            assert_ok(ifkv_cuda_merge(&context, &merge));
            must(cudaDeviceSynchronize());
        }
        assert_true(gen_matrix_read(&sum) && gen_matrix_read(&sum_lse));
        memcpy(p.begin, begin, 90 * sizeof *begin);
        memcpy(p.end, end, 90 * sizeof *end);
        memcpy(p.out.value, sum.value, (size_t)(90 * p.q.view.n_col) * sizeof *sum.value);
        memcpy(p.lse.value, sum_lse.value, (size_t)(90 * h->n_head) * sizeof *sum.value);
        check(&p);
        gen_matrix_destroy(&sum), gen_matrix_destroy(&sum_lse);
        free(begin), free(end);
        problem_destroy(&p);
    }
}

/* A row that lies in one part has the bits it has uncut. */
static void short_spans_ignore_parts(void **state) {
    (void)state;
    FOR_SOME_HEADS(h) {
        problem p = create_problem(*h, 60, 500, 4, IFKV_DTYPE_BF16);
        for (int64_t r = 0; r < 60; r++)
            p.begin[r] = r / 20 * 150, p.end[r] = p.begin[r] + gen_below(&noise, 129);
        attend(&p);
        unsigned char *out, *lse;
        save(&p, &out, &lse);
        attend_rows(&p, 0, 60, 128);
        assert_saved(&p, out, lse);
        problem_destroy(&p);
    }
}

static void impossible_spans_raise_the_fault_word(void **state) {
    (void)state;
    FOR_SOME_HEADS(h) for (int i = 0; i < 3; i++) {
        const int64_t begin[] = {-1, 5, 0}, end[] = {4, 4, 101};
        problem p = create_problem(*h, 9, 100, 1, IFKV_DTYPE_BF16);
        for (int64_t r = 0; r < 9; r++) p.end[r] = 50;
        p.begin[4] = begin[i], p.end[4] = end[i];
        attend(&p);
        int32_t fault;
        must(cudaMemcpy(&fault, context.fault, sizeof fault, cudaMemcpyDeviceToHost));
        assert_int_equal(fault, IFKV_CUDA_FAULT_ATTENTION);
        must(cudaMemset(context.fault, 0, sizeof fault));
        check_rows(&p, 0, 4);
        check_rows(&p, 5, 4);
        problem_destroy(&p);
    }
}

#ifdef IFKV_EMU
enum { MANY = 200 };
#else
enum { MANY = 4133 }; /* beyond what float64 on the host has time for */
#endif

/* Both kernels on rows of every shape of span.  Each errs by its bound at most, with every score
 * and every average at its largest: |v| <= 1, |q| <= 4, |k| <= 1. */
static void kernels_agree(void **state) {
    (void)state;
    span_rule *const rules[] = {causal_spans,         whole_spans, single_keys,
                                chunks_at_tile_edges, windows,     ends_in_any_order,
                                descending_ends,      steep_ends,  groups_with_empty_rows};
    for (size_t i = 0; i < 2 * sizeof rules / sizeof *rules; i++) {
        const heads h = {5, 1, i % 2 ? 128 : 64};
        if (only_d && h.d_head != only_d) continue;
        problem p = create_problem(h, MANY - 50, MANY, 4, IFKV_DTYPE_BF16);
        rules[i / 2](&p);
        const int64_t n = p.n_row * p.out.view.n_col, n_lse = p.n_row * h.n_head;
        const double delta = (h.d_head + 4) * 0x1p-23 * 4 * sqrt((double)h.d_head),
                     steps = sum_steps(MANY);
        double *out = malloc((size_t)n * sizeof *out), *lse = malloc((size_t)n_lse * sizeof *lse);
        double error = 0, norm = 0;
        assert_true(out && lse);
        kernel = IFKV_ATTENTION_SM80;
        attend(&p);
        memcpy(out, p.out.value, (size_t)n * sizeof *out);
        memcpy(lse, p.lse.value, (size_t)n_lse * sizeof *lse);
        for (int64_t x = 0; x < n; x++) p.out.value[x] = (double)NAN;
        gen_matrix_write(&p.out);
        kernel = IFKV_ATTENTION_SM90;
        attend(&p);
        for (int64_t x = 0; x < n; x++) {
            const double got = p.out.value[x];
            assert_close("out of sm90, of sm80", x / p.out.view.n_col, x % p.out.view.n_col, got,
                         out[x], 2.02 * (2 * delta + 0x1p-8 + (2 * steps + 4) * 0x1p-23 + 0x1p-8));
            error += (got - out[x]) * (got - out[x]);
            norm += out[x] * out[x];
        }
        assert_true(sqrt(error) <= 8e-3 * sqrt(norm)); /* 4e-3 each */
        for (int64_t x = 0; x < n_lse; x++)
            assert_close("lse of sm90, of sm80", x / h.n_head, x % h.n_head, p.lse.value[x], lse[x],
                         2 * (delta + (steps + 4) * 0x1p-23) + 0x1p-21 * fabs(lse[x]));
        assert_no_fault();
        free(out), free(lse);
        problem_destroy(&p);
    }
}

static void operands_that_do_not_fit_are_refused(void **state) {
    (void)state;
    const ifkv_status status = IFKV_ERR_INTERNAL;
    problem p = create_problem((heads){6, 2, 64}, 3, 10, 1, IFKV_DTYPE_BF16);
    const ifkv_attention_args good = problem_args(&p);
    ifkv_attention_args args = good;
    args.n_kv_head = 4;
    assert_fails(ifkv_cuda_attention(&context, &args), status, IFKV_E_SHAPE,
                 "6 is not a multiple of kv heads 4");
    args = good, args.d_head = 40;
    assert_fails(ifkv_cuda_attention(&context, &args), IFKV_ERR_UNSUPPORTED, IFKV_E_SHAPE, "40");
    args = good, args.d_head = 144;
    assert_fails(ifkv_cuda_attention(&context, &args), IFKV_ERR_UNSUPPORTED, IFKV_E_SHAPE, "144");
    args = good, args.n_head = 130;
    assert_fails(ifkv_cuda_attention(&context, &args), IFKV_ERR_UNSUPPORTED, IFKV_E_SHAPE,
                 "65 query heads");
    args = good, args.k.n_col = 64;
    assert_fails(ifkv_cuda_attention(&context, &args), status, IFKV_E_SHAPE, "k is [10, 64]");
    args = good, args.lse.dtype = IFKV_DTYPE_F64;
    assert_fails(ifkv_cuda_attention(&context, &args), status, IFKV_E_SHAPE, "lse");
    args = good, args.q.stride += 4;
    assert_fails(ifkv_cuda_attention(&context, &args), status, IFKV_E_SHAPE, "16-byte rows");
    args = good, args.v.data = (char *)args.v.data + 8;
    assert_fails(ifkv_cuda_attention(&context, &args), status, IFKV_E_SHAPE, "v starts at");
    args = good, args.scale = 0;
    assert_fails(ifkv_cuda_attention(&context, &args), status, IFKV_E_SHAPE, "scale 0");
    args = good;
    ifkv_cuda_context small = context;
    small.workspace_bytes = 1024;
    assert_fails(ifkv_cuda_attention_by(&small, &args, kernel, 2), status, IFKV_E_MEMORY,
                 "5 parts");
    problem_destroy(&p);
}

/* Maps that n more calls over rows [0, n_row) and keys [0, n_key) encode; the last one is checked.
 */
static int64_t encoded_by(problem *p, int n, int64_t n_row, int64_t n_key) {
    const int64_t before = ifkv_tensor_maps_encoded(context.maps);
    const ifkv_view k = p->k.view, v = p->v.view;
    p->k.view.n_row = p->v.view.n_row = n_key;
    for (int i = 0; i < n; i++) attend_rows(p, 0, n_row, 0);
    p->k.view = k, p->v.view = v;
    check_rows(p, 0, n_row);
    return ifkv_tensor_maps_encoded(context.maps) - before;
}

/* Of q, k and v; the sm_80 kernel needs none. */
static void calls_of_a_known_shape_encode_nothing(void **state) {
    (void)state;
    const int is_used = kernel == IFKV_ATTENTION_SM90;
    problem p = create_problem((heads){6, 2, only_d ? only_d : 64}, 40, 100, 1, IFKV_DTYPE_BF16);
    for (int64_t r = 0; r < 40; r++) p.end[r] = 1 + r;
    assert_int_equal(encoded_by(&p, 1, 40, 100), 3 * is_used);
    assert_int_equal(encoded_by(&p, 3, 40, 100), 0);
    assert_int_equal(encoded_by(&p, 1, 30, 100), is_used);
    assert_int_equal(encoded_by(&p, 1, 40, 90), 2 * is_used);
    assert_int_equal(encoded_by(&p, 1, 40, 100), 0);
    problem_destroy(&p);
}

static void every_word_of_a_shape_counts(void **state) {
    (void)state;
    const ifkv_tensor_shape base = {context.workspace, 2, {64, 128}, {64}, {64, 8}};
    ifkv_tensor_shape other[] = {base, base, base, base, base};
    CUtensorMap first, map;
    ifkv_tensor_maps *maps = NULL;
    other[0].data = (char *)context.workspace + 16;
    other[1] = (ifkv_tensor_shape){context.workspace, 1, {64}, {0}, {64}};
    other[2].dims[1] = 127;
    other[3].strides[0] = 72;
    other[4].box[1] = 9;
    assert_ok(ifkv_tensor_maps_create(&maps));
    assert_ok(ifkv_tensor_maps_get(maps, &base, &first));
    for (int i = 0; i < 5; i++) {
        assert_ok(ifkv_tensor_maps_get(maps, &other[i], &map));
        assert_int_equal(ifkv_tensor_maps_encoded(maps), 2 + i);
        assert_memory_not_equal(&map, &first, sizeof map);
    }
    ifkv_tensor_maps_destroy(maps);
}

/* Beyond the bound maps are encoded again, and are the same. */
static void tensor_maps_are_bounded(void **state) {
    (void)state;
    char *const data = context.workspace; /* never looked at */
    ifkv_tensor_shape shape = {data, 2, {64, 128}, {64}, {64, 8}};
    CUtensorMap first, map;
    ifkv_tensor_maps *maps = NULL;
    assert_ok(ifkv_tensor_maps_create(&maps));
    assert_ok(ifkv_tensor_maps_get(maps, &shape, &first));
    for (int i = 1; i <= IFKV_TENSOR_MAPS; i++) {
        shape.data = data + 16 * i;
        assert_ok(ifkv_tensor_maps_get(maps, &shape, &map));
        assert_int_equal(ifkv_tensor_maps_encoded(maps), i + 1);
        assert_memory_not_equal(&map, &first, sizeof map);
        if (i + 1 < IFKV_TENSOR_MAPS) continue;
        shape.data = data;
        assert_ok(ifkv_tensor_maps_get(maps, &shape, &map));
        assert_memory_equal(&map, &first, sizeof map);
        assert_int_equal(ifkv_tensor_maps_encoded(maps), i < IFKV_TENSOR_MAPS ? i + 1 : i + 2);
    }
    ifkv_tensor_maps_destroy(maps);
}

static int device_attribute(enum cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    must(cudaGetDevice(&device));
    must(cudaDeviceGetAttribute(&value, attribute, device));
    return value;
}

/* A context of its own beside the back end's, with a workspace for more parts than are ever
 * planned: tests cut spans very short. */
static int open_context(void **state) {
    (void)state;
    const int32_t none = IFKV_CUDA_FAULT_NONE;
    assert_ok(ifkv_backend_open("cuda", 1, 0, &backend));
    print_message("kernel %s on %s\n", kernel == IFKV_ATTENTION_SM90 ? "sm90" : "sm80",
                  backend->device);
    context.n_sm = device_attribute(cudaDevAttrMultiProcessorCount);
    context.arch = 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
                   device_attribute(cudaDevAttrComputeCapabilityMinor);
    context.fault = gen_upload(backend, &none, sizeof none);
    context.workspace_bytes = 2 << 20;
    assert_ok(backend->ops->alloc(backend, context.workspace_bytes, &context.workspace));
    assert_ok(ifkv_tensor_maps_create(&context.maps));
    return 0;
}

static int close_context(void **state) {
    (void)state;
    ifkv_tensor_maps_destroy(context.maps);
    backend->ops->free(backend, context.workspace);
    backend->ops->free(backend, context.fault);
    ifkv_backend_close(backend);
    return 0;
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(causal_spans_match_float64),
        cmocka_unit_test(whole_spans_match_float64),
        cmocka_unit_test(single_keys_match_float64),
        cmocka_unit_test(chunks_at_tile_edges_match_float64),
        cmocka_unit_test(windows_match_float64),
        cmocka_unit_test(ends_in_any_order_match_float64),
        cmocka_unit_test(descending_ends_match_float64),
        cmocka_unit_test(steep_ends_match_float64),
        cmocka_unit_test(groups_with_empty_rows_match_float64),
        cmocka_unit_test(rows_about_a_tile_match_float64),
        cmocka_unit_test(keys_no_tile_sees_may_be_nan),
        cmocka_unit_test(masked_keys_change_no_bit),
        cmocka_unit_test(a_nan_is_not_hidden),
        cmocka_unit_test(two_runs_give_the_same_bits),
        cmocka_unit_test(selected_rows_have_the_bits_of_the_whole),
        cmocka_unit_test(a_group_ignores_its_neighbours),
        cmocka_unit_test(constant_values_come_back),
        cmocka_unit_test(one_key_gives_its_value_bitwise),
        cmocka_unit_test(one_hot_queries_fetch_their_value),
        cmocka_unit_test(equal_keys_give_the_mean_exactly),
        cmocka_unit_test(large_scores_are_safe),
        cmocka_unit_test(empty_calls_write_what_is_due),
        cmocka_unit_test(parts_give_the_whole),
        cmocka_unit_test(planned_parts_give_the_whole),
        cmocka_unit_test(calls_of_a_known_shape_encode_nothing),
        cmocka_unit_test(every_word_of_a_shape_counts),
        cmocka_unit_test(tensor_maps_are_bounded),
        cmocka_unit_test(ring_steps_give_the_whole),
        cmocka_unit_test(short_spans_ignore_parts),
        cmocka_unit_test(impossible_spans_raise_the_fault_word),
        cmocka_unit_test(operands_that_do_not_fit_are_refused),
    };
    const struct CMUnitTest both[] = {cmocka_unit_test(kernels_agree)};
    const char *only = argc > 1 ? argv[1] : "";
    int n_failed = 0;
    only_d = argc > 2 ? atoi(argv[2]) : 0;
    if (argc > 3) cmocka_set_test_filter(argv[3]);
    noise = gen_create(argv[0]);
    kernel = IFKV_ATTENTION_SM80;
    if (!*only || !strcmp(only, "sm80"))
        n_failed += cmocka_run_group_tests(tests, open_context, close_context);
    kernel = IFKV_ATTENTION_SM90;
    const bool has_sm90 = device_attribute(cudaDevAttrComputeCapabilityMajor) == 9;
    if (!has_sm90) print_message("SKIPPED: the sm90 kernel needs compute capability 9.x\n");
    if (has_sm90 && (!*only || !strcmp(only, "sm90")))
        n_failed += cmocka_run_group_tests(tests, open_context, close_context);
    if (has_sm90 && (!*only || !strcmp(only, "both")))
        n_failed += cmocka_run_group_tests(both, open_context, close_context);
    return n_failed;
}
