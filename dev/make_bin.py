"""Convert texts to llm.c's .bin token files, which ./train --data reads.

    pip install -r dev/requirements-tokenizer.txt
    python dev/make_bin.py train.bin book.txt other.txt --tokenizer tokenizer.bin --eot 1
    python dev/make_bin.py train.bin stories.txt --tokenizer tokenizer.bin --eot 1 --between "<|endoftext|>"
    python dev/make_bin.py train.bin *.txt --tokenizer tokenizer.bin --shard-tokens 100000000

Tokens. Without --tokenizer each byte is a token. With --tokenizer, a tokenizer.bin from dev/make_tokenizer.py, texts
must be UTF-8, and SentencePiece encodes them as ./sample does.

Documents. A document is a file or, with --between LINE, the text between two such lines. With --tokenizer each document
gets a leading space, as a prompt of ./sample does. With --eot, that token is written before each document and after the
last one, as ./train --eot expects. Without --eot the documents follow each other directly.

Shards. With --shard-tokens N there are several files, train_000000.bin and so on, each of N tokens but for the last.

Format. 256 int32: 20240520, the version 1, the number of tokens, zeros. Then the tokens as uint16, so there are at most
65536 different ones.

Safety. A file is written as *.tmp and renamed when it is complete. It may replace an older .bin token file, but no
other file and no input.
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
MAX_TOKENS = 2**31 - 1  # of a file, whose header has the number of tokens as an int32
MARK = "\u2581"
CHUNK = 1 << 12  # a text is divided at the next line end after this many bytes, if the tokenizer permits it
BATCH = 1024  # chunks per call of SentencePiece, which distributes them over its threads


def is_utf8(data):
    return data.decode(errors="ignore").encode() == data


class ByteTokenizer:
    count = 256
    cuts = True

    def encode(self, chunks):
        return [np.frombuffer(text, dtype=np.uint8) for text, first in chunks]


class BinTokenizer:
    """A SentencePiece BPE with the tokens of a tokenizer.bin."""

    def __init__(self, path):
        with open(path, "rb") as f:
            data = f.read()
        pieces, at = [], 4
        while at < len(data):
            if len(data) - at < 8:
                sys.exit(f"error: --tokenizer {path}: the file is truncated in token {len(pieces)}")
            score, length = struct.unpack_from("<fi", data, at)
            at += 8 + length
            if length < 0 or at > len(data):
                sys.exit(f"error: --tokenizer {path}: token {len(pieces)} has an invalid length of {length} bytes")
            pieces.append((data[at - length:at], score))
        if [p for p, _ in pieces[3:259]] != [b"<0x%02X>" % b for b in range(256)]:
            sys.exit(f"error: --tokenizer {path}: tokens 3 to 258 are not <0x00> to <0xFF>; is it a tokenizer.bin?")
        self.count = len(pieces)
        # Lines can be encoded separately unless a token continues after a line end.
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
            # Of tokens with equal bytes only the first is used. A token that contains the mark would match spaces, and a
            # token that is not UTF-8 occurs in no text.
            of_text = i >= 259 and data and data not in seen and MARK.encode() not in data and is_utf8(data)
            seen.add(data)
            special = kind.UNKNOWN if i == 0 else kind.BYTE if 3 <= i < 259 else kind.CONTROL
            name = piece if of_text or i < 259 else f"<control token {i}>"
            model.pieces.add(piece=name, score=score, type=kind.NORMAL if of_text else special)
        return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())

    def encode(self, chunks):
        """Encodes chunks: (bytes, whether a document starts there). The start of a document gets a leading space."""
        ids = [None] * len(chunks)
        for processor, first in (self.first, True), (self.next, False):
            which = [i for i, chunk in enumerate(chunks) if chunk[1] == first]
            texts = [chunks[i][0].decode() for i in which]
            for i, tokens in zip(which, processor.encode(texts) if texts else []):
                ids[i] = np.array(tokens, dtype=np.uint16)
        return ids


class Writer:
    """Writes one .bin file, or numbered files of --shard-tokens tokens each."""

    def __init__(self, path, shard_tokens):
        self.path, self.limit, self.numbered = path, shard_tokens or MAX_TOKENS, shard_tokens is not None
        self.file, self.shards, self.total, self.here = None, 0, 0, 0

    def shard(self, number):
        stem, ending = os.path.splitext(self.path)
        return f"{stem}_{number}{ending}"

    def check(self, inputs):
        """Checks the names of all possible outputs: the file, or the first shard and all existing shards."""
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
                    sys.exit(f"error: {self.path}: one file holds at most {MAX_TOKENS} tokens; use --shard-tokens")
                self.close()
            if self.file is None:
                self.open()
            part = tokens[:self.limit - self.here]
            self.file.write(part.astype("<u2").tobytes())
            self.here += len(part)
            self.total += len(part)
            tokens = tokens[len(part):]

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

    def discard(self):
        """Removes the file that has not been closed, if there is one."""
        if self.file is not None:
            self.file.close()
            os.remove(self.name + ".tmp")


def write_bin(path, tokens):
    writer = Writer(path, None)
    writer.add(np.asarray(tokens))
    writer.close()


def chunks_of(path, between, cuts):
    """Yields the chunks of a file's text: (bytes, whether a document starts there). Empty documents are skipped."""
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
    """Encodes all texts; returns the number of bytes and the number of documents."""
    size, documents = 0, 0
    for path in args.texts:
        batch = []
        chunks = chunks_of(path, args.between and args.between.encode(), tokenizer.cuts)
        while batch := [chunk for _, chunk in zip(range(BATCH), chunks)]:
            try:
                encoded = tokenizer.encode(batch)
            except UnicodeDecodeError as error:
                near = error.object[max(error.start - 20, 0):error.end]
                sys.exit(f"error: {path}: not UTF-8 at the end of {near!r}; convert it, or use bytes as tokens "
                         "(without --tokenizer)")
            for (text, start), tokens in zip(batch, encoded):
                if args.eot is not None and (tokens == args.eot).any():
                    sys.exit(f"error: {path}: the text contains token {args.eot}; choose another --eot")
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
        sys.exit(f"error: the vocabulary has {vocab_size} tokens; .bin files have 16 bits per token, so at most 65536")
    if args.eot is not None and (args.eot < 0 or (args.tokenizer and args.eot >= tokenizer.count)):
        sys.exit(f"error: --eot {args.eot}: must be 0 to {tokenizer.count - 1}")
    if args.shard_tokens is not None and not 1 <= args.shard_tokens <= MAX_TOKENS:
        sys.exit(f"error: --shard-tokens {args.shard_tokens}: must be 1 to {MAX_TOKENS}")
    writer, start = Writer(args.out, args.shard_tokens), time.time()
    try:
        size, documents = encode_files(args, tokenizer, writer)
        if writer.total == 0:
            sys.exit("error: the texts are empty")
        writer.close()
    finally:
        writer.discard()
    print(f"{size} bytes in {documents} documents, {writer.total} tokens, {size / writer.total:.2f} bytes/token, "
          f"{size / (time.time() - start) / 1e6:.1f} MB/s; train with --vocab-size {vocab_size}" +
          (f" --eot {args.eot}" if args.eot is not None else ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="output file, *.bin")
    parser.add_argument("texts", nargs="+", help="input texts")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.bin; without it each byte is a token")
    parser.add_argument("--eot", type=int, metavar="TOKEN", help="token before each document and after the last one")
    parser.add_argument("--between", metavar="LINE", help="line that separates documents; it is not encoded")
    parser.add_argument("--shard-tokens", type=int, metavar="N", help="write several files of N tokens each")
    args = parser.parse_args()
    try:
        run(args)
    except OSError as error:
        sys.exit(f"error: {error.filename or args.out}: {error.strerror}")


if __name__ == "__main__":
    main()
