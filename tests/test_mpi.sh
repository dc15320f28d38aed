# ./train as several ranks under mpirun: every split into data-parallel and chunk-parallel ranks against one process, bytes
# sent, refusals, and what happens when a rank dies. Run from the repository's root.
double=$PWD/build/double/train
preload=$PWD/tests/preload.c
other=${1:+$PWD/$1} # a program of another backend, to compare with ./train; then only some of the checks run
. tests/check.sh
cd "$folder" || exit 1
# Open MPI must be told to run as root and with more processes than cores; it leaks memory itself
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_mpi_yield_when_idle=1
export ASAN_OPTIONS=detect_leaks=0

if ! command -v mpirun > /dev/null || ! mpirun -n 2 "${other:-$train}" --help > /dev/null 2>&1; then
    echo "skipped: no mpirun, or ./train was built without MPI"
    echo "0 passed, 0 failed"
    exit 0
fi

awk 'BEGIN { for (i = 0; i < 600; i++) printf "%d squared is %d\n", i, i * i }' > text
model="--model-dim 12 --num-layers 2 --z-dim 8 --value-dim 8 --num-heads 2 --ffn-hidden-dim 8 --cema-ndim 3
       --chunk-size 8 --norm-num-groups 3 --threads 1"
small="$model --data text --batch-size 12 --seq-len 44 --warmup 3 --val-batches 3"

machines=1 # number of machines to simulate, with equally many processes each
run() { # PROGRAM RANKS CP_SIZE OPTIONS...: cp_size chunk-parallel ranks share each sequence; 1 1: without mpirun
    program=$1 processes=$2 cp_size=$3
    shift 3
    case $processes/$machines in
    1/*) "$program" "$@" ;;
    */1) timeout 60 mpirun -n "$processes" "$program" --chunk-parallel "$cp_size" "$@" ;;
    4/2) timeout 60 mpirun -n 2 -x MEGALODON_MACHINE=0 "$program" --chunk-parallel "$cp_size" "$@" : \
        -n 2 -x MEGALODON_MACHINE=1 "$program" --chunk-parallel "$cp_size" "$@" ;;
    2/2) timeout 60 mpirun -n 1 -x MEGALODON_MACHINE=0 "$program" --chunk-parallel "$cp_size" "$@" : \
        -n 1 -x MEGALODON_MACHINE=1 "$program" --chunk-parallel "$cp_size" "$@" ;;
    esac > run.out 2>&1
}
close() { # LOG LOG: steps, losses, norms and validation losses agree to 1e-5
    paste -d, "$1" "$2" | awk -F, 'function far(a, b) { return (a - b) * (a - b) > 1e-10 * b * b }
        NR > 1 && ($1 != $8 || far($2, $9) || far($3, $10) || far($7, $14)) { bad = 1 } END { exit bad || NR < 2 }'
}
same_dump() { # TOLERANCE PROGRAM RANKS CP_SIZE OPTIONS...: does the first step's dump equal that of one process, one.st?
    tolerance=$1
    shift
    run "$@" --steps 1 --dump many.st && "$compare" one.st many.st --tolerance "$tolerance" || { cat run.out; false; }
}

endless="$small --steps 1000000 --schedule constant --val-every 0 --save-every 5"
strike() { # SIGNAL DIR: sends it to rank 1 once there is a checkpoint; sets status and took, in seconds
    mpirun -n 2 "${other:-$train}" --chunk-parallel 2 $endless --out "$2" > strike.out 2>&1 &
    tries=0
    until [ "$(ls "$2" 2> /dev/null | grep -c step-)" -ge 2 ] || [ $tries -gt 200 ]; do sleep 0.1 && tries=$((tries + 1)); done
    # the last one of mpirun's children in the order of their start
    second=$({ ps -A -o pid= -o ppid= || awk '{ sub(/\(.*\)/, "name"); print $1, $4 }' /proc/[0-9]*/stat; } 2> /dev/null |
        sort -n | awk -v parent=$! '$2 == parent { last = $1 } END { print last }')
    start=$(date +%s)
    kill -s "$1" "$second"
    wait $!
    status=$?
    took=$(($(date +%s) - start))
}

killed() { # PROGRAM, which resumes the killed run
    strike KILL killed
    check "kill -9 of one rank ends all" [ $status -ne 0 ]
    check "  within seconds" [ $took -le 5 ]
    newest=$(ls -d killed/step-????????  | tail -n 1)
    check "  what was saved loads" run "$1" 2 1 --resume killed --steps $(($(echo "${newest#killed/step-}" | sed "s/^0*//") + 2)) --threads 1
}

