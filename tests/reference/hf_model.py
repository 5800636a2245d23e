"""A Hugging Face llama or qwen3 directory as NumPy arrays: the validated shape, the rotary frequencies, the weights.

Owns the spellings of config.json and the names of the tensors.  Refuses what the reference does not compute rather
than approximate it.  Shapes are row-major; a weight is [out, in], applied as x @ w.T.
"""
import dataclasses
import json
import math
import os

import numpy as np

import safetensors_io


@dataclasses.dataclass(frozen=True)
class Config:
    family: str  # "llama" or "qwen3"
    n_layer: int
    d_model: int
    n_head: int
    n_kv_head: int
    d_head: int  # from the config: n_head * d_head need not equal d_model
    d_ff: int
    n_vocab: int
    norm_eps: float
    is_tied: bool
    eos_ids: tuple
    rope_theta: float
    rope_scaling: dict  # {} for plain rotation, else the llama3 parameters

    @property
    def group(self):
        """Query heads per K/V head, g."""
        return self.n_head // self.n_kv_head


def parse_rope(raw):
    """Return (theta, scaling) from any spelling: rope_theta with rope_scaling, or rope_parameters."""
    scaling = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    inner_theta = scaling.pop("rope_theta", None)
    outer_theta = raw.get("rope_theta")
    if None not in (inner_theta, outer_theta) and inner_theta != outer_theta:
        raise ValueError(f"rope_theta is {outer_theta} and, inside rope_parameters, {inner_theta}")
    theta = next((float(t) for t in (inner_theta, outer_theta) if t is not None), 10000.0)
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    if kind == "default":
        return theta, {}
    if kind != "llama3":
        raise ValueError(f"rotary type {kind!r} is not implemented")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return theta, {key: float(scaling[key]) for key in keys}


def parse_eos(raw):
    """The end-of-turn ids: eos_token_id may be a number, a list or missing."""
    eos = raw.get("eos_token_id")
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)


def parse_config(raw):
    if raw["model_type"] not in ("llama", "qwen3"):
        raise ValueError(f"model_type {raw['model_type']!r} is not implemented")
    if raw.get("hidden_act", "silu") != "silu" or raw.get("attention_bias") or raw.get("mlp_bias"):
        raise ValueError("only silu without biases is implemented")
    if raw.get("use_sliding_window"):
        raise ValueError("sliding windows are not implemented")
    theta, scaling = parse_rope(raw)
    return Config(
        family=raw["model_type"],
        n_layer=raw["num_hidden_layers"],
        d_model=raw["hidden_size"],
        n_head=raw["num_attention_heads"],
        n_kv_head=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        d_head=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        d_ff=raw["intermediate_size"],
        n_vocab=raw["vocab_size"],
        norm_eps=raw["rms_norm_eps"],
        is_tied=raw.get("tie_word_embeddings", False),
        eos_ids=parse_eos(raw),
        rope_theta=theta,
        rope_scaling=scaling,
    )


def rope_frequencies(config):
    """Angular frequency of each of the d_head/2 channel pairs, radians per position, after llama3 scaling: [d_head/2].

    With wavelength w = 2 pi / f:  w < orig/high keeps f,  w > orig/low divides it by factor, and between the two
    s = (orig/w - low) / (high - low) blends:  (1 - s) f/factor + s f.
    """
    freq = config.rope_theta ** (-np.arange(0, config.d_head, 2, dtype=np.float64) / config.d_head)
    if not config.rope_scaling:
        return freq
    factor = config.rope_scaling["factor"]
    low, high = config.rope_scaling["low_freq_factor"], config.rope_scaling["high_freq_factor"]
    original = config.rope_scaling["original_max_position_embeddings"]
    scaled = np.empty_like(freq)
    for i, f in enumerate(freq):
        wavelength = 2 * math.pi / f
        if wavelength < original / high:
            scaled[i] = f
        elif wavelength > original / low:
            scaled[i] = f / factor
        else:
            s = (original / wavelength - low) / (high - low)
            scaled[i] = (1 - s) * f / factor + s * f
    return scaled


# Names below model.layers.<l>., with the shape each has, in terms of the config.
LAYER_TENSORS = {
    "input_layernorm.weight": lambda c: (c.d_model,),
    "self_attn.q_proj.weight": lambda c: (c.n_head * c.d_head, c.d_model),
    "self_attn.k_proj.weight": lambda c: (c.n_kv_head * c.d_head, c.d_model),
    "self_attn.v_proj.weight": lambda c: (c.n_kv_head * c.d_head, c.d_model),
    "self_attn.o_proj.weight": lambda c: (c.d_model, c.n_head * c.d_head),
    "post_attention_layernorm.weight": lambda c: (c.d_model,),
    "mlp.gate_proj.weight": lambda c: (c.d_ff, c.d_model),
    "mlp.up_proj.weight": lambda c: (c.d_ff, c.d_model),
    "mlp.down_proj.weight": lambda c: (c.d_model, c.d_ff),
}
QWEN3_LAYER_TENSORS = {
    "self_attn.q_norm.weight": lambda c: (c.d_head,),
    "self_attn.k_norm.weight": lambda c: (c.d_head,),
}


def tensor_shapes(config):
    """Return {tensor name: shape} in file order; a tied model has no lm_head.weight."""
    shapes = {"model.embed_tokens.weight": (config.n_vocab, config.d_model)}
    per_layer = dict(LAYER_TENSORS, **(QWEN3_LAYER_TENSORS if config.family == "qwen3" else {}))
    for l in range(config.n_layer):
        shapes.update({f"model.layers.{l}.{name}": shape(config) for name, shape in per_layer.items()})
    shapes["model.norm.weight"] = (config.d_model,)
    if not config.is_tied:
        shapes["lm_head.weight"] = (config.n_vocab, config.d_model)
    return shapes


class Model:
    """Weights and rotary frequencies in one floating-point type.

    dtype is float64 for every reference figure.  float32 exists to measure how much of an error is mere rounding.
    """

    def __init__(self, config, tensors, dtype=np.float64):
        for name, shape in tensor_shapes(config).items():
            if name not in tensors:
                raise KeyError(f"tensor {name} is missing")
            if tensors[name].shape != shape:
                raise ValueError(f"tensor {name} is {tensors[name].shape}, expected {shape}")
        take = lambda name: tensors[name].astype(dtype)
        self.config = config
        self.dtype = np.dtype(dtype)
        self.frequencies = rope_frequencies(config)  # [d_head/2], always double
        self.embedding = take("model.embed_tokens.weight")  # [n_vocab, d_model]
        self.final_norm = take("model.norm.weight")  # [d_model]
        self.head = self.embedding if config.is_tied else take("lm_head.weight")  # [n_vocab, d_model]
        self.layers = []  # one {short name: array} a layer, e.g. layers[3]["q_proj"]
        for l in range(config.n_layer):
            prefix = f"model.layers.{l}."
            self.layers.append({n.split(".")[-2]: take(n) for n in tensors if n.startswith(prefix)})


def load_model(path, dtype=np.float64):
    with open(os.path.join(path, "config.json")) as f:
        config = parse_config(json.load(f))
    generation = os.path.join(path, "generation_config.json")
    if os.path.exists(generation):  # chat models list the end of a turn here, next to the end of a text
        with open(generation) as f:
            config = dataclasses.replace(config, eos_ids=tuple(sorted({*config.eos_ids, *parse_eos(json.load(f))})))
    return Model(config, safetensors_io.read_directory(path), dtype)
