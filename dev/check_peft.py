"""Adapters that go both ways, shown in one run: what ./train writes, PEFT and transformers load, and the losses agree.

    python3 dev/check_peft.py --model DIR --rows FILE.jsonl     (needs torch, transformers, peft, sentencepiece)

Two tables. Adapters of ./train: a few steps of every method, then the loss on the rows by ./train --eval, by transformers +
PEFT with the adapter, by transformers with the merged model; then PEFT trains the adapter a step further and ./train reads it
back. Adapters of PEFT's, each from PEFT's own start and a step of its own: the loss here, the same greedy text (=), the loss
of what ./train merged by transformers; then ./train trains it further and PEFT reads it back.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

import peft
import sentencepiece
import torch
import transformers

from make_data import PROMPT

# those PEFT has a format for
METHODS = ["lora", "rslora", "lora+", "dora", "pissa", "olora", "lora-ga", "bone", "mini", "bat"]
TOLERANCE = 1e-5


def read_rows(path, tokenizer, count, longest):
    rows = []
    for line in list(open(path))[:count]:
        row = json.loads(line)
        prompt = PROMPT.format(question=row["question"], answer="")
        ids = [tokenizer.bos_id()] + tokenizer.encode(prompt + row["answer"]) + [tokenizer.eos_id()]
        rows.append((ids[:longest], min(1 + len(tokenizer.encode(prompt)), longest)))
    return [row for row in rows if len(row[0]) > row[1]]


def loss_of(model, rows):
    total = count = 0
    for ids, prompt in rows:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")[prompt - 1:]
        total, count = total + losses.double().sum().item(), count + len(losses)
    return total / count


def train(*arguments):
    result = subprocess.run(["./train", *map(str, arguments)], capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"./train {' '.join(map(str, arguments))}\n{result.stdout}{result.stderr}")
    return result.stdout


def eval_loss(*arguments):
    return float(train("--eval", *arguments).splitlines()[-1].split()[2])


def base_model(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def step_further(model, rows):
    """One SGD step of PEFT's, so that what comes back is not what we wrote."""
    ids, _ = rows[0]
    model.train()
    model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    model.eval()


def check(method, arguments, rows, folder):
    adapter, merged, back = (os.path.join(folder, f"{method}-{name}") for name in ("adapter", "merged", "back"))
    common = ["--model", arguments.model, "--val", arguments.subset, "--seq", arguments.seq]
    train("--model", arguments.model, "--data", arguments.subset, "--seq", arguments.seq, "--method", method, "--rank", 4,
          "--mini-r", 4, "--alpha", 6, "--steps", 4, "--batch", 4, "--lr", 5e-3, "--out", adapter)
    ours = eval_loss(*common, "--adapter", adapter)
    model = peft.PeftModel.from_pretrained(base_model(arguments.model), adapter, is_trainable=True).eval()
    theirs = loss_of(model, rows)
    train("--merge", merged, "--model", arguments.model, "--adapter", adapter)
    in_transformers = loss_of(base_model(merged), rows)
    step_further(model, rows)
    model.save_pretrained(back)
    further, ours_further = loss_of(model, rows), eval_loss(*common, "--adapter", back)
    errors = [abs(theirs - ours), abs(in_transformers - ours), abs(further - ours_further)]
    ok = max(errors) <= TOLERANCE and abs(further - theirs) > 10 * TOLERANCE
    print(f"{'✓' if ok else '✗'} {method:8} {ours:10.6f} {theirs:10.6f} {in_transformers:12.6f}   "
          f"{further:10.6f} {ours_further:10.6f}   {max(errors):.1e}", flush=True)
    return ok


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(**options):
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **{"target_modules": PROJECTIONS, **options})


def miss(**options):
    return peft.MissConfig(task_type="CAUSAL_LM", target_modules=PROJECTIONS, **{"r": 4, **options})


THEIRS = {
    "lora": lora(), "dropout": lora(lora_dropout=0.1), "rslora": lora(use_rslora=True),
    "q, v": lora(target_modules=["q_proj", "v_proj"]), "dora": lora(use_dora=True),
    "pissa": lora(init_lora_weights="pissa"), "olora": lora(init_lora_weights="olora"),
    "miss": miss(), "miss r6": miss(r=6), "mini": miss(mini_r=4, init_weights="mini"), "bat": miss(init_weights="bat"),
}


def same_text(model, tokenizer, *arguments):
    text = "Once upon a time"
    ids = torch.tensor([[tokenizer.bos_id()] + tokenizer.encode(text)])
    with torch.no_grad():
        said = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24,
                              eos_token_id=tokenizer.eos_id(), pad_token_id=0)
    return tokenizer.decode(said[0].tolist()) == train("--generate", text, "--max-new", 24, *arguments)[:-1]


def check_theirs(name, config, arguments, tokenizer, rows, folder):
    adapter, merged, back = (os.path.join(folder, f"theirs-{name}-{part}") for part in ("adapter", "merged", "back"))
    base = ["--model", arguments.model]
    common = [*base, "--val", arguments.subset, "--seq", arguments.seq]
    torch.manual_seed(1)
    model = peft.get_peft_model(base_model(arguments.model), config)
    step_further(model, rows)
    model.save_pretrained(adapter)
    theirs, ours = loss_of(model, rows), eval_loss(*common, "--adapter", adapter)
    same = same_text(model, tokenizer, *base, "--adapter", adapter)
    train("--merge", merged, *base, "--adapter", adapter)
    in_transformers = loss_of(base_model(merged), rows)
    train(*common, "--data", arguments.subset, "--adapter", adapter, "--steps", 3, "--batch", 4, "--lr", 1e-3,
          "--max-new", 1, "--out", back)
    ours_further = eval_loss(*common, "--adapter", back)
    further = loss_of(peft.PeftModel.from_pretrained(base_model(arguments.model), back).eval(), rows)
    errors = [abs(theirs - ours), abs(in_transformers - theirs), abs(further - ours_further)]
    ok = same and max(errors) <= TOLERANCE and abs(further - theirs) > 10 * TOLERANCE
    print(f"{'✓' if ok else '✗'} {name:8} {theirs:10.6f} {ours:10.6f} {'=' if same else '≠'} {in_transformers:12.6f} "
          f"{ours_further:12.6f} {further:10.6f}   {max(errors):.1e}", flush=True)
    return ok


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="base")
    parser.add_argument("--rows", default="data/val.jsonl")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--seq", type=int, default=512)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = sentencepiece.SentencePieceProcessor(os.path.join(arguments.model, "tokenizer.model"))
    with tempfile.TemporaryDirectory() as folder:
        arguments.subset = os.path.join(folder, "rows.jsonl")
        with open(arguments.subset, "w") as file:
            file.writelines(list(open(arguments.rows))[:arguments.count])
        rows = read_rows(arguments.rows, tokenizer, arguments.count, arguments.seq)
        print("  method      ./train       PEFT  transformers    PEFT after     ./train   largest")
        print("             adapter    adapter        merged   its own step  reads it     error")
        good = [check(method, arguments, rows, folder) for method in METHODS]
        print("\n  config         PEFT    ./train  transformers  ./train after      PEFT   largest")
        print("              adapter    adapter        merged    three steps  reads it     error")
        good += [check_theirs(name, config, arguments, tokenizer, rows, folder) for name, config in THEIRS.items()]
    print(f"{sum(good)} of {len(good)} within {TOLERANCE}")
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
