#  make            builds ./train (and says what this machine has)
#  make test       builds and runs every test this machine can run
#  make bench      how fast, how large, where the time goes: a row a method on two shapes with random weights
#  make base       makes again what base/ and data/ hold: text, tokenizer, pretraining (half an hour; Python in dev/ only)
#  make sanitize   the tests under AddressSanitizer and UBSan, then valgrind over the program
#  make fuzz       every parser under libFuzzer (clang)
#  make seam       proves with clang that model, adapters and loop never read device memory themselves

CC       ?= gcc
WARNINGS  = -Wall -Wextra -Wshadow
# No -ffast-math: a NaN must stay a NaN. errno and traps are not used by anyone here.
CFLAGS   ?= -O3 -march=native -g
FLAGS     = -std=gnu11 $(WARNINGS) $(CFLAGS) -fopenmp -fno-math-errno -fno-trapping-math
LDLIBS    = -lcjson -lm
SOURCES   = train.c tokenizer.c model.h adapters.h
PYTHON   ?= python3

all: found train

# What is needed, and what to install where it is missing.
found:
	@have() { printf '#include <%s>\n' $$1 | $(CC) -fopenmp -E -x c - >/dev/null 2>&1; }; missing=; \
	line() { if [ $$2 = 1 ]; then echo "✓ $$1"; else echo "✗ $$1"; missing="$$missing $$3"; fi; }; \
	line "compiler with OpenMP ($(CC))" $$(have omp.h && echo 1 || echo 0) gcc; \
	line "stb_ds.h"  $$(have stb/stb_ds.h && echo 1 || echo 0) libstb-dev; \
	line "cJSON.h"   $$(have cjson/cJSON.h && echo 1 || echo 0) libcjson-dev; \
	if [ -n "$$missing" ]; then echo "Install what is missing: sudo apt-get install -y$$missing"; exit 1; fi

train: $(SOURCES) Makefile
	$(CC) $(FLAGS) train.c tokenizer.c -o $@ $(LDLIBS)

build/test_f32 build/test_f64: test_all.c $(SOURCES) Makefile
	@mkdir -p build
	$(CC) $(FLAGS) -O2 $(if $(findstring f64,$@),-DDOUBLE) test_all.c tokenizer.c -o $@ $(LDLIBS)

# Each part prints its own count; the last line adds them up.
test: found train build/test_f32 build/test_f64
	@mkdir -p build; rm -f build/test.log; \
	for part in build/test_f64 build/test_f32 dev/mutants.sh; do \
	    echo "-- $$part"; ./$$part > build/part.log 2>&1; echo $$? > build/part.rc; cat build/part.log; \
	    if grep -qE '^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$$' build/part.log; then tail -n 1 build/part.log; else echo "0 passed, 1 failed, 0 skipped"; fi >> build/test.log; \
	done; \
	awk '{p += $$1; f += $$3; s += $$5} END {print p " passed, " f " failed, " s " skipped"; exit f > 0}' build/test.log

sanitize: found
	@mkdir -p build
	$(CC) $(FLAGS) -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -DDOUBLE test_all.c tokenizer.c -o build/asan_f64 $(LDLIBS)
	$(CC) $(FLAGS) -O1 -fsanitize=address,undefined -fno-sanitize-recover=all test_all.c tokenizer.c -o build/asan_f32 $(LDLIBS)
	$(CC) $(FLAGS) -O1 -fsanitize=address,undefined -fno-sanitize-recover=all train.c tokenizer.c -o build/asan_train $(LDLIBS)
	$(CC) $(FLAGS) -O1 -march=x86-64-v3 train.c tokenizer.c -o build/valgrind_train $(LDLIBS)
	TRAIN=build/asan_train ASAN_OPTIONS=detect_leaks=0 build/asan_f64
	TRAIN=build/asan_train ASAN_OPTIONS=detect_leaks=0 build/asan_f32
	TRAIN="valgrind -q --error-exitcode=99 build/valgrind_train" build/test_f32 valgrind

# Every parser under libFuzzer, SECONDS each, from real files as seeds.
SECONDS_EACH = $(or $(SECONDS),60)
fuzz:
	@mkdir -p build; i=0; for seed in dev/golden/base-gqa/model.safetensors base/config.json data/val.jsonl dev/golden/bat/adapter_config.json base/tokenizer.model dev/golden/base-bf16/model.safetensors.index.json; do \
	    clang -std=gnu11 -O1 -g -w -fopenmp -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -DTARGET=$$i dev/fuzz.c tokenizer.c -o build/fuzz $(LDLIBS) && \
	    rm -rf build/corpus && mkdir build/corpus && cp $$seed build/corpus/ && \
	    echo "-- $$seed" && ASAN_OPTIONS=detect_leaks=0 build/fuzz -max_total_time=$(SECONDS_EACH) -max_len=65536 -rss_limit_mb=4096 build/corpus 2>&1 | tail -n 3 || exit 1; \
	    i=$$((i + 1)); \
	done

seam:
	clang -std=gnu11 -fsyntax-only -fopenmp -DCUDA -DSEAM -Werror=noderef train.c

# The program without ops, and the ops beside it: the linker leads every call through the stopwatch of dev/bench.c.
TIMED = $(shell sed -n 's/^TIMED.\([a-z_]*\).*/-Wl,--wrap=\1/p' dev/bench.c)
build/bench: dev/bench.c $(SOURCES) Makefile
	@mkdir -p build
	$(CC) $(FLAGS) -Dmain=train_main -c train.c -o build/bench_ops.o
	$(CC) $(FLAGS) dev/bench.c build/bench_ops.o tokenizer.c -o $@ -Wl,--allow-multiple-definition $(TIMED) $(LDLIBS)

build/random_model: dev/random_model.c $(SOURCES) Makefile
	@mkdir -p build
	$(CC) $(FLAGS) dev/random_model.c tokenizer.c -o $@ $(LDLIBS)

build/15m build/110m: build/random_model
	[ -d $@ ] || build/random_model $(notdir $@) $@

bench: build/bench build/15m build/110m
	build/bench

base: train
	dev/make_base.sh

clean:
	rm -rf train build

.PHONY: all found test bench sanitize fuzz seam base clean
