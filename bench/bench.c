/* `ifkv bench`: kinds of benches, and statistics.  See bench.h. */
#include "bench.h"

#include <stdlib.h>
#include <string.h>

#include "status.h"

ifkv_status cli_bench(ifkv_comm *comm, const cli_options *options) {
    static const struct {
        const char *name;
        ifkv_status (*run)(ifkv_comm *comm, const cli_options *options);
    } kinds[] = {{"prefill", bench_prefill},
                 {"attention", bench_attention},
                 {"gemm", bench_gemm},
                 {"elementwise", bench_elementwise},
                 {"comm", bench_comm}};
    const char *name = options->n_argument ? options->argument[0] : "";
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (!strcmp(name, kinds[i].name)) return kinds[i].run(comm, options);
    char shown[IFKV_QUOTE_BYTES];
    const ifkv_status status =
        IFKV_FAIL(IFKV_ERR_USAGE, IFKV_E_ARGUMENT,
                  "bench: got \"%s\", expected prefill, attention, gemm, elementwise or comm",
                  ifkv_quote(name, strlen(name), shown));
    ifkv_error_share(0); /* every rank reads the same words */
    return status;
}

static int ascending(const void *a, const void *b) {
    const double x = **(const double *const *)a, y = **(const double *const *)b;
    return (x > y) - (x < y);
}

int bench_middle(const double *ms, int n, double *median_p, double *min_p, double *max_p) {
    const double *at[BENCH_MAX_REPEAT];
    for (int i = 0; i < n; i++) at[i] = &ms[i];
    qsort(at, (size_t)n, sizeof *at, ascending);
    const double *median = at[(n - 1) / 2];
    *median_p = *median;
    *min_p = *at[0];
    *max_p = *at[n - 1];
    return (int)(median - ms);
}

int bench_statistics(bench_row *row) {
    return bench_middle(row->ttft_ms, row->n_repeat, &row->median_ms, &row->min_ms, &row->max_ms);
}

ifkv_status bench_repeat_check(const cli_options *options) {
    IFKV_REQUIRE(options->repeat >= 1 && options->repeat <= BENCH_MAX_REPEAT, IFKV_ERR_USAGE,
                 IFKV_E_VALUE, "--repeat: got %lld, expected 1 to %d", (long long)options->repeat,
                 BENCH_MAX_REPEAT);
    return IFKV_OK;
}

ifkv_status bench_lengths(const char *text, int64_t least, int64_t length[BENCH_MAX_LENGTH],
                          int *n_p) {
    for (*n_p = 0;; text++) {
        char *end = NULL, shown[IFKV_QUOTE_BYTES];
        const long long n = *text >= '0' && *text <= '9' ? strtoll(text, &end, 10) : 0;
        IFKV_REQUIRE(n >= least && n <= INT32_MAX && (*end == 0 || *end == ',') &&
                         *n_p < BENCH_MAX_LENGTH,
                     IFKV_ERR_USAGE, IFKV_E_VALUE,
                     "--lengths: got \"%s\", expected at most %d numbers from %lld on, with commas "
                     "between them",
                     ifkv_quote(text, strlen(text), shown), BENCH_MAX_LENGTH, (long long)least);
        length[(*n_p)++] = n;
        if (!*end) return IFKV_OK;
        text = end;
    }
}
