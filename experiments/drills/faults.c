/* Every change that this process makes to files below a folder, counted; the n-th can fail or kill.

   Loaded with LD_PRELOAD, so that Python, torch and safetensors go through it alike. A point is a
   call that opens a file for writing, writes, truncates, syncs, renames, links, deletes, or makes
   or removes a folder. Until `faults_arm` is called nothing is counted.

   mode 0: count alone. 1: the n-th point kills the process. 2: the n-th point fails (EIO).
   3: from the n-th on the disk is full: all that needs room fails (ENOSPC).                       */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static long armed_at = 0, *count = 0; /* in memory that forks share */
static int mode = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static long *faults_shared(void) {
    if (!count)
        count = mmap(0, sizeof *count, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    return count;
}

/* Of the last process that was armed; call it once before the first fork. */
long faults_count(void) { return *faults_shared(); }

void faults_arm(const char *folder, long n, int how) {
    strncpy(root, folder, sizeof root - 1);
    *faults_shared() = 0;
    armed_at = n, mode = how;
}


/* 0, or the error with which this point fails. `room`: whether it needs room on the disk. */
static int point(int room) {
    pthread_mutex_lock(&lock);
    long number = ++*count;
    pthread_mutex_unlock(&lock);
    if (mode == 1 && number == armed_at) kill(getpid(), SIGKILL);
    if (mode == 2 && number == armed_at) return EIO;
    if (mode == 3 && number >= armed_at && room) return ENOSPC;
    return 0;
}

static int below(int folder, const char *path) {
    char place[PATH_MAX];
    if (mode < 0 || !path) return 0;
    if (path[0] == '/') return !strncmp(path, root, strlen(root));
    if (folder == AT_FDCWD) return getcwd(place, sizeof place) && !strncmp(place, root, strlen(root));
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t size = readlink(link, place, sizeof place - 1);
    if (size < 0) return 0;
    place[size] = 0;
    return !strncmp(place, root, strlen(root));
}

static int file_below(int file) {
    char link[64], place[PATH_MAX];
    if (mode < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t size = readlink(link, place, sizeof place - 1);
    if (size < 0) return 0;
    place[size] = 0;
    return !strncmp(place, root, strlen(root));
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define CHECK(counts, room) \
    if (counts) { \
        int error = point(room); \
        if (error) { errno = error; return -1; } \
    }
#define WRITES(flags) (((flags) & O_ACCMODE) != O_RDONLY || ((flags) & (O_CREAT | O_TRUNC)))

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; va_start(rest, flags); int bits = va_arg(rest, int); va_end(rest); \
        REAL(name); CHECK(WRITES(flags) && below(AT_FDCWD, path), 1) \
        return real(path, flags, bits); \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        va_list rest; va_start(rest, flags); int bits = va_arg(rest, int); va_end(rest); \
        REAL(name); CHECK(WRITES(flags) && below(folder, path), 1) \
        return real(folder, path, flags, bits); \
    }
OPENAT(openat)
OPENAT(openat64)

#define OPEN_STREAM(name) \
    FILE *name(const char *path, const char *how) { \
        REAL(name); \
        if (strpbrk(how, "wa+") && below(AT_FDCWD, path)) { \
            int error = point(1); \
            if (error) { errno = error; return NULL; } \
        } \
        return real(path, how); \
    }
OPEN_STREAM(fopen)
OPEN_STREAM(fopen64)

ssize_t write(int file, const void *data, size_t size) {
    REAL(write); CHECK(file_below(file), 1)
    return real(file, data, size);
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t offset) {
    REAL(pwrite64); CHECK(file_below(file), 1)
    return real(file, data, size, offset);
}
ssize_t writev(int file, const struct iovec *parts, int number) {
    REAL(writev); CHECK(file_below(file), 1)
    return real(file, parts, number);
}
int fsync(int file) { REAL(fsync); CHECK(file_below(file), 1) return real(file); }
int fdatasync(int file) { REAL(fdatasync); CHECK(file_below(file), 1) return real(file); }
int ftruncate64(int file, off64_t size) {
    REAL(ftruncate64); CHECK(file_below(file), 1)
    return real(file, size);
}
int rename(const char *from, const char *to) {
    REAL(rename); CHECK(below(AT_FDCWD, to), 0)
    return real(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
    REAL(renameat); CHECK(below(b, to), 0)
    return real(a, from, b, to);
}
int unlink(const char *path) { REAL(unlink); CHECK(below(AT_FDCWD, path), 0) return real(path); }
int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat); CHECK(below(folder, path), 0)
    return real(folder, path, flags);
}
int rmdir(const char *path) { REAL(rmdir); CHECK(below(AT_FDCWD, path), 0) return real(path); }
int mkdir(const char *path, mode_t bits) {
    REAL(mkdir); CHECK(below(AT_FDCWD, path), 1)
    return real(path, bits);
}
int mkdirat(int folder, const char *path, mode_t bits) {
    REAL(mkdirat); CHECK(below(folder, path), 1)
    return real(folder, path, bits);
}
int symlink(const char *to, const char *path) {
    REAL(symlink); CHECK(below(AT_FDCWD, path), 1)
    return real(to, path);
}
