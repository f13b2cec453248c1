/*  train.c: the one training loop, the commands, main.

      1  training
      2  the commands                   fine-tune, --eval, --generate, --merge, --tokenize, --list
      3  the CPU beside the GPU         --check
      4  main                                                                                               */

#define _GNU_SOURCE
#define STB_DS_IMPLEMENTATION
#include "adapters.h"
#include "run/plot.h"
#include "run/signals.h"
#include "run/one_rank.h"
#include "paper/compare.h"

// ---- 1  training ------------------------------------------------------------------------------------------

static void show_start(int done, int of) { show_progress("the adapter's start, layer", done, of); }
static void show_answers(int done, int of) { show_progress("answering row", done, of); }

// Learning rate of step s = 0, 1, …: transformers' schedules.
static double learning_rate(int s, int steps)
{
    if (s < opt.warmup) return opt.lr * s / opt.warmup;
    double left = (double)(steps - s) / (steps > opt.warmup ? steps - opt.warmup : 1);
    if (!strcmp(opt.schedule, "linear")) return opt.lr * left;
    if (!strcmp(opt.schedule, "cosine")) return opt.lr * 0.5 * (1 + cos(3.14159265358979323846 * (1 - left)));
    return opt.lr;
}

// Mean loss over the target tokens of a data set. Its micro-batches are dealt out to the ranks, and their
// losses are added in one order.
static double evaluate(model *m, const dataset *d, long *targets)
{
    int n = (int)arrlen(d->rows), rows = n < 1024 ? n : 1024;
    batch b = batch_new(m->p.tokens, rows);
    double sum = 0, *losses = NULL;
    *targets = 0;
    for (int i = 0; i < n;) {
        batch_clear(&b);
        while (i < n && b.rows < rows && b.tokens + d->rows[i].n - 1 <= m->p.tokens)
            batch_add(&b, &d->rows[i++]);
        int mine = arrlen(losses) % ranks() == this_rank();
        arrput(losses, mine ? model_step(m, &b, 0) : 0);
        *targets += b.targets;
        show_progress("evaluating row", i, n);
    }
    ranks_add(losses, (int)arrlen(losses));
    for (int i = 0; i < arrlen(losses); i++) sum += losses[i];
    arrfree(losses);
    batch_free(&b);
    return sum / (double)*targets;
}

// Ends the program if the loss or a gradient is NaN or Inf, naming the step and the tensor. Nothing is saved.
static void check_finite(model *m, int step, double loss, double norm)
{
    if (isfinite(loss) && isfinite(norm)) return;
    if (step == 1) blame_tensor(m);
    if (step == 1) die("step 1: the loss is %g before any update, though all weights are numbers", loss);
    for (int i = 0; i < arrlen(m->tensors); i++)
        if (m->tensors[i].kind == PARAM && !isfinite(sum_of_squares(*m->tensors[i].grad)))
            die("step %d: the loss is %g and the gradient of %s is not finite; a smaller --lr may help",
                step, loss, m->tensors[i].name);
    die("step %d: the loss is %g; a smaller --lr may help", step, loss);
}

static double gradient_norm(const model *m) { return sqrt(sum_of_squares(flat(m, m->grad))); }

// AdamW on all that trains. Neighbouring tensors with the same learning rate go into one call: with every
// method but lora+ that is one call for all of them. Clipping is by PyTorch's formula. In the flat blocks of
// weights, gradients and moments each tensor begins at a row of 16 elements; rows first … end-1 wait for
// their call.
static void update(const model *m, int t, double lr, double norm)
{
    double scale = opt.clip > 0 && opt.clip / (norm + 1e-6) < 1 ? opt.clip / (norm + 1e-6) : 1;
    mat w = flat(m, m->block[PARAM]), dw = flat(m, m->grad);
    mat m1 = flat(m, m->moment1), m2 = flat(m, m->moment2);
    double rate = 0;
    int first = 0, end = 0;
    for (int i = 0; i <= arrlen(m->tensors); i++) {
        const tensor *p = i < arrlen(m->tensors) ? &m->tensors[i] : NULL;
        if (p && p->kind != PARAM) continue;
        if ((!p || p->rate != rate) && end > first) {
            int n = end - first;
            adamw(rows_of(w, first, n), rows_of(dw, first, n), rows_of(m1, first, n), rows_of(m2, first, n),
                  lr * rate, opt.weight_decay, scale, t);
            first = end;
        }
        if (!p) continue;
        rate = p->rate;
        end += (int)((elements(*p->value) + 15) / 16);
    }
}

__attribute__((format(printf, 2, 3)))
static void log_line(run *r, const char *format, ...)
{
    if (!r->log) return;
    va_list args;
    va_start(args, format);
    if (vfprintf(r->log, format, args) < 0 || fflush(r->log)) {
        fprintf(stderr, "note: cannot write %s: %s; the run goes on without its log\n",
                opt.log, strerror(errno));
        fclose(r->log);
        r->log = NULL;
        r->log_failed = 1;
    }
    va_end(args);
}

// The rows of the step to come are first … last-1 of r->order.
static void step_rows(run *r, int *first, int *last)
{
    int n = (int)arrlen(r->train.rows), rows = opt.batch * opt.accum, per_epoch = ceil_div(n, rows);
    int epoch = r->step / per_epoch;
    *first = r->step % per_epoch * rows;
    *last = *first + rows < n ? *first + rows : n;
    if (epoch != r->epoch && !opt.no_shuffle) shuffle(r->order, n, (uint64_t)opt.seed, epoch);
    r->epoch = epoch;
}

// The micro-batch that begins with the given row of r->order; the step's rows end before `last`.
static void fill_batch(const run *r, batch *b, int first, int last)
{
    batch_clear(b);
    for (int i = first; i < last && i < first + opt.batch; i++) batch_add(b, &r->train.rows[r->order[i]]);
}

