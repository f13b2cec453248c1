/*  Fuzz targets for every parser: libFuzzer hands in bytes, they become a file, the parser reads it. A refusal (die) is
    fine; a crash, an overrun or a hang is not.

        make fuzz SECONDS=60            (clang and libclang-rt-14-dev)

    -DTARGET=0 safetensors   1 config.json   2 rows .jsonl   3 adapter_config.json   4 tokenizer.model   5 shard index
             6 any object

    -DVERDICTS makes a program of it that dev/differential.py asks: sizes and bytes come in, Y or N goes out. */

#define _GNU_SOURCE
#include <setjmp.h>
#include <stdlib.h>
static jmp_buf refused;
#define exit(status) longjmp(refused, 1)         // die() comes back here
#define main train_main
#include "../train.c"
#undef main
#undef exit

static const char *const names[] = {"model.safetensors", "config.json", "rows.jsonl", "adapter_config.json",
                                    "tokenizer.model", "model.safetensors.index.json", "object.json"};

static void parse(const char *dir, const char *path)
{
    static tokenizer *bundled;
    if (TARGET == 0 || TARGET == 5) {
        checkpoint c = checkpoint_open(dir, "model");
        for (int i = 0; i < shlen(c.tensors); i++) {             // every byte that a header promises can be read
            mat m = c.tensors[i].value.data;
            if (*c.tensors[i].value.unusable) continue;
            wide *x = alloc(elements(m), sizeof *x);
            get(x, m);
            free(x);
        }
        checkpoint_close(&c);
    }
    if (TARGET == 1) { config c = config_read(path); free(c.text); }
    if (TARGET == 2) {
        char err[200];
        if (!bundled && !(bundled = tokenizer_load("base/tokenizer.model", err, sizeof err))) abort();
        dataset d = read_rows(bundled, path, 256);
        free_rows(&d);
    }
    if (TARGET == 3) { plan p = {0}; peft_read_config(&p, dir); }
    if (TARGET == 6) {
        size_t bytes;
        char *text = read_file(path, &bytes), *again;
        json_t *json = parse_json(path, text, bytes);
        again = json_text(json);
        json_decref(parse_json(path, again, strlen(again)));        // what is written is read
        free(text), free(again);
        json_decref(json);
    }
    if (TARGET == 4) {
        char err[200];
        tokenizer *t = tokenizer_load(path, err, sizeof err);
        if (t) tokenizer_free(t);
    }
}

// Whether the bytes are read as the file of this target.
static int is_read(const uint8_t *data, size_t size)
{
    static char dir[64], *path;
    if (!path) {
        snprintf(dir, sizeof dir, "/tmp/fuzz-XXXXXX");
        if (!mkdtemp(dir)) abort();
        path = join(dir, names[TARGET]);
    }
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, size, f) != size || fclose(f)) abort();
    volatile int read = 0;
    if (!setjmp(refused)) parse(dir, path), read = 1;
    for (; mapped; mapped = mapped->next) munmap(mapped->p, mapped->bytes), close(mapped->fd);     // of a file refused
    return read;
}

#ifdef VERDICTS
int main(void)
{
    uint32_t size;
    while (fread(&size, sizeof size, 1, stdin) == 1) {
        uint8_t *data = alloc(size, 1);
        if (fread(data, 1, size, stdin) != size) return 1;
        putchar(is_read(data, size) ? 'Y' : 'N');
        fflush(stdout);
        free(data);
    }
    return 0;
}
#else
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    is_read(data, size);
    return 0;
}
#endif
