"""headstart's frozen pass alone over a table's texts: seconds, and the floating-point operations that it needs.

python encode_pass.py minilm TABLE.csv --precision auto|fp32|bf16
"""

import argparse
import csv
import json
import time

import numpy as np

from headstart.encoder import Encoder, choose_placement, encode, stored_layout


def flops(lengths, config):
    """2N a token and 4·s·d·L for attention over s tokens, N = L(4d² + 2·d·d_ff) (Kaplan et al. 2020, table 1)."""
    width, layers = config.hidden_size, config.num_hidden_layers
    weights = layers * (4 * width**2 + 2 * width * config.intermediate_size)
    return float((lengths * 2 * weights + 4 * lengths.astype(np.float64) ** 2 * width * layers).sum())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("table")
    parser.add_argument("--precision", default="auto")
    arguments = parser.parse_args()
    with open(arguments.table, encoding="utf-8", newline="") as file:
        texts = [row["sentence"] for row in csv.DictReader(file)]
    encoder = Encoder(arguments.model, choose_placement("auto", arguments.precision))
    layout = stored_layout(encoder)
    for _ in encode(encoder, encoder.tokenizer(texts[:64]), layout):
        pass  # the first batches are slower: not counted
    began = time.perf_counter()
    tokens = encoder.tokenizer.truncate(encoder.tokenizer(texts), encoder.max_length)
    tokenized = time.perf_counter()
    done = sum(len(index) for index, _ in encode(encoder, tokens, layout))
    ended = time.perf_counter()
    if done != len(texts):
        raise SystemExit(f"{done} of {len(texts)} texts were encoded.")
    answer = {
        "texts": len(texts),
        "encode_seconds": ended - began,
        "pass_seconds": ended - tokenized,
        "flop": flops(tokens.lengths, encoder.config),
        "precision": encoder.placement.precision,
        "placement": encoder.placement.reason,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
