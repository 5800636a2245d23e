/* Log lines of the library: one line a message, to the sink the calling thread's host has set with
 * ifkv_log_set, else nowhere. Never used for errors: those are statuses. */
#ifndef IFKV_SRC_LOG_H
#define IFKV_SRC_LOG_H

#include "ifkv.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Format one line (no newline at the end) and hand it to the thread's sink.  Local. */
void ifkv_log(ifkv_log_level level, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 2, 3)))
#endif
    ;

#ifdef __cplusplus
}
#endif
#endif
