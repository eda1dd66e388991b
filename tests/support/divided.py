"""Suites of `ranks` for models other than FLUX.1 whose tokens are divided among ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import distributed_c10d

from tests.support import sglang_ranks
from tests.support.engines import guidance

SURVIVED_S = 10.0  # the time-out of groups in which a rank raises but does not end
TEXT = 8  # two ranks can divide this
POOLED = {"densities": (0.25, 0.615, 1.0), "boundaries": (0.4, 0.7, 1.0), "steps": 5, "pooling": (2, 1, 1)}


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _wan(batch: int, **call: Any) -> tuple[Any, Callable[[Any], Tensor]]:
    from tests.support import video

    return video.wan_pipeline(), lambda pipe: video.generate(pipe, batch=batch, **call)


def _wan_frame(batch: int) -> tuple[Any, Callable[[Any], Tensor]]:
    """Wan 2.2 TI2V, with a timestep for every token, which is 0 for the given frame."""
    from tests.support import video

    pipe = video.image_pipeline(expand_timesteps=True)
    return pipe, lambda pipe: video.generate(pipe, batch=batch, image=video.image())


def _qwen(batch: int, **call: Any) -> tuple[Any, Callable[[Any], Tensor]]:
    from tests.support import qwen

    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    text = {
        "prompt_embeds": _noise(1, batch, TEXT, 16),
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": _noise(2, batch, TEXT, 16),
        "negative_prompt_embeds_mask": mask,
        "height": 12 * qwen.PIXELS,  # 12 x 14 tokens: an even number when pooled, too
    }
    return qwen.qwen_pipeline(), lambda pipe: qwen.generate(pipe, batch=batch, **text, **call)


def _flux2(batch: int) -> tuple[Any, Callable[[Any], Tensor]]:
    from tests.support import pipelines, tiny

    def generate(pipe: Any) -> Tensor:
        made: Tensor = pipe(
            prompt_embeds=_noise(3, batch, TEXT, tiny.WIDTH),
            height=48,
            width=48,
            num_inference_steps=5,
            guidance_scale=2.0,
            generator=[torch.Generator().manual_seed(seed) for seed in range(batch)],
            output_type="latent",
            return_dict=False,
        )[0]
        return made

    return pipelines.flux2_pipeline("Flux2Pipeline"), generate


MAKERS: Mapping[str, Callable[[int], tuple[Any, Callable[[Any], Tensor]]]] = {
    "wan": _wan,
    "wan with a frame": _wan_frame,
    "qwen": _qwen,
    "flux2": _flux2,
}
CASES = {
    **{f"{name}, {stage}": (name, stage, 1) for name in MAKERS for stage in ("subset", "pooled")},
    **{f"{name}, batch of two": (name, "subset", 2) for name in MAKERS if name != "wan with a frame"},
    "wan, dense": ("wan", "dense", 1),
}


def _config(stage: str) -> Any:
    from jitaccel import JiTConfig
    from tests.support import tiny

    if stage == "dense":
        return tiny.DENSE.replace(steps=3)
    return JiTConfig(**POOLED) if stage == "pooled" else tiny.SHORT.replace(densities=(0.355, 0.65, 1.0))


def modes_of(case: str) -> tuple[str, ...]:
    """Returns the ways in which a case is divided; a ring needs attention without a mask."""
    return ("ulysses",) if CASES[case][0] == "qwen" else ("ulysses", "ring")


def models(rank: int) -> Any:
    """Runs every case in one process and divided among ranks; returns results by (mode, name), errors as text."""
    import jitaccel
    from tests.support.ranks import divided

    found: dict[tuple[str, str], Any] = {}
    for case, (name, stage, batch) in CASES.items():
        config = _config(stage)
        pipe, generate = MAKERS[name](batch)
        with jitaccel.apply(pipe, config, multiple=distributed.get_world_size()) as handle:
            alone, own = generate(pipe), handle.stats()
        for mode in modes_of(case):
            pipe, generate = MAKERS[name](batch)
            handle = jitaccel.apply(divided(pipe, mode), config)
            picture = generate(pipe)
            stats = handle.stats()
            found[mode, case] = {
                "alone": alone,
                "divided": picture,
                "tokens": [step.tokens for step in stats.steps],
                "tokens alone": [step.tokens for step in own.steps],
                "rank_tokens": stats.rank_tokens,
                "ranks": stats.ranks,
            }
    return found


def model_refusals(rank: int) -> Any:
    """Returns each rank's errors for refused uses of cut models, by name, and a picture made afterwards."""
    import jitaccel
    from tests.support import ltx, qwen, video
    from tests.support.ranks import divided, error_of

    config = _config("subset")
    found: dict[str, Any] = {}
    for name in ("wan", "qwen"):
        pipe, generate = MAKERS[name](1)
        jitaccel.apply(pipe, config)
        divided(pipe, "ulysses")
        found[f"order, {name}"] = error_of(lambda: generate(pipe))  # noqa: B023  # called at once
    jitaccel.apply(pipe, config)
    found["picture, applied again"] = generate(pipe)

    def odd(pipe: Any, generate: Callable[[Any], Tensor]) -> str:
        jitaccel.apply(divided(pipe, "ulysses"), config)
        return error_of(lambda: generate(pipe))

    found["prompt, qwen"] = odd(qwen.qwen_pipeline(), qwen.generate)
    masked = ltx.pipeline()
    found["untested, ltx"] = error_of(lambda: jitaccel.apply(divided(masked, "ulysses"), config))
    small = {"num_frames": 9, "height": 80, "width": 80}
    found["size, wan"] = odd(video.wan_pipeline(), lambda pipe: video.generate(pipe, **small))
    found["noise, wan"] = odd(video.wan_pipeline(), lambda pipe: video.generate(pipe, seed=rank))
    without = video.vace_pipeline()
    found["no plan, vace"] = error_of(lambda: divided(without, "ulysses"))
    found["untested, vace"] = error_of(lambda: jitaccel.apply(without, config))
    return found


