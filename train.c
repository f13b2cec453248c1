/*  train.c: the ops on the CPU, the data, the options, the one training loop, main.

    Read in this order:
      1  the matrix product             packed and blocked; its plain oracle beside it
      2  the other ops                  each forward with its backward
      3  options                        one table: parser, --help and the printed settings
      4  rows                           .jsonl, .json and .txt to tokens and labels
      5  generation                     batched, with a key-value cache
      6  saving and resuming
      7  training
      8  the commands                   fine-tune, --eval, --generate, --merge, --tokenize, --list
      9  the CPU beside the GPU         --check
     10  comparing                      --compare
     11  main                                                                                                */

#define _GNU_SOURCE
#define STB_DS_IMPLEMENTATION
#include "adapters.h"
#include <ctype.h>
#include <fnmatch.h>
#include <omp.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>

#ifndef CUDA                            // train.cu defines the same names for a GPU

// ---- 1  the matrix product ---------------------------------------------------------------------------------
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

static mat nth(mat m, int i)            // matrix i of a batch; a batch of 1 serves every i
{
    if (m.batch > 1) m = offset(m, (size_t)i * m.stride);
    m.batch = 1;
    return m;
}

static void check_shapes(int ok, const char *op, mat y, mat a, mat b)
{
    if (!ok || y.type != TYPE_OF(real)) die("%s: shapes (%d, %d), (%d, %d), (%d, %d) do not fit", op, y.rows, y.cols, a.rows, a.cols, b.rows, b.cols);
}

static void gemm_batch(mat y, mat a, int a_across, mat b, int b_across, int K, double scale, enum mode mode)
{
    if (y.batch == 1) { gemm(y, nth(a, 0), a_across, nth(b, 0), b_across, K, (real)scale, mode); return; }
    #pragma omp parallel for schedule(static) if ((double)y.batch * y.rows * y.cols * K > 1e6 && !omp_in_parallel())
    for (int i = 0; i < y.batch; i++) gemm(nth(y, i), nth(a, i), a_across, nth(b, i), b_across, K, (real)scale, mode);
}

void matmul_nt(mat y, mat x, mat w, double scale, enum mode mode)
{
    if (!y.p) return;
    check_shapes(y.rows == x.rows && y.cols == w.rows && x.cols == w.cols, "matmul_nt", y, x, w);
    gemm_batch(y, x, 0, w, 0, x.cols, scale, mode);
}

void matmul_nn(mat y, mat x, mat w, double scale, enum mode mode)
{
    if (!y.p) return;
    check_shapes(y.rows == x.rows && y.cols == w.cols && x.cols == w.rows, "matmul_nn", y, x, w);
    gemm_batch(y, x, 0, w, 1, x.cols, scale, mode);
}

void matmul_tn(mat y, mat x, mat w, double scale, enum mode mode)
{
    if (!y.p) return;
    check_shapes(y.rows == x.cols && y.cols == w.cols && x.rows == w.rows, "matmul_tn", y, x, w);
    gemm_batch(y, x, 1, w, 1, x.rows, scale, mode);
}

// ---- 2  the other ops --------------------------------------------------------------------------------------

#define ROW(m, i) ((real *)at(m, i, 0))
#define BIG(m) ((double)(m).rows * (m).cols > 1e4 && !omp_in_parallel())      // worth more than one thread

dev dev_alloc(size_t bytes)
{
    if (bytes > SIZE_MAX - 64) return NULL;
    void *p = aligned_alloc(64, (bytes + 64) / 64 * 64);
    return p ? memset(p, 0, bytes) : NULL;
}

void dev_free(dev p) { free(p); }
size_t dev_reserve(needs n, int take) { (void)n, (void)take; return 0; }     // a thread's buffers grow in its first product; they hold a few blocks, no matrix
mat dev_weight(mat host) { return host; }
void dev_weight_free(mat w) { (void)w; }
const char *dev_name(void) { return "CPU"; }
int dev_tf32(void) { return 0; }

void dev_memory(double *used, double *all)
{
    struct rusage u = {0};
    getrusage(RUSAGE_SELF, &u);
    *used = (double)u.ru_maxrss * 1024, *all = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
}

void put_ints(dev_ints dst, const int *src, size_t n) { if (n) memcpy(dst, src, n * sizeof *src); }

void copy(mat y, mat x)
{
    if (y.rows != x.rows || y.cols != x.cols || y.batch != x.batch) die("copy: (%d, %d) to (%d, %d)", x.rows, x.cols, y.rows, y.cols);
    for (int b = 0; b < y.batch; b++) {
        mat to = nth(y, b), from = nth(x, b);
        #pragma omp parallel for if (BIG(y))
        for (int n = 0; n < y.rows; n++) {
            if (y.type == x.type) { memmove(at(to, n, 0), at(from, n, 0), (size_t)y.cols * dtypes[y.type].size); continue; }
            real buffer[KC];
            for (int c = 0; c < y.cols; c += KC) {
                size_t part = (size_t)(y.cols - c < KC ? y.cols - c : KC);
                narrow(at(to, n, c), y.type, widened(at(from, n, c), x.type, part, buffer), part);
            }
        }
    }
}

static mat host_mat(const void *p, enum dtype type, mat like)      // contiguous memory in the shape of another matrix
{
    return mat_of((dev)(uintptr_t)p, type, SHAPE(like.batch, like.rows, like.cols));
}

void put(mat dst, const void *src, enum dtype type) { copy(dst, host_mat(src, type, dst)); }
void get(wide *dst, mat src) { copy(host_mat(dst, TYPE_OF(wide), src), src); }

void zero(mat x)
{
    #pragma omp parallel for if (BIG(x))
    for (int n = 0; n < x.rows * x.batch; n++) memset(ROW(nth(x, n / x.rows), n % x.rows), 0, (size_t)x.cols * sizeof(real));
}

void add(mat y, mat x, double scale)
{
    if (!y.p) return;
    #pragma omp parallel for if (BIG(y))
    for (int n = 0; n < y.rows; n++) {
        real *yn = ROW(y, n), *xn = ROW(x, n);
        for (int c = 0; c < y.cols; c++) yn[c] += (real)scale * xn[c];
    }
}

// exp to the last bit or two, in a form that the compiler turns into vector code: 2^n · 2^f with |f| ≤ ½, a polynomial
// for 2^f (Taylor's coefficients of exp(f ln 2)). Double builds use the C library. NaN stays NaN.
static inline real exp_real(real x)
{
    if (sizeof(real) == 8) return (real)exp((double)x);
    float y = (float)x, magic = 12582912.f;                       // 1.5 · 2^23: adding it rounds to a whole number
    y = y < -87.3f ? -87.3f : y > 88.f ? 88.f : y;
    float shifted = y * 1.44269504f + magic, n = shifted - magic;
    float f = (y - n * 0.693359375f) + n * 2.12194440e-4f;        // y − n ln 2, with ln 2 in two parts
    float p = 1.f + f * (1.f + f * (.5f + f * (1.f / 6 + f * (1.f / 24 + f * (1.f / 120 + f * (1.f / 720 + f * (1.f / 5040)))))));
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = (bits + 127) << 23;                                     // 2^n: the whole number sits in the low bits
    float power;
    memcpy(&power, &bits, 4);
    return (real)(p * power);
}

void embedding_forward(mat out, mat table, dev_ints ids)
{
    #pragma omp parallel for if (BIG(out))
    for (int n = 0; n < out.rows; n++) copy(rows_of(out, n, 1), rows_of(table, ids[n], 1));
}

// Threads share the columns: two tokens may be the same id.
void embedding_backward(mat dtable, mat dout, dev_ints ids)
{
    if (!dtable.p) return;
    #pragma omp parallel for if (BIG(dout))
    for (int c0 = 0; c0 < dout.cols; c0 += 32)
        for (int n = 0; n < dout.rows; n++)
            for (int c = c0; c < dout.cols && c < c0 + 32; c++) ROW(dtable, ids[n])[c] += ROW(dout, n)[c];
}

// out = w x ρ,  ρ = 1 / √(mean(x²) + ε)
static inline real inverse_rms(const real *x, int C, double eps)
{
    double sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int c = 0; c < C; c++) sum += (double)x[c] * (double)x[c];
    return (real)(1 / sqrt(sum / C + eps));
}

// s[c] = Σ_j x[j·r + c] of one row; the last shard may be short
static inline void shards_of_row(real *s, int r, const real *x, int C)
{
    memset(s, 0, (size_t)r * sizeof *s);
    for (int j = 0, part; j < C; j += part) {
        part = C - j < r ? C - j : r;
        for (int c = 0; c < part; c++) s[c] += x[j + c];
    }
}

void rmsnorm_forward(mat out, mat sum, mat residual, mat x, mat w, double eps)
{
    #pragma omp parallel for if (BIG(x))
    for (int n = 0; n < x.rows; n++) {
        const real *xn = ROW(x, n), *wc = ROW(w, 0);
        real *on = ROW(out, n), rho = inverse_rms(xn, x.cols, eps);
        for (int c = 0; c < x.cols; c++) on[c] = wc[c] * xn[c] * rho;
        if (sum.p) shards_of_row(ROW(sum, n), sum.cols, on, x.cols);
        if (residual.p) memcpy(ROW(residual, n), xn, (size_t)x.cols * sizeof *xn);
    }
}

//  dw += Σ_n dout x ρ
//  dx += ρ (w dout − x ρ² mean(w dout x)),  since dρ/dx_c = −ρ³ x_c / C
void rmsnorm_backward(mat dx, mat dw, mat dout, mat x, mat w, double eps)
{
    int C = x.cols;
    #pragma omp parallel for if (BIG(x))
    for (int n = 0; n < (dx.p ? x.rows : 0); n++) {
        const real *xn = ROW(x, n), *wc = ROW(w, 0), *dn = ROW(dout, n);
        real *dxn = ROW(dx, n), rho = inverse_rms(xn, C, eps);
        double mean = 0;
        #pragma omp simd reduction(+ : mean)
        for (int c = 0; c < C; c++) mean += (double)(wc[c] * dn[c]) * (double)xn[c];
        real factor = (real)(mean / C) * rho * rho;
        for (int c = 0; c < C; c++) dxn[c] += rho * (wc[c] * dn[c] - factor * xn[c]);
    }
    for (int n = 0; n < (dw.p ? x.rows : 0); n++) {
        real rho = inverse_rms(ROW(x, n), C, eps);
        for (int c = 0; c < C; c++) ROW(dw, 0)[c] += ROW(dout, n)[c] * ROW(x, n)[c] * rho;
    }
}

// Halves (a, b) of a head turn by the angle of their position: (a cos − b sin, b cos + a sin). A rotation's transpose
// turns back, so the backward pass is sign = −1.
void rope(mat x, dev_ints pos, mat table, int sign)
{
    int half = table.cols / 2;
    #pragma omp parallel for if (BIG(x))
    for (int n = 0; n < x.rows; n++) {
        const real *cosine = ROW(table, pos[n]), *sine = cosine + half;
        for (real *a = ROW(x, n), *end = a + x.cols, *b = a + half; a < end; a += 2 * half, b += 2 * half)
            for (int i = 0; i < half; i++) {
                real u = a[i], v = b[i], s = (real)sign * sine[i];
                a[i] = u * cosine[i] - v * s;
                b[i] = v * cosine[i] + u * s;
            }
    }
}

// Attention, a block of query rows at a time: only (QUERIES, keys) scores of one head stand in memory per thread.
//   S = q kᵀ/√d (causal),  P = softmax(S),  out = P v.   Kept: lse = log Σ exp(S), one number a row and head.
enum { QUERIES = 60 };

static mat part_of(mat m, int row, int rows, int col, int cols)
{
    m = offset(m, (size_t)row * m.ld + (size_t)col);
    m.rows = rows;
    m.cols = cols;
    return view(m);
}

static inline real *lse_at(mat lse, int row, int head) { return (real *)at(lse, row, head); }

// What one block works on: head h of query rows q0 … q0+n-1 of a span, and the `keys` they may look at.
typedef struct { int row, n, keys, kv_col, q_col, before; } attention_part;

static attention_part attention_at(span s, int q0, int h, int group, int d)
{
    int n = s.nq - q0 < QUERIES ? s.nq - q0 : QUERIES, before = s.nk - s.nq + q0;     // keys before the block's first row
    return (attention_part){s.q + q0, n, before + n, h / group * d, h * d, before};
}

void attention_forward(mat out, mat lse, mat q, mat k, mat v, int d, const span *spans, int count)
{
    int heads = q.cols / d, group = q.cols / k.cols;
    #pragma omp parallel for collapse(2) schedule(dynamic) if (BIG(q))
    for (int i = 0; i < count; i++)
        for (int h = 0; h < heads; h++)
            for (int q0 = 0; q0 < spans[i].nq; q0 += QUERIES) {
                attention_part a = attention_at(spans[i], q0, h, group, d);
                mat K = part_of(k, spans[i].k, a.keys, a.kv_col, d), V = part_of(v, spans[i].k, a.keys, a.kv_col, d);
                mat S = mat_of(thread_buffer(2, (size_t)a.n * (size_t)a.keys), TYPE_OF(real), SHAPE(a.n, a.keys));
                matmul_nt(S, part_of(q, a.row, a.n, a.q_col, d), K, 1 / sqrt(d), SET);          // S = q kᵀ/√d
                for (int r = 0; r < a.n; r++) {
                    real *s = ROW(S, r), most = s[0], sum = 0;
                    int seen = a.before + r + 1;
                    #pragma omp simd reduction(max : most)
                    for (int c = 1; c < seen; c++) most = s[c] > most ? s[c] : most;
                    #pragma omp simd reduction(+ : sum)
                    for (int c = 0; c < seen; c++) sum += s[c] = exp_real(s[c] - most);
                    for (int c = 0; c < seen; c++) s[c] /= sum;                                 // P = softmax(S)
                    for (int c = seen; c < a.keys; c++) s[c] = 0;
                    *lse_at(lse, a.row + r, h) = most + (real)log((double)sum);
                }
                matmul_nn(part_of(out, a.row, a.n, a.q_col, d), S, V, 1, SET);                  // out = P v
            }
}

//  out = P v:         dv += Pᵀ dout,   dP = dout vᵀ
//  P = softmax(S):    dS = P ⊙ (dP − Δ),   Δ = Σ_c dP P = dout · out, a number a row
//  S = q kᵀ/√d:       dq += dS k/√d,   dk += dSᵀ q/√d
//  P is recomputed as exp(S − lse). Heads that share keys are done by the same thread, one after the other.
static void attention_backward_head(mat dq, mat dk, mat dv, mat dout, mat q, mat k, mat v, mat out, mat lse, int d, span s, int h)
{
    for (int q0 = 0; q0 < s.nq; q0 += QUERIES) {
        attention_part a = attention_at(s, q0, h, q.cols / k.cols, d);
        mat K = part_of(k, s.k, a.keys, a.kv_col, d), V = part_of(v, s.k, a.keys, a.kv_col, d);
        mat Q = part_of(q, a.row, a.n, a.q_col, d), dO = part_of(dout, a.row, a.n, a.q_col, d);
        mat P = mat_of(thread_buffer(2, (size_t)a.n * (size_t)a.keys), TYPE_OF(real), SHAPE(a.n, a.keys));
        mat dS = mat_of(thread_buffer(3, (size_t)a.n * (size_t)a.keys), TYPE_OF(real), SHAPE(a.n, a.keys));
        matmul_nt(P, Q, K, 1 / sqrt(d), SET);
        matmul_nt(dS, dO, V, 1, SET);                                                           // dP, for now
        for (int r = 0; r < a.n; r++) {
            real *p = ROW(P, r), *ds = ROW(dS, r), l = *lse_at(lse, a.row + r, h), delta = 0;
            const real *o = ROW(out, a.row + r) + a.q_col, *g = ROW(dO, r);
            int seen = a.before + r + 1;
            for (int c = 0; c < d; c++) delta += o[c] * g[c];
            for (int c = 0; c < seen; c++) p[c] = exp_real(p[c] - l), ds[c] = p[c] * (ds[c] - delta);
            for (int c = seen; c < a.keys; c++) p[c] = ds[c] = 0;
        }
        matmul_tn(part_of(dv, s.k, a.keys, a.kv_col, d), P, dO, 1, ADD);
        matmul_nn(part_of(dq, a.row, a.n, a.q_col, d), dS, K, 1 / sqrt(d), ADD);
        matmul_tn(part_of(dk, s.k, a.keys, a.kv_col, d), dS, Q, 1 / sqrt(d), ADD);
    }
}

void attention_backward(mat dq, mat dk, mat dv, mat dout, mat q, mat k, mat v, mat out, mat lse, int d, const span *spans, int count)
{
    int group = q.cols / k.cols, kv_heads = k.cols / d;
    #pragma omp parallel for collapse(2) schedule(dynamic) if (BIG(q))
    for (int i = 0; i < count; i++)
        for (int g = 0; g < kv_heads; g++)
            for (int h = g * group; h < (g + 1) * group; h++)
                attention_backward_head(dq, dk, dv, dout, q, k, v, out, lse, d, spans[i], h);
}

// out = silu(g) u,  silu(g) = g σ(g),  σ(g) = 1/(1 + e^−g)
void swiglu_forward(mat out, mat sum, mat gate, mat up)
{
    #pragma omp parallel for if (BIG(out))
    for (int n = 0; n < out.rows; n++) {
        real *o = ROW(out, n), *g = ROW(gate, n), *u = ROW(up, n);
        for (int c = 0; c < out.cols; c++) o[c] = g[c] / (1 + exp_real(-g[c])) * u[c];
        if (sum.p) shards_of_row(ROW(sum, n), sum.cols, o, out.cols);
    }
}

