#!/usr/bin/env python3
"""Make one request of every length out of packed ones: real text for `ifkv bench prefill --requests`.

Prefix, prompt and question are those of the first request of the input; its chunks come first, then those of the others, the last one
cut so that prefix, chunks and prompt have exactly the wanted number of tokens.
"""
import argparse
import json
import sys


def cut(requests, length):
    first = requests[0]
    left = length - len(first["prefix"]) - len(first["prompt"])
    chunks = []
    for chunk in (chunk for request in requests for chunk in request["chunks"]):
        if left <= 0:
            break
        chunks.append(chunk[:left])
        left -= len(chunks[-1])
    if left:
        sys.exit(f"cut_requests: error: {length} tokens wanted, {left} too many for these requests")
    kept = {key: first[key] for key in ("prefix", "prompt", "question") if key in first}
    return {"id": str(length), **kept, "chunks": chunks}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", required=True, metavar="FILE", help="JSON lines of `launch/ifkv_text.py pack`")
    parser.add_argument("--lengths", default="2048,4096,8192", metavar="N,...", help="tokens with prompt (default: %(default)s)")
    options = parser.parse_args()
    with open(options.requests) as file:
        requests = [json.loads(line) for line in file]
    for length in options.lengths.split(","):
        print(json.dumps(cut(requests, int(length))))


if __name__ == "__main__":
    main()
