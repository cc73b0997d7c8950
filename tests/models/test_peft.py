"""PEFT models as they are: adapters found in the graph, and mixed batches in a model with slots."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fusion_passes
from fusion_passes import verify
from fusion_passes.lora import AdapterError, AdapterManager, from_peft
from fusion_passes.testing import fuse
from tests.models.zoo import build, fp8_matches, tokens

pytest.importorskip("transformers", reason="needs the extra 'models'")
peft = pytest.importorskip("peft", reason="needs the extra 'models'")

LAYERS = 2
KINDS = ("llama", "qwen3")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(autouse=True)
def references(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FUSION_PASSES_ALLOW_REFERENCE", "1")
    monkeypatch.setenv("CUSTOM_OPS_DISABLE", "triton")  # its interpreter takes minutes for a model
    yield
    torch.compiler.reset()


def config(rank: int = 8, targets: tuple[str, ...] = ALL, **options: Any) -> Any:
    defaults = {"lora_alpha": 24, "init_lora_weights": False}
    return peft.LoraConfig(r=rank, target_modules=[*targets], **{**defaults, **options})


def adapted(
    kind: str = "llama",
    adapter: str = "float32",
    scheme: str = "bf16",
    order: str = "before",
    layers: int = LAYERS,
    **options: Any,
) -> Any:
    """A model with one adapter. scheme: of its linears; order: whether they were quantized before PEFT or after."""
    model = copy.deepcopy(build(kind, scheme if order == "before" else "bf16", layers))
    torch.manual_seed(1)
    wide = adapter == "float32"
    adapted_model = peft.get_peft_model(model, config(**options), autocast_adapter_dtype=wide)
    if scheme != "bf16" and order == "after":
        fusion_passes.quantize_(adapted_model, scheme)
    assert adapted_dtype(adapted_model) is (torch.float32 if wide else torch.bfloat16)
    return adapted_model.eval()


def adapted_dtype(model: Any) -> torch.dtype:
    return next(p.dtype for name, p in model.named_parameters() if "lora_A" in name)


def everything() -> list[fusion_passes.Fusion]:
    return list(fusion_passes.registry().values())


def implementations(report: fusion_passes.Report) -> list[str]:
    return [
        i for site in report.sites if site.fusion == "lora_linear" for i in site.implementations
    ]


# One adapter, in the graph


@pytest.mark.parametrize("adapter", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_is_found(kind: str, adapter: str) -> None:
    result = fuse(adapted(kind, adapter), tokens(7), use_cache=False, only=everything())
    norms = {"llama": 1, "qwen3": 1 + 2 * LAYERS}[kind]
    expected = {"lora_linear": 7 * LAYERS, "add_rms_norm": 2 * LAYERS, "rms_norm": norms}
    # q, k and v; gate and up: a site for each that joins another
    expected |= {"silu_mul": LAYERS, "shared_lora_shrink": 3 * LAYERS}
    assert result.report.matches == expected, result.report
    assert set(implementations(result.report)) == {"lora_linear_single:reference"}
    assert not [m for m in result.report.near_misses if m.fusion == "lora_linear"]
    targets = [str(node.target) for node in result.after.graph.nodes]
    assert targets.count("custom_ops.lora_linears_single.default") == 2 * LAYERS
    assert targets.count("custom_ops.lora_linear_single.default") == 2 * LAYERS  # o and down
    (eager,), (actual,), (judge,) = result.expected, result.actual, result.judge
    assert verify.difference(eager, actual) is None
    ours, eagers = (
        float((side.double() - judge).norm() / judge.norm()) for side in (actual, eager)
    )
    assert ours <= 1.02 * eagers + 1e-4


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("adapter", ["float32", "bfloat16"])
def test_over_block_fp8_linears(adapter: str, order: str) -> None:
    model = adapted("llama", adapter, "fp8_block", order)
    result = fuse(model, tokens(7), use_cache=False, only=everything())
    matches, linears = result.report.matches, 7 * LAYERS
    assert matches["lora_linear"] == matches["block_scaled_linear"] == linears, result.report
    assert matches["shared_group_quant"] == fp8_matches(LAYERS)["shared_group_quant"]
    # the base reads what a norm returns in FP8, the adapter as it is: one kernel makes both
    assert matches["add_rms_norm_group_quant"] == 2 * LAYERS - 1
    assert matches["rms_norm_group_quant"] == 1
    kept = [s for s in result.report.sites if s.fusion.endswith("rms_norm_group_quant")]
    assert all("rms_norm_and_group_quant" in s.implementations[0] for s in kept)
    assert set(implementations(result.report)) == {"lora_add_single:reference"}
    (eager,), (actual,), (judge,) = result.expected, result.actual, result.judge
    ours, eagers = (
        float((side.double() - judge).norm() / judge.norm()) for side in (actual, eager)
    )
    assert ours <= 1.15 * eagers + 1e-3, f"{ours:.4f} from float64, eager {eagers:.4f}"


def test_quantizing_leaves_adapters_as_they_are() -> None:
    model = adapted("llama", "bfloat16", "fp8_block", "after")
    kinds = {
        name.split(".")[-2 if "lora_" in name else -1]: type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert kinds == {
        "lora_A": "Linear",
        "lora_B": "Linear",
        "base_layer": "Fp8BlockLinear",
        "lm_head": "Linear",
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "rsLoRA": {"use_rslora": True, "rank": 16},
    "rank 1": {"rank": 1},
    "unscaled": {"lora_alpha": 8},
    "attention only": {"targets": ("q_proj", "v_proj")},
    "dropout, which eval leaves out": {"lora_dropout": 0.3},
    "biases on q, k and v": {"kind": "qwen2"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_adapters_of_every_kind(name: str) -> None:
    options = OPTIONS[name]
    result = fuse(adapted(**options), tokens(7), use_cache=False, only=everything())
    assert result.report.matches["lora_linear"] == len(options.get("targets", ALL)) * LAYERS
    assert set(implementations(result.report)) == {"lora_linear_single:reference"}
    assert verify.difference(result.expected[0], result.actual[0]) is None


def test_what_is_no_plain_lora_stays() -> None:
    torch.compiler.reset()
    fusion_passes.reset_reports()
    model = adapted(use_dora=True, targets=("v_proj",))
    compiled = torch.compile(model, backend="fusion_passes", options={"fusions": "all"})
    with torch.no_grad():
        expected = model(tokens(7), use_cache=False).logits
        assert max(errors(compiled(tokens(7), use_cache=False).logits, expected)) < 0.02
    assert not any("lora_linear" in report.matches for report in fusion_passes.reports())


@pytest.mark.filterwarnings("ignore:.*lora_bias.*")
def test_a_bias_of_the_adapter_is_a_near_miss() -> None:
    result = fuse(adapted(lora_bias=True), tokens(7), use_cache=False, only=everything())
    reasons = [m.reason for m in result.report.near_misses if m.fusion == "lora_linear"]
    assert reasons.count("lora_B of the adapter has a bias (lora_bias)") >= 7 * LAYERS


@pytest.mark.parametrize("adapter", ["float32", "bfloat16"])
def test_dynamic_shapes_take_no_more_graphs_than_stock(adapter: str) -> None:
    from torch._dynamo.testing import CompileCounter

    model, counter, lengths = adapted("llama", adapter), CompileCounter(), (7, 1, 2, 33)
    with torch.no_grad():
        torch.compiler.reset()
        stock = torch.compile(model, backend=counter, dynamic=True)
        expected = {length: stock(tokens(length), use_cache=False).logits for length in lengths}
        torch.compiler.reset()
        fusion_passes.reset_reports()
        options = {"fusions": "all"}
        compiled = torch.compile(model, backend="fusion_passes", dynamic=True, options=options)
        for length in lengths:
            actual = compiled(tokens(length), use_cache=False).logits
            error = (actual.double() - expected[length].double()).norm() / expected[
                length
            ].double().norm()
            assert error < 0.02, f"{length} tokens: logits differ by {error:.3%}"
    assert len(fusion_passes.reports()) <= counter.frame_count
    for report in fusion_passes.reports():
        assert report.matches["lora_linear"] == 7 * LAYERS, report


# Mixed batches

NAMES = ["one", "__base__", "two", "three", "one"]


def mixed(
    scheme: str = "bf16",
    adapter: str = "float32",
    saved: list[str] | None = None,
    layers: int = LAYERS,
) -> Any:
    """A model with three adapters that differ in rank, scaling and targets."""
    model = copy.deepcopy(build("llama", scheme, layers))
    wide = {"autocast_adapter_dtype": adapter == "float32"}
    torch.manual_seed(1)
    result = peft.get_peft_model(model, config(8, modules_to_save=saved), "one", **wide)
    result.add_adapter(
        "two", config(3, ("q_proj", "down_proj"), use_rslora=True, modules_to_save=saved), **wide
    )
    result.add_adapter(
        "three", config(16, ("v_proj",), lora_alpha=64, modules_to_save=saved), **wide
    )
    for name, parameter in result.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return result.eval().requires_grad_(False)


def batch(rows: int, length: int) -> torch.Tensor:
    return torch.cat([tokens(length * rows)]).view(rows, length)


def errors(actual: torch.Tensor, expected: torch.Tensor) -> list[float]:
    """Row by row, the norm of the difference over the norm."""
    pairs = zip(actual.double(), expected.double(), strict=True)
    return [float((a - e).norm() / e.norm()) for a, e in pairs]


@pytest.mark.parametrize("saved", [None, ["lm_head"]], ids=["", "modules_to_save"])
@pytest.mark.parametrize("adapter", ["float32", "bfloat16"])
def test_from_peft_computes_what_peft_computes(adapter: str, saved: list[str] | None) -> None:
    model, ids = mixed(adapter=adapter, saved=saved), batch(5, 6)
    judge = copy.deepcopy(model).double()(ids, adapter_names=NAMES, use_cache=False).logits
    peft_logits = model(ids, adapter_names=NAMES, use_cache=False).logits
    manager = from_peft(model)
    actual = manager(ids, adapter_names=NAMES, use_cache=False).logits
    assert [info.name for info in manager.list() if info.slot is not None] == [
        "one",
        "two",
        "three",
    ]
    assert torch.equal(actual[1], peft_logits[1])  # the base model
    for ours, theirs in zip(errors(actual, judge), errors(peft_logits, judge), strict=True):
        assert ours <= 1.15 * theirs + 1e-3, f"{ours:.4f} from float64, PEFT {theirs:.4f}"
    # not by chance: rows would be far off with another adapter
    others = [NAMES[(index + 2) % 5] for index in range(5)]
    wrong = manager(ids, adapter_names=others, use_cache=False).logits
    assert min(errors(wrong, judge)) > 0.2


def test_from_peft_over_block_fp8_linears() -> None:
    model, ids = mixed("fp8_block"), batch(5, 6)
    judge = copy.deepcopy(model).double()(ids, adapter_names=NAMES, use_cache=False).logits
    expected = errors(model(ids, adapter_names=NAMES, use_cache=False).logits, judge)
    manager = from_peft(model)
    eager = errors(manager(ids, adapter_names=NAMES, use_cache=False).logits, judge)
    fusion_passes.reset_reports()
    manager.compile(fullgraph=True, options={"fusions": "all"})
    compiled = errors(manager(ids, adapter_names=NAMES, use_cache=False).logits, judge)
    for ours in (eager, compiled):  # one draw of quantization errors against another
        assert sum(ours) <= 1.25 * sum(expected), f"{ours} from float64, PEFT {expected}"
    matches = fusion_passes.report().matches
    assert matches["block_scaled_linear"] == 7 * LAYERS
    assert matches["shared_lora_shrink"] == 3 * LAYERS


def test_from_peft_compiles_once() -> None:
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    model, ids, counter = mixed(), batch(2, 6), CompileCounter()
    pairs = (["one", "two"], ["two", None], ["three", "one"], [None, None])
    expected = [
        model(ids, adapter_names=[n or "__base__" for n in names], use_cache=False).logits
        for names in pairs
    ]
    manager = from_peft(model, max_loaded=4, max_resident=2)
    manager.compile(backend=counter, fullgraph=True)
    for names, logits in zip(pairs, expected, strict=True):
        actual = manager(ids, adapter_names=names, use_cache=False).logits
        assert max(errors(actual, logits)) < 0.05
    assert counter.frame_count == 1


def test_generate() -> None:
    """Greedily, without a cache: token by token what the model's own forward says, each row with its adapter."""
    manager, ids = from_peft(mixed()), batch(3, 5)
    names = ["two", None, "one"]
    generated = manager.generate(
        ids,
        adapter_names=names,
        max_new_tokens=4,
        do_sample=False,
        use_cache=False,
        eos_token_id=None,
    )
    expected = ids
    for _ in range(4):
        logits = manager(expected, adapter_names=names, use_cache=False).logits
        expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(generated, expected)
    assert "forward" not in manager.model.__dict__
    manager.remove_all()


