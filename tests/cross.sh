# Compiles and links all programs and tests for other systems, with Zig's C compiler, and runs those for 64-bit ARM in
# QEMU's user-mode emulation where that is installed. From the repository's root: make test-cross, with
# ZIG="..." (default: build/venv/bin/python -m ziglang, of dev/requirements-cross.txt).
zig=${ZIG:-build/venv/bin/python -m ziglang}
passed=0 failed=0
root=$PWD
case $zig in build/*) zig=$root/$zig ;; esac
mkdir -p build/cross
export ZIG_GLOBAL_CACHE_DIR="$root/build/cross/cache" ZIG_LOCAL_CACHE_DIR="$root/build/cross/cache"
unset CFLAGS CPPFLAGS LDFLAGS LDLIBS MAKEFLAGS MAKELEVEL
log=$root/build/cross/log

verdict() { # STATUS TEXT
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)) word=ok; else failed=$((failed + 1)) word=FAIL; fi
    printf '%-4s  %s\n' $word "$2"
    if [ "$1" -ne 0 ]; then tail -n 12 "$log" | cut -c 1-200 | sed 's/^/      /'; fi
}

# What the programs cannot run on ends with one error that says why.
refused() { # TARGET TEXT
    $zig cc -target "$1" -std=gnu11 -Wno-unknown-pragmas -c megalodon.c -o build/cross/refused.o > "$log" 2>&1
    [ $? -ne 0 ] && [ "$(grep -c ': error: ' "$log")" -eq 1 ] && grep -q -F -e "error: \"$2" "$log"
    verdict $? "$1 is refused with one error: $2"
}
refused x86-linux-musl "a 64-bit target is needed"
refused arm-linux-musleabihf "a 64-bit target is needed"
refused powerpc64-linux-musl "a little-endian target is needed"

for target in aarch64-macos x86_64-macos aarch64-linux-musl; do
    copy=build/cross/$target
    rm -rf "$copy"
    mkdir -p "$copy"
    cp -R Makefile ./*.c ./*.h plumbing kernels tests dev "$copy"
    (cd "$copy" && make -j2 all test-programs CC="$zig cc -target $target" AR="$zig ar" NO_OMP=1 NO_BLAS=1 NO_MPI=1 \
        PORTABLE=1 WERROR=1 CFLAGS=-O1) > "$log" 2>&1
    status=$?
    case $target in *macos) format='Mach-O' ;; *) format='ELF' ;; esac
    [ $status -eq 0 ] && [ "$(cd "$copy" && ls train sample compare build/test_files build/double/test_layers | wc -l)" -eq 5 ]
    verdict $? "$target: programs and tests compile without a warning, and link"
done

# Each program becomes a script that runs it in the emulator. test_layers and the double test_model take minutes there;
# the fixtures check the same layers.
if command -v qemu-aarch64 > /dev/null; then
    cd "build/cross/aarch64-linux-musl" || exit 1
    tests="build/double/test_chunk_parallel build/test_chunk_parallel build/test_model build/test_float build/test_params build/test_data
           build/test_files build/test_plumbing build/test_tokenizer build/test_fuzz"
    for program in train sample compare $tests; do
        mv "$program" "$program.aarch64"
        printf '#!/bin/sh\nexec qemu-aarch64 "%s" "$@"\n' "$PWD/$program.aarch64" > "$program"
        chmod +x "$program"
    done
    for test in $tests; do
        sh tests/run.sh "$test" > "$log" 2>&1
        status=$?
        verdict $status "64-bit ARM, emulated: $test, $(tail -n 1 "$log")"
    done
    for name in released_a jax_ragged jax_tied; do
        { ./train --init tests/data/$name.init.safetensors --batch tests/data/$name.expect.safetensors --steps 1 --dump dump &&
            ./compare tests/data/$name.expect.safetensors dump; } > "$log" 2>&1
        verdict $? "64-bit ARM, emulated: activations, loss and gradients of $name"
        rm -f dump
    done
    small="--num-layers 1 --model-dim 16 --z-dim 8 --value-dim 16 --ffn-hidden-dim 16 --cema-ndim 2 --chunk-size 16
           --norm-num-groups 4 --batch-size 2 --seq-len 32 --val-batches 2"
    ./train $small --steps 20 --out run > "$log" 2>&1 && ./train --resume run --steps 25 > "$log" 2>&1
    verdict $? "64-bit ARM, emulated: ./train, on the text beside it, and resumed"
    ./sample --model run --prompt "int " --num-tokens 20 > out 2> "$log" && [ "$(wc -c < out)" -ge 24 ]
    verdict $? "64-bit ARM, emulated: ./sample"
else
    echo "      skipped: no qemu-aarch64 to run the programs for 64-bit ARM"
fi

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
