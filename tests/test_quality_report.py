"""The scorer, the statistics and the report of bench/quality_report.py, against values worked out by hand."""
import json
import sys
import tempfile
import unittest
from pathlib import Path

import h5py
import numpy as np
from tokenizers import Tokenizer, models

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import quality_report  # noqa: E402
import quality_stats as stats  # noqa: E402


class Scorer(unittest.TestCase):
    def test_normalise_drops_case_punctuation_articles_and_spaces(self):
        self.assertEqual(stats.normalise("  The U.S.'s  a-team,\nan Anthem "), "uss ateam anthem")

    def test_f1_counts_repeated_tokens_once_each(self):
        # two tokens in common of three and of four: 2 * (2/3 * 2/4) / (2/3 + 2/4) = 4/7
        self.assertAlmostEqual(stats.f1("big big dog", "big dog cat cow"), 4 / 7)

    def test_f1_of_nothing_in_common_and_of_nothing_is_zero(self):
        self.assertEqual((stats.f1("cat", "dog"), stats.f1("", ""), stats.f1("the", "a")), (0, 0, 0))

    def test_best_answer_counts(self):
        self.assertAlmostEqual(stats.best_f1("Exeter", ["Oxford", "Exeter College"]), 2 / 3)
        self.assertEqual(stats.exact_match("the exeter college.", ["Oxford", "Exeter College"]), 1)
        self.assertEqual(stats.exact_match("exeter", ["Exeter College"]), 0)


class Statistics(unittest.TestCase):
    KL, NONE = [0.1, 0.3], [0.2, 0.4]

    def test_shares(self):
        np.testing.assert_allclose(stats.shares(self.KL, self.NONE), [0.5, 0.25])
        self.assertAlmostEqual(stats.share_of_means(self.KL, self.NONE), 1 - 0.4 / 0.6)

    def test_interval_of_a_constant_is_the_constant(self):
        self.assertEqual(stats.bootstrap(np.mean, [2, 2, 2]), (2, 2))

    def test_interval_of_two_values_reaches_both(self):
        # a quarter of the resamples are (0, 0), a quarter (1, 1)
        self.assertEqual(stats.bootstrap(np.mean, [0, 1]), (0, 1))

    def test_interval_of_a_mean_is_near_the_normal_one(self):
        values = np.random.default_rng(1).normal(size=400)
        low, high = stats.bootstrap(np.mean, values)
        half = 1.96 * values.std() / 20
        self.assertAlmostEqual(low, values.mean() - half, delta=0.1 * half)
        self.assertAlmostEqual(high, values.mean() + half, delta=0.1 * half)

    def test_columns_are_resampled_together(self):
        low, high = stats.bootstrap(lambda a, b, axis: np.mean(a - b, axis), [1, 5, 9, 2], [0, 4, 8, 1])
        self.assertEqual((low, high), (1, 1))


def line_of(name, question, position, kl, answer=None, **config):
    return {"id": question, "position": position, "name": name, "config": {"name": name, **config}, "n_selected": 3, "kl_first": kl,
            "kl_greedy": kl, "nll_greedy": 1.0, "kl_gold": kl, "nll_gold": 2.0, "k_error": [0.0, kl], "v_error": [0.0, kl], "answer": answer}


