#!/usr/bin/env python3
"""Print the stage times of several runs of `ifkv prefill` side by side, one column a run.

Usage: stage_table.py RESULTS...   (output directories, or their results.jsonl)
Reads what formats.md promises of results.jsonl and nothing else.  A request gets a table if every
run has it; a stage that rode in another says so, since its zero is not a time.
Exit: 0 printed, 2 usage, 65 bad data, 66 a file is missing.
"""
import json
import os
import sys

STAGES = ("place", "encode", "score", "select", "recompute", "prompt", "ttft", "decode")
EXIT_USAGE, EXIT_DATA, EXIT_MISSING = 2, 65, 66


def read_results(path):
    if os.path.isdir(path):
        path = os.path.join(path, "results.jsonl")
    with open(path, encoding="utf-8") as file:
        results = [json.loads(line) for line in file if line.strip()]
    return {result["id"]: result for result in results}


def bytes_text(count):
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def column(result):
    def stage(name):
        if name in result.get("rode", ()):
            return "rode"
        return f"{result['ms'][name]:.1f}" if name in result["ms"] else "-"

    selected = f"{result['n_selected']}/{result['n_context']}"
    size = result.get("size", 1)
    heading = f"{result.get('method', '?')}, {size} rank{'s' if size != 1 else ''}"
    return [heading, *map(stage, STAGES), bytes_text(result["bytes"]["total"]), selected]


def print_table(results):
    labels = ["ms", *STAGES, "bytes moved", "selected/context"]
    columns = [labels, *map(column, results)]
    widths = [max(map(len, cells)) for cells in columns]
    for row in zip(*columns):
        label = row[0].ljust(widths[0])
        print("  ".join([label, *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]))


def main(paths):
    if not paths:
        print("usage: stage_table.py RESULTS...", file=sys.stderr)
        return EXIT_USAGE
    runs = []
    for path in paths:
        try:
            runs.append(read_results(path))
        except OSError as error:
            print(f"stage_table: error: {error.filename}: {error.strerror}", file=sys.stderr)
            return EXIT_MISSING
        except (ValueError, KeyError, TypeError) as error:
            print(f"stage_table: error: {path}: got {error}, expected one result a line", file=sys.stderr)
            return EXIT_DATA
    shared = [name for name in runs[0] if all(name in run for run in runs)]
    for name in shared:
        if len(shared) > 1:
            print(f"\n{ascii(name)}")
        try:
            print_table([run[name] for run in runs])
        except (KeyError, TypeError, ValueError) as error:
            print(f"stage_table: error: {ascii(name)}: got a result without {error}, expected ms, bytes and counts", file=sys.stderr)
            return EXIT_DATA
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
