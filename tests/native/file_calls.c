// Preloaded: asks a function before each system call that opens, writes, syncs, renames, links or removes a file.
// It gives 0, or the errno with which the call fails.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

typedef int (*file_call_hook)(const char * name, const char * path);

static file_call_hook hook = NULL;
static __thread int is_inside = 0; // the hook looks at files itself

void file_calls_watch(file_call_hook watcher) {
    hook = watcher;
}

static int fails(const char * name, const char * path) {
    if (!hook || is_inside) {
        return 0;
    }
    is_inside = 1;
    const int error = hook(name, path);
    is_inside = 0;
    errno = error ? error : errno;
    return error;
}

static int fails_fd(const char * name, int fd) {
    char link[64];
    char path[PATH_MAX];
    if (!hook || is_inside) {
        return 0;
    }
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    const ssize_t n = readlink(link, path, sizeof(path) - 1);
    if (n < 0) {
        return 0;
    }
    path[n] = 0;
    return fails(name, path);
}

#define NEXT(name) ((__typeof__(&name)) dlsym(RTLD_NEXT, #name))
#define WITH_PATH(ret, name, params, args, path, failed) \
    ret name params { return fails(#name, path) ? failed : NEXT(name) args; }
#define WITH_FD(ret, name, params, args, fd) \
    ret name params { return fails_fd(#name, fd) ? -1 : NEXT(name) args; }

static int mode_of(int flags, va_list list) {
    return flags & (O_CREAT | O_TMPFILE) ? va_arg(list, int) : 0;
}

#define OPEN(name) \
    int name(const char * path, int flags, ...) { \
        va_list list; \
        va_start(list, flags); \
        const int mode = mode_of(flags, list); \
        va_end(list); \
        return fails("open", path) ? -1 : NEXT(name)(path, flags, mode); \
    }

OPEN(open)
OPEN(open64)

WITH_PATH(FILE *, fopen,   (const char * path, const char * mode), (path, mode), path, NULL)
WITH_PATH(FILE *, fopen64, (const char * path, const char * mode), (path, mode), path, NULL)
WITH_PATH(int, rename, (const char * path, const char * to), (path, to), to, -1)
WITH_PATH(int, link,   (const char * path, const char * to), (path, to), to, -1)
WITH_PATH(int, unlink, (const char * path), (path), path, -1)
WITH_PATH(int, rmdir,  (const char * path), (path), path, -1)
WITH_PATH(int, mkdir,  (const char * path, mode_t mode), (path, mode), path, -1)
WITH_FD(ssize_t, write, (int fd, const void * data, size_t n), (fd, data, n), fd)
WITH_FD(int, fsync,     (int fd), (fd), fd)
WITH_FD(int, ftruncate64, (int fd, off64_t n), (fd, n), fd)
WITH_FD(ssize_t, copy_file_range, (int in, off64_t * at, int out, off64_t * to, size_t n, unsigned flags), (in, at, out, to, n, flags), out)
WITH_FD(ssize_t, sendfile64, (int out, int in, off64_t * at, size_t n), (out, in, at, n), out)
