# What a GPU's compute capability and shared memory change, with the kernels of megalodon.cu and kernels/ on the CPU: tests
# of kernels and a training step on other devices than the emulator's own (9.0), plain and fast kernels, and the messages
# for GPUs that cannot be used. Run by `make test-emulated`.
export LC_ALL=C
unset MEGALODON_PLAIN
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
passed=0 failed=0
verdict() { # status, text
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)) word=ok; else failed=$((failed + 1)) word=FAIL; fi
    printf '%-100s %s\n' "$2" $word
    if [ "$1" -ne 0 ]; then tail -n 6 "$tmp/log" | sed 's/^/      /'; fi
}

# PROGRAM CAPABILITY NAME: the checks of a test program whose names contain NAME, on a device of this compute capability.
# A thread block has 64 KB of shared memory on 7.5, 99 KB on 8.6, 163 KB on 8.0.
unit() {
    CUDA_ON_CPU_CAPABILITY=$2 build/emulated/$1 "$3" > "$tmp/log" 2>&1
    status=$?
    last=$(tail -n 1 "$tmp/log")
    case $last in 0\ passed* | *[1-9]\ failed | *[1-9]0\ failed) status=1 ;; *\ passed,\ 0\ failed) ;; *) status=1 ;; esac
    verdict $status "compute capability $2: $1 $3: $last"
}
for name in tiles decode qk timestep_norm gemv emulator; do unit test_cuda 86 $name; done
for name in tiles emulator; do unit test_cuda 80 $name; done
for name in cema qk timestep_norm emulator; do unit test_cuda_fp32 75 $name; done

# --batch: no sample is written at the end. Sizes are such that all layers have fast kernels. Every option of the model that
# adds something to the formulas is on.
model="--num-layers 2 --model-dim 48 --num-heads 2 --z-dim 16 --value-dim 32 --ffn-hidden-dim 16 --cema-ndim 3
    --chunk-size 16 --norm-num-groups 4 --swiglu --rescale-nffn --scale-emb
    --dropout 0.1 --hidden-dropout 0.2 --attention-dropout 0.2 --steps 1"
./train $model --data dev/data/shakespeare.txt --batch-size 2 --seq-len 90 --val-every 0 --dump "$tmp/cpu" > "$tmp/log" 2>&1
step() { # VARIABLE=VALUE PROGRAM DUMP OPTIONS...: the same step
    variable=$1 program=$2 dump=$3
    shift 3
    env "$variable" build/emulated/$program $model "$@" --batch "$tmp/cpu" --dump "$tmp/$dump"
}
for capability in 75 80 86 90; do
    { step CUDA_ON_CPU_CAPABILITY=$capability train_fp32 gpu && ./compare "$tmp/cpu" "$tmp/gpu"; } > "$tmp/log" 2>&1
    verdict $? "compute capability $capability: a training step in float32, every tensor against the CPU's"
done
for capability in 80 86 90; do
    { step CUDA_ON_CPU_CAPABILITY=$capability train fast.$capability &&
        ./compare "$tmp/cpu" "$tmp/fast.$capability" --tolerance 4e-2; } > "$tmp/log" 2>&1
    verdict $? "compute capability $capability: a training step in bfloat16, every tensor against the CPU's within 4e-2"
