# ./train as a user meets it: runs, checkpoints, resuming, signals, what is refused. Run from the repository's root.
. tests/check.sh
cd "$folder" || exit 1

refused() { # STATUS TEXT OPTIONS...: ./train must end with that status and say the text on stderr
    status=$1
    text=$2
    shift 2
    "$train" --threads 1 $small --out refused "$@" > out.txt 2> err.txt
    got=$?
    if [ $got -eq "$status" ] && grep -q -F -e "$text" err.txt; then
        echo "ok    refused: $*"
        passed=$((passed + 1))
    else
        echo "FAIL  refused: $* (status $got, expected $status and '$text')"
        sed 's/^/      /' err.txt | tail -n 5
        failed=$((failed + 1))
    fi
}

same() { cmp "$1/model.safetensors" "$2/model.safetensors" && cmp "$1/optimizer.safetensors" "$2/optimizer.safetensors"; }
columns() { cut -d, -f1-4,7 "$1"; } # all but the times
same_log() { columns "$1" > log1.txt; columns "$2" > log2.txt; cmp log1.txt log2.txt; }
steps_in() { ls "$1" | grep step- | tr '\n' ' '; }
quiet() { "$train" --threads 1 "$@" > quiet.out 2>&1; }
fails() { ! "$@"; }
close() { # LOG LOG: steps, losses and norms agree to 1e-5
    paste -d, "$1" "$2" | awk -F, 'function far(a, b) { return (a - b) * (a - b) > 1e-10 * b * b }
        NR > 1 && ($1 != $8 || far($2, $9) || far($3, $10)) { bad = 1 } END { exit bad || NR < 2 }'
}

small="--model-dim 16 --num-layers 2 --z-dim 8 --value-dim 16 --num-heads 2 --ffn-hidden-dim 16 --cema-ndim 2
       --chunk-size 8 --norm-num-groups 4 --data text --batch-size 2 --seq-len 12 --warmup 3 --val-batches 2"
awk 'BEGIN { for (i = 0; i < 600; i++) printf "%d squared is %d\n", i, i * i }' > text
zeros() { head -c "$1" /dev/zero; }
{ printf '\210\330\064\001\001\000\000\000\220\001\000\000'; zeros 1012; # 400 tokens: 0 and 257 in turn
  i=0; while [ $i -lt 200 ]; do printf '\000\000\001\001'; i=$((i + 1)); done; } > tokens.bin

# ---------------------------------------------------------------- runs and checkpoints

check "a run" quiet $small --out a --steps 12 --save-every 5 --val-every 4 --log a.csv
check "the newest two checkpoints are kept" [ "$(steps_in a)" = "step-00000010 step-00000012 " ]
check "the log has a row a step" [ "$(wc -l < a.csv)" -eq 13 ]
check "the log has its columns" [ "$(head -n 1 a.csv)" = "step,loss,grad_norm,lr,ms,tokens_per_s,val_loss" ]
check "validated at 4, 8, 12 and at saves" [ "$(awk -F, 'NR > 1 && $7 != "" { printf "%s ", $1 }' a.csv)" = "4 5 8 10 12 " ]
check "the same again gives the same" quiet $small --out b --steps 12 --save-every 5 --val-every 4 --log b.csv
check "  checkpoints" same a/step-00000012 b/step-00000012
check "  logs" same_log a.csv b.csv
check "another seed" quiet $small --out c --steps 12 --seed 2 --log c.csv
check "  gives other losses" [ "$(cut -d, -f2 a.csv | tail -n 1)" != "$(cut -d, -f2 c.csv | tail -n 1)" ]
shares() { # the last column of each step's line, a share of the floor in percent; fails unless there are N in LOW..HIGH
    awk -F'|' -v n="$1" -v low="$2" -v high="$3" '/^step .*tok\/s/ { lines++; split($NF, w, " ")
        good += $NF ~ /^ [0-9.]+% of floor$/ && w[1] + 0 > low && w[1] + 0 < high } END { print good, lines; exit !(good == n && lines == n) }' quiet.out
}
check "a step's line ends with the share of the floor" shares 12 0 100
wide="--preset demo --model-dim 64 --data text --batch-size 4 --val-every 0 --grad-accum 2" # about 30 % in one thread
check "  of a wider model" quiet $wide --steps 3 --warmup 3 --dump share
check "    a plausible one" shares 3 1 100
check "  not with --eval" eval 'quiet --init a --data text --batch-size 2 --seq-len 12 --val-batches 2 --eval && ! grep "of floor" quiet.out'
check "the best by validation is kept" quiet $small --out best --steps 12 --save-every 3 --lr 1 --schedule constant --warmup 10
check "  beside the newest two" [ "$(steps_in best | wc -w)" -eq 3 ]

