#!/usr/bin/env bash
# Breaks every call that can fail, one at a time, and looks at what is left: dev/faults.c makes the k-th allocation or file
# call of ./train fail, or kills it there, for every k of every command. Asked for each time: the command ends with one line
# that begins with "error:" and status 1, or, where the call was not needed, with its usual result; the older result is
# untouched or the new one complete; nothing half-written is left. After a fault of the files, which may keep the program from
# tidying up, the same command run again must do its work and leave nothing but its result.
#   dev/faults.sh              all of it: hours (JOBS=2: on two cores)
#   dev/faults.sh train merge  these commands alone
#   dev/faults.sh --sample N   N faults, spread over all commands and kinds; the test `faults` does this
#   dev/faults.sh --kills N    N times SIGKILL at a random time of a run that saves after every step, and of a merge
sample=0 kills=0
[ "$1" != --sample ] || { sample=$2; shift 2; }
[ "$1" != --kills ] || { kills=$2; shift 2; }
ulimit -c 0
export GOMP_SPINCOUNT=1000                              # or the program starts itself again, and with it the counting
train=$(realpath "${TRAIN:-./train}")
lib=$PWD/build/faults.so
here=${FAULTS_DIR:-$PWD/build/faults}
model=$here/model base=$PWD/base
commands=${*:-train saves pissa lora-ga full resume adapter merge eval generate tokenize list compare}
rm -rf "$here"; mkdir -p "$here"
make -s build/faults.so || exit 1

# A model of 5000 numbers, three rows, and what the commands begin with.
cat >"$here/tiny.json" <<END
{"model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
 "vocab_size": $(sed -n 's/.*"vocab_size":[^0-9]*\([0-9]*\).*/\1/p' base/config.json), "rms_norm_eps": 1e-05,
 "tie_word_embeddings": true}
END
for i in 1 2 3; do echo "{\"question\": \"$i apples?\", \"answer\": \"#### $i\"}"; done >"$here/rows.jsonl"
echo '{"text": "One day, a little girl"}' >"$here/texts.jsonl"
echo '{"add_bos_token": true, "added_tokens_decoder": {"3": {"content": "<pad>", "special": true}}}' >"$here/settings.json"
data="--model $model --data $here/rows.jsonl --val $here/rows.jsonl --batch 2 --max-new 2 --threads ${THREADS:-1} --rank 2"
rows="$data --steps 2"
prepare() {
    "$train" --init "$here/tiny.json" --method full --model "$base" --data "$here/rows.jsonl" --steps 1 --out "$model" &&
    rm "$model"/state.* && cp base/tokenizer.model "$model" && cp "$here/settings.json" "$model/tokenizer_config.json" &&
    echo hello >"$model/README.md" &&
    "$train" $rows --seed 7 --out "$here/before" &&
    "$train" $rows --method full --seed 7 --out "$here/before-full"
}
prepare >"$here/log" 2>&1 || { cat "$here/log"; exit 1; }

# The arguments of a command that leaves its result in $1/out; which older result lies there before; what else does.
arguments() {
    case $2 in
    train) echo "$rows --eval-every 1 --log $1/log --out $1/out" ;;
    saves) echo "$data --steps 3 --save-every 1 --out $1/out" ;;
    pissa|lora-ga) echo "$rows --method $2 --out $1/out" ;;
    full) echo "$rows --method full --out $1/out" ;;
    resume) echo "$rows --seed 7 --resume $1/out --log $1/log --out $1/out" ;;
    adapter) echo "$rows --adapter $here/before --out $1/out" ;;
    merge) echo "--model $model --adapter $here/before --merge $1/out" ;;
    eval) echo "--eval --exact-match --max-new 2 --model $model --adapter $here/before --val $here/rows.jsonl --threads 1" ;;
    generate) echo "--generate Once --chat --max-new 4 --temperature 1 --model $model --threads 1" ;;
    tokenize) echo "--tokenize $here/texts.jsonl --model $model" ;;
    list) echo "--list --model $model" ;;
    compare) echo "--compare --quick --threads 1 --steps 1 --model $model --data $here/rows.jsonl --rank 2 --out $1/out" ;;
    esac
}
older() {
    case $1 in
    train|saves|pissa|lora-ga|resume|adapter) echo "$here/before" ;;
    full) echo "$here/before-full" ;;
    compare) echo "$here/want.compare" ;;
    esac
}
begin() { # directory, command
    rm -rf "$1"; mkdir "$1"
    [ -z "$(older "$2")" ] || [ ! -d "$(older "$2")" ] || cp -r "$(older "$2")" "$1/out"
}
prints() { case $1 in eval|generate|tokenize|list) ;; *) false ;; esac; }
same() { { [ ! -e "$1" ] && [ ! -e "$2" ]; } || diff -rq "$1" "$2" >/dev/null 2>&1; }

