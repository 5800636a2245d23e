/* What the tests of the stand-ins share: faults planted in a child process, whose words are read.
 */
#ifndef IFKV_TESTS_EMU_TEST_STANDIN_H
#define IFKV_TESTS_EMU_TEST_STANDIN_H

extern "C" {
#include "test.h"
}

#include <csignal>
#include <cstdlib>
#include <string>
#include <sys/wait.h>
#include <unistd.h>

/* Run `body` in a child and return what it wrote to stderr; *signal_p is what ended it, or 0. */
template <typename F> std::string in_child(F body, int *signal_p) {
    int ends[2], status = 0;
    if (pipe(ends)) abort();
    fflush(nullptr);
    const pid_t pid = fork();
    if (pid == 0) {
        dup2(ends[1], 2);
        signal(SIGABRT, SIG_DFL); /* cmocka's handlers would go on with the next test */
        signal(SIGSEGV, SIG_DFL);
        body();
        _exit(0);
    }
    close(ends[1]);
    std::string said;
    char text[512];
    for (ssize_t n; (n = read(ends[0], text, sizeof text)) > 0;) said.append(text, (size_t)n);
    close(ends[0]);
    waitpid(pid, &status, 0);
    *signal_p = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
    return said;
}

inline void assert_says(const std::string &said, const char *words) {
    if (said.find(words) == std::string::npos) fail_msg("got '%s', want '%s'", said.c_str(), words);
}

#endif
