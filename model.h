/*  model.h: Llama2 by hand.

    Read in this order:
      1  conventions and types          what a matrix is, where it lies
      2  the op contract                the ~20 operations everything is made of
      3  errors, memory                 (from here on: plain C, not read by train.cu)
      4  config.json
      5  safetensors in
      6  the model and its memory       every tensor is one line, walked twice
      7  forward and backward           Llama2, and the loss
      8  safetensors out

    Conventions. A token is a row: x is (N, in), N = all tokens of a micro-batch. A weight W is (out, in) as in
    Hugging Face, so y = x Wᵀ. Outputs come first in every signature. The forward pass writes (=), the backward
    pass accumulates (+=). The gradient of `name` is `dname`. Shapes stand in comments as (rows, cols).      */

#ifndef MODEL_H
#define MODEL_H
#include <stddef.h>

/* ---- 1  types -------------------------------------------------------------------------------------------- */

/* `real` is what activations are stored in, `wide` what trains: adapters, gradients, AdamW's moments.
   Both are float; finite differences need double (-DDOUBLE). A GPU's real is bf16 (-DBFLOAT16): only its ops compute with it. */
#if defined DOUBLE
typedef double real, wide;
#elif defined BFLOAT16 && defined __cplusplus
typedef __nv_bfloat16 real;
typedef float wide;
#elif defined BFLOAT16
typedef unsigned short real;
typedef float wide;
#else
typedef float real, wide;
#endif

enum dtype { F32, F64, BF16, F16, DTYPES };
#define TYPE_OF(type) (sizeof(type) == 8 ? F64 : sizeof(type) == 4 ? F32 : BF16)

/* Memory of the device (the CPU's own, or a GPU's) has its own pointer type. Under clang, `make seam` compiles
   model, adapters and loop with it marked noderef: whoever reads it outside an op is told by the compiler.   */
#if defined __clang__ && defined SEAM
#define noderef __attribute__((noderef))
#else
#define noderef
#endif
typedef void noderef *dev;
typedef int noderef *dev_ints;

/* A matrix, or `batch` matrices of one shape, somewhere in device memory. It is a view: copying it copies no data.
   p == NULL means "not wanted": an op asked to write it does nothing. That is how a frozen weight has no gradient. */
typedef struct {
    dev p;
    enum dtype type;
    int rows, cols;
    size_t ld;                  // elements from one row to the next
    int batch;                  // how many matrices …
    size_t stride;              // … and the elements from one to the next
    size_t room;                // elements from p to the end of its memory, which no view may leave
} mat;

/* One sequence: query rows q … q+nq-1 look at key rows k … k+nk-1, causally; the last query sees every key.
   Training: nq = nk = the row's length. Decoding: nq = 1 and nk = what the cache holds.                     */
typedef struct { int q, nq, k, nk; } span;

enum mode { SET, ADD };         // out = …  or  out += …

// The sizes of a run that decide what ops need beside their arguments.
typedef struct {
    size_t weight, trained;     // numbers in the largest matrix of the base, and of what trains: products may convert them
    int heads, keys, tokens;    // of attention's keys: heads, and the longest sequence; tokens of a micro-batch
    int train;                  // there is a backward pass
    size_t fetched;             // the most logits that leave the device at once
} needs;

/* ---- 2  the op contract ------------------------------------------------------------------------------------
   train.c defines these for the CPU and train.cu for a GPU; which one runs is decided by the linker. Shapes come
   with the matrices and are checked by the ops. Every op is deterministic: same input, same bits, any threads. */

#ifdef __cplusplus
extern "C" {
#endif
// the device, and its memory
const char *dev_name(void);
void     dev_memory(double *used, double *all);                       // bytes of the device
int      dev_tf32(void);                                              // allows products of floats to round their factors to 10 bits; 0 where that cannot be
dev      dev_alloc(size_t bytes);                                     // zeroed, 64-byte aligned; NULL if there is none
void     dev_free(dev p);
size_t   dev_reserve(needs n, int take);                              // bytes of work space of the ops' own; take: allocates them, so that no step allocates
mat      dev_weight(mat host);                                        // a mapped weight, made usable by the ops; stays in its dtype
void     dev_weight_free(mat w);
void     put(mat dst, const void *src, enum dtype type);              // dst = contiguous host data, converted
void     get(wide *dst, mat src);                                     // contiguous host data = src, converted
void     put_ints(dev_ints dst, const int *src, size_t n);
void     zero(mat x);                                                 // x = 0
void     copy(mat y, mat x);                                          // y = x, converted
void     add(mat y, mat x, double scale);                             // y += scale x

// products; each takes a batch where its arguments have one; a batch of 1 is repeated
void     matmul_nt(mat y, mat x, mat w, double scale, enum mode m);   // y (N,out) = scale x (N,in)  w (out,in)ᵀ
void     matmul_nn(mat y, mat x, mat w, double scale, enum mode m);   // y (N,in)  = scale x (N,out) w (out,in)
void     matmul_tn(mat y, mat x, mat w, double scale, enum mode m);   // y (out,in) = scale x (N,out)ᵀ w (N,in)

// Llama2
void     embedding_forward(mat out, mat table, dev_ints ids);         // out[n] = table[ids[n]]
void     embedding_backward(mat dtable, mat dout, dev_ints ids);      // dtable[ids[n]] += dout[n]
// RMSNorm and SwiGLU make what linear layers read. With the row still at hand, `sum` becomes Bone's sum over its shards (shard_sum, below) and
// `residual` a copy of x, each where it has memory. Onto that copy the next product adds itself (ADD): the residual add has no pass of its own.
void     rmsnorm_forward(mat out, mat sum, mat residual, mat x, mat w, double eps);    // out = w x / rms(x), row by row
void     rmsnorm_backward(mat dx, mat dw, mat dout, mat x, mat w, double eps);
void     rope(mat x, dev_ints pos, mat table, int sign);              // rotate each head's halves by ±pos·θ; -1 is the backward
void     attention_forward(mat out, mat lse, mat q, mat k, mat v, int head_dim, const span *s, int spans);
void     attention_backward(mat dq, mat dk, mat dv, mat dout, mat q, mat k, mat v, mat out, mat lse,
                            int head_dim, const span *s, int spans);
void     swiglu_forward(mat out, mat sum, mat gate, mat up);          // out = silu(gate) up
void     swiglu_backward(mat dgate, mat dup, mat dout, mat gate, mat up);
void     cross_entropy(mat losses, mat logits, dev_ints labels, double scale);  // losses = …; scale ≠ 0: logits = scale dlogits

// adapters
void     shard_sum(mat s, mat x);                                     // s[n,c] = Σ_j x[n, j·r + c], r = s.cols; a short last shard counts as zero-padded
void     shard_tile(mat x, mat s);                                    // x[n, j·r + c] += s[n,c]: the transpose of shard_sum, hence its backward
void     tiled_identity(mat e);                                       // e[i,j] = 1 where i - j is a multiple of the shorter side, else 0
void     broadcast_mul(mat y, mat x, mat g, double scale, enum mode m);  // y = scale x ⊙ g; g is (1, cols) or (rows, 1) and repeated along the other side
void     broadcast_dot(mat g, mat x, mat y, double scale, enum mode m);  // g = scale Σ x ⊙ y along the side where g is 1: the backward for broadcast_mul's g
void     magnitude_forward(mat gain, mat m, mat squares);             // gain = m / √squares, number by number; 1 where squares is 0
void     magnitude_backward(mat dm, mat dsquares, mat dgain, mat m, mat squares);   // dm += …, dsquares = …

// training
double   sum_of_squares(mat x);
void     adamw(mat w, mat dw, mat m, mat v, double lr, double decay, double grad_scale, int t);  // t = 1, 2, …
#ifdef __cplusplus
}
#else

/* ---- 3  errors, memory ------------------------------------------------------------------------------------- */

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <regex.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cjson/cJSON.h>
#include <stb/stb_ds.h>

// tokenizer.c: how many bytes the character in front has, 0 if it is not UTF-8.
size_t text_character(const char *text, size_t bytes);

// The text as a terminal may have it, in a fresh string: control characters, which could move the cursor or hide a
// line, and bytes that are not UTF-8 are written as \x1b. Those in `kept` stay as they are. NULL if out of memory.
static char *printable(const char *text, const char *kept)
{
    size_t bytes = strlen(text), n;
    char *out = malloc(4 * bytes + 1), *to = out;
    for (; out && *text; text += n, bytes -= n) {
        const unsigned char *c = (const unsigned char *)text;
        n = text_character(text, bytes);
        int c0 = n == 1 && (*c < ' ' || *c == 127) && !strchr(kept, *c), c1 = n == 2 && c[0] == 0xc2 && c[1] < 0xa0;
        if (n && !c0 && !c1) { memcpy(to, text, n); to += n; continue; }
        if (!n) n = 1;
        for (size_t i = 0; i < n; i++) to += sprintf(to, "\\x%02x", c[i]);
    }
    if (out) *to = 0;
    return out;
}

// One clear line, then a non-zero exit. What was half-written is removed by the exit handler (section 8).
__attribute__((noreturn, format(printf, 1, 2)))
static void die(const char *format, ...)
{
    char *text = NULL, *line;
    va_list args;
    va_start(args, format);
    line = vasprintf(&text, format, args) < 0 ? NULL : printable(text, "");
    va_end(args);
    fflush(stdout);
    fprintf(stderr, "error: %s\n", line ? line : "out of memory");
    exit(1);
}

// Zeroed memory, checked. n·size may not overflow.
static void *alloc(size_t n, size_t size)
{
    void *p = calloc(n ? n : 1, size);
    if (!p) die("out of memory: %zu times %zu bytes", n, size);
    return p;
}

// Stops, with a reason, at what cannot be read to its end like a file. A named pipe is not even opened: that would wait
// for whoever writes into it.
static void expect_file(const char *path)
{
    struct stat st;
    char to[PATH_MAX] = "";
    if (!stat(path, &st) && S_ISREG(st.st_mode)) return;
    int error = errno, linked = readlink(path, to, sizeof to - 1) > 0;
    int there = !stat(path, &st);
    if (!there && linked) die("%s: is a link to %s, which is not there; fetch that file, or link to where it is", path, to);
    if (!there) die("%s: %s", path, strerror(error));
    if (S_ISDIR(st.st_mode)) die("%s: is a directory, not a regular file; name a file inside it", path);
    const char *what = S_ISFIFO(st.st_mode) ? "pipe" : "device or socket";
    die("%s: is a %s, not a regular file; save what comes out of it as a file first", path, what);
}

// git-lfs leaves three lines of text where a large file should be.
static void refuse_pointer(const char *path, const char *text, size_t bytes)
{
    static const char start[] = "version https://git-lfs";
    if (bytes >= sizeof start - 1 && !memcmp(text, start, sizeof start - 1))
        die("%s: is a git-lfs pointer, not the file itself; in its folder: git lfs install && git lfs pull", path);
}

static char *read_file(const char *path, size_t *bytes)
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
static int line_of(const char *text, const char *at, size_t *byte)
{
    int line = 1;
    const char *start = text;
    for (; text < at; text++) if (*text == '\n') line++, start = text + 1;
    *byte = (size_t)(at - start) + 1;
    return line;
}

// Stops at the first byte that no UTF-8 text has: what follows would be lost, or read as something else.
static void expect_utf8(const char *path, const char *text, size_t bytes)
{
    size_t byte, n;
    int bom = bytes > 1 && (!memcmp(text, "\xff\xfe", 2) || !memcmp(text, "\xfe\xff", 2));
    if (bom || (bytes > 3 && ((!text[0] && !text[2]) || (!text[1] && !text[3]))))
        die("%s: is UTF-16, expected UTF-8; convert it: iconv -f UTF-16 -t UTF-8 %s > NEW", path, path);
    for (const char *at = text; at < text + bytes; at += n) {
        n = *at ? text_character(at, (size_t)(text + bytes - at)) : 0;
        if (n) continue;
        int line = line_of(text, at, &byte);
        if (!*at) die("%s:%d: byte %zu of the line is NUL, which no text holds; is it text?", path, line, byte);
        die("%s:%d: byte %zu of the line is 0x%02x, which is not UTF-8; convert it, e.g. from Latin 1: "
            "iconv -f LATIN1 -t UTF-8 %s > NEW", path, line, byte, (unsigned char)*at, path);
    }
}

