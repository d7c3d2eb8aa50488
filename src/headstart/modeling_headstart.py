"""A BERT-like encoder with a pooled head, as a transformers model.

Every run folder with such a head holds a copy for `pipeline("text-classification", RUN, trust_remote_code=True)`, so it
imports nothing of headstart, which itself uses it for the families that `engine.py` does not know.
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
    exact = torch.stack(vectors, dim=1)
    rounded = exact.detach().clamp(-65504, 65504).half().float()
    # A gradient passes by: half precision would round it to infinity.
    return exact + (rounded - exact).detach() if exact.requires_grad else rounded


class HeadstartConfig(PretrainedConfig):
    """A pooled head's shape, and the encoder's configuration as a dictionary (a plain BERT's if there is none)."""

    model_type = "headstart"
    encoder: dict[str, Any] | None = None
    head_features: Sequence[str] = ("cls",)  # what the head reads: `pooler`, `cls` or `mean-K`, in order
    head_width: int = 0  # of its hidden layer; 0: none
    head_dropout: float = 0.0


class HeadstartForSequenceClassification(PreTrainedModel):
    """An encoder and a pooled head on several layers' means, as `engine.PooledHead` is trained."""

    config_class = HeadstartConfig
    base_model_prefix = "encoder"

    def __init__(self, config: HeadstartConfig) -> None:
        super().__init__(config)
        encoder = AutoConfig.for_model(**config.encoder or {"model_type": "bert"})
        self.num_labels = config.num_labels
        self.encoder = AutoModel.from_config(encoder)
        if "pooler" not in config.head_features:
            self.encoder.pooler = None  # never read, so neither kept nor run
        inputs, width = len(config.head_features) * encoder.hidden_size, config.head_width
        hidden = [nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(config.head_dropout)] if width else []
        self.head = nn.ModuleDict({"layers": nn.Sequential(*hidden, nn.Linear(width or inputs, config.num_labels))})
        self.head.register_buffer("mean", torch.zeros(inputs))
        self.head.register_buffer("scale", torch.ones(inputs))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep what the encoder and torch initialised; weights come from a checkpoint or from training."""

    def forward(
        self,
        input_ids: MaybeTensor = None,
        attention_mask: MaybeTensor = None,
        labels: MaybeTensor = None,
        inputs_embeds: MaybeTensor = None,
        **_: Any,
    ) -> SequenceClassifierOutput:
        """Token ids (batch, length), or their embeddings, and a mask to (batch, labels) logits; with labels, a loss."""
        given = input_ids if inputs_embeds is None else inputs_embeds[..., 0]
        if given is None:
            raise ValueError("input_ids are needed.")
        attention_mask = torch.ones_like(given) if attention_mask is None else attention_mask
        output = self.encoder(
            input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask, output_hidden_states=True
        )
        states, names = output.hidden_states, self.config.head_features
        pooled = pool(states, attention_mask, ["cls" if name == "pooler" else name for name in names])
        parts = list(pooled.unbind(dim=1))
        if "pooler" in names:
            place, pooler = names.index("pooler"), self.encoder.pooler
            layer = pooler if isinstance(pooler, nn.Linear) else pooler.dense  # ALBERT's has no `dense`
            parts[place] = torch.tanh(layer(parts[place].to(states[0].dtype))).float()
        logits = self.head["layers"]((torch.cat(parts, dim=1) - self.head.mean) * self.head.scale)
        loss = None
        if labels is not None and self.config.problem_type == "multi_label_classification":
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.float())
        elif labels is not None:
            loss = nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
