//  ops/gemm.h: the matrix product on a CPU, the plain one first.

#ifndef GEMM_H
#define GEMM_H
#include <omp.h>
#include "mat.h"

// n numbers of any dtype at p, as reals: where they lie if they are reals already, else converted into buffer.
static inline const real *widened(const char *p, enum dtype type, size_t n, real *buffer)
{
    if (type == TYPE_OF(real) && (uintptr_t)p % sizeof(real) == 0) return (const real *)p;
    for (size_t i = 0; i < n; i++) {
        float f;
        double d;
        uint16_t h;
        if (type == F32) memcpy(&f, p + 4 * i, 4), buffer[i] = (real)f;
        else if (type == F64) memcpy(&d, p + 8 * i, 8), buffer[i] = (real)d;
        else memcpy(&h, p + 2 * i, 2), buffer[i] = (real)(type == BF16 ? from_bf16(h) : from_f16(h));
    }
    return buffer;
}

static inline char *at(mat m, int row, int col) { return (char *)m.p + ((size_t)row * m.ld + (size_t)col) * dtypes[m.type].size; }

// The oracle: what a product is, in one line. The tests hold the fast one to it.
__attribute__((unused)) static void gemm_plain(mat y, mat a, int a_across, mat b, int b_across, int K, real scale, enum mode mode)
{
    for (int i = 0; i < y.rows; i++)
        for (int j = 0; j < y.cols; j++) {
            double sum = 0;
            real u, v;
            for (int k = 0; k < K; k++)
                sum += (double)*widened(a_across ? at(a, k, i) : at(a, i, k), a.type, 1, &u) * (double)*widened(b_across ? at(b, k, j) : at(b, j, k), b.type, 1, &v);
            real *out = (real *)at(y, i, j);
            *out = (mode == ADD ? *out : 0) + scale * (real)sum;
        }
}

// ---- the fast one --------------------------------------------------------------------------------------------
//
//  y (M, N) = scale · a (M, K) b (K, N).  Three loops, so that the innermost one runs from cache:
//
//    b  is cut into KC rows by NC columns, and those into slivers NR wide                        (shared, L3)
//    a  is cut into MC rows by KC columns, and those into panels MR tall                         (per thread, L2)
//    the kernel multiplies a panel with a sliver: an MR × NR tile of y that stays in registers while k runs
//
//  Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008. They copy every panel and sliver, so
//  that the kernel reads memory in order. Here matrices are often thin and a copy costs more than it gains: the kernel reads
//  them where they lie. Copied is what must be: slivers whose columns lie apart (b given as (N, K)), ragged edges, which are
//  padded with zeros, and weights of another dtype, widened on the way, so that none is held a second time.
//
//  All tiles are alike: an element of y is the same sum in the same order wherever it lies, copied or not, whatever the
//  number of threads, whatever else is in the batch. Threads share M × N, never K.

#if defined __AVX512F__
enum { VECTOR = 64, MR = 12 };          // bytes a vector; 12 × 2 of 32 registers hold the tile
#elif defined __AVX__
enum { VECTOR = 32, MR = 6 };           // 6 × 2 of 16
#else
enum { VECTOR = 16, MR = 6 };
#endif
enum { LANES = VECTOR / sizeof(real), NR = 2 * LANES, KC = 512, MC = 16 * MR, NC = 2048 };
enum { WIDEST = 32 };                    // of MR and NR
typedef real vec __attribute__((vector_size(VECTOR)));
typedef __typeof__((vec){0} == (vec){0}) lanes;         // whole numbers, one a lane
typedef real loose_vec __attribute__((vector_size(VECTOR), aligned(sizeof(real)), may_alias));   // anywhere in memory

// GCC would fold the two loads of b into every multiply-add and so load them MR times: half the speed is lost to that.
#if defined __x86_64__
#define IN_REGISTERS(a, b) __asm__("" : "+v"(a), "+v"(b))
#else
#define IN_REGISTERS(a, b) (void)0
#endif

