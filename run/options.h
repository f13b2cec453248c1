//  run/options.h: one table that drives the parser, --help and the printed settings.

#ifndef OPTIONS_H
#define OPTIONS_H
#include "../adapters.h"
#include "ranks.h"
#include "threads.h"
#include <ctype.h>

#define VERSION "0.9"

typedef struct {
    const char *model, *init, *adapter, *data, *val, *out, *log, *resume, *method, *targets, *schedule, *shard, *groups;
    const char *template, *plot;
    const char *generate, *merge, *tokenize;
    int eval, list, help, version, check, compare, quick, sweep_lr, own_lr, jobs, no_before, seeds, tf32, bf16, chat, exact_match,
        no_shuffle;
    int rank, mini_r, dora_detach, steps, batch, accum, recompute, seq, warmup, seed, threads, eval_every, save_every;
    int max_new, keep_best, patience, dry_run;
    double epochs, alpha, plus_ratio, lr, weight_decay, clip, temperature, top_p;
} options;

static const char default_method[] = "bone";

static options opt = {
    .model = "base", .method = default_method, .targets = "all", .schedule = "cosine",
    .rank = 32, .mini_r = 8, .epochs = 1, .batch = 16, .accum = 1, .seq = 256, .seed = 1, .seeds = 1, .jobs = 1, .max_new = 128,
    .plus_ratio = 16, .lr = 4e-3, .clip = 1, .top_p = 1,
};

