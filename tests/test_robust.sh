# Runs that are killed while they save, disks that are full, streams that are closed: nothing that was saved is lost.
# From the repository's root: sh tests/test_robust.sh [KILLS]
kills=${1:-15}
train=$PWD/train sample=$PWD/sample compare=$PWD/compare
folder=$(mktemp -d)
disk=
trap 'if [ -n "$disk" ]; then umount "$disk"; fi; rm -rf "$folder"' EXIT
cd "$folder" || exit 1
passed=0 failed=0

verdict() { # STATUS TEXT
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)) word=ok; else failed=$((failed + 1)) word=FAIL; fi
    printf '%-4s  %s\n' $word "$2"
    [ "$1" -eq 0 ] || tail -n 3 err | sed 's/^/      /'
}
awk 'BEGIN { for (i = 0; i < 600; i++) printf "%d squared is %d\n", i, i * i }' > text
small="--threads 1 --model-dim 16 --num-layers 2 --z-dim 8 --value-dim 16 --num-heads 2 --ffn-hidden-dim 16 --cema-ndim 2
       --chunk-size 8 --norm-num-groups 4 --data text --batch-size 2 --seq-len 16 --carry-state --val-every 0"
newest() { ls -d "$1"/step-*[0-9] | tail -n 1 | sed 's/.*step-0*//'; }

# ---------------------------------------------------------------- SIGKILL

"$train" $small --out run --steps 2 > out 2> err
verdict $? "a run to be killed"
loaded=0 during=0 lost=0 rubbish=0
delays=$(awk -v n="$kills" 'BEGIN { srand(7); for (i = 0; i < n; i++) printf "%.3f ", 0.02 + 0.15 * rand() }')
for delay in $delays; do
    "$train" --resume run --threads 1 --steps 1000000 --save-every 1 > out 2> err &
    sleep "$delay"
    kill -9 $!
    wait $! 2> /dev/null
    if ls run | grep -q tmp; then during=$((during + 1)); fi
    before=$(newest run)
    "$train" --resume run --threads 1 --steps $((before + 1)) --save-every 1 > out 2> err && loaded=$((loaded + 1))
    [ "$(newest run)" -eq $((before + 1)) ] || lost=$((lost + 1)) # it went on from the newest, or from the one before
    if ls run run/step* | grep -q tmp; then rubbish=$((rubbish + 1)); fi
done
[ $loaded -eq "$kills" ]
verdict $? "killed $kills times, up to step $before: $loaded times the run went on"
[ $lost -eq 0 ] && [ $rubbish -eq 0 ]
verdict $? "  from where it was; nothing unfinished stays"
[ $during -gt 0 ]
verdict $? "  $during of the kills came while it saved"
"$sample" --model run --threads 1 --num-tokens 3 > out 2> err
verdict $? "  the last checkpoint writes text"

# ---------------------------------------------------------------- numbers that no model has

last=$(newest run)
damage() { # FILE BYTES BEFORE_END: a copy of the run with other bytes in that file of its newest checkpoint
    rm -rf bad && cp -r run bad
    file=$(ls bad/step-*/"$1" | tail -n 1)
    printf "$2" | dd of="$file" bs=1 conv=notrunc seek=$(($(wc -c < "$file") - $3)) 2> /dev/null
}
damage model.safetensors '\000\000\300\177' 4
"$sample" --model bad --threads 1 --num-tokens 3 > out 2> err
[ $? -eq 1 ] && grep -q "tensor 'output.output.weight' is not finite at element" err
verdict $? "a weight that is NaN is refused, with its tensor"
"$train" --resume bad --threads 1 --steps $((last + 1)) > out 2> err && grep -q "skipped a damaged checkpoint.*'output.output.weight' is not finite" err
verdict $? "  a run goes on from the checkpoint before"
damage optimizer.safetensors '\000\000\200\277' 28
"$train" --resume bad --threads 1 --steps $((last + 1)) > out 2> err && grep -q "skipped a damaged checkpoint.*'moment2.output.output.weight' is negative" err
verdict $? "  so it does if a mean square is negative"
damage state-0.safetensors '\000\000\200\377' 12
"$train" --resume bad --threads 1 --steps $((last + 1)) > out 2> err && grep -q "skipped a damaged checkpoint.*state-0.safetensors: tensor 'state.h'" err
verdict $? "  or a state infinite"

# ---------------------------------------------------------------- a full disk

mkdir disk
if mount -t tmpfs -o size=200k none disk 2> /dev/null; then
    disk=$folder/disk
    echo "      a full disk is a tmpfs of 200 KB here"
    full() { "$@"; }
    "$train" $small --out disk/run --steps 1 > out 2> err
    verdict $? "a first checkpoint fits"
else
    echo "      a full disk is a limit of 20 KB on files here: mounting is not allowed"
    "$train" $small --out disk/run --steps 1 > out 2> err
    verdict $? "a first checkpoint"
    full() { (ulimit -f 20; "$@"); } # in blocks of 1024 or 512 bytes
