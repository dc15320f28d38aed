"""Count lines, comments, functions and parameters of the C and CUDA files that people read.

    python3 dev/count_code.py                         megalodon.h, megalodon.c, megalodon.cu, kernels/*.cuh
    python3 dev/count_code.py train.c sample.c        other files
    python3 dev/count_code.py --commit a9d0e25        the files as of a commit, read with `git show`
    python3 dev/count_code.py --check                 exits with 1 if a file exceeds the limits below

Definitions:
- Comment line: a line whose first non-blank character belongs to a comment, // or block. Blank lines inside a block
  comment count. A comment after code on the same line does not count. The share is in percent of all lines.
- Function: a definition with a body, outside of any struct. Declarations and macros do not count. `__global__`
  functions are kernels, functions with `__device__` (also with `__host__ __device__`) are device functions, all others
  are host functions.
- Length of a function: from the first line of its signature (of `template <...>` if there is one) to its closing brace,
  both included. A function on one line has length 1. A comment above the function does not count.
- Parameters: those of the parameter list. Template parameters do not count.

Only the standard library is needed.
"""

import argparse
import bisect
import glob
import os
import re
import statistics
import subprocess
import sys
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODEL_FILES = ("megalodon.h", "megalodon.c", "megalodon.cu")

# The limits of --check.
MAX_LINES = {"megalodon.cu": 2000}
MAX_KERNEL_FILE_LINES = 500  # of each file in kernels/
MIN_COMMENT_PERCENT = {"megalodon.cu": 18.0, "megalodon.c": 16.0}
MAX_PARAMETERS = 12  # of each function in MODEL_FILES and kernels/


class Function(NamedTuple):
    name: str
    kind: str  # "host", "device" or "__global__"
    first_line: int
    lines: int
    parameters: int


class Counts(NamedTuple):
    lines: int
    comment_lines: int
    templates: int
    functions: list

    @property
    def comment_percent(self):
        return 100 * self.comment_lines / max(self.lines, 1)


# A comment, a string, or a character. The lookbehind keeps the digit separators of C++ (1'000) out.
TOKENS = re.compile(r"""//(?:\\\n|[^\n])*|/\*.*?(?:\*/|\Z)|"(?:\\.|[^"\\\n])*"|(?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+'""",
                    re.DOTALL)


def blank(text):
    """The same number of characters and lines, all of them spaces."""
    return re.sub(r"[^\n]", " ", text)


def split_comments(text):
    """(code, is_comment): the text with comments blanked and literals emptied, and a flag for each character."""
    code, is_comment, at = [], bytearray(len(text)), 0
    for token in TOKENS.finditer(text):
        code.append(text[at:token.start()])
        if token[0].startswith("/"):
            code.append(blank(token[0]))
            is_comment[token.start():token.end()] = b"\1" * len(token[0])
        else:
            code.append(token[0][0] + blank(token[0][1:-1]) + token[0][-1])
        at = token.end()
    return "".join(code) + text[at:], is_comment


def count_comment_lines(text, is_comment):
    count, start = 0, 0
    for line in text.splitlines(keepends=True):
        stripped = line.lstrip()
        first = start + len(line) - len(stripped)  # the first non-blank character
        # A blank line counts if the newline itself lies in a block comment.
        count += bool(is_comment[first]) if stripped else bool(is_comment[start])
        start += len(line)
    return count


def blank_directives(code):
    """Blanks preprocessor directives with their continuation lines, so that macros are no functions."""
    return re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", lambda m: blank(m[0]), code, flags=re.MULTILINE)


def matching(text, start):
    """The position after the bracket that closes the one at `start`; the end of the text if there is none."""
    pairs = {"(": ")", "[": "]", "<": ">", "{": "}"}
    close, depth = pairs[text[start]], 0
    for i in range(start, len(text)):
        depth += (text[i] == text[start]) - (text[i] == close)
        if depth == 0:
            return i + 1
    return len(text)


def remove_attributes(head):
    """Removes `template <...>` and everything with parentheses that is no parameter list."""
    while (found := re.search(r"\btemplate\s*(<)", head)) is not None:
        head = head[:found.start()] + head[matching(head, found.start(1)):]
    pattern = r"\b(?:__launch_bounds__|__attribute__|__align__|alignas|__declspec|noexcept|_Alignas)\s*(\()"
    while (found := re.search(pattern, head)) is not None:
        head = head[:found.start()] + head[matching(head, found.start(1)):]
    return head


def split_parameters(text):
    """Splits a parameter list at the commas that are outside of all brackets."""
    parts, depth, last = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "([{<") - (char in ")]}>")
        if char == "," and depth == 0:
            parts.append(text[last:i])
            last = i + 1
    parts.append(text[last:])
    parts = [part.strip() for part in parts]
    return [] if parts in ([""], ["void"]) else parts


