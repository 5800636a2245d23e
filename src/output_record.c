/* The two forms of one request's result.  See output_record.h. */
#include "output_record.h"

#include "h5.h"
#include "publish.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- the line ---- */

/* A double prints with as many digits as a clock or a sum of one can mean. */
#define MS_DIGITS 9

static json_t *text_or_null(const char *text) {
    return text ? json_string(text) : json_null();
}

static json_t *json_or_null(const char *text) {
    return text ? json_loads(text, 0, NULL) : json_null();
}

static json_t *ids_to_json(const int32_t *id, int64_t n) {
    json_t *list = json_array();
    for (int64_t i = 0; i < n; i++) json_array_append_new(list, json_integer(id[i]));
    return list;
}

/* The chunk in each place, where they changed places: `selected` counts along the new sequence. */
static json_t *order_to_json(const ifkv_result *result) {
    if (!result->chunk_order) return json_null();
    json_t *list = json_array();
    for (int64_t i = 0; i < result->n_chunk; i++)
        json_array_append_new(list, json_integer(result->chunk_order[i]));
    return list;
}

static json_t *ms_to_json(const ifkv_result *result) {
    json_t *ms = json_object();
    for (int i = 0; i < IFKV_N_STAGE; i++) {
        /* ttft stands behind the stages it sums up */
        if (i == IFKV_STAGE_DECODE) json_object_set_new(ms, "ttft", json_real(result->ttft_ms));
        json_object_set_new(ms, ifkv_stage_name((ifkv_stage)i), json_real(result->ms[i]));
    }
    return ms;
}

static json_t *rode_to_json(const ifkv_result *result) {
    json_t *rode = json_array();
    for (int i = 0; i < IFKV_N_STAGE; i++)
        if (result->rode[i])
            json_array_append_new(rode, json_string(ifkv_stage_name((ifkv_stage)i)));
    return rode;
}

static json_t *bytes_to_json(const ifkv_result *result) {
    json_t *bytes = json_object();
    for (int i = 0; i < IFKV_N_STAGE; i++)
        json_object_set_new(bytes, ifkv_stage_name((ifkv_stage)i), json_integer(result->bytes[i]));
    json_object_set_new(bytes, "total", json_integer(result->bytes_total));
    return bytes;
}

static double hit_fraction(const ifkv_result *result) {
    return result->n_context ? (double)result->store_tokens_hit / (double)result->n_context : 0;
}

/* The tool's store is a directory: what did not come from the device came from its disk. */
static int64_t tokens_disk(const ifkv_result *result) {
    return result->store_tokens_hit - result->store_tokens_device;
}

static json_t *store_to_json(const ifkv_result *result) {
    if (!result->has_store && !result->has_pool) return json_null();
    return json_pack("{s:I, s:I, s:I, s:f, s:I, s:I}", "hits", (json_int_t)result->store_hits,
                     "misses", (json_int_t)result->store_misses, "tokens_hit",
                     (json_int_t)result->store_tokens_hit, "hit_fraction", hit_fraction(result),
                     "tokens_disk", (json_int_t)tokens_disk(result), "tokens_device",
                     (json_int_t)result->store_tokens_device);
}

static json_t *auto_to_json(const ifkv_result *result) {
    if (!result->auto_exact || !*result->auto_exact) return json_null();
    return json_pack("{s:s, s:f, s:f}", "exact", result->auto_exact, "exact_ms",
                     result->auto_exact_ms, "infoflow_ms", result->auto_infoflow_ms);
}

static void digest_to_hex(uint64_t digest, char hex[17]) {
    snprintf(hex, 17, "%016llx", (unsigned long long)digest);
}

