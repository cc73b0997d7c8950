"""What holds for every op: opcheck, fakes as the kernels, errors, no tokens, dynamic shapes, no gradient."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

import custom_ops
from tests.custom_ops.helpers import (
    DEVICE,
    SAMPLE_IDS,
    assert_same_bits,
    bf16,
    fake_mode,
    fp8,
    implementation,
    outputs,
    samples,
    steps,
)

GATES = ("silu", "gelu", "clamped")
every_sample = pytest.mark.parametrize("index", range(len(SAMPLE_IDS)), ids=SAMPLE_IDS)
LAYOUTS = custom_ops.scales.SCALE_LAYOUTS


def op_of(name: str):
    return getattr(torch.ops.custom_ops, name).default


@every_sample
def test_opcheck(index):
    name, args, kwargs = samples(DEVICE)[index]
    checks = [
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    ]
    if name == "block_scaled_mm":
        checks.remove(
            "test_schema"
        )  # torch compares inputs with allclose, which has no float8 kernel
    torch.library.opcheck(op_of(name), args, kwargs, test_utils=checks)


@every_sample
def test_inputs_are_not_written(index):
    name, args, kwargs = samples(DEVICE)[index]
    before = pytree.tree_map_only(Tensor, torch.clone, args)
    for which in ("reference", "triton"):
        implementation(name, which)(*args, **kwargs)
        for a, b in zip(args, before, strict=True):
            assert not isinstance(a, Tensor) or not (steps(a, b) != 0).any()


@every_sample
@pytest.mark.parametrize(
    "tokens", [(), (0,), (1,), (5,), (2, 0), (1, 1), (3, 7), (2, 1, 3)], ids=str
)
def test_fake_and_implementations_give_the_same_strides(index, tokens):
    name, args, kwargs = samples(DEVICE, tokens)[index]
    real = outputs(op_of(name)(*args, **kwargs))
    with fake_mode() as fake:
        faked = outputs(op_of(name)(*fake(args), **kwargs))
    for r, f in zip(real, faked, strict=True):
        assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)
    if real[0].numel() or name == "block_scaled_mm":
        reference = outputs(implementation(name, "reference")(*args, **kwargs))
        triton = outputs(implementation(name, "triton")(*args, **kwargs))
        assert [t.stride() for t in reference] == [t.stride() for t in real]
        assert [t.stride() for t in triton] == [t.stride() for t in real]


@every_sample
def test_outputs_share_no_memory_with_the_inputs(index):
    name, args, kwargs = samples(DEVICE)[index]
    storages = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
    for which in ("reference", "triton"):
        for out in outputs(implementation(name, which)(*args, **kwargs)):
            assert out.untyped_storage().data_ptr() not in storages


@every_sample
def test_meta_tensors(index):
    name, args, kwargs = samples()[index]
    meta = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), args)
    for out, real in zip(
        outputs(op_of(name)(*meta, **kwargs)), outputs(op_of(name)(*args, **kwargs)), strict=True
    ):
        assert out.device.type == "meta"
        assert (out.shape, out.stride(), out.dtype) == (real.shape, real.stride(), real.dtype)


@every_sample
def test_symbolic_sizes_add_no_guard(index):
    """Neither the fake nor the choice of an implementation may specialise or guard a symbolic size."""
    name, args, kwargs = samples(tokens=(6, 5), hidden=384)[index]
    env = ShapeEnv()

    def symbolic(t: Tensor) -> Tensor:
        sizes = [DimDynamic.DYNAMIC] * t.dim()
        return mode.from_tensor(t, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    with FakeTensorMode(shape_env=env) as mode:
        fakes = pytree.tree_map_only(Tensor, symbolic, args)
        before = len(env.guards)
        result = outputs(op_of(name)(*fakes, **kwargs))
        custom_ops.ops()[name].choose(*fakes, **kwargs)
    assert len(env.guards) == before
    assert not env.deferred_runtime_asserts
    real = outputs(op_of(name)(*args, **kwargs))
    hints = [[int(s) for s in (*t.shape, *t.stride())] for t in result]
    assert hints == [[*t.shape, *t.stride()] for t in real]


@every_sample
@pytest.mark.parametrize("unbacked", [False, True])
def test_dynamic_tokens_compile_once(index, unbacked, monkeypatch):
    monkeypatch.setenv(
        "CUSTOM_OPS_DISABLE", "triton"
    )  # its interpreter takes seconds for 129 tokens
    name, _, _ = samples()[index]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda args, kwargs: op_of(name)(*args, **kwargs), backend="aot_eager", fullgraph=True
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        # A weight of one block is a case of its own to PyTorch, which takes each size of 1 for one.
        sizes = (200, 300, 500) if name == "block_quant" else (2, 7, 129)
        # The experts of a tensor without tokens are as far apart as with one: no multiple of their size.
        few = (1,) if name == "silu_mul_group_quant_masked" else (0, 1)
        for tokens in (*sizes, *(few if unbacked else ())):
            _, args, kwargs = samples(tokens=(tokens,))[index]
            dim = 1 if name == "silu_mul_group_quant_masked" else 0
            for t in args:
                if isinstance(t, Tensor) and t.dim() > 1 and t.shape[dim] == tokens:
                    mark = torch._dynamo.decorators.mark_unbacked if unbacked else None
                    (mark or torch._dynamo.mark_dynamic)(t, dim)
            assert_same_bits(compiled(args, kwargs), op_of(name)(*args, **kwargs))


@every_sample
def test_inductor_reads_strided_inputs_in_place(index):
    """Inductor neither copies a half of a packed tensor nor changes what comes out."""
    from torch._inductor.utils import run_and_get_code

    name, args, kwargs = samples()[index]
    torch._dynamo.reset()
    expected = op_of(name)(*args, **kwargs)
    with torch.no_grad():
        result, codes = run_and_get_code(
            torch.compile(lambda args, kwargs: op_of(name)(*args, **kwargs), fullgraph=True),
            args,
            kwargs,
        )
    assert_same_bits(result, expected)
    assert "empty_strided_cpu(" not in codes[-1].split("def call")[1].split("def get_args")[0]


@pytest.mark.gpu
@every_sample
@pytest.mark.parametrize("tokens", [(0,), (1,), (2, 3)], ids=str)
def test_cuda_ops_have_the_fake_of_the_op(index, tokens):
    """custom_ops_cuda.X may stand in a graph for custom_ops.X: same schema, same fake, same strides."""
    name, args, kwargs = samples(DEVICE, tokens)[index]
    cuda = next((i for i in custom_ops.ops()[name].implementations if i.name == "cuda"), None)
    if cuda is None:
        pytest.skip(f"needs a C++ kernel of {name}")
    if reason := cuda.unavailable(torch.device(DEVICE)):
        pytest.skip(f"the CUDA C++ kernels: {reason}")
    schemas = [str(op._schema).split("(", 1)[1] for op in (cuda.overload, op_of(name))]
    assert schemas[0] == schemas[1]
    real = outputs(cuda.overload(*args, **kwargs))
    with fake_mode() as fake:
        faked = outputs(cuda.overload(*fake(args), **kwargs))
    for r, f in zip(real, faked, strict=True):
        assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


def bad_calls() -> dict:
    x, w = bf16(2, 256), bf16(256)
    a, s, b, bs = fp8(2, 256), torch.rand(2, 2), fp8(130, 256), torch.rand(2, 2)
    quant = custom_ops.group_quant
    return {
        "dtype": (
            quant,
            (x.float(), 128),
            {},
            r"x.dtype is torch.float32; accepted: torch.bfloat16",
        ),
        "scalar": (quant, (x[0, 0], 128), {}, r"x has no dimension; accepted: \[..., K\]"),
        "group": (quant, (x, 96), {}, r"group_size is 96; accepted: 32, 64, 128"),
        "K": (quant, (x[:, :200], 128), {}, r"last dimension of x is 200; .*multiple.*128"),
        "layout": (
            quant,
            (x, 128),
            {"scale_layout": "rows"},
            r"scale_layout is 'rows'; .*row_major",
        ),
        "min_amax": (quant, (x, 128), {"min_amax": -1.0}, r"min_amax is -1.0; accepted: a finite"),
        "nan": (
            quant,
            (x, 128),
            {"min_amax": float("nan")},
            r"min_amax is nan; accepted: a finite",
        ),
        "dtype of codes": (
            quant,
            (x, 128),
            {"dtype": torch.float8_e5m2},
            r"dtype is torch.float8_e5m2; accepted: torch.float8_e4m3fn, torch.int8",
        ),
        "scale format": (
            custom_ops.token_quant,
            (x,),
            {"scale_format": "ue8m0_packed"},
            r"scale_format is 'ue8m0_packed'; accepted: float32, ue8m0",
        ),
        "packed layout": (
            quant,
            (x, 128),
            {"scale_format": "ue8m0_packed"},
            r"scale_layout is 'row_major'; accepted with scale_format 'ue8m0_packed': column_major_tma",
        ),
        "scale mode": (
            custom_ops.tensor_quant,
            (x,),
            {"scale_mode": "exact"},
            r"scale_mode is 'exact'; accepted: divide, reciprocal, divide_input, reciprocal_input",
        ),
        "code mode": (
            custom_ops.silu_mul_token_quant,
            (x, x),
            {"code_mode": "divide_input"},
            r"code_mode is 'divide_input'; accepted: divide, reciprocal, reciprocal_input",
        ),
        "min_scale": (
            custom_ops.rms_norm_token_quant,
            (x, w, 1e-6),
            {"min_scale": float("inf")},
            r"min_scale is inf; accepted: a finite number >= 0",
        ),
        "no channels": (
            custom_ops.token_quant,
            (x[:, :0],),
            {},
            r"last dimension of x is 0; accepted: 1 or more",
        ),
        "scale that is two": (
            custom_ops.tensor_quant_static,
            (x, torch.ones(2)),
            {},
            r"scale.shape is \(2,\); accepted: one element",
        ),
        "scale dtype": (
            custom_ops.add_rms_norm_tensor_quant_static,
            (x, x, w, 1e-6, w[:1]),
            {},
            r"scale.dtype is torch.bfloat16; accepted: torch.float32",
        ),
        "zero point dtype": (
            custom_ops.tensor_quant_static_asymmetric,
            (x, torch.ones(1), torch.ones(1)),
            {},
            r"zero_point.dtype is torch.float32; accepted: torch.int8, torch.int32",
        ),
        "silu shape": (
            custom_ops.silu_mul,
            (x, x[:, :128]),
            {},
            r"up.shape is \(2, 128\); accepted: \(2, 256\), as gate",
        ),
        "silu dims": (
            custom_ops.silu_mul,
            (x, x[0]),
            {},
            r"up.shape is \(256,\); accepted: \(2, 256\)",
        ),
        "silu dtype": (
            custom_ops.silu_mul_group_quant,
            (x, x.half(), 128),
            {},
            r"up.dtype is torch.float16; accepted: torch.bfloat16, as gate",
        ),
        "weight dtype": (
            custom_ops.rms_norm,
            (x, w.float(), 1e-6),
            {},
            r"weight.dtype is torch.float32; accepted with weight_mode 'rounded'.*: torch.bfloat16",
        ),
        "weight half": (
            custom_ops.rms_norm_group_quant,
            (x, w.half(), 1e-6, 128),
            {"weight_mode": "float32"},
            r"weight.dtype is torch.float16; accepted .*: torch.bfloat16, torch.float32",
        ),
        "weight mode": (
            custom_ops.add_rms_norm,
            (x, x, w, 1e-6),
            {"weight_mode": "gemma"},
            r"weight_mode is 'gemma'; accepted: rounded, float32, float32_plus_one",
        ),
        "weight shape": (
            custom_ops.rms_norm,
            (x, w[:128], 1e-6),
            {},
            r"weight.shape is \(128,\); accepted: \(256,\)",
        ),
        "eps": (
            custom_ops.rms_norm,
            (x, w, -1e-6),
            {},
            r"eps is -1e-06; accepted: a finite number",
        ),
        "residual": (
            custom_ops.add_rms_norm_group_quant,
            (x, x[:1], w, 1e-6, 128),
            {},
            r"residual.shape is \(1, 256\); accepted: \(2, 256\), as x",
        ),
        "a dtype": (
            custom_ops.block_scaled_mm,
            (x, s, b, bs),
            {},
            r"a.dtype is torch.bfloat16; accepted: torch.float8_e4m3fn",
        ),
        "a_scale dtype": (
            custom_ops.block_scaled_mm,
            (a, s.half(), b, bs),
            {},
            r"a_scale.dtype is torch.float16; accepted: torch.float32",
        ),
        "a_scale shape": (
            custom_ops.block_scaled_mm,
            (a, s[:, :1], b, bs),
            {},
            r"a_scale.shape is \(2, 1\); accepted: \(2, 2\)",
        ),
        "b shape": (
            custom_ops.block_scaled_mm,
            (a, s, b[:, :128], bs),
            {},
            r"b.shape is \(130, 128\); accepted: \(130, 256\)",
        ),
        "b dims": (
            custom_ops.block_scaled_mm,
            (a, s, b[0], bs),
            {},
            r"b has 1 dimensions; accepted: 2",
        ),
        "b_scale shape": (
            custom_ops.block_scaled_mm,
            (a, s, b, bs[:1]),
            {},
            r"b_scale.shape is \(1, 2\); accepted: \(2, 2\)",
        ),
        "out_dtype": (
            custom_ops.block_scaled_mm,
            (a, s, b, bs),
            {"out_dtype": torch.float64},
            r"out_dtype is torch.float64; accepted: torch.bfloat16, torch.float16, torch.float32",
        ),
    }


@pytest.mark.parametrize("case", bad_calls())
def test_errors_name_the_argument_and_are_the_same_in_fake_and_kernel(case):
    op, args, kwargs, message = bad_calls()[case]
    with pytest.raises(ValueError, match=message) as real:
        op(*args, **kwargs)
    assert str(real.value).startswith(f"{op.__name__}: ")
    with fake_mode() as fake, pytest.raises(ValueError, match=re.escape(str(real.value))):
        op(*fake(args), **kwargs)


def test_devices_must_agree():
    with pytest.raises(ValueError, match="weight is on meta; accepted: cpu, as x"):
        custom_ops.rms_norm(bf16(2, 8), bf16(8).to("meta"), 1e-6)


@every_sample
def test_an_input_that_requires_grad_is_refused_in_grad_mode(index):
    name, args, kwargs = samples()[index]
    if name == "block_scaled_mm":
        args = (args[0], args[1].requires_grad_(), *args[2:])
        culprit = "a_scale"
    else:
        args = (args[0].detach().requires_grad_(), *args[1:])
        culprit = "gate" if name.startswith(GATES) else "x"
        culprit = "gate_up" if name.endswith("masked") else culprit
    with pytest.raises(
        RuntimeError, match=f"{name}: {culprit} requires grad.*without a derivative"
    ):
        op_of(name)(*args, **kwargs)
    with torch.no_grad():
        assert not any(t.requires_grad for t in outputs(op_of(name)(*args, **kwargs)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "tokens", [(), (0,), (1,), (6,), (2, 5), (0, 3), (2, 2, 3), (1, 5)], ids=str
)
def test_scale_strides_are_those_of_the_layout(layout, tokens):
    scale = custom_ops.group_quant(bf16(*tokens, 384), 128, scale_layout=layout)[1]
    count = 1
    for size in tokens:
        count *= size
    pitch = {"column_major": max(1, count), "column_major_tma": -(-max(1, count) // 4) * 4}
    assert scale.shape == (*tokens, 3)
    if layout == "row_major":
        assert scale.stride() == torch.empty(*tokens, 3).stride()
    else:
        rows = (3 * pitch[layout], 1) if tokens == (1, 5) else torch.empty(tokens).stride()
        assert scale.stride() == (*rows, pitch[layout])
    if count > 1:  # with one token no stride between tokens is used
        rows = scale.view(count, 3)
        assert rows.stride() == ((3, 1) if layout == "row_major" else (1, pitch[layout]))
