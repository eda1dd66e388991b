"""Our own stand-in for the parts of ComfyUI that jitaccel uses: names, signatures, order of calls; tiny networks.

ComfyUI is not on any package index. The stand-in was compared with its source by hand; docs/codebases.md names the
commit and the procedure.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class WrappersMP:
    OUTER_SAMPLE = "outer_sample"
    SAMPLER_SAMPLE = "sampler_sample"
    PREDICT_NOISE = "predict_noise"
    APPLY_MODEL = "apply_model"
    DIFFUSION_MODEL = "diffusion_model"


class WrapperExecutor:
    """Calls the wrappers of one kind from the outermost to the function itself."""

    def __init__(self, original: Callable[..., Any], class_obj: Any, wrappers: list[Any], place: int = 0) -> None:
        self.original, self.class_obj, self.wrappers, self.place = original, class_obj, list(wrappers), place

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inner = WrapperExecutor(self.original, self.class_obj, self.wrappers, self.place + 1)
        return inner.execute(*args, **kwargs)

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        if self.place == len(self.wrappers):
            return self.original(*args, **kwargs)
        return self.wrappers[self.place](self, *args, **kwargs)


def wrappers_of(kind: str, transformer_options: dict[str, Any]) -> list[Any]:
    by_key = transformer_options.get("wrappers", {}).get(kind, {})
    return [wrapper for several in by_key.values() for wrapper in several]


class CONST:
    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor) -> Tensor:
        return sigma * noise + (1.0 - sigma) * latent_image

    def calculate_denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        return x - output * sigma.view(-1, 1, 1, 1)


class ModelSampling(CONST):
    pass


class Flux(nn.Module):
    """A FLUX model whose blocks are replaced by the forward of `inner`, a diffusers transformer."""

    def __init__(self, inner: nn.Module, patch_size: int, channels: int, **params: Any) -> None:
        super().__init__()
        self.inner, self.patch_size = inner, patch_size
        self.out_channels = channels * patch_size**2
        self.params = SimpleNamespace(
            num_heads=2, hidden_size=32, depth=1, depth_single_blocks=1, context_in_dim=32, vec_in_dim=32,
            guidance_embed=True, mlp_ratio=3.0, **params,
        )  # fmt: skip
        self.stretches: list[Any] = []  # of references seen at level 0, as given in each call
        self.axes = 4 if params.get("global_modulation") else 3

    def forward_orig(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor | None,
        guidance: Tensor | None = None,
        control: Any = None,
        timestep_zero_index: list[list[int]] | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (theirs)
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        rows = []
        self.stretches.append((img.shape[1], timestep_zero_index))
        for k in range(len(img)):
            arguments: dict[str, Any] = {
                "hidden_states": img[k : k + 1], "img_ids": img_ids[k], "encoder_hidden_states": txt[k : k + 1],
                "txt_ids": txt_ids[k], "timestep": timesteps[k : k + 1],
                "guidance": None if guidance is None else guidance.expand(len(img))[k : k + 1],
            }  # fmt: skip
            if self.axes == 3:
                assert y is not None
                arguments["pooled_projections"] = y[k : k + 1]
            if control is not None:
                residuals = [torch.zeros_like(control["input"][0][:1]) if r is None else r for r in control["input"]]
                arguments["controlnet_block_samples"] = [r[k : k + 1] for r in residuals]
                if control.get("output"):
                    arguments["controlnet_single_block_samples"] = [r[k : k + 1] for r in control["output"]]
            if attn_mask is not None:
                own = attn_mask if attn_mask.ndim == 2 else attn_mask[k if len(attn_mask) > 1 else 0]
                arguments["joint_attention_kwargs"] = {"attention_mask": own[None, None]}
            rows.append(self.inner(**arguments, return_dict=False)[0])
        return torch.cat(rows)

    def process_img(self, x: Tensor, index: int = 0) -> tuple[Tensor, Tensor]:
        p = self.patch_size
        x = F.pad(x, (0, -x.shape[3] % p, 0, -x.shape[2] % p), mode="circular")
        height, width = x.shape[2] // p, x.shape[3] // p
        tokens = x.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        ids = torch.zeros(height, width, self.axes)
        ids[..., 0] = index
        ids[..., 1] = torch.arange(height)[:, None]
        ids[..., 2] = torch.arange(width)
        return tokens, ids.reshape(1, -1, self.axes).repeat(len(x), 1, 1)

    def forward(
        self, x: Tensor, timestep: Tensor, context: Tensor, y: Tensor | None = None, guidance: Tensor | None = None,
        ref_latents: Any = None, control: Any = None, transformer_options: dict[str, Any] = {}, **kwargs: Any,  # noqa: B006
    ) -> Tensor:  # fmt: skip
        wrappers = wrappers_of(WrappersMP.DIFFUSION_MODEL, transformer_options)
        executor = WrapperExecutor(self._forward, self, wrappers)
        return executor.execute(
            x, timestep, context, y, guidance, ref_latents, control, transformer_options, **kwargs
        )

    def _forward(
        self, x: Tensor, timestep: Tensor, context: Tensor, y: Any = None, guidance: Any = None,
        ref_latents: Any = None, control: Any = None, transformer_options: dict[str, Any] = {}, **kwargs: Any,  # noqa: B006
    ) -> Tensor:  # fmt: skip
        batch, _, height, width = x.shape
        p = self.patch_size
        img, img_ids = self.process_img(x)
        num_tokens = img.shape[1]
        for index, latents in enumerate(ref_latents or (), start=1):
            more, more_ids = self.process_img(latents.expand(batch, -1, -1, -1), index)
            img, img_ids = torch.cat([img, more], dim=1), torch.cat([img_ids, more_ids], dim=1)
        txt_ids = torch.zeros(batch, context.shape[1], self.axes)
        is_zero = kwargs.get("ref_latents_method") == "index_timestep_zero"
        out = self.forward_orig(
            img, img_ids, context, txt_ids, timestep, y, guidance, control,
            timestep_zero_index=[[num_tokens, img.shape[1]]] if is_zero else None,
            transformer_options=transformer_options, attn_mask=kwargs.get("attention_mask"),
        )[:, :num_tokens]  # fmt: skip
        grid = (-(-height // p), -(-width // p))
        parts = out.reshape(batch, *grid, -1, p, p).permute(0, 3, 1, 4, 2, 5)
        return parts.reshape(batch, -1, grid[0] * p, grid[1] * p)[:, :, :height, :width]


class Chroma(Flux):
    """A Chroma model, without pooled text and references."""

    def forward_orig(  # type: ignore[override]
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor,
        guidance: Tensor | None = None, control: Any = None, transformer_options: dict[str, Any] = {},  # noqa: B006
        attn_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        rows = [
            self.inner(img[k : k + 1], txt[k : k + 1], timesteps[k : k + 1], img_ids[k], txt_ids[k], return_dict=False)
            for k in range(len(img))
        ]
        return torch.cat([row for (row,) in rows])

    def _forward(  # type: ignore[override]
        self, x: Tensor, timestep: Tensor, context: Tensor, guidance: Any, control: Any = None,
        transformer_options: dict[str, Any] = {}, **kwargs: Any,  # noqa: B006
    ) -> Tensor:  # fmt: skip
        img, img_ids = self.process_img(x)
        txt_ids = torch.zeros(len(x), context.shape[1], 3)
        out = self.forward_orig(
            img, img_ids, context, txt_ids, timestep, guidance, control, transformer_options,
            attn_mask=kwargs.get("attention_mask"),
        )  # fmt: skip
        p, grid = self.patch_size, (x.shape[2] // self.patch_size, x.shape[3] // self.patch_size)
        parts = out.reshape(len(x), *grid, -1, p, p).permute(0, 3, 1, 4, 2, 5)
        return parts.reshape(len(x), -1, *x.shape[2:])

    def forward(  # type: ignore[override]
        self, x: Tensor, timestep: Tensor, context: Tensor, guidance: Any, control: Any = None,
        transformer_options: dict[str, Any] = {}, **kwargs: Any,  # noqa: B006
    ) -> Tensor:  # fmt: skip
        wrappers = wrappers_of(WrappersMP.DIFFUSION_MODEL, transformer_options)
        executor = WrapperExecutor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, guidance, control, transformer_options, **kwargs)


class BaseModel:
    """A model whose network computes in `dtype`; the sampler's state stays in float32."""

    def __init__(self, diffusion_model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        self.diffusion_model, self.model_sampling, self.dtype = diffusion_model, ModelSampling(), dtype

    def apply_model(self, x: Tensor, t: Tensor, c_concat: Tensor | None = None, **extra: Any) -> Tensor:
        inputs = x if c_concat is None else torch.cat([x, c_concat], dim=1)
        inputs, extra = inputs.to(self.dtype), {name: self._cast(value) for name, value in extra.items()}
        output = self.diffusion_model(inputs, t.float(), **extra).float()
        return self.model_sampling.calculate_denoised(t, output, x)

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) else value


