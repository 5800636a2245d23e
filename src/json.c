/* Strict JSON on jansson.  See json.h. */
#include "json.h"

#include <string.h>

#define DEFAULT_DEPTH 64
#define DEFAULT_PARSE_BYTES ((uint64_t)1 << 30)

/* Heap bytes that jansson 2.14 takes on a 64-bit glibc, rounded up so that the estimate is never
 * below the truth: a node, its place in the parent's table while that doubles, and what malloc
 * adds. A string may also be a key, which costs a hash entry; test_config measures them. */
enum { OBJECT_BYTES = 304, ARRAY_BYTES = 176, STRING_BYTES = 144, SCALAR_BYTES = 64 };

static const char GIT_LFS[] = "version https://git-lfs.github.com/spec/";

/* What a walk over the text, without parsing, can tell. */
typedef struct survey {
    int depth, max_depth;
    size_t deepest_at;        /* byte where max_depth was first exceeded */
    uint64_t bytes;           /* estimated memory */
    size_t key_at, key_bytes; /* last member name before the end */
} survey;

static size_t string_end(const char *text, size_t bytes, size_t at) {
    for (at++; at < bytes && text[at] != '"'; at++)
        if (text[at] == '\\') at++;
    return at < bytes ? at : bytes;
}

static bool is_space(char c) {
    return c == ' ' || c == '\t' || c == '\n' || c == '\r';
}

static bool is_scalar(char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || c == '-' || c == '+' || c == '.' ||
           c == 'E';
}

static void survey_open(survey *s, size_t at, uint64_t cost, int limit) {
    s->bytes += cost;
    if (++s->depth > s->max_depth) {
        s->max_depth = s->depth;
        if (s->depth == limit + 1) s->deepest_at = at;
    }
}

static survey survey_text(const char *text, size_t bytes, int limit) {
    survey s = {0};
    for (size_t i = 0; i < bytes; i++) {
        const char c = text[i];
        if (c == '"') {
            const size_t end = string_end(text, bytes, i);
            size_t next = end + 1;
            while (next < bytes && is_space(text[next])) next++;
            if (next < bytes && text[next] == ':') {
                s.key_at = i + 1;
                s.key_bytes = end - i - 1;
            }
            s.bytes += STRING_BYTES + (end - i);
            i = end;
        } else if (c == '{') {
            survey_open(&s, i, OBJECT_BYTES, limit);
        } else if (c == '[') {
            survey_open(&s, i, ARRAY_BYTES, limit);
        } else if (c == '}' || c == ']') {
            s.depth--;
        } else if (is_scalar(c)) {
            s.bytes += SCALAR_BYTES;
            while (i + 1 < bytes && is_scalar(text[i + 1])) i++;
        }
    }
    return s;
}

/* Refuse before parsing what parsing would make expensive or misread. */
static ifkv_status survey_check(const char *where, const char *text, size_t bytes,
                                const ifkv_json_limits *limits, int code) {
    const int depth = limits->max_depth > 0 ? limits->max_depth : DEFAULT_DEPTH;
    const uint64_t memory =
        limits->max_parse_bytes > 0 ? limits->max_parse_bytes : DEFAULT_PARSE_BYTES;
    IFKV_REQUIRE(limits->max_bytes == 0 || bytes <= limits->max_bytes, IFKV_ERR_DATA, code,
                 "%s: JSON text too long: got %zu bytes, expected at most %llu", where, bytes,
                 (unsigned long long)limits->max_bytes);
    IFKV_REQUIRE(bytes < 3 || memcmp(text, "\xef\xbb\xbf", 3) != 0, IFKV_ERR_DATA, code,
                 "%s byte 0: invalid JSON: got a byte order mark, expected '{'", where);
    IFKV_REQUIRE(bytes < sizeof GIT_LFS - 1 || memcmp(text, GIT_LFS, sizeof GIT_LFS - 1) != 0,
                 IFKV_ERR_DATA, code,
                 "%s byte 0: invalid JSON: got a git-lfs pointer, expected "
                 "the file it stands for",
                 where);
    const survey s = survey_text(text, bytes, depth);
    IFKV_REQUIRE(s.max_depth <= depth, IFKV_ERR_DATA, code,
                 "%s byte %zu: JSON nested too deeply: got depth %d, expected at most %d", where,
                 s.deepest_at, s.max_depth, depth);
    IFKV_REQUIRE(s.bytes <= memory, IFKV_ERR_DATA, code,
                 "%s: JSON takes too much memory: got about %llu bytes, expected at most %llu",
                 where, (unsigned long long)s.bytes, (unsigned long long)memory);
    return IFKV_OK;
}

static ifkv_status parse_failed(const char *where, const char *text, size_t bytes,
                                const json_error_t *error, int code) {
    char reason[IFKV_QUOTE_BYTES], key[IFKV_QUOTE_BYTES];
    const size_t at = error->position > 0 ? (size_t)error->position : 0;
    const survey s = survey_text(text, at < bytes ? at : bytes, DEFAULT_DEPTH);
    ifkv_quote(error->text, strlen(error->text), reason);
    if (s.key_bytes == 0)
        return IFKV_FAIL(IFKV_ERR_DATA, code, "%s byte %zu: invalid JSON: got %s", where, at,
                         reason);
    return IFKV_FAIL(IFKV_ERR_DATA, code, "%s byte %zu: invalid JSON at or after \"%s\": got %s",
                     where, at, ifkv_quote(text + s.key_at, s.key_bytes, key), reason);
}

ifkv_status ifkv_json_parse(const char *where, const char *text, size_t bytes,
                            const ifkv_json_limits *limits, int code, json_t **root_p) {
    json_error_t error;
    IFKV_TRY(survey_check(where, text, bytes, limits, code));
    json_t *root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error);
    if (!root && json_error_code(&error) == json_error_out_of_memory)
        return IFKV_FAIL(IFKV_ERR_RESOURCE, code, "%s: out of memory while parsed", where);
    if (!root) return parse_failed(where, text, bytes, &error, code);
    *root_p = root;
    return IFKV_OK;
}
