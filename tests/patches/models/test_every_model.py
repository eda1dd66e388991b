"""Properties of every cut model, on tiny random weights; data is in patches/models, cases in tests/support."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jitaccel.errors import UnsupportedModelError
from jitaccel.patches.cutting import Cut, Places, places_of
from jitaccel.patches.models import MODELS, model_of
from jitaccel.patches.models.model import Model
from tests.support.every_model import CASES, Case, region, row_of
from tests.support.tiny import offload_groups, relative_error

ROUNDING = 1e-5  # other orders of the same sums
SHARE = 0.35


class Subject:
    """A model, its data, and calls of it."""

    def __init__(self, case: Case) -> None:
        self.case, self.module = case, case.make()
        found = model_of(self.module)
        assert found is not None
        self.model: Model = found
        self.layout = found.layout(self.module.config)
        self.num_tokens = torch.Size(case.grid).numel()
        self.cut = Cut(self.module, found.adapter)

    def call(self, batch: int = 1) -> dict[str, Any]:
        return self.case.call(self.case.grid, batch)

    def plain(self, call: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            out = self.module(**self.model.words.write(call), return_dict=False)[0]
        return self.model.words.tensor(out)

    def at(self, places: Places | None, call: dict[str, Any], run: Any = None) -> Tensor:
        """Returns the model's output of a call cut to places."""
        given = call if places is None else self.cut.arguments(call, places)
        with torch.no_grad(), self.cut.at(places):
            out = (self.module if run is None else run)(**self.model.words.write(given), return_dict=False)[0]
        return self.model.words.tensor(out)

    def tokens(self, out: Tensor) -> Tensor:
        return self.layout.to_tokens(out)[:, : self.num_tokens]

    def some(self, seed: int, batch: int = 1) -> Tensor:
        """Returns random anchors (batch, M), sorted, others for each image; those that are given are among them."""
        generator, given = torch.Generator().manual_seed(seed), self.case.num_given
        count = int(SHARE * (self.num_tokens - given))
        picked = [given + torch.randperm(self.num_tokens - given, generator=generator)[:count] for _ in range(batch)]
        return torch.cat([torch.arange(given).expand(batch, -1), torch.stack(picked).sort(dim=1).values], dim=1)


@pytest.fixture(params=CASES)
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(CASES[request.param])


def hooks_of(module: nn.Module) -> list[Any]:
    return [hook for part in module.modules() for hook in (*part._forward_hooks, *part._forward_pre_hooks)]


def test_every_model_has_a_case() -> None:
    assert {model.name for model in MODELS} <= {name.partition(",")[0] for name in CASES}


def test_grid_and_level_are_read_off_the_call(subject: Subject) -> None:
    call = subject.call(batch=2)
    assert subject.model.grid(subject.module.config, call) == subject.case.grid
    assert len(subject.case.grid) == 2 or subject.model.frames is not None
    assert subject.model.noise_level(call) == pytest.approx(0.7)
    assert subject.tokens(subject.plain(call)).shape[:2] == (2, subject.num_tokens)


def test_cut_names_the_places_at_which_diffusers_splits_tokens_over_devices(subject: Subject) -> None:
    plan = getattr(subject.module, "_cp_plan", None)
    if plan is None:
        pytest.skip("diffusers splits nothing of this model")
    adapter, size = subject.model.adapter, subject.num_tokens
    places = places_of(torch.arange(5)[None], size)
    for name, entry in plan.items():
        if name in ("rope", "pos_embed"):
            # One entry for each table of the output; text tables are split there and stay whole here.
            split = [entry[index] for index in sorted(entry)]
            tables = tuple(
                torch.zeros([1] * at.split_dim + [size] + [1] * (at.expected_dims - at.split_dim - 1)) for at in split
            )
            cut = adapter.outputs[name](tables, places)
            assert cut[0].shape[split[0].split_dim] == 5
        elif name == "proj_out":
            assert adapter.outputs[name](torch.zeros(1, 5, 2), places).shape[entry.gather_dim] == size
        elif name == "":
            # What its own submodules make tokens of, and text, are split before and cut after.
            made = {"hidden_states", "encoder_hidden_states", "encoder_attention_mask"}
            assert set(entry) - made <= set(adapter.arguments)


