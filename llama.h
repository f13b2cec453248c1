/*  llama.h: Llama2 and its kin (Mistral, Qwen2, Qwen3) by hand.

      1  config.json                   which fields there are, and what they mean together
      2  the tensors                   of a layer, and of all layers
      3  forward and backward          mid = x + Wo attention(…), next = mid + Wdown (silu(gate) ⊙ up)   */

#ifndef LLAMA_H
#define LLAMA_H
#include "model.h"

// ---- 1  config.json ---------------------------------------------------------------------------------------

// The families that are Llama but for what stands here.
static const family llama_families[] = {
    {"llama",   "Llama",   .max_pos = 2048,   .attention_bias = 1, .mlp_bias = 1},
    {"mistral", "Mistral", .max_pos = 131072, .kv_heads = 8, .window = 4096},
    {"qwen2",   "Qwen2",   .max_pos = 32768,  .kv_heads = 32, .window = 4096, .window_switch = 1,
                           .qkv_bias = 1},
    {"qwen3",   "Qwen3",   .max_pos = 32768,  .kv_heads = 32, .window = 4096, .window_switch = 1,
                           .head_dim = 128, .attention_bias = 1, .qk_norm = 1},
    {.name = NULL},
};

static const config_field llama_fields[] = {
    {"hidden_size",             WHOLE,  TO(dim),        REQUIRED, 1, 1 << 24,  NULL},
    {"intermediate_size",       WHOLE,  TO(hidden),     REQUIRED, 1, 1 << 24,  NULL},
    {"num_hidden_layers",       WHOLE,  TO(layers),     REQUIRED, 1, 1 << 24,  NULL},
    {"num_attention_heads",     WHOLE,  TO(heads),      REQUIRED, 1, 1 << 24,  NULL},
    {"num_key_value_heads",     WHOLE,  TO(kv_heads),   0,        1, 1 << 24,  NULL},    // missing: `family`
    {"head_dim",                WHOLE,  TO(head_dim),   0,        1, 1 << 24,  NULL},
    {"vocab_size",              WHOLE,  TO(vocab),      REQUIRED, 1, 1 << 24,  NULL},
    {"max_position_embeddings", WHOLE,  TO(max_pos),    0,        1, 1 << 24,  NULL},
    {"sliding_window",          WHOLE,  TO(window),     0,        1, 1 << 24,  NULL},
    {"max_window_layers",       WHOLE,  TO(full_layers), 28,      0, 1 << 24,  NULL},
    {"use_sliding_window",      SWITCH, TO(use_window), 0,        0, 1,        NULL},
    {"rms_norm_eps",            NUMBER, TO(eps),        1e-6,     1e-30, 1,    NULL},
    {"rope_theta",              NUMBER, TO(theta),      10000,    1e-3, 1e15,  NULL},
    {"initializer_range",       NUMBER, TO(init_range), 0.02,     1e-30, 1e3,  NULL},
    {"attention_dropout",       NUMBER, TO(dropout),    0,        0, 1,        NULL},
    {"tie_word_embeddings",     SWITCH, TO(tied),       0,        0, 1,        NULL},
    {"attention_bias",          SWITCH, TO(attention_bias), 0,    0, 1,        NULL},
    {"mlp_bias",                SWITCH, TO(mlp_bias),   0,        0, 1,        NULL},
    {"partial_rotary_factor",   NUMBER, NOWHERE,        1,        0, 1e9,      NULL},
    {"rope_interleaved",        SWITCH, NOWHERE,        0,        0, 1,        NULL},
    {"use_mrope",               SWITCH, NOWHERE,        0,        0, 1,        NULL},
    {"is_causal",               SWITCH, NOWHERE,        1,        0, 1,        NULL},
    {"hidden_act",              WORD,   NOWHERE,        0,        0, 0,        "silu"},
    {.name = NULL},
};

