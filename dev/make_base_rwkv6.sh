#!/usr/bin/env bash
# A small RWKV6 of 1.35 million parameters (5.4 MB), pretrained by this very program as base/ is, on the same stories and with
# the same tokenizer. It leaves build/base_rwkv6.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p build
[ -f build/stories.jsonl ] || "${PYTHON:-python3}" dev/make_data.py --stories build/stories.jsonl --count 150000 --seed 1
rm -rf build/base_rwkv6
./train --method full --init dev/base_rwkv6_config.json --data build/stories.jsonl --out build/base_rwkv6 \
    --log build/base_rwkv6.log --batch 32 --lr 3e-3 --warmup 100 --steps 4500 --seed 1 --save-every 500
