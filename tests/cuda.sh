# The CUDA version on this machine's GPU: kernels, CPU against GPU, training, checkpoints, repeatability, the
# memory and race checkers, speed. bfloat16 with the fast kernels of kernels/ and with the plain ones of megalodon.cu
# (MEGALODON_PLAIN=1); float32 has plain ones. `make test-cuda` builds what it needs and runs it; its output is kept as it
# is.
# CUDA_TEST_PROGRAMS=DIR: train_cuda and the others are in DIR. CUDA_TEST_UNITS=DIR: the test programs are.
# CUDA_TEST_SMALL=1: fewer and smaller cases, no speed, where the GPU is emulated. CUDA_TEST_COMMIT=TEXT: what
# is tested, where there is no git.
gpu=${CUDA_TEST_PROGRAMS:-.} units=${CUDA_TEST_UNITS:-build/gpu} small=${CUDA_TEST_SMALL:-}
text=dev/data/shakespeare.txt
export LC_ALL=C
unset MEGALODON_PLAIN
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
trap 'exit 130' INT TERM
passed=0 failed=0 begin=$(date +%s)

verdict() { # status, text: the log of what failed is shown
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)) word=ok; else failed=$((failed + 1)) word=FAIL; fi
    printf '%-92s %s\n' "$2" $word
    if [ "$1" -ne 0 ]; then tail -n 6 "$tmp/log" | tr -cd '\n\40-\176' | cut -c 1-180 | sed 's/^/      /'; fi
}
skip() { printf '%-92s %s\n' "$1" skipped; }
section() { printf '\n---- %s (after %d s)\n' "$1" $(($(date +%s) - begin)); }
quiet() { "$@" > "$tmp/log" 2>&1; }
# Is X a number, and at most LIMIT? Is it within LIMIT of Y, relatively? No for "" and for nan.
number() { case $1 in *[!0-9.e+-]* | "" | [!0-9-]*) return 1 ;; esac; }
at_most() { number "$1" && awk -v x="$1" -v limit="$2" 'BEGIN { exit !(x + 0 <= limit + 0) }'; }
near() {
    number "$1" && number "$2" &&
        awk -v x="$1" -v y="$2" -v limit="$3" 'BEGIN { d = x - y; if (d < 0) d = -d; if (y < 0) y = -y; exit !(y > 0 && d <= limit * y) }'
}
# The loss (column 2) or another one of step N in a log.
column() { awk -F, -v n="$2" -v c="$3" '$1 == n { print $c }' "$1"; }

# ---------------------------------------------------------------- what is tested, and where

commit=$(git rev-parse --short HEAD 2> /dev/null || echo "not a checkout")
git diff --quiet HEAD -- '*.c' '*.cu' '*.h' 2> /dev/null
if [ $? -eq 1 ]; then commit="$commit, and changes"; fi
echo "commit    ${CUDA_TEST_COMMIT:-$commit}"
echo "card      $(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2> /dev/null || echo 'no nvidia-smi')"
echo "compiler  $("${NVCC:-nvcc}" --version 2> /dev/null | sed -n 's/.*release/nvcc/p' | grep . || echo 'no nvcc on the PATH')"
"$gpu/train_cuda" --data $text --val-data $text --eval --val-batches 1 > "$tmp/log" 2>&1
status=$?
backend=$(sed -n 's/^backend  *//p' "$tmp/log")
echo "backend   $backend"
[ $status -eq 0 ] && [ -n "$backend" ]
verdict $? "a GPU"
if [ $status -ne 0 ]; then
    echo "$passed passed, $failed failed"
    exit 1
fi

# ---------------------------------------------------------------- 1

