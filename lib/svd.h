//  lib/svd.h: the top of a singular value decomposition, without a library.

#ifndef SVD_H
#define SVD_H
#include "../ops/mat.h"

//  The top r singular triples of W (out, in), by block power iteration that keeps every power (block Lanczos:
//  Golub, Luk, Overton 1981; from a random start Musco, Musco 2015, arXiv 1504.05477). Vectors are stored as
//  rows, in two bases that grow by a block of b = 12 rows at a time:
//
//      Y+ = orth(V+ Wᵀ)   (b, out)     orthonormal, to the rows of Y before as well:  V Wᵀ = L Y
//      V+ = orth(Y+ W)    (b, in)      likewise in V: the next block.                 L: a lower triangle
//
//  A turn multiplies with Wᵀ W, so the part of a row along the i-th right-singular vector grows by σ_i². Plain
//  power iteration keeps the last block alone, which after q turns is the first one times (WᵀW)^q. V has all of
//  them, the first times 1, WᵀW, …, (WᵀW)^q, and so the first times every polynomial of that degree. Among these
//  is the one that tells the wanted σ² from the others best, and nobody has to find it: L's singular values are
//  the largest that can be had within the bases. They are at most those of W, and reach them as the bases grow.
//
//  When there is no room for more rows they are condensed. Jacobi takes L apart, L = Jᵀ Σ K, and the rows of J V
//  and K Y for the largest σ are kept, some more than r: there V Wᵀ = Σ Y. Then the bases grow again, from the
//  block that was to come next (thick restart: Baglama, Reichel 2005).
//
//  When to stop. What one more product would add to the sum of the r largest σ is known (next_gain). Where it
//  is less than 2.5e-7 of the sum, the sum is right to 1e-6: where σ falls as slowly as in a random matrix, four
//  times as much was still missing. (1e-15 in double.) But of vectors that share one σ a block finds b at most.
//  So the bases grow once more from a new random block, and only if that adds nothing, it is the end.

// Of one rounding; of what Jacobi leaves: its square is what the lengths are off by.
#define EPSILON (sizeof(wide) == 8 ? 2.2e-16 : 1.2e-7)
#define JACOBI_LEAST (sizeof(wide) == 8 ? 1e-14 : 1e-8)

static double dot(const wide *x, const wide *y, int n)
{
    return SUM(double, i, n, (double)x[i] * (double)y[i]);
}

// Wide memory of the device, for a while.
static mat on_device(int rows, int cols)
{
    mat m = mat_of(NULL, TYPE_OF(wide), SHAPE(rows, cols));
    m.p = dev_alloc(elements(m) * sizeof(wide));
    if (!m.p) die("out of memory in the SVD: %d by %d numbers", rows, cols);
    return m;
}

// Makes k rows of x (k, n) orthonormal in place, by Gram-Schmidt. A row of which no more is left than `least`
// of its length `before` depends on the others, and becomes zeros. Returns how many did.
static int orthonormal_few(wide *x, int k, int n, const double *before, double least)
{
    int dependent = 0;
    for (int i = 0; i < k; i++) {
        wide *xi = x + (size_t)i * (size_t)n;
        for (int j = 0; j < i; j++) {
            const wide *xj = x + (size_t)j * (size_t)n;
            double c = dot(xi, xj, n);
            for (int e = 0; e < n; e++) xi[e] -= (wide)c * xj[e];
        }
        double norm = sqrt(dot(xi, xi, n));
        int independent = norm > least * before[i];
        for (int e = 0; e < n; e++) xi[e] = independent ? (wide)((double)xi[e] / norm) : 0;
        dependent += !independent;
    }
    return dependent;
}

// Makes rows i0 … i0+b-1 of x orthonormal, to each other and to all rows before them, which are so already. A
// row that depends on those before becomes zeros. Returns how many did.
//
// A few rows at a time lose what lies along all rows before them, by products of matrices,
//
//     C = X Qᵀ  (k, i),   X −= C Q        X: rows i … i+k-1,  Q: the rows before, orthonormal already
//
// and are then made orthonormal among themselves. Both are done twice. The first time, rounding may leave a
// hundredth along Q of a row that has lost most of its length. The second time takes that out.
static int orthonormal(mat x, int i0, int b)
{
    enum { TOGETHER = 12 };
    int dependent = 0;
    mat products = on_device(TOGETHER, i0 + b);
    wide *few = alloc(TOGETHER * (size_t)x.cols, sizeof *few);
    for (int i = i0; i < i0 + b; i += TOGETHER) {
        int k = i0 + b - i < TOGETHER ? i0 + b - i : TOGETHER;
        double before[TOGETHER];
        mat X = rows_of(x, i, k), Q = rows_of(x, 0, i), C = shaped(products, 1, k, i);
        get(few, X);
        for (int again = 0; again < 2; again++) {
            for (int j = 0; j < k; j++) before[j] = sqrt(dot(few + j * x.cols, few + j * x.cols, x.cols));
            if (i) {
                matmul_nt(C, X, Q, 1, SET);
                matmul_nn(X, C, Q, -1, ADD);
                get(few, X);
            }
            int zeros = orthonormal_few(few, k, x.cols, before, again ? 0.5 : 100 * EPSILON);
            put(X, few, TYPE_OF(wide));
            if (again) dependent += zeros;
        }
    }
    dev_free(products.p);
    free(few);
    return dependent;
}

