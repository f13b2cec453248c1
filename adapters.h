/*  adapters.h: one page per method.

    A method says how one linear layer y = x Wᵀ is fine-tuned: x (N, in), W (out, in), y (N, out). The papers'
    W₀ is l->W here. A page holds the equation, why step 0 changes nothing, what trains, then layout, init,
    forward, backward, merge. Each backward line quotes the forward line it differentiates. The table
    methods[] at the end is the list of all of them.

      full, frozen · LoRA, rsLoRA, LoRA+ · DoRA · PiSSA, OLoRA · LoRA-GA · Bone, mini · DiSHA ·
      Bat · Bat-row · Bat-free

    The words of the pages (the functions are in model.h and ops/mat.h):

      declare        makes a tensor of some kind under its name in the file, with a gradient or with NULL
      PARAM, START   kinds: it trains, with a gradient and AdamW's two moments; it stays as it began (A0, B0)
      ACT, AUX       kinds: a row of each x, kept from forward to backward; kept likewise, but no such rows
      SHAPE          the size of a tensor: SHAPE(n), SHAPE(rows, cols) or SHAPE(batch, rows, cols)
      reserve        asks for work space, shared by all layers and overwritten all the time: narrow (N, r),
                     broad (N, in or out), weight (out, in)
      shaped         a view of the same memory, front to back, as batch × rows × cols; nothing is copied
      aligned        such a view of work space, rows × cols, of which each row begins at 16 bytes; pitch(r) is
                     how far r columns then reach
      first, last    q, k, v read the same x, and so do gate, up: is this linear the first of them, the last?
      scale          s of y += s (x Aᵀ) Bᵀ: α/r, or α/√r
      SET, ADD       the op writes y = …, or y += …; `mode` is what the caller of forward wants for y, and
                     the caller of backward for dx: the first product that writes it takes `mode`, the
                     others add. Thin products come before the one with W, which hides the time in which
                     y is read again
      S(x)           Bone's sum over the shards of x, in m->narrow. The first of the linears that read x
                     writes it. The others find it there: nobody else writes m->narrow before the last      */

#ifndef ADAPTERS_H
#define ADAPTERS_H
#include "lib/svd.h"
#include "backbones.h"

// ---- full and frozen --------------------------------------------------------------------------------------
//
//  full      y = x Wᵀ            trains W itself, and embeddings and norms with it
//  frozen    y = x (W + ΔW)ᵀ     trains ΔW (out, in), which starts at 0; W stays. The same gradient as full
//                                over the same matrices: the ceiling for every adapter below
//  d:        dx = dy W           dW += dyᵀ x      (where W is frozen, dW has no memory: no product)

static void full_forward(model *m, linear *l, mat y, mat x, enum mode mode)
{
    (void)m;
    matmul_nt(y, x, l->W, 1, mode);                     // y = x Wᵀ
}

static void full_backward(model *m, linear *l, mat dx, mat dy, mat x, enum mode mode)
{
    (void)m;
    matmul_nn(dx, dy, l->W, 1, mode);                   // y = x Wᵀ:  dx  = dy W
    matmul_tn(l->dW, dy, x, 1, ADD);                    //            dW += dyᵀ x
}

static void frozen_layout(model *m, linear *l, const char *name)
{
    declare(m, PARAM, &l->D, &l->dD, SHAPE(l->W.rows, l->W.cols), "%s.delta_weight", name);
    reserve(&m->weight, l->W.rows, l->W.cols);
}

static void frozen_merge(model *m, linear *l, mat W)
{
    (void)m;
    add(W, l->D, 1);                                    // W' = W + ΔW
}

static mat frozen_weight(model *m, linear *l)           // W' in the work space: cheaper than a second product
{
    mat W = shaped(m->weight, 1, l->W.rows, l->W.cols);
    copy(W, l->W);
    frozen_merge(m, l, W);
    return W;
}

static void frozen_forward(model *m, linear *l, mat y, mat x, enum mode mode)
{
    matmul_nt(y, x, frozen_weight(m, l), 1, mode);      // y = x W'ᵀ
}

static void frozen_backward(model *m, linear *l, mat dx, mat dy, mat x, enum mode mode)
{
    matmul_nn(dx, dy, frozen_weight(m, l), 1, mode);    // y = x W'ᵀ:    dx = dy W'
    matmul_tn(l->dD, dy, x, 1, ADD);                    // W' = W + ΔW:  dΔW = dW' += dyᵀ x
}

// ---- LoRA (arXiv 2106.09685) ------------------------------------------------------------------------------
//
//  y = x Wᵀ + s (x Aᵀ) Bᵀ,   A (r, in), B (out, r),   s = α/r
//
//  A starts kaiming-uniform with a = √5, that is uniform in ±1/√in, and B at zero: s B A = 0, so step 0
//  changes nothing. But then dA = s (dy B)ᵀ x is zero at step 0 too, and only B moves: LoRA starts slowly.
//  r (in + out) parameters. q, k and v each multiply x with an A of their own. One product with all three A
//  would save 0.5 % of a step in each direction at best (doc/gpu-speed.md).
//
//  rsLoRA (arXiv 2312.03732): s = α/√r, so that a larger rank does not shrink the update.
//  LoRA+  (arXiv 2402.12354): B learns λ times faster than A.

static void lora_layout(model *m, linear *l, const char *name)
{
    int r = m->p.rank;
    l->scale = m->p.alpha / r;
    declare(m, PARAM, &l->A, &l->dA, SHAPE(r, l->W.cols), "%s.lora_A.weight", name);
    declare(m, PARAM, &l->B, &l->dB, SHAPE(l->W.rows, r), "%s.lora_B.weight", name);
    declare(m, ACT, &l->h, NULL, SHAPE(m->p.tokens, pitch(r)), "%s.h", name);
    l->h = first_columns(l->h, r);                      // h (N, r) in aligned rows
    reserve(&m->dnarrow, m->p.tokens, r);
    reserve(&m->weight, l->W.rows, l->W.cols);
}

static void rslora_layout(model *m, linear *l, const char *name)
{
    lora_layout(m, l, name);
    l->scale = m->p.alpha / sqrt(m->p.rank);
}

static void lora_plus_layout(model *m, linear *l, const char *name)
{
    ptrdiff_t first = arrlen(m->tensors);
    lora_layout(m, l, name);
    for (ptrdiff_t i = first; i < arrlen(m->tensors); i++)
        if (m->tensors[i].value == &l->B) m->tensors[i].rate = m->p.plus_ratio;     // λ
}

static void lora_init(model *m, linear *l, const char *name)
{
    rng r = rng_named(m->p.seed, name);
    size_t n = elements(l->A);
    wide *a = alloc(n, sizeof *a);
    for (size_t i = 0; i < n; i++) a[i] = (wide)((2 * rng_uniform(&r) - 1) / sqrt(l->W.cols));
    put(l->A, a, TYPE_OF(wide));
    zero(l->B);
    free(a);
}

