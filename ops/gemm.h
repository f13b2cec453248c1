//  ops/gemm.h: the matrix product on a CPU, the plain one first.

#ifndef GEMM_H
#define GEMM_H
#include <omp.h>
#if defined __AVX512BF16__
#include <immintrin.h>
#endif
#include "mat.h"

// n numbers of any dtype at p, as reals: a pointer to where they lie if they are reals already, else to
// `buffer`, into which they are converted.
static inline const real *widened(const char *p, enum dtype type, size_t n, real *buffer)
{
    if (type == TYPE_OF(real) && (uintptr_t)p % sizeof(real) == 0) return (const real *)p;
    for (size_t i = 0; i < n; i++) {
        float f;
        double d;
        uint16_t h;
        if (type == F32) {
            memcpy(&f, p + 4 * i, 4);
            buffer[i] = (real)f;
        } else if (type == F64) {
            memcpy(&d, p + 8 * i, 8);
            buffer[i] = (real)d;
        } else {
            memcpy(&h, p + 2 * i, 2);
            buffer[i] = (real)(type == BF16 ? from_bf16(h) : from_f16(h));
        }
    }
    return buffer;
}

static inline char *at(mat m, int row, int col)                 // where element (row, col) lies
{
    return (char *)m.p + ((size_t)row * m.ld + (size_t)col) * dtypes[m.type].size;
}

// What a product is:  y[i,j] = scale Σ_k a[i,k] b[j,k].  `across` says that a matrix lies the other way
// round, with k down its rows: a[k,i], b[k,j]. The tests compare the fast product with this one.
__attribute__((unused))
static void gemm_plain(mat y, mat a, int a_across, mat b, int b_across, int K, real scale, enum mode mode)
{
    for (int i = 0; i < y.rows; i++)
        for (int j = 0; j < y.cols; j++) {
            double sum = 0;
            real u, v;
            for (int k = 0; k < K; k++) {
                const real *a_ik = widened(a_across ? at(a, k, i) : at(a, i, k), a.type, 1, &u);
                const real *b_jk = widened(b_across ? at(b, k, j) : at(b, j, k), b.type, 1, &v);
                sum += (double)*a_ik * (double)*b_jk;
            }
            real *out = (real *)at(y, i, j);
            *out = (mode == ADD ? *out : 0) + scale * (real)sum;
        }
}

// ---- the fast one -----------------------------------------------------------------------------------------
//
//  y (M, N) = scale · a (M, K) b (K, N).  Three loops, so that the innermost one runs from cache:
//
//    b  is cut into KC rows by NC columns, and those into slivers NR wide            (shared, L3)
//    a  is cut into MC rows by KC columns, and those into panels MR tall             (per thread, L2)
//    the kernel multiplies a panel with a sliver: an MR × NR tile of y, in registers while k runs
//
//                         sliver              here MR = 2, NR = 3: each step of k adds to all 6 numbers
//                         b b b  ↓ k          of the tile a product of one number of the panel's column
//                         b b b               and one of the sliver's row
//          panel  a a a   t t t
//          k →    a a a   t t t  tile of y
//
//  Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008. They copy every panel
//  and sliver, so that the kernel reads memory in order. Here matrices are often thin, and a copy costs
//  more than it gains: the kernel reads panels and slivers where they lie. It cannot do so, and a copy is
//  made (pack), for
//
//    slivers of a b that is given as (N, K): the NR numbers of one k lie in NR different rows
//    panels and slivers at the edge of a matrix: what is missing to MR or NR is filled with zeros
//    weights of another dtype: they are converted piece by piece, and never stand converted as a whole
//    everything under --bf16, which rounds
//    what is read so often, or from places so unlucky, that a copy saves more than it costs (in_place, below)
//
//  An element of y is always the same sum in the same order: wherever in y it lies, whether its panel was
//  copied or not, and however many threads there are. For threads share the rows and columns of y, never
//  the sum over k.

#if defined __AVX512F__
enum { VECTOR = 64, MR = 12 };          // bytes a vector; 12 × 2 of 32 registers hold the tile
#elif defined __AVX__
enum { VECTOR = 32, MR = 6 };           // 6 × 2 of 16
#else
enum { VECTOR = 16, MR = 6 };
#endif
enum { LANES = VECTOR / sizeof(real), NR = 2 * LANES, KC = 512, MC = 16 * MR, NC = 2048 };
enum { WIDEST = 32 };                    // of MR and NR
enum { PANEL_RUN = 8 * MR, SLIVER_RUN = 512 / sizeof(real) };       // columns that pack_across copies at once
enum { ABREAST = PANEL_RUN > SLIVER_RUN ? PANEL_RUN : SLIVER_RUN };  // what it converts at once, at most
typedef real vec __attribute__((vector_size(VECTOR)));
typedef __typeof__((vec){0} == (vec){0}) lanes;         // whole numbers, one a lane
// The same vector, at any address that a real may have.
typedef real loose_vec __attribute__((vector_size(VECTOR), aligned(sizeof(real)), may_alias));

// Two vectors of b are loaded once and used in MR multiply-adds each. GCC would make each multiply-add read
// b from memory again, at half the speed. This asm has no instruction: it says that a and b are in
// registers and may have changed there, so that memory will not do in their place.
#if defined __x86_64__
#define IN_REGISTERS(a, b) __asm__("" : "+v"(a), "+v"(b))
#else
#define IN_REGISTERS(a, b) (void)0
#endif

