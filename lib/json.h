//  lib/json.h: JSON, read strictly.

#ifndef JSON_H
#define JSON_H
#include <jansson.h>
#include "../ops/host.h"
#include <stb/stb_ds.h>

/* Jansson reads JSON as RFC 8259 has it. It refuses what lenient readers let pass: broken escapes, half a
   surrogate pair, control characters, bytes that are not UTF-8, equal keys, NaN. Whole numbers are read as
   doubles: many a tokenizer_config.json holds 1000000000000000019884624838656. A safetensors header is read
   AS_INTEGERS, since 8 and 8.0 differ there.                                                              */
enum { AS_DOUBLES = JSON_DECODE_INT_AS_REAL, AS_INTEGERS = 0 };

static void *checked_malloc(size_t bytes) { return alloc(bytes, 1); }

__attribute__((constructor))
static void json_use_checked_malloc(void) { json_set_alloc_funcs(checked_malloc, free); }

typedef struct {
    const char *path, *text;    // the file, and its text
    const char *at, *end;       // how far it is read; where to stop
} json_reader;

__attribute__((noreturn))
static void json_wrong(const json_reader *r, const char *what)
{
    size_t byte;
    int line = line_of(r->text, r->at, &byte);
    die("%s:%d: not valid JSON, at byte %zu of the line: %s", r->path, line, byte, what);
}

static size_t json_left(const json_reader *r) { return (size_t)(r->end - r->at); }
static int json_next_is(const json_reader *r, char c) { return r->at < r->end && *r->at == c; }
static void json_skip(json_reader *r) { while (r->at < r->end && memchr(" \t\r\n", *r->at, 4)) r->at++; }

// The JSON value in front, for json_decref(); r->at is then behind it. If Jansson stops, the last byte that
// it has read is wrong, or ends what is wrong.
static json_t *json_read(json_reader *r, size_t flags)
{
    json_error_t e;
    json_t *json = json_loadb(r->at, json_left(r), flags | JSON_REJECT_DUPLICATES, &e);
    r->at += e.position;
    if (json) return json;
    int python = strstr(e.text, "'NaN'") || strstr(e.text, "'Infinity'") || json_next_is(r, 'I');
    if (json_error_code(&e) != json_error_premature_end_of_input) r->at--;
    json_wrong(r, python ? "NaN or Infinity, which only Python writes; null is JSON" : e.text);
}

// One JSON object and nothing behind it: what every file but rows holds.
static json_t *parse_object(const char *path, const char *text, size_t bytes, size_t flags)
{
    json_reader r = {path, text, text, text + bytes};
    expect_utf8(path, text, bytes);
    json_t *json = json_read(&r, flags);
    if (!json_is_object(json)) die("%s: expected a JSON object { … }", path);
    return json;
}

static json_t *parse_json(const char *path, const char *text, size_t bytes)
{
    return parse_object(path, text, bytes, AS_DOUBLES);
}

// A JSON file of the model directory, NULL where there is none; *path is its name.
static json_t *directory_json(const char *dir, const char *name, char **path)
{
    size_t bytes;
    *path = join(dir, name);
    if (!exists(*path)) return NULL;
    char *text = read_file(*path, &bytes);
    json_t *json = parse_json(*path, text, bytes);
    free(text);
    return json;
}

static const char *string_field(const json_t *json, const char *name)
{
    return json_string_value(json_object_get(json, name));
}

static int field_true(const json_t *json, const char *name)
{
    return json_is_true(json_object_get(json, name));
}

static int field_false(const json_t *json, const char *name)
{
    return json_is_false(json_object_get(json, name));
}

static const char *string_end(const char *quote)         // of a text that begins at this quote: its last one
{
    const char *at = quote + 1;
    while (*at != '"') at += *at == '\\' ? 2 : 1;
    return at;
}

// How an object spells its values, in a text that has been read without fault: the next one stands behind
// the next colon that is in no text and no inner object. `at` is behind the { or at the value before.
static const char *next_value(const char *at)
{
    for (int depth = 0; depth || *at != ':'; at++) {
        if (*at == '"') at = string_end(at);
        depth += *at == '{' || *at == '[';
        depth -= *at == '}' || *at == ']';
    }
    return at + 1 + strspn(at + 1, " \t\r\n");
}

// A text, or a name of a file, which may hold any byte: one that is not UTF-8 is written as \xe9.
static json_t *text_value(const char *text)
{
    json_t *json = json_string(text);
    char *shown = json ? NULL : printable(text, "");
    if (shown) json = json_string(shown);
    if (!json) die("out of memory");
    free(shown);
    return json;
}

static json_t *number_value(double x)
{
    return x == floor(x) && fabs(x) < 1e15 ? json_integer((json_int_t)x) : json_real(x);
}

static void set_field(json_t *json, const char *name, json_t *value)
{
    if (json_object_set_new(json, name, value)) die("\"%s\": cannot be written as JSON", name);
}

// A value as JSON, in a fresh string. A number has 15 digits where these read back as the same, else 17.
static char *json_text(const json_t *value)
{
    char digits[32];
    double x = json_number_value(value);
    snprintf(digits, sizeof digits, "%.15g", x);
    size_t precision = strtod(digits, NULL) == x ? 15 : 17;
    char *text = json_dumps(value, JSON_ENCODE_ANY | JSON_REAL_PRECISION(precision));
    if (!text) die("out of memory");
    return text;
}

#endif
