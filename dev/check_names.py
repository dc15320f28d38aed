"""Checks that what the pages name exists: functions, files, links, images, options, make targets, presets, commands.

    python3 dev/check_names.py                  README.md and dev/notes/*.md
    python3 dev/check_names.py PAGE.md ...      these pages

Names are looked for in the sources: an option in the tables of the C programs and in the arguments of the Python and
shell scripts, a function in the identifiers of all sources. Ends with "N passed, N failed", one check for each page.
Needs the Python standard library only.
"""

import glob
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CODE = (".c", ".h", ".cu", ".cuh", ".py", ".sh", ".js", ".awk", ".html")
# What is named but comes from elsewhere: other projects' names, and files that the commands of the pages write.
FOREIGN = {"max_memory_allocated", "peak_bytes_in_use", "train_gpt2.c", "train_gpt2_fp32.cu", "mamba.c", "__global__",
           "tokenizer.json", "options.txt"}
# Options of other programs: mpirun, srun, nvcc, pip.
FOREIGN_OPTIONS = {"--bind-to", "--hostfile", "--map-by", "--mpi", "--ntasks-per-node", "--mca", "--gpus-per-task",
                   "--gpus-per-node", "--parsable", "--all", "--allow-run-as-root"}
LAUNCHERS = {"mpirun", "srun"}
PATH = re.compile(r"[\w.*+-]+(/[\w.*+-]+)*/?$")


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8", errors="replace") as file:
        return file.read()


def source_files():
    """Paths of all files of the repository, relative to the root. Other folders beside them are a user's."""
    found = []
    for folder, folders, files in os.walk(ROOT):
        inside = os.path.relpath(folder, ROOT)
        if inside == ".":
            folders[:] = [f for f in folders if f in ("dev", "kernels", "plumbing", "tests", ".ci")]
        found += [os.path.normpath(os.path.join(inside, f)) for f in files]
    return found


FILES = source_files()
FOLDERS = {os.path.dirname(f) for f in FILES} | {os.path.dirname(os.path.dirname(f)) for f in FILES}
NAMES = {os.path.basename(f) for f in FILES}
MAKEFILE = read("Makefile")
TARGETS = {t for line in re.findall(r"^([\w./-]+(?: [\w./-]+)*)\s*:(?!=)", MAKEFILE, re.M) for t in line.split()}
VARIABLES = set(re.findall(r"[A-Z][A-Z_]+", MAKEFILE))
PROGRAMS = set(re.findall(r"\b(?:train|sample|compare)(?:_cuda)?(?:_fp32)?\b", MAKEFILE))
IDENTIFIERS = set()
for name in FILES:
    own = os.path.basename(name) in ("check_names.py", "test_names.sh")  # has wrong names
    if name.endswith(CODE) and not own and "/data/" not in name:
        IDENTIFIERS |= set(re.findall(r"[A-Za-z_]\w*", read(name)))
IDENTIFIERS |= set(re.findall(r"[A-Za-z_]\w*", MAKEFILE))
PRESETS = set(re.findall(r'\.name = "([\w.]+)"', read("plumbing/params.c")))


def options_of(*sources):
    """The options that these files define."""
    text = "".join(read(s) for s in sources)
    switches = re.findall(r'OPT_[A-Z0-9]+, "([\w-]+)"', text)
    negated = re.findall(r'OPT_BOOL, "([\w-]+)"', text)
    return {"--help"} | {"--" + s for s in switches} | {"--no-" + s for s in negated} | \
        set(re.findall(r'"(--[a-z][\w-]*)"', text))


CONFIG_OPTIONS = [f for f in FILES if re.fullmatch(r"plumbing/\w+\.[ch]", f) and f != "plumbing/compare.c"]
OPTIONS = {"train": options_of("train.c", *CONFIG_OPTIONS), "sample": options_of("sample.c", *CONFIG_OPTIONS),
           "compare": options_of("plumbing/compare.c")}
BINARIES = {"build/bench": "dev/bench.c", "build/gpu/bench_cuda": "dev/bench_cuda.cu",
            "build/position_loss": "dev/position_loss.c", "build/gpu/position_loss": "dev/position_loss.c"}


