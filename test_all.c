/*  test_all.c: what this program claims, and the check of each claim.

    build/test_f64 and build/test_f32 are this file compiled with double and with float. No argument runs all tests; an
    argument those whose name contains it; a second one keeps them to one method, or to the ops whose name contains it.
    The exit status is the verdict. Every comparison is `ok = err <= tol`, so NaN fails, and a reference of zeros is an
    error. dev/mutants.sh breaks the code on purpose and asks that these tests turn red.                          */

#include "ops/cpu.c"
#define main train_main                 // the program's own
#include "train.c"
#undef main
#include "dev/halves.h"


static char skipped[160];               // why a test cannot run here

// ---- gradients --------------------------------------------------------------------------------------------------

// Central differences of f at every number of x against dx: four points, so that the error is h⁴ and h may be large
// enough for rounding not to matter.
static double numeric_error(double (*f)(void *), void *context, mat x, mat dx)
{
    static const struct { double at, weight; } points[4] = {{-2, 1}, {-1, -8}, {1, 8}, {2, -1}};
    size_t n = elements(x);
    wide *numeric = alloc(n, sizeof *numeric), *analytic = host(dx);
    for (size_t i = 0; i < n; i++) {
        wide *at_i = (wide *)x.p + i, was = *at_i;
        double sum = 0, h = 2e-4;
        for (int k = 0; k < 4; k++) *at_i = (wide)((double)was + points[k].at * h), sum += points[k].weight * f(context);
        *at_i = was;
        numeric[i] = (wide)(sum / (12 * h));
    }
    double err = distance(analytic, numeric, n);
    free(numeric), free(analytic);
    return err;
}

typedef struct { model *m; batch b; } stepped;
static double loss_of(void *context)
{
    stepped *s = context;
    return model_step(s->m, &s->b, 0) / s->b.targets;
}

static void test_gradients(void)
{
    for (int i = 0; i < METHODS; i++)
        for (int tied = 0; tied < (i ? 1 : 2) && !left_out(i); tied++) {        // tied: another gradient of full, the same of all others
            model *m = open_small(small_plan(methods[i].name), tied);
            shake(m, 0.2, &dice);
            stepped s = {m, small_batch(0, 3)};
            model_step(m, &s.b, 1.0 / s.b.targets);
            for (int j = 0; j < arrlen(m->tensors); j++)
                if (m->tensors[j].kind == PARAM)
                    check(numeric_error(loss_of, &s, *m->tensors[j].at, *m->tensors[j].grad), 1e-7, "%s, d %s", methods[i].name, m->tensors[j].name);
            batch_free(&s.b), close_small(m);
        }
}

static double op_value(void *context)
{
    ((const op_case *)context)->forward();
    wide *x = host(op.out), *c = host(op.cot);
    double sum = dot(x, c, (int)elements(op.out));
    free(x), free(c);
    return sum;
}

static void test_ops(void)
{
    for (int i = 0; i < OP_CASES; i++) {
        op_case c = op_cases[i];
        op_open(&c, 1, HEAD, two_spans);
        for (int j = 0; j < 3; j++) if (op.grad[j].p) check(numeric_error(op_value, &c, op.in[j], op.grad[j]), 1e-7, "%s, input %d", op_cases[i].name, j);
        op_close();
    }
}

static void test_residual_copy(void)
{
    snapshot *list = residual_results(NULL);
    for (int i = 0; i < arrlen(list); i++) check(list[i].x[0] == 1 ? 0 : 1, 0, "%s", list[i].name);
    snapshots_free(list);
}

static void test_twice(void)            // every backward accumulates, none overwrites
{
    for (int i = 0; i < METHODS; i++) {
        model *m = open_small(small_plan(methods[i].name), 0);
        shake(m, 0.2, &dice);
        batch b = small_batch(0, 3);
        model_step(m, &b, 0.1);
        wide **once = NULL;
        for (int j = 0; j < arrlen(m->tensors); j++)
            if (m->tensors[j].kind == PARAM) arrput(once, host(*m->tensors[j].grad));
        model_step(m, &b, 0.1);
        for (int j = 0, k = 0; j < arrlen(m->tensors); j++) {
            if (m->tensors[j].kind != PARAM) continue;
            wide *twice = host(*m->tensors[j].grad);
            for (size_t n = 0; n < elements(*m->tensors[j].grad); n++) once[k][n] *= 2;
            check(distance(twice, once[k], elements(*m->tensors[j].grad)), EXACT, "%s, d %s", methods[i].name, m->tensors[j].name);
            free(twice), free(once[k++]);
        }
        arrfree(once), batch_free(&b), close_small(m);
    }
}

static void test_accumulation(void)     // three micro-batches of one row = one of three rows
{
    for (int i = 0; i < METHODS; i++) {
        model *m = open_small(small_plan(methods[i].name), 0), *one = open_small(small_plan(methods[i].name), 0);
        rng before = dice;
        shake(m, 0.2, &dice), dice = before, shake(one, 0.2, &dice);
        batch b = small_batch(0, 3);
        model_step(m, &b, 1.0 / b.targets);
        for (int r = 0; r < 3; r++) {
            batch part = small_batch(r, r + 1);
            model_step(one, &part, 1.0 / b.targets);
            batch_free(&part);
        }
        for (int j = 0; j < arrlen(m->tensors); j++)
            if (m->tensors[j].kind == PARAM) check(mat_distance(*one->tensors[j].grad, *m->tensors[j].grad), EXACT, "%s, d %s", methods[i].name, m->tensors[j].name);
        batch_free(&b), close_small(m), close_small(one);
    }
}

static void test_recompute(void)        // what is not kept is computed again, to the same bits
{
    for (int i = 0; i < METHODS; i++) {
        wide *kept = NULL;
        size_t used[3];
        for (int n = 0; n < 3; n++) {
            plan p = small_plan(methods[i].name);
            p.recompute = n;
            model *m = open_small(p, 0);
            rng before = dice;
            shake(m, 0.2, &dice), dice = before;
            batch b = small_batch(0, 3);
            model_step(m, &b, 0.1);
            wide *grad = host(flat(m, m->grad));
            if (n) check(memcmp(grad, kept, m->used[PARAM] * sizeof(wide)) ? 1 : 0, 0, "%s, --recompute %d", methods[i].name, n), free(grad);
            else kept = grad;
            used[n] = m->used[ACT];
            batch_free(&b), close_small(m);
        }
        check(used[2] < used[1] && used[1] < used[0] ? 0 : 1, 0, "%s: activations take %zu, %zu, %zu", methods[i].name, used[0], used[1], used[2]);
        free(kept);
    }
}

// ---- splits of the same rows ----------------------------------------------------------------------------------------
//
// Hundreds of tiny models, rows and options by chance: whatever the plan, every split of a step's rows into micro-batches
// gives the loss and the gradient of the rows together, and scoring answers in between changes nothing. build/test_asan runs
// this under AddressSanitizer, so that a write beyond a plan is seen where it happens.

static int between(int least, int most) { return least + (int)(rng_next(&dice) % (uint64_t)(most - least + 1)); }

// A tiny Llama of random sizes, as a directory in the scratch space.
static char *tiny_model(void)
{
    static const char *const format =
        "{\"model_type\": \"llama\", \"hidden_size\": %d, \"intermediate_size\": %d, \"num_hidden_layers\": %d, \"num_attention_heads\": %d,"
        " \"num_key_value_heads\": %d, \"head_dim\": %d, \"vocab_size\": %d, \"rms_norm_eps\": 1e-5, \"tie_word_embeddings\": %s}";
    static int made;
    char name[32], text[400];
    snprintf(name, sizeof name, "tiny%d", made++);
    char *dir = in_scratch(name), *path = in_scratch("tiny.json");
    int kv = between(1, 3), group = between(1, 3);
    snprintf(text, sizeof text, format, between(1, 20), between(1, 24), between(1, 3), kv * group, kv, 2 * between(1, 3),
        between(3, 40), between(0, 1) ? "true" : "false");
    write_text(path, text);
    write_model(dir, path, 0.4, TYPE_OF(wide));
    free(path);
    return dir;
}

// Rows of 2 … longest tokens, one of them as short as a row can be; the prompt may be any part but all of a row.
static dataset tiny_rows(int count, int longest, int vocab)
{
    dataset d = {.path = "rows by chance"};
    for (int i = 0; i < count; i++) {
        row r = {.n = i ? between(2, longest) : 2, .answer = strdup("1")};
        r.ids = alloc((size_t)r.n, sizeof(int));
        r.prompt = between(1, r.n - 1);
        for (int j = 0; j < r.n; j++) r.ids[j] = between(0, vocab - 1);
        arrput(d.rows, r);
    }
    return d;
}

// A method and a rank that fit this model.
static plan tiny_plan(config c)
{
    for (;;) {
        plan p = plan_from_options();
        model m = {0};
        p.method = &methods[between(0, METHODS - 1)];
        p.rank = between(1, 9);
        p.mini_r = between(1, 6);
        p.alpha = 7;
        p.recompute = between(0, 2);
        model_measure(&m, c, p);
        int fits = !*m.refused;
        model_unmeasure(&m);
        if (fits) return p;
    }
}

// One step of these rows, in micro-batches of opt.batch; the gradient is left in r->m. `start`: what the adapter begins with,
// or NULL to make a start, which comes back in the list. Before the step, `scored` validation rows are answered.
static snapshot *split_step(run *r, plan p, int scored, const snapshot *start, double *loss, double *eval)
{
    int kinds = 1 << PARAM | 1 << START, tokens;
    long targets;
    double norm;
    opt.accum = ceil_div((int)arrlen(r->train.rows), opt.batch);
    plan_sizes(&p, open_config(), &r->train, &r->val, scored);
    memset(&r->m, 0, sizeof r->m);
    model_measure(&r->m, open_config(), p);
    r->epoch = -1;
    fill_run(r);
    if (!start) shake(&r->m, 0.2, &dice);
    give_kinds(&r->m, start, "start ", kinds, 0);
    snapshot *list = start ? NULL : take_kinds(NULL, "start ", &r->m, kinds, 0);
    if (scored) exact_match(&r->m, r->t, &r->val, scored, NULL, show_answers);
    *eval = evaluate(&r->m, &r->val, &targets);
    batch b = batch_new(r->m.p.tokens, opt.batch);
    *loss = train_step(r, &b, &norm, &tokens);
    batch_free(&b);
    return list;
}

static void split_case(int number, tokenizer *t)
{
    run whole = {.t = t}, parts;
    char *dir = tiny_model(), what[200];
    opt.model = dir;
    opt.no_shuffle = 1;
    opt.max_new = between(1, 12);
    config c = open_config();
    plan p = tiny_plan(c);
    whole.train = tiny_rows(between(1, 12), between(2, 40), c.vocab);
    whole.val = tiny_rows(between(1, 6), between(2, 40), c.vocab);
    int n = (int)arrlen(whole.train.rows), order[12], scored = between(0, 1) ? (int)arrlen(whole.val.rows) : 0;
    for (int i = 0; i < n; i++) order[i] = i;
    whole.order = order;
    double loss, eval, part_loss, part_eval;
    opt.batch = n;
    snapshot *start = split_step(&whole, p, 0, NULL, &loss, &eval);
    for (int i = 0; i < 2; i++) {
        opt.batch = i ? between(1, n) : 1;
        p.recompute = between(0, 2);
        omp_set_num_threads(between(1, 3));
        parts = whole;
        split_step(&parts, p, scored, start, &part_loss, &part_eval);
        snprintf(what, sizeof what, "case %d, %s, %d rows by %d", number, p.method->name, n, opt.batch);
        check(fabs(part_loss - loss) / loss, 1e-12, "%s: loss", what);
        check(fabs(part_eval - eval) / eval, 1e-12, "%s: eval loss", what);
        check(mat_distance(flat(&parts.m, parts.m.grad), flat(&whole.m, whole.m.grad)), 1e-10, "%s: gradient", what);
        model_free(&parts.m);
    }
    snapshots_free(start);
    model_free(&whole.m);
    free_rows(&whole.train);
    free_rows(&whole.val);
    free(c.text);
    free(dir);
}

static void test_splits(void)
{
    enum { CASES = 300 };
    int threads = omp_get_max_threads();
    tokenizer *t = open_tokenizer("base", 0);
    dice = (rng){11};
    for (int i = 0; i < CASES; i++) {
        rng next = {rng_next(&dice)};
        split_case(i, t);
        dice = next;                    // a case can be run alone, whatever the one before it drew
    }
    omp_set_num_threads(threads);
    tokenizer_free(t);
}

// ---- identities ---------------------------------------------------------------------------------------------------

static plan base_only(void)
{
    plan p = small_plan("full");
    p.train = 0;
    return p;
}

static void test_zero_start(void)
{
    for (int i = 1; i < METHODS; i++) {
        model *m = open_small(small_plan(methods[i].name), 0), *base = open_small(base_only(), 0);
        batch b = small_batch(0, 3);
        mat x = all_logits(m, &b), y = all_logits(base, &b);
        check(mat_distance(x, y), EXACT, "%s", methods[i].name);
        dev_free(x.p), dev_free(y.p), batch_free(&b), close_small(m), close_small(base);
    }
}

// DoRA on weights with rows of zeros, which have no direction: the base at step 0, and finite from there on.
static void test_zero_rows(void)
{
    for (int detach = 0; detach < 2; detach++) {
        plan p = small_plan("dora");
        p.dora_detach = detach;
        model *m = open_small(p, 0), *base = open_small(base_only(), 0);
        mat W[14];
        for (int j = 0; j < 14; j++) {
            linear *l = m->linears[j];
            W[j] = like(l->W);
            copy(W[j], l->W), zero(rows_of(W[j], 1, 2));
            l->W = base->linears[j]->W = W[j];
            l->method->init(m, l, projections[j % LINEARS].name);
        }
        batch b = small_batch(0, 3);
        mat x = all_logits(m, &b), y = all_logits(base, &b);
        check(mat_distance(x, y), EXACT, "step 0");
        double first = model_step(m, &b, 0), last = first;
        for (int s = 0; s < 5; s++) {
            zero(flat(m, m->grad));
            last = model_step(m, &b, 1.0 / b.targets);
            check(isfinite(last) && isfinite(gradient_norm(m)) ? 0 : 1, 0, "loss %g and gradient %g of step %d", last, gradient_norm(m), s + 1);
            update(m, s + 1, 1e-3, gradient_norm(m));
        }
        check(last / first, 1, "the loss falls");
        for (int j = 0; j < 14; j++) check(isfinite(sum_of_squares(merged(m, m->linears[j]))) ? 0 : 1, 0, "merged");
        for (int j = 0; j < 14; j++) dev_free(W[j].p);
        dev_free(x.p), dev_free(y.p), batch_free(&b), close_small(m), close_small(base);
    }
}

static void test_merge(void)
{
    for (int i = 1; i < METHODS; i++) {
        model *m = open_small(small_plan(methods[i].name), 0), *base = open_small(base_only(), 0);
        shake(m, 0.2, &dice);
        mat W[14];
        for (int j = 0; j < 14; j++) {
            linear *l = base->linears[j];
            W[j] = like(l->W);
            copy(W[j], merged(m, m->linears[j]));
            l->W = W[j];
        }
        batch b = small_batch(0, 3);
        mat x = all_logits(m, &b), y = all_logits(base, &b);
        check(mat_distance(x, y), 10 * EXACT, "%s", methods[i].name);
        for (int j = 0; j < 14; j++) dev_free(W[j].p);
        dev_free(x.p), dev_free(y.p), batch_free(&b), close_small(m), close_small(base);
    }
}

// ΔW[o, i] as the paper writes it, one element at a time, from host copies of W and the adapter.
static double definition(const char *name, const linear *l, const wide *W, const wide *P, const wide *A, const wide *mag, int o, int i)
{
    int in = l->W.cols, r = l->D.p ? l->D.rows : l->B.cols, j = i / r, k = o / r;
    double sum = 0;
    if (!strcmp(name, "frozen")) return (double)P[o * in + i];
    if (!strcmp(name, "bone")) return (double)P[(i % r) * l->W.rows + o];
    if (!strcmp(name, "mini")) return (double)P[(i % r) * l->D.cols + o % l->D.cols];
    if (!strncmp(name, "bat", 3)) {                                 // W_ij B + B, with B of the block row or of the block column
        const wide *B = P + (strcmp(name, "bat") ? j : k) * r * r;
        for (int c = 0; c < r; c++) sum += (double)W[o * in + j * r + c] * (double)B[c * r + i % r];
        return sum + (double)B[o % r * r + i % r];
    }
    if (!strcmp(name, "dora")) {                                    // m_o V_o / ‖V_o‖ − W_o, V = W + s B A
        double length = 0;
        for (int e = 0; e < in; e++) length += pow((double)W[o * in + e] + definition("lora", l, W, P, A, NULL, o, e), 2);
        return (double)mag[o] / sqrt(length) * ((double)W[o * in + i] + definition("lora", l, W, P, A, NULL, o, i)) - (double)W[o * in + i];
    }
    for (int c = 0; c < r; c++) sum += (double)P[o * r + c] * (double)A[c * in + i];
    for (int c = 0; c < r && l->A0.p; c++) sum -= (double)ROW(l->B0, o)[c] * (double)ROW(l->A0, c)[i];      // pissa's residual weight
    return 7 / (strcmp(name, "rslora") ? (double)r : sqrt(r)) * sum;     // s B A, α = 7
}

// y = x (W + ΔW)ᵀ by plain loops over the definition: Bone's shards, Bat-row's factors and the merges all equal it.
static void test_definition(void)
{
    for (int i = 1; i < METHODS; i++) {
        if (left_out(i)) continue;
        model *m = open_small(small_plan(methods[i].name), 0);
        shake(m, 0.2, &dice);
        for (int j = 0; j < 7; j++) {
            linear *l = m->linears[j];
            int N = 6, out = l->W.rows, in = l->W.cols;
            mat x = random_mat(SHAPE(N, in)), y = random_mat(SHAPE(N, out)), want = random_mat(SHAPE(N, out)), Wd = random_mat(SHAPE(out, in));
            wide *W = host(l->W), *P = host(l->D.p ? l->D : l->B), *A = l->A.p ? host(l->A) : NULL, *mag = l->mag.p ? host(l->mag) : NULL;
            for (int o = 0; o < out; o++)
                for (int c = 0; c < in; c++) ROW(Wd, o)[c] = (real)((double)W[o * in + c] + definition(methods[i].name, l, W, P, A, mag, o, c));
            gemm_plain(want, x, 0, Wd, 0, in, 1, SET);
            l->h.rows = l->z.rows = N;
            l->first = 1;                                           // nobody else reads this x
            linear_forward(m, l, y, x, SET);
            check(mat_distance(y, want), EXACT, "%s %s, forward", methods[i].name, projections[j].name);
            check(mat_distance(merged(m, l), Wd), EXACT, "%s %s, merge", methods[i].name, projections[j].name);
            free(W), free(P), free(A), free(mag), dev_free(x.p), dev_free(y.p), dev_free(want.p), dev_free(Wd.p);
        }
        close_small(m);
    }
}

static void test_frozen_is_full(void)   // the same gradient over the same matrices, and so the norm that is logged; lora-ga looks at it, too
{
    model *frozen = open_small(small_plan("frozen"), 0), *full = open_small(small_plan("full"), 0), *ga = open_small(small_plan("lora-ga"), 0);
    batch b = small_batch(0, 3), parts[2] = {small_batch(0, 1), small_batch(1, 3)};
    double squares = 0;
    model_step(frozen, &b, 1.0 / b.targets), model_step(full, &b, 1.0 / b.targets);
    for (int j = 0; j < 14; j++) {
        mat dW = full->linears[j]->dW;
        squares += sum_of_squares(dW);
        check(mat_distance(frozen->linears[j]->dD, dW), EXACT, "layer %d %s", j / LINEARS, projections[j % LINEARS].name);
        if (j % LINEARS == 0) first_gradient(ga, &ga->layers[j / LINEARS], parts, 2);
        check(mat_distance(ga->linears[j]->dW, dW), 10 * EXACT, "layer %d %s, lora-ga's first gradient", j / LINEARS, projections[j % LINEARS].name);
        if (j % LINEARS == LINEARS - 1) first_gradient_free(&ga->layers[j / LINEARS]);
    }
    check(fabs(gradient_norm(frozen) / sqrt(squares) - 1), EXACT, "norm");
    for (batch *p = (batch[]){b, parts[0], parts[1], {0}}; p->ids; p++) batch_free(p);
    close_small(frozen), close_small(full), close_small(ga);
}

// ---- the SVD ------------------------------------------------------------------------------------------------------

static mat formula_matrix(int out, int in)      // dev/golden.py makes the same one
{
    mat W = random_mat(SHAPE(out, in));
    for (int i = 0; i < out; i++)
        for (int j = 0; j < in; j++) ROW(W, i)[j] = (real)(sin(1 + 0.7 * i * i + 1.3 * j) + (i == j ? 2 : 0));
    return W;
}

static void test_svd(void)
{
    size_t bytes;
    char *text = read_file("dev/golden/singular_values.json", &bytes);
    json_t *json = parse_json("dev/golden/singular_values.json", text, bytes), *item;
    const char *size;
    json_object_foreach(json, size, item) {
        int out, in, r = (int)json_array_size(item);
        if (sscanf(size, "%dx%d", &out, &in) != 2) die("bad golden");
        mat W = formula_matrix(out, in);
        svd f = svd_top(W, r, (rng){7});
        for (int i = 0; i < r; i++) {
            double want = json_number_value(json_array_get(item, (size_t)i));
            check(fabs((double)f.sigma[i] - want) / want, sizeof(real) == 8 ? 1e-12 : 1e-5, "%s, singular value %d", size, i);
            for (int j = 0; j <= i; j++)
                check(fabs(dot(f.V + (size_t)i * (size_t)in, f.V + (size_t)j * (size_t)in, in) - (i == j)), EXACT, "%s, V row %d times %d", size, i, j);
        }
        free(f.U), free(f.sigma), free(f.V), dev_free(W.p);
    }
    json_decref(json);
    free(text);
}

static void test_residual(void)         // what pissa leaves of W, W − s B0 A0, is the rest of its SVD; the start, olora's and lora-ga's too, adds nothing
{
    for (int i = 0; i < METHODS; i++) {
        if (!methods[i].has_start) continue;
        model *m = open_small(small_plan(methods[i].name), 0), *base = open_small(base_only(), 0);
        for (int j = 0; j < 14; j++) {
            mat W = base->linears[j]->W;
            check(mat_distance(merged(m, m->linears[j]), W), EXACT, "%s, layer %d %s", methods[i].name, j / LINEARS, projections[j % LINEARS].name);
            if (strcmp(methods[i].name, "pissa")) continue;
            linear *l = m->linears[j];
            mat residual = like(W);
            copy(residual, W);
            matmul_nn(residual, l->B0, l->A0, -l->scale, ADD);
            svd whole = svd_top(W, m->p.rank + 1, (rng){1}), rest = svd_top(residual, 1, (rng){1});
            check(fabs((double)(rest.sigma[0] / whole.sigma[m->p.rank]) - 1), 1e3 * EXACT, "what pissa leaves of layer %d %s begins with σ_r+1", j / LINEARS, projections[j % LINEARS].name);
            free(whole.U), free(whole.V), free(whole.sigma), free(rest.U), free(rest.V), free(rest.sigma), dev_free(residual.p);
        }
        close_small(m), close_small(base);
    }
}

// The loss of a model with an adapter, or of the model alone, as --eval opens them.
static double loss_of_files(const char *dir, const char *adapter, const batch *b)
{
    model m = {0};
    opt.model = dir, opt.adapter = adapter;
    plan p = plan_for_use();
    p.tokens = 32, p.positions = 16;
    model_measure(&m, open_config(), p);
    fill_model(&m, NULL, 0);
    double loss = model_step(&m, b, 0) / b->targets;
    model_free(&m);
    opt.adapter = NULL;
    return loss;
}

// Four steps of a method that has a start, then its file.
static void bf16_case(const char *dir, const char *M, const batch *b)
{
    double before = loss_of_files(dir, NULL, b);
    model m = {0};
    plan p = small_plan(M);
    p.rank = 2;                         // lora-ga takes twice as many of the golden's k_proj, which has 4 rows
    model_measure(&m, open_config(), p);
    fill_model(&m, b, 1);
    check(fabs(model_step(&m, b, 0) / b->targets / before - 1), EXACT / 2, "%s, %s at step 0", dir, M);
    for (int s = 0; s < 4; s++) {
        zero(flat(&m, m.grad));
        model_step(&m, b, 1.0 / b->targets);
        update(&m, s + 1, 5e-3, gradient_norm(&m));
    }
    double after = model_step(&m, b, 0) / b->targets;
    static int made;
    char name[32];
    snprintf(name, sizeof name, "%s%d", M, made++);
    char *out = in_scratch(name);
    stage_begin(out), peft_write(&m, dir), stage_publish(out);
    check(after / before, 0.99, "%s, %s trains", dir, M);
    check(fabs(loss_of_files(dir, out, b) / after - 1), EXACT / 20, "%s, %s as it is saved", dir, M);
    model_free(&m), free(out);
}

static void test_bf16_start(void)
{
    static const char larger[] = "{\"model_type\": \"llama\", \"hidden_size\": 96, \"intermediate_size\": 200, \"num_hidden_layers\": 4, \"num_attention_heads\": 8,"
        " \"num_key_value_heads\": 2, \"vocab_size\": 101}";
    char *dirs[2] = {strdup("dev/golden/base-bf16"), in_scratch("bf16")}, *config_path = in_scratch("bf16.json");
    write_text(config_path, larger);
    write_model(dirs[1], config_path, 0.14, BF16);       // 0.4 √(12/96): activations as large as the small model's
    batch b = small_batch(0, 3);
    for (int i = 0; i < 2 * METHODS; i++)
        if (methods[i / 2].has_start) bf16_case(dirs[i % 2], methods[i / 2].name, &b);
    batch_free(&b), free(dirs[0]), free(dirs[1]), free(config_path);
}

// ---- attention -----------------------------------------------------------------------------------------------------

