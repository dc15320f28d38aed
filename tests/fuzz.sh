# Runs build/fuzz for some seconds on each target: sh tests/fuzz.sh SECONDS TARGET... What it finds new goes to
# build/corpus, inputs that crash a reader to build/crash-*; add them to tests/corpus when it is fixed.
seconds=$1
shift
passed=0 failed=0
mkdir -p build/corpus && build/test_fuzz --seeds build/corpus || exit 1
for target in "$@"; do
    if FUZZ_TARGET=$target build/fuzz -max_total_time="$seconds" -timeout=10 -max_len=8192 -rss_limit_mb=4096 \
        -close_fd_mask=3 -artifact_prefix=build/crash- "build/corpus/$target" "tests/corpus/$target" > build/fuzz.out 2>&1; then
        passed=$((passed + 1)) word=ok
    else
        failed=$((failed + 1)) word=FAIL
        tail -n 30 build/fuzz.out
    fi
    printf '%-4s  %s: %s, %s blocks reached\n' $word "$target" "$(grep -E 'Done' build/fuzz.out | tail -n 1)" \
        "$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' build/fuzz.out | tail -n 1)"
done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
