# --segment-len: ./train with sequences in segments against ./train with whole sequences. Every activation and gradient of a
# step, losses and states of many steps, validation, checkpoints, and memory. Run from the repository's root.
double=$PWD/build/double/train
. tests/check.sh
cd "$folder" || exit 1
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive OPENBLAS_NUM_THREADS=1 # so that ./train does not measure the machine first

quiet() { "$train" --threads 1 "$@" > quiet.out 2>&1; }
fails() { ! "$@"; }
same() { cmp "$1/model.safetensors" "$2/model.safetensors" && cmp "$1/optimizer.safetensors" "$2/optimizer.safetensors"; }
columns() { cut -d, -f1-4,7 "$1"; } # all but the times
same_log() { columns "$1" > log1.txt; columns "$2" > log2.txt; cmp log1.txt log2.txt; }
close() { # LOG LOG: steps, losses, norms and validation losses agree to 1e-5
    paste -d, "$1" "$2" | awk -F, 'function far(a, b) { return (a - b) * (a - b) > 1e-10 * b * b }
        NR > 1 && ($1 != $8 || far($2, $9) || far($3, $10) || far($7, $14)) { bad = 1 } END { exit bad || NR < 2 }'
}
val_loss() { sed -n 's/^val loss \([0-9.]*\) .*/\1/p' quiet.out; }

# PROGRAM TOLERANCE N OPTIONS...: does the dump of a run in segments of N tokens equal whole.st?
equal() {
    program=$1 tolerance=$2 n=$3
    shift 3
    rm -f parts.st
    "$program" --threads 1 "$@" --segment-len "$n" --dump parts.st > run.out 2>&1 && grep -q "segments of $n," run.out &&
        "$compare" whole.st parts.st --tolerance "$tolerance" || { cat run.out; false; }
}

model="--model-dim 16 --num-layers 2 --z-dim 8 --value-dim 16 --num-heads 2 --ffn-hidden-dim 16 --cema-ndim 2
       --chunk-size 8 --norm-num-groups 4"
small="$model --data text --batch-size 3 --seq-len 44 --warmup 3 --val-every 0"
awk 'BEGIN { for (i = 0; i < 600; i++) printf "%d squared is %d\n", i, i * i }' > text
awk 'BEGIN { for (i = 0; i < 15000; i++) printf "%d squared is %d\n", i, i * i }' > long

# ---------------------------------------------------------------- one step: every activation, the loss, every gradient

# 44 tokens are five chunks and a half. Segments of 8 are one chunk each; the last one has 4 tokens, as with 40. The last
# segment of 16 has 12 tokens, that of 24 has 20.
drop="--dropout 0.1 --hidden-dropout 0.2 --attention-dropout 0.3"
step() { # NAME OPTIONS...
    name=$1
    shift
    "$double" --threads 1 $small "$@" --steps 1 --dump whole.st > run.out 2>&1
    for n in 8 16 24 40; do
        check "$name: segments of $n of 44 tokens, every tensor to 1e-11, double" equal "$double" 1e-11 $n $small "$@" --steps 1
    done
    "$train" --threads 1 $small "$@" --steps 1 --dump whole.st > run.out 2>&1
    for n in 8 24; do
        check "  segments of $n, to 1e-5, float" equal "$train" 1e-5 $n $small "$@" --steps 1
    done
}
step "three sequences"
step "two batches a step" --batch-size 2 --grad-accum 2
step "dropout" $drop
step "dropout, two batches, recomputing" $drop --batch-size 2 --grad-accum 2 --recompute
step "documents" --eot 10
step "other parameters" --no-swiglu --rescale-nffn --scale-emb --share-emb --no-norm-affine
# A dump is written 256 tokens at a time: rows of 600 tokens in three parts, those of 296 in two
"$double" --threads 1 $small --batch-size 2 --seq-len 600 --steps 1 --dump whole.st > run.out 2>&1
check "600 tokens: segments of 296, every tensor to 1e-11, double" equal "$double" 1e-11 296 $small --batch-size 2 --seq-len 600 --steps 1
"$train" --threads 1 $small --steps 1 --dump whole.st > run.out 2>&1
check "with another seed the dumps differ" fails equal "$train" 1e-5 8 $small --seed 2 --steps 1

