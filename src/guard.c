/* Run a reader of hostile input in a child process.  See guard.h. */
#include "guard.h"

#include "file.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

struct ifkv_guard {
    int answer, verdict; /* write ends */
};

/* Small enough for a pipe to take it whole. */
typedef struct verdict {
    int is_complete;
    ifkv_status status;
    int code, line;
    char text[1024];
} verdict;

ifkv_status ifkv_guard_write(void *guard, const void *data, size_t bytes) {
    const char *at = data;
    while (bytes > 0) {
        const ssize_t n = write(((ifkv_guard *)guard)->answer, at, bytes);
        if (n < 0 && errno == EINTR) continue;
        IFKV_REQUIRE(n >= 0, IFKV_ERR_OS, IFKV_E_H5_CRASH, "pipe to the parent: %s",
                     strerror(errno));
        at += n;
        bytes -= (size_t)n;
    }
    return IFKV_OK;
}

/* ---- the child ---- */

/* Address space is what the process has, which a GPU driver can make vast, plus the allowance. */
static void limit_memory(size_t allowance) {
    unsigned long long n_page = 0;
    FILE *statm = fopen("/proc/self/statm", "r");
    const int n = statm ? fscanf(statm, "%llu", &n_page) : 0;
    if (statm) fclose(statm);
    if (n != 1) return;
    const rlim_t bytes = (rlim_t)n_page * (rlim_t)sysconf(_SC_PAGESIZE) + allowance;
    const struct rlimit limit = {bytes, bytes};
    setrlimit(RLIMIT_AS, &limit);
}

/* A crash is the expected end of some inputs: it leaves no core, no backtrace of a handler that
 * the host or MPI has installed, and no abort message on stderr. */
static void calm_process(const ifkv_guard_limits *limits) {
    static const int signals[] = {SIGSEGV, SIGBUS, SIGABRT, SIGFPE,  SIGILL, SIGTERM,
                                  SIGINT,  SIGHUP, SIGUSR1, SIGXCPU, SIGPIPE};
    const struct rlimit no_core = {0, 0}, cpu = {(rlim_t)limits->seconds, (rlim_t)limits->seconds};
    sigset_t none;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++) signal(signals[i], SIG_DFL);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    setrlimit(RLIMIT_CORE, &no_core);
    setrlimit(RLIMIT_CPU, &cpu);
#if defined(__SANITIZE_ADDRESS__)
    (void)limit_memory; /* the sanitizer maps terabytes, and its reports are wanted */
#else
    const int null = open("/dev/null", O_WRONLY);
    if (null >= 0) dup2(null, STDERR_FILENO);
    limit_memory(limits->memory_bytes);
#endif
}

_Noreturn static void run_child(ifkv_guard *guard, const ifkv_guard_limits *limits,
                                ifkv_guard_fn fn, void *arg) {
    verdict v = {.is_complete = 1};
    calm_process(limits);
    v.status = fn(guard, arg);
    if (v.status != IFKV_OK) {
        const ifkv_error *error = ifkv_last_error();
        v.code = error->code;
        v.line = error->line;
        snprintf(v.text, sizeof v.text, "%s", error->text);
    }
    const ssize_t n = write(guard->verdict, &v, sizeof v);
    _exit(n == (ssize_t)sizeof v ? 0 : 1);
}

/* ---- the parent ---- */

typedef struct answer_buffer {
    char *data;
    size_t bytes, capacity;
} answer_buffer;

/* Read until the child closes its end.  False: silence, or no memory here. */
static bool read_answer(int fd, int seconds, answer_buffer *buffer) {
    for (;;) {
        struct pollfd poll_fd = {fd, POLLIN, 0};
        const int n_ready = poll(&poll_fd, 1, 1000 * seconds);
        if (n_ready < 0 && errno == EINTR) continue;
        if (n_ready <= 0) return false;
        if (buffer->bytes + 1 >= buffer->capacity) {
            const size_t capacity = buffer->capacity ? 2 * buffer->capacity : (size_t)1 << 16;
            char *data = realloc(buffer->data, capacity);
            if (!data) return false;
            buffer->data = data;
            buffer->capacity = capacity;
        }
        const ssize_t n =
            read(fd, buffer->data + buffer->bytes, buffer->capacity - buffer->bytes - 1);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return false;
        buffer->data[buffer->bytes += (size_t)n] = 0;
        if (n == 0) return true;
    }
}

/* What the end of the child means. */
static ifkv_status judge(const char *name, const verdict *v, int wait_status, bool is_late) {
    char quoted[IFKV_QUOTE_BYTES];
    ifkv_path_quote(name, quoted);
    if (v->is_complete && v->status == IFKV_OK) return IFKV_OK;
    if (v->is_complete) return ifkv_fail(v->status, v->code, __FILE__, v->line, "%s", v->text);
    if (WIFSIGNALED(wait_status))
        return IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_H5_CRASH, "%s: its reader died (signal %d)%s",
                         quoted, WTERMSIG(wait_status), is_late ? ": no answer in time" : "");
    return IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_H5_CRASH, "%s: its reader died (exit %d)", quoted,
                     WEXITSTATUS(wait_status));
}

static bool open_pipes(int answer[2], int result[2]) {
    if (pipe2(answer, O_CLOEXEC) != 0) return false;
    if (pipe2(result, O_CLOEXEC) == 0) return true;
    close(answer[0]);
    close(answer[1]);
    return false;
}

ifkv_status ifkv_guard_run(const char *name, ifkv_guard_limits limits, ifkv_guard_fn fn, void *arg,
                           char **answer_p, size_t *bytes_p) {
    int answer[2], result[2], wait_status = 0;
    answer_buffer buffer = {NULL, 0, 0};
    verdict v = {0};
    IFKV_REQUIRE(open_pipes(answer, result), IFKV_ERR_OS, IFKV_E_H5_CRASH, "no pipe: %s",
                 strerror(errno));
    const pid_t child = fork();
    if (child == 0) {
        ifkv_guard guard = {answer[1], result[1]};
        close(answer[0]);
        close(result[0]);
        run_child(&guard, &limits, fn, arg);
    }
    close(answer[1]);
    close(result[1]);
    bool is_read = child > 0 && read_answer(answer[0], limits.seconds, &buffer);
    if (child > 0 && !is_read) kill(child, SIGKILL);
    while (child > 0 && waitpid(child, &wait_status, 0) < 0 && errno == EINTR) {
    }
    if (is_read && read(result[0], &v, sizeof v) != (ssize_t)sizeof v) v.is_complete = 0;
    v.text[sizeof v.text - 1] = 0;
    close(answer[0]);
    close(result[0]);
    const ifkv_status status = child > 0 ? judge(name, &v, wait_status, !is_read)
                                         : IFKV_FAIL(IFKV_ERR_OS, IFKV_E_H5_CRASH,
                                                     "no child process: %s", strerror(errno));
    if (status != IFKV_OK) {
        free(buffer.data);
        return status;
    }
    *answer_p = buffer.data;
    *bytes_p = buffer.bytes;
    return IFKV_OK;
}
