//  run/tokenizer_json.h: BPE out of a tokenizer.json, or out of GPT-2's vocab.json and merges.txt. It is
//  byte-level (GPT-2, Llama 3, Qwen), or SentencePiece's (Llama2, where tokenizer.model is missing).

#ifndef TOKENIZER_JSON_H
#define TOKENIZER_JSON_H
#include "../lib/json.h"

typedef struct tokenizer tokenizer;     // tokenizer.c: byte pair encoding
typedef struct { const char *regex; _Bool literal, keep_matches, keep_rest; } cut_rule;
typedef struct {
    _Bool byte_level;
    const char *const *tokens;
    int vocab;
    const char *const (*merges)[2];
    int merge_count;
    const cut_rule *cuts;
    int cut_count;
    _Bool nfc, space_in_front, unless_space, whole_words;
    int unknown;
} bpe;
tokenizer *tokenizer_of_merges(const char *path, const bpe *b, char *err, size_t err_size);
void tokenizer_ends(tokenizer *t, int bos, int eos);

// What the files say, as it is read. Tokens and expressions are the JSON's own texts.
typedef struct {
    const char *path;           // the file that an error is in
    bpe is;
    const char **tokens;
    const char *(*merges)[2];
    char **halves;              // of merges that stand as "a b"
    cut_rule *cuts;
    int bos, byte_letters;      // byte_letters: ByteLevel is among the pre-tokenizers
} bpe_file;

// The regular expression of ByteLevel, which is GPT-2's.
static const char gpt2_words[] =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

// Every kind of part that is not built is refused by its name.
__attribute__((noreturn))
static void not_built(const bpe_file *f, const char *part, const json_t *json, const char *expected)
{
    const char *type = string_field(json, "type");
    die("%s: its %s is %s, which is not built; expected %s", f->path, part,
        type ? type : json_is_object(json) ? "of no \"type\"" : "missing", expected);
}

static int is_type(const json_t *json, const char *type)
{
    const char *own = string_field(json, "type");
    return own && !strcmp(own, type);
}

// Whether a part says this and nothing else.
static int is_exactly(const json_t *json, const char *text)
{
    json_t *expected = json_loads(text, AS_DOUBLES, NULL);
    if (!expected) die("out of memory");
    int same = json_equal(json, expected);
    json_decref(expected);
    return same;
}

static int id_in(const json_t *number, int below)               // -1 if it is none
{
    double id = json_is_number(number) ? json_number_value(number) : -1;
    return id >= 0 && id < below && id == floor(id) ? (int)id : -1;
}

// {"the": 262, …}
static void read_vocab(bpe_file *f, json_t *vocab)
{
    enum { MOST = 10000000 };
    const char *token;
    json_t *item;
    if (!json_object_size(vocab)) die("%s: expected \"vocab\": {\"the\": 262, …}", f->path);
    json_object_foreach(vocab, token, item) {
        int id = id_in(item, MOST);
        if (id < 0) die("%s: \"%s\" of the vocabulary: expected an id, 0 to %d", f->path, token, MOST - 1);
        if (id >= f->is.vocab) f->is.vocab = id + 1;
    }
    f->tokens = alloc((size_t)f->is.vocab, sizeof *f->tokens);
    json_object_foreach(vocab, token, item) {
        const char **place = f->tokens + id_in(item, MOST);
        if (*place) die("%s: \"%s\" and \"%s\" of the vocabulary have the same id", f->path, *place, token);
        *place = token;
    }
    f->is.tokens = f->tokens;
}

// Adds a merge that is spelled "a b", in memory of its own.
static void add_merge(bpe_file *f, char *line)
{
    char *space = strchr(line, ' ');
    arrput(f->halves, line);
    if (!space || space == line || !space[1] || strchr(space + 1, ' '))
        die("%s: merge %td is \"%s\", expected two tokens with a space between",
            f->path, arrlen(f->halves), line);
    *space = 0;
    const char **merge = f->merges[f->is.merge_count++];
    merge[0] = line;
    merge[1] = space + 1;
}

// ["a b", …] or [["a", "b"], …]
static void read_merges(bpe_file *f, const json_t *merges)
{
    json_t *item;
    size_t i;
    if (!json_is_array(merges)) die("%s: expected \"merges\": [\"a b\", …]", f->path);
    f->merges = alloc(json_array_size(merges), sizeof *f->merges);
    json_array_foreach(merges, i, item) {
        const char *left = json_string_value(json_array_get(item, 0));
        const char *right = json_string_value(json_array_get(item, 1));
        if (json_is_string(item)) add_merge(f, copy_text(json_string_value(item)));
        else if (left && right && json_array_size(item) == 2) {
            const char **merge = f->merges[f->is.merge_count++];
            merge[0] = left;
            merge[1] = right;
        } else die("%s: merge %zu: expected \"a b\" or [\"a\", \"b\"]", f->path, i + 1);
    }
}

