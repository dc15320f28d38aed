"""What the Python tools check before they write: no output replaces an input or a file that is not of its own kind."""

import os
import sys


def check_output(path, inputs, what, is_ours, temporary=None):
    """Exits with an error unless `path`, and `temporary`, its name until it is complete, can be written.

    An older file may be replaced if it is empty or is_ours(path); `what` names such files: "a .bin token file".
    """
    folder = os.path.dirname(path) or "."
    if path == "":
        sys.exit("error: the name of the output is empty")
    for source in inputs:
        if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
            sys.exit(f"error: {path}: is also what is read ({source}); was the name of the output forgotten?")
    if os.path.exists(path) and not os.path.isfile(path):
        sys.exit(f"error: {path}: cannot write: not a regular file")
    if os.path.exists(path) and os.path.getsize(path) > 0 and not is_ours(path):
        sys.exit(f"error: {path}: exists and is not {what}; give another name or remove it")
    if not os.access(folder, os.W_OK | os.X_OK) or (os.path.exists(path) and not os.access(path, os.W_OK)):
        sys.exit(f"error: {path}: cannot write there")
    if temporary and os.path.lexists(temporary):
        sys.exit(f"error: {temporary}: exists, perhaps left by a command that was killed; remove it")


def begins_with(path, start):
    with open(path, "rb") as f:
        return f.read(len(start)) == start
