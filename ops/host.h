/*  ops/host.h: what every part of the program on the host needs: errors, memory, files, numbers of two bytes,
    random numbers, time, and a line of progress.                                                         */

#ifndef HOST_H
#define HOST_H
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <regex.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include "utf8.h"

// The text as it may safely be shown on a terminal, in a fresh string; NULL if out of memory, for die().
// Control characters could move the cursor or hide a line. They are written as \x1b is here, and so are bytes
// that are not UTF-8; those in `kept` stay as they are. c0: a byte below a space, or DEL. c1: U+0080 to
// U+009F, which are two bytes. turns: U+200E, U+200F, U+202A to U+202E and U+2066 to U+2069, three bytes,
// marks that turn the direction of writing.
static inline char *printable_if_room(const char *text, const char *kept)
{
    size_t bytes = strlen(text), n;
    char *out = malloc(4 * bytes + 1), *to = out;
    for (; out && *text; text += n, bytes -= n) {
        const unsigned char *c = (const unsigned char *)text;
        n = utf8_length(text, bytes);
        int c0 = n == 1 && (*c < ' ' || *c == 127) && !strchr(kept, *c);
        int c1 = n == 2 && c[0] == 0xc2 && c[1] < 0xa0;
        int at_80 = n == 3 && c[0] == 0xe2 && c[1] == 0x80;             // U+2000 to U+203F
        int at_81 = n == 3 && c[0] == 0xe2 && c[1] == 0x81;             // U+2040 to U+207F
        int turns = (at_80 && (c[2] == 0x8e || c[2] == 0x8f || (c[2] >= 0xaa && c[2] <= 0xae))) ||
                    (at_81 && c[2] >= 0xa6 && c[2] <= 0xa9);
        if (n && !c0 && !c1 && !turns) {
            memcpy(to, text, n);
            to += n;
            continue;
        }
        if (!n) n = 1;
        for (size_t i = 0; i < n; i++) to += sprintf(to, "\\x%02x", c[i]);
    }
    if (out) *to = 0;
    return out;
}

// Whether an error was told, where errors go, and whether a terminal gets lines of progress. Where several
// processes work together, run/ranks_mpi.c changes all three.
__attribute__((weak)) char told_here, *told = &told_here;
__attribute__((weak)) int errors_to = STDERR_FILENO;
__attribute__((weak)) int shows_progress = 1;

// One clear line, then a non-zero exit. What was half-written is removed by the exit handler
// (lib/directory.h). Where several threads run out of memory together, the first one speaks.
__attribute__((noreturn, format(printf, 1, 2)))
static inline void die(const char *format, ...)
{
    char *text = NULL, *line;
    va_list args;
    if (__atomic_test_and_set(told, __ATOMIC_SEQ_CST)) for (;;) pause();
    va_start(args, format);
    line = vasprintf(&text, format, args) < 0 ? NULL : printable_if_room(text, "");
    va_end(args);
    fflush(stdout);
    dprintf(errors_to, "error: %s\n", line ? line : "out of memory");
    exit(1);
}

/* All memory comes from here, the libraries' too: no caller sees a NULL. What fails inside the C library,
   fopen or opendir, says so in errno.                                                                     */

// Zeroed memory. n·size may not overflow.
static inline void *alloc(size_t n, size_t size)
{
    void *p = calloc(n ? n : 1, size);
    if (!p) die("out of memory: %zu times %zu bytes", n, size);
    return p;
}

static inline void *resize(void *p, size_t bytes)
{
    void *q = realloc(p, bytes ? bytes : 1);
    if (!q) die("out of memory: %zu bytes", bytes);
    return q;
}

// stb_ds.h is included behind this file.
#define STBDS_REALLOC(context, p, bytes) resize(p, bytes)
#define STBDS_FREE(context, p)           free(p)

// The first n bytes of a text, or all of it, in a fresh string.
static inline char *copy_bytes(const char *text, size_t n)
{
    char *copy = alloc(n + 1, 1);
    return memcpy(copy, text, n);
}

static inline char *copy_text(const char *text) { return copy_bytes(text, strlen(text)); }

// What printf would print, in a fresh string.
__attribute__((format(printf, 1, 2)))
static inline char *text_of(const char *format, ...)
{
    char *text;
    va_list args;
    va_start(args, format);
    if (vasprintf(&text, format, args) < 0) die("out of memory");
    va_end(args);
    return text;
}

static inline char *printable(const char *text, const char *kept)
{
    char *safe = printable_if_room(text, kept);
    if (!safe) die("out of memory");
    return safe;
}

