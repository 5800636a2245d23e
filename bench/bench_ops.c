/* Time matrix products, attention and whole layers of the CPU back end at the shapes of one model.
 *
 *   bench_ops [threads] [rows] [repeats]     default 2, 2048, 7
 *
 * CSV on stdout: op, shape, threads, milliseconds (least and median of the repeats), GFLOP/s of the
 * least, error.  The error is the largest difference from a float64 computation of sampled outputs
 * of the same run, relative to the root of their mean square; nan for whole layers, which are not
 * checked.  Outside the window: allocation, filling and one warm-up.  A layer is every operation of
 * a layer but the exchange, with its rows in blocks of 256 to 4096; its parts go to stderr. */
#include "backend.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { D_MODEL = 576, N_HEAD = 9, N_KV_HEAD = 3, D_HEAD = 64, D_FF = 1536, N_LAYER = 30 };
enum { Q_COLS = N_HEAD * D_HEAD, KV_COLS = N_KV_HEAD * D_HEAD, MAX_REPEAT = 101 };

typedef struct bench {
    ifkv_backend *backend;
    int64_t n_row;
    int n_repeat;
    uint64_t state;
    double ms[MAX_REPEAT];
} bench;

static void must(ifkv_status status) {
    if (status == IFKV_OK) return;
    fprintf(stderr, "bench_ops: %s [E%04d]\n", ifkv_last_error()->text, ifkv_last_error()->code);
    exit((int)status);
}

/* Uniform in [-1, 1) times scale; xorshift. */
static float next_value(bench *b, float scale) {
    b->state ^= b->state << 13;
    b->state ^= b->state >> 7;
    b->state ^= b->state << 17;
    return ((float)(b->state >> 40) / 8388608.0f - 1.0f) * scale;
}

static ifkv_view matrix(bench *b, int64_t n_row, int64_t n_col, float scale) {
    void *data = NULL;
    must(b->backend->ops->alloc(b->backend, (size_t)(n_row * n_col) * sizeof(float), &data));
    const ifkv_view view = ifkv_view_make(data, IFKV_DTYPE_F32, n_row, n_col, n_col);
    for (int64_t i = 0; i < n_row * n_col; i++) ((float *)data)[i] = next_value(b, scale);
    return view;
}

static void release(bench *b, ifkv_view *view) {
    b->backend->ops->free(b->backend, view->data);
}

static double at(const ifkv_view *view, int64_t row, int64_t col) {
    return (double)((const float *)view->data)[row * view->stride + col];
}

static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print(bench *b, const char *op, const char *shape, double flop, double error) {
    qsort(b->ms, (size_t)b->n_repeat, sizeof *b->ms, ascending);
    printf("%s,%s,%d,%.3f,%.3f,%.1f,%.1e\n", op, shape, b->backend->n_thread, b->ms[0],
           b->ms[b->n_repeat / 2], flop / b->ms[0] * 1e-6, error);
    fflush(stdout);
}

static void bench_matmul(bench *b, int64_t n_row, int64_t n_out, int64_t n_in) {
    const ifkv_backend_ops *ops = b->backend->ops;
    ifkv_view x = matrix(b, n_row, n_in, 1), w = matrix(b, n_out, n_in, 0.1f),
              out = matrix(b, n_row, n_out, 0);
    for (int i = -1; i < b->n_repeat; i++) {
        const double start = ops->clock_ms(b->backend);
        must(ops->matmul(b->backend, &x, &w, false, &out));
        must(ops->sync(b->backend));
        if (i >= 0) b->ms[i] = ops->clock_ms(b->backend) - start;
    }
    double worst = 0, square = 0;
    const int64_t n_sample = 256;
    for (int64_t s = 0; s < n_sample; s++) {
        const int64_t row = s * 7919 % n_row, col = s * 104729 % n_out;
        double sum = 0;
        for (int64_t i = 0; i < n_in; i++) sum += at(&x, row, i) * at(&w, col, i);
        worst = fmax(worst, fabs(at(&out, row, col) - sum));
        square += sum * sum;
    }
    char shape[64];
    snprintf(shape, sizeof shape, "%lldx%lldx%lld", (long long)n_row, (long long)n_out,
             (long long)n_in);
    print(b, "matmul", shape, 2.0 * (double)(n_row * n_out * n_in),
          worst / sqrt(square / (double)n_sample));
    release(b, &x), release(b, &w), release(b, &out);
}

/* One output of causal attention from the definition. */
static double attended(const ifkv_attention_args *args, int64_t row, int head, int c) {
    const int kv = head / (args->n_head / args->n_kv_head), d = args->d_head;
    double top = -INFINITY, sum = 0, total = 0;
    for (int pass = 0; pass < 2; pass++)
        for (int64_t key = args->begin[row]; key < args->end[row]; key++) {
            double s = 0;
            for (int i = 0; i < d; i++)
                s += at(&args->q, row, (int64_t)head * d + i) *
                     at(&args->k, key, (int64_t)kv * d + i);
            s *= (double)args->scale;
            if (pass == 0) {
                top = fmax(top, s);
                continue;
            }
            const double p = exp(s - top);
            total += p;
            sum += p * at(&args->v, key, (int64_t)kv * d + c);
        }
    return sum / total;
}

