/*  model.h: what every model has: tensors, memory, linear layers, the way from the embedding to the loss and
    back. What a layer is in between, its backbone says (llama.h).

      1  the model and its memory      every tensor is one line, walked twice
      2  forward and backward          embedding, layers, the head and the loss                             */

#ifndef MODEL_H
#define MODEL_H
#include "lib/config.h"
#include "lib/safetensors.h"
#include "ops/mat.h"

// ---- 1  the model and its memory --------------------------------------------------------------------------

typedef struct model model;
typedef struct linear linear;
typedef struct batch batch;
typedef struct tensor tensor;

// How full the blocks ACT and STAT are. layout() sets them back to an earlier level: the next layer's tensors
// then lie in the memory of those that were declared above that level.
typedef struct { size_t act, stat; } level;

// A method is a row of the table methods[] in adapters.h: how one linear layer y = x Wᵀ is fine-tuned.
typedef struct method {
    const char *name;
    const char *equation;                                       // for --list and the banner

    // Declares the tensors of a linear layer, and refuses shapes that do not fit.
    void (*layout)(model *m, linear *l, const char *name);

    // Gives them their values before step 1.
    void (*init)(model *m, linear *l, const char *name);

    // y = or += …, as mode says.
    void (*forward)(model *m, linear *l, mat y, mat x, enum mode mode);

    // dx = or += …, as mode says, and the gradient of each parameter += ….
    void (*backward)(model *m, linear *l, mat dx, mat dy, mat x, enum mode mode);

    // W (out, in), a copy of l->W, becomes W' = W + adapter.
    void (*merge)(model *m, linear *l, mat W);

    // In adapter_config.json: PEFT's LORA or MISS, or a type of our own; and what tells the method from
    // others of its type, a field that is true or the value of "init_weights" or "init_lora_weights"
    // (run/peft.h).
    const char *peft_type, *peft_variant;

    int has_start;              // it has A0 and B0: forward subtracts them, and the file holds them
    int wants_gradient;         // init finds the gradient of the first step in l->dW
} method;

// What a linear layer is called, and what it maps to what. Those of a layer with the same `reads` read the
// same x.
typedef struct {
    const char *name, *module;  // in --targets, and in the file: "q", "self_attn.q_proj"
    int reads, out, in, bias;
} called;

struct linear {
    called is;
    int depth;                  // of which layer
    int targeted;               // it is among those that the run adapts
    mat W, dW;                  // (out, in); dW only where W itself trains, and while lora-ga seeks its start
    mat bias, dbias;            // (out), in the models that have one here
    const method *method;
    int first, last;            // is it the first, the last of those that read the same x with this method?
    double scale;               // s of y += s (x Aᵀ) Bᵀ
    mat A, dA, B, dB;           // lora: (r, in), (out, r). bat: B (out/r, r, r). bat-row: (in/r, r, r)
    mat A0, B0;                 // pissa, olora, lora-ga: the start of A and B
    mat D, dD;                  // bone (r, out), mini (r, mini_r), disha (a, b), frozen (out, in)
    int groups[2];              // bat-free: p strips of block rows, q groups of block columns
    mat h;                      // lora: x Aᵀ (N, r), kept for the backward pass
    mat mag, dmag;              // dora: the magnitude m (out)
    mat z, VA;                  // dora: x Vᵀ (N, out), V Aᵀ (out, r), V = W + s B A
    mat gain, dgain;            // dora: m/‖V_o‖ (out, 1)
    mat squares, dsquares;      // dora: ‖V_o‖² (out, 1)
};

