"""A model with slots: what its tokens see."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import custom_ops
from fusion_passes.lora import AdapterCacheFull, AdapterManager
from fusion_passes.quantize import Fp8BlockLinear
from tests.fusion_passes.lora.adapters import model
from tests.fusion_passes.lora.managers import SOURCES, assert_close, expected, managed, tokens

pytestmark = pytest.mark.usefixtures("references")


def test_adapters_of_these_tests_differ() -> None:
    ids = tokens(2, 5)
    outputs = [expected(name, ids) for name in (None, *SOURCES)]
    for index, output in enumerate(outputs):
        for other in outputs[:index]:
            assert (output - other).norm() > 0.3 * output.norm()


@given(
    names=st.lists(st.sampled_from((None, "__base__", *SOURCES)), min_size=1, max_size=6),
    length=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_each_row_sees_its_adapter(names: list[str | None], length: int, seed: int) -> None:
    manager, ids = managed(), tokens(len(names), length, seed)
    with torch.no_grad():
        actual = manager(ids, adapter_names=names)
        for row, name in enumerate(names):
            exact = expected(None if name == "__base__" else name, ids[row : row + 1])
            assert_close(actual[row : row + 1], exact)


@given(data=st.data(), resident=st.integers(1, 3))
def test_more_adapters_than_slots_take_turns(data: st.DataObject, resident: int) -> None:
    manager = managed(resident)
    with torch.no_grad():
        for _ in range(4):
            names = data.draw(
                st.lists(st.sampled_from(sorted(SOURCES)), min_size=1, max_size=resident)
            )
            ids = tokens(len(names), 2)
            actual = manager(ids, adapter_names=names)
            for row, name in enumerate(names):
                assert_close(actual[row : row + 1], expected(name, ids[row : row + 1]))


def test_requests_of_unequal_lengths_side_by_side() -> None:
    manager, ids = managed(), tokens(1, 9)
    with torch.no_grad(), manager.step(["wide", None, "small"], num_tokens=[2, 3, 4]):
        actual = manager.model(ids)
    bounds = ((0, 2, "wide"), (2, 5, None), (5, 9, "small"))  # no token looks at another here
    for start, end, name in bounds:
        assert_close(actual[:, start:end], expected(name, ids[:, start:end]))


def test_outside_of_a_step_the_model_is_the_base_model() -> None:
    manager, ids = managed(), tokens(2, 3)
    with torch.no_grad():
        base = model()(ids)
        assert_close(manager(ids), expected(None, ids))
        manager(ids, adapter_names=["wide", "two"])
        assert torch.equal(manager.model(ids), base)


def test_base_weights_and_their_names_stay() -> None:
    manager, base = managed(), model()
    own = {
        n.replace(".base_layer", "").replace(".original_module", ""): v
        for n, v in manager.model.state_dict().items()
    }
    assert own.keys() == base.state_dict().keys()
    assert all(torch.equal(value, own[name]) for name, value in base.state_dict().items())


def test_a_quantized_linear_keeps_its_own_forward() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            linear = nn.Linear(128, 128, dtype=torch.bfloat16)
            self.layers = nn.ModuleList([Fp8BlockLinear.from_linear(linear)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[0](x)

    torch.manual_seed(0)
    wide, x = Wide().eval(), torch.randn(1, 3, 128, dtype=torch.bfloat16)
    base = wide(x)
    a, b = torch.randn(4, 128) * 0.1, torch.randn(128, 4) * 0.1
    manager = AdapterManager(wide, max_loaded=1, max_resident=1, max_rank=16)
    manager.add(
        "a",
        (
            {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["layers.0"]},
            {"layers.0.lora_A.weight": a, "layers.0.lora_B.weight": b},
        ),
    )
    with torch.no_grad():
        actual = manager(x, adapter_names=["a"])
    delta = 2 * x.double() @ a.bfloat16().double().T @ b.bfloat16().double().T
    assert_close(actual, base.double() + delta)
    assert type(wide.layers[0].base_layer) is Fp8BlockLinear


class Looked(nn.Module):
    """An embedding that adapters may replace."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 32, dtype=torch.bfloat16)
        self.layers = nn.ModuleList([nn.Linear(32, 32, dtype=torch.bfloat16)])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.layers[0](self.embed(input_ids))


def test_an_embedding_to_save() -> None:
    torch.manual_seed(0)
    looked = Looked().eval().requires_grad_(False)
    weight, base = looked.layers[0].weight.double(), looked.embed.weight.double()
    bias = looked.layers[0].bias.double()
    table = torch.randn(7, 32)
    manager = AdapterManager(
        looked, max_loaded=2, max_resident=2, max_rank=16, modules_to_save=["embed"]
    )
    factors = {
        "layers.0.lora_A.weight": torch.zeros(1, 32),
        "layers.0.lora_B.weight": torch.zeros(32, 1),
    }
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["layers.0"]}
    manager.add("plain", (config, factors))
    manager.add("own", (config | {"modules_to_save": ["embed"]}, factors | {"embed.weight": table}))
    ids = torch.tensor([[0, 6], [6, 1], [3, 3]])
    actual = manager(ids, adapter_names=["plain", "own", None])
    rows = torch.stack([base[ids[0]], table.bfloat16().double()[ids[1]], base[ids[2]]])
    assert_close(actual, rows @ weight.T + bias)


def test_a_request_that_lives_many_steps() -> None:
    """With the persistent batch of custom_ops: slots are acquired once, the batch is written for each step."""
    manager, requests = managed(resident=2), None
    requests = custom_ops.RequestBatch(manager.batch)
    slots = {name: manager.acquire(name) for name in ("wide", "small")}
    requests.add("r0", slots["wide"], 3)
    requests.add("r1", slots["small"], 2)
    requests.commit()
    ids = tokens(1, 5)
    with torch.no_grad():
        actual = manager.model(ids)
    assert_close(actual[:, :3], expected("wide", ids[:, :3]))
    assert_close(actual[:, 3:], expected("small", ids[:, 3:]))
    with pytest.raises(AdapterCacheFull):
        manager.activate("two")
    for slot in slots.values():
        manager.release(slot)
    manager.activate("two")
