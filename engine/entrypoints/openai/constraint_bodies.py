"""Declarations of the fields that constrain an output: structured output, biases, bad words, allowed ids."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from ...grammar.validation import MAX_CHARACTERS, MAX_TAGS, MAX_WORDS
from .field_types import Name, TokenId
from .validation import Body

MAX_BIASES = 1024
MAX_BAD_WORDS = 1024
#: Of a bad word.
MAX_WORD_LENGTH = 256
MAX_ALLOWED = 1 << 18

Bias = Annotated[float, Meta(ge=-100.0, le=100.0)]
#: Of a part of a text.
Mark = Annotated[str, Meta(min_length=1, max_length=1024)]
#: Of a grammar.
Text = Annotated[str, Meta(max_length=MAX_CHARACTERS)]
Word = Annotated[str, Meta(max_length=MAX_CHARACTERS)]
Choice = Annotated[
    Annotated[list[Word], Meta(min_length=1, max_length=MAX_WORDS)] | None,
    Meta(extra={"expected": "a list of strings"}, description="The output is one of these."),
]
Schema = Annotated[
    dict[str, Any] | Text | bool | None,
    Meta(extra={"expected": "a JSON schema"}, description="A JSON schema, or its text."),
]
Regex = Annotated[Text | None, Meta(description="A regular expression of the whole output.")]
Grammar = Annotated[Text | None, Meta(description="A grammar in Lark or GBNF.")]
StructuralTag = Annotated[
    dict[str, Any] | Text | None,
    Meta(
        extra={"expected": "an object with structures and triggers"},
        description="An object with structures and triggers, or its text.",
    ),
]


class JsonSchemaFormat(Body, frozen=True, kw_only=True):
    """A JSON schema with its name."""

    name: Annotated[Name | None, Meta(description="A note of the client.")] = None
    description: Annotated[str | None, Meta(description="A note of the client.")] = None
    schema: Schema = None
    strict: Annotated[bool | None, Meta(description="A schema is always enforced.")] = None


class TagStructure(Body, frozen=True, kw_only=True):
    """A part of a text: `begin`, JSON of this schema, `end`."""

    begin: Mark
    schema: Schema = None
    end: Name


Structures = Annotated[list[TagStructure], Meta(min_length=1, max_length=MAX_TAGS)]
Triggers = Annotated[list[Mark], Meta(min_length=1, max_length=MAX_TAGS)]


class TagFormat(Body, frozen=True, kw_only=True):
    """Free text in which structures follow their triggers."""

    structures: Structures
    triggers: Triggers


class ResponseFormat(Body, frozen=True, kw_only=True):
    """The format of the output."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"] | None = None
    json_schema: Annotated[JsonSchemaFormat | None, Meta(description="For the type json_schema.")] = None
    structures: Annotated[Structures | None, Meta(description="For the type structural_tag.")] = None
    triggers: Annotated[Triggers | None, Meta(description="For the type structural_tag.")] = None


class StructuredOutputs(Body, frozen=True, kw_only=True):
    """vLLM's object for structured output."""

    json: Schema = None
    json_object: bool | None = None
    regex: Regex = None
    choice: Choice = None
    grammar: Grammar = None
    structural_tag: StructuralTag = None
    whitespace_pattern: Annotated[Text | None, Meta(description="Between two tokens of JSON.")] = None
    disable_any_whitespace: Annotated[bool | None, Meta(description="JSON without whitespace.")] = None
    disable_additional_properties: Annotated[
        bool | None, Meta(description="Objects of a schema have only the properties that it names.")
    ] = None
    disable_fallback: Annotated[bool | None, Meta(description="Without effect: there is one engine.")] = None


class ConstraintBody(Body, frozen=True, kw_only=True):
    """Fields that constrain the output; at most one of those for structured output."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema = None
    guided_json_object: bool | None = None
    guided_regex: Regex = None
    guided_choice: Choice = None
    guided_grammar: Grammar = None
    guided_whitespace_pattern: Annotated[Text | None, Meta(description="Between two tokens of JSON.")] = None
    structural_tag: StructuralTag = None
    json_schema: Schema = None
    regex: Regex = None
    ebnf: Grammar = None
    logit_bias: Annotated[
        Annotated[dict[str, Bias | None], Meta(max_length=MAX_BIASES)] | None,
        Meta(description="What is added to the logits of token ids."),
    ] = None
    bad_words: Annotated[
        Annotated[
            list[Annotated[str, Meta(min_length=1, max_length=MAX_WORD_LENGTH)]],
            Meta(max_length=MAX_BAD_WORDS),
        ]
        | None,
        Meta(extra={"expected": "a list of strings"}, description="The output has none of these."),
    ] = None
    bad_words_token_ids: Annotated[
        Annotated[
            list[TokenId | Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_WORD_LENGTH)]],
            Meta(max_length=MAX_BAD_WORDS),
        ]
        | None,
        Meta(
            extra={"expected": "a list of token ids or of such lists"},
            description="The output has none of these.",
        ),
    ] = None
    allowed_token_ids: Annotated[
        Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_ALLOWED)] | None,
        Meta(extra={"expected": "a list of token ids"}, description="The only ones of the output."),
    ] = None
