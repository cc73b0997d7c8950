"""A model with slots: what it refuses, and in which order it may be asked what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fusion_passes.lora import AdapterCacheFull, AdapterManager
from tests.fusion_passes.lora.adapters import model
from tests.fusion_passes.lora.managers import SOURCES, assert_close, expected, managed, tokens

pytestmark = pytest.mark.usefixtures("references")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_rank": 0}, "max_rank is 0; accepted: 1 to 256"),
        ({"max_rank": 257}, "max_rank is 257; accepted: 1 to 256"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        (
            {"target_modules": ["q_proj", "query"]},
            "target_modules names 'query', which is no module",
        ),
        ({"target_modules": ["embed"]}, "target_modules names 'embed', which is a Embedding"),
        ({"modules_to_save": ["layers"]}, "modules_to_save names layers, a ModuleList"),
        ({"modules_to_save": ["head"]}, "modules_to_save names 'head', which is no module"),
    ],
)
def test_arguments_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    base = model()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=words):
        AdapterManager(base, **{"max_loaded": 2, "max_resident": 1, **options})
    assert [name for name, _ in base.named_modules()] == names


def test_a_model_of_another_dtype() -> None:
    with pytest.raises(
        ValueError, match=r"layers\.0\.q_proj computes in torch\.float32; accepted: torch\.bfloat16"
    ):
        AdapterManager(model().float(), max_loaded=1, max_resident=1)
    mixed = model()
    mixed.layers[1].half()
    with pytest.raises(
        ValueError, match=r"layers\.1\.q_proj computes in torch\.float16; accepted: torch\.bfloat16"
    ):
        AdapterManager(mixed, max_loaded=1, max_resident=1)


def test_one_manager_a_model() -> None:
    manager = managed()
    with pytest.raises(ValueError, match="has an AdapterManager already"):
        AdapterManager(manager.model, max_loaded=1, max_resident=1)


def test_a_model_without_linears() -> None:
    with pytest.raises(ValueError, match=r"no torch\.nn\.Linear"):
        AdapterManager(nn.Sequential(nn.LayerNorm(4)), max_loaded=1, max_resident=1)


STEPS = {
    r"num_tokens is \[1\] for 2 adapters": (["wide", None], [1]),
    r"num_tokens is \[-1\]": (["wide"], [-1]),
    "num_tokens sums to 65; accepted: up to max_tokens=64": (["wide"], 65),
    "adapters has 3 different ones; accepted: up to max_resident=2": (["wide", "two", "head"], 1),
}


@pytest.mark.parametrize("words", STEPS)
def test_steps_that_do_not_fit(words: str) -> None:
    manager = managed(resident=2)
    names, counts = STEPS[words]
    with pytest.raises(ValueError, match=words), manager.step(names, counts):
        pass
    assert all(info.slot is None for info in manager.list())


def test_an_unknown_adapter_names_those_that_are_known() -> None:
    manager = managed()
    with pytest.raises(
        KeyError, match="no adapter 'french' is loaded; loaded: small, wide, two, head"
    ):
        manager(tokens(1, 2), adapter_names=["french"])
    with pytest.raises(ValueError, match="'wide' is loaded already"):
        manager.add("wide", SOURCES["wide"])
    with torch.no_grad():
        manager(tokens(1, 2), adapter_names=["wide"])  # nothing is stuck


@pytest.mark.parametrize("count", [0, 3])
def test_names_for_other_rows(count: int) -> None:
    with pytest.raises(ValueError, match=f"adapter_names has {count} names for 2 rows"):
        managed()(tokens(2, 2), adapter_names=["wide"] * count)


def test_rows_that_cannot_be_told() -> None:
    with pytest.raises(ValueError, match="pass input_ids or inputs_embeds"):
        managed()(torch.zeros(3, dtype=torch.int64), adapter_names=["wide"])


def test_a_step_within_a_step() -> None:
    manager = managed()
    with (
        manager.step(["wide"]),
        pytest.raises(RuntimeError, match="a step is running in this thread"),
    ):
        manager.step(["two"]).__enter__()
    with manager.step(["two"]):
        pass


def test_a_step_that_fails_gives_its_slots_back() -> None:
    manager = managed(resident=1)

    def fails() -> None:
        with manager.step(["wide"]):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    manager.activate("two")


def test_what_a_step_uses_stays() -> None:
    manager, ids = managed(resident=2, max_loaded=4), tokens(1, 3)
    with torch.no_grad(), manager.step(["wide"], 3):
        manager.pin("two")
        with pytest.raises(AdapterCacheFull, match="in use by a running step: wide"):
            manager.activate("small")
        manager.remove("wide")
        with pytest.raises(AdapterCacheFull, match="and 1 that were removed"):
            manager.activate("small")
        assert_close(manager.model(ids), expected("wide", ids))
    assert manager.activate("small") == 0


def test_moving_the_model_afterwards_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="move the model before it gets an AdapterManager"):
        managed().model.to("meta")
    manager = managed()
    manager.model.to(torch.bfloat16).to("cpu").eval()
    slots = [m for m in manager.model.modules() if hasattr(m, "lora_a")]
    assert all(m.scaling.dtype is torch.float32 and m.ranks.dtype is torch.int32 for m in slots)
