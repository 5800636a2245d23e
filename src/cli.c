/* Entry point of the command line tool: start-up, communicator, error report, exit code.
 *
 * Owns policy and nothing else: which communicator a command gets, who prints an error, when a job
 * is aborted.  Initialises and finalises MPI, which the library never does. */
#include "cli.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "digest.h"
#include "h5.h"
#include "status.h"

#if IFKV_HAVE_MPI
#include <mpi.h>
#endif

const cli_command cli_commands[] = {
    {"prefill", "prefill requests and answer them",
     " --model DIR --requests FILE --out DIR [options]",
     CLI_MODEL | CLI_REQUESTS | CLI_METHOD | CLI_STORE | CLI_OUTPUT | CLI_RANKS | CLI_TALK, 0, true,
     cli_prefill},
    {"check",
     "validate model, requests and output directory; print the memory plan; compute nothing",
     " --model DIR [--requests FILE] [--out DIR] [options]",
     CLI_MODEL | CLI_REQUESTS | CLI_METHOD | CLI_STORE | CLI_OUTPUT | CLI_RANKS | CLI_TALK, 0, true,
     cli_check},
    {"verify",
     "check stored results against their digests, or recompute-everything against full prefill",
     " OUT | --model DIR --requests FILE [options]",
     CLI_MODEL | CLI_REQUESTS | CLI_METHOD | CLI_STORE | CLI_RANKS | CLI_TALK, 1, true, cli_verify},
    {"inspect", "tell what is in a model directory, request file, record or K/V file", " PATH",
     CLI_TALK, 1, false, cli_inspect},
    {"store", "list a chunk store's entries, check them, or remove those used longest ago",
     " ls|verify|prune DIR [--store-size BYTES]", CLI_STORE | CLI_TALK, 2, false, cli_store},
    {"plan", "compute memory, bytes, floors and times of P devices; run nothing",
     " --model DIR [--lengths N,...] [--ranks P] [options]",
     CLI_MODEL | CLI_METHOD | CLI_SCALE | CLI_RANKS | CLI_TALK, 0, false, cli_plan},
    {"bench", "time methods side by side, or one operation, with errors",
     " prefill|attention|gemm|elementwise --model DIR [options] | comm [options]",
     CLI_MODEL | CLI_REQUESTS | CLI_METHOD | CLI_BENCH | CLI_SCALE | CLI_OUTPUT | CLI_RANKS |
         CLI_TALK,
     1, true, cli_bench},
    {"version", "print versions of ifkv and of what it was built with", "", CLI_TALK, 0, false,
     cli_version},
};
const int cli_n_command = sizeof cli_commands / sizeof *cli_commands;

/* A closed standard stream would hand its number to the first data file opened. */
static void hold_standard_streams(void) {
    for (int fd = 0; fd <= 2; fd++)
        if (fcntl(fd, F_GETFD) < 0 && errno == EBADF &&
            open("/dev/null", fd ? O_WRONLY : O_RDONLY) < 0)
            _exit(71);
}

static const char *rank_variables[] = {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "PMI_ID"};

/* Rank 0 as far as the launcher's variables tell. */
static bool is_first(void) {
    for (size_t i = 0; i < sizeof rank_variables / sizeof *rank_variables; i++) {
        const char *rank = getenv(rank_variables[i]);
        if (rank) return !strcmp(rank, "0");
    }
    return true;
}

static bool is_launched(void) {
    for (size_t i = 0; i < sizeof rank_variables / sizeof *rank_variables; i++)
        if (getenv(rank_variables[i])) return true;
    return false;
}

/* A task of several that srun started without PMI: no rank variable tells it from its copies.  The
 * steps that are shells, where one process alone is right, have numbers from 4294967290 up. */
static bool is_copy(void) {
    const char *task = getenv("SLURM_STEP_NUM_TASKS"), *step = getenv("SLURM_STEP_ID");
    return task && step && strcmp(task, "1") != 0 && strlen(step) < 8 && !is_launched();
}

#if IFKV_HAVE_MPI
static ifkv_status mpi_start(void) {
    int provided = 0, is_up = 0;
    MPI_Initialized(&is_up);
    if (is_up) return IFKV_OK;
    IFKV_REQUIRE(MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided) == MPI_SUCCESS,
                 IFKV_ERR_RESOURCE, IFKV_E_COMM, "MPI_Init_thread failed");
    return IFKV_OK;
}
static void mpi_stop(void) {
    int is_up = 0;
    MPI_Initialized(&is_up);
    if (is_up) MPI_Finalize();
}
static void mpi_abort(int code) {
    int is_up = 0;
    MPI_Initialized(&is_up);
    if (is_up) MPI_Abort(MPI_COMM_WORLD, code);
}
#else
static ifkv_status mpi_start(void) {
    return IFKV_OK; /* opening the communicator says that it was not built */
}
static void mpi_stop(void) {
}
static void mpi_abort(int code) {
    (void)code;
}
#endif

