//  lib/directory.h: an output directory.
// A directory is written whole or not at all: under a temporary name beside its place, synced, then renamed.

#ifndef DIRECTORY_H
#define DIRECTORY_H
#include "json.h"

static char staged[PATH_MAX];   // the directory in the making, removed if the program ends before it is published

// Every file name that was staged so far. A signal may come at any moment, in any thread: a name is on the list before its file is
// there, and it is never taken off.
typedef struct staged_file { struct staged_file *next; char name[]; } staged_file;
static staged_file *staged_files;

// Runs in signal handlers, too: it calls nothing that they may not.
static void stage_discard(void)
{
    int dir = *staged ? open(staged, O_RDONLY | O_DIRECTORY) : -1;
    if (dir < 0) return;
    for (const staged_file *f = __atomic_load_n(&staged_files, __ATOMIC_ACQUIRE); f; f = f->next) unlinkat(dir, f->name, 0);
    close(dir);
    rmdir(staged);
    *staged = 0;
}

static void stage_begin(const char *out)
{
    char name[PATH_MAX];
    if (snprintf(name, sizeof name, "%s.tmp%d", out, (int)getpid()) >= (int)sizeof name) die("%s: name too long", out);
    if (mkdir(name, 0777)) die("cannot write %s: %s; the folder it goes into must exist and be writable", out, strerror(errno));
    strcpy(staged + 1, name + 1);
    __atomic_store_n(staged, *name, __ATOMIC_RELEASE);         // a signal sees no path or all of it
}

// Opens a file of the directory in the making. Its path comes in a fresh string.
static FILE *stage_open(const char *name, char **path)
{
    staged_file *f = staged_files;
    while (f && strcmp(f->name, name)) f = f->next;
    if (!f) {
        f = alloc(sizeof *f + strlen(name) + 1, 1);
        strcpy(f->name, name);
        f->next = staged_files;
        __atomic_store_n(&staged_files, f, __ATOMIC_RELEASE);
    }
    *path = join(staged, name);
    FILE *file = fopen(*path, "wb");
    if (!file) die("cannot write %s: %s", *path, strerror(errno));
    return file;
}

// The regular files of a directory, links to some included: an array (stb_ds) of fresh strings.
static char **files_of(const char *dir)
{
    char **names = NULL;
    DIR *d = opendir(dir);
    if (!d) die("%s: %s", dir, strerror(errno));
    for (struct dirent *e; (e = readdir(d));) {
        struct stat st;
        char *path = join(dir, e->d_name);
        int there = !stat(path, &st);
        if (there && S_ISREG(st.st_mode)) arrput(names, strdup(e->d_name));
        else if (!there || !S_ISDIR(st.st_mode)) fprintf(stderr, "note: %s is no file that could be copied and stays behind\n", path);
        free(path);
    }
    closedir(d);
    return names;
}

static void free_names(char **names)
{
    for (int i = 0; i < arrlen(names); i++) free(names[i]);
    arrfree(names);
}

// The files that a training run wrote into dir, by the list in its state.json. NULL if no run wrote there. Runs before there was such
// a list wrote these.
static char **run_files(const char *dir)
{
    static const char *const before[] = {"config.json", "generation_config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors",
        "state.safetensors", "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", NULL};
    char *path = join(dir, "state.json"), **names = NULL;
    size_t bytes = 0;
    struct stat st;
    char *text = !stat(path, &st) && S_ISREG(st.st_mode) ? read_file(path, &bytes) : NULL;
    json_t *state = json_loadb(text, bytes, AS_DOUBLES, NULL), *files = json_object_get(state, "files"), *item;
    size_t i;
    if (json_object_get(state, "--method")) arrput(names, strdup("state.json"));
    for (const char *const *name = before; *name && names && !files; name++) arrput(names, strdup(*name));
    json_array_foreach(files, i, item) {
        const char *file = json_string_value(item);
        if (names && file && !strchr(file, '/')) arrput(names, strdup(file));
    }
    json_decref(state);
    free(text), free(path);
    return names;
}

// Removes what a training run left in dir, and dir with it unless somebody put more there.
static void remove_run(const char *dir)
{
    char **names = run_files(dir);
    for (int i = 0; i < arrlen(names); i++) {
        char *path = join(dir, names[i]);
        unlink(path);
        free(path);
    }
    free_names(names);
    if (rmdir(dir) && (errno == ENOTEMPTY || errno == EEXIST)) fprintf(stderr, "note: %s holds files that no run wrote; they were in the directory that is replaced\n", dir);
}

static void sync_path(const char *path)
{
    int fd = open(path, O_RDONLY);
    if (fd < 0 || (fsync(fd) && errno != EINVAL)) die("%s: %s", path, strerror(errno));
    close(fd);
}

// Moves the finished directory to its place. An older one there is exchanged in one step and then removed; where the file
// system cannot exchange (NFS), it steps aside first.
static void stage_publish(const char *out)
{
    sync_path(staged);
    if (rename(staged, out)) {
        if (errno != ENOTEMPTY && errno != EEXIST) die("cannot write %s: %s", out, strerror(errno));
        if (renameat2(AT_FDCWD, staged, AT_FDCWD, out, RENAME_EXCHANGE)) {
            char older[PATH_MAX + 8];
            snprintf(older, sizeof older, "%s.old", staged);
            if (rename(out, older) || rename(staged, out) || rename(older, staged)) die("cannot replace %s: %s", out, strerror(errno));
        }
        remove_run(staged);
    }
    *staged = 0;
    char *parent = join(out, "..");
    sync_path(parent);
    free(parent);
}

