//  lib/svd.h: the top of a singular value decomposition, without a library.

#ifndef SVD_H
#define SVD_H
#include "../ops/mat.h"

//  The top r singular triples of W (out, in), by block power iteration (subspace iteration; Halko, Martinsson, Tropp
//  2011, arXiv 0909.4061): Q ← orth(orth(Q Wᵀ) W) turns a random block of b rows towards the top right-singular
//  vectors; the error of the i-th shrinks by (σ_b/σ_i)² a round, so a few spare rows (b > r) pay. Vectors are stored as
//  rows. Then W ≈ Yᵀ Z with Y (b, out) orthonormal and Z = Y W = L Q, and Jacobi takes the small L (b, b) apart.

static double dot(const wide *x, const wide *y, int n)
{
    double sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += (double)x[i] * (double)y[i];
    return sum;
}

// x (b, n) = L Q: rows of x made orthonormal in place by Gram-Schmidt, done twice so that they stay so to the last bit.
// L (b, b), lower triangle, may be NULL. A row that depends on the earlier ones is replaced by zeros: L has a zero there.
// Threads share the earlier rows, then the columns: no sum is cut, so the bits do not depend on how many there are.
static void orthonormal_rows(wide *x, int b, int n, double *L)
{
    double *c = alloc((size_t)b, sizeof *c);
    for (int i = 0; i < b; i++) {
        wide *xi = x + (size_t)i * (size_t)n;
        double before = sqrt(dot(xi, xi, n));
        for (int pass = 0; pass < 2; pass++) {
            #pragma omp parallel for if ((double)i * n > 1e5)
            for (int j = 0; j < i; j++) {
                c[j] = dot(xi, x + (size_t)j * (size_t)n, n);
                if (L) L[i * b + j] += c[j];
            }
            #pragma omp parallel for if ((double)i * n > 1e5)
            for (int k0 = 0; k0 < n; k0 += 512)
                for (int j = 0; j < i; j++)
                    for (int k = k0; k < n && k < k0 + 512; k++) xi[k] -= (wide)c[j] * x[(size_t)j * (size_t)n + (size_t)k];
        }
        double norm = sqrt(dot(xi, xi, n));
        int independent = norm > 8 * before * (sizeof(wide) == 8 ? 2.2e-16 : 1.2e-7);
        for (int k = 0; k < n; k++) xi[k] = independent ? (wide)((double)xi[k] / norm) : 0;
        if (L) L[i * b + i] = independent ? norm : 0;
    }
    free(c);
}

// One-sided Jacobi (Hestenes 1958): rotates pairs of rows of L (b, b) until all are orthogonal; J L = Σ Vᵀ.
static void jacobi(double *L, double *J, int b)
{
    for (int i = 0; i < b * b; i++) J[i] = i % (b + 1) == 0;
    double off = 1;
    for (int sweep = 0; sweep < 60 && off > 1e-15; sweep++) {
        off = 0;
        for (int p = 0; p < b; p++)
            for (int q = p + 1; q < b; q++) {
                double pp = 0, qq = 0, pq = 0;
                for (int k = 0; k < b; k++) pp += L[p * b + k] * L[p * b + k], qq += L[q * b + k] * L[q * b + k], pq += L[p * b + k] * L[q * b + k];
                double limit = sqrt(pp * qq);
                if (fabs(pq) <= 1e-15 * limit) continue;
                off = fmax(off, fabs(pq) / limit);
                double zeta = (qq - pp) / (2 * pq), t = (zeta < 0 ? -1 : 1) / (fabs(zeta) + sqrt(1 + zeta * zeta));
                double c = 1 / sqrt(1 + t * t), s = c * t;
                for (double *M = L; M; M = M == L ? J : NULL)
                    for (int k = 0; k < b; k++) {
                        double x = M[p * b + k], y = M[q * b + k];
                        M[p * b + k] = c * x - s * y, M[q * b + k] = s * x + c * y;
                    }
            }
    }
}

typedef struct { wide *U, *sigma, *V; } svd;            // U (r, out), σ (r) falling, V (r, in): W ≈ Σ σ_i U_i V_iᵀ

