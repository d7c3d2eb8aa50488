"""transformers' pipeline at batches of 32 over a table: CSV in, CSV out.

python pipeline_score.py RUN_FOLDER INPUT.csv OUTPUT.csv
"""

import argparse
import json
import time

import pandas as pd
from transformers import pipeline


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("input")
    parser.add_argument("output")
    arguments = parser.parse_args()
    table = pd.read_csv(arguments.input, keep_default_na=False)
    classify = pipeline("text-classification", model=arguments.run)
    began = time.perf_counter()
    answers = classify(table["sentence"].tolist(), batch_size=32, truncation=True)
    seconds = time.perf_counter() - began
    table["prediction"] = [answer["label"] for answer in answers]
    table["confidence"] = [answer["score"] for answer in answers]
    table.to_csv(arguments.output, index=False)
    print(json.dumps({"score_seconds": seconds, "texts": len(table), "dtype": str(classify.model.dtype)}))


if __name__ == "__main__":
    main()
