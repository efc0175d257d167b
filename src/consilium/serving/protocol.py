"""Requests of the HTTP API, field by field: those of OpenAI's, and what vLLM's clients know beside them.

A field that is not here is refused. ``None`` is what a client sends for a field that it leaves out.
"""

from __future__ import annotations

from abc import ABC
from typing import Annotated, Any, Final, Literal, final

from pydantic import BaseModel, ConfigDict, Field, field_validator

from consilium.engine.request import LEAST_PENALTY
from consilium.serving import limits

_STRICT: Final = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Id = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[Id], Field(min_length=1)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
Expert = Annotated[list[Count], Field(min_length=2, max_length=2)]
Choice = Annotated[int, Field(ge=-1, lt=2**15)]
Stop = Annotated[str, Field(min_length=1, max_length=limits.STOP_CHARACTERS)]
Stops = Stop | Annotated[list[Stop], Field(max_length=limits.STOPS)]
Prompts = str | Ids | Annotated[list[str] | list[Ids], Field(min_length=1, max_length=limits.PROMPTS)]


@final
class StreamOptions(BaseModel):
    model_config = _STRICT

    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted, and nothing is added: there is no network between a model and its own machine's reader."""


@final
class JsonSchema(BaseModel):
    model_config = _STRICT

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    """Accepted: a schema always holds."""


@final
class ResponseFormat(BaseModel):
    model_config = _STRICT

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


@final
class Structured(BaseModel):
    """What vLLM's clients ask for."""

    model_config = _STRICT

    json_: dict[str, Any] | None = Field(default=None, alias="json")
    regex: Annotated[str, Field(max_length=limits.FORM_CHARACTERS)] | None = None
    choice: (
        Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=256)] | None
    ) = None


class Generating(BaseModel, ABC):
    """What completions and chats share."""

    model_config = _STRICT

    model: str | None = None
    experts_per_token: Annotated[int, Field(ge=1, lt=2**15)] | None = None
    """Fewer than the model chooses."""
    frequency_penalty: Penalty | None = None
    ignore_eos: bool = False
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=limits.BIASES)] | None
    ) = None
    max_tokens: Count | None = None
    metadata: dict[str, Any] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    mute_experts: Annotated[list[Expert], Field(max_length=limits.MUTED)] | None = None
    """Layers and experts that nothing of this request goes to."""
    n: Annotated[int, Field(ge=1, le=limits.SAMPLES)] | None = None
    presence_penalty: Penalty | None = None
    replay_routed_experts: list[list[list[Choice]]] | None = None
    """Experts of its first tokens [T, M, K], as an earlier answer told them: the prompt's, then its own."""
    repetition_penalty: Annotated[float, Field(ge=LEAST_PENALTY, le=100)] | None = None
    response_format: ResponseFormat | None = None
    return_routed_experts: bool = False
    """Whether the answer says which experts computed which token, under vLLM's names."""
    return_token_ids: bool = False
    """Whether the answer says which tokens the prompt and the answer are, under vLLM's names."""
    seed: Seed | None = None
    stop: Stops | None = None
    stop_token_ids: Annotated[list[Id], Field(max_length=limits.STOPS)] | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: Structured | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    user: str | None = None

    @field_validator("logit_bias")
    @classmethod
    def _tokens(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for token in bias or ():
            if not (token.isascii() and token.isdigit() and len(token) < 10):
                raise ValueError(f"logit_bias has {token[:20]!r}, which is no token id")
        return bias

    @property
    def stops(self) -> tuple[str, ...]:
        match self.stop:
            case None:
                return ()
            case str() as one:
                return (one,)
            case several:
                return tuple(several)


@final
class CompletionRequest(Generating):
    prompt: Prompts
    add_special_tokens: bool = True
    best_of: Annotated[int, Field(ge=1, le=limits.SAMPLES)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=limits.TOP)] | None = None
    suffix: None = None


@final
class TextPart(BaseModel):
    model_config = _STRICT

    type: Literal["text"]
    text: str


@final
class Function(BaseModel):
    model_config = _STRICT

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


@final
class Tool(BaseModel):
    model_config = _STRICT

    type: Literal["function"]
    function: Function


@final
class ChosenFunction(BaseModel):
    model_config = _STRICT

    name: Name


@final
class ChosenTool(BaseModel):
    model_config = _STRICT

    type: Literal["function"]
    function: ChosenFunction


@final
class CalledFunction(BaseModel):
    model_config = _STRICT

    name: str
    arguments: str


@final
class ToolCall(BaseModel):
    model_config = _STRICT

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


@final
class ChatMessage(BaseModel):
    model_config = _STRICT

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: None = None
    reasoning_content: str | None = None
    """Accepted, and not told again: a model answers without its earlier thoughts."""
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=limits.CALLS)] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        match self.content:
            case None:
                return ""
            case str() as text:
                return text
            case parts:
                return "\n".join(part.text for part in parts)


@final
class Switches(BaseModel):
    """What templates of models that think are asked with."""

    model_config = _STRICT

    enable_thinking: bool | None = None
    thinking: bool | None = None

    @property
    def given(self) -> dict[str, bool]:
        return self.model_dump(exclude_none=True)


@final
class ChatRequest(Generating):
    chat_template_kwargs: Switches | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=limits.MESSAGES)]
    logprobs: bool | None = None
    max_completion_tokens: Count | None = None
    parallel_tool_calls: bool | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    tools: Annotated[list[Tool], Field(max_length=limits.TOOLS)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=limits.TOP)] | None = None


@final
class EmbeddingRequest(BaseModel):
    model_config = _STRICT

    input: Prompts
    model: str | None = None
    dimensions: None = None
    encoding_format: Literal["float", "base64"] | None = None
    pooling: Literal["mean", "last"] = "mean"
    user: str | None = None


@final
class TokenizeRequest(BaseModel):
    model_config = _STRICT

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


@final
class DetokenizeRequest(BaseModel):
    model_config = _STRICT

    model: str | None = None
    tokens: list[Id]