// Forward and backward of `count` micro-batches, from row `first` on; the step's rows end before `last`.
// Their gradients are added to m->grad, which is zero. An even number is halved, and the sums of both halves
// are added; an odd number goes one after the other. So it is the same tree of sums, to the last bit, where
// several ranks have a part of it each (doc/ranks.md). Returns Σ loss, added up likewise.
static double sum_gradients(run *r, batch *b, int first, int last, int count, double scale, int depth)
{
    double sum = 0;
    if (count % 2) {
        for (int i = first; i < last && i < first + count * opt.batch; i += opt.batch) {
            fill_batch(r, b, i, last);
            sum += model_step(&r->m, b, scale);
        }
        return sum;
    }
    mat grad = flat(&r->m, r->m.grad);
    mat earlier = flat(&r->m, r->m.partial[depth]);
    sum = sum_gradients(r, b, first, last, count / 2, scale, depth + 1);
    copy(earlier, grad);
    zero(grad);
    sum += sum_gradients(r, b, first + count / 2 * opt.batch, last, count / 2, scale, depth + 1);
    add(grad, earlier, 1);
    return sum;
}

// The gradients of one optimiser step, from --accum micro-batches of --batch rows, of which each rank takes
// its share. Returns the mean loss over the target tokens of all its rows; *norm is the norm of the gradient
// before clipping.
static double train_step(run *r, batch *b, double *norm, int *tokens)
{
    int first, last, targets = 0, share = opt.accum / ranks();
    step_rows(r, &first, &last);
    *tokens = 0;
    for (int i = first; i < last; i++) {
        const row *of_step = &r->train.rows[r->order[i]];
        targets += learnt_tokens(of_step);
        *tokens += of_step->n - 1;
    }
    mat grad = flat(&r->m, r->m.grad);
    zero(grad);
    first += this_rank() * share * opt.batch;
    double sum = sum_gradients(r, b, first, last, share, 1.0 / targets, 0);
    sum = sum_over_ranks(grad, sum);
    *norm = gradient_norm(&r->m);
    check_finite(&r->m, r->step + 1, sum / targets, *norm);
    return sum / targets;
}

// A line of the log, the progress line, and every twentieth of the steps a line of output.
static void report_step(run *r, double loss, double norm, double lr, int tokens, double time)
{
    int every = ceil_div(r->steps, 20);
    double left = (seconds() - r->started) / (r->step - r->first) * (r->steps - r->step);
    log_line(r, "{\"step\":%d,\"loss\":%.9g,\"grad_norm\":%.9g,\"lr\":%.9g,"
                "\"tokens\":%d,\"tok_per_s\":%.0f}\n", r->step, loss, norm, lr, tokens, tokens / time);
    show("step %d/%d  loss %.4f  %.0f tok/s  %ld:%02ld to go",
         r->step, r->steps, loss, tokens / time, (long)left / 60, (long)left % 60);
    if (r->step != 1 && r->step % every && r->step < r->steps) return;
    show_progress("", 1, 1);
    printf("step %4d/%d   loss %.4f   grad norm %7.4f   lr %.2e   %6.0f tok/s\n",
           r->step, r->steps, loss, norm, lr, tokens / time);
    fflush(stdout);
}

static void print_cut(scores got)
{
    if (got.cut) printf(", %d cut off at --max-new %d", got.cut, opt.max_new);
    putchar('\n');
}

// Prints a text from a row or a model on one line.
static void show_line(const char *label, const char *text)
{
    char *line = copy_text(text);
    for (char *c = line; *c; c++)
        if (*c == '\n') *c = ' ';
    char *safe = printable(line, "\t");
    printf("%s%s", label, safe);
    free(safe);
    free(line);
}

// Validation loss; with `answers`, and if the run scores any, exact match and the first row's answer too.
static double report_eval(run *r, const char *when, int answers)
{
    if (!r->val.rows) return NAN;
    long targets;
    double loss = evaluate(&r->m, &r->val, &targets);
    if (!isfinite(loss) && !r->step) {
        blame_tensor(&r->m);
        die("the loss on %s is %g before any step, though all weights are numbers", opt.val, loss);
    }
    if (!isfinite(loss)) die("step %d: the validation loss is %g; a smaller --lr may help", r->step, loss);
    log_line(r, "{\"step\":%d,\"eval_loss\":%.9g}\n", r->step, loss);
    printf("%-10s eval loss %.4f over %ld tokens", when, loss, targets);
    if (r->scored && answers) {
        char *sample = NULL;
        scores got = exact_match(&r->m, r->t, &r->val, r->scored, &sample, show_answers);
        printf(",  exact match %d of %d", got.hits, r->scored);
        print_cut(got);
        show_line("           asked:    ", r->val.rows[0].asked);
        putchar('\n');
        show_line("           answered: ", sample);
        free(sample);
    }
    putchar('\n');
    fflush(stdout);
    return loss;
}

// The evaluation that --eval-every asks for at this step, if it has not been made: a run that was stopped
// here has it made when it is resumed. --keep-best saves what it finds to be the best so far.
static void evaluate_between(run *r)
{
    if (!opt.eval_every || r->step % opt.eval_every || r->evaluated == r->step) return;
    r->evaluated = r->step;
    double loss = report_eval(r, "", 0);
    if (opt.keep_best && note_best(r, loss)) save_run(r);
}

static int out_of_patience(const run *r) { return opt.patience && r->waited >= opt.patience; }

// Steps until --steps, or until Ctrl-C or --patience ends them: gradients, AdamW, a report; --eval-every and
// --save-every in between.
static void training_loop(run *r)
{
    batch b = batch_new(r->m.p.tokens, opt.batch);
    r->started = seconds();
    r->first = r->step;
    in_loop = 1;
    while (r->step < r->steps && !out_of_patience(r)) {
        double norm, start = seconds(), lr = learning_rate(r->step, r->steps);
        int tokens;
        double loss = train_step(r, &b, &norm, &tokens);
        update(&r->m, r->step + 1, lr, norm);
        r->step++;
        report_step(r, loss, norm, lr, tokens, seconds() - start);
        if (all_interrupted() || r->step == r->steps) break;
        evaluate_between(r);
        if (opt.save_every && r->step % opt.save_every == 0) save_run(r);
    }
    batch_free(&b);
}

