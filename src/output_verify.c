/* Reading finished files back: `ifkv verify` and `ifkv inspect`.  See output.h.
 *
 * A damaged file is read in a child process, because HDF5 may die of it. */
#include "output.h"

#include "digest.h"
#include "file.h"
#include "guard.h"
#include "h5.h"
#include "manifest.h"

#include <dirent.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define CHILD_BYTES ((size_t)2 << 30)
#define CHILD_SECONDS 20

/* ---- verify ---- */

typedef struct verifier {
    const char *dir;
    ifkv_output_say_fn say;
    void *arg;
    ifkv_output_counts counts;
    char first[1024];  /* text of the first damage */
    const char **name; /* [n_name] files the manifest names */
    int64_t n_name;
} verifier;

__attribute__((format(printf, 3, 4))) static void say(verifier *v, bool is_error,
                                                      const char *format, ...) {
    char line[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    if (is_error && v->counts.n_damaged++ == 0) memcpy(v->first, line, sizeof line);
    if (!is_error) v->counts.n_warning++;
    if (v->say) v->say(v->arg, is_error, line);
}

static ifkv_status read_back(ifkv_guard *guard, void *arg) {
    ifkv_h5 *file;
    (void)guard;
    IFKV_TRY(ifkv_h5_open(arg, &file));
    const ifkv_status status = ifkv_h5_check(file, true);
    ifkv_h5_close(file);
    return status;
}

/* Time to read a file of this size from slow storage. */
static ifkv_guard_limits child_limits(const char *path) {
    struct stat st;
    const off_t bytes = stat(path, &st) == 0 ? st.st_size : 0;
    return (ifkv_guard_limits){CHILD_BYTES, CHILD_SECONDS + (int)(bytes >> 23)};
}

static void verify_file(verifier *v, const char *name, uint64_t expected) {
    char *path = ifkv_path_join(v->dir, name), *answer = NULL, quoted[IFKV_QUOTE_BYTES];
    uint64_t found = expected;
    size_t bytes;
    v->counts.n_file++;
    ifkv_status status = path ? ifkv_digest_file(path, IFKV_E_OUT_VERIFY, &found)
                              : IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "not enough memory");
    if (status == IFKV_OK) {
        /* Read it all even if the digest is right: it tells which dataset, and that HDF5 can. */
        status = ifkv_guard_run(path, child_limits(path), read_back, path, &answer, &bytes);
        if (found != expected && status == IFKV_OK)
            status = IFKV_FAIL(IFKV_ERR_NUMERIC, IFKV_E_OUT_VERIFY,
                               "%s: no dataset's checksum fails, so an attribute or the structure",
                               ifkv_path_quote(path, quoted));
        if (found != expected)
            say(v, true, "%s: digest differs: got %016llx, expected %016llx",
                ifkv_last_error()->text, (unsigned long long)found, (unsigned long long)expected);
    }
    if (status != IFKV_OK && found == expected) say(v, true, "%s", ifkv_last_error()->text);
    free(answer);
    free(path);
}

