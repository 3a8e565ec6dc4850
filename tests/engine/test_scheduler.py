from __future__ import annotations

import zlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy.common.errors import RequestError
from fastdeploy.common.request import Batch, FinishReason, SamplingParams, Sequence
from fastdeploy.core.block_pool import BlockPool
from fastdeploy.core.scheduler import Scheduler

from .paged_oracle import engine_config


def build(num_blocks: int = 32, **changes: object) -> tuple[Scheduler, BlockPool]:
    config = engine_config(**changes)
    pool = BlockPool(num_blocks, config.block_size)
    return Scheduler(config, pool), pool


def sequence(name: str, prompt: int | list[int], **params: object) -> Sequence:
    """Return a sequence with the given prompt, or with that many tokens that occur in no other prompt."""
    if isinstance(prompt, int):
        first = 1000 * zlib.crc32(name.encode())
        prompt = [(first + index) % 1_000_000 for index in range(prompt)]
    return Sequence(name, prompt, SamplingParams(**({"max_tokens": 100} | params)))  # type: ignore[arg-type]


def run(
    scheduler: Scheduler, batch: Batch, token: Callable[[Sequence], int] = lambda s: 7
) -> list[FinishReason | None]:
    return scheduler.commit(batch, [token(row.sequence) for row in batch.rows if row.samples])


def shape(batch: Batch) -> list[tuple[str, int, int, bool]]:
    return [(row.sequence.request_id, row.start, row.num_tokens, row.samples) for row in batch.rows]


def test_long_prompt_is_computed_in_chunks_beside_decoding_sequences() -> None:
    scheduler, _ = build(max_num_batched_tokens=8)
    scheduler.add(sequence("short", 3))
    scheduler.add(sequence("long", 18))
    shapes = []
    for _ in range(4):
        batch = scheduler.schedule()
        shapes.append(shape(batch))
        run(scheduler, batch)
    assert shapes == [
        [("short", 0, 3, True), ("long", 0, 5, False)],
        [("short", 3, 1, True), ("long", 5, 7, False)],
        [("short", 4, 1, True), ("long", 12, 6, True)],
        [("short", 5, 1, True), ("long", 18, 1, True)],
    ]


def test_chunk_is_small_beside_decoding_and_fills_the_step_otherwise() -> None:
    scheduler, _ = build(max_num_batched_tokens=16, max_prefill_beside_decode=4)
    writer = sequence("writer", 2, max_tokens=2)
    scheduler.add(writer)
    run(scheduler, scheduler.schedule())
    scheduler.add(sequence("reader", 40))
    scheduler.add(sequence("next", 5))
    shapes = []
    for _ in range(3):
        batch = scheduler.schedule()
        shapes.append(shape(batch))
        run(scheduler, batch)
    assert shapes == [
        [("writer", 2, 1, True), ("reader", 0, 4, False)],
        [("reader", 4, 16, False)],
        [("reader", 20, 16, False)],
    ]


def test_chunks_beside_decoding_shrink_with_context_down_to_one_token() -> None:
    config = engine_config(max_num_batched_tokens=64, max_prefill_beside_decode=12, max_model_len=999)
    scheduler = Scheduler(config, BlockPool(512, config.block_size), context_of_double_cost=20)
    scheduler.add(sequence("writer", 1, max_tokens=500))
    run(scheduler, scheduler.schedule())
    scheduler.add(sequence("reader", 400))
    chunks = []
    while True:
        batch = scheduler.schedule()
        chunks.append(batch.rows[-1].num_tokens)
        run(scheduler, batch)
        if batch.rows[-1].samples:
            break
    assert sum(chunks) == 400
    assert chunks[0] == 12
    assert chunks == sorted(chunks, reverse=True)
    assert chunks[-2] == 1


def test_no_more_sequences_run_than_seats() -> None:
    scheduler, _ = build(max_num_seqs=2)
    for name in "abc":
        scheduler.add(sequence(name, 2))
    assert [row.sequence.request_id for row in scheduler.schedule().rows] == ["a", "b"]
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)