// ---- 2  the commands --------------------------------------------------------------------------------------

// --init: Hugging Face's start, normal with σ = initializer_range (0.02) for matrices, ones for norms, zeros
// for biases; or the backbone's own.
static void random_weights(model *m)
{
    for (int i = 0; i < arrlen(m->tensors); i++) {
        tensor *t = &m->tensors[i];
        if (t->kind != PARAM) continue;
        rng g = rng_named(m->p.seed, t->name);
        size_t n = elements(*t->value);
        wide *x = alloc(n, sizeof *x);
        int matrix = t->shape.n[1] > 0;
        int bias = t->of && t->value == &t->of->bias;
        for (size_t j = 0; j < n; j++) x[j] = matrix ? (wide)(m->c.init_range * rng_normal(&g)) : !bias;
        if (m->c.backbone->start) m->c.backbone->start(m, t, x, &g);
        put(*t->value, x, TYPE_OF(wide));
        free(x);
    }
}

// Allocates the model's memory and reads the base's weights into it. The adapter's weights are read from
// --adapter or get their start, for which lora-ga looks at the first step's micro-batches. With --resume,
// resume_run() reads them.
static void fill_model(model *m, const batch *first, int batches)
{
    model_allocate(m);
    if (opt.init) random_weights(m);
    else m->file = checkpoint_open(opt.model, "model"), model_load(m, opt.model);
    if (!opt.resume && (!opt.adapter || m->p.method->has_start)) adapters_init(m, first, batches, show_start);
    if (!opt.resume && opt.adapter) {
        peft_read_weights(m, opt.adapter);
        peft_note_base(opt.adapter, opt.model);
    }
    if (opt.bf16) dev_bf16(1);                          // not before: a start has all digits
}

// For evaluation, generation and merging: the base, with --adapter if there is one.
static plan plan_for_use(void)
{
    if (opt.init) die("--init starts from random weights, which can only be trained; name a --model");
    if (opt.resume)
        die("--resume goes on with training; to use what was trained, give --adapter %s", opt.resume);
    plan p = plan_from_options();
    p.method = &methods[0];
    p.train = 0;
    if (opt.adapter) peft_read_config(&p, opt.adapter);
    return p;
}

// Makes the plan large enough for micro-batches of the longest rows there are, and for answers of --max-new
// tokens to `scored` rows: as many rows at once as have their keys and values in a gigabyte.
static void plan_sizes(plan *p, config c, const dataset *train, const dataset *val, int scored)
{
    int longest = longest_row(val) > longest_row(train) ? longest_row(val) : longest_row(train);
    if ((long)opt.batch * longest > INT_MAX / 4)
        die("--batch %d times %d tokens is too much; raise --accum instead", opt.batch, longest);
    if ((double)opt.batch * opt.accum * longest_row(train) > INT_MAX)
        die("--batch %d times --accum %d times %d tokens: a step can learn 2147483647 at most",
            opt.batch, opt.accum, longest_row(train));
    p->tokens = opt.batch * (longest - 1);
    p->positions = longest;
    p->halvings = p->train ? __builtin_ctz((unsigned)(opt.accum / ranks())) : 0;
    if (!scored) return;
    int answered = longest_prompt(val) + opt.max_new;
    if (answered > longest) p->positions = answered;
    double bytes = c.backbone->cache_bytes(&c, answered);
    p->sequences = (int)fmax(1, fmin(fmin(scored, MOST_SEQUENCES), floor(1e9 / bytes)));
    p->cache_rows = p->sequences * answered;
}

static double megabytes(const model *m, enum kind k)
{
    return (double)m->used[k] * (double)dtypes[type_of_kind(k)].size / 1e6;
}

// A model can go further than the positions it was trained on, but it rarely says anything sensible there.
static void print_positions(const model *m)
{
    const plan *p = &m->p;
    int most = m->c.max_pos, answered = p->sequences ? p->cache_rows / p->sequences : 0;
    if (p->positions <= most) return;
    if (p->positions > answered)
        printf("note       rows of up to %d tokens, but the model was made for %d; --seq %d cuts them\n",
               p->positions, most, most);
    else
        printf("note       prompts of up to %d tokens and answers of --max-new %d, "
               "but the model was made for %d\n", answered - opt.max_new, opt.max_new, most);
}

// What is about to happen, before anything large is allocated.
static void print_plan(const run *r)
{
    const model *m = &r->m;
    const config *c = &m->c;
    double base = base_parameters(m), trained = (double)m->trainable, state = megabytes(m, PARAM);
    printf("device     %s%s\n", dev_name(), opt.bf16 ? ", products in bf16" : "");
    if (ranks() > 1) printf("ranks      %d, threads here %d\n", ranks(), omp_get_max_threads());
    printf("model      %s: %s, %.2fM parameters, %d layers of %d, vocabulary %d\n",
           shown(opt.init ? opt.init : opt.model), c->family->name, base / 1e6, c->layers, c->dim, c->vocab);
    printf("method     %s: %s", m->p.method->name, m->p.method->equation);
    if (!full_training(m)) {
        char pair[32];
        if (m->p.shard[0]) printf(", D %s on", pair_text(m->p.shard, pair));
        else printf(", rank %d%s%s on", m->p.rank, m->p.groups[0] ? ", groups " : "",
                    m->p.groups[0] ? pair_text(m->p.groups, pair) : "");
        for (int i = 0; i < linears_of_layer(m); i++)
            if (targeted_in_some(m, i)) printf(" %s", m->linears[i]->is.name);
        if (m->p.modules) printf(" where its target_modules say so");
    }
    printf("\ntrains     %.0f parameters, %.2f %% of the model\n", trained, 100 * trained / base);
    print_rows("data", &r->train);
    if (r->val.rows) print_rows("validation", &r->val);
    print_first_row(r->t, &r->train);
    print_positions(m);
    printf("steps      %d of %d rows, at most %d tokens at a time; lr %g, %s\n",
           r->steps, opt.batch * opt.accum, m->p.tokens, opt.lr, opt.schedule);
    if (base > 2e7 && !is_given("--lr") && !this_rank())
        fprintf(stderr, "note: --lr %g, the default, is for the small model of base/; for 135 million "
                "parameters 0.00025 (full), 0.001 (bone), 0.004 (lora) were best: paper/results.md\n",
                opt.lr);
    double activations = megabytes(m, ACT) + megabytes(m, STAT) + megabytes(m, AUX);
    double work = megabytes(m, WORK) + megabytes(m, CACHE) + (double)dev_reserve(needs_of(m), 0) / 1e6;
    printf("memory     trained weights, gradients, AdamW %.1f MB; activations %.1f MB; work space %.1f MB",
           (4 + m->p.halvings) * state + megabytes(m, START), activations, work);
    putchar('\n');
    fflush(stdout);
}

