//  lib/json.h: JSON, read strictly.

#ifndef JSON_H
#define JSON_H
#include <cjson/cJSON.h>
#include <stb/stb_ds.h>
#include "../ops/host.h"

/* A strict pass in front of cJSON, which reads broken escapes, lone surrogates, control characters and keys that occur
   twice without a word, and numbers of 63 digits at most. The pass finds where a value ends, stops at what is wrong in
   it, and notes where keys and numbers stand. NaN, Infinity and -Infinity, which Python writes, do no harm in a field
   that nobody reads.                                                                                              */
typedef struct { const char *at; size_t n; } place;
typedef struct {
    const char *path, *text;    // the file, and its text, which is UTF-8
    const char *at, *end;       // how far it is read; where to stop
    int finite, depth;          // finite: NaN and its like are refused
    place *places;              // of every key (n is 0) and number of the value, in their order
} json_reader;

__attribute__((noreturn, format(printf, 2, 3)))
static void json_wrong(const json_reader *r, const char *format, ...)
{
    char what[120];
    size_t byte;
    int line = line_of(r->text, r->at, &byte);
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    die("%s:%d: not valid JSON, at byte %zu of the line: %s", r->path, line, byte, what);
}

static void json_expected(const json_reader *r, const char *what)
{
    json_wrong(r, "expected %s%s", what, r->at == r->end ? ", but it ends here" : "");
}

static size_t json_left(const json_reader *r) { return (size_t)(r->end - r->at); }
static int json_next_is(const json_reader *r, char c) { return r->at < r->end && *r->at == c; }
static void json_skip(json_reader *r) { while (r->at < r->end && memchr(" \t\r\n", *r->at, 4)) r->at++; }

static int json_word(json_reader *r, const char *word)
{
    size_t n = strlen(word);
    if (json_left(r) < n || memcmp(r->at, word, n)) return 0;
    r->at += n;
    return 1;
}

static int hex4(const char *p, const char *end)          // \u12ab is 0x12ab; -1 if it is not spelled so
{
    int code = 0;
    if (end - p < 6 || p[0] != '\\' || p[1] != 'u') return -1;
    for (int i = 2; i < 6; i++) {
        int letter = p[i] | 32, digit = -1;
        if (p[i] >= '0' && p[i] <= '9') digit = p[i] - '0';
        if (letter >= 'a' && letter <= 'f') digit = letter - 'a' + 10;
        if (digit < 0) return -1;
        code = 16 * code + digit;
    }
    return code;
}

static void json_escape(json_reader *r)
{
    int code = hex4(r->at, r->end), low = code < 0 ? -1 : hex4(r->at + 6, r->end);
    int letters = json_left(r) < 2 ? 1 : 2, short_one = letters == 2 && memchr("\"\\/bfnrt", r->at[1], 8);
    if (code < 0 && !short_one) json_wrong(r, "an invalid escape, %.*s", letters, r->at);
    if (code == 0) json_wrong(r, "\\u0000, a NUL, which no text holds");
    int pair = code >= 0xd800 && code < 0xdc00 && low >= 0xdc00 && low < 0xe000, half = code >= 0xd800 && code < 0xe000;
    if (half && !pair) json_wrong(r, "a lone surrogate, %.6s, half of a character", r->at);
    r->at += code < 0 ? 2 : pair ? 12 : 6;
}

static place json_string(json_reader *r)
{
    place p = {r->at, 0};
    for (r->at++; !json_next_is(r, '"');) {
        if (r->at == r->end) json_wrong(r, "it ends in the middle of a text");
        if ((unsigned char)*r->at < ' ') json_wrong(r, "a control character, 0x%02x; JSON has \\u%04x", *r->at, *r->at);
        if (*r->at == '\\') json_escape(r);
        else r->at++;
    }
    r->at++;
    return p;
}

static const char *digits_end(const char *p, const char *end)
{
    while (p < end && *p >= '0' && *p <= '9') p++;
    return p;
}

static void json_digits(json_reader *r)
{
    if (json_next_is(r, '-')) r->at++;
    const char *end = digits_end(r->at, r->end);
    if (end == r->at) json_expected(r, "a value");
    if (*r->at == '0' && end > r->at + 1) json_wrong(r, "a number with a leading zero");
    r->at = end;
    for (int exponent = 0; exponent < 2; exponent++) {
        if (!json_next_is(r, exponent ? 'e' : '.') && !(exponent && json_next_is(r, 'E'))) continue;
        r->at++;
        if (exponent && (json_next_is(r, '+') || json_next_is(r, '-'))) r->at++;
        if ((end = digits_end(r->at, r->end)) == r->at) json_wrong(r, "a number without its digits");
        r->at = end;
    }
}

