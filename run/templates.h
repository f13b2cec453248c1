//  run/templates.h: how a dialogue is written for a model: the paper's prompt, and the chat templates of
//  published models, piece by piece.

#ifndef TEMPLATES_H
#define TEMPLATES_H
#include "options.h"
#include "special_tokens.h"

enum role { SYSTEM, USER, ASSISTANT };
// Where the system may speak. WITHIN: in the first user's turn, or in the last one's; the turns must
// alternate then.
enum place { ANYWHERE, IN_FRONT, WITHIN_FIRST, WITHIN_LAST };

/* {text} is what is said, {bos} and {eos} are the model's own tokens. A dialogue is written as

       start  system  user  before answer end after  user  before answer end after  …
                                   └─ learnt ─┘

   and the answer to a new question goes on behind `before`. Where start is NULL, BOS is put as in front of
   plain text, if the model has one; where end is NULL, it is the model's EOS.                             */
typedef struct {
    const char *name;
    const char *start, *system, *user, *before, *answer, *end, *after;
    const char *default_system;         // what the system says where a dialogue does not
    const char *thought;                // between `before` and the last answer
    enum place place;                   // of the system's text
    int trimmed;                        // a bit a role whose text loses its spaces at both ends
    const char *known_by[2];            // both stand in the template's Jinja source
} chat_template;

#define BIT(role) (1 << (role))
#define CHATML(begin)                                                                   \
    .start = begin,                                                                     \
    .system = "<|im_start|>system\n{text}<|im_end|>\n",                                 \
    .user = "<|im_start|>user\n{text}<|im_end|>\n",                                     \
    .before = "<|im_start|>assistant\n", .answer = "{text}", .end = "<|im_end|>", .after = "\n"
#define HEADER(who) "<|start_header_id|>" who "<|end_header_id|>\n\n"
#define LLAMA3(date)                                                                    \
    .start = "{bos}",                                                                   \
    .system = HEADER("system") date "{text}<|eot_id|>",                                 \
    .user = HEADER("user") "{text}<|eot_id|>",                                          \
    .before = HEADER("assistant"), .answer = "{text}", .end = "<|eot_id|>", .after = "", \
    .trimmed = BIT(SYSTEM) | BIT(USER) | BIT(ASSISTANT)

// The first row is the paper's prompt. The others are the templates that come with these models; of those by
// which a model's own is known the first one counts.
static const chat_template templates[] = {
    {"alpaca",
     .system = "{text}", .user = "\n\n### Instruction:\n{text}",
     .before = "\n\n### Response:", .answer = "{text}", .after = "", .place = IN_FRONT,
     .default_system = "Below is an instruction that describes a task. "
                       "Write a response that appropriately completes the request."},
    {"llama2",
     .start = "", .system = "<<SYS>>\n{text}\n<</SYS>>\n\n", .user = "{bos}[INST] {text} [/INST]",
     .before = "", .answer = " {text} ", .end = "{eos}", .after = "", .place = WITHIN_FIRST,
     .trimmed = BIT(USER) | BIT(ASSISTANT), .known_by = {"[INST]", "<<SYS>>"}},
    {"llama3.1", LLAMA3("Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"),
     .default_system = "", .place = IN_FRONT, .known_by = {"<|start_header_id|>", "Cutting Knowledge Date"}},
    {"llama3", LLAMA3(""), .known_by = {"<|start_header_id|>", "<|eot_id|>"}},
    {"mistral",
     .start = "{bos}", .system = "{text}\n\n", .user = " [INST] {text} [/INST]",
     .before = "", .answer = " {text}", .end = "{eos}", .after = "", .place = WITHIN_FIRST,
     .known_by = {"\" [INST] \"", "\" [/INST]\""}},
    {"mistral-v3",
     .start = "{bos}", .system = "{text}\n\n", .user = "[INST] {text}[/INST]",
     .before = "", .answer = " {text}", .end = "{eos}", .after = "", .place = WITHIN_LAST,
     .trimmed = BIT(ASSISTANT), .known_by = {"\"[INST] \"", "\"[/INST]\""}},
    {"qwen3", CHATML(""), .thought = "<think>\n\n</think>\n\n", .known_by = {"<|im_start|>", "enable_thinking"}},
    {"qwen2.5", CHATML(""),
     .default_system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
     .known_by = {"<|im_start|>", "You are Qwen, created by Alibaba Cloud."}},
    {"smollm2", CHATML(""),
     .default_system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
     .known_by = {"<|im_start|>", "named SmolLM, trained by Hugging Face"}},
    {"qwen2", CHATML(""), .default_system = "You are a helpful assistant.",
     .known_by = {"<|im_start|>", "You are a helpful assistant"}},
    {"chatml-bos", CHATML("{bos}"), .known_by = {"<|im_start|>", "bos_token"}},
    {"chatml", CHATML(""), .known_by = {"<|im_start|>", "<|im_end|>"}},
    {"zephyr",
     .start = "", .system = "<|system|>\n{text}{eos}\n", .user = "<|user|>\n{text}{eos}\n",
     .before = "<|assistant|>\n", .answer = "{text}", .end = "{eos}", .after = "\n",
     .known_by = {"<|user|>", "+ eos_token"}},
};
enum { TEMPLATES = sizeof templates / sizeof *templates };

