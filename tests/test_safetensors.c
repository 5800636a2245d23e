/* safetensors headers, shards and indices: accepted exactly if every range is provable. */
#include "model_files.h"

#include "error_codes.h"
#include "safetensors.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define SINGLE "model.safetensors"
#define INDEX "model.safetensors.index.json"
#define A "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}"

static ifkv_status open_only(const char *dir) {
    ifkv_safetensors *set = NULL;
    const ifkv_status status = ifkv_safetensors_open(dir, &set);
    ifkv_safetensors_close(set);
    return status;
}

static ifkv_status open_header(const char *dir, const char *header, uint64_t n_data) {
    write_safetensors(dir, SINGLE, header, n_data);
    return open_only(dir);
}

static void accepted(void **state, const char *header, uint64_t n_data) {
    const ifkv_status status = open_header(*state, header, n_data);
    if (status) fail_msg("%.200s: %s", header, ifkv_last_error()->text);
}

static void bad_header(void **state, const char *header, uint64_t n_data, const char *part) {
    const ifkv_status status = open_header(*state, header, n_data);
    if (status != IFKV_ERR_DATA) fail_msg("%.200s: status %d", header, (int)status);
    assert_fails(status, IFKV_ERR_DATA, IFKV_E_TENSOR_HEADER, part);
}

static void bad_range(void **state, const char *header, uint64_t n_data, const char *part) {
    const ifkv_status status = open_header(*state, header, n_data);
    if (status != IFKV_ERR_DATA) fail_msg("%.200s: status %d", header, (int)status);
    assert_fails(status, IFKV_ERR_DATA, IFKV_E_TENSOR_RANGE, part);
}

/* ---- the length field (C1-C3) */

static void files_of_up_to_eight_bytes_are_data(void **state) {
    static const size_t n[] = {0, 1, 7, 8};
    for (size_t i = 0; i < 4; i++) {
        write_file(*state, SINGLE, "\2\0\0\0\0\0\0\0", n[i]);
        assert_fails(open_only(*state), IFKV_ERR_DATA, IFKV_E_TENSOR_HEADER, "expected");
    }
}

static void ten_bytes_are_the_least(void **state) {
    assert_ok(open_header(*state, "{}", 0));
}

static void impossible_lengths_are_data(void **state) {
    const uint64_t file = 8 + strlen(A) + 8;
    const uint64_t length[] = {0,          1,          file,       file - 7,
                               1ull << 32, 1ull << 63, UINT64_MAX, UINT64_MAX - 7};
    for (size_t i = 0; i < sizeof length / sizeof length[0]; i++) {
        write_safetensors_length(*state, SINGLE, length[i], A, 8);
        assert_fails(open_only(*state), IFKV_ERR_DATA, IFKV_E_TENSOR_HEADER, "got ");
    }
}

/* An empty header padded with spaces to n bytes. */
static ifkv_status open_padded(const char *dir, size_t n) {
    char *header = malloc(n + 1);
    memset(header, ' ', n);
    memcpy(header, "{}", 2);
    header[n] = 0;
    write_safetensors(dir, SINGLE, header, 0);
    free(header);
    return open_only(dir);
}

static void headers_of_the_limit_are_accepted(void **state) {
    assert_ok(open_padded(*state, 99999999));
    assert_ok(open_padded(*state, 100000000));
}

static void one_byte_more_is_data(void **state) {
    assert_fails(open_padded(*state, 100000001), IFKV_ERR_DATA, IFKV_E_TENSOR_HEADER,
                 "at most 100000000");
}

/* ---- JSON (C4-C7) */

static void first_byte_must_be_a_brace(void **state) {
    bad_header(state, " {}", 0, "byte 8");
    bad_header(state, "[]", 0, "byte 8");
    bad_header(state, "\xef\xbb\xbf{}", 0, "byte 8");
}

static void trailing_spaces_are_legal(void **state) {
    accepted(state, A "       ", 8);
}

static void trailing_garbage_is_data(void **state) {
    bad_header(state, A " x", 8, "nothing but spaces");
    bad_header(state, A "}", 8, "nothing but spaces");
}

static void trailing_nul_is_data(void **state) {
    char header[128] = A;
    const size_t n = strlen(header);
    unsigned char file[200] = {0};
    file[0] = (unsigned char)(n + 4);
    memcpy(file + 8, header, n);
    write_file(*state, SINGLE, file, 8 + n + 4 + 8);
    assert_fails(open_only(*state), IFKV_ERR_DATA, IFKV_E_TENSOR_HEADER, "got '\\x00");
}

static void truncation_at_any_byte_is_data(void **state) {
    for (size_t i = 2; i < strlen(A); i++) {
        char header[128];
        snprintf(header, sizeof header, "%.*s", (int)i, A);
        bad_header(state, header, 8, "byte ");
    }
}

static void invalid_utf8_is_data_with_offset(void **state) {
    static const char *const name[] = {
        "\xff",     "\xc0\x80", "\xed\xa0\x80",        "\xf4\x90\x80\x80",
        "\xe2\x82", "\x80",     "\xf8\x88\x80\x80\x80"};
    for (size_t i = 0; i < sizeof name / sizeof name[0]; i++) {
        char header[128];
        snprintf(header, sizeof header, "{\"a%s\":1}", name[i]);
        bad_header(state, header, 0, "byte 11: malformed header");
        assert_non_null(strstr(ifkv_last_error()->text, "UTF-8"));
    }
}

static void depth_bomb_is_data(void **state) {
    char *header = malloc(200000);
    memset(header, '[', 100000);
    memcpy(header, "{\"a\":{\"x\":", 10);
    header[100000] = 0;
    bad_header(state, header, 0, "at most 64 levels");
    free(header);
}

static void ninety_megabytes_of_empty_objects_are_refused_at_once(void **state) {
    char *header = malloc(90000001);
    const clock_t begin = clock();
    for (size_t i = 0; i < 90000000; i += 2) memcpy(header + i, "{}", 2);
    header[90000000] = 0;
    bad_header(state, header, 0, "byte 10");
    assert_true((double)(clock() - begin) / CLOCKS_PER_SEC < 5);
    free(header);
}

static void duplicate_tensor_is_data(void **state) {
    bad_header(state,
               "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},"
               "\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1,2]}}",
               2, "tensor \"a\": name occurs twice");
}

