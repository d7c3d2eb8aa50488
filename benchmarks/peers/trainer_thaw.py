"""Hugging Face Trainer fine-tuning a whole model, with dynamic padding; --fast adds bf16 and batches of like length.

python trainer_thaw.py MODEL_FOLDER TRAIN.csv TEST.csv [--epochs 3] [--batch 32] [--lr 1e-4] [--seed 2021] [--fast]
"""

import argparse
import json
import tempfile

import pandas as pd
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

FAST = {"bf16": True, "train_sampling_strategy": "group_by_length"}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=2021)
    parser.add_argument("--fast", action="store_true")
    arguments = parser.parse_args()
    train, test = (pd.read_csv(path, keep_default_na=False) for path in (arguments.train, arguments.test))
    names = sorted(train["label"].unique())
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)

    def tokenized(table):
        rows = Dataset.from_dict(
            {"sentence": table["sentence"].tolist(), "label": [names.index(label) for label in table["label"]]}
        )
        return rows.map(lambda batch: tokenizer(batch["sentence"], truncation=True), batched=True)

    model = AutoModelForSequenceClassification.from_pretrained(
        arguments.model, num_labels=len(names), dtype=torch.float32
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=arguments.batch,
            learning_rate=arguments.lr,
            seed=arguments.seed,
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            **(FAST if arguments.fast else {}),
        )
        trainer = Trainer(
            model=model, args=settings, train_dataset=tokenized(train), data_collator=DataCollatorWithPadding(tokenizer)
        )
        took = trainer.train().metrics["train_runtime"]
        found = trainer.predict(tokenized(test))  # with length groups in another order than the table's
    accuracy = float((found.predictions.argmax(axis=1) == found.label_ids).mean())
    print(json.dumps({"accuracy": accuracy, "fit_seconds": took}))


if __name__ == "__main__":
    main()
