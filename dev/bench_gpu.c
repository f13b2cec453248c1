/*  bench_gpu.c: how fast and how large on a GPU, and where the time goes. `make bench-gpu`, or

        build/bench_gpu [--recompute] [--peer] [--profile] [WORD …]     words choose shapes, methods, loads (7b, bone, 16x1024)

    Random weights are made in memory. A row is a method on a number of tokens a step: tokens/s, the arithmetic that the
    method needs (4 P a token where the base is frozen, 6 P where a full-sized gradient is made; P is all of the base but
    the embeddings; attention besides, but not RWKV6's recurrence, a hundredth of it in the 3B shape), its share of what
    the card's matrix products reach in the same run, and memory in use beside the plan. As little is computed twice as
    the card's memory allows; --recompute measures each row a second time, as ./train --recompute 2, which keeps of a
    layer only what enters it. --profile adds where the time of a step goes, op by op, each waiting for the one before.
    --peer runs transformers + PEFT on the same shape and tokens, Llama's only (dev/bench_gpu_peer.py).

        build/bench_gpu --recompute rwkv-3b 16x1024 lora bone bat       the paper's table 6  */

#define main train_main
#include "../train.c"
#undef main
#include "stopwatch.h"

#define COUNT(table) (sizeof table / sizeof *table)

// usual: those that are measured where no word chooses others. lora: its rank, which trains as many numbers as Bone's 64.
static const struct shape_row {
    const char *name;
    const backbone *backbone;
    int usual, dim, hidden, layers, heads, kv_heads, vocab, lora;
} shapes[] = {
    {"tiny",      &llama_backbone, 0,  128,   192,  2,  4,  2,   512, 36},
    {"1b",        &llama_backbone, 1, 2048,  5632, 22, 32,  4, 32000, 36},
    {"7b",        &llama_backbone, 1, 4096, 11008, 32, 32, 32, 32000, 36},
    {"layer",     &llama_backbone, 0, 4096, 11008,  2, 32, 32, 32000, 36},      // of 7b, two: there in a second
    {"rwkv-tiny", &rwkv6_backbone, 0,  128,   448,  2,  2,  2,   512, 32},
    {"rwkv-3b",   &rwkv6_backbone, 0, 2560,  8960, 32, 40, 40, 65536, 32},
};
static const struct bench_row { const char *method; int rank, flops; } bench_rows[] = { // flops: of P, a token
    {"lora", 0, 4}, {"bone", 64, 4}, {"bat", 64, 6}, {"bat-row", 64, 4}, {"full", 1, 6},        // rank 0: the shape's
};
static const struct load { const char *name; int usual, rows, seq; } loads[] = {
    {"4x1024", 1, 4, 1024}, {"16x1024", 1, 16, 1024}, {"4x4096", 1, 4, 4096}, {"2x32", 0, 2, 32},
};

// What the words of the command line choose.
static struct { int shapes[COUNT(shapes)], methods[COUNT(bench_rows)], loads[COUNT(loads)]; } picked;
static int any_shape, any_method, any_load;

static void choose(const char *word)
{
    int known = 0;
    for (size_t i = 0; i < COUNT(shapes); i++)
        if (!strcmp(word, shapes[i].name)) known = any_shape = picked.shapes[i] = 1;
    for (size_t i = 0; i < COUNT(bench_rows); i++)
        if (!strcmp(word, bench_rows[i].method)) known = any_method = picked.methods[i] = 1;
    for (size_t i = 0; i < COUNT(loads); i++)
        if (!strcmp(word, loads[i].name)) known = any_load = picked.loads[i] = 1;
    if (!known) die("%s: no shape, method or load of that name (dev/bench_gpu.c)", word);
}

static mat one_number(mat m)                            // reading it waits for the device
{
    mat corner = rows_of(m, 0, 1);
    corner.cols = corner.batch = 1;
    return corner;
}

static mat watched;                                     // some memory of the device
static double now(void)
{
    wide one;
    get(&one, watched);
    return seconds();
}

