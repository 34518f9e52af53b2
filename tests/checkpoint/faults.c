/* Preloaded into a test process: makes one chosen call of write, fsync, rename or mkdir fail.
 *
 *   FAULT_CALL  write | fsync | rename | mkdir | any
 *   FAULT_PATH  only calls whose path contains this text count
 *   FAULT_AT    which of the calls that count is hit, from 1
 *   FAULT_HOW   KILL (before it), DEAD (after it), EIO, ENOSPC, or HALF (a short write)
 *   FAULT_LOG   descriptor that gets one byte for each call that counts
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static int counted;

static ssize_t plain_write(int fd, const void *data, size_t size)
{
    static ssize_t (*next)(int, const void *, size_t);
    if (!next)
        next = (ssize_t(*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
    return next(fd, data, size);
}

/* What is to be done to this call: NULL for nothing. */
static const char *fault(const char *call, int fd, const char *path)
{
    const char *chosen = getenv("FAULT_CALL"), *part = getenv("FAULT_PATH");
    const char *at = getenv("FAULT_AT"), *log = getenv("FAULT_LOG");
    char link[64], resolved[PATH_MAX];
    if (!chosen || (strcmp(chosen, call) && strcmp(chosen, "any")))
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
    if (!at || __sync_add_and_fetch(&counted, 1) != atoi(at))
        return NULL;
    const char *how = getenv("FAULT_HOW");
    if (how && !strcmp(how, "KILL"))
        kill(getpid(), SIGKILL);
    return how;
}

static int refused(const char *how)
{
    if (!how || (strcmp(how, "EIO") && strcmp(how, "ENOSPC")))
        return 0;
    errno = strcmp(how, "EIO") ? ENOSPC : EIO;
    return 1;
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
