/* One entry as a file.  See store_file.h. */
#include "store_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "digest.h"
#include "file.h"
#include "h5.h"
#include "store_key.h"
#include "tensor.h"

#define CODE IFKV_E_STORE

/* Little-endian, behind the last byte of HDF5's. */
typedef struct trailer {
    char magic[8];
    uint64_t bytes; /* in front of the trailer */
    int64_t n_row;
    uint64_t digest; /* of all that is in front of this field */
} trailer;

static const char magic[8] = "ifkvchk1"; /* not a string: no NUL */

static ifkv_status refuse(const char *path, const char *what) {
    char quoted[IFKV_QUOTE_BYTES];
    return IFKV_FAIL(IFKV_ERR_DATA, CODE, "%s: %s", ifkv_path_quote(path, quoted), what);
}

/* ---- trailer ---- */

static ifkv_status digest_body(int fd, const char *path, const trailer *t, uint64_t *value) {
    uint64_t head[4] = {0};
    memcpy(head, t, offsetof(trailer, digest));
    IFKV_TRY(ifkv_digest_range(fd, path, t->bytes, CODE, &head[3]));
    *value = ifkv_digest_bytes(head, sizeof head);
    return IFKV_OK;
}

static ifkv_status append_trailer(const char *path, int64_t n_row) {
    ifkv_file_id id;
    ifkv_status status;
    trailer t = {.n_row = n_row};
    char quoted[IFKV_QUOTE_BYTES];
    const int fd = open(path, O_RDWR | O_APPEND | O_CLOEXEC);
    if (fd < 0)
        return IFKV_FAIL(IFKV_ERR_IO, CODE, "%s: not opened again: %s",
                         ifkv_path_quote(path, quoted), strerror(errno));
    memcpy(t.magic, magic, sizeof magic);
    IFKV_TRY_GOTO(status, ifkv_file_identify(fd, path, CODE, &id), out);
    t.bytes = id.bytes;
    IFKV_TRY_GOTO(status, digest_body(fd, path, &t, &t.digest), out);
    errno = ENOSPC;
    if (write(fd, &t, sizeof t) != (ssize_t)sizeof t)
        status = IFKV_FAIL(IFKV_ERR_IO, CODE, "%s: trailer not written: %s",
                           ifkv_path_quote(path, quoted), strerror(errno));
out:
    close(fd);
    return status;
}

/* False: there is none, or it is not of this file's size. */
static bool read_trailer(int fd, const char *path, uint64_t bytes, trailer *t) {
    return bytes > sizeof *t &&
           ifkv_file_pread(fd, path, bytes - sizeof *t, t, sizeof *t, CODE) == IFKV_OK &&
           memcmp(t->magic, magic, sizeof magic) == 0 && t->bytes == bytes - sizeof *t;
}

int64_t ifkv_store_file_rows(const char *path) {
    ifkv_file_id id;
    trailer t;
    int fd;
    if (ifkv_file_open(path, CODE, &fd, &id) != IFKV_OK) return -1;
    const bool is_there = read_trailer(fd, path, id.bytes, &t);
    close(fd);
    return is_there ? t.n_row : -1;
}

/* ---- writing ---- */

static bool type_of(const char *dtype, ifkv_h5_type *type) {
    *type = strcmp(dtype, "float32") ? IFKV_H5_BF16 : IFKV_H5_F32;
    return !strcmp(dtype, "float32") || !strcmp(dtype, "bfloat16");
}

static ifkv_status write_header(ifkv_h5 *file, const ifkv_store_entry *entry) {
    IFKV_TRY(ifkv_h5_text_write(file, "format", "ifkv-chunk"));
    IFKV_TRY(ifkv_h5_text_write(file, "format_version", "1.0"));
    IFKV_TRY(ifkv_h5_text_write(file, "creator", "ifkv"));
    IFKV_TRY(ifkv_h5_text_write(file, "creator_version", IFKV_VERSION));
    IFKV_TRY(ifkv_h5_text_write(file, "key", entry->key));
    IFKV_TRY(ifkv_h5_text_write(file, "description", entry->description));
    IFKV_TRY(ifkv_h5_text_write(file, "layout", "THD"));
    IFKV_TRY(ifkv_h5_text_write(file, "dtype", entry->dtype));
    IFKV_TRY(ifkv_h5_bool_write(file, "rope_applied", false));
    IFKV_TRY(ifkv_h5_i64_write(file, "n_row", entry->n_row));
    IFKV_TRY(ifkv_h5_i64_write(file, "n_layer", entry->n_layer));
    IFKV_TRY(ifkv_h5_i64_write(file, "n_kv_head", entry->n_kv_head));
    IFKV_TRY(ifkv_h5_i64_write(file, "d_head", entry->d_head));
    IFKV_TRY(
        ifkv_h5_dataset_write(file, "/prefix", IFKV_H5_I32, 1, &entry->n_prefix, entry->prefix));
    return ifkv_h5_dataset_write(file, "/token_ids", IFKV_H5_I32, 1, &entry->n_token, entry->token);
}

