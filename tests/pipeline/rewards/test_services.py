"""Rewards that are services, asked over real connections: deadlines, repetitions, verdicts, kept answers."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from pydantic import TypeAdapter, ValidationError

from actors.errors import RunFailure, UserError
from pipeline.rewards.functions import Samples, settled
from pipeline.rewards.http_requests import Calling, Requests, longest_wait, retry_after
from pipeline.rewards.judging import Unreadable, filled, verdict
from pipeline.rewards.kept_answers import FILE, KeptAnswers
from pipeline.rewards.sources import source_of
from pipeline.rewards.spec import AnyReward, JudgeReward, RewardSettings
from pipeline.rewards.values import RewardCall

REWARD: TypeAdapter[RewardSettings] = TypeAdapter(AnyReward)


class Server:
    """A service with a fault at each path, and the requests that came to it."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.keys: list[str | None] = []
        self._count = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self.url = ""
        ready = threading.Event()
        threading.Thread(target=self._run, args=(ready,), daemon=True).start()
        assert ready.wait(30)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        ready.set()
        self._loop.run_forever()

    async def _start(self) -> None:
        app = web.Application(client_max_size=1 << 26)
        app.add_routes([web.post("/{path:.*}", self._answer)])
        runner = web.AppRunner(app, shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=2048)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body, path = await request.json(), request.match_info["path"]
        self.asked.append(body)
        self.keys.append(request.headers.get("Authorization"))
        if path == "hangs" or (path == "one-hangs" and body == {"number": 7}):
            await asyncio.sleep(600)
        if path == "busy" and next(self._count) % 3:
            return web.Response(status=503, text="come again")
        if path == "later":
            return web.Response(status=429, headers={"Retry-After": "3600"})
        if path == "refuses":
            return web.Response(status=403, text=f"not for {request.headers.get('Authorization')}")
        if path == "no-json":
            return web.Response(text="<html>")
        if path == "chat/completions":
            word = body["messages"][0]["content"].split()[-1]
            answer = {"role": "assistant", "content": f'Well... {{"score": {len(word)}}}'}
            return web.json_response({"choices": [{"message": answer}]})
        if path == "sandbox":
            return web.json_response({"passed": [test in body["code"] for test in body["tests"]]})
        if path in ("no-list", "too-many"):
            return web.json_response({"rewards": 1.0 if path == "no-list" else [1.0, 1.0]})
        if path in ("random", "nan"):
            value = (lambda: math.nan) if path == "nan" else random.random
            return web.json_response({"rewards": [value() for _ in body["completions"]]})
        lengths = [float(len(text)) if text != "pass" else None for text in body.get("completions", [])]
        return web.json_response({"rewards": lengths})


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def asked_about(n: int) -> Samples:
    completions = ["x" * (i + 1) for i in range(n)]
    columns = {"answer": [str(i) for i in range(n)], "topic": ["sums"] * n}
    return Samples([f"question {i}" for i in range(n)], completions, [[1]] * n, columns)


def called(server: Server, path: str, samples: Samples, kept: Path | None = None, **more: Any) -> RewardCall:
    spec = REWARD.validate_python({"kind": "http", "url": f"{server.url}/{path}", "timeout_s": 20} | more)
    return source_of(spec, KeptAnswers(kept)).begin(samples)()


def test_no_step_waits_beyond_its_deadline_with_a_thousand_requests_of_which_one_hangs(
    server: Server,
) -> None:
    calling = Calling(f"{server.url}/one-hangs", 8, 60, 0, 1000)
    began = time.monotonic()
    replies = Requests(calling, [{"number": i} for i in range(1000)]).result()
    assert time.monotonic() - began < 16
    assert [i for i, reply in enumerate(replies) if reply.problem] == [7]
    assert replies[7].problem == "no answer within 8 s"


def test_a_service_that_answers_nobody_costs_the_deadline_and_no_more(server: Server) -> None:
    began = time.monotonic()
    found = called(server, "hangs", asked_about(1000), timeout_s=2, batch_size=1, max_in_flight=1000)
    assert time.monotonic() - began < 12
    assert len(found.bad) == 1000
    assert "no answer within 2 s" in found.problem