// dir/name in a fresh string.
static char *join(const char *dir, const char *name)
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
    if (x != x) return (uint16_t)(bits >> 16 | 64);            // NaN stays NaN
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float from_f16(uint16_t h)
{
    uint32_t bits = (uint32_t)(h & 0x7fff) << 13 | ((h & 0x7c00) == 0x7c00 ? 0x70000000u : 0);   // Inf and NaN keep a full exponent
    float x;
    memcpy(&x, &bits, 4);
    if ((h & 0x7c00) != 0x7c00) x *= 0x1p112f;                 // the exponents' zeros are 112 apart; exact for subnormals too
    return h & 0x8000 ? -x : x;
}

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

// Random numbers: splitmix64 (Steele, Lea, Flood 2014). Each tensor has its own stream, keyed by seed and name, so its
// start does not depend on what else is trained.
typedef struct { uint64_t state; } rng;

static uint64_t rng_next(rng *r)
{
    uint64_t z = r->state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static double rng_uniform(rng *r) { return (double)(rng_next(r) >> 11) * 0x1p-53; }        // [0, 1)
static double rng_normal(rng *r)                                                         // Box and Muller 1958
{
    double u = 1 - rng_uniform(r), v = rng_uniform(r);
    return sqrt(-2 * log(u)) * cos(2 * 3.14159265358979323846 * v);
}

static rng rng_named(uint64_t seed, const char *name)
{
    rng r = {seed};
    for (; *name; name++) r.state = rng_next(&r) ^ (unsigned char)*name;
    return r;
}

static const struct { const char *name; size_t size; } dtypes[DTYPES] = {{"F32", 4}, {"F64", 8}, {"BF16", 2}, {"F16", 2}};

// n numbers to a dtype. out may be x itself: no dtype is wider than `wide` in a build that writes it.
static void narrow(void *out, enum dtype type, const wide *x, size_t n)
{
    size_t size = dtypes[type].size;
    for (size_t i = 0; i < n; i++) {
        float f = (float)x[i];
        double d = (double)x[i];
        uint16_t h = type == BF16 ? to_bf16(f) : type == F16 ? to_f16(f) : 0;
        memcpy((char *)out + i * size, type == F32 ? (void *)&f : type == F64 ? (void *)&d : &h, size);
    }
}

// x as a dtype holds it.
static double rounded(double x, enum dtype type)
{
    if (type == F64) return x;
    float f = (float)x;
    return (double)(type == F32 ? f : type == BF16 ? from_bf16(to_bf16(f)) : from_f16(to_f16(f)));
}

static inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
static inline size_t elements(mat m) { return (size_t)m.batch * (size_t)m.rows * (size_t)m.cols; }

// Views of a matrix. None leaves the memory of the matrix it was taken from: a wrong plan ends here, not in somebody else's numbers.
static inline mat view(mat m)
{
    size_t end = elements(m) ? (size_t)(m.batch - 1) * m.stride + (size_t)(m.rows - 1) * m.ld + (size_t)m.cols : 0;
    if (m.p && end > m.room) die("a view of %d times (%d, %d) needs %zu numbers, its memory has %zu", m.batch, m.rows, m.cols, end, m.room);
    return m;
}

static inline mat offset(mat m, size_t n)                      // begins n elements later
{
    if (!m.p) return m;
    if (n > m.room) die("a view begins at number %zu of a memory that has %zu", n, m.room);
    m.p = (char noderef *)m.p + n * dtypes[m.type].size;
    m.room -= n;
    return m;
}

static inline mat rows_of(mat m, int first, int n)             // rows first … first+n-1
{
    m = offset(m, (size_t)first * m.ld);
    m.rows = n;
    return view(m);
}

static inline mat column_blocks(mat m, int r)                  // (N, in) as in/r matrices (N, r) side by side
{
    m.batch = m.cols / r;
    m.cols = r;
    m.stride = (size_t)r;
    return view(m);
}

static inline mat shaped(mat m, int batch, int rows, int cols) // the same memory, front to back, in another shape
{
    m.batch = batch;
    m.rows = rows;
    m.cols = cols;
    m.ld = (size_t)cols;
    m.stride = (size_t)rows * (size_t)cols;
    return view(m);
}

/* ---- 4  config.json ---------------------------------------------------------------------------------------- */

enum { MOST_STOPS = 16 };
typedef struct {
    int dim, hidden, layers, heads, kv_heads, head_dim, vocab, max_pos, tied;
    double eps, theta;
    double init_range;          // σ of random weights
    int stop[MOST_STOPS], stops; // tokens that end a text, besides the tokenizer's EOS
    char *text;                 // the file itself: a merged model is written with the same config
} config;

/* A strict pass in front of cJSON, which reads broken escapes, lone surrogates, control characters and keys that occur
   twice without a word, and numbers of 63 digits at most. The pass finds where a value ends, stops at what is wrong in
   it, and notes where keys and numbers stand. NaN, Infinity and -Infinity, which Python writes, do no harm in a field
   that nobody reads.                                                                                              */
typedef struct { const char *at; size_t n; } place;
typedef struct {
    const char *path, *text;    // the file, and its text, which is UTF-8
    const char *at, *end;       // how far it is read; where to stop
    int finite, depth;          // finite: NaN and its like are refused
    place *places;              // of every key (n is 0) and number of the value, in their order
} json_reader;

__attribute__((noreturn, format(printf, 2, 3)))
static void json_wrong(const json_reader *r, const char *format, ...)
{
    char what[120];
    size_t byte;
    int line = line_of(r->text, r->at, &byte);
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    die("%s:%d: not valid JSON, at byte %zu of the line: %s", r->path, line, byte, what);
}

static void json_expected(const json_reader *r, const char *what)
{
    json_wrong(r, "expected %s%s", what, r->at == r->end ? ", but it ends here" : "");
}

static size_t json_left(const json_reader *r) { return (size_t)(r->end - r->at); }
static int json_next_is(const json_reader *r, char c) { return r->at < r->end && *r->at == c; }
static void json_skip(json_reader *r) { while (r->at < r->end && memchr(" \t\r\n", *r->at, 4)) r->at++; }

static int json_word(json_reader *r, const char *word)
{
    size_t n = strlen(word);
    if (json_left(r) < n || memcmp(r->at, word, n)) return 0;
    r->at += n;
    return 1;
}

static int hex4(const char *p, const char *end)          // \u12ab is 0x12ab; -1 if it is not spelled so
{
    int code = 0;
    if (end - p < 6 || p[0] != '\\' || p[1] != 'u') return -1;
    for (int i = 2; i < 6; i++) {
        int letter = p[i] | 32, digit = -1;
        if (p[i] >= '0' && p[i] <= '9') digit = p[i] - '0';
        if (letter >= 'a' && letter <= 'f') digit = letter - 'a' + 10;
        if (digit < 0) return -1;
        code = 16 * code + digit;
    }
    return code;
}

static void json_escape(json_reader *r)
{
    int code = hex4(r->at, r->end), low = code < 0 ? -1 : hex4(r->at + 6, r->end);
    int letters = json_left(r) < 2 ? 1 : 2, short_one = letters == 2 && memchr("\"\\/bfnrt", r->at[1], 8);
    if (code < 0 && !short_one) json_wrong(r, "an invalid escape, %.*s", letters, r->at);
    if (code == 0) json_wrong(r, "\\u0000, a NUL, which no text holds");
    int pair = code >= 0xd800 && code < 0xdc00 && low >= 0xdc00 && low < 0xe000, half = code >= 0xd800 && code < 0xe000;
    if (half && !pair) json_wrong(r, "a lone surrogate, %.6s, half of a character", r->at);
    r->at += code < 0 ? 2 : pair ? 12 : 6;
}

static place json_string(json_reader *r)
{
    place p = {r->at, 0};
    for (r->at++; !json_next_is(r, '"');) {
        if (r->at == r->end) json_wrong(r, "it ends in the middle of a text");
        if ((unsigned char)*r->at < ' ') json_wrong(r, "a control character, 0x%02x; JSON has \\u%04x", *r->at, *r->at);
        if (*r->at == '\\') json_escape(r);
        else r->at++;
    }
    r->at++;
    return p;
}

static const char *digits_end(const char *p, const char *end)
{
    while (p < end && *p >= '0' && *p <= '9') p++;
    return p;
}

static void json_digits(json_reader *r)
{
    if (json_next_is(r, '-')) r->at++;
    const char *end = digits_end(r->at, r->end);
    if (end == r->at) json_expected(r, "a value");
    if (*r->at == '0' && end > r->at + 1) json_wrong(r, "a number with a leading zero");
    r->at = end;
    for (int exponent = 0; exponent < 2; exponent++) {
        if (!json_next_is(r, exponent ? 'e' : '.') && !(exponent && json_next_is(r, 'E'))) continue;
        r->at++;
        if (exponent && (json_next_is(r, '+') || json_next_is(r, '-'))) r->at++;
        if ((end = digits_end(r->at, r->end)) == r->at) json_wrong(r, "a number without its digits");
        r->at = end;
    }
}

static void json_number(json_reader *r)
{
    const char *start = r->at;
    int not_finite = json_word(r, "NaN") || json_word(r, "Infinity") || json_word(r, "-Infinity");
    if (not_finite && r->finite) json_wrong(r, "%.*s, which only Python writes", (int)(r->at - start), start);
    if (!not_finite) json_digits(r);
    arrput(r->places, ((place){start, (size_t)(r->at - start)}));
}

static void json_value(json_reader *r)
{
    json_skip(r);
    if (json_next_is(r, '"')) json_string(r);
    else if (!json_next_is(r, '{') && !json_next_is(r, '[')) {
        if (!json_word(r, "true") && !json_word(r, "false") && !json_word(r, "null")) json_number(r);
    } else {                                                    // { "key": value, … } or [ value, … ]
        int object = *r->at++ == '{', first = 1;
        if (++r->depth > 500) json_wrong(r, "nested deeper than 500 levels");
        for (; json_skip(r), !json_next_is(r, object ? '}' : ']'); first = 0) {
            if (!first && !json_next_is(r, ',')) json_expected(r, object ? ", or }" : ", or ]");
            if (!first) r->at++;
            json_skip(r);
            if (object && !json_next_is(r, '"')) json_expected(r, "a key in quotes");
            if (object) arrput(r->places, json_string(r));
            json_skip(r);
            if (object && !json_next_is(r, ':')) json_expected(r, ": behind a key");
            if (object) r->at++;
            json_value(r);
        }
        r->at++, r->depth--;
    }
}

// Gives numbers their value and, as valuestring, their spelling; NaN and its like become a cJSON_Raw, which no
// field takes. Stops at a key that occurs twice.
static void json_finish(json_reader *r, cJSON *item, const place **next)
{
    struct { char *key; int value; } *keys = NULL;
    cJSON *child;
    if (cJSON_IsNumber(item)) {
        place p = *(*next)++;
        if (!(item->valuestring = strndup(p.at, p.n))) die("out of memory");
        item->type = strchr("NI", p.at[*p.at == '-']) ? cJSON_Raw : cJSON_Number;
        cJSON_SetNumberHelper(item, strtod(item->valuestring, NULL));
    }
    cJSON_ArrayForEach(child, item) {
        if (cJSON_IsObject(item)) {
            r->at = (*next)++->at;
            if (shgeti(keys, child->string) >= 0) json_wrong(r, "\"%.60s\" occurs twice", child->string);
            shput(keys, child->string, 1);
        }
        json_finish(r, child, next);
    }
    shfree(keys);
}

// The JSON value in front, for cJSON_Delete; r->at is then behind it.
static cJSON *json_read(json_reader *r)
{
    r->depth = 0;
    if (r->places) arrsetlen(r->places, 0);
    json_skip(r);
    const char *start = r->at;
    json_value(r);
    const char *end = r->at;
    char *copy = strndup(start, (size_t)(end - start));
    if (!copy) die("out of memory");
    for (int i = 0; i < arrlen(r->places); i++) {               // cJSON finds a 0 for every number
        char *at = copy + (r->places[i].at - start);
        if (!r->places[i].n) continue;
        memset(at, ' ', r->places[i].n);
        *at = '0';
    }
    cJSON *json = cJSON_Parse(copy);
    const place *next = r->places;
    free(copy);
    if (!json) die("out of memory");
    json_finish(r, json, &next);
    r->at = end;
    return json;
}

// One JSON object and nothing behind it: what every file but rows holds.
static cJSON *parse_object(const char *path, const char *text, size_t bytes, int finite)
{
    json_reader r = {path, text, text, text + bytes, finite, 0, NULL};
    expect_utf8(path, text, bytes);
    cJSON *json = json_read(&r);
    json_skip(&r);
    if (r.at < r.end) json_wrong(&r, "more text behind the value");
    if (!cJSON_IsObject(json)) die("%s: expected a JSON object { … }", path);
    arrfree(r.places);
    return json;
}

static cJSON *parse_json(const char *path, const char *text, size_t bytes)
{
    return parse_object(path, text, bytes, 0);
}

// An integer field in [1, 2^24]; `missing` < 0 makes it required.
static int config_int(const cJSON *json, const char *path, const char *name, int missing)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(json, name);
    if ((!item || cJSON_IsNull(item)) && missing >= 0) return missing;
    if (!item) die("%s: field \"%s\" is missing", path, name);
    double x = cJSON_IsNumber(item) ? item->valuedouble : 0;
    if (!(x >= 1 && x <= 1 << 24) || x != floor(x)) die("%s: \"%s\" must be a whole number from 1 to %d", path, name, 1 << 24);
    return (int)x;
}

