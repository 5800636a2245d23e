/* Requests: the JSONL parser, reading from files and pipes, HDF5 saying the same as JSONL. */
#include "test.h"

#include "digest.h"
#include "error_codes.h"
#include "file_fixture.h"
#include "h5.h"
#include "request.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#define BASE "\"chunks\":[[1,2],[3]],\"prompt\":[4]"

static ifkv_request_list *list;

static int reset(void **state) {
    (void)state;
    ifkv_requests_free(list);
    list = NULL;
    return 0;
}

static ifkv_status parse_n(const char *text, size_t bytes, int64_t n_vocab) {
    reset(NULL);
    return ifkv_requests_parse("q.jsonl", text, bytes, false, n_vocab, &list);
}

static ifkv_status parse(const char *text) {
    return parse_n(text, strlen(text), 401);
}

static uint64_t digest_of(const char *text) {
    assert_ok(parse(text));
    return list->item[0].digest;
}

/* ---- what is accepted ---- */

static void every_field_is_read(void **state) {
    (void)state;
    assert_ok(parse("{\"id\":\"a\",\"prefix\":[7,8],\"chunks\":[[1,2],[3]],\"prompt\":[4,400],"
                    "\"question\":[5],\"answers\":[\"x\"],\"max_new\":0,\"meta\":{\"b\": 1, "
                    "\"a\":2}}\n"));
    const ifkv_request_item *item = &list->item[0];
    const ifkv_request *r = &item->request;
    assert_int_equal(list->n, 1);
    assert_string_equal(item->id, "a");
    assert_int_equal(r->size, sizeof *r);
    assert_true(r->n_prefix == 2 && r->prefix[1] == 8);
    assert_true(r->n_chunk == 2 && r->chunk_offsets[1] == 2 && r->chunk_offsets[2] == 3);
    assert_true(r->chunk_tokens[0] == 1 && r->chunk_tokens[2] == 3);
    assert_true(r->n_prompt == 2 && r->prompt[1] == 400);
    assert_true(r->n_question == 1 && r->question[0] == 5);
    assert_string_equal(item->answers_json, "[\"x\"]");
    assert_string_equal(item->meta_json, "{\"b\":1,\"a\":2}");
    assert_int_equal(item->max_new, 0);
    assert_false(item->is_context);
    assert_string_equal(item->where, "q.jsonl:1");
}

static void absent_fields_have_defaults(void **state) {
    (void)state;
    assert_ok(parse("{\"id\":\"a\"," BASE "}"));
    const ifkv_request_item *item = &list->item[0];
    assert_int_equal(item->request.n_prefix, 0);
    assert_null(item->request.question);
    assert_null(item->answers_json);
    assert_null(item->meta_json);
    assert_int_equal(item->max_new, -1);
}

static void context_is_one_chunk_marked_as_such(void **state) {
    (void)state;
    assert_ok(parse("{\"id\":\"a\",\"context\":[1,2,3],\"prompt\":[4]}"));
    assert_true(list->item[0].is_context);
    assert_int_equal(list->item[0].request.n_chunk, 1);
    assert_int_equal(list->item[0].request.chunk_offsets[1], 3);
}

static void blank_lines_crlf_and_a_byte_order_mark_are_skipped(void **state) {
    (void)state;
    assert_ok(parse("\xef\xbb\xbf\r\n{\"id\":\"a\"," BASE "}\r\n \t\n\n{\"id\":\"b\"," BASE "}"));
    assert_int_equal(list->n, 2);
    assert_string_equal(list->item[1].where, "q.jsonl:5");
}

static void an_id_of_any_text_is_kept(void **state) {
    (void)state;
    assert_ok(parse("{\"id\":\"../../etc/x\\n\\u00e9\"," BASE "}"));
    assert_string_equal(list->item[0].id, "../../etc/x\n\xc3\xa9");
    assert_ptr_equal(ifkv_requests_find(list, "../../etc/x\n\xc3\xa9"), &list->item[0]);
    assert_null(ifkv_requests_find(list, "x"));
}

