"""A first look at a table with headstart, cell by cell: open it in VS Code, PyCharm or Jupyter (with jupytext).

It uses the sample set; TABLE=reviews.csv in the environment, or another name in the first cell, takes yours.
"""

# %% The table: a column with text, a column with labels
import os

import polars as pl

import headstart
from headstart.tables import resolve_path

table = resolve_path(os.environ.get("TABLE", "sample"))
rows = pl.read_csv(table)
print(rows["label"].value_counts())
print(rows.head(3))

# %% Train: the head alone, in seconds; without thaw=0 the encoder is fine-tuned, too
run = headstart.train(table, out="runs/notebook", thaw=0, overwrite=True)
print(run.summary())

# %% Look: is it better than simple baselines, and where is it wrong?
test, baselines = run.metrics["test"], run.metrics["baselines"]
low, high = test["accuracy_ci95"]
print(f"accuracy {test['accuracy']:.3f} ({low:.3f} to {high:.3f}), TF-IDF {baselines['tfidf_logreg']['accuracy']:.3f}")
tested = pl.read_csv(run.folder / "predictions.csv")
wrong = tested.filter(pl.col("label") != pl.col("prediction")).sort("confidence", descending=True)
print(wrong.select("text", "label", "prediction", "confidence").head(5))

# %% Probabilities of new texts
texts = ["A lovely little hotel, and we will be back.", "Great camera, but the battery dies by noon."]
predictor = headstart.load(run.folder)
for text, shares in zip(texts, predictor.predict_proba(texts), strict=True):
    print({name: round(float(share), 3) for name, share in zip(predictor.names, shares, strict=True)}, text)

# %% Which words decided?
from headstart.encoder import choose_placement
from headstart.explain import explain
from headstart.model import load_run

classifier = load_run(run.folder, choose_placement("auto", "fp32"))
for word in sorted(explain(classifier, texts[1]).words, key=lambda word: -abs(word.score or 0)):
    print(word)
