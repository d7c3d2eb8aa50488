"""Which words pushed a decision, and by how much; and which training texts are nearest.

A word's score is its share of the predicted label's log-odds, from a text whose words are all masked to the text as it
is. This room knows gradients and words. It draws nothing.
"""

import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from headstart.errors import InputError
from headstart.features import Features
from headstart.model import TorchClassifier
from headstart.predict import probabilities_of

Method = Literal["integrated gradients", "gradients at a few points"]
STEPS, FEW = 50, 4  # points on the path: captum's default, and as few as tell the words that count
AT_ONCE = 4096  # tokens of them that are computed together
# A run of signs without a space; scripts written without spaces have a word a sign.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORDS = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")


class Word(NamedTuple):
    """A word of a text, where it stands in it, and its score: above 0 where it speaks for the predicted label.

    The score of a word beyond max_length, which was not read, is None.
    """

    word: str
    start: int
    end: int
    score: float | None


class Explanation(NamedTuple):
    """Why a text got its label: scores add up to the change in log-odds, but for `completeness_error`."""

    text: str
    label: str
    confidence: float
    words: tuple[Word, ...]
    method: Method
    completeness_error: float


def explain(classifier: TorchClassifier, text: str, method: Method = "integrated gradients") -> Explanation:
    """Explain a text's label by integrated gradients (Sundararajan et al. 2017), or by a few of its points.

    An `InputError` if the text is blank, or captum, which integrates, is not installed; the quick way does without.
    """
    if not text.strip():
        raise InputError("There is nothing to explain in a blank text.")
    scorer, tokenizer = classifier.model, classifier.tokenizer
    whole = tokenizer([text])
    ids = torch.from_numpy(tokenizer.truncate(whole, classifier.max_length)[0][None].astype(np.int64)).to(scorer.device)
    encoding = tokenizer.fast.encode(text)
    real = torch.tensor([not special for special in encoding.special_tokens_mask], device=ids.device)
    read = ids.shape[1] - (len(tokenizer.suffix) if ids.shape[1] < len(encoding.ids) else 0)
    real = torch.cat([real[:read], real.new_zeros(ids.shape[1] - read)])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        states, start = (scorer.embedded(one) for one in (ids, ids.masked_fill(real, tokenizer.mask_id)))
        logits = scorer.onward(torch.cat([states, start]), mask.expand(2, -1)).float()
    best = int(logits[0].argmax())

    def log_odds(logits: torch.Tensor) -> torch.Tensor:
        others = torch.cat([logits[:, :best], logits[:, best + 1 :]], dim=1)
        return logits[:, best] - others.logsumexp(dim=1)

    def odds(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return log_odds(scorer.onward(states, mask).float())

    attribute = _integrated if method == "integrated gradients" else _sampled
    scores = attribute(odds, states, start, mask)[0].sum(dim=-1).tolist()
    change = float(-log_odds(logits).diff())
    words = []
    for found in WORDS.finditer(text):
        own = [i for i, (low, high) in enumerate(encoding.offsets) if low < found.end() and high > found.start()]
        score = sum(scores[i] for i in own if i < read) if any(i < read for i in own) else None
        words.append(Word(found[0], *found.span(), score))
    confidence = float(probabilities_of(logits[:1].cpu()).max())
    return Explanation(text, classifier.names[best], confidence, tuple(words), method, abs(change - sum(scores)))


Odds = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _integrated(odds: Odds, states: torch.Tensor, start: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Integrated gradients of (1, length, hidden) states from `start` on: the same shape."""
    try:
        from captum.attr import IntegratedGradients
    except ImportError as error:
        raise InputError("explain needs captum. Install it with: pip install 'headstart[explain]'") from error
    given = {
        "additional_forward_args": (mask,),
        "n_steps": STEPS,
        "internal_batch_size": max(1, AT_ONCE // mask.numel()),
    }
    return IntegratedGradients(odds).attribute(states, start, **given).detach()


def _sampled(odds: Odds, states: torch.Tensor, start: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean gradient at the middles of `FEW` equal parts of the way from `start` to the states, times that way."""
    shares = (torch.arange(FEW, device=states.device) + 0.5) / FEW
    path = (start + (states - start) * shares[:, None, None]).requires_grad_()
    (gradients,) = torch.autograd.grad(odds(path, mask.expand(FEW, -1)).sum(), path)
    return gradients.mean(dim=0, keepdim=True) * (states - start)


class Neighbour(NamedTuple):
    """A training text, its label, and the cosine of its features and the explained text's."""

    text: str
    label: str
    similarity: float


def nearest(
    features: Features, texts: Sequence[str], labels: Sequence[str], wanted: Features, most: int = 5
) -> list[Neighbour]:
    """The texts, of n with stored features, whose last layer's mean is most like that of the one text `wanted`."""
    name = [name for name in features.layout if name.startswith("mean-")][-1]
    rows, one = (part.columns([name])[:, 0] for part in (features, wanted))
    cosines = rows @ one[0] / np.maximum(np.linalg.norm(rows, axis=1) * np.linalg.norm(one[0]), 1e-12)
    found: dict[str, Neighbour] = {}
    for i in np.argsort(-cosines, kind="stable").tolist():
        found.setdefault(texts[i], Neighbour(texts[i], labels[i], float(cosines[i])))
        if len(found) == most:
            break
    return list(found.values())