// The next entry of a directory, NULL behind the last. One that cannot be read is not the last.
static inline struct dirent *next_entry(DIR *d, const char *path)
{
    errno = 0;
    struct dirent *e = readdir(d);
    if (!e && errno) die("%s: %s", path, strerror(errno));
    return e;
}

// Stops, with a reason, at what cannot be read to its end like a file. A named pipe is not even opened:
// opening it would wait for whoever writes into it.
static inline void expect_file(const char *path)
{
    struct stat st;
    char to[PATH_MAX] = "";
    if (!stat(path, &st) && S_ISREG(st.st_mode)) return;
    int error = errno;
    int linked = readlink(path, to, sizeof to - 1) > 0;
    int there = !stat(path, &st);
    if (!there && linked)
        die("%s: is a link to %s, which is not there; fetch that file, or link to where it is", path, to);
    if (!there) die("%s: %s", path, strerror(error));
    if (S_ISDIR(st.st_mode)) die("%s: is a directory, not a regular file; name a file inside it", path);
    const char *what = S_ISFIFO(st.st_mode) ? "pipe" : "device or socket";
    die("%s: is a %s, not a regular file; save what comes out of it as a file first", path, what);
}

// A link to nothing exists, too: what is wrong with it is said when it is opened.
static inline int exists(const char *path)
{
    struct stat st;
    return !lstat(path, &st);
}

// git-lfs leaves three lines of text where a large file should be.
static inline void refuse_pointer(const char *path, const char *text, size_t bytes)
{
    static const char start[] = "version https://git-lfs";
    if (bytes >= sizeof start - 1 && !memcmp(text, start, sizeof start - 1))
        die("%s: is a git-lfs pointer, not the file itself; in its folder: git lfs install && git lfs pull",
            path);
}

// The whole file in fresh memory, with a NUL behind it; *bytes is its size without that.
static inline char *read_file(const char *path, size_t *bytes)
{
    expect_file(path);
    FILE *f = fopen(path, "rb");
    struct stat st;
    if (!f || fstat(fileno(f), &st)) die("%s: %s", path, strerror(errno));
    char *text = alloc((size_t)st.st_size + 1, 1);
    *bytes = fread(text, 1, (size_t)st.st_size, f);
    if (ferror(f)) die("%s: %s", path, strerror(errno));
    fclose(f);
    refuse_pointer(path, text, *bytes);
    return text;
}

// The line of a text that `at` is in, counted from 1; *byte is its place in the line, likewise.
static inline int line_of(const char *text, const char *at, size_t *byte)
{
    int line = 1;
    const char *start = text;
    for (; text < at; text++) {
        if (*text != '\n') continue;
        line++;
        start = text + 1;
    }
    *byte = (size_t)(at - start) + 1;
    return line;
}

// Stops at the first byte that no UTF-8 text has: what follows would be lost, or read as something else.
static inline void expect_utf8(const char *path, const char *text, size_t bytes)
{
    size_t byte, n;
    if (bytes > 3 && (!memcmp(text, "\xff\xfe\0", 4) || !memcmp(text, "\0\0\xfe\xff", 4)))
        die("%s: is UTF-32, expected UTF-8; convert it: iconv -f UTF-32 -t UTF-8 %s > NEW", path, path);
    int bom = bytes > 1 && (!memcmp(text, "\xff\xfe", 2) || !memcmp(text, "\xfe\xff", 2));
    if (bom || (bytes > 3 && ((!text[0] && !text[2]) || (!text[1] && !text[3]))))
        die("%s: is UTF-16, expected UTF-8; convert it: iconv -f UTF-16 -t UTF-8 %s > NEW", path, path);
    for (const char *at = text; at < text + bytes; at += n) {
        n = *at ? utf8_length(at, (size_t)(text + bytes - at)) : 0;
        if (n) continue;
        int line = line_of(text, at, &byte);
        if (!*at)
            die("%s:%d: byte %zu of the line is NUL, which no text holds; is it text?", path, line, byte);
        die("%s:%d: byte %zu of the line is 0x%02x, which is not UTF-8; convert it, e.g. from Latin 1: "
            "iconv -f LATIN1 -t UTF-8 %s > NEW", path, line, byte, (unsigned char)*at, path);
    }
}

// dir/name in a fresh string.
static inline char *join(const char *dir, const char *name)
{
    size_t n = strlen(dir) + strlen(name) + 2;
    char *path = alloc(n, 1);
    snprintf(path, n, "%s/%s", dir, name);
    return path;
}

