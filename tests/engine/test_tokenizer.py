"""Tokenizers of both kinds: ids and text agree, streams never show half a character, specials stay whole."""

from __future__ import annotations

import io
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import assume, given
from hypothesis import strategies as st

from fastdeploy.common.errors import ConfigError, RequestError
from fastdeploy.tokenizer.tokenizer import Tokenizer

TINY = Path(__file__).parent.parent / "fixtures" / "tiny"
CORPUS = ["hello world, this is a text", "the quick brown fox", "日本語 text と 中文", "naïve café"] * 20
#: Characters of one to four bytes, in and out of the vocabularies, and what templates write.
TEXTS = st.lists(
    st.sampled_from([*"abc xyz\n\t  é ß 日本語🙂👩\u200d👧", "hello", "<s>", "</s>", "<|end|>"])
    | st.characters(codec="utf-8")
).map("".join)


def sentencepiece_directory(path: Path, **options: Any) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["<mask:1>", "<|begin|>"],
        minloglevel=2,
        **options,
    )
    path.mkdir(parents=True)
    (path / "tokenizer.model").write_bytes(model.getvalue())
    (path / "added_tokens.json").write_text(json.dumps({"<|IMAGE|>": 400}))
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": "<s>",
                "eos_token": {"content": "</s>", "lstrip": False},
                "cls_token": "<|begin|>",
                "sep_token": "<|end|>",
                "additional_special_tokens": ["<|IMAGE|>"],
                "chat_template": "{{ cls_token }}{{ messages[0].content + sep_token }}",
            }
        )
    )
    return path


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint directory for each kind of tokenizer."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "byte-level": TINY,
        "sentencepiece": sentencepiece_directory(root / "plain", add_dummy_prefix=False),
        "sentencepiece, space before the text": sentencepiece_directory(
            root / "prefix", add_dummy_prefix=True
        ),
    }


@pytest.fixture(
    scope="module",
    params=["byte-level", "sentencepiece", "sentencepiece, space before the text"],
    ids=lambda name: name,
)
def tokenizer(request: pytest.FixtureRequest, directories: dict[str, Path]) -> Tokenizer:
    return Tokenizer.from_directory(directories[request.param])


@given(text=TEXTS)
def test_text_survives_encoding_and_decoding(tokenizer: Tokenizer, text: str) -> None:
    # A tokenizer that puts a space before the text also puts one after each special token, and keeps it.
    assume("<" not in text or not tokenizer._vocabulary.strips_first_space)
    # SentencePiece writes a space as this character, and reads the character itself as a space.
    assume("\N{LOWER ONE EIGHTH BLOCK}" not in text)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@given(text=TEXTS, data=st.data())
def test_pushes_of_any_size_join_to_the_text_of_all_ids(
    tokenizer: Tokenizer, text: str, data: st.DataObject
) -> None:
    ids = tokenizer.encode(text)
    skip = data.draw(st.booleans())
    assert "".join(stream(tokenizer, ids, skip, data)) == tokenizer.decode(ids, skip)


