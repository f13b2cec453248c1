"""Makes the files under dev/golden/ that `make test` holds the program to, with numpy, PyTorch, transformers and PEFT.

    python3 dev/golden.py [--stories DIR]     (DIR: a Hugging Face Llama with its tokenizer, for the greedy text)
    python3 dev/golden.py --base              tokenizer.json and bf16_errors.json alone, after base/ or data/ has changed

singular_values.json   LAPACK's leading singular values of matrices that test_all.c makes by the same formula
tokenizer.json         texts and SentencePiece's ids for them with the bundled tokenizer
pieces.txt             tokenizers with spaces, USER and UNUSED pieces of every kind, and SentencePiece's ids there
merges.json            small vocabularies under every published kind of byte-level BPE and of SentencePiece's tokenizer.json, and
                       the ids and texts of Hugging Face's tokenizers there
special_tokens.json    directories with special and added tokens, and transformers' ids there
bf16_errors.json       how far PyTorch's own bf16 gradients of the bundled model are off: relative L2 distance to float64's, a
                       tensor, for several pairs of rows, since one pair's is as much chance as precision
stories260K.txt        256 greedy tokens after "Once upon a time", decoded by SentencePiece
base-*/                small random Llamas, as transformers saves them
CASE/                  an adapter as PEFT saves it, and golden.safetensors: in float64 the logits, the loss and every gradient
                       of one batch of padded rows with masked prompts; in float64 and float32 the losses of eight AdamW steps

float64 means float64 throughout: transformers computes RoPE's angles, RMSNorm and the loss in float32 whatever the model is in,
so those are replaced here while the float64 goldens are made. The float32 ones are transformers as it is.
"""
import argparse
import json
import math
import os
import shutil
import tempfile
import types

import numpy
import peft
import safetensors.torch
import torch
import transformers
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga

from make_data import PROMPT

PAIRS = 4                       # of rows in bf16_errors.json

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden")
STEPS, WARMUP, RATE, CLIP = 8, 2, 5e-3, 0.5
ROWS = [([1, 5, 3, 12, 7, 30, 2], 3), ([1, 9, 4, 4, 11, 22, 0, 8, 6, 17, 2], 4), ([1, 10, 28, 2], 1)]       # ids, prompt
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

BASES = {
    "base-mha": dict(num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False,
                     rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "base-gqa": dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
                     rope_parameters={"rope_type": "default", "rope_theta": 300.0}),
    "base-llama3": dict(num_attention_heads=4, num_key_value_heads=2, attention_bias=True, mlp_bias=True,
                        tie_word_embeddings=False,
                        rope_parameters={"rope_type": "llama3", "rope_theta": 50.0, "factor": 8.0, "low_freq_factor": 0.25,
                                         "high_freq_factor": 2.0, "original_max_position_embeddings": 8}),
    "base-mistral": dict(model_type="mistral", num_attention_heads=4, num_key_value_heads=2, head_dim=6, sliding_window=4,
                         tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 400.0}),
    "base-qwen2": dict(model_type="qwen2", num_attention_heads=4, num_key_value_heads=2, use_sliding_window=True,
                       sliding_window=3, max_window_layers=1, tie_word_embeddings=True,
                       rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 200.0}),
    "base-qwen3": dict(model_type="qwen3", num_attention_heads=4, num_key_value_heads=2, head_dim=6, tie_word_embeddings=True,
                       rope_parameters={"rope_type": "default", "rope_theta": 1000.0}),
    "base-bf16": dict(num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=False,
                      rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
}


# RWKV6, of which transformers has no model: see class Rwkv6.
RWKV = dict(model_type="rwkv6", vocab_size=32, hidden_size=16, attention_hidden_size=8, intermediate_size=24, head_size=4,
            head_size_divisor=8, num_hidden_layers=2, layer_norm_epsilon=1e-5, tie_word_embeddings=False)
RWKV_LINEARS = ["receptance", "key", "value", "gate", "output"]
MIX, DECAY = 3, 5               # widths of the low ranks


def lora(**options):
    return peft.LoraConfig(**{**dict(task_type="CAUSAL_LM", r=4, lora_alpha=4, target_modules=PROJECTIONS), **options})


def miss(**options):
    return peft.MissConfig(**{**dict(task_type="CAUSAL_LM", r=4, target_modules=PROJECTIONS), **options})