// A backbone says what stands between the embedding and the logits: a header such as llama.h, and a row of
// the table backbones[] (backbones.h). Layer i reads m->x[i] and writes `next`.
typedef struct backbone {
    const family *families;                                     // each a "model_type"
    const config_field *fields;                                 // of config.json
    void (*config)(config *c, const json_t *json, const char *path);       // what they mean together

    // What only the file of weights tells (NULL where there is none); may be NULL itself.
    void (*sizes)(config *c, checkpoint *file);

    // In the file: "model.layers", "model.embed_tokens.weight", "lm_head.weight"; and what may stand there
    // unread.
    const char *layer_name, *embed_name, *head_name;
    int (*spare)(const char *name);

    // The bytes of its own part of a layer (m->layers), and of what it has once for all layers (m->own).
    size_t layer_size, own_size;

    // From this `reads` on, a layer's linears stand behind all that mixes tokens: see gather(), below.
    int behind;

    // Declare tensors: the weights of layer i; what its forward pass leaves for the backward pass, of which
    // the level returned is kept; what exists once; the norm behind the last layer. `fill` then fills tables.
    void (*weights)(model *m, int i);
    level (*activations)(model *m, int i);
    void (*work)(model *m);
    void (*norm_layout)(model *m);
    void (*fill)(model *m);

    // --init: the numbers x of a tensor, where Hugging Face's start will not do; may be NULL.
    void (*start)(model *m, const tensor *t, wide *x, rng *g);

    // next = layer i of m->x[i]; and back: m->dx (in the last layer m->dlast) is d(next) on entry, and m->dx
    // is d(m->x[i]) on return.
    void (*forward)(model *m, int i, mat next, const batch *b);
    void (*backward)(model *m, int i, const batch *b, int dx_wanted);
    void (*norm_forward)(model *m, mat out, mat x);
    void (*norm_backward)(model *m, mat dx, mat dout, mat x);           // dx += …

    int (*norms)(const config *c);      // numbers a token that a norm's backward pass keeps beside it

    // Generation: what a text of so many tokens keeps. has_state: a state of one size in place of a cache;
    // k of a span then says whose it is, and a text that has gone on cannot go back.
    double (*cache_bytes)(const config *c, int length);
    int has_state;
} backbone;

// Where a tensor lies. One block of memory a kind.
enum kind {
    BASE,                       // frozen matrix, stays mapped in the dtype of its file
    NORM,                       // frozen vector, copied to real
    PARAM,                      // trains: wide, with a gradient and two AdamW moments at the same offset
    START,                      // wide, frozen: A0, B0
    ACT,                        // real, one row a token, or a target
    STAT,                       // wide, one row a token
    WORK,                       // real, anything else that is overwritten all the time
    AUX,                        // wide, the same: dora's norms
    CACHE,                      // real, keys and values of generation
    KINDS
};

struct tensor {
    char name[112];             // the name in Hugging Face's or PEFT's file
    enum kind kind;
    shape shape;
    mat *value, *grad;
    mat m1, m2;                 // AdamW's moments of a PARAM
    double rate;                // its learning rate, times the run's: LoRA+ makes B faster
    linear *of;                 // the linear layer that it belongs to, or NULL
    int by_target;              // an ACT, it has a row a target, not a token
};

enum { IN_SIDE = -1, OUT_SIDE = -2 };

// What the run asks of the model.
typedef struct {
    const method *method;
    int rank, mini_r;
    int shard[2], groups[2];    // disha's and bat-free's; IN_SIDE, OUT_SIDE: what the linear has
    const char *targets;        // the linears that get an adapter: their names, or "all"
    json_t *modules;            // or an adapter's own "target_modules", which choose in each layer anew
    int (*selects)(const json_t *modules, const char *module);  // whether they name this module
    double alpha, plus_ratio;
    uint64_t seed;
    int tokens;                 // the most tokens in a micro-batch
    int positions;              // the longest sequence
    int train;                  // keep what the backward pass needs
    int dora_detach;            // dora: the norm counts as a constant in the backward pass
    int halvings;               // how often micro-batches are halved: so many more blocks of gradients
    int recompute;              // 1: but not gate and up; 2: of each layer only x, the residual stream
    int sequences;              // generation: how many are answered at once
    int cache_rows;             // generation: their number × length; 0: no cache
} plan;

enum { MOST_HALVINGS = 20 };            // --accum goes to 2^20

struct model {
    config c;
    plan p;
    checkpoint file;
    int reads_file;                                     // weights are read from it all the time
    mat embed, dembed;                                  // (vocab, dim)
    mat norm, dnorm;                                    // (dim)
    mat head, dhead;                                    // (vocab, dim): embed itself if tied
    void *layers, *own;                                 // of each layer, and once, as the backbone has them
    linear **linears;                                   // those of all layers, in their order
    mat *x;                                             // (N, dim) the residual stream on entry of each layer
    mat dx;                                             // (N, dim) its gradient
    mat last, dlast;                                    // (targets, dim) at the end, of the targets alone
    mat hn, dhn, logits;                                // the head: `chunk` rows at a time
    mat losses;                                         // (N, 1)
    int chunk;
    mat narrow, dnarrow;                                // (N, r)             work space of the methods,
    mat broad, dbroad;                                  // (N, in), (N, out)  shared by all layers, and
    mat weight;                                         // (out, in)          overwritten all the time
    dev_ints ids, pos, target_row, label;               // the micro-batch
    tensor *tensors;                                    // every tensor above, by name
    size_t used[KINDS];                                 // elements a block
    dev block[KINDS], grad, moment1, moment2;
    dev partial[MOST_HALVINGS];                         // gradients of the earlier half of micro-batches
    size_t trainable;
    char refused[240];                                  // why the method does not fit this model, or empty
    int walk;                                           // 0 measure, 1 point
};

