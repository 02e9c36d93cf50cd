/* System calls that fail on demand: a library to preload, for faulty_calls.py.
 *
 * Counts the calls about paths below a directory. The one that was asked for fails with an error
 * number, ends a read early, or is preceded by SIGINT; the others do what they always do.
 *
 *     cc -shared -fPIC -O1 -o faulty_calls.so faulty_calls.c -ldl
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FILES = 4096, ROOM = 512 };
enum { INTERRUPT = -1, END_EARLY = -2 }; /* in place of an error number */

static char root[ROOM], only[64], failed[ROOM], call_of_failure[64];
static char names[FILES][ROOM]; /* of open files below the directory; empty for others */
static atomic_int armed, count;
static int which, number, lasting;

/* Counts calls about paths that begin so, and of one name if any is given. */
void faulty_arm(const char *beginning, const char *name, int call, int error, int for_ever) {
    snprintf(root, ROOM, "%s", beginning);
    snprintf(only, sizeof only, "%s", name);
    which = call, number = error, lasting = for_ever;
    failed[0] = call_of_failure[0] = 0;
    count = 0;
    armed = 1;
}

/* Ends it; returns the calls that were counted. */
int faulty_disarm(void) {
    armed = 0;
    return count;
}

/* The call that failed and its path; empty if none did. */
const char *faulty_failure(void) {
    static char text[2 * ROOM];
    snprintf(text, sizeof text, "%s%s%s", call_of_failure, failed[0] ? " " : "", failed);
    return text;
}

/* The error number to fail with; 0 for none. */
static int fault(const char *call, const char *path) {
    if (!armed || !path || !root[0] || strncmp(path, root, strlen(root))) return 0;
    if (only[0] && strcmp(only, call)) return 0;
    int now = ++count;
    if (now < which) return 0;
    if (now > which && !(lasting && !strcmp(call, call_of_failure))) return 0;
    if (now == which) {
        snprintf(call_of_failure, sizeof call_of_failure, "%s", call);
        snprintf(failed, ROOM, "%s", path);
        if (number == INTERRUPT) kill(getpid(), SIGINT);
    }
    return number == INTERRUPT ? 0 : number;
}

static const char *path_of(int file) { return file >= 0 && file < FILES ? names[file] : ""; }

static const char *at(int directory, const char *path, char *room) {
    if (!path || path[0] == '/' || directory == AT_FDCWD) return path;
    snprintf(room, ROOM, "%s/%s", path_of(directory), path);
    return room;
}

static int opened(int file, const char *path) {
    if (file >= 0 && file < FILES) snprintf(names[file], ROOM, "%s", path ? path : "");
    return file;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)
#define FAIL(call, path, answer) \
    do { \
        int error = fault(call, path); \
        if (error > 0) { errno = error; return answer; } \
    } while (0)

