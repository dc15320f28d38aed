"""Turn texts into llm.c's .bin token files, which ./train --data reads.

    pip install -r dev/requirements-tokenizer.txt
    python dev/make_bin.py train.bin book.txt other.txt --tokenizer tokenizer.bin --eot 1
    python dev/make_bin.py train.bin stories.txt --tokenizer tokenizer.bin --eot 1 --between "<|endoftext|>"
    python dev/make_bin.py train.bin *.txt --tokenizer tokenizer.bin --shard-tokens 100000000

Without --tokenizer each byte is a token. tokenizer.bin is what dev/make_tokenizer.py makes; texts must be UTF-8 then,
and SentencePiece encodes them, as ./sample does. With --eot that token comes before each document and after the last
one, for ./train --eot: a document is a file or, with --between LINE, what lies between such lines; each begins as
./sample begins a prompt. Without --eot the documents follow each other. With --shard-tokens N there are several files,
train_000000.bin and so on, each but the last of N tokens.

A file has 256 int32, of which the first are 20240520, the version 1 and the number of tokens, and then the tokens as
uint16, so there are at most 65536 different ones. It is written under another name, *.tmp, and renamed when complete.
An older .bin token file of that name is replaced; any other file, and one that is read, is not.
"""

import argparse
import glob
import os
import re
import struct
import sys
import time

import numpy as np
from outputs import begins_with, check_output

MAGIC, VERSION, HEADER = 20240520, 1, 256
MOST = 2**31 - 1  # the header's number of tokens is an int32
MARK = "\u2581"
CHUNK = 1 << 12  # bytes of a text that are encoded at once, at least, if it can be cut at line ends
BATCH = 1024  # chunks that SentencePiece's threads share


def is_utf8(data):
    return data.decode(errors="ignore").encode() == data


class ByteTokenizer:
    count = 256
    cuts = True

    def encode(self, chunks):
        return [np.frombuffer(text, dtype=np.uint8) for text, first in chunks]


class BinTokenizer:
    """SentencePiece with the tokens of a tokenizer.bin."""

    def __init__(self, path):
        with open(path, "rb") as f:
            data = f.read()
        pieces, at = [], 4
        while at < len(data):
            if len(data) - at < 8:
                sys.exit(f"error: --tokenizer {path}: ends within token {len(pieces)}")
            score, length = struct.unpack_from("<fi", data, at)
            at += 8 + length
            if length < 0 or at > len(data):
                sys.exit(f"error: --tokenizer {path}: token {len(pieces)} is {length} bytes long")
            pieces.append((data[at - length:at], score))
        if [p for p, _ in pieces[3:259]] != [b"<0x%02X>" % b for b in range(256)]:
            sys.exit(f"error: --tokenizer {path}: tokens 3 to 258 are not <0x00> to <0xFF>; is it a tokenizer.bin?")
        self.count = len(pieces)
        # lines can be encoded one by one unless a token goes on behind a line's end
        self.cuts = not any(b"\n" in p[:-1] for p, _ in pieces[259:])
        self.first, self.next = self.build(pieces, True), self.build(pieces, False)

    @staticmethod
    def build(pieces, dummy_prefix):
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2 as proto

        kind = proto.ModelProto.SentencePiece.Type
        model = proto.ModelProto()
        model.trainer_spec.model_type = proto.TrainerSpec.ModelType.BPE
        model.trainer_spec.byte_fallback = True
        model.trainer_spec.vocab_size = len(pieces)
        model.normalizer_spec.name = "identity"
        model.normalizer_spec.add_dummy_prefix = dummy_prefix
        model.normalizer_spec.remove_extra_whitespaces = False
        seen = set()
        for i, (data, score) in enumerate(pieces):
            piece = ("<unk>", "<s>", "</s>")[i] if i < 3 else data.decode(errors="replace").replace(" ", MARK)
            # Of equal ones the first counts. A mark in a text is a space, and no UTF-8 text has other bytes.
            of_text = i >= 259 and data and data not in seen and MARK.encode() not in data and is_utf8(data)
            seen.add(data)
            special = kind.UNKNOWN if i == 0 else kind.BYTE if 3 <= i < 259 else kind.CONTROL
            name = piece if of_text or i < 259 else f"<control token {i}>"
            model.pieces.add(piece=name, score=score, type=kind.NORMAL if of_text else special)
        return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())

    def encode(self, chunks):
        """chunks: (bytes, whether a document begins there); those that do get a space put before them."""
        ids = [None] * len(chunks)
        for processor, first in (self.first, True), (self.next, False):
            which = [i for i, chunk in enumerate(chunks) if chunk[1] == first]
            texts = [chunks[i][0].decode() for i in which]
            for i, tokens in zip(which, processor.encode(texts) if texts else []):
                ids[i] = np.array(tokens, dtype=np.uint16)
        return ids