ifkv_status ifkv_output_result_line(const ifkv_request_item *item, const ifkv_result *result,
                                    char **line_p) {
    char hex[17];
    digest_to_hex(result->selected_digest, hex);
    json_t *root = json_pack(
        "{s:s, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:i, s:I, s:I, s:I, s:I, s:s, s:o, s:o, "
        "s:o, s:{s:I, s:I, s:I}, s:o, s:o, s:o}",
        "id", item->id, "answers", json_or_null(item->answers_json), "meta",
        json_or_null(item->meta_json), "answer_ids", ids_to_json(result->answer, result->n_answer),
        "finish", text_or_null(result->finish), "method", text_or_null(result->method), "exchange",
        text_or_null(result->exchange), "backend", text_or_null(result->backend), "comm",
        text_or_null(result->comm), "size", result->n_rank, "n_context",
        (json_int_t)result->n_context, "n_chunk", (json_int_t)result->n_chunk, "n_prompt",
        (json_int_t)result->n_prompt, "n_selected", (json_int_t)result->n_selected,
        "selected_digest", hex, "ms", ms_to_json(result), "rode", rode_to_json(result), "bytes",
        bytes_to_json(result), "memory", "weights", (json_int_t)result->memory_weights, "planned",
        (json_int_t)result->memory_planned, "peak", (json_int_t)result->memory_peak, "store",
        store_to_json(result), "chunk_order", order_to_json(result), "auto", auto_to_json(result));
    char *text = root ? json_dumps(root, JSON_COMPACT | JSON_REAL_PRECISION(MS_DIGITS)) : NULL;
    json_decref(root);
    char *line = text ? realloc(text, strlen(text) + 2) : NULL;
    if (!line) {
        free(text);
        return IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "%s: not enough memory for the result",
                         item->where);
    }
    *line_p = strcat(line, "\n");
    return IFKV_OK;
}

/* ---- the record ---- */

/* ISO 8601 in UTC; SOURCE_DATE_EPOCH stands in for the clock where a build wants equal files. */
static void time_to_text(char *text, size_t bytes) {
    const char *epoch = getenv("SOURCE_DATE_EPOCH");
    time_t now = epoch ? (time_t)strtoll(epoch, NULL, 10) : time(NULL);
    struct tm tm;
    if (!gmtime_r(&now, &tm) || !strftime(text, bytes, "%Y-%m-%dT%H:%M:%SZ", &tm)) *text = 0;
}

static ifkv_status write_header(ifkv_h5 *file, const ifkv_output_options *options,
                                const ifkv_request_item *item) {
    char hex[17], version[32], now[32], key[IFKV_OUTPUT_KEY_BYTES];
    digest_to_hex(options->fingerprint, hex);
    time_to_text(now, sizeof now);
    IFKV_TRY(ifkv_h5_text_write(file, "format", "ifkv-record"));
    IFKV_TRY(ifkv_h5_text_write(file, "format_version", "1.0"));
    IFKV_TRY(ifkv_h5_text_write(file, "creator", "ifkv"));
    IFKV_TRY(ifkv_h5_text_write(file, "creator_version", IFKV_VERSION));
    IFKV_TRY(ifkv_h5_text_write(file, "HDF5_Version", ifkv_h5_version(version)));
    IFKV_TRY(ifkv_h5_text_write(file, "file_time", now));
    IFKV_TRY(ifkv_h5_text_write(file, "model_fingerprint", hex));
    IFKV_TRY(ifkv_h5_text_write(file, "run", options->run));
    IFKV_TRY(ifkv_h5_text_write(file, "key", ifkv_output_key(options, item, key)));
    return ifkv_h5_text_write(file, "id", item->id);
}

static ifkv_status write_texts(ifkv_h5 *file, const ifkv_result *r) {
    char hex[17], rode[16 * IFKV_N_STAGE] = "";
    digest_to_hex(r->selected_digest, hex);
    for (int i = 0; i < IFKV_N_STAGE; i++)
        if (r->rode[i])
            snprintf(rode + strlen(rode), sizeof rode - strlen(rode), "%s%s", *rode ? "," : "",
                     ifkv_stage_name((ifkv_stage)i));
    const struct {
        const char *name, *text;
    } field[] = {
        {"method", r->method},
        {"exchange", r->exchange},
        {"backend", r->backend},
        {"device", r->device},
        {"comm", r->comm},
        {"finish", r->finish},
        {"selected_digest", hex},
        {"score_layers", r->score_layers},
        {"geometry", r->geometry},
        {"hp", r->hp},
        {"rode", rode},
        {"scoring", r->scoring},
    };
    for (size_t i = 0; i < sizeof field / sizeof *field; i++)
        if (field[i].text) IFKV_TRY(ifkv_h5_text_write(file, field[i].name, field[i].text));
    return IFKV_OK;
}

