/* HDF5 files: what is read, and what is refused.  See h5.h. */
#include "h5_file.h"

#include "tensor.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DATA IFKV_ERR_DATA
#define READ_CHUNK_BYTES ((uint64_t)256 << 20) /* largest storage chunk: HDF5 holds it whole */
#define DEFLATE_RATIO 1040                     /* deflate cannot compress better than 1032:1 */
#define VISIT_DEPTH 8
#define VISIT_OBJECTS 1000000

#define REQUIRE_AT(cond, code, path, ...)                                                          \
    do {                                                                                           \
        if (!(cond)) return refuse_at(file, (code), (path), __VA_ARGS__);                          \
    } while (0)

__attribute__((format(printf, 4, 5))) static ifkv_status
refuse_at(const ifkv_h5 *file, int code, const char *path, const char *format, ...) {
    char text[256], quoted[IFKV_QUOTE_BYTES];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return IFKV_FAIL(DATA, code, "%s %s: %s", file->name, ifkv_quote(path, strlen(path), quoted),
                     text);
}

/* ---- reading: links ---- */

static ifkv_status check_link(ifkv_h5 *file, hid_t at, const char *name, const char *path) {
    H5L_info_t info;
    REQUIRE_AT(H5Lget_info(at, name, &info, H5P_DEFAULT) >= 0, IFKV_E_H5_OBJECT, path,
               "link not readable");
    REQUIRE_AT(info.type == H5L_TYPE_HARD, IFKV_E_H5_REFUSED, path,
               "%s link: only hard links are followed",
               info.type == H5L_TYPE_SOFT       ? "soft"
               : info.type == H5L_TYPE_EXTERNAL ? "external"
                                                : "user-defined");
    return IFKV_OK;
}

ifkv_status ifkv_h5_find(ifkv_h5 *file, const char *path, bool *is_there_p) {
    char part[IFKV_H5_PATH_BYTES];
    const size_t n = strlen(path);
    REQUIRE_AT(n < sizeof part, IFKV_E_H5_OBJECT, path, "path longer than %zu bytes", sizeof part);
    *is_there_p = true;
    for (size_t i = 1; i <= n && n > 1; i++) {
        if (i < n && path[i] != '/') continue;
        memcpy(part, path, i);
        part[i] = 0;
        const htri_t exists = H5Lexists(file->id, part, H5P_DEFAULT);
        REQUIRE_AT(exists >= 0, IFKV_E_H5_OBJECT, part, "link not readable");
        if (!exists) {
            *is_there_p = false;
            return IFKV_OK;
        }
        IFKV_TRY(check_link(file, file->id, part, part));
    }
    return IFKV_OK;
}

typedef struct visit_state {
    ifkv_h5 *file;
    const char *path;
    ifkv_h5_visit_fn visit;
    void *arg;
    ifkv_status status;
} visit_state;

static herr_t visit_link(hid_t group, const char *name, const H5L_info_t *info, void *arg) {
    visit_state *state = arg;
    (void)info;
    state->status = check_link(state->file, group, name, state->path);
    if (state->status == IFKV_OK) state->status = state->visit(state->arg, true, name);
    return state->status == IFKV_OK ? 0 : 1;
}

static herr_t visit_attribute(hid_t object, const char *name, const H5A_info_t *info, void *arg) {
    visit_state *state = arg;
    (void)object;
    (void)info;
    state->status = state->visit(state->arg, false, name);
    return state->status == IFKV_OK ? 0 : 1;
}

ifkv_status ifkv_h5_group_visit(ifkv_h5 *file, const char *path, ifkv_h5_visit_fn visit,
                                void *arg) {
    visit_state state = {file, path, visit, arg, IFKV_OK};
    hsize_t link = 0, attribute = 0;
    bool is_there;
    IFKV_TRY(ifkv_h5_find(file, path, &is_there));
    REQUIRE_AT(is_there, IFKV_E_H5_OBJECT, path, "group missing");
    const hid_t group = H5Gopen2(file->id, path, H5P_DEFAULT);
    REQUIRE_AT(group >= 0, IFKV_E_H5_OBJECT, path, "not a group");
    herr_t rc = H5Literate(group, H5_INDEX_NAME, H5_ITER_INC, &link, visit_link, &state);
    if (rc == 0)
        rc = H5Aiterate2(group, H5_INDEX_NAME, H5_ITER_INC, &attribute, visit_attribute, &state);
    if (rc < 0)
        state.status = ifkv_h5_fail(file, DATA, IFKV_E_H5_OBJECT, path, "group not readable");
    H5Gclose(group);
    return state.status;
}