// RoPE's fields, in rope_scaling (transformers 4) or rope_parameters (5). The kinds that are built, and their
// numbers.
static void config_rope(config *c, const json_t *json, const char *path)
{
    static const struct { const char *name; enum rope rope; const char *fields[4]; } kinds[] = {
        {"default", ROPE_PLAIN,  {NULL}},
        {"linear",  ROPE_LINEAR, {"factor", NULL}},
        {"llama3",  ROPE_LLAMA3, {"factor", "low_freq_factor", "high_freq_factor",
                                  "original_max_position_embeddings"}},
    };
    enum { KINDS_OF_ROPE = sizeof kinds / sizeof *kinds };
    c->rope_factor = 1;
    static const char *const places[] = {"rope_scaling", "rope_parameters", NULL};
    for (const char *const *name = places; *name; name++) {
        json_t *rope = json_object_get(json, *name), *value;
        const char *field, *kind = string_field(rope, "rope_type");
        int k = 0;
        if (!rope || json_is_null(rope)) continue;
        if (!json_is_object(rope)) die("%s: \"%s\" must be an object or null", path, *name);
        if (!kind) kind = string_field(rope, "type");
        while (kind && k < KINDS_OF_ROPE && strcmp(kind, kinds[k].name)) k++;
        if (k == KINDS_OF_ROPE)
            die("%s: \"%s\" of type \"%s\" is not built, only default, linear and llama3", path, *name, kind);
        json_object_foreach(rope, field, value) {
            int known = !strcmp(field, "rope_theta") || !strcmp(field, "rope_type") || !strcmp(field, "type");
            known |= !strcmp(field, "partial_rotary_factor") && json_number_value(value) == 1;
            for (int i = 0; i < 4 && kinds[k].fields[i]; i++) known |= !strcmp(field, kinds[k].fields[i]);
            if (!known && !json_is_null(value))
                die("%s: \"%s\" in \"%s\" is not built for RoPE of type \"%s\"",
                    path, field, *name, kinds[k].name);
        }
        c->rope = kinds[k].rope;
        c->theta = config_number(rope, path, "rope_theta", c->theta);
        if (c->rope != ROPE_PLAIN) c->rope_factor = config_number(rope, path, "factor", REQUIRED);
        if (c->rope != ROPE_LLAMA3) continue;
        c->low_freq = config_number(rope, path, "low_freq_factor", REQUIRED);
        c->high_freq = config_number(rope, path, "high_freq_factor", REQUIRED);
        int original = config_int(json, path, "original_max_position_embeddings", c->max_pos);
        c->rope_original = config_int(rope, path, "original_max_position_embeddings", original);
        if (!(c->low_freq < c->high_freq))
            die("%s: \"low_freq_factor\" %g must be less than \"high_freq_factor\" %g",
                path, c->low_freq, c->high_freq);
    }
}

// What a family says where config.json leaves a field out, and where null means something of its own.
static void config_defaults(config *c, const json_t *json)
{
    const family *f = c->family;
    if (!json_object_get(json, "num_key_value_heads")) c->kv_heads = f->kv_heads;
    if (!json_object_get(json, "sliding_window")) c->window = f->window;
    if (!c->max_pos) c->max_pos = f->max_pos;
    if (!c->head_dim) c->head_dim = f->head_dim ? f->head_dim : c->dim / c->heads;
    if (!c->kv_heads) c->kv_heads = c->heads;
    if (!f->window || !c->window || (f->window_switch && !c->use_window)) c->window = INT_MAX;
    if (!f->window_switch || c->window == INT_MAX) c->full_layers = 0;
}

static void config_biases(config *c, const char *path)
{
    const family *f = c->family;
    if ((c->attention_bias && !f->attention_bias && !f->qkv_bias) || (c->mlp_bias && !f->mlp_bias))
        die("%s: \"%s\" is true, which model_type %s does not have", path,
            c->mlp_bias ? "mlp_bias" : "attention_bias", f->model_type);
    c->qkv_bias = f->qkv_bias || c->attention_bias;
    c->o_bias = f->attention_bias && c->attention_bias;
    c->qk_norm = f->qk_norm;
}

// "layer_types", where it is, says which layers have a window in place of "max_window_layers": the first ones
// may be without, and all others have it.
static void config_layer_types(config *c, const json_t *json, const char *path)
{
    json_t *list = json_object_get(json, "layer_types"), *item;
    size_t i;
    int full = 0, windows = 0;
    if (!c->family->window_switch || !list || json_is_null(list)) return;
    json_array_foreach(list, i, item) {
        const char *type = json_is_string(item) ? json_string_value(item) : "no text";
        int sees_all = !strcmp(type, "full_attention");
        if (!sees_all && strcmp(type, "sliding_attention"))
            die("%s: layer %zu in \"layer_types\" is %s, expected full_attention or sliding_attention",
                path, i, type);
        if (sees_all && windows)
            die("%s: \"layer_types\" has full_attention behind sliding_attention, which is not built", path);
        full += sees_all;
        windows += !sees_all;
    }
    if (full + windows != c->layers)
        die("%s: \"layer_types\" must be a list of %d, one for each of num_hidden_layers", path, c->layers);
    if (windows && c->window == INT_MAX)
        die("%s: \"layer_types\" has sliding_attention, but no window is set (sliding_window, "
            "use_sliding_window)", path);
    if (c->window != INT_MAX) c->full_layers = full;
}