// kind: h a heading of --help, s text, i whole number, d number, f flag. Numbers are checked against [least, most].
// `same`: a run may be resumed only with the same. The commands, below the first heading, exclude each other.
#define AT(field) offsetof(options, field)
enum { ANY, SAME };
static const struct option {
    const char *name, *value;
    char kind;
    int same;
    size_t at;
    double least, most;
    const char *help;
} option_table[] = {
    {"commands, one at a time; fine-tuning where there is none", "", 'h', ANY, 0, 0, 0, ""},
    {"--eval",            "",       'f', ANY,  AT(eval),         0, 0, "print the loss of --model (and --adapter) on --val"},
    {"--generate",        "TEXT",   's', ANY,  AT(generate),     0, 0, "continue TEXT"},
    {"--merge",           "DIR",    's', ANY,  AT(merge),        0, 0,
     "write --model with --adapter merged in as a model directory"},
    {"--tokenize",        "FILE",   's', ANY,  AT(tokenize),     0, 0, "print one JSON array of ids per row's \"text\""},
    {"--check",           "",       'f', ANY,  AT(check),        0, 0,
     "one step on the CPU and one on the GPU, a little off the adapter's start, tensor by tensor (train_cuda, train_emu)"},
    {"--list",            "",       'f', ANY,  AT(list),         0, 0, "print the methods and what each would train on --model"},
    {"--compare",         "",       'f', ANY,  AT(compare),      0, 0, "the paper's experiments: see the end of this page"},

    {"models and files", "", 'h', ANY, 0, 0, 0, ""},
    {"--model",           "DIR",    's', SAME, AT(model),        0, 0, "base model, a Hugging Face directory"},
    {"--init",            "CONFIG", 's', ANY,  AT(init),         0, 0,
     "start from random weights of this config.json (with --method full; tokenizer from --model)"},
    {"--adapter",         "DIR",    's', ANY,  AT(adapter),      0, 0, "adapter to use, or to go on training"},
    {"--data",            "FILE",   's', SAME, AT(data),         0, 0,
     "rows to train on: .jsonl, .json or .txt (default data/train.jsonl)"},
    {"--val",             "FILE",   's', ANY,  AT(val),          0, 0,
     "rows to evaluate on (default data/val.jsonl, with the default --data)"},
    {"--template",        "NAME",   's', SAME, AT(template),     0, 0,
     "how rows and chats are written: alpaca, llama2, llama3, chatml, … (default: the model's own, else alpaca)"},
    {"--out",             "DIR",    's', ANY,  AT(out),          0, 0,
     "where the result goes (default out; with --compare, compare)"},
    {"--log",             "FILE",   's', ANY,  AT(log),          0, 0, "one JSON object a step"},
    {"--resume",          "DIR",    's', ANY,  AT(resume),       0, 0, "go on from what an earlier run left in DIR"},
    {"--plot",            "FILE",   's', ANY,  AT(plot),         0, 0,
     "draw loss, eval loss and gradient norm when the run is over, as .png or .svg (by gnuplot)"},
    {"--save-every",      "N",      'i', ANY,  AT(save_every),   0, 1e9, "also save every N steps (0: at the end only)"},

    {"the adapter", "", 'h', ANY, 0, 0, 0, ""},
    {"--method",          "M",      's', SAME, AT(method),       0, 0, "see --list; with --compare a list: only these"},
    {"--rank",            "R",      'i', SAME, AT(rank),         1, 1 << 20, "rank of the adapter"},
    {"--alpha",           "A",      'd', SAME, AT(alpha),        1e-9, 1e9, "LoRA's α (default: the rank, so that α/r = 1)"},
    {"--mini-r",          "R",      'i', SAME, AT(mini_r),       1, 1 << 20, "columns of mini's D"},
    {"--shard",           "AxB",    's', SAME, AT(shard),        0, 0,
     "size of disha's D; a side may be in or out: 64xout is Bone (default: the rank, both); with --compare a list"},
    {"--groups",          "PxQ",    's', SAME, AT(groups),       0, 0,
     "with --method bat: so many B along out and along in; outx1 is Bat, 1xin bat-row"},
    {"--targets",         "LIST",   's', SAME, AT(targets),      0, 0, "linear layers that get the adapter"},
    {"--lora-plus-ratio", "λ",      'd', SAME, AT(plus_ratio),   1e-9, 1e9, "LoRA+: B's learning rate over A's"},
    {"--dora-detach",     "",       'f', SAME, AT(dora_detach),  0, 0, "DoRA: no gradient through the norm, as in PEFT"},

    {"training", "", 'h', ANY, 0, 0, 0, ""},
    {"--steps",           "N",      'i', SAME, AT(steps),        1, 1e9, "optimiser steps (default: by --epochs)"},
    {"--epochs",          "X",      'd', ANY,  AT(epochs),       1e-9, 1e6, "passes over --data; half of one is 0.5"},
    {"--batch",           "B",      'i', SAME, AT(batch),        1, 1 << 20, "rows a micro-batch"},
    {"--accum",           "K",      'i', SAME, AT(accum),        1, 1 << 20, "micro-batches a step"},
    {"--seq",             "T",      'i', SAME, AT(seq),          2, 1 << 20, "tokens a row at most"},
    {"--lr",              "X",      'd', SAME, AT(lr),           0, 1e9, "learning rate"},
    {"--schedule",        "S",      's', SAME, AT(schedule),     0, 0, "cosine, linear or constant"},
    {"--warmup",          "N",      'i', SAME, AT(warmup),       0, 1e9, "steps in which the learning rate rises from 0"},
    {"--weight-decay",    "X",      'd', SAME, AT(weight_decay), 0, 1e9, "AdamW's decoupled decay"},
    {"--clip",            "X",      'd', SAME, AT(clip),         0, 1e30, "clip the gradient's norm at X (0: never)"},
    {"--seed",            "N",      'i', SAME, AT(seed),         0, 2e9,
     "of the adapter's start, the order of rows, and sampling"},
    {"--no-shuffle",      "",       'f', SAME, AT(no_shuffle),   0, 0, "rows in the order of the file"},
    {"--eval-every",      "N",      'i', ANY,  AT(eval_every),   0, 1e9,
     "evaluate every N steps (0: never); always before the first and after the last"},
    {"--no-before",       "",       'f', ANY,  AT(no_before),    0, 0, "do not evaluate before the first step"},
    {"--keep-best",       "",       'f', ANY,  AT(keep_best),    0, 0,
     "--out holds what had the lowest eval loss, not what came last"},
    {"--patience",        "N",      'i', ANY,  AT(patience),     1, 1e9,
     "with --keep-best: stop after N evaluations without a lower loss"},
    {"--dry-run",         "",       'f', ANY,  AT(dry_run),      0, 0,
     "print the plan, time one step, write nothing"},
    {"--exact-match",     "",       'f', ANY,  AT(exact_match),  0, 0,
     "score answers to --val, too (training does so by itself with small models)"},

    {"generation", "", 'h', ANY, 0, 0, 0, ""},
    {"--chat",            "",       'f', ANY,  AT(chat),         0, 0,
     "answer --generate's TEXT; without it, a dialogue: a line of standard input a turn"},
    {"--max-new",         "N",      'i', ANY,  AT(max_new),      1, 1 << 20, "tokens to generate at most"},
    {"--temperature",     "X",      'd', ANY,  AT(temperature),  0, 1e6, "sample with this temperature (0: the likeliest token)"},
    {"--top-p",           "X",      'd', ANY,  AT(top_p),        1e-9, 1,
     "sample from the likeliest tokens of this total probability"},

    {"the machine", "", 'h', ANY, 0, 0, 0, ""},
    {"--threads",         "N",      'i', ANY,  AT(threads),      1, 4096,
     "CPU threads (default: all); the result is the same for any number"},
    {"--recompute",       "N",      'i', ANY,  AT(recompute),    0, 2,
     "keep less for the backward pass: 1 not gate and up, 2 only each layer's input"},
    {"--tf32",            "",       'f', SAME, AT(tf32),         0, 0,
     "on a GPU, let products of floats round their factors to 10 bits: faster"},
    {"--bf16",            "",       'f', SAME, AT(bf16),         0, 0,
     "round the factors of products to 8 bits (train_cuda always does): faster with AVX512_BF16, slower without"},

    {"the paper's experiments: --compare trains every method on the same rows, for CSV, table and plots",
     "", 'h', ANY, 0, 0, 0, ""},
    {"--quick",           "",       'f', ANY,  AT(quick),        0, 0, "a fifth of the work"},
    {"--seeds",           "N",      'i', ANY,  AT(seeds),        1, 1000, "N seeds each, from --seed on, and their spread"},
    {"--sweep-lr",        "",       'f', ANY,  AT(sweep_lr),     0, 0, "at a quarter to sixteen times --lr, too"},
    {"--own-lr",          "",       'f', ANY,  AT(own_lr),       0, 0,
     "the table alone, each method at its best rate, sought from --lr on by factors of 2"},
    {"--jobs",            "N",      'i', ANY,  AT(jobs),         1, 1000, "N runs at a time"},

    {"this program", "", 'h', ANY, 0, 0, 0, ""},
    {"--help",            "",       'f', ANY,  AT(help),         0, 0, "print this page (-h)"},
    {"--version",         "",       'f', ANY,  AT(version),      0, 0, "print the program's version"},
};
enum { OPTIONS = sizeof option_table / sizeof *option_table, COMMANDS = 7 };
static char *given_values[OPTIONS];     // what each was given on the command line, "" for flags; NULL where it was not