static void read_bpe(bpe_file *f, const json_t *json)
{
    static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    if (!is_type(json, "BPE") && (string_field(json, "type") || !json_object_get(json, "merges")))
        not_built(f, "model", json, "BPE");
    if (json_number_value(json_object_get(json, "dropout")) != 0)
        die("%s: its model has a \"dropout\", which is not built; expected null", f->path);
    for (int i = 0; i < 2; i++) {
        const char *affix = string_field(json, affixes[i]);
        if (affix && *affix)
            die("%s: its model has \"%s\" \"%s\", which is not built", f->path, affixes[i], affix);
    }
    f->is.byte_level = !field_true(json, "byte_fallback");
    f->is.whole_words = field_true(json, "ignore_merges");
    json_t *vocab = json_object_get(json, "vocab");
    const char *unknown = string_field(json, "unk_token");
    read_vocab(f, vocab);
    if (unknown && *unknown) f->is.unknown = id_in(json_object_get(vocab, unknown), f->is.vocab);
    read_merges(f, json_object_get(json, "merges"));
}

// SentencePiece's kind has two: ▁ in front, and ▁ for every space.
#define FRONT    "{\"type\":\"Prepend\",\"prepend\":\"▁\"}"
#define TO_SPACE "{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"▁\"}"

static void read_normalizer(bpe_file *f, const json_t *json)
{
    const char *expected = f->is.byte_level ? "NFC or none" : "Llama2's";
    json_t *item;
    size_t i;
    if (!json || json_is_null(json)) return;
    if (is_type(json, "Sequence"))
        json_array_foreach(json_object_get(json, "normalizers"), i, item) read_normalizer(f, item);
    else if (f->is.byte_level && is_type(json, "NFC")) f->is.nfc = 1;
    else if (!f->is.byte_level && is_exactly(json, FRONT)) f->is.space_in_front = 1;
    else if (f->is.byte_level || !is_exactly(json, TO_SPACE)) not_built(f, "normalizer", json, expected);
}

static void read_split(bpe_file *f, const json_t *json)
{
    const json_t *pattern = json_object_get(json, "pattern");
    const char *regex = string_field(pattern, "Regex"), *text = string_field(pattern, "String");
    const char *behavior = string_field(json, "behavior");
    if (!behavior) behavior = "of no name";
    int isolated = !strcmp(behavior, "Isolated"), removed = !strcmp(behavior, "Removed");
    if ((!regex && !text) || (text && !*text))
        die("%s: its pre_tokenizer has a Split without a \"Regex\" or a \"String\"", f->path);
    if (!isolated && !removed)
        die("%s: its pre_tokenizer has a Split with behavior %s, which is not built; expected Isolated or "
            "Removed", f->path, behavior);
    int inverted = field_true(json, "invert");          // what does not match is what it splits at
    cut_rule rule = {regex ? regex : text, !regex, isolated || inverted, isolated || !inverted};
    arrput(f->cuts, rule);
}

// SentencePiece's kind has none, or Metaspace, which puts ▁ for spaces and in front.
static void read_metaspace(bpe_file *f, const json_t *json)
{
    const char *scheme = string_field(json, "prepend_scheme"), *space = string_field(json, "replacement");
    if (!json || json_is_null(json)) return;
    if (!is_type(json, "Metaspace")) not_built(f, "pre_tokenizer", json, "Metaspace or none");
    if (!field_false(json, "split") || !scheme || !space || strcmp(space, "▁"))
        die("%s: its pre_tokenizer Metaspace is not built without \"split\": false, \"replacement\": \"▁\" "
            "and a \"prepend_scheme\"", f->path);
    f->is.space_in_front = strcmp(scheme, "never") != 0;
    f->is.unless_space = 1;
}

// Every kind of pre-tokenizer is a run of cuts. ByteLevel ends it: behind it, letters stand for bytes.
static void read_pre_tokenizer(bpe_file *f, const json_t *json)
{
    json_t *item;
    size_t i;
    if (is_type(json, "Sequence")) {
        json_array_foreach(json_object_get(json, "pretokenizers"), i, item) read_pre_tokenizer(f, item);
        return;
    }
    if (f->byte_letters) not_built(f, "pre_tokenizer behind ByteLevel", json, "ByteLevel at the end");
    if (is_type(json, "Split")) read_split(f, json);
    else if (is_type(json, "Digits")) {
        int one = field_true(json, "individual_digits");
        arrput(f->cuts, ((cut_rule){one ? "\\p{N}" : "\\p{N}+", 0, 1, 1}));
    } else if (is_type(json, "ByteLevel")) {
        f->byte_letters = 1;
        f->is.space_in_front = f->is.unless_space = field_true(json, "add_prefix_space");
        if (f->is.space_in_front && arrlen(f->cuts))
            die("%s: its pre_tokenizer ByteLevel has \"add_prefix_space\": true behind others, which is not "
                "built", f->path);
        if (!field_false(json, "use_regex")) arrput(f->cuts, ((cut_rule){gpt2_words, 0, 1, 1}));
    } else not_built(f, "pre_tokenizer", json, "ByteLevel, Split, Digits, or a Sequence of them");
}