/* ---- reading: datasets ---- */

static const char *class_name(H5T_class_t class) {
    switch (class) {
    case H5T_INTEGER: return "int";
    case H5T_FLOAT: return "float";
    case H5T_STRING: return "string";
    case H5T_COMPOUND: return "compound";
    case H5T_ENUM: return "enum";
    case H5T_VLEN: return "variable-length list";
    case H5T_REFERENCE: return "reference";
    case H5T_OPAQUE: return "opaque";
    case H5T_ARRAY: return "array";
    default: return "unknown";
    }
}

static bool is_bf16(hid_t type) {
    size_t sign, exponent, n_exponent, mantissa, n_mantissa;
    return H5Tget_class(type) == H5T_FLOAT && H5Tget_size(type) == 2 &&
           H5Tget_order(type) == H5T_ORDER_LE &&
           H5Tget_fields(type, &sign, &exponent, &n_exponent, &mantissa, &n_mantissa) >= 0 &&
           sign == 15 && exponent == 7 && n_exponent == 8 && mantissa == 0 && n_mantissa == 7 &&
           H5Tget_ebias(type) == 127;
}

static void describe_type(hid_t type, ifkv_h5_dataset *dataset) {
    const H5T_class_t class = H5Tget_class(type);
    const size_t bytes = H5Tget_size(type);
    const bool is_number = class == H5T_INTEGER || class == H5T_FLOAT;
    const bool is_unsigned = class == H5T_INTEGER && H5Tget_sign(type) == H5T_SGN_NONE;
    const bool is_big = is_number && H5Tget_order(type) == H5T_ORDER_BE;
    dataset->type = IFKV_H5_OTHER;
    if (class == H5T_FLOAT && bytes == 4) dataset->type = IFKV_H5_F32;
    if (is_bf16(type)) dataset->type = IFKV_H5_BF16;
    if (class == H5T_INTEGER && bytes == 4 && !is_unsigned) dataset->type = IFKV_H5_I32;
    if (class == H5T_INTEGER && bytes == 8 && !is_unsigned) dataset->type = IFKV_H5_I64;
    if (class == H5T_ENUM && bytes == 1) dataset->type = IFKV_H5_BOOL;
    if (is_number)
        snprintf(dataset->type_name, sizeof dataset->type_name, "%s%s%zu%s", is_unsigned ? "u" : "",
                 class_name(class), bytes * 8, is_big ? " big-endian" : "");
    else
        snprintf(dataset->type_name, sizeof dataset->type_name, "%s",
                 dataset->type == IFKV_H5_BOOL ? "bool" : class_name(class));
}

static ifkv_status describe_shape(ifkv_h5 *file, const char *path, hid_t set, size_t element_bytes,
                                  ifkv_h5_dataset *dataset) {
    hsize_t dim[IFKV_H5_DIMS] = {0};
    const hid_t space = H5Dget_space(set);
    REQUIRE_AT(space >= 0, IFKV_E_H5_OBJECT, path, "dataspace not readable");
    const H5S_class_t class = H5Sget_simple_extent_type(space);
    const int n_dim = H5Sget_simple_extent_ndims(space);
    const bool is_simple = class == H5S_SIMPLE && n_dim >= 1 && n_dim <= IFKV_H5_DIMS;
    if (is_simple) H5Sget_simple_extent_dims(space, dim, NULL);
    H5Sclose(space);
    REQUIRE_AT(is_simple, IFKV_E_H5_OBJECT, path, "wrong rank: got %d dimensions, expected 1..%d",
               n_dim, IFKV_H5_DIMS);
    uint64_t n = 1, bytes, row_bytes = element_bytes;
    for (int i = 0; i < n_dim; i++) {
        const bool is_ok = !ifkv_mul_overflow(n, dim[i], &n) &&
                           (i == 0 || !ifkv_mul_overflow(row_bytes, dim[i], &row_bytes));
        REQUIRE_AT(is_ok && dim[i] <= INT64_MAX && row_bytes <= INT64_MAX, IFKV_E_H5_OBJECT, path,
                   "dimensions overflow");
        dataset->dim[i] = (int64_t)dim[i];
    }
    REQUIRE_AT(!ifkv_mul_overflow(n, element_bytes, &bytes) && bytes <= INT64_MAX, IFKV_E_H5_OBJECT,
               path, "dimensions overflow");
    dataset->n_dim = n_dim;
    dataset->n_element = (int64_t)n;
    dataset->row_bytes = (size_t)row_bytes;
    return IFKV_OK;
}

