#!/usr/bin/env bash
# A floor calls only floors below it. A file is compiled alone, with what it includes itself, so it can call nothing else; and
# what it includes, directly or not, stands on its own floor or below. `make floors`.
floor() {
    case $1 in
    ops/*) echo 0 ;; lib/*) echo 1 ;; tokenizer.c) echo 2 ;; model.h|llama.h|rwkv6.h|backbones.h) echo 2 ;; adapters.h) echo 3 ;;
    run/*) echo 4 ;; paper/*) echo 5 ;; train.c) echo 6 ;; *) echo "no floor for $1" >&2; exit 1 ;;
    esac
}

wrong=0
for file in ops/*.h ops/cpu.c lib/*.h tokenizer.c model.h llama.h rwkv6.h backbones.h adapters.h run/*.h paper/*.h train.c; do
    own=$(floor "$file")
    echo "#include \"$file\"" | ${CC:-cc} -std=gnu11 -D_GNU_SOURCE -fopenmp -Werror=implicit-function-declaration -w -I. \
        -fsyntax-only -x c - || { echo "✗ $file calls what it does not include"; wrong=1; }
    for other in $(${CC:-cc} -std=gnu11 -D_GNU_SOURCE -fopenmp -I. -MM -x c "$file" | sed 's/^[^:]*://; s/\\//g' |
                   tr ' ' '\n' | grep -v '^$' | xargs -n 1 realpath --relative-to=.); do
        case $other in /*|../*) continue ;; esac
        [ "$(floor "$other")" -le "$own" ] || { echo "✗ $file (floor $own) includes $other (floor $(floor "$other"))"; wrong=1; }
    done
done
[ $wrong = 0 ] && echo "✓ every file calls only its own floor and those below"
exit $wrong