// What the fields mean together.
static void llama_config(config *c, const json_t *json, const char *path)
{
    config_defaults(c, json);
    config_biases(c, path);
    config_layer_types(c, json, path);
    config_rope(c, json, path);
    if (c->heads % c->kv_heads)
        die("%s: %d heads cannot share %d key-value heads evenly", path, c->heads, c->kv_heads);
    if (!c->head_dim) die("%s: %d heads are more than hidden_size %d", path, c->heads, c->dim);
    if (c->head_dim % 2) die("%s: head_dim %d is odd, RoPE rotates halves", path, c->head_dim);
    if ((long)c->heads * c->head_dim > 1 << 24)
        die("%s: %d heads of %d are too wide", path, c->heads, c->head_dim);
}

// ---- 2  the tensors ---------------------------------------------------------------------------------------

// A layer's own tensors.
typedef struct {
    mat norm1, dnorm1, norm2, dnorm2;                           // (dim)
    mat q_norm, dq_norm, k_norm, dk_norm;                       // (head_dim), in Qwen3
    int window;                 // how many keys a query sees, its own among them; INT_MAX: all before it
    linear q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj;
    mat q, att;                 // (N, heads·head_dim)
    mat k, v;                   // (N, kv_heads·head_dim)
    mat q_raw, k_raw;           // Qwen3: q and k before their norms
    mat lse;                    // (N, heads) log Σ exp of each row of scores, which itself is not kept
    mat mid;                    // (N, dim) the residual stream after attention; in the last layer
    mat gate, up;               // (N, hidden)                                   a row a target
    mat k_cache, v_cache;       // generation: (sequences·length, kv_heads·head_dim)
} llama_layer;

// What exists once, for all layers.
typedef struct {
    mat rope;                                           // (positions, head_dim) [cos | sin]
    mat xn, hid;                                        // (N, dim), (N, hidden): made again on the way back
    mat picked, dpicked;                                // (targets, heads·head_dim) att of the last layer
    mat dxn, dq, dk, dv, datt, dgate, dup, dhid;        // gradients of one layer at a time
    mat dq_raw, dk_raw;
} llama;

static llama_layer *llama_at(const model *m, int i) { return (llama_layer *)m->layers + i; }

static int att_width(const config *c) { return c->heads * c->head_dim; }
static int kv_width(const config *c) { return c->kv_heads * c->head_dim; }

// The norms and seven linears of layer i, with their adapters.
static void llama_weights(model *m, int i)
{
    const config *c = &m->c;
    llama_layer *L = llama_at(m, i);
    enum kind vector = full_training(m) ? PARAM : NORM;
    shape row = SHAPE(c->dim);
    shape head = SHAPE(c->head_dim);
    int att = att_width(c);
    int kv = kv_width(c);
    int dim = c->dim;
    int hidden = c->hidden;
    L->window = i < c->full_layers ? INT_MAX : c->window;
    declare(m, vector, &L->norm1, &L->dnorm1, row, "model.layers.%d.input_layernorm.weight", i);
    //                                          --targets  in the file   reads  out     in      bias
    linear_layout(m, i, &L->q_proj,    (called){"q",    "self_attn.q_proj", 0, att,    dim,    c->qkv_bias});
    linear_layout(m, i, &L->k_proj,    (called){"k",    "self_attn.k_proj", 0, kv,     dim,    c->qkv_bias});
    linear_layout(m, i, &L->v_proj,    (called){"v",    "self_attn.v_proj", 0, kv,     dim,    c->qkv_bias});
    linear_layout(m, i, &L->o_proj,    (called){"o",    "self_attn.o_proj", 1, dim,    att,    c->o_bias});
    if (c->qk_norm) {
        declare(m, vector, &L->q_norm, &L->dq_norm, head, "model.layers.%d.self_attn.q_norm.weight", i);
        declare(m, vector, &L->k_norm, &L->dk_norm, head, "model.layers.%d.self_attn.k_norm.weight", i);
    }
    declare(m, vector, &L->norm2, &L->dnorm2, row, "model.layers.%d.post_attention_layernorm.weight", i);
    linear_layout(m, i, &L->gate_proj, (called){"gate", "mlp.gate_proj",    2, hidden, dim,    c->mlp_bias});
    linear_layout(m, i, &L->up_proj,   (called){"up",   "mlp.up_proj",      2, hidden, dim,    c->mlp_bias});
    linear_layout(m, i, &L->down_proj, (called){"down", "mlp.down_proj",    3, dim,    hidden, c->mlp_bias});
}