// After loading: how large the base is, and whether the program reads it in its mapped file or from a copy.
static void print_base(model *m)
{
    double bytes = 0;
    int copied = 0;
    for (int i = 0; i < arrlen(m->tensors); i++) {
        const tensor *t = &m->tensors[i];
        ptrdiff_t found = t->kind == BASE ? shgeti(m->file.tensors, t->name) : -1;
        if (found < 0) continue;
        bytes += (double)elements(*t->value) * (double)dtypes[t->value->type].size;
        copied |= t->value->p != m->file.tensors[found].value.data.p;
    }
    const char *where = copied ? "copied to the device" : "mapped from its file";
    if (bytes > 0) printf("base       %.1f MB, %s\n", bytes / 1e6, where);
    putchar('\n');
    fflush(stdout);
}

// Saves, evaluates, and says what to do with the result; after Ctrl-C it saves and says how to go on.
static void finish_training(run *r)
{
    save_run(r);
    int all = all_interrupted();                        // rank 0 has saved by now
    in_loop = 0;
    if (interrupted) {
        printf("\nstopped after step %d; the same command with --resume %s goes on from there\n",
               r->step, opt.out);
        if (all) ranks_end();
        exit(128 + interrupted);
    }
    if (out_of_patience(r))
        printf("stopped    after step %d: %d evaluations without a lower loss\n", r->step, r->waited);
    double loss = report_eval(r, "after", 1);
    if (opt.keep_best && note_best(r, loss)) save_run(r);
    if (opt.keep_best)
        printf("best       eval loss %.4f after step %d, which is what %s holds\n",
               r->best, r->best_step, shown(opt.out));
    if (opt.keep_best && r->before < r->best)
        printf("           before training it was %.4f, lower than after any step; a smaller --lr may help\n",
               r->before);
    const char *template = opt.template ? text_of(" --template %s", chat.is->name) : "";
    if (full_training(&r->m)) {
        printf("\nmodel in %s. Next:\n", shown(opt.out));
        printf("  ./train --generate TEXT --model %s\n", shown(opt.out));
        return;
    }
    printf("\nadapter in %s. Next:\n", shown(opt.out));
    printf("  ./train --generate \"...\" --chat%s --model %s --adapter %s\n",
           template, shown(opt.model), shown(opt.out));
    printf("  ./train --merge merged --model %s --adapter %s\n", shown(opt.model), shown(opt.out));
}

// --dry-run: what a run would be, by two of its steps, of which the second is timed. Nothing is written.
static void try_steps(run *r)
{
    batch b = batch_new(r->m.p.tokens, opt.batch);
    double norm, loss = 0, start = 0, fed = 0, learnt = 0;
    int tokens, n = (int)arrlen(r->train.rows), per_epoch = ceil_div(n, opt.batch * opt.accum);
    struct rusage usage;
    for (int i = 0; i < 2; i++) {
        start = seconds();
        double mean = train_step(r, &b, &norm, &tokens);
        if (!i) loss = mean;
        update(&r->m, i + 1, learning_rate(r->step, r->steps), norm);
    }
    double time = seconds() - start, epochs = (double)r->steps / per_epoch;
    for (int i = 0; i < n; i++) fed += r->train.rows[i].n - 1, learnt += learnt_tokens(&r->train.rows[i]);
    long left = (long)ceil(time / tokens * fed * epochs * (r->steps - r->step) / r->steps);
    getrusage(RUSAGE_SELF, &usage);
    printf("rows       %.1f tokens each, %.1f of them learnt; the longest has %d\n",
           fed / n, learnt / n, longest_row(&r->train));
    printf("tokens     %.0f in %g epochs\n", fed * epochs, epochs);
    printf("one step   loss %.4f; %d tokens in %.2f s, %.0f tok/s\n", loss, tokens, time, tokens / time);
    printf("time       about %ld:%02ld:%02ld, without evaluations\n", left / 3600, left / 60 % 60, left % 60);
    printf("peak       %.0f MB of memory so far\n", (double)usage.ru_maxrss / 1e3);
    printf("\nA dry run: nothing was written.\n");
    batch_free(&b);
}

// A log that could not be written to its end makes the run a failure, but only once all else is saved.
static void close_log(run *r)
{
    if (!this_rank() && opt.plot && !r->log_failed) draw_plot(r);
    if (r->log && fclose(r->log)) r->log_failed = 1;
    if (r->log_failed) die("--log %s: could not be written to its end; all else is saved", opt.log);
}

// --adapter brings its method; --method may only say the same, or turn lora into lora+.
static void read_adapter_plan(plan *p)
{
    const method *asked = p->method;
    peft_read_config(p, opt.adapter);
    int plus = !strcmp(asked->name, "lora+") && !strcmp(p->method->name, "lora");
    if (opt.method != default_method && asked != p->method && !plus)
        die("--method %s: --adapter %s is %s", asked->name, opt.adapter, p->method->name);
    if (plus) p->method = asked;
}