def test_token_budget_limits_admission_so_that_all_running_advance() -> None:
    scheduler, _ = build(max_num_seqs=4, max_num_batched_tokens=2)
    for name in "abcd":
        scheduler.add(sequence(name, 1))
    for _ in range(5):
        batch = scheduler.schedule()
        assert [row.sequence.request_id for row in batch.rows] == ["a", "b"]
        run(scheduler, batch)


def test_nothing_becomes_visible_before_commit() -> None:
    scheduler, pool = build()
    one = sequence("one", 9)
    scheduler.add(one)
    batch = scheduler.schedule()
    assert one.num_computed == 0
    assert one.output_token_ids == []
    assert pool.find(one.block_hashes) == []
    # A failed step can be scheduled again.
    assert shape(scheduler.schedule()) == shape(batch)
    run(scheduler, batch)
    assert one.num_computed == 9
    assert one.output_token_ids == [7]
    assert len(pool.find(one.block_hashes)) == 2


def test_a_known_prefix_is_not_computed_again_but_its_last_token_is() -> None:
    scheduler, _ = build()
    prompt = list(range(8))
    scheduler.add(sequence("first", prompt, max_tokens=1))
    run(scheduler, scheduler.schedule())
    again = sequence("again", prompt)
    scheduler.add(again)
    # Both blocks of the prompt are cached, but the last token is needed for its logits.
    assert shape(scheduler.schedule()) == [("again", 4, 4, True)]
    assert again.num_cached == 4
    assert scheduler.prefix_cache_hit_tokens_total == 4
    assert scheduler.prefix_cache_query_tokens_total == 16


def test_generated_text_is_found_as_the_prefix_of_the_next_turn() -> None:
    scheduler, _ = build()
    first = sequence("first", list(range(6)), max_tokens=3)
    scheduler.add(first)
    for _ in range(3):
        run(scheduler, scheduler.schedule())
    scheduler.add(sequence("next", [*range(6), 7, 7, 7, 50]))
    assert shape(scheduler.schedule()) == [("next", 8, 2, True)]


def test_a_prefix_is_found_only_with_the_same_salt() -> None:
    scheduler, _ = build()
    prompt = list(range(9))
    starts = {}
    for name, salt in (("a", ""), ("b", "x"), ("c", "y"), ("d", "x"), ("e", "")):
        salted = sequence(name, prompt, max_tokens=1)
        salted.cache_salt = salt
        scheduler.add(salted)
        batch = scheduler.schedule()
        [(_, starts[name], _, _)] = shape(batch)
        run(scheduler, batch)
    assert starts == {"a": 0, "b": 0, "c": 0, "d": 8, "e": 8}


def test_prefix_caching_can_be_switched_off() -> None:
    scheduler, _ = build(enable_prefix_caching=False)
    for name in ("first", "again"):
        scheduler.add(sequence(name, list(range(8)), max_tokens=1))
        batch = scheduler.schedule()
        assert batch.num_tokens == 8
        run(scheduler, batch)
    assert scheduler.prefix_cache_query_tokens_total == 16
    assert scheduler.prefix_cache_hit_tokens_total == 0


def test_youngest_is_preempted_and_readmitted_first() -> None:
    # "old" has two blocks and "young" one; "old" needs a third for its ninth token, after "young" has
    # taken its second.
    scheduler, pool = build(num_blocks=4, max_model_len=16)
    old, young = sequence("old", 6), sequence("young", 4)
    for one in (old, young, sequence("later", 4)):
        scheduler.add(one)
    assert [row.sequence.request_id for row in scheduler.schedule().rows] == ["old", "young"]
    while young.num_preemptions == 0:
        run(scheduler, scheduler.schedule())
    scheduler.check()
    assert young.block_ids == []
    assert young.num_computed == 0
    written = list(young.output_token_ids)
    assert written, "its tokens are kept"
    order = []
    while scheduler.num_running + scheduler.num_waiting:
        batch = scheduler.schedule()
        order += [r.sequence.request_id for r in batch.rows if r.sequence.request_id not in order]
        run(scheduler, batch)
    assert order == ["old", "young", "later"]
    assert young.output_token_ids[: len(written)] == written
    assert pool.num_free == 4


