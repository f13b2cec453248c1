//  paper/compare.h: the paper's comparison.
//
//  ./train --compare runs each method as a process of its own, with the ordinary options: the same rows,
//  order and steps, and as near to the number of trained parameters that Bone has at --rank as the method's
//  rank allows. --shard LIST has each size of disha's D take a method's place, at what it trains itself. Such a
//  run is a cell, and --jobs of them run at a time. Its output and log lie in OUT/runs, and a cell whose command
//  line is the same is not run again. From all that are done come OUT/steps.csv (a line a step), OUT/cells.csv
//  (a line a cell), OUT/table.md, and by paper/compare.gp OUT/*.svg.

#ifndef COMPARE_H
#define COMPARE_H
#include <sys/prctl.h>
#include <sys/wait.h>
#include "../run/checkpoint.h"
#include "../run/signals.h"

// What a cell is for: the table; first gradients against the rank; further ranks; other learning rates.
enum part { MAIN, NORMS, RANKS, SWEEP };
static const char *const part_names[] = {"main", "norms", "ranks", "sweep"};
enum { GRADIENT, LOSS, EVAL, MATCH, SPEED, MEMORY, RESULTS };
static const struct { const char *title; int digits; } columns[RESULTS] = {
    {"first gradient norm", 2}, {"training loss", 3}, {"eval loss", 3}, {"exact match %", 1},
    {"tok/s", 0}, {"peak MB", 0},
};

typedef struct {
    const char *label;                          // a method; biglora: lora of full rank; disha-4x16: a shard
    enum part part;
    int rank, steps, seed;                      // rank 0: a shard, which has none
    int ranked;                                 // does the rank change what it trains?
    int hits;                                   // right answers, of which MATCH is the share
    double lr, trains;
    double result[RESULTS];                     // NAN where there is none
    char *base;                                 // its files in OUT/runs are BASE.txt, BASE.log and others
    pid_t process;                              // that runs it, 0 before and after
    int done;                                   // it came to its end, or diverged
} cell;

// What --method leaves of the methods: a list, or NULL where it was not given.
static const char *chosen;

// What --shard names: disha-1x1, disha-4xout, …
static char **chosen_shards;

// The AxB of such a label, NULL for any other.
static const char *shard_of(const char *label) { return strncmp(label, "disha-", 6) ? NULL : label + 6; }

static const char *method_of(const char *label)
{
    return shard_of(label) ? "disha" : strcmp(label, "biglora") ? label : "lora";
}

// A method's plan, measured: what it would train, and whether it refuses the rank or the shard.
static model measured(config c, const char *label, int rank)
{
    model m = {0};
    plan p = plan_from_options();
    p.method = method_named(method_of(label));
    p.rank = rank;
    if (shard_of(label)) read_shard(shard_of(label), p.shard);
    model_measure(&m, c, p);
    model_unmeasure(&m);
    return m;
}

// What a method would train, 0 if it refuses the rank.
static size_t would_train(config c, const char *label, int rank)
{
    model m = measured(c, label, rank);
    return *m.refused ? 0 : m.trainable;
}

// Of full and frozen, any rank trains the same.
static int has_rank(config c, const char *label)
{
    return would_train(c, label, 1) != would_train(c, label, 2);
}

// The rank at which a method's count comes nearest to Bone's at `rank`. mini, whose point is to have less,
// keeps its rank; biglora's is the shorter side of W; a shard has a size, and no rank.
static int matched_rank(config c, const char *label, int rank)
{
    int most = c.dim < c.hidden ? c.dim : c.hidden;
    if (shard_of(label)) return 0;
    if (!strcmp(label, "biglora")) return most;
    if (!strcmp(label, "mini") || !has_rank(c, label)) return rank;
    double wanted = (double)would_train(c, "bone", rank);
    double nearest = INFINITY;
    int best = rank;
    for (int r = 1; r <= most; r++) {
        double n = (double)would_train(c, label, r);
        if (n == 0 || fabs(n - wanted) >= nearest) continue;
        nearest = fabs(n - wanted);
        best = r;
    }
    return best;
}

// The methods, and one more: biglora. Behind them the shards.
static int labels(void) { return METHODS + 1 + (int)arrlen(chosen_shards); }
static const char *label_of(int i)
{
    return i < METHODS ? methods[i].name : i == METHODS ? "biglora" : chosen_shards[i - METHODS - 1];
}