@given(data=st.data())
def test_random_ids_join_to_the_text_of_all_ids_too(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """A model may draw any id, including invalid UTF-8 and ids beyond the tokenizer's vocabulary."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 10)))
    skip = data.draw(st.booleans())
    assert "".join(stream(tokenizer, ids, skip, data)) == tokenizer.decode(ids, skip)


@given(text=TEXTS)
def test_no_push_shows_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    detokenizer = tokenizer.detokenizer()
    shown = [detokenizer.push([i]) for i in tokenizer.encode(text.replace("\ufffd", ""))]
    assert not any("\ufffd" in part for part in shown)


def stream(tokenizer: Tokenizer, ids: list[int], skip: bool, data: st.DataObject) -> Iterator[str]:
    """Yield the text of `ids` when they arrive in pieces of any size, including empty ones."""
    detokenizer = tokenizer.detokenizer(skip)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)))))
    for start, end in itertools.pairwise([0, *cuts, len(ids)]):
        yield detokenizer.push(ids[start:end])
    yield detokenizer.flush()


def test_continuation_keeps_the_space_before_its_first_word(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello world")
    for cut in range(1, len(ids)):
        detokenizer = tokenizer.detokenizer(continues=True)
        assert tokenizer.decode(ids[:cut]) + detokenizer.push(ids[cut:]) == "hello world"


def test_half_a_character_at_the_end_is_flushed_as_a_replacement() -> None:
    tokenizer = Tokenizer.from_directory(TINY)
    first, *rest = tokenizer.encode("é")
    assert rest
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.push([first]) == ""
    assert detokenizer.flush() == "\ufffd"


@given(ids=st.lists(st.integers(0, 505)))
def test_byte_level_text_is_what_the_library_says(ids: list[int]) -> None:
    tokenizer = Tokenizer.from_directory(TINY)
    library = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    assert tokenizer.decode(ids, True) == library.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids, False) == library.decode(ids, skip_special_tokens=False)


@given(text=st.text(alphabet="helo wrdqukbnfx日本語é", max_size=40))
def test_sentencepiece_text_is_what_the_library_says(directories: dict[str, Path], text: str) -> None:
    for name in ("sentencepiece", "sentencepiece, space before the text"):
        tokenizer = Tokenizer.from_directory(directories[name])
        library = sentencepiece.SentencePieceProcessor(model_file=str(directories[name] / "tokenizer.model"))
        ids = tokenizer.encode(text)
        assert ids == library.encode(text)
        assert tokenizer.decode(ids) == library.decode(ids)


def test_sentencepiece_specials_of_a_template_are_one_token_each(directories: dict[str, Path]) -> None:
    tokenizer = Tokenizer.from_directory(directories["sentencepiece"])
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello<|IMAGE|>"}])
    assert text == "<|begin|>hello<|IMAGE|><|end|>"
    ids = tokenizer.encode(text)
    assert ids[-2] == 400  # from added_tokens.json
    assert ids[-1] == 401  # named, but without an id of its own: the next free one
    assert tokenizer.decode(ids) == "hello"
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_end_of_text_is_collected_from_all_files_that_name_one(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint"
    shutil.copytree(directories["sentencepiece"], path)
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 400]}')
    assert Tokenizer.from_directory(path).eos_token_ids == (2, 400)


def test_a_token_has_bytes_and_a_text(tokenizer: Tokenizer) -> None:
    for character in ("a", "é", "日", "🙂"):
        ids = tokenizer.encode("a" + character)
        assert b"".join(map(tokenizer.token_bytes, ids)).strip() == ("a" + character).encode()
        assert all(isinstance(tokenizer.token_text(i), str) for i in ids)
    assert tokenizer.token_text(tokenizer.eos_token_ids[0]) == "</s>"
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b""


def test_a_lone_surrogate_is_refused_in_one_line(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"lone surrogate \(U\+D800\)"):
        tokenizer.encode("a\ud800b")


def test_a_directory_without_tokenizer_says_which_files_are_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json, tokenizer\.model, spm\.model"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_broken_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=name):
        Tokenizer.from_directory(tmp_path)


def test_an_unknown_decoder_is_refused(tmp_path: Path) -> None:
    raw = json.loads((TINY / "tokenizer.json").read_text())
    raw["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="WordPiece"):
        Tokenizer.from_directory(tmp_path)


def test_converted_sentencepiece_model_decodes_marked_spaces_and_bytes(tmp_path: Path) -> None:
    """ERNIE-4.5's tokenizer.json: the SentencePiece vocabulary under Hugging Face's decoder steps."""
    vocabulary = {
        "<unk>": 0,
        **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)},
        "▁hello": 257,
        "▁": 258,
        "h": 259,
    }
    raw: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [],
            "byte_fallback": True,
            "unk_token": "<unk>",
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer.from_directory(tmp_path)
    ids = [257, *(1 + byte for byte in "é".encode()), 258, 259]
    assert tokenizer.decode(ids) == " helloé h"
    raw["decoder"]["decoders"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert Tokenizer.from_directory(tmp_path).decode(ids) == "helloé h"
