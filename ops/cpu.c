/*  ops/cpu.c: the operations of ops.h on a CPU, each forward with its backward.

      1  the products                  what ops/gemm.h multiplies
      2  memory
      3  Llama2
      4  RWKV6
      5  adapters
      6  training                                                                                           */

#define _GNU_SOURCE
#include "gemm.h"

// ---- 1  the products --------------------------------------------------------------------------------------

static mat nth(mat m, int i)            // matrix i of a batch; a batch of 1 serves every i
{
    if (m.batch > 1) m = offset(m, (size_t)i * m.stride);
    m.batch = 1;
    return m;
}

static void check_shapes(int ok, const char *op, mat y, mat a, mat b)
{
    if (!ok || y.type != TYPE_OF(real))
        die("%s: shapes (%d, %d), (%d, %d), (%d, %d) do not fit",
            op, y.rows, y.cols, a.rows, a.cols, b.rows, b.cols);
}

// One product shares its work among the threads; of a batch, each thread takes whole products.
static void gemm_batch(mat y, mat a, int a_across, mat b, int b_across, int K, double scale, enum mode mode)
{
    if (y.batch == 1) {
        gemm(y, nth(a, 0), a_across, nth(b, 0), b_across, K, (real)scale, mode);
        return;
    }
    int large = (double)y.batch * y.rows * y.cols * K > 1e6;
    #pragma omp parallel for schedule(static) if (large && !omp_in_parallel())
    for (int i = 0; i < y.batch; i++)
        gemm(nth(y, i), nth(a, i), a_across, nth(b, i), b_across, K, (real)scale, mode);
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

// ---- 2  memory --------------------------------------------------------------------------------------------

#define ROW(m, i) ((real *)at(m, i, 0))
#define BIG(m) ((double)(m).rows * (m).cols > 1e4 && !omp_in_parallel())      // worth more than one thread

// Large blocks ask for large pages: with pages of 4 KB a product waits for addresses, too.
dev dev_alloc(size_t bytes)
{
    enum { LARGE_PAGE = 2 << 20 };
    size_t unit = bytes < 2 * LARGE_PAGE ? 64 : LARGE_PAGE;
    if (bytes > SIZE_MAX - unit) return NULL;
    void *p = aligned_alloc(unit, (bytes + unit) / unit * unit);      // never none
    if (p && unit == LARGE_PAGE) madvise(p, bytes, MADV_HUGEPAGE);
    return p ? memset(p, 0, bytes) : NULL;
}

void dev_free(dev p) { free(p); }

// Nothing to reserve: a thread's buffers grow in its first product and hold a few blocks, never a matrix.
size_t dev_reserve(needs n, int take)
{
    (void)n;
    (void)take;
    return 0;
}

int dev_chunk(int vocab) { return (1 << 25) / vocab; }             // 128 MB of floats

mat dev_weight(mat host) { return host; }
void dev_weight_free(mat w) { (void)w; }
const char *dev_name(void) { return "CPU"; }
int dev_tf32(void) { return 0; }

int dev_bf16(int on)
{
    int can = sizeof(real) == 4;
    bf16_pairs |= on && can;
    return can;
}


void dev_memory(double *used, double *all)
{
    struct rusage u = {0};
    getrusage(RUSAGE_SELF, &u);
    *used = (double)u.ru_maxrss * 1024;
    *all = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
}

void put_ints(dev_ints dst, const int *src, size_t n) { if (n) memcpy(dst, src, n * sizeof *src); }

// Row by row. Where the dtypes differ, KC numbers at a time are converted through a buffer.
void copy(mat y, mat x)
{
    if (y.rows != x.rows || y.cols != x.cols || y.batch != x.batch)
        die("copy: (%d, %d) to (%d, %d)", x.rows, x.cols, y.rows, y.cols);
    if (!y.p) return;
    for (int b = 0; b < y.batch; b++) {
        mat to = nth(y, b), from = nth(x, b);
        #pragma omp parallel for if (BIG(y))
        for (int n = 0; n < y.rows; n++) {
            if (y.type == x.type) {
                memmove(at(to, n, 0), at(from, n, 0), (size_t)y.cols * dtypes[y.type].size);
                continue;
            }
            real buffer[KC];
            for (int c = 0; c < y.cols; c += KC) {
                size_t part = (size_t)(y.cols - c < KC ? y.cols - c : KC);
                narrow(at(to, n, c), y.type, widened(at(from, n, c), x.type, part, buffer), part);
            }
        }
    }
}

// Contiguous memory in the shape of another matrix.
static mat host_mat(const void *p, enum dtype type, mat like)
{
    return mat_of((dev)(uintptr_t)p, type, SHAPE(like.batch, like.rows, like.cols));
}

void put(mat dst, const void *src, enum dtype type) { copy(dst, host_mat(src, type, dst)); }
void get(wide *dst, mat src) { copy(host_mat(dst, TYPE_OF(wide), src), src); }

void zero(mat x)
{
    #pragma omp parallel for if (BIG(x))
    for (int n = 0; n < x.rows * x.batch; n++)
        memset(ROW(nth(x, n / x.rows), n % x.rows), 0, (size_t)x.cols * sizeof(real));
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

// ---- 3  Llama2 --------------------------------------------------------------------------------------------

// exp to the last bit or two, in a form that the compiler turns into vector code: exp(x) = 2^n · exp(f),
// where n is the whole number nearest to x / ln 2 and f = x − n ln 2 what is left, |f| ≤ ½ ln 2. exp(f) is
// Taylor's polynomial. Double builds use the C library. NaN stays NaN.
static inline real exp_real(real x)
{
    if (sizeof(real) == 8) return (real)exp((double)x);
    float y = (float)x;
    float magic = 12582912.f;                                 // 1.5 · 2^23: adding it rounds to an integer
    y = y < -87.3f ? -87.3f : y > 88.f ? 88.f : y;
    float shifted = y * 1.44269504f + magic;
    float n = shifted - magic;
    float f = (y - n * 0.693359375f) + n * 2.12194440e-4f;    // y − n ln 2, with ln 2 in two parts
    float p = 1.f / 24 + f * (1.f / 120 + f * (1.f / 720 + f * (1.f / 5040)));
    p = 1.f + f * (1.f + f * (.5f + f * (1.f / 6 + f * p)));
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = (bits + 127) << 23;                                // 2^n: n sits in the low bits of `shifted`
    float power;
    memcpy(&power, &bits, 4);
    return (real)(p * power);
}

// y[n] += b
void bias_forward(mat y, mat b)
{
    if (!b.p) return;
    #pragma omp parallel for if (BIG(y))
    for (int n = 0; n < y.rows; n++)
        for (int c = 0; c < y.cols; c++) ROW(y, n)[c] += ROW(b, 0)[c];
}

//  db += Σ_n dy[n].  Threads share the columns.
void bias_backward(mat db, mat dy)
{
    if (!db.p) return;
    #pragma omp parallel for if (BIG(dy))
    for (int c0 = 0; c0 < dy.cols; c0 += 32)
        for (int n = 0; n < dy.rows; n++)
            for (int c = c0; c < dy.cols && c < c0 + 32; c++) ROW(db, 0)[c] += ROW(dy, n)[c];
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
    double squares = SUM(double, c, C, (double)x[c] * (double)x[c]);
    return (real)(1 / sqrt(squares / C + eps));
}

// `residual`, where it is wanted (ops.h), is written while the row is in cache.
void rmsnorm_forward(mat out, mat residual, mat x, mat w, double eps)
{
    #pragma omp parallel for if (BIG(x))
    for (int n = 0; n < x.rows; n++) {
        const real *xn = ROW(x, n), *wc = ROW(w, 0);
        real *on = ROW(out, n), rho = inverse_rms(xn, x.cols, eps);
        for (int c = 0; c < x.cols; c++) on[c] = wc[c] * xn[c] * rho;
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
        double along = SUM(double, c, C, (double)(wc[c] * dn[c]) * (double)xn[c]);
        real factor = (real)(along / C) * rho * rho;
        for (int c = 0; c < C; c++) dxn[c] += rho * (wc[c] * dn[c] - factor * xn[c]);
    }
    for (int n = 0; n < (dw.p ? x.rows : 0); n++) {
        real rho = inverse_rms(ROW(x, n), C, eps);
        for (int c = 0; c < C; c++) ROW(dw, 0)[c] += ROW(dout, n)[c] * ROW(x, n)[c] * rho;
    }
}

// The halves (a, b) of a head turn by the angle of their position: (a cos − b sin, b cos + a sin). The
// backward pass multiplies with the transpose of the rotation, which turns back: sign = −1.
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

// Attention, in each head:  S = q kᵀ/√d,  P = softmax(S) over the keys that a row sees,  out = P v.
// Kept for the backward pass: lse = log Σ exp(S), a number a row and head.
//
// S of T tokens never exists as (T, T), but in blocks of QUERIES rows and KEYS keys that stay in a cache,
// each used up before the next. A query sees the keys up to its own and of these, with a window, the last
// ones alone. With a window of 3:
//
//      keys    0 1 2 3 4 5 6
//      row 4       x x x               these two rows of a block see its keys 2 … 5: nothing else of their
//      row 5         x x x             panel is computed, and what one of them does not see is 0
//
// The products are gemm.h's, panels times slivers. Those of the queries are copied once for a head, those of
// the keys once for a block.
//
// `group` is how many query heads share one kv head, a head of k and v. With 4 heads and 2 kv heads it is 2:
// kv head 0 serves heads 0 and 1, kv head 1 serves heads 2 and 3. Head h reads kv head h / group.
enum { QUERIES = 96, KEYS = 192, WIDE = KEYS + NR };            // WIDE: from one row of a block to the next

static mat part_of(mat m, int row, int rows, int col, int cols)
{
    m = offset(m, (size_t)row * m.ld + (size_t)col);
    m.rows = rows;
    m.cols = cols;
    return view(m);
}

// A panel or block of rows, and `keys` keys: `own` is the key of row 0, counted from the first of these.
// Row r sees keys seen_from … seen_to − 1. Those may be none.
typedef struct { int own, keys, window; } key_block;

static int within(int key, key_block b) { return key < 0 ? 0 : key < b.keys ? key : b.keys; }
static int seen_to(key_block b, int r) { return within(b.own + r + 1, b); }
static int seen_from(key_block b, int r)
{
    return b.own + r < b.window ? 0 : within(b.own + r + 1 - b.window, b);
}

// Keys first … of a head, for the queries from the first that sees one of them; *q0 is that, in whole panels.
static key_block block_at(mat q, mat k, int first, int window, int *q0)
{
    int own = k.rows - q.rows - first;                          // of query 0
    int keys = k.rows - first < KEYS ? k.rows - first : KEYS;
    *q0 = own < 0 ? -own / MR * MR : 0;
    return (key_block){own + *q0, keys, window};
}

static int whole_vectors(int cols) { return ceil_div(cols, LANES) * LANES; }

// Keys from … to − 1 are those that some row of a panel sees, beginning with a whole sliver. What row r of it
// does not see becomes 0, and so does what is behind, which may fill up a pair.
static void hide_unseen(real *s, key_block b, int r, int from, int to)
{
    for (int c = from; c < seen_from(b, r); c++) s[c] = 0;
    for (int c = seen_to(b, r); c <= to; c++) s[c] = 0;
}

// With --bf16 what a product reads of P and dS is rounded, too. A sum over n keys reads pairs of keys side by
// side, made in place …
static void pair_keys(real *s, int n)
{
    if (bf16_pairs) pair_up(s, s, s + 1, 2, steps(n, 1));
}

// … and one over queries reads pairs of rows, of which `out` has half as many. 0 stands for a row too many.
static void pair_queries(real *out, const real *s, int rows, int from, int to)
{
    static const real none[WIDE];
    for (int r = 0; r < rows && bf16_pairs; r += 2)
        pair_up(out + r / 2 * WIDE + from, s + r * WIDE + from,
                r + 1 < rows ? s + (r + 1) * WIDE + from : none, 1, to - from);
}

// The largest score of a row so far, `most`, is subtracted before exp, which then cannot overflow:
// P = exp(S − most). If this block has a larger one, what the blocks before left is multiplied with the
// exp(old most − new most) that is returned. *sum is that of P.
static real exp_scores(real *s, int n, real *most, real *sum)
{
    real old = *most, m = old;
    #pragma omp simd reduction(max : m)
    for (int c = 0; c < n; c++) m = s[c] > m ? s[c] : m;
    real total = SUM(real, c, n, s[c] = exp_real(s[c] - m));
    real shrinks = m > old ? exp_real(old - m) : 1;
    *sum = *sum * shrinks + total;
    *most = m;
    return shrinks;
}

// One head: q and out (nq, d), k and v (nk, d), lse (nq, 1), which holds `most` until the last block is done.
static void attention_forward_head(mat out, mat lse, mat q, mat k, mat v, int window)
{
    int d = q.cols, q0;
    real scale = (real)(1 / sqrt(d));
    real *queries = copied_panels(2, q);
    real *sum = thread_buffer(3, (size_t)q.rows), *S = thread_buffer(4, MR * WIDE);
    memset(sum, 0, (size_t)q.rows * sizeof *sum);
    zero(out);
    for (int r = 0; r < q.rows; r++) *ROW(lse, r) = -INFINITY;
    for (int first = 0; first < k.rows; first += KEYS) {
        key_block b = block_at(q, k, first, window, &q0);
        slivers keys = turned_slivers(5, rows_of(k, first, b.keys));
        slivers values = copied_slivers(6, rows_of(v, first, b.keys));
        for (; q0 < q.rows && seen_from(b, 0) < b.keys; q0 += MR, b.own += MR) {
            int n = q.rows - q0 < MR ? q.rows - q0 : MR;
            int from = seen_from(b, 0) / NR * NR, to = seen_to(b, n - 1);
            panel_times(S + from, WIDE, MR, whole_vectors(to - from), panel_from(queries, q0, d), 1, MR,
                        columns_from(keys, from), d, scale, SET);                   // S = q kᵀ/√d
            for (int r = 0; r < n; r++) {
                real *s = S + r * WIDE, *o = ROW(out, q0 + r);
                int seen = seen_from(b, r);
                real shrinks = exp_scores(s + seen, seen_to(b, r) - seen, ROW(lse, q0 + r), &sum[q0 + r]);
                for (int c = 0; c < d && shrinks != 1; c++) o[c] *= shrinks;
                hide_unseen(s, b, r, from, to);
                pair_keys(s + from, to - from);
            }
            panel_times(ROW(out, q0), out.ld, n, d, S + from, WIDE, 1, steps_from(values, from), to - from,
                        1, ADD);                                                    // out += P v
        }
    }
    for (int r = 0; r < q.rows; r++) {
        for (int c = 0; c < d; c++) ROW(out, r)[c] /= sum[r];
        *ROW(lse, r) += (real)log((double)sum[r]);
    }
}

// d is the numbers of a head.
void attention_forward(mat out, mat lse, mat q, mat k, mat v, int d, int window, const span *spans, int count)
{
    int heads = q.cols / d;
    int group = q.cols / k.cols;
    #pragma omp parallel for collapse(2) schedule(dynamic) if (BIG(q))
    for (int i = 0; i < count; i++)
        for (int h = 0; h < heads; h++) {
            span s = spans[i];
            int kv = h / group * d;
            attention_forward_head(part_of(out, s.q, s.nq, h * d, d), part_of(lse, s.q, s.nq, h, 1),
                                   part_of(q, s.q, s.nq, h * d, d), part_of(k, s.k, s.nk, kv, d),
                                   part_of(v, s.k, s.nk, kv, d), window);
        }
}

//  out = P v:         dv = Pᵀ dout,    dP = dout vᵀ
//  P = softmax(S):    dS = P ⊙ (dP − Δ),   Δ = Σ_c dP_c P_c, a number a row
//  S = q kᵀ/√d:       dq = dS k/√d,    dk = dSᵀ q/√d
//
//  Δ can be had before P and dP: for one query row, where dP_c = dout · v_c over the keys c,
//      Δ  =  Σ_c dP_c P_c  =  Σ_c (dout · v_c) P_c
//         =  dout · Σ_c P_c v_c  =  dout · out
//
//  P is not kept from the forward pass but made again, as exp(S − lse).
static void exp_scores_backward(real *p, real *ds, int n, real lse, real delta)
{
    #pragma omp simd
    for (int c = 0; c < n; c++) {
        p[c] = exp_real(p[c] - lse);                                                // P = exp(S − lse)
        ds[c] = p[c] * (ds[c] - delta);                                             // dS = P ⊙ (dP − Δ)
    }
}

// One head, and what is copied or made of it: of all queries, then of one block of keys, then of one block of
// both. To dq, dk and dv, which are zeroed before, each block adds.
typedef struct {
    mat dq, dk, dv, dout, q, k, v, out, lse;            // (nq, d), or (nk, d) for keys; lse (nq, 1)
    real scale, *delta, *q_panels, *dout_panels;
    slivers q_rows, dout_rows;
    slivers k_turned, v_turned, k_rows;
    real *P, *dS;                                       // (QUERIES, WIDE)
    real *P_down, *dS_down;                             // what sums over queries read: these, or pairs
} attention_head;

// Rows i … of a block that begins with query q0: P, dS, and dq. `from` and `to`: what the block sees.
static void panel_backward(const attention_head *h, key_block b, int q0, int i, int rows, int from, int to)
{
    int d = h->q.cols;
    int begin = seen_from(b, i) / NR * NR, cols = seen_to(b, i + rows - 1) - begin;
    real *P = h->P + i * WIDE, *dS = h->dS + i * WIDE;
    panel_times(P + begin, WIDE, MR, whole_vectors(cols), panel_from(h->q_panels, q0 + i, d), 1, MR,
                columns_from(h->k_turned, begin), d, h->scale, SET);                // P holds S, for now
    panel_times(dS + begin, WIDE, MR, whole_vectors(cols), panel_from(h->dout_panels, q0 + i, d), 1, MR,
                columns_from(h->v_turned, begin), d, 1, SET);                       // dS holds dP, for now
    for (int r = i; r < i + rows; r++) {
        real *p = h->P + r * WIDE, *ds = h->dS + r * WIDE;
        int seen = seen_from(b, r);
        exp_scores_backward(p + seen, ds + seen, seen_to(b, r) - seen, *ROW(h->lse, q0 + r),
                            h->delta[q0 + r]);
        hide_unseen(p, b, r, from, to);
        hide_unseen(ds, b, r, from, to);
    }
    pair_queries(h->P_down + i / 2 * WIDE, P, rows, from, to);
    pair_queries(h->dS_down + i / 2 * WIDE, dS, rows, from, to);
    for (int r = 0; r < rows; r++) pair_keys(dS + r * WIDE + begin, cols);
    panel_times(ROW(h->dq, q0 + i), h->dq.ld, rows, d, dS + begin, WIDE, 1,
                steps_from(h->k_rows, begin), cols, h->scale, ADD);                 // dq += dS k/√d
}

// A block of n queries and the keys `first` …: panel by panel of its queries, then of its keys.
static void block_backward(const attention_head *h, key_block b, int q0, int n, int first)
{
    int d = h->q.cols;
    int from = seen_from(b, 0) / NR * NR, to = seen_to(b, n - 1);
    for (int i = 0; i < n; i += MR) panel_backward(h, b, q0, i, n - i < MR ? n - i : MR, from, to);
    for (int c = from; c < to; c += MR) {
        int rows = to - c < MR ? to - c : MR;
        int r = (b.own < c ? c - b.own : 0) / 2 * 2;            // the first that sees c, or the one before
        int down = steps(r, bf16_pairs) * WIDE + c;
        panel_times(ROW(h->dv, first + c), h->dv.ld, rows, d, h->P_down + down, 1, WIDE,
                    steps_from(h->dout_rows, q0 + r), n - r, 1, ADD);               // dv += Pᵀ dout
        panel_times(ROW(h->dk, first + c), h->dk.ld, rows, d, h->dS_down + down, 1, WIDE,
                    steps_from(h->q_rows, q0 + r), n - r, h->scale, ADD);           // dk += dSᵀ q/√d
    }
}

static void attention_backward_head(attention_head h, int window)
{
    mat q = h.q;
    int q0;
    h.scale = (real)(1 / sqrt(q.cols));
    h.q_panels = copied_panels(2, q);
    h.dout_panels = copied_panels(3, h.dout);
    h.q_rows = copied_slivers(4, q);
    h.dout_rows = copied_slivers(5, h.dout);
    h.P = thread_buffer(6, QUERIES * WIDE);
    h.dS = thread_buffer(7, QUERIES * WIDE);
    h.P_down = bf16_pairs ? thread_buffer(12, QUERIES / 2 * WIDE) : h.P;
    h.dS_down = bf16_pairs ? thread_buffer(13, QUERIES / 2 * WIDE) : h.dS;
    h.delta = thread_buffer(8, (size_t)q.rows);
    for (int r = 0; r < q.rows; r++) {
        const real *o = ROW(h.out, r), *g = ROW(h.dout, r);
        h.delta[r] = SUM(real, c, q.cols, o[c] * g[c]);                             // Δ = dout · out
    }
    for (int first = 0; first < h.k.rows; first += KEYS) {
        key_block b = block_at(q, h.k, first, window, &q0);
        h.k_turned = turned_slivers(9, rows_of(h.k, first, b.keys));
        h.v_turned = turned_slivers(10, rows_of(h.v, first, b.keys));
        h.k_rows = copied_slivers(11, rows_of(h.k, first, b.keys));
        for (; q0 < q.rows && seen_from(b, 0) < b.keys; q0 += QUERIES, b.own += QUERIES)
            block_backward(&h, b, q0, q.rows - q0 < QUERIES ? q.rows - q0 : QUERIES, first);
    }
}

// The heads that share a kv head all add to its dk and dv: one thread does them, one after the other.
void attention_backward(mat dq, mat dk, mat dv, mat dout, mat q, mat k, mat v, mat out, mat lse,
                        int d, int window, const span *spans, int count)
{
    int group = q.cols / k.cols;
    int kv_heads = k.cols / d;
    zero(dq);
    zero(dk);
    zero(dv);
    #pragma omp parallel for collapse(2) schedule(dynamic) if (BIG(q))
    for (int i = 0; i < count; i++)
        for (int g = 0; g < kv_heads; g++)
            for (int h = g * group; h < (g + 1) * group; h++) {
                int q0 = spans[i].q, nq = spans[i].nq, k0 = spans[i].k, nk = spans[i].nk;
                attention_head head = {
                    .dq = part_of(dq, q0, nq, h * d, d), .dout = part_of(dout, q0, nq, h * d, d),
                    .q = part_of(q, q0, nq, h * d, d), .out = part_of(out, q0, nq, h * d, d),
                    .lse = part_of(lse, q0, nq, h, 1),
                    .dk = part_of(dk, k0, nk, g * d, d), .k = part_of(k, k0, nk, g * d, d),
                    .dv = part_of(dv, k0, nk, g * d, d), .v = part_of(v, k0, nk, g * d, d),
                };
                attention_backward_head(head, window);
            }
}

// out = silu(g) u,  silu(g) = g σ(g),  σ(g) = 1/(1 + e^−g)
void swiglu_forward(mat out, mat gate, mat up)
{
    #pragma omp parallel for if (BIG(out))
    for (int n = 0; n < out.rows; n++) {
        real *o = ROW(out, n), *g = ROW(gate, n), *u = ROW(up, n);
        for (int c = 0; c < out.cols; c++) o[c] = g[c] / (1 + exp_real(-g[c])) * u[c];
    }
}

//  dg = dout u σ (1 + g (1 − σ)),   du = dout g σ
void swiglu_backward(mat dgate, mat dup, mat dout, mat gate, mat up)
{
    #pragma omp parallel for if (BIG(dout))
    for (int n = 0; n < dout.rows; n++) {
        real *dg = ROW(dgate, n), *du = ROW(dup, n);
        const real *d = ROW(dout, n), *g = ROW(gate, n), *u = ROW(up, n);
        for (int c = 0; c < dout.cols; c++) {
            real sigma = 1 / (1 + exp_real(-g[c]));
            dg[c] = d[c] * u[c] * sigma * (1 + g[c] * (1 - sigma));
            du[c] = d[c] * g[c] * sigma;
        }
    }
}

//  loss = log Σ exp(z) − z[label]
//  dz   = scale (softmax(z) − [label]),  [label] = 1 at the label, 0 elsewhere
//  The backward pass is done here, while the row z is in cache: what comes in as logits goes out as dz, their
//  gradient. With scale = 0 only the loss is wanted.
void cross_entropy(mat losses, mat logits, dev_ints labels, double scale)
{
    int V = logits.cols;
    #pragma omp parallel for if (BIG(logits))
    for (int n = 0; n < logits.rows; n++) {
        real *z = ROW(logits, n), most = z[0], at_label = z[labels[n]];
        #pragma omp simd reduction(max : most)
        for (int c = 1; c < V; c++) most = z[c] > most ? z[c] : most;
        for (int c = 0; c < V; c++) z[c] = exp_real(z[c] - most);
        double sum = SUM(double, c, V, (double)z[c]);
        *ROW(losses, n) = (real)(log(sum) + (double)(most - at_label));
        if (!scale) continue;
        real factor = (real)(scale / sum);
        for (int c = 0; c < V; c++) z[c] *= factor;
        z[labels[n]] -= (real)scale;
    }
}

// ---- 4  RWKV6 ---------------------------------------------------------------------------------------------

// x̂ = (x − mean) ρ,  ρ = 1 / √(variance + ε), of one part of a row.
typedef struct { real mean, rho; } moments;

static moments moments_of(const real *x, int n, double eps)
{
    double mean = SUM(double, c, n, (double)x[c]) / n;
    double squares = SUM(double, c, n, ((double)x[c] - mean) * ((double)x[c] - mean));
    return (moments){(real)mean, (real)(1 / sqrt(squares / n + eps))};
}

// out = w x̂ + b
void layernorm_forward(mat out, mat x, mat w, mat b, int groups, double eps)
{
    int size = x.cols / groups;
    #pragma omp parallel for if (BIG(x))
    for (int n = 0; n < x.rows; n++)
        for (int first = 0; first < x.cols; first += size) {
            moments m = moments_of(ROW(x, n) + first, size, eps);
            for (int c = first; c < first + size; c++)
                ROW(out, n)[c] = ROW(w, 0)[c] * (ROW(x, n)[c] - m.mean) * m.rho + ROW(b, 0)[c];
        }
}

//  dw += Σ_n dout x̂,   db += Σ_n dout
//  dx += ρ (g − mean(g) − x̂ mean(g x̂)),   g = w dout
//  for ∂x̂_e/∂x_c = ρ ([e = c] − 1/C − x̂_e x̂_c/C): the mean moves with x, and ρ with its variance
void layernorm_backward(mat dx, mat dw, mat db, mat dout, mat x, mat w, int groups, double eps)
{
    int size = x.cols / groups;
    bias_backward(db, dout);
    #pragma omp parallel for if (BIG(x))
    for (int n = 0; n < (dx.p ? x.rows : 0); n++)
        for (int first = 0; first < x.cols; first += size) {
            const real *xn = ROW(x, n) + first, *wc = ROW(w, 0) + first, *dn = ROW(dout, n) + first;
            real *dxn = ROW(dx, n) + first;
            moments m = moments_of(xn, size, eps);
            double mean = SUM(double, c, size, (double)(wc[c] * dn[c]));
            double along = SUM(double, c, size, (double)(wc[c] * dn[c] * (xn[c] - m.mean) * m.rho));
            real g0 = (real)(mean / size), g1 = (real)(along / size);
            for (int c = 0; c < size; c++)
                dxn[c] += m.rho * (wc[c] * dn[c] - g0 - (xn[c] - m.mean) * m.rho * g1);
        }
    #pragma omp parallel for if (BIG(x))
    for (int first = 0; first < (dw.p ? x.cols : 0); first += size)
        for (int n = 0; n < x.rows; n++) {
            moments m = moments_of(ROW(x, n) + first, size, eps);
            for (int c = first; c < first + size; c++)
                ROW(dw, 0)[c] += ROW(dout, n)[c] * (ROW(x, n)[c] - m.mean) * m.rho;
        }
}

// The span that row n belongs to.
static span span_of(const span *s, int spans, int n)
{
    for (int i = 0; i < spans; i++)
        if (n >= s[i].q && n < s[i].q + s[i].nq) return s[i];
    return (span){n, 1, 0, 1};
}

// The row before row n, in its span; NULL for zeros.
static const real *row_before(mat x, mat before, const span *s, int spans, int n)
{
    span own = span_of(s, spans, n);
    if (n > own.q) return ROW(x, n - 1);
    return before.p && own.nk > own.nq ? ROW(before, own.k) : NULL;
}

// f of row n: μ + m[n]
static inline real mix_at(mat mu, mat m, int n, int c) { return ROW(mu, 0)[c] + (m.p ? ROW(m, n)[c] : 0); }

// out[n] = x[n] + (x[n−1] − x[n]) f,  f = μ + m[n]
void shift_mix_forward(mat out, mat x, mat before, mat mu, mat m, const span *s, int spans)
{
    #pragma omp parallel for if (BIG(x))
    for (int n = 0; n < x.rows; n++) {
        const real *xn = ROW(x, n), *prev = row_before(x, before, s, spans, n);
        for (int c = 0; c < x.cols; c++)
            ROW(out, n)[c] = xn[c] + ((prev ? prev[c] : 0) - xn[c]) * mix_at(mu, m, n, c);
    }
}

//  dx[n] += dout[n] (1 − f[n]) + dout[n+1] f[n+1], the next row of the same span
//  dm[n]  = dout[n] (x[n−1] − x[n]),   dμ += Σ_n dm[n]
void shift_mix_backward(mat dx, mat dmu, mat dm, mat dout, mat x, mat mu, mat m, const span *s, int spans)
{
    enum { COLUMNS = 64 };
    mat none = {0};
    #pragma omp parallel for if (BIG(x))
    for (int n = 0; n < x.rows; n++) {
        const real *xn = ROW(x, n), *prev = row_before(x, none, s, spans, n), *d = ROW(dout, n);
        int has_next = n + 1 < x.rows && row_before(x, none, s, spans, n + 1);
        for (int c = 0; c < (dx.p ? x.cols : 0); c++) ROW(dx, n)[c] += d[c] * (1 - mix_at(mu, m, n, c));
        for (int c = 0; c < (dx.p && has_next ? x.cols : 0); c++)
            ROW(dx, n)[c] += ROW(dout, n + 1)[c] * mix_at(mu, m, n + 1, c);
        for (int c = 0; c < (dm.p ? x.cols : 0); c++) ROW(dm, n)[c] = d[c] * ((prev ? prev[c] : 0) - xn[c]);
    }
    #pragma omp parallel for if (BIG(x))
    for (int c0 = 0; c0 < (dmu.p ? x.cols : 0); c0 += COLUMNS)
        for (int n = 0; n < x.rows; n++) {
            const real *xn = ROW(x, n), *prev = row_before(x, none, s, spans, n), *d = ROW(dout, n);
            for (int c = c0; c < x.cols && c < c0 + COLUMNS; c++)
                ROW(dmu, 0)[c] += d[c] * ((prev ? prev[c] : 0) - xn[c]);
        }
}

void tanh_forward(mat y, mat x)
{
    #pragma omp parallel for if (BIG(x))
    for (int n = 0; n < x.rows; n++)
        for (int c = 0; c < x.cols; c++) ROW(y, n)[c] = (real)tanh((double)ROW(x, n)[c]);
}

void tanh_backward(mat dx, mat dy, mat y)
{
    #pragma omp parallel for if (BIG(y))
    for (int n = 0; n < y.rows; n++)
        for (int c = 0; c < y.cols; c++) ROW(dx, n)[c] = ROW(dy, n)[c] * (1 - ROW(y, n)[c] * ROW(y, n)[c]);
}

void relu2_forward(mat y, mat x)
{
    #pragma omp parallel for if (BIG(x))
    for (int n = 0; n < x.rows; n++)
        for (int c = 0; c < x.cols; c++) {
            real above = ROW(x, n)[c] > 0 ? ROW(x, n)[c] : 0;
            ROW(y, n)[c] = above * above;
        }
}

void relu2_backward(mat dx, mat dy, mat x)
{
    #pragma omp parallel for if (BIG(x))
    for (int n = 0; n < x.rows; n++)
        for (int c = 0; c < x.cols; c++)
            ROW(dx, n)[c] = ROW(x, n)[c] > 0 ? 2 * ROW(x, n)[c] * ROW(dy, n)[c] : 0;
}

// y += σ(r) x
void sigmoid_gate_forward(mat y, mat r, mat x)
{
    #pragma omp parallel for if (BIG(x))
    for (int n = 0; n < x.rows; n++)
        for (int c = 0; c < x.cols; c++) ROW(y, n)[c] += ROW(x, n)[c] / (1 + exp_real(-ROW(r, n)[c]));
}

//  dr = dy x σ (1 − σ),   dx = dy σ
void sigmoid_gate_backward(mat dr, mat dx, mat dy, mat r, mat x)
{
    #pragma omp parallel for if (BIG(x))
    for (int n = 0; n < x.rows; n++)
        for (int c = 0; c < x.cols; c++) {
            real sigma = 1 / (1 + exp_real(-ROW(r, n)[c])), d = ROW(dy, n)[c];
            ROW(dr, n)[c] = d * ROW(x, n)[c] * sigma * (1 - sigma);
            ROW(dx, n)[c] = d * sigma;
        }
}

// What one head reads at one token; e is the decay exp(−exp(w)).
typedef struct { const real *r, *k, *v, *w, *u; } wkv_token;

static wkv_token wkv_at(mat r, mat k, mat v, mat w, mat u, int n, int h)
{
    int c = h * u.cols;
    return (wkv_token){ROW(r, n) + c, ROW(k, n) + c, ROW(v, n) + c, ROW(w, n) + c, ROW(u, h)};
}

static real decay(real w) { return exp_real(-exp_real(w)); }

// S[i][j] = e_i S[i][j] + k_i v_j
static void wkv_step(real *S, wkv_token t, int d)
{
    for (int i = 0; i < d; i++) {
        real e = decay(t.w[i]);
        for (int j = 0; j < d; j++) S[i * d + j] = e * S[i * d + j] + t.k[i] * t.v[j];
    }
}

// y_j = Σ_i r_i (S[i][j] + u_i k_i v_j)
static void wkv_out(real *y, const real *S, wkv_token t, int d)
{
    for (int j = 0; j < d; j++) y[j] = 0;
    for (int i = 0; i < d; i++) {
        real bonus = t.u[i] * t.k[i];
        for (int j = 0; j < d; j++) y[j] += t.r[i] * (S[i * d + j] + bonus * t.v[j]);
    }
}

// A thread has a head of a text, and walks through its tokens.
void wkv6_forward(mat y, mat state, mat r, mat k, mat v, mat w, mat u, const span *s, int spans)
{
    int heads = u.rows;
    int d = u.cols;
    size_t bytes = (size_t)(d * d) * sizeof(real);
    #pragma omp parallel for collapse(2) schedule(dynamic) if (BIG(r))
    for (int i = 0; i < spans; i++)
        for (int h = 0; h < heads; h++) {
            real *S = thread_buffer(2, (size_t)(d * d));
            real *kept = state.p ? ROW(state, s[i].k) + h * d * d : NULL;
            if (kept && s[i].nk > s[i].nq) memcpy(S, kept, bytes);
            else memset(S, 0, bytes);
            for (int n = s[i].q; n < s[i].q + s[i].nq; n++) {
                wkv_token t = wkv_at(r, k, v, w, u, n, h);
                wkv_out(ROW(y, n) + h * d, S, t, d);
                wkv_step(S, t, d);
            }
            if (kept) memcpy(kept, S, bytes);
        }
}

//  With S before a token, and dS the gradient of S behind it, which is 0 behind the last one:
//      dr_i = Σ_j S[i][j] dy_j  + u_i k_i (v·dy)
//      dk_i = Σ_j dS[i][j] v_j  + u_i r_i (v·dy)
//      dv_j = Σ_i dS[i][j] k_i  + (Σ_i r_i u_i k_i) dy_j
//      du_i += r_i k_i (v·dy)
//      dw_i = −exp(w_i) q_i,   q_i = e_i Σ_j dS[i][j] S[i][j]    for e = exp(−exp(w)),  de/dw = −exp(w) e
//      and the gradient of S before the token is e_i dS[i][j] + r_i dy_j.
//  S is known on the way forward only, dS on the way back only. But q needs neither: between two tokens let
//  p_i = Σ_j of S[i][j] times its gradient. Then
//      p behind the token  = Σ_j dS[i][j] (e_i S[i][j] + k_i v_j)   = q_i + k_i Σ_j dS[i][j] v_j
//      p in front of it    = Σ_j (e_i dS[i][j] + r_i dy_j) S[i][j]  = q_i + r_i Σ_j S[i][j] dy_j
//  so p runs from 0 behind the last token to the first, and leaves q on its way. These sums cancel: what is
//  left of them is all in double, and an e that is nothing beside 1 leaves no q, which exp(w) would blow up.
typedef struct { real *r, *k, *v, *w, *u; } wkv_grads;

// The room of one head of a text: S or its gradient, p, v and dy of a token, and Σ_j S[i][j] dy_j of all.
typedef struct { double *S, *p, *v, *dy, *dv, *Sdy; } wkv_room;

static wkv_room wkv_room_of(int d, int tokens)
{
    size_t n = (size_t)d;
    double *all = (double *)thread_buffer(2, (n + 4 + (size_t)tokens) * n * (sizeof(double) / sizeof(real)));
    double *rows = all + n * n;
    return (wkv_room){all, rows, rows + n, rows + 2 * n, rows + 3 * n, rows + 4 * n};
}

static void clear(double *x, int n) { memset(x, 0, (size_t)n * sizeof *x); }

static void read_token(wkv_room m, wkv_token t, const real *dy, int d)
{
    for (int j = 0; j < d; j++) m.v[j] = (double)t.v[j], m.dy[j] = (double)dy[j];
}

// A number of S, or of dS, which becomes e S + x: the one before.
static inline double passed(double *S, double e, double x)
{
    double before = *S;
    *S = e * before + x;
    return before;
}

// On the way forward: Σ_j S[i][j] dy_j, then S behind the token.
static void wkv_token_forward(double *Sdy, wkv_room m, wkv_token t, int d)
{
    for (int i = 0; i < d; i++) {
        double *S = m.S + i * d, e = (double)decay(t.w[i]), k = (double)t.k[i];
        Sdy[i] = SUM(double, j, d, m.dy[j] * passed(S + j, e, k * m.v[j]));
    }
}

// On the way back: all gradients of the token, then dS in front of it.
static void wkv_token_backward(wkv_grads g, const double *Sdy, wkv_room m, wkv_token t, int d)
{
    double vdy = 0;
    double ruk = 0;
    for (int j = 0; j < d; j++) vdy += m.v[j] * m.dy[j];
    for (int i = 0; i < d; i++) ruk += (double)(t.r[i] * t.u[i] * t.k[i]);
    for (int j = 0; j < d; j++) m.dv[j] = ruk * m.dy[j];
    for (int i = 0; i < d; i++) {
        double *dS = m.S + i * d;
        double e = (double)decay(t.w[i]), r = (double)t.r[i], k = (double)t.k[i], u = (double)t.u[i];
        for (int j = 0; j < d; j++) m.dv[j] += dS[j] * k;
        double dSv = SUM(double, j, d, m.v[j] * passed(dS + j, e, r * m.dy[j]));
        double q = 1 + e > 1 ? m.p[i] - k * dSv : 0;
        m.p[i] = q + r * Sdy[i];
        g.r[i] = (real)(Sdy[i] + u * k * vdy);
        g.k[i] = (real)(dSv + u * r * vdy);
        g.w[i] = -exp_real(t.w[i]) * (real)q;
        if (g.u) g.u[i] += (real)(r * k * vdy);
    }
    for (int j = 0; j < d; j++) g.v[j] = (real)m.dv[j];
}

// A text of one head, there and back.
static void wkv6_backward_head(mat dr, mat dk, mat dv, mat dw, mat du, mat dy,
                               mat r, mat k, mat v, mat w, mat u, span s, int h)
{
    int d = u.cols;
    int c = h * d;
    wkv_room m = wkv_room_of(d, s.nq);
    clear(m.S, d * d);
    for (int n = s.q; n < s.q + s.nq; n++) {
        wkv_token t = wkv_at(r, k, v, w, u, n, h);
        read_token(m, t, ROW(dy, n) + c, d);
        wkv_token_forward(m.Sdy + (n - s.q) * d, m, t, d);
    }
    clear(m.S, d * d);                                          // dS from here on
    clear(m.p, d);
    for (int n = s.q + s.nq - 1; n >= s.q; n--) {
        wkv_token t = wkv_at(r, k, v, w, u, n, h);
        wkv_grads g = {ROW(dr, n) + c, ROW(dk, n) + c, ROW(dv, n) + c, ROW(dw, n) + c,
                       du.p ? ROW(du, h) : NULL};
        read_token(m, t, ROW(dy, n) + c, d);
        wkv_token_backward(g, m.Sdy + (n - s.q) * d, m, t, d);
    }
}

// The texts of a head one after the other, so that du is added up in their order.
void wkv6_backward(mat dr, mat dk, mat dv, mat dw, mat du, mat dy,
                   mat r, mat k, mat v, mat w, mat u, const span *s, int spans)
{
    #pragma omp parallel for schedule(dynamic) if (BIG(r))
    for (int h = 0; h < u.rows; h++)
        for (int i = 0; i < spans; i++)
            wkv6_backward_head(dr, dk, dv, dw, du, dy, r, k, v, w, u, s[i], h);
}

// ---- 5  adapters ------------------------------------------------------------------------------------------

// s[c] = Σ_j x[j·r + c], row by row; the last shard may be short.
void shard_sum(mat s, mat x)
{
    int r = s.cols;
    #pragma omp parallel for if (BIG(x))
    for (int n = 0; n < x.rows; n++) {
        real *sn = ROW(s, n), *xn = ROW(x, n);
        memset(sn, 0, (size_t)r * sizeof *sn);
        for (int j = 0, part; j < x.cols; j += part) {
            part = x.cols - j < r ? x.cols - j : r;
            for (int c = 0; c < part; c++) sn[c] += xn[j + c];
        }
    }
}

// The same shards.
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

// u_j = x_j B_jᵀ,   x̃ = x + u,   sum = Σ_j u_j.  x̃ is made in u's own place.
void block_diagonal_forward(mat x_tilde, mat sum, mat x, mat B, mat room)
{
    (void)room;
    int r = B.rows;
    matmul_nt(column_blocks(x_tilde, r), column_blocks(x, r), B, 1, SET);
    shard_sum(sum, x_tilde);
    add(x_tilde, x, 1);
}

//  du_j = dx̃_j + g:   dB_j += du_jᵀ x_j,   dx_j = or += dx̃_j + du_j B_j.  du is made in dx̃'s own place.
void block_diagonal_backward(mat dx, mat dB, mat dx_tilde, mat g, mat x, mat B, mat room, enum mode mode)
{
    (void)room;
    int r = B.rows;
    mat du = column_blocks(dx_tilde, r);
    if (dx.p && mode == SET) copy(dx, dx_tilde);
    else if (dx.p) add(dx, dx_tilde, 1);
    shard_tile(dx_tilde, g);
    matmul_tn(dB, du, column_blocks(x, r), 1, ADD);
    if (dx.p) matmul_nn(column_blocks(dx, r), du, B, 1, ADD);
}

void tiled_identity(mat e)
{
    int r = e.rows < e.cols ? e.rows : e.cols;
    for (int i = 0; i < e.rows; i++)
        for (int j = 0; j < e.cols; j++) ROW(e, i)[j] = i % r == j % r;
}

// 1 if g is (rows, 1), a number for each row of x; 0 if it is (1, cols), a number for each column.
static int for_rows(mat g, mat x, const char *op)
{
    int rows = g.rows == x.rows && g.cols == 1;
    if (!rows && (g.rows != 1 || g.cols != x.cols))
        die("%s: (%d, %d) does not fit (%d, %d)", op, g.rows, g.cols, x.rows, x.cols);
    return rows;
}

void broadcast_mul(mat y, mat x, mat g, double scale, enum mode mode)
{
    if (!y.p) return;
    int rows = for_rows(g, x, "broadcast_mul");
    #pragma omp parallel for if (BIG(x))
    for (int n = 0; n < x.rows; n++) {
        real *yn = ROW(y, n), *xn = ROW(x, n), *gn = ROW(g, rows ? n : 0);
        for (int c = 0; c < x.cols; c++)
            yn[c] = (mode == ADD ? yn[c] : 0) + (real)scale * xn[c] * gn[rows ? 0 : c];
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
            const real *u = widened(at(x, n, c), x.type, (size_t)part, a);
            const real *v = widened(at(y, n, c), y.type, (size_t)part, b);
            sum += SUM(double, j, part, (double)u[j] * (double)v[j]);
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
        for (int j = 0; j < part; j++)
            ROW(g, 0)[c0 + j] = (mode == ADD ? ROW(g, 0)[c0 + j] : 0) + (real)(scale * sums[j]);
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

// ---- 6  training ------------------------------------------------------------------------------------------

// Sums of 64K numbers, then the sum of those: the order does not depend on the threads.
double sum_of_squares(mat x)
{
    enum { PIECE = 1 << 16 };
    size_t n = elements(x), pieces = (n + PIECE - 1) / PIECE;
    double *sums = alloc(pieces, sizeof *sums), total = 0;
    #pragma omp parallel for if (BIG(x))
    for (size_t i = 0; i < pieces; i++) {
        const real *p = (real *)x.p + i * PIECE;
        int count = n - i * PIECE < PIECE ? (int)(n - i * PIECE) : PIECE;
        sums[i] = SUM(double, j, count, (double)p[j] * (double)p[j]);
    }
    for (size_t i = 0; i < pieces; i++) total += sums[i];
    free(sums);
    return total;
}

// PyTorch's AdamW (arXiv 1711.05101): decay apart from the gradient, moments corrected for their zero start.
//   m = β₁ m + (1 − β₁) g,   v = β₂ v + (1 − β₂) g²,   w = w (1 − lr decay) − lr m̂ / (√v̂ + ε)
//   m̂ = m / (1 − β₁ᵗ),   v̂ = v / (1 − β₂ᵗ);   β₁ = 0.9, β₂ = 0.999, ε = 1e-8
void adamw(mat w, mat dw, mat m, mat v, double lr, double decay, double grad_scale, int t)
{
    const wide c1 = (wide)(1 - 0.9), b2 = (wide)0.999, c2 = (wide)(1 - 0.999), eps = (wide)1e-8;
    const wide shrink = (wide)(1 - lr * decay);
    const wide rate = (wide)(lr / (1 - pow(0.9, t)));
    const wide root = (wide)sqrt(1 - pow(0.999, t));
    wide *wp = w.p, *dp = dw.p, *mp = m.p, *vp = v.p;
    size_t n = elements(w);
    #pragma omp parallel for simd if (parallel : BIG(w))           // a nameless `if` would ask simd, too
    for (size_t i = 0; i < n; i++) {
        wide g = (wide)grad_scale * dp[i];
        mp[i] += c1 * (g - mp[i]);
        vp[i] = b2 * vp[i] + c2 * g * g;
        wp[i] = wp[i] * shrink - rate * mp[i] / ((wide)sqrt(vp[i]) / root + eps);
    }
}
