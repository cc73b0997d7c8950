"""What holds for every routing and index op, as for the ops of tests/custom_ops/test_contract.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

import custom_ops
from tests.custom_ops.helpers import (
    DEVICE,
    assert_same_bits,
    bf16,
    fake_mode,
    implementation,
    outputs,
)
from tests.custom_ops.schemes import kernel

# Which outputs hold what memory held, and where they do not: by the rows of the last int32 output but one.
UNWRITTEN = {"moe_permute": (0,), "moe_permute_group_quant": (0, 1)}


def samples(device: str = "cpu", tokens: int = 5) -> list:
    """(op name, args, kwargs): a call of every routing and index op, in the forms that it has."""
    torch.manual_seed(tokens)
    logits = torch.randn(tokens, 16, device=device)
    bias = torch.randn(16, device=device)
    x = bf16(tokens, 512, device=device)[:, 128:384]
    ids = torch.rand(tokens, 16, device=device).argsort(-1)[:, :4]
    table = torch.arange(-4, 12, dtype=torch.int32, device=device).clamp(min=-1)
    rows = bf16(4 * tokens, 256, device=device)
    index = torch.arange(4 * tokens, dtype=torch.int32, device=device).flip(0)
    weights = torch.rand(tokens, 4, device=device)
    here = {"expert_map": table}
    return [
        ("topk_softmax", (logits, 4), {"renormalize": True}),
        ("topk_softmax", (logits.bfloat16(), 2), {"softmax_first": False, "dtype": torch.bfloat16}),
        ("topk_sigmoid", (logits, 4), {"correction_bias": bias, "scale": 2.5}),
        ("topk_sigmoid", (logits.half(), 3), {"by_logits": True, "rounded": True}),
        ("grouped_topk", (logits, 4, 4, 2), {"correction_bias": bias, "renormalize_eps": 1e-20}),
        ("grouped_topk", (logits, 4, 4, 2), {"scoring": "softmax", "group_score": "max"}),
        ("moe_align_block_size", (ids, 16, 16), {}),
        ("moe_align_block_size", (ids.int(), 4, 12), here),
        ("moe_permute", (x, ids, 16), {}),
        ("moe_permute", (x, ids, 12), {"align": 8, **here}),
        ("moe_permute_group_quant", (x, ids, 16, 128), {}),
        (
            "moe_permute_group_quant",
            (x, ids, 12, 64),
            {"align": 128, "scale_layout": "column_major_tma", **here},
        ),
        ("moe_unpermute", (rows, index, weights), {}),
        ("moe_unpermute", (rows, index, weights.bfloat16()), {}),
        ("moe_reduce", (rows, weights), {}),
        ("moe_reduce", (rows, weights), {"topk_ids": ids, "num_experts": 12, **here}),
    ]


IDS = [f"{i}-{name}" for i, (name, _, _) in enumerate(samples())]
every_sample = pytest.mark.parametrize("index", range(len(IDS)), ids=IDS)


def op_of(name: str):
    return getattr(torch.ops.custom_ops, name).default


def assert_same_written(name: str, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """The same bits, in those rows that are written."""
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        if i in UNWRITTEN.get(name, ()):
            a, b = a[got[-2] >= 0], b[want[-2] >= 0]
        if a.is_floating_point():
            assert_same_bits(a, b)
        else:
            assert torch.equal(a, b)


@every_sample
def test_opcheck(index):
    name, args, kwargs = samples(DEVICE)[index]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if name not in UNWRITTEN:  # which compares memory that nothing has written
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(op_of(name), args, kwargs, test_utils=checks)


@every_sample
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_fake_and_implementations_give_the_same_strides(index, tokens):
    name, args, kwargs = samples(DEVICE, tokens)[index]
    real = outputs(op_of(name)(*args, **kwargs))
    with fake_mode() as fake:
        faked = outputs(op_of(name)(*fake(args), **fake(kwargs)))
    for r, f in zip(real, faked, strict=True):
        assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)
    for which in (i.name for i in custom_ops.ops()[name].implementations):
        if which == "cuda":
            continue
        for r, t in zip(real, outputs(implementation(name, which)(*args, **kwargs)), strict=True):
            assert (r.shape, r.stride(), r.dtype) == (t.shape, t.stride(), t.dtype)


@every_sample
def test_inputs_are_neither_written_nor_shared(index):
    name, args, kwargs = samples(DEVICE)[index]
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    before = [t.clone() for t in tensors]
    for which in (i.name for i in custom_ops.ops()[name].implementations):
        if which == "cuda" and DEVICE != "cuda":
            continue
        result = outputs(implementation(name, which)(*args, **kwargs))
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
        storages = {t.untyped_storage().data_ptr() for t in tensors}
        assert not storages & {t.untyped_storage().data_ptr() for t in result}


@every_sample
def test_symbolic_sizes_add_no_guard(index):
    name, args, kwargs = samples(tokens=6)[index]
    env = ShapeEnv()

    def symbolic(t: Tensor) -> Tensor:
        dynamic = [DimDynamic.DYNAMIC if s % 6 == 0 else DimDynamic.STATIC for s in t.shape]
        context = StatelessSymbolicContext(dynamic_sizes=dynamic)
        return mode.from_tensor(t, symbolic_context=context)

    with FakeTensorMode(shape_env=env) as mode:
        fakes, options = pytree.tree_map_only(Tensor, symbolic, (args, kwargs))
        before = len(env.guards)
        result = outputs(op_of(name)(*fakes, **options))
        custom_ops.ops()[name].choose(*fakes, **options)
    assert len(env.guards) == before
    real = outputs(op_of(name)(*args, **kwargs))
    hints = [[int(s) for s in (*t.shape, *t.stride())] for t in result]
    assert hints == [[*t.shape, *t.stride()] for t in real]


@every_sample
def test_dynamic_tokens_compile_once(index, monkeypatch):
    monkeypatch.setenv("CUSTOM_OPS_DISABLE", "triton")  # whose interpreter is slow
    name = samples()[index][0]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda args, kwargs: op_of(name)(*args, **kwargs), backend="aot_eager", fullgraph=True
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (7, 33, 130):
            _, args, kwargs = samples(tokens=tokens)[index]
            for t in pytree.tree_leaves((args, kwargs)):
                if isinstance(t, Tensor) and t.shape[0] % tokens == 0:
                    torch._dynamo.mark_dynamic(t, 0)
            got = outputs(compiled(args, kwargs))
            want = outputs(op_of(name)(*args, **kwargs))
            assert_same_written(name, got, want)


@every_sample
def test_an_input_that_requires_grad_is_refused(index):
    name, args, kwargs = samples()[index]
    if not args[0].is_floating_point():
        pytest.skip("needs an op whose first argument is a floating point tensor")
    args = (args[0].detach().requires_grad_(), *args[1:])
    with pytest.raises(RuntimeError, match=f"{name}: .* requires grad.*without a derivative"):
        op_of(name)(*args, **kwargs)


@pytest.mark.gpu
@every_sample
def test_the_cuda_ops_have_the_schema_and_the_fake_of_the_op(index):
    for tokens in (0, 1, 5):
        name, args, kwargs = samples("cuda", tokens)[index]
        kernel(name, "cuda")
        cuda = next(i for i in custom_ops.ops()[name].implementations if i.name == "cuda").overload
        schemas = [str(op._schema).split("(", 1)[1] for op in (cuda, op_of(name))]
        assert schemas[0] == schemas[1]
        real = outputs(cuda(*args, **kwargs))
        with fake_mode() as fake:
            faked = outputs(cuda(*fake(args), **fake(kwargs)))
        for r, f in zip(real, faked, strict=True):
            assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


@pytest.mark.gpu
@every_sample
@pytest.mark.parametrize("which", ["reference", "triton", "cuda"])
def test_captured_without_synchronization_and_repeatable(index, which):
    """A CUDA graph replays what a call computes, of new values in the same memory, with the same bits each time."""
    tokens = 3000
    name, args, kwargs = samples("cuda", tokens)[index]
    run = kernel(name, which) if which != "reference" else implementation(name, which)
    run(*args, **kwargs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        first = outputs(run(*args, **kwargs))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs(run(*args, **kwargs))
    for _ in range(3):
        graph.replay()
        assert_same_written(name, captured, first)
    args[0].copy_(args[0].flip(0).clone())
    again = outputs(run(*args, **kwargs))
    graph.replay()
    assert_same_written(name, captured, again)
