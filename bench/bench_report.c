/* Rows as a table, as JSON lines and as HDF5.  See bench.h. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "bench.h"
#include "h5.h"
#include "status.h"

struct bench_report {
    const cli_options *options;
    ifkv_model_info info;
    bench_rates rates;
    bool is_emulated;
    char date[32], comm[16];
    int n_rank;
    FILE *lines;     /* bench.jsonl, NULL without --out */
    char path[4096]; /* bench.h5 */
    bench_row *row;  /* [n] owned */
    char **label;    /* [n] owned: what the row is, for HDF5 */
    int64_t n, capacity;
    int64_t n_token; /* of the last row */
};

/* Published prefill times (InfoFlow KV project page, 4 x H100, model unnamed; the work fits
 * Qwen3-14B), ms: one GPU, what is called ring there, InfoFlow. */
static const struct {
    int64_t n_token;
    int single, ring, infoflow;
} published[] = {{8192, 567, 248, 232}, {16384, 1286, 708, 428}, {32768, 3190, 2350, 914}};

static bool is_published_shape(const ifkv_model_info *info) {
    return info->n_layer == 40 && info->d_model == 5120 && info->n_head == 40 &&
           info->d_ff == 17408;
}

static void print_head(const bench_report *report) {
    const cli_options *o = report->options;
    printf("# ifkv bench prefill: %s, %d layers, %.2f B parameters%s\n", o->model,
           report->info.n_layer, (double)report->info.n_parameter / 1e9,
           o->has_random_weights ? ", random weights" : "");
    char chunk[32] = "as given";
    if (bench_chunk(o)) snprintf(chunk, sizeof chunk, "of %lld", (long long)bench_chunk(o));
    printf("# %s, backend %s, comm %s, %d ranks of %d threads, ratio %s, chunks %s; median of "
           "%lld runs, milliseconds\n",
           report->date, report->info.backend, report->comm, report->n_rank, report->info.n_thread,
           o->ratio ? o->ratio : "0.15", chunk, (long long)o->repeat);
    const ifkv_rates *alone = &report->rates.alone, *shared = &report->rates.shared;
    if (report->is_emulated) {
        printf("# EMULATED device: errors mean something, times do not\n");
        return;
    }
    printf(
        "# of floor: share of the time that these rates would need, %s: products %.4g, attention "
        "%.4g TFLOP/s of a rank alone, %.4g and %.4g of each while all work\n",
        report->rates.source, 1e-12 * alone->matmul, 1e-12 * alone->attention,
        1e-12 * shared->matmul, 1e-12 * shared->attention);
    if (o->project)
        printf("# PROJECTED: every rank's work was measured alone on one device and composed for "
               "%d of them; no row was measured as a whole\n",
               report->n_rank);
}

ifkv_status bench_report_open(const cli_options *options, const ifkv_model_info *info,
                              const char *comm, int n_rank, const bench_rates *rates,
                              bool is_emulated, bench_report **report_p) {
    bench_report *report = calloc(1, sizeof *report);
    IFKV_REQUIRE(report, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "bench: out of memory");
    const time_t now = time(NULL);
    struct tm utc;
    report->options = options;
    report->info = *info;
    report->n_rank = n_rank;
    report->rates = *rates;
    report->is_emulated = is_emulated;
    snprintf(report->comm, sizeof report->comm, "%s", comm);
    strftime(report->date, sizeof report->date, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &utc));
    const ifkv_status status = bench_files_open(options, &report->lines, report->path);
    if (status != IFKV_OK) {
        bench_report_close(report);
        return status;
    }
    if (!options->json && !options->quiet) print_head(report);
    *report_p = report;
    return IFKV_OK;
}

/* Of all ranks together. */
static double tflops(const bench_row *row) {
    return 1e-9 * row->flop / row->median_ms;
}

static double floor_share(const bench_row *row) {
    return row->floor_ms / row->median_ms;
}

static const char *time_is(const bench_report *report, const bench_row *row) {
    return report->is_emulated ? "emulated" : row->link ? "projected" : "measured";
}

/* ---- the table ---- */

