//  lib/config.h: config.json of a model directory.

#ifndef CONFIG_H
#define CONFIG_H
#include "json.h"

enum { MOST_STOPS = 16 };
typedef struct {
    int dim, hidden, layers, heads, kv_heads, head_dim, vocab, max_pos, tied;
    double eps, theta;
    double init_range;          // σ of random weights
    int stop[MOST_STOPS], stops; // tokens that end a text, besides the tokenizer's EOS
    char *text;                 // the file itself: a merged model is written with the same config
} config;

// An integer field in [1, 2^24]; `missing` < 0 makes it required.
static int config_int(const json_t *json, const char *path, const char *name, int missing)
{
    const json_t *item = json_object_get(json, name);
    if ((!item || json_is_null(item)) && missing >= 0) return missing;
    if (!item) die("%s: field \"%s\" is missing", path, name);
    double x = json_number_value(item);                         // 0 if it is no number
    if (!(x >= 1 && x <= 1 << 24) || x != floor(x)) die("%s: \"%s\" must be a whole number from 1 to %d", path, name, 1 << 24);
    return (int)x;
}

static double config_number(const json_t *json, const char *path, const char *name, double missing)
{
    const json_t *item = json_object_get(json, name);
    if (!item || json_is_null(item)) return missing;
    if (!(json_number_value(item) > 0)) die("%s: \"%s\" must be a positive number", path, name);
    return json_number_value(item);
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

// What would change the arithmetic and is not built here is refused, never ignored.
static void config_refuse(const json_t *json, const char *path)
{
    const char *type = string_field(json, "model_type"), *act = string_field(json, "hidden_act");
    if (!type || strcmp(type, "llama"))
        die("%s: \"model_type\" is %s, only \"llama\" is built", path, type ? type : "missing");
    if (act && strcmp(act, "silu")) die("%s: \"hidden_act\" is \"%s\", only \"silu\" is built", path, act);
    const json_t *quantised = json_object_get(json, "quantization_config");
    const char *how = string_field(quantised, "quant_method");
    if (quantised && !json_is_null(quantised))
        die("%s: the model is quantised (%s), which is not built; fetch the one it was made from, in F32, F16 or BF16",
            path, how ? how : "quantization_config");
    for (const char **name = (const char *[]){"torch_dtype", "dtype", NULL}; *name; name++) {
        const json_t *dtype = json_object_get(json, *name);
        if (dtype && !json_is_null(dtype) && !json_is_string(dtype)) die("%s: \"%s\" must be a text", path, *name);
    }
    for (const char **name = (const char *[]){"attention_bias", "mlp_bias", NULL}; *name; name++)
        if (field_true(json, *name)) die("%s: \"%s\" is true, biases are not built", path, *name);
    for (const char **name = (const char *[]){"rope_scaling", "rope_parameters", NULL}; *name; name++) {
        const json_t *rope = json_object_get(json, *name), *kind = json_object_get(rope, "rope_type");
        if (!kind) kind = json_object_get(rope, "type");
        if (json_is_string(kind) && strcmp(json_string_value(kind), "default"))
            die("%s: \"%s\" of type \"%s\" is not built, only the default RoPE", path, *name, json_string_value(kind));
        if (!kind && json_object_get(rope, "factor"))
            die("%s: \"%s\" without a type is not understood, only the default RoPE is built", path, *name);
    }
}

// Reads transformers' config.json, version 4 or 5 (which moved rope_theta into rope_parameters).
static config config_read(const char *path)
{
    size_t bytes;
    config c = {.text = read_file(path, &bytes)};
    json_t *json = parse_json(path, c.text, bytes);
    config_refuse(json, path);
    c.dim = config_int(json, path, "hidden_size", -1);
    c.hidden = config_int(json, path, "intermediate_size", -1);
    c.layers = config_int(json, path, "num_hidden_layers", -1);
    c.heads = config_int(json, path, "num_attention_heads", -1);
    c.kv_heads = config_int(json, path, "num_key_value_heads", c.heads);
    c.head_dim = config_int(json, path, "head_dim", c.dim / c.heads);
    c.vocab = config_int(json, path, "vocab_size", -1);
    c.max_pos = config_int(json, path, "max_position_embeddings", 2048);
    c.eps = config_number(json, path, "rms_norm_eps", 1e-6);
    c.theta = config_number(json, path, "rope_theta", 10000);
    c.theta = config_number(json_object_get(json, "rope_scaling"), path, "rope_theta", c.theta);
    c.theta = config_number(json_object_get(json, "rope_parameters"), path, "rope_theta", c.theta);
    c.init_range = config_number(json, path, "initializer_range", 0.02);
    config_stops(&c, json);
    c.tied = field_true(json, "tie_word_embeddings");
    if (c.heads % c.kv_heads) die("%s: %d heads cannot share %d key-value heads evenly", path, c.heads, c.kv_heads);
    if (c.head_dim % 2) die("%s: head_dim %d is odd, RoPE rotates halves", path, c.head_dim);
    if ((long)c.heads * c.head_dim > 1 << 24) die("%s: %d heads of %d are too wide", path, c.heads, c.head_dim);
    json_decref(json);
    return c;
}

#endif