// Lanes of a, then of b, by number. clang knows only numbers written out.
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

// tile = Σ_k panel[k] sliver[k]ᵀ: panel[k][i] is a[i·ai + k·ak], sliver[k] are the NR numbers at b[k·bk]. The compiler keeps
// tile in registers and fuses each line into multiply-adds. Rows that lie apart are reached from a pointer to every third of
// them, +0, +ai and +2 ai: an address that one instruction can hold. Twelve offsets would not fit into the registers, hence the asm.
static inline void kernel(vec tile[MR][2], const real *a, size_t ai, size_t ak, const real *b, size_t bk, int K)
{
    vec t[MR][2] = {0};
    const real *third[MR / 3];
    #pragma GCC unroll 16
    for (size_t i = 0; i < MR / 3; i++) {
        third[i] = a + 3 * i * ai;
        if (!__builtin_constant_p(ai)) __asm__("" : "+r"(third[i]));
    }
    for (int k = 0; k < K; k++, b += bk) {
        vec b0 = ((const loose_vec *)b)[0], b1 = ((const loose_vec *)b)[1];
        IN_REGISTERS(b0, b1);
        #pragma GCC unroll 16
        for (size_t i = 0; i < MR; i++) t[i][0] += third[i / 3][i % 3 * ai] * b0, t[i][1] += third[i / 3][i % 3 * ai] * b1;
        #pragma GCC unroll 16
        for (size_t i = 0; i < MR / 3; i++) third[i] += ak;
    }
    memcpy(tile, t, sizeof t);
}

// y's tile = or += scale · tile, the rows and columns of it that exist; `row` and `col` lead from one to the next. All of y
// is read before any of it is written: rows a multiple of 4096 bytes apart would otherwise wait for each other.
static inline void store(real *y, size_t row, size_t col, vec tile[MR][2], int rows, int cols, real scale, enum mode mode)
{
    if (rows == MR && cols == NR && col == 1) {
        for (int i = 0; i < MR; i++)
            for (int j = 0; j < 2; j++) {
                tile[i][j] *= scale;
                if (mode == ADD) tile[i][j] += ((loose_vec *)(y + (size_t)i * row))[j];
            }
        for (int i = 0; i < MR; i++)
            for (int j = 0; j < 2; j++) ((loose_vec *)(y + (size_t)i * row))[j] = tile[i][j];
        return;
    }
    for (int j = 0; j < cols; j++)
        for (int i = 0; i < rows; i++) {
            real *out = y + (size_t)i * row + (size_t)j * col;
            *out = (mode == ADD ? *out : 0) + scale * ((real *)tile[i])[j];
        }
}

// m[i][j] ↔ m[j][i], by halves: row i gives its upper half for the lower one of row i + h, with h = LANES/2 … 1.
static inline void transpose(vec m[LANES])
{
    #pragma GCC unroll 4
    for (int h = LANES / 2; h; h /= 2) {
        lanes lower, upper;
        #pragma GCC unroll 16
        for (int l = 0; l < LANES; l++) lower[l] = l & h ? LANES + l - h : l, upper[l] = l & h ? LANES + l : l + h;
        #pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            if (i & h) continue;
            vec a = m[i], b = m[i + h];
            m[i] = pick_lanes(a, b, lower), m[i + h] = pick_lanes(a, b, upper);
        }
    }
}

