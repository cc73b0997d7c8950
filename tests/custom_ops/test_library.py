"""Declaring ops, choosing implementations, explaining the choice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import custom_ops
from custom_ops import cuda_build, library, platform
from custom_ops.gemm import deep_gemm, preferred_scale_layout
from tests.custom_ops.helpers import DEVICE, bf16, fake_mode, fp8
from tests.custom_ops.schemes import ASYMMETRIC, KEPT, PAIRS, PRODUCERS, SCHEMES

NAMES = {
    "block_scaled_mm",
    "scaled_mm",
    "scaled_mm_add",
    "block_quant",
    "silu_mul_group_quant_masked",
    "topk_softmax",
    "topk_sigmoid",
    "grouped_topk",
    "moe_align_block_size",
    "moe_permute",
    "moe_permute_group_quant",
    "moe_unpermute",
    "moe_reduce",
    "fused_moe",
    "fused_moe_and_shared",
    "router_logits",
    "fused_moe_batched",
    "fused_moe_lora",
    "ep_dispatch",
    "ep_combine",
    "ep_dispatch_low_latency",
    "ep_combine_low_latency",
    "ep_fused_moe",
    "lora_shrink",
    "lora_expand",
    "lora_linear",
    "lora_add",
    "lora_linear_single",
    "lora_add_single",
    "lora_linears",
    "lora_linears_single",
    "lora_shrink_single",
    "lora_expand_single",
    *SCHEMES,
    *ASYMMETRIC,
    *PRODUCERS,
    *(f"{producer}_{scheme}" for producer, scheme in PAIRS),
    *(f"{producer}_and_{scheme}" for producer, scheme in KEPT),
}
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="needs a machine without a GPU")


def test_every_op_is_declared_with_its_parts():
    assert set(custom_ops.ops()) == NAMES
    for name, op in custom_ops.ops().items():
        assert op.overload is getattr(torch.ops.custom_ops, name).default
        assert op.public is getattr(custom_ops, name)
        assert len(op.public.__doc__) > 150
        assert op.implementations[-1].name == "reference"
        assert torch.Tag.pt2_compliant_tag in op.overload.tags
        assert torch.Tag.needs_fixed_stride_order in op.overload.tags
        assert not op.overload._schema.is_mutable


def test_calling_an_op_object_is_calling_its_function():
    x = bf16(3, 128)
    op = custom_ops.ops()["group_quant"]
    for called, direct in zip(op(x, 128), custom_ops.group_quant(x, group_size=128), strict=True):
        assert torch.equal(called.view(torch.uint8), direct.view(torch.uint8))


def test_an_implementation_with_another_signature_is_rejected(monkeypatch):
    monkeypatch.setattr(library, "_library", torch.library.Library("custom_ops_test", "FRAGMENT"))
    monkeypatch.setattr(library, "NAMESPACE", "custom_ops_test")

    def twice(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.custom_ops_test.twice(x)

    def other(y: torch.Tensor) -> torch.Tensor:
        return y * 2

    with pytest.raises(TypeError, match=r"custom_ops_test.twice: .*other.* takes .*'y'.*'x'"):
        library.define(twice, "(Tensor x) -> Tensor", check=twice, empty=twice, reference=other)
    assert "twice" not in library.ops()


@on_cpu
def test_choice_and_reasons_on_a_cpu(monkeypatch):
    x = bf16(3, 128)
    choice = custom_ops.explain(custom_ops.group_quant, x, 128)
    assert choice.implementation.name == "triton"
    assert str(choice).splitlines() == [
        "custom_ops.group_quant: triton",
        "  not cuda: needs a CUDA tensor, this one is on cpu",
    ]
    monkeypatch.setenv("CUSTOM_OPS_DISABLE", "triton")
    choice = custom_ops.explain("group_quant", x, 128)
    assert choice.implementation.name == "reference"
    assert choice.rejected["triton"] == "left out by CUSTOM_OPS_DISABLE"


def test_disabling_changes_what_runs(monkeypatch):
    ran = []
    op = custom_ops.ops()["group_quant"]
    for each in op.implementations:
        monkeypatch.setitem(
            each.__dict__, "function", lambda *args, _name=each.name, **kwargs: ran.append(_name)
        )
    x = bf16(3, 128, device=DEVICE)
    expected = op.choose(x, 128).implementation.name
    op.kernel(x, 128)
    monkeypatch.setenv("CUSTOM_OPS_DISABLE", "cuda, triton")
    op.kernel(x, 128)
    assert ran == [expected, "reference"]


def test_nothing_left_to_run_is_an_error_with_all_reasons(monkeypatch):
    monkeypatch.setenv("CUSTOM_OPS_DISABLE", "cuda,triton,reference")
    x = bf16(3, 128)
    with pytest.raises(
        custom_ops.Unavailable, match=r"(?s)nothing can run.*not triton.*not reference"
    ):
        custom_ops.group_quant(x, 128)
    choice = custom_ops.explain("group_quant", x, 128)
    assert choice.implementation is None
    assert list(choice.rejected) == ["cuda", "triton", "reference"]


def test_unknown_names_are_errors_that_name_the_nearest(monkeypatch):
    with pytest.raises(ValueError, match="unknown op 'group_qant'; did you mean 'group_quant'"):
        custom_ops.explain("group_qant", bf16(1, 128), 128)
    monkeypatch.setenv("CUSTOM_OPS_DISABLE", "tritn")
    with pytest.raises(ValueError, match="unknown implementation 'tritn'; did you mean 'triton'"):
        custom_ops.group_quant(bf16(1, 128), 128)


def test_explain_raises_what_the_op_raises():
    with pytest.raises(ValueError, match="group_size is 16; accepted: 32, 64, 128"):
        custom_ops.explain(custom_ops.group_quant, bf16(1, 128), 16)


def test_choice_on_fake_cuda_tensors():
    """At compile time the arguments are fake; the machine decides, no data is read."""
    with fake_mode():
        x = torch.empty(4, 256, dtype=torch.bfloat16, device="cuda")
        choice = custom_ops.ops()["group_quant"].choose(x, 128)
    if DEVICE == "cpu":
        assert choice.implementation.name == "reference"
        assert "no CUDA GPU" in choice.rejected["cuda"]
        assert "compute capability 8.0" in choice.rejected["triton"]
    else:
        assert choice.implementation.name in ("cuda", "triton")


def test_only_direct_implementations_have_an_overload():
    op = custom_ops.ops()["group_quant"]
    assert [i.direct for i in op.implementations] == [True, False, False]
    assert op.implementations[1].overload is None
    assert op.implementations[2].overload is None


@pytest.mark.parametrize(
    ("n", "k", "out_dtype", "reason"),
    [
        (256, 512, torch.bfloat16, None),
        (200, 144, torch.bfloat16, None),
        (256, 520, torch.bfloat16, "K a positive multiple of 16"),
        (250, 512, torch.bfloat16, "N a positive multiple of 8"),
        (256, 512, torch.float16, "writes torch.bfloat16"),
    ],
)
def test_what_deep_gemm_takes(n, k, out_dtype, reason):
    args = fp8(4, k), torch.rand(4, -(-k // 128)), fp8(n, k), torch.rand(-(-n // 128), -(-k // 128))
    answer = deep_gemm.unsupported(*args, out_dtype=out_dtype)
    assert answer is None if reason is None else reason in answer


@pytest.mark.parametrize(
    ("capability", "installed", "reason"),
    [
        ((9, 0), True, None),
        ((9, 0), False, "deep_gemm is not installed (pip install sgl-deep-gemm"),
        ((10, 0), True, "needs compute capability 9.0 for float32 scales, here is (10, 0)"),
        (None, True, "needs compute capability 9.0 for float32 scales, here is None"),
    ],
)
def test_where_deep_gemm_runs(monkeypatch, capability, installed, reason):
    monkeypatch.setattr(platform, "cuda_capability", lambda device=None: capability)
    monkeypatch.setattr(platform, "has_deep_gemm", lambda: installed)
    answer = deep_gemm.unavailable(torch.device("cuda", 0))
    assert answer is None if reason is None else reason in answer


def test_preferred_scale_layout_follows_deep_gemm(monkeypatch):
    assert preferred_scale_layout("cpu") == "row_major"
    monkeypatch.setattr(library, "_usable", library._usable.__wrapped__)
    monkeypatch.setattr(platform, "cuda_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(platform, "has_deep_gemm", lambda: True)
    assert preferred_scale_layout(torch.device("cuda", 0)) == "column_major_tma"
    monkeypatch.setenv("CUSTOM_OPS_DISABLE", "deep_gemm,cublaslt")
    assert preferred_scale_layout("cuda") == "row_major"


def test_deep_gemm_refuses_to_compile_in_a_capture(monkeypatch):
    import sys
    import types

    calls = []
    stub = types.SimpleNamespace(fp8_gemm_nt=lambda a, b, out: calls.append((a, b, out)))
    monkeypatch.setitem(sys.modules, "deep_gemm", stub)
    monkeypatch.setattr(platform, "package_version", lambda name: None)  # of no known version
    monkeypatch.setattr(deep_gemm, "compiled", set())
    args = fp8(3, 256), torch.rand(3, 2), fp8(136, 256), torch.rand(2, 2)
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    with pytest.raises(RuntimeError, match=r"M=3, N=136, K=256.*before the capture"):
        deep_gemm.block_scaled_mm(*args, out_dtype=torch.bfloat16)
    capturing[0] = False
    deep_gemm.block_scaled_mm(*args, out_dtype=torch.bfloat16)
    capturing[0] = True
    out = deep_gemm.block_scaled_mm(*args, out_dtype=torch.bfloat16)
    assert len(calls) == 2
    assert out.shape == (3, 136)
    assert calls[1][0][1].stride() == (2, 1)


def test_the_cuda_library_is_not_loaded_in_a_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(cuda_build, "load", lambda: pytest.fail("it was loaded"))
    with pytest.raises(RuntimeError, match="call the op once before the capture"):
        library.load_cuda.__wrapped__()


def test_no_tokens_reach_no_implementation(monkeypatch):
    """Nothing is launched: a grid without blocks is an error that stays with the CUDA context."""
    for implementation in custom_ops.ops()["group_quant"].implementations:
        refuses = lambda *args, name=implementation.name, **kwargs: pytest.fail(f"{name} ran")  # noqa: E731
        monkeypatch.setitem(implementation.__dict__, "function", refuses)
    x = bf16(0, 256, device=DEVICE)
    q, scale = custom_ops.group_quant(x, 128)
    assert (q.shape, scale.shape, q.dtype) == ((0, 256), (0, 2), torch.float8_e4m3fn)
    with pytest.raises(pytest.fail.Exception, match="ran"):
        custom_ops.group_quant(bf16(1, 256, device=DEVICE), 128)


SOURCES = (
    "library.py",
    "csrc/one.cu",
    "csrc/two.cuh",
    "csrc/three.h",
    "csrc/four.cpp",
    "tables/sm_90.json",
)


@pytest.mark.parametrize("changed", SOURCES)
def test_source_hash_covers_every_source(monkeypatch, tmp_path, changed):
    for name in SOURCES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("before")
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    before = library.source_hash.__wrapped__()
    assert before == library.source_hash.__wrapped__()
    (tmp_path / changed).write_text("after")
    assert before != library.source_hash.__wrapped__()


def test_the_package_has_no_other_kind_of_source():
    root = Path(library.__file__).parent
    kinds = {path.suffix for path in root.rglob("*") if path.is_file()}
    assert kinds - {".pyc"} <= {Path(name).suffix for name in SOURCES} | {".typed", ""}
