"""Tokenizer, chat template and incremental detokenizer of a checkpoint.

Each token id stands for a fixed sequence of bytes, and a text is their concatenation as UTF-8. This holds for
both kinds of tokenizer that ERNIE-4.5 checkpoints use (SentencePiece with byte fallback, byte-level BPE). It
makes streaming exact and cheap, because no token is decoded twice.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..common.errors import ConfigError, RequestError
from ..common.foreign_text import printable
from ..common.text_files import JsonObject, read_optional_object, read_text
from .chat_template import compile_template, reads, render_untrusted
from .vocabulary import MAX_TOKEN_ID, HuggingFaceVocabulary, SentencePieceVocabulary, Vocabulary

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FURTHER_TOKENS = "additional_special_tokens"
#: Texts that seldom share a token with what follows.
_TEXTS_BEFORE = ("\n", ",", "a")
#: Names that only some templates read.
_OPTIONAL_NAMES = ("tools", "tool_calls")
_SENTENCEPIECE_FILES = ("tokenizer.model", "spm.model")


class Tokenizer:
    """The tokenizer of a checkpoint. Immutable and thread-safe."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        named_tokens: dict[str, str] | None = None,
        eos_token_ids: tuple[int, ...] = (),
        chat_template: str | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._named_tokens = named_tokens or {}
        self._render: Callable[[dict[str, Any], float | None], str] | None = None
        if chat_template is not None:
            self._render = compile_template(chat_template)
        self._reads = frozenset(
            name for name in _OPTIONAL_NAMES if chat_template and reads(chat_template, name)
        )
        self.eos_token_ids = eos_token_ids

    @classmethod
    def from_directory(cls, path: Path, chat_template: str | None = None) -> Tokenizer:
        """Read tokenizer.json, or tokenizer.model or spm.model, and its settings.

        Args:
            chat_template: replaces the checkpoint's own template.

        Raises:
            ConfigError: there is no tokenizer, or a file cannot be read; the message names it.
        """
        settings = read_optional_object(path / "tokenizer_config.json")
        special = read_optional_object(path / "special_tokens_map.json")
        named = {
            key: token
            for key in _NAMED_TOKENS
            if (token := _token(special, key) or _token(settings, key)) is not None
        }
        vocabulary = _read_vocabulary(path, settings, special, named)

        eos: list[int] = []
        if "eos_token" in named and (found := vocabulary.token_id(named["eos_token"])) is not None:
            eos.append(found)
        for name in ("config.json", "generation_config.json"):
            eos += read_optional_object(path / name).integers("eos_token_id")

        source, template = Path("--chat-template"), chat_template
        if not template:
            source, template = _read_chat_template(path, settings)
        try:
            return cls(vocabulary, named, tuple(dict.fromkeys(eos)), template)
        except RequestError as error:
            raise ConfigError(f"{source}: {error}") from None

    @property
    def vocab_size(self) -> int:
        """Ids are 0 .. vocab_size - 1. The network's vocabulary may be larger; its extra ids add no text."""
        return len(self._vocabulary.pieces)

    @property
    def pieces(self) -> list[bytes]:
        """The bytes of each id."""
        return self._vocabulary.pieces

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that are not part of the visible text."""
        return self._vocabulary.special_ids

    @property
    def strips_first_space(self) -> bool:
        """True if encoding adds a space before a text, and decoding removes it."""
        return self._vocabulary.strips_first_space

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Return the ids of a text. Special tokens spelled out in it become their ids."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text has a lone surrogate (U+{ord(text[error.start]):04X}), which is not a character"
            ) from None
        return self._vocabulary.encode(text, add_special_tokens)

    def encode_inside(self, text: str) -> list[int] | None:
        """Return the ids of a text inside of a longer one, without the space that encoding adds before one.

        None if the tokenizer changes the text, or reads a special token in it.
        """
        for before in _TEXTS_BEFORE if self.strips_first_space else ("",):
            start = self.encode(before)
            ids = self.encode(before + text)
            inside = ids[len(start) :]
            is_same = b"".join(map(self.token_bytes, inside)) == text.encode()
            if ids[: len(start)] == start and is_same and self.special_ids.isdisjoint(inside):
                return inside
        return None

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ids. Bytes that are not UTF-8, e.g. half a character, become U+FFFD."""
        detokenizer = self.detokenizer(skip_special_tokens)
        return detokenizer.push(token_ids) + detokenizer.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that an id adds to a text: the name of a special token, none for unknown ids."""
        pieces = self._vocabulary.pieces
        return pieces[token_id] if 0 <= token_id < len(pieces) else b""

    def token_text(self, token_id: int) -> str:
        """Return a token as text for display; part of a character becomes U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def is_special(self, token_id: int) -> bool:
        """Return True if the token is not part of the visible text."""
        return token_id in self._vocabulary.special_ids

    def token_id(self, text: str) -> int | None:
        """Return the id of the token with this text, if there is one."""
        return self._vocabulary.token_id(text)

    @property
    def has_chat_template(self) -> bool:
        return self._render is not None

    def template_reads(self, name: str, chat_template: str | None = None) -> bool:
        """Return True if the template, or a client's template instead, reads `tools` or `tool_calls`."""
        return name in self._reads if chat_template is None else reads(chat_template, name)

    def detokenizer(
        self,
        skip_special_tokens: bool = True,
        *,
        continues: bool = False,
        shown_ids: frozenset[int] = frozenset(),
    ) -> IncrementalDetokenizer:
        """Return a detokenizer for the ids of one text.

        Args:
            continues: the ids continue a text, so a leading space separates words and is kept. Otherwise it
                is the one that encoding adds before a text.
            shown_ids: special tokens that are not skipped.
        """
        skipped = self._vocabulary.special_ids if skip_special_tokens else frozenset[int]()
        if shown_ids:
            skipped -= shown_ids
        strips = self._vocabulary.strips_first_space and not continues
        return IncrementalDetokenizer(self._vocabulary.pieces, skipped, strips)

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        rendered_at: float | None = None,
        **variables: Any,
    ) -> str:
        """Return the conversation as text with special tokens spelled out, for `encode`.

        Args:
            chat_template: a client's template instead of the checkpoint's; rendered with resource limits.
            rendered_at: Unix time in seconds that the template sees as the current time; None: now.
            variables: further variables of the template (`chat_template_kwargs` of a request).

        Raises:
            RequestError: there is no template, or it rejects these messages or fails.
        """
        variables = {
            **self._named_tokens,
            **variables,
            "messages": [_with_text_content(message, index) for index, message in enumerate(messages)],
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        if chat_template is not None:
            return render_untrusted(chat_template, variables, rendered_at)
        if self._render is None:
            raise RequestError(
                "this checkpoint has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json); send one as chat_template, or use /v1/completions",
                "chat_template",
            )
        return self._render(variables, rendered_at)


class IncrementalDetokenizer:
    """Converts a growing list of ids to text that is never revised.

    The concatenated results of `push` and the final `flush` equal `Tokenizer.decode` of all ids.
    """

    def __init__(self, pieces: list[bytes], skipped_ids: frozenset[int], strips_first_space: bool) -> None:
        self._pieces = pieces
        self._skipped_ids = skipped_ids
        self._strip_pending = strips_first_space
        # Holds back the bytes of an incomplete character.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Iterable[int]) -> str:
        data = b"".join(
            self._pieces[i] for i in token_ids if 0 <= i < len(self._pieces) and i not in self._skipped_ids
        )
        if self._strip_pending and data:
            data = data.removeprefix(b" ")
            self._strip_pending = False
        return self._decoder.decode(data)

    def flush(self) -> str:
        """Return U+FFFD if the text ends inside a character, otherwise an empty string."""
        return self._decoder.decode(b"", final=True)


def _with_text_content(message: dict[str, Any], index: int) -> dict[str, Any]:
    """Return the message with its content as one string, which templates of text models expect."""
    content = message.get("content")
    if isinstance(content, str):
        return message
    if content is None:  # an assistant message with tool calls only
        content = []
    texts = []
    for number, part in enumerate(content if isinstance(content, list) else [content]):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(
                'this model reads text only: a part of content must be {"type": "text", "text": "..."}',
                f"messages[{index}].content[{number}]",
            )
        texts.append(part["text"])
    return {**message, "content": "".join(texts)}


def _read_vocabulary(
    path: Path, settings: JsonObject, special: JsonObject, named: dict[str, str]
) -> Vocabulary:
    if (path / "tokenizer.json").exists():
        return HuggingFaceVocabulary(path / "tokenizer.json")
    for name in _SENTENCEPIECE_FILES:
        if (path / name).exists():
            added = read_optional_object(path / "added_tokens.json")
            known = {token: added.integer(token, most=MAX_TOKEN_ID) for token in added.values}
            decoder = settings.object("added_tokens_decoder")
            for number in decoder.values:
                if not _is_token_id(number):
                    raise ConfigError(
                        f"{settings.file}: added_tokens_decoder.{printable(number)} is not a token id "
                        f"(0..{MAX_TOKEN_ID})"
                    )
                if (token := _token(decoder, number)) is not None:
                    known[token] = int(number)
            source = special if special.items(_FURTHER_TOKENS) else settings
            further = [_content(source, _FURTHER_TOKENS, each) for each in source.items(_FURTHER_TOKENS)]
            bos = named.get("bos_token") if settings.boolean("add_bos_token", False) else None
            return SentencePieceVocabulary(path / name, known, [*named.values(), *further], bos)
    raise ConfigError(
        f"{path}: no tokenizer; one of tokenizer.json, {', '.join(_SENTENCEPIECE_FILES)} is needed"
    )


def _read_chat_template(path: Path, settings: JsonObject) -> tuple[Path, str | None]:
    """Return the file of the template, and the template or None."""
    file = path / "chat_template.jinja"
    if file.exists():
        return file, read_text(file)
    if not isinstance(settings.values.get("chat_template"), list):
        return settings.file, settings.text("chat_template")
    for entry in settings.items("chat_template"):
        match entry:
            case {"name": str(name), "template": str(template)}:
                if name == "default":
                    return settings.file, template
            case _:
                raise settings.wrong("chat_template", 'a string, or a list of {"name": ..., "template": ...}')
    return settings.file, None


def _is_token_id(text: str) -> bool:
    # Python refuses to convert integers with thousands of digits.
    is_number = text.isascii() and text.isdecimal() and len(text) <= len(str(MAX_TOKEN_ID))
    return is_number and int(text) <= MAX_TOKEN_ID


def _token(source: JsonObject, key: str) -> str | None:
    """Return the text of a special token; None if it is missing or empty."""
    value = source.values.get(key)
    return _content(source, key, value) or None if value is not None else None


def _content(source: JsonObject, key: str, token: Any) -> str:
    """Return the text of a token, which is a plain string or a {"content": ..., "lstrip": ...} object."""
    match token:
        case str(text) | {"content": str(text)}:
            return text
        case _:
            raise source.wrong(key, 'a string or {"content": ...}')