// y[l] = number from[l] of the 2·LANES numbers of a and then b. clang's own shuffle takes only constants
// written out.
#if defined __clang__
static inline vec pick_lanes(vec a, vec b, lanes from)
{
    vec y;
    for (int l = 0; l < LANES; l++) y[l] = from[l] < LANES ? a[from[l]] : b[from[l] - LANES];
    return y;
}
#else
#define pick_lanes(a, b, from) __builtin_shuffle(a, b, from)
#endif

// With --bf16, factors are rounded to the 8 bits of bf16 when they are copied, or made by attention. Two
// numbers that follow each other in the sum share a float of the copy, a pair, the first one in its lower
// half; an odd K is filled up with 0. So a sum over K takes half as many steps, and AVX512_BF16 has an
// instruction for each:
//
//     a0 a1 a2 a3 a4                       t += a1 b1, t += a0 b0,
//     → [a1|a0] [a3|a2] [0|a4]             then with the next pairs t += a3 b3, t += a2 b2, …
//
// Matmuls and attention do so where bf16_pairs is set.
static int bf16_pairs;

static inline int steps(int K, int pairs) { return pairs ? ceil_div(K, 2) : K; }

static inline real paired(real first, real second)
{
    uint32_t bits = (uint32_t)to_bf16((float)second) << 16 | to_bf16((float)first);
    real pair = 0;
    memcpy(&pair, &bits, 4);
    return pair;
}

// out[i] = the pair of first[i·apart] and second[i·apart]: of two rows (apart = 1), or of numbers side by
// side (apart = 2, second = first + 1). `out` may be `first`. AVX512_BF16 rounds two vectors of numbers side
// by side to one of pairs; two rows are first dealt into such.
static inline void pair_up(real *out, const real *first, const real *second, const int apart, int n)
{
    int i = 0;
#if defined __AVX512BF16__
    lanes low, high;                                            // lanes of a0 b0 a1 b1 …: the first, the rest
    #pragma GCC unroll 16
    for (int l = 0; l < LANES; l++) {
        low[l] = l / 2 + l % 2 * LANES;
        high[l] = low[l] + LANES / 2;
    }
    for (; i + LANES <= n; i += LANES) {
        vec a = *(const loose_vec *)(first + i * apart);
        vec b = *(const loose_vec *)(apart == 2 ? first + 2 * i + LANES : second + i);
        vec left = apart == 2 ? a : pick_lanes(a, b, low), right = apart == 2 ? b : pick_lanes(a, b, high);
        *(loose_vec *)(out + i) = (vec)_mm512_cvtne2ps_pbh((__m512)right, (__m512)left);
    }
#endif
    for (; i < n; i++) out[i] = paired(first[i * apart], second[i * apart]);
}

// The first numbers of a vector of pairs, and the second ones.
static inline vec evens(vec v) { return (vec)((lanes)v << 16); }
static inline vec odds(vec v) { return (vec)((lanes)v >> 16 << 16); }

// t + a b, or for pairs t + a1 b1 + a0 b0. A processor without the instruction gives the same bits (subnormal
// numbers aside, which it takes for 0) by two products of floats, which are exact: 8 and 8 bits fit into the
// 24 of a float.
static inline __attribute__((always_inline)) vec multiply_add(vec t, real a, vec b, const int pairs)
{
    if (!pairs) return t + a * b;
#if defined __AVX512BF16__
    return (vec)_mm512_dpbf16_ps((__m512)t, (__m512bh)_mm512_set1_ps((float)a), (__m512bh)b);
#else
    uint32_t bits;
    memcpy(&bits, &a, 4);
    t += (real)from_bf16((uint16_t)(bits >> 16)) * odds(b);
    return t + (real)from_bf16((uint16_t)bits) * evens(b);
#endif
}

// A tile of y, or what y has of it: rows × cols numbers. From one row to the next are `row` elements of y,
// from one column to the next `col`. It becomes scale · sums (SET), or these are added to it (ADD).
typedef struct {
    real *y;
    size_t row, col;
    int rows, cols;
    real scale;
    enum mode mode;
} tile;

// old + scale t, rounded twice wherever it stands: the product is in a register before it is added, so that
// no compiler makes one instruction of it here and two there.
static inline vec scaled_sum(vec old, real scale, vec t)
{
    t *= scale;
    IN_REGISTERS(t, old);
    return old + t;
}

// A tile that exists as a whole, `vectors` wide, from registers to memory. All of it is read from y before
// any of it is written: where rows are a multiple of 4096 bytes apart, a CPU takes a read for one of what was
// just written to another row, and waits.
static inline __attribute__((always_inline))
void store_whole(const tile *out, vec t[MR][2], const int vectors)
{
    #pragma GCC unroll 16
    for (size_t i = 0; i < MR; i++)
        #pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) {
            vec old = {0};
            if (out->mode == ADD) old = ((loose_vec *)(out->y + i * out->row))[j];
            t[i][j] = scaled_sum(old, out->scale, t[i][j]);
        }
    #pragma GCC unroll 16
    for (size_t i = 0; i < MR; i++)
        #pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) ((loose_vec *)(out->y + i * out->row))[j] = t[i][j];
}

// The same at an edge of y, or where columns do not lie side by side, one by one. Out of line: it is rare.
static __attribute__((noinline)) void store_part(const tile *out, vec t[MR][2])
{
    vec old[MR][2] = {0};
    if (out->mode == ADD)
        for (int j = 0; j < out->cols; j++)
            for (int i = 0; i < out->rows; i++)
                ((real *)old[i])[j] = out->y[(size_t)i * out->row + (size_t)j * out->col];
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < 2; j++) t[i][j] = scaled_sum(old[i][j], out->scale, t[i][j]);
    for (int j = 0; j < out->cols; j++)
        for (int i = 0; i < out->rows; i++)
            out->y[(size_t)i * out->row + (size_t)j * out->col] = ((real *)t[i])[j];
}

