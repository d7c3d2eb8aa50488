"""SetFit's second phase alone: `Trainer.train_classifier`, its default head on the body as it comes.

python setfit_head.py MODEL_FOLDER TRAIN.csv TEST.csv
"""

import argparse
import json

import pandas as pd
from datasets import Dataset
from setfit import SetFitModel, Trainer


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
    model = SetFitModel.from_pretrained(arguments.model)
    rows = Dataset.from_dict({"text": train["sentence"].tolist(), "label": train["label"].tolist()})
    trainer = Trainer(model=model, train_dataset=rows)
    trainer.train_classifier(*trainer.dataset_to_parameters(rows))
    predicted = model.predict(test["sentence"].tolist(), as_numpy=True)
    print(json.dumps({"accuracy": float((predicted == test["label"].to_numpy()).mean())}))


if __name__ == "__main__":
    main()
