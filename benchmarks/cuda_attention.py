"""Attention in the shape of ERNIE-4.5-21B-A3B: decoding against the read bandwidth, prompts against torch.

Run it from the repository root: python3 -m benchmarks.cuda_attention
"""

from __future__ import annotations

import torch
from tests.device import library as fd
from tests.device.test_attention import ERNIE, Cache, Part

from benchmarks.cuda_product import read_bandwidth, seconds


class Layers:
    """Attention of one step over the caches of enough layers to defeat the L2 cache."""

    def __init__(self, count: int, texts: list[int], parts: list[Part]) -> None:
        self.caches = [Cache(ERNIE, texts, i) for i in range(count)]
        self.step = self.caches[0].step(parts)
        for cache in self.caches:
            cache.tables = self.caches[0].tables
            cache.keys.normal_()
            cache.values.normal_()
        self.tokens = sum(part.length for part in parts)
        self.has_prompts = any(part.length > 1 for part in parts)
        self.qkv = torch.randn(self.tokens, ERNIE.width, device="cuda").bfloat16()
        self.cos_sin = torch.ones(self.tokens, ERNIE.columns, device="cuda")
        self.slots = torch.zeros(self.tokens, dtype=torch.int32, device="cuda")
        self.out = fd.activations(
            torch.zeros(self.tokens, ERNIE.queries * ERNIE.columns, device="cuda").bfloat16()
        )
        args = fd.fill(
            fd.RotationArgs, step=self.step, rotary_cos_sin=self.cos_sin, slot_mapping=self.slots, theta=5e5,
            head_dim=ERNIE.columns, capacity=self.tokens,
        )  # fmt: skip
        fd.call("fd_rotation", args)

    def run(self) -> None:
        for cache in self.caches:
            args = fd.fill(
                fd.AttentionArgs, step=self.step, rotary_cos_sin=self.cos_sin, slot_mapping=self.slots,
                qkv=self.qkv,
                keys=cache.keys, values=cache.values, out=self.out, work=cache.work,
                work_bytes=cache.work.numel(), heads=ERNIE.queries, kv_heads=ERNIE.keys,
                head_dim=ERNIE.columns, capacity=self.tokens, has_prompts=self.has_prompts,
            )  # fmt: skip
            fd.call("fd_attention", args)


def main() -> None:
    ceiling = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}: reads {ceiling / 1e12:.3f} TB/s; rope, cache and attention")
    for batch, context in ((1, 2048), (8, 2048), (32, 2048), (32, 4096), (128, 2048), (1, 32768)):
        moved = batch * context * ERNIE.keys * ERNIE.columns * 4
        count = max(2, min(24, int(6e8 / moved)))
        layers = Layers(count, [context] * batch, [Part(i, context - 1, 1) for i in range(batch)])
        time = seconds(layers.run) / count
        print(
            f"decode {batch:4} x {context:<6} {time * 1e6:8.1f} us, {moved / time / ceiling:.2f} of the limit"
        )
        del layers
        torch.cuda.empty_cache()
    for length in (2048, 8192, 32768):
        layers = Layers(2, [length], [Part(0, 0, length)])
        time = seconds(layers.run, 5) / 2
        flops = 2 * ERNIE.queries * ERNIE.columns * length * length
        q = torch.randn(1, ERNIE.queries, length, ERNIE.columns, device="cuda", dtype=torch.bfloat16)
        k = torch.randn(1, ERNIE.keys, length, ERNIE.columns, device="cuda", dtype=torch.bfloat16)

        def peer(q: torch.Tensor = q, k: torch.Tensor = k) -> None:
            torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)

        torch_time = seconds(peer, 5)
        print(
            f"prompt {length:6} {time * 1e6:8.1f} us, {flops / time / 1e12:.0f} TFLOP/s;"
            f" torch {flops / torch_time / 1e12:.0f} TFLOP/s"
        )
        del layers
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
