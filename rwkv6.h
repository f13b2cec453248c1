/*  rwkv6.h: RWKV6 (Finch, arXiv 2404.05892) by hand, after BlinkDL's RWKV-v5/src/model.py, RWKV_Tmix_x060 and
    RWKV_CMix_x060. No attention: what a text said so far is a matrix S a head, of one size for any length.

      1  config.json
      2  the tensors                   of a layer, and of all layers
      3  forward and backward          mid = x + time mixing,  next = mid + channel mixing

    doc/rwkv.md has the derivations.                                                                      */

#ifndef RWKV6_H
#define RWKV6_H
#include "model.h"

// ---- 1  config.json ---------------------------------------------------------------------------------------

static const family rwkv6_families[] = {{"rwkv6", "RWKV6", .max_pos = INT_MAX}, {.model_type = NULL}};

// The last two are not in the published models: where they are missing, the file's tensors say them.
static const config_field rwkv6_fields[] = {
    {"hidden_size",             WHOLE,  TO(dim),          REQUIRED, 1, 1 << 24,  NULL},
    {"attention_hidden_size",   WHOLE,  TO(att),          0,        1, 1 << 24,  NULL},     // 0: hidden_size
    {"intermediate_size",       WHOLE,  TO(hidden),       0,        1, 1 << 24,  NULL},     // 3.5 hidden_size
    {"num_attention_heads",     WHOLE,  TO(heads),        0,        0, 1 << 24,  NULL},     // head_size again
    {"num_hidden_layers",       WHOLE,  TO(layers),       REQUIRED, 1, 1 << 24,  NULL},
    {"head_size",               WHOLE,  TO(head_dim),     64,       1, 128,      NULL},
    {"head_size_divisor",       WHOLE,  TO(head_divisor), 8,        1, 1 << 12,  NULL},
    {"vocab_size",              WHOLE,  TO(vocab),        65536,    1, 1 << 24,  NULL},
    {"layer_norm_epsilon",      NUMBER, TO(eps),          1e-5,     1e-30, 1,    NULL},
    {"initializer_range",       NUMBER, TO(init_range),   1,        1e-30, 1e3,  NULL},
    {"tie_word_embeddings",     SWITCH, TO(tied),         0,        0, 1,        NULL},
    {"time_mix_extra_dim",      WHOLE,  TO(mix_rank),     0,        1, 1 << 12,  NULL},
    {"time_decay_extra_dim",    WHOLE,  TO(decay_rank),   0,        1, 1 << 12,  NULL},
    {.name = NULL},
};

static void rwkv6_config(config *c, const json_t *json, const char *path)
{
    (void)json;
    if (!c->att) c->att = c->dim;
    if (!c->hidden) c->hidden = c->dim / 64 * 224 + c->dim % 64 * 7 / 2 / 32 * 32;      // ⌊3.5 C / 32⌋ · 32
    if (!c->hidden)
        die("%s: hidden_size %d is too small for an \"intermediate_size\" of 3.5 times it", path, c->dim);
    if ((long)c->att * c->head_dim > 1 << 28)
        die("%s: attention_hidden_size %d in heads of %d is too wide", path, c->att, c->head_dim);
    if (c->att % c->head_dim)
        die("%s: attention_hidden_size %d is no multiple of head_size %d", path, c->att, c->head_dim);
    c->heads = c->kv_heads = c->att / c->head_dim;
    c->max_pos = c->family->max_pos;
}

// A side of a tensor of layer 0, or `usual` where the file has none that could be it.
static int side_in_file(checkpoint *file, const char *name, int side, int usual)
{
    ptrdiff_t at = file ? shgeti(file->tensors, name) : -1;
    int n = at < 0 ? 0 : file->tensors[at].value.shape.n[side];
    return n < 1 || n > 1 << 12 ? usual : n;
}

// The widths of the low ranks, by the file, or as BlinkDL's own models have them.
static void rwkv6_sizes(config *c, checkpoint *file)
{
    int large = c->dim == 4096 ? 2 : 1;
    int mix = side_in_file(file, "rwkv.blocks.0.attention.time_maa_w2", 1, 32 * large);
    int decay = side_in_file(file, "rwkv.blocks.0.attention.time_decay_w2", 0, 64 * large);
    if (!c->mix_rank) c->mix_rank = mix;
    if (!c->decay_rank) c->decay_rank = decay;
}