section "kernels and layers against the CPU's functions; whole = pieces = token by token, states, accumulation"
for unit in test_cuda_fp32 test_cuda test_model_fp32; do
    quiet "$units/$unit"
    status=$?
    set -- $(tail -n 1 "$tmp/log" | sed -n 's/^\([0-9][0-9]*\) passed, \([0-9][0-9]*\) failed$/\1 \2/p') 0 0
    if [ $# -eq 4 ] && [ "$1" -gt 0 ]; then
        grep FAIL "$tmp/log" | head -n 12 | sed 's/^/      /'
        printf '%-92s %s\n' "$unit: $1 passed, $2 failed" "$([ "$2" -eq 0 ] && echo ok || echo FAIL)"
        passed=$((passed + $1)) failed=$((failed + $2))
    fi
    if [ $# -ne 4 ] || [ "$1" -eq 0 ] || { [ $status -ne 0 ] && [ "$2" -eq 0 ]; }; then
        verdict 1 "$unit: ended with status $status"
    fi
done

# ---------------------------------------------------------------- 2

section "one batch, CPU against GPU: the worst relative L2 of all activations, of the loss, of all gradients"
echo "   of the second step, after an update. float32: 5e-6, 5e-6, 2e-5. bfloat16, fast and plain: 1.5e-2, 1e-3, 4e-2, and"
echo "   from four layers on 2.5e-2, 1e-3, 6e-2, since its rounding adds up from layer to layer (dropout's scale, too);"
echo "   for gradients through norms of 5 numbers (short) 8e-2. plain - fast: the same limits between these two."
printf '%-44s %6s   %-25s   %-25s   %-25s   %-25s\n' "" "" "float32" "bfloat16, fast" "bfloat16, plain" "plain - fast"
printf '%-44s %6s' "configuration" "layers"
for kind in fp32 fast plain both; do printf '   %-7s  %-7s  %-7s' act loss grad; done
printf '\n'
# smooth where gradients are small: otherwise AdamW divides rounding errors by themselves
smooth="--warmup 0 --schedule constant --lr 2e-3 --eps 1e-2 --steps 2"

# The worst of a kind in ./compare's table, "" if it has none of it.
worst() { sed -n "s/^worst $1  *\([^ ]*\) at .*/\1/p" "$2"; }

# KIND PROGRAM TOLERANCE REFERENCE OPTIONS...: $tmp/KIND.log becomes ./compare's table, $tmp/KIND.status its status
compared() {
    kind=$1 program=$2 tolerance=$3 reference=$4
    shift 4
    rm -f "$tmp/$kind.dump"
    { "$gpu/$program" "$@" --dump "$tmp/$kind.dump" > "$tmp/$kind.run" 2>&1 &&
        ./compare "$reference" "$tmp/$kind.dump" $tolerance; } > "$tmp/$kind.log" 2>&1
    echo $? > "$tmp/$kind.status"
}

# NAME REFERENCE OPTIONS...: a row of the table, judged by its worst numbers and by ./compare, which also fails
# for what is missing, for zeros and for NaN
table_row() {
    name=$1 reference=$2 problem=
    shift 2
    compared fp32 train_cuda_fp32 "" "$reference" "$@" &
    pid=$!
    compared fast train_cuda "--tolerance 8e-2" "$reference" "$@"
    (export MEGALODON_PLAIN=1 && compared plain train_cuda "--tolerance 8e-2" "$reference" "$@")
    wait $pid
    ./compare "$tmp/fast.dump" "$tmp/plain.dump" --tolerance 8e-2 > "$tmp/both.log" 2>&1
    echo $? > "$tmp/both.status"
    grep -q '^backend .* plain kernels' "$tmp/plain.run" || problem=" MEGALODON_PLAIN,"
    layers=$(sed -n 's/^model  *\([0-9]*\) layers.*/\1/p' "$tmp/fp32.run")
    act=1.5e-2 grad=4e-2
    if [ "${layers:-0}" -ge 4 ]; then act=2.5e-2 grad=6e-2; fi
    case $name in *short) grad=8e-2 ;; esac
    printf '%-44s %6s' "$name" "${layers:--}"
    for kind in fp32 fast plain both; do
        for what in activation loss gradient; do
            value=$(worst $what "$tmp/$kind.log")
            printf '%s%-7s' "$([ $what = activation ] && echo '   ' || echo '  ')" "${value:--}"
            case $kind-$what in
            fp32-activation | fp32-loss) limit=5e-6 ;;
            fp32-gradient) limit=2e-5 ;;
            *-activation) limit=$act ;;
            *-loss) limit=1e-3 ;;
            *-gradient) limit=$grad ;;
            esac
            at_most "$value" $limit || problem="$problem $kind $what,"
        done
        [ "$(cat "$tmp/$kind.status")" = 0 ] || problem="$problem $kind status,"
    done
    if [ -z "$problem" ]; then
        passed=$((passed + 1))
        echo "   ok"
        return
    fi
    failed=$((failed + 1))
    printf '   FAIL\n      %s\n' "${problem%,}"
    for kind in fp32 fast plain both; do
        cat "$tmp/$kind.run" "$tmp/$kind.log" 2> /dev/null | grep -e ' FAIL$' -e '<-- first' -e 'error' -e '^compare:' -e ': not found' |
            head -n 3 | cut -c 1-180 | sed "s/^/      $kind: /"
    done
}

