# megalodon.c: `make` builds the programs, `make help` lists what else there is.

CC ?= cc
PROGRAMS = train sample compare

# CFLAGS, CPPFLAGS, LDFLAGS, LDLIBS, CXXFLAGS and NVCCFLAGS, from the command line or the environment, are added to what
# the build needs itself and stand after it, so that they win. Nothing here may assign to them: a variable of the command
# line overrides every assignment in this file.
ALL_CFLAGS = $(BASE_CFLAGS) $(CPPFLAGS) $(CFLAGS)
ALL_LIBS = $(BASE_LIBS) $(LDLIBS)

# gnu11: C11 with POSIX. NaN must stay NaN, so no -ffast-math: only what changes neither NaN nor infinity.
BASE_CFLAGS = -std=gnu11 -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math -fopenmp-simd
# pass-failed: clang's warning for every loop that it does not vectorise.
BASE_CFLAGS += -Wall -Wextra -Wshadow -Wno-pass-failed
ifdef WERROR
BASE_CFLAGS += -Werror
endif
ifdef SANITIZE
SANITIZER = -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
BASE_CFLAGS += $(SANITIZER)
endif

comma := ,
# $(call quote,TEXT): TEXT as one word of the shell.
quote = '$(subst ','\'',$(1))'
# $(call probe,HEADER,FUNCTION,FLAGS): FLAGS, if a program that refers to FUNCTION compiles and links with them and with
# the flags from outside; otherwise nothing.
probe = $(shell mkdir -p build; printf '\043include <$(1)>\nint main(void) { void (*volatile f)(void) = (void (*)(void))$(2); return !f; }\n' | \
        $(CC) $(3) $(CPPFLAGS) $(CFLAGS) -w $(LDFLAGS) -x c - -x none $(filter $(link_only),$(3)) $(LDLIBS) -o build/probe 2>/dev/null && echo $(call quote,$(3)))
# Flags that only the linker gets.
link_only = -L% -l% -Wl$(comma)%
# Where Homebrew keeps libraries that macOS has under another name or not at all.
BREW := $(wildcard /opt/homebrew/opt /usr/local/opt)

# For this machine's instructions only, unless PORTABLE=1 or CFLAGS names a processor. Some compilers know only -mcpu.
NATIVE :=
TARGET := $(filter -march=% -mcpu=%,$(CFLAGS))
ifeq ($(PORTABLE)$(TARGET),)
NATIVE := $(or $(call probe,stdio.h,puts,-march=native),$(call probe,stdio.h,puts,-mcpu=native))
endif

# OpenMP: loops run on all cores. NO_OMP=1 does without. Apple's compiler needs Homebrew's libomp.
OMP :=
ifndef NO_OMP
OMP := $(or $(call probe,omp.h,omp_get_max_threads,-fopenmp),$(if $(wildcard $(BREW:=/libomp)),$(call probe,omp.h,omp_get_max_threads,$(strip \
       -Xclang -fopenmp $(addprefix -I,$(wildcard $(BREW:=/libomp/include))) $(addprefix -L,$(wildcard $(BREW:=/libomp/lib))) -lomp))))
endif

# CBLAS: matrix products by OpenBLAS, faster than our own. It works in one thread: ours share each product among
# them. NO_BLAS=1 does without; BLAS="-I... -l..." names another library.
ifdef NO_BLAS
override BLAS :=
else
BLAS := $(or $(BLAS),$(call probe,cblas.h,cblas_dgemm,-lopenblas),$(call probe,cblas.h,cblas_dgemm,$(strip \
        $(addprefix -I,$(wildcard /usr/include/openblas $(BREW:=/openblas/include))) $(addprefix -L,$(wildcard $(BREW:=/openblas/lib))) -lopenblas)))
endif

# MPI: ./train as many processes (mpirun). mpicc says how its programs are compiled. NO_MPI=1 does without.
MPI :=
ifndef NO_MPI
MPI := $(filter -I% $(link_only),$(shell mpicc -show 2>/dev/null))
MPI := $(if $(MPI),$(call probe,mpi.h,MPI_Init,$(MPI)))
endif

