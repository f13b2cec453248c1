//  paper/compare.h: the paper's comparison.
//
//  ./train --compare runs each method as a process of its own, with the ordinary options: the same rows, order and steps, and
//  as near to the number of trained parameters that Bone has at --rank as the method's rank allows. Such a run is a cell.
//  Its output and log lie in OUT/runs, and a cell whose command line is the same is not run again. From all of them come
//  OUT/steps.csv (a line a step), OUT/cells.csv (a line a cell), OUT/table.md, and by paper/compare.gp OUT/*.png.

#ifndef COMPARE_H
#define COMPARE_H
#include <sys/prctl.h>
#include <sys/wait.h>
#include "../run/checkpoint.h"
#include "../run/signals.h"

enum part { MAIN, NORMS, RANKS, SWEEP };                 // the table; first gradients; further ranks; other learning rates
static const char *const part_names[] = {"main", "norms", "ranks", "sweep"};
enum { GRADIENT, LOSS, EVAL, MATCH, SPEED, MEMORY, RESULTS };
static const struct { const char *title; int digits; } columns[RESULTS] = {
    {"first gradient norm", 2}, {"training loss", 3}, {"eval loss", 3}, {"exact match %", 1}, {"tok/s", 0}, {"peak MB", 0},
};

typedef struct {
    const char *label;                                    // a method, or biglora: lora of full rank
    enum part part;
    int rank, steps, seed;
    double lr, trains, result[RESULTS];                   // NAN where there is none
} cell;

__attribute__((format(printf, 1, 2)))
static char *text_of(const char *format, ...)
{
    char *text;
    va_list args;
    va_start(args, format);
    if (vasprintf(&text, format, args) < 0) die("out of memory");
    va_end(args);
    return text;
}

static const char *method_of(const char *label) { return strcmp(label, "biglora") ? label : "lora"; }

// What a method would train, 0 if it refuses the rank.
static size_t would_train(config c, const char *label, int rank)
{
    model m = {0};
    plan p = plan_from_options();
    p.method = method_named(method_of(label)), p.rank = rank;
    model_measure(&m, c, p);
    model_unmeasure(&m);
    return *m.refused ? 0 : m.trainable;
}

static int has_rank(const char *label) { return strcmp(label, "full") && strcmp(label, "frozen"); }

// The rank at which a method's count comes nearest to Bone's at `rank`. mini, whose point is to have less, keeps its rank.
static int matched_rank(config c, const char *label, int rank)
{
    int most = c.dim < c.hidden ? c.dim : c.hidden, best = rank;
    double wanted = (double)would_train(c, "bone", rank), nearest = INFINITY;
    if (!strcmp(label, "biglora")) return most;                                       // at least the shorter side of every W
    for (int r = 1; r <= most && strcmp(label, "mini") && has_rank(label); r++) {
        size_t n = would_train(c, label, r);
        if (n && fabs((double)n - wanted) < nearest) nearest = fabs((double)n - wanted), best = r;
    }
    return best;
}

static void add_cell(cell **list, config c, enum part part, const char *label, int rank, int seed, double lr, int steps)
{
    size_t trains = would_train(c, label, rank);
    cell new = {label, part, rank, steps, seed, lr, (double)trains, {NAN, NAN, NAN, NAN, NAN, NAN}};
    if (trains) arrput(*list, new);
    else if (part == MAIN) printf("%s has no rank that fits here, left out\n", label);
}

