#  make            builds ./train, ./train_cuda where nvcc is (train_cuda_f32 and train_cuda_f64 compute in more digits), and
#                  ./train_mpi and ./train_cuda_mpi for several processes where MPI and NCCL are (doc/ranks.md)
#  make train_emu  builds ./train_emu: the GPU's source on the CPU, for --check and gdb (train_emu_f64 computes in double)
#  make check      the quick ones of them: floors, gradients, goldens
#  make test       builds and runs every test this machine can run
#  make mutants    breaks the code in some 450 places, one at a time, and asks that a test turns red (an hour, measured
#                  on two busy cores); make test tries 20
#  make faults     makes every allocation and file call of ./train fail, one at a time (doc/reliability.md; hours)
#  make bench      how fast, how large, where the time goes: a row a method on two shapes with random weights
#  make base       makes again what base/ and data/ hold: text, tokenizer, pretraining (half an hour; Python in dev/ only)
#  make bench-gpu  the same on a GPU, with Llama2-7B's shape; PEER=1 runs transformers + PEFT beside it
#  make sanitize   the tests, those of the emulated GPU too, under AddressSanitizer and UBSan, then valgrind over the program
#  make fuzz       every reader of files and options under libFuzzer (clang)
#  make seam       proves with clang that model, adapters and loop never read device memory themselves

