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
sleep 5 | ./sample --model "$tmp/run" --threads 1 --prompt-file - --state-out "$tmp/never" > "$tmp/log" 2> "$tmp/err" &
sleep 1 && kill -TERM $! && wait $! 2> /dev/null
[ $? -eq 143 ] && [ ! -e "$tmp/never" ]
verdict $? "SIGTERM while a prompt is awaited ends ./sample at once"
# --temperature 1.5, so that no two texts are alike; a later --temperature overrides it
export LC_ALL=C
s="./sample --model $tmp/run --threads 1 --temperature 1.5 --top-p 1"

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

[ "$($s --prompt x --num-tokens 50 --temperature 0 2> /dev/null)" = "$($s --prompt x --num-tokens 50 --min-p 1 --top-p 1 2> /dev/null)" ]
verdict $? "temperature 0 is min-p 1"

# samples: a line, the prompt and 200 bytes each, with a line break between
$s --prompt "int n" --num-tokens 200 --seed 5 --num-samples 4 > "$tmp/four" 2> "$tmp/err"
[ "$(wc -c < "$tmp/four")" -eq $((4 * 205 + 4 * 19 + 3)) ] && grep -q 'read 5 tokens, .* wrote 800,' "$tmp/err"
verdict $? "four samples of 200 bytes, the prompt read once"
one_of() { tail -c +$((($1 - 1) * (205 + 20) + 20)) "$tmp/four" | head -c 205; }
one_of 1 | cmp -s - "$tmp/whole"
verdict $? "the first of four samples is the single one"
different=0
for r in 2 3 4; do
    [ "$(tail -c +$((($r - 1) * (205 + 20) + 1)) "$tmp/four" | head -n 1)" = "---- sample $r of 4" ] && ! one_of $r | cmp -s - "$tmp/whole" && different=$((different + 1))
done
[ $different -eq 3 ]
verdict $? "the others are other texts, each under its line"
head -c 300 megalodon.h > "$tmp/long" # in calls of 2048 / 64 tokens
$s --prompt-file "$tmp/long" --num-tokens 20 > "$tmp/single" 2> /dev/null
$s --prompt-file "$tmp/long" --num-tokens 20 --num-samples 64 2> /dev/null | tail -c +21 | head -c 320 | cmp -s - "$tmp/single"
verdict $? "a prompt that 64 samples read in several calls: the same text"

# across a chunk's border (64 tokens) and within a chunk
for n in 1 59 100; do
    {
        $s --prompt "int n" --num-tokens $n --seed 5 --state-out "$tmp/state" 2> /dev/null
        $s --state-in "$tmp/state" --num-tokens $((200 - n)) 2> /dev/null
    } | cmp -s - "$tmp/whole"
    verdict $? "interrupted after $n tokens: the same text, the seed comes from the state"
done
$s --state-in "$tmp/state" --num-tokens 100 --seed 5 2> /dev/null > "$tmp/same"
$s --state-in "$tmp/state" --num-tokens 100 --seed 6 --state-out "$tmp/other.state" 2> "$tmp/err" > "$tmp/other"
tail -c 100 "$tmp/whole" | cmp -s - "$tmp/same" && ! cmp -s "$tmp/same" "$tmp/other" && grep -q "seed 6" "$tmp/err"
verdict $? "--seed goes before the state's"
$s --state-in "$tmp/other.state" --num-tokens 0 2>&1 | grep -q "seed 6"
verdict $? "and is the next state's"
$s --prompt "int n" --num-tokens 90 --seed 5 --num-samples 4 --state-out "$tmp/state4" > "$tmp/half1" 2> /dev/null
$s --state-in "$tmp/state4" --num-tokens 110 > "$tmp/half2" 2> /dev/null
same=0
for r in 1 2 3 4; do
    {
        tail -c +$((($r - 1) * (95 + 20) + 20)) "$tmp/half1" | head -c 95
        tail -c +$((($r - 1) * (110 + 20) + 20)) "$tmp/half2" | head -c 110
    } > "$tmp/halves"
    one_of $r | cmp -s - "$tmp/halves" && same=$((same + 1))
