//  run/dialogue.h: a row, and how a prompt and its answer, or a dialogue of several turns, become one.

#ifndef DIALOGUE_H
#define DIALOGUE_H
#include "templates.h"

typedef struct {
    int *ids, n;                // BOS, prompt, answer, EOS; in a dialogue more of them
    int prompt;                 // the first so many are not learnt: BOS and the prompt
    char *answer;               // the first one, which scoring compares with; NULL for plain text
    char *learnt;               // a byte a token: is it learnt? NULL: all behind the prompt are
    char *asked;                // what the user says first; the first row of a file keeps it
} row;

// What one turn of a dialogue says. Of the assistant's turns those that are learnt.
typedef struct { enum role role; char *text; int learnt; } message;

static int is_learnt(const row *r, int i) { return i >= r->prompt && (!r->learnt || r->learnt[i]); }

static int learnt_tokens(const row *r)
{
    int n = 0;
    for (int i = r->prompt; i < r->n; i++) n += is_learnt(r, i);
    return n;
}

static void free_row(row *r)
{
    free(r->ids);
    free(r->answer);
    free(r->learnt);
    free(r->asked);
}

// Ids of a text, fresh.
static int *ids_of(const tokenizer *t, const char *text, int begins, size_t *n)
{
    size_t bytes = strlen(text);
    int *ids = tokenizer_encode(t, text, bytes, begins, n);
    if (!ids) die("cannot cut %zu bytes of text into tokens: %s", bytes,
                  bytes > 700000000 ? "it takes 700 MB at most, split it"
                  : "out of memory, or the tokenizer's regular expressions need more steps than PCRE2 allows");
    return ids;
}

