"""The whole prefill algorithm in NumPy float64: what every faster implementation is tested against.

Written from the mathematics of the method (encode chunks apart, score by the question's attention, select, recompute,
prompt, greedy decode); shares no code with src/.  Knows one process and one cache: ranks, exchanges, placement, memory
plans and speed do not exist here.  Always holds: row i of the cache is the token of index i, and a row sees exactly
the rows of index <= its own.  The rotary position of a cached row is its index; only scoring may place rows
otherwise.

Shapes: R rows, N cached rows, Hq query heads, Hkv K/V heads, g = Hq/Hkv, D = d_head, T context rows with the prefix.
"""
import dataclasses
from decimal import Decimal
from fractions import Fraction

import numpy as np

from hf_model import load_model  # noqa: F401  (callers need one import)


# ---- requests and places --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Request:
    prefix: list  # token ids in front of every chunk while it is encoded; may be empty
    chunks: list  # lists of token ids, none empty
    prompt: list  # at least one token id
    question: list  # the scoring rows

    @staticmethod
    def from_json(obj, chunk=2048):
        """Build from one JSON request; `context` is cut every `chunk` tokens, the question defaults to the prompt."""
        chunks = obj.get("chunks")
        if chunks is None:
            context = obj["context"]
            chunks = [context[i : i + chunk] for i in range(0, len(context), chunk)]
        if not chunks or not all(chunks) or not obj["prompt"]:
            raise ValueError("a request needs chunks, none of them empty, and a prompt")
        question = obj.get("question")
        return Request(obj.get("prefix", []), chunks, obj["prompt"], obj["prompt"] if question is None else question)

    @property
    def context(self):
        """The T token ids in index order: prefix, chunk 0, chunk 1, ..."""
        return list(self.prefix) + [t for chunk in self.chunks for t in chunk]

    @property
    def offsets(self):
        """o_0 .. o_n: chunk i holds the indices [o_i, o_i+1).  Chunk 0 keeps the prefix, so o_0 = 0; o_n = T."""
        offsets = [0, len(self.prefix) + len(self.chunks[0])]
        for chunk in self.chunks[1:]:
            offsets.append(offsets[-1] + len(chunk))
        return offsets


# ---- the layer ------------------------------------------------------------------------------------------------------