/* One line a cause: by the lowest rank that failed where all know of it, by this one where it
 * stands alone. */
static void report_error(const ifkv_comm *comm) {
    const ifkv_error *error = ifkv_last_error();
    const int rank = comm ? ifkv_comm_rank(comm) : 0, size = comm ? ifkv_comm_size(comm) : 1;
    if (error->rank >= 0 && error->rank != rank) return;
    char host[256] = "", where[320] = "";
    if (size > 1 && gethostname(host, sizeof host - 1) == 0)
        snprintf(where, sizeof where, " [rank %d of %d host %s]", rank, size, host);
    fflush(stdout);
    fprintf(stderr, "ifkv: error: %s%s [code E%04d]\n", error->text, where, error->code);
    if (error->code == IFKV_E_COMM_LAUNCH)
        fprintf(stderr, "ifkv: hint: start the ranks by the mpirun of this MPI, or by srun "
                        "--mpi=pmix\n");
    if (error->code == IFKV_E_TENSOR_HEADER && strstr(error->text, "git-lfs"))
        fprintf(stderr, "ifkv: hint: the file is a Git LFS pointer; run `git lfs pull` in the "
                        "model directory\n");
    if (error->status == IFKV_ERR_PEER && strstr(error->text, "ncclCommInitRankConfig"))
        fprintf(stderr, "ifkv: hint: NCCL_SOCKET_IFNAME names the network interface between the "
                        "ranks, NCCL_DEBUG=INFO shows what NCCL tries\n");
}

typedef struct cli_job {
    const cli_command *command;
    const cli_options *options;
    uint64_t digest; /* of version and arguments */
} cli_job;

static void log_line(void *arg, ifkv_log_level level, const char *line) {
    (void)arg;
    fprintf(stderr, "ifkv: %s: %s\n", level == IFKV_LOG_WARN ? "warning" : "info", line);
}

/* The command on one rank. */
static ifkv_status run_rank(ifkv_comm *comm, void *arg) {
    const cli_job *job = arg;
    const int rank = ifkv_comm_rank(comm), size = ifkv_comm_size(comm);
    if (job->options->collective_timeout)
        ifkv_comm_set_timeout(comm, (double)job->options->collective_timeout);
    if (rank == 0 && !job->options->quiet)
        ifkv_log_set(log_line, NULL, job->options->verbose ? IFKV_LOG_DEBUG : IFKV_LOG_WARN);
    uint64_t *digests = malloc((size_t)size * sizeof *digests);
    IFKV_REQUIRE(digests, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "out of memory");
    ifkv_status status = ifkv_comm_gather(comm, &job->digest, sizeof job->digest, digests);
    for (int r = 1; r < size && status == IFKV_OK; r++)
        if (digests[r] != digests[0])
            status = IFKV_FAIL(
                IFKV_ERR_INTERNAL, IFKV_E_DIVERGED,
                "rank %d was started with another version or other arguments than rank 0", r);
    free(digests);
    status = ifkv_comm_agree(comm, status, NULL);
    return status == IFKV_OK ? job->command->run(comm, job->options) : status;
}

static uint64_t digest_of_start(int argc, char **argv) {
    uint64_t value = ifkv_digest_bytes(IFKV_VERSION, sizeof IFKV_VERSION);
    for (int i = 1; i < argc; i++) {
        const uint64_t pair[] = {value, ifkv_digest_bytes(argv[i], strlen(argv[i]) + 1)};
        value = ifkv_digest_bytes(pair, sizeof pair);
    }
    return value;
}

/* Which communicator: as asked for, or mpi under a launcher, thread with --ranks, else self. */
static ifkv_status comm_name(const cli_options *options, const char **name_p) {
    const char *name = options->comm ? options->comm : "auto";
    if (!strcmp(name, "auto"))
        name = is_launched() ? "mpi" : options->ranks > 0 ? "thread" : "self";
    IFKV_REQUIRE(!options->ranks || !strcmp(name, "thread"), IFKV_ERR_USAGE, IFKV_E_CONFLICT,
                 "--ranks %d: got communicator %s, expected thread; mpirun -n or srun -n set the "
                 "ranks of mpi",
                 (int)options->ranks, name);
    IFKV_REQUIRE(!is_copy(), IFKV_ERR_RESOURCE, IFKV_E_COMM_LAUNCH,
                 "srun started %s tasks and told this one no rank", getenv("SLURM_STEP_NUM_TASKS"));
    /* under a launcher the engine finds out whether NCCL can move what it computes */
    *name_p =
        strcmp(name, "mpi") || (options->comm && !strcmp(options->comm, "mpi")) ? name : "auto";
    return IFKV_OK;
}

