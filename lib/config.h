//  lib/config.h: config.json of a model directory. What its fields are, each backbone says (llama.h); how a field is read
//  stands here.

#ifndef CONFIG_H
#define CONFIG_H
#include "json.h"

// How RoPE's frequencies follow from rope_theta (llama.h: rope_frequency).
enum rope { ROPE_PLAIN, ROPE_LINEAR, ROPE_LLAMA3 };

enum { MOST_STOPS = 16 };
typedef struct {
    const struct backbone *backbone;                    // model.h
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
    int att, mix_rank, decay_rank, head_divisor;        // RWKV6: widths of attention and of its low ranks; ε of heads
    int stop[MOST_STOPS], stops; // tokens that end a text, besides the tokenizer's EOS
    char *text;                 // the file itself: a merged model is written with the same config
} config;

/* A family of models: what config.json means where it leaves a field out, and which fields a family has. Numbers are the
   defaults of transformers 5.24.                                                                                      */
typedef struct family {
    const char *model_type, *name;
    int max_pos, kv_heads, head_dim;    // 0: as many kv heads as heads; dim / heads
    int window;                         // 0: knows no window
    int window_switch;                  // "use_sliding_window" turns it on, for the layers from "max_window_layers" on
    int qkv_bias;                       // q, k, v have a bias whatever config.json says
    int attention_bias, mlp_bias;       // the fields of this name count: q, k, v, o; gate, up, down
    int qk_norm;
} family;

/* The fields of config.json. A WHOLE number or a NUMBER lies in [least, most], and null is as if it were not there; a
   SWITCH is true or false; a WORD is one word. Those without a place in `config` must be what is built: `missing`, or
   `word`.                                                                                                            */
enum { REQUIRED = -1, NOWHERE = -1 };
#define TO(field) (long)offsetof(config, field)
typedef struct config_field {
    const char *name;
    enum { WHOLE, NUMBER, SWITCH, WORD } type;
    long at;
    double missing, least, most;
    const char *word;
} config_field;

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
    "unsloth_version", "unsloth_fixed", "rescale_every", "model_version", "context_length", NULL};

// The JSON number of a field in [least, most]; `missing` where it is not there or null.
static double number_field(const json_t *json, const char *path, const config_field *f)
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
    return (int)number_field(json, path, &(config_field){name, WHOLE, NOWHERE, missing, 1, 1 << 24, NULL});
}

static double config_number(const json_t *json, const char *path, const char *name, double missing)
{
    return number_field(json, path, &(config_field){name, NUMBER, NOWHERE, missing, 1e-30, 1e15, NULL});
}

// True or false; what is not built is refused by name.
static int switch_field(const json_t *json, const char *path, const config_field *f)
{
    const json_t *item = json_object_get(json, f->name);
    if (item && !json_is_boolean(item)) die("%s: \"%s\" must be true or false", path, f->name);
    int value = item ? json_is_true(item) : f->missing != 0;
    if (f->at == NOWHERE && value != (f->missing != 0))
        die("%s: \"%s\" is %s, which is not built here", path, f->name, value ? "true" : "false");
    return value;
}

static void expect_word(const json_t *json, const char *path, const config_field *f)
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
static void name_unknown(const config *c, const config_field *fields, json_t *json, const char *path)
{
    const char *name;
    json_t *value;
    json_object_foreach(json, name, value) {
        int known = of_others(c->family, name) && (json_is_null(value) || json_is_false(value));
        for (const config_field *f = fields; f->name; f++)
            known |= !strcmp(name, f->name) && !of_others(c->family, name);
        for (const char *const *h = harmless_fields; *h; h++) known |= !strcmp(name, *h) && !of_others(c->family, name);
        if (known) continue;
        char *safe = printable(name, "");
        fprintf(stderr, "note: %s: nothing here knows the field \"%s\"; it is not used\n", path, safe ? safe : "");
        free(safe);
    }
}

// "eos_token_id" of config.json or generation_config.json: a token, a list of them, or null. Both files often name the same.
static void config_stops(config *c, const json_t *json, const char *path)
{
    const json_t *ids = json_object_get(json, "eos_token_id");
    size_t n = json_is_array(ids) ? json_array_size(ids) : ids && !json_is_null(ids);
    for (size_t i = 0; i < n; i++) {
        const json_t *id = json_is_array(ids) ? json_array_get(ids, i) : ids;
        double x = json_number_value(id);
        int known = 0;
        for (int k = 0; k < c->stops; k++) known |= c->stop[k] == x;
        if (!json_is_number(id) || !(fabs(x) < INT_MAX) || x != (int)x || (!known && c->stops == MOST_STOPS))
            die("%s: \"eos_token_id\" must be a token, or a list of at most %d", path, MOST_STOPS);
        if (!known) c->stop[c->stops++] = (int)x;
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

// The fields of a list, each into its place. What changes the function is built or refused, never ignored.
static void read_fields(config *c, const config_field *fields, const json_t *json, const char *path)
{
    for (const config_field *f = fields; f->name; f++) {
        char *at = (char *)c + f->at;
        if (f->type == WHOLE) *(int *)(void *)at = (int)number_field(json, path, f);
        double number = f->type == NUMBER ? number_field(json, path, f) : 0;
        if (f->type == NUMBER && f->at != NOWHERE) *(double *)(void *)at = number;
        if (f->type == NUMBER && f->at == NOWHERE && number != f->missing)
            die("%s: \"%s\" is %.10g, only %.10g is built", path, f->name, number, f->missing);
        if (f->type == WORD) expect_word(json, path, f);
        int on = f->type == SWITCH && switch_field(json, path, f);
        if (f->type == SWITCH && f->at != NOWHERE) *(int *)(void *)at = on;
    }
}

#endif