class ModelPatcher:
    def __init__(self, model: BaseModel) -> None:
        self.model, self.wrappers, self.model_options = model, {}, {"transformer_options": {}}  # type: ignore[var-annotated]

    def clone(self) -> ModelPatcher:
        other = ModelPatcher(self.model)
        other.wrappers = {
            kind: {key: list(each) for key, each in by_key.items()} for kind, by_key in self.wrappers.items()
        }
        options = dict(self.model_options["transformer_options"])
        other.model_options = {**self.model_options, "transformer_options": options}
        return other

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def get_wrappers(self, kind: str, key: str) -> list[Any]:
        return self.wrappers.get(kind, {}).get(key, [])


def sample_euler(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any], callback: Any = None, s_churn: float = 0.0
) -> Tensor:
    ones = x.new_ones([len(x)])
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * ones, **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "denoised": denoised})
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def sample_heun(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any], callback: Any = None) -> Tensor:
    return sample_euler(model, x, sigmas, extra_args, callback)


class Inpaint:
    """Replaces the area outside a mask with the given picture at the step's level, in the state and in the result."""

    def __init__(self, guider: Any, noise: Tensor, latent_image: Tensor) -> None:
        self.guider, self.noise, self.latent_image = guider, noise, latent_image

    def __call__(self, x: Tensor, sigma: Tensor, denoise_mask: Tensor | None, model_options: Any, seed: Any) -> Tensor:
        if denoise_mask is None:
            return self.guider(x, sigma, model_options=model_options, seed=seed)
        level = sigma.view(-1, 1, 1, 1)
        known = level * self.noise + (1.0 - level) * self.latent_image
        x = x * denoise_mask + known * (1.0 - denoise_mask)
        out = self.guider(x, sigma, model_options=model_options, seed=seed)
        return out * denoise_mask + self.latent_image * (1.0 - denoise_mask)


