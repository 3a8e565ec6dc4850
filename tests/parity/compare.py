"""The project's network on the models that `tests.parity.draw` recorded: the other side of `make parity`.

    python -m tests.parity.compare DIRECTORY

Prints a line per model and layout. Then prints, for each model in bfloat16, the errors of its logits and of
torch's against the network in float64 on the same weights. Exits with 1 if a model differs, or if its errors
are larger than torch's.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle

from tests.checkpoints import LAYOUTS, draw_tensors, is_moe_layer, write_checkpoint
from tests.network import Network, recorded_routes
from tests.reference_network import ReferenceNetwork, as_bfloat16_stores_them, relative_errors

#: Allowed difference of float32 logits around 10, which both sides round differently.
TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Parity:
    #: Maximum over all logits, at prompt positions and along the greedy text.
    max_difference: float
    greedy_equal: int
    greedy_total: int
    picks_equal: int
    picks_total: int

    @property
    def holds(self) -> bool:
        return (
            self.max_difference <= TOLERANCE
            and self.greedy_equal == self.greedy_total
            and self.picks_equal == self.picks_total
        )


def compare(recording: Path, layout: str) -> Parity:
    """Compare a recording, which is NAME.json with NAME.npz beside it."""
    description = json.loads(recording.read_text())
    config = description["config"]
    reference = np.load(recording.with_suffix(".npz"))
    with tempfile.TemporaryDirectory() as directory:
        tensors = draw_tensors(config, description["weights_seed"])
        write_checkpoint(Path(directory), config, tensors, layout=layout)
        network = Network(Path(directory), qkv_order="grouped" if layout == "paddle-grouped" else "plain")
    moe_layers = sum(is_moe_layer(config, index) for index in range(config["num_hidden_layers"]))
    difference, greedy, picks = 0.0, [], []
    for i in range(sum(name.startswith("prompt_") for name in reference.files)):
        sequence = network.sequence(reference[f"prompt_{i}"].tolist())
        with recorded_routes() as routes:
            logits = network.prefill(sequence)
        difference = max(difference, float(np.abs(logits - reference[f"logits_{i}"]).max()))
        if moe_layers:
            picks.append(routes.by_layer(moe_layers)[0] == reference[f"picks_{i}"])
        text = reference[f"greedy_{i}"]
        rows = network.decode(sequence, logits[-1], len(text))
        greedy.append(np.array(sequence.output_token_ids) == text)
        # After the first different token the texts differ, and their logits are not comparable.
        same = rows[: len(text) if greedy[-1].all() else int(greedy[-1].argmin()) + 1]
        difference = max(difference, float(np.abs(same - reference[f"greedy_logits_{i}"][: len(same)]).max()))
    return Parity(
        max_difference=difference,
        greedy_equal=int(np.concatenate(greedy).sum()),
        greedy_total=sum(map(len, greedy)),
        picks_equal=sum(int(part.sum()) for part in picks),
        picks_total=sum(part.size for part in picks),
    )


def bfloat16_errors(recording: Path) -> tuple[float, float]:
    """Return the median relative errors of all logits: the project's, and torch's."""
    description = json.loads(recording.read_text())
    config, found = description["config"], np.load(recording.with_suffix(".npz"))
    tensors = as_bfloat16_stores_them(draw_tensors(config, description["weights_seed"]))
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory), config, tensors, dtype="BF16")
        network = Network(Path(directory), weight_format="bfloat16")
    exact = ReferenceNetwork(config, tensors)
    ours, theirs = [], []
    for i in range(sum(name.startswith("prompt_") for name in found.files)):
        prompt = found[f"prompt_{i}"].tolist()
        logits = exact.logits(prompt)
        ours.append(relative_errors(network.prefill(network.sequence(prompt)), logits))
        theirs.append(relative_errors(found[f"bfloat16_logits_{i}"], logits))
    return float(np.median(np.concatenate(ours))), float(np.median(np.concatenate(theirs)))


def main(directory: Path) -> int:
    paddle.set_device("cpu")
    recordings = sorted(directory.glob("*.json"))
    failures = 0
    print(f"{'model':22} {'layout':15} {'max |d|':>9} {'greedy':>8} {'picks':>11}")
    for recording in recordings:
        for layout in LAYOUTS:
            found = compare(recording, layout)
            failures += not found.holds
            print(
                f"{recording.stem:22} {layout:15} {found.max_difference:9.2e} "
                f"{found.greedy_equal:4}/{found.greedy_total} {found.picks_equal:5}/{found.picks_total:<5} "
                f"{'' if found.holds else 'OFF'}"
            )
    print(f"{failures} of {len(recordings) * len(LAYOUTS)} are off")
    print(f"\n{'bfloat16: relative error':38} {'ours':>9} {'torch':>9}")
    farther = 0
    for recording in recordings:
        ours, theirs = bfloat16_errors(recording)
        farther += ours > theirs
        print(f"{recording.stem:38} {ours:9.2e} {theirs:9.2e} {'OFF' if ours > theirs else ''}")
    print(f"{farther} of {len(recordings)} are farther off than torch")
    return 1 if failures or farther or not recordings else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
