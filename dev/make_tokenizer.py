"""Convert a Llama-like tokenizer to llama2.c's tokenizer.bin, which ./sample --tokenizer and dev/make_bin.py read.

    pip install -r dev/requirements-tokenizer.txt
    python dev/make_tokenizer.py tokenizer.model tokenizer.bin    a SentencePiece model
    python dev/make_tokenizer.py tokenizer.json tokenizer.bin     a Hugging Face tokenizer

Requirements. The tokenizer must be a byte-pair encoding as in Llama:
- a space becomes a mark (U+2581), and the text gets one leading space;
- tokens 0 to 2 are <unk>, <s> and </s>, and tokens 3 to 258 are the bytes <0x00> to <0xFF>;
- characters without a token are encoded as these bytes, and the text is not normalized otherwise.
Other tokenizers are refused with the reason.

Check. The C encoder (built by make) and the original encode the text of --text FILE, or two texts of the repository.
The output is written only if all token ids are equal.

Format. int32, the length of the longest token; then for each token float32 score, int32 length, and its bytes. All
little-endian, with spaces in place of the mark. Of tokens with equal bytes the first one is used. Control tokens up to
258 are written as in llama2.c, later ones as empty: they occur in no text and print nothing.

Safety. The output may replace an older tokenizer.bin, but no other file and no input.
"""

import argparse
import json
import os
import struct
import subprocess
import sys

import numpy as np
from outputs import check_output

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TEXTS = [os.path.join(ROOT, "tests/data/tokenizer.txt"), os.path.join(ROOT, "dev/data/shakespeare.txt")]
MARK = "\u2581"  # SentencePiece's space
BYTES = [f"<0x{b:02X}>" for b in range(256)]
FIRST = 3 + 256  # first token that is neither special nor a byte
SPECIAL = ["<unk>", "\n<s>\n", "\n</s>\n"]  # as llama2.c writes them


class Refused(Exception):
    """The source is not a supported tokenizer; the message says why."""


def need(condition, reason):
    if not condition:
        raise Refused(reason)


def from_sentencepiece(path):
    """Reads a SentencePiece model: (tokens, their scores, the encoder of SentencePiece)."""
    import sentencepiece
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    try:
        with open(path, "rb") as f:
            model.ParseFromString(f.read())
    except DecodeError:
        raise Refused("not a SentencePiece model") from None
    need(len(model.pieces) > 0, "not a SentencePiece model")
    trainer, normalizer, kind = model.trainer_spec, model.normalizer_spec, proto.ModelProto.SentencePiece.Type
    name = proto.TrainerSpec.ModelType.Name(trainer.model_type)
    need(name == "BPE", f"a {name} model; only BPE is supported")
    need(trainer.byte_fallback, "no byte fallback; train with --byte_fallback")
    need(not normalizer.precompiled_charsmap and not normalizer.remove_extra_whitespaces,
         f"it normalizes texts ({normalizer.name}, remove_extra_whitespaces {normalizer.remove_extra_whitespaces}); "
         "train with --normalization_rule_name=identity --remove_extra_whitespaces=false")
    need(normalizer.add_dummy_prefix and normalizer.escape_whitespaces and not trainer.treat_whitespace_as_suffix,
         "spaces are not treated as in Llama: add_dummy_prefix and escape_whitespaces must be on, "
         "treat_whitespace_as_suffix off")
    pieces, scores = [], []
    for i, piece in enumerate(model.pieces):
        expected = (kind.UNKNOWN, kind.CONTROL, kind.CONTROL)[i] if i < 3 else kind.BYTE if i < FIRST else None
        what = f"token {i} is {piece.piece!r} of type {kind.Name(piece.type)}"
        need(expected is None or piece.type == expected, f"{what}, where {kind.Name(expected or 1)} is expected")
        need(i < FIRST or piece.type in (kind.NORMAL, kind.CONTROL), f"{what}; only NORMAL and CONTROL are supported")
        pieces.append("" if i >= FIRST and piece.type == kind.CONTROL else piece.piece)
        scores.append(piece.score)
    need(pieces[3:FIRST] == BYTES, "tokens 3 to 258 are not <0x00> to <0xFF> in order")
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    return pieces, scores, processor.encode


def check_spaces(normalizer, pre, vocab):
    """Raises Refused unless spaces are treated as in Llama. Returns whether the first space of a text is dropped."""
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
    prepends = {"type": "Prepend", "prepend": MARK}
    if pre is None:
        need(steps == [prepends, replaces],
             "its normalizer is not Llama's (Prepend and Replace of the mark) but " +
             (", ".join(s["type"] for s in steps) or "none"))
        return False
    need(pre["type"] == "Metaspace", f"pre-tokenizer {pre['type']}; only Metaspace or none is supported" +
         (": a byte-level BPE as in GPT-2" if "ByteLevel" in json.dumps(pre) else ""))
    need(steps in ([], [replaces]), "its normalizer modifies texts: " + ", ".join(s["type"] for s in steps))
    need(pre.get("replacement") == MARK, f"Metaspace with {pre.get('replacement')!r} for the mark")
    scheme = pre.get("prepend_scheme", "always" if pre.get("add_prefix_space", True) else "never")
    need(scheme != "never", "Metaspace with prepend_scheme never: no space before the text")
    # With split (the default) Metaspace cuts before every mark. That changes nothing if no token has a mark inside.
    inside = next((p for p in vocab if MARK in p[1:]), None) if pre.get("split", True) else None
    need(inside is None, f"Metaspace cuts at spaces, but token {inside!r} contains one")
    return True