static void lora_forward(model *m, linear *l, mat y, mat x, enum mode mode)
{
    (void)m;
    matmul_nt(l->h, x, l->A, 1, SET);                   // h  = x Aᵀ           (N, r)
    matmul_nt(y, l->h, l->B, l->scale, mode);           // y  = s h Bᵀ
    matmul_nt(y, x, l->W, 1, ADD);                      // y += x Wᵀ
}

static void lora_backward(model *m, linear *l, mat dx, mat dy, mat x, enum mode mode)
{
    mat dh = aligned(m->dnarrow, l->h.rows, l->h.cols);
    matmul_tn(l->dB, dy, l->h, l->scale, ADD);          // y  = s h Bᵀ:  dB += s dyᵀ h
    matmul_nn(dh, dy, l->B, l->scale, SET);             //               dh  = s dy B
    matmul_tn(l->dA, dh, x, 1, ADD);                    // h  = x Aᵀ:    dA += dhᵀ x
    matmul_nn(dx, dh, l->A, 1, mode);                   //               dx  = dh A
    matmul_nn(dx, dy, l->W, 1, ADD);                    // y += x Wᵀ:    dx += dy W
}

static void lora_merge(model *m, linear *l, mat W)
{
    (void)m;
    matmul_nn(W, l->B, l->A, l->scale, ADD);            // W' = W + s B A
}

// ---- DoRA (arXiv 2402.09353) ------------------------------------------------------------------------------
//
//  LoRA for the direction of each row of W, and a number of its own for its length:
//
//     y = z ⊙ g,    z = x Vᵀ,    V = W + s B A,    g_o = m_o / ‖V_o‖,    m (out)
//
//  B = 0 and m_o = ‖W_o‖: g = 1, so step 0 changes nothing. r (in + out) + out parameters. A row of zeros, as
//  pruned models have them, has no direction: where ‖V_o‖ = 0, g is 1 and neither m_o nor the length has a
//  gradient. (PEFT computes 0/0 there.)
//
//  V is never built. V_o = W_o + s B_o A, with B_o (1, r) row o of B. So the squared length of row o is
//
//     q_o = ‖V_o‖² = ‖W_o‖² + 2 s (B_o A)·W_o + s² ‖B_o A‖²
//                  = ‖W_o‖² + 2 s B_o·(W Aᵀ)_o + s² B_o·(B A Aᵀ)_o                (B_o A)·W_o = B_o·(A W_oᵀ)
//                  = ‖W_o‖² + s B_o·(W Aᵀ)_o + s B_o·[(W Aᵀ)_o + s (B A Aᵀ)_o]    [row o of W Aᵀ + s B A Aᵀ]
//                  = ‖W_o‖² + s B_o·(W Aᵀ)_o + s B_o·(V Aᵀ)_o                     V Aᵀ (out, r)
//
//  d:  y = z ⊙ g:        dz = dy ⊙ g,   dg = Σ_n dy z          then z as LoRA's y
//      g = m q^-½:       dm += dg q^-½,  dq = −½ dg m q^-3/2
//      q_o = ‖V_o‖²:     dV_o = 2 dq_o V_o                     so with C = 2 s dq ⊙ B:
//      V = W + s B A:    dB += s dV Aᵀ = 2 s dq ⊙ (V Aᵀ),      dA += s Bᵀ dV = Cᵀ V = Cᵀ W + s Cᵀ B A
//
//  The paper's section 4.3, and PEFT, take the length for a constant (dq = 0): --dora-detach.

// LoRA's tensors, the magnitude m, and what the backward pass needs of the lengths.
static void dora_layout(model *m, linear *l, const char *name)
{
    int out = l->W.rows;
    int r = m->p.rank;
    lora_layout(m, l, name);
    declare(m, PARAM, &l->mag, &l->dmag, SHAPE(out), "%s.lora_magnitude_vector", name);
    declare(m, ACT, &l->z, NULL, SHAPE(m->p.tokens, out), "%s.z", name);
    declare(m, AUX, &l->VA, NULL, SHAPE(out, r), "%s.VA", name);
    for (mat **v = (mat *[]){&l->gain, &l->squares, &l->dgain, &l->dsquares, NULL}; *v; v++)
        declare(m, AUX, *v, NULL, SHAPE(out, 1), "%s.norm", name);
    reserve(&m->narrow, r, r);
    reserve(&m->broad, m->p.tokens, out);
    reserve(&m->dbroad, out, r);
}

static mat across(mat v) { return shaped(v, 1, 1, v.rows); }       // (out, 1) as (1, out)

// q, g and V Aᵀ from W, A, B and m, by the last line of the expansion above. ‖W_o‖² is summed anew each time:
// to keep it would save 1 % of a step.
static void dora_norms(model *m, linear *l)
{
    int r = l->A.rows;
    mat AA = aligned(m->narrow, r, r);
    matmul_nt(l->VA, l->W, l->A, 1, SET);                           // W Aᵀ                     (out, r)
    matmul_nt(AA, l->A, l->A, 1, SET);
    broadcast_dot(l->squares, l->W, l->W, 1, SET);                  // q  = ‖W_o‖²
    broadcast_dot(l->squares, l->B, l->VA, l->scale, ADD);          // q += s B_o·(W Aᵀ)_o
    matmul_nn(l->VA, l->B, AA, l->scale, ADD);                      // V Aᵀ = W Aᵀ + s B A Aᵀ
    broadcast_dot(l->squares, l->B, l->VA, l->scale, ADD);          // q += s B_o·(V Aᵀ)_o
    magnitude_forward(l->gain, l->mag, l->squares);                 // g  = m / √q
}

// LoRA's start. Then V = W, and m becomes the lengths of W's rows.
static void dora_init(model *m, linear *l, const char *name)
{
    size_t out = elements(l->mag);
    wide *length = alloc(out, sizeof *length);
    lora_init(m, l, name);
    dora_norms(m, l);
    get(length, l->squares);
    for (size_t i = 0; i < out; i++) length[i] = (wide)sqrt(length[i]);
    put(l->mag, length, TYPE_OF(wide));                             // m = ‖W_o‖
    free(length);
}

static void dora_forward(model *m, linear *l, mat y, mat x, enum mode mode)
{
    dora_norms(m, l);
    lora_forward(m, l, l->z, x, SET);                               // z = x Wᵀ + s (x Aᵀ) Bᵀ
    broadcast_mul(y, l->z, across(l->gain), 1, mode);               // y = z ⊙ g
}

// The part of the gradient that comes by way of the lengths.
static void dora_norm_backward(model *m, linear *l)
{
    int r = l->A.rows;
    mat C = aligned(m->dbroad, l->W.rows, r);
    mat CB = aligned(m->narrow, r, r);
    broadcast_mul(C, l->B, l->dsquares, 2 * l->scale, SET);         // q = ‖V_o‖²:    C   = 2 s dq ⊙ B
    broadcast_mul(l->dB, l->VA, l->dsquares, 2 * l->scale, ADD);    // V = W + s B A: dB += 2 s dq ⊙ (V Aᵀ)
    matmul_tn(l->dA, C, l->W, 1, ADD);                              //                dA += Cᵀ W
    matmul_tn(CB, C, l->B, l->scale, SET);
    matmul_nn(l->dA, CB, l->A, 1, ADD);                             //                dA += s Cᵀ B A
}

