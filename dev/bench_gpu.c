/*  bench_gpu.c: how fast and how large on a GPU. `make bench-gpu`, or

        build/bench_gpu [--peer] [SHAPE …]          1b, 7b (the default is both); tiny to see it run without a GPU

    Random weights are made in memory. A row is a method on a number of tokens a step: tokens/s, the arithmetic that the
    method needs (4 P a token where the base is frozen, 6 P where a full-sized gradient is made; attention besides), its
    share of what the card's matrix products reach in the same run, and memory in use beside the plan. --peer runs
    transformers + PEFT on the same shape and tokens (dev/bench_gpu_peer.py).                                         */

#define main train_main
#include "../train.c"
#undef main

static const struct shape_row { const char *name; int dim, hidden, layers, heads, kv_heads, vocab; } shapes[] = {
    {"tiny", 128, 192, 2, 4, 2, 512}, {"1b", 2048, 5632, 22, 32, 4, 32000}, {"7b", 4096, 11008, 32, 32, 32, 32000},
};
static const struct { const char *method; int rank, flops; } bench_rows[] = { // flops: of P, a token
    {"lora", 36, 4}, {"bone", 64, 4}, {"bat", 64, 6}, {"bat-row", 64, 4}, {"full", 1, 6},
};
static const struct { int batch, seq; } loads[] = {{4, 1024}, {16, 1024}};

// What y = x Wᵀ reaches alone, in the precision that trains: floating-point operations a second.
static double matmul_rate(int n)
{
    enum { TURNS = 20 };
    size_t bytes = (size_t)n * (size_t)n * sizeof(real);
    mat m[3], corner;
    wide one;
    for (int i = 0; i < 3; i++) m[i] = mat_of(dev_alloc(bytes), TYPE_OF(real), SHAPE(n, n));
    if (!m[0].p || !m[1].p || !m[2].p) die("out of memory for a product of %d", n);
    corner = rows_of(m[0], 0, 1), corner.cols = 1;
    double start = 0;
    for (int turn = -2; turn < TURNS; turn++) {
        if (turn == 0) get(&one, corner), start = seconds();                    // get waits for the device
        matmul_nt(m[0], m[1], m[2], 1, SET);
    }
    get(&one, corner);
    double rate = 2. * n * n * n * TURNS / (seconds() - start);
    for (int i = 0; i < 3; i++) dev_free(m[i].p);
    return rate;
}

static config config_of(const struct shape_row *s)
{
    return (config){.dim = s->dim, .hidden = s->hidden, .layers = s->layers, .heads = s->heads, .kv_heads = s->kv_heads, .head_dim = s->dim / s->heads,
        .vocab = s->vocab, .max_pos = 4096, .eps = 1e-5, .theta = 10000, .window = INT_MAX, .rope_factor = 1};
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
        if (strncmp(t->name, "model.", 6) && strcmp(t->name, "lm_head.weight")) continue;
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
        batch_add(&b, &(row){ids, seq + 1, 1, NULL});
    }
    free(ids);
    return b;
}

static void measure(const struct shape_row *s, int method_row, int batch_rows, int seq, double rate)
{
    enum { STEPS = 5 };
    config c = config_of(s);
    double before, after, all;
    model m = {0};
    opt.method = bench_rows[method_row].method, opt.rank = bench_rows[method_row].rank;
    plan p = plan_from_options();
    p.tokens = batch_rows * seq, p.positions = seq, p.recompute = 2;
    model_measure(&m, c, p);
    dev_memory(&before, &all);
    printf("%-5s %-8s r%-3d %2d x %-4d ", s->name, opt.method, opt.rank, batch_rows, seq);
    if (before + planned_bytes(&m) > all) {
        printf("does not fit: planned %.1f GB of %.1f\n", planned_bytes(&m) / 1e9, all / 1e9);
        return;
    }
    model_allocate(&m);
    random_base(&m);
    for (int i = 0; i < arrlen(m.linears); i++)
        if (m.linears[i]->method->init) m.p.method->init(&m, m.linears[i], "bench");
    batch b = random_batch(&c, batch_rows, seq);
    double start = 0, loss = 0;
    for (int step = -1; step < STEPS; step++) {
        if (step == 0) start = seconds();
        zero(flat(&m, m.grad));
        loss = model_step(&m, &b, 1.0 / b.targets);
        update(&m, step + 2, 1e-4, gradient_norm(&m));                        // the norm waits for the device
    }
    gradient_norm(&m);
    double time = (seconds() - start) / STEPS, P = base_parameters(&m) - (double)c.vocab * c.dim, tokens = p.tokens;
    double flops = tokens * (bench_rows[method_row].flops * P + (2 + 2 + 5) * (double)seq * c.dim * c.layers);      // recomputing is not counted as needed
    dev_memory(&after, &all);
    printf("%9.0f tok/s  %7.1f TFLOP/s needed  %5.1f %% of the product rate   %6.1f GB, planned %6.1f   loss %.3f\n",
        tokens / time, flops / time / 1e12, 100 * flops / time / rate, (after - before) / 1e9, planned_bytes(&m) / 1e9, loss / b.targets);
    fflush(stdout);
    batch_free(&b), model_free(&m);
}

int main(int argc, char **argv)
{
    int peer = argc > 1 && !strcmp(argv[1], "--peer"), n = sizeof shapes / sizeof *shapes;
    printf("%s\n", dev_name());
    for (int i = 0; i < n; i++) {
        int wanted = argc - 1 == peer && i > 0;
        for (int a = 1 + peer; a < argc; a++) wanted |= !strcmp(argv[a], shapes[i].name);
        if (!wanted) continue;
        double rate = matmul_rate(i ? 8192 : 256);
        printf("products of %d: %.1f TFLOP/s\n", i ? 8192 : 256, rate / 1e12);
        for (size_t l = 0; l < sizeof loads / sizeof *loads; l++)
            for (size_t r = 0; r < sizeof bench_rows / sizeof *bench_rows; r++) measure(&shapes[i], (int)r, i ? loads[l].batch : 2, i ? loads[l].seq : 32, rate);
        char command[400];
        const struct shape_row *s = &shapes[i];
        snprintf(command, sizeof command, "python3 dev/bench_gpu_peer.py --shape %d,%d,%d,%d,%d,%d", s->dim, s->hidden, s->layers, s->heads, s->kv_heads, s->vocab);
        if (peer && system(command)) die("%s failed: torch, transformers and peft are needed for it", command);
    }
    return 0;
}