def test_preempted_sequence_waits_until_it_would_not_be_preempted_again() -> None:
    scheduler, _ = build(num_blocks=8, max_model_len=32)
    scheduler.add(sequence("old", 12))
    scheduler.add(sequence("young", 12))
    while scheduler.num_running + scheduler.num_waiting:
        run(scheduler, scheduler.schedule())
    assert scheduler.preemptions_total == 1


def test_youngest_sequence_keeps_its_blocks_while_no_other_needs_them() -> None:
    scheduler, _ = build(num_blocks=4, max_model_len=16)
    young = sequence("young", 3)
    scheduler.add(sequence("old", 8, max_tokens=4))
    scheduler.add(young)
    steps = []
    for _ in range(5):
        batch = scheduler.schedule()
        steps.append([row.sequence.request_id for row in batch.rows])
        run(scheduler, batch)
    # "old" takes the last block in step 2; "young" needs one in step 3 and gets it when "old" has ended.
    assert steps == [["old", "young"], ["old", "young"], ["old"], ["old"], ["young"]]
    assert young.num_preemptions == 0


def test_a_sequence_that_outgrows_the_whole_cache_ends_with_length() -> None:
    scheduler, _ = build(num_blocks=3, max_model_len=64)
    one = sequence("one", 5)
    scheduler.add(one)
    reasons: list[FinishReason | None] = []
    while scheduler.num_running + scheduler.num_waiting:
        reasons += run(scheduler, scheduler.schedule())
    assert reasons[-1] is FinishReason.LENGTH
    assert one.num_tokens == 12


@pytest.mark.parametrize(
    ("prompt", "num_blocks", "said"),
    [
        (0, 32, "the prompt has no tokens; it must have at least one"),
        (64, 32, "may have 64 here (--max-model-len 64)"),
        (12, 3, "may have 12 here (3 blocks of 4 tokens, --num-gpu-blocks-override)"),
    ],
)
def test_a_prompt_that_can_never_be_served_is_refused_at_once(
    prompt: int, num_blocks: int, said: str
) -> None:
    scheduler, _ = build(num_blocks=num_blocks)
    with pytest.raises(RequestError) as refusal:
        scheduler.add(sequence("one", prompt))
    assert said in str(refusal.value)
    assert scheduler.num_waiting == 0


def test_a_stop_token_ends_the_text_only_after_min_tokens() -> None:
    scheduler, _ = build()
    scheduler.add(sequence("one", 3, stop_token_ids=(7,), min_tokens=2))
    reasons = [run(scheduler, scheduler.schedule())[0] for _ in range(3)]
    assert reasons == [None, None, FinishReason.STOP]


def test_last_allowed_token_gives_length_unless_it_is_a_stop_token() -> None:
    scheduler, _ = build()
    scheduler.add(sequence("length", 3, max_tokens=2))
    scheduler.add(sequence("stop", 3, max_tokens=2, stop_token_ids=(9,)))
    run(scheduler, scheduler.schedule())
    reasons = run(scheduler, scheduler.schedule(), lambda s: 9)
    assert reasons == [FinishReason.LENGTH, FinishReason.STOP]


def test_abort_frees_running_and_waiting_sequences_and_ignores_ended_ones() -> None:
    scheduler, pool = build(max_num_seqs=1)
    scheduler.add(sequence("running", 5))
    scheduler.add(sequence("waiting", 5))
    run(scheduler, scheduler.schedule())
    scheduler.abort(["running", "waiting", "never seen"])
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    assert pool.num_free == 32
    scheduler.check()
    assert not scheduler.schedule()


def test_a_step_ahead_decodes_all_that_do_not_end() -> None:
    scheduler, _ = build()
    scheduler.add(sequence("ending", 3, max_tokens=1))
    scheduler.add(sequence("long", 5))
    batch = scheduler.schedule()
    ahead = scheduler.schedule_ahead(batch)
    assert shape(ahead) == [("long", 5, 1, True)]
    assert [row.drawn_by for row in ahead.rows] == [1]
    run(scheduler, batch)
    assert not scheduler.holds(batch.rows[0].sequence)
    further = scheduler.schedule_ahead(ahead)
    assert shape(further) == [("long", 6, 1, True)]