def rms_norm(x, weight, eps):
    """x / rms(x) * weight over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps)) * weight


def rotate(x, positions, frequencies):
    """Rotate the channel pairs (i, i + D/2) of x [R, H, D] by positions[r] * frequencies[i]; angles in double."""
    angle = np.multiply.outer(np.asarray(positions, np.float64), frequencies)[:, None, :]  # [R, 1, D/2]
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def similarities(q, k):
    """q.k/sqrt(D), [Hq, R, N], of q [R, Hq, D] and k [N, Hkv, D]; query head h reads K/V head h // g."""
    n_head, d_head = q.shape[1:]
    k = np.repeat(k, n_head // k.shape[1], axis=1)  # [N, Hq, D]
    return np.matmul(q.transpose(1, 0, 2), k.transpose(1, 2, 0)) / q.dtype.type(np.sqrt(d_head))


def softmax_of_visible(s, n_visible):
    """Softmax of s [Hq, R, N], whose row r sees the first n_visible[r] keys, at least one; s is overwritten."""
    s[:, np.arange(s.shape[2]) >= np.asarray(n_visible)[:, None]] = -np.inf
    e = np.exp(s - s.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def probabilities(q, k, n_visible):
    """Softmax of q.k/sqrt(D), [Hq, R, N], where row r of q [R, Hq, D] sees the first n_visible[r] keys."""
    return softmax_of_visible(similarities(q, k), n_visible)


def attend(q, k, v, n_visible, block=256):
    """Attention output [R, Hq, D] of rows that see key prefixes; row blocks only bound the memory."""
    n_head = q.shape[1]
    v = np.repeat(v, n_head // v.shape[1], axis=1).transpose(1, 0, 2)  # [Hq, N, D]
    out = np.empty_like(q)
    for r in range(0, len(q), block):
        rows = slice(r, r + block)
        n_key = int(np.max(n_visible[rows]))  # no row of the block sees beyond
        p = probabilities(q[rows], k[:n_key], n_visible[rows])
        out[rows] = np.matmul(p, v[:, :n_key]).transpose(1, 0, 2)
    return out


def project_q(model, l, x, positions):
    """Queries [R, Hq, D] of normed rows x [R, d_model]: projection, per-head norm (qwen3), rotation."""
    c, w = model.config, model.layers[l]
    q = (x @ w["q_proj"].T).reshape(len(x), c.n_head, c.d_head)
    if "q_norm" in w:
        q = rms_norm(q, w["q_norm"], c.norm_eps)
    return rotate(q, positions, model.frequencies)


def project_kv(model, l, x):
    """K before rotation but after the per-head norm, and V, each [R, Hkv, D]: what a chunk store would keep."""
    c, w = model.config, model.layers[l]
    k = (x @ w["k_proj"].T).reshape(len(x), c.n_kv_head, c.d_head)
    v = (x @ w["v_proj"].T).reshape(len(x), c.n_kv_head, c.d_head)
    if "k_norm" in w:
        k = rms_norm(k, w["k_norm"], c.norm_eps)
    return k, v


def finish_layer(model, l, h, attention):
    """Output projection, residual, MLP, residual: the next hidden rows [R, d_model]."""
    w = model.layers[l]
    h = h + attention.reshape(len(h), -1) @ w["o_proj"].T
    x = rms_norm(h, w["post_attention_layernorm"], model.config.norm_eps)
    gate = x @ w["gate_proj"].T
    silu = gate * (gate.dtype.type(0.5) * (1 + np.tanh(gate / 2)))  # g * sigmoid(g), without overflow
    return h + (silu * (x @ w["up_proj"].T)) @ w["down_proj"].T


def logits(model, h):
    """Logits [R, n_vocab] of hidden rows [R, d_model] that left the last layer."""
    return rms_norm(h, model.final_norm, model.config.norm_eps) @ model.head.T


# ---- the cache and the one pass -------------------------------------------------------------------------------------


class Cache:
    """K (rotated at the row's position) and V of n_row rows, sorted by index; k[l], v[l] are [n_row, Hkv, D]."""

    def __init__(self, model, n_row):
        c = model.config
        self.k = [np.full((n_row, c.n_kv_head, c.d_head), np.nan, model.dtype) for _ in range(c.n_layer)]
        self.v = [np.full_like(k, np.nan) for k in self.k]  # NaN: a row read before it was written shows

    def copy(self, n_row=None):
        """A copy with room for n_row rows (default: as many)."""
        new = object.__new__(Cache)
        for name in "kv":
            old = getattr(self, name)
            grown = [np.full((n_row or len(x),) + x.shape[1:], np.nan, x.dtype) for x in old]
            for a, b in zip(grown, old):
                a[: len(b)] = b[: len(a)]
            setattr(new, name, grown)
        return new


def run_rows(model, cache, ids, index, shift=0, write_layer0=True, want_hidden=True, after_write=None):
    """Run rows through all layers against a cache: the pass behind encode, full prefill, recompute, prompt and decode.

    ids [R] tokens; index [R] places in the cache, ascending.  Per layer the K/V of all rows are written first, then
    every row attends to all cached rows of index <= its own, which must hold K/V already.  Rotation is at
    index + shift.  write_layer0=False leaves K/V of layer 0 alone, which depend on token and position only.  The last
    layer stops after its K/V unless want_hidden.  after_write(l) runs behind the write of layer l.  Returns the hidden rows [R, d_model], or None.
    """
    ids, index = np.asarray(ids, np.int64), np.asarray(index, np.int64)
    positions = index + shift
    h = model.embedding[ids]  # [R, d_model]
    for l in range(model.config.n_layer):
        x = rms_norm(h, model.layers[l]["input_layernorm"], model.config.norm_eps)
        if l > 0 or write_layer0:
            k, v = project_kv(model, l, x)
            cache.k[l][index] = rotate(k, positions, model.frequencies)
            cache.v[l][index] = v
        if after_write:
            after_write(l)
        if l == model.config.n_layer - 1 and not want_hidden:
            return None
        out = attend(project_q(model, l, x, positions), cache.k[l], cache.v[l], index + 1)
        h = finish_layer(model, l, h, out)
    return h


def full_prefill(model, ids):
    """Causal prefill of a token list.  Returns (cache of all rows, hidden rows [T, d_model])."""
    cache = Cache(model, len(ids))
    return cache, run_rows(model, cache, ids, range(len(ids)))


def encode_chunks(model, request):
    """Encode every chunk behind the prefix, seeing nothing else, and place it: the cache of `none`, T rows.

    Chunk i is a sequence of its own, local places 0 .. p+n_i-1, rotated at place + (o_i - p); chunk 0 at its place.
    Chunks i >= 1 drop their p prefix rows.
    """
    p, offsets = len(request.prefix), request.offsets
    cache = Cache(model, offsets[-1])
    for i, chunk in enumerate(request.chunks):
        ids = list(request.prefix) + list(chunk)
        shift, dropped = (0, 0) if i == 0 else (offsets[i] - p, p)
        local = Cache(model, len(ids))
        run_rows(model, local, ids, range(len(ids)), shift=shift, want_hidden=False)
        rows = slice(offsets[i], offsets[i + 1])
        for l in range(model.config.n_layer):
            cache.k[l][rows] = local.k[l][dropped:]
            cache.v[l][rows] = local.v[l][dropped:]
    return cache


# ---- score and select -----------------------------------------------------------------------------------------------


def score_layers(n_layer, choice):
    """The layers whose attention scores: `published`, `wide`, or a list."""
    if choice == "published":
        if n_layer >= 26:
            return [22, 23, 24, 25]
        first = 11 * n_layer // 20
        return list(range(first, min(first + 3, n_layer - 1) + 1))
    if choice == "wide":
        return list(range(n_layer // 3, 5 * n_layer // 6 + 1, 3))
    return sorted(choice)


def scoring_places(request, geometry="global", hp="shared"):
    """Rotary places while scoring: (place of each context row [T], place of scoring row 0 as each of them meets it [T]).

    Rows of chunk i count from 0 behind the prefix, which stays where it is.  hl-*: every chunk right behind the prefix;
    tl-tp: every chunk ends where the context ends.  *-tp: the question behind the context; hl-hp: behind the longest
    chunk (hp shared) or, towards the rows of each chunk, behind that chunk (hp per_chunk; the prefix goes with chunk 0).
    """
    p, o, n_context = len(request.prefix), request.offsets, request.offsets[-1]
    row, question = np.arange(n_context), np.full(n_context, n_context)
    longest = max(len(chunk) for chunk in request.chunks)
    for i, chunk in enumerate(request.chunks):
        n = len(chunk)
        rows, all_rows = slice(o[i + 1] - n, o[i + 1]), slice(o[i], o[i + 1])
        if geometry in ("hl-tp", "hl-hp"):
            row[rows] = p + np.arange(n)
        elif geometry == "tl-tp":
            row[rows] = n_context - n + np.arange(n)
        elif geometry != "global":
            raise ValueError(f"unknown geometry {geometry!r}")
        if geometry == "hl-hp":
            question[all_rows] = p + (n if hp == "per_chunk" else longest)
    return row, question


def question_attention(model, cache, question, layers, places=None, hidden=()):
    """Attention of the scoring rows, one [Hq, Nq, T + Nq] array per layer of `layers`.

    Scoring row q has index T + q; it sees every context row but those of the indices `hidden`, and the scoring rows
    q' <= q.  The cache is not changed.  places: of scoring_places; by default rows are rotated at their index.
    """
    n_context, n_question = len(cache.k[0]), len(question)
    row, first = places or (np.arange(n_context), np.full(n_context, n_context))
    own = n_context + np.arange(n_question)
    h = model.embedding[np.asarray(question, np.int64)]
    attention = {}
    for l in range(max(layers) + 1):
        x = rms_norm(h, model.layers[l]["input_layernorm"], model.config.norm_eps)
        k, v = project_kv(model, l, x)
        s = np.empty((model.config.n_head, n_question, n_context + n_question), model.dtype)
        # Among themselves only the distance counts, so any common place does.
        s[:, :, n_context:] = similarities(project_q(model, l, x, own), rotate(k, own, model.frequencies))
        # A cached key is rotated at its index; rotations add up.
        placed = rotate(cache.k[l], row - np.arange(n_context), model.frequencies)
        for place in np.unique(first):
            met = np.flatnonzero(first == place)
            s[:, :, met] = similarities(project_q(model, l, x, place + np.arange(n_question)), placed[met])
        s[:, :, np.asarray(hidden, np.int64)] = -np.inf
        a = softmax_of_visible(s, own + 1)
        if l in layers:
            attention[l] = a
        if l < max(layers):
            values = np.concatenate([cache.v[l], v])
            values = np.repeat(values, model.config.n_head // values.shape[1], axis=1).transpose(1, 0, 2)
            h = finish_layer(model, l, h, np.matmul(a, values).transpose(1, 0, 2))
    return [attention[l] for l in layers]


def combine_scores(attention, n_context, form):
    """Scores [T] from a list of [Hq, Nq, >= T] probabilities, one per score layer."""
    layers = [a[:, :, :n_context] for a in attention]
    if form == "l2":  # mean over layers of the norm over rows of the head mean
        return np.mean([np.sqrt((a.mean(axis=0) ** 2).sum(axis=0)) for a in layers], axis=0)
    if form == "l1":
        return np.mean([a.mean(axis=0).sum(axis=0) for a in layers], axis=0)
    if form == "mass":
        return np.sum([a.sum(axis=(0, 1)) for a in layers], axis=0)
    if form == "l2h":  # heads stay apart under the root
        return np.mean([np.sqrt((a**2).sum(axis=(0, 1))) for a in layers], axis=0)
    raise ValueError(f"unknown score form {form!r}")


def zigzag_shards(request, n_rank):
    """The chunks of each rank: a chunk belongs to the slice of 2P equal ones that holds its middle; rank r has r and 2P-1-r."""
    o, shards = request.offsets, [[] for _ in range(n_rank)]
    for i in range(len(request.chunks)):
        at = 2 * n_rank * (o[i] + o[i + 1]) // (2 * o[-1])
        shards[min(at, 2 * n_rank - 1 - at)].append(i)
    return shards


def order_by_ratio(request, selected):
    """Chunk numbers by the share of their rows in `selected`, ascending, equal shares by number; prefix rows count nowhere."""
    p, o = len(request.prefix), request.offsets
    share = [Fraction(int(np.sum((selected >= max(o[i], p)) & (selected < o[i + 1]))), len(chunk))
             for i, chunk in enumerate(request.chunks)]
    return sorted(range(len(share)), key=lambda i: (share[i], i))


def local_scores(model, cache, request, question, layers, places, form, shards, has_sink):
    """Scores [T] where the question of each rank sees that rank's chunks alone, and the prefix too if has_sink."""
    o, scores = request.offsets, np.zeros(request.offsets[-1])
    for chunks in shards:
        own = np.concatenate([np.arange(o[i], o[i + 1]) for i in chunks] + [np.empty(0, np.int64)]).astype(np.int64)
        seen = np.union1d(own, np.arange(len(request.prefix) if has_sink else 0))
        hidden = np.setdiff1d(np.arange(o[-1]), seen)
        attention = question_attention(model, cache, question, layers, places, hidden)
        scores[own] = combine_scores(attention, o[-1], form)[own]
    return scores


def budget(ratio, n_context, n_eligible):
    """k = min(max(1, floor(ratio T)), eligible), 0 for ratio 0.  `ratio` is decimal text: the product is exact."""
    exact = Fraction(Decimal(str(ratio)))
    if not 0 <= exact <= 1:
        raise ValueError(f"ratio {ratio} is outside 0..1")
    if exact == 0:
        return 0
    return min(max(1, exact.numerator * n_context // exact.denominator), n_eligible)


def select_best(scores, n_eligible_from, ratio):
    """The selected indices, ascending, and the relative gap at the threshold.

    Eligible are the indices >= n_eligible_from (chunk 0 is out).  Score descending, then index ascending.  The gap is
    (s_k - s_k+1) / s_k over the eligible rows in that order, infinite where nothing was cut.
    """
    bad = np.flatnonzero(~np.isfinite(scores) | (scores < 0))
    if len(bad):
        raise ValueError(f"score {scores[bad[0]]} at row {bad[0]}")
    eligible = np.arange(n_eligible_from, len(scores))
    k = budget(ratio, len(scores), len(eligible))
    order = eligible[np.argsort(-scores[eligible], kind="stable")]
    gap = np.inf
    if 0 < k < len(order):
        gap = float((scores[order[k - 1]] - scores[order[k]]) / scores[order[k - 1]])
    return np.sort(order[:k]), gap


def deviations(cache, exact, layer=1):
    """Squared distance [T] of the cached V of a layer from the exact one, over K/V heads and channels."""
    return ((exact.v[layer] - cache.v[layer]) ** 2).sum(axis=(1, 2))


def select_epic(request, epic_k=16):
    """The first epic_k rows of every chunk but the first."""
    o = request.offsets
    rows = [np.arange(o[i], min(o[i] + epic_k, o[i + 1])) for i in range(1, len(o) - 1)]
    return np.concatenate([np.empty(0, np.int64), *rows])


def select_epic_budget(request, ratio):
    """The first q_i rows of chunks >= 1, sum q_i = k, q_i proportional to n_i by largest remainder.

    Equal remainders go to the lower chunk.
    """
    o = request.offsets
    sizes = [o[i + 1] - o[i] for i in range(1, len(o) - 1)]
    k = budget(ratio, o[-1], sum(sizes))
    if k == 0:
        return np.empty(0, np.int64)
    quota = [k * n // sum(sizes) for n in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(k * sizes[i] % sum(sizes)), i))
    for i in by_remainder[: k - sum(quota)]:
        quota[i] += 1
    return np.concatenate([np.arange(o[i + 1], o[i + 1] + q) for i, q in enumerate(quota)])


# ---- recompute, prompt, decode --------------------------------------------------------------------------------------


def follow(stale, fresh, others, ridge=0.3):
    """What an affine map from stale to fresh rows makes of others; [R, H, D] each, every head by itself.

    The map x -> x + shift + x W minimises the squared change it misses plus ridge * mean variance * |W|^2, by the
    singular values of the centred rows.
    """
    moved = np.empty_like(others)
    for h in range(stale.shape[1]):
        x, y = stale[:, h], (fresh - stale)[:, h]
        u, s, vt = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
        weight = ridge * (s**2).sum() / x.shape[1]
        shrunk = np.divide(s, s**2 + weight, out=np.zeros_like(s), where=s > 0)
        w = vt.T @ (shrunk[:, None] * (u.T @ (y - y.mean(axis=0))))
        moved[:, h] = others[:, h] + y.mean(axis=0) + (others[:, h] - x.mean(axis=0)) @ w
    return moved


def refit_layer(model, cache, l, stale_k, stale_v, selected, n_exact):
    """Move every row from n_exact on that is not selected as the selected ones moved; K as it is before rotation."""
    others = np.setdiff1d(np.arange(n_exact, len(cache.k[l])), selected)
    before = lambda k, rows: rotate(k, -np.asarray(rows), model.frequencies)
    moved = follow(before(stale_k, selected), before(cache.k[l][selected], selected), before(cache.k[l][others], others))
    cache.k[l][others] = rotate(moved, others, model.frequencies)
    cache.v[l][others] = follow(stale_v, cache.v[l][selected], cache.v[l][others])


def recompute(model, cache, context, selected, n_exact=None):
    """Replace K/V of the selected rows, in place, by rows that start from their embeddings and see the whole past.

    Fresh rows see fresh rows of S and stale rows elsewhere.  Layer 0 keeps its K/V; the last layer ends with the write.
    n_exact: refit; in every layer the rows from n_exact on that are not selected follow before anybody attends.
    """
    if len(selected):
        ids = np.asarray(context)[selected]
        after_write = None
        if n_exact is not None:
            stale = [(k[selected].copy(), v[selected].copy()) for k, v in zip(cache.k, cache.v)]
            after_write = lambda l: l and refit_layer(model, cache, l, *stale[l], selected, n_exact)
        run_rows(model, cache, ids, selected, write_layer0=False, want_hidden=False, after_write=after_write)


def prompt_and_decode(model, cache, prompt, max_new):
    """Run the prompt behind the cache and decode greedily, ties to the lowest id.

    Returns (logits that chose the first token [n_vocab], answer ids, "stop" or "length", smallest relative gap between
    the best and the second logit over the answer).  An end id ends the answer and is its last id.
    """
    n_context = len(cache.k[0])
    grown = cache.copy(n_context + len(prompt) + max_new)
    h = run_rows(model, grown, prompt, n_context + np.arange(len(prompt)))
    first = row = logits(model, h[-1:])[0]
    answer, finish, gap, at = [], "length", np.inf, n_context + len(prompt)
    while len(answer) < max_new:
        second, best = np.sort(row)[-2:]
        gap = min(gap, float((best - second) / np.abs(row).max()))
        token = int(np.argmax(row))
        answer.append(token)
        if token in model.config.eos_ids:
            finish = "stop"
            break
        row = logits(model, run_rows(model, grown, [token], [at]))[0]
        at += 1
    return first, answer, finish, gap


# ---- a request from end to end --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    first_logits: np.ndarray  # [n_vocab]
    answer_ids: list
    finish: str
    selected: np.ndarray  # ascending indices; empty for full and none
    scores: np.ndarray  # [T], or None where nothing was scored
    gap: float  # relative score gap at the selection threshold
    logit_gap: float  # smallest relative gap of best and second logit over the answer
    cache: Cache  # the T context rows
    order: list  # the request's chunk in each place: ascending unless reordered
    context: list  # the T token ids in index order


def prefill(model, request, method="infoflow", ratio="0.15", score="l2", score_layer_choice="wide", max_new=32,
            score_rows="question", chosen=(), epic_k=16, geometry="global", hp="shared", local_ranks=0,
            has_sink=False, reorder=False, refit=False):
    """Run one request.  Methods: full, none, all, infoflow, epic, epic_budget, cacheblend, and random with the set `chosen`.

    local_ranks: score as so many ranks would that see their own chunks alone, placed zigzag; 0: the whole context.
    reorder: first put the chunks in ascending order of their shares of the best rows under hl-tp; all that is returned
    is about the new sequence, to which each rank's chunks go along.
    """
    order, shards = list(range(len(request.chunks))), zigzag_shards(request, local_ranks) if local_ranks else []
    rows = request.prompt if score_rows == "prompt" else request.question
    layers = score_layers(model.config.n_layer, score_layer_choice)

    def score_rows_of(cache, places):
        if local_ranks:
            return local_scores(model, cache, request, rows, layers, places, score, shards, has_sink)
        return combine_scores(question_attention(model, cache, rows, layers, places), request.offsets[-1], score)

    first_gap = np.inf
    if reorder:
        scores = score_rows_of(encode_chunks(model, request), scoring_places(request, "hl-tp"))
        best, first_gap = select_best(scores, 0, ratio)
        order = order_by_ratio(request, best)
        request = dataclasses.replace(request, chunks=[request.chunks[i] for i in order])
        shards = [sorted(order.index(i) for i in chunks) for chunks in shards]
    context, first_eligible = request.context, request.offsets[1]
    selected, scores, gap = np.empty(0, np.int64), None, np.inf
    if method == "full":
        cache, _ = full_prefill(model, context)
    else:
        cache = encode_chunks(model, request)
        if method == "all":
            selected = np.arange(first_eligible, len(context))
        elif method == "infoflow":
            scores = score_rows_of(cache, scoring_places(request, geometry, hp))
            selected, gap = select_best(scores, first_eligible, ratio)
        elif method == "cacheblend":
            exact, _ = full_prefill(model, context)  # what running layer 0 on all rows gives layer 1
            scores = deviations(cache, exact)
            selected, gap = select_best(scores, first_eligible, ratio)
            if len(selected):  # the check layer's K/V of all rows are replaced
                cache.k[1][:], cache.v[1][:] = exact.k[1], exact.v[1]
        elif method == "epic":
            selected = select_epic(request, epic_k)
        elif method == "epic_budget":
            selected = select_epic_budget(request, ratio)
        elif method == "random":
            selected = np.sort(np.asarray(chosen, np.int64))
        elif method != "none":
            raise ValueError(f"unknown method {method!r}")
        recompute(model, cache, context, selected, first_eligible if refit else None)
    first, answer, finish, logit_gap = prompt_and_decode(model, cache, request.prompt, max_new)
    return Result(first, answer, finish, selected, scores, min(gap, first_gap), logit_gap, cache, order,
                  context)
