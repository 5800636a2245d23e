/* The header of one safetensors file: strict JSON of one fixed form, read without building a tree.
 *
 * A tree costs about 1 KB a tensor; the limit of 10^6 tensors then takes a gigabyte and seconds.
 * Reading straight through takes the header and 120 bytes a tensor.  Names are unescaped where they
 * stand: the plain form is never longer.  See safetensors.h for what is accepted. */
#include "safetensors.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DEPTH_MAX 64
#define METADATA_STRING_MAX ((size_t)1 << 20)

/* Order and sizes as in the reference implementation; an F4 takes half a byte. */
static const struct {
    const char *name;
    int bits;
    int dtype; /* ifkv_dtype, -1: not computed with */
} TYPE[] = {{"BF16", 16, IFKV_DTYPE_BF16},
            {"F16", 16, IFKV_DTYPE_F16},
            {"F32", 32, IFKV_DTYPE_F32},
            {"F64", 64, -1},
            {"BOOL", 8, -1},
            {"U8", 8, -1},
            {"I8", 8, -1},
            {"U16", 16, -1},
            {"I16", 16, -1},
            {"U32", 32, -1},
            {"I32", 32, -1},
            {"U64", 64, -1},
            {"I64", 64, -1},
            {"C64", 64, -1},
            {"F4", 4, -1},
            {"F6_E2M3", 6, -1},
            {"F6_E3M2", 6, -1},
            {"F8_E4M3", 8, -1},
            {"F8_E5M2", 8, -1},
            {"F8_E8M0", 8, -1},
            {"F8_E4M3FNUZ", 8, -1},
            {"F8_E5M2FNUZ", 8, -1}};
#define N_TYPE ((int)(sizeof TYPE / sizeof TYPE[0]))

const char *ifkv_tensor_type_name(int type) {
    return TYPE[type].name;
}

bool ifkv_tensor_dtype(const ifkv_tensor *tensor, ifkv_dtype *dtype) {
    if (TYPE[tensor->type].dtype < 0) return false;
    *dtype = (ifkv_dtype)TYPE[tensor->type].dtype;
    return true;
}

typedef struct cursor {
    const char *where; /* borrowed: the file, quoted */
    char *text;        /* borrowed, NUL behind it */
    size_t bytes, at;
    uint64_t data_bytes;
} cursor;

/* Report what stands at the cursor. */
static ifkv_status malformed(const cursor *c, const char *expected) {
    char got[IFKV_QUOTE_BYTES];
    const size_t left = c->bytes - c->at;
    if (left == 0)
        return IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_TENSOR_HEADER,
                         "%s byte %zu: malformed header: got its end, expected %s", c->where,
                         8 + c->at, expected);
    return IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_TENSOR_HEADER,
                     "%s byte %zu: malformed header: got '%s', expected %s", c->where, 8 + c->at,
                     ifkv_quote(c->text + c->at, left < 24 ? left : 24, got), expected);
}

static void skip_space(cursor *c) {
    while (c->at < c->bytes && (c->text[c->at] == ' ' || c->text[c->at] == '\t' ||
                                c->text[c->at] == '\n' || c->text[c->at] == '\r'))
        c->at++;
}

/* The NUL behind the text stops every comparison. */
static bool accept(cursor *c, char wanted) {
    skip_space(c);
    if (c->at >= c->bytes || c->text[c->at] != wanted) return false;
    c->at++;
    return true;
}

static ifkv_status expect(cursor *c, char wanted, const char *expected) {
    return accept(c, wanted) ? IFKV_OK : malformed(c, expected);
}

/* Bytes of the well-formed UTF-8 sequence at p, 0 if there is none (RFC 3629: shortest form, no
 * surrogate, at most U+10FFFF). */