CASES = {
    "full-gqa": ("base-gqa", None),
    "full-bf16": ("base-bf16", None),
    "full-llama3": ("base-llama3", None),
    "full-mistral": ("base-mistral", None),
    "full-qwen2": ("base-qwen2", None),
    "full-qwen3": ("base-qwen3", None),
    "lora-qwen2": ("base-qwen2", lora(lora_alpha=6)),
    "dora-llama3": ("base-llama3", lora(lora_alpha=6, use_dora=True)),
    "miss-qwen3": ("base-qwen3", miss(r=5)),
    "bat-qwen2": ("base-qwen2", miss(init_weights="bat")),
    "lora-mha": ("base-mha", lora()),
    "lora-alpha": ("base-gqa", lora(r=3, lora_alpha=7)),
    "lora-bf16": ("base-bf16", lora(lora_alpha=6)),
    "lora-subset": ("base-gqa", lora(target_modules=["q_proj", "v_proj", "down_proj"])),
    "rslora": ("base-gqa", lora(lora_alpha=6, use_rslora=True)),
    "pissa": ("base-mha", lora(lora_alpha=6, init_lora_weights="pissa")),
    "olora": ("base-gqa", lora(lora_alpha=6, init_lora_weights="olora")),
    "dora": ("base-gqa", lora(lora_alpha=6, use_dora=True)),
    "lora-ga": ("base-gqa", lora(lora_alpha=6, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())),
    # … as PEFT saves them
    "pissa-saved": ("base-mha", lora(lora_alpha=6, init_lora_weights="pissa", target_modules=["k_proj", "down_proj"])),
    "olora-saved": ("base-gqa", lora(lora_alpha=6, init_lora_weights="olora", target_modules=["k_proj", "down_proj"])),
    "miss-divides": ("base-mha", miss()),
    "miss-padded": ("base-gqa", miss(r=5)),
    "miss-bf16": ("base-bf16", miss(r=5)),
    "mini": ("base-gqa", miss(mini_r=4, init_weights="mini")),
    "bat": ("base-gqa", miss(init_weights="bat")),
    "full-rwkv6": ("base-rwkv6", None),
    "lora-rwkv6": ("base-rwkv6", lora(task_type=None, lora_alpha=6, target_modules=RWKV_LINEARS)),
    "miss-rwkv6": ("base-rwkv6", miss(task_type=None, r=5, target_modules=RWKV_LINEARS)),
    "bat-rwkv6": ("base-rwkv6", miss(task_type=None, init_weights="bat",
                                     target_modules=["attention.key", "attention.output", "feed_forward.value"])),
}