static enum dtype type_of_kind(enum kind k)
{
    return k == PARAM || k == START || k == STAT || k == AUX ? TYPE_OF(wide) : TYPE_OF(real);
}

// Declares a tensor. The first walk measures, the second points *value (and *grad) into the kind's block. A
// grad of NULL says that it has no gradient.
__attribute__((format(printf, 6, 7)))
static tensor *declare(model *m, enum kind kind, mat *value, mat *grad, shape s, const char *format, ...)
{
    tensor t = {.kind = kind, .shape = s, .value = value, .grad = grad, .rate = 1};
    va_list args;
    va_start(args, format);
    vsnprintf(t.name, sizeof t.name, format, args);
    va_end(args);
    size_t offset = m->used[kind];
    size_t size = dtypes[type_of_kind(kind)].size;
    *value = mat_of(NULL, type_of_kind(kind), s);
    if (grad) {
        *grad = *value;
        grad->p = NULL;
    }
    size_t step = kind == PARAM ? 16 : 128;             // tensors begin at 64 bytes, or 256 even in 16 bits
    if (kind != BASE) m->used[kind] += (elements(*value) + step - 1) / step * step;
    if (kind == PARAM) m->trainable += elements(*value);
    if (m->walk && kind != BASE) value->p = (char noderef *)m->block[kind] + offset * size;
    if (m->walk && kind == PARAM && m->p.train) {
        t.m1 = t.m2 = *grad = *value;
        grad->p = (char noderef *)m->grad + offset * size;
        t.m1.p = (char noderef *)m->moment1 + offset * size;
        t.m2.p = (char noderef *)m->moment2 + offset * size;
    }
    arrput(m->tensors, t);
    return &arrlast(m->tensors);
}

// Asks for work space that all layers share: the largest request counts, its rows aligned. layout() declares
// it at its end, when all requests are known.
static void reserve(mat *work, int rows, int cols)
{
    cols = pitch(cols);
    if ((size_t)rows * (size_t)cols > elements(*work)) *work = mat_of(NULL, TYPE_OF(real), SHAPE(rows, cols));
}

// Why a method cannot work on this model. Training stops with it, --list prints it.
__attribute__((format(printf, 2, 3)))
static void refuse(model *m, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    if (!*m->refused) vsnprintf(m->refused, sizeof m->refused, format, args);
    va_end(args);
}

static const method methods[];          // adapters.h; its first row is `full`: W alone

static int full_training(const model *m) { return m->p.train && m->p.method == &methods[0]; }

static int has_adapter(const linear *l) { return l->method->layout != NULL; }

static int is_last(const model *m, int i) { return i + 1 == m->c.layers; }

// The linears of one layer: all layers have the same.
static int linears_of_layer(const model *m) { return (int)(arrlen(m->linears) / m->c.layers); }

// Whether one of two names is the other, or its end from a dot on.
static int same_module(const char *a, const char *b)
{
    size_t n = strlen(a), k = strlen(b);
    if (n < k) return same_module(b, a);
    return !strcasecmp(a + n - k, b) && (n == k || a[n - k - 1] == '.');
}

// Whether a name of --targets means this linear: "q", "q_proj", "self_attn.q_proj", "all".
static int means(const char *name, const called *l)
{
    int all = !strcasecmp(name, "all-linear") || !strcasecmp(name, "all");
    return all || !strcasecmp(name, l->name) || same_module(name, l->module);
}

// The next name of a list, in a fresh string; NULL at its end.
static char *next_name(const char **list)
{
    *list += strspn(*list, ", ");
    size_t n = strcspn(*list, ", ");
    char *name = n ? copy_bytes(*list, n) : NULL;
    *list += n;
    return name;
}

static int in_targets(const char *list, const called *l)
{
    int found = 0;
    for (char *name; (name = next_name(&list)); free(name)) found |= means(name, l);
    return found;
}

// Stops at a name of --targets that no linear of this model has.
static void check_targets(const model *m)
{
    const char *list = m->p.targets;
    char choice[200] = "";
    int n = linears_of_layer(m), names = 0;
    for (int i = 0; i < n; i++)
        sprintf(choice + strlen(choice), "%s%.16s", i ? "," : "", m->linears[i]->is.name);
    for (char *name; (name = next_name(&list)); free(name), names++) {
        int i = 0;
        while (i < n && !means(name, &m->linears[i]->is)) i++;
        if (i == n) die("--targets: there is no linear layer \"%s\"; choose from %s", name, choice);
    }
    if (!names) die("--targets: names no layer; choose from %s", choice);
}

