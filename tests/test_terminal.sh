# On a terminal, which python3 provides: the progress line of ./train, and --interactive and --color of ./sample. The
# screen is what a terminal shows after carriage returns and erased lines. From the root of the repository.
. tests/check.sh
if ! command -v python3 > /dev/null; then
    echo "skipped: no python3"
    echo "0 passed, 0 failed"
    exit 0
fi
cd "$folder" || exit 1
unset NO_COLOR COLUMNS

# python3 terminal.py COLUMNS STEPS COMMAND...: runs the command on a terminal. STEPS: pairs PATTERN=KEYS, separated by
# spaces: when the output since the last keys matches PATTERN, the keys are typed. Writes raw and screen; exits with the
# command's status, 99 if a pattern did not come within 60 seconds.
cat > terminal.py << 'PYTHON'
import fcntl, os, pty, re, select, struct, sys, termios, time

columns, steps, command = int(sys.argv[1]), sys.argv[2].split(), sys.argv[3:]
pid, fd = pty.fork()
if pid == 0:
    fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("4H", 40, columns, 0, 0))
    os.execvp(command[0], command)
raw, seen, deadline = b"", 0, time.time() + 60
while time.time() < deadline:
    if steps:
        pattern, keys = steps[0].split("=")
        if re.search(pattern.encode(), raw[seen:]):
            seen = len(raw)
            # A signal between a prompt and the call that reads the line would be lost. In this second nothing is read,
            # so a program that writes a long text waits for the terminal when the signal comes.
            time.sleep(1)
            os.write(fd, keys.encode().decode("unicode_escape").encode())
            steps.pop(0)
            deadline = time.time() + 60
    if select.select([fd], [], [], 0.02)[0]:
        try:
            data = os.read(fd, 65536)
        except OSError:
            data = b""
        if not data:
            break
        raw += data
else:
    os.kill(pid, 9)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
open("raw", "wb").write(raw)
lines, column = [""], 0
for part in re.findall("\033\\[[0-9;]*[A-Za-z]|.", raw.decode("latin-1"), re.DOTALL):
    if part == "\n":
        lines.append("")
        column = 0
    elif part == "\r":
        column = 0
    elif part == "\033[K":
        lines[-1] = lines[-1][:column]
    elif part[0] != "\033":
        lines[-1] = lines[-1][:column].ljust(column) + part + lines[-1][column + 1 :]
        column += 1
open("screen", "w", encoding="latin-1").write("\n".join(lines))
sys.exit(99 if steps else status)
PYTHON
on_terminal() { TERM=xterm python3 terminal.py "$@"; }
escape=$(printf '\033')
is() { [ "$1" = "$2" ]; }

# ---- ./train
model="--num-layers 1 --model-dim 32 --z-dim 16 --value-dim 32 --ffn-hidden-dim 32 --chunk-size 16 --norm-num-groups 4"
model="$model --cema-ndim 2 --batch-size 2 --seq-len 32 --threads 1 --lr 1e-2"
seq -s ' ' 1 3000 > text
run="$model --data text --steps 60 --val-every 20 --sample-every 30 --out run --overwrite"
untimed() { sed -e 's/ | [0-9.]* ms.*//' -e 's/ after [0-9.]* s.*//' "$1"; }

check "./train on a terminal" on_terminal 100 "" "$train" $run
check "  shows steps, loss and time left on one line" grep -q 'step *[0-9]*/60 | loss [0-9.]* | [0-9.]* ms | [0-9.]*k tok/s | 0 min 0[0-9] s left' raw
check "  and, with every fifth step as a line" "$train" $run --print-every 5
"$train" $run --print-every 5 > file
check "    leaves the screen equal to that output but for times" eval 'untimed screen > a && untimed file > b && cmp a b'
check "    with 13 lines of steps, 3 validations, 2 samples" is "$(grep -c '^step .*norm' screen) $(grep -c '^val loss' screen) $(grep -c '^----$' screen)" "13 3 4"
check "  with --print-every 30" on_terminal 100 "" "$train" $run --print-every 30
check "    three lines" is "$(grep -c '^step .*norm' screen)" 3
check "  30 columns wide" on_terminal 30 "" "$train" $run
check "    the progress line is shorter" eval 'tr "\r" "\n" < raw | sed -n "s/$escape\[K$//p" > lines &&
    awk "length > longest { longest = length } END { print longest; exit longest != 29 }" lines'
"$train" $run > file
check "elsewhere a line for every step" is "$(grep -c '^step .*norm' file)" 60
check "  without escape sequences" eval '! grep -q "$(printf "\033")" file'
check "a terminal that cannot replace a line" eval 'TERM=dumb python3 terminal.py 100 "" "$train" $run'
check "  gets a line for every step" is "$(grep -c '^step .*norm' screen)" 60

export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
if mpirun -n 1 "$train" $run > file 2> err && grep -q '^ranks ' file; then
    check "mpirun, which gives its processes a terminal: a line for every step" is "$(grep -c '^step .*norm' file)" 60
else
    echo "skipped: no mpirun, or ./train was built without MPI"
fi

