/* Conformance of a back end, third part: refit.
 *
 *   test_backend_refit cpu | cuda
 *
 * Truth by hand where numbers are exact, else a float64 computation from the definition, written
 * here, with a bound on what roundings do to the fitted map.  The pipeline around it is
 * test_refit's business. */
#include "conformance.h"

typedef struct refit_shape {
    int n_head, d_head;
    int64_t n_row, first, n_fit;
    bool is_rotated;
} refit_shape;

typedef struct refit_case {
    ifkv_backend *backend;
    refit_shape shape;
    int64_t n_col, *row; /* [n_fit] host */
    gen_matrix stale, fresh, x, cos_sin;
    double *before, *want; /* [n_row, n_col] */
    size_t scratch_bytes;  /* behind which lies a fence */
    ifkv_refit_args args;
} refit_case;

enum { REFIT_FENCE = 64 };

/* Turn a row by its angles (direction 1), or back (-1). */
static void turn(const refit_case *it, int64_t row, double direction, double *value) {
    const int half = it->shape.d_head / 2;
    for (int64_t c = 0; it->shape.is_rotated && c < it->n_col; c++) {
        const int64_t i = c % it->shape.d_head;
        if (i >= half) continue;
        const double a = value[c], b = value[c + half], cosine = *gen_at(&it->cos_sin, row, i),
                     sine = direction * *gen_at(&it->cos_sin, row, half + i);
        value[c] = a * cosine - b * sine;
        value[c + half] = b * cosine + a * sine;
    }
}

/* n_fit of n rows, ascending, every set alike. */
static void draw_rows(refit_case *it) {
    int64_t n = 0;
    for (int64_t i = 0; i < it->shape.n_row; i++)
        if (gen_below(&noise, it->shape.n_row - i) < it->shape.n_fit - n) it->row[n++] = i;
}

/* Rows and angles, quarter turns of small integers if exact; `fresh` is the caller's. */
static refit_case refit_make(ifkv_backend *backend, refit_shape shape, bool is_exact) {
    refit_case it = {.backend = backend,
                     .shape = shape,
                     .n_col = (int64_t)shape.n_head * shape.d_head,
                     .row = malloc((size_t)(shape.n_fit + 1) * sizeof *it.row)};
    const size_t values = (size_t)(shape.n_row * it.n_col) * sizeof(double);
    it.before = malloc(values), it.want = malloc(values);
    draw_rows(&it);
    is_aligned = !is_cpu(); /* which takes rows from anywhere */
    it.stale = make(backend, shape.n_fit, it.n_col, gen_below(&noise, 3), GEN_POISON);
    it.fresh = make(backend, shape.n_fit, it.n_col, gen_below(&noise, 3), GEN_POISON);
    it.x = make(backend, shape.n_row, it.n_col, gen_below(&noise, 3), GEN_POISON);
    it.cos_sin = make_of(backend, IFKV_DTYPE_F32, shape.n_row, shape.d_head, gen_below(&noise, 3),
                         GEN_POISON);
    is_aligned = false;
    for (int64_t r = 0; r < shape.n_row; r++) {
        for (int i = 0; i < shape.d_head / 2; i++) {
            const double angle =
                is_exact ? acos(0) * (double)gen_below(&noise, 4) : gen_uniform(&noise, -3, 3);
            *gen_at(&it.cos_sin, r, i) = is_exact ? round(cos(angle)) : cos(angle);
            *gen_at(&it.cos_sin, r, shape.d_head / 2 + i) =
                is_exact ? round(sin(angle)) : sin(angle);
        }
        for (int64_t c = 0; c < it.n_col; c++) /* columns have means */
            *gen_at(&it.x, r, c) = is_exact ? (double)(gen_below(&noise, 9) - 4)
                                            : gen_uniform(&noise, -1, 1) + (double)(c % 5) - 2;
        turn(&it, r, 1, gen_at(&it.x, r, 0));
    }
    gen_matrix_write(&it.x), gen_matrix_write(&it.cos_sin);
    for (int64_t i = 0; i < shape.n_fit; i++)
        memcpy(gen_at(&it.stale, i, 0), gen_at(&it.x, it.row[i], 0),
               (size_t)it.n_col * sizeof(double));
    memcpy(it.before, it.x.value, values);
    memcpy(it.want, it.x.value, values);
    return it;
}