# NAME OPTIONS...: the same step on CPU and GPU
cpu_against_gpu() {
    title=$1
    shift
    rm -f "$tmp/cpu.dump"
    quiet ./train "$@" $smooth --data $text --val-every 0 --dump "$tmp/cpu.dump" || verdict 1 "./train $*"
    table_row "$title" "$tmp/cpu.dump" "$@" $smooth --data $text --val-every 0
}

# NAME TITLE: a fixture, whose tensors others have computed (see tests/test_fixtures.sh)
fixture() {
    expect=tests/data/$1.expect.safetensors
    table_row "$2" $expect --init "tests/data/$1.init.safetensors" --batch $expect --steps 1
}

cat > "$tmp/odd.json" << 'JSON'
{"num_layers": 3, "model_dim": 45, "z_dim": 18, "value_dim": 33, "num_heads": 3, "ffn_hidden_dim": 37, "cema_ndim": 5,
 "chunk_size": 23, "vocab_size": 259, "norm_num_groups": 9, "swiglu": true, "rescale_nffn": true, "scale_emb": true}
JSON
odd="--config $tmp/odd.json --batch-size 3"
dropouts="--dropout 0.1 --hidden-dropout 0.2 --attention-dropout 0.3"
fixtures=
if [ -z "$small" ] && command -v "${CC:-cc}" > /dev/null; then
    sh tests/test_fixtures.sh "$gpu/train_cuda_fp32" ./compare > "$tmp/fixtures" 2>&1 & # beside the table
    fixtures=$!
fi
fixture released_a "the released code's tensors, a: 2x48"
fixture released_b "the released code's tensors, b: 1x64, tied"
if [ -z "$small" ]; then
    for name in deep equal noaffine plain ragged short tied wide; do fixture jax_$name "megalodon-jax's tensors, $name"; done
