# A command that is refused changes nothing, no output overwrites an input or a file that is not ours, and a stopped run
# keeps what the uninterrupted one keeps. Run from the repository's root.
. tests/check.sh
cd "$folder" || exit 1

fails() { ! "$@"; }
quiet() { "$train" --threads 1 "$@" > "$folder/quiet.out" 2>&1; }

# Everything in the working directory, names and contents.
snapshot() {
    find . | sort
    find . -type f | sort | xargs cksum
}

refused() { # STATUS TEXT OPTIONS...: ./train ends with that status, says the text, and changes no file
    status=$1 text=$2
    shift 2
    snapshot > "$folder/before"
    "$train" --threads 1 "$@" > "$folder/out" 2> "$folder/err"
    got=$?
    snapshot > "$folder/after"
    if [ $got -eq "$status" ] && grep -q -F -e "$text" "$folder/err" "$folder/out" && cmp -s "$folder/before" "$folder/after"; then
        echo "ok    refused, nothing changed: $*"
        passed=$((passed + 1))
    else
        echo "FAIL  refused, nothing changed: $* (status $got, expected $status and '$text')"
        { cat "$folder/err"; diff "$folder/before" "$folder/after"; } | sed 's/^/      /' | tail -n 8
        failed=$((failed + 1))
    fi
}

mkdir work && cd work || exit 1
model="--num-layers 1 --model-dim 16 --num-heads 1 --z-dim 8 --value-dim 16 --ffn-hidden-dim 16 --cema-ndim 2"
model="$model --chunk-size 16 --norm-num-groups 4 --batch-size 2 --seq-len 32"
awk 'BEGIN { for (i = 0; i < 600; i++) printf "%d squared is %d\n", i, i * i }' > text
small="$model --data text --val-every 0"
newest() { ls -d "$1"/step-*[0-9] | tail -n 1; }

# ---------------------------------------------------------------- a run that is to go on

check "a run" quiet $small --steps 4 --out A
check "a run that carries states" quiet $small --steps 4 --out C --carry-state
: > empty-log && echo "my notes" > notes && mkdir folder && echo "my thesis" > folder/thesis
refused 2 "--seed 5: the run in A has seed 1" --resume A --seed 5 --steps 6
refused 2 "--carry-state: the run in A was begun without it" --resume A --carry-state --steps 6
refused 2 "the run in C carries the states of 2 x 1 rows" --resume C --batch-size 4 --steps 6
refused 2 "the run in C carries the states of 2 x 1 rows" --resume C --grad-accum 2 --steps 6
refused 2 "--lr x" --resume A --lr x
refused 2 "--schedule step" --resume A --schedule step
refused 2 "--eot 256" --resume A --eot 256
refused 2 "--model-dim contradicts" --resume A --model-dim 32
refused 2 "--segment-len 24 is no multiple of --chunk-size 16" --resume A --segment-len 24 --steps 6
refused 2 "--segment-len 8 is no multiple of --chunk-size 16" --resume C --segment-len 8 --steps 6
refused 1 "--log nowhere/log: " --resume A --log nowhere/log --steps 6
refused 1 "--log folder: cannot write: not a regular file" --resume A --log folder --steps 6
refused 1 "--log notes: exists and is not a log of ./train" --resume A --log notes --steps 6
refused 1 "--dump nowhere/dump: " --resume A --dump nowhere/dump --steps 6
refused 1 "no-such-file: No such file" --resume A --data no-such-file --steps 6
refused 1 "MiB" --resume A --batch-size 65536 --seq-len 9000 --steps 6
refused 0 "step 4 of 2: nothing left to do" --resume A --steps 2
refused 0 "step 4 of 4: nothing left to do" --resume A
refused 2 "--out A: would delete A/step-00000004/model.safetensors, which --init reads" --init A --out A --overwrite --data text
refused 1 "--out A: holds a run, at step 4" $small --out A
cp -r A bad && printf '\000\000\300\177' | dd of=bad/step-00000004/model.safetensors bs=1 conv=notrunc \
    seek=$(($(wc -c < bad/step-00000004/model.safetensors) - 4)) 2> ../dd.out