static void escaped_duplicate_is_data(void **state) {
    bad_header(state,
               "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},"
               "\"\\u0061\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1,2]}}",
               2, "tensor \"a\": name occurs twice");
}

static void duplicate_inner_keys_are_data(void **state) {
    bad_header(state,
               "{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}",
               1, "dtype: got it twice");
    bad_header(state,
               "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"shape\":[1],\"data_offsets\":[0,1]}}", 1,
               "shape: got it twice");
    bad_header(state,
               "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"data_offsets\":[0,"
               "1]}}",
               1, "data_offsets: got it twice");
}

static void unknown_inner_keys_are_legal(void **state) {
    accepted(state,
             "{\"a\":{\"note\":[1.5e-3,null,{\"x\":true}],\"dtype\":\"U8\",\"shape\":[1],"
             "\"data_offsets\":[0,1]}}",
             1);
}

static void malformed_unknown_values_are_data(void **state) {
    static const char *const value[] = {"01", "00", "-01", "1e+", "1.e1", "-a",      "1.",
                                        ".5", "-",  "1e",  "tru", "[1,]", "{\"a\"}", "+1"};
    for (size_t i = 0; i < sizeof value / sizeof value[0]; i++) {
        char header[200];
        snprintf(header, sizeof header,
                 "{\"a\":{\"note\":%s,\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}",
                 value[i]);
        bad_header(state, header, 1, "malformed header");
    }
}

static void metadata_of_strings_is_legal(void **state) {
    accepted(state, "{\"__metadata__\":{\"format\":\"pt\",\"x\":\"\\u00e9\\n\"}}", 0);
    accepted(state, "{\"__metadata__\":{}}", 0);
}

static void other_metadata_is_data(void **state) {
    bad_header(state, "{\"__metadata__\":{\"a\":1}}", 0, "__metadata__");
    bad_header(state, "{\"__metadata__\":{\"a\":{\"b\":\"c\"}}}", 0, "__metadata__");
    bad_header(state, "{\"__metadata__\":\"a\"}", 0, "__metadata__");
    bad_header(state, "{\"__metadata__\":null}", 0, "__metadata__");
    bad_header(state, "{\"__metadata__\":{},\"__metadata__\":{}}", 0, "__metadata__: got it twice");
}

static void metadata_string_limit_is_a_mebibyte(void **state) {
    const size_t limit = 1 << 20;
    char *header = malloc(limit + 64);
    for (size_t n = limit - 1; n <= limit + 1; n++) {
        char *at = header + sprintf(header, "{\"__metadata__\":{\"a\":\"");
        memset(at, 'x', n);
        strcpy(at + n, "\"}}");
        if (n <= limit)
            accepted(state, header, 0);
        else
            bad_header(state, header, 0, "__metadata__ string too long");
    }
    free(header);
}

static void names_are_unescaped(void **state) {
    ifkv_safetensors *set;
    write_safetensors(*state, SINGLE,
                      "{\"\\u00e9\\ud83d\\ude00\\/\\\"\":{\"dtype\":\"U8\",\"shape\":[],"
                      "\"data_offsets\":[0,1]}}",
                      1);
    assert_ok(ifkv_safetensors_open(*state, &set));
    assert_string_equal(set->tensor[0].name, "\xc3\xa9\xf0\x9f\x98\x80/\"");
    ifkv_safetensors_close(set);
}

static void bad_escapes_are_data(void **state) {
    static const char *const name[] = {"\\u0000", "\\ud800", "\\ud800x", "\\ud800\\u0041",
                                       "\\udc00", "\\u12",   "\\x41",    "\n"};
    for (size_t i = 0; i < sizeof name / sizeof name[0]; i++) {
        char header[128];
        snprintf(header, sizeof header,
                 "{\"%s\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", name[i]);
        bad_header(state, header, 1, "malformed header");
    }
}

static void name_limit_is_1024_bytes(void **state) {
    char header[1200], name[1026];
    for (size_t n = 1023; n <= 1025; n++) {
        memset(name, 'n', n);
        name[n] = 0;
        snprintf(header, sizeof header,
                 "{\"%s\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", name);
        if (n <= 1024)
            accepted(state, header, 1);
        else
            bad_header(state, header, 1, "name too long: got 1025 bytes");
    }
}

/* ---- types and ranges (C8-C15) */

static void unknown_types_are_unsupported(void **state) {
    static const char *const type[] = {"BF17", "f32", "", "F32 ", "FLOAT"};
    for (size_t i = 0; i < sizeof type / sizeof type[0]; i++) {
        char header[128], part[64];
        snprintf(header, sizeof header,
                 "{\"a\":{\"dtype\":\"%s\",\"shape\":[1],\"data_offsets\":[0,1]}}", type[i]);
        snprintf(part, sizeof part, "tensor \"a\" dtype: unknown element type: got \"%s\"",
                 type[i]);
        assert_fails(open_header(*state, header, 1), IFKV_ERR_UNSUPPORTED, IFKV_E_TENSOR_DTYPE,
                     part);
    }
}

static void all_types_of_the_format_are_known(void **state) {
    static const struct {
        const char *name;
        int bytes_of_8;
    } type[] = {{"BOOL", 8},    {"U8", 8},      {"I8", 8},      {"U16", 16},    {"I16", 16},
                {"F16", 16},    {"BF16", 16},   {"U32", 32},    {"I32", 32},    {"F32", 32},
                {"U64", 64},    {"I64", 64},    {"F64", 64},    {"C64", 64},    {"F4", 4},
                {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"F8_E4M3", 8}, {"F8_E5M2", 8}, {"F8_E8M0", 8}};
    for (size_t i = 0; i < sizeof type / sizeof type[0]; i++) {
        char header[128];
        snprintf(header, sizeof header,
                 "{\"a\":{\"dtype\":\"%s\",\"shape\":[2,4],\"data_offsets\":[0,%d]}}", type[i].name,
                 type[i].bytes_of_8);
        accepted(state, header, (uint64_t)type[i].bytes_of_8);
    }
}

static void half_a_byte_is_data(void **state) {
    bad_range(state, "{\"a\":{\"dtype\":\"F4\",\"shape\":[3],\"data_offsets\":[0,1]}}", 1,
              "tensor \"a\"");
}

static void types_that_are_not_strings_are_data(void **state) {
    bad_header(state, "{\"a\":{\"dtype\":7,\"shape\":[1],\"data_offsets\":[0,1]}}", 1,
               "a string as dtype");
}

