/* The two forms of one request's result: a line of results.jsonl and an HDF5 record.
 *
 * Owns names, types and order of the fields.  Knows no directory but the one the record is
 * published in, and nothing of other requests. */
#ifndef IFKV_SRC_OUTPUT_RECORD_H
#define IFKV_SRC_OUTPUT_RECORD_H

#include "output.h"

/* The result line, newline included; the caller frees *line_p. */
ifkv_status ifkv_output_result_line(const ifkv_request_item *item, const ifkv_result *result,
                                    char **line_p);

/* Write and publish DIR/<name>.h5. */
ifkv_status ifkv_output_record_file(const ifkv_output_options *options,
                                    const ifkv_request_item *item, const ifkv_result *result,
                                    const char *file_name, uint64_t *digest_p);

#endif
