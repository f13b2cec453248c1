/*  dev/fuzz.c: bytes from outside, read by every reader of the program. A refusal (die) is fine; a crash, an
    overrun, a hang or a broken claim is not.

        make fuzz SECONDS=60              libFuzzer, every reader in turn, from the inputs in dev/corpus
        READER=config build/fuzz FILE     one input again
        build/corpus                      every input of dev/corpus once, as `make test` does
        build/corpus config               for dev/differential.py: sizes and bytes come in, verdicts go out

    A new reader is a row of readers[] and a directory of a few inputs in dev/corpus.                       */

#define _GNU_SOURCE
#include <setjmp.h>
#include <stdlib.h>
static jmp_buf refused;
#define exit(status) longjmp(refused, 1)                // die() comes back to is_read()
#define __atomic_test_and_set(flag, order) (*(flag) = 0)     // and may speak again
#define main train_main
#include "../train.c"
#undef main
#undef exit

enum { MOST_FILES = 4 };
static char dir[64];                                    // in memory; a reader's files are here
static char path[MOST_FILES][128];
static char said[1 << 16];                              // what a reader tells dev/differential.py

__attribute__((format(printf, 1, 2)))
static void tell(const char *format, ...)
{
    size_t n = strlen(said);
    va_list args;
    va_start(args, format);
    vsnprintf(said + n, sizeof said - n, format, args);
    va_end(args);
}

static void claim(int holds)
{
    if (!holds) abort();
}

static void write_file(const char *name, const void *data, size_t size)
{
    int fd = open(name, O_WRONLY | O_CREAT, 0600);
    claim(write(fd, data, size) == (ssize_t)size && !ftruncate(fd, (off_t)size) && !close(fd));
}

// ---- the readers -----------------------------------------------------------------------------------------

// Every byte that a header promises can be read.
static void read_tensors(void)
{
    checkpoint c = checkpoint_open(dir, "model");
    for (int i = 0; i < shlen(c.tensors); i++) {
        mat m = c.tensors[i].value.data;
        if (*c.tensors[i].value.unusable) continue;
        wide *x = alloc(elements(m), sizeof *x);
        get(x, m);
        free(x);
    }
    checkpoint_close(&c);
}

static void read_object(void)
{
    size_t bytes;
    char *text = read_file(path[0], &bytes);
    json_t *json = parse_json(path[0], text, bytes);
    char *again = json_text(json);
    json_decref(parse_json("what was written", again, strlen(again)));
    json_decref(json);
    free(text), free(again);
}

// What a merge would write beside its weights is read as the same. A model of few layers is laid out.
static void read_config(void)
{
    opt.model = dir;
    config c = open_config(), again;
    snprintf(staged, sizeof staged, "%s/staged", dir);
    stage_config(c.text, "bfloat16");
    char *written = join(staged, "config.json");
    again = config_read(written);
    claim(again.dim == c.dim && again.layers == c.layers && again.eps == c.eps && again.theta == c.theta);
    free(written), free(again.text);
    model m = {0};
    if (c.layers <= 4) model_measure(&m, c, plan_from_options());
    if (c.layers <= 4) model_unmeasure(&m);
    free(c.text);
}

static tokenizer *bundled;

// The length of the input says by which template a dialogue is written.
static void read_row_file(void)
{
    enum { LONGEST = 256 };
    struct stat st;
    if (stat(path[0], &st)) abort();
    chat.is = &templates[st.st_size % TEMPLATES];
    dataset d = read_rows(bundled, path[0], LONGEST);
    check_ids(&d, tokenizer_vocab(bundled));
    batch b = batch_new(LONGEST, 1);
    for (int i = 0; i < arrlen(d.rows); i++) {
        const row *r = &d.rows[i];
        claim(r->prompt >= 1 && r->n <= LONGEST && learnt_tokens(r) >= 1);
        batch_clear(&b);
        batch_add(&b, r);
        free(decode(bundled, r->ids, r->n));
    }
    batch_free(&b);
    free_rows(&d);
}

static void read_template(void)
{
    char *source = own_template(dir);
    if (!source || !template_known_by(source)) die("no template");
    free(source);
}

// What a model answers, and what a row has.
static void read_answers(void)
{
    size_t bytes;
    char *given = exists(path[0]) ? read_file(path[0], &bytes) : copy_text("");
    char *right = exists(path[1]) ? read_file(path[1], &bytes) : copy_text("");
    if (same_answer(given, right)) claim(*given && *right);
    free(given), free(right);
}