static int compare_names(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* Records and KV files that no manifest line names: left by a kill between rename and manifest. */
static void find_strays(verifier *v) {
    DIR *dir = opendir(v->dir);
    char quoted[IFKV_QUOTE_BYTES], quoted_dir[IFKV_QUOTE_BYTES];
    if (!dir) return;
    qsort(v->name, (size_t)v->n_name, sizeof *v->name, compare_names);
    for (struct dirent *entry; (entry = readdir(dir));) {
        const char *name = entry->d_name;
        const size_t n = strlen(name);
        if (n < 3 || strcmp(name + n - 3, ".h5") != 0 || name[0] == '.') continue;
        if (!bsearch(&name, v->name, (size_t)v->n_name, sizeof *v->name, compare_names))
            say(v, false, "%s/%s: not in the manifest", ifkv_path_quote(v->dir, quoted_dir),
                ifkv_quote(name, n, quoted));
    }
    closedir(dir);
}

static void verify_entry(verifier *v, const ifkv_manifest_entry *entry, int64_t i_line) {
    char quoted[IFKV_QUOTE_BYTES];
    if (entry->is_torn) {
        say(v, false, "%s/" IFKV_MANIFEST_NAME ":%lld: torn last line",
            ifkv_path_quote(v->dir, quoted), (long long)i_line + 1);
    } else if (!entry->root) {
        say(v, true, "%s/" IFKV_MANIFEST_NAME ":%lld: not a manifest line",
            ifkv_path_quote(v->dir, quoted), (long long)i_line + 1);
    } else {
        v->counts.n_request++;
        for (int64_t i = 0; i < entry->n_file; i++) {
            uint64_t digest;
            v->name[v->n_name] = ifkv_manifest_file(entry, i, &digest);
            verify_file(v, v->name[v->n_name++], digest);
        }
    }
}

ifkv_status ifkv_output_verify(const char *dir, ifkv_output_say_fn say_fn, void *arg,
                               ifkv_output_counts *counts) {
    verifier v = {.dir = dir, .say = say_fn, .arg = arg};
    char quoted[IFKV_QUOTE_BYTES];
    ifkv_manifest manifest;
    int64_t n_file = 1;
    IFKV_TRY(ifkv_manifest_load(dir, &manifest));
    if (!manifest.text)
        return IFKV_FAIL(IFKV_ERR_NO_INPUT, IFKV_E_OUT_VERIFY, "%s/" IFKV_MANIFEST_NAME ": missing",
                         ifkv_path_quote(dir, quoted));
    for (int64_t i = 0; i < manifest.n; i++) n_file += manifest.entry[i].n_file;
    v.name = calloc((size_t)n_file, sizeof *v.name);
    if (!v.name) {
        ifkv_manifest_fini(&manifest);
        return IFKV_FAIL(IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "verify: not enough memory");
    }
    for (int64_t i = 0; i < manifest.n; i++) verify_entry(&v, &manifest.entry[i], i);
    find_strays(&v);
    free(v.name);
    ifkv_manifest_fini(&manifest);
    *counts = v.counts;
    IFKV_REQUIRE(v.counts.n_damaged == 0, IFKV_ERR_NUMERIC, IFKV_E_OUT_VERIFY, "%s", v.first);
    return IFKV_OK;
}

/* ---- inspect ---- */

static void copy_text(char *to, size_t bytes, const char *text) {
    char quoted[IFKV_QUOTE_BYTES];
    snprintf(to, bytes, "%s", ifkv_quote(text, strlen(text), quoted));
}

static ifkv_status describe_dataset(void *arg, ifkv_h5 *file, const char *path,
                                    const ifkv_h5_dataset *dataset) {
    ifkv_h5_summary *s = arg;
    (void)file;
    s->n_element += dataset->n_element;
    if (s->n_dataset++ >= IFKV_H5_SUMMARY_ITEMS) return IFKV_OK;
    const int64_t i = s->n_dataset - 1;
    copy_text(s->dataset[i].path, sizeof s->dataset[i].path, path);
    memcpy(s->dataset[i].type, dataset->type_name, sizeof s->dataset[i].type);
    s->dataset[i].n_dim = dataset->n_dim;
    memcpy(s->dataset[i].dim, dataset->dim, sizeof s->dataset[i].dim);
    return IFKV_OK;
}

typedef struct root_visit {
    ifkv_h5 *file;
    ifkv_h5_summary *summary;
} root_visit;

static ifkv_status describe_attribute(void *arg, bool is_link, const char *name) {
    root_visit *root = arg;
    ifkv_h5_summary *s = root->summary;
    char value[IFKV_QUOTE_BYTES];
    if (is_link) return IFKV_OK;
    IFKV_TRY(ifkv_h5_attribute_print(root->file, name, value, sizeof value));
    if (strcmp(name, "format") == 0) copy_text(s->format, sizeof s->format, value);
    if (strcmp(name, "format_version") == 0)
        copy_text(s->format_version, sizeof s->format_version, value);
    if (s->n_attribute++ >= IFKV_H5_SUMMARY_ITEMS) return IFKV_OK;
    copy_text(s->attribute[s->n_attribute - 1].name, sizeof s->attribute[0].name, name);
    snprintf(s->attribute[s->n_attribute - 1].value, sizeof s->attribute[0].value, "%s", value);
    return IFKV_OK;
}

static ifkv_status inspect(ifkv_guard *guard, void *arg) {
    ifkv_h5_summary summary = {.n_dataset = 0};
    root_visit root = {NULL, &summary};
    IFKV_TRY(ifkv_h5_open(arg, &root.file));
    ifkv_status status = ifkv_h5_group_visit(root.file, "/", describe_attribute, &root);
    if (status == IFKV_OK) status = ifkv_h5_datasets_visit(root.file, describe_dataset, &summary);
    ifkv_h5_close(root.file);
    IFKV_TRY(status);
    return ifkv_guard_write(guard, &summary, sizeof summary);
}

ifkv_status ifkv_h5_inspect(const char *path, ifkv_h5_summary *summary) {
    char *answer, *name = strdup(path);
    size_t bytes;
    IFKV_REQUIRE(name, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "inspect: not enough memory");
    const ifkv_status status = ifkv_guard_run(path, (ifkv_guard_limits){CHILD_BYTES, CHILD_SECONDS},
                                              inspect, name, &answer, &bytes);
    free(name);
    IFKV_TRY(status);
    if (bytes == sizeof *summary) memcpy(summary, answer, bytes);
    free(answer);
    IFKV_REQUIRE(bytes == sizeof *summary, IFKV_ERR_INTERNAL, IFKV_E_H5_CRASH,
                 "inspect: got an answer of %zu bytes, expected %zu", bytes, sizeof *summary);
    return IFKV_OK;
}
