"""Make the data of tests/test_tokenizer.c: tests/data/tokenizer.bin, .ids.bin and .h, for the text in tokenizer.txt.

    pip install -r dev/requirements-tokenizer.txt
    python dev/make_tokenizer_fixture.py

Trains a small SentencePiece BPE model on sources of this repository, as they are in an older commit. SentencePiece
itself encodes tokenizer.txt, as a whole and then line by line. It also encodes a longer text made of parts of
tokenizer.txt, of which only a hash of the ids is stored.
"""

import os
import subprocess
import tempfile

import make_bin
import make_tokenizer
import sentencepiece

DATA = os.path.join(make_tokenizer.ROOT, "tests/data")
LONG, VOCAB_SIZE = 200_000, 576
SOURCES = "0f85a01:dev/data/demo.txt"  # for git show


def longer(text):
    """LONG bytes or a few more: random parts of the text, 1 to 64 bytes each; as in tests/test_tokenizer.c."""
    out, random = bytearray(), 1
    while len(out) < LONG:
        random = (random * 6364136223846793005 + 1442695040888963407) % 2**64
        start = (random >> 32) % len(text)
        end = min(start + 1 + (random >> 26) % 64, len(text))
        while start < len(text) and text[start] & 0xC0 == 0x80:
            start += 1
        while end < len(text) and text[end] & 0xC0 == 0x80:
            end += 1
        out += text[start:end]
    return bytes(out)


def hash_of(ids):
    """FNV-1a over the ids, one step for each id."""
    value = 14695981039346656037
    for token in ids:
        value = (value ^ token) * 1099511628211 % 2**64
    return value


def main():
    with open(os.path.join(DATA, "tokenizer.txt"), "rb") as f:
        text = f.read()
    show = ["git", "-C", make_tokenizer.ROOT, "show", SOURCES]
    lines = subprocess.run(show, check=True, capture_output=True, encoding="utf-8").stdout.splitlines()
    # Lines with German, Chinese and emoji are repeated, so that some become tokens. Other scripts are encoded as bytes.
    lines += text.decode().splitlines()[3:10] * 40
    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_prefix=os.path.join(folder, "tokenizer"), model_type="bpe",
            vocab_size=VOCAB_SIZE, byte_fallback=True, character_coverage=0.9995, num_threads=1,
            normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
            allow_whitespace_only_pieces=True, minloglevel=1)
        pieces, scores, encode = make_tokenizer.from_sentencepiece(os.path.join(folder, "tokenizer.model"))
    make_tokenizer.write(os.path.join(DATA, "tokenizer.bin"), pieces, scores)

    ids = encode(text.decode())
    for line in text.decode().split("\n"):
        ids += [2] + encode(line)
    make_bin.write_bin(os.path.join(DATA, "tokenizer.ids.bin"), ids)
    long_ids = encode(longer(text).decode())
    with open(os.path.join(DATA, "tokenizer.h"), "w") as f:
        f.write(f"// Made by dev/make_tokenizer_fixture.py: the number of tokens of the long text, and their hash.\n"
                f"enum {{ VOCAB_SIZE = {VOCAB_SIZE}, LONG = {LONG}, LONG_TOKENS = {len(long_ids)} }};\n"
                f"static const uint64_t LONG_HASH = {hash_of(long_ids)}u;\n")


if __name__ == "__main__":
    main()
