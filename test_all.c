/*  test_all.c: what this program claims, and the check of each claim.

    build/test_f64 and build/test_f32 are this file compiled with double and with float. Without an argument all
    tests run. `build/test_f64 WORD` runs the tests whose name is WORD or, where none is, contains it. Further words
    keep them to some of their cases: a method by its name, an op or a row of a table by a part of its name.
    The exit status is the verdict. Every comparison is `ok = err <= tol`, so NaN fails, and a reference of zeros is
    an error. dev/mutants.sh breaks the code on purpose and asks that these tests turn red.                      */

#include "ops/cpu.c"
#define main train_main                 // the program's own
#include "train.c"
#undef main
#include "dev/halves.h"
#include <malloc.h>

enum { ONLY_F64 = 1, ONLY_F32 = 2, BOTH = 3, ON_GPU = 4 };
#ifndef THIS_BUILD                      // dev/mutants.sh runs the tests of both builds in one
#define THIS_BUILD (sizeof(real) == 8 ? ONLY_F64 : ONLY_F32)
#endif
#define EXACT (sizeof(real) == 8 ? 1e-12 : 2e-5)        // rounding of a few hundred additions in this build
#define SAME_BITS 0.0                   // as a tolerance: each number has the bits of the other

// ---- what a check says ----------------------------------------------------------------------------------------------
//
// A check's text begins with the name of the method or the op that it is about, and names the tensor. Where it fails it
// also says the first wrong element, and what to open.

static char skipped[160];               // why a test cannot run here
static int checks, failures;            // of the test that runs
static double worst;                    // its largest err / tol
static const char *look_in;             // where its faults are, as a rule: the last column of tests[]

// The number of the first line of a file that holds a text, 0 where none does.
static int line_with(const char *path, const char *text)
{
    size_t bytes;
    char *file = read_file(path, &bytes), *found = strstr(file, text);
    int line = found != NULL;
    for (char *c = file; found && c < found; c++) line += *c == '\n';
    free(file);
    return line;
}

// A method that a check's text begins with, or NULL: of bat and bat-row the longer one.
static const char *method_in(const char *text)
{
    const char *found = NULL;
    for (int i = 0; i < METHODS; i++) {
        size_t n = strlen(methods[i].name);
        if (!strncmp(text, methods[i].name, n) && !isalnum(text[n]) && (!found || n > strlen(found))) found = methods[i].name;
    }
    return found;
}

// What to open: the page of the method in adapters.h, the op in ops/cpu.c, or the files that the test names.
static void where_to_look(char *where, size_t size, const char *text)
{
    const char *name = method_in(text);
    char start[80], word[40];
    int used, line;
    snprintf(where, size, "%s", look_in ? look_in : "test_all.c");
    if (name) {
        snprintf(start, sizeof start, "static void %.*s%s_", (int)strcspn(name, "+"), name, strchr(name, '+') ? "_plus" : "");
        for (char *c = start; *c; c++) if (*c == '-') *c = '_';
        line = line_with("adapters.h", start);
        if (line) snprintf(where, size, "adapters.h:%d, the page of %s", line, name);
        return;
    }
    if (!look_in || strncmp(look_in, "ops/cpu.c", 9)) return;
    for (; sscanf(text, " %30[a-z_]%n", word, &used) == 1; text += used)
        for (const char **end = (const char *[]){"_forward(", "(", NULL}; *end; end++) {
            snprintf(start, sizeof start, "void %s%s", word, *end);
            line = line_with("ops/cpu.c", start);
            if (line) { snprintf(where, size, "ops/cpu.c:%d, %s", line, word); return; }
        }
}

// Counts a failure and prints it. What to open is said once where several failures in a row lead to the same place.
static void say_failure(const char *text, const char *how)
{
    enum { MOST = 12 };
    static char before[120];
    char where[120];
    if (++failures > MOST) return;
    printf("      %s%s%s\n", text, *how ? ": " : "", how);
    where_to_look(where, sizeof where, text);
    if (failures == 1 || strcmp(where, before)) printf("        open %s\n", where);
    if (failures == MOST) printf("      … of those after it only the number is said\n");
    snprintf(before, sizeof before, "%s", where);
    if (!getenv("FIRST_FAILURE")) return;                   // dev/mutants.sh needs no more to know
    fflush(stdout);
    _exit(1);
}

// The text of a check, from its format and what follows it.
#define TEXT(text, format)                    \
    char text[4000];                          \
    va_list list;                             \
    va_start(list, format);                   \
    vsnprintf(text, sizeof text, format, list); \
    va_end(list)

// An error that may not exceed a tolerance, nor be NaN.
static void check_error(double err, double tol, const char *text, const char *how)
{
    checks++;
    if (err <= tol) worst = fmax(worst, err / tol);
    else say_failure(text, how);
}

__attribute__((format(printf, 3, 4)))
static void check(double err, double tol, const char *format, ...)
{
    TEXT(text, format);
    char how[80];
    snprintf(how, sizeof how, "%.6g, allowed %.3g", err, tol);
    check_error(err, tol, text, how);
}

// What must be true.
__attribute__((format(printf, 2, 3)))
static void expect(int ok, const char *format, ...)
{
    TEXT(text, format);
    check_error(!ok, 0, text, "");
}

// What is compared: the shape, the names of the two sides (of CPU and GPU neither is the right one), and the model that a
// flat list of its gradients is of.
typedef struct { shape shape; const char *got, *want; const model *flat; } subject;

static size_t numbers_in(shape s) { return (size_t)s.n[0] * (size_t)(s.n[1] ? s.n[1] : 1) * (size_t)(s.n[2] ? s.n[2] : 1); }

// " at [row, column]" for element i, or [batch, row, column]; of one number, nothing.
static void name_element(char *name, size_t size, size_t i, shape s)
{
    size_t b = s.n[1] ? (size_t)s.n[1] : 1, c = s.n[2] ? (size_t)s.n[2] : 1;
    *name = 0;
    if (s.n[2]) snprintf(name, size, " at [%zu, %zu, %zu]", i / (b * c), i / c % b, i % c);
    else if (s.n[1]) snprintf(name, size, " at [%zu, %zu]", i / b, i % b);
    else if (s.n[0] > 1) snprintf(name, size, " at [%zu]", i);
}

// The same for element i of all gradients of a model, which lie one behind the other.
static void name_gradient(char *name, size_t size, size_t i, const model *m)
{
    *name = 0;
    for (int j = 0; j < arrlen(m->tensors); j++) {
        const tensor *t = &m->tensors[j];
        if (t->kind != PARAM) continue;
        size_t first = (size_t)((wide *)t->grad->p - (wide *)m->grad);
        if (i < first || i - first >= elements(*t->grad)) continue;
        int used = snprintf(name, size, " in d %s", t->name);
        name_element(name + used, size - (size_t)used, i - first, t->shape);
    }
}

// The one comparison: the relative L2 distance of x to the reference y, or, where the tolerance is SAME_BITS, how many
// numbers differ. The first wrong element is the first that is further off than tol times the root mean square of y:
// were there none, the distance would be within the tolerance.
static void compare_numbers(const double *x, const double *y, subject s, double tol, const char *text)
{
    size_t n = numbers_in(s.shape), differ = 0, first = n;
    double diff = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        diff += pow(x[i] - y[i], 2);
        norm += pow(y[i], 2);
        differ += memcmp(&x[i], &y[i], sizeof *x) != 0;
    }
    double err = tol > 0 ? norm > 0 ? sqrt(diff / norm) : INFINITY : (double)differ;
    double limit = tol * sqrt(norm / (double)n);
    for (size_t i = n; i-- > 0;)
        if (tol > 0 ? !(fabs(x[i] - y[i]) <= limit) : memcmp(&x[i], &y[i], sizeof *x) != 0) first = i;

    char how[400], at[200] = "";
    int used;
    if (norm > 0 && tol > 0) used = snprintf(how, sizeof how, "off by %.3g of its length, allowed %.3g", err, tol);
    else if (tol > 0) used = snprintf(how, sizeof how, "%s: zeros alone, which shows nothing", s.want);
    else used = snprintf(how, sizeof how, "%zu of %zu numbers differ", differ, n);
    if (first < n && s.flat) name_gradient(at, sizeof at, first, s.flat);
    else if (first < n) name_element(at, sizeof at, first, s.shape);
    if (first < n)
        snprintf(how + used, sizeof how - (size_t)used, "; first%s: %s %.9g, %s %.9g", at, s.got, x[first], s.want, y[first]);
    check_error(err, tol, text, how);
}

static double *as_doubles(const wide *x, size_t n)
{
    double *y = alloc(n, sizeof *y);
    for (size_t i = 0; i < n; i++) y[i] = (double)x[i];
    return y;
}

static double *doubles(mat m)
{
    wide *x = on_host(m);
    double *y = as_doubles(x, elements(m));
    free(x);
    return y;
}

static shape shape_of(mat m) { return m.batch > 1 ? SHAPE(m.batch, m.rows, m.cols) : SHAPE(m.rows, m.cols); }

__attribute__((format(printf, 4, 5)))
static void check_mat(mat got, mat want, double tol, const char *format, ...)
{
    TEXT(text, format);
    if (elements(got) != elements(want)) {
        char how[80];
        snprintf(how, sizeof how, "has %zu numbers, expected %zu", elements(got), elements(want));
        check_error(1, 0, text, how);
        return;
    }
    double *x = doubles(got), *y = doubles(want);
    compare_numbers(x, y, (subject){shape_of(got), "got", "expected", NULL}, tol, text);
    free(x), free(y);
}

// The same for numbers of a shape on the host.
__attribute__((format(printf, 5, 6)))
static void check_wide(const wide *got, const wide *want, shape s, double tol, const char *format, ...)
{
    TEXT(text, format);
    double *x = as_doubles(got, numbers_in(s)), *y = as_doubles(want, numbers_in(s));
    compare_numbers(x, y, (subject){s, "got", "expected", NULL}, tol, text);
    free(x), free(y);
}

// The same for one number.
__attribute__((format(printf, 4, 5)))
static void check_number(double got, double want, double tol, const char *format, ...)
{
    TEXT(text, format);
    compare_numbers(&got, &want, (subject){SHAPE(1), "got", "expected", NULL}, tol, text);
}

// The gradient of all that trains, as a whole, for that of a single tensor may be zero.
__attribute__((format(printf, 4, 5)))
static void check_gradient(const model *m, const wide *want, double tol, const char *format, ...)
{
    TEXT(text, format);
    double *x = doubles(flat(m, m->grad)), *y = as_doubles(want, m->used[PARAM]);
    compare_numbers(x, y, (subject){SHAPE((int)m->used[PARAM]), "got", "expected", m}, tol, text);
    free(x), free(y);
}

// A shell command that must succeed; the text says what it means where it does not.
__attribute__((format(printf, 2, 3)))
static void shell(const char *command, const char *format, ...)
{
    TEXT(text, format);
    int status = system(command);
    expect(!status, "%s: status %d of «%s»", text, WEXITSTATUS(status), command);
}

static int has(const char *text, const char *part) { return strstr(text, part) != NULL; }

// A tensor that a step left, of a method, or of the CPU and the GPU.
static void check_snapshots(const snapshot *got, const snapshot *want, const char *got_is, const char *want_is,
    double tol, const char *text)
{
    if (got->n == want->n && !strcmp(got->name, want->name))
        compare_numbers(got->x, want->x, (subject){SHAPE((int)got->n), got_is, want_is, NULL}, tol, text);
    else expect(0, "%s: %s is %s of %zu numbers, %s is %s of %zu", text, got_is, got->name, got->n, want_is, want->name, want->n);
}

static void check_snapshot(const snapshot *got, const snapshot *want, double tol, const char *name)
{
    char text[200];
    snprintf(text, sizeof text, "%s, %s", name, want->name);
    check_snapshots(got, want, "got", "expected", tol, text);
}

// ---- which tests, and which of their cases ------------------------------------------------------------------------------

static char **words;                    // the words behind the test's name, NULL without any
static int asked_for;                   // cases of the running test that one of them means
static char nearest_case[200];          // else the case whose name comes nearest
static int edits_to_it;

static int nearness(const char *word, const char *name)
{
    char a[NAME], b[NAME];
    snprintf(a, NAME, "%s", word), snprintf(b, NAME, "%s", name);
    return edits(a, b);
}

// Is this case, which `whole` names or the words need only be a part of, kept out by the command line?
static int kept_out(const char *name, int whole)
{
    for (char **w = words; w && *w; w++) {
        if (whole ? !strcmp(name, *w) : strstr(name, *w) != NULL) {
            asked_for++;
            return 0;
        }
        int d = nearness(*w, name);
        if (*nearest_case && d >= edits_to_it) continue;
        edits_to_it = d;
        snprintf(nearest_case, sizeof nearest_case, "%.*s", (int)strcspn(name, "\n"), name);
    }
    return words != NULL;
}

static int left_out(int i) { return kept_out(methods[i].name, 1); }             // a method
static int not_asked_for(const char *name) { return kept_out(name, 0); }        // an op, or a row of a table

// ---- gradients --------------------------------------------------------------------------------------------------

// f' ≈ Σ weight f(x + at h) / (12 h)
static const struct { double at, weight; } four_points[4] = {{-2, 1}, {-1, -8}, {1, 8}, {2, -1}};

// Central differences of f at every number of x against dx: four points, so that the error is h⁴ and h may be large
// enough for rounding not to matter; and small enough that few numbers cross the bend of relu² within it.
__attribute__((format(printf, 5, 6)))
static void check_numeric(double (*f)(void *), void *context, mat x, mat dx, const char *format, ...)
{
    TEXT(text, format);
    size_t n = elements(x);
    double *numeric = alloc(n, sizeof *numeric), *analytic = doubles(dx);
    for (size_t i = 0; i < n; i++) {
        wide *at_i = (wide *)x.p + i, was = *at_i;
        double sum = 0, h = 2e-5;
        for (int k = 0; k < 4; k++) {
            *at_i = (wide)((double)was + four_points[k].at * h);
            sum += four_points[k].weight * f(context);
        }
        *at_i = was;
        numeric[i] = sum / (12 * h);
    }
    compare_numbers(analytic, numeric, (subject){shape_of(x), "got", "by differences", NULL}, 1e-7, text);
    free(numeric), free(analytic);
}

typedef struct { model *m; batch b; } stepped;
static double loss_of(void *context)
{
    stepped *s = context;
    return model_step(s->m, &s->b, 0) / s->b.targets;
}

// A small model with a method whose trainable numbers were moved off their start. The dice are left as they were found,
// so that a second call draws the same numbers.
static model *open_shaken(plan p, int which)
{
    model *m = open_small(p, which);
    rng before = dice;
    shake(m, 0.2, &dice);
    dice = before;
    return m;
}

// Tied and untied: full has another gradient of the embeddings then; that of all others is the same.
// Full fine-tuning on every kin of the small model; of the methods each on the first, on RWKV6 and on one more, in turn.
static void test_gradients(void)
{
    for (int i = 0; i < METHODS; i++)
        for (int which = 0; which < KIN && !left_out(i); which++) {
            if (i && which && which != 2 + i % (KIN - 3) && which != KIN - 1) continue;
            model *m = open_shaken(small_plan(methods[i].name), which);
            stepped s = {m, small_batch(0, 3)};
            model_step(m, &s.b, 1.0 / s.b.targets);
            for (int j = 0; j < arrlen(m->tensors); j++) {
                const tensor *t = &m->tensors[j];
                if (t->kind == PARAM)
                    check_numeric(loss_of, &s, *t->value, *t->grad, "%s, %s, d %s", methods[i].name, kin[which].name, t->name);
            }
            batch_free(&s.b), close_small(m);
        }
}

static double op_value(void *context)
{
    ((const op_case *)context)->forward();
    wide *x = on_host(op.out), *c = on_host(op.cot);
    double sum = dot(x, c, (int)elements(op.out));
    free(x), free(c);
    return sum;
}

static void test_ops(void)
{
    for (int i = 0; i < OP_CASES; i++) {
        op_case c = op_cases[i];
        if (not_asked_for(c.name)) continue;
        op_open(&c, 1, HEAD, two_spans);
        for (int j = 0; j < 3; j++)
            if (op.grad[j].p) check_numeric(op_value, &c, op.in[j], op.grad[j], "%s, d in %d", c.name, j);
        op_close();
    }
}

// A long text and a short one, and a channel that forgets at once: exp(w) of it would blow up a rounding error.
static void test_wkv_long(void)
{
    static const op_case c = {"wkv6 of 40 tokens", {{40, 8}}, {{{40, 32}}, {{8}}}, wkv_forward, wkv_backward,
        IN1 | FRONT_TO_BACK};
    static const span spans[SPANS] = {{0, 35, 0, 35}, {35, 5, 35, 5}};
    op_open(&c, 1, HEAD, spans);
    wide *x = on_host(op.in[0]);
    for (int n = 0; n < 40; n++) x[n * 32 + 24 + n % 3] = n % 7 ? 4 : 50;          // w
    put(op.in[0], x, TYPE_OF(wide));
    free(x);
    zero(op.grad[0]), zero(op.grad[1]);
    c.backward();
    for (int j = 0; j < 2; j++) check_numeric(op_value, (void *)(uintptr_t)&c, op.in[j], op.grad[j], "%s, d in %d", c.name, j);
    op_close();
}

static void test_residual_copy(void)
{
    snapshot *list = residual_results(NULL);
    for (int i = 0; i < arrlen(list); i++)
        if (!not_asked_for(list[i].name)) expect(list[i].x[0] == 1, "%s: they differ", list[i].name);
    snapshots_free(list);
}

// Every backward accumulates, none overwrites.
static void test_twice(void)
{
    for (int i = 0; i < METHODS; i++) {
        if (left_out(i)) continue;
        model *m = open_shaken(small_plan(methods[i].name), 0);
        batch b = small_batch(0, 3);
        model_step(m, &b, 0.1);
        snapshot *once = take_kinds(NULL, "d ", m, 1 << PARAM, 1);
        model_step(m, &b, 0.1);
        snapshot *twice = take_kinds(NULL, "d ", m, 1 << PARAM, 1);
        for (int j = 0; j < arrlen(once); j++) {
            for (size_t n = 0; n < once[j].n; n++) once[j].x[n] *= 2;
            check_snapshot(&twice[j], &once[j], EXACT, methods[i].name);
        }
        snapshots_free(once), snapshots_free(twice), batch_free(&b), close_small(m);
    }
}

// A step reads nothing that an earlier one left: neither activations and their gradients, nor work space, nor what lies
// between their rows.
static void test_stale_memory(void)
{
    static const enum kind overwritten[] = {ACT, STAT, WORK, AUX};
    for (int i = 0; i < METHODS; i++)
        for (int n = 0; n < KIN && !left_out(i); n++) {
            if (i && n != i % KIN) continue;
            plan p = small_plan(methods[i].name);
            p.recompute = n % 3;
            model *m = open_shaken(p, n);
            batch b = small_batch(0, 3);
            double loss = model_step(m, &b, 0.1);
            wide *first = on_host(flat(m, m->grad));
            for (int k = 0; k < 4; k++)
                memset(m->block[overwritten[k]], 0xff, m->used[overwritten[k]] * sizeof(real));         // NaN
            if (m->c.backbone->fill) m->c.backbone->fill(m);            // work space, but written only once
            zero(flat(m, m->grad));
            check_number(model_step(m, &b, 0.1), loss, SAME_BITS, "%s, %s, loss after NaN", methods[i].name, kin[n].name);
            check_gradient(m, first, SAME_BITS, "%s, %s, after NaN", methods[i].name, kin[n].name);
            free(first), batch_free(&b), close_small(m);
        }
}

// What is as wide as the rank has rows that begin at 16 bytes, in 16 bits too: LoRA's h, and every view of work space.
static void test_aligned_rows(void)
{
    model *m = open_small(small_plan("lora"), 0);
    for (int i = 0; i < arrlen(m->linears); i++)
        expect(m->linears[i]->h.cols == 5 && m->linears[i]->h.ld == 8, "lora's h has %d columns and a row of it %zu numbers",
               m->linears[i]->h.cols, m->linears[i]->h.ld);
    for (int r = 1; r < 9; r++) {
        mat work = {0};
        reserve(&work, 7, r);
        mat rows = aligned(work, 7, r);
        expect(rows.rows == 7 && rows.cols == r && rows.ld == 8, "%d columns in aligned rows: (%d, %d), and %zu numbers a row",
               r, rows.rows, rows.cols, rows.ld);
    }
    close_small(m);
}

// Three micro-batches of one row are one of three rows.
static void test_accumulation(void)
{
    for (int i = 0; i < METHODS; i++) {
        if (left_out(i)) continue;
        model *m = open_shaken(small_plan(methods[i].name), 0), *one = open_shaken(small_plan(methods[i].name), 0);
        batch b = small_batch(0, 3);
        model_step(m, &b, 1.0 / b.targets);
        for (int r = 0; r < 3; r++) {
            batch part = small_batch(r, r + 1);
            model_step(one, &part, 1.0 / b.targets);
            batch_free(&part);
        }
        for (int j = 0; j < arrlen(m->tensors); j++) {
            const tensor *t = &m->tensors[j];
            if (t->kind == PARAM) check_mat(*one->tensors[j].grad, *t->grad, EXACT, "%s, d %s", methods[i].name, t->name);
        }
        batch_free(&b), close_small(m), close_small(one);
    }
}

// What is not kept is computed again, to the same bits.
static void test_recompute(void)
{
    for (int i = 0; i < METHODS; i++) {
        if (left_out(i)) continue;
        const char *M = methods[i].name;
        wide *kept = NULL;
        size_t used[3];
        for (int n = 0; n < 3; n++) {
            plan p = small_plan(M);
            p.recompute = n;
            model *m = open_shaken(p, i % KIN);
            batch b = small_batch(0, 3);
            model_step(m, &b, 0.1);
            if (n) check_gradient(m, kept, SAME_BITS, "%s, --recompute %d", M, n);
            else kept = on_host(flat(m, m->grad));
            used[n] = m->used[ACT];
            batch_free(&b), close_small(m);
        }
        expect(used[2] < used[1] && used[1] < used[0], "%s: activations take %zu, %zu, %zu", M, used[0], used[1], used[2]);
        free(kept);
    }
}

// ---- splits of the same rows ----------------------------------------------------------------------------------------
//
// Hundreds of tiny models, rows and options by chance: whatever the plan, every split of a step's rows into micro-batches
// gives the loss and the gradient of the rows together, and scoring answers in between changes nothing. build/test_asan runs
// this under AddressSanitizer, so that a write beyond a plan is seen where it happens.

static int between(int least, int most) { return least + (int)(rng_next(&dice) % (uint64_t)(most - least + 1)); }

// A tiny Llama, or one of its kin, of random sizes, as a directory in the scratch space. It is two numbers wide at least: of
// one number RMSNorm leaves ±1, and the gradient behind it is 1e-12 of rounding.
static char *tiny_model(void)
{
    static const char *const format =
        "{\"hidden_size\": %d, \"intermediate_size\": %d, \"num_hidden_layers\": %d, "
        "\"num_attention_heads\": %d, \"num_key_value_heads\": %d, \"head_dim\": %d, \"vocab_size\": %d, "
        "\"rms_norm_eps\": 1e-5, \"tie_word_embeddings\": %s, %s}";
    static const char *const families_drawn[] = {
        "\"model_type\": \"llama\"", "\"model_type\": \"llama\", \"attention_bias\": true, \"mlp_bias\": true",
        "\"model_type\": \"mistral\", \"sliding_window\": 3", "\"model_type\": \"qwen3\", \"attention_bias\": true",
        "\"model_type\": \"qwen2\", \"use_sliding_window\": true, \"sliding_window\": 2, \"max_window_layers\": 1"};
    static const char *const rwkv6_format =
        "{\"model_type\": \"rwkv6\", \"hidden_size\": %d, \"intermediate_size\": %d, \"num_hidden_layers\": %d, "
        "\"head_size\": %d, \"attention_hidden_size\": %d, \"vocab_size\": %d, \"time_mix_extra_dim\": %d, "
        "\"time_decay_extra_dim\": %d}";
    static int made;
    char name[32], text[600];
    snprintf(name, sizeof name, "tiny%d", made++);
    char *dir = in_scratch(name), *path = in_scratch("tiny.json");
    int head = between(2, 5);
    if (made % 6 == 0) {
        snprintf(text, sizeof text, rwkv6_format, between(2, 20), between(1, 24), between(1, 3), head, head * between(1, 3),
            between(3, 40), between(1, 4), between(1, 4));
        write_text(path, text);
        write_model(dir, path, 0.4, TYPE_OF(wide));
        free(path);
        return dir;
    }
    int kv = between(1, 3), group = between(1, 3);
    snprintf(text, sizeof text, format, between(2, 20), between(1, 24), between(1, 3), kv * group, kv, 2 * between(1, 3),
        between(3, 40), between(0, 1) ? "true" : "false", families_drawn[between(0, 4)]);
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

// One step of these rows, in micro-batches of opt.batch; the gradient is left in r->m. `start`: what the adapter begins
// with, or NULL to make a start, which comes back in the list. Before the step, `scored` validation rows are answered.
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

// A tiny model with rows of its own: one step of all rows together, then two steps that split them in some way.
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
    wide *gradient = on_host(flat(&whole.m, whole.m.grad));
    for (int i = 0; i < 2; i++) {
        opt.batch = i ? between(1, n) : 1;
        p.recompute = between(0, 2);
        omp_set_num_threads(between(1, 3));
        parts = whole;
        split_step(&parts, p, scored, start, &part_loss, &part_eval);
        snprintf(what, sizeof what, "%s, case %d, %d rows by %d", p.method->name, number, n, opt.batch);
        check_number(part_loss, loss, 1e-12, "%s: loss", what);
        check_number(part_eval, eval, 1e-12, "%s: eval loss", what);
        check_gradient(&parts.m, gradient, 1e-10, "%s: gradient", what);
        model_free(&parts.m);
    }
    snapshots_free(start);
    model_free(&whole.m);
    free_rows(&whole.train);
    free_rows(&whole.val);
    free(gradient), free(c.text), free(dir);
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

// Step 0 is the base's, and yet the gradient leads somewhere: with it the loss falls at once, which it could not do from
// a start that is a fixed point, as A = B = 0 is.
static void test_zero_start(void)
{
    for (int i = 0; i < METHODS; i++) {
        if (left_out(i)) continue;
        const char *M = methods[i].name;
        model *m = open_small(small_plan(M), 0), *base = open_small(base_only(), 0);
        batch b = small_batch(0, 3);
        mat x = all_logits(m, &b), y = all_logits(base, &b);
        check_mat(x, y, EXACT, "%s, logits of step 0", M);
        double before = model_step(m, &b, 1.0 / b.targets);
        update(m, 1, 1e-3, gradient_norm(m));
        check(model_step(m, &b, 0) / before, 0.999, "%s, loss after the first step over the one before it", M);
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
            l->method->init(m, l, l->is.name);
        }
        batch b = small_batch(0, 3);
        mat x = all_logits(m, &b), y = all_logits(base, &b);
        check_mat(x, y, EXACT, "dora, logits of step 0");
        double first = model_step(m, &b, 0), last = first;
        for (int s = 0; s < 5; s++) {
            zero(flat(m, m->grad));
            last = model_step(m, &b, 1.0 / b.targets);
            double norm = gradient_norm(m);
            expect(isfinite(last) && isfinite(norm), "dora, step %d: loss %g, norm of the gradient %g", s + 1, last, norm);
            update(m, s + 1, 1e-3, norm);
        }
        check(last / first, 1, "dora, loss after five steps over the first");
        for (int j = 0; j < 14; j++) {
            expect(isfinite(sum_of_squares(merged(m, m->linears[j]))), "dora, merged %s: not finite",
                m->linears[j]->is.name);
            dev_free(W[j].p);
        }
        dev_free(x.p), dev_free(y.p), batch_free(&b), close_small(m), close_small(base);
    }
}

static void test_merge(void)
{
    for (int i = 1; i < METHODS; i++) {
        if (left_out(i)) continue;
        model *m = open_shaken(small_plan(methods[i].name), 0), *base = open_small(base_only(), 0);
        mat W[14];
        for (int j = 0; j < 14; j++) {
            linear *l = base->linears[j];
            W[j] = like(l->W);
            copy(W[j], merged(m, m->linears[j]));
            l->W = W[j];
        }
        batch b = small_batch(0, 3);
        mat x = all_logits(m, &b), y = all_logits(base, &b);
        check_mat(x, y, 10 * EXACT, "%s, logits", methods[i].name);
        for (int j = 0; j < 14; j++) dev_free(W[j].p);
        dev_free(x.p), dev_free(y.p), batch_free(&b), close_small(m), close_small(base);
    }
}

// What the definitions read: a layer's numbers on the host. P is D, or B where there is an A.
typedef struct {
    const char *method;
    const linear *l;
    int in, out, r;
    wide *W, *P, *A, *mag;
} layer_numbers;

// ΔW[o, i] as the papers write it, one element at a time.
static double frozen_delta(const layer_numbers *n, int o, int i) { return (double)n->P[o * n->in + i]; }
static double bone_delta(const layer_numbers *n, int o, int i) { return (double)n->P[i % n->r * n->out + o]; }

static double mini_delta(const layer_numbers *n, int o, int i)
{
    int cols = n->l->D.cols;
    return (double)n->P[i % n->r * cols + o % cols];
}

// W_ij B + B, with B of block row o / r or of block column i / r.
static double bat_block(const layer_numbers *n, int block, int o, int i)
{
    int r = n->r;
    const wide *B = n->P + block * r * r;
    double sum = (double)B[o % r * r + i % r];
    for (int c = 0; c < r; c++) sum += (double)n->W[o * n->in + i / r * r + c] * (double)B[c * r + i % r];
    return sum;
}

static double bat_delta(const layer_numbers *n, int o, int i) { return bat_block(n, o / n->r, o, i); }
static double bat_row_delta(const layer_numbers *n, int o, int i) { return bat_block(n, i / n->r, o, i); }

// Of the small model every block has a B of its own.
static double bat_free_delta(const layer_numbers *n, int o, int i)
{
    return bat_block(n, o / n->r * (n->in / n->r) + i / n->r, o, i);
}

// s (B A − B0 A0), s = α/r or α/√r, α = 7. B0 A0 is the start that pissa, olora and lora-ga subtract.
static double lora_delta(const layer_numbers *n, int o, int i)
{
    double sum = 0;
    for (int c = 0; c < n->r; c++) {
        sum += (double)n->P[o * n->r + c] * (double)n->A[c * n->in + i];
        if (n->l->A0.p) sum -= (double)ROW(n->l->B0, o)[c] * (double)ROW(n->l->A0, c)[i];
    }
    return 7 / (strcmp(n->method, "rslora") ? (double)n->r : sqrt(n->r)) * sum;
}

// m_o V_o / ‖V_o‖ − W_o, V = W + s B A.
static double dora_delta(const layer_numbers *n, int o, int i)
{
    double length = 0, w = (double)n->W[o * n->in + i];
    for (int e = 0; e < n->in; e++) length += pow((double)n->W[o * n->in + e] + lora_delta(n, o, e), 2);
    return (double)n->mag[o] / sqrt(length) * (w + lora_delta(n, o, i)) - w;
}

static const struct { const char *method; double (*delta)(const layer_numbers *n, int o, int i); } definitions[] = {
    {"frozen", frozen_delta}, {"lora", lora_delta}, {"rslora", lora_delta}, {"lora+", lora_delta}, {"dora", dora_delta},
    {"pissa", lora_delta}, {"olora", lora_delta}, {"lora-ga", lora_delta}, {"bone", bone_delta}, {"mini", mini_delta},
    {"disha", mini_delta}, {"bat", bat_delta}, {"bat-row", bat_row_delta}, {"bat-free", bat_free_delta},
};
enum { DEFINITIONS = sizeof definitions / sizeof *definitions };

// Memory that was never written holds NaN.
static void fill_with_nan(mat m)
{
    for (int n = 0; n < m.rows; n++)
        for (int c = 0; c < m.cols; c++) ROW(m, n)[c] = (real)NAN;
}

// The same product with the weight W' by a method and by plain loops, each written (SET) and added (ADD).
// forward: y = x W'ᵀ, else dx = y W'.
static void check_modes(model *m, linear *l, mat x, mat W, int forward)
{
    mat y = random_mat(SHAPE(x.rows, W.rows)), from = forward ? x : y;
    for (enum mode mode = SET; mode <= ADD; mode++) {
        mat got = random_mat(SHAPE(x.rows, forward ? W.rows : W.cols)), want = like(got);
        copy(want, got);
        if (mode == SET) fill_with_nan(got);
        gemm_plain(want, from, 0, W, !forward, from.cols, 1, mode);
        if (forward) linear_forward(m, l, got, x, mode);
        else linear_backward(m, l, got, y, x, mode);
        check_mat(got, want, EXACT, "%s, %s, %s %s", m->p.method->name, l->is.name, forward ? "y" : "dx",
                  mode == SET ? "written" : "added");
        dev_free(got.p), dev_free(want.p);
    }
    dev_free(y.p);
}

// One layer: y = x (W + ΔW)ᵀ and dx = dy (W + ΔW) by plain loops over the definition.
static void definition_case(model *m, int j, double (*delta)(const layer_numbers *n, int o, int i))
{
    enum { N = 6 };
    linear *l = m->linears[j];
    const char *M = m->p.method->name;
    int out = l->W.rows, in = l->W.cols;
    mat x = random_mat(SHAPE(N, in)), Wd = random_mat(SHAPE(out, in));
    layer_numbers n = {M, l, in, out, l->D.p ? l->D.rows : l->B.cols, on_host(l->W), on_host(l->D.p ? l->D : l->B),
                       l->A.p ? on_host(l->A) : NULL, l->mag.p ? on_host(l->mag) : NULL};
    for (int o = 0; o < out; o++)
        for (int c = 0; c < in; c++) ROW(Wd, o)[c] = (real)((double)n.W[o * in + c] + delta(&n, o, c));
    l->h.rows = l->z.rows = N;
    l->first = l->last = 1;             // nobody else reads this x
    check_modes(m, l, x, Wd, 1);
    check_modes(m, l, x, Wd, 0);
    check_mat(merged(m, l), Wd, EXACT, "%s, %s, merge", M, l->is.name);
    for (wide **p = (wide *[]){n.W, n.P, n.A, n.mag}, **end = p + 4; p < end; p++) free(*p);
    dev_free(x.p), dev_free(Wd.p);
}

static plan corner_plan(const char *method_name, const int pair[2]);

// Bone's shards, Bat-row's factors and the merges all equal it.
static void test_definition(void)
{
    for (int i = 1; i < METHODS; i++) {
        if (left_out(i)) continue;
        const char *M = methods[i].name;
        int d = 0;
        while (d < DEFINITIONS && strcmp(definitions[d].method, M)) d++;
        expect(d < DEFINITIONS, "%s: definitions[] in test_all.c has no row for it, so its forward and merge are not checked", M);
        if (d == DEFINITIONS) continue;
        model *m = open_shaken(small_plan(M), 0);
        for (int j = 0; j < 7; j++) definition_case(m, j, definitions[d].delta);
        close_small(m);
    }
    for (int which = 0; which < 3; which++) {           // DiSHA: Bone's transpose; one row, one column
        static const int pairs[3][2] = {{IN_SIDE, 5}, {1, 7}, {3, 1}};
        model *m = open_shaken(corner_plan("disha", pairs[which]), 0);
        for (int j = 0; j < 7 && !not_asked_for("disha"); j++) definition_case(m, j, mini_delta);
        close_small(m);
    }
}

// A corner of DiSHA or of Bat's groupings, and the method that stands there: with the same numbers the same loss and the same
// gradient. Frozen's ΔW (out, in) is D (in, out) on its side.
static mat as_corner(const linear *l, mat own, const char *corner)
{
    if (strcmp(corner, "frozen")) return own;
    mat turned = like(mat_of(NULL, own.type, SHAPE(own.cols, own.rows)));
    for (int i = 0; i < own.rows; i++)
        for (int j = 0; j < own.cols; j++) ROW(turned, j)[i] = ROW(own, i)[j];
    (void)l;
    return turned;
}

static const struct { const char *method, *corner; int pair[2]; } corners[] = {
    {"disha", "bone", {5, OUT_SIDE}}, {"disha", "mini", {5, 4}}, {"disha", "frozen", {IN_SIDE, OUT_SIDE}},
    {"bat-free", "bat", {OUT_SIDE, 1}}, {"bat-free", "bat-row", {1, IN_SIDE}},
};
enum { CORNERS = sizeof corners / sizeof *corners };

static plan corner_plan(const char *method_name, const int pair[2])
{
    plan p = small_plan(method_name);
    memcpy(strcmp(method_name, "disha") ? p.groups : p.shard, pair, sizeof p.shard);
    return p;
}

static void test_corners(void)
{
    for (int i = 0; i < CORNERS; i++)
        for (int which = 0; which < KIN; which += KIN - 1) {
            const char *C = corners[i].corner;
            if (not_asked_for(C)) continue;
            model *m = open_shaken(corner_plan(corners[i].method, corners[i].pair), which);
            model *corner = open_small(small_plan(C), which);
            batch b = small_batch(0, 3);
            for (int j = 0; j < arrlen(m->linears); j++) {
                const linear *l = m->linears[j], *k = corner->linears[j];
                copy(l->D.p ? k->D : k->B, as_corner(l, l->D.p ? l->D : l->B, C));
            }
            double loss = model_step(m, &b, 1.0 / b.targets), want = model_step(corner, &b, 1.0 / b.targets);
            check_number(loss, want, EXACT, "%s, %s, loss", C, kin[which].name);
            for (int j = 0; j < arrlen(m->linears); j++) {
                const linear *l = m->linears[j], *k = corner->linears[j];
                check_mat(as_corner(l, l->D.p ? l->dD : l->dB, C), l->D.p ? k->dD : k->dB, 10 * EXACT, "%s, %s, gradient of %s",
                    C, kin[which].name, l->is.name);
                check_mat(merged(m, m->linears[j]), merged(corner, corner->linears[j]), EXACT, "%s, %s, merged %s", C,
                    kin[which].name, l->is.name);
            }
            batch_free(&b), close_small(m), close_small(corner);
        }
}

// Of what rank a matrix is: elimination with the largest number of what is left as pivot.
static int rank_of(double *x, int rows, int cols)
{
    int rank = 0;
    double first = 0;
    for (; rank < rows && rank < cols; rank++) {
        int r = rank, c = rank;
        for (int i = rank; i < rows; i++)
            for (int j = rank; j < cols; j++)
                if (fabs(x[i * cols + j]) > fabs(x[r * cols + c])) r = i, c = j;
        double pivot = x[r * cols + c];
        if (!rank) first = fabs(pivot);
        if (fabs(pivot) <= 1e-9 * first || pivot == 0) break;
        for (int j = 0; j < cols; j++) {
            double held = x[r * cols + j];
            x[r * cols + j] = x[rank * cols + j], x[rank * cols + j] = held;
        }
        for (int i = 0; i < rows; i++) {
            double held = x[i * cols + c];
            x[i * cols + c] = x[i * cols + rank], x[i * cols + rank] = held;
        }
        for (int i = rank + 1; i < rows; i++) {
            double factor = x[i * cols + rank] / pivot;
            for (int j = rank; j < cols; j++) x[i * cols + j] -= factor * x[rank * cols + j];
        }
    }
    return rank;
}

// The rank of ΔW = W' − W, with random numbers in the adapter. 0: as high as W's shape allows.
static void test_rank(void)
{
    static const struct { const char *method; int pair[2], rank; } cases[] = {
        {"lora", {0, 0}, 5}, {"bone", {0, 0}, 5}, {"mini", {0, 0}, 4}, {"frozen", {0, 0}, 0}, {"bat", {0, 0}, 0},
        {"bat-row", {0, 0}, 0}, {"disha", {5, OUT_SIDE}, 5}, {"disha", {IN_SIDE, 5}, 5}, {"disha", {5, 4}, 4},
        {"disha", {3, 7}, 3}, {"disha", {1, OUT_SIDE}, 1}, {"disha", {IN_SIDE, 1}, 1}, {"disha", {IN_SIDE, OUT_SIDE}, 0},
        {"bat-free", {1, 1}, 0}, {"bat-free", {OUT_SIDE, IN_SIDE}, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (not_asked_for(cases[i].method)) continue;
        model *m = open_shaken(cases[i].pair[0] ? corner_plan(cases[i].method, cases[i].pair) : small_plan(cases[i].method), 0);
        for (int j = 0; j < SEVEN; j++) {
            linear *l = m->linears[j];
            int rows = l->W.rows, cols = l->W.cols, most = rows < cols ? rows : cols;
            double *W = doubles(l->W), *x = doubles(merged(m, l));
            for (int k = 0; k < rows * cols; k++) x[k] -= W[k];
            int rank = rank_of(x, rows, cols), want = cases[i].rank && cases[i].rank < most ? cases[i].rank : most;
            expect(rank == want, "%s %dx%d, %s: ΔW has rank %d, expected %d", cases[i].method, cases[i].pair[0], cases[i].pair[1],
                l->is.name, rank, want);
            free(W), free(x);
        }
        close_small(m);
    }
}

// The same gradient over the same matrices, and so the norm that is logged; lora-ga looks at it, too.
static void test_frozen_is_full(void)
{
    model *frozen = open_small(small_plan("frozen"), 0), *full = open_small(small_plan("full"), 0);
    model *ga = open_small(small_plan("lora-ga"), 0);
    batch b = small_batch(0, 3), parts[2] = {small_batch(0, 1), small_batch(1, 3)};
    double squares = 0;
    model_step(frozen, &b, 1.0 / b.targets), model_step(full, &b, 1.0 / b.targets);
    for (int j = 0; j < 14; j++) {
        mat dW = full->linears[j]->dW;
        squares += sum_of_squares(dW);
        check_mat(frozen->linears[j]->dD, dW, EXACT, "frozen, layer %d %s", j / SEVEN, full->linears[j]->is.name);
        if (j % SEVEN == 0) {                                           // of both layers, then of the second alone
            first_gradient_free(ga);
            expect(first_gradient(ga, j / SEVEN, parts, 2) == 2, "two small layers at once");
        }
        check_mat(ga->linears[j]->dW, dW, 10 * EXACT, "lora-ga, first gradient of layer %d %s", j / SEVEN,
            full->linears[j]->is.name);
    }
    first_gradient_free(ga);
    check_number(gradient_norm(frozen), sqrt(squares), EXACT, "frozen, norm");
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

static void svd_free(svd f) { free(f.U), free(f.sigma), free(f.V); }

// The r largest singular values are these, and the vectors of each side are orthonormal, but where σ is 0: there is
// nothing to be right about.
static void svd_case(const char *name, mat W, const double *want, int r)
{
    svd f = svd_top(W, r, (rng){7});
    for (int i = 0; i < r; i++)
        if (want[i] > 0)
            check_number((double)f.sigma[i], want[i], sizeof(real) == 8 ? 1e-12 : 1e-5, "%s, σ_%d", name, i + 1);
        else check(f.sigma[i], EXACT, "%s, σ_%d", name, i + 1);
    for (int i = 0; i < r && want[i] > 0; i++)
        for (int j = 0; j <= i; j++) {
            double v = dot(f.V + (size_t)i * (size_t)W.cols, f.V + (size_t)j * (size_t)W.cols, W.cols);
            double u = dot(f.U + (size_t)i * (size_t)W.rows, f.U + (size_t)j * (size_t)W.rows, W.rows);
            check(fabs(v - (i == j)), EXACT, "%s, V row %d times %d, off by", name, i, j);
            check(fabs(u - (i == j)), EXACT, "%s, U row %d times %d, off by", name, i, j);
        }
    svd_free(f);
}

// H (n, n) = I − 2 v vᵀ / vᵀv: orthonormal vectors that are known to the last digit.
static double *reflection(int n)
{
    double *H = alloc((size_t)n * (size_t)n, sizeof *H), squares = 0;
    for (int k = 0; k < n; k++) squares += (1 + k % 3) * (1 + k % 3);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) H[i * n + j] = (i == j) - 2.0 * (1 + i % 3) * (1 + j % 3) / squares;
    return H;
}

// W = Σ_k σ_k u_k v_kᵀ with u and v of two reflections, so that σ is known.
static void svd_of_known(const char *name, int out, int in, int count, int r, double (*sigma)(int k))
{
    mat W = random_mat(SHAPE(out, in));
    double want[64], *U = reflection(out), *V = reflection(in);
    for (int i = 0; i < out; i++)
        for (int j = 0; j < in; j++) {
            double sum = 0;
            for (int k = 0; k < count; k++) sum += sigma(k) * U[i * out + k] * V[j * in + k];     // H is symmetric
            ROW(W, i)[j] = (real)sum;
        }
    for (int k = 0; k < r; k++) want[k] = sigma(k);
    svd_case(name, W, want, r);
    dev_free(W.p);
    free(U), free(V);
}

// Rows that share all but a small part: one pass of Gram-Schmidt would leave them crooked by rounding over that part.
static void check_nearly_parallel(void)
{
    enum { ROWS = 8, N = 50 };
    double part = sizeof(wide) == 8 ? 1e-6 : 1e-3;
    wide x[ROWS * N], one[ROWS * ROWS] = {0}, products[ROWS * ROWS];
    mat on = on_device(ROWS, N);
    for (int i = 0; i < ROWS * N; i++) x[i] = (wide)(1 + part * rng_normal(&dice));
    put(on, x, TYPE_OF(wide));
    orthonormal(on, 0, ROWS);
    get(x, on);
    dev_free(on.p);
    for (int i = 0; i < ROWS; i++) {
        one[i * ROWS + i] = 1;
        for (int j = 0; j < ROWS; j++) products[i * ROWS + j] = (wide)dot(x + i * N, x + j * N, N);
    }
    check_wide(products, one, SHAPE(ROWS, ROWS), EXACT, "orthonormal, Q Qᵀ of nearly parallel rows");
}

// Four σ, then one that is nearly the fourth: with no more than these four rows it would take hundreds of rounds.
static double close_behind(int k) { return k < 4 ? 2 - 0.25 * k : k == 4 ? 1.24 : 0.5 / k; }

// The first is there at once; whoever asks it alone whether the others are stops too early.
static double one_far_ahead(int k) { return k == 0 ? 10 : k < 4 ? 2 - 0.25 * k : 0.8; }

// Singular values of LAPACK, then those of matrices that were made of them.
static double falling_slowly(int k) { return 1 - k / 500.0; }
static double falling_more_slowly(int k) { return 1 - k / 5000.0; }

// More vectors share one σ than a block has rows, among others and alone; and there are fewer than are asked for.
static double many_alike(int k) { return k < 60 ? 2 : 1 - k / 500.0; }
static double all_alike(int k) { return k < 200 ? 2 : 0; }
static double few(int k) { return k < 5 ? 2 - 0.25 * k : 0; }

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
        double want[64];
        for (int i = 0; i < r; i++) want[i] = json_number_value(json_array_get(item, (size_t)i));
        svd_case(size, W, want, r);
        dev_free(W.p);
    }
    json_decref(json);
    free(text);
    svd_of_known("close behind", 60, 50, 30, 4, close_behind);              // small enough for one block
    svd_of_known("one far ahead", 60, 50, 30, 4, one_far_ahead);
    svd_of_known("close behind, in rounds", 230, 210, 200, 4, close_behind);
    svd_of_known("one far ahead, in rounds", 230, 210, 200, 4, one_far_ahead);
    svd_of_known("falling slowly", 230, 210, 200, 20, falling_slowly);
    // In float the sum is right to 1e-6 or so when it ends, and a single σ may lack more than is allowed.
    if (sizeof(real) == 8) svd_of_known("falling more slowly", 400, 380, 380, 20, falling_more_slowly);
    svd_of_known("many alike", 330, 310, 300, 64, many_alike);
    svd_of_known("all alike", 200, 230, 200, 36, all_alike);
    svd_of_known("few", 230, 210, 5, 20, few);
    check_nearly_parallel();
}

// What pissa leaves of W, W − s B0 A0, begins with the next singular value of W.
static void check_rest(model *m, linear *l, mat W, const char *name)
{
    int r = m->p.rank;
    mat residual = like(W);
    copy(residual, W);
    matmul_nn(residual, l->B0, l->A0, -l->scale, ADD);
    svd whole = svd_top(W, r + 1, (rng){1}), rest = svd_top(residual, 1, (rng){1});
    check_number((double)rest.sigma[0], (double)whole.sigma[r], 1e3 * EXACT, "pissa, σ_1 of what it leaves of %s", name);
    svd_free(whole), svd_free(rest);
    dev_free(residual.p);
}

// A begins uniform in ±1/√in, kaiming-uniform with a = √5 (torch.nn.init.kaiming_uniform_): its bounds are reached and
// never passed, its mean is 0 and its variance 1/(3 in). B begins at 0. No two matrices begin alike.
static void test_lora_start(void)
{
    for (const char **name = (const char *[]){"lora", "rslora", "lora+", "dora", NULL}; *name; name++) {
        plan p = small_plan(*name);
        p.rank = 64;                    // enough numbers for their statistics
        model *m = open_small(p, 0);
        wide first = 0;
        for (int j = 0; j < 14; j++) {
            const linear *l = m->linears[j];
            size_t n = elements(l->A);
            wide *a = on_host(l->A), *b = on_host(l->B);
            double bound = 1 / sqrt(l->A.cols), most = 0, sum = 0, squares = 0, zeros = 0;
            for (size_t i = 0; i < n; i++) {
                most = fmax(most, fabs((double)a[i]));
                sum += (double)a[i];
                squares += (double)a[i] * (double)a[i];
            }
            for (size_t i = 0; i < elements(l->B); i++) zeros += b[i] == 0;
            check(most / bound, 1 + EXACT, "%s, of linear %d: the largest of A over its bound", *name, j);
            check(1 - most / bound, 20 / (double)n, "%s, of linear %d: the bound is reached", *name, j);
            check(fabs(sum / (double)n) / bound, 5 / sqrt(3.0 * (double)n), "%s, of linear %d: mean of A", *name, j);
            check(fabs(3 * squares / (double)n / (bound * bound) - 1), 5 * sqrt(0.8 / (double)n),
                "%s, of linear %d: variance of A", *name, j);
            expect(zeros == (double)elements(l->B), "%s, of linear %d: B is not zero", *name, j);
            expect(!j || first != a[0], "%s: linears %d and %d begin alike", *name, j - 1, j);
            first = a[0];
            free(a);
            free(b);
        }
        close_small(m);
    }
}

// A tensor of the open file, on the host.
static wide *stored_numbers(checkpoint *c, const char *module, const char *ending, int *rows, int *cols)
{
    char name[160];
    snprintf(name, sizeof name, "base_model.model.model.layers.%s.%s", module, ending);
    ptrdiff_t at = shgeti(c->tensors, name);
    if (at < 0) die("%s is not in the file", name);
    mat m = c->tensors[at].value.data;
    *rows = m.rows;
    *cols = m.cols;
    return on_host(m);
}

// Where the value of this field begins.
static const char *value_in(const char *json, const char *field)
{
    char key[64];
    snprintf(key, sizeof key, "\"%s\":", field);
    const char *at = strstr(json, key);
    if (!at) die("no \"%s\" in %s", field, json);
    return at + strlen(key) + strspn(at + strlen(key), " \t");
}

// What is saved of LoRA's kin is the trained function as PEFT reads it, by its own formula, W + lora_alpha/r B A (r's
// root with use_rslora), on the untouched W, from nothing but the two files.
static void test_saved_lora(void)
{
    for (int i = 0; i < METHODS; i++) {
        if (!methods[i].peft_type || strcmp(methods[i].peft_type, "LORA") || !strcmp(methods[i].name,
            "dora")) continue;
        model *m = open_small(small_plan(methods[i].name), 0), *base = open_small(base_only(), 0);
        shake(m, 0.2, &dice);
        char name[32];
        size_t bytes;
        snprintf(name, sizeof name, "saved-%s", methods[i].name);
        char *dir = in_scratch(name);
        stage_begin(dir);
        peft_write(m, "base");
        stage_publish(&(place_of_result){.path = dir});
        char *path = join(dir, "adapter_config.json"), *json = read_file(path, &bytes);
        int rank = atoi(value_in(json, "r")), root = *value_in(json, "use_rslora") == 't';
        double s = atof(value_in(json, "lora_alpha")) / (root ? sqrt(rank) : rank);
        checkpoint c = checkpoint_open(dir, "adapter_model");
        expect(shlen(c.tensors) == 2 * 14, "%s: %td tensors", methods[i].name, shlen(c.tensors));
        for (int j = 0; j < 14; j++) {
            char module[64];
            int r, in, out, width;
            snprintf(module, sizeof module, "%d.%s", j / SEVEN, m->linears[j]->is.module);
            wide *A = stored_numbers(&c, module, "lora_A.weight", &r, &in), *B = stored_numbers(&c, module,
                "lora_B.weight", &out, &width);
            wide *W = on_host(base->linears[j]->W), *want = on_host(merged(m, m->linears[j]));
            expect(r == rank && width == rank,
                "%s, %s: A has %d rows, B %d columns, r is %d", methods[i].name, module, r, width, rank);
            for (int o = 0; o < out; o++)
                for (int k = 0; k < in; k++) {
                    double sum = 0;
                    for (int n = 0; n < r; n++) sum += (double)B[o * r + n] * (double)A[n * in + k];
                    W[o * in + k] += (wide)(s * sum);
                }
            check_wide(W, want, SHAPE(out, in), 10 * EXACT, "%s, %s as it is saved", methods[i].name, module);
            free(A), free(B), free(W), free(want);
        }
        checkpoint_close(&c), free(json), free(path), free(dir), close_small(m), close_small(base);
    }
}

// A start adds nothing: W, less the start, and the start together are W.
static void test_residual(void)
{
    for (int i = 0; i < METHODS; i++) {
        if (!methods[i].has_start || left_out(i)) continue;
        model *m = open_small(small_plan(methods[i].name), 0), *base = open_small(base_only(), 0);
        for (int j = 0; j < 14; j++) {
            char name[40];
            mat W = base->linears[j]->W;
            snprintf(name, sizeof name, "layer %d %s", j / SEVEN, m->linears[j]->is.name);
            check_mat(merged(m, m->linears[j]), W, EXACT, "%s, %s", methods[i].name, name);
            if (!strcmp(methods[i].name, "pissa")) check_rest(m, m->linears[j], W, name);
        }
        close_small(m), close_small(base);
    }
}

// The loss of a model with an adapter, or of the model alone, as --eval opens them.
static double loss_of_files(const char *dir, const char *adapter, const batch *b)
{
    model m = {0};
    opt.model = dir;
    opt.adapter = adapter;
    plan p = plan_for_use();
    p.tokens = 32;
    p.positions = 16;
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
    check_number(model_step(&m, b, 0) / b->targets, before, EXACT / 2, "%s, %s, loss of step 0", M, dir);
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
    stage_begin(out), peft_write(&m, dir), stage_publish(&(place_of_result){.path = out});
    check(after / before, 0.99, "%s, %s, loss after four steps over the first", M, dir);
    check_number(loss_of_files(dir, out, b), after, EXACT / 20, "%s, %s, loss of what was saved", M, dir);
    model_free(&m), free(out);
}

static void test_bf16_start(void)
{
    static const char larger[] =
        "{\"model_type\": \"llama\", \"hidden_size\": 96, \"intermediate_size\": 200, \"num_hidden_layers\": 4, "
        "\"num_attention_heads\": 8, \"num_key_value_heads\": 2, \"vocab_size\": 101}";
    char *dirs[2] = {strdup("dev/golden/base-bf16"), in_scratch("bf16")}, *config_path = in_scratch("bf16.json");
    write_text(config_path, larger);
    write_model(dirs[1], config_path, 0.14, BF16);       // 0.4 √(12/96): activations as large as the small model's
    batch b = small_batch(0, 3);
    for (int i = 0; i < 2 * METHODS; i++)
        if (methods[i / 2].has_start && !left_out(i / 2)) bf16_case(dirs[i % 2], methods[i / 2].name, &b);
    batch_free(&b), free(dirs[0]), free(dirs[1]), free(config_path);
}

// ---- attention -----------------------------------------------------------------------------------------------------

// One query row of one head: softmax(q kᵀ/√d) v over the keys that it sees.
static void plain_head_row(real *want, const real *q, const real *k, const real *v, int d, size_t ld, int seen)
{
    double p[200], sum = 0;
    for (int c = 0; c < seen; c++) {
        double score = 0;
        for (int e = 0; e < d; e++) score += (double)q[e] * (double)k[(size_t)c * ld + (size_t)e];
        p[c] = exp(score / sqrt(d));
        sum += p[c];
    }
    for (int e = 0; e < d; e++) {
        double o = 0;
        for (int c = 0; c < seen; c++) o += p[c] / sum * (double)v[(size_t)c * ld + (size_t)e];
        want[e] = (real)o;
    }
}

// By plain loops, with the key-value head that each head shares.
static void test_attention(void)
{
    enum { D = 4, HEADS = 4, GROUP_OF = 2, N = 150 };
    static const span s[2] = {{0, 130, 0, 130}, {130, 3, 130, 20}};     // the second: three new rows behind 17 cached ones
    mat q = random_mat(SHAPE(N, HEADS * D)), k = random_mat(SHAPE(N, 2 * D)), v = random_mat(SHAPE(N, 2 * D));
    mat out = like(q), want = like(q), lse = random_mat(SHAPE(N, HEADS));
    attention_forward(out, lse, q, k, v, D, INT_MAX, s, 2);
    for (int i = 0; i < 2; i++)
        for (int r = 0; r < s[i].nq; r++)
            for (int h = 0; h < HEADS; h++) {
                int n = s[i].q + r, kv = h / GROUP_OF * D;
                plain_head_row(ROW(want, n) + h * D, ROW(q, n) + h * D, ROW(k, s[i].k) + kv, ROW(v, s[i].k) + kv, D, k.ld,
                    s[i].nk - s[i].nq + r + 1);
            }
    check_mat(out, want, EXACT, "attention");
    for (mat *m = (mat[]){q, k, v, out, want, lse, {0}}; m->p; m++) dev_free(m->p);
}

// Token by token with the key-value cache gives the logits of the whole row at once.
static void cache_case(int which)
{
    plan p = base_only();
    p.cache_rows = 16;
    model *m = open_small(p, which);
    batch all = small_batch(1, 2), one = batch_new(32, 3);
    one.cached = 1;
    ask_all(&all);
    mat whole = all_logits(m, &all);
    for (int i = 0; i < all.tokens; i++) {
        one.tokens = one.targets = one.rows = 1;
        one.ids[0] = all.ids[i];
        one.pos[0] = i;
        one.spans[0] = (span){0, 1, 0, i + 1};
        mat step = all_logits(m, &one);
        check_mat(step, rows_of(whole, i, 1), EXACT, "%s, token %d", kin[which].name, i);
        dev_free(step.p);
    }
    dev_free(whole.p), batch_free(&all), batch_free(&one), close_small(m);
}

// Two texts at once, a token each a pass; the shorter one ends first.
static void two_texts_case(int which)
{
    plan p = base_only();
    p.sequences = 2;
    p.cache_rows = 32;
    model *m = open_small(p, which);
    batch all = small_batch(0, 2), step = batch_new(32, 3);
    ask_all(&all);
    mat whole = all_logits(m, &all);
    step.cached = 1;
    for (int t = 0; t < all.spans[1].nq; t++) {
        int rows[2];
        step.tokens = step.targets = step.rows = 0;
        for (int i = 0; i < 2; i++) {
            if (t >= all.spans[i].nq) continue;
            rows[step.rows] = all.spans[i].q + t;
            step.ids[step.tokens] = all.ids[rows[step.rows]];
            step.pos[step.tokens] = t;
            step.target_row[step.targets] = step.tokens;
            step.label[step.targets++] = 0;
            step.spans[step.rows++] = (span){step.tokens++, 1, m->c.backbone->has_state ? i : i * 16, t + 1};
        }
        mat logits = all_logits(m, &step);
        for (int i = 0; i < step.rows; i++)
            check_mat(rows_of(logits, i, 1), rows_of(whole, rows[i], 1), EXACT, "%s, two texts, token %d", kin[which].name, t);
        dev_free(logits.p);
    }
    dev_free(whole.p), batch_free(&all), batch_free(&step), close_small(m);
}

static void test_cache(void)
{
    for (int which = 0; which < KIN; which++) {
        if (not_asked_for(kin[which].name)) continue;
        cache_case(which);
        two_texts_case(which);
    }
}

// ---- the matrix product ---------------------------------------------------------------------------------------------

static mat as_type(mat x, enum dtype type)      // a copy in another dtype
{
    mat y = x;
    y.type = type, y.p = dev_alloc(elements(x) * 8);
    wide *w = on_host(x);
    narrow(y.p, type, w, elements(x));
    free(w);
    return y;
}

static void (*const forms[3])(mat y, mat a, mat b, double scale, enum mode) = {matmul_nt, matmul_nn, matmul_tn};
static const char *const form_names[3] = {"matmul_nt", "matmul_nn", "matmul_tn"};

// Products into the upper left of a larger matrix, whose other elements must stay.
static void matmul_case(int form, enum dtype type, int M, int N, int K, enum mode mode)
{
    mat a = form == 2 ? random_mat(SHAPE(K, M)) : random_mat(SHAPE(M, K));
    mat b0 = form ? random_mat(SHAPE(K, N)) : random_mat(SHAPE(N, K));
    mat b = as_type(b0, type), y = random_mat(SHAPE(M + 7, N + 3)), want = like(y);
    copy(want, y);
    forms[form](part_of(y, 0, M, 0, N), a, b, 0.5, mode);
    gemm_plain(part_of(want, 0, M, 0, N), a, form == 2, b, form > 0, K, (real)0.5, mode);
    check_mat(y, want, EXACT, "%s, %s, %d x %d x %d, %s", form_names[form], dtypes[type].name, M, N, K, mode == ADD ? "+=" : "=");
    dev_free(a.p), dev_free(b0.p), dev_free(b.p), dev_free(y.p), dev_free(want.p);
}

static void test_matmul(void)
{
    static const int sizes[][3] = {
        {1, 1, 1}, {6, 16, 8}, {7, 17, 300}, {5, 33, 1}, {200, 31, 257}, {13, 4100, 20}, {97, 96, 513}, {1, 300, 64},
            {325, 333, 40}, {2, 333, 1030}, {3, 37, 520}, {4, 21, 1},
            {40, 50, 321}, {40, 50, 640}, {40, 50, 641},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int n = 0; n < 3 * DTYPES * 2; n++) {
            int form = n % 3, type = n / 3 % DTYPES, mode = n / 3 / DTYPES ? ADD : SET;
            if (!not_asked_for(form_names[form]))
                matmul_case(form, (enum dtype)type, sizes[i][0], sizes[i][1], sizes[i][2], (enum mode)mode);
        }
    mat a = random_mat(SHAPE(3, 9)), b = random_mat(SHAPE(3, 11)), y = random_mat(SHAPE(9, 11)), old = random_mat(SHAPE(9, 11));
    copy(old, y);
    matmul_tn(y, rows_of(a, 0, 0), rows_of(b, 0, 0), 1, ADD);
    check_mat(y, old, SAME_BITS, "matmul_tn of no rows, added");
    matmul_tn(y, rows_of(a, 0, 0), rows_of(b, 0, 0), 1, SET);
    expect(sum_of_squares(y) == 0, "matmul_tn of no rows is not zero");
    dev_free(a.p), dev_free(b.p), dev_free(y.p), dev_free(old.p);
}

// The same bits of a product for any number of threads, and whatever else is in the batch.
static void test_same_bits(void)
{
    mat a = random_mat(SHAPE(401, 270)), b = random_mat(SHAPE(390, 270)), y[3];
    static const int threads[3] = {1, 2, 4};
    for (int i = 0; i < 3; i++) {
        omp_set_num_threads(threads[i]);
        y[i] = random_mat(SHAPE(401, 390));
        matmul_nt(y[i], a, b, 1, SET);
        check_mat(y[i], y[0], SAME_BITS, "matmul_nt, %d threads", threads[i]);
    }
    dev_free(a.p), dev_free(b.p);
    for (int i = 0; i < 3; i++) dev_free(y[i].p);
}

// --bf16: factors rounded to nearest even; of each pair the second product is added first, in float. A processor that has an
// instruction for it and one that has not give these bits: y = 0.7 a b by one fmaf a product.
static void pair_sums(int form, mat y, mat a, mat b, int K)
{
    for (int i = 0; i < y.rows; i++)
        for (int j = 0; j < y.cols; j++) {
            float sum = 0, x[2] = {0}, w[2] = {0};
            for (int k = 0; k < K; k++) {
                x[k % 2] = from_bf16(to_bf16((float)(form == 2 ? ROW(a, k)[i] : ROW(a, i)[k])));
                w[k % 2] = from_bf16(to_bf16((float)(form ? ROW(b, k)[j] : ROW(b, j)[k])));
                if (k % 2 || k == K - 1) sum = fmaf(x[0], w[0], fmaf(k % 2 ? x[1] : 0, w[1], sum));
            }
            ROW(y, i)[j] = (real)(0.7f * sum);
        }
}

// Vectors of any numbers, infinities and NaN among them (not subnormal ones, which may count for 0), and what is left over.
static void check_pair_up(int apart)
{
    enum { N = 3 * LANES + 5 };
    real x[2 * N], out[N], want[N];
    for (int round = 0; round < 500; round++) {
        for (int i = 0; i < 2 * N; i++) {
            uint32_t bits = (uint32_t)rng_next(&dice) | (i % 7 ? 1 << 23 : 0x7f << 24);
            if (i % 21 == 0) bits = (bits & 1U << 31) | 0xffU << 23;                    // infinity
            memcpy(&x[i], &bits, 4);
        }
        const real *second = x + (apart == 2 ? 1 : N);
        for (int i = 0; i < N; i++) want[i] = paired(x[i * apart], second[i * apart]);
        pair_up(out, x, second, apart, N);
        for (int i = 0; i < N; i++)
            expect(!memcmp(&out[i], &want[i], 4), "pair %d of numbers %d apart: %a and %a", i, apart, (double)x[i * apart],
                   (double)second[i * apart]);
        pair_up(x, x, second, apart, N);
        expect(!memcmp(x, want, sizeof want), "pairs in the place of numbers %d apart", apart);
    }
}

static void test_pairs(void)
{
    check_pair_up(1);
    check_pair_up(2);
    enum { M = MR + LANES + 3, N = NR + 5, K = 2 * LANES + 9 };
    mat y = random_mat(SHAPE(M, N)), want = random_mat(SHAPE(M, N)), a = {0}, b = {0};
    for (int form = 2; form >= 0; form--) {
        dev_free(a.p), dev_free(b.p);
        a = random_mat(form == 2 ? SHAPE(K + 1, M) : SHAPE(M, K)), b = random_mat(form ? SHAPE(K + 1, N) : SHAPE(N, K));
        if (form == 2) a = rows_of(a, 0, K);
        if (form) b = rows_of(b, 0, K);
        pair_sums(form, want, a, b, K);
        bf16_pairs = 1;
        forms[form](y, a, b, 0.7, SET);
        check_mat(y, want, SAME_BITS, "%s", form_names[form]);
        bf16_pairs = 0;
    }
    bf16_pairs = 1;
    matmul_nt(rows_of(y, 0, 3), rows_of(a, 0, 3), b, 0.7, SET);
    check_mat(y, want, SAME_BITS, "a product of three rows");
    bf16_pairs = 0;
    for (mat *m = (mat[]){a, b, y, want, {0}}; m->p; m++) dev_free(m->p);

    // a weight in bf16, an even number of steps: few rows read it as pairs, many widen it, with the same bits
    mat x = random_mat(SHAPE(MR, K + 1)), w = typed_mat(SHAPE(N, K + 1), BF16);
    y = random_mat(SHAPE(MR, N)), want = random_mat(SHAPE(MR, N));
    matmul_nt(y, x, w, 0.7, SET);
    for (int rows = 1; rows <= THIN; rows++) {
        matmul_nt(rows_of(want, 0, rows), rows_of(x, 0, rows), w, 0.7, SET);
        check_mat(rows_of(want, 0, rows), rows_of(y, 0, rows), SAME_BITS, "%d rows and a weight in bf16", rows);
    }
    for (mat *m = (mat[]){x, w, y, want, {0}}; m->p; m++) dev_free(m->p);
}

// A token has the same bits alone and among others: so does a scored answer, however many are answered beside it.
static void test_few_rows(void)
{
    enum { ROWS = 9, K = 2 * KC + 7, N = 3 * LANES + 5 };
    mat a = random_mat(SHAPE(ROWS, K)), start = random_mat(SHAPE(ROWS, N));
    for (int type = 0; type < DTYPES; type++)
        for (int n = 0; n < (sizeof(real) == 4 ? 4 : 2); n++) {
            enum mode mode = n % 2 ? ADD : SET;
            bf16_pairs = n >= 2;
            mat b = typed_mat(SHAPE(N, K), (enum dtype)type), all = random_mat(SHAPE(ROWS, N)), few = random_mat(SHAPE(ROWS, N));
            copy(all, start);
            matmul_nt(all, a, b, 0.7, mode);
            for (int rows = 1; rows <= THIN + 1; rows++) {
                copy(few, start);
                matmul_nt(rows_of(few, 2, rows), rows_of(a, 2, rows), b, 0.7, mode);
                check_mat(rows_of(few, 2, rows), rows_of(all, 2, rows), SAME_BITS, "%d rows, weight in %s%s%s", rows,
                    dtypes[type].name, mode == ADD ? ", added" : "", bf16_pairs ? ", pairs" : "");
                check_mat(rows_of(few, 2 + rows, 1), rows_of(start, 2 + rows, 1), SAME_BITS, "the row behind %d rows", rows);
            }
            dev_free(b.p), dev_free(all.p), dev_free(few.p);
        }
    bf16_pairs = 0;
    dev_free(a.p), dev_free(start.p);
}

// A small product reads its factors where they lie, a large one copies them first. Every form gives a corner of the large
// product the same bits when it is computed alone.
static void test_in_place(void)
{
    for (int form = 0; form < 3; form++) {
        if (not_asked_for(form_names[form])) continue;
        mat a = form == 2 ? random_mat(SHAPE(70, 401)) : random_mat(SHAPE(401, 70));
        mat b = form ? random_mat(SHAPE(70, 390)) : random_mat(SHAPE(390, 70));
        mat a1 = form == 2 ? part_of(a, 0, 70, 0, 61) : rows_of(a, 0, 61),
            b1 = form ? part_of(b, 0, 70, 0, 100) : rows_of(b, 0, 100);
        mat y = random_mat(SHAPE(401, 390)), corner_alone = random_mat(SHAPE(61, 100));
        forms[form](y, a, b, 1, SET);
        forms[form](corner_alone, a1, b1, 1, SET);
        check_mat(corner_alone, part_of(y, 0, 61, 0, 100), SAME_BITS, "%s, a corner alone", form_names[form]);
        dev_free(a.p), dev_free(b.p), dev_free(y.p), dev_free(corner_alone.p);
    }
}

static void test_exp(void)
{
    double worst_x = 0, err = 0;
    for (double x = -87; x < 87; x += 0.00317) {
        double e = fabs((double)exp_real((real)x) / exp((double)(real)x) - 1);
        if (e <= err) continue;
        err = e;
        worst_x = x;
    }
    check(err, sizeof(real) == 8 ? 1e-15 : 2.5e-7, "exp(%g), relative error", worst_x);
    expect(isnan((double)exp_real((real)NAN)), "exp(NaN) is a number");
}

static double through_f16(double x) { return (double)from_f16(to_f16((float)x)); }
static double through_bf16(double x) { return (double)from_bf16(to_bf16((float)x)); }

// Every 16-bit number survives, and rounding goes to the nearest, ties to even.
static void test_halves(void)
{
    for (int h = 0; h < 1 << 16; h++) {
        float b = from_bf16((uint16_t)h), f = from_f16((uint16_t)h);
        int is_nan = (h & 0x7c00) == 0x7c00 && (h & 0x3ff);
        if (isnan(b)) expect(isnan(from_bf16(to_bf16(b))), "bf16 0x%04x: NaN becomes a number", h);
        else expect(to_bf16(b) == h, "bf16 0x%04x: comes back as 0x%04x", h, to_bf16(b));
        expect(!isnan(f) == !is_nan, "f16 0x%04x: is %g", h, (double)f);
        if (isnan(f)) expect(isnan(from_f16(to_f16(f))), "f16 0x%04x: NaN becomes a number", h);
        else expect(to_f16(f) == h, "f16 0x%04x: comes back as 0x%04x", h, to_f16(f));
    }
    check_number(through_f16(1 + 0x1p-11), 1, SAME_BITS, "f16, a tie down");
    check_number(through_f16(1 + 0x1p-10 + 0x1p-11), 1 + 0x1p-9, SAME_BITS, "f16, a tie up");
    check_number(through_bf16(1 + 0x1p-8), 1, SAME_BITS, "bf16, a tie down");
    check_number(through_bf16(1 + 0x1p-7 + 0x1p-8), 1 + 0x1p-6, SAME_BITS, "bf16, a tie up");
    check_number(through_f16(65520), (double)INFINITY, SAME_BITS, "f16, the first that is Inf");
    check_number(through_f16(65519), 65504, SAME_BITS, "f16, the last that is not");
    check_number((double)from_f16(0x0001), 0x1p-24, SAME_BITS, "f16, the least");
}

// Three steps of PyTorch's AdamW from p along a constant gradient d, with decay 0.1 (torch.optim.AdamW's documentation).
static double plain_adamw(double p, double d)
{
    double m = 0, v = 0;
    for (int t = 1; t <= 3; t++) {
        p -= 0.01 * 0.1 * p;
        m = 0.9 * m + 0.1 * d;
        v = 0.999 * v + 0.001 * d * d;
        p -= 0.01 * (m / (1 - pow(0.9, t))) / (sqrt(v / (1 - pow(0.999, t))) + 1e-8);
    }
    return p;
}

static void test_adamw(void)
{
    mat w = random_mat(SHAPE(1, 1)), g = like(w), m = like(w), v = like(w);
    *ROW(w, 0) = (real)0.5;
    *ROW(g, 0) = (real)0.25;
    for (int t = 1; t <= 3; t++) adamw(w, g, m, v, 0.01, 0.1, 0.5, t);
    check_number((double)*ROW(w, 0), plain_adamw(0.5, 0.125), sizeof(real) == 8 ? 1e-13 : 1e-6, "adamw, three steps");

    *ROW(w, 0) = (real)0.5;             // at a millionth step nothing is left of the corrections, and nothing overflows
    zero(m);
    zero(v);
    adamw(w, g, m, v, 0.01, 0, 1, 1000000);
    double want = 0.5 - 0.01 * 0.1 * 0.25 / (sqrt(0.001 * 0.25 * 0.25) + 1e-8);
    check_number((double)*ROW(w, 0), want, sizeof(real) == 8 ? 1e-13 : 1e-6, "adamw, step 1000000");
    dev_free(w.p), dev_free(g.p), dev_free(m.p), dev_free(v.p);
}

// One step of AdamW on all that trains, written as a plain loop: clipped by the norm of all gradients, decayed, each
// tensor at the run's rate, lora+'s B at λ times it. The first step's m/√v is the gradient's sign, but for ε.
static void test_update(void)
{
    static const double decays[] = {0, 0.1}, clips[] = {0, 0.5, 1e6};
    for (int i = 0; i < METHODS; i++)
        for (int k = 0; k < 6; k++) {
            plan p = small_plan(methods[i].name);
            p.plus_ratio = 6;
            model *m = open_small(p, 0);
            shake(m, 0.2, &dice);
            batch b = small_batch(0, 3);
            model_step(m, &b, 1e-7);                    // gradients as small as ε, so that how they are clipped shows
            opt.weight_decay = decays[k % 2], opt.clip = clips[k / 2] * 1e-6;
            double norm = gradient_norm(m), limit = opt.clip / (norm + 1e-6),
                scale = opt.clip && limit < 1 ? limit : 1, lr = 0.01;
            wide **want = NULL;
            for (int j = 0; j < arrlen(m->tensors); j++) {
                const tensor *t = &m->tensors[j];
                if (t->kind != PARAM) continue;
                int faster = !strcmp(methods[i].name, "lora+") && strstr(t->name, "lora_B");
                double rate = lr * (faster ? 6 : 1);
                wide *w = on_host(*t->value), *g = on_host(*t->grad);
                for (size_t n = 0; n < elements(*t->value); n++) {
                    double x = scale * (double)g[n];
                    w[n] = (wide)((double)w[n] * (1 - rate * opt.weight_decay) - rate * x / (fabs(x) + 1e-8));
                }
                arrput(want, w);
                free(g);
            }
            update(m, 1, lr, norm);
            for (int j = 0, at = 0; j < arrlen(m->tensors); j++) {
                if (m->tensors[j].kind != PARAM) continue;
                wide *got = on_host(*m->tensors[j].value);
                check_wide(got, want[at], m->tensors[j].shape, EXACT,
                    "%s, %s, decay %g, clip %g", methods[i].name, m->tensors[j].name, opt.weight_decay, opt.clip);
                free(got), free(want[at++]);
            }
            arrfree(want), batch_free(&b), close_small(m);
        }
}

// The rate of each step by transformers 5.24: get_scheduler(name, optimizer, num_warmup_steps, num_training_steps).
static void test_schedules(void)
{
    static const struct { const char *name; int warmup, steps; double rates[10]; } cases[] = {
        {"linear",   3, 10, {0, 0.16666666666666666, 0.33333333333333331, 0.5, 0.42857142857142855,
            0.35714285714285715, 0.2857142857142857,
                             0.21428571428571427, 0.14285714285714285, 0.071428571428571425}},
        {"linear",   0, 7,  {0.5, 0.42857142857142855, 0.35714285714285715, 0.2857142857142857, 0.21428571428571427,
            0.14285714285714285,
                             0.071428571428571425}},
        {"linear",   4, 4,  {0, 0.125, 0.25, 0.375}},
        {"constant", 3, 10, {0, 0.16666666666666666, 0.33333333333333331, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5}},
            // constant_with_warmup
        {"constant", 0, 7,  {0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5}},
        {"cosine",   3, 10, {0, 0.16666666666666666, 0.33333333333333331, 0.5, 0.47524221697560476,
            0.4058724504646834, 0.30563023348907858,
                             0.19436976651092142, 0.094127549535316629, 0.024757783024395241}},
        {"cosine",   0, 7,  {0.5, 0.47524221697560476, 0.4058724504646834, 0.30563023348907858, 0.19436976651092142,
            0.094127549535316629,
                             0.024757783024395241}},
        {"cosine",   4, 4,  {0, 0.125, 0.25, 0.375}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int s = 0; s < cases[i].steps; s++) {
            opt.lr = 0.5, opt.schedule = cases[i].name, opt.warmup = cases[i].warmup;
            check(fabs(learning_rate(s, cases[i].steps) - cases[i].rates[s]), 1e-15,
                "%s, warm-up %d of %d, step %d", cases[i].name, opt.warmup, cases[i].steps, s + 1);
        }
}

// ---- every op beyond its blocks ---------------------------------------------------------------------------------------
//
// Ops work in blocks, panels, chunks and by several threads: a fault may begin in the second one. Here each op crosses all of
// its own, in views with other columns beside them, and is held to its formula in plain loops over doubles; its
// backward to central differences, too. Sizes are named by the blocks that they cross.

static struct { double *out, *cot, *in[3], *grad[3]; } plain;       // what the loops read and find; grad is what the op adds

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

static void plain_bias(void)            // out = x + b,  db = Σ_n dy
{
    for (int n = 0, C = op.out.cols; n < op.out.rows; n++)
        for (int c = 0; c < C; c++) {
            plain.out[n * C + c] = plain.in[0][n * C + c] + plain.in[1][c];
            plain.grad[0][n * C + c] = plain.cot[n * C + c];
            plain.grad[1][c] += plain.cot[n * C + c];
        }
}

static void plain_blocks(void)          // out = x
{
    for (size_t i = 0; i < elements(op.out); i++) {
        plain.out[i] = plain.in[0][i];
        plain.grad[0][i] = plain.cot[i];
    }
}

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
        for (int c = 0; c < C; c++) {
            squares += x[c] * x[c];
            along += g[c] * w[c] * x[c];
        }
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
        p[c] = exp(score / sqrt(d));
        sum += p[c];
    }
    for (int c = 0; c < seen; c++) {
        p[c] /= sum;
        dp[c] = 0;
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
            for (int h = 0; h < cols / op_head; h++) {
                int at = (s->q + r) * cols + h * op_head, kv = s->k * kv_cols + h / group * op_head;
                int seen = s->nk - s->nq + r + 1, unseen = seen > op_window ? seen - op_window : 0;
                plain_attention_row(at, kv + unseen * kv_cols, kv_cols, seen - unseen);
            }
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

// With W = I + the diagonal of the B_jᵀ: x̃ = x W, and Σ_j u_j beside it.
static void plain_block_diagonal(void)
{
    for (int n = 0, C = op.in[0].cols, r = op.in[1].rows, across = C + r; n < op.out.rows; n++)
        for (int i = 0; i < C; i++) {
            plain.out[n * across + i] += plain.in[0][n * C + i];
            plain.grad[0][n * C + i] += plain.cot[n * across + i];
            for (int c = 0; c < r; c++) {
                int from = i / r * r + c, b = i * r + c;            // of x, and of B
                double u = plain.in[0][n * C + from] * plain.in[1][b];
                double du = plain.cot[n * across + i] + plain.cot[n * across + C + i % r];
                plain.out[n * across + i] += u;
                plain.out[n * across + C + i % r] += u;
                plain.grad[1][b] += du * plain.in[0][n * C + from];
                plain.grad[0][n * C + from] += du * plain.in[1][b];
            }
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

static void plain_layernorm(int groups)     // out = w x̂ + b,  dout_e/dx_c = w_e ρ ([e = c] − 1/C − x̂_e x̂_c/C)
{
    int C = op.in[0].cols / groups;
    for (int g = 0; g < op.in[0].rows * groups; g++) {
        const double *x = plain.in[0] + g * C, *d = plain.cot + g * C;
        int first = g % groups * C;                                     // of w and b
        double mean = 0, variance = 0;
        for (int c = 0; c < C; c++) mean += x[c] / C;
        for (int c = 0; c < C; c++) variance += (x[c] - mean) * (x[c] - mean) / C;
        double rho = 1 / sqrt(variance + 1e-5);
        for (int c = 0; c < C; c++) {
            double w = plain.in[1][first + c], hat = (x[c] - mean) * rho;
            plain.out[g * C + c] = w * hat + plain.in[2][first + c];
            plain.grad[1][first + c] += d[c] * hat;
            plain.grad[2][first + c] += d[c];
            for (int e = 0; e < C; e++) {
                double other = (x[e] - mean) * rho;
                plain.grad[0][g * C + c] += d[e] * plain.in[1][first + e] * rho * ((e == c) - (1 + other * hat) / C);
            }
        }
    }
}

static void plain_ln1(void) { plain_layernorm(1); }
static void plain_ln3(void) { plain_layernorm(3); }

static void plain_shift_mix(void)       // out = x + (before − x) f,  f = mu + m,  before = the row above in the span, or 0
{
    for (int s = 0, C = op.out.cols; s < op_span_count; s++)
        for (int n = op_spans[s].q; n < op_spans[s].q + op_spans[s].nq; n++)
            for (int c = 0; c < C; c++) {
                int i = n * C + c, above = n > op_spans[s].q;
                double x = plain.in[0][i], before = above ? plain.in[0][i - C] : 0, d = plain.cot[i];
                double f = plain.in[1][c] + (plain.in[2] ? plain.in[2][i] : 0);
                plain.out[i] = x + (before - x) * f;
                plain.grad[0][i] += d * (1 - f);
                if (above) plain.grad[0][i - C] += d * f;
                plain.grad[1][c] += d * (before - x);
                if (plain.in[2]) plain.grad[2][i] = d * (before - x);
            }
}

static void plain_tanh(void)
{
    for (size_t i = 0; i < elements(op.out); i++) {
        plain.out[i] = tanh(plain.in[0][i]);
        plain.grad[0][i] = plain.cot[i] / pow(cosh(plain.in[0][i]), 2);
    }
}

static void plain_relu2(void)
{
    for (size_t i = 0; i < elements(op.out); i++) {
        double x = fmax(plain.in[0][i], 0);
        plain.out[i] = x * x;
        plain.grad[0][i] = plain.cot[i] * 2 * x;
    }
}

static void plain_gate(void)            // σ(r) x
{
    for (size_t i = 0; i < elements(op.out); i++) {
        double sigma = 1 / (1 + exp(-plain.in[0][i])), x = plain.in[1][i], d = plain.cot[i];
        plain.out[i] = sigma * x;
        plain.grad[0][i] = d * x * sigma * (1 - sigma);
        plain.grad[1][i] = d * sigma;
    }
}

// What row s gives to row t ≥ s by channel i of a head whose first channel is h: of y_t[j], r_t[i] k_s[i] v_s[j] times u_i
// where t is s, else times e^l of every row between them, l = −e^w.
static void plain_wkv_pair(int s, int t, int h, int i, int d)
{
    int A = op.out.cols, R = h + i, K = A + h + i, V = 2 * A + h, W = 3 * A + h + i, across = 4 * A;
    const double *x = plain.in[0];
    double *g = plain.grad[0], r = x[t * across + R], k = x[s * across + K], u = plain.in[1][h + i], sum = 0;
    double passed = s == t ? u : 1;
    for (int q = s + 1; q < t; q++) passed *= exp(-exp(x[q * across + W]));
    for (int j = 0; j < d; j++) {
        double v = x[s * across + V + j], dy = plain.cot[t * A + h + j];
        plain.out[t * A + h + j] += r * k * passed * v;
        g[s * across + V + j] += r * k * passed * dy;
        sum += v * dy;
    }
    g[t * across + R] += k * passed * sum;
    g[s * across + K] += r * passed * sum;
    if (s == t) plain.grad[1][h + i] += r * k * sum;
    for (int q = s + 1; q < t; q++) g[q * across + W] -= exp(x[q * across + W]) * r * k * passed * sum;
}

static void plain_wkv(void)
{
    for (int n = 0; n < op_span_count; n++)
        for (int t = op_spans[n].q; t < op_spans[n].q + op_spans[n].nq; t++)
            for (int s = op_spans[n].q; s <= t; s++)
                for (int c = 0; c < op.out.cols; c++)
                    plain_wkv_pair(s, t, c / op_head * op_head, c % op_head, op_head);
}

static const struct { void (*op)(void), (*loops)(void); } in_plain_loops[] = {
    {nt_forward, plain_nt}, {nn_forward, plain_nn}, {tn_forward, plain_tn}, {add_bias_forward, plain_bias},
        {blocks_forward, plain_blocks}, {embed_forward, plain_embedding}, {norm_forward, plain_rmsnorm},
    {rope_forward, plain_rope}, {att_forward, plain_attention}, {glu_forward, plain_swiglu}, {ce_forward, plain_cross_entropy},
    {sum_forward, plain_shard_sum}, {tile_forward, plain_shard_tile},
        {diagonal_forward, plain_block_diagonal}, {mul_forward, plain_broadcast_mul},
        {dot_forward, plain_broadcast_dot},
    {mag_forward, plain_magnitude}, {ln1_forward, plain_ln1}, {ln3_forward, plain_ln3}, {shift_forward, plain_shift_mix},
    {th_forward, plain_tanh}, {relu_forward, plain_relu2}, {gate_forward, plain_gate}, {wkv_forward, plain_wkv},
};

// The cases of op_cases, larger. Rows of 61 and 2051 numbers fill vectors of 4, 8 and 16 and leave a rest.
enum { BLOCK = QUERIES };
static const struct { op_case op; int head; span spans[SPANS]; } large_cases[] = {
    {.op = {"matmul_nt", {{MC + 5, OFTEN + 9}}, {{{MC + 5, KC + 7}}, {{OFTEN + 9, KC + 7}}}, nt_forward, nt_backward, 0}},
    {.op = {"matmul_nn", {{MC + 5, OFTEN + 9}}, {{{MC + 5, KC + 7}}, {{KC + 7, OFTEN + 9}}}, nn_forward, nn_backward, 0}},
    {.op = {"matmul_tn", {{MC + 5, OFTEN + 9}}, {{{KC + 7, MC + 5}}, {{KC + 7, OFTEN + 9}}}, tn_forward, tn_backward, 0}},
    {.op = {"batched matmul_nt", {{3, MC + 5, 2 * NR + 1}}, {{{3, MC + 5, KC + 7}}, {{3, 2 * NR + 1, KC + 7}}},
        nt_forward, nt_backward, 0}},
    {.op = {"bias", {{333, 77}}, {{{333, 77}}, {{77}}}, add_bias_forward, add_bias_backward, 0}},
    {.op = {"embedding", {{333, 77}}, {{{50, 77}}}, embed_forward, embed_backward, 0}},
    {.op = {"rmsnorm of short rows", {{333, 61}}, {{{333, 61}}, {{61}}}, norm_forward, norm_backward, 0}},
    {.op = {"rmsnorm of long rows", {{20, 2051}}, {{{20, 2051}}, {{2051}}}, norm_forward, norm_backward, 0}},
    {.op = {"rope, heads of 48", {{333, 144}}, {{{333, 144}}}, rope_forward, rope_backward, 0}, .head = 48},
    {.op = {"rope, heads of 10", {{333, 50}}, {{{333, 50}}}, rope_forward, rope_backward, 0}, .head = 10},
    {.op = {"attention, a block and a row", {{BLOCK + 1, 16}}, {{{BLOCK + 1, 16}}, {{BLOCK + 1, 8}}, {{BLOCK + 1, 8}}},
        att_forward, att_backward, 0},
        .head = 4, .spans = {{0, BLOCK + 1, 0, BLOCK + 1}}},
    {.op = {"attention, 130 rows, 3 heads of 48 on 1", {{130, 144}}, {{{130, 144}}, {{130, 48}}, {{130, 48}}},
        att_forward, att_backward, 0},
        .head = 48, .spans = {{0, 130, 0, 130}}},
    {.op = {"attention, 700 rows, 2 heads of 64 on 1", {{700, 128}}, {{{700, 128}}, {{700, 64}}, {{700, 64}}},
        att_forward, att_backward, 0},
        .head = 64, .spans = {{0, 700, 0, 700}}},
    {.op = {"attention, whole blocks", {{5 * BLOCK + 2, 160}},
        {{{5 * BLOCK + 2, 160}}, {{5 * BLOCK + 2, 160}}, {{5 * BLOCK + 2, 160}}}, att_forward, att_backward, 0},
        .head = 80, .spans = {{0, BLOCK, 0, BLOCK}, {BLOCK, 2 * BLOCK, BLOCK, 2 * BLOCK}, {3 * BLOCK, 1, 3 * BLOCK, 1},
            {3 * BLOCK + 1, 2 * BLOCK + 1, 3 * BLOCK + 1, 2 * BLOCK + 1}}},
    {.op = {"attention, earlier keys", {{BLOCK + 134, 32}}, {{{BLOCK + 134, 32}}, {{3 * KEYS + 34, 16}}, {{3 * KEYS + 34, 16}}},
        att_forward, att_backward, 0},
        .head = 8, .spans = {{0, BLOCK + 1, 0, KEYS + 9}, {BLOCK + 1, 130, KEYS + 9, 2 * KEYS + 5},
            {BLOCK + 131, 3, 3 * KEYS + 14, 20}}},
    {.op = {"attention, heads wider than a part of a sum", {{9, KC + 6}}, {{{9, KC + 6}}, {{9, KC + 6}}, {{9, KC + 6}}},
        att_forward, att_backward, 0},
        .head = KC + 6, .spans = {{0, 9, 0, 9}}},
    {.op = {"attention, a window of 2", {{191, 32}}, {{{191, 32}}, {{191, 16}}, {{191, 16}}}, att_forward, att_backward,
        WINDOW(2)},
        .head = 8, .spans = {{0, 61, 0, 61}, {61, 130, 61, 130}}},
    {.op = {"attention, a window within a block", {{BLOCK + 134, 32}},
        {{{BLOCK + 134, 32}}, {{3 * KEYS + 34, 16}}, {{3 * KEYS + 34, 16}}},
        att_forward, att_backward, WINDOW(BLOCK - 1)},
        .head = 8, .spans = {{0, BLOCK + 1, 0, KEYS + 9}, {BLOCK + 1, 130, KEYS + 9, 2 * KEYS + 5},
            {BLOCK + 131, 3, 3 * KEYS + 14, 20}}},
    {.op = {"attention, a window of two blocks", {{700, 32}}, {{{700, 32}}, {{700, 16}}, {{700, 16}}}, att_forward, att_backward,
        WINDOW(2 * BLOCK + 1)},
        .head = 8, .spans = {{0, 700, 0, 700}}},
    {.op = {"swiglu of short rows", {{333, 61}}, {{{333, 61}}, {{333, 61}}}, glu_forward, glu_backward, 0}},
    {.op = {"swiglu of long rows", {{20, 2051}}, {{{20, 2051}}, {{20, 2051}}}, glu_forward, glu_backward, 0}},
    {.op = {"cross_entropy of few", {{333, 1}}, {{{333, 61}}}, ce_forward, ce_backward, OUT}},
    {.op = {"cross_entropy of many", {{5, 1}}, {{{5, 32003}}}, ce_forward, ce_backward, OUT}},
    {.op = {"shard_sum, short last shard", {{20, 64}}, {{{20, 2051}}}, sum_forward, sum_backward, 0}},
    {.op = {"shard_sum, one shard", {{333, 61}}, {{{333, 61}}}, sum_forward, sum_backward, 0}},
    {.op = {"shard_sum, less than a shard", {{333, 77}}, {{{333, 61}}}, sum_forward, sum_backward, 0}},
    {.op = {"shard_sum, shards of one", {{20, 1}}, {{{20, 2051}}}, sum_forward, sum_backward, 0}},
    {.op = {"block_diagonal", {{333, 144}}, {{{333, 108}}, {{3, 36, 36}}}, diagonal_forward, diagonal_backward, 0}},
    {.op = {"shard_tile, short last shard", {{20, 2051}}, {{{20, 64}}}, tile_forward, tile_backward, 0}},
    {.op = {"shard_tile, one shard", {{333, 61}}, {{{333, 61}}}, tile_forward, tile_backward, 0}},
    {.op = {"shard_tile, less than a shard", {{333, 61}}, {{{333, 77}}}, tile_forward, tile_backward, 0}},
    {.op = {"shard_tile, shards of one", {{20, 2051}}, {{{20, 1}}}, tile_forward, tile_backward, 0}},
    {.op = {"broadcast_mul, columns", {{20, 2051}}, {{{20, 2051}}, {{1, 2051}}}, mul_forward, mul_backward, 0}},
    {.op = {"broadcast_mul, rows", {{20, 2051}}, {{{20, 2051}}, {{20, 1}}}, mul_forward, mul_backward, 0}},
    {.op = {"broadcast_dot, columns", {{1, 205}}, {{{100, 205}}, {{100, 205}}}, dot_forward, dot_backward, 0}},
    {.op = {"broadcast_dot, rows", {{20, 1}}, {{{20, 3 * KC + 5}}, {{20, 3 * KC + 5}}}, dot_forward, dot_backward, 0}},
    {.op = {"magnitude", {{20011, 1}}, {{{20011, 1}}, {{20011, 1}}}, mag_forward, mag_backward, FRONT_TO_BACK}},
    {.op = {"layernorm of long rows", {{20, 2051}}, {{{20, 2051}}, {{2051}}, {{2051}}}, ln1_forward, ln1_backward, 0}},
    {.op = {"layernorm of 3 heads of 61", {{333, 183}}, {{{333, 183}}, {{183}}, {{183}}}, ln3_forward, ln3_backward, 0}},
    {.op = {"shift_mix of long rows", {{20, 2051}}, {{{20, 2051}}, {{2051}}, {{20, 2051}}}, shift_forward, shift_backward, 0},
        .spans = {{0, 3, 0, 3}, {3, 1, 3, 1}, {4, 16, 4, 16}}},
    {.op = {"tanh of long rows", {{20, 2051}}, {{{20, 2051}}}, th_forward, th_backward, 0}},
    {.op = {"relu² of long rows", {{20, 2051}}, {{{20, 2051}}}, relu_forward, relu_backward, 0}},
    {.op = {"sigmoid_gate of long rows", {{20, 2051}}, {{{20, 2051}}, {{20, 2051}}}, gate_forward, gate_backward, 0}},
    {.op = {"wkv6 of long texts", {{301, 40}}, {{{301, 160}}, {{40}}}, wkv_forward, wkv_backward, FRONT_TO_BACK},
        .head = 20, .spans = {{0, 275, 0, 275}, {275, 26, 275, 26}}},
};

// The derivative of f along u, at x: four points, as in check_numeric, but closer: many numbers move at once.
static double slope_along(double (*f)(void *), void *context, mat x, const wide *at, const wide *u)
{
    size_t n = elements(x);
    wide *moved = alloc(n, sizeof *moved);
    double sum = 0, h = 2e-5;
    for (int k = 0; k < 4; k++) {
        for (size_t i = 0; i < n; i++) moved[i] = at[i] + (wide)(four_points[k].at * h) * u[i];
        put(x, moved, TYPE_OF(wide));
        sum += four_points[k].weight * f(context);
    }
    put(x, at, TYPE_OF(wide));
    free(moved);
    return sum / (12 * h);
}

// How far f's slope at x along a random direction is from the gradient's, over the gradient's length, which is what a
// typical slope is.
static double slope_error(double (*f)(void *), void *context, mat x, const wide *gradient)
{
    size_t n = elements(x);
    wide *at = on_host(x), *u = alloc(n, sizeof *u);
    double want = 0, squares = 0;
    for (size_t i = 0; i < n; i++) {
        u[i] = (wide)rng_normal(&dice);
        want += (double)gradient[i] * (double)u[i];
        squares += pow((double)gradient[i], 2);
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
    plain.cot = doubles(op.cot);
    plain.out = alloc(elements(op.out), sizeof(double));
    for (int j = 0; j < 3 && op.in[j].p; j++) {
        plain.in[j] = doubles(op.in[j]);
        plain.grad[j] = alloc(elements(op.in[j]), sizeof(double));
    }
    for (size_t i = 0; i < sizeof in_plain_loops / sizeof *in_plain_loops; i++)
        if (in_plain_loops[i].op == c->forward) in_plain_loops[i].loops();
}

static void plain_free(void)
{
    free(plain.cot), free(plain.out);
    for (int j = 0; j < 3; j++) free(plain.in[j]), free(plain.grad[j]);
    memset(&plain, 0, sizeof plain);
}

// With --bf16 attention rounds q, k, v, dout, P and dS to 8 bits, each off by up to 2⁻⁹. The loops round nothing.
#define ROUNDED 0x1p-6

// One thing that an op wrote, with one thread and with two, against the loops: started from `before`, where the op adds.
static void check_written(const op_case *c, const char *what, mat m, const double *loops, const wide *before, wide **first)
{
    size_t n = elements(m);
    wide *got = on_host(m), *want = alloc(n, sizeof *want);
    for (size_t i = 0; i < n; i++) want[i] = (wide)(loops[i] + (before ? (double)before[i] : 0));
    if (!*first) check_wide(got, want, shape_of(m), bf16_pairs ? ROUNDED : EXACT, "%s, %s by plain loops", c->name, what);
    else check_wide(got, *first, shape_of(m), SAME_BITS, "%s, %s with two threads", c->name, what);
    free(want);
    if (*first) free(got);
    else *first = got;
}

// Whether backward writes the gradient of input j. Else it adds it to what was there before.
static int is_set(const op_case *c, int j)
{
    return c->forward == att_forward || c->forward == glu_forward || (c->forward == mag_forward && j == 1);
}

// Forward and backward with one thread and with two, in the middle of larger matrices: by plain loops, by differences in
// double, and nothing is written beside.
static void check_edges(const op_case *c, int f, int head, const span *spans)
{
    static const char *const inputs[3] = {"d in 0", "d in 1", "d in 2"};
    wide *before[3] = {0}, *first[4] = {0}, *edge[4] = {0};
    op_open(c, f, head, spans);
    for (const int *which = (const int[]){4, 6, 7, 12, 13, 0}; *which; which++)         // attention's scores: NaN
        memset(thread_buffer(*which, QUERIES * WIDE), 0xff, QUERIES * WIDE * sizeof(real));
    plain_loops(c);
    mat written[4] = {op.grad[0], op.grad[1], op.grad[2], op.out};
    for (int j = 0; j < 3; j++) {
        if (!op.grad[j].p) continue;
        randomise(op.grad[j], 1);
        before[j] = on_host(op.grad[j]);
    }
    for (int j = 0; j < 4; j++)
        if (written[j].p && beside(written[j]).p) edge[j] = on_host(beside(written[j]));
    for (int threads = 1; threads <= 2; threads++) {
        omp_set_num_threads(threads);
        for (int j = 0; j < 3; j++) if (op.grad[j].p) put(op.grad[j], before[j], TYPE_OF(wide));
        c->forward();
        c->backward();
        check_written(c, "out", op.out, plain.out, NULL, &first[3]);
        for (int j = 0; j < 3; j++)
            if (op.grad[j].p) check_written(c, inputs[j], op.grad[j], plain.grad[j], is_set(c, j) ? NULL : before[j], &first[j]);
    }
    for (int j = 0; j < 3 && sizeof(real) == 8; j++) {                  // differences need digits
        if (!op.grad[j].p) continue;
        for (size_t i = 0; i < elements(op.grad[j]); i++) first[j][i] -= is_set(c, j) ? 0 : before[j][i];
        double err = slope_error(op_value, (void *)(uintptr_t)c, op.in[j], first[j]);
        check(err, 1e-7, "%s, %s by differences", c->name, inputs[j]);
    }
    for (int j = 0; j < 4; j++) {
        mat m = written[j].p ? beside(written[j]) : (mat){0};
        wide *now = edge[j] ? on_host(m) : NULL;
        if (now)
            check_wide(now, edge[j], shape_of(m), SAME_BITS, "%s, what stands beside %s", c->name, j < 3 ? inputs[j] : "out");
        free(now), free(edge[j]), free(first[j]);
    }
    for (int j = 0; j < 3; j++) free(before[j]);
    plain_free(), op_close();
}

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

// Rows, windows and heads of every kind, in pairs.
static void test_attention_pairs(void)
{
    int threads = omp_get_max_threads();
    op_pad = 5;
    bf16_pairs = 1;
    for (size_t i = 0; i < sizeof large_cases / sizeof *large_cases; i++)
        if (large_cases[i].op.forward == att_forward)
            check_edges(&large_cases[i].op, 1, large_cases[i].head, large_cases[i].spans);
    bf16_pairs = op_pad = 0;
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
    for (size_t i = 0; i < elements(a) && bf16_pairs; i++) x[i] = rounded(x[i], BF16);
    for (size_t i = 0; i < elements(b) && bf16_pairs; i++) w[i] = rounded(w[i], BF16);
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
    snprintf(name, sizeof name, "%s, %s times %s, %d x %d x %d, layout %d, %s", form_names[form], dtypes[a_type].name,
        dtypes[b_type].name, s.M, s.N, s.K, (int)s.layout, mode == ADD ? "+=" : "=");
    check_mat(whole[1], whole[0], EXACT, "%s", name);
    check_mat(whole[2], whole[1], SAME_BITS, "%s, with two threads", name);
    for (mat *m = (mat[]){all_a, all_b, all_y, whole[0], whole[1], whole[2], {0}}; m->p; m++) dev_free(m->p);
}

// Attention's own product, of so many rows and columns in the corner of a matrix that has more.
static void check_panel(int rows, int cols)
{
    enum { K = 9 };
    mat a = random_mat(SHAPE(rows, K)), b = random_mat(SHAPE(K, cols)), y = random_mat(SHAPE(rows + 1, cols + NR));
    mat want = random_mat(SHAPE(y.rows, y.cols));
    copy(want, y);
    gemm_plain(first_columns(rows_of(want, 0, rows), cols), a, 0, b, 1, K, 0.7, SET);
    panel_times((real *)y.p, y.ld, rows, cols, copied_panels(2, a), 1, MR, copied_slivers(6, b), K, 0.7, SET);
    check_mat(y, want, EXACT, "a panel of %d rows times %d columns", rows, cols);
    for (mat *m = (mat[]){a, b, y, want, {0}}; m->p; m++) dev_free(m->p);
}

// The product's blocks: panels of MR rows, MC of them together, slivers of NR columns, NC together, KC of the sum; a factor
// that is used by more than OFTEN columns or OFTEN_ROWS rows is copied. Narrow results of xᵀ w are computed as their transposes.
static void test_beyond_panels(void)
{
    static const product_size sizes[] = {
        {MR + 1, NR + 1, KC + 1, ALONE}, {1, 2 * NC + 3, KC + 1, ALONE}, {MR + 2, NC + NR + 1, KC + 2, ALONE},
        {MC + 5, 3, 2 * KC + 3, ALONE}, {4 * MC + 5, NR + 3, KC + 7, ALONE}, {MC + 5, OFTEN + 9, KC + 3, ALONE},
        {OFTEN + 5, 2 * NR - 1, KC + 3, ALONE}, {OFTEN + 5, OFTEN + 9, KC + 3, ALONE},
        {OFTEN_ROWS, 3 * NR + 1, KC + 3, ALONE}, {OFTEN_ROWS + 1, 3 * NR + 1, KC + 3, ALONE},
        {OFTEN + 5, NC + NR + 1, 33, ALONE}, {NC + 37, NR + 4, 65, ALONE}, {OFTEN + 5, NR + 4, KC + 3, ALONE},
        {38 * MC + 1, 3, 100, ALONE},                                   // an odd number of blocks, 39, for two threads
        {MC + 5, NR + 4, KC + 3, BESIDE}, {MC + 5, NR + 4, KC + 3, BEHIND}, {MC + 5, 2 * NR + 1, KC + 3, ONE_WEIGHT},
        {MR + 1, NC + 3, 70, BESIDE}, {MR + 1, NC + 3, 70, BEHIND}, {OFTEN + 5, OFTEN + 9, 9, BESIDE},
        {OFTEN + 5, OFTEN + 9, 9, ONE_WEIGHT},
    };
    static const product_size of_any_type[] = {{MR + 2, NR + 3, KC + 9, ALONE}, {2 * MR + 1, NR + 3, KC + 9, BESIDE}};
    int threads = omp_get_max_threads();
    for (int n = 0; n < 3 * 2 * (sizeof(real) == 4 ? 2 : 1); n++) {
        int form = n % 3;
        enum mode mode = n / 3 % 2 ? ADD : SET;
        if (not_asked_for(form_names[form])) continue;
        bf16_pairs = n >= 3 * 2;
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
            check_product(form, sizes[i], TYPE_OF(real), TYPE_OF(real), mode);
        for (int i = 0; i < 2 * DTYPES * DTYPES; i++)
            check_product(form, of_any_type[i % 2], (enum dtype)(i / 2 % DTYPES), (enum dtype)(i / 2 / DTYPES), mode);
    }
    bf16_pairs = 0;
    omp_set_num_threads(threads);
    for (int cols = 1; cols < 2 * NR + 4; cols++) check_panel(cols % MR + 1, cols);
}

// Copies between two dtypes, by way of a buffer of KC numbers, one number at a time in the loops.
static void check_copy(enum dtype to, enum dtype from)
{
    enum { N = 11, C = 2 * KC + 77 };
    mat all_x, all_y, x = in_the_middle(&all_x, from, N, C, BEHIND, 2), y = in_the_middle(&all_y, to, N, C, BEHIND, 2);
    mat want = all_y;
    size_t bytes = elements(all_y) * dtypes[to].size;
    want.p = dev_alloc(bytes);
    memcpy(want.p, all_y.p, bytes);
    copy(y, x);
    for (int b = 0; b < 2; b++)
        for (int i = 0; i < N; i++)
            for (int j = 0; j < C; j++) {
                real buffer;
                double one = (double)*widened(at(nth(x, b), i, j), from, 1, &buffer);
                wide number = (wide)one;
                narrow((char *)want.p + ((char *)at(nth(y, b), i, j) - (char *)all_y.p), to, &number, 1);
            }
    check_mat(all_y, want, SAME_BITS, "copy of %s to %s", dtypes[from].name, dtypes[to].name);
    dev_free(want.p), dev_free(all_x.p), dev_free(all_y.p);
}

// Rows of a table, and products of its rows with themselves, as the base's weights are read in the dtype of their file.
static void check_table(enum dtype type)
{
    enum { N = 60, ROWS = 20, C = 2 * KC + 77 };
    int ids[N];
    mat all, table = in_the_middle(&all, type, ROWS, C, ALONE, 1);
    mat rows = random_mat(SHAPE(N, C)), squares = random_mat(SHAPE(ROWS, 1));
    mat want_rows = like(rows), want_squares = like(squares);
    double *numbers = doubles(table);
    for (int i = 0; i < N; i++) {
        ids[i] = i * i % ROWS;
        for (int j = 0; j < C; j++) ROW(want_rows, i)[j] = (real)numbers[ids[i] * C + j];
    }
    for (int i = 0; i < ROWS; i++) {
        double sum = 0;
        for (int j = 0; j < C; j++) sum += pow(numbers[i * C + j], 2);
        *ROW(want_squares, i) = (real)((double)*ROW(squares, i) + 0.7 * sum);
    }
    embedding_forward(rows, table, ids);
    broadcast_dot(squares, table, table, 0.7, ADD);
    check_mat(rows, want_rows, SAME_BITS, "embedding of a table in %s", dtypes[type].name);
    check_mat(squares, want_squares, EXACT, "broadcast_dot of a table in %s", dtypes[type].name);
    for (mat *m = (mat[]){all, rows, squares, want_rows, want_squares, {0}}; m->p; m++) dev_free(m->p);
    free(numbers);
}

// zero and add in the middle of larger matrices, and the tiled identity, either way up.
static void check_elements(void)
{
    enum { N = 21, C = 1031, R = 67 };
    mat all_x, all_y, x = in_the_middle(&all_x, TYPE_OF(real), N, C, ALONE, 1);
    mat y = in_the_middle(&all_y, TYPE_OF(real), 2 * N, C, BEHIND, 2);
    mat want = like(all_y), e[2] = {random_mat(SHAPE(R, C)), random_mat(SHAPE(C, R))};
    copy(want, all_y);
    for (int b = 0; b < 2; b++)
        for (int i = 0; i < 2 * N; i++)
            for (int j = 0; j < C; j++)
                ROW(want, 1 + b * (2 * N + 2) + i)[3 + j] = b || i >= N ? 0 : (real)0.7 * ROW(x, i)[j];
    zero(y);
    add(rows_of(nth(y, 0), 0, N), x, 0.7);
    check_mat(all_y, want, EXACT, "zero and add");
    for (int k = 0; k < 2; k++) {
        mat identity = like(e[k]);
        for (int i = 0; i < e[k].rows; i++)
            for (int j = 0; j < e[k].cols; j++) ROW(identity, i)[j] = (i - j) % R == 0;
        tiled_identity(e[k]);
        check_mat(e[k], identity, SAME_BITS, "tiled_identity, %d by %d", e[k].rows, e[k].cols);
        dev_free(e[k].p), dev_free(identity.p);
    }
    dev_free(all_x.p), dev_free(all_y.p), dev_free(want.p);
}

// The training step's two ops on n numbers: PyTorch's AdamW one number at a time, and a sum of n squares.
static void check_training(int n)
{
    mat w = random_mat(SHAPE(n, 1)), g = random_mat(SHAPE(n, 1)), m = like(w), v = like(w), want = like(w);
    double squares = 0;
    for (int i = 0; i < n; i++) {
        *ROW(want, i) = (real)plain_adamw((double)*ROW(w, i), 0.5 * (double)*ROW(g, i));
        squares += pow((double)*ROW(g, i), 2);
    }
    for (int t = 1; t <= 3; t++) adamw(w, g, m, v, 0.01, 0.1, 0.5, t);
    check_mat(w, want, EXACT, "adamw of %d numbers", n);
    check_number(sum_of_squares(g), squares, 1e-12, "sum_of_squares of %d numbers", n);        // a double in either build
    for (mat *all = (mat[]){w, g, m, v, want, {0}}; all->p; all++) dev_free(all->p);
}

// Ops without a backward, beyond a buffer of KC numbers, a piece of 65536, and what is worth two threads.
static void test_beyond_buffers(void)
{
    static const int counts[4] = {1, 20011, 1 << 16, (2 << 16) + 3};
    int before = omp_get_max_threads();
    for (int threads = 1; threads <= 2; threads++) {
        omp_set_num_threads(threads);
        for (int i = 0; i < DTYPES * DTYPES && !not_asked_for("copy"); i++)
            check_copy((enum dtype)(i / DTYPES), (enum dtype)(i % DTYPES));
        for (int type = 0; type < DTYPES && !not_asked_for("embedding"); type++) check_table((enum dtype)type);
        if (!not_asked_for("zero and add")) check_elements();
        for (int i = 0; i < 4 && !not_asked_for("adamw"); i++) check_training(counts[i]);
    }
    mat x = random_mat(SHAPE((2 << 16) + 3, 1));
    double two = sum_of_squares(x);
    omp_set_num_threads(1);
    check_number(sum_of_squares(x), two, SAME_BITS, "sum_of_squares with one thread and with two");
    dev_free(x.p);
    omp_set_num_threads(before);
}

// ---- a model beyond its blocks ------------------------------------------------------------------------------------------

// The head by plain loops: logits = head norm(x), loss = −log softmax(logits)[label], one target after the other.
typedef struct { double loss, *dlast, *dhead, *dnorm; } plain_loss;

// The gradients of one target row: dz = scale (softmax(z) − [label]), then back through the head and the norm.
static void plain_head_backward(plain_loss *y, const double *x, const double *w, const double *head, const double *hn,
                                const double *dz, double rho, int C, int V, double *dx)
{
    double *dhn = alloc((size_t)C, sizeof *dhn), along = 0;
    for (int v = 0; v < V; v++)
        for (int c = 0; c < C; c++) {
            y->dhead[v * C + c] += dz[v] * hn[c];
            dhn[c] += dz[v] * head[v * C + c];
        }
    for (int c = 0; c < C; c++) {
        along += dhn[c] * w[c] * x[c];
        y->dnorm[c] += dhn[c] * x[c] * rho;
    }
    for (int c = 0; c < C; c++) dx[c] += dhn[c] * w[c] * rho - along * x[c] * rho * rho * rho / C;
    free(dhn);
}

static plain_loss plain_head(const model *m, const batch *b, double scale)
{
    int C = m->c.dim, V = m->c.vocab;
    double *last = doubles(m->last), *head = doubles(m->head), *w = doubles(m->norm);
    double *z = alloc((size_t)V, sizeof *z), *hn = alloc((size_t)C, sizeof *hn);
    plain_loss y = {0, alloc(elements(m->last), sizeof *z), alloc(elements(m->head), sizeof *z), alloc((size_t)C, sizeof *z)};
    for (int t = 0; t < b->targets; t++) {
        int at = t * C;
        const double *x = last + at;
        double squares = 0, sum = 0;
        for (int c = 0; c < C; c++) squares += x[c] * x[c];
        double rho = 1 / sqrt(squares / C + m->c.eps);
        for (int c = 0; c < C; c++) hn[c] = w[c] * x[c] * rho;
        for (int v = 0; v < V; v++) {
            z[v] = 0;
            for (int c = 0; c < C; c++) z[v] += head[v * C + c] * hn[c];
            sum += exp(z[v]);
        }
        y.loss -= log(exp(z[b->label[t]]) / sum);
        for (int v = 0; v < V; v++) z[v] = scale * (exp(z[v]) / sum - (v == b->label[t]));
        plain_head_backward(&y, x, w, head, hn, z, rho, C, V, y.dlast + at);
    }
    for (double **p = (double *[]){last, head, w, z, hn, NULL}; *p; p++) free(*p);
    return y;
}

static void check_loops(mat m, const double *want, const char *name, int vocab, int chunk)
{
    char text[80];
    double *x = doubles(m);
    snprintf(text, sizeof text, "%s over %d, %d rows at a time", name, vocab, chunk);
    compare_numbers(x, want, (subject){shape_of(m), "got", "by plain loops", NULL}, EXACT, text);
    free(x);
}

// Every second row is a target. chunk > 0: rows of logits at a time; 0: what the size of the vocabulary makes of it.
static void check_head(int dim, int vocab, int chunk, int targets)
{
    char *path = in_scratch("head.json"), text[400];
    snprintf(text, sizeof text, "{\"model_type\": \"llama\", \"hidden_size\": %d, \"intermediate_size\": 4, "
        "\"num_hidden_layers\": 1, \"num_attention_heads\": 1, \"head_dim\": 4, \"vocab_size\": %d, \"rms_norm_eps\": 1e-5, "
        "\"tie_word_embeddings\": %s}", dim, vocab, chunk ? "false" : "true");
    write_text(path, text);
    plan p = small_plan("full");
    p.tokens = p.positions = 2 * targets;
    model m = {0};
    model_measure(&m, config_read(path), p);
    if (!chunk) expect(m.chunk == 16, "a vocabulary of %d is multiplied with %d rows at a time, not 16", vocab, m.chunk);
    else m.chunk = chunk;
    model_allocate(&m);
    if (chunk) m.chunk = chunk;                                         // the layout sets it again
    randomise(m.head, 0.4), randomise(m.norm, 1);
    batch b = batch_new(2 * targets, 1);
    b.tokens = 2 * targets;
    b.targets = targets;
    for (int t = 0; t < targets; t++) {
        b.target_row[t] = 2 * t + 1;
        b.label[t] = (int)(7919L * t * t % vocab);
    }
    batch_enter(&m, &b);
    randomise(m.last, 1);
    double loss = head_loss(&m, &b, 0.3);
    plain_loss want = plain_head(&m, &b, 0.3);
    check_number(loss, want.loss, EXACT, "loss over %d, %d rows at a time", vocab, m.chunk);
    check_loops(m.dlast, want.dlast, "dlast", vocab, m.chunk);
    check_loops(m.dhead, want.dhead, "dhead", vocab, m.chunk);
    check_loops(m.dnorm, want.dnorm, "dnorm", vocab, m.chunk);
    free(want.dlast), free(want.dhead), free(want.dnorm), free(path), batch_free(&b), model_free(&m);
}

static void test_beyond_chunks(void)
{
    check_head(4, 2400011, 0, 40);             // 13 rows of it fill 128 MB; 16 is the least
    static const int chunks[] = {40, 39, 20, 7, 1};
    for (int i = 0; i < 5; i++) check_head(36, 61, chunks[i], 40);
}

// Rows of 210, 63 and 4 tokens, widths beyond a vector, a sliver and a panel. Bat's blocks and mini's columns fit; Bone's last
// shards are short.
static const char long_config[] =
    "{\"model_type\": \"llama\", \"hidden_size\": 40, \"intermediate_size\": 60, \"num_hidden_layers\": 2, "
        "\"num_attention_heads\": 4,"
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
    p.rank = shards ? 18 : 10;
    p.mini_r = 10;
    p.tokens = 280;
    p.positions = 211;
    p.recompute = recompute;
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
        if (!n) first = on_host(flat(m, m->grad));
        else check_gradient(m, first, SAME_BITS, "%s, --recompute %d, %d threads", name, n, 1 + n % 2);
        if (n == 2) {
            m->chunk = 16;
            zero(flat(m, m->grad));
            model_step(m, &s.b, 1.0 / s.b.targets);
            check_gradient(m, first, EXACT, "%s, 16 rows of logits at a time", name);
            for (int k = 0; k < 2 && sizeof(real) == 8; k++)
                check(slope_error(loss_of, &s, flat(m, m->block[PARAM]), first), 1e-7, "%s, gradient by differences", name);
        }
        batch_free(&s.b), close_small(m);
    }
    free(first);
}

static void test_beyond_rows(void)
{
    int before = omp_get_max_threads();
    for (int i = 0; i < METHODS; i++)
        if (!left_out(i)) check_long(methods[i].name);
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

static int ids_are(const int *got, size_t n, const json_t *ids)
{
    int same = n == json_array_size(ids);
    for (size_t i = 0; i < n && same; i++) same = got[i] == json_integer_value(json_array_get(ids, i));
    return same;
}

static mat golden_tensor(checkpoint *c, const char *kind, const char *name)
{
    char key[160];
    snprintf(key, sizeof key, "%s%s", kind, name);
    ptrdiff_t at = shgeti(c->tensors, key);
    if (at < 0) die("the golden lacks %s", key);
    return c->tensors[at].value.data;
}

static batch golden_batch(void)
{
    json_t *rows = golden_json("dev/golden/rows.json"), *item, *id;
    batch b = batch_new(64, (int)json_array_size(rows));
    size_t i, n;
    json_array_foreach(rows, i, item) {
        int ids[32];
        json_array_foreach(json_object_get(item, "ids"), n, id) ids[n] = (int)json_integer_value(id);
        batch_add(&b, &(row){.ids = ids, .n = (int)n, .prompt = int_of(item, "prompt")});
    }
    json_decref(rows);
    return b;
}

// A singular vector may point either way, so starts are compared without their signs.
static void check_without_signs(mat got, mat want, double tol, const char *text)
{
    double *x = doubles(got), *y = doubles(want);
    for (size_t i = 0; i < elements(got); i++) {
        x[i] = fabs(x[i]);
        y[i] = fabs(y[i]);
    }
    compare_numbers(x, y, (subject){shape_of(got), "got", "expected", NULL}, tol, text);
    free(x), free(y);
}

// The model of a case. Where the adapter has a start, its own is held to PEFT's, and then it gets PEFT's.
static void golden_open(model *m, plan p, const batch *b, checkpoint *golden, const char *name)
{
    char text[300];
    model_measure(m, open_config(), p);
    fill_model(m, b, 1);
    for (int i = 0; i < 14 && p.method->has_start; i++) {
        linear *l = m->linears[i];
        if (!has_adapter(l)) continue;
        for (int j = 0; j < arrlen(m->tensors); j++) {
            tensor *t = &m->tensors[j];
            if (t->value != &l->A && t->value != &l->B) continue;
            mat start = golden_tensor(golden, "start.", t->name), own = t->value == &l->A ? l->A0 : l->B0;
            snprintf(text, sizeof text, "%s, %s, its own start against PEFT's float32 one", name, t->name);
            check_without_signs(own, start, 2e-5, text);
            put(own, start.p, start.type);
            if (!opt.adapter) put(*t->value, start.p, start.type);
        }
    }
}

// Loss, gradients and logits of one batch. Where prompts are not learnt, their rows have no logits: a second pass asks for all.
static void golden_step(model *m, const batch *b, checkpoint *golden, double tol, const char *name)
{
    double loss = model_step(m, b, 1.0 / b->targets) / b->targets, want;
    memcpy(&want, golden_tensor(golden, "", "loss").p, sizeof want);
    check_number(loss, want, tol, "%s, loss", name);
    for (int i = 0; i < arrlen(m->tensors); i++) {
        const tensor *t = &m->tensors[i];
        if (t->kind == PARAM) check_mat(*t->grad, golden_tensor(golden, "grad.", t->name), tol, "%s, d %s", name, t->name);
    }
    batch all = golden_batch();
    ask_all(&all);
    model_forward(m, &all);
    int first = 0;                      // of a row in the golden, which has the last token's logits, too
    for (int r = 0; r < all.rows; r++) {
        int n = all.spans[r].nq;
        head_forward(m, all.spans[r].q, n);
        check_mat(m->logits, rows_of(golden_tensor(golden, "", "logits"), first, n), tol, "%s, logits of row %d", name, r);
        first += n + 1;
    }
    batch_free(&all);
}

// Eight steps of AdamW.
static void golden_training(model *m, const batch *b, checkpoint *golden, const char *name)
{
    int f64 = sizeof(real) == 8;
    double losses[8];
    memcpy(losses, golden_tensor(golden, "", f64 ? "losses64" : "losses32").p, sizeof losses);
    opt.lr = 5e-3;
    opt.clip = 0.5;
    opt.warmup = 2;
    for (int s = 0; s < 8; s++) {
        zero(flat(m, m->grad));
        double loss = model_step(m, b, 1.0 / b->targets) / b->targets;
        update(m, s + 1, learning_rate(s, 8), gradient_norm(m));
        check(fabs(loss - losses[s]), f64 ? 1e-9 : 1e-5, "%s, loss of step %d: %.9g, expected %.9g, off by", name, s + 1,
            loss, losses[s]);
    }
}

static void golden_case(const char *dir_name)
{
    char *dir = join("dev/golden", dir_name), *path = join(dir, "case.json"), name[100];
    json_t *json = golden_json(path);
    const char *method_name = string_field(json, "method");
    char *base = join("dev/golden", string_field(json, "base"));
    plan p = plan_from_options();
    opt.model = base;
    opt.adapter = method_name ? NULL : dir;
    if (method_name) {
        p.method = method_named(method_name);
        p.rank = 4;
        p.alpha = 6;
    } else peft_read_config(&p, dir);
    p.tokens = 64;
    p.positions = 16;
    p.dora_detach = 1;                  // as PEFT computes DoRA
    checkpoint golden = checkpoint_open(dir, "golden");
    model m = {0};
    batch b = golden_batch();
    snprintf(name, sizeof name, "%s, %s", p.method->name, dir);
    golden_open(&m, p, &b, &golden, name);
    golden_step(&m, &b, &golden, sizeof(real) == 8 ? 1e-9 : 2e-5, name);
    golden_training(&m, &b, &golden, name);
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
        if (access(path, F_OK)) continue;
        cases++;
        if (!not_asked_for(e->d_name)) golden_case(e->d_name);
    }
    closedir(d);
    expect(cases >= 16, "%d cases in dev/golden", cases);
}

// An adapter on some layers only: the plan for evaluation, which keeps nothing, gives the logits of the plan for training.
static void uneven_case(const char *method_name, const char *layers)
{
    int kinds = 1 << PARAM | 1 << START;
    json_t *modules = json_loads(layers, 0, NULL);
    batch b = small_batch(0, 3);
    mat logits[2];
    snapshot *trained = NULL;
    for (int use = 0; use < 2; use++) {
        plan p = small_plan(method_name);
        p.modules = modules;
        p.selects = peft_targeted;
        p.train = !use;
        model *m = open_small(p, 0);
        if (!use) shake(m, 0.2, &dice);
        if (use) give_kinds(m, trained, "", kinds, 0);
        else trained = take_kinds(NULL, "", m, kinds, 0);
        logits[use] = all_logits(m, &b);
        close_small(m);
    }
    check_mat(logits[1], logits[0], SAME_BITS, "%s on %s, logits", method_name, layers);
    dev_free(logits[0].p), dev_free(logits[1].p), batch_free(&b), snapshots_free(trained), json_decref(modules);
}

static void test_uneven(void)
{
    static const char *const uneven[] = {
        "[\"layers.0.self_attn.q_proj\", \"layers.0.self_attn.o_proj\"]", "[\"layers.1.mlp.down_proj\"]",
        "[\"layers.0.mlp.up_proj\", \"layers.1.self_attn.k_proj\", \"layers.1.mlp.gate_proj\"]"};
    for (int i = 1; i < METHODS; i++)
        for (int j = 0; j < 3 && !methods[i].wants_gradient; j++)       // lora-ga is used as the lora it is saved as
            if (!left_out(i)) uneven_case(methods[i].name, uneven[j]);
}

// Which linear layers "target_modules" means, in a model of two layers. From PEFT 0.21's check_target_module_exists,
// Unsloth's own regular expression among them.
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
        {"\"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)|"
            "(?:\\\\bmodel\\\\.layers\\\\.[\\\\d]{1,}\\\\.(?:self_attn|mlp)\\\\.(?:(?:q_proj|gate_proj)))\"",
                                                                       {"q---g--", "q---g--"}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (not_asked_for(cases[i].modules)) continue;
        char text[600], *path = in_scratch("adapter_config.json");
        snprintf(text, sizeof text, "{\"peft_type\": \"LORA\", \"r\": 2, \"target_modules\": %s}", cases[i].modules);
        write_text(path, text);
        plan p = small_plan("lora");
        peft_read_config(&p, scratch);
        model *m = open_small(p, 0);
        for (int j = 0; j < 14; j++)
            expect(!has_adapter(m->linears[j]) == (cases[i].layers[j / SEVEN][j % SEVEN] == '-'), "%s, layer %d %s",
                cases[i].modules, j / SEVEN, m->linears[j]->is.name);
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
        expect(ids_are(got, n, json_object_get(item, "ids")), "%s, text %zu, ids", path, number);
        // ▁ itself comes back as a space
        expect(!(strcmp(back, s) && !strstr(s, "▁")), "%s, text %zu, back to text", path, number);
        free(got), free(back);
    }
    expect(number > 5, "texts in %s", path);
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

static char *said_by(void (*work)(const char *path), const char *path);

// A vocabulary of RWKV's kind: the 256 bytes, then `more`.
static char *words_file(const char *more)
{
    char *path = in_scratch("words.txt");
    FILE *f = fopen(path, "w");
    if (!f) die("%s: %s", path, strerror(errno));
    for (int b = 0; b < 256; b++) fprintf(f, b < 128 ? "%d '\\x%02x' 1\n" : "%d b'\\x%02x' 1\n", b + 1, b);
    fputs(more, f);
    if (fclose(f)) die("%s: %s", path, strerror(errno));
    return path;
}

static void only_words(const char *path) { open_words(path, 0); }

static void test_words(void)
{
    static const char more[] = "257 'ab' 2\r\n258 'abc' 3\n259 \"'s\" 2\n260 '\\xe9' 2\n261 '\u4eba\u4eba' 6\n"
                               "262 b'\\xe4\\xba' 2\n"
                               "264 '\\n\\n' 2\n265 '\\\\\\'' 2\n266 '\\u4e00' 3\n267 ' \\t' 2";
    static const struct { const char *text; int ids[8], n; } cases[] = {
        {"abcab", {258, 257}, 2}, {"abd", {257, 101}, 2}, {"it's", {106, 117, 259}, 3}, {"\u00e9\u00e8", {260, 196, 169}, 3},
        {"\u4eba\u4eba\u4eba", {261, 262, 187}, 3}, {"a\n\n\n", {98, 264, 11}, 3}, {"\\'\u4e00 \t", {265, 266, 267}, 3},
        {"", {0}, 0},
    };
    static const struct { const char *more, *says; } wrong_words[] = {
        {"257 'ab' 3", "line 257: expected"}, {"257 ab 2", "line 257: expected"}, {"257 'ab 2", "line 257: expected"},
        {"x 'ab' 2", "line 257: expected"}, {"257 '\\xg0' 1", "line 257: expected"}, {"257 'ab' 2 3", "line 257: expected"},
        {"257 '' 0", "line 257: expected"}, {"257 'ab' 2\n257 'cd' 2", "line 258: id 257 stands twice"},
        {"257 'ab' 2\n258 'ab' 2", "the word of id 258 stands twice"}, {"0 'ab' 2", "line 257: expected"},
        {"99999999999 'ab' 2", "line 257: expected"}, {"257 '\\U00110000' 4", "line 257: expected"},
    };
    char *path = words_file(more);
    tokenizer *t = open_words(path, 0);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t n, bytes;
        int *ids = tokenizer_encode(t, cases[i].text, strlen(cases[i].text), 1, &n);
        expect(n == (size_t)cases[i].n && !memcmp(ids, cases[i].ids, n * sizeof *ids), "%s: %zu ids, the first %d", cases[i].text,
            n, n ? ids[0] : -1);
        char *back = tokenizer_decode(t, ids, n, &bytes);
        expect(!strcmp(back, cases[i].text), "%s comes back as %s", cases[i].text, back);
        free(ids), free(back);
    }
    expect(tokenizer_eos(t) == 0 && tokenizer_bos(t) == -1 && tokenizer_vocab(t) == 268, "the ends");
    tokenizer_free(t);
    for (size_t i = 0; i < sizeof wrong_words / sizeof *wrong_words; i++) {
        free(words_file(wrong_words[i].more));
        char *said = said_by(only_words, path);
        expect(has(said, wrong_words[i].says), "%s: «%s», expected «%s»", wrong_words[i].more, said, wrong_words[i].says);
        free(said);
    }
    free(path);
}

// The example of BlinkDL's own README.
static void test_world(void)
{
    static const int want[] = {6699, 304, 25740, 109, 39990, 4600, 4596, 22590, 30449, 4706};
    static const char text[] = "The Eiffel tower is in the city of";
    if (!need("tokenizers/rwkv_vocab_v20230424.txt")) return;
    for (int crlf = 0; crlf < 2; crlf++) {
        char *path = join(real_input, "tokenizers/rwkv_vocab_v20230424.txt"), *copied = in_scratch("world.txt"), command[600];
        snprintf(command, sizeof command, "sed 's/\r$//%s' %s >%s", crlf ? "; s/$/\r/" : "", path, copied);
        if (system(command)) die("%s", command);
        tokenizer *t = open_words(copied, 65536);
        size_t n;
        int *ids = tokenizer_encode(t, text, strlen(text), 1, &n);
        expect(n == 10 && !memcmp(ids, want, sizeof want), "%zu ids", n);
        expect(tokenizer_vocab(t) == 65530, "ids up to %d", tokenizer_vocab(t));
        free(ids), free(path), free(copied), tokenizer_free(t);
    }
}

// What number c of a vector of n starts as, in layer i of `layers`: RWKV_Tmix_x060 and RWKV_CMix_x060 of BlinkDL's
// RWKV-v5/src/model.py, whose ddd is c/n and whose ratios are deep and shallow.
static double rwkv_starts(const char *name, int i, int layers, int c, int n)
{
    double deep = i / (layers - 1.), shallow = 1 - (double)i / layers, ddd = (double)c / n, at = c / (n - 1.);
    const char *last = strrchr(name, '.') + 1;
    if (!strcmp(last, "time_decay")) return -6 + 5 * pow(at, 0.7 + 1.3 * deep);
    if (!strcmp(last, "time_faaaa")) return deep * (1 - at) + ((c + 1) % 3 - 1) * 0.1;
    if (strstr(name, "feed_forward.time_maa_")) return 1 - pow(ddd, shallow);
    if (!strcmp(last, "time_maa_r") || !strcmp(last, "time_maa_g")) return 1 - pow(ddd, 0.5 * shallow);
    if (!strcmp(last, "time_maa_v")) return 1 - (pow(ddd, shallow) + 0.3 * deep);
    return 1 - pow(ddd, shallow);
}

static void test_rwkv_start(void)
{
    char *path = in_scratch("rwkv.json");
    int vectors = 0;
    write_text(path, "{\"model_type\": \"rwkv6\", \"hidden_size\": 6, \"intermediate_size\": 8, \"num_hidden_layers\": 3, "
        "\"head_size\": 3, \"attention_hidden_size\": 6, \"vocab_size\": 7}");
    model m = {0};
    model_measure(&m, with_sizes(config_read(path), NULL), small_plan("full"));
    model_allocate(&m);
    random_weights(&m);
    for (int t = 0; t < arrlen(m.tensors); t++) {
        const char *name = m.tensors[t].name, *block = strstr(name, "blocks.");
        int n = (int)elements(*m.tensors[t].value);
        if (!block || m.tensors[t].kind != PARAM || n != 6 || !strstr(name, ".time_")) continue;
        wide x[6];
        get(x, *m.tensors[t].value);
        for (int c = 0; c < n; c++)
            check_number(10 + (double)x[c], 10 + rwkv_starts(name, atoi(block + 7), 3, c, n), 1e-12, "10 + %s[%d]", name, c);
        vectors++;
    }
    expect(vectors == 3 * 10, "%d vectors have a start of their own", vectors);
    model_free(&m), free(path);
}

static void test_rwkv_counts(void)
{
    static const struct { const char *name; int C, F; double millions; } shapes[] = {
        {"3B", 2560, 8960, 55.05}, {"7B", 4096, 14336, 88.08},
    };
    for (int i = 0; i < 4; i++) {
        char text[300], *path = in_scratch("rwkv.json");
        snprintf(text, sizeof text, "{\"model_type\": \"rwkv6\", \"hidden_size\": %d, \"intermediate_size\": null, "
            "\"num_hidden_layers\": 32, \"vocab_size\": 65536}", shapes[i / 2].C);
        write_text(path, text);
        config c = with_sizes(config_read(path), NULL);
        plan p = plan_from_options();
        p.method = method_named(i % 2 ? "lora" : "bone");
        p.rank = i % 2 ? 32 : 64;
        model m = {0};
        model_measure(&m, c, p);
        double millions = round((double)m.trainable / 1e4) / 100;
        check_number(millions, shapes[i / 2].millions, 1e-9, "%s, %s", shapes[i / 2].name, p.method->name);
        expect(c.hidden == shapes[i / 2].F, "%s: F is %d", shapes[i / 2].name, c.hidden);
        model_unmeasure(&m), free(c.text), free(path);
    }
}

// The bytes that a hexadecimal text says; "-" says none.
static char *bytes_of(const char *hex, size_t *n)
{
    char *bytes = alloc(strlen(hex) + 1, 1);
    *n = 0;
    for (unsigned byte; sscanf(hex, "%2x", &byte) == 1; hex += 2) bytes[(*n)++] = (char)byte;
    return bytes;
}

// base/tokenizer.model with other fields behind it, which protobuf merges into it.
static tokenizer *other_tokenizer(const char *hex)
{
    char *path = in_scratch("other.model"), err[512];
    size_t bytes, more;
    char *base = read_file("base/tokenizer.model", &bytes), *tail = bytes_of(hex, &more);
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(base, 1, bytes, f) != bytes
        || fwrite(tail, 1, more, f) != more || fclose(f)) die("%s: %s", path, strerror(errno));
    tokenizer *t = tokenizer_load(path, err, sizeof err);
    if (!t) die("%s", err);
    free(path), free(base), free(tail);
    return t;
}

static void only_other_tokenizer(const char *hex) { other_tokenizer(hex); }

// Spaces of every kind, USER and UNUSED pieces, surrogates and other bytes that are not UTF-8: SentencePiece's ids, and
// its text of them (dev/golden.py made them).
static void test_pieces(void)
{
    size_t golden_bytes;
    char *golden = read_file("dev/golden/pieces.txt", &golden_bytes), *next_line = golden, what[80] = "";
    tokenizer *t = NULL;
    int texts = 0;
    for (char *line; (line = strsep(&next_line, "\n")) && *line; ) {
        char *kind = strsep(&line, " "), *hex = strsep(&line, " ");
        size_t bytes, n, got_bytes, want_bytes, same = 0;
        if (!strcmp(kind, "model")) {
            tokenizer_free(t);
            t = other_tokenizer(hex);
            snprintf(what, sizeof what, "%s", line);
            continue;
        }
        char *given = bytes_of(hex, &bytes), *want = bytes_of(strsep(&line, " "), &want_bytes);
        int *ids = tokenizer_encode(t, given, bytes, 1, &n);
        for (char *id; (id = strsep(&line, " ")); same++)
            if (same >= n || ids[same] != atoi(id)) break;
        expect(same == n && !line, "%s, text %s: id %zu of %zu", what, hex, same, n);
        char *got = tokenizer_decode(t, ids, n, &got_bytes);
        expect(got_bytes == want_bytes && !memcmp(got, want, want_bytes),
            "%s, text %s, back to «%s»", what, hex, got);
        free(given), free(want), free(ids), free(got);
        texts++;
    }
    expect(texts == 9 * 25, "%d texts", texts);
    tokenizer_free(t), free(golden);
}

// Fields behind base/tokenizer.model by which it is no longer one that is read, and a part of the line that says so.
static const struct { const char *tail, *says; } no_tokenizers[] = {
    {"ff", "cut short"},                                                // a key without an end
    {"0000", "cut short"},                                              // a field of number 0
    {"0100", "cut short"},
    {"0a05", "cut short"},                                              // five bytes, of which none is there
    {"0f", "cut short"},                                                // wire type 7
    {"ffffffffffffffffffffff01", "cut short"},                          // a key of 12 bytes
    {"0a020aff", "is damaged"},                                         // inside of a piece
    {"1202c801", "is damaged"},                                         // inside of TrainerSpec
    {"1a021aff", "is damaged"},                                         // inside of NormalizerSpec
    {"0a00", "is empty, or longer"},
    {"0a040a026100", "holds NUL"},
    {"0a040a02c328", "is not UTF-8"},
    {"0a050a03eda080", "is not UTF-8"},                                 // a surrogate
    {"0a080a01611500" "00c07f", "not a number"},
    {"0a050a01611800", "unknown type"},
    {"0a050a01611807", "unknown type"},
    {"0a040a026865", "stands twice"},                                   // he
    {"0a0a0a063c307830413e1806", "stands twice"},                       // <0x0A>
    {"0a050a033c733e", "stands twice"},                                 // <s>, a piece like others
    {"0a060a0268651803", "stands twice"},                               // he, which begins a text
    {"0a0a0a063c307830413e1803", "stands twice"},                       // <0x0A>, likewise
    {"0a070a033c753e1802", "second piece for the unknown"},
    {"b8808080800005", "cut short"},                                    // a key of 6 bytes
    {"3a808080808000", "cut short"},                                    // a length of 6 bytes
    {"0a0a0a063c30783061" "3e1806", "not spelled"},                     // <0x0a>
    {"12021801", "unigram"}, {"12021803", "word"}, {"12021804", "character"}, {"12021805", "does not say that it is BPE"},
    {"1203980200", "no bytes for unknown"}, {"1203c00101", "spaces behind"}, {"1a03120161", "maps characters"},
    {"2a03120161", "maps characters"},
};

// A damaged tokenizer.model, or one of another kind, is refused.
static void test_refused_tokenizers(void)
{
    for (size_t i = 0; i < sizeof no_tokenizers / sizeof *no_tokenizers; i++) {
        char *said = said_by(only_other_tokenizer, no_tokenizers[i].tail);
        expect(!!strstr(said, no_tokenizers[i].says), "%s: «%s», expected «%s»",
            no_tokenizers[i].tail, said, no_tokenizers[i].says);
        free(said);
    }
}

// Of two added tokens with the same text the last counts, and a text is read to its end and no further.
static void test_added_twice(void)
{
    tokenizer *t = plain_tokenizer("base");
    size_t n;
    for (int id = 900; id < 902; id++) {
        tokenizer_add(t, (added_token){.text = "<|a|>", .id = id, .rstrip = 1});
        tokenizer_add(t, (added_token){.text = "<|b|>", .id = id + 10});
        int *ids = tokenizer_encode(t, "<|a|>    <|b|>", 7, 1, &n);           // two of the spaces
        expect(n == 1 && ids[0] == id, "%zu ids, of which the first is %d", n, ids[0]);
        free(ids);
    }
    expect(tokenizer_find(t, "<|a|>") == 901 && tokenizer_find(t, "<|b|>") == 911 && tokenizer_find(t, "<|c|>") == -1, "found");
    tokenizer_free(t);
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
        expect(tokenizer_bos(t) == (field_true(item, "bos") ? 1 : -1), "directory %zu: BOS", number);
        expect(tokenizer_eos(t) == int_of(item, "eos"), "directory %zu: EOS", number);
        json_array_foreach(json_object_get(item, "rows"), i, line) {
            const char *s = string_field(line, "text");
            int *got = tokenizer_encode(t, s, strlen(s), 1, &n);
            expect(ids_are(got, n, json_object_get(line, "ids")), "directory %zu: ids of «%s»", number, s);
            free(got);
        }
        tokenizer_free(t);
    }
    expect(number == 8, "%zu directories", number);
    json_decref(cases);
    free(dir);
}

// ---- tokenizer.json -------------------------------------------------------------------------------------------------------

enum spelling { PAIRS, TEXTS, GPT2_FILES };     // of merges: ["a", "b"], "a b", or vocab.json and merges.txt

static void write_json(const char *dir, const char *name, const json_t *json)
{
    char *path = join(dir, name), *text = json_text(json);
    write_text(path, text);
    free(path), free(text);
}

// A case's tokenizer.json whole: the golden's vocabulary, with the special tokens that stand in it, and its merges.
static json_t *whole_tokenizer(const json_t *golden, const json_t *item, enum spelling spelled)
{
    json_t *whole = json_deep_copy(json_object_get(item, "tokenizer.json")), *bpe_part = json_object_get(whole, "model");
    json_t *vocab = json_deep_copy(json_object_get(item, "more")), *merges = json_array(), *merge, *token;
    size_t i;
    json_array_foreach(json_object_get(golden, "tokens"), i, token)
        json_object_set_new(vocab, json_string_value(token), json_integer((json_int_t)i));
    json_array_foreach(json_object_get(golden, "merges"), i, merge) {
        const char *left = json_string_value(json_array_get(merge, 0)), *right = json_string_value(json_array_get(merge, 1));
        json_array_append_new(merges, spelled == PAIRS ? json_deep_copy(merge) : json_sprintf("%s %s", left, right));
    }
    json_object_set_new(bpe_part, "vocab", vocab);
    json_object_set_new(bpe_part, "merges", merges);
    return whole;
}

// A directory of this case, in the scratch folder.
static char *merges_directory(const json_t *golden, const json_t *item, enum spelling spelled)
{
    char *dir = in_scratch("merges"), command[300], merge[100];
    json_t *whole = whole_tokenizer(golden, item, spelled), *line;
    json_t *settings = json_pack("{s:s,s:s}", "eos_token", string_field(item, "eos"), "bos_token", string_field(item, "eos"));
    size_t i;
    snprintf(command, sizeof command, "rm -rf %s; mkdir %s", dir, dir);
    if (system(command)) die("cannot prepare %s", dir);
    if (spelled == GPT2_FILES) {
        char *path = join(dir, "merges.txt");
        FILE *f = fopen(path, "w");
        if (!f) die("%s: %s", path, strerror(errno));
        fputs("#version: 0.2\n", f);
        json_array_foreach(json_object_get(json_object_get(whole, "model"), "merges"), i, line) {
            snprintf(merge, sizeof merge, "%s\n", json_string_value(line));
            fputs(merge, f);
        }
        fclose(f), free(path);
        write_json(dir, "vocab.json", json_object_get(json_object_get(whole, "model"), "vocab"));
    } else {
        write_json(dir, "tokenizer.json", whole);
        write_json(dir, "tokenizer_config.json", settings);
    }
    json_decref(whole), json_decref(settings);
    return dir;
}

// Ids and texts of one case are those of Hugging Face's tokenizers.
static void merges_case(const json_t *golden, const json_t *item, enum spelling spelled)
{
    char *dir = merges_directory(golden, item, spelled);
    const char *name = string_field(item, "name");
    tokenizer *t = open_tokenizer(dir, 0);
    json_t *text;
    size_t i, n;
    expect(tokenizer_bos(t) == int_of(item, "bos"), "%s: BOS %d", name, tokenizer_bos(t));
    expect(tokenizer_eos(t) >= 0 && tokenizer_eos(t) == tokenizer_find(t, string_field(item, "eos")), "%s: EOS", name);
    json_array_foreach(json_object_get(golden, "texts"), i, text) {
        const json_t *ids_wanted = json_array_get(json_object_get(item, "ids"), i);
        const char *given = json_string_value(text);
        const char *want = json_string_value(json_array_get(json_object_get(item, "said"), i));
        const char *turned = json_string_value(json_array_get(json_object_get(item, "backwards"), i));
        int *ids = tokenizer_encode(t, given, strlen(given), 1, &n);
        expect(ids_are(ids, n, ids_wanted), "%s, spelled %d: ids of «%s»", name, spelled, given);
        char *said = decode(t, ids, (int)n);
        expect(!strcmp(said, want), "%s: «%s» comes back as «%s», not «%s»", name, given, said, want);
        free(said);
        for (size_t j = 0; j < n / 2; j++) {
            int id = ids[j];
            ids[j] = ids[n - 1 - j];
            ids[n - 1 - j] = id;
        }
        said = decode(t, ids, (int)n);
        expect(!turned || !strcmp(said, turned), "%s, backwards: «%s», not «%s»", name, said, turned);
        free(said), free(ids);
    }
    expect(i > 10, "%s: %zu texts", name, i);
    tokenizer_free(t), free(dir);
}

static void test_merges(void)
{
    json_t *golden = golden_json("dev/golden/merges.json"), *relatives, *item;
    size_t i, j, kinds = 0;
    json_array_foreach(golden, j, relatives)
        json_array_foreach(json_object_get(relatives, "cases"), i, item) {
            merges_case(relatives, item, i % 2 ? TEXTS : PAIRS);
            kinds++;
        }
    expect(kinds == 14 + 5, "%zu kinds", kinds);
    relatives = json_array_get(golden, 0);
    merges_case(relatives, json_array_get(json_object_get(relatives, "cases"), 0), GPT2_FILES);
    json_decref(golden);
}

// The golden's case of this name, and the relatives that it is of.
static json_t *case_named(json_t *golden, const char *name, json_t **relatives)
{
    json_t *item;
    size_t i, j;
    json_array_foreach(golden, j, *relatives)
        json_array_foreach(json_object_get(*relatives, "cases"), i, item)
            if (!strcmp(string_field(item, "name"), name)) return item;
    die("no case %s", name);
}

// A directory of the golden's case of this name, and that opened.
static char *directory_named(const char *name, enum spelling spelled)
{
    json_t *golden = golden_json("dev/golden/merges.json"), *relatives, *item = case_named(golden, name, &relatives);
    char *dir = merges_directory(relatives, item, spelled);
    json_decref(golden);
    return dir;
}

static tokenizer *tokenizer_named(const char *name)
{
    char *dir = directory_named(name, PAIRS);
    tokenizer *t = open_tokenizer(dir, 0);
    free(dir);
    return t;
}

// What stands in a text of a row: the prompt, and an answer that continues it, without a space or a BOS of its own.
static void test_byte_level_rows(void)
{
    tokenizer *spaced = tokenizer_named("gpt2-space"), *unspaced = tokenizer_named("gpt2"), *begins = tokenizer_named("llama3");
    size_t n, m;
    int *continued = tokenizer_encode(spaced, "two", 3, 0, &n), *alone = tokenizer_encode(unspaced, "two", 3, 1, &m);
    int *spaces = tokenizer_encode(spaced, "two", 3, 1, &m);
    expect(n && memcmp(continued, alone, n * sizeof(int)) == 0, "an answer that continues begins with a space");
    expect(n != m || memcmp(continued, spaces, n * sizeof(int)), "a text that begins has no space of its own");
    row r = encode_row(unspaced, "Say it:", " two", 1), q = encode_row(begins, "Say it:", " two", 1);
    char *answer = decode(unspaced, r.ids + r.prompt, r.n - r.prompt);
    expect(!strcmp(answer, " two") && r.ids[r.n - 1] == tokenizer_eos(unspaced), "the answer is «%s»", answer);
    expect(r.ids[0] != tokenizer_eos(unspaced), "a BOS where the post-processor has none");
    expect(q.ids[0] == tokenizer_bos(begins) && q.prompt > 1, "no BOS where the post-processor has one");
    free(continued), free(alone), free(spaces), free(answer), free(r.ids), free(q.ids);
    tokenizer_free(spaced), tokenizer_free(unspaced), tokenizer_free(begins);
}

// While a character lacks bytes, what is printed is the text up to it: U+FFFD at the end waits.
static void test_streamed(void)
{
    static const char text[] = "ok \xf0\x9f\x91\x8d\xf0\x9f\x8f\xbd caf\xc3\xa9 \xe4\xba\xba!";
    tokenizer *t = tokenizer_named("llama3");
    size_t n, waited = 0;
    int *ids = tokenizer_encode(t, text, sizeof text - 1, 1, &n);
    for (size_t k = 1; k <= n; k++) {
        char *said = decode(t, ids, (int)k);
        size_t length = strlen(said), whole = length;
        while (length >= 3 && !memcmp(said + length - 3, "\xef\xbf\xbd", 3)) length -= 3;
        waited += length < whole;
        expect(!strncmp(said, text, length) && whole - length <= 3, "after %zu tokens: «%s»", k, said);
        free(said);
    }
    expect(waited > 2, "only %zu tokens end inside of a character", waited);
    free(ids), tokenizer_free(t);
}

// A character of one to four bytes, of any plane.
static size_t any_character(char *out)
{
    for (;;) {
        size_t n = 1 + rng_next(&dice) % 4;
        for (size_t i = 0; i < n; i++) out[i] = (char)(n == 1 ? rng_next(&dice) % 128 : (i ? 0x80 : 0xc0) | rng_next(&dice) % 64);
        if (n == 4) out[0] = (char)(0xf0 | rng_next(&dice) % 5);
        if (n == 3) out[0] = (char)(0xe0 | rng_next(&dice) % 16);
        if (utf8_length(out, n) == n) return n;
    }
}

// Any text comes back; the bytes that are not UTF-8 are read as U+FFFD; a megabyte of one letter, of marks on one letter,
// of spaces takes n log n.
static void test_byte_level_bytes(void)
{
    tokenizer *t = tokenizer_named("llama3"), *composing = tokenizer_named("qwen3");
    static const struct { const char *what, *repeated; } long_ones[] = {
        {"letters", "a"}, {"spaces", " "}, {"line ends", "\n"}, {"signs", "!?"}, {"marks", "\xcc\x81\xcc\x96"},
        {"Hangul", "\xe1\x84\x80\xe1\x85\xa1"},
    };
    char text[4096];
    size_t n, bytes;
    for (int round = 0; round < 300; round++) {
        size_t length = 0, room = 1 + rng_next(&dice) % (sizeof text - 5);
        while (length < room) length += any_character(text + length);
        for (size_t i = 0; i < length; i++) if (text[i] == 0x04 || text[i] == 0x1d) text[i] = ' ';     // no tokens for these
        int *ids = tokenizer_encode(t, text, length, 1, &n);
        char *back = tokenizer_decode(t, ids, n, &bytes);
        expect(bytes == length && !memcmp(back, text, length), "round %d: %zu bytes come back as %zu", round, length, bytes);
        free(ids), free(back);
    }
    int *ids = tokenizer_encode(t, "a\xff" "b\xe2\x82", 5, 1, &n);
    char *back = tokenizer_decode(t, ids, n, &bytes);
    expect(!strcmp(back, "a\xef\xbf\xbd" "b\xef\xbf\xbd\xef\xbf\xbd"), "bytes that are not UTF-8 come back as «%s»", back);
    free(ids), free(back);
    for (size_t i = 0; i < sizeof long_ones / sizeof *long_ones; i++) {
        size_t one = strlen(long_ones[i].repeated), length = (1 << 20) / one * one;
        char *whole = alloc(length, 1);
        for (size_t at = 0; at < length; at++) whole[at] = long_ones[i].repeated[at % one];
        double start = seconds();
        ids = tokenizer_encode(composing, whole, length, 1, &n);
        check(seconds() - start, 10, "seconds for a megabyte of %s", long_ones[i].what);
        expect(n > 0 && n <= length, "%zu ids of %s", n, long_ones[i].what);
        free(ids), free(whole);
    }
    tokenizer_free(t), tokenizer_free(composing);
}

// A run of spaces that a letter ends, or a sign of Chinese, under every published pre-tokenizer.
static void test_runs_of_spaces(void)
{
    json_t *golden = golden_json("dev/golden/merges.json"), *relatives, *item;
    size_t i, j, n, length = 1 << 20;
    char *text = alloc(length + 4, 1);
    memset(text, ' ', length);
    memcpy(text + length / 2, "x", 1), memcpy(text + length, "人", 3);
    json_array_foreach(golden, j, relatives)
        json_array_foreach(json_object_get(relatives, "cases"), i, item) {
            tokenizer *t = tokenizer_named(string_field(item, "name"));
            double start = seconds();
            int *ids = tokenizer_encode(t, text, length + 3, 1, &n);
            check(seconds() - start, 10, "%s: seconds for a megabyte of spaces", string_field(item, "name"));
            free(ids), tokenizer_free(t);
        }
    json_decref(golden), free(text);
}

// What a tokenizer.json may say that is not built, or is wrong: where, what, and a part of the line that refuses it.
#define LIST(parts) "{\"type\":\"Sequence\",\"pretokenizers\":[" parts "]}"
#define SPLIT(regex, behavior) \
    LIST("{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" regex "\"},\"behavior\":\"" behavior "\",\"invert\":false}," \
         "{\"type\":\"ByteLevel\",\"use_regex\":false}")
static const struct { const char *of, *part, *json, *says; } no_merges[] = {
    {"qwen2.5", "normalizer", "{\"type\":\"NFKC\"}", "its normalizer is NFKC"},
    {"qwen2.5", "normalizer", "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFC\"},{\"type\":\"Lowercase\"}]}",
        "its normalizer is Lowercase"},
    {"qwen2.5", "pre_tokenizer", "null", "its pre_tokenizer is missing"},
    {"qwen2.5", "pre_tokenizer", "{\"type\":\"Metaspace\"}", "its pre_tokenizer is Metaspace"},
    {"qwen2.5", "pre_tokenizer", "{\"type\":\"Digits\"}", "has no ByteLevel"},
    {"qwen2.5", "pre_tokenizer", LIST("{\"type\":\"ByteLevel\"},{\"type\":\"Digits\"}"), "behind ByteLevel is Digits"},
    {"qwen2.5", "pre_tokenizer", LIST("{\"type\":\"Digits\"},{\"type\":\"ByteLevel\",\"add_prefix_space\":true}"),
        "\"add_prefix_space\": true behind others"},
    {"qwen2.5", "pre_tokenizer", "{\"type\":\"Split\"}", "has a Split without a \"Regex\""},
    {"qwen2.5", "pre_tokenizer", SPLIT("a", "MergedWithNext"), "behavior MergedWithNext"},
    {"qwen2.5", "pre_tokenizer", SPLIT("\\\\w+", "Isolated"), "\\w+ has a part that is not built"},
    {"qwen2.5", "pre_tokenizer", SPLIT("\\\\p{Han}+", "Isolated"), "has a part that is not built"},
    {"qwen2.5", "pre_tokenizer", SPLIT("[a-z&&b]", "Isolated"), "has a part that is not built"},
    {"qwen2.5", "pre_tokenizer", SPLIT("[a[b]]", "Isolated"), "has a part that is not built"},
    {"qwen2.5", "pre_tokenizer", SPLIT("[]a]", "Isolated"), "has a part that is not built"},
    {"qwen2.5", "pre_tokenizer", SPLIT("[a", "Isolated"), "has a part that is not built"},
    {"qwen2.5", "pre_tokenizer", SPLIT("[\\\\S]", "Isolated"), "has a part that is not built"},
    {"qwen2.5", "pre_tokenizer", SPLIT("(?m:a)", "Isolated"), "has a part that is not built"},
    {"qwen2.5", "pre_tokenizer", SPLIT("(*UCP)a", "Isolated"), "has a part that is not built"},
    {"qwen2.5", "pre_tokenizer", SPLIT("a{1,3}+", "Isolated"), "has a part that is not built"},
    {"qwen2.5", "pre_tokenizer", SPLIT("a{,3}", "Isolated"), "has a part that is not built"},
    {"qwen2.5", "pre_tokenizer", SPLIT("a\\\\", "Isolated"), "has a part that is not built"},
    {"qwen2.5", "pre_tokenizer", SPLIT("(a", "Isolated"), "is not one that PCRE2 reads"},
    {"qwen2.5", "pre_tokenizer", SPLIT("a*", "Isolated"), "matches the empty text"},
    {"qwen2.5", "post_processor", "{\"type\":\"BertProcessing\"}", "its post_processor is BertProcessing"},
    {"qwen2.5", "post_processor", "{\"type\":\"TemplateProcessing\","
        "\"single\":[{\"Sequence\":{\"id\":\"A\"}},{\"SpecialToken\":{\"id\":\"<s>\"}}],"
        "\"special_tokens\":{\"<s>\":{\"ids\":[1]}}}", "puts \"<s>\" where it is not built"},
    {"qwen2.5", "post_processor", "{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"<s>\"}}]}",
        "and its id"},
    {"qwen2.5", "decoder", "null", "its decoder is missing"},
    {"qwen2.5", "decoder", "{\"type\":\"WordPiece\"}", "its decoder is WordPiece"},
    {"qwen2.5", "model", "{\"type\":\"Unigram\"}", "its model is Unigram"},
    {"qwen2.5", "model", "{\"type\":\"WordPiece\"}", "its model is WordPiece"},
    {"qwen2.5", "model", "{}", "its model is of no \"type\""},
    {"qwen2.5", "model.byte_fallback", "true", "its normalizer is NFC"},
    {"qwen2.5", "model.dropout", "0.1", "\"dropout\""},
    {"qwen2.5", "model.end_of_word_suffix", "\"</w>\"", "\"end_of_word_suffix\" \"</w>\""},
    {"qwen2.5", "model.continuing_subword_prefix", "\"##\"", "\"continuing_subword_prefix\" \"##\""},
    {"qwen2.5", "model.vocab", "{}", "expected \"vocab\""},
    {"qwen2.5", "model.vocab", "{\"a\":0,\"b\":0}", "have the same id"},
    {"qwen2.5", "model.vocab", "{\"a\":-1}", "expected an id"},
    {"qwen2.5", "model.vocab", "{\"a\":10000000}", "expected an id"},
    {"qwen2.5", "model.vocab", "{\"a\":0.5}", "expected an id"},
    {"qwen2.5", "model.merges", "{}", "expected \"merges\""},
    {"qwen2.5", "model.merges", "[\"a\"]", "expected two tokens with a space"},
    {"qwen2.5", "model.merges", "[\"a b c\"]", "expected two tokens with a space"},
    {"qwen2.5", "model.merges", "[\" b\"]", "expected two tokens with a space"},
    {"qwen2.5", "model.merges", "[[\"a\"]]", "merge 1: expected"},
    {"qwen2.5", "model.merges", "[[\"a\",1]]", "merge 1: expected"},
    {"qwen2.5", "model.merges", "[[\"a\",\"b\",\"c\"]]", "merge 1: expected"},
    {"qwen2.5", "model.merges", "[[\"a\",\"zz\"]]", "\"a zz\", joins what is no token"},
    {"qwen2.5", "model.merges", "[[\"i\",\"n\"],[\"z\",\"q\"]]", "merge 2, \"z q\", makes what is no token"},
    {"prepend", "normalizer", "{\"type\":\"NFC\"}", "its normalizer is NFC"},
    {"prepend", "normalizer", "{\"type\":\"Prepend\",\"prepend\":\"_\"}", "its normalizer is Prepend"},
    {"first", "pre_tokenizer", "{\"type\":\"ByteLevel\"}", "its pre_tokenizer is ByteLevel"},
    {"first", "pre_tokenizer", "{\"type\":\"Metaspace\",\"replacement\":\"▁\",\"prepend_scheme\":\"first\"}",
        "Metaspace is not built without"},
    {"first", "pre_tokenizer", "{\"type\":\"Metaspace\",\"replacement\":\"_\",\"prepend_scheme\":\"first\",\"split\":false}",
        "Metaspace is not built without"},
    {"first", "decoder", "{\"type\":\"ByteLevel\"}", "its decoder is ByteLevel"},
    {"first", "decoder", "{\"type\":\"Sequence\",\"decoders\":[]}", "its decoder is Sequence"},
    {"first", "model.vocab", "{\"a\":0}", "has no token <0x00>"},
};

static void open_directory(const char *dir) { tokenizer_free(open_tokenizer(dir, 0)); }

static void test_refused_merges(void)
{
    json_t *golden = golden_json("dev/golden/merges.json"), *relatives;
    for (size_t i = 0; i < sizeof no_merges / sizeof *no_merges; i++) {
        const char *part = no_merges[i].part, *inner = strchr(part, '.');
        json_t *item = case_named(golden, no_merges[i].of, &relatives);
        char *dir = merges_directory(relatives, item, PAIRS);
        json_t *whole = whole_tokenizer(relatives, item, PAIRS), *json = json_loads(no_merges[i].json, JSON_DECODE_ANY, NULL);
        if (!json) die("case %zu is not JSON", i);
        json_object_set_new(inner ? json_object_get(whole, "model") : whole, inner ? inner + 1 : part, json);
        write_json(dir, "tokenizer.json", whole);
        char *said = said_by(open_directory, dir);
        expect(!!strstr(said, no_merges[i].says), "%s %s: «%s», expected «%s»", part, no_merges[i].json, said, no_merges[i].says);
        free(said), free(dir), json_decref(whole);
    }
    json_decref(golden);
}

// Either half of a merge may be token 0.
static void test_first_token(void)
{
    static const char *const vocabularies[] = {"{\"a\":0,\"b\":1,\"ab\":2}", "{\"b\":0,\"a\":1,\"ab\":2}"};
    json_t *golden = golden_json("dev/golden/merges.json"), *relatives;
    for (int i = 0; i < 2; i++) {
        json_t *item = case_named(golden, "qwen2.5", &relatives);
        char *dir = merges_directory(relatives, item, PAIRS);
        json_t *whole = whole_tokenizer(relatives, item, PAIRS), *of = json_object_get(whole, "model");
        json_object_set_new(of, "vocab", json_loads(vocabularies[i], 0, NULL));
        json_object_set_new(of, "merges", json_loads("[[\"a\",\"b\"]]", 0, NULL));
        write_json(dir, "tokenizer.json", whole);
        tokenizer *t = open_tokenizer(dir, 0);
        size_t n;
        int *ids = tokenizer_encode(t, "ab", 2, 1, &n);
        expect(n == 1 && ids[0] == 2, "%s: «ab» is %zu tokens", vocabularies[i], n);
        free(ids), free(dir), json_decref(whole), tokenizer_free(t);
    }
    json_decref(golden);
}

// Where a directory has both, tokenizer.model is read; without an EOS that a file names, <|endoftext|> is it, or none.
static void test_byte_level_files(void)
{
    char *dir = directory_named("qwen2.5", PAIRS), command[600];
    snprintf(command, sizeof command, "rm %s/tokenizer_config.json", dir);
    if (system(command)) die("cannot prepare %s", dir);
    tokenizer *t = open_tokenizer(dir, 0);
    expect(tokenizer_eos(t) == tokenizer_find(t, "<|endoftext|>"), "EOS is %d", tokenizer_eos(t));
    tokenizer_free(t), free(dir);
    dir = directory_named("qwen2.5", PAIRS);                    // a vocabulary that leaves the ids of added tokens out
    snprintf(command, sizeof command, "sed -i 's/\"vocab\": *{/&\"zz\":500,/' %s/tokenizer.json", dir);
    if (system(command)) die("cannot prepare %s", dir);
    t = open_tokenizer(dir, 0);
    int call = tokenizer_find(t, "<tool_call>");
    char *said = decode(t, &call, 1);
    expect(tokenizer_vocab(t) == 501 && !strcmp(said, "<tool_call>"), "of %d tokens, %d is «%s»", tokenizer_vocab(t), call, said);
    tokenizer_free(t), free(dir), free(said);
    dir = directory_named("llama3", PAIRS);
    snprintf(command, sizeof command,
        "echo '{\"add_bos_token\": false, \"eos_token\": \"<|eot_id|>\"}' > %s/tokenizer_config.json", dir);
    if (system(command)) die("cannot prepare %s", dir);
    t = open_tokenizer(dir, 0);
    expect(tokenizer_bos(t) == -1 && tokenizer_eos(t) == tokenizer_find(t, "<|eot_id|>"), "BOS is %d", tokenizer_bos(t));
    tokenizer_free(t);
    snprintf(command, sizeof command, "echo '{}' > %s/tokenizer_config.json", dir);
    if (system(command)) die("cannot prepare %s", dir);
    said = said_by(open_directory, dir);
    expect(!!strstr(said, "names no \"eos_token\""), "without an EOS: «%s»", said);
    free(said), free(dir);
    dir = directory_named("qwen2.5", PAIRS);
    snprintf(command, sizeof command,
        "echo '{\"add_bos_token\": true, \"bos_token\": \"<|im_start|>\"}' > %s/tokenizer_config.json", dir);
    if (system(command)) die("cannot prepare %s", dir);
    t = open_tokenizer(dir, 0);
    expect(tokenizer_bos(t) == tokenizer_find(t, "<|im_start|>"), "BOS is %d", tokenizer_bos(t));
    tokenizer_free(t);
    snprintf(command, sizeof command, "rm %s/tokenizer_config.json; cp base/tokenizer.model %s", dir, dir);
    if (system(command)) die("cannot prepare %s", dir);
    t = open_tokenizer(dir, 0);
    expect(tokenizer_vocab(t) == 768, "%d pieces, of which tokenizer.model has 768", tokenizer_vocab(t));
    tokenizer_free(t), free(dir);
    dir = directory_named("gpt2", GPT2_FILES);
    snprintf(command, sizeof command, "echo '{\"tokenizer_class\": \"Qwen2Tokenizer\"}' > %s/tokenizer_config.json", dir);
    if (system(command)) die("cannot prepare %s", dir);
    said = said_by(open_directory, dir);
    expect(!!strstr(said, "is of Qwen2Tokenizer"), "vocab.json of another class: «%s»", said);
    free(said), free(dir);
}

// The paper's prompt.
static char *paper_prompt(const char *question)
{
    return text_of("Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n%s\n\n### Response:", question);
}

// The prompt's ids do not depend on the answer; every token of the answer is learnt, and they say the answer and nothing else.
// Held for answers that begin with the rest of any piece that begins with ":", the prompt's last character.
static void edge_cases(const char *dir)
{
    tokenizer *t = plain_tokenizer(dir);
    char *prompt = paper_prompt("What is 3 minus 8?");
    row bare = encode_row(t, prompt, "", 0);
    int straddling = 0;
    for (int id = 0; id < tokenizer_vocab(t); id++) {
        char *piece = decode(t, &id, 1), answer[64];
        if (*piece == ':' && piece[1]) {
            snprintf(answer, sizeof answer, "%s5 and more", piece + 1);
            row r = encode_row(t, prompt, answer, 1);
            char *said = decode(t, r.ids + r.prompt, r.n - r.prompt);
            check(r.prompt != bare.n || memcmp(r.ids, bare.ids, (size_t)bare.n * sizeof(int)), 0,
                "%s: the prompt's ids before «%s»", dir, answer);
            expect(!strcmp(said, answer), "%s: learns «%s» of «%s»", dir, said, answer);
            straddling++;
            free(r.ids), free(said);
        }
        free(piece);
    }
    check(!straddling, 0, "%s: no piece begins with a colon", dir);
    // where no piece straddles, ids are those of one text
    static const char *const ordinary[] = {"Now Emma had 17 cups.", " 5", "#### 8", "x"};
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
        for (size_t i = 0; i < length; i++)
            text[i] = kind == 0 ? 'a' : kind == 1 ? (char)(1 + rng_next(&dice) % 127) : "the cat sat "[i % 12];
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
        expect(bytes == length && !memcmp(back, text, length), "kind %d comes back", kind);
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
        {"{\"instruction\": \"Add 1 and 1.\", \"input\": \"\", \"output\": \"2\", \"text\": \"Below is …\"}",
            "Add 1 and 1.", "2"},
        {"{\"type\": \"GSM_Rephrased\", \"query\": \"What is 1 + 1?\", \"original_question\": \"1 + 1?\", "
            "\"response\": \"2.\\n#### 2\\nThe answer is: 2\"}",
            "What is 1 + 1?", "2.\n#### 2\nThe answer is: 2"},
        {"{\"question\": \"1 + 1?\", \"answer\": \"1 + 1 = <<1+1=2>>2\\n#### 2\"}", "1 + 1?", "1 + 1 = <<1+1=2>>2\n#### 2"},
    };
    enum { N = sizeof published / sizeof *published };
    tokenizer *t = open_tokenizer("base", 0);
    for (int array = 0; array < 2; array++) {
        char *path = in_scratch(array ? "published.json" : "published.jsonl"), file[2000] = "";
        for (int i = 0; i < N; i++)
            snprintf(file + strlen(file), sizeof file - strlen(file), "%s%s%s", !array ? "" : i ? ",\n" : "[",
                published[i].json, array && i + 1 < N ? "" : array ? "]" : "\n");
        write_text(path, file);
        dataset d = read_rows(t, path, 1024);
        expect(arrlen(d.rows) == N, "%s: %td rows", path, arrlen(d.rows));
        for (int i = 0; i < N && i < arrlen(d.rows); i++) {
            const row *r = &d.rows[i];
            char *prompt = paper_prompt(published[i].question), *whole = decode(t, r->ids, r->n), want[1000];
            size_t n;
            free(tokenizer_encode(t, prompt, strlen(prompt), 1, &n));
            snprintf(want, sizeof want, "%s%s", prompt, published[i].answer);
            expect(!strcmp(whole, want), "%s, row %d is «%s»", path, i, whole);
            expect(r->prompt == (int)n + 1 && r->ids[0] == tokenizer_bos(t) && r->ids[r->n - 1] == tokenizer_eos(t)
                && !strcmp(r->answer, published[i].answer), "%s, row %d", path, i);
            free(prompt), free(whole);
        }
        free_rows(&d), free(path);
    }
    tokenizer_free(t);
}

// A .txt file is one stream of tokens, cut into windows of --seq: all its tokens, in their order, each learnt but a
// window's first. A last window of one token has nothing to learn.
static void test_windows(void)
{
    tokenizer *t = open_tokenizer("base", 0);
    static const char text[] = "Once upon a time there were two shells.\n\nShe had 12 of them, and Tom had none.\n";
    char *path = in_scratch("stream.txt");
    write_text(path, text);
    size_t n;
    int *ids = tokenizer_encode(t, text, strlen(text), 1, &n);
    int all = (int)n + 1;               // BOS stands in front
    for (int seq = 2; seq <= all + 1; seq++) {
        dataset d = read_rows(t, path, seq);
        int at = 0;
        for (int i = 0; i < arrlen(d.rows); i++) {
            const row *r = &d.rows[i];
            expect(r->n <= seq && r->prompt == 1 && !r->answer,
                "--seq %d, window %d: %d tokens, %d not learnt", seq, i, r->n, r->prompt);
            for (int j = 0; j < r->n; j++, at++)
                expect(at < all && r->ids[j] == (at ? ids[at - 1] : tokenizer_bos(t)), "--seq %d, token %d", seq, at);
        }
        expect(at == all - (all % seq == 1), "--seq %d: %d of %d tokens", seq, at, all);
        expect(arrlen(d.rows) == all / seq + (all % seq > 1), "--seq %d: %td windows", seq, arrlen(d.rows));
        free_rows(&d);
    }
    free(ids), free(path), tokenizer_free(t);
}

// Texts of a few words each, more of them than are remembered, of up to 45 letters, twice over; and some by a tokenizer that
// knows no word yet.
static void test_known_words(void)
{
    enum { MANY = 20000, FRESH = 100 };
    tokenizer *t = open_tokenizer("base", 0);
    int **ids = alloc(MANY, sizeof *ids);
    size_t *n = alloc(MANY, sizeof *n);
    for (int round = 0; round < 2; round++) {
        rng g = {5};
        for (int i = 0; i < MANY; i++) {
            char text[46] = {0};
            size_t letters = 1 + rng_next(&g) % 45, m;
            for (size_t j = 0; j < letters; j++) text[j] = "etaoin7 "[rng_next(&g) % 8];
            tokenizer *fresh = i % (MANY / FRESH) || round ? t : open_tokenizer("base", 0);
            int *got = tokenizer_encode(fresh, text, letters, 1, &m);
            if (!round) ids[i] = got, n[i] = m;
            else expect(m == n[i] && !memcmp(got, ids[i], m * sizeof *got), "«%s» has other ids when it comes again", text);
            if (round) free(got), free(ids[i]);
            if (fresh != t) tokenizer_free(fresh);
        }
    }
    free(ids), free(n), tokenizer_free(t);
}

// Rows are cut at --seq tokens and counted; those that keep nothing of their answer are left out and counted, too.
static void test_cut_rows(void)
{
    tokenizer *t = open_tokenizer("base", 0);
    char *path = in_scratch("cut-rows.jsonl");
    write_text(path, "{\"question\": \"1 + 1?\", \"answer\": \"two, or 2\"}\n");
    dataset whole = read_rows(t, path, 1 << 20);
    row r = whole.rows[0];
    expect(!whole.cut && !whole.dropped, "a whole row is cut");
    for (int seq = r.prompt - 1; seq <= r.n + 1; seq++) {
        dataset d = {.path = path};
        row part = {.ids = alloc((size_t)r.n, sizeof(int)), .n = r.n, .prompt = r.prompt};
        memcpy(part.ids, r.ids, (size_t)r.n * sizeof(int));
        keep_row(&d, part, seq);
        int kept = seq > r.prompt;
        expect(arrlen(d.rows) == kept && d.dropped == !kept,
            "--seq %d keeps %td rows, %d left out", seq, arrlen(d.rows), d.dropped);
        expect(d.cut == (seq < r.n), "--seq %d: %d cut", seq, d.cut);
        if (kept) expect(d.rows[0].n == (seq < r.n ? seq : r.n), "--seq %d keeps %d tokens", seq, d.rows[0].n);
        if (kept) expect(!memcmp(d.rows[0].ids, r.ids, (size_t)d.rows[0].n * sizeof(int)),
            "--seq %d: the tokens", seq);
        free_rows(&d);
    }
    free_rows(&whole), free(path), tokenizer_free(t);
}

// A step's loss is the mean over the target tokens of all its rows, prompts left out, and its gradient is that mean's:
// against each row alone, whose loss is a plain sum.
static void test_targets(void)
{
    static int ids[5][9] = {{1, 5, 3, 12, 7, 2}, {1, 9, 4, 4, 11, 2, 0, 8, 6}, {1, 10, 2}, {1, 3, 3, 8}, {1, 0, 7, 7,
        2, 12, 2}};
    static char fifth[7] = {0, 1, 0, 0, 1, 1, 0};
    static const row rows[5] = {
        {.ids = ids[0], .n = 6, .prompt = 2}, {.ids = ids[1], .n = 9, .prompt = 7}, {.ids = ids[2], .n = 3, .prompt = 1},
        {.ids = ids[3], .n = 4, .prompt = 3}, {.ids = ids[4], .n = 7, .prompt = 1, .learnt = fifth},
    };
    int order[5] = {4, 2, 0, 1, 3}, targets = 0, tokens, seen = 0;
    plan p = small_plan("bone");
    run r = {.order = order, .epoch = -1};
    for (int i = 0; i < 5; i++) arrput(r.train.rows, rows[i]);
    char *dir = small_model(0);
    opt.model = dir;
    model_measure(&r.m, open_config(), p);
    fill_model(&r.m, NULL, 0);
    opt.no_shuffle = 1, opt.batch = 2, opt.accum = 3;
    shake(&r.m, 0.2, &dice);
    batch b = batch_new(p.tokens, 5);
    double norm, sum = 0;
    train_step(&r, &b, &norm, &tokens);                 // of its gradient the next step keeps nothing
    double loss = train_step(&r, &b, &norm, &tokens);
    mat gradient = like(flat(&r.m, r.m.grad));
    copy(gradient, flat(&r.m, r.m.grad));
    check_number(norm, sqrt(sum_of_squares(gradient)), EXACT, "norm");
    static const int learnt[5][7] = {{2, 3, 4, 5}, {7, 8}, {1, 2}, {3}, {1, 4, 5}}, counts[5] = {4, 2, 2, 1, 3};
    for (int i = 0; i < 5; i++) targets += counts[i];
    zero(flat(&r.m, r.m.grad));
    for (int i = 0; i < 5; i++) {
        batch_clear(&b);
        batch_add(&b, &rows[i]);
        expect(b.targets == counts[i] && b.tokens == rows[i].n - 1,
            "row %d has %d targets", i, b.targets);
        for (int j = 0; j < b.targets && j < counts[i]; j++)
            expect(b.label[j] == rows[i].ids[learnt[i][j]] && b.target_row[j] == learnt[i][j] - 1,
                "row %d, target %d", i, j);
        sum += model_step(&r.m, &b, 1.0 / targets);
        seen += b.tokens;
    }
    check_number(loss, sum / targets, EXACT, "loss");
    expect(tokens == seen, "%d tokens, expected %d", tokens, seen);
    check_mat(gradient, flat(&r.m, r.m.grad), 10 * EXACT, "gradient");
    dataset d = {.rows = r.train.rows};
    long counted;
    check_number(evaluate(&r.m, &d, &counted), loss, EXACT, "evaluation");
    expect(counted == targets, "evaluated %ld targets of %d", counted, targets);
    arrfree(r.train.rows), dev_free(gradient.p), batch_free(&b), model_free(&r.m), free(dir);
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
    {"number.jsonl",     BYTES("{\"instruction\": \"Add 1.\", \"input\": 21, \"output\": \"22\"}\n"), NULL, "Add 1.\n21",
        "22", 1, 0},
    {"spelling.jsonl",   BYTES("{\"question\": 21.50, \"answer\": -1E3}"), NULL, "21.50", "-1E3", 1, 0},
    {"long.jsonl",       BYTES("{\"question\": \"a\", \"answer\": "
        "12345678901234567890123456789012345678901234567890123456789012345678901234567890}"),
        NULL, "a", "12345678901234567890123456789012345678901234567890123456789012345678901234567890", 1, 0},
    {"spellings.jsonl",  BYTES("{\"a\": {\"question\": [1, 2]}, \"b:\\\"\": \":{\", \"question\": 0.10, "
        "\"c\": [{}], \"answer\" : 1e-05}"), NULL, "0.10", "1e-05", 1, 0},
    {"numbers.json",     BYTES("[ {\"question\": 007e0}]"), "numbers.json:1: not valid JSON, at byte 16 of the line: ",
        0, 0, 0, 0},
    {"nan.jsonl",        BYTES("{\"score\": NaN, \"question\": \"a\", \"answer\": \"b\"}"),
        "at byte 13 of the line: NaN or Infinity, which only Python writes", 0, 0, 0, 0},
    {"infinity.jsonl",   BYTES("{\"score\": [Infinity], \"text\": \"a\"}"), "which only Python writes", 0, 0, 0, 0},
    {"minus.jsonl",      BYTES("{\"score\": -Infinity, \"text\": \"a\"}"), "which only Python writes", 0, 0, 0, 0},
    {"wide.jsonl",       BYTES("{\"score\": 1e999, \"text\": \"a\"}"), "real number overflow", 0, 0, 0, 0},
    {"text-beside.jsonl", BYTES("{\"text\": {\"not\": \"read\"}, \"question\": \"a\", \"answer\": \"b\"}"), NULL, "a", "b", 1, 0},
    {"null.jsonl",       BYTES("{\"instruction\": \"a\", \"input\": null, \"output\": \"b\"}"), NULL, "a", "b", 1, 0},
    {"null-shape.jsonl", BYTES("{\"instruction\": null, \"output\": null, \"question\": \"a\", \"answer\": \"b\"}"), NULL,
        "a", "b", 1, 0},
    {"blanks.jsonl",     BYTES("{\"question\": \"x\", \"answer\": \" \\n\"}\n" AB), NULL, "a", "b", 1, 1},
    {"pretty.json",      BYTES("{\n  \"question\": \"a\",\n  \"answer\": \"b\"\n}\n"), NULL, "a", "b", 1, 0},
    {"empty.jsonl",      BYTES("{\"question\": \"x\", \"answer\": \"\"}\n" AB "\n{\"text\": \"\"}\n" AB), NULL, "a", "b", 2, 2},
    {"blank.jsonl",      BYTES("\n" AB "\n\n  \t\r\n" AB "\r\n\n"), NULL, "a", "b", 2, 0},
    {"mark.jsonl",       BYTES("\xef\xbb\xbf" AB "\n"), NULL, "a", "b", 1, 0},
    {"array.jsonl",      BYTES("\n[" AB ",\n " AB "]\n"), NULL, "a", "b", 2, 0},
    {"lines.json",       BYTES(AB "\n" AB "\n"), NULL, "a", "b", 2, 0},
    {"pair.jsonl",       BYTES("{\"question\": \"\\ud83d\\uDE00\\u00e9\", \"answer\": \"b\"}"), NULL,
        "\xf0\x9f\x98\x80\xc3\xa9", "b", 1, 0},
    {"tool.jsonl",       BYTES(AB "\n{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, "
        "{\"role\": \"tool\", \"content\": \"b\"}]}"),
        "tool.jsonl:2: turn 2 is \"tool\"'s; expected system, user (human) or assistant (gpt)", 0, 0, 0, 0},
    {"no-role.jsonl",    BYTES("{\"messages\": [{\"content\": \"a\"}]}"), "turn 1 does not say whose it is", 0, 0, 0, 0},
    {"no-turn.jsonl",    BYTES("{\"messages\": [\"a\"]}"), "turn 1 does not say whose it is", 0, 0, 0, 0},
    {"no-list.jsonl",    BYTES("{\"messages\": \"a\"}"), "no-list.jsonl:1: expected a list of turns", 0, 0, 0, 0},
    {"no-turns.jsonl",   BYTES("{\"messages\": []}"), "no turn is the assistant's", 0, 0, 0, 0},
    {"nobody.jsonl",     BYTES("{\"conversations\": [{\"from\": \"human\", \"value\": \"a\"}]}"),
        "no turn is the assistant's", 0, 0, 0, 0},
    {"no-text.jsonl",    BYTES("{\"messages\": [{\"role\": \"assistant\", \"content\": null}]}"),
        "turn 1 has no text in \"content\" or \"value\"", 0, 0, 0, 0},
    {"number.jsonl",     BYTES("{\"messages\": [{\"role\": \"assistant\", \"content\": 5}]}"), "turn 1 has no text", 0, 0, 0, 0},
    {"image.jsonl",      BYTES("{\"messages\": [{\"role\": \"assistant\", \"content\": [{\"type\": \"text\", \"text\": \"a\"}, "
        "{\"type\": \"image_url\", \"image_url\": {}}]}]}"),
        "part 2 of turn 1 is of type image_url, expected a text", 0, 0, 0, 0},
    {"tools.jsonl",      BYTES("{\"tools\": [{}], \"messages\": [{\"role\": \"assistant\", \"content\": \"a\"}]}"),
        "has \"tools\", which no template here can write", 0, 0, 0, 0},
    {"weight.jsonl",     BYTES("{\"messages\": [{\"role\": \"assistant\", \"content\": \"a\", \"weight\": 0.5}]}"),
        "the \"weight\" of turn 1 must be 0 or 1", 0, 0, 0, 0},
    {"call.jsonl",       BYTES("{\"messages\": [{\"role\": \"assistant\", \"content\": \"a\", "
        "\"tool_calls\": [{\"id\": \"1\"}]}]}"),
        "turn 1 has \"tool_calls\", which no template here can write", 0, 0, 0, 0},
    {"late.jsonl",       BYTES("{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, "
        "{\"role\": \"system\", \"content\": \"b\"}, "
        "{\"role\": \"assistant\", \"content\": \"c\"}]}"),
        "turn 2 is the system's; --template alpaca has a place for it in front only",
        0, 0, 0, 0},
    {"half-list.jsonl",  BYTES("{\"prompt\": \"a\", \"completion\": [{\"role\": \"assistant\", \"content\": \"c\"}]}"),
        "expected a list of turns", 0, 0, 0, 0},
    {"says-nothing.jsonl", BYTES("{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}, "
        "{\"role\": \"assistant\", \"content\": \" \"}]}\n" AB),
        NULL, "a", "b", 1, 1},
    {"openai.jsonl",     BYTES("{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, "
        "{\"role\": \"assistant\", \"content\": \"b\"}]}"),
        NULL, "a", "b", 1, 0},
    {"true.jsonl",       BYTES(AB "\n{\"instruction\": \"a\", \"input\": true, \"output\": \"b\"}"),
        "true.jsonl:2: \"input\" is true, expected text or a number", 0, 0, 0, 0},
    {"object.jsonl",     BYTES("{\"question\": {\"a\": 1}, \"answer\": \"b\"}"), "\"question\" is an object, expected", 0,
        0, 0, 0},
    {"list.jsonl",       BYTES("{\"question\": \"a\", \"answer\": [\"b\"]}"), "\"answer\" is an array, expected", 0, 0, 0, 0},
    {"nan-read.jsonl",   BYTES("{\"question\": \"a\", \"answer\": NaN}"), "which only Python writes", 0, 0, 0, 0},
    {"null-answer.jsonl", BYTES("{\"question\": \"a\", \"answer\": null}"), "has \"question\" but no text in \"answer\"",
        0, 0, 0, 0},
    {"false-text.json",  BYTES("[{\"text\": \"a b\"}, {\"text\": false}]"), "false-text.json, row 2: \"text\" is false",
        0, 0, 0, 0},
    {"high.jsonl",       BYTES(AB "\n{\"question\": \"a\\ud83d b\", \"answer\": \"b\"}"),
        "high.jsonl:2: not valid JSON, at byte 24 of the line: invalid Unicode '\\uD83D'", 0, 0, 0, 0},
    {"low.jsonl",        BYTES("{\"question\": \"\\ude00\", \"answer\": \"b\"}"), "invalid Unicode '\\uDE00'", 0, 0, 0, 0},
    {"two-high.jsonl",   BYTES("{\"question\": \"\\ud83d\\ud83d\\ude00\", \"answer\": \"b\"}"),
        "invalid Unicode '\\uD83D\\uD83D'", 0, 0, 0, 0},
    {"zero.jsonl",       BYTES("{\"question\": \"a\\u0000\", \"answer\": \"b\"}"),
        "at byte 22 of the line: \\u0000 is not allowed", 0, 0, 0, 0},
    {"escape.jsonl",     BYTES("{\"question\": \"a\\x41\", \"answer\": \"b\"}"), "invalid escape near '\"a\\x'", 0, 0, 0, 0},
    {"hex.jsonl",        BYTES("{\"question\": \"a\\u12g4\", \"answer\": \"b\"}"), "invalid escape near '\"a\\u12g'", 0, 0, 0, 0},
    {"tab.jsonl",        BYTES("{\"question\": \"a\tb\", \"answer\": \"b\"}"), "control character 0x9", 0, 0, 0, 0},
    {"latin.jsonl",      BYTES(AB "\n{\"question\": \"caf\xe9\", \"answer\": \"b\"}"),
        "latin.jsonl:2: byte 18 of the line is 0xe9, which is not UTF-8", 0, 0, 0, 0},
    {"overlong.jsonl",   BYTES("{\"question\": \"\xc0\x80\", \"answer\": \"b\"}"), "byte 15 of the line is 0xc0", 0, 0, 0, 0},
    {"nul.jsonl",        BYTES(AB "\n{\"question\": \"a\0\", \"answer\": \"b\"}"),
        "nul.jsonl:2: byte 16 of the line is NUL", 0, 0, 0, 0},
    {"nul.txt",          BYTES("Once upon a time.\nThere was\0 a girl."), "nul.txt:2: byte 10 of the line is NUL", 0, 0, 0, 0},
    {"latin.txt",        BYTES("Once upon a time.\n\xe9t\xe9"), "latin.txt:2: byte 1 of the line is 0xe9", 0, 0, 0, 0},
    {"cut.txt",          BYTES("Once upon a time \xe2\x82"), "cut.txt:1: byte 18 of the line is 0xe2", 0, 0, 0, 0},
    {"utf16.txt",        BYTES("\xff\xfeO\0n\0c\0e\0"), "utf16.txt: is UTF-16", 0, 0, 0, 0},
    {"utf16be.jsonl",    BYTES("\xfe\xff\0{\0}"), "is UTF-16", 0, 0, 0, 0},
    {"utf16bare.json",   BYTES("[\0{\0}\0]\0"), "is UTF-16", 0, 0, 0, 0},
    {"twice.jsonl",      BYTES("{\"question\": \"a\", \"answer\": \"b\", \"\\u0061nswer\": \"c\"}"),
        "at byte 46 of the line: duplicate object key near '\"\\u0061nswer\"'", 0, 0, 0, 0},
    {"comma.json",       BYTES("[" AB ",\n]"), "comma.json:2: not valid JSON, at byte 1 of the line: unexpected token", 0,
        0, 0, 0},
    {"open.json",        BYTES("[" AB "\n"), "open.json:2: not valid JSON, at byte 1 of the line: expected , or ]", 0, 0, 0, 0},
    {"behind.json",      BYTES("[" AB "]\n[" AB "]"), "behind.json:2: not valid JSON, at byte 1 of the line: more "
        "text behind the array", 0, 0, 0, 0},
    {"two.jsonl",        BYTES(AB AB), "more text behind the object", 0, 0, 0, 0},
    {"two.json",         BYTES(AB " " AB), "two.json:1: not valid JSON, at byte 34 of the line: more text behind the "
        "object", 0, 0, 0, 0},
    {"octal.jsonl",      BYTES("{\"question\": 012, \"answer\": \"b\"}"), "invalid token near '0'", 0, 0, 0, 0},
    {"point.jsonl",      BYTES("{\"question\": 1., \"answer\": \"b\"}"), "invalid token near '1.'", 0, 0, 0, 0},
};

static void test_row_files(void)
{
    tokenizer *t = shared_tokenizer = open_tokenizer("base", 0);
    for (size_t i = 0; i < sizeof row_files / sizeof *row_files; i++) {
        if (not_asked_for(row_files[i].name)) continue;
        char *path = in_scratch(row_files[i].name), want[1000];
        write_bytes(path, row_files[i].file, row_files[i].bytes);
        const char *name = row_files[i].name, *says = row_files[i].says;
        char *said = said_by(only_read_rows, path);
        check(says ? !strstr(said, says) : *said, 0, "%s: «%s», expected «%s»", name, said, says ? says : "");
        if (!says && !*said) {
            dataset d = read_rows(t, path, 1024);
            char *whole = decode(t, d.rows[0].ids, d.rows[0].n), *prompt = paper_prompt(row_files[i].question);
            snprintf(want, sizeof want, "%s%s", prompt, row_files[i].answer);
            check(strcmp(whole, want) || strcmp(d.rows[0].answer, row_files[i].answer), 0, "%s: «%s»", name, whole);
            expect(arrlen(d.rows) == row_files[i].rows, "%s: %td rows", name, arrlen(d.rows));
            expect(d.empty == row_files[i].empty, "%s: %d left out", name, d.empty);
            free(whole), free(prompt), free_rows(&d);
        }
        free(said), free(path);
    }
    tokenizer_free(t);
}

// A row as text, what is learnt of it in «».
static char *marked(const tokenizer *t, const row *r)
{
    char *text = copy_text("");
    for (int from = 0, to; from < r->n; from = to) {
        int learnt = is_learnt(r, from);
        for (to = from; to < r->n && is_learnt(r, to) == learnt;) to++;
        char *part = spelled_out(t, r->ids, from, to);
        char *more = text_of("%s%s%s%s", text, learnt ? "«" : "", part, learnt ? "»" : "");
        free(part), free(text);
        text = more;
    }
    return text;
}

#define PAPER "Below is an instruction that describes a task. Write a response that appropriately completes the request."
#define ASKED(q) "\n\n### Instruction:\n" q "\n\n### Response:"

// Rows as people publish them, what reaches the model of each, and what is learnt. Of several turns that is what the
// assistant says, each with its end.
static void test_row_formats(void)
{
    static const struct { const char *json, *want; } formats_read[] = {
        {"{\"instruction\": \"q\", \"context\": \"c\", \"response\": \"a\", \"category\": \"x\"}",
            "<s>" PAPER ASKED("q\nc") "«a</s>»"},
        {"{\"instruction\": \"q\", \"context\": \"\", \"response\": \"a\"}", "<s>" PAPER ASKED("q") "«a</s>»"},
        {"{\"instruction\": \"q\", \"output\": \"a\", \"response\": \"b\"}", "<s>" PAPER ASKED("q") "«a</s>»"},
        {"{\"query\": \"q\", \"answer\": \"a\", \"resource\": \"evol\", \"lang\": \"c\"}", "<s>" PAPER ASKED("q") "«a</s>»"},
        {"{\"id\": \"niv.1\", \"system_prompt\": \"Be brief.\", \"question\": \"q\", \"response\": \"a\"}",
            "<s>Be brief." ASKED("q") "«a</s>»"},
        {"{\"id\": \"niv.1\", \"system_prompt\": \"\", \"question\": \"q\", \"response\": 18.50}",
            "<s>" PAPER ASKED("q") "«18.50</s>»"},
        {"{\"prompt\": \"The sky\", \"completion\": \" is blue\"}", "<s>The sky« is blue</s>»"},
        {"{\"prompt\": [{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"assistant\", \"content\": \"a\"}, "
            "{\"role\": \"user\", \"content\": \"r\"}], \"completion\": [{\"role\": \"assistant\", \"content\": \"b\"}]}",
            "<s>" PAPER ASKED("q") "a</s>" ASKED("r") "«b</s>»"},
        {"{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"assistant\", \"content\": \"a\"}, "
            "{\"role\": \"user\", \"content\": \"r\"}, {\"role\": \"assistant\", \"content\": \"b\"}, "
            "{\"role\": \"user\", \"content\": \"never seen\"}]}",
            "<s>" PAPER ASKED("q") "«a</s>»" ASKED("r") "«b</s>»"},
        {"{\"messages\": [{\"role\": \"developer\", \"content\": \"Be brief.\"}, {\"role\": \"user\", \"content\": "
            "[{\"type\": \"text\", \"text\": \"q\"}, {\"type\": \"text\", \"text\": \"c\"}]}, "
            "{\"role\": \"assistant\", \"content\": \"a\", \"tool_calls\": []}]}",
            "<s>Be brief." ASKED("q\nc") "«a</s>»"},
        {"{\"conversations\": [{\"from\": \"system\", \"value\": \"Be brief.\"}, {\"from\": \"human\", \"value\": \"q\"}, "
            "{\"from\": \"gpt\", \"value\": \"a\"}]}", "<s>Be brief." ASKED("q") "«a</s>»"},
        {"{\"conversations\": [{\"from\": \"gpt\", \"value\": \"a\"}]}", "<s>" PAPER "\n\n### Response:«a</s>»"},
        {"{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}, "
            "{\"role\": \"assistant\", \"content\": \"a\", \"weight\": 0}, "
            "{\"role\": \"user\", \"content\": \"r\"}, {\"role\": \"assistant\", \"content\": \"b\", \"weight\": 1}]}",
            "<s>" PAPER ASKED("q") "a</s>" ASKED("r") "«b</s>»"},
        {"{\"system\": \"Be brief.\", \"tools\": [], \"conversations\": [{\"from\": \"human\", \"value\": \"q\"}, "
            "{\"from\": \"gpt\", \"value\": \"a\"}]}", "<s>Be brief." ASKED("q") "«a</s>»"},
        {"{\"system\": \"Be brief.\", \"instruction\": \"q\", \"output\": \"a\"}", "<s>Be brief." ASKED("q") "«a</s>»"},
        {"{\"text\": \"two shells\", \"messages\": null}", "<s>«two shells»"},
        {"{\"text\": \"rendered\", \"messages\": [{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"assistant\", "
            "\"content\": \"a\"}]}", "<s>" PAPER ASKED("q") "«a</s>»"},
    };
    tokenizer *t = open_tokenizer("base", 0);
    char *path = in_scratch("formats.jsonl");
    for (size_t i = 0; i < sizeof formats_read / sizeof *formats_read; i++) {
        write_text(path, formats_read[i].json);
        dataset d = read_rows(t, path, 1024);
        char *got = marked(t, &d.rows[0]);
        expect(!strcmp(got, formats_read[i].want), "%s is «%s», expected «%s»", formats_read[i].json, got, formats_read[i].want);
        free(got), free_rows(&d);
    }
    free(path), tokenizer_free(t);
}

// A model directory whose tokenizer_config.json this is.
static tokenizer *tokenizer_with(const char *dir, const json_t *settings)
{
    char command[300], *path = join(dir, "tokenizer_config.json"), *text = json_text(settings);
    snprintf(command, sizeof command, "rm -rf %s; mkdir %s; cp base/config.json base/tokenizer.model %s", dir, dir, dir);
    if (system(command)) die("cannot prepare %s", dir);
    write_text(path, text);
    free(path), free(text);
    opt.model = dir;
    return open_tokenizer(dir, 0);
}

// trimmed() takes away what Python's str.strip() does, on either side, and nothing else.
static void test_trimmed(void)
{
    static const char spaces[] = "\t\n\v\f\r\x1c\x1d\x1e\x1f \302\205\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006"
        "\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000";
    static const char others[] = "\b\x0e\x1b!\302\204\302\206\302\237\u00a1\u167f\u1681\u180e\u200b\u2027\u202a\u202e\u2030"
        "\u205e\u2060\u2fff\u3001\ufeff";
    for (const char *c = spaces, *end; *c; c = end) {
        for (end = c + 1; (*end & 0xc0) == 0x80;) end++;
        char *text = text_of("%.*sx %s%.*s", (int)(end - c), c, spaces, (int)(end - c), c), *bare = trimmed(text);
        expect(!strcmp(bare, "x"), "of a text in spaces is left «%s»", bare);
        free(bare), free(text);
    }
    for (const char *c = others, *end; *c; c = end) {
        for (end = c + 1; (*end & 0xc0) == 0x80;) end++;
        char *text = text_of("%.*s", (int)(end - c), c), *bare = trimmed(text);
        expect(!strcmp(bare, text), "«%s» is taken for a space", text);
        free(bare), free(text);
    }
}

// In a dialogue as marked() shows it, every answer is learnt, with the token that ends it, and nothing else.
static void expect_answers_learnt(const tokenizer *t, const json_t *messages, const char *got, const char *name, size_t number)
{
    size_t bytes, i, answers = 0;
    const char *end = tokenizer_added(t, chat.end, &bytes), *at = got;
    json_t *turn;
    if (!end) die("%s: answers end with nothing", name);
    json_array_foreach(messages, i, turn) {
        if (strcmp(string_field(turn, "role"), "assistant")) continue;
        char *want = trimmed(string_field(turn, "content"));
        const char *from = strstr(at, "«"), *to = from ? strstr(from, "»") : NULL, *in = from ? strstr(from, want) : NULL;
        expect(in && to && in < to, "%s, dialogue %zu: «%s» is not learnt in %s", name, number, want, got);
        expect(to && !strncmp(to - bytes, end, bytes), "%s, dialogue %zu: the end of «%s» is not learnt in %s", name, number,
            want, got);
        if (to) at = to + 1, answers++;
        free(want);
    }
    expect(answers && !strstr(at, "«"), "%s, dialogue %zu: more is learnt: %s", name, number, got);
}

// Every published template: it is known by its Jinja source, gives the ids of transformers' apply_chat_template, and
// those of its generation prompt; a dialogue that it refuses is refused. Learnt is what the assistant says.
static void test_templates(void)
{
    char *dir = in_scratch("chat-model"), *path = in_scratch("chat.jsonl");
    json_t *cases = golden_json("dev/golden/templates.json"), *item, *line;
    size_t number, i;
    json_array_foreach(cases, number, item) {
        const char *name = string_field(item, "name");
        if (not_asked_for(name)) continue;
        tokenizer *t = shared_tokenizer = tokenizer_with(dir, json_object_get(item, "settings"));
        opt.template = NULL;
        open_template(t);
        expect(!strcmp(chat.is->name, name), "%s was taken for %s", name, chat.is->name);
        json_array_foreach(json_object_get(item, "rows"), i, line) {
            json_t *messages = json_object_get(line, "messages"), *row_json = json_pack("{sO}", "messages", messages);
            const json_t *ids = json_object_get(line, "ids"), *prompt = json_object_get(line, "prompt");
            char *text = json_text(row_json);
            write_text(path, text);
            if (json_is_null(ids)) {
                char *said = said_by(only_read_rows, path);
                expect(has(said, "alternate") || has(said, "in front only"), "%s, dialogue %zu: «%s»", name, i, said);
                free(said), free(text), json_decref(row_json);
                continue;
            }
            dataset d = read_rows(t, path, 4096);
            message *turns = NULL;
            read_turns(&turns, "golden", messages, 1);
            for (int last = last_answer(turns); arrlen(turns) > last;) free(arrpop(turns).text);
            row asked = encode_question(t, turns);
            expect(ids_are(d.rows[0].ids, (size_t)d.rows[0].n, ids), "%s, dialogue %zu: ids of «%s»", name, i, text);
            if (prompt && !json_is_null(prompt))
                expect(ids_are(asked.ids, (size_t)asked.n, prompt), "%s, dialogue %zu: ids of its question", name, i);
            char *got = marked(t, &d.rows[0]);
            expect_answers_learnt(t, messages, got, name, i);
            free(got), free(text), free_row(&asked), free_dialogue(turns), free_rows(&d), json_decref(row_json);
        }
        tokenizer_free(t);
    }
    expect(number == 14, "%zu templates", number);
    chat.is = templates;
    chat.end = -1;
    json_decref(cases), free(path), free(dir);
}

// Packed rows are the rows, in one member or several, whatever the file is called; what is cut or damaged is refused.
static void test_gzip(void)
{
    static const struct { const char *name, *prepare, *says; } files[] = {
        {"a.jsonl.gz",  "gzip -c $D/plain.jsonl > $D/a.jsonl.gz", NULL},
        {"b.jsonl",     "gzip -9c $D/plain.jsonl > $D/b.jsonl", NULL},
        {"c.jsonl.gz",  "cp $D/plain.jsonl $D/c.jsonl.gz", NULL},
        {"d.jsonl.gz",  "{ head -n 2 $D/plain.jsonl | gzip -c; tail -n +3 $D/plain.jsonl | gzip -c; printf '\\0\\0'; } "
            "> $D/d.jsonl.gz", NULL},
        {"e.json.gz",   "{ echo '['; sed '$!s/$/,/' $D/plain.jsonl; echo ']'; } | gzip -c > $D/e.json.gz", NULL},
        {"cut.jsonl.gz", "gzip -c $D/plain.jsonl | head -c -9 > $D/cut.jsonl.gz",
            "cut.jsonl.gz: is gzip's, but cut short behind"},
        {"head.jsonl.gz", "gzip -c $D/plain.jsonl | head -c 7 > $D/head.jsonl.gz", "cut short behind 0 bytes"},
        {"sum.jsonl.gz", "{ gzip -c $D/plain.jsonl | head -c -8; printf 12345678; } > $D/sum.jsonl.gz", "but damaged behind"},
        {"bits.jsonl.gz", "{ gzip -c $D/plain.jsonl | head -c 40; head -c 400 /dev/zero | tr '\\0' '\\377'; } "
            "> $D/bits.jsonl.gz", "damaged behind"},
        {"more.jsonl.gz", "{ gzip -c $D/plain.jsonl; echo more; } > $D/more.jsonl.gz", "damaged behind"},
        {"none.txt.gz", "gzip -c < /dev/null > $D/none.txt.gz", "none.txt.gz: is empty"},
        {"line.jsonl.gz", "{ cat $D/plain.jsonl; echo '{\"question\": 1'; } | gzip -c > $D/line.jsonl.gz",
            "line.jsonl.gz:9: not valid JSON"},
        {"name.csv.gz", "gzip -c $D/plain.jsonl > $D/name.csv.gz", "expected a .jsonl, .json or .txt file"},
    };
    tokenizer *t = shared_tokenizer = open_tokenizer("base", 0);
    shell("head -n 8 data/val.jsonl > $D/plain.jsonl", "cannot prepare");
    char *rows = in_scratch("plain.jsonl"), want[64], got[64];
    dataset d = read_rows(t, rows, 1024);
    rows_text(&d, want);
    free_rows(&d);
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        if (not_asked_for(files[i].name)) continue;
        shell(files[i].prepare, "cannot prepare");
        char *path = in_scratch(files[i].name), *said = said_by(only_read_rows, path);
        expect(files[i].says ? has(said, files[i].says) : !*said, "%s: «%s»", files[i].name, said);
        if (!*said) {
            d = read_rows(t, path, 1024);
            expect(!strcmp(rows_text(&d, got), want), "%s: %s, expected %s", files[i].name, got, want);
            free_rows(&d);
        }
        free(path), free(said);
    }
    free(rows), tokenizer_free(t);
}

#define TIMES5(a) a a a a a
#define DEEP(open, close) TIMES5(TIMES5(TIMES5(open))) TIMES5(TIMES5(TIMES5(close)))        /* 125 levels */
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
        expect(!strcmp(text, cases[i][1]), "«%s» became «%s»", cases[i][0], text);
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
    expect(!strcmp(text, want) && json_equal(value, again), "%s was written, expected %s", text, want);
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
    double large_one = json_number_value(json_object_get(json, "model_max_length"));
    check(fabs(large_one / 1e30 - 1), 1e-15, "a number of 31 digits");
    expect(config_int(json, "large", "r", -1) == 8, "8.0 as a whole number");
    json_decref(json);
}

// A model of 100,000 layers: lora+ looks for its B among the tensors, and pissa's file for the start of each A and B.
static void measure_deep_model(const char *method_name)
{
    char *path = in_scratch("deep.json");
    write_text(path, "{\"model_type\": \"llama\", \"hidden_size\": 8, \"intermediate_size\": 8, \"num_hidden_layers\": 100000,"
        " \"num_attention_heads\": 2, \"vocab_size\": 8}");
    plan p = plan_from_options();
    p.method = method_named(method_name);
    p.rank = 1;
    model m = {0};
    double start = seconds();
    model_measure(&m, config_read(path), p);
    output *list = peft_outputs(&m);
    check(seconds() - start, 20, "seconds for 100,000 layers of %s", method_name);
    expect(arrlen(list) == 1400000, "%td tensors of 100,000 layers", arrlen(list));
    arrfree(list);
    model_unmeasure(&m);
    free(m.c.text);
    free(path);
}

// The log of a long run, which a resumed one goes on writing: what reads all that follows at every line takes minutes.
static void open_long_log(void)
{
    enum { LINES = 300000 };
    static const char line[] = "{\"step\":1,\"loss\":1.23456789,\"grad_norm\":1.23456789,\"lr\":0.004,\"tokens\":1000}\n";
    char *path = in_scratch("long.log"), *text = alloc(LINES, sizeof line), *to = text;
    to += sprintf(to, "{\"step\":0,\"eval_loss\":1}\n");
    for (int i = 0; i < LINES - 1; i++) to = stpcpy(to, line);
    write_text(path, text);
    double start = seconds();
    fclose(open_log(path, 1));
    check(seconds() - start, 5, "seconds for a log of 300,000 lines");
    size_t bytes;
    char *kept = read_file(path, &bytes);
    expect(!strcmp(kept, text), "%zu bytes of a log of %zu are kept", bytes, strlen(text));
    free(path), free(text), free(kept);
}

// A header of 100,000 tensors and a row of 16 MB: in about a second. What takes every tensor for every tensor takes minutes.
static void test_large_files(void)
{
    open_long_log();
    measure_deep_model("lora+");
    measure_deep_model("pissa");
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
    expect(shlen(c.tensors) == TENSORS, "%td tensors", shlen(c.tensors));
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
    expect(arrlen(d.rows) == 2, "%td rows", arrlen(d.rows));
    free_rows(&d), tokenizer_free(t);
    free(file), free(path), free(dir);
}

// A header, the bytes of data behind it, and what refuses them: NULL where the safetensors library (0.8) reads the file.
// Where it takes the last of two equal keys, this program refuses both, as the format's documentation asks.
static const struct { const char *header; int data; const char *says; } safetensors_files[] = {
    {"{\"a\":" T("F32", "[2]", "[0,8]") ",\"b\":" T("BF16", "[2,2]", "[8,16]") "}", 16, NULL},
    {"{\"b\":" T("F32", "[2]", "[8,16]") ",\"a\":" T("F32", "[2]", "[0,8]") "}  \n", 16, NULL},
    {"{\"__metadata__\":{\"format\":\"pt\"},\"a\":" T("F32", "[2]", "[0,8]") "}", 8, NULL},
    {"{\"a\":" T("F32", "[]", "[0,4]") ",\"b\":" T("I64", "[1]", "[4,12]") ",\"c\":" T("F32", "[0,3]",
        "[12,12]") ",\"d\":" T("F4", "[4]", "[12,14]") "}", 14, NULL},
    {"{\"c\":" T("F32", "[0]", "[0,0]") ",\"a\":" T("F32", "[1,1,1,2]", "[0,8]") "}", 8, NULL},
    {"{}", 0, NULL},
    {"{\"a\":" T("F32", "[2]", "[0,8]") ",\"b\":" T("F32", "[2]", "[0,8]") "}", 8, "tensors a and b share bytes"},
    {"{\"a\":" T("F32", "[2]", "[0,8]") ",\"b\":" T("F32", "[2]", "[4,12]") "}", 12, "tensors a and b share bytes"},
    {"{\"a\":" T("F32", "[2]", "[0,8]") ",\"c\":" T("F32", "[0]", "[4,4]") "}", 8, "tensors a and c share bytes"},
    {"{\"a\":" T("F32", "[2]", "[0,8]") ",\"b\":" T("F32", "[2]", "[12,20]") "}", 20,
        "bytes 8 to 12 of the data belong to no tensor"},
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
    {"{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "duplicate object key"},
    {"{\"__metadata__\":{},\"__metadata__\":{},\"a\":" T("F32", "[2]", "[0,8]") "}", 8, "duplicate object key"},
    {"{\"__metadata__\":{\"steps\":3},\"a\":" T("F32", "[2]", "[0,8]") "}", 8, "__metadata__ is not an object of texts"},
    {"{\"a\":{\"more\":NaN,\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "not valid JSON"},
    {"{\"a\\ud800\":" T("F32", "[2]", "[0,8]") "}", 8, "invalid Unicode"},
    {"{\"a\x1b\":" T("F32", "[2]", "[0,8]") "}", 8, "control character 0x1b"},
    {"{\"a\xff\":" T("F32", "[2]", "[0,8]") "}", 8, "not UTF-8"},
    {"{\"a\\u001b[31m\\u009b\\n\":" T("F32", "[3]", "[0,8]") "}", 8, "tensor a\\x1b[31m\\xc2\\x9b\\x0a takes"},
    {"[]", 0, "expected a JSON object"},
    {"{\"a\":" T("F32", "[-0]", "[0,0]") "}", 0, "-0 is no size"},
    {"{\"a-0\":" T("F32", "[2]", "[0,8]") "}", 8, NULL},
    {"{\"a\":" T("F32", "[18446744073709551616]", "[0,8]") "}", 8, "too big integer"},
    {"{\"a\":{\"more\":" DEEP("[", "]") ",\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, NULL},
    {"{\"a\":{\"more\":[" DEEP("[", "]") "],\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8,
        "nested deeper than 127"},
    {"", 0, "'[' or '{' expected near end of file"},
};

static void only_open(const char *dir)
{
    checkpoint c = checkpoint_open(dir, "model");
    checkpoint_close(&c);
}

// A micro-batch with one number changed: `which` of its lists, and to what.
static struct { int which, to; } changed_number;

static void only_step(const char *dir)
{
    opt.model = dir;
    model m = {0};
    plan p = small_plan("bone");
    p.tokens = 14;                      // just enough for the three rows
    p.positions = 8;
    model_measure(&m, open_config(), p);
    fill_model(&m, NULL, 0);
    batch b = small_batch(0, 3);
    int *lists[] = {b.ids, b.pos, b.label, b.target_row, &b.spans[0].q, &b.spans[0].nq, &b.spans[0].k, &b.spans[0].nk, &b.tokens,
        &b.targets};
    if (changed_number.which >= 0) *lists[changed_number.which] = changed_number.to;
    model_step(&m, &b, 0);
}

// An id, a position, a row or a span that the plan has no place for ends the program before it is used.
static void test_no_place(void)
{
    static const struct { int which, to, fits; } cases[] = {
        {-1, 0, 1}, {0, 12, 1}, {0, 13, 0}, {0, -1, 0}, {1, 7, 1}, {1, 8, 0}, {1, -1, 0}, {2, 12, 1}, {2, 13, 0}, {2, -1, 0},
        {3, 13, 1}, {3, 14, 0}, {3, -1, 0}, {4, -1, 0}, {4, 11, 0}, {5, -1, 0}, {5, 15, 0}, {6, -1, 0}, {6, 11, 0}, {7, 3, 0},
        {7, 15, 0}, {8, 15, 0}, {9, 0, 0}, {9, 15, 0},
    };
    char *dir = small_model(0);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        changed_number.which = cases[i].which;
        changed_number.to = cases[i].to;
        char *said = said_by(only_step, dir);
        expect(cases[i].fits ? !*said : strstr(said, "the plan") != NULL, "list %d, number %d: «%s»",
            cases[i].which, cases[i].to, said);
        free(said);
    }
    free(dir);
}

// Each epoch has every row once, in an order of its own; its last step has the rows that are left.
static void test_epoch_rows(void)
{
    enum { ROWS = 7 };
    int order[ROWS], first, last, before[ROWS] = {0};
    run r = {.order = order, .epoch = -1};
    for (int i = 0; i < ROWS; i++) arrput(r.train.rows, (row){0});
    opt.batch = 3, opt.accum = 1;
    for (int epoch = 0; epoch < 3; epoch++) {
        int seen[ROWS] = {0}, moved = 0;
        for (int s = 0; s < 3; s++, r.step++) {
            step_rows(&r, &first, &last);
            expect(last - first == (s < 2 ? 3 : 1), "step %d has %d rows", r.step, last - first);
            for (int i = first; i < last; i++) seen[order[i]]++;
        }
        for (int i = 0; i < ROWS; i++) {
            expect(seen[i] == 1, "epoch %d has row %d %d times", epoch, i, seen[i]);
            moved += before[i] != order[i];
            before[i] = order[i];
        }
        expect(moved > 0, "epoch %d has the order of the one before", epoch);
    }
    arrfree(r.train.rows);
}

static int fewer_layers;                // what the models below are opened with
static const char *opened_base;

static void only_load(const char *dir)
{
    model m = {0};
    opt.model = dir;
    config c = open_config();
    plan p = small_plan("full");
    c.layers -= fewer_layers;
    model_measure(&m, c, p);
    fill_model(&m, NULL, 0);
}

static void only_read_adapter(const char *dir)
{
    model m = {0};
    plan p = small_plan("lora");
    opt.model = opened_base;
    p.targets = fewer_layers ? "q" : "all";
    model_measure(&m, open_config(), p);
    fill_model(&m, NULL, 0);
    peft_read_weights(&m, dir);
}

// A model or an adapter with tensors that nobody asks for is refused by the first of them.
static void test_tensors_too_many(void)
{
    model *m = open_small(small_plan("lora"), 0);
    char *dir = small_model(0), *adapter = in_scratch("whole-adapter");
    opened_base = dir;
    stage_begin(adapter);
    peft_write(m, "base");
    stage_publish(&(place_of_result){.path = adapter});
    for (fewer_layers = 0; fewer_layers < 2; fewer_layers++) {
        char *model_says = said_by(only_load, dir), *adapter_says = said_by(only_read_adapter, adapter);
        expect(fewer_layers ? !!strstr(model_says, "is none that config.json asks for") : !*model_says,
            "model: «%s»", model_says);
        expect(fewer_layers ? !!strstr(adapter_says,
            "is none that this adapter on this base model asks for") : !*adapter_says, "adapter: «%s»", adapter_says);
        free(model_says), free(adapter_says);
    }
    close_small(m), free(dir), free(adapter);
}

static void test_safetensors(void)
{
    char *dir = in_scratch("header"), *path = in_scratch("header/model.safetensors");
    mkdir(dir, 0777);
    for (size_t i = 0; i < sizeof safetensors_files / sizeof *safetensors_files; i++) {
        if (not_asked_for(safetensors_files[i].header)) continue;
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
        {"#### 3", "#### -3", 0}, {"#### 420", "#### 42", 0}, {"#### 4 2", "#### 42", 0}, {"42", "#### 42", 0},
            {"####", "#### 42", 0}, {"", "#### 0", 0},
        {"… 18.\n#### 18\nThe answer is: 18", "It is 9 * 2.\n#### 18\nThe answer is: 18", 1},   // MetaMathQA has both
        {"The answer is: 18. I am sure.", "#### 18\nThe answer is: 18", 1},
        {"The answer is: 42", "The answer is: 42", 1}, {"The answer is: 42.0", "The answer is: 42", 1},
            {"The answer is: 42/7", "The answer is: 42", 0},
        {"The answer is: \\frac{1}{2}\nNext", "The answer is: $\\frac{1}{2}$.", 1},
            {"The answer is: 3/4", "The answer is: 3/5", 0},
        {"The answer is: 2x", "The answer is: 2", 0}, {"The answer is: 2x+1", "The answer is: 2x+1", 1},
            {"Paris", " Paris.", 1}, {"Paris, I think", "Paris", 0},
        {"#### 12345678901234567890", "#### 12345678901234567891", 0},
            {"#### 12345678901234567890.0", "#### 12,345,678,901,234,567,890", 1},
        {"#### 0.1000000000000000000001", "#### 0.1", 0}, {"#### 0042.500", "#### 42.5", 1}, {"#### -0", "#### 0", 1},
            {"#### +5", "#### 5", 1}, {"#### .5", "#### 0.50", 1},
        {"#### 0", "#### 00.00", 1}, {"#### 100", "#### 1", 0}, {"#### 1,00", "#### 100", 0},
            {"#### 1,000", "#### 1000", 1}, {"#### 0,001", "#### 1", 0}, {"#### 1,0000", "#### 10000", 0},
        {"#### 1,2", "#### 12", 0}, {"#### 1,2", "#### 1,2", 1}, {"#### 18.5.3", "#### 18.5", 0},
            {"#### 18.5", "#### 18.5.3", 0}, {"#### 18.5.", "#### 18.5", 1},
        {"#### 42, I think", "#### 42", 1}, {"#### 42.apples", "#### 42", 0}, {"#### 2023-05-01", "#### 2023", 0},
            {"#### 10:30", "#### 10", 0}, {"#### 40+2=42", "#### 40", 0},
        {"1. First of all, no.", "1", 0}, {"2023-05-01", "2023", 0}, {"42 apples", "42", 0}, {"42.0", "42", 1},
            {"1,234", "1234", 1}, {"12", "1,2", 0}, {"18.5", "18.5.3", 0}, {"1\nNo.", "1", 0},
        {"", "", 0}, {"####", "####", 0}, {" ", ".", 0}, {"The answer is:", "The answer is: ", 0}, {"0", "", 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        expect(same_answer(cases[i].given, cases[i].right) == cases[i].same, "«%s» for «%s»", cases[i].given, cases[i].right);
}

// ---- generation ----------------------------------------------------------------------------------------------------

// How often each of four tokens comes against softmax(logits/temperature), cut at top-p.
static void test_sampling(void)
{
    static const struct { double temperature, top_p, p[4]; wide logits[4]; } cases[] = {
        {0,   1,    {0, 1, 0, 0}, {1, 3, 0, 2}},
        {0,   1,    {0, 1, 0, 0}, {1, 3, 0, 3}},                                    // of equals the first
        {1,   1,    {0.08714432, 0.64391426, 0.03205860, 0.23688282}, {1, 3, 0, 2}},
        {2,   1,    {0.16742923, 0.45511791, 0.10155054, 0.27604231}, {1, 3, 0, 2}},
        {1,   0.64, {0, 1, 0, 0}, {1, 3, 0, 2}},                                    // the likeliest reaches it alone
        {1,   0.7,  {0, 0.73105858, 0, 0.26894142}, {1, 3, 0, 2}},                  // the second is needed
        {1,   0.5,  {0, 1, 0, 0}, {-9999, 2, 2, -9999}},                            // reached exactly: no token more
        {1,   0.51, {0, 0.5, 0.5, 0}, {-9999, 2, 2, -9999}},
        {1,   0.75, {1 / 3.0, 1 / 3.0, 1 / 3.0, 0}, {1, 1, 1, 1}},
        {1,   0.76, {0.25, 0.25, 0.25, 0.25}, {1, 1, 1, 1}},
    };
    enum { DRAWS = 40000 };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        rng g = rng_named(1, "sampling");
        int count[4] = {0};
        opt.temperature = cases[i].temperature, opt.top_p = cases[i].top_p;
        for (int n = 0; n < DRAWS; n++) count[pick(cases[i].logits, 4, &g)]++;
        for (int k = 0; k < 4; k++)
            check(fabs((double)count[k] / DRAWS - cases[i].p[k]), 4.5 * sqrt(cases[i].p[k] * (1 - cases[i].p[k]) / DRAWS),
                "temperature %g, top-p %g, token %d", opt.temperature, opt.top_p, k);
    }
}

// A sequence ends at any eos_token_id of config.json and generation_config.json, be it a number or a list.
static void test_stops(void)
{
    char *dir = small_model(0), *copy_of = in_scratch("stops");
    opt.model = dir;
    config without = open_config();
    char *command = text_of("rm -rf $D/stops; cp -r %s $D/stops; sed -i '0,/{/s//{\"eos_token_id\": 5,/' $D/stops/config.json; "
        "echo '{\"eos_token_id\": [7, 11]}' > $D/stops/generation_config.json", dir);
    shell(command, "cannot prepare");
    opt.model = copy_of;
    model m = {.c = open_config()};
    tokenizer *t = plain_tokenizer("base");
    for (int id = 0; id < 13; id++)
        check(ends_answer(&m, t, id) != (id == 2 || id == 5 || id == 7 || id == 11), 0, "token %d", id);
    check(without.stops, 0, "stops without a field");
    free(without.text), free(m.c.text), free(dir), free(copy_of), free(command), tokenizer_free(t);
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
        if (not_asked_for(cases[i].field)) continue;
        snprintf(text, sizeof text, "{%s, ", cases[i].field);
        snprintf(text + strlen(text), sizeof text - strlen(text), small_config + 1, kin[0].fields);
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

// What config.json and adapter_config.json leave out is what transformers' LlamaConfig(), MistralConfig(), Qwen2Config(),
// Qwen3Config() and PEFT's LoraConfig() say. What they say of windows and biases counts, too.
static void test_defaults(void)
{
    static const struct {
        const char *fields;
        int max_pos, kv_heads, head_dim, window, full_layers, qkv_bias, o_bias;
    } cases[] = {
        {"\"llama\"",                                           2048, 64,   4, INT_MAX, 0, 0, 0},
        {"\"llama\", \"attention_bias\": true, \"head_dim\": null", 2048, 64, 4, INT_MAX, 0, 1, 1},
        {"\"mistral\"",                                       131072,  8,   4,    4096, 0, 0, 0},
        {"\"mistral\", \"sliding_window\": null, \"num_key_value_heads\": null", 131072, 64, 4, INT_MAX, 0, 0, 0},
        {"\"qwen2\"",                                          32768, 32,   4, INT_MAX, 0, 1, 0},
        {"\"qwen2\", \"use_sliding_window\": true",            32768, 32,   4,    4096, 28, 1, 0},
        {"\"qwen2\", \"use_sliding_window\": true, \"sliding_window\": 7, \"layer_types\": [\"full_attention\", "
            "\"sliding_attention\"]",                          32768, 32,   4,       7, 1, 1, 0},
        {"\"qwen3\"",                                          32768, 32, 128, INT_MAX, 0, 0, 0},
        {"\"qwen3\", \"attention_bias\": true",                32768, 32, 128, INT_MAX, 0, 1, 1},
    };
    char *path = in_scratch("least.json"), *dir = in_scratch("least"), *adapter = join(dir, "adapter_config.json");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[600];
        snprintf(text, sizeof text, "{\"model_type\": %s, \"hidden_size\": 256, \"intermediate_size\": 20, "
            "\"num_hidden_layers\": 2, \"num_attention_heads\": 64, \"vocab_size\": 13}", cases[i].fields);
        write_text(path, text);
        config c = config_read(path);
        expect(c.eps == 1e-6 && c.theta == 10000 && !c.tied && c.init_range == 0.02,
            "%s: rms_norm_eps is %g, rope_theta %g", cases[i].fields, c.eps, c.theta);
        expect(c.max_pos == cases[i].max_pos, "%s: max_position_embeddings %d", cases[i].fields, c.max_pos);
        expect(c.kv_heads == cases[i].kv_heads && c.head_dim == cases[i].head_dim, "%s: %d key-value heads of %d",
            cases[i].fields, c.kv_heads, c.head_dim);
        expect(c.window == cases[i].window && c.full_layers == cases[i].full_layers, "%s: a window of %d from layer %d on",
            cases[i].fields, c.window, c.full_layers);
        expect(c.qkv_bias == cases[i].qkv_bias && c.o_bias == cases[i].o_bias && !c.mlp_bias, "%s: biases %d, %d",
            cases[i].fields, c.qkv_bias, c.o_bias);
        free(c.text);
    }
    if (mkdir(dir, 0700)) die("%s: %s", dir, strerror(errno));
    write_text(adapter, "{\"peft_type\": \"LORA\", \"r\": 4, \"target_modules\": [\"q_proj\"]}");
    plan p = plan_from_options();
    peft_read_config(&p, dir);
    expect(p.alpha == 8 && !strcmp(p.method->name, "lora"), "lora_alpha is %g", p.alpha);
    free(path), free(adapter), free(dir);
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
        expect(s[i].n == lengths_alone[i] && !memcmp(together[i], alone[i], (size_t)s[i].n * sizeof(int)),
            "sequence %d of %d tokens", i, s[i].n);
    batch_free(&b), close_small(m), tokenizer_free(t);
}

// ---- the program, from outside ---------------------------------------------------------------------------------------

// Runs ./train (or another build of it, $TRAIN) with these arguments, its output in scratch/stdout and scratch/stderr;
// returns the exit status.
__attribute__((format(printf, 1, 2)))
static int train_run(const char *format, ...)
{
    char command[5000];
    TEXT(args, format);
    snprintf(command, sizeof command, "$TRAIN %s >%s/stdout 2>%s/stderr </dev/null", args, scratch, scratch);
    int status = system(command);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
}

// A file of the scratch directory; nothing, where a run that failed left none.
static char *output_of(const char *name)
{
    size_t bytes;
    char *path = in_scratch(name), *text = access(path, R_OK) ? strdup("") : read_file(path, &bytes);
    free(path);
    return text;
}

// The same, where it must succeed.
__attribute__((format(printf, 1, 2)))
static void train_well(const char *format, ...)
{
    TEXT(args, format);
    int status = train_run("%s", args);
    char *said = output_of("stderr");
    expect(!status, "./train %s: status %d, says «%s»", args, status, said);
    free(said);
}

// Are there two files, and are they the same?
static int same_files(const char *a, const char *b)
{
    char *pa = in_scratch(a), *pb = in_scratch(b);
    size_t na = 0, nb = 0;
    char *x = access(pa, R_OK) ? NULL : read_file(pa, &na), *y = access(pb, R_OK) ? NULL : read_file(pb, &nb);
    int same = na == nb && na > 0 && !memcmp(x, y, na);
    free(pa), free(pb), free(x), free(y);
    return same;
}

// Puts a T for the speed of each step of a log, the one thing in which two runs may differ.
static void without_speeds(char *log)
{
    char *to = log;
    for (const char *from = log; *from;) {
        size_t n = strlen("\"tok_per_s\":");
        if (strncmp(from, "\"tok_per_s\":", n)) { *to++ = *from++; continue; }
        *to++ = 'T';
        from += n + strspn(from + n, "0123456789.");
    }
    *to = 0;
}

// Are two logs the same but for their speeds?
static int same_logs(const char *a, const char *b)
{
    char *x = output_of(a), *y = output_of(b);
    without_speeds(x), without_speeds(y);
    int same = *x && !strcmp(x, y);
    free(x), free(y);
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
// A token that stands for a whole word alone is none beside a letter. Letters in circles and squares are letters, by
// Unicode's Other_Alphabetic; their neighbours are not.
static void test_alone(void)
{
    static const struct { const char *beside; int letter; } cases[] = {
        {"\u24b5", 0}, {"\u24b6", 1}, {"\u24e9", 1}, {"\u24ea", 0}, {"\U0001f12f", 0}, {"\U0001f130", 1},
        {"\U0001f149", 1}, {"\U0001f14a", 0}, {"\U0001f14f", 0}, {"\U0001f150", 1}, {"\U0001f169", 1},
        {"\U0001f16a", 0}, {"\U0001f16f", 0}, {"\U0001f170", 1}, {"\U0001f189", 1}, {"\U0001f18a", 0},
        {"a", 1}, {"7", 1}, {"_", 1}, {"-", 0}, {"\u0301", 1}, {"\u200c", 1}, {"\u200d", 1}, {"\u200b", 0},
    };
    char *dir = in_scratch("one-word");
    tokenizer *t = tokenizer_with(dir, json_pack("{s{s{sssb}}}", "added_tokens_decoder", "768", "content", "<w>",
        "single_word", 1));
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int behind = 0; behind < 2; behind++) {
            size_t n;
            char *text = text_of("%s<w>%s", behind ? "" : cases[i].beside, behind ? cases[i].beside : "");
            int *ids = tokenizer_encode(t, text, strlen(text), 1, &n), found = 0;
            for (size_t j = 0; j < n; j++) found |= ids[j] == 768;
            expect(found == !cases[i].letter, "«%s»: the token is %s", text, found ? "found" : "not found");
            free(ids), free(text);
        }
    tokenizer_free(t), free(dir);
}

// The first row as it is printed: a long text loses its middle, between whole letters.
static void test_shortened(void)
{
    char *path = in_scratch("long.jsonl"), *letters = copy_text("");
    for (int i = 0; i < 150; i++) add_text(&letters, i % 2 ? "é" : "n", i % 2 ? 2 : 1);         // 225 bytes
    for (int shift = 0; shift < 2; shift++) {
        char *text = text_of("{\"text\": \"%s%s\"}\n", shift ? "x" : "", letters);
        write_text(path, text);
        train_run("--data %s --val data/val.jsonl --dry-run --steps 1 --seq 1024", path);
        char *said = output_of("stdout"), *first = strstr(said, "first row");
        char *middle = first ? strstr(first, " … ") : NULL;
        expect(middle != NULL, "nothing is left out of «%s»", said);
        if (middle) {
            char *line = memrchr(first, '\n', (size_t)(middle - first));
            line = line ? line + 1 : first;
            middle[strcspn(middle, "\n")] = 0;
            long head = middle - strchr(line, ':'), tail = (long)strlen(middle + strlen(" … "));
            expect(head > 90 && head < 130 && tail > 90 && tail < 130, "%ld bytes and %ld of «%s»", head, tail, line);
            expect(!strstr(line, "\\x"), "a letter is cut: «%s»", line);
        }
        free(said), free(text);
    }
    free(path), free(letters);
}

// What --generate prints as the tokens come is the text of all of them: letters whose bytes come one at a time, and bytes
// that are no letter.
static void test_as_they_come(void)
{
    enum { MORE = 60 };
    opt.model = "base", opt.temperature = 1e3;
    config c = open_config();
    tokenizer *t = open_tokenizer(opt.model, c.vocab);
    model m = {0};
    open_for_text(&m, c, 1, MORE + 1);
    batch b = batch_new(1, 1);
    int letters = 0, cut = 0;
    for (uint64_t seed = 1; seed <= 24; seed++) {
        int ids[MORE + 1] = {tokenizer_bos(t)};
        sequence s = {.ids = ids, .n = 1, .room = MORE + 1};
        rng g = rng_named(seed, "streamed");
        fflush(stdout);
        int terminal = dup(1);
        char *path = in_scratch("streamed");
        if (terminal < 0 || !freopen(path, "w", stdout)) _exit(9);
        continue_sequence(&m, t, &s, &b, &g, 1);
        fflush(stdout);
        if (dup2(terminal, 1) < 0) _exit(9);
        close(terminal);
        char *said = output_of("streamed"), *whole = decode(t, ids + 1, s.n - 1), *want = text_of("%s\n", whole);
        size_t n = strlen(whole);
        expect(!strcmp(said, want), "seed %d: «%s», expected «%s»", (int)seed, said, want);
        for (size_t i = 0; i + 1 < n; i++) letters += (whole[i] & 0xe0) == 0xc0;
        cut += n > 3 && !strcmp(whole + n - 3, "\ufffd");
        free(said), free(whole), free(want), free(path);
    }
    expect(letters && cut, "%d letters of two bytes, %d texts that end within one", letters, cut);
    batch_free(&b), model_free(&m), tokenizer_free(t);
}

static void test_room(void)
{
    static const char first[] = "{\"question\": \"How many?\", \"answer\": \"8\"}\n";
    static const char *const others[] = {"",
        "{\"question\": \"How many?\", \"answer\": \"Now Emma had 17 cups. Now Emma had 19 cups. Now Emma had 19 "
            "cups. Now Emma had 21 cups. #### 21\"}\n",
        "{\"question\": \"Emma took 11 cups to the yard. Mom gave Emma 6 more cups. In the forest she found 2 cups. "
            "How many cups are there now?\", \"answer\": \"8\"}\n"};
    for (int max_new = 9; max_new < 100; max_new += 60) {
        train_well("--generate 'How many?' --chat --max-new %d", max_new);
        char *alone = output_of("stdout"), rows[1000];
        *strchr(alone, '\n') = 0;
        for (int i = 0; i < 3; i++) {
            scores got;
            opt.max_new = max_new;
            snprintf(rows, sizeof rows, "%s%s", first, others[i]);
            char *text = first_answer(rows, &got);
            expect(!strcmp(text + strspn(text, " "), alone + strspn(alone, " ")),
                "beside row %d, --max-new %d: «%s», alone «%s»", i, max_new, text, alone);
            check(max_new == 9 && got.cut != 1 + (i > 0), 0, "beside row %d: %d cut off", i, got.cut);
            free(text);
        }
        free(alone);
    }
    shell("$TRAIN --eval --exact-match --max-new 3 --val $D/few.jsonl >$D/stdout 2>$D/stderr", "exit status");
    char *text = output_of("stdout");
    expect(has(text, "exact match 0 of 8, 0.0 %, 8 cut off at --max-new 3\n"), "says «%s»", text);
    free(text);
}

// Reads a tensor of a file that is cut short after it was mapped.
static void read_cut(const char *dir)
{
    char *path = join(dir, "model.safetensors");
    catch_cut_files();
    checkpoint c = checkpoint_open(dir, "model");
    if (truncate(path, 8192)) _exit(9);
    for (int i = 0; i < shlen(c.tensors); i++) free(on_host(c.tensors[i].value.data));
}

// A run whose model is cut short, or written over, in mid-flight. It does not go on even where no page is lost.
static void test_cut_file(void)
{
    static const char *const harms[] = {"truncate -s 100000 ", "truncate -s -4 ",
 "dd conv=notrunc bs=1 seek=200000 if=/dev/zero count=1 2>/dev/null of="};
    char command[1000];
    shell("rm -rf $D/model; cp -r base $D/model && chmod -R u+w $D/model", "cannot prepare");
    char *dir = in_scratch("model"), *said = said_by(read_cut, dir);
    expect(has(said, "model.safetensors: was cut short or changed"), "in one process: «%s»", said);
    for (int i = 0; i < 3; i++) {
        snprintf(command, sizeof command,
            "rm -rf $D/model $D/cut.log; cp -r base $D/model && chmod -R u+w $D/model; "
            "$TRAIN --model $D/model --data data/train.jsonl --batch 4 --seq 128 --steps 3000 --log $D/cut.log "
            "--out $D/cut >$D/stdout 2>$D/stderr & p=$!; "
            "while kill -0 $p && ! grep -q '\"step\":3,\"loss' $D/cut.log 2>/dev/null; do sleep 0.01; done; "
            "%s$D/model/model.safetensors; wait $p", harms[i]);
        int status = WEXITSTATUS(system(command));
        char *text = output_of("stderr"), *end = strchr(text, '\n');
        expect(status == 1, "%s: status %d", harms[i], status);
        int one_line = !strncmp(text, "error: ", 7) && end && !end[1];
        check(!one_line || !strstr(text, "safetensors: was cut short or changed"), 0, "%s: «%s»", harms[i], text);
        shell("! ls -d $D/cut $D/*.tmp* 2>/dev/null | grep -q .", "%s: something is left", harms[i]);
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
    train_well("--data $D/rows.jsonl --val $D/rows.jsonl --steps 1 --max-new 2 --out $D/escapes");
    char *text = output_of("stdout");
    expect(!(strchr(text, 27) || !strstr(text, "asked:    \\x1b[31mred\\xc2\\x9b")), "«%s»", text);
    int terminal = posix_openpt(O_RDWR | O_NOCTTY);
    int opened = terminal >= 0 && !grantpt(terminal) && !unlockpt(terminal);
    if (!opened) { snprintf(skipped, sizeof skipped, "no terminals here"); return; }
    snprintf(command, sizeof command, "$TRAIN --generate \"$(printf 'a\\033[31m\\n\\tb')\" --max-new 2 >%s",
        ptsname(terminal));
    shell(command, "exit status on a terminal");
    for (ssize_t n = 1; n > 0 && bytes < sizeof shown - 1; bytes += n > 0 ? (size_t)n : 0)
        n = read(terminal, shown + bytes, sizeof shown - 1 - bytes);
    shown[bytes] = 0;
    check(strstr(shown, "\033[31m") || !strstr(shown, "a\\x1b[31m\r\n"), 0, "on a terminal «%s»", shown);
    close(terminal);
    free(text), free(path);
}

// Of the validation rows the first eight: evaluating takes the time.
#define FEW_ROWS "--data data/train.jsonl --val $D/few.jsonl --batch 4 --seq 128 --max-new 4"
#define SHORT_RUN FEW_ROWS " --steps 6 --accum 2 --warmup 2"

static void test_threads_same_bytes(void)
{
    for (int t = 1; t <= 4; t *= 2)
        train_well(SHORT_RUN " --threads %d --log %s/log%d --out %s/threads%d", t, scratch, t, scratch, t);
    expect(same_files("threads1/adapter_model.safetensors", "threads2/adapter_model.safetensors"), "adapter of 1 and 2 threads");
    expect(same_files("threads1/adapter_model.safetensors", "threads4/adapter_model.safetensors"), "adapter of 1 and 4 threads");
    check(!same_logs("log1", "log2") + !same_logs("log1", "log4"), 0, "log");
}

// Starts a run, sends it a signal once its log has the given step, and returns its exit status.
__attribute__((format(printf, 3, 4)))
static int stopped_run(const char *signal_name, int step, const char *format, ...)
{
    char command[5000];
    TEXT(args, format);
    snprintf(command, sizeof command, "rm -rf $D/part* ; env --default-signal $TRAIN %s --log $D/part.log --out "
        "$D/part >$D/stdout 2>&1 & p=$!; "
        "while kill -0 $p && ! grep -q '\"step\":%d,\"loss' $D/part.log 2>/dev/null; do sleep 0.01; done; kill -%s "
            "$p; wait $p", args, step, signal_name);
    return WEXITSTATUS(system(command));
}

// A run that ends after some step and is resumed leaves the bytes of one that did not end.
static void compare_runs(const char *method_name, const char *file, const char *what)
{
    char a[64], b[64];
    snprintf(a, sizeof a, "whole/%s", file);
    snprintf(b, sizeof b, "part/%s", file);
    expect(same_files(a, b), "%s, after %s: %s differs from that of the whole run", method_name, what, file);
    expect(same_files("whole/state.safetensors", "part/state.safetensors"), "%s, after %s: another state.safetensors",
        method_name, what);
    expect(same_logs("whole.log", "part.log"), "%s, after %s: another log", method_name, what);
}

// What a stopped run has logged of its steps is the beginning of the whole run's log, and not all of it.
static void compare_beginnings(const char *method_name, const char *what)
{
    char *whole = output_of("whole.log"), *part = output_of("part.log");
    without_speeds(whole), without_speeds(part);
    char *last = NULL;
    for (char *at = part; (at = strstr(at, "{\"step\":")); at++)
        if (!strncmp(at + strcspn(at, ","), ",\"loss\"", 7)) last = at;
    size_t n = last ? (size_t)(last - part) + strcspn(last, "\n") : 0;
    expect(n && !strncmp(whole, part, n), "%s, %s: its log is not the beginning of the whole run's", method_name, what);
    free(whole), free(part);
}

// Whichever step a signal finds it in, a run ends after it; under a rate that falls, and one that stays.
static void test_resume(void)
{
    static const struct { const char *method, *schedule, *file; } runs[] = {
        {"bone", "linear", "adapter_model.safetensors"}, {"pissa", "cosine", "adapter_model.safetensors"},
        {"full", "constant", "model.safetensors"},
    };
    for (int i = 0; i < 3; i++) {
        char args[300], what[32];
        const char *M = runs[i].method;
        if (kept_out(M, 1)) continue;
        snprintf(args, sizeof args, FEW_ROWS " --steps 8 --batch 2 --accum 2 --warmup 2 --rank 8 --method %s --schedule %s", M,
            runs[i].schedule);
        train_well("%s --log $D/whole.log --out $D/whole", args);
        for (int stop = 1; stop < 4; stop++) {
            snprintf(what, sizeof what, "stopping near step %d", stop);
            int status = stopped_run("INT", stop, "%s", args);
            expect(status == 130, "%s, %s: status %d, expected 130", M, what, status);
            compare_beginnings(M, what);
            train_well("%s --resume $D/part --log $D/part.log --out $D/part", args);
            compare_runs(M, runs[i].file, what);
        }
    }
}

static run shared_run;
static void only_save(const char *dir)
{
    destination.path = (char *)(uintptr_t)dir;
    save_run(&shared_run);
}

// A NaN or Inf among what trains is never saved, and said by the tensor's name.
static void test_nan_saved(void)
{
    for (const char **name = (const char *[]){"bone", "lora", "full", NULL}; *name; name++)
        for (int i = 0; i < 3; i++) {
            model *m = open_small(small_plan(*name), 0);
            tensor *t = NULL;
            for (int j = 0; j < arrlen(m->tensors); j++) if (m->tensors[j].kind == PARAM) t = &m->tensors[j];
            const wide odd[3] = {(wide)NAN, (wide)INFINITY, 1};
            put(mat_of(t->value->p, t->value->type, SHAPE(1, 1)), &odd[i], TYPE_OF(wide));
            char *dir = in_scratch("never"), want[200] = "";
            opt.model = "base";
            opt.data = "rows.jsonl";
            shared_run = (run){.m = *m, .step = 3, .steps = 5};
            if (i < 2) snprintf(want, sizeof want, "step 3: %s is not finite", t->name);
            char *said = said_by(only_save, dir);
            expect(i < 2 ? !!strstr(said, want) : !*said, "%s: «%s», expected «%s»", *name, said, want);
            expect(!access(dir, F_OK) == (i == 2), "%s: %s", *name, dir);
            char command[200];
            snprintf(command, sizeof command, "rm -rf %s", dir);
            if (system(command)) die("cannot remove %s", dir);
            free(said), free(dir), close_small(m);
        }
}

static void only_read_state(const char *dir) { read_state_json(&shared_run, dir); }

// Makes one option, by its place in the table, another than it was. Those that the plan has settled are changed there.
static void change_option(const struct option *o)
{
    plan *p = &shared_run.m.p;
    void *at = (char *)&opt + o->at;
    if (!strcmp(o->name, "--method")) p->method = method_named("rslora");
    else if (!strcmp(o->name, "--targets")) {
        model *m = &shared_run.m;
        for (int i = 0; i < arrlen(m->linears); i += SEVEN) m->linears[i]->targeted ^= 1;
    }
    else if (!strcmp(o->name, "--rank")) p->rank++;
    else if (!strcmp(o->name, "--mini-r")) p->mini_r++;
    else if (!strcmp(o->name, "--alpha")) p->alpha++;
    else if (!strcmp(o->name, "--steps")) shared_run.steps++;
    else if (!strcmp(o->name, "--template")) chat.is = &templates[1];
    else if (o->kind == 's') *(const char **)at = "another";
    else if (o->kind == 'd') *(double *)at += 0.5;
    else *(int *)at += 1;
}

// A run goes on only with the options it had: each of those by which the result would be another.
// A flag that an older state.json does not know was off.
static void without_flag(const char *dir)
{
    size_t bytes;
    char *path = join(dir, "state.json"), *text = read_file(path, &bytes);
    json_t *json = parse_object(path, text, bytes, AS_INTEGERS);
    json_object_del(json, "--bf16");
    json_dump_file(json, path, JSON_INDENT(1));
    json_decref(json), free(text), free(path);
}

static void test_same_options(void)
{
    static const char *const names[] = {
        "--model", "--data", "--method", "--rank", "--alpha", "--mini-r", "--targets", "--lora-plus-ratio",
            "--dora-detach", "--steps", "--batch",
        "--accum", "--seq", "--lr", "--schedule", "--warmup", "--weight-decay", "--clip", "--seed", "--no-shuffle",
            "--template", "--bf16", "--tf32", NULL};
    model *m = open_small(small_plan("lora"), 0);
    shared_run = (run){.m = *m, .step = 3, .steps = 5};
    opt.model = "base", opt.data = "rows.jsonl";
    options then = opt;
    char *dir = in_scratch("settings");
    stage_begin(dir);
    stage_state(run_settings(&shared_run));
    stage_publish(&(place_of_result){.path = dir});
    char *said = said_by(only_read_state, dir);
    expect(!*said, "the same options: «%s»", said);
    if (!*said) expect(read_state_json(&shared_run, dir) == 3, "the step");
    free(said);
    for (const char *const *name = names; *name; name++) {
        const struct option *o = option_table;
        while (o < option_table + OPTIONS && strcmp(o->name, *name)) o++;
        if (o == option_table + OPTIONS) die("no option %s", *name);
        change_option(o);
        said = said_by(only_read_state, dir);
        expect(strstr(said, *name) && strstr(said, "was trained with"), "%s: «%s»", *name, said);
        free(said);
        if (!strcmp(*name, "--targets")) change_option(o);              // and back
        opt = then;
        shared_run.m.p = m->p;
        shared_run.steps = 5;
        chat.is = templates;
    }
    without_flag(dir);
    said = said_by(only_read_state, dir);
    expect(!*said, "a state without --bf16: «%s»", said);
    free(said);
    opt.bf16 = 1;
    said = said_by(only_read_state, dir);
    expect(!!strstr(said, "was trained with --bf16 unset"), "a state without it, and --bf16: «%s»", said);
    free(said);
    opt = then;
    free(dir), close_small(m);
}

// The counts of state.json are whole numbers that an int holds, its best loss a number; all else is refused by name.
static void test_state_counts(void)
{
    static const char *const names[] = {"step", "evaluated", "best_step", "evaluations_since", "best_eval_loss"};
    model *m = open_small(small_plan("lora"), 0);
    shared_run = (run){.m = *m, .step = 3, .steps = 5};
    opt.model = "base", opt.data = opt.val = "rows.jsonl", opt.keep_best = 1;
    for (int i = 0; i < 5; i++)
        for (int bad = 0; bad < 5; bad++) {
            json_t *values[] = {json_real(2147483648.0), json_real(-1), json_real(1.5), json_string("3"), json_integer(3)};
            char *name = text_of("counts-%d-%d", i, bad), *dir = in_scratch(name);
            json_t *state = run_settings(&shared_run);
            for (int j = 1; j < 5; j++) set_field(state, names[j], json_integer(2));
            set_field(state, "best_on", text_value(opt.val));
            char *value = json_text(values[bad]);
            set_field(state, names[i], json_incref(values[bad]));
            stage_begin(dir);
            stage_state(state);
            stage_publish(&(place_of_result){.path = dir});
            char *said = said_by(only_read_state, dir);
            int fits = bad == 4 || (i == 4 && (bad == 0 || bad == 2));
            expect(fits ? !*said : !!strstr(said, names[i]), "%s of %s: «%s»", names[i], value, said);
            for (int j = 0; j < 5; j++) json_decref(values[j]);
            free(value), free(said), free(dir), free(name);
        }
    opt.keep_best = 0;
    close_small(m);
}

// Whatever a signal does to a run in mid-flight, the next one goes on from the last step saved.
static void test_killed(void)
{
    static const struct { const char *name; int number; } signals[] = {
        {"INT", SIGINT}, {"TERM", SIGTERM}, {"HUP", SIGHUP}, {"PIPE", SIGPIPE}, {"USR1", SIGUSR1}, {"KILL", SIGKILL},
    };
    static const char *const args = FEW_ROWS " --steps 24 --save-every 1";
    train_well("%s --log $D/whole.log --out $D/whole", args);
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++) {
        if (not_asked_for(signals[i].name)) continue;
        int status = stopped_run(signals[i].name, 3, "%s", args);
        expect(status == 128 + signals[i].number, "status %d after SIG%s", status, signals[i].name);
        if (signals[i].number != SIGKILL) compare_beginnings("bone", signals[i].name);           // SIGKILL may cut a line
        train_well("%s --log $D/part.log --resume $D/part --out $D/part", args);
        compare_runs("bone", "adapter_model.safetensors", signals[i].name);
        shell("rm -rf $D/part*", "cannot tidy up");                      // SIGKILL leaves the directory in the making
    }
}

// Threads follow the quota of the control group, of either version, and of those above it.
static void test_quota(void)
{
    static const struct { const char *cgroup, *file, *content; double cpus; } cases[] = {
        {"0::/", "cpu.max", "150000 100000", 2}, {"0::/", "cpu.max", "max 100000", 1e9},
            {"0::/a/b", "a/cpu.max", "50000 100000", 1},
        {"0::/a/b", "a/b/cpu.max", "100000 100000", 1}, {"0::/not/seen/here", "cpu.max", "100000 100000", 1},
        {"5:memory:/m\n4:cpu,cpuacct:/c", "cpu/c/cpu.cfs_quota_us", "100000", 1},
            {"4:cpu,cpuacct:/", "cpu/cpu.cfs_quota_us", "-1", 1e9},
        {"1:name=x:/", "none", "", 1e9},
    };
    char command[1000], *root = in_scratch("root");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (not_asked_for(cases[i].content)) continue;
        snprintf(command, sizeof command, "rm -rf %s; mkdir -p %s/proc/self %s/sys/fs/cgroup/cpu/c "
            "%s/sys/fs/cgroup/a/b; cd %s; printf '%s\n' > proc/self/cgroup;"
            " cd sys/fs/cgroup; echo 100000 | tee cpu/cpu.cfs_period_us > cpu/c/cpu.cfs_period_us; echo %s > %s", root,
                root, root, root, root, cases[i].cgroup, cases[i].content, cases[i].file);
        shell(command, "cannot prepare");
        int want = cases[i].cpus < omp_get_num_procs() ? (int)cases[i].cpus : omp_get_num_procs();
        expect(usable_cpus(root) == want, "%s, %s: %s gives %d threads", cases[i].cgroup, cases[i].file, cases[i].content,
            usable_cpus(root));
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
        snprintf(command, sizeof command, "p=; for i in $(seq $((2 * $(nproc)))); do while :; do :; done & p=\"$p "
            "$!\"; done; %s %s; s=$?; kill $p; exit $s",
            all ? "" : "OMP_NUM_THREADS=1", two_steps);
        double start = seconds();
        shell(command, "exit status");
        took[all] = seconds() - start;
    }
    check(took[1] / took[0], 3, "time of all threads (%.1f s) over that of one (%.1f s)", took[1], took[0]);
}

// --compare: a cell is an ordinary run, every method has its row, what is done is not done again, a stop loses one cell at most.
static void test_compare(void)
{
    static const char *const options_used = "--batch=2 --max_new_tokens 2 --data $D/rows.jsonl --val=$D/rows.jsonl";
    char command[1000], line[64];
    shell("rm -rf $D/compare; head -4 data/val.jsonl > $D/rows.jsonl", "cannot prepare");
    snprintf(command, sizeof command, "$TRAIN --compare --quick --steps 2 %s --out $D/compare >$D/stdout 2>&1 & p=$!; "
        "while kill -0 $p && ! grep -q '3 of ' $D/stdout 2>/dev/null; do sleep 0.01; done; kill -INT $p; wait $p", options_used);
    expect(WEXITSTATUS(system(command)) == 130, "status when stopped");
    for (int again = 0; again < 2; again++) {
        snprintf(command, sizeof command, "%s $TRAIN --compare --quick --steps 2 %s --out $D/compare >$D/stdout "
            "2>$D/stderr", again ? "PATH=/none" : "", options_used);
        shell(command, "exit status, run %d", again);
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
    for (int i = 0; i < METHODS; i++)
        snprintf(line, sizeof line, "\n| %s |", methods[i].name), expect(has(table, line), "%s has a row", methods[i].name);
    check(strstr(table, "–") || strstr(table, "nan"), 0, "every result is there: %s", table);
    train_well("--method bone --lr 0.004 --steps 2 --no-before %s --log $D/alone.log --out $D/alone", options_used);
    expect(same_logs("alone.log", "compare/runs/bone-rank32-lr0.004-seed1-steps2.log"), "bone's log");
    free(table);
}

// --compare --own-lr: each method's best rate lies between two that are worse, or at the end of what is tried; the table
// has every seed at it; what is done is not done again.
static void test_own_rates(void)
{
    static const char *const command = "$TRAIN --compare --own-lr --jobs 3 --method lora,bone --seeds 2 --steps 2 --batch 2 "
        "--max-new 2 --exact-match --lr 0.1 --data $D/rows.jsonl --val $D/rows.jsonl --out $D/own >$D/stdout 2>$D/stderr";
    shell("rm -rf $D/own; head -4 data/val.jsonl > $D/rows.jsonl", "cannot prepare");
    for (int again = 0; again < 2; again++) {
        shell(command, "exit status, run %d", again);
        int done = 0, all = 0;
        char *text = output_of("stdout");
        for (const char *at = text; (at = strstr(at, "(done before)")); at++) done++;
        for (const char *at = text; (at = strstr(at, "  first gradient norm ")); at++) all++;
        expect(done == (again ? all : 0) && all > 8, "run %d found %d of %d done", again, done, all);
        free(text);
    }
    for (int i = 0; i < 2; i++) {
        char *cells = output_of("own/cells.csv"), label[20];
        double best = INFINITY, at = NAN, low = INFINITY, high = 0, table = NAN;
        int in_table = 0;
        snprintf(label, sizeof label, ",%s,", i ? "lora" : "bone");
        for (char *line = strtok(cells, "\n"); line; line = strtok(NULL, "\n")) {
            double lr, loss;
            int fields = sscanf(line, "%*[^,],%*[^,],%*d,%*f,%*d,%lf,%*d,%*f,%*f,%lf", &lr, &loss);
            if (fields != 2 || !has(line, label)) continue;
            if (!strncmp(line, "main", 4)) table = lr, in_table++;
            else if (loss < best) best = loss, at = lr;
            low = fmin(low, lr), high = fmax(high, lr);
        }
        expect(in_table == 2 && table == at, "%s: %d cells in the table at %g, best %g", label, in_table, table, at);
        expect((low < at && at < high) || at > 6 || at < 0.0017, "%s: the best rate %g of %g … %g", label, at, low, high);
        free(cells);
    }
}

// cells.csv has the shard in the table once a seed, with the number that it trains.
static void expect_shard(const char *cells, const char *shard, int trains, int seeds)
{
    char begins[64];
    int rows = 0;
    snprintf(begins, sizeof begins, "\nmain,disha-%s,0,%d,", shard, trains);
    for (const char *at = cells; (at = strstr(at, begins)); at++) rows++;
    expect(rows == seeds, "%s: %d lines of %d that begin with «%s»", shard, rows, seeds, begins + 1);
}

// A D of one row, or of one column, can only make updates of rank 1, and that is said.
static void test_shard_note(void)
{
    static const struct { const char *shard, *one; } cases[] = {{"1x4", "row"}, {"4x1", "column"}, {"2x2", NULL}};
    for (int i = 0; i < 3; i++) {
        char want[100];
        train_well("--dry-run --steps 2 --batch 2 --method disha --shard %s --out $D/none", cases[i].shard);
        char *note = output_of("stderr");
        snprintf(want, sizeof want, "--shard %s: with one %s of D", cases[i].shard, cases[i].one ? cases[i].one : "");
        expect(has(note, cases[i].one ? want : "") && has(note, "--shard") == !!cases[i].one, "--shard %s says «%s»",
            cases[i].shard, note);
        free(note);
    }
}

// --compare --shard LIST: each shard has its cells, at its own count, whatever --rank is; such a cell is the ordinary run of
// its shard; what is done is not done again; the other methods stay as they are; and with --own-lr each shard is searched for.
static void test_design_space(void)
{
    static const char *const options_used = "--steps 2 --batch 2 --max-new 2 --data $D/rows.jsonl --val $D/rows.jsonl";
    static const char *const ways[] = {"--quick --seeds 2 --rank 8 --method bone,disha", "--own-lr --jobs 2 --method disha"};
    int inputs_and_outputs = 5 * (128 * (128 + 64 + 64 + 128 + 384 + 384) + 384 * 128);
    char command[1000];
    shell("rm -rf $D/space; head -4 data/val.jsonl > $D/rows.jsonl", "cannot prepare");
    for (int way = 0; way < 2; way++)
        for (int again = 0; again < 2; again++) {
            snprintf(command, sizeof command, "$TRAIN --compare %s --shard 1x1,16xout,inx4,inxout %s --out $D/space >$D/stdout "
                "2>$D/stderr", ways[way], options_used);
            shell(command, "exit status, %s, run %d", ways[way], again);
            int done = 0, all = 0;
            char *text = output_of("stdout");
            for (const char *at = text; (at = strstr(at, "(done before)")); at++) done++;
            for (const char *at = text; (at = strstr(at, "  first gradient norm ")); at++) all++;
            expect(again ? done == all : all >= 8, "%s, run %d: %d of %d cells done before", ways[way], again, done, all);
            char *cells = output_of("space/cells.csv"), *table = output_of("space/table.md");
            int seeds = way ? 1 : 2;
            expect_shard(cells, "1x1", 35, seeds);
            expect_shard(cells, "16xout", 5 * 16 * (128 + 64 + 64 + 128 + 384 + 384 + 128), seeds);
            expect_shard(cells, "inx4", 5 * 4 * (6 * 128 + 384), seeds);
            expect_shard(cells, "inxout", inputs_and_outputs, seeds);
            expect(has(cells, "\nmain,bone,8,") == !way, "Bone beside them");
            expect(!has(cells, ",disha,"), "no disha of the rank");
            expect(has(table, "\n| disha-16xout |  |"), "a row of the table: %s", table);
            free(text), free(cells), free(table);
        }
    train_well("--method disha --shard 16xout --lr 0.004 --no-before %s --log $D/alone.log --out $D/alone", options_used);
    expect(same_logs("alone.log", "space/runs/disha-16xout-rank0-lr0.004-seed1-steps2.log"), "the log of 16xout");
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
    if (!f) die("cannot write %s", path);
    fprintf(f, plotted_cells, hits / 2, hits, hits / 2, hits);
    fclose(f);
    shell("gnuplot -c paper/compare.gp $D/plots 'what was_run' 2>$D/stderr", "gnuplot");
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
        expect(has(plot, ">newcomer"), "%s.svg names a new method", names[i]);
        expect(has(plot, "what was_run"), "%s.svg says what was run", names[i]);
        free(plot);
    }
    for (int hits = 3; hits <= 30; hits *= 10) {
        char *plot = plot_of(hits, "match");
        expect(!has(plot, "exact match") == (hits < 10), "match.svg, %d of 200 right", hits);
        free(plot);
    }
    check(system("gnuplot -e \"width = 4; last = 11;"
        " $(grep -E '^(window|first_of|min)\\(' paper/compare.gp | tr '\\n' ';')"
        " print window(1), window(4), window(5), window(11)\" 2>&1 | grep -qx '2.5 2.5 6.5 10.0'"), 0, "middles of windows");
}

// The design space's plot: every shard by its name, the corners by theirs, lines of one A; and none where no shard was run.
static void test_space_plot(void)
{
    static const char *const said[] = {
        ">1x4<", ">16x16<", ">16xout<", ">inx16<", ">inxout<", "A = 16<", "A = in<", "Bone", "transpose", "mini", "frozen",
        "what_was_run", "eval loss",
    };
    if (system("gnuplot --version >$D/stdout 2>&1")) {
        snprintf(skipped, sizeof skipped, "gnuplot is not here");
        return;
    }
    shell("mkdir -p $D/space-plot; cd $D/space-plot; echo part,method,rank,trains,seed,lr,steps,grad_norm,loss,eval_loss,"
        "exact_match,tok_per_s,peak_mb,hits > cells.csv; "
        "echo part,method,rank,trains,seed,lr,steps,step,loss,grad_norm,tok_per_s > steps.csv; n=0; "
        "for m in full disha-1x4 disha-16x4 disha-16x16 disha-16xout disha-inx16 disha-inxout; do for seed in 1 2; do "
        "n=$((n + 100)); cell=main,$m,0,$((n * n / 100)),$seed,0.004,2; echo $cell,8,1,0.$((1000 - n / 2)),5,900,90,10 >> "
        "cells.csv; for step in 1 2; do echo $cell,$step,0.$n,1,900 >> steps.csv; done; done; done", "cannot prepare");
    shell("gnuplot -c paper/compare.gp $D/space-plot 'what_was_run' 2>$D/stderr", "gnuplot");
    char *plot = output_of("space-plot/space.svg");
    for (size_t i = 0; i < sizeof said / sizeof *said; i++) expect(has(plot, said[i]), "space.svg says %s", said[i]);
    expect(!has(plot, ">full"), "space.svg shows no other method");
    free(plot);
    shell("cd $D/space-plot; rm space.svg; sed -i /disha-/d cells.csv steps.csv", "cannot prepare");
    shell("gnuplot -c paper/compare.gp $D/space-plot 'what_was_run' 2>$D/stderr; test ! -e $D/space-plot/space.svg",
        "a space.svg of no shard");
}

// ---- wrong input ---------------------------------------------------------------------------------------------------

#define POINTER "printf 'version https://git-lfs.github.com/spec/v1\\noid sha256:0123\\nsize 13476835328\\n'"

// A token that only the tokenizer's files know, the first behind the 768 of the model.
#define NEW_TOKEN "echo '{\"added_tokens_decoder\": {\"768\": {\"content\": \"<new>\", \"special\": true}}}' > " \
    "$D/model/tokenizer_config.json; echo '{\"question\": \"One <new>?\", \"answer\": \"2\"}' > $D/new.jsonl"

// Each makes one thing wrong in a copy of base/ (in $D/model) or of the rows ($D/rows.jsonl), runs $ARGS, and wants a
// non-zero status, one line that begins with "error:" and holds the text, and no $D/out.
static const struct { const char *what, *prepare, *args, *says; } wrong[] = {
    {"no model",            "rm -r $D/model", "",
        "model: there is no such directory"},
    {"no safetensors",      "rm $D/model/model.safetensors", "", "no model.safetensors"},
    {"truncated",           "truncate -s -100 $D/model/model.safetensors", "", "truncated"},
    {"truncated header",    "truncate -s 900 $D/model/model.safetensors", "", "truncated"},
    {"empty safetensors",   ": > $D/model/model.safetensors", "", "no safetensors file"},
    {"not safetensors",     "cp Makefile $D/model/model.safetensors", "", "not safetensors"},
    {"a wrong shape",       "sed -i 's/\"num_key_value_heads\":[^,]*/\"num_key_value_heads\":8/' $D/model/config.json",
        "", "asks for ["},
    {"an unknown dtype",    "sed -i '0,/\"F32\"/s//\"I32\"/' $D/model/model.safetensors",       "", "is I32, expected"},
    {"a tensor renamed",    "sed -i '0,/model.norm/s//model.nrom/' $D/model/model.safetensors", "",
        "model.norm.weight [128] is missing"},
    {"a tensor twice",      "sed -i '0,/layers.1.self_attn.q/s//layers.0.self_attn.q/' $D/model/model.safetensors", "",
        "duplicate object key"},
    {"config lacks a field", "sed -i '/hidden_size/d' $D/model/config.json",                     "",
        "\"hidden_size\" is missing"},
    {"config is not JSON",  "echo '{' > $D/model/config.json", "", "not valid JSON"},
    {"another model",       "sed -i 's/\"llama\"/\"phi3\"/' $D/model/config.json",              "",
        "\"model_type\" is phi3; these are built: llama, mistral, qwen2, qwen3"},
    {"RoPE by yarn",        "sed -i 's/^{/{\"rope_scaling\": {\"rope_type\": \"yarn\"},/' $D/model/config.json", "",
        "of type \"yarn\" is not built"},
    {"RoPE by dynamic",     "sed -i 's/^{/{\"rope_scaling\": {\"type\": \"dynamic\", \"factor\": 2},/' $D/model/config.json", "",
        "of type \"dynamic\" is not built"},
    {"RoPE in part",        "sed -i 's/^{/{\"partial_rotary_factor\": 0.5,/' $D/model/config.json", "",
        "\"partial_rotary_factor\" is 0.5, only 1 is built"},
    {"llama3's RoPE without its numbers", "sed -i 's/^{/{\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8},/' "
        "$D/model/config.json", "", "field \"low_freq_factor\" is missing"},
    {"llama3's RoPE upside down", "sed -i 's/^{/{\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8, "
        "\"low_freq_factor\": 4, \"high_freq_factor\": 4},/' $D/model/config.json", "",
        "\"low_freq_factor\" 4 must be less than \"high_freq_factor\" 4"},
    {"windows before full layers", "sed -i 's/\"llama\"/\"qwen2\"/; s/^{/{\"use_sliding_window\": true, "
        "\"layer_types\": [\"sliding_attention\", \"full_attention\"],/' $D/model/config.json", "",
        "full_attention behind sliding_attention"},
    {"windows of no width", "sed -i 's/\"llama\"/\"qwen3\"/; s/^{/{\"layer_types\": [\"sliding_attention\"],/' "
        "$D/model/config.json", "", "\"layer_types\" must be a list of"},
    {"biases of another family", "sed -i 's/\"llama\"/\"mistral\"/; s/^{/{\"attention_bias\": true,/' $D/model/config.json", "",
        "which model_type mistral does not have"},
    {"no tokenizer",        "rm $D/model/tokenizer.model", "", "tokenizer.model"},
    {"another tokenizer",   "echo '{\"version\": \"1.0\"}' > $D/model/tokenizer.model",         "", "tokenizer.model"},
    {"truncated tokenizer", "truncate -s 3000 $D/model/tokenizer.model", "", "tokenizer.model"},
    {"a shard not there",   "rm $D/model/model.safetensors; echo "
        "'{\"weight_map\":{\"model.norm.weight\":\"a.safetensors\"}}' > $D/model/model.safetensors.index.json", "",
        "a.safetensors"},
    {"no rows file",        "rm $D/rows.jsonl",                                                 "", "rows.jsonl"},
    {"an empty file",       ": > $D/rows.jsonl",                                                "", "rows.jsonl: is empty"},
    {"a broken row",        "echo '{\"question\": \"a' >> $D/rows.jsonl",                       "",
        "rows.jsonl:4: not valid JSON, at byte 16 of the line: premature end of input"},
    {"a row of 3000 levels", "for i in $(seq 3000); do printf '['; done >> $D/rows.jsonl",       "",
        "maximum parsing depth reached"},
    {"a list as a row",     "echo '3' >> $D/rows.jsonl",                                        "",
        "rows.jsonl:4: expected a JSON object"},
    {"rows in a pipe",      "rm -f $D/pipe.jsonl; mkfifo $D/pipe.jsonl", "--data $D/pipe.jsonl",
        "pipe.jsonl: is a pipe"},
    {"rows behind a broken link", "ln -sfn $D/none $D/link.jsonl", "--data $D/link.jsonl",
        "link.jsonl: is a link to"},
    {"a folder for rows",   "mkdir -p $D/folder.jsonl", "--data $D/folder.jsonl",
        "folder.jsonl: is a directory"},
    {"rows left to git-lfs", POINTER " > $D/rows.jsonl", "",
        "rows.jsonl: is a git-lfs pointer"},
    {"config left to git-lfs", POINTER " > $D/model/config.json", "",
        "config.json: is a git-lfs pointer"},
    {"model left to git-lfs", POINTER " > $D/model/model.safetensors", "",
        "model.safetensors: is a git-lfs pointer"},
    {"tokenizer left to git-lfs", POINTER " > $D/model/tokenizer.model", "",
        "tokenizer.model: is a git-lfs pointer"},
    {"a model in a pipe",   "rm $D/model/model.safetensors; mkfifo $D/model/model.safetensors", "",
        "model.safetensors: is a pipe"},
    {"a model behind a broken link", "ln -sfn none $D/model/model.safetensors",                 "",
        "model.safetensors: is a link to none"},
    {"a tokenizer in a pipe", "rm $D/model/tokenizer.model; mkfifo $D/model/tokenizer.model",   "", "tokenizer.model: is a pipe"},
    {"PyTorch's weights",   "mv $D/model/model.safetensors $D/model/pytorch_model-00001-of-00001.bin", "",
        "pytorch_model-00001-of-00001.bin is in PyTorch's own format"},
    {"llama.cpp's weights", "rm $D/model/*; touch $D/model/llama-q4.gguf", "",
        "llama-q4.gguf is in llama.cpp's format"},
    {"llama.cpp's file",    "touch $D/llama-q4.gguf", "--model "
        "$D/llama-q4.gguf", "llama-q4.gguf is in llama.cpp's format"},
    {"Meta's weights",      "rm $D/model/*; touch $D/model/consolidated.00.pth $D/model/params.json", "",
        "consolidated.00.pth is in Meta's own format"},
    {"a part of a model",   "mv $D/model/model.safetensors $D/model/model-00001-of-00002.safetensors", "",
        "model.safetensors.index.json, which names the parts"},
    {"a quantised config",  "sed -i 's/^{/{\"quantization_config\": {\"quant_method\": \"gptq\"},/' $D/model/config.json",
        "", "is quantised (gptq)"},
    {"a name with a colour", "sed -i '0,/l.norm/s//\\\\u001b/; s/\"F32\"/\"I32\"/g' $D/model/model.safetensors", "",
        "is I32, expected"},
    {"half a row",          "echo '{\"question\": \"a\"}' >> $D/rows.jsonl",                    "",
        "rows.jsonl:4: has \"question\" but no text in \"answer\""},
    {"no known field",      "echo '{\"promt\": \"a\"}' >> $D/rows.jsonl", "",
        "rows.jsonl:4: no \"instruction\""},
    {"no answer within seq", ":", "--seq 16", "within --seq 16"},
    {"text behind a row",   "sed -i '2s/$/ and more/' $D/rows.jsonl", "",
        "rows.jsonl:2: not valid JSON"},
    {"a NUL in a row",      "sed -i '2s/Now/\\\\u0000/' $D/rows.jsonl",                         "",
        "\\u0000 is not allowed"},
    {"a head that is not tied", "sed 's/\\(tie_word_embeddings.:\\).*true/\\1 false/' base/config.json > "
        "$D/untied.json; $TRAIN --init $D/untied.json --method full"
        " --data $D/rows.jsonl --steps 1 --out $D/mine >/dev/null; cp $D/mine/model.safetensors $D/model", "",
            "lm_head.weight is not model.embed_tokens"},
    {"a token beyond the model in --eval", "echo '{\"[PAD]\": 768}' > $D/model/added_tokens.json; echo '{\"text\": \"a "
        "[PAD] b\"}' > $D/odd.jsonl", "--eval --val $D/odd.jsonl", "token 768 of the tokenizer's files"},
    {"a token beyond the model", "echo '{\"[PAD]\": 768}' > $D/model/added_tokens.json; echo '{\"text\": \"a [PAD] "
        "b\"}' >> $D/rows.jsonl", "", "holds token 768"},
    {"an added token without id", "echo '{\"[PAD]\": null}' > $D/model/added_tokens.json", "",       "without a text or an id"},
    {"an EOS that is no token", "echo '{\"eos_token\": \"<end>\"}' > $D/model/tokenizer_config.json", "",
        "which is no token of this directory"},
    {"links to nothing",    "ln -sfn $D/none $D/model/generation_config.json",                  "",
        "generation_config.json: is a link to"},
    {"a link for a tokenizer", "ln -sfn $D/none $D/model/tokenizer.model", "",
        "tokenizer.model: is a link to"},
    {"a page of the hub",   ":", "--model "
        "https://huggingface.co/a/b", "a local directory is wanted"},
    {"a model's file",      ":", "--model "
        "base/config.json", "name the directory that it is in"},
    {"an adapter as model", ":", "--model "
        "dev/golden/lora-mha", "it is an adapter: --adapter"},
    {"a model as adapter",  ":", "--eval --val "
        "data/val.jsonl --adapter base", "it is a model: --model"},
    {"a template of no name", ":", "--template vicuna",
        "--template vicuna: there is no such template; choose from alpaca, llama2"},
    {"a template's end that is no token", ":", "--template chatml",
        "ends an answer with <|im_end|>, which is no token of this model"},
    {"a template without its BOS", "echo '{\"add_bos_token\": false}' > $D/model/tokenizer_config.json", "--template llama2",
        "has {bos} in it, which this model's tokenizer does not put"},
    {"turns that do not alternate",
        "echo '{\"messages\": [{\"role\": \"assistant\", \"content\": \"a\"}]}' >> $D/rows.jsonl", "--template llama2",
        "rows.jsonl:4: turn 1 is the assistant's and the user's is due"},
    {"the best of no rows", ":", "--keep-best", "--keep-best compares evaluations"},
    {"the best of no evaluations", ":", "--keep-best --val $D/rows.jsonl --eval-every 0", "give --eval-every N, too"},
    {"patience for nothing", ":", "--patience 3", "--patience counts evaluations"},
    {"a plot of no kind",   ":", "--plot $D/plot.pdf", "expected a name that ends in .png or .svg"},
    {"a plot in no folder", ":", "--plot $D/nowhere/plot.svg", "nowhere/: No such file"},
    {"a plot of many runs", ":", "--compare --plot $D/plot.svg", "--plot is for one run"},
    {"a dry run of many",   ":", "--compare --dry-run", "--dry-run is for one run"},
    {"rows that are cut short", "gzip $D/rows.jsonl; truncate -s -9 $D/rows.jsonl.gz", "--data $D/rows.jsonl.gz",
        "cut short behind"},
    {"a chat with rows",    ":", "--chat --data data/train.jsonl", "--chat and --data: give one of them"},
    {"a chat with rows to evaluate on", ":", "--chat --val data/val.jsonl", "--chat and --val: give one of them"},
    {"a chat with a plot",  ":", "--chat --plot $D/plot.svg", "--chat and --plot: give one of them"},
    {"an answer with rows", ":", "--chat --generate a --data data/train.jsonl", "--chat and --data: give one of them"},
    {"a plot of no run",    ":", "--eval --val data/val.jsonl --plot $D/plot.svg", "--eval and --plot: give one of them"},
    {"a dry run of no run", ":", "--eval --val data/val.jsonl --dry-run", "--eval and --dry-run: give one of them"},
    {"a plot of no kind, before the rows are read", ":", "--plot $D/plot.pdf --data $D/none.jsonl",
        "expected a name that ends in .png or .svg"},
    {"a chat and a merge",  ":", "--chat --merge $D/merged --adapter $D/adapter",
        "--chat and --merge: give one of them"},
    {"two lengths",         ":", "--epochs 2",
        "--steps and --epochs both say"},
    {"a flag for a method", ":", "--use_dora",
        "that is --method dora"},
    {"nearly a method",     ":", "--method pisa",
        "did you mean pissa?"},
    {"BOS in words",        "echo '{\"add_bos_token\": \"false\"}' > $D/model/tokenizer_config.json", "",
        "must be true or false"},
    {"UTF-32",              "printf '\\377\\376\\0\\0a\\0\\0\\0' > $D/rows.jsonl",                "", "is UTF-32"},
    {"a base that is NaN",  "dd if=/dev/zero bs=1024 count=1000 2>/dev/null | tr '\\0' '\\377' | dd "
        "of=$D/model/model.safetensors bs=1024 seek=100 conv=notrunc 2>/dev/null",
        "", "weight holds NaN or Inf"},
    {"other layers to resume", "$TRAIN --data $D/rows.jsonl --steps 2 --targets q,v --out $D/mine >/dev/null; rm -r "
        "$D/model; cp -r base $D/model", "--resume $D/mine --model base --targets q", "--targets \"q,v\", this run has \"q\""},
    {"unknown option",      ":", "--rnak 4",
        "unknown option --rnak"},
    {"an option's value",   ":", "--rank four", "--rank four"},
    {"a missing value",     ":", "--rank", "--rank needs a value: --rank R"},
    {"unknown method",      ":", "--method bonn", "--method bonn"},
    {"unknown schedule",    ":", "--schedule step",
        "--schedule step"},
    {"unknown target",      ":", "--targets q,w", "\"w\""},
    {"end of a target",     ":", "--targets proj", "\"proj\""},
    {"a D of no size",      ":", "--method disha --shard 0x3", "--shard 0x3: expected AxB"},
    {"a D too long",        ":", "--method disha --shard 9999x3", "would be dead"},
    {"a D of 2^24 rows",    ":", "--method disha --shard 16777216x3", "would be dead"},
    {"a D of more",         ":", "--method disha --shard 16777217x3", "expected AxB"},
    {"a D too wide",        ":", "--method disha --shard 4x9999", "would be dead"},
    {"a shard for bone",    ":", "--method bone --shard 4x4", "is for --method disha"},
    {"compare half a shard", ":", "--compare --method disha --shard 4x4,1x", "--shard 1x: expected AxB"},
    {"compare a D of no size", ":", "--compare --method disha --shard 4x4,0x4", "--shard 0x4: expected AxB"},
    {"compare no shard",    ":", "--compare --shard 4x4,,1x1", "--shard 4x4,,1x1: expected AxB"},
    {"compare a D too long", ":", "--compare --method disha --shard 4x4,9999x3", "--shard: D has 9999 rows"},
    {"compare a D too wide", ":", "--compare --method disha --shard 4x9999", "--shard: D has 9999 columns"},
    {"compare a shard twice", ":", "--compare --method disha --shard 4x4,inx4,04x4", "--shard 4x4,inx4,04x4: 4x4 twice"},
    {"compare a shard of bone", ":", "--compare --method lora,bone --shard 4x4", "is for --method disha, not for lora,bone"},
    {"compare an unknown method", ":", "--compare --method bonn", "--method bonn: with --compare a list"},
    {"groups for lora",     ":", "--method lora --groups 1x1", "is for --method bat"},
    {"groups the other way", ":", "--method bat --groups inx1", "P counts along out"},
    {"three groups of four", ":", "--method bat --rank 32 --groups 3x1", "--groups: 3 groups do not divide"},
    {"BlinkDL's own file",  "rm $D/model/*; touch $D/model/RWKV-x060.pth", "", "dev/rwkv_pth.py"},
    {"rank for bat",        ":", "--method bat --rank 7",
        "--rank 7 does not divide"},
    {"rank for bat-row",    ":", "--method bat-row "
        "--rank 7", "--rank 7 does not divide"},
    {"mini-r",              ":", "--method mini "
        "--mini-r 7", "--mini-r 7 does not divide"},
    {"rank for pissa",      ":", "--method pissa "
        "--rank 5000", "--rank 5000 exceeds"},
    {"init of an adapter",  ":", "--init "
        "$D/model/config.json", "--method full"},
    {"use of an init",      ":", "--eval --val "
        "data/val.jsonl --init $D/model/config.json", "--init starts from random"},
    {"two things at once",  ":", "--eval --list",
        "give one of them"},
    {"check and eval",      ":", "--check --eval",
        "--eval and --check: give one of them"},
    {"two adapters",        ":", "--eval --val "
        "data/val.jsonl --adapter dev/golden/lora-mha --adapter dev/golden/bat", "--adapter is given twice"},
    {"an adapter twice",    ":",
        "--adapter=dev/golden/bat --adapter-name-or-path dev/golden/bat", "--adapter is given twice"},
    {"letters swapped",     ":", "--rnak 4",
        "did you mean --rank?"},
    {"a letter less",       ":", "--learning_rat 4",
        "did you mean --lr?"},
    {"words too many",      ":", "--warmup_ratio 0.1",
        "--warmup counts steps"},
    {"one dash",            ":", "-rank=4",
        "did you mean --rank?"},
    {"nothing like it",     ":", "--lora_dropout 0.1",
        "there is no dropout here"},
    {"a list in two words", ":", "--target_modules "
        "q_proj v_proj", "joined by commas"},
    {"a flag's value",      ":", "--no-shuffle=0",
        "--no-shuffle takes no value"},
    {"an option as a value", ":", "--generate --chat",
        "--generate needs a value"},
    {"half a value",        ":", "--rank= --lr 1",
        "--rank : expected a whole number"},
    {"no epoch",            ":", "--epochs 0",
        "--epochs 0: expected a number"},
    {"a model by its name", ":", "--model "
        "meta-llama/Llama-2-7b-hf", "hf download meta-llama/Llama-2-7b-hf --local-dir Llama-2-7b-hf"},
    {"an adapter by its name", ":", "--eval --val "
        "data/val.jsonl --adapter somebody/lora", "hf download somebody/lora"},
    {"a model in no folder", ":", "--model dev/none",
        "dev/none: there is no such directory"},
    {"rows without end",    ":", "--batch 1000000 "
        "--accum 1000", "--accum 1000 is too much"},
    {"warm-up without end", ":", "--warmup 100",
        "--warmup 100 exceeds"},
    {"eval goes on",        ":", "--eval --val "
        "data/val.jsonl --resume $D/none", "--adapter"},
    {"out is a file",       "touch $D/out.txt", "--out $D/out.txt",
        "not a directory"},
    {"out in no folder",    ":", "--out $D/none/out",
        "cannot write"},
    {"out holds others' files", "mkdir $D/mine; touch $D/mine/thesis.tex", "--out $D/mine", "thesis.tex"},
    {"out is the model",    ":", "--out $D/model",
        "is --model itself"},
    {"out holds a model",   "cp -r base $D/mine", "--out $D/mine",
        "which would be lost"},
    {"out is where we are", ":", "--out .",
        "is the current folder"},
    {"out is a broken link", "ln -sfn $D/none $D/link", "--out $D/link",
        "expected the name of a directory"},
    {"out is nothing",      ":", "--out ''",
        "expected the name of a directory"},
    {"merge over a model",  "cp -r base $D/mine", "--merge $D/mine "
        "--adapter dev/golden/lora-mha", "which would be lost"},
    {"log not writable",    ":",                                                                "--log $D/none/log", "--log"},
    {"attention that sees the future", "sed -i 's/^{/{\"is_causal\": false,/' $D/model/config.json", "",
        "\"is_causal\" is false, which is not built"},
    {"a switch in quotes",  "sed -i 's/^{/{\"mlp_bias\": \"true\",/' $D/model/config.json", "",
        "\"mlp_bias\" must be true or false"},
    {"a switch that is null", "sed -i 's/\"tie_word_embeddings\":[^,]*/\"tie_word_embeddings\": null/' "
        "$D/model/config.json", "", "\"tie_word_embeddings\" must be true or false"},
    {"biases",              "sed -i 's/^{/{\"attention_bias\": true,/' $D/model/config.json", "",
        "model.layers.0.self_attn.q_proj.bias"},
    {"a token the model has no row for", NEW_TOKEN, "--data $D/new.jsonl", "a row holds token 768"},
    {"the same in --val",   NEW_TOKEN, "--val $D/new.jsonl", "a row holds token 768"},
    {"the same for --eval", NEW_TOKEN, "--eval --val $D/new.jsonl", "a row holds token 768"},
    {"another activation",  "sed -i 's/\"silu\"/\"gelu\"/' $D/model/config.json", "", "\"hidden_act\" is gelu, only \"silu\""},
    {"an activation of no name", "sed -i 's/\"silu\"/5/' $D/model/config.json", "", "\"hidden_act\" is no text"},
    {"dropout in training", "sed -i 's/^{/{\"attention_dropout\": 0.1,/' $D/model/config.json", "",
        "\"attention_dropout\" 0.1, which is not built"},
    {"a field of another RoPE", "sed -i 's/^{/{\"rope_scaling\": {\"rope_theta\": 10000, \"factor\": 8},/' "
        "$D/model/config.json", "", "\"factor\" in \"rope_scaling\" is not built"},
    {"RoPE as a text",      "sed -i 's/^{/{\"rope_parameters\": \"default\",/' $D/model/config.json", "",
        "\"rope_parameters\" must be an object"},
    {"an end that is a word", "sed -i '/eos_token_id/s/:.*/: \"<end>\",/' $D/model/config.json", "",
        "\"eos_token_id\" must be a token, or a list of at most"},
    {"half an end",         "sed -i '/eos_token_id/s/:.*/: 2.5,/' $D/model/config.json", "",
        "\"eos_token_id\" must be a token, or a list of at most"},
    {"more ends than are kept", "echo '{\"eos_token_id\": [5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22]}' "
        ">$D/model/generation_config.json", "", "generation_config.json: \"eos_token_id\" must be a token, or a list of at most"},
    {"an activation by number", "sed -i 's/\"silu\"/3/' $D/model/config.json", "", "only \"silu\" is built"},
    {"a size in quotes",    "sed -i 's/\"hidden_size\":[^,]*/\"hidden_size\": \"128\"/' $D/model/config.json", "",
        "\"hidden_size\" must be a whole number"},
    {"half a layer",        "sed -i 's/\"num_hidden_layers\":[^,]*/\"num_hidden_layers\": 2.5/' $D/model/config.json", "",
        "\"num_hidden_layers\" must be a whole number"},
    {"a NaN in the middle", "printf '\\377\\377\\377\\377' | dd of=$D/model/model.safetensors bs=1 seek=1500000 "
        "conv=notrunc 2>/dev/null", "", "weight holds NaN or Inf"},
    {"a NaN when it speaks", "printf '\\377\\377\\377\\377' | dd of=$D/model/model.safetensors bs=1 seek=1500000 "
        "conv=notrunc 2>/dev/null", "--generate Tom --temperature 0.7", "weight holds NaN or Inf"},
    {"an Inf in the head",  "printf '\\000\\000\\200\\177' | dd of=$D/model/model.safetensors bs=1 seek=100000 "
        "conv=notrunc 2>/dev/null", "--generate Tom --temperature 0.7", "weight holds NaN or Inf"},
    {"log over the rows",   ":",                                                                "--log $D/rows.jsonl",
        "is a file that this run reads"},
    {"log over the weights", ":", "--log "
        "$D/model/model.safetensors", "which this run reads"},
    {"log inside the model", "ln -s model $D/alias", "--log "
        "$D/alias/log.jsonl", "which this run reads"},
    {"log inside --out",    "$TRAIN --data $D/rows.jsonl --steps 1 --out $D/mine >/dev/null",
        "--log $D/mine/log.jsonl --out $D/mine", "which this run reads or replaces"},
    {"log at --out",        ":", "--log $D/out",
        "is --out itself"},
    {"log into a directory", ":", "--log $D", "is not a file"},
    {"no adapter",          ":", "--eval --val "
        "data/val.jsonl --adapter $D/none", "there is no such directory"},
    {"merge without adapter", ":", "--merge $D/out",
        "needs --adapter"},
    {"an adapter with a NaN", "$TRAIN --data $D/rows.jsonl --steps 1 --out $D/mine >/dev/null; printf "
        "'\\377\\377\\377\\377\\377\\377\\377\\377' | dd of=$D/mine/adapter_model.safetensors bs=1 "
        "seek=100000 conv=notrunc 2>/dev/null",
        "--eval --val data/val.jsonl --adapter $D/mine", "holds NaN or Inf"},
    {"a model with a NaN",  "dd if=/dev/zero bs=1024 count=1000 2>/dev/null | tr '\\0' '\\377' | dd "
        "of=$D/model/model.safetensors bs=1024 seek=100 conv=notrunc 2>/dev/null", "--eval --val data/val.jsonl",
        "holds NaN or Inf"},
    {"full from an Inf",    "printf '\\000\\000\\200\\177' | dd of=$D/model/model.safetensors bs=1 seek=$(($(stat -c "
        "%s $D/model/model.safetensors) - 4)) conv=notrunc 2>/dev/null", "--method full", "weight holds NaN or Inf"},
    {"another method's adapter", ":", "--method bat "
        "--adapter dev/golden/lora-mha", "--method bat: --adapter"},
    {"a start that is not built", "cp -r dev/golden/lora-mha $D/mine; sed -i 's/\"init_lora_weights\": "
        "true/\"init_lora_weights\": \"corda\"/' $D/mine/adapter_config.json",
        "--eval --val data/val.jsonl --adapter $D/mine", "\"corda\", which changes the base"},
    {"a pattern of ranks",  "cp -r dev/golden/lora-mha $D/mine; sed -i 's/\"rank_pattern\": {}/\"rank_pattern\": "
        "{\"q_proj\": 2}/' $D/mine/adapter_config.json", "--eval --val data/val.jsonl --adapter $D/mine",
        "\"rank_pattern\" is set"},
    {"another model's adapter", ":", "--eval --val "
        "data/val.jsonl --adapter dev/golden/lora-mha", "has shape"},
    {"a look-ahead",        "mkdir $D/mine; echo '{\"peft_type\": \"LORA\", \"r\": 4, \"target_modules\": "
        "\"^(?!.*patch_embed).*$\"}' > $D/mine/adapter_config.json", "--eval --val data/val.jsonl --adapter $D/mine",
        "write a list of names"},
    {"an adapter of the embeddings", "mkdir $D/mine; echo '{\"peft_type\": \"LORA\", \"r\": 4, \"target_modules\": "
        "[\"embed_tokens\"]}' > $D/mine/adapter_config.json", "--eval --val data/val.jsonl --adapter $D/mine",
        "asks for model.embed_tokens, and only"},
    {"an adapter of the head", "mkdir $D/mine; echo '{\"peft_type\": \"LORA\", \"r\": 4, \"target_modules\": "
        "[\"q_proj\", \"lm_head\"]}' > $D/mine/adapter_config.json", "--eval --val data/val.jsonl --adapter $D/mine",
        "asks for lm_head, and only"},
    {"an adapter of everything", "mkdir $D/mine; echo '{\"peft_type\": \"LORA\", \"r\": 4, \"target_modules\": "
        "\".*\"}' > $D/mine/adapter_config.json", "--eval --val data/val.jsonl --adapter $D/mine", "asks for lm_head, and only"},
    {"an adapter of nothing", "mkdir $D/mine; echo '{\"peft_type\": \"LORA\", \"r\": 4, \"target_modules\": "
        "[\"c_attn\"]}' > $D/mine/adapter_config.json", "--eval --val data/val.jsonl --adapter $D/mine",
        "name no linear layer of this model"},
    {"an old Bone",         "mkdir $D/mine; echo '{\"peft_type\": \"BONE\", \"r\": 64, \"target_modules\": "
        "[\"q_proj\"], \"init_weights\": true}' > $D/mine/adapter_config.json",
        "--eval --val data/val.jsonl --adapter $D/mine", "convert-bone-to-miss.py"},
    {"an adapter of mlx-lm", "mkdir $D/mine; touch $D/mine/adapters.safetensors; echo '{\"fine_tune_type\": \"lora\", "
        "\"num_layers\": 16, \"lora_parameters\": {\"rank\": 8, \"scale\": 20.0, \"dropout\": 0.0}}' > "
        "$D/mine/adapter_config.json", "--eval --val data/val.jsonl --adapter $D/mine", "mlx_lm.fuse"},
    {"rows in an unknown file", "touch $D/mine.csv", "--data $D/mine.csv",
        "expected a .jsonl"},
    {"an array with a bad row", "echo '[{\"text\": \"a b\"}, 3]' > $D/rows.json",              "--data $D/rows.json",
        "rows.json, row 2: expected a JSON object"},
    {"resume at another rate", "$TRAIN --model $D/model --data $D/rows.jsonl --steps 2 --out $D/mine >/dev/null",
        "--resume $D/mine --lr 1", "--lr 0.004, this run has 1"},
    {"resume on another base", "$TRAIN --data $D/rows.jsonl --steps 1 --out $D/mine >/dev/null", "--resume $D/mine",
        "--model \"base\", this run has"},
    {"resume on another base of that name", "$TRAIN --model $D/model --data $D/rows.jsonl --steps 2 --out $D/mine "
        ">/dev/null; $TRAIN --merge $D/merged --model $D/model --adapter $D/mine >/dev/null; "
        "mv $D/merged/model.safetensors $D/model; rm -r $D/merged", "--resume $D/mine", "was trained with base \"hash "},
    {"resume for longer",   "$TRAIN --model $D/model --data $D/rows.jsonl --steps 1 --out $D/mine >/dev/null",
        "--resume $D/mine", "--steps 1, this run has 2; give the same, or start anew from it with --adapter"},
    {"resume for longer, constant", "$TRAIN --model $D/model --data $D/rows.jsonl --schedule constant --steps 1 --out "
        "$D/mine >/dev/null", "--schedule constant --resume $D/mine", "--steps 1, this run has 2"},
    {"resume after epochs", "$TRAIN --model $D/model --data $D/rows.jsonl --epochs 2 --batch 1 --accum 1 --out "
        "$D/mine >/dev/null", "--batch 1 --accum 1 --resume $D/mine", "--steps 6, this run has 2"},
    {"resume with another row", "$TRAIN --model $D/model --data $D/rows.jsonl --steps 2 --out $D/mine >/dev/null; sed "
        "-i '2s/Now/Then/' $D/rows.jsonl", "--resume $D/mine", "with rows \"3, hash"},
    {"resume with a row more", "$TRAIN --model $D/model --data $D/rows.jsonl --steps 2 --out $D/mine >/dev/null; sed "
        "-n 4p data/train.jsonl >> $D/rows.jsonl", "--resume $D/mine", "this run has \"4, hash"},
    {"resume with rows in another order", "$TRAIN --model $D/model --data $D/rows.jsonl --steps 2 --out $D/mine "
        ">/dev/null; sed -i '1{h;d};2G' $D/rows.jsonl", "--resume $D/mine", "with rows \"3, hash"},
    {"compare an adapter",  ":", "--compare --adapter "
        "dev/golden/lora-mha", "--compare starts from --model alone"},
    {"compare into a file", "touch $D/out.txt", "--compare --out "
        "$D/out.txt", "ot a directory"},
    {"resume from nothing", ":", "--resume $D/none",
        "there is no such directory"},
    {"a rate that explodes", ":", "--method full --lr "
        "1e9 --clip 0 --steps 20", "a smaller --lr may help"},
};

static void test_wrong_input(void)
{
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        if (not_asked_for(wrong[i].what)) continue;
        if (sizeof(real) == 8 && !strcmp(wrong[i].what, "a rate that explodes")) continue;      // not beyond a double
        char prepare[1200];
        snprintf(prepare, sizeof prepare, "rm -rf $D/model $D/out $D/mine; cp -r base $D/model && chmod -R u+w "
            "$D/model; head -3 data/train.jsonl > $D/rows.jsonl; { %s; }", wrong[i].prepare);
        if (system(prepare)) die("could not prepare: %s", wrong[i].what);
        char usual[200] = "";
        for (const char **o = (const char *[]){"--model $D/model ", "--data $D/rows.jsonl ", "--out $D/out ",
            "--steps 2 ", NULL}; *o; o++) {
            size_t name = strcspn(*o, " ") + 1;
            // an option given twice would be noted
            if (!memmem(wrong[i].args, strlen(wrong[i].args), *o, name)) strcat(usual, *o);
        }
        int status = train_run("%s%s", usual, wrong[i].args);
        char *text = output_of("stderr"), *line = strstr(text, "error:"), command[200];
        int lines = 0;
        for (const char *c = text; *c; c++) lines += *c == '\n';
        for (const char *c = text; *c; c++) check(*c == 27, 0, "%s: a raw escape", wrong[i].what);
        expect(status == 1, "%s: status %d", wrong[i].what, status);
        expect(lines == 1 && line == text && strstr(text, wrong[i].says), "%s: expected one line with «%s», got «%s»",
            wrong[i].what, wrong[i].says, text);
        snprintf(command, sizeof command, "! ls -d %s/out %s/*.tmp* 2>/dev/null | grep -q .", scratch, scratch);
        shell(command, "%s: something half-written is left", wrong[i].what);
        free(text);
    }
}

static int descriptors_now(void)
{
    int n = 0;
    DIR *d = opendir("/proc/self/fd");
    while (d && readdir(d)) n++;
    if (d) closedir(d);
    return n;
}

// Every reader, often: the C library keeps small freed blocks, and it takes some fifty rounds until it keeps no more.
static void test_descriptors(void)
{
    int before = 0;
    size_t held = 0;
    for (int again = 0; again < 128; again++) {
        size_t bytes;
        if (again == 112) before = descriptors_now();
        if (again == 112) held = mallinfo2().uordblks;
        config c = config_read("base/config.json");
        tokenizer *t = open_tokenizer("base", c.vocab);
        dataset d = read_rows(t, "data/val.jsonl", 128);
        checkpoint base = checkpoint_open("base", "model");
        free(read_file("base/config.json", &bytes));
        usable_cpus("");
        mat W = formula_matrix(60, 50);
        svd_free(svd_top(W, 4, (rng){7}));
        dev_free(W.p);
        checkpoint_close(&base);
        free_rows(&d);
        tokenizer_free(t);
        free(c.text);
    }
    expect(mallinfo2().uordblks <= held, "%zu bytes are held, %zu before", mallinfo2().uordblks, held);
    expect(descriptors_now() == before, "%d are open, %d before", descriptors_now(), before);
}

// The bytes of a file of weights that are behind its header, whose size its first eight bytes say.
static void test_base_size(void)
{
    size_t bytes;
    uint64_t header;
    char *file = read_file("base/model.safetensors", &bytes), *want;
    memcpy(&header, file, sizeof header);
    want = text_of("base       %.1f MB, mapped from its file", (double)(bytes - 8 - header) / 1e6);
    train_well(FEW_ROWS " --steps 1 --out $D/sized");
    char *text = output_of("stdout");
    expect(strstr(text, want) != NULL, "«%s» is not in «%s»", want, text);
    free(file), free(want), free(text);
}

// A disk that fills up while the result is written, by a limit on the size of files. The older result stays.
static void test_full_disk(void)
{
    train_well(FEW_ROWS " --steps 1 --out $D/old");
    char command[1000];
    snprintf(command, sizeof command, "cp %s/old/adapter_model.safetensors %s/before; (trap '' XFSZ; ulimit -f 20; "
        "$TRAIN " FEW_ROWS " --steps 1 --lr 0.5 --out %s/old >%s/stdout 2>%s/stderr)", scratch, scratch, scratch, scratch,
        scratch);
    expect(WEXITSTATUS(system(command)) == 1, "exit status");
    char *text = output_of("stderr");
    expect(has(text, "error: cannot write"), "says «%s»", text);
    expect(same_files("old/adapter_model.safetensors", "before"), "the older adapter");
    snprintf(command, sizeof command, "! ls -d %s/*.tmp* 2>/dev/null | grep -q .", scratch);
    shell(command, "something half-written is left");
    free(text);
}

// A link to a directory stays a link, a slash at the end does not matter, and an output that nobody could read is an error.
static void test_out(void)
{
    shell("rm -rf $D/alias && mkdir $D/there && ln -s there $D/alias", "cannot make a link");
    for (int again = 0; again < 2; again++) {
        train_well(FEW_ROWS " --steps 1 --out $D/alias");
        train_well(FEW_ROWS " --steps 1 --out $D/slash/");
        expect(same_files("there/adapter_model.safetensors", "slash/adapter_model.safetensors"), "adapter of run %d", again);
    }
    expect(WEXITSTATUS(system("$TRAIN --list 2>$D/stderr >/dev/full")) == 1, "exit status with a full standard output");
}

// What --merge and full write has every file of the model directory that is not a weight, byte for byte; weights in
// other formats, and what a run or an adapter left there, stay behind.
static void test_kept_files(void)
{
    static const char *const kept[] = {"tokenizer.model", "chat_template.jinja", "added_tokens.json",
        "special_tokens_map.json", "generation_config.json", "LICENSE", "USE_POLICY.md",
        ".gitattributes", "a name with spaces", "vocab.txt", "training_args.bin", "a-link.json", "large.txt", NULL};
    static const char *const left[] = {"pytorch_model.bin", "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json", "other.safetensors", "other.safetensors.index.json", "q4.gguf",
        "consolidated.00.pth", "tf_model.h5", "flax_model.msgpack", "state.json", "adapter_config.json",
            "adapter_model.bin", NULL};
    char command[1000];
    shell("rm -rf $D/model; cp -r base $D/model && chmod -R u+w $D/model && mkdir -p $D/model/.git/objects && touch "
        "$D/model/.git/HEAD && head -c 3000001 /dev/urandom > $D/model/large.txt"
        " && echo linked > $D/linked && ln -s ../linked $D/model/a-link.json && ln -s nowhere $D/model/dangling && "
            "mkfifo $D/model/pipe", "cannot prepare");
    for (const char *const *lists[] = {kept, left, NULL}, *const **list = lists; *list; list++)
        for (const char *const *name = *list; *name; name++) {
            snprintf(command, sizeof command, "cd %s/model; [ -e '%s' ] || echo '{}' > '%s'", scratch, *name, *name);
            shell(command, "cannot make %s", *name);
        }
    train_well(FEW_ROWS " --model %s/model --steps 1 --out $D/kept-adapter", scratch);
    train_well("--merge $D/merged --model $D/model --adapter $D/kept-adapter");
    for (int again = 0; again < 2; again++)          // the second time over the first one's files
        train_well(FEW_ROWS " --model $D/model --steps 1 --method full --out $D/full");
    for (const char *const *dir = (const char *const[]){"merged", "full", NULL}; *dir; dir++) {
        for (const char *const *name = kept; *name; name++) {
            snprintf(command, sizeof command, "cmp -s \"%s/model/%s\" \"%s/%s/%s\"", scratch, *name, scratch, *dir, *name);
            shell(command, "%s has %s", *dir, *name);
        }
        for (const char *const *name = left; *name; name++) {
            snprintf(command, sizeof command, "cd %s/%s; [ ! -e '%s' ] || [ '%s' = state.json -a %s = full ]", scratch,
                *dir, *name, *name, *dir);
            shell(command, "%s has no %s", *dir, *name);
        }
        snprintf(command, sizeof command, "cd %s/%s && [ ! -e .git ] && [ ! -e pipe ] && [ ! -e dangling ]", scratch, *dir);
        shell(command, "%s has what is no file", *dir);
    }
    shell("rm -rf $D/model $D/merged $D/full $D/kept-adapter", "cannot tidy up");
}

// --out replaces what a run wrote, by the run's own list, and nothing else.
static void test_only_ours(void)
{
    static const char *const run_again = FEW_ROWS " --steps 1 --lr 0.5 --out $D/ours";
    char command[1000];
    train_well(FEW_ROWS " --steps 1 --out $D/ours");
    static const struct { const char *what, *prepare; int refused; } cases[] = {
        {"as it was left", ":", 0},
        {"with no list, as older runs left it", "sed -i 's/\"files\"/\"others\"/' $D/ours/state.json; touch "
            "$D/ours/tokenizer_config.json", 0},
        {"with a file more", "touch $D/ours/LICENSE", 1},
        {"with a file more that the list has", "touch $D/ours/LICENSE; sed -i 's/\"files\":[^[]*\\[/&\"LICENSE\",/' "
            "$D/ours/state.json", 0},
        {"with a directory", "mkdir $D/ours/figures", 1},
        {"with somebody else's state.json", "rm -rf $D/ours; mkdir $D/ours; echo '{\"volume\": 11}' > $D/ours/state.json", 1},
        {"with a state.json that is no JSON", "rm -rf $D/ours; mkdir $D/ours; echo '{\"--method\": ' > $D/ours/state.json", 1},
        {"with a list that leads out of it", "echo mine > $D/victim; sed -i "
            "'s/\"files\":[^[]*\\[/&\"..\\/victim\",\"..\",\".\",7,/' $D/ours/state.json", 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (not_asked_for(cases[i].what)) continue;
        snprintf(command, sizeof command, "rm -rf $D/ours; $TRAIN %s >/dev/null && { %s; }", run_again, cases[i].prepare);
        shell(command, "cannot prepare: %s", cases[i].what);
        int status = train_run("%s", run_again);
        char *text = output_of("stderr");
        expect(status == cases[i].refused && !strstr(text, "which would be lost") == !cases[i].refused,
            "%s: status %d, says «%s»", cases[i].what, status, text);
        snprintf(command, sizeof command, "! ls -d %s/ours.tmp* 2>/dev/null | grep -q .", scratch);
        shell(command, "%s: something is left beside it", cases[i].what);
        free(text);
    }
    shell("grep -q mine $D/victim", "a file outside is gone");
    snprintf(command, sizeof command, "rm -rf $D/ours $D/log; $TRAIN %s >/dev/null && { $TRAIN " FEW_ROWS " --steps "
        "12 --log $D/log --out $D/ours >$D/stdout 2>$D/stderr & p=$!;"
        " while ! grep -q '\"step\":2,\"loss' $D/log 2>/dev/null; do sleep 0.01; done; echo mine > $D/ours/notes.txt; "
            "wait $p && grep -q mine $D/ours.kept-*/notes.txt && rm -r $D/ours.kept-*; }", run_again);
    shell(command, "a file put there while the run went on");
    char *text = output_of("stderr");
    expect(strstr(text, "note: ") && strstr(text, "files that no run wrote were in"), "says «%s»", text);
    free(text);
}

// Every command with glibc's malloc that knows where each block ends: a write behind one ends the program when it is freed.
// The words grow, so that a list with room for the longest so far is too short for the next.
static void test_block_ends(void)
{
    static const char knows[] = "LD_PRELOAD=libc_malloc_debug.so.0 MALLOC_CHECK_=3";
#ifdef __SANITIZE_ADDRESS__
    snprintf(skipped, sizeof skipped, "AddressSanitizer looks itself");
    return;
#endif
    if (system("LD_PRELOAD=libc_malloc_debug.so.0 true 2>&1 | grep -q preload") == 0) {
        snprintf(skipped, sizeof skipped, "libc_malloc_debug.so.0 is not here");
        return;
    }
    char *train = copy_text(getenv("TRAIN")), *checked = text_of("env %s %s", knows, train);
    shell("head -n 2 data/val.jsonl > $D/two.jsonl; w=; for i in $(seq 60); do w=${w}e; echo \"$w\"; done | paste -sd ' ' | "
        "sed 's/.*/{\"text\": \"&\"}/' > $D/growing.jsonl", "cannot prepare");
    setenv("TRAIN", checked, 1);
    train_well("--tokenize $D/growing.jsonl");
    for (int i = 0; i < METHODS; i++) {
        if (left_out(i)) continue;
        train_well("--method %s --data $D/two.jsonl --val $D/two.jsonl --steps 1 --batch 2 --max-new 2 --rank 4 "
            "--out $D/ends", methods[i].name);
    }
    train_well("--merge $D/ends-merged --adapter $D/ends");
    setenv("TRAIN", train, 1);
    free(train), free(checked);
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
            for (int i = 0; i < files; i++)
                stage_file((const char *[]){"USE_POLICY.md", ".hidden", "a name with spaces"}[i], "text", 4);
            on_signal(SIGTERM);
        }
        int status;
        expect(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status)
            && WEXITSTATUS(status) == 128 + SIGTERM, "status with %d files", files);
        snprintf(command, sizeof command, "! ls -d %s.tmp* 2>/dev/null | grep -q .", dir);
        shell(command, "%d files are left", files);
    }
    free(dir);
}

// What appears at the place of a result while a run goes on is never removed, nor is the result: it lies beside.
static void test_appears(void)
{
    static const char *const slow = "$TRAIN " FEW_ROWS " --steps 12 --log $D/log --out $D/new >$D/stdout 2>$D/stderr";
    static const char *const appears[][2] = {
        {"files",         "mkdir $D/new && echo mine > $D/new/notes.txt"},
        {"an adapter",    "cp -r $D/other $D/new"},
        {"a file",        "echo mine > $D/new"},
        {"nothing in it", "mkdir $D/new"},
    };
    char script[3000];
    train_well(FEW_ROWS " --steps 1 --out $D/other");
    for (size_t i = 0; i < sizeof appears / sizeof *appears; i++) {
        snprintf(script, sizeof script, "rm -rf $D/new* $D/log; { %s & } ; p=$!; "
            "while ! grep -q '\"step\":2,\"loss' $D/log 2>/dev/null; do sleep 0.01; done; %s; cp -r $D/new $D/was; wait $p; "
            "[ $? = 1 ] && grep -q 'something else has appeared there' $D/stderr && diff -r $D/was $D/new && "
            "[ -s $D/new.new-*/adapter_model.safetensors ]; s=$?; rm -rf $D/was; exit $s", slow, appears[i][1]);
        shell(script, "%s", appears[i][0]);
    }
    // The same at the place of an older result, which is taken away meanwhile.
    snprintf(script, sizeof script, "rm -rf $D/new* $D/log; cp -r $D/other $D/new; { %s & } ; p=$!; "
        "while ! grep -q '\"step\":2,\"loss' $D/log 2>/dev/null; do sleep 0.01; done; mv $D/new $D/away; "
        "cp -r $D/other $D/new; echo mine > $D/new/notes.txt; wait $p; [ $? = 1 ] && [ -s $D/new/notes.txt ] && "
        "cmp $D/other/adapter_model.safetensors $D/new/adapter_model.safetensors && "
        "[ -s $D/new.new-*/adapter_model.safetensors ]; s=$?; rm -rf $D/away $D/new* $D/other; exit $s", slow);
    shell(script, "another result");
}

// Directories in the making that killed runs left are removed by the next run, and said; those of living ones are not.
static void test_leftovers(void)
{
    static const char name[] = "out.tmp-0123456789abcdef";
    char *kept = in_scratch(name), script[1000];
    snprintf(script, sizeof script, "rm -rf $D/out*; mkdir $D/%s && echo cut > $D/%s/model.safetensors; "
        "mkdir -p $D/out.tmp-0123456789abcde0/sub $D/out.tmp-mine; "
        "$TRAIN " FEW_ROWS " --steps 1 --out $D/out >$D/stdout 2>$D/stderr && grep -q 'note: removed .*%s' $D/stderr && "
        "[ ! -e $D/%s ] && [ -d $D/out.tmp-0123456789abcde0/sub ] && [ -d $D/out.tmp-mine ]", name, name, name, name);
    shell(script, "a stale one");
    int lock = -1;
    if (mkdir(kept, 0777) || !lock_directory(kept, &lock)) die("cannot lock %s", kept);
    snprintf(script, sizeof script, "$TRAIN " FEW_ROWS " --steps 1 --out $D/out >/dev/null 2>$D/stderr && [ -d $D/%s ] && "
        "rm -r $D/out*", name);
    shell(script, "one that lives");
    close(lock);
    free(kept);
}

// A field of config.json that nothing here knows is named; those that change no number are not.
static void test_unknown_fields(void)
{
    shell("rm -rf $D/model; cp -r base $D/model; chmod -R u+w $D/model; "
        "sed -i 's/^{/{\"sliding_window\": 5, \"pretraining_tp\": 2, \"id2label\": {}, \"a\\\\u001bb\": 1,/' "
        "$D/model/config.json; $TRAIN --list --model $D/model >/dev/null 2>$D/stderr && [ $(wc -l <$D/stderr) = 2 ] && "
        "grep -q '\"sliding_window\"; it is not used' $D/stderr && grep -qF 'a\\x1bb' $D/stderr; "
        "s=$?; rm -rf $D/model; exit $s", "fields");
}

// A spread of failing allocations, file calls and kills over every command. dev/faults.sh, run by hand, tries every one.
static void test_faults(void)
{
    shell("! ldd $TRAIN | grep -q libasan || exit 0; "             // which wants to be loaded first
        "export FAULTS_DIR=$(mktemp -d -p /dev/shm 2>/dev/null || echo $D/faults); "        // syncing a disk takes its time
        "dev/faults.sh --sample 60 >$D/stdout 2>$D/stderr; s=$?; grep ✗ $D/stdout >&2; rm -rf $FAULTS_DIR; exit $s",
        "faults");
}

// Descriptors that are closed at the start, a reader that goes away, a signal that is ignored, a log whose disk is full.
static void test_process(void)
{
    shell("exec 3>&1; $TRAIN " FEW_ROWS " --steps 1 --log $D/log --out $D/closed "
        "<&- >&- 2>&- ; [ $? = 0 ] && ! grep -v '^{\"step\"' $D/log",
        "closed descriptors");
    shell("rm -rf $D/closed; ($TRAIN " FEW_ROWS " --steps 40 --out $D/closed; echo $? > $D/status) "
        "2>$D/stderr | sed '/^step /q' >/dev/null; [ $(cat $D/status) = 141 ] && [ -s $D/closed/adapter_model.safetensors ]",
        "a reader that goes away");
    shell("rm -rf $D/closed $D/log; { (trap '' HUP; exec $TRAIN " FEW_ROWS " --steps 12 --log $D/log "
        "--out $D/closed >/dev/null) & } ; p=$!; while ! grep -q '\"step\":2,\"loss' $D/log 2>/dev/null; do sleep 0.01; done; "
        "kill -HUP $p; wait $p && grep -q '\"step\":12,\"loss' $D/log",
        "nohup");
    shell("rm -rf $D/closed; $TRAIN " FEW_ROWS " --steps 2 --log /dev/full --out $D/closed "
        ">$D/stdout 2>$D/stderr; [ $? = 1 ] && grep -q 'No space left' $D/stderr && grep -q 'all else is saved' $D/stderr && "
        "[ -s $D/closed/adapter_model.safetensors ] && rm -r $D/closed",
        "a full log");
}

// ---- several ranks ---------------------------------------------------------------------------------------------------

// Whether there are mpirun and ./train_mpi (or $TRAIN_MPI). Their tests end in any case: who waits for ever is killed.
static int several_ranks(void)
{
    char *program = realpath("train_mpi", NULL);
    setenv("TRAIN_MPI", program ? program : "none", 0);
    free(program);
    setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 1);
    setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 1);
    setenv("MPIRUN", "timeout -k 5 90 mpirun --oversubscribe --bind-to none", 1);
    int there = !system("command -v mpirun >/dev/null && set -- $TRAIN_MPI && [ -x $1 ]");
    if (!there) snprintf(skipped, sizeof skipped, "mpirun or train_mpi is not here");
    return there;
}

// Trains with so many ranks into $D/NAME and $D/NAME.log.
__attribute__((format(printf, 3, 4)))
static void train_ranks(int ranks_used, const char *name, const char *format, ...)
{
    TEXT(args, format);
    char command[5000];
    snprintf(command, sizeof command, "rm -rf $D/%s; env -u OMP_NUM_THREADS $MPIRUN -q -n %d $TRAIN_MPI %s "
        "--log $D/%s.log --out $D/%s >$D/stdout 2>$D/stderr </dev/null", name, ranks_used, args, name, name);
    int status = WEXITSTATUS(system(command));
    char *said = output_of("stderr");
    expect(!status && !*said, "%d ranks, %s: status %d, says «%s»", ranks_used, args, status, said);
    free(said);
}

// Rows for few steps: an epoch's last step has 3 rows of 8, so that the last of four ranks has nothing to do in it.
#define RANK_ROWS "--data $D/eleven.jsonl --val $D/few.jsonl --batch 2 --seq 128 --max-new 4 --rank 8 --steps 3 --eval-every 2"

// The sum of the gradients is one tree, whoever adds up which part of it; so is that of the losses.
static void test_mpi(void)
{
    static const struct { const char *method, *accum; int most; } extra[] = {
        {"bone", "2", 2}, {"bone", "6", 2}, {"bone", "8", 4}, {"full", "12", 4}, {"bat", "4 --recompute 2", 2},
    };
    enum { EXTRA = sizeof extra / sizeof *extra };
    char what[100], args[400], file[64];
    if (!several_ranks()) return;
    shell("head -11 data/train.jsonl >$D/eleven.jsonl", "cannot prepare");
    for (int i = 0; i < METHODS + EXTRA; i++) {
        const char *M = i < METHODS ? methods[i].name : extra[i - METHODS].method;
        const char *accum = i < METHODS ? "4" : extra[i - METHODS].accum;
        int most = i < METHODS ? 4 : extra[i - METHODS].most;
        if (kept_out(M, 1)) continue;
        snprintf(args, sizeof args, RANK_ROWS " --method %s --accum %s", M, accum);
        train_well("%s --log $D/whole.log --out $D/whole", args);
        for (int n = i < METHODS ? 4 : 2; n <= most; n *= 2) {
            train_ranks(n, "part", "%s", args);
            snprintf(what, sizeof what, "threads here %d", usable_cpus("") < n ? 1 : usable_cpus("") / n);
            char *text = output_of("stdout");
            expect(has(text, what), "%d ranks: expected «%s», got «%s»", n, what, text);
            free(text);
            snprintf(what, sizeof what, "--accum %s, %d ranks", accum, n);
            snprintf(file, sizeof file, "%smodel.safetensors", strcmp(M, "full") ? "adapter_" : "");
            compare_runs(M, file, what);
        }
    }
}

// A run goes on with any number of ranks, whichever it had before; --eval gives their line for 3, too.
static void test_mpi_resume(void)
{
    static const char *const args = FEW_ROWS " --batch 2 --accum 4 --steps 6 --keep-best --eval-every 2";
    static const int before[] = {1, 2, 4}, behind[] = {4, 1, 2};
    char more[300];
    if (!several_ranks()) return;
    train_well("%s --save-every 3 --log $D/whole.log --out $D/whole", args);
    for (int i = 0; i < 3; i++) {
        snprintf(more, sizeof more, "$MPIRUN -n %d sh -c 'echo $$ >$D/pid$OMPI_COMM_WORLD_RANK; exec $TRAIN_MPI %s --log "
            "$D/part.log --out $D/part' ", before[i], args);
        setenv("BEGIN", more, 1);
        shell("rm -rf $D/part* $D/pid*; eval \"$BEGIN\" >$D/stdout 2>$D/stderr & p=$!; while kill -0 $p && "
            "! grep -q '\"step\":2,\"loss' $D/part.log 2>/dev/null; do sleep 0.01; done; "
            "kill -TERM $(cat $D/pid$(($(ls $D/pid* | wc -l) - 1))); wait $p; [ $? = 143 ] && [ -s $D/part/state.json ]",
            "%d ranks, of which one is stopped", before[i]);
        compare_beginnings("bone", "several ranks");
        snprintf(more, sizeof more, "$MPIRUN -q -n %d $TRAIN_MPI %s --resume $D/part --log $D/part.log --out $D/part "
            ">$D/stdout 2>$D/stderr", behind[i], args);
        shell(more, "resumed");
        snprintf(more, sizeof more, "%d ranks, then %d", before[i], behind[i]);
        compare_runs("bone", "adapter_model.safetensors", more);
    }
    shell("$TRAIN --eval --exact-match --max-new 3 --val $D/few.jsonl | tail -n 2 >$D/stdout; "
        "$MPIRUN -q -n 3 $TRAIN_MPI --eval --exact-match --max-new 3 --val $D/few.jsonl | tr -d '\\r' | tail -n 2 | "
        "cmp - $D/stdout", "--eval");
}

// What goes wrong on one rank, or on all, ends all of them, with one line. `harm` is what a shell does before it becomes
// rank `harmed`, `meanwhile` what happens once a second step is logged; $D/one and $D/other have a base and rows each.
#define MANY_STEPS "--accum 4 --batch 2 --data many.jsonl --steps 500"
static const struct harm { const char *what; int ranks, harmed; const char *harm, *meanwhile, *args, *says; } harms[] = {
    {"a bad option",          4, 0, ":", ":", "--accum 4 --lr x", "--lr x: expected a number"},
    {"another option",        4, 2, "set -- --lr 0.1", ":", "--accum 4", "rank 2 has --lr 0.1, rank 0 has its default"},
    {"a command",             2, 1, "set -- --eval", ":", "--accum 4", "rank 1 has --eval given, rank 0 has its default"},
    {"other rows",            2, 1, "cd $D/other", ":", "--accum 4 --data rows.jsonl", "rank 1 has --data 12, hash"},
    {"another base",          2, 1, "cd $D/other", ":", "--accum 4 --data same.jsonl", "rank 1 has a base with hash"},
    {"rows that are none",    2, 0, ":", ":", "--accum 4 --data none.jsonl", "none.jsonl:1:"},
    {"too few micro-batches", 4, 0, ":", ":", "--accum 6", "--accum 6: 4 ranks"},
    {"no partner",            3, 0, ":", ":", "--accum 6", "3 ranks: they add"},
    {"a comparison",          2, 0, ":", ":", "--compare", "--compare is the work of one process"},
    {"an answer by chance",   2, 0, ":", ":", "--accum 4 --temperature 1", "--temperature draws"},
    {"no memory on one",      2, 1, "ulimit -v 1000000", ":", "--accum 4 --data many.jsonl --batch 200", "out of memory: "},
    {"a base cut short",      2, 0, ":", "truncate -s 100000 $D/one/base/model.safetensors", MANY_STEPS, "was cut short"},
    {"nowhere to write",      2, 0, ":", "rm -r $D/place", MANY_STEPS " --save-every 5", "cannot write"},
    {"rank 1 killed",         2, 0, ":", "kill -9 $(cat $D/pid1)", MANY_STEPS, "noticed that process rank 1"},
    {"rank 0 killed",         4, 0, ":", "kill -9 $(cat $D/pid0)", MANY_STEPS, "noticed that process rank 0"},
};

static void prepare_harm(void)
{
    shell("rm -rf $D/one $D/other $D/place $D/pid* $D/harm.log; mkdir $D/one $D/other $D/place; for at in one other; do "
        "cp -r base $D/$at/base && chmod -R u+w $D/$at/base && cp $D/few.jsonl $D/$at/val.jsonl; done; "
        "head -11 data/train.jsonl >$D/one/rows.jsonl; head -12 data/train.jsonl >$D/other/rows.jsonl; "
        "cp $D/one/rows.jsonl $D/other/same.jsonl; cp $D/one/rows.jsonl $D/one/same.jsonl; "
        "cp data/train.jsonl $D/one/many.jsonl; echo none >$D/one/none.jsonl; "
        "printf '\\1' | dd of=$D/other/base/model.safetensors bs=1 seek=1000000 conv=notrunc 2>/dev/null", "cannot prepare");
}

static void test_mpi_failures(void)
{
    char command[4000];
    if (!several_ranks()) return;
    for (const struct harm *h = harms; h < harms + sizeof harms / sizeof *harms; h++) {
        int killed = has(h->meanwhile, "kill -9");          // then mpirun says so
        if (not_asked_for(h->what)) continue;
        prepare_harm();
        snprintf(command, sizeof command, "cd $D/one\n"
            "(while ! grep -q '\"step\":2,\"loss' $D/harm.log 2>/dev/null; do sleep 0.05; done; %s) & watcher=$!\n"
            "$MPIRUN %s -n %d sh -c 'echo $$ >$D/pid$OMPI_COMM_WORLD_RANK; [ $OMPI_COMM_WORLD_RANK != %d ] || %s; "
            "exec $TRAIN_MPI %s --val val.jsonl --max-new 4 --out $D/place/out --log $D/harm.log \"$@\"' sh "
            ">$D/stdout 2>$D/stderr\ns=$?; kill $watcher 2>/dev/null; exit $s",
            h->meanwhile, killed ? "" : "-q", h->ranks, h->harmed, h->harm, h->args);
        double start = seconds();
        int status = WEXITSTATUS(system(command));
        double took = seconds() - start;
        char *text = output_of("stderr"), *end = strchr(text, '\n');
        expect(status == (killed ? 137 : 1) && took < 60, "%s: status %d after %.0f s", h->what, status, took);
        expect(has(text, h->says), "%s: expected «%s», got «%s»", h->what, h->says, text);
        expect(killed || (!strncmp(text, "error: ", 7) && end && !end[1]), "%s: expected one line, got «%s»", h->what, text);
        shell("! ls $D/place 2>/dev/null | grep -q .", "%s: something is left", h->what);
        free(text);
    }
    shell("$MPIRUN -q -n 2 $TRAIN_MPI --chat 2>&1 | grep -q 'chat is the work of one process'", "a chat");
}

// ---- merging in 16 bits --------------------------------------------------------------------------------------------

// The small model in a dtype of two bytes, its q_proj of layer 0 all zeros but one number; where `instead` is given,
// those two bytes stand in that number's place.
static char *odd_model(enum dtype type, float odd, uint16_t instead)
{
    char *base = small_model(0), *dir = in_scratch("odd"), *path = join(dir, "model.safetensors"),
        *config_path = join(base, "config.json");
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
    stage_begin(dir), stage_model(&m, base, type), stage_publish(&(place_of_result){.path = dir});
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
    stage_begin(dir), peft_write(&m, base), stage_publish(&(place_of_result){.path = dir});
    model_free(&m), free(x), free(config_path), free(dir);
}

// What cannot be written as a number is refused, with the tensor's name; what an update loses is a percentage, or there is none.
static void test_odd_merges(void)
{
    static const struct {
        const char *what;
        enum dtype type;
        float odd;
        uint16_t instead;
        double more;
        int status;
        const char *says, *prints;
    } cases[] = {
        {"a sum beyond float16",   F16,  65000, 0,      900,   1, "layers.0.self_attn.q_proj.weight has a 65892 with "
            "the adapter merged in, which is Inf in F16", ""},
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
        if (not_asked_for(cases[i].what)) continue;
        char *base = odd_model(cases[i].type, cases[i].odd, 0);
        add_to_odd(base, cases[i].more);
        if (cases[i].instead) free(odd_model(cases[i].type, cases[i].odd, cases[i].instead));
        shell("rm -rf $D/odd-merged", "cannot prepare");
        int status = train_run("--merge $D/odd-merged --model %s --adapter $D/odd-adapter", base);
        char *error = output_of("stderr"), *text = output_of("stdout");
        expect(status == cases[i].status && strstr(error, cases[i].says) && strstr(text, cases[i].prints)
            && !strstr(text, "inf") && !strstr(text, "nan"), "%s: status %d, says «%s%s»", cases[i].what, status, error, text);
        check(system("! ls -d $D/odd-merged* 2>/dev/null | grep -q .") ? !status ? 0 : 1 : status ? 0 : 1, 0,
            "%s: a directory of it", cases[i].what);
        free(base), free(error), free(text);
    }
}

// ---- real models --------------------------------------------------------------------------------------------------

static const char *const lily = "Once upon a time, there was a little girl named Lily. She loved to play outside in "
    "the park. One day, she saw a big, red ball. She wanted to play with it, but it was too high.";

static void test_stories(void)
{
    if (!need("stories260K/model.safetensors")) return;
    train_well("--model %s/stories260K --generate 'Once upon a time' --max-new 256", real_input);
    char *got = output_of("stdout");
    size_t bytes;
    char *want = read_file("dev/golden/stories260K.txt", &bytes);        // 256 greedy tokens by transformers
    expect(!(strncmp(got, lily, strlen(lily))), "the published text");
    expect(!strcmp(got, want), "256 tokens");
    free(got), free(want);
}

// An answer whose first character could hide in the prompt's last piece, ":-", is learnt and given.
static void test_minus_five(void)
{
    static const char *const config_text = "{\"model_type\": \"llama\", \"hidden_size\": 32, \"intermediate_size\": "
        "32, \"num_hidden_layers\": 1,"
        " \"num_attention_heads\": 2, \"vocab_size\": 32000}";
    if (!need("llama2-tokenizer/tokenizer.model")) return;
    char *path = in_scratch("minus.json"), *rows = in_scratch("minus.jsonl");
    write_text(path, config_text);
    write_text(rows, "{\"question\": \"What is 3 minus 8?\", \"answer\": \"-5\"}\n{\"question\": \"What is 8 minus "
        "3?\", \"answer\": \"5\"}\n");
    train_well("--init %s --model %s/llama2-tokenizer --method full --data %s --steps 60 --lr 1e-2 --out $D/minus", path,
        real_input, rows);
    train_well("--eval --exact-match --model $D/minus --val %s --max-new 8", rows);
    char *text = output_of("stdout");
    expect(has(text, "exact match 2 of 2"), "says «%s»", text);
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
    train_well("--batch 64 --steps 2 --val $D/few.jsonl --max-new 4 --log $D/one.log --out $D/one");
    train_well("--batch 16 --accum 4 --steps 2 --val $D/few.jsonl --max-new 4 --log $D/four.log --out $D/four");
    for (int step = 1; step <= 2; step++)
        for (const char **field = (const char *[]){"\"loss\":", "\"grad_norm\":", NULL}; *field; field++)
            check(fabs(logged("one.log", step, *field) / logged("four.log", step, *field) - 1), 1e-5, "step %d, %s", step,
                *field);
}

// Twelve steps on rows in the order of the file. Returns the loss of the last one, and the norm of the first gradient.
static double learn_gsm8k(const char *method_name, double lr, double *norm)
{
    train_well("--model %s/stories260K --data %s/gsm8k/train.jsonl --seq 256 --method %s --rank 4 --mini-r 4 --steps "
        "12 --batch 8 "
        "--lr %g --no-shuffle --log $D/log --out $D/gsm-%s", real_input, real_input, method_name, lr, method_name);
    *norm = logged("log", 1, "\"grad_norm\":");
    return logged("log", 12, "\"loss\":");
}

// Every method has learnt from eleven steps: on the rows of the twelfth its loss is below that of the model as it was, which
// a run with hardly any learning rate shows. Bone starts with a larger gradient than LoRA and falls faster.
static void test_gsm8k(void)
{
    if (!need("gsm8k/train.jsonl")) return;
    double norm[METHODS] = {0}, last[METHODS], unused, base = learn_gsm8k("lora", 1e-9, &unused);
    int bone = (int)(method_named("bone") - methods), lora = (int)(method_named("lora") - methods);
    for (int i = 0; i < METHODS; i++) {
        if (left_out(i)) continue;
        last[i] = learn_gsm8k(methods[i].name, 2e-3, &norm[i]);
        check(last[i] / base, 0.999, "%s, loss of the last step over that of the base on the same rows", methods[i].name);
    }
    if (words) return;                  // it takes both
    check(norm[lora] / norm[bone], 1, "first gradient norm of LoRA over Bone's");
    expect(last[lora] >= last[bone], "loss after 12 steps: LoRA %.4f, Bone %.4f", last[lora], last[bone]);
}

static void test_llama2_counts(void)    // section 4 of the paper, on the shape of Llama2-7B
{
    static const struct { const char *method; int rank; double millions; } paper[] = {
        {"lora", 36, 89.95}, {"bone", 16, 21.7}, {"bone", 32, 43.5}, {"bone", 64, 87.0}, {"bone", 128, 174.0},
            {"bat", 64, 87.0}, {"bat-row", 64, 72.9},
    };
    char *dir = in_scratch("llama2"), *path = join(dir, "config.json"), want[64], line[64];
    mkdir(dir, 0777);
    write_text(path, "{\"model_type\": \"llama\", \"hidden_size\": 4096, \"intermediate_size\": 11008, "
        "\"num_hidden_layers\": 32, \"num_attention_heads\": 32, \"vocab_size\": 32000}");
    for (size_t i = 0; i < sizeof paper / sizeof *paper; i++) {
        if (not_asked_for(paper[i].method)) continue;
        train_well("--list --model %s --rank %d", dir, paper[i].rank);
        char *text = output_of("stdout");
        snprintf(line, sizeof line, "\n%-9s", paper[i].method);
        char *at = strstr(text, line), *count = at ? strstr(at, "trains") : NULL;
        double got = NAN;
        for (char *c = at ? at + 1 : text; at && *c && *c != '\n'; c++)  // the number with an M behind it
            if (*c == 'M' && c[-1] >= '0' && c[-1] <= '9') {
                char *d = c;
                while (d[-1] == '.' || (d[-1] >= '0' && d[-1] <= '9')) d--;
                got = strtod(d, NULL);
            }
        snprintf(want, sizeof want, "%s r%d", paper[i].method, paper[i].rank);
        check(fabs(got - paper[i].millions) / paper[i].millions, 0.003, "%s: %.2fM, the paper has %.2fM", want, got,
            paper[i].millions);
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
        if (not_asked_for(spellings[i].theirs)) continue;
        train_well("%s", spellings[i].ours);
        char *want = output_of("stdout");
        train_well("%s", spellings[i].theirs);
        char *got = output_of("stdout");
        expect(*want && !strcmp(got, want), "%s prints «%s»", spellings[i].theirs, got);
        free(got), free(want);
    }
    train_well("--generate Once --max-new 9 --max-new=5");
    char *text = output_of("stderr");
    expect(!strcmp(text, "note: --max-new is given twice; 5 counts, not 9\n"), "says «%s»", text);
    free(text);
    train_well("--version");
    text = output_of("stdout");
    expect(!strcmp(text, "train " VERSION "\n"), "prints «%s»", text);
    free(text);

    expect(!system("sed 's/\\(intermediate_size.:\\).*384/\\1 16384/' base/config.json >$D/wide.json"), "writes wide.json");
    for (int i = 0; i < 2; i++) {                       // the default rate on a model of 33 million parameters: chosen, and not
        char command[200];
        snprintf(command, sizeof command, "$TRAIN --init $D/wide.json --method full --data $D/few.jsonl --val $D/few.jsonl "
                 "--out base %s >$D/stdout 2>$D/stderr", i ? "" : "--lr 0.004");
        expect(system(command) != 0, "trains into base/");
        text = output_of("stderr");
        expect(!!strstr(text, "note: --lr 0.004, the default") == i, "says «%s»", text);
        free(text);
    }
    train_well("--data $D/few.jsonl --val $D/few.jsonl --dry-run");
    text = output_of("stderr");
    expect(!*text, "says «%s» of the bundled model", text);
    free(text);

    train_well("--model base --data data/train.jsonl --val $D/few.jsonl --method lora --rank 4 --alpha 8 --targets "
        "q,v --lr 0.01 --schedule linear --warmup 1 --weight-decay 0.1 --clip 0.5"
        " --batch 2 --accum 2 --steps 2 --seq 140 --max-new 3 --eval-every 1 --save-every 1 --log $D/ours.log --out $D/ours");
    train_well("--model_name_or_path=base --data_path data/train.jsonl --validation_file $D/few.jsonl --method LoRA "
        "--lora_r=4 --lora_alpha 8 --target_modules q_proj,v_proj --learning_rate 0.01"
        " --lr_scheduler_type Linear --warmup_steps 1 --weight_decay 0.1 --max_grad_norm 0.5 "
            "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --max_steps 2 --max_seq_length 140"
        " --max_new_tokens 3 --eval_steps 1 --save_steps 1 --log $D/theirs.log --output_dir $D/theirs");
    expect(same_files("ours/adapter_model.safetensors", "theirs/adapter_model.safetensors"), "adapter");
    expect(same_logs("ours.log", "theirs.log"), "log");
}

// What a method writes into adapter_config.json is that method when it is read. With a start it is lora's, which holds both.
static void test_methods_named(void)
{
    for (int i = 0; i < METHODS; i++) {
        if (left_out(i) || !methods[i].peft_type) continue;
        model *m = open_small(small_plan(methods[i].name), 0);
        json_t *json = peft_config(m, "base");
        const method *got = peft_method(json, "adapter_config.json");
        const char *variant = methods[i].has_start ? NULL : methods[i].peft_variant;
        expect(got && same_text(got->peft_type, methods[i].peft_type) && same_text(got->peft_variant, variant),
            "%s comes back as %s", methods[i].name, got ? got->name : "nothing");
        json_decref(json);
        close_small(m);
    }
}

// What counts as one edit, what as adding words, and what an option that is left out leaves to the other.
static void test_option_names(void)
{
    static const struct { const char *a, *b; int edits; } pairs[] = {
        {"--rank", "--rank", 0}, {"ab", "ba", 1}, {"--setps", "--steps", 1}, {"xxab", "xxba", 1}, {"badc", "abcd", 2},
        {"kitten", "sitting", 3}, {"ca", "abc", 3}, {"", "abc", 3}, {"abc", "", 3}, {"abcd", "acd", 1},
    };
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++)
        expect(edits(pairs[i].a, pairs[i].b) == pairs[i].edits, "%s, %s: %d edits", pairs[i].a, pairs[i].b,
            edits(pairs[i].a, pairs[i].b));
    for (int more = 0; more < 2; more++) {
        int least = 100;
        const char *found = NULL;
        nearer(more ? "--steps-of-adam" : "--stepsofadam", "--steps", "it", &least, &found);
        expect(least == (more ? 1 : 6), "more %s: %d", more ? "words" : "letters", least);
    }
    expect(train_run("--val $D/nowhere.jsonl --steps 1 --out $D/named") == 1, "--val alone is not read");
    expect(train_run("--data $D/few.jsonl --steps 1 --batch 2 --rank 2 --out $D/named") == 0, "--data alone");
    char *text = output_of("stdout");
    expect(!strstr(text, "data/val.jsonl"), "--data alone takes --val along: «%s»", text);
    free(text);
}

// Every other name leads to something that is there, and every pair of commands is refused.
static void test_option_tables(void)
{
    for (int i = 0; i < ALIASES; i++) {
        char *value, *theirs = strdup(aliases[i].theirs);
        int option = option_named(theirs, &value);
        if (*theirs == '-') check(option < 0 || strcmp(option_table[option].name, aliases[i].ours), 0, "%s", theirs);
        else expect(method_named(aliases[i].ours) || !strcmp(parse_schedule(theirs), aliases[i].ours), "%s", theirs);
        free(theirs);
    }
    for (int i = 0; i < METHODS; i++) expect(method_named(methods[i].name) == &methods[i], "%s", methods[i].name);
    for (int i = 1; i <= COMMANDS; i++)
        for (int j = 1; j <= COMMANDS; j++) {
            if (i == j) continue;
            check(train_run("%s %s %s %s", option_table[i].name, option_table[i].kind == 's' ? "x" : "",
                option_table[j].name, option_table[j].kind == 's' ? "x" : "") != 1, 0, "exit status");
            char *text = output_of("stderr");
            expect(has(text, "give one of them"), "%s and %s: «%s»", option_table[i].name, option_table[j].name, text);
            free(text);
        }
}

// Half an epoch is half its steps, rounded up.
static void test_epochs(void)
{
    static const struct { const char *epochs; int steps; } cases[] = {{"0.1", 1}, {"0.5", 2}, {"0.51", 3}, {"1", 4},
        {"1.25", 5}, {"1.26", 6}, {"2", 8}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (not_asked_for(cases[i].epochs)) continue;
        char want[64];
        train_well("--data $D/few.jsonl --batch 2 --epochs %s --method lora --rank 1 --log $D/log --out $D/epochs",
            cases[i].epochs);
        char *text = output_of("stdout");
        snprintf(want, sizeof want, "steps      %d of 2 rows", cases[i].steps);
        check(!strstr(text, want) || isnan(logged("log", cases[i].steps, "\"loss\":")), 0,
            "--epochs %s: expected %d steps", cases[i].epochs, cases[i].steps);
        free(text);
    }
}

// Whose template counts: --template's, else the model's own, wherever it stands; else the paper's prompt.
static void test_own_template(void)
{
    static const struct { const char *settings, *jinja, *option, *name, *end; } cases[] = {
        {"{}", NULL, NULL, "alpaca", NULL},
        {"{}", NULL, "zephyr", "zephyr", "</s>"},
        {"{\"chat_template\": \"{{ bos_token + '[INST] <<SYS>>' }}\"}", NULL, NULL, "llama2", "</s>"},
        {"{\"chat_template\": \"{{ bos_token + '[INST] <<SYS>>' }}\"}", NULL, "zephyr", "zephyr", "</s>"},
        {"{\"chat_template\": \"{{ bos_token + '[INST] <<SYS>>' }}\"}", "{{ '<|user|>' + eos_token }}", NULL, "zephyr", "</s>"},
        {"{\"chat_template\": [{\"name\": \"tool_use\", \"template\": \"[INST] <<SYS>>\"}, {\"name\": \"default\", "
            "\"template\": \"<|user|> + eos_token\"}]}", NULL, NULL, "zephyr", "</s>"},
        {"{\"chat_template\": null}", NULL, NULL, "alpaca", NULL},
        // ChatML whose system says something else, of its own accord, and one that begins to think
        {"{\"chat_template\": \"<|im_start|>system\\nYou are a helpful assistant called Drago.<|im_end|>\"}",
            NULL, NULL, "alpaca", NULL},
        {"{\"chat_template\": \"<|im_start|>system\\\\nReason step by step.<|im_end|>\"}", NULL, NULL, "alpaca", NULL},
        {"{\"chat_template\": \"<|im_start|>assistant\\n<think>\\n <|im_end|>\"}", NULL, NULL, "alpaca", NULL},
    };
    char *dir = in_scratch("own-template"), *path = in_scratch("own-template/chat_template.jinja");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        json_t *settings = json_loads(cases[i].settings, 0, NULL);
        tokenizer *t = tokenizer_with(dir, settings);
        if (cases[i].jinja) write_text(path, cases[i].jinja);
        opt.template = cases[i].option;
        open_template(t);
        expect(!strcmp(chat.is->name, cases[i].name), "directory %zu: %s, expected %s", i, chat.is->name, cases[i].name);
        expect(chat.end == (cases[i].end ? tokenizer_find(t, cases[i].end) : -1), "directory %zu: ends with %d", i, chat.end);
        json_decref(settings), tokenizer_free(t);
    }
    chat.is = templates;
    chat.end = -1;
    shell("rm -rf $D/own-template; cp -r base $D/own-template; "
        "echo '{\"chat_template\": \"Human: \"}' > $D/own-template/tokenizer_config.json", "cannot prepare");
    train_well("--eval --model $D/own-template --val $D/few.jsonl");
    char *note = output_of("stderr"), *said = output_of("stdout");
    expect(has(note, "none that this program knows; the paper's prompt is used") && has(said, "\ntemplate   alpaca\n"),
        "a template of another kind: «%s», %s", note, said);
    free(note), free(said), free(dir), free(path);
    shell("echo '{\"chat_template\": [{\"name\": \"tool_use\", \"template\": \"[INST] <<SYS>>\"}]}' "
        "> $D/own-template/tokenizer_config.json", "cannot prepare");
    train_well("--eval --model $D/own-template --val $D/few.jsonl");
    note = output_of("stderr");
    expect(has(note, "none that this program knows; the paper's prompt is used"), "a list without a default: «%s»", note);
    free(note);
    train_well("--data $D/few.jsonl --val $D/few.jsonl --steps 1 --rank 1 --method lora --template zephyr --out $D/of-zephyr");
    train_well("--eval --adapter $D/of-zephyr --val $D/few.jsonl");
    said = output_of("stdout");
    expect(has(said, "\ntemplate   zephyr\n"), "an adapter that was trained with zephyr: %s", said);
    free(said);
}

// An adapter that fits but names another base says so. The same name at another place is the same base.
static void test_other_base(void)
{
    static const struct { const char *named; int noted; } cases[] = {
        {"\"base\"", 0}, {"\"somewhere/else/base/\"", 0}, {"\"someone/Base\"", 0}, {"\"\"", 0}, {"null", 0},
        {"\"someone/base-chat\"", 1}, {"\"another\\u001b/\"", 1},
    };
    char command[200];
    shell("head -n 1 data/val.jsonl > $D/one.jsonl", "cannot prepare");
    train_well("--data $D/one.jsonl --steps 1 --rank 1 --method lora --out $D/of-base");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        snprintf(command, sizeof command, "%s/of-base/adapter_config.json", scratch);
        json_t *json = json_load_file(command, 0, NULL);
        json_object_set_new(json, "base_model_name_or_path", json_loads(cases[i].named, JSON_DECODE_ANY, NULL));
        if (json_dump_file(json, command, 0)) die("cannot write %s", command);
        train_well("--eval --adapter $D/of-base --val $D/one.jsonl");
        char *note = output_of("stderr"), *said = output_of("stdout");
        expect(has(note, " as its base and is used on base\n") == cases[i].noted && !strchr(note, 27), "%s: says «%s»",
            cases[i].named, note);
        expect(has(said, "one.jsonl: 1 row\n"), "one row: %s", said);
        free(note), free(said);
        json_decref(json);
    }
}

#define OVERFITS "--data $D/two.jsonl --val $D/held.jsonl --batch 2 --schedule constant --max-new 2 --eval-every 2"

// The first two losses stay within a bit or so of bf16, before rounding has led the runs apart. A start is not rounded: without
// a step that moves it, it is saved with the bytes of a run in float.
static void test_bf16(void)
{
    static const char *const names[] = {"lora", "pissa", "bone", "bat", "bat-row", "dora", "full"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (not_asked_for(names[i])) continue;
        train_well(SHORT_RUN " --method %s --rank 8 --log %s/exact.log --out %s/exact", names[i], scratch, scratch);
        for (int t = 1; t <= 2; t++)
            train_well(SHORT_RUN " --method %s --rank 8 --bf16 --threads %d --log %s/bf16-%d.log --out %s/bf16-%d", names[i],
                t, scratch, t, scratch, t);
        expect(same_logs("bf16-1.log", "bf16-2.log"), "%s: another log with two threads", names[i]);
        expect(!same_logs("bf16-1.log", "exact.log"), "%s: nothing was rounded", names[i]);
        for (int step = 1; step <= 2; step++)
            check(fabs(logged("bf16-1.log", step, "\"loss\":") / logged("exact.log", step, "\"loss\":") - 1), 0x1p-8,
                "%s, loss of step %d", names[i], step);
    }
    if (not_asked_for("pissa")) return;
    for (int i = 0; i < 2; i++)
        train_well(FEW_ROWS " --method pissa --rank 8 --steps 1 --lr 0 %s --out %s/start-%d", i ? "--bf16" : "", scratch, i);
    expect(same_files("start-0/adapter_model.safetensors", "start-1/adapter_model.safetensors"), "pissa: another start");
}

// The eval losses of a log behind step 0: the lowest, and its step.
static int best_logged(const char *log, double *lowest)
{
    char *text = output_of(log);
    int best = 0, step;
    double loss;
    *lowest = INFINITY;
    for (char *line = text; *line; line = next_line_of(line))
        if (!strncmp(line, "{\"step\":", 8) && sscanf(line, "{\"step\":%d,\"eval_loss\":%lf", &step, &loss) == 2 && step &&
            loss < *lowest)
            *lowest = loss, best = step;
    free(text);
    return best;
}

// The small RWKV6 beside base/ has read stories; ten steps teach it much of what an answer looks like.
static void test_rwkv_base(void)
{
    shell("head -n 20 data/val.jsonl > $D/rwkv-val.jsonl", "cannot prepare");
    train_well("--model base-rwkv6 --val $D/rwkv-val.jsonl --steps 10 --max-new 2 --log $D/rwkv.log --out $D/rwkv");
    double before = NAN, after;
    char *log = output_of("rwkv.log");
    sscanf(log, "{\"step\":0,\"eval_loss\":%lf", &before);
    best_logged("rwkv.log", &after);
    expect(after < 0.6 * before, "its eval loss was %g, and is %g after ten steps", before, after);
    free(log);
}

// --keep-best: --out holds what had the lowest eval loss, the bytes of a run that ended there; --patience ends a run so
// many evaluations later; and a run that was stopped behind its best step goes on knowing it.
static void test_keep_best(void)
{
    double lowest;
    shell("tail -n 6 data/val.jsonl > $D/held.jsonl; head -n 2 data/val.jsonl > $D/two.jsonl", "cannot prepare");
    for (int full = 0; full < 2; full++) {
        const char *how = full ? "--method full --lr 0.003" : "--lr 0.01";
        const char *file = full ? "model.safetensors" : "adapter_model.safetensors";
        char kept[64], ended[64];
        train_well(OVERFITS " %s --steps 24 --keep-best --log $D/whole.log --out $D/whole", how);
        int best = best_logged("whole.log", &lowest);
        expect(best > 0 && best < 24, "the best step is %d of 24, in the middle of nothing", best);
        char *printed = output_of("stdout"), want[100], *state = output_of("whole/state.json");
        snprintf(want, sizeof want, "best       eval loss %.4f after step %d, which is what", lowest, best);
        expect(has(printed, want), "%s does not say «%s»: %s", how, want, printed);
        snprintf(want, sizeof want, "\"best_step\":\t%d,", best);
        expect(has(state, want), "%s: state.json has no %s", how, want);
        train_well(OVERFITS " %s --steps %d --out $D/ended", how, best);
        snprintf(kept, sizeof kept, "whole/%s", file);
        snprintf(ended, sizeof ended, "ended/%s", file);
        expect(same_files(kept, ended), "%s: what is kept is not that of step %d", how, best);
        train_well(OVERFITS " %s --steps 24 --log $D/last.log --out $D/last", how);
        expect(same_files("whole/state.safetensors", "last/state.safetensors"), "%s: the state is not the last step's", how);
        expect(same_logs("whole.log", "last.log"), "%s: another log", how);
        free(printed), free(state);
    }
    train_well(OVERFITS " --lr 3 --steps 2 --keep-best --out $D/worse");
    char *worse = output_of("stdout");
    expect(has(worse, "before training it was"), "nothing says that the best was before training: %s", worse);
    free(worse);
    train_well(OVERFITS " --lr 0.01 --steps 24 --keep-best --patience 2 --log $D/patient.log --out $D/patient");
    train_well(OVERFITS " --lr 0.01 --steps 24 --keep-best --log $D/whole.log --out $D/whole");
    char *text = output_of("patient.log"), *all = output_of("whole.log"), key[64];
    int waited = 0, stop = 0, step;
    double loss, least = INFINITY;
    for (char *line = all; *line && !stop; line = next_line_of(line))
        if (sscanf(line, "{\"step\":%d,\"eval_loss\":%lf", &step, &loss) == 2 && step) {
            waited = loss < least ? 0 : waited + 1;
            if (loss < least) least = loss;
            if (waited == 2) stop = step;
        }
    snprintf(key, sizeof key, "{\"step\":%d,\"loss\"", stop + 1);
    expect(stop && stop < 24 && !has(text, key), "patience of 2 goes on behind step %d", stop);
    snprintf(key, sizeof key, "{\"step\":%d,\"loss\"", stop);
    expect(has(text, key), "patience of 2 ends before step %d", stop);
    int best = best_logged("whole.log", &lowest);
    int status = stopped_run("INT", best + 1, "%s", OVERFITS " --lr 0.01 --steps 24 --keep-best");
    expect(status == 130, "stopped with status %d", status);
    train_well(OVERFITS " --lr 0.01 --steps 24 --keep-best --resume $D/part --log $D/part.log --out $D/other");
    shell("rm -r $D/part; mv $D/other $D/part", "cannot move");
    compare_runs("bone", "adapter_model.safetensors", "a stop behind the best step");
    free(text), free(all);
}

// --dry-run says what a run would be, and leaves nothing; its loss and steps are those of the run.
static void test_dry_run(void)
{
    shell("cd $D; rm -rf dry*; touch before after changed stdout stderr; ls -A > before", "cannot list");
    train_well(SHORT_RUN " --dry-run --log $D/dry.log --plot $D/dry.svg --out $D/dry");
    char *said = output_of("stdout"), want[100];
    shell("cd $D; ls -A > after; diff before after > changed; true", "cannot list");
    char *changed = output_of("changed");
    expect(!*changed, "something was left: %s", changed);
    train_well(SHORT_RUN " --log $D/wet.log --out $D/wet");
    snprintf(want, sizeof want, "one step   loss %.4f; %.0f tokens", logged("wet.log", 1, "\"loss\":"),
        logged("wet.log", 1, "\"tokens\":"));
    expect(has(said, want), "says no «%s»: %s", want, said);
    expect(has(said, "steps      6 of 8 rows") && has(said, "time       about 0:0") && has(said, "nothing was written"),
        "the plan: %s", said);
    free(said);
    train_well("--data $D/few.jsonl --steps 1000000000 --accum 2 --dry-run");     // longer than 2^31 seconds
    said = output_of("stdout");
    const char *about = strstr(said, "time       about ");
    expect(about && atol(about + 17) > 9999 && !strchr(about, '-'), "a billion steps: %s", about);
    free(said), free(changed);
}

// --plot draws what --log holds, those of an earlier run included; without gnuplot the run does not begin.
static void test_plot(void)
{
    if (system("gnuplot --version >$D/stdout 2>&1")) {
        snprintf(skipped, sizeof skipped, "gnuplot is not here");
        return;
    }
    shell("mkdir -p \"$D/a 'b\"", "cannot prepare");
    train_well(SHORT_RUN " --eval-every 2 --plot \"$D/a 'b/p.svg\" --out $D/drawn");
    char *plot = output_of("a 'b/p.svg");
    expect(has(plot, ">training loss<") && has(plot, ">eval loss<") && has(plot, ">gradient norm<") && has(plot, "</svg>"),
        "the plot");
    expect(has(plot, "bone on data/train.jsonl"), "the plot does not say what was run");
    int points = 0;
    for (const char *at = plot; (at = strstr(at, "xlink:href='#gpPt6'")); at++) points++;
    expect(points == 5, "%d points for four evaluations and the key", points);
    train_well(SHORT_RUN " --log $D/drawn.log --plot $D/p.png --out $D/drawn");
    free(plot);
    plot = output_of("p.png");
    expect(!strncmp(plot, "\x89PNG", 4), "p.png is none");
    free(plot);
    char *left = (shell("ls -A $D \"$D/a 'b\" | grep 'tmp-' > $D/left; true", "cannot list"), output_of("left"));
    expect(!*left, "left behind: %s", left);
    free(left);
    shell("rm -rf $D/none; ! PATH=/none $TRAIN --steps 1 --data $D/few.jsonl --plot $D/none.svg --out $D/none "
        ">$D/stdout 2>$D/stderr", "status");
    char *said = output_of("stderr");
    expect(has(said, "error: --plot") && has(said, "gnuplot is not here"), "without gnuplot: «%s»", said);
    free(said);
}

// A dialogue goes on from all that was said: its second answer is that of the model which is fed both turns at once.
static void test_dialogue(void)
{
    static const char first[] = "How many cups?", second[] = "And now?";
    char rows[2000];
    for (int i = 0; i < 2; i++) {
        opt = (options){.model = "base", .targets = opt.targets, .schedule = "cosine", .method = "bone", .rank = 32, .mini_r = 8,
            .epochs = 1, .batch = 1, .accum = 1, .seq = 256, .max_new = 24, .plus_ratio = 16, .top_p = 1};
        opt.template = i ? "llama2" : "alpaca";
        shell(i ? "printf 'How many cups?\\n\\n  \\nAnd now?\\r\\n' | "
                  "$TRAIN --chat --template llama2 --max-new 24 > $D/said 2>$D/stderr"
                : "printf 'How many cups?\\nAnd now?' | $TRAIN --chat --max-new 24 > $D/said 2>$D/stderr", "status");
        char *said = output_of("said"), *end = strchr(said, '\n');
        if (!end) { expect(0, "says «%s»", said); free(said); continue; }
        *end = 0;
        tokenizer *t = open_tokenizer("base", 0);
        open_template(t);
        json_t *row_json = json_pack("{s[{ssss}{ssss}{ssss}]s[{ssss}]}",
            "prompt", "role", "user", "content", first, "role", "assistant", "content", said, "role", "user", "content", second,
            "completion", "role", "assistant", "content", "x");
        char *line = json_text(row_json), *answer;
        snprintf(rows, sizeof rows, "%s\n", line);
        scores got;
        answer = first_answer(rows, &got);
        char *shown_answer = trimmed(answer), *second_said = trimmed(end + 1);
        expect(!strcmp(shown_answer, second_said), "%s: answers «%s» and, fed at once, «%s»", opt.template, second_said,
            shown_answer);
        free(shown_answer), free(second_said), free(answer), free(line), free(said);
        json_decref(row_json), tokenizer_free(t);
    }
    opt.template = NULL;
    chat.is = templates;
    chat.end = -1;
}

// ---- the GPU -----------------------------------------------------------------------------------------------------------

// absent where there is no GPU half
__attribute__((weak)) snapshot *gpu_results(const char *what, int recompute, const snapshot *other, const char *dir);

// Of two tensors that differ nobody knows yet which is wrong: the CPU's tests say whether it is the CPU's.
static void compare_halves(const char *what, int recompute)
{
    int ops = !strcmp(what, "ops");
    snapshot *cpu = results_of(what, recompute, NULL), *gpu = gpu_results(what, recompute, cpu, scratch);
    expect(arrlen(cpu) == arrlen(gpu), "%s: %td tensors on the CPU, %td on the GPU", what, arrlen(cpu), arrlen(gpu));
    for (int i = 0; i < arrlen(cpu) && i < arrlen(gpu); i++) {
        char text[200];
        if (!strncmp(cpu[i].name, "start ", 6) || (ops && not_asked_for(cpu[i].name))) continue;
        double norm = compare(&cpu[i], &cpu[i]).norm[0];
        if (norm == 0 && !strcmp(cpu[i].name, "dxn") && gpu[i].n == cpu[i].n) continue;         // the first layer's is not wanted
        snprintf(text, sizeof text, "%s%s%s", ops ? "" : what, ops ? "" : ", ", cpu[i].name);
        check_snapshots(&gpu[i], &cpu[i], "GPU", "CPU", gpu_tolerance(ops), text);
    }
    snapshots_free(cpu), snapshots_free(gpu);
}

// What dev_reserve() counts before the first step is all that steps need.
__attribute__((weak)) long gpu_allocations(const char *base, const char *method_name, int recompute);
static void test_gpu_allocations(void)
{
    static const char *const bases[] = {"dev/golden/base-bf16", "dev/golden/base-rwkv6"};
    for (int i = 0; i < 4 * METHODS; i++) {
        const char *name = methods[i / 4].name, *base = bases[i / 2 % 2];
        int recompute = i % 2 * 2;
        if (left_out(i / 4)) continue;
        long made = gpu_allocations(base, name, recompute);
        if (made < 0) { snprintf(skipped, sizeof skipped, "only the emulation counts them"); return; }
        check((double)made, 0, "%s, %s, --recompute %d: %ld", base, name, recompute, made);
    }
}

static void test_gpu_ops(void) { compare_halves("ops", 0); }

// Weights of 0.4 make scores in the second layer so large that what bf16 rounds off q and k alone decides which keys are
// attended to: there chance would be compared. In RWKV6 0.2 is enough for it: pissa, whose three terms cancel, is off by 96 ε
// in double and by 109 ε in float, which is beyond 1e-5; with 0.15 it is a fifth of that. So an error is an error.
static void test_gpu_methods(void)
{
    small_size = 0.15;
    for (int i = 0; i < METHODS; i++)
        for (int recompute = 0; recompute < 3 && !left_out(i); recompute += 2) compare_halves(methods[i].name, recompute);
    for (int which = 1; which < KIN; which++) {
        char what[60];
        snprintf(what, sizeof what, "full on %s", kin[which].name);
        if (!not_asked_for(what)) compare_halves(what, which % 2 ? 2 : 0);
    }
    for (int i = 1; i < METHODS; i++) {
        char what[60];
        snprintf(what, sizeof what, "%s on rwkv6", methods[i].name);
        if (!left_out(i)) compare_halves(what, i % 2 ? 2 : 0);
    }
}

// bf16 is as good as PyTorch's: of each gradient of the bundled model at most 1.5 times its error (dev/golden.py
// measured it, against float64), and on average over the tensors no more than it. `in_bf16` computes what `exact` has.
static void compare_with_pytorch(snapshot *(*in_bf16)(const char *what, const snapshot *exact))
{
    size_t bytes;
    const char *pair;
    char *text = read_file("dev/golden/bf16_errors.json", &bytes), what[40];
    json_t *errors = parse_json("bf16_errors.json", text, bytes), *of_pair;
    struct { char *key; struct { double ours, theirs; } value; } *tensors = NULL;
    sh_new_strdup(tensors);
    json_object_foreach(errors, pair, of_pair) {
        snprintf(what, sizeof what, "bundled %.20s", pair);
        snapshot *exact = results_of(what, 0, NULL), *got = in_bf16(what, exact);
        for (int i = 0; i < arrlen(exact); i++) {
            const json_t *theirs = json_object_get(of_pair, exact[i].name + 2);
            if (strncmp(exact[i].name, "d ", 2)) continue;
            expect(theirs != NULL, "%s has an error of PyTorch's", exact[i].name);
            if (shgeti(tensors, exact[i].name) < 0) shput(tensors, exact[i].name, ((typeof(tensors->value)){0, 0}));
            ptrdiff_t at = shgeti(tensors, exact[i].name);
            tensors[at].value.ours += compare(&exact[i], &got[i]).error;
            tensors[at].value.theirs += json_number_value(theirs);
        }
        snapshots_free(exact), snapshots_free(got);
    }
    double sum = 0, most = 0, n = (double)shlen(tensors);
    for (int i = 0; i < shlen(tensors); i++) {
        double ours = tensors[i].value.ours, theirs = tensors[i].value.theirs;
        check(ours, 1.5 * theirs, "%s", tensors[i].key);
        sum += ours / theirs, most = fmax(most, ours / theirs);
    }
    expect(n == (double)json_object_size(json_object_get(errors, "0")), "%g tensors of PyTorch's", n);
    check(sum / n, 1, "error over PyTorch's, on average");
    printf("      bf16: error over PyTorch's %.2f on average (allowed 1), at most %.2f (allowed 1.5)\n", sum / n, most);
    shfree(tensors), json_decref(errors), free(text);
}

static snapshot *on_gpu(const char *what, const snapshot *exact) { return gpu_results(what, 0, exact, scratch); }

static void test_gpu_bundled(void)
{
    if (gpu_tolerance(1) < 1e-3) compare_halves("bundled 0", 0);                    // float and double
    else compare_with_pytorch(on_gpu);
}

static snapshot *by_pairs(const char *what, const snapshot *exact)
{
    (void)exact;
    bf16_pairs = 1;
    snapshot *got = results_of(what, 0, NULL);
    bf16_pairs = 0;
    return got;
}

static void test_bf16_gradients(void) { compare_with_pytorch(by_pairs); }

// Three runs of everything give the same bits. Emulated, each takes threads and blocks in another order (dev/cuda_on_cpu.h
// reads CUDA_ORDER; a GPU has its own), so that a missing barrier shows, or a sum that depends on who comes first.
static void test_gpu_same_bits(void)
{
    static const char *const runs[] = {"ops", "bone", "bat", "full"}, *const orders[] = {"forward", "reverse", "random:1"};
    for (int i = 0; i < 4; i++) {
        snapshot *first = NULL;
        for (int j = 0; j < 3 && !not_asked_for(runs[i]); j++) {
            setenv("CUDA_ORDER", orders[j], 1);
            char text[200];
            snapshot *now = gpu_results(runs[i], 0, NULL, scratch);
            for (int k = 0; k < arrlen(first); k++) {
                snprintf(text, sizeof text, "%s, %s, run %d", runs[i], now[k].name, j + 1);
                check_snapshots(&now[k], &first[k], "this run", "first run", SAME_BITS, text);
            }
            if (first) snapshots_free(now);
            else first = now;
        }
        snapshots_free(first);
    }
    unsetenv("CUDA_ORDER");
}

// ---- the list of tests -----------------------------------------------------------------------------------------------

// Name, claim, function, the builds that have it, and what to open when it fails.
static const struct { const char *name, *claim; void (*run)(void); int builds; const char *look_in; } tests[] = {
    {"gradients", "every trainable number of every method agrees with central differences",
        test_gradients, ONLY_F64, "adapters.h"},
    {"ops", "every op's backward agrees with central differences under a random cotangent",
        test_ops, ONLY_F64, "ops/cpu.c"},
    {"residual-copy", "RMSNorm's copy of the residual stream has its bits, and leaves out as it is",
        test_residual_copy, BOTH, "ops/cpu.c"},
    {"twice", "running backward twice gives twice the gradient",
        test_twice, BOTH, "adapters.h"},
    {"stale-memory", "a step reads no activation, gradient or work space that an earlier one left",
        test_stale_memory, BOTH, "model.h"},
    {"aligned-rows", "what is as wide as the rank has rows that begin at 16 bytes",
        test_aligned_rows, BOTH, "model.h"},
    {"accumulation", "micro-batches of one row add up to the batch",
        test_accumulation, BOTH, "adapters.h"},
    {"splits", "every split of the same rows into micro-batches gives their loss and gradient, scored answers or none",
        test_splits, ONLY_F64, "model.h"},
    {"recompute", "recomputing activations gives the same bits in less memory",
        test_recompute, BOTH, "model.h"},
    {"zero-start", "step 0 changes no logit, whatever the method",
        test_zero_start, BOTH, "adapters.h"},
    {"zero-rows", "dora on a weight with rows of zeros begins with the base, and stays finite",
        test_zero_rows, BOTH, "adapters.h"},
    {"merge", "the merged model gives the adapter's logits",
        test_merge, BOTH, "adapters.h"},
    {"definition", "each layer equals the paper's W + ΔW, written as plain loops: y and dx, written or added",
        test_definition, BOTH, "adapters.h"},
    {"frozen-is-full", "frozen's gradient is full fine-tuning's over the same matrices; lora-ga's first, too",
        test_frozen_is_full, BOTH, "adapters.h"},
    {"corners", "DiSHA's and Bat's groupings are Bone, mini, frozen, bat and bat-row at their corners: loss, gradient, merge",
        test_corners, BOTH, "adapters.h"},
    {"ranks", "ΔW has the rank that each method's page says",
        test_rank, ONLY_F64, "adapters.h"},
    {"rwkv-long", "wkv6's backward agrees with central differences in long texts, and where all is forgotten",
        test_wkv_long, ONLY_F64, "ops/cpu.c"},
    {"rwkv-words", "RWKV's vocabulary: every kind of literal, the longest word first, and what is refused",
        test_words, BOTH, "tokenizer.c"},
    {"rwkv-world", "BlinkDL's vocabulary gives his ids, with either kind of line end",
        test_world, BOTH, "tokenizer.c"},
    {"rwkv-base", "the small RWKV6 beside base/ loads, and learns to answer",
        test_rwkv_base, ONLY_F32, "rwkv6.h"},
    {"rwkv-start", "--init starts RWKV6's decays, bonuses and lerps as BlinkDL does",
        test_rwkv_start, ONLY_F64, "rwkv6.h"},
    {"rwkv-counts", "on RWKV6 of 3B and 7B Bone and LoRA train as many numbers as the paper's tables say",
        test_rwkv_counts, BOTH, "rwkv6.h"},
    {"svd", "power iteration finds LAPACK's singular values",
        test_svd, BOTH, "lib/svd.h"},
    {"lora-start", "A begins kaiming-uniform, to its bounds, and B at zero",
        test_lora_start, BOTH, "adapters.h"},
    {"saved-lora", "what lora's kin save is the trained function by PEFT's formula, from the files alone",
        test_saved_lora, BOTH, "run/peft.h"},
    {"residual", "pissa leaves the rest of W's SVD; W and a start of pissa, olora, lora-ga are W",
        test_residual, BOTH, "adapters.h"},
    {"bf16-start", "on a bf16 base, too, they begin with its loss, and what is saved is what was trained",
        test_bf16_start, BOTH, "adapters.h"},
    {"goldens", "logits, loss, gradients and eight AdamW steps are transformers' and PEFT's",
        test_goldens, BOTH, "model.h, dev/golden.py"},
    {"target-modules", "names, their ends and regular expressions mean the layers that PEFT takes them for",
        test_target_modules, BOTH, "run/peft.h"},
    {"uneven", "with adapters on some layers only, evaluating gives the logits of training",
        test_uneven, BOTH, "adapters.h"},
    {"attention", "attention is softmax(q kᵀ/√d) v by plain loops, grouped heads and cached keys too",
        test_attention, BOTH, "ops/cpu.c"},
    {"cache", "generating with the key-value cache gives the logits of the whole row",
        test_cache, BOTH, "model.h"},
    {"matmul", "the fast product equals the plain one, at every edge and dtype",
        test_matmul, BOTH, "ops/gemm.h"},
    {"same-bits", "a product has the same bits for 1, 2 and 4 threads and in any batch",
        test_same_bits, BOTH, "ops/gemm.h"},
    {"few-rows", "a product of few rows has the bits that they have among many",
        test_few_rows, BOTH, "ops/gemm.h"},
    {"pairs", "--bf16 rounds factors to nearest even and sums pairs in float, with the bits of AVX512_BF16 on any processor",
        test_pairs, ONLY_F32, "ops/gemm.h"},
    {"in-place", "a product has the same bits whether its factors are read in place or copied",
        test_in_place, BOTH, "ops/gemm.h"},
    {"exp", "exp is exact to the last bits and keeps NaN",
        test_exp, BOTH, "ops/cpu.c"},
    {"halves", "bf16 and f16 round to nearest even and keep Inf and NaN",
        test_halves, ONLY_F32, "ops/host.h"},
    {"beyond-blocks", "every op is its formula, plain and differentiated, beyond its blocks; for 1 and 2 threads",
        test_beyond_blocks, BOTH, "ops/cpu.c"},
    {"attention-pairs", "with --bf16 attention is its formula, to 8 bits, beyond its blocks; for 1 and 2 threads",
        test_attention_pairs, ONLY_F32, "ops/cpu.c, ops/gemm.h"},
    {"beyond-panels", "every product is the plain one beyond its panels, for 1 and 2 threads, and writes nothing else",
        test_beyond_panels, BOTH, "ops/gemm.h"},
    {"beyond-buffers", "copies in every dtype, tables, AdamW and its norm are plain loops beyond buffers and pieces",
        test_beyond_buffers, BOTH, "ops/cpu.c"},
    {"beyond-chunks", "loss and gradients of the head are plain loops, however few rows of logits stand in memory",
        test_beyond_chunks, BOTH, "model.h"},
    {"beyond-rows", "rows of 200 tokens: the gradient is the loss's slope, for every method, --recompute and threads",
        test_beyond_rows, BOTH, "model.h"},
    {"adamw", "AdamW is PyTorch's",
        test_adamw, BOTH, "ops/cpu.c"},
    {"update", "a step moves each tensor at its rate, clipped and decayed; lora+'s B at λ times it",
        test_update, BOTH, "train.c"},
    {"schedules", "the learning rate of each step is transformers', with and without warm-up",
        test_schedules, BOTH, "train.c"},
    {"expected-ids", "Llama2's tokenizer gives SentencePiece's ids",
        test_tokenizer_expected, ONLY_F32, "tokenizer.c"},
    {"own-ids", "so does the bundled one",
        test_tokenizer_own, ONLY_F32, "tokenizer.c"},
    {"any-bytes", "any bytes survive encoding and decoding, long ones too",
        test_tokenizer_bytes, ONLY_F32, "tokenizer.c"},
    {"known-words", "a word has the same ids whenever it comes, and whichever words came before",
        test_known_words, ONLY_F32, "tokenizer.c"},
    {"pieces", "spaces, USER and UNUSED pieces, surrogates: SentencePiece's ids and texts",
        test_pieces, BOTH, "tokenizer.c"},
    {"refused-tokenizers", "a damaged tokenizer.model, or one of another kind, is refused by one line",
        test_refused_tokenizers, BOTH, "tokenizer.c"},
    {"added-twice", "of two added tokens with the same text the last counts; a text is read to its end",
        test_added_twice, BOTH, "tokenizer.c"},
    {"special-tokens", "special and added tokens of a directory are transformers' ids, BOS and EOS",
        test_special_tokens, BOTH, "run/special_tokens.h, tokenizer.c"},
    {"alone", "a token that stands for a whole word is none beside a letter",
        test_alone, BOTH, "lib/words.h, tokenizer.c"},
    {"merges", "a tokenizer.json gives tokenizers' ids and texts: byte-level BPE of every published kind, and Llama2's",
        test_merges, BOTH, "run/tokenizer_json.h, lib/words.h, tokenizer.c"},
    {"byte-level-rows", "an answer continues its prompt without a space of its own; BOS only where the files put one",
        test_byte_level_rows, BOTH, "run/special_tokens.h, tokenizer.c"},
    {"streamed", "what is printed while a character lacks bytes is the text up to it",
        test_streamed, BOTH, "tokenizer.c, run/generate.h"},
    {"byte-level-bytes", "any text comes back from byte-level BPE; a megabyte of letters or of marks takes n log n",
        test_byte_level_bytes, ONLY_F32, "lib/words.h, tokenizer.c"},
    {"runs-of-spaces", "a megabyte of spaces that a letter ends takes n log n under every published pre-tokenizer",
        test_runs_of_spaces, ONLY_F32, "lib/words.h, tokenizer.c"},
    {"refused-merges", "a tokenizer.json with a part that is not built is refused by the part's name",
        test_refused_merges, BOTH, "run/tokenizer_json.h, lib/words.h"},
    {"first-token", "either half of a merge may be token 0",
        test_first_token, BOTH, "tokenizer.c"},
    {"byte-level-files", "which of a directory's tokenizers is read, and what its BOS and EOS are",
        test_byte_level_files, BOTH, "run/special_tokens.h"},
    {"prompt-edge", "the prompt's ids do not depend on the answer, all of which is learnt",
        test_edge, BOTH, "run/rows.h"},
    {"minus-five", "an answer that begins with the rest of a piece is learnt and given",
        test_minus_five, ONLY_F32, "run/rows.h"},
    {"stops", "an answer ends at every eos_token_id of the model",
        test_stops, BOTH, "lib/config.h"},
    {"config", "rope_theta counts wherever it stands, initializer_range is --init's σ",
        test_config, ONLY_F64, "lib/config.h"},
    {"defaults", "what a config.json or adapter_config.json leaves out is what transformers and PEFT take",
        test_defaults, BOTH, "lib/config.h"},
    {"rows", "Alpaca's, MetaMathQA's and GSM8K's rows work as they are published",
        test_rows, ONLY_F32, "run/rows.h"},
    {"row-formats", "rows and chats as people publish them: what reaches the model, and what is learnt of it",
        test_row_formats, ONLY_F32, "run/rows.h"},
    {"templates", "the templates of published models give transformers' ids, and their answers are learnt",
        test_templates, ONLY_F32, "run/templates.h"},
    {"trimmed", "a trimmed text is what Python's str.strip() leaves",
        test_trimmed, BOTH, "run/templates.h"},
    {"shortened", "a long row is shown without its middle, between whole letters",
        test_shortened, BOTH, "run/rows.h"},
    {"own-template", "the model's own template is recognised, wherever it stands; --template overrules it",
        test_own_template, ONLY_F32, "run/templates.h"},
    {"other-base", "an adapter that names another base than the one in use says so",
        test_other_base, ONLY_F32, "run/peft.h"},
    {"gzip", "packed rows are the rows; what is cut or damaged is refused",
        test_gzip, ONLY_F32, "lib/gzip.h"},
    {"windows", "a .txt file is one stream, cut into windows of --seq, of which nothing is lost",
        test_windows, BOTH, "run/rows.h"},
    {"cut-rows", "rows are cut at --seq, and left out where nothing of their answer is kept",
        test_cut_rows, BOTH, "run/rows.h"},
    {"targets", "loss and gradient are the mean over all target tokens of the step, prompts left out",
        test_targets, BOTH, "train.c"},
    {"config-spelling", "a config.json that is written again keeps every byte but its dtype's",
        test_config_spelling, BOTH, "lib/directory.h, stage_config"},
    {"json-values", "numbers and texts that are written as JSON are read back as the same",
        test_json_values, BOTH, "lib/json.h"},
    {"large-files", "a header of 100,000 tensors and a row of 16 MB take about a second",
        test_large_files, ONLY_F32, "lib/json.h, lib/safetensors.h"},
    {"row-files", "rows are read as they are meant, or named with file, line and byte; never in part",
        test_row_files, BOTH, "run/rows.h, lib/json.h"},
    {"safetensors", "what the safetensors library refuses is refused, and what it reads is read",
        test_safetensors, BOTH, "lib/safetensors.h"},
    {"too-many", "a model or an adapter with tensors that nobody asks for is refused",
        test_tensors_too_many, BOTH, "lib/safetensors.h"},
    {"no-place", "a micro-batch beyond the plan's memory ends the program before it is used",
        test_no_place, BOTH, "model.h"},
    {"epoch-rows", "each epoch has every row once, in an order of its own",
        test_epoch_rows, BOTH, "train.c"},
    {"cut-file", "a model file that changes while it is used ends the run with one line",
        test_cut_file, BOTH, "lib/safetensors.h"},
    {"escapes", "control characters of rows and models never reach the terminal",
        test_escapes, ONLY_F32, "ops/host.h"},
    {"sampling", "tokens come as often as softmax(logits/temperature), cut at top-p, says",
        test_sampling, BOTH, "run/generate.h"},
    {"together", "sequences that are answered together say what each says alone",
        test_together, BOTH, "run/generate.h"},
    {"answers", "an answer is the number behind #### or The answer is:, whatever follows it",
        test_answers, ONLY_F32, "run/rows.h"},
    {"batches", "--batch 64 and --batch 16 --accum 4 take the same steps",
        test_batches, ONLY_F32, "train.c"},
    {"room", "an answer has room for --max-new tokens, whatever other rows are; what is cut off is counted",
        test_room, ONLY_F32, "run/generate.h"},
    {"as-they-come", "what --generate prints as the tokens come is the text of all of them",
        test_as_they_come, BOTH, "run/generate.h, train.c"},
    {"threads", "adapter and log have the same bytes for 1, 2 and 4 threads",
        test_threads_same_bytes, ONLY_F32, "train.c"},
    {"bf16", "--bf16 trains every method, from float's losses on, and with the same result for 1 and 2 threads",
        test_bf16, ONLY_F32, "train.c, ops/gemm.h"},
    {"bf16-gradients", "its gradients of the bundled model are no further off than PyTorch's in bf16",
        test_bf16_gradients, ONLY_F32, "ops/gemm.h"},
    {"quota", "there are no more threads than a control group's quota allows",
        test_quota, ONLY_F32, "run/threads.h"},
    {"busy", "beside other work, all threads are not much slower than one",
        test_busy, ONLY_F32, "run/threads.h"},
    {"resume", "a resumed run leaves the bytes of one that never stopped",
        test_resume, ONLY_F32, "run/checkpoint.h, run/signals.h"},
    {"nan-saved", "a NaN or Inf among what trains is never saved",
        test_nan_saved, BOTH, "run/checkpoint.h"},
    {"same-options", "a run goes on only with the options that it had",
        test_same_options, BOTH, "run/checkpoint.h"},
    {"state-counts", "what state.json counts is a whole number that an int holds, or it is refused by name",
        test_state_counts, BOTH, "run/checkpoint.h"},
    {"killed", "so does one that a signal ended",
        test_killed, ONLY_F32, "run/checkpoint.h, run/signals.h"},
    {"compare", "--compare gives every method a row, continues, and its runs are ordinary ones",
        test_compare, ONLY_F32, "paper/compare.h"},
    {"own-rates", "--compare --own-lr gives each method the best rate of its search, and does nothing twice",
        test_own_rates, ONLY_F32, "paper/compare.h"},
    {"plots", "plots show every method, what was run, a window's mean in its middle",
        test_plots, ONLY_F32, "paper/compare.gp"},
    {"shard-note", "a D of one row or column is said to give updates of rank 1",
        test_shard_note, ONLY_F32, "run/options.h"},
    {"design-space", "--compare --shard gives every shard of disha its cells, at its own count, and does nothing twice",
        test_design_space, ONLY_F32, "paper/compare.h"},
    {"space-plot", "space.svg names every shard and the corners, and is there where shards were run",
        test_space_plot, ONLY_F32, "paper/compare.gp"},
    {"wrong-input", "every wrong input gets one clear line, and nothing is left behind",
        test_wrong_input, ONLY_F32, "run/options.h"},
    {"spellings", "options in PEFT's and Trainer's spelling mean what they mean there",
        test_spellings, ONLY_F32, "run/options.h"},
    {"methods-named", "what names a method in adapter_config.json names it when it is read",
        test_methods_named, BOTH, "run/peft.h"},
    {"option-names", "a name's nearest is found by letters and by words; --val and --data do not need each other",
        test_option_names, BOTH, "run/options.h"},
    {"option-tables", "every other name leads somewhere; two commands at once are refused, whichever",
        test_option_tables, ONLY_F32, "run/options.h"},
    {"epochs", "half an epoch is half its steps, rounded up",
        test_epochs, ONLY_F32, "train.c"},
    {"descriptors", "what is read is closed, and its memory given back",
        test_descriptors, BOTH, "ops/host.h"},
    {"base-size", "a run says how large its base is, and that nothing of it is copied",
        test_base_size, ONLY_F32, "train.c"},
    {"keep-best", "--out holds what had the lowest eval loss; --patience ends a run; a resumed run knows both",
        test_keep_best, ONLY_F32, "run/checkpoint.h, train.c"},
    {"dry-run", "a dry run says the plan and the time of a step, and writes nothing",
        test_dry_run, ONLY_F32, "train.c"},
    {"plot", "--plot draws losses and gradient norm; without gnuplot the run does not begin",
        test_plot, ONLY_F32, "run/plot.h"},
    {"dialogue", "a dialogue's next answer is that of the model which is fed all turns at once",
        test_dialogue, ONLY_F32, "train.c"},
    {"full-disk", "a full disk is said, and the older result stays",
        test_full_disk, ONLY_F32, "lib/directory.h"},
    {"output", "links and slashes lead to the same place; a full standard output is an error",
        test_out, ONLY_F32, "lib/directory.h"},
    {"kept-files", "--merge and full keep every file of the model directory that is not a weight",
        test_kept_files, ONLY_F32, "lib/directory.h"},
    {"only-ours", "--out replaces what a run says it wrote, and nothing else",
        test_only_ours, ONLY_F32, "lib/directory.h"},
    {"unknown-fields", "a field of config.json that nothing here knows is named",
        test_unknown_fields, ONLY_F32, "lib/config.h"},
    {"appears", "what appears at --out while a run goes on stays, and so does the result",
        test_appears, ONLY_F32, "lib/directory.h"},
    {"leftovers", "what killed runs left in the making is removed, never what a living one makes",
        test_leftovers, ONLY_F32, "lib/directory.h"},
    {"faults", "a call that fails or a kill anywhere: one clear line, the older result or all of the new one",
        test_faults, ONLY_F32, "ops/host.h, lib/directory.h"},
    {"mpi", "1, 2 and 4 ranks leave the bytes of one process: adapter, moments and log, by every method",
        test_mpi, ONLY_F32, "train.c, run/ranks.h"},
    {"mpi-resume", "a signal to one rank stops all after one step; any other number of ranks goes on from there",
        test_mpi_resume, ONLY_F32, "train.c, run/ranks_mpi.c"},
    {"mpi-failures", "what goes wrong on one rank ends all, with one line and nothing half-written",
        test_mpi_failures, ONLY_F32, "run/ranks_mpi.c, run/options.h"},
    {"process", "closed descriptors, a lost reader, ignored signals, a full log: nothing is lost",
        test_process, ONLY_F32, "run/signals.h"},
    {"discard", "a signal leaves nothing of a directory in the making, whatever its files are called",
        test_discard, ONLY_F32, "lib/directory.h"},
    {"block-ends", "no command writes behind the end of memory that it asked for",
        test_block_ends, ONLY_F32, "adapters.h, tokenizer.c"},
    {"odd-merges", "a merge that would write Inf or NaN is refused; what survives is a number or said to be nothing",
        test_odd_merges, ONLY_F32, "run/checkpoint.h"},
    {"counts", "trainable parameters on Llama2-7B are the paper's",
        test_llama2_counts, ONLY_F32, "adapters.h"},
    {"stories", "a real model says what transformers says, 256 tokens long",
        test_stories, ONLY_F32, "model.h"},
    {"gsm8k", "every method learns GSM8K rows; Bone's first gradient and progress beat LoRA's",
        test_gsm8k, ONLY_F32, "adapters.h"},
    {"gpu-ops", "every op gives the same on the GPU as on the CPU",
        test_gpu_ops, ON_GPU, "train.cu and ops/cpu.c"},
    {"gpu-methods", "so does a step of every method: activations, gradients, updated parameters",
        test_gpu_methods, ON_GPU, "train.cu; what build/test_f64 holds is the CPU half"},
    {"gpu-allocations", "no step allocates: what the ops need of their own is reserved before the first",
        test_gpu_allocations, ON_GPU, "train.cu and ops/cpu.c"},
    {"gpu-base", "and of the bundled model, where bf16 is no further off than PyTorch's",
        test_gpu_bundled, ON_GPU, "train.cu; what build/test_f64 holds is the CPU half"},
    {"gpu-bits", "the GPU gives the same bits every time, in any order of threads",
        test_gpu_same_bits, ON_GPU, "train.cu"},
};

enum { TESTS = sizeof tests / sizeof *tests };

static int in_this_build(int i) { return tests[i].builds & (gpu_results ? ON_GPU : THIS_BUILD); }

// Does the first word mean test i? A whole name means that test alone.
static int meant(int i, const char *word)
{
    for (int j = 0; j < TESTS; j++) if (!strcmp(tests[j].name, word)) return i == j;
    return has(tests[i].name, word);
}

// Why no test was run: it is in another build, or there is none of that name.
static void say_why_none(const char *word)
{
    static const char *const builds[] = {[ONLY_F64] = "test_f64", [ONLY_F32] = "test_f32", [BOTH] = "test_f64 and test_f32",
                                         [ON_GPU] = "test_emu_f64 (f32, bf16), or test_cuda_f64 where a GPU is"};
    const char *nearest = NULL;
    int least = INT_MAX, elsewhere = 0;
    for (int i = 0; i < TESTS; i++) {
        int d = nearness(word, tests[i].name);
        if (meant(i, word)) printf("%s is a test of build/%s\n", tests[i].name, builds[tests[i].builds]);
        elsewhere += meant(i, word);
        if (d >= least) continue;
        least = d;
        nearest = tests[i].name;
    }
    if (!elsewhere) printf("no test is called «%s»; the nearest is %s\n", word, nearest);
    for (int i = 0; i < METHODS && !elsewhere; i++)
        if (!strcmp(methods[i].name, word)) printf("%s is a method, the second word: gradients %s\n", word, word);
}

// Runs a test and prints its verdict. Returns '-' for a skipped one, 'f' for a failed one, else 'p'.
static int run_test(int i)
{
    checks = failures = asked_for = 0;
    worst = 0;
    *skipped = *nearest_case = 0;
    look_in = tests[i].look_in;
    tests[i].run();
    if (words && !asked_for && !*skipped && *nearest_case)
        snprintf(skipped, sizeof skipped, "it has no case «%s»; the nearest is %.80s", words[0], nearest_case);
    else if (words && !asked_for && !*skipped) snprintf(skipped, sizeof skipped, "its cases have no names to choose by");
    int verdict = failures ? 'f' : *skipped ? '-' : 'p';
    printf("%s %-15s %s", verdict == 'f' ? "✗" : verdict == '-' ? "-" : "✓", tests[i].name, tests[i].claim);
    if (verdict == 'f') printf(": %d of %d checks fail", failures, checks);
    else if (*skipped) printf(": skipped, %s", skipped);
    else if (worst > 0) printf("  (largest error %.2g of its tolerance)", worst);
    putchar('\n');
    fflush(stdout);
    return verdict;
}

// --train and what follows: the program itself, in this build. dev/mutants.sh needs but one build so.
int main(int argc, char **argv)
{
    if (argc > 1 && !strcmp(argv[1], "--train")) return train_main(argc - 1, argv + 1);
    spin_briefly(argv);
    const char *tmp = getenv("TMPDIR");
    int count[128] = {0}, ran = 0;
    if (argc > 2) words = argv + 2;
    options defaults = opt;
    if (snprintf(scratch, sizeof scratch, "%s/test-lora-bone-XXXXXX", tmp ? tmp : "/tmp") >= (int)sizeof scratch)
        die("TMPDIR=%s: the tests need a path of at most %zu letters", tmp, sizeof scratch - sizeof "/test-lora-bone-XXXXXX");
    if (!mkdtemp(scratch)) die("%s: %s", scratch, strerror(errno));
    setenv("D", scratch, 1);
    setenv("TRAIN", "./train", 0);
    if (!strchr(getenv("TRAIN"), ' ') && access(getenv("TRAIN"), X_OK))
        printf("note: %s is not here, which some tests run: make train\n", getenv("TRAIN"));
    if (system("head -8 data/val.jsonl > $D/few.jsonl")) die("data/val.jsonl: cannot be read");
    for (int i = 0; i < TESTS; i++) {
        if (!in_this_build(i) || (argc > 1 && !meant(i, argv[1]))) continue;
        opt = defaults;
        count[run_test(i)]++;
        ran++;
    }
    if (!ran) say_why_none(argv[1]);
    if (system("rm -rf $D")) count['f']++;
    printf("%d passed, %d failed, %d skipped\n", count['p'], count['f'], count['-']);
    return count['f'] > 0 || !ran || (words && !count['p']);
}