// Is a method among those of --method LIST? In place of disha stand its shards, if --shard is given.
static int is_chosen(const char *label)
{
    if (chosen_shards && !strcmp(label, "disha")) return 0;
    const char *name = shard_of(label) ? "disha" : label;
    size_t n = strlen(name);
    for (const char *at = chosen; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL)
        if (strcspn(at, ",") == n && !strncmp(at, name, n)) return 1;
    return !chosen;
}

// Takes --method for the list that it is here, and stops at a name that stands for no method.
static void choose_methods(void)
{
    if (opt.method == default_method) return;
    for (const char *at = opt.method; *at; at += strcspn(at, ","), at += *at == ',') {
        int known = 0;
        for (int i = 0; i <= METHODS; i++)
            known |= strlen(label_of(i)) == strcspn(at, ",") && !strncmp(at, label_of(i), strcspn(at, ","));
        if (!known) die("--method %s: with --compare a list, such as lora,bone,full; --list shows the names", opt.method);
    }
    chosen = opt.method;
    opt.method = default_method;
}

// Takes --shard for the list that it is here, and stops at a shard that is none, twice there, or larger than a
// linear layer.
static void choose_shards(config c)
{
    const char *list = opt.shard;
    if (!list) return;
    if (!is_chosen("disha")) die("--shard is for --method disha, not for %s", chosen);
    opt.shard = NULL;                           // no other method's plan has one
    for (const char *at = list; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL) {
        int shard[2], n = (int)strcspn(at, ",");
        char pair[32];
        read_shard(n ? text_of("%.*s", n, at) : list, shard);
        char *label = text_of("disha-%s", pair_text(shard, pair));
        for (int i = 0; i < arrlen(chosen_shards); i++)
            if (!strcmp(chosen_shards[i], label)) die("--shard %s: %s twice", list, shard_of(label));
        model m = measured(c, label, 0);
        if (*m.refused) die("%s", m.refused);
        arrput(chosen_shards, label);
    }
}

static void add_cell(cell **list, config c, cell new)
{
    if (!is_chosen(new.label)) return;
    new.trains = (double)would_train(c, new.label, new.rank);
    new.ranked = has_rank(c, new.label);
    for (int k = 0; k < RESULTS; k++) new.result[k] = NAN;
    if (new.trains > 0) arrput(*list, new);
    else if (new.part == MAIN) printf("%s has no rank that fits here, left out\n", new.label);
}

// The table: every method at one learning rate, for every seed.
static void plan_main(cell **list, config c, int steps)
{
    for (int s = 0; s < opt.seeds; s++)
        for (int i = 0; i < labels(); i++) {
            int rank = matched_rank(c, label_of(i), opt.rank);
            add_cell(list, c, (cell){label_of(i), MAIN, rank, steps, opt.seed + s, .lr = opt.lr});
        }
}

// The first step at the ranks 1, 2, 4, … and the whole run at half and twice the rank.
static void plan_ranks(cell **list, config c, int steps)
{
    for (int i = 0; i < METHODS; i++)
        for (int r = 1; r <= 2 * opt.rank && has_rank(c, label_of(i)); r *= opt.quick ? 4 : 2)
            add_cell(list, c, (cell){label_of(i), NORMS, r, 1, opt.seed, .lr = opt.lr});
    for (int i = 0; i < METHODS && !opt.quick; i++) {
        int before = 0;
        for (int r = ceil_div(opt.rank, 2); r <= 2 * opt.rank && has_rank(c, label_of(i)); r *= 2) {
            int rank = matched_rank(c, label_of(i), r);
            cell new = {label_of(i), RANKS, rank, steps, opt.seed, .lr = opt.lr};
            if (rank != before) add_cell(list, c, new);
            before = rank;
        }
    }
}

static void plan_sweep(cell **list, config c, int steps)
{
    for (int i = 0; i < labels(); i++)
        for (double lr = opt.lr / 4; lr < 20 * opt.lr; lr *= 2) {
            int rank = matched_rank(c, label_of(i), opt.rank);
            add_cell(list, c, (cell){label_of(i), SWEEP, rank, steps, opt.seed, .lr = lr});
        }
}