static void missing_members_are_data_by_name(void **state) {
    bad_header(state, "{\"a\":{\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "tensor \"a\": dtype");
    bad_header(state, "{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,1]}}", 1,
               "tensor \"a\": shape");
    bad_header(state, "{\"a\":{\"dtype\":\"U8\",\"shape\":[1]}}", 1, "tensor \"a\": data_offsets");
    bad_header(state, "{\"a\":{}}", 0, "tensor \"a\": dtype");
    bad_header(state, "{\"a\":[]}", 0, "malformed header");
}

static void malformed_offsets_are_data(void **state) {
    static const char *const offsets[] = {"[]",
                                          "[0]",
                                          "[0,1,2]",
                                          "[\"0\",\"1\"]",
                                          "[0.0,1.0]",
                                          "[-1,0]",
                                          "[0,1e0]",
                                          "\"0,1\"",
                                          "[0,01]",
                                          "[0,null]",
                                          "[0,18446744073709551616]"};
    for (size_t i = 0; i < sizeof offsets / sizeof offsets[0]; i++) {
        char header[160];
        snprintf(header, sizeof header,
                 "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":%s}}", offsets[i]);
        bad_header(state, header, 1, "byte ");
    }
}

static void malformed_shapes_are_data(void **state) {
    static const char *const shape[] = {"1",    "[-1]",  "[1.0]", "[\"1\"]",
                                        "[1,]", "[[1]]", "null",  "[18446744073709551616]"};
    for (size_t i = 0; i < sizeof shape / sizeof shape[0]; i++) {
        char header[160];
        snprintf(header, sizeof header,
                 "{\"a\":{\"dtype\":\"U8\",\"shape\":%s,\"data_offsets\":[0,1]}}", shape[i]);
        bad_header(state, header, 1, "byte ");
    }
}

static void offsets_outside_the_data_are_data(void **state) {
    static const char *const offsets[] = {"1,0",
                                          "0,2",
                                          "1,2",
                                          "0,18446744073709551615",
                                          "18446744073709551615,18446744073709551615",
                                          "18446744073709551615,0"};
    for (size_t i = 0; i < sizeof offsets / sizeof offsets[0]; i++) {
        char header[200];
        snprintf(header, sizeof header,
                 "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[%s]}}", offsets[i]);
        bad_range(state, header, 1, "tensor \"a\": data_offsets: outside the data");
    }
}

static void shape_products_must_not_wrap(void **state) {
    bad_range(state,
              "{\"a\":{\"dtype\":\"U8\",\"shape\":[4194305,4194305,211106198978564],"
              "\"data_offsets\":[0,4]}}",
              4, "tensor \"a\": shape: number of elements");
    bad_range(state,
              "{\"a\":{\"dtype\":\"U8\",\"shape\":[9223372036854775808,2,0],"
              "\"data_offsets\":[0,0]}}",
              0, "tensor \"a\": shape: number of elements");
}

static void byte_products_must_not_wrap(void **state) {
    bad_range(state,
              "{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904],\"data_offsets\":[0,0]}}",
              0, "tensor \"a\": shape: number of bits");
    bad_range(state,
              "{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387905],\"data_offsets\":[0,4]}}",
              4, "tensor \"a\": shape: number of bits");
}

static void empty_and_scalar_tensors_are_legal(void **state) {
    accepted(state, "{\"a\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]}}", 4);
    accepted(state, "{\"a\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}}", 0);
    accepted(state,
             "{\"a\":{\"dtype\":\"F32\",\"shape\":[0,9223372036854775808],\"data_offsets\":[0,0]}}",
             0);
}

static void rank_limit_is_eight(void **state) {
    accepted(state, "{\"a\":{\"dtype\":\"U8\",\"shape\":[1,1,1,1,1,1,1],\"data_offsets\":[0,1]}}",
             1);
    accepted(state, "{\"a\":{\"dtype\":\"U8\",\"shape\":[1,1,1,1,1,1,1,1],\"data_offsets\":[0,1]}}",
             1);
    bad_header(state,
               "{\"a\":{\"dtype\":\"U8\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,1]}}", 1,
               "at most 8");
}

static void length_must_fit_shape_and_type(void **state) {
    bad_range(state, "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,7]}}", 7,
              "got 7 bytes, expected 2 of F32");
    bad_range(state, "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,9]}}", 9,
              "got 9 bytes, expected 2 of F32");
    accepted(state, A, 8);
}

#define ROW(name, n, begin, end)                                                                   \
    "\"" name "\":{\"dtype\":\"U8\",\"shape\":[" #n "],\"data_offsets\":[" #begin "," #end "]}"

static void overlap_is_data(void **state) {
    bad_range(state, "{" ROW("a", 4, 0, 4) "," ROW("b", 4, 3, 7) "}", 7,
              "tensor \"b\": data_offsets: overlaps another tensor: got begin 3, expected 4");
    bad_range(state, "{" ROW("a", 4, 0, 4) "," ROW("b", 4, 0, 4) "}", 4, "overlaps");
}

static void hole_is_data(void **state) {
    bad_range(state, "{" ROW("a", 4, 0, 4) "," ROW("b", 4, 5, 9) "}", 9,
              "tensor \"b\": data_offsets: hole before it");
    bad_range(state, "{" ROW("a", 4, 1, 5) "}", 5, "tensor \"a\": data_offsets: hole before it");
}

static void bytes_behind_the_last_tensor_are_data(void **state) {
    bad_range(state, "{" ROW("a", 4, 0, 4) "}", 5, "do not cover the file: got 4 bytes");
    bad_range(state, "{}", 1, "do not cover the file: got 0 bytes");
}

static void data_truncated_before_load_is_data(void **state) {
    bad_range(state, "{" ROW("a", 4, 0, 4) "}", 3, "tensor \"a\": data_offsets: outside the data");
}

static void any_order_of_names_is_legal(void **state) {
    accepted(state, "{" ROW("z", 4, 0, 4) "," ROW("m", 4, 8, 12) "," ROW("a", 4, 4, 8) "}", 12);
}

static void empty_tensors_may_share_an_offset(void **state) {
    accepted(state,
             "{" ROW("a", 4, 0, 4) "," ROW("b", 0, 4, 4) "," ROW("c", 0, 4, 4) "," ROW(
                 "d", 4, 4, 8) "," ROW("e", 0, 8, 8) "," ROW("f", 0, 0, 0) "}",
             8);
}

