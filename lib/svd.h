//  lib/svd.h: the top of a singular value decomposition, without a library.

#ifndef SVD_H
#define SVD_H
#include "../ops/mat.h"

//  The top r singular triples of W (out, in), by block power iteration (subspace iteration; Halko,
//  Martinsson, Tropp 2011, arXiv 0909.4061). Vectors are stored as rows. One round, from a block Q (b, in),
//  random at first:
//
//      Y = orth(Q Wᵀ)    (b, out)
//      Z = Y W           (b, in)      Z = L Q: the new Q = orth(Z), and L (b, b) is lower triangular
//
//  A round multiplies Q with Wᵀ W, so the part of it along the i-th right-singular vector grows by σ_i².
//  The block has b rows and must lose what lies along the (b+1)-th and later ones: the error in the i-th
//  vector shrinks by (σ_{b+1}/σ_i)² a round. That is why b > r: a few spare rows make σ_{b+1} smaller, and
//  all r converge faster. At the end W ≈ Yᵀ Z = Yᵀ L Q, and Jacobi finds the SVD of the small L.
//
//  What a block holds. Y and Q are orthonormal, and W ≈ Yᵀ L Q within them: L's singular values are at most
//  those of W, whatever the block, and reach them as it turns. Jacobi finds them, L = Jᵀ Σ Vᵀ, in every round:
//  L is small. Then the rows of Vᵀ Q are taken on, each about a singular vector.
//
//  The filter. Where σ falls slowly a plain round gains little. But what the parts are multiplied by need not
//  be σ²: it may be any polynomial of σ². Chebyshev's T_m stays within −1 … 1 on −1 … 1 and grows beyond as no
//  other of its degree does. With a = the least σ² of L, which is about that of W's b-th, what is to be lost
//  lies in 0 … a. So a round begins with
//
//      Q  =  Q T_m(2 WᵀW/a − 1),       T_0 = 1,   T_1(x) = x,   T_{k+1}(x) = 2 x T_k(x) − T_{k−1}(x)
//
//  (Zhou, Saad, Tiago, Chelikowsky 2006, "Self-consistent-field calculations using Chebyshev-filtered subspace
//  iteration".) For a random 1024 × 1024 and b = 62, the part along v_36 gains 1.1 on that along v_63 in a plain
//  round, and 50 by T_7. m is as large as lets v_1 grow by √(1/ε), so that rounding hides no other vector, and
//  8 at most. Where σ falls fast m is 0 or 1, and rounds are plain.
//
//  When to stop. The rounds end when one changes the sum of the r largest σ by less than 1e-6 of itself (1e-14 in
//  double), or after `most` of them. That is no accuracy: it is what one more round gained.

static double dot(const wide *x, const wide *y, int n)
{
    double sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += (double)x[i] * (double)y[i];
    return sum;
}

// Wide memory of the device, for a while.
static mat on_device(int rows, int cols)
{
    mat m = mat_of(NULL, TYPE_OF(wide), SHAPE(rows, cols));
    m.p = dev_alloc(elements(m) * sizeof(wide));
    if (!m.p) die("out of memory in the SVD: %d by %d numbers", rows, cols);
    return m;
}

// x (k, n) = L Q for a few rows: makes the rows of x orthonormal in place, which are then Q, by Gram-Schmidt.
// It is done twice, for the first pass leaves a rounding error along the earlier rows. before (k) are the
// lengths that the rows had once. L, `across` numbers from row to row, is added to; NULL: not wanted.
static void orthonormal_few(wide *x, int k, int n, const double *before, double *L, int across)
{
    for (int i = 0; i < k; i++) {
        wide *xi = x + (size_t)i * (size_t)n;
        for (int pass = 0; pass < 2; pass++)
            for (int j = 0; j < i; j++) {
                const wide *xj = x + (size_t)j * (size_t)n;
                double c = dot(xi, xj, n);
                if (L) L[i * across + j] += c;
                for (int e = 0; e < n; e++) xi[e] -= (wide)c * xj[e];
            }
        double norm = sqrt(dot(xi, xi, n));
        int independent = norm > 8 * before[i] * (sizeof(wide) == 8 ? 2.2e-16 : 1.2e-7);
        for (int e = 0; e < n; e++) xi[e] = independent ? (wide)((double)xi[e] / norm) : 0;
        if (L) L[i * across + i] = independent ? norm : 0;
    }
}

