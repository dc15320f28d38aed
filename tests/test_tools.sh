# The Python tools of dev/ that write files: no output replaces an input or a file of another kind. They need python3;
# what needs numpy, too, is tried where it is, in build/venv for instance. From the root of the repository.
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
passed=0 failed=0
python=python3
if [ -x build/venv/bin/python ]; then python=$PWD/build/venv/bin/python; fi
if ! $python -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2> /dev/null; then
    echo "skipped: no python3"
    echo "0 passed, 0 failed"
    exit 0
fi
export PYTHONDONTWRITEBYTECODE=1

verdict() { # status, text
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)) word=ok; else failed=$((failed + 1)) word=FAIL; fi
    printf '%-4s  %s\n' $word "$2"
    [ "$1" -eq 0 ] || sed 's/^/      /' "$tmp/err"
}
# Stand-ins for the modules that a tool imports: a command must be refused before it uses any of them.
for module in numpy equinox jax matplotlib megalodon_jax safetensors torch; do
    mkdir -p "$tmp/stubs/$module"
    printf 'def __getattr__(name):\n    return type(name, (Exception,), {})\n' > "$tmp/stubs/$module/__init__.py"
done
for module in jax/numpy matplotlib/pyplot megalodon_jax/checkpoint safetensors/numpy; do cp "$tmp/stubs/numpy/__init__.py" "$tmp/stubs/$module.py"; done