# ---------------------------------------------------------------- resuming

mkdir r && cp -r a/step-00000010 a/options.txt r && cp a.csv r.csv
check "resumed from step 10" quiet --resume r --log r.csv
check "  checkpoint as of the whole run" same a/step-00000012 r/step-00000012
check "  log as of the whole run" same_log a.csv r.csv
check "resumed when there is nothing left to do" quiet --resume r
cp -r a d && head -c 9999 a/step-00000012/model.safetensors > d/step-00000012/model.safetensors
check "a damaged newest checkpoint is skipped" quiet --resume d --log d.csv
check "  with a warning" grep -q 'warning.*step-00000012' quiet.out
check "  and written anew" same a/step-00000012 d/step-00000012
check "longer than planned" quiet --resume d --steps 15
check "  keeps on" [ -d d/step-00000015 ]

interrupt() { # SIGNAL DIR: sends it to a run after a few steps; leaves its status
    rm -f i.csv
    tries=0
    "$train" --threads 1 $small --out "$2" --steps 1000000 --schedule constant --val-every 0 --save-every 0 --log i.csv > i.out 2>&1 &
    while ! [ -f i.csv ] || [ "$(wc -l < i.csv)" -lt 4 ]; do
        tries=$((tries + 1))
        [ $tries -lt 600 ] || break
        sleep 0.05
    done
    quiet $small --out "$2" --overwrite
    second=$?
    kill -s "$1" $!
    wait $!
    status=$?
}
interrupt INT int
check "a second run in the same folder is refused" [ $second -eq 1 ]
check "  and says why" grep -q -F -e '--out int: another run' quiet.out
check "SIGINT ends with status 130" [ $status -eq 130 ]
step=$(tail -n 1 i.csv | cut -d, -f1)
check "  having saved the last step" [ "$(steps_in int)" = "step-$(printf %08d "$step") " ]
check "resumed after SIGINT" quiet --resume int --steps $((step + 3))
check "the same uninterrupted" quiet $small --out whole --schedule constant --val-every 0 --save-every 0 --log w.csv --steps $((step + 3))
check "  model" cmp int/step-*"$((step + 3))"/model.safetensors whole/step-*/model.safetensors
check "  log" same_log i.csv w.csv
interrupt TERM term
check "SIGTERM ends with status 143" [ $status -eq 143 ]

# ---------------------------------------------------------------- ways to train

check "gradient accumulation" quiet $small --out acc --steps 6 --batch-size 1 --grad-accum 2 --log acc.csv --schedule constant
check "one batch as large" quiet $small --out one --steps 6 --log one.csv --schedule constant
check "  gives the same losses and norms" close acc.csv one.csv
check "recomputing" quiet $small --out rec --steps 6 --log rec.csv --schedule constant --recompute
check "  gives the same losses and norms" close rec.csv one.csv
check "tokens of 16 bits" quiet $small --out bin --data tokens.bin --vocab-size 258 --steps 40 --lr 0.02
check "  are learnt" awk '/^step +40/ { exit !($5 < 3) }' quiet.out
check "--init takes a run" quiet --init a --data text --batch-size 2 --seq-len 12 --steps 1 --out init
check "--eval" quiet --init a/step-00000012/model.safetensors --data text --batch-size 2 --seq-len 12 --val-batches 2 --eval
check "  gives the loss of the run's last validation" [ "$(sed -n 's/^val loss \([0-9.]*\) .*/\1/p' quiet.out)" = \
    "$(tail -n 1 a.csv | cut -d, -f7 | xargs printf %.6f)" ]
