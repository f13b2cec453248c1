//  run/rows.h: rows of a file as tokens, micro-batches of rows, and when an answer is right.

#ifndef ROWS_H
#define ROWS_H
#include <ctype.h>
#include "../lib/gzip.h"
#include "dialogue.h"

typedef struct { row *rows; const char *path; int cut, dropped, empty; } dataset;

/* What a row may be, and who says which of its fields. A PROMPT becomes a dialogue of one turn: `asked`, `more`
   on a line of its own below it, and the answer. RAW is a text and what follows it, as they are, or two parts
   of a dialogue. A DIALOGUE is a list of turns. Where a row has the fields of several, the first one counts. */
enum row_kind { PROMPT, RAW, DIALOGUE, TEXT };
static const struct format { enum row_kind kind; const char *asked, *more, *answer, *system; } formats[] = {
    {PROMPT,   "instruction", "input",   "output",        NULL},            // Alpaca, WizardLM
    {PROMPT,   "instruction", "context", "response",      NULL},            // Dolly
    {PROMPT,   "query",       NULL,      "response",      NULL},            // MetaMathQA
    {PROMPT,   "query",       NULL,      "answer",        NULL},            // CodeFeedback
    {PROMPT,   "question",    NULL,      "answer",        NULL},            // GSM8K
    {PROMPT,   "question",    NULL,      "response",      "system_prompt"}, // OpenOrca
    {RAW,      "prompt",      NULL,      "completion",    NULL},            // TRL
    {DIALOGUE, NULL,          NULL,      "messages",      NULL},            // OpenAI
    {DIALOGUE, NULL,          NULL,      "conversations", NULL},            // ShareGPT, WizardLM
    {TEXT,     NULL,          NULL,      "text",          NULL},
};
enum { FORMATS = sizeof formats / sizeof *formats };

// Who speaks, as OpenAI and as ShareGPT call them.
static const struct { const char *name; enum role role; } roles[] = {
    {"system", SYSTEM}, {"developer", SYSTEM}, {"user", USER}, {"human", USER}, {"assistant", ASSISTANT},
    {"gpt", ASSISTANT},
};
enum { ROLES = sizeof roles / sizeof *roles };

// A number counts as the text that the file spells, 18.50 as well as 18.5: makes texts of an object's
// numbers. `at` is its {, in the file.
static void numbers_as_text(json_t *object, const char *at)
{
    at++;
    for (void *field = json_object_iter(object); field; field = json_object_iter_next(object, field)) {
        at = next_value(at);
        size_t n = strspn(at, "+-.0123456789eE");
        if (n) json_object_iter_set_new(object, field, json_stringn(at, n));
    }
}

// A field as text. NULL where it is missing or null; what is neither a text nor a number is refused.
static const char *text_field(const char *where, const json_t *json, const char *name)
{
    const json_t *item = json_object_get(json, name);
    if (!item || json_is_null(item)) return NULL;
    if (json_is_string(item)) return json_string_value(item);
    const char *kind = json_is_true(item) ? "true" : "false";
    if (json_is_array(item)) kind = "an array";
    if (json_is_object(item)) kind = "an object";
    die("%s: \"%s\" is %s, expected text or a number", where, name, kind);
}

// ---- a row of a file --------------------------------------------------------------------------------------

static int has_field(const json_t *json, const char *name)
{
    const json_t *item = json_object_get(json, name);
    return item && !json_is_null(item);
}

