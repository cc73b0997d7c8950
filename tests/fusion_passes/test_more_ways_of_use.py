"""A compiled model is copied, saved, nested, mapped and fed unusual tensors, as models are without the backend."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusion_passes
from fusion_passes.quantize import SCHEMES, quantize_
from tests.fusion_passes.helpers import random
from tests.fusion_passes.test_ways_of_use import NET, Net, assert_near, compiled, matches, net

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("references", "empty_caches", "fresh_reports"),
]


@pytest.fixture(autouse=True)
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_PASSES_ALLOW_REFERENCE", "1")


def saved(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("called", [False, True], ids=["before a call", "after a call"])
def test_copies_of_a_compiled_model(how: str, called: bool) -> None:
    model = compiled(net())
    with torch.no_grad():
        expected = net()(random(4, 128))
        if called:
            model(random(4, 128))
        other = COPIES[how](model)
        for weight in model.parameters():
            weight.zero_()
        assert_near(other(random(4, 128)), expected)
    assert matches()[-1] == NET


def test_a_compiled_model_in_a_compiled_model() -> None:
    model = net()
    expected = net()(random(4, 128))
    model.block = compiled(model.block)
    with torch.no_grad():
        assert_near(compiled(model)(random(4, 128)), expected.detach())
    assert matches() == [NET]


def test_mapped_over_a_batch() -> None:
    model = net()
    with torch.no_grad():
        mapped = compiled(lambda x: torch.func.vmap(lambda row: model(row))(x))(random(3, 4, 128))
        assert_near(mapped, model(random(3, 4, 128)))
    assert matches() == [NET]


@pytest.mark.parametrize("how", ["grad", "jvp"])
def test_derivatives_inside_are_left_as_they_are(how: str) -> None:
    model = net()

    def derivative(x: Tensor) -> Tensor:
        if how == "jvp":
            return torch.func.jvp(model, (x,), (x * 0.5,))[1]
        return torch.func.grad(lambda y: model(y).float().sum())(x)

    x = random(4, 128)
    assert_near(compiled(derivative)(x).detach(), derivative(x).detach(), 0.05)


def test_sizes_without_a_hint() -> None:
    model, run = (both := net()), compiled(both)
    with torch.no_grad():
        for count in (4, 1, 0, 9):
            x = random(count, 128)
            torch._dynamo.decorators.mark_unbacked(x, 0)
            actual, expected = run(x), model(random(count, 128))
            assert actual.shape == expected.shape
            if count:
                assert_near(actual, expected)
    assert matches() == [NET], "one graph for all"


STRIDED: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: random(128, 6).t(),
    "every other": lambda: random(6, 256)[:, ::2],
    "one row repeated": lambda: random(1, 128).expand(5, 128),
    "at an odd offset": lambda: random(4, 130)[:, 1:129],
}


@pytest.mark.parametrize("how", STRIDED)
def test_inputs_in_any_place_of_memory(how: str) -> None:
    model = net()
    with torch.no_grad():
        assert_near(compiled(model)(STRIDED[how]()), model(STRIDED[how]()))


def test_a_subclass_that_is_two_tensors() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model, x = net(), TwoTensor(random(4, 128), random(4, 128, seed=3))
    with torch.no_grad():
        expected, actual = model(x), compiled(model)(x)
    assert_near(actual.a, expected.a)
    assert_near(actual.b, expected.b)
    assert matches() == [{name: 2 * count for name, count in NET.items()}]


def _halve(x: Tensor) -> None:
    x.mul_(0.5)


@pytest.fixture
def writing() -> Iterator[Any]:
    """An operator of the user's that writes to its argument, which graphs hold in functional form."""
    library = torch.library.Library("ways_of_use", "FRAGMENT")
    library.define("halve_(Tensor(a!) x) -> ()")
    library.impl("halve_", _halve, "CompositeExplicitAutograd")
    yield torch.ops.ways_of_use.halve_
    library._destroy()


@pytest.mark.parametrize("where", ["an input", "a value", "a view"])
def test_an_operator_that_writes(writing: Any, where: str) -> None:
    model = net()

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        value = x if where == "an input" else model.block(x)
        writing(value[1:] if where == "a view" else value)
        return model(value), value

    ours, eager = random(4, 128), random(4, 128)
    with torch.no_grad():
        for actual, expected in zip(compiled(step)(ours), step(eager), strict=True):
            assert_near(actual, expected)
    assert_near(ours, eager)
    assert matches()[0].items() >= {"silu_mul": 1 if where == "an input" else 2}.items()


def test_weights_that_are_one() -> None:
    model = net()
    model.block.up.weight = model.block.gate.weight
    model.after.weight = model.block.before.weight
    with torch.no_grad():
        assert_near(compiled(model)(random(4, 128)), model(random(4, 128)))
        quantize_(model, "fp8_block")
        assert type(model.block.up) is nn.Linear, "its weight is another's, too"
        assert model.block.up.weight is model.block.gate.weight
        assert_near(compiled(model)(random(4, 128)), model(random(4, 128)), 0.1)
    assert matches()[0] == NET
    assert matches()[1]["block_scaled_linear"] == 2


@pytest.mark.parametrize("off", ["inductor", "autograd"])
def test_caches_of_graphs_on_and_off(off: str) -> None:
    """Without any, and with that of AOTAutograd, which finds the graph before our passes are asked."""
    config = (
        torch._inductor.config.patch(force_disable_caches=True)
        if off == "inductor"
        else torch._functorch.config.patch(enable_autograd_cache=True)
    )
    with config, torch.no_grad():
        for _ in range(2):
            torch.compiler.reset()
            model = net()
            assert_near(compiled(model)(random(4, 128)), model(random(4, 128)))
    assert matches() == [NET, NET]


def test_another_dtype_after_the_first_call() -> None:
    model, run = (both := quantize_(net(), "fp8_block")), compiled(both)
    with torch.no_grad():
        expected = run(random(4, 128))
        model.half()
        assert_near(run(random(4, 128).half()).bfloat16(), expected, 0.1)
    first, second = matches()
    assert first == second


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantized_model_that_is_saved(
    scheme: str, kind: str, assign: bool, tmp_path: Path
) -> None:
    """Loaded into a model of other weights, or onto one without any, it is the same bit for bit; and it fuses."""
    if kind == "safetensors":
        torch_files = pytest.importorskip("safetensors.torch", reason="needs the extra 'models'")
        save, load = torch_files.save_file, torch_files.load_file
    else:
        save, load = torch.save, lambda path: torch.load(path, weights_only=True)
    model = quantize_(net(), scheme)
    save(model.state_dict(), tmp_path / "weights")
    torch.manual_seed(9)
    with torch.device("meta" if assign else "cpu"):
        other = quantize_(Net().bfloat16().eval(), scheme)
    other.load_state_dict(load(tmp_path / "weights"), assign=assign)
    with torch.no_grad():
        expected = model(random(4, 128))
        assert torch.equal(other(random(4, 128)), expected)
        assert_near(compiled(other)(random(4, 128)), expected, 0.1)
    assert sum(fusion_passes.report().matches.values()) >= 4