/* What the forward pass of layer i leaves for the backward pass. Returns the level at which layer i+1 begins;
   what layer i has above it is overwritten. So the order of the declarations decides how long a tensor lives:

       block ACT:  … x | next | h of the adapters | q  k  v  att  mid | gate  up |
                       ↑                          ↑                   ↑          ↑
       layer i+1       not training               --recompute 2       1          0
       begins at

   `next`, the x of layer i+1, comes first: layer i+1 reads it. Where nothing trains, every layer begins at
   the same place, and `next` takes the place of x, which was read into mid before. What the adapters of a
   layer keep comes behind it, for not every layer need have the same.                                     */
static level llama_activations(model *m, int i)
{
    const config *c = &m->c;
    llama_layer *L = llama_at(m, i);
    int N = m->p.tokens;
    int q = att_width(c);
    int kv = kv_width(c);
    int cache = m->p.cache_rows;
    int final = is_last(m, i);
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
    declare(m, ACT, &L->mid, NULL, SHAPE(N, c->dim), "layers.%d.mid", i)->by_target = final;
    if (m->p.recompute < 2) kept = level_now(m);
    declare(m, ACT, &L->gate, NULL, SHAPE(N, c->hidden), "layers.%d.gate", i)->by_target = final;
    declare(m, ACT, &L->up, NULL, SHAPE(N, c->hidden), "layers.%d.up", i)->by_target = final;
    if (m->p.recompute < 1) kept = level_now(m);
    if (!cache) return kept;
    declare(m, CACHE, &L->k_cache, NULL, SHAPE(cache, kv), "layers.%d.k_cache", i);
    declare(m, CACHE, &L->v_cache, NULL, SHAPE(cache, kv), "layers.%d.v_cache", i);
    return kept;
}

// The tensors of `llama`.
static void llama_work(model *m)
{
    const config *c = &m->c;
    llama *own = m->own;
    int N = m->p.tokens;
    int q = att_width(c);
    int kv = kv_width(c);
    declare(m, ACT, &own->picked, NULL, SHAPE(N, q), "picked")->by_target = 1;
    declare(m, ACT, &own->xn, NULL, SHAPE(N, c->dim), "xn");
    declare(m, ACT, &own->hid, NULL, SHAPE(N, c->hidden), "hid");
    declare(m, WORK, &own->rope, NULL, SHAPE(m->p.positions, c->head_dim), "rope");
    if (!m->p.train) return;
    declare(m, ACT, &own->dpicked, NULL, SHAPE(N, q), "dpicked")->by_target = 1;
    declare(m, ACT, &own->dxn, NULL, SHAPE(N, c->dim), "dxn");
    declare(m, ACT, &own->dq, NULL, SHAPE(N, q), "dq");
    declare(m, ACT, &own->dk, NULL, SHAPE(N, kv), "dk");
    if (c->qk_norm) {
        declare(m, ACT, &own->dq_raw, NULL, SHAPE(N, q), "dq_raw");
        declare(m, ACT, &own->dk_raw, NULL, SHAPE(N, kv), "dk_raw");
    }
    declare(m, ACT, &own->dv, NULL, SHAPE(N, kv), "dv");
    declare(m, ACT, &own->datt, NULL, SHAPE(N, q), "datt");
    declare(m, ACT, &own->dgate, NULL, SHAPE(N, c->hidden), "dgate");
    declare(m, ACT, &own->dup, NULL, SHAPE(N, c->hidden), "dup");
    declare(m, ACT, &own->dhid, NULL, SHAPE(N, c->hidden), "dhid");
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
    llama *own = m->own;
    int half = m->c.head_dim / 2;
    wide *table = alloc((size_t)m->p.positions * (size_t)half * 2, sizeof *table);
    for (int t = 0; t < m->p.positions; t++) {
        wide *of_t = table + (size_t)t * 2 * (size_t)half;
        for (int i = 0; i < half; i++) {
            double angle = t * rope_frequency(&m->c, i);
            of_t[i] = (wide)cos(angle);
            of_t[half + i] = (wide)sin(angle);
        }
    }
    put(own->rope, table, TYPE_OF(wide));
    free(table);
}