static int within_a_turn(const chat_template *c)
{
    return c->place == WITHIN_FIRST || c->place == WITHIN_LAST;
}

// The template in use, and what it needs of the tokenizer: BOS and EOS as texts, and the token that ends an
// answer, -1 for EOS.
static struct { const chat_template *is; char *bos, *eos; int end; } chat = {.is = templates, .end = -1};

// Appends to a fresh string.
static void add_text(char **text, const char *more, size_t bytes)
{
    size_t n = *text ? strlen(*text) : 0;
    *text = resize(*text, n + bytes + 1);
    memcpy(*text + n, more, bytes);
    (*text)[n + bytes] = 0;
}

// Appends a piece of the template with what it names filled in.
static void add_piece(char **text, const char *piece, const char *said)
{
    const struct { const char *name, *text; } names[] = {
        {"{text}", said}, {"{bos}", chat.bos}, {"{eos}", chat.eos},
    };
    while (*piece) {
        size_t n = strcspn(piece + 1, "{") + 1;
        for (int i = 0; i < 3; i++)
            if (!strncmp(piece, names[i].name, strlen(names[i].name))) {
                add_text(text, names[i].text, strlen(names[i].text));
                piece += strlen(names[i].name);
                n = strcspn(piece, "{");
            }
        add_text(text, piece, n);
        piece += n;
    }
}

