"""Checks before the Python tools write a file: no output replaces an input or a file of another kind."""

import os
import sys


def check_output(path, inputs, what, is_ours, temporary=None):
    """Exits with an error message unless the output `path` can be written without damage to other files.

    inputs: files that the tool reads. path must not be one of them.
    what, is_ours: the kind of file that the tool writes, in words ("a .bin token file") and as a test of a path. An
        existing file is replaced only if it is empty or is_ours(path).
    temporary: the name under which the output is written until it is complete, if any. It must not exist.
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
        sys.exit(f"error: {path}: cannot write: no permission, or the folder does not exist")
    if temporary and os.path.lexists(temporary):
        sys.exit(f"error: {temporary}: exists, perhaps left over from a killed command; remove it")


def begins_with(path, start):
    with open(path, "rb") as f:
        return f.read(len(start)) == start


def is_safetensors(path):
    """Whether the file starts like a safetensors file: the header's length (below 100 MB), then `{`."""
    with open(path, "rb") as f:
        return f.read(9)[4:] == b"\0\0\0\0{"
