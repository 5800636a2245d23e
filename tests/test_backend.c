/* Conformance of a back end, first part: memory, products, row-wise operations and top-k.
 *
 *   test_backend cpu | cuda
 *
 * Every operation against a float64 computation from its definition, written here. */
#include "conformance.h"

#include "cpu_backend.h"

static void names_and_thread_counts_are_checked(void **state) {
    (void)state;
    ifkv_backend *backend = NULL;
    assert_fails(ifkv_backend_open("gpu", 1, 0, &backend), IFKV_ERR_USAGE, IFKV_E_BACKEND,
                 "\"gpu\"");
    assert_fails(ifkv_backend_open(NULL, 1, 0, &backend), IFKV_ERR_USAGE, IFKV_E_BACKEND, "NULL");
    assert_fails(ifkv_backend_open("cpu", 0, 0, &backend), IFKV_ERR_USAGE, IFKV_E_VALUE, "got 0");
    assert_null(backend);
    ifkv_backend_close(NULL);
    assert_ok(ifkv_backend_open("auto", 1, 0, &backend));
    ifkv_backend_close(backend);
#if !IFKV_HAVE_CUDA
    assert_fails(ifkv_backend_open("cuda", 1, 0, &backend), IFKV_ERR_UNSUPPORTED, IFKV_E_BACKEND,
                 "without CUDA");
#endif
}

static void memory_is_aligned_and_keeps_bytes(void **state) {
    ifkv_backend *backend = *state;
    const ifkv_backend_ops *ops = backend->ops;
    const size_t sizes[] = {0, 1, 63, 4096, (2 << 20) - 1, (5 << 20) + 3};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        const size_t n = sizes[i];
        void *a = NULL, *b = NULL;
        unsigned char *host = malloc(2 * n + 1);
        assert_non_null(host);
        for (size_t j = 0; j < n; j++) host[j] = (unsigned char)gen_bits(&noise);
        assert_ok(ops->alloc(backend, n, &a));
        assert_ok(ops->alloc(backend, n, &b));
        assert_true(a != NULL && b != NULL && a != b);
        assert_int_equal((uintptr_t)a % 64 + (uintptr_t)b % 64, 0);
        assert_ok(ops->upload(backend, a, host, n));
        assert_ok(ops->copy(backend, b, a, n));
        assert_ok(ops->download(backend, host + n, b, n));
        assert_ok(ops->sync(backend));
        assert_memory_equal(host, host + n, n);
        ops->free(backend, a);
        ops->free(backend, b);
        free(host);
    }
    ops->free(backend, NULL);
}

static void too_much_memory_is_refused(void **state) {
#if defined(__SANITIZE_ADDRESS__)
    (void)state;
    print_message("skipped: the address sanitizer ends the program on such a request\n");
    skip();
#else
    ifkv_backend *backend = *state;
    void *none = NULL;
    assert_fails(backend->ops->alloc(backend, SIZE_MAX / 2, &none), IFKV_ERR_RESOURCE,
                 IFKV_E_MEMORY, "no memory");
    assert_null(none);
#endif
}

static void clock_does_not_go_back(void **state) {
    ifkv_backend *backend = *state;
    double last = backend->ops->clock_ms(backend);
    for (int i = 0; i < 1000; i++) {
        const double now = backend->ops->clock_ms(backend);
        assert_true(now >= last);
        last = now;
    }
}

/* out = x w^T (+ out) against float64; integers to the last bit, noise within rounding.  The
 * partial sums of noise grow like sqrt(k) / 3, so the n_in roundings of a float32 sum err by about
 * EPS sqrt(n_in) / 5 of a typical output; the factor 2 is ten deviations. */
static void check_matmul(ifkv_backend *backend, ifkv_dtype to, int64_t n_row, int64_t n_out,
                         int64_t n_in, bool add_to_out, gen_fill fill) {
    gen_matrix x = make(backend, n_row, n_in, gen_below(&noise, 3), fill);
    gen_matrix w = make(backend, n_out, n_in, gen_below(&noise, 3), fill);
    gen_matrix out =
        make_of(backend, to, n_row, n_out, gen_below(&noise, 3), add_to_out ? fill : GEN_POISON);
    double *want = malloc((size_t)(n_row * n_out) * sizeof *want), square = 0;
    for (int64_t r = 0; r < n_row; r++)
        for (int64_t c = 0; c < n_out; c++) {
            double sum = add_to_out ? *gen_at(&out, r, c) : 0;
            for (int64_t i = 0; i < n_in; i++) sum += *gen_at(&x, r, i) * *gen_at(&w, c, i);
            want[r * n_out + c] = sum;
            square += sum * sum;
        }
    const double typical = sqrt(square / (double)(n_row * n_out)) + 1;
    const double tolerance = 2 * EPS * sqrt((double)n_in) * typical;
    assert_ok(backend->ops->matmul(backend, &x.view, &w.view, add_to_out, &out.view));
    assert_true(gen_matrix_read(&out));
    for (int64_t r = 0; r < n_row; r++)
        for (int64_t c = 0; c < n_out; c++) {
            const double sum = want[r * n_out + c];
            if (fill == GEN_INTEGER)
                assert_near(*gen_at(&out, r, c), gen_round(to, sum), 0, "matmul", r, c);
            else
                assert_near(*gen_at(&out, r, c), sum, tolerance + rounding(to, sum), "matmul", r,
                            c);
        }
    free(want);
    gen_matrix_destroy(&x), gen_matrix_destroy(&w), gen_matrix_destroy(&out);
}