// x (b, n) = L Q: makes the rows of x orthonormal in place, which are then Q. L (b, b), a lower triangle, may
// be NULL, else it holds zeros on entry. A row that depends on the earlier ones is replaced by zeros, and its
// L_ii is 0.
//
// A few rows at a time lose what lies along all rows before them, twice, by products of matrices:
//
//     C = X Qᵀ  (k, i0),   X −= C Q        X: rows i0 … i0+k-1,  Q: the rows before, orthonormal already
//
// and are then made orthonormal among themselves.
static void orthonormal_rows(wide *x, int b, int n, double *L)
{
    enum { TOGETHER = 8 };
    mat all = on_device(b, n), products = on_device(TOGETHER, b);
    wide *c = alloc(TOGETHER * (size_t)b, sizeof *c);
    put(all, x, TYPE_OF(wide));
    for (int i0 = 0; i0 < b; i0 += TOGETHER) {
        int k = b - i0 < TOGETHER ? b - i0 : TOGETHER;
        wide *few = x + (size_t)i0 * (size_t)n;
        double before[TOGETHER];
        mat X = rows_of(all, i0, k), Q = rows_of(all, 0, i0);
        for (int i = 0; i < k; i++) before[i] = sqrt(dot(few + i * n, few + i * n, n));
        for (int pass = 0; pass < 2 && i0; pass++) {
            mat C = shaped(products, 1, k, i0);
            matmul_nt(C, X, Q, 1, SET);
            matmul_nn(X, C, Q, -1, ADD);
            if (!L) continue;                           // so that nobody waits for the device
            get(c, C);
            for (int i = 0; i < k; i++)
                for (int j = 0; j < i0; j++) L[(i0 + i) * b + j] += (double)c[i * i0 + j];
        }
        if (i0) get(few, X);
        orthonormal_few(few, k, n, before, L ? L + i0 * b + i0 : NULL, b);
        put(X, few, TYPE_OF(wide));
    }
    dev_free(all.p);
    dev_free(products.p);
    free(c);
}

// One-sided Jacobi (Hestenes 1958): rotates pairs of rows of L (b, b) until all are orthogonal. J has the
// same rotations: J L_before = L_after = Σ Vᵀ. So the length of a row of L is a singular value, its
// direction the right-singular vector, and the same row of J the left-singular one.
static void jacobi(double *L, double *J, int b)
{
    for (int i = 0; i < b * b; i++) J[i] = i % (b + 1) == 0;
    double off = 1;
    for (int sweep = 0; sweep < 60 && off > 1e-15; sweep++) {
        off = 0;
        for (int p = 0; p < b; p++)
            for (int q = p + 1; q < b; q++) {
                double pp = 0, qq = 0, pq = 0;
                for (int k = 0; k < b; k++) {
                    pp += L[p * b + k] * L[p * b + k];
                    qq += L[q * b + k] * L[q * b + k];
                    pq += L[p * b + k] * L[q * b + k];
                }
                double limit = sqrt(pp * qq);
                if (fabs(pq) <= 1e-15 * limit) continue;
                off = fmax(off, fabs(pq) / limit);
                double zeta = (qq - pp) / (2 * pq);
                double t = (zeta < 0 ? -1 : 1) / (fabs(zeta) + sqrt(1 + zeta * zeta));    // tan of the angle
                double c = 1 / sqrt(1 + t * t);
                double s = c * t;
                for (double *M = L; M; M = M == L ? J : NULL)           // rows p and q of L, then of J
                    for (int k = 0; k < b; k++) {
                        double x = M[p * b + k], y = M[q * b + k];
                        M[p * b + k] = c * x - s * y;
                        M[q * b + k] = s * x + c * y;
                    }
            }
    }
}

typedef struct { wide *U, *sigma, *V; } svd;    // U (r, out), σ (r) falling, V (r, in): W ≈ Σ σ_i U_iᵀ V_i

static double row_norm(const double *L, int b, int i)
{
    double s = 0;
    for (int k = 0; k < b; k++) s += L[i * b + k] * L[i * b + k];
    return sqrt(s);
}

// The SVD of W from W ≈ Yᵀ L Q. With L = Jᵀ Σ Vᵀ, of which jacobi() has left J and, as L, Σ Vᵀ: row i of U is
// row i of J Y, and row i of V is row i of Vᵀ Q. Picks the r largest of the b.
static svd svd_assemble(const wide *Y, const wide *Q, const double *L, const double *J, int b, int r, int out, int in)
{
    svd f = {
        .U = alloc((size_t)r * (size_t)out, sizeof(wide)),
        .sigma = alloc((size_t)r, sizeof(wide)),
        .V = alloc((size_t)r * (size_t)in, sizeof(wide)),
    };
    char *taken = alloc((size_t)b, 1);
    for (int i = 0; i < r; i++) {
        int best = 0;
        double sigma = -1;
        for (int p = 0; p < b; p++) {
            double s = row_norm(L, b, p);
            if (taken[p] || s <= sigma) continue;
            best = p;
            sigma = s;
        }
        taken[best] = 1;
        f.sigma[i] = (wide)sigma;
        wide *ui = f.U + (size_t)i * (size_t)out, *vi = f.V + (size_t)i * (size_t)in;
        for (int k = 0; k < b; k++) {
            wide u = (wide)J[best * b + k];
            wide v = sigma > 0 ? (wide)(L[best * b + k] / sigma) : 0;
            for (int j = 0; j < out; j++) ui[j] += u * Y[(size_t)k * (size_t)out + (size_t)j];
            for (int j = 0; j < in; j++) vi[j] += v * Q[(size_t)k * (size_t)in + (size_t)j];
        }
    }
    free(taken);
    return f;
}

