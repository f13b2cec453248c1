/*  halves.h: what the tests compute on a CPU and on a GPU, to compare the two: every op alone, and a step of
    every method on a small model. test_all.c includes it for the CPU, gpu_half.c for the GPU.              */

#include <sys/wait.h>

static rng dice = {42};

static void randomise(mat m, double scale)
{
    wide *x = alloc(elements(m), sizeof *x);
    for (size_t i = 0; i < elements(m); i++) x[i] = (wide)(scale * rng_normal(&dice));
    put(m, x, TYPE_OF(wide));
    free(x);
}

static mat typed_mat(shape s, enum dtype type)
{
    mat m = mat_of(NULL, type, s);
    m.p = dev_alloc(elements(m) * dtypes[type].size);
    randomise(m, 1);
    return m;
}

static mat random_mat(shape s) { return typed_mat(s, TYPE_OF(real)); }

static mat like(mat m)                  // zeros of its shape and dtype
{
    mat z = typed_mat(SHAPE(m.batch, m.rows, m.cols), m.type);
    zero(z);
    return z;
}

// ---- a small model ----------------------------------------------------------------------------------------
//
// Two layers, grouped queries, widths that differ everywhere, so that a transposed index cannot hide.

enum { SEVEN = 7 };                     // linears of a layer

static char scratch[64];                // a directory for this process

static char *in_scratch(const char *name) { return join(scratch, name); }

static void write_text(const char *path, const char *text)
{
    FILE *f = fopen(path, "w");
    if (!f || fputs(text, f) < 0 || fclose(f)) die("%s: %s", path, strerror(errno));
}

static const char small_config[] =
    "{\"hidden_size\": 12, \"intermediate_size\": 20, \"num_hidden_layers\": 2, "
    "\"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"head_dim\": 4, \"vocab_size\": 13, "
    "\"rms_norm_eps\": 1e-5, %s}";

// Eight linears a layer, six different widths. Another backbone has fields of its own.
static const char small_rwkv6[] =
    "{\"model_type\": \"rwkv6\", \"hidden_size\": 12, \"attention_hidden_size\": 8, \"head_size\": 4, "
    "\"intermediate_size\": 20, \"num_hidden_layers\": 2, \"vocab_size\": 13, \"time_mix_extra_dim\": 3, "
    "\"time_decay_extra_dim\": 5}";

// Its kin: each has something that the first has not.
static const struct { const char *name, *fields; } kin[] = {
    {"untied", "\"model_type\": \"llama\", \"tie_word_embeddings\": false"},
    {"tied", "\"model_type\": \"llama\", \"tie_word_embeddings\": true"},
    {"biases", "\"model_type\": \"llama\", \"attention_bias\": true, \"mlp_bias\": true, \"rope_scaling\": "
        "{\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 0.01, \"high_freq_factor\": 4, "
        "\"original_max_position_embeddings\": 16}"},
    {"mistral", "\"model_type\": \"mistral\", \"sliding_window\": 3"},
    {"qwen2", "\"model_type\": \"qwen2\", \"tie_word_embeddings\": true, \"use_sliding_window\": true, "
        "\"sliding_window\": 4, \"max_window_layers\": 1, \"rope_scaling\": {\"type\": \"linear\", \"factor\": 2}"},
    {"qwen3", "\"model_type\": \"qwen3\", \"attention_bias\": true"},
    {"rwkv6", ""},
};
enum { KIN = sizeof kin / sizeof *kin };

// Writes a model of this config.json as a Hugging Face directory, in dtype `type`. Its matrices and biases are
// normal noise of standard deviation `size`, its norms of 1.
static void write_model(char *dir, const char *config_path, double size, enum dtype type)
{
    model m = {0};
    plan p = plan_from_options();
    p.method = &methods[0];
    p.tokens = p.positions = 8;
    model_measure(&m, config_read(config_path), p);
    model_allocate(&m);
    for (int i = 0; i < arrlen(m.tensors); i++) {
        const tensor *t = &m.tensors[i];
        int norm = !t->shape.n[1] && !strstr(t->name, ".bias");
        if (t->kind == PARAM) randomise(*t->value, norm ? 1 : size);
    }
    stage_begin(dir);
    stage_model(&m, staged, type);                    // no other files are to be copied
    stage_publish(&(place_of_result){.path = dir});
    model_free(&m);
}

static double small_size = 0.4;         // the standard deviation of its weights

static char *small_model(int which)     // in this build's own precision
{
    char *dir = in_scratch(kin[which].name);
    char name[40], text[600];
    if (!access(dir, F_OK)) return dir;
    snprintf(name, sizeof name, "%s.json", kin[which].name);
    if (strcmp(kin[which].name, "rwkv6")) snprintf(text, sizeof text, small_config, kin[which].fields);
    else snprintf(text, sizeof text, "%s", small_rwkv6);
    char *config_path = in_scratch(name);
    write_text(config_path, text);
    write_model(dir, config_path, small_size, TYPE_OF(wide));
    free(config_path);
    return dir;
}

// The ranks are chosen so that Bone's last shard is short, and Bat's blocks, mini's columns and twice
// LoRA-GA's fit.
static plan small_plan(const char *method_name)
{
    plan p = plan_from_options();
    p.method = method_named(method_name);
    p.rank = strncmp(method_name, "bat", 3) && strcmp(method_name, "lora-ga") ? 5 : 4;
    p.mini_r = 4;
    if (!strcmp(method_name, "disha")) memcpy(p.shard, (int[]){5, 3}, sizeof p.shard);
    if (!strcmp(method_name, "bat-free")) memcpy(p.groups, (int[]){OUT_SIDE, IN_SIDE}, sizeof p.groups);
    p.alpha = 7;
    p.tokens = 32;
    p.positions = 16;
    return p;
}

static batch small_batch(int from, int to)      // rows from … to-1 of three, with their prompts masked
{
    static int ids[3][9] = {{1, 5, 3, 12, 7}, {1, 9, 4, 4, 11, 2, 0, 8, 6}, {1, 10, 2}};
    static const row rows[3] = {
        {.ids = ids[0], .n = 5, .prompt = 2}, {.ids = ids[1], .n = 9, .prompt = 4}, {.ids = ids[2], .n = 3, .prompt = 1},
    };
    batch b = batch_new(32, 3);
    for (int i = from; i < to; i++) batch_add(&b, &rows[i]);
    return b;
}

static void ask_all(batch *b)                   // every token's row becomes a target
{
    b->targets = b->tokens;
    for (int i = 0; i < b->tokens; i++) {
        b->target_row[i] = i;
        b->label[i] = 0;
    }
}

// The small model, loaded, with the adapter of this plan at its start.
static model *open_small(plan p, int which)
{
    model *m = alloc(1, sizeof *m);
    char *dir = small_model(which);
    opt.model = dir;
    model_measure(m, open_config(), p);
    batch b = small_batch(0, 3);
    fill_model(m, &b, 1);
    batch_free(&b);
    free(dir);
    return m;
}

static void close_small(model *m)
{
    model_free(m);
    free(m);
}

static mat all_logits(model *m, const batch *b)         // of every target row, in memory of their own
{
    model_forward(m, b);
    head_forward(m, 0, b->targets);
    mat copy_of = random_mat(SHAPE(b->targets, m->c.vocab));
    copy(copy_of, m->logits);
    return copy_of;
}