static cell *plan_cells(config c, int steps)
{
    static const char *const ranked[] = {"lora", "pissa", "bone", "bat", "bat-row"};
    cell *list = NULL;
    for (int s = 0; s < opt.seeds; s++)
        for (int i = 0; i <= METHODS; i++) {
            const char *label = i < METHODS ? methods[i].name : "biglora";
            int rank = matched_rank(c, label, opt.rank);
            add_cell(&list, c, MAIN, label, rank, opt.seed + s, opt.lr, steps);
        }
    for (int i = 0; i < 4; i++)
        for (int r = 1; r <= 2 * opt.rank; r *= opt.quick ? 4 : 2) add_cell(&list, c, NORMS, ranked[i], r, opt.seed, opt.lr, 1);
    for (int i = 0; i < 5 && !opt.quick; i++)
        for (int r = ceil_div(opt.rank, 4), before = 0, rank; r <= 2 * opt.rank; r *= 2, before = rank)
            if ((rank = matched_rank(c, ranked[i], r)) != before) add_cell(&list, c, RANKS, ranked[i], rank, opt.seed, opt.lr, steps);
    for (int i = 0; i <= METHODS && opt.sweep_lr; i++)
        for (double lr = opt.lr / 4; lr < 20 * opt.lr; lr *= 2) {
            const char *label = i < METHODS ? methods[i].name : "biglora";
            add_cell(&list, c, SWEEP, label, matched_rank(c, label, opt.rank), opt.seed, lr, steps);
        }
    return list;
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
        setpgid(0, 0);                                          // a terminal's Ctrl-C goes to the parent, which passes it on
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (fd < 0 || dup2(fd, STDOUT_FILENO) < 0 || dup2(fd, STDERR_FILENO) < 0) _exit(126);
        execvp(*argv, argv);
        _exit(127);
    }
    while (wait4(pid, &status, 0, usage) < 0)
        if (interrupted) kill(pid, SIGTERM);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// What a finished cell left in its log and its output. Its steps go to the CSV.
static void read_cell(cell *c, const char *text, char *log, FILE *csv)
{
    double loss, norm, lr, tokens, speed, all = 0, time = 0, sum = 0;
    int step, n = 0, last = c->steps - ceil_div(c->steps, 20), hits, of, kb;
    for (char *line = log; *line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : "") {
        sscanf(line, "{\"step\":%d,\"eval_loss\":%lf}", &step, &c->result[EVAL]);
        if (sscanf(line, "{\"step\":%d,\"loss\":%lf,\"grad_norm\":%lf,\"lr\":%lf,\"tokens\":%lf,\"tok_per_s\":%lf}", &step, &loss, &norm, &lr, &tokens, &speed) != 6) continue;
        fprintf(csv, "%s,%s,%d,%.0f,%d,%g,%d,%d,%.9g,%.9g,%.0f\n", part_names[c->part], c->label, c->rank, c->trains, c->seed, c->lr, c->steps, step, loss, norm, speed);
        if (step == 1) c->result[GRADIENT] = norm;
        if (step > last) sum += loss, n++;                      // the training loss is the mean of the last twentieth
        all += tokens, time += tokens / speed;
    }
    c->result[SPEED] = all / time, c->result[LOSS] = n == c->steps - last ? sum / n : NAN;
    if (n < c->steps - last) c->result[EVAL] = NAN;             // it diverged
    for (const char *at = text; n == c->steps - last && (at = strstr(at, "exact match ")); at++)
        if (sscanf(at, "exact match %d of %d", &hits, &of) == 2) c->result[MATCH] = 100.0 * hits / of;
    if ((text = strstr(text, "\npeak ")) && sscanf(text, "\npeak %d", &kb) == 1) c->result[MEMORY] = kb / 1e3;
}

// Runs a cell unless that is done, with the options that were given to --compare and those that are its own; then reads it.
static int run_cell(cell *c, char **shared, FILE *csv)
{
    char *base = text_of("%s/runs/%s-rank%d-lr%g-seed%d-steps%d", opt.out, c->label, c->rank, c->lr, c->seed, c->steps), **argv = NULL;
    char *done = text_of("%s.txt", base), *part = text_of("%s.part", base), *log = text_of("%s.log", base), *command = strdup("");
    char *own[] = {"--data", strdup(opt.data), "--method", strdup(method_of(c->label)), "--rank", text_of("%d", c->rank), "--lr", text_of("%.17g", c->lr),
        "--seed", text_of("%d", c->seed), "--steps", text_of("%d", c->steps), opt.val && c->part != NORMS ? "--val" : NULL, strdup(opt.val ? opt.val : ""), NULL};
    arrput(argv, "/proc/self/exe");
    for (int i = 0; i < arrlen(shared); i++) arrput(argv, shared[i]);
    for (char **o = own; *o; o++) arrput(argv, *o);
    for (int i = 1; i < arrlen(argv); i++) command = text_of("%s%s%c", command, argv[i], i + 1 < arrlen(argv) ? ' ' : '\n');
    for (char **o = (char *[]){"--out", base, "--log", log, NULL}; *o; o++) arrput(argv, *o);
    arrput(argv, NULL);

    size_t bytes;
    char *text = access(done, F_OK) ? strdup("") : read_file(done, &bytes);
    int ran = strncmp(text, command, strlen(command)) != 0;
    if (ran) {
        struct rusage usage;
        FILE *f = fopen(part, "w");
        if (!f) die("cannot write %s: %s", part, strerror(errno));
        fputs(command, f), close_checked(f, part);
        int status = run_program(argv, part, &usage);
        remove_run(base);                                       // the adapter itself is not wanted
        if (interrupted) { printf("\nstopped; the same command goes on from here\n"); exit(130); }
        text = read_file(part, &bytes);
        char *error = strstr(text, "error: ");
        if (status && !strstr(text, "a smaller --lr")) die("%s: %s", part, error ? strtok(error + 7, "\n") : "ended without saying why");
        if (!(f = fopen(part, "a"))) die("cannot write %s: %s", part, strerror(errno));
        fprintf(f, "\npeak %ld KB\n", usage.ru_maxrss), close_checked(f, part);
        if (rename(part, done)) die("cannot write %s: %s", done, strerror(errno));
        text = read_file(done, &bytes);
    }
    read_cell(c, text, read_file(log, &bytes), csv);
    return ran;
}

