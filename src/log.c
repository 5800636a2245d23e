/* The calling thread's log sink.  See log.h. */
#include "log.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local ifkv_log_fn sink;
static _Thread_local void *sink_arg;
static _Thread_local ifkv_log_level sink_level;

void ifkv_log_set(ifkv_log_fn fn, void *arg, ifkv_log_level max_level) {
    sink = fn;
    sink_arg = arg;
    sink_level = max_level;
}

void ifkv_log(ifkv_log_level level, const char *format, ...) {
    if (!sink || level > sink_level) return;
    char line[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    sink(sink_arg, level, line);
}
