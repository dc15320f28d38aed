# What a GPU's shared memory and compute capability change, with megalodon.cu's kernels on the CPU: kernels under the limits
# of other devices than the emulator's own (227 KB), a training step, and what is said of a GPU that cannot be used.
# Run by `make test-emulated`.
export LC_ALL=C
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
passed=0 failed=0
verdict() { # status, text
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)) word=ok; else failed=$((failed + 1)) word=FAIL; fi
    printf '%-100s %s\n' "$2" $word
    if [ "$1" -ne 0 ]; then tail -n 6 "$tmp/log" | sed 's/^/      /'; fi
}

# KB BYTES NAME: the checks of test_cuda whose names contain NAME, on a device with so many bytes per thread block
unit() {
    for program in test_cuda test_cuda_fp32; do
        CUDA_ON_CPU_OPTIN=$2 build/emulated/$program "$3" > "$tmp/log" 2>&1
        status=$?
        last=$(tail -n 1 "$tmp/log")
        case $last in 0\ passed* | *[1-9]\ failed | *[1-9]0\ failed) status=1 ;; *\ passed,\ 0\ failed) ;; *) status=1 ;; esac
        verdict $status "$1 KB: $program $3: $last"
    done
}
for name in tiles decode qk timestep_norm emulator; do unit 99 101376 $name; done
unit 99 101376 few_rows
unit 163 166912 tiles
unit 163 166912 emulator

# --batch: no sample is written at the end
model="--num-layers 1 --model-dim 40 --num-heads 1 --z-dim 8 --value-dim 16 --ffn-hidden-dim 16 --cema-ndim 2
    --chunk-size 16 --norm-num-groups 4 --steps 1"
./train $model --data dev/data/demo.txt --batch-size 2 --seq-len 96 --val-every 0 --dump "$tmp/cpu" > "$tmp/log" 2>&1
for kb in 99 163 227; do
    { CUDA_ON_CPU_OPTIN=$((kb * 1024)) build/emulated/train_fp32 $model --batch "$tmp/cpu" --dump "$tmp/gpu" &&
        ./compare "$tmp/cpu" "$tmp/gpu"; } > "$tmp/log" 2>&1
    verdict $? "$kb KB: a training step, every tensor against the CPU's"
    rm -f "$tmp/gpu"
done

# TEXT EXPECTED VARIABLES...: train_fp32 ends with status 1 and this message, before anything else
refused() {
    text=$1 expected=$2
    shift 2
    env "$@" build/emulated/train_fp32 $model --batch "$tmp/cpu" $more > "$tmp/log" 2>&1
    status=$?
    [ $status -eq 1 ] && grep -q "^error: $expected" "$tmp/log" && ! grep -q '^step' "$tmp/log"
    verdict $? "$text"
}
more=
refused "64 KB are too few" "CPU has compute capability 9.0 and 65536 bytes .* 8.0 and 101376 bytes are needed. ./train" \
    CUDA_ON_CPU_OPTIN=65536
refused "compute capability 7.5 is too old" "CPU has compute capability 7.5 and 65536 bytes .* 8.0 and 101376 bytes are" \
    CUDA_ON_CPU_CAPABILITY=75 CUDA_ON_CPU_OPTIN=65536
refused "7.0 with enough shared memory, too" "CPU has compute capability 7.0 .* compute capability 8.0 and" \
    CUDA_ON_CPU_CAPABILITY=70
refused "no code for this GPU: how to build it" "CPU has compute capability 12.0, for .* no code .*make cuda CUARCH=120" \
    CUDA_ON_CPU_CAPABILITY=120 CUDA_ON_CPU_NO_CODE=1
more="--z-dim 6216"
refused "heads that are too large for 99 KB" "--z-dim 6216 with --num-heads 1: .* at most 6208 .*(101376 bytes" \
    CUDA_ON_CPU_OPTIN=101376
more="--z-dim 6208"
CUDA_ON_CPU_OPTIN=101376 build/emulated/train_fp32 $model --batch "$tmp/cpu" $more > "$tmp/log" 2>&1
verdict $? "the largest that fit"
more="--model-dim 8200"
refused "a model_dim beyond 8192" "--model-dim 8200: on a GPU it is at most 8192"

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