// The first format all of whose fields a row has.
static const struct format *format_of(const char *where, const json_t *json)
{
    if (!json_is_object(json))
        die("%s: expected a JSON object, e.g. {\"question\": …, \"answer\": …}", where);
    for (const struct format *f = formats; f < formats + FORMATS; f++)
        if (has_field(json, f->answer) && (!f->asked || has_field(json, f->asked))) return f;
    for (const struct format *f = formats; f < formats + FORMATS; f++) {
        int answer = has_field(json, f->answer);
        if (answer || (f->asked && has_field(json, f->asked)))
            die("%s: has \"%s\" but no text in \"%s\"",
                where, answer ? f->answer : f->asked, answer ? f->asked : f->answer);
    }
    char *names = NULL;
    for (const struct format *f = formats; f < formats + FORMATS; f++) {
        char *name = text_of("%s\"%s%s%s\"", f == formats ? "" : f == formats + FORMATS - 1 ? " or " : ", ",
                             f->asked ? f->asked : "", f->asked ? "\"/\"" : "", f->answer);
        add_text(&names, name, strlen(name));
        free(name);
    }
    die("%s: no %s here", where, names);
}

// OpenAI's name of a field of a turn, or ShareGPT's.
static const json_t *either_field(const json_t *turn, const char *openai, const char *sharegpt)
{
    const json_t *item = json_object_get(turn, openai);
    return item ? item : json_object_get(turn, sharegpt);
}

static enum role role_of(const char *where, int number, const json_t *turn)
{
    const char *name = json_string_value(either_field(turn, "role", "from"));
    if (!name)
        die("%s: turn %d does not say whose it is: expected an object with \"role\" or \"from\"", where, number);
    for (int i = 0; i < ROLES; i++) if (!strcasecmp(name, roles[i].name)) return roles[i].role;
    die("%s: turn %d is \"%s\"'s; expected system, user (human) or assistant (gpt)", where, number, name);
}

static int is_empty_list(const json_t *item) { return json_is_array(item) && !json_array_size(item); }

// What a turn says: a text, or a list of parts that are texts, a line each. Anything else would be lost.
static char *said_in(const char *where, int number, const json_t *turn)
{
    static const char *const calls[] = {"tool_calls", "function_call"};
    const json_t *content = either_field(turn, "content", "value"), *part;
    char *text = NULL;
    size_t i;
    for (int j = 0; j < 2; j++)
        if (has_field(turn, calls[j]) && !is_empty_list(json_object_get(turn, calls[j])))
            die("%s: turn %d has \"%s\", which no template here can write", where, number, calls[j]);
    if (json_is_string(content)) return copy_text(json_string_value(content));
    if (!json_is_array(content)) die("%s: turn %d has no text in \"content\" or \"value\"", where, number);
    json_array_foreach(content, i, part) {
        const char *type = string_field(part, "type"), *said = string_field(part, "text");
        if (!type || strcmp(type, "text") || !said)
            die("%s: part %zu of turn %d is %s%s, expected a text",
                where, i + 1, number, type ? "of type " : "no text", type ? type : "");
        if (text) add_text(&text, "\n", 1);
        add_text(&text, said, strlen(said));
    }
    return text ? text : copy_text("");
}

// OpenAI's "weight" of an answer: 0 is not learnt.
static int weight_of(const char *where, int number, const json_t *turn)
{
    const json_t *weight = json_object_get(turn, "weight");
    double x = json_number_value(weight);
    if (!weight || json_is_null(weight)) return 1;
    if (!json_is_number(weight) || (x != 0 && x != 1))
        die("%s: the \"weight\" of turn %d must be 0 or 1", where, number);
    return x == 1;
}

// Appends a list of turns.
static void read_turns(message **list, const char *where, const json_t *turns, int learnt)
{
    const json_t *turn;
    size_t i;
    if (!json_is_array(turns)) die("%s: expected a list of turns, [{\"role\": …, \"content\": …}, …]", where);
    json_array_foreach(turns, i, turn) {
        int number = (int)arrlen(*list) + 1;
        enum role role = role_of(where, number, turn);
        int weight = weight_of(where, number, turn);
        say(list, role, said_in(where, number, turn), learnt && role == ASSISTANT && weight);
    }
}