def test_generate_with_a_cache_and_beams() -> None:
    manager, ids = from_peft(mixed()), batch(2, 5)
    generated = manager.generate(
        ids,
        adapter_names=["two", "one"],
        max_new_tokens=3,
        num_beams=2,
        do_sample=False,
        eos_token_id=None,
    )
    assert generated.shape == (2, 8)
    assert torch.equal(generated[:, :5], ids)


def test_a_saved_folder_is_the_same_adapter(tmp_path: Path) -> None:
    model, ids = mixed(saved=["lm_head"]), batch(3, 4)
    model.save_pretrained(tmp_path)
    first = from_peft(model)
    second = AdapterManager(
        copy.deepcopy(build("llama", "bf16", LAYERS)),
        max_loaded=3, max_resident=3, modules_to_save=["lm_head"],
    )  # fmt: skip
    for name in ("one", "two", "three"):
        second.add(name, tmp_path / name)
    names = ["three", "one", "two"]
    with torch.no_grad():
        logits = [m(ids, adapter_names=names, use_cache=False).logits for m in (first, second)]
    assert torch.equal(*logits)


def test_a_scale_that_was_set_is_kept() -> None:
    model = mixed()
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("one", 0.25)
    ids = batch(1, 4)
    expected = model(ids, adapter_names=["one"], use_cache=False).logits
    actual = from_peft(model)(ids, adapter_names=["one"], use_cache=False).logits
    assert max(errors(actual, expected)) < 0.05


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_from_peft_of_an_initialisation_that_changed_the_base(init: str) -> None:
    """The base weights lack what the adapter began with, and the model has them as they are."""
    wide = copy.deepcopy(build("llama", "bf16", 1)).float()
    model = peft.get_peft_model(wide, config(init_lora_weights=init)).bfloat16().eval()
    for name, parameter in model.requires_grad_(False).named_parameters():
        if "lora_B" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    ids = batch(1, 4)
    expected = model(ids, use_cache=False).logits
    actual = from_peft(model)(ids, adapter_names=["default"], use_cache=False).logits
    assert max(errors(actual, expected)) < 0.05


