"""The frozen pass of BERT-shaped encoders in plain torch: quick to start and with nothing computed that is not read.

Against the library's forward: query, key and value in one product; bias and residual added inside oneDNN's product;
softmax as exp, product, division, since torch's own is slow on short rows; means taken as each layer comes, so no
layer's output is kept; layers above the highest one read are not run; and where only the first token of the last layer
is read, that layer works on it alone. Batches run side by side, a core each, rather than one batch on all cores. The
numbers are in docs/performance.md. This room knows tensors and config.json; transformers would take seconds to start.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headstart.parallel import Given, Made, in_threads

ROW_STEP, TRAIN_ROW_STEP = 256, 64  # rows of products are multiples: oneDNN compiles, in milliseconds, for each number
SHORT = 128  # up to so many tokens our own attention is faster than torch's, whose softmax is slow on short rows
SAFE_SUMS = (1e-30, 1e30)  # sums of exponentials outside are computed again by torch, which subtracts the largest

Json = Mapping[str, Any]  # a model's config.json
Params = Mapping[str, Tensor]
Pair = tuple[Tensor, Tensor]  # a weight and a bias

BERT_NAMES = (
    *("encoder.layer.", "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    *("attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm"),
)
DISTILBERT_NAMES = (
    *("transformer.layer.", "attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
    *("sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm"),
)
"""Where the layers are, and in each: query, key, value, output, norm, the products up and down, and norm."""

NATIVE_HEADS = {
    "bert": ("bert.pooler.dense", torch.tanh, "classifier"),
    "roberta": ("classifier.dense", torch.tanh, "classifier.out_proj"),
    "electra": ("classifier.dense", F.gelu, "classifier.out_proj"),
    "distilbert": ("pre_classifier", torch.relu, "classifier"),
}
"""Each family's own classifier: a layer on the first token's state, its activation, and the layer to logits."""


def supports(config: Json) -> bool:
    """Whether this room computes what the architecture in `config` computes."""
    gelu = config.get("hidden_act", config.get("activation", "gelu")) == "gelu"
    absolute = config.get("position_embedding_type", "absolute") == "absolute"
    return config.get("model_type") in NATIVE_HEADS and gelu and absolute and not config.get("is_decoder", False)


def side_by_side(function: Callable[[Given], Made], items: Iterable[Given]) -> Iterator[Made]:
    """`function` of each item, in order: as many at once as torch has threads, each on one; few are taken ahead."""
    workers = torch.get_num_threads()
    if workers == 1:
        yield from map(function, items)
        return
    try:
        yield from in_threads(function, items, workers, partial(torch.set_num_threads, 1))
    finally:
        torch.set_num_threads(workers)


class Engine:
    """An encoder, or its layers from `start` on, as a function: from a config.json and the base model's tensors.

    Tensors are converted once; gradients flow back to those that require them, so a thawed encoder is an engine made
    anew for each step of the weights as they are. A missing tensor is a KeyError, one of another width a ValueError.
    """

    def __init__(self, config: Json, weights: Params, device: torch.device, dtype: torch.dtype, start: int = 0) -> None:
        distil = config["model_type"] == "distilbert"
        place, *names = DISTILBERT_NAMES if distil else BERT_NAMES
        self.hidden = int(config["dim" if distil else "hidden_size"])
        self.heads = int(config["n_heads" if distil else "num_attention_heads"])
        self.eps = float(config.get("layer_norm_eps", 1e-12))
        self.pad_id = int(config.get("pad_token_id", 1)) if config["model_type"] == "roberta" else None

        def tensor(name: str, scale: float = 1.0) -> Tensor:
            return (weights[name] if scale == 1.0 else weights[name] * scale).to(device, dtype)

        def pair(name: str, scale: float = 1.0) -> Pair:
            return tensor(name + ".weight", scale), tensor(name + ".bias", scale)

        self.onednn = device.type == "cpu" and torch.backends.mkldnn.is_available()
        self.device, self.dtype, self.start = device, dtype, start
        self.sparse = False  # whether the gradient of the word embeddings is of the rows that are read, and no zeros
        if any(name.startswith("embeddings.") for name in weights):
            words = weights["embeddings.word_embeddings.weight"]
            self.words = words.to(device) if words.requires_grad else words.to(device, dtype)
            self.positions = tensor("embeddings.position_embeddings.weight")
            if not distil:  # every token is of the first sentence
                self.positions = self.positions + tensor("embeddings.token_type_embeddings.weight")[0]
            self.norm = pair("embeddings.LayerNorm")
            self.project = pair("embeddings_project") if "embeddings_project.weight" in weights else None
        self.layers: list[list[Pair]] = []
        self.count = int(config["n_layers" if distil else "num_hidden_layers"])
        for i in range(start, self.count):
            q = pair(f"{place}{i}.{names[0]}", (self.hidden // self.heads) ** -0.5)  # so that attention need not scale
            k, v, *rest = (pair(f"{place}{i}.{name}") for name in names[1:])
            self.layers.append([(torch.cat([q[0], k[0], v[0]]), torch.cat([q[1], k[1], v[1]])), *rest])
        if any(layer[0][0].shape != (3 * self.hidden, self.hidden) for layer in self.layers):
            raise ValueError("the weights are of another width than the configuration")

    @property
    def fused(self) -> bool:
        """Whether products take bias and residual inside: oneDNN's that do have no gradient."""
        return self.onednn and not torch.is_grad_enabled()

    def states(self, ids: Tensor, mask: Tensor, depth: int) -> Tensor:
        """Hidden states after the first `depth` layers, (batch, length, hidden), of an engine that starts at 0.

        Token ids, (batch, length), are padded on the right; the mask is 1 where a token is.
        """
        x, (tokens, attend) = self._rows(self.embedded(ids)), self._masks(mask)
        for layer in self.layers[:depth]:
            x = self._layer(x, tokens, attend, layer, ids.shape[1])
        return x[: ids.numel()].view(*ids.shape, -1)

    def vectors(self, states: Tensor, mask: Tensor, layout: Sequence[str]) -> Tensor:
        """Vectors of each text, (batch, len(layout), hidden) fp32, from what the first layer takes: see `embedded`.

        A layout has `cls` (last layer's first token) and `mean-K` (of layer K over the text's tokens), in order.
        """
        highest = self.count if "cls" in layout else max(int(name.removeprefix("mean-")) for name in layout)
        batch, length, _ = states.shape
        tokens, attend = self._masks(mask)
        count = mask.sum(dim=1, keepdim=True).float()
        x, read = self._rows(states), length
        found: dict[str, Tensor] = {}
        for number, layer in enumerate([None, *self.layers[: highest - self.start]], start=self.start):
            mean = f"mean-{number}"
            if layer is not None:
                read = 1 if number == self.count and mean not in layout else length
                x = self._layer(x, tokens, attend, layer, read)
            if mean in layout:
                states = x[: batch * length].view(batch, length, -1)
                found[mean] = torch.matmul(tokens.unsqueeze(1), states).squeeze(1).float() / count
        found["cls"] = x[: batch * read].view(batch, read, -1)[:, 0].float()
        return torch.stack([found[name] for name in layout], dim=1)

    def embedded(self, ids: Tensor) -> Tensor:
        """What the first layer takes, (batch, length, hidden), of token ids."""
        positions = self.positions[: ids.shape[1]]
        if self.pad_id is not None:  # RoBERTa counts from its padding id + 1 and passes over that id
            real = ids != self.pad_id
            positions = self.positions[real.cumsum(dim=1) * real + self.pad_id]
        x = F.embedding(ids, self.words, sparse=self.sparse).to(self.dtype).add_(positions)
        x = F.layer_norm(x, self.norm[0].shape, *self.norm, self.eps)
        return x if self.project is None else self._product(x, self.project)

    def _rows(self, states: Tensor) -> Tensor:
        """A row a token, and rows of zeros up to the next multiple of `ROW_STEP`."""
        x = states.reshape(-1, states.shape[-1])
        step = ROW_STEP if self.fused else TRAIN_ROW_STEP
        return F.pad(x, (0, 0, 0, -len(x) % step if len(x) > step else 0))

    def _masks(self, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        whole = mask.device.type == "cpu" and bool(mask.all())  # elsewhere to ask would be to wait
        return mask.to(self.dtype), None if whole else mask.bool()[:, None, None, :]

    def _layer(self, x: Tensor, tokens: Tensor, attend: Tensor | None, layer: list[Pair], read: int) -> Tensor:
        """One layer's output, a row a token, for the first `read` tokens of each text."""
        qkv, out, norm1, up, down, norm2 = layer
        batch, length = tokens.shape
        parts = self._product(x, qkv)[: batch * length].view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = self._attention(parts, tokens, attend, read).transpose(1, 2)
        if read < length:
            x = x[: batch * length].view(batch, length, -1)[:, :read].reshape(batch * read, -1)
        mixed = F.pad(mixed.reshape(batch * read, -1), (0, 0, 0, len(x) - batch * read))
        x = F.layer_norm(self._product(mixed, out, x), norm1[0].shape, *norm1, self.eps)
        wide = self._product(x, up)
        wide = torch._C._nn.gelu_(wide) if self.fused else F.gelu(wide)  # in place it has no gradient
        return F.layer_norm(self._product(wide, down, x), norm2[0].shape, *norm2, self.eps)

    def _attention(self, parts: Tensor, tokens: Tensor, attend: Tensor | None, read: int) -> Tensor:
        """softmax(q·kᵀ)·v of (3, batch, heads, length, d), for `read` queries: (batch, heads, read, d).

        q comes scaled. Padding is left out by zeros in v and in the row that sums the exponentials.
        """
        batch, length = tokens.shape
        if parts.device.type == "cpu" and length <= SHORT:
            q, k, v = parts.reshape(3, batch * self.heads, length, -1)
            weights = torch.bmm(q[:, :read], k.transpose(1, 2)).exp_()
            real = tokens.repeat_interleave(self.heads, dim=0).unsqueeze(2)
            sums = torch.bmm(weights, real)
            low, high = sums.detach().aminmax()
            if SAFE_SUMS[0] < float(low) and float(high) < SAFE_SUMS[1]:
                return (torch.bmm(weights, v * real) / sums).view(batch, self.heads, read, -1)
        q, k, v = parts
        return F.scaled_dot_product_attention(q[:, :, :read], k, v, attn_mask=attend, scale=1.0)

    def _product(self, x: Tensor, weights: Pair, residual: Tensor | None = None) -> Tensor:
        """x·Wᵀ + b, and a residual: in one go where oneDNN is."""
        if not self.fused:
            product = F.linear(x, *weights)
            return product if residual is None else product + residual
        if residual is None:
            return torch.ops.mkldnn._linear_pointwise(x, *weights, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, *weights, "add")


def pooled_output(weights: Params, cls: Tensor) -> Tensor:
    """A model's pooled output, tanh(W·cls + b), from its last layer's first token: (batch, hidden) to the same."""
    name = "pooler.dense" if "pooler.dense.weight" in weights else "pooler"  # ALBERT's has no `dense`
    return torch.tanh(F.linear(cls, weights[name + ".weight"], weights[name + ".bias"]))


class PooledHead(nn.Module):
    """Standardise, optionally a hidden layer (`width`; 0: none) with ReLU and dropout, then logits."""

    def __init__(self, inputs: int, width: int, labels: int, dropout: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))
        hidden = [nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(dropout)] if width else []
        self.layers = nn.Sequential(*hidden, nn.Linear(width or inputs, labels))

    def forward(self, features: Tensor) -> Tensor:
        """(batch, inputs) features to (batch, labels) logits."""
        return self.layers((features - self.mean) * self.scale)


