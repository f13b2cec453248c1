//  run/peft.h: PEFT's files. adapter_config.json and adapter_model.safetensors, with PEFT's field names and keys. What
//  PEFT has no format for (frozen, bat-row) is written the same way under a peft_type of its own.

#ifndef PEFT_H
#define PEFT_H
#include "../adapters.h"

// The fields by which PEFT tells the variants of LoRA apart.
static const char *const lora_flags[] = {"use_rslora", "use_dora"};

static int same_text(const char *a, const char *b) { return a == b || (a && b && !strcmp(a, b)); }

// The first method that is written so, or NULL.
static const method *method_of_peft(const char *type, const char *variant)
{
    for (const method *m = methods; m < methods + METHODS; m++)
        if (m->peft_type && !strcmp(m->peft_type, type) && same_text(m->peft_variant, variant)) return m;
    return NULL;
}

// What adapter_config.json says besides its type and rank.
static void peft_config_lora(json_t *json, const plan *p, double alpha)
{
    set_field(json, "lora_alpha", number_value(alpha));
    set_field(json, "lora_dropout", number_value(0));
    for (int i = 0; i < 2; i++)
        set_field(json, lora_flags[i], json_boolean(same_text(p->method->peft_variant, lora_flags[i])));
    set_field(json, "init_lora_weights", json_boolean(1));
}

static void peft_config_miss(json_t *json, const plan *p)
{
    set_field(json, "miss_dropout", number_value(0));
    set_field(json, "mini_r", number_value(p->mini_r));
    if (p->method->peft_variant) set_field(json, "init_weights", text_value(p->method->peft_variant));
    else set_field(json, "init_weights", json_boolean(1));
}

// Linear i of a layer as "target_modules" names it: by its last name, "q_proj", if no other has the same, as in
// "attention.key" and "feed_forward.key".
static const char *module_name(const model *m, int i)
{
    const char *module = m->linears[i]->is.module, *last = strchr(module, '.') + 1;
    for (int j = 0; j < linears_of_layer(m); j++)
        if (j != i && same_module(m->linears[j]->is.module, last)) return module;
    return last;
}

// Bone and mini are corners of DiSHA that PEFT knows: an adapter that lies there is written as they are.
static plan plan_as_written(const model *m)
{
    plan p = m->p;
    if (strcmp(p.method->name, "disha")) return p;
    int a = p.shard[0] ? p.shard[0] : p.rank, b = p.shard[1] ? p.shard[1] : p.rank, divides = b > 0;
    for (int i = 0; i < arrlen(m->linears) && divides; i++)
        divides = !has_adapter(m->linears[i]) || m->linears[i]->W.rows % b == 0;
    if (a < 0 || (b != OUT_SIDE && !divides)) return p;
    p.method = method_named(b == OUT_SIDE ? "bone" : "mini");
    p.rank = a;
    if (divides) p.mini_r = b;
    return p;
}

static json_t *peft_config(const model *m, const char *base)
{
    const plan as_written = plan_as_written(m), *p = &as_written;
    char pair[32];
    const char *type = p->method->peft_type;
    json_t *json = json_object();
    int doubled = p->method->has_start ? 2 : 1;                           // s (B A − B0 A0): rank 2r, the same s
    set_field(json, "peft_type", text_value(type));
    set_field(json, "task_type", text_value("CAUSAL_LM"));
    set_field(json, "base_model_name_or_path", text_value(base));
    set_field(json, "bias", text_value("none"));
    set_field(json, "inference_mode", json_boolean(1));
    set_field(json, "r", number_value(p->rank * doubled));
    // The target modules as they came with an adapter, or those that all layers have.
    json_t *targets = p->modules ? json_incref(p->modules) : json_array();
    set_field(json, "target_modules", targets);
    for (int i = 0; i < linears_of_layer(m) && !p->modules; i++)
        if (targeted_in_some(m, i)) json_array_append_new(targets, text_value(module_name(m, i)));
    int shard[2] = {p->shard[0] ? p->shard[0] : p->rank, p->shard[1] ? p->shard[1] : p->rank};
    int groups[2] = {p->groups[0] ? p->groups[0] : 1, p->groups[1] ? p->groups[1] : 1};
    if (!strcmp(type, "DISHA")) set_field(json, "shard", text_value(pair_text(shard, pair)));
    if (!strcmp(type, "BAT_FREE")) set_field(json, "groups", text_value(pair_text(groups, pair)));
    if (!strcmp(type, "LORA")) peft_config_lora(json, p, p->alpha * doubled);
    if (!strcmp(type, "MISS")) peft_config_miss(json, p);
    return json;
}

