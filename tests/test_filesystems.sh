# Data files that are truncated while ./train reads them, and file systems that lack calls: what is trained, saved and
# said. Run from the repository's root.
preload=$PWD/tests/preload.c
. tests/check.sh
cd "$folder" || exit 1

quiet() { "$train" --threads 1 "$@" > quiet.out 2> quiet.err; }
said() { cat quiet.err; [ "$(grep -c -F -e "$1" quiet.err)" -eq "$2" ]; } # TEXT TIMES

small="--model-dim 16 --num-layers 1 --z-dim 8 --value-dim 16 --num-heads 2 --ffn-hidden-dim 16 --cema-ndim 2
       --chunk-size 8 --norm-num-groups 4 --data text --batch-size 2 --seq-len 16 --warmup 3 --val-batches 2"
awk 'BEGIN { for (i = 0; i < 3000; i++) printf "%d squared is %d\n", i, i * i }' > text
bytes=$(wc -c < text)

# ---------------------------------------------------------------- truncation

truncated() { # SIZE DIR OPTIONS...: ./train must end by itself once its data are cut to that size
    size=$1 dir=$2
    shift 2
    cp text cut
    rm -f cut.csv
    "$train" --threads 1 $small --data cut --out "$dir" --steps 1000000 --val-every 0 --save-every 5 --log cut.csv "$@" \
        > quiet.out 2> quiet.err &
    process=$!
    tries=0
    until [ "$(ls "$dir" 2> /dev/null | grep -c step-)" -ge 2 ] || [ $tries -gt 400 ]; do sleep 0.05 && tries=$((tries + 1)); done
    dd if=/dev/null of=cut bs=1 seek="$size" 2> /dev/null # truncates
    tries=0
    while kill -0 $process 2> /dev/null && [ $tries -le 400 ]; do sleep 0.05 && tries=$((tries + 1)); done
    kill $process 2> /dev/null
    wait $process
    [ $? -eq 1 ]
}
for case in "1000 none" "$((bytes - 1)) last" "5000 carry --carry-state" "5000 eot --eot 10"; do
    check "data cut to ${case%% *} bytes end the run with status 1" truncated $case
    check "  the message has the old size and the new" said "error: cut: truncated while it was read: $bytes bytes when it was opened, $(wc -c < cut | tr -d ' ') now" 1
    dir=$(echo "$case" | cut -d ' ' -f 2)
    cp text cut
    check "  what was saved loads" quiet --resume "$dir" --steps 1
done

# ---------------------------------------------------------------- formats

printf '\050\002\042\002' > pair # tokens 552, 546
i=0; while [ $i -lt 11 ]; do cat pair pair > twice && mv twice pair; i=$((i + 1)); done
if quiet $small --data pair --vocab-size 600 --steps 1 --out pair-out; then refused=1; else refused=0; fi
check "uint16 tokens without a header are refused" [ $refused -eq 0 ]
check "  with the remedy" said "error: pair: looks like uint16 tokens without a header. Use --data-format uint16" 1
check "  and trained on with --data-format uint16" quiet $small --data pair --vocab-size 600 --data-format uint16 --steps 1 --out pair16
check "    as 2 bytes per token" [ "$(awk '/tokens to train on/ { print $3 + $8 }' quiet.out)" -eq $(($(wc -c < pair) / 2)) ]
check "  and resumed with it" quiet --resume pair16 --steps 2

# ---------------------------------------------------------------- file systems

if ldd "$train" 2> /dev/null | grep -q 'lib[at]san' || ! ${CC:-cc} -shared -fPIC -o preload.so "$preload" 2> /dev/null; then
    echo "skipped: file systems that lack calls (sanitizers have their own, or no shared library can be built)"
else
    check "a run" quiet $small --steps 6 --save-every 2 --out whole
    check "  without warnings" said warning 0
    lacking() { ( export LD_PRELOAD="$folder/preload.so" "$1=1"; shift; quiet "$@" ) }
    check "where files cannot be mapped, a run" lacking NO_MMAP $small --steps 6 --save-every 2 --out unmapped
    check "  warns once" said "warning: text: its file system cannot map files" 1
    check "  saves the same" cmp whole/step-00000006/model.safetensors unmapped/step-00000006/model.safetensors
    check "where folders cannot be synced, a run" lacking NO_FOLDER_SYNC $small --steps 6 --save-every 2 --out unsynced
    check "  warns once" said "its file system cannot sync directories" 1
    check "  saves the same" cmp whole/step-00000006/model.safetensors unsynced/step-00000006/model.safetensors
    check "where there are no locks, a run" lacking NO_FLOCK $small --steps 6 --save-every 2 --out unlocked
    check "  warns once" said "warning: unlocked/lock: this file system has no locks" 1
    check "  saves the same" cmp whole/step-00000006/model.safetensors unlocked/step-00000006/model.safetensors
fi

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