// t[i][j] = Σ_k a[i·ai + k·ak] b[k·bk + j]  for MR rows i of a panel and NR columns j of a sliver. t stays in
// registers, and each += becomes one multiply-add.
//
// A copied panel has ai = 1: the MR numbers of one k lie side by side. In a panel that is read where it
// lies they are in MR rows, ai apart. MR row pointers are too many for the 16 registers that hold
// addresses, so there is one for every third row, and an instruction adds 0, ai or 2 ai to it by itself:
//
//     row     0  1  2  3  4  5  6  7  8  9 10 11
//     third   0  0  0  1  1  1  2  2  2  3  3  3         row i is read at third[i / 3] + i % 3 · ai
//     plus    0 ai 2ai 0 ai 2ai 0 ai 2ai 0 ai 2ai
//
// GCC knows that all these pointers come from `a`. It would keep `a` alone and a register for each of the
// distances 3 ai, 4 ai, 5 ai …, which are too many again. The asm has no instruction: it says that third[i]
// may have changed, so that GCC no longer knows its distance from `a` and keeps the pointer itself. Where ai
// is known to be 1, distances are numbers within the instruction and need no register.
//
// A tile of at most LANES columns is one vector wide: `vectors` is 1, and nothing is computed for the second.
// (In the sum above j counts columns: t[i][0] holds the first LANES of them, t[i][1] the others.) Then t
// becomes the tile `out` of y.
static inline __attribute__((always_inline))
void kernel(const tile *out, const real *a, size_t ai, size_t ak, const real *b, size_t bk, int K,
            const int vectors, const int pairs)
{
    vec t[MR][2] = {0};
    const real *third[MR / 3];
    #pragma GCC unroll 16
    for (size_t i = 0; i < MR / 3; i++) {
        third[i] = a + 3 * i * ai;
        if (!__builtin_constant_p(ai)) __asm__("" : "+r"(third[i]));
    }
    for (int k = 0; k < K; k++, b += bk) {
        vec b0 = ((const loose_vec *)b)[0], b1 = ((const loose_vec *)b)[vectors - 1];
        IN_REGISTERS(b0, b1);
        #pragma GCC unroll 16
        for (size_t i = 0; i < MR; i++) {
            real a_ik = third[i / 3][i % 3 * ai];
            t[i][0] = multiply_add(t[i][0], a_ik, b0, pairs);
            if (vectors == 2) t[i][1] = multiply_add(t[i][1], a_ik, b1, pairs);
        }
        #pragma GCC unroll 16
        for (size_t i = 0; i < MR / 3; i++) third[i] += ak;
    }
    if (out->rows == MR && out->cols == vectors * LANES && out->col == 1) store_whole(out, t, vectors);
    else {
        vec part[MR][2];            // a copy: t itself, handed to a function, would be in memory all along
        memcpy(part, t, sizeof t);
        store_part(out, part);
    }
}

// The kernel that fits: for one vector or two, for a panel that is copied or lies across (ai = 1) or not.
static inline __attribute__((always_inline))
void fitting_kernel(const tile *out, const real *a, size_t ai, size_t ak, const real *b, size_t bk, int K,
                    const int pairs)
{
    int both = out->cols > LANES;
    if (ai == 1 && both) kernel(out, a, 1, ak, b, bk, K, 2, pairs);
    else if (ai == 1) kernel(out, a, 1, ak, b, bk, K, 1, pairs);
    else if (both) kernel(out, a, ai, ak, b, bk, K, 2, pairs);
    else kernel(out, a, ai, ak, b, bk, K, 1, pairs);
}

// For numbers or pairs. A function of its own, so that the loop's place in memory and its registers are
// always the same: GCC would choose them anew, and not always well, wherever the kernel stood in other code.
static __attribute__((noinline))
void tile_product(const tile *out, const real *a, size_t ai, size_t ak, const real *b, size_t bk, int K,
                  int pairs)
{
    if (pairs) fitting_kernel(out, a, ai, ak, b, bk, K, 1);
    else fitting_kernel(out, a, ai, ak, b, bk, K, 0);
}

// m[i][j] ↔ m[j][i] for a square of LANES rows, by dealing them like cards. A step s takes two rows, i and
// i + s: the numbers at even places of both are the new row i, those at odd places the new row i + s. After
// s = 1, 2, 4, … up to LANES/2 all are where they belong. For 4 × 4:
//
//     a0 a1 a2 a3            a0 a2 b0 b2            a0 b0 c0 d0
//     b0 b1 b2 b3   s = 1    a1 a3 b1 b3   s = 2    a1 b1 c1 d1
//     c0 c1 c2 c3     →      c0 c2 d0 d2     →      a2 b2 c2 d2
//     d0 d1 d2 d3            c1 c3 d1 d3            a3 b3 c3 d3
//
// A processor has an instruction that does so within each 16 bytes of a vector, and one that deals 16 bytes
// at a time. So squares of more are dealt in two rounds: first numbers are the cards, within groups of 16
// bytes, then each 16 bytes are one card. `first` and `second` name the lanes for pick_lanes, 0 2 4 6 and
// 1 3 5 7 in the example. s must be known when this is compiled: only lanes that are constants become one
// instruction.
static inline __attribute__((always_inline)) void deal(vec m[LANES], const int s)
{
    enum { SIXTEEN = 16 / sizeof(real) };
    const int card = s < SIXTEEN ? 1 : SIXTEEN, group = s < SIXTEEN ? SIXTEEN : LANES / SIXTEEN;
    lanes first, second;
    #pragma GCC unroll 16
    for (int l = 0; l < LANES; l++) {
        int place = l / card % group, even = 2 * place % group;         // of the card in its group
        first[l] = l + (even - place) * card + (2 * place < group ? 0 : LANES);
        second[l] = first[l] + card;
    }
    #pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        if (i & s) continue;
        vec a = m[i], b = m[i + s];
        m[i] = pick_lanes(a, b, first);
        m[i + s] = pick_lanes(a, b, second);
    }
}

