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
"""Called after each step of each request: (index of the request, steps done, steps in all)."""
OnOutcome = Callable[[int, "Outcome"], None]
"""Called as soon as a request has its outcome: (index of the request, outcome)."""

_WHOLE = {  # fields that are whole numbers, with the least and the greatest
    "height": (1, MOST_SIDE),
    "width": (1, MOST_SIDE),
    "seed": (0, 2**64 - 1),
    "max_sequence_length": (1, MOST_TEXT_TOKENS),
}
_OF_THE_PIPELINE = ("height", "width", "true_cfg_scale", "guidance_scale", "max_sequence_length")  # where they are None


@dataclass(frozen=True, kw_only=True)
class Request:
    """One picture or video to make. Every request of a batch may differ from the others in every field.

    What is None is as the pipeline's call has it by default.

    Attributes:
        prompt: One text; a batch of several is several requests. None where `options` bring `prompt_embeds`.
        height: In pixels.
        width: In pixels.
        seed: Of the noise, from 0 to 2^64 - 1; the same seed gives the picture that the pipeline makes with
            `torch.Generator().manual_seed(seed)`.
        preset: A name of `PRESETS` or a JiTConfig.
        steps: Overrides its number.
        negative_prompt: For guidance that runs an unguided branch.
        true_cfg_scale: Of true CFG.
        guidance_scale: Of embedded guidance, or of CFG where the pipeline calls it so.
        max_sequence_length: Tokens of the prompt.
        options: What else the pipeline's call takes, by name: `{"image": picture, "strength": 0.6}`,
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
        """Returns what is wrong with the fields, but for what `config` and a pipeline say."""
        found = []
        for name in ("prompt", "negative_prompt"):
            value = getattr(self, name)
            if value is None and (name == "negative_prompt" or self._has_embeddings()):
                continue
            if not isinstance(value, str):
                found.append(f"{name} must be one text, got {value!r}; make a request of each")
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
        """Returns what runs.

        Args:
            defaults: Fields that the pipeline's model has in presets given by name.

        Raises:
            ConfigError: For an unknown preset or a number of steps that skips a stage.
        """
        fields = {**(defaults or {})} if isinstance(self.preset, str) else {}
        if self.steps is not None:
            fields["steps"] = self.steps
        config = resolve(self.preset, **fields)
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
    _sound: Sound | None = field(default=None, repr=False)

    @property
    def image(self) -> Any:
        """The picture, a video's list of frames, or latents, as asked for. Raises the request's error where it failed.

        Latents of FLUX.1 are tokens (N, D), those of other pipelines the first of what the pipeline returns.
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
    """Returns one outcome for each request, in their order.

    On FLUX.1 all share each forward of the network; other pipelines make one request after the other. Requests may
    differ in size, text length, preset and hence stage. Outcome k is what request k gives alone, to rounding. A request
    that fails on its way (a velocity that is not finite, say) fails alone.

    Args:
        target: A diffusers pipeline that `apply` takes, and that is not patched.
        requests: Any number of them.
        execution: As in `apply`; "indexed" runs the requests' forwards one after the other, and outcome k is then what
            request k gives alone bit for bit.
        attention: As in `apply`.
        strict: As in `apply`: requests that could not share forwards raise, unless execution="indexed" asks for it.
        output_type: "pil" or "latent".
        on_step: Called after each step of each request with the request's index, the steps done and the steps in all;
            not by pipelines without `callback_on_step_end`. An Exception that it raises ends that request alone and is
            its error: how a server drops one that nobody awaits.
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
            f"generate_batch: target must be a pipeline of diffusers, which encodes prompts and decodes, got "
            f"{type(target).__name__}; apply(target), and call it in your own loop"
        )
    defaults = {} if patch.defaults is None else patch.defaults(target)
    checked = checked_requests(requests, defaults)
    return list(patch.generate_batch(target, checked, how, output_type, on_step, on_outcome))


def checked_requests(
    requests: Sequence[Request], defaults: Mapping[str, Any] | None = None
) -> list[tuple[Request, JiTConfig]]:
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
            checked.append((request, request.config(defaults)))
        except ConfigError as error:
            found.append(str(error))
        problems += [f"{where} {problem}" for problem in found]
    if problems:
        raise ConfigError("\n".join(problems))
    return checked
