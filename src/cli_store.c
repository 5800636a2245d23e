/* The chunk store on the command line: --store of other commands, and command store.  See cli.h. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cli.h"
#include "status.h"

/* Only one rank meets a chunk, so it speaks for all. */
static void say_warning(void *arg, const char *line) {
    const cli_options *options = arg;
    if (!options->quiet) fprintf(stderr, "ifkv: warning: %s\n", line);
}

static ifkv_status open_own(const cli_options *options, ifkv_chunk_store **store_p) {
    const ifkv_chunk_store_options store = {.dir = options->store,
                                            .max_bytes = options->store_size,
                                            .say = say_warning,
                                            .say_arg = (void *)options};
    return ifkv_chunk_store_open(&store, store_p);
}

ifkv_status cli_store_open(ifkv_comm *comm, const cli_options *options,
                           ifkv_chunk_store **store_p) {
    const bool is_shared = !strcmp(ifkv_comm_name(comm), "thread");
    const bool is_owner = !is_shared || ifkv_comm_rank(comm) == 0;
    ifkv_chunk_store *store = NULL;
    ifkv_status status = IFKV_OK;
    if (!options->store) return IFKV_OK;
    if (is_owner) status = open_own(options, &store);
    IFKV_TRY(ifkv_comm_agree(comm, status, NULL));
    if (is_shared) {
        IFKV_TRY(ifkv_comm_bcast(comm, &store, sizeof store, 0));
        if (!is_owner) ifkv_chunk_store_share(store);
        IFKV_TRY(ifkv_comm_agree(comm, IFKV_OK, NULL)); /* the first may close it from now on */
    }
    *store_p = store;
    return IFKV_OK;
}

/* ---- store ls|verify|prune DIR ---- */

static ifkv_status list(const char *dir) {
    ifkv_store_file *file;
    int64_t n, n_row = 0;
    uint64_t bytes = 0;
    IFKV_TRY(ifkv_store_list(dir, &file, &n));
    printf("%-32s %10s %14s  %s\n", "# key", "tokens", "bytes", "last use");
    for (int64_t i = 0; i < n; i++) {
        const time_t used = (time_t)file[i].used_s;
        struct tm tm;
        char when[32] = "?";
        if (gmtime_r(&used, &tm)) strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%SZ", &tm);
        printf("%.32s %10lld %14llu  %s\n", file[i].name, (long long)file[i].n_row,
               (unsigned long long)file[i].bytes, when);
        n_row += file[i].n_row > 0 ? file[i].n_row : 0;
        bytes += file[i].bytes;
    }
    printf("# %lld entries, %lld tokens, %llu bytes\n", (long long)n, (long long)n_row,
           (unsigned long long)bytes);
    free(file);
    return IFKV_OK;
}

static void say_damage(void *arg, const char *line) {
    (void)arg;
    fprintf(stderr, "ifkv: damaged: %s\n", line);
}

static ifkv_status verify(const char *dir) {
    int64_t n;
    IFKV_TRY(ifkv_store_verify(dir, say_damage, NULL, &n));
    printf("%s: %lld entries, all as they were written\n", dir, (long long)n);
    return IFKV_OK;
}

static ifkv_status prune(const char *dir, const cli_options *options) {
    uint64_t bytes;
    int64_t n;
    IFKV_REQUIRE(options->has_store_size, IFKV_ERR_USAGE, IFKV_E_ARGUMENT,
                 "store prune: got no --store-size, expected the bytes to keep");
    IFKV_TRY(ifkv_store_prune(dir, options->store_size, &n, &bytes));
    printf("%s: %lld entries removed, %llu bytes\n", dir, (long long)n, (unsigned long long)bytes);
    return IFKV_OK;
}

ifkv_status cli_store(ifkv_comm *comm, const cli_options *options) {
    IFKV_REQUIRE(options->n_argument == 2, IFKV_ERR_USAGE, IFKV_E_ARGUMENT,
                 "store: got %d arguments, expected ls, verify or prune and a directory",
                 options->n_argument);
    const char *what = options->argument[0], *dir = options->argument[1];
    char shown[IFKV_QUOTE_BYTES];
    if (ifkv_comm_rank(comm) != 0) return IFKV_OK;
    if (!strcmp(what, "ls")) return list(dir);
    if (!strcmp(what, "verify")) return verify(dir);
    if (!strcmp(what, "prune")) return prune(dir, options);
    return IFKV_FAIL(IFKV_ERR_USAGE, IFKV_E_ARGUMENT,
                     "store: got \"%s\", expected ls, verify or prune",
                     ifkv_quote(what, strlen(what), shown));
}
