/* Rows of operations as a table, as JSON lines and as HDF5.  See bench.h. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "bench.h"
#include "file.h"
#include "h5.h"

struct bench_table {
    const cli_options *options;
    const char *kind, *backend, *comm;
    char date[32];
    int n_rank, n_thread;
    bool is_emulated;
    FILE *lines;     /* bench.jsonl, NULL without --out */
    char path[4096]; /* bench.h5 */
    json_t *rows;    /* owned */
    int64_t n_wrong;
};

ifkv_status bench_files_open(const cli_options *options, FILE **lines_p, char *path) {
    const char *dir = options->out;
    char lines[4096], shown[IFKV_QUOTE_BYTES];
    *lines_p = NULL;
    if (!dir) return IFKV_OK;
    ifkv_path_quote(dir, shown);
    IFKV_REQUIRE(strlen(dir) + 16 < sizeof lines, IFKV_ERR_USAGE, IFKV_E_VALUE,
                 "--out: %s is too long", shown);
    IFKV_REQUIRE(mkdir(dir, 0777) == 0 || errno == EEXIST, IFKV_ERR_CANT_CREATE, IFKV_E_OUT_CREATE,
                 "%s: %s", shown, strerror(errno));
    snprintf(lines, sizeof lines, "%s/bench.jsonl", dir);
    snprintf(path, sizeof lines, "%s/bench.h5", dir);
    if (options->overwrite) {
        unlink(lines);
        unlink(path);
    }
    *lines_p = fopen(lines, "wxe");
    IFKV_REQUIRE(*lines_p, IFKV_ERR_CANT_CREATE, IFKV_E_OUT_CREATE,
                 "%s/bench.jsonl: %s; --overwrite replaces it", shown, strerror(errno));
    return IFKV_OK;
}

json_t *bench_real(double value) {
    return isfinite(value) ? json_real(value) : json_null();
}

const char *bench_cell(char *buffer, int width, const char *format, double value) {
    char text[24] = "\xe2\x80\x93"; /* a dash: three bytes, one column */
    const int more = isfinite(value) ? 0 : 2;
    if (!more) snprintf(text, sizeof text, format, value);
    snprintf(buffer, 32, "%*s", width + more, text);
    return buffer;
}

ifkv_status bench_table_open(const cli_options *options, const char *kind, const bench_stand *stand,
                             const char *about, const char *columns, bench_table **table_p) {
    bench_table *table = calloc(1, sizeof *table);
    IFKV_REQUIRE(table, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "bench: out of memory");
    const time_t now = time(NULL);
    struct tm utc;
    *table = (bench_table){.options = options,
                           .kind = kind,
                           .backend = stand->backend->ops->name,
                           .comm = ifkv_comm_name(stand->comm),
                           .n_rank = ifkv_comm_size(stand->comm),
                           .n_thread = stand->backend->n_thread,
                           .is_emulated = stand->backend->is_emulated,
                           .rows = json_array()};
    strftime(table->date, sizeof table->date, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &utc));
    const ifkv_status status = bench_files_open(options, &table->lines, table->path);
    if (status != IFKV_OK) {
        bench_table_close(table);
        return status;
    }
    *table_p = table;
    if (options->json || options->quiet) return IFKV_OK;
    printf(
        "# ifkv bench %s: %s\n# %s, backend %s (%s), comm %s, %d ranks of %d threads, seed %llu; "
        "median and least of %lld runs, of the slowest rank\n",
        kind, about, table->date, table->backend, stand->backend->device, table->comm,
        table->n_rank, table->n_thread, (unsigned long long)options->seed,
        (long long)options->repeat);
    if (table->is_emulated) printf("# EMULATED device: errors mean something, times do not\n");
    printf("%s\n", columns);
    return IFKV_OK;
}

static void describe(const bench_table *table, json_t *row) {
    json_object_set_new(row, "kind", json_string(table->kind));
    json_object_set_new(row, "time", json_string(table->is_emulated ? "emulated" : "measured"));
    json_object_set_new(row, "backend", json_string(table->backend));
    json_object_set_new(row, "comm", json_string(table->comm));
    json_object_set_new(row, "ranks", json_integer(table->n_rank));
    json_object_set_new(row, "threads", json_integer(table->n_thread));
    json_object_set_new(row, "seed", json_integer((json_int_t)table->options->seed));
    json_object_set_new(row, "date", json_string(table->date));
    json_object_set_new(row, "version", json_string(IFKV_VERSION));
}

