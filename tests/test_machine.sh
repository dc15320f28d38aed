# Little address space, busy cores, small models: every run ends, none uses threads that make it slower.
# From the repository's root: sh tests/test_machine.sh
train=$PWD/train sample=$PWD/sample
folder=$(mktemp -d)
pids=
trap 'kill $pids 2> /dev/null; rm -rf "$folder"' EXIT
cd "$folder" || exit 1
passed=0 failed=0

verdict() { # STATUS TEXT
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)) word=ok; else failed=$((failed + 1)) word=FAIL; fi
    printf '%-4s  %s\n' $word "$2"
}
awk 'BEGIN { for (i = 0; i < 600; i++) printf "%d squared is %d\n", i, i * i }' > text
tiny="--num-layers 1 --model-dim 16 --num-heads 1 --z-dim 8 --value-dim 16 --ffn-hidden-dim 16 --cema-ndim 2
      --chunk-size 16 --norm-num-groups 4 --data text --batch-size 2 --seq-len 32 --val-every 0"

# ---------------------------------------------------------------- address space

if grep -q __asan_init "$train"; then
    echo "skipped: ulimit -v, since AddressSanitizer reserves terabytes of address space"
else
    for threads in 0 1 32; do
        hung= trained=0 refused=0
        for kib in 60000 80000 100000 120000 140000 160000 180000 200000 220000 260000 8000000; do
            (ulimit -v $kib && exec timeout -s KILL 20 "$train" $tiny --threads $threads --steps 2 --out run --overwrite) > out 2> err
            case $? in
            0) trained=$((trained + 1)) ;;
            1) refused=$((refused + 1)) ;;
            *) hung="$hung $kib" ;;
            esac
        done
        [ -z "$hung" ] && [ $trained -ge 1 ]
        verdict $? "ulimit -v of 60000 to 8000000, --threads $threads: $trained trained, $refused refused, did not end:$hung"
    done
    (ulimit -v 200000 && exec timeout -s KILL 20 "$train" --preset mega200M --data text --seq-len 64 --out run --overwrite) > out 2> err
    [ $? -eq 1 ] && grep -q 'error: .*ulimit -v' err
    verdict $? "  refused with the limit's name: $(grep -o '[^ ]* [^ ]* [^ ]* ulimit -v[^;]*' err)"
    (ulimit -v 4000000 && exec timeout -s KILL 20 "$train" --preset mega1.3B --data text --seq-len 64 --out run --overwrite) > out 2> err
    [ $? -eq 1 ] && grep -q 'mostly because of parameters, gradients and moments: use a smaller model' err
    verdict $? "  the advice names the parameters where they alone exceed the memory"
    (ulimit -v 4000000 && exec timeout -s KILL 20 "$train" --data text --batch-size 1 --seq-len 9000 --val-every 0 --num-layers 400 --out run --overwrite) > out 2> err
    [ $? -eq 1 ] && grep -q 'What fits: ' err
    verdict $? "  and a length that fits where activations do"
    (ulimit -v 200000 && exec "$train" $tiny --threads 1 --steps 100000000 --out run --overwrite) > out 2> err &
    pid=$!
    sleep 1
    kill $pid 2> /dev/null
    (sleep 20 && kill -9 $pid) 2> /dev/null &
    guard=$!
    wait $pid
    status=$?
    kill $guard 2> /dev/null
    [ $status -eq 143 ] || [ $status -eq 1 ]
    verdict $? "  with ulimit -v 200000 SIGTERM ends a run: status $status"
fi

# ---------------------------------------------------------------- threads

if [ ! -r /proc/self/status ] || ! ldd "$train" 2> /dev/null | grep -q 'libg*omp'; then
    echo "skipped: threads, which need OpenMP and /proc"
else
    "$train" $tiny --threads 8 --steps 100000000 --out run --overwrite > out 2> err &
    pid=$!
    pids=$pid
    for i in 1 2 3 4 5 6 7 8 9 10; do
        sleep 0.3
        if grep -q '^step .*/' out; then break; fi
    done
    # The threads that the large product at the start of the run woke sleep now. Ticks are hundredths of a second.
    ticks() { awk '{ sub(/.*\) /, ""); print FILENAME, $12 + $13 }' /proc/$pid/task/*/stat; }
    sleep 1
    ticks > before
    sleep 1
    count=$(ticks | paste before - | awk '$4 - $2 >= 10 { n++ } END { print n + 0 }')
    kill -9 $pid
    wait $pid 2> /dev/null
    [ "$count" = 1 ]
    verdict $? "a model of 16 dimensions trains in $count thread with --threads 8"

    timeout 60 "$train" $tiny --threads 200 --steps 1 --out run --overwrite > out 2> err
    verdict $? "200 threads, for which BLAS would take more address space than there is memory"

    "$train" --data text --batch-size 1 --seq-len 64 --steps 1 --val-every 0 --out model > out 2> err
    rate() { # the better of two runs
        for i in 1 2; do
            timeout 120 "$sample" --model model --prompt T --num-tokens 100 --num-samples 8 --threads "$1" 2>&1 > /dev/null |
                sed -n 's/.*wrote [0-9]*, \([0-9]*\) tokens.*/\1/p'
        done | sort -n | tail -n 1
    }
    pids=
    for i in $(seq "$(nproc)"); do
        (while :; do :; done) &
        pids="$pids $!"
    done
    one=$(rate 1) all=$(rate 0) # --threads 0: the default
    kill $pids
    pids=
    [ -n "$one" ] && [ -n "$all" ] && [ "$one" -le $((4 * all)) ]
    verdict $? "8 samples on busy cores: $all tokens/s with the default threads, at least a quarter of $one with one"
fi

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
