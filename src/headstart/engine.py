"""The frozen pass of BERT-shaped encoders in plain torch: quick to start and with nothing computed that is not read.

Against the library's forward: query, key and value in one product; bias and residual added inside oneDNN's product;
softmax as exp, product, division, since torch's own is slow on short rows; means taken as each layer comes, so no
layer's output is kept; layers above the highest one read are not run; and where only the first token of the last layer
is read, that layer works on it alone. Batches run side by side, a core each, rather than one batch on all cores. The
numbers are in docs/performance.md. This room knows tensors and a model's own config.json; it imports no transformers,
which takes seconds to start.
"""

import collections
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

ROW_STEP = 256
"""Products run on multiples of this: oneDNN takes milliseconds to compile a kernel for a new number of rows."""

SHORT = 128
"""Up to so many tokens our own attention is faster than torch's, whose softmax is slow on short rows."""

SAFE_SUMS = (1e-30, 1e30)
"""Sums of exponentials outside these bounds are computed again by torch's softmax, which subtracts the largest."""

Given = TypeVar("Given")
Made = TypeVar("Made")

FAMILIES = ("bert", "roberta", "electra", "distilbert")
BERT_NAMES = {
    "layer": "encoder.layer.",
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
}
DISTILBERT_NAMES = {
    "layer": "transformer.layer.",
    "q": "attention.q_lin",
    "k": "attention.k_lin",
    "v": "attention.v_lin",
    "out": "attention.out_lin",
    "norm1": "sa_layer_norm",
    "up": "ffn.lin1",
    "down": "ffn.lin2",
    "norm2": "output_layer_norm",
}


NATIVE_HEADS = {
    "bert": ("bert.pooler.dense", torch.tanh, "classifier"),
    "roberta": ("classifier.dense", torch.tanh, "classifier.out_proj"),
    "electra": ("classifier.dense", F.gelu, "classifier.out_proj"),
    "distilbert": ("pre_classifier", torch.relu, "classifier"),
}
"""Each family's own classifier: a layer on the first token's state, its activation, and the layer to logits."""


def supports(config: Mapping[str, Any]) -> bool:
    """Whether this room computes what the architecture in `config` (a model's config.json) computes."""
    activation = config.get("hidden_act", config.get("activation", "gelu"))
    absolute = config.get("position_embedding_type", "absolute") == "absolute"
    return (
        config.get("model_type") in FAMILIES
        and activation == "gelu"
        and absolute
        and not config.get("is_decoder", False)
    )


def side_by_side(function: Callable[[Given], Made], items: Iterable[Given]) -> Iterator[Made]:
    """`function` of each item, in order: as many at once as torch has threads, each on one; few are taken ahead."""
    workers = torch.get_num_threads()
    if workers == 1:
        yield from map(function, items)
        return
    waiting: collections.deque[Future[Any]] = collections.deque()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                for item in items:
                    waiting.append(pool.submit(function, item))
                    if len(waiting) > 2 * workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C waits for no batch that has not begun
    finally:
        torch.set_num_threads(workers)