//  dg += dout u σ (1 + g (1 − σ)),   du += dout g σ
void swiglu_backward(mat dgate, mat dup, mat dout, mat gate, mat up)
{
    #pragma omp parallel for if (BIG(dout))
    for (int n = 0; n < dout.rows; n++) {
        real *dg = ROW(dgate, n), *du = ROW(dup, n), *d = ROW(dout, n), *g = ROW(gate, n), *u = ROW(up, n);
        for (int c = 0; c < dout.cols; c++) {
            real sigma = 1 / (1 + exp_real(-g[c]));
            dg[c] += d[c] * u[c] * sigma * (1 + g[c] * (1 - sigma));
            du[c] += d[c] * g[c] * sigma;
        }
    }
}

//  loss = log Σ exp(z) − z[label];   dz = scale (softmax(z) − [label]), in z's place: one pass more while z is in cache
void cross_entropy(mat losses, mat logits, dev_ints labels, double scale)
{
    int V = logits.cols;
    #pragma omp parallel for if (BIG(logits))
    for (int n = 0; n < logits.rows; n++) {
        real *z = ROW(logits, n), most = z[0], at_label = z[labels[n]];
        double sum = 0;
        #pragma omp simd reduction(max : most)
        for (int c = 1; c < V; c++) most = z[c] > most ? z[c] : most;
        for (int c = 0; c < V; c++) z[c] = exp_real(z[c] - most);
        #pragma omp simd reduction(+ : sum)
        for (int c = 0; c < V; c++) sum += (double)z[c];
        *ROW(losses, n) = (real)(log(sum) + (double)(most - at_label));
        if (!scale) continue;
        real factor = (real)(scale / sum);
        for (int c = 0; c < V; c++) z[c] *= factor;
        z[labels[n]] -= (real)scale;
    }
}

void shard_sum(mat s, mat x)
{
    if (!s.p) return;
    #pragma omp parallel for if (BIG(x))
    for (int n = 0; n < x.rows; n++) shards_of_row(ROW(s, n), s.cols, ROW(x, n), x.cols);
}

void shard_tile(mat x, mat s)
{
    if (!x.p) return;
    int r = s.cols;
    #pragma omp parallel for if (BIG(x))
    for (int n = 0; n < x.rows; n++) {
        real *sn = ROW(s, n), *xn = ROW(x, n);
        for (int j = 0, part; j < x.cols; j += part) {
            part = x.cols - j < r ? x.cols - j : r;
            for (int c = 0; c < part; c++) xn[j + c] += sn[c];
        }
    }
}

void tiled_identity(mat e)
{
    int r = e.rows < e.cols ? e.rows : e.cols;
    for (int i = 0; i < e.rows; i++)
        for (int j = 0; j < e.cols; j++) ROW(e, i)[j] = i % r == j % r;
}

// A vector g along the rows of x or along its columns. It has a number for each row if it is (rows, 1), for each column
// if it is (1, cols).
static int for_rows(mat g, mat x, const char *op)
{
    int rows = g.rows == x.rows && g.cols == 1;
    if (!rows && (g.rows != 1 || g.cols != x.cols)) die("%s: (%d, %d) does not fit (%d, %d)", op, g.rows, g.cols, x.rows, x.cols);
    return rows;
}

void broadcast_mul(mat y, mat x, mat g, double scale, enum mode mode)
{
    if (!y.p) return;
    int rows = for_rows(g, x, "broadcast_mul");
    #pragma omp parallel for if (BIG(x))
    for (int n = 0; n < x.rows; n++) {
        real *yn = ROW(y, n), *xn = ROW(x, n), *gn = ROW(g, rows ? n : 0);
        for (int c = 0; c < x.cols; c++) yn[c] = (mode == ADD ? yn[c] : 0) + (real)scale * xn[c] * gn[rows ? 0 : c];
    }
}

// g[n] = scale x_n · y_n. Both may be weights in the dtype of their file.
static void row_dots(mat g, mat x, mat y, double scale, enum mode mode)
{
    #pragma omp parallel for if (BIG(x))
    for (int n = 0; n < x.rows; n++) {
        real a[KC], b[KC];
        double sum = 0;
        for (int c = 0; c < x.cols; c += KC) {
            int part = x.cols - c < KC ? x.cols - c : KC;
            const real *u = widened(at(x, n, c), x.type, (size_t)part, a), *v = widened(at(y, n, c), y.type, (size_t)part, b);
            #pragma omp simd reduction(+ : sum)
            for (int j = 0; j < part; j++) sum += (double)u[j] * (double)v[j];
        }
        *ROW(g, n) = (mode == ADD ? *ROW(g, n) : 0) + (real)(scale * sum);
    }
}

// g[c] = scale Σ_n x[n,c] y[n,c]. Threads share the columns.
static void column_dots(mat g, mat x, mat y, double scale, enum mode mode)
{
    enum { COLUMNS = 64 };
    #pragma omp parallel for if (BIG(x))
    for (int c0 = 0; c0 < x.cols; c0 += COLUMNS) {
        double sums[COLUMNS] = {0};
        int part = x.cols - c0 < COLUMNS ? x.cols - c0 : COLUMNS;
        for (int n = 0; n < x.rows; n++)
            for (int j = 0; j < part; j++) sums[j] += (double)ROW(x, n)[c0 + j] * (double)ROW(y, n)[c0 + j];
        for (int j = 0; j < part; j++) ROW(g, 0)[c0 + j] = (mode == ADD ? ROW(g, 0)[c0 + j] : 0) + (real)(scale * sums[j]);
    }
}

void broadcast_dot(mat g, mat x, mat y, double scale, enum mode mode)
{
    if (!g.p) return;
    if (for_rows(g, x, "broadcast_dot")) row_dots(g, x, y, scale, mode);
    else column_dots(g, x, y, scale, mode);
}

void magnitude_forward(mat gain, mat m, mat squares)
{
    for (size_t i = 0; i < elements(gain); i++) {
        wide q = ((wide *)squares.p)[i];
        ((wide *)gain.p)[i] = q <= 0 ? 1 : ((wide *)m.p)[i] / (wide)sqrt(q);
    }
}

//  g = m q^-½:   dm += dg q^-½,   dq = −½ dg m q^-3/2
void magnitude_backward(mat dm, mat dsquares, mat dgain, mat m, mat squares)
{
    for (size_t i = 0; i < elements(dgain); i++) {
        wide dg = ((wide *)dgain.p)[i], q = ((wide *)squares.p)[i], root = (wide)sqrt(q);
        int none = q <= 0;                                              // no length, no gradient
        ((wide *)dm.p)[i] += none ? 0 : dg / root;
        ((wide *)dsquares.p)[i] = none ? 0 : -dg * ((wide *)m.p)[i] / (2 * q * root);
    }
}

// Sums of 64K numbers, then the sum of those: the order does not depend on the threads.
double sum_of_squares(mat x)
{
    enum { PIECE = 1 << 16 };
    size_t n = elements(x), pieces = (n + PIECE - 1) / PIECE;
    double *sums = alloc(pieces, sizeof *sums), total = 0;
    const real *p = x.p;
    #pragma omp parallel for if (BIG(x))
    for (size_t i = 0; i < pieces; i++) {
        double sum = 0;
        size_t end = (i + 1) * PIECE < n ? (i + 1) * PIECE : n;
        #pragma omp simd reduction(+ : sum)
        for (size_t j = i * PIECE; j < end; j++) sum += (double)p[j] * (double)p[j];
        sums[i] = sum;
    }
    for (size_t i = 0; i < pieces; i++) total += sums[i];
    free(sums);
    return total;
}

// PyTorch's AdamW (arXiv 1711.05101): decay apart from the gradient, moments corrected for their start at zero.
void adamw(mat w, mat dw, mat m, mat v, double lr, double decay, double grad_scale, int t)
{
    const wide c1 = (wide)(1 - 0.9), b2 = (wide)0.999, c2 = (wide)(1 - 0.999), eps = (wide)1e-8;
    const wide shrink = (wide)(1 - lr * decay), rate = (wide)(lr / (1 - pow(0.9, t))), root = (wide)sqrt(1 - pow(0.999, t));
    wide *wp = w.p, *dp = dw.p, *mp = m.p, *vp = v.p;
    size_t n = elements(w);
    #pragma omp parallel for simd if (BIG(w))
    for (size_t i = 0; i < n; i++) {
        wide g = (wide)grad_scale * dp[i];
        mp[i] += c1 * (g - mp[i]);                                        // m = β₁ m + (1 − β₁) g
        vp[i] = b2 * vp[i] + c2 * g * g;
        wp[i] = wp[i] * shrink - rate * mp[i] / ((wide)sqrt(vp[i]) / root + eps);
    }
}

#endif // CUDA

// ---- 3  options --------------------------------------------------------------------------------------------

#define VERSION "0.9"

typedef struct {
    const char *model, *init, *adapter, *data, *val, *out, *log, *resume, *method, *targets, *schedule, *generate, *merge, *tokenize;
    int eval, list, help, version, check, compare, quick, sweep_lr, seeds, tf32, chat, exact_match, no_shuffle;
    int rank, mini_r, dora_detach, steps, batch, accum, recompute, seq, warmup, seed, threads, eval_every, save_every, max_new;
    double epochs, alpha, plus_ratio, lr, weight_decay, clip, temperature, top_p;
} options;

static const char default_method[] = "bone";

static options opt = {
    .model = "base", .method = default_method, .targets = "q,k,v,o,gate,up,down", .schedule = "cosine",
    .rank = 32, .mini_r = 8, .epochs = 1, .batch = 16, .accum = 1, .seq = 256, .seed = 1, .seeds = 1, .max_new = 128,
    .plus_ratio = 16, .lr = 4e-3, .clip = 1, .top_p = 1,
};

// kind: s text, i whole number, d number, f flag. Numbers are checked against [least, most]. The first COMMANDS rows exclude each other.
static const struct option { const char *name, *value; char kind; void *at; double least, most; const char *help; } option_table[] = {
    {"--eval",            "",       'f', &opt.eval,          0, 0, "print the loss of --model (and --adapter) on --val"},
    {"--generate",        "TEXT",   's', &opt.generate,      0, 0, "continue TEXT"},
    {"--merge",           "DIR",    's', &opt.merge,         0, 0, "write --model with --adapter merged in as a model directory"},
    {"--tokenize",        "FILE",   's', &opt.tokenize,      0, 0, "print one JSON array of ids per row's \"text\""},
    {"--check",           "",       'f', &opt.check,         0, 0, "one step on the CPU and one on the GPU, a little off the adapter's start, tensor by tensor (train_cuda, train_emu)"},
    {"--list",            "",       'f', &opt.list,          0, 0, "print the methods and what each would train on --model"},
    {"--compare",         "",       'f', &opt.compare,       0, 0, "every method side by side: CSV, table and plots"},
    {"--quick",           "",       'f', &opt.quick,         0, 0, "--compare with a fifth of the work"},
    {"--seeds",           "N",      'i', &opt.seeds,         1, 1000, "--compare with N seeds each, from --seed on, and their spread"},
    {"--sweep-lr",        "",       'f', &opt.sweep_lr,      0, 0, "--compare at a quarter to sixteen times --lr, too"},
    {"--help",            "",       'f', &opt.help,          0, 0, "print this page (-h)"},
    {"--version",         "",       'f', &opt.version,       0, 0, "print the program's version"},
    {"--model",           "DIR",    's', &opt.model,         0, 0, "base model, a Hugging Face directory"},
    {"--init",            "CONFIG", 's', &opt.init,          0, 0, "start from random weights of this config.json (with --method full; tokenizer from --model)"},
    {"--adapter",         "DIR",    's', &opt.adapter,       0, 0, "adapter to use, or to go on training"},
    {"--data",            "FILE",   's', &opt.data,          0, 0, "rows to train on: .jsonl, .json or .txt (default data/train.jsonl)"},
    {"--val",             "FILE",   's', &opt.val,           0, 0, "rows to evaluate on (default data/val.jsonl, with the default --data)"},
    {"--out",             "DIR",    's', &opt.out,           0, 0, "where the result goes (default out; with --compare, compare)"},
    {"--log",             "FILE",   's', &opt.log,           0, 0, "one JSON object a step"},
    {"--resume",          "DIR",    's', &opt.resume,        0, 0, "go on from what an earlier run left in DIR"},
    {"--save-every",      "N",      'i', &opt.save_every,    0, 1e9, "also save every N steps (0: at the end only)"},
    {"--method",          "M",      's', &opt.method,        0, 0, "see --list"},
    {"--rank",            "R",      'i', &opt.rank,          1, 1 << 20, "rank of the adapter"},
    {"--alpha",           "A",      'd', &opt.alpha,         1e-9, 1e9, "LoRA's α (default: the rank, so that α/r = 1)"},
    {"--mini-r",          "R",      'i', &opt.mini_r,        1, 1 << 20, "columns of mini's D"},
    {"--targets",         "LIST",   's', &opt.targets,       0, 0, "linear layers that get the adapter"},
    {"--lora-plus-ratio", "λ",      'd', &opt.plus_ratio,    1e-9, 1e9, "LoRA+: B's learning rate over A's"},
    {"--dora-detach",     "",       'f', &opt.dora_detach,   0, 0, "DoRA: no gradient through the norm, as in PEFT"},
    {"--steps",           "N",      'i', &opt.steps,         1, 1e9, "optimiser steps (default: by --epochs)"},
    {"--epochs",          "X",      'd', &opt.epochs,        1e-9, 1e6, "passes over --data; half of one is 0.5"},
    {"--batch",           "B",      'i', &opt.batch,         1, 1 << 20, "rows a micro-batch"},
    {"--accum",           "K",      'i', &opt.accum,         1, 1 << 20, "micro-batches a step"},
    {"--recompute",       "N",      'i', &opt.recompute,     0, 2, "keep less for the backward pass: 1 not gate and up, 2 only each layer's input"},
    {"--seq",             "T",      'i', &opt.seq,           2, 1 << 20, "tokens a row at most"},
    {"--lr",              "X",      'd', &opt.lr,            0, 1e9, "learning rate"},
    {"--schedule",        "S",      's', &opt.schedule,      0, 0, "cosine, linear or constant"},
    {"--warmup",          "N",      'i', &opt.warmup,        0, 1e9, "steps in which the learning rate rises from 0"},
    {"--weight-decay",    "X",      'd', &opt.weight_decay,  0, 1e9, "AdamW's decoupled decay"},
    {"--clip",            "X",      'd', &opt.clip,          0, 1e30, "clip the gradient's norm at X (0: never)"},
    {"--seed",            "N",      'i', &opt.seed,          0, 2e9, "of the adapter's start, the order of rows, and sampling"},
    {"--no-shuffle",      "",       'f', &opt.no_shuffle,    0, 0, "rows in the order of the file"},
    {"--tf32",            "",       'f', &opt.tf32,          0, 0, "on a GPU, let products of floats round their factors to 10 bits: faster"},
    {"--threads",         "N",      'i', &opt.threads,       1, 4096, "CPU threads (default: all); the result is the same for any number"},
    {"--eval-every",      "N",      'i', &opt.eval_every,    0, 1e9, "evaluate every N steps (0: never); always before the first and after the last"},
    {"--exact-match",     "",       'f', &opt.exact_match,   0, 0, "score answers to --val, too (training does so by itself with small models)"},
    {"--chat",            "",       'f', &opt.chat,          0, 0, "wrap --generate's TEXT in the prompt of fine-tuning"},
    {"--max-new",         "N",      'i', &opt.max_new,       1, 1 << 20, "tokens to generate at most"},
    {"--temperature",     "X",      'd', &opt.temperature,   0, 1e6, "sample with this temperature (0: the likeliest token)"},
    {"--top-p",           "X",      'd', &opt.top_p,         1e-9, 1, "sample from the likeliest tokens of this total probability"},
};
enum { OPTIONS = sizeof option_table / sizeof *option_table, COMMANDS = 7 };
static char *given_values[OPTIONS];            // what each was given on the command line, "" for flags; NULL where it was not

// What others call our options and their values: PEFT, transformers' Trainer, the scripts around them. Underscores count as dashes.
static const struct { const char *theirs, *ours; } aliases[] = {
    {"-h", "--help"}, {"--model-name-or-path", "--model"}, {"--base-model", "--model"}, {"--adapter-name-or-path", "--adapter"},
    {"--data-path", "--data"}, {"--train-file", "--data"}, {"--validation-file", "--val"}, {"--output-dir", "--out"},
    {"--learning-rate", "--lr"}, {"--lr-scheduler-type", "--schedule"}, {"--warmup-steps", "--warmup"}, {"--max-grad-norm", "--clip"},
    {"--per-device-train-batch-size", "--batch"}, {"--gradient-accumulation-steps", "--accum"}, {"--num-train-epochs", "--epochs"},
    {"--max-steps", "--steps"}, {"--save-steps", "--save-every"}, {"--eval-steps", "--eval-every"}, {"--resume-from-checkpoint", "--resume"},
    {"--lora-r", "--rank"}, {"--r", "--rank"}, {"--lora-alpha", "--alpha"}, {"--target-modules", "--targets"}, {"--lora-target-modules", "--targets"},
    {"--max-seq-length", "--seq"}, {"--max-length", "--seq"}, {"--model-max-length", "--seq"}, {"--cutoff-len", "--seq"}, {"--max-new-tokens", "--max-new"},
    {"miss", "bone"}, {"bat-col", "bat"}, {"loraplus", "lora+"}, {"constant-with-warmup", "constant"},
};
enum { ALIASES = sizeof aliases / sizeof *aliases, NAME = 64 };