// The trained tensors as PEFT wants them: pissa, olora and lora-ga as [A; A0] and [B | −B0] on the untouched base.
static output *peft_outputs(model *m)
{
    output *list = NULL;
    for (int i = 0; i < arrlen(m->tensors); i++) {
        tensor *t = &m->tensors[i];
        if (t->kind != PARAM) continue;
        output o = {.shape = t->shape, .type = TYPE_OF(wide), .data = *t->value};
        memcpy(o.name, t->name, sizeof o.name);
        const linear *l = m->p.method->has_start ? t->of : NULL;
        if (l && t->value == &l->A) {
            o.below = l->A0;
            o.shape.n[0] *= 2;
        }
        if (l && t->value == &l->B) {
            o.beside = l->B0;
            o.shape.n[1] *= 2;
        }
        arrput(list, o);
    }
    return list;
}

static void peft_write(model *m, const char *base)
{
    output *list = peft_outputs(m);
    model_write(m, "adapter_model.safetensors", list, (int)arrlen(list));
    stage_json("adapter_config.json", peft_config(m, base));
    arrfree(list);
}

// What PEFT can ask for and is not built here is refused, never ignored.
static void peft_refuse(const json_t *json, const char *path)
{
    static const char *const unbuilt[] = {
        "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "layer_replication", "fan_in_fan_out",
        "lora_bias", "exclude_modules", "trainable_token_indices", "target_parameters", "use_qalora", "use_bdlora",
        "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config", "monteclora_config", NULL};
    for (const char *const *name = unbuilt; *name; name++) {
        const json_t *item = json_object_get(json, *name);
        int holds_some = json_object_size(item) || json_array_size(item);
        int empty = (json_is_object(item) || json_is_array(item)) && !holds_some;
        if (item && !json_is_null(item) && !json_is_false(item) && !empty)
            die("%s: \"%s\" is set, which is not built here", path, *name);
    }
    const char *bias = string_field(json, "bias");
    if (bias && strcmp(bias, "none")) die("%s: \"bias\" is \"%s\", only \"none\" is built", path, bias);
}

// Python's regular expression as POSIX's, which is matched here; "" if it has what POSIX has not. Whole names are
// matched, so that a lazy repeat means what a greedy one does. Counts in braces are left out (but for {1,}, which
// Unsloth writes): a few of them, nested, would take all memory.
static char *posix_regex(const char *python)
{
    char *posix = alloc(strlen(python) + 1, 16), *to = posix;
    to += sprintf(to, "^(");
    for (const char *c = python; *c; c++) {
        size_t set = *c == '[' && c[1] && !strchr("[]\\", c[1]) ? 2 + strcspn(c + 2, "[]\\") : 0;        // [a-z, without the ]
        int repeat = strchr("*+?", *c) != NULL;
        if (set && c[set] == ']') to += sprintf(to, "%.*s", (int)set + 1, c), c += set;
        else if (*c == '\\' && (c[1] == 'd' || c[1] == 'w')) to += sprintf(to, "%s", *++c == 'd' ? "[0-9]" : "[A-Za-z0-9_]");
        else if (!strncmp(c, "[\\d]", 4)) to += sprintf(to, "[0-9]"), c += 3;
        else if (!strncmp(c, "{1,}", 4)) *to++ = '+', c += 3;
        else if (!strncmp(c, "\\b", 2)) to += sprintf(to, "\\b"), c++;
        else if (*c == '\\' && c[1] && strchr(".-_/", c[1])) to += sprintf(to, "[%c]", *++c);
        else if (!strncmp(c, "(?:", 3)) *to++ = '(', c += 2;
        else if (strchr("\\[{}", *c) || !strncmp(c, "(?", 2) || (repeat && (c[1] == '*' || c[1] == '+'))) {
            *posix = 0;
            return posix;
        }
        else *to++ = *c, c += repeat && c[1] == '?';
    }
    sprintf(to, ")$");
    return posix;
}

// Whether it is a regular expression that POSIX knows.
static int compiled(regex_t *r, const char *posix)
{
    int error = regcomp(r, posix, REG_EXTENDED | REG_NOSUB);
    if (error == REG_ESPACE) die("out of memory: the regular expression %s", posix);
    return !error;
}

