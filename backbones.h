/*  backbones.h: the table of backbones. A further one is a header such as llama.h and a row here
    (doc/add-a-backbone.md).                                                                              */

#ifndef BACKBONES_H
#define BACKBONES_H
#include "llama.h"
#include "rwkv6.h"

static const backbone *const backbones[] = {&llama_backbone, &rwkv6_backbone, NULL};

// "model_type" names the family, and with it the backbone.
static void config_family(config *c, const json_t *json, const char *path)
{
    const char *type = string_field(json, "model_type");
    char built[200] = "";
    for (const backbone *const *b = backbones; *b; b++)
        for (const family *f = (*b)->families; f->model_type; f++) {
            if (type && !strcmp(type, f->model_type)) {
                c->backbone = *b;
                c->family = f;
                return;
            }
            sprintf(built + strlen(built), "%s%.24s", *built ? ", " : "", f->model_type);
        }
    die("%s: \"model_type\" is %s; these are built: %s", path, type ? type : "missing", built);
}

// Reads transformers' config.json, version 4 or 5 (which moved rope_theta into rope_parameters).
static config config_read(const char *path)
{
    size_t bytes;
    config c = {.text = read_file(path, &bytes)};
    json_t *json = parse_json(path, c.text, bytes);
    config_family(&c, json, path);
    read_fields(&c, c.backbone->fields, json, path);
    refuse_quantised(json, path);
    c.backbone->config(&c, json, path);
    config_stops(&c, json, path);
    name_unknown(&c, c.backbone->fields, json, path);
    json_decref(json);
    return c;
}

#endif
