"""Which head is best? A grid search with cross-validation, for which the encoder reads each text once.

It uses the sample set; `TABLE=reviews.csv python examples/grid_search.py` takes another table of `sentence,label`.
"""

import os

import polars as pl
from sklearn.model_selection import GridSearchCV

from headstart import TextClassifier
from headstart.tables import resolve_path

GRID = {"lr": [3e-4, 1e-3], "class_weight": ["balanced", None]}


def main() -> None:
    """Search, and print every candidate, the best first."""
    rows = pl.read_csv(resolve_path(os.environ.get("TABLE", "sample")))
    search = GridSearchCV(TextClassifier(thaw=0, random_state=0), GRID, cv=3, scoring="f1_macro")
    search.fit(rows["sentence"].to_list(), rows["label"].to_list())
    found = search.cv_results_
    for i in found["rank_test_score"].argsort():
        print(f"{found['mean_test_score'][i]:.3f} ± {found['std_test_score'][i]:.3f}  {found['params'][i]}")
    features = search.best_estimator_.features_
    print(f"best: {search.best_params_}; {features['encoded']} of {features['texts']} texts had to be encoded for it")


if __name__ == "__main__":
    main()
