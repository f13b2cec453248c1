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
static int config_int(const cJSON *json, const char *path, const char *name, int missing)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(json, name);
    if ((!item || cJSON_IsNull(item)) && missing >= 0) return missing;
    if (!item) die("%s: field \"%s\" is missing", path, name);
    double x = cJSON_IsNumber(item) ? item->valuedouble : 0;
    if (!(x >= 1 && x <= 1 << 24) || x != floor(x)) die("%s: \"%s\" must be a whole number from 1 to %d", path, name, 1 << 24);
    return (int)x;
}

static double config_number(const cJSON *json, const char *path, const char *name, double missing)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(json, name);
    if (!item || cJSON_IsNull(item)) return missing;
    if (!cJSON_IsNumber(item) || !(item->valuedouble > 0) || !isfinite(item->valuedouble))
        die("%s: \"%s\" must be a positive number", path, name);
    return item->valuedouble;
}

// "eos_token_id" of config.json or generation_config.json: a number, or a list of them.
static void config_stops(config *c, const cJSON *json)
{
    const cJSON *ids = cJSON_GetObjectItemCaseSensitive(json, "eos_token_id");
    for (const cJSON *id = cJSON_IsArray(ids) ? ids->child : ids; id; id = cJSON_IsArray(ids) ? id->next : NULL)
        if (cJSON_IsNumber(id) && c->stops < MOST_STOPS) c->stop[c->stops++] = id->valueint;
}

// What would change the arithmetic and is not built here is refused, never ignored.
static void config_refuse(const cJSON *json, const char *path)
{
    const cJSON *type = cJSON_GetObjectItemCaseSensitive(json, "model_type");
    if (!cJSON_IsString(type) || strcmp(type->valuestring, "llama"))
        die("%s: \"model_type\" is %s, only \"llama\" is built", path, cJSON_IsString(type) ? type->valuestring : "missing");
    const cJSON *act = cJSON_GetObjectItemCaseSensitive(json, "hidden_act");
    if (cJSON_IsString(act) && strcmp(act->valuestring, "silu"))
        die("%s: \"hidden_act\" is \"%s\", only \"silu\" is built", path, act->valuestring);
    const cJSON *quantised = cJSON_GetObjectItemCaseSensitive(json, "quantization_config");
    const cJSON *how = cJSON_GetObjectItemCaseSensitive(quantised, "quant_method");
    if (quantised && !cJSON_IsNull(quantised))
        die("%s: the model is quantised (%s), which is not built; fetch the one it was made from, in F32, F16 or BF16",
            path, cJSON_IsString(how) ? how->valuestring : "quantization_config");
    for (const char **name = (const char *[]){"attention_bias", "mlp_bias", NULL}; *name; name++)
        if (cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(json, *name))) die("%s: \"%s\" is true, biases are not built", path, *name);
    for (const char **name = (const char *[]){"rope_scaling", "rope_parameters", NULL}; *name; name++) {
        const cJSON *rope = cJSON_GetObjectItemCaseSensitive(json, *name);
        const cJSON *kind = cJSON_GetObjectItemCaseSensitive(rope, "rope_type");
        if (!kind) kind = cJSON_GetObjectItemCaseSensitive(rope, "type");
        if (cJSON_IsString(kind) && strcmp(kind->valuestring, "default"))
            die("%s: \"%s\" of type \"%s\" is not built, only the default RoPE", path, *name, kind->valuestring);
        if (cJSON_IsObject(rope) && !kind && cJSON_HasObjectItem(rope, "factor"))
            die("%s: \"%s\" without a type is not understood, only the default RoPE is built", path, *name);
    }
}

// Reads transformers' config.json, version 4 or 5 (which moved rope_theta into rope_parameters).
static config config_read(const char *path)
{
    size_t bytes;
    config c = {.text = read_file(path, &bytes)};
    cJSON *json = parse_json(path, c.text, bytes);
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
    c.theta = config_number(cJSON_GetObjectItemCaseSensitive(json, "rope_scaling"), path, "rope_theta", c.theta);
    c.theta = config_number(cJSON_GetObjectItemCaseSensitive(json, "rope_parameters"), path, "rope_theta", c.theta);
    c.init_range = config_number(json, path, "initializer_range", 0.02);
    config_stops(&c, json);
    c.tied = cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(json, "tie_word_embeddings"));
    if (c.heads % c.kv_heads) die("%s: %d heads cannot share %d key-value heads evenly", path, c.heads, c.kv_heads);
    if (c.head_dim % 2) die("%s: head_dim %d is odd, RoPE rotates halves", path, c.head_dim);
    if ((long)c.heads * c.head_dim > 1 << 24) die("%s: %d heads of %d are too wide", path, c.heads, c.head_dim);
    cJSON_Delete(json);
    return c;
}

#endif
