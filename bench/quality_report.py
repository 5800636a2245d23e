#!/usr/bin/env python3
"""Turn the JSON lines of `quality` into a Markdown table, an HDF5 file and a plot.

One row a configuration, over the questions that every configuration has: means of KL and of the
gold answer's negative log-likelihood, F1 and exact match where answers were decoded, the recovered
share of the gap between `none` and `full` with its 95 % bootstrap interval, `random` at the same
ratio, and the paired difference from the published layers.  Columns: bench/README.md.
"""
import argparse
import json
import os
import shlex
import sys
from pathlib import Path

import h5py
import numpy as np

import quality_stats as stats

DEFAULT = {"method": "infoflow", "ratio": "0.15", "score": "l2", "layers": "wide", "rows": "question",
           "geometry": "global", "hp": "shared", "refit": False, "reorder": False, "write": "recompute"}
MEASURED = ("kl_first", "kl_greedy", "nll_greedy", "kl_gold", "nll_gold")


def read_json_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def read_lines(paths, part, configs):
    lines = [line for path in paths for line in read_json_lines(path)]
    wanted = {"all": (0, 1), "even": (0,), "odd": (1,)}[part]
    lines = [line for line in lines if line["position"] % 2 in wanted]
    if configs is None:
        return lines
    names = [config["name"] for config in read_json_lines(configs)]
    return sorted((line for line in lines if line["name"] in names), key=lambda line: names.index(line["name"]))


class Run:
    """Lines as [configuration, question] arrays, over the questions that have every configuration."""

    def __init__(self, lines):
        self.by_pair = {(line["name"], line["id"]): line for line in lines}
        self.names = list(dict.fromkeys(line["name"] for line in lines))
        ids = sorted({line["id"] for line in lines}, key=lambda name: min(
            line["position"] for line in lines if line["id"] == name))
        self.ids = [name for name in ids if all((config, name) in self.by_pair for config in self.names)]
        if not self.ids:
            raise SystemExit("quality_report: error: no question has every configuration")
        self.config = {line["name"]: line["config"] for line in lines}

    def column(self, name, key):
        values = [self.by_pair[name, question][key] for question in self.ids]
        return np.array([np.nan if value is None else value for value in values], dtype=float)

    def find_unfitted(self, name):
        """The configuration that a refit one would be without it; None for others."""
        config = self.config[name]
        if not config.get("refit"):
            return None
        return self.find(**{key: config[key] for key in DEFAULT if key in config and key != "refit"})

    def selected_v_error(self, name):
        """Means over questions of the selected rows' V error as encoded and at the end, or None in older lines."""
        lines = [self.by_pair[name, question] for question in self.ids]
        if any(None in line.get("fresh_error", [None]) for line in lines) or lines[0]["n_selected"] == 0:
            return None
        return tuple(np.mean([line[key][1] for line in lines]) for key in ("stale_error", "fresh_error"))

    def find(self, **wanted):
        """The first configuration with these fields and, in all others that matter, the defaults."""
        for name, config in self.config.items():
            if all(config.get(key, DEFAULT[key]) == value for key, value in {**DEFAULT, **wanted}.items()):
                return name
        return None


def answer_scores(run, name, decode, golds):
    """F1 and exact match a question, NaN where nothing was decoded."""
    f1, exact = np.full(len(run.ids), np.nan), np.full(len(run.ids), np.nan)
    for i, question in enumerate(run.ids):
        ids = run.by_pair[name, question]["answer"]
        if ids is not None and question in golds:
            text = decode(ids)
            f1[i], exact[i] = stats.best_f1(text, golds[question]), stats.exact_match(text, golds[question])
    return f1, exact


def measure(run, decode, golds):
    """A dictionary of numbers for each configuration."""
    none = run.find(method="none")
    rows = []
    for name in run.names:
        ratio = run.config[name].get("ratio", "")
        row = {"name": name, "ratio": ratio, "n_selected": run.column(name, "n_selected").mean()}
        row.update((key, run.column(name, key)) for key in MEASURED)
        row["f1"], row["exact"] = answer_scores(run, name, decode, golds)
        for answer in ("greedy", "gold"):
            kl, base = run.column(name, f"kl_{answer}"), run.column(none, f"kl_{answer}")
            row[f"share_{answer}"] = stats.shares(kl, base)
            row[f"total_{answer}"] = stats.share_of_means(kl, base)
            row[f"total_{answer}_interval"] = stats.bootstrap(stats.share_of_means, kl, base)
            row[f"share_{answer}_interval"] = stats.bootstrap(np.mean, row[f"share_{answer}"])
        row["random"] = run.find(method="random", ratio=ratio)
        row["published"] = run.find(method="infoflow", layers="published", ratio=ratio)
        row["unfitted"] = run.find_unfitted(name)
        for key in ("k_error", "v_error"):
            row[key] = np.array([run.by_pair[name, question][key] for question in run.ids], dtype=float)  # null: nan
        row["selected_v_error"] = run.selected_v_error(name)
        rows.append(row)
    return rows


def percent(value, interval=None):
    text = f"{100 * value:.0f}"
    return text if interval is None else f"{text} [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"


def against(row, base, answer="greedy"):
    """Paired difference of shares in points with its interval."""
    if base is None or base is row or row["name"] in ("full", "none"):
        return "–"
    difference = row[f"share_{answer}"] - base[f"share_{answer}"]
    return percent(difference.mean(), stats.bootstrap(np.mean, difference))


