"""Perplexity of the demo model by weight format: `make perplexity`.

The text (text.txt) is the introduction of Charles Darwin's On the Origin of Species, 1859, which is in the
public domain. It is computed as one sequence, so each token sees all previous ones.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np

from fastdeploy.common.request import Batch, SamplingParams, ScheduledSequence, Sequence
from fastdeploy.config import ModelConfig
from fastdeploy.demo_model.model import resolve_model_path
from fastdeploy.tokenizer.tokenizer import Tokenizer

from .driver import WEIGHT_FORMATS, engine_config, open_runner
from .rows import Row, report

TEXT = Path(__file__).with_name("text.txt")
#: Positions per chunk, which limits the memory of logits.
CHUNK = 256
#: Target: maximum ratio of a format's perplexity to that of bfloat16.
TARGETS = {"wint8": 0.01, "wint4": 0.06}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="a checkpoint directory, or demo")
    parser.add_argument("--formats", nargs="+", choices=WEIGHT_FORMATS, default=list(WEIGHT_FORMATS))
    arguments = parser.parse_args()
    model = resolve_model_path(arguments.model)
    token_ids = Tokenizer.from_directory(model).encode(TEXT.read_text(encoding="utf-8"))
    print(f"{model.name}, {len(token_ids)} tokens")
    found = {name: perplexity(model, name, token_ids) for name in arguments.formats}
    base = found.get("bfloat16")
    report([Row(name, "perplexity", value, base, "bfloat16") for name, value in found.items()], "perplexity")
    for name in TARGETS.keys() & found.keys():
        if base is not None:
            excess = found[name] / base - 1
            verdict = "met" if excess <= TARGETS[name] else "MISSED"
            print(f"{name}: {excess:+.2%} against bfloat16, at most {TARGETS[name]:+.0%}: {verdict}")


def perplexity(model: Path, weight_format: str, token_ids: list[int]) -> float:
    config = engine_config(model, weight_format, max_num_seqs=1, max_model_len=len(token_ids))
    model_config = ModelConfig.from_directory(model)
    runner = open_runner(config, model_config)
    blocks = list(range(config.num_blocks(model_config)))
    sequence = Sequence("text", token_ids, SamplingParams(max_tokens=1), block_ids=blocks)
    # The first token is not predicted, and the last one predicts nothing.
    total, count = 0.0, len(token_ids) - 1
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        chunk = ScheduledSequence(sequence, start, size, samples=False)
        logits = runner.execute(Batch((chunk,)), every_position=True).numpy().astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        followers = token_ids[start + 1 : start + 1 + size]
        total += float((np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(size), followers]).sum())
    return math.exp(total / count)


if __name__ == "__main__":
    main()
