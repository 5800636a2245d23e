#!/usr/bin/env python3
"""Claims the reference itself must meet, from closed forms and invariants: python3 tests/reference/test_reference.py.

Needs NumPy alone.  Everything is float64, so two ways to the same figure agree to about 1e-12; CLOSE is that with room.
"""
import math
import os
import sys
import tempfile
import unittest

# Tiny products: BLAS threads would only spin, on a busy machine for minutes.  Set before NumPy is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np  # noqa: E402

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import hf_model  # noqa: E402
import ifkv_reference as reference  # noqa: E402
import make_goldens  # noqa: E402
import make_models  # noqa: E402
import safetensors_io  # noqa: E402
from portable_noise import integers, noise, sketch, sketch_distance  # noqa: E402

CLOSE = 1e-10
MODELS = ("llama_g3_scaled_sharded", "qwen3_g5_sharded")
_models = {}


def setUpModule():
    with tempfile.TemporaryDirectory() as directory:
        for name in MODELS:
            _models[name] = reference.load_model(make_models.make_model(directory, name))


def make_request(model, n_prefix=2, n_chunks=(13, 1, 22, 9), n_prompt=4, n_question=3):
    ids = lambda part, n: integers(f"unit {part}", n, 5, model.config.n_vocab)
    return reference.Request(ids("prefix", n_prefix), [ids(f"chunk {i}", n) for i, n in enumerate(n_chunks)],
                             ids("prompt", n_prompt), ids("question", n_question))


class WithModels(unittest.TestCase):
    def each_model(self):
        return _models.values()

    def assert_close(self, a, b, tolerance=CLOSE):
        a, b = np.asarray(a), np.asarray(b)
        self.assertEqual(a.shape, b.shape)
        self.assertLessEqual(np.linalg.norm(a - b), tolerance * np.linalg.norm(b))

    def assert_same_cache(self, a, b, rows=slice(None)):
        for x, y in zip(a.k + a.v, b.k + b.v):
            self.assert_close(x[rows], y[rows])