static void empty_tensor_inside_another_is_data(void **state) {
    bad_range(state, "{" ROW("a", 4, 0, 4) "," ROW("b", 0, 2, 2) "}", 4, "tensor \"b\"");
}

static char *many_empty(int64_t n) {
    char *header = malloc((size_t)n * 64 + 2), *at = header;
    *at++ = '{';
    for (int64_t i = 0; i < n; i++)
        at += sprintf(at, "\"t%07d\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}%c",
                      (int)(n - i), i + 1 < n ? ',' : '}');
    *at = 0;
    return header;
}

static void a_million_tensors_take_linear_time(void **state) {
    char *header = many_empty(1000000);
    const clock_t begin = clock();
    accepted(state, header, 0);
    free(header);
#if !defined(__SANITIZE_ADDRESS__)
    assert_true((double)(clock() - begin) / CLOCKS_PER_SEC < 2);
#else
    (void)begin;
#endif
}

static void one_tensor_more_is_data(void **state) {
    char *header = many_empty(1000001);
    bad_header(state, header, 0, "at most 1000000");
    free(header);
}

/* Misaligned data must load: the reader copies. */
static void misaligned_data_is_read(void **state) {
    static const char header[] =
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}} ";
    const float value[2] = {1.5f, -2.0f};
    unsigned char file[200] = {0};
    const size_t n = strlen(header);
    ifkv_safetensors *set;
    float got[2];
    assert_true((8 + n) % 4 != 0);
    file[0] = (unsigned char)n;
    memcpy(file + 8, header, n);
    memcpy(file + 8 + n, value, sizeof value);
    write_file(*state, SINGLE, file, 8 + n + sizeof value);
    assert_ok(ifkv_safetensors_open(*state, &set));
    assert_ok(ifkv_safetensors_read(set, ifkv_safetensors_find(set, "a"), 0, got, sizeof got));
    assert_ok(ifkv_safetensors_finish(set));
    ifkv_safetensors_close(set);
    assert_memory_equal(got, value, sizeof got);
}

/* ---- reading (C17, C20) */

static ifkv_safetensors *opened_a(const char *dir) {
    ifkv_safetensors *set = NULL;
    write_safetensors(dir, SINGLE, A, 8);
    assert_ok(ifkv_safetensors_open(dir, &set));
    return set;
}

static void replaced_file_is_changed(void **state) {
    ifkv_safetensors *set = opened_a(*state);
    char got[8];
    write_safetensors(*state, "other", A, 8);
    assert_int_equal(rename(path_in(*state, "other"), path_in(*state, SINGLE)), 0);
    assert_fails(ifkv_safetensors_read(set, set->tensor, 0, got, 8), IFKV_ERR_DATA,
                 IFKV_E_TENSOR_CHANGED, "changed while reading");
    ifkv_safetensors_close(set);
}

static void rewritten_file_is_changed(void **state) {
    const struct timespec times[2] = {{1, 0}, {1, 0}};
    ifkv_safetensors *set = opened_a(*state);
    char got[8];
    assert_ok(ifkv_safetensors_read(set, set->tensor, 0, got, 8));
    assert_int_equal(utimensat(AT_FDCWD, path_in(*state, SINGLE), times, 0), 0);
    assert_fails(ifkv_safetensors_finish(set), IFKV_ERR_DATA, IFKV_E_TENSOR_CHANGED, SINGLE);
    ifkv_safetensors_close(set);
}

static void truncation_while_reading_is_io_with_offset(void **state) {
    ifkv_safetensors *set = opened_a(*state);
    char got[8], part[64];
    assert_ok(ifkv_safetensors_read(set, set->tensor, 0, got, 4));
    assert_int_equal(truncate(path_in(*state, SINGLE), (off_t)(8 + strlen(A) + 6)), 0);
    snprintf(part, sizeof part, "%s byte %zu: short read", SINGLE, 8 + strlen(A) + 6);
    assert_fails(ifkv_safetensors_read(set, set->tensor, 4, got, 4), IFKV_ERR_IO,
                 IFKV_E_TENSOR_FILE, part);
    ifkv_safetensors_close(set);
}

static void reading_outside_a_tensor_is_internal(void **state) {
    ifkv_safetensors *set = opened_a(*state);
    char got[16];
    assert_ok(ifkv_safetensors_read(set, set->tensor, 8, got, 0));
    assert_fails(ifkv_safetensors_read(set, set->tensor, 9, got, 0), IFKV_ERR_INTERNAL,
                 IFKV_E_TENSOR_RANGE, "read outside");
    assert_fails(ifkv_safetensors_read(set, set->tensor, 1, got, 8), IFKV_ERR_INTERNAL,
                 IFKV_E_TENSOR_RANGE, "read outside");
    ifkv_safetensors_close(set);
}

static void vanished_file_is_no_input(void **state) {
    ifkv_safetensors *set = opened_a(*state);
    char got[8];
    assert_int_equal(unlink(path_in(*state, SINGLE)), 0);
    assert_fails(ifkv_safetensors_read(set, set->tensor, 0, got, 8), IFKV_ERR_NO_INPUT,
                 IFKV_E_TENSOR_FILE, SINGLE);
    ifkv_safetensors_close(set);
}

/* ---- what is in the directory (C23, D3, D4) */

static void empty_directory_is_no_input(void **state) {
    assert_fails(open_only(*state), IFKV_ERR_NO_INPUT, IFKV_E_TENSOR_FILE, "got neither");
}

static void other_formats_are_named(void **state) {
    static const char *const name[] = {"pytorch_model.bin", "model.pt", "model-q4.gguf",
                                       "model.safetensors.part", "model.safetensors.incomplete"};
    for (size_t i = 0; i < sizeof name / sizeof name[0]; i++) {
        write_text(*state, name[i], "x");
        assert_fails(open_only(*state), IFKV_ERR_NO_INPUT, IFKV_E_TENSOR_FILE, name[i]);
        unlink(path_in(*state, name[i]));
    }
}

static void unrelated_files_are_not_named(void **state) {
    write_text(*state, "tokenizer.json", "{}");
    write_text(*state, ".bin", "x");
    assert_fails(open_only(*state), IFKV_ERR_NO_INPUT, IFKV_E_TENSOR_FILE, "got neither");
}

