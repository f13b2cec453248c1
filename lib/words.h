/*  lib/words.h: a text cut into words by regular expressions, and Unicode's NFC: the pre-tokenizer and the
    normaliser of a tokenizer.json. The expressions are PCRE2's to search, Unicode is utf8proc's to know.   */

#ifndef WORDS_H
#define WORDS_H
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

typedef struct { const char *p; size_t n; } slice;      // n bytes inside a file or a text; no NUL behind them

#define SLICE(literal) ((slice){literal, sizeof(literal) - 1})

static slice skip(slice s, size_t n)
{
    return (slice){s.p + n, s.n - n};
}

static char *append(char *out, slice s)                         // returns the end
{
    memcpy(out, s.p, s.n);
    return out + s.n;
}

// ---- cutting ----------------------------------------------------------------------------------------------

// The text is cut in front of each match of a regular expression and behind it. Of the parts, the matches are
// kept or dropped, and so is the rest between them.
typedef struct {
    const char *regex;
    bool literal;               // the "regular expression" is a text
    bool keep_matches, keep_rest;
} cut_rule;

typedef struct { pcre2_code *code; cut_rule is; } cut;

#define WHITE_SPACE "\\t-\\r\\x{85}\\p{Z}"              // Unicode's White_Space, inside of [ ]

// How many bytes the escape at a backslash has, if PCRE2 reads it as Oniguruma does: \r, \n, \t, an escaped
// sign, \p{L}, \P{Lu}. 0 if not: \w and \d are Unicode's in one and ASCII's in the other, \h is a space in
// one and a hexadecimal digit in the other, \p{Han} means Script here and Script_Extensions there.
static size_t escape_length(const char *at)
{
    unsigned char c = (unsigned char)at[1];
    if (c == 'p' || c == 'P') {
        size_t n = strcspn(at, "}");
        return at[2] == '{' && at[n] && (n == 4 || n == 5) && at[3] >= 'A' && at[3] <= 'Z' ? n + 1 : 0;
    }
    if (c && strchr("rnt", c)) return 2;
    return c > ' ' && c < 0x7f && !strchr("0123456789", c) && !((c | 32) >= 'a' && (c | 32) <= 'z') ? 2 : 0;
}

// The groups that both read alike: (…), (?:…), (?i:…), and what must or must not stand there.
static bool group_is_known(const char *at)
{
    static const char *const known[] = {"(?:", "(?i:", "(?=", "(?!", "(?<=", "(?<!", "(?>"};
    if (at[1] != '?') return at[1] != '*';
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strncmp(at, known[i], strlen(known[i]))) return true;
    return false;
}

/* Hugging Face's tokenizers searches with Oniguruma. This writes one of its expressions as PCRE2 reads it,
   into out, which has room for 40 bytes a byte: \s and \S are written out, since PCRE2 takes U+180E for a
   space. False at anything that the two do not read alike.                                                */
static bool spell_for_pcre2(const char *regex, char *out)
{
    bool in_class = false;
    for (const char *at = regex; *at;) {
        size_t n = 1;
        if (at[0] == '\\' && (at[1] == 's' || at[1] == 'S')) {
            if (in_class && at[1] == 'S') return false;
            const char *form = in_class ? "%s" : at[1] == 's' ? "[%s]" : "[^%s]";
            out += sprintf(out, form, WHITE_SPACE);
            at += 2;
            continue;
        }
        if (*at == '\\') n = escape_length(at);
        else if (in_class) {
            if (*at == '[' || (at[0] == '&' && at[1] == '&')) return false;     // a class inside a class
            in_class = *at != ']';
        } else if (*at == '[') {
            in_class = true;
            n = at[1] == '^' ? 2 : 1;
            if (at[n] == ']') return false;
        } else if (*at == '(' && !group_is_known(at)) return false;
        else if ((at[0] == '{' && at[1] == ',') || (at[0] == '}' && at[1] == '+')) return false;
        if (!n) return false;
        out = append(out, (slice){at, n});
        at += n;
    }
    *out = 0;
    return !in_class;
}