static size_t utf8_bytes(const unsigned char *p, size_t left) {
    const unsigned char c = p[0];
    unsigned char low = 0x80, high = 0xbf;
    size_t n;
    if (c < 0x80) return 1;
    if (c < 0xc2 || c > 0xf4) return 0;
    n = c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
    if (left < n) return 0;
    if (c == 0xe0) low = 0xa0;
    if (c == 0xed) high = 0x9f;
    if (c == 0xf0) low = 0x90;
    if (c == 0xf4) high = 0x8f;
    if (p[1] < low || p[1] > high) return 0;
    for (size_t i = 2; i < n; i++)
        if (p[i] < 0x80 || p[i] > 0xbf) return 0;
    return n;
}

static ifkv_status parse_hex4(cursor *c, uint32_t *value) {
    uint32_t got = 0;
    for (int i = 0; i < 4; i++, c->at++) {
        const char h = c->at < c->bytes ? c->text[c->at] : 0;
        int digit;
        if (h >= '0' && h <= '9')
            digit = h - '0';
        else if (h >= 'a' && h <= 'f')
            digit = h - 'a' + 10;
        else if (h >= 'A' && h <= 'F')
            digit = h - 'A' + 10;
        else
            return malformed(c, "four hexadecimal digits");
        got = got << 4 | (uint32_t)digit;
    }
    *value = got;
    return IFKV_OK;
}

static size_t utf8_write(uint32_t u, char *to) {
    if (u < 0x80) {
        to[0] = (char)u;
        return 1;
    }
    const int n = u < 0x800 ? 2 : u < 0x10000 ? 3 : 4;
    static const unsigned char lead[5] = {0, 0, 0xc0, 0xe0, 0xf0};
    for (int i = n - 1; i > 0; i--, u >>= 6) to[i] = (char)(0x80 | (u & 0x3f));
    to[0] = (char)(lead[n] | u);
    return (size_t)n;
}

/* \uXXXX, behind the u: a pair of surrogates is one character, NUL and half a pair are refused. */
static ifkv_status parse_unicode(cursor *c, char *to, size_t *n) {
    uint32_t u = 0, low = 0;
    IFKV_TRY(parse_hex4(c, &u));
    if (u >= 0xd800 && u < 0xdc00) {
        if (c->text[c->at] != '\\' || c->text[c->at + 1] != 'u')
            return malformed(c, "the second half of a surrogate pair");
        c->at += 2;
        IFKV_TRY(parse_hex4(c, &low));
        if (low < 0xdc00 || low > 0xdfff)
            return malformed(c, "the second half of a surrogate pair");
        u = 0x10000 + ((u - 0xd800) << 10) + (low - 0xdc00);
    } else if (u == 0 || (u >= 0xdc00 && u < 0xe000)) {
        return malformed(c, "no NUL and no half of a surrogate pair");
    }
    *n = utf8_write(u, to);
    return IFKV_OK;
}

static ifkv_status parse_escape(cursor *c, char *to, size_t *n) {
    static const char from[] = "\"\\/bfnrt", plain[] = "\"\\/\b\f\n\r\t";
    const char e = c->at < c->bytes ? c->text[c->at] : 0;
    if (e == 'u') {
        c->at++;
        return parse_unicode(c, to, n);
    }
    const char *found = e ? strchr(from, e) : NULL;
    if (!found) return malformed(c, "an escape sequence");
    to[0] = plain[found - from];
    *n = 1;
    c->at++;
    return IFKV_OK;
}

/* Read a string, unescape it in place and end it with NUL, which fits where the closing quote was.
 */
static ifkv_status parse_string(cursor *c, const char *expected, const char **string,
                                size_t *bytes) {
    IFKV_TRY(expect(c, '"', expected));
    char *const begin = c->text + c->at;
    char *to = begin;
    for (;;) {
        size_t n = 0;
        if (c->at >= c->bytes) return malformed(c, "the end of a string");
        const unsigned char first = (unsigned char)c->text[c->at];
        if (first == '"') break;
        if (first < 0x20) return malformed(c, "no control character in a string");
        if (first == '\\') {
            c->at++;
            IFKV_TRY(parse_escape(c, to, &n));
        } else {
            n = utf8_bytes((const unsigned char *)c->text + c->at, c->bytes - c->at);
            if (n == 0) return malformed(c, "valid UTF-8");
            memmove(to, c->text + c->at, n);
            c->at += n;
        }
        to += n;
    }
    c->at++;
    *to = 0;
    *string = begin;
    *bytes = (size_t)(to - begin);
    return IFKV_OK;
}

