/*  dev/fuzz_mutate.h: one random change of an input that keeps its structure: most JSON stays JSON, a header
    has the length that stands before it, a field of a protobuf has the length that it says.                */

#ifndef FUZZ_MUTATE_H
#define FUZZ_MUTATE_H

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most);      // libFuzzer's own: bytes and words

typedef struct { uint8_t *p; size_t n, room; } bytes;
enum { ROOM = 1 << 16 };

static size_t below(rng *g, size_t n) { return n ? rng_next(g) % n : 0; }

// Puts other bytes, which may be a part of b, in place of from … to-1. Without room b stays as it is.
static void replace(bytes *b, size_t from, size_t to, const void *with, size_t n)
{
    static uint8_t copy[ROOM];
    if (n > ROOM || b->n - (to - from) + n > b->room) return;
    memcpy(copy, with, n);
    memmove(b->p + from + n, b->p + to, b->n - to);
    memcpy(b->p + from, copy, n);
    b->n = b->n - (to - from) + n;
}

static void insert(bytes *b, size_t at, const char *text) { replace(b, at, at, text, strlen(text)); }

// ---- JSON ------------------------------------------------------------------------------------------------

// The texts of the program's source in their quotes, field names among them; and values on an edge.
static char *words[4096];
static int word_count;
static const char *const values[] = {
    "0", "1", "2", "3", "4", "7", "8", "16", "-1", "-0", "8.0", "0.5", "1e3", "1e-30", "1e400", "16777216",
    "16777217", "2147483647", "2147483648", "9007199254740993", "9223372036854775807", "9223372036854775808",
    "1000000000000000019884624838656", "null", "true", "false", "NaN", "[]", "{}", "[0, 8]", "[[]]", "\"\"",
    "\"0\"", "\"\\u0000\"", "\"\\ud83d\"", "\"\\ud83d\\ude00\"", "\"\xc3\xa9\"", "\"\x01\"", "\"\xff\"",
    "\"\xe2\x96\x81\"", "\"F32\"", "\"BF16\"", "\"F16\"", "\"F64\"", "\"I64\"", "\"U8\"", "\"F4\"",
    "\"BOOL\"", "\"q_proj\"", "\"all-linear\"", "\"a.safetensors\"", "\"b.safetensors\"",
    "\"model.layers.0.self_attn.q_proj.weight\"",
    "{\"dtype\": \"F32\", \"shape\": [2], \"data_offsets\": [0, 8]}",
    "{\"content\": \"<pad>\", \"id\": 4, \"special\": true}", "{\"question\": \"a\", \"answer\": \"#### 7\"}",
    "{\"text\": \"a b\"}\n", ",", ":", "\n", "]", "}",
};
enum { VALUES = sizeof values / sizeof *values };

static void read_dictionary(const char *file)
{
    char line[256];
    FILE *f = fopen(file, "r");
    while (f && word_count < 4096 && fgets(line, sizeof line, f)) {
        line[strcspn(line, "\n")] = 0;
        words[word_count++] = copy_text(line);
    }
    if (f) fclose(f);
}

static const char *word(rng *g)
{
    return word_count && below(g, 2) ? words[below(g, (size_t)word_count)] : values[below(g, VALUES)];
}

static int in_word(uint8_t c) { return isalnum(c) || c == '+' || c == '-' || c == '.' || c == '_'; }

// Behind the token at this place: a text, a word or number, one character.
static size_t token_end(const bytes *b, size_t at)
{
    uint8_t c = b->p[at++];
    if (c == '"') {
        while (at < b->n && b->p[at] != '"') at += b->p[at] == '\\' ? 2 : 1;
        at++;
    } else if (in_word(c)) while (at < b->n && in_word(b->p[at])) at++;
    return at < b->n ? at : b->n;
}

static size_t token_begin(const bytes *b, size_t at)
{
    while (at < b->n && isspace(b->p[at])) at++;
    return at;
}

// Behind the value at this place: a token, or all that stands between brackets.
static size_t value_end(const bytes *b, size_t at)
{
    int depth = 0;
    do {
        at = token_begin(b, at);
        if (at == b->n) break;
        depth += b->p[at] == '{' || b->p[at] == '[';
        depth -= b->p[at] == '}' || b->p[at] == ']';
        at = token_end(b, at);
    } while (depth > 0);
    return at;
}

// The place of a token; every one is as likely.
static size_t any_token(const bytes *b, rng *g)
{
    size_t chosen = 0, seen = 0;
    for (size_t at = token_begin(b, 0); at < b->n; at = token_begin(b, token_end(b, at)))
        if (!below(g, ++seen)) chosen = at;
    return chosen;
}

