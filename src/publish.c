/* Files that appear complete or not at all.  See publish.h. */
#include "publish.h"

#include "digest.h"
#include "file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define TMP_DIR ".tmp"
#define LOCK_NAME ".lock"
#define WRITE_MAX ((size_t)0x7ffff000) /* Linux moves no more in one call */

static ifkv_status os_fail(ifkv_status status, int code, const char *path, const char *what) {
    char quoted[IFKV_QUOTE_BYTES];
    return IFKV_FAIL(status, code, "%s: %s: %s", ifkv_path_quote(path, quoted), what,
                     strerror(errno));
}

static ifkv_status write_fail(const char *path, const char *what) {
    return os_fail(IFKV_ERR_IO, IFKV_E_OUT_WRITE, path, what);
}

static ifkv_status join(const char *dir, const char *name, char **path_p) {
    char quoted[IFKV_QUOTE_BYTES];
    *path_p = ifkv_path_join(dir, name);
    IFKV_REQUIRE(*path_p, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "%s: not enough memory",
                 ifkv_path_quote(dir, quoted));
    return IFKV_OK;
}

static bool write_whole(int fd, const char *data, size_t bytes) {
    while (bytes > 0) {
        const ssize_t n = write(fd, data, bytes < WRITE_MAX ? bytes : WRITE_MAX);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return false;
        data += n;
        bytes -= (size_t)n;
    }
    return true;
}

/* A name is durable only when its directory is.  A failed fsync is never repeated: the kernel has
 * already forgotten the pages. */
static ifkv_status sync_dir(const char *dir) {
    const int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return write_fail(dir, "directory not synced");
    /* Some file systems cannot sync a directory and say EINVAL: there is nothing more to do. */
    const bool is_ok = fsync(fd) == 0 || errno == EINVAL;
    const ifkv_status status = is_ok ? IFKV_OK : write_fail(dir, "directory not synced");
    close(fd);
    return status;
}

/* ---- the directory ---- */

static ifkv_status make_dir(const char *path) {
    struct stat st;
    if (mkdir(path, 0777) == 0) return IFKV_OK;
    if (errno == EEXIST && stat(path, &st) == 0 && S_ISDIR(st.st_mode)) return IFKV_OK;
    return os_fail(IFKV_ERR_CANT_CREATE, IFKV_E_OUT_CREATE, path, "directory cannot be created");
}

static const char *job_id(void) {
    const char *job = getenv("SLURM_JOB_ID");
    if (!job || !*job) return "nojob";
    for (const char *p = job; *p; p++)
        if (!((*p >= '0' && *p <= '9') || *p == '_') || p - job > 32) return "nojob";
    return job;
}

/* Hold the lock file open under flock: the kernel drops it with the process, so a lock never
 * outlives its job.  The file is unlinked by its holder, so a lock got on a file that is no longer
 * the one in the directory is a lock on nothing, and the next try begins anew. */