static double config_number(const cJSON *json, const char *path, const char *name, double missing)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(json, name);
    if (!item || cJSON_IsNull(item)) return missing;
    if (!cJSON_IsNumber(item) || !(item->valuedouble > 0) || !isfinite(item->valuedouble))
        die("%s: \"%s\" must be a positive number", path, name);
    return item->valuedouble;
}

// "eos_token_id" of config.json or generation_config.json: a number, or a list of them.
static void config_stops(config *c, const cJSON *json)
{
    const cJSON *ids = cJSON_GetObjectItemCaseSensitive(json, "eos_token_id");
    for (const cJSON *id = cJSON_IsArray(ids) ? ids->child : ids; id; id = cJSON_IsArray(ids) ? id->next : NULL)
        if (cJSON_IsNumber(id) && c->stops < MOST_STOPS) c->stop[c->stops++] = id->valueint;
}

// What would change the arithmetic and is not built here is refused, never ignored.
static void config_refuse(const cJSON *json, const char *path)
{
    const cJSON *type = cJSON_GetObjectItemCaseSensitive(json, "model_type");
    if (!cJSON_IsString(type) || strcmp(type->valuestring, "llama"))
        die("%s: \"model_type\" is %s, only \"llama\" is built", path, cJSON_IsString(type) ? type->valuestring : "missing");
    const cJSON *act = cJSON_GetObjectItemCaseSensitive(json, "hidden_act");
    if (cJSON_IsString(act) && strcmp(act->valuestring, "silu"))
        die("%s: \"hidden_act\" is \"%s\", only \"silu\" is built", path, act->valuestring);
    const cJSON *quantised = cJSON_GetObjectItemCaseSensitive(json, "quantization_config");
    const cJSON *how = cJSON_GetObjectItemCaseSensitive(quantised, "quant_method");
    if (quantised && !cJSON_IsNull(quantised))
        die("%s: the model is quantised (%s), which is not built; fetch the one it was made from, in F32, F16 or BF16",
            path, cJSON_IsString(how) ? how->valuestring : "quantization_config");
    for (const char **name = (const char *[]){"attention_bias", "mlp_bias", NULL}; *name; name++)
        if (cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(json, *name))) die("%s: \"%s\" is true, biases are not built", path, *name);
    for (const char **name = (const char *[]){"rope_scaling", "rope_parameters", NULL}; *name; name++) {
        const cJSON *rope = cJSON_GetObjectItemCaseSensitive(json, *name);
        const cJSON *kind = cJSON_GetObjectItemCaseSensitive(rope, "rope_type");
        if (!kind) kind = cJSON_GetObjectItemCaseSensitive(rope, "type");
        if (cJSON_IsString(kind) && strcmp(kind->valuestring, "default"))
            die("%s: \"%s\" of type \"%s\" is not built, only the default RoPE", path, *name, kind->valuestring);
        if (cJSON_IsObject(rope) && !kind && cJSON_HasObjectItem(rope, "factor"))
            die("%s: \"%s\" without a type is not understood, only the default RoPE is built", path, *name);
    }
}

// Reads transformers' config.json, version 4 or 5 (which moved rope_theta into rope_parameters).
static config config_read(const char *path)
{
    size_t bytes;
    config c = {.text = read_file(path, &bytes)};
    cJSON *json = parse_json(path, c.text, bytes);
    config_refuse(json, path);
    c.dim = config_int(json, path, "hidden_size", -1);
    c.hidden = config_int(json, path, "intermediate_size", -1);
    c.layers = config_int(json, path, "num_hidden_layers", -1);
    c.heads = config_int(json, path, "num_attention_heads", -1);
    c.kv_heads = config_int(json, path, "num_key_value_heads", c.heads);
    c.head_dim = config_int(json, path, "head_dim", c.dim / c.heads);
    c.vocab = config_int(json, path, "vocab_size", -1);
    c.max_pos = config_int(json, path, "max_position_embeddings", 2048);
    c.eps = config_number(json, path, "rms_norm_eps", 1e-6);
    c.theta = config_number(json, path, "rope_theta", 10000);
    c.theta = config_number(cJSON_GetObjectItemCaseSensitive(json, "rope_scaling"), path, "rope_theta", c.theta);
    c.theta = config_number(cJSON_GetObjectItemCaseSensitive(json, "rope_parameters"), path, "rope_theta", c.theta);
    c.init_range = config_number(json, path, "initializer_range", 0.02);
    config_stops(&c, json);
    c.tied = cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(json, "tie_word_embeddings"));
    if (c.heads % c.kv_heads) die("%s: %d heads cannot share %d key-value heads evenly", path, c.heads, c.kv_heads);
    if (c.head_dim % 2) die("%s: head_dim %d is odd, RoPE rotates halves", path, c.head_dim);
    if ((long)c.heads * c.head_dim > 1 << 24) die("%s: %d heads of %d are too wide", path, c.heads, c.head_dim);
    cJSON_Delete(json);
    return c;
}

/* ---- 5  safetensors in -------------------------------------------------------------------------------------
   8 bytes little-endian header length, a JSON header {"name": {"dtype", "shape", "data_offsets"}}, the data.
   https://huggingface.co/docs/safetensors. The file is mapped, never read: a weight costs memory once.      */

typedef struct { int n[3]; } shape;                            // {n}, {rows, cols} or {batch, rows, cols}
#define SHAPE(...) ((shape){{__VA_ARGS__}})

typedef struct {
    shape shape;
    mat at;
    const char *file, *name;
    size_t from, to;                                           // its bytes of the data
    char unusable[80];                                         // why it can be no weight of a Llama, or empty
} stored;

typedef struct mapping {
    char *p;
    size_t bytes;
    char *path, *line;                                         // line: what a signal handler says if the file is cut short
    int fd;
    struct timespec changed;                                   // the file's last change, when it was mapped
    struct mapping *next;
} mapping;

typedef struct {
    struct { char *key; stored value; } *tensors;              // by name
    mapping **maps;
} checkpoint;

static mapping *mapped;                 // every file that is: a signal handler looks here for the one cut short
#define CHANGED ": was cut short or changed while it was in use; restore it and start again"

// What safetensors knows beside our dtypes, with bits. No weight that we use is of these: they are quantised.
static const struct { const char *name; int bits; } other_dtypes[] = {
    {"BOOL", 8}, {"F4", 4}, {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8}, {"I8", 8}, {"F8_E5M2", 8}, {"F8_E4M3", 8},
    {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16}, {"U16", 16}, {"I32", 32}, {"U32", 32},
    {"C64", 64}, {"I64", 64}, {"U64", 64}, {NULL, 0}
};

static void expect_usable(stored s)
{
    if (*s.unusable) die("%s: tensor %s %s", s.file, s.name, s.unusable);
}

// dst = a tensor of a file. Its matrix points into mapped memory of the host, in spite of the type. The pages it has to
// itself are given back: copied and mapped, full fine-tuning's weights would stand in memory twice.
static void put_stored(mat dst, stored s)
{
    expect_usable(s);
    uintptr_t from = (uintptr_t)s.at.p, to = from + elements(s.at) * dtypes[s.at.type].size, page = (uintptr_t)sysconf(_SC_PAGESIZE);
    put(dst, (const void *)from, s.at.type);
    from = (from + page - 1) / page * page, to = to / page * page;
    if (from < to) madvise((void *)from, to - from, MADV_DONTNEED);
}

static const char *shape_text(shape s, char text[64])
{
    int n = snprintf(text, 64, "[%d", s.n[0]);
    for (int i = 1; i < 3 && s.n[i]; i++) n += snprintf(text + n, 64 - (size_t)n, ", %d", s.n[i]);
    snprintf(text + n, 64 - (size_t)n, "]");
    return text;
}

static mat mat_of(dev p, enum dtype type, shape s)
{
    int d = s.n[2] ? 3 : s.n[1] ? 2 : 1;
    mat m = {p, type, d > 1 ? s.n[d - 2] : 1, s.n[d - 1], (size_t)s.n[d - 1], d > 2 ? s.n[0] : 1, 0, 0};
    m.stride = (size_t)m.rows * m.ld;
    m.room = elements(m);
    return m;
}

// A whole number that is spelled as one, as the format asks; -1 for anything else.
static double whole_number(const cJSON *item)
{
    const char *spelt = cJSON_IsNumber(item) ? item->valuestring : "no";
    return spelt[strspn(spelt, "0123456789")] || item->valuedouble > 9e15 ? -1 : item->valuedouble;
}

// The bits of a number of the file, and its dtype if it is one of ours.
static int bits_of(const cJSON *item, const char *path, enum dtype *type)
{
    const cJSON *dtype = cJSON_GetObjectItemCaseSensitive(item, "dtype");
    const char *name = cJSON_IsString(dtype) ? dtype->valuestring : "nothing that is known";
    for (int i = 0; i < DTYPES; i++)
        if (!strcmp(name, dtypes[i].name)) { *type = (enum dtype)i; return 8 * (int)dtypes[i].size; }
    for (int i = 0; other_dtypes[i].name; i++)
        if (!strcmp(name, other_dtypes[i].name)) return other_dtypes[i].bits;
    die("%s: tensor %s has as dtype %s, expected F32, F16 or BF16", path, item->string, name);
}

