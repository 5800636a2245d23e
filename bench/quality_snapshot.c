/* Keep what a request costs once, full prefill and encode, for later runs of further
 * configurations.
 *
 * A file holds the snapshots of K and V, full prefill's own answer and its log-probabilities, raw
 * and in the machine's byte order: a cache beside a run, not a result.  The caller names files so
 * that one is only ever read for the request, model, chunking and answer length it was written for.
 */
#include "quality_measure.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool transfer(FILE *file, bool is_read, void *data, size_t bytes) {
    return is_read ? fread(data, 1, bytes, file) == bytes : fwrite(data, 1, bytes, file) == bytes;
}

static bool transfer_forced(FILE *file, bool is_read, quality_forced *forced, int64_t n_vocab) {
    const size_t n = (size_t)forced->n;
    return transfer(file, is_read, forced->token, n * sizeof *forced->token) &&
           transfer(file, is_read, forced->log_p, n * (size_t)n_vocab * sizeof *forced->log_p);
}

static size_t rows_bytes(const quality_case *it) {
    return 2 * (size_t)(it->n_layer * it->n_context * it->n_col) * sizeof *it->full;
}

static bool transfer_all(FILE *file, bool is_read, quality_case *it) {
    const size_t bytes = rows_bytes(it);
    return transfer(file, is_read, &it->full_ms, sizeof it->full_ms) &&
           transfer(file, is_read, &it->encode_ms, sizeof it->encode_ms) &&
           transfer(file, is_read, it->full, bytes) &&
           transfer(file, is_read, it->encoded, bytes) &&
           transfer_forced(file, is_read, &it->greedy, it->n_vocab) &&
           transfer_forced(file, is_read, &it->gold, it->n_vocab);
}

/* Under another name until it is whole, as a run may be stopped at any time. */
ifkv_status quality_snapshot_save(const char *path, quality_case *it) {
    char part[4096];
    snprintf(part, sizeof part, "%s.part", path);
    FILE *file = fopen(part, "wb");
    IFKV_REQUIRE(file, IFKV_ERR_CANT_CREATE, IFKV_E_OUT_CREATE, "%s: cannot create: %s", part,
                 strerror(errno));
    const bool is_written =
        transfer(file, false, &it->greedy.n, sizeof it->greedy.n) && transfer_all(file, false, it);
    IFKV_REQUIRE(!fclose(file) && is_written && !rename(part, path), IFKV_ERR_IO, IFKV_E_OUT_WRITE,
                 "%s: cannot write: %s", path, strerror(errno));
    return IFKV_OK;
}

static bool alloc_all(quality_case *it) {
    const size_t n = (size_t)it->n_vocab * sizeof(double);
    it->full = malloc(rows_bytes(it));
    it->encoded = malloc(rows_bytes(it));
    it->greedy.token = malloc((size_t)it->greedy.n * sizeof *it->greedy.token);
    it->greedy.log_p = malloc((size_t)it->greedy.n * n);
    it->gold.log_p = malloc((size_t)it->gold.n * n + 1);
    return it->full && it->encoded && it->greedy.token && it->greedy.log_p && it->gold.log_p;
}

ifkv_status quality_snapshot_load(const char *path, quality_case *it, bool *is_loaded_p) {
    FILE *file = fopen(path, "rb");
    *is_loaded_p = file != NULL;
    if (!file) return IFKV_OK;
    const bool is_read = transfer(file, true, &it->greedy.n, sizeof it->greedy.n) &&
                         it->greedy.n > 0 && it->greedy.n <= it->max_answer + 1 && alloc_all(it) &&
                         transfer_all(file, true, it) && fgetc(file) == EOF;
    fclose(file);
    IFKV_REQUIRE(is_read, IFKV_ERR_DATA, IFKV_E_VALUE,
                 "%s: is no snapshot of this request, or memory is short", path);
    return IFKV_OK;
}