BASE_CFLAGS += $(NATIVE) $(or $(filter-out $(link_only),$(OMP)),-Wno-unknown-pragmas)
BASE_CFLAGS += $(if $(BLAS),-DMEGALODON_BLAS $(filter -I%,$(BLAS)))
BASE_LIBS = $(filter $(link_only),$(OMP)) $(filter-out -I%,$(BLAS)) -lm

# The last line of a build: what is in it, and which flags came from outside.
GIVEN = $(strip $(foreach v,CPPFLAGS CFLAGS LDFLAGS LDLIBS,$(if $($v),$v="$($v)")))
BUILT = $(CC), $(if $(OMP),OpenMP,no OpenMP), $(if $(BLAS),BLAS $(filter-out -I% -L%,$(BLAS)),own matrix product), $(if \
        $(MPI),MPI for train$(comma) )$(if $(SANITIZER),sanitizers$(comma) )$(if $(NATIVE),for this machine,$(or $(TARGET),portable))$(if \
        $(GIVEN),$(comma) $(GIVEN)). Next: ./train, or make help

all: $(PROGRAMS)
	@echo $(call quote,built $(PROGRAMS): $(BUILT))

help:
	@echo 'make             ./train, ./sample, ./compare'
	@echo 'make cuda        the same programs for a GPU: train_cuda, sample_cuda (bfloat16), *_cuda_fp32 (float32);'
	@echo '                 PLAIN=1: without the fast kernels of kernels/'
	@echo 'make diff        one batch on CPU and GPU, and every tensor side by side'
	@echo 'make test-cuda   all checks of the CUDA version, and its speed; make bench-cuda: where the time goes'
	@echo 'make test-emulated   its kernels on the CPU, where there is no GPU (needs a C++ compiler)'
	@echo 'make shared-memory   shared memory of the GPU kernels, and the devices that it fits (needs a C++ compiler)'
	@echo 'make demo        trains a small model for a minute, then lets it write'
	@echo 'make web         a page in which a model writes: build/web (clang, lld, wasi-libc)'
	@echo 'make test        checks layers, gradients, files and programs; ends with "N passed, N failed"'
	@echo 'make test-mutants  checks these checks'
	@echo 'make test-cross  builds for macOS and 64-bit ARM, and tests the latter in an emulator (Zig, QEMU)'
	@echo 'make lint        compilers and checkers on plumbing/ (clang-tidy, cppcheck)'
	@echo 'make fuzz        FUZZ_SECONDS=60 each: looks for files that crash a reader (clang)'
	@echo 'make bench       where the time of a step goes; ARGS="--help" for more'
	@echo 'make clean       removes what was built'
	@echo 'Switches, for all of them: NO_OMP=1  NO_BLAS=1  NO_MPI=1  PORTABLE=1 (no -march=native)  WERROR=1'
	@echo '    SANITIZE=1 (AddressSanitizer and UBSan)  CC=clang  BLAS="-l..." (another CBLAS than OpenBLAS)'
	@echo 'CFLAGS, CPPFLAGS, LDFLAGS, LDLIBS, CXXFLAGS, NVCCFLAGS are added after the flags of the build'

# ---------------------------------------------------------------- objects, in build/ and build/double/

# Everything depends on the flags, so that another switch builds it all again.
FLAGS := $(strip $(CC) $(ALL_CFLAGS) $(LDFLAGS) $(ALL_LIBS) $(MPI))
ifneq ($(FLAGS),$(shell cat build/flags 2>/dev/null))
$(shell mkdir -p build/double; printf '%s\n' $(call quote,$(FLAGS)) > build/flags)
endif
LINK = $(CC) $(ALL_CFLAGS) $(LDFLAGS) $(filter %.o,$^) $(filter %.a,$^) $(ALL_LIBS) -o $@

