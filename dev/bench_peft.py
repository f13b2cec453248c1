"""Beside PEFT: the same steps by ./train and by transformers + PEFT, one after the other on the same machine.

    python3 dev/bench_peft.py MODEL_DIR... [--data ROWS.jsonl] [--batch 4 --seq 256 --threads 2 --steps 8 --runs 2]
                              [--as eager|compile|packed] [--bf16]     (needs torch, transformers, peft)

Both read the same model directory and do the whole step: forward, backward, clipping, AdamW, every step on the same --batch
rows. Losses of the first step stand beside each other, so that it is seen that both do the same work. Without --data a
row has --seq tokens and learns each of them. With it, rows ({"question", "answer"} and the like) are put into the prompt and
only the answer is learnt, as in real fine-tuning; the peer pads them to the longest of the batch, as transformers' collator does.

--as says how the peer runs: as most people do (eager), through torch.compile (compile), or with its rows end to end, nothing
padded and only what is learnt multiplied with the vocabulary (packed), which takes lines of one's own around PEFT.

With --bf16 ./train gets --bf16, too, and the peer has its base and activations in bf16, the adapter in float, as PEFT does.

Speed counts the rows' own tokens and is that of the fastest step after the first of a run, and of the faster of --runs runs,
which take turns (neighbours on the machine only ever slow one down); memory is the peak of resident memory. Each run has a
process of its own.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

from make_data import PROMPT

METHODS = [("lora", 18), ("lora", 36), ("pissa", 18), ("pissa", 36), ("bone", 32), ("bone", 64), ("bat", 32), ("bat", 64),
           ("bat-row", 32), ("bat-row", 64), ("full", 1)]


def adapter(name, rank):
    import peft
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if name in ("lora", "pissa"):
        return peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets,
                               init_lora_weights=True if name == "lora" else "pissa", task_type="CAUSAL_LM")
    return peft.MissConfig(r=rank, target_modules=targets, init_weights=True if name == "bone" else "bat", task_type="CAUSAL_LM")


def padded(rows):
    """What the model is given, and the label of each token, -100 where nothing is learnt."""
    import torch
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([torch.tensor(row["ids"]) for row in rows], batch_first=True)
    labels = pad([torch.tensor([-100] * row["prompt"] + row["ids"][row["prompt"]:]) for row in rows], batch_first=True,
                 padding_value=-100)
    mask = pad([torch.ones(len(row["ids"]), dtype=torch.long) for row in rows], batch_first=True)
    given = {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1] if mask.min() == 0 else None}
    return given, labels[:, 1:].flatten()


def end_to_end(rows):
    """The same as one row. transformers sees by the positions where a row begins, and keeps logits of the learnt alone."""
    import torch
    ids = torch.tensor([i for row in rows for i in row["ids"][:-1]])
    places = torch.tensor([i for row in rows for i in range(len(row["ids"]) - 1)])
    following = torch.tensor([i for row in rows for i in row["ids"][1:]])
    learnt = torch.tensor([i + 1 >= row["prompt"] for row in rows for i in range(len(row["ids"]) - 1)])
    given = {"input_ids": ids[None], "position_ids": places[None], "logits_to_keep": learnt.nonzero().flatten()}
    return given, following[learnt]


def peer(args):
    """The steps by transformers + PEFT; prints one line of JSON."""
    import peft
    import torch
    import transformers
    torch.set_num_threads(args.threads)
    clock = time.perf_counter                                           # as ./train's log: neighbours slow both
    rows = json.load(open(args.peer))
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model[0], dtype=torch.bfloat16 if args.bf16 else torch.float32)
    if args.method != "full":
        model = peft.get_peft_model(model, adapter(args.method, args.rank))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0)
    seconds, losses = [], []
    given, labels = end_to_end(rows) if args.way == "packed" else padded(rows)
    forward = torch.compile(model) if args.way == "compile" else model
    for step in range(args.steps):
        start = clock()
        logits = forward(**given, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        seconds.append(clock() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    fed = sum(len(row["ids"]) - 1 for row in rows)
    print(json.dumps({"tok_per_s": fed / min(seconds[1:]), "peak": peak, "loss": losses[0]}))


def peak_of(command, **options):
    """Runs a command; its standard output, and the peak of its resident memory in bytes."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{output}")
    return output, usage.ru_maxrss * 1024


def ours(args, model, method, rank, text, folder):
    log = os.path.join(folder, "log")
    _, peak = peak_of(["./train", "--model", model, "--data", text, "--method", method, "--rank", str(rank),
                       "--batch", str(args.batch), "--seq", str(args.seq + 1), "--steps", str(args.steps), "--lr", "1e-4",
                       "--schedule", "constant", "--no-shuffle", *["--bf16"] * args.bf16,
                       "--threads", str(args.threads), "--log", log, "--out", os.path.join(folder, "out")])
    steps = [json.loads(line) for line in open(log)]
    return {"tok_per_s": max(s["tok_per_s"] for s in steps[1:]), "peak": peak, "loss": steps[0]["loss"]}