// A method's run of the sweep with the lowest eval loss; the cell itself where none came to its end.
static const cell *best_rate(const cell *list, const cell *c)
{
    const cell *best = c;
    for (const cell *o = list; o < list + arrlen(list); o++) {
        if (o->part != SWEEP || strcmp(o->label, c->label) || isnan(o->result[EVAL])) continue;
        if (best == c || o->result[EVAL] < best->result[EVAL]) best = o;
    }
    return best;
}

// --own-lr: plans what comes next for each method whose cells are all over, of the first `begun` ones. It is run
// at half of --lr, at --lr and at twice that. While the lowest eval loss is at the lowest rate tried, half of it
// is next, and while it is at the highest, twice. Between the two it is the best, at which the table's cells are
// then run.
static void plan_own_rates(cell **list, config c, int steps, int begun)
{
    enum { FARTHEST = 64 };                     // times --lr, or that part of it
    for (int i = 0; i < labels(); i++) {
        double low = opt.lr, high = 0;
        int busy = !is_chosen(label_of(i));
        for (const cell *o = *list; o < *list + arrlen(*list); o++) {
            if (strcmp(o->label, label_of(i))) continue;
            low = fmin(low, o->lr);
            high = fmax(high, o->lr);
            busy |= o->part == MAIN || o->process || o - *list >= begun;
        }
        if (busy) continue;
        cell new = {label_of(i), SWEEP, matched_rank(c, label_of(i), opt.rank), steps, opt.seed, .lr = opt.lr};
        const cell *best = best_rate(*list, &new);
        double lr = best == &new ? low : best->lr, next = lr == high ? 2 * lr : lr / 2;
        for (int k = -1; k <= 1 && !high; k++) {
            new.lr = ldexp(opt.lr, k);
            add_cell(list, c, new);
        }
        if (!high) continue;
        int ends = lr > low && lr < high;
        ends |= next > FARTHEST * opt.lr || next < opt.lr / FARTHEST;
        for (int s = 0; s < (ends ? opt.seeds : 1); s++) {
            new.part = ends ? MAIN : SWEEP;
            new.lr = ends ? lr : next;
            new.seed = opt.seed + s;
            add_cell(list, c, new);
        }
    }
}

// Starts a program, its output appended to a file.
static pid_t start_program(char **argv, const char *to)
{
    fflush(stdout);
    pid_t pid = fork();
    if (pid < 0) die("cannot start a process: %s", strerror(errno));
    if (!pid) {
        int fd = open(to, O_WRONLY | O_CREAT | O_APPEND, 0666);
        setpgid(0, 0);                          // a terminal's Ctrl-C goes to the parent, which passes it on
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (fd < 0 || dup2(fd, STDOUT_FILENO) < 0 || dup2(fd, STDERR_FILENO) < 0) _exit(126);
        execvp(*argv, argv);
        _exit(127);
    }
    return pid;
}

static int exit_status(int status) { return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status); }

static char *next_line_of(char *line)
{
    char *end = strchr(line, '\n');
    return end ? end + 1 : "";
}

// What a line of either CSV begins with.
static const char line_titles[] = "part,method,rank,trains,seed,lr,steps";
static void begin_line(FILE *f, const cell *c)
{
    fprintf(f, "%s,%s,%d,%.0f", part_names[c->part], c->label, c->rank, c->trains);
    fprintf(f, ",%d,%g,%d", c->seed, c->lr, c->steps);
}

// What a finished cell left in its log: losses, first gradient, speed. With a CSV, its steps go there.
static void read_log(cell *c, char *log, FILE *csv)
{
    double loss, norm, lr, tokens, speed;
    double all_tokens = 0, all_seconds = 0, sum = 0;
    int step, n = 0, twentieth = ceil_div(c->steps, 20);
    for (char *line = log; *line; line = next_line_of(line)) {
        sscanf(line, "{\"step\":%d,\"eval_loss\":%lf}", &step, &c->result[EVAL]);
        int got = sscanf(line, "{\"step\":%d,\"loss\":%lf,\"grad_norm\":%lf,"
            "\"lr\":%lf,\"tokens\":%lf,\"tok_per_s\":%lf}", &step, &loss, &norm, &lr, &tokens, &speed);
        if (got != 6) continue;
        if (csv) {
            begin_line(csv, c);
            fprintf(csv, ",%d,%.9g,%.9g,%.0f\n", step, loss, norm, speed);
        }
        if (step == 1) c->result[GRADIENT] = norm;
        if (step > c->steps - twentieth) {      // the training loss is the mean of the last twentieth
            sum += loss;
            n++;
        }
        all_tokens += tokens;
        all_seconds += tokens / speed;
    }
    c->result[SPEED] = all_tokens / all_seconds;
    c->result[LOSS] = n == twentieth ? sum / n : NAN;
    if (n < twentieth) c->result[EVAL] = NAN;   // it diverged
}