// Softmax by plain loops, with the key-value head that each head shares.
static void test_attention(void)
{
    enum { D = 4, HEADS = 4, GROUP_OF = 2, N = 150 };
    mat q = random_mat(SHAPE(N, HEADS * D)), k = random_mat(SHAPE(N, 2 * D)), v = random_mat(SHAPE(N, 2 * D)), out = like(q), want = like(q), lse = random_mat(SHAPE(N, HEADS));
    static const span s[2] = {{0, 130, 0, 130}, {130, 3, 130, 20}};     // the second: three new rows behind 17 cached ones
    attention_forward(out, lse, q, k, v, D, s, 2);
    for (int i = 0; i < 2; i++)
        for (int r = 0; r < s[i].nq; r++)
            for (int h = 0; h < HEADS; h++) {
                double p[N], sum = 0;
                int seen = s[i].nk - s[i].nq + r + 1;
                for (int c = 0; c < seen; c++) {
                    double score = 0;
                    for (int e = 0; e < D; e++) score += (double)ROW(q, s[i].q + r)[h * D + e] * (double)ROW(k, s[i].k + c)[h / GROUP_OF * D + e];
                    sum += p[c] = exp(score / sqrt(D));
                }
                for (int e = 0; e < D; e++) {
                    double o = 0;
                    for (int c = 0; c < seen; c++) o += p[c] / sum * (double)ROW(v, s[i].k + c)[h / GROUP_OF * D + e];
                    ROW(want, s[i].q + r)[h * D + e] = (real)o;
                }
            }
    check(mat_distance(out, want), EXACT, "attention");
    for (mat *m = (mat[]){q, k, v, out, want, lse, {0}}; m->p; m++) dev_free(m->p);
}

// Token by token with the key-value cache gives the logits of the whole row at once.
static void test_cache(void)
{
    plan p = base_only();
    p.cache_rows = 16;
    model *m = open_small(p, 1);
    batch all = small_batch(1, 2), one = batch_new(32, 3);
    one.cached = 1;
    all.targets = 0;
    for (int i = 0; i < all.tokens; i++) all.target_row[all.targets] = i, all.label[all.targets++] = 0;
    mat whole = all_logits(m, &all);
    for (int i = 0; i < all.tokens; i++) {
        one.tokens = one.targets = one.rows = 1;
        one.ids[0] = all.ids[i], one.pos[0] = i, one.spans[0] = (span){0, 1, 0, i + 1};
        mat step = all_logits(m, &one);
        check(mat_distance(step, rows_of(whole, i, 1)), EXACT, "token %d", i);
        dev_free(step.p);
    }
    dev_free(whole.p), batch_free(&all), batch_free(&one), close_small(m);
}

// ---- the matrix product ---------------------------------------------------------------------------------------------

static mat as_type(mat x, enum dtype type)      // a copy in another dtype
{
    mat y = x;
    y.type = type, y.p = dev_alloc(elements(x) * 8);
    wide *w = host(x);
    narrow(y.p, type, w, elements(x));
    free(w);
    return y;
}

// Products into the upper left of a larger matrix, whose other elements must stay.
static void matmul_case(int form, enum dtype type, int M, int N, int K, enum mode mode)
{
    mat a = form == 2 ? random_mat(SHAPE(K, M)) : random_mat(SHAPE(M, K)), b0 = form ? random_mat(SHAPE(K, N)) : random_mat(SHAPE(N, K));
    mat b = as_type(b0, type), y = random_mat(SHAPE(M + 7, N + 3)), want = like(y);
    copy(want, y);
    (form == 0 ? matmul_nt : form == 1 ? matmul_nn : matmul_tn)(part_of(y, 0, M, 0, N), a, b, 0.5, mode);
    gemm_plain(part_of(want, 0, M, 0, N), a, form == 2, b, form > 0, K, (real)0.5, mode);
    check(mat_distance(y, want), EXACT, "form %d, %s, %d x %d x %d, %s", form, dtypes[type].name, M, N, K, mode == ADD ? "+=" : "=");
    dev_free(a.p), dev_free(b0.p), dev_free(b.p), dev_free(y.p), dev_free(want.p);
}

static void test_matmul(void)
{
    static const int sizes[][3] = {{1, 1, 1}, {6, 16, 8}, {7, 17, 300}, {5, 33, 1}, {200, 31, 257}, {13, 4100, 20}, {97, 96, 513}, {1, 300, 64}, {325, 333, 40}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int form = 0; form < 3; form++)
            for (int type = 0; type < DTYPES; type++)
                for (int mode = SET; mode <= ADD; mode++) matmul_case(form, (enum dtype)type, sizes[i][0], sizes[i][1], sizes[i][2], (enum mode)mode);
}

static void test_same_bits(void)        // of a product, for any number of threads
{
    mat a = random_mat(SHAPE(401, 270)), b = random_mat(SHAPE(390, 270)), y[3];
    static const int threads[3] = {1, 2, 4};
    for (int i = 0; i < 3; i++) {
        omp_set_num_threads(threads[i]);
        y[i] = random_mat(SHAPE(401, 390));
        matmul_nt(y[i], a, b, 1, SET);
        check(memcmp(y[i].p, y[0].p, elements(y[0]) * sizeof(real)) ? 1 : 0, 0, "%d threads", threads[i]);
    }
    mat alone = random_mat(SHAPE(1, 390));                              // and whatever else is in the batch
    matmul_nt(alone, rows_of(a, 117, 1), b, 1, SET);
    check(memcmp(alone.p, ROW(y[0], 117), 390 * sizeof(real)) ? 1 : 0, 0, "a row alone");
    dev_free(a.p), dev_free(b.p), dev_free(alone.p);
    for (int i = 0; i < 3; i++) dev_free(y[i].p);
}

// A small product reads its factors where they lie, a large one copies them first. Every form gives a corner of the large
// product the same bits when it is computed alone.
static void test_in_place(void)
{
    void (*const forms[])(mat, mat, mat, double, enum mode) = {matmul_nt, matmul_nn, matmul_tn};
    for (int form = 0; form < 3; form++) {
        mat a = form == 2 ? random_mat(SHAPE(70, 401)) : random_mat(SHAPE(401, 70)), b = form ? random_mat(SHAPE(70, 390)) : random_mat(SHAPE(390, 70));
        mat y = random_mat(SHAPE(401, 390)), corner = random_mat(SHAPE(61, 100)), a1 = form == 2 ? a : rows_of(a, 0, 61), b1 = form ? b : rows_of(b, 0, 100);
        if (form == 2) a1.cols = 61;
        if (form) b1.cols = 100;
        int differ = 0;
        forms[form](y, a, b, 1, SET);
        forms[form](corner, a1, b1, 1, SET);
        for (int i = 0; i < 61; i++) differ += memcmp(ROW(corner, i), ROW(y, i), 100 * sizeof(real)) != 0;
        check(differ, 0, "form %d", form);
        dev_free(a.p), dev_free(b.p), dev_free(y.p), dev_free(corner.p);
    }
}

static void test_exp(void)
{
    double err = 0;
    for (double x = -87; x < 87; x += 0.00317) err = fmax(err, fabs((double)exp_real((real)x) / exp((double)(real)x) - 1));
    check(err, sizeof(real) == 8 ? 1e-15 : 2.5e-7, "exp");
    check(isnan((double)exp_real((real)NAN)) ? 0 : 1, 0, "exp(NaN)");
}

static void test_halves(void)           // every 16-bit number survives, and rounding goes to the nearest, ties to even
{
    int wrong_bits = 0;
    for (int h = 0; h < 1 << 16; h++) {
        float b = from_bf16((uint16_t)h), f = from_f16((uint16_t)h);
        wrong_bits += !isnan(b) && to_bf16(b) != h;
        wrong_bits += !isnan(f) && to_f16(f) != h;
        wrong_bits += isnan(f) != ((h & 0x7c00) == 0x7c00 && (h & 0x3ff)) || (isnan(f) && !isnan(from_f16(to_f16(f)))) || (isnan(b) && !isnan(from_bf16(to_bf16(b))));
    }
    check(wrong_bits, 0, "16-bit numbers that do not survive");
    check(fabs((double)from_f16(to_f16(1.f + 0x1p-11f)) - 1) + fabs((double)from_f16(to_f16(1.f + 0x1p-10f + 0x1p-11f)) - 1 - 0x1p-9), 0, "f16 ties");
    check(fabs((double)from_bf16(to_bf16(1.f + 0x1p-8f)) - 1) + fabs((double)from_bf16(to_bf16(1.f + 0x1p-7f + 0x1p-8f)) - 1 - 0x1p-6), 0, "bf16 ties");
    check(isinf(from_f16(to_f16(65520.f))) && from_f16(to_f16(65519.f)) == 65504.f && from_f16(0x0001) == 0x1p-24f ? 0 : 1, 0, "f16 ends");
}

// A step of PyTorch's AdamW by hand, third step of a constant gradient with decay (torch.optim.AdamW's documentation).
static void test_adamw(void)
{
    mat w = random_mat(SHAPE(1, 1)), g = like(w), m = like(w), v = like(w);
    double p = 0.5, m1 = 0, m2 = 0;
    *ROW(w, 0) = (real)0.5, *ROW(g, 0) = (real)0.25;
    for (int t = 1; t <= 3; t++) {
        p -= 0.01 * 0.1 * p;
        m1 = 0.9 * m1 + 0.1 * 0.125, m2 = 0.999 * m2 + 0.001 * 0.125 * 0.125;
        p -= 0.01 * (m1 / (1 - pow(0.9, t))) / (sqrt(m2 / (1 - pow(0.999, t))) + 1e-8);
        adamw(w, g, m, v, 0.01, 0.1, 0.5, t);
    }
    check(fabs((double)*ROW(w, 0) - p) / p, sizeof(real) == 8 ? 1e-13 : 1e-6, "weight after three steps");
    dev_free(w.p), dev_free(g.p), dev_free(m.p), dev_free(v.p);
}

// ---- every op beyond its blocks ---------------------------------------------------------------------------------------
//
// Ops work in blocks, panels, chunks and by several threads: a fault may begin in the second one. Here each op crosses all of
// its own, in views with other columns beside them, and is held to its formula in plain loops over doubles; its backward to central
// differences, too. Sizes are named by the blocks that they cross.

static struct { double *out, *cot, *in[3], *grad[3]; } plain;       // what the loops read and find; grad is what the op adds

static double *doubles(mat m)
{
    wide *x = host(m);
    double *y = alloc(elements(m), sizeof *y);
    for (size_t i = 0; i < elements(m); i++) y[i] = (double)x[i];
    free(x);
    return y;
}

// y (M, N) += 0.7 Σ_k a[i, k] b[k, j]. One i, k or j further are ai, ak, bk or bj numbers.
static void plain_product(double *y, int M, int N, int K, const double *a, int ai, int ak, const double *b, int bk, int bj)
{
    double *column = alloc((size_t)K, sizeof *column);                  // of b: read for every i
    for (int j = 0; j < N; j++) {
        for (int k = 0; k < K; k++) column[k] = b[k * bk + j * bj];
        for (int i = 0; i < M; i++) {
            double sum = 0;
            for (int k = 0; k < K; k++) sum += a[i * ai + k * ak] * column[k];
            y[i * N + j] += 0.7 * sum;
        }
    }
    free(column);
}

static void plain_nt(void)              // y = x wᵀ,  dx = dy w,  dw = dyᵀ x, for each matrix of the batch
{
    int M = op.out.rows, N = op.out.cols, K = op.in[0].cols;
    for (int b = 0; b < op.out.batch; b++) {
        const double *x = plain.in[0] + b * M * K, *w = plain.in[1] + b * N * K, *dy = plain.cot + b * M * N;
        plain_product(plain.out + b * M * N, M, N, K, x, K, 1, w, 1, K);
        plain_product(plain.grad[0] + b * M * K, M, K, N, dy, N, 1, w, K, 1);
        plain_product(plain.grad[1] + b * N * K, N, K, M, dy, 1, N, x, K, 1);
    }
}

static void plain_nn(void)              // y = x w,  dx = dy wᵀ,  dw = xᵀ dy
{
    int M = op.out.rows, N = op.out.cols, K = op.in[0].cols;
    plain_product(plain.out, M, N, K, plain.in[0], K, 1, plain.in[1], N, 1);
    plain_product(plain.grad[0], M, K, N, plain.cot, N, 1, plain.in[1], 1, N);
    plain_product(plain.grad[1], K, N, M, plain.in[0], 1, K, plain.cot, N, 1);
}

static void plain_tn(void)              // y = xᵀ w,  dx = w dyᵀ,  dw = x dy
{
    int M = op.out.rows, N = op.out.cols, K = op.in[0].rows;
    plain_product(plain.out, M, N, K, plain.in[0], 1, M, plain.in[1], N, 1);
    plain_product(plain.grad[0], K, M, N, plain.in[1], N, 1, plain.cot, 1, N);
    plain_product(plain.grad[1], K, N, M, plain.in[0], M, 1, plain.cot, N, 1);
}

static int op_id(int n) { return ((const int *)op_ids)[n]; }

static void plain_embedding(void)       // out[n] = table[id]
{
    for (int n = 0, C = op.out.cols; n < op.out.rows; n++)
        for (int c = 0; c < C; c++) {
            plain.out[n * C + c] = plain.in[0][op_id(n) * C + c];
            plain.grad[0][op_id(n) * C + c] += plain.cot[n * C + c];
        }
}

static void plain_rmsnorm(void)         // out_c = w_c x_c ρ,  dout_e/dx_c = w_e (ρ [e = c] − x_e x_c ρ³/C)
{
    int C = op.out.cols;
    for (int n = 0; n < op.out.rows; n++) {
        const double *x = plain.in[0] + n * C, *w = plain.in[1], *g = plain.cot + n * C;
        double squares = 0, along = 0;
        for (int c = 0; c < C; c++) squares += x[c] * x[c], along += g[c] * w[c] * x[c];
        double rho = 1 / sqrt(squares / C + 1e-5);
        for (int c = 0; c < C; c++) {
            plain.out[n * C + c] = w[c] * x[c] * rho;
            plain.grad[0][n * C + c] = g[c] * w[c] * rho - along * x[c] * rho * rho * rho / C;
            plain.grad[1][c] += g[c] * x[c] * rho;
        }
    }
}

static void plain_rope(void)            // (a cos − b sin, b cos + a sin) for the halves of a head, and its transpose
{
    int d = op_head, half = d / 2, C = op.out.cols;
    for (int n = 0; n < op.out.rows; n++)
        for (int h = 0; h < C / d; h++)
            for (int i = 0; i < half; i++) {
                int a = n * C + h * d + i, b = a + half, pos = ((const int *)op_pos)[n];
                double cosine = cos(pos * (i + 0.3)), sine = sin(pos * (i + 0.3));
                plain.out[a] = plain.in[0][a] * cosine - plain.in[0][b] * sine;
                plain.out[b] = plain.in[0][b] * cosine + plain.in[0][a] * sine;
                plain.grad[0][a] = plain.cot[a] * cosine + plain.cot[b] * sine;
                plain.grad[0][b] = plain.cot[b] * cosine - plain.cot[a] * sine;
            }
}

// One query row of one head: P = softmax(q kᵀ/√d) over the keys it sees, dS = P ⊙ (dP − Σ P dP).
static void plain_attention_row(int at, int kv, int kv_cols, int seen)
{
    int d = op_head;
    double p[1000], dp[1000], sum = 0, delta = 0;
    const double *q = plain.in[0] + at, *g = plain.cot + at;
    for (int c = 0; c < seen; c++) {
        double score = 0;
        for (int e = 0; e < d; e++) score += q[e] * plain.in[1][kv + c * kv_cols + e];
        sum += p[c] = exp(score / sqrt(d));
    }
    for (int c = 0; c < seen; c++) {
        p[c] /= sum, dp[c] = 0;
        for (int e = 0; e < d; e++) dp[c] += g[e] * plain.in[2][kv + c * kv_cols + e];
        delta += p[c] * dp[c];
    }
    for (int c = 0; c < seen; c++)
        for (int e = 0; e < d; e++) {
            int key = kv + c * kv_cols + e;
            double ds = p[c] * (dp[c] - delta) / sqrt(d);
            plain.out[at + e] += p[c] * plain.in[2][key];
            plain.grad[0][at + e] += ds * plain.in[1][key];
            plain.grad[1][key] += ds * q[e];
            plain.grad[2][key] += p[c] * g[e];
        }
}

static void plain_attention(void)       // every row of every head of every span
{
    int cols = op.in[0].cols, kv_cols = op.in[1].cols, group = cols / kv_cols;
    for (span *s = op_spans; s < op_spans + op_span_count; s++)
        for (int r = 0; r < s->nq; r++)
            for (int h = 0; h < cols / op_head; h++)
                plain_attention_row((s->q + r) * cols + h * op_head, s->k * kv_cols + h / group * op_head, kv_cols, s->nk - s->nq + r + 1);
}

static void plain_swiglu(void)          // out = g σ(g) u,  dσ/dg = σ (1 − σ)
{
    for (size_t i = 0; i < elements(op.out); i++) {
        double g = plain.in[0][i], u = plain.in[1][i], sigma = 1 / (1 + exp(-g)), d = plain.cot[i];
        plain.out[i] = g * sigma * u;
        plain.grad[0][i] = d * u * (sigma + g * sigma * (1 - sigma));
        plain.grad[1][i] = d * g * sigma;
    }
}

static void plain_cross_entropy(void)   // −log softmax(z)[label], and 0.3 (softmax(z) − [label])
{
    int C = op.in[0].cols;
    for (int n = 0; n < op.in[0].rows; n++) {
        const double *z = plain.in[0] + n * C;
        double sum = 0;
        for (int c = 0; c < C; c++) sum += exp(z[c]);
        for (int c = 0; c < C; c++) plain.grad[0][n * C + c] = 0.3 * (exp(z[c]) / sum - (c == op_id(n)));
        plain.out[n] = -log(exp(z[op_id(n)]) / sum);
    }
}

static void plain_shard_sum(void)       // s[c] = Σ_j x[j·r + c]: column c of x belongs to c mod r
{
    for (int n = 0, C = op.in[0].cols, r = op.out.cols; n < op.out.rows; n++)
        for (int c = 0; c < C; c++) {
            plain.out[n * r + c % r] += plain.in[0][n * C + c];
            plain.grad[0][n * C + c] = plain.cot[n * r + c % r];
        }
}

static void plain_shard_tile(void)
{
    for (int n = 0, C = op.out.cols, r = op.in[0].cols; n < op.out.rows; n++)
        for (int c = 0; c < C; c++) {
            plain.out[n * C + c] = plain.in[0][n * r + c % r];
            plain.grad[0][n * r + c % r] += plain.cot[n * C + c];
        }
}

static void plain_broadcast_mul(void)   // y = 0.7 x g, g a number a row or a column
{
    for (int n = 0, C = op.out.cols; n < op.out.rows; n++)
        for (int c = 0; c < C; c++) {
            int i = n * C + c, at = op.in[1].cols == 1 ? n : c;
            plain.out[i] = 0.7 * plain.in[0][i] * plain.in[1][at];
            plain.grad[0][i] = 0.7 * plain.cot[i] * plain.in[1][at];
            plain.grad[1][at] += 0.7 * plain.cot[i] * plain.in[0][i];
        }
}

static void plain_broadcast_dot(void)   // g = 0.7 Σ x y along the rows or the columns
{
    for (int n = 0, C = op.in[0].cols; n < op.in[0].rows; n++)
        for (int c = 0; c < C; c++) {
            int i = n * C + c, at = op.out.cols == 1 ? n : c;
            plain.out[at] += 0.7 * plain.in[0][i] * plain.in[1][i];
            plain.grad[0][i] = 0.7 * plain.cot[at] * plain.in[1][i];
            plain.grad[1][i] = 0.7 * plain.cot[at] * plain.in[0][i];
        }
}

static void plain_magnitude(void)       // m / √q
{
    for (size_t i = 0; i < elements(op.out); i++) {
        double m = plain.in[0][i], q = plain.in[1][i];
        plain.out[i] = m / sqrt(q);
        plain.grad[0][i] = plain.cot[i] / sqrt(q);
        plain.grad[1][i] = -plain.cot[i] * m / (2 * q * sqrt(q));
    }
}

static const struct { void (*op)(void), (*loops)(void); } in_plain_loops[] = {
    {nt_forward, plain_nt}, {nn_forward, plain_nn}, {tn_forward, plain_tn}, {embed_forward, plain_embedding}, {norm_forward, plain_rmsnorm},
    {rope_forward, plain_rope}, {att_forward, plain_attention}, {glu_forward, plain_swiglu}, {ce_forward, plain_cross_entropy},
    {sum_forward, plain_shard_sum}, {tile_forward, plain_shard_tile}, {mul_forward, plain_broadcast_mul}, {dot_forward, plain_broadcast_dot},
    {mag_forward, plain_magnitude},
};

// The cases of op_cases, larger. Rows of 61 and 2051 numbers fill vectors of 4, 8 and 16 and leave a rest.
enum { BLOCK = QUERIES };
static const struct { op_case op; int head; span spans[SPANS]; } large_cases[] = {
    {.op = {"matmul_nt", {{MC + 5, OFTEN + 9}}, {{{MC + 5, KC + 7}}, {{OFTEN + 9, KC + 7}}}, nt_forward, nt_backward, 0}},
    {.op = {"matmul_nn", {{MC + 5, OFTEN + 9}}, {{{MC + 5, KC + 7}}, {{KC + 7, OFTEN + 9}}}, nn_forward, nn_backward, 0}},
    {.op = {"matmul_tn", {{MC + 5, OFTEN + 9}}, {{{KC + 7, MC + 5}}, {{KC + 7, OFTEN + 9}}}, tn_forward, tn_backward, 0}},
    {.op = {"batched matmul_nt", {{3, MC + 5, 2 * NR + 1}}, {{{3, MC + 5, KC + 7}}, {{3, 2 * NR + 1, KC + 7}}}, nt_forward, nt_backward, 0}},
    {.op = {"embedding", {{333, 77}}, {{{50, 77}}}, embed_forward, embed_backward, 0}},
    {.op = {"rmsnorm of short rows", {{333, 61}}, {{{333, 61}}, {{61}}}, norm_forward, norm_backward, 0}},
    {.op = {"rmsnorm of long rows", {{20, 2051}}, {{{20, 2051}}, {{2051}}}, norm_forward, norm_backward, 0}},
    {.op = {"rope, heads of 48", {{333, 144}}, {{{333, 144}}}, rope_forward, rope_backward, 0}, .head = 48},
    {.op = {"rope, heads of 10", {{333, 50}}, {{{333, 50}}}, rope_forward, rope_backward, 0}, .head = 10},
    {.op = {"attention, 61 rows", {{BLOCK + 1, 16}}, {{{BLOCK + 1, 16}}, {{BLOCK + 1, 8}}, {{BLOCK + 1, 8}}}, att_forward, att_backward, 0},
        .head = 4, .spans = {{0, BLOCK + 1, 0, BLOCK + 1}}},
    {.op = {"attention, 130 rows, 3 heads of 48 on 1", {{130, 144}}, {{{130, 144}}, {{130, 48}}, {{130, 48}}}, att_forward, att_backward, 0},
        .head = 48, .spans = {{0, 130, 0, 130}}},
    {.op = {"attention, 700 rows, 2 heads of 64 on 1", {{700, 128}}, {{{700, 128}}, {{700, 64}}, {{700, 64}}}, att_forward, att_backward, 0},
        .head = 64, .spans = {{0, 700, 0, 700}}},
    {.op = {"attention, whole blocks", {{5 * BLOCK + 2, 160}}, {{{5 * BLOCK + 2, 160}}, {{5 * BLOCK + 2, 160}}, {{5 * BLOCK + 2, 160}}}, att_forward, att_backward, 0},
        .head = 80, .spans = {{0, BLOCK, 0, BLOCK}, {BLOCK, 2 * BLOCK, BLOCK, 2 * BLOCK}, {3 * BLOCK, 1, 3 * BLOCK, 1}, {3 * BLOCK + 1, 2 * BLOCK + 1, 3 * BLOCK + 1, 2 * BLOCK + 1}}},
    {.op = {"attention, earlier keys", {{194, 32}}, {{{194, 32}}, {{441, 16}}, {{441, 16}}}, att_forward, att_backward, 0},
        .head = 8, .spans = {{0, BLOCK + 1, 0, 90}, {BLOCK + 1, 130, 90, 331}, {BLOCK + 131, 3, 421, 20}}},
    {.op = {"swiglu of short rows", {{333, 61}}, {{{333, 61}}, {{333, 61}}}, glu_forward, glu_backward, 0}},
    {.op = {"swiglu of long rows", {{20, 2051}}, {{{20, 2051}}, {{20, 2051}}}, glu_forward, glu_backward, 0}},
    {.op = {"cross_entropy of few", {{333, 1}}, {{{333, 61}}}, ce_forward, ce_backward, OUT}},
    {.op = {"cross_entropy of many", {{5, 1}}, {{{5, 32003}}}, ce_forward, ce_backward, OUT}},
    {.op = {"shard_sum, short last shard", {{20, 64}}, {{{20, 2051}}}, sum_forward, sum_backward, 0}},
    {.op = {"shard_sum, one shard", {{333, 61}}, {{{333, 61}}}, sum_forward, sum_backward, 0}},
    {.op = {"shard_sum, less than a shard", {{333, 77}}, {{{333, 61}}}, sum_forward, sum_backward, 0}},
    {.op = {"shard_sum, shards of one", {{20, 1}}, {{{20, 2051}}}, sum_forward, sum_backward, 0}},
    {.op = {"shard_tile, short last shard", {{20, 2051}}, {{{20, 64}}}, tile_forward, tile_backward, 0}},
    {.op = {"shard_tile, one shard", {{333, 61}}, {{{333, 61}}}, tile_forward, tile_backward, 0}},
    {.op = {"shard_tile, less than a shard", {{333, 61}}, {{{333, 77}}}, tile_forward, tile_backward, 0}},
    {.op = {"shard_tile, shards of one", {{20, 2051}}, {{{20, 1}}}, tile_forward, tile_backward, 0}},
    {.op = {"broadcast_mul, columns", {{20, 2051}}, {{{20, 2051}}, {{1, 2051}}}, mul_forward, mul_backward, 0}},
    {.op = {"broadcast_mul, rows", {{20, 2051}}, {{{20, 2051}}, {{20, 1}}}, mul_forward, mul_backward, 0}},
    {.op = {"broadcast_dot, columns", {{1, 205}}, {{{100, 205}}, {{100, 205}}}, dot_forward, dot_backward, 0}},
    {.op = {"broadcast_dot, rows", {{20, 1}}, {{{20, 3 * KC + 5}}, {{20, 3 * KC + 5}}}, dot_forward, dot_backward, 0}},
    {.op = {"magnitude", {{20011, 1}}, {{{20011, 1}}, {{20011, 1}}}, mag_forward, mag_backward, FRONT_TO_BACK}},
};

// The derivative of f along u, at x: four points, as numeric_error, but closer: many numbers move at once.
static double slope_along(double (*f)(void *), void *context, mat x, const wide *at, const wide *u)
{
    static const struct { double at, weight; } points[4] = {{-2, 1}, {-1, -8}, {1, 8}, {2, -1}};
    size_t n = elements(x);
    wide *moved = alloc(n, sizeof *moved);
    double sum = 0, h = 2e-5;
    for (int k = 0; k < 4; k++) {
        for (size_t i = 0; i < n; i++) moved[i] = at[i] + (wide)(points[k].at * h) * u[i];
        put(x, moved, TYPE_OF(wide));
        sum += points[k].weight * f(context);
    }
    put(x, at, TYPE_OF(wide));
    free(moved);
    return sum / (12 * h);
}

