/* HDF5 files: open, create, close, write.  See h5.h. */
#include "h5_file.h"

#include "file.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#define CHUNK_BYTES ((int64_t)1 << 20) /* of a storage chunk we write */
#define CHUNK_ROWS 256                 /* and its rows come in multiples of this */

static herr_t take_reason(unsigned n, const H5E_error2_t *error, void *arg) {
    if (n == 0 && error->desc) ifkv_quote(error->desc, strlen(error->desc), arg);
    return 0;
}

/* The line of HDF5's error stack that was pushed first: the cause. */
static const char *reason(char *buffer) {
    strcpy(buffer, "no reason given");
    H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, take_reason, buffer);
    return buffer;
}

ifkv_status ifkv_h5_fail(const ifkv_h5 *file, ifkv_status status, int code, const char *path,
                         const char *what) {
    char text[IFKV_QUOTE_BYTES], quoted[IFKV_QUOTE_BYTES];
    return IFKV_FAIL(status, code, "%s %s: %s: %s", file->name,
                     ifkv_quote(path, strlen(path), quoted), what, reason(text));
}

void ifkv_h5_process_init(void) {
    H5dont_atexit();
    H5PLset_loading_state(0);
}

bool ifkv_h5_is_signature(const void *data, size_t bytes) {
    return bytes >= 8 && memcmp(data, "\x89HDF\r\n\x1a\n", 8) == 0;
}

const char *ifkv_h5_version(char *buffer) {
    unsigned major = 0, minor = 0, release = 0;
    H5get_libversion(&major, &minor, &release);
    snprintf(buffer, 32, "%u.%u.%u", major, minor, release);
    return buffer;
}

/* ---- files ---- */

static ifkv_h5 *file_create(const char *name) {
    ifkv_h5 *file = calloc(1, sizeof *file);
    if (!file) return NULL;
    ifkv_path_quote(name, file->name);
    H5Eget_auto2(H5E_DEFAULT, &file->print, &file->print_arg);
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
    return file;
}

static void file_destroy(ifkv_h5 *file) {
    H5Eclear2(H5E_DEFAULT);
    H5Eset_auto2(H5E_DEFAULT, file->print, file->print_arg);
    free(file);
}

/* SEMI: a close with an object still open fails, where the default would leave the file open and
 * unwritten behind a success. */
static hid_t access_create(void) {
    const hid_t access = H5Pcreate(H5P_FILE_ACCESS);
    H5Pset_fclose_degree(access, H5F_CLOSE_SEMI);
    H5Pset_libver_bounds(access, H5F_LIBVER_EARLIEST, H5F_LIBVER_V110);
    H5Pset_file_locking(access, 1, 1);
    return access;
}

static ifkv_status no_memory(const char *name) {
    char quoted[IFKV_QUOTE_BYTES];
    return IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "%s: not enough memory",
                     ifkv_path_quote(name, quoted));
}

static ifkv_status open_with(const char *name, const char *path, hid_t access, ifkv_h5 **file_p) {
    char text[IFKV_QUOTE_BYTES];
    ifkv_h5 *file = file_create(name);
    if (!file) return no_memory(name);
    file->id = H5Fopen(path, H5F_ACC_RDONLY, access);
    if (file->id < 0) {
        const ifkv_status status =
            IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_H5_OPEN, "%s: not a readable HDF5 file: %s", file->name,
                      reason(text));
        file_destroy(file);
        return status;
    }
    *file_p = file;
    return IFKV_OK;
}

ifkv_status ifkv_h5_open(const char *path, ifkv_h5 **file_p) {
    char quoted[IFKV_QUOTE_BYTES];
    ifkv_file_id id;
    int fd;
    IFKV_TRY(ifkv_file_open(path, IFKV_E_H5_OPEN, &fd, &id));
    const bool is_busy = flock(fd, LOCK_SH | LOCK_NB) != 0 && errno == EWOULDBLOCK;
    close(fd);
    IFKV_REQUIRE(!is_busy, IFKV_ERR_BUSY, IFKV_E_H5_OPEN,
                 "%s: in use: another program has it open for writing",
                 ifkv_path_quote(path, quoted));
    const hid_t access = access_create();
    const ifkv_status status = open_with(path, path, access, file_p);
    H5Pclose(access);
    return status;
}

ifkv_status ifkv_h5_open_image(const char *name, const void *image, size_t bytes,
                               ifkv_h5 **file_p) {
    const hid_t access = access_create();
    H5Pset_fapl_core(access, (size_t)1 << 20, 0);
    H5Pset_file_image(access, (void *)image, bytes); /* copies; the parameter lacks a const */
    /* HDF5 looks whether the file exists and then refuses the image: this one never does. */
    const ifkv_status status = open_with(name, "/dev/null/image", access, file_p);
    H5Pclose(access);
    return status;
}

