"""Every spelling of a meaning fires, in any shape and with commuted operands."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from fusion_passes import Tensor as Spec
from fusion_passes import registry
from fusion_passes.fusion import Fusion, Pattern, Scalar, SizeOf
from fusion_passes.matching import compile_pattern
from fusion_passes.operations import escapes, module_path
from fusion_passes.quantize import quantize_weight
from fusion_passes.testing import fuse, fuse_graphs
from tests.fusion_passes.helpers import EPS, FP8, fuse_all, llama_norm, quantize, random, silu_mul

pytestmark = pytest.mark.usefixtures("references")

LEADING = ((), (1,), (5,), (1, 1), (2, 3), (1, 4), (2, 1, 3))
leading = st.sampled_from(LEADING)
dtypes = st.sampled_from((torch.bfloat16, torch.float16))


@dataclass(frozen=True)
class Norm:
    """A spelling of RMSNorm with the roundings of Llama; ``mode``: of Gemma or torch.nn.RMSNorm."""

    mode: str
    square: str
    reciprocal_first: bool
    weight_first: bool
    eps_first: bool
    unsqueezed: bool
    cast: str

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        h = x.to(torch.float32) if self.cast == "to" else x.float()
        squared = {
            "pow": lambda: h.pow(2),
            "mul": lambda: h * h,
            "square": lambda: torch.square(h),
        }[self.square]()
        mean = squared.mean(-1).unsqueeze(-1) if self.unsqueezed else squared.mean(-1, keepdim=True)
        scale = torch.rsqrt(EPS + mean if self.eps_first else mean + EPS)
        h = scale * h if self.reciprocal_first else h * scale
        if self.mode == "gemma":
            factor = weight.float() + 1.0 if self.eps_first else 1.0 + weight.float()
            return (factor * h if self.weight_first else h * factor).type_as(x)
        if self.mode == "float32":
            return (weight * h if self.weight_first else h * weight).to(x.dtype)
        h = h.type_as(x) if self.cast == "to" else h.to(x.dtype)
        return weight * h if self.weight_first else h * weight


norms = st.builds(
    Norm,
    mode=st.sampled_from(("llama", "gemma", "float32")),
    square=st.sampled_from(("pow", "mul", "square")),
    reciprocal_first=st.booleans(),
    weight_first=st.booleans(),
    eps_first=st.booleans(),
    unsqueezed=st.booleans(),
    cast=st.sampled_from(("to", "float")),
)


@dataclass(frozen=True)
class Quantization:
    """A spelling of group quantization; all have the same meaning, bit for bit."""

    view: str
    cast_first: bool
    amax_in_16_bits: bool
    keepdim: bool
    clamp: str
    clamp_codes: bool
    detour: bool

    def groups(self, x: Tensor) -> Tensor:
        if self.view == "unflatten":
            return x.unflatten(-1, (-1, 128))
        shape = (*x.shape[:-1], x.shape[-1] // 128, 128)
        return x.view(shape) if self.view == "view" else x.reshape(shape)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        wide = self.groups(x.float()) if self.cast_first else self.groups(x).float()
        if self.detour:
            wide = wide.unsqueeze(0).squeeze(0)
        magnitude = self.groups(x).abs() if self.amax_in_16_bits else wide.abs()
        amax = magnitude.amax(-1, keepdim=self.keepdim).float()
        amax = {"clamp": amax.clamp(min=1e-10), "clamp_min": amax.clamp_min(1e-10), "none": amax}[
            self.clamp
        ]
        scale = amax / 448.0
        codes = wide / (scale if self.keepdim else scale.unsqueeze(-1))
        if self.clamp_codes:
            codes = torch.clamp(codes, -448.0, 448.0)
        return codes.to(FP8).reshape(x.shape), scale.squeeze(-1) if self.keepdim else scale


quantizations = st.builds(
    Quantization,
    view=st.sampled_from(("view", "reshape", "unflatten")),
    cast_first=st.booleans(),
    amax_in_16_bits=st.booleans(),
    keepdim=st.booleans(),
    clamp=st.sampled_from(("clamp", "clamp_min", "none")),
    clamp_codes=st.booleans(),
    detour=st.booleans(),
)


def halves(packed: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """Gate and up of a packed projection."""
    width = packed.shape[-1] // 2
    if how == "chunk":
        gate, up = packed.chunk(2, dim=-1)
    elif how == "split":
        gate, up = packed.split(width, dim=-1)
    elif how == "narrow":
        gate, up = packed.narrow(-1, 0, width), packed.narrow(-1, width, width)
    else:
        gate, up = packed[..., :width], packed[..., width:]
    return gate, up


@given(norm=norms, lead=leading, hidden=st.sampled_from((1, 7, 64, 129, 256)), dtype=dtypes)
def test_rms_norm(norm, lead, hidden, dtype):
    result = fuse_all(norm, random(*lead, hidden, dtype=dtype), random(hidden, dtype=dtype, seed=1))
    assert result.report.matches == {"rms_norm": 1}


@given(norm=norms, lead=leading, dtype=dtypes, swapped=st.booleans(), live=st.booleans())
def test_add_rms_norm(norm, lead, dtype, swapped, live):
    def block(x, residual, weight):
        total = residual + x if swapped else x + residual
        return (norm(total, weight), total) if live else norm(total, weight)

    x, residual = (random(*lead, 64, dtype=dtype, seed=seed) for seed in (0, 1))
    assert fuse_all(block, x, residual, random(64, dtype=dtype, seed=2)).report.matches == {
        "add_rms_norm": 1
    }


@given(quantization=quantizations, lead=leading, groups=st.integers(1, 3), dtype=dtypes)
def test_group_quant(quantization, lead, groups, dtype):
    result = fuse_all(quantization, random(*lead, groups * 128, dtype=dtype))
    assert result.report.matches == {"group_quant": 1}


@given(
    quantization=quantizations,
    norm=norms,
    lead=leading,
    residual=st.sampled_from(("none", "live", "dead")),
)
def test_norm_and_quantization(quantization, norm, lead, residual):
    def block(x, other, weight):
        x = x if residual == "none" else x + other
        codes = quantization(norm(x, weight))
        return (*codes, x) if residual == "live" else codes

    inputs = (random(*lead, 256), random(*lead, 256, seed=1), random(256, seed=2))
    name = "rms_norm_group_quant" if residual == "none" else "add_rms_norm_group_quant"
    assert fuse_all(block, *inputs).report.matches == {name: 1}


@given(
    how=st.sampled_from(("chunk", "split", "slice", "narrow")),
    lead=leading,
    swapped=st.booleans(),
    quantization=st.none() | quantizations,
    dtype=dtypes,
)
def test_silu_mul_of_a_packed_projection(how, lead, swapped, quantization, dtype):
    def block(packed):
        gate, up = halves(packed, how)
        product = up * F.silu(gate) if swapped else F.silu(gate) * up
        return product if quantization is None else quantization(product)

    name = "silu_mul" if quantization is None else "silu_mul_group_quant"
    assert fuse_all(block, random(*lead, 512, dtype=dtype)).report.matches == {name: 1}


@given(
    lead=leading,
    out=st.sampled_from((64, 128, 200, 256)),
    bias=st.booleans(),
    spelling=st.sampled_from(("interleave", "expand", "4-D")),
    scale_first=st.booleans(),
    matmul=st.sampled_from(("linear", "@", "matmul")),
    dtype=dtypes,
)
def test_block_scaled_linear(lead, out, bias, spelling, scale_first, matmul, dtype):
    """A ragged number of output features cuts the last block short; only whole blocks have a 4-D view."""
    if spelling == "4-D":
        out = 256

    def blocks(scale, rows):
        if spelling == "interleave":
            return scale.repeat_interleave(128, 1).repeat_interleave(128, 0)[:rows]
        wide = scale[:, None, :, None].expand(-1, 128, -1, 128)
        return wide.reshape(scale.shape[0] * 128, scale.shape[1] * 128)[:rows]

    def block(x, weight, scale_inv, offset):
        codes, scale = quantize(x)
        groups, scale = codes.float().unflatten(-1, (-1, 128)), scale.unsqueeze(-1)
        operand = (scale * groups if scale_first else groups * scale).flatten(-2).to(x.dtype)
        if spelling == "4-D":
            wide = weight.float().view(out // 128, 128, -1, 128) * scale_inv[:, None, :, None]
            weight = wide.view(out, -1).to(x.dtype)
        else:
            weight = (blocks(scale_inv, out) * weight.float()).to(x.dtype)
        if matmul == "linear":
            return F.linear(operand, weight, offset)
        product = (
            operand @ weight.t() if matmul == "@" else torch.matmul(operand, weight.transpose(0, 1))
        )
        return product if offset is None else F.linear(operand, weight, offset)

    weight, scale_inv = quantize_weight(random(out, 256, seed=1))
    result = fuse_all(
        block,
        random(*lead, 256, dtype=dtype),
        weight,
        scale_inv,
        random(out, dtype=dtype) if bias else None,
    )
    assert result.report.matches == {"block_scaled_linear": 1, "group_quant": 1}


def test_heads_are_rows():
    """The norms of Qwen3's queries and keys run over the last of four dimensions."""
    result = fuse_all(
        lambda x, w: llama_norm(x.view(2, 3, 4, 64), w), random(2, 3, 256), random(64)
    )
    assert result.report.matches == {"rms_norm": 1}


