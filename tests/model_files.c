/* Model directories for tests.  See model_files.h. */
#include "model_files.h"

#include <fcntl.h>
#include <ftw.h>
#include <sys/stat.h>
#include <unistd.h>

#define TINY_SHAPE                                                                                 \
    "\"num_hidden_layers\": 2,\n \"hidden_size\": 8,\n \"num_attention_heads\": 4,\n "             \
    "\"num_key_value_heads\": 2,\n \"head_dim\": 4,\n \"intermediate_size\": 6,\n "                \
    "\"vocab_size\": 11,\n \"max_position_embeddings\": 64,\n \"rms_norm_eps\": 1e-05,\n "         \
    "\"tie_word_embeddings\": true,\n \"eos_token_id\": 2,\n \"rope_theta\": 10000.0,\n "          \
    "\"rope_scaling\": null"

const char TINY_LLAMA[] =
    "{\"model_type\": \"llama\",\n \"hidden_act\": \"silu\",\n " TINY_SHAPE "}\n";
const char TINY_QWEN3[] =
    "{\"model_type\": \"qwen3\",\n \"attention_bias\": false,\n \"use_sliding_window\": false,\n "
    "\"sliding_window\": null,\n " TINY_SHAPE "}\n";

char log_text[4096];

static void keep_line(void *arg, ifkv_log_level level, const char *line) {
    const size_t n = strlen(log_text);
    (void)arg;
    (void)level;
    snprintf(log_text + n, sizeof log_text - n, "%s\n", line);
}

int dir_setup(void **state) {
    const char *base = getenv("TMPDIR");
    char *path = malloc(512);
    if (!path) return -1;
    snprintf(path, 512, "%s/ifkv-test-XXXXXX", base ? base : "/tmp");
    log_text[0] = 0;
    ifkv_log_set(keep_line, NULL, IFKV_LOG_DEBUG);
    *state = path;
    return mkdtemp(path) ? 0 : -1;
}

static int remove_one(const char *path, const struct stat *st, int flag, struct FTW *ftw) {
    (void)st;
    (void)flag;
    (void)ftw;
    return remove(path);
}

int dir_teardown(void **state) {
    const int failed = nftw(*state, remove_one, 8, FTW_DEPTH | FTW_PHYS);
    free(*state);
    ifkv_log_set(NULL, NULL, IFKV_LOG_WARN);
    return failed;
}

const char *path_in(const char *dir, const char *name) {
    static char path[8][1024];
    static int next;
    char *to = path[next++ % 8];
    snprintf(to, sizeof path[0], "%s/%s", dir, name);
    return to;
}

void write_file(const char *dir, const char *name, const void *bytes, size_t n) {
    FILE *file = fopen(path_in(dir, name), "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, n, file), n);
    assert_int_equal(fclose(file), 0);
}

void write_text(const char *dir, const char *name, const char *text) {
    write_file(dir, name, text, strlen(text));
}

char *replaced(const char *text, const char *from, const char *to) {
    const char *at = strstr(text, from);
    assert_non_null(at);
    assert_null(strstr(at + 1, from));
    char *out = malloc(strlen(text) + strlen(to) + 1);
    assert_non_null(out);
    memcpy(out, text, (size_t)(at - text));
    strcpy(out + (at - text), to);
    strcat(out, at + strlen(from));
    return out;
}

void write_safetensors_length(const char *dir, const char *name, uint64_t length,
                              const char *header, uint64_t n_data) {
    unsigned char field[8];
    const size_t n = strlen(header);
    FILE *file = fopen(path_in(dir, name), "wb");
    assert_non_null(file);
    for (int i = 0; i < 8; i++) field[i] = (unsigned char)(length >> 8 * i);
    assert_int_equal(fwrite(field, 1, 8, file), 8);
    assert_int_equal(fwrite(header, 1, n, file), n);
    assert_int_equal(fclose(file), 0);
    assert_int_equal(truncate(path_in(dir, name), (off_t)(8 + n + n_data)), 0);
}

void write_safetensors(const char *dir, const char *name, const char *header, uint64_t n_data) {
    write_safetensors_length(dir, name, strlen(header), header, n_data);
}