static ifkv_status check_filters(ifkv_h5 *file, const char *path, hid_t layout, bool *is_deflated) {
    const int n = H5Pget_nfilters(layout);
    for (int i = 0; i < n; i++) {
        unsigned flags, config;
        size_t n_value = 0;
        char name[2];
        const H5Z_filter_t filter =
            H5Pget_filter2(layout, (unsigned)i, &flags, &n_value, NULL, sizeof name, name, &config);
        REQUIRE_AT(filter == H5Z_FILTER_FLETCHER32 || filter == H5Z_FILTER_SHUFFLE ||
                       filter == H5Z_FILTER_DEFLATE,
                   IFKV_E_H5_REFUSED, path, "filter %d not allowed", (int)filter);
        if (filter == H5Z_FILTER_DEFLATE) *is_deflated = true;
    }
    return IFKV_OK;
}

/* Storage that is inside this file, complete, and of bounded cost to read. */
static ifkv_status check_storage(ifkv_h5 *file, const char *path, hid_t set, hid_t layout,
                                 size_t element_bytes, ifkv_h5_dataset *dataset) {
    const H5D_layout_t kind = H5Pget_layout(layout);
    const uint64_t stored = H5Dget_storage_size(set);
    const uint64_t bytes = (uint64_t)dataset->n_element * element_bytes;
    hsize_t chunk[IFKV_H5_DIMS] = {0};
    uint64_t chunk_bytes = element_bytes;
    bool is_deflated = false;
    REQUIRE_AT(kind != H5D_VIRTUAL, IFKV_E_H5_REFUSED, path, "virtual dataset");
    REQUIRE_AT(kind == H5D_COMPACT || kind == H5D_CONTIGUOUS || kind == H5D_CHUNKED,
               IFKV_E_H5_REFUSED, path, "unknown storage layout");
    REQUIRE_AT(H5Pget_external_count(layout) == 0, IFKV_E_H5_REFUSED, path, "external storage");
    IFKV_TRY(check_filters(file, path, layout, &is_deflated));
    REQUIRE_AT(bytes / (is_deflated ? DEFLATE_RATIO : 1) <= stored, IFKV_E_H5_OBJECT, path,
               "claims %lld elements but stores %llu bytes", (long long)dataset->n_element,
               (unsigned long long)stored);
    dataset->n_row_block =
        dataset->n_element ? ifkv_h5_block_rows(dataset->dim[0], (int64_t)dataset->row_bytes) : 1;
    if (kind != H5D_CHUNKED) return IFKV_OK;
    bool is_ok = H5Pget_chunk(layout, IFKV_H5_DIMS, chunk) == dataset->n_dim;
    for (int i = 0; i < dataset->n_dim; i++)
        is_ok = is_ok && !ifkv_mul_overflow(chunk_bytes, chunk[i], &chunk_bytes);
    REQUIRE_AT(is_ok && chunk_bytes <= READ_CHUNK_BYTES, IFKV_E_H5_REFUSED, path,
               "chunk too large: expected at most %llu bytes",
               (unsigned long long)READ_CHUNK_BYTES);
    /* Whole chunks, so that each is read and checked once. */
    const int64_t n_row = dataset->dim[0] > 0 ? dataset->dim[0] : 1;
    const int64_t n = chunk[0] < (hsize_t)n_row ? (int64_t)chunk[0] : n_row;
    dataset->n_row_block = dataset->n_row_block > n ? dataset->n_row_block / n * n : n;
    return IFKV_OK;
}

static ifkv_status describe_open(ifkv_h5 *file, const char *path, hid_t set,
                                 ifkv_h5_dataset *dataset) {
    const hid_t type = H5Dget_type(set);
    REQUIRE_AT(type >= 0, IFKV_E_H5_OBJECT, path, "element type not readable");
    const size_t element_bytes = H5Tget_size(type);
    describe_type(type, dataset);
    H5Tclose(type);
    IFKV_TRY(describe_shape(file, path, set, element_bytes, dataset));
    const hid_t layout = H5Dget_create_plist(set);
    REQUIRE_AT(layout >= 0, IFKV_E_H5_OBJECT, path, "storage layout not readable");
    const ifkv_status status = check_storage(file, path, set, layout, element_bytes, dataset);
    H5Pclose(layout);
    return status;
}

