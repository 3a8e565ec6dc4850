"""transformers as a contender (contender.py), in the environment created by `make parity`.

    python -m benchmarks.transformers_peer --model DIRECTORY --dtype bfloat16 --threads 2

transformers has several implementations of experts and of the KV cache. Each kind of request is first tried
with all of them, and then answered by the fastest.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.utils import logging

from .contender import Timing, answer_requests

_EXPERTS = ("eager", "grouped_mm", "batched_mm")
#: Not batched_mm, which copies the weights of an expert for each of its tokens: 5 times slower with 8 tokens.
_MAX_BATCHED_TOKENS = 4
_TRIAL_TOKENS = 6


class Manner(NamedTuple):
    experts: str
    static_cache: bool


class Transformers:
    def __init__(self, model: Path, dtype: torch.dtype) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, attn_implementation="sdpa"
        ).eval()
        self._random = torch.Generator().manual_seed(7)
        self._best: dict[tuple[int, ...], Manner] = {}

    def prefill(self, tokens: int) -> Timing:
        manner = self._best.get((tokens,))
        if manner is None:
            trial = partial(self._prefill, tokens=tokens)
            manner = self._best[tokens,] = self._quickest(tokens, trial)
        return self._prefill(manner, tokens)

    def decode(self, batch: int, prompt: int, new: int) -> Timing:
        manner = self._best.get((batch, prompt))
        if manner is None:
            trial = partial(self._decode, batch=batch, prompt=prompt, new=_TRIAL_TOKENS)
            manner = self._best[batch, prompt] = self._quickest(batch, trial)
        return self._decode(manner, batch, prompt, new)

    def distinct_experts(self, batch: int, prompt: int, new: int) -> float:
        """Return the mean number of distinct experts per layer in a step of `decode`."""
        counts: list[int] = []

        def count(router: torch.nn.Module, inputs: object, outputs: tuple[torch.Tensor, ...]) -> None:
            picks = outputs[-1]
            if len(picks) == batch:
                counts.append(len(picks.unique()))

        routers = [module for name, module in self.model.named_modules() if name.endswith("mlp.gate")]
        hooks = [router.register_forward_hook(count) for router in routers]
        self.decode(batch, prompt, new)
        for hook in hooks:
            hook.remove()
        return sum(counts) / len(counts)

    def _quickest(self, tokens: int, trial: Callable[[Manner], Timing]) -> Manner:
        rates: dict[Manner, float] = {}
        for manner in itertools.starmap(Manner, itertools.product(_EXPERTS, (False, True))):
            if manner.experts == "batched_mm" and tokens > _MAX_BATCHED_TOKENS:
                continue
            rates[manner] = max(trial(manner).tokens_per_second for _ in range(2))
        best = max(rates, key=rates.__getitem__)
        for manner, rate in rates.items():
            mark = "*" if manner is best else " "
            cache = "static" if manner.static_cache else "dynamic"
            print(
                f"  transformers {self.model.dtype} {tokens:4} tokens: {manner.experts:10} {cache:7} "
                f"{rate:8.1f} tokens/s {mark}",
                flush=True,
            )
        return best

    @torch.no_grad()
    def _prefill(self, manner: Manner, tokens: int) -> Timing:
        self.model.set_experts_implementation(manner.experts)
        ids = self._prompts(1, tokens)
        cache = self._cache(manner, tokens)
        started = time.monotonic()
        logits = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        logits.argmax(-1)
        return Timing(tokens, started, time.monotonic())

    @torch.no_grad()
    def _decode(self, manner: Manner, batch: int, prompt: int, new: int) -> Timing:
        self.model.set_experts_implementation("eager")
        cache = self._cache(manner, prompt + new)
        ids = self._prompts(batch, prompt)
        logits = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1:].argmax(-1)
        self.model.set_experts_implementation(manner.experts)
        started = time.monotonic()
        for _ in range(new - 1):
            ids = self.model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        return Timing(batch * (new - 1), started, time.monotonic())

    def _cache(self, manner: Manner, length: int) -> DynamicCache | StaticCache:
        if manner.static_cache:
            return StaticCache(config=self.model.config, max_cache_len=length)
        return DynamicCache(config=self.model.config)

    def _prompts(self, batch: int, length: int) -> torch.Tensor:
        return torch.randint(3, self.model.config.vocab_size, (batch, length), generator=self._random)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    answer_requests(lambda: Transformers(arguments.model, getattr(torch, arguments.dtype)))


if __name__ == "__main__":
    main()
