//  paper/compare.h: the paper's comparison.
//
//  ./train --compare runs each method as a process of its own, with the ordinary options: the same rows,
//  order and steps, and as near to the number of trained parameters that Bone has at --rank as the method's
//  rank allows. Such a run is a cell. Its output and log lie in OUT/runs, and a cell whose command line is
//  the same is not run again. From all of them come OUT/steps.csv (a line a step), OUT/cells.csv (a line a
//  cell), OUT/table.md, and by paper/compare.gp OUT/*.svg.

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
    const char *label;                          // a method, or biglora: lora of full rank
    enum part part;
    int rank, steps, seed;
    int ranked;                                 // does the rank change what it trains?
    int hits;                                   // right answers, of which MATCH is the share
    double lr, trains;
    double result[RESULTS];                     // NAN where there is none
} cell;

static const char *method_of(const char *label) { return strcmp(label, "biglora") ? label : "lora"; }

// What a method would train, 0 if it refuses the rank.
static size_t would_train(config c, const char *label, int rank)
{
    model m = {0};
    plan p = plan_from_options();
    p.method = method_named(method_of(label));
    p.rank = rank;
    model_measure(&m, c, p);
    model_unmeasure(&m);
    return *m.refused ? 0 : m.trainable;
}

// Of full and frozen, any rank trains the same.
static int has_rank(config c, const char *label)
{
    return would_train(c, label, 1) != would_train(c, label, 2);
}