// The lists of turns of an object: what is asked, if it stands apart, and what is learnt. "system" may stand beside
// them.
static void read_dialogue(message **list, const char *where, const json_t *json, const json_t *asked, const json_t *answer)
{
    const char *system = text_field(where, json, "system");
    if (has_field(json, "tools") && !is_empty_list(json_object_get(json, "tools")))
        die("%s: has \"tools\", which no template here can write", where);
    if (system && *system) say(list, SYSTEM, copy_text(system), 0);
    if (asked) read_turns(list, where, asked, 0);
    read_turns(list, where, answer, 1);
}

// One question and its answer as a dialogue.
static void read_prompt(message **list, const char *where, const json_t *json, const struct format *f)
{
    const char *system = text_field(where, json, f->system ? f->system : "system");
    const char *asked = text_field(where, json, f->asked), *answer = text_field(where, json, f->answer);
    const char *more = f->more ? text_field(where, json, f->more) : NULL;
    if (!*asked) die("%s: \"%s\" is empty", where, f->asked);
    if (system && *system) say(list, SYSTEM, copy_text(system), 0);
    say(list, USER, text_of("%s%s%s", asked, more && *more ? "\n" : "", more ? more : ""), 0);
    say(list, ASSISTANT, copy_text(answer), 1);
}

// A dialogue as a row. Without an answer that says something it has nothing to learn, and no ids.
static row row_of_dialogue(const tokenizer *t, const char *where, const message *list)
{
    row r = {0};
    int says = 0, first = first_answer_learnt(list), asked = first;
    expect_written(where, list);
    for (int i = first; i < arrlen(list); i++)
        says |= list[i].role == ASSISTANT && list[i].learnt && !is_blank(list[i].text);
    if (!says) return r;
    r = encode_dialogue(t, list);
    while (asked > 0 && list[asked].role != USER) asked--;
    r.answer = copy_text(list[first].text);
    r.asked = copy_text(list[asked].role == USER ? list[asked].text : "");
    return r;
}

// A text, and what follows it, as they are.
static row raw_row(const tokenizer *t, const char *prompt, const char *completion)
{
    row r = {0};
    if (is_blank(completion)) return r;
    r = encode_row(t, prompt, completion, 1);
    if (r.prompt < 1) r.prompt = 1;
    r.answer = copy_text(completion);
    r.asked = copy_text(prompt);
    return r;
}

// A text that is learnt whole.
static row text_row(const tokenizer *t, const char *text)
{
    row r = {0};
    if (*text) r = encode_row(t, "", text, !!opt.init);         // --init: where a text ends must be learnt, too
    if (r.prompt < 1) r.prompt = 1;                             // nothing predicts the first token
    return r;
}

// One object in any of the formats. What is wrong with it is said with file and line, or with its number in
// an array. A row whose answer or text is empty has nothing to learn: it comes back without ids.
static row read_row(const tokenizer *t, const char *where, const json_t *json)
{
    row r = {0};
    message *list = NULL;
    const struct format *f = format_of(where, json);
    const json_t *asked = f->asked ? json_object_get(json, f->asked) : NULL;
    const json_t *answer = json_object_get(json, f->answer);
    int lists = f->kind == DIALOGUE || (f->kind == RAW && (json_is_array(asked) || json_is_array(answer)));
    if (f->kind == TEXT) return text_row(t, text_field(where, json, f->answer));
    if (f->kind == RAW && !lists)
        return raw_row(t, text_field(where, json, f->asked), text_field(where, json, f->answer));
    if (lists) read_dialogue(&list, where, json, asked, answer);
    else read_prompt(&list, where, json, f);
    r = row_of_dialogue(t, where, list);
    free_dialogue(list);
    return r;
}

// Whether a file's name ends so, or so and with .gz.
static int ends_with(const char *name, const char *end)
{
    size_t n = strlen(name), m = strlen(end);
    if (n > 3 && !strcmp(name + n - 3, ".gz")) n -= 3;
    return n >= m && !strncmp(name + n - m, end, m);
}

