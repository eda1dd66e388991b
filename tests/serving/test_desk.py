"""The server without Ray: desk and batcher, on a stand-in for `generate_batch` that a test controls step by step."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import pytest
from PIL import Image

from jitaccel import ConfigError, Request
from jitaccel.generation.batch import Outcome
from jitaccel.serving.batcher import Batcher
from jitaccel.serving.desk import STATISTICS, Desk, ReplicaLostError, Reply
from jitaccel.serving.events import Event, Failed, FinishedPicture, Progress
from jitaccel.serving.limits import Limits

STEPS = 3
WAIT_S = 20.0


class Pipeline:
    """Steps through a batch like `generate_batch`. A step waits for `gate`; the seeds in `bad` fail."""

    def __init__(self, *, is_open: bool = True, bad: dict[int, Exception] | None = None) -> None:
        self.gate = threading.Event()
        if is_open:
            self.gate.set()
        self.begun = threading.Event()
        self.bad = bad or {}
        self.batches: list[list[int]] = []
        self.steps: dict[int, int] = {}

    def __call__(self, requests: Sequence[Request], on_step: Any, on_outcome: Any) -> None:
        self.batches.append([request.seed for request in requests])
        refused = [self.bad[r.seed] for r in requests if isinstance(self.bad.get(r.seed), ConfigError)]
        if refused:
            raise refused[0]
        self.begun.set()
        live = dict(enumerate(requests))
        for step in range(1, STEPS + 1):
            assert self.gate.wait(WAIT_S)
            for index, request in list(live.items()):
                try:
                    if request.seed in self.bad:
                        raise self.bad[request.seed]
                    self.steps[request.seed] = step
                    on_step(index, step, STEPS)
                except Exception as error:
                    del live[index]
                    on_outcome(index, Outcome(request, error))
        for index, request in live.items():
            on_outcome(index, Outcome(request, None, 7, Image.new("RGB", (2, 2), (request.seed, 0, 0))))


async def two_replicas() -> dict[str, int]:
    return {"RUNNING": 2}


def desk_of(pipeline: Any, *, most: int = 2, replicas: Any = two_replicas, **limits: Any) -> Desk:
    batcher = Batcher(pipeline, most=most, who="one")
    return Desk(batcher.events, replicas, Limits(**limits), {"height": 64, "width": 64}, {"version": "1"})


def body(seed: int = 0, **fields: Any) -> bytes:
    return json.dumps({"prompt": "a", "seed": seed, **fields}).encode()


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(WAIT_S):
            return await work()

    return asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def generate(desk: Desk, seed: int = 0, accept: str = "", **fields: Any) -> Any:
    return desk.answer("POST", "/generate", body(seed, **fields), accept)


def said(reply: Reply) -> Any:
    assert isinstance(reply.body, bytes)
    return json.loads(reply.body)


def test_picture_comes_as_png_with_statistics_in_a_header_or_whole_as_json() -> None:
    desk = desk_of(Pipeline())
    png = run(lambda: generate(desk, 5))
    whole = run(lambda: generate(desk_of(Pipeline()), 5, "application/json"))
    assert (png.status, png.media, png.body[:4]) == (200, "image/png", b"\x89PNG")
    statistics = json.loads(png.headers[STATISTICS])
    assert (statistics["seed"], statistics["steps"], statistics["token_steps"]) == (5, 11, 7)
    assert statistics["replica"] == "one" and statistics["batch"] == 1 and statistics["generation_s"] >= 0
    import base64

    assert base64.b64decode(said(whole)["image"]) == png.body
    assert said(whole)["statistics"].keys() == statistics.keys()


def test_progress_comes_step_by_step_and_then_the_picture() -> None:
    async def work() -> list[tuple[str, Any]]:
        reply = await generate(desk_of(Pipeline()), 1, "text/event-stream")
        assert reply.media == "text/event-stream"
        lines = [line.decode().split("\n") async for line in reply.body]
        return [(line[0].removeprefix("event: "), json.loads(line[1].removeprefix("data: "))) for line in lines]

    events = run(work)
    assert events[:3] == [("progress", {"step": k, "steps": 3}) for k in (1, 2, 3)]
    assert events[3][0] == "picture" and events[3][1]["statistics"]["seed"] == 1 and len(events) == 4


def test_waiting_requests_run_as_one_batch() -> None:
    pipeline = Pipeline(is_open=False)

    async def work() -> list[Reply]:
        desk = desk_of(pipeline, most=3)
        asked = [asyncio.create_task(generate(desk, seed)) for seed in range(5)]
        await until(pipeline.begun.is_set)
        pipeline.gate.set()
        return await asyncio.gather(*asked)

    assert [reply.status for reply in run(work)] == [200] * 5
    assert pipeline.batches == [[0, 1, 2], [3, 4]]


def test_queue_is_bounded_and_places_come_free() -> None:
    pipeline = Pipeline(is_open=False)

    async def work() -> None:
        desk = desk_of(pipeline, waiting=3)
        asked = [asyncio.create_task(generate(desk, seed)) for seed in range(2)]
        stream = await generate(desk, 2, "text/event-stream")
        await until(lambda: desk.num_accepted == 3)
        full = await generate(desk, 9)
        assert (
            full.status == 429
            and full.headers["Retry-After"] == "1"
            and "3 requests are already waiting" in said(full)["error"]
        )
        assert (await generate(desk, 9, "text/event-stream")).status == 429
        assert (await generate(desk, 9, seeds=1)).status == 400
        pipeline.gate.set()
        assert [reply.status for reply in await asyncio.gather(*asked)] == [200, 200]
        assert [line async for line in stream.body][-1].startswith(b"event: picture")
        await until(lambda: desk.num_accepted == 0)
        assert (await generate(desk, 9)).status == 200

    run(work)
    assert 9 in pipeline.steps


def test_request_whose_client_left_stops_at_the_next_step_and_the_others_go_on() -> None:
    pipeline = Pipeline(is_open=False)

    async def work() -> None:
        desk = desk_of(pipeline)
        asked = [asyncio.create_task(generate(desk, seed)) for seed in range(4)]
        await until(pipeline.begun.is_set)
        for seed in (1, 3):  # one that runs, one that waits
            asked[seed].cancel()
        await until(lambda: asked[1].done() and asked[3].done())
        assert desk.num_accepted == 2
        pipeline.gate.set()
        assert [(await asked[seed]).status for seed in (0, 2)] == [200, 200]

    run(work)
    assert pipeline.batches == [[0, 1], [2]] and pipeline.steps == {0: 3, 1: 1, 2: 3}


def test_stream_that_nobody_reads_on_gives_its_request_up() -> None:
    pipeline = Pipeline(is_open=False)

    async def work() -> None:
        desk = desk_of(pipeline, seconds=0.2)
        unread = await generate(desk, 0, "text/event-stream")
        left = await generate(desk, 1, "text/event-stream")
        reading = asyncio.create_task(anext(left.body))
        await until(pipeline.begun.is_set)
        reading.cancel()
        await until(lambda: desk.num_accepted == 0)  # the one by leaving, the other by the time limit
        pipeline.gate.set()
        last = [line async for line in unread.body][-1]
        assert last.startswith(b"event: error") and b'"status": 504' in last

    run(work)


def test_time_limit_ends_a_request() -> None:
    pipeline = Pipeline(is_open=False)

    async def work() -> Reply:
        desk = desk_of(pipeline, seconds=0.05)
        reply = await generate(desk)
        assert desk.num_accepted == 0
        pipeline.gate.set()
        return reply

    reply = run(work)
    assert reply.status == 504 and "within 0.05 s" in said(reply)["error"]


def test_request_that_fails_fails_alone_and_a_refused_one_does_not_take_its_batch_along() -> None:
    bad = {1: ArithmeticError("not finite"), 2: ConfigError("height must be a multiple of 16")}
    pipeline = Pipeline(bad=bad)

    async def work() -> list[Reply]:
        desk = desk_of(pipeline, most=4)
        return await asyncio.gather(*(generate(desk, seed) for seed in range(4)))

    replies = run(work)
    assert [reply.status for reply in replies] == [200, 500, 400, 200]
    assert said(replies[1])["error"] == "the generation failed: ArithmeticError: not finite"
    assert said(replies[2])["error"] == "height must be a multiple of 16"
    assert pipeline.batches == [[0, 1, 2, 3], [0], [1], [2], [3]]


def test_generation_without_an_outcome_is_an_error_and_not_silence() -> None:
    reply = run(lambda: generate(desk_of(lambda *_: None)))
    assert reply.status == 500 and "without a picture" in said(reply)["error"]


@pytest.mark.parametrize(("deaths", "status"), [(0, 200), (1, 200), (2, 503), (9, 503)])
def test_request_of_a_replica_that_ends_is_given_to_another_once(deaths: int, status: int) -> None:
    calls = []

    async def ask(request: Request) -> AsyncIterator[Event]:
        calls.append(request)
        yield Progress(1, 3)
        if len(calls) <= deaths:
            raise ReplicaLostError("the replica ended")
        yield FinishedPicture(b"picture", {})

    reply = run(lambda: generate(Desk(ask, two_replicas, Limits(), {"height": 64, "width": 64})))
    assert reply.status == status and len(calls) == min(deaths, 1) + 1
    if status == 503:
        assert "given to 2 replicas, got no answer (the replica ended); send it again" in said(reply)["error"]


def test_health_says_whether_a_replica_can_work() -> None:
    async def none() -> dict[str, int]:
        return {"STARTING": 2}

    async def silent() -> dict[str, int]:
        raise TimeoutError

    well = run(lambda: desk_of(Pipeline()).answer("GET", "/health", b""))
    assert well.status == 200
    assert said(well) == {"status": "ok", "replicas": {"RUNNING": 2}, "accepted": 0, "limit": 64, "version": "1"}
    assert run(lambda: desk_of(Pipeline(), replicas=none).answer("GET", "/health", b"")).status == 503
    assert run(lambda: desk_of(Pipeline(), replicas=silent).answer("GET", "/health", b"")).status == 503


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/generate", 405), ("POST", "/health", 405), ("GET", "/", 404)]
)
def test_other_paths_and_methods_are_refused(method: str, path: str, status: int) -> None:
    assert run(lambda: desk_of(Pipeline()).answer(method, path, body())).status == status


def test_batcher_runs_again_after_a_batch_and_remembers_what_failed() -> None:
    pipeline = Pipeline(bad={1: ArithmeticError("broken")})

    async def work() -> Batcher:
        batcher = Batcher(pipeline)
        for seed in (0, 1, 2):
            async with aclosing(batcher.events(Request(prompt="a", seed=seed))) as events:
                last = [event async for event in events][-1]
            assert isinstance(last, Failed if seed == 1 else FinishedPicture)
            await asyncio.sleep(0)
        return batcher

    started = time.monotonic()
    assert isinstance(run(work).last_error, ArithmeticError)
    assert pipeline.batches == [[0], [1], [2]] and time.monotonic() - started < WAIT_S