# What is wrong after a fault, in words; nothing if all is right.
wrong() { # directory, command, kind, how, status
    local lines; lines=$(grep -c -E '^(error|libgomp): ' "$1/stderr")
    case $5 in
    0) [ "$lines" = 0 ] || echo "status 0 and an error"
       same "$1/out" "$here/want.$2" || [ "$2" = compare ] || echo "status 0 and another result"
       ! prints "$2" || cmp -s "$1/stdout" "$here/want.$2.stdout" || echo "status 0 and another output" ;;
    1) [ "$lines" = 1 ] || echo "$lines lines of error"
       [ "$3" = files ] || grep -q -i -E '^(error|libgomp): .*memory' "$1/stderr" || echo "a misleading line" ;;
    137) [ "$4" = kill ] || echo "killed" ;;
    *) echo "status $5" ;;
    esac
    [ "$2" = compare ] || same "$1/out" "$here/want.$2" || same "$1/out" "$(older "$2")" || goes_on "$1" "$2" ||
        echo "a result that is neither old nor new"
    [ "$3" = files ] || ! ls -d "$1"/out.* >/dev/null 2>&1 || echo "something half-written is left"
    [ "$3" != files ] || [ "$2" = compare ] || again "$1" "$2"
}
goes_on() { # directory, command: an earlier step that was saved, from which the run ends as it would have
    [ "$2" = saves ] && "$train" $(arguments "$1" "$2") --resume "$1/out" >"$1/again" 2>&1 && same "$1/out" "$here/want.$2"
}
again() { # directory, command: the same command, without a fault
    [ "$2" != merge ] || rm -rf "$1/out"
    [ "$2" != resume ] || { rm -rf "$1/out"; cp -r "$here/before" "$1/out"; }
    "$train" $(arguments "$1" "$2") >"$1/again" 2>&1 || { echo "the next run fails: $(grep error "$1/again")"; return; }
    same "$1/out" "$here/want.$2" || echo "the next run leaves another result"
    ! ls -d "$1"/out.* >/dev/null 2>&1 || echo "the next run leaves $(ls -d "$1"/out.*)"
}
fault() { # directory, command, kind, how, error number, k
    begin "$1" "$2"
    timeout 60 env FAULT="$3" FAULT_HOW="$4" FAULT_ERROR="$5" FAULT_AT="$6" LD_PRELOAD="$lib" PATH=/none \
        "$train" $(arguments "$1" "$2") >"$1/stdout" 2>"$1/stderr" </dev/null
    local status=$? said
    said=$(wrong "$1" "$2" "$3" "$4" $status | paste -sd ';')
    [ -z "$said" ] && echo "ok $status" ||
        echo "✗ $2, $3 call $6, $4${5:+ errno $5}, status $status: $said:" \
            "$(head -c 200 "$1/stderr" | head -n 2 | paste -sd '|')"
}

# Every k of one command, one kind and one way to fail; of a sample, `each` of them.
sweep() { # command, kind, how, error number
    local n k step=1 first=1 job out="$here/$1.$2.$3.$4"
    n=$(cat "$here/count.$1.$2")
    if [ "$sample" -gt 0 ] && [ "$n" -gt "$each" ]; then            # spread evenly, from a first one that differs
        step=$((n / each))
        first=$(((sweeps += 40503) % step + 1))
    fi
    for ((job = 0; job < ${JOBS:-1}; job++)); do
        for ((k = first + job * step; k <= n; k += step * ${JOBS:-1})); do
            fault "$here/run$job" "$1" "$2" "$3" "$4" $k
        done >"$out.$job" 2>/dev/null &
    done
    wait
    cat "$out".[0-9]* >"$out"; rm "$out".[0-9]*
    local bad tried; bad=$(grep -c ✗ "$out"); tried=$(wc -l <"$out")
    grep ✗ "$out" | head -n "${SHOW:-5}"
    echo "$([ "$bad" = 0 ] && echo ✓ || echo ✗) $1: $tried of $n calls ($2, $3${4:+ errno $4}):" \
        "$(grep -c 'ok 1$' "$out") with one line, $(grep -c 'ok 0$' "$out") not needed," \
        "$(grep -c 'ok 137' "$out") killed, $bad wrong"
    passed=$((passed + tried - bad)); failed=$((failed + bad))
}

