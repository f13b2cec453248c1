//  run/checkpoint.h: a run, saved and resumed.

#ifndef CHECKPOINT_H
#define CHECKPOINT_H
#include <fnmatch.h>
#include "generate.h"
#include "peft.h"

static void make_merged(const output *o, wide *x) { get(x, merged(o->model, o->linear)); }

// Why a tensor of a model cannot be written: its file held NaN or Inf already, or the adapter is too large.
static void blame_base(const output *o, double most)
{
    model *m = o->model;
    linear *l = o->linear;
    ptrdiff_t at = shgeti(m->file.tensors, o->name);
    wide *x = on_host(o->data);
    if (at >= 0 && !isfinite(largest(x, elements(o->data))))
        die("%s: tensor %s holds NaN or Inf and is not written; get this model anew", m->file.tensors[at].value.file, o->name);
    free(x);
    if (l && !isfinite(most))
        die("tensor %s holds NaN or Inf and is not written with the adapter merged in; the adapter's numbers are "
            "too large", o->name);
    if (l)
        die("tensor %s has a %g with the adapter merged in, which is Inf in %s; start from a copy of the model in "
            "float32 or bfloat16", o->name, most, dtypes[o->type].name);
}

// Whether a file of a model directory stays what it is whatever the weights are: the tokenizer's, the chat template,
// the licence, … Not so the weights in any format, what is written anew, and what a training run or an adapter left.
static int outlasts_weights(const char *name)
{
    static const char *const patterns[] = {
        "config.json", "*.safetensors", "*.safetensors.index.json", "*.bin.index.json", "pytorch_model*.bin", "model*.bin",
        "ggml*.bin", "adapter_model*.bin", "adapter_config.json", "state.json", "*.gguf", "*.ggml", "*.pth", "*.pt",
        "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.npz", "*.tflite", NULL};
    for (const char *const *p = patterns; *p; p++) if (!fnmatch(*p, name, 0)) return 0;
    return 1;
}

// A complete model directory: every base tensor (with adapters merged), config.json, and what else the source directory holds.
static void stage_model(model *m, const char *source, enum dtype trained_type)
{
    output *list = NULL;
    for (int i = 0; i < arrlen(m->tensors); i++) {
        tensor *t = &m->tensors[i];
        if (!of_base(t)) continue;
        ptrdiff_t at = shgeti(m->file.tensors, t->name);
        int trained = t->kind == PARAM || at < 0;
        output o = {.shape = t->shape, .data = *t->value, .type = trained ? trained_type : m->file.tensors[at].value.data.type};
        memcpy(o.name, t->name, sizeof o.name);
        o.model = m;
        o.blame = blame_base;
        if (t->of && t->value == &t->of->W && has_adapter(t->of)) o.linear = t->of;
        if (o.linear) o.make = make_merged;
        arrput(list, o);
    }
    model_write(m, "model.safetensors", list, (int)arrlen(list));
    static const char *const names[DTYPES] = {"float32", "float64", "bfloat16", "float16"};
    stage_config(m->c.text, names[arrlen(list) ? list[0].type : trained_type]);
    char **files = files_of(source);
    for (int i = 0; i < arrlen(files); i++) if (outlasts_weights(files[i])) stage_copy(source, files[i]);
    free_names(files);
    arrfree(list);
}

typedef struct {
    model m;
    tokenizer *t;
    dataset train, val;
    uint64_t base;                      // its hash, base_hash()
    int steps, step, scored;            // all of them; those done; validation rows that are answered
    int *order, epoch;                  // of the rows, in this epoch
    FILE *log;
    int log_failed;                     // it could not be written to its end
    int first;                          // the step this run began with
    double started;
    double before;                      // the eval loss before the first step, or infinity
    double best;                        // --keep-best: the lowest eval loss so far,
    int best_step, waited;              //   the step it belongs to (0: none yet), the evaluations since then,
    const char *best_dir;               //   and the directory that holds what had it
    int evaluated;                      // the step of the last evaluation that --eval-every asked for
} run;

static const uint64_t FNV_PRIME = 0x100000001b3u, FNV_START = 0xcbf29ce484222325u;

// The rows that a run trains on, as a text: how many, and FNV-1a over their tokens.
static const char *rows_text(const dataset *d, char text[64])
{
    uint64_t hash = FNV_START;
    for (int i = 0; i < arrlen(d->rows); i++) {
        const row *r = &d->rows[i];
        hash = (hash ^ (uint64_t)r->n) * FNV_PRIME;
        hash = (hash ^ (uint64_t)r->prompt) * FNV_PRIME;
        for (int j = 0; j < r->n; j++) hash = (hash ^ (uint64_t)r->ids[j]) * FNV_PRIME;
        for (int j = r->prompt; r->learnt && j < r->n; j++) hash = (hash ^ (uint64_t)r->learnt[j]) * FNV_PRIME;
    }
    snprintf(text, 64, "%td, hash %016llx", arrlen(d->rows), (unsigned long long)hash);
    return text;
}

