#!/usr/bin/env python3
"""Plots of `ifkv bench prefill`: bench.jsonl to PNG files beside it.

    bench/plot.py OUT [--link NAME]

ttft.png: time to first token and speed-up over `full` against length, the spread of the runs as bars; stages.png: where the time goes,
for the longest length; bytes.png: what the ranks receive; share.png: TFLOP/s, and the share of the floor.  Projected rows are drawn dashed and say so; of several links one is drawn
(--link, default the first whose name holds "nominal", else the first).
"""
import argparse
import json
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

STAGES = ["place", "encode", "score", "select", "recompute", "prompt"]


def read_rows(path, link):
    with open(path) as f:
        rows = [json.loads(line) for line in f]
    if not rows or {row["kind"] for row in rows} != {"prefill"} or any(row["time"] == "emulated" for row in rows):
        raise SystemExit(f"plot: {path}: expected rows of `ifkv bench prefill`, from no emulated device")
    names = list(dict.fromkeys(row["link"]["name"] for row in rows if "link" in row))
    if names:
        link = link or next((name for name in names if "nominal" in name), names[0])
        if link not in names:
            raise SystemExit(f"plot: no link {link!r}; there are {', '.join(names)}")
        rows = [row for row in rows if row.get("link", {}).get("name") == link]
    return rows, link if names else None


def name_of(row):
    label = row["label"]
    return label if row["exchange"] in ("none", row["method"]) or "/" + row["exchange"] in label else f"{label} {row['exchange']}"


def title_of(rows, link):
    row = rows[0]
    chunk = f"of {row['chunk']}" if row["chunk"] else "as given"
    kind = f"PROJECTED, links {link}" if link else "measured"
    return (f"{os.path.basename(row['model'].rstrip('/'))}, {row['ranks']} ranks of {row['threads']} threads, {row['backend']}, "
            f"ratio {row['ratio']}, chunks {chunk}\n{kind}, {row['date'][:10]}")


def draw_times(rows, link, path):
    figure, (time, speed) = plt.subplots(1, 2, figsize=(11, 4.2))
    for name in dict.fromkeys(map(name_of, rows)):
        own = sorted((row for row in rows if name_of(row) == name), key=lambda row: row["tokens"])
        tokens = [row["tokens"] for row in own]
        below = [row["ttft_ms"] - row["min_ms"] for row in own]
        above = [row["max_ms"] - row["ttft_ms"] for row in own]
        style = {"marker": "o", "linestyle": "--" if link else "-", "label": name, "capsize": 3}
        time.errorbar(tokens, [row["ttft_ms"] for row in own], yerr=[below, above], **style)
        speed.plot(tokens, [row["speedup"] for row in own], marker="o", linestyle=style["linestyle"], label=name)
    for axes, label in ((time, "time to first token, ms"), (speed, "speed-up over full")):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    time.set_yscale("log")
    speed.axhline(1, color="black", linewidth=0.8)
    speed.legend(fontsize=8)
    finish(figure, rows, link, path)


def draw_stages(rows, link, path):
    longest = max(row["tokens"] for row in rows)
    own = [row for row in rows if row["tokens"] == longest]
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(own) + 2))
    left = [0.0] * len(own)
    for stage in STAGES:
        width = [row["ms"][stage] for row in own]
        axes.barh([name_of(row) for row in own], width, left=left, label=stage)
        left = [a + b for a, b in zip(left, width)]
    axes.invert_yaxis()
    axes.set_xlabel(f"ms at {longest} tokens; each stage is the maximum over ranks")
    axes.legend(fontsize=8)
    finish(figure, rows, link, path)


def draw_bytes(rows, link, path):
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for name in dict.fromkeys(map(name_of, rows)):
        own = sorted((row for row in rows if name_of(row) == name), key=lambda row: row["tokens"])
        axes.plot([row["tokens"] for row in own], [row["bytes"]["total"] / 1e6 for row in own], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens")
    axes.set_ylabel("MB received, all ranks and stages (counted)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    finish(figure, rows, link, path)


def draw_share(rows, link, path):
    figure, (work, share) = plt.subplots(1, 2, figsize=(11, 4.2))
    for name in dict.fromkeys(map(name_of, rows)):
        own = sorted((row for row in rows if name_of(row) == name), key=lambda row: row["tokens"])
        tokens = [row["tokens"] for row in own]
        style = {"marker": "o", "linestyle": "--" if link else "-", "label": name}
        work.plot(tokens, [row["tflops"] for row in own], **style)
        share.plot(tokens, [100 * row["floor_share"] for row in own], **style)
    for axes, label in ((work, "TFLOP/s, all ranks"), (share, f"% of the floor, rates {rows[0]['rates']['source']}")):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    work.legend(fontsize=8)
    finish(figure, rows, link, path)


def finish(figure, rows, link, path):
    figure.suptitle(title_of(rows, link), fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="what --out of ifkv bench named")
    parser.add_argument("--link", help="of projected rows")
    args = parser.parse_args()
    rows, link = read_rows(os.path.join(args.out, "bench.jsonl"), args.link)
    for name, draw in (("ttft", draw_times), ("stages", draw_stages), ("bytes", draw_bytes), ("share", draw_share)):
        draw(rows, link, os.path.join(args.out, name + ".png"))


if __name__ == "__main__":
    main()