cp bad/step-00000004/model.safetensors nan.safetensors
head -c 3000 nan.safetensors > short.safetensors
refused 1 "'output.output.weight' is not finite" --init nan.safetensors --data text --seq-len 32 --out A --overwrite
refused 1 "'output.output.weight' is not finite" --init nan.safetensors --data text --seq-len 32 --out new/folder
refused 1 "short.safetensors" --init short.safetensors --data text --seq-len 32 --out A --overwrite
refused 1 "no checkpoint loads" --resume bad --steps 6
cp -r A large && i=0 && while [ $i -lt 16 ]; do printf '\377\377\177\177'; i=$((i + 1)); done | dd bs=1 conv=notrunc \
    of=large/step-00000004/model.safetensors seek=$(($(wc -c < large/step-00000004/model.safetensors) - 64)) 2> ../dd.out
refused 1 "large/step-00000004: the model's loss is" --init large/step-00000004 --data text --seq-len 32 --steps 0 --out H
refused 1 "large/step-00000004: the model's loss is" --init large/step-00000004 --data text --seq-len 32 --out A --overwrite
check "after all that, the run goes on" quiet --resume A --steps 6
check "  and so does the one that carries states" quiet --resume C --steps 6

refused 2 "--seq-len 64 --eot -1: the run in C carries states with --seq-len 32" --resume C --seq-len 64 --steps 8
refused 2 "--dump: --steps 6 leaves no step to dump" --resume A --dump d
refused 0 "step 6 of 0: nothing left to do" --resume A --steps 0
refused 2 "--log A/step-00000006/log: lies where the run in A keeps its checkpoints" $small --steps 9 --out A --overwrite --log A/step-00000006/log
refused 2 "--dump A/step-00000009: lies where the run in A keeps its checkpoints" $small --steps 9 --out A --overwrite --dump A/step-00000009
cp -r A/step-00000006 A/step-00000009.tmp
refused 2 "would delete A/step-00000009.tmp/model.safetensors, which --init reads" --init A/step-00000009.tmp/model.safetensors --data text --out A --overwrite
rm -r A/step-00000009.tmp
ln -s nothing dangling
refused 1 "--log dangling: a symbolic link to no file" $small --steps 2 --out new --log dangling
refused 1 "--log A/lock: exists and is not a log of ./train; it may be the lock of a run" $small --steps 2 --out new --log A/lock
mkdir strange && echo mine > strange/options.txt && echo "my thesis" > strange/thesis
refused 1 "--out strange: holds files but no run" $small --steps 2 --out strange
check "a run on a dump's batch" eval 'quiet $small --steps 1 --dump first && quiet --init A --batch first --steps 1 --out B'
refused 2 "--eval: the run in B was trained on --batch" --resume B --eval
check "  is measured on a text" quiet --resume B --eval --data text --val-batches 1
check "  --resume with another name of the directory" quiet --resume A/ --out ./A --steps 7

# ---------------------------------------------------------------- outputs are checked before the work

refused 1 "--dump nowhere/dump: cannot write" $small --steps 2 --dump nowhere/dump
refused 1 "--dump folder: cannot write: not a regular file" $small --steps 2 --dump folder
refused 1 "--dump notes: exists and is not a dump of ./train" $small --steps 2 --dump notes
refused 1 "--log nowhere/log: cannot write" $small --steps 2 --out new --log nowhere/log
refused 1 "--log notes: exists and is not a log of ./train" $small --steps 2 --out new --log notes
refused 1 "--out notes/run" $small --steps 2 --out notes/run
refused 2 "--out '': not the name" $small --steps 2 --out ''
refused 2 "--log '': not the name" $small --steps 2 --out new --log ''
refused 1 "--out folder: holds files but no run" $small --steps 2 --out folder
refused 1 "--out folder: holds files but no run" $small --steps 2 --out folder --overwrite
for value in 0 -16 +16 ' 16' 16.5 16x 1e3 auto16 '' ' '; do
    refused 2 "--segment-len $value: it is a number of tokens, or auto" $small --steps 2 --segment-len "$value" --out new
done
refused 2 "--segment-len needs a value" $small --steps 2 --out new --segment-len
refused 2 "--segment-len 1 is no multiple of --chunk-size 16" $small --steps 2 --segment-len 1 --out new
refused 2 "--segment-len 40 is no multiple of --chunk-size 16" $small --seq-len 64 --steps 2 --segment-len 40 --out A --overwrite
refused 2 "--segment-len 40 is no multiple of --chunk-size 16" $small --seq-len 64 --segment-len 40 --eval
refused 1 "65536 x 9000 tokens in segments of 64 need" $small --batch-size 65536 --seq-len 9000 --segment-len 64 --cema-ndim 64 --out new
refused 1 "1 x 300000000 tokens: --batch-size x --seq-len x --num-heads must be below 2^31, and --seq-len at most 2^28" \
    $small --eot 10 --batch-size 1 --seq-len 300000000 --out new
