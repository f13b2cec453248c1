#!/usr/bin/env bash
# Makes base-rwkv6/ again: an RWKV6 of 1.35 million parameters (5.4 MB), pretrained by this very program as base/ is, on the
# same stories and with the same tokenizer. On a GPU two minutes, with TRAIN=./train_cuda_f32; on a CPU hours.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p build
[ -f build/stories.jsonl ] || { echo "build/stories.jsonl is not here: make base writes it" >&2; exit 1; }
rm -rf build/base-rwkv6
"${TRAIN:-./train}" --method full --init dev/base_rwkv6_config.json --data build/stories.jsonl --out build/base-rwkv6 \
    --log build/base-rwkv6.log --batch 32 --lr 3e-3 --warmup 100 --steps 4500 --seed 1 --save-every 500
mkdir -p base-rwkv6
cp build/base-rwkv6/{config.json,model.safetensors,tokenizer.model} base-rwkv6/