/* Send everything; scratch is NaN, and there is no more of it than the header says. */
static void refit_write(refit_case *it, double ridge) {
    const refit_shape *shape = &it->shape;
    const size_t n = (size_t)(shape->n_head * ifkv_refit_scratch(shape->d_head));
    it->scratch_bytes = n * sizeof(double);
    unsigned char *poison = malloc(it->scratch_bytes + REFIT_FENCE);
    memset(poison, 0xff, it->scratch_bytes + REFIT_FENCE);
    gen_matrix_write(&it->stale), gen_matrix_write(&it->fresh);
    it->args = (ifkv_refit_args){
        .n_head = shape->n_head,
        .d_head = shape->d_head,
        .ridge = ridge,
        .stale = it->stale.view,
        .fresh = it->fresh.view,
        .row = gen_upload(it->backend, it->row, (size_t)shape->n_fit * sizeof *it->row),
        .first = shape->first,
        .cos_sin = shape->is_rotated ? it->cos_sin.view : (ifkv_view){0},
        .x = it->x.view,
        .scratch = gen_upload(it->backend, poison, it->scratch_bytes + REFIT_FENCE),
    };
    free(poison);
}

static void refit_run(refit_case *it) {
    unsigned char fence[REFIT_FENCE];
    const ifkv_backend_ops *ops = it->backend->ops;
    assert_ok(ops->refit(it->backend, &it->args));
    assert_true(gen_matrix_read(&it->x));
    assert_ok(ops->download(it->backend, fence, (char *)it->args.scratch + it->scratch_bytes,
                            sizeof fence));
    for (int i = 0; i < REFIT_FENCE; i++) assert_int_equal(fence[i], 0xff);
}

static void refit_free(refit_case *it) {
    it->backend->ops->free(it->backend, (void *)(uintptr_t)it->args.row);
    it->backend->ops->free(it->backend, it->args.scratch);
    gen_matrix_destroy(&it->stale), gen_matrix_destroy(&it->fresh);
    gen_matrix_destroy(&it->x), gen_matrix_destroy(&it->cos_sin);
    free(it->row), free(it->before), free(it->want);
}

static bool refit_stays(const refit_case *it, int64_t row) {
    for (int64_t i = 0; i < it->shape.n_fit; i++)
        if (it->row[i] == row) return true;
    return row < it->shape.first;
}

/* Rows that stay are bits; the others are `want` within tolerance [n_row, n_col]. */
static void assert_refitted(const refit_case *it, const double *tolerance) {
    for (int64_t r = 0; r < it->shape.n_row; r++)
        for (int64_t c = 0; c < it->n_col; c++) {
            const int64_t i = r * it->n_col + c;
            if (refit_stays(it, r))
                assert_true(*gen_at(&it->x, r, c) == it->before[i]);
            else
                assert_near(*gen_at(&it->x, r, c), it->want[i], tolerance ? tolerance[i] : 0,
                            "refit", r, c);
        }
}

/* What a product W' x errs by, relative to sum |W| |x|: the sum of d terms, the turns around it and
 * the last sums, at most d + 8 roundings of EPS / 2; and, where both are two bfloat16 parts, 2^-17
 * of either and the product of the second parts, 2^-16. */
static double refit_error(const refit_case *it) {
    return (it->shape.d_head + 8) * EPS / 2 + (it->x.view.dtype == IFKV_DTYPE_BF16 ? 0x1p-15 : 0);
}

/* Truth by hand: a signed permutation of the columns of each head, and a shift.  All numbers are
 * integers of both types, and rounding to the nearest number at most doubles the distance from one.
 * sum |W| |x| + |shift| is at most 2 * 4 + 4, of two columns where a turn mixes them.  More than
 * two rows a column tell the columns apart; a ridge of 1e-10 is below what float32 can see. */
