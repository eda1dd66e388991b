"""Two replicas on loopback, started by the command: mixed requests, and a replica killed while it works."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from jitaccel import Request, generate_batch
from jitaccel.loading import load_pipeline
from tests.support import tiny
from tests.support.served import Answered, Server, has_ray, served

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not has_ray(), reason="needs ray[serve]")]

LONG: dict[str, Any] = {"prompt": "a red circle", "preset": "dense", "height": 160, "width": 160}
GOOD: list[dict[str, Any]] = [
    *({"prompt": "a red circle", "seed": seed} for seed in range(4)),
    {"prompt": "blue", "seed": 1, "preset": "few-steps"},
    {"prompt": "blue", "seed": 1, "preset": "4x-paper", "height": 64, "width": 96},
    {"prompt": "green square on the left", "preset": "7x-paper", "guidance_scale": 1.0},
    {"prompt": "a", "negative_prompt": "red", "true_cfg_scale": 2.0, "seed": 2**64 - 1},
    {"prompt": "", "steps": 9},
    {**LONG, "seed": 0},
    {**LONG, "seed": 1},
    {**LONG, "seed": 2},
    {**LONG, "seed": 3},
]
BAD: list[tuple[Any, int]] = [
    (b"{", 400),
    ({"prompt": "a", "steps": 1000}, 400),
    ({"prompt": "a", "preset": "9x"}, 400),
    ({"prompt": "a", "height": 10000, "width": 10000}, 400),
    ({"prompt": "a", "height": 50}, 400),  # the pipeline knows, not the front
    ({"seed": 1}, 400),
    (b" " * 70000, 413),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random pipeline on disk, so that server and test load the same tokenizers."""
    found = tmp_path_factory.mktemp("model")
    tiny.pipeline().save_pretrained(found)
    return str(found)


@pytest.fixture(scope="module")
def server(folder: str) -> Iterator[Server]:
    with served(
        *("--model", folder, "--replicas", "2", "--cpus", "0.4", "--threads", "1", "--batch-size", "2"),
        *("--dtype", "float32", "--device", "cpu", "--max-waiting", "32", "--preset", "7x"),
    ) as running:
        yield running


def whole(body: dict[str, Any]) -> dict[str, Any]:
    return {"height": 48, "width": 48, "max_sequence_length": tiny.TEXT_TOKENS, **body}


def expected(pipe: Any, body: dict[str, Any]) -> bytes:
    """Returns the PNG that this process makes for a single request."""
    outcome = generate_batch(pipe, [Request(**whole(body))], execution="indexed")[0]
    file = io.BytesIO()
    outcome.image.save(file, format="PNG")
    return file.getvalue()


def watch(server: Server, body: dict[str, Any]) -> list[tuple[str, Any]]:
    answer = server.generate(whole(body), "text/event-stream")
    blocks = [block.split("\n") for block in answer.body.decode().strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


def test_every_request_is_answered_though_a_replica_is_killed(server: Server, folder: str) -> None:
    torch.set_num_threads(1)
    assert server.get("/health").said["replicas"] == {"RUNNING": 2}
    first = server.generate(whole(GOOD[0]))
    victim = int(json.loads(first.headers["x-jitaccel-statistics"])["replica"])
    under_way = threading.Barrier(2)
    with ThreadPoolExecutor(20) as pool:
        long = [pool.submit(server.generate, whole(body)) for body in GOOD[-4:]]
        killed = pool.submit(_kill_later, victim, under_way)
        good = long + [pool.submit(server.generate, whole(body)) for body in GOOD[:-4]]
        bad = [pool.submit(server.generate, body) for body, _ in BAD]
        under_way.wait(30)
        answers: list[Answered] = [each.result(180) for each in good]
        refused = [each.result(180) for each in bad]
        killed.result(30)
    assert [answer.status for answer in refused] == [status for _, status in BAD]
    assert all(answer.said["error"] for answer in refused)
    pipe = load_pipeline(folder, "float32", "cpu")
    bodies = GOOD[-4:] + GOOD[:-4]
    assert len(answers) + len(refused) == 20
    for body, answer in zip(bodies, answers, strict=True):
        assert answer.status == 200 or (answer.status == 503 and "send it again" in answer.said["error"]), answer
        if answer.status == 200:
            assert answer.body == expected(pipe, body), body
    assert sum(answer.status == 200 for answer in answers) >= 12  # given to the other replica
    for _ in range(240):
        if (health := server.get("/health").said)["replicas"].get("RUNNING") == 2 and health["accepted"] == 0:
            break
        time.sleep(0.5)
    assert health["replicas"] == {"RUNNING": 2} and health["accepted"] == 0
    again = server.generate(whole(GOOD[1]))
    assert again.body == expected(pipe, GOOD[1])


def _kill_later(process: int, under_way: threading.Barrier) -> None:
    under_way.wait(30)
    time.sleep(1.0)
    os.kill(process, signal.SIGKILL)


def test_progress_and_json_come_through(server: Server) -> None:
    events = watch(server, GOOD[0])
    assert [data["step"] for name, data in events if name == "progress"] == list(range(1, 12))
    assert events[-1][0] == "picture"
    answer = server.generate(whole(GOOD[0]), "application/json")
    assert answer.said["image"] == events[-1][1]["image"] and answer.said["statistics"]["steps"] == 11


def test_place_of_a_client_that_leaves_comes_free(server: Server) -> None:
    import socket

    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps(whole({**LONG, "height": 320, "width": 320})).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    with socket.create_connection((host, int(port)), 10) as client:
        client.sendall(head + data)
        _await_accepted(server, 1)
    _await_accepted(server, 0)


def _await_accepted(server: Server, number: int) -> None:
    for _ in range(100):
        if server.get("/health").said["accepted"] == number:
            return
        time.sleep(0.1)
    raise AssertionError(f"never {number} accepted")