def test_from_peft_of_a_model_that_loaded_adapters_itself() -> None:
    """`add_adapter` and `load_adapter` of transformers put PEFT's layers into the model, without a PeftModel."""
    model = copy.deepcopy(build("llama", "bf16", 1))
    torch.manual_seed(1)
    model.add_adapter(config(), "one")
    model.add_adapter(config(3, ("q_proj",)), "two")
    model.eval().requires_grad_(False)
    ids, expected = batch(2, 4), []
    for row, name in enumerate(("two", "one")):
        model.set_adapter(name)
        expected.append(model(ids[row : row + 1], use_cache=False).logits)
    actual = from_peft(model)(ids, adapter_names=["two", "one"], use_cache=False).logits
    assert max(errors(actual, torch.cat(expected))) < 0.05


def test_a_manager_over_layers_of_peft_is_refused() -> None:
    model = copy.deepcopy(build("llama", "bf16", 1))
    model.add_adapter(config())
    for each in (model.bfloat16(), adapted(adapter="bfloat16", layers=1)):
        with pytest.raises(ValueError, match=r"q_proj has adapters of PEFT; accepted: .*from_peft"):
            AdapterManager(each, max_loaded=1, max_resident=1)


def gpt2() -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_head": 4, "n_positions": 64, "n_layer": 1, "vocab_size": 128}
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes, **ids))
    return model.bfloat16().eval().requires_grad_(False)


