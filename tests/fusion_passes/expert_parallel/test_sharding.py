"""parallelize_experts_: what it takes and refuses, state, and one rank alone, which has all experts."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import fusion_passes
from fusion_passes.expert_parallel import ParallelExperts, sharding
from fusion_passes.expert_parallel.sharding import Share
from fusion_passes.quantize_experts import Fp8BlockExperts
from tests.custom_ops.helpers import assert_same_bits
from tests.models import moe_zoo

pytest.importorskip("transformers", reason="needs the extra 'models'")

STYLES = ("qwen3_moe", "deepseek_v3", "mixtral", "gpt_oss", "nemotron_h")


def experts_of(kind: str, scheme: str = "bf16", **changes) -> nn.Module:
    """The first module of experts of a small model, a copy of its own."""
    model = copy.deepcopy(moe_zoo.build(kind, "fusion_passes", scheme, 1, **changes))
    return next(m for n, m in model.named_modules() if n.endswith("experts"))


def routed(count: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 128, generator=generator).bfloat16()
    ids = torch.rand(count, moe_zoo.EXPERTS, generator=generator).argsort(1)[:, : moe_zoo.TOP_K]
    return x, ids.contiguous(), torch.rand(count, moe_zoo.TOP_K, generator=generator).bfloat16()


@pytest.mark.parametrize("scheme", ["bf16", "fp8_block"])
@pytest.mark.parametrize("kind", STYLES)
def test_one_rank_has_all_and_changes_no_bit(alone, kind, scheme):
    experts = experts_of(kind, scheme)
    with torch.no_grad():
        expected = experts(*routed(9))
        assert fusion_passes.parallelize_experts_(experts, alone) is experts
        assert_same_bits(experts(*routed(9)), expected)


@pytest.mark.parametrize("group", ["name", "object"])
def test_a_group_by_name_or_itself(alone, group):
    experts = experts_of("qwen3_moe")
    given = alone if group == "name" else torch.distributed.group.WORLD
    fusion_passes.parallelize_experts_(experts, given)
    assert experts.share.group == alone


def test_the_module_stays_what_it_was(alone):
    experts = experts_of("qwen3_moe", "fp8_block")
    stock = type(experts)
    fusion_passes.parallelize_experts_(experts, alone)
    assert isinstance(experts, Fp8BlockExperts)
    assert isinstance(experts, ParallelExperts)
    assert isinstance(experts, stock)
    assert "experts 0 to 11 of 12, rank 0 of 1" in repr(experts)


@pytest.mark.parametrize("max_tokens", [0, 16])
def test_the_model_is_one_graph(alone, max_tokens):
    """Without fullgraph=True, which would allow what Dynamo breaks graphs at otherwise."""
    model = copy.deepcopy(moe_zoo.build("qwen3_moe"))
    fusion_passes.parallelize_experts_(model, alone, max_tokens=max_tokens)
    torch._dynamo.reset()
    fusion_passes.reset_reports()
    compiled = torch.compile(model, backend="fusion_passes")
    with torch.no_grad():
        compiled(moe_zoo.tokens(7), use_cache=False)
    assert len(fusion_passes.reports()) == 1


def shares(model: nn.Module, ranks: int) -> list[nn.Module]:
    """What each of so many ranks would keep, in this process."""
    copies = [copy.deepcopy(model) for _ in range(ranks)]
    for rank, each in enumerate(copies):
        for _, experts in list(sharding._experts_of(each)):
            sharding._shard(experts, Share("some group", rank, ranks, moe_zoo.EXPERTS))
    return copies


@pytest.mark.parametrize("scheme", ["bf16", "fp8_block"])
@pytest.mark.parametrize("kind", STYLES)
def test_shares_in_order_are_the_whole(kind, scheme):
    """Of weights, scales and biases alike; what is not experts is whole everywhere, under the same names."""
    whole = copy.deepcopy(moe_zoo.build(kind, scheme=scheme, layers=1))
    states = [each.state_dict() for each in shares(whole, 3)]
    for name, tensor in whole.state_dict().items():
        parts = [state[name] for state in states]
        if ".experts." in name:
            assert {len(part) for part in parts} == {moe_zoo.EXPERTS // 3}
            joined = torch.cat([part.contiguous().view(torch.uint8) for part in parts])
            assert torch.equal(joined, tensor.contiguous().view(torch.uint8))
        else:
            assert all(torch.equal(part, tensor) for part in parts)
    assert all(state.keys() == whole.state_dict().keys() for state in states)


def test_a_share_holds_no_more_memory_than_its_own():
    for each in shares(moe_zoo.build("qwen3_moe", layers=1), 2):
        for _, experts in sharding._experts_of(each):
            weight = experts.gate_up_proj
            assert weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()


@pytest.mark.parametrize("scheme", ["bf16", "fp8_block"])
@pytest.mark.parametrize("assign", [False, True])
def test_state_of_the_whole_model_and_of_this_rank_both_load(scheme, assign):
    source = copy.deepcopy(moe_zoo.build("gpt_oss", scheme=scheme, layers=1))
    wanted = shares(source, 2)[1].state_dict()
    blank = copy.deepcopy(source)
    for tensor in blank.state_dict().values():
        tensor.zero_() if tensor.is_floating_point() else None
    for state in (source.state_dict(), wanted):
        target = shares(blank, 2)[1]
        keys = state.keys()
        assert not any(target.load_state_dict(state, assign=assign))
        assert state.keys() == keys
        for name, tensor in target.state_dict().items():
            assert_same_bits(tensor, wanted[name]) if tensor.is_floating_point() else None
    assert len(source.state_dict()["model.layers.0.mlp.experts.down_proj"]) == moe_zoo.EXPERTS


def test_a_share_is_saved_and_loaded_by_its_tensors():
    model = shares(moe_zoo.build("qwen3_moe", layers=1), 2)[0]
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file)
    assert all(torch.equal(loaded[name], t) for name, t in model.state_dict().items())
    copied = copy.deepcopy(model)
    assert copied.state_dict().keys() == model.state_dict().keys()


def test_on_the_meta_device():
    with torch.device("meta"):
        model = copy.deepcopy(moe_zoo.build("qwen3_moe", layers=1)).to("meta")
    target = shares(model, 2)[1]
    source = moe_zoo.build("qwen3_moe", layers=1)
    target.load_state_dict(source.state_dict(), assign=True)
    wanted = shares(source, 2)[1].state_dict()
    name = "model.layers.0.mlp.experts.down_proj"
    assert_same_bits(target.state_dict()[name], wanted[name])


def test_errors_name_the_module_and_change_nothing(alone, monkeypatch):
    model = copy.deepcopy(moe_zoo.build("qwen3_moe"))
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}

    class Five:
        def size(self):
            return 5

    monkeypatch.setattr(sharding.groups, "resolve", lambda op, group: Five())
    with pytest.raises(
        ValueError,
        match=r"parallelize_experts_: model.layers.0.mlp.experts has 12 experts; accepted: a multiple of the 5 ranks",
    ):
        fusion_passes.parallelize_experts_(model, alone)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == before


def test_sharded_already(alone):
    model = copy.deepcopy(moe_zoo.build("qwen3_moe"))
    fusion_passes.parallelize_experts_(model, alone)
    with pytest.raises(
        ValueError,
        match=r"model.layers.0.mlp.experts is sharded already, over the 1 ranks of group .*; accepted: experts that",
    ):
        fusion_passes.parallelize_experts_(model, alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": "nobody"}, "parallelize_experts_: group is 'nobody'; accepted: the group_name"),
        ({"group": 3}, "parallelize_experts_: group is 3; accepted: a process group, or"),
        ({"mode": "fast"}, "parallelize_experts_: mode is 'fast'; accepted: 'high_throughput'"),
        ({"mode": "low_latency"}, "max_tokens is 0; accepted for mode 'low_latency': 1 or more"),
        ({"max_tokens": -8}, "max_tokens is -8; accepted for mode 'high_throughput': 0, for any"),
        (
            {"model": nn.Linear(2, 2)},
            "parallelize_experts_: Linear has no experts; accepted: a tran",
        ),
    ],
)
def test_errors_say_what_is_accepted(alone, change, message):
    given = {"model": moe_zoo.build("qwen3_moe"), "group": alone, **change}
    with pytest.raises(ValueError, match=message):
        fusion_passes.parallelize_experts_(given.pop("model"), given.pop("group"), **given)


def test_low_latency_is_for_bfloat16(alone):
    experts = experts_of("qwen3_moe").half()
    with pytest.raises(
        ValueError, match=r"gate_up_proj is torch.float16; accepted for mode 'low_l"
    ):
        fusion_passes.parallelize_experts_(experts, alone, mode="low_latency", max_tokens=8)
    assert not isinstance(experts, ParallelExperts)


def test_an_activation_that_fused_moe_does_not_have(alone):
    experts = experts_of("qwen3_moe")
    experts.act_fn = nn.Tanh()
    model = nn.ModuleDict({"block": nn.ModuleDict({"experts": experts})})
    with pytest.raises(
        ValueError, match=r"parallelize_experts_: block.experts: .*is not supported"
    ):
        fusion_passes.parallelize_experts_(model, alone)
    assert not isinstance(experts, ParallelExperts)