// A row as long as --seq allows; one without a token left to learn is dropped. Both are counted and said.
static void keep_row(dataset *d, row r, int seq)
{
    if (!r.ids) { d->empty++; return; }
    if (r.n > seq) r.n = seq, d->cut++;
    if (arrlen(d->rows)) free(r.asked), r.asked = NULL;
    if (r.n > r.prompt) { arrput(d->rows, r); return; }
    d->dropped++;
    free_row(&r);
}

// A .txt file is one stream of tokens, cut into windows.
static void read_text(dataset *d, const tokenizer *t, const char *text, int seq)
{
    row all = encode_row(t, "", text, 0);
    for (int i = 0; i + 1 < all.n; i += seq) {
        row r = {.n = all.n - i < seq ? all.n - i : seq, .prompt = 1};
        r.ids = alloc((size_t)r.n, sizeof(int));
        memcpy(r.ids, all.ids + i, (size_t)r.n * sizeof(int));
        arrput(d->rows, r);
    }
    free(all.ids);
}

// The rows of a file, one by one: the elements of an array, or the lines. Its first character says which.
typedef struct {
    json_reader json;
    int array, lines, number;           // lines: one object a line; number: of the element, or of the line
    const char *counted, *end;          // lines are counted up to here; the end of the file
    char where[PATH_MAX + 32];          // the row, for messages
} row_reader;

static row_reader read_json_rows(const char *path, const char *text, size_t bytes)
{
    const char *end = text + bytes;
    row_reader r = {.counted = text, .end = end};
    r.json = (json_reader){.path = path, .text = text, .at = text, .end = end};
    json_skip(&r.json);
    r.array = json_next_is(&r.json, '[');
    r.lines = ends_with(path, ".jsonl");
    if (r.array) r.json.at++;
    else r.number = 1;
    return r;
}

// One row; j->at is then behind it.
static json_t *read_value(json_reader *j)
{
    const char *start = j->at;
    json_t *json = json_read(j, AS_DOUBLES | JSON_DISABLE_EOF_CHECK | JSON_DECODE_ANY);
    if (json_is_object(json)) numbers_as_text(json, start);
    return json;
}

// The next element of an array. j->at stands behind its [ at first, later behind the element before.
static json_t *next_element(row_reader *r)
{
    json_reader *j = &r->json;
    json_skip(j);
    if (json_next_is(j, ']')) {
        j->at++, json_skip(j);
        if (j->at < j->end) json_wrong(j, "more text behind the array");
        return NULL;
    }
    if (r->number && !json_next_is(j, ',')) json_wrong(j, "expected , or ] behind a row");
    if (r->number++) j->at++;
    json_skip(j);
    return read_value(j);
}

// The next line that is not blank.
static json_t *next_line(row_reader *r)
{
    json_reader *j = &r->json;
    j->end = r->end;
    json_skip(j);
    for (; r->counted < j->at; r->counted++) r->number += *r->counted == '\n';
    if (j->at == r->end) return NULL;
    const char *newline = r->lines ? memchr(j->at, '\n', json_left(j)) : NULL;      // a .json may hold one object on many lines
    if (newline) j->end = newline;
    json_t *json = read_value(j);
    newline = memchr(j->at, '\n', json_left(j));                // the next object begins a line of its own
    if (newline) j->end = newline;
    json_skip(j);
    if (j->at < j->end) json_wrong(j, "more text behind the object; expected one object a line");
    return json;
}

static json_t *next_row(row_reader *r)
{
    json_t *json = r->array ? next_element(r) : next_line(r);
    snprintf(r->where, sizeof r->where, r->array ? "%s, row %d" : "%s:%d", r->json.path, r->number);
    return json;
}