static void many_requests_are_found_by_id(void **state) {
    (void)state;
    char *text = malloc(100 * 1000), *at = text;
    for (int i = 0; i < 1000; i++) at += sprintf(at, "{\"id\":\"r%d\"," BASE "}\n", i);
    assert_ok(parse(text));
    free(text);
    assert_int_equal(list->n, 1000);
    assert_string_equal(ifkv_requests_find(list, "r777")->where, "q.jsonl:778");
}

static void a_million_tokens_are_read(void **state) {
    (void)state;
    const int n = 1000000;
    char *text = malloc(8 * (size_t)n + 100);
    char *at = text + sprintf(text, "{\"id\":\"a\",\"prompt\":[1],\"context\":[0");
    for (int i = 1; i < n; i++) at += sprintf(at, ",%d", i % 100000);
    strcpy(at, "]}\n");
    assert_ok(parse_n(text, strlen(text), 100000));
    free(text);
    assert_int_equal(list->item[0].request.chunk_offsets[1], n);
    assert_int_equal(list->item[0].request.chunk_tokens[n - 1], 99999);
}

static void vocabulary_zero_checks_only_the_type(void **state) {
    (void)state;
    const char *text = "{\"id\":\"a\",\"chunks\":[[2147483647]],\"prompt\":[4]}";
    assert_ok(parse_n(text, strlen(text), 0));
    text = "{\"id\":\"a\",\"chunks\":[[2147483648]],\"prompt\":[4]}";
    assert_fails(parse_n(text, strlen(text), 0), IFKV_ERR_DATA, IFKV_E_REQUEST_TOKEN,
                 "got 2147483648, expected 0..2147483647");
}

static void digest_depends_on_every_field(void **state) {
    (void)state;
    static const char *const texts[] = {
        "{\"id\":\"a\"," BASE "}",
        "{\"id\":\"b\"," BASE "}",
        "{\"id\":\"a\",\"chunks\":[[1],[2,3]],\"prompt\":[4]}",
        "{\"id\":\"a\",\"chunks\":[[1,2,3]],\"prompt\":[4]}",
        "{\"id\":\"a\",\"context\":[1,2,3],\"prompt\":[4]}",
        "{\"id\":\"a\",\"prefix\":[1],\"chunks\":[[2],[3]],\"prompt\":[4]}",
        "{\"id\":\"a\",\"question\":[4]," BASE "}",
        "{\"id\":\"a\",\"max_new\":1," BASE "}",
        "{\"id\":\"a\",\"answers\":[\"x\"]," BASE "}",
        "{\"id\":\"a\",\"meta\":{}," BASE "}",
    };
    enum { N = sizeof texts / sizeof *texts };
    uint64_t digest[N];
    for (int i = 0; i < N; i++) digest[i] = digest_of(texts[i]);
    for (int i = 0; i < N; i++)
        for (int j = 0; j < i; j++) assert_true(digest[i] != digest[j]);
    assert_true(digest[0] ==
                digest_of("{\"prompt\": [4], \"chunks\": [[1, 2], [3]], \"id\":\"a\"}"));
}

/* ---- what is refused ---- */

typedef struct bad_line {
    const char *text;
    int code;
    const char *part;
} bad_line;