// Numbers of two bytes. bf16 is the upper half of a float, rounded to nearest even.
static inline float from_bf16(uint16_t h)
{
    uint32_t bits = (uint32_t)h << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline uint16_t to_bf16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    uint32_t nan = bits >> 16 | 64;                             // NaN stays NaN
    return (uint16_t)(x == x ? nearest : nan);
}

// The exponent of an f16 counts from 15, that of a float from 127. With its bits moved to a float's places,
// an f16 is 2^112 times too small, and the multiplication that mends it is exact, for subnormals too. Inf
// and NaN have all bits of the exponent set in both.
static inline float from_f16(uint16_t h)
{
    int all_set = (h & 0x7c00) == 0x7c00;
    uint32_t bits = (uint32_t)(h & 0x7fff) << 13 | (all_set ? 0x70000000u : 0);
    float x;
    memcpy(&x, &bits, 4);
    if (!all_set) x *= 0x1p112f;
    return h & 0x8000 ? -x : x;
}

// Rounded to nearest even. From 65520 on, half a step beyond the largest f16, it is Inf. Below 2^-14 an f16
// is subnormal: a multiple of 2^-24.
static inline uint16_t to_f16(float x)
{
    uint16_t sign = signbit(x) ? 0x8000 : 0;
    float a = fabsf(x);
    uint32_t bits;
    memcpy(&bits, &a, 4);
    if (!(a < 65520)) return (uint16_t)(sign | (a != a ? 0x7e00 : 0x7c00));
    if (a < 0x1p-14f) return (uint16_t)(sign | (uint16_t)lrintf(a * 0x1p24f));
    return (uint16_t)(sign | (uint16_t)(((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10)));
}

// Random numbers: splitmix64 (Steele, Lea, Flood 2014). Each tensor has its own stream, keyed by seed and
// name, so its start does not depend on what else is trained.
typedef struct { uint64_t state; } rng;

static inline uint64_t rng_next(rng *r)
{
    uint64_t z = r->state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static inline double rng_uniform(rng *r) { return (double)(rng_next(r) >> 11) * 0x1p-53; }     // [0, 1)

static inline double rng_normal(rng *r)                        // Box and Muller 1958
{
    double u = 1 - rng_uniform(r);
    double v = rng_uniform(r);
    return sqrt(-2 * log(u)) * cos(2 * 3.14159265358979323846 * v);
}

static inline rng rng_named(uint64_t seed, const char *name)
{
    rng r = {seed};
    for (; *name; name++) r.state = rng_next(&r) ^ (unsigned char)*name;
    return r;
}

// Σ term over i = 0 … n − 1, each computed once, in 64 bytes of sums: one of every sixteenth term in float,
// of every eighth in double. They are added up last. GCC makes vectors of them, whatever a processor's
// vectors hold, so the order and the bits are the same on all. (`omp simd reduction` has as many sums as a
// vector holds numbers.)
#define SUM(type, i, n, term) ({                                                                            \
    enum { sums_ = 64 / sizeof(type) };                                                                     \
    type sum_[sums_];                                                                                       \
    _Pragma("GCC unroll 16") for (int l_ = 0; l_ < sums_; l_++) sum_[l_] = 0;                               \
    int from_ = 0;                                                                                          \
    for (; from_ <= (n) - sums_; from_ += sums_) {                                                          \
        _Pragma("omp simd")                                                                                 \
        for (int l_ = 0; l_ < sums_; l_++) { const int i = from_ + l_; sum_[l_] += (term); }                \
    }                                                                                                       \
    for (int i = from_; i < (n); i++) sum_[i - from_] += (term);                                            \
    for (int l_ = 0; l_ < sums_ - 8; l_++) sum_[l_] += sum_[l_ + 8];                                        \
    for (int l_ = 0; l_ < 4; l_++) sum_[l_] += sum_[l_ + 4];                                                \
    sum_[0] + sum_[1] + (sum_[2] + sum_[3]);                                                                \
})

static inline double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// On a terminal, a line that overwrites itself; in a pipe, nothing.
__attribute__((format(printf, 1, 2)))
static inline void show(const char *format, ...)
{
    if (!shows_progress || !isatty(STDOUT_FILENO)) return;
    va_list args;
    va_start(args, format);
    fputs("\r\033[K", stdout);
    vprintf(format, args);
    fflush(stdout);
    va_end(args);
}

static inline void show_progress(const char *what, int done, int of)
{
    if (done < of) show("%s: %d of %d", what, done, of);
    else show("%s", "");
}

#endif