// One linear layer: W, its bias, and the tensors of its method. A linear that the run does not target has the
// method `full`, whose W is then frozen.
static void linear_layout(model *m, int depth, linear *l, called is)
{
    char module[96], adapter[128];
    snprintf(module, sizeof module, "%s.%d.%s", m->c.backbone->layer_name, depth, is.module);
    snprintf(adapter, sizeof adapter, "base_model.model.%s", module);
    int targeted = m->p.modules ? m->p.selects(m->p.modules, module) : in_targets(m->p.targets, &is);
    enum kind matrix = full_training(m) ? PARAM : BASE;
    enum kind vector = full_training(m) ? PARAM : NORM;
    ptrdiff_t first = arrlen(m->tensors);
    l->is = is;
    l->depth = depth;
    l->targeted = targeted;
    declare(m, matrix, &l->W, &l->dW, SHAPE(is.out, is.in), "%s.weight", module);
    if (is.bias) declare(m, vector, &l->bias, &l->dbias, SHAPE(is.out), "%s.bias", module);
    l->method = targeted ? m->p.method : &methods[0];
    if (has_adapter(l)) l->method->layout(m, l, adapter);
    for (ptrdiff_t i = first; i < arrlen(m->tensors); i++) {
        m->tensors[i].of = l;
        m->tensors[i].by_target = is.reads >= m->c.backbone->behind && is_last(m, depth);
    }
    arrput(m->linears, l);
}

// Marks the first and the last of those that read the same x and have an adapter: of q, k, v, or gate and up.
static void mark_shared(model *m)
{
    int n = linears_of_layer(m);
    for (int i = 0; i < arrlen(m->linears); i++) {
        linear *l = m->linears[i];
        l->first = l->last = has_adapter(l);
        for (int j = i - i % n; j < i - i % n + n; j++) {
            const linear *other = m->linears[j];
            int shares = other->is.reads == l->is.reads && has_adapter(other);
            if (shares && j < i) l->first = 0;
            if (shares && j > i) l->last = 0;
        }
    }
}

// Whether the run adapts linear j of a layer, in some layer.
static int targeted_in_some(const model *m, int j)
{
    int some = 0;
    for (int i = j; i < arrlen(m->linears); i += linears_of_layer(m)) some |= m->linears[i]->targeted;
    return some;
}

static level level_now(const model *m) { return (level){m->used[ACT], m->used[STAT]}; }

// What exists once, for all layers, in every backbone: the losses, the methods' work space, and dx.
static void work_layout(model *m)
{
    declare(m, STAT, &m->losses, NULL, SHAPE(m->p.tokens, 1), "losses");
    for (mat **w = (mat *[]){&m->narrow, &m->dnarrow, &m->broad, &m->dbroad, NULL}; *w; w++)
        if (elements(**w)) declare(m, WORK, *w, NULL, SHAPE((*w)->rows, (*w)->cols), "work");
    enum kind w = m->p.train ? WORK : AUX;              // a merged weight stays wide until it is written
    if (elements(m->weight)) declare(m, w, &m->weight, NULL, SHAPE(m->weight.rows, m->weight.cols), "work");
    if (!m->p.train) return;
    declare(m, ACT, &m->dx, NULL, SHAPE(m->p.tokens, m->c.dim), "dx");
    declare(m, ACT, &m->dlast, NULL, SHAPE(m->p.tokens, m->c.dim), "dlast")->by_target = 1;
}

// The head's tensors lie among the activations, but have a row a target, and of those a chunk.
static void head_layout(model *m)
{
    const config *c = &m->c;
    int chunk = dev_chunk(c->vocab);
    chunk = chunk < 16 ? 16 : chunk;
    chunk = chunk < m->p.tokens ? chunk : m->p.tokens;
    m->chunk = chunk;
    declare(m, ACT, &m->hn, NULL, SHAPE(chunk, c->dim), "head.xn")->kind = WORK;
    declare(m, ACT, &m->logits, NULL, SHAPE(chunk, c->vocab), "logits")->kind = WORK;
    if (!m->p.train) return;
    declare(m, ACT, &m->dhn, NULL, SHAPE(chunk, c->dim), "head.dxn")->kind = WORK;
}