class PooledScorer(Engine):
    """A saved `HeadstartForSequenceClassification`, without transformers: token ids to logits; its head is fp32."""

    def __init__(self, config: Json, weights: Params, device: torch.device, dtype: torch.dtype) -> None:
        body = _below(weights, "encoder.")
        super().__init__(config["encoder"], body, device, dtype)
        self.pooler = {name: tensor.to(device) for name, tensor in body.items() if name.startswith("pooler.")}
        head = _below(weights, "head.")
        last = max(name for name in head if name.startswith("layers."))
        self.head = PooledHead(len(head["mean"]), config["head_width"], len(head[last]), 0.0)
        self.head.load_state_dict(head)
        self.head.to(device).eval()
        self.features: list[str] = config["head_features"]

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(batch, labels) fp32 logits of token ids."""
        return self.onward(self.embedded(ids), mask)

    def onward(self, states: Tensor, mask: Tensor) -> Tensor:
        """(batch, labels) fp32 logits of what the first layer takes."""
        stored = self.vectors(states, mask, ["cls" if name == "pooler" else name for name in self.features])
        inputs = stored.detach().clamp(-65504, 65504).half().float()
        if stored.requires_grad:  # which half precision would round to infinity
            inputs = stored + (inputs - stored).detach()
        if "pooler" in self.features:
            place = self.features.index("pooler")
            inputs[:, place] = pooled_output(self.pooler, inputs[:, place])
        return self.head(inputs.flatten(1))


class NativeScorer(Engine):
    """A family's `...ForSequenceClassification`, or its layers from `start` on; a KeyError if a tensor is not there."""

    def __init__(self, config: Json, weights: Params, device: torch.device, dtype: torch.dtype, start: int = 0) -> None:
        super().__init__(config, _below(weights, config["model_type"] + "."), device, dtype, start)
        dense, self.activation, out = NATIVE_HEADS[config["model_type"]]
        parts = [[weights[f"{name}.{part}"] for part in ("weight", "bias")] for name in (dense, out)]
        self.dense, self.out = ([tensor.to(device, torch.float32) for tensor in pair] for pair in parts)

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(batch, labels) fp32 logits of token ids."""
        return self.onward(self.embedded(ids), mask)

    def onward(self, states: Tensor, mask: Tensor) -> Tensor:
        """(batch, labels) fp32 logits of what the layers from `start` on take."""
        first = self.vectors(states, mask, ("cls",))[:, 0]
        return F.linear(self.activation(F.linear(first, *self.dense)), *self.out)


def _below(weights: Params, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