refused 1 "in segments of 299999984: --batch-size x --seq-len x --num-heads must be below 2^31, and --seq-len at most 2^28" \
    $small --eot 10 --batch-size 1 --seq-len 4000000000 --segment-len 299999984 --out new
refused 1 "--log notes: exists and is not a log of ./train" $small --segment-len auto --steps 2 --out new --log notes
refused 2 "--eval does not go with" $small --eval --out new
refused 2 "--dump: with --steps 0" $small --steps 0 --dump dump
refused 1 "MiB" $small --batch-size 65536 --seq-len 9000 --out new
refused 1 "MiB" --preset paper7B --data text --vocab-size 32000 --seq-len 1024 --batch-size 64 --out new
if [ "$(id -u)" -ne 0 ]; then # root may write everywhere
    mkdir locked && chmod 555 locked
    refused 1 "--out locked/run" $small --steps 2 --out locked/run
    refused 1 "--log locked/log" $small --steps 2 --out new --log locked/log
fi
echo "my notes" > stale.tmp
refused 1 "stale.tmp exists; it may be left by a killed command" $small --steps 2 --dump stale
echo "step,loss,grad_norm,lr,ms,tokens_per_s,val_loss" > stale.csv.tmp
check "what a killed command left of a log is replaced" quiet $small --steps 2 --out E --log stale.csv
: > empty.csv.tmp
check "  or an empty one" quiet $small --steps 2 --out E --overwrite --log empty.csv
ln -s linked.csv link.csv && cp stale.csv linked.csv
check "a log that is a link stays one" quiet $small --steps 3 --out E --overwrite --log link.csv
check "  and the file that it names is the log" [ -L link.csv -a "$(wc -l < linked.csv)" -eq 4 ]
check "an empty file may become a log" quiet $small --steps 2 --out E --overwrite --log empty-log
check "  a log a log" quiet $small --steps 2 --out E --overwrite --log empty-log
check "  with a row a step" [ "$(wc -l < empty-log)" -eq 3 ]
check "an empty directory may become a run" eval "mkdir fresh && quiet $small --steps 2 --out fresh"
check "a dump" quiet $small --steps 2 --dump dump
check "  may replace an older one" quiet $small --steps 2 --dump dump

# ---------------------------------------------------------------- the memory plan is complete, and comes first

planned() { # OPTIONS...: a run's peak is at most its plan and 40 MiB for the program, its libraries and file buffers
    quiet "$@" && awk '/^memory/ { plan = $2 } /^done/ { sub(/.*peak memory /, ""); peak = $1 }
        END { print "planned " plan " MiB, peak " peak " MiB"; exit !(plan > 0 && peak > 0 && peak <= plan + 40) }' ../quiet.out
}
if (ulimit -v 2000000 && "$train" --help > ../out 2>&1) && ! ldd "$train" 2> /dev/null | grep -q 'lib[at]san'; then
    for preset in paper7B mega1.3B; do
        check "$preset is refused within 1 GB of address space" eval '! (ulimit -v 1000000 && quiet --preset '$preset' --data text --seq-len 16 --out new)'
        check "  by its plan" grep -q "error: 4 x 16 tokens need [0-9]* MiB or more.* mostly because of parameters" ../quiet.out
    done
    big="$small --steps 1"
    check "a run that carries states" planned $big --carry-state --cema-ndim 64 --model-dim 256 --batch-size 16 --grad-accum 8 --num-layers 4 --out P1
    check "  needs $(sed -n 's/^memory.*states and/states and/p' ../quiet.out) MiB" grep -q 'states and buffers [5-9][0-9]' ../quiet.out
    check "a run that samples with a chunk of 15000 tokens" planned $big --chunk-size 15000 --value-dim 512 --out P2
    check "a dump" planned $big --batch-size 16 --seq-len 512 --value-dim 512 --dump large.st
    cat text text text text > large_text
    segments="--data large_text --chunk-size 64 --seq-len 1024 --segment-len 64 --batch-size 16 --grad-accum 2 --cema-ndim 64 --model-dim 256"
    check "a dump in segments, with carried states" planned $big $segments --carry-state --dump large.st
    check "  needs $(sed -n 's/^memory.*states and/states and/p' ../quiet.out) MiB" grep -q 'states and buffers [4-9][0-9]' ../quiet.out
else
    echo "skipped: the memory plan against the peak (sanitizers take memory of their own)"
fi