// ---- every op alone ---------------------------------------------------------------------------------------
//
// Each op runs forward, and backward from a random cotangent: the gradients are those of Σ cotangent · out.
// Finite differences check them in shapes of a few numbers; the GPU's blocks and tiles are crossed by sides
// 37 times as long.

enum { HEAD = 4, ROPE_HEAD = 6, FEW = 6 };       // half of RoPE's is odd, and fills no packs
enum { SPANS = 4, POSITIONS = 1200 };
static struct { mat out, cot, in[3], grad[3]; } op;
static dev_ints op_pos, op_ids;
static span op_spans[SPANS];            // attention's
static int op_span_count;
static int op_head;                     // head_dim of attention and RoPE, which grows with the shape
static int op_window;                   // how many keys a query sees
static int op_pad;                      // the op's matrices are parts of matrices with so many columns more
static mat op_lse, op_table, op_kept;

static void nt_forward(void) { matmul_nt(op.out, op.in[0], op.in[1], 0.7, SET); }
static void nt_backward(void)
{
    matmul_nn(op.grad[0], op.cot, op.in[1], 0.7, ADD);
    matmul_tn(op.grad[1], op.cot, op.in[0], 0.7, ADD);
}

static void nn_forward(void) { matmul_nn(op.out, op.in[0], op.in[1], 0.7, SET); }
static void nn_backward(void)
{
    matmul_nt(op.grad[0], op.cot, op.in[1], 0.7, ADD);
    matmul_tn(op.grad[1], op.in[0], op.cot, 0.7, ADD);
}

static void tn_forward(void) { matmul_tn(op.out, op.in[0], op.in[1], 0.7, SET); }
static void tn_backward(void)
{
    matmul_nt(op.grad[0], op.in[1], op.cot, 0.7, ADD);
    matmul_nn(op.grad[1], op.in[0], op.cot, 0.7, ADD);
}

// Two matrices side by side: one begins where a row of the other ends, not behind all its rows.
static mat halves_of(mat m) { return column_blocks(m, m.cols / 2); }
static void blocks_forward(void) { copy(halves_of(op.out), halves_of(op.in[0])); }
static void blocks_backward(void)
{
    mat d = like(op.cot);
    copy(halves_of(d), halves_of(op.cot));
    add(op.grad[0], d, 1);
    dev_free(d.p);
}

static void embed_forward(void) { embedding_forward(op.out, op.in[0], op_ids); }
static void embed_backward(void) { embedding_backward(op.grad[0], op.cot, op_ids); }

static void norm_forward(void) { rmsnorm_forward(op.out, (mat){0}, op.in[0], op.in[1], 1e-5); }
static void norm_backward(void)
{
    rmsnorm_backward(op.grad[0], op.grad[1], op.cot, op.in[0], op.in[1], 1e-5);
}

static void rope_forward(void)
{
    copy(op.out, op.in[0]);
    rope(op.out, op_pos, op_table, 1);
}

static void rope_backward(void)
{
    mat d = like(op.cot);
    copy(d, op.cot);
    rope(d, op_pos, op_table, -1);
    add(op.grad[0], d, 1);
    dev_free(d.p);
}

static void att_forward(void)
{
    attention_forward(op.out, op_lse, op.in[0], op.in[1], op.in[2], op_head, op_window, op_spans, op_span_count);
}

static void att_backward(void)
{
    attention_backward(op.grad[0], op.grad[1], op.grad[2], op.cot, op.in[0], op.in[1], op.in[2],
                       op.out, op_lse, op_head, op_window, op_spans, op_span_count);
}

static void add_bias_forward(void)
{
    copy(op.out, op.in[0]);
    bias_forward(op.out, op.in[1]);
}

static void add_bias_backward(void)
{
    add(op.grad[0], op.cot, 1);
    bias_backward(op.grad[1], op.cot);
}

static void glu_forward(void) { swiglu_forward(op.out, op.in[0], op.in[1]); }
static void glu_backward(void) { swiglu_backward(op.grad[0], op.grad[1], op.cot, op.in[0], op.in[1]); }

static void layernorm_case(int groups, int back)
{
    if (!back) layernorm_forward(op.out, op.in[0], op.in[1], op.in[2], groups, 1e-5);
    else layernorm_backward(op.grad[0], op.grad[1], op.grad[2], op.cot, op.in[0], op.in[1], groups, 1e-5);
}

static void ln1_forward(void) { layernorm_case(1, 0); }
static void ln1_backward(void) { layernorm_case(1, 1); }
static void ln3_forward(void) { layernorm_case(3, 0); }
static void ln3_backward(void) { layernorm_case(3, 1); }

static void shift_forward(void)
{
    shift_mix_forward(op.out, op.in[0], (mat){0}, op.in[1], op.in[2], op_spans, op_span_count);
}

// dm is written, and added to the gradient here.
static void shift_backward(void)
{
    mat dm = op.grad[2].p ? like(op.cot) : (mat){0};
    shift_mix_backward(op.grad[0], op.grad[1], dm, op.cot, op.in[0], op.in[1], op.in[2], op_spans, op_span_count);
    if (dm.p) add(op.grad[2], dm, 1);
    dev_free(dm.p);
}

static void add_and_free(mat sum, mat term)
{
    add(sum, term, 1);
    dev_free(term.p);
}

static void th_forward(void) { tanh_forward(op.out, op.in[0]); }
static void th_backward(void)
{
    mat d = like(op.cot);
    tanh_backward(d, op.cot, op.out);
    add_and_free(op.grad[0], d);
}

static void relu_forward(void) { relu2_forward(op.out, op.in[0]); }
static void relu_backward(void)
{
    mat d = like(op.cot);
    relu2_backward(d, op.cot, op.in[0]);
    add_and_free(op.grad[0], d);
}

static void gate_forward(void)
{
    zero(op.out);
    sigmoid_gate_forward(op.out, op.in[0], op.in[1]);
}

static void gate_backward(void)
{
    mat dr = like(op.cot), dx = like(op.cot);
    sigmoid_gate_backward(dr, dx, op.cot, op.in[0], op.in[1]);
    add_and_free(op.grad[0], dr);
    add_and_free(op.grad[1], dx);
}

// r, k, v, w stand side by side in input 0, u in input 1.
static mat quarter(mat m, int i)
{
    m = offset(m, (size_t)(i * m.cols / 4));
    m.cols /= 4;
    return view(m);
}

static mat by_heads(mat u) { return shaped(u, 1, u.cols / op_head, op_head); }

static void wkv_forward(void)
{
    mat x = op.in[0];
    wkv6_forward(op.out, (mat){0}, quarter(x, 0), quarter(x, 1), quarter(x, 2), quarter(x, 3), by_heads(op.in[1]),
                 op_spans, op_span_count);
}

static void wkv_backward(void)
{
    mat x = op.in[0], d = like(x), u = by_heads(op.in[1]);
    mat du = op.grad[1].p ? by_heads(op.grad[1]) : (mat){0};
    wkv6_backward(quarter(d, 0), quarter(d, 1), quarter(d, 2), quarter(d, 3), du, op.cot,
                  quarter(x, 0), quarter(x, 1), quarter(x, 2), quarter(x, 3), u, op_spans, op_span_count);
    add_and_free(op.grad[0], d);
}

