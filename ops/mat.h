//  ops/mat.h: views of a matrix, and its dtypes.

#ifndef MAT_H
#define MAT_H
#include "host.h"
#include "ops.h"

static const struct {
    const char *name;
    size_t size;                                               // bytes a number
} dtypes[DTYPES] = {{"F32", 4}, {"F64", 8}, {"BF16", 2}, {"F16", 2}};

// n numbers to a dtype. out may be x itself: no dtype is wider than `wide` in a build that writes it.
static inline void narrow(void *out, enum dtype type, const wide *x, size_t n)
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
static inline double rounded(double x, enum dtype type)
{
    if (type == F64) return x;
    float f = (float)x;
    return (double)(type == F32 ? f : type == BF16 ? from_bf16(to_bf16(f)) : from_f16(to_f16(f)));
}

static inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
static inline size_t elements(mat m) { return (size_t)m.batch * (size_t)m.rows * (size_t)m.cols; }

typedef struct { int n[3]; } shape;                            // {n}, {rows, cols} or {batch, rows, cols}
#define SHAPE(...) ((shape){{__VA_ARGS__}})

// m itself, once its last number is known to lie within its memory. Every view below goes through here: one
// that is planned too large ends with an error, and never reads or writes another matrix's numbers.
static inline mat view(mat m)
{
    size_t end = 0;
    if (elements(m)) end = (size_t)(m.batch - 1) * m.stride + (size_t)(m.rows - 1) * m.ld + (size_t)m.cols;
    if (m.p && end > m.room)
        die("a view of %d times (%d, %d) needs %zu numbers, its memory has %zu",
            m.batch, m.rows, m.cols, end, m.room);
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

static inline mat columns_of(mat m, int first, int n)          // columns first … first+n-1
{
    m = offset(m, (size_t)first);
    m.cols = n;
    m.spare = 0;
    return view(m);
}

static inline mat column_blocks(mat m, int r)                  // (N, in) as in/r matrices (N, r) side by side
{
    m.batch = m.cols / r;
    m.cols = r;
    m.stride = (size_t)r;
    m.spare = 0;
    return view(m);
}

// The same memory, front to back, in another shape.
static inline mat shaped(mat m, int batch, int rows, int cols)
{
    m.batch = batch;
    m.rows = rows;
    m.cols = cols;
    m.ld = (size_t)cols;
    m.stride = (size_t)rows * (size_t)cols;
    m.spare = 0;
    return view(m);
}

// The columns of a row whose next row begins at 16 bytes again, even in 16 bits: tensor cores ask for that.
static inline int pitch(int cols) { return (cols + 7) / 8 * 8; }

// A matrix with such rows, of which only so many columns are in use.
static inline mat first_columns(mat m, int cols)
{
    m.cols = cols;
    m.spare = 1;
    return m;
}

// The same memory as one matrix with such rows.
static inline mat aligned(mat m, int rows, int cols)
{
    return first_columns(shaped(m, 1, rows, pitch(cols)), cols);
}

static inline mat mat_of(dev p, enum dtype type, shape s)
{
    int d = s.n[2] ? 3 : s.n[1] ? 2 : 1;
    mat m = {p, type, d > 1 ? s.n[d - 2] : 1, s.n[d - 1], (size_t)s.n[d - 1], d > 2 ? s.n[0] : 1, 0, 0, 0};
    m.stride = (size_t)m.rows * m.ld;
    m.room = elements(m);
    return m;
}

// All of m on the host, contiguous and wide. The caller frees it.
static inline wide *on_host(mat m)
{
    wide *x = (wide *)alloc(elements(m), sizeof *x);
    get(x, m);
    return x;
}

#endif
