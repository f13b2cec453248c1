//  run/peft.h: PEFT's files. adapter_config.json and adapter_model.safetensors, with PEFT's field names and keys. What PEFT has no format for
//  (frozen, bat-row) is written the same way under a peft_type of its own.

#ifndef PEFT_H
#define PEFT_H
#include "../adapters.h"

static cJSON *peft_config(const model *m, const char *base)
{
    const plan *p = &m->p;
    cJSON *json = cJSON_CreateObject();
    int doubled = p->method->has_start ? 2 : 1;                           // s (B A − B0 A0): rank 2r, the same s
    cJSON_AddStringToObject(json, "peft_type", p->method->peft_type);
    cJSON_AddStringToObject(json, "task_type", "CAUSAL_LM");
    cJSON_AddStringToObject(json, "base_model_name_or_path", base);
    cJSON_AddStringToObject(json, "bias", "none");
    cJSON_AddBoolToObject(json, "inference_mode", 1);
    cJSON_AddNumberToObject(json, "r", p->rank * doubled);
    cJSON *targets = p->modules ? cJSON_Duplicate(p->modules, 1) : cJSON_CreateArray();     // as they came, or all layers alike
    cJSON_AddItemToObject(json, "target_modules", targets);
    for (int i = 0; i < LINEARS && !p->modules; i++)
        if (p->targets >> i & 1) cJSON_AddItemToArray(targets, cJSON_CreateString(module_name(i)));
    if (!strcmp(p->method->peft_type, "LORA")) {
        cJSON_AddNumberToObject(json, "lora_alpha", p->alpha * doubled);
        cJSON_AddNumberToObject(json, "lora_dropout", 0);
        cJSON_AddBoolToObject(json, "use_rslora", !strcmp(p->method->name, "rslora"));
        cJSON_AddBoolToObject(json, "use_dora", !strcmp(p->method->name, "dora"));
        cJSON_AddBoolToObject(json, "init_lora_weights", 1);
    }
    if (!strcmp(p->method->peft_type, "MISS")) {
        cJSON_AddNumberToObject(json, "miss_dropout", 0);
        cJSON_AddNumberToObject(json, "mini_r", p->mini_r);
        if (!strcmp(p->method->name, "bone")) cJSON_AddBoolToObject(json, "init_weights", 1);
        else cJSON_AddStringToObject(json, "init_weights", p->method->name);
    }
    return json;
}