static void git_lfs_pointer_is_data(void **state) {
    write_text(*state, SINGLE,
               "version https://git-lfs.github.com/spec/v1\noid "
               "sha256:0000000000000000000000000000000000000000000000000000000000000000\nsize 1\n");
    assert_fails(open_only(*state), IFKV_ERR_DATA, IFKV_E_TENSOR_FILE, "git-lfs pointer");
}

static void fifo_is_refused_without_waiting(void **state) {
    assert_int_equal(mkfifo(path_in(*state, SINGLE), 0600), 0);
    assert_fails(open_only(*state), IFKV_ERR_DATA, IFKV_E_TENSOR_FILE, "got a FIFO");
}

static void directory_is_data(void **state) {
    mkdir(path_in(*state, SINGLE), 0700);
    assert_fails(open_only(*state), IFKV_ERR_DATA, IFKV_E_TENSOR_FILE, "got a directory");
}

static void device_is_data(void **state) {
    assert_int_equal(symlink("/dev/zero", path_in(*state, SINGLE)), 0);
    assert_fails(open_only(*state), IFKV_ERR_DATA, IFKV_E_TENSOR_FILE, "got a device");
}

static void proc_memory_file_is_data(void **state) {
    assert_int_equal(symlink("/proc/self/mem", path_in(*state, SINGLE)), 0);
    assert_int_equal(open_only(*state), IFKV_ERR_DATA);
}

static void links_out_of_the_directory_are_followed(void **state) {
    mkdir(path_in(*state, "blobs"), 0700);
    mkdir(path_in(*state, "snapshot"), 0700);
    write_safetensors(path_in(*state, "blobs"), "1", A, 8);
    assert_int_equal(symlink("../blobs/1", path_in(path_in(*state, "snapshot"), SINGLE)), 0);
    assert_ok(open_only(path_in(*state, "snapshot")));
}

static void dangling_link_is_no_input_by_name(void **state) {
    assert_int_equal(symlink("nowhere", path_in(*state, SINGLE)), 0);
    assert_fails(open_only(*state), IFKV_ERR_NO_INPUT, IFKV_E_TENSOR_FILE, SINGLE);
}

/* ---- index and shards (D1, D2, D5-D7) */

#define ONE "one.safetensors"
#define TWO "two.safetensors"
#define MAP "{\"weight_map\":{\"a\":\"" ONE "\",\"b\":\"" TWO "\"}}"

static void write_shards(const char *dir) {
    write_safetensors(dir, ONE, "{" ROW("a", 4, 0, 4) "}", 4);
    write_safetensors(dir, TWO, "{" ROW("b", 4, 0, 4) "}", 4);
}

static void bad_index(void **state, const char *index, const char *part) {
    write_text(*state, INDEX, index);
    assert_fails(open_only(*state), IFKV_ERR_DATA, IFKV_E_INDEX, part);
}

static void shards_make_one_set(void **state) {
    ifkv_safetensors *set;
    write_shards(*state);
    write_text(*state, INDEX, MAP);
    assert_ok(ifkv_safetensors_open(*state, &set));
    assert_int_equal(set->n_tensor, 2);
    assert_string_equal(set->shard[ifkv_safetensors_find(set, "b")->shard].name, TWO);
    assert_null(ifkv_safetensors_find(set, "c"));
    ifkv_safetensors_close(set);
    assert_string_equal(log_text, "");
}

static void missing_shard_is_no_input_by_name(void **state) {
    write_shards(*state);
    unlink(path_in(*state, TWO));
    write_text(*state, INDEX, MAP);
    assert_fails(open_only(*state), IFKV_ERR_NO_INPUT, IFKV_E_TENSOR_FILE, TWO);
}

static void tensor_of_a_shard_not_in_the_index_is_data(void **state) {
    write_shards(*state);
    write_safetensors(*state, TWO, "{" ROW("b", 4, 0, 4) "," ROW("c", 4, 4, 8) "}", 8);
    bad_index(state, MAP, "tensor \"c\": not in the index: got it in " TWO);
}

static void tensor_of_the_index_not_in_its_shard_is_data(void **state) {
    write_shards(*state);
    bad_index(state, "{\"weight_map\":{\"a\":\"" ONE "\",\"b\":\"" TWO "\",\"c\":\"" TWO "\"}}",
              "tensor \"c\": not in its shard: got nothing in " TWO);
}

static void tensor_mapped_to_another_shard_is_data(void **state) {
    write_safetensors(*state, ONE, "{" ROW("a", 4, 0, 4) "," ROW("b", 4, 4, 8) "}", 8);
    write_safetensors(*state, TWO, "{" ROW("c", 4, 0, 4) "}", 4);
    bad_index(state, "{\"weight_map\":{\"a\":\"" ONE "\",\"b\":\"" TWO "\",\"c\":\"" TWO "\"}}",
              "tensor \"b\": in another shard: got " ONE ", expected " TWO);
}

static void tensor_in_two_shards_is_data(void **state) {
    write_shards(*state);
    write_safetensors(*state, TWO, "{" ROW("a", 4, 0, 4) "," ROW("b", 4, 4, 8) "}", 8);
    bad_index(state, MAP, "tensor \"a\": name occurs twice: got it in " ONE " and in " TWO);
}

static void stray_shard_of_the_set_is_data(void **state) {
    write_safetensors(*state, "model-00001-of-00002.safetensors", "{" ROW("a", 4, 0, 4) "}", 4);
    write_safetensors(*state, "model-00002-of-00002.safetensors", "{" ROW("b", 4, 0, 4) "}", 4);
    bad_index(state, "{\"weight_map\":{\"a\":\"model-00001-of-00002.safetensors\"}}",
              "shard not in the index: got model-00002-of-00002.safetensors");
}

static void shards_of_another_number_are_no_strays(void **state) {
    write_safetensors(*state, "model-00001-of-00001.safetensors", "{" ROW("a", 4, 0, 4) "}", 4);
    write_text(*state, "model-00001-of-00002.safetensors", "x");
    write_text(*state, "model-00002-of-00001.safetensors.part", "x");
    write_text(*state, INDEX, "{\"weight_map\":{\"a\":\"model-00001-of-00001.safetensors\"}}");
    assert_ok(open_only(*state));
}

static void other_safetensors_beside_the_set_are_ignored(void **state) {
    write_shards(*state);
    write_safetensors(*state, "consolidated.safetensors", "{" ROW("a", 4, 0, 4) "}", 4);
    write_text(*state, INDEX, MAP);
    assert_ok(open_only(*state));
}