// Whether it matches all of a text.
static int matches(const char *posix, const char *text)
{
    regex_t r;
    if (!compiled(&r, posix)) return 0;
    int error = regexec(&r, text, 0, NULL, 0);
    if (error == REG_ESPACE) die("out of memory: the regular expression %s", posix);
    regfree(&r);
    return !error;
}

// "target_modules" by PEFT's rule (check_target_module_exists): a list of names, each a module's whole name or its end from a
// dot on; or a text, which is "all-linear", or a regular expression for the whole name.
static int peft_targeted(const json_t *modules, const char *module)
{
    const json_t *item;
    const char *text = json_string_value(modules);
    size_t i, n = strlen(module);
    if (text) {
        if (!strcasecmp(text, "all-linear")) return 1;
        char *posix = posix_regex(text);
        int found = matches(posix, module);
        free(posix);
        return found;
    }
    json_array_foreach(modules, i, item) {
        const char *name = json_string_value(item);
        size_t end = strlen(name);
        if (end <= n && !strcmp(module + n - end, name) && (end == n || module[n - end - 1] == '.')) return 1;
    }
    return 0;
}

// A regular expression that can be matched here.
static void expect_regex(const char *path, const char *text)
{
    regex_t r;
    char *posix = posix_regex(text);
    if (!*posix || !compiled(&r, posix))
        die("%s: \"target_modules\" is the regular expression %s, of which only . * + ? | ( ) (?: ) [ ] \\. \\d \\w are "
            "built; write a list of names in its place", path, text);
    regfree(&r);
    free(posix);
}

// What is asked for is checked here; which linear layers it means, the layout finds out.
static json_t *peft_modules(const json_t *json, const char *path)
{
    static const char *const others[] = {
        "lm_head", "model.embed_tokens", "model.norm", "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm", "model.layers.0.self_attn", "model.layers.0.mlp",
        "head", "rwkv.embeddings", "rwkv.ln_out", "rwkv.blocks.0.ln1", "rwkv.blocks.0.ln2", "rwkv.blocks.0.pre_ln",
        "rwkv.blocks.0.attention", "rwkv.blocks.0.attention.ln_x", "rwkv.blocks.0.feed_forward", NULL};
    json_t *modules = json_object_get(json, "target_modules"), *item;
    const char *text = json_string_value(modules);
    size_t i;
    if (!json_is_array(modules) && (!text || strlen(text) >= 2000))
        die("%s: \"target_modules\" must be a list of names such as \"q_proj\", or a regular expression", path);
    json_array_foreach(modules, i, item)
        if (!json_is_string(item)) die("%s: \"target_modules\" holds something else than names", path);
    if (text) expect_regex(path, text);
    int all = text && !strcasecmp(text, "all-linear");
    for (const char *const *other = others; *other && !all; other++)
        if (peft_targeted(modules, *other))
            die("%s: \"target_modules\" asks for %s, and only the linear layers inside of a block have adapters "
                "here; merge it with PEFT (merge_and_unload) and give the result as --model", path, *other);
    return json_incref(modules);
}

// Which of our methods a LoRA of PEFT's is. A start inside W ("pissa", "olora") is made again before the adapter is
// read: that is how PEFT reads it. Where the start left W as it was, it no longer matters.
static const method *peft_lora(const json_t *json, const char *path)
{
    const char *start = string_field(json, "init_lora_weights");
    const char *flag = NULL;
    for (int i = 0; i < 2; i++) {
        if (!field_true(json, lora_flags[i])) continue;
        if (flag) die("%s: \"%s\" and \"%s\" together are not built here", path, flag, lora_flags[i]);
        flag = lora_flags[i];
    }
    int kept = !start || !strcmp(start, "gaussian") || !strcmp(start, "eva") || !strcmp(start, "orthogonal");
    const method *m = method_of_peft("LORA", kept ? flag : start);
    if (!m || (!kept && (flag || !m->has_start)))
        die("%s: \"init_lora_weights\" is \"%s\"%s%s, which changes the base and is not built; save it from PEFT with "
            "path_initial_model_for_weight_conversion", path, start, flag ? " with " : "", flag ? flag : "");
    return m;
}

// "init_weights" of MISS is true, "bat" or "mini".
static const method *peft_miss(const json_t *json, const char *path)
{
    const char *start = string_field(json, "init_weights");
    const method *m = method_of_peft("MISS", start);
    if (!m) die("%s: \"init_weights\" is \"%s\", expected true, \"mini\" or \"bat\"", path, start);
    return m;
}

