"""Starts, watches and ends processes on loopback that make one picture together, and defines what each of them runs.

`python -m tests.support.ranks SUITE FOLDER RANK RANKS` runs one rank and writes its results to FOLDER/RANK.pt.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

ROOT = Path(__file__).resolve().parents[2]
GROUP_S = 120.0  # the process group's own time-out


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a rank ended: its exit status `code`, None if it was ended by us, and `seconds` since the start."""

    code: int | None
    output: str
    seconds: float
    found: Any


def start(suite: str, folder: Path, *, ranks: int = 2, seconds: float = 400.0) -> list[Ended]:
    """Runs the ranks of a suite and returns how each ended; ranks still running after `seconds` are ended."""
    begun = time.monotonic()
    quiet = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    logs = [(folder / f"{rank}.log").open("w+") for rank in range(ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.ranks", suite, str(folder), str(rank), str(ranks)],
            cwd=ROOT,
            env={**os.environ, **quiet},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        ends = [_waited(process, begun, seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found = []
    for rank, (log, (code, after)) in enumerate(zip(logs, ends, strict=True)):
        log.seek(0)
        path = folder / f"{rank}.pt"
        result = torch.load(path, weights_only=False) if path.exists() else None
        found.append(Ended(code=code, output=log.read(), seconds=after, found=result))
        log.close()
    return found


def finished(suite: str, folder: Path) -> list[Any]:
    """Returns the results of two ranks, both of which must end successfully."""
    ended = start(suite, folder)
    assert [each.code for each in ended] == [0, 0], "\n".join(each.output[-3000:] for each in ended)
    return [each.found for each in ended]


def _waited(process: subprocess.Popen[bytes], begun: float, seconds: float) -> tuple[int | None, float]:
    try:
        code = process.wait(max(begun + seconds - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        return None, time.monotonic() - begun
    return code, time.monotonic() - begun


def divided(pipe: Any, mode: str) -> Any:
    """Returns a pipeline whose transformer divides its tokens among all ranks."""
    from diffusers import ContextParallelConfig

    degree = {f"{mode}_degree": distributed.get_world_size()}
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(**degree))
    return pipe


def _attention_with_lse(
    ctx: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    *_: Any,
    **__: Any,
) -> Any:
    """Attention in plain torch, (B, T, heads, D), that returns its log-sum-exp, which the ring needs and SDPA hides."""
    assert not is_causal and not enable_gqa and dropout_p == 0.0
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * (scale or query.shape[-1] ** -0.5)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), value)
    return (out, scores.logsumexp(dim=-1).transpose(1, 2)) if return_lse else out


def _prompts(count: int, what: str = "", tokens: int = 8) -> dict[str, Any]:
    """Returns embedded prompts (`what` is "" or "negative_"), which need no text encoder on any rank."""
    from tests.support import tiny

    generator = torch.Generator().manual_seed(len(what))
    return {
        f"{what}prompt_embeds": torch.randn(count, tokens, tiny.WIDTH, generator=generator),
        f"{what}pooled_prompt_embeds": torch.randn(count, tiny.WIDTH, generator=generator),
    }


def _picture(pipe: Any, **call: Any) -> Tensor:
    from tests.support import tiny

    return tiny.generate(pipe, **{"prompt": None, **_prompts(1), **call})


def _cases() -> Mapping[str, tuple[Any, tuple[int, int], dict[str, Any]]]:
    """Returns cases as (config, grid, call)."""
    from jitaccel import JiTConfig
    from tests.support import tiny

    subset = tiny.SHORT.replace(densities=(0.355, 0.65, 1.0))  # 51 and 93 of 144 tokens
    pooled = JiTConfig(densities=(0.25, 0.615, 1.0), boundaries=(0.4, 0.7, 1.0), steps=5, pooling=(2, 1, 1))
    guided = {**_prompts(1, "negative_"), "true_cfg_scale": 3.0}
    two = {"seed": [0, 1], **_prompts(2)}
    return {
        "subset": (subset, tiny.GRID, {}),
        "subset, dpmpp_2m": (subset.replace(solver="dpmpp_2m", lifter="clean"), tiny.GRID, {}),
        "subset, true CFG": (subset, tiny.GRID, guided),
        "subset, batch of two": (subset, tiny.GRID, two),
        "pooled": (pooled, tiny.GRID, {}),
        "pooled, true CFG, batch of two": (pooled, (8, 12), {**two, **guided, **_prompts(2, "negative_")}),
        "dense": (tiny.DENSE.replace(steps=3), tiny.GRID, {}),
        "preset 7x": ("7x", tiny.GRID, {}),
    }


def pictures(rank: int) -> Any:
    """Every case in one process and divided among ranks, by (mode, name)."""
    import jitaccel
    from tests.support import tiny

    found = {}
    for name, (config, grid, call) in _cases().items():
        alone = tiny.pipeline()
        with jitaccel.apply(alone, config, multiple=distributed.get_world_size()) as handle:
            expected, own = _picture(alone, grid=grid, **call), handle.stats()
        for mode in ("ulysses", "ring"):
            pipe = divided(tiny.pipeline(), mode)
            handle = jitaccel.apply(pipe, config)
            with tiny.counted(pipe.transformer) as seen:
                picture = _picture(pipe, grid=grid, **call)
            stats = handle.stats()
            found[mode, name] = {
                "alone": expected,
                "divided": picture,
                "seen": seen,
                "calls": [step.calls for step in stats.steps],
                "tokens": [step.tokens for step in stats.steps],
                "tokens alone": [step.tokens for step in own.steps],
                "rank_tokens": stats.rank_tokens,
                "ranks": (own.ranks, stats.ranks),
                "anchors": stats.anchors,
                "text": (str(own), str(stats)),
            }
    return found


def error_of(run: Callable[[], Any]) -> str:
    """Returns type and message of a function's error after all ranks arrive, which shows that none waits."""
    try:
        run()
        said = "nothing"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    distributed.barrier()
    return said


def refusals(rank: int) -> Any:
    """What every rank says of what is refused, by name; and pictures made after it."""
    import jitaccel
    from tests.support import tiny

    config, pooled = _cases()["subset"][0], _cases()["pooled"][0]
    found: dict[str, Any] = {}

    def made(config: Any = config, pipe: Any = None, **call: Any) -> Tensor:
        pipe = divided(tiny.pipeline(), "ulysses") if pipe is None else pipe
        jitaccel.apply(pipe, config)
        return _picture(pipe, **call)

    early = tiny.pipeline()
    handle = jitaccel.apply(early, config)
    divided(early, "ulysses")
    found["order"] = error_of(lambda: _picture(early))
    found["order, again"] = error_of(lambda: _picture(early))
    found["picture, applied again"] = made(pipe=early)
    handle.remove()
    late = divided(tiny.pipeline(), "ulysses")
    found["noise"] = error_of(lambda: made(pipe=late, seed=rank))
    found["picture, same noise"] = made(pipe=late)
    found["noise of one image"] = error_of(lambda: made(seed=[0, rank], **_prompts(2)))
    found["settings"] = error_of(lambda: made(config.replace(blur_scale=0.4 + rank)))
    levels = {"schedule": (0.9, 0.8, 0.6, 0.4, 0.2, 0.0)}
    found["one rank"] = error_of(lambda: made(config.replace(**levels, noise=("fresh", "own")[rank])))
    found["pooled size"] = error_of(lambda: made(pooled, grid=(10, 10)))
    found["size"] = error_of(lambda: made(grid=(11, 11)))
    found["prompt"] = error_of(lambda: made(**_prompts(1, tokens=7)))
    found["heads"] = error_of(lambda: made(pipe=_three_heads()))
    wanted = jitaccel.Auto(speedup=2.0, size=(48, 48))
    found["auto"] = error_of(lambda: jitaccel.apply(divided(tiny.pipeline(), "ulysses"), wanted))
    found["residuals"] = error_of(_with_residuals)
    found["picture, at the end"] = made()
    plain = tiny.pipeline()
    jitaccel.apply(plain, config, multiple=2)
    found["alone"] = _picture(plain)
    return found


def _three_heads() -> Any:
    from tests.support import tiny

    return divided(tiny.pipeline(transformer=tiny.transformer(num_attention_heads=3)), "ulysses")


def _with_residuals() -> None:
    """Calls a transformer with residuals, like a ControlNet pipeline."""
    import jitaccel
    from tests.support import tiny

    pipe = divided(tiny.pipeline(), "ulysses")
    jitaccel.apply(pipe.transformer, _cases()["subset"][0])
    pipe.transformer(
        hidden_states=tiny.start(),
        encoder_hidden_states=torch.zeros(1, tiny.TEXT_TOKENS, tiny.WIDTH),
        pooled_projections=torch.zeros(1, tiny.WIDTH),
        timestep=torch.ones(1),
        guidance=torch.ones(1),
        img_ids=tiny.ids(),
        txt_ids=torch.zeros(tiny.TEXT_TOKENS, 3),
        controlnet_block_samples=[torch.zeros(1, tiny.NUM_TOKENS, tiny.WIDTH)],
    )


def fault(rank: int) -> Any:
    """The last rank raises within its third forward, and ends; the others must not wait for it."""
    import jitaccel
    from tests.support import tiny

    pipe = divided(tiny.pipeline(), "ulysses")
    jitaccel.apply(pipe, _cases()["subset"][0])
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3 and rank == distributed.get_world_size() - 1:
            raise ArithmeticError("the third forward fails here")

    pipe.transformer.x_embedder.register_forward_pre_hook(fail)
    _picture(pipe)


SUITES: Mapping[str, Callable[[int], Any]] = {"pictures": pictures, "refusals": refusals, "fault": fault}


def main(suite: str, folder: str, rank: str, ranks: str) -> None:
    """Runs one rank."""
    import diffusers.models.attention_dispatch as dispatch

    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # type: ignore[assignment]  # diffusers divides by it, and a CPU has none
    dispatch._native_attention_forward_op = _attention_with_lse
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=int(rank),
        world_size=int(ranks),
        timeout=timedelta(seconds=GROUP_S),
    )
    from tests.support import divided as other_models

    suites = {**SUITES, **other_models.SUITES}
    torch.save(suites[suite](int(rank)), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