def scores_of_merges(model, pieces):
    """Scores, one per token, that make an encoder by scores apply the merges in the order of their ranks."""
    vocab = {p for p in pieces[FIRST:] if p}
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    order = {}
    for left, right in merges:
        need({left, right, left + right} <= vocab, f"merge {left!r} {right!r}: a part or the result is not a token")
        order.setdefault(left + right, len(order))
    # An encoder by scores merges any two tokens whose concatenation is a token, so each such pair must be a merge.
    known = set(merges)
    for piece in vocab:
        for i in range(1, len(piece)):
            pair = piece[:i], piece[i:]
            need(pair in known or pair[0] not in vocab or pair[1] not in vocab,
                 f"{pair[0]!r} and {pair[1]!r} are not merged although {piece!r} is a token: not converted "
                 "from a SentencePiece model, so no scores reproduce its tokens")
    return [0.0] * FIRST + [-float(order.get(p, len(order))) for p in pieces[FIRST:]]


def from_hugging_face(path):
    """Reads a tokenizer.json: (tokens, scores, the encoder of Hugging Face's tokenizers)."""
    from tokenizers import Tokenizer

    try:
        with open(path, encoding="utf-8") as f:
            source = json.load(f)
        model = source["model"]
        name = model.get("type", "BPE")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Refused("neither a SentencePiece model (*.model) nor a tokenizer.json") from None
    need(name == "BPE", f"a {name} model; only BPE is supported")
    need("ByteLevel" not in json.dumps([source.get(k) for k in ("normalizer", "pre_tokenizer", "decoder")]),
         "a byte-level BPE as in GPT-2; only those with a byte fallback, as in Llama, are supported")
    need(model.get("byte_fallback"), "no byte fallback")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        need(not model.get(key), f"{key} is set: {model.get(key)!r}")
    special = {}
    for token in source.get("added_tokens", []):
        need(token.get("special"),
             f"added token {token['content']!r} is not special; the original would match it before all merges")
        special[token["id"]] = token["content"]
    names = {i: p for p, i in model["vocab"].items()} | special
    count = len(names)
    hole = next((i for i in range(count) if i not in names), None)
    need(hole is None, f"there are {count} tokens, but none has the id {hole}")
    pieces = [names[i] for i in range(count)]
    need(pieces[3:FIRST] == BYTES, "tokens 3 to 258 are not <0x00> to <0xFF> in order")
    need(model.get("unk_token") in (None, pieces[0]), f"token 0 is not the unknown token, {model.get('unk_token')!r}")
    pieces[FIRST:] = ["" if i in special else names[i] for i in range(FIRST, count)]
    drops = check_spaces(source.get("normalizer"), source.get("pre_tokenizer"), pieces[FIRST:])
    scores = scores_of_merges(model, pieces)
    if drops:
        print("note: the original drops the first space of a text; we keep it, as SentencePiece does")

    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_truncation(), tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "<s>" in a text is ordinary text

    def encode(text):
        return tokenizer.encode(" " * (drops and text[:1] == " ") + text, add_special_tokens=False).ids
    return pieces, scores, encode


def is_tokenizer(path):
    """Whether a file starts like a tokenizer.bin: a small maximal length, and <0x00> among the first tokens."""
    with open(path, "rb") as f:
        start = f.read(128)
    return start[2:4] == b"\0\0" and b"<0x00>" in start


def write(path, pieces, scores):
    data = [p.replace(MARK, " ").encode() for p in SPECIAL + pieces[3:]]
    with open(path, "wb") as f:
        f.write(struct.pack("<i", max(map(len, data))))
        for piece, score in zip(data, scores):
            f.write(struct.pack("<fi", score, len(piece)) + piece)


def compare(path, count, text, encode):
    """Raises Refused unless the C encoder (built if necessary) and the original agree. Returns the number of tokens."""
    expected = np.array(encode(text.decode()), dtype="<i4")
    subprocess.run(["make", "-s", "-C", ROOT, "build/test_tokenizer"], check=True)
    command = [os.path.join(ROOT, "build/test_tokenizer"), path, str(count)]
    ids = np.frombuffer(subprocess.run(command, input=text, check=True, stdout=subprocess.PIPE).stdout, dtype="<i4")
    both = min(len(ids), len(expected))
    at = next((i for i in range(both) if ids[i] != expected[i]), both)
    need(len(ids) == len(expected) == at, f"token {at} of the text differs: the original continues with "
         f"{expected[at:at + 8].tolist()}, ours with {ids[at:at + 8].tolist()}")
    return len(ids)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="tokenizer.model or tokenizer.json")
    parser.add_argument("out", help="tokenizer.bin")
    parser.add_argument("--text", metavar="FILE", help="text for the check of token ids")
    args = parser.parse_args()
    temporary = args.out + ".tmp"
    check_output(args.out, [args.source, *([args.text] if args.text else TEXTS)], "a tokenizer.bin", is_tokenizer,
                 temporary)
    try:
        with open(args.source, "rb") as f:
            is_json = f.read(64).lstrip()[:1] == b"{"
        pieces, scores, encode = (from_hugging_face if is_json else from_sentencepiece)(args.source)
        write(temporary, pieces, scores)
        for path in [args.text] if args.text else TEXTS:
            with open(path, "rb") as f:
                text = f.read()
            tokens = compare(temporary, len(pieces), text, encode)
            print(f"{path}: {len(text)} bytes, {tokens} tokens, identical to the original's")
        os.replace(temporary, args.out)
    except (Refused, UnicodeDecodeError, subprocess.CalledProcessError) as reason:
        sys.exit(f"error: {args.source}: {reason}")
    except OSError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}")
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    print(f"{args.out}: {len(pieces)} tokens; train with --vocab-size {len(pieces)}")


if __name__ == "__main__":
    main()
