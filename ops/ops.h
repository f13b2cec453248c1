/*  ops/ops.h: what a matrix is, and the two dozen operations that everything is made of. C and CUDA both
    read this file.

    ops/cpu.c defines the operations for a CPU and train.cu for a GPU; the linker decides which of them runs.

    Conventions. A token is a row: x is (N, in), N = all tokens of a micro-batch. A weight W is (out, in) as
    in Hugging Face, so y = x Wᵀ. Outputs come first in every signature. The gradient of `name` is `dname`.
    Shapes stand in comments as (rows, cols).

    Who writes (=) and who adds (+=)? The forward pass writes. In the backward pass what trains is added to,
    because a step may have several micro-batches. An activation's gradient is written by the first op that
    has a share in it, and the others add theirs: so it need not be zeroed before. `enum mode` says which;
    ops that have no mode say it in their line below.                                                     */

#ifndef OPS_H
#define OPS_H
#include <stddef.h>

/* `real` is what activations are stored in, `wide` what trains: adapters, gradients, AdamW's moments.
   Both are float; finite differences need double (-DDOUBLE). On a GPU `real` is bf16 (-DBFLOAT16), with which
   only the GPU's ops compute: for the host it is 16 bits, hence unsigned short. */
#if defined DOUBLE
typedef double real, wide;
#elif defined BFLOAT16 && defined __cplusplus
typedef __nv_bfloat16 real;
typedef float wide;
#elif defined BFLOAT16
typedef unsigned short real;
typedef float wide;
#else
typedef float real, wide;
#endif

enum dtype { F32, F64, BF16, F16, DTYPES };
#define TYPE_OF(type) (sizeof(type) == 8 ? F64 : sizeof(type) == 4 ? F32 : BF16)

/* Memory of the device (the CPU's own, or a GPU's) has its own pointer type. `make seam` compiles model,
   adapters and loop with clang and that type marked noderef: code that reads such memory outside an op does
   not compile. */
#if defined __clang__ && defined SEAM
#define noderef __attribute__((noderef))
#else
#define noderef
#endif
typedef void noderef *dev;
typedef int noderef *dev_ints;

/* A matrix, or `batch` matrices of one shape, somewhere in device memory. It is a view: copying it copies no
   data. p == NULL means "not wanted": an op asked to write it does nothing. That is how a frozen weight has
   no gradient. */
typedef struct {
    dev p;
    enum dtype type;
    int rows, cols;
    size_t ld;                  // elements from one row to the next
    int batch;                  // how many matrices …
    size_t stride;              // … and the elements from one to the next
    size_t room;                // elements from p to the end of its memory, which no view may leave
    int spare;                  // what lies behind a row's columns, up to a multiple of 8, is nobody's
} mat;

/* One sequence: query rows q … q+nq-1 look at key rows k … k+nk-1, causally: the last query's own key is the
   last one. Training: nq = nk = the row's length. Decoding: nq = 1 and nk = what the cache holds. */
typedef struct { int q, nq, k, nk; } span;

enum mode { SET, ADD };         // out = …  or  out += …

// The sizes of a run that decide what ops need beside their arguments.
typedef struct {
    size_t weight, trained;     // numbers in the largest matrix of the base, and in the largest that trains,
                                // its sides filled up to multiples of 8: room for a product that converts one
    int tokens, heads;          // of a micro-batch; of queries
    int normed;                 // the most rows that RMSNorm gets
    int train;                  // there is a backward pass
    int recurrent;              // columns of what a recurrence reads; 0: there is none
    size_t fetched;             // the most logits that leave the device at once
} needs;

/* ---- the op contract -------------------------------------------------------------------------------------
   Shapes come with the matrices, and the ops check them. Every op is deterministic: same input, same bits,
   for any number of threads and, on the CPU, for vectors of any width. */