line=$(printf 'a\nb')
mkdir "$line" && cp text "$line" && cd "$line" || exit 1
refused 2 "its full path has a line break" $small --steps 2 --out new
cd .. && rm -r "$line"
refused 2 "--eval does not go with" --resume A --eval --log new.csv

# ---------------------------------------------------------------- no output is an input

cp text other && ln other linked && ln -s other symbolic && cp other other.tmp
refused 2 "--log other: is the file that --data reads" $model --val-every 0 --data other --log other --out new
refused 2 "--dump other: is the file that --data reads" $model --val-every 0 --data other --dump other --steps 1
refused 2 "--dump ./other: is the file that --data reads" $model --val-every 0 --data other --dump ./other --steps 1
refused 2 "--dump linked: is the file that --data reads" $model --val-every 0 --data other --dump linked --steps 1
refused 2 "--log symbolic: is the file that --data reads" $model --val-every 0 --data other --log symbolic --out new
refused 2 "--log other: is the file that --val-data reads" $model --data text --val-data other --log other --out new
refused 2 "is the file that --data reads" $model --val-every 0 --data other.tmp --dump other --steps 1
refused 2 "--dump same: is the file that --log writes" $small --steps 1 --log same --dump same
refused 2 "--log dump: is the file that --batch reads" $model --batch dump --log dump --steps 1
refused 2 "--dump dump: is the file that --batch reads" $model --batch dump --dump dump --steps 1
refused 2 "--log nan.safetensors: is the file that --init reads" --init nan.safetensors --data text --seq-len 32 --log nan.safetensors --out new
refused 2 "--log new/options.txt: is the file that --out writes" $small --steps 2 --out new --log new/options.txt
refused 2 "--log new/lock: is the file that --out writes" $small --steps 2 --out new --log new/lock
echo '{"num_layers": 1, "model_dim": 8, "z_dim": 4, "value_dim": 4, "ffn_hidden_dim": 4, "norm_num_groups": 2,
       "chunk_size": 16, "vocab_size": 256}' > c.json
refused 2 "--log c.json: is the file that --config reads" --config c.json --data text --seq-len 32 --log c.json --out new

# ---------------------------------------------------------------- a run is measured where it is

snapshot > ../before
check "--resume DIR --eval measures" quiet --resume A --eval
check "  with the run's own data and sizes" grep -q '^val loss [0-9.]* nats = .* of 32$' ../quiet.out
snapshot > ../after
check "  and changes nothing" diff ../before ../after
check "--eval of the same checkpoint" quiet --init A --data text --batch-size 2 --seq-len 32 --eval
check "  says the same" eval 'grep "^val loss" ../quiet.out > ../val && quiet --resume A --eval && grep -q -F -f ../val ../quiet.out'

# ---------------------------------------------------------------- data that move or change

check "a run from another directory" eval "(cd folder && quiet --resume ../A --steps 8)"
cp text moving && check "a run on data that will change" quiet $model --val-every 0 --data moving --out M --steps 2
sed 's/squared/sqvared/' text > moving
refused 1 "moving: has changed since the run began" --resume M --steps 4
check "  goes on if the file is named again" quiet --resume M --data moving --steps 4
check "  and from then on by itself" quiet --resume M --steps 5
mv moving moved
refused 1 "moving: No such file" --resume M --steps 6
cp text held && check "a run with --val-data" quiet $model --data text --val-data held --val-batches 1 --out V --steps 2
echo more >> held
refused 1 "held: has changed since the run began" --resume V --steps 4

# ---------------------------------------------------------------- damaged checkpoints

check "a run with two checkpoints" quiet $small --steps 6 --save-every 2 --out N
cp N/step-00000004/optimizer.safetensors N/step-00000006
check "an optimizer of another step: ./sample takes the checkpoint before" eval '"$sample" --threads 1 --model N --num-tokens 2 > ../out 2> ../err'
check "  and says so" grep -q "N/step-00000006/optimizer.safetensors: is no optimizer of step 6" ../err
check "the same run again" quiet $small --steps 6 --save-every 2 --out N --overwrite
printf '\000\000\300\177' | dd of=N/step-00000006/optimizer.safetensors bs=1 conv=notrunc \
    seek=$(($(wc -c < N/step-00000006/optimizer.safetensors) - 64)) 2> ../dd.out