@pytest.mark.parametrize("compiled", [False, True])
def test_linears_of_gpt2(compiled: bool, tmp_path: Path) -> None:
    """Conv1D, a linear whose weight is transposed: with adapters of a PEFT model, and of a folder."""
    names = ("c_attn", "c_proj", "c_fc")
    model = peft.get_peft_model(gpt2(), config(4, names, fan_in_fan_out=True), "one").eval()
    model.add_adapter("two", config(8, ("c_attn",), fan_in_fan_out=True))
    model.requires_grad_(False).save_pretrained(tmp_path)
    ids, rows = batch(3, 5) % 128, ["two", None, "one"]
    asked = [name or "__base__" for name in rows]
    expected = model(ids, adapter_names=asked, use_cache=False).logits
    judge = copy.deepcopy(model).double()(ids, adapter_names=asked, use_cache=False).logits
    loaded = AdapterManager(gpt2(), max_loaded=2, max_resident=2)
    loaded.add("one", tmp_path / "one")
    loaded.add("two", tmp_path / "two")
    for manager in (from_peft(model), loaded):
        if compiled:
            manager.compile(fullgraph=True)
        with torch.no_grad():
            actual = manager(ids, adapter_names=rows, use_cache=False).logits
        for ours, theirs in zip(errors(actual, judge), errors(expected, judge), strict=True):
            assert ours <= 1.15 * theirs + 2e-3
    wrong = loaded(ids, adapter_names=["one", "one", None], use_cache=False).logits
    assert min(errors(wrong, judge)) > 0.1