// One entry of the header, every number of it checked against the file before it is believed.
static stored stored_read(const cJSON *item, const char *path, char *data, size_t bytes)
{
    const cJSON *dims = cJSON_GetObjectItemCaseSensitive(item, "shape"), *dim;
    const cJSON *offsets = cJSON_GetObjectItemCaseSensitive(item, "data_offsets");
    stored s = {.file = path};
    enum dtype type = DTYPES;
    double a = whole_number(cJSON_GetArrayItem(offsets, 0)), b = whole_number(cJSON_GetArrayItem(offsets, 1));
    double bits = bits_of(item, path, &type);
    int count = cJSON_GetArraySize(dims), at = 0, small = 1;
    if (!cJSON_IsArray(dims)) die("%s: tensor %s has a bad shape", path, item->string);
    cJSON_ArrayForEach(dim, dims) {
        double n = whole_number(dim);
        bits *= n > 1 ? n : 1;                                  // zeros count below: nothing on the way may overflow
        if (n < 0 || bits > 9e15) die("%s: tensor %s has a bad shape", path, item->string);
        small &= n >= 1 && n <= INT_MAX;
        if (at < 3) s.shape.n[at++] = (int)(n <= INT_MAX ? n : 0);
    }
    cJSON_ArrayForEach(dim, dims) if (dim->valuedouble == 0) bits = 0;
    int bad = cJSON_GetArraySize(offsets) != 2 || a < 0 || b < a;
    if (bad) die("%s: tensor %s has bad data_offsets", path, item->string);
    if (b > (double)bytes) die("%s: tensor %s ends at byte %.0f of the data, the file has %zu: truncated? fetch it again", path, item->string, b, bytes);
    if (8 * (b - a) != bits)
        die("%s: tensor %s takes %.0f bytes by its shape, data_offsets give %.0f", path, item->string, bits / 8, b - a);
    const char *dtype = cJSON_GetObjectItemCaseSensitive(item, "dtype")->valuestring;
    size_t room = sizeof s.unusable;
    if (type == DTYPES) snprintf(s.unusable, room, "is %s, expected F32, F16 or BF16; is the model quantised?", dtype);
    else if (count < 1 || count > 3) snprintf(s.unusable, room, "has %d dimensions, expected 1 to 3", count);
    else if (!small) snprintf(s.unusable, room, "has a side of 0 or above %d", INT_MAX);
    s.from = (size_t)a, s.to = (size_t)b;
    if (!*s.unusable) s.at = mat_of(data + s.from, type, s.shape);
    return s;
}

static int by_offset(const void *a, const void *b)
{
    const stored *x = a, *y = b;
    return x->from != y->from ? (x->from > y->from ? 1 : -1) : (x->to > y->to) - (x->to < y->to);
}

// Every byte of the data belongs to one tensor, as the safetensors library asks: no two share one, none is left over.
// Sorts the list.
static void expect_covered(stored *list, const char *path, size_t bytes)
{
    size_t end = 0;
    if (list) qsort(list, (size_t)arrlen(list), sizeof *list, by_offset);
    for (int i = 0; i < arrlen(list); i++) {
        const stored *s = &list[i];
        if (s->from < end)
            die("%s: tensors %s and %s share bytes of the data; fetch it again", path, list[i - 1].name, s->name);
        if (s->from > end)
            die("%s: bytes %zu to %zu of the data belong to no tensor; fetch it again", path, end, s->from);
        end = s->to;
    }
    if (end < bytes) die("%s: %zu bytes stand behind the last tensor; fetch it again", path, bytes - end);
}

static void metadata_check(const cJSON *item, const char *path)
{
    const cJSON *entry;
    if (!cJSON_IsObject(item) && !cJSON_IsNull(item)) die("%s: __metadata__ is not an object of texts", path);
    cJSON_ArrayForEach(entry, item)
        if (!cJSON_IsString(entry))
            die("%s: __metadata__ is not an object of texts, see \"%s\"", path, entry->string);
}

// Maps a file and adds it to the checkpoint. Its pages are only ever read.
static mapping *mapping_open(checkpoint *c, const char *path)
{
    expect_file(path);
    mapping *f = alloc(1, sizeof *f);
    struct stat st;
    f->fd = open(path, O_RDONLY | O_CLOEXEC);
    if (f->fd < 0 || fstat(f->fd, &st)) die("%s: %s", path, strerror(errno));
    f->bytes = (size_t)st.st_size, f->changed = st.st_mtim;
    if (f->bytes < 8) die("%s: %zu bytes are no safetensors file", path, f->bytes);
    f->p = mmap(NULL, f->bytes, PROT_READ, MAP_PRIVATE | MAP_NORESERVE, f->fd, 0);
    if (f->p == MAP_FAILED) die("%s: cannot map %zu bytes: %s", path, f->bytes, strerror(errno));
    char *shown = printable(path, "");
    f->path = strdup(path);
    if (!f->path || !shown || asprintf(&f->line, "error: %s" CHANGED "\n", shown) < 0) die("out of memory");
    free(shown);
    f->next = mapped, mapped = f;
    arrput(c->maps, f);
    return f;
}

// Adds one file's tensors to the checkpoint.
static void safetensors_open(checkpoint *c, const char *path)
{
    const mapping *f = mapping_open(c, path);
    uint64_t header = 0;
    refuse_pointer(path, f->p, f->bytes);
    for (int i = 7; i >= 0; i--) header = header << 8 | (unsigned char)f->p[i];
    if (header > f->bytes - 8 || header > 100000000)
        die("%s: header of %llu bytes in a file of %zu: not safetensors, or truncated",
            path, (unsigned long long)header, f->bytes);
    char *where = alloc(strlen(path) + 16, 1);
    sprintf(where, "%s, its header", path);
    cJSON *json = parse_object(where, f->p + 8, header, 1), *item;
    stored *list = NULL;
    cJSON_ArrayForEach(item, json) {
        if (!strcmp(item->string, "__metadata__")) { metadata_check(item, path); continue; }
        if (shgeti(c->tensors, item->string) >= 0) die("%s: tensor %s occurs twice", path, item->string);
        stored s = stored_read(item, f->path, f->p + 8 + header, f->bytes - 8 - header);
        shput(c->tensors, item->string, s);
        ptrdiff_t at = shgeti(c->tensors, item->string);
        c->tensors[at].value.name = s.name = c->tensors[at].key;
        arrput(list, s);
    }
    expect_covered(list, path, f->bytes - 8 - header);
    arrfree(list);
    cJSON_Delete(json);
    free(where);
}

// A link to nothing exists, too: what is wrong with it is said when it is opened.
static int exists(const char *path)
{
    struct stat st;
    return !lstat(path, &st);
}

// Stops at a file that holds weights in a format that is not read here.
static void refuse_weights(const char *dir, const char *name)
{
    static const char save_again[] = "in PyTorch's own format, which is not read; open it with transformers or PEFT, "
                                     "whose save_pretrained() writes safetensors";
    static const struct { const char *start, *end, *says; } formats[] = {
        {"", ".gguf", "in llama.cpp's format, which is not read; fetch the model it was made from, in safetensors"},
        {"consolidated", ".pth", "in Meta's own format, which is not read; fetch the repository whose name ends in -hf, "
                                 "or use transformers' convert_llama_weights_to_hf.py"},
        {"pytorch_model", ".bin", save_again},
        {"adapter_model", ".bin", save_again},
        {"model-", ".safetensors", "a part of a model, and model.safetensors.index.json, which names the parts, "
                                   "is not here; fetch it, too"},
    };
    size_t n = strlen(name);
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++) {
        size_t end = strlen(formats[i].end), start = strlen(formats[i].start);
        if (n < end || strcmp(name + n - end, formats[i].end) || strncmp(name, formats[i].start, start)) continue;
        die("%s: %s is %s", dir, name, formats[i].says);
    }
}

static void refuse_format(const char *dir)
{
    DIR *d = opendir(dir);
    for (struct dirent *e; d && (e = readdir(d));) refuse_weights(dir, e->d_name);
    if (d) closedir(d);
}

// dir/base.safetensors, or the shards that dir/base.safetensors.index.json names.
static checkpoint checkpoint_open(const char *dir, const char *base)
{
    checkpoint c = {0};
    sh_new_arena(c.tensors);
    char name[64];
    snprintf(name, sizeof name, "%s.safetensors", base);
    char *path = join(dir, name);
    if (exists(path)) { safetensors_open(&c, path); free(path); return c; }
    snprintf(name, sizeof name, "%s.safetensors.index.json", base);
    char *index = join(dir, name);
    if (!exists(index)) refuse_format(dir);
    if (!exists(index)) die("%s: no %s.safetensors and no %s here; expected one of them", dir, base, name);

    size_t bytes;
    char *text = read_file(index, &bytes);
    cJSON *json = parse_json(index, text, bytes), *map = cJSON_GetObjectItemCaseSensitive(json, "weight_map"), *item;
    if (!cJSON_IsObject(map)) die("%s: field \"weight_map\" is missing", index);
    struct { char *key; int value; } *seen = NULL;
    cJSON_ArrayForEach(item, map) {
        if (!cJSON_IsString(item) || strchr(item->valuestring, '/')) die("%s: tensor %s is not mapped to a file of this folder", index, item->string);
        if (shgeti(seen, item->valuestring) >= 0) continue;
        shput(seen, item->valuestring, 1);
        char *shard = join(dir, item->valuestring);
        safetensors_open(&c, shard);
        free(shard);
    }
    cJSON_ArrayForEach(item, map)
        if (shgeti(c.tensors, item->string) < 0) die("%s: tensor %s is not in %s", index, item->string, item->valuestring);
    shfree(seen);
    cJSON_Delete(json);
    free(text), free(index), free(path);
    return c;
}

static void checkpoint_close(checkpoint *c)
{
    for (int i = 0; i < arrlen(c->maps); i++) {
        mapping *f = c->maps[i], **at = &mapped;
        while (*at != f) at = &(*at)->next;
        *at = f->next;
        munmap(f->p, f->bytes), close(f->fd);
        free(f->path), free(f->line), free(f);
    }
    arrfree(c->maps);
    shfree(c->tensors);
}

// Stops if a file is no longer what was mapped: the rest of a page behind a new end reads as zeros, and what was
// written over reads as that.
static void checkpoint_unchanged(const checkpoint *c)
{
    struct stat st;
    for (int i = 0; i < arrlen(c->maps); i++) {
        const mapping *f = c->maps[i];
        int there = !fstat(f->fd, &st), size = there && (size_t)st.st_size == f->bytes;
        if (!size || memcmp(&st.st_mtim, &f->changed, sizeof f->changed)) die("%s" CHANGED, f->path);
    }
}

/* ---- 6  the model and its memory --------------------------------------------------------------------------- */

typedef struct model model;
typedef struct linear linear;

// A method is a row of the table methods[] in adapters.h: how one linear layer y = x Wᵀ is fine-tuned.
typedef struct method {
    const char *name;
    const char *equation;                                           // for --list and the banner
    void (*layout)(model *m, linear *l, const char *name);          // declares its tensors, refuses shapes that do not fit
    void (*init)(model *m, linear *l, const char *name);            // their values before step 1
    void (*forward)(model *m, linear *l, mat y, mat x, enum mode mode);  // y = or += …
    void (*backward)(model *m, linear *l, mat dx, mat dy, mat x);   // dx += …, d(parameters) += …
    void (*merge)(model *m, linear *l, mat W);                      // W (out, in), a copy of l->W, += the adapter
    const char *peft_type;                                          // adapter_config.json: LORA, MISS, or our own name
    int has_start;                                                  // A0, B0: the layer subtracts them, the file holds them
    int wants_gradient;                                             // init finds in l->dW the gradient of the first step
    int wants_shards;                                               // forward and backward find S(x) in m->s: see shards_of
} method;

struct linear {
    mat W, dW;                  // (out, in); dW only where W itself trains, and while lora-ga seeks its start
    const method *method;
    int first, last;            // among the linears that read the same x with this method: q, k, v share what depends on x alone
    double scale;               // s of y += s (x Aᵀ) Bᵀ
    mat A, dA, B, dB;           // lora: (r, in), (out, r). bat: B (out/r, r, r). bat-row: B (in/r, r, r)
    mat A0, B0;                 // pissa, olora, lora-ga: the start of A and B
    mat D, dD;                  // bone (r, out), mini (r, mini_r), frozen (out, in)
    mat h;                      // lora: x Aᵀ (N, r), kept for the backward pass
    mat mag, dmag;              // dora: the magnitude m (out)
    mat z, VA;                  // dora: x Vᵀ (N, out), V Aᵀ (out, r), V = W + s B A
    mat gain, dgain, squares, dsquares;                             // dora: m/‖V_o‖ and ‖V_o‖², (out, 1)
};