// The field of the options that a row of the table stands for.
static void *field_of(options *o, const struct option *row) { return (char *)o + row->at; }

// What others call our options and their values: PEFT, transformers' Trainer, the scripts around them. Underscores
// count as dashes.
static const struct { const char *theirs, *ours; } aliases[] = {
    {"-h", "--help"}, {"--model-name-or-path", "--model"}, {"--base-model", "--model"},
    {"--adapter-name-or-path", "--adapter"}, {"--data-path", "--data"}, {"--train-file", "--data"},
    {"--validation-file", "--val"}, {"--eval-file", "--val"}, {"--output-dir", "--out"}, {"--learning-rate", "--lr"},
    {"--lr-scheduler-type", "--schedule"}, {"--warmup-steps", "--warmup"}, {"--max-grad-norm", "--clip"},
    {"--per-device-train-batch-size", "--batch"}, {"--micro-batch-size", "--batch"},
    {"--gradient-accumulation-steps", "--accum"}, {"--num-train-epochs", "--epochs"}, {"--max-steps", "--steps"},
    {"--save-steps", "--save-every"}, {"--eval-steps", "--eval-every"}, {"--resume-from-checkpoint", "--resume"},
    {"--lora-r", "--rank"}, {"--r", "--rank"}, {"--lora-alpha", "--alpha"}, {"--target-modules", "--targets"},
    {"--lora-target-modules", "--targets"}, {"--lora-target", "--targets"}, {"--max-seq-length", "--seq"},
    {"--max-length", "--seq"}, {"--model-max-length", "--seq"}, {"--cutoff-len", "--seq"},
    {"--max-new-tokens", "--max-new"}, {"--wd", "--weight-decay"}, {"--data-seed", "--seed"},
    {"miss", "bone"}, {"bat-col", "bat"}, {"batrow", "bat-row"}, {"loraplus", "lora+"}, {"lora-plus", "lora+"},
    {"loraga", "lora-ga"}, {"rs-lora", "rslora"}, {"freeze", "frozen"}, {"constant-with-warmup", "constant"},
};
enum { ALIASES = sizeof aliases / sizeof *aliases, NAME = 64 };

