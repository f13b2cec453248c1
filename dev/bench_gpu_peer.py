"""transformers + PEFT on the shape and tokens of dev/bench_gpu.c, which calls this with --peer.

    python3 dev/bench_gpu_peer.py --shape DIM,HIDDEN,LAYERS,HEADS,KV_HEADS,VOCAB [--device cpu] [--load ROWSxTOKENS …]

Random bf16 weights, adapters in fp32, SDPA attention, gradient checkpointing as the other side recomputes, fused AdamW.
"""
import argparse
import time

import peft
import torch
import transformers

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS = {
    "lora r36": lambda: peft.LoraConfig(r=36, lora_alpha=36, target_modules=TARGETS),
    "bone r64": lambda: peft.MissConfig(r=64, target_modules=TARGETS),
    "bat r64": lambda: peft.MissConfig(r=64, init_weights="bat", target_modules=TARGETS),
}


def measure(name, config, rows, tokens, device, steps=5):
    torch.manual_seed(1)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = peft.get_peft_model(model, METHODS[name]()).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0, fused=device == "cuda")
    ids = torch.randint(config.vocab_size, (rows, tokens + 1), device=device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for step in range(-1, steps):
        if step == 0:
            wait()
            start = time.time()
        with torch.autocast(device, torch.bfloat16):
            logits = model(ids[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    wait()
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else float("nan")
    print(f"PEFT  {name:12} {rows:2} x {tokens:<4} {rows * tokens * steps / (time.time() - start):9.0f} tok/s   {peak:6.1f} GB", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--load", nargs="+", default=["4x1024", "16x1024"])
    arguments = parser.parse_args()
    dim, hidden, layers, heads, kv_heads, vocab = map(int, arguments.shape.split(","))
    config = transformers.LlamaConfig(hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                                      num_key_value_heads=kv_heads, vocab_size=vocab, max_position_embeddings=4096)
    for load in arguments.load:
        rows, tokens = map(int, load.split("x"))
        for name in METHODS:
            try:
                measure(name, config, rows, tokens, arguments.device)
            except torch.OutOfMemoryError:
                print(f"PEFT  {name:12} {rows:2} x {tokens:<4} does not fit", flush=True)
            if arguments.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