class Writer:
    """One .bin file, or numbered ones of --shard-tokens each."""

    def __init__(self, path, shard_tokens):
        self.path, self.limit, self.numbered = path, shard_tokens or MOST, shard_tokens is not None
        self.file, self.shards, self.total, self.here = None, 0, 0, 0

    def shard(self, number):
        stem, ending = os.path.splitext(self.path)
        return f"{stem}_{number}{ending}"

    def check(self, inputs):
        """Refuses all names that may be written: that of the file, or those of existing shards and the first one."""
        names = {self.shard("000000")} if self.numbered else {self.path}
        if self.numbered:
            stem, ending = map(glob.escape, os.path.splitext(self.path))
            pattern = re.escape(self.shard("NUMBER")).replace("NUMBER", "[0-9]{6,}")
            names |= {name for name in glob.glob(f"{stem}_*{ending}") if re.fullmatch(pattern, name)}
        for name in sorted(names):
            check_output(name, inputs, "a .bin token file", lambda path: begins_with(path, struct.pack("<i", MAGIC)),
                         name + ".tmp")

    def open(self):
        self.name = self.shard(f"{self.shards:06d}") if self.numbered else self.path
        self.file = open(self.name + ".tmp", "xb")
        self.file.write(bytes(4 * HEADER))
        self.shards += 1
        self.here = 0

    def add(self, tokens):
        while len(tokens) > 0:
            if self.file is not None and self.here == self.limit:
                if not self.numbered:
                    sys.exit(f"error: more than {MOST} tokens do not go into one file: use --shard-tokens")
                self.close()
            if self.file is None:
                self.open()
            some = tokens[:self.limit - self.here]
            self.file.write(some.astype("<u2").tobytes())
            self.here += len(some)
            self.total += len(some)
            tokens = tokens[len(some):]

    def close(self):
        if self.file is None:
            return
        header = np.zeros(HEADER, dtype="<i4")
        header[:3] = MAGIC, VERSION, self.here
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.name + ".tmp", self.name)
        print(f"{self.name}: {self.here} tokens")
        self.file = None

    def discard(self):  # what has not been closed
        if self.file is not None:
            self.file.close()
            os.remove(self.name + ".tmp")


def write_bin(path, tokens):
    writer = Writer(path, None)
    writer.add(np.asarray(tokens))
    writer.close()


def chunks_of(path, between, cuts):
    """A file's text in pieces, and whether a document begins with each; empty documents are left out."""
    start, parts, size = True, [], 0
    with open(path, "rb") as f:
        for line in f:
            ends = between is not None and line.rstrip(b"\r\n") == between
            if not ends:
                parts.append(line)
                size += len(line)
            if parts and (ends or (cuts and size >= CHUNK)):
                yield b"".join(parts), start
                start, parts, size = False, [], 0
            start = start or ends
    if parts:
        yield b"".join(parts), start


def encode_files(args, tokenizer, writer):
    """Returns the numbers of bytes and of documents."""
    size, documents = 0, 0
    for path in args.texts:
        batch = []
        chunks = chunks_of(path, args.between and args.between.encode(), tokenizer.cuts)
        while batch := [chunk for _, chunk in zip(range(BATCH), chunks)]:
            try:
                encoded = tokenizer.encode(batch)
            except UnicodeDecodeError as error:
                near = error.object[max(error.start - 20, 0):error.end]
                sys.exit(f"error: {path}: not UTF-8 at the end of {near!r}: convert it, or use bytes as tokens (no "
                         "--tokenizer)")
            for (text, start), tokens in zip(batch, encoded):
                if args.eot is not None and (tokens == args.eot).any():
                    sys.exit(f"error: {path}: holds token {args.eot} itself: choose another --eot")
                if args.eot is not None and start:
                    writer.add(np.array([args.eot]))
                writer.add(tokens)
                documents += start
                size += len(text)
    if args.eot is not None and documents:
        writer.add(np.array([args.eot]))
    return size, documents


def run(args):
    Writer(args.out, args.shard_tokens).check(args.texts + [args.tokenizer] * bool(args.tokenizer))
    tokenizer = BinTokenizer(args.tokenizer) if args.tokenizer else ByteTokenizer()
    vocab_size = max(tokenizer.count, (args.eot or 0) + 1)
    if vocab_size > 65536:
        sys.exit(f"error: a vocabulary of {vocab_size} tokens: .bin files have 16 bits for a token, 65536 at most")
    if args.eot is not None and (args.eot < 0 or (args.tokenizer and args.eot >= tokenizer.count)):
        sys.exit(f"error: --eot {args.eot}: the tokens are 0 to {tokenizer.count - 1}")
    if args.shard_tokens is not None and not 1 <= args.shard_tokens <= MOST:
        sys.exit(f"error: --shard-tokens {args.shard_tokens}: 1 to {MOST}")
    writer, begun = Writer(args.out, args.shard_tokens), time.time()
    try:
        size, documents = encode_files(args, tokenizer, writer)
        if writer.total == 0:
            sys.exit("error: the texts are empty")
        writer.close()
    finally:
        writer.discard()
    print(f"{size} bytes in {documents} documents, {writer.total} tokens, {size / writer.total:.2f} bytes a token, "
          f"{size / (time.time() - begun) / 1e6:.1f} MB/s; for --vocab-size {vocab_size}" +
          (f" --eot {args.eot}" if args.eot is not None else ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="what to write, *.bin")
    parser.add_argument("texts", nargs="+", help="what to read")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.bin; without it bytes are tokens")
    parser.add_argument("--eot", type=int, metavar="TOKEN", help="a token between documents")
    parser.add_argument("--between", metavar="LINE", help="such lines separate documents, and are left out")
    parser.add_argument("--shard-tokens", type=int, metavar="N", help="tokens of a file")
    args = parser.parse_args()
    try:
        run(args)
    except OSError as error:
        sys.exit(f"error: {error.filename or args.out}: {error.strerror}")


if __name__ == "__main__":
    main()