// ---- 2  the tensors ---------------------------------------------------------------------------------------

// A trained vector or matrix beside its gradient.
typedef struct { mat p, d; } param;
typedef struct { param w, b; } layernorm;

// The five lerps of time mixing, in the order of the file.
enum { MIX_W, MIX_K, MIX_V, MIX_R, MIX_G, LERPS };

typedef struct {
    layernorm ln1, ln2, ln_x;                           // (C), (C), (A)
    param mu_x, mu[LERPS];                             // (1, 1, C)
    param mix_A, mix_B;                                // (C, 5M), (5, M, C)
    param w0, decay_A, decay_B;                        // (1, 1, A), (C, D), (D, A)
    param u;                                           // (heads, d)
    param mu_key, mu_receptance;                       // (1, 1, C), of channel mixing
    linear receptance, key, value, gate, output;
    linear ffn_key, ffn_receptance, ffn_value;
    mat r, k, v, w, g;                                  // (N, A)
    mat y;                                              // (N, A) what the recurrence says
    mat mid;                                            // (N, C) the residual stream after time mixing
    mat fk, fr, fv;                                     // (N, F), (N, C), (N, C); a last layer's N: targets
    mat last1, last2;                                   // generation: (texts, C) n of the last token
    mat S;                                              //             (texts, heads·d·d)
} rwkv6_layer;

// What exists once, for all layers.
typedef struct {
    layernorm ln0, ln_out;                              // (C): in front of layer 0, behind the last one
    mat x0;                                             // (N, C) ln0 of the embeddings
    mat n, lerp;                                        // (N, C) made again on the way back, as are
    mat h, m;                                           // (N, 5M), (N, 5C)
    mat hd;                                             // (N, D)
    mat z, zg;                                          // (N, A)
    mat hid;                                            // (N, F)
    mat picked, dpicked;                                // (targets, C) a lerp of the last layer
    mat dn, dlerp, dh, dm, dhd;                         // gradients of one layer at a time
    mat dr, dk, dv, dw, dg, dy, dz, dzg;
    mat dfk, dfr, dfv;
} rwkv6;

static rwkv6_layer *rwkv6_at(const model *m, int i) { return (rwkv6_layer *)m->layers + i; }

// One tensor of the file: name, or name with the number of the layer before it.
static void weight_layout(model *m, enum kind frozen, param *w, shape s, int i, const char *name)
{
    char layer[32] = "";
    if (i >= 0) snprintf(layer, sizeof layer, "blocks.%d.", i);
    declare(m, full_training(m) ? PARAM : frozen, &w->p, &w->d, s, "rwkv.%s%s", layer, name);
}

static void layernorm_layout(model *m, layernorm *l, int cols, int i, const char *name)
{
    char full[64];
    snprintf(full, sizeof full, "%s.weight", name);
    weight_layout(m, NORM, &l->w, SHAPE(cols), i, full);
    snprintf(full, sizeof full, "%s.bias", name);
    weight_layout(m, NORM, &l->b, SHAPE(cols), i, full);
}

