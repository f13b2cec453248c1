//  lib/directory.h: an output directory.
// A directory is written whole or not at all: under a temporary name beside its place, synced, then renamed. What lies at
// its place is looked at before the work, and again at the moment of the exchange: nothing but what an earlier run wrote
// is ever removed.

#ifndef DIRECTORY_H
#define DIRECTORY_H
#include <sys/file.h>
#include <sys/random.h>
#include "json.h"

static char staged[PATH_MAX];   // the directory in the making, removed if the program ends before it is published
static int staged_lock = -1;    // an open and locked file of it: while this process lives, nobody takes it for a stale one

// Every file name that was staged so far. A signal may come at any moment, in any thread: a name is on the list before
// its file is there, and it is never taken off.
typedef struct staged_file { struct staged_file *next; char name[]; } staged_file;
static staged_file *staged_files;

// Where a directory is to be put, and what lies there now: its inode, or 0 for nothing.
typedef struct {
    char *path;
    dev_t device;
    ino_t inode;
} place_of_result;

// Runs in signal handlers, too: it calls nothing that they may not.
static void stage_discard(void)
{
    int dir = *staged ? open(staged, O_RDONLY | O_DIRECTORY) : -1;
    if (dir < 0) return;
    const staged_file *f = __atomic_load_n(&staged_files, __ATOMIC_ACQUIRE);
    for (; f; f = f->next) unlinkat(dir, f->name, 0);
    close(dir);
    rmdir(staged);
    *staged = 0;
}

// PATH.WORD-, and 16 digits that no other process finds, where it has the same number (as in containers) or not.
static void name_beside(char name[PATH_MAX], const char *path, const char *word)
{
    uint64_t random;
    if (getrandom(&random, sizeof random, 0) != sizeof random) die("getrandom: %s", strerror(errno));
    int n = snprintf(name, PATH_MAX, "%s.%s-%016llx", path, word, (unsigned long long)random);
    if (n >= PATH_MAX) die("%s: name too long", path);
}

// Whether this process holds the directory now that no other one did. Where a file system knows no locks, errno is not
// EWOULDBLOCK.
static int lock_directory(const char *path, int *fd)
{
    *fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (*fd >= 0 && !flock(*fd, LOCK_EX | LOCK_NB)) return 1;
    int error = errno;
    if (*fd >= 0) close(*fd);
    *fd = -1;
    errno = error;
    return 0;
}

// Removes a directory of files. One that holds a directory is none of ours: it stays as it is.
static int remove_flat(const char *path)
{
    struct stat st;
    DIR *d = opendir(path);
    int flat = d && !fstat(dirfd(d), &st) && st.st_nlink <= 2;          // one link more for every directory inside
    for (struct dirent *e; flat && (e = next_entry(d, path));) unlinkat(dirfd(d), e->d_name, 0);
    if (d) closedir(d);
    return flat && !rmdir(path);
}

// Removes what killed runs left beside `out`: directories of our kind of name that no living process has locked.
static void remove_stale(const char *out)
{
    const char *slash = strrchr(out, '/');
    const char *base = slash ? slash + 1 : out;
    char *parent = slash ? copy_bytes(out, (size_t)(base - out)) : copy_text(".");
    size_t n = strlen(base);
    DIR *d = opendir(parent);                           // a folder that may only be searched keeps them
    if (!d && errno != EACCES && errno != ENOENT) die("%s: %s", parent, strerror(errno));
    for (struct dirent *e; d && (e = next_entry(d, parent));) {
        const char *rest = e->d_name + n;
        int ours = !strncmp(e->d_name, base, n) && !strncmp(rest, ".tmp-", 5);
        if (!ours || strlen(rest) != 21 || strspn(rest + 5, "0123456789abcdef") != 16) continue;
        char path[PATH_MAX];
        int lock;
        snprintf(path, sizeof path, "%.*s%s", (int)(base - out), out, e->d_name);
        if (!lock_directory(path, &lock)) continue;
        if (remove_flat(path)) fprintf(stderr, "note: removed %s, which a run that was killed left behind\n", path);
        close(lock);
    }
    if (d) closedir(d);
    free(parent);
}