// Compiles the rule. Says what is wrong with it, or NULL.
static const char *cut_compile(cut *c, cut_rule rule)
{
    char *spelled = malloc(40 * strlen(rule.regex) + 1);
    pcre2_compile_context *lines = pcre2_compile_context_create(NULL);
    const char *problem = NULL;
    uint32_t matches_nothing = 0;
    int error;
    size_t at;
    if (!spelled || !lines) problem = "out of memory";
    else if (rule.literal) strcpy(spelled, rule.regex);
    else if (!spell_for_pcre2(rule.regex, spelled)) problem = "has a part that is not built";
    if (!problem) {
        pcre2_set_newline(lines, PCRE2_NEWLINE_LF);
        uint32_t options = PCRE2_UTF | PCRE2_NO_UTF_CHECK | (rule.literal ? PCRE2_LITERAL : PCRE2_MULTILINE);
        c->is = rule;
        c->code = pcre2_compile((PCRE2_SPTR)spelled, PCRE2_ZERO_TERMINATED, options, &error, &at, lines);
        if (!c->code && error == PCRE2_ERROR_HEAP_FAILED) problem = "out of memory";
        else if (!c->code) problem = "is not one that PCRE2 reads";
        else if (pcre2_pattern_info(c->code, PCRE2_INFO_MATCHEMPTY, &matches_nothing) || matches_nothing)
            problem = "matches the empty text, which cuts nothing";
        else pcre2_jit_compile(c->code, PCRE2_JIT_COMPLETE);       // where it cannot, pcre2_match interprets
    }
    pcre2_compile_context_free(lines);
    free(spelled);
    return problem;
}

// Finds the first match at text[from] or behind it, and where it stands: start … end-1; both are text.n if
// there is none. False if PCRE2 runs out of memory. The text is UTF-8.
static bool cut_next(const cut *c, pcre2_match_data *found, slice text, size_t from,
                     size_t *start, size_t *end)
{
    int n = pcre2_match(c->code, (PCRE2_SPTR)text.p, text.n, from, PCRE2_NO_UTF_CHECK, found, NULL);
    const size_t *where = pcre2_get_ovector_pointer(found);
    *start = n < 0 ? text.n : where[0];
    *end = n < 0 ? text.n : where[1];
    return n >= 0 || n == PCRE2_ERROR_NOMATCH;
}

// ---- NFC --------------------------------------------------------------------------------------------------

static int class_of(utf8proc_int32_t code)
{
    return utf8proc_get_property(code)->combining_class;
}

// Puts marks on one letter into the order of their combining classes; those of one class stay in theirs. A
// walk a class, of which Unicode has some fifty. utf8proc's own sort exchanges neighbours: n² for n marks.
static void sort_marks(utf8proc_int32_t *marks, size_t n, utf8proc_int32_t *room)
{
    size_t sorted = 0;
    for (int class = 0, next; sorted < n; class = next) {
        next = 256;
        for (size_t i = 0; i < n; i++) {
            int other = class_of(marks[i]);
            if (other > class && other < next) next = other;
        }
        for (size_t i = 0; i < n; i++) if (class_of(marks[i]) == next) room[sorted++] = marks[i];
    }
    memcpy(marks, room, n * sizeof *marks);
}

// A text in NFC, appended to *out, which has room for it. Its characters are taken apart (é is e and ´), the
// marks sorted, and what belongs together put together again. False if out of memory.
static bool nfc_of_run(slice text, char **out)
{
    enum { MOST = 4 };                                  // characters that one is taken apart into
    size_t most = MOST * (text.n / 2 + 1);              // all but the first character have two bytes or more
    utf8proc_int32_t *codes = malloc((2 * most + 1) * sizeof *codes);
    utf8proc_int32_t *room = codes + most, code;
    utf8proc_ssize_t used, n = 0, marks;
    int boundary = 0;
    if (!codes) return false;
    for (; text.n; text = skip(text, (size_t)used)) {
        used = utf8proc_iterate((const utf8proc_uint8_t *)text.p, (utf8proc_ssize_t)text.n, &code);
        n += utf8proc_decompose_char(code, codes + n, MOST, UTF8PROC_COMPOSE | UTF8PROC_STABLE, &boundary);
    }
    for (utf8proc_ssize_t i = 0; i < n; i += marks + 1) {
        for (marks = 0; i + marks < n && class_of(codes[i + marks]); ) marks++;
        if (marks > 1) sort_marks(codes + i, (size_t)marks, room);
    }
    n = utf8proc_reencode(codes, n, UTF8PROC_COMPOSE | UTF8PROC_STABLE);
    *out = append(*out, (slice){(char *)codes, (size_t)n});
    free(codes);
    return true;
}