static void rwkv6_weights(model *m, int i)
{
    static const char *const mus[LERPS] = {
        "attention.time_maa_w", "attention.time_maa_k", "attention.time_maa_v", "attention.time_maa_r",
        "attention.time_maa_g",
    };
    const config *c = &m->c;
    rwkv6 *own = m->own;
    rwkv6_layer *L = rwkv6_at(m, i);
    int C = c->dim;
    int A = c->att;
    int F = c->hidden;
    int M = c->mix_rank;
    int D = c->decay_rank;
    shape row = SHAPE(1, 1, C);
    if (i == 0) layernorm_layout(m, &own->ln0, C, i, "pre_ln");
    layernorm_layout(m, &L->ln1, C, i, "ln1");
    layernorm_layout(m, &L->ln2, C, i, "ln2");
    weight_layout(m, NORM, &L->mu_x, row, i, "attention.time_maa_x");
    for (int j = 0; j < LERPS; j++) weight_layout(m, NORM, &L->mu[j], row, i, mus[j]);
    weight_layout(m, BASE, &L->mix_A, SHAPE(C, LERPS * M), i, "attention.time_maa_w1");
    weight_layout(m, BASE, &L->mix_B, SHAPE(LERPS, M, C), i, "attention.time_maa_w2");
    weight_layout(m, NORM, &L->w0, SHAPE(1, 1, A), i, "attention.time_decay");
    weight_layout(m, BASE, &L->decay_A, SHAPE(C, D), i, "attention.time_decay_w1");
    weight_layout(m, BASE, &L->decay_B, SHAPE(D, A), i, "attention.time_decay_w2");
    weight_layout(m, NORM, &L->u, SHAPE(c->heads, c->head_dim), i, "attention.time_faaaa");
    //                                        --targets  in the file       reads  out  in  bias
    linear_layout(m, i, &L->receptance,     (called){"r",     "attention.receptance",    0, A, C, 0});
    linear_layout(m, i, &L->key,            (called){"k",     "attention.key",           1, A, C, 0});
    linear_layout(m, i, &L->value,          (called){"v",     "attention.value",         2, A, C, 0});
    linear_layout(m, i, &L->gate,           (called){"g",     "attention.gate",          3, A, C, 0});
    linear_layout(m, i, &L->output,         (called){"o",     "attention.output",        4, C, A, 0});
    layernorm_layout(m, &L->ln_x, A, i, "attention.ln_x");
    weight_layout(m, NORM, &L->mu_key, row, i, "feed_forward.time_maa_k");
    weight_layout(m, NORM, &L->mu_receptance, row, i, "feed_forward.time_maa_r");
    linear_layout(m, i, &L->ffn_key,        (called){"ffn-k", "feed_forward.key",        5, F, C, 0});
    linear_layout(m, i, &L->ffn_receptance, (called){"ffn-r", "feed_forward.receptance", 6, C, C, 0});
    linear_layout(m, i, &L->ffn_value,      (called){"ffn-v", "feed_forward.value",      7, C, F, 0});
}

// Kept for the backward pass, in the order of --recompute, as in llama.h. A text's state is S, and n of its
// last token, in front of time mixing and of channel mixing.
static level rwkv6_activations(model *m, int i)
{
    const config *c = &m->c;
    rwkv6_layer *L = rwkv6_at(m, i);
    int N = m->p.tokens;
    int texts = m->p.sequences > 1 ? m->p.sequences : 1;
    int final = is_last(m, i);
    level kept = level_now(m);
    declare(m, ACT, &L->r, NULL, SHAPE(N, c->att), "layers.%d.r", i);
    declare(m, ACT, &L->k, NULL, SHAPE(N, c->att), "layers.%d.k", i);
    declare(m, ACT, &L->v, NULL, SHAPE(N, c->att), "layers.%d.v", i);
    declare(m, ACT, &L->w, NULL, SHAPE(N, c->att), "layers.%d.w", i);
    declare(m, ACT, &L->g, NULL, SHAPE(N, c->att), "layers.%d.g", i);
    declare(m, ACT, &L->y, NULL, SHAPE(N, c->att), "layers.%d.y", i);
    declare(m, ACT, &L->mid, NULL, SHAPE(N, c->dim), "layers.%d.mid", i);
    if (m->p.recompute < 2) kept = level_now(m);
    declare(m, ACT, &L->fk, NULL, SHAPE(N, c->hidden), "layers.%d.ffn_key", i)->by_target = final;
    declare(m, ACT, &L->fr, NULL, SHAPE(N, c->dim), "layers.%d.ffn_receptance", i)->by_target = final;
    declare(m, ACT, &L->fv, NULL, SHAPE(N, c->dim), "layers.%d.ffn_value", i)->by_target = final;
    if (m->p.recompute < 1) kept = level_now(m);
    L->last1 = L->last2 = L->S = (mat){0};
    if (!m->p.cache_rows) return kept;
    declare(m, CACHE, &L->last1, NULL, SHAPE(texts, c->dim), "layers.%d.last1", i);
    declare(m, CACHE, &L->last2, NULL, SHAPE(texts, c->dim), "layers.%d.last2", i);
    declare(m, AUX, &L->S, NULL, SHAPE(texts, c->att * c->head_dim), "layers.%d.S", i);
    return kept;
}

