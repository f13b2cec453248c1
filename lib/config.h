//  lib/config.h: config.json of a model directory.

#ifndef CONFIG_H
#define CONFIG_H
#include "json.h"

// How RoPE's frequencies follow from rope_theta (model.h: rope_frequency).
enum rope { ROPE_PLAIN, ROPE_LINEAR, ROPE_LLAMA3 };

enum { MOST_STOPS = 16 };
typedef struct {
    const struct family *family;
    int dim, hidden, layers, heads, kv_heads, head_dim, vocab, max_pos, tied;
    int attention_bias, qkv_bias, o_bias, mlp_bias;     // which of the linear layers have a bias
    int qk_norm;                // each head of q and k has an RMSNorm of its own
    int use_window, window;     // how many keys a query sees, its own among them; INT_MAX: all before it
    int full_layers;            // the first layers, which have no window
    double eps, theta;
    enum rope rope;
    double rope_factor, low_freq, high_freq;
    int rope_original;          // the positions that the model was first trained on
    double init_range;          // σ of random weights
    double dropout;             // of attention's probabilities in training, which is not built
    int stop[MOST_STOPS], stops; // tokens that end a text, besides the tokenizer's EOS
    char *text;                 // the file itself: a merged model is written with the same config
} config;

/* The families of models that are Llama but for what stands here: what config.json means where it leaves a field out, and
   which fields a family has. Numbers are the defaults of transformers 5.24.                                            */
typedef struct family {
    const char *model_type, *name;
    int max_pos, kv_heads, head_dim;    // 0: as many kv heads as heads; dim / heads
    int window;                         // 0: knows no window
    int window_switch;                  // "use_sliding_window" turns it on, for the layers from "max_window_layers" on
    int qkv_bias;                       // q, k, v have a bias whatever config.json says
    int attention_bias, mlp_bias;       // the fields of this name count: q, k, v, o; gate, up, down
    int qk_norm;
} family;
static const family families[] = {
    {"llama",   "Llama",   .max_pos = 2048,   .attention_bias = 1, .mlp_bias = 1},
    {"mistral", "Mistral", .max_pos = 131072, .kv_heads = 8, .window = 4096},
    {"qwen2",   "Qwen2",   .max_pos = 32768,  .kv_heads = 32, .window = 4096, .window_switch = 1, .qkv_bias = 1},
    {"qwen3",   "Qwen3",   .max_pos = 32768,  .kv_heads = 32, .window = 4096, .window_switch = 1, .head_dim = 128,
                           .attention_bias = 1, .qk_norm = 1},
};

/* The fields of config.json. A WHOLE number or a NUMBER lies in [least, most], and null is as if it were not there; a
   SWITCH is true or false; a WORD is one word. Those without a place in `config` must be what is built: `missing`, or
   `word`.                                                                                                            */
enum { REQUIRED = -1, NOWHERE = -1 };
#define AT(field) (long)offsetof(config, field)
static const struct config_field {
    const char *name;
    enum { WHOLE, NUMBER, SWITCH, WORD } type;
    long at;
    double missing, least, most;
    const char *word;
} config_fields[] = {
    {"hidden_size",             WHOLE,  AT(dim),        REQUIRED, 1, 1 << 24,  NULL},
    {"intermediate_size",       WHOLE,  AT(hidden),     REQUIRED, 1, 1 << 24,  NULL},
    {"num_hidden_layers",       WHOLE,  AT(layers),     REQUIRED, 1, 1 << 24,  NULL},
    {"num_attention_heads",     WHOLE,  AT(heads),      REQUIRED, 1, 1 << 24,  NULL},
    {"num_key_value_heads",     WHOLE,  AT(kv_heads),   0,        1, 1 << 24,  NULL},         // missing: see `families`
    {"head_dim",                WHOLE,  AT(head_dim),   0,        1, 1 << 24,  NULL},
    {"vocab_size",              WHOLE,  AT(vocab),      REQUIRED, 1, 1 << 24,  NULL},
    {"max_position_embeddings", WHOLE,  AT(max_pos),    0,        1, 1 << 24,  NULL},
    {"sliding_window",          WHOLE,  AT(window),     0,        1, 1 << 24,  NULL},
    {"max_window_layers",       WHOLE,  AT(full_layers), 28,      0, 1 << 24,  NULL},
    {"use_sliding_window",      SWITCH, AT(use_window), 0,        0, 1,        NULL},
    {"rms_norm_eps",            NUMBER, AT(eps),        1e-6,     1e-30, 1,    NULL},
    {"rope_theta",              NUMBER, AT(theta),      10000,    1e-3, 1e15,  NULL},
    {"initializer_range",       NUMBER, AT(init_range), 0.02,     1e-30, 1e3,  NULL},
    {"attention_dropout",       NUMBER, AT(dropout),    0,        0, 1,        NULL},
    {"tie_word_embeddings",     SWITCH, AT(tied),       0,        0, 1,        NULL},
    {"attention_bias",          SWITCH, AT(attention_bias), 0,    0, 1,        NULL},
    {"mlp_bias",                SWITCH, AT(mlp_bias),   0,        0, 1,        NULL},
    {"partial_rotary_factor",   NUMBER, NOWHERE,        1,        0, 1e9,      NULL},
    {"rope_interleaved",        SWITCH, NOWHERE,        0,        0, 1,        NULL},
    {"use_mrope",               SWITCH, NOWHERE,        0,        0, 1,        NULL},
    {"is_causal",               SWITCH, NOWHERE,        1,        0, 1,        NULL},
    {"hidden_act",              WORD,   NOWHERE,        0,        0, 0,        "silu"},
};
#undef AT

