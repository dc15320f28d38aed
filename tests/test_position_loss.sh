# build/position_loss (dev/position_loss.c): its losses against those of ./train --eval. Run from the repository's root.
. tests/check.sh
position_loss=$PWD/build/position_loss
cd "$folder" || exit 1

model="--model-dim 16 --num-layers 2 --z-dim 8 --value-dim 16 --num-heads 2 --ffn-hidden-dim 16 --cema-ndim 2
       --chunk-size 8 --norm-num-groups 4 --batch-size 2 --seq-len 64"
awk 'BEGIN { for (i = 0; i < 600; i++) printf "%d squared is %d\n", i, i * i }' > a.txt
awk 'BEGIN { for (i = 0; i < 600; i++) printf "%d is half of %d\n", i, 2 * i }' > b.txt
head -c 4097 a.txt > first.txt

# The mean loss of a reading over all ranges; the mean loss of ./train --eval over the windows of the same tokens.
mean() { # FILE TEXT RESET EVERY
    awk -F, -v text="$2" -v reset="$3" -v every="$4" '$1 == text && $2 == reset && $3 == every {
        sum += $6 * $7; n += $7 } END { if (n > 0) printf "%.6f\n", sum / n }' "$1"
}
windows() { # TOKENS
    "$train" --threads 1 --init run --val-data first.txt --eval --batch-size 2 --seq-len "$1" --val-batches 0 |
        sed -n 's/^val loss \([0-9.]*\) .*/\1/p'
}
near() { awk -v a="$1" -v b="$2" 'BEGIN { exit !(a > 0 && (a - b) * (a - b) < 1e-10 * b * b) }'; }
# mawk finds NaN neither greater nor less than any number, so only digits are taken for a number.
different() {
    awk -v a="$1" -v b="$2" 'BEGIN { exit !((a b) !~ /[^0-9.]/ && a + 0 > 0 && b + 0 > 0 && (a - b) ^ 2 >= 1e-10 * b ^ 2) }'
}
same_readings() { # FILE FILE: the same rows, with losses that agree to 1e-5
    paste -d, "$1" "$2" | awk -F, 'NR > 1 && ($5 != $12 || ($6 $13) ~ /[^0-9.]/ || !($6 + 0 > 0 && ($6 - $13) ^ 2 <= 1e-10 * $6 ^ 2)) { bad = 1 }
        END { exit bad || NR < 2 }'
}
read_texts() { "$position_loss" --threads 1 --model run --data a.txt,b.txt --tokens 4096 "$@"; }
fails() { ! "$@"; }

check "a model" "$train" --threads 1 $model --data a.txt --steps 30 --warmup 3 --val-every 0 --out run
read_texts --fresh 64,512 --reset-norm 64 --reset-cema 64 --piece 512 > all.csv
check "a row for each reading, text and range" [ "$(wc -l < all.csv)" -eq $((1 + 5 * 2 * 3)) ]
check "ranges double" [ "$(awk -F, 'NR > 1 && NR < 5 { printf "%s-%s ", $4, $5 }' all.csv)" = "0-1024 1024-2048 2048-4096 " ]
check "carried state: the loss of one window of 4096 tokens" near "$(mean all.csv a.txt none 0)" "$(windows 4096)"
check "fresh states: the loss of windows of 64 tokens" near "$(mean all.csv a.txt all 64)" "$(windows 64)"
check "  and of 512" near "$(mean all.csv a.txt all 512)" "$(windows 512)"
check "  which differs" different "$(mean all.csv a.txt all 64)" "$(mean all.csv a.txt none 0)"
for part in norm cema; do
    check "  without the state of $part alone: another loss than with it" different "$(mean all.csv a.txt $part 64)" "$(mean all.csv a.txt none 0)"
    check "    and than without all of it" different "$(mean all.csv a.txt $part 64)" "$(mean all.csv a.txt all 64)"
done
read_texts --fresh 64,512 --reset-norm 64 --reset-cema 64 --piece 4096 > pieces.csv
check "the same in one piece" same_readings all.csv pieces.csv
check "refused: a reset within a chunk" fails read_texts --fresh 12
check "refused: a text that is too short" fails "$position_loss" --model run --data first.txt --tokens 8192

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