static void rwkv6_work(model *m)
{
    const config *c = &m->c;
    rwkv6 *own = m->own;
    int N = m->p.tokens;
    int C = c->dim;
    int A = c->att;
    int F = c->hidden;
    int M = LERPS * c->mix_rank;
    int D = c->decay_rank;
    const struct { mat *value; int cols; const char *name; } list[] = {
        {&own->x0, C, "x0"}, {&own->n, C, "n"}, {&own->lerp, C, "lerp"}, {&own->h, M, "h"},
        {&own->m, LERPS * C, "m"}, {&own->hd, D, "hd"}, {&own->z, A, "z"}, {&own->zg, A, "zg"},
        {&own->hid, F, "hid"},
        {&own->dn, C, "dn"}, {&own->dlerp, C, "dlerp"}, {&own->dh, M, "dh"}, {&own->dm, LERPS * C, "dm"},
        {&own->dhd, D, "dhd"}, {&own->dr, A, "dr"}, {&own->dk, A, "dk"}, {&own->dv, A, "dv"},
        {&own->dw, A, "dw"}, {&own->dg, A, "dg"}, {&own->dy, A, "dy"}, {&own->dz, A, "dz"},
        {&own->dzg, A, "dzg"}, {&own->dfk, F, "dffn_key"}, {&own->dfr, C, "dffn_receptance"},
        {&own->dfv, C, "dffn_value"},
    };
    int forward = 9;
    int count = m->p.train ? (int)(sizeof list / sizeof *list) : forward;
    for (int i = 0; i < count; i++)
        declare(m, ACT, list[i].value, NULL, SHAPE(N, list[i].cols), "%s", list[i].name);
    declare(m, ACT, &own->picked, NULL, SHAPE(N, C), "picked")->by_target = 1;
    if (m->p.train) declare(m, ACT, &own->dpicked, NULL, SHAPE(N, C), "dpicked")->by_target = 1;
}

static void rwkv6_norm_layout(model *m)
{
    rwkv6 *own = m->own;
    layernorm_layout(m, &own->ln_out, m->c.dim, -1, "ln_out");
}

// ---- 3  forward and backward ------------------------------------------------------------------------------

static void ln_forward(const model *m, mat out, mat x, const layernorm *l)
{
    layernorm_forward(out, x, l->w.p, l->b.p, 1, m->c.eps);
}

static void ln_backward(const model *m, mat dx, mat dout, mat x, const layernorm *l)     // dx += …
{
    layernorm_backward(dx, l->w.d, l->b.d, dout, x, l->w.p, 1, m->c.eps);
}

// The norm over each head's channels has an ε of its own.
static double eps_of_heads(const config *c) { return c->eps * c->head_divisor * c->head_divisor; }

// What time mixing reads: layer 0 norms the embeddings first.
static mat stream_of(const model *m, int i)
{
    const rwkv6 *own = m->own;
    return i ? m->x[i] : own->x0;
}

// own->lerp = n + (n before − n) ⊙ (μ + m)
static void lerp(model *m, mat last, param mu, mat by, const batch *b)
{
    rwkv6 *own = m->own;
    shift_mix_forward(own->lerp, own->n, last, mu.p, by, b->spans, b->rows);
}

// dn += …, dm = …, dμ += …, of that
static void lerp_backward(model *m, param mu, mat dby, mat by, const batch *b)
{
    rwkv6 *own = m->own;
    shift_mix_backward(own->dn, mu.d, dby, own->dlerp, own->n, mu.p, by, b->spans, b->rows);
}

static mat block_of(mat x, int j, int cols) { return columns_of(x, j * cols, cols); }

// Generation: n of each text's last token.
static void keep_last(mat last, mat n, const batch *b)
{
    for (int i = 0; i < b->rows && b->cached; i++) {
        span s = b->spans[i];
        copy(rows_of(last, s.k, 1), rows_of(n, s.q + s.nq - 1, 1));
    }
}

