/*  bench.c: how fast, how large, and where the time goes. `make bench`, or

        build/bench [--model DIR] [--method M --rank R] [--batch B --seq T …]      options of ./train
        build/bench scaling [--threads 1]       a CSV: time and memory against each thing that they grow with

    The stopwatch in every op is dev/stopwatch.h's.

    Each row runs in a process of its own, so that its peak memory is its own.                                    */

#define main train_main
#include "../train.c"
#undef main
#include <sys/resource.h>
#include <sys/wait.h>
#include "stopwatch.h"

// With --threads 1 the clock is the processor's own, so that neighbours on the machine do not count.
static double now(void)
{
    struct timespec t;
    clock_gettime(omp_get_max_threads() == 1 ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// ---- what the machine can do -------------------------------------------------------------------------------

#if defined __AVX512F__
typedef float lanes __attribute__((vector_size(64)));
#elif defined __AVX__
typedef float lanes __attribute__((vector_size(32)));
#else
typedef float lanes __attribute__((vector_size(16)));
#endif
enum { CHAINS = 12 };                   // independent multiply-adds in flight: two units of four or five cycles each

// Multiply-adds a second from registers alone, all threads together, best of twenty.
static double machine_flops(int threads)
{
    enum { ROUNDS = 1 << 22 };
    double best = 0;
    for (int turn = 0; turn < 20; turn++) {
        double start = now();
        #pragma omp parallel num_threads(threads)
        {
            lanes a[CHAINS], x = (lanes){0} + 0.999f, y = (lanes){0} + 1e-3f;
            for (int j = 0; j < CHAINS; j++) a[j] = (lanes){0} + (float)j;
            // No instruction: the numbers may have changed. GCC had seen that the chain of 1 stays 1, computed
            // it before the loop, and the peak was a twelfth too high.
            for (int j = 0; j < CHAINS; j++) __asm__ volatile("" : "+x"(a[j]), "+x"(x), "+x"(y));
            for (int i = 0; i < ROUNDS; i++) {
                #pragma GCC unroll 16
                for (int j = 0; j < CHAINS; j++) a[j] = a[j] * x + y;
            }
            for (int j = 0; j < CHAINS; j++) __asm__ volatile("" : : "x"(a[j]));
        }
        best = fmax(best, 2. * ROUNDS * CHAINS * (sizeof(lanes) / 4) * threads / (now() - start));
    }
    return best;
}

// Bytes a second of y += x on arrays far larger than any cache: two read, one written.
static double machine_bandwidth(int threads)
{
    enum { N = 1 << 25 };
    float *x = alloc(N, 4), *y = alloc(N, 4);
    double best = 0;
    for (int i = 0; i < N; i++) x[i] = 1;                               // or all its pages were one page of zeros
    for (int turn = 0; turn < 5; turn++) {
        double start = now();
        #pragma omp parallel for simd num_threads(threads)
        for (int i = 0; i < N; i++) y[i] += 0.5f * x[i];
        if (turn) best = fmax(best, 12. * N / (now() - start));
    }
    free(x), free(y);
    return best;
}

static mat filled(int rows, int cols)
{
    mat m = mat_of(dev_alloc((size_t)rows * (size_t)cols * sizeof(real)), TYPE_OF(real), SHAPE(rows, cols));
    rng g = {1};
    if (!m.p) die("out of memory");
    for (size_t i = 0; i < elements(m); i++) ((real *)m.p)[i] = (real)(rng_uniform(&g) - 0.5);
    return m;
}

static double product_rate(void (*f)(mat, mat, mat, double, enum mode), int n)
{
    mat y = filled(n, n), x = filled(n, n), w = filled(n, n);
    double best = 0;
    for (int turn = 0; turn < 10; turn++) {
        double start = now();
        f(y, x, w, 1, SET);
        best = fmax(best, 2. * n * n * n / (now() - start));
    }
    dev_free(y.p), dev_free(x.p), dev_free(w.p);
    return best;
}

// Runs f in a process of its own. It leaves its findings in *shared; the peak of its resident memory is returned, in bytes.
static double in_child(void (*f)(void))
{
    fflush(stdout);
    pid_t child = fork();
    if (child < 0) die("fork: %s", strerror(errno));
    if (!child) f(), fflush(stdout), _exit(0);
    int status;
    struct rusage usage;
    if (wait4(child, &status, 0, &usage) != child || status) exit(1);
    return (double)usage.ru_maxrss * 1024;
}

static struct found { double flops, bandwidth, step, load, init, plan, tokens; cost spent[GROUPS]; } *shared;

static void measure_machine(void)
{
    int threads = omp_get_max_threads();
    printf("multiply-add peak from registers, float:");
    for (int t = 1; t <= threads; t++) {
        shared->flops = machine_flops(t);
        printf("  %d thread%s %.1f GFLOP/s", t, t > 1 ? "s" : "", shared->flops / 1e9);
    }
    shared->bandwidth = machine_bandwidth(threads);
    printf(";  memory %.1f GB/s\n", shared->bandwidth / 1e9);
    printf("1024 x 1024 x 1024 with %d threads:", threads);
    if (opt.bf16) dev_bf16(1);
    const char *names[] = {"nt", "nn", "tn"};
    void (*const products[])(mat, mat, mat, double, enum mode) = {matmul_nt, matmul_nn, matmul_tn};
    for (int i = 0; i < 3; i++) {
        double rate = product_rate(products[i], 1024);
        printf("  matmul_%s %.1f GFLOP/s, %.0f %% of the peak", names[i], rate / 1e9, 100 * rate / shared->flops);
    }
    puts(opt.bf16 ? "\nwith --bf16, whose peak is another: % of the peak and the floor are those of floats\n" : "\n");
}

// ---- one row: some steps of one method ---------------------------------------------------------------------

static dataset random_rows(int vocab)
{
    dataset d = {.path = "random rows"};
    rng g = {7};
    for (int i = 0; i < opt.batch; i++) {
        row r = {.ids = alloc((size_t)opt.seq + 1, sizeof(int)), .n = opt.seq + 1, .prompt = 1};     // --seq of them are fed
        for (int j = 0; j < r.n; j++) r.ids[j] = (int)(rng_next(&g) % (uint64_t)vocab);
        arrput(d.rows, r);
    }
    return d;
}

static void no_progress(int done, int of) { (void)done, (void)of; }

static void measure_steps(void)
{
    run r = {.epoch = -1, .steps = 1};
    plan p = plan_from_options();
    double start = now();
    config c = open_config();
    r.train = random_rows(c.vocab);
    model_measure(&r.m, c, p);
    shared->step = 0;
    if (*r.m.refused) return;
    plan_sizes(&p, c, &r.train, &r.val, 0);
    r.m.p = p;
    layout(&r.m);
    r.order = alloc((size_t)opt.batch, sizeof *r.order);
    model_allocate(&r.m);
    r.m.file = checkpoint_open(opt.model, "model");
    model_load(&r.m, opt.model);
    shared->load = now() - start, start = now();
    adapters_init(&r.m, NULL, 0, no_progress);                     // no row here starts from a gradient of the data
    shared->init = now() - start;
    if (opt.bf16) dev_bf16(1);
    shared->plan = planned_bytes(&r.m);

    // The fastest step counts: neighbours on the machine only ever slow one down. The first, which faults its pages in, does
    // not count where there are others.
    batch b = batch_new(r.m.p.tokens, opt.batch);
    int least = opt.steps ? opt.steps : 6, tokens;
    double all = 0;
    for (int step = 0; step < least || (!opt.steps && all < 3); step++) {
        double norm, began = now();
        memset(op_spent, 0, sizeof op_spent);
        train_step(&r, &b, &norm, &tokens);
        update(&r.m, step + 1, 1e-4, norm);
        double time = now() - began;
        all += time;
        if (step > 1 && time > shared->step) continue;
        shared->step = time, shared->tokens = tokens;
        memset(shared->spent, 0, sizeof shared->spent);
        for (struct op_spent *o = op_spent; o->op; o++) {
            cost *sum = &shared->spent[o->group];
            sum->seconds += o->spent.seconds, sum->flops += o->spent.flops, sum->bytes += o->spent.bytes;
        }
    }
}

static void print_heading(void)
{
    printf("%-8s %4s %8s |", "method", "rank", "ms/step");
    for (int g = 0; g < GROUPS; g++) printf(" %9s", group_names[g]);
    printf(" %7s | %6s %6s | %7s %7s | %6s %6s\n", "rest", "tok/s", "peak%", "RSS MB", "plan MB", "load s", "init s");
}

static void print_row(double rss)
{
    double all = 0, flops = 0;
    printf("%-8s %4d %8.1f |", opt.method, opt.rank, 1e3 * shared->step);
    for (int g = 0; g < GROUPS; g++) {
        const cost *c = &shared->spent[g];
        printf(" %9.1f", 1e3 * c->seconds);
        all += c->seconds;
        flops += c->flops;
    }
    printf(" %7.1f | %6.0f %6.1f | %7.0f %7.0f | %6.2f %6.2f\n", 1e3 * (shared->step - all), shared->tokens / shared->step,
        100 * flops / shared->step / shared->flops, rss / 1e6, shared->plan / 1e6, shared->load, shared->init);
    printf("%-8s %4s %8s |", "", "", "floor");
    for (int g = 0; g < GROUPS; g++)
        printf(" %9.1f", 1e3 * fmax(shared->spent[g].flops / shared->flops, shared->spent[g].bytes / shared->bandwidth));
    puts("");
}

static void measure_row(const char *method_name, int rank)
{
    opt.method = method_name, opt.rank = rank;
    double rss = in_child(measure_steps);
    if (shared->step > 0) print_row(rss);
    else printf("%-8s %4d  the rank does not divide this model's weights\n", method_name, rank);
}

static const struct { const char *method; int rank; } rows[] = {
    {"lora", 18}, {"lora", 36}, {"pissa", 18}, {"pissa", 36}, {"bone", 32}, {"bone", 64}, {"bat", 32}, {"bat", 64},
    {"bat-row", 32}, {"bat-row", 64}, {"full", 1},
};

// ---- how cost grows ----------------------------------------------------------------------------------------
//
//  One number of a small model at a time, all else as it is. gflop is what the products of a step count up to: time may
//  not grow faster, nor memory faster than its plan.

static void measure_scaling(void)
{
    enum { LAYERS, VOCAB, RANK, BATCH, SEQ, NUMBERS };
    static const struct { const char *name; int number, values[7]; } sweeps[] = {
        {"rows of 128 tokens", BATCH, {1, 2, 4, 8, 16, 32}},
        {"tokens a row (4096 in all)", SEQ, {64, 128, 256, 512, 1024, 2048, 4096}},
        {"layers", LAYERS, {1, 2, 4, 8, 16, 32}},
        {"vocabulary", VOCAB, {1000, 2000, 4000, 8000, 16000, 32000, 64000}},
        {"rank", RANK, {4, 8, 16, 32, 64, 128, 256}},
    };
    opt.steps = 6;
    puts("swept,value,ms,tok_per_s,gflop,peak_mb,plan_mb");
    for (size_t i = 0; i < sizeof sweeps / sizeof *sweeps; i++)
        for (const int *value = sweeps[i].values; value < sweeps[i].values + 7 && *value; value++) {
            int n[NUMBERS] = {4, 4000, 32, 8, 128};
            char command[200];
            n[sweeps[i].number] = *value;
            if (sweeps[i].number == SEQ) n[BATCH] = 4096 / *value;
            snprintf(command, sizeof command, "rm -rf build/scaling && build/random_model 256,704,%d,4,%d build/scaling",
                n[LAYERS], n[VOCAB]);
            if (system(command)) die("%s failed", command);
            opt.model = "build/scaling", opt.method = "bone", opt.rank = n[RANK], opt.batch = n[BATCH], opt.seq = n[SEQ];
            double flops = 0, peak = in_child(measure_steps);
            for (int g = 0; g < GROUPS; g++) flops += shared->spent[g].flops;
            printf("%s,%d,%.2f,%.0f,%.3f,%.1f,%.1f\n", sweeps[i].name, *value, 1e3 * shared->step,
                shared->tokens / shared->step, flops / 1e9, peak / 1e6, shared->plan / 1e6);
        }
}

int main(int argc, char **argv)
{
    spin_briefly(argv);
    setvbuf(stdout, NULL, _IOLBF, 0);
    opt.batch = 4, opt.method = NULL, opt.model = NULL;
    int scaling = argc > 1 && !strcmp(argv[1], "scaling");
    parse_options(argc - scaling, argv + scaling);
    check_device();
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED) die("mmap: %s", strerror(errno));
    if (scaling) { measure_scaling(); return 0; }
    in_child(measure_machine);
    const char *only = opt.method, *one[] = {opt.model, NULL}, *both[] = {"build/15m", "build/110m", NULL};
    int rank = opt.rank;
    for (const char **dir = opt.model ? one : both; *dir; dir++) {
        opt.model = *dir;
        printf("%s, batch %d, %d tokens a row, %d threads\n", *dir, opt.batch, opt.seq, omp_get_max_threads());
        print_heading();
        if (only) measure_row(only, rank);
        else for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) measure_row(rows[i].method, rows[i].rank);
        puts("");
    }
    return 0;
}