static void shards_must_be_plain_file_names(void **state) {
    static const char *const name[] = {
        "../../x.safetensors", "/etc/passwd",       "a/../../b", "C:\\\\x", "", ".", "..",
        "a\\u0000b",           "sub/x.safetensors", "a\\nb"};
    for (size_t i = 0; i < sizeof name / sizeof name[0]; i++) {
        char index[128];
        snprintf(index, sizeof index, "{\"weight_map\":{\"a\":\"%s\"}}", name[i]);
        bad_index(state, index, strstr(name[i], "u0000") ? "invalid JSON" : "plain file name");
    }
}

static void weight_map_values_must_be_strings(void **state) {
    static const char *const value[] = {"1", "null", "[]", "{}", "true"};
    for (size_t i = 0; i < sizeof value / sizeof value[0]; i++) {
        char index[128];
        snprintf(index, sizeof index, "{\"weight_map\":{\"a\":%s}}", value[i]);
        bad_index(state, index, "tensor \"a\": wrong type");
    }
}

static void weight_map_must_be_an_object_with_members(void **state) {
    bad_index(state, "{}", "/weight_map");
    bad_index(state, "{\"weight_map\":[]}", "/weight_map");
    bad_index(state, "{\"weight_map\":{}}", "/weight_map");
    bad_index(state, "[]", "/weight_map");
}

static void duplicate_in_weight_map_is_data(void **state) {
    bad_index(state, "{\"weight_map\":{\"a\":\"x\",\"a\":\"x\"}}", "duplicate");
}

static char *many_shards(int n) {
    char *index = malloc((size_t)n * 32 + 64), *at = index;
    at += sprintf(at, "{\"weight_map\":{");
    for (int i = 0; i < n; i++) at += sprintf(at, "\"t%d\":\"s%d\"%c", i, i, i + 1 < n ? ',' : '}');
    strcpy(at, "}");
    return index;
}

static void shard_limit_is_16384(void **state) {
    char *index = many_shards(16384);
    write_text(*state, INDEX, index);
    free(index);
    assert_fails(open_only(*state), IFKV_ERR_NO_INPUT, IFKV_E_TENSOR_FILE, "/s0:");
    index = many_shards(16385);
    bad_index(state, index, "too many shards: got 16385");
    free(index);
}

static void a_million_shards_are_data(void **state) {
    char *index = many_shards(1000000);
    bad_index(state, index, "too many shards: got 1000000");
    free(index);
}

static void wrong_total_size_is_a_warning(void **state) {
    write_shards(*state);
    write_text(*state, INDEX,
               "{\"metadata\":{\"total_size\":9},\"weight_map\":{\"a\":\"" ONE "\",\"b\":\"" TWO
               "\"}}");
    assert_ok(open_only(*state));
    assert_non_null(strstr(log_text, "total_size: got 9, expected 8"));
}

static void right_total_size_is_silent(void **state) {
    write_shards(*state);
    write_text(*state, INDEX,
               "{\"metadata\":{\"total_size\":8},\"weight_map\":{\"a\":\"" ONE "\",\"b\":\"" TWO
               "\"}}");
    assert_ok(open_only(*state));
    assert_string_equal(log_text, "");
}

static void index_wins_over_the_single_file(void **state) {
    ifkv_safetensors *set;
    write_shards(*state);
    write_text(*state, INDEX, MAP);
    write_safetensors(*state, SINGLE, A, 8);
    assert_ok(ifkv_safetensors_open(*state, &set));
    assert_int_equal(set->n_shard, 2);
    ifkv_safetensors_close(set);
    assert_non_null(strstr(log_text, "the index is used"));
}

static void damaged_index_is_not_bypassed(void **state) {
    write_safetensors(*state, SINGLE, A, 8);
    bad_index(state, "{", "invalid JSON");
}

static ifkv_status open_name(const char *dir, const char *name, ifkv_safetensors **set_p) {
    char header[160];
    snprintf(header, sizeof header,
             "{\"%s\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", name);
    write_safetensors(dir, SINGLE, header, 1);
    return ifkv_safetensors_open(dir, set_p);
}

static void name_becomes(void **state, const char *written, const char *want) {
    ifkv_safetensors *set = NULL;
    assert_ok(open_name(*state, written, &set));
    assert_string_equal(set->tensor[0].name, want);
    ifkv_safetensors_close(set);
}

static void bad_name(void **state, const char *written) {
    ifkv_safetensors *set = NULL;
    if (open_name(*state, written, &set) != IFKV_ERR_DATA) fail_msg("accepted \"%s\"", written);
}

static void utf8_is_accepted_up_to_every_boundary(void **state) {
    static const char *const name[] = {"\x20",
                                       "\x7f",
                                       "\xc2\x80",
                                       "\xdf\xbf",
                                       "\xe0\xa0\x80",
                                       "\xe1\x80\x80",
                                       "\xed\x9f\xbf",
                                       "\xee\x80\x80",
                                       "\xef\xbf\xbf",
                                       "\xec\xbf\x80",
                                       "\xf0\x90\x80\x80",
                                       "\xf1\x80\x80\x80",
                                       "\xf3\xbf\xbf\xbf",
                                       "\xf4\x8f\xbf\xbf"};
    for (size_t i = 0; i < sizeof name / sizeof name[0]; i++) name_becomes(state, name[i], name[i]);
}

static void utf8_is_refused_beyond_every_boundary(void **state) {
    static const char *const name[] = {"\x1f",
                                       "\x80",
                                       "\xbf",
                                       "\xc1\xbf",
                                       "\xc2\x7f",
                                       "\xc2\xc0",
                                       "\xe0\x9f\xbf",
                                       "\xed\xa0\x80",
                                       "\xe1\x7f\x80",
                                       "\xe1\x80\x7f",
                                       "\xe1\x80\xc0",
                                       "\xf0\x8f\xbf\xbf",
                                       "\xf4\x90\x80\x80",
                                       "\xf1\x80\x80\x7f",
                                       "\xf1\x80\x80\xc0",
                                       "\xf5\x80\x80\x80",
                                       "\xff"};
    for (size_t i = 0; i < sizeof name / sizeof name[0]; i++) bad_name(state, name[i]);
}

