"""Hugging Face Trainer on a frozen body: its defaults, the article's split, length and epochs, dynamic padding.

python trainer_frozen.py MODEL_FOLDER TABLE.csv [--epochs 10]
"""

import argparse
import json
import tempfile

import pandas as pd
import torch
from datasets import Dataset
from sklearn.model_selection import train_test_split
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

SEED = 2021


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("table")
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    table = pd.read_csv(arguments.table, keep_default_na=False)
    names = sorted(table["label"].unique())
    table["label"] = table["label"].map({name: i for i, name in enumerate(names)})
    train, rest = train_test_split(table, test_size=0.3, stratify=table["label"], random_state=SEED)
    _, test = train_test_split(rest, test_size=0.5, stratify=rest["label"], random_state=SEED)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)

    def tokenized(part):
        rows = Dataset.from_pandas(part, preserve_index=False)
        return rows.map(lambda batch: tokenizer(batch["sentence"], truncation=True, max_length=17), batched=True)

    model = AutoModelForSequenceClassification.from_pretrained(
        arguments.model, num_labels=len(names), dtype=torch.float32
    )
    for parameter in model.base_model.parameters():
        parameter.requires_grad = False
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                folder, num_train_epochs=arguments.epochs, save_strategy="no", report_to="none", seed=SEED
            ),
            train_dataset=tokenized(train),
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        trainer.train()
        predicted = trainer.predict(tokenized(test)).predictions.argmax(axis=1)
    print(json.dumps({"accuracy": float((predicted == test["label"].to_numpy()).mean())}))


if __name__ == "__main__":
    main()