/* Calls that take a path and give 0. */
#define BY_PATH(name, parameters, arguments, ...) \
    int name parameters { \
        REAL(int, #name, __VA_ARGS__); \
        FAIL(#name, path, -1); \
        return real arguments; \
    }
#define BY_FILE(name, parameters, arguments, ...) \
    int name parameters { \
        REAL(int, #name, __VA_ARGS__); \
        FAIL(#name, path_of(file), -1); \
        return real arguments; \
    }
#define BY_PLACE(name, parameters, arguments, ...) \
    int name parameters { \
        REAL(int, #name, __VA_ARGS__); \
        char room[ROOM]; \
        FAIL(#name, at(place, path, room), -1); \
        return real arguments; \
    }

BY_PATH(stat64, (const char *path, struct stat64 *s), (path, s), const char *, struct stat64 *)
BY_PATH(lstat64, (const char *path, struct stat64 *s), (path, s), const char *, struct stat64 *)
BY_PATH(mkdir, (const char *path, mode_t m), (path, m), const char *, mode_t)
BY_PATH(rmdir, (const char *path), (path), const char *)
BY_PATH(unlink, (const char *path), (path), const char *)
BY_PATH(rename, (const char *path, const char *to), (path, to), const char *, const char *)
BY_PATH(link, (const char *path, const char *to), (path, to), const char *, const char *)
BY_PATH(access, (const char *path, int mode), (path, mode), const char *, int)
BY_PATH(chmod, (const char *path, mode_t m), (path, m), const char *, mode_t)
BY_PATH(truncate64, (const char *path, off64_t n), (path, n), const char *, off64_t)
BY_PATH(statvfs64, (const char *path, struct statvfs64 *s), (path, s), const char *,
        struct statvfs64 *)
BY_FILE(fstat64, (int file, struct stat64 *s), (file, s), int, struct stat64 *)
BY_FILE(fsync, (int file), (file), int)
BY_FILE(fchmod, (int file, mode_t m), (file, m), int, mode_t)
BY_FILE(flock, (int file, int how), (file, how), int, int)
BY_FILE(ftruncate64, (int file, off64_t n), (file, n), int, off64_t)
BY_PLACE(unlinkat, (int place, const char *path, int how), (place, path, how), int, const char *,
         int)
BY_PLACE(fstatat64, (int place, const char *path, struct stat64 *s, int how),
         (place, path, s, how), int, const char *, struct stat64 *, int)
BY_PLACE(linkat, (int place, const char *path, int other, const char *to, int how),
         (place, path, other, to, how), int, const char *, int, const char *, int)
BY_PLACE(renameat2, (int place, const char *path, int other, const char *to, unsigned how),
         (place, path, other, to, how), int, const char *, int, const char *, unsigned)

int posix_fallocate64(int file, off64_t at, off64_t size) {
    REAL(int, "posix_fallocate64", int, off64_t, off64_t);
    int error = fault("posix_fallocate64", path_of(file));
    return error > 0 ? error : real(file, at, size);
}

ssize_t readlink(const char *path, char *out, size_t size) {
    REAL(ssize_t, "readlink", const char *, char *, size_t);
    FAIL("readlink", path, -1);
    return real(path, out, size);
}

off64_t lseek64(int file, off64_t to, int how) {
    REAL(off64_t, "lseek64", int, off64_t, int);
    FAIL("lseek64", path_of(file), -1);
    return real(file, to, how);
}

#define READS(name, parameters, arguments, ...) \
    ssize_t name parameters { \
        REAL(ssize_t, #name, __VA_ARGS__); \
        int error = fault(#name, path_of(file)); \
        if (error == END_EARLY) return 0; \
        if (error > 0) { errno = error; return -1; } \
        return real arguments; \
    }

READS(read, (int file, void *out, size_t n), (file, out, n), int, void *, size_t)
READS(pread64, (int file, void *out, size_t n, off64_t at), (file, out, n, at), int, void *, size_t,
      off64_t)
READS(preadv64v2, (int file, const struct iovec *out, int n, off64_t at, int how),
      (file, out, n, at, how), int, const struct iovec *, int, off64_t, int)
READS(preadv64, (int file, const struct iovec *out, int n, off64_t at), (file, out, n, at), int,
      const struct iovec *, int, off64_t)

ssize_t write(int file, const void *data, size_t n) {
    REAL(ssize_t, "write", int, const void *, size_t);
    FAIL("write", path_of(file), -1);
    return real(file, data, n);
}

ssize_t pwrite64(int file, const void *data, size_t n, off64_t to) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    FAIL("pwrite64", path_of(file), -1);
    return real(file, data, n, to);
}

int open64(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;
    va_end(more);
    REAL(int, "open64", const char *, int, ...);
    FAIL("open64", path, -1);
    return opened(real(path, flags, mode), path);
}

int openat64(int place, const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;
    va_end(more);
    REAL(int, "openat64", int, const char *, int, ...);
    char room[ROOM];
    const char *whole = at(place, path, room);
    FAIL("openat64", whole, -1);
    return opened(real(place, path, flags, mode), whole);
}

int close(int file) {
    REAL(int, "close", int);
    int error = fault("close", path_of(file));
    opened(file, "");
    int answer = real(file);
    if (error > 0) { errno = error; return -1; }
    return answer;
}

DIR *opendir(const char *path) {
    REAL(DIR *, "opendir", const char *);
    FAIL("opendir", path, NULL);
    DIR *directory = real(path);
    if (directory) opened(dirfd(directory), path);
    return directory;
}

struct dirent64 *readdir64(DIR *directory) {
    REAL(struct dirent64 *, "readdir64", DIR *);
    FAIL("readdir64", path_of(dirfd(directory)), NULL);
    return real(directory);
}

int closedir(DIR *directory) {
    REAL(int, "closedir", DIR *);
    opened(dirfd(directory), "");
    return real(directory);
}