def test_installed_cut_changes_no_bit_of_a_dense_call(subject: Subject) -> None:
    call = subject.call(batch=2)
    plain = subject.plain(call)
    subject.cut.install()
    assert torch.equal(subject.plain(call), plain) and torch.equal(subject.at(None, call), plain)


def test_all_tokens_through_the_cut_are_the_models_bits(subject: Subject) -> None:
    call = subject.call(batch=2)
    everything = torch.arange(subject.num_tokens).expand(2, -1)
    assert torch.equal(subject.at(places_of(everything, subject.num_tokens), call), subject.plain(call))


def test_order_of_the_tokens_does_not_matter(subject: Subject) -> None:
    call, given = subject.call(), subject.case.num_given
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randperm(count, generator=generator) for count in (given, subject.num_tokens - given)]
    order = torch.cat([parts[0], given + parts[1]])[None]
    got = subject.at(places_of(order, subject.num_tokens), call)
    assert relative_error(got, subject.plain(call)) < ROUNDING


def test_sub_rectangle_is_the_model_on_cropped_latents(subject: Subject) -> None:
    case = subject.case
    if case.small is None:
        pytest.skip("positions of the text depend on the size")
    call, at = subject.call(), region(case)
    got = subject.tokens(subject.at(places_of(at[None], subject.num_tokens), call))
    cropped = subject.layout.to_tokens(subject.plain(case.crop(call, case.grid, case.small)))
    assert torch.equal(got[:, at], cropped[:, : len(at)])


def test_other_tokens_are_zero_and_do_not_reach_the_anchors(subject: Subject) -> None:
    call, anchors = subject.call(), subject.some(1)
    places = places_of(anchors, subject.num_tokens)
    got = subject.tokens(subject.at(places, call))
    inactive = torch.ones(subject.num_tokens, dtype=torch.bool).index_fill(0, anchors[0], False)
    assert got.isfinite().all() and not got[:, inactive].any()
    state = subject.layout.generated(
        call["hidden_states"], subject.num_tokens, subject.model.channels(subject.module.config)
    )
    tokens = subject.layout.to_tokens(state).clone()
    tokens[:, inactive] += 1.0
    other = subject.layout.put_generated(subject.layout.to_latents(tokens, like=state), call["hidden_states"])
    again = subject.tokens(subject.at(places, {**call, "hidden_states": other}))
    assert torch.equal(again, got)
    assert relative_error(subject.tokens(subject.plain({**call, "hidden_states": other})), got) > 1e-2


def test_images_may_have_anchors_of_their_own(subject: Subject) -> None:
    call, anchors = subject.call(batch=2), subject.some(2, batch=2)
    places = places_of(anchors, subject.num_tokens)
    if subject.model.adapter.has_one_table:
        with pytest.raises(ValueError, match="call the model image by image"):
            subject.at(places, call)
        return
    together = subject.at(places, call)
    for image in range(2):
        alone = subject.at(places_of(anchors[image : image + 1], subject.num_tokens), row_of(call, image))
        assert relative_error(together[image : image + 1], alone) < ROUNDING


def test_removal_leaves_no_hook_and_no_changed_bit(subject: Subject) -> None:
    call = subject.call()
    plain, before = subject.plain(call), hooks_of(subject.module)
    subject.at(places_of(subject.some(3), subject.num_tokens), call)
    assert len(hooks_of(subject.module)) > len(before)
    subject.cut.remove()
    subject.cut.remove()
    assert hooks_of(subject.module) == before and torch.equal(subject.plain(call), plain)