static void print_length(const bench_report *report, const bench_row *row) {
    if (is_published_shape(&report->info))
        for (size_t i = 0; i < sizeof published / sizeof *published; i++)
            if (published[i].n_token == row->n_token)
                printf("# published, 4 x H100, %lld tokens: one GPU %d, \"ring\" %d, InfoFlow %d "
                       "(%.2fx over one GPU)\n",
                       (long long)row->n_token, published[i].single, published[i].ring,
                       published[i].infoflow, (double)published[i].single / published[i].infoflow);
    printf("# %7s %-26s %-20s %8s %9s %8s %8s %8s %8s", "tokens", "method", "time is", "selected",
           "ttft", "spread", "speed-up", "TFLOP/s", "of floor");
    for (int stage = 0; stage < IFKV_STAGE_DECODE; stage++)
        printf(" %9s", ifkv_stage_name((ifkv_stage)stage));
    printf(" %9s %8s\n", "MB moved", "error");
}

static void print_row(bench_report *report, const bench_row *row) {
    if (row->n_token != report->n_token) print_length(report, row);
    report->n_token = row->n_token;
    char name[2 * BENCH_NAME_BYTES];
    const bool has_exchange = *row->method->exchange || !strcmp(row->exchange, "none") ||
                              !strcmp(row->exchange, row->method->method);
    snprintf(name, sizeof name, "%s%s%s", row->method->label, has_exchange ? "" : " ",
             has_exchange ? "" : row->exchange);
    char cell[6][32];
    printf("  %7lld %-26s %-20s %8lld %s %s %s %s %s", (long long)row->n_token, name,
           row->link ? row->link->name : time_is(report, row), (long long)row->n_selected,
           bench_cell(cell[0], 9, "%.2f", row->median_ms),
           bench_cell(cell[1], 8, "%.1f%%", 100 * (row->max_ms - row->min_ms) / row->median_ms),
           bench_cell(cell[2], 8, "%.2fx", row->speedup),
           bench_cell(cell[3], 8, "%.4g", tflops(row)),
           bench_cell(cell[4], 8, "%.1f%%", 100 * floor_share(row)));
    for (int stage = 0; stage < IFKV_STAGE_DECODE; stage++)
        printf(" %s", bench_cell(cell[5], 9, "%.2f", row->ms[stage]));
    printf(" %9.2f %8.1e\n", (double)row->bytes_total / 1e6, row->error);
    fflush(stdout);
}

/* ---- JSON ---- */

static json_t *rates_object(const bench_rates *rates) {
    return json_pack("{s:s, s:[f, f], s:[f, f], s:[f, f]}", "source", rates->source,
                     "matmul_tflops", 1e-12 * rates->alone.matmul, 1e-12 * rates->shared.matmul,
                     "attention_tflops", 1e-12 * rates->alone.attention,
                     1e-12 * rates->shared.attention, "memory_gbytes_per_s",
                     1e-9 * rates->alone.memory, 1e-9 * rates->shared.memory);
}

static json_t *stage_numbers(const double *value) {
    json_t *object = json_object();
    for (int stage = 0; stage < IFKV_STAGE_DECODE; stage++)
        json_object_set_new(object, ifkv_stage_name((ifkv_stage)stage), bench_real(value[stage]));
    return object;
}

static json_t *tier_name(bench_tier tier) {
    static const char *const names[] = {[BENCH_HOST] = "host", [BENCH_DEVICE] = "device"};
    return tier == BENCH_COLD ? json_null() : json_string(names[tier]);
}

