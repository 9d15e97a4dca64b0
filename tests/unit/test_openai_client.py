"""A server is asked in parallel, with retries, and its key is shown nowhere."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.pool import ThreadPool
from typing import Any

import pytest

from packhorse.trainer.config.eval import Server
from packhorse.trainer.config.recipe import load_recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.eval import openai_client
from packhorse.trainer.eval.openai_client import Client, Refused, Unreachable, text_of
from packhorse.trainer.utils.staged_build import Stopped
from tests.stand_in_server import Reply, Request, StandIn, chat_reply

LIMIT_S = 60.0
KEY = "sk-a-very-secret-key"


def endpoint(url: str, **settings: Any) -> Server:
    return Server(url=url, **{"timeout_s": LIMIT_S, **settings})


def ask(
    server: StandIn | str,
    count: int = 1,
    patience_s: float | None = None,
    requests: int = 16,
    **settings: Any,
) -> list[str]:
    """Return the answers to conversations numbered from 0."""
    url = server if isinstance(server, str) else server.url
    bodies = [{"messages": [{"role": "user", "content": str(n)}]} for n in range(count)]
    with Client(endpoint(url, **settings), patience_s=patience_s, requests=requests) as client:
        return [text_of(reply) for reply in client.post("chat/completions", bodies)]


def number(request: Request) -> int:
    return int(request.body["messages"][0]["content"])


def test_answers_come_in_the_order_of_their_questions() -> None:
    """The first question is answered last, so that all must have been asked at once."""
    last_is_answered = threading.Event()

    def answer(request: Request) -> Reply:
        if number(request) == 0:
            assert last_is_answered.wait(LIMIT_S)
        if number(request) == 3:
            last_is_answered.set()
        return 200, chat_reply(f"answer {number(request)}")

    with StandIn(answer) as server:
        assert ask(server, 4) == [f"answer {n}" for n in range(4)]


def test_no_more_are_asked_at_once_than_the_client_may() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def answer(request: Request) -> Reply:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return 200, chat_reply("")

    with StandIn(answer) as server:
        ask(server, 12, requests=2)
    assert most <= 2


def test_the_recipe_adds_fields_to_a_request_and_removes_them() -> None:
    with StandIn(lambda _: (200, chat_reply("yes"))) as server:
        given = endpoint(server.url, extra={"max_completion_tokens": 5, "max_tokens": None})
        with Client(given) as client:
            client.post("chat/completions", [{"model": "judge", "max_tokens": 9, "seed": None}])
        ((request),) = server.requests
    assert request.path == "/v1/chat/completions"
    assert request.body == {"model": "judge", "max_completion_tokens": 5}


def test_an_answer_without_text_is_empty() -> None:
    with StandIn(lambda _: (200, chat_reply(None))) as server:
        assert ask(server) == [""]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_is_busy_is_asked_again(status: int) -> None:
    def answer(_: Request) -> Reply:
        return (status, "busy") if len(server.requests) < 3 else (200, chat_reply("at last"))

    with StandIn(answer) as server:
        assert ask(server) == ["at last"]
        assert len(server.requests) == 3


def test_it_is_not_asked_earlier_than_it_says() -> None:
    times: list[float] = []

    def answer(_: Request) -> Reply:
        times.append(time.monotonic())
        return (429, "busy", {"Retry-After": "2"}) if len(times) == 1 else (200, chat_reply(""))

    with StandIn(answer) as server:
        ask(server)
    assert times[1] - times[0] >= 2


def test_retries_end_with_the_time_limit_of_an_answer() -> None:
    with StandIn(lambda _: (503, "loading")) as server:
        with pytest.raises(Unreachable, match=f"{server.url} refused .503: loading.") as refused:
            ask(server, timeout_s=1.0)
        assert len(server.requests) == 2, "after 0.5 s, and not after 1.5 s"
    assert "\n" not in str(refused.value)


def test_a_server_that_is_down_is_named() -> None:
    with StandIn(lambda _: (200, {})) as server:
        pass
    with pytest.raises(
        Unreachable, match=f"{server.url} does not answer .*; start it, or correct its `url`"
    ):
        ask(server, patience_s=0.0)


def test_a_server_that_never_answers_is_given_up() -> None:
    never = threading.Event()
    with StandIn(lambda _: (200, never.wait(LIMIT_S))) as server:
        with pytest.raises(Unreachable, match=r"does not answer .ReadTimeout"):
            ask(server, patience_s=0.0, timeout_s=0.2)
        never.set()


def test_a_refusal_that_stays_is_not_asked_again() -> None:
    with StandIn(lambda _: (404, {"error": "The model `judge` does not exist."})) as server:
        with pytest.raises(Refused, match=r"404: .*`judge` does not exist") as refused:
            ask(server)
        assert len(server.requests) == 1
    assert refused.value.status == 404


def test_one_that_fails_ends_the_wait_for_the_others() -> None:
    release = threading.Event()
    answered = []

    def answer(request: Request) -> Reply:
        if number(request) == 1:
            return 400, "no"
        answered.append(release.wait(LIMIT_S))
        return 200, chat_reply("late")

    with StandIn(answer) as server:
        with pytest.raises(Refused):
            ask(server, 3)
        assert not answered
        release.set()


def test_a_stop_ends_the_wait() -> None:
    release = threading.Event()
    answered = []

    def answer(_: Request) -> Reply:
        answered.append(release.wait(LIMIT_S))
        return 200, chat_reply("late")

    with StandIn(answer) as server:
        with (
            Client(endpoint(server.url), lambda: bool(server.requests)) as client,
            pytest.raises(Stopped),
        ):
            client.post("completions", [{}])
        assert not answered
        release.set()


@pytest.mark.parametrize(
    "content",
    [
        *("<html>Welcome</html>", {"detail": "hello"}, {"choices": []}, [], "null", "[" * 100_000),
        *({"choices": [{"message": {"content": each}}]} for each in (5, ["a"], {"text": "a"})),
        *({**chat_reply("a"), "usage": usage} for usage in (["x"], 7)),
        {"choices": [{"message": "a"}]},
    ],
)
def test_a_server_of_another_kind_is_named(content: Any) -> None:
    with (
        StandIn(lambda _: (200, content)) as server,
        pytest.raises(Refused, match="something else than an OpenAI"),
    ):
        ask(server)


def test_half_a_surrogate_pair_is_no_character() -> None:
    reply = '{"choices": [{"message": {"content": "a\\ud83db"}}]}'
    with StandIn(lambda _: (200, reply)) as server:
        assert ask(server) == ["a?b"]


@contextmanager
def dripping(head: bytes, pause_s: float, piece: bytes = b" " * 1000) -> Iterator[str]:
    """Give the address of a server that sends `head`, and then a piece now and then, for ever."""
    ended = threading.Event()

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection = listener.accept()[0]
                threading.Thread(target=drip, args=(connection,), daemon=True).start()

    def drip(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.sendall(head)
            while not ended.wait(pause_s):
                connection.sendall(piece)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        ended.set()


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "])
def test_an_answer_that_never_ends_is_given_up(head: bytes, monkeypatch: Any) -> None:
    monkeypatch.setattr(openai_client, "_GRACE_S", 0.1)
    with dripping(head, 0.02) as url, pytest.raises(Unreachable, match=r"within 0\.3 s"):
        ask(url, timeout_s=0.3)


def test_a_server_whose_head_never_ends_is_not_waited_for_at_the_start(monkeypatch: Any) -> None:
    monkeypatch.setattr(openai_client, "_GRACE_S", 0.1)
    still_working = b"HTTP/1.1 100 Continue\r\n\r\n"
    with (
        dripping(still_working, 0.02, still_working) as url,
        Client(endpoint(url, timeout_s=0.3)) as client,
    ):
        asking = ThreadPool(1).apply_async(client.check)
        with pytest.raises(Unreachable, match=r"within 0\.3 s"):
            asking.get(LIMIT_S)


def test_an_answer_that_is_too_long_is_given_up(monkeypatch: Any) -> None:
    monkeypatch.setattr(openai_client, "_LONGEST_REPLY", 1 << 20)
    with (
        StandIn(lambda _: (200, chat_reply("a" * (1 << 20)))) as server,
        pytest.raises(Refused, match="more than 1 MiB"),
    ):
        ask(server)


# ------------------------------------------------------------------------------------------ the key


def test_the_key_is_sent_and_shown_nowhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\n")
    caplog.set_level("DEBUG")
    with StandIn(
        lambda request: (401, f"no such key: {request.headers['authorization']}")
    ) as server:
        with pytest.raises(
            Refused, match=r"401: no such key: Bearer \*\*\*.; set `key_env`"
        ) as refused:
            ask(server, key_env="JUDGE_KEY")
        assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert KEY not in str(refused.value)
    assert KEY not in caplog.text


def test_no_key_is_sent_unless_the_recipe_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with StandIn(lambda _: (200, chat_reply(""))) as server:
        ask(server)
        assert "authorization" not in server.requests[0].headers


@pytest.mark.parametrize("value", ["", "two\nlines"])
def test_a_variable_without_a_key_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(Unreachable, match=r"environment variable JUDGE_KEY, .* is not"):
        ask("http://localhost:1/v1", key_env="JUDGE_KEY")


# ------------------------------------------------------------------------------------- is it there?


@pytest.mark.parametrize("status", [200, 404, 500])
def test_a_server_is_there_with_or_without_a_list_of_models(status: int) -> None:
    with StandIn(lambda _: (status, {})) as server, Client(endpoint(server.url)) as client:
        client.check()


@pytest.mark.parametrize("status", [401, 503])
def test_one_that_does_not_let_us_in_is_not(status: int) -> None:
    with StandIn(lambda _: (status, "")) as server, Client(endpoint(server.url)) as client:
        with pytest.raises(Refused):
            client.check()
        assert len(server.requests) == 1


# --------------------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize(
    ("url", "why"),
    [
        (f"http://me:{KEY}@host/v1", "no user, password or key"),
        (f"http://{KEY}@host/v1", "no user, password or key"),
        (f"https://host/v1?api-key={KEY}", "no user, password or key"),
        ("host:8000/v1", "address with http"),
        ("ftp://host/v1", "address with http"),
        ("http:///v1", "address with http"),
        ("http://host:99999/v1", "is not an address"),
    ],
)
def test_an_address_is_plain(url: str, why: str) -> None:
    given = [f"eval.server.url={json.dumps(url)}"]
    with pytest.raises(BadInput, match=why) as refused:
        load_recipe("recipes/debug.yaml", given)
    assert KEY not in str(refused.value)


@pytest.mark.parametrize(
    "extra",
    [
        {"api_key": KEY},
        {"headers": {"Authorization": f"Bearer {KEY}"}},
        {"my-Secret": 1},
        {"token": KEY},
        {"hf_token": KEY},
        {"passwd": KEY},
    ],
)
def test_further_fields_hold_no_secret(extra: dict) -> None:
    """The recipe is saved in the run folder, in model cards and by trackers."""
    with pytest.raises(BadInput, match="`extra` must hold no secret, as `") as refused:
        load_recipe("debug", [f"eval.server={json.dumps({'url': 'http://a/v1', 'extra': extra})}"])
    assert KEY not in str(refused.value)


def test_a_slash_at_its_end_does_not_matter() -> None:
    with StandIn(lambda _: (200, chat_reply(""))) as server:
        ask(f"{server.url}/")
        assert server.requests[0].path == "/v1/chat/completions"