static ifkv_status run_job(const cli_job *job, ifkv_comm **comm_p) {
    const char *name = NULL;
    IFKV_TRY(comm_name(job->options, &name));
    const bool is_mpi = !strcmp(name, "mpi") || !strcmp(name, "nccl") || !strcmp(name, "auto");
    if (!job->command->is_parallel && !is_mpi) name = "self";
    if (!strcmp(name, "thread"))
        return ifkv_comm_thread_run(job->options->ranks ? (int)job->options->ranks : 1, run_rank,
                                    (void *)job);
    if (is_mpi) IFKV_TRY(mpi_start());
    IFKV_TRY(ifkv_comm_open(name, comm_p));
    return run_rank(*comm_p, (void *)job);
}

/* Whoever read the output has seen enough, which may have been many writes ago. */
static bool is_reader_gone(void) {
    struct pollfd out = {.fd = STDOUT_FILENO, .events = POLLOUT};
    return poll(&out, 1, 0) == 1 && (out.revents & POLLERR) != 0;
}

static int finish(ifkv_status status, ifkv_comm *comm) {
    errno = 0; /* of an earlier write nothing but its failure is known */
    if (status == IFKV_OK && (fflush(stdout) || ferror(stdout)) && !is_reader_gone())
        status = IFKV_FAIL(IFKV_ERR_IO, IFKV_E_OUT_WRITE, "standard output: %s",
                           errno ? strerror(errno) : "a write failed");
    if (status != IFKV_OK) {
        const int size = comm ? ifkv_comm_size(comm) : 1;
        const bool is_alone = ifkv_last_error()->rank < 0 && size > 1;
        report_error(comm);
        /* the peers wait for this rank in a collective: end the job */
        if (is_alone) {
            mpi_abort(status);
            _exit(status);
        }
    }
    ifkv_comm_close(comm);
    mpi_stop();
    return status;
}

/* A wrong command line under a launcher: every rank finds the same error, rank 0 says it. */
static int finish_usage(ifkv_status status) {
    ifkv_comm *comm = NULL;
    const ifkv_error error = *ifkv_last_error();
    char text[1024];
    snprintf(text, sizeof text, "%s", error.text);
    if (is_launched() && mpi_start() == IFKV_OK && ifkv_comm_open("mpi", &comm) != IFKV_OK)
        comm = NULL;
    ifkv_fail(status, error.code, error.file, error.line, "%s", text);
    ifkv_error_share(0);
    return finish(status, comm);
}

int main(int argc, char **argv) {
    hold_standard_streams();
    signal(SIGPIPE, SIG_IGN); /* a closed pipe is an error of the write, */
    signal(SIGXFSZ, SIG_IGN); /* and so is a file size limit */
    ifkv_h5_process_init();
    const char *word = argc > 1 ? argv[1] : "--help", *nearest = "";
    if (!strcmp(word, "--help") || !strcmp(word, "-h") || !strcmp(word, "help")) {
        cli_help(NULL);
        return finish(IFKV_OK, NULL);
    }
    if (!strcmp(word, "--version")) word = "version";
    const cli_command *command = cli_command_find(word, &nearest);
    if (!command) {
        char shown[IFKV_QUOTE_BYTES];
        return finish_usage(IFKV_FAIL(IFKV_ERR_USAGE, IFKV_E_ARGUMENT,
                                      "unknown command \"%s\"; the nearest is %s",
                                      ifkv_quote(word, strlen(word), shown), nearest));
    }
    cli_options options;
    ifkv_status status = cli_options_read(command, argc - 2, argv + 2, &options);
    if (status != IFKV_OK) return finish_usage(status);
    if (options.help) {
        cli_help(command);
        return finish(IFKV_OK, NULL);
    }
    if (!options.quiet && is_first()) cli_environment_warn();
    const cli_job job = {command, &options, digest_of_start(argc, argv)};
    ifkv_comm *comm = NULL;
    status = run_job(&job, &comm);
    return finish(status, comm);
}