// The first step's micro-batches, for a method whose start depends on their gradient; else none.
static batch *first_batches(run *r)
{
    batch *list = NULL;
    int first, last;
    if (!r->m.p.method->wants_gradient) return NULL;
    step_rows(r, &first, &last);
    for (int i = first; i < last; i += opt.batch) {
        batch b = batch_new(r->m.p.tokens, opt.batch);
        fill_batch(r, &b, i, last);
        arrput(list, b);
    }
    return list;
}

// Fills the model of a run; returns the steps done.
static int fill_run(run *r)
{
    batch *first = first_batches(r);
    fill_model(&r->m, first, (int)arrlen(first));
    for (int i = 0; i < arrlen(first); i++) batch_free(&first[i]);
    arrfree(first);
    r->base = base_hash(&r->m);
    return opt.resume ? resume_run(r, opt.resume) : 0;
}

// Reads everything that a run needs and lays out its memory, but allocates none of it yet.
static void open_run(run *r)
{
    *r = (run){.epoch = -1, .before = INFINITY};
    plan p = plan_from_options();
    if (opt.adapter && opt.resume) die("--resume and --adapter: give one of them");
    if (opt.adapter) read_adapter_plan(&p);
    if (opt.init && p.method != &methods[0])
        die("--init starts from nothing, so everything must train: add --method full");
    config c = open_config();
    if (c.dropout > 0)
        die("--model %s: config.json has \"attention_dropout\" %g, which is not built; to train without it, "
            "set it to 0", opt.model, c.dropout);
    r->t = open_tokenizer(opt.model, c.vocab);
    open_template(r->t);
    r->train = read_rows(r->t, opt.data, opt.seq);
    check_ids(&r->train, c.vocab);
    if (opt.val) r->val = read_rows(r->t, opt.val, opt.seq);
    check_ids(&r->val, c.vocab);
    compare_rows("--data", &r->train);
    compare_rows("--val", &r->val);
    model_measure(&r->m, c, p);
    int answers = has_answers(&r->val) && (opt.exact_match || base_parameters(&r->m) < 50e6);
    if (answers) r->scored = arrlen(r->val.rows) < SCORED ? (int)arrlen(r->val.rows) : SCORED;
    plan_sizes(&p, c, &r->train, &r->val, r->scored);
    r->m.p = p;
    layout(&r->m);
    int n = (int)arrlen(r->train.rows);
    int per_epoch = ceil_div(n, opt.batch * opt.accum);
    double steps = opt.steps ? opt.steps : ceil(opt.epochs * per_epoch);    // as transformers' Trainer rounds
    if (steps > 1e9) die("--epochs %g: makes %.0f steps, at most 1000000000", opt.epochs, steps);
    if (opt.warmup > steps) die("--warmup %d exceeds the %.0f steps of this run", opt.warmup, steps);
    r->steps = (int)steps;
    r->order = alloc((size_t)n, sizeof *r->order);
    for (int i = 0; i < n; i++) r->order[i] = i;
}

static void close_run(run *r)
{
    model_free(&r->m);
    tokenizer_free(r->t);
    free_rows(&r->train);
    free_rows(&r->val);
    free(r->order);
}

// Fine-tuning, where no other command is given: prints the plan, loads, trains, saves.
static void fine_tune(void)
{
    run r;
    if (opt.plot) plot_terminal();                      // stops at once at a name of another kind
    open_run(&r);
    print_plan(&r);
    if (!this_rank()) {
        destination = check_out("--out", opt.out, opt.model, 1);
        if (opt.log) check_log();
        if (opt.plot) check_plot();
    }
    r.step = fill_run(&r);
    compare_models(&r.m);
    print_base(&r.m);
    if (r.step > r.steps)
        die("--resume %s: has %d steps behind it, --steps asks for %d", opt.resume, r.step, r.steps);
    if (opt.dry_run) {
        try_steps(&r);
        close_run(&r);
        return;
    }
    if (!this_rank() && opt.log) r.log = open_log(opt.log, r.step);
    else if (!this_rank() && opt.plot) r.log = temporary_file();
    if (!r.step && !opt.no_before) r.before = report_eval(&r, "before", 1);
    else if (r.step < r.steps) evaluate_between(&r);
    training_loop(&r);
    finish_training(&r);
    close_log(&r);
    close_run(&r);
    free(destination.path);
}

// --eval: the loss on --val and, with --exact-match, how many of its answers the model gives word for word.
static void run_eval(void)
{
    if (!opt.val) die("--eval needs --val FILE");
    model m = {0};
    config c = open_config();
    tokenizer *t = open_tokenizer(opt.model, c.vocab);
    open_template(t);
    dataset none = {0}, val = read_rows(t, opt.val, opt.seq);
    check_ids(&val, c.vocab);
    compare_rows("--val", &val);
    plan p = plan_for_use();
    int rows = opt.exact_match ? (int)arrlen(val.rows) : 0;
    if (rows && !has_answers(&val)) die("--exact-match: not every row of %s has an answer", opt.val);
    plan_sizes(&p, c, &none, &val, rows);
    model_measure(&m, c, p);
    fill_model(&m, NULL, 0);
    compare_models(&m);
    print_rows("rows", &val);
    print_first_row(t, &val);
    print_positions(&m);
    if (rows) {
        scores got = exact_match(&m, t, &val, rows, NULL, show_answers);
        printf("exact match %d of %d, %.1f %%", got.hits, rows, 100.0 * got.hits / rows);
        print_cut(got);
    }
    long targets;
    double loss = evaluate(&m, &val, &targets);
    if (!isfinite(loss)) {
        blame_tensor(&m);
        die("the loss on %s is %g, though all weights are numbers", opt.val, loss);
    }
    printf("eval loss %.6f over %ld tokens\n", loss, targets);
    model_free(&m);
    tokenizer_free(t);
    free_rows(&val);
}

