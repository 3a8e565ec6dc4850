"""Results of transformers for random ERNIE-4.5 models: the reference side of `make parity`.

    python -m tests.parity.draw --seed N --out DIRECTORY

Needs torch and transformers, not Paddle. Writes for each model NAME.json (its configuration, and the seed
that `tests.checkpoints` draws its weights from) and NAME.npz (float32):

    prompt_i         int32 [length]
    logits_i         [length, vocabulary]      at every position of the prompt
    greedy_i         int32 [steps]             and the logits each token was taken from, greedy_logits_i
    picks_i          int32 [moe layers, length, k], best first
    bfloat16_logits_i  like logits_i, for the model entirely in bfloat16 with weights truncated to bfloat16

A model with a near tie between two experts or two tokens is drawn again: rounding would decide there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from tests.checkpoints import config_json, draw_tensors, write_checkpoint

PROMPT_LENGTHS = (1, 9, 40)
GREEDY_STEPS = 24
#: Least distances between the scores of consecutive experts, and between the two best logits.
PICK_MARGIN, TOKEN_MARGIN = 1e-5, 1e-3

#: The feature that each model covers; everything else about it is drawn.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"use_bias": True},
    "untied": {"tie_word_embeddings": False},
    "untied-bias": {"tie_word_embeddings": False, "use_bias": True},
    "no-shared-expert": {"moe_num_shared_experts": 0},
    "two-shared-experts": {"moe_num_shared_experts": 2},
    "every-second-layer": {"moe_layer_interval": 2, "num_hidden_layers": 4},
    "first-layers-dense": {"moe_layer_start_index": 2, "num_hidden_layers": 4},
    "last-layer-dense": {"moe_layer_end_index": 1, "moe_layer_start_index": 0},
    "dense": {"model_type": "ernie4_5"},
    "dense-bias-untied": {"model_type": "ernie4_5", "use_bias": True, "tie_word_embeddings": False},
}


def draw_config(variant: dict[str, Any], random: np.random.RandomState) -> dict[str, Any]:
    keys = int(random.choice([1, 2, 3]))
    experts = int(random.randint(3, 10))
    changes = {
        "hidden_size": 16 * int(random.randint(2, 5)),
        "head_dim": int(random.choice([8, 16, 24])),
        "num_key_value_heads": keys,
        "num_attention_heads": keys * int(random.randint(1, 4)),
        "intermediate_size": 8 * int(random.randint(3, 13)),
        "moe_intermediate_size": 8 * int(random.randint(2, 6)),
        "moe_num_experts": experts,
        "moe_k": int(random.randint(1, experts + 1)),
        "moe_num_shared_experts": int(random.randint(0, 3)),
        "rope_parameters": {"rope_theta": float(random.choice([10000.0, 500000.0])), "rope_type": "default"},
        "use_bias": bool(random.randint(2)),
    }
    return config_json(**(changes | variant))


def load(config: dict[str, Any], weights_seed: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as directory:
        tensors = draw_tensors(config, weights_seed)
        write_checkpoint(Path(directory), config, tensors, dtype="F32" if dtype == torch.float32 else "BF16")
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation="eager",
            **({} if config["model_type"] == "ernie4_5" else {"experts_implementation": "eager"}),
            output_loading_info=True,
        )
    # Names and shapes of the checkpoint are then the ones that transformers expects.
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], f"{kind}: {sorted(info[kind])}"
    return model.eval()


@torch.no_grad()
def record(
    config: dict[str, Any], weights_seed: int, random: np.random.RandomState
) -> dict[str, np.ndarray] | None:
    """Record a model's results. Returns None if the model comes near a tie."""
    model = load(config, weights_seed)
    picks: list[torch.Tensor] = []
    margins: list[float] = []

    def routed(router: torch.nn.Module, inputs: Any, outputs: tuple[torch.Tensor, ...]) -> None:
        logits, _, indices = outputs
        picks.append(indices.clone())
        scores = logits.float().softmax(-1) + router.moe_statics.e_score_correction_bias
        best = scores.sort(dim=-1, descending=True).values[:, : indices.shape[-1] + 1]
        if best.shape[-1] > 1:
            margins.append(float((best[:, :-1] - best[:, 1:]).min()) / PICK_MARGIN)

    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(routed)
    found = {}
    for i, length in enumerate(PROMPT_LENGTHS):
        prompt = random.randint(4, config["vocab_size"], length)
        picks.clear()
        logits = model(input_ids=torch.tensor(prompt)[None], use_cache=False).logits[0]
        if picks:
            found[f"picks_{i}"] = torch.stack(picks).numpy().astype(np.int32)
        text, rows = prompt.tolist(), []
        for _ in range(GREEDY_STEPS):
            rows.append(model(input_ids=torch.tensor(text)[None], use_cache=False).logits[0, -1].numpy())
            text.append(int(rows[-1].argmax()))
            second, first = np.sort(rows[-1])[-2:]
            margins.append(float(first - second) / TOKEN_MARGIN)
        found[f"prompt_{i}"] = prompt.astype(np.int32)
        found[f"logits_{i}"] = logits.numpy()
        found[f"greedy_{i}"] = np.array(text[length:], dtype=np.int32)
        found[f"greedy_logits_{i}"] = np.stack(rows)
    if min(margins) < 1:
        return None
    narrow = load(config, weights_seed, torch.bfloat16)
    for i in range(len(PROMPT_LENGTHS)):
        prompt = torch.tensor(found[f"prompt_{i}"], dtype=torch.int64)[None]
        found[f"bfloat16_logits_{i}"] = narrow(input_ids=prompt, use_cache=False).logits[0].float().numpy()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(arguments.variants):
        random = np.random.RandomState([arguments.seed, number])
        found = None
        while found is None:
            config, weights_seed = draw_config(VARIANTS[name], random), int(random.randint(1 << 30))
            found = record(config, weights_seed, random)
        np.savez_compressed(arguments.out / f"{name}.npz", **found)
        description = {"weights_seed": weights_seed, "config": config}
        (arguments.out / f"{name}.json").write_text(json.dumps(description, indent=1) + "\n")
        print(f"seed {arguments.seed}: recorded {name}", flush=True)


if __name__ == "__main__":
    main()