def test_a_head_saved_with_its_base_weight(tmp_path: Path) -> None:
    model = peft.get_peft_model(
        copy.deepcopy(build("llama", "bf16", 1)), config(targets=("q_proj", "lm_head"))
    )
    model.eval().save_pretrained(tmp_path)
    targets = {"target_modules": ["q_proj", "lm_head"], "max_loaded": 1, "max_resident": 1}
    manager = AdapterManager(copy.deepcopy(build("llama", "bf16", 1)), **targets)
    manager.add("a", tmp_path)
    ids = batch(1, 4)
    expected = model(ids, use_cache=False).logits
    assert max(errors(manager(ids, adapter_names=["a"], use_cache=False).logits, expected)) < 0.05
    other = copy.deepcopy(build("llama", "bf16", 1))
    other.lm_head.weight.data *= 2
    with pytest.raises(AdapterError, match=r"another lm_head\.base_layer\.weight"):
        AdapterManager(other, **targets).add("a", tmp_path)


@pytest.mark.parametrize("adapter", ["float32", "bfloat16"])
def test_a_compiled_model_follows_its_adapters(adapter: str) -> None:
    """Switched, disabled, merged, two at once, deleted: what eager computes then, in no more graphs than stock."""
    from torch._dynamo.utils import counters

    ids, graphs = tokens(6), {}
    options: dict[str, Any] = {"options": {"fusions": "all"}, "backend": "fusion_passes"}
    for side, how in (("stock", {"backend": "aot_eager"}), ("ours", options)):
        torch.compiler.reset()
        counters.clear()
        model = adapted(adapter=adapter, layers=1)
        model.add_adapter("two", config(4), autocast_adapter_dtype=adapter == "float32")
        compiled = torch.compile(model.eval(), **how)

        def follows(name: str, model: Any = model, compiled: Any = compiled) -> None:
            with torch.no_grad():
                pair = compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits
            assert max(errors(*pair)) < 0.05, name

        follows("the first")
        model.set_adapter("two")
        follows("the second")
        with model.disable_adapter():
            follows("disabled")
        model.merge_adapter()
        follows("merged")
        model.unmerge_adapter()
        model.base_model.set_adapter(["default", "two"])
        follows("both")
        model.delete_adapter("two")
        model.set_adapter("default")
        follows("deleted")
        graphs[side] = counters["stats"]["unique_graphs"]
    assert graphs["ours"] <= graphs["stock"]


def test_training_is_left_as_it_is() -> None:
    """Gradients reach the adapters: what a fusion makes has none, and stays out of such a graph."""
    model = adapted(layers=1, init_lora_weights=True).train()
    ids = tokens(6)

    def gradients(call: Any) -> dict[str, torch.Tensor]:
        model.zero_grad()
        call(ids, use_cache=False).logits.float().square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients(model)
    fusion_passes.reset_reports()
    compiled = torch.compile(model, backend="fusion_passes", options={"fusions": "all"})
    actual = gradients(compiled)
    assert actual.keys() == expected.keys()
    assert len(actual) == 14
    for name, gradient in expected.items():
        error = float((actual[name] - gradient).norm() / (gradient.norm() + 1e-12))
        assert error < 0.05, name
    assert not any("lora_linear" in report.matches for report in fusion_passes.reports())


def untouched(model: Any, error: type[Exception], words: str) -> None:
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=words):
        from_peft(model)
    assert [name for name, _ in model.named_modules()] == before


def test_what_cannot_be_converted_is_refused_and_stays() -> None:
    untouched(build("llama", "bf16", LAYERS), TypeError, "accepted: a peft.PeftModel")
    untouched(adapted(use_dora=True), AdapterError, "DoRA is not supported")
    merged = adapted()
    merged.merge_adapter()
    untouched(merged, AdapterError, "has merged adapters: call unmerge_adapter")
    embedding = copy.deepcopy(build("llama", "bf16", LAYERS))
    embedding = peft.get_peft_model(embedding, config(targets=("embed_tokens",)))
    untouched(embedding, AdapterError, "embed_tokens is a Embedding over a Embedding")
    wide = copy.deepcopy(build("llama", "bf16", LAYERS)).float()
    untouched(peft.get_peft_model(wide, config()), ValueError, r"computes in torch\.float32")
