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
//  When to stop. L = Y W Qᵀ, so L_ii = Y_i W Q_iᵀ. For any orthonormal Y and Q the sum of the first r of
//  these is at most σ_1 + … + σ_r. It reaches that only where L is symmetric, and a triangle is symmetric
//  only if it is diagonal: Y_i and Q_i are then the singular vectors, and L_ii is σ_i. So the sum of L's
//  diagonal, which costs nothing, shows how far the rounds have come.
//
//  They end when a round changes the sum by less than 1e-6 of itself (1e-14 in double), or after `most`
//  rounds. That is no accuracy: it is what one more round gained, and where σ falls slowly many small gains
//  are still to come. Random matrices are bad that way. At 1024 × 1024 and r = 36 in float, `most` ends it:
//  the last round still changes the sum by 1e-4 of itself, and the sum is 1e-3 too small. Jacobi, which also
//  uses what L has beside its diagonal, does better: of five such matrices, the worst σ of each was wrong by
//  4e-5 to 3e-4. Where σ falls faster, less is missing.

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

// The SVD of W from W ≈ Yᵀ L Q. With L = Jᵀ Σ Vᵀ (jacobi), row i of U is row i of J Y, and row i of V is
// row i of Vᵀ Q. Picks the r largest of the b.
static svd svd_assemble(const wide *Y, const wide *Q, double *L, int b, int r, int out, int in)
{
    svd f = {
        .U = alloc((size_t)r * (size_t)out, sizeof(wide)),
        .sigma = alloc((size_t)r, sizeof(wide)),
        .V = alloc((size_t)r * (size_t)in, sizeof(wide)),
    };
    double *J = alloc((size_t)b * (size_t)b, sizeof *J);
    char *taken = alloc((size_t)b, 1);
    jacobi(L, J, b);
    for (int i = 0; i < r; i++) {
        int best = 0;
        double most = -1;
        for (int p = 0; p < b; p++) {
            double s = 0;
            for (int k = 0; k < b; k++) s += L[p * b + k] * L[p * b + k];
            if (taken[p] || s <= most) continue;
            best = p;
            most = s;
        }
        taken[best] = 1;
        double sigma = sqrt(most);
        f.sigma[i] = (wide)sigma;
        wide *ui = f.U + (size_t)i * (size_t)out, *vi = f.V + (size_t)i * (size_t)in;
        for (int k = 0; k < b; k++) {
            wide u = (wide)J[best * b + k];
            wide v = sigma > 0 ? (wide)(L[best * b + k] / sigma) : 0;
            for (int j = 0; j < out; j++) ui[j] += u * Y[(size_t)k * (size_t)out + (size_t)j];
            for (int j = 0; j < in; j++) vi[j] += v * Q[(size_t)k * (size_t)in + (size_t)j];
        }
    }
    free(J);
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

// The rounds described on top. After `most` of them it ends, settled or not.
static svd svd_top(mat W, int r, rng g)
{
    int out = W.rows, in = W.cols;
    int small = out < in ? out : in;
    int b = r + 8 + r / 2 < small ? r + 8 + r / 2 : small;
    int most = sizeof(wide) == 8 ? 200 : 32;
    wide *Q = alloc((size_t)b * (size_t)in, sizeof *Q);
    wide *Y = alloc((size_t)b * (size_t)out, sizeof *Y);
    double *L = alloc((size_t)b * (size_t)b, sizeof *L);
    double last = 0, sum = 0;
    for (size_t i = 0; i < (size_t)b * (size_t)in; i++) Q[i] = (wide)rng_normal(&g);
    orthonormal_rows(Q, b, in, NULL);
    for (int round = 0; round < most; round++, last = sum) {
        times_weight(Y, Q, W, 1, b);                    // Y = orth(Q Wᵀ)   (b, out)
        orthonormal_rows(Y, b, out, NULL);
        times_weight(Q, Y, W, 0, b);                    // Z = Y W = L Q    (b, in)
        memset(L, 0, (size_t)b * (size_t)b * sizeof *L);
        orthonormal_rows(Q, b, in, L);
        sum = 0;
        for (int i = 0; i < r; i++) sum += L[i * b + i];            // at most σ_1 + … + σ_r
        if (fabs(sum - last) <= (sizeof(wide) == 8 ? 1e-14 : 1e-6) * sum) break;
    }
    svd f = svd_assemble(Y, Q, L, b, r, out, in);
    free(Q);
    free(Y);
    free(L);
    return f;
}

#endif