// Characters below U+0300, which begin with a byte below 0xcc, are NFC already and never join what stands in
// front of them. Only the runs of others are looked at, each with the character in front of it.
static bool is_low(char byte) { return (unsigned char)byte < 0xcc; }

// The text in NFC, in fresh memory, NULL if out of memory. The text is UTF-8. No character grows more than
// threefold.
static char *nfc(slice text, size_t *bytes)
{
    char *fresh = malloc(3 * text.n + 1), *out = fresh;
    size_t low = 0, end;
    while (fresh && text.n) {
        for (low = 0; low < text.n && is_low(text.p[low]); ) low++;
        for (end = low; end < text.n && (!is_low(text.p[end]) || (text.p[end] & 0xc0) == 0x80); ) end++;
        if (low < end && low) do low--; while ((text.p[low] & 0xc0) == 0x80);
        out = append(out, (slice){text.p, low});
        if (low < end && !nfc_of_run((slice){text.p + low, end - low}, &out)) {
            free(fresh);
            return NULL;
        }
        text = skip(text, end);
    }
    *bytes = (size_t)(out - fresh);
    return fresh;
}

// ---- kinds of characters ----------------------------------------------------------------------------------

// The number of the character that begins at text[at], or that ends there; -1 where there is none.
static int code_behind(slice text, size_t at)
{
    utf8proc_int32_t code;
    slice rest = skip(text, at);
    utf8proc_iterate((const utf8proc_uint8_t *)rest.p, (utf8proc_ssize_t)rest.n, &code);
    return rest.n ? code : -1;
}

static size_t length_before(slice text, size_t at)              // bytes of the one that ends there
{
    size_t start = at;
    while (start && at - start < 4) if ((text.p[--start] & 0xc0) != 0x80) break;
    return at - start;
}

static int code_before(slice text, size_t at)
{
    size_t n = length_before(text, at);
    return code_behind((slice){text.p + at - n, n}, 0);
}

// Unicode's White_Space: line ends, the next line, and every kind of space.
static bool is_space(int code)
{
    if ((code >= '\t' && code <= '\r') || code == 0x85) return true;
    utf8proc_category_t kind = utf8proc_category(code);
    return kind == UTF8PROC_CATEGORY_ZS || kind == UTF8PROC_CATEGORY_ZL || kind == UTF8PROC_CATEGORY_ZP;
}

// Part of a word: letters, the marks on them, digits, _ and its like, and letters in circles and squares, which
// Unicode counts among the signs, but as alphabetic.
static bool is_word(int code)
{
    utf8proc_category_t kind = utf8proc_category(code);
    bool letter_or_mark = kind >= UTF8PROC_CATEGORY_LU && kind <= UTF8PROC_CATEGORY_ME;
    bool digit = kind == UTF8PROC_CATEGORY_ND || kind == UTF8PROC_CATEGORY_NL;
    bool joiner = code == 0x200c || code == 0x200d;
    bool square = (code >= 0x1f130 && code <= 0x1f149) || (code >= 0x1f150 && code <= 0x1f169);
    bool circled = (code >= 0x24b6 && code <= 0x24e9) || square || (code >= 0x1f170 && code <= 0x1f189);
    return letter_or_mark || digit || joiner || circled || kind == UTF8PROC_CATEGORY_PC;
}

#endif