static void json_number(json_reader *r)
{
    const char *start = r->at;
    int not_finite = json_word(r, "NaN") || json_word(r, "Infinity") || json_word(r, "-Infinity");
    if (not_finite && r->finite) json_wrong(r, "%.*s, which only Python writes", (int)(r->at - start), start);
    if (!not_finite) json_digits(r);
    arrput(r->places, ((place){start, (size_t)(r->at - start)}));
}

static void json_value(json_reader *r)
{
    json_skip(r);
    if (json_next_is(r, '"')) json_string(r);
    else if (!json_next_is(r, '{') && !json_next_is(r, '[')) {
        if (!json_word(r, "true") && !json_word(r, "false") && !json_word(r, "null")) json_number(r);
    } else {                                                    // { "key": value, … } or [ value, … ]
        int object = *r->at++ == '{', first = 1;
        if (++r->depth > 500) json_wrong(r, "nested deeper than 500 levels");
        for (; json_skip(r), !json_next_is(r, object ? '}' : ']'); first = 0) {
            if (!first && !json_next_is(r, ',')) json_expected(r, object ? ", or }" : ", or ]");
            if (!first) r->at++;
            json_skip(r);
            if (object && !json_next_is(r, '"')) json_expected(r, "a key in quotes");
            if (object) arrput(r->places, json_string(r));
            json_skip(r);
            if (object && !json_next_is(r, ':')) json_expected(r, ": behind a key");
            if (object) r->at++;
            json_value(r);
        }
        r->at++, r->depth--;
    }
}

// Gives numbers their value and, as valuestring, their spelling; NaN and its like become a cJSON_Raw, which no
// field takes. Stops at a key that occurs twice.
static void json_finish(json_reader *r, cJSON *item, const place **next)
{
    struct { char *key; int value; } *keys = NULL;
    cJSON *child;
    if (cJSON_IsNumber(item)) {
        place p = *(*next)++;
        if (!(item->valuestring = strndup(p.at, p.n))) die("out of memory");
        item->type = strchr("NI", p.at[*p.at == '-']) ? cJSON_Raw : cJSON_Number;
        cJSON_SetNumberHelper(item, strtod(item->valuestring, NULL));
    }
    cJSON_ArrayForEach(child, item) {
        if (cJSON_IsObject(item)) {
            r->at = (*next)++->at;
            if (shgeti(keys, child->string) >= 0) json_wrong(r, "\"%.60s\" occurs twice", child->string);
            shput(keys, child->string, 1);
        }
        json_finish(r, child, next);
    }
    shfree(keys);
}

// The JSON value in front, for cJSON_Delete; r->at is then behind it.
static cJSON *json_read(json_reader *r)
{
    r->depth = 0;
    if (r->places) arrsetlen(r->places, 0);
    json_skip(r);
    const char *start = r->at;
    json_value(r);
    const char *end = r->at;
    char *copy = strndup(start, (size_t)(end - start));
    if (!copy) die("out of memory");
    for (int i = 0; i < arrlen(r->places); i++) {               // cJSON finds a 0 for every number
        char *at = copy + (r->places[i].at - start);
        if (!r->places[i].n) continue;
        memset(at, ' ', r->places[i].n);
        *at = '0';
    }
    cJSON *json = cJSON_Parse(copy);
    const place *next = r->places;
    free(copy);
    if (!json) die("out of memory");
    json_finish(r, json, &next);
    r->at = end;
    return json;
}

// One JSON object and nothing behind it: what every file but rows holds.
static cJSON *parse_object(const char *path, const char *text, size_t bytes, int finite)
{
    json_reader r = {path, text, text, text + bytes, finite, 0, NULL};
    expect_utf8(path, text, bytes);
    cJSON *json = json_read(&r);
    json_skip(&r);
    if (r.at < r.end) json_wrong(&r, "more text behind the value");
    if (!cJSON_IsObject(json)) die("%s: expected a JSON object { … }", path);
    arrfree(r.places);
    return json;
}

static cJSON *parse_json(const char *path, const char *text, size_t bytes)
{
    return parse_object(path, text, bytes, 0);
}

static const char *string_field(const cJSON *json, const char *name)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(json, name);
    return cJSON_IsString(item) ? item->valuestring : NULL;
}

// A JSON file of the model directory, NULL where there is none; *path is its name.
static cJSON *directory_json(const char *dir, const char *name, char **path)
{
    size_t bytes;
    *path = join(dir, name);
    if (!exists(*path)) return NULL;
    char *text = read_file(*path, &bytes);
    cJSON *json = parse_json(*path, text, bytes);
    free(text);
    return json;
}

static int field_true(const cJSON *json, const char *name) { return cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(json, name)); }
static int field_false(const cJSON *json, const char *name) { return cJSON_IsFalse(cJSON_GetObjectItemCaseSensitive(json, name)); }

#endif