static void refit_follows_an_affine_map(void **state) {
    static const refit_shape shapes[] = {
        {2, 64, 300, 37, 150, false}, {2, 64, 290, 37, 150, true}, {1, 128, 601, 5, 310, true},
        {3, 48, 201, 0, 111, true},   {1, 16, 97, 96, 40, false},
    };
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        refit_case it = refit_make(*state, shapes[s], true);
        const int d = shapes[s].d_head;
        int from[3 * 128];
        double sign[3 * 128], shift[3 * 128];
        for (int64_t c = 0; c < it.n_col; c++) {
            const int64_t i = c % d, other = gen_below(&noise, i + 1);
            from[c] = (int)i; /* shuffle inside out */
            from[c] = from[c - i + other];
            from[c - i + other] = (int)i;
            sign[c] = gen_below(&noise, 2) ? 1 : -1;
            shift[c] = (double)(gen_below(&noise, 9) - 4);
        }
        double *row = malloc((size_t)it.n_col * sizeof *row),
               *tolerance = malloc((size_t)(shapes[s].n_row * it.n_col) * sizeof *tolerance);
        for (int64_t r = 0; r < shapes[s].n_row; r++) {
            memcpy(row, it.before + r * it.n_col, (size_t)it.n_col * sizeof *row);
            turn(&it, r, -1, row);
            for (int64_t c = 0; c < it.n_col; c++) {
                it.want[r * it.n_col + c] = sign[c] * row[c / d * d + from[c]] + shift[c];
                tolerance[r * it.n_col + c] = 2 * 2 * 12 * refit_error(&it);
            }
            turn(&it, r, 1, it.want + r * it.n_col);
        }
        for (int64_t i = 0; i < shapes[s].n_fit; i++)
            memcpy(gen_at(&it.fresh, i, 0), it.want + it.row[i] * it.n_col,
                   (size_t)it.n_col * sizeof(double));
        refit_write(&it, 1e-10);
        refit_run(&it);
        assert_refitted(&it, tolerance);
        free(row), free(tolerance);
        refit_free(&it);
    }
}

/* Rows that are all one have no variance: every other row moves as they did, to the bit, in numbers
 * that a third or a seventh of is none. */
static void refit_of_equal_rows_moves_all_alike(void **state) {
    static const int64_t n_fit[] = {1, 2, 3, 7, 37};
    for (int way = 0; way < 10; way++) {
        const refit_shape shape = {2, way & 1 ? 64 : 80, 70, 9, n_fit[way / 2], way & 1};
        refit_case it = refit_make(*state, shape, true);
        double stale[2 * 80] = {0}, change[2 * 80] = {0}, row[2 * 80];
        for (int64_t c = 0; c < it.n_col; c++) {
            stale[c] = (double)(gen_below(&noise, 9) - 4) / 4;
            change[c] = (double)(gen_below(&noise, 9) - 4);
        }
        for (int64_t r = 0; r < shape.n_row; r++) {
            memcpy(row, change, sizeof row);
            turn(&it, r, 1, row);
            for (int64_t c = 0; c < it.n_col; c++) it.want[r * it.n_col + c] += row[c];
        }
        for (int64_t i = 0; i < shape.n_fit; i++)
            for (int is_fresh = 0; is_fresh < 2; is_fresh++) {
                double *to = gen_at(is_fresh ? &it.fresh : &it.stale, i, 0);
                for (int64_t c = 0; c < it.n_col; c++) to[c] = stale[c] + is_fresh * change[c];
                turn(&it, it.row[i], 1, to);
            }
        refit_write(&it, 0.3);
        refit_run(&it);
        assert_refitted(&it, NULL);
        refit_free(&it);
    }
}

/* The definition in float64: what one head was fitted on, the map, and how far rounding may move
 * it. */
typedef struct refit_fit {
    int64_t n, d;
    double *x, *y; /* [n, d] turned back, less their means */
    double mean_x[128], mean_y[128];
    double w[128][128];
    double map_error, mean_error; /* of W in the 2-norm; of what the means move */
} refit_fit;

static double length_of(const double *value, int64_t n) {
    double square = 0;
    for (int64_t i = 0; i < n; i++) square += value[i] * value[i];
    return sqrt(square);
}

static void take_mean(int64_t n, int64_t d, double *value, double *mean) {
    for (int64_t c = 0; c < d; c++) {
        mean[c] = 0;
        for (int64_t i = 0; i < n; i++) mean[c] += value[i * d + c] / (double)n;
        for (int64_t i = 0; i < n; i++) value[i * d + c] -= mean[c];
    }
}

