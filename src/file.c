/* Regular files, read with the system calls themselves.  See file.h. */
#include "file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Linux moves at most 2^31 - 4096 bytes a call. */
#define READ_MAX ((size_t)1 << 30)

const char *ifkv_path_quote(const char *path, char *buffer) {
    const size_t n = strlen(path);
    if (n <= 120) return ifkv_quote(path, n, buffer);
    /* An escape takes four bytes, and IFKV_QUOTE_BYTES has room for 120 of them and six more. */
    memcpy(buffer, "...", 3);
    ifkv_quote(path + n - 120, 120, buffer + 3);
    return buffer;
}

char *ifkv_path_join(const char *dir, const char *name) {
    const size_t n_dir = strlen(dir), n_name = strlen(name);
    char *path = malloc(n_dir + n_name + 2);
    if (!path) return NULL;
    memcpy(path, dir, n_dir);
    path[n_dir] = '/';
    memcpy(path + n_dir + 1, name, n_name + 1);
    return path;
}

static const char *kind_name(mode_t mode) {
    if (S_ISDIR(mode)) return "a directory";
    if (S_ISFIFO(mode)) return "a FIFO";
    if (S_ISCHR(mode) || S_ISBLK(mode)) return "a device";
    if (S_ISSOCK(mode)) return "a socket";
    return "something else";
}

static ifkv_status open_failed(const char *path, int code, int error) {
    char quoted[IFKV_QUOTE_BYTES];
    ifkv_path_quote(path, quoted);
    switch (error) {
    case ENOENT:
    case ENOTDIR:
    case ELOOP:
    case ENAMETOOLONG:
        return IFKV_FAIL(IFKV_ERR_NO_INPUT, code, "%s: cannot be opened: got '%s', expected a file",
                         quoted, strerror(error));
    case EACCES:
    case EPERM:
        return IFKV_FAIL(IFKV_ERR_PERMISSION, code,
                         "%s: cannot be opened: got '%s', expected a readable file", quoted,
                         strerror(error));
    case ENXIO: /* a socket, or a device without driver */
    case ENODEV:
        return IFKV_FAIL(IFKV_ERR_DATA, code,
                         "%s: not a regular file: got '%s', expected a regular file", quoted,
                         strerror(error));
    default:
        return IFKV_FAIL(IFKV_ERR_OS, code, "%s: cannot be opened: got '%s', expected a file",
                         quoted, strerror(error));
    }
}

static void id_fill(const struct stat *st, ifkv_file_id *id) {
    id->device = (uint64_t)st->st_dev;
    id->inode = (uint64_t)st->st_ino;
    id->bytes = (uint64_t)st->st_size;
    id->mtime_s = (int64_t)st->st_mtim.tv_sec;
    id->mtime_ns = (int64_t)st->st_mtim.tv_nsec;
}

ifkv_status ifkv_file_open(const char *path, int code, int *fd_p, ifkv_file_id *id) {
    char quoted[IFKV_QUOTE_BYTES];
    struct stat st;
    int fd;
    do {
        fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
    } while (fd < 0 && errno == EINTR);
    if (fd < 0) return open_failed(path, code, errno);
    if (fstat(fd, &st) != 0) {
        const int error = errno;
        close(fd);
        return IFKV_FAIL(IFKV_ERR_IO, code, "%s: fstat failed: got '%s', expected a file",
                         ifkv_path_quote(path, quoted), strerror(error));
    }
    if (!S_ISREG(st.st_mode)) {
        close(fd);
        return IFKV_FAIL(IFKV_ERR_DATA, code,
                         "%s: not a regular file: got %s, expected a regular file",
                         ifkv_path_quote(path, quoted), kind_name(st.st_mode));
    }
    id_fill(&st, id);
    *fd_p = fd;
    return IFKV_OK;
}

ifkv_status ifkv_file_identify(int fd, const char *path, int code, ifkv_file_id *id) {
    char quoted[IFKV_QUOTE_BYTES];
    struct stat st;
    IFKV_REQUIRE(fstat(fd, &st) == 0, IFKV_ERR_IO, code, "%s: fstat failed: got '%s'",
                 ifkv_path_quote(path, quoted), strerror(errno));
    id_fill(&st, id);
    return IFKV_OK;
}

bool ifkv_file_id_equal(const ifkv_file_id *a, const ifkv_file_id *b) {
    return a->device == b->device && a->inode == b->inode && a->bytes == b->bytes &&
           a->mtime_s == b->mtime_s && a->mtime_ns == b->mtime_ns;
}

ifkv_status ifkv_file_pread(int fd, const char *path, uint64_t offset, void *to, size_t bytes,
                            int code) {
    char quoted[IFKV_QUOTE_BYTES];
    size_t done = 0;
    while (done < bytes) {
        const size_t want = bytes - done < READ_MAX ? bytes - done : READ_MAX;
        const uint64_t at = offset + done;
        const ssize_t got = pread(fd, (char *)to + done, want, (off_t)at);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0)
            return IFKV_FAIL(IFKV_ERR_IO, code,
                             "%s byte %llu: read failed: got '%s', expected %zu bytes",
                             ifkv_path_quote(path, quoted), (unsigned long long)at, strerror(errno),
                             bytes - done);
        if (got == 0)
            return IFKV_FAIL(IFKV_ERR_IO, code,
                             "%s byte %llu: short read: got the end of the file, expected %zu "
                             "more bytes",
                             ifkv_path_quote(path, quoted), (unsigned long long)at, bytes - done);
        done += (size_t)got;
    }
    return IFKV_OK;
}

ifkv_status ifkv_file_read(const char *path, uint64_t max_bytes, int code, char **text_p,
                           size_t *bytes_p) {
    char quoted[IFKV_QUOTE_BYTES];
    ifkv_status status;
    ifkv_file_id id;
    char *text = NULL;
    int fd;
    IFKV_TRY(ifkv_file_open(path, code, &fd, &id));
    if (id.bytes > max_bytes) {
        status = IFKV_FAIL(IFKV_ERR_DATA, code,
                           "%s: file too large: got %llu bytes, expected at most %llu",
                           ifkv_path_quote(path, quoted), (unsigned long long)id.bytes,
                           (unsigned long long)max_bytes);
        goto err_close;
    }
    text = malloc((size_t)id.bytes + 1);
    if (!text) {
        status =
            IFKV_FAIL(IFKV_ERR_RESOURCE, code, "%s: out of memory: expected room for %llu bytes",
                      ifkv_path_quote(path, quoted), (unsigned long long)id.bytes);
        goto err_close;
    }
    IFKV_TRY_GOTO(status, ifkv_file_pread(fd, path, 0, text, (size_t)id.bytes, code), err_free);
    close(fd);
    text[id.bytes] = 0;
    *text_p = text;
    *bytes_p = (size_t)id.bytes;
    return IFKV_OK;
err_free:
    free(text);
err_close:
    close(fd);
    return status;
}