static void bench_attention(bench *b, const ifkv_attention_args *args) {
    const ifkv_backend_ops *ops = b->backend->ops;
    for (int i = -1; i < b->n_repeat; i++) {
        const double start = ops->clock_ms(b->backend);
        must(ops->attention(b->backend, args));
        must(ops->sync(b->backend));
        if (i >= 0) b->ms[i] = ops->clock_ms(b->backend) - start;
    }
    double worst = 0, square = 0, pair = 0;
    const int64_t n_row = args->q.n_row, n_sample = 64;
    for (int64_t s = 0; s < n_sample; s++) {
        const int64_t row = s * 7919 % n_row;
        const int head = (int)(s % args->n_head), c = (int)(s * 13 % args->d_head);
        const double want = attended(args, row, head, c);
        worst = fmax(worst, fabs(at(&args->out, row, (int64_t)head * args->d_head + c) - want));
        square += want * want;
    }
    for (int64_t row = 0; row < n_row; row++) pair += (double)(args->end[row] - args->begin[row]);
    char shape[64];
    snprintf(shape, sizeof shape, "%lld causal %d/%d/%d", (long long)n_row, args->n_head,
             args->n_kv_head, args->d_head);
    print(b, "attention", shape, 4.0 * pair * args->n_head * args->d_head,
          worst / sqrt(square / (double)n_sample));
}

typedef struct layer {
    ifkv_view hidden, norm_weight, w_qkv, w_o, w_gate_up, w_down; /* owns */
    ifkv_view qkv, attended, norm, gate_up, act, cos_sin;         /* owns */
    ifkv_attention_args attention;
} layer;

static void layer_init(bench *b, layer *l, int64_t *span) {
    const int64_t n = b->n_row;
    l->hidden = matrix(b, n, D_MODEL, 1);
    l->norm_weight = matrix(b, 1, D_MODEL, 1);
    l->w_qkv = matrix(b, Q_COLS + 2 * KV_COLS, D_MODEL, 0.1f);
    l->w_o = matrix(b, D_MODEL, Q_COLS, 0.001f);
    l->w_gate_up = matrix(b, 2 * D_FF, D_MODEL, 0.1f);
    l->w_down = matrix(b, D_MODEL, D_FF, 0.001f);
    l->qkv = matrix(b, n, Q_COLS + 2 * KV_COLS, 1);
    l->attended = matrix(b, n, Q_COLS, 1);
    l->norm = matrix(b, n, D_MODEL, 1);
    l->gate_up = matrix(b, n, 2 * D_FF, 1);
    l->act = matrix(b, n, D_FF, 1);
    l->cos_sin = matrix(b, n, D_HEAD, 0.7f);
    for (int64_t i = 0; i < n; i++) {
        span[i] = 0;
        span[n + i] = i + 1;
    }
    static ifkv_view lse;
    lse = matrix(b, n, N_HEAD, 0);
    l->attention = (ifkv_attention_args){
        .n_head = N_HEAD,
        .n_kv_head = N_KV_HEAD,
        .d_head = D_HEAD,
        .scale = 0.125f,
        .q = ifkv_view_block(&l->qkv, 0, n, 0, Q_COLS),
        .k = ifkv_view_block(&l->qkv, 0, n, Q_COLS, KV_COLS),
        .v = ifkv_view_block(&l->qkv, 0, n, Q_COLS + KV_COLS, KV_COLS),
        .begin = span,
        .end = span + n,
        .out = l->attended,
        .lse = lse,
    };
}

enum { T_NORM, T_QKV, T_ROPE, T_ATTENTION, T_O, T_GATE_UP, T_SWIGLU, T_DOWN, N_TIMER };

static void timed(bench *b, double *sum, double *mark) {
    const double now = b->backend->ops->clock_ms(b->backend);
    *sum += now - *mark;
    *mark = now;
}

