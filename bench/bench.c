/* `ifkv bench`: kinds of benches, and statistics.  See bench.h. */
#include "bench.h"

#include <stdlib.h>
#include <string.h>

#include "status.h"

ifkv_status cli_bench(ifkv_comm *comm, const cli_options *options) {
    static const struct {
        const char *name;
        ifkv_status (*run)(ifkv_comm *comm, const cli_options *options);
    } kinds[] = {{"prefill", bench_prefill}};
    const char *name = options->n_argument ? options->argument[0] : "";
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (!strcmp(name, kinds[i].name)) return kinds[i].run(comm, options);
    char shown[IFKV_QUOTE_BYTES];
    const ifkv_status status =
        IFKV_FAIL(IFKV_ERR_USAGE, IFKV_E_ARGUMENT, "bench: got \"%s\", expected prefill",
                  ifkv_quote(name, strlen(name), shown));
    ifkv_error_share(0); /* every rank reads the same words */
    return status;
}

static int ascending(const void *a, const void *b) {
    const double x = **(const double *const *)a, y = **(const double *const *)b;
    return (x > y) - (x < y);
}

int bench_statistics(bench_row *row) {
    const double *at[BENCH_MAX_REPEAT];
    for (int i = 0; i < row->n_repeat; i++) at[i] = &row->ttft_ms[i];
    qsort(at, (size_t)row->n_repeat, sizeof *at, ascending);
    const double *median =
        at[(row->n_repeat - 1) / 2]; /* of an even number, the lower one: it was */
    row->median_ms = *median;
    row->min_ms = *at[0];
    row->max_ms = *at[row->n_repeat - 1];
    return (int)(median - row->ttft_ms);
}