typedef struct {
    mat norm1, dnorm1, norm2, dnorm2;                               // (dim)
    linear q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj;
    mat x;                                                          // (N, dim) the residual stream on entry
    mat q, k, v, att;                                               // (N, heads·head_dim), (N, kv_heads·head_dim) twice, as q
    mat lse;                                                        // (N, heads) log Σ exp of each row of scores: all that attention keeps
    mat mid;                                                        // (N, dim) the residual stream after attention
    mat gate, up;                                                   // (N, hidden)
    mat k_cache, v_cache;                                           // generation: (sequences·length, kv_heads·head_dim)
} layer;

// Where a tensor lies. One block of memory a kind.
enum kind {
    BASE,                       // frozen matrix, stays mapped in the dtype of its file
    NORM,                       // frozen vector, copied to real
    PARAM,                      // trains: wide, with a gradient and two AdamW moments at the same offset
    START,                      // wide, frozen: A0, B0
    ACT,                        // real, one row a token
    STAT,                       // wide, one row a token
    WORK,                       // real, anything else that is overwritten all the time
    AUX,                        // wide, the same: dora's norms
    CACHE,                      // real, keys and values of generation
    KINDS
};

typedef struct {
    char name[112];             // the name in Hugging Face's or PEFT's file
    enum kind kind;
    shape shape;
    mat *at, *grad;
    mat m1, m2;                 // AdamW's moments of a PARAM
    double rate;                // its learning rate, times the run's: LoRA+ makes B faster
} tensor;

// What the run asks of the model.
typedef struct {
    const method *method;
    int rank, mini_r, targets;  // targets: a bit for each of linear_names that has an adapter (in some layer)
    const cJSON *modules;       // an adapter's own "target_modules", or NULL: they decide layer by layer, and the layout sets targets
    double alpha, plus_ratio;
    uint64_t seed;
    int tokens;                 // the most tokens in a micro-batch
    int positions;              // the longest sequence
    int train;                  // keep what the backward pass needs
    int dora_detach;            // dora: the norm counts as a constant in the backward pass
    int recompute;              // 1: but not gate and up; 2: of each layer only x, the residual stream
    int sequences, cache_rows;  // generation: sequences answered at once, and their number × length; 0 for none
} plan;

struct model {
    config c;
    plan p;
    checkpoint file;
    int reads_file;                                                 // weights are read from it all the time
    mat embed, dembed, norm, dnorm, head, dhead;                    // (vocab, dim), (dim), (vocab, dim): embed itself if tied
    layer *layers;
    mat last;                                                       // (N, dim) the residual stream at the end
    mat rope;                                                       // (positions, head_dim) [cos | sin]
    mat xn, hid;                                                    // (N, dim), (N, hidden): recomputed in the backward pass, not kept
    mat dx, dxn, dq, dk, dv, datt, dgate, dup, dhid;                // gradients of one layer at a time
    mat hs, hn, dhs, dhn, logits, losses;                           // the head, …
    int chunk;                                                      // … this many rows at a time
    mat s, ds, u, du, w;                                            // work space of the methods, shared by all layers
    dev_ints ids, pos, target_row, label;                           // the micro-batch
    tensor *tensors;                                                // every tensor above, by name
    size_t used[KINDS];                                             // elements a block
    dev block[KINDS], grad, moment1, moment2;
    size_t trainable;
    char refused[240];                                              // why the method does not fit this model, or empty
    int walk;                                                       // 0 measure, 1 point
};

static const char *const linear_names[7] = {"q", "k", "v", "o", "gate", "up", "down"};

static linear *linear_of(layer *l, int i)
{
    return (linear *[]){&l->q_proj, &l->k_proj, &l->v_proj, &l->o_proj, &l->gate_proj, &l->up_proj, &l->down_proj}[i];
}

static enum dtype type_of_kind(enum kind k) { return k == PARAM || k == START || k == STAT || k == AUX ? TYPE_OF(wide) : TYPE_OF(real); }

// Declares a tensor. The first walk measures, the second points *at (and *grad) into the kind's block.
__attribute__((format(printf, 6, 7)))
static tensor *declare(model *m, enum kind kind, mat *at, mat *grad, shape s, const char *format, ...)
{
    tensor t = {.kind = kind, .shape = s, .at = at, .grad = grad, .rate = 1};
    va_list args;
    va_start(args, format);
    vsnprintf(t.name, sizeof t.name, format, args);
    va_end(args);
    size_t offset = m->used[kind], size = dtypes[type_of_kind(kind)].size;
    *at = mat_of(NULL, type_of_kind(kind), s);
    if (grad) *grad = *at, grad->p = NULL;
    if (kind != BASE) m->used[kind] += (elements(*at) + 15) / 16 * 16;             // rows of 64 bytes
    if (kind == PARAM) m->trainable += elements(*at);
    if (m->walk && kind != BASE) at->p = (char noderef *)m->block[kind] + offset * size;
    if (m->walk && kind == PARAM && m->p.train) {
        t.m1 = t.m2 = *grad = *at;
        grad->p = (char noderef *)m->grad + offset * size;
        t.m1.p = (char noderef *)m->moment1 + offset * size;
        t.m2.p = (char noderef *)m->moment2 + offset * size;
    }
    arrput(m->tensors, t);
    return &arrlast(m->tensors);
}

// Work space shared by all layers: the largest request counts. Reserved while measuring, declared by layout() at the end.
static void reserve(mat *work, int rows, int cols)
{
    if ((size_t)rows * (size_t)cols > elements(*work)) *work = mat_of(NULL, TYPE_OF(real), SHAPE(rows, cols));
}

// Why a method cannot work on this model. Training stops with it, --list prints it.
__attribute__((format(printf, 2, 3)))
static void refuse(model *m, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    if (!*m->refused) vsnprintf(m->refused, sizeof m->refused, format, args);
    va_end(args);
}

static const method methods[];          // adapters.h; its first row is `full`: W alone

static int peft_targeted(const cJSON *modules, const char *module);    // adapters.h

static int full_training(const model *m) { return m->p.train && m->p.method == &methods[0]; }

static void linear_layout(model *m, linear *l, int which, int depth, const char *name, int out, int in)
{
    char module[96], adapter[128];
    snprintf(module, sizeof module, "model.layers.%d.%s", depth, name);
    snprintf(adapter, sizeof adapter, "base_model.model.%s", module);
    if (m->p.modules && peft_targeted(m->p.modules, module)) m->p.targets |= 1 << which;
    int targeted = m->p.modules ? peft_targeted(m->p.modules, module) : m->p.targets >> which & 1;
    declare(m, full_training(m) ? PARAM : BASE, &l->W, &l->dW, SHAPE(out, in), "model.layers.%d.%s.weight", depth, name);
    l->method = targeted ? m->p.method : &methods[0];
    if (l->method->layout) l->method->layout(m, l, adapter);
}

// q, k, v share their input, and so do gate, up: marks the first and the last of those that have the adapter.
static void mark_shared(linear **group, int n)
{
    linear *first = NULL, *last = NULL;
    for (int i = 0; i < n; i++)
        if (group[i]->method->layout) first = first ? first : group[i], last = group[i];
    for (int i = 0; i < n; i++) group[i]->first = group[i] == first, group[i]->last = group[i] == last;
}

static void layer_weights(model *m, layer *L, int i)
{
    const config *c = &m->c;
    enum kind vector = full_training(m) ? PARAM : NORM;
    int q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim;
    declare(m, vector, &L->norm1, &L->dnorm1, SHAPE(c->dim), "model.layers.%d.input_layernorm.weight", i);
    linear_layout(m, &L->q_proj, 0, i, "self_attn.q_proj", q, c->dim);
    linear_layout(m, &L->k_proj, 1, i, "self_attn.k_proj", kv, c->dim);
    linear_layout(m, &L->v_proj, 2, i, "self_attn.v_proj", kv, c->dim);
    linear_layout(m, &L->o_proj, 3, i, "self_attn.o_proj", c->dim, q);
    declare(m, vector, &L->norm2, &L->dnorm2, SHAPE(c->dim), "model.layers.%d.post_attention_layernorm.weight", i);
    linear_layout(m, &L->gate_proj, 4, i, "mlp.gate_proj", c->hidden, c->dim);
    linear_layout(m, &L->up_proj, 5, i, "mlp.up_proj", c->hidden, c->dim);
    linear_layout(m, &L->down_proj, 6, i, "mlp.down_proj", c->dim, c->hidden);
    mark_shared((linear *[]){&L->q_proj, &L->k_proj, &L->v_proj}, 3);
    mark_shared((linear *[]){&L->gate_proj, &L->up_proj}, 2);
    mark_shared((linear *[]){&L->o_proj}, 1);
    mark_shared((linear *[]){&L->down_proj}, 1);
}

// Memory that the next layer reuses: what is declared above the level that is kept.
typedef struct { size_t act, stat; } level;
static level level_now(const model *m) { return (level){m->used[ACT], m->used[STAT]}; }

// What the forward pass leaves for the backward pass. Returns from where on the next layer may overwrite it.
static level layer_activations(model *m, layer *L, mat *next, int i)
{
    const config *c = &m->c;
    int N = m->p.tokens, q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim, cache = m->p.cache_rows;
    declare(m, ACT, next, NULL, SHAPE(N, c->dim), "layers.%d.x", i + 1);      // is written while gate and up are still to come
    level kept = level_now(m);
    declare(m, ACT, &L->q, NULL, SHAPE(N, q), "layers.%d.q", i);
    declare(m, ACT, &L->k, NULL, SHAPE(N, kv), "layers.%d.k", i);
    declare(m, ACT, &L->v, NULL, SHAPE(N, kv), "layers.%d.v", i);
    declare(m, ACT, &L->att, NULL, SHAPE(N, q), "layers.%d.att", i);
    declare(m, STAT, &L->lse, NULL, SHAPE(N, c->heads), "layers.%d.lse", i);
    declare(m, ACT, &L->mid, NULL, SHAPE(N, c->dim), "layers.%d.mid", i);
    if (m->p.recompute < 2) kept = level_now(m);
    declare(m, ACT, &L->gate, NULL, SHAPE(N, c->hidden), "layers.%d.gate", i);
    declare(m, ACT, &L->up, NULL, SHAPE(N, c->hidden), "layers.%d.up", i);
    if (m->p.recompute < 1) kept = level_now(m);
    if (!cache) return kept;
    declare(m, CACHE, &L->k_cache, NULL, SHAPE(cache, kv), "layers.%d.k_cache", i);
    declare(m, CACHE, &L->v_cache, NULL, SHAPE(cache, kv), "layers.%d.v_cache", i);
    return kept;
}

enum { LOGITS = 1 << 23 };              // elements of logits that stand in memory at once: 32 MB of floats