static void print_help(void)
{
    puts("./train fine-tunes a Llama2 with LoRA, PiSSA, Bone, Bat and their relatives, every gradient by hand.\n");
    for (int i = 0; i < OPTIONS; i++) {
        const struct option *o = &option_table[i];
        char value[64] = "";
        if (o->kind == 's' && *(char **)o->at) snprintf(value, sizeof value, " [%s]", *(char **)o->at);
        if (o->kind == 'i' && *(int *)o->at) snprintf(value, sizeof value, " [%d]", *(int *)o->at);
        if (o->kind == 'd' && *(double *)o->at != 0) snprintf(value, sizeof value, " [%g]", *(double *)o->at);
        int n = printf("  %s %s", o->name, o->value);
        printf("%*s%s%s\n", n < 28 ? 28 - n : 1, "", o->help, value);
    }
    puts("\n--rank=16 is --rank 16. The names that PEFT and transformers have for the same things, --learning_rate or --lora_r, will do, too.");
}

static void set_option(const struct option *o, const char *text)
{
    char *end;
    double x = o->kind == 'i' || o->kind == 'd' ? strtod(text, &end) : 0;
    if (o->kind == 's') { *(const char **)o->at = text; return; }
    if (end == text || *end || !(x >= o->least && x <= o->most) || (o->kind == 'i' && x != floor(x)))
        die("%s %s: expected a %snumber from %.10g to %.10g", o->name, text, o->kind == 'i' ? "whole " : "", o->least, o->most);
    if (o->kind == 'i') *(int *)o->at = (int)x;
    else *(double *)o->at = x;
}

// One line of a small file of the kernel's, empty where there is none.
static void kernel_line(char line[128], const char *root, const char *path)
{
    char name[PATH_MAX];
    *line = 0;
    int fits = snprintf(name, sizeof name, "%s%s", root, path) < (int)sizeof name;
    FILE *f = fits ? fopen(name, "r") : NULL;
    if (!f) return;
    if (!fgets(line, 128, f)) *line = 0;
    fclose(f);
}

// CPUs that one control group allows; INFINITY where it sets no quota. `group` is its path, "" for the root that we see.
// Version 2 says "quota period" or "max period" in one file, version 1 has two files and -1 for no quota.
static double group_quota(const char *root, const char *group)
{
    char path[PATH_MAX], line[128];
    double quota = -1, period = -1;
    snprintf(path, sizeof path, "/sys/fs/cgroup%.3000s/cpu.max", group);
    kernel_line(line, root, path);
    if (sscanf(line, "%lf %lf", &quota, &period) == 2) return quota / period;
    snprintf(path, sizeof path, "/sys/fs/cgroup/cpu%.3000s/cpu.cfs_quota_us", group);
    kernel_line(line, root, path);
    if (sscanf(line, "%lf", &quota) != 1 || quota <= 0) return INFINITY;
    snprintf(path, sizeof path, "/sys/fs/cgroup/cpu%.3000s/cpu.cfs_period_us", group);
    kernel_line(line, root, path);
    return sscanf(line, "%lf", &period) == 1 && period > 0 ? quota / period : INFINITY;
}

// The CPUs that this process may use: those of its affinity, and no more than a container's quota (its control group's, and
// those above it). More threads than that would wait for each other. `root` is put before the kernel's paths.
static int usable_cpus(const char *root)
{
    char name[PATH_MAX], line[PATH_MAX], *group;
    double quota = group_quota(root, "");
    snprintf(name, sizeof name, "%.4000s/proc/self/cgroup", root);
    FILE *f = fopen(name, "r");
    while (f && fgets(line, sizeof line, f)) {
        char *kind = strchr(line, ':');                         // 0::/path, or 4:cpu,cpuacct:/path
        if (!kind || !(group = strchr(kind + 1, ':')) || (kind[1] != ':' && strncmp(kind, ":cpu", 4))) continue;
        group++;
        group[strcspn(group, "\n")] = 0;
        for (char *end = group + strlen(group); end > group; end = strrchr(group, '/') ? strrchr(group, '/') : group) {
            *end = 0;
            quota = fmin(quota, group_quota(root, group));
        }
    }
    if (f) fclose(f);
    int cpus = omp_get_num_procs();
    return quota < cpus ? (int)fmax(1, ceil(quota)) : cpus;
}

// A thread of libgomp that waits for the others spins for some ten milliseconds. Where anything else runs, it takes away the
// very CPU that they need, and a step takes ten times as long. A thousand turns, some thirty microseconds, are enough
// between two products. libgomp reads the number before main begins, so the program starts itself again with it.
static void spin_briefly(char **argv)
{
    if (getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT")) return;
    setenv("GOMP_SPINCOUNT", "1000", 1);
    execv("/proc/self/exe", argv);                              // where that is not allowed, it goes on as it is
}

// A name of n bytes as this program spells it.
static void usual_name(char name[NAME], const char *text, size_t n)
{
    snprintf(name, NAME, "%.*s", (int)(n < NAME ? n : NAME), text);
    for (char *c = name; *c; c++) if (*c == '_') *c = '-';
    for (int i = 0; i < ALIASES; i++) if (!strcasecmp(name, aliases[i].theirs)) strcpy(name, aliases[i].ours);
}

// The option that an argument names, -1 if none does, and the value behind a "=", NULL without one.
static int option_named(char *arg, char **value)
{
    char name[NAME];
    size_t n = strcspn(arg, "=");
    *value = arg[n] ? arg + n + 1 : NULL;
    usual_name(name, arg, n);
    for (int i = 0; i < OPTIONS && *arg == '-'; i++) if (!strcmp(name, option_table[i].name)) return i;
    return -1;
}

// Edits from one name to another: a letter more, less or changed, or two neighbours swapped (optimal string alignment).
static int edits(const char *a, const char *b)
{
    int d[NAME][NAME], n = (int)strlen(a), m = (int)strlen(b);
    for (int i = 0; i <= n; i++)
        for (int j = 0; j <= m; j++) {
            int best = i && j ? d[i - 1][j - 1] + (a[i - 1] != b[j - 1]) : i + j;
            if (i && j && d[i - 1][j] + 1 < best) best = d[i - 1][j] + 1;
            if (i && j && d[i][j - 1] + 1 < best) best = d[i][j - 1] + 1;
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] && d[i - 2][j - 2] + 1 < best) best = d[i - 2][j - 2] + 1;
            d[i][j] = best;
        }
    return d[n][m];
}

// Takes `candidate`, or `means` in its place, for what was meant if it is nearer than what was found so far; or if `name` only adds words to it.
static void nearer(const char *name, const char *candidate, const char *means, int *least, const char **found)
{
    size_t n = strlen(candidate);
    int d = !strncmp(name, candidate, n) && name[n] == '-' ? 1 : edits(name, candidate);
    if (d < *least) *least = d, *found = means;
}

__attribute__((noreturn))
static void unknown_option(const char *arg)
{
    char name[NAME];
    const char *meant = NULL;
    usual_name(name, arg, strcspn(arg, "="));
    int least = (int)strlen(name) / 3 + 1;                      // a third of it may be wrong
    if (*arg != '-') die("unknown option %s: options begin with --, and the parts of a list are joined by commas", arg);
    for (int i = 0; i < OPTIONS; i++) nearer(name, option_table[i].name, option_table[i].name, &least, &meant);
    for (int i = 0; i < ALIASES; i++) nearer(name, aliases[i].theirs, aliases[i].ours, &least, &meant);
    if (meant) die("unknown option %s; did you mean %s? --help lists them", arg, meant);
    die("unknown option %s; --help lists them", arg);
}

// One option of the command line. Of two values the last one counts, but two adapters at once are something else.
static void give_option(int i, char *value)
{
    const struct option *o = &option_table[i];
    if (given_values[i] && o->at == &opt.adapter)
        die("--adapter is given twice, %s and %s; one is used at a time: --merge the first and give the result as --model", given_values[i], value);
    if (given_values[i] && strcmp(given_values[i], value)) fprintf(stderr, "note: %s is given twice; %s counts, not %s\n", o->name, value, given_values[i]);
    given_values[i] = value;
    if (o->kind == 'f') *(int *)o->at = 1;
    else set_option(o, value);
}

static void read_options(int argc, char **argv)
{
    memset(given_values, 0, sizeof given_values);
    for (int a = 1; a < argc; a++) {
        char *value, *none;
        int i = option_named(argv[a], &value);
        if (i < 0) unknown_option(argv[a]);
        const struct option *o = &option_table[i];
        if (o->kind == 'f' && value) die("%s: %s takes no value", argv[a], o->name);
        if (o->kind != 'f' && !value) {
            if (a + 1 == argc || option_named(argv[a + 1], &none) >= 0) die("%s needs a value: %s %s", argv[a], argv[a], o->value);
            value = argv[++a];
        }
        give_option(i, value ? value : "");
    }
    for (int i = 0; i < COMMANDS; i++)
        for (int j = 0; j < i; j++)
            if (given_values[i] && given_values[j]) die("%s and %s: give one of them", option_table[j].name, option_table[i].name);
}

// The schedule as learning_rate() knows it.
static const char *parse_schedule(const char *text)
{
    static const char *const schedules[] = {"cosine", "linear", "constant"};
    char name[NAME];
    usual_name(name, text, strlen(text));
    for (int i = 0; i < 3; i++) if (!strcasecmp(name, schedules[i])) return schedules[i];
    die("--schedule %s: expected cosine, linear or constant", text);
}

// A model's name on Hugging Face, such as meta-llama/Llama-2-7b-hf, where a directory is wanted.
static void refuse_hub_name(const char *option, const char *name)
{
    const char *slash = name ? strchr(name, '/') : NULL;
    if (!slash || slash == name || !slash[1] || strchr(slash + 1, '/') || strchr(".~", *name) || !access(name, F_OK)) return;
    char *folder = strndup(name, (size_t)(slash - name));
    int path = !folder || !access(folder, F_OK);
    free(folder);
    if (!path) die("%s %s: there is no such directory here. If it is a name on Hugging Face, get it first: hf download %s --local-dir %s, then %s %s", option, name, name, slash + 1, option, slash + 1);
}

static void parse_options(int argc, char **argv)
{
    read_options(argc, argv);
    if (!opt.val && !opt.data) opt.val = "data/val.jsonl";
    if (!opt.data) opt.data = "data/train.jsonl";
    if (!opt.out) opt.out = opt.compare ? "compare" : "out";
    opt.schedule = parse_schedule(opt.schedule);
    if ((long)opt.batch * opt.accum > 1 << 24) die("--batch %d times --accum %d is too much; at most %d rows a step", opt.batch, opt.accum, 1 << 24);
    refuse_hub_name("--model", opt.model);
    refuse_hub_name("--adapter", opt.adapter);
    if (opt.threads) omp_set_num_threads(opt.threads);
    else if (!getenv("OMP_NUM_THREADS")) omp_set_num_threads(usable_cpus(""));
    if (opt.tf32 && !dev_tf32()) die("--tf32 is for floats on a GPU; this program computes otherwise");
}

// A bit for each of linear_names. PEFT's names, q_proj, and its "all-linear" will do.
static int parse_targets(const char *list)
{
    int targets = 0;
    while (*(list += strspn(list, ", "))) {
        size_t n = strcspn(list, ", ");
        char *name = strndup(list, n);
        if (!name) die("out of memory");
        int i = 0, all = !strcmp(name, "all-linear");
        while (i < 7 && strcmp(name, linear_names[i]) && strcmp(name, module_names[i])) i++;
        if (i == 7 && !all) die("--targets: there is no linear layer \"%s\"; choose from q,k,v,o,gate,up,down", name);
        targets |= all ? 127 : 1 << i;
        list += n;
        free(name);
    }
    if (!targets) die("--targets: names no layer; choose from q,k,v,o,gate,up,down");
    return targets;
}

static plan plan_from_options(void)
{
    char name[NAME];
    usual_name(name, opt.method, strlen(opt.method));
    const method *m = method_named(name);
    if (!m) die("--method %s: there is no such method; --list shows them", opt.method);
    return (plan){
        .method = m, .rank = opt.rank, .mini_r = opt.mini_r, .targets = parse_targets(opt.targets), .seed = (uint64_t)opt.seed,
        .alpha = opt.alpha > 0 ? opt.alpha : opt.rank, .plus_ratio = opt.plus_ratio, .tokens = 1, .positions = 1, .train = 1,
        .dora_detach = opt.dora_detach, .recompute = opt.recompute,
    };
}

// ---- 4  rows -----------------------------------------------------------------------------------------------

typedef struct tokenizer tokenizer;     // tokenizer.c: SentencePiece BPE
tokenizer *tokenizer_load(const char *path, char *err, size_t err_size);
void tokenizer_free(tokenizer *t);
int tokenizer_vocab(const tokenizer *t), tokenizer_bos(const tokenizer *t), tokenizer_eos(const tokenizer *t);
typedef struct { const char *text; int id; _Bool special, lstrip, rstrip, single_word; } added_token;
_Bool tokenizer_add(tokenizer *t, added_token a), tokenizer_add_own(tokenizer *t);
enum behind_special { ALWAYS, UNLESS_SPACE, NEVER };
void tokenizer_spaces(tokenizer *t, _Bool in_front, enum behind_special behind);
void tokenizer_ends(tokenizer *t, int bos, int eos);
int tokenizer_find(const tokenizer *t, const char *text);
int *tokenizer_encode(const tokenizer *t, const char *text, size_t bytes, _Bool begins, size_t *n);
char *tokenizer_decode(const tokenizer *t, const int *ids, size_t n, size_t *bytes);

typedef struct {
    int *ids, n;                // BOS, prompt, answer, EOS
    int prompt;                 // the first so many are not learnt: BOS and the prompt
    char *answer;               // what scoring compares with, NULL for plain text
} row;

typedef struct { row *rows; const char *path; int cut, dropped, empty; } dataset;

static const char prompt_format[] =
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n%s\n\n### Response:";

static const char *string_field(const cJSON *json, const char *name)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(json, name);
    return cJSON_IsString(item) ? item->valuestring : NULL;
}

// A field as text; a number as the file spells it. NULL where it is missing or null; anything else is refused.
static const char *text_field(const char *where, const cJSON *json, const char *name)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(json, name);
    if (!item || cJSON_IsNull(item)) return NULL;
    if (cJSON_IsString(item) || cJSON_IsNumber(item)) return item->valuestring;
    const char *kind = item->valuestring;                                   // NaN, or the like
    if (cJSON_IsBool(item)) kind = cJSON_IsTrue(item) ? "true" : "false";
    if (cJSON_IsArray(item)) kind = "an array";
    if (cJSON_IsObject(item)) kind = "an object";
    die("%s: \"%s\" is %s, expected text or a number", where, name, kind);
}

static char *format_prompt(const char *question, const char *input)
{
    size_t n = sizeof prompt_format + strlen(question) + (input ? strlen(input) : 0) + 2;
    char *both = alloc(n, 1), *prompt = alloc(n, 1);
    snprintf(both, n, "%s%s%s", question, input && *input ? "\n" : "", input ? input : "");
    snprintf(prompt, n, prompt_format, both);
    free(both);
    return prompt;
}

// BOS (where the model has one) + prompt + answer (+ EOS) as ids. The prompt's are those that generation begins with, whatever
// follows; the answer continues them, and every token that holds a character of it is learnt. Were both one text to the
// tokenizer, a piece such as ":-" could hide an answer's first character in the prompt.
static row encode_row(const tokenizer *t, const char *prompt, const char *answer, int eos)
{
    size_t np, na;
    int *ids = tokenizer_encode(t, prompt, strlen(prompt), 1, &np);
    int *more = tokenizer_encode(t, answer, strlen(answer), !*prompt, &na);
    if (!ids || !more) die("out of memory while tokenising");
    row r = {.ids = alloc(np + na + 2, sizeof(int))};
    if (tokenizer_bos(t) >= 0) r.ids[r.n++] = tokenizer_bos(t);
    memcpy(r.ids + r.n, ids, np * sizeof(int));
    r.n += (int)np;
    r.prompt = r.n;
    memcpy(r.ids + r.n, more, na * sizeof(int));
    r.n += (int)na;
    if (eos) r.ids[r.n++] = tokenizer_eos(t);
    free(ids);
    free(more);
    return r;
}

// One object in any of the four shapes. What is wrong with it is said with file and line, or with its number in an
// array. A row whose answer or text is empty has nothing to learn: it comes back without ids.
static row read_row(const tokenizer *t, const char *where, const cJSON *json)
{
    static const char *const shapes[][2] = {{"instruction", "output"}, {"query", "response"}, {"question", "answer"}};
    if (!cJSON_IsObject(json)) die("%s: expected a JSON object, e.g. {\"question\": …, \"answer\": …}", where);
    row r = {0};
    for (int i = 0; i < 3; i++) {
        const char *question = text_field(where, json, shapes[i][0]);
        const char *answer = text_field(where, json, shapes[i][1]);
        if (!question && !answer) continue;
        if (!question || !answer) die("%s: has \"%s\" but no text in \"%s\"", where, shapes[i][!question], shapes[i][!!question]);
        if (!*question) die("%s: \"%s\" is empty", where, shapes[i][0]);
        if (!*answer) return r;
        char *prompt = format_prompt(question, i == 0 ? text_field(where, json, "input") : NULL);
        r = encode_row(t, prompt, answer, 1);
        r.answer = strdup(answer);
        free(prompt);
        return r;
    }
    const char *text = text_field(where, json, "text");
    if (!text) die("%s: no \"instruction\"/\"output\", \"query\"/\"response\", \"question\"/\"answer\" or \"text\" here", where);
    if (*text) r = encode_row(t, "", text, !!opt.init);         // a model that starts from nothing must learn where a text ends
    if (r.prompt < 1) r.prompt = 1;                             // nothing predicts the first token
    return r;
}

