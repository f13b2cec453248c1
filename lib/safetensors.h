/*  lib/safetensors.h: tensors of a file, in and out.

   8 bytes little-endian header length, a JSON header {"name": {"dtype", "shape", "data_offsets"}}, the data.
   https://huggingface.co/docs/safetensors. The file is mapped, never read: a weight costs memory once.      */

#ifndef SAFETENSORS_H
#define SAFETENSORS_H
#include "../ops/mat.h"
#include "directory.h"

typedef struct {
    shape shape;
    mat data;
    const char *file, *name;
    size_t from, to;                                           // its bytes of the data
    char unusable[160];                                         // why it can be no weight of a Llama, or empty
} stored;

typedef struct mapping {
    char *p;
    size_t bytes;
    char *path, *line;                                         // line: what a signal handler says if the file is cut short
    int fd;
    struct timespec changed;                                   // the file's last change, when it was mapped
    struct mapping *next;
} mapping;

typedef struct {
    struct { char *key; stored value; } *tensors;              // by name
    mapping **maps;
} checkpoint;

static mapping *mapped;                 // every file that is: a signal handler looks here for the one cut short
#define CHANGED ": was cut short or changed while it was in use; restore it and start again"

// What safetensors knows beside our dtypes, with bits. No weight that we use is of these: they are quantised.
static const struct { const char *name; int bits; } other_dtypes[] = {
    {"BOOL", 8}, {"F4", 4}, {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8}, {"I8", 8}, {"F8_E5M2", 8}, {"F8_E4M3", 8},
    {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16}, {"U16", 16}, {"I32", 32}, {"U32", 32},
    {"C64", 64}, {"I64", 64}, {"U64", 64}, {NULL, 0}
};

static void expect_usable(stored s)
{
    if (*s.unusable) die("%s: tensor %s %s", s.file, s.name, s.unusable);
}

// dst = a tensor of a file. Its matrix points into mapped memory of the host, in spite of the type. The pages it has to
// itself are given back: copied and mapped, full fine-tuning's weights would stand in memory twice.
static void put_stored(mat dst, stored s)
{
    expect_usable(s);
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t from = (uintptr_t)s.data.p;
    uintptr_t to = from + elements(s.data) * dtypes[s.data.type].size;
    put(dst, (const void *)from, s.data.type);
    from = (from + page - 1) / page * page;
    to = to / page * page;
    if (from < to) madvise((void *)from, to - from, MADV_DONTNEED);
}

static const char *shape_text(shape s, char text[64])
{
    int n = snprintf(text, 64, "[%d", s.n[0]);
    for (int i = 1; i < 3 && s.n[i]; i++) n += snprintf(text + n, 64 - (size_t)n, ", %d", s.n[i]);
    snprintf(text + n, 64 - (size_t)n, "]");
    return text;
}

// A whole number that is spelled as one, as the format asks; -1 for anything else.
static double whole_number(const json_t *item)
{
    double x = json_number_value(item);
    return json_is_integer(item) && x >= 0 && x <= 9e15 ? x : -1;
}

// The bits of a number of the file, and its dtype if it is one of ours.
static int bits_of(const char *tensor, const json_t *item, const char *path, enum dtype *type)
{
    const char *name = string_field(item, "dtype");
    if (!name) name = "nothing that is known";
    for (int i = 0; i < DTYPES; i++)
        if (!strcmp(name, dtypes[i].name)) { *type = (enum dtype)i; return 8 * (int)dtypes[i].size; }
    for (int i = 0; other_dtypes[i].name; i++)
        if (!strcmp(name, other_dtypes[i].name)) return other_dtypes[i].bits;
    die("%s: tensor %s has as dtype %s, expected F32, F16 or BF16", path, tensor, name);
}

