# Runs models that others have computed, the authors' CUDA code (tests/data/released_*) and megalodon-jax
# (tests/data/jax_*), and compares: every activation, loss and gradient of a batch; then losses and gradient
# norms of five AdamW steps. From the root of the repository: sh tests/test_fixtures.sh [path of train] [path
# of compare]
train=${1:-./train} compare=${2:-./compare}
passed=0 failed=0
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT

verdict() { # status, text
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)) word=ok; else failed=$((failed + 1)) word=FAIL; fi
    printf '%-66s %s\n' "$2" $word
    if [ "$1" -ne 0 ]; then cat "$tmp/log"; fi
}

${CC:-cc} -std=gnu11 -O1 -o "$tmp/read_series" tests/read_series.c plumbing/safetensors.c plumbing/json.c \
    plumbing/params.c -lm > "$tmp/log" 2>&1
verdict $? "tests/read_series.c compiles"

count=0
for init in tests/data/*.init.safetensors; do
    expect=${init%.init.safetensors}.expect.safetensors
    name=$(basename "$init" .init.safetensors)
    count=$((count + 1))

    # the second time with block inputs kept only, whose activations and gradients are computed again
    for mode in "" --recompute; do
        { "$train" --init "$init" --batch "$expect" --steps 1 --dump "$tmp/dump" --out "$tmp/run" --overwrite \
            $mode && "$compare" "$expect" "$tmp/dump"; } > "$tmp/log" 2>&1
        status=$?
        verdict $status "$name${mode:+ }$mode: activations, loss, gradients"
        grep '^worst' "$tmp/log" | sed 's/^/    /'
        rm -f "$tmp/dump"
    done

    { "$train" --init "$init" --batch "$expect" --steps 5 --lr 1e-3 --schedule constant --warmup 0 \
        --weight-decay 0.1 --beta1 .9 --beta2 .95 --eps 1e-8 --grad-clip 1 --log "$tmp/log.csv" \
        --out "$tmp/run" --overwrite && "$tmp/read_series" "$expect" "$tmp/log.csv"; } > "$tmp/log" 2>&1
    status=$?
    verdict $status "$name: five AdamW steps"
    grep '^train\.' "$tmp/log" | sed 's/^/    /'
    rm -f "$tmp/log.csv"
done
[ $count -ge 8 ]
verdict $? "$count fixtures, at least 8 expected"

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
