"""A saved classifier in another engine over a table: ONNX Runtime in fp32 or int8, OpenVINO in fp32 or bf16.

Texts are sorted by length. ONNX Runtime takes batches of 32, as sentence-transformers' ONNX backend does; that backend
itself needs optimum-onnx, which refuses transformers 5, so the model is exported by torch.onnx and quantized with the
settings of the backend's `avx512_vnni` (dynamic, int8 weights by channel). OpenVINO takes batches of 2,048 tokens
through an asynchronous queue with 2 streams.

    python engine_score.py RUN_FOLDER ENGINE MODEL_FILE --prepare      # once; MODEL_FILE is .onnx, or .xml
    python engine_score.py RUN_FOLDER ENGINE MODEL_FILE --input INPUT.csv --output OUTPUT.csv
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

ENGINES = ("onnx-fp32", "onnx-int8", "openvino-fp32", "openvino-bf16")


def prepare(run, engine, path):
    """Convert a run folder's model, outside the measured time."""
    import torch
    from transformers import AutoModelForSequenceClassification

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = AutoModelForSequenceClassification.from_pretrained(
                run, dtype=torch.float32, attn_implementation="sdpa" if engine.startswith("openvino") else "eager"
            )

        def forward(self, ids, mask):
            return self.model(input_ids=ids, attention_mask=mask).logits

    model = Logits().eval()
    example = (torch.randint(5, 1000, (2, 20)), torch.ones(2, 20, dtype=torch.int64))
    example[1][0, 15:] = 0
    if engine.startswith("openvino"):
        import openvino

        openvino.save_model(openvino.convert_model(model, example_input=example), path, compress_to_fp16=False)
        return
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        plain = path if engine == "onnx-fp32" else Path(folder, "model.onnx")
        batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=512)
        torch.onnx.export(
            model,
            example,
            plain,
            input_names=["ids", "mask"],
            output_names=["logits"],
            dynamic_shapes={"ids": {0: batch, 1: length}, "mask": {0: batch, 1: length}},
            dynamo=True,
            external_data=False,
        )
        if engine == "onnx-int8":
            exported = onnx.load(plain)
            del exported.graph.value_info[:]  # the exporter's shapes, which quantize_dynamic finds at odds with its own
            onnx.save(exported, plain)
            quantize_dynamic(plain, path, per_channel=True, weight_type=QuantType.QInt8)


def batches(order, lengths, most_texts, most_tokens):
    """Texts in `order`, the longest first, so many at once."""
    start = 0
    while start < len(order):
        size = max(1, min(most_texts, most_tokens // lengths[order[start]]))
        yield order[start : start + size]
        start += size


def padded(ids, index):
    """The texts at `index` as arrays of ids and mask."""
    longest = max(len(ids[i]) for i in index)
    table = np.zeros((len(index), longest), dtype=np.int64)
    mask = np.zeros_like(table)
    for row, i in enumerate(index):
        table[row, : len(ids[i])] = ids[i]
        mask[row, : len(ids[i])] = 1
    return table, mask


def onnx_logits(path, ids):
    """Logits of each text, by ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    lengths = np.array([len(one) for one in ids])
    found = {}
    for index in batches(np.argsort(-lengths, kind="stable"), lengths, 32, 10**9):
        table, mask = padded(ids, index)
        [logits] = session.run(["logits"], {"ids": table, "mask": mask})
        found.update(zip(index.tolist(), logits, strict=True))
    return np.stack([found[i] for i in range(len(ids))])


def openvino_logits(path, ids, precision):
    """Logits of each text, by OpenVINO."""
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32"}.get(precision, precision),
        "NUM_STREAMS": 2,
        "INFERENCE_NUM_THREADS": os.cpu_count(),
    }
    model = openvino.Core().compile_model(path, "CPU", settings)
    queue = openvino.AsyncInferQueue(model, 4)
    lengths = np.array([len(one) for one in ids])
    found = {}

    def keep(request, index):
        found.update(zip(index.tolist(), request.get_output_tensor(0).data.copy(), strict=True))

    queue.set_callback(keep)
    for index in batches(np.argsort(-lengths, kind="stable"), lengths, 10**9, 2048):
        queue.start_async(list(padded(ids, index)), index)
    queue.wait_all()
    return np.stack([found[i] for i in range(len(ids))])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--input")
    parser.add_argument("--output")
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(arguments.run, arguments.engine, arguments.model)
        return
    from tokenizers import Tokenizer

    table = pd.read_csv(arguments.input, keep_default_na=False)
    tokenizer = Tokenizer.from_file(str(Path(arguments.run, "tokenizer.json")))
    tokenizer.no_padding()
    settings = json.loads(Path(arguments.run, "tokenizer_config.json").read_text())
    tokenizer.enable_truncation(min(512, settings["model_max_length"]))
    names = json.loads(Path(arguments.run, "config.json").read_text())["id2label"]
    began = time.perf_counter()
    ids = [one.ids for one in tokenizer.encode_batch(table["sentence"].tolist())]
    name, precision = arguments.engine.split("-")
    by_onnx = name == "onnx"
    logits = onnx_logits(arguments.model, ids) if by_onnx else openvino_logits(arguments.model, ids, precision)
    seconds = time.perf_counter() - began
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    table["prediction"] = [names[str(i)] for i in logits.argmax(axis=1)]
    table["confidence"] = (shares / shares.sum(axis=1, keepdims=True)).max(axis=1)
    table.to_csv(arguments.output, index=False)
    print(json.dumps({"score_seconds": seconds, "texts": len(table)}))


if __name__ == "__main__":
    main()
