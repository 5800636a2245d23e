/* `ifkv bench`: what its kinds share, and the rows of its tables.
 *
 * Owns cases, methods and statistics; refuses to know how a row is computed.  A row is measured or
 * projected, never a mixture, and carries the error of the very runs that made its time. */
#ifndef IFKV_BENCH_BENCH_H
#define IFKV_BENCH_BENCH_H

#include "cli.h"

enum { BENCH_MAX_REPEAT = 64, BENCH_MAX_LENGTH = 64, BENCH_MAX_METHOD = 32, BENCH_NAME_BYTES = 48 };

/* One way to prefill, given as method[/exchange][/warm]. */
typedef struct bench_method {
    char label[BENCH_NAME_BYTES];
    char method[BENCH_NAME_BYTES], exchange[BENCH_NAME_BYTES]; /* exchange "": auto */
    bool is_warm; /* chunks come from a store in host memory that an unmeasured run has filled */
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

/* Fill median, minimum and maximum; returns the index of the median run. */
int bench_statistics(bench_row *row);

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
                              bench_report **report_p);
ifkv_status bench_report_row(bench_report *report, const bench_row *row);
/* Write what is written at the end. */
ifkv_status bench_report_finish(bench_report *report);
void bench_report_close(bench_report *report); /* NULL is accepted */

/* A chunk store in host memory, of one rank. */
typedef struct bench_store bench_store;
ifkv_status bench_store_create(bench_store **store_p);
void bench_store_destroy(bench_store *store);
const ifkv_store *bench_store_table(bench_store *store);

ifkv_status bench_prefill(ifkv_comm *comm, const cli_options *options);

#endif
