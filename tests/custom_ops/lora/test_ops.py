"""The LoRA ops: against float64, in every shape, rank and stride; roundings; errors; fakes and symbolic sizes."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

import custom_ops
from tests.custom_ops.helpers import DEVICE, assert_same_bits, fake_mode, implementation
from tests.custom_ops.lora.cases import Batch, adapters, batches, exact_base, normal, singles

WHICH = ("reference", "triton")
FLOAT32 = 2.0**-24
SPLIT = (
    2.0**-15
)  # what is left of y when two bfloat16 values stand for it, and what is rounded beside
few = settings(max_examples=12)


def assert_within(out, exact, bound):
    info = torch.finfo(out.dtype)
    bad = ~((out.double() - exact).abs() <= bound + info.smallest_normal)
    assert not (bad & (exact.abs() < 0.9 * info.max) & (bound < info.max)).any()


def assert_expanded(out, base, delta, magnitude, slack=0.0):
    """base, then the low-rank product in float32, and one rounding. slack: what the base may be off by."""
    exact = base.double().reshape(delta.shape) + delta
    step = 0.51 * torch.finfo(out.dtype).eps * (exact.abs() + slack)
    assert_within(out.reshape(delta.shape), exact, step + SPLIT * magnitude + slack)


@pytest.mark.parametrize("which", WHICH)
@given(batch=batches())
@few
def test_shrink_against_float64(which, batch: Batch):
    y = implementation("lora_shrink", which)(*batch.shrink)
    exact, magnitude = batch.exact_shrink()
    assert y.dtype == torch.float32
    assert y.is_contiguous()
    assert_within(y, exact, (batch.x.shape[-1] + 4) * 4 * FLOAT32 * magnitude)
    assert not y[:, [slot < 0 for slot in batch.slots]].any()


@pytest.mark.parametrize("which", WHICH)
@given(batch=batches(), add=st.booleans())
@few
def test_expand_against_float64(which, batch: Batch, add: bool):
    y = batch.exact_shrink()[0].float()
    base = batch.base() if add else None
    tail = batch.scaling, batch.ranks, *batch.tensors
    out = implementation("lora_expand", which)(y, batch.b, base, *tail)
    delta, magnitude = batch.exact_expand(y.double(), y.double().abs())
    assert out.shape == (delta.shape if base is None else base.shape)
    assert_expanded(out, torch.zeros_like(out) if base is None else base, delta, magnitude)


@pytest.mark.parametrize("which", WHICH)
@given(batch=batches())
@few
def test_linear_and_add_against_float64(which, batch: Batch):
    out = implementation("lora_linear", which)(*batch.linear)
    delta, magnitude = batch.exact_expand(*batch.exact_shrink())
    exact, slack, _ = exact_base(batch)
    if DEVICE == "cpu":  # a BLAS for GPUs may round more: see test_gpu.py
        assert_expanded(out, exact, delta, magnitude, slack)
    base = batch.base()
    added = implementation("lora_add", which)(
        *(batch.x, base, batch.a, batch.b, batch.scaling, batch.ranks, *batch.tensors)
    )
    assert_expanded(added, base, delta, magnitude)
    idle = [slot < 0 or int(batch.ranks[slot]) == 0 for slot in batch.slots]
    columns = base.shape[-1]
    assert torch.equal(added.reshape(-1, columns)[idle], base.reshape(-1, columns)[idle])


@pytest.mark.parametrize("which", WHICH)
@given(call=singles())
@few
def test_single_against_float64(which, call):
    out = implementation("lora_linear_single", which)(*call.args)
    delta, magnitude = call.exact_delta()
    assert out.is_contiguous()
    eps = torch.finfo(out.dtype).eps
    # a 16-bit adapter is rounded after each of three steps; both round the result
    steps = 4 * eps if call.a.dtype == out.dtype else SPLIT
    if DEVICE == "cpu":  # a BLAS for GPUs may round more: see test_gpu.py
        exact, slack, _ = exact_base(call)
        bound = slack + steps * (magnitude + exact.abs()) + 0.51 * eps * (exact + delta).abs()
        assert_within(out, exact + delta, bound)
    base = torch.nn.functional.linear(call.x, call.weight, call.bias)
    added = implementation("lora_add_single", which)(call.x, base, call.a, call.b, call.scaling)
    wide = base.double()
    bound = steps * (magnitude + wide.abs()) + 0.51 * eps * (wide + delta).abs()
    assert_within(added, wide + delta, bound)


@pytest.mark.parametrize("which", WHICH)
@given(call=singles(), copies=st.integers(1, 3), tall=st.booleans())
@few
def test_halves_of_single_against_float64(which, call, copies, tall):
    """tall: the matrices of the layers differ in their row pitch too."""
    pitch = [
        torch.cat([call.a, call.a], 1)[:, : call.a.shape[1]] if tall and i else call.a
        for i in range(copies)
    ]
    y = implementation("lora_shrink_single", which)(call.x, pitch)
    x, a, b = call.x.double(), call.a.double(), call.b.double()
    magnitude = x.abs() @ a.abs().t()
    step = 0.51 * torch.finfo(y.dtype).eps
    assert y.is_contiguous()
    assert y.dtype == call.a.dtype
    for each in y:
        exact = x @ a.t()
        assert_within(each, exact, (x.shape[1] + 8) * 4 * FLOAT32 * magnitude + step * exact.abs())
    base = torch.nn.functional.linear(call.x, call.weight, call.bias)
    out = implementation("lora_expand_single", which)(y[0], base, call.b, call.scaling)
    delta = y[0].double() @ b.t() * call.scaling
    eps = torch.finfo(out.dtype).eps
    steps = 4 * eps if call.a.dtype == out.dtype else SPLIT
    magnitude = y[0].double().abs() @ b.abs().t() * abs(call.scaling)
    wide = base.double()
    bound = steps * (magnitude + wide.abs()) + 0.51 * eps * (wide + delta).abs()
    assert_within(out, wide + delta, bound)


@given(call=singles(integers=True))
@few
def test_every_rounding_of_peft_is_there(call):
    """Sums of small integers are exact in any order, so that only roundings can differ: and none does."""
    x, weight, bias, a, b, scaling = call.args
    base = torch.nn.functional.linear(x, weight, bias)
    eager = (
        base + torch.nn.functional.linear(torch.nn.functional.linear(x.to(a.dtype), a), b) * scaling
    )
    eager = eager.to(x.dtype).contiguous()
    for which in WHICH:
        assert_same_bits(implementation("lora_linear_single", which)(*call.args), eager)
        y = implementation("lora_shrink_single", which)(x, [a])[0]
        assert_same_bits(implementation("lora_expand_single", which)(y, base, b, scaling), eager)


def sample(dtype=torch.bfloat16, tokens=(2, 3), rank=8, widths=(16, 40)):
    """A call of each op: (name, arguments)."""
    count, channels, ranks = 6, 32, [rank, 3, 0]
    batch = custom_ops.LoRABatch(9, 3, device=DEVICE)
    batch.update([2, 0, -1, 1, 1, 0])
    a, b = adapters(20, ranks, rank, channels, list(widths), dtype)
    x = normal(1, (count, channels), dtype).reshape(*tokens, channels)
    weight, base = normal(2, (sum(widths), channels), dtype), normal(3, (count, sum(widths)), dtype)
    base = base.reshape(*tokens, sum(widths))
    scaling = normal(4, (3,), torch.float32)
    ranks = torch.tensor(ranks, dtype=torch.int32, device=DEVICE)
    y = normal(5, (len(widths), count, rank), torch.float32)
    single = a[0][0].clone(), normal(6, (sum(widths), rank), dtype)
    tail = scaling, ranks, *batch.tensors
    return {
        "lora_shrink": (x, a, ranks, *batch.tensors),
        "lora_expand": (y, b, base, *tail),
        "lora_add": (x, base, a, b, *tail),
        "lora_linear": (x, weight, weight[:, 0].clone(), a, b, *tail),
        "lora_linear_single": (x, weight, None, *single, 0.5),
        "lora_add_single": (x, base, single[0].float(), single[1].float(), 0.5),
        "lora_shrink_single": (x, [single[0], normal(7, single[0].shape, dtype)]),
        "lora_expand_single": (normal(8, (count, rank), dtype), base, single[1], 0.5),
    }


every_op = pytest.mark.parametrize("name", sample())


@every_op
def test_opcheck(name):
    checks = [
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    ]
    torch.library.opcheck(
        getattr(torch.ops.custom_ops, name).default, sample()[name], test_utils=checks
    )


@every_op
def test_fake_and_implementations_give_the_same_strides(name):
    args = sample()[name]
    with fake_mode() as fake:
        faked = getattr(custom_ops, name)(*fake(args))
    for which in WHICH:
        real = implementation(name, which)(*args)
        assert (real.shape, real.stride(), real.dtype) == (
            faked.shape,
            faked.stride(),
            faked.dtype,
        )


@every_op
def test_inputs_are_not_written_and_not_returned(name):
    args = sample()[name]
    before = pytree.tree_map_only(torch.Tensor, torch.clone, args)
    storages = {
        t.untyped_storage().data_ptr() for t in pytree.tree_leaves(args) if hasattr(t, "data_ptr")
    }
    for which in WHICH:
        out = implementation(name, which)(*args)
        assert out.untyped_storage().data_ptr() not in storages
        for old, new in zip(pytree.tree_leaves(before), pytree.tree_leaves(args), strict=True):
            assert old is new or not isinstance(old, torch.Tensor) or torch.equal(old, new)


@every_op
def test_symbolic_sizes_add_no_guard(name):
    """Neither the fake nor the choice of an implementation may ask a symbolic number of tokens anything."""
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    args = list(sample()[name])
    with mode:
        for index, value in enumerate(args):
            if isinstance(value, list):
                args[index] = [mode.from_tensor(t) for t in value]
            elif isinstance(value, torch.Tensor):
                # of x, base and y the tokens; the other arguments belong to the model
                given = {"lora_expand": (0, 2), "lora_expand_single": (0, 1)}
                tokens = given.get(name, (0, 1 if "add" in name else 0))
                dynamic = [DimDynamic.STATIC] * value.dim()
                if index in tokens:
                    where = (
                        [1] if value.dim() == 3 and index == 0 and name == "lora_expand" else [0, 1]
                    )
                    for dim in where[: value.dim() - 1]:
                        dynamic[dim] = DimDynamic.DYNAMIC
                context = StatelessSymbolicContext(dynamic_sizes=dynamic)
                args[index] = mode.from_tensor(value, symbolic_context=context)
        out = getattr(custom_ops, name)(*args)
        custom_ops.explain(name, *args)
    assert not env.guards
    assert out.dim() >= 2


def test_no_tokens():
    for name, args in sample().items():
        cut = list(args)
        if name == "lora_expand":
            cut[0], cut[2] = args[0][:, :0], args[2][:0]
        else:
            cut[0] = args[0][:0]
            if "add" in name or name == "lora_expand_single":
                cut[1] = args[1][:0]
        out = getattr(custom_ops, name)(*cut)
        assert out.numel() == 0


def bad_calls():
    """name -> (op, arguments, what the error says)."""
    good = sample()
    x, a, ranks, *tensors = good["lora_shrink"]
    _, weight, bias, _, b, scaling, *_ = good["lora_linear"]
    single = good["lora_linear_single"]

    def shrink(**changed):
        given = {
            "x": x,
            "a": a,
            "ranks": ranks,
            **dict(zip(("t", "s", "tiles"), tensors)),
            **changed,
        }
        return "lora_shrink", tuple(given.values())

    def linear(**changed):
        given = {
            "x": x,
            "w": weight,
            "bias": bias,
            "a": a,
            "b": b,
            "scaling": scaling,
            "ranks": ranks,
        }
        return "lora_linear", (*(given | changed).values(), *tensors)

    wide = torch.zeros(1, 257, 32, dtype=x.dtype, device=DEVICE)
    small = custom_ops.LoRABatch(5, 3, device=DEVICE)
    return {
        "x dtype": (*shrink(x=x.float()), "x.dtype is torch.float32; accepted: torch.bfloat16"),
        "a dtype": (
            *shrink(a=[t.half() for t in a]),
            r"a\[0\].dtype is torch.float16; accepted: torch.bfloat16",
        ),
        "a empty": (*shrink(a=[]), "a is empty; accepted: one tensor per slice"),
        "a channels": (
            *shrink(a=[t[..., :8].contiguous() for t in a]),
            r"a\[0\].shape is \(3, 8, 8\); accepted",
        ),
        "a strides": (
            *shrink(a=[t.transpose(1, 2).contiguous().transpose(1, 2) for t in a]),
            "accepted: contiguous",
        ),
        "slots differ": (
            *shrink(a=[a[0], a[1][:2]]),
            r"a\[1\] has 2 slots; accepted: 3, as a\[0\]",
        ),
        "rank": (*shrink(a=[wide], ranks=ranks[:1]), "the rank of a is 257; accepted: 1 to 256"),
        "ranks": (*shrink(ranks=ranks[:2]), r"ranks.shape is \(2,\); accepted: \[num_slots\]"),
        "ranks dtype": (
            *shrink(ranks=ranks.long()),
            "ranks.dtype is torch.int64; accepted: torch.int32",
        ),
        "tiles": (
            *shrink(tiles=tensors[2][0]),
            r"tiles.shape is .*; accepted: \[2, max_tiles, 4\]",
        ),
        "tokens": (
            *("lora_shrink", (x, a, ranks, *small.tensors)),
            "x has 6 tokens; accepted: up to 5, the max_tokens of the LoRABatch",
        ),
        "widths": (
            *linear(b=[b[0], b[0]]),
            "the widths of b are 32 in sum; accepted: 56, the rows of weight",
        ),
        "slices": (*linear(b=[b[0]]), "b has 1 slices; accepted: 2, as a"),
        "weight": (*linear(w=weight[:, :8]), r"weight.shape is \(56, 8\); accepted: \[N, H\]"),
        "bias": (*linear(bias=bias[:4]), r"bias.shape is \(4,\); accepted: \[N\]"),
        "scaling": (
            *linear(scaling=scaling.half()),
            "scaling.dtype is torch.float16; accepted: torch.float32",
        ),
        "single dtype": (
            *("lora_linear_single", (*single[:3], single[3].half(), *single[4:])),
            "a.dtype is torch.float16; accepted: torch.bfloat16, torch.float32",
        ),
        "single mixed": (
            *("lora_linear_single", (*single[:3], single[3].float(), *single[4:])),
            "b.dtype is torch.bfloat16; accepted: torch.float32",
        ),
        "single rank": (
            *("lora_linear_single", (*single[:3], single[3][:4], *single[4:])),
            r"b.shape is \(56, 8\); accepted: \[56, 4\]",
        ),
        "layers": (*("lora_shrink_single", (x, [])), "a is empty; accepted: one tensor per layer"),
        "ranks of layers": (
            *("lora_shrink_single", (x, [single[3], single[3][:4]])),
            r"a\[1\].shape is \(4, 32\); accepted: \[rank, H\] with the H of x and one rank",
        ),
        "y": (
            *(
                "lora_expand_single",
                (good["lora_expand_single"][0][:5], *good["lora_expand_single"][1:]),
            ),
            r"base.shape is \(2, 3, 56\); accepted: \[..., 56\] of 5 tokens",
        ),
        "base": (
            *("lora_add_single", (x, good["lora_add_single"][1][:1], *good["lora_add_single"][2:])),
            r"base.shape is \(1, 3, 56\); accepted: \(2, 3, 56\)",
        ),
    }


@pytest.mark.parametrize("case", bad_calls())
def test_errors_name_the_argument_and_are_the_same_in_fake_and_kernel(case):
    name, args, message = bad_calls()[case]
    op = getattr(custom_ops, name)
    with pytest.raises(ValueError, match=message) as real:
        op(*args)
    assert str(real.value).startswith(f"{name}: ")
    with fake_mode() as fake, pytest.raises(ValueError, match=re.escape(str(real.value))):
        op(*fake(args))


@every_op
def test_an_input_that_requires_grad_is_refused_in_grad_mode(name):
    args = sample()[name]
    first = args[0].detach().requires_grad_()
    with pytest.raises(RuntimeError, match=f"{name}: . requires grad.*without a derivative"):
        getattr(custom_ops, name)(first, *args[1:])


def test_a_row_has_the_same_bits_wherever_it_stands_in_a_batch():
    args = list(sample()["lora_linear"])
    x = args[0].reshape(6, -1)
    batch = custom_ops.LoRABatch(9, 3, device=DEVICE)
    triton = implementation("lora_linear", "triton")
    results = []
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4]):
        batch.update([[2, 0, -1, 1, 1, 0][i] for i in order])
        args[0], args[-3:] = x[order], batch.tensors
        out = triton(*args)
        results.append(torch.stack([out[order.index(i)] for i in range(6)]))
    assert_same_bits(results[0], results[1])


@pytest.mark.parametrize(("programs", "parts"), [(0, 1), (3, 2), (0, 4)])
@pytest.mark.parametrize("each", [True, False])
def test_the_fused_kernel(programs, parts, each):
    """What runs for many tokens where there is TMA: any number of tokens, splits of the shrink, ranks past a block."""
    from custom_ops.lora import launch

    dtype, count, channels, columns, rank = torch.bfloat16, 70, 96, 136, 72
    x, weight = normal(1, (count, channels), dtype), normal(2, (columns, channels), dtype)
    bias = normal(3, (columns,), dtype)
    a, b = normal(4, (rank, channels), dtype), normal(5, (columns, rank), dtype)
    y = launch.shrink(x, (a,), None, launch.ShrinkTile(16, 32, 2, 4, 2))
    tile = launch.LinearTile(64, 64, 32, 4, 2, programs=programs, parts=parts)
    out = launch.linear(x, weight, bias, y, b, 0.7, tile, each=each)
    base = torch.nn.functional.linear(x, weight, bias)
    exact = base.double() + x.double() @ a.double().t() @ b.double().t() * 0.7
    magnitude = x.double().abs() @ a.double().abs().t() @ b.double().abs().t()
    eps = torch.finfo(dtype).eps
    steps = 4 * eps if each else SPLIT
    assert_within(out, exact, steps * magnitude + eps * (base.double().abs() + exact.abs()))


def test_sums_are_added_in_order_and_rounded_once():
    from custom_ops.lora import launch

    y = normal(1, (3, 1, 70, 24), torch.float32)
    rounded = launch.round_sums(y, torch.bfloat16)
    assert_same_bits(rounded, ((y[0] + y[1]) + y[2]).to(torch.bfloat16))
    whole = y[:1].to(torch.bfloat16)
    assert launch.round_sums(whole, torch.bfloat16).data_ptr() == whole.data_ptr()
