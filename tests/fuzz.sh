# Runs build/fuzz for some seconds on each target: sh tests/fuzz.sh SECONDS TARGET... What it finds new goes to
# build/corpus, what a reader does not survive to build/crash-*; add that to tests/corpus once it is mended.
seconds=$1
shift
passed=0 failed=0
for target in "$@"; do
    mkdir -p "build/corpus/$target" "tests/corpus/$target"
    if FUZZ_TARGET=$target ASAN_OPTIONS=detect_leaks=0 build/fuzz -max_total_time="$seconds" -timeout=10 -max_len=16384 \
        -rss_limit_mb=4096 -artifact_prefix=build/crash- "build/corpus/$target" "tests/corpus/$target" > build/fuzz.out 2>&1; then
        passed=$((passed + 1)) word=ok
    else
        failed=$((failed + 1)) word=FAIL
        tail -n 30 build/fuzz.out
    fi
    printf '%-4s  %s: %s\n' $word "$target" "$(grep -E 'Done|DONE' build/fuzz.out | tail -n 1)"
done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