/* A non-negative integer in plain digits: 01, 1.0, 1e3 and -1 are not. */
static ifkv_status parse_count(cursor *c, uint64_t *value) {
    static const char expected[] = "a non-negative integer below 2^64";
    uint64_t got = 0;
    skip_space(c);
    const size_t begin = c->at;
    for (; c->text[c->at] >= '0' && c->text[c->at] <= '9'; c->at++) {
        const uint64_t digit = (uint64_t)(c->text[c->at] - '0');
        if (ifkv_mul_overflow(got, 10, &got) || ifkv_add_overflow(got, digit, &got)) {
            c->at = begin;
            return malformed(c, expected);
        }
    }
    const bool is_number = c->at > begin && (c->at == begin + 1 || c->text[begin] != '0');
    if (!is_number || strchr(".eE", c->text[c->at] ? c->text[c->at] : '.')) {
        c->at = begin;
        return malformed(c, expected);
    }
    *value = got;
    return IFKV_OK;
}

/* Read [n, n, ...] of at most `most` counts; *n_p tells how many. */
static ifkv_status parse_counts(cursor *c, const char *expected, int most, uint64_t *value,
                                int *n_p) {
    int n = 0;
    IFKV_TRY(expect(c, '[', expected));
    if (!accept(c, ']')) {
        do {
            if (n == most) return malformed(c, expected);
            IFKV_TRY(parse_count(c, &value[n++]));
        } while (accept(c, ','));
        IFKV_TRY(expect(c, ']', expected));
    }
    *n_p = n;
    return IFKV_OK;
}

static ifkv_status skip_number(cursor *c) {
    const size_t begin = c->at;
    if (c->text[c->at] == '-') c->at++;
    const size_t digit = c->at;
    while (c->text[c->at] >= '0' && c->text[c->at] <= '9') c->at++;
    bool is_number = c->at > digit && (c->at == digit + 1 || c->text[digit] != '0');
    if (c->text[c->at] == '.') {
        const size_t fraction = ++c->at;
        while (c->text[c->at] >= '0' && c->text[c->at] <= '9') c->at++;
        is_number = is_number && c->at > fraction;
    }
    if (c->text[c->at] == 'e' || c->text[c->at] == 'E') {
        c->at++;
        if (c->text[c->at] == '-' || c->text[c->at] == '+') c->at++;
        const size_t exponent = c->at;
        while (c->text[c->at] >= '0' && c->text[c->at] <= '9') c->at++;
        is_number = is_number && c->at > exponent;
    }
    if (is_number) return IFKV_OK;
    c->at = begin;
    return malformed(c, "a JSON value");
}

static bool accept_word(cursor *c, const char *word) {
    const size_t n = strlen(word);
    if (c->bytes - c->at < n || memcmp(c->text + c->at, word, n) != 0) return false;
    c->at += n;
    return true;
}

/* Members of a tensor's entry that the format does not know are legal and mean nothing. */
static ifkv_status skip_value(cursor *c, int depth) {
    const char *string;
    size_t n;
    skip_space(c);
    if (depth > DEPTH_MAX) return malformed(c, "at most 64 levels");
    if (c->text[c->at] == '"') return parse_string(c, "a string", &string, &n);
    if (accept_word(c, "true") || accept_word(c, "false") || accept_word(c, "null")) return IFKV_OK;
    const bool is_object = c->text[c->at] == '{';
    if (!is_object && c->text[c->at] != '[') return skip_number(c);
    const char close = is_object ? '}' : ']';
    c->at++;
    if (accept(c, close)) return IFKV_OK;
    do {
        if (is_object) {
            IFKV_TRY(parse_string(c, "a member name", &string, &n));
            IFKV_TRY(expect(c, ':', "':'"));
        }
        IFKV_TRY(skip_value(c, depth + 1));
    } while (accept(c, ','));
    return expect(c, close, is_object ? "',' or '}'" : "',' or ']'");
}

