/*  model.h: Llama2 and its kin by hand.

      1  the model and its memory      every tensor is one line, walked twice
      2  forward and backward          Llama2, and the loss                                                 */

#ifndef MODEL_H
#define MODEL_H
#include "lib/config.h"
#include "lib/safetensors.h"
#include "ops/mat.h"

// ---- 1  the model and its memory --------------------------------------------------------------------------

typedef struct model model;
typedef struct linear linear;

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

// The linear layers of a block, in the order of the file. A bit for each makes plan.targets.
enum { Q_PROJ, K_PROJ, V_PROJ, O_PROJ, GATE_PROJ, UP_PROJ, DOWN_PROJ, LINEARS };

// How wide the vectors of a layer are.
enum width { DIM, ATT, KV, HIDDEN };

static int width_of(const config *c, enum width w)
{
    const int widths[] = {
        [DIM] = c->dim,
        [ATT] = c->heads * c->head_dim,
        [KV] = c->kv_heads * c->head_dim,
        [HIDDEN] = c->hidden,
    };
    return widths[w];
}

// What each of them is called and what it maps to what. Those with the same `input` read the same x.
typedef struct { const char *name, *module; enum width out, in; int input; } projection;
static const projection projections[LINEARS] = {
//               --targets  in the file         out     in      input
    [Q_PROJ]    = {"q",     "self_attn.q_proj", ATT,    DIM,    0},
    [K_PROJ]    = {"k",     "self_attn.k_proj", KV,     DIM,    0},
    [V_PROJ]    = {"v",     "self_attn.v_proj", KV,     DIM,    0},
    [O_PROJ]    = {"o",     "self_attn.o_proj", DIM,    ATT,    1},
    [GATE_PROJ] = {"gate",  "mlp.gate_proj",    HIDDEN, DIM,    2},
    [UP_PROJ]   = {"up",    "mlp.up_proj",      HIDDEN, DIM,    2},
    [DOWN_PROJ] = {"down",  "mlp.down_proj",    DIM,    HIDDEN, 3},
};

static const char *module_name(int i) { return strchr(projections[i].module, '.') + 1; }       // q_proj

struct linear {
    const projection *is;
    int depth;                  // of which layer
    mat W, dW;                  // (out, in); dW only where W itself trains, and while lora-ga seeks its start
    mat bias, dbias;            // (out), in the models that have one here
    const method *method;
    int first, last;            // is it the first, the last of those that read the same x with this method?
    double scale;               // s of y += s (x Aᵀ) Bᵀ
    mat A, dA, B, dB;           // lora: (r, in), (out, r). bat: B (out/r, r, r). bat-row: B (in/r, r, r)
    mat A0, B0;                 // pissa, olora, lora-ga: the start of A and B
    mat D, dD;                  // bone (r, out), mini (r, mini_r), frozen (out, in)
    mat h;                      // lora: x Aᵀ (N, r), kept for the backward pass
    mat mag, dmag;              // dora: the magnitude m (out)
    mat z, VA;                  // dora: x Vᵀ (N, out), V Aᵀ (out, r), V = W + s B A
    mat gain, dgain;            // dora: m/‖V_o‖ (out, 1)
    mat squares, dsquares;      // dora: ‖V_o‖² (out, 1)
};

typedef struct {
    mat norm1, dnorm1, norm2, dnorm2;                           // (dim)
    mat q_norm, dq_norm, k_norm, dk_norm;                       // (head_dim), in Qwen3
    int window;                 // how many keys a query sees, its own among them; INT_MAX: all before it
    union {
        struct { linear q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj; };
        linear linears[LINEARS];                                // the same, to be counted
    };
    mat x;                      // (N, dim) the residual stream on entry
    mat q, att;                 // (N, heads·head_dim)
    mat k, v;                   // (N, kv_heads·head_dim)
    mat q_raw, k_raw;           // Qwen3: q and k before their norms
    mat lse;                    // (N, heads) log Σ exp of each row of scores, which itself is not kept
    mat mid;                    // (N, dim) the residual stream after attention
    mat gate, up;               // (N, hidden)
    mat k_cache, v_cache;       // generation: (sequences·length, kv_heads·head_dim)
} layer;