// One entry of the header, every number of it checked against the file before it is believed.
static stored stored_read(const char *name, const json_t *item, const char *path, char *data, size_t bytes)
{
    const json_t *dims = json_object_get(item, "shape"), *dim;
    const json_t *offsets = json_object_get(item, "data_offsets");
    stored s = {.file = path};
    enum dtype type = DTYPES;
    double a = whole_number(json_array_get(offsets, 0)), b = whole_number(json_array_get(offsets, 1));
    double bits = bits_of(name, item, path, &type);
    int at = 0, small = 1, empty = 0;
    size_t i, count = json_array_size(dims);
    if (!json_is_array(dims)) die("%s: tensor %s has a bad shape", path, name);
    json_array_foreach(dims, i, dim) {
        double n = whole_number(dim);
        bits *= n > 1 ? n : 1;                                  // zeros count below: nothing on the way may overflow
        if (n < 0 || bits > 9e15) die("%s: tensor %s has a bad shape", path, name);
        empty |= n == 0;
        small &= n >= 1 && n <= INT_MAX;
        if (at < 3) s.shape.n[at++] = (int)(n <= INT_MAX ? n : 0);
    }
    if (empty) bits = 0;
    int bad = json_array_size(offsets) != 2 || a < 0 || b < a;
    if (bad) die("%s: tensor %s has bad data_offsets", path, name);
    if (b > (double)bytes)
        die("%s: tensor %s ends at byte %.0f of the data, the file has %zu: truncated? fetch it again", path, name, b, bytes);
    if (8 * (b - a) != bits)
        die("%s: tensor %s takes %.0f bytes by its shape, data_offsets give %.0f", path, name, bits / 8, b - a);
    const char *dtype = string_field(item, "dtype");
    size_t room = sizeof s.unusable;
    if (type == DTYPES)
        snprintf(s.unusable, room, "is %s, expected F32, F64, F16 or BF16; if it is quantised, get the model in float16 or "
                 "bfloat16", dtype);
    else if (count < 1 || count > 3) snprintf(s.unusable, room, "has %zu dimensions, expected 1 to 3", count);
    else if (!small) snprintf(s.unusable, room, "has a side of 0 or above %d", INT_MAX);
    s.from = (size_t)a, s.to = (size_t)b;
    if (!*s.unusable) s.data = mat_of(data + s.from, type, s.shape);
    return s;
}

static int by_offset(const void *a, const void *b)
{
    const stored *x = a, *y = b;
    return x->from != y->from ? (x->from > y->from ? 1 : -1) : (x->to > y->to) - (x->to < y->to);
}

// Every byte of the data belongs to one tensor, as the safetensors library asks: no two share one, none is left over.
// Sorts the list.
static void expect_covered(stored *list, const char *path, size_t bytes)
{
    size_t end = 0;
    if (list) qsort(list, (size_t)arrlen(list), sizeof *list, by_offset);
    for (int i = 0; i < arrlen(list); i++) {
        const stored *s = &list[i];
        if (s->from < end)
            die("%s: tensors %s and %s share bytes of the data; fetch it again", path, list[i - 1].name, s->name);
        if (s->from > end)
            die("%s: bytes %zu to %zu of the data belong to no tensor; fetch it again", path, end, s->from);
        end = s->to;
    }
    if (end < bytes) die("%s: %zu bytes stand behind the last tensor; fetch it again", path, bytes - end);
}

static void metadata_check(json_t *item, const char *path)
{
    const char *key;
    const json_t *entry;
    if (!json_is_object(item) && !json_is_null(item)) die("%s: __metadata__ is not an object of texts", path);
    json_object_foreach(item, key, entry)
        if (!json_is_string(entry)) die("%s: __metadata__ is not an object of texts, see \"%s\"", path, key);
}

// Two things that Jansson reads and the library does not: -0, which is no whole number without a sign, and
// more than 127 levels.
static void refuse_in_header(const char *path, const char *at, const char *end)
{
    int depth = 0;
    for (; at < end; at++) {
        if (*at == '"') at = string_end(at);
        depth += *at == '{' || *at == '[';
        depth -= *at == '}' || *at == ']';
        if (depth > 127) die("%s: nested deeper than 127 levels", path);
        if (*at == '-' && at[1] == '0') die("%s: -0 is no size and no offset", path);
    }
}

// Maps a file and adds it to the checkpoint. Its pages are only ever read.
static mapping *mapping_open(checkpoint *c, const char *path)
{
    expect_file(path);
    mapping *f = alloc(1, sizeof *f);
    struct stat st;
    f->fd = open(path, O_RDONLY | O_CLOEXEC);
    if (f->fd < 0 || fstat(f->fd, &st)) die("%s: %s", path, strerror(errno));
    f->bytes = (size_t)st.st_size, f->changed = st.st_mtim;
    if (f->bytes < 8) die("%s: %zu bytes are no safetensors file", path, f->bytes);
    f->p = mmap(NULL, f->bytes, PROT_READ, MAP_PRIVATE | MAP_NORESERVE, f->fd, 0);
    if (f->p == MAP_FAILED) die("%s: cannot map %zu bytes: %s", path, f->bytes, strerror(errno));
    char *shown = printable(path, "");
    f->path = copy_text(path);
    f->line = text_of("error: %s" CHANGED "\n", shown);
    free(shown);
    f->next = mapped, mapped = f;
    arrput(c->maps, f);
    return f;
}