/* __metadata__: an object of strings, each at most 1 MiB; its content means nothing here. */
static ifkv_status skip_metadata(cursor *c) {
    const char *string;
    size_t n;
    IFKV_TRY(expect(c, '{', "an object of strings as __metadata__"));
    if (accept(c, '}')) return IFKV_OK;
    do {
        IFKV_TRY(parse_string(c, "a member name in __metadata__", &string, &n));
        IFKV_TRY(expect(c, ':', "':'"));
        IFKV_TRY(parse_string(c, "a string as member of __metadata__", &string, &n));
        IFKV_REQUIRE(n <= METADATA_STRING_MAX, IFKV_ERR_DATA, IFKV_E_TENSOR_HEADER,
                     "%s byte %zu: __metadata__ string too long: got %zu bytes, expected at most "
                     "%zu",
                     c->where, 8 + c->at, n, METADATA_STRING_MAX);
    } while (accept(c, ','));
    return expect(c, '}', "',' or '}' in __metadata__");
}

static ifkv_status tensor_fail(const cursor *c, ifkv_status status, int code, const char *name,
                               const char *what) {
    char quoted[IFKV_QUOTE_BYTES];
    return IFKV_FAIL(status, code, "%s tensor \"%s\": %s", c->where,
                     ifkv_quote(name, strlen(name), quoted), what);
}

static ifkv_status parse_type(cursor *c, const char *name, int *type) {
    char quoted[IFKV_QUOTE_BYTES], shown[IFKV_QUOTE_BYTES];
    const char *string;
    size_t n;
    IFKV_TRY(parse_string(c, "a string as dtype", &string, &n));
    for (int i = 0; i < N_TYPE; i++) {
        if (strlen(TYPE[i].name) != n || memcmp(TYPE[i].name, string, n) != 0) continue;
        *type = i;
        return IFKV_OK;
    }
    return IFKV_FAIL(IFKV_ERR_UNSUPPORTED, IFKV_E_TENSOR_DTYPE,
                     "%s tensor \"%s\" dtype: unknown element type: got \"%s\", expected BF16, F16 "
                     "or F32",
                     c->where, ifkv_quote(name, strlen(name), quoted),
                     ifkv_quote(string, n, shown));
}

enum { HAS_DTYPE = 1, HAS_SHAPE = 2, HAS_OFFSETS = 4 };

/* One member of a tensor's entry.  offsets [2] are relative to the data region. */
static ifkv_status parse_member(cursor *c, ifkv_tensor *tensor, uint64_t *offsets, int *seen) {
    const char *key;
    size_t n;
    int bit, n_offset = 0;
    IFKV_TRY(parse_string(c, "a member name", &key, &n));
    IFKV_TRY(expect(c, ':', "':'"));
    bit = strcmp(key, "dtype") == 0          ? HAS_DTYPE
          : strcmp(key, "shape") == 0        ? HAS_SHAPE
          : strcmp(key, "data_offsets") == 0 ? HAS_OFFSETS
                                             : 0;
    if (bit == 0) return skip_value(c, 3);
    if (*seen & bit) {
        char what[80];
        snprintf(what, sizeof what, "%s: got it twice, expected it once", key);
        return tensor_fail(c, IFKV_ERR_DATA, IFKV_E_TENSOR_HEADER, tensor->name, what);
    }
    *seen |= bit;
    if (bit == HAS_DTYPE) return parse_type(c, tensor->name, &tensor->type);
    if (bit == HAS_SHAPE)
        return parse_counts(c, "a shape of at most 8 non-negative integers", IFKV_TENSOR_MAX_DIM,
                            tensor->dim, &tensor->n_dim);
    IFKV_TRY(parse_counts(c, "data_offsets of two integers", 2, offsets, &n_offset));
    return n_offset == 2 ? IFKV_OK : malformed(c, "data_offsets of two integers");
}