// Goes on with a sequence to its end and prints the tokens behind the first `from` as they come. The first
// pass feeds all that is not in the cache of keys and values, each later one the token before.
static void continue_sequence(model *m, const tokenizer *t, sequence *s, batch *b, rng *g, int from)
{
    size_t printed = 0;
    int who;
    do {
        print_more(t, s->ids + from, s->n - from, 0, &printed);
    } while (generate_pass(m, t, s, 1, b, &who, g));
    print_more(t, s->ids + from, s->n - from, 1, &printed);
    putchar('\n');
}

// A model for sequences of up to so many tokens, of which that many are fed at once.
static void open_for_text(model *m, config c, int fed, int room)
{
    plan p = plan_for_use();
    p.tokens = fed;
    p.positions = room;
    p.cache_rows = room;
    model_measure(m, c, p);
    fill_model(m, NULL, 0);
}

// --generate: goes on with a text, or with --chat answers it.
static void run_generate(void)
{
    model m = {0};
    config c = open_config();
    tokenizer *t = open_tokenizer(opt.model, c.vocab);
    message *turns = NULL;
    say(&turns, USER, copy_text(opt.generate), 0);
    if (opt.chat) open_template(t);
    row prompt = opt.chat ? encode_question(t, turns) : encode_row(t, opt.generate, "", 0);
    if (!prompt.n) die("--generate: an empty TEXT, and this model has no BOS to begin with");
    sequence s = {.n = prompt.n, .room = prompt.n + opt.max_new};
    s.ids = alloc((size_t)s.room, sizeof(int));
    memcpy(s.ids, prompt.ids, (size_t)prompt.n * sizeof(int));
    open_for_text(&m, c, prompt.n, s.room);
    batch b = batch_new(prompt.n, 1);
    rng g = rng_named((uint64_t)opt.seed, "generate");
    int from = opt.chat ? prompt.n : tokenizer_bos(t) >= 0;     // prints neither BOS nor a chat's prompt
    continue_sequence(&m, t, &s, &b, &g, from);
    batch_free(&b);
    model_free(&m);
    tokenizer_free(t);
    free_dialogue(turns);
    free_row(&prompt);
    free(s.ids);
}

// The next line of standard input that is not blank, in a fresh string; NULL at its end.
static char *read_turn(void)
{
    char *line = NULL;
    size_t room = 0;
    for (;;) {
        if (isatty(STDIN_FILENO)) fputs("> ", stdout), fflush(stdout);
        ssize_t n = getline(&line, &room, stdin);
        if (n < 0) break;
        while (n && strchr("\r\n", line[n - 1])) line[--n] = 0;
        if (!is_blank(line)) return line;
    }
    if (!feof(stdin)) die("cannot read standard input: %s", strerror(errno));
    free(line);
    return NULL;
}

// --chat alone: a dialogue, a line of standard input a turn. Each turn is encoded with all those before, as a
// row of several turns is; what the cache has of it already is not fed again.
static void run_chat(void)
{
    enum { MOST = 4096 };
    model m = {0};
    config c = open_config();
    tokenizer *t = open_tokenizer(opt.model, c.vocab);
    int room = c.max_pos < MOST ? c.max_pos : MOST;
    sequence s = {.ids = alloc((size_t)room, sizeof(int))};
    message *turns = NULL;
    open_template(t);
    open_for_text(&m, c, room, room);
    batch b = batch_new(room, 1);
    rng g = rng_named((uint64_t)opt.seed, "generate");
    for (char *line; (line = read_turn());) {
        say(&turns, USER, line, 0);
        row asked = encode_question(t, turns);
        if (asked.n >= room)
            die("this dialogue has %d tokens, which leave no room of %d; begin a new one", asked.n, room);
        int known = 0;
        while (known < s.cached && known < asked.n - 1 && s.ids[known] == asked.ids[known]) known++;
        if (m.c.backbone->has_state && known < s.cached) known = 0;         // a state cannot go back
        memcpy(s.ids, asked.ids, (size_t)asked.n * sizeof(int));
        s = (sequence){.ids = s.ids, .n = asked.n, .cached = known,
                       .room = asked.n + opt.max_new < room ? asked.n + opt.max_new : room};
        continue_sequence(&m, t, &s, &b, &g, asked.n);
        say(&turns, ASSISTANT, spelled_out(t, s.ids, asked.n, s.n - s.ended), 1);
        free_row(&asked);
    }
    batch_free(&b);
    model_free(&m);
    tokenizer_free(t);
    free_dialogue(turns);
    free(s.ids);
}

// Merging into a 16-bit base rounds W + update to 16 bits, and where the update is smaller than W's last bit,
// nothing of it remains. Returns the part of the update that does, (update · rounded update) / (update ·
// update), or NaN if it is zero.
static double update_survived(model *m, linear *l, enum dtype type)
{
    size_t n = elements(l->W);
    wide *W = alloc(n, sizeof *W), *after = alloc(n, sizeof *after);
    double both = 0, wanted = 0;
    get(W, l->W);
    get(after, merged(m, l));
    for (size_t i = 0; i < n; i++) {
        double update = (double)after[i] - (double)W[i];
        double kept = rounded((double)after[i], type) - (double)W[i];
        both += update * kept;
        wanted += update * update;
    }
    free(W);
    free(after);
    return both / wanted;
}

// A GPU that computes in bf16 has rounded a float base to bf16; merging there would save it rounded.
static void refuse_rounded(model *m)
{
    for (int i = 0; i < arrlen(m->tensors); i++) {
        const tensor *t = &m->tensors[i];
        ptrdiff_t found = t->kind == BASE ? shgeti(m->file.tensors, t->name) : -1;
        enum dtype file = found < 0 ? t->value->type : m->file.tensors[found].value.data.type;
        if (file != t->value->type)
            die("--merge: %s is %s and would be rounded to %s here; ./train --merge keeps it",
                t->name, dtypes[file].name, dtypes[t->value->type].name);
    }
}