class KSAMPLER:
    def __init__(self, sampler_function: Any = sample_euler, extra_options: dict[str, Any] | None = None) -> None:
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}

    def sample(
        self, guider: Any, sigmas: Tensor, extra_args: dict[str, Any], callback: Any, noise: Tensor,
        latent_image: Tensor, denoise_mask: Tensor | None = None, disable_pbar: bool = False,
    ) -> Tensor:  # fmt: skip
        extra_args["denoise_mask"] = denoise_mask
        x = guider.inner_model.model_sampling.noise_scaling(sigmas[0], noise, latent_image)
        model = Inpaint(guider, noise, latent_image)
        return self.sampler_function(model, x, sigmas, extra_args, callback, **self.extra_options)


class CFGGuider:
    """A guider. `conds` has lists of further arguments of `apply_model` by name; `in_turn` runs one branch per call."""

    def __init__(self, patcher: ModelPatcher, conds: dict[str, Any], cfg: float = 1.0, in_turn: bool = False) -> None:
        self.model_patcher, self.conds, self.cfg, self.in_turn = patcher, conds, cfg, in_turn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        executor = WrapperExecutor(self.predict_noise, self, self._wrappers(WrappersMP.PREDICT_NOISE))
        return executor.execute(*args, kwargs["model_options"], kwargs["seed"])

    def _wrappers(self, kind: str) -> list[Any]:
        return wrappers_of(kind, self.model_options["transformer_options"])

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any = None, seed: Any = None) -> Tensor:
        branches = [*self.conds["positive"], *(self.conds.get("negative", []) if self.cfg != 1.0 else [])]
        out = []
        for group in [[branch] for branch in branches] if self.in_turn else [branches]:
            names = {name for branch in group for name in branch if name not in ("area", "model_conds")}
            count, extra = len(group), {}
            for name in names:
                values = [branch[name] for branch in group]
                is_tensor = isinstance(values[0], Tensor) and values[0].ndim > 1
                extra[name] = torch.cat([v.expand(len(x), *v.shape[1:]) for v in values]) if is_tensor else values[0]
            options = {
                **model_options["transformer_options"], "cond_or_uncond": [*range(count)], "sigmas": timestep,
            }  # fmt: skip
            many = self.inner_model.apply_model(
                x.repeat(count, 1, 1, 1), timestep.repeat(count), transformer_options=options, **extra
            )
            out += many.chunk(count)
        return out[0] if len(out) == 1 else out[1] + (out[0] - out[1]) * self.cfg

    def sample(
        self, noise: Tensor, sampler: KSAMPLER, sigmas: Tensor, latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None, callback: Any = None, **model_options: Any,
    ) -> Tensor:  # fmt: skip
        self.inner_model = self.model_patcher.model
        transformer_options = {"wrappers": self.model_patcher.wrappers, "sample_sigmas": sigmas}
        self.model_options = {"transformer_options": transformer_options, **model_options}
        extra_args = {"model_options": self.model_options, "seed": 0}
        executor = WrapperExecutor(sampler.sample, sampler, self._wrappers(WrappersMP.SAMPLER_SAMPLE))
        latent_image = torch.zeros_like(noise) if latent_image is None else latent_image
        with torch.no_grad():
            return executor.execute(self, sigmas, extra_args, callback, noise, latent_image, denoise_mask, True)


def install(patch: pytest.MonkeyPatch) -> None:
    """Makes `import comfy.patcher_extension` find this stand-in, with classes whose module is ComfyUI's."""
    package, extension = ModuleType("comfy"), ModuleType("comfy.patcher_extension")
    extension.WrappersMP = WrappersMP  # type: ignore[attr-defined]
    package.patcher_extension = extension  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "comfy", package)
    patch.setitem(sys.modules, "comfy.patcher_extension", extension)
    patch.setattr(ModelPatcher, "__module__", "comfy.model_patcher")