static void ce_forward(void)
{
    copy(op_kept, op.in[0]);
    cross_entropy(op.out, op_kept, op_ids, 0);
}

static void ce_backward(void)
{
    copy(op_kept, op.in[0]);
    cross_entropy(op.out, op_kept, op_ids, 0.3);
    add(op.grad[0], op_kept, 1);
}

static void sum_forward(void) { shard_sum(op.out, op.in[0]); }
static void sum_backward(void) { shard_tile(op.grad[0], op.cot); }

static void tile_forward(void)
{
    zero(op.out);
    shard_tile(op.out, op.in[0]);
}

static void tile_backward(void)
{
    mat s = random_mat(SHAPE(op.in[0].rows, op.in[0].cols));
    shard_sum(s, op.cot);
    add(op.grad[0], s, 1);
    dev_free(s.p);
}

// out has x̃ and, beside it, Σ_j u_j.
static void diagonal_forward(void)
{
    int in = op.in[0].cols, r = op.in[1].rows;
    mat room = random_mat(SHAPE(r == 8 ? 12 : 2, op.out.rows, r));  // for one sum, or for several
    block_diagonal_forward(columns_of(op.out, 0, in), columns_of(op.out, in, r), op.in[0], op.in[1], room);
    dev_free(room.p);
}

static void diagonal_backward(void)
{
    int in = op.in[0].cols, r = op.in[1].rows;
    mat d = like(op.cot);
    mat room = random_mat(SHAPE(r > 64 ? 4 : 2, in, r));            // for one sum or for two
    copy(d, op.cot);
    if (op.grad[0].p) add(op.grad[0], op.in[0], 1);                 // what is there stays there
    block_diagonal_backward(op.grad[0], op.grad[1], columns_of(d, 0, in), columns_of(d, in, r), op.in[0], op.in[1], room, ADD);
    if (op.grad[0].p) add(op.grad[0], op.in[0], -1);
    dev_free(d.p);
    dev_free(room.p);
}

static void mul_forward(void) { broadcast_mul(op.out, op.in[0], op.in[1], 0.7, SET); }
static void mul_backward(void)
{
    broadcast_mul(op.grad[0], op.cot, op.in[1], 0.7, ADD);
    broadcast_dot(op.grad[1], op.cot, op.in[0], 0.7, ADD);
}

static void dot_forward(void) { broadcast_dot(op.out, op.in[0], op.in[1], 0.7, SET); }
static void dot_backward(void)
{
    broadcast_mul(op.grad[0], op.in[1], op.cot, 0.7, ADD);
    broadcast_mul(op.grad[1], op.in[0], op.cot, 0.7, ADD);
}

static void mag_forward(void) { magnitude_forward(op.out, op.in[0], op.in[1]); }
static void mag_backward(void) { magnitude_backward(op.grad[0], op.grad[1], op.cot, op.in[0], op.in[1]); }

// Flags of a case. OUT, IN0 …: this matrix is wide, not real. FROZEN0 …: this input gets no gradient.
// FRONT_TO_BACK: no columns beside those of the op.
// WINDOW(n): a query sees n keys, and more as the shape grows.
enum {
    OUT = 1, IN0 = 2, IN1 = 4, IN2 = 8, FROZEN0 = 16, FROZEN1 = 32, FROZEN2 = 64, FRONT_TO_BACK = 128, FLAGS = 256
};
#define WINDOW(n) ((n) * FLAGS)

typedef struct {
    const char *name;
    shape out, in[3];
    void (*forward)(void), (*backward)(void);
    int flags;
} op_case;

static const op_case op_cases[] = {
    {"matmul_nt", {{6, 5}}, {{{6, 7}}, {{5, 7}}}, nt_forward, nt_backward, 0},
    {"matmul_nn", {{6, 7}}, {{{6, 5}}, {{5, 7}}}, nn_forward, nn_backward, IN1},
    {"matmul_tn", {{5, 7}}, {{{6, 5}}, {{6, 7}}}, tn_forward, tn_backward, OUT},
    {"batched matmul_nt", {{3, 6, 5}}, {{{3, 6, 7}}, {{3, 5, 7}}}, nt_forward, nt_backward, 0},
    {"copy of blocks", {{6, 10}}, {{{6, 10}}}, blocks_forward, blocks_backward, 0},
    {"bias", {{6, 5}}, {{{6, 5}}, {{5}}}, add_bias_forward, add_bias_backward, IN1},
    {"bias, frozen", {{6, 5}}, {{{6, 5}}, {{5}}}, add_bias_forward, add_bias_backward, FROZEN1},
    {"embedding", {{6, 5}}, {{{4, 5}}}, embed_forward, embed_backward, IN0},
    {"rows of activations", {{6, 5}}, {{{4, 5}}}, embed_forward, embed_backward, 0},
    {"rmsnorm", {{6, 9}}, {{{6, 9}}, {{9}}}, norm_forward, norm_backward, IN1},
    {"rmsnorm, frozen", {{6, 9}}, {{{6, 9}}, {{9}}}, norm_forward, norm_backward, FROZEN1},
    {"rmsnorm, frozen input", {{6, 9}}, {{{6, 9}}, {{9}}}, norm_forward, norm_backward, IN1 | FROZEN0},
    {"rope", {{6, 12}}, {{{6, 12}}}, rope_forward, rope_backward, 0},
    {"attention", {{6, 16}}, {{{6, 16}}, {{6, 8}}, {{6, 8}}}, att_forward, att_backward, 0},
    {"attention in a window", {{6, 16}}, {{{6, 16}}, {{6, 8}}, {{6, 8}}}, att_forward, att_backward,
        WINDOW(2)},
    {"swiglu", {{6, 9}}, {{{6, 9}}, {{6, 9}}}, glu_forward, glu_backward, 0},
    {"cross_entropy", {{6, 1}}, {{{6, 9}}}, ce_forward, ce_backward, OUT},
    {"layernorm", {{6, 9}}, {{{6, 9}}, {{9}}, {{9}}}, ln1_forward, ln1_backward, IN1 | IN2},
    {"layernorm, frozen", {{6, 9}}, {{{6, 9}}, {{9}}, {{9}}}, ln1_forward, ln1_backward, FROZEN1 | FROZEN2},
    {"layernorm of 3 heads", {{6, 9}}, {{{6, 9}}, {{9}}, {{9}}}, ln3_forward, ln3_backward, IN1 | IN2},
    {"shift_mix", {{6, 9}}, {{{6, 9}}, {{9}}}, shift_forward, shift_backward, IN1},
    {"shift_mix that moves", {{6, 9}}, {{{6, 9}}, {{9}}, {{6, 9}}}, shift_forward, shift_backward, FROZEN1},
    {"tanh", {{6, 9}}, {{{6, 9}}}, th_forward, th_backward, 0},
    {"relu²", {{6, 9}}, {{{6, 9}}}, relu_forward, relu_backward, 0},
    {"sigmoid_gate", {{6, 9}}, {{{6, 9}}, {{6, 9}}}, gate_forward, gate_backward, 0},
    {"wkv6", {{6, 8}}, {{{6, 32}}, {{8}}}, wkv_forward, wkv_backward, IN1 | FRONT_TO_BACK},
    {"wkv6, frozen", {{6, 8}}, {{{6, 32}}, {{8}}}, wkv_forward, wkv_backward, FROZEN1 | FRONT_TO_BACK},
    {"shard_sum", {{6, 4}}, {{{6, 11}}}, sum_forward, sum_backward, 0},
    {"shard_tile", {{6, 11}}, {{{6, 4}}}, tile_forward, tile_backward, 0},
    {"block_diagonal", {{6, 16}}, {{{6, 12}}, {{3, 4, 4}}}, diagonal_forward, diagonal_backward, IN1},
    {"block_diagonal, frozen input", {{6, 16}}, {{{6, 12}}, {{3, 4, 4}}}, diagonal_forward, diagonal_backward, IN1 | FROZEN0},
    {"shard_tile of wide", {{6, 11}}, {{{6, 4}}}, tile_forward, tile_backward, IN0},
    {"broadcast_mul, columns", {{6, 5}}, {{{6, 5}}, {{1, 5}}}, mul_forward, mul_backward, IN1},
    {"broadcast_mul, rows", {{6, 5}}, {{{6, 5}}, {{6, 1}}}, mul_forward, mul_backward, IN1},
    {"broadcast_mul, wide rows", {{6, 5}}, {{{6, 5}}, {{6, 1}}}, mul_forward, mul_backward, OUT | IN0 | IN1},
    {"broadcast_mul, rows of wide", {{6, 5}}, {{{6, 5}}, {{6, 1}}}, mul_forward, mul_backward, IN0 | IN1},
    {"broadcast_dot, columns", {{1, 50}}, {{{6, 50}}, {{6, 50}}}, dot_forward, dot_backward, OUT},
    {"broadcast_dot, rows", {{6, 1}}, {{{6, 50}}, {{6, 50}}}, dot_forward, dot_backward, OUT},
    {"magnitude", {{6, 1}}, {{{6, 1}}, {{6, 1}}}, mag_forward, mag_backward, OUT | IN0 | IN1 | FRONT_TO_BACK},
};
enum { OP_CASES = sizeof op_cases / sizeof *op_cases };