// A model of one layer, which adapters are read for, and a run that trains it, which states are read for.
static const config tiny = {
    .backbone = &llama_backbone, .dim = 8, .hidden = 12, .layers = 1, .heads = 2, .kv_heads = 2, .head_dim = 4, .vocab = 4,
    .max_pos = 16, .eps = 1e-6, .theta = 10000,
};
static run tiny_run;

static void tiny_options(void)
{
    opt.method = "lora";
    opt.rank = 2;
    opt.targets = "q";
    opt.model = opt.data = "x";
}

static void read_adapter(void)
{
    plan p = plan_from_options();
    peft_read_config(&p, dir);
    model m = {0};
    model_measure(&m, tiny, p);
    size_t numbers = 0;
    for (int k = 0; k < KINDS; k++) numbers += m.used[k];
    if (numbers > 1 << 16) die("large");
    model_allocate(&m);
    peft_read_weights(&m, dir);
    model_free(&m);
}

// The settings are those of the tiny run but for what the input says, so that no new option makes it stale.
static void write_state_json(void)
{
    size_t bytes;
    char *text = read_file(path[0], &bytes), *file = join(dir, "state.json");
    json_t *settings = run_settings(&tiny_run), *changes = json_loadb(text, bytes, AS_INTEGERS, NULL);
    char *all = json_is_object(changes) ? NULL : text;
    json_object_update(settings, changes);
    if (!all) all = json_text(settings);
    write_file(file, all, strlen(all));
}

static void read_state(void)
{
    tiny_options();
    write_state_json();
    free_names(run_files(dir));
    claim(resume_run(&tiny_run, dir) >= 1);
}

// What texts become with a tokenizer.model.
static void encode_texts(const char *file)
{
    static const char *const texts[] = {            // those of dev/differential.py
        "Hello world", " a  b ", "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\n\t", "<s></s><unk>abab",
        "\xe2\x96\x81" "a\xff", "  "};
    char err[512];
    tokenizer *t = tokenizer_load(file, err, sizeof err);
    if (!t) die("%s", err);
    tell("[");
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        size_t n;
        int *ids = tokenizer_encode(t, texts[i], strlen(texts[i]), 1, &n);
        tell("%s[", i ? ", " : "");
        for (size_t j = 0; j < n; j++) {
            claim(ids[j] >= 0 && ids[j] < tokenizer_vocab(t));
            tell("%s%d", j ? ", " : "", ids[j]);
        }
        tell("]");
        free(decode(t, ids, (int)n));
        free(ids);
    }
    tell("]");
    tokenizer_free(t);
}

static void read_tokenizer(void) { encode_texts(path[0]); }

// The same, of a model that begins with all that is asked for: what is fuzzed are pieces and settings behind it.
static const char bytes_model[] = "dev/corpus/tokenizer/bytes";
static void read_pieces(void)
{
    size_t bytes, more;
    char *whole = join(dir, "tokenizer.model");
    char *text = read_file(bytes_model, &bytes), *behind = read_file(path[0], &more);
    text = resize(text, bytes + more);
    memcpy(text + bytes, behind, more);
    write_file(whole, text, bytes + more);
    encode_texts(whole);
    free(whole), free(text), free(behind);
}

// RWKV's vocabulary: all bytes, and what is fuzzed behind them. What is encoded comes back as it was.
static void read_words(void)
{
    static const char text[] = "The cat's \xc3\xa9\xe4\xba\xba ab abc\n\n\t 12";
    size_t more, n, bytes, size = 0;
    char *whole = join(dir, "rwkv_vocab_v20230424.txt"), *behind = read_file(path[0], &more);
    char *words = alloc(256 * 16 + more, 1);
    for (int b = 0; b < 256; b++) size += (size_t)sprintf(words + size, "%d b'\\x%02x' 1\n", b + 1, b);
    memcpy(words + size, behind, more);
    write_file(whole, words, size + more);
    tokenizer *t = open_words(whole, 0);
    int *ids = tokenizer_encode(t, text, strlen(text), 1, &n);
    char *back = tokenizer_decode(t, ids, n, &bytes);
    claim(bytes == strlen(text) && !memcmp(back, text, bytes));
    tokenizer_free(t);
    free(ids), free(back), free(whole), free(behind), free(words);
}