static int ends_with(const char *s, const char *end)
{
    size_t n = strlen(s), m = strlen(end);
    return n >= m && !strcmp(s + n - m, end);
}

// A row as long as --seq allows; one without a token left to learn is dropped. Both are counted and said.
static void keep_row(dataset *d, row r, int seq)
{
    if (!r.ids) { d->empty++; return; }
    if (r.n > seq) r.n = seq, d->cut++;
    if (r.n > r.prompt) { arrput(d->rows, r); return; }
    d->dropped++;
    free(r.ids), free(r.answer);
}

// A .txt file is one stream of tokens, cut into windows.
static void read_text(dataset *d, const tokenizer *t, const char *text, int seq)
{
    row all = encode_row(t, "", text, 0);
    for (int i = 0; i + 1 < all.n; i += seq) {
        row r = {.n = all.n - i < seq ? all.n - i : seq, .prompt = 1};
        if (r.n < 2) break;
        r.ids = alloc((size_t)r.n, sizeof(int));
        memcpy(r.ids, all.ids + i, (size_t)r.n * sizeof(int));
        arrput(d->rows, r);
    }
    free(all.ids);
}

// The rows of a file, one by one: the elements of an array, or the lines. Its first character says which.
typedef struct {
    json_reader json;
    int array, number;                  // number: of the element, or of the line
    const char *counted, *end;          // lines are counted up to here; the end of the file
    char where[PATH_MAX + 32];          // the row, for messages
} row_reader;

static row_reader read_json_rows(const char *path, const char *text, size_t bytes)
{
    const char *end = text + bytes;
    row_reader r = {.counted = text, .end = end};
    r.json = (json_reader){.path = path, .text = text, .at = text, .end = end};
    json_skip(&r.json);
    r.array = json_next_is(&r.json, '[');
    if (r.array) r.json.at++;
    else r.number = 1;
    return r;
}

// The next element of an array. j->at stands behind its [ at first, later behind the element before.
static cJSON *next_element(row_reader *r)
{
    json_reader *j = &r->json;
    json_skip(j);
    if (json_next_is(j, ']')) {
        j->at++, json_skip(j);
        if (j->at < j->end) json_wrong(j, "more text behind the array");
        return NULL;
    }
    if (r->number && !json_next_is(j, ',')) json_wrong(j, "expected , or ] behind row %d", r->number);
    if (r->number++) j->at++;
    return json_read(j);
}

// The next line that is not blank.
static cJSON *next_line(row_reader *r)
{
    json_reader *j = &r->json;
    j->end = r->end;
    json_skip(j);
    for (; r->counted < j->at; r->counted++) r->number += *r->counted == '\n';
    if (j->at == r->end) return NULL;
    const char *newline = memchr(j->at, '\n', json_left(j));
    if (newline) j->end = newline;
    cJSON *json = json_read(j);
    json_skip(j);
    if (j->at < j->end) json_wrong(j, "more text behind the object; expected one object a line");
    return json;
}

static cJSON *next_row(row_reader *r)
{
    cJSON *json = r->array ? next_element(r) : next_line(r);
    snprintf(r->where, sizeof r->where, r->array ? "%s, row %d" : "%s:%d", r->json.path, r->number);
    if (!json) arrfree(r->json.places);
    return json;
}

// The text of a file of rows, without the mark that some editors put in front of UTF-8. *whole is for free().
static const char *read_utf8(const char *path, char **whole, size_t *bytes)
{
    *whole = read_file(path, bytes);
    expect_utf8(path, *whole, *bytes);
    int mark = *bytes >= 3 && !memcmp(*whole, "\xef\xbb\xbf", 3) ? 3 : 0;
    *bytes -= (size_t)mark;
    return *whole + mark;
}

static dataset read_rows(const tokenizer *t, const char *path, int seq)
{
    dataset d = {.path = path};
    size_t bytes;
    char *whole;
    const char *text = read_utf8(path, &whole, &bytes);
    int json = ends_with(path, ".jsonl") || ends_with(path, ".json");
    row_reader r = read_json_rows(path, text, bytes);
    if (!json && !ends_with(path, ".txt")) die("%s: expected a .jsonl, .json or .txt file", path);
    if (!json) read_text(&d, t, text, seq);
    for (cJSON *object; json && (object = next_row(&r)); cJSON_Delete(object))
        keep_row(&d, read_row(t, r.where, object), seq);
    free(whole);
    if (!arrlen(d.rows)) die("%s: no row has a token to learn within --seq %d%s", path, seq, d.dropped ? "; a larger --seq keeps them" : "");
    return d;
}

static void free_rows(dataset *d)
{
    for (int i = 0; i < arrlen(d->rows); i++) free(d->rows[i].ids), free(d->rows[i].answer);
    arrfree(d->rows);
}

static batch batch_new(int tokens, int rows)
{
    size_t n = (size_t)tokens, ints = sizeof(int);
    return (batch){.ids = alloc(n, ints), .pos = alloc(n, ints), .target_row = alloc(n, ints), .label = alloc(n, ints), .spans = alloc((size_t)rows, sizeof(span))};
}

static void batch_free(batch *b) { free(b->ids), free(b->pos), free(b->target_row), free(b->label), free(b->spans); }
static void batch_clear(batch *b) { b->tokens = b->targets = b->rows = 0; }

// Appends a row: token i predicts token i + 1, so the last one is never fed.
static void batch_add(batch *b, const row *r)
{
    b->spans[b->rows++] = (span){b->tokens, r->n - 1, b->tokens, r->n - 1};
    for (int i = 0; i + 1 < r->n; i++) {
        b->ids[b->tokens] = r->ids[i], b->pos[b->tokens] = i;
        if (i + 1 >= r->prompt) b->target_row[b->targets] = b->tokens, b->label[b->targets++] = r->ids[i + 1];
        b->tokens++;
    }
}

// The order of rows in an epoch depends on seed and epoch alone, so that a resumed run finds its place.
static void shuffle(int *order, int n, uint64_t seed, int epoch)
{
    rng r = rng_named(seed + (uint64_t)epoch, "rows");
    for (int i = 0; i < n; i++) order[i] = i;
    for (int i = n - 1; i > 0; i--) {
        int j = (int)(rng_next(&r) % (uint64_t)(i + 1)), swap = order[i];
        order[i] = order[j], order[j] = swap;
    }
}

// ---- 5  generation -----------------------------------------------------------------------------------------

typedef struct { int *ids, n, cached, room, ended, done; } sequence;     // ids has space for `room`; the first `cached` are in the cache; `ended` by EOS

// The likeliest token, or with --temperature one at random from the likeliest whose probabilities reach --top-p.
typedef struct { double p; int id; } candidate;
static int likelier(const void *a, const void *b)
{
    const candidate *x = a, *y = b;
    return x->p > y->p ? -1 : x->p < y->p ? 1 : x->id - y->id;
}

static int pick(const wide *logits, int vocab, rng *g)
{
    int best = 0;
    for (int i = 1; i < vocab; i++) if (logits[i] > logits[best]) best = i;
    if (!isfinite((double)logits[best])) die("the logits are not finite: the model or its adapter holds NaN or Inf");
    if (opt.temperature == 0) return best;
    candidate *c = alloc((size_t)vocab, sizeof *c);
    double sum = 0, reached = 0;
    for (int i = 0; i < vocab; i++) c[i] = (candidate){exp((double)(logits[i] - logits[best]) / opt.temperature), i}, sum += c[i].p;
    qsort(c, (size_t)vocab, sizeof *c, likelier);
    int n = 0;
    while (n < vocab && reached < opt.top_p * sum) reached += c[n++].p;
    double at = rng_uniform(g) * reached;
    int i = 0;
    while (i + 1 < n && (at -= c[i].p) >= 0) i++;
    int id = c[i].id;
    free(c);
    return id;
}

// Generation stops at EOS, and at every eos_token_id of config.json and generation_config.json.
static int ends_answer(const model *m, const tokenizer *t, int id)
{
    int stop = id == tokenizer_eos(t);
    for (int i = 0; i < m->c.stops; i++) stop |= id == m->c.stop[i];
    return stop;
}

// One pass: every live sequence that fits feeds the tokens its cache lacks, and gets one more. Returns how many did.
// The sequences share the cache evenly.
static int generate_pass(model *m, const tokenizer *t, sequence *s, int count, batch *b, int *who, rng *g)
{
    batch_clear(b);
    b->cached = 1;
    for (int i = 0; i < count; i++) {
        int n = s[i].n - s[i].cached;
        if (s[i].done || b->tokens + n > m->p.tokens) continue;
        who[b->rows] = i;
        b->spans[b->rows++] = (span){b->tokens, n, i * (m->p.cache_rows / count), s[i].n};
        for (int j = s[i].cached; j < s[i].n; j++) b->ids[b->tokens] = s[i].ids[j], b->pos[b->tokens++] = j;
        b->target_row[b->targets] = b->tokens - 1, b->label[b->targets++] = 0;
    }
    if (!b->rows) return 0;
    model_forward(m, b);
    wide *logits = alloc((size_t)m->chunk * (size_t)m->c.vocab, sizeof *logits);
    for (int i = 0; i < b->rows; i++) {
        sequence *q = &s[who[i]];
        if (i % m->chunk == 0) {
            head_forward(m, m->target_row + i, b->rows - i < m->chunk ? b->rows - i : m->chunk);
            get(logits, m->logits);
        }
        int id = pick(logits + (size_t)(i % m->chunk) * (size_t)m->c.vocab, m->c.vocab, g);
        q->cached = q->n;
        q->ids[q->n++] = id;
        q->ended = ends_answer(m, t, id);
        q->done = q->ended || q->n == q->room;
    }
    free(logits);
    return b->rows;
}

static char *decode(const tokenizer *t, const int *ids, int n)
{
    size_t bytes;
    char *text = tokenizer_decode(t, ids, (size_t)n, &bytes);
    if (!text) die("out of memory while decoding");
    return text;
}

// What counts as the answer: the line behind the first "####" (GSM8K) or else "The answer is:" (MetaMathQA), so that what a
// model goes on to say does not count; all of a text without either. In a fresh string, with a mark's number in *mark.
static char *final_answer(const char *text, int *mark)
{
    static const char *const marks[] = {"####", "The answer is:"};
    size_t n = strlen(text);
    *mark = 0;
    for (int i = 0; i < 2 && !*mark; i++) {
        const char *at = strstr(text, marks[i]);
        if (at) text = at + strlen(marks[i]), n = strcspn(text, "\n"), *mark = i + 1;
    }
    while (n && strchr(" \t\r\n$", *text)) text++, n--;
    while (n && strchr(" \t\r\n$.", text[n - 1])) n--;
    char *answer = strndup(text, n);
    if (!answer) die("out of memory");
    return answer;
}

// How long a number stands at the text's beginning, 0 if none does: digits with a point at most, and with commas only where they
// part thousands. 1,234.5 is one; 1,2 and 18.5.3 are none.
static size_t number_length(const char *text)
{
    const char *at = text + strspn(text, "0123456789");
    if (at > text && at <= text + 3 && *text != '0')
        while (*at == ',' && strspn(at + 1, "0123456789") == 3) at += 4;
    if (*at == '.') at += 1 + strspn(at + 1, "0123456789");
    size_t n = (size_t)(at - text);
    return n == 1 && *text == '.' ? 0 : n;
}

// The number that the text begins with, written so that equal numbers are equal strings: no commas, no zeros that say nothing. NULL if
// there is none, or if it goes on as something else: 3/4, 2x, 10:30, 2023-05-01. *rest is what stands behind it.
// Strings, because 12345678901234567890 and …891 are the same double.
static char *leading_number(const char *text, const char **rest)
{
    const char *digits = text + (*text == '-' || *text == '+');
    size_t run = strspn(digits, "0123456789.,"), n = number_length(digits);
    *rest = digits + run;
    while (run && strchr(".,", digits[run - 1])) run--;         // the sentence's, not the number's
    if (n && digits[n - 1] == '.') n--;
    int goes_on = **rest && (isalpha((unsigned char)**rest) || strchr("/\\^", **rest) || (strchr("+-*=:_", **rest) && isdigit((unsigned char)(*rest)[1])));
    if (!n || n != run || goes_on) return NULL;

    char *number = alloc(n + 3, 1), *end = number;
    const char *last = digits + n;
    while (digits < last && strchr("0,", *digits)) digits++;
    if (digits == last || *digits == '.') *end++ = '0';
    for (; digits < last; digits++) if (*digits != ',') *end++ = *digits;
    if (strchr(number, '.')) {
        while (end[-1] == '0') *--end = 0;
        if (end[-1] == '.') *--end = 0;
    }
    if (*text == '-' && strcmp(number, "0")) memmove(number + 1, number, (size_t)(end - number) + 1), *number = '-';
    return number;
}

// Is the model's answer the right one? A number is compared as a number: 42 is 42.0, and behind a mark it may have a unit, "42 apples".
// Marks and numbers are those of GSM8K (github.com/openai/grade-school-math, dataset.py: "#### " and -?[0-9.,]+, commas left out) and
// of MetaMathQA (github.com/meta-math/MetaMath, eval_gsm8k.py: "The answer is: " and [-+]?\d*[.,/]?\d+), but what either would read
// as another number is none here. An empty answer is never right.
static int same_answer(const char *given, const char *right)
{
    int mark, right_mark;
    const char *rest, *right_rest;
    char *a = final_answer(given, &mark), *b = final_answer(right, &right_mark);
    char *x = leading_number(a, &rest), *y = leading_number(b, &right_rest);
    int numbers = x && y && !*right_rest && (mark || !*rest);
    int same = *a && !mark == !right_mark && (numbers ? !strcmp(x, y) : !strcmp(a, b));
    free(a), free(b), free(x), free(y);
    return same;
}

enum { MOST_SEQUENCES = 64, SCORED = 200 };     // answered at once; rows scored while training

static int longest_prompt(const dataset *d)
{
    int n = 0;
    for (int i = 0; i < arrlen(d->rows); i++) if (d->rows[i].prompt > n) n = d->rows[i].prompt;
    return n;
}

static int has_answers(const dataset *d)
{
    for (int i = 0; i < arrlen(d->rows); i++) if (!d->rows[i].answer) return 0;
    return arrlen(d->rows) > 0;
}

typedef struct { int hits, cut; } scores;       // answers that match; answers that --max-new cut off

// A row's prompt in a slot of its own: the next pass feeds it.
static void begin_answer(sequence *s, const row *r)
{
    int room = r->prompt + opt.max_new;
    *s = (sequence){.ids = alloc((size_t)room, sizeof(int)), .n = r->prompt, .room = room};
    memcpy(s->ids, r->ids, (size_t)r->prompt * sizeof(int));
}

// Counts a complete answer; returns its text and leaves the slot empty.
static char *score_answer(scores *got, const tokenizer *t, sequence *s, const row *r)
{
    char *text = decode(t, s->ids + r->prompt, s->n - r->prompt);
    got->hits += same_answer(text, r->answer);
    got->cut += !s->ended;
    free(s->ids);
    s->ids = NULL;
    return text;
}

// The first `rows` prompts of d, answered a few at a time: as many as the plan has slots. *sample gets the first one's text.
static scores exact_match(model *m, const tokenizer *t, const dataset *d, int rows, char **sample, void (*progress)(int, int))
{
    int slots = rows < m->p.sequences ? rows : m->p.sequences, next = 0, done = 0;
    sequence *s = alloc((size_t)slots, sizeof *s);
    int *who = alloc((size_t)slots, sizeof *who), *answers = alloc((size_t)slots, sizeof *answers);
    batch b = batch_new(m->p.tokens, slots);
    scores got = {0};
    rng g = {0};
    for (; next < slots; next++) begin_answer(&s[next], &d->rows[answers[next] = next]);
    while (generate_pass(m, t, s, slots, &b, who, &g))
        for (int i = 0; i < slots; i++) {                       // an answer that is complete makes room for the next row's
            if (!s[i].done || !s[i].ids) continue;
            char *text = score_answer(&got, t, &s[i], &d->rows[answers[i]]);
            if (answers[i] == 0 && sample) *sample = text;
            else free(text);
            if (next < rows) begin_answer(&s[i], &d->rows[answers[i] = next++]);
            progress(++done, rows);
        }
    batch_free(&b);
    free(s);
    free(who);
    free(answers);
    return got;
}

// ---- 6  saving and resuming --------------------------------------------------------------------------------

// One file of another directory, in pieces.
static void stage_copy(const char *dir, const char *name)
{
    static char piece[1 << 20];
    char *from = join(dir, name), *to;
    FILE *in = fopen(from, "rb");
    if (in) {
        FILE *out = stage_open(name, &to);
        for (size_t n; (n = fread(piece, 1, sizeof piece, in));) write_checked(out, piece, n, to);
        if (ferror(in)) die("%s: %s", from, strerror(errno));
        close_checked(out, to);
        fclose(in);
        free(to);
    } else fprintf(stderr, "note: %s is not copied: %s\n", from, strerror(errno));
    free(from);
}

// Whether a file of a model directory stays what it is whatever the weights are: the tokenizer's, the chat template, the licence, … Not so
// the weights in any format, what is written anew, and what a training run or an adapter left there.
static int outlasts_weights(const char *name)
{
    static const char *const patterns[] = {"config.json", "*.safetensors", "*.safetensors.index.json", "*.bin.index.json", "pytorch_model*.bin", "model*.bin",
        "ggml*.bin", "adapter_model*.bin", "adapter_config.json", "state.json", "*.gguf", "*.ggml", "*.pth", "*.pt", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot",
        "*.npz", "*.tflite", NULL};
    for (const char *const *p = patterns; *p; p++) if (!fnmatch(*p, name, 0)) return 0;
    return 1;
}