// Bytes of the space that a text begins with, 0 if it begins with none: what Python's str.strip() takes away.
static size_t space_in_front(const char *text)
{
    static const char *const wide_spaces[] = {
        "\xc2\x85", "\u00a0", "\u1680", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000"};
    unsigned char c = (unsigned char)*text;
    if (c < 0x80) return c == ' ' || (c >= 9 && c <= 13) || (c >= 0x1c && c <= 0x1f);
    if (!strncmp(text, "\xe2\x80", 2) && (text[2] & 0xff) >= 0x80 && (text[2] & 0xff) <= 0x8a) return 3;
    for (size_t i = 0; i < sizeof wide_spaces / sizeof *wide_spaces; i++)
        if (!strncmp(text, wide_spaces[i], strlen(wide_spaces[i]))) return strlen(wide_spaces[i]);
    return 0;
}

// The text without the spaces at both ends, in a fresh string.
static char *trimmed(const char *text)
{
    size_t n;
    while ((n = space_in_front(text))) text += n;
    const char *end = text;
    for (const char *at = text; *at; at += n ? n : 1) {
        n = space_in_front(at);
        if (!n) end = at + 1;
    }
    return copy_bytes(text, (size_t)(end - text));
}

// The Jinja source of the model's own template in a fresh string, NULL where it has none. A list of several
// should have one that is called "default"; without it, the source is "", which is no template's.
static char *own_template(const char *dir)
{
    char *path = join(dir, "chat_template.jinja"), *settings_path;
    size_t bytes, i;
    char *source = exists(path) ? read_file(path, &bytes) : NULL;
    json_t *settings = directory_json(dir, "tokenizer_config.json", &settings_path), *one;
    json_t *own = json_object_get(settings, "chat_template");
    const char *text = json_is_array(own) ? "" : json_string_value(own);
    json_array_foreach(own, i, one) {
        const char *name = string_field(one, "name");
        if (name && !strcmp(name, "default")) text = string_field(one, "template");
    }
    if (!source && text) source = copy_text(text);
    json_decref(settings);
    free(settings_path);
    free(path);
    return source;
}

// Whether a ChatML source says by itself what this template says: of a system that no dialogue gives, nothing or
// the same words; and no thought unless it is ours. Line ends are spelled \n, or stand there.
static int says_the_same(const chat_template *c, const char *source)
{
    static const char begin[] = "<|im_start|>system";
    const char *words = c->default_system;
    if (!c->thought && strstr(source, "<think>")) return 0;
    for (const char *at = source; (at = strstr(at, begin));) {
        at += sizeof begin - 1;
        at += !strncmp(at, "\\n", 2) ? 2 : *at == '\n';
        int says = *at && !strchr("'\"{<+ ", *at);
        size_t n = words ? strlen(words) : 0;
        if (says && (!words || strncmp(at, words, n) || strncmp(at + n, "<|im_end|>", 10))) return 0;
    }
    return 1;
}

static const chat_template *template_known_by(const char *source)
{
    for (int i = 0; i < TEMPLATES; i++) {
        const chat_template *c = &templates[i];
        int chatml = c->system && strstr(c->system, "<|im_start|>");
        if (!c->known_by[0] || !strstr(source, c->known_by[0]) || !strstr(source, c->known_by[1])) continue;
        if (!chatml || says_the_same(c, source)) return c;
    }
    return NULL;
}

static const char *template_names(void)
{
    char *names = NULL;
    for (int i = 0; i < TEMPLATES; i++) {
        if (i) add_text(&names, ", ", 2);
        add_text(&names, templates[i].name, strlen(templates[i].name));
    }
    return names;
}

static const chat_template *template_named(const char *name)
{
    for (int i = 0; i < TEMPLATES; i++) if (!strcasecmp(templates[i].name, name)) return &templates[i];
    die("--template %s: there is no such template; choose from %s", name, template_names());
}

// BOS or EOS as the text that the tokenizer reads as this token. `piece`: one of the template that asks for
// it.
static char *token_as_text(const tokenizer *t, int id, const char *which, const char *piece)
{
    size_t bytes;
    const char *text = id < 0 ? NULL : tokenizer_added(t, id, &bytes);
    if (text) return copy_bytes(text, bytes);
    if (piece && strstr(piece, which))
        die("--template %s: has %s in it, which this model's tokenizer does not put; take another of %s",
            chat.is->name, which, template_names());
    return copy_text("");
}

// The token that ends an answer: the template's end must be one of the tokenizer's.
static int end_of_answer(const tokenizer *t)
{
    if (!chat.is->end) return -1;
    char *end = NULL;
    size_t n;
    add_piece(&end, chat.is->end, "");
    int *ids = tokenizer_encode(t, end, strlen(end), 0, &n), id = n == 1 ? ids[0] : -1;
    if (id < 0)
        die("--template %s: ends an answer with %s, which is no token of this model; take another of %s",
            chat.is->name, end, template_names());
    free(ids);
    free(end);
    return id;
}

// The template that an adapter, or a whole model, was trained with here: its state.json says so. Or NULL.
static const chat_template *trained_with(const char *dir)
{
    char *path;
    json_t *state = dir ? directory_json(dir, "state.json", &path) : NULL;
    const char *name = string_field(state, "--template");
    const chat_template *found = NULL;
    for (int i = 0; i < TEMPLATES && name; i++) if (!strcmp(templates[i].name, name)) found = &templates[i];
    json_decref(state);
    if (dir) free(path);
    return found;
}

// Settles the template: --template, else what was trained with, else the model's own, else the paper's prompt.
static void open_template(const tokenizer *t)
{
    const chat_template *own = opt.template ? template_named(opt.template) : trained_with(opt.adapter);
    if (!own) own = trained_with(opt.model);
    char *source = own ? NULL : own_template(opt.model);
    if (source) own = template_known_by(source);
    chat.is = own ? own : templates;
    if (source && !own)
        fprintf(stderr, "note: the chat_template of %s is none that this program knows; the paper's prompt is "
                        "used, --template takes another of %s\n", shown(opt.model), template_names());
    free(source);
    free(chat.bos);
    free(chat.eos);
    const char *first = chat.is->start && *chat.is->start ? chat.is->start : chat.is->user;
    chat.bos = token_as_text(t, tokenizer_bos(t), "{bos}", first);
    chat.eos = token_as_text(t, tokenizer_eos(t), "{eos}", chat.is->end);
    chat.end = end_of_answer(t);
}

#endif
