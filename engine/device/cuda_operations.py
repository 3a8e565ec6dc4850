"""The operations of the network on a GPU. Each only enqueues kernels; none allocates or waits."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import byref
from dataclasses import dataclass

from ..config import ModelConfig
from ..models.operations import Buffer
from .cuda_library import (
    OUT_ADD,
    OUT_BFLOAT16,
    OUT_FLOAT,
    OUT_SWIGLU,
    AttentionArgs,
    CombineArgs,
    CudaLibrary,
    DrawArgs,
    EmbeddingArgs,
    NormArgs,
    ProductArgs,
    RotationArgs,
    RouteArgs,
)
from .cuda_weights import CudaMatrix
from .work_memory import DRAW_WIDTH, PlanLayout, ResultLayout

#: Offsets of the numbers of tokens and of rows of logits in custom_ops/include/step.h.
_NUM_TOKENS, _NUM_LOGITS = 4, 12
_MOST_ALIGNED = 64
#: For these numbers of tokens, shared and selected experts are computed by the same kernels. For others,
#: shared experts are computed beside the routing.
_PAIRED = range(4, 9)


@dataclass(frozen=True, slots=True)
class CudaStep:
    """Upper bounds of a step; its real numbers are in device memory."""

    #: Tokens.
    capacity: int
    has_prompts: bool
    #: Rows of logits.
    rows: int


@dataclass(frozen=True, slots=True)
class HiddenStates:
    address: int
    step: CudaStep


class CudaOperations:
    """Operations over the buffers of one device; see `models.operations.Operations`."""

    def __init__(
        self,
        library: CudaLibrary,
        device: int,
        model: ModelConfig,
        work: Mapping[str, int],
        plan: tuple[int, PlanLayout],
        results: tuple[int, ResultLayout],
    ) -> None:
        """
        Args:
            work: addresses of the buffers of `work_memory.work_buffers`.
            plan: address and layout of what a step sends to the device.
            results: the same for what it sends back.
        """
        self._library = library
        self._device = device
        self._model = model
        self._work = work
        address, self._plan = plan
        self._plan_address = address
        self._step = address + self._plan.step
        self._results, self._result_layout = results
        self._stream = library.value("fd_stream", device)
        self._side = library.value("fd_side_stream", device)
        #: The end of a block of experts, which is one operation with the norm that comes next.
        self._combine: CombineArgs | None = None

    def embedding(self, table: Buffer, step: CudaStep) -> HiddenStates:
        hidden_states = self._work["hidden_states"]
        arguments = EmbeddingArgs(
            step=self._step,
            table=table,
            vocabulary=self._model.vocab_size,
            width=self._model.hidden_size,
            hidden_states=hidden_states,
            drawn=self._results,
            capacity=step.capacity,
        )
        self._library.enqueue("fd_embedding", self._stream, arguments)
        return HiddenStates(hidden_states, step)

    def rotary_embedding(self, step: CudaStep, theta: float, head_dim: int) -> int:
        arguments = RotationArgs(
            step=self._step,
            rotary_cos_sin=self._work["rotary_cos_sin"],
            slot_mapping=self._work["slot_mapping"],
            theta=theta,
            head_dim=head_dim,
            capacity=step.capacity,
        )
        self._library.enqueue("fd_rotation", self._stream, arguments)
        return self._work["rotary_cos_sin"]

    def attention_block(
        self,
        hidden_states: HiddenStates,
        step: CudaStep,
        norm: int,
        qkv: CudaMatrix,
        output: CudaMatrix,
        rotary_cos_sin: int,
        keys: int,
        values: int,
        epsilon: float,
    ) -> None:
        work, model = self._work, self._model
        self._norm(hidden_states, norm, epsilon)
        self._multiply(self._dense(qkv, "normed", step, OUT_BFLOAT16, work["qkv"], qkv.outputs))
        arguments = AttentionArgs(
            step=self._step,
            rotary_cos_sin=rotary_cos_sin,
            slot_mapping=work["slot_mapping"],
            qkv=work["qkv"],
            keys=keys,
            values=values,
            out=work["attended"],
            work=work["attention_work"],
            heads=model.num_attention_heads,
            kv_heads=model.num_key_value_heads,
            head_dim=model.head_dim,
            capacity=step.capacity,
            has_prompts=step.has_prompts,
        )
        self._library.enqueue("fd_attention", self._stream, arguments)
        self._multiply(self._dense(output, "attended", step, OUT_ADD, hidden_states.address, output.outputs))

    def mlp_block(
        self, hidden_states: HiddenStates, norm: int, gate_up: CudaMatrix, down: CudaMatrix, epsilon: float
    ) -> None:
        step = hidden_states.step
        self._norm(hidden_states, norm, epsilon)
        self._multiply(self._dense(gate_up, "normed", step, OUT_SWIGLU, self._work["activated"], 0))
        self._multiply(self._dense(down, "activated", step, OUT_ADD, hidden_states.address, down.outputs))

    def moe_block(
        self,
        hidden_states: HiddenStates,
        norm: int,
        router: int,
        bias: int,
        gate_up: CudaMatrix,
        down: CudaMatrix,
        shared_gate_up: CudaMatrix | None,
        shared_down: CudaMatrix | None,
        epsilon: float,
        k: int,
        norm_min: float,
    ) -> None:
        library, work, step = self._library, self._work, hidden_states.step
        experts, width, count = self._model.moe_num_experts, self._model.hidden_size, self._step + _NUM_TOKENS
        self._norm(hidden_states, norm, epsilon, router)
        shared: list[ProductArgs] = []
        if shared_gate_up is not None and shared_down is not None:
            shared = [
                self._dense(shared_gate_up, "normed", step, OUT_SWIGLU, work["activated"], 0),
                self._dense(
                    shared_down, "activated", step, OUT_FLOAT, work["shared_results"], shared_down.outputs
                ),
            ]
        is_beside = bool(shared) and step.capacity not in _PAIRED
        if is_beside:
            # Shared experts do not depend on the routing.
            library.call("fd_fork", self._device)
            for dense in shared:
                library.enqueue("fd_product", self._side, dense)
        rows = step.capacity * k
        tile = library.value("fd_tile", rows, experts)
        alignment = min(_MOST_ALIGNED, library.value("fd_tile_tokens", tile))
        route = RouteArgs(
            logits=work["router_logits"],
            bias=bias,
            count=count,
            x=work["normed"],
            topk_ids=work["topk_ids"],
            topk_weights=work["topk_weights"],
            counts=work["expert_counts"],
            rows_in_expert=work["rows_in_expert"],
            rows=work["expert_rows"],
            assignments=work["assignments"],
            norm_min=norm_min,
            experts=experts,
            k=k,
            width=width,
            alignment=alignment,
            capacity=step.capacity,
        )
        library.enqueue("fd_route", self._stream, route)
        selected = [
            ProductArgs(
                weights=matrix.address,
                tokens=work[tokens],
                counts=work["expert_counts"],
                groups=experts,
                alignment=alignment,
                outputs=matrix.outputs,
                inputs=matrix.inputs,
                output=output,
                capacity=rows,
                tile=tile,
                # The routing must not be the operation before.
                is_early=matrix is down,
                rows=out_rows,
                out=work[out],
                out_stride=stride,
            )
            for matrix, tokens, output, out, stride, out_rows in (
                (gate_up, "expert_rows", OUT_SWIGLU, "expert_activated", 0, None),
                (down, "expert_activated", OUT_BFLOAT16, "expert_results", down.outputs, work["assignments"]),
            )
        ]
        if shared and not is_beside:
            for dense, grouped in zip(shared, selected, strict=True):
                library.call("fd_product_pair", self._stream, byref(dense), byref(grouped))
        else:
            for grouped in selected:
                library.enqueue("fd_product", self._stream, grouped)
        if is_beside:
            library.call("fd_join", self._device)
        self._combine = CombineArgs(
            results=work["expert_results"],
            topk_weights=work["topk_weights"],
            shared=None if shared_down is None else work["shared_results"],
            count=count,
            hidden_states=hidden_states.address,
            k=k,
            width=width,
            capacity=step.capacity,
        )

    def finish(self) -> None:
        """Enqueue what waits for a norm, at the end of what is enqueued together."""
        if self._combine is not None:
            self._library.enqueue("fd_combine", self._stream, self._combine)
            self._combine = None

    def ep_moe_block(self, *arguments: object) -> None:
        raise NotImplementedError("a GPU is refused for an expert group; use --device cpu")

    def logits(
        self, hidden_states: HiddenStates, step: CudaStep, norm: int, lm_head: CudaMatrix, epsilon: float
    ) -> int:
        self.finish()
        count, logits = self._step + _NUM_LOGITS, self._work["logits"]
        arguments = NormArgs(
            hidden_states=hidden_states.address,
            weight=norm,
            rows=self._plan_address + self._plan.logit_tokens,
            count=count,
            out=self._work["final"],
            epsilon=epsilon,
            width=self._model.hidden_size,
            capacity=step.rows,
        )
        self._library.enqueue("fd_norm", self._stream, arguments)
        self._multiply(self._product(lm_head, "final", count, step.rows, OUT_FLOAT, logits, lm_head.outputs))
        return logits

    def draw(self, logits: int, step: CudaStep, *, greedy: bool) -> None:
        """Draw from all rows of logits into the results of the step."""
        results, layout = self._results, self._result_layout
        arguments = DrawArgs(
            logits=logits,
            count=self._step + _NUM_LOGITS,
            rows=None if greedy else self._plan_address,
            tokens=self._plan_address,
            drawn=results,
            top_tokens=results + layout.top_tokens,
            logprobs=results + layout.logprobs,
            work=self._work["draw_work"],
            vocabulary=self._model.vocab_size,
            width=DRAW_WIDTH,
            capacity=step.rows,
        )
        self._library.enqueue("fd_draw", self._stream, arguments)

    def _norm(
        self, hidden_states: HiddenStates, weight: int, epsilon: float, router: int | None = None
    ) -> None:
        work = self._work
        if self._combine is not None and router is None:
            self._combine.norm, self._combine.normed, self._combine.epsilon = weight, work["normed"], epsilon
            self.finish()
            return
        self.finish()
        arguments = NormArgs(
            hidden_states=hidden_states.address,
            weight=weight,
            count=self._step + _NUM_TOKENS,
            out=work["normed"],
            epsilon=epsilon,
            width=self._model.hidden_size,
            capacity=hidden_states.step.capacity,
        )
        if router is not None:
            arguments.router = router
            arguments.router_logits = work["router_logits"]
            arguments.expert_rows = work["expert_counts"]
            arguments.experts = self._model.moe_num_experts
        self._library.enqueue("fd_norm", self._stream, arguments)

    def _dense(
        self, matrix: CudaMatrix, tokens: str, step: CudaStep, output: int, out: int, out_stride: int
    ) -> ProductArgs:
        return self._product(matrix, tokens, self._step + _NUM_TOKENS, step.capacity, output, out, out_stride)

    def _product(
        self,
        matrix: CudaMatrix,
        tokens: str,
        count: int,
        capacity: int,
        output: int,
        out: int,
        out_stride: int,
    ) -> ProductArgs:
        return ProductArgs(
            weights=matrix.address,
            tokens=self._work[tokens],
            counts=count,
            groups=1,
            alignment=_MOST_ALIGNED,
            outputs=matrix.outputs,
            inputs=matrix.inputs,
            output=output,
            capacity=capacity,
            tile=self._library.value("fd_tile", capacity, 1),
            # The plan has the number of rows.
            is_early=True,
            bias=matrix.bias or None,
            out=out,
            out_stride=out_stride,
        )

    def _multiply(self, product: ProductArgs) -> None:
        self._library.enqueue("fd_product", self._stream, product)