// One panel or sliver of `width` lanes: out[k·width + i] = m[first + i, k0 + k], or across: m[k0 + k, first + i].
// Lanes beyond the matrix are zero. `out` has room for a vector more: whole ones are stored, the next overwrites the excess.
static inline void pack(real *out, mat m, int across, int first, int k0, int K, const int width)
{
    int n = (across ? m.cols : m.rows) - first;
    real buffer[WIDEST][KC];
    const real *line[WIDEST];
    if (n > width) n = width;
    if (across) {
        if (n < width) memset(out, 0, (size_t)K * (size_t)width * sizeof(real));
        for (int k = 0; k < K; k++) {
            const real *row = widened(at(m, k0 + k, first), m.type, (size_t)n, buffer[0]);
            if (n == width) memcpy(out + k * width, row, (size_t)width * sizeof(real));        // a known size: a few vectors
            else memcpy(out + k * width, row, (size_t)n * sizeof(real));
        }
        return;
    }
    for (int i = 0; i < width; i++) line[i] = i < n ? widened(at(m, first + i, k0), m.type, (size_t)K, buffer[i]) : memset(buffer[i], 0, (size_t)K * sizeof(real));
    int k = 0;
    for (; k + LANES <= K; k += LANES)
        for (int i = (width - 1) / LANES * LANES; i >= 0; i -= LANES) {
            vec square[LANES];
            #pragma GCC unroll 16
            for (int j = 0; j < LANES; j++) {
                const real *part = line[i + j < width ? i + j : i] + k;
                __builtin_prefetch(part + (size_t)width * m.ld);        // the same place in the next sliver
                square[j] = *(const loose_vec *)part;
            }
            transpose(square);
            #pragma GCC unroll 16
            for (int j = 0; j < LANES; j++) *(loose_vec *)(out + (k + j) * width + i) = square[j];
        }
    for (; k < K; k++)
        for (int i = 0; i < width; i++) out[k * width + i] = line[i][k];
}

// Work space that a thread grows once and keeps.
static real *thread_buffer(int which, size_t n)
{
    static _Thread_local struct { real *p; size_t n; } buffers[4];
    if (buffers[which].n < n) {
        free(buffers[which].p);
        buffers[which].p = aligned_alloc(64, (n * sizeof(real) + 63) / 64 * 64);
        if (!buffers[which].p) die("out of memory: %zu numbers of work space", n);
        buffers[which].n = n;
    }
    return buffers[which].p;
}

// One product, and how it is shared: tasks are `blocks` of `rows` rows of a times `parts` of b's slivers.
typedef struct {
    real *y;
    size_t row, col;                    // elements of y from one row, one column to the next
    mat a, b;
    int a_across, b_across, M, N, K, rows, blocks, parts;
    real scale, *slivers;
    enum mode mode;
} product;

// Whether `width` lanes of m from `first` on can be read where they lie.
static inline int in_place(mat m, int across, int first, int width)
{
    return m.type == TYPE_OF(real) && (uintptr_t)m.p % sizeof(real) == 0 && first + width <= (across ? m.cols : m.rows);
}

// What is used more often than this, in rows or columns of y, is copied all the same: it is then read from memory in order.
enum { OFTEN = 320 };
static inline int panel_in_place(const product *p, int i) { return p->N <= OFTEN && in_place(p->a, p->a_across, i, MR); }
static inline int sliver_in_place(const product *p, int j) { return p->M <= OFTEN && p->b_across && in_place(p->b, 1, j, NR); }

static void barrier(int threads)
{
    if (threads > 1) {
        #pragma omp barrier
    }
}

// Rows i … i+MR-1 of y += a b, on columns j … j+NR-1 and the part k0 … k0+K-1 of the sum. `panel` and `sliver`: where the copies
// are, if there are any.
static void gemm_tile(const product *p, int i, int j, int k0, int K, const real *panel, const real *sliver)
{
    vec tile[MR][2];
    real *y = p->y + (size_t)i * p->row + (size_t)j * p->col;
    size_t bk = NR;
    int rows = p->M - i < MR ? p->M - i : MR;
    for (int r = 0; r < rows; r++) __builtin_prefetch(y + (size_t)r * p->row, 1);
    if (sliver_in_place(p, j)) sliver = (real *)at(p->b, k0, j), bk = p->b.ld;
    if (!panel_in_place(p, i)) kernel(tile, panel, 1, MR, sliver, bk, K);
    else if (p->a_across) kernel(tile, (real *)at(p->a, k0, i), 1, p->a.ld, sliver, bk, K);
    else kernel(tile, (real *)at(p->a, i, k0), p->a.ld, 1, sliver, bk, K);
    store(y, p->row, p->col, tile, rows, p->N - j < NR ? p->N - j : NR, p->scale, k0 ? ADD : p->mode);
}