# Files of every kind, none of which may change.
printf 'the first text\n' > "$tmp/a.txt"
printf 'the second text\n' > "$tmp/b.txt"
printf '\210\330\064\001\001\000\000\000\000\000\000\000' > "$tmp/old.bin"
cp tests/data/tokenizer.bin "$tmp/tokenizer.bin"
cp tests/data/jax_tied.init.safetensors "$tmp/model.safetensors"
cp "$tmp/a.txt" "$tmp/c_000000.txt" && cp "$tmp/a.txt" "$tmp/d_000007.bin" && cp "$tmp/a.txt" "$tmp/e.bin.tmp"
ln -s a.txt "$tmp/link.bin" && ln "$tmp/b.txt" "$tmp/hard.bin"
sums() { (cd "$tmp" && ls && cat ./*.txt ./*.bin ./*.tmp ./*.safetensors ./*.csv 2> /dev/null) | cksum; }
echo > "$tmp/err" && before=$(sums)
refused() { # word, tool, arguments
    word=$1 tool=$2
    shift 2
    PYTHONPATH="$tmp/stubs" $python "dev/$tool" "$@" > "$tmp/err" 2>&1
    [ $? -eq 1 ] && grep -q -e "error: .*$word" "$tmp/err" && [ "$(sums)" = "$before" ]
    verdict $? "refused with '$word': dev/$tool $*"
}
refused "b.txt); was the name of the output forgotten" make_bin.py "$tmp/b.txt" "$tmp/a.txt" "$tmp/b.txt"
refused "exists and is not a .bin token file" make_bin.py "$tmp/a.txt" "$tmp/b.txt"
refused "is also what is read" make_bin.py "$tmp/link.bin" "$tmp/a.txt"
refused "is also what is read" make_bin.py "$tmp/hard.bin" "$tmp/a.txt" "$tmp/b.txt"
refused "is also what is read" make_bin.py "$tmp/tokenizer.bin" "$tmp/a.txt" --tokenizer "$tmp/tokenizer.bin"
refused "is also what is read" make_bin.py "$tmp/old.bin" "$tmp/a.txt" "$tmp/old.bin"
refused "c_000000.txt: is also what is read" make_bin.py "$tmp/c.txt" "$tmp/a.txt" "$tmp/c_000000.txt" --shard-tokens 5
refused "d_000007.bin: exists and is not a .bin token file" make_bin.py "$tmp/d.bin" "$tmp/a.txt" --shard-tokens 5
refused "e.bin.tmp: exists" make_bin.py "$tmp/e.bin" "$tmp/a.txt"
refused "not a regular file" make_bin.py "$tmp" "$tmp/a.txt"
refused "cannot write" make_bin.py "$tmp/none/a.bin" "$tmp/a.txt"
refused "is empty" make_bin.py "" "$tmp/a.txt"
refused "is also what is read" make_tokenizer.py "$tmp/tokenizer.bin" "$tmp/tokenizer.bin"
refused "exists and is not a tokenizer.bin" make_tokenizer.py "$tmp/tokenizer.bin" "$tmp/old.bin"
refused "is also what is read" make_tokenizer.py "$tmp/b.txt" "$tmp/a.txt" --text "$tmp/a.txt"
refused "is also what is read" jax_bridge.py to-jax "$tmp/model.safetensors" "$tmp/model.safetensors"
refused "exists and is not a safetensors file" jax_bridge.py from-jax "$tmp/model.safetensors" "$tmp/a.txt"
refused "is also what is read" megalodon.py "$tmp/model.safetensors" --batch "$tmp/a.txt" --dump "$tmp/model.safetensors"
refused "is also what is read" megalodon.py "$tmp/model.safetensors" --batch "$tmp/b.txt" --dump "$tmp/hard.bin"
refused "exists and is not a safetensors file" megalodon.py "$tmp/model.safetensors" --batch "$tmp/b.txt" --dump "$tmp/a.txt"
refused "exists and is not a PNG image" plot_compare.py "$tmp/a.txt" "$tmp/b.txt"
refused "b.txt: is not a result of ./compare" plot_compare.py "$tmp/new.png" "$tmp/b.txt"
refused "exists and is not a table of this program" bench_length.py --csv "$tmp/a.txt"
refused "exists and is not a table of this program" bench_context.py --length 64 --csv "$tmp/a.txt"
refused "exists and is not a table of this program" experiments/learning.py same --only cpu --csv "$tmp/a.txt"
refused "b.txt: is not a table of dev/experiments/learning.py" plot_learning.py "$tmp/b.txt" --out "$tmp/new.png"
refused "exists and is not a PNG picture" plot_learning.py "$tmp/b.txt" --out "$tmp/a.txt"

# dev/plot_log.py, with a stand-in for matplotlib that prints what is drawn.
mkdir -p "$tmp/drawn/matplotlib" && echo 'def use(name): pass' > "$tmp/drawn/matplotlib/__init__.py"
cat > "$tmp/drawn/matplotlib/pyplot.py" << 'PYTHON'
class Drawing:
    def plot(self, x, y, *form, label, **others):
        print(label, list(x)[-1], "%.4g" % list(y)[-1], len(list(x)))
        return [self]

    def set_ylim(self, low, high):
        print("axis %.4g %.4g" % (low, high))

    def savefig(self, path, **others):
        open(path, "wb").write(b"\x89PNG\r\n\x1a\n")

    def __getattr__(self, name):
        return lambda *args, **named: None


def subplots(**others):
    return Drawing(), Drawing()
PYTHON
log=step,loss,grad_norm,lr,ms,tokens_per_s,val_loss
awk -v first="$log" 'BEGIN { print first; for (k = 1; k <= 100; k++) print k "," (k <= 9 ? 1e30 : k == 50 ? "nan" : 200 - k) ",1,1,1,1," }' > "$tmp/large.csv"
printf '%s\n1,6,1,1,1,1,\n2,4,1,1,1,1,5\n3,2,1,1,1,1,inf\n' $log > "$tmp/small.csv"
draw() { PYTHONPATH="$tmp/drawn" $python dev/plot_log.py "$@" > "$tmp/out" 2> "$tmp/err"; }
draw "$tmp/log.png" "$tmp/large.csv" --mean 1 && [ "$(tr '\n' ' ' < "$tmp/out")" = "$tmp/large.csv: training 100 100 99 axis 95.5 194.5 " ]
verdict $? "plot_log.py: a log without validation; an axis from 100 to 190 beside losses of 1e30, a NaN left out"
draw "$tmp/log.png" "$tmp/large.csv" "$tmp/small.csv" --label a --label b --mean 1 &&
    [ "$(sed -n '2,4p' "$tmp/out" | tr '\n' ' ')" = "b: training 3 2 3 b: validation 2 5 1 axis -7.35 198.3 " ]
verdict $? "  two logs with names, over the older picture; an infinite validation loss left out"
printf '%s\n1,nan,1,1,1,1,\n' $log > "$tmp/never.csv"
printf '%s\n1,2,1,1,1,1,\n2,3\n' $log > "$tmp/cut.csv"
echo > "$tmp/err" && before=$(sums)
refused "large.csv: is also what is read" plot_log.py "$tmp/large.csv" "$tmp/large.csv"
refused "a.txt: exists and is not a PNG picture" plot_log.py "$tmp/a.txt" "$tmp/large.csv"
refused "b.txt: is no log of ./train" plot_log.py "$tmp/new.png" "$tmp/b.txt"
refused "none.csv: No such file" plot_log.py "$tmp/new.png" "$tmp/none.csv"
refused "never.csv: has no step with a finite loss" plot_log.py "$tmp/new.png" "$tmp/never.csv"
refused "cut.csv: line 3 is no row of a log: 2,3" plot_log.py "$tmp/new.png" "$tmp/cut.csv"
refused "label: 1 labels for 2 logs" plot_log.py "$tmp/new.png" "$tmp/large.csv" "$tmp/small.csv" --label a
refused "mean 0: it is 1 or more" plot_log.py "$tmp/new.png" "$tmp/large.csv" --mean 0

# dev/get_plays.py refuses an archive that is not the one it knows.
refused "none.tar.gz: no such file" get_plays.py --archive "$tmp/none.tar.gz"
refused "a.txt: not the expected file" get_plays.py --archive "$tmp/a.txt"

# dev/to_bfloat16.py rounds to 8 bits: a tensor is off by 1e-3 to 2e-3 relative.
./train --threads 1 --preset demo --num-layers 1 --steps 0 --data README.md --out "$tmp/one" > "$tmp/err" 2>&1 &&
    $python dev/to_bfloat16.py "$tmp/one/step-00000000" "$tmp/half" > "$tmp/err" 2>&1 &&
    ./compare "$tmp/one/step-00000000/model.safetensors" "$tmp/half/model.safetensors" --tolerance 2e-3 > "$tmp/err" 2>&1 &&
    ! ./compare "$tmp/one/step-00000000/model.safetensors" "$tmp/half/model.safetensors" --tolerance 1e-3 > "$tmp/err" 2>&1
verdict $? "to_bfloat16.py rounds every tensor"
./train --threads 1 --init "$tmp/half" --config "$tmp/half/config.json" --data README.md --seq-len 64 --eval > "$tmp/err" 2>&1
verdict $? "  config.json is that of the model"
before=$(sums)
refused "model.safetensors: exists" to_bfloat16.py "$tmp/one/step-00000000" "$tmp/half"
refused "model.safetensors: No such file" to_bfloat16.py "$tmp/none" "$tmp/half2"
[ "$(cd dev && $python -c 'import struct, to_bfloat16
print(to_bfloat16.rounded(struct.pack("<5I", 0x3f808000, 0x3f818000, 0x7f800000, 0x7fffffff, 0xff800001)).hex())')" = 803f823f807fff7fc0ff ]
verdict $? "  ties go to even, infinity stays, NaN stays NaN"

# Two lengths on the CPU. The second one needs segments, and the program that reads prompts is missing.
context() { # length, models
    $python dev/bench_context.py --preset demo --train ./train --bench "$tmp/none" --segment-len 64 --csv "$tmp/context.csv" \
        --commit abc --length "$1" --models "$2"
}
context 64 megalodon.c > "$tmp/err" 2>&1 && context 128 megalodon.c,megalodon.c-whole >> "$tmp/err" 2>&1 &&
    context 128 megalodon.c >> "$tmp/err" 2>&1 && [ "$(wc -l < "$tmp/context.csv")" -eq 6 ] &&
    grep -q '^megalodon.c,training,64,[0-9.]*,[0-9.]*,[0-9]*,,.*,abc$' "$tmp/context.csv" &&
    grep -q '^megalodon.c,training,128,[0-9.]*,[0-9.]*,[0-9]*,segments of 64 tokens,' "$tmp/context.csv" &&
    grep -q '^megalodon.c-whole,training,128,[0-9.]*,[0-9.]*,[0-9]*,,' "$tmp/context.csv" &&
    grep -q '^megalodon.c,prompt,64,,,,failed: .*none' "$tmp/context.csv" &&
    grep -q '^megalodon.c,prompt,128,,,,"failed, as at 64 tokens"' "$tmp/context.csv"
verdict $? "bench_context.py reads the log of ./train, and keeps the rows that it has"
$python dev/plot_context.py --table "$tmp/context.csv" > "$tmp/err" 2>&1 && grep -q '^| 128 | [0-9.]* m*s, .* GiB | [0-9.]* m*s, .* GiB |$' "$tmp/err"
verdict $? "  plot_context.py prints them as a table"

if $python -c 'import numpy' 2> /dev/null; then
    $python dev/make_bin.py "$tmp/new.bin" "$tmp/a.txt" "$tmp/b.txt" --eot 256 > "$tmp/err" 2>&1 && grep -q -e "--vocab-size 257 --eot 256" "$tmp/err" &&
        [ "$(od -An -v -tu2 -j1024 "$tmp/new.bin" | tr -s ' \n' ' ' | cut -d' ' -f 2-4,18-20)" = "256 116 104 256 116 104" ] &&
        [ "$(wc -c < "$tmp/new.bin")" -eq $((1024 + 2 * (15 + 16 + 3))) ]
    verdict $? "make_bin.py writes two documents with an EOT before each and at the end"
    cp "$tmp/new.bin" "$tmp/again.bin" && $python dev/make_bin.py "$tmp/again.bin" "$tmp/a.txt" > "$tmp/err" 2>&1 && [ "$(wc -c < "$tmp/again.bin")" -eq 1054 ]
    verdict $? "  and replaces an older .bin file"
    $python dev/make_bin.py "$tmp/s.bin" "$tmp/a.txt" --shard-tokens 8 > "$tmp/err" 2>&1 &&
        $python dev/make_bin.py "$tmp/s.bin" "$tmp/b.txt" --shard-tokens 8 > "$tmp/err" 2>&1 && [ -s "$tmp/s_000001.bin" ] && [ ! -e "$tmp/s.bin" ]
    verdict $? "  or older shards"
else
    echo "skipped: what make_bin.py writes: python3 has no numpy here"
fi
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
