/*  tokenizer.c: byte pair encoding, of SentencePiece's kind (Llama2, Mistral) and of GPT-2's (Llama 3, Qwen).
    Text to ids and back; no tensors.

    Read in this order:
      1  the contract           what the rest of the program calls
      2  slices and UTF-8
      3  protobuf               the few lines of it that tokenizer.model needs
      4  pieces by their text   a hash table
      5  loading SentencePiece  every kind of model that is not ours is refused by name
      6  loading merges         byte-level BPE, or SentencePiece's, out of a tokenizer.json
      7  loading words          RWKV's vocabulary, a line a word
      8  special tokens         "</s>" in a text is one id, and so is what a model directory adds
      9  normalising            SentencePiece's " a b" becomes "▁▁a▁b"
     10  merging                byte pair encoding, with a heap
     11  encoding and decoding

    BPE in five lines. At first every character is a symbol of its own. Take all adjacent pairs of symbols
    whose joined text is a piece of the vocabulary; join the pair whose piece has the highest score, the
    leftmost one on a tie; repeat until no pair is left. Each symbol is then a piece, and its number is the
    id. A character that is no piece becomes one id per byte. The score of a piece says how early the training
    merged it, so encoding repeats the merges of the training in their order.

    It follows SentencePiece (Kudo and Richardson 2018, arXiv 1808.06226), id for id and byte for byte.

    Byte-level BPE (Radford and others 2019) differs in three ways. Its first symbols are bytes, so no
    character is unknown. Its file lists the merges, and the earlier one goes first: a pair has a rank where
    SentencePiece's has a score. And a text is cut into words before, by regular expressions (lib/words.h),
    and no merge crosses words. It follows Hugging Face's tokenizers. doc/tokenizers.md shows both at work.

    RWKV's has no merges at all: from the left, the longest word of the vocabulary that the bytes begin with.
                                                                                                           */

#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include "lib/words.h"
#include "ops/utf8.h"

// ---- 1  the contract --------------------------------------------------------------------------------------

typedef struct tokenizer tokenizer;     // remembers words that it has encoded: for one thread at a time

// Reads tokenizer.model. NULL on an error, with one line in err: the path, what is wrong, what was expected,
// what to do.
tokenizer *tokenizer_load(const char *path, char *err, size_t err_size);
void tokenizer_free(tokenizer *t);                      // NULL is fine

// BPE as Hugging Face's files spell it: byte-level, where a token is written with a letter for each byte; or
// SentencePiece's pieces, with merges in place of scores.
typedef struct {
    bool byte_level;
    const char *const *tokens;          // (vocab) by id, NULL where no token has this id
    int vocab;
    const char *const (*merges)[2];     // (merge_count) the left token and the right one, in order of rank
    int merge_count;
    const cut_rule *cuts;               // (cut_count) each one cuts the words that those before it left
    int cut_count;
    bool nfc;                           // texts are brought into Unicode's NFC
    bool space_in_front;                // of a text, and of what follows a special token
    bool unless_space;                  // but of none that begins with one
    bool whole_words;                   // a word that is a token is that token, whatever the merges give
    int unknown;                        // the token of a byte that has none of its own; -1: it is left out
} bpe;
tokenizer *tokenizer_of_merges(const char *path, const bpe *b, char *err, size_t err_size);

// Reads RWKV's rwkv_vocab_v20230424.txt: a line is an id, a literal of Python's and how many bytes it has.
tokenizer *tokenizer_of_words(const char *path, char *err, size_t err_size);

int tokenizer_vocab(const tokenizer *t);            // how many pieces; ids are 0 … vocab-1
int tokenizer_bos(const tokenizer *t);              // id of the piece that begins a text, -1 if there is none
int tokenizer_eos(const tokenizer *t);              // id of the piece that ends it, -1 if there is none

// A model directory may bring tokens of its own (Hugging Face's tokenizer_config.json and its kin). Wherever
// the text of one stands in a text, encoding gives this id. lstrip and rstrip: the spaces before and behind
// it go with it. single_word: only where no letter stands beside it. normalized: it is sought in the text's
// NFC, and after those that are not (byte-level BPE only). special: decoding leaves it out. Of two with the
// same text the last counts. False if out of memory.
typedef struct {
    const char *text;
    int id;
    bool special, lstrip, rstrip, single_word, normalized;
} added_token;
bool tokenizer_add(tokenizer *t, added_token a);

// The same for <unk>, <s>, </s> and their like in tokenizer.model, which SentencePiece encodes as plain text.
bool tokenizer_add_own(tokenizer *t);

// Whether SentencePiece's ▁ goes in front of a text, and whether it goes in front of what follows a special
// token: always, unless a space stands there, or never. A tokenizer.model alone says 1, ALWAYS.
enum behind_special { ALWAYS, UNLESS_SPACE, NEVER };
void tokenizer_spaces(tokenizer *t, bool in_front, enum behind_special behind);
void tokenizer_ends(tokenizer *t, int bos, int eos);    // ids other than the file's own; -1: none is put

// The id of this piece or added token, -1 if there is none.
int tokenizer_find(const tokenizer *t, const char *text);

// The text of the added token with this id, without a NUL behind its *bytes bytes. NULL if there is none.
const char *tokenizer_added(const tokenizer *t, int id, size_t *bytes);

// Text to ids, without BOS and EOS. The text may hold NUL bytes; each byte that is not UTF-8 is read as
// U+FFFD. begins: the text begins a sequence. If not, it continues one, and no space of its own is put in
// front. Returns malloc'ed memory and its length in *n (an empty text has none), NULL if out of memory, over
// 700 MB of text, or where a regular expression takes more steps than PCRE2 allows.
int *tokenizer_encode(const tokenizer *t, const char *text, size_t bytes, bool begins, size_t *n);

// Ids to text, malloc'ed, with a NUL behind its *bytes bytes; NULL if out of memory. Control pieces vanish,
// the space that encoding puts in front is dropped, bytes that are not UTF-8 become U+FFFD. An id that does
// not exist is skipped.
char *tokenizer_decode(const tokenizer *t, const int *ids, size_t n, size_t *bytes);

// ---- 2  slices and UTF-8 ----------------------------------------------------------------------------------

// A slice is n bytes inside a file or a text, with no NUL behind them (lib/words.h).
#define SPACE          SLICE("\xe2\x96\x81")            // ▁ (U+2581) stands for a space inside pieces
#define REPLACEMENT    SLICE("\xef\xbf\xbd")            // U+FFFD stands for a byte that is not UTF-8

static bool starts_with(slice s, slice start)
{
    return s.n >= start.n && !memcmp(s.p, start.p, start.n);
}

static size_t character(slice s)                        // bytes of the one in front, 0 if it is not UTF-8
{
    return utf8_length(s.p, s.n);
}

// ---- 3  protobuf ------------------------------------------------------------------------------------------

/* A message is a run of fields. A field is a key (number · 8 + wire type) and a value, and the wire type says
   how long the value is, so fields that nobody knows can be skipped. A varint has 7 bits per byte, lowest
   first, and the top bit set on all bytes but the last.                                                   */
enum { VARINT = 0, FIXED64 = 1, BYTES = 2, FIXED32 = 5 };
#define KEY(number, wire) ((number) << 3 | (wire))

typedef struct {
    uint64_t key;
    uint64_t number;            // the value of a VARINT
    slice data;                 // the value of every other wire type
} field;

// Takes a varint off the front of `in`. False if it is longer than `most` bytes or than what is left.
// Protobuf reads at most 10 bytes of a number, 5 of a key or a length.
static bool read_varint(slice *in, size_t most, uint64_t *value)
{
    *value = 0;
    for (size_t i = 0; i < in->n && i < most; i++) {
        *value |= (uint64_t)(in->p[i] & 0x7f) << 7 * i;
        if (in->p[i] & 0x80) continue;
        *in = skip(*in, i + 1);
        return true;
    }
    return false;
}