static void escapes_give_their_character(void **state) {
    static const char *const pair[][2] = {{"\\u007f", "\x7f"},
                                          {"\\u0080", "\xc2\x80"},
                                          {"\\u07ff", "\xdf\xbf"},
                                          {"\\u07FF", "\xdf\xbf"},
                                          {"\\u0800", "\xe0\xa0\x80"},
                                          {"\\uABcd", "\xea\xaf\x8d"},
                                          {"\\uabCD", "\xea\xaf\x8d"},
                                          {"\\ud7ff", "\xed\x9f\xbf"},
                                          {"\\ue000", "\xee\x80\x80"},
                                          {"\\uffff", "\xef\xbf\xbf"},
                                          {"\\ud800\\udc00", "\xf0\x90\x80\x80"},
                                          {"\\udbff\\udfff", "\xf4\x8f\xbf\xbf"},
                                          {"\\u0019\\u0090", "\x19\xc2\x90"},
                                          {"\\b\\f\\n\\r\\t\\/\\\\\\\"", "\b\f\n\r\t/\\\""}};
    for (size_t i = 0; i < sizeof pair / sizeof pair[0]; i++)
        name_becomes(state, pair[i][0], pair[i][1]);
}

static void escapes_beyond_their_form_are_data(void **state) {
    static const char *const name[] = {"\\u00g0",        "\\u00G0",
                                       "\\u00@0",        "\\u00`0",
                                       "\\u00/0",        "\\u00:0",
                                       "\\udc00",        "\\udfff",
                                       "\\ud800\\ud7ff", "\\ud800\\udbff",
                                       "\\ud800\\ue000", "\\ud800\\ndc00",
                                       "\\ud800xudc00",  "\\a"};
    for (size_t i = 0; i < sizeof name / sizeof name[0]; i++) bad_name(state, name[i]);
}

static void every_json_space_is_legal_between_tokens(void **state) {
    accepted(state,
             "{\t\"a\"\n:\r{ \"dtype\" : \"U8\"\t,\n\"shape\"\r: [ 1\t,\n1\r] , "
             "\"data_offsets\":[ 0 , 1 ]\t}\n}\r\n\t ",
             1);
}

static void other_spaces_are_data(void **state) {
    bad_header(state, "{\v}", 0, "byte 9");
    bad_header(state, "{}\f", 0, "byte 10");
}

static void unknown_numbers_of_every_form_are_legal(void **state) {
    static const char *const value[] = {"0",    "-0",    "10",  "0.5",   "-12.250",
                                        "1E+9", "1e-09", "9e9", "1.9E0", "99999999999999999999",
                                        "\"\"", "{}",    "[]"};
    for (size_t i = 0; i < sizeof value / sizeof value[0]; i++) {
        char header[200];
        snprintf(header, sizeof header,
                 "{\"a\":{\"note\":%s,\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}",
                 value[i]);
        accepted(state, header, 1);
    }
}

/* A member of a tensor's entry is at level 3, so that 62 arrays end at level 64. */
static void depth_limit_is_64(void **state) {
    for (int depth = 61; depth <= 63; depth++) {
        char header[300], *at = header + sprintf(header, "{\"a\":{\"x\":");
        memset(at, '[', (size_t)depth);
        memset(at + depth, ']', (size_t)depth);
        strcpy(at + 2 * depth, ",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}");
        if (depth <= 62)
            accepted(state, header, 1);
        else
            bad_header(state, header, 1, "at most 64 levels");
    }
}

static void tensors_are_listed_in_file_order_and_found_by_name(void **state) {
    ifkv_safetensors *set;
    write_safetensors(*state, SINGLE,
                      "{" ROW("z", 4, 0, 4) "," ROW("a", 4, 8, 12) "," ROW("m", 4, 4, 8) "}", 12);
    assert_ok(ifkv_safetensors_open(*state, &set));
    assert_string_equal(set->tensor[0].name, "z");
    assert_string_equal(set->tensor[1].name, "m");
    assert_string_equal(set->tensor[2].name, "a");
    assert_ptr_equal(ifkv_safetensors_find(set, "a"), &set->tensor[2]);
    assert_ptr_equal(set->by_name[0], &set->tensor[2]);
    ifkv_safetensors_close(set);
}

/* ---- generated (C-section as a whole) */