// --merge: writes the base with the adapter in its weights, and says how much of it rounding to 16 bits
// leaves.
static void run_merge(void)
{
    if (!opt.adapter) die("--merge needs --adapter DIR");
    model m = {0};
    plan p = plan_for_use();
    model_measure(&m, open_config(), p);
    place_of_result out = check_out("--merge", opt.merge, opt.model, 0);
    fill_model(&m, NULL, 0);
    refuse_rounded(&m);
    stage_begin(out.path);
    stage_model(&m, opt.model, F32);
    for (int i = 0; i < arrlen(m.linears); i++) {
        linear *l = m.linears[i];
        if (!has_adapter(l) || (l->W.type != BF16 && l->W.type != F16)) continue;
        double survived = update_survived(&m, l, l->W.type);
        printf("layer %2d %-4s  ", l->depth, l->is.name);
        const char *type = dtypes[l->W.type].name;
        if (isnan(survived)) printf("its update is zero, or too small for a number of this program\n");
        else printf("%5.1f %% of the update survive rounding to %s\n", 100 * survived, type);
    }
    stage_publish(&out);
    free(out.path);
    printf("model with %s merged in: %s\n", opt.adapter, opt.merge);
    model_free(&m);
}

// --tokenize: prints the token ids of every "text" of a file of JSON objects, a list a line.
static void run_tokenize(void)
{
    tokenizer *t = open_tokenizer(opt.model, 0);
    size_t bytes, n;
    char *whole;
    const char *file = read_utf8(opt.tokenize, &whole, &bytes);
    row_reader r = read_json_rows(opt.tokenize, file, bytes);
    for (json_t *json; (json = next_row(&r)); json_decref(json)) {
        const char *text = text_field(r.where, json, "text");
        if (!text) die("%s: expected a JSON object with \"text\"", r.where);
        int *ids = ids_of(t, text, 1, &n);
        putchar('[');
        for (size_t i = 0; i < n; i++) printf("%s%d", i ? "," : "", ids[i]);
        puts("]");
        free(ids);
    }
    free(whole);
    tokenizer_free(t);
}

// --list: every method, its equation, and how much of this model it trains at this rank, or why it cannot.
static void run_list(void)
{
    config c = open_config();
    plan p = plan_from_options();
    printf("%-9s %-44s %14s   on %s, rank %d\n", "method", "", "trains", shown(opt.model), opt.rank);
    for (int i = 0; i < METHODS; i++) {
        model m = {0};
        p.method = &methods[i];
        model_measure(&m, c, p);
        int without_column = 0;         // printf pads by bytes: the later ones of a character take no column
        for (const char *e = methods[i].equation; *e; e++) without_column += (*e & 0xc0) == 0x80;
        printf("%-9s %-*s ", methods[i].name, 44 + without_column, methods[i].equation);
        double trains = (double)m.trainable, all = base_parameters(&m);
        if (*m.refused) printf("%14s   %s\n", "-", m.refused);
        else printf("%14zu   %8.2fM  %6.2f %%\n", m.trainable, trains / 1e6, 100 * trains / all);
        model_unmeasure(&m);
    }
    free(c.text);
}

// ---- 3  the CPU beside the GPU ----------------------------------------------------------------------------
//
//  A program that runs on a GPU links this file twice: with train.cu's ops, and once more with ops/cpu.c in
//  double, of which the linker sees nothing but step_tensors, under the name reference_step. Both halves take
//  one step from the same seed, and every activation, gradient and updated parameter is compared by its name.

typedef struct { char name[128]; size_t n; double *x; } snapshot;       // what a tensor held, on the host

// Appends what matrix m holds, under the name prefix + name.
static snapshot *take(snapshot *list, const char *prefix, const char *name, mat m)
{
    snapshot s = {.n = elements(m)};
    wide *x = alloc(s.n, sizeof *x);
    snprintf(s.name, sizeof s.name, "%s%s", prefix, name);
    s.x = alloc(s.n, sizeof *s.x);
    get(x, m);
    for (size_t i = 0; i < s.n; i++) s.x[i] = (double)x[i];
    free(x);
    arrput(list, s);
    return list;
}

// Appends all tensors of some kinds (a bit a kind), or their gradients.
static snapshot *take_kinds(snapshot *list, const char *prefix, const model *m, int kinds, int grad)
{
    for (int i = 0; i < arrlen(m->tensors); i++) {
        const tensor *t = &m->tensors[i];
        if (kinds >> t->kind & 1) list = take(list, prefix, t->name, grad ? *t->grad : *t->value);
    }
    return list;
}

static void snapshots_free(snapshot *list)
{
    for (int i = 0; i < arrlen(list); i++) free(list[i].x);
    arrfree(list);
}

// Overwrites tensors of some kinds, or their gradients, with the other half's values of the same name.
static void give_kinds(const model *m, const snapshot *list, const char *prefix, int kinds, int grad)
{
    size_t n = strlen(prefix);
    for (int i = 0; i < arrlen(list); i++)
        for (int j = 0; j < arrlen(m->tensors) && !strncmp(list[i].name, prefix, n); j++) {
            const tensor *t = &m->tensors[j];
            if (kinds >> t->kind & 1 && !strcmp(list[i].name + n, t->name))
                put(grad ? *t->grad : *t->value, list[i].x, F64);
        }
}

// Adds normal noise to what an adapter trains; both halves draw the same noise from the same generator. At
// its start LoRA's B is zero, so dA is zero too, and lora-ga's dA is the difference of equal numbers: a
// comparison there would check half of the backward pass.
static void shake(model *m, double size, rng *g)
{
    for (int i = 0; i < arrlen(m->tensors); i++) {
        tensor *t = &m->tensors[i];
        if (t->kind != PARAM || full_training(m)) continue;
        size_t n = elements(*t->value);
        wide *x = alloc(n, sizeof *x);
        get(x, *t->value);
        for (size_t j = 0; j < n; j++) x[j] += (wide)(size * rng_normal(g));
        put(*t->value, x, TYPE_OF(wide));
        free(x);
    }
}