// Every tensor of the model, one line each.
static void layout(model *m)
{
    const config *c = &m->c;
    const backbone *B = c->backbone;
    enum kind matrix = full_training(m) ? PARAM : BASE;
    memset(m->used, 0, sizeof m->used);
    arrsetlen(m->tensors, 0);
    arrsetlen(m->linears, 0);
    m->trainable = 0;
    m->narrow = m->dnarrow = m->broad = m->dbroad = m->weight = (mat){0};
    declare(m, matrix, &m->embed, &m->dembed, SHAPE(c->vocab, c->dim), "%s", B->embed_name);
    declare(m, ACT, &m->x[0], NULL, SHAPE(m->p.tokens, c->dim), "layers.0.x");
    level most = {0, 0};
    for (int i = 0; i < c->layers; i++) {
        level before = level_now(m);
        mat *next = is_last(m, i) ? &m->last : &m->x[i + 1];
        tensor *x = declare(m, ACT, next, NULL, SHAPE(m->p.tokens, c->dim), "layers.%d.x", i + 1);
        x->by_target = is_last(m, i);
        B->weights(m, i);
        level kept = B->activations(m, i), full = level_now(m);
        if (!m->p.train) kept = before;
        if (full.act > most.act) most.act = full.act;
        if (full.stat > most.stat) most.stat = full.stat;
        m->used[ACT] = kept.act;
        m->used[STAT] = kept.stat;
    }
    m->used[ACT] = most.act;                            // what comes now is used beside every layer
    m->used[STAT] = most.stat;
    B->norm_layout(m);
    if (c->tied) {
        m->head = m->embed;
        m->dhead = m->dembed;
    } else declare(m, matrix, &m->head, &m->dhead, SHAPE(c->vocab, c->dim), "%s", B->head_name);
    mark_shared(m);
    work_layout(m);
    size_t before = m->used[ACT];                       // no layer works while the head does: its tensors and
    head_layout(m);                                     // the backbone's lie in the same memory
    size_t head = m->used[ACT];
    m->used[ACT] = before;
    B->work(m);
    if (m->used[ACT] < head) m->used[ACT] = head;
    if (!m->p.modules) check_targets(m);
    int some = 0;
    for (int i = 0; i < arrlen(m->linears); i++) some |= m->linears[i]->targeted;
    if (!some)
        refuse(m, "the adapter's \"target_modules\" name no linear layer of this model");
}

// The first walk alone: what a method would train and need on this config. Allocates nothing.
static void model_measure(model *m, config c, plan p)
{
    m->c = c;
    m->p = p;
    m->layers = alloc((size_t)c.layers, c.backbone->layer_size);
    m->own = alloc(1, c.backbone->own_size);
    m->x = alloc((size_t)c.layers, sizeof *m->x);
    layout(m);
}

// Gives the lists back that model_measure() made.
static void model_unmeasure(model *m)
{
    arrfree(m->tensors);
    arrfree(m->linears);
    free(m->layers);
    free(m->own);
    free(m->x);
}

// Whether a tensor belongs to the base: its file has it.
static int of_base(const tensor *t)
{
    int weight = t->kind == BASE || t->kind == NORM || t->kind == PARAM;
    return weight && strncmp(t->name, "base_model.", 11);
}

// What a file should hold of a tensor, under its name and this ending: its numbers, or a moment of AdamW's.
static request request_for(const tensor *t, const char *ending, mat *to)
{
    request w = {.shape = t->shape, .to = to, .frozen = t->kind == BASE};
    snprintf(w.name, sizeof w.name, "%.100s%s", t->name, ending);
    return w;
}

static double base_parameters(const model *m)
{
    double sum = 0;
    for (int i = 0; i < arrlen(m->tensors); i++)
        if (of_base(&m->tensors[i])) sum += (double)elements(*m->tensors[i].value);
    return sum;
}

// The sizes by which the ops reserve work space of their own.
static needs needs_of(const model *m)
{
    const plan *p = &m->p;
    needs n = {.tokens = p->tokens, .heads = m->c.heads, .train = p->train};
    n.normed = p->tokens * m->c.backbone->norms(&m->c);
    n.recurrent = m->c.backbone->has_state ? m->c.heads * m->c.head_dim : 0;
    n.trained = 2 * (size_t)p->rank * (size_t)p->rank;                  // dora's A Aᵀ (r, r), made wider
    for (int i = 0; i < arrlen(m->tensors); i++) {
        const tensor *t = &m->tensors[i];
        mat v = *t->value;
        size_t size = elements(v);
        size_t padded = (size_t)v.batch * (size_t)pitch(v.rows) * (size_t)pitch(v.cols);
        if (t->kind == BASE && size > n.weight) n.weight = size;
        if ((t->kind == PARAM || t->kind == START) && padded > n.trained) n.trained = padded;
    }
    if (p->cache_rows) n.fetched = (size_t)m->chunk * (size_t)m->c.vocab;
    return n;
}