static void dora_backward(model *m, linear *l, mat dx, mat dy, mat x, enum mode mode)
{
    mat dz = aligned(m->broad, dy.rows, dy.cols);
    broadcast_dot(across(l->dgain), dy, l->z, 1, SET);              // y = z ⊙ g:     dg  = Σ_n dy z
    broadcast_mul(dz, dy, across(l->gain), 1, SET);                 //                dz  = dy ⊙ g
    magnitude_backward(l->dmag, l->dsquares, l->dgain, l->mag, l->squares);
    //                                                                 g = m q^-½:    dm += …, dq = …
    if (!m->p.dora_detach) dora_norm_backward(m, l);
    lora_backward(m, l, dx, dz, x, mode);                           // z = x Wᵀ + s (x Aᵀ) Bᵀ
}

static void dora_merge(model *m, linear *l, mat W)
{
    lora_merge(m, l, W);                                            // V  = W + s B A
    dora_norms(m, l);
    broadcast_mul(W, W, l->gain, 1, SET);                           // W' = g ⊙ V, row by row
}

// ---- PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) ------------------------------------------------
//
//  LoRA with another start: A and B begin as A0 and B0, the most important part of W. What remains of W is
//  the residual weight W_res, so that step 0 changes nothing, and both A and B have a gradient from the first
//  step on:
//
//     y = x W_resᵀ + s (x Aᵀ) Bᵀ,    W_res = W − s B0 A0
//
//  PiSSA:  W ≈ U Σ Vᵀ, the top r by power iteration:   B0 = U √(Σ/s)  (out, r),   A0 = √(Σ/s) Vᵀ  (r, in)
//  OLoRA:  W = Q R:                                    B0 = Q[:, :r],             A0 = R[:r, :]
//
//  W_res is never stored. Most models have W in 16 bits, and W_res would have to be rounded to them. Then
//  step 0 would not be the base, and the saved adapter, which is for the base's own W, would not be what was
//  trained. So W is left as it is, and
//
//     y = x Wᵀ + s (x Aᵀ) Bᵀ − s (x A0ᵀ) B0ᵀ
//
//  The file holds the same as a LoRA of rank 2r, [A; A0] and [B | −B0]. It costs two thin products more in
//  each direction. One product with [A; A0] and one with [B | −B0] would take as long, because A and A0 would
//  first have to be copied side by side into work space, and B and B0 as well.

static void pissa_layout(model *m, linear *l, const char *name)
{
    lora_layout(m, l, name);
    int small = l->W.rows < l->W.cols ? l->W.rows : l->W.cols;
    if (m->p.rank > small)
        refuse(m, "--rank %d exceeds the rank of %s (%d by %d); at most %d works here",
               m->p.rank, name, l->W.rows, l->W.cols, small);
    declare(m, START, &l->A0, NULL, SHAPE(l->A.rows, l->A.cols), "%s.lora_A0", name);
    declare(m, START, &l->B0, NULL, SHAPE(l->B.rows, l->B.cols), "%s.lora_B0", name);
}

static void pissa_forward(model *m, linear *l, mat y, mat x, enum mode mode)
{
    mat h0 = aligned(m->dnarrow, x.rows, l->A0.rows);
    matmul_nt(h0, x, l->A0, 1, SET);                    // h0 = x A0ᵀ          (N, r)
    matmul_nt(y, h0, l->B0, -l->scale, mode);           // y  = −s h0 B0ᵀ
    lora_forward(m, l, y, x, ADD);                      // y += x Wᵀ + s (x Aᵀ) Bᵀ
}

static void pissa_backward(model *m, linear *l, mat dx, mat dy, mat x, enum mode mode)
{
    mat dh0 = aligned(m->dnarrow, x.rows, l->A0.rows);
    matmul_nn(dh0, dy, l->B0, -l->scale, SET);          // y  = −s h0 B0ᵀ:  dh0 = −s dy B0
    matmul_nn(dx, dh0, l->A0, 1, mode);                 // h0 = x A0ᵀ:      dx  = dh0 A0
    lora_backward(m, l, dx, dy, x, ADD);                // y += x Wᵀ + s (x Aᵀ) Bᵀ
}

static void pissa_merge(model *m, linear *l, mat W)
{
    lora_merge(m, l, W);
    matmul_nn(W, l->B0, l->A0, -l->scale, ADD);         // W' = W + s B A − s B0 A0
}

// B0 and A0 from the rows of U (r, out) and V (r, in), each times its √(σ/s). B and A begin there.
static void start_from(linear *l, const wide *U, const wide *sigma, const wide *V)
{
    size_t r = (size_t)l->A.rows;
    size_t in = (size_t)l->A.cols;
    size_t out = (size_t)l->B.rows;
    wide *a = alloc(r * in, sizeof *a);
    wide *b = alloc(r * out, sizeof *b);
    for (size_t k = 0; k < r; k++) {
        wide root = (wide)sqrt((double)sigma[k] / l->scale);
        for (size_t j = 0; j < in; j++) a[k * in + j] = root * V[k * in + j];
        for (size_t i = 0; i < out; i++) b[i * r + k] = root * U[k * out + i];
    }
    put(l->A, a, TYPE_OF(wide));
    put(l->A0, a, TYPE_OF(wide));
    put(l->B, b, TYPE_OF(wide));
    put(l->B0, b, TYPE_OF(wide));
    free(a);
    free(b);
}

static void pissa_init(model *m, linear *l, const char *name)
{
    svd f = svd_top(l->W, m->p.rank, rng_named(m->p.seed, name));
    start_from(l, f.U, f.sigma, f.V);
    free(f.U);
    free(f.sigma);
    free(f.V);
}

// Q from the columns of W, which stand as rows here: the first r of Q need only the first r of W. R = Qᵀ W.
static void olora_init(model *m, linear *l, const char *name)
{
    int r = m->p.rank;
    size_t out = (size_t)l->W.rows;
    mat Q = on_device(r, l->W.rows);
    mat R = on_device(r, l->W.cols);
    wide *columns = on_host(columns_of(l->W, 0, r));    // (out, r)
    wide *rows = alloc((size_t)r * out, sizeof *rows);  // (r, out)
    wide *s = alloc((size_t)r, sizeof *s);
    (void)name;
    for (size_t j = 0; j < (size_t)r; j++)
        for (size_t i = 0; i < out; i++) rows[j * out + i] = columns[i * (size_t)r + j];
    put(Q, rows, TYPE_OF(wide));
    orthonormal(Q, 0, r);
    matmul_nn(R, Q, l->W, 1, SET);                      // R = Qᵀ W, its first r rows
    wide *U = on_host(Q);
    wide *V = on_host(R);
    for (int k = 0; k < r; k++) s[k] = (wide)l->scale;  // so that start_from's √(σ/s) = 1
    start_from(l, U, s, V);
    dev_free(Q.p);
    dev_free(R.p);
    free(columns);
    free(rows);
    free(s);
    free(U);
    free(V);
}