// Sizes that 37 times the above do not reach: widths around a GPU's accesses of 16 bytes, more columns than its
// blocks and their registers take at once, more equal ids than a block has threads, more rows than the blocks of
// a grid have.
static const op_case gpu_cases[] = {
    {"wide embedding", {{300, 261}}, {{{40, 261}}}, embed_forward, embed_backward, 0},
    {"embedding, whole rows", {{300, 2056}}, {{{40, 2056}}}, embed_forward, embed_backward, 0},
    {"embedding, one id", {{300, 8}}, {{{1, 8}}}, embed_forward, embed_backward, 0},
    {"wide rope", {{6, 594}}, {{{6, 594}}}, rope_forward, rope_backward, 0},
    {"rope, many heads", {{9, 4 * 270}}, {{{9, 4 * 270}}}, rope_forward, rope_backward, 0},
    {"rmsnorm of 7", {{6, 7}}, {{{6, 7}}, {{7}}}, norm_forward, norm_backward, IN1},
    {"rmsnorm of 8", {{6, 8}}, {{{6, 8}}, {{8}}}, norm_forward, norm_backward, FROZEN1},
    {"rmsnorm of 4096", {{3, 4096}}, {{{3, 4096}}, {{4096}}}, norm_forward, norm_backward, FROZEN1},
    {"rmsnorm of 4097", {{3, 4097}}, {{{3, 4097}}, {{4097}}}, norm_forward, norm_backward, IN1},
    {"rmsnorm of 8200", {{3, 8200}}, {{{3, 8200}}, {{8200}}}, norm_forward, norm_backward, IN1},
    {"swiglu of 1", {{9, 1}}, {{{9, 1}}, {{9, 1}}}, glu_forward, glu_backward, 0},
    {"swiglu of 8", {{9, 8}}, {{{9, 8}}, {{9, 8}}}, glu_forward, glu_backward, 0},
    {"swiglu of 2056", {{9, 2056}}, {{{9, 2056}}, {{9, 2056}}}, glu_forward, glu_backward, 0},
    {"bias of 2056", {{9, 2056}}, {{{9, 2056}}, {{2056}}}, add_bias_forward, add_bias_backward, IN1},
    {"cross_entropy of 2", {{6, 1}}, {{{6, 2}}}, ce_forward, ce_backward, OUT},
    {"cross_entropy of 2056", {{6, 1}}, {{{6, 2056}}}, ce_forward, ce_backward, OUT},
    {"cross_entropy of 4099", {{6, 1}}, {{{6, 4099}}}, ce_forward, ce_backward, OUT},
    {"layernorm of 1 channel more than 4096", {{3, 4097}}, {{{3, 4097}}, {{4097}}, {{4097}}}, ln1_forward, ln1_backward,
        IN1 | IN2},
    {"layernorm of 2560", {{9, 2560}}, {{{9, 2560}}, {{2560}}, {{2560}}}, ln1_forward, ln1_backward, FROZEN1 | FROZEN2},
    {"layernorm of 128", {{9, 128}}, {{{9, 128}}, {{128}}, {{128}}}, ln1_forward, ln1_backward, FROZEN1 | FROZEN2},
    {"layernorm of 129", {{9, 129}}, {{{9, 129}}, {{129}}, {{129}}}, ln1_forward, ln1_backward, IN1 | IN2},
    {"layernorm of 3 heads of 64", {{11, 192}}, {{{11, 192}}, {{192}}, {{192}}}, ln3_forward, ln3_backward, IN1 | IN2},
    {"layernorm of 3 heads of 96", {{9, 288}}, {{{9, 288}}, {{288}}, {{288}}}, ln3_forward, ln3_backward, IN1 | IN2},
    {"layernorm of 3 heads of 67", {{9, 201}}, {{{9, 201}}, {{201}}, {{201}}}, ln3_forward, ln3_backward,
        FROZEN1 | FROZEN2},
    {"shift_mix of 2057", {{9, 2057}}, {{{9, 2057}}, {{2057}}, {{9, 2057}}}, shift_forward, shift_backward, IN1},
    {"tanh of 2057", {{9, 2057}}, {{{9, 2057}}}, th_forward, th_backward, 0},
    {"relu² of 2057", {{9, 2057}}, {{{9, 2057}}}, relu_forward, relu_backward, 0},
    {"sigmoid_gate of 2057", {{9, 2057}}, {{{9, 2057}}, {{9, 2057}}}, gate_forward, gate_backward, 0},
    {"wkv6 of heads of 4", {{100, 24}}, {{{100, 96}}, {{24}}}, wkv_forward, wkv_backward, IN1 | FRONT_TO_BACK},
    {"shards of 1", {{9, 1}}, {{{9, 77}}}, sum_forward, sum_backward, 0},
    {"shards of 8", {{9, 8}}, {{{9, 2056}}}, sum_forward, sum_backward, 0},
    {"shards of 64", {{9, 64}}, {{{9, 1000}}}, sum_forward, sum_backward, 0},
    {"shards of 520", {{9, 520}}, {{{9, 1048}}}, sum_forward, sum_backward, 0},
    {"one shard, not full", {{9, 40}}, {{{9, 24}}}, sum_forward, sum_backward, 0},
    {"tiles of 37", {{9, 2057}}, {{{9, 37}}}, tile_forward, tile_backward, 0},
    {"tiles of 36", {{9, 2057}}, {{{9, 36}}}, tile_forward, tile_backward, 0},
    {"wide tiles of 8", {{9, 2056}}, {{{9, 8}}}, tile_forward, tile_backward, IN0},
    {"block_diagonal, rank 8", {{700, 32}}, {{{700, 24}}, {{3, 8, 8}}}, diagonal_forward, diagonal_backward, IN1},
    {"block_diagonal, rank 3", {{63, 18}}, {{{63, 15}}, {{5, 3, 3}}}, diagonal_forward, diagonal_backward, IN1},
    {"block_diagonal, rank 36", {{1, 144}}, {{{1, 108}}, {{3, 36, 36}}}, diagonal_forward, diagonal_backward, IN1},
    {"block_diagonal, rank 64", {{129, 384}}, {{{129, 320}}, {{5, 64, 64}}}, diagonal_forward, diagonal_backward, IN1},
    {"block_diagonal, rank 72", {{270, 216}}, {{{270, 144}}, {{2, 72, 72}}}, diagonal_forward, diagonal_backward, IN1},
    {"block_diagonal, rank 130", {{65, 390}}, {{{65, 260}}, {{2, 130, 130}}}, diagonal_forward, diagonal_backward, IN1},
    {"broadcast_mul, 2056 columns", {{9, 2056}}, {{{9, 2056}}, {{1, 2056}}}, mul_forward, mul_backward, IN1},
    {"broadcast_mul, 7 columns", {{9, 7}}, {{{9, 7}}, {{1, 7}}}, mul_forward, mul_backward, IN1},
    {"broadcast_dot, 2056 columns", {{9, 1}}, {{{9, 2056}}, {{9, 2056}}}, dot_forward, dot_backward, OUT},
    {"shard_sum of many rows", {{524300, 1}}, {{{524300, 2}}}, sum_forward, sum_backward, 0},
    {"magnitude of many", {{300, 1}}, {{{300, 1}}, {{300, 1}}}, mag_forward, mag_backward,
        OUT | IN0 | IN1 | FRONT_TO_BACK},
};
enum { GPU_CASES = sizeof gpu_cases / sizeof *gpu_cases };