// All memory of a model, once it lies there: every block, the ops' own work space, and the base.
static inline double planned_bytes(const model *m)
{
    double trained = (3 + m->p.halvings) * (double)m->used[PARAM] * sizeof(wide);
    double bytes = trained + (double)dev_reserve(needs_of(m), 0);
    for (int k = NORM; k < KINDS; k++)
        bytes += (double)m->used[k] * (double)dtypes[type_of_kind((enum kind)k)].size;
    for (int i = 0; i < arrlen(m->tensors); i++) {
        const tensor *t = &m->tensors[i];
        if (t->kind == BASE) bytes += (double)elements(*t->value) * (double)dtypes[t->value->type].size;
    }
    return bytes;
}

static dev device_block(size_t bytes, const char *what)
{
    dev p = dev_alloc(bytes);
    if (!p)
        die("out of memory: %.1f GB for %s; a smaller --batch, --seq or --rank needs less",
            (double)bytes / 1e9, what);
    return p;
}

// The block of all that trains, or of its gradients, or moments, as one matrix. Zeros fill each tensor up to
// a multiple of 16 elements.
static mat flat(const model *m, dev block)
{
    return mat_of(block, TYPE_OF(wide), SHAPE((int)(m->used[PARAM] / 16), 16));
}

// The memory that the first walk has measured, and the second walk, which points every tensor into it.
static void model_allocate(model *m)
{
    static const char *const what[KINDS] = {
        [NORM] = "norms",
        [PARAM] = "trained weights",
        [START] = "their start",
        [ACT] = "activations",
        [STAT] = "statistics",
        [WORK] = "work space",
        [AUX] = "norms of adapters",
        [CACHE] = "the key-value cache",
    };
    if (*m->refused) die("%s", m->refused);
    for (int k = NORM; k < KINDS; k++) {
        size_t size = dtypes[type_of_kind((enum kind)k)].size;
        if (m->used[k]) m->block[k] = device_block(m->used[k] * size, what[k]);
    }
    if (m->p.train) {
        size_t bytes = m->used[PARAM] * sizeof(wide);
        m->grad = device_block(bytes, "gradients");
        m->moment1 = device_block(bytes, "AdamW's first moments");
        m->moment2 = device_block(bytes, "AdamW's second moments");
        for (int i = 0; i < m->p.halvings; i++) m->partial[i] = device_block(bytes, "sums of gradients");
    }
    size_t tokens = (size_t)m->p.tokens * sizeof(int);
    m->ids = device_block(tokens, "ids");
    m->pos = device_block(tokens, "ids");
    m->label = device_block(tokens, "ids");
    m->target_row = device_block(tokens, "ids");
    dev_reserve(needs_of(m), 1);
    m->walk = 1;
    layout(m);
    if (m->c.backbone->fill) m->c.backbone->fill(m);
}

// The file of a tied model may hold the head too, if it equals the embedding. A head with numbers of its own
// is refused, because it would be lost.
static void check_tied(model *m)
{
    ptrdiff_t head = shgeti(m->file.tensors, m->c.backbone->head_name);
    ptrdiff_t embed = shgeti(m->file.tensors, m->c.backbone->embed_name);
    if (head < 0) return;
    stored h = m->file.tensors[head].value;
    stored e = m->file.tensors[embed].value;
    size_t bytes = elements(e.data) * dtypes[e.data.type].size;
    int same = h.data.type == e.data.type && elements(h.data) == elements(e.data);
    if (!same || memcmp((const void *)(uintptr_t)h.data.p, (const void *)(uintptr_t)e.data.p, bytes))
        die("%s: %s is not %s, though config.json says \"tie_word_embeddings\": true; set it to false to use "
            "both, or remove one tensor", h.file, m->c.backbone->head_name, m->c.backbone->embed_name);
}

// Points the base's matrices into the mapped file and copies the rest from it. Refuses a file that lacks a
// tensor, has one of another shape, or one that no model of this config has.
static void model_load(model *m, const char *dir)
{
    request *list = NULL;
    const backbone *B = m->c.backbone;
    for (int i = 0; i < shlen(m->file.tensors); i++) {
        const char *name = m->file.tensors[i].key;
        if (!B->spare(name) || !strcmp(name, B->head_name)) expect_usable(m->file.tensors[i].value);
    }
    for (int i = 0; i < arrlen(m->tensors); i++) {
        const tensor *t = &m->tensors[i];
        if (of_base(t)) arrput(list, request_for(t, "", t->value));
    }
    m->reads_file = checkpoint_fetch(&m->file, dir, list, "config.json", B->spare);
    arrfree(list);
    if (m->c.tied) check_tied(m);
    if (m->c.tied) m->head = m->embed;
}