# All but the programs' own files goes into a library, of which the linker takes what a program lacks.
vpath %.c . plumbing tests
LIBRARY = megalodon.o $(filter-out compare.o,$(notdir $(patsubst %.c,%.o,$(wildcard plumbing/*.c))))

build/%.o: %.c build/flags
	$(CC) $(ALL_CFLAGS) -MMD -MP -c $< -o $@

build/double/%.o: %.c build/flags
	$(CC) $(ALL_CFLAGS) -DMEGALODON_DOUBLE -MMD -MP -c $< -o $@

build/library.a: $(addprefix build/,$(LIBRARY))
build/double/library.a: $(addprefix build/double/,$(LIBRARY))
build/library.a build/double/library.a:
	@rm -f $@
	@$(AR) rcs $@ $^

# The library has the one-process stand-in of plumbing/ranks.c; only ./train gets the one with MPI, which comes first.
ifneq ($(MPI),)
build/ranks_mpi.o build/double/ranks_mpi.o: plumbing/ranks.c build/flags
	$(CC) $(ALL_CFLAGS) $(filter -I%,$(MPI)) -DMEGALODON_MPI $(if $(findstring double,$@),-DMEGALODON_DOUBLE) -MMD -MP -c $< -o $@
build/ranks_peers.o: plumbing/ranks.c build/flags
	$(CC) $(ALL_CFLAGS) $(filter -I%,$(MPI)) -DMEGALODON_MPI -DMEGALODON_PEERS -MMD -MP -c $< -o $@
train: build/ranks_mpi.o
build/double/train: build/double/ranks_mpi.o
train build/double/train: BASE_LIBS += $(filter-out -I%,$(MPI))
endif

$(PROGRAMS): %: build/%.o build/library.a
	$(LINK)

# The double build of a program, of train for instance, whose --dump is then the better reference.
build/double/train build/double/sample: %: %.o build/double/library.a
	$(LINK)

-include $(wildcard build/*.d build/double/*.d)
.PRECIOUS: build/%.o build/double/%.o build/gpu/%.o build/gpu/%_fp32.o build/emulated/%.cu build/emulated/tests/%.cu build/emulated/plumbing/%.cu build/emulated/%.cuh

# ---------------------------------------------------------------- CUDA

CUDA_PROGRAMS = train_cuda sample_cuda train_cuda_fp32 sample_cuda_fp32
# Only where one of these is to be made, nvcc is run and asked.
CUDA_GOALS := $(filter cuda test-cuda bench-cuda diff $(CUDA_PROGRAMS) build/gpu/%,$(MAKECMDGOALS))
# The GPU of this machine, or CUARCH="75 80 90": code for each, and PTX of the last for later ones. bfloat16 needs 80. For
# compute capability 9.0 the code is that of sm_90a, which has wgmma and TMA.
CUARCH ?= native

ifneq ($(CUDA_GOALS),)
# nvcc on the PATH, at its usual place, or NVCC=.... Its headers and libraries are where it says they are.
NVCC ?= $(or $(shell command -v nvcc 2>/dev/null),$(wildcard /usr/local/cuda/bin/nvcc))
CUDA_ROOT := $(if $(NVCC),$(abspath $(shell $(NVCC) --dryrun -x cu /dev/null 2>&1 | sed -n 's/^.. TOP=//p')))
ifeq ($(CUARCH),native)
# What nvcc would compile for. Where it finds no GPU, as on a login node, it warns and takes an old architecture.
GPUS := $(if $(CUDA_ROOT),$(shell $(NVCC) --dryrun -arch=native -x cu /dev/null 2>&1 | \
        sed -n -e 's/.*Cannot find valid GPU.*/none/p' -e 's/.* -arch compute_\([0-9]*\).*/\1/p'),native)
ifneq ($(filter none 5% 6% 70 72,$(or $(GPUS),none)),)
override CUARCH := 75 80 90
$(info nvcc finds no GPU of compute capability 7.5 or more on this machine: building for CUARCH="$(CUARCH)")
else ifneq ($(filter 75 90,$(GPUS)),)
override CUARCH := $(GPUS)
endif
endif
ifeq ($(CUARCH),75)
CUDA_PROGRAMS = train_cuda_fp32 sample_cuda_fp32
endif
endif
CUDA_LIBS = $(foreach d,lib64 lib,-L$(CUDA_ROOT)/$d -Xlinker -rpath,$(CUDA_ROOT)/$d) -lcublas -lcublasLt $(if $(OMP),-Xcompiler $(OMP))
# $(call code_for,ARCHITECTURES)
code_for = $(if $(filter native,$(1)),-arch=native,$(foreach a,$(patsubst 90,90a,$(1)),-gencode \
            arch=compute_$a,code=sm_$a) -gencode arch=compute_$(lastword $(1)),code=compute_$(lastword $(1)))
BFLOAT16_CODE = $(call code_for,$(filter-out 75,$(CUARCH)))
FLOAT32_CODE = $(call code_for,$(CUARCH))
ALL_NVCCFLAGS = $(BASE_NVCCFLAGS) $(filter -D% -U% -I%,$(CPPFLAGS)) $(NVCCFLAGS)
# Stream 0 is one that a graph can record, see kernels/graph.cuh.
BASE_NVCCFLAGS = -std=c++17 -O3 -default-stream per-thread
BASE_NVCCFLAGS += -Xcompiler -Wall,-Wextra $(if $(WERROR),--Werror all-warnings) $(if $(PLAIN),-DMEGALODON_PLAIN)

ifneq ($(CUDA_GOALS),)
CUDA_FLAGS := $(strip $(NVCC) $(FLOAT32_CODE) $(ALL_NVCCFLAGS))
ifneq ($(CUDA_FLAGS),$(shell cat build/gpu/flags 2>/dev/null))
$(shell mkdir -p build/gpu; printf '%s\n' $(call quote,$(CUDA_FLAGS)) > build/gpu/flags)
endif
endif

# In bfloat16, and in float32 to compare with the CPU.
vpath %.cu . tests dev plumbing
GPU_SOURCES = megalodon.cu megalodon.h plumbing/model.h plumbing/device.cuh $(wildcard kernels/*.cuh) build/cpu_layers.h build/gpu/flags
build/gpu/peers.o: plumbing/peers.cu plumbing/peers.h plumbing/plumbing.h megalodon.h build/gpu/flags
	$(NVCC) $(FLOAT32_CODE) $(ALL_NVCCFLAGS) $(filter -I%,$(MPI)) -c $< -o $@
build/gpu/%_fp32.o: %.cu $(GPU_SOURCES)
	$(NVCC) $(FLOAT32_CODE) $(ALL_NVCCFLAGS) -DMEGALODON_FP32 -c $< -o $@
build/gpu/%.o: %.cu $(GPU_SOURCES)
	$(NVCC) $(BFLOAT16_CODE) $(ALL_NVCCFLAGS) -c $< -o $@

# Flags of the host's linker, which nvcc passes on.
for_nvcc = $(foreach f,$(1),$(if $(filter -L% -l% %.o %.a %.so,$f),$f,-Xcompiler $(call quote,$(subst $(comma),\$(comma),$f))))
GPU_LINK = $(NVCC) $(FLOAT32_CODE) $(ALL_NVCCFLAGS) $(call for_nvcc,$(LDFLAGS)) $(filter %.o,$^) $(filter %.a,$^) $(CUDA_LIBS) $(call for_nvcc,$(ALL_LIBS)) -o $@
ifneq ($(MPI),)
train_cuda train_cuda_fp32: build/ranks_peers.o build/gpu/peers.o
train_cuda train_cuda_fp32: BASE_LIBS += $(filter -L% -l%,$(MPI))
endif
train_cuda sample_cuda: %_cuda: build/%.o build/gpu/megalodon.o build/library.a
	$(GPU_LINK)
train_cuda_fp32 sample_cuda_fp32: %_cuda_fp32: build/%.o build/gpu/megalodon_fp32.o build/library.a
	$(GPU_LINK)
build/gpu/test_model_fp32: build/test_model.o build/gpu/megalodon_fp32.o build/library.a
	$(GPU_LINK)
build/gpu/test_cuda build/gpu/test_cuda_fp32: %: %.o build/cpu_layers.o build/library.a
	$(GPU_LINK)
build/gpu/bench_cuda: build/gpu/bench_cuda.o build/library.a
	$(GPU_LINK)
build/gpu/position_loss: build/position_loss.o build/gpu/megalodon.o build/library.a
	$(GPU_LINK)
build/gpu/position_loss_fp32: build/position_loss.o build/gpu/megalodon_fp32.o build/library.a
	$(GPU_LINK)

# The layers of megalodon.c as cpu_*, for tests/test_cuda.cu. The header is generated from megalodon.c.
build/cpu_layers.h: tests/cpu_layers.sh megalodon.c
	sh tests/cpu_layers.sh > $@.new
	mv $@.new $@
build/cpu_layers.o: tests/cpu_layers.c build/cpu_layers.h build/flags
	$(CC) $(ALL_CFLAGS) -MMD -MP -c $< -o $@
	objcopy --wildcard --keep-global-symbol='cpu_*' $@

ifeq ($(CUDA_ROOT),)
cuda test-cuda bench-cuda diff:
	@echo 'no nvcc: put it on the PATH, or say NVCC=/path/to/nvcc; ./train and ./sample need none' >&2; exit 1
else
cuda: $(CUDA_PROGRAMS)
	@echo $(call quote,built $(CUDA_PROGRAMS): $(NVCC)$(comma) $(if $(filter native,$(CUARCH)),for this GPU,for sm $(CUARCH))$(if $(NVCCFLAGS),$(comma) NVCCFLAGS="$(NVCCFLAGS)"). Next: ./$(firstword $(CUDA_PROGRAMS))$(comma) or make diff)

# On a GPU: builds, checks, times; a few minutes. What it printed on an H200 is in dev/notes/test-cuda.txt.
test-cuda: $(PROGRAMS) $(CUDA_PROGRAMS) $(addprefix build/gpu/,test_model_fp32 test_cuda test_cuda_fp32)
	@sh tests/cuda.sh

# Where the time of a training step on a GPU goes. ARGS="--preset mega200M --batch-size 8 --seq-len 2048", for example.
bench-cuda: build/gpu/bench_cuda
	build/gpu/bench_cuda $(ARGS)

# One batch on CPU and GPU, and every activation and gradient side by side.
diff: $(PROGRAMS) train_cuda_fp32
	./train --batch-size 2 --seq-len 100 --steps 2 --val-every 0 --dump build/cpu.dump
	./train_cuda_fp32 --batch-size 2 --seq-len 100 --steps 2 --val-every 0 --dump build/gpu.dump
	./compare build/gpu.dump build/cpu.dump
endif

# megalodon.cu where there is no GPU: tests/cuda_on_cpu runs its kernels on the CPU, slowly. Needs a C++ compiler.
EMULATED = build/emulated/test_cuda build/emulated/test_cuda_fp32 build/emulated/test_model_fp32
ALL_CXXFLAGS = $(BASE_CXXFLAGS) $(CPPFLAGS) $(CXXFLAGS)
BASE_CXXFLAGS = -std=c++17 -O2 $(NATIVE) $(SANITIZER) -Wall -Wextra -Wno-unknown-pragmas $(if $(WERROR),-Werror) \
           $(if $(PLAIN),-DMEGALODON_PLAIN) -Itests/cuda_on_cpu -iquote . -iquote tests
build/emulated/%.cu build/emulated/tests/%.cu build/emulated/plumbing/%.cu: %.cu tests/cuda_on_cpu/translate.awk
	@mkdir -p $(@D)
	awk -v file=$< -f tests/cuda_on_cpu/translate.awk $< > $@
build/emulated/%.cuh: %.cuh tests/cuda_on_cpu/translate.awk
	@mkdir -p $(@D)
	awk -v file=$< -f tests/cuda_on_cpu/translate.awk $< > $@
EMULATED_SOURCES = build/emulated/megalodon.cu $(wildcard tests/cuda_on_cpu/*.h) megalodon.h plumbing/model.h build/cpu_layers.h \
                   $(addprefix build/emulated/,plumbing/device.cuh $(wildcard kernels/*.cuh))
build/emulated/%.o: build/emulated/%.cu $(EMULATED_SOURCES)
	$(CXX) $(ALL_CXXFLAGS) -c -x c++ $< -o $@
build/emulated/%_fp32.o: build/emulated/%.cu $(EMULATED_SOURCES)
	$(CXX) $(ALL_CXXFLAGS) -DMEGALODON_FP32 -c -x c++ $< -o $@
build/emulated/test_cuda: build/emulated/tests/test_cuda.o build/cpu_layers.o build/library.a
build/emulated/test_cuda_fp32: build/emulated/tests/test_cuda_fp32.o build/cpu_layers.o build/library.a
build/emulated/test_model_fp32: build/test_model.o build/emulated/megalodon_fp32.o build/library.a
EMULATED_TRAIN = build/train.o $(if $(MPI),build/ranks_peers.o build/emulated/plumbing/peers.o)
build/emulated/train: $(EMULATED_TRAIN) build/emulated/megalodon.o build/library.a
build/emulated/train_fp32: $(EMULATED_TRAIN) build/emulated/megalodon_fp32.o build/library.a
build/emulated/plumbing/peers.o: BASE_CXXFLAGS += -iquote plumbing $(filter -I%,$(MPI))
build/emulated/plumbing/peers.o: plumbing/peers.h plumbing/plumbing.h
build/emulated/train build/emulated/train_fp32: BASE_LIBS += $(filter-out -I%,$(MPI))
build/emulated/sample_fp32: build/sample.o build/emulated/megalodon_fp32.o build/library.a
EMULATED_PROGRAMS = $(addprefix build/emulated/,train train_fp32 sample_fp32)
$(EMULATED) $(EMULATED_PROGRAMS):
	$(CXX) $(ALL_CXXFLAGS) $(LDFLAGS) $^ -rdynamic $(OMP) $(ALL_LIBS) -o $@

test-emulated: $(EMULATED) $(EMULATED_PROGRAMS) $(PROGRAMS)
	@sh tests/run.sh $(EMULATED) tests/limits_emulated.sh tests/sample_emulated.sh tests/mpi_emulated.sh

# Shared memory of every kernel of megalodon.cu, for all presets, and whether it fits 99, 163, 227 KB. Needs no GPU.
shared-memory: build/emulated/test_cuda build/emulated/test_cuda_fp32
	@for program in $^; do $$program shared_memory > build/shared.out 2>&1 || { cat build/shared.out; exit 1; }; \
	    sed -n '/^Shared memory/,$$p' build/shared.out; done

# ---------------------------------------------------------------- tests

# Each tests/test_*.c is a program, each tests/test_*.sh a script: a line a check, then "N passed, N failed".
# Those in DOUBLE_TESTS are built for doubles; test_model and test_chunk_parallel for both.
DOUBLE_TESTS = test_layers test_model test_chunk_parallel
FLOAT_TESTS = $(filter-out test_layers,$(patsubst tests/%.c,%,$(wildcard tests/test_*.c)))
TESTS = $(addprefix build/double/,$(DOUBLE_TESTS)) $(addprefix build/,$(FLOAT_TESTS))

$(addprefix build/,$(FLOAT_TESTS)): %: %.o build/library.a
	$(LINK)

$(addprefix build/double/,$(DOUBLE_TESTS)): %: %.o build/double/library.a
	$(LINK)

test-programs: $(PROGRAMS) $(TESTS) build/position_loss build/double/train

test: test-programs
	@sh tests/run.sh $(TESTS) $(sort $(wildcard tests/test_*.sh))

# What compilers and checkers say of the plumbing; nothing may be left. The model's files keep to the limits of
# dev/notes/structure.md: lines, comments, parameters. Off: parameters of one type side by side, as
# everywhere in C; snprintf and memcpy, which are bounded; va_list, which clang-tidy 14 does not follow into functions;
# _FILE_OFFSET_BITS; sizes of pointers, which arrays of pointers need.
TIDY = '-*,bugprone-*,clang-analyzer-*,-bugprone-easily-swappable-parameters,-clang-analyzer-security.insecureAPI.*,-clang-analyzer-valist.*,-bugprone-reserved-identifier,-bugprone-sizeof-expression'
lint:
	for cc in gcc clang; do for f in plumbing/*.c; do \
	    $$cc -std=gnu11 -O1 -Wall -Wextra -Wshadow -Wconversion -Wno-unknown-pragmas -Werror -c $$f -o build/lint.o || exit 1; done; done
	cppcheck --quiet --std=c11 --enable=warning,performance,portability --error-exitcode=1 plumbing/
	clang-tidy --quiet --warnings-as-errors='*' -checks=$(TIDY) plumbing/*.c -- -std=gnu11
	python3 dev/count_code.py --check > build/count.txt

# Looks for bytes that crash a reader of files: libFuzzer, with clang, for FUZZ_SECONDS each.
# test_fuzz.c has system.c and data.c inside.
FUZZ_SECONDS = 60
FUZZ_TARGETS = json config options safetensors model state tokens batch tokenizer
build/fuzz: tests/test_fuzz.c megalodon.c $(filter-out %/compare.c %/system.c %/data.c,$(wildcard plumbing/*.c))
	clang -std=gnu11 -O1 -g -Wno-unknown-pragmas -DLIBFUZZER -fsanitize=fuzzer,address,undefined \
	    -fno-sanitize-recover=all $^ -lm -o $@

fuzz: build/fuzz build/test_fuzz
	@sh tests/fuzz.sh $(FUZZ_SECONDS) $(FUZZ_TARGETS)

# Programs and tests for macOS, and for 64-bit ARM in QEMU. Needs dev/requirements-cross.txt in build/venv, or ZIG=....
test-cross:
	@sh tests/cross.sh

# Breaks megalodon.c in one place after another and demands that a test notices. Takes long.
test-mutants:
	bash tests/mutants.sh

# ---------------------------------------------------------------- benchmark

build/bench.o build/position_loss.o: build/%.o: dev/%.c build/flags
	$(CC) $(ALL_CFLAGS) -MMD -MP -c $< -o $@

build/timestep_norm_long.o: dev/experiments/timestep_norm_long.c build/flags
	$(CC) $(ALL_CFLAGS) -MMD -MP -c $< -o $@

build/bench build/position_loss build/timestep_norm_long: %: %.o build/library.a
	$(LINK)

# A training step and its parts beside what this machine can do. ARGS="--preset mega200M --decode", for example.
bench: build/bench
	build/bench $(ARGS)

# ---------------------------------------------------------------- demo

demo: $(PROGRAMS)
	./train --out build/demo --overwrite
	./sample --model build/demo --prompt "ROMEO:"

# ---------------------------------------------------------------- a page for a browser

# WebAssembly, by clang with wasi-libc. -ffp-contract=off: a browser has no fused operations.
WASM_CC = clang
WASM_FLAGS = --target=wasm32-wasi --sysroot=/usr -I/usr/include/wasm32-wasi -mexec-model=reactor -msimd128 -O3 -std=gnu11 \
	-D_GNU_SOURCE -D_WASI_EMULATED_MMAN -D_WASI_EMULATED_PROCESS_CLOCKS -fno-math-errno -ffp-contract=off \
	-Wall -Wextra -Wno-unknown-pragmas
WASM_LIBS = -lwasi-emulated-mman -lwasi-emulated-process-clocks -Wl,--export=free -Wl,--strip-all
WEB_SOURCES = dev/web/web.c megalodon.c $(addprefix plumbing/,json.c config.c params.c state.c layout.c sampler.c)

web: build/web/megalodon.wasm
	@cp dev/web/index.html dev/web/megalodon.js dev/models/plays/model.safetensors build/web/
	@echo 'built build/web. Next: cd build/web && python3 -m http.server, and http://localhost:8000 in a browser'

build/web/megalodon.wasm: $(WEB_SOURCES) megalodon.h $(wildcard plumbing/*.h kernels/*_cpu.h)
	@mkdir -p build/web
	@echo 'int main(void) { return 0; }' | $(WASM_CC) --target=wasm32-wasi --sysroot=/usr -x c - -o build/web/empty.wasm || \
	    { echo 'make web needs clang with WebAssembly: apt install clang lld wasi-libc libclang-rt-dev-wasm32' >&2; exit 1; }
	$(WASM_CC) $(WASM_FLAGS) $(WEB_SOURCES) $(WASM_LIBS) -o $@

clean:
	rm -rf build $(PROGRAMS) $(CUDA_PROGRAMS)

.PHONY: all help cuda test-cuda bench-cuda diff test-emulated shared-memory test test-programs test-cross test-mutants lint fuzz bench demo web clean
