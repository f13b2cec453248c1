"""transformers + PEFT on the shape and tokens of dev/bench_gpu.c, which calls this with --peer.

    python3 dev/bench_gpu_peer.py --shape DIM,HIDDEN,LAYERS,HEADS,KV_HEADS,VOCAB [--device cpu] [--load ROWSxTOKENS …]
                                  [--method "lora r36" …]

Random bf16 weights, adapters in fp32, SDPA attention (FlashAttention where the card has it), fused AdamW, without and with
gradient checkpointing.
"""
import argparse
import gc
import itertools
import time

import peft
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS = {
    "lora r36": lambda: peft.LoraConfig(r=36, lora_alpha=36, target_modules=TARGETS),
    "bone r64": lambda: peft.MissConfig(r=64, target_modules=TARGETS),
    "bat r64": lambda: peft.MissConfig(r=64, init_weights="bat", target_modules=TARGETS),
}


def measure(name, config, rows, tokens, device, checkpointing, steps=4):
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = peft.get_peft_model(model, METHODS[name]()).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0,
                                  fused=device == "cuda")
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
    print(f"PEFT  {name:9} {rows:2}x{tokens:<4} checkpointing {checkpointing:d} "
          f"{rows * tokens * steps / (time.time() - start):9.0f} tok/s   {peak:6.1f} GB", flush=True)


def attention(rows, tokens, heads, head_dim, turns=10):
    """Causal attention alone, as PyTorch's back ends do it: flops as dev/bench_gpu.c counts them."""
    q, k, v, gradient = (torch.randn(rows, heads, tokens, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    flops = 2 * rows * heads * head_dim * tokens ** 2           # two products, half of the scores
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend):
            def forward():
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

            out = forward()
            seconds = []
            for work in (forward, lambda: out.backward(gradient, retain_graph=True)):
                work(), torch.cuda.synchronize()
                start = time.time()
                for _ in range(turns):
                    work()
                torch.cuda.synchronize()
                seconds.append((time.time() - start) / turns)
        print(f"attention {rows}x{tokens}, {heads} heads of {head_dim}, {backend.name}: "
              f"forward {1e3 * seconds[0]:.3f} ms, {flops / seconds[0] / 1e12:.0f} TFLOP/s; "
              f"backward {1e3 * seconds[1]:.3f} ms, {2.5 * flops / seconds[1] / 1e12:.0f} TFLOP/s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--load", nargs="+", default=["4x1024", "16x1024"])
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=list(METHODS))
    arguments = parser.parse_args()
    dim, hidden, layers, heads, kv_heads, vocab = map(int, arguments.shape.split(","))
    config = transformers.LlamaConfig(hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers,
                                      num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocab,
                                      max_position_embeddings=4096)
    loads = [tuple(map(int, load.split("x"))) for load in arguments.load]
    for rows, tokens in loads if arguments.device == "cuda" else []:
        attention(rows, tokens, heads, dim // heads)
    for rows, tokens in loads:
        for name, checkpointing in itertools.product(arguments.method, (False, True)):
            try:
                measure(name, config, rows, tokens, arguments.device, checkpointing)
            except torch.OutOfMemoryError:
                print(f"PEFT  {name:9} {rows:2}x{tokens:<4} checkpointing {checkpointing:d} does not fit", flush=True)
            gc.collect()
            if arguments.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
