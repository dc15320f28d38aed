"""Fetches the texts of the experiment dev/notes/context_loss.md from Debian packages, by name.

    python3 dev/experiments/context_text.py             writes build/context/train.txt and build/context/held-out/*.txt
    python3 dev/experiments/context_text.py --pack FILE.tar.xz         also packs them, for another machine

Training text: C sources of the Linux kernel. Files of one directory stay together, in the order of their paths. The
directories are in an order that is shuffled with a fixed seed. Tables that a program generated are left out.
Held-out texts: the first bytes of whole kernel directories, of which the training text has nothing: no file whose path
contains the directory's name. And one text of another kind, the King James Bible.

The texts are a function of the packages' versions, which are printed with the size and the SHA-256 of each text. For
each held-out text the share of its long lines that the training text also has is printed, to show that there are no
near-duplicates.

Needs Debian or a derivative (apt-get, dpkg), after `apt-get update`, and xz. On another system, download the packages
and put the .deb files into build/context/packages. Only Python's standard library is needed. About two minutes.
"""
import argparse
import glob
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tarfile

FOLDER = "build/context"
HELD_OUT = {  # name of the text: (directory, word that no path of the training text contains)
    "xfs": ("fs/xfs", "xfs"),
    "ocfs2": ("fs/ocfs2", "ocfs2"),
    "lpfc": ("drivers/scsi/lpfc", "lpfc"),
    "mlxsw": ("drivers/net/ethernet/mellanox/mlxsw", "mlxsw"),
    "mac80211": ("net/mac80211", "mac80211"),
    "vmwgfx": ("drivers/gpu/drm/vmwgfx", "vmw"),
}
GENERATED = ("drivers/gpu/drm/amd/include/", "drivers/misc/habanalabs/include/", "fs/nls/", "lib/fonts/")
MAX_FILE = 512 << 10  # bytes; larger files are tables
MAX_UNIT = 8 << 20    # bytes of a directory tree that stays together
LONG_LINE = 40        # bytes
SEED = 1


def fetch(package):
    """The path of the package's .deb file, downloaded if it is not there yet."""
    folder = os.path.join(FOLDER, "packages")
    os.makedirs(folder, exist_ok=True)
    pattern = os.path.join(folder, f"{package}_*.deb")
    if not glob.glob(pattern):
        if shutil.which("apt-get") is None:
            sys.exit(f"error: {package}: no apt-get on this machine; download the package from packages.debian.org "
                     f"and put the .deb file into {folder}")
        result = subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, text=True)
        if result.returncode != 0 or not glob.glob(pattern):
            sys.exit(f"error: apt-get download {package}: {result.stderr.strip()}; run apt-get update first, or name "
                     "another version of the kernel with --kernel (apt-cache search linux-source)")
    deb = sorted(glob.glob(pattern))[-1]
    print(f"package {os.path.basename(deb)}", flush=True)
    return deb


def unpack(package):
    """The folder with the package's files."""
    deb = fetch(package)
    folder = os.path.join(FOLDER, "unpacked", package)
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    if shutil.which("dpkg") is None:
        sys.exit("error: no dpkg on this machine, which unpacks .deb files")
    subprocess.run(["dpkg", "-x", deb, folder], check=True)
    return folder


def members(archive):
    """(path without its first component, tarfile, member) of each C source, in the archive's order."""
    with tarfile.open(archive, "r|xz") as tar:
        for member in tar:
            path = member.name.partition("/")[2]
            if member.isfile() and path.endswith((".c", ".h")):
                yield path, tar, member


def units(sizes):
    """Lists of paths. Each list is a directory tree of at most MAX_UNIT bytes, or the files of a larger directory."""
    trees = {}
    for path, size in sizes.items():
        parts = path.split("/")[:-1]
        for i in range(len(parts) + 1):
            tree = "/".join(parts[:i])
            trees[tree] = trees.get(tree, 0) + size
    result = {}
    for path in sorted(sizes):
        parts = path.split("/")[:-1]
        unit = next(("/".join(parts[:i]) for i in range(len(parts) + 1)
                     if trees["/".join(parts[:i])] <= MAX_UNIT), "/".join(parts) + "/*")
        result.setdefault(unit, []).append(path)
    return [result[unit] for unit in sorted(result)]