// The text of a file of rows, without the mark that some editors put in front of UTF-8. *whole is for free().
static const char *read_utf8(const char *path, char **whole, size_t *bytes)
{
    *whole = unpacked(path, read_file(path, bytes), bytes);
    expect_utf8(path, *whole, *bytes);
    int mark = *bytes >= 3 && !memcmp(*whole, "\xef\xbb\xbf", 3) ? 3 : 0;
    *bytes -= (size_t)mark;
    return *whole + mark;
}

static dataset read_rows(const tokenizer *t, const char *path, int seq)
{
    dataset d = {.path = path};
    size_t bytes;
    char *whole;
    const char *text = read_utf8(path, &whole, &bytes);
    int json = ends_with(path, ".jsonl") || ends_with(path, ".json");
    row_reader r = read_json_rows(path, text, bytes);
    if (!json && !ends_with(path, ".txt"))
        die("%s: expected a .jsonl, .json or .txt file, or one of them with .gz", path);
    if (!json) read_text(&d, t, text, seq);
    for (json_t *object; json && (object = next_row(&r)); json_decref(object))
        keep_row(&d, read_row(t, r.where, object), seq);
    free(whole);
    if (!bytes) die("%s: is empty, expected rows", path);
    if (!arrlen(d.rows))
        die("%s: no row has a token to learn within --seq %d%s", path, seq,
            d.dropped ? "; a larger --seq keeps them" : "");
    return d;
}

static void free_rows(dataset *d)
{
    for (int i = 0; i < arrlen(d->rows); i++) free_row(&d->rows[i]);
    arrfree(d->rows);
}

static batch batch_new(int tokens, int rows)
{
    size_t n = (size_t)tokens, ints = sizeof(int);
    return (batch){
        .ids = alloc(n, ints),
        .pos = alloc(n, ints),
        .target_row = alloc(n, ints),
        .label = alloc(n, ints),
        .spans = alloc((size_t)rows, sizeof(span)),
    };
}

static void batch_free(batch *b)
{
    free(b->ids);
    free(b->pos);
    free(b->target_row);
    free(b->label);
    free(b->spans);
}

static void batch_clear(batch *b) { b->tokens = b->targets = b->rows = 0; }

// Appends a row: token i predicts token i + 1, so the last one is never fed.
static void batch_add(batch *b, const row *r)
{
    b->spans[b->rows++] = (span){b->tokens, r->n - 1, b->tokens, r->n - 1};
    for (int i = 0; i + 1 < r->n; i++) {
        b->ids[b->tokens] = r->ids[i], b->pos[b->tokens] = i;
        if (is_learnt(r, i + 1)) b->target_row[b->targets] = b->tokens, b->label[b->targets++] = r->ids[i + 1];
        b->tokens++;
    }
}

// The order of rows in an epoch depends on seed and epoch alone, so that a resumed run finds its place.
static void shuffle(int *order, int n, uint64_t seed, int epoch)
{
    rng r = rng_named(seed + (uint64_t)epoch, "rows");
    for (int i = 0; i < n; i++) order[i] = i;
    for (int i = n - 1; i > 0; i--) {
        int j = (int)(rng_next(&r) % (uint64_t)(i + 1)), swap = order[i];
        order[i] = order[j], order[j] = swap;
    }
}

static int longest_prompt(const dataset *d)
{
    int n = 0;
    for (int i = 0; i < arrlen(d->rows); i++) if (d->rows[i].prompt > n) n = d->rows[i].prompt;
    return n;
}

static int has_answers(const dataset *d)
{
    for (int i = 0; i < arrlen(d->rows); i++) if (!d->rows[i].answer) return 0;
    return arrlen(d->rows) > 0;
}

static int longest_row(const dataset *d)
{
    int n = 0;
    for (int i = 0; i < arrlen(d->rows); i++) if (d->rows[i].n > n) n = d->rows[i].n;
    return n;
}