# ---------------------------------------------------------------- every split: one step, then twenty

# PROGRAM RANKS CP_SIZE STEPS ROWS SEQ_LEN NODE_SIZE [SEGMENT_LEN]: collectives and bytes must be those of dev/notes/parallel.md.
# With T segments there are 2 T - 1 forward passes and T backward passes; gradients are sent once a step.
sent() {
    run "$1" "$2" "$3" $model --data text --batch-size $(($5 * $2 / $3)) --seq-len "$6" --val-every 0 --steps "$4" --dump counted.st \
        --segment-len "${8:-$6}" || return 1
    size=$(sed -n 's/^parameters *//p' run.out)
    set -- "$1" "$2" "$3" "$4" "$5" "$6" "$7" $(awk -v P="$2" -v K="$3" -v S="$4" -v B="$5" -v R="$7" -v size="$size" -v T=$((($6 - 1) / ${8:-$6} + 1)) 'BEGIN {
        D = 12; N = 3; G = 3; layers = 2; V = 256; F = P / R; buckets = layers + 2
        m = part(V * D) + layers * part((size - 2 * V * D - 2 * D) / layers) + part(V * D + 2 * D)
        messages = 2; bytes = 32
        if (R > 1) { messages += buckets + 1; bytes += (size + F * m) * 4 }
        if (F > 1) { messages += 2 * buckets; bytes += (F + 1) * m * 4 }
        passes = 3 * T - 1
        if (K > 1) { messages += passes * (2 * layers + 1); bytes += (layers + 1) * (passes * 2 + T) * B * G * 8 + layers * passes * B * 2 * N * D * 4 }
        print 2 + S * messages, 32 + S * bytes }
        function part(n) { n = int((n + P - 1) / P) + 3; return n - n % 4 }')
    echo "expected $8 collective operations, $9 bytes" && grep "rank 0:" run.out
    grep -q "$8 collective operations, $9 bytes sent" run.out
}

splits="2/1 2/2 3/1 3/3 4/1 4/2 4/4"
all="$small --dropout 0.1 --hidden-dropout 0.2 --attention-dropout 0.1 --eot 10 --grad-accum 2"
long="$model --data text --chunk-size 40 --batch-size 4 --seq-len 333 --share-emb --recompute"
carry="$model --data text --batch-size 4 --seq-len 32 --grad-accum 2 --eot 10 --carry-state --schedule constant"
if [ -n "$other" ]; then
    for options in "$all" "$long" "$carry"; do
        "$train" $options --steps 1 --dump one.st > run.out 2>&1
        for split in 2/1 4/2 4/4; do
            check "first step, $split, ${options#"$model --data text "}" same_dump 1e-5 "$other" "${split%/*}" "${split#*/}" $options
        done
        case $options in "$long") segment=160 ;; *) segment=16 ;; esac # 160 tokens: 4 chunks, then 13 tokens of one
        for split in 2/1 4/2; do
            case $split$segment in 4/2160) continue ;; esac # the last segment has one chunk
            check "  $split, segments of $segment" same_dump 1e-5 "$other" "${split%/*}" "${split#*/}" $options --segment-len $segment
        done
        case $options in "$all") splits="2/2 4/1 4/2 4/4" ;; *) splits= ;; esac
        for split in $splits; do
            machines=2
            check "  $split, as if on two machines" same_dump 1e-5 "$other" "${split%/*}" "${split#*/}" $options
            # emulated device memory is the host's, so there any MPI can read it
            [ -z "$CUDA_ON_CPU_SHARED" ] || MEGALODON_CUDA_AWARE=1 check "    with a CUDA-aware MPI" same_dump 1e-5 "$other" "${split%/*}" "${split#*/}" $options
            machines=1
        done
    done
    "$train" $small --steps 2 --log one.csv --out alone > run.out 2>&1
    check "a process alone" run "$other" 1 1 $small --steps 2 --log many.csv --out alone --overwrite
    check "  gives the same losses and norms" close many.csv one.csv
    check "collectives and bytes, 3 data-parallel ranks" sent "$other" 3 1 2 2 40 3
    check "collectives and bytes, 2 data-parallel x 2 chunk-parallel ranks" sent "$other" 4 2 3 2 40 4
    machines=2
    check "  as if on two machines" sent "$other" 4 2 3 2 40 2
    check "collectives and bytes, 2 chunk-parallel ranks, as if on two machines" sent "$other" 2 2 3 2 40 1
    machines=1
    "$train" $carry --steps 4 --log one.csv --out one > run.out 2>&1
    check "four steps with carried states, 4/2" run "$other" 4 2 $carry --steps 4 --log many.csv --out many
    check "  give the same losses and norms" close many.csv one.csv
    killed "$other"
    check "  and one process goes on from there" run "$train" 1 1 --resume many --steps 5 --threads 1
    echo "$passed passed, $failed failed"
    [ $failed -eq 0 ]
    exit