CC       ?= gcc
WARNINGS  = -Wall -Wextra -Wshadow
# No -ffast-math: a NaN must stay a NaN. errno and traps are not used by anyone here.
CFLAGS   ?= -O3 -march=native -g
# The product's loop (ops/gemm.h) is 114 bytes long. Where it begins a line of 64 bytes, the processor fetches two lines a
# turn and not three, and products are a tenth faster. GCC takes it for a short loop, and would not align it.
ALIGNED   = -falign-loops=64 --param align-loop-iterations=1
FLAGS     = -std=gnu11 $(WARNINGS) $(CFLAGS) $(ALIGNED) -fopenmp -fno-math-errno -fno-trapping-math
LDLIBS    = -ljansson -lz -lpcre2-8 -lutf8proc -lm
HEADERS   = model.h llama.h rwkv6.h backbones.h adapters.h $(wildcard ops/*.h lib/*.h run/*.h paper/*.h)
PYTHON   ?= python3

# The GPU's ops are compiled by nvcc where it is, and as C++ for the CPU in any case (dev/cuda_on_cpu.h).
NVCC     := $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))
CUBLAS    = -lcublas -lcublasLt
GPU      := $(if $(NVCC),$(shell nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1))
ARCH      = -gencode arch=compute_80,code=[sm_80,compute_80] -gencode arch=compute_90a,code=sm_90a \
            -gencode arch=compute_120,code=[sm_120,compute_120]
NVFLAGS   = -std=c++17 -O3 -t 2 $(ARCH) -Xcompiler -Wall,-Wextra
EMUFLAGS  = -std=c++17 -O2 -g -Wall -Wextra -fopenmp -x c++
# What a program computes in. bf16 is what a GPU stores; the CPU has it in products alone (--bf16).
REAL_f32  =
REAL_bf16 = -DBFLOAT16
REAL_f64  = -DDOUBLE

# Several processes: Open MPI, and between GPUs NCCL.
MPICC    := $(shell command -v mpicc 2>/dev/null)
MPILIBS  := $(if $(MPICC),$(addprefix -L,$(shell $(MPICC) --showme:libdirs 2>/dev/null)) -lmpi)
NCCL     := $(if $(and $(NVCC),$(MPICC)),$(wildcard /usr/include/nccl.h $(dir $(NVCC))../include/nccl.h))

all: found train $(if $(MPICC),train_mpi) $(if $(NVCC),train_cuda) $(if $(NCCL),train_cuda_mpi)

# What is needed, and what to install where it is missing.
found:
	@have() { printf '#define PCRE2_CODE_UNIT_WIDTH 8\n#include <%s>\n' $$1 | \
	    $(CC) -fopenmp -E -x c - >/dev/null 2>&1; }; missing=; \
	line() { if [ $$2 = 1 ]; then echo "✓ $$1"; else echo "✗ $$1"; missing="$$missing $$3"; fi; }; \
	line "compiler with OpenMP ($(CC))" $$(have omp.h && echo 1 || echo 0) gcc; \
	line "stb_ds.h"  $$(have stb/stb_ds.h && echo 1 || echo 0) libstb-dev; \
	line "jansson.h" $$(have jansson.h && echo 1 || echo 0) libjansson-dev; \
	line "zlib.h"    $$(have zlib.h && echo 1 || echo 0) zlib1g-dev; \
	line "pcre2.h"   $$(have pcre2.h && echo 1 || echo 0) libpcre2-dev; \
	line "utf8proc.h" $$(have utf8proc.h && echo 1 || echo 0) libutf8proc-dev; \
	command -v $(CXX) >/dev/null && echo "✓ C++ compiler ($(CXX))" \
	    || echo "- no C++ compiler: train_emu and make test need one (g++)"; \
	echo "$(if $(NVCC),✓,-) nvcc $(if $(NVCC),(train_cuda),not here: no train_cuda)"; \
	echo "$(if $(MPICC),✓,-) MPI $(if $(MPICC),(train_mpi),not here: no train_mpi (openmpi-bin libopenmpi-dev))"; \
	echo "$(if $(NCCL),✓,-) NCCL $(if $(NCCL),(train_cuda_mpi),beside nvcc and MPI not here: no train_cuda_mpi)"; \
	echo "$(if $(GPU),✓ $(GPU),- no GPU: make train_emu runs train.cu on the CPU)"; \
	if [ -n "$$missing" ]; then echo "Install what is missing: sudo apt-get install -y$$missing"; exit 1; fi

build/train_%.o: train.c $(HEADERS) Makefile
	@mkdir -p build
	$(CC) $(FLAGS) $(REAL_$*) -c train.c -o $@

build/cpu_%.o: ops/cpu.c $(wildcard ops/*.h) Makefile
	@mkdir -p build
	$(CC) $(FLAGS) $(REAL_$*) -c ops/cpu.c -o $@

build/tokenizer.o: tokenizer.c lib/words.h ops/utf8.h Makefile
	@mkdir -p build
	$(CC) $(FLAGS) -c tokenizer.c -o $@

build/ranks_mpi.o: run/ranks_mpi.c run/ranks.h ops/ops.h ops/mat.h ops/host.h Makefile
	@mkdir -p build
	OMPI_CC="$(CC)" $(MPICC) $(FLAGS) -c run/ranks_mpi.c -o $@

build/ranks_nccl.o: run/ranks_nccl.c run/ranks.h ops/ops.h ops/mat.h ops/host.h Makefile
	@mkdir -p build
	$(CC) $(FLAGS) -I$(dir $(NVCC))../include -c run/ranks_nccl.c -o $@

build/cuda_%.o: train.cu ops/ops.h ops/tensor_core.cuh Makefile
	@mkdir -p build
	$(NVCC) $(NVFLAGS) $(REAL_$*) -c train.cu -o $@

build/emu_%.o: train.cu ops/ops.h ops/tensor_core.cuh dev/cuda_on_cpu.h Makefile
	@mkdir -p build
	$(CXX) $(EMUFLAGS) $(REAL_$*) -c train.cu -o $@

train: build/train_f32.o build/cpu_f32.o build/tokenizer.o
	$(CC) -fopenmp $^ -o $@ $(LDLIBS)

train_mpi: build/train_f32.o build/cpu_f32.o build/tokenizer.o build/ranks_mpi.o
	$(CC) -fopenmp $^ -o $@ $(MPILIBS) $(LDLIBS)

# What --check compares a GPU with: train.c on the CPU in double, of which a program that runs on the GPU sees one function.
build/reference.o: build/train_f64.o build/cpu_f64.o
	$(LD) -r $^ -o $@
	objcopy --redefine-sym step_tensors=reference_step $@
	objcopy --keep-global-symbol=reference_step $@

train_cuda: build/train_bf16.o build/cuda_bf16.o build/reference.o build/tokenizer.o
	$(NVCC) $^ -o $@ $(CUBLAS) -lgomp $(LDLIBS)

train_cuda_mpi: build/train_bf16.o build/cuda_bf16.o build/reference.o build/tokenizer.o build/ranks_mpi.o build/ranks_nccl.o
	$(NVCC) $^ -o $@ $(CUBLAS) -lnccl -lgomp $(MPILIBS) $(LDLIBS)

train_cuda_f32 train_cuda_f64: train_cuda_%: build/train_%.o build/cuda_%.o build/reference.o build/tokenizer.o
	$(NVCC) $^ -o $@ $(CUBLAS) -lgomp $(LDLIBS)

train_emu: build/train_f32.o build/emu_f32.o build/reference.o build/tokenizer.o
	$(CXX) -fopenmp $^ -o $@ $(LDLIBS)

train_emu_mpi: build/train_f32.o build/emu_f32.o build/reference.o build/tokenizer.o build/ranks_mpi.o
	$(CXX) -fopenmp $^ -o $@ $(MPILIBS) $(LDLIBS)

train_emu_f64: build/train_f64.o build/emu_f64.o build/reference.o build/tokenizer.o
	$(CXX) -fopenmp $^ -o $@ $(LDLIBS)

build/test_f32 build/test_f64: build/test_%: test_all.c train.c dev/halves.h ops/cpu.c $(HEADERS) build/tokenizer.o Makefile
	$(CC) $(FLAGS) -O2 $(REAL_$*) test_all.c build/tokenizer.o -o $@ $(LDLIBS)

ASAN = -fsanitize=address,undefined -fno-sanitize-recover=all
build/test_asan: test_all.c train.c dev/halves.h ops/cpu.c tokenizer.c $(HEADERS) Makefile
	@mkdir -p build
	$(CC) $(FLAGS) -O1 $(ASAN) -DDOUBLE test_all.c tokenizer.c -o $@ $(LDLIBS)

# The tests' two halves: the CPU's computes in double, whatever the GPU's does, and keeps everything but main to itself.
build/cpu_half.o: test_all.c train.c dev/halves.h ops/cpu.c $(HEADERS) Makefile
	@mkdir -p build
	$(CC) $(FLAGS) -O2 -DDOUBLE -c test_all.c -o $@
	objcopy --keep-global-symbol=main $@

build/gpu_half_%.o: dev/gpu_half.c train.c dev/halves.h $(HEADERS) Makefile
	@mkdir -p build
	$(CC) $(FLAGS) -O2 -Wno-unused-function $(REAL_$*) -c dev/gpu_half.c -o $@

build/test_emu_%: build/cpu_half.o build/gpu_half_%.o build/emu_%.o build/tokenizer.o
	$(CXX) -fopenmp $^ -o $@ $(LDLIBS)

build/test_cuda_%: build/cpu_half.o build/gpu_half_%.o build/cuda_%.o build/tokenizer.o
	$(NVCC) $^ -o $@ $(CUBLAS) -lgomp $(LDLIBS)

build/test_cuda_on_cpu: dev/test_cuda_on_cpu.cpp dev/cuda_on_cpu.h Makefile
	$(CXX) -std=c++17 -O2 -g -Wall -Wextra -fopenmp $< -o $@

build/bench_gpu: dev/bench_gpu.c dev/stopwatch.h build/cuda_bf16.o build/tokenizer.o train.c $(HEADERS) Makefile
	$(CC) $(FLAGS) -Wno-unused-function -DBFLOAT16 -c dev/bench_gpu.c -o build/bench_gpu.o
	$(NVCC) build/bench_gpu.o build/cuda_bf16.o build/tokenizer.o -o $@ $(CUBLAS) -lgomp $(TIMED:-Wl,%=-Xlinker %) $(LDLIBS)

build/bench_emu: dev/bench_gpu.c dev/stopwatch.h build/emu_bf16.o build/tokenizer.o train.c $(HEADERS) Makefile
	$(CC) $(FLAGS) -Wno-unused-function -DBFLOAT16 -c dev/bench_gpu.c -o build/bench_emu.o
	$(CXX) -fopenmp build/bench_emu.o build/emu_bf16.o build/tokenizer.o -o $@ $(TIMED) $(LDLIBS)

bench-gpu: build/bench_gpu
	build/bench_gpu $(if $(PEER),--peer)

# dev/run_tests.sh runs the parts; its last line adds up what they passed. Without a GPU its five tests a precision are skipped.
PRECISIONS = f64 f32 bf16
TESTS = build/test_f64 build/test_f32 build/test_asan build/corpus build/test_cuda_on_cpu $(PRECISIONS:%=build/test_emu_%) \
        $(if $(GPU),$(PRECISIONS:%=build/test_cuda_%))
test: all benches train_emu $(TESTS)
	GPU="$(GPU)" dev/run_tests.sh dev/lines.sh dev/vectors.sh $(TESTS) dev/mutants.sh

build/asan_emu_%: build/cpu_half.o build/tokenizer.o dev/gpu_half.c dev/halves.h train.cu ops/*.h ops/*.cuh \
                  dev/cuda_on_cpu.h Makefile
	$(CC) $(FLAGS) -O1 $(ASAN) -Wno-unused-function $(REAL_$*) -c dev/gpu_half.c -o $@.gpu_half.o
	$(CXX) $(EMUFLAGS) -O1 $(ASAN) $(REAL_$*) -c train.cu -o $@.emu.o
	$(CXX) $(ASAN) -fopenmp build/cpu_half.o $@.gpu_half.o $@.emu.o build/tokenizer.o -o $@ $(LDLIBS)

VALGRIND = OMP_WAIT_POLICY=passive valgrind -q --error-exitcode=99 build/valgrind_train
sanitize: found build/test_asan
	@mkdir -p build
	$(CC) $(FLAGS) -O1 $(ASAN) test_all.c tokenizer.c -o build/asan_f32 $(LDLIBS)
	$(CC) $(FLAGS) -O1 $(ASAN) train.c ops/cpu.c tokenizer.c -o build/asan_train $(LDLIBS)
	$(CC) $(FLAGS) -O1 -march=x86-64-v3 train.c ops/cpu.c tokenizer.c -o build/valgrind_train $(LDLIBS)
	for p in $(PRECISIONS); do $(MAKE) -s build/asan_emu_$$p && ASAN_OPTIONS=detect_leaks=0 build/asan_emu_$$p || exit 1; done
	$(CXX) -std=c++17 -O1 -g $(ASAN) -fopenmp dev/test_cuda_on_cpu.cpp -o build/asan_cuda_on_cpu && \
	    ASAN_OPTIONS=detect_leaks=0 build/asan_cuda_on_cpu
	TRAIN=build/asan_train ASAN_OPTIONS=detect_leaks=0 build/test_asan
	TRAIN=build/asan_train ASAN_OPTIONS=detect_leaks=0 build/asan_f32
	head -n 2 data/train.jsonl >build/two.jsonl
	for M in bone bat-row full pissa; do rm -rf build/vg; \
	    $(VALGRIND) --data build/two.jsonl --val build/two.jsonl --steps 1 --batch 2 --max-new 2 --method $$M \
	        --out build/vg || exit 1; done
	rm -rf build/vg-merged; $(VALGRIND) --merge build/vg-merged --adapter build/vg
	$(VALGRIND) --generate "Once upon a time" --max-new 3 --temperature 1 --model build/vg-merged
	$(VALGRIND) --eval --exact-match --max-new 2 --val build/two.jsonl --adapter build/vg

# Every reader of dev/fuzz.c under libFuzzer, SECONDS each, from its inputs in dev/corpus; its words are the texts of the
# source. Not array-bounds: stb_ds ends a struct in char[8] and means more. Not trace-cmp: it takes half of the time.
SECONDS_EACH = $(or $(SECONDS),60)
READERS = $(or $(READER),$(notdir $(wildcard dev/corpus/*)))
FUZZ_SOURCES = dev/fuzz.c dev/fuzz_mutate.h train.c tokenizer.c ops/cpu.c $(HEADERS) Makefile
build/fuzz: $(FUZZ_SOURCES)
	@mkdir -p build
	grep -hoE '"[A-Za-z_0-9./-]{2,40}"' lib/*.h run/*.h ops/*.h adapters.h tokenizer.c | sort -u >build/fuzz.dict
	clang -std=gnu11 -O2 -g -w -fopenmp -fsanitize=fuzzer,address,undefined -fno-sanitize=array-bounds \
	    -fno-sanitize-recover=all -fno-sanitize-coverage=trace-cmp -DFUZZER dev/fuzz.c ops/cpu.c tokenizer.c -o $@ $(LDLIBS)

fuzz: build/fuzz
	@for reader in $(READERS); do \
	    echo "-- $$reader"; mkdir -p build/corpus-$$reader; \
	    longest=$$(cat $$(ls -S dev/corpus/$$reader/* | head -n 1) | wc -c); \
	    READER=$$reader OMP_NUM_THREADS=1 build/fuzz -max_total_time=$(SECONDS_EACH) -max_len=$$((longest * 5 / 4)) \
	        -timeout=20 -rss_limit_mb=4096 -close_fd_mask=2 -dict=build/fuzz.dict -print_final_stats=1 \
	        -artifact_prefix=build/$$reader- build/corpus-$$reader dev/corpus/$$reader >build/fuzz.log 2>&1 \
	        || { tail -n 40 build/fuzz.log; exit 1; }; \
	    grep '^#.*DONE' build/fuzz.log; \
	done

# Every input of dev/corpus once, as a part of make test, and what dev/differential.py asks.
build/corpus: $(FUZZ_SOURCES)
	@mkdir -p build
	$(CC) $(FLAGS) -O1 $(ASAN) -fno-sanitize=bounds dev/fuzz.c ops/cpu.c tokenizer.c -o $@ $(LDLIBS)

# That the benchmarks compile, which make test does not run, and where clang is the fuzzer.
benches:
	$(if $(shell command -v clang),clang -std=gnu11 -fsyntax-only -w -fopenmp -DFUZZER dev/fuzz.c)
	$(CC) $(FLAGS) -fsyntax-only dev/bench.c
	$(CC) $(FLAGS) -fsyntax-only -Wno-unused-function -DBFLOAT16 dev/bench_gpu.c

seam:
	clang -std=gnu11 -fsyntax-only -fopenmp -DSEAM -Werror=noderef train.c

# The linker leads every call of an op through the stopwatch of dev/stopwatch.h.
TIMED = $(shell sed -n 's/^TIMED.\([a-z_0-9]*\).*/-Wl,--wrap=\1/p' dev/stopwatch.h)
build/bench: dev/bench.c dev/stopwatch.h train.c $(HEADERS) build/cpu_f32.o build/tokenizer.o Makefile
	$(CC) $(FLAGS) dev/bench.c build/cpu_f32.o build/tokenizer.o -o $@ $(TIMED) $(LDLIBS)

# Preloaded by dev/faults.sh: it makes one call of the C library fail.
build/faults.so: dev/faults.c Makefile
	@mkdir -p build
	$(CC) -std=gnu11 $(WARNINGS) -O2 -fPIC -shared $< -o $@ -ldl

build/random_model: dev/random_model.c train.c $(HEADERS) build/cpu_f32.o build/tokenizer.o Makefile
	$(CC) $(FLAGS) dev/random_model.c build/cpu_f32.o build/tokenizer.o -o $@ $(LDLIBS)

build/15m build/110m: build/random_model
	[ -d $@ ] || build/random_model $(notdir $@) $@

bench: build/bench build/15m build/110m
	build/bench

# In under a minute: it compiles, floors are kept, gradients are right in double, and logits, loss, gradients and steps
# are PEFT's.
check: train build/test_f64
	dev/floors.sh
	build/test_f64 gradients
	build/test_f64 goldens

floors:
	dev/floors.sh

mutants:
	dev/mutants.sh

faults: train
	dev/faults.sh

base: train
	dev/make_base.sh

# Object files are kept: dev/mutants.sh links them again.
.SECONDARY:

clean:
	rm -rf train train_mpi train_cuda train_cuda_f32 train_cuda_f64 train_cuda_mpi train_emu train_emu_f64 train_emu_mpi build

.PHONY: all found benches check test mutants faults floors bench bench-gpu sanitize fuzz seam base clean
