#!/usr/bin/env bash
# No line is longer than 130 characters, and none of the files that teach longer than 110, tables and all. A part of make test.
export LC_ALL=C.UTF-8                                   # characters, not bytes
shopt -s globstar nullglob
too_long=$(grep -HnoE '^.{111}' train.c model.h llama.h rwkv6.h adapters.h tokenizer.c train.cu ops/*
           grep -HnoE '^.{131}' Makefile *.{c,md} {lib,run,paper,dev,doc}/**/*.{c,h,cpp,sh,awk,py,gp,md})
[ -z "$too_long" ] && echo "✓ lines            of at most 130 characters, where it teaches of 110" ||
    echo "✗ lines            longer than 130 characters, or 110 where it teaches:"$'\n'"$too_long"
[ -z "$too_long" ] && echo "1 passed, 0 failed, 0 skipped" || { echo "0 passed, 1 failed, 0 skipped"; exit 1; }