def tokens_of(texts, model, folder):
    """The ids that ./train's tokenizer makes of each text, no BOS."""
    path = os.path.join(folder, "texts.jsonl")
    with open(path, "w") as f:
        f.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    lines = subprocess.run(["./train", "--tokenize", path, "--model", model], capture_output=True, text=True,
                           check=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def write_rows(args, model, folder):
    """A batch of rows for ./train, and for the peer their ids and how many of them are the prompt."""
    rows, ids = os.path.join(folder, "rows.jsonl"), os.path.join(folder, "ids.json")
    n = args.batch
    if args.data:
        lines = open(args.data).read().splitlines()[:n]
        pairs = [next((PROMPT.format(question=row[a], answer=""), row[b]) for a, b in
                      (("question", "answer"), ("query", "response"), ("instruction", "output")) if a in row)
                 for row in map(json.loads, lines)]
        prompts = [1 + len(t) for t in tokens_of([p for p, _ in pairs], model, folder)]
        kept = [{"ids": ([1] + t + [2])[:args.seq + 1], "prompt": p}
                for t, p in zip(tokens_of([p + a for p, a in pairs], model, folder), prompts)]
    else:
        words = open("README.md").read().split()
        texts = [" ".join(words[(37 * i + j) % len(words)] for j in range(2 * args.seq)) for i in range(n)]
        lines = [json.dumps({"text": text}) for text in texts]
        kept = [{"ids": ([1] + t)[:args.seq + 1], "prompt": 1} for t in tokens_of(texts, model, folder)]
    open(rows, "w").write("\n".join(lines) + "\n")
    json.dump(kept, open(ids, "w"))
    fed, learnt = sum(len(r["ids"]) - 1 for r in kept), sum(len(r["ids"]) - r["prompt"] for r in kept)
    print(f"{model}: {n} rows of {fed / n:.0f} tokens, {100 * learnt / fed:.0f} % of them learnt", flush=True)
    return rows, ids


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="+")
    for name, default in (("batch", 4), ("seq", 256), ("threads", 2), ("steps", 8), ("runs", 2), ("rank", 0)):
        parser.add_argument("--" + name, type=int, default=default)
    parser.add_argument("--method")
    parser.add_argument("--data")
    parser.add_argument("--as", dest="way", choices=["eager", "compile", "packed"], default="eager")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        return peer(args)
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "TRANSFORMERS_VERBOSITY": "error",
                   "PYTHONWARNINGS": "ignore", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment.pop("OPENBLAS_CORETYPE", None)
    print(f"batch {args.batch}, rows of up to {args.seq} tokens, {args.threads} threads, {'bf16' if args.bf16 else 'float32'}; "
          f"each ratio is ours over PEFT's ({args.way})")
    for model in args.model:
        with tempfile.TemporaryDirectory() as folder:
            text, ids = write_rows(args, model, folder)
            print(f"{'method':8} {'rank':>4} {'tok/s':>8} {'PEFT':>8} {'ratio':>6}   {'peak MB':>8} {'PEFT':>8} {'ratio':>6}   "
                  f"{'loss':>9} {'PEFT':>9}", flush=True)
            config = json.load(open(os.path.join(model, "config.json")))
            for method, rank in METHODS:
                if method.startswith("bat") and config["hidden_size"] % rank:
                    print(f"{method:8} {rank:4}  the rank does not divide this model's weights", flush=True)
                    continue
                if args.method and (method, rank) != (args.method, args.rank or rank):
                    continue
                # bat-row has no peer: it stands beside PEFT's bat of the same rank
                command = [sys.executable, __file__, model, "--peer", ids, "--method", method.removesuffix("-row"),
                           "--rank", str(rank), "--as", args.way]
                command += ["--bf16"] * args.bf16
                for name in ("batch", "seq", "threads", "steps"):
                    command += ["--" + name, str(getattr(args, name))]
                pairs = [(ours(args, model, method, rank, text, folder),
                          json.loads(peak_of(command, env=environment)[0].splitlines()[-1])) for _ in range(args.runs)]
                a, b = (max(side, key=lambda run: run["tok_per_s"]) for side in zip(*pairs))
                print(f"{method:8} {rank:4} {a['tok_per_s']:8.0f} {b['tok_per_s']:8.0f} {a['tok_per_s'] / b['tok_per_s']:6.2f}   "
                      f"{a['peak'] / 1e6:8.0f} {b['peak'] / 1e6:8.0f} {a['peak'] / b['peak']:6.2f}   "
                      f"{a['loss']:9.5f} {b['loss']:9.5f}", flush=True)


main()