// Takes the next field off the message. False at the end, and at a damaged field, which stays in the message.
static bool next_field(slice *message, field *f)
{
    slice in = *message;
    uint64_t length = 0;
    if (!read_varint(&in, 5, &f->key) || f->key >> 3 == 0 || f->key > UINT32_MAX) return false;
    switch (f->key & 7) {
    case VARINT:  if (!read_varint(&in, 10, &f->number)) return false; break;
    case BYTES:   if (!read_varint(&in, 5, &length)) return false; break;
    case FIXED64: length = 8; break;
    case FIXED32: length = 4; break;
    default:      return false;
    }
    if (length > in.n) return false;
    f->data = (slice){in.p, (size_t)length};
    *message = skip(in, (size_t)length);
    return true;
}

static float float_of(slice little_endian)
{
    uint32_t bits = 0;
    float value;
    for (size_t i = 0; i < 4; i++) bits |= (uint32_t)(unsigned char)little_endian.p[i] << 8 * i;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// ---- 4  pieces by their text ------------------------------------------------------------------------------

enum { NORMAL = 1, UNKNOWN, CONTROL, USER, UNUSED, BYTE };      // types of a piece, as in the file
enum { UNIGRAM = 1, BPE, WORD, CHARACTER };                     // kinds of a model, as in the file

typedef struct { slice text; float score; int type; } piece;
typedef struct { uint32_t hash; int id; } slot;                 // id + 1, so that 0 says empty
typedef struct {
    slice text;                                                 // in memory of its own
    int id;
    bool special, lstrip, rstrip, single_word, normalized;
} added;

// Two tokens that join to the token `id`, where a file lists its merges. The one of lowest rank goes first;
// rank 0 says that the slot is empty.
typedef struct { int left, right, id, rank; } merge;

// Words come again and again, and the same word has the same ids. So words are kept with their ids, each in
// the one place of a table that its hash names; a newcomer takes the place. Long words are rare and not kept.
enum { KNOWN_WORDS = 1 << 14, KNOWN_BYTES = 30, KNOWN_IDS = 8 };
typedef struct { unsigned char bytes, count; char text[KNOWN_BYTES]; int ids[KNOWN_IDS]; } known;

struct tokenizer {
    char *file;                 // the whole file, or the tokens' bytes; the pieces point into it
    size_t file_bytes;
    piece *pieces;              // (vocab)
    int vocab;

    // what the file says about itself
    int kind, bos, eos;
    slice unknown;              // how UNKNOWN is spelled in decoded text
    bool byte_fallback, spaces_behind, has_normaliser, maps_characters;
    bool space_in_front, trim_spaces, escape_spaces;

    // made from the pieces
    slot *slots;                // hash table of the pieces that match text: all but UNKNOWN, CONTROL, BYTE
    size_t last_slot;           // the number of slots, a power of two, minus 1
    known *known;               // (KNOWN_WORDS)
    int byte_id[256];           // id of <0x00> … <0xFF>, -1 if there is none
    size_t longest_user[256];   // bytes of the longest USER piece that starts with this byte
    bool joins_space[256];      // does a piece have ▁ right behind this byte?
    bool has_unused;

    // of a file that lists its merges
    bool byte_level, nfc, whole_words, lacks_bytes, unless_space;
    merge *merges;              // hash table of the pairs that join; NULL where pieces have scores
    size_t last_merge;          // the number of slots, a power of two, minus 1
    cut *cuts;
    int cut_count;

    size_t longest_word;        // RWKV's: the longest piece that the text begins with is the next; else 0

    added *added;               // special tokens, of the file and of the model directory
    size_t added_count;
    bool starts_added[256];     // does one of them start with this byte?
    enum behind_special behind;
};

/* Why no table of stb_ds: it wants a NUL behind every key, and a piece inside a text has none behind it; and
   it does not check its allocations. The hash of bytes c is a number with them as its digits, modulo 2⁶⁴:

       hash = Σ_i (c_i + 1) B^(n−1−i),      so of two texts in a row it is   left B^(right's length) + right

   Hashing a text gives the hashes of all its prefixes on the way, and a pair of symbols is looked up by what
   is known of each.                                                                                       */
#define HASH_BASE 0xff51afd7ed558ccdu

static uint64_t hash_byte(uint64_t hash, char byte)
{
    return hash * HASH_BASE + (unsigned char)byte + 1;
}

static uint64_t hash_of(slice text)
{
    uint64_t hash = 0;
    for (size_t i = 0; i < text.n; i++) hash = hash_byte(hash, text.p[i]);
    return hash;
}

// Where a hash, or a key, begins in a table of last + 1 places, a power of two.
static size_t place_of(uint64_t hash, size_t last) { return hash * 0x9e3779b97f4a7c15u >> 32 & last; }

// The slot of this text, or the empty slot where it would go. At most half of the slots are in use.
static slot *find_slot(const tokenizer *t, slice text, uint64_t hash)
{
    for (size_t i = place_of(hash, t->last_slot);; i = (i + 1) & t->last_slot) {
        slot *s = t->slots + i;
        if (!s->id) return s;
        if (s->hash != (uint32_t)hash) continue;            // its piece lies elsewhere: read last
        slice other = t->pieces[s->id - 1].text;
        if (other.n == text.n && !memcmp(other.p, text.p, text.n)) return s;
    }
}

static int find_piece(const tokenizer *t, slice text)           // its id, -1 if there is none
{
    return find_slot(t, text, hash_of(text))->id - 1;
}

// Bytes of the longest USER piece that the text starts with, 0 if there is none.
static size_t user_length(const tokenizer *t, slice text)
{
    size_t most = t->longest_user[(unsigned char)text.p[0]];
    size_t found = 0;
    uint64_t hash = 0;
    for (size_t n = 1; n <= most && n <= text.n; n++) {
        hash = hash_byte(hash, text.p[n - 1]);
        int id = find_slot(t, (slice){text.p, n}, hash)->id - 1;
        if (id >= 0 && t->pieces[id].type == USER) found = n;
    }
    return found;
}

static int byte_of(slice s)                                     // "<0x0A>" is 10; -1 if it is not spelled so
{
    static const char digits[] = "0123456789ABCDEF";
    if (s.n != 6 || memcmp(s.p, "<0x", 3) || s.p[5] != '>') return -1;
    const char *high = memchr(digits, s.p[3], 16), *low = memchr(digits, s.p[4], 16);
    return high && low ? (int)((high - digits) * 16 + (low - digits)) : -1;
}

// ---- 5  loading SentencePiece -----------------------------------------------------------------------------

typedef struct { const char *path; char *text; size_t size; } report;      // where an error is told

__attribute__((format(printf, 2, 3)))
static bool wrong(const report *r, const char *format, ...)     // always false
{
    va_list args;
    va_start(args, format);
    int n = snprintf(r->text, r->size, "%s: ", r->path);
    if (n >= 0 && (size_t)n < r->size) vsnprintf(r->text + n, r->size - (size_t)n, format, args);
    va_end(args);
    return false;
}

// The whole file into t->file. What cannot be a tokenizer.model is refused before its bytes are read.
static bool read_file(tokenizer *t, const report *r)
{
    struct stat st;
    int special = !stat(r->path, &st) && !S_ISREG(st.st_mode);
    FILE *f = fopen(special ? "/dev/null" : r->path, "rb");     // a named pipe would wait for its writer
    if (!f)
        return wrong(r, "%s. Expected the directory's tokenizer.model or tokenizer.json: copy it there",
                     strerror(errno));
    const char *problem = NULL;
    if (fstat(fileno(f), &st) || !S_ISREG(st.st_mode))
        problem = "is not a regular file. Expected a tokenizer.model: copy it there";
    else if (st.st_size > INT_MAX)
        problem = "is over 2 GB. Expected a protobuf, which is never that large: download it again";
    else if (!(t->file = malloc((size_t)st.st_size + 1)))
        problem = "out of memory";
    else if ((t->file_bytes = fread(t->file, 1, (size_t)st.st_size, f)) != (size_t)st.st_size)
        problem = "cannot be read to its end: copy it there again";
    fclose(f);
    return !problem || wrong(r, "%s", problem);
}

// A message SentencePiece: one piece. This function and the next two skip fields that they have no case for,
// and return false if the message is damaged.
static bool read_piece(piece *p, slice message)
{
    *p = (piece){.type = NORMAL};
    for (field f; next_field(&message, &f);)
        switch (f.key) {
        case KEY(1, BYTES):   p->text = f.data; break;
        case KEY(2, FIXED32): p->score = float_of(f.data); break;
        case KEY(3, VARINT):  p->type = (int)f.number; break;
        }
    return message.n == 0;
}

// A message TrainerSpec: how the model was trained.
static bool read_trainer(tokenizer *t, slice message)
{
    for (field f; next_field(&message, &f);)
        switch (f.key) {
        case KEY(3, VARINT):  t->kind = (int)f.number; break;
        case KEY(24, VARINT): t->spaces_behind = f.number; break;
        case KEY(35, VARINT): t->byte_fallback = f.number; break;
        case KEY(41, VARINT): t->bos = (int)f.number; break;
        case KEY(42, VARINT): t->eos = (int)f.number; break;
        case KEY(44, BYTES):  t->unknown = f.data; break;
        }
    return message.n == 0;
}

// A message NormalizerSpec: what happens to a text before it is cut into pieces.
static bool read_normaliser(tokenizer *t, slice message)
{
    t->has_normaliser = true;
    for (field f; next_field(&message, &f);)
        switch (f.key) {
        case KEY(2, BYTES):  t->maps_characters |= f.data.n > 0; break;
        case KEY(3, VARINT): t->space_in_front = f.number; break;
        case KEY(4, VARINT): t->trim_spaces = f.number; break;
        case KEY(5, VARINT): t->escape_spaces = f.number; break;
        }
    return message.n == 0;
}

// Reads every field of the file. Walked once to count the pieces, once to read them.
static bool read_model(tokenizer *t, const report *r)
{
    const slice file = {t->file, t->file_bytes};
    slice rest = file;
    size_t count = 0;
    for (field f; next_field(&rest, &f);) count += f.key == KEY(1, BYTES);
    if (file.n && file.p[0] == '{')
        return wrong(r, "is JSON. Expected the binary tokenizer.model, not tokenizer.json: "
                        "copy that one there");
    if (starts_with(file, SLICE("version https://git-lfs")))
        return wrong(r, "is a git-lfs pointer, not the file itself. "
                        "In its folder: git lfs install && git lfs pull");
    if (rest.n)
        return wrong(r, "is not a SentencePiece model, or is cut short (at byte %zu of %zu). "
                        "Expected a protobuf, not a web page or a git-lfs pointer: download it again",
                     file.n - rest.n, file.n);
    if (count < 1 || count > 10000000)
        return wrong(r, "has %zu pieces. Expected 1 to 10000000: download it again", count);
    if (!(t->pieces = calloc(count, sizeof *t->pieces)))
        return wrong(r, "out of memory: it has %zu pieces", count);
    rest = file;
    for (field f; next_field(&rest, &f);) {
        bool ok = true;
        switch (f.key) {
        case KEY(1, BYTES): ok = read_piece(t->pieces + t->vocab++, f.data); break;
        case KEY(2, BYTES): ok = read_trainer(t, f.data); break;
        case KEY(3, BYTES): ok = read_normaliser(t, f.data); break;
        case KEY(5, BYTES): t->maps_characters |= f.data.n > 0; break;    // a normaliser for decoded text
        }
        if (!ok)
            return wrong(r, "is damaged before byte %zu. Expected a SentencePiece model: download it again",
                         file.n - rest.n);
    }
    return true;
}

// Refuses every kind of SentencePiece model that is not encoded as Llama2's.
static bool check_kind(const tokenizer *t, const report *r)
{
    const struct { bool refused; const char *what, *to_do; } kinds[] = {
        {t->kind == UNIGRAM,   "is a unigram model",
                               "train it with --model_type=bpe"},
        {t->kind == WORD,      "is a word model",
                               "train it with --model_type=bpe"},
        {t->kind == CHARACTER, "is a character model",
                               "train it with --model_type=bpe"},
        {t->kind != BPE,       "does not say that it is BPE",
                               "download it again, it may be cut short"},
        {!t->has_normaliser,   "does not say how it treats spaces",
                               "download it again, it may be cut short"},
        {!t->byte_fallback,    "has no bytes for unknown characters",
                               "train it with --byte_fallback=true"},
        {t->spaces_behind,     "puts spaces behind words",
                               "train it with --treat_whitespace_as_suffix=false"},
        {t->maps_characters,   "maps characters before or after (NFKC?)",
                               "train it with --normalization_rule_name=identity"},
    };
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (kinds[i].refused)
            return wrong(r, "%s. Expected SentencePiece BPE with byte fallback and the identity normaliser, "
                            "as Llama2's: %s", kinds[i].what, kinds[i].to_do);
    return true;
}

// Adds a piece to the hash table. False if its text is there already.
static bool add_text(tokenizer *t, int id)
{
    slice text = t->pieces[id].text;
    uint64_t hash = hash_of(text);
    slot *s = find_slot(t, text, hash);
    if (s->id) return false;
    *s = (slot){(uint32_t)hash, id + 1};
    return true;
}

// Notes in joins_space, longest_user and has_unused what encoding wants to know of a piece that matches text.
static void note_text(tokenizer *t, const piece *p)
{
    for (size_t i = 1; i < p->text.n; i++)
        if (starts_with(skip(p->text, i), SPACE)) t->joins_space[(unsigned char)p->text.p[i - 1]] = true;
    size_t *longest = t->longest_user + (unsigned char)p->text.p[0];
    if (p->type == USER && p->text.n > *longest) *longest = p->text.n;
    t->has_unused |= p->type == UNUSED;
}

static bool matches_text(const piece *p) { return p->type == NORMAL || p->type == USER || p->type == UNUSED; }

// Checks a piece, and notes which of the 256 bytes it is. Says what is wrong with it, or NULL.
static const char *check_piece(tokenizer *t, int id)
{
    const piece *p = t->pieces + id;
    if (!p->text.n || p->text.n >= 8000) return "is empty, or longer than SentencePiece allows";
    if (memchr(p->text.p, 0, p->text.n)) return "holds NUL";
    for (size_t i = 0, n; i < p->text.n; i += n)
        if (!(n = character(skip(p->text, i)))) return "is not UTF-8";
    if (p->score != p->score) return "has a score that is not a number";
    if (p->type < NORMAL || p->type > BYTE) return "is of an unknown type";
    if (!add_text(t, id)) return "stands twice";
    for (int other = 0; p->type == UNKNOWN && other < id; other++)
        if (t->pieces[other].type == UNKNOWN) return "is a second piece for the unknown";
    if (p->type != BYTE) return NULL;
    int byte = byte_of(p->text);
    if (byte < 0) return "is a byte that is not spelled <0x00> to <0xFF>";
    t->byte_id[byte] = id;
    return NULL;
}

// The hash tables, empty. False if out of memory.
static bool make_slots(tokenizer *t)
{
    size_t slots = 2;
    while (slots < 2 * (size_t)t->vocab) slots *= 2;
    t->last_slot = slots - 1;
    t->slots = calloc(slots, sizeof *t->slots);
    t->known = calloc(KNOWN_WORDS, sizeof *t->known);
    return t->slots && t->known;
}

// Builds the hash table and byte_id from the pieces. At first the table has all of them, since no two may
// have the same text; then those that match text.
static bool index_pieces(tokenizer *t, const report *r)
{
    if (!make_slots(t)) return wrong(r, "out of memory: it has %d pieces", t->vocab);
    for (int b = 0; b < 256; b++) t->byte_id[b] = -1;
    for (int id = 0; id < t->vocab; id++) {
        const char *problem = check_piece(t, id);
        if (problem)
            return wrong(r, "piece %d %s. Expected SentencePiece's pieces: download it again", id, problem);
    }
    memset(t->slots, 0, (t->last_slot + 1) * sizeof *t->slots);
    for (int id = 0; id < t->vocab; id++) {
        if (!matches_text(t->pieces + id)) continue;
        add_text(t, id);
        note_text(t, t->pieces + id);
    }
    for (int b = 0; b < 256; b++)
        if (t->byte_id[b] < 0)
            return wrong(r, "has no piece <0x%02X>. Expected all 256 bytes: download it again", (unsigned)b);
    return true;
}

static int control_or_none(const tokenizer *t, int id)
{
    return id >= 0 && id < t->vocab && t->pieces[id].type == CONTROL ? id : -1;
}

// What the file does not say has SentencePiece's defaults.
tokenizer *tokenizer_load(const char *path, char *err, size_t err_size)
{
    const report r = {path, err, err_size};
    const tokenizer defaults = {
        .bos = 1,
        .eos = 2,
        .unknown = SLICE(" \xe2\x81\x87 "),                      // ⁇
        .space_in_front = true,
        .trim_spaces = true,
        .escape_spaces = true,
    };
    tokenizer *t = malloc(sizeof *t);
    if (!t) wrong(&r, "out of memory");
    else *t = defaults;
    if (t && read_file(t, &r) && read_model(t, &r) && check_kind(t, &r) && index_pieces(t, &r)) {
        t->bos = control_or_none(t, t->bos);
        t->eos = control_or_none(t, t->eos);
        return t;
    }
    tokenizer_free(t);
    return NULL;
}

// ---- 6  loading merges ------------------------------------------------------------------------------------

/* GPT-2 writes a token with one letter for each of its bytes, so that no file holds bytes that are no text.
   The bytes that print are written as the characters of their number, ! to ~, ¡ to ¬ and ® to ÿ; the other
   68, in their order, as U+0100 and on. So a space is Ġ and a line end is Ċ.                              */
static bool prints(int byte)
{
    return (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
}

// The byte that the letter in front of a token stands for, -1 if it stands for none.
static int byte_of_letter(slice token)
{
    int code = code_behind(token, 0);
    if (code < 0x100) return prints(code) ? code : -1;
    int i = code - 0x100;                               // of the 68: 0x00 … 0x20, 0x7f … 0xa0, 0xad
    return i < 33 ? i : i < 67 ? i - 33 + 0x7f : i == 67 ? 0xad : -1;
}

// Writes the bytes that a token stands for, and returns their end. A token with a letter that stands for no
// byte, as some special tokens have, is its own text; *plain says so.
static char *append_bytes(char *out, slice token, bool *plain)
{
    char *end = out;
    *plain = false;
    for (slice rest = token; rest.n; rest = skip(rest, character(rest))) {
        int byte = byte_of_letter(rest);
        if (byte >= 0) *end++ = (char)byte;
        else *plain = true;
    }
    return *plain ? append(out, token) : end;
}

// A token's text: as it is spelled, or in byte-level BPE the bytes.
static char *append_token(const tokenizer *t, char *out, slice token, bool *plain)
{
    *plain = false;
    return t->byte_level ? append_bytes(out, token, plain) : append(out, token);
}

// The slot of this pair, or the empty slot where it would go. At most half of the slots are in use.
static merge *find_merge(const tokenizer *t, int left, int right)
{
    uint64_t key = (uint64_t)left << 32 | (uint32_t)right;
    for (size_t i = place_of(key, t->last_merge);; i = (i + 1) & t->last_merge) {
        merge *m = t->merges + i;
        if (!m->rank || (m->left == left && m->right == right)) return m;
    }
}

// Makes the token with this id a piece, whose text begins at `start`. Returns the end of the text.
static char *take_token(tokenizer *t, const bpe *b, int id, char *start)
{
    const char *token = b->tokens[id] ? b->tokens[id] : "";
    bool plain;
    char *end = append_token(t, start, (slice){token, strlen(token)}, &plain);
    slice text = {start, (size_t)(end - start)};
    int own_byte = text.n == 1 && !plain ? (unsigned char)*start : -1;
    int byte = t->byte_level ? own_byte : byte_of(text);
    int type = t->byte_level || (byte < 0 && id != b->unknown) ? NORMAL : byte >= 0 ? BYTE : UNKNOWN;
    t->pieces[id] = (piece){.text = text, .type = type};
    if (byte >= 0) t->byte_id[byte] = id;
    bool matches = type == NORMAL && text.n && !plain;          // no bytes of a text are ever a plain one
    if (matches && add_text(t, id)) note_text(t, t->pieces + id);
    return end;
}

static bool take_tokens(tokenizer *t, const report *r, const bpe *b)
{
    size_t bytes = 1;
    for (int id = 0; id < b->vocab; id++) bytes += b->tokens[id] ? strlen(b->tokens[id]) : 0;
    t->vocab = b->vocab;
    t->pieces = calloc((size_t)b->vocab, sizeof *t->pieces);
    char *end = t->file = malloc(bytes);
    if (!t->pieces || !t->file || !make_slots(t))
        return wrong(r, "out of memory: it has %d tokens", b->vocab);
    for (int byte = 0; byte < 256; byte++) t->byte_id[byte] = -1;
    for (int id = 0; id < b->vocab; id++) end = take_token(t, b, id, end);
    for (int byte = 0; byte < 256; byte++) {
        if (t->byte_id[byte] < 0 && !t->byte_level)
            return wrong(r, "has no token <0x%02X>. Expected all 256 bytes: download it again",
                         (unsigned)byte);
        if (t->byte_id[byte] < 0) t->byte_id[byte] = b->unknown;
        t->lacks_bytes |= t->byte_id[byte] < 0;
    }
    return true;
}

// The id of a token as the file spells it, -1 if there is none.
static int token_id(const tokenizer *t, const char *token, char *room)
{
    bool plain;
    char *end = append_token(t, room, (slice){token, strlen(token)}, &plain);
    return plain ? -1 : find_piece(t, (slice){room, (size_t)(end - room)});
}

// Fills the table of merges. Of two with the same pair the last counts, as it does for Hugging Face.
static bool take_merges(tokenizer *t, const report *r, const bpe *b)
{
    size_t slots = 2, longest = 0;
    while (slots < 2 * (size_t)b->merge_count) slots *= 2;
    t->last_merge = slots - 1;
    for (int i = 0; i < b->merge_count; i++) {
        size_t n = strlen(b->merges[i][0]) + strlen(b->merges[i][1]);
        if (n > longest) longest = n;
    }
    char *room = malloc(longest + 1);
    const char *problem = NULL;
    int i = 0;
    if (!room || !(t->merges = calloc(slots, sizeof *t->merges))) problem = "out of memory";
    for (; i < b->merge_count && !problem; i++) {
        int left = token_id(t, b->merges[i][0], room), right = token_id(t, b->merges[i][1], room);
        if (left < 0 || right < 0) problem = "joins what is no token";
        else {
            slice both[] = {t->pieces[left].text, t->pieces[right].text};
            int id = find_piece(t, (slice){room, (size_t)(append(append(room, both[0]), both[1]) - room)});
            if (id < 0) problem = "makes what is no token";
            else *find_merge(t, left, right) = (merge){left, right, id, i + 1};
        }
    }
    free(room);
    if (!problem) return true;
    if (!i) return wrong(r, "%s", problem);
    return wrong(r, "merge %d, \"%s %s\", %s. Expected tokens of the vocabulary: download it again",
                 i, b->merges[i - 1][0], b->merges[i - 1][1], problem);
}

static bool take_cuts(tokenizer *t, const report *r, const bpe *b)
{
    t->cuts = calloc((size_t)b->cut_count + 1, sizeof *t->cuts);
    if (!t->cuts) return wrong(r, "out of memory");
    for (; t->cut_count < b->cut_count; t->cut_count++) {
        const char *problem = cut_compile(t->cuts + t->cut_count, b->cuts[t->cut_count]);
        if (problem)
            return wrong(r, "the regular expression %s %s. Expected one of those that GPT-2, Llama 3, Qwen "
                            "or DeepSeek publish", b->cuts[t->cut_count].regex, problem);
    }
    return true;
}

tokenizer *tokenizer_of_merges(const char *path, const bpe *b, char *err, size_t err_size)
{
    const report r = {path, err, err_size};
    tokenizer *t = calloc(1, sizeof *t);
    if (!t) wrong(&r, "out of memory");
    else {
        t->bos = t->eos = -1;
        t->unknown = SLICE("<unk>");
        t->escape_spaces = true;
        t->byte_level = b->byte_level;
        t->unless_space = b->unless_space;
        t->nfc = b->nfc;
        t->whole_words = b->whole_words;
        t->space_in_front = b->space_in_front;
    }
    if (t && take_tokens(t, &r, b) && take_merges(t, &r, b) && take_cuts(t, &r, b)) return t;
    tokenizer_free(t);
    return NULL;
}

void tokenizer_free(tokenizer *t)
{
    if (!t) return;
    for (size_t i = 0; i < t->added_count; i++) free((char *)t->added[i].text.p);
    for (int i = 0; i < t->cut_count; i++) pcre2_code_free(t->cuts[i].code);
    free(t->added);
    free(t->cuts);
    free(t->merges);
    free(t->known);
    free(t->slots);
    free(t->pieces);
    free(t->file);
    free(t);
}

int tokenizer_vocab(const tokenizer *t) { return t->vocab; }
int tokenizer_bos(const tokenizer *t)   { return t->bos; }
int tokenizer_eos(const tokenizer *t)   { return t->eos; }

// ---- 7  loading words -------------------------------------------------------------------------------------

// One number in `digits` hexadecimal digits off the front; -1 if they are none.
static long hex_number(slice s, size_t digits)
{
    long number = 0;
    for (size_t i = 0; i < digits; i++) {
        const char *all = "0123456789abcdef";
        char c = i < s.n ? s.p[i] : 0;
        if ('A' <= c && c <= 'F') c = (char)(c - 'A' + 'a');
        const char *digit = c ? strchr(all, c) : NULL;
        if (!digit) return -1;
        number = number * 16 + (digit - all);
    }
    return number;
}

// One escape of Python's, such as \n or \xff, off the front of `in`, the backslash included. In bytes, \xff
// is that byte; in a str it is the character U+00FF. False if it is none.
static bool take_escape(slice *in, bool bytes, char **out)
{
    static const char letters[] = "ntr\\'\"", means[] = "\n\t\r\\'\"";
    char kind = in->n > 1 ? in->p[1] : 0;
    const char *letter = kind ? strchr(letters, kind) : NULL;
    size_t digits = kind == 'x' ? 2 : kind == 'u' && !bytes ? 4 : kind == 'U' && !bytes ? 8 : 0;
    if (letter) *(*out)++ = means[letter - letters];
    long code = digits ? hex_number(skip(*in, 2), digits) : -1;
    if (!letter && (code < 0 || code > 0x10ffff)) return false;
    if (!letter && bytes) *(*out)++ = (char)code;
    if (!letter && !bytes) *out += utf8proc_encode_char((int)code, (unsigned char *)*out);
    *in = skip(*in, 2 + digits);
    return true;
}

// Python's literal at the front of `in`, 'text' or b"bytes", written over itself: that is never longer.
static bool take_literal(slice *in, slice *word)
{
    bool bytes = in->n && in->p[0] == 'b';
    if (bytes) *in = skip(*in, 1);
    char quote = in->n ? in->p[0] : 0;
    if (quote != '\'' && quote != '"') return false;
    char *start = (char *)(uintptr_t)in->p, *out = start;
    *in = skip(*in, 1);
    while (in->n && in->p[0] != quote) {
        if (in->p[0] == '\\') {
            if (!take_escape(in, bytes, &out)) return false;
            continue;
        }
        *out++ = in->p[0];
        *in = skip(*in, 1);
    }
    if (!in->n) return false;
    *in = skip(*in, 1);
    *word = (slice){start, (size_t)(out - start)};
    return true;
}

// Digits off the front; -1 if there are none, or if they make more than 2^24.
static long take_digits(slice *in)
{
    long number = 0;
    size_t n = 0;
    for (; n < in->n && in->p[n] >= '0' && in->p[n] <= '9' && number <= 1 << 24; n++)
        number = number * 10 + (in->p[n] - '0');
    *in = skip(*in, n);
    return n && number <= 1 << 24 ? number : -1;
}

static bool take_space(slice *in)
{
    bool there = in->n && in->p[0] == ' ';
    if (there) *in = skip(*in, 1);
    return there;
}

// One line: id, literal, bytes.
static bool take_word(slice line, long *id, slice *word)
{
    *id = take_digits(&line);
    if (*id < 1 || !take_space(&line) || !take_literal(&line, word) || !take_space(&line)) return false;
    return word->n && (size_t)take_digits(&line) == word->n && !line.n;
}

// The next line of a file, without \n or \r\n.
static slice take_line(slice *file)
{
    const char *end = memchr(file->p, '\n', file->n);
    slice line = {file->p, end ? (size_t)(end - file->p) : file->n};
    *file = skip(*file, line.n + (end != NULL));
    if (line.n && line.p[line.n - 1] == '\r') line.n--;
    return line;
}

// A piece for each id from 0 on, empty where the file has none.
static bool has_piece(tokenizer *t, long id)
{
    if (id < t->vocab) return true;
    size_t room = id + 1 > 2 * (long)t->vocab ? (size_t)id + 1 : 2 * (size_t)t->vocab;
    piece *more = realloc(t->pieces, room * sizeof *more);
    if (!more) return false;
    memset(more + t->vocab, 0, (room - (size_t)t->vocab) * sizeof *more);
    t->pieces = more;
    t->vocab = (int)room;
    return true;
}

static bool read_words(tokenizer *t, const report *r)
{
    slice file = {t->file, t->file_bytes};
    int last = 0;
    for (int line = 1; file.n; line++) {
        slice word, text = take_line(&file);
        long id;
        if (!text.n) continue;
        if (!take_word(text, &id, &word))
            return wrong(r, "line %d: expected an id, a literal of Python's and its bytes, as in "
                            "3464 'the' 3: download it again", line);
        if (!has_piece(t, id)) return wrong(r, "out of memory: it has %d words", line);
        if (t->pieces[id].text.n)
            return wrong(r, "line %d: id %ld stands twice: download it again", line, id);
        t->pieces[id] = (piece){.text = word, .type = NORMAL};
        if (id > last) last = (int)id;
        if (word.n > t->longest_word) t->longest_word = word.n;
        if (word.n == 1) t->byte_id[(unsigned char)word.p[0]] = (int)id;
    }
    t->vocab = last + 1;
    if (!make_slots(t)) return wrong(r, "out of memory: it has %d words", last);
    for (int id = 0; id <= last; id++)
        if (t->pieces[id].text.n && !add_text(t, id))
            return wrong(r, "the word of id %d stands twice: download it again", id);
    for (int b = 0; b < 256; b++)
        if (t->byte_id[b] < 0)
            return wrong(r, "has no word of the one byte 0x%02x. Expected all 256: download it again",
                         (unsigned)b);
    return true;
}

// Id 0 is no word: it ends a text.
tokenizer *tokenizer_of_words(const char *path, char *err, size_t err_size)
{
    const report r = {path, err, err_size};
    tokenizer *t = calloc(1, sizeof *t);
    if (!t) wrong(&r, "out of memory");
    else {
        t->bos = -1;
        t->byte_level = true;
        memset(t->byte_id, -1, sizeof t->byte_id);
    }
    if (t && read_file(t, &r) && read_words(t, &r)) return t;
    tokenizer_free(t);
    return NULL;
}

// ---- 8  special tokens ------------------------------------------------------------------------------------

// Takes the place of the added token with the same text, if there is one, and stands behind the others if
// not. Keeps own, malloc'ed memory with its n bytes.
static bool add_own_text(tokenizer *t, added_token a, char *own, size_t n)
{
    size_t i = 0;
    while (i < t->added_count && (t->added[i].text.n != n || memcmp(t->added[i].text.p, own, n))) i++;
    if (i == t->added_count) {
        added *more = realloc(t->added, (i + 1) * sizeof *more);
        if (!more) return false;
        t->added = more;
        t->added[t->added_count++].text = (slice){own, n};
        t->starts_added[(unsigned char)*own] = true;
    }
    bool normalized = a.normalized && t->byte_level;
    if (t->added[i].text.p != own) free(own);
    t->added[i] = (added){t->added[i].text, a.id, a.special, a.lstrip, a.rstrip, a.single_word, normalized};
    if (t->merges && a.special && a.id < t->vocab) t->pieces[a.id].type = CONTROL;
    return true;
}

bool tokenizer_add(tokenizer *t, added_token a)
{
    slice text = {a.text, strlen(a.text)};
    if (!text.n) return true;
    size_t n = text.n;
    bool composed = t->nfc && a.normalized;
    char *own = composed ? nfc(text, &n) : malloc(n);
    if (own && !composed) memcpy(own, text.p, n);
    if (own && add_own_text(t, a, own, n)) return true;
    free(own);
    return false;
}

// text: a piece is shorter than 8000 bytes (check_piece), and tokenizer_add wants a NUL behind it.
bool tokenizer_add_own(tokenizer *t)
{
    char text[8000];
    if (t->merges) return true;                         // such a file lists them
    for (int id = 0; id < t->vocab; id++) {
        const piece *p = t->pieces + id;
        if (p->type != UNKNOWN && p->type != CONTROL) continue;
        memcpy(text, p->text.p, p->text.n);
        text[p->text.n] = 0;
        if (!tokenizer_add(t, (added_token){.text = text, .id = id, .special = true})) return false;
    }
    return true;
}

void tokenizer_spaces(tokenizer *t, bool in_front, enum behind_special behind)
{
    t->space_in_front &= in_front;
    t->behind = behind;
}

void tokenizer_ends(tokenizer *t, int bos, int eos)
{
    t->bos = bos;
    t->eos = eos;
}

int tokenizer_find(const tokenizer *t, const char *text)
{
    slice s = {text, strlen(text)};
    for (size_t i = 0; i < t->added_count; i++)
        if (t->added[i].text.n == s.n && !memcmp(t->added[i].text.p, s.p, s.n)) return t->added[i].id;
    return find_piece(t, s);
}

// The longest added token that stands at text[at], NULL if there is none.
static const added *added_at(const tokenizer *t, slice text, size_t at, bool normalized)
{
    const added *found = NULL;
    if (!t->starts_added[(unsigned char)text.p[at]]) return NULL;
    for (const added *a = t->added; a < t->added + t->added_count; a++) {
        if (a->text.p[0] != text.p[at]) continue;                   // most are told apart by their first byte
        if (a->normalized != normalized) continue;
        if ((!found || a->text.n > found->text.n) && starts_with(skip(text, at), a->text)) found = a;
    }
    return found;
}

// No letter and no digit stands beside text[start … end-1].
static bool stands_alone(slice text, size_t start, size_t end)
{
    return !is_word(code_before(text, start)) && !is_word(code_behind(text, end));
}

// ---- 9  normalising ---------------------------------------------------------------------------------------

// The text as the pieces spell it: spaces become ▁, bytes that are not UTF-8 become U+FFFD, and USER pieces
// are copied as they are. space: one more ▁ goes in front. If the model says trim_spaces, runs of spaces
// shrink to one, and those at both ends go; those in front shrink to one only if `trim` is false: the text
// then continues another. out has room for 3 bytes per byte of text, and 3 more.
static slice normalise(const tokenizer *t, slice text, bool space, bool trim, char *out)
{
    const slice blank = t->escape_spaces ? SPACE : SLICE(" ");
    char *end = out;
    bool after_space = t->trim_spaces && trim;
    if (text.n && space) end = append(end, blank);
    while (text.n) {
        size_t n = user_length(t, text);
        if (!n) n = character(text);
        slice part = n ? (slice){text.p, n} : REPLACEMENT;
        text = skip(text, n ? n : 1);
        while (after_space && part.n && part.p[0] == ' ') part = skip(part, 1);
        if (part.n) after_space = t->trim_spaces && part.p[part.n - 1] == ' ';
        for (size_t i = 0; i < part.n; i++)
            if (part.p[i] == ' ') end = append(end, blank);
            else *end++ = part.p[i];
    }
    while (t->trim_spaces && (size_t)(end - out) >= blank.n && !memcmp(end - blank.n, blank.p, blank.n))
        end -= blank.n;
    return (slice){out, (size_t)(end - out)};
}

// ---- 10  merging ------------------------------------------------------------------------------------------

/* The symbols of a word. The number of a symbol is the place of its first byte: symbols[at] covers the bytes
   at … at+bytes-1, and the next symbol is symbols[at + bytes]. A symbol that has been joined to the one
   before it has bytes = 0.                                                                                */
typedef struct {
    int bytes;
    int before;                 // the number of the previous symbol, -1 if there is none
    int id;                     // of the piece that the symbol is, -1 if it is none
    uint64_t hash, power;       // of its bytes, and B^bytes; where pieces have scores
} symbol;

// The symbol `at` and the next one, which together make the piece `id`. The highest score goes first; where a
// file lists its merges it is the rank, negative (a float holds 16 million of them). A later merge may change
// one of the two while the pair waits on the heap: merge_symbols sees it by their lengths and drops the pair.
typedef struct { float score; int at, id; } pair;

typedef struct {
    const tokenizer *t;
    slice word;
    symbol *symbols;            // (word.n)
    pair *heap;                 // (2 word.n): at most word.n - 1 at first, and a merge takes one and puts two
    size_t pairs, room;         // room: the longest word that fits
    int *left_part;             // (vocab): bytes of the left one of the two symbols that make an UNUSED piece
    char *kept;                 // (word.n) the word without the bytes that no token stands for
    char *normal;               // a normalised section, room for the whole text
    pcre2_match_data *found;
    int *ids;
    size_t n, ids_room;
} encoder;

static bool goes_first(pair a, pair b)
{
    return a.score > b.score || (a.score == b.score && a.at < b.at);
}

static void push(encoder *e, pair p)                            // onto the heap
{
    size_t i = e->pairs++;
    for (; i && goes_first(p, e->heap[(i - 1) / 2]); i = (i - 1) / 2) e->heap[i] = e->heap[(i - 1) / 2];
    e->heap[i] = p;
}

// Takes the pair that goes first off the heap. The last one of the heap sinks from the top to its place.
static pair pop(encoder *e)
{
    pair top = e->heap[0];
    pair last = e->heap[--e->pairs];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < e->pairs; i = child) {
        if (child + 1 < e->pairs && goes_first(e->heap[child + 1], e->heap[child])) child++;
        if (!goes_first(e->heap[child], last)) break;
        e->heap[i] = e->heap[child];
    }
    e->heap[i] = last;
    return top;
}

static bool can_merge(const encoder *e, int at)                 // a USER piece never merges
{
    int id = e->symbols[at].id;
    return id < 0 || e->t->pieces[id].type != USER;
}

// Puts the symbol at `at` and its right neighbour on the heap, if together they make a piece.
static void offer(encoder *e, int at)
{
    const symbol *left = e->symbols + at;
    const symbol *right = left + left->bytes;
    if ((size_t)(at + left->bytes) >= e->word.n) return;            // it is the last symbol
    if (!can_merge(e, at) || !can_merge(e, at + left->bytes)) return;
    if (e->t->merges) {
        const merge *m = find_merge(e->t, left->id, right->id);
        if (m->rank) push(e, (pair){(float)-m->rank, at, m->id});
        return;
    }
    slice both = {e->word.p + at, (size_t)(left->bytes + right->bytes)};
    int id = find_slot(e->t, both, left->hash * right->power + right->hash)->id - 1;
    if (id < 0) return;
    push(e, (pair){e->t->pieces[id].score, at, id});
    if (e->t->pieces[id].type == UNUSED) e->left_part[id] = left->bytes;
}

static void split_into_symbols(encoder *e)
{
    int n = (int)e->word.n;
    for (int before = -1, at = 0; at < n; before = at, at += e->symbols[at].bytes) {
        slice rest = skip(e->word, (size_t)at);
        if (e->t->byte_level) {
            e->symbols[at] = (symbol){1, before, e->t->byte_id[(unsigned char)*rest.p], 0, 0};
            continue;
        }
        size_t bytes = user_length(e->t, rest);
        if (!bytes) bytes = character(rest);
        slice text = {rest.p, bytes};
        uint64_t hash = hash_of(text), power = 1;
        for (size_t i = 0; i < bytes; i++) power *= HASH_BASE;
        e->symbols[at] = (symbol){(int)bytes, before, find_slot(e->t, text, hash)->id - 1, hash, power};
    }
}

// The pair with the highest score becomes one symbol, until no pair is left. A new symbol makes new pairs
// with the symbol before it and the one behind it.
static void merge_symbols(encoder *e)
{
    e->pairs = 0;
    for (int at = 0; at < (int)e->word.n; at += e->symbols[at].bytes) offer(e, at);
    while (e->pairs) {
        pair p = pop(e);
        symbol *left = e->symbols + p.at;
        symbol *right = left + left->bytes;
        int bytes = (int)e->t->pieces[p.id].text.n;
        int next = p.at + bytes;
        if (!left->bytes || left->bytes >= bytes || left->bytes + right->bytes != bytes) continue;
        right->bytes = 0;
        left->bytes = bytes;
        left->id = p.id;
        left->hash = left->hash * right->power + right->hash;
        left->power *= right->power;
        if ((size_t)next < e->word.n) e->symbols[next].before = p.at;
        if (left->before >= 0) offer(e, left->before);
        offer(e, p.at);
    }
}

// ---- 11  encoding and decoding ----------------------------------------------------------------------------

// Appends the ids of one symbol: the id of its piece; of an UNUSED piece the ids of its two parts; and if it
// is no piece, one id per byte.
static void emit(encoder *e, slice text, int id)
{
    int first = id >= 0 && e->left_part ? e->left_part[id] : 0;
    if (id < 0 || (e->t->pieces[id].type == UNUSED && !first)) {
        for (size_t i = 0; i < text.n; i++) e->ids[e->n++] = e->t->byte_id[(unsigned char)text.p[i]];
    } else if (first) {
        slice left = {text.p, (size_t)first}, right = skip(text, left.n);
        emit(e, left, find_piece(e->t, left));
        emit(e, right, find_piece(e->t, right));
    } else e->ids[e->n++] = id;
}

/* Bytes of the first word of the text. It ends before a ▁, if no piece anywhere has a ▁ right behind the byte
   in front: then no merge can join the two sides, and each is encoded on its own. The ids are the same, and
   the heap is as small as a word. (Llama2's pieces have ▁ only in front and in runs.) Under a model with
   UNUSED pieces a text is not cut: the two parts of such a piece depend on earlier merges anywhere in it. */
static size_t word_length(const tokenizer *t, slice text)
{
    if (t->has_unused) return text.n;
    for (size_t i = 1; i < text.n; i++) {
        if (text.p[i] != SPACE.p[0] || t->joins_space[(unsigned char)text.p[i - 1]]) continue;
        if (starts_with(skip(text, i), SPACE)) return i;
    }
    return text.n;
}

static bool make_room(encoder *e, size_t bytes)
{
    if (bytes <= e->room) return true;
    e->room = bytes > 2 * e->room ? bytes : 2 * e->room;
    free(e->symbols);
    free(e->heap);
    free(e->kept);
    e->kept = malloc(e->room);
    e->symbols = malloc(e->room * sizeof *e->symbols);
    e->heap = malloc(2 * e->room * sizeof *e->heap);
    return e->symbols && e->heap && e->kept;
}

// SmolLM2 has no token for a dozen control characters: Hugging Face leaves them out, and joins what is beside
// them.
static slice without_missing(encoder *e, slice word)
{
    char *end = e->kept;
    for (size_t i = 0; i < word.n; i++)
        if (e->t->byte_id[(unsigned char)word.p[i]] >= 0) *end++ = word.p[i];
    return (slice){e->kept, (size_t)(end - e->kept)};
}

// RWKV's: from the left, the longest word that the bytes begin with. Every byte is a word.
static bool encode_longest(encoder *e, slice text)
{
    while (text.n) {
        uint64_t hash = 0;
        int id = -1;
        size_t found = 1;
        for (size_t n = 1; n <= text.n && n <= e->t->longest_word; n++) {
            hash = hash_byte(hash, text.p[n - 1]);
            int longer = find_slot(e->t, (slice){text.p, n}, hash)->id - 1;
            if (longer < 0) continue;
            id = longer;
            found = n;
        }
        e->ids[e->n++] = id;
        text = skip(text, found);
    }
    return true;
}

// One word to ids, by merges. False if out of memory.
static bool merge_word(encoder *e, slice word)
{
    int whole = e->t->whole_words ? find_piece(e->t, word) : -1;
    if (whole >= 0) {
        e->ids[e->n++] = whole;
        return true;
    }
    if (!make_room(e, word.n)) return false;
    e->word = e->t->lacks_bytes ? without_missing(e, word) : word;
    split_into_symbols(e);
    merge_symbols(e);
    for (int at = 0; at < (int)e->word.n; at += e->symbols[at].bytes)
        emit(e, (slice){e->word.p + at, (size_t)e->symbols[at].bytes}, e->symbols[at].id);
    return true;
}

// One word to ids, which may be known.
static bool encode_word(encoder *e, slice word)
{
    if (e->t->longest_word) return encode_longest(e, word);
    if (word.n > KNOWN_BYTES) return merge_word(e, word);
    known *k = e->t->known + place_of(hash_of(word), KNOWN_WORDS - 1);
    size_t first = e->n;
    if (k->bytes == word.n && !memcmp(k->text, word.p, word.n)) {
        memcpy(e->ids + first, k->ids, k->count * sizeof *k->ids);
        e->n += k->count;
        return true;
    }
    if (!merge_word(e, word)) return false;
    size_t count = e->n - first;
    if (count > KNOWN_IDS) return true;
    k->bytes = (unsigned char)word.n;
    k->count = (unsigned char)count;
    memcpy(k->text, word.p, word.n);
    memcpy(k->ids, e->ids + first, count * sizeof *k->ids);
    return true;
}

// A text that SentencePiece has normalised, word by word, to ids.
static bool encode_words(encoder *e, slice text)
{
    for (size_t n; text.n; text = skip(text, n)) {
        n = word_length(e->t, text);
        if (!encode_word(e, (slice){text.p, n})) return false;
    }
    return true;
}

// What the first `cuts` cuts have left of a text, to ids: the others cut it on.
static bool encode_part(encoder *e, slice text, int cuts)
{
    if (!text.n) return true;
    if (cuts == e->t->cut_count) return encode_word(e, text);
    const cut *c = e->t->cuts + cuts;
    for (size_t at = 0, start, end; at < text.n; at = end) {
        if (!cut_next(c, e->found, text, at, &start, &end)) return false;
        slice rest = {text.p + at, start - at}, match = {text.p + start, end - start};
        if (c->is.keep_rest && !encode_part(e, rest, cuts + 1)) return false;
        if (c->is.keep_matches && !encode_part(e, match, cuts + 1)) return false;
    }
    return true;
}

static bool more_ids(encoder *e, size_t more)
{
    if (e->n + more <= e->ids_room) return true;
    e->ids_room = e->n + more > 2 * e->ids_room ? e->n + more : 2 * e->ids_room;
    int *ids = realloc(e->ids, e->ids_room * sizeof *ids);
    if (ids) e->ids = ids;
    return ids != NULL;
}

static bool encode_sections(encoder *e, slice text, bool space, bool trim, bool normalized);

// The text between two special tokens, in byte-level BPE: in NFC, where the model wants it, for the added
// tokens that are sought there; then the text between those.
static bool encode_bytes(encoder *e, slice text, bool space, bool normalized)
{
    char *fresh = NULL;
    bool ok = true;
    if (!normalized && e->t->nfc) {
        if (!(fresh = nfc(text, &text.n))) return false;
        text.p = fresh;
    }
    if (!normalized) ok = encode_sections(e, text, space, false, true);
    else {
        if (space) {
            if (!(fresh = malloc(text.n + 1))) return false;
            append(append(fresh, SLICE(" ")), text);
            text = (slice){fresh, text.n + 1};
        }
        ok = more_ids(e, text.n) && encode_part(e, text, 0);
    }
    free(fresh);
    return ok;
}

static bool starts_with_space(const tokenizer *t, slice text)
{
    return starts_with(text, SLICE(" ")) || (!t->byte_level && starts_with(text, SPACE));
}

// The text between two special tokens.
static bool encode_section(encoder *e, slice text, bool space, bool trim, bool normalized)
{
    if (!text.n) return true;
    if (e->t->unless_space && starts_with_space(e->t, text)) space = false;
    if (e->t->byte_level) return encode_bytes(e, text, space, normalized);
    slice s = normalise(e->t, text, space, trim, e->normal);
    if (e->left_part) memset(e->left_part, 0, (size_t)e->t->vocab * sizeof *e->left_part);
    return more_ids(e, s.n) && encode_words(e, s);
}

// Sections and the special tokens between them, from the left.
static bool encode_sections(encoder *e, slice text, bool space, bool trim, bool normalized)
{
    const tokenizer *t = e->t;
    size_t start = 0;
    for (size_t at = 0; at < text.n;) {
        const added *a = added_at(t, text, at, normalized);
        if (!a || (a->single_word && !stands_alone(text, at, at + a->text.n))) {
            at += a ? a->text.n : 1;
            continue;
        }
        size_t end = at;
        while (a->lstrip && end > start && is_space(code_before(text, end))) end -= length_before(text, end);
        if (!encode_section(e, (slice){text.p + start, end - start}, space, trim, normalized)) return false;
        if (!more_ids(e, 1)) return false;
        e->ids[e->n++] = a->id;
        start = at + a->text.n;
        while (a->rstrip && is_space(code_behind(text, start))) start += character(skip(text, start));
        at = start;
        bool stands_there = t->behind == UNLESS_SPACE && starts_with_space(t, skip(text, at));
        space = t->space_in_front && t->behind != NEVER && !stands_there;
        trim = true;
    }
    return encode_section(e, skip(text, start), space, trim, normalized);
}

// The text with U+FFFD for each byte that is not UTF-8; out has room for it.
static slice replace_wrong(slice text, char *out)
{
    char *end = out;
    for (size_t n; text.n; text = skip(text, n ? n : 1)) {
        n = character(text);
        end = append(end, n ? (slice){text.p, n} : REPLACEMENT);
    }
    return (slice){out, (size_t)(end - out)};
}

// Makes an encoder for this one text, and keeps its ids.
int *tokenizer_encode(const tokenizer *t, const char *bytes_of_text, size_t bytes, bool begins, size_t *n)
{
    encoder e = {.t = t};
    slice text = {bytes_of_text, bytes};
    *n = 0;
    if (bytes > INT_MAX / 3 - 1) return NULL;
    e.normal = malloc(3 * bytes + 3);
    if (t->has_unused) e.left_part = calloc((size_t)t->vocab, sizeof *e.left_part);
    if (t->byte_level) e.found = pcre2_match_data_create(1, NULL);
    bool ok = e.normal && (e.left_part || !t->has_unused) && (e.found || !t->byte_level) && more_ids(&e, 1);
    if (ok && t->byte_level) text = replace_wrong(text, e.normal);
    ok = ok && encode_sections(&e, text, begins && t->space_in_front, begins, false);
    if (ok) *n = e.n;
    else {
        free(e.ids);
        e.ids = NULL;
    }
    pcre2_match_data_free(e.found);
    free(e.normal);
    free(e.left_part);
    free(e.symbols);
    free(e.heap);
    free(e.kept);
    return e.ids;
}

// Appends to *out the one character that the byte pieces in front of ids spell in UTF-8, or U+FFFD for the
// first byte alone if they spell none. Returns how many ids that took.
static size_t decode_bytes(const tokenizer *t, const int *ids, size_t n, char **out)
{
    char bytes[4];
    slice s = {bytes, 0};
    for (; s.n < n && s.n < 4; s.n++) {
        int id = ids[s.n];
        if (id < 0 || id >= t->vocab || t->pieces[id].type != BYTE) break;
        bytes[s.n] = (char)byte_of(t->pieces[id].text);
    }
    size_t length = character(s);
    *out = append(*out, length ? (slice){bytes, length} : REPLACEMENT);
    return length ? length : 1;
}

static char *append_text(char *out, slice piece_text)           // of SentencePiece, with spaces for ▁
{
    for (size_t n; piece_text.n; piece_text = skip(piece_text, n)) {
        bool space = starts_with(piece_text, SPACE);
        n = space ? SPACE.n : 1;
        *out++ = space ? ' ' : piece_text.p[0];
    }
    return out;
}

static const added *added_of(const tokenizer *t, int id)        // with this id, NULL if there is none
{
    for (size_t i = 0; i < t->added_count; i++)
        if (t->added[i].id == id) return t->added + i;
    return NULL;
}

const char *tokenizer_added(const tokenizer *t, int id, size_t *bytes)
{
    const added *a = added_of(t, id);
    *bytes = a ? a->text.n : 0;
    return a ? a->text.p : NULL;
}

// A vocabulary may leave ids out, which added tokens then have.
static bool is_piece(const tokenizer *t, int id)
{
    return id >= 0 && id < t->vocab && t->pieces[id].text.n;
}

static size_t most_bytes(const tokenizer *t, int id)            // of what an id may decode to
{
    if (!is_piece(t, id)) {
        const added *a = added_of(t, id);
        return a ? a->text.n : 0;
    }
    if (t->pieces[id].type == UNKNOWN) return t->unknown.n;
    return t->pieces[id].text.n;                                // a byte needs 3 of the 6 in its spelling
}

// Bytes of the longest start of a character that the text begins with, 1 if there is none: what one U+FFFD
// stands for. A start is one where some bytes behind it make a character of it: either the lowest or the
// highest ones do.
static size_t broken_length(slice text)
{
    for (size_t n = text.n < 3 ? text.n : 3; n > 1; n--)
        for (size_t whole = n + 1; whole <= 4; whole++) {
            char low[] = "\x80\x80\x80\x80", high[] = "\xbf\xbf\xbf\xbf";
            append(low, (slice){text.p, n});
            append(high, (slice){text.p, n});
            if (character((slice){low, whole}) == whole || character((slice){high, whole}) == whole) return n;
        }
    return 1;
}

// The bytes of byte-level BPE as text, malloc'ed: tokens may end inside of a character.
static char *text_of_bytes(slice bytes, size_t *text_bytes)
{
    char *text = malloc(3 * bytes.n + 1), *out = text;
    if (!text) return NULL;
    for (size_t n; bytes.n; bytes = skip(bytes, n)) {
        n = character(bytes);
        out = append(out, n ? (slice){bytes.p, n} : REPLACEMENT);
        if (!n) n = broken_length(bytes);
    }
    *out = 0;
    *text_bytes = (size_t)(out - text);
    return text;
}

// Adds up how many bytes the ids may need, then writes their texts one behind the other.
char *tokenizer_decode(const tokenizer *t, const int *ids, size_t n, size_t *bytes)
{
    size_t room = 1;
    *bytes = 0;
    for (size_t i = 0; i < n; i++) {
        size_t most = most_bytes(t, ids[i]);
        if (most > SIZE_MAX - room) return NULL;
        room += most;
    }
    char *text = malloc(room), *out = text;
    if (!text) return NULL;

    bool drop_space = t->space_in_front || t->trim_spaces;                  // until there is text
    for (size_t i = 0, used; i < n; i += used) {
        used = 1;
        if (!is_piece(t, ids[i])) {
            const added *a = added_of(t, ids[i]);
            bool plain;
            if (!a || a->special) continue;
            out = append_token(t, out, a->text, &plain);
            continue;
        }
        const piece *p = t->pieces + ids[i];
        if (p->type == UNKNOWN) out = append(out, t->unknown);
        else if (p->type == BYTE) used = decode_bytes(t, ids + i, n - i, &out);
        else if (t->byte_level && p->type == NORMAL) out = append(out, p->text);
        else if (p->type != CONTROL) {
            bool drop = drop_space && out == text && starts_with(p->text, SPACE);
            out = append_text(out, drop ? skip(p->text, SPACE.n) : p->text);
            if (drop && !t->trim_spaces) drop_space = false;                // only one was put there
        }
    }
    *out = 0;
    *bytes = (size_t)(out - text);
    if (!t->byte_level) return text;
    char *whole = text_of_bytes((slice){text, *bytes}, bytes);
    free(text);
    return whole;
}