static json_t *row_object(const bench_report *report, const bench_row *row) {
    const cli_options *o = report->options;
    json_t *runs = json_array(), *bytes = json_object();
    for (int i = 0; i < row->n_repeat; i++)
        json_array_append_new(runs, bench_real(row->ttft_ms[i]));
    for (int stage = 0; stage < IFKV_STAGE_DECODE; stage++)
        json_object_set_new(bytes, ifkv_stage_name((ifkv_stage)stage),
                            json_integer(row->bytes[stage]));
    json_object_set_new(bytes, "total", json_integer(row->bytes_total));
    json_t *object = json_pack(
        "{s:s, s:s, s:b, s:s, s:s, s:s, s:i, s:i, s:s, s:I, s:I, s:s, s:o, s:o, s:o, s:o, s:o, "
        "s:o, s:o, s:f}",
        "kind", "prefill", "time", time_is(report, row), "warm", row->method->tier != BENCH_COLD,
        "method", row->method->method, "label", row->method->label, "exchange", row->exchange,
        "ranks", row->n_rank, "threads", report->info.n_thread, "backend", report->info.backend,
        "tokens", (json_int_t)row->n_token, "selected", (json_int_t)row->n_selected, "ratio",
        o->ratio ? o->ratio : "0.15", "ttft_ms", bench_real(row->median_ms), "min_ms",
        bench_real(row->min_ms), "max_ms", bench_real(row->max_ms), "runs_ms", runs, "ms",
        stage_numbers(row->ms), "bytes", bytes, "speedup", bench_real(row->speedup), "error",
        row->error);
    json_object_set_new(object, "tier", tier_name(row->method->tier));
    json_object_set_new(object, "tflops", bench_real(tflops(row)));
    json_object_set_new(object, "floor_share", bench_real(floor_share(row)));
    json_object_set_new(object, "rates", rates_object(&report->rates));
    json_object_set_new(object, "model", json_string(o->model));
    json_object_set_new(object, "chunk",
                        bench_chunk(o) ? json_integer(bench_chunk(o)) : json_null());
    json_object_set_new(object, "date", json_string(report->date));
    json_object_set_new(object, "version", json_string(IFKV_VERSION));
    if (row->link)
        json_object_set_new(object, "link",
                            json_pack("{s:s, s:f, s:f, s:f, s:f, s:f}", "name", row->link->name,
                                      "alpha_us", row->link->link.alpha_us, "gbytes_per_s",
                                      row->link->link.gbytes_per_s, "control_us",
                                      row->link->link.control_us, "exposed_ms", row->exposed_ms,
                                      "compute_ms", row->compute_ms));
    return object;
}

static ifkv_status keep_row(bench_report *report, const bench_row *row) {
    if (report->n == report->capacity) {
        const int64_t capacity = report->capacity ? 2 * report->capacity : 64;
        bench_row *grown = realloc(report->row, (size_t)capacity * sizeof *grown);
        if (grown) report->row = grown;
        char **labels = realloc(report->label, (size_t)capacity * sizeof *labels);
        if (labels) report->label = labels;
        IFKV_REQUIRE(grown && labels, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "bench: out of memory");
        report->capacity = capacity;
    }
    const size_t bytes = 3 * BENCH_NAME_BYTES;
    char *label = malloc(bytes);
    IFKV_REQUIRE(label, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "bench: out of memory");
    snprintf(label, bytes, "%s, %s", row->method->label,
             row->link ? row->link->name : time_is(report, row));
    report->row[report->n] = *row;
    report->label[report->n++] = label;
    return IFKV_OK;
}

ifkv_status bench_report_row(bench_report *report, const bench_row *row) {
    json_t *object = row_object(report, row);
    char *line = object ? json_dumps(object, JSON_COMPACT | JSON_REAL_PRECISION(9)) : NULL;
    json_decref(object);
    IFKV_REQUIRE(line, IFKV_ERR_NUMERIC, IFKV_E_NOT_FINITE, "bench: a row with no finite numbers");
    if (report->options->json)
        printf("%s\n", line);
    else if (!report->options->quiet)
        print_row(report, row);
    ifkv_status status = IFKV_OK;
    if (report->lines && fprintf(report->lines, "%s\n", line) < 0)
        status = IFKV_FAIL(IFKV_ERR_IO, IFKV_E_OUT_WRITE, "bench.jsonl: %s", strerror(errno));
    free(line);
    return status == IFKV_OK && report->lines ? keep_row(report, row) : status;
}

/* ---- HDF5 ---- */