# Steps of a few hundredths of a second: the terminal itself writes ^C, which must come while the progress line is shown.
on_terminal 100 'left=\x03' "$train" $model --batch-size 64 --seq-len 256 --data text --steps 1000000 --val-every 0 --out stopped > out 2>&1
check "Ctrl-C while the progress line is shown: status 130" is $? 130
check "  a line for the last step, then where the run was saved" eval 'tail -n 2 screen | head -n 1 | grep -q "^step .* norm" &&
    tail -n 1 screen | grep -q "^stopped at step .*; saved in stopped; continue with --resume stopped"'
check "  nothing else is left on the screen" eval '! grep -q -e "left" -e "\^C" screen'
# A learning rate that the model cannot survive. The message must begin a line.
on_terminal 100 "" "$train" $model --data text --steps 200 --lr 1e6 --grad-clip 0 --print-every 100 --warmup 2 --val-every 0 --out lost > out 2>&1
check "an error while the progress line is shown: status 1" is $? 1
check "  begins a line" grep -q '^error: step' screen

# ---- ./sample --interactive
s="$sample --model run --threads 1 --num-tokens 40"
printf 'one\n\n' | $s --interactive --seed 3 > talk 2> err
check "--interactive, a line and an empty line: 4 + 80 bytes and two line breaks" is "$(wc -c < talk)" 86
printf '\none\n' > prompt
$s --prompt-file prompt --seed 3 --num-tokens 80 > whole 2> err
check "  the text is that of one continuation: the state is kept" is "$(tr -d '\n' < talk)" "$(tr -d '\n' < whole)"
printf 'one\ntwo\n' | $s --interactive --num-tokens 0 --state-out talk.state > out 2> err
printf '\none\ntwo\n' > prompt
$s --prompt-file prompt --num-tokens 0 --state-out whole.state > out 2>> err
greedy() { $s --state-in "$1" --temperature 0 2> err; }
check "  and is written by --state-out" is "$(greedy talk.state)" "$(greedy whole.state)"
check "on a terminal: Ctrl-C at the prompt, a line, Ctrl-C while it continues, Ctrl-D" \
    on_terminal 100 '>.$=\x03 C\r\n>.$=1\x202\n 2\r\n[0-9]=\x03 \n>.$=\x04' $s --interactive --num-tokens 100000000
check "  the text goes on after the line" eval 'grep -q "^> 1 2" screen'
check "  the second line is not written to the end" eval 'sed -n "s/^# read [0-9]* tokens, wrote \([0-9]*\); seed.*/\1/p" screen > n && [ -s n ] && [ "$(cat n)" -lt 100000000 ]'

# ---- ./sample --color
strip() { sed "s/$escape\[[0-9;]*m//g"; }
$s --prompt "1 2" > plain 2> err
$s --prompt "1 2" --color always > colored 2> err
check "--color always: colours in a file" grep -q "$escape\[38;5;" colored
check "  and the same text" is "$(strip < colored)" "$(cat plain)"
check "  which ends without colour" is "$(tail -c 4 colored | od -An -c | tr -d ' \n')" '033[0m'
$s --prompt "1 2" --color auto > auto 2> err
check "--color auto: none in a file" cmp plain auto
check "  on a terminal" on_terminal 100 "" $s --prompt "1 2" --color auto
check "    colours" grep -q "$escape\[38;5;" raw
check "  on a terminal with NO_COLOR" eval 'NO_COLOR=1 on_terminal 100 "" $s --prompt "1 2" --color auto'
check "    none" eval '! grep -q "$escape" raw'
check "  NO_COLOR and --color always" eval 'NO_COLOR=1 $s --prompt "1 2" --color always > out 2> err && cmp out colored'
yes 'ab' | head -n 3000 | tr -d '\n' > sure
"$train" $model --data sure --steps 60 --val-every 0 --out sure.run > out 2>&1
codes() { "$sample" --threads 1 --num-tokens 40 --color always "$@" 2> err | grep -o "$escape\[38;5;[0-9]*m" | sort -u | tr -d "$escape\n"; }
check "a model that has learned abab is sure: green only" is "$(codes --model sure.run --prompt abab)" "[38;5;35m"
"$train" $model --data sure --steps 0 --val-every 0 --out unsure.run > out 2>&1
check "an untrained model is not: no green" eval 'codes --model unsure.run --prompt abab > out && grep -q "38;5;196m" out && ! grep -q "38;5;\(35\|71\)m" out'
yes 'é' | head -n 3000 | tr -d '\n' > accents
"$train" $model --data accents --steps 60 --val-every 0 --out accents.run > out 2>&1
"$sample" --model accents.run --threads 1 --num-tokens 40 --prompt é --color always > out 2> err
check "no code divides the bytes of a character" eval 'LC_ALL=C grep -q "$escape.*$(printf "\303\251")" out && ! LC_ALL=C grep -q "$(printf "\303\033")" out'

# ---- refusals
refused() { # WORD ARGUMENTS...
    word=$1
    shift
    $s "$@" > out 2>&1 < /dev/null
    status=$?
    check "refused: sample $*" eval '[ $status -eq 2 ] && grep -q -e "error: .*$word" out'
}
refused "--color red: it is never, always or auto" --color red
refused "--color shows one text" --color auto --num-samples 2
refused "--interactive continues one text" --interactive --num-samples 2
refused "--interactive continues one text" --interactive --score text
refused "--prompt-file needs the name of a file" --interactive --prompt-file -
$s --prompt "1" --num-samples 2 --state-out two.state > out 2>&1
refused "has 2 samples; --interactive continues one text" --interactive --state-in two.state

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
