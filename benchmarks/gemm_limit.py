"""The best matrix-product rate of this CPU in the shapes of MiniLM's layers, in FLOP/s: the limit of its frozen pass.

Of each shape the best over 1,024 to 8,192 rows and over torch's `linear`, oneDNN's own, and oneDNN's with its weights
packed beforehand. The rate of a whole layer weights the four shapes as a layer has them.
"""

import json
import time

import torch
from torch.nn import functional as F

SHAPES = ((384, 1152), (384, 384), (384, 1536), (1536, 384))
ROWS = (1024, 2048, 4096, 8192)
SECONDS_EACH = 0.06


def best_rate(multiply, flop):
    """The highest FLOP/s over some repeats."""
    multiply()
    best, deadline = float("inf"), time.perf_counter() + SECONDS_EACH
    while (began := time.perf_counter()) < deadline:
        multiply()
        best = min(best, time.perf_counter() - began)
    return flop / best


def shape_rate(inputs, outputs, dtype):
    """The highest FLOP/s of one shape."""
    rates = []
    for rows in ROWS:
        x, weight = torch.randn(rows, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
        bias, flop = torch.randn(outputs, dtype=dtype), 2 * rows * inputs * outputs
        rates.append(best_rate(lambda: F.linear(x, weight, bias), flop))  # noqa: B023  # called at once
        if torch.backends.mkldnn.is_available():
            linear = torch.ops.mkldnn._linear_pointwise
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
            for form in (weight, packed):
                rates.append(best_rate(lambda: linear(x, form, bias, "none", [], ""), flop))  # noqa: B023
    return max(rates)


def main():
    answer = {}
    with torch.inference_mode():
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            rates = [shape_rate(inputs, outputs, dtype) for inputs, outputs in SHAPES]
            work = [inputs * outputs for inputs, outputs in SHAPES]
            answer[f"{name}_layer"] = sum(work) / sum(part / rate for part, rate in zip(work, rates, strict=True))
            answer[f"{name}_best_shape"] = max(rates)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