ifkv_status ifkv_h5_create(const char *path, ifkv_h5 **file_p) {
    char text[IFKV_QUOTE_BYTES];
    ifkv_status status = IFKV_OK;
    ifkv_h5 *file = file_create(path);
    if (!file) return no_memory(path);
    const hid_t access = access_create();
    errno = 0;
    file->id = H5Fcreate(path, H5F_ACC_EXCL, H5P_DEFAULT, access);
    const bool is_full = errno == ENOSPC || errno == EDQUOT || errno == EFBIG || errno == EIO;
    H5Pclose(access);
    if (file->id < 0) {
        status = IFKV_FAIL(is_full ? IFKV_ERR_IO : IFKV_ERR_CANT_CREATE,
                           is_full ? IFKV_E_OUT_WRITE : IFKV_E_OUT_CREATE,
                           "%s: cannot be created: %s", file->name, reason(text));
        file_destroy(file);
        return status;
    }
    *file_p = file;
    return IFKV_OK;
}

ifkv_status ifkv_h5_finish(ifkv_h5 *file) {
    char text[IFKV_QUOTE_BYTES];
    ifkv_status status = IFKV_OK;
    const ssize_t n_open = H5Fget_obj_count(file->id, H5F_OBJ_ALL | H5F_OBJ_LOCAL);
    if (H5Fclose(file->id) < 0)
        status = n_open == 1 ? IFKV_FAIL(IFKV_ERR_IO, IFKV_E_OUT_WRITE, "%s: close failed: %s",
                                         file->name, reason(text))
                             : IFKV_FAIL(IFKV_ERR_INTERNAL, IFKV_E_OUT_WRITE,
                                         "%s: %lld objects still open at close", file->name,
                                         (long long)n_open - 1);
    file_destroy(file);
    return status;
}

void ifkv_h5_close(ifkv_h5 *file) {
    if (!file) return;
    H5Fclose(file->id);
    file_destroy(file);
}

/* ---- writing ---- */

static hid_t bool_type_create(void) {
    const hid_t type = H5Tenum_create(H5T_STD_I8LE);
    const signed char no = 0, yes = 1;
    H5Tenum_insert(type, "FALSE", &no);
    H5Tenum_insert(type, "TRUE", &yes);
    return type;
}

/* Sign 15, exponent 8 at 7, mantissa 7 at 0: what HDF5 2.0 calls H5T_FLOAT_BFLOAT16LE, and what
 * h5py reads as float32. */
static hid_t bf16_type_create(void) {
    const hid_t type = H5Tcopy(H5T_IEEE_F32LE);
    H5Tset_fields(type, 15, 7, 8, 0, 7);
    H5Tset_precision(type, 16);
    H5Tset_size(type, 2);
    H5Tset_ebias(type, 127);
    return type;
}

/* The type in the file; equal to the one in memory on a little-endian machine, so that HDF5
 * converts nothing.  The caller closes it. */
static hid_t file_type_create(ifkv_h5_type type) {
    switch (type) {
    case IFKV_H5_F32: return H5Tcopy(H5T_IEEE_F32LE);
    case IFKV_H5_BF16: return bf16_type_create();
    case IFKV_H5_I32: return H5Tcopy(H5T_STD_I32LE);
    case IFKV_H5_I64: return H5Tcopy(H5T_STD_I64LE);
    default: return bool_type_create();
    }
}

hid_t ifkv_h5_memory_type_create(ifkv_h5_type type) {
    switch (type) {
    case IFKV_H5_F32: return H5Tcopy(H5T_NATIVE_FLOAT);
    case IFKV_H5_BF16: return bf16_type_create();
    case IFKV_H5_I32: return H5Tcopy(H5T_NATIVE_INT32);
    case IFKV_H5_I64: return H5Tcopy(H5T_NATIVE_INT64);
    default: return bool_type_create();
    }
}

int64_t ifkv_h5_block_rows(int64_t n_row, int64_t row_bytes) {
    int64_t n = (CHUNK_BYTES / row_bytes + CHUNK_ROWS / 2) / CHUNK_ROWS * CHUNK_ROWS;
    if (n < CHUNK_ROWS) n = CHUNK_ROWS;
    return n < n_row ? n : n_row;
}

