"""The float64 reference with every number that is stored rounded to bfloat16: the yardstick of devices that do so.

Rounded are weights, and activations and rows of K and V when they are written, which is what such a back end does by
definition.  Sums, softmax, scores and logits are not.  Shares no line with the kernels: by how much they err otherwise
shows in comparison.
"""
import contextlib
from unittest import mock

import numpy as np

import ifkv_reference as reference
from safetensors_io import bf16_to_f32, f32_to_bf16

_wide_rms_norm, _wide_rotate = reference.rms_norm, reference.rotate


def narrow(x):
    """The nearest numbers of bfloat16, as float64."""
    return bf16_to_f32(f32_to_bf16(x)).astype(np.float64)


def narrow_model(model):
    """Round the weights of a model of hf_model.load_model, in place."""
    model.embedding, model.final_norm, model.head = map(narrow, (model.embedding, model.final_norm, model.head))
    model.layers = [{name: narrow(weight) for name, weight in layer.items()} for layer in model.layers]
    return model


def _heads(model, l, x, name, n_head):
    return narrow(x @ model.layers[l][name].T).reshape(len(x), n_head, model.config.d_head)


def _head_norm(model, l, x, name):
    """Not rounded: the rotation behind it is in the same kernel."""
    return _wide_rms_norm(x, model.layers[l][name], model.config.norm_eps) if name in model.layers[l] else x


def _rms_norm(x, weight, eps):
    return narrow(_wide_rms_norm(x, weight, eps))


def _rotate(x, positions, frequencies):
    return narrow(_wide_rotate(x, positions, frequencies))


def _project_q(model, l, x, positions):
    q = _head_norm(model, l, _heads(model, l, x, "q_proj", model.config.n_head), "q_norm")
    return _rotate(q, positions, model.frequencies)


def _project_kv(model, l, x):
    k, v = (_heads(model, l, x, name, model.config.n_kv_head) for name in ("k_proj", "v_proj"))
    return _head_norm(model, l, k, "k_norm"), v


def _finish_layer(model, l, h, attention):
    w = model.layers[l]
    h = narrow(h + narrow(attention).reshape(len(h), -1) @ w["o_proj"].T)
    x = _rms_norm(h, w["post_attention_layernorm"], model.config.norm_eps)
    gate, up = narrow(x @ w["gate_proj"].T), narrow(x @ w["up_proj"].T)
    return narrow(h + narrow(gate / (1 + np.exp(-gate)) * up) @ w["down_proj"].T)


def prefill(model, *args, **options):
    """reference.prefill of a narrow_model."""
    with contextlib.ExitStack() as stack:
        for name in ("rms_norm", "rotate", "project_q", "project_kv", "finish_layer"):
            stack.enter_context(mock.patch.object(reference, name, globals()["_" + name]))
        return reference.prefill(model, *args, **options)