// A tokenizer may know tokens that its model has no row for ([PAD], added but never resized for). Rows that
// hold one cannot be fed.
static void check_ids(const dataset *d, int vocab)
{
    for (int i = 0; i < arrlen(d->rows); i++)
        for (int j = 0; j < d->rows[i].n; j++)
            if (d->rows[i].ids[j] >= vocab)
                die("%s: a row holds token %d of the tokenizer's files, but config.json says vocab_size %d",
                    d->path, d->rows[i].ids[j], vocab);
}

static void print_rows(const char *label, const dataset *d)
{
    char *path = printable(d->path, "");
    printf("%-10s %s: %td row%s", label, path, arrlen(d->rows), arrlen(d->rows) == 1 ? "" : "s");
    free(path);
    if (d->cut) printf(", %d cut to --seq %d", d->cut, opt.seq);
    if (d->dropped) printf(", %d left out: --seq %d leaves nothing of their answer", d->dropped, opt.seq);
    if (d->empty) printf(", %d left out: their answer is empty", d->empty);
    putchar('\n');
}

static char *decode(const tokenizer *t, const int *ids, int n)
{
    size_t bytes;
    char *text = tokenizer_decode(t, ids, (size_t)n, &bytes);
    if (!text) die("out of memory while decoding");
    return text;
}

// The text of tokens from … to-1 of a row as it stands behind those before, special tokens spelled out.
// Decoding leaves these out.
static char *spelled_out(const tokenizer *t, const int *ids, int from, int to)
{
    char *before = decode(t, ids, from), *text = copy_text("");
    size_t said = strlen(before), bytes;
    free(before);
    for (int i = from; i < to; i++) {
        const char *name = tokenizer_added(t, ids[i], &bytes);
        if (!name && i + 1 < to) continue;
        char *behind = decode(t, ids, i + 1);
        size_t n = strlen(behind);
        if (name) {                                             // what stands in front of it is said first
            char *front = decode(t, ids, i);
            size_t m = strlen(front);
            if (m > said) add_text(&text, front + said, m - said), said = m;
            if (n == m) add_text(&text, name, bytes);
            free(front);
        }
        if (n > said) add_text(&text, behind + said, n - said), said = n;
        free(behind);
    }
    return text;
}

// A text on one line, of which a long one loses its middle.
static void print_shortened(const char *label, const char *text)
{
    enum { HALF = 100 };
    char *line = copy_text("");
    for (const char *c = text; *c; c++) add_text(&line, *c == '\n' ? "\\n" : c, *c == '\n' ? 2 : 1);
    size_t n = strlen(line), head = n, tail = n;
    if (n > 2 * HALF + 10) {
        for (head = HALF; (line[head] & 0xc0) == 0x80;) head--;
        for (tail = n - HALF; (line[tail] & 0xc0) == 0x80;) tail++;
    }
    char *whole = text_of("%.*s%s%s", (int)head, line, tail > head ? " … " : "", line + tail);
    char *safe = printable(whole, "");
    printf("%s%s\n", label, safe);
    free(line);
    free(whole);
    free(safe);
}

// What reaches the model of the first row: what is not learnt and what is, by turns.
static void print_first_row(const tokenizer *t, const dataset *d)
{
    enum { STRETCHES = 6 };
    const row *r = &d->rows[0];
    if (r->asked) printf("template   %s\n", chat.is->name);
    printf("first row  ");
    for (int from = 0, to, shown = 0; from < r->n; from = to, shown++) {
        int learnt = is_learnt(r, from);
        for (to = from; to < r->n && is_learnt(r, to) == learnt;) to++;
        if (shown) printf("           ");
        if (shown == STRETCHES) to = r->n, puts("…");
        if (shown == STRETCHES) break;
        char *text = spelled_out(t, r->ids, from, to);
        print_shortened(learnt ? "learnt:      " : "not learnt:  ", text);
        free(text);
    }
}

// ---- when is an answer right? -----------------------------------------------------------------------------