// How far f's slope at x along a random direction is from the gradient's, over the gradient's length: what a typical slope is.
static double slope_error(double (*f)(void *), void *context, mat x, const wide *gradient)
{
    size_t n = elements(x);
    wide *at = host(x), *u = alloc(n, sizeof *u);
    double want = 0, squares = 0;
    for (size_t i = 0; i < n; i++) {
        u[i] = (wide)rng_normal(&dice);
        want += (double)gradient[i] * (double)u[i], squares += pow((double)gradient[i], 2);
    }
    double err = fabs(slope_along(f, context, x, at, u) - want) / sqrt(squares);
    free(at), free(u);
    return err;
}

// What an op wrote, in the columns beside its own.
static mat beside(mat m)
{
    int cols = (int)m.ld - m.cols;
    return cols ? part_of(m, 0, m.rows, m.cols, cols) : (mat){0};
}

static void plain_loops(const op_case *c)
{
    plain.cot = doubles(op.cot), plain.out = alloc(elements(op.out), sizeof(double));
    for (int j = 0; j < 3; j++)
        if (op.in[j].p) plain.in[j] = doubles(op.in[j]), plain.grad[j] = alloc(elements(op.in[j]), sizeof(double));
    for (size_t i = 0; i < sizeof in_plain_loops / sizeof *in_plain_loops; i++)
        if (in_plain_loops[i].op == c->forward) in_plain_loops[i].loops();
}

static void plain_free(void)
{
    free(plain.cot), free(plain.out);
    for (int j = 0; j < 3; j++) free(plain.in[j]), free(plain.grad[j]);
    memset(&plain, 0, sizeof plain);
}

// One thing that an op wrote, with one thread and with two, against the loops: started from `before`, where the op adds.
static void check_written(const op_case *c, const char *what, mat m, const double *loops, const wide *before, wide **first)
{
    size_t n = elements(m);
    wide *got = host(m), *want = alloc(n, sizeof *want);
    for (size_t i = 0; i < n; i++) want[i] = (wide)(loops[i] + (before ? (double)before[i] : 0));
    if (!*first) check(distance(got, want, n), EXACT, "%s, %s by plain loops", c->name, what);
    else check(memcmp(got, *first, n * sizeof *got) != 0, 0, "%s, %s with two threads", c->name, what);
    free(want);
    if (*first) free(got);
    else *first = got;
}

static void check_edges(const op_case *c, int f, int head, const span *spans)
{
    static const char *const inputs[3] = {"d in 0", "d in 1", "d in 2"};
    wide *before[3] = {0}, *first[4] = {0}, *edge[4] = {0};
    mat written[4] = {[3] = {0}};
    op_open(c, f, head, spans);
    plain_loops(c);
    for (int j = 0; j < 3; j++) if (op.grad[j].p) randomise(op.grad[j], 1), before[j] = host(op.grad[j]), written[j] = op.grad[j];
    written[3] = op.out;
    for (int j = 0; j < 4; j++) if (written[j].p && beside(written[j]).p) edge[j] = host(beside(written[j]));
    for (int threads = 1; threads <= 2; threads++) {
        omp_set_num_threads(threads);
        for (int j = 0; j < 3; j++) if (op.grad[j].p) put(op.grad[j], before[j], TYPE_OF(wide));
        c->forward(), c->backward();
        check_written(c, "out", op.out, plain.out, NULL, &first[3]);
        for (int j = 0; j < 3; j++)                                                     // magnitude's second gradient is set, not added
            if (op.grad[j].p) check_written(c, inputs[j], op.grad[j], plain.grad[j], c->forward == mag_forward && j == 1 ? NULL : before[j], &first[j]);
    }
    for (int j = 0; j < 3; j++) {
        if (!op.grad[j].p || sizeof(real) != 8) continue;                               // differences need digits
        for (size_t i = 0; i < elements(op.grad[j]); i++) first[j][i] -= c->forward == mag_forward && j == 1 ? 0 : before[j][i];
        check(slope_error(op_value, (void *)(uintptr_t)c, op.in[j], first[j]), 1e-7, "%s, %s by differences", c->name, inputs[j]);
    }
    for (int j = 0; j < 4; j++) {
        wide *now = edge[j] ? host(beside(written[j])) : NULL;
        if (now) check(memcmp(now, edge[j], elements(beside(written[j])) * sizeof *now) != 0, 0, "%s, what stands beside", c->name);
        free(now), free(edge[j]), free(first[j]);
    }
    for (int j = 0; j < 3; j++) free(before[j]);
    plain_free(), op_close();
}

static int not_asked_for(const char *name) { return only_method && !strstr(name, only_method); }

static void test_beyond_blocks(void)
{
    int threads = omp_get_max_threads();
    op_pad = 5;
    for (int i = 0; i < OP_CASES; i++)
        if (!not_asked_for(op_cases[i].name)) check_edges(&op_cases[i], 1, HEAD, two_spans);
    for (size_t i = 0; i < sizeof large_cases / sizeof *large_cases; i++) {
        int head = large_cases[i].head ? large_cases[i].head : HEAD;
        if (!not_asked_for(large_cases[i].op.name)) check_edges(&large_cases[i].op, 1, head, large_cases[i].spans);
    }
    op_pad = 0;
    omp_set_num_threads(threads);
}

// A product in the middle of larger matrices: their other elements must stay. Matrices of a batch lie beside each other, as
// Bat-row's, or behind each other, as Bat's; the weight may be one for all.
enum layout { ALONE, BESIDE, BEHIND, ONE_WEIGHT };

static mat in_the_middle(mat *all, enum dtype type, int rows, int cols, enum layout l, int count)
{
    mat numbers = random_mat(SHAPE((l == BEHIND ? count : 1) * (rows + 2), (l == BEHIND ? 1 : count) * cols + 5));
    *all = as_type(numbers, type);
    dev_free(numbers.p);
    mat m = part_of(*all, 1, rows, 3, cols);
    m.batch = count;
    m.stride = l == BEHIND ? (size_t)(rows + 2) * m.ld : (size_t)cols;
    return m;
}

// y = or += 0.7 a b by plain loops. Matrices of a batch that are one for all have batch 1.
static void plain_form(int form, mat y, mat a, mat b, int K, enum mode mode)
{
    int M = y.rows, N = y.cols;
    double *was = doubles(y), *x = doubles(a), *w = doubles(b);
    wide *sums = alloc(elements(y), sizeof *sums);
    for (size_t i = 0; i < elements(y) && mode == SET; i++) was[i] = 0;
    for (int n = 0; n < y.batch; n++)
        plain_product(was + n * M * N, M, N, K, x + n % a.batch * M * K, form == 2 ? 1 : K, form == 2 ? M : 1,
            w + n % b.batch * K * N, form ? N : 1, form ? 1 : K);
    for (size_t i = 0; i < elements(y); i++) sums[i] = (wide)was[i];
    put(y, sums, TYPE_OF(wide));
    free(was), free(x), free(w), free(sums);
}

typedef struct { int M, N, K; enum layout layout; } product_size;

static void check_product(int form, product_size s, enum dtype a_type, enum dtype b_type, enum mode mode)
{
    static void (*const forms[3])(mat, mat, mat, double, enum mode) = {matmul_nt, matmul_nn, matmul_tn};
    int count = s.layout == ALONE ? 1 : 3, of_b = s.layout == ONE_WEIGHT ? 1 : count;
    mat all_a, all_b, all_y, whole[3], a, b, y;
    a = in_the_middle(&all_a, a_type, form == 2 ? s.K : s.M, form == 2 ? s.M : s.K, s.layout, count);
    b = in_the_middle(&all_b, b_type, form ? s.K : s.N, form ? s.N : s.K, s.layout, of_b);
    y = in_the_middle(&all_y, TYPE_OF(real), s.M, s.N, s.layout, count);
    for (int i = 0; i < 3; i++) {                                       // by the loops, with one thread, with two
        whole[i] = mat_of(dev_alloc(elements(all_y) * sizeof(real)), TYPE_OF(real), SHAPE(all_y.rows, all_y.cols));
        copy(whole[i], all_y);
        y.p = at(whole[i], 1, 3);
        omp_set_num_threads(i < 2 ? 1 : 2);
        if (i) forms[form](y, a, b, 0.7, mode);
        else plain_form(form, y, a, b, s.K, mode);
    }
    char name[160];
    snprintf(name, sizeof name, "form %d, %s times %s, %d x %d x %d, layout %d, %s", form, dtypes[a_type].name, dtypes[b_type].name,
        s.M, s.N, s.K, (int)s.layout, mode == ADD ? "+=" : "=");
    check(mat_distance(whole[1], whole[0]), EXACT, "%s", name);
    check(memcmp(whole[1].p, whole[2].p, elements(all_y) * sizeof(real)) != 0, 0, "%s, with two threads", name);
    for (mat *m = (mat[]){all_a, all_b, all_y, whole[0], whole[1], whole[2], {0}}; m->p; m++) dev_free(m->p);
}

// The product's blocks: panels of MR rows, MC of them together, slivers of NR columns, NC together, KC of the sum; a factor that is
// used more often than OFTEN is copied. Narrow results of xᵀ w are computed as their transposes.
static void test_beyond_panels(void)
{
    static const product_size sizes[] = {
        {MR + 1, NR + 1, KC + 1, ALONE}, {1, 2 * NC + 3, KC + 1, ALONE}, {MR + 2, NC + NR + 1, KC + 2, ALONE}, {MC + 5, 3, 2 * KC + 3, ALONE},
        {4 * MC + 5, NR + 3, KC + 7, ALONE}, {MC + 5, OFTEN + 9, KC + 3, ALONE}, {OFTEN + 5, 2 * NR - 1, KC + 3, ALONE}, {OFTEN + 5, OFTEN + 9, KC + 3, ALONE},
        {OFTEN + 5, NC + NR + 1, 33, ALONE}, {NC + 37, NR + 4, 65, ALONE}, {OFTEN + 5, NR + 4, KC + 3, ALONE},
        {38 * MC + 1, 3, 100, ALONE},                                   // an odd number of blocks, 39, for two threads
        {MC + 5, NR + 4, KC + 3, BESIDE}, {MC + 5, NR + 4, KC + 3, BEHIND}, {MC + 5, 2 * NR + 1, KC + 3, ONE_WEIGHT},
        {MR + 1, NC + 3, 70, BESIDE}, {MR + 1, NC + 3, 70, BEHIND}, {OFTEN + 5, OFTEN + 9, 9, BESIDE}, {OFTEN + 5, OFTEN + 9, 9, ONE_WEIGHT},
    };
    static const product_size of_any_type[] = {{MR + 2, NR + 3, KC + 9, ALONE}, {2 * MR + 1, NR + 3, KC + 9, BESIDE}};
    int threads = omp_get_max_threads();
    for (int form = 0; form < 3; form++)
        for (int mode = SET; mode <= ADD; mode++) {
            for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) check_product(form, sizes[i], TYPE_OF(real), TYPE_OF(real), (enum mode)mode);
            for (int types = 0; types < 2 * DTYPES * DTYPES; types++)
                check_product(form, of_any_type[types % 2], (enum dtype)(types / 2 % DTYPES), (enum dtype)(types / 2 / DTYPES), (enum mode)mode);
        }
    omp_set_num_threads(threads);
}

// Copies between two dtypes, by way of a buffer of KC numbers, one number at a time in the loops.
static void check_copy(enum dtype to, enum dtype from)
{
    enum { N = 11, C = 2 * KC + 77 };
    mat all_x, all_y, x = in_the_middle(&all_x, from, N, C, BEHIND, 2), y = in_the_middle(&all_y, to, N, C, BEHIND, 2);
    size_t bytes = elements(all_y) * dtypes[to].size, wrong = 0;
    char *before = alloc(bytes, 1);
    memcpy(before, all_y.p, bytes);
    copy(y, x);
    for (int b = 0; b < 2; b++)
        for (int i = 0; i < N; i++)
            for (int j = 0; j < C; j++) {
                real buffer;
                double one = (double)*widened(at(nth(x, b), i, j), from, 1, &buffer);
                wide number = (wide)one;
                narrow(before + (at(nth(y, b), i, j) - (char *)all_y.p), to, &number, 1);
            }
    wrong = memcmp(before, all_y.p, bytes) != 0;
    check((double)wrong, 0, "copy of %s to %s", dtypes[from].name, dtypes[to].name);
    free(before), dev_free(all_x.p), dev_free(all_y.p);
}

// Rows of a table, and products of its rows with themselves, as the base's weights are read in the dtype of their file.
static void check_table(enum dtype type)
{
    enum { N = 60, ROWS = 20, C = 2 * KC + 77 };
    int ids[N];
    mat all, table = in_the_middle(&all, type, ROWS, C, ALONE, 1), rows = random_mat(SHAPE(N, C)), squares = random_mat(SHAPE(ROWS, 1));
    mat want_rows = like(rows), want_squares = like(squares);
    double *numbers = doubles(table);
    for (int i = 0; i < N; i++) ids[i] = i * i % ROWS;
    for (int i = 0; i < N; i++)
        for (int j = 0; j < C; j++) ROW(want_rows, i)[j] = (real)numbers[ids[i] * C + j];
    for (int i = 0; i < ROWS; i++) {
        double sum = 0;
        for (int j = 0; j < C; j++) sum += pow(numbers[i * C + j], 2);
        *ROW(want_squares, i) = (real)((double)*ROW(squares, i) + 0.7 * sum);
    }
    embedding_forward(rows, table, ids);
    broadcast_dot(squares, table, table, 0.7, ADD);
    check(mat_distance(rows, want_rows), 0, "rows of a table in %s", dtypes[type].name);
    check(mat_distance(squares, want_squares), EXACT, "squares of a table in %s", dtypes[type].name);
    for (mat *m = (mat[]){all, rows, squares, want_rows, want_squares, {0}}; m->p; m++) dev_free(m->p);
    free(numbers);
}

// zero and add in the middle of larger matrices, and the tiled identity, either way up.
static void check_elements(void)
{
    enum { N = 21, C = 1031 };
    mat all_x, all_y, x = in_the_middle(&all_x, TYPE_OF(real), N, C, ALONE, 1), y = in_the_middle(&all_y, TYPE_OF(real), 2 * N, C, BEHIND, 2);
    mat want = like(all_y), e[2] = {random_mat(SHAPE(67, 1031)), random_mat(SHAPE(1031, 67))};
    copy(want, all_y);
    for (int b = 0; b < 2; b++)
        for (int i = 0; i < 2 * N; i++)
            for (int j = 0; j < C; j++) ROW(want, 1 + b * (2 * N + 2) + i)[3 + j] = b || i >= N ? 0 : (real)0.7 * ROW(x, i)[j];
    zero(y);
    add(rows_of(nth(y, 0), 0, N), x, 0.7);
    check(mat_distance(all_y, want), EXACT, "zero and add");
    for (int k = 0; k < 2; k++) {
        int wrong = 0;
        tiled_identity(e[k]);
        for (int i = 0; i < e[k].rows; i++)
            for (int j = 0; j < e[k].cols; j++) wrong += ROW(e[k], i)[j] != ((i - j) % 67 == 0);
        check(wrong, 0, "tiled identity (%d, %d)", e[k].rows, e[k].cols);
        dev_free(e[k].p);
    }
    dev_free(all_x.p), dev_free(all_y.p), dev_free(want.p);
}

// The training step's two ops on n numbers: PyTorch's AdamW one number at a time, and a sum of n squares.
static void check_training(int n)
{
    mat w = random_mat(SHAPE(n, 1)), g = random_mat(SHAPE(n, 1)), m = like(w), v = like(w), want = like(w);
    double squares = 0;
    for (int i = 0; i < n; i++) {
        double p = (double)*ROW(w, i), m1 = 0, m2 = 0, d = 0.5 * (double)*ROW(g, i);
        for (int t = 1; t <= 3; t++) {
            p -= 0.01 * 0.1 * p;
            m1 = 0.9 * m1 + 0.1 * d, m2 = 0.999 * m2 + 0.001 * d * d;
            p -= 0.01 * (m1 / (1 - pow(0.9, t))) / (sqrt(m2 / (1 - pow(0.999, t))) + 1e-8);
        }
        *ROW(want, i) = (real)p;
        squares += pow((double)*ROW(g, i), 2);
    }
    for (int t = 1; t <= 3; t++) adamw(w, g, m, v, 0.01, 0.1, 0.5, t);
    check(mat_distance(w, want), EXACT, "adamw of %d numbers", n);
    check(fabs(sum_of_squares(g) / squares - 1), 1e-12, "sum of %d squares", n);        // a double in either build
    for (mat *all = (mat[]){w, g, m, v, want, {0}}; all->p; all++) dev_free(all->p);
}

// Ops without a backward, beyond a buffer of KC numbers, a piece of 65536, and what is worth two threads.
static void test_beyond_buffers(void)
{
    int before = omp_get_max_threads();
    for (int threads = 1; threads <= 2; threads++) {
        omp_set_num_threads(threads);
        for (int to = 0; to < DTYPES; to++)
            for (int from = 0; from < DTYPES; from++) check_copy((enum dtype)to, (enum dtype)from);
        for (int type = 0; type < DTYPES; type++) check_table((enum dtype)type);
        check_elements();
        for (int i = 0; i < 4; i++) check_training((int[]){1, 20011, 1 << 16, (2 << 16) + 3}[i]);
    }
    mat x = random_mat(SHAPE((2 << 16) + 3, 1));
    double two = sum_of_squares(x);
    omp_set_num_threads(1);
    check(sum_of_squares(x) != two, 0, "sum of squares with one thread and with two");
    dev_free(x.p);
    omp_set_num_threads(before);
}

// ---- a model beyond its blocks ------------------------------------------------------------------------------------------

// The head by plain loops: logits = head norm(x), loss = −log softmax(logits)[label], one target after the other.
typedef struct { double loss, *dlast, *dhead, *dnorm; } plain_loss;

static plain_loss plain_head(const model *m, const batch *b, double scale)
{
    int C = m->c.dim, V = m->c.vocab;
    double *last = doubles(m->last), *head = doubles(m->head), *w = doubles(m->norm), *z = alloc((size_t)V, sizeof *z);
    double *hn = alloc((size_t)C, sizeof *hn), *dhn = alloc((size_t)C, sizeof *dhn);
    plain_loss y = {0, alloc(elements(m->last), sizeof *z), alloc(elements(m->head), sizeof *z), alloc((size_t)C, sizeof *z)};
    for (int t = 0; t < b->targets; t++) {
        const double *x = last + b->target_row[t] * C;
        double squares = 0, sum = 0, along = 0;
        for (int c = 0; c < C; c++) squares += x[c] * x[c], dhn[c] = 0;
        double rho = 1 / sqrt(squares / C + m->c.eps);
        for (int c = 0; c < C; c++) hn[c] = w[c] * x[c] * rho;
        for (int v = 0; v < V; v++) {
            z[v] = 0;
            for (int c = 0; c < C; c++) z[v] += head[v * C + c] * hn[c];
            sum += exp(z[v]);
        }
        y.loss -= log(exp(z[b->label[t]]) / sum);
        for (int v = 0; v < V; v++) {
            double dz = scale * (exp(z[v]) / sum - (v == b->label[t]));
            for (int c = 0; c < C; c++) y.dhead[v * C + c] += dz * hn[c], dhn[c] += dz * head[v * C + c];
        }
        for (int c = 0; c < C; c++) along += dhn[c] * w[c] * x[c], y.dnorm[c] += dhn[c] * x[c] * rho;
        for (int c = 0; c < C; c++) y.dlast[b->target_row[t] * C + c] += dhn[c] * w[c] * rho - along * x[c] * rho * rho * rho / C;
    }
    free(last), free(head), free(w), free(z), free(hn), free(dhn);
    return y;
}

static double distance_to(mat m, const double *y)
{
    wide *x = host(m), *want = alloc(elements(m), sizeof *want);
    for (size_t i = 0; i < elements(m); i++) want[i] = (wide)y[i];
    double d = distance(x, want, elements(m));
    free(x), free(want);
    return d;
}

// Every second row is a target. chunk > 0: rows of logits at a time; 0: what the size of the vocabulary makes of it.
static void check_head(int dim, int vocab, int chunk, int targets)
{
    char *path = in_scratch("head.json"), text[400];
    snprintf(text, sizeof text, "{\"model_type\": \"llama\", \"hidden_size\": %d, \"intermediate_size\": 4, \"num_hidden_layers\": 1, \"num_attention_heads\": 1,"
        " \"head_dim\": 4, \"vocab_size\": %d, \"rms_norm_eps\": 1e-5, \"tie_word_embeddings\": %s}", dim, vocab, chunk ? "false" : "true");
    write_text(path, text);
    plan p = small_plan("full");
    p.tokens = p.positions = 2 * targets;
    model m = {0};
    model_measure(&m, config_read(path), p);
    if (!chunk) check(m.chunk != 16, 0, "a vocabulary of %d is multiplied with %d rows at a time", vocab, m.chunk);
    else m.chunk = chunk;
    model_allocate(&m);
    if (chunk) m.chunk = chunk;                                         // the layout sets it again
    randomise(m.head, 0.4), randomise(m.norm, 1);
    batch b = batch_new(2 * targets, 1);
    b.tokens = 2 * targets, b.targets = targets;
    for (int t = 0; t < targets; t++) b.target_row[t] = 2 * t + 1, b.label[t] = (int)(7919L * t * t % vocab);
    batch_enter(&m, &b);
    randomise(m.last, 1);
    double loss = head_loss(&m, &b, 0.3);
    plain_loss want = plain_head(&m, &b, 0.3);
    check(fabs(loss / want.loss - 1), EXACT, "loss over %d, %d rows at a time", vocab, m.chunk);
    check(distance_to(m.dx, want.dlast), EXACT, "dx over %d, %d rows at a time", vocab, m.chunk);
    check(distance_to(m.dhead, want.dhead), EXACT, "dhead over %d, %d rows at a time", vocab, m.chunk);
    check(distance_to(m.dnorm, want.dnorm), EXACT, "dnorm over %d, %d rows at a time", vocab, m.chunk);
    free(want.dlast), free(want.dhead), free(want.dnorm), free(path), batch_free(&b), model_free(&m);
}

static void test_beyond_chunks(void)
{
    check_head(4, 600011, 0, 40);              // LOGITS holds 13 rows of it; 16 is the least
    static const int chunks[] = {40, 39, 20, 7, 1};
    for (int i = 0; i < 5; i++) check_head(36, 61, chunks[i], 40);
}

// Rows of 210, 63 and 4 tokens, widths beyond a vector, a sliver and a panel. Bat's blocks and mini's columns fit; Bone's last
// shards are short.
static const char long_config[] =
    "{\"model_type\": \"llama\", \"hidden_size\": 40, \"intermediate_size\": 60, \"num_hidden_layers\": 2, \"num_attention_heads\": 4,"
    " \"num_key_value_heads\": 2, \"head_dim\": 10, \"vocab_size\": 67, \"rms_norm_eps\": 1e-5, \"tie_word_embeddings\": true}";

static batch long_batch(void)
{
    static const int lengths[3] = {211, 64, 5};
    batch b = batch_new(280, 3);
    for (int i = 0; i < 3; i++) {
        int ids[211];
        for (int k = 0; k < lengths[i]; k++) ids[k] = (k * k + 11 * i + 3) % 67;
        batch_add(&b, &(row){.ids = ids, .n = lengths[i], .prompt = 1 + 7 * i % 9});
    }
    return b;
}

static model *open_long(const char *method_name, int recompute)
{
    plan p = small_plan(method_name);
    int shards = !strcmp(method_name, "bone") || !strcmp(method_name, "mini");
    p.rank = shards ? 18 : 10, p.mini_r = 10, p.tokens = 280, p.positions = 211, p.recompute = recompute;
    model *m = alloc(1, sizeof *m);
    char *dir = in_scratch("long"), *path = in_scratch("long.json");
    write_text(path, long_config);
    if (access(dir, F_OK)) write_model(dir, path, 0.2, TYPE_OF(wide));
    opt.model = dir;
    model_measure(m, open_config(), p);
    batch b = long_batch();
    fill_model(m, &b, 1);
    batch_free(&b), free(dir), free(path);
    return m;
}

// A step's gradient is the slope of its loss, the same bits for each --recompute and number of threads, and the same but for
// rounding where the head works on 16 rows at a time.
static void check_long(const char *name)
{
    wide *first = NULL;
    for (int n = 0; n < 3; n++) {
        omp_set_num_threads(1 + n % 2);
        model *m = open_long(name, n);
        rng start = dice;
        shake(m, 0.05, &dice);
        if (n < 2) dice = start;
        stepped s = {m, long_batch()};
        model_step(m, &s.b, 1.0 / s.b.targets);
        wide *grad = host(flat(m, m->grad));
        if (!n) first = grad;
        else check(memcmp(grad, first, m->used[PARAM] * sizeof *grad) != 0, 0, "%s, --recompute %d, %d threads", name, n, 1 + n % 2);
        if (n == 2) {
            m->chunk = 16;
            zero(flat(m, m->grad));
            model_step(m, &s.b, 1.0 / s.b.targets);
            wide *by_16 = host(flat(m, m->grad));
            check(distance(by_16, first, m->used[PARAM]), EXACT, "%s, 16 rows of logits at a time", name);
            for (int k = 0; k < 2 && sizeof(real) == 8; k++)
                check(slope_error(loss_of, &s, flat(m, m->block[PARAM]), grad), 1e-7, "%s, gradient by differences", name);
            free(by_16);
        }
        if (n) free(grad);
        batch_free(&s.b), close_small(m);
    }
    free(first);
}

static void test_beyond_rows(void)
{
    int before = omp_get_max_threads();
    for (int i = 0; i < METHODS; i++) if (!left_out(i)) check_long(methods[i].name);
    omp_set_num_threads(before);
}

// ---- goldens of transformers and PEFT -------------------------------------------------------------------------------

static json_t *golden_json(const char *path)
{
    size_t bytes;
    char *text = read_file(path, &bytes);
    json_t *json = json_loadb(text, bytes, 0, NULL);
    if (!json) die("%s: not valid JSON", path);
    free(text);
    return json;
}

static int int_of(const json_t *json, const char *name) { return (int)json_integer_value(json_object_get(json, name)); }

// Whether these ids are not those of the golden.
static int ids_differ(const int *got, size_t n, const json_t *ids)
{
    int differs = n != json_array_size(ids);
    for (size_t i = 0; i < n && !differs; i++) differs = got[i] != json_integer_value(json_array_get(ids, i));
    return differs;
}

static mat golden_tensor(checkpoint *c, const char *kind, const char *name)
{
    char key[160];
    snprintf(key, sizeof key, "%s%s", kind, name);
    ptrdiff_t at = shgeti(c->tensors, key);
    if (at < 0) die("the golden lacks %s", key);
    return c->tensors[at].value.at;
}

