#!/usr/bin/env python3
"""What PyTorch reaches on this GPU, to stand beside `ifkv bench attention` and `gemm`: sdpa_torch.py [--lengths 2048,8192] [--json].

A device-to-device copy (bytes read and written), a product of 8192^3 in bfloat16, and scaled_dot_product_attention by cuDNN
and by FlashAttention at the heads of Qwen3-14B (40/8) and Llama-3.1-8B (32/8), d = 128: causal, full, and causal chunks of 2048
tokens as a batch.  Selected rows have no equal there but for a dense mask, and are left out.

FLOP are 4 d for each query head and pair of row and key that sees it, as in ifkv's bench.  Inputs are normal random numbers in
as many sets as exceed the caches.  Inside the window: N calls between two events, after a warm-up; the median of 5 windows.
Errors, relative L2, are those of some rows against float64 on the same inputs.
"""
import argparse
import json
import statistics
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS = {"Qwen3-14B": (40, 8), "Llama-3.1-8B": (32, 8)}
D_HEAD, CHUNK = 128, 2048
WAYS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
WINDOW_MS, CACHE_BYTES = 60, 128e6


def time_ms(call, n_set):
    """Median milliseconds of call(i), i counting through the input sets."""
    def window(n):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for i in range(n):
            call(i % n_set)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / n

    window(2)
    n = max(1, min(1000, int(WINDOW_MS / window(2))))
    window(n)
    return statistics.median(window(n) for _ in range(5))


def normal(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def measure_copy():
    x, y = torch.empty(2, 1 << 31, dtype=torch.uint8, device="cuda")
    x.random_()
    ms = time_ms(lambda i: y.copy_(x), 1)
    return {"label": "copy", "time_ms": ms, "gb_per_s": 2 * x.numel() / ms / 1e6, "error": float(not torch.equal(x, y))}


def measure_product(n=8192):
    a, b = [normal(n, n) for _ in range(2)], [normal(n, n) for _ in range(2)]
    out = torch.empty(n, n, device="cuda", dtype=torch.bfloat16)
    ms = time_ms(lambda i: torch.matmul(a[i], b[i].t(), out=out), 2)
    torch.matmul(a[0], b[0].t(), out=out)
    want = a[0][:8].double() @ b[0].double().t()
    return {"label": f"product {n}^3", "time_ms": ms, "tflops": 2 * n**3 / ms / 1e9, "error": distance(out[:8], want)}


def distance(got, want):
    return float((got.double() - want).norm() / want.norm())


def reference(q, k, v, row, is_causal):
    """float64 attention of one row of all heads; q [head, token, d], k and v [kv head, token, d]."""
    group, end = q.shape[0] // k.shape[0], row + 1 if is_causal else k.shape[1]
    k, v = (x[:, :end].double().repeat_interleave(group, 0) for x in (k, v))
    weight = torch.softmax((k @ q[:, row].double().unsqueeze(-1)).squeeze(-1) * D_HEAD**-0.5, -1)
    return (weight.unsqueeze(1) @ v).squeeze(1)


def measure_attention(model, spans, n_token, way):
    n_head, n_kv_head = HEADS[model]
    is_causal, length = spans != "full", CHUNK if spans.startswith("chunk") else n_token
    n_batch = n_token // length
    n_set = 1 + int(CACHE_BYTES / (2 * D_HEAD * n_token * (n_head + 2 * n_kv_head)))
    sets = [[normal(n_batch, h, length, D_HEAD) for h in (n_head, n_kv_head, n_kv_head)] for _ in range(n_set)]
    with sdpa_kernel(WAYS[way]):
        attend = lambda i: F.scaled_dot_product_attention(*sets[i], is_causal=is_causal, enable_gqa=True)
        ms = time_ms(attend, n_set)
        out = attend(0)
    q, k, v = (x[-1] for x in sets[0])
    rows = sorted({0, length // 3, length - 1})
    error = max(distance(out[-1][:, r], reference(q, k, v, r, is_causal)) for r in rows)
    pairs = n_batch * (length * (length + 1) / 2 if is_causal else length * length)
    return {"label": spans, "model": model, "tokens": n_token, "way": way, "time_ms": ms,
            "tflops": 4 * pairs * n_head * D_HEAD / ms / 1e9, "error": error}


def measurements(lengths):
    yield measure_copy
    yield measure_product
    for model in HEADS:
        for n in lengths:
            for spans in ("causal", "full", f"chunk {CHUNK}"):
                if spans.startswith("chunk") and (n <= CHUNK or n % CHUNK):
                    continue
                for way in WAYS:
                    yield lambda m=model, s=spans, n=n, w=way: measure_attention(m, s, n, w)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="2048,4096,8192,16384,32768")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("sdpa_torch: error: torch sees no GPU")
    torch.manual_seed(1)
    about = {"bench": "torch", "torch": torch.__version__, "cudnn": torch.backends.cudnn.version(),
             "device": torch.cuda.get_device_name()}
    print(json.dumps(about) if args.json else about, flush=True)
    for measure in measurements([int(n) for n in args.lengths.split(",")]):
        try:
            row = measure()
        except RuntimeError as e:  # a way that this build or shape does not have
            print(f"sdpa_torch: left out: {str(e).splitlines()[0]}", file=sys.stderr)
            continue
        print(json.dumps({"bench": "torch", **row}) if args.json else row, flush=True)


if __name__ == "__main__":
    main()
