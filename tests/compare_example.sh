# dev/compare_example.py: ./compare finds the mistake in the port of a PyTorch module to JAX, and none without it. From
# the root of the repository: sh tests/compare_example.sh [python with torch] [python with jax]
. tests/check.sh
check "the dump of a PyTorch module" "${1:-python3}" dev/compare_example.py torch "$folder/torch"
check "the dump of its port to JAX" "${2:-python3}" dev/compare_example.py jax "$folder/jax"
check "the dump of the port without its mistake" "${2:-python3}" dev/compare_example.py jax "$folder/fixed" --fixed
"$compare" "$folder/torch" "$folder/jax" > "$folder/out"
status=$?
check "the first tensor over tolerance is the GELU's output" eval '[ $status -eq 1 ] &&
    grep -B 1 "<-- first over" "$folder/out" | grep "^act.gelu "'
"$compare" "$folder/torch" "$folder/jax" --only 'grad.*' > "$folder/out"
status=$?
check "the first gradient over tolerance is that w.r.t. the GELU's input" eval '[ $status -eq 1 ] &&
    grep -B 1 "<-- first over" "$folder/out" | grep "^grad.act.linear1 "'
check "without the mistake all 29 tensors agree" eval '"$compare" "$folder/torch" "$folder/fixed" | tee "$folder/out" &&
    grep "^29 tensors compared, 29 passed, 0 failed" "$folder/out"'
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