static void read_specials(void)
{
    static const char text[] = " a<s> b </s>[INST] <pad>c";
    char err[200];
    size_t n;
    tokenizer *t = tokenizer_load(bytes_model, err, sizeof err);
    if (!t) abort();
    char *json_path;
    json_t *json = directory_json(dir, "tokenizer.json", &json_path);
    read_special_tokens(t, dir, json_path, json, 0);
    json_decref(json);
    free(json_path);
    int *ids = tokenizer_encode(t, text, sizeof text - 1, 1, &n);
    free(decode(t, ids, (int)n));
    free(ids);
    tokenizer_free(t);
}

// A tokenizer.json without a tokenizer.model, or GPT-2's two files.
static void read_other_tokenizer(void)
{
    static const char text[] = " ab<s> a\xcc\x81" "1234 don't\n\n  x";
    size_t n;
    tokenizer *t = open_tokenizer(dir, 0);
    int *ids = tokenizer_encode(t, text, sizeof text - 1, 1, &n);
    free(decode(t, ids, (int)n));
    free(ids);
    tokenizer_free(t);
}

// What stays of a log is its beginning, in whole lines.
static void read_log_again(void)
{
    size_t bytes, kept;
    char *before = read_file(path[0], &bytes);
    opt.eval_every = 2;
    fclose(open_log(path[0], 1 + (int)(bytes % 5)));
    char *after = read_file(path[0], &kept);
    claim(kept <= bytes && !memcmp(before, after, kept) && (!kept || after[kept - 1] == '\n'));
    free(before), free(after);
}

static FILE *nowhere;

static void read_points(void)
{
    FILE *log = fopen(path[0], "r");
    if (!log) abort();
    write_points(nowhere, log);
    fclose(log);
}

static void read_cells(void)
{
    cell c = {.label = "lora", .steps = 4};
    size_t bytes;
    char *log = exists(path[0]) ? read_file(path[0], &bytes) : copy_text("");
    char *text = exists(path[1]) ? read_file(path[1], &bytes) : copy_text("");
    read_log(&c, log, nowhere);
    read_output(&c, text);
    free(log), free(text);
}

// An argument a line. A number that is taken lies in its range.
static void read_arguments(void)
{
    size_t bytes;
    char *text = read_file(path[0], &bytes), *argv[64] = {"train"};
    int argc = 1;
    for (char *line = strtok(text, "\n"); line && argc < 63; line = strtok(NULL, "\n")) argv[argc++] = line;
    parse_options(argc, argv);
    omp_set_num_threads(1);
    plan_from_options();
    for (int i = 0; i < OPTIONS; i++) {
        const struct option *o = &option_table[i];
        if (!given_values[i] || (o->kind != 'i' && o->kind != 'd')) continue;
        double x = o->kind == 'd' ? *(const double *)field_of(&opt, o) : *(const int *)field_of(&opt, o);
        claim(x >= o->least && x <= o->most);
    }
    free(text);
}

static void read_quota(void)
{
    claim(usable_cpus(dir) >= 1);
}

// What an input is made of, for dev/fuzz_mutate.h.
enum form { PLAIN, JSON, SAFETENSORS, PROTOBUF, GZIP };

static const struct reader {
    const char *name;
    void (*read)(void);
    struct { const char *name; enum form form; } files[MOST_FILES];  // NUL parts them; an empty one is absent
} readers[] = {
    {"safetensors", read_tensors,   {{"model.safetensors", SAFETENSORS}}},
    {"index",       read_tensors,   {{"model.safetensors.index.json", JSON}, {"a.safetensors", SAFETENSORS}}},
    {"object",      read_object,    {{"object.json", JSON}}},
    {"config",      read_config,    {{"config.json", JSON}, {"generation_config.json", JSON}}},
    {"jsonl",       read_row_file,  {{"rows.jsonl", JSON}}},
    {"json",        read_row_file,  {{"rows.json", JSON}}},
    {"gz",          read_row_file,  {{"rows.jsonl.gz", GZIP}}},
    {"txt",         read_row_file,  {{"rows.txt", PLAIN}}},
    {"template",    read_template,  {{"chat_template.jinja", PLAIN}, {"tokenizer_config.json", JSON}}},
    {"answers",     read_answers,   {{"given", PLAIN}, {"right", PLAIN}}},
    {"adapter",     read_adapter,   {{"adapter_config.json", JSON},
                                     {"adapter_model.safetensors", SAFETENSORS}}},
    {"state",       read_state,     {{"changes", JSON}, {"state.safetensors", SAFETENSORS}}},
    {"tokenizer",   read_tokenizer, {{"tokenizer.model", PROTOBUF}}},
    {"pieces",      read_pieces,    {{"behind", PROTOBUF}}},
    {"words",       read_words,     {{"behind", PLAIN}}},
    {"specials",    read_specials,  {{"added_tokens.json", JSON}, {"special_tokens_map.json", JSON},
                                     {"tokenizer_config.json", JSON}, {"tokenizer.json", JSON}}},
    {"merges",      read_other_tokenizer, {{"tokenizer_config.json", JSON}, {"vocab.json", JSON},
                                           {"merges.txt", PLAIN}, {"tokenizer.json", JSON}}},
    {"log",         read_log_again, {{"log.jsonl", PLAIN}}},
    {"points",      read_points,    {{"log.jsonl", PLAIN}}},
    {"cell",        read_cells,      {{"cell.log", PLAIN}, {"cell.txt", PLAIN}}},
    {"options",     read_arguments, {{"arguments", PLAIN}}},
    {"quota",       read_quota,     {{"proc/self/cgroup", PLAIN}, {"sys/fs/cgroup/cpu.max", PLAIN}}},
};
enum { READERS = sizeof readers / sizeof *readers };