static void compare_rows(const char *option, const dataset *d)
{
    char text[64];
    if (ranks() > 1) ranks_compare(option, rows_text(d, text));
}

// Like FNV-1a, eight bytes at a time.
static uint64_t hash_of(const char *p, size_t bytes)
{
    uint64_t hash = FNV_START ^ bytes, word = 0;
    for (size_t i = 0; i < bytes; i += sizeof word) {
        memcpy(&word, p + i, bytes - i < sizeof word ? bytes - i : sizeof word);
        hash = (hash ^ word) * FNV_PRIME;
        hash ^= hash >> 32;                             // else two signs that differ would cancel
    }
    return hash;
}

// A hash of what each tensor of the base begins with: in that, any other training of it differs.
static uint64_t base_hash(model *m)
{
    uint64_t hash = FNV_START;
    for (int i = 0; i < arrlen(m->tensors); i++) {
        ptrdiff_t at = shgeti(m->file.tensors, m->tensors[i].name);
        if (at < 0) continue;
        mat x = m->file.tensors[at].value.data;
        size_t bytes = elements(x) * dtypes[x.type].size;
        hash = (hash ^ hash_of((const char *)(uintptr_t)x.p, bytes < 4096 ? bytes : 4096)) * FNV_PRIME;
    }
    return hash;
}

// Ranks add up gradients of one model: ends the program where the base's file or what trains differs among
// them.
static void compare_models(model *m)
{
    char text[64];
    int n = (int)shlen(m->file.tensors);
    if (ranks() == 1) return;
    uint64_t *hashes = alloc((size_t)n + 1, sizeof *hashes), base = FNV_START, trained = FNV_START;
    #pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < n; i++) {
        mat x = m->file.tensors[i].value.data;
        hashes[i] = hash_of((const char *)(uintptr_t)x.p, elements(x) * dtypes[x.type].size);
    }
    for (int i = 0; i < n; i++) base = (base ^ hashes[i]) * FNV_PRIME;
    for (int i = 0; i < arrlen(m->tensors); i++) {
        const tensor *t = &m->tensors[i];
        if (t->kind != PARAM && t->kind != START) continue;
        size_t numbers = elements(*t->value);
        wide *x = alloc(numbers, sizeof *x);
        get(x, *t->value);
        trained = (trained ^ hash_of((const char *)x, numbers * sizeof *x)) * FNV_PRIME;
        free(x);
    }
    snprintf(text, sizeof text, "hash %016llx", (unsigned long long)base);
    ranks_compare("a base with", text);
    snprintf(text, sizeof text, "hash %016llx", (unsigned long long)trained);
    ranks_compare("trained weights that begin with", text);
    free(hashes);
}

static const char *targets_text(const model *m, char text[64])      // as --targets has them
{
    *text = 0;
    for (int i = 0; i < linears_of_layer(m); i++)
        if (targeted_in_some(m, i)) snprintf(text + strlen(text), 8, "%s%s", *text ? "," : "", m->linears[i]->is.name);
    return text;
}

// What must be the same for a run to go on as if it had never stopped: the options that the table marks, as the run
// has settled them, the rows, and a base that does not train. The number of steps counts, though a constant rate does
// not depend on it: no schedule is an exception, and a run that goes on for longer has a name, --adapter.
static json_t *run_settings(const run *r)
{
    const plan *p = &r->m.p;
    char rows[64], base[32], targets[64], shard[32], groups[32];
    options now = opt;
    now.method = p->method->name;
    now.rank = p->rank;
    now.alpha = p->alpha;
    now.mini_r = p->mini_r;
    now.targets = targets_text(&r->m, targets);
    now.shard = p->shard[0] ? pair_text(p->shard, shard) : NULL;
    now.groups = p->groups[0] ? pair_text(p->groups, groups) : NULL;
    now.steps = r->steps;
    now.template = chat.is->name;
    json_t *json = json_object();
    set_field(json, "step", number_value(r->step));
    for (const struct option *o = option_table; o < option_table + OPTIONS; o++) {
        const void *at = field_of(&now, o);
        if (o->same != SAME) continue;
        if (o->kind == 's' && !*(const char *const *)at) continue;
        if (o->kind == 's') set_field(json, o->name, text_value(*(const char *const *)at));
        else set_field(json, o->name, number_value(o->kind == 'd' ? *(const double *)at : *(const int *)at));
    }
    set_field(json, "rows", text_value(rows_text(&r->train, rows)));
    snprintf(base, sizeof base, "hash %016llx", (unsigned long long)r->base);
    if (!full_training(&r->m)) set_field(json, "base", text_value(base));
    return json;
}