static const span two_spans[SPANS] = {{0, 4, 0, 4}, {4, 2, 4, 2}};

// Every side f times as long, but for a batch and for sides of 1.
static mat op_mat(shape s, int f, int is_wide)
{
    for (int d = s.n[2] ? 1 : 0; d < 3; d++)
        if (s.n[d] > 1) s.n[d] *= f;
    mat m = mat_of(NULL, F32, s);
    mat all = typed_mat(SHAPE(m.batch, m.rows, m.cols + op_pad), is_wide ? TYPE_OF(wide) : TYPE_OF(real));
    all.cols = m.cols;
    return all;
}

static void put_numbers(mat m, double (*number)(int row, int col, double was))
{
    wide *x = on_host(m);
    for (int i = 0; i < m.rows; i++)
        for (int j = 0; j < m.cols; j++) x[i * m.cols + j] = (wide)number(i, j, (double)x[i * m.cols + j]);
    put(m, x, TYPE_OF(wide));
    free(x);
}

// RoPE's table: cosines, then sines of position t times a frequency of each pair.
static double turned(int t, int i, double was)
{
    (void)was;
    return i < op_head / 2 ? cos(t * (i + 0.3)) : sin(t * (i - op_head / 2 + 0.3));
}

static double positive(int i, int j, double was) { (void)i, (void)j; return 1 + was * was; }
static double scale_of_loss(int i, int j, double was) { (void)i, (void)j, (void)was; return 0.3; }

// Allocates a case's matrices, f times as large, fills them with random numbers, and runs it forward and
// backward.
static void op_open(const op_case *c, int f, int head, const span *spans)
{
    int pad = op_pad;
    if (c->flags & FRONT_TO_BACK) op_pad = 0;
    memset(&op, 0, sizeof op);
    op.out = op_mat(c->out, f, c->flags & OUT);
    op.cot = op_mat(c->out, f, c->flags & OUT);
    for (int j = 0; j < 3 && c->in[j].n[0]; j++) op.in[j] = op_mat(c->in[j], f, c->flags & IN0 << j);
    for (int j = 0; j < 3; j++) {
        if (!op.in[j].p || c->flags & FROZEN0 << j) continue;
        op.grad[j] = op_mat(c->in[j], f, c->flags & IN0 << j);
        zero(op.grad[j]);
    }
    int n = op.out.rows, *ids = alloc((size_t)n, sizeof *ids), *pos = alloc((size_t)n, sizeof *pos);
    int different_ids = c->forward == embed_forward ? op.in[0].rows : op.in[0].cols;
    for (int k = 0; k < n; k++) {
        ids[k] = (int)(((long)k * k + 3) % different_ids);
        pos[k] = (int)((long)k * k % POSITIONS);
    }
    op_ids = (dev_ints)dev_alloc((size_t)n * sizeof(int));
    op_pos = (dev_ints)dev_alloc((size_t)n * sizeof(int));
    put_ints(op_ids, ids, (size_t)n);
    put_ints(op_pos, pos, (size_t)n);
    for (op_span_count = 0; op_span_count < SPANS && spans[op_span_count].nq; op_span_count++) {
        span s = spans[op_span_count];
        op_spans[op_span_count] = (span){s.q * f, s.nq * f, s.k * f, s.nk * f};
    }
    op_head = head * f;
    op_window = c->flags / FLAGS ? c->flags / FLAGS * f : INT_MAX;
    op_lse = typed_mat(SHAPE(n, ceil_div(op.in[0].cols, op_head)), TYPE_OF(wide));
    op_table = random_mat(SHAPE(POSITIONS, op_head));
    op_kept = op_mat(c->in[0], f, 0);
    put_numbers(op_table, turned);
    if (c->forward == mag_forward) put_numbers(op.in[1], positive);            // squares
    if (c->forward == ce_forward) put_numbers(op.cot, scale_of_loss);
    free(ids);
    free(pos);
    op_pad = pad;
    c->forward();
    c->backward();
}

static void op_close(void)
{
    for (int j = 0; j < 3; j++) {
        dev_free(op.in[j].p);
        dev_free(op.grad[j].p);
    }
    for (mat *m = (mat[]){op.out, op.cot, op_lse, op_table, op_kept, {0}}; m->p; m++) dev_free(m->p);
    dev_free((dev)op_ids);
    dev_free((dev)op_pos);
}

// ---- what a half computes, for the other half to compare --------------------------------------------------

static snapshot *give_away(snapshot *list, const char *what, const char *name, mat m)
{
    list = take(list, what, name, m);
    dev_free(m.p);
    return list;
}

// The first rows and columns of a matrix.
static mat corner(mat m, int rows, int cols)
{
    m.rows = rows;
    m.cols = cols;
    return m;
}