static batch golden_batch(void)
{
    json_t *rows = golden_json("dev/golden/rows.json"), *item, *id;
    batch b = batch_new(64, (int)json_array_size(rows));
    size_t i, n;
    json_array_foreach(rows, i, item) {
        int ids[32];
        json_array_foreach(json_object_get(item, "ids"), n, id) ids[n] = (int)json_integer_value(id);
        batch_add(&b, &(row){ids, (int)n, int_of(item, "prompt"), NULL});
    }
    json_decref(rows);
    return b;
}

// A singular vector may point either way, so starts are compared without their signs.
static double distance_without_signs(mat a, mat b)
{
    wide *x = host(a), *y = host(b);
    size_t n = elements(a);
    for (size_t i = 0; i < n; i++) x[i] = (wide)fabs((double)x[i]), y[i] = (wide)fabs((double)y[i]);
    double d = distance(x, y, n);
    free(x), free(y);
    return d;
}

// The model of a case. Where the adapter has a start, its own is held to PEFT's, and then it gets PEFT's.
static void golden_open(model *m, plan p, const batch *b, checkpoint *golden, const char *name)
{
    model_measure(m, open_config(), p);
    fill_model(m, b, 1);
    for (int i = 0; i < 14 && p.method->has_start; i++) {
        linear *l = m->linears[i];
        if (!has_adapter(l)) continue;
        for (int j = 0; j < arrlen(m->tensors); j++) {
            tensor *t = &m->tensors[j];
            if (t->at != &l->A && t->at != &l->B) continue;
            mat start = golden_tensor(golden, "start.", t->name), own = t->at == &l->A ? l->A0 : l->B0;
            check(distance_without_signs(own, start), 2e-5, "%s, %s, own start against PEFT's float32 one", name, t->name);
            put(own, start.p, start.type);
            if (!opt.adapter) put(*t->at, start.p, start.type);
        }
    }
}

static void golden_case(const char *name)
{
    char *dir = join("dev/golden", name), *path = join(dir, "case.json");
    json_t *json = golden_json(path);
    const char *method_name = string_field(json, "method");
    char *base = join("dev/golden", string_field(json, "base"));
    plan p = plan_from_options();
    opt.model = base, opt.adapter = method_name ? NULL : dir;
    if (method_name) p.method = method_named(method_name), p.rank = 4, p.alpha = 6;
    else peft_read_config(&p, dir);
    p.tokens = 64, p.positions = 16, p.dora_detach = 1;        // as PEFT computes DoRA
    checkpoint golden = checkpoint_open(dir, "golden");
    model m = {0};
    batch b = golden_batch();
    golden_open(&m, p, &b, &golden, name);

    int f64 = sizeof(real) == 8;
    double tol = f64 ? 1e-9 : 2e-5;
    double loss = model_step(&m, &b, 1.0 / b.targets) / b.targets, want;
    memcpy(&want, golden_tensor(&golden, "", "loss").p, sizeof want);
    check(fabs(loss - want) / want, tol, "%s, loss", name);
    for (int i = 0; i < arrlen(m.tensors); i++)
        if (m.tensors[i].kind == PARAM) check(mat_distance(*m.tensors[i].grad, golden_tensor(&golden, "grad.", m.tensors[i].name)), tol, "%s, d %s", name, m.tensors[i].name);
    for (int r = 0, row_at = 0; r < b.rows; row_at += b.spans[r++].nq + 1) {         // the golden has the last token's logits, too
        int at_row[16], n = b.spans[r].nq;
        for (int i = 0; i < n; i++) at_row[i] = b.spans[r].q + i;
        head_forward(&m, at_row, n);
        check(mat_distance(m.logits, rows_of(golden_tensor(&golden, "", "logits"), row_at, n)), tol, "%s, logits of row %d", name, r);
    }

    double losses[8];
    memcpy(losses, golden_tensor(&golden, "", f64 ? "losses64" : "losses32").p, sizeof losses);
    opt.lr = 5e-3, opt.clip = 0.5, opt.warmup = 2;
    for (int s = 0; s < 8; s++) {
        zero(flat(&m, m.grad));
        loss = model_step(&m, &b, 1.0 / b.targets) / b.targets;
        update(&m, s + 1, learning_rate(s, 8), gradient_norm(&m));
        check(fabs(loss - losses[s]), f64 ? 1e-9 : 1e-5, "%s, loss of step %d", name, s + 1);
    }
    batch_free(&b), model_free(&m), checkpoint_close(&golden), json_decref(json);
    free(path), free(dir), free(base);
}

static void test_goldens(void)
{
    int cases = 0;
    DIR *d = opendir("dev/golden");
    if (!d) die("dev/golden: %s", strerror(errno));
    for (struct dirent *e; (e = readdir(d));) {
        char path[400];
        snprintf(path, sizeof path, "dev/golden/%s/case.json", e->d_name);
        if (!access(path, F_OK)) golden_case(e->d_name), cases++;
    }
    closedir(d);
    check(cases >= 16 ? 0 : 1, 0, "%d cases in dev/golden", cases);
}

// An adapter on some layers only: the plan for evaluation, which keeps nothing, gives the logits of the plan for training.
static void test_uneven(void)
{
    static const char *const uneven[] = {"[\"layers.0.self_attn.q_proj\", \"layers.0.self_attn.o_proj\"]", "[\"layers.1.mlp.down_proj\"]",
        "[\"layers.0.mlp.up_proj\", \"layers.1.self_attn.k_proj\", \"layers.1.mlp.gate_proj\"]"};
    for (int i = 1; i < METHODS; i++)
        for (int j = 0; j < 3 && !methods[i].wants_gradient; j++) {     // lora-ga is used as the lora it is saved as
            json_t *modules = json_loads(uneven[j], 0, NULL);
            batch b = small_batch(0, 3);
            mat logits[2];
            snapshot *trained = NULL;
            for (int use = 0; use < 2; use++) {
                plan p = small_plan(methods[i].name);
                p.modules = modules, p.selects = peft_targeted, p.targets = 0, p.train = !use;
                model *m = open_small(p, 0);
                if (!use) shake(m, 0.2, &dice);
                if (use) give_kinds(m, trained, "", 1 << PARAM | 1 << START, 0);
                else trained = take_kinds(NULL, "", m, 1 << PARAM | 1 << START, 0);
                logits[use] = all_logits(m, &b);
                close_small(m);
            }
            check(mat_distance(logits[1], logits[0]), 0, "%s on %s", methods[i].name, uneven[j]);
            dev_free(logits[0].p), dev_free(logits[1].p), batch_free(&b), snapshots_free(trained), json_decref(modules);
        }
}

// Which linear layers "target_modules" means, in a model of two layers. From PEFT 0.21's check_target_module_exists, Unsloth's own regular
// expression among them.
static void test_target_modules(void)
{
    static const struct { const char *modules, *layers[2]; } cases[] = {
        {"[\"q_proj\", \"v_proj\"]",                                   {"q-v----", "q-v----"}},
        {"[\"self_attn.q_proj\"]",                                     {"q------", "q------"}},
        {"[\"model.layers.0.self_attn.q_proj\", \"model.layers.1.mlp.down_proj\"]", {"q------", "------d"}},
        {"[\"layers.1.self_attn.k_proj\", \"o_proj\"]",                {"---o---", "-k-o---"}},
        {"[\"proj\", \"q_proj\"]",                                     {"q------", "q------"}},
        {"[\"base_model.model.model.layers.0.self_attn.q_proj\", \"up_proj\"]", {"-----u-", "-----u-"}},
        {"[\"query_key_value\", \"q_proj\"]",                          {"q------", "q------"}},
        {"\"all-linear\"",                                             {"qkvogud", "qkvogud"}},
        {"\".*\\\\.(q_proj|v_proj)\"",                                 {"q-v----", "q-v----"}},
        {"\"(?:.*?(?:self_attn|mlp).*?(?:q_proj|down_proj)).*?\"",     {"q-----d", "q-----d"}},
        {"\"model\\\\.layers\\\\.\\\\d+\\\\.self_attn\\\\.(q|k)_proj\"", {"qk-----", "qk-----"}},
        {"\"model\\\\.layers\\\\.1\\\\..*proj\"",                      {"-------", "qkvogud"}},
        {"\"^model\\\\.layers\\\\.[0-1]\\\\.mlp\\\\.\\\\w+$\"",        {"----gud", "----gud"}},
        {"\".*layers.(0).*o_proj\"",                                   {"---o---", "-------"}},
        {"\"a|.*up_proj|b\"",                                          {"-----u-", "-----u-"}},
        {"\".+?gate_proj\"",                                           {"----g--", "----g--"}},
        {"\".*[^pn]_proj\"",                                           {"qkvog--", "qkvog--"}},
        {"\"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)|(?:\\\\bmodel\\\\.layers\\\\.[\\\\d]{1,}\\\\.(?:self_attn|mlp)\\\\.(?:(?:q_proj|gate_proj)))\"",
                                                                       {"q---g--", "q---g--"}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[600], *path = in_scratch("adapter_config.json");
        snprintf(text, sizeof text, "{\"peft_type\": \"LORA\", \"r\": 2, \"target_modules\": %s}", cases[i].modules);
        write_text(path, text);
        plan p = small_plan("lora");
        peft_read_config(&p, scratch);
        model *m = open_small(p, 0);
        for (int j = 0; j < 14; j++)
            check(!has_adapter(m->linears[j]) == (cases[i].layers[j / LINEARS][j % LINEARS] == '-') ? 0 : 1, 0, "%s, layer %d %s", cases[i].modules, j / LINEARS, projections[j % LINEARS].name);
        close_small(m), free(path);
    }
}

// ---- the tokenizer ------------------------------------------------------------------------------------------------

static const char *const real_input = "../shared/real";            // real models and data, where there are any

static int need(const char *name)
{
    char *path = join(real_input, name);
    int there = !access(path, F_OK);
    if (!there) snprintf(skipped, sizeof skipped, "%s is not here", path);
    free(path);
    return there;
}

// tokenizer.model alone, as SentencePiece reads it: without special tokens.
static tokenizer *plain_tokenizer(const char *dir)
{
    char *path = join(dir, "tokenizer.model"), err[512];
    tokenizer *t = tokenizer_load(path, err, sizeof err);
    if (!t) die("%s", err);
    free(path);
    return t;
}

// A file of texts and SentencePiece's ids for them.
static void tokenizer_case(const char *dir, const char *path)
{
    size_t number, n;
    json_t *json = golden_json(path), *item;
    tokenizer *t = plain_tokenizer(dir);
    json_array_foreach(json, number, item) {
        const char *s = string_field(item, "text");
        int *got = tokenizer_encode(t, s, strlen(s), 1, &n);
        char *back = decode(t, got, (int)n);
        check(ids_differ(got, n, json_object_get(item, "ids")), 0, "%s, text %zu, ids", path, number);
        check(strcmp(back, s) && !strstr(s, "▁") ? 1 : 0, 0, "%s, text %zu, back to text", path, number);       // ▁ itself comes back as a space
        free(got), free(back);
    }
    check(number > 5 ? 0 : 1, 0, "texts in %s", path);
    json_decref(json), tokenizer_free(t);
}

static void test_tokenizer_own(void) { tokenizer_case("base", "dev/golden/tokenizer.json"); }

static void test_tokenizer_expected(void)
{
    if (!need("llama2-tokenizer/expected.json")) return;
    char *dir = join(real_input, "llama2-tokenizer"), *path = join(dir, "expected.json");
    tokenizer_case(dir, path);
    free(path), free(dir);
}

// Directories with special and added tokens give the ids, BOS and EOS that transformers gives there (dev/golden.py made them).
static void test_special_tokens(void)
{
    char *dir = in_scratch("special"), command[300];
    const char *file;
    json_t *cases = golden_json("dev/golden/special_tokens.json"), *item, *content, *line;
    size_t number, i, n;
    json_array_foreach(cases, number, item) {
        snprintf(command, sizeof command, "rm -rf %s; mkdir %s; cp base/config.json base/tokenizer.model %s", dir, dir, dir);
        if (system(command)) die("cannot prepare %s", dir);
        json_object_foreach(json_object_get(item, "files"), file, content) {
            char *path = join(dir, file), *text = json_text(content);
            write_text(path, text);
            free(path), free(text);
        }
        tokenizer *t = open_tokenizer(dir, 0);
        check(tokenizer_bos(t) != (field_true(item, "bos") ? 1 : -1), 0, "directory %zu: BOS", number);
        check(tokenizer_eos(t) != int_of(item, "eos"), 0, "directory %zu: EOS", number);
        json_array_foreach(json_object_get(item, "rows"), i, line) {
            const char *s = string_field(line, "text");
            int *got = tokenizer_encode(t, s, strlen(s), 1, &n);
            check(ids_differ(got, n, json_object_get(line, "ids")), 0, "directory %zu: ids of «%s»", number, s);
            free(got);
        }
        tokenizer_free(t);
    }
    check(number != 8, 0, "%zu directories", number);
    json_decref(cases);
    free(dir);
}

// The prompt's ids do not depend on the answer; every token of the answer is learnt, and they say the answer and nothing else.
// Held for answers that begin with the rest of any piece that begins with ":", the prompt's last character.
static void edge_cases(const char *dir)
{
    tokenizer *t = plain_tokenizer(dir);
    char *prompt = format_prompt("What is 3 minus 8?", NULL);
    row bare = encode_row(t, prompt, "", 0);
    int straddling = 0;
    for (int id = 0; id < tokenizer_vocab(t); id++) {
        char *piece = decode(t, &id, 1), answer[64];
        if (*piece == ':' && piece[1]) {
            snprintf(answer, sizeof answer, "%s5 and more", piece + 1);
            row r = encode_row(t, prompt, answer, 1);
            char *said = decode(t, r.ids + r.prompt, r.n - r.prompt);
            check(r.prompt != bare.n || memcmp(r.ids, bare.ids, (size_t)bare.n * sizeof(int)), 0, "%s: the prompt's ids before «%s»", dir, answer);
            check(strcmp(said, answer) ? 1 : 0, 0, "%s: learns «%s» of «%s»", dir, said, answer);
            straddling++;
            free(r.ids), free(said);
        }
        free(piece);
    }
    check(!straddling, 0, "%s: no piece begins with a colon", dir);
    static const char *const ordinary[] = {"Now Emma had 17 cups.", " 5", "#### 8", "x"};      // where no piece straddles, ids are those of one text
    for (int i = 0; i < 4; i++) {
        size_t n, length = strlen(prompt) + strlen(ordinary[i]);
        char *whole = alloc(length + 1, 1);
        snprintf(whole, length + 1, "%s%s", prompt, ordinary[i]);
        row r = encode_row(t, prompt, ordinary[i], 0);
        int *one = tokenizer_encode(t, whole, length, 1, &n), cut = 0;
        for (int k = 1; k <= (int)n; k++) {
            char *part = decode(t, one, k);
            cut |= strlen(part) == strlen(prompt);              // a token ends where the prompt ends
            free(part);
        }
        check(cut && ((int)n != r.n - 1 || memcmp(one, r.ids + 1, n * sizeof(int))), 0, "%s: ids of «%s»", dir, ordinary[i]);
        free(whole), free(one), free(r.ids);
    }
    free(prompt), free(bare.ids), tokenizer_free(t);
}

static void test_edge(void)
{
    edge_cases("base");
    if (!need("llama2-tokenizer/tokenizer.model")) return;
    char *dir = join(real_input, "llama2-tokenizer");
    edge_cases(dir);
    free(dir);
}

// Any text comes back, and 4 MB of it take n log n: one letter, letters at random, words, characters of one to four bytes.
static void test_tokenizer_bytes(void)
{
    tokenizer *t = plain_tokenizer("base");
    size_t n, length = 4 << 20;
    char *text = alloc(length + 1, 1);
    static const char *const some[] = {"é", "猫", "🙂", "a", "\n", " "};
    for (int kind = 0; kind < 4; kind++) {
        for (size_t i = 0; i < length; i++) text[i] = kind == 0 ? 'a' : kind == 1 ? (char)(1 + rng_next(&dice) % 127) : "the cat sat "[i % 12];
        for (size_t i = 0; kind == 3 && i < length;) {
            const char *c = some[rng_next(&dice) % 6];
            if (i + strlen(c) > length) c = "a";
            memcpy(text + i, c, strlen(c)), i += strlen(c);
        }
        double start = seconds();
        int *ids = tokenizer_encode(t, text, length, 1, &n);
        check(seconds() - start, 30, "seconds for 4 MB of kind %d", kind);
        size_t bytes;
        char *back = tokenizer_decode(t, ids, n, &bytes);
        check(bytes == length && !memcmp(back, text, length) ? 0 : 1, 0, "kind %d comes back", kind);
        free(ids), free(back);
    }
    free(text), tokenizer_free(t);
}

// ---- rows and answers -----------------------------------------------------------------------------------------------------

// Rows as Alpaca, MetaMathQA and GSM8K are published, one a line and as an array: BOS, prompt, answer, EOS; the prompt is masked.
static void test_rows(void)
{
    static const struct { const char *json, *question, *answer; } published[] = {
        {"{\"instruction\": \"Add.\", \"input\": \"1 and 1\", \"output\": \"2\"}", "Add.\n1 and 1", "2"},
        {"{\"instruction\": \"Add 1 and 1.\", \"input\": \"\", \"output\": \"2\", \"text\": \"Below is …\"}", "Add 1 and 1.", "2"},
        {"{\"type\": \"GSM_Rephrased\", \"query\": \"What is 1 + 1?\", \"original_question\": \"1 + 1?\", \"response\": \"2.\\n#### 2\\nThe answer is: 2\"}",
            "What is 1 + 1?", "2.\n#### 2\nThe answer is: 2"},
        {"{\"question\": \"1 + 1?\", \"answer\": \"1 + 1 = <<1+1=2>>2\\n#### 2\"}", "1 + 1?", "1 + 1 = <<1+1=2>>2\n#### 2"},
    };
    enum { N = sizeof published / sizeof *published };
    tokenizer *t = open_tokenizer("base", 0);
    for (int array = 0; array < 2; array++) {
        char *path = in_scratch(array ? "published.json" : "published.jsonl"), file[2000] = "";
        for (int i = 0; i < N; i++)
            snprintf(file + strlen(file), sizeof file - strlen(file), "%s%s%s", !array ? "" : i ? ",\n" : "[", published[i].json, array && i + 1 < N ? "" : array ? "]" : "\n");
        write_text(path, file);
        dataset d = read_rows(t, path, 1024);
        check(arrlen(d.rows) == N ? 0 : 1, 0, "%s: %td rows", path, arrlen(d.rows));
        for (int i = 0; i < N && i < arrlen(d.rows); i++) {
            const row *r = &d.rows[i];
            char *prompt = format_prompt(published[i].question, NULL), *whole = decode(t, r->ids, r->n), want[1000];
            size_t n;
            free(tokenizer_encode(t, prompt, strlen(prompt), 1, &n));
            snprintf(want, sizeof want, "%s%s", prompt, published[i].answer);
            check(strcmp(whole, want) ? 1 : 0, 0, "%s, row %d is «%s»", path, i, whole);
            check(r->prompt == (int)n + 1 && r->ids[0] == tokenizer_bos(t) && r->ids[r->n - 1] == tokenizer_eos(t) && !strcmp(r->answer, published[i].answer) ? 0 : 1, 0, "%s, row %d", path, i);
            free(prompt), free(whole);
        }
        free_rows(&d), free(path);
    }
    tokenizer_free(t);
}

// What a child process says on stderr while it does this work on a path: the line of die(), or nothing.
static char *said_by(void (*work)(const char *path), const char *path)
{
    char *log = in_scratch("said");
    int status;
    size_t bytes;
    fflush(stdout);
    pid_t pid = fork();
    if (!pid) {
        if (!freopen(log, "w", stderr)) _exit(9);
        work(path);
        _exit(0);
    }
    if (pid < 0 || waitpid(pid, &status, 0) < 0) die("cannot start a process: %s", strerror(errno));
    char *text = read_file(log, &bytes), *end = strchr(text, '\n');
    check(WIFEXITED(status) && WEXITSTATUS(status) == (*text ? 1 : 0) ? 0 : 1, 0, "%s: status %d with «%s»", path, status, text);
    check(*text && (!end || end[1] || strncmp(text, "error: ", 7)), 0, "%s: not one line: «%s»", path, text);
    if (end) *end = 0;
    free(log);
    return text;
}

static void write_bytes(const char *path, const char *data, size_t bytes)
{
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, bytes, f) != bytes || fclose(f)) die("%s: %s", path, strerror(errno));
}

static tokenizer *shared_tokenizer;
static void only_read_rows(const char *path) { read_rows(shared_tokenizer, path, 1024); }

#define BYTES(literal) literal, sizeof(literal) - 1
#define AB "{\"question\": \"a\", \"answer\": \"b\"}"

// `says`: a part of the one line that refuses the file. NULL: it is read, the first row is this question and answer,
// `rows` in all, and `empty` were left out for want of an answer.
static const struct {
    const char *name, *file;
    size_t bytes;
    const char *says, *question, *answer;
    int rows, empty;
} row_files[] = {
    {"number.jsonl",     BYTES("{\"instruction\": \"Add 1.\", \"input\": 21, \"output\": \"22\"}\n"), NULL, "Add 1.\n21", "22", 1, 0},
    {"spelling.jsonl",   BYTES("{\"question\": 21.50, \"answer\": -1E3}"), NULL, "21.50", "-1E3", 1, 0},
    {"long.jsonl",       BYTES("{\"question\": \"a\", \"answer\": 12345678901234567890123456789012345678901234567890123456789012345678901234567890}"),
        NULL, "a", "12345678901234567890123456789012345678901234567890123456789012345678901234567890", 1, 0},
    {"spellings.jsonl",  BYTES("{\"a\": {\"question\": [1, 2]}, \"b:\\\"\": \":{\", \"question\": 0.10, \"c\": [{}], \"answer\" : 1e-05}"), NULL, "0.10", "1e-05", 1, 0},
    {"numbers.json",     BYTES("[ {\"question\": 007e0}]"), "numbers.json:1: not valid JSON, at byte 16 of the line: ", 0, 0, 0, 0},
    {"nan.jsonl",        BYTES("{\"score\": NaN, \"question\": \"a\", \"answer\": \"b\"}"), "at byte 13 of the line: NaN or Infinity, which only Python writes", 0, 0, 0, 0},
    {"infinity.jsonl",   BYTES("{\"score\": [Infinity], \"question\": \"a\", \"answer\": \"b\"}"), "NaN or Infinity, which only Python writes", 0, 0, 0, 0},
    {"minus.jsonl",      BYTES("{\"score\": -Infinity, \"question\": \"a\", \"answer\": \"b\"}"), "NaN or Infinity, which only Python writes", 0, 0, 0, 0},
    {"wide.jsonl",       BYTES("{\"score\": 1e999, \"question\": \"a\", \"answer\": \"b\"}"), "real number overflow", 0, 0, 0, 0},
    {"text-beside.jsonl", BYTES("{\"text\": {\"not\": \"read\"}, \"question\": \"a\", \"answer\": \"b\"}"), NULL, "a", "b", 1, 0},
    {"null.jsonl",       BYTES("{\"instruction\": \"a\", \"input\": null, \"output\": \"b\"}"), NULL, "a", "b", 1, 0},
    {"null-shape.jsonl", BYTES("{\"instruction\": null, \"output\": null, \"question\": \"a\", \"answer\": \"b\"}"), NULL, "a", "b", 1, 0},
    {"blanks.jsonl",     BYTES("{\"question\": \"x\", \"answer\": \" \\n\"}\n" AB), NULL, "a", "b", 1, 1},
    {"pretty.json",      BYTES("{\n  \"question\": \"a\",\n  \"answer\": \"b\"\n}\n"), NULL, "a", "b", 1, 0},
    {"empty.jsonl",      BYTES("{\"question\": \"x\", \"answer\": \"\"}\n" AB "\n{\"text\": \"\"}\n" AB), NULL, "a", "b", 2, 2},
    {"blank.jsonl",      BYTES("\n" AB "\n\n  \t\r\n" AB "\r\n\n"), NULL, "a", "b", 2, 0},
    {"mark.jsonl",       BYTES("\xef\xbb\xbf" AB "\n"), NULL, "a", "b", 1, 0},
    {"array.jsonl",      BYTES("\n[" AB ",\n " AB "]\n"), NULL, "a", "b", 2, 0},
    {"lines.json",       BYTES(AB "\n" AB "\n"), NULL, "a", "b", 2, 0},
    {"pair.jsonl",       BYTES("{\"question\": \"\\ud83d\\uDE00\\u00e9\", \"answer\": \"b\"}"), NULL, "\xf0\x9f\x98\x80\xc3\xa9", "b", 1, 0},
    {"true.jsonl",       BYTES(AB "\n{\"instruction\": \"a\", \"input\": true, \"output\": \"b\"}"), "true.jsonl:2: \"input\" is true, expected text or a number", 0, 0, 0, 0},
    {"object.jsonl",     BYTES("{\"question\": {\"a\": 1}, \"answer\": \"b\"}"), "\"question\" is an object, expected", 0, 0, 0, 0},
    {"list.jsonl",       BYTES("{\"question\": \"a\", \"answer\": [\"b\"]}"), "\"answer\" is an array, expected", 0, 0, 0, 0},
    {"nan-read.jsonl",   BYTES("{\"question\": \"a\", \"answer\": NaN}"), "which only Python writes", 0, 0, 0, 0},
    {"null-answer.jsonl", BYTES("{\"question\": \"a\", \"answer\": null}"), "has \"question\" but no text in \"answer\"", 0, 0, 0, 0},
    {"false-text.json",  BYTES("[{\"text\": \"a b\"}, {\"text\": false}]"), "false-text.json, row 2: \"text\" is false", 0, 0, 0, 0},
    {"high.jsonl",       BYTES(AB "\n{\"question\": \"a\\ud83d b\", \"answer\": \"b\"}"), "high.jsonl:2: not valid JSON, at byte 24 of the line: invalid Unicode '\\uD83D'", 0, 0, 0, 0},
    {"low.jsonl",        BYTES("{\"question\": \"\\ude00\", \"answer\": \"b\"}"), "invalid Unicode '\\uDE00'", 0, 0, 0, 0},
    {"two-high.jsonl",   BYTES("{\"question\": \"\\ud83d\\ud83d\\ude00\", \"answer\": \"b\"}"), "invalid Unicode '\\uD83D\\uD83D'", 0, 0, 0, 0},
    {"zero.jsonl",       BYTES("{\"question\": \"a\\u0000\", \"answer\": \"b\"}"), "at byte 22 of the line: \\u0000 is not allowed", 0, 0, 0, 0},
    {"escape.jsonl",     BYTES("{\"question\": \"a\\x41\", \"answer\": \"b\"}"), "invalid escape near '\"a\\x'", 0, 0, 0, 0},
    {"hex.jsonl",        BYTES("{\"question\": \"a\\u12g4\", \"answer\": \"b\"}"), "invalid escape near '\"a\\u12g'", 0, 0, 0, 0},
    {"tab.jsonl",        BYTES("{\"question\": \"a\tb\", \"answer\": \"b\"}"), "control character 0x9", 0, 0, 0, 0},
    {"latin.jsonl",      BYTES(AB "\n{\"question\": \"caf\xe9\", \"answer\": \"b\"}"), "latin.jsonl:2: byte 18 of the line is 0xe9, which is not UTF-8", 0, 0, 0, 0},
    {"overlong.jsonl",   BYTES("{\"question\": \"\xc0\x80\", \"answer\": \"b\"}"), "byte 15 of the line is 0xc0", 0, 0, 0, 0},
    {"nul.jsonl",        BYTES(AB "\n{\"question\": \"a\0\", \"answer\": \"b\"}"), "nul.jsonl:2: byte 16 of the line is NUL", 0, 0, 0, 0},
    {"nul.txt",          BYTES("Once upon a time.\nThere was\0 a girl."), "nul.txt:2: byte 10 of the line is NUL", 0, 0, 0, 0},
    {"latin.txt",        BYTES("Once upon a time.\n\xe9t\xe9"), "latin.txt:2: byte 1 of the line is 0xe9", 0, 0, 0, 0},
    {"cut.txt",          BYTES("Once upon a time \xe2\x82"), "cut.txt:1: byte 18 of the line is 0xe2", 0, 0, 0, 0},
    {"utf16.txt",        BYTES("\xff\xfeO\0n\0c\0e\0"), "utf16.txt: is UTF-16", 0, 0, 0, 0},
    {"utf16be.jsonl",    BYTES("\xfe\xff\0{\0}"), "is UTF-16", 0, 0, 0, 0},
    {"utf16bare.json",   BYTES("[\0{\0}\0]\0"), "is UTF-16", 0, 0, 0, 0},
    {"twice.jsonl",      BYTES("{\"question\": \"a\", \"answer\": \"b\", \"\\u0061nswer\": \"c\"}"), "at byte 46 of the line: duplicate object key near '\"\\u0061nswer\"'", 0, 0, 0, 0},
    {"comma.json",       BYTES("[" AB ",\n]"), "comma.json:2: not valid JSON, at byte 1 of the line: unexpected token near ']'", 0, 0, 0, 0},
    {"open.json",        BYTES("[" AB "\n"), "open.json:2: not valid JSON, at byte 1 of the line: expected , or ]", 0, 0, 0, 0},
    {"behind.json",      BYTES("[" AB "]\n[" AB "]"), "behind.json:2: not valid JSON, at byte 1 of the line: more text behind the array", 0, 0, 0, 0},
    {"two.jsonl",        BYTES(AB AB), "more text behind the object", 0, 0, 0, 0},
    {"two.json",         BYTES(AB " " AB), "two.json:1: not valid JSON, at byte 34 of the line: more text behind the object", 0, 0, 0, 0},
    {"octal.jsonl",      BYTES("{\"question\": 012, \"answer\": \"b\"}"), "invalid token near '0'", 0, 0, 0, 0},
    {"point.jsonl",      BYTES("{\"question\": 1., \"answer\": \"b\"}"), "invalid token near '1.'", 0, 0, 0, 0},
};