// And in its output: exact match, the last that stands there, and memory.
static void read_output(cell *c, const char *text)
{
    int of, kb;
    for (const char *at = text; !isnan(c->result[LOSS]) && (at = strstr(at, "exact match ")); at++)
        if (sscanf(at, "exact match %d of %d", &c->hits, &of) == 2) c->result[MATCH] = 100.0 * c->hits / of;
    const char *peak = strstr(text, "\npeak ");
    if (peak && sscanf(peak, "\npeak %d", &kb) == 1) c->result[MEMORY] = kb / 1e3;
}

// How a cell is run, but for where it writes: the options given to --compare, then those of its own. What
// the base itself is like is not asked once a cell; and a search for the best rate goes by the eval loss and
// scores no answers.
static char **cell_options(const cell *c, char **shared)
{
    char **argv = NULL;
    arrput(argv, "/proc/self/exe");
    for (int i = 0; i < arrlen(shared); i++)
        if (!opt.own_lr || c->part == MAIN || strcmp(shared[i], "--exact-match")) arrput(argv, shared[i]);
    const struct { char *name; const char *value; } own[] = {
        {"--data", opt.data},
        {"--method", method_of(c->label)},
        {"--rank", c->rank ? text_of("%d", c->rank) : NULL},
        {"--shard", shard_of(c->label)},
        {"--lr", text_of("%.17g", c->lr)},
        {"--seed", text_of("%d", c->seed)},
        {"--steps", text_of("%d", c->steps)},
        {"--val", c->part == NORMS ? NULL : opt.val},
    };
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) {
        if (!own[i].value) continue;
        arrput(argv, own[i].name);
        arrput(argv, copy_text(own[i].value));
    }
    arrput(argv, "--no-before");
    return argv;
}

// The first line of what a cell leaves: its options. One that begins with the same line need not run again.
static char *command_line(char **argv)
{
    char *line = text_of("%s", argv[1]);
    for (int i = 2; i < arrlen(argv); i++) line = text_of("%s %s", line, argv[i]);
    return text_of("%s\n", line);
}

static FILE *open_checked(const char *path, const char *mode)
{
    FILE *f = fopen(path, mode);
    if (!f) die("cannot write %s: %s", path, strerror(errno));
    return f;
}

static void print_cell(const cell *c, int number, int of, int ran)
{
    printf("%3d of %d  %-5s %-8s ", number, of, part_names[c->part], c->label);
    printf("%-9s lr %-7.2g seed %d ", c->rank ? text_of("rank %d", c->rank) : "", c->lr, c->seed);
    if (!ran) printf(" (done before)");
    for (int k = 0; k < RESULTS; k++)
        if (isfinite(c->result[k])) printf("  %s %.*f", columns[k].title, columns[k].digits, c->result[k]);
    putchar('\n');
}

// Reads what a cell left, and prints it.
static void read_cell(cell *c, int number, int of, int ran)
{
    size_t bytes;
    c->done = 1;
    read_log(c, read_file(text_of("%s.log", c->base), &bytes), NULL);
    read_output(c, read_file(text_of("%s.txt", c->base), &bytes));
    print_cell(c, number, of, ran);
}

// Where a cell's files are. A search has names of its own: its options are not those of the table's cell at the
// same rate.
static char *base_of(const cell *c)
{
    const char *search = opt.own_lr && c->part == SWEEP ? "search-" : "";
    return text_of("%s/runs/%s%s-rank%d-lr%g-seed%d-steps%d",
                   opt.out, search, c->label, c->rank, c->lr, c->seed, c->steps);
}

