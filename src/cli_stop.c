/* Stop signals of a long run.  See cli.h.
 *
 * Owns the handlers and the flag they set, of which a process has one whatever its ranks are.  The
 * handlers make async-signal-safe calls only. */
#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "cli.h"

enum { GRACE_USR1_SECONDS = 25, GRACE_SECONDS = 1 };

static volatile sig_atomic_t is_asked;

static void give_up(int signal_number) {
    (void)signal_number;
    _exit(IFKV_ERR_BUSY);
}

static void ask(int signal_number) {
    if (is_asked) _exit(IFKV_ERR_BUSY);
    is_asked = 1;
    alarm(signal_number == SIGUSR1 ? GRACE_USR1_SECONDS : GRACE_SECONDS);
}

/* What the parent had ignored stays so: nohup relies on it. */
static void handle(int signal_number, void (*handler)(int)) {
    struct sigaction action, before;
    if (sigaction(signal_number, NULL, &before) != 0 || before.sa_handler == SIG_IGN) return;
    memset(&action, 0, sizeof action);
    action.sa_handler = handler;
    action.sa_flags = SA_RESTART;
    sigaction(signal_number, &action, NULL);
}

void cli_stop_watch(void) {
    handle(SIGALRM, give_up);
    handle(SIGUSR1, ask);
    handle(SIGTERM, ask);
    handle(SIGINT, ask);
    handle(SIGHUP, ask);
}

bool cli_stop_is_asked(void *unused) {
    (void)unused;
    return is_asked;
}
