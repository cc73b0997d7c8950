"""The ways in which people call a compiled model: what works without the backend works with it, and is fused."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusion_passes
from fusion_passes.quantize import SCHEMES, quantize_
from tests.fusion_passes.helpers import random

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("references", "empty_caches", "fresh_reports"),
]

NET = {"add_rms_norm": 2, "silu_mul": 1, "rms_norm": 1}
HALVES = {"add_rms_norm": 1, "silu_mul": 1, "rms_norm": 2}


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (
            wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        ).type_as(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = Norm(128), Norm(128)
        self.q, self.gate, self.up, self.down = (nn.Linear(128, 128) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.q(self.before(x))
        y = self.between(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.after = Block(), Norm(128)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.block(x))


def net(dtype: torch.dtype = torch.bfloat16) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def compiled(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(fn, backend="fusion_passes", options={"fusions": "all", **options})


@pytest.fixture(autouse=True)
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_PASSES_ALLOW_REFERENCE", "1")  # threads see it too


def assert_near(actual: Tensor, expected: Tensor, most: float = 0.03) -> None:
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert float(error) < most


def matches() -> list[dict[str, int]]:
    return [report.matches for report in fusion_passes.reports()]


# --- around the model ------------------------------------------------------------------------------------------------


def doubled(model: Net) -> nn.Module:
    model.block.register_forward_hook(lambda module, args, out: out * 2)
    return model


def shifted(model: Net) -> nn.Module:
    model.after.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return model


def called_with(model: Net) -> Callable[[Tensor], Tensor]:
    weights = {name: weight * 1.1 for name, weight in model.named_parameters()}
    return lambda x: torch.func.functional_call(model, weights, (x,))


WRAPPED: dict[str, tuple[Callable[[Net], Callable[..., Any]], list[dict[str, int]]]] = {
    "as it is": (lambda model: model, [NET]),
    "data parallel": (nn.DataParallel, [NET]),
    "a hook on a block": (doubled, [HALVES]),
    "a hook before a norm": (shifted, [HALVES]),
    "functional_call": (called_with, [NET]),
    "exported": (lambda model: torch.export.export(model, (random(4, 128),)).module(), [NET]),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrapped(how: str) -> None:
    wrap, expected = WRAPPED[how]
    with torch.no_grad():
        model = wrap(net())
        assert_near(compiled(model)(random(4, 128)), model(random(4, 128)))
    assert matches() == expected


@pytest.mark.parametrize("options", [{"freezing": True}, {"cpp_wrapper": True}], ids=str)
@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_options_of_inductor_that_change_the_way_of_a_graph(
    options: dict[str, Any], scheme: str | None
) -> None:
    model = net() if scheme is None else quantize_(net(), scheme)
    with torch.no_grad():
        assert_near(compiled(model, **options)(random(4, 128)), model(random(4, 128)), 0.1)
    ((found,)) = matches()
    assert found == NET if scheme is None else found.get("silu_mul") is None and len(found) >= 4


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_a_package_ahead_of_time(scheme: str | None, tmp_path: Path) -> None:
    """As a program in C++ would load it, but that the ops have to be imported."""
    old = torch.__version__ < "2.13"
    if old and scheme in ("fp8_block", "fp8_token"):
        pytest.skip("needs torch 2.13: before, stock makes no package with float8 for a CPU")
    model = net() if scheme is None else quantize_(net(), scheme)
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=2, max=8)
        program = torch.export.export(model, (random(4, 128),), dynamic_shapes={"x": {0: batch}})
        path = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(tmp_path / "net.pt2"),
            inductor_configs=fusion_passes.inductor_options(fusions="all"),
        )
        loaded = torch._inductor.aoti_load_package(path)
        for count in (4, 7):
            assert_near(loaded(random(count, 128)), model(random(count, 128)), 0.1)
    (found,) = matches()
    assert found["add_rms_norm"] >= 1
    if old and scheme is not None:  # a dtype arrives as another one there
        assert found.keys() <= {"add_rms_norm", "rms_norm", "silu_mul", "shared_group_quant"}
        assert any("takes a dtype" in miss.reason for miss in fusion_passes.report().near_misses)
    else:
        assert len(found) >= 3


def test_module_compile() -> None:
    model = net()
    expected = model(random(4, 128))
    model.compile(backend="fusion_passes", fullgraph=True, options={"fusions": "all"})
    with torch.inference_mode():
        assert_near(model(random(4, 128)), expected.detach())
    assert matches() == [NET]


def test_trained_and_then_used() -> None:
    model = net()
    stock, run = copy.deepcopy(model), compiled(model)
    for call in (stock, run):
        call(random(4, 128)).float().pow(2).mean().backward()
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        assert_near(ours.grad, theirs.grad, 0.05)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
        assert_near(run(random(4, 128)), model(random(4, 128)))
    assert matches() == [{}, NET]
    assert "training graph" in fusion_passes.reports()[0].notes[0]


def test_autocast_of_float32_weights() -> None:
    """Norms stay in float32 there, where there is nothing to fuse; what is in 16 bits is fused."""
    model = net(torch.float32)
    x = random(4, 128).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert_near(compiled(model)(x), model(x))
    assert matches() == [{"silu_mul": 1}]
    assert {miss.fusion for miss in fusion_passes.report().near_misses} == {"rms_norm"}


def test_several_threads_compile_models_of_their_own() -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            torch.manual_seed(seed)
            model = Net().bfloat16().eval()
            with torch.no_grad():
                assert_near(compiled(model)(random(4, 128)), model(random(4, 128)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert NET in matches()


# --- inside of it ----------------------------------------------------------------------------------------------------


def test_a_cache_that_is_written_in_place() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()
            self.register_buffer("cache", torch.zeros(8, 128, dtype=torch.bfloat16))

        def forward(self, x: Tensor, place: Tensor) -> Tensor:
            self.cache[place] = self.inner(x)
            return F.silu(self.cache.sum(0)) * x

    model = Cached()
    stock, run = copy.deepcopy(model), compiled(model)
    with torch.no_grad():
        for index in range(3):
            place = torch.tensor([index])
            assert_near(
                run(random(1, 128, seed=index), place), stock(random(1, 128, seed=index), place)
            )
    assert_near(model.cache, stock.cache)


def test_an_input_that_is_written_in_place() -> None:
    block = net().block

    def step(x: Tensor) -> Tensor:
        x.add_(block(x))
        return F.silu(x) * x

    ours, eager = random(4, 128), random(4, 128)
    with torch.no_grad():
        assert_near(compiled(step)(ours), step(eager))
    assert_near(ours, eager)


def test_both_ways_of_a_condition_are_fused() -> None:
    block = net().block

    def either(x: Tensor, yes: Tensor) -> Tensor:
        return torch.cond(yes, lambda x: block(x), lambda x: F.silu(x) * x, (x,))

    run = compiled(either)
    with torch.no_grad():
        for yes in (True, False):
            assert_near(
                run(random(4, 128), torch.tensor(yes)), either(random(4, 128), torch.tensor(yes))
            )
    assert {"silu_mul": 1, "add_rms_norm": 1, "rms_norm": 1} in matches()
    assert {"silu_mul": 1} in matches()


def test_views_and_inputs_among_the_results() -> None:
    model = net()

    def several(x: Tensor) -> tuple[Tensor, ...]:
        y = model(x)
        return y, y[0], y.t(), x, y.view(-1)

    with torch.no_grad():
        for ours, eager in zip(
            compiled(several)(random(4, 128)), several(random(4, 128)), strict=True
        ):
            assert_near(ours, eager)
            assert ours.stride() == eager.stride()


def test_weights_that_are_loaded_between_calls() -> None:
    model, run = (both := quantize_(net(), "fp8_block")), compiled(both)
    torch.manual_seed(5)
    other = quantize_(Net().bfloat16().eval(), "fp8_block")
    with torch.no_grad():
        run(random(4, 128))
        model.load_state_dict(other.state_dict())
        assert_near(run(random(4, 128)), other(random(4, 128)), 0.1)
    assert len(matches()) == 1


@pytest.mark.parametrize("what", ["zero tokens", "float64", "meta"])
def test_inputs_that_nobody_thinks_of(what: str) -> None:
    model, x = net(), random(4, 128)
    if what == "zero tokens":
        x = random(0, 128)
    elif what == "float64":
        model, x = model.double(), x.double()
    else:
        model, x = model.to("meta"), x.to("meta")
    with torch.no_grad():
        expected, actual = model(x), compiled(model)(x)
    assert (actual.shape, actual.dtype, actual.device) == (
        expected.shape,
        expected.dtype,
        expected.device,
    )
    if what == "float64":
        assert_near(actual, expected)
