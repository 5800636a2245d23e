#!/usr/bin/env python3
"""Write the token ids of each question's first gold answer, to be forced by `quality --gold`.

The answer stands where the model's own would: right behind the assistant header, without a leading
space and without an end-of-turn id.  Ids come from the tokenizer that packed the requests.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "launch"))
import ifkv_text  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--requests", required=True, metavar="FILE", help="made by ifkv_text.py pack")
    parser.add_argument("--out", required=True, metavar="FILE")
    options = parser.parse_args()
    encoder = ifkv_text.TextEncoder(options.model, "error", False)
    requests = [(where, value) for where, value in ifkv_text.read_json_lines(options.requests, "error")]
    answered = [(where, value) for where, value in requests if value.get("answers")]
    gold = encoder.encode([(where, value["answers"][0]) for where, value in answered])
    with open(options.out, "w") as out:
        for (_, value), ids in zip(answered, gold):
            out.write(json.dumps({"id": value["id"], "gold": ids}) + "\n")


if __name__ == "__main__":
    main()
