/*  gpu_half.c: the half of the tests that runs on a GPU, real or emulated. It is linked with train.cu's ops.
    test_all.c, the CPU's half, is linked beside it with its own names hidden, and calls these functions.   */

#define main train_main
#include "../train.c"
#undef main
#include "halves.h"

snapshot *gpu_results(const char *what, int recompute, const snapshot *other, const char *dir);
snapshot *gpu_results(const char *what, int recompute, const snapshot *other, const char *dir)
{
    snprintf(scratch, sizeof scratch, "%s", dir);
    return results_of(what, recompute, other);
}

double gpu_tolerance(int one_op)
{
    return sizeof(real) == 2 && one_op ? 1e-2 : check_tolerance();      // one op rounds to bf16 once or twice
}

// The allocations that one training step makes after its model is loaded; -1 on a real GPU, where nothing
// counts them.
long gpu_allocations(const char *base, const char *method_name, int recompute);
long gpu_allocations(const char *base, const char *method_name, int recompute)
{
    if (!cuda_on_cpu_mallocs) return -1;
    model m = {0};
    plan p = small_plan(method_name);
    batch b = small_batch(0, 3);
    p.rank = 2;
    p.recompute = recompute;
    p.positions = 8;
    p.tokens = b.tokens;
    opt.model = base;
    model_measure(&m, open_config(), p);
    fill_model(&m, &b, 1);
    long before = cuda_on_cpu_mallocs();
    zero(flat(&m, m.grad));
    model_step(&m, &b, 1.0 / b.targets);
    update(&m, 1, opt.lr, gradient_norm(&m));
    long made = cuda_on_cpu_mallocs() - before;
    batch_free(&b);
    model_free(&m);
    return made;
}