// One step of training on b. Returns what it leaves: the start, activations, gradients and updated
// parameters. `other`: what the step left in the other half, or NULL. This half takes two things over from
// there, each after its own values are in the list. The start: where two singular values are nearly equal,
// rounding decides which mix of their singular vectors the SVD finds, so A and B of pissa, olora and lora-ga
// would differ. And the gradients: AdamW divides by |g|, so if a gradient is zero but for rounding, the sign
// of that rounding would decide the sign of the whole update.
static snapshot *snapshots_of_step(model *m, const batch *b, const snapshot *other)
{
    int start = 1 << PARAM | 1 << START;
    snapshot *list = take_kinds(NULL, "start ", m, start, 0);
    give_kinds(m, other, "start ", start, 0);
    model_step(m, b, 1.0 / b->targets);
    list = take_kinds(list, "", m, 1 << ACT | 1 << STAT, 0);
    list = take_kinds(list, "d ", m, 1 << PARAM, 1);
    give_kinds(m, other, "d ", 1 << PARAM, 1);
    update(m, 1, opt.lr, gradient_norm(m));
    return take_kinds(list, "updated ", m, 1 << PARAM, 0);
}

// The first step that these options ask for, begun a little off the adapter's start.
snapshot *step_tensors(int argc, char **argv, const snapshot *other);
snapshot *step_tensors(int argc, char **argv, const snapshot *other)
{
    run r;
    parse_options(argc, argv);
    open_run(&r);
    fill_run(&r);
    rng noise = rng_named((uint64_t)opt.seed, "off the start");
    shake(&r.m, 0.02, &noise);
    batch b = batch_new(r.m.p.tokens, opt.batch);
    int first, last;
    step_rows(&r, &first, &last);
    fill_batch(&r, &b, first, last);
    snapshot *list = snapshots_of_step(&r.m, &b, other);
    batch_free(&b);
    close_run(&r);
    return list;
}

typedef struct { double norm[2], error; } compared;

// The relative L2 distance of `got` to `want`. Two tensors of zeros agree: LoRA's dA is zero at its start.
static compared compare(const snapshot *want, const snapshot *got)
{
    double sums[3] = {0};
    for (size_t i = 0; i < want->n && want->n == got->n; i++) {
        double d = want->x[i] - got->x[i];
        sums[0] += want->x[i] * want->x[i];
        sums[1] += got->x[i] * got->x[i];
        sums[2] += d * d;
    }
    double error = sums[2] == 0 ? 0 : sqrt(sums[2] / sums[0]);
    if (want->n != got->n || strcmp(want->name, got->name)) error = NAN;
    return (compared){{sqrt(sums[0]), sqrt(sums[1])}, error};
}

// In double and float: what the rounding of thousands of additions may add up to. bf16 keeps 8 bits, and its
// error of 2^-9 grows from layer to layer: PyTorch's own bf16 gradients of the bundled model are off by a few
// per cent on most rows, and by 0.24 on some.
static double check_tolerance(void) { return sizeof(real) == 8 ? 1e-12 : sizeof(real) == 4 ? 1e-5 : 0.25; }

static int print_compared(const char *name, compared c)
{
    int ok = c.error <= check_tolerance();
    printf("%-70s %12.6g %12.6g   %8.2e %s\n", name, c.norm[0], c.norm[1], c.error, ok ? "✓" : "✗");
    return ok;
}

// The other half; absent from ./train.
__attribute__((weak)) snapshot *reference_step(int argc, char **argv, const snapshot *other);

// --check: compares a step on the CPU and the same on the GPU, tensor by tensor. Returns the exit status.
static int run_check(int argc, char **argv)
{
    if (!reference_step)
        die("--check compares a GPU with the CPU: ./train_cuda --check, "
            "or ./train_emu --check without a GPU");
    snapshot *want = reference_step(argc, argv, NULL), *got = step_tensors(argc, argv, want);
    int n = (int)arrlen(want), right = n == arrlen(got), worst = 0;
    compared most = {.error = -1};
    printf("%-70s %12s %12s   %8s\n", "one step: tensor", "norm, CPU", "norm, GPU", "error");
    for (int i = 0; i < n && i < arrlen(got); i++) {
        if (!strncmp(want[i].name, "start ", 6)) continue;          // taken over from the CPU, not computed
        compared c = compare(&want[i], &got[i]);
        right &= print_compared(want[i].name, c);
        if (c.error <= most.error) continue;                        // false for NaN, which becomes the worst
        most = c;
        worst = i;
    }
    printf("\nGPU: %s. Relative error allowed: %.0e. The worst:\n", dev_name(), check_tolerance());
    print_compared(want[worst].name, most);
    snapshots_free(want);
    snapshots_free(got);
    return right ? 0 : 1;
}

// ---- 4  main ----------------------------------------------------------------------------------------------

// Prepares for signals, reads the options, runs the one command they name.
int main(int argc, char **argv)
{
    open_descriptors();
    spin_briefly(argv);
    setvbuf(stdout, NULL, _IOLBF, 0);
    int status = 0;
    ranks_begin();
    atexit(stage_discard);
    catch_cut_files();
    catch_signals();
    parse_options(argc, argv);
    check_device();
    check_ranks();
    if (opt.help) print_help();
    else if (opt.version) puts("train " VERSION);
    else if (opt.list) run_list();
    else if (opt.tokenize) run_tokenize();
    else if (opt.merge) run_merge();
    else if (opt.generate) run_generate();
    else if (opt.chat) run_chat();
    else if (opt.eval) run_eval();
    else if (opt.check) status = run_check(argc, argv);
    else if (opt.compare) run_compare();
    else fine_tune();
    if (fflush(stdout) || ferror(stdout)) die("cannot write all of standard output; is its disk full?");
    return status;
}