#ifdef __cplusplus
extern "C" {
#endif
// the device, and its memory
const char *dev_name(void);
void     dev_memory(double *used, double *all);                       // bytes of the device
// From now on products of floats may round their factors to 10 bits (TF32). Returns 0 where that cannot be.
int      dev_tf32(void);
// With `on`, matmuls and attention round their factors to 8 bits (bf16) from now on. Returns 0 where that
// cannot be.
int      dev_bf16(int on);
dev      dev_alloc(size_t bytes);                                     // zeroed, 64-byte aligned, or NULL
void     dev_free(dev p);
// Bytes of the work space that the ops themselves need. With `take` they are allocated too, once, before the
// first step.
size_t   dev_reserve(needs n, int take);
int      dev_chunk(int vocab);                                    // rows of logits that are best made at once
mat      dev_weight(mat host);                                    // a mapped weight, for the ops; dtype kept
void     dev_weight_free(mat w);
void     put(mat dst, const void *src, enum dtype type);              // dst = contiguous host data, converted
void     get(wide *dst, mat src);                                     // contiguous host data = src, converted
void     put_ints(dev_ints dst, const int *src, size_t n);
void     zero(mat x);                                                 // x = 0
void     copy(mat y, mat x);                                          // y = x, converted
void     add(mat y, mat x, double scale);                             // y += scale x

// products; each takes a batch where its arguments have one; a batch of 1 is repeated
//   matmul_nt:  y (N, out)  = scale x (N, in) w (out, in)ᵀ
//   matmul_nn:  y (N, in)   = scale x (N, out) w (out, in)
//   matmul_tn:  y (out, in) = scale x (N, out)ᵀ w (N, in)
void     matmul_nt(mat y, mat x, mat w, double scale, enum mode m);
void     matmul_nn(mat y, mat x, mat w, double scale, enum mode m);
void     matmul_tn(mat y, mat x, mat w, double scale, enum mode m);

// Llama2 and its kin
void     bias_forward(mat y, mat b);                                  // y[n] += b, where b has memory
void     bias_backward(mat db, mat dy);                               // db += Σ_n dy[n]
void     embedding_forward(mat out, mat table, dev_ints ids);         // out[n] = table[ids[n]]
void     embedding_backward(mat dtable, mat dout, dev_ints ids);      // dtable[ids[n]] += dout[n]
// out = w x / rms(x). Where `residual` has memory, it becomes a copy of x, made while the row is in cache.
// The last product of attention (o_proj) or of the MLP (down_proj) is later added to it (mode ADD): the copy
// is then the residual sum, which needs no op of its own.
void     rmsnorm_forward(mat out, mat residual, mat x, mat w, double eps);
void     rmsnorm_backward(mat dx, mat dw, mat dout, mat x, mat w, double eps);         // dx += …, dw += …
// Rotates the halves of each head by the angles of the row's position, table[pos[n]] = (cos, sin); sign = -1
// rotates back, which is the backward pass.
void     rope(mat x, dev_ints pos, mat table, int sign);
// A query sees its own key and those before it, `window` keys at most (Mistral); INT_MAX: all of them. The
// backward pass writes dq = …, dk = …, dv = … in all rows that the spans name; no two spans share keys there.
void     attention_forward(mat out, mat lse, mat q, mat k, mat v, int head_dim, int window,
                           const span *s, int spans);
void     attention_backward(mat dq, mat dk, mat dv, mat dout, mat q, mat k, mat v, mat out, mat lse,
                            int head_dim, int window, const span *s, int spans);
void     swiglu_forward(mat out, mat gate, mat up);                   // out = silu(gate) up
void     swiglu_backward(mat dgate, mat dup, mat dout, mat gate, mat up);              // dgate = …, dup = …
// losses[n] = −log softmax(logits[n])[labels[n]]. With scale ≠ 0 the logits are then overwritten by their
// gradient, times scale.
void     cross_entropy(mat losses, mat logits, dev_ints labels, double scale);

// RWKV6
// out = w x̂ + b, x̂ = (x − mean) / √(variance + ε): a row is cut into `groups` equal parts, each normed
// alone. Backward: dx += …, dw += …, db += …
void     layernorm_forward(mat out, mat x, mat w, mat b, int groups, double eps);
void     layernorm_backward(mat dx, mat dw, mat db, mat dout, mat x, mat w, int groups, double eps);
// out[n] = x[n] + (x[n−1] − x[n]) ⊙ (mu + m[n]), where mu is (C) and m (N, C) or without memory. Before the
// first row of a span stands zero; or, where the span goes on with a text (nk > nq), row s.k of `before`.
// The backward pass adds to dx and dmu and writes dm = …; it knows no `before`.
void     shift_mix_forward(mat out, mat x, mat before, mat mu, mat m, const span *s, int spans);
void     shift_mix_backward(mat dx, mat dmu, mat dm, mat dout, mat x, mat mu, mat m,
                            const span *s, int spans);
void     tanh_forward(mat y, mat x);                                  // y = tanh(x); y may be x
void     tanh_backward(mat dx, mat dy, mat y);                        // dx = dy (1 − y²); dx may be dy
void     relu2_forward(mat y, mat x);                                 // y = max(x, 0)²
void     relu2_backward(mat dx, mat dy, mat x);                       // dx = 2 dy max(x, 0); dx may be dy
void     sigmoid_gate_forward(mat y, mat r, mat x);                   // y += σ(r) x
void     sigmoid_gate_backward(mat dr, mat dx, mat dy, mat r, mat x);              // dr = …, dx = …
// The recurrence of linear attention, in each head of d channels, u (heads, d); S is (d, d), 0 at first:
//   y[t] = r[t] (S + diag(u) k[t]ᵀ v[t]),   then   S = diag(exp(−exp(w[t]))) S + k[t]ᵀ v[t]
// `state`, where it has memory, holds a row of all S of each text: a span that goes on (nk > nq) begins with
// row s.k, and every span leaves its S there. The backward pass writes dr = …, dk = …, dv = …, dw = … and
// adds to du.
void     wkv6_forward(mat y, mat state, mat r, mat k, mat v, mat w, mat u, const span *s, int spans);
void     wkv6_backward(mat dr, mat dk, mat dv, mat dw, mat du, mat dy,
                       mat r, mat k, mat v, mat w, mat u, const span *s, int spans);

// adapters
//   shard_sum, S(x):  s[n,c] = Σ_j x[n, j·r + c], r = s.cols; a short last shard is filled up with zeros
//   shard_tile, its transpose and hence its backward:  x[n, j·r + c] += s[n,c]
void     shard_sum(mat s, mat x);
void     shard_tile(mat x, mat s);
// Bat-row's own: x (N, in) lies in blocks x_j of r columns, and B_j is (r, r).
//   forward:   u_j = x_j B_jᵀ,   x̃ = x + u,   sum (N, r) = Σ_j u_j
//   backward:  du_j = dx̃_j + g, the same g (N, r) for each j
//              dB_j += du_jᵀ x_j,   dx_j = or += dx̃_j + du_j B_j
// dx̃ is lost. room: memory that nobody needs, N 2 r numbers at least, and 2 in r.
void     block_diagonal_forward(mat x_tilde, mat sum, mat x, mat B, mat room);
void     block_diagonal_backward(mat dx, mat dB, mat dx_tilde, mat g, mat x, mat B, mat room, enum mode m);
void     tiled_identity(mat e);           // e[i,j] = 1 where i − j is a multiple of the shorter side, else 0
// y = scale x ⊙ g, where g is (1, cols) or (rows, 1) and repeated along the other side. The backward for g is
// broadcast_dot: g = scale Σ x ⊙ y, along the side where g is 1.
void     broadcast_mul(mat y, mat x, mat g, double scale, enum mode m);
void     broadcast_dot(mat g, mat x, mat y, double scale, enum mode m);
void     magnitude_forward(mat gain, mat m, mat squares);         // gain = m / √squares; 1 where squares is 0
void     magnitude_backward(mat dm, mat dsquares, mat dgain, mat m, mat squares);   // dm += …, dsquares = …

// training
double   sum_of_squares(mat x);
// Step t = 1, 2, … with the gradient grad_scale dw; m and v are the moments.
void     adamw(mat w, mat dw, mat m, mat v, double lr, double decay, double grad_scale, int t);
#ifdef __cplusplus
}
#endif

#endif