fi
cpu_against_gpu "demo, 2x200, chunks of 64" --batch-size 2 --seq-len 200
cpu_against_gpu "odd sizes, 3x61, chunks of 23" $odd --seq-len 61
cpu_against_gpu "  below a chunk: 3x7" $odd --seq-len 7
cpu_against_gpu "  single tokens: 5x1" --config "$tmp/odd.json" --batch-size 5 --seq-len 1
cpu_against_gpu "  all three dropouts" $odd --seq-len 61 $dropouts
cpu_against_gpu "  all three dropouts, --recompute" $odd --seq-len 61 $dropouts --recompute
cpu_against_gpu "  --grad-accum 2" $odd --seq-len 61 --grad-accum 2
cpu_against_gpu "  --carry-state, 3x46" $odd --seq-len 46 --carry-state
cpu_against_gpu "  --carry-state, --grad-accum 2, dropout" $odd --seq-len 46 --carry-state --grad-accum 2 $dropouts
cpu_against_gpu "  --segment-len 23" $odd --seq-len 61 --segment-len 23
cpu_against_gpu "  --segment-len 46, dropouts, --recompute" $odd --seq-len 61 --segment-len 46 $dropouts --recompute
cpu_against_gpu "  --eot 10: ignored targets" $odd --seq-len 61 --eot 10
cpu_against_gpu "  --share-emb --no-norm-affine, no swiglu" --model-dim 60 --num-layers 2 --share-emb --no-norm-affine --no-swiglu --norm-num-groups 4 --batch-size 2 --seq-len 100
cpu_against_gpu "one head of value_dim 2048, 2x150" --model-dim 64 --num-layers 1 --value-dim 2048 --batch-size 2 --seq-len 150
if [ -z "$small" ]; then
    cpu_against_gpu "enwik8, 2x300" --preset enwik8 --batch-size 2 --seq-len 300
    cpu_against_gpu "enwik8, 2x300, dropout, --recompute" --preset enwik8 --batch-size 2 --seq-len 300 --dropout 0.1 --hidden-dropout 0.1 --attention-dropout 0.1 --recompute
    cpu_against_gpu "mega200M, two layers, V 256, 2x2500" --preset mega200M --num-layers 2 --vocab-size 256 --batch-size 2 --seq-len 2500
    cpu_against_gpu "  in segments of 2048: 1x5000" --preset mega200M --num-layers 2 --vocab-size 256 --batch-size 1 --seq-len 5000 --segment-len 2048
    cpu_against_gpu "mega1.3B, one layer, V 256, 1x2100" --preset mega1.3B --num-layers 1 --vocab-size 256 --batch-size 1 --seq-len 2100
fi
if [ -n "$fixtures" ]; then
    wait "$fixtures"
    status=$?
    grep FAIL "$tmp/fixtures" | tee "$tmp/log"
    set -- $(tail -n 1 "$tmp/fixtures" | sed -n 's/^\([0-9][0-9]*\) passed, 0 failed$/\1/p') 0
    [ $status -eq 0 ] && [ "$1" -gt 0 ]
    verdict $? "tests/test_fixtures.sh with train_cuda_fp32: $1 passed; five AdamW steps of each fixture among them"
elif [ -z "$small" ]; then
    skip "tests/test_fixtures.sh with train_cuda_fp32, which needs ${CC:-cc}"
fi

# ---------------------------------------------------------------- 3

if [ -z "$small" ]; then
    steps=200 last=20
    run="--preset enwik8 --batch-size 4 --seq-len 512 --lr 1e-3 --steps $steps"
    section "two hundred steps of the enwik8 preset, 4x512, on the same data"
else
    steps=12 last=3
    run="--batch-size 2 --seq-len 100 --steps $steps --warmup 2"
    section "twelve steps of the demo preset, 2x100, on the same data"
fi
run="$run --data $text --val-every 0 --save-every 0 --overwrite --out $tmp/long"
for program in ./train "$gpu/train_cuda_fp32" "$gpu/train_cuda"; do
    name=$(basename "$program")
    quiet "$program" $run --log "$tmp/$name.csv"
    status=$? time=$(sed -n "s/^done at step $steps after \([0-9.]* s\).*/\1/p" "$tmp/log")
    [ $status -eq 0 ] && [ -n "$time" ]
    verdict $? "$name: $steps steps, ${time:--}"
done
# the largest relative difference of two logs' losses, "" unless they have all steps
apart() {
    paste -d, "$1" "$2" | awk -F, -v steps=$steps 'NR > 1 && $1 == NR - 1 && $8 == $1 && $2 > 0 { d = $9 / $2 - 1; d = d < 0 ? -d : d
        if (!(d <= far)) far = d; n++ } END { if (n == steps) printf "%.1e", far }'
}
far=$(apart "$tmp/train.csv" "$tmp/train_cuda_fp32.csv")
at_most "$far" 1e-5
verdict $? "float32: the loss of every step within 1e-5; the worst: ${far:--}"
tail_mean() { awk -F, -v from=$((steps - last)) '$1 > from { s += $2; n++ } END { if (n > 0) printf "%.6f", s / n }' "$1"; }
cpu=$(tail_mean "$tmp/train.csv") bf16=$(tail_mean "$tmp/train_cuda.csv")
near "$bf16" "$cpu" 0.01
verdict $? "bfloat16: the mean of the last $last losses within 1 %: ${bf16:--}, CPU ${cpu:--}"
first=$(column "$tmp/train.csv" 1 2)
at_most "$cpu" "$(awk -v x="$first" 'BEGIN { print 0.95 * x }')"
verdict $? "  it fell, from ${first:--}"