"$train" --threads 1 $small --eot 10 --steps 1 --dump batch.st > run.out 2>&1
"$train" --threads 1 $model --batch batch.st --steps 3 --dump whole.st > run.out 2>&1
check "--batch: segments of 16, the third step, to 1e-5" equal "$train" 1e-5 16 $model --batch batch.st --steps 3
"$train" --threads 1 $small $drop --steps 1 --dump whole.st > run.out 2>&1
for n in 44 48 1001 9000000000; do
    check "--segment-len $n of 44 tokens" quiet $small $drop --steps 1 --segment-len $n --dump parts.st
    check "  is none: the same dump, bit for bit" cmp whole.st parts.st
done
check "  and the header names no segments" fails grep -q segments quiet.out

# ---------------------------------------------------------------- many steps, validation, checkpoints

# 29 validation windows: the last batch has only two of three sequences
long="$small $drop --batch-size 3 --grad-accum 2 --steps 8 --save-every 4 --val-every 2 --val-batches 0 --schedule constant"
check "eight steps" quiet $long --out whole --log whole.csv
check "  the last validation batch is incomplete" grep -q '^val loss .* | 28 windows of 44$' quiet.out
for n in 8 16; do
    check "  in segments of $n" quiet $long --segment-len $n --out parts --overwrite --log parts.csv
    check "    losses, norms and validation losses agree to 1e-5" close parts.csv whole.csv
    check "    models and moments agree to 1e-4" "$compare" whole/step-00000008/model.safetensors parts/step-00000008/model.safetensors --tolerance 1e-4
done
check "  the same again" quiet $long --segment-len 16 --out again --log again.csv
check "    the same model and moments, bit for bit" same parts/step-00000008 again/step-00000008
check "    the same log" same_log parts.csv again.csv
rm -r again/step-00000008
check "  resumed at step 4" quiet --resume again
check "    in segments of 16, which options.txt names" eval 'grep -q "segments of 16," quiet.out && grep -q "^segment-len 16$" again/options.txt'
check "    the same model and moments as the uninterrupted run, bit for bit" same parts/step-00000008 again/step-00000008
check "    the same log" same_log parts.csv again.csv
rm -r again/step-00000008
check "  resumed with segments of 24" quiet --resume again --segment-len 24
check "    losses, norms and validation losses agree to 1e-5" close again.csv whole.csv
check "  resumed without segments: a length of the whole sequence" quiet --resume whole --segment-len 44 --steps 9
check "    no segments" fails grep -q "segments" quiet.out

check "--eval in whole sequences" quiet --resume whole --eval
whole=$(val_loss)
for n in 8 24 auto; do
    check "--eval, --segment-len $n" quiet --resume whole --eval --segment-len $n
    check "  the same loss, $whole, to 2e-6" awk -v a="$whole" -v b="$(val_loss)" 'BEGIN { exit !(a > 0 && (a - b)^2 <= 4e-12) }'
done

# ---------------------------------------------------------------- carried states

carried() { # NAME OPTIONS...: nine steps with carried states. Segments of 16 of 40 tokens: the last one has 8
    name=$1
    shift
    options="$small --carry-state --batch-size 2 --grad-accum 2 --seq-len 40 --schedule constant --save-every 4 $*"
    check "$name" quiet $options --out carry --overwrite --steps 9 --log carry.csv
    for n in 8 16; do
        check "  in segments of $n" quiet $options --segment-len $n --out seg --overwrite --steps 9 --log seg.csv
        check "    losses and norms of nine steps agree to 1e-5" close seg.csv carry.csv
        for state in 0 1; do
            check "    states $state agree to 1e-5" "$compare" carry/step-00000009/state-$state.safetensors \
                seg/step-00000009/state-$state.safetensors --tolerance 1e-5
        done
    done
    cp -r seg/step-00000009 uninterrupted && cp seg.csv uninterrupted.csv && rm -r seg/step-00000009
    check "  resumed at step 8" quiet --resume seg
    check "    the same model and moments, bit for bit" same seg/step-00000009 uninterrupted
    check "    the same states" cmp seg/step-00000009/state-1.safetensors uninterrupted/state-1.safetensors
    check "    the same log" same_log seg.csv uninterrupted.csv
    rm -r uninterrupted
    "$double" --threads 1 $options --steps 3 --dump whole.st > run.out 2>&1
    check "  the third step, segments of 16, every tensor to 1e-11, double" equal "$double" 1e-11 16 $options --steps 3
}
carried "streams" $drop
check "  whole sequences' states go on in segments" quiet --resume carry --segment-len 16 --steps 10
carried "documents that are carried on" --eot 10 --recompute

