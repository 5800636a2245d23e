/* One rank's K and V rows as an HDF5 file.  See output.h.
 *
 * Carries no time, host or job: equal rows give an equal file, so two runs can be compared by
 * digest. */
#include "output.h"

#include "publish.h"

#include <stdio.h>
#include <stdlib.h>

static ifkv_status write_header(ifkv_h5 *file, const ifkv_output_kv_options *options) {
    const ifkv_kv_rows *rows = options->rows;
    char hex[17];
    snprintf(hex, sizeof hex, "%016llx", (unsigned long long)options->fingerprint);
    IFKV_TRY(ifkv_h5_text_write(file, "format", "ifkv-kv"));
    IFKV_TRY(ifkv_h5_text_write(file, "format_version", "1.0"));
    IFKV_TRY(ifkv_h5_text_write(file, "creator", "ifkv"));
    IFKV_TRY(ifkv_h5_text_write(file, "creator_version", IFKV_VERSION));
    IFKV_TRY(ifkv_h5_text_write(file, "layout", "THD"));
    IFKV_TRY(ifkv_h5_text_write(file, "dtype", "float32"));
    IFKV_TRY(ifkv_h5_bool_write(file, "rope_applied", true));
    IFKV_TRY(ifkv_h5_text_write(file, "model_fingerprint", hex));
    IFKV_TRY(ifkv_h5_text_write(file, "id", options->id));
    IFKV_TRY(ifkv_h5_i64_write(file, "rank", options->rank));
    IFKV_TRY(ifkv_h5_i64_write(file, "size", options->n_rank));
    IFKV_TRY(ifkv_h5_i64_write(file, "n_row", rows->n_row));
    IFKV_TRY(ifkv_h5_i64_write(file, "n_layer", rows->n_layer));
    IFKV_TRY(ifkv_h5_i64_write(file, "n_kv_head", rows->n_kv_head));
    return ifkv_h5_i64_write(file, "d_head", rows->d_head);
}

static ifkv_status write_rows(ifkv_h5 *file, const ifkv_kv_rows *rows) {
    const int64_t n = rows->n_row, n_offset = rows->n_chunk + 1;
    IFKV_TRY(ifkv_h5_dataset_write(file, "/index", IFKV_H5_I64, 1, &n, rows->index));
    IFKV_TRY(ifkv_h5_dataset_write(file, "/positions", IFKV_H5_I64, 1, &n, rows->position));
    IFKV_TRY(ifkv_h5_dataset_write(file, "/token_ids", IFKV_H5_I32, 1, &n, rows->token));
    IFKV_TRY(ifkv_h5_dataset_write(file, "/recomputed", IFKV_H5_BOOL, 1, &n, rows->recomputed));
    IFKV_TRY(ifkv_h5_dataset_write(file, "/chunk_offsets", IFKV_H5_I64, 1, &n_offset,
                                   rows->chunk_offsets));
    if (!rows->chunk_order) return IFKV_OK;
    return ifkv_h5_dataset_write(file, "/chunk_order", IFKV_H5_I64, 1, &rows->n_chunk,
                                 rows->chunk_order);
}

static ifkv_status write_layers(ifkv_h5 *file, const ifkv_output_kv_options *options) {
    const ifkv_kv_rows *rows = options->rows;
    const int64_t dim[3] = {rows->n_row, rows->n_kv_head, rows->d_head};
    const size_t n = (size_t)(dim[0] * dim[1] * dim[2]);
    ifkv_status status = IFKV_OK;
    char path[40];
    float *k = malloc((2 * n + 1) * sizeof *k), *v = k + n; /* + 1: a rank may have no row */
    if (!k)
        return IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                         "%s: not enough memory for one layer of K and V: %zu bytes", options->dir,
                         2 * n * sizeof *k);
    IFKV_TRY_GOTO(status, ifkv_h5_group_write(file, "/layers"), out);
    for (int layer = 0; layer < rows->n_layer; layer++) {
        IFKV_TRY_GOTO(status, options->read(options->read_arg, layer, k, v), out);
        snprintf(path, sizeof path, "/layers/%d", layer);
        IFKV_TRY_GOTO(status, ifkv_h5_group_write(file, path), out);
        snprintf(path, sizeof path, "/layers/%d/k", layer);
        IFKV_TRY_GOTO(status, ifkv_h5_dataset_write(file, path, IFKV_H5_F32, 3, dim, k), out);
        snprintf(path, sizeof path, "/layers/%d/v", layer);
        IFKV_TRY_GOTO(status, ifkv_h5_dataset_write(file, path, IFKV_H5_F32, 3, dim, v), out);
    }
out:
    free(k);
    return status;
}

static ifkv_status fill(void *arg, ifkv_h5 *file) {
    const ifkv_output_kv_options *options = arg;
    IFKV_TRY(write_header(file, options));
    IFKV_TRY(write_rows(file, options->rows));
    return write_layers(file, options);
}

ifkv_status ifkv_output_kv(const ifkv_output_kv_options *options, uint64_t *digest_p) {
    char name[IFKV_OUTPUT_NAME_BYTES], file_name[IFKV_OUTPUT_NAME_BYTES + 24];
    snprintf(file_name, sizeof file_name, "%s.kv%d.h5", ifkv_output_name(options->id, name),
             options->rank);
    return ifkv_publish_h5_filled(options->dir, file_name, options->rank, fill, (void *)options,
                                  digest_p);
}