static inline __attribute__((always_inline)) void transpose(vec m[LANES])
{
    deal(m, 1);
    if (LANES > 2) deal(m, 2);
    if (LANES > 4) deal(m, 4);
    if (LANES > 8) deal(m, 8);
}

// How many numbers from p on until one that begins a vector in memory.
static inline int steps_to_vector(const real *p) { return (int)(-(uintptr_t)p % VECTOR / sizeof(real)); }

// Numbers first … first+n-1 of the row k of m, where k goes down the rows; or the pairs of rows k and k + 1.
// For row `end`, which is no part of the sum any more, stand zeros.
static inline const real *step_across(mat m, int k, int end, int first, int n, real *buffer, int pairs)
{
    real even[ABREAST], odd[ABREAST];
    if (!pairs) return widened(at(m, k, first), m.type, (size_t)n, buffer);
    const real *a = widened(at(m, k, first), m.type, (size_t)n, even), *b = odd;
    if (k + 1 < end) b = widened(at(m, k + 1, first), m.type, (size_t)n, odd);
    else memset(odd, 0, (size_t)n * sizeof *odd);
    pair_up(buffer, a, b, 1, n);
    return buffer;
}

// Numbers k0 … k0+K-1 of row `row` of m, or their pairs. Two numbers in bf16 side by side are a pair already.
static inline const real *steps_along(mat m, int row, int k0, int K, real *buffer, int pairs)
{
    char *p = at(m, row, k0);
    if (pairs && m.type == BF16 && K % 2 == 0 && (uintptr_t)p % sizeof(real) == 0) return (const real *)p;
    const real *line = widened(p, m.type, (size_t)K, buffer);
    if (!pairs) return line;
    pair_up(buffer, line, line + 1, 2, K / 2);                  // `line` may be there
    if (K % 2) buffer[K / 2] = paired(line[K - 1], 0);
    return buffer;
}

// Asks for n numbers of a row to be brought into the second cache. No row need be there.
static inline void ask_for(mat m, int row, int col, int n)
{
    size_t bytes = (size_t)n * dtypes[m.type].size;
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(at(m, row, col) + i, 0, 2);
}

// Copies panels or slivers that lie across, `width` numbers or pairs for each step. Of numbers, the first is
// out[k·width + i] = m[k0 + k, first + i], and the others follow, up to column `last`. Numbers beyond the
// matrix are zero. All of them are copied abreast, a row of m at a time: one after the other they would read
// 64 bytes here and 64 a row further on, and where rows are pages apart each of these waits for its page. A
// product's copies come in runs of a few, though: copies of KC steps all begin at the same place of a page,
// and a first cache keeps few such lines (CLASH, below). The processor cannot guess that the next row
// follows, so the rows that are read soon are asked for.
static inline void pack_across(real *out, mat m, int first, int last, int k0, int K, const int width,
                               const int pairs)
{
    real buffer[ABREAST];
    int n = last < m.cols ? last - first : m.cols - first;
    int whole = n / width, rest = n % width, apart = pairs ? 2 : 1;
    size_t size = (size_t)width * (size_t)steps(K, pairs);
    if (rest) memset(out + (size_t)whole * size, 0, size * sizeof(real));
    for (int k = 0; k < K; k += apart, out += width) {
        const real *step = step_across(m, k0 + k, k0 + K, first, n, buffer, pairs);
        for (int soon = k0 + k + 8; soon < k0 + k + 8 + apart; soon++) ask_for(m, soon, first, n);
        for (int s = 0; s < whole; s++)
            memcpy(out + (size_t)s * size, step + s * width, (size_t)width * sizeof(real));
        memcpy(out + (size_t)whole * size, step + whole * width, (size_t)rest * sizeof(real));
    }
}

// Copies one panel or sliver that does not: out[k·width + i] = m[first + i, k0 + k]. Each i is a line of its
// own: squares of LANES lines by LANES steps are read, transposed and stored as whole vectors. Where the
// width is no multiple of LANES, the square with the last lines writes beyond it, into the place of the
// next k. What belongs there is stored later (k rises, i falls), and `out` has room for a vector more at its
// end. The lines of the next panel are asked for meanwhile, one after the other, each as a whole: memory
// gives what lies side by side far sooner than a little of each line.
static inline void pack(real *out, mat m, int first, int k0, int K, const int width, const int pairs)
{
    int n = m.rows - first;
    real buffer[WIDEST][KC];
    const real *line[WIDEST];
    if (n > width) n = width;
    for (int i = 0; i < width; i++) {
        if (i < n) line[i] = steps_along(m, first + i, k0, K, buffer[i], pairs);
        else line[i] = memset(buffer[i], 0, (size_t)K * sizeof(real));
    }
    int k = 0, numbers = K;
    K = steps(K, pairs);
    for (; k + LANES <= K; k += LANES) {
        for (int soon = first + width + k * width / K; soon < first + width + (k + LANES) * width / K; soon++)
            ask_for(m, soon, k0, numbers);
        for (int i = (width - 1) / LANES * LANES; i >= 0; i -= LANES) {
            vec square[LANES];
            #pragma GCC unroll 16
            for (int j = 0; j < LANES; j++)
                square[j] = *(const loose_vec *)(line[i + j < width ? i + j : i] + k);
            transpose(square);
            #pragma GCC unroll 16
            for (int j = 0; j < LANES; j++) *(loose_vec *)(out + (k + j) * width + i) = square[j];
        }
    }
    for (; k < K; k++)
        for (int i = 0; i < width; i++) out[k * width + i] = line[i][k];
}

