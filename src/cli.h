/* The command line tool: options, and the commands as functions of a communicator.
 *
 * Reaches the engine through ifkv.h alone; requests and output files are its own business.  A
 * command runs on every rank and returns a status; main alone reports errors and decides the exit
 * code.  Only rank 0 talks. */
#ifndef IFKV_SRC_CLI_H
#define IFKV_SRC_CLI_H

#include "ifkv.h"
#include "request.h"
#include "store.h"

typedef struct cli_options {
    const char *model, *requests, *out, *run;
    const char *method, *ratio, *exchange, *score, *score_rows, *score_layers, *geometry, *hp,
        *placement, *ride, *scoring;
    const char *backend, *comm, *store;
    const char *lengths, *methods, *links, *device;
    int64_t chunk, max_new, epic_k, ranks, threads, collective_timeout, repeat, warm_up;
    uint64_t seed, random_weights;
    uint64_t store_size, store_device; /* bytes */
    bool has_random_weights, has_chunk, has_store_size;
    bool local_sink, reorder, reorder_force, refit;
    bool save_kv, save_logits, save_scores, resume, overwrite, json, quiet, verbose, project, help;
    const char **argument; /* [n_argument] what is not an option */
    int n_argument;
} cli_options;

typedef struct cli_command {
    const char *name;
    const char *summary;  /* one line */
    const char *synopsis; /* what follows the name */
    unsigned options;     /* sets of options it takes, see cli_options.c */
    int max_argument;
    bool is_parallel; /* worth a communicator */
    ifkv_status (*run)(ifkv_comm *comm, const cli_options *options);
} cli_command;

/* Sets of options. */
enum {
    CLI_MODEL = 1,
    CLI_REQUESTS = 2,
    CLI_METHOD = 4,
    CLI_OUTPUT = 8,
    CLI_RANKS = 16,
    CLI_TALK = 32,
    CLI_STORE = 64,
    CLI_BENCH = 128, /* prefill tables */
    CLI_SCALE = 256  /* lengths and links: of tables and plans */
};

extern const cli_command cli_commands[];
extern const int cli_n_command;

/* Read argv behind the command, IFKV_* and the run file into *options; flags win over environment
 * over run file.  Strings are borrowed from argv, environment or the process's life.  Errors:
 * USAGE, naming the flag and the nearest known one. */
ifkv_status cli_options_read(const cli_command *command, int argc, char **argv,
                             cli_options *options);
/* NULL if there is none; *nearest_p then names the nearest one. */
const cli_command *cli_command_find(const char *name, const char **nearest_p);
/* Help on standard output: of all commands, or of one. */
void cli_help(const cli_command *command);
/* Warn of IFKV_* variables that nothing reads. */
void cli_environment_warn(void);

/* Commands. */
ifkv_status cli_prefill(ifkv_comm *comm, const cli_options *options);
ifkv_status cli_check(ifkv_comm *comm, const cli_options *options);
ifkv_status cli_verify(ifkv_comm *comm, const cli_options *options);
ifkv_status cli_inspect(ifkv_comm *comm, const cli_options *options);
ifkv_status cli_store(ifkv_comm *comm, const cli_options *options);
ifkv_status cli_plan(ifkv_comm *comm, const cli_options *options);
ifkv_status cli_bench(ifkv_comm *comm, const cli_options *options);
ifkv_status cli_version(ifkv_comm *comm, const cli_options *options);

/* Shared by commands. */

/* Read the request file on rank 0 and parse it on every rank; ids are checked against n_vocab.
 * Collective.  The caller frees. */
ifkv_status cli_requests_load(ifkv_comm *comm, const char *path, int64_t n_vocab,
                              ifkv_request_list **list_p);
ifkv_engine_options cli_engine_options(const cli_options *options, bool check_only);
/* store: of this rank, or NULL. */
ifkv_prefill_options cli_prefill_options(const cli_options *options, const ifkv_request_item *item,
                                         const ifkv_store *store);
/* Plan every request, naming file and line of one that does not fit; *bytes_p is the largest plan.
 * Local. */
ifkv_status cli_requests_plan(ifkv_engine *engine, const cli_options *options,
                              const ifkv_request_list *list, const ifkv_store *store,
                              size_t *bytes_p);
/* Open --store on every rank; *store_p is NULL without one.  Ranks of one process share it.
 * Collective. */
ifkv_status cli_store_open(ifkv_comm *comm, const cli_options *options, ifkv_chunk_store **store_p);

/* A named link, see ifkv_link, and a file of them:
 * {"links": [{"name", "alpha_us", "gbytes_per_s", "control_us"}]}, at most CLI_MAX_LINK. */
enum { CLI_MAX_LINK = 8, CLI_LINK_NAME_BYTES = 48 };
typedef struct cli_link {
    char name[CLI_LINK_NAME_BYTES];
    ifkv_link link;
} cli_link;
ifkv_status cli_links_read(const char *path, cli_link *link, int *n_p);

/* What a device is assumed to do, as configs/devices/ has it. */
typedef struct cli_device {
    ifkv_rates fast, slow; /* floors: without passes and links */
    double passes, memory_bytes;
    double peak; /* FLOP/s that nothing exceeds; 0: not told */
} cli_device;
ifkv_status cli_device_read(const char *path, cli_device *device);

/* Let USR1, TERM, INT and HUP ask for a stop (faults 5.7): USR1, which Slurm sends before the time
 * limit, gives the request under way 25 s to reach the end of a stage, the others 1 s, as mpirun
 * kills 2 s after TERM; at the deadline, or at a second signal, the process ends with 75.  That is
 * safe at any instant, since files appear complete or not at all. */
void cli_stop_watch(void);
bool cli_stop_is_asked(void *unused);

/* A line on standard error that is rewritten as work goes on; on a terminal only, and never under a
 * launcher. */
typedef struct cli_progress {
    bool is_on;
    const char *id;
    int64_t i_request, n_request;
} cli_progress;
void cli_progress_init(cli_progress *progress, ifkv_comm *comm, const cli_options *options,
                       int64_t n_request);
void cli_progress_show(void *progress, ifkv_stage stage, int64_t done, int64_t total);
void cli_progress_clear(const cli_progress *progress);

#endif