check "a dump" quiet $small --steps 2 --dump dump.safetensors
check "  saves no checkpoint" [ ! -e out ]
check "a dump's batch" quiet --init a --batch dump.safetensors --steps 1 --dump again.safetensors
echo '{"num_layers": 1, "model_dim": 8, "z_dim": 4, "value_dim": 4, "ffn_hidden_dim": 4, "norm_num_groups": 2,
       "chunk_size": 8, "vocab_size": 256}' > c.json
check "--config" quiet --config c.json --cema-ndim 3 --data text --seq-len 12 --steps 1 --out conf
check "  with a flag over it" grep -q '1 layers, model_dim 8,.* cema_ndim 3' quiet.out
check "help" quiet --help
check "  lists the options with their defaults" grep -q -e '--lr X .*(0.003)' quiet.out

# ---------------------------------------------------------------- dropout, documents, carried states

drop="--dropout 0.1 --hidden-dropout 0.2 --attention-dropout 0.3 --init-mode xavier"
check "dropout" quiet $small $drop --out drop --steps 8 --save-every 4 --val-every 8 --log drop.csv --schedule constant
check "  is said" grep -q 'dropout     0.1, hidden 0.2, attention 0.3' quiet.out
cp drop.csv first.csv && mv drop/step-00000008 dropped
check "  resumed at step 4" quiet --resume drop
check "    the same model: masks do not depend on where a run began" same drop/step-00000008 dropped
check "    the same log" same_log drop.csv first.csv
check "  in two batches a step" quiet $small $drop --out drop2 --steps 8 --batch-size 1 --grad-accum 2 --val-every 0 --log drop2.csv --schedule constant
check "    the same masks" close drop2.csv first.csv
check "  recomputing" quiet $small $drop --out drop3 --steps 8 --recompute --val-every 0 --log drop3.csv --schedule constant
check "    the same masks" close drop3.csv first.csv
check "  --eval of the checkpoint" quiet --init drop --eval --data text --batch-size 2 --seq-len 12 --val-batches 2
check "    is the run's last validation, both without dropout" [ "$(sed -n 's/^val loss \([0-9.]*\) .*/\1/p' quiet.out)" = \
    "$(tail -n 1 drop.csv | cut -d, -f7 | xargs printf %.6f)" ]

carry="$small --seq-len 16 --eot 10 --carry-state --val-every 0 --schedule constant"
check "documents that are carried on" quiet $carry --out carry --steps 12 --save-every 5 --log carry.csv
check "  the share of ignored positions is said" grep -q 'step .* | [0-9]*% ignored |' quiet.out
check "  and how many documents there are" grep -q 'documents   [1-9][0-9]* to train on' quiet.out
check "  states are saved" [ -f carry/step-00000012/state-0.safetensors ]
cp carry.csv whole.csv && cp -r carry/step-00000012 carried && rm -r carry/step-00000012
check "  resumed at step 10" quiet --resume carry
check "    the same model" same carry/step-00000012 carried
check "    the same states" cmp carry/step-00000012/state-0.safetensors carried/state-0.safetensors
check "    the same log" same_log carry.csv whole.csv
check "a stream of two batches a step" quiet $carry --batch-size 1 --grad-accum 2 --out carry2 --steps 12 --log carry2.csv
check "  gives the same losses" close carry2.csv whole.csv
check "a stream, recomputing" quiet $carry --recompute --out carry3 --steps 12 --log carry3.csv
check "  gives the same losses" close carry3.csv whole.csv
head -c 150 text > short # 135 bytes to train on: two streams of five windows, the last of 3 tokens
streams="$small --data short --seq-len 16 --carry-state --val-every 0 --schedule constant"
check "streams of a text without documents" quiet $streams --out streams --steps 12 --save-every 5 --log streams.csv
cp streams.csv whole.csv && cp -r streams/step-00000012 streamed && rm -r streams/step-00000012
check "  resumed at step 10" quiet --resume streams
check "    the same model" same streams/step-00000012 streamed
check "    the same log" same_log streams.csv whole.csv
check "  two batches a step" quiet $streams --batch-size 1 --grad-accum 2 --out streams2 --steps 12 --log streams2.csv
check "    give the same losses" close streams2.csv whole.csv
alone() { # SEQ_LEN: is a step of a stream what its batch would be without a state?
    rm -rf stream && quiet $carry --seq-len "$1" --out stream --steps 4 && quiet --resume stream --steps 5 --dump s.safetensors &&
        "$train" --threads 1 --init stream/step-00000004/model.safetensors --batch s.safetensors --steps 1 --dump b.safetensors > alone.out 2>&1 &&
        "${train%train}compare" s.safetensors b.safetensors > alone.out 2>&1
}
check "rows that each hold a whole document start fresh" alone 32
check "parts of documents see the tokens before them" fails alone 8
check "documents" quiet $small --eot 10 --seq-len 40 --steps 1 --dump docs.safetensors
check "  a fourth and more is ignored" grep -q 'step .* | [3-9][0-9]% ignored |' quiet.out

