//  run/special_tokens.h: the tokenizer of a model directory, and what Hugging Face's files beside it say of
//  special tokens, BOS and EOS.

#ifndef SPECIAL_TOKENS_H
#define SPECIAL_TOKENS_H
#include "tokenizer_json.h"

tokenizer *tokenizer_load(const char *path, char *err, size_t err_size);
tokenizer *tokenizer_of_words(const char *path, char *err, size_t err_size);
void tokenizer_free(tokenizer *t);
int tokenizer_vocab(const tokenizer *t), tokenizer_bos(const tokenizer *t), tokenizer_eos(const tokenizer *t);
typedef struct {
    const char *text;
    int id;
    _Bool special, lstrip, rstrip, single_word, normalized;
} added_token;
_Bool tokenizer_add(tokenizer *t, added_token a), tokenizer_add_own(tokenizer *t);
enum behind_special { ALWAYS, UNLESS_SPACE, NEVER };
void tokenizer_spaces(tokenizer *t, _Bool in_front, enum behind_special behind);
int tokenizer_find(const tokenizer *t, const char *text);
const char *tokenizer_added(const tokenizer *t, int id, size_t *bytes);
int *tokenizer_encode(const tokenizer *t, const char *text, size_t bytes, _Bool begins, size_t *n);
char *tokenizer_decode(const tokenizer *t, const int *ids, size_t n, size_t *bytes);

#define GPT2_END "<|endoftext|>"        // ends texts where no file names another

// A token's text: "…" or {"content": "…"}.
static const char *token_text(const json_t *token)
{
    return json_is_string(token) ? json_string_value(token) : string_field(token, "content");
}

static void add_token(tokenizer *t, const char *path, const char *text, const json_t *token, double id)
{
    if (!text || !(id >= 0 && id <= 1 << 24) || id != floor(id))
        die("%s: an added token without a text or an id", path);
    added_token a = {text, (int)id, field_true(token, "special"), field_true(token, "lstrip"),
                     field_true(token, "rstrip"), field_true(token, "single_word"),
                     field_true(token, "normalized")};
    if (!tokenizer_add(t, a)) die("%s: out of memory", path);
}

static double id_of(const json_t *number) { return json_is_number(number) ? json_number_value(number) : -1; }

// The part of a tokenizer.json's normalizer or pre_tokenizer that is of this type, wherever it stands; NULL
// if there is none.
static const json_t *part_of_type(json_t *json, const char *type)
{
    const char *own = string_field(json, "type"), *key;
    const json_t *found = NULL;
    json_t *item;
    size_t i;
    if (own && !strcmp(own, type)) return json;
    json_object_foreach(json, key, item) if (!found) found = part_of_type(item, type);
    json_array_foreach(json, i, item) if (!found) found = part_of_type(item, type);
    return found;
}

// Where ▁ goes behind a special token, as transformers 5 does it. Its LlamaTokenizer goes by "legacy"; any
// other class by what tokenizer.json says; a tokenizer.model alone is taken for the oldest kind, which puts ▁
// there always.
static enum behind_special space_behind(const json_t *settings, const json_t *json)
{
    const char *class = string_field(settings, "tokenizer_class"), *scheme;
    if (class && !strncmp(class, "LlamaTokenizer", 14)) return field_true(settings, "legacy") ? UNLESS_SPACE : NEVER;
    json_t *normalizer = json_object_get(json, "normalizer");
    const json_t *metaspace = part_of_type(json_object_get(json, "pre_tokenizer"), "Metaspace");
    if (!json || part_of_type(normalizer, "Prepend") || part_of_type(normalizer, "Replace")) return ALWAYS;
    scheme = string_field(metaspace, "prepend_scheme");
    return metaspace && (!scheme || !strcmp(scheme, "always")) ? UNLESS_SPACE : NEVER;
}

// The id of the directory's "bos_token" or "eos_token"; `own`, tokenizer.model's, where it names none.
static int end_token(const tokenizer *t, const char *path, const json_t *settings, const json_t *map,
                     const char *name, int own)
{
    const char *text = token_text(json_object_get(settings, name));
    if (!text) text = token_text(json_object_get(map, name));
    if (!text) return own;
    int id = tokenizer_find(t, text);
    if (id < 0) die("%s: \"%s\" is %s, which is no token of this directory", path, name, text);
    return id;
}

// Which token begins a text, -1 if none does: the one that is named, unless "add_bos_token" is false. Where
// tokenizer.json lists the merges, many name one and do not put it there: its post-processor says so, unless
// "add_bos_token" does.
static int begin_token(const tokenizer *t, const char *dir, const char *path, const json_t *settings,
                       const json_t *map, int merges)
{
    const json_t *add_bos = json_object_get(settings, "add_bos_token");
    if (add_bos && !json_is_boolean(add_bos) && !json_is_null(add_bos))
        die("%s: \"add_bos_token\" must be true or false", path);
    if (json_is_false(add_bos)) return -1;
    if (merges && !json_is_true(add_bos)) return tokenizer_bos(t);
    int bos = end_token(t, path, settings, map, "bos_token", tokenizer_bos(t));
    if (bos < 0 && !merges)
        die("%s/tokenizer.model: has no BOS piece; "
            "\"add_bos_token\": false in tokenizer_config.json does without", dir);
    return bos;
}

