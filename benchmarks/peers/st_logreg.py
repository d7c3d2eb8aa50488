"""sentence-transformers' encode, as it comes (batches of 32, fp32), and scikit-learn's logistic regression on top.

python st_logreg.py MODEL_FOLDER TRAIN.csv TEST.csv
"""

import argparse
import json
import time

import pandas as pd
from sentence_transformers import SentenceTransformer
from sklearn.linear_model import LogisticRegression


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("train")
    parser.add_argument("test")
    arguments = parser.parse_args()
    train, test = (
        pd.read_csv(arguments.train, keep_default_na=False),
        pd.read_csv(arguments.test, keep_default_na=False),
    )
    model = SentenceTransformer(arguments.model)
    model.encode(train["sentence"][:64].tolist())  # the first batches are slower: not counted
    began = time.perf_counter()
    features = model.encode(train["sentence"].tolist())
    seconds = time.perf_counter() - began
    head = LogisticRegression(max_iter=1000).fit(features, train["label"])
    predicted = head.predict(model.encode(test["sentence"].tolist()))
    accuracy = float((predicted == test["label"]).mean())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    print(json.dumps({"accuracy": accuracy, "encode_seconds": seconds, "texts": len(train), "dtype": dtype}))


if __name__ == "__main__":
    main()