// What else may stand there and changes no number, with what the functions below and stage_config() read.
static const char *const harmless_fields[] = {
    "model_type", "layer_types", "original_max_position_embeddings", "is_llama_config", "transformers.js_config",
    "architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "name_or_path", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id",
    "pretraining_tp", "rope_scaling", "rope_parameters", "quantization_config", "output_attentions",
    "output_hidden_states", "return_dict", "torchscript", "use_bfloat16", "pruned_heads", "gradient_checkpointing",
    "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "_commit_hash", "auto_map",
    "is_decoder", "is_encoder_decoder", "add_cross_attention", "cross_attention_hidden_size", "tie_encoder_decoder",
    "chunk_size_feed_forward", "finetuning_task", "id2label", "label2id", "problem_type", "task_specific_params",
    "tokenizer_class", "prefix", "max_length", "max_sequence_length", "model_max_length", "min_length", "do_sample",
    "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p",
    "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    "unsloth_version", "unsloth_fixed", NULL};

// The JSON number of a field in [least, most]; `missing` where it is not there or null.
static double number_field(const json_t *json, const char *path, const struct config_field *f)
{
    const json_t *item = json_object_get(json, f->name);
    double x = json_number_value(item);
    if (!item || json_is_null(item)) {
        if (f->missing == REQUIRED) die("%s: field \"%s\" is missing", path, f->name);
        return f->missing;
    }
    int whole = f->type != WHOLE || x == floor(x);
    if (!json_is_number(item) || !(x >= f->least && x <= f->most) || !whole)
        die("%s: \"%s\" must be a %snumber from %.10g to %.10g",
            path, f->name, f->type == WHOLE ? "whole " : "", f->least, f->most);
    return x;
}

static int config_int(const json_t *json, const char *path, const char *name, int missing)
{
    return (int)number_field(json, path, &(struct config_field){name, WHOLE, NOWHERE, missing, 1, 1 << 24, NULL});
}

static double config_number(const json_t *json, const char *path, const char *name, double missing)
{
    return number_field(json, path, &(struct config_field){name, NUMBER, NOWHERE, missing, 1e-30, 1e15, NULL});
}

// True or false; what is not built is refused by name.
static int switch_field(const json_t *json, const char *path, const struct config_field *f)
{
    const json_t *item = json_object_get(json, f->name);
    if (item && !json_is_boolean(item)) die("%s: \"%s\" must be true or false", path, f->name);
    int value = item ? json_is_true(item) : f->missing != 0;
    if (f->at == NOWHERE && value != (f->missing != 0))
        die("%s: \"%s\" is %s, which is not built here", path, f->name, value ? "true" : "false");
    return value;
}

static void expect_word(const json_t *json, const char *path, const struct config_field *f)
{
    const json_t *item = json_object_get(json, f->name);
    const char *is = json_string_value(item);
    if (!item && f->missing != REQUIRED) return;
    if (!is || strcmp(is, f->word))
        die("%s: \"%s\" is %s, only \"%s\" is built", path, f->name, is ? is : item ? "no text" : "missing", f->word);
}

// Whether a field says something to other families only.
static int of_others(const family *f, const char *name)
{
    if (!strcmp(name, "sliding_window")) return !f->window;
    return !f->window_switch
        && (!strcmp(name, "use_sliding_window") || !strcmp(name, "max_window_layers") || !strcmp(name, "layer_types"));
}

// Names the fields that nothing here knows: the model may be another one than it seems.
static void name_unknown(const config *c, json_t *json, const char *path)
{
    const char *name;
    json_t *value;
    json_object_foreach(json, name, value) {
        int known = of_others(c->family, name) && (json_is_null(value) || json_is_false(value));
        for (size_t i = 0; i < sizeof config_fields / sizeof *config_fields; i++)
            known |= !strcmp(name, config_fields[i].name) && !of_others(c->family, name);
        for (const char *const *h = harmless_fields; *h; h++) known |= !strcmp(name, *h) && !of_others(c->family, name);
        if (known) continue;
        char *safe = printable(name, "");
        fprintf(stderr, "note: %s: nothing here knows the field \"%s\"; it is not used\n", path, safe ? safe : "");
        free(safe);
    }
}

// "eos_token_id" of config.json or generation_config.json: a number, or a list of them.
static void config_stops(config *c, const json_t *json)
{
    const json_t *ids = json_object_get(json, "eos_token_id");
    size_t n = json_is_array(ids) ? json_array_size(ids) : 1;
    for (size_t i = 0; i < n; i++) {
        const json_t *id = json_is_array(ids) ? json_array_get(ids, i) : ids;
        double x = json_number_value(id);
        if (json_is_number(id) && fabs(x) < INT_MAX && c->stops < MOST_STOPS) c->stop[c->stops++] = (int)x;
    }
}

// RoPE's fields, in rope_scaling (transformers 4) or rope_parameters (5). The kinds that are built, and their numbers.
static void config_rope(config *c, const json_t *json, const char *path)
{
    static const struct { const char *name; enum rope rope; const char *fields[4]; } kinds[] = {
        {"default", ROPE_PLAIN,  {NULL}},
        {"linear",  ROPE_LINEAR, {"factor", NULL}},
        {"llama3",  ROPE_LLAMA3, {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}},
    };
    enum { KINDS_OF_ROPE = sizeof kinds / sizeof *kinds };
    c->rope_factor = 1;
    for (const char *const *name = (const char *const[]){"rope_scaling", "rope_parameters", NULL}; *name; name++) {
        json_t *rope = json_object_get(json, *name), *value;
        const char *field, *kind = string_field(rope, "rope_type");
        int k = 0;
        if (!rope || json_is_null(rope)) continue;
        if (!json_is_object(rope)) die("%s: \"%s\" must be an object or null", path, *name);
        if (!kind) kind = string_field(rope, "type");
        while (kind && k < KINDS_OF_ROPE && strcmp(kind, kinds[k].name)) k++;
        if (k == KINDS_OF_ROPE)
            die("%s: \"%s\" of type \"%s\" is not built, only default, linear and llama3", path, *name, kind);
        json_object_foreach(rope, field, value) {
            int known = !strcmp(field, "rope_theta") || !strcmp(field, "rope_type") || !strcmp(field, "type");
            known |= !strcmp(field, "partial_rotary_factor") && json_number_value(value) == 1;
            for (int i = 0; i < 4 && kinds[k].fields[i]; i++) known |= !strcmp(field, kinds[k].fields[i]);
            if (!known && !json_is_null(value))
                die("%s: \"%s\" in \"%s\" is not built for RoPE of type \"%s\"", path, field, *name, kinds[k].name);
        }
        c->rope = kinds[k].rope;
        c->theta = config_number(rope, path, "rope_theta", c->theta);
        if (c->rope != ROPE_PLAIN) c->rope_factor = config_number(rope, path, "factor", REQUIRED);
        if (c->rope != ROPE_LLAMA3) continue;
        c->low_freq = config_number(rope, path, "low_freq_factor", REQUIRED);
        c->high_freq = config_number(rope, path, "high_freq_factor", REQUIRED);
        int original = config_int(json, path, "original_max_position_embeddings", c->max_pos);
        c->rope_original = config_int(rope, path, "original_max_position_embeddings", original);
        if (!(c->low_freq < c->high_freq))
            die("%s: \"low_freq_factor\" %g must be less than \"high_freq_factor\" %g", path, c->low_freq, c->high_freq);
    }
}

// "model_type" names the family.
static const family *config_family(const json_t *json, const char *path)
{
    const char *type = string_field(json, "model_type");
    char built[sizeof families / sizeof *families * 32] = "";
    for (size_t i = 0; i < sizeof families / sizeof *families; i++) {
        if (type && !strcmp(type, families[i].model_type)) return &families[i];
        sprintf(built + strlen(built), "%s%.24s", *built ? ", " : "", families[i].model_type);
    }
    die("%s: \"model_type\" is %s; these are built: %s", path, type ? type : "missing", built);
}

// What a family says where config.json leaves a field out, and where null means something of its own.
static void config_defaults(config *c, const json_t *json)
{
    const family *f = c->family;
    if (!json_object_get(json, "num_key_value_heads")) c->kv_heads = f->kv_heads;
    if (!json_object_get(json, "sliding_window")) c->window = f->window;
    if (!c->max_pos) c->max_pos = f->max_pos;
    if (!c->head_dim) c->head_dim = f->head_dim ? f->head_dim : c->dim / c->heads;
    if (!c->kv_heads) c->kv_heads = c->heads;
    if (!f->window || !c->window || (f->window_switch && !c->use_window)) c->window = INT_MAX;
    if (!f->window_switch || c->window == INT_MAX) c->full_layers = 0;
}

static void config_biases(config *c, const char *path)
{
    const family *f = c->family;
    if ((c->attention_bias && !f->attention_bias && !f->qkv_bias) || (c->mlp_bias && !f->mlp_bias))
        die("%s: \"%s\" is true, which model_type %s does not have", path,
            c->mlp_bias ? "mlp_bias" : "attention_bias", f->model_type);
    c->qkv_bias = f->qkv_bias || c->attention_bias;
    c->o_bias = f->attention_bias && c->attention_bias;
    c->qk_norm = f->qk_norm;
}

// "layer_types", where it is, says which layers have a window in place of "max_window_layers": the first ones may be
// without, and all others have it.
static void config_layer_types(config *c, const json_t *json, const char *path)
{
    json_t *list = json_object_get(json, "layer_types"), *item;
    size_t i;
    int full = 0, windows = 0;
    if (!c->family->window_switch || !list || json_is_null(list)) return;
    json_array_foreach(list, i, item) {
        const char *type = json_is_string(item) ? json_string_value(item) : "no text";
        int sees_all = !strcmp(type, "full_attention");
        if (!sees_all && strcmp(type, "sliding_attention"))
            die("%s: layer %zu in \"layer_types\" is %s, expected full_attention or sliding_attention", path, i, type);
        if (sees_all && windows) die("%s: \"layer_types\" has full_attention behind sliding_attention, which is not built", path);
        full += sees_all;
        windows += !sees_all;
    }
    if (full + windows != c->layers)
        die("%s: \"layer_types\" must be a list of %d, one for each of num_hidden_layers", path, c->layers);
    if (windows && c->window == INT_MAX)
        die("%s: \"layer_types\" has sliding_attention, but no window is set (sliding_window, use_sliding_window)", path);
    if (c->window != INT_MAX) c->full_layers = full;
}

static void refuse_quantised(const json_t *json, const char *path)
{
    const json_t *quantised = json_object_get(json, "quantization_config");
    const char *how = string_field(quantised, "quant_method");
    if (quantised && !json_is_null(quantised))
        die("%s: the model is quantised (%s), which is not built; fetch the one it was made from, in F32, F16 or BF16",
            path, how ? how : "quantization_config");
    for (const char **name = (const char *[]){"torch_dtype", "dtype", NULL}; *name; name++) {
        const json_t *dtype = json_object_get(json, *name);
        if (dtype && !json_is_null(dtype) && !json_is_string(dtype)) die("%s: \"%s\" must be a text", path, *name);
    }
}

// Reads transformers' config.json, version 4 or 5 (which moved rope_theta into rope_parameters). What changes the
// function is built or refused, never ignored.
static config config_read(const char *path)
{
    size_t bytes;
    config c = {.text = read_file(path, &bytes)};
    json_t *json = parse_json(path, c.text, bytes);
    c.family = config_family(json, path);
    for (size_t i = 0; i < sizeof config_fields / sizeof *config_fields; i++) {
        const struct config_field *f = &config_fields[i];
        char *at = (char *)&c + f->at;
        if (f->type == WHOLE) *(int *)(void *)at = (int)number_field(json, path, f);
        double number = f->type == NUMBER ? number_field(json, path, f) : 0;
        if (f->type == NUMBER && f->at != NOWHERE) *(double *)(void *)at = number;
        if (f->type == NUMBER && f->at == NOWHERE && number != f->missing)
            die("%s: \"%s\" is %.10g, only %.10g is built", path, f->name, number, f->missing);
        if (f->type == WORD) expect_word(json, path, f);
        int on = f->type == SWITCH && switch_field(json, path, f);
        if (f->type == SWITCH && f->at != NOWHERE) *(int *)(void *)at = on;
    }
    refuse_quantised(json, path);
    config_defaults(&c, json);
    config_biases(&c, path);
    config_layer_types(&c, json, path);
    config_rope(&c, json, path);
    config_stops(&c, json);
    name_unknown(&c, json, path);
    if (c.heads % c.kv_heads) die("%s: %d heads cannot share %d key-value heads evenly", path, c.heads, c.kv_heads);
    if (!c.head_dim) die("%s: %d heads are more than hidden_size %d", path, c.heads, c.dim);
    if (c.head_dim % 2) die("%s: head_dim %d is odd, RoPE rotates halves", path, c.head_dim);
    if ((long)c.heads * c.head_dim > 1 << 24) die("%s: %d heads of %d are too wide", path, c.heads, c.head_dim);
    json_decref(json);
    return c;
}

#endif
