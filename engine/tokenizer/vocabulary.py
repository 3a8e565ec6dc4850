"""The two kinds of vocabulary of checkpoints, as tables from token id to bytes."""

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


#: Limits the size of the tables; no model has ids this large.
MAX_TOKEN_ID = (1 << 24) - 1


class Vocabulary(Protocol):
    #: The bytes of each id.
    pieces: list[bytes]
    #: Ids that are not part of the visible text: end of text, padding, chat template tokens.
    special_ids: frozenset[int]
    #: Encoding adds a space before the text, so decoding removes one.
    strips_first_space: bool

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def token_id(self, token: str) -> int | None: ...


class HuggingFaceVocabulary:
    """The vocabulary of a tokenizer.json, read by the `tokenizers` library."""

    def __init__(self, file: Path) -> None:
        text = read_text(file)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
            decoder = json.loads(text).get("decoder")
        except Exception as error:  # the library raises bare Exception for any error in the file
            raise ConfigError(f"{file}: not a tokenizer ({printable(error)})") from None
        # The file may specify the lengths used in training, but a server must not truncate prompts silently.
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
    """The vocabulary of a SentencePiece tokenizer.model, which does not include added tokens.

    Args:
        known: ids of added tokens, by their text.
        special: special tokens; those without an id in `known` or in the model get the next free id.
        bos: token before a text that is encoded with special tokens.
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
        # The library would split special tokens into letters, so the text is split at them first. Longest
        # first: "<|im_end|>" must not match as a shorter token that is its prefix.
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
        # Trying it needs no protobuf library, unlike reading the setting from the model.
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
    """Decodes pieces of byte-level BPE, in which each byte is one character of GPT-2's alphabet."""

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
    """Decodes pieces in SentencePiece's notation: U+2581 for a space, `<0xAB>` for a byte."""

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
    """Return the reader of pieces for the file's decoder, and True if it strips a leading space."""
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
        f"{file}: decoder {sorted(kinds) or 'null'} is not supported; use ByteLevel or SentencePiece's "
        "(Replace, ByteFallback, Fuse)"
    )