static size_t layer_bytes(const ifkv_store_entry *entry) {
    return (size_t)(entry->n_row * entry->n_kv_head * entry->d_head) * entry->element_bytes;
}

static ifkv_status no_memory(const ifkv_store_entry *entry) {
    return IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                     "store: not enough memory for one layer of %lld rows",
                     (long long)entry->n_row);
}

static ifkv_status write_layers(ifkv_h5 *file, const ifkv_store_entry *entry, ifkv_h5_type type,
                                ifkv_store_layer_fn give, void *arg, bool *is_given_p) {
    const int64_t dim[3] = {entry->n_row, entry->n_kv_head, entry->d_head};
    ifkv_status status;
    char path[40], *k = malloc(2 * layer_bytes(entry)), *v = k + layer_bytes(entry);
    if (!k) return no_memory(entry);
    IFKV_TRY_GOTO(status, ifkv_h5_group_write(file, "/layers"), out);
    for (int layer = 0; layer < entry->n_layer && *is_given_p; layer++) {
        *is_given_p = give(arg, layer, k, v);
        snprintf(path, sizeof path, "/layers/%d", layer);
        IFKV_TRY_GOTO(status, ifkv_h5_group_write(file, path), out);
        snprintf(path, sizeof path, "/layers/%d/k", layer);
        IFKV_TRY_GOTO(status, ifkv_h5_dataset_write(file, path, type, 3, dim, k), out);
        snprintf(path, sizeof path, "/layers/%d/v", layer);
        IFKV_TRY_GOTO(status, ifkv_h5_dataset_write(file, path, type, 3, dim, v), out);
    }
out:
    free(k);
    return status;
}

ifkv_status ifkv_store_file_write(const char *path, const ifkv_store_entry *entry,
                                  ifkv_store_layer_fn give, void *arg, bool *is_given_p) {
    ifkv_h5 *file;
    ifkv_h5_type type;
    ifkv_status status;
    *is_given_p = true;
    IFKV_REQUIRE(type_of(entry->dtype, &type), IFKV_ERR_UNSUPPORTED, CODE,
                 "store: got elements of %s, expected float32 or bfloat16", entry->dtype);
    IFKV_TRY(ifkv_h5_create(path, &file));
    IFKV_TRY_GOTO(status, write_header(file, entry), err_close);
    IFKV_TRY_GOTO(status, write_layers(file, entry, type, give, arg, is_given_p), err_close);
    IFKV_TRY(ifkv_h5_finish(file));
    return append_trailer(path, entry->n_row);
err_close:
    ifkv_h5_close(file);
    return status;
}

/* ---- reading ---- */

ifkv_status ifkv_store_file_open(const char *path, ifkv_store_reader *reader) {
    ifkv_file_id id;
    ifkv_status status = IFKV_OK;
    trailer t;
    uint64_t digest = 0;
    *reader = (ifkv_store_reader){.path = path, .fd = -1};
    IFKV_TRY(ifkv_file_open(path, CODE, &reader->fd, &id));
    if (!read_trailer(reader->fd, path, id.bytes, &t))
        status = refuse(path, "not a whole entry: its end is missing or not its own");
    else
        status = digest_body(reader->fd, path, &t, &digest);
    if (status == IFKV_OK && digest != t.digest)
        status = refuse(path, "damaged: its digest differs from the one it was written with");
    if (status == IFKV_OK)
        reader->n_row = t.n_row;
    else
        ifkv_store_file_close(reader);
    return status;
}

void ifkv_store_file_close(ifkv_store_reader *reader) {
    if (reader->fd >= 0) close(reader->fd);
    reader->fd = -1;
}

static const char *descriptor_path(const ifkv_store_reader *reader, char path[40]) {
    snprintf(path, 40, "/proc/self/fd/%d", reader->fd);
    return path;
}