// Where a result is not finite: ends the program at the first weight that holds NaN or Inf. Frozen ones are
// not looked at before, for that would read the whole file. Returns if all are numbers.
static void blame_tensor(model *m)
{
    for (int i = 0; i < arrlen(m->tensors); i++) {
        const tensor *t = &m->tensors[i];
        if (t->kind != BASE && t->kind != NORM && t->kind != PARAM && t->kind != START) continue;
        ptrdiff_t found = shgeti(m->file.tensors, t->name);
        size_t n = elements(*t->value);
        wide *x = alloc(n, sizeof *x);
        get(x, *t->value);
        if (!isfinite(largest(x, n)))
            die("%s: tensor %s holds NaN or Inf; get it anew",
                found >= 0 ? m->file.tensors[found].value.file : "the adapter", t->name);
        free(x);
    }
}

// Writes tensors of a model into the directory in the making, and makes sure that the base's file, which was
// read all the while, is still the one that was opened.
static void model_write(model *m, const char *name, const output *list, int n)
{
    safetensors_write(name, list, n);
    if (m->reads_file) checkpoint_unchanged(&m->file);
}

// Gives all memory back: the device's, the file's, and the lists.
static void model_free(model *m)
{
    for (int i = 0; i < arrlen(m->tensors); i++)
        if (m->tensors[i].kind == BASE && m->tensors[i].value->p) dev_weight_free(*m->tensors[i].value);
    for (int k = 0; k < KINDS; k++) dev_free(m->block[k]);
    dev_free(m->grad);
    dev_free(m->moment1);
    dev_free(m->moment2);
    for (int i = 0; i < MOST_HALVINGS; i++) dev_free(m->partial[i]);
    dev_free((dev)m->ids);
    dev_free((dev)m->pos);
    dev_free((dev)m->label);
    dev_free((dev)m->target_row);
    dev_reserve((needs){0}, 1);
    checkpoint_close(&m->file);
    model_unmeasure(m);
    free(m->c.text);
}

// ---- 2  forward and backward ------------------------------------------------------------------------------

// A micro-batch: sequences laid end to end, without padding. Padding would add tokens whose losses do not
// count, so without it the numbers are the same, and there is less to do.
struct batch {
    int tokens, targets, rows;  // rows: how many sequences
    int *ids, *pos;             // (tokens): what is read, and its place in its sequence
    int *target_row, *label;    // (targets): the token that predicts, and the id it should predict
    span *spans;                // (rows): where each sequence begins, and which keys it sees
    int cached;                 // generation: keys and values join the cache, and spans name its rows
};

// Refuses a micro-batch that would read or write beyond the memory of the plan.
static void batch_check(const model *m, const batch *b)
{
    int ok = b->tokens <= m->p.tokens;
    int asks = b->targets > 0 && b->targets <= m->p.tokens;
    int keys = b->cached ? m->p.cache_rows : b->tokens;
    int texts = m->p.sequences > 1 ? m->p.sequences : 1;
    if (!ok) die("a micro-batch of %d tokens exceeds the plan of %d", b->tokens, m->p.tokens);
    if (!asks) die("a micro-batch of %d targets: the plan has from 1 to %d", b->targets, m->p.tokens);
    for (int i = 0; i < b->tokens; i++)
        ok &= b->ids[i] >= 0 && b->ids[i] < m->c.vocab && b->pos[i] >= 0 && b->pos[i] < m->p.positions;
    for (int i = 0; i < b->targets; i++) {
        ok &= b->target_row[i] >= 0 && b->target_row[i] < b->tokens;
        ok &= b->label[i] >= 0 && b->label[i] < m->c.vocab;
    }
    for (int i = 0; i < b->rows; i++) {
        span s = b->spans[i];
        ok &= s.q >= 0 && s.nq >= 0 && s.q + s.nq <= b->tokens;
        ok &= s.k >= 0 && s.nk >= s.nq;
        ok &= b->cached && m->c.backbone->has_state ? s.k < texts : s.k + s.nk <= keys;
    }
    if (!ok) die("a micro-batch holds an id, a position or a row that the plan has no place for");
}

// Copies the micro-batch to the device and gives every activation its rows.
static void batch_enter(model *m, const batch *b)
{
    batch_check(m, b);
    for (int i = 0; i < arrlen(m->tensors); i++) {
        tensor *t = &m->tensors[i];
        int rows = t->by_target ? b->targets : b->tokens;
        if (t->kind == ACT || t->kind == STAT) *t->value = rows_of(*t->value, 0, rows);
    }
    put_ints(m->ids, b->ids, (size_t)b->tokens);
    put_ints(m->pos, b->pos, (size_t)b->tokens);
    put_ints(m->target_row, b->target_row, (size_t)b->targets);
    put_ints(m->label, b->label, (size_t)b->targets);
}

