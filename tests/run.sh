# Runs test programs and scripts from the root of the repository and adds up their last lines, "N passed, N failed".
# A test that checks nothing without saying that it is skipped, ends in another way, or fails without saying so, counts
# as one failed check.
passed=0
failed=0
mkdir -p build
if ! command -v timeout > /dev/null; then # macOS
    mkdir -p build/tools
    printf '#!/bin/sh\nexec perl -e "alarm shift; exec @ARGV" "$@"\n' > build/tools/timeout
    chmod +x build/tools/timeout
    export PATH="$PWD/build/tools:$PATH"
fi
for test in "$@"; do
    echo "---- $test"
    start=$(date +%s)
    case $test in
    *.sh) sh "$test" > build/test.out 2>&1 ;;
    *test_cuda*) "$test" > build/test.out 2>&1 ;; # an argument would choose among its checks
    *) "$test" ./compare > build/test.out 2>&1 ;;  # test_files tries the program too
    esac
    status=$?
    cat build/test.out
    set -- $(tail -n 1 build/test.out | sed -n 's/^\([0-9][0-9]*\) passed, \([0-9][0-9]*\) failed$/\1 \2/p') 0 0
    passed=$((passed + $1))
    failed=$((failed + $2))
    if [ "$#" -ne 4 ] || { [ "$1" -eq 0 ] && ! grep -q '^skipped: ' build/test.out; } || { [ $status -ne 0 ] && [ "$2" -eq 0 ]; }; then
        echo "FAIL $test: ended with status $status"
        failed=$((failed + 1))
    fi
    echo "     $(($(date +%s) - start)) s"
done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