def test_a_residual_of_one_row_less_a_dimension():
    result = fuse_all(lambda x, r, w: llama_norm(x + r, w), random(1, 64), random(64), random(64))
    assert result.report.matches == {"add_rms_norm": 1}


def test_a_sum_of_a_value_with_itself():
    result = fuse_all(lambda x, w: llama_norm(x + x, w), random(3, 64), random(64))
    assert result.report.matches == {"add_rms_norm": 1}


@pytest.mark.parametrize(
    "inputs", [(random(0, 256), random(256)), (random(2, 0, 256), random(256))]
)
def test_no_tokens(inputs):
    result = fuse_all(lambda x, w: quantize(llama_norm(x, w)), *inputs)
    assert result.report.matches == {"rms_norm_group_quant": 1}


@pytest.mark.parametrize("mark", [(0,), (0, 1)])
@pytest.mark.parametrize("flat", [False, True])
def test_symbolic_tokens(mark, flat):
    x = random(3, 5, 256)
    for dim in mark:
        torch._dynamo.mark_dynamic(x, dim)
    result = fuse_all(
        lambda x, w: quantize(llama_norm(x.view(-1, 256) if flat else x, w)), x, random(256)
    )
    assert result.report.matches == {"rms_norm_group_quant": 1}


def test_a_number_of_tokens_that_the_data_decides():
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        x = random(6, 256)
        result = fuse_all(
            lambda x, mask, w: quantize(llama_norm(x[mask], w)), x, x[:, 0] > 0, random(256)
        )
    assert result.report.matches == {"rms_norm_group_quant": 1}
    assert [site.bytes_saved_here for site in result.report.sites] == [None]