// Turns the bases Y (b, out), Q (b, in) by the SVD of L, and picks the r largest.
static svd svd_assemble(const wide *Y, const wide *Q, double *L, int b, int r, int out, int in)
{
    svd f = {alloc((size_t)r * (size_t)out, sizeof(wide)), alloc((size_t)r, sizeof(wide)), alloc((size_t)r * (size_t)in, sizeof(wide))};
    double *J = alloc((size_t)b * (size_t)b, sizeof *J);
    char *taken = alloc((size_t)b, 1);
    jacobi(L, J, b);
    for (int i = 0; i < r; i++) {
        int best = 0;
        double most = -1;
        for (int p = 0; p < b; p++) {
            double s = 0;
            for (int k = 0; k < b; k++) s += L[p * b + k] * L[p * b + k];
            if (!taken[p] && s > most) best = p, most = s;
        }
        taken[best] = 1;
        double sigma = sqrt(most);
        f.sigma[i] = (wide)sigma;
        for (int k = 0; k < b; k++) {
            wide u = (wide)J[best * b + k], v = sigma > 0 ? (wide)(L[best * b + k] / sigma) : 0;
            for (int j = 0; j < out; j++) f.U[(size_t)i * (size_t)out + (size_t)j] += u * Y[(size_t)k * (size_t)out + (size_t)j];
            for (int j = 0; j < in; j++) f.V[(size_t)i * (size_t)in + (size_t)j] += v * Q[(size_t)k * (size_t)in + (size_t)j];
        }
    }
    free(J), free(taken);
    return f;
}

// y (b, ·) = x W or x Wᵀ on the device, x and y on the host.
static void times_weight(wide *y, const wide *x, mat W, int transposed, int b)
{
    shape in = SHAPE(b, transposed ? W.cols : W.rows), out = SHAPE(b, transposed ? W.rows : W.cols);
    mat a = mat_of(NULL, TYPE_OF(wide), in), c = mat_of(NULL, TYPE_OF(wide), out);
    a.p = dev_alloc(elements(a) * sizeof(wide)), c.p = dev_alloc(elements(c) * sizeof(wide));
    if (!a.p || !c.p) die("out of memory in the SVD of a %d by %d weight", W.rows, W.cols);
    put(a, x, TYPE_OF(wide));
    if (transposed) matmul_nt(c, a, W, 1, SET);
    else matmul_nn(c, a, W, 1, SET);
    get(y, c);
    dev_free(a.p), dev_free(c.p);
}

static svd svd_top(mat W, int r, rng g)
{
    int out = W.rows, in = W.cols, small = out < in ? out : in, b = r + 8 + r / 2 < small ? r + 8 + r / 2 : small;
    // In float 32 rounds find a random matrix's values, the slowest kind, to 1e-4, and any that fall faster to the last bits.
    int most = sizeof(wide) == 8 ? 200 : 32;
    wide *Q = alloc((size_t)b * (size_t)in, sizeof *Q), *Y = alloc((size_t)b * (size_t)out, sizeof *Y);
    double *L = alloc((size_t)b * (size_t)b, sizeof *L), last = 0, sum = 0;
    for (size_t i = 0; i < (size_t)b * (size_t)in; i++) Q[i] = (wide)rng_normal(&g);
    orthonormal_rows(Q, b, in, NULL);
    for (int round = 0; round < most; round++, last = sum) {
        times_weight(Y, Q, W, 1, b);                    // Y = orth(Q Wᵀ)   (b, out)
        orthonormal_rows(Y, b, out, NULL);
        times_weight(Q, Y, W, 0, b);                    // Z = Y W = L Q    (b, in)
        memset(L, 0, (size_t)b * (size_t)b * sizeof *L);
        orthonormal_rows(Q, b, in, L);
        sum = 0;
        for (int i = 0; i < r; i++) sum += L[i * b + i];            // settles when the top r have
        if (fabs(sum - last) <= (sizeof(wide) == 8 ? 1e-14 : 1e-6) * sum) break;
    }
    svd f = svd_assemble(Y, Q, L, b, r, out, in);
    free(Q), free(Y), free(L);
    return f;
}

#endif