check "  a checkpoint that does not load is skipped" eval 'quiet --resume N --steps 5 && grep -q "skipped a damaged checkpoint" ../quiet.out'
check "    and does not count among the newest two" [ -d N/step-00000004 -a -d N/step-00000005 ]
check "a run with three checkpoints" quiet $small --steps 6 --save-every 2 --out D
truncate() { head -c 900 "$1" > cut && mv cut "$1"; }
truncate D/step-00000006/optimizer.safetensors
check "a damaged optimizer: ./sample takes the checkpoint before" eval '"$sample" --threads 1 --model D --num-tokens 2 > ../out 2> ../err'
check "  and says so" grep -q "skipped a damaged checkpoint: D/step-00000006/optimizer.safetensors" ../err
check "  ./train --init, too" quiet --init D --data text --seq-len 32 --steps 1 --out fromD
check "  the run goes on from step 4" quiet --resume D --steps 5
check "  and does not count the damaged one among the newest two" [ "$(ls D | grep -c 'step-0000000[45]')" -eq 2 ]
check "  a dump of the whole run's step 6 equals that of the damaged one's" eval 'quiet --resume D --steps 6 --save-every 2 &&
    quiet $small --steps 6 --save-every 2 --out D2 && cmp D/step-00000006/model.safetensors D2/step-00000006/model.safetensors'
truncate D/step-00000006/model.safetensors && truncate D/step-00000005/optimizer.safetensors
rm -rf D/step-00000002
refused 1 "--resume D: every checkpoint is damaged" --resume D --steps 8

# ---------------------------------------------------------------- a stop by a signal changes no file that is kept

long="$model --data text --val-every 15 --val-batches 1 --steps 600 --save-every 30 --lr 0.1 --schedule constant"
check "an uninterrupted run" quiet $long --out whole --log whole.csv
stops=0
for trial in 03 1 2 35; do
    rm -rf stop stop.csv
    status=143
    set -- $long --out stop --log stop.csv
    while [ $status -eq 143 ]; do
        "$train" --threads 1 "$@" > ../stop.out 2>&1 &
        tries=0
        until { ls stop/step-* > ../ls.out 2>&1 && grep -q '^step ' ../stop.out; } || [ $tries -gt 400 ]; do
            tries=$((tries + 1)) && sleep 0.02
        done
        sleep "0.$trial"
        kill -TERM $! 2> ../kill.out
        wait $!
        status=$?
        [ $status -ne 143 ] || stops=$((stops + 1))
        set -- --resume stop
    done
    cut -d, -f1-4,7 whole.csv > ../log1 && cut -d, -f1-4,7 stop.csv > ../log2
    check "a run stopped again and again, $stops stops so far, keeps the same checkpoints" diff -r -x options.txt whole stop
    check "  and the same log" cmp ../log1 ../log2
done
check "there were stops" [ $stops -gt 0 ]
every="$model --data text --val-every 0 --steps 300 --save-every 1 --lr 0.1 --schedule constant"
check "an uninterrupted run that saves every step" quiet $every --out whole1
check "the same" eval '"$train" --threads 1 $every --out stop1 > ../stop.out 2>&1 &
    until ls stop1/step-* > ../ls.out 2>&1; do sleep 0.02; done; kill -TERM $!; wait $!; [ $? -eq 143 ]'
check "  resumed" quiet --resume stop1
check "  keeps the same checkpoints" diff -r -x options.txt whole1 stop1

# ---------------------------------------------------------------- the schedule, the lines, no steps

check "longer than planned" quiet $small --steps 4 --out S --lr 0.01 --warmup 0
check "  tells how the learning rate changes" eval 'quiet --resume S --steps 8 &&
    grep -q "the next learning rate is 5.50e-03; with the run.s previous settings it would be 1.00e-03 (--steps 8, was 4)" ../quiet.out'
check "  tells nothing where nothing changes" eval 'quiet $small --steps 8 --out S2 --save-every 4 && rm -r S2/step-00000008 &&
    quiet --resume S2 && ! grep -q "the next learning rate" ../quiet.out'
check "--print-every" quiet $small --steps 10 --print-every 4 --out P
check "  prints the first, every fourth and the last step" [ "$(sed -n 's,^step *\([0-9]*\)/.*,\1,p' ../quiet.out | tr '\n' ' ')" = "1 4 8 10 " ]
check "--steps 0" quiet $small --steps 0 --out Z
check "  saves the initial checkpoint" [ -f Z/step-00000000/model.safetensors ]
check "  from which a run goes on as from the start" eval 'quiet --resume Z --steps 3 && quiet $small --steps 3 --out Z3 &&
    cmp Z/step-00000003/model.safetensors Z3/step-00000003/model.safetensors'

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