//  y = or += x Wᵀ + what the adapter adds + bias
static void linear_forward(model *m, linear *l, mat y, mat x, enum mode mode)
{
    l->method->forward(m, l, y, x, mode);
    bias_forward(y, l->bias);
}

//  dx = or += dy W + what the adapter adds
static void linear_backward(model *m, linear *l, mat dx, mat dy, mat x, enum mode mode)
{
    bias_backward(l->dbias, dy);
    l->method->backward(m, l, dx, dy, x, mode);
}

// W' = W + adapter, in the work space, not yet rounded to the dtype of its file.
static mat merged(model *m, linear *l)
{
    mat W = shaped(m->weight, 1, l->W.rows, l->W.cols);
    copy(W, l->W);
    l->method->merge(m, l, W);
    return W;
}

/* Behind what mixes tokens in the last layer (attention; in RWKV6 the lerps of channel mixing) no token looks
   at another, and only those that predict a target matter: those of an answer, where the prompt is not
   learnt; the last one of a text that is continued. There they are gathered, and what follows has a row a
   target:

       layer 0     attention of all tokens                 MLP of all
       …           all                                     all
       last        all                      → gather →     MLP of the targets → head

   The numbers are those of all rows, less what nobody asks for.                                           */

// out[i] = x[row_i], where target i is predicted by token row_i
static void gather(const model *m, mat out, mat x) { embedding_forward(out, x, m->target_row); }

// And back: dx = 0, then dx[row_i] += dout[i].
static void scatter(const model *m, mat dx, mat dout)
{
    zero(dx);
    embedding_backward(dx, dout, m->target_row);
}

// Work space of a row a token, for what has the rows of `like`. Behind these it keeps what was there.
static mat rows_like(mat work, mat like) { return rows_of(work, 0, like.rows); }

// Embedding and layers, up to m->last.
static void model_forward(model *m, const batch *b)
{
    batch_enter(m, b);
    embedding_forward(m->x[0], m->embed, m->ids);
    for (int i = 0; i < m->c.layers; i++)
        m->c.backbone->forward(m, i, is_last(m, i) ? m->last : m->x[i + 1], b);
    if (m->reads_file) checkpoint_unchanged(&m->file);
}

// Logits of n targets, up to a chunk, into m->logits: their rows normed and multiplied with the head.
static void head_forward(model *m, int first, int n)
{
    for (mat **w = (mat *[]){&m->hn, &m->dhn, &m->logits, NULL}; *w; w++) **w = rows_of(**w, 0, n);
    m->c.backbone->norm_forward(m, m->hn, rows_of(m->last, first, n));
    matmul_nt(m->logits, m->hn, m->head, 1, SET);                       // (n, vocab)
}

// Returns Σ loss of the micro-batch. scale ≠ 0: also m->dlast = scale · d(Σ loss)/d(last), and the head's
// gradients. A chunk of rows at a time, so that (targets, vocab) never stands in memory.
static double head_loss(model *m, const batch *b, double scale)
{
    if (scale) zero(m->dlast);
    for (int i = 0; i < b->targets; i += m->chunk) {
        int n = b->targets - i < m->chunk ? b->targets - i : m->chunk;
        head_forward(m, i, n);
        cross_entropy(rows_of(m->losses, i, n), m->logits, m->label + i, scale);
        if (!scale) continue;

        // From here on m->logits holds dlogits: cross_entropy wrote scale · (softmax − one-hot) over them.
        matmul_tn(m->dhead, m->logits, m->hn, 1, ADD);          // logits = hn headᵀ:    dhead += dlogitsᵀ hn
        matmul_nn(m->dhn, m->logits, m->head, 1, SET);          //                       dhn = dlogits head
        m->c.backbone->norm_backward(m, rows_of(m->dlast, i, n), m->dhn, rows_of(m->last, i, n));
    }
    wide *losses = alloc((size_t)b->targets, sizeof *losses);
    double sum = 0;
    get(losses, rows_of(m->losses, 0, b->targets));
    for (int i = 0; i < b->targets; i++) sum += (double)losses[i];
    free(losses);
    return sum;
}

// Forward, and with scale ≠ 0 backward: adds the gradient of scale · Σ loss to that of every parameter.
// Returns Σ loss.
static double model_step(model *m, const batch *b, double scale)
{
    model_forward(m, b);
    double loss = head_loss(m, b, scale);
    if (!scale) return loss;
    for (int i = m->c.layers - 1; i >= 0; i--)
        m->c.backbone->backward(m, i, b, i > 0 || m->dembed.p);
    embedding_backward(m->dembed, m->dx, m->ids);
    return loss;
}

#endif