class Pipeline(WithModels):
    def test_ratio_one_equals_full_prefill(self):
        for model in self.each_model():
            request = make_request(model)
            some, full = (reference.prefill(model, request, m, "1", max_new=4) for m in ("infoflow", "full"))
            self.assert_same_cache(some.cache, full.cache)
            self.assert_close(some.first_logits, full.first_logits)

    def test_one_chunk_selects_nothing_and_equals_full_prefill(self):
        for model in self.each_model():
            request = make_request(model, n_chunks=(17,))
            some, full = (reference.prefill(model, request, m, "0.5", max_new=1) for m in ("infoflow", "full"))
            self.assertEqual(len(some.selected), 0)
            self.assert_same_cache(some.cache, full.cache)

    def test_none_differs_visibly_from_full_prefill(self):
        for model in self.each_model():
            none, full = (reference.prefill(model, make_request(model), m, max_new=1) for m in ("none", "full"))
            self.assertGreater(np.linalg.norm(none.first_logits - full.first_logits),
                               0.1 * np.linalg.norm(full.first_logits))

    def test_ratio_zero_is_none_bitwise(self):
        for model in self.each_model():
            request = make_request(model)
            none = reference.prefill(model, request, "none", max_new=1)
            for method in ("infoflow", "cacheblend"):
                zero = reference.prefill(model, request, method, "0", max_new=1)
                for x, y in zip(zero.cache.k + zero.cache.v, none.cache.k + none.cache.v):
                    self.assertEqual(x.tobytes(), y.tobytes())

    def test_layer_1_of_all_rows_equals_full_prefill_under_cacheblend(self):
        for model in self.each_model():
            request = make_request(model)
            blend, full = (reference.prefill(model, request, m, "0.2", max_new=1) for m in ("cacheblend", "full"))
            self.assertTrue(0 < len(blend.selected) < len(request.context) - request.offsets[1])
            self.assert_close(blend.cache.k[1], full.cache.k[1])
            self.assert_close(blend.cache.v[1], full.cache.v[1])

    def test_layer_0_of_placed_chunks_equals_full_prefill(self):
        for model in self.each_model():
            none, full = (reference.prefill(model, make_request(model), m, max_new=1) for m in ("none", "full"))
            self.assert_close(none.cache.k[0], full.cache.k[0])
            self.assert_close(none.cache.v[0], full.cache.v[0])

    def test_chunk_0_equals_full_prefill_under_every_method(self):
        for model in self.each_model():
            request = make_request(model)
            full = reference.prefill(model, request, "full", max_new=1)
            for method in ("none", "infoflow", "epic", "epic_budget", "cacheblend", "all"):
                result = reference.prefill(model, request, method, "0.3", max_new=1)
                self.assert_same_cache(result.cache, full.cache, slice(request.offsets[1]))

    def test_recomputing_twice_changes_nothing_more(self):
        for model in self.each_model():
            request = make_request(model)
            result = reference.prefill(model, request, "infoflow", "0.3", max_new=1)
            again = result.cache.copy()
            reference.recompute(model, again, request.context, result.selected)
            self.assert_same_cache(again, result.cache)

    def test_rows_of_a_selection_may_come_in_any_order(self):
        for model in self.each_model():
            request = make_request(model)
            selected = np.arange(request.offsets[1], len(request.context), 2)
            caches = [reference.encode_chunks(model, request) for _ in range(2)]
            reference.recompute(model, caches[0], request.context, selected)
            reference.recompute(model, caches[1], request.context, selected[::-1])
            self.assert_same_cache(*caches)

    def test_rows_do_not_see_what_follows_them(self):
        for model in self.each_model():
            request = make_request(model)
            cut = request.offsets[3]
            shorter = reference.Request(request.prefix, request.chunks[:3], request.prompt, request.question)
            selected = np.array([request.offsets[1], request.offsets[2] + 3, cut + 1])
            long = reference.prefill(model, request, "random", chosen=selected, max_new=1)
            short = reference.prefill(model, shorter, "random", chosen=selected[selected < cut], max_new=1)
            for x, y in zip(long.cache.k + long.cache.v, short.cache.k + short.cache.v):
                self.assert_close(x[:cut], y)

    def test_selecting_all_of_the_first_chunks_makes_them_exact(self):
        for model in self.each_model():
            request = make_request(model)
            rows = np.arange(request.offsets[1], request.offsets[3])
            some = reference.prefill(model, request, "random", chosen=rows, max_new=1)
            full = reference.prefill(model, request, "full", max_new=1)
            self.assert_same_cache(some.cache, full.cache, slice(request.offsets[3]))

    def test_full_prefill_ignores_chunk_boundaries(self):
        for model in self.each_model():
            request = make_request(model)
            joined = reference.Request([], [request.context], request.prompt, request.question)
            one, many = (reference.prefill(model, r, m, max_new=3) for r, m in ((joined, "none"), (request, "full")))
            self.assert_close(one.first_logits, many.first_logits)
            self.assertEqual(one.answer_ids, many.answer_ids)

    def test_decode_continues_as_one_long_prefill_would(self):
        for model in self.each_model():
            request = make_request(model)
            result = reference.prefill(model, request, "full", max_new=5)
            ids = request.context + request.prompt + result.answer_ids
            _, hidden = reference.full_prefill(model, ids)
            rows = reference.logits(model, hidden)
            start = len(request.context) + len(request.prompt) - 1
            self.assert_close(rows[start], result.first_logits)
            best = np.argmax(rows[start : start + len(result.answer_ids)], axis=1)
            self.assertEqual(best.tolist(), result.answer_ids)


