# Tokens/s of the demo preset in training and in sampling, for several numbers of threads, on the machine as it is
# ("idle") and beside processes that use a core each ("busy"). Prints a table; see dev/notes/cpu.md. After make:
#   sh dev/bench_threads.sh
# In the environment: THREADS="1 2 0" (0: the default), HOGS=1 busy processes, ROUNDS=3 (the best counts), STEPS=20,
# TOKENS=500, PRESET=demo.
threads=${THREADS:-1 2 0}
hogs=${HOGS:-1}
rounds=${ROUNDS:-3}
dir=$(mktemp -d)
pids=
stop_hogs() {
    [ -z "$pids" ] || kill $pids 2> /dev/null
    pids=
}
trap 'stop_hogs; rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM

start_hogs() {
    for i in $(seq "$hogs"); do
        (while :; do :; done) &
        pids="$pids $!"
    done
}
better() { awk -v a="$1" -v b="$2" 'BEGIN { print (b + 0 > a + 0) ? b : a }'; }
# Mean over the steps after the first two.
training() {
    ./train --preset "${PRESET:-demo}" --steps "${STEPS:-20}" --val-every 0 --threads "$1" --out "$dir/run" --overwrite |
        awk -F'|' '/^step .*tok\/s/ && ++n > 2 { ms += $5; m++ } /^step  / && /tokens,/ { split($0, w, " ")
            tokens = w[2] * w[4] * w[6] } END { printf "%.0f", 1000 * tokens * m / ms }'
}
sampling() {
    ./sample --model "$dir/model" --prompt "The " --num-tokens "${TOKENS:-500}" --num-samples "$2" --threads "$1" \
        2>&1 > /dev/null | sed -n 's/.*wrote [0-9]*, \([0-9]*\) tokens.*/\1/p'
}

./train --preset "${PRESET:-demo}" --steps 1 --val-every 0 --out "$dir/model" > /dev/null || exit 1
printf '%-6s %-8s %12s %12s %12s   (tokens/s, best of %d)\n' machine threads training '1 sample' '8 samples' "$rounds"
for machine in idle busy; do
    [ $machine = idle ] || start_hogs
    for t in $threads; do
        a=0 b=0 c=0
        for round in $(seq "$rounds"); do
            a=$(better $a "$(training "$t")") b=$(better $b "$(sampling "$t" 1)") c=$(better $c "$(sampling "$t" 8)")
        done
        [ "$t" = 0 ] && t=default
        printf '%-6s %-8s %12s %12s %12s\n' $machine "$t" "$a" "$b" "$c"
    done
done
