/*  faults.c: makes a call of the C library fail, for dev/faults.sh. Preloaded into ./train:

        FAULT=memory LD_PRELOAD=build/faults.so ./train …

    FAULT        memory: malloc and its like, mmap. files: every call that opens, writes, syncs, renames, … a file.
    FAULT_AT     the k-th of these calls since main began fails; 0, or unset: none
    FAULT_HOW    one: that call alone. on: that call and all after it. kill: SIGKILL in place of it
    FAULT_ERROR  what a file call says in errno, a number; EIO without it. Memory says ENOMEM.
    FAULT_COUNT  a file that gets the number of calls when the program ends                                        */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

// What glibc's own malloc is called beside that name.
void *__libc_malloc(size_t n), *__libc_calloc(size_t n, size_t size), *__libc_realloc(void *p, size_t n);
void *__libc_memalign(size_t alignment, size_t n);

enum kind { NONE, MEMORY, FILES };
static enum kind failing;
static long calls, fail_at;
static int error_number = EIO, all_after, kills;

// Whether this call fails. It is called by several threads.
static int fails(enum kind kind)
{
    if (kind != failing) return 0;
    long call = __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED);
    if (!fail_at || call < fail_at || (call > fail_at && !all_after)) return 0;
    if (kills) kill(getpid(), SIGKILL);
    errno = kind == MEMORY ? ENOMEM : error_number;
    return 1;
}

void *malloc(size_t n) { return fails(MEMORY) ? NULL : __libc_malloc(n); }
void *calloc(size_t n, size_t size) { return fails(MEMORY) ? NULL : __libc_calloc(n, size); }
void *realloc(void *p, size_t n) { return fails(MEMORY) ? NULL : __libc_realloc(p, n); }
void *memalign(size_t alignment, size_t n) { return fails(MEMORY) ? NULL : __libc_memalign(alignment, n); }
void *aligned_alloc(size_t alignment, size_t n) { return memalign(alignment, n); }

void *reallocarray(void *p, size_t n, size_t size)
{
    size_t bytes;
    if (!__builtin_mul_overflow(n, size, &bytes)) return realloc(p, bytes);
    errno = ENOMEM;
    return NULL;
}

int posix_memalign(void **p, size_t alignment, size_t n)
{
    void *got = memalign(alignment, n);
    if (!got) return ENOMEM;
    *p = got;
    return 0;
}

void *mmap(void *at, size_t n, int protection, int flags, int fd, off_t offset)
{
    if (fails(MEMORY)) return MAP_FAILED;
    return (void *)syscall(SYS_mmap, at, n, protection, flags, fd, offset);
}

// The next definition of a function, the C library's.
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int open(const char *path, int flags, ...)
{
    va_list args;
    va_start(args, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(args, mode_t) : 0;
    va_end(args);
    return fails(FILES) ? -1 : REAL(open)(path, flags, mode);
}

// What the other calls have in common: the arguments are passed on, and failing is a value.
#define CALL(type, name, parameters, arguments, failed) \
    type name parameters { return fails(FILES) ? failed : REAL(name) arguments; }
CALL(FILE *, fopen, (const char *path, const char *mode), (path, mode), NULL)
CALL(int, close, (int fd), (fd), -1)
CALL(int, fsync, (int fd), (fd), -1)
CALL(int, flock, (int fd, int how), (fd, how), -1)
CALL(DIR *, opendir, (const char *path), (path), NULL)
CALL(struct dirent *, readdir, (DIR *d), (d), NULL)
CALL(int, mkdir, (const char *path, mode_t mode), (path, mode), -1)
CALL(int, rename, (const char *from, const char *to), (from, to), -1)
CALL(int, renameat2, (int a, const char *from, int b, const char *to, unsigned flags), (a, from, b, to, flags), -1)
CALL(int, unlink, (const char *path), (path), -1)
CALL(int, unlinkat, (int fd, const char *path, int flags), (fd, path, flags), -1)
CALL(int, rmdir, (const char *path), (path), -1)
CALL(char *, realpath, (const char *path, char *out), (path, out), NULL)
CALL(ssize_t, readlink, (const char *path, char *out, size_t n), (path, out, n), -1)
CALL(ssize_t, getrandom, (void *p, size_t n, unsigned flags), (p, n, flags), -1)

// A file that failed knows it: the flag that ferror() reads.
static size_t failed(FILE *f)
{
    f->_flags |= 0x20;
    return 0;
}
CALL(size_t, fread, (void *p, size_t size, size_t n, FILE *f), (p, size, n, f), failed(f))
CALL(size_t, fwrite, (const void *p, size_t size, size_t n, FILE *f), (p, size, n, f), failed(f))

// fflush and fclose write what is in the buffer: failing, they lose it, as a full disk does.
int fflush(FILE *f)
{
    int failed = f != stdout && f != stderr && fails(FILES);
    int said = errno;
    int real = REAL(fflush)(f);
    if (failed) errno = said;
    return failed ? EOF : real;
}

int fclose(FILE *f)
{
    int failed = fails(FILES), said = errno;
    int real = REAL(fclose)(f);
    if (failed) errno = said;
    return failed ? EOF : real;
}

static int (*real_main)(int, char **, char **);

static const char *setting(const char *name)
{
    const char *text = getenv(name);
    return text ? text : "";
}

static int counted_main(int argc, char **argv, char **environment)
{
    unsetenv("LD_PRELOAD");             // no child is meant
    const char *kind = setting("FAULT"), *how = setting("FAULT_HOW");
    fail_at = atol(setting("FAULT_AT"));
    all_after = !strcmp(how, "on");
    kills = !strcmp(how, "kill");
    if (*setting("FAULT_ERROR")) error_number = atoi(setting("FAULT_ERROR"));
    failing = !strcmp(kind, "memory") ? MEMORY : !strcmp(kind, "files") ? FILES : NONE;
    return real_main(argc, argv, environment);
}

// The C library's start calls main: here, a main that begins to count.
int __libc_start_main(int (*main)(int, char **, char **), int argc, char **argv, void (*init)(void), void (*fini)(void),
                      void (*rtld_fini)(void), void *stack_end)
{
    int (*start)(int (*)(int, char **, char **), int, char **, void (*)(void), void (*)(void), void (*)(void), void *);
    *(void **)&start = dlsym(RTLD_NEXT, "__libc_start_main");
    real_main = main;
    return start(counted_main, argc, argv, init, fini, rtld_fini, stack_end);
}

__attribute__((destructor)) static void write_count(void)
{
    failing = NONE;
    const char *path = setting("FAULT_COUNT");
    FILE *f = *path ? fopen(path, "w") : NULL;
    if (!f) return;
    fprintf(f, "%ld\n", calls);
    fclose(f);
}