fi
run "$train" 1 1 $small --steps 1 --dump one.st
for split in $splits; do
    check "first step, ranks/cp_size $split, float" same_dump 1e-5 "$train" "${split%/*}" "${split#*/}" $small
done
run "$double" 1 1 $all --steps 1 --dump one.st
for split in $splits; do
    check "first step, $split, double, dropout, documents, two batches" same_dump 1e-11 "$double" "${split%/*}" "${split#*/}" $all
done
long="$model --data text --chunk-size 32 --batch-size 2 --seq-len 333 --share-emb --recompute"
run "$double" 1 1 $long --steps 1 --dump one.st
check "first step, 11 chunks among 4, recomputing, double" same_dump 1e-11 "$double" 4 4 $long
check "first step, 11 chunks among 2, recomputing, double" same_dump 1e-11 "$double" 4 2 $long
check "a dump's batch among 4" same_dump 1e-11 "$double" 4 2 $model --chunk-size 32 --share-emb --batch one.st


# ---------------------------------------------------------------- segments, of which every rank has a part

in_segments() { # N OPTIONS OF same_dump...
    n=$1
    shift
    same_dump "$@" --segment-len "$n" && grep -q "segments of $n," run.out
}
segmented() { # NAME SPLITS SEGMENT_LEN OPTIONS...: one.st is that of one process with whole sequences
    text=$1 splits=$2 n=$3
    shift 3
    run "$double" 1 1 "$@" --steps 1 --dump one.st
    for split in $splits; do
        check "segments of $n, $split, double, $text" in_segments "$n" 1e-11 "$double" "${split%/*}" "${split#*/}" "$@"
    done
}
# 44 tokens are 6 chunks: three segments of 2 chunks; two of 3, whose ranks have 1 and 2; 36 tokens: the last one has 2
segmented "dropout, documents, two batches" "2/1 2/2 4/2" 16 $all
segmented "the same, recomputing" "2/2 4/2" 24 $all --recompute
segmented "a shorter last segment" "2/2" 24 $all --seq-len 36
segmented "tied output weights" "4/4" 32 $model --data text --batch-size 2 --seq-len 60 --share-emb
# 15 chunks of 5 ranks: rank 2 must not have more of the last 7 chunks than of the first 8
segmented "5 ranks and a shorter last segment" "5/5" 64 $model --data text --batch-size 1 --seq-len 120
run "$train" 1 1 $small --steps 1 --dump one.st
check "segments of 16, 4/2, float" in_segments 16 1e-5 "$train" 4 2 $small
run "$train" 1 1 $all --steps 4 --val-every 2 --val-batches 0 --out whole --log one.csv
for split in 2/2 4/2 2/1; do
    check "four steps in segments of 16, $split" run "$train" "${split%/*}" "${split#*/}" $all --segment-len 16 --steps 4 --val-every 2 \
        --val-batches 0 --out segments --overwrite --log many.csv
    check "  give the same losses, norms and validation losses" close many.csv one.csv
done
# rank 0 samples alone; then the ranks share segments again
run "$train" 1 1 $small --seq-len 48 --steps 3 --val-every 2 --out whole --overwrite --log one.csv
for n in 48 16; do
    check "a sample after each step, 2/2, segments of $n" run "$train" 2 2 $small --seq-len 48 --segment-len $n --steps 3 --val-every 2 --sample-every 1 \
        --out segments --overwrite --log many.csv
    check "  give the same losses, norms and validation losses" close many.csv one.csv