fi
before=$(cat disk/run/step-00000001/*.safetensors | cksum) options=$(cat disk/run/options.txt)
kept() { [ "$(cat disk/run/step-00000001/*.safetensors | cksum)" = "$before" ] && ! ls disk/run | grep -q tmp; }
if [ -n "$disk" ]; then
    cat /dev/zero > disk/filler 2> /dev/null
    "$train" --resume disk/run --threads 1 --steps 3 > out 2> err
    [ $? -eq 1 ] && grep -q 'error: disk/run/options.txt: cannot write: No space left' err && kept && [ "$(cat disk/run/options.txt)" = "$options" ]
    verdict $? "a run on a disk without any space left is refused, and stays as it was"
    head -c 16384 /dev/zero > disk/filler
    while [ "$(df -k disk | awk 'END { print $4 }')" -gt 16 ]; do head -c 4096 /dev/zero >> disk/filler; done
fi
full "$train" --resume disk/run --threads 1 --steps 3 --save-every 1 > out 2> err
[ $? -eq 1 ] && grep -q -E 'error: disk/run/step-0000000.*: (No space left|File too large)' err
verdict $? "training onto a full disk ends with an error that names the file"
kept
verdict $? "  the checkpoint before is as it was, and nothing unfinished stays"
"$sample" --model disk/run --threads 1 --num-tokens 3 > out 2> err
verdict $? "  and loads"
full "$train" $small --steps 1 --dump disk/dump > out 2> err
[ $? -eq 1 ] && grep -q -E -e '--dump.*disk/dump.*: (No space left|File too large)' err && [ ! -e disk/dump ] && [ ! -e disk/dump.tmp ]
verdict $? "--dump onto a full disk is an error and leaves no half file"
if [ -n "$disk" ]; then cat /dev/zero > disk/filler 2> /dev/null; fi
(ulimit -f 4; "$sample" --model run --threads 1 --num-tokens 3 --state-out disk/state > out 2> err)
[ $? -eq 1 ] && grep -q -E -e '--state-out.*disk/state.*: (No space left|File too large)' err && [ ! -e disk/state ]
verdict $? "--state-out onto a full disk is an error and leaves no half file"
if [ -c /dev/full ]; then
    "$train" $small --out log --steps 2 --log /dev/full > out 2> err
    [ $? -eq 1 ] && grep -q -e '--log /dev/full' err
    verdict $? "--log onto a full disk is an error"
    "$train" --init run --data text --seq-len 16 --batch-size 1 --val-batches 1 --eval > /dev/full 2> err
    [ $? -eq 1 ] && grep -q stdout err
    verdict $? "--eval whose result cannot be written is an error"
    "$sample" --model run --threads 1 --score text > /dev/full 2> err
    [ $? -eq 1 ] && grep -q stdout err
    verdict $? "--score whose result cannot be written is an error"
    model=$(ls run/step-*/model.safetensors | tail -n 1)
    "$compare" "$model" "$model" > /dev/full 2> err
    [ $? -eq 2 ] && grep -q stdout err
    verdict $? "compare's result that cannot be written is an error"
fi

# ---------------------------------------------------------------- closed and broken streams

"$train" $small --out closed --steps 3 >&- 2>&- <&-
[ $? -eq 0 ] && [ "$(newest closed)" -eq 3 ] && "$sample" --model closed --threads 1 --num-tokens 3 > out 2> err
verdict $? "all streams closed: the run is saved, and no message stands in its files"
{ "$train" $small --out pipe --steps 300; echo $? > status; } 2> err | head -n 1 > out
[ "$(cat status)" -eq 0 ] && [ "$(newest pipe)" -eq 300 ]
verdict $? "the reader of the progress has ended: the run goes on"
"$sample" --model run --threads 1 --num-tokens 5 >&- 2> err
[ $? -le 1 ]
verdict $? "sample without a stdout does not crash"

# ---------------------------------------------------------------- data of 3 GB, which take no space on the disk

if dd if=text of=large bs=1 seek=3221225472 2> /dev/null; then
    "$train" $small --data large --out large.run --steps 2 --val-every 2 --val-batches 1 > out 2> err && grep -q '28991[0-9]* tokens to train on' out
    verdict $? "data of 3 GB: trained on"
    "$train" --init large.run --data large --seq-len 16 --threads 1 --val-batches 1 --eval > out 2> err
    verdict $? "  and measured"
    rm large
else
    echo "      skipped: no file of 3 GB can be made"
fi

# ---------------------------------------------------------------- what is no file to read

mkdir folder && mkfifo fifo && printf x > unreadable && chmod 000 unreadable
for bad in folder fifo; do
    timeout 10 "$train" $small --data $bad --out x < /dev/null > out 2> err
    [ $? -eq 1 ] && grep -q "$bad: not a regular file" err
    verdict $? "--data $bad is refused"
done
for option in init config batch; do
    for bad in folder fifo; do
        [ $option$bad != configfifo ] || continue # is read: --config <(...) is of use
        timeout 10 "$train" --threads 1 --out x --$option $bad > out 2> err
        [ $? -eq 1 ] && grep -q "error: .*$bad" err
        verdict $? "--$option $bad is refused"
    done
done
"$train" $small --steps 1 --dump fifo > out 2> err
[ $? -eq 1 ] && grep -q "fifo: cannot write: not a regular file" err && [ -p fifo ]
verdict $? "--dump onto what is no file, as /dev/null, does not replace it"
"$train" $small --out text > out 2> err
[ $? -eq 1 ] && grep -q "error: --out text" err
verdict $? "--out that is a file is refused"
if [ "$(id -u)" -ne 0 ]; then # root may read everything
    "$train" $small --data unreadable --out x > out 2> err
    [ $? -eq 1 ] && grep -q "unreadable: Permission denied" err
    verdict $? "an unreadable file is refused"
fi

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