// BOS (where the model has one) + prompt + answer (+ EOS) as ids. The prompt's are those that generation
// begins with, whatever follows; the answer continues them, and every token that holds a character of it is
// learnt. Were both one text to the tokenizer, a piece such as ":-" could hide an answer's first character in
// the prompt.
static row encode_row(const tokenizer *t, const char *prompt, const char *answer, int eos)
{
    size_t np, na;
    int *ids = ids_of(t, prompt, 1, &np);
    int *more = ids_of(t, answer, !*prompt, &na);
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

static void say(message **list, enum role role, char *text, int learnt)
{
    message m = {role, text, learnt};
    arrput(*list, m);
}

static void free_dialogue(message *list)
{
    for (int i = 0; i < arrlen(list); i++) free(list[i].text);
    arrfree(list);
}

static int last_answer(const message *list)                 // its place, -1 where there is none
{
    int i = (int)arrlen(list) - 1;
    while (i >= 0 && list[i].role != ASSISTANT) i--;
    return i;
}

static int first_answer_learnt(const message *list)
{
    int i = 0;
    while (i < arrlen(list) && !(list[i].role == ASSISTANT && list[i].learnt)) i++;
    return i;
}

static int is_blank(const char *text) { return !text[strspn(text, " \t\r\n")]; }

// Stops where a dialogue has no answer, or where the template has no place for one of its turns.
static void expect_written(const char *where, const message *list)
{
    static const char *const names[] = {"system", "user", "assistant"};
    int system = arrlen(list) && list[0].role == SYSTEM;
    for (int i = system; i < arrlen(list); i++) {
        enum role role = list[i].role, due = (i - system) % 2 ? ASSISTANT : USER;
        if (role == SYSTEM && chat.is->place != ANYWHERE)
            die("%s: turn %d is the system's; --template %s has a place for it in front only",
                where, i + 1, chat.is->name);
        if (role != due && within_a_turn(chat.is))
            die("%s: turn %d is the %s's and the %s's is due: with --template %s they alternate",
                where, i + 1, names[role], names[due], chat.is->name);
        if (chat.is->thought && role == ASSISTANT && list[i].text && strstr(list[i].text, "</think>"))
            die("%s: turn %d has thoughts in it, which --template %s leaves out; --template chatml learns "
                "them, too", where, i + 1, chat.is->name);
    }
    if (last_answer(list) < 0) die("%s: no turn is the assistant's, so there is nothing to learn", where);
}

// Appends a text's tokens to a row.
static void add_tokens(row *r, const tokenizer *t, const char *text, int begins, int learnt)
{
    size_t n;
    int *ids = ids_of(t, text, begins, &n);
    r->ids = resize(r->ids, ((size_t)r->n + n) * sizeof(int));
    r->learnt = resize(r->learnt, (size_t)r->n + n);
    memcpy(r->ids + r->n, ids, n * sizeof(int));
    memset(r->learnt + r->n, learnt, n);
    r->n += (int)n;
    free(ids);
}

static void add_token_id(row *r, int id, int learnt)
{
    r->ids = resize(r->ids, ((size_t)r->n + 1) * sizeof(int));
    r->learnt = resize(r->learnt, (size_t)r->n + 1);
    r->ids[r->n] = id;
    r->learnt[r->n++] = (char)learnt;
}

// Appends a turn in the template's words. `lead` stands in front of what is said.
static void add_turn(char **text, enum role role, const char *lead, const char *said)
{
    const char *const pieces[] = {chat.is->system, chat.is->user, chat.is->answer};
    char *whole = text_of("%s%s", lead, said);
    char *bare = chat.is->trimmed & BIT(role) ? trimmed(whole) : NULL;
    add_piece(text, pieces[role], bare ? bare : whole);
    free(whole);
    free(bare);
}

// What stands in front of the first turn. Where the system's text belongs within a user's, it becomes *lead.
static void begin_dialogue(row *r, const tokenizer *t, const message *first, char **text, char **lead)
{
    const char *system = first->role == SYSTEM ? first->text : chat.is->default_system;
    if (chat.is->start) add_piece(text, chat.is->start, "");
    else if (tokenizer_bos(t) >= 0) add_token_id(r, tokenizer_bos(t), 0);
    if (system) add_turn(within_a_turn(chat.is) ? lead : text, SYSTEM, "", system);
}

// Where learning begins; and of a row that is learnt from there to its end no more than that is kept.
static void note_learnt(row *r)
{
    while (r->prompt < r->n && !r->learnt[r->prompt]) r->prompt++;
    if (r->prompt < 1) r->prompt = 1;                           // nothing predicts the first token
    if (learnt_tokens(r) < r->n - r->prompt) return;
    free(r->learnt);
    r->learnt = NULL;
}

/* A dialogue as tokens, to the end of its last answer. It is encoded in stretches: all that stands in front of
   an answer, the answer, all that stands in front of the next one. So the tokens in front of an answer are
   those that generation begins with, whatever the answer is. The token that ends an answer is encoded with the
   stretch behind it, whose spaces depend on it, and learnt with the answer. Where the last answer has no text
   yet, the tokens in front of it come back.                                                                 */
static row encode_dialogue(const tokenizer *t, const message *list)
{
    row r = {0};
    char *text = copy_text(""), *lead = copy_text("");
    int last = last_answer(list), led = chat.is->place == WITHIN_LAST ? last - 1 : list->role == SYSTEM;
    int end = chat.end >= 0 ? chat.end : tokenizer_eos(t), end_learnt = 0, begins = 1;
    begin_dialogue(&r, t, list, &text, &lead);
    for (int i = list->role == SYSTEM; i <= last; i++) {
        const message *m = &list[i];
        if (m->role != ASSISTANT) {
            add_turn(&text, m->role, i == led ? lead : "", m->text);
            continue;
        }
        add_piece(&text, chat.is->before, "");
        if (i == last && chat.is->thought) add_piece(&text, chat.is->thought, "");
        int from = r.n;
        add_tokens(&r, t, text, begins, 0);
        if (end_learnt && r.n > from) r.learnt[from] = 1;
        begins = begins && !*text;
        *text = 0;
        if (!m->text) break;
        add_turn(&text, ASSISTANT, "", m->text);
        add_tokens(&r, t, text, begins, m->learnt);
        *text = 0;
        end_learnt = m->learnt && chat.is->end;
        if (i < last && chat.is->end) add_piece(&text, chat.is->end, "");
        else add_token_id(&r, end, m->learnt);
        add_piece(&text, chat.is->after, "");
    }
    free(text);
    free(lead);
    note_learnt(&r);
    return r;
}

// The tokens that generation begins with, so that the assistant answers these turns.
static row encode_question(const tokenizer *t, const message *turns)
{
    message *list = NULL;
    for (int i = 0; i < arrlen(turns); i++) arrput(list, turns[i]);
    say(&list, ASSISTANT, NULL, 1);
    row r = encode_dialogue(t, list);
    r.prompt = r.n;
    free(r.learnt);
    r.learnt = NULL;
    arrfree(list);
    return r;
}

#endif