/* Prove that [begin, end) is what shape and type need and lies in the data region. */
static ifkv_status check_range(const cursor *c, ifkv_tensor *tensor, const uint64_t *offsets) {
    char what[200];
    uint64_t product = 1, bits;
    for (int i = 0; i < tensor->n_dim; i++)
        if (ifkv_mul_overflow(product, tensor->dim[i], &product))
            return tensor_fail(c, IFKV_ERR_DATA, IFKV_E_TENSOR_RANGE, tensor->name,
                               "shape: number of elements: got 2^64 or more, expected less");
    if (ifkv_mul_overflow(product, (uint64_t)TYPE[tensor->type].bits, &bits))
        return tensor_fail(c, IFKV_ERR_DATA, IFKV_E_TENSOR_RANGE, tensor->name,
                           "shape: number of bits: got 2^64 or more, expected less");
    if (offsets[0] > offsets[1] || offsets[1] > c->data_bytes) {
        snprintf(what, sizeof what,
                 "data_offsets: outside the data: got [%llu, %llu], expected 0 <= begin <= end <= "
                 "%llu",
                 (unsigned long long)offsets[0], (unsigned long long)offsets[1],
                 (unsigned long long)c->data_bytes);
        return tensor_fail(c, IFKV_ERR_DATA, IFKV_E_TENSOR_RANGE, tensor->name, what);
    }
    if (bits % 8 != 0 || offsets[1] - offsets[0] != bits / 8) {
        snprintf(what, sizeof what,
                 "data_offsets: length does not fit shape and dtype: got %llu bytes, expected "
                 "%llu of %s",
                 (unsigned long long)(offsets[1] - offsets[0]), (unsigned long long)product,
                 TYPE[tensor->type].name);
        return tensor_fail(c, IFKV_ERR_DATA, IFKV_E_TENSOR_RANGE, tensor->name, what);
    }
    /* begin <= file size, so the sum fits. */
    tensor->begin = 8 + c->bytes + offsets[0];
    tensor->bytes = bits / 8;
    return IFKV_OK;
}

static ifkv_status parse_tensor(cursor *c, ifkv_tensor *tensor) {
    uint64_t offsets[2] = {0, 0};
    int seen = 0;
    IFKV_TRY(expect(c, '{', "an object with dtype, shape and data_offsets"));
    if (!accept(c, '}')) {
        do {
            IFKV_TRY(parse_member(c, tensor, offsets, &seen));
        } while (accept(c, ','));
        IFKV_TRY(expect(c, '}', "',' or '}'"));
    }
    if (seen != (HAS_DTYPE | HAS_SHAPE | HAS_OFFSETS))
        return tensor_fail(c, IFKV_ERR_DATA, IFKV_E_TENSOR_HEADER, tensor->name,
                           !(seen & HAS_DTYPE)   ? "dtype: got nothing, expected a type name"
                           : !(seen & HAS_SHAPE) ? "shape: got nothing, expected an array"
                                                 : "data_offsets: got nothing, expected "
                                                   "[begin, end]");
    return check_range(c, tensor, offsets);
}

static ifkv_status list_add(ifkv_tensor_list *list, const char *where, const ifkv_tensor *tensor) {
    IFKV_REQUIRE(list->n < IFKV_TENSOR_MAX_COUNT, IFKV_ERR_DATA, IFKV_E_TENSOR_HEADER,
                 "%s: too many tensors: got more than %d, expected at most %d", where,
                 IFKV_TENSOR_MAX_COUNT, IFKV_TENSOR_MAX_COUNT);
    if (list->n == list->capacity) {
        const int64_t capacity = list->capacity ? 2 * list->capacity : 256;
        ifkv_tensor *grown = realloc(list->tensor, (size_t)capacity * sizeof *grown);
        IFKV_REQUIRE(grown, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "%s: out of memory: got %lld tensors",
                     where, (long long)list->n);
        list->tensor = grown;
        list->capacity = capacity;
    }
    list->tensor[list->n++] = *tensor;
    return IFKV_OK;
}

/* By range; of an empty tensor and one that begins where it lies, the empty one comes first. */
static int compare_range(const void *a, const void *b) {
    const ifkv_tensor *x = a, *y = b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes;
}

