"""Turns one of BlinkDL's .pth files of RWKV6 (x060) into a directory that ./train reads.

    python3 dev/rwkv_pth.py RWKV-x060-World-1B6.pth rwkv_vocab_v20230424.txt OUT
"""
import json, os, shutil, sys
import safetensors.torch, torch

NAMES = [("emb.", "embeddings."), ("blocks.0.ln0.", "blocks.0.pre_ln."), (".att.", ".attention."), (".ffn.", ".feed_forward.")]
path, vocabulary, out = sys.argv[1:]
tensors, found = {}, torch.load(path, map_location="cpu", weights_only=True)
for name, tensor in found.items():
    for old, new in NAMES:
        name = name.replace(old, new)
    tensors[name if name.startswith("head.") else "rwkv." + name] = tensor.contiguous()
H, d = found["blocks.0.att.time_faaaa"].shape
F, C = found["blocks.0.ffn.key.weight"].shape
os.makedirs(out)
safetensors.torch.save_file(tensors, os.path.join(out, "model.safetensors"), metadata={"format": "pt"})
shutil.copy(vocabulary, os.path.join(out, "rwkv_vocab_v20230424.txt"))
layers = 1 + max(int(name.split(".")[1]) for name in found if name.startswith("blocks."))
config = {"model_type": "rwkv6", "architectures": ["Rwkv6ForCausalLM"], "hidden_size": C, "attention_hidden_size": H * d,
          "head_size": d, "head_size_divisor": 8, "intermediate_size": F, "num_hidden_layers": layers,
          "layer_norm_epsilon": 1e-5, "vocab_size": len(found["emb.weight"]), "tie_word_embeddings": False,
          "bos_token_id": 0, "eos_token_id": 0}
json.dump(config, open(os.path.join(out, "config.json"), "w"), indent=1)