# ---------------------------------------------------------------- 4

section "one checkpoint, predicted by all: whole, and in pieces that hand on the state"
# 5001 bytes: 5000 predicted. --eval takes them as one sequence, --score in pieces of 2048.
head -c 5001 $text > "$tmp/text"
for kind in cpu fp32 fast plain; do
    from=$gpu same=5e-5
    case $kind in
    cpu) name=CPU program= from=. limit=0 ;;
    fp32) name=float32 program=_cuda_fp32 limit=1e-5 ;;
    fast) name=bfloat16 program=_cuda limit=5e-3 same=1e-3 ;;
    plain) name="bfloat16, plain" program=_cuda limit=5e-3 same=1e-3 && export MEGALODON_PLAIN=1 ;;
    esac
    quiet "$from/train$program" --init "$tmp/long" --val-data "$tmp/text" --eval --batch-size 1 --seq-len 5000
    whole=$(sed -n 's/^val loss .* nats = \([0-9.]*\) bits per byte | 1 windows of 5000$/\1/p' "$tmp/log")
    quiet "$from/sample$program" --model "$tmp/long" --score "$tmp/text"
    pieces=$(sed -n 's/^all  *5000  *\([0-9.]*\)$/\1/p' "$tmp/log")
    unset MEGALODON_PLAIN
    if [ $kind = cpu ]; then reference=$whole reference_pieces=$pieces; fi
    near "$whole" "$reference" $limit
    verdict $? "$name: ${whole:--} bits per byte, whole${program:+; the CPU within $limit}"
    near "$pieces" "$whole" $same && near "$pieces" "$reference_pieces" "$([ $limit = 1e-5 ] && echo $same || echo $limit)"
    verdict $? "  in pieces: ${pieces:--}, as whole within $same"
done

# ---------------------------------------------------------------- 5

section "what one backend saved goes on with another: six steps at once, and three on one and three on the other"
model="--batch-size 2 --seq-len 128 --chunk-size 64 --data $text"
plan="$model --carry-state --dropout 0.1 --steps 6 --warmup 2 --val-every 0 --save-every 3 --overwrite"
for program in "" _cuda_fp32 _cuda; do
    from=$gpu
    if [ -z "$program" ]; then from=.; fi
    quiet "$from/train$program" $plan --out "$tmp/six$program" --log "$tmp/six$program.csv" &&
        [ -d "$tmp/six$program/step-00000003" ]
    verdict $? "train$program: six steps, saved at the third"
done
handed_on() { # FROM TO LIMIT: the last three steps by TO
    rm -rf "$tmp/three" "$tmp/three.csv"
    mkdir "$tmp/three"
    cp -r "$tmp/six$1/step-00000003" "$tmp/six$1/options.txt" "$tmp/three"
    from=$gpu
    if [ -z "$2" ]; then from=.; fi
    quiet "$from/train$2" --resume "$tmp/three" --log "$tmp/three.csv"
    status=$?
    for i in 4 5 6; do
        near "$(column "$tmp/three.csv" $i 2)" "$(column "$tmp/six$1.csv" $i 2)" "$3" || status=1
    done
    [ $status -eq 0 ] && [ -d "$tmp/three/step-00000006" ]
    verdict $? "train$1, then train$2: loss $(column "$tmp/three.csv" 6 2), at once $(column "$tmp/six$1.csv" 6 2); within $3"
}
handed_on "" _cuda_fp32 1e-5
handed_on _cuda_fp32 "" 1e-5
handed_on "" _cuda 2e-3
handed_on _cuda "" 2e-3
handed_on _cuda _cuda_fp32 2e-3
for program in _cuda_fp32 _cuda; do handed_on $program $program 0; done