// n = ln1(x), and how far each of the five lerps moves by what n says: m = tanh(lerp_x A) B, five times
static void find_mixes(model *m, int i, mat last, const batch *b)
{
    rwkv6 *own = m->own;
    rwkv6_layer *L = rwkv6_at(m, i);
    int M = m->c.mix_rank;
    int C = m->c.dim;
    if (i == 0) ln_forward(m, own->x0, m->x[0], &own->ln0);
    ln_forward(m, own->n, stream_of(m, i), &L->ln1);
    lerp(m, last, L->mu_x, (mat){0}, b);
    matmul_nn(own->h, own->lerp, L->mix_A.p, 1, SET);                               // (N, 5M)
    tanh_forward(own->h, own->h);
    matmul_nn(column_blocks(own->m, C), column_blocks(own->h, M), L->mix_B.p, 1, SET);
}

// w = w0 + tanh(lerp_w A) B
static void find_decay(model *m, rwkv6_layer *L, mat last, const batch *b)
{
    rwkv6 *own = m->own;
    lerp(m, last, L->mu[MIX_W], block_of(own->m, MIX_W, m->c.dim), b);
    matmul_nn(own->hd, own->lerp, L->decay_A.p, 1, SET);                            // (N, D)
    tanh_forward(own->hd, own->hd);
    matmul_nn(L->w, own->hd, L->decay_B.p, 1, SET);
    bias_forward(L->w, L->w0.p);
}

// zg = norm of each head of y ⊙ silu(g)
static void gate_heads(model *m, rwkv6_layer *L)
{
    rwkv6 *own = m->own;
    layernorm_forward(own->z, L->y, L->ln_x.w.p, L->ln_x.b.p, m->c.heads, eps_of_heads(&m->c));
    swiglu_forward(own->zg, L->g, own->z);
}

// The four linear layers that read n, each through a lerp of its own: what they write, and its gradient.
enum { READS = 4 };
typedef struct { int lerp; linear *l; mat y, dy; } reading;

static void readings(const rwkv6 *own, rwkv6_layer *L, reading list[READS])
{
    list[0] = (reading){MIX_K, &L->key, L->k, own->dk};
    list[1] = (reading){MIX_V, &L->value, L->v, own->dv};
    list[2] = (reading){MIX_R, &L->receptance, L->r, own->dr};
    list[3] = (reading){MIX_G, &L->gate, L->g, own->dg};
}

//  r, k, v, g = lerp_r Wrᵀ, …;  y = the recurrence;  mid = x + zg Woᵀ
static void time_mixing(model *m, int i, const batch *b)
{
    rwkv6 *own = m->own;
    rwkv6_layer *L = rwkv6_at(m, i);
    reading reads[READS];
    readings(own, L, reads);
    mat last = b->cached ? L->last1 : (mat){0};
    find_mixes(m, i, last, b);
    find_decay(m, L, last, b);
    for (int j = 0; j < READS; j++) {
        lerp(m, last, L->mu[reads[j].lerp], block_of(own->m, reads[j].lerp, m->c.dim), b);
        linear_forward(m, reads[j].l, reads[j].y, own->lerp, SET);
    }
    keep_last(last, own->n, b);
    wkv6_forward(L->y, b->cached ? L->S : (mat){0}, L->r, L->k, L->v, L->w, L->u.p, b->spans, b->rows);
    gate_heads(m, L);
    copy(L->mid, stream_of(m, i));
    linear_forward(m, &L->output, L->mid, own->zg, ADD);                            // mid = x + output(zg)
}

// What the linears of channel mixing read: own->lerp, and of it in the last layer the targets.
static mat picked_lerp(model *m, int i)
{
    rwkv6 *own = m->own;
    if (!is_last(m, i)) return own->lerp;
    gather(m, own->picked, own->lerp);
    return own->picked;
}

//  n = ln2(mid);  fk = lerp_k Wkᵀ,  fr = lerp_r Wrᵀ,  fv = relu(fk)² Wvᵀ
static void channel_reads(model *m, int i, const batch *b)
{
    rwkv6 *own = m->own;
    rwkv6_layer *L = rwkv6_at(m, i);
    mat last = b->cached ? L->last2 : (mat){0};
    mat none = {0};
    mat hid = rows_like(own->hid, L->fk);
    ln_forward(m, own->n, L->mid, &L->ln2);
    lerp(m, last, L->mu_key, none, b);
    linear_forward(m, &L->ffn_key, L->fk, picked_lerp(m, i), SET);                  // (N, F)
    lerp(m, last, L->mu_receptance, none, b);
    linear_forward(m, &L->ffn_receptance, L->fr, picked_lerp(m, i), SET);
    keep_last(last, own->n, b);
    relu2_forward(hid, L->fk);
    linear_forward(m, &L->ffn_value, L->fv, hid, SET);
}