// What Hugging Face's files beside the tokenizer say of special tokens, in the order in which they overrule
// each other. Where there are none at all, tokenizer.model is SentencePiece's, and "</s>" in a text is the
// text.
static void read_special_tokens(tokenizer *t, const char *dir, const char *json_path, const json_t *json,
                                int merges)
{
    char *added_path, *map_path, *path;
    json_t *added = directory_json(dir, "added_tokens.json", &added_path);
    json_t *map = directory_json(dir, "special_tokens_map.json", &map_path);
    json_t *settings = directory_json(dir, "tokenizer_config.json", &path), *item;
    const char *key;
    size_t i;
    char *config_path = join(dir, "config.json");
    int alone = access(config_path, F_OK) && !added && !json && !map && !settings;
    if (!alone && !tokenizer_add_own(t)) die("out of memory");
    free(config_path);
    json_object_foreach(added, key, item) add_token(t, added_path, key, NULL, id_of(item));
    json_array_foreach(json_object_get(json, "added_tokens"), i, item)
        add_token(t, json_path, token_text(item), item, id_of(json_object_get(item, "id")));
    json_object_foreach(json_object_get(settings, "added_tokens_decoder"), key, item) {
        char *end;
        double id = strtod(key, &end);
        add_token(t, path, token_text(item), item, *end ? -1 : id);
    }
    int bos = begin_token(t, dir, path, settings, map, merges);
    int own_end = merges ? tokenizer_find(t, GPT2_END) : tokenizer_eos(t);
    int eos = end_token(t, path, settings, map, "eos_token", own_end);
    if (eos < 0 && merges) die("%s/tokenizer_config.json: names no \"eos_token\", which ends an answer", dir);
    if (eos < 0) die("%s/tokenizer.model: has no EOS piece", dir);
    tokenizer_ends(t, bos, eos);
    if (!merges || field_true(json_object_get(json, "model"), "byte_fallback"))
        tokenizer_spaces(t, !field_false(settings, "add_prefix_space"), space_behind(settings, json));
    json_decref(added);
    json_decref(map);
    json_decref(settings);
    free(added_path);
    free(map_path);
    free(path);
}

// A directory's vocab.json and merges.txt: GPT-2's, whose one special token is <|endoftext|>.
static tokenizer *open_gpt2(const char *dir)
{
    char *vocab_path, *path, *merges_path = join(dir, "merges.txt");
    json_t *vocab = directory_json(dir, "vocab.json", &vocab_path);
    json_t *settings = directory_json(dir, "tokenizer_config.json", &path);
    const char *class = string_field(settings, "tokenizer_class");
    if (class && strncmp(class, "GPT2Tokenizer", 13))
        die("%s: is of %s, whose way to cut words only a tokenizer.json says; in Python: transformers."
            "AutoTokenizer.from_pretrained(\"%s\").save_pretrained(\"%s\")", vocab_path, class, dir, dir);
    tokenizer *t = read_gpt2(vocab_path, merges_path, vocab, field_true(settings, "add_prefix_space"));
    added_token end = {.text = GPT2_END, .id = tokenizer_find(t, GPT2_END), .special = 1};
    if (end.id >= 0 && !tokenizer_add(t, end)) die("out of memory");
    json_decref(vocab), json_decref(settings);
    free(vocab_path), free(merges_path), free(path);
    return t;
}

// RWKV's vocabulary, which has no special tokens: id 0 ends a text.
static tokenizer *open_words(const char *path, int vocab)
{
    char err[512];
    expect_file(path);
    tokenizer *t = tokenizer_of_words(path, err, sizeof err);
    if (!t) die("%s", err);
    if (vocab && tokenizer_vocab(t) > vocab)
        die("%s: has ids up to %d, but config.json says vocab_size %d", path, tokenizer_vocab(t) - 1, vocab);
    return t;
}

// tokenizer.model where there is one, else tokenizer.json, else GPT-2's two files; but RWKV's vocabulary goes first.
static tokenizer *open_tokenizer(const char *dir, int vocab)
{
    char *words = join(dir, "rwkv_vocab_v20230424.txt");
    tokenizer *of_words = exists(words) ? open_words(words, vocab) : NULL;
    free(words);
    if (of_words) return of_words;
    char *model_path = join(dir, "tokenizer.model"), *vocab_path = join(dir, "vocab.json");
    char *json_path, err[512];
    json_t *json = directory_json(dir, "tokenizer.json", &json_path);
    int merges = !exists(model_path) && (json || exists(vocab_path));
    const char *path = !merges ? model_path : json ? json_path : vocab_path;
    if (!merges && exists(path)) expect_file(path);             // a link to nothing is said as what it is
    tokenizer *t = !merges ? tokenizer_load(path, err, sizeof err)
                 : json ? read_tokenizer_json(path, json) : open_gpt2(dir);
    if (!t) die("%s", err);
    if (vocab && tokenizer_vocab(t) > vocab)
        die("%s: has %d pieces, but config.json says vocab_size %d", path, tokenizer_vocab(t), vocab);
    read_special_tokens(t, dir, json_path, json, merges);
    json_decref(json);
    free(model_path), free(vocab_path), free(json_path);
    return t;
}

#endif