// A complete model directory: every base tensor (with adapters merged), config.json, and what else the source directory holds.
static void stage_model(model *m, const char *source, enum dtype trained_type)
{
    output *list = NULL;
    for (int i = 0; i < arrlen(m->tensors); i++) {
        tensor *t = &m->tensors[i];
        if (strncmp(t->name, "model.", 6) && strcmp(t->name, "lm_head.weight")) continue;
        ptrdiff_t at = shgeti(m->file.tensors, t->name);
        output o = {.shape = t->shape, .at = *t->at, .type = t->kind == PARAM || at < 0 ? trained_type : m->file.tensors[at].value.at.type};
        memcpy(o.name, t->name, sizeof o.name);
        for (int j = 0; j < 7 * m->c.layers; j++) {
            linear *l = adapter_at(m, j);
            if (l && t->at == &l->W) o.merge = l;
        }
        arrput(list, o);
    }
    safetensors_write(m, "model.safetensors", list, (int)arrlen(list));
    cJSON *json = parse_json("config.json", m->c.text, strlen(m->c.text));
    const char *names[DTYPES] = {"float32", "float64", "bfloat16", "float16"};
    enum dtype type = arrlen(list) ? list[0].type : trained_type;
    cJSON_DeleteItemFromObjectCaseSensitive(json, "torch_dtype");
    cJSON_DeleteItemFromObjectCaseSensitive(json, "dtype");
    cJSON_AddStringToObject(json, "torch_dtype", names[type]);
    stage_json("config.json", json);
    char **files = files_of(source);
    for (int i = 0; i < arrlen(files); i++) if (outlasts_weights(files[i])) stage_copy(source, files[i]);
    free_names(files);
    arrfree(list);
}

typedef struct {
    model m;
    tokenizer *t;
    dataset train, val;
    int steps, step, scored;            // all of them; those done; validation rows that are answered
    int *order, epoch;                  // of the rows, in this epoch
    FILE *log;
    int first;                          // the step this run began with
    double started;
} run;

// The rows that a run trains on, as a text: how many, and FNV-1a over their tokens.
static const char *rows_text(const dataset *d, char text[64])
{
    uint64_t hash = 0xcbf29ce484222325u;
    for (int i = 0; i < arrlen(d->rows); i++) {
        const row *r = &d->rows[i];
        for (int j = -2; j < r->n; j++) hash = (hash ^ (uint64_t)(j == -2 ? r->n : j == -1 ? r->prompt : r->ids[j])) * 0x100000001b3u;
    }
    snprintf(text, 64, "%td, hash %016llx", arrlen(d->rows), (unsigned long long)hash);
    return text;
}

// What must be the same for a run to go on as if it had never stopped. The number of steps counts, though a constant rate does
// not depend on it: no schedule is an exception, and a run that goes on for longer has a name, --adapter.
static cJSON *run_settings(const run *r)
{
    const model *m = &r->m;
    char rows[64];
    cJSON *json = cJSON_CreateObject();
    cJSON_AddNumberToObject(json, "step", r->step);
    cJSON_AddStringToObject(json, "--method", m->p.method->name);
    cJSON_AddStringToObject(json, "--model", opt.model);
    cJSON_AddStringToObject(json, "--data", opt.data);
    cJSON_AddStringToObject(json, "rows", rows_text(&r->train, rows));
    cJSON_AddNumberToObject(json, "--steps", r->steps);
    cJSON_AddNumberToObject(json, "--rank", m->p.rank);
    cJSON_AddNumberToObject(json, "--alpha", m->p.alpha);
    cJSON_AddNumberToObject(json, "--mini-r", m->p.mini_r);
    cJSON_AddNumberToObject(json, "--dora-detach", m->p.dora_detach);
    cJSON_AddNumberToObject(json, "--targets", m->p.targets);
    cJSON_AddNumberToObject(json, "--batch", opt.batch);
    cJSON_AddNumberToObject(json, "--accum", opt.accum);
    cJSON_AddNumberToObject(json, "--seq", opt.seq);
    cJSON_AddNumberToObject(json, "--seed", opt.seed);
    cJSON_AddNumberToObject(json, "--no-shuffle", opt.no_shuffle);
    cJSON_AddNumberToObject(json, "--lr", opt.lr);
    cJSON_AddStringToObject(json, "--schedule", opt.schedule);
    cJSON_AddNumberToObject(json, "--warmup", opt.warmup);
    cJSON_AddNumberToObject(json, "--weight-decay", opt.weight_decay);
    cJSON_AddNumberToObject(json, "--clip", opt.clip);
    cJSON_AddNumberToObject(json, "--lora-plus-ratio", m->p.plus_ratio);
    return json;
}

// state.safetensors: the trained tensors as they are, their start, and AdamW's moments.
static output *state_tensors(model *m)
{
    output *list = NULL;
    for (int i = 0; i < arrlen(m->tensors); i++) {
        tensor *t = &m->tensors[i];
        if (t->kind != PARAM && t->kind != START) continue;
        mat parts[3] = {*t->at, t->m1, t->m2};
        for (int j = 0; j < (t->kind == PARAM ? 3 : 1); j++) {
            output o = {.shape = t->shape, .at = parts[j], .type = TYPE_OF(wide)};
            snprintf(o.name, sizeof o.name, "%.100s%s", t->name, (const char *[]){"", ".m1", ".m2"}[j]);
            arrput(list, o);
        }
    }
    return list;
}

static char *destination;                // --out, as check_out() found it

// state.json: the settings, and which files the run wrote, so that a later one replaces these and nobody else's.
static void stage_state(cJSON *settings)
{
    char **names = files_of(staged);
    cJSON *files = cJSON_AddArrayToObject(settings, "files");
    for (int i = 0; i < arrlen(names); i++) cJSON_AddItemToArray(files, cJSON_CreateString(names[i]));
    free_names(names);
    stage_json("state.json", settings);
}

static void save_run(run *r)
{
    model *m = &r->m;
    for (int i = 0; i < arrlen(m->tensors); i++)
        if (m->tensors[i].kind == PARAM && !isfinite(sum_of_squares(*m->tensors[i].at)))
            die("step %d: %s is not finite and is not saved; a smaller --lr may help", r->step, m->tensors[i].name);
    stage_begin(destination);
    if (full_training(m)) stage_model(m, opt.model, F32);
    else peft_write(m, opt.model);
    output *state = state_tensors(m);
    safetensors_write(m, "state.safetensors", state, (int)arrlen(state));
    stage_state(run_settings(r));
    arrfree(state);
    stage_publish(destination);
}

// The step an earlier run had done; its settings must be those of this run.
static int read_state_json(const run *r, const char *dir)
{
    size_t bytes;
    char *path = join(dir, "state.json"), *text = read_file(path, &bytes);
    cJSON *then = parse_json(path, text, bytes), *now = run_settings(r), *item;
    cJSON_ArrayForEach(item, now) {
        cJSON *old = cJSON_GetObjectItemCaseSensitive(then, item->string);
        if (strcmp(item->string, "step") && !cJSON_Compare(old, item, 1)) {
            char *a = cJSON_PrintUnformatted(old), *b = cJSON_PrintUnformatted(item);
            die("--resume %s: was trained with %s %s, this run has %s; give the same, or start anew from it with %s %s",
                dir, item->string, a ? a : "unset", b, full_training(&r->m) ? "--model" : "--adapter", dir);
        }
    }
    int step = config_int(then, path, "step", -1);
    cJSON_Delete(then), cJSON_Delete(now);
    free(text), free(path);
    return step;
}

static int resume_run(run *r, const char *dir)
{
    model *m = &r->m;
    int step = read_state_json(r, dir);
    checkpoint c = checkpoint_open(dir, "state");
    output *state = state_tensors(m);
    for (int i = 0; i < arrlen(state); i++) {
        ptrdiff_t at = shgeti(c.tensors, state[i].name);
        if (at < 0 || memcmp(&c.tensors[at].value.shape, &state[i].shape, sizeof(shape)))
            die("--resume %s: tensor %s is missing or of another shape; start anew from it with --adapter %s", dir, state[i].name, dir);
        put_stored(state[i].at, c.tensors[at].value);
    }
    arrfree(state);
    checkpoint_close(&c);
    return step;
}

// ---- 7  training -------------------------------------------------------------------------------------------

// The first Ctrl-C or SIGTERM lets the loop finish its step and save; the next one, or one outside the loop, ends the program.
static volatile sig_atomic_t in_loop, interrupted;
static void on_signal(int signal)
{
    if (in_loop && !interrupted) { interrupted = signal; return; }
    stage_discard();
    _exit(128 + signal);
}

// Reading a mapped file beyond the end that it has by now raises SIGBUS. Ends the program as die() does, with nothing
// but what a signal handler may call. The threads of a product meet the end together; the first one speaks.
static void on_cut_file(int signal_number, siginfo_t *info, void *context)
{
    static char told;
    const mapping *f = mapped;
    (void)context;
    while (f && ((char *)info->si_addr < f->p || (char *)info->si_addr >= f->p + f->bytes)) f = f->next;
    if (!f) { signal(signal_number, SIG_DFL); return; }         // another fault: it comes again and ends the program
    while (__atomic_test_and_set(&told, __ATOMIC_SEQ_CST)) pause();
    stage_discard();
    ssize_t written = write(STDERR_FILENO, f->line, strlen(f->line));
    _exit(written < 0 ? 2 : 1);
}

static void catch_cut_files(void)
{
    sigaction(SIGBUS, &(struct sigaction){.sa_sigaction = on_cut_file, .sa_flags = SA_SIGINFO}, NULL);
}

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// On a terminal, a line that overwrites itself; in a pipe, nothing.
__attribute__((format(printf, 1, 2)))
static void show(const char *format, ...)
{
    if (!isatty(STDOUT_FILENO)) return;
    va_list args;
    va_start(args, format);
    fputs("\r\033[K", stdout);
    vprintf(format, args);
    fflush(stdout);
    va_end(args);
}

static void show_progress(const char *what, int done, int of)
{
    if (done < of) show("%s: %d of %d", what, done, of);
    else show("%s", "");
}

static void show_start(int done, int of) { show_progress("the adapter's start, layer", done, of); }
static void show_answers(int done, int of) { show_progress("answering row", done, of); }

// Learning rate of step s = 0, 1, …: transformers' schedules.
static double learning_rate(int s, int steps)
{
    if (s < opt.warmup) return opt.lr * s / opt.warmup;
    double left = (double)(steps - s) / (steps > opt.warmup ? steps - opt.warmup : 1);
    if (!strcmp(opt.schedule, "linear")) return opt.lr * left;
    if (!strcmp(opt.schedule, "cosine")) return opt.lr * 0.5 * (1 + cos(3.14159265358979323846 * (1 - left)));
    return opt.lr;
}

// Mean loss over the target tokens of a data set.
static double evaluate(model *m, const dataset *d, long *targets)
{
    int n = (int)arrlen(d->rows), rows = n < 1024 ? n : 1024;
    batch b = batch_new(m->p.tokens, rows);
    double sum = 0;
    *targets = 0;
    for (int i = 0; i < n;) {
        batch_clear(&b);
        while (i < n && b.rows < rows && b.tokens + d->rows[i].n - 1 <= m->p.tokens) batch_add(&b, &d->rows[i++]);
        sum += model_step(m, &b, 0);
        *targets += b.targets;
        show_progress("evaluating row", i, n);
    }
    batch_free(&b);
    return sum / (double)*targets;
}

// Stops at the first NaN or Inf, with the step and the tensor. Nothing of it is saved.
static void check_finite(const model *m, int step, double loss, double norm)
{
    if (isfinite(loss) && isfinite(norm)) return;
    for (int i = 0; i < arrlen(m->tensors); i++)
        if (m->tensors[i].kind == PARAM && !isfinite(sum_of_squares(*m->tensors[i].grad)))
            die("step %d: the loss is %g and the gradient of %s is not finite; a smaller --lr may help", step, loss, m->tensors[i].name);
    die("step %d: the loss is %g; a smaller --lr may help", step, loss);
}

static double gradient_norm(const model *m) { return sqrt(sum_of_squares(flat(m, m->grad))); }

// AdamW on all that trains, one call for neighbours with the same learning rate (all of them, but for lora+); clipping by
// PyTorch's formula.
static void update(const model *m, int t, double lr, double norm)
{
    double scale = opt.clip > 0 && opt.clip / (norm + 1e-6) < 1 ? opt.clip / (norm + 1e-6) : 1, rate = 0;
    mat w = flat(m, m->block[PARAM]), dw = flat(m, m->grad), m1 = flat(m, m->moment1), m2 = flat(m, m->moment2);
    int first = 0, end = 0;             // rows of 16 elements
    for (int i = 0; i <= arrlen(m->tensors); i++) {
        const tensor *p = i < arrlen(m->tensors) ? &m->tensors[i] : NULL;
        if (p && p->kind != PARAM) continue;
        if ((!p || p->rate != rate) && end > first) {
            int n = end - first;
            adamw(rows_of(w, first, n), rows_of(dw, first, n), rows_of(m1, first, n), rows_of(m2, first, n), lr * rate, opt.weight_decay, scale, t);
            first = end;
        }
        if (p) rate = p->rate, end += (int)((elements(*p->at) + 15) / 16);
    }
}

__attribute__((format(printf, 2, 3)))
static void log_line(run *r, const char *format, ...)
{
    if (!r->log) return;
    va_list args;
    va_start(args, format);
    if (vfprintf(r->log, format, args) < 0 || fflush(r->log)) die("cannot write %s: %s", opt.log, strerror(errno));
    va_end(args);
}

// The rows of the step to come are first … last-1 of r->order.
static void step_rows(run *r, int *first, int *last)
{
    int n = (int)arrlen(r->train.rows), rows = opt.batch * opt.accum, per_epoch = ceil_div(n, rows), epoch = r->step / per_epoch;
    *first = r->step % per_epoch * rows, *last = *first + rows < n ? *first + rows : n;
    if (epoch != r->epoch && !opt.no_shuffle) shuffle(r->order, n, (uint64_t)opt.seed, epoch);
    r->epoch = epoch;
}

// The micro-batch that begins with the given row of r->order; the step's rows end before `last`.
static void fill_batch(const run *r, batch *b, int first, int last)
{
    batch_clear(b);
    for (int i = first; i < last && i < first + opt.batch; i++) batch_add(b, &r->train.rows[r->order[i]]);
}

// One optimiser step: --accum micro-batches of --batch rows. Returns the mean loss; *norm is the gradient's before clipping.
static double train_step(run *r, batch *b, double *norm, int *tokens)
{
    int first, last, targets = 0;       // of the whole step: the loss is the mean over them
    step_rows(r, &first, &last);
    for (int i = first; i < last; i++) targets += r->train.rows[r->order[i]].n - r->train.rows[r->order[i]].prompt;

    double sum = 0;
    *tokens = 0;
    zero(flat(&r->m, r->m.grad));
    for (int i = first; i < last; i += opt.batch) {
        fill_batch(r, b, i, last);
        sum += model_step(&r->m, b, 1.0 / targets);
        *tokens += b->tokens;
    }
    *norm = gradient_norm(&r->m);
    check_finite(&r->m, r->step + 1, sum / targets, *norm);
    return sum / targets;
}

static void report_step(run *r, double loss, double norm, double lr, int tokens, double time)
{
    int every = ceil_div(r->steps, 20);
    double left = (seconds() - r->started) / (r->step - r->first) * (r->steps - r->step);
    log_line(r, "{\"step\":%d,\"loss\":%.9g,\"grad_norm\":%.9g,\"lr\":%.9g,\"tokens\":%d,\"tok_per_s\":%.0f}\n", r->step, loss, norm, lr, tokens, tokens / time);
    show("step %d/%d  loss %.4f  %.0f tok/s  %d:%02d to go", r->step, r->steps, loss, tokens / time, (int)left / 60, (int)left % 60);
    if (r->step != 1 && r->step % every && r->step < r->steps) return;
    show_progress("", 1, 1);
    printf("step %4d/%d   loss %.4f   grad norm %7.4f   lr %.2e   %6.0f tok/s\n", r->step, r->steps, loss, norm, lr, tokens / time);
    fflush(stdout);
}

static void print_cut(scores got)
{
    if (got.cut) printf(", %d cut off at --max-new %d", got.cut, opt.max_new);
    putchar('\n');
}

// A text from a row or a model on one line.
static void show_line(const char *label, char *text)
{
    for (char *c = text; *c; c++) if (*c == '\n') *c = ' ';
    char *safe = printable(text, "\t");
    printf("%s%s", label, safe ? safe : "");
    free(safe);
}

// Validation loss and, for small models, answers.
static void report_eval(run *r, const char *when, int answers)
{
    if (!r->val.rows) return;
    long targets;
    double loss = evaluate(&r->m, &r->val, &targets);
    if (!isfinite(loss)) die("step %d: the validation loss is %g; a smaller --lr may help", r->step, loss);
    log_line(r, "{\"step\":%d,\"eval_loss\":%.9g}\n", r->step, loss);
    printf("%-10s eval loss %.4f over %ld tokens", when, loss, targets);
    if (r->scored && answers) {
        char *sample = NULL;
        scores got = exact_match(&r->m, r->t, &r->val, r->scored, &sample, show_answers);
        printf(",  exact match %d of %d", got.hits, r->scored);
        print_cut(got);
        char *question = decode(r->t, r->val.rows[0].ids, r->val.rows[0].prompt), *at = strstr(question, "### Instruction:\n"), *end = at ? strstr(at, "\n\n### Response:") : NULL;
        if (end) *end = 0;
        show_line("           asked:    ", end ? at + 17 : ""), putchar('\n');
        show_line("           answered: ", sample);
        free(sample), free(question);
    }
    putchar('\n');
    fflush(stdout);
}

