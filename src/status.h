/* Reporting of errors inside the library.
 *
 * Owns the calling thread's last error and the macros every function that can fail uses.  The first
 * function that decides which error it is reports it; everyone above propagates in silence.  Knows
 * nothing of what the errors are about. */
#ifndef IFKV_SRC_STATUS_H
#define IFKV_SRC_STATUS_H

#include "error_codes.h"
#include "ifkv.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Record an error for the calling thread and return `status`.  Text is cut at 1023 bytes. */
ifkv_status ifkv_fail(ifkv_status status, int code, const char *file, int line, const char *format,
                      ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 5, 6)))
#endif
    ;

/* Mark the calling thread's last error as known to all ranks, `rank` being the lowest that failed.
 */
void ifkv_error_share(int rank);

/* Write an untrusted string for a message: printable ASCII as it is, other bytes as \xNN, cut at
 * 120 bytes with "...". buffer holds at least IFKV_QUOTE_BYTES; returns buffer. */
#define IFKV_QUOTE_BYTES 512
const char *ifkv_quote(const char *text, size_t n, char *buffer);

#define IFKV_FAIL(status, code, ...) ifkv_fail((status), (code), __FILE__, __LINE__, __VA_ARGS__)

#define IFKV_REQUIRE(cond, status, code, ...)                                                      \
    do {                                                                                           \
        if (!(cond)) return IFKV_FAIL(status, code, __VA_ARGS__);                                  \
    } while (0)

#define IFKV_TRY(call)                                                                             \
    do {                                                                                           \
        ifkv_status try_status_ = (call);                                                          \
        if (try_status_ != IFKV_OK) return try_status_;                                            \
    } while (0)

#define IFKV_TRY_GOTO(status, call, label)                                                         \
    do {                                                                                           \
        (status) = (call);                                                                         \
        if ((status) != IFKV_OK) goto label;                                                       \
    } while (0)

#ifdef __cplusplus
}
#endif
#endif