/* By its descriptor: the bytes that were checked, whatever the name means by now.  HDF5 wants the
 * file to have a name at this instant, though; one that lost it is gone, not damaged. */
static ifkv_status open_h5(const ifkv_store_reader *reader, ifkv_h5 **file_p) {
    char path[40];
    struct stat st;
    const ifkv_status status = ifkv_h5_open(descriptor_path(reader, path), file_p);
    if (status != IFKV_OK && fstat(reader->fd, &st) == 0 && st.st_nlink == 0)
        return IFKV_FAIL(IFKV_ERR_NO_INPUT, CODE, "removed while it was opened");
    return status;
}

/* Put the file's name where HDF5's layer put the descriptor. */
static ifkv_status with_name(const ifkv_store_reader *reader, ifkv_status status) {
    char path[40], text[1024], quoted[IFKV_QUOTE_BYTES];
    if (status == IFKV_OK) return status;
    const size_t n = strlen(descriptor_path(reader, path));
    const int code = ifkv_last_error()->code;
    snprintf(text, sizeof text, "%s", ifkv_last_error()->text);
    if (strncmp(text, path, n)) return status;
    return IFKV_FAIL(status, code, "%s%s", ifkv_path_quote(reader->path, quoted), text + n);
}

static ifkv_status check_text(ifkv_h5 *file, const char *path, const char *name,
                              const char *expected) {
    char *text = NULL;
    IFKV_TRY(ifkv_h5_text_read(file, "/", name, &text));
    const bool is_equal = text && !strcmp(text, expected);
    free(text);
    return is_equal ? IFKV_OK : refuse(path, "another entry's content: its description differs");
}

static ifkv_status read_ids(ifkv_h5 *file, const char *path, const char *name, int32_t **id_p,
                            int64_t *n_p) {
    ifkv_h5_dataset dataset;
    IFKV_TRY(ifkv_h5_dataset_describe(file, name, &dataset));
    if (dataset.n_dim != 1 || dataset.type != IFKV_H5_I32)
        return refuse(path, "its ids are not a list of int32");
    *n_p = dataset.dim[0];
    *id_p = malloc((size_t)*n_p * sizeof **id_p + 1);
    IFKV_REQUIRE(*id_p, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "store: not enough memory for ids");
    const ifkv_status status = ifkv_h5_rows_read(file, name, IFKV_H5_I32, 0, *n_p, *id_p);
    if (status != IFKV_OK) {
        free(*id_p);
        *id_p = NULL;
    }
    return status;
}

static ifkv_status check_ids(ifkv_h5 *file, const char *path, const char *name,
                             const int32_t *expected, int64_t n_expected) {
    int32_t *id;
    int64_t n;
    IFKV_TRY(read_ids(file, path, name, &id, &n));
    const bool is_equal =
        n == n_expected && (n == 0 || !memcmp(id, expected, (size_t)n * sizeof *id));
    free(id);
    return is_equal ? IFKV_OK : refuse(path, "another entry's content: its ids differ");
}

static ifkv_status read_matrix(ifkv_h5 *file, const ifkv_store_reader *reader,
                               const ifkv_store_entry *entry, const char *name, void *to) {
    ifkv_h5_dataset dataset;
    ifkv_h5_type type;
    type_of(entry->dtype, &type);
    IFKV_TRY(ifkv_h5_dataset_describe(file, name, &dataset));
    if (dataset.type != type || dataset.n_dim != 3 || dataset.dim[0] != entry->n_row ||
        dataset.dim[1] != entry->n_kv_head || dataset.dim[2] != entry->d_head)
        return refuse(reader->path, "K or V of another shape or type");
    return ifkv_h5_rows_read(file, name, type, 0, entry->n_row, to);
}

static ifkv_status read_layers(ifkv_h5 *file, const ifkv_store_reader *reader,
                               const ifkv_store_entry *entry, ifkv_store_layer_fn take, void *arg,
                               bool *is_taken_p) {
    ifkv_status status = IFKV_OK;
    char name[40], *k = malloc(2 * layer_bytes(entry)), *v = k + layer_bytes(entry);
    if (!k) return no_memory(entry);
    for (int layer = 0; layer < entry->n_layer && *is_taken_p; layer++) {
        snprintf(name, sizeof name, "/layers/%d/k", layer);
        IFKV_TRY_GOTO(status, read_matrix(file, reader, entry, name, k), out);
        snprintf(name, sizeof name, "/layers/%d/v", layer);
        IFKV_TRY_GOTO(status, read_matrix(file, reader, entry, name, v), out);
        *is_taken_p = take(arg, layer, k, v);
    }
out:
    free(k);
    return status;
}