/* W = (x' x + lambda)^-1 x' y by Gauss and Jordan with the largest pivot. */
static void solve_fit(refit_fit *fit, double lambda) {
    const int64_t d = fit->d, width = 2 * d;
    double *a = calloc((size_t)(d * width), sizeof *a);
    for (int64_t i = 0; i < d; i++) {
        for (int64_t r = 0; r < fit->n; r++)
            for (int64_t j = 0; j < d; j++) {
                a[i * width + j] += fit->x[r * d + i] * fit->x[r * d + j];
                a[i * width + d + j] += fit->x[r * d + i] * fit->y[r * d + j];
            }
        a[i * width + i] += lambda;
    }
    for (int64_t k = 0; k < d; k++) {
        int64_t best = k;
        for (int64_t i = k + 1; i < d; i++)
            if (fabs(a[i * width + k]) > fabs(a[best * width + k])) best = i;
        for (int64_t j = 0; j < width; j++) {
            const double swap = a[k * width + j];
            a[k * width + j] = a[best * width + j];
            a[best * width + j] = swap;
        }
        for (int64_t i = 0; i < d; i++) {
            const double factor = a[i * width + k] / a[k * width + k];
            for (int64_t j = k; i != k && j < width; j++)
                a[i * width + j] -= factor * a[k * width + j];
        }
    }
    for (int64_t i = 0; i < d; i++)
        for (int64_t j = 0; j < d; j++) fit->w[i][j] = a[i * width + d + j] / a[i * width + i];
    free(a);
}

/* Rows are turned back in float32, two products and a sum an element, so that x and y err by 2 EPS
 * of the norms of the rows at most, all in the Frobenius norm.  For dx and dy of W = (x'x +
 * lambda)^-1 x'y: |dW| <= (|dy| + |dx| |W|) / (2 sqrt(lambda)) + |dx| |y - x W| / lambda. */
static void bound_fit(refit_fit *fit, double dx, double dy, double lambda) {
    const int64_t d = fit->d;
    double w_square = 0, rest_square = 0;
    for (int64_t i = 0; i < d; i++) w_square += pow(length_of(fit->w[i], d), 2);
    for (int64_t r = 0; r < fit->n; r++)
        for (int64_t c = 0; c < d; c++) {
            double rest = fit->y[r * d + c];
            for (int64_t i = 0; i < d; i++) rest -= fit->x[r * d + i] * fit->w[i][c];
            rest_square += rest * rest;
        }
    const double w = sqrt(w_square);
    fit->map_error = (dy + dx * w) / (2 * sqrt(lambda)) + dx * sqrt(rest_square) / lambda;
    fit->mean_error = (dy + dx * w) / sqrt((double)fit->n);
}

static refit_fit fit_in_float64(const refit_case *it, int head) {
    const int64_t n = it->shape.n_fit, d = it->shape.d_head;
    refit_fit fit = {.n = n, .d = d};
    fit.x = malloc((size_t)(n * d) * sizeof(double));
    fit.y = malloc((size_t)(n * d) * sizeof(double));
    double *stale = malloc((size_t)it->n_col * sizeof(double)),
           *fresh = malloc((size_t)it->n_col * sizeof(double)), square[2] = {0};
    for (int64_t i = 0; i < n; i++) {
        memcpy(stale, gen_at(&it->stale, i, 0), (size_t)it->n_col * sizeof *stale);
        memcpy(fresh, gen_at(&it->fresh, i, 0), (size_t)it->n_col * sizeof *fresh);
        turn(it, it->row[i], -1, stale), turn(it, it->row[i], -1, fresh);
        for (int64_t c = 0; c < d; c++) {
            fit.x[i * d + c] = stale[head * d + c];
            fit.y[i * d + c] = fresh[head * d + c] - stale[head * d + c];
            square[0] += pow(stale[head * d + c], 2), square[1] += pow(fresh[head * d + c], 2);
        }
    }
    const double error = it->shape.is_rotated ? 2 * EPS : 0, dx = error * sqrt(square[0]);
    take_mean(n, d, fit.x, fit.mean_x), take_mean(n, d, fit.y, fit.mean_y);
    const double trace = pow(length_of(fit.x, n * d), 2),
                 lambda = it->args.ridge * trace / (double)d;
    if (n > 1) {
        solve_fit(&fit, lambda);
        bound_fit(&fit, dx, dx + error * sqrt(square[1]), lambda);
    } else {
        fit.mean_error = dx + error * sqrt(square[1]);
    }
    free(stale), free(fresh);
    return fit;
}