// Byte-level BPE has one. SentencePiece's kind has a Sequence, which strips the space in front if there is
// one.
#define DECODERS "{\"type\":\"Sequence\",\"decoders\":[" \
    "{\"type\":\"Replace\",\"pattern\":{\"String\":\"▁\"},\"content\":\" \"}," \
    "{\"type\":\"ByteFallback\"},{\"type\":\"Fuse\"}"

static void read_decoder(const bpe_file *f, const json_t *json)
{
    static const char *const known[] = {
        DECODERS "]}", DECODERS ",{\"type\":\"Strip\",\"content\":\" \",\"start\":1,\"stop\":0}]}",
    };
    if (f->is.byte_level && !is_type(json, "ByteLevel")) not_built(f, "decoder", json, "ByteLevel");
    if (!f->is.byte_level && !is_exactly(json, known[f->is.space_in_front]))
        not_built(f, "decoder", json, "the Sequence that Llama2's tokenizer.json has");
}

// The post-processor says whether texts begin with a BOS.
static void read_post_processor(bpe_file *f, const json_t *json)
{
    const json_t *single = json_object_get(json, "single");
    json_t *item;
    size_t i;
    if (is_type(json, "Sequence"))
        json_array_foreach(json_object_get(json, "processors"), i, item) read_post_processor(f, item);
    else if (is_type(json, "TemplateProcessing"))
        json_array_foreach(single, i, item) {
            const char *token = string_field(json_object_get(item, "SpecialToken"), "id");
            if (!token) continue;
            const json_t *known = json_object_get(json_object_get(json, "special_tokens"), token);
            f->bos = id_in(json_array_get(json_object_get(known, "ids"), 0), INT_MAX);
            if (i || f->bos < 0)
                die("%s: its post_processor puts \"%s\" where it is not built; expected one BOS in front of "
                    "a text, and its id", f->path, token);
        }
    else if (json && !json_is_null(json) && !is_type(json, "ByteLevel"))
        not_built(f, "post_processor", json, "TemplateProcessing or ByteLevel");
}

// Makes the tokenizer of what was read, and frees that.
static tokenizer *close_bpe_file(bpe_file *f)
{
    char err[512];
    f->is.merges = (const char *const (*)[2])f->merges;
    f->is.cuts = f->cuts;
    f->is.cut_count = (int)arrlen(f->cuts);
    tokenizer *t = tokenizer_of_merges(f->path, &f->is, err, sizeof err);
    if (!t) die("%s", err);
    tokenizer_ends(t, f->bos, -1);
    for (int i = 0; i < arrlen(f->halves); i++) free(f->halves[i]);
    arrfree(f->halves);
    arrfree(f->cuts);
    free(f->merges);
    free(f->tokens);
    return t;
}

static tokenizer *read_tokenizer_json(const char *path, const json_t *json)
{
    bpe_file f = {.path = path, .is.unknown = -1, .bos = -1};
    read_bpe(&f, json_object_get(json, "model"));
    read_normalizer(&f, json_object_get(json, "normalizer"));
    if (f.is.byte_level) read_pre_tokenizer(&f, json_object_get(json, "pre_tokenizer"));
    else read_metaspace(&f, json_object_get(json, "pre_tokenizer"));
    if (f.is.byte_level && !f.byte_letters)
        die("%s: its pre_tokenizer has no ByteLevel, which is not built", path);
    read_post_processor(&f, json_object_get(json, "post_processor"));
    read_decoder(&f, json_object_get(json, "decoder"));
    return close_bpe_file(&f);
}

// GPT-2's own files: the vocabulary, and merges, one a line.
static tokenizer *read_gpt2(const char *vocab_path, const char *merges_path, json_t *vocab, int in_front)
{
    bpe_file f = {.path = merges_path, .is.unknown = -1, .bos = -1};
    size_t bytes, lines = 1;
    expect_file(merges_path);
    char *text = read_file(merges_path, &bytes), *rest = text;
    expect_utf8(merges_path, text, bytes);
    for (size_t i = 0; i < bytes; i++) lines += text[i] == '\n';
    f.merges = alloc(lines, sizeof *f.merges);
    for (char *line; (line = strsep(&rest, "\n")); ) {
        line[strcspn(line, "\r")] = 0;
        if (*line && strncmp(line, "#version", 8)) add_merge(&f, copy_text(line));
    }
    free(text);
    f.path = vocab_path;
    read_vocab(&f, vocab);
    f.is.byte_level = 1;
    f.is.space_in_front = f.is.unless_space = (_Bool)in_front;
    arrput(f.cuts, ((cut_rule){gpt2_words, 0, 1, 1}));
    return close_bpe_file(&f);
}

#endif
