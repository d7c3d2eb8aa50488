"""The frozen pass of BERT-shaped encoders in plain torch: quick to start and with nothing computed that is not read.

Against the library's forward: query, key and value in one product; residuals added in place; means taken as each layer
comes, so no layer's output is kept; layers above the highest one read are not run; and where only the first token of
the last layer is read, that layer works on it alone. This room knows tensors and a model's own config.json; it imports
no transformers, which takes seconds to start.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

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


class Engine:
    """A frozen encoder as a function of token ids, from a config.json and the base model's tensors.

    It computes on `device` in `dtype`; weights are converted once.

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
        # RoBERTa counts positions from padding_idx + 1.
        self.first_position = int(config.get("pad_token_id", 1)) + 1 if config["model_type"] == "roberta" else 0

        def tensor(name: str) -> torch.Tensor:
            return weights[name].to(device, dtype)

        def pair(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            return tensor(name + ".weight"), tensor(name + ".bias")

        self.words = tensor("embeddings.word_embeddings.weight")
        self.positions = tensor("embeddings.position_embeddings.weight")
        if not distil:  # every token is of the first sentence
            self.positions = self.positions + tensor("embeddings.token_type_embeddings.weight")[0]
        self.norm = pair("embeddings.LayerNorm")
        self.project = pair("embeddings_project") if "embeddings_project.weight" in weights else None
        self.layers = []
        for i in range(int(config["n_layers" if distil else "num_hidden_layers"])):
            at = f"{names['layer']}{i}."
            parts = [pair(at + names[name]) for name in ("q", "k", "v")]
            qkv = torch.cat([weight for weight, _ in parts]), torch.cat([bias for _, bias in parts])
            rest = [pair(at + names[name]) for name in ("out", "norm1", "up", "down", "norm2")]
            self.layers.append((qkv, *rest))
        if any(layer[0][0].shape != (3 * self.hidden, self.hidden) for layer in self.layers):
            raise ValueError("the weights are of another width than the configuration")

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, layout: Sequence[str]) -> torch.Tensor:
        """Vectors of each text.

        Args:
            ids: (batch, length) token ids, padded on the right.
            mask: (batch, length), 1 where a token is.
            layout: `cls` (last layer's first token) or `mean-K` (of layer K over the text's tokens), in order.

        Returns:
            (batch, len(layout), hidden) fp32.
        """
        wanted = set(layout)
        highest = len(self.layers) if "cls" in wanted else max(int(re.sub(r"\D", "", name)) for name in wanted)
        attend = None if bool(mask.all()) else mask.bool()[:, None, None, :]
        tokens = mask.unsqueeze(1).to(self.words.dtype)
        count = mask.sum(dim=1, keepdim=True).float()
        found: dict[str, torch.Tensor] = {}

        def note(layer: int, x: torch.Tensor) -> None:
            if f"mean-{layer}" in wanted:
                found[f"mean-{layer}"] = torch.matmul(tokens, x).squeeze(1).float() / count

        positions = self.positions[self.first_position : self.first_position + ids.shape[1]]
        x = self._normed(self.words[ids].add_(positions), self.norm)
        if self.project is not None:
            x = F.linear(x, *self.project)
        note(0, x)
        for number, layer in enumerate(self.layers[:highest], start=1):
            read = 1 if number == len(self.layers) and f"mean-{number}" not in wanted else ids.shape[1]
            x = self._layer(x, attend, layer, read)
            note(number, x)
        found["cls"] = x[:, 0].float()
        return torch.stack([found[name] for name in layout], dim=1)

    def _layer(self, x: torch.Tensor, attend: torch.Tensor | None, layer: Any, read: int) -> torch.Tensor:
        """One layer's output for the first `read` tokens of each text."""
        qkv, out, norm1, up, down, norm2 = layer
        batch, length, _ = x.shape
        q, k, v = F.linear(x, *qkv).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q[:, :, :read], k, v, attn_mask=attend)
        mixed = mixed.transpose(1, 2).reshape(batch, read, self.hidden)
        x = self._normed(F.linear(mixed, *out).add_(x[:, :read]), norm1)
        return self._normed(F.linear(F.gelu(F.linear(x, *up)), *down).add_(x), norm2)

    def _normed(self, x: torch.Tensor, norm: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.layer_norm(x, norm[0].shape, norm[0], norm[1], self.eps)


def pooled_output(weights: Mapping[str, torch.Tensor], cls: torch.Tensor) -> torch.Tensor:
    """A model's pooled output, tanh(W·cls + b), from its last layer's first token: (batch, hidden) to the same.

    ALBERT keeps the product without a `dense` in its name.
    """
    name = "pooler.dense" if "pooler.dense.weight" in weights else "pooler"
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
        self.hidden = nn.Linear(inputs, width) if width else None
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(width or inputs, labels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(batch, inputs) features to (batch, labels) logits."""
        x = (features - self.mean) * self.scale
        if self.hidden is not None:
            x = self.dropout(torch.relu(self.hidden(x)))
        return self.out(x)


class PooledScorer:
    """A saved classifier with a pooled head, without transformers: token ids to logits.

    Computes what `HeadstartForSequenceClassification` does; the tests hold one against the other. `config` and
    `weights` are a run folder's; the encoder computes in `dtype`, the head in fp32.
    """

    def __init__(
        self, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype
    ) -> None:
        body = {
            name.removeprefix("encoder."): tensor for name, tensor in weights.items() if name.startswith("encoder.")
        }
        self.engine = Engine(config["encoder"], body, device, dtype)
        self.pooler = {name: tensor.to(device) for name, tensor in body.items() if name.startswith("pooler.")}
        head = _below(weights, "head.")
        self.head = PooledHead(len(head["mean"]), config["head_width"], len(head["out.bias"]), 0.0)
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


def _below(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