// The method of a PEFT directory.
static const method *peft_method(const json_t *json, const char *path)
{
    const char *type = string_field(json, "peft_type");
    if (!type) type = "missing";
    if (!strcmp(type, "LORA")) return peft_lora(json, path);
    if (!strcmp(type, "MISS")) return peft_miss(json, path);
    const method *own = method_of_peft(type, NULL);
    if (own) return own;
    if (!strcmp(type, "BONE"))
        die("%s: \"peft_type\" is BONE, which PEFT has replaced by MISS; its scripts/convert-bone-to-miss.py turns this "
            "directory into one that is read here", path);
    if (json_object_get(json, "lora_parameters"))
        die("%s: is an adapter of mlx-lm, not of PEFT; join it with its model there (mlx_lm.fuse) and give the result as "
            "--model", path);
    die("%s: \"peft_type\" is %s, expected LORA or MISS; merge it with PEFT's merge_and_unload() and give the result as "
        "--model", path, type);
}

// "64xout", into a pair.
static void peft_pair(const json_t *json, const char *path, const char *name, int pair[2])
{
    const char *text = string_field(json, name);
    if (!text || !read_pair(text, pair)) die("%s: \"%s\" must be two sides such as \"64xout\"", path, name);
}

// What adapter_config.json says, into the plan.
static void peft_read_config(plan *p, const char *dir)
{
    size_t bytes;
    char *path = join(dir, "adapter_config.json");
    char *text = read_file(path, &bytes);
    json_t *json = parse_json(path, text, bytes);
    peft_refuse(json, path);
    p->method = peft_method(json, path);
    p->modules = peft_modules(json, path);
    p->selects = peft_targeted;
    p->rank = strcmp(p->method->peft_type, "FROZEN") ? config_int(json, path, "r", -1) : 1;
    p->mini_r = config_int(json, path, "mini_r", 1);
    p->alpha = config_number(json, path, "lora_alpha", 8);
    if (!strcmp(p->method->name, "disha")) peft_pair(json, path, "shard", p->shard);
    if (!strcmp(p->method->name, "bat-free")) peft_pair(json, path, "groups", p->groups);
    for (const char **name = (const char *[]){"lora_dropout", "miss_dropout", NULL}; *name && p->train; name++) {
        double dropout = json_number_value(json_object_get(json, *name));       // 0 if it is no number
        if (dropout > 0)
            fprintf(stderr, "note: %s: \"%s\" is %g; here it trains without dropout\n", path, *name, dropout);
    }
    json_decref(json);
    free(text);
    free(path);
}

// The adapter's tensors, each checked, none left over.
static void peft_read_weights(model *m, const char *dir)
{
    checkpoint c = checkpoint_open(dir, "adapter_model");
    request *list = NULL;
    for (int i = 0; i < arrlen(m->tensors); i++) {
        const tensor *t = &m->tensors[i];
        if (t->kind == PARAM) arrput(list, request_for(t, "", t->value));
    }
    checkpoint_fetch(&c, dir, list, "this adapter on this base model", NULL);
    arrfree(list);
    checkpoint_close(&c);
}

// The last part of a path or of a name on Hugging Face, in a fresh string.
static char *last_part(const char *path)
{
    size_t n = strlen(path);
    while (n && path[n - 1] == '/') n--;
    size_t from = n;
    while (from && path[from - 1] != '/') from--;
    return copy_bytes(path + from, n - from);
}

// Says so where an adapter that fits was made for another base. Only the last part of the names is compared: the
// rest is where it lay on the other machine, or on Hugging Face.
static void peft_note_base(const char *dir, const char *base)
{
    char *path;
    json_t *json = directory_json(dir, "adapter_config.json", &path);
    const char *named = string_field(json, "base_model_name_or_path");
    char *theirs = last_part(named ? named : ""), *ours = last_part(base);
    char *safe = printable(theirs, ""), *safe_too = printable(ours, "");
    if (*theirs && strcmp(ours, ".") && strcmp(ours, "..") && strcasecmp(theirs, ours))
        fprintf(stderr, "note: %s: names %s as its base and is used on %s\n", path, safe, safe_too);
    json_decref(json);
    free(path);
    free(theirs), free(ours);
    free(safe), free(safe_too);
}

#endif