def test_failed_forward_leaves_the_next_dense(subject: Subject) -> None:
    call = subject.call()
    plain, places = subject.plain(call), places_of(subject.some(3), subject.num_tokens)
    with pytest.raises(ZeroDivisionError), subject.cut.at(places):
        raise ZeroDivisionError
    assert torch.equal(subject.plain(call), plain)


def test_stage_is_one_graph_for_any_anchors_of_a_number(subject: Subject) -> None:
    if not subject.case.is_one_graph:
        pytest.skip("the model does not trace whole, unpatched either")
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(subject.module, backend=backend, fullgraph=True, dynamic=False)
    call = subject.call()
    for seed in (4, 5):
        places = places_of(subject.some(seed), subject.num_tokens)
        assert torch.equal(subject.at(places, call, compiled), subject.at(places, call))
        assert len(graphs) == 1
    more = places_of(torch.arange(subject.num_tokens - 3)[None], subject.num_tokens)
    assert torch.equal(subject.at(more, call, compiled), subject.at(more, call))
    assert len(graphs) == 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters_of_weights_are_cut_as_well(subject: Subject, when: str) -> None:
    from peft import LoraConfig

    names = [name for name, part in subject.module.named_modules() if isinstance(part, nn.Linear)]
    cut = [name for name in subject.model.adapter.outputs if name in names]
    targets = [*cut, *(name for name in names if name.endswith(("to_q", "to_v")))]
    lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    call, places = subject.call(), places_of(subject.some(6), subject.num_tokens)
    plain, sparse = subject.plain(call), subject.at(places, call)
    if when == "before":
        subject.cut.remove()
    subject.module.add_adapter(lora)
    everything = places_of(torch.arange(subject.num_tokens)[None], subject.num_tokens)
    assert torch.equal(subject.at(everything, call), subject.plain(call))
    assert not torch.equal(subject.plain(call), plain)
    with_adapter = subject.at(places, call)
    assert with_adapter.shape == sparse.shape and not torch.equal(with_adapter, sparse)
    assert torch.equal(with_adapter == 0, sparse == 0)


@pytest.mark.parametrize("when", ["before", "after"])
def test_groups_may_be_offloaded(subject: Subject, when: str) -> None:
    call, places = subject.call(), places_of(subject.some(6), subject.num_tokens)
    expected = subject.at(places, call)
    if when == "before":
        subject.cut.remove()
    offload_groups(subject.module, "leaf_level")
    assert torch.equal(subject.at(places, call), expected)


def test_formula_counts_what_torch_counts_between_numbers_of_tokens(subject: Subject) -> None:
    if subject.model.cost is None:
        pytest.skip("torch counts the model's operations itself")
    if subject.model.fill(subject.module.config, subject.case.grid):
        pytest.skip("the model fills every picture up to as many tokens; test_hidream.py counts them")
    *frames, height, width = subject.case.grid
    grids, counted, expected = [subject.case.grid, (*frames, height // 2, width // 2)], [], []
    for grid in grids:
        call = {
            name: torch.ones_like(value) if name.startswith("encoder_attention_mask") else value
            for name, value in subject.case.call(grid, 1).items()
        }
        # Torch does not count the CPU's fused attention.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            subject.plain(call)
        counted.append(counter.get_total_flops())
        tokens = torch.Size(grid).numel()
        expected.append(subject.model.cost(subject.module.config, tokens, subject.model.num_text(call)))
    assert counted[0] - counted[1] == expected[0] - expected[1] > 0


def test_model_without_the_named_places_is_refused(subject: Subject) -> None:
    outputs = {**subject.model.adapter.outputs, "not_there": next(iter(subject.model.adapter.outputs.values()))}
    with pytest.raises(UnsupportedModelError, match="must have a submodule 'not_there', got none in"):
        Cut(subject.module, dataclasses.replace(subject.model.adapter, outputs=outputs))