done
[ $same -eq 4 ]
verdict $? "four samples interrupted: the same texts"
{ $s --prompt "int" --num-tokens 0 --state-out "$tmp/state" && $s --state-in "$tmp/state" --prompt " n" --num-tokens 200 --seed 5; } \
    2> /dev/null | cmp -s - "$tmp/whole"
verdict $? "a prompt in two parts: the same text"

# --eot: the text up to the first space (token 32) that is drawn; it begins with none here
prefix() { # file: a prefix of another one, without a space, which comes next there
    size=$(wc -c < "$1")
    cmp -s -n "$size" "$1" "$2" && ! tail -c +6 "$1" | grep -q ' ' && [ "$(tail -c +$((size + 1)) "$2" | head -c 1)" = " " ]
}
$s --prompt "int n" --num-tokens 200 --seed 5 --eot 32 --bos -1 > "$tmp/eot" 2> /dev/null
prefix "$tmp/eot" "$tmp/whole"
verdict $? "--eot ends the text before that token, but not in the prompt"
$s --prompt "int n" --num-tokens 200 --seed 5 --eot 32 --bos -1 --num-samples 4 --state-out "$tmp/state4" > "$tmp/eot4" 2> "$tmp/err"
ended=0
for r in 1 2 3 4; do
    from=$(sed -n "/^---- sample $r of 4\$/=" "$tmp/eot4") to=$(sed -n "/^---- sample $((r + 1)) of 4\$/=" "$tmp/eot4")
    tail -n "+$from" "$tmp/eot4" | tail -c +20 > "$tmp/eot"
    if [ -n "$to" ]; then # up to the line break before the next one's line
        head -n $((to - 1)) "$tmp/eot4" | tail -n "+$from" | tail -c +20 > "$tmp/part"
        head -c $(($(wc -c < "$tmp/part") - 1)) "$tmp/part" > "$tmp/eot"
    fi
    one_of $r > "$tmp/full"
    prefix "$tmp/eot" "$tmp/full" && ended=$((ended + 1))
done
[ $ended -eq 4 ]
verdict $? "each of four samples ends where it would alone"
$s --state-in "$tmp/state4" --num-tokens 50 --eot 32 2>&1 | grep -q "wrote 0,"
verdict $? "samples that have ended stay so in the state, however long the others went on"
$s --eot 10 --num-tokens 0 2>&1 | grep -q "read 1 tokens" && $s --eot 10 --bos 7 --prompt "a
b" --num-tokens 0 2> "$tmp/err" | od -c | grep -q 'a *.n *b *$' && grep -q "read 4 tokens" "$tmp/err"
verdict $? "without a prompt --eot is the start; --bos goes before one, and neither is written"
$s --eot 10 --prompt "" --num-tokens 5 2>&1 | grep -a -q "read 1 tokens" && $s --prompt "int n" --bos -1 --eot 10 --num-tokens 0 2>&1 | grep -q "read 5 tokens"
verdict $? "--eot is the start of an empty prompt, too; --bos -1 is none"
$s --prompt "int n" --eot 32 --num-tokens 30 > "$tmp/eot" 2> "$tmp/err"
$s --prompt "int n" --eot 32 --bos 32 --num-tokens 30 2> /dev/null | cmp -s - "$tmp/eot" && grep -q "read 6 tokens" "$tmp/err"
verdict $? "a prompt begins with --eot's token, as rows do in training"
$s --prompt "int" --eot 32 --num-tokens 0 --state-out "$tmp/eot.state" > "$tmp/part" 2> /dev/null
$s --state-in "$tmp/eot.state" --prompt " n" --eot 32 --num-tokens 30 --seed 1337 >> "$tmp/part" 2> "$tmp/err"
cmp -s "$tmp/part" "$tmp/eot" && grep -q "read 2 tokens" "$tmp/err"
verdict $? "but not what goes on from a state"

(printf 'int'; sleep 0.3; printf ' n') | $s --prompt-file - --num-tokens 200 --seed 5 2> /dev/null | cmp -s - "$tmp/whole"
verdict $? "--prompt-file - reads a pipe that delivers parts"