# SIGKILL at a random time. A run that saves at every step must have left a save or the older result; resumed, or run again
# where it is the older one, it must end with the bytes of a run that nobody killed. A merge must be there wholly or not at all.
killed_run() { # directory, within so many ms
    local resume
    begin "$1" train
    killed_within "$2" $long --out "$1/out" >"$1/stdout" 2>&1
    if same "$1/out" "$here/before"; then older=$((older + 1)); resume=
    else resume="--resume $1/out"; fi
    [ -z "$resume" ] ||
        "$train" --eval --model "$model" --adapter "$1/out" --val "$here/rows.jsonl" --threads 1 >"$1/eval" 2>&1 ||
        { echo "what a kill left cannot be read: $(grep error "$1/eval")"; return; }
    "$train" $long $resume --out "$1/out" >"$1/stdout" 2>&1 || { echo "the next run fails: $(grep error "$1/stdout")"; return; }
    same "$1/out" "$here/unbroken" || echo "the next run ends with other bytes"
    ! ls -d "$1"/out.* >/dev/null 2>&1 || echo "the next run leaves $(ls -d "$1"/out.*)"
}
killed_merge() { # directory, within so many ms
    begin "$1" merge
    killed_within "$2" $(arguments "$1" merge) >"$1/stdout" 2>&1
    same "$1/out" "$here/merged" || { [ ! -e "$1/out" ] && older=$((older + 1)); } || echo "half of a merge"
    rm -rf "$1/out"
    "$train" $(arguments "$1" merge) >"$1/stdout" 2>&1 || { echo "the next merge fails: $(grep error "$1/stdout")"; return; }
    same "$1/out" "$here/merged" || echo "the next merge has other bytes"
    ! ls -d "$1"/out.* >/dev/null 2>&1 || echo "the next merge leaves $(ls -d "$1"/out.*)"
}
killed_within() { # ms, arguments: when this returns the process is gone, and with it its lock
    "$train" "${@:2}" &
    sleep "$(awk -v ms="$1" -v r=$RANDOM 'BEGIN { printf "%.4f", r / 32768 * ms / 1000 }')"
    kill -KILL $!
    wait $!
    [ $? != 137 ] || struck=$((struck + 1))
}
ms_of() { # a command: the least of five times
    local start i
    for i in 1 2 3 4 5; do
        start=$(date +%s%N)
        "$@" >/dev/null 2>&1
        echo $((($(date +%s%N) - start) / 1000000 + 1))
        rm -rf "$here/run0/out"
    done | sort -n | head -n 1
}
kill_all() {
    local what ms i bad said failed=0
    long="$data --steps 40 --save-every 1"
    mkdir -p "$here/run0"
    "$train" $long --out "$here/unbroken" >"$here/log" 2>&1 && "$train" $(arguments "$here/run0" merge) >"$here/log" 2>&1 ||
        { cat "$here/log"; exit 1; }
    mv "$here/run0/out" "$here/merged"
    for what in killed_merge killed_run; do
        struck=0 older=0 bad=0
        if [ $what = killed_run ]; then ms=$(ms_of "$train" $long --out "$here/run0/out")
        else ms=$(ms_of "$train" $(arguments "$here/run0" merge)); fi
        for ((i = 0; i < kills; i++)); do
            $what "$here/run0" "$ms" >"$here/said" 2>/dev/null
            [ ! -s "$here/said" ] || { bad=$((bad + 1)); echo "✗ $(cat "$here/said")"; }
        done
        echo "$([ $bad = 0 ] && echo ✓ || echo ✗) $what: $kills times within $ms ms, $struck killed," \
            "of which $older left the older result, $bad wrong"
        failed=$((failed + bad))
    done
    echo "$((2 * kills - failed)) passed, $failed failed, 0 skipped"
    exit $((failed > 0))
}
[ "$kills" = 0 ] || kill_all

for c in $commands; do                                  # without a fault: the result, and how many calls there are
    for kind in memory files; do
        begin "$here/run0" "$c"
        FAULT=$kind FAULT_COUNT=$here/count.$c.$kind LD_PRELOAD=$lib PATH=/none "$train" $(arguments "$here/run0" "$c") \
            >"$here/want.$c.stdout" 2>"$here/stderr" || { echo "✗ $c, without a fault: $(cat "$here/stderr")"; exit 1; }
        rm -rf "$here/want.$c"
        [ ! -e "$here/run0/out" ] || cp -r "$here/run0/out" "$here/want.$c"
    done
done
passed=0 failed=0 sweeps=0
ways=${WAYS:-"memory one:memory on:files one 5:files on 28:files kill"}
each=$(($(wc -w <<<"$commands") * $(tr ':' '\n' <<<"$ways" | wc -l)))     # sweeps; then faults a sweep
each=$(((sample + each - 1) / each))
for c in $commands; do
    while read -r kind how number; do sweep "$c" "$kind" "$how" "$number"; done < <(tr ':' '\n' <<<"$ways")
done
echo "$passed passed, $failed failed, 0 skipped"
[ "$failed" = 0 ]
