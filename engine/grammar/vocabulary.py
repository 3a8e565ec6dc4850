"""A checkpoint's vocabulary as llguidance reads it."""

from __future__ import annotations

from llguidance import LLTokenizer, TokenizerWrapper

from ..tokenizer.tokenizer import Tokenizer

#: Bits of a mask come in multiples of so many tokens.
_ALIGNMENT = 64


def grammar_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> LLTokenizer:
    """Return the vocabulary of a model with `vocab_size` columns of logits.

    Tokens that the tokenizer does not know have no bytes, so no grammar allows them.
    """
    size = -(-vocab_size // _ALIGNMENT) * _ALIGNMENT
    pieces = tokenizer.pieces[:vocab_size]
    eos = [token_id for token_id in tokenizer.eos_token_ids if token_id < len(pieces)]
    special = sorted(token_id for token_id in tokenizer.special_ids if token_id < len(pieces))
    adapter = _Adapter(tokenizer, [*pieces, *[b""] * (size - len(pieces))], eos, special)
    return LLTokenizer(TokenizerWrapper(adapter), eos_token=eos)


class _Adapter:
    """Has the attributes that `TokenizerWrapper` reads."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], eos: list[int], special: list[int]) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = eos[0]
        self._tokenizer = tokenizer
        self._longest = max(map(len, tokens))
        self._ids = {piece: token_id for token_id, piece in enumerate(tokens) if piece}
        for token_id in special:
            if self._ids.get(tokens[token_id]) == token_id:
                del self._ids[tokens[token_id]]

    def __call__(self, text: bytes) -> list[int]:
        """Return the tokens of a text inside of a longer one.

        The library writes what a grammar forces in these tokens, so their bytes must be those of the text:
        without the space that SentencePiece adds, and without normalisation.
        """
        try:
            string = text.decode()
        except UnicodeDecodeError:
            return self._greedy(text)
        ids = self._tokenizer.encode_inside(string)
        return self._greedy(text) if ids is None or max(ids, default=0) >= len(self.tokens) else ids

    def _greedy(self, text: bytes) -> list[int]:
        """Return the longest tokens from left to right, up to the first byte without a token."""
        ids, start = [], 0
        while start < len(text):
            for end in range(min(len(text), start + self._longest), start, -1):
                if (token_id := self._ids.get(text[start:end])) is not None:
                    break
            else:
                break
            ids.append(token_id)
            start = end
        return ids
