"""What clients send: the fields of OpenAI's interface that are honoured, and nothing silently else.

Fields that would change the answer and are not supported are refused; those that only describe the
caller (``user``, ``metadata``, ``store``) are taken and ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Token = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, Field(max_length=10_000_000)]


class StreamOptions(BaseModel):
    """Options of a stream."""

    include_usage: bool = False


class JsonSchema(BaseModel):
    """A JSON Schema with its name."""

    model_config = ConfigDict(extra="allow")

    name: str = "answer"
    schema_: dict[str, Any] | bool = Field(alias="schema", default_factory=dict)


class ResponseFormat(BaseModel):
    """What the answer has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Common(BaseModel):
    """Fields of both kinds of completion."""

    model_config = ConfigDict(extra="forbid")

    model: str = ""
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=1, ge=1, le=16)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: Text | list[Text] | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=1_000_000)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    response_format: ResponseFormat | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool | None = False
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None

    @property
    def stops(self) -> list[str]:
        """Stop strings."""
        given = self.stop or []
        return [given] if isinstance(given, str) else given

    @property
    def usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Common):
    """Body of ``POST /v1/completions``."""

    prompt: Text | list[Text] | list[Token] | list[list[Token]]
    max_tokens: int | None = Field(default=16, ge=1)
    echo: bool | None = False
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: Literal[1] | None = None
    suffix: None = None


class Part(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[Part] | None = None

    @property
    def text(self) -> str:
        """Its text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatRequest(Common):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)


class TraceRequest(BaseModel):
    """Body of ``POST /api/trace``."""

    model_config = ConfigDict(extra="forbid")

    prompt: Text
    max_tokens: int = Field(default=96, ge=1)
    temperature: float = Field(default=0.0, ge=0, le=2)
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    json_schema: dict[str, Any] | None = None
