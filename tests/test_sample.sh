# ./sample: its text repeats, goes on from a state as if never interrupted, and its scores are the loss that
# ./train --eval prints; what it is given wrongly is refused by name. From the root of the repository.
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
passed=0 failed=0

verdict() { # status, text
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)) word=ok; else failed=$((failed + 1)) word=FAIL; fi
    printf '%-4s  %s\n' $word "$2"
}
# Expects an exit status and a word on stderr.
refused() { # status, word, arguments
    status=$1 word=$2
    shift 2
    ./sample "$@" > /dev/null 2> "$tmp/err" < /dev/null
    [ $? -eq "$status" ] && grep -q -e "$word" "$tmp/err"
    verdict $? "refused with '$word': sample $*"
}

./train --threads 1 --steps 25 --batch-size 2 --seq-len 128 --val-every 0 --data megalodon.h --out "$tmp/run" > "$tmp/log" 2>&1
verdict $? "a model to write with"
s="./sample --model $tmp/run --threads 1"

$s --prompt "int n" --num-tokens 200 --seed 5 > "$tmp/whole" 2> "$tmp/err"
verdict $? "writes"
[ "$(wc -c < "$tmp/whole")" -eq 205 ] && [ "$(head -c 5 "$tmp/whole")" = "int n" ]
verdict $? "the prompt and 200 bytes"
grep -q 'read 5 tokens, [0-9]* tokens/s; wrote 200, [1-9][0-9]* tokens/s; seed 5' "$tmp/err"
verdict $? "says the speed of reading and of writing, and the seed"
$s --prompt "int n" --num-tokens 200 --seed 5 2> /dev/null | cmp -s - "$tmp/whole"
verdict $? "the same seed, the same text"
! $s --prompt "int n" --num-tokens 200 --seed 6 2> /dev/null | cmp -s - "$tmp/whole"
verdict $? "another seed, another text"
printf 'int n' > "$tmp/prompt"
$s --prompt-file "$tmp/prompt" --num-tokens 200 --seed 5 2> /dev/null | cmp -s - "$tmp/whole"
verdict $? "--prompt-file is --prompt"
[ "$($s --prompt x --num-tokens 50 --temperature 0 2> /dev/null)" = "$($s --prompt x --num-tokens 50 --top-k 1 --seed 9 2> /dev/null)" ]
verdict $? "temperature 0 is top-k 1"

# across a chunk's border (64 tokens) and within a chunk
for n in 1 59 100; do
    {
        $s --prompt "int n" --num-tokens $n --seed 5 --state-out "$tmp/state" 2> /dev/null
        $s --state-in "$tmp/state" --num-tokens $((200 - n)) --seed 5 2> /dev/null
    } | cmp -s - "$tmp/whole"
    verdict $? "interrupted after $n tokens: the same text"
done
{ $s --prompt "int" --num-tokens 0 --state-out "$tmp/state" && $s --state-in "$tmp/state" --prompt " n" --num-tokens 200 --seed 5; } \
    2> /dev/null | cmp -s - "$tmp/whole"
verdict $? "a prompt in two pieces: the same text"

# 128 bytes predicted from an empty state are the one validation window of a file of 129 bytes
head -c 129 megalodon.c > "$tmp/text"
$s --score "$tmp/text" > "$tmp/score" 2> /dev/null
nats=$(./train --threads 1 --init "$tmp/run" --val-data "$tmp/text" --eval --seq-len 128 | sed -n 's/^val loss \([0-9.]*\) nats.*/\1/p')
awk -v nats="$nats" '$1 == "all" { d = $3 * log(2) - nats; ok = $2 == 128 && nats > 0 && d < 1e-4 && d > -1e-4 } END { exit !ok }' "$tmp/score"
verdict $? "the score of 129 bytes is the loss of ./train --eval"
$s --score megalodon.c > "$tmp/score" 2> /dev/null
awk 'NR > 1 && $1 != "all" { n += $4; bits += $4 * $5 } $1 == "all" { d = bits / n - $3; ok = n == $2 && d < 1e-3 && d > -1e-3 }
     END { exit !ok }' "$tmp/score" && [ "$(awk '$1 == "all" { print $2 + 1 }' "$tmp/score")" -eq "$(wc -c < megalodon.c)" ]
verdict $? "a longer file's ranges add up to the whole"

head -c 1000 "$tmp/state" > "$tmp/short"
printf 'x' > "$tmp/one"
: > "$tmp/empty"
refused 2 "--model is needed"
refused 1 "$tmp/none" --model "$tmp/none"
refused 1 "truncated\|cut short\|ends after" --model "$tmp/run" --state-in "$tmp/short"
refused 1 "no configuration\|is none that" --model "$tmp/run" --state-in tests/data/released_a.expect.safetensors
refused 1 "tensor" --model tests/data/released_a.expect.safetensors
refused 2 "exclude each other" --model "$tmp/run" --prompt a --prompt-file "$tmp/prompt"
refused 2 "--score" --model "$tmp/run" --score "$tmp/text" --prompt a
refused 2 "--top-p 1.5" --model "$tmp/run" --top-p 1.5
refused 2 "--temperature hot" --model "$tmp/run" --temperature hot
refused 1 "--prompt is empty" --model "$tmp/run" --prompt ""
refused 1 "byte 120" --model tests/data/jax_tied.init.safetensors --prompt x
refused 1 "nothing to predict" --model "$tmp/run" --score "$tmp/one"
refused 1 "empty" --model "$tmp/run" --score "$tmp/empty"
if [ -c /dev/full ]; then
    $s --num-tokens 5 > /dev/full 2> "$tmp/err"
    [ $? -eq 1 ] && grep -q stdout "$tmp/err"
    verdict $? "a full disk behind stdout is an error"
fi

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