def test_batches_have_prompts_completions_and_the_columns_that_are_asked_for(server: Server) -> None:
    server.asked.clear()
    samples = asked_about(3)
    found = called(server, "lengths", samples, batch_size=2, columns=["answer"])
    assert found == RewardCall([1.0, 2.0, 3.0])
    assert sorted(server.asked, key=lambda body: body["prompts"])[0] == {
        "prompts": ["question 0", "question 1"],
        "completions": ["x", "xx"],
        "columns": {"answer": ["0", "1"]},
    }
    none = called(server, "lengths", Samples(["q"], ["pass"], [[1]], {}))
    assert none == RewardCall([None])


def test_a_busy_service_is_asked_again_and_one_that_refuses_is_not(server: Server) -> None:
    assert called(server, "busy", asked_about(4), batch_size=4).problem == ""
    server.asked.clear()
    refused = called(server, "refuses", asked_about(1))
    assert len(server.asked) == 1
    assert "answered 403 Forbidden: 'not for None'" in refused.problem
    began = time.monotonic()
    assert "asks to wait 3600 s, beyond `timeout_s`" in called(server, "later", asked_about(1)).problem
    gone = called(server, "x", asked_about(1), url="http://127.0.0.1:9/", retries=1)
    assert "asked 2 times" in gone.problem
    assert time.monotonic() - began < 15


def test_waits_are_doubled_up_to_a_limit_and_retry_after_is_seconds_or_a_date() -> None:
    assert [longest_wait(attempt) for attempt in (0, 1, 2, 6, 1000)] == [0.5, 1, 2, 30, 30]
    assert [retry_after(header, 0.0) for header in ("3", "-1", "", "soon")] == [3, 0, 0, 0]
    assert retry_after("Thu, 01 Jan 1970 00:01:00 GMT", 45.0) == 15


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("no-json", "no JSON: '<html>'"),
        ("nan", "returned nan for sample 0 of 1"),
        ("no-list", "no JSON object with a list `rewards`: {'rewards': 1.0}"),
        ("too-many", "returned 2 values for 1 samples"),
    ],
)
def test_an_answer_without_numbers_is_a_problem_with_its_sample(server: Server, path: str, says: str) -> None:
    found = called(server, path, asked_about(1))
    assert says in found.problem
    assert found.bad == (0,)


def test_a_key_is_sent_and_shown_nowhere(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "s3cr3t-of-mine")
    found = called(server, "refuses", asked_about(1), api_key_env="MY_KEY")
    assert server.keys[-1] == "Bearer s3cr3t-of-mine"
    assert "s3cr3t" not in found.problem
    assert "not for ***" in found.problem
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(UserError, match="MY_KEY is not set"):
        called(server, "refuses", asked_about(1), api_key_env="MY_KEY")
    for url in ("https://me:pw@example.com/", "https://example.com/?api_key=1"):
        with pytest.raises(ValidationError, match="holds a secret"):
            REWARD.validate_python({"kind": "http", "url": url})


def test_what_a_service_said_once_stays_also_for_a_run_that_goes_on(server: Server, tmp_path: Path) -> None:
    file, samples = tmp_path / "stage" / FILE, asked_about(5)
    first = called(server, "random", samples, kept=file)
    with file.open("ab") as torn:
        torn.write(b'{"key": "half a li')
    server.asked.clear()
    again = called(server, "random", samples, kept=file)
    assert (again, server.asked) == (first, [])
    more = called(server, "random", asked_about(6), kept=file)
    assert more.values[:5] == first.values
    assert len(server.asked) == 1
    twice = Samples(["q"] * 4, ["same"] * 4, [[1]] * 4, {})
    assert len(set(called(server, "random", twice).values)) == 1


def test_of_two_answers_to_one_question_the_first_counts(tmp_path: Path) -> None:
    kept = KeptAnswers(tmp_path / FILE)
    assert kept.keep({"a": 1.0, "b": None}) == {"a": 1.0, "b": None}
    assert kept.keep({"a": 2.0, "c": 3.0}) == {"a": 1.0, "c": 3.0}
    assert KeptAnswers(tmp_path / FILE).known({"a", "b", "d"}) == {"a": 1.0, "b": None}