ifkv_status bench_table_row(bench_table *table, json_t *row, const char *line) {
    describe(table, row);
    table->n_wrong += json_integer_value(json_object_get(row, "wrong"));
    char *text = json_array_append_new(table->rows, row) == 0
                     ? json_dumps(row, JSON_COMPACT | JSON_REAL_PRECISION(9))
                     : NULL;
    IFKV_REQUIRE(text, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "bench: out of memory");
    ifkv_status status = IFKV_OK;
    if (table->options->json)
        printf("%s\n", text);
    else if (!table->options->quiet)
        printf("%s\n", line);
    fflush(stdout);
    if (table->lines && fprintf(table->lines, "%s\n", text) < 0)
        status = IFKV_FAIL(IFKV_ERR_IO, IFKV_E_OUT_WRITE, "bench.jsonl: %s", strerror(errno));
    free(text);
    return status;
}

/* ---- HDF5: a dataset of every number, by its key ---- */

static ifkv_status write_column(const bench_table *table, ifkv_h5 *file, const char *key,
                                bool is_whole) {
    const int64_t n = (int64_t)json_array_size(table->rows);
    char path[64];
    int64_t *whole = malloc((size_t)n * sizeof *whole);
    float *real = malloc((size_t)n * sizeof *real);
    ifkv_status status = whole && real
                             ? IFKV_OK
                             : IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "bench: out of memory");
    for (int64_t i = 0; i < n && status == IFKV_OK; i++) {
        const json_t *value = json_object_get(json_array_get(table->rows, (size_t)i), key);
        whole[i] = json_integer_value(value);
        real[i] = json_is_number(value) ? (float)json_number_value(value) : NAN;
    }
    snprintf(path, sizeof path, "/%s", key);
    if (status == IFKV_OK)
        status = ifkv_h5_dataset_write(file, path, is_whole ? IFKV_H5_I64 : IFKV_H5_F32, 1, &n,
                                       is_whole ? (const void *)whole : real);
    free(whole);
    free(real);
    return status;
}

static ifkv_status write_columns(const bench_table *table, ifkv_h5 *file) {
    const char *key;
    json_t *value;
    json_object_foreach(json_array_get(table->rows, 0), key, value) {
        if (json_is_number(value) || json_is_null(value))
            IFKV_TRY(write_column(table, file, key, json_is_integer(value)));
    }
    return IFKV_OK;
}

/* What the rows are, one a line. */
static ifkv_status write_labels(const bench_table *table, ifkv_h5 *file) {
    size_t bytes = 1, i;
    json_t *row;
    json_array_foreach(table->rows, i, row) bytes +=
        1 + json_string_length(json_object_get(row, "label"));
    char *text = malloc(bytes), *at = text;
    IFKV_REQUIRE(text, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "bench: out of memory");
    *at = 0;
    json_array_foreach(table->rows, i, row) at +=
        sprintf(at, "%s\n", json_string_value(json_object_get(row, "label")));
    const ifkv_status status = ifkv_h5_text_write(file, "rows", text);
    free(text);
    return status;
}

static ifkv_status write_h5(const bench_table *table) {
    ifkv_h5 *file = NULL;
    ifkv_status status;
    IFKV_TRY(ifkv_h5_create(table->path, &file));
    IFKV_TRY_GOTO(status, ifkv_h5_text_write(file, "format", "ifkv-bench"), err);
    IFKV_TRY_GOTO(status, ifkv_h5_text_write(file, "kind", table->kind), err);
    IFKV_TRY_GOTO(status, ifkv_h5_text_write(file, "date", table->date), err);
    IFKV_TRY_GOTO(status, ifkv_h5_text_write(file, "backend", table->backend), err);
    IFKV_TRY_GOTO(status,
                  ifkv_h5_text_write(file, "time", table->is_emulated ? "emulated" : "measured"),
                  err);
    IFKV_TRY_GOTO(status, write_labels(table, file), err);
    IFKV_TRY_GOTO(status, write_columns(table, file), err);
    return ifkv_h5_finish(file);
err:
    ifkv_h5_close(file);
    return status;
}

ifkv_status bench_table_finish(bench_table *table) {
    FILE *lines = table->lines;
    table->lines = NULL;
    if (lines) {
        IFKV_REQUIRE(fclose(lines) == 0, IFKV_ERR_IO, IFKV_E_OUT_WRITE, "bench.jsonl: %s",
                     strerror(errno));
        IFKV_TRY(write_h5(table));
    }
    IFKV_REQUIRE(table->n_wrong == 0, IFKV_ERR_NUMERIC, IFKV_E_MISMATCH,
                 "bench %s: %lld results are further off than rounding explains; rows with wrong "
                 "ones have no times",
                 table->kind, (long long)table->n_wrong);
    return IFKV_OK;
}

void bench_table_close(bench_table *table) {
    if (!table) return;
    if (table->lines) fclose(table->lines);
    json_decref(table->rows);
    free(table);
}