// What state.safetensors holds: the trained tensors as they are, their start, and AdamW's moments.
static request *state_tensors(model *m)
{
    request *list = NULL;
    for (int i = 0; i < arrlen(m->tensors); i++) {
        tensor *t = &m->tensors[i];
        if (t->kind != PARAM && t->kind != START) continue;
        arrput(list, request_for(t, "", t->value));
        if (t->kind == START) continue;
        arrput(list, request_for(t, ".m1", &t->m1));
        arrput(list, request_for(t, ".m2", &t->m2));
    }
    return list;
}

static void state_write(model *m)
{
    request *state = state_tensors(m);
    output *list = NULL;
    for (int i = 0; i < arrlen(state); i++) {
        output o = {.shape = state[i].shape, .data = *state[i].to, .type = TYPE_OF(wide)};
        memcpy(o.name, state[i].name, sizeof o.name);
        arrput(list, o);
    }
    model_write(m, "state.safetensors", list, (int)arrlen(list));
    arrfree(state);
    arrfree(list);
}

static place_of_result destination;      // --out, as check_out() found it

// state.json: the settings, and which files the run wrote, so that a later one replaces these and nobody else's.
static void stage_state(json_t *settings)
{
    char **names = files_of(staged);
    json_t *files = json_array();
    for (int i = 0; i < arrlen(names); i++) json_array_append_new(files, text_value(names[i]));
    set_field(settings, "files", files);
    free_names(names);
    stage_json("state.json", settings);
}

// What had the lowest eval loss, from where it was saved.
static void stage_best(const char *dir)
{
    char **names = run_files(dir);
    for (int i = 0; i < arrlen(names); i++) if (strncmp(names[i], "state.", 6)) stage_copy(dir, names[i]);
    free_names(names);
}

// Saves the adapter or model, with --keep-best that of the best step, and what --resume needs of this one. All
// ranks hold the same; rank 0 writes it.
static void save_run(run *r)
{
    model *m = &r->m;
    if (this_rank()) return;
    for (int i = 0; i < arrlen(m->tensors); i++)
        if (m->tensors[i].kind == PARAM && !isfinite(sum_of_squares(*m->tensors[i].value)))
            die("step %d: %s is not finite and is not saved; a smaller --lr may help", r->step, m->tensors[i].name);
    json_t *state = run_settings(r);
    stage_begin(destination.path);
    if (r->best_step && r->best_step != r->step) stage_best(r->best_dir);
    else if (full_training(m)) stage_model(m, opt.model, F32);
    else peft_write(m, opt.model);
    state_write(m);
    if (opt.eval_every) set_field(state, "evaluated", number_value(r->evaluated));
    if (r->best_step) {
        set_field(state, "best_step", number_value(r->best_step));
        set_field(state, "best_eval_loss", number_value(r->best));
        set_field(state, "evaluations_since", number_value(r->waited));
        set_field(state, "best_on", text_value(opt.val));
    }
    stage_state(state);
    stage_publish(&destination);
    r->best_dir = destination.path;
}

// --keep-best: notes an evaluation. Returns whether its loss is the lowest so far.
static int note_best(run *r, double loss)
{
    if (r->best_step && loss >= r->best) {
        r->waited++;
        return 0;
    }
    r->best = loss;
    r->best_step = r->step;
    r->waited = 0;
    return 1;
}

// A count of steps or evaluations in state.json; without `missing` it must be there.
static int count_field(const json_t *then, const char *path, const char *name, double missing)
{
    return (int)number_field(then, path, &(struct config_field){name, WHOLE, NOWHERE, missing, 0, 1e9, NULL});
}

// What an earlier run with --keep-best had found.
static void read_best(run *r, const json_t *then, const char *path, const char *dir)
{
    const char *on = string_field(then, "best_on");
    json_t *now = on && opt.keep_best ? text_value(opt.val) : NULL;
    if (!now) return;
    if (strcmp(on, json_string_value(now)))
        die("--resume %s: its best loss is one on %s, this run has --val %s; give the same, or leave --keep-best out",
            dir, on, opt.val);
    r->best_step = count_field(then, path, "best_step", REQUIRED);
    r->best = number_field(then, path, &(struct config_field){"best_eval_loss", NUMBER, NOWHERE, REQUIRED, 0, HUGE_VAL, NULL});
    r->waited = count_field(then, path, "evaluations_since", REQUIRED);
    r->best_dir = dir;
    json_decref(now);
}