def mean_or_dash(values, digits):
    return "–" if np.isnan(values).any() else f"{values.mean():.{digits}f}"


def markdown(rows, n_question):
    by_name = {row["name"]: row for row in rows}
    lines = [
        "| configuration | rows | KL greedy | KL gold | NLL gold | F1 | EM | share % (greedy) | of means % | share % (gold) | of means % "
        "| random % | minus published, points (greedy) | (gold) | minus without refit, points (greedy) | (gold) | K / V error | V error of S |",
        "|---" * 18 + "|"]
    for row in rows:
        random, published, unfitted = (by_name.get(row[key]) for key in ("random", "published", "unfitted"))
        lines.append("| " + " | ".join([
            row["name"], f"{row['n_selected']:.0f}", mean_or_dash(row["kl_greedy"], 4), mean_or_dash(row["kl_gold"], 4),
            mean_or_dash(row["nll_gold"], 3), mean_or_dash(row["f1"], 3), mean_or_dash(row["exact"], 2),
            percent(row["share_greedy"].mean(), row["share_greedy_interval"]), percent(row["total_greedy"], row["total_greedy_interval"]),
            percent(row["share_gold"].mean(), row["share_gold_interval"]), percent(row["total_gold"], row["total_gold_interval"]),
            percent(random["share_greedy"].mean()) if random else "–",
            against(row, published), against(row, published, "gold"),
            against(row, unfitted), against(row, unfitted, "gold"),
            f"{mean_or_dash(row['k_error'], 3)} / {mean_or_dash(row['v_error'], 3)}",
            "{:.2f} → {:.2f}".format(*row["selected_v_error"]) if row["selected_v_error"] else "–"]) + " |")
    lines.append(f"\n{n_question} questions; intervals: 95 % bootstrap over questions, {stats.N_RESAMPLE} resamples, paired for differences.")
    return "\n".join(lines) + "\n"


def write_h5(path, run, rows, attributes):
    with h5py.File(path, "w") as file:
        file.attrs.update(attributes)
        file["configuration"] = [json.dumps(run.config[name], sort_keys=True) for name in run.names]
        file["question"] = run.ids
        for key in (*MEASURED, "f1", "exact", "share_greedy", "share_gold", "k_error", "v_error"):
            file[key] = np.array([row[key] for row in rows])
            file[key].attrs["axes"] = "configuration, question" + (", layer" if key.endswith("_error") else "")


def plot(path, rows, title):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row["name"] not in ("full", "none")]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 1.5 + 0.32 * len(shown)), layout="constrained")
    for answer, shift in (("greedy", -0.14), ("gold", 0.14)):
        mean = np.array([row[f"share_{answer}"].mean() for row in shown])
        interval = np.array([row[f"share_{answer}_interval"] for row in shown])
        left.errorbar(100 * mean, np.arange(len(shown)) + shift, xerr=100 * np.abs(interval.T - mean), fmt="o", capsize=3, label=f"{answer} answer")
    left.set_yticks(range(len(shown)), [row["name"] for row in shown])
    left.invert_yaxis()
    left.set_xlabel("recovered share of KL(full ‖ none), %, mean over questions")
    left.grid(axis="x", alpha=0.3)
    left.legend()
    for row in rows:
        if row["name"] != "full":
            right.plot(row["v_error"].mean(axis=0), label=row["name"], linewidth=1)
    right.set_xlabel("layer")
    right.set_ylabel("relative V error against full prefill")
    right.legend(fontsize=6)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", metavar="JSONL")
    parser.add_argument("--model", required=True, metavar="DIR", help="whose tokenizer.json decodes answers")
    parser.add_argument("--requests", required=True, metavar="FILE", help="the run's requests, with their gold answers")
    parser.add_argument("--part", choices=("all", "even", "odd"), default="all")
    parser.add_argument("--configs", metavar="FILE", help="rows of these configurations only, in this order (default: all)")
    parser.add_argument("--title", default="answer quality")
    parser.add_argument("--machine", default="", help="said in the outputs")
    parser.add_argument("--date", default="", help="said in the outputs")
    parser.add_argument("--out", required=True, metavar="STEM", help="writes STEM.md, STEM.h5, STEM.png")
    return parser.parse_args(arguments)


def main(arguments=None):
    from tokenizers import Tokenizer

    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    tokenizer = Tokenizer.from_file(os.path.join(options.model, "tokenizer.json"))
    golds = {request["id"]: request.get("answers", []) for request in read_json_lines(options.requests)}
    run = Run(read_lines(options.results, options.part, options.configs))
    rows = measure(run, lambda ids: tokenizer.decode(ids, skip_special_tokens=True), golds)
    command = "bench/quality_report.py " + shlex.join(arguments)
    about = f"{options.title}. {options.machine}, {options.date}. `{command}`"
    Path(f"{options.out}.md").write_text(f"{about}\n\n{markdown(rows, len(run.ids))}")
    write_h5(f"{options.out}.h5", run, rows, {"command": command, "machine": options.machine, "date": options.date})
    plot(f"{options.out}.png", rows, f"{options.title} ({len(run.ids)} questions)")


if __name__ == "__main__":
    main()