// What counts as the answer: the line behind the first "####" (GSM8K) or else "The answer is:" (MetaMathQA),
// so that what a model goes on to say does not count; all of a text without either. In a fresh string, with a
// mark's number in *mark.
static char *final_answer(const char *text, int *mark)
{
    static const char *const marks[] = {"####", "The answer is:"};
    size_t n = strlen(text);
    *mark = 0;
    for (int i = 0; i < 2 && !*mark; i++) {
        const char *at = strstr(text, marks[i]);
        if (at) text = at + strlen(marks[i]), n = strcspn(text, "\n"), *mark = i + 1;
    }
    while (n && strchr(" \t\r\n$", *text)) text++, n--;
    while (n && strchr(" \t\r\n$.", text[n - 1])) n--;
    return copy_bytes(text, n);
}

// How long a number stands at the text's beginning, 0 if none does: digits with a point at most, and with
// commas only where they part thousands. 1,234.5 is one; 1,2 and 18.5.3 are none.
static size_t number_length(const char *text)
{
    const char *at = text + strspn(text, "0123456789");
    if (at > text && at <= text + 3 && *text != '0')
        while (*at == ',' && strspn(at + 1, "0123456789") == 3) at += 4;
    if (*at == '.') at += 1 + strspn(at + 1, "0123456789");
    size_t n = (size_t)(at - text);
    return n == 1 && *text == '.' ? 0 : n;
}

// The number that the text begins with, written so that equal numbers are equal strings: no commas, no zeros
// that say nothing. NULL if there is none, or if it goes on as something else: 3/4, 2x, 10:30, 2023-05-01.
// *rest is what stands behind it. Strings, because 12345678901234567890 and …891 are the same double.
static char *leading_number(const char *text, const char **rest)
{
    const char *digits = text + (*text == '-' || *text == '+');
    size_t run = strspn(digits, "0123456789.,"), n = number_length(digits);
    *rest = digits + run;
    while (run && strchr(".,", digits[run - 1])) run--;         // the sentence's, not the number's
    if (n && digits[n - 1] == '.') n--;
    unsigned char next = (unsigned char)**rest;
    int joined = next && strchr("+-*=:_", next) && isdigit((unsigned char)(*rest)[1]);
    int goes_on = next && (isalpha(next) || strchr("/\\^", next) || joined);
    if (!n || n != run || goes_on) return NULL;

    char *number = alloc(n + 3, 1), *end = number;
    const char *last = digits + n;
    while (digits < last && strchr("0,", *digits)) digits++;
    if (digits == last || *digits == '.') *end++ = '0';
    for (; digits < last; digits++) if (*digits != ',') *end++ = *digits;
    if (strchr(number, '.')) {
        while (end[-1] == '0') *--end = 0;
        if (end[-1] == '.') *--end = 0;
    }
    if (*text == '-' && strcmp(number, "0")) {
        memmove(number + 1, number, (size_t)(end - number) + 1);
        *number = '-';
    }
    return number;
}

// Is the model's answer the right one? A number is compared as a number: 42 is 42.0, and behind a mark it may
// have a unit, "42 apples". Marks and numbers are those of
//   GSM8K       github.com/openai/grade-school-math, dataset.py: "#### " and -?[0-9.,]+, commas left out
//   MetaMathQA  github.com/meta-math/MetaMath, eval_gsm8k.py: "The answer is: " and [-+]?\d*[.,/]?\d+
// but what either would read as another number is none here. An empty answer is never right.
static int same_answer(const char *given, const char *right)
{
    int mark, right_mark;
    const char *rest, *right_rest;
    char *a = final_answer(given, &mark), *b = final_answer(right, &right_mark);
    char *x = leading_number(a, &rest), *y = leading_number(b, &right_rest);
    int numbers = x && y && !*right_rest && (mark || !*rest);
    int same = *a && !mark == !right_mark && (numbers ? !strcmp(x, y) : !strcmp(a, b));
    free(a), free(b), free(x), free(y);
    return same;
}

#endif