// Starts a cell, or reads it if it is done. Its options and what it prints go to BASE.part, which becomes
// BASE.txt when all of it stands there. Cells at the same time share the CPUs.
static void begin_cell(cell *c, char **shared, int number, int of)
{
    c->base = base_of(c);
    char *done = text_of("%s.txt", c->base), *part = text_of("%s.part", c->base);
    char **argv = cell_options(c, shared), *command = command_line(argv);
    size_t bytes;
    if (!access(done, F_OK) && !strncmp(read_file(done, &bytes), command, strlen(command))) {
        read_cell(c, number, of, 0);
        return;
    }
    for (char **o = (char *[]){"--out", c->base, "--log", text_of("%s.log", c->base), NULL}; *o; o++)
        arrput(argv, *o);
    arrput(argv, NULL);
    unlink(done);                               // of other options, whose log this run overwrites
    FILE *f = open_checked(part, "w");
    fputs(command, f);
    close_checked(f, part);
    c->process = start_program(argv, part);
}

// A cell's process has ended: its output becomes BASE.txt, and it is read. What failed, other than by a rate
// that was too high, is said at once; the others go on.
static void end_cell(cell *c, int status, const struct rusage *usage, int number, int of)
{
    char *part = text_of("%s.part", c->base), *done = text_of("%s.txt", c->base);
    size_t bytes;
    c->process = 0;
    char **names = run_files(c->base);
    if (!access(c->base, F_OK)) remove_run(c->base, c->base, names);           // the adapter itself is not wanted
    if (interrupted) return;
    char *text = read_file(part, &bytes), *error = strstr(text, "error: ");
    if (status && !strstr(text, "a smaller --lr")) {            // a run that diverged is a result, too
        error = error ? strtok(error + 7, "\n") : "ended without saying why";
        fprintf(stderr, "note: %s: %s; the others go on\n", part, error);
        return;
    }
    FILE *f = open_checked(part, "a");
    fprintf(f, "\npeak %ld KB\n", usage->ru_maxrss);
    close_checked(f, part);
    if (rename(part, done)) die("cannot write %s: %s", done, strerror(errno));
    read_cell(c, number, of, 1);
}

// Waits until one of the cells that run comes to its end. A signal ends all of them.
static int wait_for_cell(cell *list, int *status, struct rusage *usage)
{
    pid_t pid;
    while ((pid = wait4(-1, status, 0, usage)) < 0)
        for (int i = 0; i < arrlen(list) && interrupted; i++)
            if (list[i].process) kill(list[i].process, SIGTERM);
    for (int i = 0; i < arrlen(list); i++) if (list[i].process == pid) return i;
    return -1;
}

// Cells that differ in their seed alone are one result.
static int same_but_seed(const cell *a, const cell *b)
{
    return a->part == b->part && !strcmp(a->label, b->label) && a->rank == b->rank && a->lr == b->lr;
}

// Mean ± standard deviation over the seeds of a cell.
static void print_result(FILE *f, const cell *list, const cell *c, int k)
{
    double sum = 0, squares = 0, n = 0;
    for (const cell *o = list; o < list + arrlen(list); o++) {
        if (!o->done || !same_but_seed(o, c)) continue;
        sum += o->result[k];
        squares += o->result[k] * o->result[k];
        n++;
    }
    double variance = n > 1 ? fmax(0, (squares - sum * sum / n) / (n - 1)) : 0;
    if (n > 0 && isfinite(sum)) fprintf(f, " %.*f", columns[k].digits, sum / n);
    else fputs(" –", f);
    if (isfinite(sum) && n > 1) fprintf(f, " ± %.*f", columns[k].digits, sqrt(variance));
    fputs(" |", f);
}

