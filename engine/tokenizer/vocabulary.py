"""The two kinds of vocabulary a checkpoint may bring, both seen as a table from token id to bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from ..common.errors import ConfigError
from ..common.foreign_text import printable
from ..common.text_files import read_text

#: SentencePiece writes a space as this character (U+2581).
_SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"


#: A table has an entry for each id up to the largest; no model has this many.
MAX_TOKEN_ID = (1 << 24) - 1


class Vocabulary(Protocol):
    #: What each id adds to a text.
    pieces: list[bytes]
    #: Ids that a reader is not shown: end of text, padding, marks of a chat template.
    special_ids: frozenset[int]
    #: Encoding puts a space before the text, so decoding takes one away.
    strips_first_space: bool

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def token_id(self, token: str) -> int | None: ...


class HuggingFaceVocabulary:
    """tokenizer.json, by the `tokenizers` library."""

    def __init__(self, file: Path) -> None:
        text = read_text(file)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
            decoder = json.loads(text).get("decoder")
        except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
            raise ConfigError(f"{file}: not a tokenizer ({printable(error)})") from None
        # A file may ask for the lengths its training used; a server must not cut prompts in silence.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

        to_bytes, self.strips_first_space = _piece_reader(file, decoder)
        added = self._tokenizer.get_added_tokens_decoder()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary or max(vocabulary.values()) > MAX_TOKEN_ID:
            raise ConfigError(f"{file}: not a tokenizer (its token ids must be 0..{MAX_TOKEN_ID})")
        self.pieces = [b""] * (max(vocabulary.values()) + 1)
        for piece, i in vocabulary.items():
            self.pieces[i] = added[i].content.encode() if i in added else to_bytes(piece)
        self.special_ids = frozenset(i for i, token in added.items() if token.special)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)


class SentencePieceVocabulary:
    """tokenizer.model, ERNIE-4.5's own form: the library knows pieces only, special tokens stand beside it.

    Args:
        known: ids of added tokens, by their text.
        special: tokens that are special; without an id in `known` or in the model they get the next free one.
        bos: put before a text that is encoded with special tokens.
    """

    def __init__(self, file: Path, known: dict[str, int], special: list[str], bos: str | None = None) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"{file}: not a SentencePiece model ({error})") from None
        size = self._model.get_piece_size()
        model_ids = {self._model.id_to_piece(i): i for i in range(size)}

        self._added = dict(known)
        for token in dict.fromkeys(special):
            if token not in self._added:
                following = max([size - 1, *self._added.values()]) + 1
                self._added[token] = model_ids.get(token, following)
        self._model_ids = model_ids
        self._bos_id = None if bos is None else self._added[bos]
        # The library would cut special tokens into letters, so the text is split around them first.
        # Longest first: "<|im_end|>" must not be found as a shorter token that it starts with.
        names = sorted(self._added, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None

        self.pieces = [b""] * max([size, *(i + 1 for i in self._added.values())])
        for piece, i in model_ids.items():
            byte = self._model.is_byte(i)
            self.pieces[i] = (
                bytes([int(piece[3:-1], 16)]) if byte else piece.replace(_SPACE_MARK, " ").encode()
            )
        for token, i in self._added.items():
            self.pieces[i] = token.encode()
        hidden = [i for i in range(size) if self._model.is_control(i) or self._model.is_unknown(i)]
        self.special_ids = frozenset([*hidden, *(self._added[token] for token in special)])
        # Whether the model adds a space is written inside it; asking it needs no protobuf library.
        self.strips_first_space = self._model.encode("a", out_type=str)[0].startswith(_SPACE_MARK)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = [self._bos_id] if add_special_tokens and self._bos_id is not None else []
        for part in self._split.split(text) if self._split else [text]:
            if part in self._added:
                ids.append(self._added[part])
            elif part:
                ids += self._model.encode(part)
        return ids

    def token_id(self, token: str) -> int | None:
        return self._added.get(token, self._model_ids.get(token))


class _ByteLevelReader:
    """Byte-level BPE writes each byte as one printable character: GPT-2's alphabet, read backwards."""

    def __init__(self) -> None:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        self._bytes = {chr(byte): byte for byte in printable}
        self._bytes |= {chr(256 + number): byte for number, byte in enumerate(others)}

    def __call__(self, piece: str) -> bytes:
        try:
            return bytes(self._bytes[character] for character in piece)
        except KeyError:
            return piece.encode()


class _MarkedSpaceReader:
    """SentencePiece's convention inside tokenizer.json: a mark for the space, `<0xAB>` for a byte."""

    _BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

    def __init__(self, byte_fallback: bool) -> None:
        self._byte_fallback = byte_fallback

    def __call__(self, piece: str) -> bytes:
        if self._byte_fallback and (match := self._BYTE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        return piece.replace(_SPACE_MARK, " ").encode()


def _piece_reader(
    file: Path, decoder: dict[str, Any] | None
) -> tuple[_ByteLevelReader | _MarkedSpaceReader, bool]:
    """How the file's decoder reads a piece, and whether it takes a space off the front of the text."""
    steps = (decoder or {}).get("decoders", [decoder] if decoder else [])
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return _ByteLevelReader(), False
    if kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        strips = any(
            (step["type"] == "Strip" and step.get("start", 0) > 0)
            or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
            for step in steps
        )
        return _MarkedSpaceReader("ByteFallback" in kinds), strips
    raise ConfigError(
        f"{file}: decoder {sorted(kinds) or 'null'} is not supported; ByteLevel and SentencePiece's "
        "(Replace, ByteFallback, Fuse) are"
    )