/* On both sides of every limit: few rows, tiles of 48 rows and of 832 inputs, tasks of 256 x 96. */
static const int64_t matmul_shapes[][3] = {
    {1, 1, 1},     {1, 65, 576},  {3, 129, 40},  {4, 64, 257},   {5, 97, 833},
    {5, 1, 7},     {7, 23, 31},   {48, 24, 576}, {49, 96, 1665}, {257, 97, 64},
    {300, 200, 9}, {96, 50, 832}, {20, 57, 100}};

/* Into the back end's type and into float32, which logits have; added to what is there or not. */
static void check_matmuls(ifkv_backend *backend, gen_fill fill) {
    const ifkv_dtype to[] = {IFKV_DTYPE_F32, backend->ops->dtype};
    for (size_t i = 0; i < sizeof matmul_shapes / sizeof *matmul_shapes; i++)
        for (int way = 0; way < 8; way++) {
            is_aligned = way & 4;
            check_matmul(backend, to[way & 1], matmul_shapes[i][0], matmul_shapes[i][1],
                         matmul_shapes[i][2], way & 2, fill);
        }
    check_matmul(backend, to[1], 1 + gen_below(&noise, 300), 1 + gen_below(&noise, 300),
                 1 + gen_below(&noise, 2000), false, fill);
    is_aligned = false;
}

static void matmul_is_exact_on_integers(void **state) {
    check_matmuls(*state, GEN_INTEGER);
}

static void matmul_matches_float64(void **state) {
    check_matmuls(*state, GEN_UNIFORM);
}

static void matmul_of_no_rows_is_nothing(void **state) {
    ifkv_backend *backend = *state;
    gen_matrix x = make(backend, 0, 40, 0, GEN_UNIFORM), w = make(backend, 24, 40, 0, GEN_UNIFORM),
               out = make(backend, 0, 24, 0, GEN_POISON);
    assert_ok(backend->ops->matmul(backend, &x.view, &w.view, true, &out.view));
    assert_true(gen_matrix_read(&out));
    gen_matrix_destroy(&x), gen_matrix_destroy(&w), gen_matrix_destroy(&out);
}

/* Relative error: the float32 sum of n squares errs by EPS sqrt(n) / 2 at most in practice, its
 * root by half of that; three more roundings follow. */
static double norm_tolerance(int64_t n) {
    return EPS * (2 + sqrt((double)n) / 2);
}

static double norm_of(const gen_matrix *x, int64_t row, int64_t first, int64_t n, double eps) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += *gen_at(x, row, first + i) * *gen_at(x, row, first + i);
    return sqrt(sum / (double)n + eps);
}