// What y = x Wᵀ reaches alone, on normal numbers in the precision that trains: floating-point operations a second.
static double matmul_rate(int n)
{
    enum { TURNS = 20 };
    size_t count = (size_t)n * (size_t)n;
    wide *noise = alloc(count, sizeof *noise);
    rng g = {3};
    for (size_t i = 0; i < count; i++) noise[i] = (wide)(i < 1 << 20 ? rng_normal(&g) : noise[i - (1 << 20)]);
    mat m[3];
    for (int i = 0; i < 3; i++) {
        m[i] = mat_of(dev_alloc(count * sizeof(real)), TYPE_OF(real), SHAPE(n, n));
        if (!m[i].p) die("out of memory for a product of %d", n);
        put(m[i], noise, TYPE_OF(wide));
    }
    free(noise);
    watched = one_number(m[0]);
    double start = 0;
    for (int turn = -2; turn < TURNS; turn++) {
        if (turn == 0) start = now();
        matmul_nt(m[0], m[1], m[2], 1, SET);
    }
    double rate = 2. * n * n * n * TURNS / (now() - start);
    for (int i = 0; i < 3; i++) dev_free(m[i].p);
    return rate;
}

// The fields that only RWKV6 reads are those from .att on; its low ranks are as wide as BlinkDL's models have them.
static config config_of(const struct shape_row *s)
{
    config c = {.backbone = s->backbone,
        .dim = s->dim, .hidden = s->hidden, .layers = s->layers, .heads = s->heads, .kv_heads = s->kv_heads,
        .head_dim = s->dim / s->heads, .vocab = s->vocab, .max_pos = 4096, .eps = 1e-5, .theta = 10000, .window = INT_MAX,
        .rope_factor = 1, .att = s->dim, .head_divisor = 8};
    if (c.backbone->sizes) c.backbone->sizes(&c, NULL);
    return c;
}

// Every weight takes its numbers from one pool of random bf16: a seven-billion model is there in seconds.
static void random_base(model *m)
{
    enum { POOL = 1 << 24 };
    size_t most = 0;
    for (int i = 0; i < arrlen(m->tensors); i++) if (elements(*m->tensors[i].value) > most) most = elements(*m->tensors[i].value);
    uint16_t *pool = alloc(most + POOL, sizeof *pool);
    rng g = {1};
    for (size_t i = 0; i < POOL; i++) pool[i] = to_bf16((float)((rng_uniform(&g) - 0.5) * 0.07));      // variance 0.02²
    for (size_t i = POOL; i < most + POOL; i++) pool[i] = pool[i - POOL];
    for (int i = 0; i < arrlen(m->tensors); i++) {
        tensor *t = &m->tensors[i];
        if (!of_base(t)) continue;
        mat from = mat_of((dev)(pool + rng_next(&g) % POOL), BF16, t->shape);
        if (t->kind == BASE) *t->value = dev_weight(from);
        else put(*t->value, pool, BF16);
    }
    free(pool);
}

static batch random_batch(const config *c, int count, int seq)
{
    batch b = batch_new(count * seq, count);
    int *ids = alloc((size_t)seq + 1, sizeof *ids);
    rng g = {7};
    for (int i = 0; i < count; i++) {
        for (int j = 0; j <= seq; j++) ids[j] = (int)(rng_next(&g) % (uint64_t)c->vocab);
        batch_add(&b, &(row){.ids = ids, .n = seq + 1, .prompt = 1});
    }
    free(ids);
    return b;
}

// Lays the model out with the least recomputing, `least` or more, that fits into the memory that is free. Returns its
// level, or -1.
static int fit(model *m, config c, plan p, int least, double free_bytes)
{
    for (p.recompute = least; p.recompute <= 2; p.recompute++) {
        model_measure(m, c, p);
        if (planned_bytes(m) < free_bytes) return p.recompute;
        model_unmeasure(m);
    }
    return -1;
}

static double bench_step(model *m, const batch *b, int t)
{
    zero(flat(m, m->grad));
    double loss = model_step(m, b, 1.0 / b->targets);
    update(m, t, 1e-4, gradient_norm(m));               // the norm waits for the device
    return loss / b->targets;
}

static void print_profile(double step)
{
    double all = 0;
    printf("      %-21s %-9s %5s %9s %6s %9s %9s\n", "op", "group", "calls", "ms", "%", "TFLOP/s", "GB/s");
    for (struct op_spent *o = op_spent; o->op; o++) {
        double t = o->spent.seconds;
        all += t;
        printf("      %-21s %-9s %5d %9.2f %6.1f %9.1f %9.0f\n", o->op, group_names[o->group], o->calls, 1e3 * t, 100 * t / step,
            o->spent.flops / t / 1e12, o->spent.bytes / t / 1e9);
    }
    printf("      all ops %.1f ms, each waited for; a step without waiting %.1f ms\n", 1e3 * all, 1e3 * step);
}