class Rwkv6(torch.nn.Module):
    """BlinkDL's RWKV_Tmix_x060 and RWKV_CMix_x060 (RWKV-v5/src/model.py), token by token, under Hugging Face's names."""
    def __init__(self, dtype):
        super().__init__()
        C, A, F = (RWKV[n] for n in ("hidden_size", "attention_hidden_size", "intermediate_size"))
        V, H = RWKV["vocab_size"], RWKV["head_size"]
        vector = lambda *shape: torch.nn.Parameter(torch.zeros(*shape))
        linear = lambda i, o: torch.nn.Linear(i, o, bias=False)
        self.rwkv, self.head = torch.nn.Module(), linear(C, V)
        self.rwkv.embeddings, self.rwkv.ln_out = torch.nn.Embedding(V, C), torch.nn.LayerNorm(C)
        self.rwkv.blocks = torch.nn.ModuleList(torch.nn.Module() for _ in range(RWKV["num_hidden_layers"]))
        self.rwkv.blocks[0].pre_ln = torch.nn.LayerNorm(C)
        for block in self.rwkv.blocks:
            block.ln1, block.ln2 = torch.nn.LayerNorm(C), torch.nn.LayerNorm(C)
            a = block.attention = torch.nn.Module()
            f = block.feed_forward = torch.nn.Module()
            for name in "xwkvrg":
                setattr(a, "time_maa_" + name, vector(1, 1, C))
            a.time_maa_w1, a.time_maa_w2 = vector(C, 5 * MIX), vector(5, MIX, C)
            a.time_decay, a.time_faaaa = vector(1, 1, A), vector(A // H, H)
            a.time_decay_w1, a.time_decay_w2 = vector(C, DECAY), vector(DECAY, A)
            a.receptance, a.key, a.value, a.gate, a.output = linear(C, A), linear(C, A), linear(C, A), linear(C, A), linear(A, C)
            a.ln_x = torch.nn.GroupNorm(A // H, A, eps=1e-5 * RWKV["head_size_divisor"] ** 2)
            f.time_maa_k, f.time_maa_r = vector(1, 1, C), vector(1, 1, C)
            f.key, f.receptance, f.value = linear(C, F), linear(C, C), linear(F, C)
        self.to(dtype)

    def time_mixing(self, a, x):
        B, T, C = x.shape
        H, d = a.time_faaaa.shape
        xx = torch.nn.functional.pad(x, (0, 0, 1, -1)) - x
        xxx = torch.tanh((x + xx * a.time_maa_x) @ a.time_maa_w1).view(B * T, 5, -1).transpose(0, 1)
        mw, mk, mv, mr, mg = torch.bmm(xxx, a.time_maa_w2).view(5, B, T, C).unbind(0)
        moved = zip("wkvrg", (mw, mk, mv, mr, mg))
        mixed = {n: x + xx * (getattr(a, "time_maa_" + n) + m) for n, m in moved}
        r, k, v = (l(mixed[n]).view(B, T, H, d) for n, l in (("r", a.receptance), ("k", a.key), ("v", a.value)))
        w = (a.time_decay + torch.tanh(mixed["w"] @ a.time_decay_w1) @ a.time_decay_w2).view(B, T, H, d)
        S, out = x.new_zeros(B, H, d, d), []
        for t in range(T):
            kv = k[:, t, :, :, None] * v[:, t, :, None, :]
            out.append((r[:, t, :, None, :] @ (S + a.time_faaaa[..., None] * kv))[:, :, 0])
            S = torch.exp(-torch.exp(w[:, t]))[..., None] * S + kv
        y = a.ln_x(torch.stack(out, 1).reshape(B * T, H * d)).view(B, T, H * d)
        return a.output(y * torch.nn.functional.silu(a.gate(mixed["g"])))

    def channel_mixing(self, f, x):
        xx = torch.nn.functional.pad(x, (0, 0, 1, -1)) - x
        return torch.sigmoid(f.receptance(x + xx * f.time_maa_r)) * f.value(torch.relu(f.key(x + xx * f.time_maa_k)) ** 2)

    def forward(self, input_ids, labels, **_):
        x = self.rwkv.blocks[0].pre_ln(self.rwkv.embeddings(input_ids))
        for block in self.rwkv.blocks:
            x = x + self.time_mixing(block.attention, block.ln1(x))
            x = x + self.channel_mixing(block.feed_forward, block.ln2(x))
        logits = self.head(self.rwkv.ln_out(x))
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return types.SimpleNamespace(logits=logits, loss=loss)


def make_rwkv():
    folder = os.path.join(HERE, "base-rwkv6")
    os.makedirs(folder, exist_ok=True)
    torch.manual_seed(60)
    model = Rwkv6(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = ".ln" in name or "pre_ln" in name
            parameter.copy_(0.3 * torch.randn(parameter.shape) + (1 if norm and name.endswith("weight") else 0))
    safetensors.torch.save_file(model.state_dict(), os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    json.dump(RWKV, open(os.path.join(folder, "config.json"), "w"), indent=1)


class Norm64(torch.nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Rotary64(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rope = config.rope_parameters
        frequency = rope["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        if rope["rope_type"] == "linear":
            frequency = frequency / rope["factor"]
        if rope["rope_type"] == "llama3":           # transformers' _compute_llama3_parameters
            old, low, high = (rope[n] for n in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
            length = 2 * math.pi / frequency
            smooth = (old / length - low) / (high - low)
            between = (1 - smooth) * frequency / rope["factor"] + smooth * frequency
            frequency = torch.where(length > old / low, frequency / rope["factor"],
                                    torch.where(length < old / high, frequency, between))
        self.frequency = frequency

    def forward(self, x, position_ids):
        angle = position_ids[..., None].double() * self.frequency
        angle = torch.cat((angle, angle), -1)
        return angle.cos(), angle.sin()


def in_float64(model):
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], Norm64(module))
    model.model.rotary_emb = Rotary64(model.config)
    return model


def load(base, dtype):
    if base == "base-rwkv6":
        model = Rwkv6(torch.float32)
        model.load_state_dict(safetensors.torch.load_file(os.path.join(HERE, base, "model.safetensors")))
        return model.to(dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(os.path.join(HERE, base), dtype=dtype, attn_implementation="sdpa")
    return in_float64(model) if dtype == torch.float64 else model


def batch():
    longest = max(len(ids) for ids, _ in ROWS)
    pad = [longest - len(ids) for ids, _ in ROWS]
    return dict(input_ids=torch.tensor([ids + [0] * p for (ids, _), p in zip(ROWS, pad)]),
                attention_mask=torch.tensor([[1] * len(ids) + [0] * p for (ids, _), p in zip(ROWS, pad)]),
                labels=torch.tensor([[-100] * prompt + ids[prompt:] + [-100] * p for (ids, prompt), p in zip(ROWS, pad)]))


def make_base(name, options):
    folder = os.path.join(HERE, name)
    config = transformers.AutoConfig.for_model(**{"model_type": "llama", **options}, vocab_size=32, hidden_size=16,
                                               intermediate_size=24, num_hidden_layers=2, rms_norm_eps=1e-5,
                                               max_position_embeddings=64, initializer_range=0.3, bos_token_id=1,
                                               eos_token_id=2)
    torch.manual_seed(len(name) * 1000 + sum(map(ord, name)))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:                # norms and biases
                parameter += 0.2 * torch.randn_like(parameter)
    model.to(torch.bfloat16 if "bf16" in name else torch.float32).save_pretrained(
        folder, **({"max_shard_size": "4KB"} if "bf16" in name else {}))
    path = os.path.join(folder, "config.json")
    text = json.load(open(path))
    text.pop("transformers_version", None)
    if name == "base-gqa":              # as transformers 4 wrote it
        text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    json.dump(text, open(path, "w"), indent=1)
    for extra in ("generation_config.json",):
        if os.path.exists(os.path.join(folder, extra)):
            os.remove(os.path.join(folder, extra))


def plain(name):                        # PEFT's name in memory to its name in the file
    return name.replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def trained(model):
    return {plain(n): p for n, p in model.named_parameters() if p.requires_grad}


def shake(model):
    """Away from the start, where half of the gradients are zero. The same numbers in both precisions."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter += (0.1 * torch.randn(parameter.shape)).to(parameter.dtype)


def starts_inside(config):              # PiSSA, OLoRA, LoRA-GA: the adapter begins as a part of W
    return config is not None and config.peft_type == "LORA" and config.init_lora_weights in ("pissa", "olora", "lora_ga")


def saved(config, folder):              # does the case read an adapter that PEFT saved?
    return config is not None and (not starts_inside(config) or folder.endswith("-saved"))


def adapted(base, config, folder, dtype, at_start=False):
    if starts_inside(config):           # PEFT wants float32 for that; in float64 W gives up what it found there, in float64
        torch.manual_seed(5)
        model = load(base, torch.float32)
        if config.init_lora_weights == "lora_ga":
            preprocess_loraga(model, config, lambda: loss_of(model)[0].backward())
        model = peft.get_peft_model(model, config)
        if dtype == torch.float64:
            model = model.double()
            in_float64(model.base_model.model)
            for name, module in load(base, dtype).named_modules():
                if name.rpartition(".")[2] in PROJECTIONS:
                    layer = model.base_model.model.get_submodule(name)
                    if hasattr(layer, "lora_B"):
                        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
                        layer.base_layer.weight.data = module.weight.data - layer.scaling["default"] * product.data
        if saved(config, folder) and not at_start:
            peft.set_peft_model_state_dict(model, safetensors.torch.load_file(os.path.join(folder, "adapter_model.safetensors")))
        return model
    model = load(base, dtype)
    if config is None:
        return model
    if folder is None:
        return peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    return peft.PeftModel.from_pretrained(model, folder, is_trainable=True, autocast_adapter_dtype=False)


def loss_of(model):
    """transformers' own loss, but that turns the logits into float32 first: in float64 it is computed here."""
    output = model(**batch())
    if output.logits.dtype == torch.float64:
        return torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch()["labels"][:, 1:].flatten(),
                                                 ignore_index=-100), output.logits
    return output.loss, output.logits


def eight_steps(model):
    model.train()
    parameters = list(trained(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    losses = []
    for _ in range(STEPS):
        loss, _ = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def make_case(name, base, config):
    folder = os.path.join(HERE, name)
    os.makedirs(folder, exist_ok=True)
    golden = {}
    if saved(config, folder):
        torch.manual_seed(3)
        model = adapted(base, config, folder if starts_inside(config) else None, torch.float32, at_start=True)
        shake(model)
        model.save_pretrained(folder)
        if os.path.exists(os.path.join(folder, "README.md")):
            os.remove(os.path.join(folder, "README.md"))
        path = os.path.join(folder, "adapter_config.json")
        text = json.load(open(path))
        text["base_model_name_or_path"] = base
        text["target_modules"].sort()            # a set: its order differs from run to run
        json.dump(text, open(path, "w"), indent=1)
    if starts_inside(config):                    # the start that PEFT found: A0, B0, of which W gave up s B0 A0
        golden.update({"start." + n: p.detach().clone() for n, p in
                       trained(adapted(base, config, folder, torch.float64, at_start=True)).items()})
    model = adapted(base, config, folder, torch.float64)
    loss, logits = loss_of(model)
    loss.backward()
    golden["logits"] = torch.cat([logits[i, :len(ids)] for i, (ids, _) in enumerate(ROWS)]).detach()
    golden["loss"] = loss.detach().reshape(1)
    golden.update({"grad." + n: p.grad.clone() for n, p in trained(model).items()})
    golden["losses64"] = torch.tensor(eight_steps(adapted(base, config, folder, torch.float64)), dtype=torch.float64)
    golden["losses32"] = torch.tensor(eight_steps(adapted(base, config, folder, torch.float32)), dtype=torch.float64)
    assert logits.dtype == loss.dtype == torch.float64
    safetensors.torch.save_file({n: t.contiguous() for n, t in golden.items()}, os.path.join(folder, "golden.safetensors"))
    json.dump({"base": base,
               "method": None if saved(config, folder) else config.init_lora_weights.replace("_", "-") if config else "full",
               "rank": 4, "alpha": 6}, open(os.path.join(folder, "case.json"), "w"))
    print(f"{name:14} loss {golden['loss'].item():.6f} falls to {golden['losses64'][-1]:.6f}, "
          f"float32 off by {(golden['losses64'] - golden['losses32']).abs().max():.1e}")


def singular_values():
    values = {}
    for rows, columns, rank in ((40, 30, 6), (24, 64, 24), (9, 9, 9), (120, 50, 16)):
        i, j = numpy.mgrid[0:rows, 0:columns].astype(numpy.float64)
        matrix = numpy.sin(1 + 0.7 * i * i + 1.3 * j) + 2 * (i == j)
        values[f"{rows}x{columns}"] = numpy.linalg.svd(matrix, compute_uv=False)[:rank].tolist()
    json.dump(values, open(os.path.join(HERE, "singular_values.json"), "w"))


def bundled_tokenizer():
    import sentencepiece
    tokenizer = sentencepiece.SentencePieceProcessor(os.path.join(HERE, "..", "..", "base", "tokenizer.model"))
    texts = ["Lily had 12 shells.", " two  spaces ", "", "Zürich, 猫 and 🙂!", "tabs\tand\nlines\n\n", "#### 20", "a",
             "<s> </s> <unk> <0x0A>", "▁", "x" * 50,
             "Below is an instruction that describes a task.", "1234567890 - 7 + 5 = ?", "CAPITALS and MiXeD",
             "\u00a0\u2003\u200b"]
    rows = [{"text": text, "ids": tokenizer.encode(text)} for text in texts if text]
    json.dump(rows, open(os.path.join(HERE, "tokenizer.json"), "w"), indent=None)


def pieces():
    """Tokenizers of other kinds: base/tokenizer.model with a few fields behind its end, which protobuf merges into it, and
    SentencePiece's ids there and the text it makes of them. Bytes are hexadecimal, for not all are UTF-8."""
    import sentencepiece
    base = open(os.path.join(HERE, "..", "..", "base", "tokenizer.model"), "rb").read()
    field = lambda number, data: bytes([number << 3 | 2, len(data)]) + data
    piece = lambda text, score, kind: field(1, field(1, text.encode()) + b"\x15" + numpy.float32(score).tobytes() +
                                               bytes([3 << 3, kind]))
    spaces = lambda **flags: field(3, b"".join(bytes([{"in_front": 3, "trim": 4, "escape": 5}[name] << 3, on])
                                               for name, on in flags.items()))
    user = b"".join(piece(text, 0, 4) for text in ("ab", "abc", "<mask>", "\u2581two", "\U0001f642", "s s", "wa", "nn"))
    unused = b"".join(piece(text, score, 5) for text, score in
                      (("ad", 1), ("hel", 2), ("us", 0), ("whe", 1), ("her", 1), ("here", 3)))
    tails = {
        "as it is": b"",
        "no space in front": spaces(in_front=0),
        "spaces trimmed": spaces(trim=1),
        "trimmed, none in front": spaces(in_front=0, trim=1),
        "spaces as they are": spaces(escape=0),
        "USER pieces": user,
        "USER pieces, trimmed": user + spaces(trim=1),
        "UNUSED pieces": unused,
        "UNUSED and USER pieces": unused + user,
    }
    texts = [b"two shells", b" a b", b"  a   b  ", b" ", b"   ", b"\t a\n", "\u2581a \u2581 b\u2581".encode(),
             b"abcab abc aab c", b"<mask><mask >two two",
             "\U0001f642\U0001f642 s s  s s".encode(), b"she had shells where they were", b"there the mouse hehere had",
             b"adadhelhel",
             b"way inn wann nnnna", b"thereshehadshells" * 12, b"hereherewhelhel" * 9,
             b"a\xed\xa0\x80b \xed\xb0\x80", b"\xed\x9f\xbf\xee\x80\x80", b"\xff\xfe \xc0\x80 \xc1\xbf",
             b"\xe0\x80\x80\xe0\xa0\x80", b"\xf4\x8f\xbf\xbf\xf4\x90\x80\x80",
             b"\xf0\x8f\xbf\xbf\xf0\x90\x80\x80", b"\xe2\x96 \xe2\x96\x81 \xe2", b"\xc2", b"a\x00b"]
    with open(os.path.join(HERE, "pieces.txt"), "w") as file:
        for what, tail in tails.items():
            print("model", tail.hex() or "-", what, file=file)
            tokenizer = sentencepiece.SentencePieceProcessor(model_proto=base + tail)
            for text in texts:
                ids = tokenizer.encode(text)
                print("text", text.hex(), tokenizer.decode(ids).encode().hex() or "-", *ids, file=file)


def special_tokens():
    """The bundled tokenizer.model in directories as they are published, and the ids that transformers gives there."""
    added = lambda content, **more: {"content": content, "lstrip": False, "normalized": False, "rstrip": False,
                                     "single_word": False, "special": True, **more}
    llama = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    chat = {"768": added("<|im_start|>"), "769": added("<|im_end|>", special=False)}
    odd = {"768": added("<|im_start|>", lstrip=True, rstrip=True), "769": added("<|im_end|>", single_word=True),
           "770": added("<|im_end|>!")}
    entries = [{"id": int(i), **token} for i, token in chat.items()]
    directories = [
        {},
        {"added_tokens.json": {"<|im_start|>": 768, "<|im_end|>": 769}},
        {"tokenizer_config.json": llama},
        {"tokenizer_config.json": {**llama, "legacy": True, "added_tokens_decoder": chat}},
        {"tokenizer_config.json": {**llama, "legacy": False, "added_tokens_decoder": chat, "eos_token": "<|im_end|>"}},
        {"tokenizer_config.json": {**llama, "added_tokens_decoder": odd}},
        {"tokenizer_config.json": {**llama, "add_bos_token": False},
         "added_tokens.json": {"<|im_start|>": 768, "<|im_end|>": 769}},
        {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}, "tokenizer.json": entries},
    ]
    # Without a doubled space and without a space in front, where transformers leaves SentencePiece's path.
    texts = ["two shells", "a</s>b", "</s>x", "<s>a", "x<unk>y", "a</s></s>b", "a</s>", "<|im_start|>user\nhi<|im_end|>\n",
             "hi<|im_end|>!", "Lily <|im_start|> had <|im_end|> 2"]
    cases = []
    for files in directories:
        with tempfile.TemporaryDirectory() as folder:
            for name in ("config.json", "tokenizer.model"):
                shutil.copy(os.path.join(HERE, "..", "..", "base", name), folder)
            if "tokenizer.json" in files:                   # what transformers itself makes of tokenizer.model, and these tokens
                backend = json.loads(transformers.AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str())
                backend["added_tokens"] += files["tokenizer.json"]
                files = {**files, "tokenizer.json": backend}
            for name, content in files.items():
                json.dump(content, open(os.path.join(folder, name), "w"))
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            if "tokenizer.json" in files:                   # of which the test needs no vocabulary
                files["tokenizer.json"] = {key: backend[key] for key in ("added_tokens", "normalizer", "pre_tokenizer")}
            rows = [{"text": text, "ids": tokenizer(text, add_special_tokens=False)["input_ids"]} for text in texts
                    if not (type(tokenizer).__name__ != "LlamaTokenizer" and "> " in text)]
            cases.append({"files": files, "bos": files.get("tokenizer_config.json", {}).get("add_bos_token") is not False,
                          "eos": 2 if tokenizer.eos_token_id is None else tokenizer.eos_token_id, "rows": rows})
    json.dump(cases, open(os.path.join(HERE, "special_tokens.json"), "w"), ensure_ascii=False, separators=(",", ":"))


def byte_level(texts):
    """One vocabulary of some 400 tokens, whose merges cross every edge of a word, so that a text cut elsewhere has other ids.
    It lacks the tokens of two control characters, as SmolLM2's does."""
    import tokenizers
    from check_tokenizers import KINDS
    byte_letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.train_from_iterator(texts * 3, tokenizers.trainers.BpeTrainer(
        vocab_size=440, show_progress=False, max_token_length=4, initial_alphabet=byte_letters))
    model = json.loads(trained.to_str())["model"]
    lacks = set("\u0104\u011d")
    merges = [merge for merge in model["merges"] if not set("".join(merge)) & lacks]
    tokens = [token for token in sorted(model["vocab"], key=model["vocab"].get) if not set(token) & lacks] + ["\u0120zebrafish"]
    cases = []
    for name, (normalizer, pre_tokenizer, post_processor, added, ignore_merges, in_vocabulary) in \
            {**KINDS, "unknown": KINDS["gpt2"]}.items():
        added = [{"id": tokens.index(token["content"]) if token["content"] in tokens else len(tokens) + i, **token}
                 for i, token in enumerate(added)]
        if post_processor:
            ids = {token["content"]: token["id"] for token in added}
            post_processor = json.loads(json.dumps(post_processor), object_hook=lambda d:
                                        {**d, "ids": [ids[i] for i in d["ids"]]} if "ids" in d else d)
        more = {token["content"]: token["id"] for token in added} if in_vocabulary else {}
        unknown = "<|endoftext|>" if name == "unknown" else None
        parts = {"version": "1.0", "added_tokens": added, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
                 "post_processor": post_processor,
                 "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
                 "model": {"type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": "",
                           "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
                           "ignore_merges": ignore_merges}}
        whole = {**parts, "model": {**parts["model"], "vocab": {**{token: i for i, token in enumerate(tokens)}, **more},
                                    "merges": merges}}
        judge = tokenizers.Tokenizer.from_str(json.dumps(whole))
        ids = [judge.encode(text, add_special_tokens=False).ids for text in texts]
        first = judge.encode("a").ids
        cases.append({"name": name, "tokenizer.json": parts, "more": more, "eos": added[-1]["content"],
                      "bos": first[0] if first[0] >= len(tokens) else -1, "ids": ids,
                      "said": [judge.decode(row) for row in ids],
                      "backwards": [judge.decode(row[::-1]) for row in ids] if name == "qwen3" else []})
    return {"tokens": tokens, "merges": merges, "texts": texts, "cases": cases}


def sentencepiece_merges(texts):
    """SentencePiece's kind as its conversions to tokenizer.json spell it: ▁ in front always, or where no space stands, or
    never."""
    import tokenizers
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, space]}
    metaspace = lambda scheme: {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
    decoders = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    special = ["<unk>", "<s>", "</s>"]
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    trained.train_from_iterator(texts * 3, tokenizers.trainers.BpeTrainer(
        vocab_size=400, show_progress=False, max_token_length=4, limit_alphabet=60,
        special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)]))
    model = json.loads(trained.to_str())["model"]
    tokens, merges, cases = sorted(model.pop("vocab"), key=trained.token_to_id), model.pop("merges"), []
    added = [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for i, token in enumerate(special)]
    template = {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
    template["pair"] = template["single"] + [{"Sequence": {"id": "B", "type_id": 1}}]
    for name, normalizer, pre_tokenizer, length in (
            ("prepend", prepend, None, 4), ("first", None, metaspace("first"), 4), ("always", None, metaspace("always"), 4),
            ("never", None, metaspace("never"), 3), ("replace", {"type": "Sequence", "normalizers": [space]}, None, 3)):
        parts = {"version": "1.0", "added_tokens": added, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
                 "post_processor": template, "decoder": {"type": "Sequence", "decoders": decoders[:length]}, "model": model}
        judge = tokenizers.Tokenizer.from_str(json.dumps({**parts, "model": {
            **model, "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}}))
        ids = [judge.encode(text, add_special_tokens=False).ids for text in texts]
        cases.append({"name": name, "tokenizer.json": parts, "more": {}, "eos": "</s>", "bos": 1, "ids": ids,
                      "said": [judge.decode(row) for row in ids], "backwards": []})
    return {"tokens": tokens, "merges": merges, "texts": texts, "cases": cases}


def merges():
    texts = ["I'm sure they'LL say don't, 'tis 'S", "  two  spaces\tand\n\n new \r\n lines \n  ",
             "in 2024 it was 3.14159 or 12345, \u0663\u0664 \u00bd\u00b2", "x=[1,2];//end\n\t}\n\n\n  y()",
             "\u4eba\u4eba\u751f\u800c\u81ea\u7531\uff0c\u3002\u65e5\u672c\u306e\u30ab\u30ca",
             "\uac00\ub098 \u1100\u1161\u11a8 e\u0301 \u00e9 \u212b \u2126",
             "q\u0307\u0323 a\u0301\u0316\u0301\u0316 \u1e0b\u0323 \U0001d15e \u0344",
             "\u0645\u0631\u062d\u0628\u0627\u064b \u0627\u0644",
             "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd \u2764\ufe0f",
             "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>", " <|begin_of_text|> a<|eot_id|>b",
             "<\uff5cbegin\u2581of\u2581sentence\uff5c>hi<|EOT|>\u00fc u\u0308",
             "a<think>b</think><tool_call> <r>  r <l>", " <l>  <r>  <w> a<w> <w>b <w>\u00e9 wor word wor",
             "cafe\u0301 caf\u00e9 \u00e9t e\u0301t", "a\x04b\x1d c \x1d'd\x1c \x7f",
             "\u00a0\u3000x\u2028\u180ey \u0085z\u200b", "Zebrafish zebrafish", "' 'll'' ''re", "?! ... ---> == __init__(self):",
             "\u017f '\u017f \u212aelvin 'L\u0130", "", " ",
             "\ud55c\uad6d \u0e44\u0e17\u0e22 \u0939\u093f\u0928\u094d\u0926\u0940 \u05e9\u05c1\u05b8"]
    plain = ["I'm sure they'LL say don't", "  two  spaces\tand\n\n new", " a", "\u2581a \u2581", "", " ",
             "in 2024 it was 3.14159 </s>hello</s> you<s>\u2581x", "\u4eba\u751f\u800c \u00e9 e\u0301 \U0001f44d\U0001f3fd",
             "a\x00b".replace("\0", "\x04"), "<0x0A> <unk>", "they say they say I'm sure I'm sure", "</s> a</s>  b"]
    with open(os.path.join(HERE, "merges.json"), "w") as file:
        json.dump([byte_level(texts), sentencepiece_merges(plain)], file, ensure_ascii=False, separators=(",", ":"))


def bf16_errors():
    """Full fine-tuning of base/ on a pair of rows of data/train.jsonl, then the next pair, and so on."""
    with open(os.path.join(HERE, "..", "..", "data", "train.jsonl")) as file:
        rows = [json.loads(next(file)) for _ in range(2 * PAIRS)]
    errors = {str(pair): bf16_errors_of(rows[2 * pair:2 * pair + 2]) for pair in range(PAIRS)}
    json.dump(errors, open(os.path.join(HERE, "bf16_errors.json"), "w"), indent=0)


def bf16_errors_of(rows):
    """Right padding that no label and no mask sees adds nothing."""
    import sentencepiece
    tokenizer = sentencepiece.SentencePieceProcessor(os.path.join(HERE, "..", "..", "base", "tokenizer.model"))
    prompts = [PROMPT.format(question=row["question"], answer="") for row in rows]
    ids = [[tokenizer.bos_id()] + tokenizer.encode(prompt + row["answer"]) + [tokenizer.eos_id()]
           for prompt, row in zip(prompts, rows)]
    starts = [1 + len(tokenizer.encode(prompt)) for prompt in prompts]
    padded = lambda rows, value: torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True,
                                                                 padding_value=value)
    inputs, mask = padded(ids, 0), padded([[1] * len(row) for row in ids], 0)
    labels = padded([[-100] * start + row[start:] for row, start in zip(ids, starts)], -100)
    gradients = {}
    for dtype in (torch.float64, torch.bfloat16):
        model = load(os.path.join("..", "..", "base"), dtype)
        logits = model(input_ids=inputs, attention_mask=mask).logits
        logits = logits if dtype == torch.float64 else logits.float()           # as transformers' own loss does
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100).backward()
        gradients[dtype] = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    want, got = gradients[torch.float64], gradients[torch.bfloat16]
    return {name: float(f"{(got[name] - want[name]).norm() / want[name].norm():.4g}") for name in want}


def greedy_text(directory):
    import sentencepiece
    tokenizer = sentencepiece.SentencePieceProcessor(os.path.join(directory, "tokenizer.model"))
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompt = [tokenizer.bos_id()] + tokenizer.encode("Once upon a time")
    ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=256)[0].tolist()
    with open(os.path.join(HERE, "stories260K.txt"), "w") as file:
        file.write(tokenizer.decode([i for i in ids if i not in (1, 2)]) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", metavar="DIR")
    parser.add_argument("--base", action="store_true")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if arguments.base:
        return bundled_tokenizer(), pieces(), special_tokens(), merges(), bf16_errors()
    torch.set_num_threads(1)            # the same bytes again on the same machine; on another, the same to the last digits
    os.makedirs(HERE, exist_ok=True)
    for name in list(BASES) + ["base-rwkv6"] + list(CASES):
        shutil.rmtree(os.path.join(HERE, name), ignore_errors=True)
    json.dump([{"ids": ids, "prompt": prompt} for ids, prompt in ROWS], open(os.path.join(HERE, "rows.json"), "w"))
    singular_values()
    bundled_tokenizer()
    pieces()
    special_tokens()
    merges()
    bf16_errors()
    for name, options in BASES.items():
        make_base(name, options)
    make_rwkv()
    for name, (base, config) in CASES.items():
        make_case(name, base, config)
    if arguments.stories:
        greedy_text(arguments.stories)


if __name__ == "__main__":
    main()