class Report(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        Tokenizer(models.WordLevel({"oslo": 0, "rome": 1}, unk_token="oslo")).save(str(self.folder / "tokenizer.json"))
        self.write("requests.jsonl", [{"id": name, "answers": ["Oslo"]} for name in "abcd"])

    def write(self, name, lines):
        (self.folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    def report(self, lines, *arguments):
        self.write("run.jsonl", lines)
        quality_report.main([str(self.folder / "run.jsonl"), "--model", str(self.folder), "--requests",
                             str(self.folder / "requests.jsonl"), "--out", str(self.folder / "table"), *arguments])
        text = (self.folder / "table.md").read_text()
        return [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith("| ")][1:]

    def test_table_compares_with_none_random_and_published(self):
        lines = []
        for position, question in enumerate("abc"):
            scale = 1 + position
            lines += [line_of("full", question, position, 0.0, [0], method="full"),
                      line_of("none", question, position, 1.0 * scale, [1], method="none"),
                      line_of("luck", question, position, 0.9 * scale, method="random", ratio="0.15"),
                      line_of("old", question, position, 0.5 * scale, method="infoflow", layers="published", ratio="0.15"),
                      line_of("new", question, position, 0.25 * scale, method="infoflow", layers="wide", ratio="0.15"),
                      line_of("old refit", question, position, 0.1 * scale, method="infoflow", layers="published", ratio="0.15", refit=True),
                      line_of("luck refit", question, position, 0.6 * scale, method="random", ratio="0.15", refit=True)]
        lines.append(line_of("full", "d", 3, 0.0, [0], method="full"))  # without the others: left out
        rows = {row[0]: row for row in self.report(lines)}
        self.assertEqual(rows["full"][5:9], ["1.000", "1.00", "100 [100, 100]", "100 [100, 100]"])
        self.assertEqual(rows["none"][5:9], ["0.000", "0.00", "0 [0, 0]", "0 [0, 0]"])
        self.assertEqual(rows["new"][2:9], ["0.5000", "0.5000", "2.000", "–", "–", "75 [75, 75]", "75 [75, 75]"])
        self.assertEqual(rows["new"][11:16], ["10", "25 [25, 25]", "25 [25, 25]", "–", "–"])
        self.assertEqual(rows["old refit"][11:16], ["10"] + ["40 [40, 40]"] * 4)
        self.assertEqual(rows["luck refit"][14:16], ["30 [30, 30]"] * 2)
        with h5py.File(self.folder / "table.h5") as file:
            self.assertEqual(file["kl_greedy"].shape, (7, 3))
            self.assertEqual([name.decode() for name in file["question"]], ["a", "b", "c"])
            self.assertEqual(file["v_error"].shape, (7, 3, 2))
        self.assertTrue((self.folder / "table.png").read_bytes().startswith(b"\x89PNG"))

    def test_reordered_rows_have_no_error_and_are_not_published(self):
        moved = line_of("moved", "a", 0, 0.5, method="infoflow", layers="published", ratio="0.15", reorder=True)
        moved.update(k_error=[None, None], v_error=[None, None], stale_error=[None, None], fresh_error=[None, None])
        lines = [line_of("none", "a", 0, 1.0, method="none"), moved,
                 line_of("old", "a", 0, 0.75, method="infoflow", layers="published", ratio="0.15")]
        rows = {row[0]: row for row in self.report(lines)}
        self.assertEqual(rows["moved"][12:], ["25 [25, 25]"] * 2 + ["–", "–", "– / –", "–"])

    def test_part_keeps_half_of_the_positions(self):
        lines = [line_of("none", question, position, 1.0, method="none") for position, question in enumerate("abcd")]
        self.report(lines, "--part", "odd")
        with h5py.File(self.folder / "table.h5") as file:
            self.assertEqual([name.decode() for name in file["question"]], ["b", "d"])

    def test_configs_choose_rows_and_their_order(self):
        lines = [line_of(name, "a", 0, 1.0, method=name) for name in ("full", "none", "random")] + [line_of("none", "b", 1, 1.0, method="none")]
        self.write("configs.jsonl", [{"name": "none"}, {"name": "full"}])
        rows = self.report(lines, "--configs", str(self.folder / "configs.jsonl"))
        self.assertEqual([row[0] for row in rows], ["none", "full"])

    def test_nothing_complete_is_refused(self):
        lines = [line_of("none", "a", 0, 1.0, method="none"), line_of("full", "b", 1, 0.0, method="full")]
        with self.assertRaises(SystemExit):
            self.report(lines)


if __name__ == "__main__":
    unittest.main()
