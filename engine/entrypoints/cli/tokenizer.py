"""`fastdeploy tokenizer`: a model's tokenizer at work."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...common.cli import CommandLine
from ...common.errors import ConfigError
from ...demo_model.model import resolve_model_path
from ...tokenizer.tokenizer import Tokenizer


def main(words: Sequence[str]) -> int:
    parser = _parser()
    options = parser.parse_args(words)
    actions = (options.encode, options.decode, options.vocab_export)
    if not (options.vocab_size or options.info or any(value is not None for value in actions)):
        parser.error("give at least one of --encode, --decode, --vocab-size, --info and --vocab-export")
    token_ids = None if options.decode is None else _token_ids(options.decode)
    directory = resolve_model_path(options.model)
    tokenizer = Tokenizer.from_directory(directory)
    if options.encode is not None:
        print("Encoded tokens:", tokenizer.encode(options.encode, add_special_tokens=True))
    if token_ids is not None:
        if unknown := [each for each in token_ids if each >= tokenizer.vocab_size]:
            raise ConfigError(
                f"--decode has token id {unknown[0]}; this tokenizer's ids are below {tokenizer.vocab_size}"
            )
        print("Decoded text:", tokenizer.decode(token_ids, skip_special_tokens=False))
    if options.vocab_size:
        print("Vocabulary size:", tokenizer.vocab_size)
    if options.info:
        print(json.dumps(_info(tokenizer, directory), ensure_ascii=False, indent=2))
    if options.vocab_export is not None:
        _export(tokenizer, options.vocab_export)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandLine(
        prog="fastdeploy tokenizer",
        description="Encodes and decodes with a model's tokenizer. The options may be combined.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "-m",
        "--model",
        "--model_name_or_path",
        required=True,
        metavar="MODEL",
        help='directory of a checkpoint, or "demo"',
    )
    parser.add_argument("-e", "--encode", metavar="TEXT", help="print the token ids of a text")
    parser.add_argument("-d", "--decode", metavar="IDS", help="print the text of token ids: [1, 2] or 1,2")
    parser.add_argument("-vs", "--vocab-size", action="store_true", help="print the number of token ids")
    parser.add_argument("-i", "--info", action="store_true", help="print facts about the tokenizer as JSON")
    parser.add_argument(
        "-ve",
        "--vocab-export",
        type=Path,
        metavar="FILE",
        help="write all tokens: one JSON object into a .json, otherwise a line with id and token for each",
    )
    return parser


def _token_ids(text: str) -> list[int]:
    inner = text.strip().removeprefix("[").removesuffix("]")
    try:
        found = [int(word) for word in inner.replace(",", " ").split()]
    except ValueError:
        found = [-1]
    if min(found, default=0) < 0:
        raise ConfigError(f"--decode is {text[:100]!r}; it must be token ids such as [1, 2, 3]")
    return found


def _info(tokenizer: Tokenizer, directory: Path) -> dict[str, Any]:
    return {
        "model": str(directory),
        "vocab_size": tokenizer.vocab_size,
        "special_tokens": {tokenizer.token_text(each): each for each in sorted(tokenizer.special_ids)},
        "eos_token_ids": list(tokenizer.eos_token_ids),
        "has_chat_template": tokenizer.has_chat_template,
    }


def _export(tokenizer: Tokenizer, file: Path) -> None:
    tokens = [tokenizer.token_text(token_id) for token_id in range(tokenizer.vocab_size)]
    if file.suffix.lower() == ".json":
        # Several ids may have the same text, such as parts of characters.
        text = json.dumps(dict(enumerate(tokens)), ensure_ascii=False, indent=2) + "\n"
    else:
        text = "".join(f"{token_id}\t{token!r}\n" for token_id, token in enumerate(tokens))
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--vocab-export {file}: cannot be written ({error.strerror})") from None
    print(f"Vocabulary exported to: {file}")
    print("Total tokens:", len(tokens))