// ---- LoRA-GA (arXiv 2407.05000) ---------------------------------------------------------------------------
//
//  LoRA that begins where full fine-tuning would go. With dW = U Σ Vᵀ, the gradient of the first step's rows,
//
//     A0 = V[:, :r]ᵀ  (r, in),    B0 = out^¼/√γ  U[:, r:2r] Σ[r:2r]  (out, r),    γ = 16
//
//  and PiSSA's residual weight W − s B0 A0, so that step 0 changes nothing. dB = s dW Aᵀ then holds the top r
//  of dW, as much as r columns can. r (in + out) parameters. Scale and choice of vectors are PEFT's defaults
//  ("stable", "ArB2r"); the paper's own code scales A as B and leaves Σ out of it. For the start alone l->dW
//  has memory, and the backward pass adds dW = dyᵀ x into it (first_gradient, at the end).

static void lora_ga_layout(model *m, linear *l, const char *name)
{
    int small = l->W.rows < l->W.cols ? l->W.rows : l->W.cols;
    if (2 * m->p.rank > small)
        refuse(m, "--rank %d: lora-ga takes 2r singular vectors of %s (%d by %d); at most %d works here",
               m->p.rank, name, l->W.rows, l->W.cols, small / 2);
    pissa_layout(m, l, name);
}

// A0 and B0 from the singular vectors of l->dW: the first r of V, and the second r of U.
static void lora_ga_init(model *m, linear *l, const char *name)
{
    int r = m->p.rank;
    int out = l->W.rows;
    svd f = svd_top(l->dW, 2 * r, rng_named(m->p.seed, name));
    wide *U = f.U + (size_t)r * (size_t)out;
    wide *sigma = alloc((size_t)r, sizeof *sigma);
    double stable = sqrt(sqrt(out)) / sqrt(16);
    for (int k = 0; k < r; k++) {
        sigma[k] = (wide)l->scale;                      // so that start_from's √(σ/s) = 1: A = Vᵀ as it is
        for (int i = 0; i < out; i++) U[(size_t)k * (size_t)out + (size_t)i] *= (wide)stable * f.sigma[r + k];
    }
    start_from(l, U, sigma, f.V);
    free(f.U);
    free(f.sigma);
    free(f.V);
    free(sigma);
}

static void lora_ga_backward(model *m, linear *l, mat dx, mat dy, mat x, enum mode mode)
{
    matmul_tn(l->dW, dy, x, 1, ADD);                    // the gradient full fine-tuning would have
    pissa_backward(m, l, dx, dy, x, mode);
}

// ---- Bone, in PEFT: MiSS (arXiv 2409.15371) ---------------------------------------------------------------
//
//  W's input is cut into shards of r columns, and all shards share one trainable D (r, out):
//
//     y = x (W₀ + expand(D))ᵀ = x W₀ᵀ + S(x) D,    expand(D)[o, j·r + c] = D[c, o]     (out, in), never built
//                                                  S(x)[n, c] = Σ_j x[n, j·r + c]      (N, r)
//
//  S(x) adds up the r-wide shards of x. If r does not divide in, the last shard counts as padded with zeros.
//  D = 0: step 0 changes nothing, and yet dD = S(x)ᵀ dy is not zero: the first gradient is large. r·out
//  parameters.
//  q, k, v read one x and so share one S(x); so do gate, up. The first of them sums it up, in the forward
//  pass and again in the backward pass, as x itself is made again there. RMSNorm and SwiGLU, which make x,
//  could sum it up on the way: that would save less than 2 % of a step (train.cu, top; doc/bone.md).
//
//  mini: D (r, mini_r) is tiled along out as well: y[:, o] += (S(x) D)[:, o mod mini_r]. r·mini_r parameters.

static void bone_layout(model *m, linear *l, const char *name)
{
    declare(m, PARAM, &l->D, &l->dD, SHAPE(m->p.rank, l->W.rows), "%s.miss_block", name);
    reserve(&m->narrow, m->p.tokens, m->p.rank);
    reserve(&m->dnarrow, m->p.tokens, m->p.rank);
    reserve(&m->broad, m->p.rank, l->W.cols > l->W.rows ? l->W.cols : l->W.rows);
    reserve(&m->weight, l->W.rows, l->W.cols);
}

static void bone_forward(model *m, linear *l, mat y, mat x, enum mode mode)
{
    mat S = aligned(m->narrow, x.rows, l->D.rows);
    if (l->first) shard_sum(S, x);                      // S  = Σ_j x_j        (N, r); k and v read q's
    matmul_nn(y, S, l->D, 1, mode);                     // y  = S D
    matmul_nt(y, x, l->W, 1, ADD);                      // y += x Wᵀ
}

// Forward and backward go through q, k, v in the same order, so l->first is q in both. It writes S(x), which
// all three read. dS is the sum of what all three make. Its memory is shared by all layers: the first
// overwrites what was left there (SET), the others add (ADD), the last adds dS to dx.
static void bone_backward(model *m, linear *l, mat dx, mat dy, mat x, enum mode mode)
{
    mat S = aligned(m->narrow, x.rows, l->D.rows);
    mat dS = aligned(m->dnarrow, x.rows, l->D.rows);
    if (l->first) shard_sum(S, x);
    matmul_tn(l->dD, S, dy, 1, ADD);                    // y  = S D:      dD += Sᵀ dy
    matmul_nt(dS, dy, l->D, 1, l->first ? SET : ADD);   //                dS += dy Dᵀ
    matmul_nn(dx, dy, l->W, 1, mode);                   // y += x Wᵀ:     dx  = dy W
    if (l->last) shard_tile(dx, dS);                    // S  = Σ_j x_j:  dx_j += dS
}

// W' = W₀ + expand(D), that is W'[:, j·r + c] = W[:, j·r + c] + D[c, :]ᵀ. expand(D) = Dᵀ E, with the tiled
// identity E (r, in), E[c, j·r + c] = 1. For r = 2, in = 4 and out = 1:
//
//     E = [1 0 1 0]        D = [a]        Dᵀ E = [a b | a b]
//         [0 1 0 1]            [b]
static void bone_merge_block(model *m, mat W, mat D)
{
    mat E = aligned(m->broad, D.rows, W.cols);
    tiled_identity(E);
    matmul_tn(W, D, E, 1, ADD);                         // W' = W + Dᵀ E
}

static void bone_merge(model *m, linear *l, mat W) { bone_merge_block(m, W, l->D); }

