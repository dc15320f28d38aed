# The prompts and scores of the GPU version of ./sample, with megalodon.cu's kernels on the CPU, against ./sample: it reads
# in passes of up to 16,384 tokens instead of 2048. Run by `make test-emulated`, from the repository's root.
. tests/check.sh
export LC_ALL=C
gpu=$PWD/build/emulated/sample_fp32

awk 'BEGIN { for (i = 0; i < 1500; i++) printf "%d squared is %d\n", i, i * i }' > "$folder/text"
small="--threads 1 --model-dim 16 --num-layers 1 --z-dim 8 --value-dim 16 --num-heads 2 --ffn-hidden-dim 16 --cema-ndim 2
    --chunk-size 64 --norm-num-groups 4 --data $folder/text --batch-size 4 --seq-len 256 --warmup 5 --val-every 0"
check "a model" "$train" $small --steps 60 --lr 0.02 --out "$folder/run"

reads() { # TOKENS OPTIONS...: the text, in which no token is drawn by a hair's breadth, is that of ./sample
    head -c "$1" "$folder/text" > "$folder/prompt"
    shift
    for program in "$sample" "$gpu"; do
        "$program" --model "$folder/run" --prompt-file "$folder/prompt" --num-tokens 24 "$@" 2> "$folder/err" || return 1
        cat "$folder/err" >&2
    done > "$folder/both"
    size=$(($(wc -c < "$folder/both") / 2))
    head -c $size "$folder/both" > "$folder/cpu" && tail -c $size "$folder/both" | cmp "$folder/cpu" - && [ $size -gt 0 ]
}
for tokens in 2048 2049 5000 16384 16385 20000; do
    check "a prompt of $tokens tokens: the same text" reads $tokens --temperature 0
done
check "  of 20000, drawn at random" reads 20000 --seed 3
check "  three samples of it" reads 20000 --num-samples 3

# That passes are longer shows in the memory that they take: an address space in which 2048 tokens fit is too small.
limited() { # TOKENS
    head -c "$1" "$folder/text" > "$folder/prompt"
    (ulimit -v "$kib" && exec "$gpu" --model "$folder/wide" --prompt-file "$folder/prompt" --num-tokens 0 > "$folder/log" 2>&1)
}
if grep -q __asan_init "$gpu" || ! (ulimit -v 2000000 && "$gpu" --help > "$folder/log" 2>&1); then
    echo "skipped: ulimit -v (AddressSanitizer takes memory of its own)"
else
    check "a model whose activations take 100 MiB" "$train" $small --ffn-hidden-dim 512 --steps 0 --out "$folder/wide"
    for kib in $(seq 100000 16000 2000000); do limited 2048 && break; done 2> "$folder/err"
    check "2048 tokens in an address space of $kib KiB" limited 2048
    check "  16384 tokens do not fit: they are read in one pass" eval '! limited 16384'
fi

scores() { "$1" --model "$folder/run" --score "$folder/text" 2> /dev/null; }
same_scores() { # the same ranges and numbers of tokens, with bits that agree to 2e-4
    scores "$sample" > "$folder/cpu" && scores "$gpu" > "$folder/gpu" && paste "$folder/cpu" "$folder/gpu" | awk '
        NR > 1 { half = NF / 2; d = $half - $NF; rows++; if ($(half - 1) != $(NF - 1) || !(d < 2e-4 && d > -2e-4 && $half + 0 > 0)) bad = 1 }
        { print } END { exit bad || rows < 9 }'
}
check "the score of $(wc -c < "$folder/text") tokens, by position" same_scores

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