static ifkv_status write_numbers(ifkv_h5 *file, const ifkv_result *r) {
    char name[40];
    const struct {
        const char *name;
        int64_t value;
    } field[] = {
        {"size", r->n_rank},
        {"n_context", r->n_context},
        {"n_chunk", r->n_chunk},
        {"n_prompt", r->n_prompt},
        {"n_selected", r->n_selected},
        {"bytes_total", r->bytes_total},
        {"memory_weights", (int64_t)r->memory_weights},
        {"memory_planned", (int64_t)r->memory_planned},
        {"memory_peak", (int64_t)r->memory_peak},
    };
    for (size_t i = 0; i < sizeof field / sizeof *field; i++)
        IFKV_TRY(ifkv_h5_i64_write(file, field[i].name, field[i].value));
    for (int i = 0; i < IFKV_N_STAGE; i++) {
        snprintf(name, sizeof name, "ms_%s", ifkv_stage_name((ifkv_stage)i));
        IFKV_TRY(ifkv_h5_f64_write(file, name, r->ms[i]));
        snprintf(name, sizeof name, "bytes_%s", ifkv_stage_name((ifkv_stage)i));
        IFKV_TRY(ifkv_h5_i64_write(file, name, r->bytes[i]));
    }
    return ifkv_h5_f64_write(file, "ms_ttft", r->ttft_ms);
}

static ifkv_status write_store(ifkv_h5 *file, const ifkv_result *r) {
    if (!r->has_store && !r->has_pool) return IFKV_OK;
    IFKV_TRY(ifkv_h5_i64_write(file, "store_hits", r->store_hits));
    IFKV_TRY(ifkv_h5_i64_write(file, "store_misses", r->store_misses));
    IFKV_TRY(ifkv_h5_i64_write(file, "store_tokens_hit", r->store_tokens_hit));
    IFKV_TRY(ifkv_h5_i64_write(file, "store_tokens_disk", tokens_disk(r)));
    IFKV_TRY(ifkv_h5_i64_write(file, "store_tokens_device", r->store_tokens_device));
    return ifkv_h5_f64_write(file, "store_hit_fraction", hit_fraction(r));
}

static ifkv_status write_auto(ifkv_h5 *file, const ifkv_result *r) {
    if (!r->auto_exact || !*r->auto_exact) return IFKV_OK;
    IFKV_TRY(ifkv_h5_text_write(file, "auto_exact", r->auto_exact));
    IFKV_TRY(ifkv_h5_f64_write(file, "auto_exact_ms", r->auto_exact_ms));
    return ifkv_h5_f64_write(file, "auto_infoflow_ms", r->auto_infoflow_ms);
}

static ifkv_status write_arrays(ifkv_h5 *file, const ifkv_output_options *options,
                                const ifkv_result *r) {
    IFKV_TRY(ifkv_h5_dataset_write(file, "/selected", IFKV_H5_I64, 1, &r->n_selected, r->selected));
    IFKV_TRY(ifkv_h5_dataset_write(file, "/answer_ids", IFKV_H5_I32, 1, &r->n_answer, r->answer));
    if (r->chunk_order)
        IFKV_TRY(ifkv_h5_dataset_write(file, "/chunk_order", IFKV_H5_I64, 1, &r->n_chunk,
                                       r->chunk_order));
    if (options->save_scores && r->scores)
        IFKV_TRY(ifkv_h5_dataset_write(file, "/scores", IFKV_H5_F32, 1, &r->n_context, r->scores));
    if (options->save_logits && r->first_logits)
        IFKV_TRY(ifkv_h5_dataset_write(file, "/first_logits", IFKV_H5_F32, 1, &r->n_vocab,
                                       r->first_logits));
    return IFKV_OK;
}

typedef struct record {
    const ifkv_output_options *options;
    const ifkv_request_item *item;
    const ifkv_result *result;
} record;

static ifkv_status fill(void *arg, ifkv_h5 *file) {
    const record *of = arg;
    IFKV_TRY(write_header(file, of->options, of->item));
    IFKV_TRY(write_texts(file, of->result));
    IFKV_TRY(write_numbers(file, of->result));
    IFKV_TRY(write_store(file, of->result));
    IFKV_TRY(write_auto(file, of->result));
    return write_arrays(file, of->options, of->result);
}

ifkv_status ifkv_output_record_file(const ifkv_output_options *options,
                                    const ifkv_request_item *item, const ifkv_result *result,
                                    const char *file_name, uint64_t *digest_p) {
    record of = {options, item, result};
    return ifkv_publish_h5_filled(options->dir, file_name, 0, fill, &of, digest_p);
}