// The tasks of one thread, on columns n0 … n0+N-1 of y and the part k0 … k0+K-1 of the sum.
static void gemm_tasks(const product *p, int n0, int N, int k0, int K, int thread, int threads)
{
    real *panels = thread_buffer(0, (size_t)MC * KC + LANES);
    int tasks = p->blocks * p->parts, slivers = ceil_div(N, NR), packed = -1;
    for (int task = tasks * thread / threads; task < tasks * (thread + 1) / threads; task++) {
        int block = task / p->parts, part = task % p->parts, i0 = block * p->rows, i1 = i0 + p->rows < p->M ? i0 + p->rows : p->M;
        for (int i = i0; i < i1 && packed != block; i += MR)
            if (!panel_in_place(p, i)) pack(panels + (size_t)(i - i0) * (size_t)K, p->a, p->a_across, i, k0, K, MR);
        packed = block;
        for (int i = i0; i < i1; i += MR)
            for (int s = slivers * part / p->parts; s < slivers * (part + 1) / p->parts; s++)
                gemm_tile(p, i, n0 + s * NR, k0, K, panels + (size_t)(i - i0) * (size_t)K, p->slivers + (size_t)s * NR * (size_t)K);
    }
}

static void gemm_thread(const product *p, int thread, int threads)
{
    for (int n0 = 0; n0 < p->N; n0 += NC)
        for (int k0 = 0; k0 < p->K; k0 += KC) {
            int n = p->N - n0 < NC ? p->N - n0 : NC, k = p->K - k0 < KC ? p->K - k0 : KC;
            for (int j = thread * NR; j < n; j += threads * NR)
                if (!sliver_in_place(p, n0 + j)) pack(p->slivers + (size_t)j * (size_t)k, p->b, p->b_across, n0 + j, k0, k, NR);
            barrier(threads);                                   // all of b's slivers are there
            gemm_tasks(p, n0, n, k0, k, thread, threads);
            barrier(threads);                                   // nobody reads them any more
        }
}

// What (M, N) takes when it is cut into whole tiles.
static double padded(int M, int N) { return (double)(ceil_div(M, MR) * MR) * (ceil_div(N, NR) * NR); }

// An adapter's y can be narrow, 36 columns in slivers of 32. Where padding would waste much and a's columns need no copy to be
// slivers, yᵀ = bᵀ aᵀ is computed in y's place: the same sums, with the short side in panels.
static void gemm(mat y, mat a, int a_across, mat b, int b_across, int K, real scale, enum mode mode)
{
    int threads = omp_in_parallel() || (double)y.rows * y.cols * K < 1e6 ? 1 : omp_get_max_threads();
    product p = {y.p, y.ld, 1, a, b, a_across, b_across, y.rows, y.cols, K, MC, 1, 1, scale, NULL, mode};
    if (a_across && padded(y.cols, y.rows) < 0.9 * padded(y.rows, y.cols))
        p = (product){y.p, 1, y.ld, b, a, b_across, a_across, y.cols, y.rows, K, MC, 1, 1, scale, NULL, mode};
    p.slivers = thread_buffer(1, (size_t)KC * (size_t)(ceil_div(p.N < NC ? p.N : NC, NR) * NR) + LANES);
    if (p.M < 4 * MR * threads) p.parts = threads;              // few rows: the threads share the columns,
    else p.rows = ceil_div(ceil_div(p.M, ceil_div(ceil_div(p.M, MC), threads) * threads), MR) * MR;     // else the rows, evenly
    p.blocks = ceil_div(p.M, p.rows);
    if (threads == 1) gemm_thread(&p, 0, 1);
    else {
        #pragma omp parallel num_threads(threads)
        gemm_thread(&p, omp_get_thread_num(), omp_get_num_threads());
    }
}

#endif