static hid_t layout_create(int n_dim, const hsize_t *dim, size_t element_bytes) {
    const hid_t layout = H5Pcreate(H5P_DATASET_CREATE);
    hsize_t chunk[IFKV_H5_DIMS], n_element = 1;
    for (int i = 0; i < n_dim; i++) {
        chunk[i] = dim[i];
        n_element *= dim[i];
    }
    H5Pset_obj_track_times(layout, 0); /* equal data, equal bytes */
    if (n_element == 0) return layout; /* a chunk may not be empty */
    chunk[0] =
        (hsize_t)ifkv_h5_block_rows((int64_t)dim[0], (int64_t)(n_element / dim[0] * element_bytes));
    H5Pset_chunk(layout, n_dim, chunk);
    H5Pset_fletcher32(layout);
    return layout;
}

ifkv_status ifkv_h5_group_write(ifkv_h5 *file, const char *path) {
    const hid_t group = H5Gcreate2(file->id, path, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    if (group < 0 || H5Gclose(group) < 0)
        return ifkv_h5_fail(file, IFKV_ERR_IO, IFKV_E_OUT_WRITE, path, "group not written");
    return IFKV_OK;
}

ifkv_status ifkv_h5_dataset_write(ifkv_h5 *file, const char *path, ifkv_h5_type type, int n_dim,
                                  const int64_t *dim, const void *data) {
    hsize_t size[IFKV_H5_DIMS], n_element = 1;
    for (int i = 0; i < n_dim; i++) {
        size[i] = (hsize_t)dim[i];
        n_element *= size[i];
    }
    const hid_t stored = file_type_create(type), memory = ifkv_h5_memory_type_create(type);
    const hid_t space = H5Screate_simple(n_dim, size, NULL);
    const hid_t layout = layout_create(n_dim, size, H5Tget_size(stored));
    const hid_t set = H5Dcreate2(file->id, path, stored, space, H5P_DEFAULT, layout, H5P_DEFAULT);
    bool is_ok = set >= 0;
    if (is_ok && n_element > 0)
        is_ok = H5Dwrite(set, memory, H5S_ALL, H5S_ALL, H5P_DEFAULT, data) >= 0;
    ifkv_status status = IFKV_OK;
    if (!is_ok) status = ifkv_h5_fail(file, IFKV_ERR_IO, IFKV_E_OUT_WRITE, path, "not written");
    if (set >= 0 && H5Dclose(set) < 0 && is_ok) /* the chunk cache is written here */
        status = ifkv_h5_fail(file, IFKV_ERR_IO, IFKV_E_OUT_WRITE, path, "not written");
    H5Pclose(layout);
    H5Sclose(space);
    H5Tclose(memory);
    H5Tclose(stored);
    return status;
}

static ifkv_status attribute_write(ifkv_h5 *file, const char *name, hid_t stored, hid_t memory,
                                   const void *value) {
    const hid_t space = H5Screate(H5S_SCALAR);
    const hid_t attribute = H5Acreate2(file->id, name, stored, space, H5P_DEFAULT, H5P_DEFAULT);
    const bool is_ok = attribute >= 0 && H5Awrite(attribute, memory, value) >= 0;
    ifkv_status status = IFKV_OK;
    if (!is_ok)
        status = ifkv_h5_fail(file, IFKV_ERR_IO, IFKV_E_OUT_WRITE, name, "attribute not written");
    if (attribute >= 0) H5Aclose(attribute);
    H5Sclose(space);
    return status;
}

ifkv_status ifkv_h5_text_write(ifkv_h5 *file, const char *name, const char *text) {
    const size_t n = strlen(text);
    const hid_t type = H5Tcopy(H5T_C_S1);
    H5Tset_cset(type, H5T_CSET_UTF8);
    H5Tset_size(type, n + 1);
    const ifkv_status status = attribute_write(file, name, type, type, text);
    H5Tclose(type);
    return status;
}

ifkv_status ifkv_h5_i64_write(ifkv_h5 *file, const char *name, int64_t value) {
    return attribute_write(file, name, H5T_STD_I64LE, H5T_NATIVE_INT64, &value);
}

ifkv_status ifkv_h5_f64_write(ifkv_h5 *file, const char *name, double value) {
    return attribute_write(file, name, H5T_IEEE_F64LE, H5T_NATIVE_DOUBLE, &value);
}

ifkv_status ifkv_h5_bool_write(ifkv_h5 *file, const char *name, bool value) {
    const hid_t type = bool_type_create();
    const uint8_t byte = value;
    const ifkv_status status = attribute_write(file, name, type, type, &byte);
    H5Tclose(type);
    return status;
}