def kernel(package, train_bytes, test_bytes):
    """(training text, {name: held-out text})."""
    folder = unpack(package)
    archives = glob.glob(os.path.join(folder, "usr/src/linux-source-*.tar.xz"))
    if len(archives) != 1:
        sys.exit(f"error: {package}: has no usr/src/linux-source-*.tar.xz")
    sizes = {path: member.size for path, _, member in members(archives[0])}
    words = [word for _, word in HELD_OUT.values()]
    trained = {path: size for path, size in sizes.items() if size <= MAX_FILE and not path.startswith(GENERATED)
               and not any(word in path for word in words)}
    order = units(trained)
    random.Random(SEED).shuffle(order)
    chosen, total = [], 0
    for unit in order:
        chosen.append(unit)
        total += sum(trained[path] for path in unit)
        if total >= train_bytes:
            break
    if total < train_bytes:
        sys.exit(f"error: {package}: has {total} bytes of C sources, fewer than --train-bytes {train_bytes}")
    tests = {name: [p for p in sorted(sizes) if p.startswith(folder + "/")] for name, (folder, _) in HELD_OUT.items()}
    wanted = {path for unit in chosen for path in unit} | {path for paths in tests.values() for path in paths}
    contents = {path: tar.extractfile(member).read() for path, tar, member in members(archives[0]) if path in wanted}
    print(f"{len(chosen)} of {len(order)} directory trees, {sum(map(len, chosen))} files", flush=True)
    train = b"".join(contents[path] for unit in chosen for path in unit)[:train_bytes]
    return train, {name: b"".join(contents[path] for path in paths)[:test_bytes] for name, paths in tests.items()}


def bible(test_bytes):
    """The first bytes of the King James Bible. The package has a compressed text, which its program prints."""
    program = os.path.join(unpack("bible-kjv"), "usr/bin/bible")
    data = os.path.join(unpack("bible-kjv-text"), "usr/lib/")
    result = subprocess.run([program, "-p", data, "gen1:1-rev22:21"], stdin=subprocess.DEVNULL, capture_output=True)
    if len(result.stdout) < test_bytes:
        print(f"left out: the Bible; {program} printed {len(result.stdout)} bytes: "
              f"{result.stderr.decode(errors='replace').strip()}", file=sys.stderr)
        return {}
    return {"bible": result.stdout[:test_bytes]}


def long_lines(text):
    return [line for line in (line.strip() for line in text.split(b"\n")) if len(line) >= LONG_LINE]


def write(name, text, train_lines):
    path = os.path.join(FOLDER, name)
    with open(path, "wb") as f:
        f.write(text)
    line = f"{path}: {len(text)} bytes, sha256 {hashlib.sha256(text).hexdigest()}"
    if train_lines is not None:
        lines = long_lines(text)
        shared = sum(line in train_lines for line in lines) / max(len(lines), 1)
        line += f"; {100 * shared:.1f} % of its lines of {LONG_LINE} bytes or more are in the training text"
    print(line, flush=True)
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", default="linux-source-6.1", help="package with the kernel's sources")
    parser.add_argument("--train-bytes", type=int, default=150_000_000)
    parser.add_argument("--test-bytes", type=int, default=(1 << 20) + 1, help="of each held-out text")
    parser.add_argument("--pack", metavar="FILE.tar.xz", help="packs the texts")
    args = parser.parse_args()
    if args.pack and not args.pack.endswith(".tar.xz"):
        parser.error(f"--pack {args.pack}: the name of the archive must end in .tar.xz")
    os.makedirs(os.path.join(FOLDER, "held-out"), exist_ok=True)
    train, texts = kernel(args.kernel, args.train_bytes, args.test_bytes)
    texts.update(bible(args.test_bytes))
    for name, text in texts.items():
        if len(text) < args.test_bytes:
            sys.exit(f"error: {name}: has {len(text)} bytes, fewer than --test-bytes {args.test_bytes}")
    written = [write("train.txt", train, None)]
    lines = set(long_lines(train))
    written += [write(f"held-out/{name}.txt", text, lines) for name, text in sorted(texts.items())]
    if args.pack:
        with tarfile.open(args.pack, "w:xz", preset=9) as tar:
            for path in written:
                tar.add(path)
        print(f"{args.pack}: {os.path.getsize(args.pack)} bytes; in the other repository: tar -xJf FILE.tar.xz")


if __name__ == "__main__":
    main()