def test_no_step_ahead_beside_a_prompt_or_a_sequence_that_waits_for_a_block() -> None:
    scheduler, _ = build(max_num_batched_tokens=6)
    scheduler.add(sequence("long", 9))
    assert not scheduler.schedule_ahead(scheduler.schedule())

    scheduler, _ = build(num_blocks=4, max_model_len=16)
    scheduler.add(sequence("old", 8, max_tokens=9))
    scheduler.add(sequence("young", 3))
    steps = []
    for _ in range(4):
        batch = scheduler.schedule()
        steps.append(shape(scheduler.schedule_ahead(batch)))
        run(scheduler, batch)
    # "young" has no block for its second step; in the third, "old" is computed alone.
    assert steps == [[("old", 8, 1, True), ("young", 3, 1, True)], [], [], []]


def test_no_step_ahead_while_a_sequence_can_be_admitted() -> None:
    scheduler, _ = build(max_num_seqs=2)
    scheduler.add(sequence("one", 3))
    batch = scheduler.schedule()
    for name in ("two", "three"):
        scheduler.add(sequence(name, 3))
    assert not scheduler.schedule_ahead(batch)
    run(scheduler, batch)
    # No seat is left for "three".
    assert [row.sequence.request_id for row in scheduler.schedule_ahead(scheduler.schedule()).rows] == [
        "one",
        "two",
    ]


@settings(max_examples=80, deadline=None)
@given(
    data=st.data(),
    num_blocks=st.integers(2, 12),
    seats=st.integers(1, 5),
    budget=st.integers(1, 20),
    caching=st.booleans(),
)
def test_any_traffic_is_served_in_arrival_order_without_leaks(
    data: st.DataObject, num_blocks: int, seats: int, budget: int, caching: bool
) -> None:
    scheduler, pool = build(
        num_blocks=num_blocks,
        max_num_seqs=seats,
        max_num_batched_tokens=budget,
        enable_prefix_caching=caching,
    )
    arrived: list[Sequence] = []
    admitted: list[Sequence] = []
    ended: set[Sequence] = set()

    def step() -> None:
        live = [one for one in arrived if one not in ended]
        preemptions = {one: one.num_preemptions for one in live}
        batch = scheduler.schedule()
        if not live:
            assert not batch
            return
        assert batch.num_tokens <= budget
        assert len(batch.rows) <= scheduler.num_running <= seats
        scheduled = [row.sequence for row in batch.rows]
        assert scheduled[0] is live[0], "the oldest makes progress in every step"
        assert scheduled == sorted(scheduled, key=arrived.index)
        assert all(one.num_preemptions == preemptions[one] for one in scheduled), "no thrash within a step"
        admitted.extend(one for one in scheduled if one not in admitted)
        for row in batch.rows:
            assert row.num_tokens >= 1
            assert len(row.sequence.block_ids) == -(-row.end // pool.block_size), (
                "holds what it needs, no more"
            )
            assert row.samples == (row.end == row.sequence.num_tokens)
        reasons = run(scheduler, batch, lambda s: s.num_tokens % 3)
        sampled = [row.sequence for row in batch.rows if row.samples]
        ended.update(one for one, reason in zip(sampled, reasons, strict=True) if reason is not None)

    for action in data.draw(st.lists(st.sampled_from(["add", "step", "step", "step", "abort"]), max_size=50)):
        if action == "add":
            length = data.draw(st.integers(1, scheduler.max_num_tokens - 1))
            # With two letters, prefixes are often shared.
            prompt = data.draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
            arrived.append(sequence(str(len(arrived)), prompt, max_tokens=data.draw(st.integers(1, 20))))
            scheduler.add(arrived[-1])
        elif action == "step":
            step()
        elif arrived:
            victim = data.draw(st.sampled_from(arrived))
            scheduler.abort([victim.request_id])
            ended.add(victim)
        scheduler.check()
    for _ in range(sum(one.num_tokens + one.params.max_tokens for one in arrived) * 2):
        step()
        scheduler.check()
    assert ended == set(arrived), "everybody ends"
    assert [one for one in arrived if one in admitted] == admitted, "a sequence was overtaken"
    assert pool.num_free == num_blocks