def test_eps_that_is_known_only_at_run_time():
    result = fuse_all(
        llama_norm, random(3, 64), random(64), torch.tensor(0.25, dtype=torch.float64)
    )
    assert result.report.matches == {"rms_norm": 1}


def test_eps_on_another_device_than_the_cpu_stays():
    """A kernel takes it as a number, and to read it the host would wait for the device."""
    x, weight, eps = (t.to("meta") for t in (random(4, 128), random(128), torch.tensor(EPS)))
    result = fuse_graphs(llama_norm, x, weight, eps, only=[registry()["rms_norm"]])[0]
    assert result.report.matches == {}
    assert [m.reason for m in result.report.near_misses] == [
        "eps is on a GPU, and reading it would wait for the GPU"
    ]


def test_the_report_names_the_module():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(
                torch.nn.ModuleDict({"norm": torch.nn.RMSNorm(64, EPS)}) for _ in range(2)
            )
            self.to(torch.bfloat16)

        def forward(self, x):
            for layer in self.layers:
                x = layer["norm"](x).sin()
            return x

    result = fuse_all(Block(), random(3, 64))
    assert [site.module for site in result.report.sites] == ["layers.0.norm", "layers.1.norm"]
    assert {module_path(n) for n in result.before.graph.nodes if "rsqrt" in n.name} == {
        "layers.0.norm",
        "layers.1.norm",
    }