// Work space of a thread, at least n numbers. It grows when more is asked for, and is kept.
// Buffer 0 holds panels, 1 slivers, the others belong to attention or to the recurrence.
static real *thread_buffer(int which, size_t n)
{
    static _Thread_local struct { real *p; size_t n; } buffers[14];
    if (buffers[which].n < n) {
        free(buffers[which].p);
        buffers[which].p = aligned_alloc(64, (n * sizeof(real) + 63) / 64 * 64);
        if (!buffers[which].p) die("out of memory: %zu numbers of work space", n);
        buffers[which].n = n;
    }
    return buffers[which].p;
}

// One product, and how the threads share it: a's rows are cut into `blocks`, b's slivers into `parts`, and
// each block times each part is a task.
typedef struct {
    real *y;
    size_t row, col;                    // as in tile
    mat a, b;
    int a_across, b_across;             // as in gemm_plain
    int M, N, K;
    int blocks, parts;
    real scale, *slivers;               // where b's slivers are copied to
    enum mode mode;
} product;

// A first cache of 32 KB keeps 8 lines of those that begin at the same place of a page of 4096 bytes. Where
// rows are a multiple of 256 bytes apart, what lies below each other has 16 such places, so there is room for
// 128 rows, and more of them drive each other out: a sliver of so many is copied, however seldom it is read.
enum { CLASH = 256, MANY_ROWS = 128 };

// Whether a panel or sliver that begins at row or column `first` of m can be read where it lies: it has this
// program's dtype, all its `width` rows or columns exist, and its rows do not clash.
static inline int in_place(mat m, int across, int first, int width)
{
    int reals = m.type == TYPE_OF(real) && (uintptr_t)m.p % sizeof(real) == 0;
    int clashes = across && m.rows > MANY_ROWS && m.ld * sizeof(real) % CLASH == 0;
    return reals && !clashes && first + width <= (across ? m.cols : m.rows);
}

// What could be read where it lies is copied all the same if it is read often: a panel is read once for every
// NR columns of y, a sliver once for every MR rows. Beyond OFTEN columns or OFTEN_ROWS rows, reading a copy
// in order saves more than making it costs.
enum { OFTEN = 320, OFTEN_ROWS = 96 };

static inline int panel_in_place(const product *p, int i)
{
    return !bf16_pairs && p->N <= OFTEN && in_place(p->a, p->a_across, i, MR);
}

static inline int sliver_in_place(const product *p, int j)
{
    return !bf16_pairs && p->M <= OFTEN_ROWS && p->b_across && in_place(p->b, 1, j, NR);
}

static void barrier(int threads)
{
    if (threads > 1) {
        #pragma omp barrier
    }
}

// Rows i … i+MR-1 and columns j … j+NR-1 of y, and of their sums the part k0 … k0+K-1. The first part is
// set or added as the product's mode says, later parts are added. `panel` and `sliver` are where the copies
// are, if there are any.
static void gemm_tile(const product *p, int i, int j, int k0, int K, const real *panel, const real *sliver)
{
    tile out = {
        .y = p->y + (size_t)i * p->row + (size_t)j * p->col, .row = p->row, .col = p->col,
        .rows = p->M - i < MR ? p->M - i : MR, .cols = p->N - j < NR ? p->N - j : NR,
        .scale = p->scale, .mode = k0 ? ADD : p->mode,
    };
    size_t bk = NR;
    for (int r = 0; r < out.rows; r++)
        for (int c = 0; c < NR; c += LANES) __builtin_prefetch(out.y + (size_t)r * out.row + c, 1);
    if (sliver_in_place(p, j)) {
        sliver = (real *)at(p->b, k0, j);
        bk = p->b.ld;
    }
    if (!panel_in_place(p, i))
        tile_product(&out, panel, 1, MR, sliver, bk, steps(K, bf16_pairs), bf16_pairs);
    else if (p->a_across) tile_product(&out, (real *)at(p->a, k0, i), 1, p->a.ld, sliver, bk, K, 0);
    else tile_product(&out, (real *)at(p->a, i, k0), p->a.ld, 1, sliver, bk, K, 0);
}

// Copies of a's rows i0 … i1-1, where they are not read in place.
static void pack_panels(const product *p, real *panels, int i0, int i1, int k0, int K)
{
    size_t size = MR * (size_t)steps(K, bf16_pairs);
    while (i0 < i1 && panel_in_place(p, i0)) {
        panels += size;
        i0 += MR;
    }
    if (p->a_across) {
        for (; i0 < i1; i0 += PANEL_RUN, panels += PANEL_RUN / MR * size)
            pack_across(panels, p->a, i0, i0 + PANEL_RUN < i1 ? i0 + PANEL_RUN : i1, k0, K, MR, bf16_pairs);
    } else {
        for (; i0 < i1; i0 += MR, panels += size) pack(panels, p->a, i0, k0, K, MR, bf16_pairs);
    }
}