// Every product, with every type that y, x and the weight may have, in parts of larger matrices.
static snapshot *matmul_results(snapshot *list)
{
    static const struct {
        const char *name;
        void (*run)(mat, mat, mat, double, enum mode);
        int y[2], x[2], w[2];
    } products[] = {
        {"nt", matmul_nt, {70, 33}, {70, 45}, {33, 45}},
        {"nn", matmul_nn, {70, 45}, {70, 33}, {33, 45}},
        {"tn", matmul_tn, {33, 45}, {70, 33}, {70, 45}},
    };
    for (int i = 0; i < 3 * 2 * 2 * DTYPES * 2; i++) {
        int form = i % 3, wide_y = i / 3 % 2, wide_x = i / 6 % 2;
        int type = i / 12 % DTYPES, mode = i / 12 / DTYPES;
        const int *y = products[form].y, *x = products[form].x, *w = products[form].w;
        mat Y = typed_mat(SHAPE(y[0] + 5, y[1] + 8), wide_y ? TYPE_OF(wide) : TYPE_OF(real));
        mat X = typed_mat(SHAPE(x[0], x[1] + 8), wide_x ? TYPE_OF(wide) : TYPE_OF(real));
        mat W = typed_mat(SHAPE(w[0], w[1]), (enum dtype)type);
        char name[100];
        products[form].run(corner(Y, y[0], y[1]), corner(X, x[0], x[1]), W, 0.5, (enum mode)mode);
        snprintf(name, sizeof name, "matmul_%s, %s y, %s x, weight in %s%s", products[form].name,
                 wide_y ? "wide" : "real", wide_x ? "wide" : "real", dtypes[type].name,
                 mode == ADD ? ", added" : "");
        list = give_away(list, name, "", Y);
        dev_free(X.p);
        dev_free(W.p);
    }
    return list;
}

// Products of three blocks with a wide weight and gradient: the blocks of x and y stand beside each other, as
// Bat-row's, or one behind the other, as Bat's. Then one weight for all blocks.
static snapshot *block_results(snapshot *list)
{
    for (int behind = 0; behind < 2; behind++) {
        mat x = random_mat(SHAPE(70, 24)), y = random_mat(SHAPE(70, 24));
        mat w = typed_mat(SHAPE(3, 8, 8), TYPE_OF(wide)), dw = typed_mat(SHAPE(3, 8, 8), TYPE_OF(wide));
        mat one = random_mat(SHAPE(8, 8));
        mat X = behind ? shaped(x, 3, 70, 8) : column_blocks(x, 8);
        mat Y = behind ? shaped(y, 3, 70, 8) : column_blocks(y, 8);
        matmul_nt(Y, X, w, 1, SET);
        matmul_nn(Y, X, w, 0.5, ADD);
        matmul_nn(Y, X, one, 0.25, ADD);
        matmul_tn(dw, X, Y, 1, ADD);
        const char *prefix = behind ? "blocks behind each other, " : "blocks beside each other, ";
        list = give_away(list, prefix, "y", y);
        list = give_away(list, prefix, "dw", dw);
        dev_free(x.p);
        dev_free(w.p);
        dev_free(one.p);
    }
    return list;
}

// A weight of every dtype, from a file, and the ops that read it beside the products.
static snapshot *weight_results(snapshot *list)
{
    enum { ROWS = 300, COLS = 7 };
    int ids[ROWS];
    wide x[ROWS * COLS];
    unsigned char file[ROWS * COLS * 8];
    dev_ints some = (dev_ints)dev_alloc(sizeof ids);
    for (int i = 0; i < ROWS; i++) ids[i] = i * i % ROWS;
    for (int i = 0; i < ROWS * COLS; i++) x[i] = (wide)rng_normal(&dice);
    put_ints(some, ids, ROWS);
    for (int type = 0; type < DTYPES; type++) {
        for (int i = 0; i < ROWS * COLS; i++) {
            wide number = x[i];                                     // narrow() may write over what it reads
            narrow(file + (size_t)i * dtypes[type].size, (enum dtype)type, &number, 1);
        }
        mat w = dev_weight(mat_of(file, (enum dtype)type, SHAPE(ROWS, COLS)));
        mat rows = random_mat(SHAPE(ROWS, COLS)), norm = random_mat(SHAPE(COLS));
        mat squares = typed_mat(SHAPE(ROWS, 1), TYPE_OF(wide));
        mat changed = random_mat(SHAPE(ROWS, COLS)), step = random_mat(SHAPE(ROWS, COLS));
        // The step has few bits, so that w + step is exact even in float: both halves round the sum just
        // once.
        mat few_bits = typed_mat(SHAPE(ROWS, COLS), BF16);
        copy(step, few_bits);
        embedding_forward(rows, w, some);
        put(norm, file, (enum dtype)type);
        broadcast_dot(squares, w, w, 1, SET);
        copy(changed, w);                                           // as PiSSA takes its start from the base
        add(changed, step, 0.5);
        copy(w, changed);
        const char *name = dtypes[type].name;
        list = give_away(list, "rows of a weight in ", name, rows);
        list = give_away(list, "norms in ", name, norm);
        list = give_away(list, "squares of ", name, squares);
        list = take(list, "changed weight in ", name, w);
        dev_free(changed.p);
        dev_free(step.p);
        dev_free(few_bits.p);
        dev_weight_free(w);
    }
    dev_free((dev)some);
    return list;
}

// 1 where two matrices hold the same bits, else 0.
static snapshot *same_bits(snapshot *list, const char *what, mat a, mat b)
{
    wide *x = on_host(a), *y = on_host(b);
    wide same = elements(a) == elements(b) && !memcmp(x, y, elements(a) * sizeof *x);
    mat verdict = typed_mat(SHAPE(1, 1), TYPE_OF(wide));
    put(verdict, &same, TYPE_OF(wide));
    free(x);
    free(y);
    return give_away(list, what, ", same bits", verdict);
}

// RMSNorm copies x into the residual stream in the pass that writes out: the bits of x, and those of out
// without the copy.
static snapshot *residual_results(snapshot *list)
{
    enum { N = 9, C = 300 };
    mat x = random_mat(SHAPE(N, C)), w = random_mat(SHAPE(C)), residual = random_mat(SHAPE(N, C));
    mat out = random_mat(SHAPE(N, C)), alone = random_mat(SHAPE(N, C));
    rmsnorm_forward(out, residual, x, w, 1e-5);
    rmsnorm_forward(alone, (mat){0}, x, w, 1e-5);
    list = same_bits(list, "rmsnorm beside its residual", out, alone);
    list = same_bits(list, "residual of rmsnorm", residual, x);
    for (mat *m = (mat[]){x, w, residual, out, alone, {0}}; m->p; m++) dev_free(m->p);
    return list;
}

// An op writes nothing to an output without memory (p == NULL), and reads nothing that only this output
// needs.
static void unwanted(void)
{
    mat none = {.type = TYPE_OF(real), .rows = 6, .cols = 6, .ld = 6, .batch = 1};
    mat x = random_mat(SHAPE(6, 6)), norm = random_mat(SHAPE(6));
    mat wider = typed_mat(SHAPE(6, 1), TYPE_OF(wide));
    matmul_nt(none, x, x, 1, ADD);
    matmul_nn(none, x, x, 1, ADD);
    matmul_tn(none, x, x, 1, ADD);
    copy(none, x);
    add(none, x, 1);
    shard_tile(none, x);
    embedding_backward(none, x, NULL);
    rmsnorm_backward(none, none, x, x, norm, 1e-5);
    broadcast_mul(none, x, wider, 1, ADD);
    broadcast_dot(none, x, x, 1, ADD);
    dev_free(x.p);
    dev_free(norm.p);
    dev_free(wider.p);
}