// One line of --help: the option, what it does, and its default.
static void print_option(const struct option *o)
{
    const void *at = field_of(&opt, o);
    char value[64] = "";
    if (o->kind == 's' && *(char *const *)at) snprintf(value, sizeof value, " [%s]", *(char *const *)at);
    if (o->kind == 'i' && *(const int *)at) snprintf(value, sizeof value, " [%d]", *(const int *)at);
    if (o->kind == 'd' && *(const double *)at != 0) snprintf(value, sizeof value, " [%g]", *(const double *)at);
    int n = printf("  %s %s", o->name, o->value);
    for (const char *c = o->value; *c; c++) n -= (*c & 0xc0) == 0x80;           // λ takes one column
    printf("%*s%s%s\n", n < 28 ? 28 - n : 1, "", o->help, value);
}

static void print_help(void)
{
    puts("./train fine-tunes a Llama2 with LoRA, PiSSA, Bone, Bat and their relatives, every gradient by hand.");
    for (int i = 0; i < OPTIONS; i++) {
        if (option_table[i].kind == 'h') printf("\n%s\n", option_table[i].name);
        else print_option(&option_table[i]);
    }
    puts("\n--rank=16 is --rank 16. The names that PEFT and transformers have for the same things, --learning_rate or "
         "--lora_r, will do, too.");
}

// Gives an option the value that this text says.
static void set_option(const struct option *o, const char *text)
{
    char *end;
    void *at = field_of(&opt, o);
    double x = o->kind == 'i' || o->kind == 'd' ? strtod(text, &end) : 0;
    if (o->kind == 'f') *(int *)at = 1;
    if (o->kind == 's') *(const char **)at = text;
    if (o->kind == 'f' || o->kind == 's') return;
    if (end == text || *end || !(x >= o->least && x <= o->most) || (o->kind == 'i' && x != floor(x)))
        die("%s %s: expected a %snumber from %.10g to %.10g",
            o->name, text, o->kind == 'i' ? "whole " : "", o->least, o->most);
    if (o->kind == 'i') *(int *)at = (int)x;
    else *(double *)at = x;
}

// A name of n bytes as this program spells it.
static void usual_name(char name[NAME], const char *text, size_t n)
{
    snprintf(name, NAME, "%.*s", (int)(n < NAME ? n : NAME), text);
    for (char *c = name; *c; c++) if (*c == '_') *c = '-';
    for (int i = 0; i < ALIASES; i++) if (!strcasecmp(name, aliases[i].theirs)) strcpy(name, aliases[i].ours);
}

// The option that an argument names, -1 if none does, and the value behind a "=", NULL without one.
static int option_named(char *arg, char **value)
{
    char name[NAME];
    size_t n = strcspn(arg, "=");
    *value = arg[n] ? arg + n + 1 : NULL;
    usual_name(name, arg, n);
    for (int i = 0; i < OPTIONS && *arg == '-'; i++) if (!strcmp(name, option_table[i].name)) return i;
    return -1;
}

