#!/usr/bin/env python3
"""Write tiny random models as Hugging Face directories: make_models.py --out DIR [--only NAME ...].

The files depend on nothing but this source: the noise is integer arithmetic, not a library's generator, so the golden
figures made on one machine hold on another.  The shapes are awkward on purpose: group sizes 1, 3 and 5, heads wider
than d_model, vocabularies off any tile, every spelling of the rotary parameters, one file and shards, tied and not.
Weights are scaled so that attention is uneven and every layer adds about half of what is there, which makes a row's
K/V depend visibly on the rows before it.
"""
import argparse
import json
import os

import numpy as np

import hf_model
import safetensors_io
from portable_noise import noise

COMMON = {"hidden_act": "silu", "attention_bias": False, "bos_token_id": 1, "max_position_embeddings": 4096}
LLAMA = {**COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5,
         "mlp_bias": False}
QWEN3 = {**COMMON, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rms_norm_eps": 1e-6,
         "use_sliding_window": False, "sliding_window": None}


def shape(n_layer, d_model, n_head, n_kv_head, d_head, d_ff, n_vocab, tied, eos):
    return {"num_hidden_layers": n_layer, "hidden_size": d_model, "num_attention_heads": n_head,
            "num_key_value_heads": n_kv_head, "head_dim": d_head, "intermediate_size": d_ff, "vocab_size": n_vocab,
            "tie_word_embeddings": tied, "eos_token_id": eos}


LLAMA3_SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                  "original_max_position_embeddings": 128}

# name: (config.json, storage type, number of files)
MODELS = {
    "llama_g1_tied": (
        {**LLAMA, **shape(4, 128, 2, 2, 64, 160, 211, True, 2), "rope_theta": 10000.0, "torch_dtype": "float32"},
        "F32", 1),
    "llama_g3_scaled_sharded": (
        {**LLAMA, **shape(5, 96, 6, 2, 64, 136, 307, False, [2, 3]), "rope_theta": 500000.0,
         "rope_scaling": LLAMA3_SCALING, "torch_dtype": "bfloat16"},
        "BF16", 3),
    "llama_g5_wide_tied": (
        {**LLAMA, **shape(4, 80, 5, 1, 128, 112, 263, True, [2, 3, 4]),
         "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}, "dtype": "float16"},
        "F16", 1),
    "qwen3_g3_deep_tied": (
        {**QWEN3, **shape(28, 48, 3, 1, 64, 88, 229, True, [2, 3]), "rope_theta": 1000000.0, "rope_scaling": None,
         "torch_dtype": "float32"},
        "F32", 1),
    "qwen3_g5_sharded": (
        {**QWEN3, **shape(5, 64, 10, 2, 128, 104, 401, False, [2, 3]),
         "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "dtype": "bfloat16"},
        "BF16", 2),
    "qwen3_g1_wide": (
        {**QWEN3, **shape(6, 72, 2, 2, 128, 120, 499, False, 2), "rope_theta": 50000.0, "torch_dtype": "float32"},
        "F32", 1),
}


def make_tensor(name, shape, seed):
    """One weight, float64.  The gains are the rms values at the output of a projection whose input has rms 1."""
    z = noise(f"{seed} {name}", shape)
    kind = name.split(".")[-2]
    if kind == "norm":
        # Random signs keep a tied head from answering with the last prompt token for ever.
        return np.where(z < 0, -1.0, 1.0) * (1 + 0.2 * noise(f"{seed} {name} size", shape))
    if kind in ("q_norm", "k_norm"):
        return 1.4 * (1 + 0.2 * z)  # the spread of q.k/sqrt(D) is about 1.4^2
    if kind.endswith("layernorm"):
        return 1 + 0.2 * z
    gain = {"embed_tokens": 1.0, "lm_head": 1.0, "q_proj": 1.4, "k_proj": 1.4, "v_proj": 1.0, "o_proj": 1.5,
            "gate_proj": 1.2, "up_proj": 1.0, "down_proj": 1.0}[kind]
    return z * gain / (1.0 if kind == "embed_tokens" else np.sqrt(shape[1]))


def make_model(out, name, seed=1):
    """Write one model of MODELS below `out`.  Returns its directory."""
    raw, dtype, n_shard = MODELS[name]
    config = hf_model.parse_config(raw)
    path = os.path.join(out, name)
    os.makedirs(path, exist_ok=True)
    with open(os.path.join(path, "config.json"), "w") as f:
        json.dump(raw, f, indent=1)
        f.write("\n")
    shapes = hf_model.tensor_shapes(config)
    tensors = {n: make_tensor(n, s, seed) for n, s in shapes.items()}
    safetensors_io.write_directory(path, {n: t.astype(np.float32) for n, t in tensors.items()}, dtype, n_shard)
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--only", nargs="*", choices=sorted(MODELS), default=sorted(MODELS))
    args = parser.parse_args()
    for name in args.only:
        path = make_model(args.out, name)
        n_bytes = sum(os.path.getsize(os.path.join(path, f)) for f in os.listdir(path))
        print(f"{path}  {n_bytes} bytes")


if __name__ == "__main__":
    main()