// ---- 3  forward and backward ------------------------------------------------------------------------------

// Generation: this step's keys and values join the cache, behind those of earlier steps.
static void cache_append(llama_layer *L, const batch *b)
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
//  The last layer: mid of the targets alone
static void attention_block(model *m, int i, const batch *b)
{
    const config *c = &m->c;
    llama *own = m->own;
    llama_layer *L = llama_at(m, i);
    const mat none = {0};
    int final = is_last(m, i);
    rmsnorm_forward(own->xn, final ? none : L->mid, m->x[i], L->norm1, c->eps);       // mid = x
    linear_forward(m, &L->q_proj, c->qk_norm ? L->q_raw : L->q, own->xn, SET);      // (N, heads·head_dim)
    linear_forward(m, &L->k_proj, c->qk_norm ? L->k_raw : L->k, own->xn, SET);      // (N, kv_heads·head_dim)
    linear_forward(m, &L->v_proj, L->v, own->xn, SET);
    if (c->qk_norm) {
        rmsnorm_forward(heads_of(m, L->q), none, heads_of(m, L->q_raw), L->q_norm, c->eps);
        rmsnorm_forward(heads_of(m, L->k), none, heads_of(m, L->k_raw), L->k_norm, c->eps);
    }
    rope(L->q, m->pos, own->rope, +1);
    rope(L->k, m->pos, own->rope, +1);
    mat k = L->k;
    mat v = L->v;
    if (b->cached) {
        cache_append(L, b);
        k = L->k_cache;
        v = L->v_cache;
    }
    attention_forward(L->att, L->lse, L->q, k, v, c->head_dim, L->window, b->spans, b->rows);
    if (final) {
        gather(m, L->mid, m->x[i]);                                                 // mid = x
        gather(m, own->picked, L->att);
    }
    linear_forward(m, &L->o_proj, L->mid, final ? own->picked : L->att, ADD);       // mid += o(att)
}

//  gate = Wgate n,  up = Wup n,  n = rmsnorm(mid);  next = mid
static void gate_and_up(model *m, llama_layer *L, mat next)
{
    llama *own = m->own;
    mat xn = rows_like(own->xn, L->mid);
    rmsnorm_forward(xn, next, L->mid, L->norm2, m->c.eps);
    linear_forward(m, &L->gate_proj, L->gate, xn, SET);                   // (N, hidden)
    linear_forward(m, &L->up_proj, L->up, xn, SET);
}

//  mid → next = mid + Wdown (silu(gate) ⊙ up)
static void llama_forward(model *m, int i, mat next, const batch *b)
{
    llama *own = m->own;
    llama_layer *L = llama_at(m, i);
    mat hid = rows_like(own->hid, L->mid);
    attention_block(m, i, b);
    gate_and_up(m, L, next);
    swiglu_forward(hid, L->gate, L->up);
    linear_forward(m, &L->down_proj, next, hid, ADD);                     // next += down(hid)
}

// The MLP's lines from the last to the first. d is d(next), and becomes d(mid). Of the linears that read the
// same x the first writes its gradient (SET), the others add theirs (ADD).
static void mlp_backward(model *m, llama_layer *L, mat d)
{
    llama *own = m->own;
    mat xn = rows_like(own->xn, d), dxn = rows_like(own->dxn, d);
    mat hid = rows_like(own->hid, d), dhid = rows_like(own->dhid, d);
    mat dgate = rows_like(own->dgate, d), dup = rows_like(own->dup, d);
    swiglu_forward(hid, L->gate, L->up);
    linear_backward(m, &L->down_proj, dhid, d, hid, SET);                 // next = mid + down(hid)
    swiglu_backward(dgate, dup, dhid, L->gate, L->up);                    // hid = silu(gate) up
    rmsnorm_forward(xn, (mat){0}, L->mid, L->norm2, m->c.eps);
    linear_backward(m, &L->gate_proj, dxn, dgate, xn, SET);
    linear_backward(m, &L->up_proj, dxn, dup, xn, ADD);
    rmsnorm_backward(d, L->dnorm2, dxn, L->mid, L->norm2, m->c.eps);      // d(next) + …: d is now d(mid)
}

