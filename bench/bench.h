/* `ifkv bench`: what its kinds share, and the rows of its tables.
 *
 * Owns cases, methods and statistics; refuses to know how a row is computed.  A row is measured or
 * projected, never a mixture, and carries the error of the very runs that made its time.  On an
 * emulated device rows have errors and no times: NaN here, null in JSON, a dash in a table. */
#ifndef IFKV_BENCH_BENCH_H
#define IFKV_BENCH_BENCH_H

#include <jansson.h>
#include <stdio.h>

#include "cli.h"
#include "engine.h"

enum {
    BENCH_CHUNK = 2048,
    BENCH_MAX_REPEAT = 64,
    BENCH_MAX_LENGTH = 64,
    BENCH_MAX_METHOD = 32,
    BENCH_NAME_BYTES = 48
};

/* Tokens of a chunk; 0: as the requests have them. */
static inline int64_t bench_chunk(const cli_options *options) {
    return options->chunk || options->requests ? options->chunk : BENCH_CHUNK;
}

/* Where the chunks of a run come from: nowhere, or what an unmeasured run has filled, a store in
 * host memory or the pool of the engine. */
typedef enum bench_tier { BENCH_COLD, BENCH_HOST, BENCH_DEVICE } bench_tier;

/* One way to prefill, given as method[/exchange][/warm|/warm-device]. */
typedef struct bench_method {
    char label[BENCH_NAME_BYTES];
    char method[BENCH_NAME_BYTES], exchange[BENCH_NAME_BYTES]; /* exchange "": auto */
    bench_tier tier;
} bench_method;

typedef struct bench_row {
    const bench_method *method;
    char exchange[BENCH_NAME_BYTES]; /* as used */
    const cli_link *link;            /* of a projected row; NULL: measured */
    int n_rank, n_repeat;
    int64_t n_token, n_selected;      /* context and prompt; recomputed rows */
    double ttft_ms[BENCH_MAX_REPEAT]; /* in the order of the runs */
    double ms[IFKV_N_STAGE];          /* of the median run */
    double exposed_ms, compute_ms;    /* of a projected row */
    int64_t bytes[IFKV_N_STAGE], bytes_total;
    double median_ms, min_ms, max_ms; /* of ttft_ms */
    double flop, floor_ms;            /* of all ranks; what the rates allow at best */
    double speedup;                   /* over `full` of the same length and kind; 0: no such row */
    double error; /* relative L2 distance of the first logits from those of `full`, the worst run */
} bench_row;

/* Numbers with commas between them, each at least `least`: --lengths, or its default.  Errors:
 * USAGE. */
ifkv_status bench_lengths(const char *text, int64_t least, int64_t length[BENCH_MAX_LENGTH],
                          int *n_p);
/* Median (of an even number the lower middle one: a time that was), least and most of n times;
 * returns the median's place. */
int bench_middle(const double *ms, int n, double *median_p, double *min_p, double *max_p);
/* The same into a row. */
int bench_statistics(bench_row *row);
ifkv_status bench_repeat_check(const cli_options *options);

/* Rates that floors are counted with. */
typedef struct bench_rates {
    ifkv_rates alone;  /* of a rank while the others wait */
    ifkv_rates shared; /* of each while all of them work: less where they share cores or a device */
    const char *source; /* "measured", or the file of --device */
} bench_rates;

/* Take them from --device, or measure.  is_projected: every rank has a device of its own.
 * Collective. */
ifkv_status bench_rates_find(ifkv_engine *engine, const cli_options *options, bool is_projected,
                             bench_rates *rates);
/* What a session that has run was worth, by src/cost.h.  Collective. */
ifkv_status bench_cost(const ifkv_session *session, const bench_rates *rates, double *flop_p,
                       double *floor_ms_p);

/* Where rows go: a table on standard output or JSON lines with --json, and with --out the files
 * bench.jsonl and bench.h5.  Rank 0 only. */
typedef struct bench_report bench_report;
ifkv_status bench_report_open(const cli_options *options, const ifkv_model_info *info,
                              const char *comm, int n_rank, const bench_rates *rates,
                              bool is_emulated, bench_report **report_p);
ifkv_status bench_report_row(bench_report *report, const bench_row *row);
/* Write what is written at the end. */
ifkv_status bench_report_finish(bench_report *report);
void bench_report_close(bench_report *report); /* NULL is accepted */

/* ---- operations one at a time: attention, gemm, elementwise, comm ---- */