static void work_layout(model *m)
{
    const config *c = &m->c;
    int N = m->p.tokens, q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim, chunk = LOGITS / c->vocab;
    chunk = chunk < 16 ? 16 : chunk;
    m->chunk = chunk = chunk < N ? chunk : N;
    declare(m, ACT, &m->xn, NULL, SHAPE(N, c->dim), "xn");
    declare(m, ACT, &m->hid, NULL, SHAPE(N, c->hidden), "hid");
    declare(m, WORK, &m->rope, NULL, SHAPE(m->p.positions, c->head_dim), "rope");
    declare(m, WORK, &m->hs, NULL, SHAPE(chunk, c->dim), "head.x");
    declare(m, WORK, &m->hn, NULL, SHAPE(chunk, c->dim), "head.xn");
    declare(m, WORK, &m->logits, NULL, SHAPE(chunk, c->vocab), "logits");
    declare(m, STAT, &m->losses, NULL, SHAPE(N, 1), "losses");
    for (mat **w = (mat *[]){&m->s, &m->ds, &m->u, &m->du, NULL}; *w; w++)
        if (elements(**w)) declare(m, WORK, *w, NULL, SHAPE((*w)->rows, (*w)->cols), "work");
    if (elements(m->w)) declare(m, m->p.train ? WORK : AUX, &m->w, NULL, SHAPE(m->w.rows, m->w.cols), "work");     // merging is wide
    if (!m->p.train) return;
    declare(m, WORK, &m->dhs, NULL, SHAPE(chunk, c->dim), "head.dx");
    declare(m, WORK, &m->dhn, NULL, SHAPE(chunk, c->dim), "head.dxn");
    declare(m, ACT, &m->dx, NULL, SHAPE(N, c->dim), "dx");
    declare(m, ACT, &m->dxn, NULL, SHAPE(N, c->dim), "dxn");
    declare(m, ACT, &m->dq, NULL, SHAPE(N, q), "dq");
    declare(m, ACT, &m->dk, NULL, SHAPE(N, kv), "dk");
    declare(m, ACT, &m->dv, NULL, SHAPE(N, kv), "dv");
    declare(m, ACT, &m->datt, NULL, SHAPE(N, q), "datt");
    declare(m, ACT, &m->dgate, NULL, SHAPE(N, c->hidden), "dgate");
    declare(m, ACT, &m->dup, NULL, SHAPE(N, c->hidden), "dup");
    declare(m, ACT, &m->dhid, NULL, SHAPE(N, c->hidden), "dhid");
}

// Every tensor of the model, one line each.
static void layout(model *m)
{
    const config *c = &m->c;
    enum kind matrix = full_training(m) ? PARAM : BASE, vector = full_training(m) ? PARAM : NORM;
    memset(m->used, 0, sizeof m->used);
    arrsetlen(m->tensors, 0);
    m->trainable = 0;
    m->s = m->ds = m->u = m->du = m->w = (mat){0};
    declare(m, matrix, &m->embed, &m->dembed, SHAPE(c->vocab, c->dim), "model.embed_tokens.weight");
    declare(m, ACT, &m->layers[0].x, NULL, SHAPE(m->p.tokens, c->dim), "layers.0.x");
    for (int i = 0; i < c->layers; i++) {
        level before = level_now(m);
        layer_weights(m, &m->layers[i], i);
        level kept = layer_activations(m, &m->layers[i], i + 1 < c->layers ? &m->layers[i + 1].x : &m->last, i);
        if (!m->p.train) kept = before;
        if (i + 1 < c->layers) m->used[ACT] = kept.act, m->used[STAT] = kept.stat;
    }
    declare(m, vector, &m->norm, &m->dnorm, SHAPE(c->dim), "model.norm.weight");
    if (c->tied) m->head = m->embed, m->dhead = m->dembed;
    else declare(m, matrix, &m->head, &m->dhead, SHAPE(c->vocab, c->dim), "lm_head.weight");
    work_layout(m);
    if (m->p.modules && !m->p.targets) refuse(m, "the adapter's \"target_modules\" name no linear layer of this model");
}

// The first walk alone: what a method would train and need on this config. Allocates nothing.
static void model_measure(model *m, config c, plan p)
{
    m->c = c, m->p = p;
    m->layers = alloc((size_t)c.layers, sizeof *m->layers);
    layout(m);
}

static needs needs_of(const model *m)
{
    const plan *p = &m->p;
    needs n = {.heads = m->c.kv_heads, .keys = p->positions, .tokens = p->tokens, .train = p->train};
    n.trained = 2 * (size_t)p->rank * (size_t)p->rank;                  // dora's A Aᵀ (r, r), made wider
    for (int i = 0; i < arrlen(m->tensors); i++) {
        const tensor *t = &m->tensors[i];
        size_t size = elements(*t->at);
        if (t->kind == BASE && size > n.weight) n.weight = size;
        if ((t->kind == PARAM || t->kind == START) && size > n.trained) n.trained = size;
    }
    if (p->cache_rows) n.fetched = (size_t)m->chunk * (size_t)m->c.vocab;
    return n;
}

// All memory of a model, once it lies there: every block, the ops' own work space, and the base.
static inline double planned_bytes(const model *m)
{
    double bytes = 3 * (double)m->used[PARAM] * sizeof(wide) + (double)dev_reserve(needs_of(m), 0);
    for (int k = NORM; k < KINDS; k++) bytes += (double)m->used[k] * (double)dtypes[type_of_kind((enum kind)k)].size;
    for (int i = 0; i < arrlen(m->tensors); i++)
        if (m->tensors[i].kind == BASE) bytes += (double)elements(*m->tensors[i].at) * (double)dtypes[m->tensors[i].at->type].size;
    return bytes;
}

static dev device_block(size_t bytes, const char *what)
{
    dev p = dev_alloc(bytes);
    if (!p) die("out of memory: %.1f GB for %s; a smaller --batch, --seq or --rank needs less", (double)bytes / 1e9, what);
    return p;
}

// All that trains, or its gradients, or moments: one block, as one matrix. Tensors are padded to 16 elements by zeros.
static mat flat(const model *m, dev block)
{
    return mat_of(block, TYPE_OF(wide), SHAPE((int)(m->used[PARAM] / 16), 16));
}

// cos and sin of position × frequency, Hugging Face's order: frequency i rotates elements i and i + head_dim/2.
static void rope_table(model *m)
{
    int half = m->c.head_dim / 2;
    wide *table = alloc((size_t)m->p.positions * (size_t)half * 2, sizeof *table);
    for (int t = 0; t < m->p.positions; t++)
        for (int i = 0; i < half; i++) {
            double angle = t * pow(m->c.theta, -(double)i / half);
            table[t * 2 * half + i] = (wide)cos(angle);
            table[t * 2 * half + half + i] = (wide)sin(angle);
        }
    put(m->rope, table, TYPE_OF(wide));
    free(table);
}

static void model_allocate(model *m)
{
    static const char *const what[KINDS] = {"", "norms", "trained weights", "their start", "activations", "statistics", "work space", "norms of adapters", "the key-value cache"};
    if (*m->refused) die("%s", m->refused);
    for (int k = NORM; k < KINDS; k++)
        if (m->used[k]) m->block[k] = device_block(m->used[k] * dtypes[type_of_kind((enum kind)k)].size, what[k]);
    if (m->p.train) {
        size_t bytes = m->used[PARAM] * sizeof(wide);
        m->grad = device_block(bytes, "gradients");
        m->moment1 = device_block(bytes, "AdamW's first moments");
        m->moment2 = device_block(bytes, "AdamW's second moments");
    }
    size_t tokens = (size_t)m->p.tokens * sizeof(int);
    m->ids = device_block(tokens, "ids"), m->pos = device_block(tokens, "ids");
    m->label = device_block(tokens, "ids"), m->target_row = device_block(tokens, "ids");
    dev_reserve(needs_of(m), 1);
    m->walk = 1;
    layout(m);
    rope_table(m);
}

// A tied model may have its head in the file too, as long as it is the embedding. One of its own would be lost.
static void check_tied(model *m)
{
    ptrdiff_t head = shgeti(m->file.tensors, "lm_head.weight"), embed = shgeti(m->file.tensors, "model.embed_tokens.weight");
    if (head < 0) return;
    stored h = m->file.tensors[head].value, e = m->file.tensors[embed].value;
    size_t bytes = elements(e.at) * dtypes[e.at.type].size;
    int same = h.at.type == e.at.type && elements(h.at) == elements(e.at);
    if (!same || memcmp((const void *)(uintptr_t)h.at.p, (const void *)(uintptr_t)e.at.p, bytes))
        die("%s: lm_head.weight is not model.embed_tokens.weight, though config.json says \"tie_word_embeddings\": true; "
            "set it to false to use both, or remove one tensor", h.file);
}

// Points base weights into the mapped file and copies the rest from it. Everything is checked: names, shapes, leftovers.
static void model_load(model *m, const char *dir)
{
    size_t found = 0;
    char a[64], b[64];
    for (int i = 0; i < shlen(m->file.tensors); i++)
        if (!strstr(m->file.tensors[i].key, "rotary_emb.inv_freq")) expect_usable(m->file.tensors[i].value);
    for (int i = 0; i < arrlen(m->tensors); i++) {
        tensor *t = &m->tensors[i];
        if (strncmp(t->name, "model.", 6) && strcmp(t->name, "lm_head.weight")) continue;
        ptrdiff_t at = shgeti(m->file.tensors, t->name);
        if (at < 0) die("%s: tensor %s %s is missing", dir, t->name, shape_text(t->shape, a));
        stored s = m->file.tensors[at].value;
        if (memcmp(&s.shape, &t->shape, sizeof(shape)))
            die("%s: tensor %s has shape %s, config.json asks for %s", s.file, t->name, shape_text(s.shape, a), shape_text(t->shape, b));
        if (t->kind == BASE) *t->at = dev_weight(s.at), m->reads_file |= t->at->p == s.at.p;
        else put_stored(*t->at, s);
        if (t->kind == PARAM && !isfinite(sum_of_squares(*t->at))) die("%s: tensor %s holds NaN or Inf", s.file, t->name);
        found++;
    }
    if (m->c.tied) check_tied(m);
    if (m->c.tied) m->head = m->embed;
    for (int i = 0; i < shlen(m->file.tensors) && found < shlenu(m->file.tensors); i++) {
        const char *name = m->file.tensors[i].key;
        int known = strstr(name, "rotary_emb.inv_freq") || (m->c.tied && !strcmp(name, "lm_head.weight"));
        for (int j = 0; j < arrlen(m->tensors) && !known; j++) known = !strcmp(name, m->tensors[j].name);
        if (!known) die("%s: tensor %s does not belong to a Llama of this config.json", m->file.tensors[i].value.file, name);
    }
}

static void model_free(model *m)
{
    for (int i = 0; i < arrlen(m->tensors); i++)
        if (m->tensors[i].kind == BASE && m->tensors[i].at->p) dev_weight_free(*m->tensors[i].at);
    for (int k = 0; k < KINDS; k++) dev_free(m->block[k]);
    dev_free(m->grad), dev_free(m->moment1), dev_free(m->moment2);
    dev_free((dev)m->ids), dev_free((dev)m->pos), dev_free((dev)m->label), dev_free((dev)m->target_row);
    dev_reserve((needs){0}, 1);
    checkpoint_close(&m->file);
    arrfree(m->tensors);
    free(m->layers);
    free(m->c.text);
}

// ---- 7  forward and backward -------------------------------------------------------------------------------

// A micro-batch. Rows are laid end to end without padding; `spans` says where each begins. Padding would add rows
// that no loss reads, so leaving it out gives the same numbers for less work.
typedef struct {
    int tokens, targets, rows;
    int *ids, *pos;             // (tokens): what is read, and its place in its sequence
    int *target_row, *label;    // (targets): the row that predicts, and the token it should predict
    span *spans;                // (rows)
    int cached;                 // generation: keys and values join the cache, and the spans' keys are rows of it
} batch;

// A micro-batch reads and writes nothing beyond what the plan has memory for.
static void batch_check(const model *m, const batch *b)
{
    int ok = b->tokens <= m->p.tokens, keys = b->cached ? m->p.cache_rows : b->tokens;
    if (!ok) die("a micro-batch of %d tokens exceeds the plan of %d", b->tokens, m->p.tokens);
    for (int i = 0; i < b->tokens; i++)
        ok &= b->ids[i] >= 0 && b->ids[i] < m->c.vocab && b->pos[i] >= 0 && b->pos[i] < m->p.positions;
    for (int i = 0; i < b->targets; i++)
        ok &= b->target_row[i] >= 0 && b->target_row[i] < b->tokens && b->label[i] >= 0 && b->label[i] < m->c.vocab;
    for (int i = 0; i < b->rows; i++) {
        span s = b->spans[i];
        ok &= s.q >= 0 && s.nq >= 0 && s.q + s.nq <= b->tokens && s.k >= 0 && s.nq <= s.nk && s.k + s.nk <= keys;
    }
    if (!ok) die("a micro-batch holds an id, a position or a row that the plan has no place for");
}