static void mutate_json(bytes *b, rng *g)
{
    size_t from = any_token(b, g), other = any_token(b, g);
    size_t to = b->n ? value_end(b, from) : 0, other_end = b->n ? value_end(b, other) : 0;
    size_t colon = token_begin(b, to);
    int member = colon < b->n && b->p[colon] == ':' && below(g, 2);
    if (member) to = value_end(b, colon + 1);           // a name with its value
    size_t comma = token_begin(b, to);
    size_t behind = comma < b->n && b->p[comma] == ',' ? comma + 1 : to;
    const char *w = word(g);
    switch (below(g, 8)) {
    case 0: case 1: replace(b, from, to, w, strlen(w)); break;
    case 2: replace(b, from, behind, "", 0); break;
    case 3: replace(b, from, to, b->p + other, other_end - other); break;
    case 4: replace(b, to, to, b->p + from, to - from), insert(b, to, ", "); break;
    case 5: insert(b, to, "]"), insert(b, from, "["); break;
    case 6: insert(b, from, ", "), insert(b, from, word(g)), insert(b, from, ": "), insert(b, from, w); break;
    case 7: b->n = LLVMFuzzerMutate(b->p, b->n, b->room); break;
    }
}

// ---- safetensors -----------------------------------------------------------------------------------------

static double bits_of_dtype(const char *name)
{
    for (int i = 0; name && i < DTYPES; i++)
        if (!strcmp(name, dtypes[i].name)) return 8 * (double)dtypes[i].size;
    for (int i = 0; name && other_dtypes[i].name; i++)
        if (!strcmp(name, other_dtypes[i].name)) return other_dtypes[i].bits;
    return 32;
}

// Gives every tensor of a header the bytes that its shape asks for, one behind the other, and returns how
// many all have; 0 if the header is no JSON.
static size_t mend_offsets(bytes *header)
{
    json_t *json = json_loadb((const char *)header->p, header->n, 0, NULL), *item, *dim;
    const char *name;
    double at = 0;
    json_object_foreach(json, name, item) {
        double bits = bits_of_dtype(string_field(item, "dtype"));
        size_t i;
        if (!strcmp(name, "__metadata__") || !json_is_object(item)) continue;
        json_array_foreach(json_object_get(item, "shape"), i, dim) bits *= json_number_value(dim);
        double end = at + floor(bits / 8);
        if (!(end >= at && end < 4096)) end = at;
        json_object_set_new(item, "data_offsets", json_pack("[I, I]", (json_int_t)at, (json_int_t)end));
        at = end;
    }
    char *text = json ? json_dumps(json, JSON_COMPACT) : NULL;
    if (text) replace(header, 0, header->n, text, strlen(text));
    free(text);
    json_decref(json);
    return (size_t)at;
}

static void mutate_safetensors(bytes *b, rng *g)
{
    static uint8_t text[ROOM];
    uint64_t length = 0;
    for (int i = 7; b->n >= 8 && i >= 0; i--) length = length << 8 | b->p[i];
    if (b->n < 8 || length > b->n - 8 || !below(g, 8)) {
        b->n = LLVMFuzzerMutate(b->p, b->n, b->room);
        return;
    }
    bytes header = {text, length, b->room - 8 < ROOM ? b->room - 8 : ROOM};
    memcpy(text, b->p + 8, length);
    mutate_json(&header, g);
    size_t data = below(g, 2) ? mend_offsets(&header) : 0;
    replace(b, 8, 8 + length, header.p, header.n);
    length = b->n >= 8 + header.n && !memcmp(b->p + 8, header.p, header.n) ? header.n : length;
    for (int i = 0; i < 8; i++) b->p[i] = (uint8_t)(length >> 8 * i);
    size_t end = 8 + length + data;
    if (!data || end > b->room) return;
    if (end > b->n) memset(b->p + b->n, 0, end - b->n);
    b->n = end;
}

// ---- gzip --------------------------------------------------------------------------------------------------

// Changes what is packed and packs it anew; or the packed bytes.
static void mutate_gzip(bytes *b, rng *g)
{
    static uint8_t text[ROOM], packed[ROOM];
    z_stream z = {.next_in = b->p, .avail_in = (unsigned)b->n, .next_out = text, .avail_out = ROOM / 2};
    inflateInit2(&z, 16 + MAX_WBITS);
    int said = inflate(&z, Z_FINISH);
    bytes inner = {text, z.total_out, ROOM / 2};
    inflateEnd(&z);
    if (said != Z_STREAM_END || !below(g, 3)) {
        b->n = LLVMFuzzerMutate(b->p, b->n, b->room);
        return;
    }
    mutate_json(&inner, g);
    z = (z_stream){.next_in = text, .avail_in = (unsigned)inner.n, .next_out = packed, .avail_out = ROOM};
    deflateInit2(&z, (int)below(g, 10), Z_DEFLATED, 16 + MAX_WBITS, 1, (int)below(g, 5));
    deflate(&z, Z_FINISH);
    int members = below(g, 4) ? 1 : 2;                  // the new one, alone or behind the older one
    replace(b, members == 1 ? 0 : b->n, b->n, packed, z.total_out);
    deflateEnd(&z);
}