//  x → next = mid + σ(fr) ⊙ fv
static void rwkv6_forward(model *m, int i, mat next, const batch *b)
{
    rwkv6_layer *L = rwkv6_at(m, i);
    time_mixing(m, i, b);
    channel_reads(m, i, b);
    if (is_last(m, i)) gather(m, next, L->mid);
    else copy(next, L->mid);
    sigmoid_gate_forward(next, L->fr, L->fv);
}

// y = l(lerp of n):  dn += …, dμ += …
static void channel_read_backward(model *m, int i, linear *l, mat dy, param mu, const batch *b)
{
    rwkv6 *own = m->own;
    int final = is_last(m, i);
    mat none = {0};
    lerp(m, none, mu, none, b);
    linear_backward(m, l, final ? own->dpicked : own->dlerp, dy, picked_lerp(m, i), SET);
    if (final) scatter(m, own->dlerp, own->dpicked);
    lerp_backward(m, mu, none, none, b);
}

// Channel mixing, from the last line to the first: d(next) → d(mid), which is in m->dx.
static void channel_backward(model *m, int i, const batch *b)
{
    rwkv6 *own = m->own;
    rwkv6_layer *L = rwkv6_at(m, i);
    int final = is_last(m, i);
    mat d = final ? m->dlast : m->dx;
    mat hid = rows_like(own->hid, d), dfk = rows_like(own->dfk, d);
    mat dfr = rows_like(own->dfr, d), dfv = rows_like(own->dfv, d);
    sigmoid_gate_backward(dfr, dfv, d, L->fr, L->fv);                       // next = mid + σ(fr) fv
    relu2_forward(hid, L->fk);
    linear_backward(m, &L->ffn_value, dfk, dfv, hid, SET);                  // fv = value(relu(fk)²)
    relu2_backward(dfk, dfk, L->fk);
    ln_forward(m, own->n, L->mid, &L->ln2);
    zero(own->dn);
    channel_read_backward(m, i, &L->ffn_key, dfk, L->mu_key, b);
    channel_read_backward(m, i, &L->ffn_receptance, dfr, L->mu_receptance, b);
    if (final) scatter(m, m->dx, m->dlast);
    ln_backward(m, m->dx, own->dn, L->mid, &L->ln2);                        // d(next) + …: dx is now d(mid)
}

// w = w0 + tanh(lerp_w A) B, whose gradient is own->dw: writes dm of this lerp, adds to dn.
static void decay_backward(model *m, rwkv6_layer *L, const batch *b)
{
    rwkv6 *own = m->own;
    int C = m->c.dim;
    lerp(m, (mat){0}, L->mu[MIX_W], block_of(own->m, MIX_W, C), b);
    matmul_nn(own->hd, own->lerp, L->decay_A.p, 1, SET);
    tanh_forward(own->hd, own->hd);
    bias_backward(L->w0.d, own->dw);
    matmul_tn(L->decay_B.d, own->hd, own->dw, 1, ADD);                      // w += hd B:      dB += hdᵀ dw
    matmul_nt(own->dhd, own->dw, L->decay_B.p, 1, SET);                     //                 dhd = dw Bᵀ
    tanh_backward(own->dhd, own->dhd, own->hd);
    matmul_tn(L->decay_A.d, own->lerp, own->dhd, 1, ADD);                   // hd = lerp A:    dA += lerpᵀ dhd
    matmul_nt(own->dlerp, own->dhd, L->decay_A.p, 1, SET);                  //                 dlerp = dhd Aᵀ
    lerp_backward(m, L->mu[MIX_W], block_of(own->dm, MIX_W, C), block_of(own->m, MIX_W, C), b);
}