// m->broad holds z in training and the tiled identity E in a merge, m->dbroad then D tiled along out.
static void mini_layout(model *m, linear *l, const char *name)
{
    int t = m->p.mini_r;
    int rank = m->p.rank;
    int tokens = m->p.tokens;
    if (l->W.rows % t) refuse(m, "--mini-r %d does not divide the %d outputs of %s", t, l->W.rows, name);
    declare(m, PARAM, &l->D, &l->dD, SHAPE(rank, t), "%s.miss_block", name);
    reserve(&m->narrow, tokens, rank);
    reserve(&m->dnarrow, tokens, rank);
    reserve(&m->broad, tokens > rank ? tokens : rank, t > l->W.cols ? t : l->W.cols);
    reserve(&m->dbroad, rank, l->W.rows);
    reserve(&m->weight, l->W.rows, l->W.cols);
}

static void mini_forward(model *m, linear *l, mat y, mat x, enum mode mode)
{
    mat S = aligned(m->narrow, x.rows, l->D.rows);
    mat z = aligned(m->broad, x.rows, l->D.cols);
    if (l->first) shard_sum(S, x);                      // S  = Σ_j x_j        (N, r)
    matmul_nt(y, x, l->W, 1, mode);                     // y  = x Wᵀ
    matmul_nn(z, S, l->D, 1, SET);                      // z  = S D            (N, mini_r)
    shard_tile(y, z);                                   // y_i += z
}

// As Bone's, with dz, the sum of dy over the tiles, in place of dy.
static void mini_backward(model *m, linear *l, mat dx, mat dy, mat x, enum mode mode)
{
    mat S = aligned(m->narrow, x.rows, l->D.rows);
    mat dS = aligned(m->dnarrow, x.rows, l->D.rows);
    mat dz = aligned(m->broad, x.rows, l->D.cols);
    if (l->first) shard_sum(S, x);
    shard_sum(dz, dy);                                  // y_i += z:      dz  = Σ_i dy_i
    matmul_tn(l->dD, S, dz, 1, ADD);                    // z  = S D:      dD += Sᵀ dz
    matmul_nt(dS, dz, l->D, 1, l->first ? SET : ADD);   //                dS += dz Dᵀ
    matmul_nn(dx, dy, l->W, 1, mode);                   // y  = x Wᵀ:     dx  = dy W
    if (l->last) shard_tile(dx, dS);                    // S  = Σ_j x_j:  dx_j += dS
}

static void mini_merge(model *m, linear *l, mat W)
{
    mat D = aligned(m->dbroad, l->D.rows, W.rows);          // D tiled along out, then as Bone
    zero(D);
    shard_tile(D, l->D);
    bone_merge_block(m, W, D);
}

// ---- DiSHA: a D of any size (arXiv 2409.15371, section 3) -------------------------------------------------
//
//  The framework that Bone is one point of. D (a, b) is tiled over all of W, along in and along out:
//
//     y = x (W₀ + expand(D))ᵀ = x W₀ᵀ + tile(S_a(x) D),    expand(D)[o, i] = D[i mod a, o mod b]
//
//  S_a(x) (N, a) adds up the a-wide shards of x, tile repeats b columns along out; the last shard of each may
//  be short. a·b parameters, D = 0: step 0 changes nothing. expand(D) has the rank of D, at most min(a, b),
//  and all shards of W move alike: their updates are colinear. --shard AxB, a side may be `in` or `out`:
//
//     r x out    Bone                    in x out    frozen: W moves freely
//     in x r     Bone's transpose        r x b       mini, if b divides out
//
//  d:  tile:      dz = S_b(dy)           its transpose: the sum over the tiles    (N, b)
//      z = S D:   dD += Sᵀ dz,  dS = dz Dᵀ
//      S_a:       dx_j += dS

static int side_of(int side, const linear *l)
{
    return side == IN_SIDE ? l->W.cols : side == OUT_SIDE ? l->W.rows : side;
}

static void disha_layout(model *m, linear *l, const char *name)
{
    int tokens = m->p.tokens;
    int in = l->W.cols;
    int out = l->W.rows;
    int a = m->p.shard[0] ? side_of(m->p.shard[0], l) : m->p.rank;
    int b = m->p.shard[1] ? side_of(m->p.shard[1], l) : m->p.rank;
    if (a > in) refuse(m, "--shard: D has %d rows and %s %d inputs: the others would be dead", a, name, in);
    if (b > out)
        refuse(m, "--shard: D has %d columns and %s %d outputs: the others would be dead", b, name, out);
    declare(m, PARAM, &l->D, &l->dD, SHAPE(a, b), "%s.miss_block", name);
    reserve(&m->narrow, tokens, a);
    reserve(&m->dnarrow, tokens, a);
    reserve(&m->broad, tokens > a ? tokens : a, b > in ? b : in);
    reserve(&m->dbroad, a, out);
    reserve(&m->weight, out, in);
}

static void disha_forward(model *m, linear *l, mat y, mat x, enum mode mode)
{
    mat S = aligned(m->narrow, x.rows, l->D.rows);
    mat z = aligned(m->broad, x.rows, l->D.cols);
    shard_sum(S, x);                                    // S  = Σ_j x_j        (N, a)
    matmul_nn(z, S, l->D, 1, SET);                      // z  = S D            (N, b)
    matmul_nt(y, x, l->W, 1, mode);                     // y  = x Wᵀ
    shard_tile(y, z);                                   // y_i += z
}

static void disha_backward(model *m, linear *l, mat dx, mat dy, mat x, enum mode mode)
{
    mat S = aligned(m->narrow, x.rows, l->D.rows);
    mat dS = aligned(m->dnarrow, x.rows, l->D.rows);
    mat dz = aligned(m->broad, x.rows, l->D.cols);
    shard_sum(S, x);
    shard_sum(dz, dy);                                  // y_i += z:      dz  = Σ_i dy_i
    matmul_tn(l->dD, S, dz, 1, ADD);                    // z  = S D:      dD += Sᵀ dz
    matmul_nt(dS, dz, l->D, 1, SET);                    //                dS  = dz Dᵀ
    matmul_nn(dx, dy, l->W, 1, mode);                   // y  = x Wᵀ:     dx  = dy W
    shard_tile(dx, dS);                                 // S  = Σ_j x_j:  dx_j += dS
}

// ---- Bat: one B_i per block row of W (arXiv 2409.15371, section 3.3; "bat" of PEFT's MiSS) ----------------
//
//  Makes the shard updates differ, by letting each see the weight it changes. W is cut into r×r blocks:
//
//     W'_ij = W_ij + W_ij B_i + B_i,    y = x W'ᵀ,    B (out/r, r, r), i counts block rows, j block columns
//
//  B = 0: W' = W. out·r parameters. The products W_ij B_i of a block row share their right factor, so they
//  are one: block row W_i (r, in), read front to back as a matrix V_i (in, r), times B_i. r = 2 and in = 4:
//
//     W_i = [a b | c d]    in memory: a b c d e f g h    V_i = [a b]   row 0 of W_i0
//           [e f | g h]                                        [c d]   row 0 of W_i1
//                                                              [e f]   row 1 of W_i0
//                                                              [g h]   row 1 of W_i1
//
//  The B_i that is added to every block is Bone's term, Σ_j x_j B_iᵀ = S(x) B_iᵀ, and never enters a weight.
//  With B̂ (out, r), all B_i below each other, and VB, all V_i B_i written back in W's order,
//
//     y = x (W + VB)ᵀ + S(x) B̂ᵀ
//
//  This costs N·r·out. Added to W + VB in 16 bits, a small B_i would vanish in the rounding of the larger W.
//
//  d:  dB_i = Σ_j (W_ij + I)ᵀ dW'_ij = V_iᵀ dV_i + dy_iᵀ S(x),    dW' = dyᵀ x, its block row i read as dV_i
//
//  There is one W + VB for all layers, in m->weight, built anew in forward and backward. Once dx is known
//  nobody reads it, and dW' = dyᵀ x is written over it: in bat_backward W and dW are two names of one memory.