static void turn_two(double *a, double *c, int n, double cosine, double sine)
{
    for (int k = 0; k < n; k++) {
        double x = a[k], y = c[k];
        a[k] = cosine * x - sine * y;
        c[k] = sine * x + cosine * y;
    }
}

static double square_of(const double *row, int n) { return SUM(double, k, n, row[k] * row[k]); }

// One-sided Jacobi (Hestenes 1958): rotates pairs of rows of L (b, b) until all are orthogonal. J has the
// same rotations: J L_before = L_after = Σ K. So the length of a row of L is a singular value, its direction
// the right-singular vector, and the same row of J the left-singular one. Of a pair, what one row's square
// loses the other's gains: squares are summed once a sweep.
static void jacobi(double *L, double *J, int b)
{
    for (int i = 0; i < b * b; i++) J[i] = i % (b + 1) == 0;
    double off = 1, *squares = alloc((size_t)b, sizeof *squares);
    for (int sweep = 0; sweep < 60 && off > JACOBI_LEAST; sweep++) {
        off = 0;
        for (int p = 0; p < b; p++) squares[p] = square_of(L + p * b, b);
        for (int p = 0; p < b; p++)
            for (int q = p + 1; q < b; q++) {
                double *a = L + p * b, *c = L + q * b, pp = squares[p], qq = squares[q];
                double pq = SUM(double, k, b, a[k] * c[k]);
                double limit = sqrt(fabs(pp * qq));             // a square that is all rounding may be below 0
                if (fabs(pq) <= JACOBI_LEAST * limit) continue;
                off = fmax(off, fabs(pq) / limit);
                double zeta = (qq - pp) / (2 * pq);
                double t = (zeta < 0 ? -1 : 1) / (fabs(zeta) + sqrt(1 + zeta * zeta));    // tan of the angle
                double cosine = 1 / sqrt(1 + t * t), sine = cosine * t;
                turn_two(a, c, b, cosine, sine);
                turn_two(J + p * b, J + q * b, b, cosine, sine);
                squares[p] -= t * pq;
                squares[q] += t * pq;
            }
    }
    free(squares);
}

typedef struct { wide *U, *sigma, *V; } svd;    // U (r, out), σ (r) falling, V (r, in): W ≈ Σ σ_i U_iᵀ V_i

typedef struct { double sigma; int row; } singular;

static int falling(const void *a, const void *b)
{
    double x = ((const singular *)a)->sigma, y = ((const singular *)b)->sigma;
    return (x < y) - (x > y);
}

// basis[i] = Σ_k T[order[i].row, k]/divide_i basis[k] for the first `keep` of its n rows; divide_i is σ_i or 1.
static void condense(mat basis, const double *T, const singular *order, int by_sigma, int keep, int n)
{
    mat t = on_device(keep, n), y = on_device(keep, basis.cols);
    wide *rows = alloc(elements(t), sizeof *rows);
    for (int i = 0; i < keep; i++) {
        double divide = by_sigma && order[i].sigma > 0 ? order[i].sigma : 1;
        for (int k = 0; k < n; k++) rows[i * n + k] = (wide)(T[order[i].row * n + k] / divide);
    }
    put(t, rows, TYPE_OF(wide));
    matmul_nn(y, t, rows_of(basis, 0, n), 1, SET);
    copy(rows_of(basis, 0, keep), y);
    dev_free(t.p), dev_free(y.p);
    free(rows);
}

// Makes V's rows i … i+b-1 orthonormal. Rows that lead nowhere new begin again, as random sums of W's rows.
static void next_block(mat V, int i, int b, mat W, rng *g)
{
    if (!orthonormal(V, i, b)) return;
    mat random = on_device(b, W.rows);
    wide *v = alloc((size_t)W.cols, sizeof *v), *row = alloc((size_t)W.rows, sizeof *row);
    for (int k = 0; k < b; k++) {
        get(v, rows_of(V, i + k, 1));
        if (dot(v, v, W.cols) > 0) continue;
        for (int j = 0; j < W.rows; j++) row[j] = (wide)rng_normal(g);
        put(rows_of(random, k, 1), row, TYPE_OF(wide));
    }
    matmul_nn(rows_of(V, i, b), random, W, 1, ADD);
    orthonormal(V, i, b);
    dev_free(random.p);
    free(v), free(row);
}

