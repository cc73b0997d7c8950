"""PEFT models with slots: mixed batches, and what is converted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import fusion_passes
from fusion_passes.lora import AdapterError, AdapterManager, from_peft
from tests.models.peft_zoo import LAYERS, NAMES, adapted, batch, config, errors, mixed
from tests.models.zoo import build

peft = pytest.importorskip("peft", reason="needs the extra 'models'")
pytestmark = pytest.mark.usefixtures("references")


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
