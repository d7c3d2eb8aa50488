"""A BERT-like encoder with a pooled head, as a transformers model.

This file is copied into every run folder with such a head (the `auto_map` code), so that
`pipeline("text-classification", RUN, trust_remote_code=True)` works without headstart, and imports nothing of it for
that reason. headstart uses it for the families that `engine.py` does not know.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

MaybeTensor: TypeAlias = torch.Tensor | None


def pool(hidden_states: Sequence[torch.Tensor], mask: torch.Tensor, layout: Sequence[str]) -> torch.Tensor:
    """Reduce each text's hidden states to (batch, len(layout), hidden) fp32, rounded to half precision as features are.

    There are L + 1 states (batch, length, hidden), the embeddings first; `mask` (batch, length) is 1 where a token is;
    `layout` has `cls` (last layer's first token) or `mean-K` (of layer K over the text's tokens), in order.
    """
    weights = mask.unsqueeze(1).to(hidden_states[0].dtype)
    count = mask.sum(dim=1, keepdim=True).float()
    vectors = [
        hidden_states[-1][:, 0].float()
        if name == "cls"
        else torch.matmul(weights, hidden_states[int(name.removeprefix("mean-"))]).squeeze(1).float() / count
        for name in layout
    ]
    return torch.stack(vectors, dim=1).clamp(-65504, 65504).half().float()


class PooledHead(nn.Module):
    """Standardise, optionally a hidden layer (`width`; 0: none) with ReLU and dropout, then logits."""

    def __init__(self, inputs: int, width: int, labels: int, dropout: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))
        hidden = [nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(dropout)] if width else []
        self.layers = nn.Sequential(*hidden, nn.Linear(width or inputs, labels))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(batch, inputs) features to (batch, labels) logits."""
        return self.layers((features - self.mean) * self.scale)


def pooler_output(body: Any, cls: torch.Tensor) -> torch.Tensor:
    """An encoder's pooled output from its last layer's first token, (batch, hidden) to (batch, hidden)."""
    if isinstance(body.pooler, nn.Linear):  # ALBERT keeps the activation apart
        return body.pooler_activation(body.pooler(cls))
    return body.pooler(cls.unsqueeze(1))


class HeadstartConfig(PretrainedConfig):
    """A pooled head's shape, and the encoder's configuration as a dictionary.

    The head reads `head_features` (`pooler`, `cls` or `mean-K`, in order); `head_width` 0 is no hidden layer.
    """

    model_type = "headstart"

    def __init__(
        self,
        encoder: dict[str, Any] | None = None,
        head_features: Sequence[str] = ("cls",),
        head_width: int = 0,
        head_dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.encoder = encoder or {"model_type": "bert"}
        self.head_features, self.head_width, self.head_dropout = list(head_features), head_width, head_dropout
        super().__init__(**kwargs)


class HeadstartForSequenceClassification(PreTrainedModel):
    """An encoder and a pooled head on several layers' means."""

    config_class = HeadstartConfig
    base_model_prefix = "encoder"

    def __init__(self, config: HeadstartConfig) -> None:
        super().__init__(config)
        encoder = AutoConfig.for_model(**config.encoder)
        self.num_labels = config.num_labels
        self.encoder = AutoModel.from_config(encoder)
        if "pooler" not in config.head_features and getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None  # never read, so neither kept nor run
        inputs = len(config.head_features) * encoder.hidden_size
        self.head = PooledHead(inputs, config.head_width, config.num_labels, config.head_dropout)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep what the encoder and torch initialised; weights come from a checkpoint or from training."""

    def forward(
        self,
        input_ids: MaybeTensor = None,
        attention_mask: MaybeTensor = None,
        labels: MaybeTensor = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Token ids (batch, length) and their mask to logits (batch, labels), and a loss where labels are given."""
        if input_ids is None:
            raise ValueError("input_ids are needed.")
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        states, names = output.hidden_states, self.config.head_features
        pooled = pool(states, attention_mask, ["cls" if name == "pooler" else name for name in names])
        parts = list(pooled.unbind(dim=1))
        if "pooler" in names:
            place = names.index("pooler")
            parts[place] = pooler_output(self.encoder, parts[place].to(states[0].dtype)).float()
        logits = self.head(torch.cat(parts, dim=1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