static int same_file(const char *a, const char *b)
{
    struct stat x, y;
    return !stat(a, &x) && !stat(b, &y) && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

// A file that keeps `dir` from being replaced, in a fresh string. NULL if there is none: the directory is empty, or what an
// earlier training run wrote and may write again.
static char *kept_file(const char *dir, int over_a_run)
{
    char *kept = NULL, **ours = over_a_run ? run_files(dir) : NULL;
    DIR *d = opendir(dir);
    if (!d) die("cannot write %s: %s", dir, strerror(errno));
    for (struct dirent *e; !kept && (e = readdir(d));) {
        int known = !strcmp(e->d_name, ".") || !strcmp(e->d_name, "..");
        for (int i = 0; i < arrlen(ours); i++) known |= !strcmp(ours[i], e->d_name);
        if (!known) kept = strdup(e->d_name);
    }
    closedir(d);
    free_names(ours);
    return kept;
}

// Stops before the work if its result could not be put at `path`, or would replace anything but the result of an earlier
// training run (where over_a_run allows that). Returns the path to write to: links followed, no slash at the end.
static char *check_out(const char *option, const char *path, const char *base, int over_a_run)
{
    struct stat here, above;
    char *out = realpath(path, NULL);
    if (!out) {
        out = strdup(path);
        for (size_t n = strlen(out); n > 1 && out[n - 1] == '/'; n--) out[n - 1] = 0;
        if (!*out || !lstat(out, &here)) die("%s %s: expected the name of a directory", option, path);
    } else {
        char *parent = join(out, ".."), *kept;
        if (!stat(out, &here) && !S_ISDIR(here.st_mode)) die("%s %s: exists and is not a directory", option, path);
        if (stat(out, &here) || stat(parent, &above)) die("%s %s: %s", option, path, strerror(errno));
        if (here.st_dev != above.st_dev || same_file(out, "/")) die("%s %s: is a mount point, which cannot be replaced; name a directory inside it", option, path);
        if (same_file(out, ".")) die("%s %s: is the current folder; name a directory inside it", option, path);
        if (same_file(out, base)) die("%s %s: is --model itself; name a new directory", option, path);
        if ((kept = kept_file(out, over_a_run))) die("%s %s: holds %s, which would be lost; name a new directory", option, path, kept);
        free(parent);
    }
    stage_begin(out);
    stage_discard();
    return out;
}

static void write_checked(FILE *f, const void *data, size_t bytes, const char *path)
{
    if (fwrite(data, 1, bytes, f) != bytes) die("cannot write %s: %s", path, strerror(errno));
}

static void close_checked(FILE *f, const char *path)
{
    if (fflush(f) || (fsync(fileno(f)) && errno != EINVAL)) die("cannot write %s: %s", path, strerror(errno));
    if (fclose(f)) die("cannot write %s: %s", path, strerror(errno));
}

static void stage_file(const char *name, const void *data, size_t bytes)
{
    char *path;
    FILE *f = stage_open(name, &path);
    write_checked(f, data, bytes, path);
    close_checked(f, path);
    free(path);
}

// An object, a field a line.
static void stage_json(const char *name, json_t *json)
{
    char *path, *line;
    const char *key, *between = "{";
    json_t *value;
    FILE *f = stage_open(name, &path);
    json_object_foreach(json, key, value) {
        char *text = json_text(value);
        if (asprintf(&line, "%s\n\t\"%s\":\t%s", between, key, text) < 0) die("out of memory");
        write_checked(f, line, strlen(line), path);
        free(line), free(text);
        between = ",";
    }
    write_checked(f, "\n}", 2, path);
    close_checked(f, path);
    free(path);
    json_decref(json);
}

// config.json with this dtype; all else stays as the text spells it.
static void stage_config(const char *text, const char *dtype)
{
    char *out = alloc(strlen(text) + 100, 1), *to = out;
    const char *key, *at = strchr(text, '{') + 1;
    json_t *json = parse_json("config.json", text, strlen(text)), *value;
    if (!json_object_get(json, "torch_dtype") && !json_object_get(json, "dtype")) {
        to += sprintf(to, "{\n\t\"torch_dtype\":\t\"%s\",", dtype);
        text = at;
    }
    json_object_foreach(json, key, value) {
        at = next_value(at);
        if (strcmp(key, "torch_dtype") && strcmp(key, "dtype")) continue;
        to += sprintf(to, "%.*s\"%s\"", (int)(at - text), text, dtype);
        at = json_is_null(value) ? at + strlen("null") : string_end(at) + 1;
        text = at;
    }
    strcpy(to, text);
    stage_file("config.json", out, strlen(out));
    json_decref(json);
    free(out);
}

// One file of another directory, in pieces.
static void stage_copy(const char *dir, const char *name)
{
    static char piece[1 << 20];
    char *from = join(dir, name), *to;
    FILE *in = fopen(from, "rb");
    if (in) {
        FILE *out = stage_open(name, &to);
        for (size_t n; (n = fread(piece, 1, sizeof piece, in));) write_checked(out, piece, n, to);
        if (ferror(in)) die("%s: %s", from, strerror(errno));
        close_checked(out, to);
        fclose(in);
        free(to);
    } else fprintf(stderr, "note: %s is not copied: %s\n", from, strerror(errno));
    free(from);
}

#endif