// A thread's share of the copies of b's slivers, of columns n0 … n0+n-1.
static void pack_slivers(const product *p, int n0, int n, int k0, int K, int thread, int threads)
{
    size_t length = (size_t)steps(K, bf16_pairs);
    for (int from = thread * SLIVER_RUN; from < n; from += threads * SLIVER_RUN) {
        int j = from, end = from + SLIVER_RUN < n ? from + SLIVER_RUN : n;
        while (j < end && sliver_in_place(p, n0 + j)) j += NR;
        real *to = p->slivers + (size_t)j * length;
        if (p->b_across && j < end) pack_across(to, p->b, n0 + j, n0 + end, k0, K, NR, bf16_pairs);
        for (; j < end && !p->b_across; j += NR, to += NR * length)
            pack(to, p->b, n0 + j, k0, K, NR, bf16_pairs);
    }
}

// Of block `block`: whole panels, as many in each as in any other, give or take one. Behind the last: M.
static int first_row(const product *p, int block)
{
    int i = (int)((long)ceil_div(p->M, MR) * block / p->blocks) * MR;
    return i < p->M ? i : p->M;
}

// The tasks of one thread, on columns n0 … n0+N-1 of y and the part k0 … k0+K-1 of the sum. The threads'
// shares are runs of tasks: a block's panels are copied when its first task comes up, and serve its other
// parts.
static void gemm_tasks(const product *p, int n0, int N, int k0, int K, int thread, int threads)
{
    real *panels = thread_buffer(0, (size_t)MC * KC + LANES);
    long tasks = (long)p->blocks * p->parts;
    int slivers = ceil_div(N, NR);
    size_t length = (size_t)steps(K, bf16_pairs);               // of a panel, of a sliver
    int packed = -1;                                            // the block whose panels were copied last
    for (long task = tasks * thread / threads; task < tasks * (thread + 1) / threads; task++) {
        int block = (int)(task / p->parts), part = (int)(task % p->parts);
        int i0 = first_row(p, block), i1 = first_row(p, block + 1);
        if (packed != block) pack_panels(p, panels, i0, i1, k0, K);
        packed = block;
        for (int i = i0; i < i1; i += MR) {
            const real *panel = panels + (size_t)(i - i0) * length;
            for (int s = slivers * part / p->parts; s < slivers * (part + 1) / p->parts; s++)
                gemm_tile(p, i, n0 + s * NR, k0, K, panel, p->slivers + (size_t)s * NR * length);
        }
    }
}

// How much of a sum is computed at a time: KC at most, whole pairs, and parts alike, since a short last one
// costs almost what a long one does.
static int part_of_sum(int K) { return ceil_div(ceil_div(K, ceil_div(K, KC)), 2) * 2; }

// What one thread does: its share of the copies of b's slivers, then, when all are made, its tasks. Again for
// each NC columns of y and each part of the sum.
static void gemm_thread(const product *p, int thread, int threads)
{
    int part = part_of_sum(p->K);
    for (int n0 = 0; n0 < p->N; n0 += NC)
        for (int k0 = 0; k0 < p->K; k0 += part) {
            int n = p->N - n0 < NC ? p->N - n0 : NC;
            int k = p->K - k0 < part ? p->K - k0 : part;
            pack_slivers(p, n0, n, k0, k, thread, threads);
            barrier(threads);                                   // all of b's slivers are there
            gemm_tasks(p, n0, n, k0, k, thread, threads);
            barrier(threads);                                   // nobody reads them any more
        }
}

// ---- few rows of y ----------------------------------------------------------------------------------------
//
//  A token that is generated has one row of x for all of W: a number of W is used once, and the time is that
//  of reading it. So W is not copied first. LANES of its rows are read side by side, LANES steps of k at a
//  time, and turned in registers: then a vector holds one k of LANES columns of y, as half a sliver does.
//
//      b[j]    k k k k               b[j] b[j+1] b[j+2] b[j+3]
//      b[j+1]  k k k k   transpose    k    k      k      k         each of these vectors times a[i, k]
//      b[j+2]  k k k k      →         k    k      k      k         is added to t[i], M rows i at once
//      b[j+3]  k k k k                …
//
//  Sums have the order of the tiles, and so the same bits. A W in bf16 is read as pairs, whether a has pairs
//  (--bf16) or numbers: of a turned vector the first numbers are taken, then the second ones.

enum { THIN = 4 };                      // rows of y at most

// t[i] += a[i][k] column, for M rows of a: one instruction each, as in the kernel.
static inline __attribute__((always_inline))
void times_column(vec t[THIN][2], int half, const real *const a[THIN], const int M, int k, vec column,
                  const int pairs)
{
    #pragma GCC unroll 4
    for (int i = 0; i < M; i++) {
        t[i][half] = multiply_add(t[i][half], a[i][k], column, pairs);
        IN_REGISTERS(t[i][half], column);
    }
}

// One step of half a sliver.
static inline __attribute__((always_inline))
void few_step(vec t[THIN][2], int half, const real *const a[THIN], const int M, int k, vec column,
              const int a_pairs, const int b_pairs)
{
    if (a_pairs == b_pairs) times_column(t, half, a, M, k, column, a_pairs);
    else {
        times_column(t, half, a, M, 2 * k, evens(column), 0);
        times_column(t, half, a, M, 2 * k + 1, odds(column), 0);
    }
}

// Steps from … to-1 of the square that begins at step k, for half a sliver: its lines are read and turned.
// What is read next begins at `next`; as much of it is asked for as is read here. For a processor follows one
// row by itself, not NR at once, and waits for what it is asked for all at once.
static inline __attribute__((always_inline))
void few_square(vec t[THIN][2], int half, const real *const a[THIN], const real *const line[NR],
                const char *next, const int M, int k, int from, int to, const int a_pairs, const int b_pairs)
{
    vec square[LANES];
    for (size_t i = 0; i < sizeof square; i += 64) __builtin_prefetch(next + i, 0, 2);
    #pragma GCC unroll 16
    for (int l = 0; l < LANES; l++) square[l] = *(const loose_vec *)(line[half * LANES + l] + k);
    transpose(square);
    #pragma GCC unroll 16
    for (int l = from; l < to; l++) few_step(t, half, a, M, k + l, square[l], a_pairs, b_pairs);
}