static void training_loop(run *r)
{
    batch b = batch_new(r->m.p.tokens, opt.batch);
    r->started = seconds(), r->first = r->step;
    in_loop = 1;
    while (r->step < r->steps) {
        double norm, start = seconds(), lr = learning_rate(r->step, r->steps);
        int tokens;
        double loss = train_step(r, &b, &norm, &tokens);
        update(&r->m, r->step + 1, lr, norm);
        r->step++;
        report_step(r, loss, norm, lr, tokens, seconds() - start);
        if (interrupted || r->step == r->steps) break;
        if (opt.eval_every && r->step % opt.eval_every == 0) report_eval(r, "", 0);
        if (opt.save_every && r->step % opt.save_every == 0) save_run(r);
    }
    batch_free(&b);
}

// A resumed run goes on writing the same log: what was logged after the step that was saved is written anew, and so is
// the evaluation that closed the earlier run.
static FILE *open_log(const char *path, int step)
{
    size_t bytes = 0;
    char *old = step && !access(path, F_OK) ? read_file(path, &bytes) : NULL, *keep = old;
    for (char *line = old; line && line < old + bytes; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : old + bytes) {
        int at, value = 0, due = opt.eval_every && step % opt.eval_every == 0;
        if (sscanf(line, "{\"step\":%d,\"eval_loss%n", &at, &value) != 1 || at > step || (value && at == step && !due)) continue;
        if (memchr(line, '\n', (size_t)(old + bytes - line))) keep = strchr(line, '\n') + 1;
    }
    FILE *f = fopen(path, "w");
    if (!f) die("--log %s: %s", path, strerror(errno));
    if (old) write_checked(f, old, (size_t)(keep - old), path);
    free(old);
    return f;
}

// ---- 8  the commands ---------------------------------------------------------------------------------------

// A JSON file of the model directory, NULL where there is none; *path is its name.
static cJSON *directory_json(const char *dir, const char *name, char **path)
{
    size_t bytes;
    *path = join(dir, name);
    if (access(*path, F_OK)) return NULL;
    char *text = read_file(*path, &bytes);
    cJSON *json = parse_json(*path, text, bytes);
    free(text);
    return json;
}

static int field_true(const cJSON *json, const char *name) { return cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(json, name)); }
static int field_false(const cJSON *json, const char *name) { return cJSON_IsFalse(cJSON_GetObjectItemCaseSensitive(json, name)); }

// A token's text: "…" or {"content": "…"}.
static const char *token_text(const cJSON *token)
{
    return cJSON_IsString(token) ? token->valuestring : string_field(token, "content");
}

static void add_token(tokenizer *t, const char *path, const cJSON *token, double id)
{
    const char *text = token_text(token);
    if (!text || !(id >= 0 && id <= 1 << 24) || id != floor(id)) die("%s: an added token without a text or an id", path);
    added_token a = {text, (int)id, field_true(token, "special"), field_true(token, "lstrip"), field_true(token, "rstrip"), field_true(token, "single_word")};
    if (!tokenizer_add(t, a)) die("%s: out of memory", path);
}

// The part of a tokenizer.json's normalizer or pre_tokenizer that is of this type, wherever it stands; NULL if there is none.
static const cJSON *part_of_type(const cJSON *json, const char *type)
{
    const cJSON *item, *found = NULL;
    const char *own = cJSON_IsObject(json) ? string_field(json, "type") : NULL;
    if (own && !strcmp(own, type)) return json;
    if (cJSON_IsObject(json) || cJSON_IsArray(json))
        cJSON_ArrayForEach(item, json) if (!found) found = part_of_type(item, type);
    return found;
}

// Where ▁ goes behind a special token, as transformers 5 does it. Its LlamaTokenizer goes by "legacy"; any other class by
// what tokenizer.json says; a tokenizer.model alone is taken for the oldest kind, which puts ▁ there always.
static enum behind_special space_behind(const cJSON *settings, const cJSON *json)
{
    const char *class = string_field(settings, "tokenizer_class"), *scheme;
    if (class && !strncmp(class, "LlamaTokenizer", 14)) return field_true(settings, "legacy") ? UNLESS_SPACE : NEVER;
    const cJSON *normalizer = cJSON_GetObjectItemCaseSensitive(json, "normalizer"), *replace = part_of_type(normalizer, "Replace");
    const cJSON *metaspace = part_of_type(cJSON_GetObjectItemCaseSensitive(json, "pre_tokenizer"), "Metaspace");
    if (!json || part_of_type(normalizer, "Prepend") || replace) return ALWAYS;
    scheme = string_field(metaspace, "prepend_scheme");
    return metaspace && (!scheme || !strcmp(scheme, "always")) ? UNLESS_SPACE : NEVER;
}

// The id of the directory's "bos_token" or "eos_token"; `own`, tokenizer.model's, where it names none.
static int end_token(const tokenizer *t, const char *path, const cJSON *settings, const cJSON *map, const char *name, int own)
{
    const char *text = token_text(cJSON_GetObjectItemCaseSensitive(settings, name));
    if (!text) text = token_text(cJSON_GetObjectItemCaseSensitive(map, name));
    if (!text) return own;
    int id = tokenizer_find(t, text);
    if (id < 0) die("%s: \"%s\" is %s, which is no token of this directory", path, name, text);
    return id;
}

// What Hugging Face's files beside tokenizer.model say of special tokens, in the order in which they overrule each other. Where
// there are none at all, tokenizer.model is SentencePiece's, and "</s>" in a text is the text.
static void read_special_tokens(tokenizer *t, const char *dir)
{
    char *added_path, *json_path, *map_path, *path;
    cJSON *added = directory_json(dir, "added_tokens.json", &added_path), *json = directory_json(dir, "tokenizer.json", &json_path);
    cJSON *map = directory_json(dir, "special_tokens_map.json", &map_path), *settings = directory_json(dir, "tokenizer_config.json", &path), *item;
    char *config_path = join(dir, "config.json");
    int alone = access(config_path, F_OK) && !added && !json && !map && !settings;
    if (!alone && !tokenizer_add_own(t)) die("out of memory");
    free(config_path);
    cJSON_ArrayForEach(item, added) {
        cJSON token = {.type = cJSON_String, .valuestring = item->string};
        add_token(t, added_path, &token, cJSON_IsNumber(item) ? item->valuedouble : -1);
    }
    cJSON_ArrayForEach(item, cJSON_GetObjectItemCaseSensitive(json, "added_tokens")) {
        const cJSON *id = cJSON_GetObjectItemCaseSensitive(item, "id");
        add_token(t, json_path, item, cJSON_IsNumber(id) ? id->valuedouble : -1);
    }
    cJSON_ArrayForEach(item, cJSON_GetObjectItemCaseSensitive(settings, "added_tokens_decoder")) {
        char *end;
        double id = strtod(item->string, &end);
        add_token(t, path, item, *end ? -1 : id);
    }
    int bos = end_token(t, path, settings, map, "bos_token", tokenizer_bos(t)), eos = end_token(t, path, settings, map, "eos_token", tokenizer_eos(t));
    if (field_false(settings, "add_bos_token")) bos = -1;
    else if (bos < 0) die("%s/tokenizer.model: has no BOS piece; \"add_bos_token\": false in tokenizer_config.json does without", dir);
    if (eos < 0) die("%s/tokenizer.model: has no EOS piece", dir);
    tokenizer_ends(t, bos, eos);
    tokenizer_spaces(t, !field_false(settings, "add_prefix_space"), space_behind(settings, json));
    cJSON_Delete(added);
    cJSON_Delete(json);
    cJSON_Delete(map);
    cJSON_Delete(settings);
    free(added_path);
    free(json_path);
    free(map_path);
    free(path);
}

static tokenizer *open_tokenizer(const char *dir, int vocab)
{
    char *path = join(dir, "tokenizer.model"), err[512];
    tokenizer *t = tokenizer_load(path, err, sizeof err);
    if (!t) die("%s", err);
    if (vocab && tokenizer_vocab(t) > vocab) die("%s: has %d pieces, but config.json says vocab_size %d", path, tokenizer_vocab(t), vocab);
    read_special_tokens(t, dir);
    free(path);
    return t;
}

static config open_config(void)
{
    if (opt.init) return config_read(opt.init);
    struct stat st;
    char *path = join(opt.model, "config.json"), *generation;
    if (!stat(opt.model, &st) && !S_ISDIR(st.st_mode)) refuse_weights("--model", opt.model);
    if (!exists(path)) refuse_format(opt.model);
    config c = config_read(path);
    cJSON *json = directory_json(opt.model, "generation_config.json", &generation);
    config_stops(&c, json);
    cJSON_Delete(json);
    free(path);
    free(generation);
    return c;
}

// A tokenizer may know tokens that its model has no row for ([PAD], added but never resized for). Such a row cannot be fed.
static void check_ids(const dataset *d, int vocab)
{
    for (int i = 0; i < arrlen(d->rows); i++)
        for (int j = 0; j < d->rows[i].n; j++)
            if (d->rows[i].ids[j] >= vocab)
                die("%s: a row holds token %d of the tokenizer's files, but config.json says vocab_size %d", d->path, d->rows[i].ids[j], vocab);
}

// --init: Hugging Face's start, normal with σ = initializer_range (0.02) for matrices, ones for norms.
static void random_weights(model *m)
{
    for (int i = 0; i < arrlen(m->tensors); i++) {
        tensor *t = &m->tensors[i];
        if (t->kind != PARAM) continue;
        rng g = rng_named(m->p.seed, t->name);
        size_t n = elements(*t->at);
        wide *x = alloc(n, sizeof *x);
        for (size_t j = 0; j < n; j++) x[j] = t->shape.n[1] ? (wide)(m->c.init_range * rng_normal(&g)) : 1;
        put(*t->at, x, TYPE_OF(wide));
        free(x);
    }
}

// Memory, the base's weights, and the adapter's: from --adapter, or its start, which may look at the first step's
// micro-batches. With --resume it waits for resume_run().
static void fill_model(model *m, const batch *first, int batches)
{
    model_allocate(m);
    if (opt.init) random_weights(m);
    else m->file = checkpoint_open(opt.model, "model"), model_load(m, opt.model);
    if (opt.resume) return;
    if (!opt.adapter || m->p.method->has_start) adapters_init(m, first, batches, show_start);
    if (opt.adapter) peft_read_weights(m, opt.adapter);
}

static plan plan_for_use(void)          // evaluation, generation, merging: the base, with --adapter if there is one
{
    if (opt.init) die("--init starts from random weights, which can only be trained; name a --model");
    if (opt.resume) die("--resume goes on with training; to use what was trained, give --adapter %s", opt.resume);
    plan p = plan_from_options();
    p.method = &methods[0], p.train = 0;
    if (opt.adapter) peft_read_config(&p, opt.adapter);
    return p;
}

static int longest_row(const dataset *d)
{
    int n = 0;
    for (int i = 0; i < arrlen(d->rows); i++) if (d->rows[i].n > n) n = d->rows[i].n;
    return n;
}

// Room for micro-batches of the longest rows there are, and for answering `scored` rows with --max-new tokens each, as many
// at once as a gigabyte of keys and values holds.
static void plan_sizes(plan *p, config c, const dataset *train, const dataset *val, int scored)
{
    int longest = longest_row(val) > longest_row(train) ? longest_row(val) : longest_row(train);
    if ((long)opt.batch * longest > INT_MAX / 4) die("--batch %d times %d tokens is too much; raise --accum instead", opt.batch, longest);
    p->tokens = opt.batch * (longest - 1), p->positions = longest;
    if (!scored) return;
    int answered = longest_prompt(val) + opt.max_new;
    if (answered > longest) p->positions = answered;
    double bytes = 2.0 * c.layers * c.kv_heads * c.head_dim * sizeof(real) * answered;
    p->sequences = (int)fmax(1, fmin(fmin(scored, MOST_SEQUENCES), floor(1e9 / bytes)));
    p->cache_rows = p->sequences * answered;
}

static double megabytes(const model *m, enum kind k) { return (double)m->used[k] * (double)dtypes[type_of_kind(k)].size / 1e6; }

static double base_parameters(const model *m)
{
    const config *c = &m->c;
    double q = (double)c->heads * c->head_dim, kv = (double)c->kv_heads * c->head_dim, dim = c->dim;
    return (c->tied ? 1 : 2) * dim * c->vocab + dim + c->layers * (2 * dim * (q + kv) + 3 * dim * c->hidden + 2 * dim);
}

static void print_rows(const char *label, const dataset *d)
{
    char *path = printable(d->path, "");
    printf("%-10s %s: %td rows", label, path ? path : "", arrlen(d->rows));
    free(path);
    if (d->cut) printf(", %d cut to --seq %d", d->cut, opt.seq);
    if (d->dropped) printf(", %d left out: --seq %d leaves nothing of their answer", d->dropped, opt.seq);
    if (d->empty) printf(", %d left out: their answer is empty", d->empty);
    putchar('\n');
}

// A model can go further than the positions it was trained on, but it rarely says anything sensible there.
static void print_positions(const model *m)
{
    const plan *p = &m->p;
    int most = m->c.max_pos, answered = p->sequences ? p->cache_rows / p->sequences : 0;
    if (p->positions <= most) return;
    if (p->positions > answered) printf("note       rows of up to %d tokens, but the model was made for %d; --seq %d cuts them\n", p->positions, most, most);
    else printf("note       prompts of up to %d tokens and answers of --max-new %d, but the model was made for %d\n", answered - opt.max_new, opt.max_new, most);
}

// What is about to happen, before anything large is allocated.
static void print_plan(const run *r)
{
    const model *m = &r->m;
    const config *c = &m->c;
    double base = base_parameters(m), trained = (double)m->trainable, state = megabytes(m, PARAM);
    printf("device     %s\n", dev_name());
    printf("model      %s: Llama, %.2fM parameters, %d layers of %d, vocabulary %d\n", opt.init ? opt.init : opt.model, base / 1e6, c->layers, c->dim, c->vocab);
    printf("method     %s: %s", m->p.method->name, m->p.method->equation);
    if (!full_training(m)) {
        printf(", rank %d on", m->p.rank);
        for (int i = 0; i < 7; i++) if (m->p.targets >> i & 1) printf(" %s", linear_names[i]);
        if (m->p.modules) printf(" where its target_modules say so");
    }
    printf("\ntrains     %.0f parameters, %.2f %% of the model\n", trained, 100 * trained / base);
    print_rows("data", &r->train);
    if (r->val.rows) print_rows("validation", &r->val);
    print_positions(m);
    printf("steps      %d of %d rows, at most %d tokens at a time; lr %g, %s\n", r->steps, opt.batch * opt.accum, m->p.tokens, opt.lr, opt.schedule);
    printf("memory     trained weights, gradients, AdamW %.1f MB; activations %.1f MB; work space %.1f MB", 4 * state + megabytes(m, START),
        megabytes(m, ACT) + megabytes(m, STAT) + megabytes(m, AUX), megabytes(m, WORK) + megabytes(m, CACHE) + (double)dev_reserve(needs_of(m), 0) / 1e6);
    putchar('\n');
    fflush(stdout);
}

// How the base lies in memory, once it does.
static void print_base(model *m)
{
    double bytes = 0;
    int copied = 0;
    for (int i = 0; i < arrlen(m->tensors); i++) {
        const tensor *t = &m->tensors[i];
        ptrdiff_t at = t->kind == BASE ? shgeti(m->file.tensors, t->name) : -1;
        if (at < 0) continue;
        bytes += (double)elements(*t->at) * (double)dtypes[t->at->type].size;
        copied |= t->at->p != m->file.tensors[at].value.at.p;
    }
    if (bytes > 0) printf("base       %.1f MB, %s\n", bytes / 1e6, copied ? "copied to the device" : "mapped from its file");
    putchar('\n');
    fflush(stdout);
}

static void finish_training(run *r)
{
    save_run(r);
    in_loop = 0;
    if (interrupted) {
        printf("\nstopped after step %d; the same command with --resume %s goes on from there\n", r->step, opt.out);
        exit(128 + interrupted);
    }
    report_eval(r, "after", 1);
    if (r->log && fclose(r->log)) die("cannot write %s: %s", opt.log, strerror(errno));
    if (full_training(&r->m)) printf("\nmodel in %s. Next:\n  ./train --generate TEXT --model %s\n", opt.out, opt.out);
    else printf("\nadapter in %s. Next:\n  ./train --generate \"...\" --chat --model %s --adapter %s\n  ./train --merge merged --model %s --adapter %s\n",
        opt.out, opt.model, opt.out, opt.model, opt.out);
}

// --adapter brings its method; --method may only say the same, or turn lora into lora+.
static void read_adapter_plan(plan *p)
{
    const method *asked = p->method;
    peft_read_config(p, opt.adapter);
    int plus = !strcmp(asked->name, "lora+") && !strcmp(p->method->name, "lora");
    if (opt.method != default_method && asked != p->method && !plus) die("--method %s: --adapter %s is %s", asked->name, opt.adapter, p->method->name);
    if (plus) p->method = asked;
}

// Of the first step, for a method whose start depends on the gradient.
static batch *first_batches(run *r)
{
    batch *list = NULL;
    int first, last;
    if (!r->m.p.method->wants_gradient) return NULL;
    step_rows(r, &first, &last);
    for (int i = first; i < last; i += opt.batch) {
        batch b = batch_new(r->m.p.tokens, opt.batch);
        fill_batch(r, &b, i, last);
        arrput(list, b);
    }
    return list;
}