// Mean ± standard deviation over the seeds of a cell.
static void print_result(FILE *f, const cell *list, const cell *c, int k)
{
    double sum = 0, squares = 0, n = 0;
    for (const cell *o = list; o < list + arrlen(list); o++)
        if (o->part == c->part && !strcmp(o->label, c->label) && o->rank == c->rank && o->lr == c->lr) sum += o->result[k], squares += o->result[k] * o->result[k], n++;
    if (isfinite(sum)) fprintf(f, " %.*f", columns[k].digits, sum / n);
    else fputs(" –", f);
    if (n > 1 && isfinite(sum)) fprintf(f, " ± %.*f", columns[k].digits, sqrt(fmax(0, (squares - sum * sum / n) / (n - 1))));
    fputs(" |", f);
}

static void write_table(FILE *f, const cell *list, enum part part, const char *title)
{
    int sweep = part == MAIN && opt.sweep_lr;
    fprintf(f, "\n%s\n\n| method | rank | trains |", title);
    for (int k = 0; k < RESULTS; k++) fprintf(f, " %s |", columns[k].title);
    fprintf(f, "%s\n|---|--:|--:|%s", sweep ? " best rate | its eval loss | its exact match % |" : "", sweep ? "--:|--:|--:|" : "");
    for (int k = 0; k < RESULTS; k++) fputs("--:|", f);
    for (const cell *c = list; c < list + arrlen(list); c++) {
        if (c->part != part || (part == MAIN && c->seed != opt.seed)) continue;
        fprintf(f, "\n| %s | %.0d | %.0f |", c->label, has_rank(c->label) ? c->rank : 0, c->trains);      // %.0d of 0 is nothing
        for (int k = 0; k < RESULTS; k++) print_result(f, list, c, k);
        const cell *best = c;
        for (const cell *o = list; o < list + arrlen(list) && sweep; o++)
            if (o->part == SWEEP && !strcmp(o->label, c->label) && (o->result[EVAL] < best->result[EVAL] || best == c)) best = o;
        if (sweep) fprintf(f, " %g |", best->lr), print_result(f, list, best, EVAL), print_result(f, list, best, MATCH);
    }
    fputc('\n', f);
}

static void write_results(const cell *list, int steps)
{
    char *path = text_of("%s/cells.csv", opt.out), *table = text_of("%s/table.md", opt.out);
    FILE *f = fopen(path, "w"), *t = fopen(table, "w");
    if (!f || !t) die("cannot write %s: %s", f ? table : path, strerror(errno));
    fputs("part,method,rank,trains,seed,lr,steps,grad_norm,loss,eval_loss,exact_match,tok_per_s,peak_mb\n", f);
    for (const cell *c = list; c < list + arrlen(list); c++) {
        fprintf(f, "%s,%s,%d,%.0f,%d,%g,%d", part_names[c->part], c->label, c->rank, c->trains, c->seed, c->lr, c->steps);
        for (int k = 0; k < RESULTS; k++) fprintf(f, ",%.9g", c->result[k]);
        fputc('\n', f);
    }
    fprintf(t, "%s on %s: %d steps of %d rows, learning rate %g, %s, %d seed%s\n", opt.model, opt.data, steps, opt.batch * opt.accum, opt.lr, opt.schedule, opt.seeds, opt.seeds > 1 ? "s (mean ± standard deviation)" : "");
    write_table(t, list, MAIN, "Every method");
    if (!opt.quick) write_table(t, list, RANKS, "Further ranks, one seed: Bone's ablation (table 3 of the paper), Bat by block rows and by block columns (table 5)");
    close_checked(f, path), close_checked(t, table);
    size_t bytes;
    printf("\n%s\n", read_file(table, &bytes));
}