// Edits from one name to another: a letter more, less or changed, or two neighbours swapped (optimal string alignment).
static int edits(const char *a, const char *b)
{
    int d[NAME][NAME], n = (int)strlen(a), m = (int)strlen(b);
    for (int i = 0; i <= n; i++)
        for (int j = 0; j <= m; j++) {
            int best = i && j ? d[i - 1][j - 1] + (a[i - 1] != b[j - 1]) : i + j;
            if (i && j && d[i - 1][j] + 1 < best) best = d[i - 1][j] + 1;
            if (i && j && d[i][j - 1] + 1 < best) best = d[i][j - 1] + 1;
            int swapped = i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1];
            if (swapped && d[i - 2][j - 2] + 1 < best) best = d[i - 2][j - 2] + 1;
            d[i][j] = best;
        }
    return d[n][m];
}

// Takes `candidate`, or `means` in its place, for what was meant if it is nearer than what was found so far; or if
// `name` only adds words to it.
static void nearer(const char *name, const char *candidate, const char *means, int *least, const char **found)
{
    size_t n = strlen(candidate);
    int d = !strncmp(name, candidate, n) && name[n] == '-' ? 1 : edits(name, candidate);
    if (d < *least) *least = d, *found = means;
}

// What PEFT and Trainer call otherwise, or have and this program has not.
static const struct { const char *theirs, *says; } advice[] = {
    {"--use-dora",                   "that is --method dora"},
    {"--use-rslora",                 "that is --method rslora"},
    {"--init-lora-weights",          "that is --method pissa, olora or lora-ga"},
    {"--peft-type",                  "that is --method"},
    {"--gradient-checkpointing",     "that is --recompute 2"},
    {"--top-k",                      "there is --top-p"},
    {"--warmup-ratio",               "--warmup counts steps"},
    {"--lora-dropout",               "there is no dropout here"},
    {"--optim",                      "AdamW is what there is"},
    {"--adam-beta1",                 "AdamW's betas are 0.9 and 0.999"},
    {"--adam-beta2",                 "AdamW's betas are 0.9 and 0.999"},
    {"--fp16",                       "there is --bf16"},
    {"--bits",                       "quantised weights are not read"},
    {"--load-in-4bit",               "quantised weights are not read"},
    {"--load-in-8bit",               "quantised weights are not read"},
    {"--logging-steps",              "--log FILE has every step"},
    {"--report-to",                  "--log FILE has every step"},
    {"--do-train",                   "training is what ./train does"},
    {"--do-eval",                    "that is --eval"},
    {"--per-device-eval-batch-size", "evaluation needs none"},
    {"--overwrite-output-dir",       "--out replaces what an earlier run left there"},
};

__attribute__((noreturn))
static void unknown_option(const char *arg)
{
    char name[NAME];
    const char *meant = NULL;
    usual_name(name, arg, strcspn(arg, "="));
    int least = (int)strlen(name) / 3 + 1;                      // a third of it may be wrong
    for (size_t i = 0; i < sizeof advice / sizeof *advice; i++)
        if (!strcasecmp(name, advice[i].theirs)) die("unknown option %s: %s; --help lists them", arg, advice[i].says);
    for (char *c = name; *c; c++) *c = (char)tolower((unsigned char)*c);
    if (*arg != '-') die("unknown option %s: options begin with --, and the parts of a list are joined by commas", arg);
    for (const struct option *o = option_table; o < option_table + OPTIONS; o++)
        if (o->kind != 'h') nearer(name, o->name, o->name, &least, &meant);
    for (int i = 0; i < ALIASES; i++) nearer(name, aliases[i].theirs, aliases[i].ours, &least, &meant);
    if (meant) die("unknown option %s; did you mean %s? --help lists them", arg, meant);
    die("unknown option %s; --help lists them", arg);
}

