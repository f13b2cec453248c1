//  lib/config.h: config.json of a model directory.

#ifndef CONFIG_H
#define CONFIG_H
#include "json.h"

enum { MOST_STOPS = 16 };
typedef struct {
    int dim, hidden, layers, heads, kv_heads, head_dim, vocab, max_pos, tied;
    double eps, theta;
    double init_range;          // σ of random weights
    double dropout;             // of attention's probabilities in training, which is not built
    int stop[MOST_STOPS], stops; // tokens that end a text, besides the tokenizer's EOS
    char *text;                 // the file itself: a merged model is written with the same config
} config;

/* The fields of config.json, as LlamaConfig of transformers 5.24 has them. A WHOLE number or a NUMBER lies in [least, most],
   and null is as if it were not there; a SWITCH is true or false; a WORD is one word. Those without a place in `config`
   must be what is built: `missing`, or `word`.                                                                        */
enum { REQUIRED = -1, NOWHERE = -1 };
#define AT(field) (long)offsetof(config, field)
static const struct config_field {
    const char *name;
    enum { WHOLE, NUMBER, SWITCH, WORD } type;
    long at;
    double missing, least, most;
    const char *word;
} config_fields[] = {
    {"model_type",              WORD,   NOWHERE,        REQUIRED, 0, 0,        "llama"},
    {"hidden_size",             WHOLE,  AT(dim),        REQUIRED, 1, 1 << 24,  NULL},
    {"intermediate_size",       WHOLE,  AT(hidden),     REQUIRED, 1, 1 << 24,  NULL},
    {"num_hidden_layers",       WHOLE,  AT(layers),     REQUIRED, 1, 1 << 24,  NULL},
    {"num_attention_heads",     WHOLE,  AT(heads),      REQUIRED, 1, 1 << 24,  NULL},
    {"num_key_value_heads",     WHOLE,  AT(kv_heads),   0,        1, 1 << 24,  NULL},         // missing: as many as heads
    {"head_dim",                WHOLE,  AT(head_dim),   0,        1, 1 << 24,  NULL},         // missing: dim / heads
    {"vocab_size",              WHOLE,  AT(vocab),      REQUIRED, 1, 1 << 24,  NULL},
    {"max_position_embeddings", WHOLE,  AT(max_pos),    2048,     1, 1 << 24,  NULL},
    {"rms_norm_eps",            NUMBER, AT(eps),        1e-6,     1e-30, 1,    NULL},
    {"rope_theta",              NUMBER, AT(theta),      10000,    1e-3, 1e15,  NULL},
    {"initializer_range",       NUMBER, AT(init_range), 0.02,     1e-30, 1e3,  NULL},
    {"attention_dropout",       NUMBER, AT(dropout),    0,        0, 1,        NULL},
    {"tie_word_embeddings",     SWITCH, AT(tied),       0,        0, 1,        NULL},
    {"attention_bias",          SWITCH, NOWHERE,        0,        0, 1,        NULL},
    {"mlp_bias",                SWITCH, NOWHERE,        0,        0, 1,        NULL},
    {"is_causal",               SWITCH, NOWHERE,        1,        0, 1,        NULL},
    {"hidden_act",              WORD,   NOWHERE,        0,        0, 0,        "silu"},
};
#undef AT

// What else may stand there and changes no number, with what config_rope(), config_stops() and stage_config() read.
static const char *const harmless_fields[] = {
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

// Names the fields that nothing here knows: the model may be another one than it seems.
static void name_unknown(json_t *json, const char *path)
{
    const char *name;
    json_t *value;
    json_object_foreach(json, name, value) {
        int known = 0;
        for (size_t i = 0; i < sizeof config_fields / sizeof *config_fields; i++)
            known |= !strcmp(name, config_fields[i].name);
        for (const char *const *h = harmless_fields; *h; h++) known |= !strcmp(name, *h);
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

// RoPE's fields, in rope_scaling (transformers 4) or rope_parameters (5): only the default kind is built, and of its
// numbers only rope_theta counts.
static void config_rope(config *c, const json_t *json, const char *path)
{
    static const char *const known[] = {"rope_theta", "rope_type", "type", NULL};
    for (const char *const *name = (const char *const[]){"rope_scaling", "rope_parameters", NULL}; *name; name++) {
        json_t *rope = json_object_get(json, *name), *value;
        const char *field, *kind = string_field(rope, "rope_type");
        if (!rope || json_is_null(rope)) continue;
        if (!json_is_object(rope)) die("%s: \"%s\" must be an object or null", path, *name);
        if (!kind) kind = string_field(rope, "type");
        if (kind && strcmp(kind, "default"))
            die("%s: \"%s\" of type \"%s\" is not built, only the default RoPE", path, *name, kind);
        json_object_foreach(rope, field, value) {
            int known_one = 0;
            for (const char *const *k = known; *k; k++) known_one |= !strcmp(field, *k);
            if (!known_one && !json_is_null(value))
                die("%s: \"%s\" in \"%s\" is not built, only the default RoPE and its rope_theta", path, field, *name);
        }
        c->theta = config_number(rope, path, "rope_theta", c->theta);
    }
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
    for (size_t i = 0; i < sizeof config_fields / sizeof *config_fields; i++) {
        const struct config_field *f = &config_fields[i];
        char *at = (char *)&c + f->at;
        if (f->type == WHOLE) *(int *)(void *)at = (int)number_field(json, path, f);
        if (f->type == NUMBER) *(double *)(void *)at = number_field(json, path, f);
        if (f->type == WORD) expect_word(json, path, f);
        int on = f->type == SWITCH && switch_field(json, path, f);
        if (f->type == SWITCH && f->at != NOWHERE) *(int *)(void *)at = on;
    }
    refuse_quantised(json, path);
    config_rope(&c, json, path);
    config_stops(&c, json);
    name_unknown(json, path);
    if (!c.kv_heads) c.kv_heads = c.heads;
    if (!c.head_dim) c.head_dim = c.dim / c.heads;
    if (c.heads % c.kv_heads) die("%s: %d heads cannot share %d key-value heads evenly", path, c.heads, c.kv_heads);
    if (!c.head_dim) die("%s: %d heads are more than hidden_size %d", path, c.heads, c.dim);
    if (c.head_dim % 2) die("%s: head_dim %d is odd, RoPE rotates halves", path, c.head_dim);
    if ((long)c.heads * c.head_dim > 1 << 24) die("%s: %d heads of %d are too wide", path, c.heads, c.head_dim);
    json_decref(json);
    return c;
}

#endif