// Adds one file's tensors to the checkpoint.
static void safetensors_open(checkpoint *c, const char *path)
{
    const mapping *f = mapping_open(c, path);
    uint64_t header = 0;
    refuse_pointer(path, f->p, f->bytes);
    for (int i = 7; i >= 0; i--) header = header << 8 | (unsigned char)f->p[i];
    if (header > f->bytes - 8 || header > 100000000)
        die("%s: header of %llu bytes in a file of %zu: not safetensors, or truncated",
            path, (unsigned long long)header, f->bytes);
    char *where = alloc(strlen(path) + 16, 1);
    sprintf(where, "%s, its header", path);
    json_t *json = parse_object(where, f->p + 8, header, AS_INTEGERS), *item;
    refuse_in_header(where, f->p + 8, f->p + 8 + header);
    const char *name;
    stored *list = NULL;
    json_object_foreach(json, name, item) {
        if (!strcmp(name, "__metadata__")) { metadata_check(item, path); continue; }
        if (shgeti(c->tensors, name) >= 0) die("%s: tensor %s occurs twice", path, name);
        stored s = stored_read(name, item, f->path, f->p + 8 + header, f->bytes - 8 - header);
        shput(c->tensors, name, s);
        ptrdiff_t at = shgeti(c->tensors, name);
        c->tensors[at].value.name = s.name = c->tensors[at].key;
        arrput(list, s);
    }
    expect_covered(list, path, f->bytes - 8 - header);
    arrfree(list);
    json_decref(json);
    free(where);
}

// Stops at a file that holds weights in a format that is not read here.
static void refuse_weights(const char *dir, const char *name)
{
    static const char save_again[] = "in PyTorch's own format, which is not read; open it with transformers or PEFT, "
                                     "whose save_pretrained() writes safetensors";
    static const struct { const char *start, *end, *says; } formats[] = {
        {"", ".gguf", "in llama.cpp's format, which is not read; fetch the model it was made from, in safetensors"},
        {"consolidated", ".pth", "in Meta's own format, which is not read; fetch the repository whose name ends in -hf, "
                                 "or use transformers' convert_llama_weights_to_hf.py"},
        {"", ".pth", "in PyTorch's own format, which is not read; python3 dev/rwkv_pth.py turns BlinkDL's files of RWKV6 into "
                     "a directory that is"},
        {"pytorch_model", ".bin", save_again},
        {"adapter_model", ".bin", save_again},
        {"", ".pt", save_again},
        {"", ".bin", save_again},
        {"", ".h5", "in Keras' format, which is not read; open it with transformers, whose save_pretrained() writes safetensors"},
        {"", ".msgpack",
            "in Flax' format, which is not read; open it with transformers, whose save_pretrained() writes safetensors"},
        {"model-", ".safetensors", "a part of a model, and model.safetensors.index.json, which names the parts, "
                                   "is not here; fetch it, too"},
        {"", ".safetensors",
            "a safetensors file of another name; if it holds these weights, give it the name that is expected here"},
    };
    size_t n = strlen(name);
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++) {
        size_t end = strlen(formats[i].end), start = strlen(formats[i].start);
        if (n < end || strcmp(name + n - end, formats[i].end) || strncmp(name, formats[i].start, start)) continue;
        die("%s: %s is %s", dir, name, formats[i].says);
    }
}

static void refuse_format(const char *dir)
{
    DIR *d = opendir(dir);
    if (!d) die("%s: %s", dir, strerror(errno));
    for (struct dirent *e; (e = next_entry(d, dir));) refuse_weights(dir, e->d_name);
    closedir(d);
}

// dir/base.safetensors, or the shards that dir/base.safetensors.index.json names.
static checkpoint checkpoint_open(const char *dir, const char *base)
{
    checkpoint c = {0};
    sh_new_arena(c.tensors);
    char name[64];
    snprintf(name, sizeof name, "%s.safetensors", base);
    char *path = join(dir, name);
    if (exists(path)) { safetensors_open(&c, path); free(path); return c; }
    snprintf(name, sizeof name, "%s.safetensors.index.json", base);
    char *index = join(dir, name);
    if (!exists(index)) refuse_format(dir);
    if (!exists(index)) die("%s: no %s.safetensors and no %s here; expected one of them", dir, base, name);

    size_t bytes;
    char *text = read_file(index, &bytes);
    json_t *json = parse_json(index, text, bytes), *map = json_object_get(json, "weight_map"), *item;
    const char *tensor;
    if (!json_is_object(map)) die("%s: field \"weight_map\" is missing", index);
    struct { char *key; int value; } *seen = NULL;
    json_object_foreach(map, tensor, item) {
        const char *file = json_string_value(item);
        if (!file || strchr(file, '/')) die("%s: tensor %s is not mapped to a file of this folder", index, tensor);
        if (shgeti(seen, file) >= 0) continue;
        shput(seen, file, 1);
        char *shard = join(dir, file);
        safetensors_open(&c, shard);
        free(shard);
    }
    json_object_foreach(map, tensor, item)
        if (shgeti(c.tensors, tensor) < 0) die("%s: tensor %s is not in %s", index, tensor, json_string_value(item));
    shfree(seen);
    json_decref(json);
    free(text), free(index), free(path);
    return c;
}

