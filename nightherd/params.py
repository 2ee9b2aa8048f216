"""Generation parameters and request bodies: their names, ranges and layers.

The names are those of the OpenAI and vLLM APIs; transformers' are accepted as aliases. Four layers
make the *effective* parameters of a request, the first that sets a name wins: the request, the
job, the checkpoint's `generation_config.json` (only `GENERATION_CONFIG_NAMES`), the defaults here.
Layers are plain dicts of canonical names, as `parse_params` returns and SQL stores them.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    StrictBool,
    StrictInt,
    ValidationError,
    model_validator,
)

from nightherd.errors import ParameterError

DEFAULT_MAX_TOKENS = 256

GENERATION_CONFIG_NAMES = ("temperature", "top_p", "top_k", "repetition_penalty")
"""What a checkpoint's generation_config.json may set; never its lengths."""

_ALIASES = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "num_return_sequences": "n",
    "guided_json": "structured_outputs",
    "guided_regex": "structured_outputs",
    "guided_choice": "structured_outputs",
    "guided_grammar": "structured_outputs",
}


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str | int) and not isinstance(value, bool) else value


def _int_keys(value: object) -> object:
    # JSON knows only string keys.
    if isinstance(value, Mapping):
        try:
            return {int(key): bias for key, bias in value.items()}
        except (TypeError, ValueError):
            return value
    return value


TokenId = Annotated[StrictInt, Field(ge=0)]
Seed = Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)]


class SamplingParams(BaseModel):
    """The parameters of one request, all of them, at their defaults where nothing is given.

    `seed` stands apart from the rest in storage: results point at a parameter set without it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    max_tokens: Annotated[StrictInt, Field(ge=1)] = DEFAULT_MAX_TOKENS
    """Tokens to generate, at most."""
    max_length: Annotated[StrictInt, Field(ge=1)] | None = None
    """Prompt and generated tokens together, at most (transformers' name)."""
    min_tokens: Annotated[StrictInt, Field(ge=0)] = 0
    """No end of sequence, stop token or stop string counts before so many tokens."""
    temperature: Annotated[FiniteFloat, Field(ge=0)] = 1.0
    """0 is greedy."""
    top_p: Annotated[FiniteFloat, Field(gt=0, le=1)] = 1.0
    """Sample from the likeliest tokens that make up this probability."""
    top_k: Annotated[StrictInt, Field(ge=-1)] = 0
    """0 and -1 are off."""
    min_p: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.0
    """Drop tokens less likely than this share of the likeliest."""
    repetition_penalty: Annotated[FiniteFloat, Field(gt=0)] = 1.0
    """Above 1 discourages tokens of prompt and output."""
    presence_penalty: Annotated[FiniteFloat, Field(ge=-2, le=2)] = 0.0
    """Subtracted once from the logits of tokens that the output has."""
    frequency_penalty: Annotated[FiniteFloat, Field(ge=-2, le=2)] = 0.0
    """Subtracted for each time that the output has a token."""
    seed: Seed | None = None
    """Of one request; the seed of the job is `--seed`."""
    n: Annotated[StrictInt, Field(ge=1, le=10_000)] = 1
    """Samples of one prompt."""
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        BeforeValidator(_as_list),
        Field(max_length=64),
    ] = ()
    """End before any of these texts."""
    stop_token_ids: Annotated[tuple[TokenId, ...], BeforeValidator(_as_list)] = ()
    """End at any of these tokens, which are left out."""
    ignore_eos: StrictBool = False
    """Do not end at the end of sequence."""
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    """How many alternatives to report beside each chosen token; None is none at all."""
    skip_special_tokens: StrictBool = True
    """Leave special tokens out of the text."""
    include_stop_str_in_output: StrictBool = False
    """Keep the stop string at the end of the text."""
    truncate_prompt_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    """Keep only the last so many tokens of the prompt."""
    add_special_tokens: StrictBool | None = None
    """None: yes for a prompt, no for a chat (its template has written them)."""
    response_format: dict[str, Any] | None = None
    """text, json_object or json_schema, as the OpenAI API has it."""
    structured_outputs: dict[str, Any] | None = None
    """One of json (a schema), regex, choice (a list), grammar (Lark, GBNF), json_object (true);
    the transformers engine does not support it."""
    logit_bias: Annotated[
        dict[TokenId, Annotated[FiniteFloat, Field(ge=-100, le=100)]], BeforeValidator(_int_keys)
    ] = Field(default_factory=dict)
    """Added to the logits of these token ids, from -100 to 100."""
    bad_words: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Words that never appear, with or without a space before them."""
    allowed_token_ids: Annotated[tuple[TokenId, ...], Field(min_length=1)] | None = None
    """Only these tokens may be chosen."""

    @model_validator(mode="after")
    def _min_below_max(self) -> SamplingParams:
        if "max_tokens" in self.model_fields_set and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens ({self.min_tokens}) is greater than max_tokens ({self.max_tokens})"
            )
        return self

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


PARAMETER_NAMES = tuple(SamplingParams.model_fields)


def is_parameter(name: str) -> bool:
    """Whether `name` is a parameter, or an accepted alias of one."""
    return name in PARAMETER_NAMES or name in _ALIASES or name in ("do_sample", "top_logprobs")


def _canonical_names(given: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces aliases by canonical names; two names for one parameter must agree."""
    out: dict[str, Any] = {}
    origin: dict[str, str] = {}

    def put(name: str, value: Any, source: str) -> None:
        if name in out and out[name] != value:
            raise ParameterError(f"{origin[name]} and {source} contradict each other; give one")
        out[name] = value
        origin[name] = source

    for name, value in given.items():
        if name == "do_sample":
            if not isinstance(value, bool):
                raise ParameterError(f"do_sample must be true or false, got {value!r}")
            if value is False:
                put("temperature", 0, name)
        elif name == "top_logprobs":
            if value is not None and given.get("logprobs") is not True:
                raise ParameterError("top_logprobs needs logprobs: true")
        elif name == "logprobs" and isinstance(value, bool):
            # The chat API has a switch here, and the number in `top_logprobs`.
            if value:
                put(name, given.get("top_logprobs") or 0, name)
        elif name.startswith("guided_") and name in _ALIASES:
            put("structured_outputs", {name.removeprefix("guided_"): value}, name)
        else:
            put(_ALIASES.get(name, name), value, name)
    return out


