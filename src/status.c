/* The calling thread's last error.  See status.h. */
#include "status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char last_text[1024];
static _Thread_local ifkv_error last;

ifkv_status ifkv_fail(ifkv_status status, int code, const char *file, int line, const char *format,
                      ...) {
    char text[sizeof last_text]; /* arguments may point into last_text */
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    memcpy(last_text, text, sizeof text);
    last.status = status;
    last.code = code;
    last.file = file;
    last.line = line;
    last.rank = -1;
    return status;
}

void ifkv_error_share(int rank) {
    last.rank = rank;
}

const ifkv_error *ifkv_last_error(void) {
    last.text = last_text;
    return &last;
}

const char *ifkv_quote(const char *text, size_t n, char *buffer) {
    static const char hex[] = "0123456789abcdef";
    const size_t shown = n < 120 ? n : 120;
    char *p = buffer;
    for (size_t i = 0; i < shown; i++) {
        const unsigned char c = (unsigned char)text[i];
        if (c >= 0x20 && c < 0x7f) {
            *p++ = (char)c;
        } else {
            *p++ = '\\';
            *p++ = 'x';
            *p++ = hex[c >> 4];
            *p++ = hex[c & 15];
        }
    }
    if (shown < n) {
        memcpy(p, "...", 3);
        p += 3;
    }
    *p = 0;
    return buffer;
}

const char *ifkv_status_name(ifkv_status status) {
    switch (status) {
    case IFKV_OK: return "ok";
    case IFKV_ERR_UNEXPECTED: return "unexpected";
    case IFKV_ERR_USAGE: return "usage";
    case IFKV_ERR_DATA: return "data";
    case IFKV_ERR_NO_INPUT: return "no input";
    case IFKV_ERR_RESOURCE: return "resource";
    case IFKV_ERR_INTERNAL: return "internal";
    case IFKV_ERR_OS: return "os";
    case IFKV_ERR_CANT_CREATE: return "cannot create";
    case IFKV_ERR_IO: return "io";
    case IFKV_ERR_BUSY: return "busy";
    case IFKV_ERR_PERMISSION: return "permission";
    case IFKV_ERR_UNSUPPORTED: return "unsupported";
    case IFKV_ERR_NUMERIC: return "numeric";
    case IFKV_ERR_PEER: return "peer";
    case IFKV_ERR_PARTIAL: return "partial";
    }
    return "unknown";
}
