"""The facts about a request that a policy receives; every body, however malformed, gives some."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.daemon.router.policy.policies import POLICIES, policy_named
from fastdeploy.daemon.router.policy.request_facts import BLOCK_ENDS, facts_of, prefix_hashes, prompt_text

CACHE_AWARE, SESSION = policy_named("cache_aware"), policy_named("session")
LONG = "It was a bright cold day in April, and the clocks were striking thirteen. " * 60


def body_of(**fields: object) -> bytes:
    return json.dumps({"model": "default", **fields}).encode()


def chat(*contents: str, **fields: object) -> bytes:
    roles = ["system", *["user", "assistant"] * len(contents)]
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return body_of(messages=messages, **fields)


def prefix(body: bytes) -> tuple[int, ...]:
    return facts_of(CACHE_AWARE, (), body, 0).prefix


def session(body: bytes, *headers: tuple[bytes, bytes]) -> bytes:
    return facts_of(SESSION, headers, body, 0).session


@given(st.binary(max_size=5000), st.binary(max_size=5000))
def test_two_texts_share_the_hashes_of_the_blocks_that_they_share(one: bytes, two: bytes) -> None:
    shared = next(
        (i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two))
    )
    blocks = sum(end <= shared for end in BLOCK_ENDS)
    first, second = prefix_hashes(one), prefix_hashes(two)
    assert first[:blocks] == second[:blocks]
    assert not set(first[blocks:]) & set(second[blocks:])
    assert len(first) == sum(end <= len(one) for end in BLOCK_ENDS)


def test_blocks_of_a_long_prompt_are_few() -> None:
    assert len(prefix_hashes(bytes(50_000))) < 64
    assert len(prefix_hashes(bytes(10_000_000))) == len(BLOCK_ENDS)


def test_the_next_turn_of_a_conversation_begins_with_the_last_one() -> None:
    first = chat(LONG, "What was bright?")
    second = chat(LONG, "What was bright?", "The day was.", "And the clocks?" + LONG, max_tokens=7, user="me")
    assert len(prefix(first)) > 10
    assert prefix(second)[: len(prefix(first))] == prefix(first)


def test_each_part_of_a_prompt_affects_its_hash() -> None:
    tools = [{"type": "function", "function": {"name": "strike"}}]
    bodies = [
        chat(LONG, "a"),
        chat("Be brief. " + LONG, "a"),
        chat(LONG, "a", tools=tools),
        body_of(prompt=LONG),
        body_of(prompt=[7] * 1000),
        body_of(prompt_token_ids=[8] * 1000),
    ]
    assert len({prefix(body)[0] for body in bodies}) == len(bodies)


def test_text_parts_of_a_message_count_as_text() -> None:
    parts = [{"type": "text", "text": LONG}]
    assert prefix(body_of(messages=[{"role": "user", "content": parts}]))


def test_only_facts_that_the_policy_needs_are_computed() -> None:
    body = chat(LONG, "a", user="me")
    for policy in POLICIES.values():
        facts = facts_of(policy, [(b"x-session-id", b"s")], body, 5)
        assert facts.draw == 5
        assert facts.prompt_tokens == len(body) // 4
        assert bool(facts.prefix) == policy.needs_prefix
        assert bool(facts.session) == policy.needs_session


def test_a_session_is_named_by_the_header_else_by_the_user() -> None:
    body = chat("a", "b", user="miller")
    assert session(body, (b"host", b"h"), (b"x-session-id", b"42")) == b"42"
    assert session(body, (b"x-session-id", b"")) == b"miller"
    assert session(body) == b"miller"
    assert session(chat("a", "b")) == b""


@given(st.binary(max_size=200))
def test_arbitrary_bodies_give_facts(body: bytes) -> None:
    any_facts(body)


def any_facts(body: bytes) -> None:
    prefix(body)
    session(body)


@given(st.data(), st.binary(max_size=3))
def test_damaged_bodies_give_facts(data: st.DataObject, damage: bytes) -> None:
    body = chat("a", "b", user="miller", tools=[{"type": "function"}], prompt=[1, 2])
    begin = data.draw(st.integers(0, len(body)))
    end = data.draw(st.integers(begin, len(body)))
    any_facts(body[:begin] + damage + body[end:])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b'{"messages": ',
        b'{"messages": {}, "user": 5}',
        b'{"messages": ["a"], "user": ["b"]}',
        b'{"messages": [5], "user": null}',
        b'{"prompt": "\xff\xfe", "user": "\xff"}',
        b'{"messages": [' + b"[" * 100_000,
        b'{"messages": [{"content": ' + b"[" * 100_000,
        b'{"user": "\\ud800"}',
    ],
)
def test_a_broken_body_is_left_for_the_replica_to_refuse(body: bytes) -> None:
    assert prefix(body) == ()
    session(body)


def test_instructions_and_input_are_the_prompt_of_a_response() -> None:
    body = body_of(input=[{"role": "user", "content": "b"}], instructions="a")
    assert prompt_text(body) == b'"a"[{"role": "user", "content": "b"}]'


def test_a_prompt_is_read_as_it_was_sent() -> None:
    assert prompt_text(b'{"prompt": "\\u4f60 \\n"}') == b'"\\u4f60 \\n"'