class Places(WithModels):
    def test_shifted_encode_equals_local_encode_and_one_delta_rotation(self):
        for model in self.each_model():
            request = make_request(model)
            ids, shift = request.prefix + request.chunks[2], request.offsets[2] - len(request.prefix)
            caches = [reference.Cache(model, len(ids)) for _ in range(2)]
            for cache, by in zip(caches, (shift, 0)):
                reference.run_rows(model, cache, ids, range(len(ids)), shift=by, want_hidden=False)
            for l in range(model.config.n_layer):
                moved = reference.rotate(caches[1].k[l], np.full(len(ids), shift), model.frequencies)
                self.assert_close(caches[0].k[l], moved)
                self.assert_close(caches[0].v[l], caches[1].v[l])

    def test_rotations_add(self):
        x, freq = noise("rotate", (3, 2, 8)), 10000.0 ** (-np.arange(4) / 4)
        twice = reference.rotate(reference.rotate(x, [5, 9, 2], freq), [7, -9, 30], freq)
        self.assert_close(twice, reference.rotate(x, [12, 0, 32], freq))

    def test_rotation_pairs_channel_i_with_i_plus_half(self):
        x = np.zeros((1, 1, 4))
        x[0, 0, 1] = 1.0
        turned = reference.rotate(x, [2], np.array([1.0, 0.25]))[0, 0]
        self.assert_close(turned, [0, math.cos(0.5), 0, math.sin(0.5)])

    def test_context_is_cut_with_a_short_last_chunk(self):
        request = reference.Request.from_json({"context": list(range(10, 17)), "prompt": [1]}, chunk=3)
        self.assertEqual(request.chunks, [[10, 11, 12], [13, 14, 15], [16]])

    def test_offsets_count_the_prefix_once(self):
        request = reference.Request([1, 2], [[3], [4, 5, 6], [7]], [8], [8])
        self.assertEqual(request.offsets, [0, 3, 6, 7])


