"""Many requests in one call, for servers: `jitaccel.generate_batch(pipe, [Request(...), ...])`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import ConfigError, UnsupportedModelError
from ..execution.options import Attention, Execution, Mode
from ..limits import MOST_SIDE
from ..method.checks import is_finite_number
from ..method.config import JiTConfig
from ..method.presets import resolve

OutputType = Literal["pil", "latent"]
OnBatchStep = Callable[[int, int, int], None]
"""Called after each step of each request: (index of the request, steps done, steps in all)."""
OnOutcome = Callable[[int, "Outcome"], None]
"""Called as soon as a request has its outcome: (index of the request, outcome)."""

_MAX_TEXT = 512  # T5 tokens, of FluxPipeline
_WHOLE = {  # fields that are whole numbers, with the least and the greatest
    "height": (1, MOST_SIDE),
    "width": (1, MOST_SIDE),
    "seed": (0, 2**64 - 1),
    "max_sequence_length": (1, _MAX_TEXT),
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One picture to make. Every request of a batch may differ from the others in every field.

    Attributes:
        prompt: One text; a batch of several is several requests.
        height: In pixels.
        width: In pixels.
        seed: Of the noise, from 0 to 2^64 - 1; the same seed gives the picture that the pipeline makes with
            `torch.Generator().manual_seed(seed)`.
        preset: A name of `PRESETS` or a JiTConfig.
        steps: Overrides its number.
        negative_prompt: For true CFG, with a scale above 1.
        true_cfg_scale: Of true CFG.
        guidance_scale: Of models with embedded guidance.
        max_sequence_length: T5 tokens of the prompt.
    """

    prompt: str
    height: int = 1024
    width: int = 1024
    seed: int = 0
    preset: str | JiTConfig = "7x"
    steps: int | None = None
    negative_prompt: str | None = None
    true_cfg_scale: float = 1.0
    guidance_scale: float = 3.5
    max_sequence_length: int = 512

    @property
    def has_true_cfg(self) -> bool:
        """Whether an unguided branch runs beside the guided one."""
        return self.negative_prompt is not None and self.true_cfg_scale > 1

    def problems(self) -> list[str]:
        """Returns what is wrong with the fields, but for what `config` and the size of a pipeline's tokens say."""
        found = []
        for name in ("prompt", "negative_prompt"):
            value = getattr(self, name)
            if value is None and name == "negative_prompt":
                continue
            if not isinstance(value, str):
                found.append(f"{name} must be one text, got {value!r}; make a request of each")
            elif not _is_unicode(value):
                found.append(f"{name} must be text that UTF-8 can hold, got {value!r}; remove lone surrogates")
        for name, (least, most) in _WHOLE.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                found.append(
                    f"{name} must be a whole number from {least} to {most}, got {value!r}; "
                    f"leave it out for {type(self).__dataclass_fields__[name].default}"
                )
        for name in ("guidance_scale", "true_cfg_scale"):
            value = getattr(self, name)
            if not is_finite_number(value) or value < 0.0:
                found.append(
                    f"{name} must be a finite number, 0 or above, got {value!r}; "
                    f"leave it out for {type(self).__dataclass_fields__[name].default}"
                )
        return found

    def config(self) -> JiTConfig:
        """Returns what runs. Raises ConfigError for an unknown preset or a number of steps that skips a stage."""
        config = resolve(self.preset, **({} if self.steps is None else {"steps": self.steps}))
        if config.steps == "caller":
            raise ConfigError(
                "Request: steps must be a number where the preset leaves it to the caller, got None; give steps="
            )
        return config


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class Outcome:
    """What became of one request: a picture, or the error that it alone failed with."""

    request: Request
    error: Exception | None = None
    token_steps: int = 0
    _image: Any = field(default=None, repr=False)

    @property
    def image(self) -> Any:
        """The picture, PIL or latents (N, D) as asked for. Raises the request's error where it failed."""
        if self.error is not None:
            raise self.error
        return self._image


def generate_batch(
    target: Any,
    requests: Sequence[Request],
    *,
    execution: Mode = "auto",
    attention: Attention = "auto",
    strict: bool = False,
    output_type: OutputType = "pil",
    on_step: OnBatchStep | None = None,
    on_outcome: OnOutcome | None = None,
) -> list[Outcome]:
    """Returns one outcome for each request, in their order; all share each forward of the network.

    Requests may differ in size, text length, preset and hence stage. Outcome k is what request k gives alone, to
    rounding. A request that fails on its way (a velocity that is not finite, say) fails alone.

    Args:
        target: A diffusers `FluxPipeline` that is not patched.
        requests: Any number of them.
        execution: As in `apply`; "indexed" runs the requests' forwards one after the other, and outcome k is then what
            request k gives alone bit for bit.
        attention: As in `apply`.
        strict: As in `apply`.
        output_type: "pil", or "latent" for tokens (N, D).
        on_step: Called after each step of each request with the request's index, the steps done and the steps in all.
            An Exception that it raises ends that request alone and is its error: how a server drops one that nobody
            awaits.
        on_outcome: Called as soon as a request has its outcome, with the request's index; others may go on for long.

    Raises:
        ConfigError: With every request that cannot be run, by index, before any is run.
        UnsupportedModelError: For pipelines that cannot be accelerated correctly.
    """
    from .. import patches

    how = Execution(execution=execution, attention=attention, strict=strict)
    if output_type not in ("pil", "latent"):
        raise ConfigError(f'generate_batch: output_type must be one of pil, latent, got {output_type!r}; use "pil"')
    patch = patches.find(target)
    if patch.generate_batch is None:
        raise UnsupportedModelError(
            f"generate_batch: target must be a FluxPipeline, the one that packed execution knows, got "
            f"{type(target).__name__}; apply(pipeline), and call it with a list of prompts"
        )
    return list(patch.generate_batch(target, checked_requests(requests), how, output_type, on_step, on_outcome))


def checked_requests(requests: Sequence[Request]) -> list[tuple[Request, JiTConfig]]:
    """Returns the requests with their configurations. Raises ConfigError naming each that cannot be run, by index."""
    try:
        given = [*requests]
    except TypeError:
        raise ConfigError(
            f"generate_batch: requests must be a list of jitaccel.Request, got {type(requests).__name__}; "
            f"put it in a list"
        ) from None
    checked, problems = [], []
    for index, request in enumerate(given):
        where = f"generate_batch: requests[{index}]:"
        if not isinstance(request, Request):
            problems.append(f"{where} must be a jitaccel.Request, got {type(request).__name__}; build one")
            continue
        found = request.problems()
        try:
            checked.append((request, request.config()))
        except ConfigError as error:
            found.append(str(error))
        problems += [f"{where} {problem}" for problem in found]
    if problems:
        raise ConfigError("\n".join(problems))
    return checked