// Fills the model of a run; returns the steps done.
static int fill_run(run *r)
{
    batch *first = first_batches(r);
    fill_model(&r->m, first, (int)arrlen(first));
    for (int i = 0; i < arrlen(first); i++) batch_free(&first[i]);
    arrfree(first);
    return opt.resume ? resume_run(r, opt.resume) : 0;
}

// Reads everything that a run needs and lays out its memory, but allocates none of it yet.
static void open_run(run *r)
{
    *r = (run){.epoch = -1};
    plan p = plan_from_options();
    if (opt.adapter && opt.resume) die("--resume and --adapter: give one of them");
    if (opt.adapter) read_adapter_plan(&p);
    if (opt.init && p.method != &methods[0]) die("--init starts from nothing, so everything must train: add --method full");
    config c = open_config();
    r->t = open_tokenizer(opt.model, c.vocab);
    r->train = read_rows(r->t, opt.data, opt.seq);
    check_ids(&r->train, c.vocab);
    if (opt.val) r->val = read_rows(r->t, opt.val, opt.seq);
    check_ids(&r->val, c.vocab);
    model_measure(&r->m, c, p);
    int answers = has_answers(&r->val) && (opt.exact_match || base_parameters(&r->m) < 50e6);
    if (answers) r->scored = arrlen(r->val.rows) < SCORED ? (int)arrlen(r->val.rows) : SCORED;
    plan_sizes(&p, c, &r->train, &r->val, r->scored);
    r->m.p = p;
    layout(&r->m);
    int n = (int)arrlen(r->train.rows);
    double steps = opt.steps ? opt.steps : ceil(opt.epochs * ceil_div(n, opt.batch * opt.accum));       // as Trainer rounds
    if (steps > 1e9) die("--epochs %g: makes %.0f steps, at most 1000000000", opt.epochs, steps);
    if (opt.warmup > steps) die("--warmup %d exceeds the %.0f steps of this run", opt.warmup, steps);
    r->steps = (int)steps;
    r->order = alloc((size_t)n, sizeof *r->order);
    for (int i = 0; i < n; i++) r->order[i] = i;
}

static void close_run(run *r) { model_free(&r->m), tokenizer_free(r->t), free_rows(&r->train), free_rows(&r->val), free(r->order); }

static void fine_tune(void)
{
    run r;
    open_run(&r);
    print_plan(&r);
    destination = check_out("--out", opt.out, opt.model, 1);
    r.step = fill_run(&r);
    print_base(&r.m);
    if (r.step > r.steps) die("--resume %s: has %d steps behind it, --steps asks for %d", opt.resume, r.step, r.steps);
    if (opt.log) r.log = open_log(opt.log, r.step);
    if (!r.step) report_eval(&r, "before", 1);
    training_loop(&r);
    finish_training(&r);
    close_run(&r);
    free(destination);
}

static void run_eval(void)
{
    if (!opt.val) die("--eval needs --val FILE");
    model m = {0};
    config c = open_config();
    tokenizer *t = open_tokenizer(opt.model, c.vocab);
    dataset none = {0}, val = read_rows(t, opt.val, opt.seq);
    check_ids(&val, c.vocab);
    plan p = plan_for_use();
    int rows = opt.exact_match ? (int)arrlen(val.rows) : 0;
    if (rows && !has_answers(&val)) die("--exact-match: not every row of %s has an answer", opt.val);
    plan_sizes(&p, c, &none, &val, rows);
    model_measure(&m, c, p);
    fill_model(&m, NULL, 0);
    print_rows("rows", &val);
    print_positions(&m);
    if (rows) {
        scores got = exact_match(&m, t, &val, rows, NULL, show_answers);
        printf("exact match %d of %d, %.1f %%", got.hits, rows, 100.0 * got.hits / rows);
        print_cut(got);
    }
    long targets;
    double loss = evaluate(&m, &val, &targets);
    if (!isfinite(loss)) die("the loss on %s is %g: the model or its adapter holds NaN or Inf", opt.val, loss);
    printf("eval loss %.6f over %ld tokens\n", loss, targets);
    model_free(&m), tokenizer_free(t), free_rows(&val);
}

// Prints what the ids say beyond what was printed before. A character that still lacks bytes decodes to U+FFFD: it waits.
static void print_more(const tokenizer *t, const int *ids, int n, int last, size_t *printed)
{
    char *text = decode(t, ids, n);
    size_t length = strlen(text);
    while (!last && length >= 3 && !memcmp(text + length - 3, "\xef\xbf\xbd", 3)) length -= 3;
    text[length] = 0;
    char *safe = length > *printed && isatty(STDOUT_FILENO) ? printable(text + *printed, "\n\t") : NULL;
    if (length > *printed) fputs(safe ? safe : text + *printed, stdout), *printed = length;
    fflush(stdout);
    free(safe), free(text);
}

static void run_generate(void)
{
    model m = {0};
    config c = open_config();
    tokenizer *t = open_tokenizer(opt.model, c.vocab);
    char *text = opt.chat ? format_prompt(opt.generate, NULL) : strdup(opt.generate);
    row prompt = encode_row(t, text, "", 0);
    if (!prompt.n) die("--generate: an empty TEXT, and this model has no BOS to begin with");
    sequence s = {.ids = alloc((size_t)prompt.n + (size_t)opt.max_new, sizeof(int)), .n = prompt.n, .room = prompt.n + opt.max_new};
    memcpy(s.ids, prompt.ids, (size_t)prompt.n * sizeof(int));
    plan p = plan_for_use();
    p.tokens = prompt.n, p.positions = p.cache_rows = s.room;
    model_measure(&m, c, p);
    fill_model(&m, NULL, 0);
    batch b = batch_new(p.tokens, 1);
    rng g = rng_named((uint64_t)opt.seed, "generate");
    size_t printed = 0;
    int who, from = opt.chat ? prompt.n : tokenizer_bos(t) >= 0;
    do print_more(t, s.ids + from, s.n - from, 0, &printed);
    while (generate_pass(&m, t, &s, 1, &b, &who, &g));
    print_more(t, s.ids + from, s.n - from, 1, &printed);
    putchar('\n');
    batch_free(&b), model_free(&m), tokenizer_free(t);
    free(text), free(prompt.ids), free(s.ids);
}

// On a 16-bit base, rounding swallows the part of an update that is smaller than the base's last bit. Says how much is left:
// the projection of the rounded update on the true one, or NaN if there is no update.
static double update_survived(model *m, linear *l, enum dtype type)
{
    size_t n = elements(l->W);
    wide *W = alloc(n, sizeof *W), *after = alloc(n, sizeof *after);
    double both = 0, wanted = 0;
    get(W, l->W);
    get(after, merged(m, l));
    for (size_t i = 0; i < n; i++) {
        double update = (double)after[i] - (double)W[i], kept = rounded((double)after[i], type) - (double)W[i];
        both += update * kept, wanted += update * update;
    }
    free(W), free(after);
    return both / wanted;
}

// A GPU that computes in bf16 holds a float base rounded; merging it would write that into every weight.
static void refuse_rounded(model *m)
{
    for (int i = 0; i < arrlen(m->tensors); i++) {
        const tensor *t = &m->tensors[i];
        ptrdiff_t at = t->kind == BASE ? shgeti(m->file.tensors, t->name) : -1;
        enum dtype file = at < 0 ? t->at->type : m->file.tensors[at].value.at.type;
        if (file != t->at->type) die("--merge: %s is %s and would be rounded to %s here; ./train --merge keeps it", t->name, dtypes[file].name, dtypes[t->at->type].name);
    }
}

static void run_merge(void)
{
    if (!opt.adapter) die("--merge needs --adapter DIR");
    model m = {0};
    plan p = plan_for_use();
    model_measure(&m, open_config(), p);
    char *out = check_out("--merge", opt.merge, opt.model, 0);
    fill_model(&m, NULL, 0);
    refuse_rounded(&m);
    stage_begin(out);
    stage_model(&m, opt.model, F32);
    for (int i = 0; i < 7 * m.c.layers; i++) {
        linear *l = adapter_at(&m, i);
        if (!l || (l->W.type != BF16 && l->W.type != F16)) continue;
        double survived = update_survived(&m, l, l->W.type);
        printf("layer %2d %-4s  ", i / 7, linear_names[i % 7]);
        if (isnan(survived)) printf("its update is zero\n");
        else printf("%5.1f %% of the update survive rounding to %s\n", 100 * survived, dtypes[l->W.type].name);
    }
    stage_publish(out);
    free(out);
    printf("model with %s merged in: %s\n", opt.adapter, opt.merge);
    model_free(&m);
}

static void run_tokenize(void)
{
    tokenizer *t = open_tokenizer(opt.model, 0);
    size_t bytes, n;
    char *whole;
    const char *file = read_utf8(opt.tokenize, &whole, &bytes);
    row_reader r = read_json_rows(opt.tokenize, file, bytes);
    for (cJSON *json; (json = next_row(&r)); cJSON_Delete(json)) {
        const char *text = text_field(r.where, json, "text");
        if (!text) die("%s: expected a JSON object with \"text\"", r.where);
        int *ids = tokenizer_encode(t, text, strlen(text), 1, &n);
        if (!ids) die("out of memory while tokenising");
        putchar('[');
        for (size_t i = 0; i < n; i++) printf("%s%d", i ? "," : "", ids[i]);
        puts("]");
        free(ids);
    }
    free(whole);
    tokenizer_free(t);
}

static void run_list(void)
{
    config c = open_config();
    plan p = plan_from_options();
    printf("%-9s %-44s %14s   on %s, rank %d\n", "method", "", "trains", opt.model, opt.rank);
    for (int i = 0; i < METHODS; i++) {
        model m = {0};
        p.method = &methods[i];
        model_measure(&m, c, p);
        int wide_chars = 0;
        for (const char *e = methods[i].equation; *e; e++) wide_chars += (*e & 0xc0) == 0x80;      // bytes that take no column
        printf("%-9s %-*s ", methods[i].name, 44 + wide_chars, methods[i].equation);
        if (*m.refused) printf("%14s   %s\n", "-", m.refused);
        else printf("%14zu   %8.2fM  %6.2f %%\n", m.trainable, (double)m.trainable / 1e6, 100 * (double)m.trainable / base_parameters(&m));
        arrfree(m.tensors);
        free(m.layers);
    }
    free(c.text);
}

// ---- 9  the CPU beside the GPU -----------------------------------------------------------------------------
//
//  A program that runs on a GPU links this file twice: with train.cu's ops, and once more with its own, of which the
//  linker sees nothing but step_tensors under the name reference_step. Both take one step from the same seed, and every
//  activation, gradient and updated parameter is compared by its name.

typedef struct { char name[128]; size_t n; double *x; } snapshot;       // what a tensor held, on the host

static snapshot *take(snapshot *list, const char *prefix, const char *name, mat m)
{
    snapshot s = {.n = elements(m)};
    wide *x = alloc(s.n, sizeof *x);
    snprintf(s.name, sizeof s.name, "%s%s", prefix, name);
    s.x = alloc(s.n, sizeof *s.x);
    get(x, m);
    for (size_t i = 0; i < s.n; i++) s.x[i] = (double)x[i];
    free(x);
    arrput(list, s);
    return list;
}

static snapshot *take_kinds(snapshot *list, const char *prefix, const model *m, int kinds, int grad)
{
    for (int i = 0; i < arrlen(m->tensors); i++)
        if (kinds >> m->tensors[i].kind & 1) list = take(list, prefix, m->tensors[i].name, grad ? *m->tensors[i].grad : *m->tensors[i].at);
    return list;
}

static void snapshots_free(snapshot *list)
{
    for (int i = 0; i < arrlen(list); i++) free(list[i].x);
    arrfree(list);
}

// The other half's values into ours, wherever names agree.
static void give_kinds(const model *m, const snapshot *list, const char *prefix, int kinds, int grad)
{
    size_t n = strlen(prefix);
    for (int i = 0; i < arrlen(list); i++)
        for (int j = 0; j < arrlen(m->tensors) && !strncmp(list[i].name, prefix, n); j++) {
            const tensor *t = &m->tensors[j];
            if (kinds >> t->kind & 1 && !strcmp(list[i].name + n, t->name)) put(grad ? *t->grad : *t->at, list[i].x, F64);
        }
}

// Moves what an adapter trains off its start, by normal noise; the same generator gives both halves the same. At the start LoRA's B is zero, hence
// dA too, and lora-ga's dA is the difference of equal numbers: a comparison there sees half of the backward pass.
static void shake(model *m, double size, rng *g)
{
    for (int i = 0; i < arrlen(m->tensors); i++) {
        tensor *t = &m->tensors[i];
        if (t->kind != PARAM || full_training(m)) continue;
        size_t n = elements(*t->at);
        wide *x = alloc(n, sizeof *x);
        get(x, *t->at);
        for (size_t j = 0; j < n; j++) x[j] += (wide)(size * rng_normal(g));
        put(*t->at, x, TYPE_OF(wide));
        free(x);
    }
}

// One step of training on b, and what it leaves. `other`: what it left in the other half, or NULL. Singular vectors of neighbouring
// values turn into each other by rounding: pissa and its like begin with the other half's.
// AdamW divides by |g|, so that a gradient which is zero but for rounding would decide the sign of a whole step; it is given the other's.
static snapshot *snapshots_of_step(model *m, const batch *b, const snapshot *other)
{
    int start = 1 << PARAM | 1 << START;
    snapshot *list = take_kinds(NULL, "start ", m, start, 0);
    give_kinds(m, other, "start ", start, 0);
    model_step(m, b, 1.0 / b->targets);
    list = take_kinds(list, "", m, 1 << ACT | 1 << STAT, 0);
    list = take_kinds(list, "d ", m, 1 << PARAM, 1);
    give_kinds(m, other, "d ", 1 << PARAM, 1);
    update(m, 1, opt.lr, gradient_norm(m));
    return take_kinds(list, "updated ", m, 1 << PARAM, 0);
}

// The first step that these options ask for, a little off its start.
snapshot *step_tensors(int argc, char **argv, const snapshot *other);
snapshot *step_tensors(int argc, char **argv, const snapshot *other)
{
    run r;
    parse_options(argc, argv);
    open_run(&r);
    fill_run(&r);
    rng noise = rng_named((uint64_t)opt.seed, "off the start");
    shake(&r.m, 0.02, &noise);
    batch b = batch_new(r.m.p.tokens, opt.batch);
    int first, last;
    step_rows(&r, &first, &last);
    fill_batch(&r, &b, first, last);
    snapshot *list = snapshots_of_step(&r.m, &b, other);
    batch_free(&b), close_run(&r);
    return list;
}

typedef struct { double norm[2], error; } compared;

// The relative L2 distance of `got` to `want`. Two tensors of zeros agree: LoRA's dA is zero at its start.
static compared compare(const snapshot *want, const snapshot *got)
{
    double sums[3] = {0};
    for (size_t i = 0; i < want->n && want->n == got->n; i++) {
        double d = want->x[i] - got->x[i];
        sums[0] += want->x[i] * want->x[i], sums[1] += got->x[i] * got->x[i], sums[2] += d * d;
    }
    double error = want->n != got->n || strcmp(want->name, got->name) ? NAN : sums[2] == 0 ? 0 : sqrt(sums[2] / sums[0]);
    return (compared){{sqrt(sums[0]), sqrt(sums[1])}, error};
}

// Rounding of thousands of additions in double and float. bf16 keeps 8 bits, and 2^-9 grows from layer to layer: PyTorch's own
// bf16 gradients of the bundled model are off by a few per cent on most rows, and by 0.24 on some.
static double check_tolerance(void) { return sizeof(real) == 8 ? 1e-12 : sizeof(real) == 4 ? 1e-5 : 0.25; }

static int print_compared(const char *name, compared c)
{
    int ok = c.error <= check_tolerance();
    printf("%-70s %12.6g %12.6g   %8.2e %s\n", name, c.norm[0], c.norm[1], c.error, ok ? "✓" : "✗");
    return ok;
}

// The other half; absent from ./train.
__attribute__((weak)) snapshot *reference_step(int argc, char **argv, const snapshot *other);

static int run_check(int argc, char **argv)
{
    if (!reference_step) die("--check compares a GPU with the CPU: ./train_cuda --check, or ./train_emu --check without a GPU");
    snapshot *want = reference_step(argc, argv, NULL), *got = step_tensors(argc, argv, want);
    int n = (int)arrlen(want), right = n == arrlen(got), worst = 0;
    compared most = {.error = -1};
    printf("%-70s %12s %12s   %8s\n", "one step: tensor", "norm, CPU", "norm, GPU", "error");
    for (int i = 0; i < n && i < arrlen(got); i++) {
        if (!strncmp(want[i].name, "start ", 6)) continue;              // given, not computed
        compared c = compare(&want[i], &got[i]);
        right &= print_compared(want[i].name, c);
        if (!(c.error <= most.error)) most = c, worst = i;
    }
    printf("\nGPU: %s. Relative error allowed: %.0e. The worst:\n", dev_name(), check_tolerance());
    print_compared(want[worst].name, most);
    snapshots_free(want), snapshots_free(got);
    return right ? 0 : 1;
}

// ---- 10  comparing -----------------------------------------------------------------------------------------
//
//  ./train --compare runs each method as a process of its own, with the ordinary options: the same rows, order and steps, and
//  as near to the number of trained parameters that Bone has at --rank as the method's rank allows. Such a run is a cell.
//  Its output and log lie in OUT/runs, and a cell whose command line is the same is not run again. From all of them come
//  OUT/steps.csv (a line a step), OUT/cells.csv (a line a cell), OUT/table.md, and by dev/compare.gp OUT/*.png.