// One option of the command line. Of two values the last one counts, but two adapters at once are something else.
static void give_option(int i, char *value)
{
    const struct option *o = &option_table[i];
    if (given_values[i] && o->at == AT(adapter))
        die("--adapter is given twice, %s and %s; one is used at a time: --merge the first and give the result as --model",
            given_values[i], value);
    if (given_values[i] && strcmp(given_values[i], value))
        fprintf(stderr, "note: %s is given twice; %s counts, not %s\n", o->name, value, given_values[i]);
    given_values[i] = value;
    set_option(o, value);
}

// Whether an option of the table, by its name there, was on the command line.
static int is_given(char *name)
{
    char *none;
    return given_values[option_named(name, &none)] != NULL;
}

static void read_options(int argc, char **argv)
{
    memset(given_values, 0, sizeof given_values);
    for (int a = 1; a < argc; a++) {
        char *value, *none;
        int i = option_named(argv[a], &value);
        if (i < 0) unknown_option(argv[a]);
        const struct option *o = &option_table[i];
        if (o->kind == 'f' && value) die("%s: %s takes no value", argv[a], o->name);
        if (o->kind != 'f' && !value) {
            int missing = a + 1 == argc || option_named(argv[a + 1], &none) >= 0;
            if (missing) die("%s needs a value: %s %s", argv[a], argv[a], o->value);
            value = argv[++a];
        }
        give_option(i, value ? value : "");
    }
    for (int i = 1; i <= COMMANDS; i++)
        for (int j = 1; j < i; j++)
            if (given_values[i] && given_values[j])
                die("%s and %s: give one of them", option_table[j].name, option_table[i].name);
}

// The schedule as learning_rate() knows it.
static const char *parse_schedule(const char *text)
{
    static const char *const schedules[] = {"cosine", "linear", "constant"};
    char name[NAME];
    usual_name(name, text, strlen(text));
    for (int i = 0; i < 3; i++) if (!strcasecmp(name, schedules[i])) return schedules[i];
    die("--schedule %s: expected cosine, linear or constant", text);
}

// A name as a terminal may have it, in a string that stays.
static const char *shown(const char *name) { return printable(name, ""); }

// A model's name on Hugging Face, such as meta-llama/Llama-2-7b-hf, where a directory is wanted.
static void refuse_hub_name(const char *option, const char *name)
{
    const char *slash = strchr(name, '/');
    if (!slash || slash == name || !slash[1] || strchr(slash + 1, '/') || strchr(".~", *name)) return;
    char *folder = copy_bytes(name, (size_t)(slash - name));
    if (access(folder, F_OK))
        die("%s %s: there is no such directory here. If it is a name on Hugging Face, get it first: "
            "hf download %s --local-dir %s, then %s %s", option, name, name, slash + 1, option, slash + 1);
    free(folder);
}

// Stops where an option names no directory of the kind it wants, and says what is there instead. `holds` is a file that
// such a directory has; whether it has all others is seen when they are read.
static void expect_directory(const char *option, const char *name, const char *holds)
{
    static const char *const kinds[][2] = {
        {"config.json", "a model: --model"},
        {"adapter_config.json", "an adapter: --adapter"},
    };
    struct stat st;
    if (strstr(name, "://"))
        die("%s %s: a local directory is wanted; get it first: hf download NAME --local-dir DIR, then %s DIR",
            option, name, option);
    int there = *name && !stat(name, &st);
    if (!there) refuse_hub_name(option, name);
    if (!there) die("%s %s: there is no such directory", option, name);
    if (!S_ISDIR(st.st_mode)) refuse_weights(option, name);
    if (!S_ISDIR(st.st_mode)) die("%s %s: is a file; name the directory that it is in", option, name);
    char *path = join(name, holds);
    int whole = exists(path);
    free(path);
    for (int i = 0; i < 2 && !whole; i++) {
        path = join(name, kinds[i][0]);
        if (exists(path) && strcmp(holds, kinds[i][0]))
            die("%s %s: has no %s, it is %s %s", option, name, holds, kinds[i][1], name);
        free(path);
    }
}