// m = tanh(lerp_x A) B, five times, whose gradient is own->dm: adds to dn.
static void mixes_backward(model *m, rwkv6_layer *L, const batch *b)
{
    rwkv6 *own = m->own;
    mat none = {0};
    mat h = column_blocks(own->h, m->c.mix_rank), dh = column_blocks(own->dh, m->c.mix_rank);
    mat dm = column_blocks(own->dm, m->c.dim);
    matmul_tn(L->mix_B.d, h, dm, 1, ADD);                                 // m_j = h_j B_j: dB_j += h_jᵀ dm_j
    matmul_nt(dh, dm, L->mix_B.p, 1, SET);                                //                dh_j = dm_j B_jᵀ
    tanh_backward(own->dh, own->dh, own->h);
    lerp(m, none, L->mu_x, none, b);
    matmul_tn(L->mix_A.d, own->lerp, own->dh, 1, ADD);                      // h = lerp A:    dA += lerpᵀ dh
    matmul_nt(own->dlerp, own->dh, L->mix_A.p, 1, SET);                     //                dlerp = dh Aᵀ
    lerp_backward(m, L->mu_x, none, none, b);
}

// Time mixing, from the last line to the first: d(mid) → d(x), both in m->dx. What reads n is d(n)'s business
// only where something below layer i trains.
static void time_backward(model *m, int i, const batch *b, int dx_wanted)
{
    rwkv6 *own = m->own;
    rwkv6_layer *L = rwkv6_at(m, i);
    int C = m->c.dim;
    reading reads[READS];
    readings(own, L, reads);
    gate_heads(m, L);
    linear_backward(m, &L->output, own->dzg, m->dx, own->zg, SET);          // mid = x + output(zg)
    swiglu_backward(own->dg, own->dz, own->dzg, L->g, own->z);              // zg = z silu(g)
    zero(own->dy);
    layernorm_backward(own->dy, L->ln_x.w.d, L->ln_x.b.d, own->dz, L->y, L->ln_x.w.p,
                       m->c.heads, eps_of_heads(&m->c));
    wkv6_backward(own->dr, own->dk, own->dv, own->dw, L->u.d, own->dy,
                  L->r, L->k, L->v, L->w, L->u.p, b->spans, b->rows);
    find_mixes(m, i, (mat){0}, b);
    if (dx_wanted) zero(own->dn);
    for (int j = 0; j < READS; j++) {
        mat dlerp = own->dlerp;
        mat by = block_of(own->m, reads[j].lerp, C);
        if (!dx_wanted) dlerp.p = NULL;
        lerp(m, (mat){0}, L->mu[reads[j].lerp], by, b);
        linear_backward(m, reads[j].l, dlerp, reads[j].dy, own->lerp, SET);
        if (dx_wanted) lerp_backward(m, L->mu[reads[j].lerp], block_of(own->dm, reads[j].lerp, C), by, b);
    }
    if (!dx_wanted) return;
    decay_backward(m, L, b);
    mixes_backward(m, L, b);
    ln_backward(m, m->dx, own->dn, stream_of(m, i), &L->ln1);               // d(mid) + …: dx is now d(x)
    if (i) return;
    copy(own->dn, m->dx);
    zero(m->dx);
    ln_backward(m, m->dx, own->dn, m->x[0], &own->ln0);                     // x = ln0(embeddings)
}

// On entry m->dx (in the last layer m->dlast) is d(next), on return m->dx is d(m->x[i]).
static void rwkv6_backward(model *m, int i, const batch *b, int dx_wanted)
{
    if (m->p.recompute == 2) time_mixing(m, i, b);
    if (m->p.recompute) channel_reads(m, i, b);
    channel_backward(m, i, b);
    time_backward(m, i, b, dx_wanted);
}

static void rwkv6_norm_forward(model *m, mat out, mat x)
{
    rwkv6 *own = m->own;
    ln_forward(m, out, x, &own->ln_out);
}

static void rwkv6_norm_backward(model *m, mat dx, mat dout, mat x)
{
    rwkv6 *own = m->own;
    ln_backward(m, dx, dout, x, &own->ln_out);
}

// A state of one size, however long the text is.
static double rwkv6_cache_bytes(const config *c, int length)
{
    (void)length;
    return (double)c->layers * (2.0 * c->dim * sizeof(real) + (double)c->att * c->head_dim * sizeof(wide));
}

static int rwkv6_norms(const config *c) { return 2 * c->heads; }        // a mean and a ρ of each head