/* What an operation runs on, and how long it takes. */
typedef struct bench_stand {
    const cli_options *options;                     /* borrowed */
    ifkv_comm *comm;                                /* borrowed: of all ranks, for host values */
    ifkv_backend *backend;                          /* borrowed */
    double peak;                                    /* FLOP/s, of --device; 0: not known */
    int64_t n_call;                                 /* calls of the last batch */
    double ms[BENCH_MAX_REPEAT], median_ms, min_ms; /* of one call; NaN: without meaning */
} bench_stand;

/* Open an engine without weights: --model needs no more than a config.json.  Collective. */
ifkv_status bench_engine_open(ifkv_comm *comm, const cli_options *options, ifkv_engine **engine_p);
ifkv_status bench_stand_init(bench_stand *stand, ifkv_comm *comm, ifkv_backend *backend,
                             const cli_options *options);
/* Time batches of calls, --repeat of them after --warm-up, the slowest rank's time counting; a
 * batch is as many calls as take about 20 ms.  prepare runs before each batch, outside the window;
 * run is told the number of the call in its batch.  Collective. */
ifkv_status bench_time(bench_stand *stand, ifkv_status (*prepare)(void *arg),
                       ifkv_status (*run)(void *arg, int64_t i_call), void *arg);
/* FLOP/s of the median.  Errors: NUMERIC if it exceeds the device's peak: then something was not
 * done. */
ifkv_status bench_rate(const bench_stand *stand, double flop, double *rate_p);

/* A matrix in back-end memory with a stream of numbers of this spread; spread 0: every bit set,
 * which is NaN.  The caller frees view->data. */
ifkv_status bench_matrix(ifkv_backend *backend, ifkv_dtype dtype, int64_t n_row, int64_t n_col,
                         uint64_t key, double spread, ifkv_view *view);
/* Elements [first, first + n) of such a matrix as the back end holds them. */
void bench_elements(ifkv_dtype dtype, uint64_t key, double spread, int64_t first, int64_t n,
                    float *to);
/* Set every bit of a row, and read one to `to` [n_col]. */
ifkv_status bench_row_poison(ifkv_backend *backend, const ifkv_view *view, int64_t row);
ifkv_status bench_row_read(ifkv_backend *backend, const ifkv_view *view, int64_t row, float *to);
/* Sample i of n_sample of n rows: the first, the last, and any others. */
int64_t bench_sample(uint64_t key, int64_t i, int64_t n_row);
/* Relative rounding error of a result; that of a float32 sum's step, which may be cut off. */
double bench_rounding(ifkv_dtype dtype);
#define BENCH_SUM_EPS 0x1p-23

/* What was found in sampled results.  An element is wrong beyond the bound that its rounding errors
 * cannot exceed. */
typedef struct bench_check {
    double worst, square; /* largest error; sum of the squares of what was expected */
    int64_t n_checked, n_wrong;
} bench_check;
void bench_check_add(bench_check *check, double got, double want, double bound);
/* Put the ranks' findings together; *error_p is worst / root mean square.  Collective. */
ifkv_status bench_check_finish(bench_check *check, ifkv_comm *comm, double *error_p);

/* Where their rows go, as above.  A row is a JSON object with the same keys in every row: numbers,
 * and "label", which says what it is; and a line of text.  Rank 0 only. */
typedef struct bench_table bench_table;
ifkv_status bench_table_open(const cli_options *options, const char *kind, const bench_stand *stand,
                             const char *about, const char *columns, bench_table **table_p);
/* Steals row. */
ifkv_status bench_table_row(bench_table *table, json_t *row, const char *line);
/* Write what is written at the end.  Errors: NUMERIC if any row has "wrong" elements. */
ifkv_status bench_table_finish(bench_table *table);
void bench_table_close(bench_table *table); /* NULL is accepted */

/* Create the files of --out, bench.jsonl open as *lines_p and the name of bench.h5 in path [4096].
 */
ifkv_status bench_files_open(const cli_options *options, FILE **lines_p, char *path);
json_t *bench_real(double value); /* null where it is no finite number */
/* A number in so many columns, or a dash; buffer [32] is returned. */
const char *bench_cell(char *buffer, int width, const char *format, double value);

/* A chunk store in host memory, of one rank. */
typedef struct bench_store bench_store;
ifkv_status bench_store_create(bench_store **store_p);
void bench_store_destroy(bench_store *store);
const ifkv_store *bench_store_table(bench_store *store);

ifkv_status bench_prefill(ifkv_comm *comm, const cli_options *options);
ifkv_status bench_attention(ifkv_comm *comm, const cli_options *options);
ifkv_status bench_gemm(ifkv_comm *comm, const cli_options *options);
ifkv_status bench_elementwise(ifkv_comm *comm, const cli_options *options);
ifkv_status bench_comm(ifkv_comm *comm, const cli_options *options);

#endif
