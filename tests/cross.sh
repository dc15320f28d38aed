# Compiles and links all programs and tests for other systems, with Zig's C compiler, and runs those for 64-bit ARM in
# QEMU's emulation where that is installed. From the repository's root: make test-cross, with
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
    cp -R Makefile ./*.c ./*.h plumbing tests dev "$copy"
    (cd "$copy" && make -j2 all test-programs CC="$zig cc -target $target" AR="$zig ar" NO_OMP=1 NO_BLAS=1 NO_MPI=1 \
        PORTABLE=1 WERROR=1 CFLAGS=-O1) > "$log" 2>&1
    status=$?
    case $target in *macos) format='Mach-O' ;; *) format='ELF' ;; esac
    [ $status -eq 0 ] && [ "$(cd "$copy" && ls train sample compare build/test_files build/double/test_layers | wc -l)" -eq 5 ]
    verdict $? "$target: programs and tests compile without a warning, and link"
done

if command -v qemu-aarch64 > /dev/null; then
    cd build/cross/aarch64-linux-musl || exit 1
    for program in train sample compare build/test_* build/double/test_*; do
        case $program in *.*) continue ;; esac
        mv "$program" "$program.aarch64"
        printf 'exec qemu-aarch64 "%s/%s.aarch64" "$@"\n' "$PWD" "$program" > "$program"
        sed -i '1i #!/bin/sh' "$program"
        chmod +x "$program"
    done
    for test in build/double/test_* build/test_* tests/test_*.sh; do
        case $test in *.*o|*.d|*.aarch64) continue ;; esac
        (time timeout 100 sh tests/run.sh $test) > log.$(basename $test) 2>&1; tail -n 6 log.$(basename $test)
    done
fi
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
