"""Sixteen families of models, shrunk: each with its publisher's config.json but for the sizes, random weights, and its kind of
tokenizer. ./train and transformers must agree on the loss and on the greedy text; PEFT must load what ./train trained, and
transformers what it merged.

    python3 dev/check_families.py [NAME …]     (make first; needs torch, transformers, peft, sentencepiece, tokenizers)
    python3 dev/check_families.py --instruct DIR     a chat model as it is, dev/smollm2.py's: loss of answers, and a greedy one
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile

import peft
import sentencepiece
import torch
import transformers

import check_tokenizers

TOLERANCE = 1e-5
LLAMA = {"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
         "initializer_range": 0.02, "model_type": "llama", "rms_norm_eps": 1e-05, "tie_word_embeddings": False,
         "torch_dtype": "float16", "use_cache": True}
LLAMA2 = {**LLAMA, "max_position_embeddings": 4096, "pretraining_tp": 1, "rope_scaling": None,
          "transformers_version": "4.31.0.dev0"}
LLAMA3 = {**LLAMA, "attention_bias": False, "attention_dropout": 0.0, "max_position_embeddings": 8192, "pretraining_tp": 1,
          "rope_scaling": None, "rope_theta": 500000.0, "torch_dtype": "bfloat16", "mlp_bias": False}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "max_position_embeddings": 32768,
           "torch_dtype": "bfloat16"}
QWEN = {**LLAMA, "attention_dropout": 0.0, "max_position_embeddings": 32768, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "torch_dtype": "bfloat16", "use_sliding_window": False}
STRETCHED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
# name: heads, key-value heads, head_dim (0: 8, and not in the file), tokenizer, config.json
FAMILIES = {
    "llama-2": (8, 8, 0, None, LLAMA2),
    "llama-2-chat": (8, 8, 0, None, {**LLAMA2, "_name_or_path": "meta-llama/Llama-2-7b-chat-hf"}),
    "tinyllama": (8, 1, 0, None, {**LLAMA2, "max_position_embeddings": 2048, "torch_dtype": "bfloat16"}),
    "openllama": (8, 8, 0, None, {**LLAMA, "max_position_embeddings": 2048, "rms_norm_eps": 1e-06}),
    "codellama": (8, 8, 0, None, {**LLAMA2, "max_position_embeddings": 16384, "rope_theta": 1000000, "torch_dtype": "bfloat16"}),
    "vicuna": (8, 8, 0, None, {**LLAMA2, "pad_token_id": 0}),
    "yi": (8, 1, 0, None, {**LLAMA2, "pad_token_id": 0, "rope_theta": 5000000.0, "torch_dtype": "bfloat16"}),
    "mistral-v0.1": (8, 2, 0, None, {**MISTRAL, "rope_theta": 10000.0, "sliding_window": 16}),           # published: 4096
    "mistral-v0.3": (8, 2, 0, None, {**MISTRAL, "rope_theta": 1000000.0, "sliding_window": None, "attention_dropout": 0.0}),
    "llama-3": (8, 2, 0, "llama3", LLAMA3),
    "llama-3.1": (8, 2, 0, "llama3", {**LLAMA3, "max_position_embeddings": 131072,
                                      "rope_scaling": {**STRETCHED, "factor": 8.0}, "eos_token_id": [2, 3, 4]}),
    "llama-3.2": (8, 2, 16, "llama3", {**LLAMA3, "max_position_embeddings": 131072,
                                       "rope_scaling": {**STRETCHED, "factor": 32.0}, "tie_word_embeddings": True}),
    "smollm2": (9, 3, 0, "smollm2", {**LLAMA3, "rope_theta": 100000, "tie_word_embeddings": True, "is_llama_config": True,
                                     "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}}),
    "deepseek-llm": (8, 8, 0, "deepseek-llm", {**LLAMA2, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
                                               "torch_dtype": "bfloat16"}),
    "qwen2.5": (8, 2, 0, "qwen2.5", {**QWEN, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
                                     "max_window_layers": 28, "sliding_window": 131072,
                                     "use_mrope": False, "tie_word_embeddings": True}),
    "qwen3": (8, 2, 16, "qwen3", {**QWEN, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3",
                                  "attention_bias": False, "max_window_layers": 28,
                                  "rope_scaling": None, "sliding_window": None, "tie_word_embeddings": True}),
}


class SentencePiece:
    def __init__(self, folder):
        shutil.copy("base/tokenizer.model", folder)
        self.own = sentencepiece.SentencePieceProcessor("base/tokenizer.model")
        self.size, self.begin, self.ends = self.own.vocab_size(), [1], [2]

    def encode(self, text):
        return self.own.encode(text)

    def decode(self, ids):
        return self.own.decode(ids)


class ByteLevel:
    def __init__(self, folder, kind, corpus):
        self.own = check_tokenizers.train(kind, corpus, folder)
        self.size = max(self.own.get_vocab().values()) + 1
        self.begin = self.own.encode("").ids
        self.ends = [self.own.token_to_id(json.load(open(os.path.join(folder, "tokenizer_config.json")))["eos_token"])]

    def encode(self, text):
        return self.own.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.own.decode(ids, skip_special_tokens=True)


def make(name, folder, corpus):
    heads, kv_heads, head_dim, kind, fields = FAMILIES[name]
    tokenizer = ByteLevel(folder, kind, corpus) if kind else SentencePiece(folder)
    config = {**fields, "hidden_size": heads * 8, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": heads,
              "num_key_value_heads": kv_heads, "vocab_size": tokenizer.size, **({"head_dim": head_dim} if head_dim else {})}
    if kind:                            # publishers' ids are beyond a shrunk vocabulary
        config["eos_token_id"] = tokenizer.ends if isinstance(config["eos_token_id"], list) else tokenizer.ends[0]
        config["bos_token_id"] = tokenizer.begin[0] if tokenizer.begin else None
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**json.loads(json.dumps(config))))
    with torch.no_grad():               # far from the start, where every token is as likely as any other
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.25 if parameter.dim() == 2 else 0.2) +
                            (parameter if parameter.dim() == 1 else 0))
    model.float().save_pretrained(folder)
    json.dump(config, open(os.path.join(folder, "config.json"), "w"), indent=2)
    return tokenizer


def train(*arguments):
    result = subprocess.run(["./train", *map(str, arguments)], capture_output=True)
    if result.returncode:
        sys.exit(f"./train {' '.join(map(str, arguments))}\n{result.stdout.decode()}{result.stderr.decode()}")
    return result.stdout


def eval_loss(*arguments):
    return float(train("--eval", *arguments).decode().splitlines()[-1].split()[2])


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def loss_of(model, tokenizer, texts):
    total = count = 0
    for text in texts:
        ids = torch.tensor([tokenizer.begin + tokenizer.encode(text)])
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].double(), ids[0, 1:], reduction="none")
        total, count = total + losses.sum().item(), count + len(losses)
    return total / count


def greedy(model, tokenizer, text):
    ids = torch.tensor([tokenizer.begin + tokenizer.encode(text)])
    with torch.no_grad():
        said = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24,
                              pad_token_id=0)[0].tolist()
    return tokenizer.decode([i for i in said if i not in tokenizer.ends])


def check(name, folder, corpus, texts):
    model_dir, adapter, merged, rows = (os.path.join(folder, part) for part in ("model", "adapter", "merged", "rows.jsonl"))
    os.mkdir(model_dir)
    tokenizer = make(name, model_dir, corpus)
    with open(rows, "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    base = ["--model", model_dir]
    common = [*base, "--val", rows, "--seq", 4096]
    model = load(model_dir)
    ours, theirs = eval_loss(*common), loss_of(model, tokenizer, texts)
    prompt = texts[0][:60]
    said = train("--generate", prompt, "--max-new", 24, *base)[:-1].decode(errors="replace")
    same = said == greedy(model, tokenizer, prompt)
    if not same:
        print(ascii(said), ascii(greedy(model, tokenizer, prompt)))
    train(*base, "--data", rows, "--seq", 4096, "--method", "bone", "--rank", 4, "--steps", 3, "--batch", 2, "--lr", 1e-2,
          "--out", adapter)
    adapted = eval_loss(*common, "--adapter", adapter)
    in_peft = loss_of(peft.PeftModel.from_pretrained(load(model_dir), adapter).eval(), tokenizer, texts)
    train("--merge", merged, *base, "--adapter", adapter)
    in_transformers = loss_of(load(merged), tokenizer, texts)
    error = max(abs(ours - theirs), abs(adapted - in_peft), abs(adapted - in_transformers))
    ok = same and error <= TOLERANCE and abs(adapted - ours) > 10 * TOLERANCE
    print(f"{'✓' if ok else '✗'} {name:13} {ours:10.6f} {theirs:12.6f} {'=' if same else '≠'} {adapted:10.6f} {in_peft:10.6f} "
          f"{in_transformers:12.6f}   {error:.1e}", flush=True)
    return ok


def check_instruct(folder):
    """Rows and a question in the model's own chat template, which transformers' Jinja and ./train's table must write alike."""
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(folder), load(folder)
    rows = [json.loads(line) for line in list(open("data/val.jsonl"))[:4]]
    chats = [[{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in rows]
    total = count = 0
    for chat in chats:
        prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\n")          # up to the end token
        ids, first = tokenizer(whole)["input_ids"], len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(model(torch.tensor([ids])).logits[0, :-1].double(),
                                                       torch.tensor(ids[1:]), reduction="none")
        total, count = total + losses[first - 1:].sum().item(), count + len(ids) - first
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        ours, theirs = eval_loss("--model", folder, "--val", file.name, "--seq", 2048), total / count
    good = abs(ours - theirs) <= TOLERANCE
    print(f"{'✓' if good else '✗'} loss of {count} tokens: ./train {ours:.6f}, transformers {theirs:.6f}")
    for question in ("What is the capital of France?", "Write a short poem about the sea."):
        ids = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True,
                                            return_tensors="pt", return_dict=True)["input_ids"]
        answer = tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=60)[0][ids.shape[1]:],
                                  skip_special_tokens=True)
        said = train("--generate", question, "--chat", "--max-new", 60, "--model", folder)[:-1].decode()
        good &= said == answer
        print(f"{'✓' if said == answer else '✗'} {question} {ascii(said)}{'' if said == answer else ' ≠ ' + ascii(answer)}")
    return good


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--real", default="../shared/real")
    parser.add_argument("--instruct", metavar="DIR")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if arguments.instruct:
        sys.exit(not check_instruct(arguments.instruct))
    corpus = check_tokenizers.corpora(arguments.real)
    texts = [json.loads(line)["question"] for line in list(open("data/val.jsonl"))[:4]]
    texts += ["Zürich, 猫 and 🙂!\n\n  def f(x):\n\treturn x ** 2  # 12345 + 1,234.50", "عَرَبِيّ 你好，世界。 it's I'VE"]
    print("  family           ./train transformers     ./train       PEFT transformers   largest")
    print("                      loss         loss      adapter    adapter       merged     error")
    good = []
    for name in arguments.names or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            good.append(check(name, folder, corpus, texts))
    print(f"{sum(good)} of {len(good)} within {TOLERANCE}, with the same greedy text")
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