done
run "$train" 1 1 $carry --steps 6 --save-every 3 --out whole --overwrite --log one.csv
check "carried states in segments of 16, 4/2" run "$train" 4 2 $carry --segment-len 16 --steps 6 --save-every 3 --out segments --overwrite --log many.csv
check "  give the same losses and norms" close many.csv one.csv
check "  and the same states" "$compare" whole/step-00000006/state-1.safetensors segments/step-00000006/state-1.safetensors --tolerance 1e-4
rm -r segments/step-00000006
check "  resumed by one process" run "$train" 1 1 --resume segments --threads 1
check "    in segments of 16" grep -q "segments of 16," run.out
check "    give the same log" close many.csv one.csv
check "--segment-len auto, 2/2: whole sequences fit" run "$train" 2 2 $small --segment-len auto --steps 1 --out auto
check "  so options.txt has no segments" eval '! grep -q "segment" auto/options.txt && grep -q "^seq-len 44$" auto/options.txt'
if ! grep -q __asan_init "$train" && (ulimit -v 2000000 && "$train" --help > run.out 2>&1); then
    # rank 1 alone has too little address space for whole sequences: both take the segments that fit there
    auto="$model --num-layers 1 --chunk-size 512 --data text --eot 10 --batch-size 2 --seq-len 65536 --val-every 0 --segment-len auto --steps 0"
    for kib in $(seq 200000 30000 2000000); do
        timeout 60 mpirun -n 1 "$train" $auto --out auto --overwrite : \
            -n 1 sh -c 'ulimit -v $0 && exec "$@"' "$kib" "$train" $auto --out auto --overwrite > run.out 2>&1 && break
    done
    n=$(sed -n 's/^segment-len //p' auto/options.txt)
    check "--segment-len auto, ulimit -v $kib for one of two ranks: $n, the same for both" grep -q "segments of $n," run.out
fi

logged="--steps 20 --save-every 10 --val-every 5"
run "$train" 1 1 $all $logged --out one --log one.csv
for split in 2/2 3/1 4/2; do
    check "twenty steps, $split" run "$train" "${split%/*}" "${split#*/}" $all $logged --out "many-${split%/*}" --log many.csv
    check "  give the same losses and norms" close many.csv one.csv
done
check "  and are printed once" [ "$(grep -c '^step .* loss' run.out)" -eq 20 ]

# ---------------------------------------------------------------- checkpoints, states

resumed() { # RANKS CP_SIZE DIR LOG: resumes a copy of the run at step 10, and writes again.csv
    rm -rf again && cp -r "$3" again && rm -r again/step-00000020 && cp "$4" again.csv && run "$train" "$1" "$2" --resume again --threads 1
}
check "4 processes' run resumed by 3" resumed 3 3 many-4 many.csv
check "  gives the same log" close again.csv one.csv
check "  and by one" resumed 1 1 many-4 many.csv
check "  gives the same log" close again.csv one.csv
run "$train" 1 1 $carry $logged --out carry1 --log carry1.csv
for split in 4/2 4/4 2/1; do
    check "carried states, $split" run "$train" "${split%/*}" "${split#*/}" $carry $logged --out "carry${split#*/}" --log carry.csv --overwrite
    check "  give the same losses and norms" close carry.csv carry1.csv
done
check "  one process's states resumed by 4" resumed 4 2 carry1 carry1.csv
check "    give the same log" close again.csv carry1.csv
run "$train" 4 2 $carry $logged --out carried --log carried.csv
check "  4 processes' states resumed by one" resumed 1 1 carried carried.csv
check "    give the same log" close again.csv carry1.csv
check "  and states are the same" "$compare" carry1/step-00000020/state-1.safetensors carried/step-00000020/state-1.safetensors --tolerance 1e-4
check "--eval" run "$train" 4 2 --init one --data text --batch-size 4 --seq-len 44 --eval --threads 1
grep '^val loss' run.out > many.val
run "$train" 1 1 --init one --data text --batch-size 4 --seq-len 44 --eval --threads 1
check "  gives the same" [ "$(grep '^val loss' run.out)" = "$(cat many.val)" ]

# ---------------------------------------------------------------- what is sent

check "collectives and bytes, 3 data-parallel ranks" sent "$train" 3 1 2 2 40 1
check "collectives and bytes, 2 data-parallel x 2 chunk-parallel ranks" sent "$train" 4 2 3 2 40 1
check "collectives and bytes, 4 chunk-parallel ranks" sent "$train" 4 4 2 3 40 1
check "  of sequences five times as long" sent "$train" 4 4 2 3 200 1
check "collectives and bytes in 3 segments, 3 data-parallel ranks" sent "$train" 3 1 2 2 40 1 16
check "collectives and bytes in 3 segments, 2 data-parallel x 2 chunk-parallel ranks" sent "$train" 4 2 3 2 48 1 16
check "collectives and bytes in 4 segments, 4 chunk-parallel ranks" sent "$train" 4 4 2 3 128 1 32

