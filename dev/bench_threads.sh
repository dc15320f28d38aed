# Measures tokens/s of training and of sampling for several numbers of threads, on an idle machine and beside processes
# that use one core each ("busy"). Prints a table; results are in dev/notes/cpu.md. Needs ./train and ./sample (make):
#   sh dev/bench_threads.sh
# Environment variables and their defaults:
#   THREADS="1 2 0"   numbers of threads; 0 is the default of the programs
#   BUSY=1            busy processes
#   ROUNDS=3          runs of each case, of which the best counts
#   STEPS=20          training steps per run
#   TOKENS=500        tokens to sample per run
#   PRESET=demo       configuration of the model
threads=${THREADS:-1 2 0}
busy=${BUSY:-1}
rounds=${ROUNDS:-3}
dir=$(mktemp -d)
pids=
stop_busy() {
    [ -z "$pids" ] || kill $pids 2> /dev/null
    pids=
}
trap 'stop_busy; rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM

start_busy() {
    for i in $(seq "$busy"); do
        (while :; do :; done) &
        pids="$pids $!"
    done
}
better() { awk -v a="$1" -v b="$2" 'BEGIN { print (b + 0 > a + 0) ? b : a }'; }
# Tokens/s, the mean over the steps after the first two.
training() {
    ./train --preset "${PRESET:-demo}" --steps "${STEPS:-20}" --val-every 0 --threads "$1" --out "$dir/run" --overwrite |
        awk -F'|' '/^step .*tok\/s/ && ++n > 2 { ms += $5; m++ } /^step  / && /tokens,/ { split($0, w, " ")
            tokens = w[2] * w[4] * w[6] } END { printf "%.0f", 1000 * tokens * m / ms }'
}
# Tokens/s of generating $2 samples at once with $1 threads.
sampling() {
    ./sample --model "$dir/model" --prompt "The " --num-tokens "${TOKENS:-500}" --num-samples "$2" --threads "$1" \
        2>&1 > /dev/null | sed -n 's/.*wrote [0-9]*, \([0-9]*\) tokens.*/\1/p'
}

./train --preset "${PRESET:-demo}" --steps 1 --val-every 0 --out "$dir/model" > /dev/null || exit 1
printf '%-6s %-8s %12s %12s %12s   (tokens/s, best of %d)\n' machine threads training '1 sample' '8 samples' "$rounds"
for machine in idle busy; do
    [ $machine = idle ] || start_busy
    for t in $threads; do
        a=0 b=0 c=0
        for round in $(seq "$rounds"); do
            a=$(better $a "$(training "$t")") b=$(better $b "$(sampling "$t" 1)") c=$(better $c "$(sampling "$t" 8)")
        done
        [ "$t" = 0 ] && t=default
        printf '%-6s %-8s %12s %12s %12s\n' $machine "$t" "$a" "$b" "$c"
    done
done