# ---------------------------------------------------------------- steps that are not finite

wild="--val-every 0 --lr 1e6 --lr-init-ratio 0.0000001 --warmup 30 --grad-clip 0"
check "a step that is not finite" fails quiet $small $wild --out skip --steps 60 --save-every 0
check "  is skipped and counted" grep -q 'step .* | not finite: skipped, 1 so far' quiet.out
check "  three in a row end the run" grep -q 'error: step .* and likewise the 2 steps before it' quiet.out
check "a model that has diverged" fails quiet $small $wild --out nan --steps 60 --save-every 1
check "  is not saved" grep -q 'error: step 3: the model has diverged (its loss is nan) and is not saved; in nan the newest checkpoint is that of step 2' quiet.out
check "  what was saved before loads" quiet --resume nan --steps 1
check "    and is of the last step that was finite" grep -q "step 2 of 1: nothing left to do" quiet.out
check "    and can be sampled" "${train%train}sample" --threads 1 --model nan --num-tokens 3
check "a model that diverges in its last steps" fails quiet $small --out nan2 --lr 1e6 --warmup 0 --schedule constant \
    --weight-decay 1e6 --grad-clip 0 --steps 3
check "  is not saved either" [ "$(steps_in nan2)" = "" ]
check "    and says so" grep -q 'error: step 3: the model has diverged.* in nan2 no checkpoint was saved before' quiet.out

# Byte 126 stands once, in step 4 of the first stream. Its embedding of 3e38, times 4, is infinite, and so is the state.
{ head -c 53 text; printf '~'; tail -c +55 text; } > rare
rare="--data rare --batch-size 2 --seq-len 16 --carry-state --val-every 0 --warmup 3"
check "a model that has learnt that byte 126 is rare, so that its samples lack it" quiet $small --scale-emb --steps 100 --lr 0.02 --out rare1
model=rare1/step-00000100/model.safetensors
header=$(od -An -tu8 -N8 $model | tr -d ' ')
embedding=$(head -c $((8 + header)) $model | tail -c +9 | sed -n 's/.*"embed.weight":{[^}]*"data_offsets":\[\([0-9]*\),.*/\1/p')
i=0; while [ $i -lt 16 ]; do printf '\346\261\141\177'; i=$((i + 1)); done |
    dd of=$model bs=1 conv=notrunc seek=$((8 + header + embedding + 126 * 16 * 4)) 2> /dev/null
check "a step whose state is not finite, with --carry-state" quiet --init $model $rare --steps 7 --out rare2 --log rare.csv
check "  is skipped" grep -q '^step *4/7 .* | not finite: skipped, 1 so far' quiet.out
check "  and the next one is finite" [ "$(grep -c '^step *[5-7]/7 .*loss [0-9]' quiet.out)-$(grep -c 'not finite' quiet.out)" = 3-1 ]

# ---------------------------------------------------------------- what is refused