static uint64_t draw(uint64_t *seed) {
    uint64_t z = *seed += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* Tensors of random shapes in random order, valid by construction unless `fault` moves one number
 * of tensor `victim`: 0 none, 1 begin + 1, 2 end + 1, 3 end - 1, 4 a dimension + 1. */
static uint64_t make_header(uint64_t seed, int fault, char *header) {
    static const struct {
        const char *name;
        uint64_t bytes;
    } type[] = {{"F32", 4}, {"BF16", 2}, {"U8", 1}, {"I64", 8}};
    enum { N_MAX = 12 };
    uint64_t begin[N_MAX], end[N_MAX], dim[N_MAX][3], at = 0;
    int kind[N_MAX], order[N_MAX];
    const int n = 1 + (int)(draw(&seed) % N_MAX), victim = (int)(draw(&seed) % (uint64_t)n);
    for (int i = 0; i < n; i++) {
        kind[i] = (int)(draw(&seed) % 4);
        for (int k = 0; k < 3; k++) dim[i][k] = 1 + draw(&seed) % 5;
        begin[i] = at;
        at = end[i] = at + dim[i][0] * dim[i][1] * dim[i][2] * type[kind[i]].bytes;
        order[i] = i;
    }
    for (int i = n - 1; i > 0; i--) {
        const int k = (int)(draw(&seed) % (uint64_t)(i + 1)), t = order[i];
        order[i] = order[k];
        order[k] = t;
    }
    begin[victim] += fault == 1;
    end[victim] += fault == 2;
    end[victim] -= fault == 3;
    dim[victim][draw(&seed) % 3] += fault == 4;
    char *to = header + sprintf(header, "{");
    for (int i = 0; i < n; i++) {
        const int k = order[i];
        to += sprintf(to,
                      "%s\"t%d\":{\"dtype\":\"%s\",\"shape\":[%d,%d,%d],\"data_offsets\":[%d,%d]}",
                      i ? "," : "", k, type[kind[k]].name, (int)dim[k][0], (int)dim[k][1],
                      (int)dim[k][2], (int)begin[k], (int)end[k]);
    }
    strcpy(to, "}");
    return at;
}

static void generated_headers_are_accepted_if_and_only_if_sound(void **state) {
    char header[4096];
    for (uint64_t seed = 0; seed < 400; seed++) {
        const int fault = (int)(seed % 5);
        const uint64_t n_data = make_header(seed, fault, header);
        const ifkv_status status = open_header(*state, header, n_data);
        if (status != (fault ? IFKV_ERR_DATA : IFKV_OK))
            fail_msg("seed %d, fault %d: status %d for %s", (int)seed, fault, (int)status, header);
    }
}

/* Any byte of a sound header changed to any of a few others: never a crash, and never an accepted
 * range outside the file. */
static void mutated_headers_never_give_a_range_outside_the_file(void **state) {
    static const char junk[] = "\"{}[],:0919\\ \xff";
    char header[4096], mutant[4096];
    uint64_t seed = 7;
    for (int i = 0; i < 2000; i++) {
        ifkv_safetensors *set = NULL;
        const uint64_t n_data = make_header((uint64_t)i / 50, 0, header);
        strcpy(mutant, header);
        for (int k = 0; k < 1 + i % 3; k++)
            mutant[draw(&seed) % strlen(header)] = junk[draw(&seed) % (sizeof junk - 1)];
        write_safetensors(*state, SINGLE, mutant, n_data);
        if (ifkv_safetensors_open(*state, &set) != IFKV_OK) continue;
        for (int64_t t = 0; t < set->n_tensor; t++)
            assert_true(set->tensor[t].begin >= 8 + strlen(mutant) &&
                        set->tensor[t].bytes <= 8 + strlen(mutant) + n_data - set->tensor[t].begin);
        ifkv_safetensors_close(set);
    }
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, dir_setup, dir_teardown)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(files_of_up_to_eight_bytes_are_data),
        TEST(ten_bytes_are_the_least),
        TEST(impossible_lengths_are_data),
        TEST(headers_of_the_limit_are_accepted),
        TEST(one_byte_more_is_data),
        TEST(first_byte_must_be_a_brace),
        TEST(trailing_spaces_are_legal),
        TEST(trailing_garbage_is_data),
        TEST(trailing_nul_is_data),
        TEST(truncation_at_any_byte_is_data),
        TEST(invalid_utf8_is_data_with_offset),
        TEST(depth_bomb_is_data),
        TEST(ninety_megabytes_of_empty_objects_are_refused_at_once),
        TEST(duplicate_tensor_is_data),
        TEST(escaped_duplicate_is_data),
        TEST(duplicate_inner_keys_are_data),
        TEST(unknown_inner_keys_are_legal),
        TEST(malformed_unknown_values_are_data),
        TEST(metadata_of_strings_is_legal),
        TEST(other_metadata_is_data),
        TEST(metadata_string_limit_is_a_mebibyte),
        TEST(names_are_unescaped),
        TEST(bad_escapes_are_data),
        TEST(name_limit_is_1024_bytes),
        TEST(unknown_types_are_unsupported),
        TEST(all_types_of_the_format_are_known),
        TEST(half_a_byte_is_data),
        TEST(types_that_are_not_strings_are_data),
        TEST(missing_members_are_data_by_name),
        TEST(malformed_offsets_are_data),
        TEST(malformed_shapes_are_data),
        TEST(offsets_outside_the_data_are_data),
        TEST(shape_products_must_not_wrap),
        TEST(byte_products_must_not_wrap),
        TEST(empty_and_scalar_tensors_are_legal),
        TEST(rank_limit_is_eight),
        TEST(length_must_fit_shape_and_type),
        TEST(overlap_is_data),
        TEST(hole_is_data),
        TEST(bytes_behind_the_last_tensor_are_data),
        TEST(data_truncated_before_load_is_data),
        TEST(any_order_of_names_is_legal),
        TEST(empty_tensors_may_share_an_offset),
        TEST(empty_tensor_inside_another_is_data),
        TEST(a_million_tensors_take_linear_time),
        TEST(one_tensor_more_is_data),
        TEST(misaligned_data_is_read),
        TEST(replaced_file_is_changed),
        TEST(rewritten_file_is_changed),
        TEST(truncation_while_reading_is_io_with_offset),
        TEST(reading_outside_a_tensor_is_internal),
        TEST(vanished_file_is_no_input),
        TEST(empty_directory_is_no_input),
        TEST(other_formats_are_named),
        TEST(unrelated_files_are_not_named),
        TEST(git_lfs_pointer_is_data),
        TEST(fifo_is_refused_without_waiting),
        TEST(directory_is_data),
        TEST(device_is_data),
        TEST(proc_memory_file_is_data),
        TEST(links_out_of_the_directory_are_followed),
        TEST(dangling_link_is_no_input_by_name),
        TEST(shards_make_one_set),
        TEST(missing_shard_is_no_input_by_name),
        TEST(tensor_of_a_shard_not_in_the_index_is_data),
        TEST(tensor_of_the_index_not_in_its_shard_is_data),
        TEST(tensor_mapped_to_another_shard_is_data),
        TEST(tensor_in_two_shards_is_data),
        TEST(stray_shard_of_the_set_is_data),
        TEST(shards_of_another_number_are_no_strays),
        TEST(other_safetensors_beside_the_set_are_ignored),
        TEST(shards_must_be_plain_file_names),
        TEST(weight_map_values_must_be_strings),
        TEST(weight_map_must_be_an_object_with_members),
        TEST(duplicate_in_weight_map_is_data),
        TEST(shard_limit_is_16384),
        TEST(a_million_shards_are_data),
        TEST(wrong_total_size_is_a_warning),
        TEST(right_total_size_is_silent),
        TEST(index_wins_over_the_single_file),
        TEST(damaged_index_is_not_bypassed),
        TEST(utf8_is_accepted_up_to_every_boundary),
        TEST(utf8_is_refused_beyond_every_boundary),
        TEST(escapes_give_their_character),
        TEST(escapes_beyond_their_form_are_data),
        TEST(every_json_space_is_legal_between_tokens),
        TEST(other_spaces_are_data),
        TEST(unknown_numbers_of_every_form_are_legal),
        TEST(depth_limit_is_64),
        TEST(tensors_are_listed_in_file_order_and_found_by_name),
        TEST(generated_headers_are_accepted_if_and_only_if_sound),
        TEST(mutated_headers_never_give_a_range_outside_the_file),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
