/*  random_model.c: a Llama of a known shape with random weights, as a Hugging Face directory. For measuring only.

        build/random_model SHAPE DIR [F32|BF16]        SHAPE: 15m, 110m, 7b, or dim,hidden,layers,heads,vocab

    Written in shards of 2 GB with an index, as large models are published. The tokenizer is the bundled one: its ids
    are a part of the vocabulary.                                                                                 */

#define main train_main
#include "../train.c"
#undef main

static const struct { const char *name; int dim, hidden, layers, heads, vocab; } shapes[] = {
    {"15m",  288,  768,   6,  6,  32000},
    {"110m", 768,  2048,  12, 12, 32000},
    {"7b",   4096, 11008, 32, 32, 32000},
};

static void write_config(const char *shape_name, const char *dtype)
{
    int n[5] = {0}, known = sizeof shapes / sizeof *shapes;
    for (int i = 0; i < known; i++)
        if (!strcmp(shapes[i].name, shape_name)) memcpy(n, &shapes[i].dim, sizeof n);
    if (!n[0] && sscanf(shape_name, "%d,%d,%d,%d,%d", &n[0], &n[1], &n[2], &n[3], &n[4]) != 5)
        die("%s: expected 15m, 110m, 7b, or dim,hidden,layers,heads,vocab", shape_name);
    char text[700];
    int bytes = snprintf(text, sizeof text,
        "{\"architectures\": [\"LlamaForCausalLM\"], \"model_type\": \"llama\", \"hidden_act\": \"silu\","
        " \"hidden_size\": %d, \"intermediate_size\": %d, \"num_hidden_layers\": %d, \"num_attention_heads\": %d,"
        " \"num_key_value_heads\": %d,"
        " \"vocab_size\": %d, \"max_position_embeddings\": 4096, \"rms_norm_eps\": 1e-05, \"rope_theta\": 10000.0,"
        " \"tie_word_embeddings\": false,"
        " \"bos_token_id\": 1, \"eos_token_id\": 2, \"torch_dtype\": \"%s\"}\n",
        n[0], n[1], n[2], n[3], n[3], n[4], *dtype == 'B' ? "bfloat16" : "float32");
    stage_file("config.json", text, (size_t)bytes);
}

// Even in ±0.02 √3, that is of σ = 0.02; norms are ones.
static void write_random(FILE *f, const char *path, const output *o)
{
    enum { PART = 1 << 16 };
    static wide x[PART];
    rng g = rng_named(1, o->name);
    size_t left = elements(mat_of(NULL, F32, o->shape));
    for (size_t n; left; left -= n) {
        n = left < PART ? left : PART;
        for (size_t i = 0; i < n; i += 2) {
            uint64_t bits = rng_next(&g);
            for (size_t j = i; j < n && j < i + 2; j++, bits >>= 32)
                x[j] = o->shape.n[1] ? (wide)(0.0346 * ((double)(uint32_t)bits * 0x1p-31 - 1)) : 1;
        }
        narrow(x, o->type, x, n);
        write_checked(f, x, n * dtypes[o->type].size, path);
    }
}

// One shard: the tensors first … last-1 of the list. Their file goes into the index.
static void write_shard(const output *list, int first, int last, int number, json_t *weight_map)
{
    char name[64];
    snprintf(name, sizeof name, "model-%05d.safetensors", number);
    char *path, *text = safetensors_header(list + first, last - first);
    FILE *f = stage_open(name, &path);
    uint64_t bytes = strlen(text);
    write_checked(f, &bytes, 8, path);
    write_checked(f, text, bytes, path);
    for (int i = first; i < last; i++) {
        write_random(f, path, &list[i]);
        set_field(weight_map, list[i].name, text_value(name));
    }
    close_checked(f, path);
    free(text), free(path);
}

int main(int argc, char **argv)
{
    if (argc < 3) die("usage: random_model SHAPE DIR [F32|BF16]");
    enum dtype type = argc > 3 && !strcmp(argv[3], "BF16") ? BF16 : F32;
    model m = {0};
    atexit(stage_discard);
    stage_begin(argv[2]);
    write_config(argv[1], dtypes[type].name);
    stage_copy("base", "tokenizer.model");
    char *path = join(staged, "config.json");
    model_measure(&m, config_read(path), plan_from_options());

    output *list = NULL;
    for (int i = 0; i < arrlen(m.tensors); i++) {
        output o = {.shape = m.tensors[i].shape, .type = type};
        memcpy(o.name, m.tensors[i].name, sizeof o.name);
        if (!strncmp(o.name, "model.", 6) || !strcmp(o.name, "lm_head.weight")) arrput(list, o);
    }
    json_t *weight_map = json_object();
    double size = 0, total = 0;
    int first = 0, number = 1;
    for (int i = 0; i < arrlen(list); i++) {
        size += (double)elements(mat_of(NULL, F32, list[i].shape)) * (double)dtypes[type].size;
        if (size < 2e9 && i + 1 < arrlen(list)) continue;
        write_shard(list, first, i + 1, number++, weight_map);
        show("%s: tensor %d of %td", argv[2], i + 1, arrlen(list));
        first = i + 1, total += size, size = 0;
    }
    stage_json("model.safetensors.index.json",
        json_pack("{s:o, s:{s:I}}", "weight_map", weight_map, "metadata", "total_size", (json_int_t)total));
    if (rename(staged, argv[2])) die("cannot write %s: %s", argv[2], strerror(errno));
    *staged = 0;
    return 0;
}