# signals and broken outputs
$s --prompt "int n" --num-tokens 1000000 --seed 5 --state-out "$tmp/state" > "$tmp/part" 2> "$tmp/err" &
pid=$!
while kill -0 $pid 2> /dev/null && [ "$(wc -c < "$tmp/part")" -lt 100 ]; do sleep 0.1; done
kill -INT $pid
wait $pid
[ $? -eq 130 ] && size=$(wc -c < "$tmp/part") && $s --state-in "$tmp/state" --num-tokens 100 >> "$tmp/part" 2> /dev/null &&
    $s --prompt "int n" --num-tokens $((size + 95)) --seed 5 2> /dev/null | cmp -s - "$tmp/part"
verdict $? "SIGINT with --state-out: status 130, and the state goes on exactly"
$s --num-tokens 1000000 2> "$tmp/err" | head -c 20 > /dev/null
! grep -v -e "Broken pipe" "$tmp/err" | grep -q . # which it says where SIGPIPE is ignored
verdict $? "a reader that has enough ends it quietly"
for task in "--num-tokens 5" "--num-tokens 5 --num-samples 2" "--score $tmp/prompt"; do
    $s $task >&- 2> "$tmp/err"
    [ $? -eq 1 ] && grep -q stdout "$tmp/err"
    verdict $? "a closed stdout is an error: $task"
    [ -c /dev/full ] || continue
    $s $task > /dev/full 2> "$tmp/err"
    [ $? -eq 1 ] && grep -q stdout "$tmp/err"
    verdict $? "stdout on a full disk is an error: $task"
done

# A tokenizer of 265 tokens: <unk> <s> </s>, the bytes, a few pieces. Each is a float score, an int length, its bytes.
piece() { printf "\\000\\000$1\\$(printf %03o ${#2})\\000\\000\\000%s" "$2"; }
{
    printf '\006\000\000\000'
    for name in "<unk>" "<s>" "</s>"; do piece '\000\000' "$name"; done
    byte=0
    while [ $byte -lt 256 ]; do piece '\000\000' "$(printf '<0x%02X>' $byte)" && byte=$((byte + 1)); done
    for name in t h e " " th " th"; do piece '\200\277' "$name"; done # scores -1
} > "$tmp/tokenizer.bin"
./train --threads 1 --steps 2 --batch-size 2 --seq-len 64 --val-every 0 --vocab-size 265 --data megalodon.h --out "$tmp/run265" > "$tmp/log" 2>&1
t="./sample --model $tmp/run265 --threads 1 --tokenizer $tmp/tokenizer.bin"
printf 'the then' > "$tmp/the"
$t --prompt "the then" --num-tokens 0 2> "$tmp/err" | cmp -s - "$tmp/the" && grep -q "read 5 tokens" "$tmp/err" # " th" e " th" e <0x6E>
verdict $? "--tokenizer: the prompt as tokens and back"
$t --prompt "the then" --bos 1 --num-tokens 0 2> "$tmp/err" | cmp -s - "$tmp/the" && grep -q "read 6 tokens" "$tmp/err"
verdict $? "--bos 1 before it"
$t --num-tokens 20 2>&1 | grep -a -q "read 1 tokens"
verdict $? "without a prompt <s> is the start"
$t --score "$tmp/the" > "$tmp/score" 2> /dev/null
awk '$1 == "all" { d = $2 * $3 / $10 - $5; ok = $2 == 4 && $10 == 6 && d < 1e-3 && d > -1e-3 } END { exit !ok }' "$tmp/score"
verdict $? "--score: bits per token, and per byte of those that are predicted"
$t --score "$tmp/the" --bos 1 > "$tmp/score" 2> /dev/null
awk '$1 == "all" { d = $2 * $3 / $10 - $5; ok = $2 == 5 && $10 == 8 && d < 1e-3 && d > -1e-3 } END { exit !ok }' "$tmp/score"
verdict $? "--bos predicts all of them"