head -c 300 $text > "$tmp/prompt"
greedy() { # PROGRAM OPTIONS...: 100 bytes
    program=$1
    shift
    "$program" --model "$tmp/six" --temperature 0 --num-tokens 100 "$@" 2> "$tmp/log"
}
greedy ./sample --prompt-file "$tmp/prompt" --state-out "$tmp/cpu.state" > "$tmp/cpu.text"
greedy ./sample --state-in "$tmp/cpu.state" > "$tmp/cpu.more"
[ "$(wc -c < "$tmp/cpu.text")" -eq 400 ] && [ "$(wc -c < "$tmp/cpu.more")" -eq 100 ]
verdict $? "sample: 300 bytes read, 100 written, and 100 more from the state file"
greedy "$gpu/sample_cuda_fp32" --prompt-file "$tmp/prompt" --state-out "$tmp/fp32.state" | cmp - "$tmp/cpu.text" >> "$tmp/log" 2>&1
verdict $? "sample_cuda_fp32 writes the same 100 bytes"
greedy "$gpu/sample_cuda_fp32" --state-in "$tmp/cpu.state" | cmp - "$tmp/cpu.more" >> "$tmp/log" 2>&1
verdict $? "  and goes on from sample's state with the same 100"
greedy ./sample --state-in "$tmp/fp32.state" | cmp - "$tmp/cpu.more" >> "$tmp/log" 2>&1
verdict $? "  and sample goes on from its state with the same 100"
greedy "$gpu/sample_cuda" --state-in "$tmp/cpu.state" --state-out "$tmp/bf16.state" > "$tmp/bf16.more" &&
    greedy ./sample --state-in "$tmp/bf16.state" >> "$tmp/bf16.more"
[ "$(wc -c < "$tmp/bf16.more")" -eq 200 ]
verdict $? "sample_cuda goes on from sample's state, and sample from its: 200 bytes"
(export MEGALODON_PLAIN=1 && greedy "$gpu/sample_cuda" --state-in "$tmp/bf16.state" --state-out "$tmp/plain.state") > "$tmp/plain.more" &&
    greedy "$gpu/sample_cuda" --state-in "$tmp/plain.state" >> "$tmp/plain.more"
[ "$(wc -c < "$tmp/plain.more")" -eq 200 ]
verdict $? "  with plain kernels from the state of fast ones, and the other way round: 200 bytes"

# ---------------------------------------------------------------- 6

section "the same run twice: the same bits"
case $small in
"") twice="--preset enwik8 --batch-size 4 --seq-len 512" ;;
*) twice="--batch-size 2 --seq-len 100" ;;
esac
twice="$twice --dropout 0.1 --hidden-dropout 0.1 --attention-dropout 0.1 --steps 5 --warmup 0 --val-every 0 --data $text --overwrite"
for kind in fp32 fast plain; do
    case $kind in fp32) program=train_cuda_fp32 name=$program ;; *) program=train_cuda name="$program, $kind kernels" ;; esac
    if [ $kind = plain ]; then export MEGALODON_PLAIN=1; fi
    status=0
    for seed in 1 1 2; do # the last one must differ
        quiet "$gpu/$program" $twice --seed $seed --out "$tmp/twice" || status=1
        mv "$tmp/twice" "$tmp/bits.$seed.$([ -d "$tmp/bits.$seed.a" ] && echo b || echo a)"
    done
    for file in model optimizer; do
        cmp "$tmp/bits.1.a/step-00000005/$file.safetensors" "$tmp/bits.1.b/step-00000005/$file.safetensors" >> "$tmp/log" 2>&1 || status=1
    done
    verdict $status "$name: five steps with dropout, parameters and moments bitwise equal"
    ! cmp -s "$tmp/bits.1.a/step-00000005/model.safetensors" "$tmp/bits.2.a/step-00000005/model.safetensors" &&
        [ -f "$tmp/bits.2.a/step-00000005/model.safetensors" ]
    verdict $? "  and others with another seed"
    rm -rf "$tmp"/bits.*
    unset MEGALODON_PLAIN