// Attention over rows of many lengths, laid end to end: one query, less and more than the 64 of a GPU's block, more keys
// than queries, as when a text is generated: there the first query sees all of its last tile but one key. Heads of every
// kernel's width and between, and of many kinds of groups.
static snapshot *attention_results(snapshot *list)
{
    static const span some[] = {{0, 1, 0, 1}, {1, 64, 1, 64}, {65, 65, 65, 65}, {130, 17, 130, 17}, {147, 3, 147, 17}};
    static const span unseen[] = {{0, 3, 0, 200}};      // the window leaves the first blocks of keys without a query
    static const span two[] = {{0, 700, 0, 700}, {700, 3, 700, 17}};
    static const struct { const char *name; int head, heads, kv_heads, window, spans; const span *list; } cases[] = {
        {"heads of 8", 8, 4, 2, INT_MAX, 2, two}, {"heads of 8 in a window", 8, 4, 2, 11, 2, two},
        {"heads of 24", 24, 2, 2, INT_MAX, 5, some}, {"heads of 64", 64, 8, 1, INT_MAX, 5, some},
        {"heads of 80", 80, 2, 1, 40, 5, some}, {"heads of 96", 96, 4, 1, 7, 5, some},
        {"heads of 120", 120, 1, 1, INT_MAX, 5, some}, {"heads of 128", 128, 4, 2, 64, 5, some},
        {"heads of 33", 33, 3, 3, 65, 5, some}, {"keys that no query sees", 16, 2, 1, 7, 1, unseen},
        {"heads of 128 and 99 KB a block", 128, 4, 2, 64, 5, some},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int d = cases[i].head, window = cases[i].window, n = cases[i].spans;
        span last = cases[i].list[n - 1];
        int rows = last.q + last.nq, keys = last.k + last.nk, wide_q = d * cases[i].heads, wide_k = d * cases[i].kv_heads;
        mat q = random_mat(SHAPE(rows, wide_q)), k = random_mat(SHAPE(keys, wide_k)), v = random_mat(SHAPE(keys, wide_k));
        mat out = like(q), lse = typed_mat(SHAPE(rows, cases[i].heads), TYPE_OF(wide));
        mat dq = like(q), dk = like(k), dv = like(v), dout = random_mat(SHAPE(rows, wide_q));
        char what[64];
        snprintf(what, sizeof what, "attention, %s, ", cases[i].name);
        if (strstr(what, "99 KB") && sizeof(real) == 2) setenv("CUDA_ON_CPU_SHARED", "99", 1);     // too little for wider numbers
        attention_forward(out, lse, q, k, v, d, window, cases[i].list, n);
        attention_backward(dq, dk, dv, dout, q, k, v, out, lse, d, window, cases[i].list, n);
        unsetenv("CUDA_ON_CPU_SHARED");
        list = give_away(list, what, "out", out);
        list = give_away(list, what, "lse", lse);
        list = give_away(list, what, "dq", dq);
        list = give_away(list, what, "dk", dk);
        list = give_away(list, what, "dv", dv);
        for (mat *m = (mat[]){q, k, v, dout, {0}}; m->p; m++) dev_free(m->p);
    }
    return list;
}

// Decays from none to all at once: e is near 1, between, and nothing beside it, where exp(w) is large.
static double forgetful(int n, int c, double was)
{
    return (n + c) % 11 ? was * 3 - 1 : 6 + (n + 5 * c) % 17;
}

// Texts of fewer and more tokens than a GPU fetches at once; heads of each of its kernels, and such as fill no packs. Then
// texts that go on from a state, and leave theirs. Rows of r begin anywhere where heads are narrow.
static snapshot *wkv_results(snapshot *list)
{
    static const span some[] = {{0, 1, 0, 1}, {1, 15, 1, 15}, {16, 16, 16, 16}, {32, 17, 32, 17}, {49, 61, 49, 61}};
    static const span onward[] = {{0, 9, 0, 9}, {9, 17, 1, 20}, {26, 1, 2, 5}};
    static const struct { int head, heads; } cases[] = {{4, 5}, {3, 3}, {32, 2}, {50, 1}, {64, 2}, {96, 1}, {128, 1}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int d = cases[i].head, heads = cases[i].heads, A = d * heads;
        mat x = random_mat(SHAPE(110, 4 * A)), u = typed_mat(SHAPE(heads, d), TYPE_OF(wide)), y = random_mat(SHAPE(110, A));
        mat r = quarter(x, 0), k = quarter(x, 1), v = quarter(x, 2), w = random_mat(SHAPE(110, A));
        mat dy = random_mat(SHAPE(110, A)), dr = like(y), dk = like(y), dv = like(y), dw = like(y), du = like(u), none = {0};
        mat state = typed_mat(SHAPE(3, A * d), TYPE_OF(wide));
        char what[64];
        put_numbers(w, forgetful);
        snprintf(what, sizeof what, "wkv6, %d heads of %d, ", heads, d);
        wkv6_forward(y, (mat){0}, r, k, v, w, u, some, 5);
        wkv6_backward(dr, dk, dv, dw, i % 2 ? du : none, dy, r, k, v, w, u, some, 5);
        list = take(list, what, "y", y);
        wkv6_forward(y, state, r, k, v, w, u, onward, 3);
        list = give_away(list, what, "y from a state", y);
        list = give_away(list, what, "state", state);
        list = give_away(list, what, "dr", dr);
        list = give_away(list, what, "dk", dk);
        list = give_away(list, what, "dv", dv);
        list = give_away(list, what, "dw", dw);
        if (i % 2) list = take(list, what, "du", du);
        for (mat *m = (mat[]){x, u, w, dy, du, {0}}; m->p; m++) dev_free(m->p);
    }
    return list;
}

// h = x Aᵀ and y = h Bᵀ of a rank that fills no packs, h and y in aligned rows: a GPU's products may go beyond the rank, where
// nobody's numbers lie. A's columns beside those of another matrix, which must stay as it is.
static snapshot *spare_results(snapshot *list)
{
    mat x = random_mat(SHAPE(70, 24)), A = typed_mat(SHAPE(36, 24), TYPE_OF(wide)), B = typed_mat(SHAPE(44, 36), TYPE_OF(wide));
    mat h = first_columns(random_mat(SHAPE(70, pitch(36))), 36), y = first_columns(random_mat(SHAPE(70, pitch(44))), 44);
    mat both = random_mat(SHAPE(70, 80));
    zero(h);
    matmul_nt(h, x, A, 0.5, SET);
    matmul_nt(y, h, B, 0.5, ADD);
    matmul_nt(columns_of(both, 0, 36), x, A, 0.5, SET);
    matmul_nn(columns_of(both, 40, 36), y, B, 0.5, SET);
    for (mat *m = (mat[]){x, A, B, {0}}; m->p; m++) dev_free(m->p);
    list = give_away(list, "spare columns, ", "h", h);
    list = give_away(list, "spare columns, ", "y", y);
    return give_away(list, "spare columns, ", "of another matrix", both);
}

__attribute__((weak)) long cuda_on_cpu_mallocs(void);       // absent on a real GPU
__attribute__((weak)) double gpu_tolerance(int one_op);     // what dev/gpu_half.c has

