/* Model directories for tests: made in a temporary directory, removed with the test.
 *
 * Owns the tiny configurations and the writing of safetensors files byte by byte; shares no code
 * with the readers under test. */
#ifndef IFKV_TESTS_MODEL_FILES_H
#define IFKV_TESTS_MODEL_FILES_H

#include "test.h"

/* config.json texts: 2 layers, d_model 8, 4 heads of 4, 2 K/V heads, d_ff 6, vocabulary 11. */
extern const char TINY_LLAMA[];
extern const char TINY_QWEN3[];

/* cmocka setup and teardown: *state is the path of an empty directory below TMPDIR. */
int dir_setup(void **state);
int dir_teardown(void **state);

/* "dir/name"; overwritten by the eighth call after it. */
const char *path_in(const char *dir, const char *name);
void write_file(const char *dir, const char *name, const void *bytes, size_t n);
void write_text(const char *dir, const char *name, const char *text);
/* text with the one occurrence of `from` replaced; the caller frees it. */
char *replaced(const char *text, const char *from, const char *to);

/* A safetensors file: length field, header text, n_data bytes of zeros (sparse). */
void write_safetensors(const char *dir, const char *name, const char *header, uint64_t n_data);
/* The same with a length field of its own. */
void write_safetensors_length(const char *dir, const char *name, uint64_t length,
                              const char *header, uint64_t n_data);

/* Lines the library logged since the last dir_setup, joined by newlines. */
extern char log_text[4096];

#endif