/* Where row r of a head goes, and what may be off there. */
static void move_in_float64(const refit_case *it, const refit_fit *fit, int head, int64_t r,
                            double *tolerance) {
    const int64_t d = fit->d, at = r * it->n_col + head * d;
    double *row = malloc((size_t)it->n_col * sizeof *row), *change = calloc((size_t)it->n_col, 8),
           size[128], off[128];
    memcpy(row, it->before + r * it->n_col, (size_t)it->n_col * sizeof *row);
    turn(it, r, -1, row);
    double *x = row + head * d, distance = 0;
    for (int64_t i = 0; i < d; i++) distance += pow(x[i] - fit->mean_x[i], 2);
    for (int64_t c = 0; c < d; c++) {
        double shift = fit->mean_y[c], sum = 0;
        size[c] = 0;
        for (int64_t i = 0; i < d; i++) {
            const double pair = fabs(x[i]) + fabs(x[(i + d / 2) % d]); /* a turn mixes these */
            shift -= fit->mean_x[i] * fit->w[i][c];
            sum += x[i] * fit->w[i][c];
            size[c] += pair * fabs(fit->w[i][c]);
        }
        change[head * d + c] = shift + sum;
        off[c] = (size[c] + fabs(shift)) * refit_error(it) + fit->mean_error +
                 sqrt(distance) * fit->map_error;
    }
    turn(it, r, 1, change);
    for (int64_t c = 0; c < d; c++) {
        it->want[at + c] = it->before[at + c] + change[head * d + c];
        tolerance[at + c] = off[c] + (it->shape.is_rotated ? off[(c + d / 2) % d] : 0) +
                            EPS * fabs(it->want[at + c]) +
                            rounding(it->x.view.dtype, fabs(it->want[at + c]) + off[c]);
    }
    free(row), free(change);
}

static void check_refit(ifkv_backend *backend, refit_shape shape, double ridge) {
    refit_case it = refit_make(backend, shape, false);
    double *tolerance = calloc((size_t)(shape.n_row * it.n_col), sizeof *tolerance);
    for (int64_t i = 0; i < shape.n_fit; i++) { /* half a map, half noise, and a shift */
        double *to = gen_at(&it.fresh, i, 0), *row = malloc((size_t)it.n_col * sizeof *row);
        memcpy(row, gen_at(&it.stale, i, 0), (size_t)it.n_col * sizeof *row);
        turn(&it, it.row[i], -1, row);
        for (int64_t c = 0; c < it.n_col; c++)
            to[c] = 0.7 * row[c] + 0.6 * row[c / shape.d_head * shape.d_head + c * 5 % 16] +
                    gen_uniform(&noise, -0.3, 0.3) + (double)(c % 3) / 2;
        turn(&it, it.row[i], 1, to);
        free(row);
    }
    refit_write(&it, ridge);
    refit_run(&it);
    for (int head = 0; head < shape.n_head; head++) {
        refit_fit fit = fit_in_float64(&it, head);
        for (int64_t r = 0; r < shape.n_row; r++) move_in_float64(&it, &fit, head, r, tolerance);
        free(fit.x), free(fit.y);
    }
    assert_refitted(&it, tolerance);
    free(tolerance);
    refit_free(&it);
}

static void refit_matches_float64(void **state) {
    static const refit_shape shapes[] = {
        {2, 64, 150, 20, 101, false}, {2, 64, 150, 20, 101, true}, /* more rows than columns */
        {1, 128, 77, 3, 31, true},    {3, 128, 60, 60, 2, false},  /* fewer; nothing to move */
        {2, 16, 33, 0, 1, true},      {1, 64, 40, 39, 1, false},   /* one; one to move */
        {2, 112, 90, 1, 64, true},    {5, 32, 129, 65, 33, true},
        {1, 96, 700, 0, 300, true},   {3, 48, 65, 17, 65, false}, /* all */
    };
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        check_refit(*state, shapes[s], s % 2 ? 0.3 : 1);
}