static void bat_check(model *m, linear *l, const char *name)
{
    int r = m->p.rank;
    if (l->W.rows % r || l->W.cols % r)
        refuse(m, "--rank %d does not divide %s (%d by %d), which %s needs",
               r, name, l->W.rows, l->W.cols, l->method->name);
}

static void bat_layout(model *m, linear *l, const char *name)
{
    int r = m->p.rank;
    int blocks = l->W.rows / r > 0 ? l->W.rows / r : 1;
    bat_check(m, l, name);
    declare(m, PARAM, &l->B, &l->dB, SHAPE(blocks, r, r), "%s.miss_block", name);
    reserve(&m->weight, l->W.rows, l->W.cols);
    reserve(&m->narrow, m->p.tokens, r);
    reserve(&m->dnarrow, m->p.tokens, r);
}

static mat block_rows(mat W, int r) { return shaped(W, W.rows / r, W.cols, r); }        // all V_i (in, r)
static mat stacked(mat B) { return shaped(B, 1, B.batch * B.rows, B.cols); }            // B̂ (out, r)

static mat bat_weight(model *m, linear *l)              // W + VB in the work space
{
    int r = l->B.rows;
    mat W = shaped(m->weight, 1, l->W.rows, l->W.cols);
    copy(W, l->W);
    matmul_nn(block_rows(W, r), block_rows(l->W, r), l->B, 1, ADD);     // V_i + V_i B_i
    return W;
}

static void bat_forward(model *m, linear *l, mat y, mat x, enum mode mode)
{
    mat S = aligned(m->narrow, x.rows, l->B.rows);
    if (l->first) shard_sum(S, x);                                      // S  = Σ_j x_j        (N, r), as Bone
    matmul_nt(y, S, stacked(l->B), 1, mode);                            // y  = S B̂ᵀ
    matmul_nt(y, x, bat_weight(m, l), 1, ADD);                          // y += x (W + VB)ᵀ
}

// dx before dW: dW takes the memory of W, which is W + VB here.
static void bat_backward(model *m, linear *l, mat dx, mat dy, mat x, enum mode mode)
{
    int r = l->B.rows;
    mat S = aligned(m->narrow, x.rows, r);
    mat dS = aligned(m->dnarrow, x.rows, r);
    mat W = bat_weight(m, l);
    mat dW = W;
    if (l->first) shard_sum(S, x);
    matmul_tn(stacked(l->dB), dy, S, 1, ADD);                          // y  = S B̂ᵀ:         dB̂ += dyᵀ S
    matmul_nn(dS, dy, stacked(l->B), 1, l->first ? SET : ADD);         //                    dS += dy B̂
    matmul_nn(dx, dy, W, 1, mode);                                     // y += x (W + VB)ᵀ:  dx = dy (W + VB)
    matmul_tn(dW, dy, x, 1, SET);                                      //                    dW' = dyᵀ x
    matmul_tn(l->dB, block_rows(l->W, r), block_rows(dW, r), 1, ADD);  // V_i + V_i B_i:     dB_i += V_iᵀ dV_i
    if (l->last) shard_tile(dx, dS);                                   // S = Σ_j x_j:       dx_j += dS
}

static void bat_merge(model *m, linear *l, mat W)
{
    (void)m;
    int r = l->B.rows;
    matmul_nn(block_rows(W, r), block_rows(l->W, r), l->B, 1, ADD);     // W'_ij  = W_ij + W_ij B_i
    shard_tile(W, stacked(l->B));                                       // W'_ij += B_i
}

// ---- Bat-row: one B_j per block column of W (the paper's table 5) -----------------------------------------
//
//     W'_ij = W_ij + W_ij B_j + B_j,    B (in/r, r, r), i counts block rows, j block columns
//
//  This one factors. With u_j = x_j B_jᵀ the sum y_i = Σ_j x_j W'_ijᵀ becomes
//
//     y_i = Σ_j (x_j + u_j) W_ijᵀ + Σ_j u_j,      that is      y = (x + u) Wᵀ + tile(Σ_j u_j)
//
//  Three parts: the frozen product with x + u in place of x; the block-diagonal one that makes u, N·in·r; and
//  the r-wide row Σ_j u_j, repeated for each of the out/r block rows. No W' is built; it costs about as much
//  as LoRA. in·r parameters, B = 0: step 0 changes nothing.

// B, count of them. What is as wide as x, and Σ_j, hold rows of tokens in a step, and a weight's in a merge.
static void bat_row_memory(model *m, linear *l, int count, const char *name)
{
    int r = m->p.rank;
    int rows = l->W.rows > m->p.tokens ? l->W.rows : m->p.tokens;
    declare(m, PARAM, &l->B, &l->dB, SHAPE(count, r, r), "%s.bat_block", name);
    reserve(&m->broad, m->p.tokens, l->W.cols);
    reserve(&m->dbroad, rows, l->W.cols);
    reserve(&m->narrow, rows, r);
    reserve(&m->weight, l->W.rows, l->W.cols);
    for (int i = 0; i < 2; i++) {                                       // room for sums
        reserve(i ? &m->broad : &m->dbroad, m->p.tokens, 2 * r);
        reserve(i ? &m->broad : &m->dbroad, 2 * r, l->W.cols);
    }
}

static void bat_row_layout(model *m, linear *l, const char *name)
{
    int blocks = l->W.cols / m->p.rank > 0 ? l->W.cols / m->p.rank : 1;
    bat_check(m, l, name);
    bat_row_memory(m, l, blocks, name);
}

static void bat_row_forward(model *m, linear *l, mat y, mat x, enum mode mode)
{
    mat x_tilde = aligned(m->broad, x.rows, x.cols);
    mat sum = aligned(m->narrow, x.rows, l->B.rows);
    block_diagonal_forward(x_tilde, sum, x, l->B, m->dbroad);           // u_j = x_j B_jᵀ, x̃ = x + u, Σ_j u_j
    matmul_nt(y, x_tilde, l->W, 1, mode);                               // y = x̃ Wᵀ
    shard_tile(y, sum);                                                 // y_i += Σ_j u_j
}

