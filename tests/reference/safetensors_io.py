"""Read and write safetensors files and Hugging Face weight directories.

Owns the file layout: 8 bytes little-endian header length, JSON header, data; `model.safetensors` alone, or an index
with shards.  Knows nothing of transformers.  What is read comes back as float32, which holds every F32, F16 and BF16
value exactly.  Layout: https://huggingface.co/docs/safetensors.
"""
import json
import os
import struct

import numpy as np


def bf16_to_f32(bits):
    """Widen bfloat16 bit patterns (uint16) to float32; exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(x):
    """Round float32 to bfloat16 bit patterns (uint16), to nearest, ties to even; finite values only."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


_DECODE = {
    "F32": ("<f4", lambda a: a.astype(np.float32)),
    "F16": ("<f2", lambda a: a.astype(np.float32)),
    "BF16": ("<u2", bf16_to_f32),
}
_ENCODE = {
    "F32": lambda a: a.astype("<f4"),
    "F16": lambda a: a.astype("<f2"),
    "BF16": lambda a: f32_to_bf16(a).astype("<u2"),
}


def read_file(path):
    """Return {name: float32 array} of one safetensors file."""
    with open(path, "rb") as f:
        data = f.read()
    (n_header,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n_header])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        storage, widen = _DECODE[entry["dtype"]]
        raw = np.frombuffer(data, storage, (end - begin) // np.dtype(storage).itemsize, 8 + n_header + begin)
        tensors[name] = widen(raw).reshape(entry["shape"])
    return tensors


def read_directory(path):
    """Return {name: float32 array} of a weight directory.  An index wins over a single file, as in transformers."""
    index = os.path.join(path, "model.safetensors.index.json")
    if not os.path.exists(index):
        return read_file(os.path.join(path, "model.safetensors"))
    with open(index) as f:
        weight_map = json.load(f)["weight_map"]
    tensors = {}
    for shard in sorted(set(weight_map.values())):
        tensors.update({n: t for n, t in read_file(os.path.join(path, shard)).items() if weight_map[n] == shard})
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise KeyError(f"{path}: the index names {missing[0]}, which its shard lacks")
    return tensors


def write_file(path, tensors, dtype):
    """Write {name: array} as one file, every tensor stored as `dtype` (F32, F16 or BF16)."""
    header, blobs, at = {"__metadata__": {"format": "pt"}}, [], 0
    for name, tensor in tensors.items():
        blob = _ENCODE[dtype](np.asarray(tensor)).tobytes()
        header[name] = {"dtype": dtype, "shape": list(np.shape(tensor)), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data then starts on an 8-byte boundary
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + b"".join(blobs))
    return at


def write_directory(path, tensors, dtype, n_shard=1):
    """Write a weight directory: one file, or n_shard files with an index, tensors dealt in order of their sizes."""
    if n_shard == 1:
        write_file(os.path.join(path, "model.safetensors"), tensors, dtype)
        return
    total = sum(t.size for t in tensors.values())
    shards, seen = [{} for _ in range(n_shard)], 0
    for name, tensor in tensors.items():
        shards[min(n_shard - 1, seen * n_shard // total)][name] = tensor
        seen += tensor.size
    weight_map, n_bytes = {}, 0
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{n_shard:05d}.safetensors"
        n_bytes += write_file(os.path.join(path, name), shard, dtype)
        weight_map.update(dict.fromkeys(shard, name))
    with open(os.path.join(path, "model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {"total_size": n_bytes}, "weight_map": weight_map}, f, indent=1)