def known_options(program):
    """Options of a program or script, or None if it is not one of ours."""
    program = re.sub(r"^\./", "", program)
    base = re.sub(r"(_cuda)?(_fp32)?$", "", os.path.basename(program))
    if base in OPTIONS:
        return OPTIONS[base]
    source = BINARIES.get(program, program)
    return options_of(source) if source in FILES else None


ALL_OPTIONS = set(FOREIGN_OPTIONS).union(*OPTIONS.values(), *(
    options_of(f) for f in FILES if f.endswith((".py", ".sh", "bench.c", "bench_cuda.cu", "position_loss.c"))
    and not f.endswith("check_names.py")))


def is_program(word):
    """Whether a command of the pages can be run: built by the Makefile, or a file of the repository."""
    word = re.sub(r"^\./", "", word)
    test = re.fullmatch(r"build/(?:double/|gpu/|emulated/)?(test_\w+?)(?:_fp32)?", word)
    return word in PROGRAMS | BINARIES.keys() or word in FILES or word in TARGETS or \
        (test is not None and any(test[1] + end in NAMES for end in (".c", ".cu")))


class Page:
    def __init__(self, path):
        self.path, self.problems = path, []
        self.folder = os.path.dirname(path)

    def problem(self, line, name, sought):
        self.problems.append(f"{self.path}:{line}: {name}: {sought}")

    def path_exists(self, path):
        for folder in (self.folder, ROOT):
            if glob.glob(os.path.join(folder, path)) or glob.glob(os.path.join(folder, path + ".*")):
                return True
        return os.path.basename(path) in NAMES and "/" not in path

    def link(self, line, target):
        if re.match(r"[a-z]+:", target):
            return
        path, _, anchor = target.partition("#")
        whole = os.path.join(self.folder, path) if path else self.path
        if not os.path.exists(whole):
            self.problem(line, target, f"no such file or folder as {os.path.relpath(whole, ROOT)}")
        elif anchor and whole.endswith(".md"):
            with open(whole, encoding="utf-8") as file:
                titles = re.findall(r"^#+ (.*)", file.read(), re.M)
            slugs = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
            if anchor not in slugs:
                self.problem(line, target, f"no heading of {os.path.relpath(whole, ROOT)} has this anchor")

    def options(self, line, text, known, program):
        for option in re.findall(r"(?<![\w-])--(?:\[no-\])?[a-z][\w-]*", text):
            for name in {option.replace("[no-]", ""), option.replace("[no-]", "no-")}:
                if name not in known:
                    self.problem(line, name, f"no such option of {program}")
        for preset in re.findall(r"--preset[ =]([\w.]+)", text):
            if preset not in PRESETS | {"NAME", "P"}:
                self.problem(line, preset, "no such preset in plumbing/params.c")

    def make(self, line, words):
        for word in words:
            variable = re.match(r"([A-Z_]+)=", word)
            if variable:
                if variable[1] not in VARIABLES:
                    self.problem(line, variable[1], "no such variable in the Makefile")
            elif not re.match(r"[a-z]", word):
                break
            elif word not in TARGETS and not is_program(word):
                self.problem(line, "make " + word, "no such target in the Makefile")

    def command(self, line, text):
        """One command of a code block, or in backquotes."""
        words = text.split()
        while words and (re.match(r"\w+=", words[0]) or words[0] == "do"):
            words = words[1:]
        if not words:
            return
        if words[0] in LAUNCHERS:
            start = next((i for i, w in enumerate(words) if w.startswith("./")), None)
            if start is None:
                return
            self.options(line, " ".join(words[:start]), FOREIGN_OPTIONS, words[0])
            words = words[start:]
        if words[0] == "make":
            self.make(line, re.sub(r'"[^"]*"', "", " ".join(words[1:])).split())
            return
        if words[0] in ("python", "python3", "sh", "bash") and len(words) > 1:
            words = words[1:]
            if words[0].startswith("-"):
                return
        elif not re.match(r"\./|build/", words[0]):
            return
        known = known_options(words[0])
        if not is_program(words[0]):
            self.problem(line, words[0], "no such program: neither a file nor built by the Makefile")
        elif known is not None:
            self.options(line, " ".join(words[1:]), known, words[0])

    def span(self, line, text):
        """Something in backquotes outside a code block."""
        if re.match(r"(\w+=\S+ )?(make|python3?|sh|bash|mpirun|srun|\./\S+|build/\S+)( |$)", text):
            self.command(line, text)
            return
        self.options(line, text, ALL_OPTIONS, "any program or script")
        name = re.sub(r"\(.*\)$", "", text)
        if name in FOREIGN or name.startswith(("build/", "/", "out/", "step-")):
            return
        if re.fullmatch(r"_[a-z]\w*", name):
            if not any(i.endswith(name) for i in IDENTIFIERS):
                self.problem(line, text, "no identifier in the sources ends like this")
        elif re.fullmatch(r"[A-Za-z]\w*_\w*", name) or (name != text and re.fullmatch(r"[A-Za-z]\w*", name)):
            if name not in IDENTIFIERS | PRESETS | PROGRAMS:
                self.problem(line, text, "no such identifier in the sources")
        elif PATH.match(name) and ("/" in name or re.search(r"\.(c|h|cu|cuh|py|sh|md|svg|png|js|csv|txt)$", name)):
            first = name.split("/")[0]
            if "/" in name and first not in FOLDERS and first not in NAMES:
                return  # of another tree
            if not self.path_exists(name):
                self.problem(line, text, "no such file")

    def check(self):
        with open(self.path, encoding="utf-8") as file:
            lines = file.read().split("\n")
        fenced, header, joined, language = False, [], "", ""
        for number, line in enumerate(lines, 1):
            if line.startswith("```"):
                fenced, language = not fenced, line[3:].strip()
                continue
            if fenced or line.startswith("    "):
                if fenced and language not in ("", "sh"):
                    continue
                text = joined + re.sub(r"^\$ ", "", line.strip())
                joined = ""
                if text.endswith("\\"):
                    joined = text[:-1]
                    continue
                text = re.sub(r"\s+#.*", "", text)
                for part in re.split(r"&&|;|(?<!\\)\|", text):
                    self.command(number, part.strip())
                continue
            for target in re.findall(r"\]\(([^)\s]+)\)", line):
                self.link(number, target)
            for source in re.findall(r'src="([^"]+)"', line):
                self.link(number, source)
            cells = [c.strip() for c in line.strip().strip("|").split("|")] if line.startswith("|") else []
            if not cells:
                header = []
            elif not header:
                header = cells
            elif header[0] == "preset" and not set(cells[0]) <= set("-: ") and cells[0].split(",")[0] not in PRESETS:
                self.problem(number, cells[0], "no such preset in plumbing/params.c")
        # Backquotes may span the end of a line.
        prose, fenced = "", False
        for line in lines:
            fenced ^= line.startswith("```")
            prose += ("" if fenced or line.startswith(("```", "    ")) else line) + "\n"
        for match in re.finditer(r"`([^`]+)`", prose):
            self.span(prose.count("\n", 0, match.start()) + 1, " ".join(match[1].split()))
        bare = re.sub(r"`[^`]+`", lambda m: "\n" * m[0].count("\n"), prose)
        for number, line in enumerate(bare.split("\n"), 1):
            self.options(number, re.sub(r"\]\([^)]*\)", "]", line), ALL_OPTIONS, "any program or script")
        return self.problems


def main():
    pages = sys.argv[1:] or [os.path.join(ROOT, "README.md")] + sorted(glob.glob(os.path.join(ROOT, "dev/notes/*.md")))
    failed = 0
    for path in pages:
        problems = Page(os.path.abspath(path)).check()
        print(f"{'FAIL' if problems else 'ok':<4}  {os.path.relpath(path)}: what it names exists")
        for problem in problems:
            print("      " + problem.replace(ROOT + "/", ""))
        failed += bool(problems)
    print(f"{len(pages) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


main()