static void write_table(FILE *f, const cell *list, enum part part, const char *title)
{
    int sweep = part == MAIN && opt.sweep_lr, cells = 0;
    for (int i = 0; i < arrlen(list); i++) cells += list[i].part == part;
    if (!cells) return;
    fprintf(f, "\n%s\n\n| method | rank | trains |%s", title, opt.own_lr ? " learning rate |" : "");
    for (int k = 0; k < RESULTS; k++) fprintf(f, " %s |", columns[k].title);
    if (sweep) fputs(" best rate | its eval loss | its exact match % |", f);
    fprintf(f, "\n|---|--:|--:|%s", opt.own_lr ? "--:|" : "");
    for (int k = 0; k < RESULTS + 3 * sweep; k++) fputs("--:|", f);
    for (int i = 0; i < arrlen(list) * labels(); i++) {         // by methods, in their order
        const cell *c = list + i % arrlen(list);
        if (strcmp(c->label, label_of(i / (int)arrlen(list)))) continue;
        if (c->part != part || (part == MAIN && c->seed != opt.seed)) continue;
        int rank = c->ranked ? c->rank : 0;     // of which %.0d prints nothing
        fprintf(f, "\n| %s | %.0d | %.0f |", c->label, rank, c->trains);
        if (opt.own_lr) fprintf(f, " %g |", c->lr);
        for (int k = 0; k < RESULTS; k++) print_result(f, list, c, k);
        if (!sweep) continue;
        const cell *best = best_rate(list, c);
        fprintf(f, " %g |", best->lr);
        print_result(f, list, best, EVAL);
        print_result(f, list, best, MATCH);
    }
    fputc('\n', f);
}

// steps.csv and cells.csv, of the cells that are done.
static void write_lists(const cell *list)
{
    char *steps = text_of("%s/steps.csv", opt.out), *cells = text_of("%s/cells.csv", opt.out);
    size_t bytes;
    FILE *f = open_checked(steps, "w");
    fprintf(f, "%s,step,loss,grad_norm,tok_per_s\n", line_titles);
    for (const cell *c = list; c < list + arrlen(list); c++) {
        cell again = *c;
        if (c->done) read_log(&again, read_file(text_of("%s.log", c->base), &bytes), f);
    }
    close_checked(f, steps);
    f = open_checked(cells, "w");
    fprintf(f, "%s,grad_norm,loss,eval_loss,exact_match,tok_per_s,peak_mb,hits\n", line_titles);
    for (const cell *c = list; c < list + arrlen(list); c++) {
        if (!c->done) continue;
        begin_line(f, c);
        for (int k = 0; k < RESULTS; k++) fprintf(f, ",%.9g", c->result[k]);
        fprintf(f, ",%d\n", c->hits);
    }
    close_checked(f, cells);
}

static void write_tables(const cell *list, const char *title)
{
    char *path = text_of("%s/table.md", opt.out);
    FILE *f = open_checked(path, "w");
    fprintf(f, "%s%s\n", title, opt.seeds > 1 ? " (mean ± standard deviation)" : "");
    write_table(f, list, MAIN, "Every method");
    if (!opt.quick && !opt.own_lr)
        write_table(f, list, RANKS, "Further ranks, one seed: Bone's ablation (table 3 of the paper), "
            "Bat by block rows and by block columns (table 5), and the others beside them");
    close_checked(f, path);
    size_t bytes;
    printf("\n%s\n", read_file(path, &bytes));
}

static void draw(char *title)
{
    struct rusage usage;
    char *said = text_of("%s/gnuplot.txt", opt.out);
    unlink(said);
    char *gnuplot[] = {"gnuplot", "-c", "paper/compare.gp", copy_text(opt.out), title, NULL};
    int status;
    if (wait4(start_program(gnuplot, said), &status, 0, &usage) < 0) status = -1;
    status = exit_status(status);
    if (status == 127)
        printf("no plots: gnuplot is not here. "
            "sudo apt-get install -y gnuplot-nox, then the same command draws them\n");
    else if (status) die("gnuplot failed, see %s", said);
    else printf("%s/table.md, cells.csv, steps.csv; loss.svg, gradient.svg, match.svg, cost.svg%s\n", opt.out,
                chosen_shards ? ", space.svg" : "");
}

// The options that were given to --compare and that every cell gets, too.
static char **shared_options(void)
{
    static const char *const own[] = {
        "--compare", "--quick", "--sweep-lr", "--own-lr", "--jobs", "--no-before", "--seeds", "--data", "--val", "--method",
        "--shard", "--rank", "--lr", "--seed", "--steps", "--out", "--log", NULL,
    };
    char **shared = NULL;
    for (int i = 0; i < OPTIONS; i++) {
        int mine = !given_values[i];
        for (const char *const *o = own; *o; o++) mine |= !strcmp(*o, option_table[i].name);
        if (mine) continue;
        arrput(shared, copy_text(option_table[i].name));
        if (option_table[i].kind != 'f') arrput(shared, given_values[i]);
    }
    return shared;
}