ifkv_status ifkv_store_file_read(const ifkv_store_reader *reader, const ifkv_store_entry *entry,
                                 ifkv_store_layer_fn take, void *arg, bool *is_taken_p) {
    ifkv_h5 *file;
    ifkv_status status;
    *is_taken_p = true;
    IFKV_TRY(with_name(reader, open_h5(reader, &file)));
    IFKV_TRY_GOTO(status, check_text(file, reader->path, "format", "ifkv-chunk"), out);
    IFKV_TRY_GOTO(status, check_text(file, reader->path, "description", entry->description), out);
    IFKV_TRY_GOTO(status, check_ids(file, reader->path, "/prefix", entry->prefix, entry->n_prefix),
                  out);
    IFKV_TRY_GOTO(status, check_ids(file, reader->path, "/token_ids", entry->token, entry->n_token),
                  out);
    status = read_layers(file, reader, entry, take, arg, is_taken_p);
out:
    ifkv_h5_close(file);
    return with_name(reader, status);
}

/* ---- checking ---- */

static ifkv_status read_shape(ifkv_h5 *file, const char *path, ifkv_store_entry *entry) {
    const char *const names[] = {"n_row", "n_layer", "n_kv_head", "d_head"};
    int64_t value[4] = {0};
    bool is_there;
    uint64_t n = 1;
    for (int i = 0; i < 4; i++) {
        IFKV_TRY(ifkv_h5_i64_read(file, "/", names[i], &is_there, &value[i]));
        if (!is_there || value[i] < 1 || value[i] > INT32_MAX ||
            ifkv_mul_overflow(n, (uint64_t)value[i], &n) || n > (uint64_t)1 << 50)
            return refuse(path, "its shape is missing or out of range");
    }
    entry->n_row = value[0];
    entry->n_layer = (int)value[1];
    entry->n_kv_head = (int)value[2];
    entry->d_head = (int)value[3];
    return IFKV_OK;
}

static bool take_nothing(void *arg, int layer, void *k, void *v) {
    (void)arg;
    (void)layer;
    (void)k;
    (void)v;
    return true;
}

static ifkv_status check_content(ifkv_h5 *file, const ifkv_store_reader *reader, const char *key,
                                 char **text, int32_t **id) {
    ifkv_store_entry entry = {.size = sizeof entry};
    bool is_taken = true;
    IFKV_TRY(read_shape(file, reader->path, &entry));
    IFKV_TRY(ifkv_h5_text_read(file, "/", "description", &text[0]));
    IFKV_TRY(ifkv_h5_text_read(file, "/", "dtype", &text[1]));
    ifkv_h5_type type;
    if (!text[0] || !text[1] || !type_of(text[1], &type))
        return refuse(reader->path, "it does not describe itself");
    entry.description = text[0];
    entry.dtype = text[1];
    entry.element_bytes = type == IFKV_H5_F32 ? 4 : 2;
    IFKV_TRY(read_ids(file, reader->path, "/prefix", &id[0], &entry.n_prefix));
    IFKV_TRY(read_ids(file, reader->path, "/token_ids", &id[1], &entry.n_token));
    entry.prefix = id[0];
    entry.token = id[1];
    IFKV_TRY(ifkv_store_key_make(&entry));
    if (strcmp(entry.key, key) || entry.n_row != (entry.n_token ? entry.n_token : entry.n_prefix) ||
        entry.n_row != reader->n_row)
        return refuse(reader->path, "another entry's content: its key differs from its name");
    return read_layers(file, reader, &entry, take_nothing, NULL, &is_taken);
}

ifkv_status ifkv_store_file_check(const ifkv_store_reader *reader, const char *key) {
    ifkv_h5 *file;
    char *text[2] = {NULL, NULL};
    int32_t *id[2] = {NULL, NULL};
    IFKV_TRY(with_name(reader, open_h5(reader, &file)));
    const ifkv_status status = check_content(file, reader, key, text, id);
    for (int i = 0; i < 2; i++) {
        free(text[i]);
        free(id[i]);
    }
    ifkv_h5_close(file);
    return with_name(reader, status);
}
