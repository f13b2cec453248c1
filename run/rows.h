//  run/rows.h: rows of a file as tokens, micro-batches of rows, and when an answer is right.

#ifndef ROWS_H
#define ROWS_H
#include <ctype.h>
#include "options.h"
#include "special_tokens.h"

typedef struct {
    int *ids, n;                // BOS, prompt, answer, EOS
    int prompt;                 // the first so many are not learnt: BOS and the prompt
    char *answer;               // what scoring compares with, NULL for plain text
} row;

typedef struct { row *rows; const char *path; int cut, dropped, empty; } dataset;

static const char prompt_format[] =
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n%s\n\n### Response:";

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

static char *format_prompt(const char *question, const char *input)
{
    size_t n = sizeof prompt_format + strlen(question) + (input ? strlen(input) : 0) + 2;
    char *both = alloc(n, 1), *prompt = alloc(n, 1);
    snprintf(both, n, "%s%s%s", question, input && *input ? "\n" : "", input ? input : "");
    snprintf(prompt, n, prompt_format, both);
    free(both);
    return prompt;
}

// BOS (where the model has one) + prompt + answer (+ EOS) as ids. The prompt's are those that generation
// begins with, whatever follows; the answer continues them, and every token that holds a character of it is
// learnt. Were both one text to the tokenizer, a piece such as ":-" could hide an answer's first character in
// the prompt.
static row encode_row(const tokenizer *t, const char *prompt, const char *answer, int eos)
{
    size_t np, na;
    int *ids = tokenizer_encode(t, prompt, strlen(prompt), 1, &np);
    int *more = tokenizer_encode(t, answer, strlen(answer), !*prompt, &na);
    if (!ids || !more) die("out of memory while tokenising");
    row r = {.ids = alloc(np + na + 2, sizeof(int))};
    if (tokenizer_bos(t) >= 0) r.ids[r.n++] = tokenizer_bos(t);
    memcpy(r.ids + r.n, ids, np * sizeof(int));
    r.n += (int)np;
    r.prompt = r.n;
    memcpy(r.ids + r.n, more, na * sizeof(int));
    r.n += (int)na;
    if (eos) r.ids[r.n++] = tokenizer_eos(t);
    free(ids);
    free(more);
    return r;
}

// One object in any of the four shapes. What is wrong with it is said with file and line, or with its number
// in an array. A row whose answer or text is empty has nothing to learn: it comes back without ids.
static row read_row(const tokenizer *t, const char *where, const json_t *json)
{
    static const char *const shapes[][2] = {
        {"instruction", "output"}, {"query", "response"}, {"question", "answer"},
    };
    if (!json_is_object(json)) die("%s: expected a JSON object, e.g. {\"question\": …, \"answer\": …}", where);
    row r = {0};
    for (int i = 0; i < 3; i++) {
        const char *question = text_field(where, json, shapes[i][0]);
        const char *answer = text_field(where, json, shapes[i][1]);
        if (!question && !answer) continue;
        if (!question || !answer)
            die("%s: has \"%s\" but no text in \"%s\"", where, shapes[i][!question], shapes[i][!!question]);
        if (!*question) die("%s: \"%s\" is empty", where, shapes[i][0]);
        if (!answer[strspn(answer, " \t\r\n")]) return r;
        char *prompt = format_prompt(question, i == 0 ? text_field(where, json, "input") : NULL);
        r = encode_row(t, prompt, answer, 1);
        r.answer = copy_text(answer);
        free(prompt);
        return r;
    }
    const char *text = text_field(where, json, "text");
    if (!text)
        die("%s: no \"instruction\"/\"output\", \"query\"/\"response\", \"question\"/\"answer\" "
            "or \"text\" here", where);
    if (*text) r = encode_row(t, "", text, !!opt.init);      // --init: where a text ends must be learnt, too
    if (r.prompt < 1) r.prompt = 1;                             // nothing predicts the first token
    return r;
}

static int ends_with(const char *s, const char *end)
{
    size_t n = strlen(s), m = strlen(end);
    return n >= m && !strcmp(s + n - m, end);
}

// A row as long as --seq allows; one without a token left to learn is dropped. Both are counted and said.
static void keep_row(dataset *d, row r, int seq)
{
    if (!r.ids) { d->empty++; return; }
    if (r.n > seq) r.n = seq, d->cut++;
    if (r.n > r.prompt) { arrput(d->rows, r); return; }
    d->dropped++;
    free(r.ids), free(r.answer);
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
    *whole = read_file(path, bytes);
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
    if (!json && !ends_with(path, ".txt")) die("%s: expected a .jsonl, .json or .txt file", path);
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
    for (int i = 0; i < arrlen(d->rows); i++) free(d->rows[i].ids), free(d->rows[i].answer);
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
        if (i + 1 >= r->prompt) b->target_row[b->targets] = b->tokens, b->label[b->targets++] = r->ids[i + 1];
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
    printf("%-10s %s: %td rows", label, path, arrlen(d->rows));
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