# ---------------------------------------------------------------- memory

# TOKENS OPTIONS...: one step of a sequence; sets plan and peak, in MiB
measure() {
    tokens=$1
    shift
    quiet $model --num-layers 1 --chunk-size 64 --data long --batch-size 1 --seq-len "$tokens" --val-every 0 --steps 1 \
        --out measured --overwrite "$@"
    plan=$(sed -n 's/^memory *\([0-9.]*\) MiB.*/\1/p' quiet.out) peak=$(sed -n 's/^done .*peak memory \([0-9]*\) MiB.*/\1/p' quiet.out)
    [ -n "$plan" ] && [ -n "$peak" ]
}
within() { awk -v x="$1" -v low="$2" -v high="$3" 'BEGIN { print x; exit !(x != "" && x >= low && x <= high) }'; }
difference() { awk -v a="$1" -v b="$2" 'BEGIN { print b - a }'; }

check "16384 tokens in segments of 1024" measure 16384 --segment-len 1024
plan16=$plan peak16=$peak
check "262144 tokens in segments of 1024" measure 262144 --segment-len 1024
# 245760 tokens more: 1.9 MiB for inputs and targets. 240 segments more: 0.1 MiB for states of 448 bytes.
check "  the plan, $plan MiB, is $plan16 and 2.0 for tokens and states" within "$(difference "$plan16" "$plan")" 1.8 2.2
# States of 4 layers x 16 channels x 16 complex numbers of 8 bytes and a few moments: 8.2 KiB a sequence
states() { quiet $model --num-layers 4 --cema-ndim 16 --data text --val-every 0 --steps 1 --dump measured.st "$@" &&
    mib=$(sed -n 's/^memory.*states and buffers \([0-9.]*\).*/\1/p' quiet.out); }
check "1024 segments of one sequence" states --batch-size 1 --seq-len 8192 --segment-len 8
mib8=$mib
check "  512 segments" states --batch-size 1 --seq-len 8192 --segment-len 16
check "    the plan has 512 states, 4.1 MiB, less" within "$(difference "$mib" "$mib8")" 4 4.4
check "two segments of 512 sequences" states --batch-size 512 --seq-len 16 --segment-len 8
mib8=$mib
check "  whole sequences" states --batch-size 512 --seq-len 16
check "    the plan has three states and a gradient of a state, 16.5 MiB, less" within "$(difference "$mib" "$mib8")" 16 17
# A step of several seconds on a terminal, which python3 provides, names the segments; elsewhere nothing is on stderr.
slow="--data long --batch-size 1 --seq-len 24576 --segment-len 1024 --steps 1 --val-every 0 --threads 1 --dump step"
check "a long step, whose standard error is a file" eval '"$train" $slow > out.txt 2> err.txt && [ ! -s err.txt ]'
if command -v python3 > /dev/null && awk '/^step  / { for (i = 2; i <= NF; i++) if ($i == "ms") slow = $(i - 1) > 4000 } END { exit !slow }' out.txt; then
    check "  a terminal: names the present segment" eval 'python3 -c "import pty, sys; pty.spawn(sys.argv[1:])" "$train" $slow > out.txt &&
        grep -q "pass 2 of 2, backwards: segment [0-9]* of 24" out.txt'
else
    echo "skipped: on a terminal (no python3, or the step took less than four seconds)"
fi

