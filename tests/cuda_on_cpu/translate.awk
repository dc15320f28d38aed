# Turns CUDA source into C++ that includes this folder's headers: awk -v file=x.cu -f translate.awk x.cu > x.cpp
# Lines keep their numbers, and messages name the .cu file.
#     kernel<<<grid, block, shared>>>(args)   ->  emu_launch("kernel", __LINE__, kernel, grid, block, shared)(args)
#     extern __shared__ T name[];             ->  T *name = (T *)emu_shared();
#     asm("mma..." : "+f"(c) : "r"(a));       ->  emu_mma((c), (a));
#     asm volatile("ldmatrix..." : ...);      ->  emu_ldmatrix(...), or emu_ldmatrix_trans(...)
#     __shared__ T name[N];                   ->  the same, then an assertion that it fits, and the code that counts its bytes
#     static __global__                       ->  __global__, so that dladdr knows kernels by name
{ text = text $0 "\n" }

END { gsub(/static __global__/, "__global__", text) }

END { printf "#line 1 \"%s\"\n%s", file, static_shared(dynamic_shared(launches(products(text)))) }

function launches(text, out, at, before, end, kernel) {
    while ((at = index(text, "<<<")) > 0) {
        before = substr(text, 1, at - 1)
        text = substr(text, at + 3)
        end = index(text, ">>>")
        if (end == 0 || !match(before, /[A-Za-z_][A-Za-z_0-9]*(<[^<>;(){}]*>)?$/)) {
            out = out before "<<<" # no launch
            continue
        }
        kernel = substr(before, RSTART)
        out = out substr(before, 1, RSTART - 1) "emu_launch(\"" kernel "\", __LINE__, " kernel ", " \
            substr(text, 1, end - 1) ")"
        text = substr(text, end + 3)
    }
    return out text
}

# Lines of the instruction itself become empty ones.
function products(text, out, end, operands, lines, name) {
    while (match(text, /asm( volatile)?\("(mma|ldmatrix)/)) {
        out = out substr(text, 1, RSTART - 1)
        text = substr(text, RSTART)
        match(text, /: "/)
        name = text ~ /^asm\("mma/ ? "mma" : "ldmatrix"
        if (index(substr(text, 1, RSTART), ".trans")) name = name "_trans"
        out = out "emu_" name "("
        end = index(text, "));")
        operands = substr(text, RSTART + 1, end - RSTART - 1)
        lines = substr(text, 1, RSTART)
        gsub(/[^\n]/, "", lines)
        sub(/:/, ",", operands)
        gsub(/"[+=]?[a-z]"/, "", operands)
        out = out lines operands
        text = substr(text, end)
    }
    return out text
}

function dynamic_shared(text, out, word) {
    while (match(text, /extern +__shared__ +[A-Za-z_0-9]+ +[A-Za-z_0-9]+\[\] *;/)) {
        split(substr(text, RSTART, RLENGTH), word, /[ \[]+/) # extern __shared__ T name ];
        out = out substr(text, 1, RSTART - 1) word[3] " *" word[4] " = (" word[3] " *)emu_shared();"
        text = substr(text, RSTART + RLENGTH)
    }
    return out text
}

function static_shared(text, out, declared, sum, name, calls) {
    while (match(text, /__shared__ [^;()]*;/)) {
        declared = substr(text, RSTART, RLENGTH)
        out = out substr(text, 1, RSTART + RLENGTH - 1)
        text = substr(text, RSTART + RLENGTH)
        calls = ""
        for (sum = "0"; match(declared, /[A-Za-z_][A-Za-z_0-9]*\[/); declared = substr(declared, RSTART + RLENGTH)) {
            name = substr(declared, RSTART, RLENGTH - 1)
            sum = sum " + sizeof(" name ")"
            calls = calls " emu_declared(" name ", sizeof(" name "));"
        }
        out = out calls " static_assert(" sum " <= 48 << 10, \"more than 48 KB of static shared memory\");"
    }
    return out text
}
