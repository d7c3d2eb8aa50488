"""Which words pushed a decision, and by how much; and which training texts are nearest.

A word's score is its share of the predicted label's log-odds, from a text whose words are all masked to the text as it
is. This room knows gradients and words. It draws nothing.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headstart.config import from_file, settings
from headstart.encoder import encode
from headstart.errors import InputError
from headstart.model import TorchClassifier
from headstart.predict import probabilities_of
from headstart.prepare import data_fingerprint, prepare
from headstart.runs import read_json

POINTS, FEW = 50, 4  # points on the path: so many that scores add up, and as few as tell the words that count
AT_ONCE = 4096  # tokens of them that are computed together
# A run of signs without a space; scripts written without spaces have a word a sign.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORDS = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")


@dataclass(frozen=True)
class Word:
    """A word of a text, where it stands in it, and its score: above 0 where it speaks for the predicted label.

    The score of a word beyond max_length, which was not read, is None.
    """

    word: str
    start: int
    end: int
    score: float | None


@dataclass(frozen=True)
class Explanation:
    """Why a text got its label: scores add up to the change in log-odds, but for `completeness_error`."""

    text: str
    label: str
    confidence: float
    words: tuple[Word, ...]
    completeness_error: float


def explain(classifier: TorchClassifier, text: str, points: int = POINTS) -> Explanation:
    """Explain a text's label by integrated gradients, taken at so many points; an `InputError` if the text is blank."""
    if not text.strip():
        raise InputError("There is nothing to explain in a blank text.")
    scorer, tokenizer = classifier.model, classifier.tokenizer
    encoding = tokenizer.fast.encode(text)
    ids = torch.from_numpy(tokenizer.truncate(tokenizer([text]), classifier.max_length)[0][None].astype(np.int64))
    read = ids.shape[1] - (len(tokenizer.suffix) if ids.shape[1] < len(encoding.ids) else 0)
    masked = ids.clone()
    masked[0, :read][torch.tensor(encoding.special_tokens_mask[:read]) == 0] = tokenizer.mask_id

    def logits_of(states: torch.Tensor) -> torch.Tensor:
        return scorer.onward(states, torch.ones(states.shape[:2], dtype=torch.int64, device=states.device)).float()

    with torch.no_grad():
        states, start = (scorer.embedded(one.to(scorer.device)) for one in (ids, masked))
        logits = logits_of(torch.cat([states, start]))
    best = int(logits[0].argmax())

    def log_odds(logits: torch.Tensor) -> torch.Tensor:
        others = torch.cat([logits[:, :best], logits[:, best + 1 :]], dim=1)
        return logits[:, best] - others.logsumexp(dim=1)

    shares = integrated_gradients(lambda path: log_odds(logits_of(path)), start, states, points)
    scores = shares[0].sum(dim=-1).tolist()
    change = float(-log_odds(logits).diff())
    words, offsets = [], encoding.offsets[:read]
    unread = max(high for _, high in offsets)  # words from here on need not be looked for
    for found in WORDS.finditer(text):
        places = enumerate(offsets if found.start() < unread else ())
        own = [scores[i] for i, (low, high) in places if low < found.end() and high > found.start()]
        words.append(Word(found[0], *found.span(), sum(own) if own else None))
    confidence = float(probabilities_of(logits[:1].cpu()).max())
    return Explanation(text, classifier.names[best], confidence, tuple(words), abs(change - sum(scores)))


def integrated_gradients(
    function: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, end: torch.Tensor, points: int
) -> torch.Tensor:
    """What each number of `end`, (1, length, hidden), adds to a function of (n, length, hidden) states to (n,) numbers.

    Sundararajan et al. 2017; its integral from `start` to `end` by the midpoint rule. The same shape.
    """
    way, total = end - start, torch.zeros_like(end)
    middles = (torch.arange(points, device=end.device) + 0.5) / points
    for some in middles.split(max(1, AT_ONCE // end.shape[1])):
        path = (start + way * some[:, None, None]).requires_grad_()
        (gradients,) = torch.autograd.grad(function(path).sum(), path)
        total += gradients.sum(dim=0)
    return total / points * way


def neighbours(folder: Path, text: str, most: int = 5) -> list[dict[str, Any]]:
    """The training texts of a run that are most like a text, each once: text, label, similarity.

    That is the cosine of the means of their last layers. An `InputError` if the run's table is gone or has changed.
    """
    info = read_json(folder, "headstart.json")
    config = settings(info["settings"]["data"], **from_file(str(folder / "headstart.json")))
    ready = prepare(config)
    if data_fingerprint(ready.splits) != info["data"]:
        raise InputError(f"{config.data}: has changed since {folder} was trained.")
    encoder, train, layout = ready.encoder, ready.splits.train, ready.features.layout
    last = [name for name in layout if name.startswith("mean-")][-1]
    tokens = encoder.tokenizer.truncate(encoder.tokenizer([text]), ready.max_length)
    ((_, vectors),) = encode(encoder, tokens, layout)
    asked = torch.from_numpy(vectors[:, layout.index(last)]).float()
    rows = torch.from_numpy(ready.featured[0].columns([last])[:, 0])
    cosines = torch.nn.functional.cosine_similarity(rows, asked, dim=1)
    found: dict[str, dict[str, Any]] = {}
    for i in cosines.argsort(descending=True, stable=True).tolist():
        one = {"text": train.texts[i], "label": train.names[train.labels[i]], "similarity": float(cosines[i])}
        found.setdefault(train.texts[i], one)
        if len(found) == most:
            break
    return list(found.values())
