# What README.md and dev/notes/*.md name exists (dev/check_names.py), and the check finds each wrong name of a made-up
# page. The same for dev/check_pages.py, except for the pages of dev/notes, which need PyTorch. From the root of the
# repository; needs python3.
. tests/check.sh
export PYTHONDONTWRITEBYTECODE=1
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2> /dev/null; then
    echo "skipped: no python3"
    echo "0 passed, 0 failed"
    exit 0
fi
python3 dev/check_names.py > "$folder/names.out" 2>&1
if [ $? -gt 1 ]; then cat "$folder/names.out"; failed=$((failed + 1)); fi
grep '^ok \|^FAIL\|^  ' "$folder/names.out"
passed=$((passed + $(grep -c '^ok ' "$folder/names.out")))
failed=$((failed + $(grep -c '^FAIL' "$folder/names.out")))

# Each line of this page is right, and passes.
cat > "$folder/right.md" << 'PAGE'
`cema_forward`, `_backward`, `workspace()`, `megalodon.c`, `plumbing/model.h`, `--segment-len 64`, `--no-swiglu`
`make test`, [itself](right.md), `build/double/test_layers`, `./train --preset demo`

| preset | D |
|---|---|
| mega1.3B | 2048 |

    $ mpirun -n 2 ./train --seq-len 64 \
          --batch-size 1
    python3 dev/check_names.py && make cuda PLAIN=1
PAGE
check "a page of right names passes" python3 dev/check_names.py "$folder/right.md"

wrong() { # NAME, a page's text with printf's escapes: the check must name it
    printf "$2" > "$folder/wrong.md"
    python3 dev/check_names.py "$folder/wrong.md" > "$folder/wrong.out"
    [ $? -eq 1 ] && [ "$(grep -c "wrong.md:[0-9]*: $1: " "$folder/wrong.out")" -eq 1 ] &&
        [ "$(wc -l < "$folder/wrong.out")" -eq 3 ]
}
check "finds a function" wrong cema_backwards 'see `cema_backwards`\n'
check "finds a function, named with ()" wrong 'workspaces()' 'see `workspaces()`\n'
check "finds a suffix" wrong _sideways 'see `cema_forward`, `_sideways`\n'
check "finds a file" wrong plumbing/modell.h 'see `plumbing/modell.h`\n'
check "finds a file without a folder" wrong megalodon.cc.sh 'see `megalodon.cc.sh`\n'
check "finds a link" wrong nowhere.md 'see [this page](nowhere.md)\n'
check "finds a heading" wrong '#where' '# Here\n\n[there](#where)\n'
check "finds an image" wrong nothing.png '![nothing](nothing.png)\n'
check "finds an option" wrong --sequence-len 'give `--sequence-len 5`\n'
check "finds an option without backquotes" wrong --sequence-len 'give --sequence-len\n'
check "finds a make target" wrong 'make tests' 'run `make tests`\n'
check "finds a make variable" wrong PLAINS 'run `make cuda PLAINS=1`\n'
check "finds a preset" wrong mega300M 'run `./train --preset mega300M`\n'
check "finds a preset in a table" wrong mega300M '| preset | D |\n|---|---|\n| mega300M | 2 |\n'
check "finds a program" wrong ./trainer '    $ ./trainer --steps 2\n'
check "finds a script" wrong dev/nothing.py '    python dev/nothing.py\n'
check "finds an option of another program" wrong --top-p '    ./train --top-p 0.9\n'
check "finds an option on the next line" wrong --top-p '    ./train --steps 2 \\\\\n        --top-p 0.9\n'
check "finds an option after mpirun" wrong --top-p '```sh\nmpirun -n 2 ./train --top-p 0.9\n```\n'

# dev/check_pages.py on made-up pages. It also fails where a page has no code, no output, or code that ends in an error.
page() { # LINE OF CODE, OUTPUT SHOWN: succeeds if check_pages.py does
    printf '# Page\n\n```python\n%s\n```\n\n```text\n%s\n```\n' "$1" "$2" > "$folder/page.md"
    python3 dev/check_pages.py "$folder/page.md"
}
refused() {
    if "$@"; then return 1; fi
}
printf '# Page\n' > "$folder/empty.md"
printf '# Page\n\n```python\nprint(1)\n```\n' > "$folder/silent.md"
check "code that prints what is shown passes" page 'print(f"{2 / 3:.4f}")' 0.6667
check "finds another number" refused page 'print(f"{2 / 3:.4f}")' 0.6666
check "finds code that ends in an error" refused page 'print(1); print(nothing)' 1
check "finds code without output" refused python3 dev/check_pages.py "$folder/silent.md"
printf '# Page\n\n```python\nx = 2\n```\n\nThen:\n\n```python\nprint(x)\n```\n\n```text\n2\n```\n' > "$folder/two.md"
check "a block that prints nothing may come before another" python3 dev/check_pages.py "$folder/two.md"
sed 's/x = 2/x = 2; print(x)/' "$folder/two.md" > "$folder/loud.md"
check "  finds that it prints" refused python3 dev/check_pages.py "$folder/loud.md"
check "finds a page without code" refused python3 dev/check_pages.py "$folder/empty.md"
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
