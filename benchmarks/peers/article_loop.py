"""The tutorial's training loop, transcribed plainly: what most people run today.

Frozen BERT in every step of every epoch, pooled output -> 512 -> ReLU -> dropout -> labels -> LogSoftmax, NLL with
balanced class weights, AdamW at 1e-5, batches of 32 padded to 17 tokens, gradient norm 1.0, 10 epochs, the epoch with
the lowest validation loss kept, a classification report on test.

    python article_loop.py MODEL_FOLDER TABLE.csv [--epochs 10]
"""

import argparse
import json
import time

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import classification_report
from sklearn.model_selection import train_test_split
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, TensorDataset
from transformers import AutoModel, AutoTokenizer

SEED = 2021


class Classifier(nn.Module):
    def __init__(self, bert, labels):
        super().__init__()
        self.bert = bert
        self.dropout = nn.Dropout(0.2)
        self.relu = nn.ReLU()
        self.fc1 = nn.Linear(bert.config.hidden_size, 512)
        self.fc2 = nn.Linear(512, labels)
        self.softmax = nn.LogSoftmax(dim=1)

    def forward(self, ids, mask):
        pooled = self.bert(ids, attention_mask=mask).pooler_output
        x = self.dropout(self.relu(self.fc1(pooled)))
        return self.softmax(self.fc2(x))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("table")
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    table = pd.read_csv(arguments.table)
    names = sorted(table["label"].unique())
    labels = table["label"].map({name: i for i, name in enumerate(names)})
    split = {"random_state": SEED}
    train_text, rest_text, train_y, rest_y = train_test_split(
        table["sentence"], labels, test_size=0.3, stratify=labels, **split
    )
    val_text, test_text, val_y, test_y = train_test_split(rest_text, rest_y, test_size=0.5, stratify=rest_y, **split)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)

    def tensors(texts, y):
        encoded = tokenizer(
            texts.tolist(), max_length=17, padding="max_length", truncation=True, return_token_type_ids=False
        )
        return TensorDataset(
            torch.tensor(encoded["input_ids"]), torch.tensor(encoded["attention_mask"]), torch.tensor(y.tolist())
        )

    train, validation, test = tensors(train_text, train_y), tensors(val_text, val_y), tensors(test_text, test_y)
    train_loader = DataLoader(train, sampler=RandomSampler(train), batch_size=32)
    validation_loader = DataLoader(validation, sampler=SequentialSampler(validation), batch_size=32)
    bert = AutoModel.from_pretrained(arguments.model, dtype=torch.float32)
    for parameter in bert.parameters():
        parameter.requires_grad = False
    model = Classifier(bert, len(names))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    weights = compute_class_weight("balanced", classes=np.unique(train_y), y=train_y)
    loss_of = nn.NLLLoss(weight=torch.tensor(weights, dtype=torch.float))
    best, best_state = float("inf"), None
    for epoch in range(arguments.epochs):
        began = time.time()
        model.train()
        for ids, mask, y in train_loader:
            model.zero_grad()
            loss = loss_of(model(ids, mask), y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.eval()
        total = 0.0
        with torch.no_grad():
            for ids, mask, y in validation_loader:
                total += loss_of(model(ids, mask), y).item()
        total /= len(validation_loader)
        if total < best:
            best = total
            best_state = {name: value.clone() for name, value in model.state_dict().items()}
        print(f"epoch {epoch + 1}: validation loss {total:.4f}, {time.time() - began:.1f} s", flush=True)
    model.load_state_dict(best_state)
    predicted = []
    with torch.no_grad():
        for ids, mask, _ in DataLoader(test, batch_size=32):
            predicted.append(model(ids, mask).argmax(dim=1))
    predicted = torch.cat(predicted).numpy()
    print(classification_report(test_y, predicted))
    print(json.dumps({"accuracy": float((predicted == test_y.to_numpy()).mean())}))


if __name__ == "__main__":
    main()