static void refit_of_no_rows_moves_nothing(void **state) {
    refit_case it = refit_make(*state, (refit_shape){2, 64, 50, 7, 0, true}, true);
    refit_write(&it, 0.3);
    refit_run(&it);
    assert_refitted(&it, NULL);
    refit_free(&it);
}

/* The same bits from threads, and from a device that has done it before. */
static void refit_repeats_its_bits(void **state) {
    (void)state;
    const gen start = noise;
    unsigned char *first = NULL;
    for (int n_thread = 1; n_thread <= 5; n_thread += 2) {
        noise = start;
        ifkv_backend *backend = open_with(n_thread);
        refit_case it = refit_make(backend, (refit_shape){3, 64, 200, 11, 120, true}, false);
        for (int64_t i = 0; i < it.shape.n_fit; i++)
            for (int64_t c = 0; c < it.n_col; c++)
                *gen_at(&it.fresh, i, c) = gen_uniform(&noise, -1, 1);
        refit_write(&it, 0.3);
        refit_run(&it);
        if (first)
            assert_memory_equal(it.x.image, first, it.x.bytes);
        else
            first = memcpy(malloc(it.x.bytes), it.x.image, it.x.bytes);
        refit_free(&it);
        ifkv_backend_close(backend);
    }
    free(first);
}

/* Where the host cannot read the list, the next sync says so, once. */
static void assert_refit_fails(refit_case *it, const ifkv_refit_args *args, const char *part) {
    const ifkv_backend_ops *ops = it->backend->ops;
    ifkv_status status = ops->refit(it->backend, args);
    if (status == IFKV_OK) status = ops->sync(it->backend);
    assert_fails(status, IFKV_ERR_INTERNAL, IFKV_E_SHAPE, part);
    assert_ok(ops->sync(it->backend));
    assert_true(gen_matrix_read(&it->x));
    for (int64_t i = 0; i < it->shape.n_row * it->n_col; i++)
        assert_true(it->x.value[i] == it->before[i]);
}

static void refit_refuses_what_does_not_fit(void **state) {
    ifkv_backend *backend = *state;
    refit_case it = refit_make(backend, (refit_shape){2, 64, 80, 7, 40, true}, true);
    memcpy(it.fresh.value, it.stale.value, (size_t)(40 * it.n_col) * sizeof(double));
    refit_write(&it, 0.3);
    ifkv_refit_args bad = it.args;
    bad.fresh.n_row--;
    assert_refit_fails(&it, &bad, "refit: fresh");
    bad = it.args;
    bad.cos_sin.n_row--;
    assert_refit_fails(&it, &bad, "refit: cos_sin");
    bad = it.args;
    bad.first = -1;
    assert_refit_fails(&it, &bad, "first row -1");
    bad = it.args;
    bad.stale.data = (char *)bad.stale.data + ifkv_dtype_bytes(bad.stale.dtype);
    if (!is_cpu()) assert_refit_fails(&it, &bad, "rows of stale");
    const int64_t wrong[][2] = {{2, it.row[1]}, {39, 80}, {0, -1}, {20, it.row[18]}};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        int64_t row[40];
        memcpy(row, it.row, sizeof row);
        row[wrong[i][0]] = wrong[i][1];
        bad = it.args;
        bad.row = gen_upload(backend, row, sizeof row);
        assert_refit_fails(&it, &bad, is_cpu() ? "refit: row[" : "refit: fitted rows");
        backend->ops->free(backend, (void *)(uintptr_t)bad.row);
    }
    refit_free(&it);
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(refit_follows_an_affine_map),
        cmocka_unit_test(refit_of_equal_rows_moves_all_alike),
        cmocka_unit_test(refit_matches_float64),
        cmocka_unit_test(refit_of_no_rows_moves_nothing),
        cmocka_unit_test(refit_repeats_its_bits),
        cmocka_unit_test(refit_refuses_what_does_not_fit),
    };
    conformance_init(argc, argv);
    return cmocka_run_group_tests(tests, backend_setup, backend_teardown);
}