// Copies the micro-batch to the device and gives every activation its N rows.
static void batch_enter(model *m, const batch *b)
{
    batch_check(m, b);
    for (int i = 0; i < arrlen(m->tensors); i++)
        if (m->tensors[i].kind == ACT || m->tensors[i].kind == STAT) *m->tensors[i].at = rows_of(*m->tensors[i].at, 0, b->tokens);
    put_ints(m->ids, b->ids, (size_t)b->tokens);
    put_ints(m->pos, b->pos, (size_t)b->tokens);
    put_ints(m->target_row, b->target_row, (size_t)b->targets);
    put_ints(m->label, b->label, (size_t)b->targets);
}

// S(x), Bone's sum over the shards of x, in the work space (N, r). Its place is there wherever a linear that reads x (a bit for
// each, as plan.targets) has an adapter made of it; elsewhere it is no matrix, and no op writes it.
static mat shards_of(const model *m, mat x) { return shaped(m->s, 1, x.rows, m->p.rank); }

enum { QKV = 1 | 2 | 4, ONLY_O = 8, GATE_UP = 16 | 32, ONLY_DOWN = 64 };
static mat shards_for(const model *m, int readers, mat x)
{
    return m->p.method->wants_shards && m->p.targets & readers ? shards_of(m, x) : (mat){0};
}

static void linear_forward(model *m, linear *l, mat y, mat x, enum mode mode) { l->method->forward(m, l, y, x, mode); }
static void linear_backward(model *m, linear *l, mat dx, mat dy, mat x) { l->method->backward(m, l, dx, dy, x); }

// Generation: this step's keys and values join the cache, behind those of earlier steps.
static void cache_append(layer *L, const batch *b)
{
    for (int i = 0; i < b->rows; i++) {
        span s = b->spans[i];
        int at = s.k + s.nk - s.nq;
        copy(rows_of(L->k_cache, at, s.nq), rows_of(L->k, s.q, s.nq));
        copy(rows_of(L->v_cache, at, s.nq), rows_of(L->v, s.q, s.nq));
    }
}

//  x → mid = x + Wo attention(rope(Wq n), rope(Wk n), Wv n),  n = rmsnorm(x)
static void attention_block(model *m, layer *L, const batch *b)
{
    const config *c = &m->c;
    rmsnorm_forward(m->xn, shards_for(m, QKV, m->xn), L->mid, L->x, L->norm1, c->eps);      // mid = x
    linear_forward(m, &L->q_proj, L->q, m->xn, SET);                    // (N, heads·head_dim)
    linear_forward(m, &L->k_proj, L->k, m->xn, SET);                    // (N, kv_heads·head_dim)
    linear_forward(m, &L->v_proj, L->v, m->xn, SET);
    rope(L->q, m->pos, m->rope, +1);
    rope(L->k, m->pos, m->rope, +1);
    mat k = L->k, v = L->v;
    if (b->cached) {
        cache_append(L, b);
        k = L->k_cache;
        v = L->v_cache;
    }
    attention_forward(L->att, L->lse, L->q, k, v, c->head_dim, b->spans, b->rows);
    shard_sum(shards_for(m, ONLY_O, L->att), L->att);
    linear_forward(m, &L->o_proj, L->mid, L->att, ADD);                 // mid += o(att)
}

//  gate = Wgate n,  up = Wup n,  n = rmsnorm(mid);  next = mid
static void gate_and_up(model *m, layer *L, mat next)
{
    rmsnorm_forward(m->xn, shards_for(m, GATE_UP, m->xn), next, L->mid, L->norm2, m->c.eps);
    linear_forward(m, &L->gate_proj, L->gate, m->xn, SET);              // (N, hidden)
    linear_forward(m, &L->up_proj, L->up, m->xn, SET);
}

//  mid → next = mid + Wdown (silu(gate) ⊙ up)
static void layer_forward(model *m, layer *L, mat next, const batch *b)
{
    attention_block(m, L, b);
    gate_and_up(m, L, next);
    swiglu_forward(m->hid, shards_for(m, ONLY_DOWN, m->hid), L->gate, L->up);
    linear_forward(m, &L->down_proj, next, m->hid, ADD);                // next += down(hid)
}

// The same lines from the last to the first. On entry m->dx is d(next), on return dx. xn and hid are recomputed, and with
// --recompute whatever else the next layer has overwritten.
static void layer_backward(model *m, layer *L, const batch *b, int dx_wanted)
{
    const config *c = &m->c;
    const mat none = {0};
    if (m->p.recompute == 2) attention_block(m, L, b);
    if (m->p.recompute) gate_and_up(m, L, none);
    swiglu_forward(m->hid, shards_for(m, ONLY_DOWN, m->hid), L->gate, L->up);
    zero(m->dhid), zero(m->dgate), zero(m->dup), zero(m->dxn);
    linear_backward(m, &L->down_proj, m->dhid, m->dx, m->hid);          // next = mid + down(hid)
    swiglu_backward(m->dgate, m->dup, m->dhid, L->gate, L->up);         // hid = silu(gate) up
    rmsnorm_forward(m->xn, shards_for(m, GATE_UP, m->xn), none, L->mid, L->norm2, c->eps);
    linear_backward(m, &L->gate_proj, m->dxn, m->dgate, m->xn);
    linear_backward(m, &L->up_proj, m->dxn, m->dup, m->xn);
    rmsnorm_backward(m->dx, L->dnorm2, m->dxn, L->mid, L->norm2, c->eps);  // dx becomes d(mid): the residual adds up

    zero(m->datt), zero(m->dq), zero(m->dk), zero(m->dv), zero(m->dxn);
    shard_sum(shards_for(m, ONLY_O, L->att), L->att);
    linear_backward(m, &L->o_proj, m->datt, m->dx, L->att);             // mid = x + o(att)
    attention_backward(m->dq, m->dk, m->dv, m->datt, L->q, L->k, L->v, L->att, L->lse, c->head_dim, b->spans, b->rows);
    rope(m->dq, m->pos, m->rope, -1);
    rope(m->dk, m->pos, m->rope, -1);
    rmsnorm_forward(m->xn, shards_for(m, QKV, m->xn), none, L->x, L->norm1, c->eps);
    mat dxn = m->dxn;
    if (!dx_wanted) dxn.p = NULL;                                       // nothing below trains: W's share of dx is not computed
    linear_backward(m, &L->q_proj, dxn, m->dq, m->xn);
    linear_backward(m, &L->k_proj, dxn, m->dk, m->xn);
    linear_backward(m, &L->v_proj, dxn, m->dv, m->xn);
    rmsnorm_backward(dx_wanted ? m->dx : none, L->dnorm1, m->dxn, L->x, L->norm1, c->eps);  // x = … + x
}

static void model_forward(model *m, const batch *b)
{
    batch_enter(m, b);
    embedding_forward(m->layers[0].x, m->embed, m->ids);
    for (int i = 0; i < m->c.layers; i++)
        layer_forward(m, &m->layers[i], i + 1 < m->c.layers ? m->layers[i + 1].x : m->last, b);
    if (m->reads_file) checkpoint_unchanged(&m->file);
}

// Logits of up to a chunk of rows, into m->logits: the rows gathered, normed, and multiplied with the head.
static void head_forward(model *m, dev_ints rows, int n)
{
    for (mat **w = (mat *[]){&m->hs, &m->hn, &m->dhs, &m->dhn, &m->logits, NULL}; *w; w++) **w = rows_of(**w, 0, n);
    embedding_forward(m->hs, m->last, rows);                            // a gather is a look-up with the rows as ids
    rmsnorm_forward(m->hn, (mat){0}, (mat){0}, m->hs, m->norm, m->c.eps);
    matmul_nt(m->logits, m->hn, m->head, 1, SET);                       // (n, vocab)
}

// Σ of the losses of the micro-batch. scale ≠ 0: also m->dx = scale · d(Σ loss)/d(last), and the head's gradients.
// Chunk by chunk, so that (N, vocab) never stands in memory; rows without a target are never multiplied at all.
static double head_loss(model *m, const batch *b, double scale)
{
    if (scale) zero(m->dx);
    for (int i = 0; i < b->targets; i += m->chunk) {
        int n = b->targets - i < m->chunk ? b->targets - i : m->chunk;
        head_forward(m, m->target_row + i, n);
        cross_entropy(rows_of(m->losses, i, n), m->logits, m->label + i, scale);
        if (!scale) continue;
        zero(m->dhn), zero(m->dhs);
        matmul_tn(m->dhead, m->logits, m->hn, 1, ADD);                  // logits = hn headᵀ
        matmul_nn(m->dhn, m->logits, m->head, 1, ADD);
        rmsnorm_backward(m->dhs, m->dnorm, m->dhn, m->hs, m->norm, m->c.eps);
        embedding_backward(m->dx, m->dhs, m->target_row + i);           // a scatter is a look-up's backward
    }
    wide *losses = alloc((size_t)b->targets, sizeof *losses);
    double sum = 0;
    get(losses, rows_of(m->losses, 0, b->targets));
    for (int i = 0; i < b->targets; i++) sum += (double)losses[i];
    free(losses);
    return sum;
}

// Forward, and with scale ≠ 0 backward: gradients of scale · Σ loss are added to every dparameter. Returns Σ loss.
static double model_step(model *m, const batch *b, double scale)
{
    model_forward(m, b);
    double loss = head_loss(m, b, scale);
    if (!scale) return loss;
    for (int i = m->c.layers - 1; i >= 0; i--)
        layer_backward(m, &m->layers[i], b, i > 0 || m->dembed.p);
    embedding_backward(m->dembed, m->dx, m->ids);
    return loss;
}

// ---- 8  safetensors out ------------------------------------------------------------------------------------
// A directory is written whole or not at all: under a temporary name beside its place, synced, then renamed.

typedef struct output {
    char name[112];
    shape shape;
    enum dtype type;            // in the file
    mat at, below, beside;      // the data; `below`: further rows; `beside`: minus these, as further columns
    linear *merge;              // or: W of this layer with its adapter merged in
} output;

static char staged[PATH_MAX];   // the directory in the making, removed if the program ends before it is published

// Every file name that was staged so far. A signal may come at any moment, in any thread: a name is on the list before its file is
// there, and it is never taken off.
typedef struct staged_file { struct staged_file *next; char name[]; } staged_file;
static staged_file *staged_files;

// Runs in signal handlers, too: it calls nothing that they may not.
static void stage_discard(void)
{
    int dir = *staged ? open(staged, O_RDONLY | O_DIRECTORY) : -1;
    if (dir < 0) return;
    for (const staged_file *f = __atomic_load_n(&staged_files, __ATOMIC_ACQUIRE); f; f = f->next) unlinkat(dir, f->name, 0);
    close(dir);
    rmdir(staged);
    *staged = 0;
}

static void stage_begin(const char *out)
{
    char name[PATH_MAX];
    if (snprintf(name, sizeof name, "%s.tmp%d", out, (int)getpid()) >= (int)sizeof name) die("%s: name too long", out);
    if (mkdir(name, 0777)) die("cannot write %s: %s; the folder it goes into must exist and be writable", out, strerror(errno));
    strcpy(staged + 1, name + 1);
    __atomic_store_n(staged, *name, __ATOMIC_RELEASE);         // a signal sees no path or all of it
}