// g is the same row for every j.
static void bat_row_backward(model *m, linear *l, mat dx, mat dy, mat x, enum mode mode)
{
    mat dx_tilde = aligned(m->dbroad, x.rows, x.cols);
    mat g = aligned(m->narrow, x.rows, l->B.rows);
    matmul_nn(dx_tilde, dy, l->W, 1, SET);                              // y = x̃ Wᵀ:        dx̃ = dy W
    shard_sum(g, dy);                                                   // y_i += Σ_j u_j:  g = Σ_i dy_i
    block_diagonal_backward(dx, l->dB, dx_tilde, g, x, l->B, m->broad, mode);
    //                                                                     x̃ = x + u:       du_j = dx̃_j + g
    //                                                                     u_j = x_j B_jᵀ:  dB_j += du_jᵀ x_j
    //                                                                     dx_j = or += dx̃_j + du_j B_j
}

// W_ij + I, in the work space.
static mat plus_identity(model *m, const linear *l)
{
    mat E = aligned(m->narrow, l->W.rows, l->B.cols);
    mat WE = aligned(m->dbroad, l->W.rows, l->W.cols);
    copy(WE, l->W);
    tiled_identity(E);
    shard_tile(WE, E);
    return WE;
}

static void bat_row_merge(model *m, linear *l, mat W)
{
    int r = l->B.rows;
    mat WE = plus_identity(m, l);
    matmul_nn(column_blocks(W, r), column_blocks(WE, r), l->B, 1, ADD); // W'_ij = W_ij + (W_ij + I) B_j
}

// ---- Bat-free: any grouping of the blocks (the paper's figure 4) ------------------------------------------
//
//     W'_ij = W_ij + W_ij B_g + B_g,    g = (strip of block row i, group of block column j),  B (p·q, r, r)
//
//  A grid of p × q groups: p strips of block rows, q groups of block columns, --groups PxQ. `out` stands for
//  all out/r block rows, `in` for all in/r block columns: out x 1 is Bat, 1 x in is Bat-row, 1 x 1 has one B
//  for all blocks, out x in one for each. p·q·r² parameters, B = 0: step 0 changes nothing.
//  Each strip is Bat-row on its own rows of W, with the B of its q groups: p·N·in·r forward, and twice that
//  backward. Bat makes all of dW', N·in·out: more, while 3·p·r < out.

// A group's side: so many, of so many blocks.
static int grouped(model *m, const char *name, int side, int blocks)
{
    int n = side < 0 ? blocks : side ? side : 1;
    if (blocks % n) refuse(m, "--groups: %d groups do not divide the %d blocks of %s", n, blocks, name);
    return n;
}

static int strips_of(const linear *l) { return l->groups[0]; }
static int strip_rows(const linear *l) { return l->W.rows / l->groups[0]; }

// B of strip s and block column j.
static mat group_of(const linear *l, mat B, int s, int j)
{
    int blocks = l->W.cols / l->B.cols;
    int g = s * l->groups[1] + j / (blocks / l->groups[1]);
    B = offset(B, (size_t)g * B.stride);
    B.batch = 1;
    return B;
}

static void bat_free_layout(model *m, linear *l, const char *name)
{
    int r = m->p.rank;
    bat_check(m, l, name);
    if (*m->refused) return;
    l->groups[0] = grouped(m, name, m->p.groups[0], l->W.rows / r);
    l->groups[1] = grouped(m, name, m->p.groups[1], l->W.cols / r);
    if ((double)l->groups[0] * l->groups[1] > INT_MAX) refuse(m, "--groups: too many for %s", name);
    else bat_row_memory(m, l, l->groups[0] * l->groups[1], name);
}

static void bat_free_forward(model *m, linear *l, mat y, mat x, enum mode mode)
{
    int r = l->B.cols;
    int n = strip_rows(l);
    mat u = aligned(m->broad, x.rows, x.cols);
    mat sum = aligned(m->narrow, x.rows, r);
    for (int s = 0; s < strips_of(l); s++) {
        mat ys = columns_of(y, s * n, n);
        for (int j = 0; j < x.cols / r; j++)                            // u_j = x_j B_gᵀ        (N, in)
            matmul_nt(columns_of(u, j * r, r), columns_of(x, j * r, r), group_of(l, l->B, s, j), 1, SET);
        shard_sum(sum, u);                                              // Σ_j u_j               (N, r)
        add(u, x, 1);                                                   // x̃ = x + u
        matmul_nt(ys, u, rows_of(l->W, s * n, n), 1, mode);             // y_s = x̃ W_sᵀ
        shard_tile(ys, sum);                                            // y_si += Σ_j u_j
    }
}

static void bat_free_backward(model *m, linear *l, mat dx, mat dy, mat x, enum mode mode)
{
    int r = l->B.cols;
    int n = strip_rows(l);
    mat du = aligned(m->dbroad, x.rows, x.cols);
    mat g = aligned(m->narrow, x.rows, r);
    for (int s = 0; s < strips_of(l); s++) {
        mat dys = columns_of(dy, s * n, n);
        matmul_nn(du, dys, rows_of(l->W, s * n, n), 1, SET);            // y_s = x̃ W_sᵀ:     dx̃ = dy_s W_s
        if (s == 0 && mode == SET) copy(dx, du);                        // x̃ = x + u:        dx += dx̃
        else add(dx, du, 1);
        shard_sum(g, dys);                                              // y_si += Σ_j u_j:  g = Σ_i dy_si
        shard_tile(du, g);                                              //                   du_j = dx̃_j + g
        for (int j = 0; j < x.cols / r; j++) {
            mat du_j = columns_of(du, j * r, r);
            matmul_tn(group_of(l, l->dB, s, j), du_j, columns_of(x, j * r, r), 1, ADD);
            //                                                             u_j = x_j B_gᵀ:   dB_g += du_jᵀ x_j
            matmul_nn(columns_of(dx, j * r, r), du_j, group_of(l, l->B, s, j), 1, ADD);
            //                                                                               dx_j += du_j B_g
        }
    }
}

static void bat_free_merge(model *m, linear *l, mat W)
{
    int r = l->B.cols;
    int n = strip_rows(l);
    mat WE = plus_identity(m, l);
    for (int s = 0; s < strips_of(l); s++)
        for (int j = 0; j < W.cols / r; j++) {                          // W'_ij = W_ij + (W_ij + I) B_g
            mat from = columns_of(rows_of(WE, s * n, n), j * r, r);
            matmul_nn(columns_of(rows_of(W, s * n, n), j * r, r), from, group_of(l, l->B, s, j), 1, ADD);
        }
}

// ---- the table --------------------------------------------------------------------------------------------

