/* Preloaded into a process: makes one chosen system call fail, or that call and all later ones.
 *
 *   FAULT_CALL  write | fsync | rename | mkdir | open (for writing) | any
 *   FAULT_PATH  only calls whose path contains this text count
 *   FAULT_AT    which of the counted calls fails, from 1
 *   FAULT_HOW   KILL (before it), DEAD (after it), EIO, ENOSPC, EROFS, or HALF (a short write)
 *   FAULT_STAY  if set, all later counted calls fail too, as on a disk that stays full
 *   FAULT_LOG   descriptor that receives one byte per counted call: its first letter
 *
 * write includes pwrite and writev.  "any" excludes open, which only a read-only file system
 * rejects.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static int counted;

static ssize_t plain_write(int fd, const void *data, size_t size)
{
    static ssize_t (*next)(int, const void *, size_t);
    if (!next)
        next = (ssize_t(*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
    return next(fd, data, size);
}

/* The fault for this call, or NULL. */
static const char *fault(const char *call, int fd, const char *path)
{
    const char *chosen = getenv("FAULT_CALL"), *part = getenv("FAULT_PATH");
    const char *at = getenv("FAULT_AT"), *log = getenv("FAULT_LOG");
    char link[64], resolved[PATH_MAX];
    if (!chosen || (strcmp(chosen, call) && (strcmp(chosen, "any") || !strcmp(call, "open"))))
        return NULL;
    if (!path) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t length = readlink(link, resolved, sizeof resolved - 1);
        if (length < 0)
            return NULL;
        resolved[length] = 0;
        path = resolved;
    }
    if (part && !strstr(path, part))
        return NULL;
    if (log)
        plain_write(atoi(log), call, 1);
    if (!at)
        return NULL;
    int now = __sync_add_and_fetch(&counted, 1);
    if (getenv("FAULT_STAY") ? now < atoi(at) : now != atoi(at))
        return NULL;
    const char *how = getenv("FAULT_HOW");
    if (how && !strcmp(how, "KILL"))
        kill(getpid(), SIGKILL);
    return how;
}

static int refused(const char *how)
{
    static const struct { const char *name; int number; } errors[] = {
        {"EIO", EIO}, {"ENOSPC", ENOSPC}, {"EROFS", EROFS}};
    for (size_t i = 0; how && i < sizeof errors / sizeof *errors; i++)
        if (!strcmp(how, errors[i].name)) {
            errno = errors[i].number;
            return 1;
        }
    return 0;
}

static long done(const char *how, long result)
{
    if (how && !strcmp(how, "DEAD"))
        kill(getpid(), SIGKILL);
    return result;
}

#define NEXT(type, name) ((type)dlsym(RTLD_NEXT, name))

ssize_t write(int fd, const void *data, size_t size)
{
    const char *how = fault("write", fd, NULL);
    if (refused(how))
        return -1;
    if (how && !strcmp(how, "HALF"))
        size = (size + 1) / 2;
    return done(how, plain_write(fd, data, size));
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at)
{
    const char *how = fault("write", fd, NULL);
    if (refused(how))
        return -1;
    if (how && !strcmp(how, "HALF"))
        size = (size + 1) / 2;
    ssize_t (*next)(int, const void *, size_t, off64_t) =
        NEXT(ssize_t(*)(int, const void *, size_t, off64_t), "pwrite64");
    return done(how, next(fd, data, size, at));
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at)
{
    return pwrite64(fd, data, size, at);
}

ssize_t writev(int fd, const struct iovec *parts, int count)
{
    const char *how = fault("write", fd, NULL);
    if (refused(how))
        return -1;
    ssize_t (*next)(int, const struct iovec *, int) =
        NEXT(ssize_t(*)(int, const struct iovec *, int), "writev");
    return done(how, next(fd, parts, count));
}

static int opened(const char *name, int at, const char *path, int flags, mode_t mode)
{
    const char *how = (flags & O_ACCMODE) != O_RDONLY ? fault("open", -1, path) : NULL;
    if (refused(how))
        return -1;
    int (*next)(int, const char *, int, ...) = NEXT(int (*)(int, const char *, int, ...), name);
    return (int)done(how, next(at, path, flags, mode));
}

static mode_t mode_of(int flags, va_list rest)
{
    return flags & (O_CREAT | O_TMPFILE) ? (mode_t)va_arg(rest, int) : 0;
}

#define OPEN(name, next)                                     \
    int name(const char *path, int flags, ...)               \
    {                                                        \
        va_list rest;                                        \
        va_start(rest, flags);                               \
        mode_t mode = mode_of(flags, rest);                  \
        va_end(rest);                                        \
        return opened(next, AT_FDCWD, path, flags, mode);    \
    }
#define OPENAT(name)                                         \
    int name(int at, const char *path, int flags, ...)       \
    {                                                        \
        va_list rest;                                        \
        va_start(rest, flags);                               \
        mode_t mode = mode_of(flags, rest);                  \
        va_end(rest);                                        \
        return opened(#name, at, path, flags, mode);         \
    }
OPEN(open, "openat")
OPEN(open64, "openat64")
OPENAT(openat)
OPENAT(openat64)

int fsync(int fd)
{
    const char *how = fault("fsync", fd, NULL);
    return refused(how) ? -1 : (int)done(how, NEXT(int (*)(int), "fsync")(fd));
}

int rename(const char *from, const char *to)
{
    const char *how = fault("rename", -1, from);
    if (refused(how))
        return -1;
    return (int)done(how, NEXT(int (*)(const char *, const char *), "rename")(from, to));
}

int mkdir(const char *path, mode_t mode)
{
    const char *how = fault("mkdir", -1, path);
    if (refused(how))
        return -1;
    return (int)done(how, NEXT(int (*)(const char *, mode_t), "mkdir")(path, mode));
}
