/* The output directory of a run: results, records, KV files, manifest.
 *
 * Owns the files of formats.md 3 and what is needed to go on after a kill: a request is done if and
 * only if its manifest line is there, its result line is there and every file it names has the
 * digest it names.  Per request the order is: KV files (each rank its own), record, result line,
 * manifest line.  OUT/run.json keeps what the finished results depend on, so that a resume under
 * other options is refused by name.  Refuses to compute anything and knows no communicator: the
 * caller runs rank 0's part on rank 0 and brings the digests of the KV files there.
 *
 * A run: rank 0 ifkv_output_open, all ranks agree; rank 0 ifkv_output_begin, all ranks agree; per
 * request every rank ifkv_output_kv, digests gathered, rank 0 ifkv_output_record; at the end rank 0
 * ifkv_output_finish and ifkv_output_close. */
#ifndef IFKV_SRC_OUTPUT_H
#define IFKV_SRC_OUTPUT_H

#include "ifkv.h"
#include "request.h"

#define IFKV_OUTPUT_NAME_BYTES 96 /* room for a file name made from an id */
#define IFKV_OUTPUT_KEY_BYTES 33  /* 32 hex digits */

typedef enum ifkv_output_mode {
    IFKV_OUTPUT_FRESH,    /* refuse a directory that holds results */
    IFKV_OUTPUT_RESUME,   /* keep what is done */
    IFKV_OUTPUT_OVERWRITE /* remove old results when the first new one is about to be written */
} ifkv_output_mode;

typedef struct ifkv_output_options {
    const char *dir;
    ifkv_output_mode mode;
    uint64_t fingerprint; /* of the model */
    /* "method=infoflow;ratio=0.15;save_kv=0": everything but model and request that the results or
     * the set of files depend on, as name=value separated by ';' */
    const char *run;
    const ifkv_request_list *requests; /* borrowed for the output's life */
    bool save_scores, save_logits;
} ifkv_output_options;

typedef struct ifkv_output ifkv_output;

/* Lock the directory and read what is there; changes no result.  The caller owns *out_p.
 * Errors: CANT_CREATE; BUSY if another job holds it; DATA with E0704 if results are there and the
 * mode is FRESH, or if they depend on something else than this run (the message names the first
 * difference and both values). */
ifkv_status ifkv_output_open(const ifkv_output_options *options, ifkv_output **out_p);
/* Make the directory ready to be written: old results removed (OVERWRITE) or cut to what is done
 * (RESUME).  Call before any rank writes. */
ifkv_status ifkv_output_begin(ifkv_output *out);
/* True if request i_request of the list was finished by an earlier run. */
bool ifkv_output_is_done(const ifkv_output *out, int64_t i_request);
/* Finish one request: its record, result line and manifest line.  kv_digest [n_kv] by rank, as
 * ifkv_output_kv gave them; n_kv = 0 without --save-kv. */
ifkv_status ifkv_output_record(ifkv_output *out, int64_t i_request, const ifkv_result *result,
                               int n_kv, const uint64_t *kv_digest);
/* Put the result lines in the order of the requests, if a resume left them in another. */
ifkv_status ifkv_output_finish(ifkv_output *out);
/* Unlock; NULL is fine. */
void ifkv_output_close(ifkv_output *out);

/* ---- any rank ---- */

/* A file name for an id: [a-z0-9_-] up to 64 bytes stay as they are, anything else becomes a
 * readable start, '.', and 16 hex digits.  Distinct on file systems that ignore case; never a path.
 * name holds IFKV_OUTPUT_NAME_BYTES; returns name. */
const char *ifkv_output_name(const char *id, char *name);

/* Resume key of a request: 128 bits over format version, model, request and run, as hex. */
const char *ifkv_output_key(const ifkv_output_options *options, const ifkv_request_item *item,
                            char *key);

typedef ifkv_status (*ifkv_output_kv_fn)(void *arg, int layer, float *k, float *v);

typedef struct ifkv_output_kv_options {
    const char *dir, *id;
    uint64_t fingerprint;
    int rank, n_rank;
    const ifkv_kv_rows *rows;
    ifkv_output_kv_fn read; /* fills k and v [n_row, n_kv_head, d_head] of one layer */
    void *read_arg;
} ifkv_output_kv_options;

/* Write this rank's <name>.kv<rank>.h5.  Holds one layer in memory.  The same rows give the same
 * bytes.  Errors: IO, CANT_CREATE, RESOURCE, or what read returned. */
ifkv_status ifkv_output_kv(const ifkv_output_kv_options *options, uint64_t *digest_p);

/* ---- finished directories ---- */

/* One finding; is_error false: a warning. */
typedef void (*ifkv_output_say_fn)(void *arg, bool is_error, const char *line);

typedef struct ifkv_output_counts {
    int64_t n_request, n_file, n_damaged, n_warning;
} ifkv_output_counts;

/* Check every file of a directory's manifest against its digest and read all of its data.  Errors:
 * NUMERIC with E0705, naming the first damaged file and dataset; NO_INPUT without a manifest. */
ifkv_status ifkv_output_verify(const char *dir, ifkv_output_say_fn say, void *arg,
                               ifkv_output_counts *counts);

#define IFKV_H5_SUMMARY_ITEMS 48

/* What is in an HDF5 file, for people.  Plain data: it is filled in a child process. */
typedef struct ifkv_h5_summary {
    char format[32], format_version[16];       /* "" if the file names none */
    int64_t n_dataset, n_attribute, n_element; /* also those not listed below */
    struct {
        char path[64], type[24];
        int n_dim;
        int64_t dim[8];
    } dataset[IFKV_H5_SUMMARY_ITEMS];
    struct {
        char name[48], value[128];
    } attribute[IFKV_H5_SUMMARY_ITEMS];
} ifkv_h5_summary;

/* Describe any HDF5 file without trusting it.  Errors: those of ifkv_h5_open, DATA. */
ifkv_status ifkv_h5_inspect(const char *path, ifkv_h5_summary *summary);

#endif
