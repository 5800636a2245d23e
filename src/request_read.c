/* The bytes of a request file.  See request.h. */
#include "request.h"

#include "file.h"
#include "guard.h"
#include "h5.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#define FILE_BYTES ((size_t)16 << 30) /* of all requests together */
#define CHILD_BYTES ((size_t)2 << 30) /* what reading an HDF5 file may take beyond its size */
#define CHILD_SECONDS 20              /* and one more for every 4 MiB */

typedef struct file_image {
    const char *path;
    const char *data;
    size_t bytes;
} file_image;

static ifkv_status fail_errno(ifkv_status status, const char *name, const char *what) {
    return IFKV_FAIL(status, IFKV_E_REQUEST_FILE, "%s: %s: %s", name, what, strerror(errno));
}

static ifkv_status open_file(const char *path, const char *name, int *fd_p) {
    struct stat st;
    const bool is_stdin = strcmp(path, "-") == 0;
    const int fd = is_stdin ? dup(STDIN_FILENO) : open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
    if (fd < 0)
        return fail_errno(errno == EACCES || errno == EPERM ? IFKV_ERR_PERMISSION
                                                            : IFKV_ERR_NO_INPUT,
                          name, "cannot be opened");
    if (fstat(fd, &st) == 0 && S_ISDIR(st.st_mode)) {
        close(fd);
        return IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_REQUEST_FILE, "%s: a directory, expected a file",
                         name);
    }
    *fd_p = fd;
    return IFKV_OK;
}

/* Read to the end, whatever fd is. */
static ifkv_status read_all(int fd, const char *name, char **text_p, size_t *bytes_p) {
    struct stat st;
    size_t bytes = 0, capacity = (size_t)1 << 16;
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && (uint64_t)st.st_size < FILE_BYTES)
        capacity = (size_t)st.st_size + 2; /* one read more tells the end without growing */
    char *text = malloc(capacity);
    for (ssize_t n = 1; text && n != 0;) {
        if (bytes + 1 >= capacity) {
            char *grown = capacity < FILE_BYTES ? realloc(text, capacity *= 2) : NULL;
            if (!grown) free(text);
            text = grown;
            continue;
        }
        n = read(fd, text + bytes, capacity - bytes - 1);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) {
            free(text);
            return fail_errno(IFKV_ERR_IO, name, "cannot be read");
        }
        bytes += (size_t)n;
    }
    IFKV_REQUIRE(text, IFKV_ERR_RESOURCE, IFKV_E_MEMORY,
                 "%s: not enough memory for the requests: more than %zu bytes", name, bytes);
    text[bytes] = 0;
    *text_p = text;
    *bytes_p = bytes;
    return IFKV_OK;
}

/* The same file, unchanged, for as long as it was read; and no HDF5 writer has it. */
static ifkv_status read_stable(int fd, const char *name, char **text_p, size_t *bytes_p) {
    ifkv_file_id before, after;
    char *text = NULL;
    size_t bytes = 0;
    struct stat st;
    IFKV_TRY(ifkv_file_identify(fd, name, IFKV_E_REQUEST_FILE, &before));
    IFKV_TRY(read_all(fd, name, &text, &bytes));
    ifkv_status status = ifkv_file_identify(fd, name, IFKV_E_REQUEST_FILE, &after);
    if (status == IFKV_OK && fstat(fd, &st) == 0 && S_ISREG(st.st_mode)) {
        if (!ifkv_file_id_equal(&before, &after))
            status = IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_REQUEST_FILE, "%s: changed while it was read",
                               name);
        else if (ifkv_h5_is_signature(text, bytes) && flock(fd, LOCK_SH | LOCK_NB) != 0 &&
                 errno == EWOULDBLOCK)
            status = IFKV_FAIL(IFKV_ERR_BUSY, IFKV_E_H5_OPEN,
                               "%s: in use: another program has it open for writing", name);
    }
    if (status != IFKV_OK) {
        free(text);
        return status;
    }
    *text_p = text;
    *bytes_p = bytes;
    return IFKV_OK;
}

static ifkv_status convert(ifkv_guard *guard, void *arg) {
    const file_image *image = arg;
    return ifkv_requests_h5_convert(image->path, image->data, image->bytes, ifkv_guard_write,
                                    guard);
}

static ifkv_status check_compression(const char *name, const char *text, size_t bytes) {
    const char *kind = bytes >= 2 && memcmp(text, "\x1f\x8b", 2) == 0           ? "gzip"
                       : bytes >= 4 && memcmp(text, "\x28\xb5\x2f\xfd", 4) == 0 ? "zstd"
                       : bytes >= 6 && memcmp(text,
                                              "\xfd"
                                              "7zXZ",
                                              6) == 0
                           ? "xz"
                           : NULL;
    IFKV_REQUIRE(!kind, IFKV_ERR_DATA, IFKV_E_REQUEST_FILE,
                 "%s: compressed: got %s, expected JSONL or HDF5", name, kind);
    return IFKV_OK;
}

ifkv_status ifkv_requests_read(const char *path, char **text_p, size_t *bytes_p, bool *is_h5_p) {
    char quoted[IFKV_QUOTE_BYTES], *text = NULL;
    const char *name = strcmp(path, "-") == 0 ? "<stdin>" : ifkv_path_quote(path, quoted);
    size_t bytes = 0;
    int fd = -1;
    IFKV_TRY(open_file(path, name, &fd));
    ifkv_status status = read_stable(fd, name, &text, &bytes);
    close(fd);
    IFKV_TRY(status);
    const bool is_h5 = ifkv_h5_is_signature(text, bytes);
    status = check_compression(name, text, bytes);
    if (status == IFKV_OK && is_h5) {
        file_image image = {path, text, bytes};
        const ifkv_guard_limits limits = {3 * bytes + CHILD_BYTES,
                                          CHILD_SECONDS + (int)(bytes >> 22)};
        char *answer = NULL;
        status = ifkv_guard_run(path, limits, convert, &image, &answer, &bytes);
        free(text);
        text = answer;
    } else if (status != IFKV_OK) {
        free(text);
    }
    IFKV_TRY(status);
    *text_p = text;
    *bytes_p = bytes;
    *is_h5_p = is_h5;
    return IFKV_OK;
}