static void test_row_files(void)
{
    tokenizer *t = shared_tokenizer = open_tokenizer("base", 0);
    for (size_t i = 0; i < sizeof row_files / sizeof *row_files; i++) {
        char *path = in_scratch(row_files[i].name), want[1000];
        write_bytes(path, row_files[i].file, row_files[i].bytes);
        const char *name = row_files[i].name, *says = row_files[i].says;
        char *said = said_by(only_read_rows, path);
        check(says ? !strstr(said, says) : *said, 0, "%s: «%s», expected «%s»", name, said, says ? says : "");
        if (!says && !*said) {
            dataset d = read_rows(t, path, 1024);
            char *whole = decode(t, d.rows[0].ids, d.rows[0].n), *prompt = format_prompt(row_files[i].question, NULL);
            snprintf(want, sizeof want, "%s%s", prompt, row_files[i].answer);
            check(strcmp(whole, want) || strcmp(d.rows[0].answer, row_files[i].answer), 0, "%s: «%s»", name, whole);
            check(arrlen(d.rows) != row_files[i].rows, 0, "%s: %td rows", name, arrlen(d.rows));
            check(d.empty != row_files[i].empty, 0, "%s: %d left out", name, d.empty);
            free(whole), free(prompt), free_rows(&d);
        }
        free(said), free(path);
    }
    tokenizer_free(t);
}

#define TIMES5(a) a a a a a
#define DEEP(open, more, less, close) TIMES5(TIMES5(TIMES5(open))) more less TIMES5(TIMES5(TIMES5(close)))     /* 125 levels, or one more */
#define T(dtype, shape, offsets) "{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

// config.json with another dtype, byte by byte as it was but for that.
static void test_config_spelling(void)
{
    static const char *const cases[][2] = {
        {"{\n  \"a\": 1e-5,\n  \"torch_dtype\": \"float32\",\n  \"b\": 10000.0\n}\n",
         "{\n  \"a\": 1e-5,\n  \"torch_dtype\": \"bfloat16\",\n  \"b\": 10000.0\n}\n"},
        {"{\"dtype\":null,\"a\":[{\"dtype\":\"x\"}],\"torch_dtype\" : \"a\\\"b\\\\\"}",
         "{\"dtype\":\"bfloat16\",\"a\":[{\"dtype\":\"x\"}],\"torch_dtype\" : \"bfloat16\"}"},
        {"{\"a:\\\"\": \":{\\\\\", \"dtype\": \"float16\"}", "{\"a:\\\"\": \":{\\\\\", \"dtype\": \"bfloat16\"}"},
        {" {\"a\": 0.10000000000000001}", "{\n\t\"torch_dtype\":\t\"bfloat16\",\"a\": 0.10000000000000001}"},
    };
    char *dir = in_scratch("spelling");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        stage_begin(dir);
        stage_config(cases[i][0], "bfloat16");
        size_t bytes;
        char *path = join(staged, "config.json"), *text = read_file(path, &bytes);
        check(strcmp(text, cases[i][1]) != 0, 0, "«%s» became «%s»", cases[i][0], text);
        stage_discard();
        free(path), free(text);
    }
    free(dir);
}

// A value as this program writes it, and whether it is the same when it is read again.
static void written(json_t *value, const char *want)
{
    char *text = json_text(value);
    json_t *again = json_loads(text, JSON_DECODE_ANY, NULL);
    check(strcmp(text, want) || !json_equal(value, again), 0, "%s was written, expected %s", text, want);
    free(text);
    json_decref(value), json_decref(again);
}

static void test_json_values(void)
{
    written(number_value(16), "16");
    written(number_value(-3), "-3");
    written(number_value(999999999999999.0), "999999999999999");
    written(number_value(0.1), "0.1");
    written(number_value(1e-5), "1e-5");
    written(number_value(1.0 / 3), "0.33333333333333331");
    written(text_value("caf\xc3\xa9 \"/\\"), "\"caf\xc3\xa9 \\\"/\\\\\"");
    written(text_value("caf\xe9"), "\"caf\\\\xe9\"");            // no JSON text holds the byte itself
    const char *large = "{\"model_max_length\": 1000000000000000019884624838656, \"r\": 8.0}";
    json_t *json = parse_json("large", large, strlen(large));       // as transformers writes it for "none"
    check(fabs(json_number_value(json_object_get(json, "model_max_length")) / 1e30 - 1), 1e-15, "a number of 31 digits");
    check(config_int(json, "large", "r", -1) - 8, 0, "8.0 as a whole number");
    json_decref(json);
}

// A header of 100,000 tensors and a row of 16 MB: in about a second. What takes every tensor for every tensor takes minutes.
static void test_large_files(void)
{
    enum { TENSORS = 100000, LETTERS = 16 << 20 };
    char *dir = in_scratch("large"), *path = in_scratch("large/model.safetensors");
    char *file = alloc(TENSORS, 100), *at = file + 8;
    for (int i = 0; i < TENSORS; i++)
        at += sprintf(at, "%c\"model.layers.%d.norm\":" T("F32", "[1]", "[%d,%d]"), i ? ',' : '{', i, 4 * i, 4 * i + 4);
    *at++ = '}';
    size_t header = (size_t)(at - file - 8);
    for (int i = 0; i < 8; i++) file[i] = (char)(header >> 8 * i);
    mkdir(dir, 0777);
    write_bytes(path, file, header + 8 + 4 * TENSORS);
    double start = seconds();
    checkpoint c = checkpoint_open(dir, "model");
    check(seconds() - start, 10, "seconds for a header of 100,000 tensors");
    check(shlen(c.tensors) != TENSORS, 0, "%td tensors", shlen(c.tensors));
    checkpoint_close(&c);
    free(file), free(path);

    file = alloc(LETTERS + 100, 1);
    int n = sprintf(file, "{\"question\": \"a\", \"answer\": 1, \"not read\": \"");
    memset(file + n, 'x', LETTERS);
    strcpy(file + n + LETTERS, "\"}\n" AB "\n");
    path = in_scratch("large.jsonl");
    write_text(path, file);
    tokenizer *t = open_tokenizer("base", 0);
    start = seconds();
    dataset d = read_rows(t, path, 1024);
    check(seconds() - start, 10, "seconds for a row of 16 MB");
    check(arrlen(d.rows) != 2, 0, "%td rows", arrlen(d.rows));
    free_rows(&d), tokenizer_free(t);
    free(file), free(path), free(dir);
}