static void checkpoint_close(checkpoint *c)
{
    for (int i = 0; i < arrlen(c->maps); i++) {
        mapping *f = c->maps[i], **at = &mapped;
        while (*at != f) at = &(*at)->next;
        *at = f->next;
        munmap(f->p, f->bytes), close(f->fd);
        free(f->path), free(f->line), free(f);
    }
    arrfree(c->maps);
    shfree(c->tensors);
}

// Stops if a file is no longer what was mapped: the rest of a page behind a new end reads as zeros, and what was
// written over reads as that.
static void checkpoint_unchanged(const checkpoint *c)
{
    struct stat st;
    for (int i = 0; i < arrlen(c->maps); i++) {
        const mapping *f = c->maps[i];
        int there = !fstat(f->fd, &st), size = there && (size_t)st.st_size == f->bytes;
        if (!size || memcmp(&st.st_mtim, &f->changed, sizeof f->changed)) die("%s" CHANGED, f->path);
    }
}

// ---- what is wanted from a file ------------------------------------------------------------------------------

// A tensor that is wanted: *to gets its numbers. Of a frozen weight *to becomes a view of the mapped file, or, where
// the device cannot read that, a copy.
typedef struct {
    char name[112];
    shape shape;
    mat *to;
    int frozen;
} request;

// Fetches every tensor of the list. Stops at one that the file lacks, that has another shape, or that trains and holds
// NaN or Inf; and at one of the file that is not in the list, unless `spare` says that it does no harm. `asks`: who
// wants these, for the message. Returns whether the file is read from now on.
static int checkpoint_fetch(checkpoint *c, const char *dir, const request *list, const char *asks,
                            int (*spare)(const char *name))
{
    struct { char *key; int value; } *names = NULL;
    int read = 0;
    char a[64], b[64];
    for (const request *w = list; w < list + arrlen(list); w++) {
        ptrdiff_t found = shgeti(c->tensors, w->name);
        if (found < 0) die("%s: tensor %s %s is missing", dir, w->name, shape_text(w->shape, a));
        stored s = c->tensors[found].value;
        if (memcmp(&s.shape, &w->shape, sizeof(shape)))
            die("%s: tensor %s has shape %s, %s asks for %s",
                s.file, w->name, shape_text(s.shape, a), asks, shape_text(w->shape, b));
        expect_usable(s);
        if (w->frozen) *w->to = dev_weight(s.data);
        else put_stored(*w->to, s);
        read |= w->to->p == s.data.p;
        int sums = !w->frozen && w->to->type == TYPE_OF(wide);          // sum_of_squares reads nothing else
        if (sums && !isfinite(sum_of_squares(*w->to))) die("%s: tensor %s holds NaN or Inf", s.file, w->name);
        shput(names, (char *)w->name, 1);
    }
    for (int i = 0; i < shlen(c->tensors); i++)
        if (shgeti(names, c->tensors[i].key) < 0 && !(spare && spare(c->tensors[i].key)))
            die("%s: tensor %s is none that %s asks for", c->tensors[i].value.file, c->tensors[i].key, asks);
    shfree(names);
    return read;
}

// ---- out ---------------------------------------------------------------------------------------------------

// A tensor to be written.
typedef struct output {
    char name[112];
    shape shape;
    enum dtype type;            // in the file
    mat data, below, beside;    // the data; `below`: further rows; `beside`: minus these, as further columns
    void (*make)(const struct output *o, wide *x);             // or: writes the numbers to x; NULL where `data` holds them
    void (*blame)(const struct output *o, double largest);     // dies if it knows why the numbers are not finite; or NULL
    void *model, *linear;       // for these two
} output;