enum part { MAIN, NORMS, RANKS, SWEEP };                 // the table; first gradients; further ranks; other learning rates
static const char *const part_names[] = {"main", "norms", "ranks", "sweep"};
enum { GRADIENT, LOSS, EVAL, MATCH, SPEED, MEMORY, RESULTS };
static const struct { const char *title; int digits; } columns[RESULTS] = {
    {"first gradient norm", 2}, {"training loss", 3}, {"eval loss", 3}, {"exact match %", 1}, {"tok/s", 0}, {"peak MB", 0},
};

typedef struct {
    const char *label;                                    // a method, or biglora: lora of full rank
    enum part part;
    int rank, steps, seed;
    double lr, trains, result[RESULTS];                   // NAN where there is none
} cell;

__attribute__((format(printf, 1, 2)))
static char *text_of(const char *format, ...)
{
    char *text;
    va_list args;
    va_start(args, format);
    if (vasprintf(&text, format, args) < 0) die("out of memory");
    va_end(args);
    return text;
}

static const char *method_of(const char *label) { return strcmp(label, "biglora") ? label : "lora"; }

// What a method would train, 0 if it refuses the rank.
static size_t would_train(config c, const char *label, int rank)
{
    model m = {0};
    plan p = plan_from_options();
    p.method = method_named(method_of(label)), p.rank = rank;
    model_measure(&m, c, p);
    arrfree(m.tensors);
    free(m.layers);
    return *m.refused ? 0 : m.trainable;
}

static int has_rank(const char *label) { return strcmp(label, "full") && strcmp(label, "frozen"); }

// The rank at which a method's count comes nearest to Bone's at `rank`. mini, whose point is to have less, keeps its rank.
static int matched_rank(config c, const char *label, int rank)
{
    int most = c.dim < c.hidden ? c.dim : c.hidden, best = rank;
    double wanted = (double)would_train(c, "bone", rank), nearest = INFINITY;
    if (!strcmp(label, "biglora")) return most;                                       // at least the shorter side of every W
    for (int r = 1; r <= most && strcmp(label, "mini") && has_rank(label); r++) {
        size_t n = would_train(c, label, r);
        if (n && fabs((double)n - wanted) < nearest) nearest = fabs((double)n - wanted), best = r;
    }
    return best;
}

static void add_cell(cell **list, config c, enum part part, const char *label, int rank, int seed, double lr, int steps)
{
    size_t trains = would_train(c, label, rank);
    cell new = {label, part, rank, steps, seed, lr, (double)trains, {NAN, NAN, NAN, NAN, NAN, NAN}};
    if (trains) arrput(*list, new);
    else if (part == MAIN) printf("%s has no rank that fits here, left out\n", label);
}

static cell *plan_cells(config c, int steps)
{
    static const char *const ranked[] = {"lora", "pissa", "bone", "bat", "bat-row"};
    cell *list = NULL;
    for (int s = 0; s < opt.seeds; s++)
        for (int i = 0; i <= METHODS; i++) {
            const char *label = i < METHODS ? methods[i].name : "biglora";
            int rank = matched_rank(c, label, opt.rank);
            add_cell(&list, c, MAIN, label, rank, opt.seed + s, opt.lr, steps);
        }
    for (int i = 0; i < 4; i++)
        for (int r = 1; r <= 2 * opt.rank; r *= opt.quick ? 4 : 2) add_cell(&list, c, NORMS, ranked[i], r, opt.seed, opt.lr, 1);
    for (int i = 0; i < 5 && !opt.quick; i++)
        for (int r = ceil_div(opt.rank, 4), before = 0, rank; r <= 2 * opt.rank; r *= 2, before = rank)
            if ((rank = matched_rank(c, ranked[i], r)) != before) add_cell(&list, c, RANKS, ranked[i], rank, opt.seed, opt.lr, steps);
    for (int i = 0; i <= METHODS && opt.sweep_lr; i++)
        for (double lr = opt.lr / 4; lr < 20 * opt.lr; lr *= 2) {
            const char *label = i < METHODS ? methods[i].name : "biglora";
            add_cell(&list, c, SWEEP, label, matched_rank(c, label, opt.rank), opt.seed, lr, steps);
        }
    return list;
}

// Runs a program, its output appended to a file. Returns its exit status; Ctrl-C ends it, too.
static int run_program(char **argv, const char *to, struct rusage *usage)
{
    int status;
    fflush(stdout);
    pid_t pid = fork();
    if (pid < 0) die("cannot start a process: %s", strerror(errno));
    if (!pid) {
        int fd = open(to, O_WRONLY | O_CREAT | O_APPEND, 0666);
        setpgid(0, 0);                                          // a terminal's Ctrl-C goes to the parent, which passes it on
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (fd < 0 || dup2(fd, STDOUT_FILENO) < 0 || dup2(fd, STDERR_FILENO) < 0) _exit(126);
        execvp(*argv, argv);
        _exit(127);
    }
    while (wait4(pid, &status, 0, usage) < 0)
        if (interrupted) kill(pid, SIGTERM);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// What a finished cell left in its log and its output. Its steps go to the CSV.
static void read_cell(cell *c, const char *text, char *log, FILE *csv)
{
    double loss, norm, lr, tokens, speed, all = 0, time = 0, sum = 0;
    int step, n = 0, last = c->steps - ceil_div(c->steps, 20), hits, of, kb;
    for (char *line = log; *line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : "") {
        sscanf(line, "{\"step\":%d,\"eval_loss\":%lf}", &step, &c->result[EVAL]);
        if (sscanf(line, "{\"step\":%d,\"loss\":%lf,\"grad_norm\":%lf,\"lr\":%lf,\"tokens\":%lf,\"tok_per_s\":%lf}", &step, &loss, &norm, &lr, &tokens, &speed) != 6) continue;
        fprintf(csv, "%s,%s,%d,%.0f,%d,%g,%d,%d,%.9g,%.9g,%.0f\n", part_names[c->part], c->label, c->rank, c->trains, c->seed, c->lr, c->steps, step, loss, norm, speed);
        if (step == 1) c->result[GRADIENT] = norm;
        if (step > last) sum += loss, n++;                      // the training loss is the mean of the last twentieth
        all += tokens, time += tokens / speed;
    }
    c->result[SPEED] = all / time, c->result[LOSS] = n == c->steps - last ? sum / n : NAN;
    if (n < c->steps - last) c->result[EVAL] = NAN;             // it diverged
    for (const char *at = text; n == c->steps - last && (at = strstr(at, "exact match ")); at++)
        if (sscanf(at, "exact match %d of %d", &hits, &of) == 2) c->result[MATCH] = 100.0 * hits / of;
    if ((text = strstr(text, "\npeak ")) && sscanf(text, "\npeak %d", &kb) == 1) c->result[MEMORY] = kb / 1e3;
}

// Runs a cell unless that is done, with the options that were given to --compare and those that are its own; then reads it.
static int run_cell(cell *c, char **shared, FILE *csv)
{
    char *base = text_of("%s/runs/%s-rank%d-lr%g-seed%d-steps%d", opt.out, c->label, c->rank, c->lr, c->seed, c->steps), **argv = NULL;
    char *done = text_of("%s.txt", base), *part = text_of("%s.part", base), *log = text_of("%s.log", base), *command = strdup("");
    char *own[] = {"--data", strdup(opt.data), "--method", strdup(method_of(c->label)), "--rank", text_of("%d", c->rank), "--lr", text_of("%.17g", c->lr),
        "--seed", text_of("%d", c->seed), "--steps", text_of("%d", c->steps), opt.val && c->part != NORMS ? "--val" : NULL, strdup(opt.val ? opt.val : ""), NULL};
    arrput(argv, "/proc/self/exe");
    for (int i = 0; i < arrlen(shared); i++) arrput(argv, shared[i]);
    for (char **o = own; *o; o++) arrput(argv, *o);
    for (int i = 1; i < arrlen(argv); i++) command = text_of("%s%s%c", command, argv[i], i + 1 < arrlen(argv) ? ' ' : '\n');
    for (char **o = (char *[]){"--out", base, "--log", log, NULL}; *o; o++) arrput(argv, *o);
    arrput(argv, NULL);

    size_t bytes;
    char *text = access(done, F_OK) ? strdup("") : read_file(done, &bytes);
    int ran = strncmp(text, command, strlen(command)) != 0;
    if (ran) {
        struct rusage usage;
        FILE *f = fopen(part, "w");
        if (!f) die("cannot write %s: %s", part, strerror(errno));
        fputs(command, f), close_checked(f, part);
        int status = run_program(argv, part, &usage);
        remove_run(base);                                       // the adapter itself is not wanted
        if (interrupted) { printf("\nstopped; the same command goes on from here\n"); exit(130); }
        text = read_file(part, &bytes);
        char *error = strstr(text, "error: ");
        if (status && !strstr(text, "a smaller --lr")) die("%s: %s", part, error ? strtok(error + 7, "\n") : "ended without saying why");
        if (!(f = fopen(part, "a"))) die("cannot write %s: %s", part, strerror(errno));
        fprintf(f, "\npeak %ld KB\n", usage.ru_maxrss), close_checked(f, part);
        if (rename(part, done)) die("cannot write %s: %s", done, strerror(errno));
        text = read_file(done, &bytes);
    }
    read_cell(c, text, read_file(log, &bytes), csv);
    return ran;
}

// Mean ± standard deviation over the seeds of a cell.
static void print_result(FILE *f, const cell *list, const cell *c, int k)
{
    double sum = 0, squares = 0, n = 0;
    for (const cell *o = list; o < list + arrlen(list); o++)
        if (o->part == c->part && !strcmp(o->label, c->label) && o->rank == c->rank && o->lr == c->lr) sum += o->result[k], squares += o->result[k] * o->result[k], n++;
    if (isfinite(sum)) fprintf(f, " %.*f", columns[k].digits, sum / n);
    else fputs(" –", f);
    if (n > 1 && isfinite(sum)) fprintf(f, " ± %.*f", columns[k].digits, sqrt(fmax(0, (squares - sum * sum / n) / (n - 1))));
    fputs(" |", f);
}

static void write_table(FILE *f, const cell *list, enum part part, const char *title)
{
    int sweep = part == MAIN && opt.sweep_lr;
    fprintf(f, "\n%s\n\n| method | rank | trains |", title);
    for (int k = 0; k < RESULTS; k++) fprintf(f, " %s |", columns[k].title);
    fprintf(f, "%s\n|---|--:|--:|%s", sweep ? " best rate | its eval loss | its exact match % |" : "", sweep ? "--:|--:|--:|" : "");
    for (int k = 0; k < RESULTS; k++) fputs("--:|", f);
    for (const cell *c = list; c < list + arrlen(list); c++) {
        if (c->part != part || (part == MAIN && c->seed != opt.seed)) continue;
        fprintf(f, "\n| %s | %.0d | %.0f |", c->label, has_rank(c->label) ? c->rank : 0, c->trains);      // %.0d of 0 is nothing
        for (int k = 0; k < RESULTS; k++) print_result(f, list, c, k);
        const cell *best = c;
        for (const cell *o = list; o < list + arrlen(list) && sweep; o++)
            if (o->part == SWEEP && !strcmp(o->label, c->label) && (o->result[EVAL] < best->result[EVAL] || best == c)) best = o;
        if (sweep) fprintf(f, " %g |", best->lr), print_result(f, list, best, EVAL), print_result(f, list, best, MATCH);
    }
    fputc('\n', f);
}

static void write_results(const cell *list, int steps)
{
    char *path = text_of("%s/cells.csv", opt.out), *table = text_of("%s/table.md", opt.out);
    FILE *f = fopen(path, "w"), *t = fopen(table, "w");
    if (!f || !t) die("cannot write %s: %s", f ? table : path, strerror(errno));
    fputs("part,method,rank,trains,seed,lr,steps,grad_norm,loss,eval_loss,exact_match,tok_per_s,peak_mb\n", f);
    for (const cell *c = list; c < list + arrlen(list); c++) {
        fprintf(f, "%s,%s,%d,%.0f,%d,%g,%d", part_names[c->part], c->label, c->rank, c->trains, c->seed, c->lr, c->steps);
        for (int k = 0; k < RESULTS; k++) fprintf(f, ",%.9g", c->result[k]);
        fputc('\n', f);
    }
    fprintf(t, "%s on %s: %d steps of %d rows, learning rate %g, %s, %d seed%s\n", opt.model, opt.data, steps, opt.batch * opt.accum, opt.lr, opt.schedule, opt.seeds, opt.seeds > 1 ? "s (mean ± standard deviation)" : "");
    write_table(t, list, MAIN, "Every method");
    if (!opt.quick) write_table(t, list, RANKS, "Further ranks, one seed: Bone's ablation (table 3 of the paper), Bat by block rows and by block columns (table 5)");
    close_checked(f, path), close_checked(t, table);
    size_t bytes;
    printf("\n%s\n", read_file(table, &bytes));
}

static void draw(void)
{
    struct rusage usage;
    char *said = text_of("%s/gnuplot.txt", opt.out);
    unlink(said);
    int status = run_program((char *[]){"gnuplot", "-c", "dev/compare.gp", strdup(opt.out), NULL}, said, &usage);
    if (status == 127) printf("no plots: gnuplot is not here. sudo apt-get install -y gnuplot-nox, then the same command draws them\n");
    else if (status) die("gnuplot failed, see %s", said);
    else printf("%s/table.md, cells.csv, steps.csv; loss.png, gradient.png, match.png, cost.png\n", opt.out);
}

static void run_compare(void)
{
    static const char *const own[] = {"--compare", "--quick", "--sweep-lr", "--seeds", "--data", "--val", "--method", "--rank", "--lr", "--seed", "--steps", "--out", "--log", NULL};
    if (opt.init || opt.adapter || opt.resume) die("--compare starts from --model alone: no --init, --adapter or --resume");
    char **shared = NULL, *runs = join(opt.out, "runs"), *path = join(opt.out, "steps.csv");
    for (int i = 0; i < OPTIONS; i++) {                         // what every cell gets, too
        int mine = !given_values[i];
        for (const char *const *o = own; *o; o++) mine |= !strcmp(*o, option_table[i].name);
        if (mine) continue;
        arrput(shared, strdup(option_table[i].name));
        if (option_table[i].kind != 'f') arrput(shared, given_values[i]);
    }
    if ((mkdir(opt.out, 0777) && errno != EEXIST) || (mkdir(runs, 0777) && errno != EEXIST)) die("--out %s: %s", opt.out, strerror(errno));
    FILE *csv = fopen(path, "w");
    if (!csv) die("cannot write %s: %s", path, strerror(errno));
    fputs("part,method,rank,trains,seed,lr,steps,step,loss,grad_norm,tok_per_s\n", csv);
    sigaction(SIGINT, &(struct sigaction){.sa_handler = on_signal}, NULL);       // without SA_RESTART: they end the wait for a cell
    sigaction(SIGTERM, &(struct sigaction){.sa_handler = on_signal}, NULL);
    int steps = opt.steps ? opt.steps : opt.quick ? 8 : 50, n;
    cell *list = plan_cells(open_config(), steps);
    double all = 0, done = 0, worked = 0, start = seconds();
    for (int i = 0; i < (n = (int)arrlen(list)); i++) all += list[i].steps + 20;      // evaluation counts as 20 steps
    printf("%d runs of up to %d steps in %s; Ctrl-C stops, the same command goes on\n\n", n, steps, opt.out);
    in_loop = 1;
    for (int i = 0; i < n; i++) {
        cell *c = &list[i];
        int left = worked > 0 ? (int)((seconds() - start) / worked * (all - done)) : 0;
        show("run %d of %d: %s rank %d seed %d, %d:%02d to go", i + 1, n, c->label, c->rank, c->seed, left / 60, left % 60);
        int ran = run_cell(c, shared, csv);
        done += c->steps + 20, worked += ran * (c->steps + 20);
        show_progress("", 1, 1);
        printf("%3d of %d  %-5s %-8s rank %-4d lr %-7.2g seed %d %s", i + 1, n, part_names[c->part], c->label, c->rank, c->lr, c->seed, ran ? "" : " (done before)");
        for (int k = 0; k < RESULTS; k++) if (isfinite(c->result[k])) printf("  %s %.*f", columns[k].title, columns[k].digits, c->result[k]);
        putchar('\n');
    }
    close_checked(csv, path);
    write_results(list, steps);
    draw();
}

// ---- 11  main ----------------------------------------------------------------------------------------------

int main(int argc, char **argv)
{
    spin_briefly(argv);
    setvbuf(stdout, NULL, _IOLBF, 0);
    int status = 0;
    atexit(stage_discard);
    catch_cut_files();
    signal(SIGXFSZ, SIG_IGN);           // a file over the limit is an error of write(), like a full disk
    sigaction(SIGINT, &(struct sigaction){.sa_handler = on_signal, .sa_flags = SA_RESTART}, NULL);
    sigaction(SIGTERM, &(struct sigaction){.sa_handler = on_signal, .sa_flags = SA_RESTART}, NULL);
    parse_options(argc, argv);
    if (opt.help) print_help();
    else if (opt.version) puts("train " VERSION);
    else if (opt.list) run_list();
    else if (opt.tokenize) run_tokenize();
    else if (opt.merge) run_merge();
    else if (opt.generate) run_generate();
    else if (opt.eval) run_eval();
    else if (opt.check) status = run_check(argc, argv);
    else if (opt.compare) run_compare();
    else fine_tune();
    if (fflush(stdout) || ferror(stdout)) die("cannot write all of standard output; is its disk full?");
    return status;
}