/* Follow hard links to a dataset and check it; the caller closes *set_p. */
static ifkv_status dataset_open(ifkv_h5 *file, const char *path, hid_t *set_p,
                                ifkv_h5_dataset *dataset) {
    bool is_there;
    IFKV_TRY(ifkv_h5_find(file, path, &is_there));
    REQUIRE_AT(is_there, IFKV_E_H5_OBJECT, path, "dataset missing");
    const hid_t set = H5Dopen2(file->id, path, H5P_DEFAULT);
    if (set < 0) return ifkv_h5_fail(file, DATA, IFKV_E_H5_OBJECT, path, "not a dataset");
    const ifkv_status status = describe_open(file, path, set, dataset);
    if (status != IFKV_OK)
        H5Dclose(set);
    else
        *set_p = set;
    return status;
}

ifkv_status ifkv_h5_dataset_describe(ifkv_h5 *file, const char *path, ifkv_h5_dataset *dataset) {
    hid_t set = -1;
    IFKV_TRY(dataset_open(file, path, &set, dataset));
    H5Dclose(set);
    return IFKV_OK;
}

static ifkv_status rows_read(ifkv_h5 *file, const char *path, hid_t set, hid_t memory, int64_t row,
                             int64_t n_row, const ifkv_h5_dataset *dataset, void *data) {
    hsize_t start[IFKV_H5_DIMS] = {(hsize_t)row}, count[IFKV_H5_DIMS];
    char what[80];
    for (int i = 0; i < dataset->n_dim; i++) count[i] = (hsize_t)dataset->dim[i];
    count[0] = (hsize_t)n_row;
    const hid_t stored_space = H5Dget_space(set);
    const hid_t memory_space = H5Screate_simple(dataset->n_dim, count, NULL);
    ifkv_status status = IFKV_OK;
    if (H5Sselect_hyperslab(stored_space, H5S_SELECT_SET, start, NULL, count, NULL) < 0 ||
        H5Dread(set, memory, memory_space, stored_space, H5P_DEFAULT, data) < 0) {
        snprintf(what, sizeof what, "rows %lld..%lld not readable", (long long)row,
                 (long long)(row + n_row - 1));
        status = ifkv_h5_fail(file, DATA, IFKV_E_H5_DATA, path, what);
    }
    H5Sclose(memory_space);
    H5Sclose(stored_space);
    return status;
}

ifkv_status ifkv_h5_rows_read(ifkv_h5 *file, const char *path, ifkv_h5_type type, int64_t row,
                              int64_t n_row, void *data) {
    ifkv_h5_dataset dataset;
    hid_t set = -1;
    IFKV_TRY(dataset_open(file, path, &set, &dataset));
    const bool is_integer = dataset.type == IFKV_H5_I32 || dataset.type == IFKV_H5_I64;
    ifkv_status status = IFKV_OK;
    if (dataset.type != type && !(type == IFKV_H5_I64 && is_integer))
        status = refuse_at(file, IFKV_E_H5_OBJECT, path, "wrong type: got %s", dataset.type_name);
    else if (row < 0 || n_row < 0 || row > dataset.dim[0] - n_row)
        status = refuse_at(file, IFKV_E_H5_OBJECT, path,
                           "no such rows: got %lld..%lld, expected 0..%lld", (long long)row,
                           (long long)(row + n_row - 1), (long long)dataset.dim[0] - 1);
    else if (n_row > 0 && dataset.n_element > 0) {
        const hid_t memory = ifkv_h5_memory_type_create(type);
        status = rows_read(file, path, set, memory, row, n_row, &dataset, data);
        H5Tclose(memory);
    }
    H5Dclose(set);
    return status;
}

/* ---- reading: attributes ---- */