// Where a tensor lies. One block of memory a kind.
enum kind {
    BASE,                       // frozen matrix, stays mapped in the dtype of its file
    NORM,                       // frozen vector, copied to real
    PARAM,                      // trains: wide, with a gradient and two AdamW moments at the same offset
    START,                      // wide, frozen: A0, B0
    ACT,                        // real, one row a token
    STAT,                       // wide, one row a token
    WORK,                       // real, anything else that is overwritten all the time
    AUX,                        // wide, the same: dora's norms
    CACHE,                      // real, keys and values of generation
    KINDS
};

typedef struct {
    char name[112];             // the name in Hugging Face's or PEFT's file
    enum kind kind;
    shape shape;
    mat *value, *grad;
    mat m1, m2;                 // AdamW's moments of a PARAM
    double rate;                // its learning rate, times the run's: LoRA+ makes B faster
    linear *of;                 // the linear layer that it belongs to, or NULL
} tensor;

// What the run asks of the model.
typedef struct {
    const method *method;
    int rank, mini_r, targets;  // targets: a bit for each of projections that has an adapter (in some layer)
    json_t *modules;            // an adapter's own "target_modules", or NULL: they choose in each layer anew,
                                // and layout() sets `targets` to what they chose in any
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
    layer *layers;
    linear **linears;                                   // those of all layers, in their order
    mat last;                                           // (N, dim) the residual stream at the end
    mat rope;                                           // (positions, head_dim) [cos | sin]
    mat xn, hid;                                        // (N, dim), (N, hidden): made again on the way back
    mat dx, dxn, dq, dk, dv, datt, dgate, dup, dhid;    // gradients of one layer at a time
    mat dq_raw, dk_raw;
    mat hs, hn, dhs, dhn, logits;                       // the head: `chunk` rows at a time
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
    if (kind != BASE) m->used[kind] += (elements(*value) + 15) / 16 * 16;              // in steps of 64 bytes
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

static int has_bias(const config *c, int which)
{
    if (which <= V_PROJ) return c->qkv_bias;
    return which == O_PROJ ? c->o_bias : c->mlp_bias;
}

// One linear layer: W, its bias, and the tensors of its method. A linear that the run does not target has the
// method `full`, whose W is then frozen.
static void linear_layout(model *m, linear *l, int which, int depth)
{
    const projection *is = &projections[which];
    char module[96], adapter[128];
    snprintf(module, sizeof module, "model.layers.%d.%s", depth, is->module);
    snprintf(adapter, sizeof adapter, "base_model.model.%s", module);
    if (m->p.modules && m->p.selects(m->p.modules, module)) m->p.targets |= 1 << which;
    int targeted = m->p.modules ? m->p.selects(m->p.modules, module) : m->p.targets >> which & 1;
    enum kind matrix = full_training(m) ? PARAM : BASE;
    enum kind vector = full_training(m) ? PARAM : NORM;
    shape size = SHAPE(width_of(&m->c, is->out), width_of(&m->c, is->in));
    ptrdiff_t first = arrlen(m->tensors);
    l->is = is;
    l->depth = depth;
    declare(m, matrix, &l->W, &l->dW, size, "%s.weight", module);
    if (has_bias(&m->c, which)) declare(m, vector, &l->bias, &l->dbias, SHAPE(size.n[0]), "%s.bias", module);
    l->method = targeted ? m->p.method : &methods[0];
    if (has_adapter(l)) l->method->layout(m, l, adapter);
    for (ptrdiff_t i = first; i < arrlen(m->tensors); i++) m->tensors[i].of = l;
    arrput(m->linears, l);
}

// q, k, v share their input, and so do gate, up: marks the first and the last of those that have an adapter.
static void mark_shared(layer *L)
{
    for (int i = 0; i < LINEARS; i++) {
        linear *l = &L->linears[i];
        l->first = l->last = has_adapter(l);
        for (int j = 0; j < LINEARS; j++) {
            int shares = projections[j].input == projections[i].input && has_adapter(&L->linears[j]);
            if (shares && j < i) l->first = 0;
            if (shares && j > i) l->last = 0;
        }
    }
}

// The norms and seven linears of layer i, with their adapters.
static void layer_weights(model *m, layer *L, int i)
{
    enum kind vector = full_training(m) ? PARAM : NORM;
    shape dim = SHAPE(m->c.dim);
    shape head = SHAPE(m->c.head_dim);
    L->window = i < m->c.full_layers ? INT_MAX : m->c.window;
    declare(m, vector, &L->norm1, &L->dnorm1, dim, "model.layers.%d.input_layernorm.weight", i);
    for (int w = Q_PROJ; w <= O_PROJ; w++) linear_layout(m, &L->linears[w], w, i);
    if (m->c.qk_norm) {
        declare(m, vector, &L->q_norm, &L->dq_norm, head, "model.layers.%d.self_attn.q_norm.weight", i);
        declare(m, vector, &L->k_norm, &L->dk_norm, head, "model.layers.%d.self_attn.k_norm.weight", i);
    }
    declare(m, vector, &L->norm2, &L->dnorm2, dim, "model.layers.%d.post_attention_layernorm.weight", i);
    for (int w = GATE_PROJ; w <= DOWN_PROJ; w++) linear_layout(m, &L->linears[w], w, i);
    mark_shared(L);
}

// How full the blocks ACT and STAT are. layout() sets them back to an earlier level: the next layer's tensors
// then lie in the memory of those that were declared above that level.
typedef struct { size_t act, stat; } level;
static level level_now(const model *m) { return (level){m->used[ACT], m->used[STAT]}; }

/* What the forward pass of layer i leaves for the backward pass. Returns the level at which layer i+1 begins;
   what layer i has above it is overwritten. So the order of the declarations decides how long a tensor lives:

       block ACT:  … x | next | h of the adapters | q  k  v  att  mid | gate  up |
                       ↑                          ↑                   ↑          ↑
       layer i+1       not training               --recompute 2       1          0
       begins at

   `next`, the x of layer i+1, comes first: layer i+1 reads it. Where nothing trains, every layer begins at
   the same place, and `next` takes the place of x, which was read into mid before. What the adapters of a
   layer keep comes behind it, for not every layer need have the same.                                     */
static level layer_activations(model *m, layer *L, int i)
{
    const config *c = &m->c;
    int N = m->p.tokens;
    int q = width_of(c, ATT);
    int kv = width_of(c, KV);
    int cache = m->p.cache_rows;
    level kept = level_now(m);
    declare(m, ACT, &L->q, NULL, SHAPE(N, q), "layers.%d.q", i);
    declare(m, ACT, &L->k, NULL, SHAPE(N, kv), "layers.%d.k", i);
    if (c->qk_norm) {
        declare(m, ACT, &L->q_raw, NULL, SHAPE(N, q), "layers.%d.q_raw", i);
        declare(m, ACT, &L->k_raw, NULL, SHAPE(N, kv), "layers.%d.k_raw", i);
    }
    declare(m, ACT, &L->v, NULL, SHAPE(N, kv), "layers.%d.v", i);
    declare(m, ACT, &L->att, NULL, SHAPE(N, q), "layers.%d.att", i);
    declare(m, STAT, &L->lse, NULL, SHAPE(N, c->heads), "layers.%d.lse", i);
    declare(m, ACT, &L->mid, NULL, SHAPE(N, c->dim), "layers.%d.mid", i);
    if (m->p.recompute < 2) kept = level_now(m);
    declare(m, ACT, &L->gate, NULL, SHAPE(N, c->hidden), "layers.%d.gate", i);
    declare(m, ACT, &L->up, NULL, SHAPE(N, c->hidden), "layers.%d.up", i);
    if (m->p.recompute < 1) kept = level_now(m);
    if (!cache) return kept;
    declare(m, CACHE, &L->k_cache, NULL, SHAPE(cache, kv), "layers.%d.k_cache", i);
    declare(m, CACHE, &L->v_cache, NULL, SHAPE(cache, kv), "layers.%d.v_cache", i);
    return kept;
}

// What exists once, for all layers: the head's tensors, the methods' work space, the gradients of one layer.
static void work_layout(model *m)
{
    const config *c = &m->c;
    int N = m->p.tokens;
    int q = width_of(c, ATT);
    int kv = width_of(c, KV);
    int chunk = dev_chunk(c->vocab);
    chunk = chunk < 16 ? 16 : chunk;
    chunk = chunk < N ? chunk : N;
    m->chunk = chunk;
    declare(m, ACT, &m->xn, NULL, SHAPE(N, c->dim), "xn");
    declare(m, ACT, &m->hid, NULL, SHAPE(N, c->hidden), "hid");
    declare(m, WORK, &m->rope, NULL, SHAPE(m->p.positions, c->head_dim), "rope");
    declare(m, WORK, &m->hs, NULL, SHAPE(chunk, c->dim), "head.x");
    declare(m, WORK, &m->hn, NULL, SHAPE(chunk, c->dim), "head.xn");
    declare(m, WORK, &m->logits, NULL, SHAPE(chunk, c->vocab), "logits");
    declare(m, STAT, &m->losses, NULL, SHAPE(N, 1), "losses");
    for (mat **w = (mat *[]){&m->narrow, &m->dnarrow, &m->broad, &m->dbroad, NULL}; *w; w++)
        if (elements(**w)) declare(m, WORK, *w, NULL, SHAPE((*w)->rows, (*w)->cols), "work");
    enum kind w = m->p.train ? WORK : AUX;              // a merged weight stays wide until it is written
    if (elements(m->weight)) declare(m, w, &m->weight, NULL, SHAPE(m->weight.rows, m->weight.cols), "work");
    if (!m->p.train) return;
    declare(m, WORK, &m->dhs, NULL, SHAPE(chunk, c->dim), "head.dx");
    declare(m, WORK, &m->dhn, NULL, SHAPE(chunk, c->dim), "head.dxn");
    declare(m, ACT, &m->dx, NULL, SHAPE(N, c->dim), "dx");
    declare(m, ACT, &m->dxn, NULL, SHAPE(N, c->dim), "dxn");
    declare(m, ACT, &m->dq, NULL, SHAPE(N, q), "dq");
    declare(m, ACT, &m->dk, NULL, SHAPE(N, kv), "dk");
    if (c->qk_norm) {
        declare(m, ACT, &m->dq_raw, NULL, SHAPE(N, q), "dq_raw");
        declare(m, ACT, &m->dk_raw, NULL, SHAPE(N, kv), "dk_raw");
    }
    declare(m, ACT, &m->dv, NULL, SHAPE(N, kv), "dv");
    declare(m, ACT, &m->datt, NULL, SHAPE(N, q), "datt");
    declare(m, ACT, &m->dgate, NULL, SHAPE(N, c->hidden), "dgate");
    declare(m, ACT, &m->dup, NULL, SHAPE(N, c->hidden), "dup");
    declare(m, ACT, &m->dhid, NULL, SHAPE(N, c->hidden), "dhid");
}

// Every tensor of the model, one line each.
static void layout(model *m)
{
    const config *c = &m->c;
    enum kind matrix = full_training(m) ? PARAM : BASE;
    enum kind vector = full_training(m) ? PARAM : NORM;
    memset(m->used, 0, sizeof m->used);
    arrsetlen(m->tensors, 0);
    arrsetlen(m->linears, 0);
    m->trainable = 0;
    m->narrow = m->dnarrow = m->broad = m->dbroad = m->weight = (mat){0};
    declare(m, matrix, &m->embed, &m->dembed, SHAPE(c->vocab, c->dim), "model.embed_tokens.weight");
    declare(m, ACT, &m->layers[0].x, NULL, SHAPE(m->p.tokens, c->dim), "layers.0.x");
    level most = {0, 0};
    for (int i = 0; i < c->layers; i++) {
        level before = level_now(m);
        mat *next = i + 1 < c->layers ? &m->layers[i + 1].x : &m->last;
        declare(m, ACT, next, NULL, SHAPE(m->p.tokens, c->dim), "layers.%d.x", i + 1);
        layer_weights(m, &m->layers[i], i);
        level kept = layer_activations(m, &m->layers[i], i), full = level_now(m);
        if (!m->p.train) kept = before;
        if (full.act > most.act) most.act = full.act;
        if (full.stat > most.stat) most.stat = full.stat;
        m->used[ACT] = kept.act;
        m->used[STAT] = kept.stat;
    }
    m->used[ACT] = most.act;                            // what comes now is used beside every layer
    m->used[STAT] = most.stat;
    declare(m, vector, &m->norm, &m->dnorm, SHAPE(c->dim), "model.norm.weight");
    if (c->tied) {
        m->head = m->embed;
        m->dhead = m->dembed;
    } else declare(m, matrix, &m->head, &m->dhead, SHAPE(c->vocab, c->dim), "lm_head.weight");
    work_layout(m);
    if (m->p.modules && !m->p.targets)
        refuse(m, "the adapter's \"target_modules\" name no linear layer of this model");
}

// The first walk alone: what a method would train and need on this config. Allocates nothing.
static void model_measure(model *m, config c, plan p)
{
    m->c = c;
    m->p = p;
    m->layers = alloc((size_t)c.layers, sizeof *m->layers);
    layout(m);
}

// Gives the lists back that model_measure() made.
static void model_unmeasure(model *m)
{
    arrfree(m->tensors);
    arrfree(m->linears);
    free(m->layers);
}

// Whether a tensor belongs to the base: its file has it.
static int of_base(const tensor *t)
{
    return !strncmp(t->name, "model.", 6) || !strcmp(t->name, "lm_head.weight");
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
    n.normed = p->tokens * (m->c.qk_norm ? m->c.heads : 1);
    n.trained = 2 * (size_t)p->rank * (size_t)p->rank;                  // dora's A Aᵀ (r, r), made wider
    for (int i = 0; i < arrlen(m->tensors); i++) {
        const tensor *t = &m->tensors[i];
        mat v = *t->value;
        size_t size = elements(v);
        size_t padded = (size_t)v.batch * (size_t)v.rows * (size_t)pitch(v.cols);
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

// Frequency i of RoPE, in radians a position. Models that were stretched to longer texts turn slower, by
// `factor`: all frequencies ("linear", arXiv 2306.15595), or in Llama 3 those that do not turn often within
// the positions it was first trained on ("llama3"). `often` says how often that is: from 1 at high_freq turns
// and more down to 0 at low_freq and less.
static double rope_frequency(const config *c, int i)
{
    double frequency = pow(c->theta, -2.0 * i / c->head_dim);
    double turns = c->rope_original * frequency / (2 * acos(-1));
    double often = (turns - c->low_freq) / (c->high_freq - c->low_freq);
    if (c->rope == ROPE_LINEAR) often = 0;
    if (c->rope == ROPE_PLAIN) often = 1;
    often = fmin(fmax(often, 0), 1);
    return frequency * (often + (1 - often) / c->rope_factor);
}

// cos and sin of position × frequency, in Hugging Face's order: frequency i rotates the elements i and
// i + head_dim/2.
static void rope_table(model *m)
{
    int half = m->c.head_dim / 2;
    wide *table = alloc((size_t)m->p.positions * (size_t)half * 2, sizeof *table);
    for (int t = 0; t < m->p.positions; t++)
        for (int i = 0; i < half; i++) {
            double angle = t * rope_frequency(&m->c, i);
            table[t * 2 * half + i] = (wide)cos(angle);
            table[t * 2 * half + half + i] = (wide)sin(angle);
        }
    put(m->rope, table, TYPE_OF(wide));
    free(table);
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
    rope_table(m);
}

// The file of a tied model may hold the head too, if it equals the embedding. A head with numbers of its own
// is refused, because it would be lost.
static void check_tied(model *m)
{
    ptrdiff_t head = shgeti(m->file.tensors, "lm_head.weight");
    ptrdiff_t embed = shgeti(m->file.tensors, "model.embed_tokens.weight");
    if (head < 0) return;
    stored h = m->file.tensors[head].value;
    stored e = m->file.tensors[embed].value;
    size_t bytes = elements(e.data) * dtypes[e.data.type].size;
    int same = h.data.type == e.data.type && elements(h.data) == elements(e.data);
    if (!same || memcmp((const void *)(uintptr_t)h.data.p, (const void *)(uintptr_t)e.data.p, bytes))
        die("%s: lm_head.weight is not model.embed_tokens.weight, though config.json says "
            "\"tie_word_embeddings\": true; set it to false to use both, or remove one tensor", h.file);
}

// Old models hold RoPE's frequencies, which are computed here. The head of a tied model is looked at by
// check_tied().
static int spare_untied(const char *name) { return strstr(name, "rotary_emb.inv_freq") != NULL; }
static int spare_tied(const char *name) { return spare_untied(name) || !strcmp(name, "lm_head.weight"); }

// Points the base's matrices into the mapped file and copies the rest from it. Refuses a file that lacks a
// tensor, has one of another shape, or one that no Llama of this config has.
static void model_load(model *m, const char *dir)
{
    request *list = NULL;
    for (int i = 0; i < shlen(m->file.tensors); i++)
        if (!spare_untied(m->file.tensors[i].key)) expect_usable(m->file.tensors[i].value);
    for (int i = 0; i < arrlen(m->tensors); i++) {
        const tensor *t = &m->tensors[i];
        if (of_base(t)) arrput(list, request_for(t, "", t->value));
    }
    int (*spare)(const char *name) = m->c.tied ? spare_tied : spare_untied;
    m->reads_file = checkpoint_fetch(&m->file, dir, list, "config.json", spare);
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
typedef struct {
    int tokens, targets, rows;  // rows: how many sequences
    int *ids, *pos;             // (tokens): what is read, and its place in its sequence
    int *target_row, *label;    // (targets): the token that predicts, and the id it should predict
    span *spans;                // (rows): where each sequence begins, and which keys it sees
    int cached;                 // generation: keys and values join the cache, and spans name its rows
} batch;

// Refuses a micro-batch that would read or write beyond the memory of the plan.
static void batch_check(const model *m, const batch *b)
{
    int ok = b->tokens <= m->p.tokens;
    int keys = b->cached ? m->p.cache_rows : b->tokens;
    if (!ok) die("a micro-batch of %d tokens exceeds the plan of %d", b->tokens, m->p.tokens);
    for (int i = 0; i < b->tokens; i++)
        ok &= b->ids[i] >= 0 && b->ids[i] < m->c.vocab && b->pos[i] >= 0 && b->pos[i] < m->p.positions;
    for (int i = 0; i < b->targets; i++) {
        ok &= b->target_row[i] >= 0 && b->target_row[i] < b->tokens;
        ok &= b->label[i] >= 0 && b->label[i] < m->c.vocab;
    }
    for (int i = 0; i < b->rows; i++) {
        span s = b->spans[i];
        ok &= s.q >= 0 && s.nq >= 0 && s.q + s.nq <= b->tokens;
        ok &= s.k >= 0 && s.nk >= s.nq && s.k + s.nk <= keys;
    }
    if (!ok) die("a micro-batch holds an id, a position or a row that the plan has no place for");
}

// Copies the micro-batch to the device and gives every activation its N rows.
static void batch_enter(model *m, const batch *b)
{
    batch_check(m, b);
    for (int i = 0; i < arrlen(m->tensors); i++) {
        tensor *t = &m->tensors[i];
        if (t->kind == ACT || t->kind == STAT) *t->value = rows_of(*t->value, 0, b->tokens);
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

// Generation: this step's keys and values join the cache, behind those of earlier steps.
static void cache_append(layer *L, const batch *b)
{
    for (int i = 0; i < b->rows; i++) {
        span s = b->spans[i];
        int at = s.k + s.nk - s.nq;
        copy(rows_of(L->k_cache, at, s.nq), rows_of(L->k, s.q, s.nq));
        copy(rows_of(L->v_cache, at, s.nq), rows_of(L->v, s.q, s.nq));
    }
}

// Every head of every row on a row of its own: (N, heads·head_dim) as (N·heads, head_dim).
static mat heads_of(const model *m, mat x)
{
    int d = m->c.head_dim;
    return shaped(x, 1, x.rows * (x.cols / d), d);
}

//  x → mid = x + Wo attention(rope(Wq n), rope(Wk n), Wv n),  n = rmsnorm(x)
//  Qwen3: rope(rmsnorm(Wq n)), each head normed alone, and k likewise
static void attention_block(model *m, layer *L, const batch *b)
{
    const config *c = &m->c;
    const mat none = {0};
    rmsnorm_forward(m->xn, L->mid, L->x, L->norm1, c->eps);                         // mid = x
    linear_forward(m, &L->q_proj, c->qk_norm ? L->q_raw : L->q, m->xn, SET);        // (N, heads·head_dim)
    linear_forward(m, &L->k_proj, c->qk_norm ? L->k_raw : L->k, m->xn, SET);        // (N, kv_heads·head_dim)
    linear_forward(m, &L->v_proj, L->v, m->xn, SET);
    if (c->qk_norm) {
        rmsnorm_forward(heads_of(m, L->q), none, heads_of(m, L->q_raw), L->q_norm, c->eps);
        rmsnorm_forward(heads_of(m, L->k), none, heads_of(m, L->k_raw), L->k_norm, c->eps);
    }
    rope(L->q, m->pos, m->rope, +1);
    rope(L->k, m->pos, m->rope, +1);
    mat k = L->k;
    mat v = L->v;
    if (b->cached) {
        cache_append(L, b);
        k = L->k_cache;
        v = L->v_cache;
    }
    attention_forward(L->att, L->lse, L->q, k, v, c->head_dim, L->window, b->spans, b->rows);
    linear_forward(m, &L->o_proj, L->mid, L->att, ADD);                             // mid += o(att)
}

//  gate = Wgate n,  up = Wup n,  n = rmsnorm(mid);  next = mid
static void gate_and_up(model *m, layer *L, mat next)
{
    rmsnorm_forward(m->xn, next, L->mid, L->norm2, m->c.eps);
    linear_forward(m, &L->gate_proj, L->gate, m->xn, SET);              // (N, hidden)
    linear_forward(m, &L->up_proj, L->up, m->xn, SET);
}

//  mid → next = mid + Wdown (silu(gate) ⊙ up)
static void layer_forward(model *m, layer *L, mat next, const batch *b)
{
    attention_block(m, L, b);
    gate_and_up(m, L, next);
    swiglu_forward(m->hid, L->gate, L->up);
    linear_forward(m, &L->down_proj, next, m->hid, ADD);                // next += down(hid)
}

// The lines of layer_forward from the last to the first. On entry m->dx is d(next), on return it is dx. xn
// and hid are made again, and with --recompute also what the forward pass of the next layer has overwritten.
// Of the linears that read the same x the first writes its gradient (SET), the others add theirs (ADD).
// dx_wanted is 0 in the first layer, unless the embedding trains.
static void layer_backward(model *m, layer *L, const batch *b, int dx_wanted)
{
    const config *c = &m->c;
    const mat none = {0};
    if (m->p.recompute == 2) attention_block(m, L, b);
    if (m->p.recompute) gate_and_up(m, L, none);
    swiglu_forward(m->hid, L->gate, L->up);
    linear_backward(m, &L->down_proj, m->dhid, m->dx, m->hid, SET);     // next = mid + down(hid)
    swiglu_backward(m->dgate, m->dup, m->dhid, L->gate, L->up);         // hid = silu(gate) up
    rmsnorm_forward(m->xn, none, L->mid, L->norm2, c->eps);
    linear_backward(m, &L->gate_proj, m->dxn, m->dgate, m->xn, SET);
    linear_backward(m, &L->up_proj, m->dxn, m->dup, m->xn, ADD);
    rmsnorm_backward(m->dx, L->dnorm2, m->dxn, L->mid, L->norm2, c->eps);   // d(next) + …: dx is now d(mid)

    linear_backward(m, &L->o_proj, m->datt, m->dx, L->att, SET);        // mid = x + o(att)
    attention_backward(m->dq, m->dk, m->dv, m->datt, L->q, L->k, L->v, L->att, L->lse,
                       c->head_dim, L->window, b->spans, b->rows);
    rope(m->dq, m->pos, m->rope, -1);
    rope(m->dk, m->pos, m->rope, -1);
    mat dq = c->qk_norm ? m->dq_raw : m->dq;
    mat dk = c->qk_norm ? m->dk_raw : m->dk;
    if (c->qk_norm) {                                                   // q = rmsnorm(q_raw), by heads
        zero(dq);
        zero(dk);
        rmsnorm_backward(heads_of(m, dq), L->dq_norm, heads_of(m, m->dq),
                         heads_of(m, L->q_raw), L->q_norm, c->eps);
        rmsnorm_backward(heads_of(m, dk), L->dk_norm, heads_of(m, m->dk),
                         heads_of(m, L->k_raw), L->k_norm, c->eps);
    }
    rmsnorm_forward(m->xn, none, L->x, L->norm1, c->eps);
    mat dxn = m->dxn;
    if (!dx_wanted) dxn.p = NULL;                                       // nothing below trains: skip dxn
    linear_backward(m, &L->q_proj, dxn, dq, m->xn, SET);
    linear_backward(m, &L->k_proj, dxn, dk, m->xn, ADD);
    linear_backward(m, &L->v_proj, dxn, m->dv, m->xn, ADD);
    mat dx = dx_wanted ? m->dx : none;
    rmsnorm_backward(dx, L->dnorm1, m->dxn, L->x, L->norm1, c->eps);    // d(mid) + …: dx is now d(x)
}

// Embedding and layers, up to m->last.
static void model_forward(model *m, const batch *b)
{
    batch_enter(m, b);
    embedding_forward(m->layers[0].x, m->embed, m->ids);
    for (int i = 0; i < m->c.layers; i++) {
        mat next = i + 1 < m->c.layers ? m->layers[i + 1].x : m->last;
        layer_forward(m, &m->layers[i], next, b);
    }
    if (m->reads_file) checkpoint_unchanged(&m->file);
}

// Logits of up to a chunk of rows, into m->logits: the rows gathered, normed, and multiplied with the head.
static void head_forward(model *m, dev_ints rows, int n)
{
    for (mat **w = (mat *[]){&m->hs, &m->hn, &m->dhs, &m->dhn, &m->logits, NULL}; *w; w++)
        **w = rows_of(**w, 0, n);
    embedding_forward(m->hs, m->last, rows);                            // hs[i] = last[row_i]
    rmsnorm_forward(m->hn, (mat){0}, m->hs, m->norm, m->c.eps);
    matmul_nt(m->logits, m->hn, m->head, 1, SET);                       // (n, vocab)
}

// Returns Σ loss of the micro-batch. scale ≠ 0: also m->dx = scale · d(Σ loss)/d(last), and the head's
// gradients. A chunk of rows at a time, so that (N, vocab) never stands in memory. Tokens without a target
// have no logits.
static double head_loss(model *m, const batch *b, double scale)
{
    if (scale) zero(m->dx);
    for (int i = 0; i < b->targets; i += m->chunk) {
        int n = b->targets - i < m->chunk ? b->targets - i : m->chunk;
        head_forward(m, m->target_row + i, n);
        cross_entropy(rows_of(m->losses, i, n), m->logits, m->label + i, scale);
        if (!scale) continue;

        // From here on m->logits holds dlogits: cross_entropy wrote scale · (softmax − one-hot) over them.
        zero(m->dhs);
        matmul_tn(m->dhead, m->logits, m->hn, 1, ADD);          // logits = hn headᵀ:    dhead += dlogitsᵀ hn
        matmul_nn(m->dhn, m->logits, m->head, 1, SET);          //                       dhn = dlogits head
        rmsnorm_backward(m->dhs, m->dnorm, m->dhn, m->hs, m->norm, m->c.eps);
        embedding_backward(m->dx, m->dhs, m->target_row + i);   // hs[i] = last[row_i]:  dx[row_i] += dhs[i]
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
        layer_backward(m, &m->layers[i], b, i > 0 || m->dembed.p);
    embedding_backward(m->dembed, m->dx, m->ids);
    return loss;
}

#endif