// Products large enough for what a GPU in 16 bits has for them: among other columns, one of two shapes again; and one that does
// not begin at 256 bytes, and so must not be given to it. Their tiles of 256 × 128 must fill the card: 128 of them a Hopper's 132
// multiprocessors, 32 the 33 that are emulated. In float and double no product is large.
static snapshot *large_results(snapshot *list)
{
    enum { IN = 1056, BESIDE = 128 };
    const int N = gpu_tolerance(1) < 1e-3 ? 128 : cuda_on_cpu_mallocs ? 1024 : 2048;
    mat x = random_mat(SHAPE(N, IN + BESIDE)), W = random_mat(SHAPE(N, IN)), V = random_mat(SHAPE(IN, N));
    mat y = random_mat(SHAPE(N, N + BESIDE)), dW = random_mat(SHAPE(N, N)), beside = random_mat(SHAPE(N, N + 3));
    mat part = columns_of(y, BESIDE, N), from = columns_of(x, BESIDE, IN);
    matmul_nt(part, from, W, 0.5, ADD);
    matmul_nn(part, from, V, -0.25, ADD);
    matmul_nt(part, from, W, 0.5, ADD);
    matmul_tn(dW, V, V, 0.5, SET);
    matmul_nt(columns_of(beside, 3, N), from, W, 0.5, ADD);
    list = take(list, "large products, ", "first rows", rows_of(y, 0, 3));
    list = take(list, "large products, ", "last rows", rows_of(y, N - 3, 3));
    list = take(list, "large products, ", "across", rows_of(dW, N - 3, 3));
    list = take(list, "large products, ", "beside 256 bytes", rows_of(beside, 0, 3));
    for (mat *m = (mat[]){x, W, V, y, dW, beside, {0}}; m->p; m++) dev_free(m->p);
    return list;
}

// AdamW, and a sum of squares of more numbers than it has threads on a GPU; the tiled identity, and a wide
// term added to it.
static snapshot *training_results(snapshot *list)
{
    mat w = typed_mat(SHAPE(17000, 16), TYPE_OF(wide)), dw = typed_mat(SHAPE(17000, 16), TYPE_OF(wide));
    mat m = like(w), v = like(w), e = random_mat(SHAPE(7, 300)), sum = typed_mat(SHAPE(1, 1), TYPE_OF(wide));
    mat many = typed_mat(SHAPE(140003, 15), TYPE_OF(wide));
    for (int t = 1; t <= 3; t++) adamw(w, dw, m, v, 0.01, 0.1, 0.5, t);
    wide squares = (wide)sum_of_squares(many);
    put(sum, &squares, TYPE_OF(wide));
    tiled_identity(e);
    add(e, shaped(dw, 1, 7, 300), 0.5);
    list = give_away(list, "adamw, ", "w", w);
    list = give_away(list, "adamw, ", "m", m);
    list = give_away(list, "adamw, ", "v", v);
    dev_free(dw.p);
    dev_free(many.p);
    list = give_away(list, "", "sum_of_squares", sum);
    return give_away(list, "", "tiled_identity", e);
}

// Magnitudes of rows, of which some have the length zero.
static snapshot *no_length_results(snapshot *list)
{
    static const wide squares[6] = {4, 0, 1, 0, 9, (wide)0.25};
    mat q = typed_mat(SHAPE(6, 1), TYPE_OF(wide)), m = typed_mat(SHAPE(6, 1), TYPE_OF(wide));
    mat dgain = typed_mat(SHAPE(6, 1), TYPE_OF(wide)), gain = typed_mat(SHAPE(6, 1), TYPE_OF(wide));
    mat dm = typed_mat(SHAPE(6, 1), TYPE_OF(wide)), dq = typed_mat(SHAPE(6, 1), TYPE_OF(wide));
    put(q, squares, TYPE_OF(wide));
    magnitude_forward(gain, m, q);
    magnitude_backward(dm, dq, dgain, m, q);
    dev_free(q.p);
    dev_free(m.p);
    dev_free(dgain.p);
    list = give_away(list, "no length, ", "gain", gain);
    list = give_away(list, "no length, ", "dm", dm);
    return give_away(list, "no length, ", "dsquares", dq);
}

// The head_dim that a case begins with; it grows with the shape, and attention's then is wide enough.
static int head_of(const op_case *c)
{
    if (c->forward == att_forward || c->forward == wkv_forward) return 1;
    return c->forward == rope_forward ? ROPE_HEAD : HEAD;
}

// Of every case its output and gradients, of those for the GPU also with gaps between the rows, then what the
// cases do not reach.
static snapshot *op_results(void)
{
    static const char *const grads[3] = {"d in 0", "d in 1", "d in 2"};
    snapshot *list = NULL;
    for (int i = 0; i < OP_CASES + 2 * GPU_CASES; i++) {
        const op_case *c = i < OP_CASES ? &op_cases[i] : &gpu_cases[(i - OP_CASES) % GPU_CASES];
        char prefix[64];
        op_pad = i < OP_CASES + GPU_CASES ? 0 : 3;          // then rows begin anywhere
        snprintf(prefix, sizeof prefix, "%s%s, ", c->name, op_pad ? " in wider rows" : "");
        op_open(c, i < OP_CASES ? 37 : 1, head_of(c), two_spans);
        op_pad = 0;
        list = take(list, prefix, "out", op.out);
        for (int j = 0; j < 3; j++)
            if (op.grad[j].p) list = take(list, prefix, grads[j], op.grad[j]);
        op_close();
    }
    unwanted();
    list = no_length_results(list);
    list = matmul_results(list);
    list = block_results(list);
    list = weight_results(list);
    list = attention_results(list);
    list = wkv_results(list);
    list = spare_results(list);
    list = large_results(list);
    list = residual_results(list);
    return training_results(list);
}

// The first step of full fine-tuning of the bundled model, on a pair of rows of data/train.jsonl.
static snapshot *bundled_results(int pair, const snapshot *other)
{
    options before = opt;
    char *rows = in_scratch("pair.jsonl"), command[200];
    snprintf(command, sizeof command, "head -n %d data/train.jsonl | tail -n 2 > %s", 2 * pair + 2, rows);
    if (system(command)) die("%s failed", command);
    char *args[] = {"train", "--model", "base", "--data", rows, "--val", "data/val.jsonl",
                    "--method", "full", "--batch", "2", "--no-shuffle", NULL};
    snapshot *list = step_tensors((int)(sizeof args / sizeof *args) - 1, args, other);
    opt = before;
    free(rows);
    return list;
}

// "ops", "bundled PAIR", or a step of one method on the small model, "METHOD" or "METHOD on KIN".
static snapshot *results_of(const char *what, int recompute, const snapshot *other)
{
    dice = (rng){42};
    if (!strcmp(what, "ops")) return op_results();
    if (!strncmp(what, "bundled ", 8)) return bundled_results(atoi(what + 8), other);
    char name[40];
    const char *on = strstr(what, " on ");
    int which = 0;
    snprintf(name, sizeof name, "%.*s", (int)(on ? on - what : 39), what);
    while (on && strcmp(kin[which].name, on + 4)) which++;
    plan p = small_plan(name);
    p.recompute = recompute;
    model *m = open_small(p, which);
    dice = (rng){42};
    // Twice as far off, dora's gradients amplify an error in the last place 200 times: too much for floats.
    shake(m, 0.1, &dice);
    batch b = small_batch(0, 3);
    snapshot *list = snapshots_of_step(m, &b, other);
    batch_free(&b);
    close_small(m);
    return list;
}