static void draw(void)
{
    struct rusage usage;
    char *said = text_of("%s/gnuplot.txt", opt.out);
    unlink(said);
    int status = run_program((char *[]){"gnuplot", "-c", "paper/compare.gp", strdup(opt.out), NULL}, said, &usage);
    if (status == 127) printf("no plots: gnuplot is not here. sudo apt-get install -y gnuplot-nox, then the same command draws them\n");
    else if (status) die("gnuplot failed, see %s", said);
    else printf("%s/table.md, cells.csv, steps.csv; loss.png, gradient.png, match.png, cost.png\n", opt.out);
}

static void run_compare(void)
{
    static const char *const own[] = {"--compare", "--quick", "--sweep-lr", "--seeds", "--data", "--val", "--method", "--rank", "--lr", "--seed", "--steps", "--out", "--log", NULL};
    if (opt.init || opt.adapter || opt.resume) die("--compare starts from --model alone: no --init, --adapter or --resume");
    char **shared = NULL, *runs = join(opt.out, "runs"), *path = join(opt.out, "steps.csv");
    for (int i = 0; i < OPTIONS; i++) {                         // what every cell gets, too
        int mine = !given_values[i];
        for (const char *const *o = own; *o; o++) mine |= !strcmp(*o, option_table[i].name);
        if (mine) continue;
        arrput(shared, strdup(option_table[i].name));
        if (option_table[i].kind != 'f') arrput(shared, given_values[i]);
    }
    if ((mkdir(opt.out, 0777) && errno != EEXIST) || (mkdir(runs, 0777) && errno != EEXIST)) die("--out %s: %s", opt.out, strerror(errno));
    FILE *csv = fopen(path, "w");
    if (!csv) die("cannot write %s: %s", path, strerror(errno));
    fputs("part,method,rank,trains,seed,lr,steps,step,loss,grad_norm,tok_per_s\n", csv);
    sigaction(SIGINT, &(struct sigaction){.sa_handler = on_signal}, NULL);       // without SA_RESTART: they end the wait for a cell
    sigaction(SIGTERM, &(struct sigaction){.sa_handler = on_signal}, NULL);
    int steps = opt.steps ? opt.steps : opt.quick ? 8 : 50, n;
    cell *list = plan_cells(open_config(), steps);
    double all = 0, done = 0, worked = 0, start = seconds();
    for (int i = 0; i < (n = (int)arrlen(list)); i++) all += list[i].steps + 20;      // evaluation counts as 20 steps
    printf("%d runs of up to %d steps in %s; Ctrl-C stops, the same command goes on\n\n", n, steps, opt.out);
    in_loop = 1;
    for (int i = 0; i < n; i++) {
        cell *c = &list[i];
        int left = worked > 0 ? (int)((seconds() - start) / worked * (all - done)) : 0;
        show("run %d of %d: %s rank %d seed %d, %d:%02d to go", i + 1, n, c->label, c->rank, c->seed, left / 60, left % 60);
        int ran = run_cell(c, shared, csv);
        done += c->steps + 20, worked += ran * (c->steps + 20);
        show_progress("", 1, 1);
        printf("%3d of %d  %-5s %-8s rank %-4d lr %-7.2g seed %d %s", i + 1, n, part_names[c->part], c->label, c->rank, c->lr, c->seed, ran ? "" : " (done before)");
        for (int k = 0; k < RESULTS; k++) if (isfinite(c->result[k])) printf("  %s %.*f", columns[k].title, columns[k].digits, c->result[k]);
        putchar('\n');
    }
    close_checked(csv, path);
    write_results(list, steps);
    draw();
}

#endif