// The header, in a fresh string. Spaces fill it up to a multiple of 8 bytes: numbers behind it are read where they lie.
static char *safetensors_header(const output *o, int n)
{
    json_t *header = json_pack("{s:{s:s}}", "__metadata__", "format", "pt");     // what transformers asks for
    json_int_t from = 0, to;
    for (int i = 0; i < n; i++, from = to) {
        const int *side = o[i].shape.n;
        json_t *dims = json_array();
        to = from + (json_int_t)(elements(mat_of(NULL, F32, o[i].shape)) * dtypes[o[i].type].size);
        for (int d = 0; d < 3 && side[d]; d++) json_array_append_new(dims, json_integer(side[d]));
        set_field(header, o[i].name, json_pack("{s:s, s:o, s:[I, I]}", "dtype", dtypes[o[i].type].name,
            "shape", dims, "data_offsets", from, to));
    }
    char *text = json_dumps(header, JSON_COMPACT);
    if (!text) die("a header of %d tensors cannot be written as JSON", n);
    char *filled = text_of("%s%*s", text, (int)(-strlen(text) % 8), "");
    free(text), json_decref(header);
    return filled;
}

// The tensor as contiguous wide numbers. x has room for all of it.
static void output_fetch(const output *o, wide *x)
{
    if (o->make) { o->make(o, x); return; }
    size_t n = elements(o->data);
    get(x, o->data);
    if (o->below.p) get(x + n, o->below);
    if (!o->beside.p) return;
    int rows = o->data.rows, a = o->data.cols, b = o->beside.cols;            // [data | -beside], row by row from the last
    wide *y = on_host(o->beside);
    for (int i = rows - 1; i >= 0; i--) {
        memmove(x + (size_t)i * (size_t)(a + b), x + (size_t)i * (size_t)a, (size_t)a * sizeof *x);
        for (int j = 0; j < b; j++) x[(size_t)i * (size_t)(a + b) + (size_t)(a + j)] = -y[(size_t)i * (size_t)b + (size_t)j];
    }
    free(y);
}

// The largest magnitude of n numbers; NaN or Inf if there is one.
static double largest(const wide *x, size_t n)
{
    double most = 0;
    for (size_t i = 0; i < n && isfinite(most); i++) if (!(fabs((double)x[i]) <= most)) most = fabs((double)x[i]);
    return most;
}

// Stops before a tensor is written that holds NaN or Inf, or would in its file's dtype.
static void refuse_not_finite(const output *o, const wide *x, size_t n)
{
    double most = largest(x, n);
    if (isfinite(rounded(most, o->type))) return;
    if (o->blame) o->blame(o, most);
    if (!isfinite(most)) die("tensor %s holds NaN or Inf and is not written", o->name);
    die("tensor %s has a %g, which is Inf in %s; start from a copy of the model in float32 or bfloat16",
        o->name, most, dtypes[o->type].name);
}

static void safetensors_write(const char *name, const output *o, int n)
{
    char *path, *text = safetensors_header(o, n);
    FILE *f = stage_open(name, &path);
    uint64_t bytes = strlen(text);
    unsigned char length[8];
    for (int i = 0; i < 8; i++) length[i] = (unsigned char)(bytes >> 8 * i);
    write_checked(f, length, 8, path);
    write_checked(f, text, bytes, path);
    for (int i = 0; i < n; i++) {
        size_t count = elements(mat_of(NULL, F32, o[i].shape));
        wide *x = alloc(count, sizeof *x);
        output_fetch(&o[i], x);
        refuse_not_finite(&o[i], x, count);
        if (o[i].type != TYPE_OF(wide)) narrow(x, o[i].type, x, count);
        write_checked(f, x, count * dtypes[o[i].type].size, path);
        free(x);
    }
    close_checked(f, path);
    free(text), free(path);
}

// ---- a file that changes while it is mapped ------------------------------------------------------------------

// Reading a mapped file beyond the end that it has by now raises SIGBUS. Ends the program as die() does, with nothing
// but what a signal handler may call. The threads of a product meet the end together; the first one speaks.
static void on_cut_file(int signal_number, siginfo_t *info, void *context)
{
    const mapping *f = mapped;
    (void)context;
    while (f && ((char *)info->si_addr < f->p || (char *)info->si_addr >= f->p + f->bytes)) f = f->next;
    if (!f) { signal(signal_number, SIG_DFL); return; }         // another fault: it comes again and ends the program
    while (__atomic_test_and_set(told, __ATOMIC_SEQ_CST)) pause();
    stage_discard();
    ssize_t written = write(errors_to, f->line, strlen(f->line));
    _exit(written < 0 ? 2 : 1);
}

static void catch_cut_files(void)
{
    sigaction(SIGBUS, &(struct sigaction){.sa_sigaction = on_cut_file, .sa_flags = SA_SIGINFO}, NULL);
}

#endif