// A row of the table takes three lines here. The last has what PEFT calls it, and what else `method` in
// model.h asks, by name.
static const method methods[] = {
//   name       equation
//   layout            init          forward          backward          merge
    {"full",    "y = x Wᵀ, W itself trains",
     NULL,             NULL,         full_forward,    full_backward,    NULL,
     .peft_type = NULL},
    {"frozen",  "y = x (W + ΔW)ᵀ",
     frozen_layout,    NULL,         frozen_forward,  frozen_backward,  frozen_merge,
     .peft_type = "FROZEN"},
    {"lora",    "y = x Wᵀ + α/r (x Aᵀ) Bᵀ",
     lora_layout,      lora_init,    lora_forward,    lora_backward,    lora_merge,
     .peft_type = "LORA"},
    {"rslora",  "lora with α/√r",
     rslora_layout,    lora_init,    lora_forward,    lora_backward,    lora_merge,
     .peft_type = "LORA", .peft_variant = "use_rslora"},
    {"lora+",   "lora, B learns λ times faster than A",
     lora_plus_layout, lora_init,    lora_forward,    lora_backward,    lora_merge,
     .peft_type = "LORA"},
    {"dora",    "W + α/r B A, rows of trained length m",
     dora_layout,      dora_init,    dora_forward,    dora_backward,    dora_merge,
     .peft_type = "LORA", .peft_variant = "use_dora"},
    {"pissa",   "lora from the top r of W's SVD",
     pissa_layout,     pissa_init,   pissa_forward,   pissa_backward,   pissa_merge,
     .peft_type = "LORA", .peft_variant = "pissa", .has_start = 1},
    {"olora",   "lora from the QR decomposition of W",
     pissa_layout,     olora_init,   pissa_forward,   pissa_backward,   pissa_merge,
     .peft_type = "LORA", .peft_variant = "olora", .has_start = 1},
    {"lora-ga", "lora from the SVD of the first gradient",
     lora_ga_layout,   lora_ga_init, pissa_forward,   lora_ga_backward, pissa_merge,
     .peft_type = "LORA", .has_start = 1, .wants_gradient = 1},
    {"bone",    "y = x Wᵀ + S(x) D",
     bone_layout,      NULL,         bone_forward,    bone_backward,    bone_merge,
     .peft_type = "MISS"},
    {"mini",    "bone, D tiled along the outputs too",
     mini_layout,      NULL,         mini_forward,    mini_backward,    mini_merge,
     .peft_type = "MISS", .peft_variant = "mini"},
    {"disha",   "bone of any size: D (a, b) tiled along both",
     disha_layout,     NULL,         disha_forward,   disha_backward,   mini_merge,
     .peft_type = "DISHA"},
    {"bat",     "W'_ij = W_ij + W_ij B_i + B_i",
     bat_layout,       NULL,         bat_forward,     bat_backward,     bat_merge,
     .peft_type = "MISS", .peft_variant = "bat"},
    {"bat-row", "W'_ij = W_ij + W_ij B_j + B_j, factored",
     bat_row_layout,   NULL,         bat_row_forward, bat_row_backward, bat_row_merge,
     .peft_type = "BAT_ROW"},
    {"bat-free", "bat by a grid of p × q groups, factored",
     bat_free_layout,  NULL,         bat_free_forward, bat_free_backward, bat_free_merge,
     .peft_type = "BAT_FREE"},
};
enum { METHODS = sizeof methods / sizeof *methods };

static double gradient_bytes(const model *m, int depth)
{
    double bytes = 0;
    int n = linears_of_layer(m);
    for (int i = depth * n; i < (depth + 1) * n; i++)
        if (has_adapter(m->linears[i])) bytes += (double)elements(m->linears[i]->W) * sizeof(wide);
    return bytes;
}

// The gradient of the first step for the W of some layers, from `from` on, into their l->dW; returns the
// layer behind them. All layers' gradients would be as large as the model, and each time costs a step: so it
// is as many layers as stay within 256 MB, and one at least.
static int first_gradient(model *m, int from, const batch *first, int batches)
{
    int targets = 0, to = from + 1, n = linears_of_layer(m);
    double bytes = gradient_bytes(m, from);
    while (to < m->c.layers && (bytes += gradient_bytes(m, to)) <= 256e6) to++;
    for (int i = from * n; i < to * n; i++) {
        linear *l = m->linears[i];
        if (!has_adapter(l)) continue;
        l->dW = mat_of(NULL, TYPE_OF(wide), SHAPE(l->W.rows, l->W.cols));
        l->dW.p = device_block(elements(l->dW) * sizeof(wide), "the first gradient");
    }
    for (int i = 0; i < batches; i++) targets += first[i].targets;
    for (int i = 0; i < batches; i++) model_step(m, &first[i], 1.0 / targets);
    return to;
}

static void first_gradient_free(model *m)
{
    for (int i = 0; i < arrlen(m->linears); i++) {
        dev_free(m->linears[i]->dW.p);
        m->linears[i]->dW.p = NULL;
    }
}

// The start of every adapter. `first` are the micro-batches of the first step, whose gradient lora-ga starts
// from. Calls progress after each linear, because pissa takes a while.
static void adapters_init(model *m, const batch *first, int batches, void (*progress)(int done, int of))
{
    int n = (int)arrlen(m->linears), gradients = m->p.method->wants_gradient;
    int known = 0;                                              // layers below have had their gradient
    for (int i = 0; i < n; i++) {
        linear *l = m->linears[i];
        char name[32];
        if (gradients && l->depth >= known) {
            first_gradient_free(m);
            known = first_gradient(m, l->depth, first, batches);
        }
        snprintf(name, sizeof name, "%d.%.16s", l->depth, l->is.name);
        if (l->method->init) l->method->init(m, l, name);
        progress(i + 1, n);
    }
    if (!gradients) return;
    first_gradient_free(m);
    zero(flat(m, m->grad));                                     // first_gradient added to it
}

// One side of "64xout": a whole number, in, or out. 0 if it is none; *end is what follows.
static int read_side(const char *text, const char **end)
{
    int in = !strncmp(text, "in", 2), out = !strncmp(text, "out", 3);
    char *behind = (char *)(uintptr_t)text;
    long n = in || out ? 0 : strtol(text, &behind, 10);
    *end = in ? text + 2 : out ? text + 3 : behind;
    return in ? IN_SIDE : out ? OUT_SIDE : n > 0 && n <= 1 << 24 ? (int)n : 0;
}

// Both sides of AxB. False if the text is none.
static int read_pair(const char *text, int pair[2])
{
    const char *end;
    pair[0] = read_side(text, &end);
    if (!pair[0] || *end != 'x') return 0;
    pair[1] = read_side(end + 1, &end);
    return pair[1] && !*end;
}

static const char *side_text(int side, char text[16])
{
    if (side > 0) snprintf(text, 16, "%d", side);
    return side == IN_SIDE ? "in" : side == OUT_SIDE ? "out" : text;
}

static const char *pair_text(const int pair[2], char text[32])
{
    char a[16], b[16];
    snprintf(text, 32, "%sx%s", side_text(pair[0], a), side_text(pair[1], b));
    return text;
}

static const method *method_named(const char *name)           // LoRA is lora
{
    for (int i = 0; i < METHODS; i++)
        if (!strcasecmp(methods[i].name, name)) return &methods[i];
    return NULL;
}

#endif