static ifkv_status write_columns(const bench_report *report, ifkv_h5 *file) {
    const int64_t n = report->n, dim[] = {n, IFKV_STAGE_DECODE};
    const int64_t n_repeat = n ? report->row[0].n_repeat : 0, run_dim[] = {n, n_repeat};
    const size_t most = (size_t)(n_repeat > dim[1] ? n_repeat : dim[1]);
    float *real = malloc(((size_t)n * most + 1) * sizeof *real);
    int64_t *whole = malloc((3 * (size_t)n + 1) * sizeof *whole);
    ifkv_status status = real && whole
                             ? IFKV_OK
                             : IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "bench: out of memory");
    IFKV_TRY_GOTO(status, status, out);
    for (int64_t i = 0; i < n; i++) {
        whole[i] = report->row[i].n_token;
        whole[n + i] = report->row[i].n_selected;
        whole[2 * n + i] = report->row[i].bytes_total;
        for (int64_t r = 0; r < n_repeat; r++)
            real[i * n_repeat + r] = (float)report->row[i].ttft_ms[r];
    }
    IFKV_TRY_GOTO(status, ifkv_h5_dataset_write(file, "/tokens", IFKV_H5_I64, 1, dim, whole), out);
    IFKV_TRY_GOTO(status, ifkv_h5_dataset_write(file, "/selected", IFKV_H5_I64, 1, dim, whole + n),
                  out);
    IFKV_TRY_GOTO(status, ifkv_h5_dataset_write(file, "/bytes", IFKV_H5_I64, 1, dim, whole + 2 * n),
                  out);
    IFKV_TRY_GOTO(status, ifkv_h5_dataset_write(file, "/ttft_ms", IFKV_H5_F32, 2, run_dim, real),
                  out);
    for (int64_t i = 0; i < n; i++)
        for (int64_t stage = 0; stage < dim[1]; stage++)
            real[i * dim[1] + stage] = (float)report->row[i].ms[stage];
    IFKV_TRY_GOTO(status, ifkv_h5_dataset_write(file, "/stage_ms", IFKV_H5_F32, 2, dim, real), out);
    for (int64_t i = 0; i < n; i++) real[i] = (float)report->row[i].error;
    IFKV_TRY_GOTO(status, ifkv_h5_dataset_write(file, "/error", IFKV_H5_F32, 1, dim, real), out);
    for (int64_t i = 0; i < n; i++) real[i] = (float)tflops(&report->row[i]);
    IFKV_TRY_GOTO(status, ifkv_h5_dataset_write(file, "/tflops", IFKV_H5_F32, 1, dim, real), out);
    for (int64_t i = 0; i < n; i++) real[i] = (float)floor_share(&report->row[i]);
    status = ifkv_h5_dataset_write(file, "/floor_share", IFKV_H5_F32, 1, dim, real);
out:
    free(real);
    free(whole);
    return status;
}

/* What the rows are, one a line. */
static ifkv_status write_labels(const bench_report *report, ifkv_h5 *file) {
    size_t bytes = 1;
    for (int64_t i = 0; i < report->n; i++) bytes += strlen(report->label[i]) + 1;
    char *text = malloc(bytes), *at = text;
    IFKV_REQUIRE(text, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "bench: out of memory");
    *at = 0;
    for (int64_t i = 0; i < report->n; i++) at += sprintf(at, "%s\n", report->label[i]);
    const ifkv_status status = ifkv_h5_text_write(file, "rows", text);
    free(text);
    return status;
}

ifkv_status bench_report_finish(bench_report *report) {
    FILE *lines = report->lines;
    if (!lines) return IFKV_OK;
    report->lines = NULL;
    IFKV_REQUIRE(fclose(lines) == 0, IFKV_ERR_IO, IFKV_E_OUT_WRITE, "bench.jsonl: %s",
                 strerror(errno));
    ifkv_h5 *file = NULL;
    ifkv_status status;
    IFKV_TRY(ifkv_h5_create(report->path, &file));
    IFKV_TRY_GOTO(status, ifkv_h5_text_write(file, "format", "ifkv-bench"), err);
    IFKV_TRY_GOTO(status, ifkv_h5_text_write(file, "date", report->date), err);
    IFKV_TRY_GOTO(status, ifkv_h5_text_write(file, "model", report->options->model), err);
    IFKV_TRY_GOTO(status, ifkv_h5_text_write(file, "backend", report->info.backend), err);
    IFKV_TRY_GOTO(status,
                  ifkv_h5_text_write(file, "time",
                                     report->is_emulated        ? "emulated"
                                     : report->options->project ? "projected"
                                                                : "measured"),
                  err);
    IFKV_TRY_GOTO(status, ifkv_h5_text_write(file, "rates", report->rates.source), err);
    IFKV_TRY_GOTO(status, ifkv_h5_i64_write(file, "ranks", report->n_rank), err);
    IFKV_TRY_GOTO(status, write_labels(report, file), err);
    IFKV_TRY_GOTO(status, write_columns(report, file), err);
    return ifkv_h5_finish(file);
err:
    ifkv_h5_close(file);
    return status;
}

void bench_report_close(bench_report *report) {
    if (!report) return;
    if (report->lines) fclose(report->lines);
    for (int64_t i = 0; i < report->n; i++) free(report->label[i]);
    free(report->label);
    free(report->row);
    free(report);
}