// Opens a file of the directory in the making. Its path comes in a fresh string.
static FILE *stage_open(const char *name, char **path)
{
    staged_file *f = staged_files;
    while (f && strcmp(f->name, name)) f = f->next;
    if (!f) {
        f = alloc(sizeof *f + strlen(name) + 1, 1);
        strcpy(f->name, name);
        f->next = staged_files;
        __atomic_store_n(&staged_files, f, __ATOMIC_RELEASE);
    }
    *path = join(staged, name);
    FILE *file = fopen(*path, "wb");
    if (!file) die("cannot write %s: %s", *path, strerror(errno));
    return file;
}

// The regular files of a directory, links to some included: an array (stb_ds) of fresh strings.
static char **files_of(const char *dir)
{
    char **names = NULL;
    DIR *d = opendir(dir);
    if (!d) die("%s: %s", dir, strerror(errno));
    for (struct dirent *e; (e = readdir(d));) {
        struct stat st;
        char *path = join(dir, e->d_name);
        if (!stat(path, &st) && S_ISREG(st.st_mode)) arrput(names, strdup(e->d_name));
        free(path);
    }
    closedir(d);
    return names;
}

static void free_names(char **names)
{
    for (int i = 0; i < arrlen(names); i++) free(names[i]);
    arrfree(names);
}

// The files that a training run wrote into dir, by the list in its state.json. NULL if no run wrote there. Runs before there was such
// a list wrote these.
static char **run_files(const char *dir)
{
    static const char *const before[] = {"config.json", "generation_config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors",
        "state.safetensors", "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", NULL};
    char *path = join(dir, "state.json"), **names = NULL;
    size_t bytes = 0;
    struct stat st;
    char *text = !stat(path, &st) && S_ISREG(st.st_mode) ? read_file(path, &bytes) : NULL;
    cJSON *state = text ? cJSON_ParseWithLength(text, bytes) : NULL, *files = cJSON_GetObjectItemCaseSensitive(state, "files"), *item;
    if (cJSON_HasObjectItem(state, "--method")) arrput(names, strdup("state.json"));
    for (const char *const *name = before; *name && names && !files; name++) arrput(names, strdup(*name));
    cJSON_ArrayForEach(item, files)
        if (names && cJSON_IsString(item) && !strchr(item->valuestring, '/')) arrput(names, strdup(item->valuestring));
    cJSON_Delete(state);
    free(text), free(path);
    return names;
}

// Removes what a training run left in dir, and dir with it unless somebody put more there.
static void remove_run(const char *dir)
{
    char **names = run_files(dir);
    for (int i = 0; i < arrlen(names); i++) {
        char *path = join(dir, names[i]);
        unlink(path);
        free(path);
    }
    free_names(names);
    if (rmdir(dir) && (errno == ENOTEMPTY || errno == EEXIST)) fprintf(stderr, "note: %s holds files that no run wrote; they were in the directory that is replaced\n", dir);
}

static void sync_path(const char *path)
{
    int fd = open(path, O_RDONLY);
    if (fd < 0 || (fsync(fd) && errno != EINVAL)) die("%s: %s", path, strerror(errno));
    close(fd);
}

// Moves the finished directory to its place. An older one there is exchanged in one step and then removed; where the file
// system cannot exchange (NFS), it steps aside first.
static void stage_publish(const char *out)
{
    sync_path(staged);
    if (rename(staged, out)) {
        if (errno != ENOTEMPTY && errno != EEXIST) die("cannot write %s: %s", out, strerror(errno));
        if (renameat2(AT_FDCWD, staged, AT_FDCWD, out, RENAME_EXCHANGE)) {
            char older[PATH_MAX + 8];
            snprintf(older, sizeof older, "%s.old", staged);
            if (rename(out, older) || rename(staged, out) || rename(older, staged)) die("cannot replace %s: %s", out, strerror(errno));
        }
        remove_run(staged);
    }
    *staged = 0;
    char *parent = join(out, "..");
    sync_path(parent);
    free(parent);
}

static int same_file(const char *a, const char *b)
{
    struct stat x, y;
    return !stat(a, &x) && !stat(b, &y) && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

// A file that keeps `dir` from being replaced, in a fresh string. NULL if there is none: the directory is empty, or what an
// earlier training run wrote and may write again.
static char *kept_file(const char *dir, int over_a_run)
{
    char *kept = NULL, **ours = over_a_run ? run_files(dir) : NULL;
    DIR *d = opendir(dir);
    if (!d) die("cannot write %s: %s", dir, strerror(errno));
    for (struct dirent *e; !kept && (e = readdir(d));) {
        int known = !strcmp(e->d_name, ".") || !strcmp(e->d_name, "..");
        for (int i = 0; i < arrlen(ours); i++) known |= !strcmp(ours[i], e->d_name);
        if (!known) kept = strdup(e->d_name);
    }
    closedir(d);
    free_names(ours);
    return kept;
}

// Stops before the work if its result could not be put at `path`, or would replace anything but the result of an earlier
// training run (where over_a_run allows that). Returns the path to write to: links followed, no slash at the end.
static char *check_out(const char *option, const char *path, const char *base, int over_a_run)
{
    struct stat here, above;
    char *out = realpath(path, NULL);
    if (!out) {
        out = strdup(path);
        for (size_t n = strlen(out); n > 1 && out[n - 1] == '/'; n--) out[n - 1] = 0;
        if (!*out || !lstat(out, &here)) die("%s %s: expected the name of a directory", option, path);
    } else {
        char *parent = join(out, ".."), *kept;
        if (!stat(out, &here) && !S_ISDIR(here.st_mode)) die("%s %s: exists and is not a directory", option, path);
        if (stat(out, &here) || stat(parent, &above)) die("%s %s: %s", option, path, strerror(errno));
        if (here.st_dev != above.st_dev || same_file(out, "/")) die("%s %s: is a mount point, which cannot be replaced; name a directory inside it", option, path);
        if (same_file(out, ".")) die("%s %s: is the current folder; name a directory inside it", option, path);
        if (same_file(out, base)) die("%s %s: is --model itself; name a new directory", option, path);
        if ((kept = kept_file(out, over_a_run))) die("%s %s: holds %s, which would be lost; name a new directory", option, path, kept);
        free(parent);
    }
    stage_begin(out);
    stage_discard();
    return out;
}

static void write_checked(FILE *f, const void *data, size_t bytes, const char *path)
{
    if (fwrite(data, 1, bytes, f) != bytes) die("cannot write %s: %s", path, strerror(errno));
}

static void close_checked(FILE *f, const char *path)
{
    if (fflush(f) || (fsync(fileno(f)) && errno != EINVAL)) die("cannot write %s: %s", path, strerror(errno));
    if (fclose(f)) die("cannot write %s: %s", path, strerror(errno));
}

static void stage_file(const char *name, const void *data, size_t bytes)
{
    char *path;
    FILE *f = stage_open(name, &path);
    write_checked(f, data, bytes, path);
    close_checked(f, path);
    free(path);
}

static void stage_json(const char *name, cJSON *json)
{
    char *text = cJSON_Print(json);
    if (!text) die("out of memory");
    stage_file(name, text, strlen(text));
    free(text);
    cJSON_Delete(json);
}

static cJSON *safetensors_header(const output *o, int n)
{
    cJSON *header = cJSON_CreateObject();
    cJSON_AddStringToObject(cJSON_AddObjectToObject(header, "__metadata__"), "format", "pt");   // what transformers asks for
    double offset = 0;
    for (int i = 0; i < n; i++) {
        cJSON *item = cJSON_AddObjectToObject(header, o[i].name);
        cJSON_AddStringToObject(item, "dtype", dtypes[o[i].type].name);
        cJSON *dims = cJSON_AddArrayToObject(item, "shape"), *offsets = cJSON_AddArrayToObject(item, "data_offsets");
        double size = (double)dtypes[o[i].type].size;
        for (int d = 0; d < 3 && o[i].shape.n[d]; d++) {
            cJSON_AddItemToArray(dims, cJSON_CreateNumber(o[i].shape.n[d]));
            size *= o[i].shape.n[d];
        }
        cJSON_AddItemToArray(offsets, cJSON_CreateNumber(offset));
        cJSON_AddItemToArray(offsets, cJSON_CreateNumber(offset += size));
    }
    return header;
}

// W' = W + adapter, in the work space. `survived` tells what part of the update rounding to the file's dtype leaves.
static mat merged(model *m, linear *l)
{
    mat W = shaped(m->w, 1, l->W.rows, l->W.cols);
    copy(W, l->W);
    l->method->merge(m, l, W);
    return W;
}

// The tensor as contiguous wide numbers. x has room for all of it.
static void output_fetch(model *m, const output *o, wide *x)
{
    if (o->merge) { get(x, merged(m, o->merge)); return; }
    size_t n = elements(o->at);
    get(x, o->at);
    if (o->below.p) get(x + n, o->below);
    if (!o->beside.p) return;
    int rows = o->at.rows, a = o->at.cols, b = o->beside.cols;            // [at | -beside], row by row from the last
    wide *y = alloc(elements(o->beside), sizeof *y);
    get(y, o->beside);
    for (int i = rows - 1; i >= 0; i--) {
        memmove(x + (size_t)i * (size_t)(a + b), x + (size_t)i * (size_t)a, (size_t)a * sizeof *x);
        for (int j = 0; j < b; j++) x[(size_t)i * (size_t)(a + b) + (size_t)(a + j)] = -y[(size_t)i * (size_t)b + (size_t)j];
    }
    free(y);
}

// The largest magnitude of n numbers; NaN or Inf if there is one.
static double largest(const wide *x, size_t n)
{
    double most = 0;
    for (size_t i = 0; i < n && isfinite(most); i++) if (!(fabs((double)x[i]) <= most)) most = fabs((double)x[i]);
    return most;
}

// Stops before a tensor is written that holds NaN or Inf, or would in its file's dtype. x is what was fetched; it is overwritten then.
static void refuse_not_finite(model *m, const output *o, wide *x, size_t n)
{
    double most = largest(x, n);
    if (isfinite(rounded(most, o->type))) return;
    ptrdiff_t at = shgeti(m->file.tensors, o->name);
    if (o->merge) get(x, o->merge->W);
    if (at >= 0 && !isfinite(largest(x, n))) die("%s: tensor %s holds NaN or Inf and is not written; get this model anew", m->file.tensors[at].value.file, o->name);
    if (!isfinite(most)) die("tensor %s holds NaN or Inf and is not written%s", o->name, o->merge ? " with the adapter merged in; the adapter's numbers are too large" : "");
    die("tensor %s has a %g%s, which is Inf in %s; start from a copy of the model in float32 or bfloat16", o->name, most, o->merge ? " with the adapter merged in" : "", dtypes[o->type].name);
}

static void safetensors_write(model *m, const char *name, const output *o, int n)
{
    char *path, *text;
    FILE *f = stage_open(name, &path);
    cJSON *header = safetensors_header(o, n);
    if (!(text = cJSON_PrintUnformatted(header))) die("out of memory");
    uint64_t bytes = (strlen(text) + 7) / 8 * 8;                          // padded with spaces: the data is 8-byte aligned
    unsigned char length[8];
    for (int i = 0; i < 8; i++) length[i] = (unsigned char)(bytes >> 8 * i);
    write_checked(f, length, 8, path);
    write_checked(f, text, strlen(text), path);
    write_checked(f, "        ", bytes - strlen(text), path);
    for (int i = 0; i < n; i++) {
        size_t count = elements(mat_of(NULL, F32, o[i].shape));
        wide *x = alloc(count, sizeof *x);
        output_fetch(m, &o[i], x);
        refuse_not_finite(m, &o[i], x, count);
        if (o[i].type != TYPE_OF(wide)) narrow(x, o[i].type, x, count);
        write_checked(f, x, count * dtypes[o[i].type].size, path);
        free(x);
    }
    if (m->reads_file) checkpoint_unchanged(&m->file);
    close_checked(f, path);
    free(text), free(path);
    cJSON_Delete(header);
}
#endif // __cplusplus
#endif // MODEL_H
