"""The page in a browser: what it shows, the chat, the keyboard, and what its policy forbids."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable

import pytest

from ..router.conftest import RouterProcess
from ..router.fake_engine import EVENT_HEAD, FakeEngine, Received, answers_status, wait_until
from ..router.replicas import Fleet
from ..system_packages import needs
from .browser import DRIVER, Page
from .engines import (
    chats,
    delta,
    exposition,
    finish,
    repeats_the_prompt,
    says,
    speaks_until_it_is_stopped,
)

pytestmark = needs(DRIVER)

OpenPage = Callable[[str], Page]
StartRouter = Callable[..., RouterProcess]
NewEngine = Callable[..., FakeEngine]
TAB, ENTER, ESCAPE, SPACE = "\ue004", "\ue007", "\ue00c", " "
SHIFT = "\ue008"

#: Makes the replicas pause between two events.
_SLOWLY = """
    const ask = window.fetch;
    const slowly = options => ({...options, body: options.body.replace("{", '{"interval":0.5,')});
    window.fetch = (url, options) => ask(url, options.body ? slowly(options) : options);
"""
_HTML = """<script>violations.push(1)</script><img src=x onerror="violations.push(1)"><b>bold</b>&amp;"""


def test_page_asks_only_the_router(
    lent_router: RouterProcess, new_engine: NewEngine, open_page: OpenPage
) -> None:
    lent_router.add(new_engine(replica=0, behaviour=chats(says("x"), exposition(kv_use=0.25))))
    page = open_page(lent_router.url)
    page.shows("25 %", "#rows")
    page.read_requests()
    paths = {url.removeprefix(lent_router.url) for url in page.requests if not url.startswith("data:")}
    assert paths == {"/", "/overview", "/v1/models"}


def test_an_answer_streams_and_names_its_replica(
    lent_router: RouterProcess, new_engine: NewEngine, open_page: OpenPage
) -> None:
    gate = threading.Event()

    def speaks(received: Received) -> bool:
        received.send(EVENT_HEAD)
        received.send_chunk(delta("Par"))
        assert gate.wait(60)
        received.send_chunk(delta("is."))
        finish(received, 2)
        return True

    lent_router.add(new_engine(replica=4, behaviour=chats(speaks)))
    page = open_page(lent_router.url)
    page.send("The capital of France?")
    page.shows("Par")
    assert "Paris" not in page.text("#log")
    gate.set()
    note = page.shows("replica 4")
    assert "Paris." in note
    assert "2 tokens" in note


@pytest.mark.parametrize("way", ["key", "button"])
def test_stop_ends_the_answer_at_the_replica(
    lent_router: RouterProcess, new_engine: NewEngine, open_page: OpenPage, way: str
) -> None:
    engine = new_engine(replica=1, behaviour=chats(speaks_until_it_is_stopped))
    lent_router.add(engine)
    page = open_page(lent_router.url)
    page.send("Tell me a story")
    page.shows("once upon")
    page.press(ESCAPE) if way == "key" else page.click("#stop")
    assert "replica 1" in page.shows("stopped")
    wait_until(lambda: engine.cancelled == [True], "the replica stops")
    assert page.focused() == "prompt"


def test_settings_and_earlier_messages_are_sent(
    lent_router: RouterProcess, new_engine: NewEngine, open_page: OpenPage
) -> None:
    engine = new_engine("some-model", 0, chats(repeats_the_prompt))
    lent_router.add(engine)
    page = open_page(lent_router.url)
    page.shows("some-model", "#model")
    page.run("document.getElementById('temperature').focus()")
    page.press("0.5")
    page.run("document.getElementById('instructions').focus()")
    page.press("Be brief.")
    page.send("one")
    page.shows("replica 0")
    page.send("two")
    wait_until(lambda: len(page.texts("#log .note")) == 2, "two answers")
    page.shows("two\n", "#log")
    bodies = [json.loads(each.body) for each in engine.received if each.body]
    assert bodies[1] == {
        "model": "some-model",
        "temperature": 0.5,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "one"},
            {"role": "user", "content": "two"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_refused_message_returns_to_the_box_with_the_reason(
    lent_router: RouterProcess, new_engine: NewEngine, open_page: OpenPage
) -> None:
    body = b'{"error": {"message": "the prompt is too long"}}'
    lent_router.add(new_engine(replica=0, behaviour=chats(answers_status("400 Bad Request", body))))
    page = open_page(lent_router.url)
    page.send("much text")
    page.shows("the prompt is too long", "#log .error")
    assert page.run("return document.getElementById('prompt').value") == "much text"


def test_text_of_a_model_is_never_html(
    lent_router: RouterProcess, new_engine: NewEngine, open_page: OpenPage
) -> None:
    lent_router.add(new_engine("<i>model</i>", 0, chats(repeats_the_prompt)))
    page = open_page(lent_router.url)
    page.shows("<i>model</i>", "#model")
    page.send(_HTML)
    page.shows("replica 0")
    assert page.text("#log .answer") == _HTML
    assert page.run("return document.querySelectorAll('#log :is(script, img, b), #model i').length") == 0


def test_policy_forbids_scripts_and_html_of_others(lent_router: RouterProcess, open_page: OpenPage) -> None:
    page = open_page(lent_router.url)
    made_html = page.run("try { document.body.innerHTML = '<b>x</b>'; return true } catch { return false }")
    assert not made_html
    page.run("fetch('http://127.0.0.1:9/').catch(() => 0)")
    wait_until(lambda: "connect-src" in page.run("return violations"), "the policy forbids the request")
    page.run("violations.length = 0")
    page.chrome.get_log("browser")
    page.read_requests()
    page.requests.clear()


def test_a_killed_replica_is_seen_to_return(fleet: Fleet, open_page: OpenPage) -> None:
    page = open_page(fleet.router.url)
    everything = {"0": "up", "1": "up", "2": "up"}
    page.shows_states(lambda states: states == everything, "all are up")
    fleet.keeps_alive = False
    fleet.replicas[1].end(signal.SIGKILL)
    page.shows_states(lambda states: states["1"] == "down", "it is down")
    assert page.text("#up") == "2 of 3"
    fleet.keeps_alive = True
    page.shows_states(lambda states: states == everything, "it is up again")
    assert page.text("#up") == "3 of 3"


def test_a_stream_that_lost_its_replica_says_so(fleet: Fleet, open_page: OpenPage) -> None:
    page = open_page(fleet.router.url)
    page.shows_states(lambda states: len(states) == 3, "all are up")
    page.run(_SLOWLY)
    page.send("Tell me a story")
    wait_until(lambda: page.text("#log .answer"), "the answer has begun")
    [speaker] = [replica for replica in fleet.replicas if not replica.is_idle()]
    fleet.keeps_alive = False
    speaker.end(signal.SIGKILL)
    page.shows(f"replica {speaker.number}, which ended; another continued")
    fleet.keeps_alive = True
    fleet.wait_until_up()


def test_the_router_may_end_and_return(
    start_router: StartRouter, new_engine: NewEngine, open_page: OpenPage
) -> None:
    router = start_router()
    engine = new_engine(replica=7, behaviour=chats(says("hello"), exposition(kv_use=0.5)))
    router.add(engine)
    page = open_page(router.url)
    page.shows("50 %", "#rows")
    router.stop(signal.SIGKILL)
    page.shows("no answer from the router since", "#connection")
    assert "50 %" not in page.text("#rows"), "old figures must not look current"
    page.send("hi")
    page.shows("the connection to the router broke", "#log .error")
    start_router(port=router.port).add(engine)
    page.shows("live", "#connection")
    page.shows("50 %", "#rows")
    page.send("")
    page.shows("replica 7")


def test_keyboard_alone_suffices(
    lent_router: RouterProcess, new_engine: NewEngine, open_page: OpenPage
) -> None:
    lent_router.add(new_engine("a-model", 0, chats(speaks_until_it_is_stopped)))
    page = open_page(lent_router.url)
    page.shows("a-model", "#model")
    reached: list[str] = []
    while not reached or reached[-1] != "send":
        page.press(TAB)
        reached.append(page.focused())
        outline = page.run("return getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", f"{reached[-1]} shows no focus"
        if reached[-1] == "theme":
            page.press(SPACE)
    assert reached == ["theme", "model", "temperature", "instructions", "log", "prompt", "send"]
    assert page.run("return document.documentElement.dataset.theme") == "light"
    page.press(SHIFT + TAB)
    page.press("Tell me a story")
    page.press(SHIFT + ENTER)
    page.press("of two lines", ENTER)
    page.shows("once upon")
    assert page.text("#log .prompt") == "Tell me a story\nof two lines"
    page.press(TAB)
    assert page.focused() == "stop"
    page.press(SPACE)
    page.shows("stopped")
    assert page.focused() == "prompt"


def test_a_key_is_asked_for_and_stays_out_of_urls(
    start_router: StartRouter, new_engine: NewEngine, open_page: OpenPage
) -> None:
    router = start_router(env={"FD_API_KEY": "the-right-key"})
    router.add(new_engine(replica=0, behaviour=chats(repeats_the_prompt)))
    page = open_page(router.url)
    page.shows("needs an API key", "#key")
    assert page.problems() == []
    assert page.texts("#rows th") == []
    wait_until(lambda: page.focused() == "secret", "the field has the focus")
    page.press("wrong", ENTER)
    page.shows("does not accept this key", "#key")
    page.press("the-right-key", ENTER)
    page.shows_states(lambda states: states == {"0": "up"}, "the figures are there")
    page.send("hello")
    page.shows("replica 0")
    page.load()
    page.shows_states(lambda states: states == {"0": "up"}, "the tab keeps the key")
    assert "the-right-key" not in page.run("return JSON.stringify({...localStorage})")
    page.read_requests()
    assert [url for url in page.requests if "key" in url] == []
    page.click("#forget")
    page.shows("needs an API key", "#key")


def test_theme_is_that_of_the_system_until_it_is_chosen(
    lent_router: RouterProcess, open_page: OpenPage
) -> None:
    page = open_page(lent_router.url)

    def is_dark() -> bool:
        return bool(
            page.run("return getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0] < 128")
        )

    assert not is_dark()
    page.prefer("dark")
    assert is_dark()
    page.click("#theme")
    assert not is_dark()
    page.load()
    assert not is_dark()
    page.click("#theme")
    page.prefer("light")
    assert is_dark()


def test_many_replicas_are_readable_at_every_size_and_in_every_theme(
    start_router: StartRouter, new_engine: NewEngine, open_page: OpenPage
) -> None:
    router = start_router()
    metrics = exposition(33, 120, 0.95, 1e6, epoch=100, waited=[0.1] * 64)
    engines = [new_engine("a-model", number, chats(repeats_the_prompt, metrics)) for number in range(64)]
    router.add(*engines)
    engines[5].stop()
    page = open_page(router.url)
    page.shows("epoch 100", "#group")
    page.send("a word " * 30 + "w" * 300)
    page.shows("replica ")
    page.shows_states(lambda states: len(states) == 64 and states["5"] == "down", "all are shown")
    looks = [(size, scheme) for size in ((1440, 900), (390, 844)) for scheme in ("light", "dark")]
    for size, scheme in looks:
        page.resize(*size)
        page.prefer(scheme)
        assert (size, scheme, page.problems()) == (size, scheme, [])
    router.stop(signal.SIGKILL)
    page.shows("no answer", "#connection")
    assert page.problems() == []
