# The layers of plumbing/: from the symbols of build/*.o, every file may call only files that stand before it in the list at
# the top of plumbing/plumbing.h. So there are no cycles. Run from the repository's root after make.
. tests/check.sh

if ! command -v nm > /dev/null; then
    echo "skipped: no nm"
    echo "0 passed, 0 failed"
    exit 0
fi

# The list: the indented lines after "// Layers:", up to the next line that is not indented.
order=$(sed -n '/^\/\/ Layers:/,/^\/\/ [^ ]/s/^\/\/     *//p' plumbing/plumbing.h | tr '\n' ' ')

# ORDER OBJECTS...: prints every call of a file that does not stand before the caller, every file that the list lacks, and a
# last line with the number of calls between different files.
judge() {
    list=$1
    shift
    for object in "$@"; do
        file=$(basename "$object" .o)
        case $file in ranks_*) file=ranks ;; esac
        nm -P "$object" | sed "s/^/$file /"
    done | awk -v list="$list" '
        BEGIN { n = split(list, files, " "); for (i = 1; i <= n; i++) place[files[i]] = i }
        { sub(/^_/, "", $2); caller[NR] = $1; symbol[NR] = $2; kind[NR] = $3; if ($3 ~ /^[TDBRCS]$/) home[$2] = $1 }
        !($1 in place) && !($1 in told) { print $1 ".c is not in the list of layers"; told[$1] = 1 }
        END {
            for (i = 1; i <= NR; i++) {
                if (kind[i] != "U" || !(symbol[i] in home) || home[symbol[i]] == caller[i]) continue
                calls++
                if (place[home[symbol[i]]] >= place[caller[i]])
                    print caller[i] ".c calls " symbol[i] "() of " home[symbol[i]] ".c, which does not stand before it"
            }
            print calls + 0 " calls"
        }'
}
calls() { tail -n 1 "$folder/$1" | sed 's/ calls//'; }
clean() { cat "$folder/$1" && [ "$(wc -l < "$folder/$1")" -eq 1 ]; }

objects=build/megalodon.o
for source in plumbing/*.c; do
    name=$(basename "$source" .c)
    [ "$name" = compare ] || objects="$objects build/$name.o"
    [ "$name" = ranks ] && [ -f build/ranks_mpi.o ] && with_mpi=build/ranks_mpi.o
done
judge "$order" $objects > "$folder/plain"
check "files call only files before them: $(calls plain) calls" clean plain
check "  there are calls between files" [ "$(calls plain)" -gt 100 ]
if [ -n "$with_mpi" ]; then
    judge "$order" $(echo "$objects" | sed "s,build/ranks.o,$with_mpi,") > "$folder/mpi"
    check "  also with MPI: $(calls mpi) calls" clean mpi
fi

# The check itself: two files that call each other, in either order; a file that is not in the list.
cat > "$folder/a.c" << 'C'
int b(void);
int a(void) { return b(); }
int c(void) { return 1; }
C
cat > "$folder/b.c" << 'C'
int c(void);
int b(void) { return c(); }
C
for name in a b; do "${CC:-cc}" -c "$folder/$name.c" -o "$folder/$name.o" || exit 1; done
for list in "a b" "b a"; do
    judge "$list" "$folder/a.o" "$folder/b.o" > "$folder/cycle"
    check "a cycle is found in the order $list" grep -q 'which does not stand before it' "$folder/cycle"
done
judge "a" "$folder/a.o" "$folder/b.o" > "$folder/unlisted"
check "a file that is not listed is found" grep -q 'b.c is not in the list of layers' "$folder/unlisted"

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