// Options that the command given would not look at: those of training, and the rows of a dialogue.
static void refuse_unread(void)
{
    const char *training = opt.plot ? "--plot" : opt.dry_run ? "--dry-run" : NULL;
    const char *rows = opt.val ? "--val" : opt.data ? "--data" : NULL;
    for (int i = 1; i <= COMMANDS && training; i++)
        if (given_values[i] && option_table[i].at != AT(compare))
            die("%s and %s: give one of them; %s is for training", option_table[i].name, training, training);
    if (opt.merge && opt.bf16) die("--merge and --bf16: give one of them; what is merged keeps all digits");
    if (opt.chat && training) die("--chat and %s: give one of them; %s is for training", training, training);
    if (opt.chat && rows) die("--chat and %s: give one of them; a chat reads no rows", rows);
}

static void parse_options(int argc, char **argv)
{
    read_options(argc, argv);
    for (int i = 1; i <= COMMANDS && opt.chat; i++)
        if (given_values[i] && option_table[i].at != AT(generate))
            die("--chat and %s: give one of them; --chat goes with --generate, or alone", option_table[i].name);
    refuse_unread();
    if (!opt.val && !opt.data) opt.val = "data/val.jsonl";
    if (!opt.data) opt.data = "data/train.jsonl";
    if (!opt.out) opt.out = opt.compare ? "compare" : "out";
    opt.schedule = parse_schedule(opt.schedule);
    if ((long)opt.batch * opt.accum > 1 << 24)
        die("--batch %d times --accum %d is too much; at most %d rows a step", opt.batch, opt.accum, 1 << 24);
    if (opt.model && !opt.help && !opt.version) expect_directory("--model", opt.model, "config.json");
    if (opt.adapter) expect_directory("--adapter", opt.adapter, "adapter_config.json");
    if (opt.keep_best && !(opt.val && opt.eval_every))
        die("--keep-best compares evaluations; give %s, too", opt.val ? "--eval-every N" : "--val FILE");
    if (opt.patience && !opt.keep_best) die("--patience counts evaluations without a better result; give --keep-best, too");
    if (opt.compare && (opt.dry_run || opt.plot))
        die("%s is for one run, and --compare makes many", opt.plot ? "--plot" : "--dry-run");
    if (opt.steps && opt.epochs != 1) die("--steps and --epochs both say how long to train; give one of them");
    if (opt.threads) omp_set_num_threads(opt.threads);
    else if (!getenv("OMP_NUM_THREADS")) omp_set_num_threads(threads_of_rank(usable_cpus("")));
}

// What only some devices can. Not a part of parse_options, which --check calls for the CPU's half, too.
static void check_device(void)
{
    if (opt.bf16 && !dev_bf16(0))
        die("--bf16: this program keeps all digits; ./train rounds to bf16 if asked, ./train_cuda always does");
    if (opt.tf32 && !dev_tf32()) die("--tf32 is for floats on a GPU; this program computes otherwise");
}

// Ends the program where the ranks were not started alike. --threads may differ.
static void compare_options(void)
{
    for (int i = 0; i < OPTIONS; i++) {
        const char *value = given_values[i];
        if (option_table[i].kind == 'h' || option_table[i].at == AT(threads)) continue;
        ranks_compare(option_table[i].name, !value ? "its default" : *value ? value : "given");
    }
}

// Several ranks train or evaluate. They halve a step's micro-batches until each has its share of them.
static void check_ranks(void)
{
    int n = ranks();
    const char *alone = opt.chat ? "--chat" : NULL, *command = NULL;
    compare_options();
    if (n == 1 || opt.help || opt.version) return;
    for (int i = 1; i <= COMMANDS; i++) {
        if (!given_values[i]) continue;
        command = option_table[i].name;
        if (option_table[i].at != AT(eval) && option_table[i].at != AT(list)) alone = command;
    }
    if (alone) die("%s is the work of one process, and here are %d ranks; ./train does it", alone, n);
    if (opt.temperature > 0)
        die("--temperature draws one token after the other; with %d ranks leave it out", n);
    if (command) return;
    if (n & (n - 1)) die("%d ranks: they add their gradients by pairs; start 2, 4, 8, …", n);
    if (opt.accum % n)
        die("--accum %d: %d ranks share the micro-batches of a step evenly; give a multiple of %d, say --accum %d",
            opt.accum, n, n, (opt.accum / n + 1) * n);
}