// How long the cells that are not done take, in steps; an evaluation counts as 20.
static double work_left(const cell *list)
{
    double left = 0;
    for (const cell *c = list; c < list + arrlen(list); c++) left += c->done ? 0 : c->steps + 20;
    return left;
}

// Whether another cell that writes to the same files is running: one of the same options, for another part.
static int files_in_use(const cell *list, const cell *c)
{
    char *base = base_of(c);
    for (const cell *o = list; o < list + arrlen(list); o++)
        if (o->process && !strcmp(o->base, base)) return 1;
    return 0;
}

// Every cell that is planned, --jobs at a time, and with --own-lr those that their results then ask for.
static void run_cells(cell **list, config c, int steps)
{
    char **shared = shared_options();
    int next = 0, running = 0, status;
    double worked = 0, start = seconds();
    struct rusage usage;
    while (running || (next < arrlen(*list) && !interrupted)) {
        int n = (int)arrlen(*list);
        if (running < opt.jobs && next < n && !interrupted && !files_in_use(*list, *list + next)) {
            cell *new = *list + next++;
            begin_cell(new, shared, next, n);
            running += new->process != 0;
        } else {
            int to_go = worked > 0 ? (int)((seconds() - start) / worked * work_left(*list)) : 0;
            show("run %d of %d, %d:%02d to go", next, n, to_go / 60, to_go % 60);
            int i = wait_for_cell(*list, &status, &usage);
            show_progress("", 1, 1);
            if (i < 0) continue;
            end_cell(*list + i, exit_status(status), &usage, i + 1, n);
            worked += (*list)[i].steps + 20;
            running--;
        }
        if (opt.own_lr && !interrupted) plan_own_rates(list, c, steps, next);
    }
}

// Cells that run at the same time share the CPUs, unless the user says how many threads each has.
static void share_cpus(void)
{
    if (opt.jobs > 1 && !opt.threads) setenv("OMP_NUM_THREADS", text_of("%d", ceil_div(usable_cpus(""), opt.jobs)), 0);
}

static void run_compare(void)
{
    if (opt.init || opt.adapter || opt.resume)
        die("--compare starts from --model alone: no --init, --adapter or --resume");
    if (opt.own_lr && !opt.val) die("--own-lr goes by the eval loss; give --val FILE, too");
    sigaction(SIGINT, &(struct sigaction){.sa_handler = on_signal}, NULL);     // without SA_RESTART: they end
    sigaction(SIGTERM, &(struct sigaction){.sa_handler = on_signal}, NULL);    // the wait for a cell
    int steps = opt.steps ? opt.steps : opt.quick ? 8 : 50;
    choose_methods();
    config c = open_config();
    choose_shards(c);
    char *runs = join(opt.out, "runs");
    if ((mkdir(opt.out, 0777) && errno != EEXIST) || (mkdir(runs, 0777) && errno != EEXIST))
        die("--out %s: %s", opt.out, strerror(errno));
    share_cpus();
    cell *list = NULL;
    if (opt.own_lr) plan_own_rates(&list, c, steps, 0);
    else {
        plan_main(&list, c, steps);
        plan_ranks(&list, c, steps);
    }
    if (opt.sweep_lr) plan_sweep(&list, c, steps);
    printf("%td runs of up to %d steps in %s%s; ", arrlen(list), steps, opt.out, opt.own_lr ? " to begin with" : "");
    printf("Ctrl-C stops, the same command goes on\n\n");
    in_loop = 1;
    run_cells(&list, c, steps);
    const char *rate = opt.own_lr ? "a learning rate for each, sought from" : "learning rate";
    char *title = text_of("%s on %s: %d steps of %d rows, %s %g, %s, %d seed%s",
        opt.model, opt.data, steps, opt.batch * opt.accum, rate, opt.lr,
        opt.schedule, opt.seeds, opt.seeds > 1 ? "s" : "");
    write_lists(list);                          // also where all of it was done before
    write_tables(list, title);
    if (interrupted) {
        printf("stopped; the same command goes on from here\n");
        exit(130);
    }
    draw(title);
    int failed = 0;
    for (int i = 0; i < arrlen(list); i++) failed += !list[i].done;
    if (failed) die("%d of %td runs failed, and the tables are without them; the same command tries them again",
                    failed, arrlen(list));
}

#endif