def test_the_number_that_stands_in_for_an_answer_is_kept_too(server: Server, tmp_path: Path) -> None:
    spec = {"kind": "http", "url": f"{server.url}/nan", "retries": 0, "on_error": -1}
    kept, samples = KeptAnswers(tmp_path / FILE), asked_about(2)
    reward = REWARD.validate_python(spec)
    values, note = settled(reward, source_of(reward, kept).begin(samples)(), samples)
    assert values.tolist() == [-1, -1]
    assert "2 of 2 samples get -1" in note
    assert source_of(reward, KeptAnswers(tmp_path / FILE)).begin(samples)() == RewardCall([-1.0, -1.0])
    stops = REWARD.validate_python(spec | {"on_error": "stop"})
    with pytest.raises(RunFailure, match="question 0"):
        settled(stops, source_of(stops, KeptAnswers(None)).begin(samples)(), samples)


def judge(tmp_path: Path, template: str = "{topic}: {prompt}? {completion}", **more: Any) -> dict[str, Any]:
    (tmp_path / "judge.txt").write_text(template)
    return {"kind": "judge", "model": "judge-1", "prompt": str(tmp_path / "judge.txt")} | more


def test_a_judge_reads_the_template_and_its_verdict_is_a_number(server: Server, tmp_path: Path) -> None:
    server.asked.clear()
    spec = REWARD.validate_python(judge(tmp_path, endpoint=server.url, max_tokens=9, extra_body={"top_k": 1}))
    assert source_of(spec, KeptAnswers(None)).begin(asked_about(2))() == RewardCall([1.0, 2.0])
    question = {"role": "user", "content": "sums: question 0? x"}
    assert min(server.asked, key=lambda body: len(str(body))) == {
        "model": "judge-1", "messages": [question], "temperature": 0, "max_tokens": 9, "top_k": 1
    }  # fmt: skip


def test_a_template_has_fields_and_other_braces_are_text() -> None:
    chat = [{"role": "user", "content": "a {completion}"}, {"role": "assistant", "content": "b"}]
    text = filled('{prompt}|{{prompt}}|{"score": 1}|{n}', {"prompt": chat, "n": 3})
    assert text == 'user: a {completion}\n\nassistant: b|{prompt}|{"score": 1}|3'


@pytest.mark.parametrize(
    ("settings", "text", "value"),
    [
        ({}, 'I think {"score": 1} no, {"why": {"score": 5}, "score": "0.5"}', 0.5),
        ({"json_key": "grade"}, '{"grade": true}', 1.0),
        ({"pattern": r"Score: (-?[\d.]+)"}, "Score: 1\nScore: -2.5", -2.5),
        ({"pattern": r"\[\[(\w+)\]\]", "values": {"A": 1, "B": 0}}, "[[A]]", 1.0),
        ({}, '{"score": "high"}', None),
        ({}, "Score: 1", None),
        ({"pattern": r"Score: (\w+)"}, "Score: nan", None),
    ],
)
def test_a_verdict_is_the_last_one_that_can_be_read(
    settings: dict[str, Any], text: str, value: float | None
) -> None:
    spec = JudgeReward(endpoint="http://x/v1", model="m", prompt="p", **settings)
    if value is not None:
        assert verdict(spec, text) == value
        return
    with pytest.raises(Unreadable, match="verdict can't be read"):
        verdict(spec, text)


def test_a_judge_without_a_template_that_shows_the_answer_is_refused(tmp_path: Path) -> None:
    spec = REWARD.validate_python(judge(tmp_path, "{prompt}", endpoint="http://x/v1"))
    with pytest.raises(UserError, match="would see no answer"):
        source_of(spec, KeptAnswers(None))
    (tmp_path / "judge.txt").unlink()
    with pytest.raises(UserError, match=r"judge.txt' can't be read \(No such file"):
        source_of(spec, KeptAnswers(None))


def test_a_sandbox_gets_the_code_and_its_tests(server: Server) -> None:
    samples = Samples(["q"], ["```python\nx = 1\n```"], [[1]], {"tests": [["x", "y"]]})
    spec = REWARD.validate_python({"kind": "code", "sandbox": f"{server.url}/sandbox"})
    values, _ = settled(spec, source_of(spec, KeptAnswers(None)).begin(samples)(), samples)
    assert values == np.array([0.5])
