"""Round the weights of a model to bfloat16: half the bytes, for a model that others download.

    python dev/to_bfloat16.py out/step-00012000 models/mine

reads model.safetensors in the first folder, and writes model.safetensors and config.json into the second. Float32
tensors are rounded to the nearest bfloat16, ties to even, but for rope.freqs. Names, order and metadata stay. Every
program here reads the result, and so do other readers of safetensors files. Only Python's standard library is needed.
"""

import argparse
import array
import json
import os
import struct
import sys

from outputs import check_output


def rounded(data):
    out = array.array("H")
    for bits in array.array("I", data):
        is_nan = bits & 0x7FFFFFFF > 0x7F800000
        out.append(bits >> 16 | 0x40 if is_nan else (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
    return out.tobytes()


def read(path):
    """The header of a safetensors file and its data."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
            return header, file.read()
    except OSError as error:
        sys.exit(f"error: {path}: {error.strerror}")
    except (ValueError, struct.error) as error:
        sys.exit(f"error: {path}: not a safetensors file: {error}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder with a model.safetensors of float32 tensors")
    parser.add_argument("output", help="folder for model.safetensors and config.json; made if there is none")
    args = parser.parse_args()
    source = os.path.join(args.model, "model.safetensors")
    header, content = read(source)
    out, data = {}, bytearray()
    for name, tensor in header.items():
        if name == "__metadata__":
            out[name] = tensor
            continue
        begin, end = tensor["data_offsets"]
        part, dtype, at = content[begin:end], tensor["dtype"], len(data)
        if dtype == "F32" and name != "rope.freqs":  # those are no weights
            part, dtype = rounded(part), "BF16"
        data += part
        out[name] = {"dtype": dtype, "shape": tensor["shape"], "data_offsets": [at, len(data)]}
    text = json.dumps(out, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    config = header.get("__metadata__", {}).get("config")
    if config is None:
        sys.exit(f"error: {source}: no configuration under the metadata key 'config'")
    files = {os.path.join(args.output, "model.safetensors"): struct.pack("<Q", len(text)) + text + bytes(data),
             os.path.join(args.output, "config.json"): config.encode() + b"\n"}
    os.makedirs(args.output, exist_ok=True)
    for path in files:
        check_output(path, [source], "a file of this script", lambda _: False)
    for path, content in files.items():
        with open(path, "wb") as file:
            file.write(content)


if __name__ == "__main__":
    main()