# Each of the three sequences takes terabytes of main memory for its tokens, whatever the segments
huge="$model --data text --eot 10 --batch-size 3 --seq-len 1000000000000 --val-every 0 --steps 0 --out huge"
for n in 64 auto 1000000000000; do
    check "sequences whose tokens do not fit, --segment-len $n" fails quiet $huge --segment-len $n
    check "  the message names fewer tokens that fit" grep -q 'What fits: a batch of 1 x [1-9][0-9]* tokens$' quiet.out
done

if grep -q __asan_init "$train" || ! (ulimit -v 2000000 && "$train" --help > out.txt 2>&1); then
    echo "skipped: peak memory and ulimit -v (AddressSanitizer takes memory of its own)"
else
    check "  the peak, $peak MiB, is $peak16, as much, and a twentieth" within "$(difference "$peak16" "$peak")" -2 $((4 + peak16 / 20))

    # The least address space in which a sequence of 65536 tokens fits in segments; whole it takes 120 MiB more.
    auto="$model --num-layers 1 --chunk-size 512 --data long --batch-size 1 --seq-len 65536 --val-every 0 --schedule constant"
    limited() { (ulimit -v "$kib" && quiet "$@"); }
    for kib in $(seq 60000 15000 900000); do
        limited $auto --segment-len auto --steps 2 --save-every 1 --out auto --overwrite && break
    done
    n=$(sed -n 's/^segment-len //p' auto/options.txt)
    check "--segment-len auto with ulimit -v $kib: ${n:-none}, in options.txt and in the header" grep -q "segments of ${n:-none}," quiet.out
    check "  whole chunks, and not the whole sequence" [ "$((n % 512))" -eq 0 -a "$((n))" -ge 512 -a "$((n))" -lt 65536 ]
    check "  the peak, $(sed -n 's/.*peak memory \([0-9]*\) .*/\1/p' quiet.out) MiB, is at most the plan and 40 MiB" awk '/^memory/ { plan = $2 }
        /^done/ { sub(/.*peak memory /, ""); peak = $1 } END { exit !(plan > 0 && peak > 0 && peak <= plan + 40) }' quiet.out
    check "  segments of $n fit" limited $auto --segment-len "$n" --steps 0 --out fits
    check "  segments of $((n + 512)) do not" fails limited $auto --segment-len $((n + 512)) --steps 0 --out refused
    check "    and the message names $n" grep -q "error: 1 x 65536 tokens in segments of $((n + 512)) need .* What fits: the same with --segment-len $n\$" quiet.out
    check "  whole sequences do not" fails limited $auto --steps 0 --out refused
    check "    and the message names $n" grep -q "error: 1 x 65536 tokens need .* What fits: the same with --segment-len $n\$" quiet.out
    check "    nothing was created" [ ! -e refused ]
    cp -r auto resumed && rm -r resumed/step-00000002
    check "  resumed at step 1 without the limit" quiet --resume resumed
    check "    in segments of $n" grep -q "segments of $n," quiet.out
    check "    the same model and moments, bit for bit" same auto/step-00000002 resumed/step-00000002
    check "  without a limit: the whole sequence" eval 'quiet $auto --segment-len auto --steps 0 --out free &&
        grep -q "^seq-len 65536$" free/options.txt && ! grep -q segment free/options.txt && ! grep -q segments quiet.out'
    check "  resumed with a longer --seq-len: whole sequences, too" eval 'quiet --resume free --seq-len 66000 --steps 1 &&
        ! grep -q segments quiet.out'
    check "a model too large for segments" fails limited $auto --model-dim 8192 --segment-len auto --steps 0 --out refused
    check "  is told so" grep -q 'mostly because of parameters, gradients and moments: use a smaller model' quiet.out

    # Segments of one chunk have 16384 states of 64 KiB, 1 GiB: too many, unlike longer segments
    many="$model --num-layers 4 --model-dim 128 --cema-ndim 16 --chunk-size 8 --data long --batch-size 1 --seq-len 131072"
    kib=$((kib + 100000))
    check "segments of one chunk, whose states do not fit" fails limited $many --val-every 0 --steps 0 --out refused --segment-len 8
    check "  longer ones do, and the message names them" grep -q 'What fits: the same with --segment-len [1-9][0-9][0-9]' quiet.out
fi

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