refused 2 "'--learning-rate'" --learning-rate 1
refused 2 "the nearest is --seq-len" --seqlen 12
refused 2 "'12'" 12
refused 2 "--steps needs a value" --steps
refused 2 "--steps 1.5: not an integer" --steps 1.5
refused 2 "--steps -1: not an integer from 0 to" --steps -1
refused 2 "--lr x: not a number" --lr x
refused 2 "--lr -1: not a number from 0 to" --lr=-1
refused 2 "--lr nan" --lr nan
refused 2 "--batch-size 99999999999999999999" --batch-size 99999999999999999999
refused 2 "--beta2 1:" --beta2 1
refused 2 "--swiglu takes no value" --swiglu=1
refused 2 "--schedule step" --schedule step
refused 2 "--init-mode zero: it is one of: he gaussian xavier bert" --init-mode zero
refused 2 "--cema reel: it is one of: complex real none" --cema reel
refused 2 "--two-hop needs a value" --two-hop
refused 2 "--attention contradicts" --init a --attention standard
refused 2 "--timestep-norm contradicts" --init a --timestep-norm=layer
refused 2 "--init-mode contradicts" --init a --init-mode bert
refused 2 "--hidden-dropout contradicts" --init a --hidden-dropout 0.5
refused 2 "--dropout 1:" --dropout 1
refused 1 "text: 11365 tokens for training, but --carry-state divides them into 400 streams" --carry-state --seq-len 32 --batch-size 400
refused 2 "--carry-state: --seq-len 12 is no multiple of --chunk-size 8" --carry-state
refused 2 "--eot 256: the vocabulary has 256 tokens" --eot 256
refused 2 "--batch does not go with" --batch dump.safetensors --carry-state
refused 2 "--preset gpt2: no such preset; there are mega200M" --preset gpt2
refused 2 "--cema-ndim 1025: not an integer from 1 to 1024" --cema-ndim 1025
refused 2 "num_heads 3 does not divide" --num-heads 3
refused 2 "norm_num_groups 16" --norm-num-groups 16
refused 2 "--model-dim contradicts the configuration in a" --init a --model-dim 32
refused 2 "--preset contradicts the configuration in a" --init a --preset enwik8
refused 2 "--resume does not go with" --resume a --init a --out a
refused 2 "--seed 3: the run in a has seed 1" --resume a --out a --seed 3
refused 2 "--out: --resume DIR saves to the same DIR" --resume a
refused 1 "no-such-file: No such file" --data no-such-file
refused 1 "use a smaller --seq-len" --seq-len 20000
refused 1 "text: token 0 is 48, but the vocabulary has 48: use --vocab-size" --vocab-size 48
refused 1 "tokens.bin: token 1 is 257, but the vocabulary has 256: use --vocab-size 258" --data tokens.bin
printf '\210\330\064\001\002\000\000\000' > v2.bin && zeros 1100 >> v2.bin
refused 1 "v2.bin: a .bin token file of version 2" --data v2.bin
printf '\241\331\064\001\001\000\000\000' > wide.bin && zeros 1100 >> wide.bin
refused 1 "wide.bin: a .bin file of 32-bit tokens" --data wide.bin
head -c 1500 tokens.bin > short.bin
refused 1 "short.bin: its header says 400 tokens" --data short.bin
: > empty
refused 1 "empty: empty" --data empty
refused 1 "What fits: the same with --segment-len " --preset demo --batch-size 65536 --seq-len 1000
refused 1 "below 2^31" --batch-size 65536 --seq-len 1200 --num-heads 32 --z-dim 64 --value-dim 32
echo '{"model_dim": 8, "depth": 3}' > bad.json
refused 1 "--config bad.json: byte" --config bad.json
refused 1 "--out a: holds a run, at step 12. Continue it with --resume a, replace it with --overwrite" --out a
refused 1 "--resume nowhere: holds no run" --resume nowhere --out nowhere
refused 1 "error: text: " --init text
sed 's/"config"/"konfig"/' a/step-00000012/model.safetensors > bare.safetensors
refused 1 "has no configuration" --init bare.safetensors
refused 2 "--batch does not go with" --batch dump.safetensors
"$train" --batch bare.safetensors 2> err.txt
check "refused: --batch without the tensors" grep -q "bare.safetensors: no tensor 'input.tokens'" err.txt
refused 1 "loss" --lr 1e6 --lr-init-ratio 1 --warmup 0 --steps 200 --grad-clip 0 --out diverged
check "a run that diverged saved nothing" [ "$(steps_in diverged)" = "" ]

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