// ---- one input -------------------------------------------------------------------------------------------

static const struct reader *reader;
static options usual;

static int file_count(const struct reader *r)
{
    int n = 0;
    while (n < MOST_FILES && r->files[n].name) n++;
    return n;
}

// What readers need that no input changes, and what libraries keep once they have it.
static void prepare(void)
{
    static char buffer[1 << 12];
    char err[200];
    if (!(bundled = tokenizer_load("base/tokenizer.model", err, sizeof err))) abort();
    if (!(nowhere = fopen("/dev/null", "w")) || setvbuf(nowhere, buffer, _IOFBF, sizeof buffer)) abort();
    chat.bos = "<s>";
    chat.eos = "</s>";
    usual = opt;
    tiny_options();
    model_measure(&tiny_run.m, tiny, plan_from_options());
    model_allocate(&tiny_run.m);
    tiny_run.steps = 4;
    opt = usual;
    omp_set_num_threads(1);
#pragma omp parallel
    {}
}

// The reader of this name, and a directory for its files; b.safetensors is a shard that an index may name.
static void choose_reader(const char *name)
{
    static const char *const folders[] = {
        "staged", "proc", "proc/self", "sys", "sys/fs", "sys/fs/cgroup", NULL};
    for (reader = readers; reader < readers + READERS && strcmp(reader->name, name); reader++) {}
    if (reader == readers + READERS) {
        fprintf(stderr, "there is no reader \"%s\" in dev/fuzz.c\n", name);
        abort();
    }
    snprintf(dir, sizeof dir, "%s/fuzz-XXXXXX", access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm");
    if (!mkdtemp(dir)) abort();
    for (const char *const *sub = folders; *sub; sub++) {
        snprintf(path[0], sizeof path[0], "%s/%s", dir, *sub);
        mkdir(path[0], 0777);
    }
    snprintf(path[0], sizeof path[0], "%s/b.safetensors", dir);
    char *shard = realpath("dev/golden/base-bf16/model-00003-of-00003.safetensors", NULL);
    if (!shard || symlink(shard, path[0])) abort();
    free(shard);
    for (int i = 0; i < file_count(reader); i++)
        snprintf(path[i], sizeof path[i], "%s/%s", dir, reader->files[i].name);
}

static void remove_directory(void)
{
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", dir);
    if (system(command)) perror(dir);
}

// Where file number i of an input ends: at a NUL, the last one with the input.
static size_t file_end(const struct reader *r, int i, const uint8_t *data, size_t from, size_t size)
{
    const uint8_t *nul = i + 1 < file_count(r) ? memchr(data + from, 0, size - from) : NULL;
    return nul ? (size_t)(nul - data) : size;
}

static void write_files(const uint8_t *data, size_t size)
{
    int files = file_count(reader);
    size_t from = 0;
    for (int i = 0; i < files; i++) {
        size_t end = file_end(reader, i, data, from, size);
        if (end == from && files > 1) unlink(path[i]);
        else write_file(path[i], data + from, end - from);
        from = end < size ? end + 1 : size;
    }
}

static void begin_memory(void);
static void end_memory(void);

// Whether the bytes are read. What a refusal leaves open, mapped or allocated is given back.
static int is_read(const uint8_t *data, size_t size)
{
    volatile int read = 0;
    int first = dup(0);
    close(first);
    opt = usual;
    *said = 0;
    write_files(data, size);
    begin_memory();
    if (!setjmp(refused)) {
        reader->read();
        read = 1;
    }
    for (; mapped; mapped = mapped->next) munmap(mapped->p, mapped->bytes);
    staged_files = NULL;
    *staged = 0;
    end_memory();
    if (!read) close_range((unsigned)first, ~0u, 0);
    return read;
}

// Of AddressSanitizer: a refusal may leave memory behind, and less bookkeeping is more inputs.
const char *__asan_default_options(void);
const char *__asan_default_options(void)
{
    return "detect_leaks=0:quarantine_size_mb=1:thread_local_quarantine_size_kb=64:malloc_context_size=1:"
           "allocator_may_return_null=1";
}

#ifdef FUZZER
#include <sanitizer/allocator_interface.h>
#include "fuzz_mutate.h"

// A table of the blocks that an input has allocated, by address: a refusal leaves them, and a million of those
// would fill the memory.
enum { BLOCKS = 1 << 13 };
static const volatile void *block[BLOCKS];
static int used[BLOCKS];                                // the places in use
static int blocks;
static _Thread_local int inside;                        // libFuzzer has a thread of its own
static const char gone;

static size_t place_of(const volatile void *p)
{
    size_t i = ((uintptr_t)p >> 4) % BLOCKS;
    while (block[i] && block[i] != p) i = (i + 1) % BLOCKS;
    return i;
}

static void on_malloc(const volatile void *p, size_t bytes)
{
    (void)bytes;
    if (!inside || !p || blocks == BLOCKS / 2) return;
    size_t i = place_of(p);
    if (!block[i]) used[blocks++] = (int)i;
    block[i] = p;
}

static void on_free(const volatile void *p)
{
    if (!inside || !p) return;
    size_t i = place_of(p);
    if (block[i]) block[i] = &gone;                     // and an address that comes again gets a new place
}

static void begin_memory(void) { inside = 1; }

static void end_memory(void)
{
    inside = 0;
    for (int i = 0; i < blocks; i++) {
        if (block[used[i]] != &gone) free((void *)block[used[i]]);
        block[used[i]] = NULL;
    }
    blocks = 0;
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    prepare();
    choose_reader(getenv("READER") ? getenv("READER") : "");
    atexit(remove_directory);
    read_dictionary("build/fuzz.dict");
    is_read((const uint8_t *)"", 0);                    // what stays is allocated now, outside of every input
    __sanitizer_install_malloc_and_free_hooks(on_malloc, on_free);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    is_read(data, size);
    return 0;
}
#else
static void begin_memory(void) {}
static void end_memory(void) {}

// A line for every input that comes in: Y and what the reader says of it, or N.
static int answer_verdicts(void)
{
    uint32_t size;
    while (fread(&size, sizeof size, 1, stdin) == 1) {
        uint8_t *data = alloc(size, 1);
        if (fread(data, 1, size, stdin) != size) return 1;
        int read = is_read(data, size);
        printf("%c%s\n", read ? 'Y' : 'N', read ? said : "");
        fflush(stdout);
        free(data);
    }
    return 0;
}

// Every input of a reader's corpus. Whether one at least is read: if not, the reader asks for something new.
static int replay(void)
{
    char *corpus = join("dev/corpus", reader->name);
    char **names = files_of(corpus);
    int read = 0, n = (int)arrlen(names);
    for (int i = 0; i < n; i++) {
        static uint8_t data[1 << 16];
        char *file = join(corpus, names[i]);
        FILE *f = fopen(file, "rb");                    // read_file() would refuse some
        if (!f) abort();
        read += is_read(data, fread(data, 1, sizeof data, f));
        fclose(f);
        free(file);
    }
    printf("%s corpus-%-12s %3d inputs, %3d read, the others refused\n",
           read ? "✓" : "✗", reader->name, n, read);
    free_names(names);
    free(corpus);
    return read > 0;
}

int main(int argc, char **argv)
{
    prepare();
    if (argc > 1) {
        choose_reader(argv[1]);
        int status = answer_verdicts();
        remove_directory();
        return status;
    }
    int passed = 0;
    if (!freopen("/dev/null", "w", stderr)) return 1;
    for (int i = 0; i < READERS; i++) {
        choose_reader(readers[i].name);
        passed += replay();
        fflush(stdout);
        remove_directory();
    }
    printf("%d passed, %d failed, 0 skipped\n", passed, READERS - passed);
    return passed < READERS;
}
#endif