// The trained tensors as PEFT wants them: pissa, olora and lora-ga as [A; A0] and [B | −B0] on the untouched base.
static output *peft_outputs(model *m)
{
    output *list = NULL;
    for (int i = 0; i < arrlen(m->tensors); i++) {
        tensor *t = &m->tensors[i];
        if (t->kind != PARAM) continue;
        output o = {.shape = t->shape, .type = TYPE_OF(wide), .at = *t->at};
        memcpy(o.name, t->name, sizeof o.name);
        for (int j = 0; j < arrlen(m->linears) && m->p.method->has_start; j++) {
            linear *l = m->linears[j];
            if (t->at == &l->A) o.below = l->A0, o.shape.n[0] *= 2;
            if (t->at == &l->B) o.beside = l->B0, o.shape.n[1] *= 2;
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
static void peft_refuse(const cJSON *json, const char *path)
{
    static const char *const unbuilt[] = {"rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform",
        "layer_replication", "fan_in_fan_out", "lora_bias", "exclude_modules", "trainable_token_indices", "target_parameters", "use_qalora",
        "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config", "monteclora_config", NULL};
    for (const char *const *name = unbuilt; *name; name++) {
        const cJSON *item = cJSON_GetObjectItemCaseSensitive(json, *name);
        int empty = !item || cJSON_IsNull(item) || cJSON_IsFalse(item) || ((cJSON_IsObject(item) || cJSON_IsArray(item)) && !item->child);
        if (!empty) die("%s: \"%s\" is set, which is not built here", path, *name);
    }
    const cJSON *bias = cJSON_GetObjectItemCaseSensitive(json, "bias");
    if (cJSON_IsString(bias) && strcmp(bias->valuestring, "none")) die("%s: \"bias\" is \"%s\", only \"none\" is built", path, bias->valuestring);
}

// Python's regular expression as POSIX's, which is matched here; "" if it has what POSIX has not. Whole names are matched, so that
// a lazy repeat means what a greedy one does. Counts in braces are left out (but
// for {1,}, which Unsloth writes): a few of them, nested, would take all memory.
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
        else if (strchr("\\[{}", *c) || !strncmp(c, "(?", 2) || (repeat && (c[1] == '*' || c[1] == '+'))) return *posix = 0, posix;
        else *to++ = *c, c += repeat && c[1] == '?';
    }
    sprintf(to, ")$");
    return posix;
}

// "target_modules" by PEFT's rule (check_target_module_exists): a list of names, each a module's whole name or its end from a
// dot on; or a text, which is "all-linear", or a regular expression for the whole name.
static int peft_targeted(const cJSON *modules, const char *module)
{
    const cJSON *item;
    size_t n = strlen(module);
    if (cJSON_IsString(modules)) {
        regex_t r;
        if (!strcasecmp(modules->valuestring, "all-linear")) return strstr(module, "_proj") != NULL;
        char *posix = posix_regex(modules->valuestring);
        int found = !regcomp(&r, posix, REG_EXTENDED | REG_NOSUB);
        if (found) found = !regexec(&r, module, 0, NULL, 0), regfree(&r);
        free(posix);
        return found;
    }
    cJSON_ArrayForEach(item, modules) {
        size_t end = strlen(item->valuestring);
        if (end <= n && !strcmp(module + n - end, item->valuestring) && (end == n || module[n - end - 1] == '.')) return 1;
    }
    return 0;
}

// What is asked for is checked here; which linear layers it means, the layout finds out.
static cJSON *peft_modules(const cJSON *json, const char *path)
{
    static const char *const others[] = {"lm_head", "model.embed_tokens", "model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm",
        "model.layers.0.self_attn", "model.layers.0.mlp", NULL};
    const cJSON *modules = cJSON_GetObjectItemCaseSensitive(json, "target_modules"), *item;
    int text = cJSON_IsString(modules) && strlen(modules->valuestring) < 2000;
    if (!text && !cJSON_IsArray(modules)) die("%s: \"target_modules\" must be a list of names such as \"q_proj\", or a regular expression", path);
    cJSON_ArrayForEach(item, modules)
        if (!cJSON_IsString(item)) die("%s: \"target_modules\" holds something else than names", path);
    if (text) {
        regex_t r;
        char *posix = posix_regex(modules->valuestring);
        if (!*posix || regcomp(&r, posix, REG_EXTENDED | REG_NOSUB))
            die("%s: \"target_modules\" is the regular expression %s, of which only . * + ? | ( ) (?: ) [ ] \\. \\d \\w are built; write a list of names in its place", path, modules->valuestring);
        regfree(&r), free(posix);
    }
    for (const char *const *other = others; *other; other++)
        if (peft_targeted(modules, *other)) die("%s: \"target_modules\" asks for %s, and only the seven linear layers of a block, q_proj to down_proj, have adapters here; merge it with PEFT (merge_and_unload) and give the result as --model", path, *other);
    return cJSON_Duplicate(modules, 1);
}

// Which of our methods a LoRA of PEFT's is. A start inside W ("pissa", "olora") is made again before the adapter is
// read: that is how PEFT reads it. Where the start left W as it was, it no longer matters.
static const char *peft_lora(const cJSON *json, const char *path)
{
    const cJSON *init = cJSON_GetObjectItemCaseSensitive(json, "init_lora_weights");
    const char *start = cJSON_IsString(init) ? init->valuestring : "gaussian";
    int rslora = cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(json, "use_rslora")), dora = cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(json, "use_dora"));
    if (rslora && dora) die("%s: \"use_dora\" and \"use_rslora\" together are not built here", path);
    if (!rslora && !dora && (!strcmp(start, "pissa") || !strcmp(start, "olora"))) return start;
    if (strcmp(start, "gaussian") && strcmp(start, "eva") && strcmp(start, "orthogonal"))
        die("%s: \"init_lora_weights\" is \"%s\"%s, which changes the base and is not built; save it from PEFT with path_initial_model_for_weight_conversion",
            path, start, rslora ? " with \"use_rslora\"" : dora ? " with \"use_dora\"" : "");
    return rslora ? "rslora" : dora ? "dora" : "lora";
}