// A row, computed twice as little as the memory allows, or at --recompute `least`. Returns at which it was, or -1.
static int measure(const struct shape_row *s, const struct bench_row *what, const struct load *l, double rate, int least,
                   int profile)
{
    enum { STEPS = 4 };
    config c = config_of(s);
    double before, after, all;
    model m = {0};
    opt.method = what->method, opt.rank = what->rank ? what->rank : s->lora, opt.batch = l->rows, opt.seq = l->seq;
    plan p = plan_from_options();
    p.tokens = l->rows * l->seq, p.positions = l->seq;
    dev_memory(&before, &all);
    printf("%-9s %-7s r%-2d %7s ", s->name, opt.method, opt.rank, l->name);
    int recompute = fit(&m, c, p, least, all - before - 1.5e9);
    if (recompute < 0) { puts("does not fit"); return -1; }
    model_allocate(&m);
    random_base(&m);
    for (int i = 0; i < arrlen(m.linears); i++)
        if (m.linears[i]->method->init) m.p.method->init(&m, m.linears[i], "bench");
    batch b = random_batch(&c, l->rows, l->seq);
    double loss = bench_step(&m, &b, 1), start = seconds();
    for (int step = 0; step < STEPS; step++) bench_step(&m, &b, step + 2);
    gradient_norm(&m);
    double time = (seconds() - start) / STEPS, P = base_parameters(&m) - (double)c.vocab * c.dim, tokens = p.tokens;
    // attention: 2 products forward, 5 back
    double attention = c.backbone == &llama_backbone ? (2 + 5) * (double)l->seq * c.dim * c.layers : 0;
    double flops = tokens * (what->flops * P + attention);
    dev_memory(&after, &all);
    printf("recompute %d %8.0f tok/s %6.1f TFLOP/s needed, %4.1f %% of the product rate %6.1f GB, planned %6.1f   loss %.3f\n",
        recompute, tokens / time, flops / time / 1e12, 100 * flops / time / rate, (after - before) / 1e9,
        planned_bytes(&m) / 1e9, loss);
    if (profile) {
        memset(op_spent, 0, sizeof op_spent);
        watched = one_number(m.dx);
        stopwatch_runs = 1, bench_step(&m, &b, STEPS + 2), stopwatch_runs = 0;
        print_profile(time);
    }
    fflush(stdout);
    batch_free(&b), model_free(&m);
    return recompute;
}

int main(int argc, char **argv)
{
    int peer = 0, profile = 0, twice = 0;
    stopwatch_runs = 0;
    for (int a = 1; a < argc; a++) {
        if (!strcmp(argv[a], "--peer")) peer = 1;
        else if (!strcmp(argv[a], "--profile")) profile = 1;
        else if (!strcmp(argv[a], "--recompute")) twice = 1;
        else choose(argv[a]);
    }
    printf("%s\n", dev_name());
    for (const struct shape_row *s = shapes; s < shapes + COUNT(shapes); s++) {
        if (!(any_shape ? picked.shapes[s - shapes] : s->usual)) continue;
        int n = s->dim < 8192 / 4 ? 256 : 8192;
        double rate = matmul_rate(n);
        printf("products of %d: %.1f TFLOP/s\n", n, rate / 1e12);
        for (size_t l = 0; l < COUNT(loads); l++)
            for (size_t r = 0; r < COUNT(bench_rows); r++) {
                if (!(any_load ? picked.loads[l] : loads[l].usual) || (any_method && !picked.methods[r])) continue;
                int recompute = measure(s, &bench_rows[r], &loads[l], rate, 0, profile);
                if (twice && recompute >= 0 && recompute < 2) measure(s, &bench_rows[r], &loads[l], rate, 2, profile);
            }
        char command[400];
        snprintf(command, sizeof command, "python3 dev/bench_gpu_peer.py --shape %d,%d,%d,%d,%d,%d", s->dim, s->hidden, s->layers,
            s->heads, s->kv_heads, s->vocab);
        if (peer && s->backbone == &llama_backbone && system(command))
            die("%s failed: torch, transformers and peft are needed for it", command);
    }
    return 0;
}