done
# The tensors that others have computed, in bfloat16, within the bounds of tests/cuda.sh.
for file in tests/data/*.expect.safetensors; do
    name=$(basename "$file" .expect.safetensors)
    act=1.5e-2 grad=4e-2
    case $name in jax_deep) act=2.5e-2 grad=6e-2 ;; jax_short) grad=8e-2 ;; esac
    for plain in 0 1; do
        { MEGALODON_PLAIN=$plain build/emulated/train --init "tests/data/$name.init.safetensors" --batch "$file" \
            --steps 1 --dump "$tmp/gpu" && ./compare "$file" "$tmp/gpu" --tolerance 8e-2; } > "$tmp/log" 2>&1 &&
            awk -v act=$act -v grad=$grad '/^worst/ { limit = $2 == "activation" ? act : $2 == "gradient" ? grad : 1e-3; n++ }
                /^worst/ && !($3 <= limit) { bad = 1 } END { exit bad || n != 3 }' "$tmp/log"
        verdict $? "$name, MEGALODON_PLAIN=$plain: activations within $act, loss 1e-3, gradients $grad"
    done
done
for segment in 16 48 80; do
    { step MEGALODON_PLAIN=0 train_fp32 gpu --segment-len $segment && ./compare "$tmp/cpu" "$tmp/gpu"; } > "$tmp/log" 2>&1
    verdict $? "segments of $segment tokens in float32, every tensor against the CPU's whole sequence"
    for plain in 0 1; do
        { step MEGALODON_PLAIN=$plain train gpu --segment-len $segment &&
            ./compare "$tmp/cpu" "$tmp/gpu" --tolerance 4e-2; } > "$tmp/log" 2>&1
        verdict $? "  in bfloat16, MEGALODON_PLAIN=$plain: within 4e-2"
    done
done
cmp "$tmp/fast.86" "$tmp/fast.90" > "$tmp/log" 2>&1
verdict $? "the same bits with 99 KB and with 227 KB of shared memory"
{ step MEGALODON_PLAIN=1 train plain && grep -q '^backend .*, bfloat16, plain kernels' "$tmp/log" &&
    ./compare "$tmp/cpu" "$tmp/plain" --tolerance 4e-2; } > "$tmp/log" 2>&1
verdict $? "MEGALODON_PLAIN=1: the same against the CPU's, with plain kernels"
./compare "$tmp/fast.90" "$tmp/plain" --tolerance 4e-2 > "$tmp/log" 2>&1
verdict $? "plain against fast kernels, every tensor within 4e-2"
! cmp -s "$tmp/fast.90" "$tmp/plain"
verdict $? "  but not the same bits: these are other kernels"
{ step MEGALODON_PLAIN=0 train off && cmp "$tmp/fast.90" "$tmp/off"; } > "$tmp/log" 2>&1
verdict $? "MEGALODON_PLAIN=0: fast kernels"
{ step MEGALODON_PLAIN=0 train off && grep '^step  *1/' "$tmp/log" | awk -F'|' '{ share = $NF + 0 }
    END { exit !(NR == 1 && $NF ~ /% of floor$/ && share > 0 && share < 100) }'; } > "$tmp/log" 2>&1
verdict $? "a step's line ends with the share of the floor"

# Heads that need more shared memory than the fast kernels of q and k have.
wide="--num-layers 1 --num-heads 1 --z-dim 6216"
{ ./train $model $wide --batch "$tmp/cpu" --dump "$tmp/wide" &&
    step CUDA_ON_CPU_CAPABILITY=86 train gpu $wide && ./compare "$tmp/wide" "$tmp/gpu" --tolerance 4e-2; } > "$tmp/log" 2>&1
verdict $? "heads of 6216: too large for fast kernels, so plain ones"

# TEXT PROGRAM EXPECTED VARIABLES...: the program ends with status 1 and this message, before anything else
refused() {
    text=$1 program=$2 expected=$3
    shift 3
    env "$@" build/emulated/$program $model --batch "$tmp/cpu" > "$tmp/log" 2>&1
    status=$?
    [ $status -eq 1 ] && grep -q "^error: $expected" "$tmp/log" && ! grep -q '^step' "$tmp/log"
    verdict $? "$text"
}
refused "compute capability 7.5 has no bfloat16" train \
    "CPU has compute capability 7.5; this program needs 8.0. The float32 programs (_fp32) need 7.5" CUDA_ON_CPU_CAPABILITY=75
refused "7.0 is too old for float32, too" train_fp32 \
    "CPU has compute capability 7.0; this program needs 7.5. ./train and ./sample run on the CPU" CUDA_ON_CPU_CAPABILITY=70
for program in train train_fp32; do
    refused "$program has no code for this GPU: how to build it" $program \
        "CPU has compute capability 12.0, for .* no code .*make cuda CUARCH=120" \
        CUDA_ON_CPU_CAPABILITY=120 CUDA_ON_CPU_NO_CODE=1
done

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
