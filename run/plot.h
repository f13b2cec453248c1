//  run/plot.h: --plot, a run's losses and gradient norms drawn by gnuplot from its log.

#ifndef PLOT_H
#define PLOT_H
#include <sys/wait.h>
#include "checkpoint.h"

// The upper picture has the loss of every step and the eval losses, the lower one the norm of the gradient.
// Missing points are NaN, which gnuplot leaves out.
static const char plot_script[] =
    "set border 3 lc rgb '#444444'\n"
    "set grid lc rgb '#cccccc' lw 1 dt solid\n"
    "set tics nomirror\n"
    "set key top right noenhanced\n"
    "set datafile missing 'NaN'\n"
    "set lmargin 10\n"
    "set xrange [0:*]\n"
    "set multiplot layout 2,1 title title_text noenhanced\n"
    "set ylabel 'loss'\n"
    "plot $run using 1:2 with lines lc rgb '#0072b2' title 'training loss', "
    "$run using 1:3 with linespoints lc rgb '#d55e00' pt 7 title 'eval loss'\n"
    "set ylabel 'gradient norm'\n"
    "set xlabel 'step'\n"
    "set logscale y\n"
    "plot $run using 1:4 with lines lc rgb '#444444' notitle\n"
    "unset multiplot\n";

static const char *plot_terminal(void)
{
    if (ends_with(opt.plot, ".svg"))
        return "set terminal svg size 850,700 font 'sans-serif,13' background '#ffffff'\n";
    if (ends_with(opt.plot, ".png")) return "set terminal pngcairo size 850,700 font 'sans-serif,11'\n";
    die("--plot %s: expected a name that ends in .png or .svg", opt.plot);
}

static FILE *temporary_file(void)
{
    FILE *f = tmpfile();
    if (!f) die("no temporary file: %s", strerror(errno));
    return f;
}

// gnuplot, with three files for what it reads, draws and says. Returns its exit status, 127 where it is not
// here.
static int run_gnuplot(FILE *script, FILE *drawn, FILE *said)
{
    int status;
    if (ferror(script) || fflush(script) || fflush(stdout)) die("--plot: cannot write: %s", strerror(errno));
    rewind(script);
    pid_t pid = fork();
    if (pid < 0) die("cannot start a process: %s", strerror(errno));
    if (!pid) {
        FILE *const files[] = {script, drawn, said};
        for (int fd = 0; fd < 3; fd++) if (dup2(fileno(files[fd]), fd) < 0) _exit(126);
        execlp("gnuplot", "gnuplot", "-", (char *)NULL);
        _exit(127);
    }
    while (waitpid(pid, &status, 0) < 0) if (errno != EINTR) die("waitpid: %s", strerror(errno));
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// Before the run: stops if the plot could not be drawn at its end.
static void check_plot(void)
{
    struct stat st;
    FILE *script = temporary_file(), *drawn = temporary_file(), *said = temporary_file();
    char *slash = strrchr(opt.plot, '/');
    char *folder = slash ? copy_bytes(opt.plot, (size_t)(slash - opt.plot) + 1) : copy_text(".");
    fputs(plot_terminal(), script);
    if (access(folder, W_OK)) die("--plot %s: %s: %s", opt.plot, folder, strerror(errno));
    if (!stat(opt.plot, &st) && !S_ISREG(st.st_mode)) die("--plot %s: is not a file; name a file", opt.plot);
    if (opt.log && !stat(opt.log, &st) && !S_ISREG(st.st_mode))
        die("--plot is drawn from --log, and %s is not a file that could be read again", opt.log);
    int status = run_gnuplot(script, drawn, said);
    if (status == 127)
        die("--plot %s: gnuplot is not here; sudo apt-get install -y gnuplot-nox, or leave --plot out",
            opt.plot);
    if (status)
        die("--plot %s: this gnuplot cannot draw such a file; try the other of .png and .svg", opt.plot);
    fclose(script);
    fclose(drawn);
    fclose(said);
    free(folder);
}

// The points of a log: step, loss, eval loss, norm. A line at a time, since sscanf looks at all that follows.
static void write_points(FILE *script, FILE *log)
{
    char *line = NULL;
    size_t room = 0;
    double step, loss, norm;
    fputs("$run << EOD\n", script);
    while (getline(&line, &room, log) > 0) {
        if (sscanf(line, "{\"step\":%lf,\"loss\":%lf,\"grad_norm\":%lf", &step, &loss, &norm) == 3)
            fprintf(script, "%.0f %.9g NaN %.9g\n", step, loss, norm);
        else if (sscanf(line, "{\"step\":%lf,\"eval_loss\":%lf", &step, &loss) == 2)
            fprintf(script, "%.0f NaN %.9g NaN\n", step, loss);
    }
    fputs("EOD\n", script);
    if (!feof(log)) die("--plot %s: cannot read the log: %s; all else is saved", opt.plot, strerror(errno));
    free(line);
}

// Everything that a temporary file holds goes to `path`, whole or not at all.
static void keep_drawn(FILE *drawn, const char *path)
{
    char name[PATH_MAX], piece[1 << 16];
    name_beside(name, path, "tmp");
    rewind(drawn);
    FILE *f = fopen(name, "wb");
    int whole = f != NULL;
    for (size_t n; whole && (n = fread(piece, 1, sizeof piece, drawn));) whole = fwrite(piece, 1, n, f) == n;
    if (f && fclose(f)) whole = 0;
    if (whole && !ferror(drawn) && !rename(name, path)) return;
    int error = errno;
    unlink(name);
    die("--plot %s: %s; all else is saved", path, strerror(error));
}

// After the run: draws its log.
static void draw_plot(const run *r)
{
    FILE *script = temporary_file(), *drawn = temporary_file(), *said = temporary_file();
    FILE *log = opt.log ? fopen(opt.log, "r") : r->log;
    if (!log) die("--plot %s: %s: %s; all else is saved", opt.plot, opt.log, strerror(errno));
    rewind(log);
    char *title = text_of("%s on %s, learning rate %g, %s, seed %d",
                          r->m.p.method->name, opt.data, opt.lr, opt.schedule, opt.seed);
    char *safe = printable(title, "");
    for (char *c = safe; *c; c++) if (*c == '\'') *c = ' ';                  // it stands in quotes
    fprintf(script, "%stitle_text = '%s'\n", plot_terminal(), safe);
    write_points(script, log);
    fputs(plot_script, script);
    if (run_gnuplot(script, drawn, said) || ftell(drawn) < 0 || fseek(drawn, 0, SEEK_END) || !ftell(drawn))
        die("--plot %s: gnuplot failed; all else is saved, and --log has what it was to draw", opt.plot);
    keep_drawn(drawn, opt.plot);
    printf("plot in %s\n", shown(opt.plot));
    if (opt.log) fclose(log);
    fclose(script);
    fclose(drawn);
    fclose(said);
    free(title);
    free(safe);
}

#endif
