//  run/generate.h: text from a model, many sequences at a time, with a cache of keys and values.

#ifndef GENERATE_H
#define GENERATE_H
#include "rows.h"

typedef struct {
    int *ids, n, room;          // n tokens so far, with space for `room`
    int cached;                 // the first so many are in the cache of keys and values
    int ended, done;            // its last token ends the answer; it ended, or there is no more room
} sequence;

// The likeliest token, or with --temperature one at random from the likeliest ones whose probabilities
// together reach --top-p.
typedef struct { double p; int id; } candidate;
static int likelier(const void *a, const void *b)
{
    const candidate *x = a, *y = b;
    return x->p > y->p ? -1 : x->p < y->p ? 1 : x->id - y->id;
}

static int pick(const wide *logits, int vocab, rng *g)
{
    int best = 0;
    for (int i = 1; i < vocab; i++) if (logits[i] > logits[best]) best = i;
    if (opt.temperature == 0) return best;
    candidate *c = alloc((size_t)vocab, sizeof *c);
    double sum = 0, reached = 0;
    for (int i = 0; i < vocab; i++) {
        c[i] = (candidate){exp((double)(logits[i] - logits[best]) / opt.temperature), i};
        sum += c[i].p;
    }
    // Only what --top-p needs is sorted, which would else take longer than a small model: the tokens of at
    // most `least` reach no more than 1 - top_p together.
    double least = (1 - opt.top_p) * sum / vocab;
    int n = 0, likely = 0;
    for (int i = 0; i < vocab; i++) if (c[i].p > least) c[likely++] = c[i];
    if (opt.top_p < 1) qsort(c, (size_t)likely, sizeof *c, likelier);
    while (n < likely && reached < opt.top_p * sum) reached += c[n++].p;
    double at = rng_uniform(g) * reached;
    int i = 0;
    while (i + 1 < n && (at -= c[i].p) >= 0) i++;
    int id = c[i].id;
    free(c);
    return id;
}

// Generation stops at EOS, at the template's end of an answer, and at every eos_token_id of config.json and
// generation_config.json.
static int ends_answer(const model *m, const tokenizer *t, int id)
{
    int stop = id == tokenizer_eos(t) || id == chat.end;
    for (int i = 0; i < m->c.stops; i++) stop |= id == m->c.stop[i];
    return stop;
}

// One pass: every live sequence that fits feeds the tokens its cache lacks, and gets one more. Returns how
// many. The sequences share the cache evenly, or have a state each.
static int generate_pass(model *m, const tokenizer *t, sequence *s, int count, batch *b, int *who, rng *g)
{
    batch_clear(b);
    b->cached = 1;
    for (int i = 0; i < count; i++) {
        int n = s[i].n - s[i].cached;
        if (s[i].done || b->tokens + n > m->p.tokens) continue;
        who[b->rows] = i;
        int at = m->c.backbone->has_state ? i : i * (m->p.cache_rows / count);
        b->spans[b->rows++] = (span){b->tokens, n, at, s[i].n};
        for (int j = s[i].cached; j < s[i].n; j++) b->ids[b->tokens] = s[i].ids[j], b->pos[b->tokens++] = j;
        b->target_row[b->targets] = b->tokens - 1, b->label[b->targets++] = 0;
    }
    if (!b->rows) return 0;
    model_forward(m, b);
    wide *logits = alloc((size_t)m->chunk * (size_t)m->c.vocab, sizeof *logits);
    for (int i = 0; i < b->rows; i++) {
        sequence *q = &s[who[i]];
        if (i % m->chunk == 0) {
            head_forward(m, i, b->rows - i < m->chunk ? b->rows - i : m->chunk);
            get(logits, m->logits);
        }
        const wide *mine = logits + (size_t)(i % m->chunk) * (size_t)m->c.vocab;
        if (!isfinite(largest(mine, (size_t)m->c.vocab))) {
            blame_tensor(m);
            die("the logits are not finite, though all weights are: the model's numbers grow too large");
        }
        int id = pick(mine, m->c.vocab, g);
        q->cached = q->n;
        q->ids[q->n++] = id;
        q->ended = ends_answer(m, t, id);
        q->done = q->ended || q->n == q->room;
    }
    free(logits);
    return b->rows;
}

enum { MOST_SEQUENCES = 64, SCORED = 200 };     // answered at once; rows scored while training

typedef struct { int hits, cut; } scores;       // answers that match; answers that --max-new cut off

// A row's prompt in a slot of its own: the next pass feeds it.
static void begin_answer(sequence *s, const row *r)
{
    int room = r->prompt + opt.max_new;
    *s = (sequence){.ids = alloc((size_t)room, sizeof(int)), .n = r->prompt, .room = room};
    memcpy(s->ids, r->ids, (size_t)r->prompt * sizeof(int));
}

// Counts a complete answer; returns its text and leaves the slot empty.
static char *score_answer(scores *got, const tokenizer *t, sequence *s, const row *r)
{
    char *text = decode(t, s->ids + r->prompt, s->n - r->prompt);
    got->hits += same_answer(text, r->answer);
    got->cut += !s->ended;
    free(s->ids);
    s->ids = NULL;
    return text;
}

// The first `rows` prompts of d, answered a few at a time: as many as the plan has slots. *sample gets the
// first one's text, on rank 0. The ranks take turns with the rows.
static scores exact_match(model *m, const tokenizer *t, const dataset *d, int rows, char **sample,
                          void (*progress)(int, int))
{
    int mine = ceil_div(rows - this_rank(), ranks()), next = this_rank(), done = 0;
    int slots = mine < m->p.sequences ? mine : m->p.sequences;
    sequence *s = alloc((size_t)slots, sizeof *s);
    int *who = alloc((size_t)slots, sizeof *who), *answers = alloc((size_t)slots, sizeof *answers);
    batch b = batch_new(m->p.tokens, slots);
    scores got = {0};
    rng g = {0};
    for (int i = 0; i < slots; i++, next += ranks()) begin_answer(&s[i], &d->rows[answers[i] = next]);
    while (generate_pass(m, t, s, slots, &b, who, &g))
        for (int i = 0; i < slots; i++) {       // an answer that is complete makes room for the next row's
            if (!s[i].done || !s[i].ids) continue;
            char *text = score_answer(&got, t, &s[i], &d->rows[answers[i]]);
            if (answers[i] == 0 && sample) *sample = text;
            else free(text);
            if (next < rows) begin_answer(&s[i], &d->rows[answers[i] = next]), next += ranks();
            progress(++done, mine);
        }
    double counts[] = {got.hits, got.cut};
    ranks_add(counts, 2);
    got = (scores){(int)counts[0], (int)counts[1]};
    if (sample && this_rank()) *sample = copy_text("");
    batch_free(&b);
    free(s);
    free(who);
    free(answers);
    return got;
}

// Prints what the ids say beyond what was printed before. A character that still lacks bytes decodes to
// U+FFFD: it waits.
static void print_more(const tokenizer *t, const int *ids, int n, int last, size_t *printed)
{
    char *text = decode(t, ids, n);
    size_t length = strlen(text);
    while (!last && length >= 3 && !memcmp(text + length - 3, "\xef\xbf\xbd", 3)) length -= 3;
    text[length] = 0;
    char *safe = length > *printed && isatty(STDOUT_FILENO) ? printable(text + *printed, "\n\t") : NULL;
    if (length > *printed) fputs(safe ? safe : text + *printed, stdout), *printed = length;
    fflush(stdout);
    free(safe), free(text);
}

#endif