// ---- protobuf --------------------------------------------------------------------------------------------

// A varint at this place; *at is then behind it.
static uint64_t varint(const bytes *b, size_t *at)
{
    uint64_t value = 0;
    for (int shift = 0; *at < b->n && shift < 64; shift += 7) {
        uint8_t c = b->p[(*at)++];
        value |= (uint64_t)(c & 0x7f) << shift;
        if (c < 0x80) break;
    }
    return value;
}

// Behind the field at this place. *data is where its value begins, if it has a length, and else its end.
static size_t field_end(const bytes *b, size_t at, size_t *data)
{
    int wire = (int)(varint(b, &at) & 7);
    uint64_t n = wire == 1 ? 8 : wire == 5 ? 4 : 0;
    if (wire == 0) varint(b, &at);
    if (wire == 2) n = varint(b, &at);
    size_t end = n < b->n - at ? at + n : b->n;
    *data = wire == 2 ? at : end;
    return end;
}

static void insert_varint(bytes *b, size_t at, uint64_t value)
{
    uint8_t c[10];
    size_t n = 0;
    for (; value >= 0x80; value >>= 7) c[n++] = (uint8_t)(value | 0x80);
    c[n++] = (uint8_t)value;
    replace(b, at, at, c, n);
}

// A field of a message is left out, doubled, replaced, put in front of another, or changed inside, where a
// message may be, too.
static void mutate_message(bytes *b, rng *g, int depth)
{
    static uint8_t inner[4][ROOM];
    size_t from = 0, end = 0, data = 0, seen = 0, other = 0, other_end = 0, d;
    for (size_t at = 0; at < b->n;) {
        size_t next = field_end(b, at, &d);
        int rare = (b->p[at] >> 3) > 1;                 // not a piece, of which there are hundreds
        if (!below(g, ++seen) || (rare && !below(g, 4))) from = at, end = next, data = d;
        if (!below(g, seen)) other = at, other_end = next;
        at = next;
    }
    size_t n = end - data;
    switch (below(g, 8)) {
    case 0: replace(b, from, end, "", 0); break;
    case 1: replace(b, end, end, b->p + from, end - from); break;
    case 2: replace(b, from, end, b->p + other, other_end - other); break;
    case 3:
        insert_varint(b, from, rng_next(g) >> below(g, 64));
        insert_varint(b, from, below(g, 60) << 3);
        break;
    default:
        if (!n || depth == 3) {                         // the key, a number, or the text of a piece
            bytes field = {inner[depth], end - (n ? data : from), b->room < ROOM ? b->room : ROOM};
            memcpy(field.p, b->p + end - field.n, field.n);
            field.n = LLVMFuzzerMutate(field.p, field.n, field.n + 8);
            replace(b, n ? data : from, end, field.p, field.n);
            return;
        }
        bytes message = {inner[depth], n, b->room < ROOM ? b->room : ROOM};
        memcpy(message.p, b->p + data, n);
        mutate_message(&message, g, below(g, 2) ? depth + 1 : 3);
        size_t at = from;
        uint64_t key = varint(b, &at);
        if (b->n - (end - from) + message.n + 20 > b->room) return;
        replace(b, from, end, message.p, message.n);
        insert_varint(b, from, message.n), insert_varint(b, from, key);
    }
}

// ---- an input --------------------------------------------------------------------------------------------

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed)
{
    static uint8_t file[ROOM];
    rng g = {seed};
    bytes all = {data, size, most};
    int which = (int)below(&g, (size_t)file_count(reader));
    size_t from = 0, end = file_end(reader, 0, data, 0, size);
    for (int i = 0; i < which; i++) {
        if (end == all.n) replace(&all, end, end, "", 1);
        if (end == all.n) return all.n;                 // no room
        from = end + 1;
        end = file_end(reader, i + 1, data, from, all.n);
    }
    bytes b = {file, end - from, most - all.n + end - from};
    if (b.room > ROOM) b.room = ROOM;
    if (b.n > ROOM) return size;
    memcpy(file, data + from, b.n);
    switch (reader->files[which].form) {
    case JSON: mutate_json(&b, &g); break;
    case SAFETENSORS: mutate_safetensors(&b, &g); break;
    case GZIP: mutate_gzip(&b, &g); break;
    case PROTOBUF: mutate_message(&b, &g, 0); break;
    case PLAIN: b.n = LLVMFuzzerMutate(b.p, b.n, b.room); break;
    }
    replace(&all, from, end, b.p, b.n);
    return all.n ? all.n : 1;
}

#endif