static void a_malformed_request_is_refused_by_place(void **state) {
    (void)state;
    static const bad_line bad[] = {
        {"", IFKV_E_REQUEST_LENGTH, "no request"},
        {"\n \r\n", IFKV_E_REQUEST_LENGTH, "no request"},
        {"{\"id\": \"a\", \n", IFKV_E_REQUEST_JSON, "q.jsonl:1"},
        {"\n\n{]\n", IFKV_E_REQUEST_JSON, "q.jsonl:3"},
        {"[1]", IFKV_E_REQUEST_JSON, "expected an object"},
        {"{\"id\":\"\xff\"," BASE "}", IFKV_E_REQUEST_JSON, "q.jsonl:1"},
        {"{\"id\":\"a\",\"id\":\"a\"," BASE "}", IFKV_E_REQUEST_JSON, "q.jsonl:1"},
        {"{\"id\":\"a\\u0000\"," BASE "}", IFKV_E_REQUEST_JSON, "q.jsonl:1"},
        {"{\"id\":\"a\"," BASE "} x", IFKV_E_REQUEST_JSON, "q.jsonl:1"},
        {"{" BASE "}", IFKV_E_REQUEST_FIELD, "/id: field missing"},
        {"{\"id\":1," BASE "}", IFKV_E_REQUEST_FIELD, "/id: wrong type"},
        {"{\"id\":\"\"," BASE "}", IFKV_E_REQUEST_LENGTH, "/id: bad length"},
        {"{\"id\":\"a\",\"promt\":[1]," BASE "}", IFKV_E_REQUEST_FIELD, "/promt: unknown field"},
        {"{\"id\":\"a\",\"chunks\":[[1]]}", IFKV_E_REQUEST_FIELD, "/prompt: field missing"},
        {"{\"id\":\"a\",\"prompt\":[1]}", IFKV_E_REQUEST_FIELD, "expected chunks or context"},
        {"{\"id\":\"a\",\"context\":[1]," BASE "}", IFKV_E_REQUEST_FIELD,
         "both chunks and context"},
        {"{\"id\":\"a\",\"chunks\":[],\"prompt\":[1]}", IFKV_E_REQUEST_LENGTH,
         "/chunks: too short"},
        {"{\"id\":\"a\",\"chunks\":[[1],[]],\"prompt\":[1]}", IFKV_E_REQUEST_LENGTH,
         "/chunks/1: too short"},
        {"{\"id\":\"a\",\"chunks\":[[1],7],\"prompt\":[1]}", IFKV_E_REQUEST_FIELD,
         "/chunks/1: wrong type"},
        {"{\"id\":\"a\",\"context\":[],\"prompt\":[1]}", IFKV_E_REQUEST_LENGTH, "/context"},
        {"{\"id\":\"a\",\"chunks\":[[1]],\"prompt\":[]}", IFKV_E_REQUEST_LENGTH, "/prompt"},
        {"{\"id\":\"a\",\"question\":[]," BASE "}", IFKV_E_REQUEST_LENGTH, "/question"},
        {"{\"id\":\"a\",\"prefix\":{}," BASE "}", IFKV_E_REQUEST_FIELD, "/prefix: wrong type"},
        {"{\"id\":\"a\",\"chunks\":[[1],[2],[3],[4,401]],\"prompt\":[1]}", IFKV_E_REQUEST_TOKEN,
         "q.jsonl:1 /chunks/3/1: token id out of range: got 401, expected 0..400"},
        {"{\"id\":\"a\",\"chunks\":[[1],[7,-1]],\"prompt\":[1]}", IFKV_E_REQUEST_TOKEN,
         "/chunks/1/1"},
        {"{\"id\":\"a\",\"chunks\":[[1]],\"prompt\":[5.0]}", IFKV_E_REQUEST_TOKEN, "/prompt/0"},
        {"{\"id\":\"a\",\"chunks\":[[1]],\"prompt\":[\"5\"]}", IFKV_E_REQUEST_TOKEN, "a string"},
        {"{\"id\":\"a\",\"chunks\":[[1]],\"prompt\":[true]}", IFKV_E_REQUEST_TOKEN, "/prompt/0"},
        {"{\"id\":\"a\",\"chunks\":[[1]],\"prompt\":[2147483648]}", IFKV_E_REQUEST_TOKEN,
         "got 2147483648"},
        {"{\"id\":\"a\",\"chunks\":[[1]],\"prompt\":[99999999999999999999]}", IFKV_E_REQUEST_JSON,
         "q.jsonl:1"},
        {"{\"id\":\"a\",\"max_new\":-1," BASE "}", IFKV_E_REQUEST_FIELD, "/max_new: out of range"},
        {"{\"id\":\"a\",\"max_new\":1.0," BASE "}", IFKV_E_REQUEST_FIELD, "/max_new: wrong type"},
        {"{\"id\":\"a\",\"answers\":\"x\"," BASE "}", IFKV_E_REQUEST_FIELD, "/answers"},
        {"{\"id\":\"a\",\"answers\":[\"x\",1]," BASE "}", IFKV_E_REQUEST_FIELD, "/answers/1"},
        {"{\"id\":\"a\",\"meta\":[]," BASE "}", IFKV_E_REQUEST_FIELD, "/meta: wrong type"},
        {"{\"id\":\"a\"," BASE "}\n{\"id\":\"a\"," BASE "}", IFKV_E_REQUEST_FIELD,
         "q.jsonl:2 /id: duplicate id: got 'a', first at q.jsonl:1"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_fails(parse(bad[i].text), IFKV_ERR_DATA, bad[i].code, bad[i].part);
}

static void terminal_escapes_are_not_repeated(void **state) {
    (void)state;
    assert_fails(parse("{\"id\":\"a\",\"\\u001b[31m\":1," BASE "}"), IFKV_ERR_DATA,
                 IFKV_E_REQUEST_FIELD, "/\\x1b[31m: unknown field");
}

static void depth_over_64_is_refused(void **state) {
    (void)state;
    char text[600] = "{\"id\":\"a\"," BASE ",\"meta\":{\"x\":";
    memset(text + strlen(text), '[', 100);
    memset(text + strlen(text), ']', 100);
    strcat(text, "}}");
    assert_fails(parse(text), IFKV_ERR_DATA, IFKV_E_REQUEST_JSON, "q.jsonl:1");
}

static char *chunks_text(int n_chunk) {
    char *text = malloc(4 * (size_t)n_chunk + 100);
    char *at = text + sprintf(text, "{\"id\":\"a\",\"prompt\":[1],\"chunks\":[[1]");
    for (int i = 1; i < n_chunk; i++) at = stpcpy(at, ",[1]");
    strcpy(at, "]}");
    return text;
}

static void the_chunk_limit_is_65536(void **state) {
    (void)state;
    char *text = chunks_text(65536);
    assert_ok(parse(text));
    free(text);
    text = chunks_text(65537);
    assert_fails(parse(text), IFKV_ERR_DATA, IFKV_E_REQUEST_LENGTH, "got 65537 chunks");
    free(text);
}

static void a_line_over_256_mib_is_refused(void **state) {
    (void)state;
    const size_t n = IFKV_REQUEST_LINE_BYTES + 1;
    char *text = malloc(n);
    assert_non_null(text);
    memset(text, ' ', n);
    text[0] = '{';
    assert_fails(parse_n(text, n, 0), IFKV_ERR_DATA, IFKV_E_REQUEST_LENGTH, "line too long");
    free(text);
}

static void an_id_over_32_kib_is_refused(void **state) {
    (void)state;
    static char text[40000];
    char *at = text + sprintf(text, "{" BASE ",\"id\":\"");
    memset(at, 'x', 32768);
    strcpy(at + 32768, "\"}");
    assert_ok(parse(text));
    strcpy(at + 32768, "x\"}");
    assert_fails(parse(text), IFKV_ERR_DATA, IFKV_E_REQUEST_LENGTH, "got 32769 bytes");
}

/* ---- bytes ---- */

static char *dir, *text;
static size_t bytes;
static bool is_h5;

static int make_dir(void **state) {
    (void)state;
    dir = fixture_dir();
    return 0;
}

static int remove_dir(void **state) {
    fixture_remove(dir);
    free(text);
    text = NULL;
    return reset(state);
}

static void a_file_is_read_whole(void **state) {
    (void)state;
    const char *path = fixture_path(dir, "q.jsonl");
    fixture_write_text(path, "abc\n");
    assert_ok(ifkv_requests_read(path, &text, &bytes, &is_h5));
    assert_int_equal(bytes, 4);
    assert_string_equal(text, "abc\n");
    assert_false(is_h5);
}

static void a_missing_file_is_66(void **state) {
    (void)state;
    assert_fails(ifkv_requests_read(fixture_path(dir, "no"), &text, &bytes, &is_h5),
                 IFKV_ERR_NO_INPUT, IFKV_E_REQUEST_FILE, "/no: cannot be opened");
}

static void a_directory_is_refused(void **state) {
    (void)state;
    assert_fails(ifkv_requests_read(dir, &text, &bytes, &is_h5), IFKV_ERR_DATA, IFKV_E_REQUEST_FILE,
                 "a directory");
}

static void a_compressed_file_is_named(void **state) {
    (void)state;
    const char *path = fixture_path(dir, "q.gz");
    fixture_write(path, "\x1f\x8b\x08\x00", 4);
    assert_fails(ifkv_requests_read(path, &text, &bytes, &is_h5), IFKV_ERR_DATA,
                 IFKV_E_REQUEST_FILE, "gzip");
}

/* 1 MB through a pipe that another process fills slowly enough to give short reads. */
static int filled_pipe(pid_t *child_p) {
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    *child_p = fork();
    if (*child_p == 0) {
        static char block[1000];
        memset(block, '\n', sizeof block);
        for (int i = 0; i < 1000; i++)
            if (write(ends[1], block, sizeof block) < 0) _exit(1);
        _exit(0);
    }
    close(ends[1]);
    return ends[0];
}

static void a_pipe_is_read_whole(void **state) {
    (void)state;
    char path[40];
    pid_t child;
    const int fd = filled_pipe(&child);
    snprintf(path, sizeof path, "/dev/fd/%d", fd);
    assert_ok(ifkv_requests_read(path, &text, &bytes, &is_h5));
    close(fd);
    assert_int_equal(bytes, 1000000);
}

static void a_dash_is_standard_input(void **state) {
    (void)state;
    const int saved = dup(0);
    pid_t child;
    const int fd = filled_pipe(&child);
    dup2(fd, 0);
    const ifkv_status status = ifkv_requests_read("-", &text, &bytes, &is_h5);
    dup2(saved, 0);
    close(saved);
    close(fd);
    assert_int_equal(status, IFKV_OK);
    assert_int_equal(bytes, 1000000);
}

/* ---- HDF5 ---- */

static ifkv_status read_h5(fixture_h5_kind kind) {
    const char *path = fixture_path(dir, "q.h5");
    fixture_h5_write(path, kind);
    free(text);
    text = NULL;
    return ifkv_requests_read(path, &text, &bytes, &is_h5);
}

static void hdf5_says_the_same_as_jsonl(void **state) {
    (void)state;
    static const fixture_h5_kind kinds[] = {H5_VALID, H5_BIG_ENDIAN, H5_INT64, H5_DEFLATED};
    uint64_t digest[2];
    assert_ok(parse(fixture_h5_jsonl));
    for (int i = 0; i < 2; i++) digest[i] = list->item[i].digest;
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        assert_ok(read_h5(kinds[i]));
        assert_true(is_h5);
        reset(NULL);
        assert_ok(ifkv_requests_parse("q.h5", text, bytes, true, 401, &list));
        assert_int_equal(list->n, 2);
        assert_true(list->item[0].digest == digest[0] && list->item[1].digest == digest[1]);
    }
}

static void hdf5_errors_name_group_and_pointer(void **state) {
    (void)state;
    assert_ok(read_h5(H5_VALID));
    assert_fails(ifkv_requests_parse("q.h5", text, bytes, true, 16, &list), IFKV_ERR_DATA,
                 IFKV_E_REQUEST_TOKEN, "q.h5 /requests/000001 /prompt/3: token id out of range");
}

static void hdf5_through_a_pipe_is_read(void **state) {
    (void)state;
    const char *path = fixture_path(dir, "fifo");
    size_t n;
    fixture_h5_write(fixture_path(dir, "q.h5"), H5_VALID);
    char *image = fixture_read(fixture_path(dir, "q.h5"), &n);
    assert_int_equal(mkfifo(path, 0600), 0);
    if (fork() == 0) {
        fixture_write(path, image, n);
        _exit(0);
    }
    free(image);
    assert_ok(ifkv_requests_read(path, &text, &bytes, &is_h5));
    assert_true(is_h5);
}

static void a_malformed_hdf5_file_is_refused_by_path(void **state) {
    (void)state;
    static const struct {
        fixture_h5_kind kind;
        int code;
        const char *part;
    } bad[] = {
        {H5_FLOAT, IFKV_E_H5_OBJECT, "/requests/000001/prompt: wrong type: got float32"},
        {H5_UNSIGNED, IFKV_E_H5_OBJECT, "wrong type: got uint32"},
        {H5_COMPOUND, IFKV_E_H5_OBJECT, "wrong type: got compound"},
        {H5_TEXT, IFKV_E_H5_OBJECT, "wrong type: got string"},
        {H5_RANK_2, IFKV_E_H5_OBJECT, "wrong rank: got 2 dimensions"},
        {H5_RANK_0, IFKV_E_H5_OBJECT, "wrong rank: got 0 dimensions"},
        {H5_NULL_SPACE, IFKV_E_H5_OBJECT, "/requests/000001/prompt: wrong rank"},
        {H5_GROUP, IFKV_E_H5_OBJECT, "/requests/000001/prompt: not a dataset"},
        {H5_EXTERNAL_STORAGE, IFKV_E_H5_REFUSED, "/requests/000001/prompt: external storage"},
        {H5_EXTERNAL_LINK, IFKV_E_H5_REFUSED, "external link"},
        {H5_SOFT_LINK, IFKV_E_H5_REFUSED, "soft link"},
        {H5_VIRTUAL, IFKV_E_H5_REFUSED, "virtual dataset"},
        {H5_HUGE, IFKV_E_H5_OBJECT, "claims 1125899906842624 elements but stores 0 bytes"},
        {H5_HUGE_CHUNK, IFKV_E_H5_REFUSED, "chunk too large"},
        {H5_THIN, IFKV_E_H5_OBJECT, "claims 1048576 elements but stores 64 bytes"},
        {H5_FILTER, IFKV_E_H5_REFUSED, "filter 32015 not allowed"},
        {H5_OFFSETS, IFKV_E_H5_OBJECT, "/requests/000000/chunk_offsets"},
        {H5_UNKNOWN_MEMBER, IFKV_E_H5_OBJECT, "/requests/000001/promt: unknown member"},
        {H5_NO_ID, IFKV_E_H5_OBJECT, "/requests/000000/id: attribute missing"},
        {H5_NO_FORMAT, IFKV_E_H5_OBJECT, "attribute format"},
        {H5_BAD_META, IFKV_E_REQUEST_JSON, "/requests/000000/meta"},
        {H5_GAP, IFKV_E_H5_OBJECT, "/requests/000001: group missing"},
        {H5_CYCLE, IFKV_E_H5_OBJECT, "/requests/000001/prompt: not a dataset"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_fails(read_h5(bad[i].kind), IFKV_ERR_DATA, bad[i].code, bad[i].part);
}

static void an_absent_or_empty_hdf5_prompt_is_the_parsers_error(void **state) {
    (void)state;
    assert_ok(read_h5(H5_MISSING));
    assert_fails(ifkv_requests_parse("q.h5", text, bytes, true, 0, &list), IFKV_ERR_DATA,
                 IFKV_E_REQUEST_FIELD, "q.h5 /requests/000001 /prompt: field missing");
    assert_ok(read_h5(H5_EMPTY));
    assert_fails(ifkv_requests_parse("q.h5", text, bytes, true, 0, &list), IFKV_ERR_DATA,
                 IFKV_E_REQUEST_LENGTH, "/prompt: too short");
}

static void a_flipped_bit_in_hdf5_is_found(void **state) {
    (void)state;
    const char *path = fixture_path(dir, "q.h5");
    const int32_t pattern = H5_PATTERN;
    fixture_h5_write(path, H5_FLETCHER);
    assert_ok(ifkv_requests_read(path, &text, &bytes, &is_h5));
    free(text);
    text = NULL;
    assert_true(fixture_flip(path, &pattern, sizeof pattern));
    assert_fails(ifkv_requests_read(path, &text, &bytes, &is_h5), IFKV_ERR_DATA, IFKV_E_H5_DATA,
                 "/requests/000001/prompt: rows 0..3 not readable");
}

static void a_truncated_hdf5_file_is_refused(void **state) {
    (void)state;
    const char *path = fixture_path(dir, "q.h5");
    size_t n;
    fixture_h5_write(path, H5_VALID);
    char *image = fixture_read(path, &n);
    const size_t cuts[] = {8, 50, n / 2, n - 1};
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        fixture_write(path, image, cuts[i]);
        assert_fails(ifkv_requests_read(path, &text, &bytes, &is_h5), IFKV_ERR_DATA, IFKV_E_H5_OPEN,
                     "q.h5: not a readable HDF5 file");
    }
    free(image);
}

static void an_hdf5_file_open_for_writing_is_busy(void **state) {
    (void)state;
    const char *path = fixture_path(dir, "q.h5");
    fixture_h5_write(path, H5_VALID);
    const int fd = open(path, O_RDONLY);
    assert_int_equal(flock(fd, LOCK_EX), 0);
    assert_fails(ifkv_requests_read(path, &text, &bytes, &is_h5), IFKV_ERR_BUSY, IFKV_E_H5_OPEN,
                 "in use");
    close(fd);
}

int main(void) {
    ifkv_h5_process_init();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(every_field_is_read, reset),
        cmocka_unit_test_teardown(absent_fields_have_defaults, reset),
        cmocka_unit_test_teardown(context_is_one_chunk_marked_as_such, reset),
        cmocka_unit_test_teardown(blank_lines_crlf_and_a_byte_order_mark_are_skipped, reset),
        cmocka_unit_test_teardown(an_id_of_any_text_is_kept, reset),
        cmocka_unit_test_teardown(many_requests_are_found_by_id, reset),
        cmocka_unit_test_teardown(a_million_tokens_are_read, reset),
        cmocka_unit_test_teardown(vocabulary_zero_checks_only_the_type, reset),
        cmocka_unit_test_teardown(digest_depends_on_every_field, reset),
        cmocka_unit_test_teardown(a_malformed_request_is_refused_by_place, reset),
        cmocka_unit_test_teardown(terminal_escapes_are_not_repeated, reset),
        cmocka_unit_test_teardown(depth_over_64_is_refused, reset),
        cmocka_unit_test_teardown(the_chunk_limit_is_65536, reset),
        cmocka_unit_test_teardown(a_line_over_256_mib_is_refused, reset),
        cmocka_unit_test_teardown(an_id_over_32_kib_is_refused, reset),
        cmocka_unit_test_setup_teardown(a_file_is_read_whole, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(a_missing_file_is_66, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(a_directory_is_refused, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(a_compressed_file_is_named, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(a_pipe_is_read_whole, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(a_dash_is_standard_input, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(hdf5_says_the_same_as_jsonl, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(hdf5_errors_name_group_and_pointer, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(hdf5_through_a_pipe_is_read, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(a_malformed_hdf5_file_is_refused_by_path, make_dir,
                                        remove_dir),
        cmocka_unit_test_setup_teardown(an_absent_or_empty_hdf5_prompt_is_the_parsers_error,
                                        make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(a_flipped_bit_in_hdf5_is_found, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(a_truncated_hdf5_file_is_refused, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(an_hdf5_file_open_for_writing_is_busy, make_dir,
                                        remove_dir),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
