"""Whatever changes what the pass does is in its key for Inductor's cache, and nothing else is."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch

from custom_ops import library
from fusion_passes import (
    Constraint,
    Fusion,
    Pattern,
    Tensor,
    cache_key,
    registry,
    settings,
    torch_internals,
)
from fusion_passes.manager import FusionPass
from fusion_passes.settings import Settings
from tests.fusion_passes.helpers import (
    random,
    registered,
    silu_mul,
)

pytestmark = pytest.mark.usefixtures("references", "fresh_reports")

GATED = (random(6, 256), random(6, 256, seed=1))
SILU = registry()["silu_mul"]


def uuid(**options) -> str | None:
    return FusionPass(settings.resolve(options, registry())[0]).uuid()


@pytest.mark.parametrize(
    "options",
    [
        {"fusions": "all"},
        {"fusions": "-rms_norm"},
        {"rms_norm": True},
        {"rms_norm": False},
        {"allow_reference": True},
        {"verify": True},
        {"verify": "raise"},
        {"strict": True},  # what is found under it has passed it
    ],
)
def test_what_changes_the_graph_is_in_the_key(options):
    assert uuid(**options) != uuid()


@pytest.mark.parametrize("options", [{"report": True}, {"warmup": "skip"}, {"fusions": "default"}])
def test_nothing_else_is_in_the_key(options):
    assert uuid(**options) == uuid()


def test_what_is_to_be_dumped_is_not_taken_from_the_cache():
    assert uuid(dump="graphs") is None


def test_the_key_knows_implementations_versions_and_sources(monkeypatch):
    before = uuid()
    monkeypatch.setenv("CUSTOM_OPS_DISABLE", "triton")
    assert uuid() != before
    monkeypatch.undo()
    monkeypatch.setattr(cache_key, "source_hash", lambda: "another")
    assert uuid() != before
    monkeypatch.undo()
    monkeypatch.setattr(cache_key, "_versions", lambda: ("another",))
    assert uuid() != before


@pytest.mark.parametrize("changed", ["cache_key.py", "passes/one.py", "tables/sm_90.json"])
def test_every_source_and_table_is_in_the_key(monkeypatch, tmp_path, changed):
    for name in ("cache_key.py", "passes/one.py", "tables/sm_90.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("before")
    monkeypatch.setattr(cache_key, "__file__", str(tmp_path / "cache_key.py"))
    before = cache_key.source_hash.__wrapped__()
    (tmp_path / changed).write_text("after")
    assert cache_key.source_hash.__wrapped__() != before
    monkeypatch.setattr(library, "source_hash", lambda: "another")
    (tmp_path / changed).write_text("before")
    assert cache_key.source_hash.__wrapped__() != before  # the kernels' sources


def test_the_key_follows_the_settings_in_force():
    """The options for stock Inductor read the settings at each compilation."""
    late = FusionPass()
    before = late.uuid()
    with settings.patch(rms_norm=True):
        assert late.uuid() != before
    assert late.uuid() == before


def _pattern(scale, function=torch.tanh):
    return Pattern(lambda x: function(x) * scale, {"x": Tensor("num_tokens", "width")}, name="p")


def _times(scale):
    return {
        2: lambda m: (m.emit(torch.ops.aten.mul.Tensor, m.tensor("x"), 2.0),),
        3: lambda m: (m.emit(torch.ops.aten.mul.Tensor, m.tensor("x"), 3.0),),
    }[scale]


MINE = Fusion("mine", "a third party's", 3, patterns=(_pattern(2.0),), rewrite=_times(2))
CHANGES = {
    "a constant of the rewrite": dataclasses.replace(MINE, rewrite=_times(3)),
    "a name in the rewrite": dataclasses.replace(
        MINE, rewrite=lambda m: (m.emit(torch.ops.aten.add.Tensor, m.tensor("x"), 2.0),)
    ),
    "a value that the pattern closes over": dataclasses.replace(MINE, patterns=(_pattern(4.0),)),
    "another function in the pattern": dataclasses.replace(
        MINE, patterns=(_pattern(2.0, torch.sigmoid),)
    ),
    "a constraint": dataclasses.replace(MINE, constraints=(Constraint(lambda match: False, str),)),
    "its order": dataclasses.replace(MINE, priority=5),
    "shared values": dataclasses.replace(MINE, allow_shared=True),
    "a transform instead": Fusion("mine", "a third party's", 3, transform=lambda graph: []),
    "a rewrite of ours": dataclasses.replace(SILU, name="mine"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_key_changes_with_somebody_elses_fusion(change):
    with registered(MINE):
        before = uuid()
        assert before != uuid(mine=True)
    with registered(CHANGES[change]):
        assert uuid() != before


def test_transforms_that_differ_have_other_keys():
    keys = set()
    for transform in (lambda graph: [], lambda graph: (graph.lint(), [])[1]):
        with registered(Fusion("mine", "a third party's", 3, transform=transform)):
            keys.add(uuid())
    assert len(keys) == 2


def test_the_key_of_the_same_code_is_the_same_in_another_process():
    """Compiling the same source again gives new function objects at new addresses."""
    source = "def make(s):\n    return lambda m: (m.emit(max, (lambda v: v + s)(m.tensor('x'))),)\nrewrite = make(2)\n"
    keys = set()
    for _ in range(2):
        scope: dict = {"__name__": "theirs"}
        exec(source, scope)
        with registered(dataclasses.replace(MINE, rewrite=scope["rewrite"])):
            keys.add(uuid())
    assert len(keys) == 1


class Theirs(torch_internals.CustomGraphPass):
    def __init__(self, key):
        self.key = key

    def __call__(self, graph):
        self.seen = graph

    def uuid(self):
        return self.key


def test_a_pass_of_the_users_is_part_of_the_key():
    current = settings.current()
    one, other = (FusionPass(current, after=Theirs(key)).uuid() for key in ("one", "other"))
    assert len({one, other, FusionPass(current).uuid()}) == 3
    assert (
        FusionPass(current, after=lambda graph: None).uuid() is None
    )  # nothing is known of it: never cached
    assert FusionPass(current, after=Theirs(None)).uuid() is None


def test_a_pass_of_the_users_runs_first():
    theirs = Theirs("one")
    graph = torch_internals.capture(silu_mul, *GATED)[0].graph
    FusionPass(Settings(), after=theirs)(graph)
    assert theirs.seen is graph


@pytest.mark.parametrize("copied", [lambda p: pickle.loads(pickle.dumps(p)), copy.deepcopy])
def test_a_pass_can_be_pickled(copied):
    current = settings.resolve(
        {"fusions": "all,-rms_norm", "silu_mul": True, "allow_reference": True, "dump": "graphs"},
        registry(),
    )[0]
    for fusion_pass in (FusionPass(current), FusionPass()):
        again = copied(fusion_pass)
        assert again.uuid() == fusion_pass.uuid()
        assert again.settings == fusion_pass.settings