// L = Z Yᵀ, what of Z's rows lies along Y's; rows of L are `across` apart.
static void coefficients(double *L, int across, mat Z, mat Y)
{
    mat l = on_device(Z.rows, Y.rows);
    matmul_nt(l, Z, Y, 1, SET);
    wide *x = on_host(l);
    for (int i = 0; i < Z.rows; i++)
        for (int j = 0; j < Y.rows; j++) L[i * across + j] = (double)x[i * Y.rows + j];
    dev_free(l.p);
    free(x);
}

// Lets the bases grow from k to `room` rows, and L with them. V's first k + b are there; in the end it has b
// more than `room`, unless W has no more, and `beyond` (b, b) holds what lies along those of Y W's last b rows.
static void grow(mat V, mat Y, mat W, double *L, double *beyond, int k, int b, rng *g)
{
    int room = Y.rows;
    mat Z = on_device(b, W.rows), Zv = on_device(b, W.cols);
    for (; k < room; k += b) {
        if (b > room - k) b = room - k;
        mat y = rows_of(Y, k, b);
        Z = rows_of(Z, 0, b), Zv = rows_of(Zv, 0, b);
        matmul_nt(Z, rows_of(V, k, b), W, 1, SET);              // Z  = V+ Wᵀ
        copy(y, Z);
        orthonormal(Y, k, b);                                   // Y+ = orth(Z)
        coefficients(L + k * room, room, Z, rows_of(Y, 0, k + b));
        if (k + b == W.rows || k + b == W.cols) break;
        mat v = rows_of(V, k + b, b);
        matmul_nn(Zv, y, W, 1, SET);                            // V+ = orth(Y+ W)
        copy(v, Zv);
        next_block(V, k + b, b, W, g);
        if (k + b == room) coefficients(beyond, b, Zv, v);
    }
    dev_free(Z.p), dev_free(Zv.p);
}

// What one more product would add to the sum of the r largest σ. For u = row i of K Y,  Wᵀu = σ_i v + what lies
// along the next block, h; it is longer than σ_i by |h|²/2σ_i.
static double next_gain(const double *L, const singular *order, const double *beyond, int r, int room, int b)
{
    double sum = 0;
    for (int i = 0; i < r && order[i].sigma > 0; i++)
        for (int j = 0; j < b; j++) {
            double h = 0, sigma = order[i].sigma;
            for (int k = 0; k < b; k++) h += L[order[i].row * room + room - b + k] / sigma * beyond[k * b + j];
            sum += h * h / (2 * sigma);
        }
    return sum;
}

// The rounds described on top. After MOST of them it ends, settled or not.
static svd svd_top(mat W, int r, rng g)
{
    enum { MOST = 100, BLOCK = 12 };                                // 12: whole tiles of products
    int small = W.rows < W.cols ? W.rows : W.cols;
    int keep = (ceil_div(r, BLOCK) + 1) * BLOCK, room = keep + 6 * BLOCK, settled = 0;
    if (room > small) room = small;
    if (keep > room) keep = room;
    int b = room == small ? room : BLOCK;                           // a small W in one block, as a whole
    mat V = on_device(room + BLOCK, W.cols), Y = on_device(room, W.rows);
    size_t squares = (size_t)room * (size_t)room;
    double *L = alloc(squares, sizeof *L), *J = alloc(squares, sizeof *J), beyond[BLOCK * BLOCK];
    double least = sizeof(wide) == 8 ? 1e-15 : 2.5e-7, sum = 0;
    singular *order = alloc((size_t)room, sizeof *order);
    next_block(V, 0, b, W, &g);                                     // rows of zeros: all begin
    for (int round = 0; round < MOST; round++) {
        double before = sum;
        grow(V, Y, W, L, beyond, round ? keep : 0, b, &g);
        jacobi(L, J, room);                                         // L = Jᵀ Σ K
        for (int i = 0; i < room; i++) order[i] = (singular){sqrt(square_of(L + i * room, room)), i};
        qsort(order, (size_t)room, sizeof *order, falling);
        condense(V, J, order, 0, keep, room);
        condense(Y, L, order, 1, keep, room);
        if (room == small) break;                                   // nothing is outside of V
        sum = 0;
        for (int i = 0; i < r; i++) sum += order[i].sigma;
        if (settled && sum - before <= 4 * least * sum) break;
        settled = next_gain(L, order, beyond, r, room, b) <= least * sum;
        mat next = rows_of(V, keep, b);
        if (settled) zero(next), next_block(V, keep, b, W, &g);
        else copy(next, rows_of(V, room, b));
        memset(L, 0, squares * sizeof *L);
        for (int i = 0; i < keep; i++) L[i * room + i] = order[i].sigma;
    }
    svd f = {on_host(rows_of(Y, 0, r)), alloc((size_t)r, sizeof(wide)), on_host(rows_of(V, 0, r))};
    for (int i = 0; i < r; i++) f.sigma[i] = (wide)order[i].sigma;
    dev_free(V.p), dev_free(Y.p);
    free(L), free(J), free(order);
    return f;
}

#endif