/* No hole, no overlap, nothing behind the last one. */
static ifkv_status check_cover(const cursor *c, ifkv_tensor *tensor, int64_t n) {
    char what[160];
    const uint64_t begin = 8 + c->bytes;
    uint64_t end = begin;
    bool is_sorted = true;
    for (int64_t i = 1; i < n && is_sorted; i++)
        is_sorted = compare_range(&tensor[i - 1], &tensor[i]) <= 0;
    if (!is_sorted) qsort(tensor, (size_t)n, sizeof *tensor, compare_range);
    for (int64_t i = 0; i < n; i++) {
        if (tensor[i].begin != end) {
            snprintf(what, sizeof what, "data_offsets: %s: got begin %llu, expected %llu",
                     tensor[i].begin < end ? "overlaps another tensor" : "hole before it",
                     (unsigned long long)(tensor[i].begin - begin),
                     (unsigned long long)(end - begin));
            return tensor_fail(c, IFKV_ERR_DATA, IFKV_E_TENSOR_RANGE, tensor[i].name, what);
        }
        end = tensor[i].begin + tensor[i].bytes;
    }
    IFKV_REQUIRE(end - begin == c->data_bytes, IFKV_ERR_DATA, IFKV_E_TENSOR_RANGE,
                 "%s: data_offsets do not cover the file: got %llu bytes of tensors, expected "
                 "%llu",
                 c->where, (unsigned long long)(end - begin), (unsigned long long)c->data_bytes);
    return IFKV_OK;
}

static ifkv_status parse_entry(cursor *c, int shard, bool *has_metadata, ifkv_tensor_list *list) {
    char quoted[IFKV_QUOTE_BYTES];
    ifkv_tensor tensor = {.shard = shard};
    size_t n;
    IFKV_TRY(parse_string(c, "a tensor name", &tensor.name, &n));
    IFKV_REQUIRE(n <= IFKV_TENSOR_MAX_NAME, IFKV_ERR_DATA, IFKV_E_TENSOR_HEADER,
                 "%s tensor \"%s\": name too long: got %zu bytes, expected at most %d", c->where,
                 ifkv_quote(tensor.name, n, quoted), n, IFKV_TENSOR_MAX_NAME);
    IFKV_TRY(expect(c, ':', "':'"));
    if (strcmp(tensor.name, "__metadata__") == 0) {
        IFKV_REQUIRE(!*has_metadata, IFKV_ERR_DATA, IFKV_E_TENSOR_HEADER,
                     "%s __metadata__: got it twice, expected it once", c->where);
        *has_metadata = true;
        return skip_metadata(c);
    }
    IFKV_TRY(parse_tensor(c, &tensor));
    return list_add(list, c->where, &tensor);
}

ifkv_status ifkv_safetensors_parse(const char *where, char *text, size_t bytes, uint64_t data_bytes,
                                   int shard, ifkv_tensor_list *list) {
    cursor c = {where, text, bytes, 0, data_bytes};
    const int64_t first = list->n;
    bool has_metadata = false;
    /* The format wants '{' as the very first byte; spaces may follow the end only. */
    if (bytes == 0 || text[0] != '{') return malformed(&c, "'{' as the first byte");
    c.at = 1;
    if (!accept(&c, '}')) {
        do {
            IFKV_TRY(parse_entry(&c, shard, &has_metadata, list));
        } while (accept(&c, ','));
        IFKV_TRY(expect(&c, '}', "',' or '}'"));
    }
    skip_space(&c);
    if (c.at != bytes) return malformed(&c, "nothing but spaces behind the header");
    return check_cover(&c, list->tensor + first, list->n - first);
}

const char *ifkv_tensor_show_shape(const ifkv_tensor *tensor, char *buffer) {
    size_t at = 0;
    buffer[at++] = '[';
    for (int i = 0; i < tensor->n_dim; i++) /* 8 dims of at most 22 bytes */
        at += (size_t)snprintf(buffer + at, IFKV_QUOTE_BYTES - at, "%s%llu", i ? ", " : "",
                               (unsigned long long)tensor->dim[i]);
    buffer[at++] = ']';
    buffer[at] = 0;
    return buffer;
}
