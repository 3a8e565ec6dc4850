"""A network for tests whose every logit depends on every token it can reach through the block table.

It keeps token ids where a real one keeps keys and values. A wrong block table, a block used twice, a stale
prefix or a skipped position changes what it reads back, and with that the text.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import paddle
from llguidance import LLTokenizer, TokenizerWrapper

from fastdeploy.common.messages import AddRequest
from fastdeploy.common.request import Batch, FinishReason, SamplingParams, Sequence
from fastdeploy.config import EngineConfig, ModelConfig
from fastdeploy.core.sampler import Sampler
from fastdeploy.device.device import TensorRunner
from fastdeploy.grammar.matchers import Grammars

VOCAB_SIZE = 61
EOS_ID = 2

MODEL_CONFIG = ModelConfig(
    hidden_size=8,
    num_hidden_layers=1,
    vocab_size=VOCAB_SIZE,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=8,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    tie_word_embeddings=True,
    use_bias=False,
    max_position_embeddings=4096,
    eos_token_ids=(EOS_ID,),
    bos_token_id=1,
)


class _Vocabulary:
    """Token ids as llguidance reads them: letters, alone and in pairs; the last ids have no text."""

    eos_token_id, bos_token_id, special_token_ids = EOS_ID, None, (EOS_ID,)
    tokens = (
        *(letter.encode() for letter in "ab<c"),
        *(f"{first}{second}".encode() for first in "abcd" for second in "abcdef1"),
        *(b"d", b"e", b"f", b"1"),
        *[b""] * 28,
    )

    def __call__(self, text: bytes) -> list[int]:
        letters = (text[at : at + 1] for at in range(len(text)))
        return [self.tokens.index(letter) for letter in letters if letter in self.tokens]


GRAMMARS = Grammars(lambda: LLTokenizer(TokenizerWrapper(_Vocabulary()), eos_token=[EOS_ID]))


def engine_config(**changes: object) -> EngineConfig:
    values: dict[str, object] = {
        "model": Path("none"),
        "max_model_len": 64,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "block_size": 4,
    }
    return EngineConfig(**(values | changes))  # type: ignore[arg-type]


def request(name: str, prompt: list[int], **params: object) -> AddRequest:
    """Return a greedy request; `params` are fields of SamplingParams."""
    values = {"max_tokens": 8, "temperature": 0.0} | params
    # Fields of a dictionary have no types that mypy knows.
    return AddRequest(name, prompt, SamplingParams(**values), arrival_time=0.0)  # type: ignore[arg-type]


def logits_after(token_ids: Iterable[int]) -> np.ndarray:
    """Return logits that look random and depend on the tokens and their order."""
    digest = zlib.crc32(np.array(list(token_ids), dtype=np.int64).tobytes())
    return np.random.default_rng(digest).normal(0, 3, VOCAB_SIZE).astype(np.float32)


class PagedOracle(TensorRunner):
    """A runner (see `fastdeploy.device.device.Runner`) over a cache of token ids."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        # A slot that was never written holds -1, which is no token.
        self.cache = np.full(num_blocks * block_size, -1, dtype=np.int64)
        self.batches: list[Batch] = []

    def execute(self, batch: Batch) -> paddle.Tensor:
        self.batches.append(batch)
        for row in batch.rows:
            positions = np.arange(row.start, row.end)
            self.cache[self._slots(row.sequence, positions)] = row.sequence.token_ids(row.start, row.end)
        # Read after all writes, to detect two rows that write the same slot.
        logits = [
            logits_after(self.cache[self._slots(row.sequence, np.arange(row.end))])
            for row in batch.rows
            if row.samples
        ]
        return paddle.to_tensor(np.array(logits, dtype=np.float32).reshape(-1, VOCAB_SIZE))

    def _slots(self, sequence: Sequence, positions: np.ndarray) -> np.ndarray:
        blocks = np.array(sequence.block_ids)[positions // self._block_size]
        return blocks * self._block_size + positions % self._block_size


def generate_alone(prompt: list[int], params: SamplingParams, limit: int) -> tuple[list[int], FinishReason]:
    """Return the correct text, computed with one sequence and without cache, batch or chunks."""
    sequence, sampler = Sequence("alone", list(prompt), params), Sampler(VOCAB_SIZE, GRAMMARS)
    while True:
        row = logits_after(sequence.token_ids(0, sequence.num_tokens))
        drawn = sampler.sample(paddle.to_tensor(row[None]), [sequence])[0]
        if drawn.error is not None:
            return sequence.output_token_ids, FinishReason.ERROR
        token_id = drawn.token_id
        sequence.output_token_ids.append(token_id)
        count = len(sequence.output_token_ids)
        if token_id in params.end_token_ids:
            return sequence.output_token_ids, FinishReason.STOP
        if token_id in params.stop_token_ids and count > params.min_tokens:
            return sequence.output_token_ids, FinishReason.STOP
        if count == params.max_tokens or sequence.num_tokens == limit:
            return sequence.output_token_ids, FinishReason.LENGTH