def _reworded(text: str) -> str:
    """pydantic's message as the rest of a sentence that begins with the parameter's name."""
    for old, new in (
        ("Input should be", "must be"),
        ("String should have", "must have"),
        ("List should have", "must have"),
        ("Tuple should have", "must have"),
        ("Field required", "is missing"),
        ("Extra inputs are not permitted", "is not known here"),
        (" after validation, not 0", ""),
    ):
        text = text.replace(old, new)
    return text


def describe_error(error: ValidationError) -> str:
    """The first problem of a pydantic error in the user's words: name, rule, value."""
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, PARAMETER_NAMES, n=1)
        hint = f"; did you mean {close[0]}?" if close else "; docs/parameters.md lists them"
        return f"unknown parameter {name!r}{hint}"
    text = str(first["msg"]).removeprefix("Value error, ")
    if not name:
        return text
    return f"{name} {_reworded(text)}, got {first.get('input')!r}"


def parse_params(given: Mapping[str, Any]) -> dict[str, Any]:
    """Checks one layer of parameters and returns it by canonical names, as JSON values.

    Names given as null are left out. Raises `ParameterError` naming the first that is unknown, of
    the wrong type or out of range.
    """
    layer = {name: value for name, value in given.items() if value is not None}
    layer = _canonical_names(layer)
    try:
        checked = SamplingParams.model_validate(layer)
    except ValidationError as error:
        raise ParameterError(describe_error(error)) from None
    return checked.model_dump(mode="json", exclude_unset=True)


def effective_params(*layers: Mapping[str, Any] | None) -> SamplingParams:
    """Merges layers, the most specific first, over the defaults.

    Raises `ParameterError` where layers that are each valid contradict each other.
    """
    merged: dict[str, Any] = {}
    for layer in reversed(layers):
        merged.update(layer or {})
    # The default takes part in the check of min_tokens against max_tokens.
    least = merged.get("max_length") or DEFAULT_MAX_TOKENS
    merged.setdefault("max_tokens", max(least, merged.get("min_tokens", 0)))
    try:
        return SamplingParams.model_validate(merged)
    except ValidationError as error:
        raise ParameterError(describe_error(error)) from None


def generation_config_layer(config: Mapping[str, Any]) -> dict[str, Any]:
    """The layer that a checkpoint's generation_config.json contributes."""
    layer = {name: config[name] for name in GENERATION_CONFIG_NAMES if config.get(name) is not None}
    return parse_params(layer)


def canonical_json(value: object) -> str:
    """JSON that is the same text for equal values: sorted keys, no spaces, no ASCII escapes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def parameter_set(params: SamplingParams) -> tuple[str, str]:
    """`(hash, canonical JSON)` of effective parameters, without the seed."""
    text = canonical_json(params.model_dump(mode="json", exclude={"seed"}))
    return hashlib.sha256(text.encode()).hexdigest()[:32], text


def sample_seed(job_seed: int, request_seed: int | None, index: int, sample: int) -> int:
    """The seed of one sample, 63 bits.

    With a seed of its own a request's samples do not depend on its index in the job.
    """
    source = f"r:{request_seed}" if request_seed is not None else f"j:{job_seed}:{index}"
    digest = hashlib.blake2b(f"{source}:{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class TextPart(BaseModel):
    """A part of a message's content; text is the only kind that these checkpoints read."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


def _flatten(content: object) -> object:
    if isinstance(content, list):
        return "".join(TextPart.model_validate(part).text for part in content)
    return content


class Message(BaseModel):
    """One message of a chat, as the OpenAI API has it."""

    # A chat template may use more keys (`name`, `tool_calls`): they are kept.
    model_config = ConfigDict(extra="allow")

    role: Annotated[str, Field(min_length=1)]
    content: Annotated[str, BeforeValidator(_flatten)]


class RequestBody(BaseModel):
    """What a request gives to the model: a prompt, a chat, or both.

    With both, the chat is used where the checkpoint has a chat template, else the prompt (tasks
    are written so). `metadata` is stored with the request and returned on demand.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: str | Annotated[list[TokenId], Field(min_length=1)] | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    metadata: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _prompt_or_messages(self) -> RequestBody:
        if self.prompt is None and self.messages is None:
            raise ValueError("neither a prompt nor messages")
        return self


def parse_body(given: Mapping[str, Any]) -> dict[str, Any]:
    """Checks a request body and returns it as JSON values; raises `ParameterError`."""
    try:
        body = RequestBody.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(
            str(part) for part in first["loc"] if part not in ("str", "function-before[_flatten()")
        )
        text = str(first["msg"]).removeprefix("Value error, ")
        raise ParameterError(f"{name} {_reworded(text)}".strip()) from None
    return body.model_dump(mode="json", exclude_none=True)
