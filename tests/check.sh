# For the test scripts, which read it first (`. tests/check.sh`), from the repository's root: a temporary folder that is
# removed at the end, and check, which counts in passed and failed.
train=$PWD/train
sample=$PWD/sample
compare=$PWD/compare
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
passed=0
failed=0

check() { # NAME COMMAND...: the command must succeed
    name=$1
    shift
    if "$@" > "$folder/check.out" 2>&1; then
        echo "ok    $name"
        passed=$((passed + 1))
    else
        echo "FAIL  $name"
        sed 's/^/      /' "$folder/check.out" | tail -n 5
        failed=$((failed + 1))
    fi
}