// The rank at which a method's count comes nearest to Bone's at `rank`. mini, whose point is to have less,
// keeps its rank; biglora's is the shorter side of W.
static int matched_rank(config c, const char *label, int rank)
{
    int most = c.dim < c.hidden ? c.dim : c.hidden;
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

static void add_cell(cell **list, config c, cell new)
{
    new.trains = (double)would_train(c, new.label, new.rank);
    new.ranked = has_rank(c, new.label);
    for (int k = 0; k < RESULTS; k++) new.result[k] = NAN;
    if (new.trains > 0) arrput(*list, new);
    else if (new.part == MAIN) printf("%s has no rank that fits here, left out\n", new.label);
}

// The methods, and one more: biglora.
static const char *label_of(int i) { return i < METHODS ? methods[i].name : "biglora"; }

// The table: every method at one learning rate, for every seed.
static void plan_main(cell **list, config c, int steps)
{
    for (int s = 0; s < opt.seeds; s++)
        for (int i = 0; i <= METHODS; i++) {
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
    for (int i = 0; i <= METHODS; i++)
        for (double lr = opt.lr / 4; lr < 20 * opt.lr; lr *= 2) {
            int rank = matched_rank(c, label_of(i), opt.rank);
            add_cell(list, c, (cell){label_of(i), SWEEP, rank, steps, opt.seed, .lr = lr});
        }
}

// Runs a program, its output appended to a file. Returns its exit status; Ctrl-C ends it, too.
static int run_program(char **argv, const char *to, struct rusage *usage)
{
    int status;
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
    while (wait4(pid, &status, 0, usage) < 0)
        if (interrupted) kill(pid, SIGTERM);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

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

// What a finished cell left in its log: losses, first gradient, speed. Its steps go to the CSV.
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
        begin_line(csv, c);
        fprintf(csv, ",%d,%.9g,%.9g,%.0f\n", step, loss, norm, speed);
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

// How a cell is run, but for where it writes: the options given to --compare, then those of its own.
static char **cell_options(const cell *c, char **shared)
{
    char **argv = NULL;
    arrput(argv, "/proc/self/exe");
    for (int i = 0; i < arrlen(shared); i++) arrput(argv, shared[i]);
    const struct { char *name; const char *value; } own[] = {
        {"--data", opt.data},
        {"--method", method_of(c->label)},
        {"--rank", text_of("%d", c->rank)},
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

// Runs a cell. Its options and what it prints go to BASE.part, which is BASE.txt when all of it stands there.
static void run_anew(const char *command, char **argv, const char *base)
{
    char *part = text_of("%s.part", base), *done = text_of("%s.txt", base);
    struct rusage usage;
    size_t bytes;
    unlink(done);                               // of other options, whose log this run overwrites
    FILE *f = open_checked(part, "w");
    fputs(command, f);
    close_checked(f, part);
    int status = run_program(argv, part, &usage);
    char **names = run_files(base);
    remove_run(base, base, names);              // the adapter itself is not wanted
    if (interrupted) {
        printf("\nstopped; the same command goes on from here\n");
        exit(130);
    }
    char *text = read_file(part, &bytes), *error = strstr(text, "error: ");
    if (status && !strstr(text, "a smaller --lr"))              // a run that diverged is a result, too
        die("%s: %s", part, error ? strtok(error + 7, "\n") : "ended without saying why");
    f = open_checked(part, "a");
    fprintf(f, "\npeak %ld KB\n", usage.ru_maxrss);
    close_checked(f, part);
    if (rename(part, done)) die("cannot write %s: %s", done, strerror(errno));
}

// Runs a cell unless that is done, then reads what it left. Returns whether it ran.
static int run_cell(cell *c, char **shared, FILE *csv)
{
    char *name = text_of("%s-rank%d-lr%g-seed%d-steps%d", c->label, c->rank, c->lr, c->seed, c->steps);
    char *base = text_of("%s/runs/%s", opt.out, name);
    char *done = text_of("%s.txt", base), *log = text_of("%s.log", base);
    char **argv = cell_options(c, shared), *command = command_line(argv);
    for (char **o = (char *[]){"--out", base, "--log", log, NULL}; *o; o++) arrput(argv, *o);
    arrput(argv, NULL);

    size_t bytes;
    int ran = access(done, F_OK) || strncmp(read_file(done, &bytes), command, strlen(command));
    if (ran) run_anew(command, argv, base);
    read_log(c, read_file(log, &bytes), csv);
    read_output(c, read_file(done, &bytes));
    return ran;
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
        if (!same_but_seed(o, c)) continue;
        sum += o->result[k];
        squares += o->result[k] * o->result[k];
        n++;
    }
    double variance = n > 1 ? fmax(0, (squares - sum * sum / n) / (n - 1)) : 0;
    if (isfinite(sum)) fprintf(f, " %.*f", columns[k].digits, sum / n);
    else fputs(" –", f);
    if (isfinite(sum) && n > 1) fprintf(f, " ± %.*f", columns[k].digits, sqrt(variance));
    fputs(" |", f);
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

static void write_table(FILE *f, const cell *list, enum part part, const char *title)
{
    int sweep = part == MAIN && opt.sweep_lr;
    fprintf(f, "\n%s\n\n| method | rank | trains |", title);
    for (int k = 0; k < RESULTS; k++) fprintf(f, " %s |", columns[k].title);
    if (sweep) fputs(" best rate | its eval loss | its exact match % |", f);
    fputs("\n|---|--:|--:|", f);
    for (int k = 0; k < RESULTS + 3 * sweep; k++) fputs("--:|", f);
    for (const cell *c = list; c < list + arrlen(list); c++) {
        if (c->part != part || (part == MAIN && c->seed != opt.seed)) continue;
        int rank = c->ranked ? c->rank : 0;     // of which %.0d prints nothing
        fprintf(f, "\n| %s | %.0d | %.0f |", c->label, rank, c->trains);
        for (int k = 0; k < RESULTS; k++) print_result(f, list, c, k);
        if (!sweep) continue;
        const cell *best = best_rate(list, c);
        fprintf(f, " %g |", best->lr);
        print_result(f, list, best, EVAL);
        print_result(f, list, best, MATCH);
    }
    fputc('\n', f);
}

static void write_cells(const cell *list)
{
    char *path = text_of("%s/cells.csv", opt.out);
    FILE *f = open_checked(path, "w");
    fprintf(f, "%s,grad_norm,loss,eval_loss,exact_match,tok_per_s,peak_mb,hits\n", line_titles);
    for (const cell *c = list; c < list + arrlen(list); c++) {
        begin_line(f, c);
        for (int k = 0; k < RESULTS; k++) fprintf(f, ",%.9g", c->result[k]);
        fprintf(f, ",%d\n", c->hits);
    }
    close_checked(f, path);
}

static void write_tables(const cell *list, const char *title)
{
    char *path = text_of("%s/table.md", opt.out);
    FILE *f = open_checked(path, "w");
    fprintf(f, "%s%s\n", title, opt.seeds > 1 ? " (mean ± standard deviation)" : "");
    write_table(f, list, MAIN, "Every method");
    if (!opt.quick)
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
    int status = run_program(gnuplot, said, &usage);
    if (status == 127)
        printf("no plots: gnuplot is not here. "
            "sudo apt-get install -y gnuplot-nox, then the same command draws them\n");
    else if (status) die("gnuplot failed, see %s", said);
    else printf("%s/table.md, cells.csv, steps.csv; loss.svg, gradient.svg, match.svg, cost.svg\n", opt.out);
}

// The options that were given to --compare and that every cell gets, too.
static char **shared_options(void)
{
    static const char *const own[] = {
        "--compare", "--quick", "--sweep-lr", "--seeds", "--data", "--val", "--method",
        "--rank", "--lr", "--seed", "--steps", "--out", "--log", NULL,
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

static void print_cell(const cell *c, int number, int of, int ran)
{
    printf("%3d of %d  %-5s %-8s ", number, of, part_names[c->part], c->label);
    printf("rank %-4d lr %-7.2g seed %d %s", c->rank, c->lr, c->seed, ran ? "" : " (done before)");
    for (int k = 0; k < RESULTS; k++)
        if (isfinite(c->result[k])) printf("  %s %.*f", columns[k].title, columns[k].digits, c->result[k]);
    putchar('\n');
}

// Every cell, one after the other. How long the rest takes is counted in steps; an evaluation counts as 20.
static void run_cells(cell *list, char **shared, FILE *csv)
{
    int n = (int)arrlen(list);
    double all = 0, done = 0, worked = 0, start = seconds();
    for (int i = 0; i < n; i++) all += list[i].steps + 20;
    for (int i = 0; i < n; i++) {
        cell *c = &list[i];
        int left = worked > 0 ? (int)((seconds() - start) / worked * (all - done)) : 0;
        show("run %d of %d: %s rank %d seed %d, %d:%02d to go",
            i + 1, n, c->label, c->rank, c->seed, left / 60, left % 60);
        int ran = run_cell(c, shared, csv);
        done += c->steps + 20;
        worked += ran * (c->steps + 20);
        show_progress("", 1, 1);
        print_cell(c, i + 1, n, ran);
    }
}

static void run_compare(void)
{
    if (opt.init || opt.adapter || opt.resume)
        die("--compare starts from --model alone: no --init, --adapter or --resume");
    char *runs = join(opt.out, "runs"), *path = join(opt.out, "steps.csv");
    if ((mkdir(opt.out, 0777) && errno != EEXIST) || (mkdir(runs, 0777) && errno != EEXIST))
        die("--out %s: %s", opt.out, strerror(errno));
    FILE *csv = open_checked(path, "w");
    fprintf(csv, "%s,step,loss,grad_norm,tok_per_s\n", line_titles);
    sigaction(SIGINT, &(struct sigaction){.sa_handler = on_signal}, NULL);     // without SA_RESTART: they end
    sigaction(SIGTERM, &(struct sigaction){.sa_handler = on_signal}, NULL);    // the wait for a cell
    int steps = opt.steps ? opt.steps : opt.quick ? 8 : 50;
    config c = open_config();
    cell *list = NULL;
    plan_main(&list, c, steps);
    plan_ranks(&list, c, steps);
    if (opt.sweep_lr) plan_sweep(&list, c, steps);
    printf("%td runs of up to %d steps in %s; ", arrlen(list), steps, opt.out);
    printf("Ctrl-C stops, the same command goes on\n\n");
    in_loop = 1;
    run_cells(list, shared_options(), csv);
    close_checked(csv, path);
    char *title = text_of("%s on %s: %d steps of %d rows, learning rate %g, %s, %d seed%s",
        opt.model, opt.data, steps, opt.batch * opt.accum, opt.lr, opt.schedule,
        opt.seeds, opt.seeds > 1 ? "s" : "");
    write_cells(list);
    write_tables(list, title);
    draw(title);
}

#endif
