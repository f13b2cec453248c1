/*  stopwatch.h: where the time of a step goes. Every op is called across a seam that the linker closes (ops/ops.h). Here the
    linker puts a stopwatch into it: --wrap leads each call through a TIMED line below. Products inside an op, attention's,
    count as that op. What includes this says with now() what time it is: on a GPU, when all that was begun has ended.      */

enum group { MATMUL, ADAPTER, ATTENTION, RECURRENCE, ROWWISE, ENTROPY, MOVES, ADAMW, GROUPS };
static const char *const group_names[GROUPS] = {"matmul", "adapter", "attention", "wkv6", "row ops", "loss", "moves", "adamw"};

// Seconds spent, and the least that had to be done: multiply-adds, and bytes between op and memory, each operand once.
typedef struct { double seconds, flops, bytes; } cost;

// Op by op; a product counts by its group, too.
enum { MOST_OPS = 64 };
static struct op_spent { const char *op; enum group group; int calls; cost spent; } op_spent[MOST_OPS];
static int stopwatch_runs = 1;

static double now(void);

static void spend(const char *op, enum group group, cost c)
{
    int i = 0;
    while (op_spent[i].op && (strcmp(op_spent[i].op, op) || op_spent[i].group != group)) i++;
    if (i == MOST_OPS - 1) die("stopwatch.h: too many ops");
    op_spent[i].op = op, op_spent[i].group = group, op_spent[i].calls++;
    op_spent[i].spent.seconds += c.seconds, op_spent[i].spent.flops += c.flops, op_spent[i].spent.bytes += c.bytes;
}

static double size_of(mat m) { return m.p ? (double)elements(m) * (double)dtypes[m.type].size : 0; }
static int inner(mat x, int transposed) { return transposed ? x.rows : x.cols; }
static double product_flops(mat y, mat x, int xt) { return y.p ? 2. * y.batch * y.rows * y.cols * inner(x, xt) : 0; }
static double product_bytes(mat y, mat x, mat w, enum mode mode)
{
    return y.p ? size_of(y) * (mode == ADD ? 2 : 1) + size_of(x) + size_of(w) : 0;
}

// A product belongs to the adapter when it is one of many small ones, or one of its three dimensions is the rank (which cannot
// be told where the rank is the number of tokens, nor from RWKV6's own low ranks, 32 and 64, which count as the adapter's).
static enum group of_product(mat y, mat x, int xt)
{
    int r = opt.rank == opt.batch * opt.seq ? 0 : opt.rank;
    return y.batch > 1 || y.rows == r || y.cols == r || inner(x, xt) == r ? ADAPTER : MATMUL;
}

// One product of queries and keys, all heads, over the half that is not masked.
static double attention_flops(const span *s, int spans, mat q)
{
    double flops = 0;
    for (int i = 0; i < spans; i++) flops += 2. * q.cols * s[i].nq * (s[i].nk - (s[i].nq - 1) / 2.);
    return flops;
}

