"""The engine on a GPU beside transformers in bfloat16, both against transformers in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("msgspec", reason="the engine needs its packages")
pytest.importorskip("transformers")

from fastdeploy.common.messages import AddRequest
from fastdeploy.common.request import SamplingParams
from tests.parity.draw import VARIANTS, draw_config, load
from tests.reference_network import relative_errors

from .test_engine import Model, drain, whole

NUM_PROMPTS, PROMPT_LENGTH, GREEDY_STEPS = 48, 40, 8
#: Shapes that GPUs compute; the drawn ones and those of tests/fixtures have narrower heads.
SHAPES: list[dict[str, Any]] = [
    {"head_dim": 64, "hidden_size": 128, "vocab_size": 320},
    {"head_dim": 128, "hidden_size": 264, "vocab_size": 514, "moe_num_experts": 40, "moe_k": 6},
]


@dataclass(frozen=True, slots=True)
class Peer:
    """Results of transformers for a model. All logits are [prompt, position, vocabulary]."""

    #: Prompts with the greedy continuations of the model in float64, [prompt, position].
    texts: np.ndarray
    exact: np.ndarray
    bfloat16: np.ndarray


@torch.no_grad()
def ask_transformers(config: dict[str, Any], weights_seed: int, prompts: np.ndarray, place: str) -> Peer:
    exact = load(config, weights_seed, torch.float64).to(place)
    texts = torch.tensor(prompts, dtype=torch.int64, device=place)
    for _ in range(GREEDY_STEPS):
        logits = exact(input_ids=texts, use_cache=False, logits_to_keep=1).logits
        texts = torch.cat([texts, logits[:, -1:].argmax(-1)], 1)
    narrow = load(config, weights_seed, torch.bfloat16).to(place)
    return Peer(
        texts.cpu().numpy(),
        *(model(input_ids=texts, use_cache=False).logits.double().cpu().numpy() for model in (exact, narrow)),
    )


@pytest.fixture(params=VARIANTS, scope="module")
def variant(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Model, Peer]]:
    number = list(VARIANTS).index(request.param)
    random = np.random.RandomState(number)
    config = draw_config({**SHAPES[number % 2], **VARIANTS[request.param]}, random)
    model = Model(tmp_path_factory.mktemp("model"), config, seed=number)
    prompts = random.randint(4, config["vocab_size"], (NUM_PROMPTS, PROMPT_LENGTH))
    yield model, ask_transformers(config, number, prompts, "cuda")
    model.close()


def test_logits_are_as_close_to_float64_as_those_of_transformers(variant: tuple[Model, Peer]) -> None:
    model, peer = variant
    device = model.device()
    found = np.stack([whole(device, text.tolist(), [7]) for text in peer.texts])
    ours, theirs = (
        relative_errors(np.concatenate(logits), np.concatenate(peer.exact))
        for logits in (found, peer.bfloat16)
    )
    told = " and ".join(
        f"{each.mean():.2e} on average, median {np.median(each):.2e}" for each in (ours, theirs)
    )
    print(told)
    # The average includes tokens whose experts differ, which are far off in either.
    assert np.median(ours) < 1.5 * np.median(theirs), told
    assert ours.mean() < 1.5 * theirs.mean(), told


def test_greedy_texts_are_equal_while_the_best_token_is_clear(variant: tuple[Model, Peer]) -> None:
    model, peer = variant
    params = SamplingParams(max_tokens=GREEDY_STEPS, temperature=0.0)
    prompts = peer.texts[:, :PROMPT_LENGTH].tolist()
    added = [AddRequest(f"r{i}", prompt, params, arrival_time=0.0) for i, prompt in enumerate(prompts)]
    answers = drain(model.engine(), added)
    # The logits that the tokens of the continuation were taken from.
    exact, bfloat16 = (logits[:, PROMPT_LENGTH - 1 : -1] for logits in (peer.exact, peer.bfloat16))
    best = np.sort(exact, -1)
    clear = best[..., -1] - best[..., -2] > 2 * np.abs(bfloat16 - exact).max(-1)
    lengths = [GREEDY_STEPS if each.all() else int(each.argmin()) for each in clear]
    assert sum(lengths) >= GREEDY_STEPS
    differing = [
        index
        for index, (token_ids, _, _) in enumerate(answers.values())
        if token_ids[: lengths[index]] != peer.texts[index, PROMPT_LENGTH:][: lengths[index]].tolist()
    ]
    # Rounding may decide which experts a token gets; then it is off by more than the error of the others.
    chooses = model.json.get("moe_k") != model.json.get("moe_num_experts")
    assert len(differing) <= (NUM_PROMPTS // 16 if chooses else 0), differing