/* Open an attribute, its scalar space checked; *attribute_p < 0 if there is none. */
static ifkv_status attribute_open(ifkv_h5 *file, const char *path, const char *name,
                                  hid_t *attribute_p) {
    bool is_there;
    *attribute_p = -1;
    IFKV_TRY(ifkv_h5_find(file, path, &is_there));
    REQUIRE_AT(is_there, IFKV_E_H5_OBJECT, path, "object missing");
    const htri_t exists = H5Aexists_by_name(file->id, path, name, H5P_DEFAULT);
    REQUIRE_AT(exists >= 0, IFKV_E_H5_OBJECT, path, "attributes not readable");
    if (!exists) return IFKV_OK;
    const hid_t attribute = H5Aopen_by_name(file->id, path, name, H5P_DEFAULT, H5P_DEFAULT);
    REQUIRE_AT(attribute >= 0, IFKV_E_H5_OBJECT, path, "attribute %s not readable", name);
    const hid_t space = H5Aget_space(attribute);
    const bool is_scalar = space >= 0 && H5Sget_simple_extent_npoints(space) == 1;
    H5Sclose(space);
    if (!is_scalar) {
        H5Aclose(attribute);
        return refuse_at(file, IFKV_E_H5_OBJECT, path, "attribute %s is not a single value", name);
    }
    *attribute_p = attribute;
    return IFKV_OK;
}

/* Text of fixed length, or of variable length as h5py writes it. */
static char *attribute_text(hid_t attribute, hid_t type) {
    char *text = NULL, *variable = NULL;
    if (H5Tis_variable_str(type) > 0) {
        const hid_t memory = H5Tcopy(H5T_C_S1);
        H5Tset_size(memory, H5T_VARIABLE);
        H5Tset_cset(memory, H5Tget_cset(type));
        if (H5Aread(attribute, memory, &variable) >= 0 && variable) {
            text = strndup(variable, IFKV_H5_TEXT_BYTES);
            H5free_memory(variable);
        }
        H5Tclose(memory);
        return text;
    }
    const size_t n = H5Tget_size(type);
    if (n > IFKV_H5_TEXT_BYTES || !(text = calloc(n + 1, 1))) return NULL;
    if (H5Aread(attribute, type, text) >= 0) return text;
    free(text);
    return NULL;
}

ifkv_status ifkv_h5_text_read(ifkv_h5 *file, const char *path, const char *name, char **text_p) {
    hid_t attribute;
    ifkv_status status = IFKV_OK;
    IFKV_TRY(attribute_open(file, path, name, &attribute));
    if (attribute < 0) {
        *text_p = NULL;
        return IFKV_OK;
    }
    const hid_t type = H5Aget_type(attribute);
    char *text = H5Tget_class(type) == H5T_STRING ? attribute_text(attribute, type) : NULL;
    if (text)
        *text_p = text;
    else
        status = refuse_at(file, IFKV_E_H5_OBJECT, path, "attribute %s: expected text", name);
    H5Tclose(type);
    H5Aclose(attribute);
    return status;
}

ifkv_status ifkv_h5_i64_read(ifkv_h5 *file, const char *path, const char *name, bool *is_there_p,
                             int64_t *value_p) {
    hid_t attribute;
    ifkv_status status = IFKV_OK;
    int64_t value = 0;
    IFKV_TRY(attribute_open(file, path, name, &attribute));
    *is_there_p = attribute >= 0;
    if (attribute < 0) return IFKV_OK;
    const hid_t type = H5Aget_type(attribute);
    if (H5Tget_class(type) == H5T_INTEGER && H5Aread(attribute, H5T_NATIVE_INT64, &value) >= 0)
        *value_p = value;
    else
        status = refuse_at(file, IFKV_E_H5_OBJECT, path, "attribute %s: expected an integer", name);
    H5Tclose(type);
    H5Aclose(attribute);
    return status;
}

ifkv_status ifkv_h5_attribute_print(ifkv_h5 *file, const char *name, char *value, size_t bytes) {
    hid_t attribute;
    double number;
    int64_t integer;
    uint8_t byte;
    IFKV_TRY(attribute_open(file, "/", name, &attribute));
    snprintf(value, bytes, "(not readable)");
    if (attribute < 0) return IFKV_OK;
    const hid_t type = H5Aget_type(attribute);
    const H5T_class_t class = H5Tget_class(type);
    if (class == H5T_STRING) {
        char *text = attribute_text(attribute, type), quoted[IFKV_QUOTE_BYTES];
        if (text) snprintf(value, bytes, "%s", ifkv_quote(text, strlen(text), quoted));
        free(text);
    } else if (class == H5T_INTEGER) {
        if (H5Aread(attribute, H5T_NATIVE_INT64, &integer) >= 0)
            snprintf(value, bytes, "%lld", (long long)integer);
    } else if (class == H5T_FLOAT) {
        if (H5Aread(attribute, H5T_NATIVE_DOUBLE, &number) >= 0)
            snprintf(value, bytes, "%.9g", number);
    } else if (class == H5T_ENUM && H5Tget_size(type) == 1) {
        if (H5Aread(attribute, type, &byte) >= 0) snprintf(value, bytes, byte ? "true" : "false");
    } else {
        snprintf(value, bytes, "(%s)", class_name(class));
    }
    H5Tclose(type);
    H5Aclose(attribute);
    return IFKV_OK;
}