static ifkv_status take_lock(const char *path, int *lock_p) {
    char host[256] = "", holder[320] = "", quoted[IFKV_QUOTE_BYTES], quoted_path[IFKV_QUOTE_BYTES];
    for (int i = 0; i < 100; i++) {
        struct stat held, named;
        const int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
        if (fd < 0)
            return os_fail(IFKV_ERR_CANT_CREATE, IFKV_E_OUT_CREATE, path, "cannot be created");
        if (flock(fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
            const ssize_t n = pread(fd, holder, sizeof holder - 1, 0);
            close(fd);
            return IFKV_FAIL(IFKV_ERR_BUSY, IFKV_E_OUT_LOCKED, "%s: another job writes here: %s",
                             ifkv_path_quote(path, quoted_path),
                             ifkv_quote(holder, n > 1 ? (size_t)n - 1 : 0, quoted));
        }
        if (fstat(fd, &held) == 0 && stat(path, &named) == 0 && held.st_ino == named.st_ino &&
            held.st_dev == named.st_dev) {
            gethostname(host, sizeof host - 1);
            const int n = snprintf(holder, sizeof holder, "host %s pid %ld job %s\n", host,
                                   (long)getpid(), job_id());
            if (ftruncate(fd, 0) == 0 && write_whole(fd, holder, (size_t)n)) {
                *lock_p = fd;
                return IFKV_OK;
            }
            const ifkv_status status =
                os_fail(IFKV_ERR_CANT_CREATE, IFKV_E_OUT_CREATE, path, "cannot be written");
            close(fd);
            return status;
        }
        close(fd);
    }
    return IFKV_FAIL(IFKV_ERR_BUSY, IFKV_E_OUT_LOCKED, "%s: lock file changes too often",
                     ifkv_path_quote(path, quoted_path));
}

/* Under the lock every entry belongs to a job that is dead. */
static void empty_dir(const char *path) {
    DIR *dir = opendir(path);
    if (!dir) return;
    for (struct dirent *entry; (entry = readdir(dir));)
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            unlinkat(dirfd(dir), entry->d_name, 0);
    closedir(dir);
}

static void remove_stale(const char *path) {
    struct stat st;
    struct timespec now;
    DIR *dir = opendir(path);
    if (!dir) return;
    clock_gettime(CLOCK_REALTIME, &now);
    for (struct dirent *entry; (entry = readdir(dir));)
        if (fstatat(dirfd(dir), entry->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0 &&
            S_ISREG(st.st_mode) && st.st_mtim.tv_sec < now.tv_sec - IFKV_PUBLISH_STALE_SECONDS)
            unlinkat(dirfd(dir), entry->d_name, 0);
    closedir(dir);
}

/* Create, write and sync a file of one byte: what cannot be done now is told before hours of work.
 */
static ifkv_status probe_dir(const char *dir) {
    char *path;
    ifkv_status status = IFKV_OK;
    IFKV_TRY(ifkv_publish_path(dir, "probe", 0, &path));
    const int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd < 0 || !write_whole(fd, "?", 1) || fsync(fd) != 0)
        status = os_fail(IFKV_ERR_CANT_CREATE, IFKV_E_OUT_CREATE, path, "cannot be written");
    if (fd >= 0) {
        close(fd);
        unlink(path);
    }
    free(path);
    return status;
}

ifkv_status ifkv_publish_lock(const char *dir, int *lock_p) {
    char *tmp = NULL, *path = NULL;
    ifkv_status status;
    int lock = -1;
    IFKV_TRY(make_dir(dir));
    IFKV_TRY(join(dir, LOCK_NAME, &path));
    IFKV_TRY_GOTO(status, join(dir, TMP_DIR, &tmp), out);
    IFKV_TRY_GOTO(status, take_lock(path, &lock), out);
    IFKV_TRY_GOTO(status, make_dir(tmp), err_unlock);
    empty_dir(tmp);
    IFKV_TRY_GOTO(status, probe_dir(dir), err_unlock);
    *lock_p = lock;
    goto out;
err_unlock:
    ifkv_publish_unlock(dir, lock);
out:
    free(tmp);
    free(path);
    return status;
}

ifkv_status ifkv_publish_share(const char *dir) {
    char *tmp = NULL;
    IFKV_TRY(make_dir(dir));
    IFKV_TRY(join(dir, TMP_DIR, &tmp));
    ifkv_status status = make_dir(tmp);
    if (status == IFKV_OK) {
        remove_stale(tmp);
        status = probe_dir(dir);
    }
    free(tmp);
    return status;
}

void ifkv_publish_unlock(const char *dir, int lock) {
    if (lock < 0) return;
    char *tmp = ifkv_path_join(dir, TMP_DIR), *path = ifkv_path_join(dir, LOCK_NAME);
    if (tmp) rmdir(tmp); /* only if it is empty, as it is after success */
    if (path) unlink(path);
    close(lock);
    free(path);
    free(tmp);
}

/* ---- files ---- */

ifkv_status ifkv_publish_path(const char *dir, const char *name, int rank, char **tmp_p) {
    char quoted[IFKV_QUOTE_BYTES];
    const size_t n = strlen(dir) + strlen(name) + 96;
    char *path = malloc(n);
    IFKV_REQUIRE(path, IFKV_ERR_RESOURCE, IFKV_E_MEMORY, "%s: not enough memory",
                 ifkv_path_quote(dir, quoted));
    snprintf(path, n, "%s/" TMP_DIR "/%s.%s.%d.%ld", dir, name, job_id(), rank, (long)getpid());
    *tmp_p = path;
    return IFKV_OK;
}

static ifkv_status sync_file(const char *path) {
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return write_fail(path, "not synced");
    const ifkv_status status = fsync(fd) == 0 ? IFKV_OK : write_fail(path, "not synced");
    close(fd);
    return status;
}

/* Give a synced file its name. */
static ifkv_status move_file(const char *dir, const char *name, const char *tmp) {
    char *path;
    ifkv_status status = IFKV_OK;
    IFKV_TRY(join(dir, name, &path));
    if (rename(tmp, path) != 0)
        status = write_fail(path, "not renamed");
    else
        status = sync_dir(dir);
    free(path);
    return status;
}

/* The file as a reader will find it: it opens, and every dataset is complete. */
static ifkv_status verify_h5(const char *path) {
    ifkv_h5 *file;
    IFKV_TRY(ifkv_h5_open(path, &file));
    const ifkv_status status = ifkv_h5_check(file, false);
    ifkv_h5_close(file);
    return status;
}

ifkv_status ifkv_publish_h5(const char *dir, const char *name, const char *tmp,
                            uint64_t *digest_p) {
    uint64_t digest;
    ifkv_status status;
    IFKV_TRY_GOTO(status, sync_file(tmp), err_remove_tmp);
    IFKV_TRY_GOTO(status, verify_h5(tmp), err_remove_tmp);
    IFKV_TRY_GOTO(status, ifkv_digest_file(tmp, IFKV_E_OUT_WRITE, &digest), err_remove_tmp);
    IFKV_TRY_GOTO(status, move_file(dir, name, tmp), err_remove_tmp);
    *digest_p = digest;
    return IFKV_OK;
err_remove_tmp:
    unlink(tmp);
    return status;
}

ifkv_status ifkv_publish_h5_filled(const char *dir, const char *name, int rank,
                                   ifkv_publish_fill_fn fill, void *arg, uint64_t *digest_p) {
    ifkv_h5 *file = NULL;
    char *tmp;
    ifkv_status status;
    IFKV_TRY(ifkv_publish_path(dir, name, rank, &tmp));
    IFKV_TRY_GOTO(status, ifkv_h5_create(tmp, &file), err_free_tmp);
    status = fill(arg, file);
    if (status == IFKV_OK)
        status = ifkv_h5_finish(file);
    else
        ifkv_h5_close(file);
    if (status == IFKV_OK)
        status = ifkv_publish_h5(dir, name, tmp, digest_p);
    else
        ifkv_publish_abandon(tmp);
err_free_tmp:
    free(tmp);
    return status;
}

void ifkv_publish_abandon(const char *tmp) {
    unlink(tmp);
}

ifkv_status ifkv_publish_text(const char *dir, const char *name, const char *text, size_t bytes) {
    char *tmp;
    ifkv_status status;
    IFKV_TRY(ifkv_publish_path(dir, name, 0, &tmp));
    unlink(tmp); /* of an earlier try of this very process */
    const int fd = open(tmp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd < 0) {
        status = os_fail(IFKV_ERR_CANT_CREATE, IFKV_E_OUT_CREATE, tmp, "cannot be created");
        goto out;
    }
    const bool is_written = write_whole(fd, text, bytes) && fsync(fd) == 0;
    status = is_written ? IFKV_OK : write_fail(tmp, "not written");
    if (close(fd) != 0 && is_written) status = write_fail(tmp, "not closed");
    if (status == IFKV_OK) status = move_file(dir, name, tmp);
    if (status != IFKV_OK) unlink(tmp);
out:
    free(tmp);
    return status;
}

ifkv_status ifkv_publish_line(const char *dir, const char *name, const char *line, size_t bytes) {
    struct stat st;
    char *path;
    ifkv_status status = IFKV_OK;
    IFKV_TRY(join(dir, name, &path));
    const int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (fd < 0 || fstat(fd, &st) != 0) {
        status = os_fail(IFKV_ERR_CANT_CREATE, IFKV_E_OUT_CREATE, path, "cannot be opened");
        goto out;
    }
    ssize_t n;
    do {
        n = write(fd, line, bytes);
    } while (n < 0 && errno == EINTR);
    if (n != (ssize_t)bytes) {
        if (n >= 0) errno = ENOSPC;
        status = write_fail(path, "line not written");
        if (ftruncate(fd, st.st_size) != 0) goto out; /* the torn line is then ignored by readers */
    } else if (fsync(fd) != 0) {
        status = write_fail(path, "line not synced");
    } else if (st.st_size == 0) {
        status = sync_dir(dir);
    }
out:
    if (fd >= 0) close(fd);
    free(path);
    return status;
}

ifkv_status ifkv_publish_remove(const char *dir, const char *name) {
    char *path;
    ifkv_status status = IFKV_OK;
    IFKV_TRY(join(dir, name, &path));
    if (unlink(path) == 0)
        status = sync_dir(dir);
    else if (errno != ENOENT)
        status = write_fail(path, "not removed");
    free(path);
    return status;
}