def parse_head(head):
    """(name, kind, parameters) if the text before a `{` is the signature of a function, otherwise None."""
    kind = "__global__" if "__global__" in head else "device" if "__device__" in head else "host"
    head = remove_attributes(head)
    if "(" not in head or re.match(r"\s*(typedef|enum|union|namespace)\b", head):
        return None
    at, name, parameters = 0, None, None
    while at < len(head):
        if head[at] == "=" and "operator" not in head:
            return None  # an initializer
        if head[at] == "(":
            end = matching(head, at)
            before = re.search(r"([A-Za-z_]\w*|operator\s*\S+)\s*$", head[:at])
            if before is not None and name is None:
                name, parameters = before[1], split_parameters(head[at + 1:end - 1])
            at = end
        else:
            at += 1
    return None if name is None else (name, kind, len(parameters))


def find_functions(code):
    """All function definitions of code without comments and directives."""
    starts = [0] + [m.end() for m in re.finditer(r"\n", code)]
    line_of = lambda position: bisect.bisect_right(starts, position)
    functions, depth, head_start, current = [], 0, 0, None
    for found in re.finditer(r"[{};]", code):
        at, char = found.start(), found[0]
        if char == ";":
            if depth == 0:
                head_start = at + 1
        elif char == "{":
            if depth == 0:
                head = code[head_start:at]
                if re.search(r'\bextern\s*"\s*"\s*$', head) or re.match(r"\s*namespace\b[^()]*$", head):
                    head_start = at + 1  # the contents are at file level
                    continue
                first = head_start + len(head) - len(head.lstrip())
                signature = parse_head(head)
                current = signature and (*signature, line_of(first))
            depth += 1
        else:
            # By the style of this code a `}` in the first column ends a definition, even where #if and #else both
            # open a brace.
            depth = 0 if at == 0 or code[at - 1] == "\n" else max(depth - 1, 0)
            if depth == 0:
                if current is not None:
                    name, kind, parameters, first_line = current
                    functions.append(Function(name, kind, first_line, line_of(at) - first_line + 1, parameters))
                current, head_start = None, at + 1
    return functions


def count(text):
    code, is_comment = split_comments(text)
    code_only = blank_directives(code)
    templates = len(re.findall(r"\btemplate\s*<", code_only))
    return Counts(len(text.splitlines()), count_comment_lines(text, is_comment), templates, find_functions(code_only))


def print_table(counts):
    print(f"{'file':26} {'lines':>6} {'comment':>8} {'share':>6} {'functions':>10} {'host':>5} {'device':>7} "
          f"{'__global__':>11} {'templates':>10} {'median':>7}  {'longest function':32} most parameters")
    for path, c in counts.items():
        kinds = [sum(f.kind == kind for f in c.functions) for kind in ("host", "device", "__global__")]
        line = (f"{path:26} {c.lines:6} {c.comment_lines:8} {c.comment_percent:5.1f}% {len(c.functions):10} "
                f"{kinds[0]:5} {kinds[1]:7} {kinds[2]:11} {c.templates:10}")
        if c.functions:
            longest = max(c.functions, key=lambda f: f.lines)
            most = max(c.functions, key=lambda f: f.parameters)
            line += (f" {statistics.median(f.lines for f in c.functions):7g}  {f'{longest.lines} {longest.name}':32} "
                     f"{most.parameters} {most.name}")
        print(line)


def check(counts):
    """The list of violated limits, one message each."""
    messages = []
    for path, c in counts.items():
        name, in_kernels = os.path.basename(path), os.path.basename(os.path.dirname(path)) == "kernels"
        limit = MAX_KERNEL_FILE_LINES if in_kernels else MAX_LINES.get(name)
        if limit is not None and c.lines > limit:
            messages.append(f"{path}: {c.lines} lines, at most {limit} are allowed")
        share = MIN_COMMENT_PERCENT.get(name)
        if share is not None and not in_kernels and c.comment_percent < share:
            messages.append(f"{path}: {c.comment_percent:.1f} % comment lines, at least {share:g} % are required")
        if in_kernels or name in MODEL_FILES:
            messages += [f"{path}:{f.first_line}: {f.name} has {f.parameters} parameters, at most {MAX_PARAMETERS} are "
                         "allowed" for f in c.functions if f.parameters > MAX_PARAMETERS]
    return messages


def default_files(commit):
    if commit is None:
        kernels = sorted(glob.glob(os.path.join(ROOT, "kernels", "*.cuh")))
        return [*MODEL_FILES, *(os.path.join("kernels", os.path.basename(path)) for path in kernels)]
    listing = git("ls-tree", "--name-only", commit, "kernels/").splitlines()
    return [*MODEL_FILES, *(path for path in listing if path.endswith(".cuh"))]


def git(*arguments):
    result = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"error: git {' '.join(arguments)}: {result.stderr.strip()}")
    return result.stdout


def read(path, commit, is_default):
    if commit is not None:
        return git("show", f"{commit}:{path}")
    with open(os.path.join(ROOT, path) if is_default else path, encoding="utf-8") as f:
        return f.read()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="default: the model's three files and kernels/*.cuh")
    parser.add_argument("--commit", help="read the files of this commit; paths are relative to the repository's root")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a limit is exceeded")
    args = parser.parse_args()
    try:
        counts = {path: count(read(path, args.commit, not args.files))
                  for path in args.files or default_files(args.commit)}
    except OSError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}")
    print_table(counts)
    messages = check(counts) if args.check else []
    for message in messages:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(1 if messages else 0)


if __name__ == "__main__":
    main()
