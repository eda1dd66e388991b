"""Many requests in one call, for servers: `jitaccel.generate_batch(pipe, [Request(...), ...])`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import ConfigError, UnsupportedModelError
from ..execution.options import Attention, Execution, Mode
from ..limits import MOST_SIDE, MOST_TEXT_TOKENS
from ..method.checks import is_finite_number
from ..method.config import JiTConfig
from ..method.presets import resolve
from .sound import Sound

OutputType = Literal["pil", "latent"]
OnBatchStep = Callable[[int, int, int], None]
"""Called after each step of each request: (index of the request, steps done, total steps)."""
OnOutcome = Callable[[int, "Outcome"], None]
"""Called as soon as a request finishes: (index of the request, outcome)."""

_WHOLE = {  # fields that are whole numbers, with their smallest and largest value
    "height": (1, MOST_SIDE),
    "width": (1, MOST_SIDE),
    "seed": (0, 2**64 - 1),
    "max_sequence_length": (1, MOST_TEXT_TOKENS),
}
_OF_THE_PIPELINE = ("height", "width", "true_cfg_scale", "guidance_scale", "max_sequence_length")  # when they are None


@dataclass(frozen=True, kw_only=True)
class Request:
    """One picture or video to make. Requests of a batch may differ in every field.

    A field that is None uses the default of the pipeline's call.

    Attributes:
        prompt: One text; for several texts, make several requests. None if `options` contains `prompt_embeds`.
        height: In pixels.
        width: In pixels.
        seed: Seed of the noise, from 0 to 2^64 - 1. Gives the same noise as passing
            `torch.Generator().manual_seed(seed)` to the pipeline.
        preset: A name of `PRESETS` or a JiTConfig.
        steps: Overrides the preset's number of steps.
        negative_prompt: For guidance that runs an unguided branch.
        true_cfg_scale: Scale of true CFG.
        guidance_scale: Scale of embedded guidance, or of CFG if the pipeline uses this name for it.
        max_sequence_length: Tokens of the prompt.
        options: Other arguments of the pipeline's call, such as `{"image": picture, "strength": 0.6}` or
            `{"num_frames": 81}`. On FLUX.1 such requests run one by one.
    """

    prompt: str | None
    height: int | None = 1024
    width: int | None = 1024
    seed: int = 0
    preset: str | JiTConfig = "7x"
    steps: int | None = None
    negative_prompt: str | None = None
    true_cfg_scale: float | None = None
    guidance_scale: float | None = None
    max_sequence_length: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def problems(self) -> list[str]:
        """Returns what is wrong with the fields; `config` and the pipeline check the rest."""
        found = []
        for name in ("prompt", "negative_prompt"):
            value = getattr(self, name)
            if value is None and (name == "negative_prompt" or self._has_embeddings()):
                continue
            if not isinstance(value, str):
                found.append(f"{name} must be one text, got {value!r}; make one request for each")
            elif not _is_unicode(value):
                found.append(f"{name} must be text that UTF-8 can hold, got {value!r}; remove lone surrogates")
        for name, (least, most) in _WHOLE.items():
            value = getattr(self, name)
            if value is None and name in _OF_THE_PIPELINE:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                default = type(self).__dataclass_fields__[name].default
                found.append(
                    f"{name} must be a whole number from {least} to {most}, got {value!r}; "
                    f"leave it out for {'the default of the pipeline' if default is None else default}"
                )
        for name in ("guidance_scale", "true_cfg_scale"):
            value = getattr(self, name)
            if value is not None and (not is_finite_number(value) or value < 0.0):
                found.append(
                    f"{name} must be a finite number, 0 or above, got {value!r}; "
                    f"leave it out for the default of the pipeline"
                )
        if not isinstance(self.options, Mapping) or not all(isinstance(name, str) for name in self.options):
            found.append(f'options must be a dict of arguments by name, got {self.options!r}; use {{"strength": 0.6}}')
        return found

    def _has_embeddings(self) -> bool:
        return isinstance(self.options, Mapping) and "prompt_embeds" in self.options

    def config(self, defaults: Mapping[str, Any] | None = None) -> JiTConfig:
        """Returns the configuration of this request.

        Args:
            defaults: Fields that the pipeline's model overrides in presets given by name.

        Raises:
            ConfigError: For an unknown preset, or a number of steps that skips a stage.
        """
        fields = {**(defaults or {})} if isinstance(self.preset, str) else {}
        if self.steps is not None:
            fields["steps"] = self.steps
        config = resolve(self.preset, **fields)
        if config.steps == "caller":
            raise ConfigError(
                "Request: steps must be a number if the preset leaves it to the caller, got None; give steps="
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
    """The result of one request: a picture, or the error with which it failed."""

    request: Request
    error: Exception | None = None
    token_steps: int = 0
    _image: Any = field(default=None, repr=False)
    _sound: Sound | None = field(default=None, repr=False)

    @property
    def image(self) -> Any:
        """The picture, list of video frames, or latents of the request. Raises its error if it failed.

        Latents of FLUX.1 are tokens (N, D); for other pipelines, they are the first item that the pipeline returns.
        """
        if self.error is not None:
            raise self.error
        return self._image

    @property
    def sound(self) -> Sound | None:
        """The sound of a video, None of models that make none. Raises the request's error where it failed."""
        if self.error is not None:
            raise self.error
        return self._sound


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
    """Runs several requests and returns one outcome for each, in order.

    On FLUX.1 all requests share each forward of the network; other pipelines run them one after the other. Requests may
    differ in size, text length and preset, and so in their stage. Each outcome equals that of the request alone, up to
    rounding. A request that fails while running (for example with a velocity that is not finite) does not affect the
    others.

    Args:
        target: A diffusers pipeline that `apply` accepts and that is not patched.
        requests: Any number of them.
        execution: As in `apply`. With "indexed", forwards of different requests run one after the other, and each
            outcome equals that of the request alone bit for bit.
        attention: As in `apply`.
        strict: As in `apply`. Requests that cannot share forwards raise, unless execution="indexed" asks for it.
        output_type: "pil" or "latent".
        on_step: Called after each step of each request with the request's index, the steps done and the total steps;
            not called by pipelines without `callback_on_step_end`. If it raises an Exception, that request ends with it
            as its error and the others continue, so a server can cancel a request nobody waits for.
        on_outcome: Called with a request's index and outcome as soon as it finishes; others may take much longer.

    Raises:
        ConfigError: If any request cannot be run, before any is run; the message lists all of them by index.
        UnsupportedModelError: For pipelines that cannot be accelerated correctly.
    """
    from .. import patches

    how = Execution(execution=execution, attention=attention, strict=strict)
    if output_type not in ("pil", "latent"):
        raise ConfigError(f'generate_batch: output_type must be one of pil, latent, got {output_type!r}; use "pil"')
    patch = patches.find(target)
    if patch.generate_batch is None:
        raise UnsupportedModelError(
            f"generate_batch: target must be a pipeline of diffusers, which encodes prompts and decodes, got "
            f"{type(target).__name__}; apply(target), and call it in your own loop"
        )
    defaults = {} if patch.defaults is None else patch.defaults(target)
    checked = checked_requests(requests, defaults)
    return list(patch.generate_batch(target, checked, how, output_type, on_step, on_outcome))


def checked_requests(
    requests: Sequence[Request], defaults: Mapping[str, Any] | None = None
) -> list[tuple[Request, JiTConfig]]:
    """Returns the requests with their configurations. Raises ConfigError listing, by index, all that cannot be run."""
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
            checked.append((request, request.config(defaults)))
        except ConfigError as error:
            found.append(str(error))
        problems += [f"{where} {problem}" for problem in found]
    if problems:
        raise ConfigError("\n".join(problems))
    return checked
