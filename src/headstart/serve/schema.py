"""What is asked and answered over HTTP, in both dialects, as pydantic models, from which the schema is made."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, StrictBool, field_validator

from headstart.errors import HeadstartError


class ErrorAnswer(BaseModel):
    """What went wrong, and which kind of thing that is."""

    error: str
    error_type: str


class LabelScore(BaseModel):
    """A label and how likely it is, or its logit."""

    score: float
    label: str


def told(**schema: Any) -> Any:
    """What the schema says of a field whose refusals we word ourselves."""
    return Field(json_schema_extra=schema)


Text = Annotated[str, told(minLength=1, pattern=r"\S")]


class PredictRequest(BaseModel):
    """One text, or a batch of them: [["a"], ["b"]]."""

    inputs: Text | Annotated[list[Annotated[list[Text], told(minItems=1, maxItems=1)]], told(minItems=1, maxItems=32)]
    truncate: StrictBool = Field(default=True, description="Cut what is too long, rather than refuse it.")
    raw_scores: StrictBool = Field(default=False, description="Logits instead of probabilities.")

    @field_validator("inputs", mode="before")
    @classmethod
    def no_pairs(cls, inputs: Any) -> Any:
        """Refuse sentence pairs, with a message that shows a batch."""
        if isinstance(inputs, list) and any(not isinstance(one, list) or len(one) != 1 for one in inputs):
            raise ValueError(
                'A list of strings is a sentence pair, which this model does not take; a batch is [["a"], ["b"]].'
            )
        return inputs


class Parameters(BaseModel):
    """What Hugging Face's clients may ask for."""

    top_k: Annotated[int, Field(ge=1)] | None = None
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = None


class PipelineRequest(BaseModel):
    """As Hugging Face's inference API has it: a text or several."""

    inputs: Text | Annotated[list[Text], told(minItems=1, maxItems=32)]
    parameters: Parameters = Parameters()


class ExplainRequest(BaseModel):
    """A text whose label is to be explained."""

    inputs: Text


class RefusedError(HeadstartError):
    """A request that gets an answer of this status."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


STATUSES = {400: "Empty", 401: "Unauthorized", 413: "Too large", 422: "Validation", 429: "Overloaded", 503: "Unhealthy"}
RESPONSES: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorAnswer, "description": STATUSES[code]} for code in STATUSES
}


def failure(status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error as both dialects have it."""
    needed = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}
    return JSONResponse({"error": message, "error_type": kind}, status, headers or needed.get(status))