$t --prompt "the th" --num-tokens 0 --state-out "$tmp/t.state" > "$tmp/part" 2> /dev/null
$t --state-in "$tmp/t.state" --prompt "en" --num-tokens 20 --seed 3 >> "$tmp/part" 2> "$tmp/err"
$t --prompt "the then" --num-tokens 20 --seed 3 2> /dev/null | cmp -s - "$tmp/part" && grep -a -q "read 2 tokens" "$tmp/err"
verdict $? "a prompt after --state-in goes on within the word: the same tokens, the same text"

# models of small vocabularies, on a text whose documents are all the same
small="--threads 1 --num-layers 1 --model-dim 32 --num-heads 1 --z-dim 16 --value-dim 32 --ffn-hidden-dim 32 --cema-ndim 2
       --chunk-size 16 --norm-num-groups 4 --val-every 0 --val-data tests/data/tokenizer.txt"
byte() { printf "\\$(printf %03o "$1")"; }
token_file() { # NUMBERS, a line each: a .bin file; only its shell is needed
    set -- $(cat)
    printf '\210\330\064\001\001\000\000\000'
    byte $(($# % 256)); byte $(($# / 256)); printf '\000\000'
    head -c 1012 /dev/zero
    for n; do byte $((n % 256)); byte $((n / 256)); done
}
i=0
while [ $i -lt 40 ]; do echo 256; printf 'Hello world.\n' | od -An -v -tu1 | tr -s ' ' '\n' | sed '/^$/d'; i=$((i + 1)); done > "$tmp/numbers"
echo 256 >> "$tmp/numbers"
token_file < "$tmp/numbers" > "$tmp/hello.bin"
head -c 512 "$tmp/hello.bin" > "$tmp/hello.val"
train257() { ./train $small --data "$tmp/hello.bin" --val-data "$tmp/hello.bin" --eot 256 --batch-size 4 --seq-len 16 --lr 1e-2 "$@" > "$tmp/log" 2>&1; }
train257 --vocab-size 257 --steps 60 --out "$tmp/run257"
verdict $? "a model of bytes and an EOT of its own"
printf 'Hello world.\n' > "$tmp/hello"
b="./sample --model $tmp/run257 --threads 1"
$b --eot 256 --temperature 0 --num-tokens 50 2> "$tmp/err" | cmp -s - "$tmp/hello" && grep -q "read 1 tokens.* wrote 13," "$tmp/err"
verdict $? "it writes a document from EOT to EOT"
$b --eot 256 --temperature 0 --prompt "Hello wo" --num-tokens 50 2> "$tmp/err" | cmp -s - "$tmp/hello" && grep -q "read 9 tokens.* wrote 5," "$tmp/err"
verdict $? "  goes on with a prompt, before which the EOT stands"
[ "$($b --temperature 100 --top-p 1 --num-tokens 1000 --prompt x 2> "$tmp/err" | wc -c)" -eq 1001 ] && grep -q "wrote 1000," "$tmp/err"
verdict $? "  and without --eot never draws it: 1000 tokens are 1000 bytes"
$b --score "$tmp/hello" --eot 256 > "$tmp/score" 2> /dev/null && grep -q "bits per byte$" "$tmp/score" &&
    awk '$1 == "all" { ok = $2 == 13 && $3 < 0.5 } END { exit !ok }' "$tmp/score"
verdict $? "--score --eot predicts each byte, the first from the EOT, in bits per byte"
$b --score "$tmp/hello" --eot 256 --bos -1 > "$tmp/score" 2> /dev/null && awk '$1 == "all" { ok = $2 == 12 } END { exit !ok }' "$tmp/score"
verdict $? "  --bos -1: all but the first"
$b --score "$tmp/hello.bin" --eot 256 > "$tmp/score" 2> /dev/null && grep -q "bits per token$" "$tmp/score" &&
    awk '$1 == "all" { d = $2 * $3 - $5 * $10; ok = $2 == 560 && $10 == 520 && d < 0.1 && d > -0.1 } END { exit !ok }' "$tmp/score"
verdict $? "  a file with EOTs: bits per token, and per byte of the 520 that are bytes; its first EOT is not doubled"
train257 --vocab-size 320 --steps 1 --out "$tmp/run320" && ./sample --model "$tmp/run320" --threads 1 --eot 256 --temperature 100 \
    --top-p 1 --num-tokens 50 --num-samples 64 > "$tmp/many" 2> "$tmp/err"
wrote=$(sed -n 's/.* wrote \([0-9]*\),.*/\1/p' "$tmp/err")
[ "$(wc -c < "$tmp/many")" -eq $((wrote + 9 * 20 + 55 * 21 + 63)) ] && [ "$wrote" -lt 3200 ]
verdict $? "a vocabulary of bytes padded to 320: $wrote tokens, all of them bytes"
./sample --model "$tmp/run320" --threads 1 --tokenizer "$tmp/tokenizer.bin" --prompt t --temperature 100 --top-p 1 --num-tokens 1000 2> "$tmp/err" > "$tmp/many"
grep -q "265 tokens; the model's other 55 are taken for padding" "$tmp/err" && [ "$(wc -c < "$tmp/many")" -gt 950 ]
verdict $? "padded beyond a tokenizer's 265: padding, which has no text, is not drawn: $(wc -c < "$tmp/many") bytes of 1000 tokens"
./train $small --vocab-size 600 --steps 1 --batch-size 2 --seq-len 16 --data megalodon.h --out "$tmp/run600" > "$tmp/log" 2>&1
./sample --model "$tmp/run600" --threads 1 --score "$tmp/hello" 2> /dev/null | grep -q "bits per token$"
verdict $? "--score of a model of tokens without its tokenizer: bits per token"
refused 1 "not bytes.*--tokenizer.*--eot N, from 256 to 319" --model "$tmp/run320"
refused 1 "not bytes.*--tokenizer FILE$" --model "$tmp/run600" --eot 256

# --prompt-file -: a pipe of more than one buffer, with every byte
head -c 70000 sample > "$tmp/binary"
$b --prompt-file "$tmp/binary" --num-tokens 5 > "$tmp/from.file" 2> "$tmp/err"
cat "$tmp/binary" | $b --prompt-file - --num-tokens 5 2> "$tmp/err" | cmp -s - "$tmp/from.file" && grep -q "read 70000 tokens" "$tmp/err" &&
    [ "$(wc -c < "$tmp/from.file")" -eq 70005 ] && cmp -s -n 70000 "$tmp/from.file" "$tmp/binary"
verdict $? "--prompt-file - reads 70000 bytes of any value from a pipe"

# --state-out is refused before anything is written, and nothing is lost
model=$(ls "$tmp"/run257/step-*/model.safetensors)
optimizer=$(ls "$tmp"/run257/step-*/optimizer.safetensors)
$b --num-tokens 3 --state-out "$tmp/old.state" > /dev/null 2>&1
ln -s "$model" "$tmp/link" && ln "$tmp/old.state" "$tmp/hard" && cp "$tmp/hello" "$tmp/text.txt"
sums() { cat "$model" "$optimizer" "$tmp/old.state" "$tmp/tokenizer.bin" "$tmp/hello" "$tmp/text.txt" tests/data/jax_tied.init.safetensors | cksum; }
before=$(sums)
spared() { # status, word, arguments
    status=$1 word=$2
    shift 2
    ./sample --threads 1 --num-tokens 3 "$@" > "$tmp/out" 2> "$tmp/err" < /dev/null
    [ $? -eq "$status" ] && grep -q -e "$word" "$tmp/err" && [ ! -s "$tmp/out" ] && [ "$(sums)" = "$before" ]
    verdict $? "nothing written, nothing changed, '$word': sample $*"
}
spared 2 "is the file that --model reads; give another name" --model "$model" --state-out "$model"
spared 2 "is the file that --model reads" --model "$tmp/run257" --state-out "$tmp/link"
spared 2 "is the file that --state-in reads; give another name" --model "$tmp/run257" --state-in "$tmp/old.state" --state-out "$tmp/old.state"
spared 2 "is the file that --state-in reads" --model "$tmp/run257" --state-in "$tmp/old.state" --state-out "$tmp/hard"
spared 2 "is the file that --prompt-file reads" --model "$tmp/run257" --prompt-file "$tmp/hello" --state-out "$tmp/hello"
spared 2 "is the file that --tokenizer reads" --model "$tmp/run265" --tokenizer "$tmp/tokenizer.bin" --state-out "$tmp/tokenizer.bin"
spared 1 "exists and is not a state of ./sample" --model "$tmp/run257" --state-out "$tmp/text.txt"
spared 1 "exists and is not a state of ./sample" --model "$tmp/run257" --state-out "$optimizer"
spared 1 "--state-out $tmp/none/state: cannot write" --model "$tmp/run257" --state-out "$tmp/none/state"
spared 1 "not a regular file" --model "$tmp/run257" --state-out "$tmp"
spared 2 "not the name of a file" --model "$tmp/run257" --state-out ""
[ ! -e "$tmp/none" ] && ! ls "$tmp" | grep -q 'tmp$'
verdict $? "  and no file is left"
(ulimit -f 1; $b --num-tokens 20 --state-out "$tmp/old.state" 2> "$tmp/err") | cat > "$tmp/out"
[ "$(wc -c < "$tmp/out")" -ge 20 ] && grep -q -e '--state-out.*File too large' "$tmp/err" && [ "$(sums)" = "$before" ] && [ ! -e "$tmp/old.state.tmp" ]
verdict $? "a full disk at the end: the text is there, an error says so, and the older state is as it was"
$b --num-tokens 5 --state-out "$tmp/old.state" > /dev/null 2>&1 && $b --state-in "$tmp/old.state" --num-tokens 1 2>&1 | grep -a -q "wrote 1,"
verdict $? "an older state is replaced"

# plans of memory come before it is taken
start=$(date +%s)
./train $small --vocab-size 256 --chunk-size 16384 --value-dim 1024 --num-layers 4 --steps 1 --batch-size 1 --seq-len 16 --data megalodon.h --out "$tmp/wide" > "$tmp/log" 2>&1
verdict $? "a model that remembers 260 MiB of each text"
refused 1 "2048 samples: .* MiB, 260 MiB for each text with its chunk of 16384 tokens.*: use a smaller --num-samples" --model "$tmp/wide" --num-samples 2048
refused 1 "--num-samples 2048 --num-tokens 2000000000: .* needs [0-9]* MiB" --model "$tmp/run257" --num-samples 2048 --num-tokens 2000000000
if dd if=/dev/null of="$tmp/huge" bs=1 seek=1000000000000 2> /dev/null; then
    refused 1 "--prompt-file: 100000000000[01] bytes of text need [0-9]* MiB as tokens" --model "$tmp/run257" --prompt-file "$tmp/huge"
    refused 1 "--score: 1000000000000 bytes of text need [0-9]* MiB as tokens" --model "$tmp/run265" --tokenizer "$tmp/tokenizer.bin" --score "$tmp/huge"
else
    echo "      skipped: no file of 1 TB can be made"
fi
[ $(($(date +%s) - start)) -lt 20 ]
verdict $? "  in no time"

# 128 bytes predicted from an empty state are the one validation window of a file of 129 bytes
head -c 129 megalodon.c > "$tmp/text"
$s --score "$tmp/text" > "$tmp/score" 2> /dev/null
nats=$(./train --threads 1 --init "$tmp/run" --val-data "$tmp/text" --eval --seq-len 128 | sed -n 's/^val loss \([0-9.]*\) nats.*/\1/p')
awk -v nats="$nats" '$1 == "all" { d = $3 * 0.69314718 - nats; ok = $2 == 128 && nats > 0 && d < 1e-4 && d > -1e-4 } END { exit !ok }' "$tmp/score"
verdict $? "the score of 129 bytes is the loss of ./train --eval"
$s --score megalodon.c > "$tmp/score" 2> /dev/null
awk 'NR > 1 && $1 != "all" { n += $4; bits += $4 * $5 } $1 == "all" { d = bits / n - $3; ok = n == $2 && d < 1e-3 && d > -1e-3 }
     END { exit !ok }' "$tmp/score" && [ "$(awk '$1 == "all" { print $2 + 1 }' "$tmp/score")" -eq "$(wc -c < megalodon.c)" ]
verdict $? "a longer file's ranges add up to the whole"

./sample --threads 1 --num-tokens 40 > "$tmp/text" 2> "$tmp/log"
./sample --threads 1 --num-tokens 40 --model dev/models/plays 2> "$tmp/log" | cmp -s - "$tmp/text" && [ -s "$tmp/text" ]
verdict $? "without --model: the model in dev/models/plays"
./sample --threads 1 --num-tokens 200 > "$tmp/one-thread" 2> "$tmp/log"
./sample --threads 3 --num-tokens 200 2> "$tmp/log" | cmp -s - "$tmp/one-thread"
verdict $? "  writes the same text with three threads"
./sample --threads 3 --num-tokens 200 --num-samples 3 2> "$tmp/log" | sed 1d | head -c "$(wc -c < "$tmp/one-thread")" |
    cmp -s - "$tmp/one-thread"
verdict $? "  writes the same text beside two others"
head -c 3000 dev/data/shakespeare.txt > "$tmp/text"
./sample --score "$tmp/text" > "$tmp/score" 2> "$tmp/log"
awk '$1 == "all" { ok = $2 == 2999 && $3 > 1 && $3 < 1.8 } { print } END { exit !ok }' "$tmp/score" > "$tmp/log"
verdict $? "  predicts the start of Hamlet, which it has read: 1 to 1.8 bits per byte"

head -c 1000 "$tmp/state" > "$tmp/short"
printf 'x' > "$tmp/one"
: > "$tmp/empty"
cp sample "$tmp/alone"
"$tmp/alone" > "$tmp/log" 2>&1
[ $? -eq 1 ] && grep -q "error: .*$tmp/dev/models/plays.*: No such file" "$tmp/log"
verdict $? "refused: a program without the model that it comes with"
refused 1 "$tmp/none" --model "$tmp/none"
refused 1 "cut short" --model "$tmp/run" --state-in "$tmp/short"
refused 1 "state.count" --model "$tmp/run" --state-in tests/data/released_a.expect.safetensors
refused 1 "tensor" --model tests/data/released_a.expect.safetensors
refused 2 "exclude each other" --model "$tmp/run" --prompt a --prompt-file "$tmp/prompt"
refused 2 "--score" --model "$tmp/run" --score "$tmp/text" --prompt a
refused 2 "--top-p 1.5" --model "$tmp/run" --top-p 1.5
refused 2 "--temperature hot" --model "$tmp/run" --temperature hot
refused 1 "--prompt is empty" --model "$tmp/run" --prompt ""
refused 1 "byte 120" --model tests/data/jax_tied.init.safetensors --prompt x
refused 1 "nothing to predict" --model "$tmp/run" --score "$tmp/one"
refused 1 "empty" --model "$tmp/run" --score "$tmp/empty"
refused 1 "another configuration" --model "$tmp/run265" --tokenizer "$tmp/tokenizer.bin" --state-in "$tmp/state4"
refused 2 "num-samples 3 contradicts" --model "$tmp/run" --num-samples 3 --state-in "$tmp/state4"
refused 1 "state-out" --model "$tmp/run" --num-tokens 1 --state-out "$tmp/none/state"
refused 2 "no samples" --model "$tmp/run" --score "$tmp/text" --num-samples 2
refused 1 "tokenizer" --model "$tmp/run265"
refused 1 "none: No such file" --model "$tmp/run" --prompt-file "$tmp/none"
refused 1 "holds token numbers" --model "$tmp/run" --prompt-file "$tmp/hello.bin"
refused 1 "--prompt-file is empty" --model "$tmp/run" --prompt-file "$tmp/empty"
refused 1 "--prompt-file is empty" --model "$tmp/run" --prompt-file -
refused 1 "$tmp/state4" --model "$tmp/run265" --tokenizer "$tmp/state4"
refused 2 "eot 300" --model "$tmp/run" --eot 300
refused 2 "min-p -0.1" --model "$tmp/run" --min-p -0.1

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