done

if [ -z "$small" ]; then
    section "several processes sharing the card, against one on the CPU"
    quiet sh tests/test_mpi.sh train_cuda_fp32
    status=$?
    if grep -q '^skipped: ' "$tmp/log"; then
        skip "no mpirun, or built without MPI"
    else
        set -- $(tail -n 1 "$tmp/log" | sed -n 's/^\([0-9][0-9]*\) passed, 0 failed$/\1/p') 0
        [ $status -eq 0 ] && [ "$1" -gt 0 ]
        verdict $? "tests/test_mpi.sh with train_cuda_fp32: $1 passed"
    fi
fi

# ---------------------------------------------------------------- 7

# V FILE B L: a batch of random tokens, as a dump has them
random_batch() {
    bytes=$(($3 * $4 * 4))
    header=$(printf '{"input.tokens":{"dtype":"I32","shape":[%d,%d],"data_offsets":[0,%d]},"input.targets":{"dtype":"I32","shape":[%d,%d],"data_offsets":[%d,%d]}}' \
        "$3" "$4" $bytes "$3" "$4" $bytes $((2 * bytes)))
    {
        printf "$(printf '\\%03o\\%03o\\000\\000\\000\\000\\000\\000' $((${#header} % 256)) $((${#header} / 256)))"
        printf '%s' "$header"
        printf "$(awk -v n=$((2 * $3 * $4)) -v V="$1" 'BEGIN { srand(1); for (i = 0; i < n; i++) {
            t = int(rand() * V); printf "\\%03o\\%03o\\000\\000", t % 256, t / 256 } }')"
    } > "$2"
}
# PRESET V B L STEPS TOKENS_PER_S GIB FLOOR [plain]: theirs, the best other Megalodon's; floor: the products' at the
# measured rate
speed() {
    name=$1
    if [ "${9:-}" = plain ]; then name="$1, plain" && export MEGALODON_PLAIN=1; fi
    rm -f "$tmp/speed.csv" "$tmp/used"
    random_batch "$2" "$tmp/batch" "$3" "$4"
    "$gpu/train_cuda" --preset "$1" --batch "$tmp/batch" --steps "$5" --lr 1e-4 --log "$tmp/speed.csv" > "$tmp/log" 2>&1 &
    pid=$!
    unset MEGALODON_PLAIN
    while kill -0 $pid 2> /dev/null; do
        nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits 2> /dev/null >> "$tmp/used"
        sleep 0.2
    done
    wait $pid
    status=$?
    ms=$(awk -F, 'NR > 6 { print $5 }' "$tmp/speed.csv" | sort -n | awk '{ x[NR] = $1 } END { if (NR > 4) printf "%.2f", (x[int((NR + 1) / 2)] + x[int(NR / 2) + 1]) / 2 }')
    rate=$(awk -v ms="$ms" -v n=$(($3 * $4)) 'BEGIN { if (ms > 0) printf "%.1f", n / ms }')
    peak=$(sed -n 's/.*peak memory \([0-9]*\) MiB.*/\1/p' "$tmp/log")
    gib=$(awk -v x="$peak" 'BEGIN { if (x > 0) printf "%.1f", x / 1024 }')
    used=$(sort -n "$tmp/used" | tail -n 1 | awk '{ printf "%.1f", $1 / 1024 }')
    share=$(awk -v r="$rate" -v f="$8" 'BEGIN { printf "%.0f%%", 100 * r / f }')
    printf '%-15s %9s %8s %12s %9s %6s %9s   %10s %6s %10s' "$name" "$3x$4" "${ms:--}" "${rate:--}k" "$share" "${gib:--}" "${used:--}" "$6k" "$7" "$8k"
    good=$status
    at_most "$gib" "$7" || good=1
    # their speeds are an H200's
    case $backend in *H200*) at_most "$6" "$rate" || good=1 ;; *) number "$rate" || good=1 ;; esac
    if [ $good -eq 0 ]; then
        passed=$((passed + 1))
        echo "   ok"
    else
        failed=$((failed + 1))
        echo "   FAIL"
        [ $status -eq 0 ] || tail -n 3 "$tmp/log" | sed 's/^/      /'
    fi
    sed -n 's/^memory  */          /p' "$tmp/log"
}
if [ -z "$small" ]; then
    section "speed of whole training steps, bfloat16, the median of those after the first five"
    echo "   theirs: the fastest other Megalodon measured on an H200, and its memory. Floor: the matrix products alone, at"
    echo "   the rate of a large one. On an H200 it fails when slower than theirs; everywhere when it takes more memory."
    printf '%-15s %9s %8s %12s %9s %6s %9s   %10s %6s %10s\n' preset tokens ms "tokens/s" "of floor" GiB "GiB used" theirs GiB floor
    speed mega200M 32000 8 2048 25 163 21.2 610
    speed mega200M 32000 8 2048 15 163 21.2 610 plain
    speed mega200M 32000 1 16384 25 128 22.5 610
    speed enwik8 256 64 512 40 1400 5.8 11000
    speed mega1.3B 32000 2 4096 20 33 49.5 95