static void read_shard(const char *text, int shard[2])
{
    if (!read_pair(text, shard))
        die("--shard %s: expected AxB, each a whole number, in or out, such as 64x32 or 64xout", text);
}

// --shard and --groups into the plan. A grouping at whose corner bat or bat-row stands is that.
static void plan_pairs(plan *p)
{
    int bat = !strcmp(p->method->name, "bat"), free_groups = bat || !strcmp(p->method->name, "bat-free");
    if (opt.shard) read_shard(opt.shard, p->shard);
    if (opt.groups && !read_pair(opt.groups, p->groups))
        die("--groups %s: expected PxQ, each a whole number, in or out, such as 4x2 or outx1", opt.groups);
    if (opt.shard && !opt.list && strcmp(p->method->name, "disha"))
        die("--shard is for --method disha, not for %s", p->method->name);
    if (opt.groups && !opt.list && !free_groups) die("--groups is for --method bat, not for %s", p->method->name);
    if (opt.groups && (p->groups[0] == IN_SIDE || p->groups[1] == OUT_SIDE))
        die("--groups %s: P counts along out and Q along in, as in outx1, 1xin or outxin", opt.groups);
    if (p->shard[0] == 1 || p->shard[1] == 1)
        fprintf(stderr, "note: --shard %s: with one %s of D every update is the same along it, a rank of 1\n",
                opt.shard, p->shard[0] == 1 ? "row" : "column");
    if (!opt.groups || !free_groups) return;
    p->method = method_named("bat-free");
    if (p->groups[0] == OUT_SIDE && p->groups[1] == 1) p->method = method_named("bat");
    if (p->groups[0] == 1 && p->groups[1] == IN_SIDE) p->method = method_named("bat-row");
}

static plan plan_from_options(void)
{
    char name[NAME];
    usual_name(name, opt.method, strlen(opt.method));
    const method *m = method_named(name);
    if (!m) {
        const char *meant = NULL;
        int least = (int)strlen(name) / 3 + 1;
        for (int i = 0; i < METHODS; i++) nearer(name, methods[i].name, methods[i].name, &least, &meant);
        if (meant) die("--method %s: there is no such method; did you mean %s? --list shows them", opt.method, meant);
        die("--method %s: there is no such method; --list shows them", opt.method);
    }
    plan p = {
        .method = m, .rank = opt.rank, .mini_r = opt.mini_r, .targets = opt.targets, .seed = (uint64_t)opt.seed,
        .alpha = opt.alpha > 0 ? opt.alpha : opt.rank, .plus_ratio = opt.plus_ratio, .tokens = 1, .positions = 1, .train = 1,
        .dora_detach = opt.dora_detach, .recompute = opt.recompute,
    };
    plan_pairs(&p);
    return p;
}

// Looks into the file of weights where config.json does not tell all sizes.
static config with_sizes(config c, const char *dir)
{
    if (!c.backbone->sizes) return c;
    checkpoint file = dir ? checkpoint_open(dir, "model") : (checkpoint){0};
    c.backbone->sizes(&c, dir ? &file : NULL);
    if (dir) checkpoint_close(&file);
    return c;
}

static config open_config(void)
{
    if (opt.init) return with_sizes(config_read(opt.init), NULL);
    char *path = join(opt.model, "config.json"), *generation;
    if (!exists(path)) refuse_format(opt.model);
    config c = config_read(path);
    json_t *json = directory_json(opt.model, "generation_config.json", &generation);
    config_stops(&c, json, generation);
    json_decref(json);
    free(path);
    free(generation);
    return with_sizes(c, opt.model);
}

#endif