#define TIMED(op, parameters, arguments, group, flop_count, byte_count)         \
    void __real_##op parameters;                                                \
    void __wrap_##op parameters;                                                \
    void __wrap_##op parameters                                                 \
    {                                                                           \
        double start = stopwatch_runs ? now() : 0;                              \
        __real_##op arguments;                                                  \
        if (stopwatch_runs) spend(#op, group, (cost){now() - start, flop_count, byte_count}); \
    }

TIMED(matmul_nt, (mat y, mat x, mat w, double scale, enum mode mode), (y, x, w, scale, mode),
      of_product(y, x, 0), product_flops(y, x, 0), product_bytes(y, x, w, mode))
TIMED(matmul_nn, (mat y, mat x, mat w, double scale, enum mode mode), (y, x, w, scale, mode),
      of_product(y, x, 0), product_flops(y, x, 0), product_bytes(y, x, w, mode))
TIMED(matmul_tn, (mat y, mat x, mat w, double scale, enum mode mode), (y, x, w, scale, mode),
      of_product(y, x, 1), product_flops(y, x, 1), product_bytes(y, x, w, mode))
TIMED(attention_forward, (mat out, mat lse, mat q, mat k, mat v, int d, int w, const span *s, int n),
      (out, lse, q, k, v, d, w, s, n),
      ATTENTION, 2 * attention_flops(s, n, q), size_of(out) + size_of(q) + size_of(k) + size_of(v))
TIMED(attention_backward,
      (mat dq, mat dk, mat dv, mat dout, mat q, mat k, mat v, mat out, mat lse, int d, int w, const span *s, int n),
      (dq, dk, dv, dout, q, k, v, out, lse, d, w, s, n),
      ATTENTION, 5 * attention_flops(s, n, q), 2 * (size_of(dq) + size_of(dk) + size_of(dv)) + size_of(dout) + size_of(out))
TIMED(rmsnorm_forward, (mat out, mat residual, mat x, mat w, double eps), (out, residual, x, w, eps),
      ROWWISE, 0, size_of(out) + size_of(residual) + size_of(x))
TIMED(rmsnorm_backward, (mat dx, mat dw, mat dout, mat x, mat w, double eps), (dx, dw, dout, x, w, eps),
      ROWWISE, 0, 2 * size_of(dx) + size_of(dout) + size_of(x))
TIMED(rope, (mat x, dev_ints pos, mat table, int sign), (x, pos, table, sign), ROWWISE, 0, 2 * size_of(x))
TIMED(swiglu_forward, (mat out, mat gate, mat up), (out, gate, up), ROWWISE, 0, 3 * size_of(out))
TIMED(swiglu_backward, (mat dgate, mat dup, mat dout, mat gate, mat up), (dgate, dup, dout, gate, up),
      ROWWISE, 0, 5 * size_of(dout))
TIMED(layernorm_forward, (mat out, mat x, mat w, mat b, int groups, double eps), (out, x, w, b, groups, eps),
      ROWWISE, 0, size_of(out) + size_of(x))
TIMED(layernorm_backward, (mat dx, mat dw, mat db, mat dout, mat x, mat w, int groups, double eps),
      (dx, dw, db, dout, x, w, groups, eps), ROWWISE, 0, 2 * size_of(dx) + size_of(dout) + size_of(x))
TIMED(shift_mix_forward, (mat out, mat x, mat before, mat mu, mat m, const span *s, int n), (out, x, before, mu, m, s, n),
      ROWWISE, 0, size_of(out) + size_of(x) + size_of(m))
TIMED(shift_mix_backward, (mat dx, mat dmu, mat dm, mat dout, mat x, mat mu, mat m, const span *s, int n),
      (dx, dmu, dm, dout, x, mu, m, s, n),
      ROWWISE, 0, 2 * size_of(dx) + size_of(dm) + size_of(dout) + size_of(x) + size_of(m))
TIMED(tanh_forward, (mat y, mat x), (y, x), ROWWISE, 0, 2 * size_of(x))
TIMED(tanh_backward, (mat dx, mat dy, mat y), (dx, dy, y), ROWWISE, 0, 3 * size_of(y))
TIMED(relu2_forward, (mat y, mat x), (y, x), ROWWISE, 0, 2 * size_of(x))
TIMED(relu2_backward, (mat dx, mat dy, mat x), (dx, dy, x), ROWWISE, 0, 3 * size_of(x))
TIMED(sigmoid_gate_forward, (mat y, mat r, mat x), (y, r, x), ROWWISE, 0, 4 * size_of(y))
TIMED(sigmoid_gate_backward, (mat dr, mat dx, mat dy, mat r, mat x), (dr, dx, dy, r, x), ROWWISE, 0, 5 * size_of(dy))
// Of each number of S, forward: 3 for its update, 2 for y. Back: 3 again, 3 for dS, 2 each for dr, dk, dv.
TIMED(wkv6_forward, (mat y, mat state, mat r, mat k, mat v, mat w, mat u, const span *s, int n),
      (y, state, r, k, v, w, u, s, n), RECURRENCE, 5. * u.cols * (double)elements(y), 5 * size_of(y))
TIMED(wkv6_backward,
      (mat dr, mat dk, mat dv, mat dw, mat du, mat dy, mat r, mat k, mat v, mat w, mat u, const span *s, int n),
      (dr, dk, dv, dw, du, dy, r, k, v, w, u, s, n),
      RECURRENCE, 12. * u.cols * (double)elements(dy), 9 * size_of(dy))
TIMED(cross_entropy, (mat losses, mat logits, dev_ints labels, double scale), (losses, logits, labels, scale),
      ENTROPY, 0, (scale ? 2 : 1) * size_of(logits))
TIMED(shard_sum, (mat s, mat x), (s, x), ADAPTER, 0, size_of(s) + size_of(x))
TIMED(shard_tile, (mat x, mat s), (x, s), ADAPTER, 0, size_of(s) + 2 * size_of(x))
TIMED(block_diagonal_forward, (mat x_tilde, mat sum, mat x, mat B, mat room), (x_tilde, sum, x, B, room),
      ADAPTER, 2. * B.rows * (double)elements(x), 2 * size_of(x) + size_of(sum) + size_of(B))
TIMED(block_diagonal_backward, (mat dx, mat dB, mat dx_tilde, mat g, mat x, mat B, mat room, enum mode mode),
      (dx, dB, dx_tilde, g, x, B, room, mode),
      ADAPTER, (dx.p ? 4. : 2.) * B.rows * (double)elements(x), (dx.p ? mode == ADD ? 5 : 4 : 2) * size_of(x) + 2 * size_of(dB))
TIMED(add, (mat y, mat x, double scale), (y, x, scale), ADAPTER, 0, 3 * size_of(x))
TIMED(embedding_forward, (mat out, mat table, dev_ints ids), (out, table, ids), MOVES, 0, 2 * size_of(out))
TIMED(embedding_backward, (mat dtable, mat dout, dev_ints ids), (dtable, dout, ids), MOVES, 0, dtable.p ? 3 * size_of(dout) : 0)
TIMED(copy, (mat y, mat x), (y, x), MOVES, 0, size_of(x) + size_of(y))
TIMED(zero, (mat x), (x), MOVES, 0, size_of(x))
TIMED(adamw, (mat w, mat dw, mat m, mat v, double lr, double decay, double g, int t), (w, dw, m, v, lr, decay, g, t),
      ADAMW, 0, 7 * size_of(w))