class Engine:
    """A frozen encoder as a function of token ids, from a config.json and the base model's tensors, converted once.

    Raises:
        KeyError: a tensor is missing.
        ValueError: the tensors are of another width.
    """

    def __init__(
        self, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype
    ) -> None:
        distil = config["model_type"] == "distilbert"
        names = DISTILBERT_NAMES if distil else BERT_NAMES
        self.hidden = int(config["dim" if distil else "hidden_size"])
        self.heads = int(config["n_heads" if distil else "num_attention_heads"])
        self.eps = float(config.get("layer_norm_eps", 1e-12))
        self.pad_id = int(config.get("pad_token_id", 1)) if config["model_type"] == "roberta" else None

        def tensor(name: str, scale: float = 1.0) -> torch.Tensor:
            return (weights[name] if scale == 1.0 else weights[name] * scale).to(device, dtype)

        def pair(name: str, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
            return tensor(name + ".weight", scale), tensor(name + ".bias", scale)

        self.fused = device.type == "cpu" and torch.backends.mkldnn.is_available()
        self.words = tensor("embeddings.word_embeddings.weight")
        self.positions = tensor("embeddings.position_embeddings.weight")
        if not distil:  # every token is of the first sentence
            self.positions = self.positions + tensor("embeddings.token_type_embeddings.weight")[0]
        self.norm = pair("embeddings.LayerNorm")
        self.project = pair("embeddings_project") if "embeddings_project.weight" in weights else None
        self.layers = []
        for i in range(int(config["n_layers" if distil else "num_hidden_layers"])):
            at = f"{names['layer']}{i}."
            scales = {"q": (self.hidden // self.heads) ** -0.5, "k": 1.0, "v": 1.0}  # so that attention need not
            parts = [pair(at + names[name], scale) for name, scale in scales.items()]
            qkv = torch.cat([weight for weight, _ in parts]), torch.cat([bias for _, bias in parts])
            rest = [pair(at + names[name]) for name in ("out", "norm1", "up", "down", "norm2")]
            self.layers.append((qkv, *rest))
        if any(layer[0][0].shape != (3 * self.hidden, self.hidden) for layer in self.layers):
            raise ValueError("the weights are of another width than the configuration")

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, layout: Sequence[str]) -> torch.Tensor:
        """Vectors of each text, (batch, len(layout), hidden) fp32, from token ids padded on the right and a 0/1 mask.

        A layout has `cls` (last layer's first token) and `mean-K` (of layer K over the text's tokens), in order.
        """
        wanted = set(layout)
        highest = len(self.layers) if "cls" in wanted else max(int(re.sub(r"\D", "", name)) for name in wanted)
        batch, length = ids.shape
        tokens = mask.to(self.words.dtype)
        count = mask.sum(dim=1, keepdim=True).float()
        found: dict[str, torch.Tensor] = {}

        def note(layer: int, x: torch.Tensor) -> None:
            if f"mean-{layer}" in wanted:
                states = x[: batch * length].view(batch, length, -1)
                found[f"mean-{layer}"] = torch.matmul(tokens.unsqueeze(1), states).squeeze(1).float() / count

        attend = None if bool(mask.all()) else mask.bool()[:, None, None, :]
        x = self._normed(self.words[ids].add_(self._positions(ids)), self.norm).view(batch * length, -1)
        if self.fused:
            x = F.pad(x, (0, 0, 0, -len(x) % ROW_STEP if len(x) > ROW_STEP else 0))
        if self.project is not None:
            x = self._product(x, self.project)
        note(0, x)
        read = length
        for number, layer in enumerate(self.layers[:highest], start=1):
            read = 1 if number == len(self.layers) and f"mean-{number}" not in wanted else length
            x = self._layer(x, tokens, attend, layer, read)
            note(number, x)
        found["cls"] = x[: batch * read].view(batch, read, -1)[:, 0].float()
        return torch.stack([found[name] for name in layout], dim=1)

    def _positions(self, ids: torch.Tensor) -> torch.Tensor:
        """Position embeddings; RoBERTa counts from its padding id + 1 and passes over that id."""
        if self.pad_id is None:
            return self.positions[: ids.shape[1]]
        real = ids != self.pad_id
        return self.positions[real.cumsum(dim=1) * real + self.pad_id]

    def _layer(
        self, x: torch.Tensor, tokens: torch.Tensor, attend: torch.Tensor | None, layer: Any, read: int
    ) -> torch.Tensor:
        """One layer's output, a row a token, for the first `read` tokens of each text."""
        qkv, out, norm1, up, down, norm2 = layer
        batch, length = tokens.shape
        parts = self._product(x, qkv)[: batch * length].view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = self._attention(parts, tokens, attend, read).transpose(1, 2)
        if read < length:
            x = x[: batch * length].view(batch, length, -1)[:, :read].reshape(batch * read, -1)
        rows = x.new_zeros(x.shape)
        rows[: batch * read].view(batch, read, self.heads, -1).copy_(mixed)
        x = self._normed(self._product(rows, out, x), norm1)
        return self._normed(self._product(torch._C._nn.gelu_(self._product(x, up)), down, x), norm2)

    def _attention(
        self, parts: torch.Tensor, tokens: torch.Tensor, attend: torch.Tensor | None, read: int
    ) -> torch.Tensor:
        """softmax(q·kᵀ)·v of (3, batch, heads, length, d), for `read` queries: (batch, heads, read, d).

        q comes scaled. Padding is left out by zeros in v and in the row that sums the exponentials.
        """
        batch, length = tokens.shape
        if self.fused and length <= SHORT:
            q, k, v = parts.reshape(3, batch * self.heads, length, -1)
            weights = torch.bmm(q[:, :read], k.transpose(1, 2)).exp_()
            real = tokens.repeat_interleave(self.heads, dim=0).unsqueeze(2)
            sums = torch.bmm(weights, real)
            low, high = sums.aminmax()
            if SAFE_SUMS[0] < float(low) and float(high) < SAFE_SUMS[1]:
                return torch.bmm(weights, v * real).div_(sums).view(batch, self.heads, read, -1)
        q, k, v = parts
        return F.scaled_dot_product_attention(q[:, :, :read], k, v, attn_mask=attend, scale=1.0)

    def _product(
        self, x: torch.Tensor, weights: tuple[torch.Tensor, torch.Tensor], residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x·Wᵀ + b, and a residual: in one go where oneDNN is."""
        if not self.fused:
            product = F.linear(x, *weights)
            return product if residual is None else product.add_(residual)
        if residual is None:
            return torch.ops.mkldnn._linear_pointwise(x, *weights, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, *weights, "add")

    def _normed(self, x: torch.Tensor, norm: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.layer_norm(x, norm[0].shape, norm[0], norm[1], self.eps)


def pooled_output(weights: Mapping[str, torch.Tensor], cls: torch.Tensor) -> torch.Tensor:
    """A model's pooled output, tanh(W·cls + b), from its last layer's first token: (batch, hidden) to the same."""
    name = "pooler.dense" if "pooler.dense.weight" in weights else "pooler"  # ALBERT's has no `dense`
    return torch.tanh(F.linear(cls, weights[name + ".weight"], weights[name + ".bias"]))


class PooledHead(nn.Module):
    """Standardise, optionally one hidden layer with ReLU and dropout, then a linear layer to logits.

    The twin of the class in `modeling_headstart.py`, which must not import this room; a test holds them together.
    `inputs` is the width of what it reads, `width` that of the hidden layer (0 for none).
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, inputs: int, width: int, labels: int, dropout: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))
        hidden = [nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(dropout)] if width else []
        self.layers = nn.Sequential(*hidden, nn.Linear(width or inputs, labels))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(batch, inputs) features to (batch, labels) logits."""
        return self.layers((features - self.mean) * self.scale)


class PooledScorer:
    """A saved `HeadstartForSequenceClassification`, without transformers: token ids to logits; its head is fp32."""

    def __init__(
        self, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype
    ) -> None:
        body = _below(weights, "encoder.")
        self.engine = Engine(config["encoder"], body, device, dtype)
        self.pooler = {name: tensor.to(device) for name, tensor in body.items() if name.startswith("pooler.")}
        head = _below(weights, "head.")
        last = max(name for name in head if name.startswith("layers."))
        self.head = PooledHead(len(head["mean"]), config["head_width"], len(head[last]), 0.0)
        self.head.load_state_dict(head)
        self.head.to(device).eval()
        self.features: list[str] = config["head_features"]
        self.device = device

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(batch, labels) fp32 logits."""
        stored = self.engine(ids, mask, ["cls" if name == "pooler" else name for name in self.features])
        parts = list(stored.clamp(-65504, 65504).half().float().unbind(dim=1))
        if "pooler" in self.features:
            place = self.features.index("pooler")
            parts[place] = pooled_output(self.pooler, parts[place])
        return self.head(torch.cat(parts, dim=1))


class NativeScorer:
    """A saved `...ForSequenceClassification` of the families here, without transformers: token ids to logits.

    Raises:
        KeyError: a tensor is missing, or goes by another name.
    """

    def __init__(
        self, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype
    ) -> None:
        kind = config["model_type"]
        dense, self.activation, out = NATIVE_HEADS[kind]
        parts = [[weights[f"{name}.{part}"] for part in ("weight", "bias")] for name in (dense, out)]
        self.dense, self.out = ([tensor.to(device, torch.float32) for tensor in pair] for pair in parts)
        self.engine = Engine(config, _below(weights, f"{kind}."), device, dtype)
        self.device = device

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(batch, labels) fp32 logits."""
        first = self.engine(ids, mask, ("cls",))[:, 0]
        return F.linear(self.activation(F.linear(first, *self.dense)), *self.out)


def _below(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