def test_a_pattern_is_read_as_products_of_its_sizes():
    def spelling(x, group_size, eps):
        return x.unflatten(-1, (-1, group_size)).float().amax(-1) + eps

    inputs = {
        "x": Spec("tokens", "groups * group_size"),
        "group_size": SizeOf("group_size"),
        "eps": Scalar(),
    }
    compiled = compile_pattern(Pattern(spelling, inputs))
    amax = next(node for node in compiled.operations if "amax" in node.name)
    sizes = [compiled.monomial(int(size)) for size in amax.args[0].meta["val"].shape]
    assert sizes == [(1, ("tokens",)), (1, ("groups",)), (1, ("group_size",))]
    assert [compiled.scalar_name(v) for v in (compiled.scalars["eps"], 1.0, 3)] == [
        "eps",
        None,
        None,
    ]


def test_both_halves_must_be_one_projection_each():
    """Slices that overlap are two values: the fusion reads them where they lie."""
    result = fuse_all(lambda p: silu_mul(p[:, :128], p[:, 64:192]), random(3, 256))
    assert result.report.matches == {"silu_mul": 1}


def test_the_size_of_a_value_inside_keeps_nobody_from_fusing():
    """What only asks how large a value is, as views of a symbolic width do, needs none of its elements."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(3, 4)
    inside = graph.call_function(torch.ops.aten.abs.default, (x,))
    inside.meta["val"] = torch.empty(3, 4)
    size = graph.call_function(torch.ops.aten.sym_size.int, (inside, 0))
    end = graph.call_function(torch.ops.aten.neg.default, (inside,))
    end.meta["val"] = torch.empty(3, 4)
    reader = graph.call_function(torch.ops.aten.exp.default, (inside,))
    graph.output((end, size, reader))
    assert list(escapes([inside, end], [end])) == [(inside, reader)]


def _square_linear() -> Fusion:
    """A pattern whose sizes are all that tells it from another: a weight of as many rows as columns."""
    square = {"x": Spec("num_tokens", "hidden_size"), "weight": Spec("hidden_size", "hidden_size")}
    return Fusion(
        "square_linear",
        "relu(x @ w.T)",
        2,
        patterns=(Pattern(lambda x, weight: F.relu(F.linear(x, weight)), square, name="square"),),
        rewrite=lambda m: (m.call("silu_mul", m.tensor("x"), m.tensor("x")),),
        signature="aten.mm.default",
    )


@given(
    tokens=st.integers(2, 5),
    width=st.sampled_from((2, 8, 17)),
    features=st.sampled_from((2, 8, 17)),
    lead=st.sampled_from(((), (1,), (3,))),
)
def test_sizes_alone_tell_two_patterns_apart(tokens, width, features, lead):
    x, weight = random(*lead, tokens, width), random(features, width)
    result = fuse(lambda x, w: F.relu(F.linear(x, w)), x, weight, only=[_square_linear()])
    assert result.report.matches == ({"square_linear": 1} if width == features else {})
    if width != features:
        (miss,) = result.report.near_misses
        assert f"hidden_size is {width}, but" in miss.reason or f"has {features}" in miss.reason


@pytest.mark.parametrize("shape", [(6,), (2, 6), (1, 6), (1, 1, 6)])
def test_what_is_compared_shape_by_shape_has_as_many_dimensions(shape):
    """A scan goes along one dimension: of a matrix it is another operation, even where one row is all there is."""
    fusion = Fusion(
        "running_relu",
        "relu(cumsum(x))",
        2,
        patterns=(
            Pattern(lambda x: F.relu(torch.cumsum(x, 0)), {"x": Spec("num_tokens")}, name="scan"),
        ),
        rewrite=lambda m: (m.emit(torch.ops.aten.neg.default, m.tensor("x")),),
        signature="aten.cumsum.default",
    )
    result = fuse(lambda x: F.relu(torch.cumsum(x, 0)), random(*shape), only=[fusion])
    assert result.report.matches == ({"running_relu": 1} if len(shape) == 1 else {})
    if len(shape) > 1:
        (miss,) = result.report.near_misses
        assert f"reads a {len(shape)}-D tensor, expected 1-D" in miss.reason