static int rwkv6_spare(const char *name)
{
    (void)name;
    return 0;
}

// How BlinkDL starts a model (RWKV_Tmix_x060, RWKV_CMix_x060 and generate_init_weight), but that a matrix is
// normal where his is orthogonal. In layer i of n, deep = i/(n−1) grows from 0 to 1, and shallow = 1 − i/n
// falls from 1. Number c of a tensor of n has at = c/(n−1).
static void rwkv6_start(model *m, const tensor *t, wide *x, rng *g)
{
    static const struct { const char *name; double power, lift; } lerps[] = {
        {"time_maa_x", 1, 0}, {"time_maa_w", 1, 0}, {"time_maa_k", 1, 0}, {"time_maa_v", 1, 0.3},
        {"time_maa_r", 0.5, 0}, {"time_maa_g", 0.5, 0},
    };
    static const struct { const char *name; double scale; } matrices[] = {
        {"attention.output", 0}, {"feed_forward.value", 0}, {"feed_forward.receptance", 0},
        {"attention.key", 0.1}, {"attention.gate", 0.1},
    };
    const config *c = &m->c;
    const char *number = strstr(t->name, "blocks.");
    int layer = number ? atoi(number + 7) : 0;
    double deep = c->layers > 1 ? layer / (c->layers - 1.0) : 0;
    double shallow = 1 - (double)layer / c->layers;
    size_t n = elements(*t->value);
    double scale = 1;
    for (size_t i = 0; i < sizeof matrices / sizeof *matrices; i++)
        if (strstr(t->name, matrices[i].name)) scale = matrices[i].scale;
    if (strstr(t->name, "head.weight")) scale = 0.5;
    for (size_t j = 0; j < n; j++) {
        double at = (double)j / ((double)n > 1 ? (double)n - 1 : 1), u = 2 * rng_uniform(g) - 1;
        double zigzag = ((double)((j + 1) % 3) - 1) * 0.1;
        if (strstr(t->name, "ln")) x[j] = strstr(t->name, ".weight") ? 1 : 0;
        else if (strstr(t->name, "_w1")) x[j] = 0;
        else if (strstr(t->name, "_w2")) x[j] = (wide)(0.01 * u);
        else if (strstr(t->name, "time_decay")) x[j] = (wide)(-6 + 5 * pow(at, 0.7 + 1.3 * deep));
        else if (strstr(t->name, "time_faaaa")) x[j] = (wide)(deep * (1 - at) + zigzag);
        else if (strstr(t->name, "embeddings")) x[j] = (wide)(1e-4 * u);
        else x[j] *= (wide)(scale / sqrt(t->shape.n[1]));                  // a matrix, normal already
        if (strstr(t->name, "ln_x.weight")) x[j] = (wide)pow((1.0 + layer) / c->layers, 0.7);
    }
    int ffn = strstr(t->name, "feed_forward") != NULL;
    for (size_t i = 0; i < sizeof lerps / sizeof *lerps; i++)
        for (size_t j = 0; j < n && strstr(t->name, lerps[i].name) && t->shape.n[0] == 1; j++) {
            double power = shallow * (ffn ? 1 : lerps[i].power);
            x[j] = (wide)(1 - pow((double)j / (double)n, power) - lerps[i].lift * deep);
        }
}

static const backbone rwkv6_backbone = {
    .families = rwkv6_families, .fields = rwkv6_fields, .config = rwkv6_config, .sizes = rwkv6_sizes,
    .layer_name = "rwkv.blocks", .embed_name = "rwkv.embeddings.weight", .head_name = "head.weight",
    .spare = rwkv6_spare, .layer_size = sizeof(rwkv6_layer), .own_size = sizeof(rwkv6),
    .weights = rwkv6_weights, .activations = rwkv6_activations, .work = rwkv6_work,
    .forward = rwkv6_forward, .backward = rwkv6_backward,
    .norm_layout = rwkv6_norm_layout,
    .norm_forward = rwkv6_norm_forward, .norm_backward = rwkv6_norm_backward,
    .behind = 5, .start = rwkv6_start, .norms = rwkv6_norms, .cache_bytes = rwkv6_cache_bytes, .has_state = 1,
};

#endif