static void rms_norm_matches_float64(void **state) {
    ifkv_backend *backend = *state;
    const int64_t shapes[][2] = {{1, 1}, {1, 576}, {3, 33}, {130, 577}, {2, 4096}, {3, 9000}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (int way = 0; way < 4; way++) {
            const bool in_place = way & 1;
            is_aligned = way & 2;
            const int64_t n_row = shapes[s][0], n_col = shapes[s][1];
            gen_matrix x = make(backend, n_row, n_col, 3, GEN_UNIFORM),
                       weight = make(backend, 1, n_col, 0, GEN_UNIFORM),
                       out = make(backend, n_row, n_col, 1, GEN_POISON);
            double *before = malloc((size_t)(n_row * n_col) * sizeof *before);
            memcpy(before, x.value, (size_t)(n_row * n_col) * sizeof *before);
            gen_matrix old = x, *to = in_place ? &x : &out;
            old.value = before;
            assert_ok(backend->ops->rms_norm(backend, &x.view, &weight.view, 1e-5, &to->view));
            assert_true(gen_matrix_read(to));
            for (int64_t r = 0; r < n_row; r++) {
                const double norm = norm_of(&old, r, 0, n_col, 1e-5);
                for (int64_t c = 0; c < n_col; c++) {
                    const double want = *gen_at(&old, r, c) / norm * *gen_at(&weight, 0, c);
                    assert_near(*gen_at(to, r, c), want,
                                norm_tolerance(n_col) * fabs(want) + rounding(x.view.dtype, want),
                                "rms_norm", r, c);
                }
            }
            free(before);
            gen_matrix_destroy(&x), gen_matrix_destroy(&weight), gen_matrix_destroy(&out);
        }
    is_aligned = false;
}

static void rms_norm_of_zero_is_zero(void **state) {
    ifkv_backend *backend = *state;
    gen_matrix x = make(backend, 2, 40, 0, GEN_POISON),
               weight = make(backend, 1, 40, 0, GEN_UNIFORM);
    for (int64_t i = 0; i < 80; i++) x.value[i] = 0;
    gen_matrix_write(&x);
    assert_ok(backend->ops->rms_norm(backend, &x.view, &weight.view, 1e-6, &x.view));
    assert_true(gen_matrix_read(&x));
    for (int64_t i = 0; i < 80; i++) assert_true(x.value[i] == 0);
    gen_matrix_destroy(&x), gen_matrix_destroy(&weight);
}

/* Angles of these positions [n] into to [n, 2 * half]. */
static void make_angles(ifkv_backend *backend, const int64_t *position, const double *frequency,
                        gen_matrix *to) {
    int64_t *at = gen_upload(backend, position, (size_t)to->view.n_row * sizeof *position);
    assert_ok(backend->ops->angles(backend, frequency, at, &to->view));
    assert_true(gen_matrix_read(to));
    backend->ops->free(backend, at);
}

/* Beyond 2^24 a float position would be off by whole radians. */
static void angles_match_long_double(void **state) {
    ifkv_backend *backend = *state;
    enum { N_ROW = 300, N_FIXED = 5 };
    static const int64_t fixed[N_FIXED] = {1, -1, 131071, -40000, (1 << 30) + 1};
    const int64_t width[] = {2, 6, 64, 96, 128};
    for (size_t s = 0; s < sizeof width / sizeof *width; s++) {
        const int64_t half = width[s] / 2;
        int64_t position[N_ROW];
        double frequency[64];
        gen_matrix to = make_of(backend, IFKV_DTYPE_F32, N_ROW, width[s], 3, GEN_POISON);
        for (int64_t r = 0; r < N_ROW; r++)
            position[r] = r < N_FIXED ? fixed[r] : gen_below(&noise, 1 << 20) - (1 << 18);
        for (int64_t i = 0; i < half; i++) frequency[i] = pow(1e6, -(double)i / (double)half);
        make_angles(backend, position, frequency, &to);
        for (int64_t r = 0; r < N_ROW; r++)
            for (int64_t i = 0; i < half; i++) {
                const long double angle = (long double)position[r] * (long double)frequency[i];
                /* the result's rounding below 1; the product's, in float64 */
                const double tolerance = EPS / 4 * (1 + 1e-6) + (double)fabsl(angle) * 0x1p-53;
                assert_near(*gen_at(&to, r, i), (double)cosl(angle), tolerance, "cosine", r, i);
                assert_near(*gen_at(&to, r, half + i), (double)sinl(angle), tolerance, "sine", r,
                            i);
            }
        gen_matrix_destroy(&to);
    }
}

static void position_zero_turns_by_nothing(void **state) {
    ifkv_backend *backend = *state;
    const int64_t position[2] = {0, 0};
    const double frequency[3] = {1, 0.3, 1e-3};
    gen_matrix to = make_of(backend, IFKV_DTYPE_F32, 2, 6, 0, GEN_POISON);
    make_angles(backend, position, frequency, &to);
    for (int64_t i = 0; i < 12; i++) assert_true(to.value[i] == (i % 6 < 3 ? 1 : 0));
    gen_matrix_destroy(&to);
}

/* (cos, sin) of a + b from those of a and b. */
static void angles_add_up(void **state) {
    ifkv_backend *backend = *state;
    const int64_t a[] = {0, 1, 17, 40959, 1 << 25}, b[] = {-1, 5, -40000, 131072, 1 << 25};
    double frequency[64];
    for (int i = 0; i < 64; i++) frequency[i] = pow(1e6, -i / 64.0);
    for (int i = 0; i < 5; i++) {
        const int64_t position[3] = {a[i], b[i], a[i] + b[i]};
        gen_matrix to = make_of(backend, IFKV_DTYPE_F32, 3, 128, 0, GEN_POISON);
        make_angles(backend, position, frequency, &to);
        for (int64_t j = 0; j < 64; j++) {
            const double ca = *gen_at(&to, 0, j), sa = *gen_at(&to, 0, 64 + j),
                         cb = *gen_at(&to, 1, j), sb = *gen_at(&to, 1, 64 + j);
            /* four factors rounded to 2^-24 each */
            assert_near(ca * cb - sa * sb, *gen_at(&to, 2, j), 4 * 0x1p-24 + 1e-8, "cosine", i, j);
            assert_near(sa * cb + ca * sb, *gen_at(&to, 2, 64 + j), 4 * 0x1p-24 + 1e-8, "sine", i,
                        j);
        }
        gen_matrix_destroy(&to);
    }
}

static void rope_matches_float64(void **state) {
    ifkv_backend *backend = *state;
    const int shapes[][3] = {
        {1, 1, 2}, {70, 3, 64}, {9, 5, 128}, {2, 8, 96}, {2, 70, 128}}; /* row, head, d_head */
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (int way = 0; way < 4; way++) {
            const bool normed = way & 1;
            is_aligned = way & 2;
            const int64_t n_row = shapes[s][0], d = shapes[s][2], half = d / 2;
            const int n_head = shapes[s][1];
            gen_matrix x = make(backend, n_row, n_head * d, 5, GEN_UNIFORM),
                       weight = make(backend, 1, d, 0, GEN_UNIFORM),
                       angle = make_of(backend, IFKV_DTYPE_F32, n_row, d, 2, GEN_UNIFORM);
            double *before = malloc((size_t)(n_row * n_head * d) * sizeof *before);
            memcpy(before, x.value, (size_t)(n_row * n_head * d) * sizeof *before);
            gen_matrix old = x;
            old.value = before;
            assert_ok(backend->ops->rope(backend, &x.view, n_head, normed ? &weight.view : NULL,
                                         1e-6, &angle.view));
            assert_true(gen_matrix_read(&x));
            for (int64_t r = 0; r < n_row; r++)
                for (int64_t i = 0; i < n_head * d; i++) {
                    const int64_t head = i / d * d, low = i % d % half;
                    const double norm = normed ? norm_of(&old, r, head, d, 1e-6) : 1;
                    double a = *gen_at(&old, r, head + low) / norm,
                           b = *gen_at(&old, r, head + low + half) / norm;
                    if (normed) a *= *gen_at(&weight, 0, low), b *= *gen_at(&weight, 0, low + half);
                    const double cosine = *gen_at(&angle, r, low),
                                 sine = *gen_at(&angle, r, low + half);
                    const double want =
                        i % d < half ? a * cosine - b * sine : b * cosine + a * sine;
                    /* Two products and a sum, each one rounding, of terms that may cancel. */
                    const double size = fabs(a) + fabs(b);
                    assert_near(*gen_at(&x, r, i), want,
                                size * (EPS + (normed ? norm_tolerance(d) : 0)) +
                                    rounding(x.view.dtype, want),
                                "rope", r, i);
                }
            free(before);
            gen_matrix_destroy(&x), gen_matrix_destroy(&weight), gen_matrix_destroy(&angle);
        }
    is_aligned = false;
}

static void quarter_turn_is_exact(void **state) {
    ifkv_backend *backend = *state;
    gen_matrix x = make(backend, 3, 128, 1, GEN_INTEGER);
    gen_matrix angle = gen_matrix_create(&noise, backend, IFKV_DTYPE_F32, 3, 64, 0, GEN_POISON);
    for (int64_t i = 0; i < 3 * 64; i++) angle.value[i] = i % 64 < 32 ? 0 : 1;
    gen_matrix_write(&angle);
    double before[3 * 128];
    memcpy(before, x.value, sizeof before);
    assert_ok(backend->ops->rope(backend, &x.view, 2, NULL, 0, &angle.view));
    assert_true(gen_matrix_read(&x));
    for (int64_t i = 0; i < 3 * 128; i++)
        assert_true(x.value[i] == (i % 64 < 32 ? -before[i + 32] : before[i - 32]));
    gen_matrix_destroy(&x), gen_matrix_destroy(&angle);
}

/* silu(g) = g / (1 + e^-g): 2 ulp of the exponential and four roundings; e^g as a power of two adds
 * the rounding of g log2 e, which is up to EPS / 2 of it. */
static void swiglu_matches_float64(void **state) {
    ifkv_backend *backend = *state;
    const int64_t shapes[][2] = {{1, 1}, {3, 31}, {65, 1536}, {2, 5000}};
    for (size_t s = 0; s < 2 * sizeof shapes / sizeof *shapes; s++) {
        const int64_t n_row = shapes[s / 2][0], d_ff = shapes[s / 2][1];
        is_aligned = s % 2;
        gen_matrix in = make(backend, n_row, 2 * d_ff, 7, GEN_UNIFORM),
                   out = make(backend, n_row, d_ff, 1, GEN_POISON);
        for (int64_t i = 0; i < n_row * 2 * d_ff; i++) in.value[i] *= i % 3 ? 4 : 80;
        gen_matrix_write(&in);
        assert_ok(backend->ops->swiglu(backend, &in.view, &out.view));
        assert_true(gen_matrix_read(&out));
        for (int64_t r = 0; r < n_row; r++)
            for (int64_t c = 0; c < d_ff; c++) {
                const double g = *gen_at(&in, r, c);
                const double want = g / (1 + exp(-g)) * *gen_at(&in, r, d_ff + c);
                const double power = is_cpu() ? 0 : fabs(g) / 2;
                assert_near(*gen_at(&out, r, c), want,
                            (4 + power) * EPS * fabs(want) + rounding(out.view.dtype, want),
                            "swiglu", r, c);
            }
        gen_matrix_destroy(&in), gen_matrix_destroy(&out);
    }
    is_aligned = false;
}

static void swiglu_survives_extremes(void **state) {
    ifkv_backend *backend = *state;
    const double gate[] = {-1e30, -1000, -89, 0, 89, 1000, 1e30, (double)NAN};
    enum { N = sizeof gate / sizeof *gate };
    gen_matrix in = make(backend, 1, 2 * N, 0, GEN_POISON),
               out = make(backend, 1, N, 0, GEN_POISON);
    for (int i = 0; i < N; i++) in.value[i] = gate[i], in.value[N + i] = 0.5;
    gen_matrix_write(&in);
    assert_ok(backend->ops->swiglu(backend, &in.view, &out.view));
    assert_true(gen_matrix_read(&out));
    for (int i = 0; i < N - 1; i++)
        assert_near(out.value[i], gate[i] > 0 ? in.value[i] / 2 : 0, 1e-30, "swiglu", 0, i);
    assert_true(isnan(out.value[N - 1]));
    gen_matrix_destroy(&in), gen_matrix_destroy(&out);
}

/* The exponential under attention and SwiGLU, from 2^-126 to 2^127, and its ends. */
static void exponential_is_within_two_ulp(void **state) {
    (void)state;
    for (int64_t i = 0; i < 2000000; i += 71) {
        float x[71], y[71];
        double sum = 0;
        for (int j = 0; j < 71; j++) {
            x[j] = (float)gen_uniform(&noise, i % 2 ? -87.33 : -4, i % 2 ? 88 : 0);
            if (i % 2 == 0) sum += exp((double)x[j]);
        }
        memcpy(y, x, sizeof y);
        const float total = ifkv_cpu_exp_sum(y, 71, 0);
        for (int j = 0; j < 71; j++) {
            const double want = exp((double)x[j]), ulp = ldexp(EPS, ilogb(want));
            assert_near((double)y[j], want, 2 * ulp, "exp", 0, j);
        }
        if (i % 2 == 0) assert_near((double)total, sum, 8 * EPS * sum, "sum of exp", 0, i);
    }
    float end[] = {-INFINITY, -1e30f, -200, 0, -88.0f, NAN};
    const float want[] = {0, 0, 0, 1};
    (void)ifkv_cpu_exp_sum(end, 6, 0);
    for (int i = 0; i < 4; i++) assert_true(end[i] == want[i]);
    assert_true(end[4] >= 0 && end[4] < 0x1p-126f);
    assert_true(isnan(end[5]));
}

static void gather_and_scatter_move_rows_bitwise(void **state) {
    ifkv_backend *backend = *state;
    const ifkv_dtype dtypes[] = {backend->ops->dtype, IFKV_DTYPE_F64};
    for (int t = 0; t < 2; t++)
        for (int way = 0; way < 6; way++) {
            enum { N_FROM = 301, N_TO = 150 };
            const bool listed = way & 1;
            const int64_t n_col = way < 2 ? 129 : 136;
            is_aligned = way >= 4;
            gen_matrix from = make_of(backend, dtypes[t], N_FROM, n_col, 4, GEN_UNIFORM);
            gen_matrix to = make_of(backend, dtypes[t], N_TO, n_col, 1, GEN_POISON);
            gen_matrix back = make_of(backend, dtypes[t], N_FROM, n_col, 0, GEN_POISON);
            int64_t row[N_TO];
            for (int i = 0; i < N_TO; i++) row[i] = listed ? (i * 11 + 3) % N_FROM : i;
            int64_t *list = gen_upload(backend, row, sizeof row);
            assert_ok(backend->ops->gather(backend, &from.view, listed ? list : NULL, &to.view));
            assert_ok(backend->ops->scatter(backend, &to.view, listed ? list : NULL, &back.view));
            assert_true(gen_matrix_read(&to));
            assert_true(gen_matrix_read(&back));
            for (int i = 0; i < N_TO; i++) {
                const size_t bytes = (size_t)n_col * sizeof(double);
                assert_memory_equal(gen_at(&to, i, 0), gen_at(&from, row[i], 0), bytes);
                assert_memory_equal(gen_at(&back, row[i], 0), gen_at(&from, row[i], 0), bytes);
            }
            int64_t n_written = 0;
            for (int i = 0; i < N_FROM; i++) n_written += !isnan(*gen_at(&back, i, 0));
            assert_int_equal(n_written, N_TO);
            backend->ops->free(backend, list);
            gen_matrix_destroy(&from), gen_matrix_destroy(&to), gen_matrix_destroy(&back);
        }
    is_aligned = false;
}

typedef struct ranked {
    float value;
    int64_t index;
} ranked;

static int better_first(const void *a, const void *b) {
    const ranked *x = a, *y = b;
    if (x->value != y->value) return x->value > y->value ? -1 : 1;
    return x->index < y->index ? -1 : 1;
}

static int ascending(const void *a, const void *b) {
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static void check_top_k(ifkv_backend *backend, const float *value, int64_t n, int64_t k) {
    ranked *list = malloc((size_t)(n + 1) * sizeof *list);
    int64_t *want = malloc((size_t)(k + 1) * sizeof *want),
            *got = malloc((size_t)(k + 1) * sizeof *got);
    for (int64_t i = 0; i < n; i++) list[i] = (ranked){value[i], i};
    qsort(list, (size_t)n, sizeof *list, better_first);
    for (int64_t i = 0; i < k; i++) want[i] = list[i].index;
    qsort(want, (size_t)k, sizeof *want, ascending);
    want[k] = -77; /* fence */
    got[k] = -77;
    float *on_device = gen_upload(backend, value, (size_t)n * sizeof *value);
    int64_t *scratch = gen_upload(backend, got, 0), *index;
    backend->ops->free(backend, scratch);
    void *space = NULL;
    assert_ok(backend->ops->alloc(backend, (size_t)n * sizeof *scratch, &space));
    index = gen_upload(backend, got, (size_t)(k + 1) * sizeof *got);
    assert_ok(backend->ops->top_k(backend, on_device, n, k, space, index));
    assert_ok(backend->ops->download(backend, got, index, (size_t)(k + 1) * sizeof *got));
    assert_ok(backend->ops->sync(backend));
    assert_memory_equal(got, want, (size_t)(k + 1) * sizeof *got);
    backend->ops->free(backend, on_device), backend->ops->free(backend, space);
    backend->ops->free(backend, index);
    free(list), free(want), free(got);
}

static void top_k_is_the_head_of_a_total_order(void **state) {
    static const float few[] = {0.0f, -0.0f, 1, -1, 0x1p-140f, -0x1p-140f, INFINITY, -INFINITY};
    enum { N = 3001 };
    static float value[N];
    for (int round = 0; round < 6; round++) {
        for (int i = 0; i < N; i++)
            value[i] = round == 0   ? 0.25f
                       : round == 1 ? (i % 2 ? 0.0f : -0.0f)
                       : round < 4  ? few[gen_below(&noise, 8)]
                                    : (float)gen_uniform(&noise, -1, 1);
        const int64_t ks[] = {0, 1, 2, N / 7, N / 2, N - 1, N, gen_below(&noise, N)};
        for (size_t i = 0; i < sizeof ks / sizeof *ks; i++) check_top_k(*state, value, N, ks[i]);
        check_top_k(*state, value, 1, 1);
        check_top_k(*state, value, 2, 1);
    }
}

/* Differences of float32 values are exact in float64; what is left is one rounding of the sum. */
static void row_distance_matches_float64(void **state) {
    ifkv_backend *backend = *state;
    const int64_t shapes[][2] = {{1, 1}, {1, 640}, {130, 257}, {0, 64}};
    for (size_t s = 0; s < 2 * sizeof shapes / sizeof *shapes; s++) {
        const int64_t n_row = shapes[s / 2][0], n_col = shapes[s / 2][1];
        is_aligned = s % 2;
        gen_matrix a = make(backend, n_row, n_col, 3, GEN_UNIFORM),
                   b = make(backend, n_row, n_col, 0, GEN_UNIFORM);
        for (int64_t c = 0; c < n_col && n_row > 1;
             c++) { /* a row is its own, one is close to it */
            *gen_at(&b, 0, c) = *gen_at(&a, 0, c);
            *gen_at(&b, 1, c) = *gen_at(&a, 1, c) * (1 + (c % 2 ? 0x1p-6 : -0x1p-6));
        }
        gen_matrix_write(&b);
        float *got = malloc((size_t)(n_row + 1) * sizeof *got);
        got[n_row] = -77; /* fence */
        float *out = gen_upload(backend, got, (size_t)(n_row + 1) * sizeof *got);
        assert_ok(backend->ops->row_distance(backend, &a.view, &b.view, out));
        assert_ok(backend->ops->download(backend, got, out, (size_t)(n_row + 1) * sizeof *got));
        assert_ok(backend->ops->sync(backend));
        assert_true(got[n_row] == -77);
        for (int64_t r = 0; r < n_row; r++) {
            double want = 0;
            for (int64_t c = 0; c < n_col; c++) {
                const double difference = *gen_at(&a, r, c) - *gen_at(&b, r, c);
                want += difference * difference;
            }
            assert_near(got[r], want, EPS * want, "row_distance", r, 0);
        }
        assert_true(n_row < 2 || got[0] == 0);
        backend->ops->free(backend, out);
        free(got);
        gen_matrix_destroy(&a), gen_matrix_destroy(&b);
    }
    is_aligned = false;
}

/* Every shape error is an error of ours, named, and nothing is written. */
static void operands_that_do_not_fit_are_refused(void **state) {
    ifkv_backend *backend = *state;
    const ifkv_backend_ops *ops = backend->ops;
    gen_matrix a = make(backend, 3, 8, 0, GEN_UNIFORM), w = make(backend, 5, 7, 0, GEN_UNIFORM),
               out = make(backend, 3, 5, 0, GEN_POISON), one = make(backend, 1, 8, 0, GEN_UNIFORM);
    const ifkv_status status = IFKV_ERR_INTERNAL;
    assert_fails(ops->matmul(backend, &a.view, &w.view, false, &out.view), status, IFKV_E_SHAPE,
                 "w is [5, 7], expected [5, 8]");
    ifkv_view narrow = a.view;
    narrow.stride = 7;
    assert_fails(ops->rms_norm(backend, &narrow, &one.view, 1e-5, &a.view), status, IFKV_E_SHAPE,
                 "stride 7");
    narrow = a.view;
    narrow.dtype = IFKV_DTYPE_F16;
    assert_fails(ops->rms_norm(backend, &narrow, &one.view, 1e-5, &a.view), status, IFKV_E_SHAPE,
                 "element type");
    assert_fails(ops->rope(backend, &a.view, 3, NULL, 0, &one.view), status, IFKV_E_SHAPE,
                 "rope: x");
    const int64_t position = 0;
    const double frequency[4] = {0};
    narrow = one.view;
    narrow.dtype = IFKV_DTYPE_F16;
    assert_fails(ops->angles(backend, frequency, &position, &narrow), status, IFKV_E_SHAPE,
                 "angles: cos_sin");
    float distance[3];
    assert_fails(ops->row_distance(backend, &a.view, &one.view, distance), status, IFKV_E_SHAPE,
                 "row_distance: b");
    assert_fails(ops->swiglu(backend, &a.view, &out.view), status, IFKV_E_SHAPE, "gate_up");
    int64_t unused[2];
    float value = 1;
    assert_fails(ops->top_k(backend, &value, 1, 2, unused, unused), status, IFKV_E_SHAPE, "2 of 1");
    assert_true(gen_matrix_read(&out));
    for (int64_t i = 0; i < 15; i++) assert_true(isnan(out.value[i]));
    gen_matrix_destroy(&a), gen_matrix_destroy(&w), gen_matrix_destroy(&out);
    gen_matrix_destroy(&one);
}

/* The CPU sees it at once; a device whose lists the host cannot read says so at the next sync, and
 * once, and has left the row alone. */
static void rows_outside_are_refused(void **state) {
    ifkv_backend *backend = *state;
    const ifkv_backend_ops *ops = backend->ops;
    const int64_t bad[] = {3, -1};
    for (int way = 0; way < 4; way++) {
        const int64_t rows[] = {0, bad[way & 1], 1};
        int64_t *list = gen_upload(backend, rows, sizeof rows);
        gen_matrix from = make(backend, 3, 8, 0, GEN_UNIFORM),
                   to = make(backend, 3, 8, 0, GEN_POISON);
        ifkv_status status =
            (way & 2 ? ops->scatter : ops->gather)(backend, &from.view, list, &to.view);
        assert_true(is_cpu() == (status != IFKV_OK));
        if (!is_cpu()) status = ops->sync(backend);
        assert_fails(status, IFKV_ERR_INTERNAL, IFKV_E_SHAPE,
                     is_cpu()  ? "of 3"
                     : way & 2 ? "scatter: a row"
                               : "gather: a row");
        assert_ok(ops->sync(backend));
        assert_true(gen_matrix_read(&to));
        for (int64_t c = 0; c < 8; c++) {
            assert_true(isnan(*gen_at(&to, way & 2 ? 2 : 1, c)));
            if (is_cpu()) assert_true(isnan(*gen_at(&to, 0, c)));
        }
        ops->free(backend, list);
        gen_matrix_destroy(&from), gen_matrix_destroy(&to);
    }
}

/* Run matmul, norm, rotation and SwiGLU one after the other; the results are compared as they are.
 */
static void run_all(int n_thread, const gen_matrix *const in[4], gen_matrix out[4]) {
    ifkv_backend *backend = open_with(n_thread);
    const ifkv_backend_ops *ops = backend->ops;
    assert_ok(ops->matmul(backend, &in[0]->view, &in[1]->view, false, &out[0].view));
    assert_ok(ops->rms_norm(backend, &in[0]->view, &in[3]->view, 1e-5, &out[1].view));
    assert_ok(ops->swiglu(backend, &out[0].view, &out[2].view));
    assert_ok(ops->gather(backend, &in[0]->view, NULL, &out[3].view));
    assert_ok(
        ops->rope(backend, &out[3].view, (int)(in[0]->view.n_col / 64), NULL, 0, &in[2]->view));
    assert_ok(ops->sync(backend));
    for (int i = 0; i < 4; i++) assert_true(gen_matrix_read(&out[i]));
    ifkv_backend_close(backend);
}

static void bits_ignore_thread_count(void **state) {
    const int64_t rows[] = {1, 4, 5, 333};
    for (size_t s = 0; s < 4; s++) {
        const int64_t n = rows[s], n_in = 896, n_out = 1222;
        gen_matrix x = make(*state, n, n_in, 1, GEN_UNIFORM),
                   w = make(*state, n_out, n_in, 0, GEN_UNIFORM),
                   angle = make_of(*state, IFKV_DTYPE_F32, n, 64, 1, GEN_UNIFORM),
                   weight = make(*state, 1, n_in, 0, GEN_UNIFORM);
        const gen_matrix *const in[4] = {&x, &w, &angle, &weight};
        gen_matrix out[3][4];
        for (int t = 0; t < 3; t++) {
            const int64_t cols[4] = {n_out, n_in, n_out / 2, n_in};
            for (int i = 0; i < 4; i++) out[t][i] = make(*state, n, cols[i], 0, GEN_POISON);
            run_all(t + 1, in, out[t]);
        }
        for (int t = 1; t < 3; t++)
            for (int i = 0; i < 4; i++)
                assert_memory_equal(out[t][i].image, out[0][i].image, out[0][i].bytes);
        for (int t = 0; t < 3; t++)
            for (int i = 0; i < 4; i++) gen_matrix_destroy(&out[t][i]);
        gen_matrix_destroy(&x), gen_matrix_destroy(&w), gen_matrix_destroy(&angle),
            gen_matrix_destroy(&weight);
    }
}

/* What a row-exact back end promises: a row has the bits it has in any other company of 17 rows or
 * more. */
static void rows_ignore_their_company(void **state) {
    ifkv_backend *backend = *state;
    const ifkv_backend_ops *ops = backend->ops;
    const int64_t n = 100, n_in = 256, n_out = 320, cut[] = {0, 17, 60, 100};
    if (!ops->is_row_exact) {
        print_message("skipped: back end %s does not promise it\n", ops->name);
        skip();
    }
    is_aligned = true;
    gen_matrix x = make(backend, n, n_in, 0, GEN_UNIFORM),
               w = make(backend, n_out, n_in, 0, GEN_UNIFORM),
               norm = make(backend, 1, n_out, 0, GEN_UNIFORM),
               angle = make_of(backend, IFKV_DTYPE_F32, n, 64, 0, GEN_UNIFORM), out[2], act[2];
    for (int i = 0; i < 2; i++) {
        out[i] = make(backend, n, n_out, 0, GEN_POISON);
        act[i] = make(backend, n, n_out / 2, 0, GEN_POISON);
        for (int c = 0; c < (i ? 3 : 1); c++) {
            const int64_t row = i ? cut[c] : 0, rows = (i ? cut[c + 1] : n) - row;
            const ifkv_view from = ifkv_view_rows(&x.view, row, rows),
                            to = ifkv_view_rows(&out[i].view, row, rows),
                            half = ifkv_view_rows(&act[i].view, row, rows),
                            turn = ifkv_view_rows(&angle.view, row, rows);
            assert_ok(ops->matmul(backend, &from, &w.view, false, &to));
            assert_ok(ops->matmul(backend, &from, &w.view, true, &to));
            assert_ok(ops->rms_norm(backend, &to, &norm.view, 1e-5, &to));
            assert_ok(ops->rope(backend, &to, (int)n_out / 64, NULL, 0, &turn));
            assert_ok(ops->swiglu(backend, &to, &half));
        }
        assert_true(gen_matrix_read(&out[i]) && gen_matrix_read(&act[i]));
    }
    assert_memory_equal(out[0].image, out[1].image, out[0].bytes);
    assert_memory_equal(act[0].image, act[1].image, act[0].bytes);
    for (int i = 0; i < 2; i++) gen_matrix_destroy(&out[i]), gen_matrix_destroy(&act[i]);
    gen_matrix_destroy(&x), gen_matrix_destroy(&w), gen_matrix_destroy(&norm);
    gen_matrix_destroy(&angle);
    is_aligned = false;
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(names_and_thread_counts_are_checked),
        cmocka_unit_test(memory_is_aligned_and_keeps_bytes),
        cmocka_unit_test(too_much_memory_is_refused),
        cmocka_unit_test(clock_does_not_go_back),
        cmocka_unit_test(matmul_is_exact_on_integers),
        cmocka_unit_test(matmul_matches_float64),
        cmocka_unit_test(matmul_of_no_rows_is_nothing),
        cmocka_unit_test(rms_norm_matches_float64),
        cmocka_unit_test(rms_norm_of_zero_is_zero),
        cmocka_unit_test(angles_match_long_double),
        cmocka_unit_test(position_zero_turns_by_nothing),
        cmocka_unit_test(angles_add_up),
        cmocka_unit_test(rope_matches_float64),
        cmocka_unit_test(quarter_turn_is_exact),
        cmocka_unit_test(swiglu_matches_float64),
        cmocka_unit_test(swiglu_survives_extremes),
        cmocka_unit_test(exponential_is_within_two_ulp),
        cmocka_unit_test(gather_and_scatter_move_rows_bitwise),
        cmocka_unit_test(row_distance_matches_float64),
        cmocka_unit_test(top_k_is_the_head_of_a_total_order),
        cmocka_unit_test(operands_that_do_not_fit_are_refused),
        cmocka_unit_test(rows_outside_are_refused),
        cmocka_unit_test(bits_ignore_thread_count),
        cmocka_unit_test(rows_ignore_their_company),
    };
    conformance_init(argc, argv);
    return cmocka_run_group_tests(tests, backend_setup, backend_teardown);
}