def _fail_in_third_forward(pipe: Any, fails: bool) -> Any:
    """Makes the third forward raise before its first block, when tokens are already divided; returns the hook."""
    blocks = next(each for each in pipe.transformer.children() if isinstance(each, nn.ModuleList))
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3 and fails:
            raise ArithmeticError("the third forward fails here")

    return blocks[0].register_forward_pre_hook(fail)


def model_faults(rank: int) -> Any:
    """Returns pictures made after every rank failed in the same forward, and those of pipelines without failures."""
    import jitaccel
    from tests.support.ranks import divided, error_of

    config, found = _config("subset"), {}
    for name, maker in MAKERS.items():
        pipe, generate = maker(1)
        jitaccel.apply(divided(pipe, "ulysses"), config)
        expected = generate(pipe)
        hook = _fail_in_third_forward(pipe, True)
        said = error_of(lambda: generate(pipe))  # noqa: B023  # called at once
        hook.remove()
        found[name] = {"said": said, "after": generate(pipe), "expected": expected}
    return found


def _fault_of(name: str) -> Callable[[int], Any]:
    def fault(rank: int) -> None:
        """The last rank raises within its third forward, and ends; the others must not wait for it."""
        import jitaccel
        from tests.support.ranks import divided

        pipe, generate = MAKERS[name](1)
        jitaccel.apply(divided(pipe, "ulysses"), _config("subset"))
        _fail_in_third_forward(pipe, rank == distributed.get_world_size() - 1)
        generate(pipe)

    return fault


def survivor(rank: int) -> Any:
    """The last rank raises in its third forward but does not end.

    The others wait until the time-out of the group of all ranks, which divides the tokens if all ranks divide them in
    the same way.
    """
    import jitaccel
    from tests.support.ranks import GROUP_S, divided

    others = distributed.new_group(timeout=timedelta(seconds=GROUP_S))
    distributed_c10d._set_pg_timeout(timedelta(seconds=SURVIVED_S))
    pipe, generate = MAKERS["wan"](1)
    jitaccel.apply(divided(pipe, "ulysses"), _config("subset"))
    _fail_in_third_forward(pipe, rank == distributed.get_world_size() - 1)
    begun = time.monotonic()
    try:
        generate(pipe)
        said = "nothing"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - begun
    distributed.barrier(group=others)
    return {"said": said, "seconds": seconds}


SUITES: Mapping[str, Callable[[int], Any]] = {
    "models": models,
    "model_faults": model_faults,
    "model_survivor": survivor,
    **{f"fault, {name}": _fault_of(name) for name in MAKERS},
    "model_refusals": model_refusals,
    "guidance": guidance,
    **sglang_ranks.SUITES,
}