// A header, the bytes of data behind it, and what refuses them: NULL where the safetensors library (0.8) reads the file.
// Where it takes the last of two equal keys, this program refuses both, as the format's documentation asks.
static const struct { const char *header; int data; const char *says; } safetensors_files[] = {
    {"{\"a\":" T("F32", "[2]", "[0,8]") ",\"b\":" T("BF16", "[2,2]", "[8,16]") "}", 16, NULL},
    {"{\"b\":" T("F32", "[2]", "[8,16]") ",\"a\":" T("F32", "[2]", "[0,8]") "}  \n", 16, NULL},
    {"{\"__metadata__\":{\"format\":\"pt\"},\"a\":" T("F32", "[2]", "[0,8]") "}", 8, NULL},
    {"{\"a\":" T("F32", "[]", "[0,4]") ",\"b\":" T("I64", "[1]", "[4,12]") ",\"c\":" T("F32", "[0,3]", "[12,12]") ",\"d\":" T("F4", "[4]", "[12,14]") "}", 14, NULL},
    {"{\"c\":" T("F32", "[0]", "[0,0]") ",\"a\":" T("F32", "[1,1,1,2]", "[0,8]") "}", 8, NULL},
    {"{}", 0, NULL},
    {"{\"a\":" T("F32", "[2]", "[0,8]") ",\"b\":" T("F32", "[2]", "[0,8]") "}", 8, "tensors a and b share bytes"},
    {"{\"a\":" T("F32", "[2]", "[0,8]") ",\"b\":" T("F32", "[2]", "[4,12]") "}", 12, "tensors a and b share bytes"},
    {"{\"a\":" T("F32", "[2]", "[0,8]") ",\"c\":" T("F32", "[0]", "[4,4]") "}", 8, "tensors a and c share bytes"},
    {"{\"a\":" T("F32", "[2]", "[0,8]") ",\"b\":" T("F32", "[2]", "[12,20]") "}", 20, "bytes 8 to 12 of the data belong to no tensor"},
    {"{\"a\":" T("F32", "[2]", "[4,12]") "}", 12, "bytes 0 to 4 of the data belong to no tensor"},
    {"{\"a\":" T("F32", "[2]", "[0,8]") "}", 12, "4 bytes stand behind the last tensor"},
    {"{}", 4, "4 bytes stand behind the last tensor"},
    {"{\"a\":" T("F32", "[2]", "[0,8]") "}", 4, "truncated"},
    {"{\"a\":" T("F32", "[2]", "[8,0]") "}", 8, "bad data_offsets"},
    {"{\"a\":" T("F32", "[2]", "[0,8,8]") "}", 8, "bad data_offsets"},
    {"{\"a\":" T("F32", "[2]", "[0,8.0]") "}", 8, "bad data_offsets"},
    {"{\"a\":" T("F32", "[2e0]", "[0,8]") "}", 8, "bad shape"},
    {"{\"a\":" T("F32", "[-2]", "[0,8]") "}", 8, "bad shape"},
    {"{\"a\":" T("F32", "[4611686018427387904,4]", "[0,0]") "}", 0, "bad shape"},
    {"{\"a\":" T("F32", "[4611686018427387904,4611686018427387904,0]", "[0,0]") "}", 0, "bad shape"},
    {"{\"a\":" T("F32", "[3]", "[0,8]") "}", 8, "takes 12 bytes by its shape, data_offsets give 8"},
    {"{\"a\":" T("Q4", "[2]", "[0,8]") "}", 8, "has as dtype Q4"},
    {"{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,8]}}", 8, "bad shape"},
    {"{\"a\":" T("F32", "[2]", "[0,8]") ",\"a\":" T("F32", "[2]", "[8,16]") "}", 16, "duplicate object key near '\"a\"'"},
    {"{\"a\":" T("F32", "[2]", "[0,8]") ",\"\\u0061\":" T("F32", "[2]", "[0,8]") "}", 8, "duplicate object key"},
    {"{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "duplicate object key near '\"dtype\"'"},
    {"{\"__metadata__\":{},\"__metadata__\":{},\"a\":" T("F32", "[2]", "[0,8]") "}", 8, "duplicate object key near '\"__metadata__\"'"},
    {"{\"__metadata__\":{\"steps\":3},\"a\":" T("F32", "[2]", "[0,8]") "}", 8, "__metadata__ is not an object of texts"},
    {"{\"a\":{\"more\":NaN,\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "not valid JSON"},
    {"{\"a\\ud800\":" T("F32", "[2]", "[0,8]") "}", 8, "invalid Unicode"},
    {"{\"a\x1b\":" T("F32", "[2]", "[0,8]") "}", 8, "control character 0x1b"},
    {"{\"a\xff\":" T("F32", "[2]", "[0,8]") "}", 8, "not UTF-8"},
    {"{\"a\\u001b[31m\\u009b\\n\":" T("F32", "[3]", "[0,8]") "}", 8, "tensor a\\x1b[31m\\xc2\\x9b\\x0a takes"},
    {"{\"a\":" T("F32", "[-0]", "[0,0]") "}", 0, "-0 is no size"},
    {"{\"a-0\":" T("F32", "[2]", "[0,8]") "}", 8, NULL},
    {"{\"a\":{\"more\":" DEEP("[", "[", "]", "]") ",\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "nested deeper than 127"},
    {"{\"a\":{\"more\":" DEEP("[", "", "", "]") ",\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, NULL},
    {"{\"a\":" T("F32", "[18446744073709551616]", "[0,8]") "}", 8, "too big integer"},
    {"[]", 0, "expected a JSON object"},
    {"", 0, "'[' or '{' expected near end of file"},
};

static void only_open(const char *dir)
{
    checkpoint c = checkpoint_open(dir, "model");
    checkpoint_close(&c);
}

static void test_safetensors(void)
{
    char *dir = in_scratch("header"), *path = in_scratch("header/model.safetensors");
    mkdir(dir, 0777);
    for (size_t i = 0; i < sizeof safetensors_files / sizeof *safetensors_files; i++) {
        const char *header = safetensors_files[i].header, *says = safetensors_files[i].says;
        char file[800] = {(char)strlen(header), (char)(strlen(header) >> 8)};
        memcpy(file + 8, header, strlen(header));
        write_bytes(path, file, 8 + strlen(header) + (size_t)safetensors_files[i].data);
        char *said = said_by(only_open, dir);
        check(says ? !strstr(said, says) : *said, 0, "%s: «%s», expected «%s»", header, said, says ? says : "");
        free(said);
    }
    free(dir), free(path);
}

static void test_answers(void)
{
    static const struct { const char *given, *right; int same; } cases[] = {
        {"So 40 + 2 = <<40+2=42>>42.\n#### 42", "#### 42", 1},
        {"#### 42\n\n### Instruction:\nAnother.\n#### 7", "#### 42", 1},          // the model talks on
        {"#### 42 apples are left. That is #### 43", "#### 42", 1},
        {"####42", "#### 42", 1}, {"#### $1,234.50.", "#### 1234.5", 1}, {"#### -3", "#### -3", 1},
        {"#### 3", "#### -3", 0}, {"#### 420", "#### 42", 0}, {"#### 4 2", "#### 42", 0}, {"42", "#### 42", 0}, {"####", "#### 42", 0}, {"", "#### 0", 0},
        {"… 18.\n#### 18\nThe answer is: 18", "It is 9 * 2.\n#### 18\nThe answer is: 18", 1},   // MetaMathQA has both
        {"The answer is: 18. I am sure.", "#### 18\nThe answer is: 18", 1},
        {"The answer is: 42", "The answer is: 42", 1}, {"The answer is: 42.0", "The answer is: 42", 1}, {"The answer is: 42/7", "The answer is: 42", 0},
        {"The answer is: \\frac{1}{2}\nNext", "The answer is: $\\frac{1}{2}$.", 1}, {"The answer is: 3/4", "The answer is: 3/5", 0},
        {"The answer is: 2x", "The answer is: 2", 0}, {"The answer is: 2x+1", "The answer is: 2x+1", 1}, {"Paris", " Paris.", 1}, {"Paris, I think", "Paris", 0},
        {"#### 12345678901234567890", "#### 12345678901234567891", 0}, {"#### 12345678901234567890.0", "#### 12,345,678,901,234,567,890", 1},
        {"#### 0.1000000000000000000001", "#### 0.1", 0}, {"#### 0042.500", "#### 42.5", 1}, {"#### -0", "#### 0", 1}, {"#### +5", "#### 5", 1}, {"#### .5", "#### 0.50", 1},
        {"#### 0", "#### 00.00", 1}, {"#### 100", "#### 1", 0}, {"#### 1,00", "#### 100", 0}, {"#### 1,000", "#### 1000", 1}, {"#### 0,001", "#### 1", 0}, {"#### 1,0000", "#### 10000", 0},
        {"#### 1,2", "#### 12", 0}, {"#### 1,2", "#### 1,2", 1}, {"#### 18.5.3", "#### 18.5", 0}, {"#### 18.5", "#### 18.5.3", 0}, {"#### 18.5.", "#### 18.5", 1},
        {"#### 42, I think", "#### 42", 1}, {"#### 42.apples", "#### 42", 0}, {"#### 2023-05-01", "#### 2023", 0}, {"#### 10:30", "#### 10", 0}, {"#### 40+2=42", "#### 40", 0},
        {"1. First of all, no.", "1", 0}, {"2023-05-01", "2023", 0}, {"42 apples", "42", 0}, {"42.0", "42", 1}, {"1,234", "1234", 1}, {"12", "1,2", 0}, {"18.5", "18.5.3", 0}, {"1\nNo.", "1", 0},
        {"", "", 0}, {"####", "####", 0}, {" ", ".", 0}, {"The answer is:", "The answer is: ", 0}, {"0", "", 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check(same_answer(cases[i].given, cases[i].right) == cases[i].same ? 0 : 1, 0, "«%s» for «%s»", cases[i].given, cases[i].right);
}

// ---- generation ----------------------------------------------------------------------------------------------------

// How often each of four tokens comes against softmax(logits/temperature), cut at top-p.
static void test_sampling(void)
{
    static const wide logits[4] = {1, 3, 0, 2};
    static const struct { double temperature, top_p, p[4]; } cases[] = {
        {0,   1,    {0, 1, 0, 0}},
        {1,   1,    {0.08714432, 0.64391426, 0.03205860, 0.23688282}},
        {2,   1,    {0.16742923, 0.45511791, 0.10155054, 0.27604231}},
        {1,   0.64, {0, 1, 0, 0}},                                                  // the likeliest reaches it alone
        {1,   0.7,  {0, 0.73105858, 0, 0.26894142}},                                // the second is needed
    };
    enum { DRAWS = 40000 };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        rng g = rng_named(1, "sampling");
        int count[4] = {0};
        opt.temperature = cases[i].temperature, opt.top_p = cases[i].top_p;
        for (int n = 0; n < DRAWS; n++) count[pick(logits, 4, &g)]++;
        for (int k = 0; k < 4; k++)
            check(fabs((double)count[k] / DRAWS - cases[i].p[k]), 4.5 * sqrt(cases[i].p[k] * (1 - cases[i].p[k]) / DRAWS), "temperature %g, top-p %g, token %d", opt.temperature, opt.top_p, k);
    }
}

// A sequence ends at any eos_token_id of config.json and generation_config.json, be it a number or a list.
static void test_stops(void)
{
    char *dir = small_model(0), *copy_of = in_scratch("stops"), command[400];
    opt.model = dir;
    config without = open_config();
    snprintf(command, sizeof command, "rm -rf %s; cp -r %s %s; sed -i '0,/{/s//{\"eos_token_id\": 5,/' %s/config.json; "
        "echo '{\"eos_token_id\": [7, 11]}' > %s/generation_config.json", copy_of, dir, copy_of, copy_of, copy_of);
    check(system(command), 0, "cannot prepare");
    opt.model = copy_of;
    model m = {.c = open_config()};
    tokenizer *t = plain_tokenizer("base");
    for (int id = 0; id < 13; id++)
        check(ends_answer(&m, t, id) != (id == 2 || id == 5 || id == 7 || id == 11), 0, "token %d", id);
    check(without.stops, 0, "stops without a field");
    free(without.text), free(m.c.text), free(dir), free(copy_of), tokenizer_free(t);
}

// config.json's rope_theta counts wherever transformers reads it, and initializer_range is σ of --init.
static void test_config(void)
{
    static const struct { const char *field; double theta, range; } cases[] = {
        {"\"rope_theta\": 500", 500, 0.02}, {"\"rope_scaling\": {\"rope_type\": \"default\", \"rope_theta\": 600}", 600, 0.02},
        {"\"rope_parameters\": {\"rope_type\": \"default\", \"rope_theta\": 700}, \"rope_theta\": 500", 700, 0.02},
        {"\"rope_scaling\": null, \"initializer_range\": 0.5", 10000, 0.5},
    };
    char *path = in_scratch("fields.json"), text[600];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        snprintf(text, sizeof text, "{%s, ", cases[i].field);
        snprintf(text + strlen(text), sizeof text - strlen(text), small_config + 1, "false");
        write_text(path, text);
        config c = config_read(path);
        check(fabs(c.theta - cases[i].theta) + fabs(c.init_range - cases[i].range), 0, "%s", cases[i].field);
        model m = {0};
        plan p = plan_from_options();
        p.method = &methods[0];
        model_measure(&m, c, p);
        model_allocate(&m);
        random_weights(&m);
        double n = (double)elements(m.embed), sigma = sqrt(sum_of_squares(m.embed) / n);
        check(fabs(sigma / cases[i].range - 1), 4 / sqrt(2 * n), "%s: σ of the embedding is %g", cases[i].field, sigma);
        model_free(&m);
    }
    free(path);
}

// Sequences of different length answered together say what each says alone.
static void test_together(void)
{
    enum { N = 3, ROOM = 14 };
    static const int starts[N][4] = {{1, 5, 3, 12}, {1, 9}, {1, 7, 7}}, lengths[N] = {4, 2, 3};
    int together[N][ROOM], alone[N][ROOM], who[N], lengths_alone[N];
    tokenizer *t = open_tokenizer("base", 0);
    plan p = base_only();
    p.cache_rows = N * ROOM;
    model *m = open_small(p, 1);
    batch b = batch_new(32, N);
    sequence s[N];
    rng g = {0};
    for (int i = 0; i < N; i++) {
        memcpy(alone[i], starts[i], sizeof starts[i]), memcpy(together[i], starts[i], sizeof starts[i]);
        sequence one = {.ids = alone[i], .n = lengths[i], .room = ROOM};
        while (generate_pass(m, t, &one, 1, &b, who, &g)) {}
        s[i] = (sequence){.ids = together[i], .n = lengths[i], .room = ROOM};
        lengths_alone[i] = one.n;
    }
    m->chunk = 2;                       // the third one's logits come after those of the other two
    while (generate_pass(m, t, s, N, &b, who, &g)) {}
    for (int i = 0; i < N; i++)
        check(s[i].n == lengths_alone[i] && !memcmp(together[i], alone[i], (size_t)s[i].n * sizeof(int)) ? 0 : 1, 0, "sequence %d of %d tokens", i, s[i].n);
    batch_free(&b), close_small(m), tokenizer_free(t);
}

// ---- the program, from outside ---------------------------------------------------------------------------------------

// Runs ./train (or another build of it, $TRAIN) with these arguments, its output in scratch/stdout and scratch/stderr; returns the exit status.
__attribute__((format(printf, 1, 2)))
static int train_run(const char *format, ...)
{
    char args[3000], command[4000];
    va_list list;
    va_start(list, format);
    vsnprintf(args, sizeof args, format, list);
    va_end(list);
    snprintf(command, sizeof command, "$TRAIN %s >%s/stdout 2>%s/stderr </dev/null", args, scratch, scratch);
    int status = system(command);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
}

static char *output_of(const char *name)
{
    size_t bytes;
    char *path = in_scratch(name), *text = read_file(path, &bytes);
    free(path);
    return text;
}

static int same_files(const char *a, const char *b)
{
    char *pa = in_scratch(a), *pb = in_scratch(b);
    size_t na, nb;
    char *x = read_file(pa, &na), *y = read_file(pb, &nb);
    int same = na == nb && na > 0 && !memcmp(x, y, na);
    free(pa), free(pb), free(x), free(y);
    return same;
}

// Two logs are the same but for the speed.
static int same_logs(const char *a, const char *b)
{
    char *logs[2] = {output_of(a), output_of(b)};
    for (int i = 0; i < 2; i++)
        for (char *at = logs[i]; (at = strstr(at, "\"tok_per_s\":"));) for (at += 12; *at && *at != '}'; at++) *at = '0' + (*at == '}');
    char *x = logs[0], *y = logs[1];
    int same = *x != 0;
    while (*x && *y && same) {                                           // runs of zeros, the speeds, count as one
        same = *x == *y;
        if (*x == '0') { while (*x == '0') x++; while (*y == '0') y++; }
        else x++, y++;
    }
    same = same && !*x && !*y;
    free(logs[0]), free(logs[1]);
    return same;
}

static void no_progress(int done, int of) { (void)done, (void)of; }

// The bundled model answers these rows; returns what it says to the first one.
static char *first_answer(const char *rows, scores *got)
{
    char *path = in_scratch("scored.jsonl"), *sample = NULL;
    write_text(path, rows);
    tokenizer *t = open_tokenizer("base", 0);
    dataset none = {0}, d = read_rows(t, path, opt.seq);
    model m = {0};
    plan p = plan_for_use();
    plan_sizes(&p, open_config(), &none, &d, (int)arrlen(d.rows));
    model_measure(&m, open_config(), p);
    fill_model(&m, NULL, 0);
    *got = exact_match(&m, t, &d, (int)arrlen(d.rows), &sample, no_progress);
    model_free(&m), tokenizer_free(t), free_rows(&d), free(path);
    return sample;
}

// An answer may have --max-new tokens, however long the right one and the other rows are.
static void test_room(void)
{
    static const char first[] = "{\"question\": \"How many?\", \"answer\": \"8\"}\n";
    static const char *const others[] = {"",
        "{\"question\": \"How many?\", \"answer\": \"Now Emma had 17 cups. Now Emma had 19 cups. Now Emma had 19 cups. Now Emma had 21 cups. #### 21\"}\n",
        "{\"question\": \"Emma took 11 cups to the yard. Mom gave Emma 6 more cups. In the forest she found 2 cups. How many cups are there now?\", \"answer\": \"8\"}\n"};
    for (int max_new = 9; max_new < 100; max_new += 60) {
        check(train_run("--generate 'How many?' --chat --max-new %d", max_new), 0, "exit status");
        char *alone = output_of("stdout"), rows[1000];
        *strchr(alone, '\n') = 0;
        for (int i = 0; i < 3; i++) {
            scores got;
            opt.max_new = max_new;
            snprintf(rows, sizeof rows, "%s%s", first, others[i]);
            char *text = first_answer(rows, &got);
            check(strcmp(text + strspn(text, " "), alone + strspn(alone, " ")), 0, "beside row %d, --max-new %d: «%s», alone «%s»", i, max_new, text, alone);
            check(max_new == 9 && got.cut != 1 + (i > 0), 0, "beside row %d: %d cut off", i, got.cut);
            free(text);
        }
        free(alone);
    }
    check(system("$TRAIN --eval --exact-match --max-new 3 --val $D/few.jsonl >$D/stdout 2>$D/stderr"), 0, "exit status");
    char *text = output_of("stdout");
    check(!strstr(text, "exact match 0 of 8, 0.0 %, 8 cut off at --max-new 3\n"), 0, "says «%s»", text);
    free(text);
}

// Reads a tensor of a file that is cut short after it was mapped.
static void read_cut(const char *dir)
{
    char *path = join(dir, "model.safetensors");
    catch_cut_files();
    checkpoint c = checkpoint_open(dir, "model");
    if (truncate(path, 8192)) _exit(9);
    for (int i = 0; i < shlen(c.tensors); i++) free(host(c.tensors[i].value.at));
}

// A run whose model is cut short, or written over, in mid-flight. It does not go on even where no page is lost.
static void test_cut_file(void)
{
    static const char *const harms[] = {"truncate -s 100000 ", "truncate -s -4 ",
                                        "dd conv=notrunc bs=1 seek=200000 if=/dev/zero count=1 2>/dev/null of="};
    char command[1000];
    check(system("rm -rf $D/model; cp -r base $D/model && chmod -R u+w $D/model"), 0, "cannot prepare");
    char *dir = in_scratch("model"), *said = said_by(read_cut, dir);
    check(!strstr(said, "model.safetensors: was cut short or changed"), 0, "in one process: «%s»", said);
    for (int i = 0; i < 3; i++) {
        snprintf(command, sizeof command,
            "rm -rf $D/model $D/cut.log; cp -r base $D/model && chmod -R u+w $D/model; "
            "$TRAIN --model $D/model --data data/train.jsonl --batch 4 --seq 128 --steps 3000 --log $D/cut.log "
            "--out $D/cut >$D/stdout 2>$D/stderr & p=$!; "
            "while kill -0 $p && ! grep -q '\"step\":3,\"loss' $D/cut.log 2>/dev/null; do sleep 0.01; done; "
            "%s$D/model/model.safetensors; wait $p", harms[i]);
        int status = WEXITSTATUS(system(command));
        char *text = output_of("stderr"), *end = strchr(text, '\n');
        check(status == 1 ? 0 : 1, 0, "%s: status %d", harms[i], status);
        int one_line = !strncmp(text, "error: ", 7) && end && !end[1];
        check(!one_line || !strstr(text, "safetensors: was cut short or changed"), 0, "%s: «%s»", harms[i], text);
        check(system("! ls -d $D/cut $D/*.tmp* 2>/dev/null | grep -q ."), 0, "%s: something is left", harms[i]);
        free(text);
    }
    free(dir), free(said);
}

// A row that holds escape sequences, asked while training, and generated on a terminal.
static void test_escapes(void)
{
    char command[1000], shown[4000];
    size_t bytes = 0;
    char *path = in_scratch("rows.jsonl");
    write_text(path, "{\"question\": \"\\u001b[31mred\\u009b\", \"answer\": \"1\"}\n");
    check(train_run("--data $D/rows.jsonl --val $D/rows.jsonl --steps 1 --max-new 2 --out $D/escapes"), 0, "status");
    char *text = output_of("stdout");
    check(strchr(text, 27) || !strstr(text, "asked:    \\x1b[31mred\\xc2\\x9b") ? 1 : 0, 0, "«%s»", text);
    int terminal = posix_openpt(O_RDWR | O_NOCTTY);
    int opened = terminal >= 0 && !grantpt(terminal) && !unlockpt(terminal);
    if (!opened) { snprintf(skipped, sizeof skipped, "no terminals here"); return; }
    snprintf(command, sizeof command, "$TRAIN --generate \"$(printf 'a\\033[31m\\n\\tb')\" --max-new 2 >%s",
        ptsname(terminal));
    check(system(command), 0, "exit status on a terminal");
    for (ssize_t n = 1; n > 0 && bytes < sizeof shown - 1; bytes += n > 0 ? (size_t)n : 0)
        n = read(terminal, shown + bytes, sizeof shown - 1 - bytes);
    shown[bytes] = 0;
    check(strstr(shown, "\033[31m") || !strstr(shown, "a\\x1b[31m\r\n"), 0, "on a terminal «%s»", shown);
    close(terminal);
    free(text), free(path);
}

#define FEW_ROWS "--data data/train.jsonl --val $D/few.jsonl --batch 4 --seq 128 --max-new 4"       /* the first of data/val.jsonl: evaluating takes the time */
#define SHORT_RUN FEW_ROWS " --steps 6 --accum 2 --warmup 2"

static void test_threads_same_bytes(void)
{
    for (int t = 1; t <= 4; t *= 2)
        check(train_run(SHORT_RUN " --threads %d --log %s/log%d --out %s/threads%d", t, scratch, t, scratch, t), 0, "exit status with %d threads", t);
    check(!same_files("threads1/adapter_model.safetensors", "threads2/adapter_model.safetensors"), 0, "adapter of 1 and 2 threads");
    check(!same_files("threads1/adapter_model.safetensors", "threads4/adapter_model.safetensors"), 0, "adapter of 1 and 4 threads");
    check(!same_logs("log1", "log2") + !same_logs("log1", "log4"), 0, "log");
}

// Starts a run, sends it a signal once its log has the given step, and returns its exit status.
__attribute__((format(printf, 3, 4)))
static int stopped_run(const char *signal_name, int step, const char *format, ...)
{
    char args[1000], command[2000];
    va_list list;
    va_start(list, format);
    vsnprintf(args, sizeof args, format, list);
    va_end(list);
    snprintf(command, sizeof command, "rm -rf $D/part* ; $TRAIN %s --log $D/part.log --out $D/part >$D/stdout 2>&1 & p=$!; "
        "while kill -0 $p && ! grep -q '\"step\":%d,\"loss' $D/part.log 2>/dev/null; do sleep 0.01; done; kill -%s $p; wait $p", args, step, signal_name);
    return WEXITSTATUS(system(command));
}

// A run that ends after some step and is resumed leaves the bytes of one that did not end.
static void compare_runs(const char *method_name, const char *file, const char *what)
{
    char a[64], b[64];
    snprintf(a, sizeof a, "whole/%s", file), snprintf(b, sizeof b, "part/%s", file);
    check(!same_files(a, b), 0, "%s, bytes after %s", method_name, what);
    check(!same_files("whole/state.safetensors", "part/state.safetensors"), 0, "%s, state after %s", method_name, what);
    check(!same_logs("whole.log", "part.log"), 0, "%s, log after %s", method_name, what);
}

// Whichever step a signal finds it in, a run ends after it; under a rate that falls, and one that stays.
static void test_resume(void)
{
    static const struct { const char *method, *schedule, *file; } runs[] = {
        {"bone", "linear", "adapter_model.safetensors"}, {"pissa", "cosine", "adapter_model.safetensors"}, {"full", "constant", "model.safetensors"},
    };
    for (int i = 0; i < 3; i++)
        for (int stop = 0; stop < 4; stop++) {
            char options_used[300], what[32];
            snprintf(options_used, sizeof options_used, FEW_ROWS " --steps 8 --batch 2 --accum 2 --warmup 2 --rank 8 --method %s --schedule %s", runs[i].method, runs[i].schedule);
            if (!stop) { check(train_run("%s --log $D/whole.log --out $D/whole", options_used), 0, "%s, exit status", runs[i].method); continue; }
            snprintf(what, sizeof what, "stopping near step %d", stop);
            check(stopped_run("INT", stop, "%s", options_used) == 130 ? 0 : 1, 0, "%s, %s", runs[i].method, what);
            check(train_run("%s --resume $D/part --log $D/part.log --out $D/part", options_used), 0, "%s resumed after %s", runs[i].method, what);
            compare_runs(runs[i].method, runs[i].file, what);
        }
}

// Whatever a signal does to a run in mid-flight, the next one goes on from the last step saved.
static void test_killed(void)
{
    static const char *const options_used = FEW_ROWS " --steps 60 --save-every 1";
    check(train_run("%s --log %s/whole.log --out %s/whole", options_used, scratch, scratch), 0, "exit status");
    for (const char **signal_name = (const char *[]){"INT", "KILL", NULL}; *signal_name; signal_name++) {
        int status = stopped_run(*signal_name, 3, "%s", options_used);
        check(status == (strcmp(*signal_name, "INT") ? 137 : 130) ? 0 : 1, 0, "status %d after SIG%s", status, *signal_name);
        check(train_run("%s --log %s/part.log --resume %s/part --out %s/part", options_used, scratch, scratch, scratch), 0, "resumed after SIG%s", *signal_name);
        compare_runs("bone", "adapter_model.safetensors", *signal_name);
        check(system("rm -rf $D/part*"), 0, "cannot tidy up");           // SIGKILL leaves the directory in the making
    }
}

// Threads follow the quota of the control group, of either version, and of those above it.
static void test_quota(void)
{
    static const struct { const char *cgroup, *file, *content; double cpus; } cases[] = {
        {"0::/", "cpu.max", "150000 100000", 2}, {"0::/", "cpu.max", "max 100000", 1e9}, {"0::/a/b", "a/cpu.max", "50000 100000", 1},
        {"0::/a/b", "a/b/cpu.max", "100000 100000", 1}, {"0::/not/seen/here", "cpu.max", "100000 100000", 1},
        {"5:memory:/m\n4:cpu,cpuacct:/c", "cpu/c/cpu.cfs_quota_us", "100000", 1}, {"4:cpu,cpuacct:/", "cpu/cpu.cfs_quota_us", "-1", 1e9},
        {"1:name=x:/", "none", "", 1e9},
    };
    char command[1000], *root = in_scratch("root");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        snprintf(command, sizeof command, "rm -rf %s; mkdir -p %s/proc/self %s/sys/fs/cgroup/cpu/c %s/sys/fs/cgroup/a/b; cd %s; printf '%s\n' > proc/self/cgroup;"
            " cd sys/fs/cgroup; echo 100000 | tee cpu/cpu.cfs_period_us > cpu/c/cpu.cfs_period_us; echo %s > %s", root, root, root, root, root, cases[i].cgroup, cases[i].content, cases[i].file);
        check(system(command), 0, "cannot prepare");
        int want = cases[i].cpus < omp_get_num_procs() ? (int)cases[i].cpus : omp_get_num_procs();
        check(usable_cpus(root) != want, 0, "%s, %s: %s gives %d threads", cases[i].cgroup, cases[i].file, cases[i].content, usable_cpus(root));
    }
    free(root);
}

// Two default steps beside other work that takes every CPU twice: a few times as slow as one thread, not ten or forty times.
static void test_busy(void)
{
    static const char *const two_steps = "$TRAIN --steps 2 --val $D/few.jsonl --max-new 2 --out $D/busy >/dev/null";
    double took[2];
    char command[600];
    for (int all = 0; all < 2; all++) {
        snprintf(command, sizeof command, "p=; for i in $(seq $((2 * $(nproc)))); do while :; do :; done & p=\"$p $!\"; done; %s %s; s=$?; kill $p; exit $s",
            all ? "" : "OMP_NUM_THREADS=1", two_steps);
        double start = seconds();
        check(system(command), 0, "exit status");
        took[all] = seconds() - start;
    }
    check(took[1] / took[0], 3, "time of all threads (%.1f s) over that of one (%.1f s)", took[1], took[0]);
}

// --compare: a cell is an ordinary run, every method has its row, what is done is not done again, a stop loses one cell at most.
static void test_compare(void)
{
    static const char *const options_used = "--batch=2 --max_new_tokens 2 --data $D/rows.jsonl --val=$D/rows.jsonl";
    char command[1000], line[64];
    check(system("rm -rf $D/compare; head -4 data/val.jsonl > $D/rows.jsonl"), 0, "cannot prepare");
    snprintf(command, sizeof command, "$TRAIN --compare --quick --steps 2 %s --out $D/compare >$D/stdout 2>&1 & p=$!; "
        "while kill -0 $p && ! grep -q '3 of ' $D/stdout 2>/dev/null; do sleep 0.01; done; kill -INT $p; wait $p", options_used);
    check(WEXITSTATUS(system(command)) == 130 ? 0 : 1, 0, "status when stopped");
    for (int again = 0; again < 2; again++) {
        snprintf(command, sizeof command, "%s $TRAIN --compare --quick --steps 2 %s --out $D/compare >$D/stdout 2>$D/stderr", again ? "PATH=/none" : "", options_used);
        check(system(command), 0, "exit status, run %d", again);
        int done = 0, all = 0;
        char *text = output_of("stdout"), *first = strstr(text, " runs of up to");
        while (first && first > text && first[-1] != '\n') first--;
        sscanf(first ? first : "", "%d runs", &all);
        for (const char *at = text; (at = strstr(at, "(done before)")); at++) done++;
        check(again ? done != all || done < 20 : done < 2 || done >= all, 0, "run %d found %d of %d done", again, done, all);
        check(again && !strstr(text, "gnuplot is not here"), 0, "says that there is no gnuplot");
        free(text);
    }
    char *table = output_of("compare/table.md");
    for (int i = 0; i < METHODS; i++) snprintf(line, sizeof line, "\n| %s |", methods[i].name), check(!strstr(table, line), 0, "%s has a row", methods[i].name);
    check(strstr(table, "–") || strstr(table, "nan"), 0, "every result is there: %s", table);
    check(train_run("--method bone --lr 0.004 --steps 2 %s --log $D/alone.log --out $D/alone", options_used), 0, "a run alone");
    check(!same_logs("alone.log", "compare/runs/bone-rank32-lr0.004-seed1-steps2.log"), 0, "bone's log");
    free(table);
}

// What --compare would have written of a method that compare.gp has never heard of.
static const char plotted_cells[] =
    "part,method,rank,trains,seed,lr,steps,grad_norm,loss,eval_loss,exact_match,tok_per_s,peak_mb,hits\n"
    "main,full,32,9000,1,0.004,11,8,1,1.5,%d,900,90,%d\n"
    "main,newcomer,32,4000,1,0.004,11,7,2,2.5,%d,800,80,%d\n"
    "norms,newcomer,1,2000,1,0.004,1,6,3,nan,nan,700,70,0\n"
    "norms,newcomer,2,4000,1,0.004,1,7,2,nan,nan,700,70,0\n"
    "ranks,newcomer,1,2000,1,0.004,11,6,3,3.5,1,700,70,2\n"
    "ranks,newcomer,2,4000,1,0.004,11,7,2,2.5,1,700,70,2\n";

// Draws them with so many right answers of 200, and reads a plot.
static char *plot_of(int hits, const char *name)
{
    char path[PATH_MAX], plot[64];
    snprintf(path, sizeof path, "%s/plots/cells.csv", scratch);
    FILE *f = fopen(path, "w");
    check(!f, 0, "cannot write %s", path);
    fprintf(f, plotted_cells, hits / 2, hits, hits / 2, hits);
    fclose(f);
    check(system("gnuplot -c paper/compare.gp $D/plots 'what was_run' 2>$D/stderr"), 0, "gnuplot's status");
    snprintf(plot, sizeof plot, "plots/%s.svg", name);
    return output_of(plot);
}

// The plots of --compare: methods from the data, the run in the title, answers only where they say something,
// and the mean of a window in its middle: steps 1 to 4 at 2.5, and 9 to 11 at 10.
static void test_plots(void)
{
    static const char *const names[] = {"loss", "gradient", "match", "cost"};
    if (system("gnuplot --version >$D/stdout 2>&1")) {
        snprintf(skipped, sizeof skipped, "gnuplot is not here");
        return;
    }
    check(system("mkdir -p $D/plots; { echo part,method,rank,trains,seed,lr,steps,step,loss,grad_norm,tok_per_s;"
        " for m in full newcomer; do for s in $(seq 11); do"
        " echo main,$m,32,9000,1,0.004,11,$s,$((30 - s)),1,900; done; done; } > $D/plots/steps.csv"),
        0, "cannot prepare");
    for (int i = 0; i < 4; i++) {
        char *plot = plot_of(60, names[i]);
        check(!strstr(plot, ">newcomer"), 0, "%s.svg names a new method", names[i]);
        check(!strstr(plot, "what was_run"), 0, "%s.svg says what was run", names[i]);
        free(plot);
    }
    for (int hits = 3; hits <= 30; hits *= 10) {
        char *plot = plot_of(hits, "match");
        check(!strstr(plot, "exact match") != (hits < 10), 0, "match.svg, %d of 200 right", hits);
        free(plot);
    }
    check(system("gnuplot -e \"width = 4; last = 11;"
        " $(grep -E '^(window|first_of|min)\\(' paper/compare.gp | tr '\\n' ';')"
        " print window(1), window(4), window(5), window(11)\" 2>&1 | grep -qx '2.5 2.5 6.5 10.0'"), 0, "middles of windows");
}

// ---- wrong input ---------------------------------------------------------------------------------------------------

#define POINTER "printf 'version https://git-lfs.github.com/spec/v1\\noid sha256:0123\\nsize 13476835328\\n'"

// Each makes one thing wrong in a copy of base/ (in $D/model) or of the rows ($D/rows.jsonl), runs $ARGS, and wants a
// non-zero status, one line that begins with "error:" and holds the text, and no $D/out.
static const struct { const char *what, *prepare, *args, *says; } wrong[] = {
    {"no model",            "rm -r $D/model",                                                   "", "model: there is no such directory"},
    {"no safetensors",      "rm $D/model/model.safetensors",                                    "", "no model.safetensors"},
    {"truncated",           "truncate -s -100 $D/model/model.safetensors",                      "", "truncated"},
    {"truncated header",    "truncate -s 900 $D/model/model.safetensors",                       "", "truncated"},
    {"empty safetensors",   ": > $D/model/model.safetensors",                                   "", "no safetensors file"},
    {"not safetensors",     "cp Makefile $D/model/model.safetensors",                           "", "not safetensors"},
    {"a wrong shape",       "sed -i 's/\"num_key_value_heads\":[^,]*/\"num_key_value_heads\":8/' $D/model/config.json", "", "asks for ["},
    {"an unknown dtype",    "sed -i '0,/\"F32\"/s//\"I32\"/' $D/model/model.safetensors",       "", "is I32, expected"},
    {"a tensor renamed",    "sed -i '0,/model.norm/s//model.nrom/' $D/model/model.safetensors", "", "model.norm.weight [128] is missing"},
    {"a tensor twice",      "sed -i '0,/layers.1.self_attn.q/s//layers.0.self_attn.q/' $D/model/model.safetensors", "", "duplicate object key"},
    {"config lacks a field", "sed -i '/hidden_size/d' $D/model/config.json",                     "", "\"hidden_size\" is missing"},
    {"config is not JSON",  "echo '{' > $D/model/config.json",                                  "", "not valid JSON"},
    {"another model",       "sed -i 's/\"llama\"/\"mistral\"/' $D/model/config.json",           "", "only \"llama\""},
    {"scaled RoPE",         "sed -i 's/^{/{\"rope_scaling\": {\"rope_type\": \"llama3\"},/' $D/model/config.json", "", "llama3"},
    {"no tokenizer",        "rm $D/model/tokenizer.model",                                      "", "tokenizer.model"},
    {"another tokenizer",   "echo '{\"version\": \"1.0\"}' > $D/model/tokenizer.model",         "", "tokenizer.model"},
    {"truncated tokenizer", "truncate -s 3000 $D/model/tokenizer.model",                        "", "tokenizer.model"},
    {"a shard not there",   "rm $D/model/model.safetensors; echo '{\"weight_map\":{\"model.norm.weight\":\"a.safetensors\"}}' > $D/model/model.safetensors.index.json", "", "a.safetensors"},
    {"no rows file",        "rm $D/rows.jsonl",                                                 "", "rows.jsonl"},
    {"an empty file",       ": > $D/rows.jsonl",                                                "", "rows.jsonl: is empty"},
    {"a broken row",        "echo '{\"question\": \"a' >> $D/rows.jsonl",                       "", "rows.jsonl:4: not valid JSON, at byte 16 of the line: premature end of input"},
    {"a row of 3000 levels", "for i in $(seq 3000); do printf '['; done >> $D/rows.jsonl",       "", "maximum parsing depth reached"},
    {"a list as a row",     "echo '3' >> $D/rows.jsonl",                                        "", "rows.jsonl:4: expected a JSON object"},
    {"rows in a pipe",      "rm -f $D/pipe.jsonl; mkfifo $D/pipe.jsonl",                        "--data $D/pipe.jsonl", "pipe.jsonl: is a pipe"},
    {"rows behind a broken link", "ln -sfn $D/none $D/link.jsonl",                              "--data $D/link.jsonl", "link.jsonl: is a link to"},
    {"a folder for rows",   "mkdir -p $D/folder.jsonl",                                         "--data $D/folder.jsonl", "folder.jsonl: is a directory"},
    {"rows left to git-lfs", POINTER " > $D/rows.jsonl",                                         "", "rows.jsonl: is a git-lfs pointer"},
    {"config left to git-lfs", POINTER " > $D/model/config.json",                               "", "config.json: is a git-lfs pointer"},
    {"model left to git-lfs", POINTER " > $D/model/model.safetensors",                          "", "model.safetensors: is a git-lfs pointer"},
    {"tokenizer left to git-lfs", POINTER " > $D/model/tokenizer.model",                        "", "tokenizer.model: is a git-lfs pointer"},
    {"a model in a pipe",   "rm $D/model/model.safetensors; mkfifo $D/model/model.safetensors", "", "model.safetensors: is a pipe"},
    {"a model behind a broken link", "ln -sfn none $D/model/model.safetensors",                 "", "model.safetensors: is a link to none"},
    {"a tokenizer in a pipe", "rm $D/model/tokenizer.model; mkfifo $D/model/tokenizer.model",   "", "tokenizer.model: is a pipe"},
    {"PyTorch's weights",   "mv $D/model/model.safetensors $D/model/pytorch_model-00001-of-00001.bin", "", "pytorch_model-00001-of-00001.bin is in PyTorch's own format"},
    {"llama.cpp's weights", "rm $D/model/*; touch $D/model/llama-q4.gguf",                      "", "llama-q4.gguf is in llama.cpp's format"},
    {"llama.cpp's file",    "touch $D/llama-q4.gguf",                                           "--model $D/llama-q4.gguf", "llama-q4.gguf is in llama.cpp's format"},
    {"Meta's weights",      "rm $D/model/*; touch $D/model/consolidated.00.pth $D/model/params.json", "", "consolidated.00.pth is in Meta's own format"},
    {"a part of a model",   "mv $D/model/model.safetensors $D/model/model-00001-of-00002.safetensors", "", "model.safetensors.index.json, which names the parts"},
    {"a quantised config",  "sed -i 's/^{/{\"quantization_config\": {\"quant_method\": \"gptq\"},/' $D/model/config.json", "", "is quantised (gptq)"},
    {"a name with a colour", "sed -i '0,/l.norm/s//\\\\u001b/; s/\"F32\"/\"I32\"/g' $D/model/model.safetensors", "", "is I32, expected"},
    {"half a row",          "echo '{\"question\": \"a\"}' >> $D/rows.jsonl",                    "", "rows.jsonl:4: has \"question\" but no text in \"answer\""},
    {"no known field",      "echo '{\"prompt\": \"a\"}' >> $D/rows.jsonl",                      "", "rows.jsonl:4: no \"instruction\""},
    {"no answer within seq", ":",                                                               "--seq 16", "within --seq 16"},
    {"text behind a row",   "sed -i '2s/$/ and more/' $D/rows.jsonl",                            "", "rows.jsonl:2: not valid JSON"},
    {"a NUL in a row",      "sed -i '2s/Now/\\\\u0000/' $D/rows.jsonl",                         "", "\\u0000 is not allowed"},
    {"a head that is not tied", "sed 's/\\(tie_word_embeddings.:\\).*true/\\1 false/' base/config.json > $D/untied.json; $TRAIN --init $D/untied.json --method full"
        " --data $D/rows.jsonl --steps 1 --out $D/mine >/dev/null; cp $D/mine/model.safetensors $D/model", "", "lm_head.weight is not model.embed_tokens"},
    {"a token beyond the model", "echo '{\"[PAD]\": 768}' > $D/model/added_tokens.json; echo '{\"text\": \"a [PAD] b\"}' >> $D/rows.jsonl", "", "holds token 768"},
    {"an added token without id", "echo '{\"[PAD]\": null}' > $D/model/added_tokens.json", "",       "without a text or an id"},
    {"an EOS that is no token", "echo '{\"eos_token\": \"<end>\"}' > $D/model/tokenizer_config.json", "", "which is no token of this directory"},
    {"links to nothing",    "ln -sfn $D/none $D/model/generation_config.json",                  "", "generation_config.json: is a link to"},
    {"a link for a tokenizer", "ln -sfn $D/none $D/model/tokenizer.model",                      "", "tokenizer.model: is a link to"},
    {"a page of the hub",   ":",                                                                "--model https://huggingface.co/a/b", "a local directory is wanted"},
    {"a model's file",      ":",                                                                "--model base/config.json", "name the directory that it is in"},
    {"an adapter as model", ":",                                                                "--model dev/golden/lora-mha", "it is an adapter: --adapter"},
    {"a model as adapter",  ":",                                                                "--eval --val data/val.jsonl --adapter base", "it is a model: --model"},
    {"chat with nobody",    ":",                                                                "--chat", "--chat wraps the TEXT of --generate"},
    {"two lengths",         ":",                                                                "--epochs 2", "--steps and --epochs both say"},
    {"a flag for a method", ":",                                                                "--use_dora", "that is --method dora"},
    {"nearly a method",     ":",                                                                "--method pisa", "did you mean pissa?"},
    {"BOS in words",        "echo '{\"add_bos_token\": \"false\"}' > $D/model/tokenizer_config.json", "", "must be true or false"},
    {"UTF-32",              "printf '\\377\\376\\0\\0a\\0\\0\\0' > $D/rows.jsonl",                "", "is UTF-32"},
    {"a base that is NaN",  "dd if=/dev/zero bs=1024 count=1000 2>/dev/null | tr '\\0' '\\377' | dd of=$D/model/model.safetensors bs=1024 seek=100 conv=notrunc 2>/dev/null",
        "", "weight holds NaN or Inf"},
    {"other layers to resume", "$TRAIN --data $D/rows.jsonl --steps 2 --targets q,v --out $D/mine >/dev/null; rm -r $D/model; cp -r base $D/model", "--resume $D/mine --model base --targets q", "--targets \"q,v\", this run has \"q\""},
    {"unknown option",      ":",                                                                "--rnak 4", "unknown option --rnak"},
    {"an option's value",   ":",                                                                "--rank four", "--rank four"},
    {"a missing value",     ":",                                                                "--rank", "--rank needs a value"},
    {"unknown method",      ":",                                                                "--method bonn", "--method bonn"},
    {"unknown schedule",    ":",                                                                "--schedule step", "--schedule step"},
    {"unknown target",      ":",                                                                "--targets q,w", "\"w\""},
    {"rank for bat",        ":",                                                                "--method bat --rank 7", "--rank 7 does not divide"},
    {"rank for bat-row",    ":",                                                                "--method bat-row --rank 7", "--rank 7 does not divide"},
    {"mini-r",              ":",                                                                "--method mini --mini-r 7", "--mini-r 7 does not divide"},
    {"rank for pissa",      ":",                                                                "--method pissa --rank 5000", "--rank 5000 exceeds"},
    {"init of an adapter",  ":",                                                                "--init $D/model/config.json", "--method full"},
    {"use of an init",      ":",                                                                "--eval --val data/val.jsonl --init $D/model/config.json", "--init starts from random"},
    {"two things at once",  ":",                                                                "--eval --list", "give one of them"},
    {"check and eval",      ":",                                                                "--check --eval", "--eval and --check: give one of them"},
    {"two adapters",        ":",                                                                "--eval --val data/val.jsonl --adapter dev/golden/lora-mha --adapter dev/golden/bat", "--adapter is given twice"},
    {"an adapter twice",    ":",                                                                "--adapter=dev/golden/bat --adapter-name-or-path dev/golden/bat", "--adapter is given twice"},
    {"letters swapped",     ":",                                                                "--rnak 4", "did you mean --rank?"},
    {"a letter less",       ":",                                                                "--learning_rat 4", "did you mean --lr?"},
    {"words too many",      ":",                                                                "--warmup_ratio 0.1", "--warmup counts steps"},
    {"one dash",            ":",                                                                "-rank=4", "did you mean --rank?"},
    {"nothing like it",     ":",                                                                "--lora_dropout 0.1", "there is no dropout here"},
    {"a list in two words", ":",                                                                "--target_modules q_proj v_proj", "joined by commas"},
    {"a flag's value",      ":",                                                                "--no-shuffle=0", "--no-shuffle takes no value"},
    {"an option as a value", ":",                                                               "--generate --chat", "--generate needs a value"},
    {"half a value",        ":",                                                                "--rank= --lr 1", "--rank : expected a whole number"},
    {"no epoch",            ":",                                                                "--epochs 0", "--epochs 0: expected a number"},
    {"a model by its name", ":",                                                                "--model meta-llama/Llama-2-7b-hf", "hf download meta-llama/Llama-2-7b-hf --local-dir Llama-2-7b-hf"},
    {"an adapter by its name", ":",                                                             "--eval --val data/val.jsonl --adapter somebody/lora", "hf download somebody/lora"},
    {"a model in no folder", ":",                                                               "--model dev/none", "dev/none: there is no such directory"},
    {"rows without end",    ":",                                                                "--batch 1000000 --accum 1000", "--accum 1000 is too much"},
    {"warm-up without end", ":",                                                                "--warmup 100", "--warmup 100 exceeds"},
    {"eval goes on",        ":",                                                                "--eval --val data/val.jsonl --resume $D/none", "--adapter"},
    {"out is a file",       "touch $D/out.txt",                                                 "--out $D/out.txt", "not a directory"},
    {"out in no folder",    ":",                                                                "--out $D/none/out", "cannot write"},
    {"out holds others' files", "mkdir $D/mine; touch $D/mine/thesis.tex",                      "--out $D/mine", "thesis.tex"},
    {"out is the model",    ":",                                                                "--out $D/model", "is --model itself"},
    {"out holds a model",   "cp -r base $D/mine",                                               "--out $D/mine", "which would be lost"},
    {"out is where we are", ":",                                                                "--out .", "is the current folder"},
    {"out is a broken link", "ln -sfn $D/none $D/link",                                         "--out $D/link", "expected the name of a directory"},
    {"out is nothing",      ":",                                                                "--out ''", "expected the name of a directory"},
    {"merge over a model",  "cp -r base $D/mine",                                               "--merge $D/mine --adapter dev/golden/lora-mha", "which would be lost"},
    {"log not writable",    ":",                                                                "--log $D/none/log", "--log"},
    {"log on a full disk",  ":",                                                                "--log /dev/full", "No space left"},
    {"no adapter",          ":",                                                                "--eval --val data/val.jsonl --adapter $D/none", "there is no such directory"},
    {"merge without adapter", ":",                                                              "--merge $D/out", "needs --adapter"},
    {"an adapter with a NaN", "$TRAIN --data $D/rows.jsonl --steps 1 --out $D/mine >/dev/null; printf '\\377\\377\\377\\377' | dd of=$D/mine/adapter_model.safetensors bs=1 seek=100000 conv=notrunc 2>/dev/null", "--eval --val data/val.jsonl --adapter $D/mine", "holds NaN or Inf"},
    {"a model with a NaN",  "dd if=/dev/zero bs=1024 count=1000 2>/dev/null | tr '\\0' '\\377' | dd of=$D/model/model.safetensors bs=1024 seek=100 conv=notrunc 2>/dev/null", "--eval --val data/val.jsonl", "holds NaN or Inf"},
    {"full from an Inf",    "printf '\\000\\000\\200\\177' | dd of=$D/model/model.safetensors bs=1 seek=$(($(stat -c %s $D/model/model.safetensors) - 4)) conv=notrunc 2>/dev/null", "--method full", "weight holds NaN or Inf"},
    {"another method's adapter", ":",                                                           "--method bat --adapter dev/golden/lora-mha", "--method bat: --adapter"},
    {"a start that is not built", "cp -r dev/golden/lora-mha $D/mine; sed -i 's/\"init_lora_weights\": true/\"init_lora_weights\": \"corda\"/' $D/mine/adapter_config.json", "--eval --val data/val.jsonl --adapter $D/mine", "\"corda\", which changes the base"},
    {"a pattern of ranks",  "cp -r dev/golden/lora-mha $D/mine; sed -i 's/\"rank_pattern\": {}/\"rank_pattern\": {\"q_proj\": 2}/' $D/mine/adapter_config.json", "--eval --val data/val.jsonl --adapter $D/mine", "\"rank_pattern\" is set"},
    {"another model's adapter", ":",                                                            "--eval --val data/val.jsonl --adapter dev/golden/lora-mha", "has shape"},
    {"a look-ahead",        "mkdir $D/mine; echo '{\"peft_type\": \"LORA\", \"r\": 4, \"target_modules\": \"^(?!.*patch_embed).*$\"}' > $D/mine/adapter_config.json", "--eval --val data/val.jsonl --adapter $D/mine", "write a list of names"},
    {"an adapter of the embeddings", "mkdir $D/mine; echo '{\"peft_type\": \"LORA\", \"r\": 4, \"target_modules\": [\"embed_tokens\"]}' > $D/mine/adapter_config.json", "--eval --val data/val.jsonl --adapter $D/mine", "asks for model.embed_tokens, and only"},
    {"an adapter of the head", "mkdir $D/mine; echo '{\"peft_type\": \"LORA\", \"r\": 4, \"target_modules\": [\"q_proj\", \"lm_head\"]}' > $D/mine/adapter_config.json", "--eval --val data/val.jsonl --adapter $D/mine", "asks for lm_head, and only"},
    {"an adapter of everything", "mkdir $D/mine; echo '{\"peft_type\": \"LORA\", \"r\": 4, \"target_modules\": \".*\"}' > $D/mine/adapter_config.json", "--eval --val data/val.jsonl --adapter $D/mine", "asks for lm_head, and only"},
    {"an adapter of nothing", "mkdir $D/mine; echo '{\"peft_type\": \"LORA\", \"r\": 4, \"target_modules\": [\"c_attn\"]}' > $D/mine/adapter_config.json", "--eval --val data/val.jsonl --adapter $D/mine", "name no linear layer of this model"},
    {"an old Bone",         "mkdir $D/mine; echo '{\"peft_type\": \"BONE\", \"r\": 64, \"target_modules\": [\"q_proj\"], \"init_weights\": true}' > $D/mine/adapter_config.json", "--eval --val data/val.jsonl --adapter $D/mine", "convert-bone-to-miss.py"},
    {"an adapter of mlx-lm", "mkdir $D/mine; touch $D/mine/adapters.safetensors; echo '{\"fine_tune_type\": \"lora\", \"num_layers\": 16, \"lora_parameters\": {\"rank\": 8, \"scale\": 20.0, \"dropout\": 0.0}}' > $D/mine/adapter_config.json", "--eval --val data/val.jsonl --adapter $D/mine", "mlx_lm.fuse"},
    {"rows in an unknown file", "touch $D/mine.csv",                                            "--data $D/mine.csv", "expected a .jsonl"},
    {"an array with a bad row", "echo '[{\"text\": \"a b\"}, 3]' > $D/rows.json",              "--data $D/rows.json", "rows.json, row 2: expected a JSON object"},
    {"resume at another rate", "$TRAIN --model $D/model --data $D/rows.jsonl --steps 2 --out $D/mine >/dev/null", "--resume $D/mine --lr 1", "--lr 0.004, this run has 1"},
    {"resume on another base", "$TRAIN --data $D/rows.jsonl --steps 1 --out $D/mine >/dev/null", "--resume $D/mine", "--model \"base\", this run has"},
    {"resume for longer",   "$TRAIN --model $D/model --data $D/rows.jsonl --steps 1 --out $D/mine >/dev/null", "--resume $D/mine", "--steps 1, this run has 2; give the same, or start anew from it with --adapter"},
    {"resume for longer, constant", "$TRAIN --model $D/model --data $D/rows.jsonl --schedule constant --steps 1 --out $D/mine >/dev/null", "--schedule constant --resume $D/mine", "--steps 1, this run has 2"},
    {"resume after epochs", "$TRAIN --model $D/model --data $D/rows.jsonl --epochs 2 --batch 1 --accum 1 --out $D/mine >/dev/null", "--batch 1 --accum 1 --resume $D/mine", "--steps 6, this run has 2"},
    {"resume with another row", "$TRAIN --model $D/model --data $D/rows.jsonl --steps 2 --out $D/mine >/dev/null; sed -i '2s/Now/Then/' $D/rows.jsonl", "--resume $D/mine", "with rows \"3, hash"},
    {"resume with a row more", "$TRAIN --model $D/model --data $D/rows.jsonl --steps 2 --out $D/mine >/dev/null; sed -n 4p data/train.jsonl >> $D/rows.jsonl", "--resume $D/mine", "this run has \"4, hash"},
    {"resume with rows in another order", "$TRAIN --model $D/model --data $D/rows.jsonl --steps 2 --out $D/mine >/dev/null; sed -i '1{h;d};2G' $D/rows.jsonl", "--resume $D/mine", "with rows \"3, hash"},
    {"compare an adapter",  ":",                                                                "--compare --adapter dev/golden/lora-mha", "--compare starts from --model alone"},
    {"compare into a file", "touch $D/out.txt",                                                 "--compare --out $D/out.txt", "ot a directory"},
    {"resume from nothing", ":",                                                                "--resume $D/none", "there is no such directory"},
    {"a rate that explodes", ":",                                                               "--method full --lr 1e9 --clip 0 --steps 20", "a smaller --lr may help"},
};

static void test_wrong_input(void)
{
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        char prepare[1200];
        snprintf(prepare, sizeof prepare, "rm -rf $D/model $D/out $D/mine; cp -r base $D/model && chmod -R u+w $D/model; head -3 data/train.jsonl > $D/rows.jsonl; { %s; }", wrong[i].prepare);
        if (system(prepare)) die("could not prepare: %s", wrong[i].what);
        char usual[200] = "";
        for (const char **o = (const char *[]){"--model $D/model ", "--data $D/rows.jsonl ", "--out $D/out ", "--steps 2 ", NULL}; *o; o++) {
            size_t name = strcspn(*o, " ") + 1;
            if (!memmem(wrong[i].args, strlen(wrong[i].args), *o, name)) strcat(usual, *o);       // an option given twice would be noted
        }
        int status = train_run("%s%s", usual, wrong[i].args);
        char *text = output_of("stderr"), *line = strstr(text, "error:"), command[200];
        int lines = 0;
        for (const char *c = text; *c; c++) lines += *c == '\n';
        for (const char *c = text; *c; c++) check(*c == 27, 0, "%s: a raw escape", wrong[i].what);
        check(status == 1 ? 0 : 1, 0, "%s: status %d", wrong[i].what, status);
        check(lines == 1 && line == text && strstr(text, wrong[i].says) ? 0 : 1, 0, "%s: expected one line with «%s», got «%s»", wrong[i].what, wrong[i].says, text);
        snprintf(command, sizeof command, "! ls -d %s/out %s/*.tmp* 2>/dev/null | grep -q .", scratch, scratch);
        check(system(command), 0, "%s: something half-written is left", wrong[i].what);
        free(text);
    }
}

// A disk that fills up while the result is written, by a limit on the size of files. The older result stays.
static void test_full_disk(void)
{
    check(train_run(FEW_ROWS " --steps 1 --out $D/old"), 0, "first run");
    char command[1000];
    snprintf(command, sizeof command, "cp %s/old/adapter_model.safetensors %s/before; (trap '' XFSZ; ulimit -f 20; $TRAIN " FEW_ROWS " --steps 1 --lr 0.5 --out %s/old >%s/stdout 2>%s/stderr)", scratch, scratch, scratch, scratch, scratch);
    check(WEXITSTATUS(system(command)) == 1 ? 0 : 1, 0, "exit status");
    char *text = output_of("stderr");
    check(strstr(text, "error: cannot write") ? 0 : 1, 0, "says «%s»", text);
    check(!same_files("old/adapter_model.safetensors", "before"), 0, "the older adapter");
    snprintf(command, sizeof command, "! ls -d %s/*.tmp* 2>/dev/null | grep -q .", scratch);
    check(system(command), 0, "something half-written is left");
    free(text);
}

// A link to a directory stays a link, a slash at the end does not matter, and an output that nobody could read is an error.
static void test_out(void)
{
    char command[1000];
    snprintf(command, sizeof command, "mkdir %s/there && ln -s there %s/alias", scratch, scratch);
    check(system(command), 0, "cannot make a link");
    for (int again = 0; again < 2; again++) {
        check(train_run(FEW_ROWS " --steps 1 --out $D/alias"), 0, "into a link, run %d", again);
        check(train_run(FEW_ROWS " --steps 1 --out $D/slash/"), 0, "with a slash, run %d", again);
        check(!same_files("there/adapter_model.safetensors", "slash/adapter_model.safetensors"), 0, "adapter of run %d", again);
    }
    check(WEXITSTATUS(system("$TRAIN --list 2>$D/stderr >/dev/full")) == 1 ? 0 : 1, 0, "exit status with a full standard output");
}

// What --merge and full write has every file of the model directory that is not a weight, byte for byte; weights in other formats, and what
// a run or an adapter left there, stay behind.
static void test_kept_files(void)
{
    static const char *const kept[] = {"tokenizer.model", "chat_template.jinja", "added_tokens.json", "special_tokens_map.json", "generation_config.json", "LICENSE", "USE_POLICY.md",
        ".gitattributes", "a name with spaces", "vocab.txt", "training_args.bin", "a-link.json", "large.txt", NULL};
    static const char *const left[] = {"pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "other.safetensors", "other.safetensors.index.json", "q4.gguf",
        "consolidated.00.pth", "tf_model.h5", "flax_model.msgpack", "state.json", "adapter_config.json", "adapter_model.bin", NULL};
    char command[1000];
    check(system("rm -rf $D/model; cp -r base $D/model && chmod -R u+w $D/model && mkdir -p $D/model/.git/objects && touch $D/model/.git/HEAD && head -c 3000001 /dev/urandom > $D/model/large.txt"
        " && echo linked > $D/linked && ln -s ../linked $D/model/a-link.json && ln -s nowhere $D/model/dangling && mkfifo $D/model/pipe"), 0, "cannot prepare");
    for (const char *const *lists[] = {kept, left, NULL}, *const **list = lists; *list; list++)
        for (const char *const *name = *list; *name; name++) {
            snprintf(command, sizeof command, "cd %s/model; [ -e '%s' ] || echo '{}' > '%s'", scratch, *name, *name);
            check(system(command), 0, "cannot make %s", *name);
        }
    check(train_run(FEW_ROWS " --model %s/model --steps 1 --out $D/kept-adapter", scratch), 0, "an adapter");
    check(train_run("--merge $D/merged --model $D/model --adapter $D/kept-adapter"), 0, "--merge");
    for (int again = 0; again < 2; again++)          // the second time over the first one's files
        check(train_run(FEW_ROWS " --model $D/model --steps 1 --method full --out $D/full"), 0, "full, run %d", again);
    for (const char *const *dir = (const char *const[]){"merged", "full", NULL}; *dir; dir++) {
        for (const char *const *name = kept; *name; name++) {
            snprintf(command, sizeof command, "cmp -s \"%s/model/%s\" \"%s/%s/%s\"", scratch, *name, scratch, *dir, *name);
            check(system(command), 0, "%s has %s", *dir, *name);
        }
        for (const char *const *name = left; *name; name++) {
            snprintf(command, sizeof command, "cd %s/%s; [ ! -e '%s' ] || [ '%s' = state.json -a %s = full ]", scratch, *dir, *name, *name, *dir);
            check(system(command), 0, "%s has no %s", *dir, *name);
        }
        snprintf(command, sizeof command, "cd %s/%s && [ ! -e .git ] && [ ! -e pipe ] && [ ! -e dangling ]", scratch, *dir);
        check(system(command), 0, "%s has what is no file", *dir);
    }
    check(system("rm -rf $D/model $D/merged $D/full $D/kept-adapter"), 0, "cannot tidy up");
}

// --out replaces what a run wrote, by the run's own list, and nothing else.
static void test_only_ours(void)
{
    static const char *const run_again = FEW_ROWS " --steps 1 --lr 0.5 --out $D/ours";
    char command[1000];
    check(train_run(FEW_ROWS " --steps 1 --out $D/ours"), 0, "first run");
    static const struct { const char *what, *prepare; int refused; } cases[] = {
        {"as it was left", ":", 0},
        {"with no list, as older runs left it", "sed -i 's/\"files\"/\"others\"/' $D/ours/state.json; touch $D/ours/tokenizer_config.json", 0},
        {"with a file more", "touch $D/ours/LICENSE", 1},
        {"with a file more that the list has", "touch $D/ours/LICENSE; sed -i 's/\"files\":[^[]*\\[/&\"LICENSE\",/' $D/ours/state.json", 0},
        {"with a directory", "mkdir $D/ours/figures", 1},
        {"with somebody else's state.json", "rm -rf $D/ours; mkdir $D/ours; echo '{\"volume\": 11}' > $D/ours/state.json", 1},
        {"with a state.json that is no JSON", "rm -rf $D/ours; mkdir $D/ours; echo '{\"--method\": ' > $D/ours/state.json", 1},
        {"with a list that leads out of it", "echo mine > $D/victim; sed -i 's/\"files\":[^[]*\\[/&\"..\\/victim\",\"..\",\".\",7,/' $D/ours/state.json", 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        snprintf(command, sizeof command, "rm -rf $D/ours; $TRAIN %s >/dev/null && { %s; }", run_again, cases[i].prepare);
        check(system(command), 0, "cannot prepare: %s", cases[i].what);
        int status = train_run("%s", run_again);
        char *text = output_of("stderr");
        check(status == cases[i].refused && !strstr(text, "which would be lost") == !cases[i].refused ? 0 : 1, 0, "%s: status %d, says «%s»", cases[i].what, status, text);
        snprintf(command, sizeof command, "! ls -d %s/ours.tmp* 2>/dev/null | grep -q .", scratch);
        check(system(command), 0, "%s: something is left beside it", cases[i].what);
        free(text);
    }
    check(system("grep -q mine $D/victim"), 0, "a file outside is gone");
    snprintf(command, sizeof command, "rm -rf $D/ours $D/log; $TRAIN %s >/dev/null && { $TRAIN " FEW_ROWS " --steps 12 --log $D/log --out $D/ours >$D/stdout 2>$D/stderr & p=$!;"
        " while ! grep -q '\"step\":2,\"loss' $D/log 2>/dev/null; do sleep 0.01; done; echo mine > $D/ours/notes.txt; wait $p && grep -q mine $D/ours.tmp$p/notes.txt && rm -r $D/ours.tmp$p; }", run_again);
    check(system(command), 0, "a file put there while the run went on");
    char *text = output_of("stderr");
    check(strstr(text, "note: ") && strstr(text, "holds files that no run wrote") ? 0 : 1, 0, "says «%s»", text);
    free(text);
}

// A signal while a directory is in the making leaves nothing of it, whatever its files are called.
static void test_discard(void)
{
    char *dir = in_scratch("cut-short"), command[200];
    for (int files = 0; files < 4; files++) {
        fflush(stdout);
        pid_t child = fork();
        if (!child) {
            stage_begin(dir);
            for (int i = 0; i < files; i++) stage_file((const char *[]){"USE_POLICY.md", ".hidden", "a name with spaces"}[i], "text", 4);
            on_signal(SIGTERM);
        }
        int status;
        check(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 128 + SIGTERM ? 0 : 1, 0, "status with %d files", files);
        snprintf(command, sizeof command, "! ls -d %s.tmp* 2>/dev/null | grep -q .", dir);
        check(system(command), 0, "%d files are left", files);
    }
    free(dir);
}

// ---- merging in 16 bits --------------------------------------------------------------------------------------------

// The small model in a dtype of two bytes, its q_proj of layer 0 all zeros but one number; where `instead` is given, those two bytes stand in that number's place.
static char *odd_model(enum dtype type, float odd, uint16_t instead)
{
    char *base = small_model(0), *dir = in_scratch("odd"), *path = join(dir, "model.safetensors"), *config_path = join(base, "config.json");
    size_t bytes;
    model m = {0};
    plan p = plan_from_options();
    p.method = &methods[0], p.tokens = p.positions = 8;
    opt.model = base;
    if (system("rm -rf $D/odd")) die("cannot remove %s", dir);
    model_measure(&m, config_read(config_path), p);
    fill_model(&m, NULL, 0);
    linear *q = m.linears[0];
    wide *x = alloc(elements(q->W), sizeof *x);
    x[5] = (wide)odd;
    put(q->W, x, TYPE_OF(wide));
    stage_begin(dir), stage_model(&m, base, type), stage_publish(dir);
    model_free(&m), free(x);
    uint16_t h = type == F16 ? to_f16(odd) : to_bf16(odd);
    char *data = read_file(path, &bytes), *at = memmem(data, bytes, &h, 2);
    for (; at && instead && (at - data) % 2; at = memmem(at + 1, bytes - (size_t)(at + 1 - data), &h, 2)) {}
    if (instead) memcpy(at, &instead, 2);
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, bytes, f) != bytes || fclose(f)) die("cannot write %s", path);
    free(data), free(path), free(config_path), free(base);
    return dir;
}

// An adapter that adds one number to that number and nothing to all others.
static void add_to_odd(const char *base, double more)
{
    char *config_path = join(base, "config.json"), *dir = in_scratch("odd-adapter");
    model m = {0};
    opt.model = base;
    if (system("rm -rf $D/odd-adapter")) die("cannot remove %s", dir);
    model_measure(&m, config_read(config_path), small_plan("frozen"));
    fill_model(&m, NULL, 0);
    linear *q = m.linears[0];
    wide *x = alloc(elements(q->D), sizeof *x);
    x[5] = (wide)more;
    put(q->D, x, TYPE_OF(wide));
    stage_begin(dir), peft_write(&m, base), stage_publish(dir);
    model_free(&m), free(x), free(config_path), free(dir);
}

// What cannot be written as a number is refused, with the tensor's name; what an update loses is a percentage, or there is none.
static void test_odd_merges(void)
{
    static const struct { const char *what; enum dtype type; float odd; uint16_t instead; double more; int status; const char *says, *prints; } cases[] = {
        {"a sum beyond float16",   F16,  65000, 0,      900,   1, "layers.0.self_attn.q_proj.weight has a 65892 with the adapter merged in, which is Inf in F16", ""},
        {"a sum within float16",   F16,  65000, 0,      400,   0, "", "layer  0 q"},
        {"an Inf in the base",     F16,  65000, 0x7c00, 900,   1, "layers.0.self_attn.q_proj.weight holds NaN or Inf", ""},
        {"a NaN in the base",      F16,  65000, 0x7e00, 0,     1, "layers.0.self_attn.q_proj.weight holds NaN or Inf", ""},
        {"an Inf in a bf16 base",  BF16, 65000, 0x7f80, 0,     1, "layers.0.self_attn.q_proj.weight holds NaN or Inf", ""},
        {"a sum beyond bfloat16",  BF16, 3.38e38f, 0,   2e36,  1, "which is Inf in BF16", ""},
        {"no update at all",       BF16, 65000, 0,      0,     0, "", "layer  0 q     its update is zero"},
        {"an update that is lost", BF16, 65000, 0,      1,     0, "", "layer  0 q       0.0 % of the update survive"},
        {"an update that is kept", BF16, 1,     0,      1,     0, "", "layer  0 q     100.0 % of the update survive"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *base = odd_model(cases[i].type, cases[i].odd, 0);
        add_to_odd(base, cases[i].more);
        if (cases[i].instead) free(odd_model(cases[i].type, cases[i].odd, cases[i].instead));
        check(system("rm -rf $D/odd-merged"), 0, "cannot prepare");
        int status = train_run("--merge $D/odd-merged --model %s --adapter $D/odd-adapter", base);
        char *error = output_of("stderr"), *text = output_of("stdout");
        check(status == cases[i].status && strstr(error, cases[i].says) && strstr(text, cases[i].prints) && !strstr(text, "inf") && !strstr(text, "nan") ? 0 : 1, 0,
            "%s: status %d, says «%s%s»", cases[i].what, status, error, text);
        check(system("! ls -d $D/odd-merged* 2>/dev/null | grep -q .") ? !status ? 0 : 1 : status ? 0 : 1, 0, "%s: a directory of it", cases[i].what);
        free(base), free(error), free(text);
    }
}

// ---- real models --------------------------------------------------------------------------------------------------

static const char *const lily = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball. She wanted to play with it, but it was too high.";

static void test_stories(void)
{
    if (!need("stories260K/model.safetensors")) return;
    check(train_run("--model %s/stories260K --generate 'Once upon a time' --max-new 256", real_input), 0, "exit status");
    char *got = output_of("stdout");
    size_t bytes;
    char *want = read_file("dev/golden/stories260K.txt", &bytes);        // 256 greedy tokens by transformers
    check(strncmp(got, lily, strlen(lily)) ? 1 : 0, 0, "the published text");
    check(strcmp(got, want) ? 1 : 0, 0, "256 tokens");
    free(got), free(want);
}

// An answer whose first character could hide in the prompt's last piece, ":-", is learnt and given.
static void test_minus_five(void)
{
    static const char *const config_text = "{\"model_type\": \"llama\", \"hidden_size\": 32, \"intermediate_size\": 32, \"num_hidden_layers\": 1,"
        " \"num_attention_heads\": 2, \"vocab_size\": 32000}";
    if (!need("llama2-tokenizer/tokenizer.model")) return;
    char *path = in_scratch("minus.json"), *rows = in_scratch("minus.jsonl");
    write_text(path, config_text);
    write_text(rows, "{\"question\": \"What is 3 minus 8?\", \"answer\": \"-5\"}\n{\"question\": \"What is 8 minus 3?\", \"answer\": \"5\"}\n");
    check(train_run("--init %s --model %s/llama2-tokenizer --method full --data %s --steps 60 --lr 1e-2 --out $D/minus", path, real_input, rows), 0, "training");
    check(train_run("--eval --exact-match --model $D/minus --val %s --max-new 8", rows), 0, "scoring");
    char *text = output_of("stdout");
    check(strstr(text, "exact match 2 of 2") ? 0 : 1, 0, "says «%s»", text);
    free(text), free(path), free(rows);
}

static double logged(const char *log, int step, const char *field)
{
    char *text = output_of(log), key[64];
    snprintf(key, sizeof key, "{\"step\":%d,\"loss\"", step);
    char *line = strstr(text, key), *at = line ? strstr(line, field) : NULL;
    double x = at ? strtod(at + strlen(field), NULL) : NAN;
    free(text);
    return x;
}

// Rows in one large micro-batch or in several small ones: the same losses and gradient norms, whatever is scored beside them.
static void test_batches(void)
{
    check(train_run("--batch 64 --steps 2 --val $D/few.jsonl --max-new 4 --log $D/one.log --out $D/one"), 0, "--batch 64");
    check(train_run("--batch 16 --accum 4 --steps 2 --val $D/few.jsonl --max-new 4 --log $D/four.log --out $D/four"), 0, "--accum 4");
    for (int step = 1; step <= 2; step++)
        for (const char **field = (const char *[]){"\"loss\":", "\"grad_norm\":", NULL}; *field; field++)
            check(fabs(logged("one.log", step, *field) / logged("four.log", step, *field) - 1), 1e-5, "step %d, %s", step, *field);
}

static void test_gsm8k(void)            // every method learns; Bone starts with a larger gradient than LoRA and falls faster
{
    if (!need("gsm8k/train.jsonl")) return;
    double norm[METHODS], last[METHODS];
    int bone = (int)(method_named("bone") - methods), lora = (int)(method_named("lora") - methods);
    for (int i = 0; i < METHODS; i++) {
        const char *M = methods[i].name;
        check(train_run("--model %s/stories260K --data %s/gsm8k/train.jsonl --seq 256 --method %s --rank 4 --mini-r 4 --steps 12 --batch 8 --lr 2e-3 --no-shuffle --log %s/log --out %s/gsm-%s",
            real_input, real_input, M, scratch, scratch, M), 0, "%s: exit status", M);
        norm[i] = logged("log", 1, "\"grad_norm\":"), last[i] = logged("log", 12, "\"loss\":");
        check(last[i] / logged("log", 1, "\"loss\":"), 1, "%s: the loss falls", M);
    }
    check(norm[lora] / norm[bone], 1, "first gradient norm of LoRA over Bone's");
    check(last[lora] < last[bone], 0, "loss after 12 steps: LoRA %.4f, Bone %.4f", last[lora], last[bone]);
}

static void test_llama2_counts(void)    // section 4 of the paper, on the shape of Llama2-7B
{
    static const struct { const char *method; int rank; double millions; } paper[] = {
        {"lora", 36, 89.95}, {"bone", 16, 21.7}, {"bone", 32, 43.5}, {"bone", 64, 87.0}, {"bone", 128, 174.0}, {"bat", 64, 87.0}, {"bat-row", 64, 72.9},
    };
    char *dir = in_scratch("llama2"), *path = join(dir, "config.json"), want[64], line[64];
    mkdir(dir, 0777);
    write_text(path, "{\"model_type\": \"llama\", \"hidden_size\": 4096, \"intermediate_size\": 11008, \"num_hidden_layers\": 32, \"num_attention_heads\": 32, \"vocab_size\": 32000}");
    for (size_t i = 0; i < sizeof paper / sizeof *paper; i++) {
        check(train_run("--list --model %s --rank %d", dir, paper[i].rank), 0, "exit status");
        char *text = output_of("stdout");
        snprintf(line, sizeof line, "\n%-9s", paper[i].method);
        char *at = strstr(text, line), *count = at ? strstr(at, "trains") : NULL;
        double got = NAN;
        for (char *c = at ? at + 1 : text; at && *c && *c != '\n'; c++)  // the number with an M behind it
            if (*c == 'M' && c[-1] >= '0' && c[-1] <= '9') { char *d = c; while (d[-1] == '.' || (d[-1] >= '0' && d[-1] <= '9')) d--; got = strtod(d, NULL); }
        snprintf(want, sizeof want, "%s r%d", paper[i].method, paper[i].rank);
        check(fabs(got - paper[i].millions) / paper[i].millions, 0.003, "%s: %.2fM, the paper has %.2fM", want, got, paper[i].millions);
        (void)count;
        free(text);
    }
    free(dir), free(path);
}

// ---- options ---------------------------------------------------------------------------------------------------

// What the program prints with some options in place of others that mean the same.
static const struct { const char *theirs, *ours; } spellings[] = {
    {"-h", "--help"},
    {"--list --rank=16", "--list --rank 16"},
    {"--list --lora_r 16 --model_name_or_path base", "--list --rank 16 --model base"},
    {"--list --targets q_proj,v_proj", "--list --targets q,v"},
    {"--list --target_modules='q_proj, v_proj,down_proj'", "--list --targets q,v,down"},
    {"--list --targets all-linear", "--list --targets q,k,v,o,gate,up,down"},
    {"--generate=Once --max_new_tokens=5", "--generate Once --max-new 5"},
    {"--generate Once --max-new 9 --max-new 5", "--generate Once --max-new 5"},
};

static void test_spellings(void)
{
    for (size_t i = 0; i < sizeof spellings / sizeof *spellings; i++) {
        check(train_run("%s", spellings[i].ours), 0, "exit status of %s", spellings[i].ours);
        char *want = output_of("stdout");
        check(train_run("%s", spellings[i].theirs), 0, "exit status of %s", spellings[i].theirs);
        char *got = output_of("stdout");
        check(*want && !strcmp(got, want) ? 0 : 1, 0, "%s prints «%s»", spellings[i].theirs, got);
        free(got), free(want);
    }
    check(train_run("--generate Once --max-new 9 --max-new=5"), 0, "exit status of an option given twice");
    char *text = output_of("stderr");
    check(strcmp(text, "note: --max-new is given twice; 5 counts, not 9\n"), 0, "says «%s»", text);
    free(text);
    check(train_run("--version"), 0, "exit status of --version");
    text = output_of("stdout");
    check(strcmp(text, "train " VERSION "\n"), 0, "prints «%s»", text);
    free(text);

    check(train_run("--model base --data data/train.jsonl --val $D/few.jsonl --method lora --rank 4 --alpha 8 --targets q,v --lr 0.01 --schedule linear --warmup 1 --weight-decay 0.1 --clip 0.5"
        " --batch 2 --accum 2 --steps 2 --seq 140 --max-new 3 --eval-every 1 --save-every 1 --log $D/ours.log --out $D/ours"), 0, "our names");
    check(train_run("--model_name_or_path=base --data_path data/train.jsonl --validation_file $D/few.jsonl --method LoRA --lora_r=4 --lora_alpha 8 --target_modules q_proj,v_proj --learning_rate 0.01"
        " --lr_scheduler_type Linear --warmup_steps 1 --weight_decay 0.1 --max_grad_norm 0.5 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --max_steps 2 --max_seq_length 140"
        " --max_new_tokens 3 --eval_steps 1 --save_steps 1 --log $D/theirs.log --output_dir $D/theirs"), 0, "their names");
    check(!same_files("ours/adapter_model.safetensors", "theirs/adapter_model.safetensors"), 0, "adapter");
    check(!same_logs("ours.log", "theirs.log"), 0, "log");
}

// Every other name leads to something that is there, and every pair of commands is refused.
static void test_option_tables(void)
{
    for (int i = 0; i < ALIASES; i++) {
        char *value, *theirs = strdup(aliases[i].theirs);
        int option = option_named(theirs, &value);
        if (*theirs == '-') check(option < 0 || strcmp(option_table[option].name, aliases[i].ours), 0, "%s", theirs);
        else check(method_named(aliases[i].ours) || !strcmp(parse_schedule(theirs), aliases[i].ours) ? 0 : 1, 0, "%s", theirs);
        free(theirs);
    }
    for (int i = 0; i < METHODS; i++) check(method_named(methods[i].name) == &methods[i] ? 0 : 1, 0, "%s", methods[i].name);
    for (int i = 1; i <= COMMANDS; i++)
        for (int j = 1; j <= COMMANDS; j++) {
            if (i == j) continue;
            check(train_run("%s %s %s %s", option_table[i].name, option_table[i].kind == 's' ? "x" : "", option_table[j].name, option_table[j].kind == 's' ? "x" : "") != 1, 0, "exit status");
            char *text = output_of("stderr");
            check(!strstr(text, "give one of them"), 0, "%s and %s: «%s»", option_table[i].name, option_table[j].name, text);
            free(text);
        }
}

// Half an epoch is half its steps, rounded up.
static void test_epochs(void)
{
    static const struct { const char *epochs; int steps; } cases[] = {{"0.1", 1}, {"0.5", 2}, {"0.51", 3}, {"1", 4}, {"1.25", 5}, {"1.26", 6}, {"2", 8}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char want[64];
        check(train_run("--data $D/few.jsonl --batch 2 --epochs %s --method lora --rank 1 --log $D/log --out $D/epochs", cases[i].epochs), 0, "exit status");
        char *text = output_of("stdout");
        snprintf(want, sizeof want, "steps      %d of 2 rows", cases[i].steps);
        check(!strstr(text, want) || isnan(logged("log", cases[i].steps, "\"loss\":")), 0, "--epochs %s: expected %d steps", cases[i].epochs, cases[i].steps);
        free(text);
    }
}

// ---- the GPU -----------------------------------------------------------------------------------------------------------

__attribute__((weak)) snapshot *gpu_results(const char *what, int recompute, const snapshot *other, const char *dir);      // absent where there is no GPU half
__attribute__((weak)) double gpu_tolerance(int one_op);

static void compare_halves(const char *what, int recompute)
{
    snapshot *cpu = results_of(what, recompute, NULL), *gpu = gpu_results(what, recompute, cpu, scratch);
    check(arrlen(cpu) == arrlen(gpu) ? 0 : 1, 0, "%s: %td tensors on the CPU, %td on the GPU", what, arrlen(cpu), arrlen(gpu));
    for (int i = 0; i < arrlen(cpu) && i < arrlen(gpu); i++) {
        compared c = compare(&cpu[i], &gpu[i]);
        if (!strncmp(cpu[i].name, "start ", 6)) continue;
        if (strcmp(cpu[i].name, "dxn")) check(c.norm[0] > 0 ? 0 : 1, 0, "%s, %s is zero", what, cpu[i].name);     // dxn of the first layer is not wanted
        check(c.error, gpu_tolerance(!strcmp(what, "ops")), "%s, %s", what, cpu[i].name);
    }
    snapshots_free(cpu), snapshots_free(gpu);
}

// What dev_reserve() counts before the first step is all that steps need.
__attribute__((weak)) long gpu_allocations(const char *method_name, int recompute);
static void test_gpu_allocations(void)
{
    for (int i = 0; i < METHODS; i++)
        for (int recompute = 0; recompute < 3 && !left_out(i); recompute += 2) {
            long made = gpu_allocations(methods[i].name, recompute);
            if (made < 0) { snprintf(skipped, sizeof skipped, "only the emulation counts them"); return; }
            check((double)made, 0, "%s, --recompute %d: %ld", methods[i].name, recompute, made);
        }
}

static void test_gpu_ops(void) { compare_halves("ops", 0); }

static void test_gpu_methods(void)
{
    for (int i = 0; i < METHODS; i++)
        for (int recompute = 0; recompute < 3 && !left_out(i); recompute += 2) compare_halves(methods[i].name, recompute);
}

// bf16 is as good as PyTorch's: of each gradient of the bundled model at most 1.5 times its error (dev/golden.py measured it, against
// float64), and on average over the tensors no more than it.
static void test_gpu_bundled(void)
{
    if (gpu_tolerance(1) < 1e-3) { compare_halves("bundled", 0); return; }      // float and double
    size_t bytes;
    char *text = read_file("dev/golden/bf16_errors.json", &bytes);
    json_t *errors = parse_json("bf16_errors.json", text, bytes);
    snapshot *cpu = results_of("bundled", 0, NULL), *gpu = gpu_results("bundled", 0, cpu, scratch);
    double sum = 0, most = 0, n = 0;
    for (int i = 0; i < arrlen(cpu); i++) {
        if (strncmp(cpu[i].name, "d ", 2)) continue;
        double theirs = json_number_value(json_object_get(errors, cpu[i].name + 2)), ours = compare(&cpu[i], &gpu[i]).error;
        check(ours, 1.5 * theirs, "%s", cpu[i].name);
        sum += ours / theirs, most = fmax(most, ours / theirs), n++;
    }
    check(n == (double)json_object_size(errors) ? 0 : 1, 0, "%g tensors, %zu of PyTorch's", n, json_object_size(errors));
    check(sum / n, 1, "error over PyTorch's, on average");
    printf("      bf16: error over PyTorch's %.2f on average (allowed 1), at most %.2f (allowed 1.5)\n", sum / n, most);
    snapshots_free(cpu), snapshots_free(gpu), json_decref(errors), free(text);
}

// Three runs of everything give the same bits. Emulated, each takes threads and blocks in another order (dev/cuda_on_cpu.h
// reads CUDA_ORDER; a GPU has its own), so that a missing barrier shows, or a sum that depends on who comes first.
static void test_gpu_same_bits(void)
{
    static const char *const runs[] = {"ops", "bone", "bat", "full"}, *const orders[] = {"forward", "reverse", "random:1"};
    for (int i = 0; i < 4; i++) {
        snapshot *first = NULL;
        for (int j = 0; j < 3; j++) {
            setenv("CUDA_ORDER", orders[j], 1);
            snapshot *now = gpu_results(runs[i], 0, NULL, scratch);
            for (int k = 0; k < arrlen(first); k++)
                check(now[k].n == first[k].n && !memcmp(now[k].x, first[k].x, now[k].n * sizeof(double)) ? 0 : 1, 0, "%s, %s, run %d", runs[i], now[k].name, j + 1);
            if (first) snapshots_free(now);
            else first = now;
        }
        snapshots_free(first);
    }
    unsetenv("CUDA_ORDER");
}

// ---- the list of tests -----------------------------------------------------------------------------------------------

static const struct { const char *name, *claim; void (*run)(void); int builds; } tests[] = {
    {"gradients",      "every trainable number of every method agrees with central differences",          test_gradients, ONLY_F64},
    {"ops",            "every op's backward agrees with central differences under a random cotangent",    test_ops, ONLY_F64},
    {"residual-copy",  "RMSNorm's copy of the residual stream has its bits, and leaves out as it is",     test_residual_copy, BOTH},
    {"twice",          "running backward twice gives twice the gradient",                                 test_twice, BOTH},
    {"accumulation",   "micro-batches of one row add up to the batch",                                    test_accumulation, BOTH},
    {"splits",         "every split of the same rows into micro-batches gives their loss and gradient, scored answers or none", test_splits, ONLY_F64},
    {"recompute",      "recomputing activations gives the same bits in less memory",                      test_recompute, BOTH},
    {"zero-start",     "step 0 changes no logit, whatever the method",                                    test_zero_start, BOTH},
    {"zero-rows",      "dora on a weight with rows of zeros begins with the base, and stays finite",       test_zero_rows, BOTH},
    {"merge",          "the merged model gives the adapter's logits",                                     test_merge, BOTH},
    {"definition",     "each layer equals the paper's W + ΔW, written as plain loops",                    test_definition, BOTH},
    {"frozen-is-full", "frozen's gradient is full fine-tuning's over the same matrices; lora-ga's first, too", test_frozen_is_full, BOTH},
    {"svd",            "power iteration finds LAPACK's singular values",                                  test_svd, BOTH},
    {"residual",       "pissa leaves the rest of W's SVD; W and a start of pissa, olora, lora-ga are W",  test_residual, BOTH},
    {"bf16-start",     "on a bf16 base, too, they begin with its loss, and what is saved is what was trained", test_bf16_start, BOTH},
    {"goldens",        "logits, loss, gradients and eight AdamW steps are transformers' and PEFT's",      test_goldens, BOTH},
    {"target-modules", "names, their ends and regular expressions mean the layers that PEFT takes them for", test_target_modules, BOTH},
    {"uneven",         "with adapters on some layers only, evaluating gives the logits of training",      test_uneven, BOTH},
    {"attention",      "attention is softmax(q kᵀ/√d) v by plain loops, grouped heads and cached keys too",  test_attention, BOTH},
    {"cache",          "generating with the key-value cache gives the logits of the whole row",           test_cache, BOTH},
    {"matmul",         "the fast product equals the plain one, at every edge and dtype",                  test_matmul, BOTH},
    {"same-bits",      "a product has the same bits for 1, 2 and 4 threads and in any batch",             test_same_bits, BOTH},
    {"in-place",       "a product has the same bits whether its factors are read in place or copied",     test_in_place, BOTH},
    {"exp",            "exp is exact to the last bits and keeps NaN",                                     test_exp, BOTH},
    {"halves",         "bf16 and f16 round to nearest even and keep Inf and NaN",                         test_halves, ONLY_F32},
    {"beyond-blocks",  "every op is its formula, plain and differentiated, beyond its blocks; for 1 and 2 threads", test_beyond_blocks, BOTH},
    {"beyond-panels",  "every product is the plain one beyond its panels, for 1 and 2 threads, and writes nothing else", test_beyond_panels, BOTH},
    {"beyond-buffers", "copies in every dtype, tables, AdamW and its norm are plain loops beyond buffers and pieces", test_beyond_buffers, BOTH},
    {"beyond-chunks",  "loss and gradients of the head are plain loops, however few rows of logits stand in memory", test_beyond_chunks, BOTH},
    {"beyond-rows",    "rows of 200 tokens: the gradient is the loss's slope, for every method, --recompute and threads", test_beyond_rows, BOTH},
    {"adamw",          "AdamW is PyTorch's",                                                              test_adamw, BOTH},
    {"expected-ids",   "Llama2's tokenizer gives SentencePiece's ids",                                    test_tokenizer_expected, ONLY_F32},
    {"own-ids",        "so does the bundled one",                                                         test_tokenizer_own, ONLY_F32},
    {"any-bytes",      "any bytes survive encoding and decoding, long ones too",                          test_tokenizer_bytes, ONLY_F32},
    {"special-tokens", "special and added tokens of a directory are transformers' ids, BOS and EOS",     test_special_tokens, BOTH},
    {"prompt-edge",    "the prompt's ids do not depend on the answer, all of which is learnt",            test_edge, BOTH},
    {"minus-five",     "an answer that begins with the rest of a piece is learnt and given",              test_minus_five, ONLY_F32},
    {"stops",          "an answer ends at every eos_token_id of the model",                               test_stops, BOTH},
    {"config",         "rope_theta counts wherever it stands, initializer_range is --init's σ",           test_config, ONLY_F64},
    {"rows",           "Alpaca's, MetaMathQA's and GSM8K's rows work as they are published",              test_rows, ONLY_F32},
    {"config-spelling", "a config.json that is written again keeps every byte but its dtype's",           test_config_spelling, BOTH},
    {"json-values",    "numbers and texts that are written as JSON are read back as the same",             test_json_values, BOTH},
    {"large-files",    "a header of 100,000 tensors and a row of 16 MB take about a second",              test_large_files, ONLY_F32},
    {"row-files",      "rows are read as they are meant, or named with file, line and byte; never in part", test_row_files, BOTH},
    {"safetensors",    "what the safetensors library refuses is refused, and what it reads is read",      test_safetensors, BOTH},
    {"cut-file",       "a model file that changes while it is used ends the run with one line",           test_cut_file, BOTH},
    {"escapes",        "control characters of rows and models never reach the terminal",                  test_escapes, ONLY_F32},
    {"sampling",       "tokens come as often as softmax(logits/temperature), cut at top-p, says",         test_sampling, ONLY_F32},
    {"together",       "sequences that are answered together say what each says alone",                   test_together, BOTH},
    {"answers",        "an answer is the number behind #### or The answer is:, whatever follows it",     test_answers, ONLY_F32},
    {"batches",        "--batch 64 and --batch 16 --accum 4 take the same steps",                         test_batches, ONLY_F32},
    {"room",           "an answer has room for --max-new tokens, whatever other rows are; what is cut off is counted", test_room, ONLY_F32},
    {"threads",        "adapter and log have the same bytes for 1, 2 and 4 threads",                      test_threads_same_bytes, ONLY_F32},
    {"quota",          "there are no more threads than a control group's quota allows",                   test_quota, ONLY_F32},
    {"busy",           "beside other work, all threads are not much slower than one",                     test_busy, ONLY_F32},
    {"resume",         "a resumed run leaves the bytes of one that never stopped",                        test_resume, ONLY_F32},
    {"killed",         "so does one that a signal ended",                                                 test_killed, ONLY_F32},
    {"compare",        "--compare gives every method a row, continues, and its runs are ordinary ones",   test_compare, ONLY_F32},
    {"plots",          "plots show every method, what was run, a window's mean in its middle",
     test_plots, ONLY_F32},
    {"wrong-input",    "every wrong input gets one clear line, and nothing is left behind",               test_wrong_input, ONLY_F32},
    {"spellings",      "options in PEFT's and Trainer's spelling mean what they mean there",              test_spellings, ONLY_F32},
    {"option-tables",  "every other name leads somewhere; two commands at once are refused, whichever",    test_option_tables, ONLY_F32},
    {"epochs",         "half an epoch is half its steps, rounded up",                                      test_epochs, ONLY_F32},
    {"full-disk",      "a full disk is said, and the older result stays",                                 test_full_disk, ONLY_F32},
    {"output",         "links and slashes lead to the same place; a full standard output is an error",    test_out, ONLY_F32},
    {"kept-files",     "--merge and full keep every file of the model directory that is not a weight",    test_kept_files, ONLY_F32},
    {"only-ours",      "--out replaces what a run says it wrote, and nothing else",                        test_only_ours, ONLY_F32},
    {"discard",        "a signal leaves nothing of a directory in the making, whatever its files are called", test_discard, ONLY_F32},
    {"odd-merges",     "a merge that would write Inf or NaN is refused; what survives is a number or said to be nothing", test_odd_merges, ONLY_F32},
    {"counts",         "trainable parameters on Llama2-7B are the paper's",                               test_llama2_counts, ONLY_F32},
    {"stories",        "a real model says what transformers says, 256 tokens long",                       test_stories, ONLY_F32},
    {"gsm8k",          "every method learns GSM8K rows; Bone's first gradient and progress beat LoRA's",  test_gsm8k, ONLY_F32},
    {"gpu-ops",        "every op gives the same on the GPU as on the CPU",                                test_gpu_ops, ON_GPU},
    {"gpu-methods",    "so does a step of every method: activations, gradients, updated parameters",      test_gpu_methods, ON_GPU},
    {"gpu-allocations", "no step allocates: what the ops need of their own is reserved before the first",      test_gpu_allocations, ON_GPU},
    {"gpu-base",       "and of the bundled model, where bf16 is no further off than PyTorch's",            test_gpu_bundled, ON_GPU},
    {"gpu-bits",       "the GPU gives the same bits every time, in any order of threads",                test_gpu_same_bits, ON_GPU},
};

int main(int argc, char **argv)
{
    spin_briefly(argv);
    int passed = 0, failed = 0, skips = 0;
    if (argc > 2) only_method = argv[2];
    options defaults = opt;
    snprintf(scratch, sizeof scratch, "/tmp/test-lora-bone-XXXXXX");
    if (!mkdtemp(scratch)) die("cannot make a directory in /tmp: %s", strerror(errno));
    setenv("D", scratch, 1);
    setenv("TRAIN", "./train", 0);
    if (system("head -8 data/val.jsonl > $D/few.jsonl")) die("data/val.jsonl: cannot be read");
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        if (!(tests[i].builds & (gpu_results ? ON_GPU : THIS_BUILD)) || (argc > 1 && !strstr(tests[i].name, argv[1]))) continue;
        opt = defaults;
        failures = 0, worst = 0, *skipped = 0;
        tests[i].run();
        if (*skipped) skips++;
        else if (failures) failed++;
        else passed++;
        printf("%s %-15s %s", *skipped ? "-" : failures ? "✗" : "✓", tests[i].name, tests[i].claim);
        if (*skipped) printf(": skipped, %s", skipped);
        else if (worst > 0) printf("  (largest error %.2g of its tolerance)", worst);
        putchar('\n');
        fflush(stdout);
    }
    char command[100];
    snprintf(command, sizeof command, "rm -rf %s", scratch);
    if (system(command)) failed++;
    printf("%d passed, %d failed, %d skipped\n", passed, failed, skips);
    return failed > 0 || passed + skips == 0;
}