fi

# ---------------------------------------------------------------- 8

section "compute-sanitizer"
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2> /dev/null)
# NAME PROGRAM OPTIONS...: starts it under the tool; all of them at once, since each is slow and fills little
sanitized() {
    count=$((count + 1))
    echo "$tool: $1" > "$tmp/check.$count.name"
    shift
    {
        timeout 240 "$sanitizer" --tool $tool --error-exitcode 9 "$@" --threads 1 > "$tmp/check.$count" 2>&1
        echo $? > "$tmp/check.$count.status"
    } &
}
# its last line, and only if nothing was found
clean() { sed -n 's/^=* [A-Z]* SUMMARY: //p' "$1" | tail -n 1 | grep -x -e '0 errors' -e '0 hazards displayed (0 errors, 0 warnings)' | sed 's/ displayed.*//'; }
if [ -z "$sanitizer" ]; then
    skip "compute-sanitizer is neither on the PATH nor in /usr/local/cuda/bin"
else
    quiet ./train --batch-size 2 --seq-len 100 --num-layers 1 --steps 1 --data $text --val-every 0 --dump "$tmp/small"
    count=0
    for tool in memcheck racecheck initcheck synccheck; do
        for p in _fp32 ""; do
            sanitized "train_cuda$p, one layer of demo, 2x100" "$gpu/train_cuda$p" --batch "$tmp/small" --num-layers 1 --steps 1
            sanitized "train_cuda$p, one layer of odd sizes, dropouts, --recompute, states" "$gpu/train_cuda$p" --config $tmp/odd.json --num-layers 1 --batch-size 2 --seq-len 46 $dropouts --recompute --carry-state --steps 2 --data $text --val-every 0 --dump "$tmp/$tool$p.dump"
            sanitized "sample_cuda$p, 70 bytes read, 2 written" "$gpu/sample_cuda$p" --model "$tmp/six" --num-tokens 2 --prompt "$(head -c 70 $text | tr -c 'a-zA-Z' ' ')"
        done
    done
    wait
    i=0
    while [ $i -lt $count ]; do
        i=$((i + 1))
        # a tool that does not know this GPU may end with nothing said, or run nothing
        summary=$(clean "$tmp/check.$i")
        grep -m 1 -A 4 -e '^=.*Invalid' -e '^=.*Uninit' -e '^=.*hazard' -e '^=.*Barrier' -e '^=.*rror' "$tmp/check.$i" > "$tmp/log" ||
            cp "$tmp/check.$i" "$tmp/log"
        [ -n "$summary" ] && [ "$(cat "$tmp/check.$i.status")" = 0 ] && grep -q -e '^done at step [12] ' -e ' wrote 2, ' "$tmp/check.$i"
        verdict $? "$(cat "$tmp/check.$i.name"): ${summary:-status $(cat "$tmp/check.$i.status")}"
    done
fi

printf '\nafter %d s\n' $(($(date +%s) - begin))
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