// y (b, ·) = x W or x Wᵀ on the device, x and y on the host.
static void times_weight(wide *y, const wide *x, mat W, int transposed, int b)
{
    mat a = on_device(b, transposed ? W.cols : W.rows);
    mat c = on_device(b, transposed ? W.rows : W.cols);
    put(a, x, TYPE_OF(wide));
    if (transposed) matmul_nt(c, a, W, 1, SET);
    else matmul_nn(c, a, W, 1, SET);
    get(y, c);
    dev_free(a.p);
    dev_free(c.p);
}

// The largest degree m ≤ 8 at which T_m multiplies the largest σ² with no more than √(1/ε); a: of what is to be
// lost the largest σ². T_m(x) = cosh(m acosh x) where x ≥ 1.
static int filter_degree(double largest, double a)
{
    double growth = sizeof(wide) == 8 ? 6.7e7 : 2.9e3, x = a > 0 ? 2 * largest / a - 1 : 0;
    return x > 1 ? (int)fmin(8, acosh(growth) / acosh(x)) : 0;
}

// Q = Q T_m(2 WᵀW/a − 1)  (b, in).
static void filter(wide *Q, mat W, double a, int m, int b)
{
    size_t n = (size_t)b * (size_t)W.cols;
    wide *before = alloc(n, sizeof *before), *now = alloc(n, sizeof *now);         // Q T_{k−1}, Q T_k
    wide *H = alloc((size_t)b * (size_t)W.rows, sizeof *H), *next = alloc(n, sizeof *next);
    memcpy(now, Q, n * sizeof *now);
    for (int k = 0; k < m; k++) {
        times_weight(H, now, W, 1, b);
        times_weight(next, H, W, 0, b);
        for (size_t i = 0; i < n; i++) {
            wide x_now = (wide)(2 / a) * next[i] - now[i];                          // (2 WᵀW/a − 1) of Q T_k
            next[i] = k ? 2 * x_now - before[i] : x_now;
        }
        wide *free_again = before;
        before = now, now = next, next = free_again;
    }
    memcpy(Q, now, n * sizeof *now);
    free(before), free(now), free(next), free(H);
}

// x (b, n) = Vᵀ x, from L = Σ Vᵀ. A row of zeros stays one.
static void turn_rows(wide *x, const double *L, int b, int n)
{
    mat from = on_device(b, n), turn = on_device(b, b), to = on_device(b, n);
    wide *V = alloc((size_t)b * (size_t)b, sizeof *V);
    for (int i = 0; i < b; i++) {
        double sigma = row_norm(L, b, i);
        for (int k = 0; k < b; k++) V[i * b + k] = sigma > 0 ? (wide)(L[i * b + k] / sigma) : 0;
    }
    put(from, x, TYPE_OF(wide)), put(turn, V, TYPE_OF(wide));
    matmul_nn(to, turn, from, 1, SET);
    get(x, to);
    dev_free(from.p), dev_free(turn.p), dev_free(to.p);
    free(V);
}

static int falling(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x < y) - (x > y);
}

// The rounds described on top. After `most` of them it ends, settled or not.
static svd svd_top(mat W, int r, rng g)
{
    int out = W.rows, in = W.cols;
    int small = out < in ? out : in;
    int b = r + 8 + r / 2 < small ? r + 8 + r / 2 : small;
    int most = sizeof(wide) == 8 ? 60 : 12;
    wide *Q = alloc((size_t)b * (size_t)in, sizeof *Q);
    wide *Y = alloc((size_t)b * (size_t)out, sizeof *Y);
    double *L = alloc((size_t)b * (size_t)b, sizeof *L), *J = alloc((size_t)b * (size_t)b, sizeof *J);
    double *sigma = alloc((size_t)b, sizeof *sigma), last = 0, sum = 0;
    for (size_t i = 0; i < (size_t)b * (size_t)in; i++) Q[i] = (wide)rng_normal(&g);
    orthonormal_rows(Q, b, in, NULL);
    for (int round = 0; round < most; round++, last = sum) {
        if (round) {
            double a = sigma[b - 1] * sigma[b - 1];
            turn_rows(Q, L, b, in);
            filter(Q, W, a, filter_degree(sigma[0] * sigma[0], a), b);
        }
        times_weight(Y, Q, W, 1, b);                    // Y = orth(Q Wᵀ)   (b, out)
        orthonormal_rows(Y, b, out, NULL);
        times_weight(Q, Y, W, 0, b);                    // Z = Y W = L Q    (b, in)
        memset(L, 0, (size_t)b * (size_t)b * sizeof *L);
        orthonormal_rows(Q, b, in, L);
        jacobi(L, J, b);
        for (int i = 0; i < b; i++) sigma[i] = row_norm(L, b, i);
        qsort(sigma, (size_t)b, sizeof *sigma, falling);
        sum = 0;
        for (int i = 0; i < r; i++) sum += sigma[i];                // at most σ_1 + … + σ_r
        if (fabs(sum - last) <= (sizeof(wide) == 8 ? 1e-14 : 1e-6) * sum) break;
    }
    svd f = svd_assemble(Y, Q, L, J, b, r, out, in);
    free(Q), free(Y), free(L), free(J), free(sigma);
    return f;
}

#endif