// The step an earlier run had done; its settings must be those of this run.
static int read_state_json(run *r, const char *dir)
{
    size_t bytes;
    char *path = join(dir, "state.json"), *text = read_file(path, &bytes);
    json_t *then = parse_object(path, text, bytes, AS_INTEGERS), *now = run_settings(r), *item;
    const char *name;
    json_object_foreach(now, name, item) {
        const json_t *old = json_object_get(then, name);
        if (!old && json_is_integer(item) && !json_integer_value(item)) continue;       // a flag that came later, and is off
        if (strcmp(name, "step") && !json_equal(old, item)) {
            char *a = old ? json_text(old) : NULL, *b = json_text(item);
            die("--resume %s: was trained with %s %s, this run has %s; give the same, or start anew from it with %s %s",
                dir, name, a ? a : "unset", b, full_training(&r->m) ? "--model" : "--adapter", dir);
        }
    }
    int step = (int)number_field(then, path, &(struct config_field){"step", WHOLE, NOWHERE, REQUIRED, 1, 1e9, NULL});
    r->evaluated = count_field(then, path, "evaluated", step);
    read_best(r, then, path, dir);
    json_decref(then), json_decref(now);
    free(text), free(path);
    return step;
}

static int resume_run(run *r, const char *dir)
{
    expect_directory("--resume", dir, "state.json");
    int step = read_state_json(r, dir);
    checkpoint c = checkpoint_open(dir, "state");
    request *state = state_tensors(&r->m);
    checkpoint_fetch(&c, dir, state, "this run", NULL);
    arrfree(state);
    checkpoint_close(&c);
    return step;
}

// Stops if --log would overwrite something else that this run reads or writes: it may be none of the files that are
// given, and lie in none of the directories.
static void check_log(void)
{
    const char *const files[] = {opt.data, opt.val, opt.init};
    const char *const directories[] = {opt.model, opt.adapter, opt.resume, destination.path};
    char name[PATH_MAX], within[PATH_MAX];
    struct stat st;
    snprintf(name, sizeof name, "%s", opt.log);
    for (int i = 0; i < 3; i++)
        if (files[i] && same_file(name, files[i]))
            die("--log %s: is a file that this run reads; name a new file", opt.log);
    if (!stat(name, &st) && !S_ISREG(st.st_mode) && !S_ISCHR(st.st_mode) && !S_ISFIFO(st.st_mode))
        die("--log %s: is not a file; name a file", opt.log);
    if (!strcmp(name, destination.path)) die("--log %s: is --out itself; name another file", opt.log);
    char *slash = strrchr(name, '/');
    if (!realpath(slash ? (*slash = 0, *name ? name : "/") : ".", within)) die("--log %s: %s", opt.log, strerror(errno));
    for (char *end = within + strlen(within); end; end = strrchr(within, '/')) {
        *end = 0;
        for (int i = 0; i < 4 && *within; i++)
            if (directories[i] && same_file(within, directories[i]))
                die("--log %s: lies in %s, which this run reads or replaces; name a file elsewhere",
                    opt.log, directories[i]);
    }
}

// Whether a line of an earlier log stays when a run goes on from this step: what was logged after the step that was
// saved is written anew, and so is the evaluation that closed the earlier run.
static int line_stays(const char *line, int step)
{
    static const char start[] = "{\"step\":";
    char *end;
    if (strncmp(line, start, strlen(start))) return 0;
    const char *digits = line + strlen(start);
    long at = strtol(digits, &end, 10);                             // sscanf would look at all lines that follow
    if (end == digits || at > step) return 0;
    const char *next = strchr(line, ',');
    int evaluation = next && !strncmp(next, ",\"eval_loss\"", 12);
    int due = opt.eval_every && step % opt.eval_every == 0;             // it was not the one at the end
    return !evaluation || at < step || due;
}

// A resumed run goes on writing the same log, behind the last whole line that stays.
static FILE *open_log(const char *path, int step)
{
    size_t bytes = 0;
    char *old = step && !access(path, F_OK) ? read_file(path, &bytes) : NULL;
    size_t keep = 0;
    for (size_t at = 0; at < bytes;) {
        const char *newline = memchr(old + at, '\n', bytes - at);
        if (!newline) break;
        size_t next = (size_t)(newline + 1 - old);
        if (line_stays(old + at, step)) keep = next;
        at = next;
    }
    FILE *f = fopen(path, "w");
    if (!f) die("--log %s: %s", path, strerror(errno));
    if (old) write_checked(f, old, keep, path);
    free(old);
    return f;
}

#endif