/* Every operation of one layer, rows in blocks of block_rows; adds milliseconds to timer. */
static void run_layer(bench *b, layer *l, int64_t block_rows, double *timer) {
    ifkv_backend *backend = b->backend;
    const ifkv_backend_ops *ops = backend->ops;
    double mark = ops->clock_ms(backend);
    for (int64_t row = 0; row < b->n_row; row += block_rows) {
        const int64_t n = b->n_row - row < block_rows ? b->n_row - row : block_rows;
        const ifkv_view hidden = ifkv_view_rows(&l->hidden, row, n),
                        norm = ifkv_view_rows(&l->norm, 0, n),
                        qkv = ifkv_view_rows(&l->qkv, row, n),
                        cos_sin = ifkv_view_rows(&l->cos_sin, row, n);
        const ifkv_view q = ifkv_view_block(&qkv, 0, n, 0, Q_COLS),
                        k = ifkv_view_block(&qkv, 0, n, Q_COLS, KV_COLS);
        must(ops->rms_norm(backend, &hidden, &l->norm_weight, 1e-5, &norm));
        timed(b, &timer[T_NORM], &mark);
        must(ops->matmul(backend, &norm, &l->w_qkv, false, &qkv));
        timed(b, &timer[T_QKV], &mark);
        must(ops->rope(backend, &q, N_HEAD, NULL, 0, &cos_sin));
        must(ops->rope(backend, &k, N_KV_HEAD, NULL, 0, &cos_sin));
        timed(b, &timer[T_ROPE], &mark);
    }
    must(ops->attention(backend, &l->attention));
    timed(b, &timer[T_ATTENTION], &mark);
    for (int64_t row = 0; row < b->n_row; row += block_rows) {
        const int64_t n = b->n_row - row < block_rows ? b->n_row - row : block_rows;
        const ifkv_view hidden = ifkv_view_rows(&l->hidden, row, n),
                        norm = ifkv_view_rows(&l->norm, 0, n),
                        from = ifkv_view_rows(&l->attended, row, n),
                        gate_up = ifkv_view_rows(&l->gate_up, 0, n),
                        act = ifkv_view_rows(&l->act, 0, n);
        must(ops->matmul(backend, &from, &l->w_o, true, &hidden));
        timed(b, &timer[T_O], &mark);
        must(ops->rms_norm(backend, &hidden, &l->norm_weight, 1e-5, &norm));
        timed(b, &timer[T_NORM], &mark);
        must(ops->matmul(backend, &norm, &l->w_gate_up, false, &gate_up));
        timed(b, &timer[T_GATE_UP], &mark);
        must(ops->swiglu(backend, &gate_up, &act));
        timed(b, &timer[T_SWIGLU], &mark);
        must(ops->matmul(backend, &act, &l->w_down, true, &hidden));
        timed(b, &timer[T_DOWN], &mark);
    }
}

static void bench_layer(bench *b, layer *l, int64_t block_rows) {
    static const char *name[N_TIMER] = {"rms_norm", "qkv",     "rope",   "attention",
                                        "o",        "gate_up", "swiglu", "down"};
    double best[N_TIMER], unused[N_TIMER] = {0};
    run_layer(b, l, block_rows, unused);
    for (int t = 0; t < N_TIMER; t++) best[t] = INFINITY;
    for (int i = 0; i < b->n_repeat; i++) {
        double timer[N_TIMER] = {0};
        run_layer(b, l, block_rows, timer);
        b->ms[i] = 0;
        for (int t = 0; t < N_TIMER; t++) {
            best[t] = fmin(best[t], timer[t]);
            b->ms[i] += timer[t];
        }
    }
    const double n = (double)b->n_row;
    const double weights =
        (double)D_MODEL * (2 * Q_COLS + 2 * KV_COLS) + 3.0 * (double)D_MODEL * D_FF;
    char shape[64];
    snprintf(shape, sizeof shape, "%lld rows by %lld", (long long)b->n_row, (long long)block_rows);
    print(b, "layer", shape, 2 * n * weights + 2.0 * n * (n + 1) * Q_COLS, NAN);
    fprintf(stderr, "   ");
    double sum = 0;
    for (int t = 0; t < N_TIMER; t++) {
        fprintf(stderr, " %s %.2f", name[t], best[t]);
        sum += best[t];
    }
    fprintf(stderr, " sum %.2f ms; %d layers %.2f s\n", sum, N_LAYER, sum * N_LAYER * 1e-3);
}

int main(int argc, char **argv) {
    bench b = {.n_row = argc > 2 ? atoll(argv[2]) : 2048,
               .n_repeat = argc > 3 ? atoi(argv[3]) : 7,
               .state = 88172645463325252u};
    if (b.n_row < 1 || b.n_repeat < 1 || b.n_repeat > MAX_REPEAT) return IFKV_ERR_USAGE;
    must(ifkv_backend_open("cpu", argc > 1 ? atoi(argv[1]) : 2, 0, &b.backend));
    must(b.backend->ops->prepare(b.backend, N_HEAD, N_KV_HEAD, D_HEAD));
    printf("op,shape,threads,ms_min,ms_median,gflops,error\n");
    const int64_t rows[] = {1, 4, 5, 64, 512, 1024};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        bench_matmul(&b, rows[i], Q_COLS + 2 * KV_COLS, D_MODEL);
        bench_matmul(&b, rows[i], D_MODEL, Q_COLS);
        bench_matmul(&b, rows[i], 2 * D_FF, D_MODEL);
        bench_matmul(&b, rows[i], D_MODEL, D_FF);
    }
    int64_t *span = malloc((size_t)b.n_row * 2 * sizeof *span);
    layer l;
    if (!span) return IFKV_ERR_RESOURCE;
    layer_init(&b, &l, span);
    bench_attention(&b, &l.attention);
    for (int64_t block = 256; block <= 4096; block *= 2) bench_layer(&b, &l, block);
    ifkv_backend_close(b.backend);
    return 0;
}