class Attention(unittest.TestCase):
    def test_weights_equal_a_plain_loop(self):
        q, k = noise("q", (3, 6, 4)), noise("k", (5, 2, 4))
        got = reference.probabilities(q, k, [1, 3, 5])
        for h in range(6):
            for r, n in enumerate((1, 3, 5)):
                e = [math.exp(sum(q[r, h, d] * k[j, h // 3, d] for d in range(4)) / 2) for j in range(n)]
                want = [x / sum(e) for x in e] + [0.0] * (5 - n)
                np.testing.assert_allclose(got[h, r], want, rtol=1e-13)

    def test_row_blocks_change_nothing(self):
        q, k, v = noise("q", (7, 4, 8)), noise("k", (9, 2, 8)), noise("v", (9, 2, 8))
        visible = np.array([3, 1, 9, 4, 4, 2, 8])
        np.testing.assert_allclose(reference.attend(q, k, v, visible, block=2), reference.attend(q, k, v, visible),
                                   rtol=1e-13)

    def test_constant_values_come_out_unchanged(self):
        q, k, v = noise("q", (4, 4, 8)), noise("k", (6, 2, 8)), np.ones((6, 2, 8)) * 3.5
        np.testing.assert_allclose(reference.attend(q, k, v, np.array([1, 2, 5, 6])), 3.5, rtol=1e-14)

    def test_unseen_rows_may_hold_anything(self):
        q, k, v = noise("q", (1, 2, 8)), noise("k", (6, 2, 8)), noise("v", (6, 2, 8))
        seen = reference.attend(q, k, v, np.array([4]))
        k[4:], v[4:] = np.nan, np.nan
        self.assertEqual(reference.attend(q, k, v, np.array([4])).tobytes(), seen.tobytes())


class Scores(WithModels):
    def attention(self, model, n_question=4):
        request = make_request(model, n_question=n_question)
        cache = reference.encode_chunks(model, request)
        layers = reference.score_layers(model.config.n_layer, "published")
        return reference.question_attention(model, cache, request.question, layers), len(request.context)

    def test_context_and_question_mass_add_to_one(self):
        for model in self.each_model():
            for a in self.attention(model)[0]:
                np.testing.assert_allclose(a.sum(axis=-1), 1, rtol=1e-12)

    def test_question_rows_are_causal(self):
        for model in self.each_model():
            attention, n_context = self.attention(model)
            for a in attention:
                self.assertEqual(np.triu(a[0][:, n_context:], 1).max(), 0)

    def test_l2_is_at_most_l1_at_most_root_of_rows_times_l2(self):
        for model in self.each_model():
            attention, n_context = self.attention(model, n_question=4)
            l2, l1 = (reference.combine_scores(attention, n_context, form) for form in ("l2", "l1"))
            self.assertTrue((l2 <= l1 * (1 + 1e-12)).all())
            self.assertTrue((l1 <= 2 * l2 * (1 + 1e-12)).all())

    def test_mass_is_l1_times_heads_and_layers(self):
        for model in self.each_model():
            attention, n_context = self.attention(model)
            mass, l1 = (reference.combine_scores(attention, n_context, form) for form in ("mass", "l1"))
            self.assert_close(mass, l1 * model.config.n_head * len(attention))

    def test_l2h_of_one_head_is_l2(self):
        a = [np.abs(noise("heads", (1, 3, 5)))]
        self.assert_close(reference.combine_scores(a, 5, "l2h"), reference.combine_scores(a, 5, "l2"))

    def test_one_question_row_makes_l1_equal_l2(self):
        for model in self.each_model():
            attention, n_context = self.attention(model, n_question=1)
            self.assert_close(*(reference.combine_scores(attention, n_context, form) for form in ("l2", "l1")))

    def test_scoring_leaves_the_cache_alone(self):
        for model in self.each_model():
            request = make_request(model)
            cache = reference.encode_chunks(model, request)
            before = [x.tobytes() for x in cache.k + cache.v]
            reference.question_attention(model, cache, request.question, [1, 2])
            self.assertEqual([x.tobytes() for x in cache.k + cache.v], before)

    def test_published_layers_are_22_to_25_or_at_the_same_depth(self):
        for n_layer, layers in ((40, [22, 23, 24, 25]), (26, [22, 23, 24, 25]), (25, [13, 14, 15, 16]), (6, [3, 4, 5]),
                                (4, [2, 3]), (1, [0])):
            self.assertEqual(reference.score_layers(n_layer, "published"), layers)

    def test_wide_layers_are_every_third_of_the_middle(self):
        self.assertEqual(reference.score_layers(30, "wide"), [10, 13, 16, 19, 22, 25])


class Selection(unittest.TestCase):
    def test_budget_is_exact_in_decimals(self):
        self.assertEqual(reference.budget("0.35", 180, 1000), 63)  # 62 in doubles
        self.assertEqual(reference.budget("0.15", 8192, 9999), 1228)
        self.assertEqual(reference.budget("0.29", 100, 1000), 29)  # 28 in doubles

    def test_budget_is_at_least_one_and_at_most_the_eligible_rows(self):
        self.assertEqual(reference.budget("0.001", 10, 5), 1)
        self.assertEqual(reference.budget("1", 10, 5), 5)
        self.assertEqual(reference.budget("0.5", 10, 0), 0)

    def test_budget_of_ratio_zero_is_zero(self):
        self.assertEqual(reference.budget("0.000", 1000, 900), 0)

    def test_ratio_outside_zero_to_one_is_an_error(self):
        for ratio in ("-0.1", "1.01"):
            with self.assertRaises(ValueError):
                reference.budget(ratio, 10, 10)

    def test_ties_go_to_the_lower_index(self):
        selected, gap = reference.select_best(np.array([9, 9, 1, 2, 2, 2, 1.0]), 2, "0.3")
        self.assertEqual(selected.tolist(), [3, 4])
        self.assertEqual(gap, 0)

    def test_chunk_0_counts_in_the_budget_but_is_not_selected(self):
        selected, _ = reference.select_best(np.arange(10, 0, -1.0), 6, "0.3")
        self.assertEqual(selected.tolist(), [6, 7, 8])

    def test_a_score_that_is_no_number_is_an_error_that_names_the_row(self):
        for bad in (np.nan, np.inf, -1.0):
            with self.assertRaisesRegex(ValueError, "row 3"):
                reference.select_best(np.array([1, 1, 1, bad, 1]), 1, "0.5")

    def test_epic_with_long_heads_is_all(self):
        request = reference.Request([1], [[2, 3], [4, 5, 6], [7]], [8], [8])
        self.assertEqual(reference.select_epic(request, epic_k=3).tolist(), [3, 4, 5, 6])

    def test_epic_takes_the_heads_of_all_chunks_but_the_first(self):
        request = reference.Request([1], [[2, 3], [4, 5, 6], [7]], [8], [8])
        self.assertEqual(reference.select_epic(request, epic_k=2).tolist(), [3, 4, 6])

    def test_epic_budget_spends_the_whole_budget_by_largest_remainder(self):
        request = reference.Request([], [[1] * 4, [1] * 5, [1] * 7, [1] * 4], [8], [8])
        # T = 20, k = 7, shares 7 * (5, 7, 4) / 16 = 2.19, 3.06, 1.75: the last chunk gets the spare row
        self.assertEqual(reference.select_epic_budget(request, "0.35").tolist(), [4, 5, 9, 10, 11, 16, 17])


class Geometries(WithModels):
    ALL = (("global", "shared"), ("hl-tp", "shared"), ("hl-hp", "shared"), ("hl-hp", "per_chunk"), ("tl-tp", "shared"))

    def scores(self, model, request, geometry, hp):
        return reference.prefill(model, request, "infoflow", "0.2", max_new=1, geometry=geometry, hp=hp).scores

    def test_places_by_hand(self):
        request = reference.Request([1, 1], [[2] * 3, [3], [4] * 4], [8], [8])
        rows = lambda *geometry: [x.tolist() for x in reference.scoring_places(request, *geometry)]
        self.assertEqual(rows("global"), [list(range(10)), [10] * 10])
        self.assertEqual(rows("hl-tp"), [[0, 1, 2, 3, 4, 2, 2, 3, 4, 5], [10] * 10])
        self.assertEqual(rows("hl-hp"), [[0, 1, 2, 3, 4, 2, 2, 3, 4, 5], [6] * 10])
        self.assertEqual(rows("hl-hp", "per_chunk"), [[0, 1, 2, 3, 4, 2, 2, 3, 4, 5], [5] * 5 + [3] + [6] * 4])
        self.assertEqual(rows("tl-tp"), [[0, 1, 7, 8, 9, 9, 6, 7, 8, 9], [10] * 10])

    def test_all_coincide_for_one_chunk(self):
        for model in self.each_model():
            request = make_request(model, n_chunks=(17,))
            for geometry in self.ALL[1:]:
                self.assert_close(self.scores(model, request, *geometry), self.scores(model, request, *self.ALL[0]))

    def test_head_local_per_chunk_is_tail_local_without_a_prefix(self):
        for model in self.each_model():
            request = make_request(model)
            request.prefix = []
            self.assert_close(self.scores(model, request, "hl-hp", "per_chunk"),
                              self.scores(model, request, "tl-tp", "shared"))

    def test_they_differ_for_more_chunks(self):
        for model in self.each_model():
            request = make_request(model)
            found = [self.scores(model, request, *geometry) for geometry in self.ALL]
            for i in range(len(found)):
                for j in range(i):
                    self.assertGreater(np.abs(found[i] / found[j] - 1).max(), 1e-3)


class Deviations(WithModels):
    def test_layer_0_deviates_nowhere_and_chunk_0_in_no_layer(self):
        for model in self.each_model():
            request = make_request(model)
            cache = reference.encode_chunks(model, request)
            exact, _ = reference.full_prefill(model, request.context)
            self.assertLess(reference.deviations(cache, exact, 0).max(), 1e-24)
            after = reference.deviations(cache, exact)
            self.assertLess(after[: request.offsets[1]].max(), 1e-24)
            self.assertGreater(after[request.offsets[1] :].min(), 1e-12)


class Rotary(unittest.TestCase):
    RAW = dict(make_models.MODELS["llama_g1_tied"][0], head_dim=128, rope_theta=500000.0)
    SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 8192}

    def frequencies(self, **changes):
        return hf_model.rope_frequencies(hf_model.parse_config(dict(self.RAW, **changes)))

    def test_plain_frequencies_are_powers_of_theta(self):
        np.testing.assert_allclose(self.frequencies(), [500000.0 ** (-i / 64) for i in range(64)], rtol=1e-14)

    def test_llama3_keeps_short_waves_and_divides_long_ones(self):
        plain, scaled = self.frequencies(), self.frequencies(rope_scaling=self.SCALED)
        wavelength = 2 * np.pi / plain
        np.testing.assert_array_equal(scaled[wavelength < 2048], plain[wavelength < 2048])
        np.testing.assert_array_equal(scaled[wavelength > 8192], plain[wavelength > 8192] / 8)

    def test_llama3_blends_between_by_the_closed_form(self):
        plain, scaled = self.frequencies(), self.frequencies(rope_scaling=self.SCALED)
        between = (2 * np.pi / plain >= 2048) & (2 * np.pi / plain <= 8192)
        self.assertGreater(between.sum(), 3)
        # s = (8192 f / 2 pi - 1) / 3, so f' = f/8 + 7/8 s f
        s = (8192 * plain[between] / (2 * np.pi) - 1) / 3
        np.testing.assert_allclose(scaled[between], plain[between] * (1 + 7 * s) / 8, rtol=1e-14)

    def test_all_spellings_give_the_same_frequencies(self):
        want = self.frequencies(rope_scaling=self.SCALED)
        old = {("type" if k == "rope_type" else k): v for k, v in self.SCALED.items()}
        for changes in ({"rope_scaling": old}, {"rope_parameters": self.SCALED},
                        {"rope_parameters": dict(self.SCALED, rope_theta=500000.0), "rope_theta": None}):
            np.testing.assert_array_equal(self.frequencies(**changes), want)

    def test_disagreeing_theta_is_an_error(self):
        with self.assertRaisesRegex(ValueError, "rope_theta"):
            self.frequencies(rope_parameters={"rope_type": "default", "rope_theta": 5.0})

    def test_unknown_rotary_type_is_refused(self):
        with self.assertRaisesRegex(ValueError, "dynamic"):
            self.frequencies(rope_scaling={"rope_type": "dynamic", "factor": 2.0})


class Files(unittest.TestCase):
    def test_bf16_rounds_to_nearest_even(self):
        x = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.0], np.float32)
        want = np.array([1.0, 1.0, 1 + 2**-6, 1 + 2**-7, -3.0], np.float32)
        np.testing.assert_array_equal(safetensors_io.bf16_to_f32(safetensors_io.f32_to_bf16(x)), want)

    def test_directories_read_back_bitwise_in_every_type_and_sharding(self):
        tensors = {f"t{i}": noise(f"file {i}", (i + 1, 3)).astype(np.float16).astype(np.float32) for i in range(5)}
        halves = {n: safetensors_io.bf16_to_f32(safetensors_io.f32_to_bf16(t)) for n, t in tensors.items()}
        for dtype, n_shard, data in (("F32", 1, tensors), ("F16", 3, tensors), ("BF16", 2, halves)):
            with self.subTest(dtype=dtype), tempfile.TemporaryDirectory() as path:
                safetensors_io.write_directory(path, data, dtype, n_shard)
                back = safetensors_io.read_directory(path)
                self.assertEqual(sorted(back), sorted(data))
                for name in data:
                    np.testing.assert_array_equal(back[name], data[name])

    def test_models_are_the_same_bytes_when_made_again(self):
        with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
            made = [make_models.make_model(path, "llama_g5_wide_tied") for path in (a, b)]
            self.assertEqual(*map(make_goldens.weights_digest, made))

    def test_noise_has_mean_zero_and_variance_one(self):
        z = noise("moments", (200000,))
        self.assertLess(abs(z.mean()), 5 / math.sqrt(200000))  # five standard errors
        self.assertLess(abs(z.var() - 1), 5 * math.sqrt(2 / 200000))

    def test_fingerprints_estimate_the_distance(self):
        x = noise("x", (50, 2, 16))
        y = x.copy()
        y[17] += 0.01 * noise("d", (2, 16))
        true = np.linalg.norm(x - y) / np.linalg.norm(x)
        estimate = sketch_distance(sketch(x), sketch(y), np.linalg.norm(x))
        self.assertTrue(0.5 * true < estimate < 2 * true)


if __name__ == "__main__":
    unittest.main()