// t[i][l] = Σ_k a[i][k] line[l][k]  for M rows of a, known when this is compiled, and NR lines of b. While
// the processor waits for the sums of one half of them, it turns the other half. What is read next begins at
// `next` and lies there in one piece.
//
// A vector that lies in two lines of the first cache is read twice, and here everything waits for reads. A
// file puts its weights at any address, so squares begin where a vector does in memory, here for LANES = 4.
// The first square and the last overlap with their neighbours, and give only the steps that are missing:
//
//     vectors in memory    |a b c d|e f g h|i j k l|m n
//     a line of b               c d e f g h i j k
//     squares                   c d(e f)                 only c and d are added
//                                   e f g h
//                                        (h)i j k        only i, j and k
static inline __attribute__((always_inline))
void few_sums(vec t[THIN][2], const real *const a[THIN], const real *const line[NR], const char *next,
              const int M, int K, const int a_pairs, const int b_pairs)
{
    int k = 0, ahead = steps_to_vector(line[0]), to;
    for (; k < K && K >= LANES; k = to) {
        to = k < ahead ? ahead : k + LANES < K ? k + LANES : K;
        int first = k + LANES < K ? k : K - LANES;
        if (to - k == LANES)                                    // the same call, but its steps are unrolled
            #pragma GCC unroll 2
            for (int half = 0; half < 2; half++, next += VECTOR * LANES)
                few_square(t, half, a, line, next, M, k, 0, LANES, a_pairs, b_pairs);
        else
            for (int half = 0; half < 2; half++, next += VECTOR * LANES)
                few_square(t, half, a, line, next, M, first, k - first, to - first, a_pairs, b_pairs);
    }
    for (; k < K; k++)
        for (int half = 0; half < 2; half++) {
            vec column;
            for (int l = 0; l < LANES; l++) column[l] = line[half * LANES + l][k];
            few_step(t, half, a, M, k, column, a_pairs, b_pairs);
        }
}

// The same for any M ≤ THIN.
static inline __attribute__((always_inline))
void few_rows(vec t[THIN][2], const real *const a[THIN], const real *const line[NR], const char *next,
              int M, int K, const int a_pairs, const int b_pairs)
{
    if (M == 1) few_sums(t, a, line, next, 1, K, a_pairs, b_pairs);
    if (M == 2) few_sums(t, a, line, next, 2, K, a_pairs, b_pairs);
    if (M == 3) few_sums(t, a, line, next, 3, K, a_pairs, b_pairs);
    if (M == 4) few_sums(t, a, line, next, 4, K, a_pairs, b_pairs);
}

// Columns j … j+NR-1 of y, or as many as it has.
static void few_columns(mat y, mat a, mat b, int j, real scale, enum mode mode)
{
    real of_a[THIN][KC], of_b[NR][KC];
    const real *rows[THIN], *line[NR];
    int cols = y.cols - j < NR ? y.cols - j : NR;
    int as_pairs = b.ld % 2 == 0 && a.cols % 2 == 0 && (uintptr_t)b.p % sizeof(real) == 0;
    int b_pairs = bf16_pairs || (b.type == BF16 && sizeof(real) == 4 && as_pairs);
    int part = part_of_sum(a.cols);
    for (int k0 = 0; k0 < a.cols; k0 += part, mode = ADD) {
        int K = a.cols - k0 < part ? a.cols - k0 : part;
        vec t[THIN][2] = {0};
        for (int i = 0; i < y.rows; i++) rows[i] = steps_along(a, i, k0, K, of_a[i], bf16_pairs);
        for (int l = 0; l < NR; l++)                            // beyond the last column: that one again
            line[l] = l < cols ? steps_along(b, j + l, k0, K, of_b[l], b_pairs) : line[cols - 1];
        const char *next = at(b, j + NR, 0) + (size_t)k0 * NR * dtypes[b.type].size;
        if (bf16_pairs) few_rows(t, rows, line, next, y.rows, steps(K, 1), 1, 1);
        else if (b_pairs) few_rows(t, rows, line, next, y.rows, steps(K, 1), 0, 1);
        else few_rows(t, rows, line, next, y.rows, K, 0, 0);
        for (int i = 0; i < y.rows; i++) {
            real *out = (real *)at(y, i, j);
            vec old[2] = {0};
            if (mode == ADD) memcpy(old, out, (size_t)cols * sizeof *out);
            for (int half = 0; half < 2; half++) t[i][half] = scaled_sum(old[half], scale, t[i][half]);
            memcpy(out, t[i], (size_t)cols * sizeof *out);
        }
    }
}

// y (M, N) = scale a (M, K) b (N, K)ᵀ, M ≤ THIN. Threads share the columns.
static void gemm_few(mat y, mat a, mat b, real scale, enum mode mode, int threads)
{
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int j = 0; j < y.cols; j += NR) few_columns(y, a, b, j, scale, mode);
}

// ---- panels times slivers, one by one ---------------------------------------------------------------------
//
//  For attention: its products share their factors and need only a part of their sums. It copies panels and
//  slivers itself, and keeps them. With bf16_pairs they hold pairs of k; k and K count numbers all the same.

