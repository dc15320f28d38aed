"""Runs the Python code of the pages about layers, and compares what it prints with the output shown beneath it.

    python3 dev/check_pages.py                  the pages of PAGES
    python3 dev/check_pages.py PAGE.md ...      these pages

A fenced block that begins with ```python is followed by one that begins with ```text: its output. The blocks of a page
share their variables. A block that is followed by another one prints nothing. Ends with "N passed, N failed", one check
for each block. Needs PyTorch.
"""

import contextlib
import io
import os
import re
import sys
import traceback

PAGES = ("timestep-norm", "cema", "attention", "block", "parallel-in-time")
FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "dev", "notes")


def run(code, variables):
    """What the code prints, or the error that ended it."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            exec(code, variables)
        except Exception:
            print(traceback.format_exc(limit=-1))
    return printed.getvalue().rstrip().split("\n")


def main():
    pages = sys.argv[1:] or [os.path.join(FOLDER, name + ".md") for name in PAGES]
    passed = failed = 0
    for path in pages:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        variables, before = {}, passed + failed
        blocks = [(m[1], m[2], text.count("\n", 0, m.start()) + 1)
                  for m in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)]
        for (kind, code, line), (next_kind, output, _) in zip(blocks, blocks[1:] + [("", "", 0)]):
            if kind != "python":
                continue
            shown = {"text": output.rstrip().split("\n"), "python": [""]}.get(next_kind, ["no output is shown"])
            printed = run(code, variables)
            ok = printed == shown
            print(f"{'ok' if ok else 'FAIL':<4}  {os.path.basename(path)}:{line}: prints {f'the {len(shown)} lines shown' if any(shown) else 'nothing'}")
            if not ok:
                print("\n".join([f"      shown    {a}" for a in shown] + [f"      printed  {a}" for a in printed]))
            passed, failed = passed + ok, failed + (not ok)
        if passed + failed == before:
            print(f"FAIL  {os.path.basename(path)}: has no block that begins with ```python")
            failed += 1
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


main()
