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
from headstart.tokens import ragged

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
    special, all_ids = np.array(encoding.special_tokens_mask), np.array(encoding.ids, dtype=np.int32)
    places = tokenizer.places(len(all_ids), classifier.max_length, classifier.long)
    pieces = ragged([all_ids[one] for one in places])
    ids, mask = map(torch.from_numpy, pieces.padded(np.arange(len(places)), tokenizer.pad_id))
    words = torch.from_numpy(ragged([1 - special[one] for one in places]).padded(np.arange(len(places)), 0)[0]) == 1
    masked = torch.where(words, tokenizer.mask_id, ids)

    def logits_of(states: torch.Tensor) -> torch.Tensor:  # (n, pieces, length, hidden) to (n, labels)
        every = mask.to(states.device).repeat(len(states), 1)
        return scorer.onward(states.flatten(0, 1), every).float().unflatten(0, states.shape[:2]).mean(dim=1)

    with torch.no_grad():
        states, start = (scorer.embedded(one.to(scorer.device)) for one in (ids, masked))
        logits = logits_of(torch.stack([states, start]))
    best = int(logits[0].argmax())

    def log_odds(logits: torch.Tensor) -> torch.Tensor:
        others = torch.cat([logits[:, :best], logits[:, best + 1 :]], dim=1)
        alone = classifier.problem == "multi"  # no label speaks against another
        return logits[:, best] - (0 if alone else others.logsumexp(dim=1))

    found = integrated_gradients(lambda path: log_odds(logits_of(path)), start, states, points)
    shares, read = np.zeros(len(all_ids)), np.zeros(len(all_ids), dtype=bool)
    for place, of_piece in zip(places, found.sum(dim=-1).double().cpu().numpy(), strict=True):
        shares[place] += of_piece[: len(place)]
        read[place] = True
    change, content = float(-log_odds(logits).diff()), np.flatnonzero(special == 0)
    begins, ends = np.array(encoding.offsets).reshape(-1, 2)[content].T
    marked = []
    for word in WORDS.finditer(text):
        low, high = np.searchsorted(ends, word.start(), "right"), np.searchsorted(begins, word.end(), "left")
        own = content[low:high][read[content[low:high]]]
        marked.append(Word(word[0], *word.span(), float(shares[own].sum()) if len(own) else None))
    confidence = float(probabilities_of(logits[:1].cpu(), classifier.problem).max())
    return Explanation(text, classifier.names[best], confidence, tuple(marked), abs(change - float(shares.sum())))


def integrated_gradients(
    function: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, end: torch.Tensor, points: int
) -> torch.Tensor:
    """What each number of `end` adds to a function of (n, *its shape) states to (n,) numbers; in the same shape.

    Sundararajan et al. 2017; its integral from `start` to `end` by the midpoint rule.
    """
    way, total = end - start, torch.zeros_like(end)
    middles = (torch.arange(points, device=end.device) + 0.5) / points
    for some in middles.split(max(1, AT_ONCE // end[..., 0].numel())):
        path = (start + way * some.view(-1, *[1] * end.ndim)).requires_grad_()
        (gradients,) = torch.autograd.grad(function(path).sum(), path)
        total += gradients.sum(dim=0)
    return total / points * way


def neighbours(folder: Path, text: str, most: int = 5) -> list[dict[str, Any]]:
    """The training texts of a run that are most like a text, each once: text, label, similarity.

    That is the cosine of the means of their last layers. An `InputError` if its table is gone, changed or unknown.
    """
    info = read_json(folder, "headstart.json") if (folder / "headstart.json").is_file() else {}
    if "settings" not in info:
        raise InputError(f"{folder}: was not trained by headstart, so nothing is known of its training texts.")
    config = settings(info["settings"]["data"], **from_file(str(folder / "headstart.json")))
    ready = prepare(config)
    if data_fingerprint(ready.splits) != info["data"]:
        raise InputError(f"{config.data}: has changed since {folder} was trained.")
    encoder, train, layout = ready.encoder, ready.splits.train, ready.features.layout
    last = [name for name in layout if name.startswith("mean-")][-1]
    read = encoder.tokenizer.pieces(encoder.tokenizer([text]), ready.max_length, config.long)
    vectors = np.concatenate([some[:, layout.index(last)] for _, some in encode(encoder, read.tokens, layout)])
    asked = torch.from_numpy(vectors).float().mean(dim=0)  # of its pieces, as of the training texts'
    rows = ready.targets[0].mean(torch.from_numpy(ready.featured[0].columns([last])[:, 0]))
    labels = train.written
    cosines = torch.nn.functional.cosine_similarity(rows, asked, dim=1)
    found: dict[str, dict[str, Any]] = {}
    for i in cosines.argsort(descending=True, stable=True).tolist():
        one = {"text": train.texts[i], "label": labels[i], "similarity": float(cosines[i])}
        found.setdefault(train.texts[i], one)
        if len(found) == most:
            break
    return list(found.values())