// The panel or sliver whose lines are rows first … of m, all of it, which may be longer than what pack takes
// at once.
static inline void pack_whole(real *out, mat m, int first, const int width)
{
    for (int k = 0; k < m.cols; k += KC)
        pack(out + (size_t)steps(k, bf16_pairs) * (size_t)width, m, first, k,
             m.cols - k < KC ? m.cols - k : KC, width, bf16_pairs);
}

// The rows of m as panels: element (i, k) of the panel that begins at row f is its number k·MR + i − f.
static real *copied_panels(int buffer, mat m)
{
    size_t length = (size_t)steps(m.cols, bf16_pairs);
    real *out = thread_buffer(buffer, (size_t)(ceil_div(m.rows, MR) * MR) * length + LANES);
    for (int i = 0; i < m.rows; i += MR) pack_whole(out + (size_t)i * length, m, i, MR);
    return out;
}

static const real *panel_from(const real *panels, int row, int K)      // the one that begins at this row
{
    return panels + (size_t)row * (size_t)steps(K, bf16_pairs);
}

// b (K, N) as slivers: element (k, j) of the sliver that begins at column f is its number k·NR + j − f.
typedef struct { const real *p; size_t next; } slivers;         // `next`: from a sliver to the next

static slivers columns_from(slivers b, int j) { return (slivers){b.p + (size_t)(j / NR) * b.next, b.next}; }
static slivers steps_from(slivers b, int k)                     // k is even
{
    return (slivers){b.p + (size_t)steps(k, bf16_pairs) * NR, b.next};
}

// b = mᵀ
static slivers turned_slivers(int buffer, mat m)
{
    size_t next = (size_t)steps(m.cols, bf16_pairs) * NR;
    real *out = thread_buffer(buffer, (size_t)ceil_div(m.rows, NR) * next + LANES);
    for (int j = 0; j < m.rows; j += NR) pack_whole(out + (size_t)(j / NR) * next, m, j, NR);
    return (slivers){out, next};
}

// b = m
static slivers copied_slivers(int buffer, mat m)
{
    size_t next = (size_t)steps(m.rows, bf16_pairs) * NR;
    real *out = thread_buffer(buffer, (size_t)ceil_div(m.cols, NR) * next);
    for (int j = 0; j < m.cols; j += SLIVER_RUN)
        pack_across(out + (size_t)(j / NR) * next, m, j, j + SLIVER_RUN, 0, m.rows, NR, bf16_pairs);
    return (slivers){out, next};
}

// `rows` rows of y, MR at most, and `cols` columns:  y[i,j] = scale Σ_k a[i·ai + k·ak] b[k,j], or y += it
static inline __attribute__((always_inline))
void panel_times(real *y, size_t ld, int rows, int cols, const real *a, size_t ai, size_t ak,
                 slivers b, int K, real scale, enum mode mode)
{
    tile out = {.row = ld, .col = 1, .rows = rows, .scale = scale, .mode = mode};
    for (int j = 0; j < cols; j += NR, b.p += b.next) {
        out.y = y + j;
        out.cols = cols - j < NR ? cols - j : NR;
        tile_product(&out, a, ai, ak, b.p, NR, steps(K, bf16_pairs), bf16_pairs);
    }
}

// ---- any product ------------------------------------------------------------------------------------------

// The numbers that are computed for (M, N), which is cut into whole tiles.
static double padded(int M, int N) { return (double)(ceil_div(M, MR) * MR) * (ceil_div(N, LANES) * LANES); }

// An adapter's y can be narrow: 36 columns fill one sliver of 32 and a little of a second, and almost half
// the work is for zeros. Then yᵀ = bᵀ aᵀ is computed instead, where a can be read as slivers (a_across): a
// and b change roles, and so do M and N, row and col. The numbers land in the same places of y, as the same
// sums; the 36 are cut into panels of MR, which fit better.
static void gemm(mat y, mat a, int a_across, mat b, int b_across, int K, real scale, enum mode mode)
{
    int threads = omp_in_parallel() || (double)y.rows * y.cols * K < 1e6 ? 1 : omp_get_max_threads();
    if (!K) {                                                   // a sum of nothing
        if (mode == SET) zero(y);
        return;
    }
    if (y.rows <= THIN && !a_across && !b_across) {
        gemm_few(y, a, b, scale, mode, threads);
        return;
    }
    product p = {
        .y = y.p, .row = y.ld, .col = 1,                        // y[i,j] lies at i·ld + j
        .M = y.rows, .a = a, .a_across = a_across,
        .N = y.cols, .b = b, .b_across = b_across,
        .K = K, .scale = scale, .mode = mode,
    };
    if (a_across && padded(y.cols, y.rows) < 0.9 * padded(y.rows, y.cols))
        p = (product){
            .y = y.p, .row = 1, .col = y.ld,                    // yᵀ[i,j] lies at i + j·ld
            .M = y.cols, .a = b, .a_across = b_across,
            .N = y.rows, .b = a, .b_across = a_across,
            .K = K, .scale = scale, .mode = mode,
        };
    p.slivers = thread_buffer(1, (size_t)KC * (size_t)(ceil_div(p.N < NC ? p.N : NC, NR) * NR) + LANES);
    int few = p.M < 4 * MR * threads;
    p.parts = few ? threads : 1;                                // few rows: the threads share the columns
    p.blocks = ceil_div(p.M, MC);
    if (!few) p.blocks = ceil_div(p.blocks, threads) * threads; // many: the rows, as many blocks each
    if (threads == 1) gemm_thread(&p, 0, 1);
    else {
        #pragma omp parallel num_threads(threads)
        gemm_thread(&p, omp_get_thread_num(), omp_get_num_threads());
    }
}

#endif
