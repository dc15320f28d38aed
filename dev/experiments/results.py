"""What the experiments share: programs that are run, and CSV tables, which are written as a whole after every run, so
that a run can be interrupted."""
import csv
import os
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from outputs import check_output


def run_program(command):
    """Runs a program and returns what it prints. If it fails, exits with an error."""
    command = [str(word) for word in command]
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace")  # samples may be any bytes
    except FileNotFoundError:
        sys.exit(f"error: {command[0]}: not found; run make in the repository root, and this script there, too")
    if result.returncode != 0:
        sys.exit(f"error: {' '.join(command)}: {result.stderr.strip()}")
    return result.stdout


def header(path):
    with open(path, newline="") as f:
        return next(csv.reader(f), None)


def load(path, columns):
    """The rows of the table, none if there is no file. Exits with an error if save() could not replace the file."""
    check_output(path, [], "a table of this program", lambda path: header(path) == columns, path + ".tmp")
    if not os.path.exists(path):
        return []
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def save(path, columns, rows):
    with open(path + ".tmp", "w", newline="") as f:
        writer = csv.DictWriter(f, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(path + ".tmp", path)