// Makes the directory in the making, beside its place. Another process may take it for a stale one before it is locked,
// and remove it: then it is made again.
static void stage_begin(const char *out)
{
    char name[PATH_MAX];
    struct stat st;
    for (int again = 1; again;) {
        name_beside(name, out, "tmp");
        if (mkdir(name, 0777))
            die("cannot write %s: %s; the folder it goes into must exist and be writable", out, strerror(errno));
        int locked = lock_directory(name, &staged_lock);
        again = !locked && errno == EWOULDBLOCK;
        if (locked) again = stat(name, &st) != 0;
    }
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
    for (struct dirent *e; (e = next_entry(d, dir));) {
        struct stat st;
        char *path = join(dir, e->d_name);
        int there = !stat(path, &st);
        if (there && S_ISREG(st.st_mode)) arrput(names, copy_text(e->d_name));
        else if (!there || !S_ISDIR(st.st_mode))
            fprintf(stderr, "note: %s is no file that could be copied and stays behind\n", path);
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

// The files that a training run wrote into dir, by the list in its state.json. NULL if no run wrote there. Runs before
// there was such a list wrote those in `before`.
static char **run_files(const char *dir)
{
    static const char *const before[] = {
        "config.json", "generation_config.json", "model.safetensors", "adapter_config.json",
        "adapter_model.safetensors", "state.safetensors", "tokenizer.model", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json", NULL};
    char *path = join(dir, "state.json"), **names = NULL;
    size_t bytes = 0;
    struct stat st;
    char *text = !stat(path, &st) && S_ISREG(st.st_mode) ? read_file(path, &bytes) : NULL;
    json_t *state = json_loadb(text, bytes, AS_DOUBLES, NULL), *files = json_object_get(state, "files"), *item;
    size_t i;
    if (json_object_get(state, "--method")) arrput(names, copy_text("state.json"));
    for (const char *const *name = before; *name && names && !files; name++) arrput(names, copy_text(*name));
    json_array_foreach(files, i, item) {
        const char *file = json_string_value(item);
        int a_file = file && !strchr(file, '/') && strcmp(file, ".") && strcmp(file, "..");
        if (names && a_file) arrput(names, copy_text(file));
    }
    json_decref(state);
    free(text), free(path);
    return names;
}

// Removes these files, which a training run left in dir, and dir with it. If somebody put more there, that stays, under
// a name beside `out` that says so. Nothing here can fail for want of memory.
static void remove_run(const char *dir, const char *out, char **names)
{
    char kept[PATH_MAX], path[PATH_MAX];
    for (int i = 0; i < arrlen(names); i++) {
        int n = snprintf(path, sizeof path, "%s/%s", dir, names[i]);
        if (n >= PATH_MAX || !unlink(path) || errno == ENOENT) continue;
        fprintf(stderr, "note: cannot remove %s: %s\n", path, strerror(errno));
        return;
    }
    if (!rmdir(dir)) return;
    if (errno != ENOTEMPTY && errno != EEXIST) {
        fprintf(stderr, "note: cannot remove %s: %s\n", dir, strerror(errno));
        return;
    }
    name_beside(kept, out, "kept");
    if (!rename(dir, kept)) fprintf(stderr, "note: files that no run wrote were in %s; they are in %s now\n", out, kept);
}

static void sync_path(const char *path)
{
    int fd = open(path, O_RDONLY);
    if (fd < 0 || (fsync(fd) && errno != EINVAL)) die("%s: %s", path, strerror(errno));
    close(fd);
}

// Exchanges two directories; where the file system cannot do it in one step (NFS), in three.
static int exchange(const char *a, const char *b)
{
    char aside[PATH_MAX];
    if (!renameat2(AT_FDCWD, a, AT_FDCWD, b, RENAME_EXCHANGE)) return 0;
    if (errno != EINVAL && errno != ENOSYS) return -1;
    name_beside(aside, b, "old");
    return rename(b, aside) || rename(a, b) || rename(aside, a);
}

// Puts the directory where nothing is.
static int put_alone(const char *from, const char *to)
{
    struct stat st;
    if (!renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_NOREPLACE)) return 0;
    if (errno != EINVAL && errno != ENOSYS) return -1;
    if (lstat(to, &st)) return rename(from, to);
    errno = EEXIST;
    return -1;
}

// Something else has appeared at the place of a result since it was looked at. It stays, and so does the result.
static void publish_beside(const char *out)
{
    char beside[PATH_MAX];
    name_beside(beside, out, "new");
    if (put_alone(staged, beside)) die("cannot write %s: %s", beside, strerror(errno));
    *staged = 0;
    die("%s: something else has appeared there since this program looked, and is not replaced; the result is in %s",
        out, beside);
}

// Moves the finished directory to its place. An older result there is exchanged in one step and then removed.
static void stage_publish(place_of_result *to)
{
    struct stat now;
    sync_path(staged);
    if (stat(staged, &now)) die("%s: %s", staged, strerror(errno));
    if (put_alone(staged, to->path)) {
        struct stat older;
        if (errno != EEXIST) die("cannot write %s: %s", to->path, strerror(errno));
        if (!to->inode) publish_beside(to->path);
        char **names = run_files(to->path);
        if (exchange(staged, to->path)) die("cannot replace %s: %s", to->path, strerror(errno));
        int known = !stat(staged, &older) && older.st_dev == to->device && older.st_ino == to->inode;
        if (!known && exchange(staged, to->path)) die("cannot replace %s: %s", to->path, strerror(errno));
        if (!known) publish_beside(to->path);
        remove_run(staged, to->path, names);
        free_names(names);
    }
    *staged = 0;
    close(staged_lock);
    to->device = now.st_dev;
    to->inode = now.st_ino;
    char *parent = join(to->path, "..");
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
    for (struct dirent *e; !kept && (e = next_entry(d, dir));) {
        int known = !strcmp(e->d_name, ".") || !strcmp(e->d_name, "..");
        for (int i = 0; i < arrlen(ours); i++) known |= !strcmp(ours[i], e->d_name);
        if (!known) kept = copy_text(e->d_name);
    }
    closedir(d);
    free_names(ours);
    return kept;
}

// Stops if the directory `out` may not be replaced.
static void expect_replaceable(const char *option, const char *path, const char *out, const char *base, int over_a_run)
{
    struct stat here, above;
    char *parent = join(out, "..");
    if (!stat(out, &here) && !S_ISDIR(here.st_mode)) die("%s %s: exists and is not a directory", option, path);
    if (stat(out, &here) || stat(parent, &above)) die("%s %s: %s", option, path, strerror(errno));
    if (here.st_dev != above.st_dev || same_file(out, "/"))
        die("%s %s: is a mount point, which cannot be replaced; name a directory inside it", option, path);
    if (same_file(out, ".")) die("%s %s: is the current folder; name a directory inside it", option, path);
    if (same_file(out, base)) die("%s %s: is --model itself; name a new directory", option, path);
    char *kept = kept_file(out, over_a_run);
    if (kept) die("%s %s: holds %s, which would be lost; name a new directory", option, path, kept);
    free(parent);
}

// Stops before the work if its result could not be put at `path`, or would replace anything but the result of an earlier
// training run (where over_a_run allows that). Returns where to write: links followed, no slash at the end.
static place_of_result check_out(const char *option, const char *path, const char *base, int over_a_run)
{
    struct stat here = {0};
    char *out = realpath(path, NULL);
    if (out) expect_replaceable(option, path, out, base, over_a_run);
    else {
        if (errno != ENOENT) die("%s %s: %s", option, path, strerror(errno));
        out = copy_text(path);
        for (size_t n = strlen(out); n > 1 && out[n - 1] == '/'; n--) out[n - 1] = 0;
        if (!*out || !lstat(out, &here)) die("%s %s: expected the name of a directory", option, path);
    }
    remove_stale(out);
    stage_begin(out);
    stage_discard();
    close(staged_lock);
    int there = !stat(out, &here);
    return (place_of_result){out, there ? here.st_dev : 0, there ? here.st_ino : 0};
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
    char *path;
    const char *key, *between = "{";
    json_t *value;
    FILE *f = stage_open(name, &path);
    json_object_foreach(json, key, value) {
        char *text = json_text(value);
        char *line = text_of("%s\n\t\"%s\":\t%s", between, key, text);
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

// One file of another directory, in pieces. One that its owner keeps from us stays behind.
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
    } else if (errno == EACCES) fprintf(stderr, "note: %s is not copied: %s\n", from, strerror(errno));
    else die("%s: %s", from, strerror(errno));
    free(from);
}

#endif
