"""Adapters from files: what is accepted, and what is refused by name before anything of it is used."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusion_passes.lora import AdapterError, AdapterManager
from tests.fusion_passes.lora.adapters import PROJECTIONS, model, source, write

ROOT = "base_model.model."


def manager(**options: Any) -> AdapterManager:
    return AdapterManager(
        model(), **{"max_loaded": 2, "max_resident": 1, "max_rank": 16, **options}
    )


def refused(given: Any, words: str, **options: Any) -> None:
    """Refused with these words, and nothing is loaded."""
    loaded = manager(**options)
    loaded.add("other", source(targets=("q_proj",)))
    before = loaded.list(), {n: v.clone() for n, v in loaded.model.named_buffers()}
    with pytest.raises(AdapterError, match=words):
        loaded.add("bad", given)
    assert loaded.list() == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in loaded.model.named_buffers())


@given(
    rank=st.integers(1, 16),
    alpha=st.one_of(st.integers(1, 64), st.floats(0.1, 50)),
    rslora=st.booleans(),
    targets=st.sets(st.sampled_from(sorted(PROJECTIONS)), min_size=1),
    prefix=st.sampled_from((ROOT, "")),
)
def test_scaling_and_factors_are_those_of_peft(
    rank: int, alpha: float, rslora: bool, targets: set[str], prefix: str
) -> None:
    loaded = manager()
    config, tensors = source(
        rank, targets=sorted(targets), lora_alpha=alpha, use_rslora=rslora, prefix=prefix
    )
    loaded.add("a", (config, tensors))
    (info,) = loaded.list()
    assert (info.name, info.rank, info.modules, info.slot) == ("a", rank, 2 * len(targets), None)
    slot = loaded.activate("a")
    for name, layer in loaded._linears.items():
        if name.split(".")[-1] not in targets:
            assert layer.ranks[slot] == 0
            continue
        scaling = torch.tensor(alpha / rank**0.5 if rslora else alpha / rank, dtype=torch.float32)
        assert torch.equal(layer.scaling[slot], scaling)
        given_a = tensors[f"{prefix}{name}.lora_A.weight"]
        assert torch.equal(layer.lora_a[slot, :rank], given_a.bfloat16())


def test_rank_and_alpha_patterns() -> None:
    config, tensors = source(4, targets=("q_proj", "down_proj"))
    for block in (0, 1):
        for factor, cut in (("A", slice(2)), ("B", (slice(None), slice(2)))):
            key = f"{ROOT}layers.{block}.down_proj.lora_{factor}.weight"
            tensors[key] = tensors[key][cut]
    loaded = manager()
    config |= {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {r"layers\.1\.q_proj": 3}}
    loaded.add("a", (config, tensors))
    loaded.activate("a")
    found = {n: (int(m.ranks[0]), float(m.scaling[0])) for n, m in loaded._linears.items()}
    assert found["layers.0.down_proj"] == (2, 4.0)
    assert found["layers.0.q_proj"] == (4, 2.0)
    assert found["layers.1.q_proj"] == (4, 0.75)
    assert found["layers.1.v_proj"] == (0, 0.0)


@pytest.mark.parametrize("style", ["relative", "pathlib"])
def test_a_folder(style: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tensors = source(5)
    folder = write(tmp_path / "adapter", config, tensors)
    monkeypatch.chdir(tmp_path)
    loaded = manager()
    loaded.add("a", "adapter" if style == "relative" else folder)
    assert loaded.list()[0].rank == 5


FEATURES = {
    "DoRA": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "QALoRA": {"use_qalora": True},
    "activated LoRA": {"alora_invocation_tokens": [1, 2]},
    "replicated layers": {"layer_replication": [[0, 1]]},
    "trainable tokens": {"trainable_token_indices": [3]},
    "target_parameters": {"target_parameters": ["mlp.experts"]},
    "bias is 'all'": {"bias": "all"},
    "init_lora_weights is 'pissa_niter_4'": {"init_lora_weights": "pissa_niter_4"},
    "peft_type is 'IA3'": {"peft_type": "IA3"},
    "peft_type is None": {"peft_type": None},
    "lora_alpha of layers.0": {"lora_alpha": "8"},
}


@pytest.mark.parametrize("words", FEATURES)
def test_what_is_no_plain_lora_is_refused_by_name(words: str) -> None:
    refused(source(**FEATURES[words]), words)


def test_what_is_said_of_a_rank_over_the_limit() -> None:
    refused(
        source(17), r"adapter 'bad': layers\.0\.q_proj has rank 17; accepted: up to max_rank=16"
    )


def test_a_rank_that_the_configuration_denies() -> None:
    refused(source(4, r=8), "has rank 4, but adapter_config.json says 8")


def changed(key: str, value: Any) -> Any:
    config, tensors = source()
    if value is None:
        del tensors[f"{ROOT}{key}"]
    else:
        tensors[f"{ROOT}{key}"] = value
    return config, tensors


TENSORS = {
    r"layers\.1\.q_proj\.lora_A has shape \(4, 31\); accepted: \(4, 32\)": (
        "layers.1.q_proj.lora_A.weight", torch.ones(4, 31)
    ),
    r"layers\.1\.q_proj\.lora_B has shape \(47, 4\); accepted: \(48, 4\)": (
        "layers.1.q_proj.lora_B.weight", torch.ones(47, 4)
    ),
    r"layers\.1\.q_proj\.lora_B has shape \(48,\); accepted: 2-D": (
        "layers.1.q_proj.lora_B.weight", torch.ones(48)
    ),
    r"layers\.1\.q_proj has no lora_B": ("layers.1.q_proj.lora_B.weight", None),
    "is torch.int8; accepted: floating-point": (
        "layers.1.q_proj.lora_B.weight", torch.ones(48, 4, dtype=torch.int8)
    ),
    r"lora_A has values that are not finite": (
        "layers.1.q_proj.lora_A.weight", torch.full((4, 32), float("nan"))
    ),
    r"unknown target modules: layers\.2\.q_proj": ("layers.2.q_proj.lora_A.weight", torch.ones(4, 32)),
    r"unknown target modules: score; score of the model take no adapters here": (
        "score.lora_A.weight", torch.ones(4, 32)
    ),
    "it adapts an embedding": ("embed.lora_embedding_A", torch.ones(4, 20)),
    "DoRA is not supported": ("layers.1.q_proj.lora_magnitude_vector", torch.ones(48)),
    r"unknown tensors: layers\.1\.q_proj\.else": ("layers.1.q_proj.else", torch.ones(1)),
}  # fmt: skip


@pytest.mark.parametrize("words", TENSORS)
def test_tensors_that_do_not_fit(words: str) -> None:
    refused(changed(*TENSORS[words]), words)


def test_values_too_large_for_the_dtype_of_the_model() -> None:
    base = model().half()
    loaded = AdapterManager(base, max_loaded=1, max_resident=1, max_rank=16)
    config, tensors = source()
    tensors[f"{ROOT}layers.0.q_proj.lora_B.weight"] *= 1e6
    with pytest.raises(AdapterError, match=r"values that are as torch\.float16 not finite"):
        loaded.add("a", (config, tensors))


def test_a_target_that_no_linear_has() -> None:
    words = "unknown target modules: 'query' is no linear.*accepted: down_proj, q_proj, v_proj"
    config, tensors = source()
    refused((config | {"target_modules": ["q_proj", "query"]}, tensors), words)


def test_a_target_without_slots() -> None:
    refused(
        source(),
        r"unknown target modules: .*v_proj.* take no adapters here",
        target_modules=["q_proj"],
    )


@pytest.mark.parametrize("part", ["layers.0.v_proj", "layers.1.q_proj"])
def test_a_file_that_lacks_a_target(part: str) -> None:
    config, tensors = source()
    kept = {name: value for name, value in tensors.items() if part not in name}
    refused(
        (config, kept), re.escape(f"target_modules names {part}, for which the file has no tensors")
    )


@pytest.mark.parametrize(
    "config",
    [
        {"layers_to_transform": [0]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"exclude_modules": r".*\.1\..*"},
        {"exclude_modules": ["layers.1.q_proj", "1.v_proj", "layers.1.down_proj"]},
        {"target_modules": r"layers\.0\..*_proj"},
        {"target_modules": ["layers.0.q_proj", "layers.0.v_proj", "layers.0.down_proj"]},
    ],
)
def test_a_file_with_the_targets_of_some_layers(config: dict[str, Any]) -> None:
    loaded = manager()
    loaded.add("a", source(blocks=1, **config))
    assert loaded.list()[0].modules == 3


def test_an_empty_file() -> None:
    config, _ = source()
    refused((config | {"target_modules": r"nothing"}, {}), "the file has no lora_A and lora_B")


SAVED = {"score.weight": torch.ones(5, 32), "score.bias": torch.ones(5)}


def test_modules_to_save_need_room() -> None:
    given = source(saved=SAVED, modules_to_save=["score"])
    refused(
        given, r"replaces score altogether \(modules_to_save\).*AdapterManager\(modules_to_save="
    )
    loaded = manager(modules_to_save=["score"])
    loaded.add("a", given)
    loaded.activate("a")
    assert torch.equal(loaded.model.score.saved_weight[0], SAVED["score.weight"].bfloat16())
    assert bool(loaded.model.score.replaced[0])


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({}, "modules_to_save names score, for which the file has no tensors"),
        ({"score.weight": torch.ones(5, 32)}, "score comes with weight; accepted: weight, bias"),
        (
            SAVED | {"score.weight": torch.ones(6, 32)},
            r"score\.weight has shape \(6, 32\); accepted: \(5, 32\)",
        ),
    ],
)
def test_modules_to_save_that_do_not_fit(saved: dict[str, torch.Tensor], words: str) -> None:
    given = source(saved=saved, modules_to_save=["score"])
    refused(given, words, modules_to_save=["score"])


def with_base(weight: torch.Tensor) -> Any:
    """As PEFT saves an adapter of a head or an embedding: with the weight that it is added to."""
    config, tensors = source()
    return config, tensors | {f"{ROOT}layers.1.q_proj.base_layer.weight": weight}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_base_weights_may_be_repeated(dtype: torch.dtype) -> None:
    loaded = manager()
    weight = loaded.model.layers[1].q_proj.weight
    loaded.add("a", with_base(weight.to(dtype)))
    assert loaded.list()[0].modules == 6


@pytest.mark.parametrize("shape", [(48, 32), (47, 32)])
def test_base_weights_may_not_be_changed(shape: tuple[int, int]) -> None:
    words = r"another layers\.1\.q_proj\.base_layer\.weight than the model has.*save_embedding_layers=False"
    refused(with_base(torch.ones(shape)), words)


def broken(folder: Path, name: str, content: bytes | None) -> Path:
    config, tensors = source()
    write(folder, config, tensors)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    return folder


FILES = {
    "has no adapter_config.json": ("adapter_config.json", None),
    "has no adapter_model.safetensors": ("adapter_model.safetensors", None),
    "is no JSON": ("adapter_config.json", b"{"),
    "holds a list": ("adapter_config.json", b"[]"),
    "cannot be read": ("adapter_model.safetensors", b"not a tensor file"),
}


@pytest.mark.parametrize("words", FILES)
def test_files_that_are_not_what_they_should_be(words: str, tmp_path: Path) -> None:
    refused(broken(tmp_path, *FILES[words]), words)


def test_a_pickled_adapter_is_not_run(tmp_path: Path) -> None:
    folder = broken(tmp_path, "adapter_model.safetensors", None)
    (folder / "adapter_model.bin").write_bytes(b"")
    refused(folder, "adapter_model.bin is pickled.*safe_serialization")


def test_a_truncated_file_loads_nothing(tmp_path: Path) -> None:
    config, tensors = source()
    path = write(tmp_path, config, tensors) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(tmp_path, "cannot be read")


def test_a_real_folder_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra 'models'")
    config = peft.LoraConfig(r=6, lora_alpha=9, use_rslora=True, target_modules=["q_proj", "v_proj"],
                             modules_to_save=["score"], init_lora_weights=False)  # fmt: skip
    peft.get_peft_model(model(), config).save_pretrained(tmp_path)
    loaded = manager(modules_to_save=["score"])
    loaded.add("a", tmp_path)
    (info,) = loaded.list()
    assert (info.rank, info.modules) == (6, 5)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert loaded._adapters["a"].factors["layers.0.q_proj"].scaling == saved["lora_alpha"] / 6**0.5


@pytest.mark.parametrize("name", ["", "__base__"])
def test_names_that_mean_something_else(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be named"):
        manager().add(name, source())