# ---------------------------------------------------------------- refusals: one message, status, no waiting

refused() { # STATUS TEXT PROCESSES OPTIONS...
    status=$1 text=$2 processes=$3
    shift 3
    timeout 20 mpirun -n "$processes" "$train" $small --out refused --steps 2 "$@" > out.txt 2> err.txt
    got=$?
    echo "status $got, expected $status and once '$text'" && cat err.txt
    [ $got -eq "$status" ] && [ "$(grep -c '^error:' err.txt)" -eq 1 ] && grep -q -F -e "$text" err.txt
}
check "refused: --chunk-parallel that does not divide the number of ranks" refused 2 "--chunk-parallel 2 does not divide" 3 --chunk-parallel 2
check "refused: too few chunks" refused 2 "--seq-len 20 has 3 chunks" 4 --chunk-parallel 4 --seq-len 20
check "refused: too few chunks in a segment" refused 2 "--segment-len 24 has 3 chunks of 8 tokens; each of 4 chunk-parallel ranks needs one" \
    4 --chunk-parallel 4 --segment-len 24
check "refused: too few chunks in the last segment" refused 2 \
    "--segment-len 40 leaves a last segment of 1 chunk of --seq-len 44; each of 2 chunk-parallel ranks needs one" 2 --chunk-parallel 2 --segment-len 40
check "refused: segments of different lengths" refused 1 "has other settings" 2 --segment-len 8 : -n 1 "$train" $small --segment-len 16
check "refused: a batch that cannot be divided" refused 2 "--batch-size 7 cannot be divided" 2 --batch-size 7
check "refused: an unknown option" refused 2 "'--lrr'" 3 --lrr 1
check "refused: no such file" refused 1 "nowhere: No such file" 2 --data nowhere
check "refused: a folder that holds a run" refused 1 "--out one: holds a run" 2 --out one
check "  and nothing was created or changed" [ ! -e refused ]
check "refused: settings that differ" refused 1 "has other settings" 1 : -n 1 "$train" $small --lr 1
check "refused: a file that only one rank has" refused 1 "nowhere: No such file" 1 : -n 1 "$train" $small --data nowhere
"$train" --chunk-parallel 2 > out.txt 2> err.txt
check "refused: --chunk-parallel without mpirun" grep -q "does not divide the number of processes, 1" err.txt

# ---------------------------------------------------------------- a full disk

if ldd "$train" 2> /dev/null | grep -q 'lib[at]san' || ! ${CC:-cc} -shared -fPIC -o preload.so "$preload" 2> /dev/null; then
    echo "skipped: a full disk (sanitizers have their own library, or none can be built)"
else
    full_disk() { # RANKS CP_SIZE BYTES: a dump onto a disk that is full after so many bytes; sets status
        timeout 60 mpirun -n "$1" env LD_PRELOAD="$folder/preload.so" DISK_BYTES="$3" \
            "$train" --chunk-parallel "$2" $small --steps 2 --dump full.st > run.out 2> err.txt
        status=$?
    }
    full_disk 2 2 100000000
    check "a dump of 2 ranks, on a disk with space" [ $status -eq 0 ]
    size=$(wc -c < full.st)
    rm full.st
    for bytes in 10000 $((size - 1)); do # in the activations, at the last gradient
        full_disk 2 2 $bytes
        check "a dump of 2 ranks, of which the disk takes $bytes of $size bytes: status 1" [ $status -eq 1 ]
        check "  the message says why, once" [ "$(grep -c 'error: --dump full.st.*: No space left on device' err.txt)" -eq 1 ]
        check "  and no half file stays" eval '[ ! -e full.st ] && [ ! -e full.st.tmp ]'
    done
fi

# ---------------------------------------------------------------- a rank dies, or receives a signal

killed "$train"
strike TERM stopped
check "SIGTERM to one stops all" [ $status -ne 0 ]
check "  within seconds" [ $took -le 5 ]
check "  with a checkpoint" grep -q '^stopped at step .* saved in stopped' strike.out

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