// On entry m->dx (in the last layer m->dlast) is d(next), on return m->dx is d(m->x[i]). xn and hid are made
// again, and with --recompute also what the forward pass of the next layer has overwritten. dx_wanted is 0 in
// the first layer, unless the embedding trains.
static void llama_backward(model *m, int i, const batch *b, int dx_wanted)
{
    const config *c = &m->c;
    llama *own = m->own;
    llama_layer *L = llama_at(m, i);
    const mat none = {0};
    int final = is_last(m, i);
    if (m->p.recompute == 2) attention_block(m, i, b);
    if (m->p.recompute) gate_and_up(m, L, none);
    mlp_backward(m, L, final ? m->dlast : m->dx);

    if (final) {
        gather(m, own->picked, L->att);
        linear_backward(m, &L->o_proj, own->dpicked, m->dlast, own->picked, SET);   // mid = x + o(picked)
        scatter(m, own->datt, own->dpicked);
        scatter(m, m->dx, m->dlast);
    } else linear_backward(m, &L->o_proj, own->datt, m->dx, L->att, SET); // mid = x + o(att)
    attention_backward(own->dq, own->dk, own->dv, own->datt, L->q, L->k, L->v, L->att, L->lse,
                       c->head_dim, L->window, b->spans, b->rows);
    rope(own->dq, m->pos, own->rope, -1);
    rope(own->dk, m->pos, own->rope, -1);
    mat dq = c->qk_norm ? own->dq_raw : own->dq;
    mat dk = c->qk_norm ? own->dk_raw : own->dk;
    if (c->qk_norm) {                                                   // q = rmsnorm(q_raw), by heads
        zero(dq);
        zero(dk);
        rmsnorm_backward(heads_of(m, dq), L->dq_norm, heads_of(m, own->dq),
                         heads_of(m, L->q_raw), L->q_norm, c->eps);
        rmsnorm_backward(heads_of(m, dk), L->dk_norm, heads_of(m, own->dk),
                         heads_of(m, L->k_raw), L->k_norm, c->eps);
    }
    rmsnorm_forward(own->xn, none, m->x[i], L->norm1, c->eps);
    mat dxn = own->dxn;
    if (!dx_wanted) dxn.p = NULL;                                       // nothing below trains: skip dxn
    linear_backward(m, &L->q_proj, dxn, dq, own->xn, SET);
    linear_backward(m, &L->k_proj, dxn, dk, own->xn, ADD);
    linear_backward(m, &L->v_proj, dxn, own->dv, own->xn, ADD);
    mat dx = dx_wanted ? m->dx : none;
    rmsnorm_backward(dx, L->dnorm1, own->dxn, m->x[i], L->norm1, c->eps); // d(mid) + …: dx is now d(x)
}

static void llama_norm_layout(model *m)
{
    enum kind vector = full_training(m) ? PARAM : NORM;
    declare(m, vector, &m->norm, &m->dnorm, SHAPE(m->c.dim), "model.norm.weight");
}

static void llama_norm_forward(model *m, mat out, mat x)
{
    rmsnorm_forward(out, (mat){0}, x, m->norm, m->c.eps);
}

static void llama_norm_backward(model *m, mat dx, mat dout, mat x)
{
    rmsnorm_backward(dx, m->dnorm, dout, x, m->norm, m->c.eps);
}

// A key and a value a token, in each layer.
static double llama_cache_bytes(const config *c, int length)
{
    return 2.0 * c->layers * kv_width(c) * sizeof(real) * length;
}

// Old models hold RoPE's frequencies, which are computed here; the head of a tied one is looked at by
// check_tied().
static int llama_spare(const char *name)
{
    return strstr(name, "rotary_emb.inv_freq") || !strcmp(name, "lm_head.weight");
}

// ρ of a row, or of each head.
static int llama_norms(const config *c) { return c->qk_norm ? c->heads : 1; }

static const backbone llama_backbone = {
    .families = llama_families, .fields = llama_fields, .config = llama_config,
    .layer_name = "model.layers", .embed_name = "model.embed_tokens.weight", .head_name = "lm_head.weight",
    .spare = llama_spare, .layer_size = sizeof(llama_layer), .own_size = sizeof(llama),
    .weights = llama_weights, .activations = llama_activations, .work = llama_work, .fill = rope_table,
    .forward = llama_forward, .backward = llama_backward,
    .norm_layout = llama_norm_layout,
    .norm_forward = llama_norm_forward, .norm_backward = llama_norm_backward,
    .behind = 1, .norms = llama_norms, .cache_bytes = llama_cache_bytes,
};

#endif