/* ---- reading: everything ---- */

typedef struct walk_state {
    ifkv_h5 *file;
    ifkv_h5_dataset_fn visit;
    void *arg;
    char path[IFKV_H5_PATH_BYTES]; /* of the group being walked; grows and shrinks */
    int depth;
    int64_t n_object;
} walk_state;

static ifkv_status walk_member(void *arg, bool is_link, const char *name) {
    walk_state *walk = arg;
    ifkv_h5 *file = walk->file;
    const size_t n = strlen(walk->path);
    ifkv_h5_dataset dataset;
    H5O_info_t info;
    if (!is_link) return IFKV_OK;
    REQUIRE_AT(n + strlen(name) + 2 < sizeof walk->path, IFKV_E_H5_OBJECT, name, "path too long");
    REQUIRE_AT(++walk->n_object <= VISIT_OBJECTS && walk->depth < VISIT_DEPTH, IFKV_E_H5_REFUSED,
               name, "too many objects, or a cycle of groups");
    snprintf(walk->path + n, sizeof walk->path - n, "/%s", name);
    REQUIRE_AT(H5Oget_info_by_name2(file->id, walk->path, &info, H5O_INFO_BASIC, H5P_DEFAULT) >= 0,
               IFKV_E_H5_OBJECT, walk->path, "object not readable");
    walk->depth++;
    if (info.type == H5O_TYPE_GROUP) {
        IFKV_TRY(ifkv_h5_group_visit(file, walk->path, walk_member, walk));
    } else if (info.type == H5O_TYPE_DATASET) {
        IFKV_TRY(ifkv_h5_dataset_describe(file, walk->path, &dataset));
        IFKV_TRY(walk->visit(walk->arg, file, walk->path, &dataset));
    }
    walk->depth--;
    walk->path[n] = 0;
    return IFKV_OK;
}

ifkv_status ifkv_h5_datasets_visit(ifkv_h5 *file, ifkv_h5_dataset_fn visit, void *arg) {
    walk_state walk = {file, visit, arg, "", 0, 0};
    return ifkv_h5_group_visit(file, "/", walk_member, &walk);
}

/* Read block by block as stored, without conversion, into one buffer. */
static ifkv_status read_all(void *arg, ifkv_h5 *file, const char *path,
                            const ifkv_h5_dataset *described) {
    ifkv_h5_dataset dataset;
    hid_t set = -1;
    ifkv_status status;
    if (!*(const bool *)arg || described->n_element == 0) return IFKV_OK;
    void *block = malloc((size_t)described->n_row_block * described->row_bytes);
    if (!block)
        return IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "%s %s: not enough memory", file->name,
                         path);
    IFKV_TRY_GOTO(status, dataset_open(file, path, &set, &dataset), err_free_block);
    const hid_t type = H5Dget_type(set);
    if (H5Tdetect_class(type, H5T_VLEN) || H5Tis_variable_str(type) > 0)
        status = refuse_at(file, IFKV_E_H5_REFUSED, path, "variable-length elements");
    for (int64_t row = 0; row < dataset.dim[0] && status == IFKV_OK; row += dataset.n_row_block) {
        const int64_t left = dataset.dim[0] - row;
        status =
            rows_read(file, path, set, type, row,
                      left < dataset.n_row_block ? left : dataset.n_row_block, &dataset, block);
    }
    H5Tclose(type);
    H5Dclose(set);
err_free_block:
    free(block);
    return status;
}

ifkv_status ifkv_h5_check(ifkv_h5 *file, bool read_data) {
    return ifkv_h5_datasets_visit(file, read_all, &read_data);
}
