"""Validation: each invalid value is refused with the name of its field; harmless ones are accepted."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.common.errors import ConfigError, RequestError
from fastdeploy.entrypoints.openai.bodies import ChatBody, CompletionBody, Message
from fastdeploy.entrypoints.openai.protocol import ChatRequest, CompletionRequest, SamplingDefaults
from fastdeploy.entrypoints.openai.unsupported import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    MESSAGE_FIELDS,
    WITHOUT_EFFECT,
)
from fastdeploy.entrypoints.openai.validation import (
    MAX_NESTING,
    MISSING,
    UNSUPPORTED,
    WRONG_TYPE,
    WRONG_VALUE,
    decode_object,
)

from . import known_fields

DEFAULTS = SamplingDefaults()
HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.parse({"messages": HELLO, **fields}, DEFAULTS)


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.parse({"prompt": "hello", **fields}, DEFAULTS)


BAD_IN_BOTH: list[tuple[str, Any]] = [
    ("temperature", -0.1),
    ("temperature", float("inf")),
    ("temperature", 10**400),
    ("temperature", "hot"),
    ("temperature", True),
    ("temperature", [1]),
    ("top_p", -0.1),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 1.5),
    ("top_k", 10**30),
    ("min_p", -0.5),
    ("min_p", 2),
    ("repetition_penalty", 0),
    ("presence_penalty", 2.5),
    ("frequency_penalty", -3),
    ("seed", 2**70),
    ("seed", "7"),
    ("seed", 0.5),
    ("stop", 7),
    ("stop", ["a", 7]),
    ("stop", [""]),
    ("stop", ["a"] * 17),
    ("stop", "x" * 2000),
    ("stop_token_ids", "2"),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [True]),
    ("stop_token_ids", [0] * 1000),
    ("min_tokens", -1),
    ("max_tokens", -5),
    ("max_tokens", 1.5),
    ("max_tokens", "10"),
    ("max_completion_tokens", -1),
    ("n", 0),
    ("n", 1000),
    ("n", True),
    ("stream", "yes"),
    ("stream", 1),
    ("stream_options", {"include_usage": True}),
    ("ignore_eos", "no"),
    ("include_stop_str_in_output", 1),
    ("return_token_ids", "x"),
    ("model", 5),
    ("request_id", ["a"]),
    ("tools", [{"type": "function"}]),
    ("tool_choice", "required"),
    ("suffix", "end"),
    ("prompt_logprobs", -2),
    ("prompt_logprobs", False),
]


@pytest.mark.parametrize("parse", [chat, completion])
@pytest.mark.parametrize(("field", "value"), BAD_IN_BOTH)
def test_a_wrong_value_is_refused_with_the_name_of_its_field(
    parse: Callable[..., ChatRequest | CompletionRequest], field: str, value: object
) -> None:
    with pytest.raises(RequestError) as caught:
        parse(**{field: value})
    assert caught.value.param
    assert caught.value.param.partition("[")[0] == field
    assert "\n" not in str(caught.value)
    assert field in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [1, 2]}, "messages[0]"),
        ({"messages": [*HELLO, {"content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "wizard"}]}, "messages[0].content"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "messages[0].name"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
        ({"messages": [{"role": "assistant", "refusal": 5}]}, "messages[0].refusal"),
        (
            {"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}]},
            "messages[0].content[0]",
        ),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -2}, "top_logprobs"),
        ({"chat_template": 5}, "chat_template"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs.self"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
    ],
)
def test_a_wrong_chat_request_is_refused_with_the_place_of_the_error(
    fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt[1]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [[1], [2, "a"]]}, "prompt[1][1]"),
        ({"prompt": ["a"] * 300}, "prompt"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": -2}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"echo": "x"}, "echo"),
        ({"max_tokens": 0, "min_tokens": 1}, "min_tokens"),
    ],
)
def test_a_wrong_completion_request_is_refused_with_the_name_of_its_field(
    fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        completion(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "text", "json_schema": None}},
        {"response_format": {"type": None}},
        {"logit_bias": {"5": None}, "audio": {"voice": None}},
        {"temperature": None, "stop": None, "n": None, "seed": None},
        {"a_field_of_tomorrow": {"x": 1}, "metadata": {"a": "b"}, "user": "me"},
        {"top_k": -1, "seed": -1, "logit_bias": {}},
        {"stream": True, "stream_options": {"include_usage": True}},
    ],
)
@pytest.mark.parametrize("parse", [chat, completion])
def test_fields_without_effect_are_accepted(
    parse: Callable[..., ChatRequest | CompletionRequest], fields: dict[str, Any]
) -> None:
    assert parse(**fields).n == 1


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"echo": True, "logprobs": 2}, 2),
        ({"echo": True, "logprobs": 0}, 0),
        ({"echo": True, "logprobs": -1}, -1),
        ({"echo": True}, None),
        ({"logprobs": 2}, None),
        ({"prompt_logprobs": 0}, 0),
        ({"prompt_logprobs": 3, "echo": True, "logprobs": 2}, 3),
        ({"prompt_logprobs": 1, "echo": True, "logprobs": 2}, 2),
        ({"prompt_logprobs": 1, "echo": True, "logprobs": -1}, -1),
        ({"prompt_logprobs": -1, "logprobs": 2}, -1),
    ],
)
def test_prompts_are_scored_for_echo_or_for_their_own_list(
    fields: dict[str, Any], wanted: int | None
) -> None:
    assert completion(max_tokens=0, **fields).scored_logprobs == wanted


@pytest.mark.parametrize("parse", [chat, completion])
def test_fastdeploys_whole_range_of_temperature_and_top_p_is_open(
    parse: Callable[..., ChatRequest | CompletionRequest],
) -> None:
    request = parse(temperature=1e300, top_p=0)
    assert (request.temperature, request.top_p) == (1e300, 0.0)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"stream_options": {}}, True),
        ({"stream_options": {"include_usage": True}}, True),
        ({"stream_options": {"include_usage": False}}, False),
        ({"stream_options": None}, False),
        ({}, False),
    ],
)
@pytest.mark.parametrize("parse", [chat, completion])
def test_stream_options_ask_for_the_usage_unless_they_say_no(
    parse: Callable[..., ChatRequest | CompletionRequest], options: dict[str, Any], wanted: bool
) -> None:
    assert parse(stream=True, **options).include_usage is wanted


@pytest.mark.parametrize("parse", [chat, completion])
@pytest.mark.parametrize("wanted", [True, False, None])
def test_usage_in_each_chunk_has_to_be_asked_for(
    parse: Callable[..., ChatRequest | CompletionRequest], wanted: bool | None
) -> None:
    options = {"continuous_usage_stats": wanted, "include_usage": None}
    request = parse(stream=True, stream_options=options)
    assert (request.continuous_usage, request.include_usage) == (wanted is True, True)


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ({"content": "hi", "refusal": None, "annotations": [], "audio": None, "function_call": None}, "hi"),
        ({"content": "hi", "tool_calls": None, "reasoning_content": None, "name": None}, "hi"),
        ({"content": "hi", "tool_calls": [], "function_call": {"name": None, "arguments": None}}, "hi"),
        ({"content": None, "refusal": "I will not."}, "I will not."),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "No."),
        ({"content": [{"type": "text", "text": "hi", "annotations": None}]}, "hi"),
        ({"content": None}, ""),
    ],
)
def test_fields_of_an_answer_are_accepted_as_history(message: dict[str, object], content: str) -> None:
    request = chat(messages=[*HELLO, {"role": "assistant", **message}, *HELLO])
    assert request.messages[1] == {"role": "assistant", "content": content}


def test_a_null_template_argument_is_absent_at_every_level() -> None:
    arguments = {"self": None, "thinking": None, "options": {"depth": 1, "width": None}}
    assert chat(chat_template_kwargs=arguments).chat_template_kwargs == {"options": {"depth": 1}}


def test_the_newer_name_of_the_token_limit_wins() -> None:
    assert chat(max_tokens=5, max_completion_tokens=7).max_tokens == 7
    assert chat().max_tokens is None


def test_text_parts_are_joined_and_developers_speak_as_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(messages=[{"role": "developer", "content": parts}])
    assert request.messages == [{"role": "system", "content": "ab"}]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ("a",)), (["a", "b"], ("a", "b")), ([1, 2], ([1, 2],)), ([[1], [2, 3]], ([1], [2, 3]))],
)
def test_all_four_shapes_of_prompts(
    prompt: list[int] | list[list[int]] | list[str] | str,
    prompts: tuple[list[int], list[int]] | tuple[list[int]] | tuple[str, str] | tuple[str],
) -> None:
    assert completion(prompt=prompt).prompts == prompts


def test_ignore_eos_leaves_the_requests_own_stop_ids() -> None:
    def ends(**fields: Any) -> tuple[int, ...]:
        params = chat(stop_token_ids=[7, 7], **fields).sampling_params(
            max_tokens=3, seed=0, choice=0, eos_token_ids=(2,), vocab_size=9
        )
        return params.stop_token_ids

    assert ends() == (2, 7)
    assert ends(ignore_eos=True) == (7,)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"  \n",
        b"hello",
        b"[]",
        b"5",
        b"null",
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b'{"a": 1',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":' + b"[" * MAX_NESTING + b"]" * MAX_NESTING + b"}",
    ],
)
def test_bodies_that_are_no_json_objects_are_refused(body: bytes) -> None:
    with pytest.raises(RequestError):
        decode_object(body)


@pytest.mark.parametrize("parse", [chat, completion])
@pytest.mark.parametrize("name", ["response_format", "metadata", "stop", "chat_template_kwargs", "messages"])
def test_values_nested_as_deeply_as_a_body_may_be_are_parsed_or_refused(
    parse: Callable[..., ChatRequest | CompletionRequest], name: str
) -> None:
    value: Any = {}
    for _ in range(MAX_NESTING - 2):
        value = {"a": value}
    fields = decode_object(json.dumps({name: value}).encode())
    error = refusal_of(partial(parse, **fields))
    assert error is None or error.param == name


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
field_names = st.sampled_from(
    sorted({*ChatBody.__struct_fields__, *CompletionBody.__struct_fields__, *CHAT_FIELDS, *COMPLETION_FIELDS})
)
messages = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "name", "refusal", "tool_calls"]),
        json_values
        | st.sampled_from(["user", "assistant"])
        | st.lists(
            st.fixed_dictionaries(
                {"type": st.sampled_from(["text", "refusal"])}, optional={"text": json_values}
            ),
            max_size=2,
        ),
        max_size=4,
    )
    | json_values,
    max_size=3,
)


@given(
    fields=st.dictionaries(field_names, json_values, max_size=5),
    messages=json_values | messages,
)
def test_any_json_is_parsed_or_refused_with_the_name_of_a_field(
    fields: dict[str, Any], messages: Any
) -> None:
    rest = {key: value for key, value in fields.items() if key != "messages"}
    for parse in (partial(chat, messages=messages), completion):
        error = refusal_of(partial(parse, **rest))
        if error is not None:
            assert error.param
            assert error.param.startswith((*fields, "messages", "prompt"))
            assert error.param in str(error)
            assert error.code in (MISSING, WRONG_TYPE, WRONG_VALUE, UNSUPPORTED, None)
            assert "\n" not in str(error)
            assert len(str(error)) < 300


@pytest.mark.parametrize("parse", [chat, completion])
def test_every_field_takes_or_refuses_every_kind_of_value(
    parse: Callable[..., ChatRequest | CompletionRequest],
) -> None:
    body = ChatBody if parse is chat else CompletionBody
    values: tuple[Any, ...] = (
        True,
        -2,
        1.5,
        10**30,
        "x",
        "x" * 70_000,
        [],
        [None],
        [[]],
        ["x"],
        {},
        {"x": []},
    )
    for name in (*body.__struct_fields__, *body.refused):
        for value in values:
            error = refusal_of(partial(parse, **{name: value}))
            assert error is None or (error.param and error.param in str(error)), (name, value)
            assert error is None or name in str(error) or name == "metadata", (name, value)


def refusal_of(parse: Callable[[], object]) -> RequestError | None:
    try:
        parse()
    except RequestError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"temperature": "hot"}, WRONG_TYPE, 'temperature is "hot"; it must be a number'),
        ({"temperature": -1}, WRONG_VALUE, "temperature is -1; it must be 0 or more"),
        ({"top_p": 2}, WRONG_VALUE, "top_p is 2; it must be between 0 and 1"),
        ({"n": 0}, WRONG_VALUE, "n is 0; it must be between 1 and 128"),
        ({"n": 1.5}, WRONG_TYPE, "n is 1.5; it must be an integer"),
        ({"n": 10**30}, WRONG_VALUE, "n is a very large integer; it must be between 1 and 128"),
        ({"stream": 1}, WRONG_TYPE, "stream is 1; it must be true or false"),
        ({"stop": 7}, WRONG_TYPE, "stop is 7; it must be a string or a list of strings"),
        ({"stop": ["a", 7]}, WRONG_TYPE, "stop[1] is 7; it must be a string"),
        ({"stop": ["a"] * 17}, WRONG_VALUE, "stop has 17 items; it may have at most 16"),
        ({"stop": "x" * 2000}, WRONG_VALUE, "stop has 2000 characters; it may have at most 1024"),
        ({"stop": [""]}, WRONG_VALUE, "stop[0] is empty; it must not be"),
        ({"stop_token_ids": [True]}, WRONG_TYPE, "stop_token_ids[0] is true; it must be a token id"),
        ({"stream_options": 5}, WRONG_TYPE, "stream_options is 5; it must be an object"),
        (
            {"stream": True, "stream_options": {"include_usage": 5}},
            WRONG_TYPE,
            "stream_options.include_usage is 5; it must be true or false",
        ),
        ({"messages": None}, MISSING, "messages is missing; it must be a list of at least one message"),
        ({"messages": []}, WRONG_VALUE, "messages is empty; it must be a list of at least one message"),
        (
            {"messages": [{"role": "user"}]},
            MISSING,
            "messages[0].content is missing; it must be a string or a list of text parts",
        ),
        (
            {"messages": [{"role": "w" * 65, "content": ""}]},
            WRONG_VALUE,
            "messages[0].role has 65 characters; it may have at most 64",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            WRONG_TYPE,
            'messages[0].content[0] is an object; it must be {"type": "text", "text": ...}, because this '
            "model reads text only",
        ),
        (
            {"stop_regex": "a+"},
            UNSUPPORTED,
            "stop_regex is not supported: stop takes strings only; leave it out or send []",
        ),
        (
            {"function_call": "required"},
            UNSUPPORTED,
            "function_call is not supported: tools and tool_choice have taken its place; "
            'leave it out or send "none"',
        ),
    ],
)
def test_an_error_says_what_is_wrong_and_what_would_be_right(
    fields: dict[str, Any], code: str, message: str
) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert (str(caught.value), caught.value.code) == (message, code)


@pytest.mark.parametrize("parse", [chat, completion])
def test_a_field_that_is_not_implemented_is_refused_with_the_reason(
    parse: Callable[..., ChatRequest | CompletionRequest],
) -> None:
    table = CHAT_FIELDS if parse is chat else COMPLETION_FIELDS
    for name, field in table.items():
        for value in (None, *field.harmless):
            # The field that the endpoint needs is given.
            parse(**{name: value})
        error = refusal_of(partial(parse, **{name: {"x": 1}}))
        assert error is not None
        assert (error.param, error.code) == (name, UNSUPPORTED)
        assert str(error).startswith(f"{name} is not supported: {field.why}; leave it out")


def test_no_field_is_both_declared_and_refused() -> None:
    for table, body in ((CHAT_FIELDS, ChatBody), (COMPLETION_FIELDS, CompletionBody)):
        assert not table.keys() & {*body.__struct_fields__, *WITHOUT_EFFECT}
    assert not MESSAGE_FIELDS.keys() & set(Message.__struct_fields__)


@pytest.mark.parametrize("server", known_fields.COMPLETIONS)
def test_every_known_field_acts_or_is_refused_or_is_bookkeeping(server: str) -> None:
    for fields, body in ((known_fields.CHAT, ChatBody), (known_fields.COMPLETIONS, CompletionBody)):
        handled = {*body.__struct_fields__, *body.refused, *WITHOUT_EFFECT}
        assert not fields[server] - handled


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
def test_bookkeeping_is_accepted(name: str) -> None:
    assert chat(**{name: {"a": "b"}}) == chat()
    assert completion(**{name: True}) == completion()


@pytest.mark.parametrize("part", ["function_call", "audio", "tools"])
def test_a_part_of_a_message_is_refused_only_with_a_value(part: str) -> None:
    nothing: tuple[Any, ...] = ([], {}, "", None)
    for empty in nothing:
        assert chat(messages=[{"role": "user", "content": "hello", part: empty}]) == chat()
    with pytest.raises(RequestError, match=rf"^messages\[0\]\.{part} is not supported: "):
        chat(messages=[{"role": "user", "content": "hello", part: [{"id": "a"}]}])


def test_metadata_that_is_no_text_counts_as_fields() -> None:
    metadata = {"min_tokens": 3, "temperature": 0.5, "seed": "4", "note": 7}
    request = chat(metadata=metadata, temperature=0.7)
    assert (request.min_tokens, request.temperature, request.seed) == (3, 0.7, None)
    assert chat(metadata={"max_streaming_response_tokens": 3}).tokens_per_event == 3
    for fields, param in (({"top_p": 2}, "top_p"), ({"stop_regex": ["a"]}, "stop_regex")):
        with pytest.raises(RequestError) as caught:
            chat(metadata=fields)
        assert caught.value.param == param


def test_fields_of_messages_reach_the_template() -> None:
    fields = {"tool_call_id": "a", "reasoning_content": "b", "thoughts": "c", "name": "d"}
    message = {"role": "tool", "content": "x", **fields}
    assert chat(messages=[message]).messages == [message]
    assert chat(reasoning_effort="low").chat_template_kwargs == {"reasoning_effort": "low"}


def test_token_ids_take_the_place_of_the_prompt() -> None:
    request = chat(messages=[], prompt_token_ids=[1, 2], completion_token_ids=[3])
    assert (request.prompt_token_ids, request.completion_token_ids) == ([1, 2], [3])
    assert request.prompt_field == "prompt_token_ids"
    assert ChatRequest.parse({"prompt_token_ids": [1]}, DEFAULTS).messages == []
    assert chat(prompt_token_ids=[]).prompt_field == "messages"
    one = CompletionRequest.parse({"prompt_token_ids": [1, 2]}, DEFAULTS)
    assert (one.prompts, one.prompt_field) == (([1, 2],), "prompt_token_ids")
    assert completion(prompt="", prompt_token_ids=[[1], [2]]).prompts == ([1], [2])
    wrong_values: tuple[Any, ...] = ([[]], [1, [2]], [-1], ["a"])
    for wrong in wrong_values:
        error = refusal_of(partial(completion, prompt_token_ids=wrong))
        assert error is not None
        assert (error.param or "").startswith("prompt_token_ids")


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, [1, 2, 3, 4]),
        ({"truncate_prompt_tokens": 9}, [1, 2, 3, 4]),
        ({"truncate_prompt_tokens": 3}, [2, 3, 4]),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, [1, 2, 3]),
        ({"truncate_prompt_tokens": 0}, []),
        ({"truncate_prompt_tokens": -1}, [3, 4]),
        ({"truncation_side": "right"}, [1, 2, 3, 4]),
    ],
)
def test_a_prompt_is_truncated_on_request(fields: dict[str, Any], kept: list[int]) -> None:
    for parse in (chat, completion):
        assert parse(**fields).truncated([1, 2, 3, 4], room=2) == kept


def test_a_continued_message_is_checked() -> None:
    assert chat(continue_final_message=True).chat_template_kwargs == {"add_generation_prompt": False}
    assert chat(continue_final_message=True, add_generation_prompt=False).continues_prompt
    for fields in (
        {"add_generation_prompt": True},
        {"messages": [{"role": "assistant", "content": " "}]},
    ):
        error = refusal_of(partial(chat, continue_final_message=True, **fields))
        assert error is not None
        assert error.param == "continue_final_message"


def test_an_empty_stop_string_is_none() -> None:
    assert chat(stop="").stop == completion(stop=None).stop == ()


@pytest.mark.parametrize(
    ("parse", "given", "wanted"),
    [
        (chat, "x", "chatcmpl-x"),
        (chat, "chatcmpl-x", "chatcmpl-x"),
        (completion, "x", "cmpl-x"),
        (completion, "cmpl-x", "cmpl-x"),
        (completion, "chatcmpl-x", "cmpl-chatcmpl-x"),
    ],
)
def test_the_prefix_of_an_id_is_not_repeated(
    parse: Callable[..., ChatRequest | CompletionRequest], given: str, wanted: str
) -> None:
    assert parse().response_id(given) == wanted


def test_zero_is_not_false_where_the_number_has_a_meaning() -> None:
    assert completion(top_logprobs=0).logprobs is None
    with pytest.raises(RequestError):
        completion(top_logprobs=False)


def test_a_checkpoints_generation_config_gives_the_defaults(tmp_path: Path) -> None:
    def defaults(**content: Any) -> SamplingDefaults:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
        return SamplingDefaults.from_directory(tmp_path)

    assert SamplingDefaults.from_directory(tmp_path) == SamplingDefaults(1.0, 1.0, 0, 1.0)
    assert defaults(temperature=0.6, top_p=0.9, top_k=20) == SamplingDefaults(0.6, 0.9, 20, 1.0)
    assert defaults(do_sample=False, temperature=0.6).temperature == 0.0
    with pytest.raises(ConfigError, match=r"generation_config\.json: temperature is \"hot\""):
        defaults(temperature="hot")