// Which of our methods a PEFT configuration is.
static const char *peft_method(const cJSON *json, const char *path)
{
    const cJSON *type = cJSON_GetObjectItemCaseSensitive(json, "peft_type"), *init = cJSON_GetObjectItemCaseSensitive(json, "init_weights");
    const char *name = cJSON_IsString(type) ? type->valuestring : "missing";
    if (!strcmp(name, "LORA")) return peft_lora(json, path);
    if (!strcmp(name, "MISS") && cJSON_IsString(init)) {
        if (!strcmp(init->valuestring, "bat") || !strcmp(init->valuestring, "mini")) return init->valuestring;
        die("%s: \"init_weights\" is \"%s\", expected true, \"mini\" or \"bat\"", path, init->valuestring);
    }
    if (!strcmp(name, "MISS")) return "bone";
    for (int i = 0; i < METHODS; i++)
        if (methods[i].peft_type && !strcmp(methods[i].peft_type, name)) return methods[i].name;
    if (!strcmp(name, "BONE")) die("%s: \"peft_type\" is BONE, which PEFT has replaced by MISS; its scripts/convert-bone-to-miss.py turns this directory into one that is read here", path);
    if (cJSON_HasObjectItem(json, "lora_parameters")) die("%s: is an adapter of mlx-lm, not of PEFT; join it with its model there (mlx_lm.fuse) and give the result as --model", path);
    die("%s: \"peft_type\" is %s, expected LORA or MISS; merge it with PEFT's merge_and_unload() and give the result as --model", path, name);
}

// What adapter_config.json says, into the plan.
static void peft_read_config(plan *p, const char *dir)
{
    size_t bytes;
    char *path = join(dir, "adapter_config.json"), *text = read_file(path, &bytes);
    cJSON *json = parse_json(path, text, bytes);
    peft_refuse(json, path);
    p->method = method_named(peft_method(json, path));
    p->modules = peft_modules(json, path);
    p->selects = peft_targeted;
    p->targets = 0;
    p->rank = strcmp(p->method->peft_type, "FROZEN") ? config_int(json, path, "r", -1) : 1;
    p->mini_r = config_int(json, path, "mini_r", 1);
    p->alpha = config_number(json, path, "lora_alpha", 8);
    for (const char **name = (const char *[]){"lora_dropout", "miss_dropout", NULL}; *name && p->train; name++) {
        const cJSON *dropout = cJSON_GetObjectItemCaseSensitive(json, *name);
        if (cJSON_IsNumber(dropout) && dropout->valuedouble > 0) fprintf(stderr, "note: %s: \"%s\" is %g; here it trains without dropout\n", path, *name, dropout->valuedouble);
    }
    cJSON_Delete(json);
    free(text), free(path);
}

// The adapter's tensors, each checked, none left over.
static void peft_read_weights(model *m, const char *dir)
{
    checkpoint c = checkpoint_open(dir, "adapter_model");
    request *list = NULL;
    for (int i = 0; i < arrlen(m->tensors); i++) {
        const tensor *t = &m->tensors[i];
        if (t->kind == PARAM) arrput(list, request_for(t, "", t->at));
    }
    checkpoint_fetch(&c, dir, list, "this adapter on this base model", NULL);
    arrfree(list);
    checkpoint_close(&c);
}

#endif
