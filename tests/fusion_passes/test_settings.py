"""Settings: names, values, precedence, what they decide and what of them is in the cache key."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from custom_ops import library
from fusion_passes import settings
from fusion_passes.settings import FusionList, SettingsError, resolve

KNOWN = ("rms_norm", "silu_mul", "group_quant")


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch):
    import os

    for name in list(os.environ):
        if name.startswith(("FUSION_PASSES", "CUSTOM_OPS_")):
            monkeypatch.delenv(name)


def test_defaults():
    current, rest = resolve(None, KNOWN)
    assert rest == {}
    assert current.fusions == "default"
    assert current.toggles == {}
    assert (current.allow_reference, current.report, current.strict) == (False, False, False)
    assert (current.verify, current.dump, current.warmup) == ("off", None, "skip")


@pytest.mark.parametrize(
    ("variable", "value", "field", "expected"),
    [
        ("FUSION_PASSES", "all", "fusions", "all"),
        ("FUSION_PASSES", " rms_norm , silu_mul ", "fusions", "rms_norm,silu_mul"),
        ("FUSION_PASSES_ALLOW_REFERENCE", "1", "allow_reference", True),
        ("FUSION_PASSES_REPORT", "1", "report", True),
        ("FUSION_PASSES_REPORT", "0", "report", False),
        ("FUSION_PASSES_REPORT", "out/report.json", "report", Path("out/report.json")),
        ("FUSION_PASSES_VERIFY", "1", "verify", "on"),
        ("FUSION_PASSES_VERIFY", "0", "verify", "off"),
        ("FUSION_PASSES_VERIFY", "raise", "verify", "raise"),
        ("FUSION_PASSES_STRICT", "true", "strict", True),
        ("FUSION_PASSES_DUMP", "graphs", "dump", Path("graphs")),
        ("FUSION_PASSES_WARMUP", "relax", "warmup", "relax"),
        ("FUSION_PASSES_WARMUP_MAX_NUM_TOKENS", "4096", "warmup_max_num_tokens", 4096),
        ("FUSION_PASSES_WARMUP_TIMEOUT", "2.5", "warmup_timeout", 2.5),
        ("FUSION_PASSES_WARMUP_STRICT", "1", "warmup_strict", True),
        ("FUSION_PASSES_RMS_NORM", "0", "toggles", {"rms_norm": False}),
    ],
)
def test_environment(monkeypatch, variable, value, field, expected):
    monkeypatch.setenv(variable, value)
    assert getattr(resolve(None, KNOWN)[0], field) == expected


def test_an_empty_variable_is_unset(monkeypatch):
    monkeypatch.setenv("FUSION_PASSES", "")
    monkeypatch.setenv("FUSION_PASSES_RMS_NORM", "")
    assert resolve(None, KNOWN)[0].cache_key() == settings.Settings().cache_key()


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        (
            "FUSION_PASSES_RMS_NROM",
            "1",
            ["FUSION_PASSES_RMS_NROM", "did you mean 'FUSION_PASSES_RMS_NORM'"],
        ),
        (
            "FUSION_PASSES_VERFY",
            "1",
            ["FUSION_PASSES_VERFY", "did you mean 'FUSION_PASSES_VERIFY'"],
        ),
        (
            "fusion_passes_verify",
            "1",
            ["fusion_passes_verify", "did you mean 'FUSION_PASSES_VERIFY'"],
        ),
        ("FUSION_PASSES_TOGGLES", "{}", ["unknown variable FUSION_PASSES_TOGGLES"]),
        (
            "CUSTOM_OPS_DISABEL",
            "triton",
            ["CUSTOM_OPS_DISABEL", "did you mean 'CUSTOM_OPS_DISABLE'"],
        ),
        (
            "FUSION_PASSES",
            "rms_nrm",
            ["FUSION_PASSES=rms_nrm", "did you mean 'rms_norm'", "silu_mul"],
        ),
        ("FUSION_PASSES", "defualt", ["did you mean 'default'"]),
        ("FUSION_PASSES", "rms_norm,-silu_mul", ["'rms_norm' has no sign", "accepted"]),
        ("FUSION_PASSES", "+rms_norm,-rms_norm", ["both added and removed"]),
        (
            "FUSION_PASSES_RMS_NORM",
            "maybe",
            ["FUSION_PASSES_RMS_NORM=maybe", "accepted: `1` / `0`"],
        ),
        ("FUSION_PASSES_VERIFY", "rais", ["FUSION_PASSES_VERIFY=rais", "did you mean 'raise'"]),
        ("FUSION_PASSES_WARMUP", "ful", ["FUSION_PASSES_WARMUP=ful", "did you mean 'full'"]),
        ("CUSTOM_OPS_DISABLE", "tritn", ["CUSTOM_OPS_DISABLE", "did you mean 'triton'"]),
        ("CUSTOM_OPS_MOE_CHUNK_TOKENS", "0", ["CUSTOM_OPS_MOE_CHUNK_TOKENS", "accepted"]),
        ("FUSION_PASSES_STRICT", "2", ["FUSION_PASSES_STRICT=2", "accepted: `1` / `0`"]),
    ],
)
def test_bad_environment_names_what_is_accepted(monkeypatch, variable, value, words):
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as error:
        resolve(None, KNOWN)
    for word in words:
        assert word in str(error.value)


def test_options_are_split_from_inductors():
    ours = {"fusions": "+rms_norm", "verify": True, "group_quant": False, "allow-reference": True}
    theirs = {"max_autotune": True, "triton.cudagraphs": False, "no_such_option": 1}
    current, rest = resolve({**ours, **theirs}, KNOWN)
    assert rest == theirs
    assert (current.fusions, current.verify, current.allow_reference) == ("+rms_norm", "on", True)
    assert current.toggles == {"group_quant": False}


def test_a_misspelt_option_of_ours_is_not_left_to_inductor():
    with pytest.raises(SettingsError, match="unknown name 'verfy': did you mean 'verify'"):
        resolve({"verfy": True}, KNOWN)
    with pytest.raises(SettingsError, match="unknown name 'rms_nrom': did you mean 'rms_norm'"):
        resolve({"rms_nrom": True}, KNOWN)


def test_an_option_of_inductor_that_resembles_a_fusion_is_left_to_it():
    assert resolve({"epilogue_fusion": True}, ["epilogue_fusions"])[1] == {"epilogue_fusion": True}


def test_a_bad_option_value_names_the_option():
    with pytest.raises(SettingsError, match=r"options=\{'verify': 2\} is not valid"):
        resolve({"verify": 2}, KNOWN)
    with pytest.raises(
        SettingsError, match=r"options=\{'fusions': 3\} is not valid \(a int, not a string\)"
    ):
        resolve({"fusions": 3}, KNOWN)


@given(st.lists(st.sampled_from(["environment", "patch", "options"]), unique=True))
def test_precedence(layers):
    """Options, then patch, then environment, then default, for a setting and for a toggle."""
    strongest = max(layers, key=["environment", "patch", "options"].index, default=None)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(settings, "_registered", lambda: KNOWN)
        if "environment" in layers:
            monkeypatch.setenv("FUSION_PASSES_WARMUP", "relax")
            monkeypatch.setenv("FUSION_PASSES_RMS_NORM", str(int(strongest == "environment")))
        patched = {"warmup": "full", "rms_norm": strongest == "patch"} if "patch" in layers else {}
        options = (
            {"warmup": "skip", "rms_norm": strongest == "options"} if "options" in layers else {}
        )
        with settings.patch(**patched):
            current, _ = resolve(options, KNOWN)
    expected = {"environment": "relax", "patch": "full", "options": "skip", None: "skip"}
    assert current.warmup == expected[strongest]
    assert current.toggles == ({"rms_norm": True} if layers else {})


def test_patches_nest_and_end(monkeypatch):
    monkeypatch.setattr(settings, "_registered", lambda: KNOWN)
    with settings.patch(fusions="none", verify=True):
        with settings.patch(verify="raise") as inner:
            assert (inner.fusions, inner.verify) == ("none", "raise")
        assert settings.current().verify == "on"
    assert settings.current().fusions == "default"


def test_patches_stay_in_their_thread(monkeypatch):
    monkeypatch.setattr(settings, "_registered", lambda: KNOWN)
    seen = []
    with settings.patch(fusions="none"):
        thread = threading.Thread(target=lambda: seen.append(settings.current().fusions))
        thread.start()
        thread.join()
    assert seen == ["default"]


def test_a_bad_patch_raises_where_it_is_made(monkeypatch):
    monkeypatch.setattr(settings, "_registered", lambda: KNOWN)
    with (
        pytest.raises(SettingsError, match="unknown setting 'verfy': did you mean 'verify'"),
        settings.patch(verfy=1),
    ):
        raise AssertionError("entered")
    with pytest.raises(SettingsError, match="number"), settings.patch(warmup_max_num_tokens=0):
        pass
    with pytest.raises(SettingsError, match="accepted: `skip`"), settings.patch(warmup="all"):
        raise AssertionError("entered")
    assert settings.current().warmup == "skip"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (True, "on by default: ahead")),
        ({"fusions": "all"}, (True, "options={'fusions': 'all'}")),
        ({"fusions": "none"}, (False, "not in options={'fusions': 'none'}")),
        ({"fusions": "silu_mul"}, (False, "not in options={'fusions': 'silu_mul'}")),
        ({"fusions": "rms_norm"}, (True, "named in options={'fusions': 'rms_norm'}")),
        ({"fusions": "all,-rms_norm"}, (False, "removed by options={'fusions': 'all,-rms_norm'}")),
        ({"fusions": "none,+rms_norm"}, (True, "named in options={'fusions': 'none,+rms_norm'}")),
        ({"fusions": "all", "rms_norm": False}, (False, "options={'rms_norm': False}")),
    ],
)
def test_enabled_gives_the_reason(options, expected):
    assert resolve(options, KNOWN)[0].enabled("rms_norm", True, "ahead") == expected


def test_the_reason_is_the_variable_as_it_was_set(monkeypatch):
    monkeypatch.setenv("FUSION_PASSES_RMS_NORM", "0")
    monkeypatch.setenv("FUSION_PASSES", "-silu_mul")
    current = resolve(None, KNOWN)[0]
    assert current.enabled("rms_norm", True) == (False, "FUSION_PASSES_RMS_NORM=0")
    assert current.enabled("silu_mul", True) == (False, "removed by FUSION_PASSES=-silu_mul")
    assert current.enabled("group_quant", False, "behind") == (False, "off by default: behind")


def test_named_on_is_what_strict_expects():
    current = resolve({"fusions": "+rms_norm,-silu_mul", "group_quant": True}, KNOWN)[0]
    assert current.named_on == {"rms_norm", "group_quant"}
    assert resolve({"fusions": "rms_norm", "rms_norm": False}, KNOWN)[0].named_on == set()
    assert resolve({"fusions": "all"}, KNOWN)[0].named_on == set()


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"fusions": "all"}, True),
        ({"rms_norm": True}, True),
        ({"allow_reference": True}, True),
        ({"verify": "raise"}, True),
        ({"report": True}, False),
        ({"dump": "folder"}, False),
        ({"strict": True}, True),
    ],
)
def test_the_cache_key_holds_what_changes_the_output(options, changes):
    before = resolve(None, KNOWN)[0].cache_key()
    assert (resolve(options, KNOWN)[0].cache_key() != before) == changes


def test_the_order_of_a_list_is_not_in_the_cache_key():
    one, other = (
        resolve({"fusions": text}, KNOWN)[0] for text in ("rms_norm,silu_mul", "silu_mul, rms_norm")
    )
    assert one.cache_key() == other.cache_key()


@given(st.lists(st.sampled_from(KNOWN), unique=True), st.lists(st.sampled_from(KNOWN), unique=True))
def test_signed_lists_adjust(added, removed):
    removed = [name for name in removed if name not in added]
    text = ",".join([*(f"+{name}" for name in added), *(f"-{name}" for name in removed)])
    assert FusionList.parse(text) == FusionList("default", frozenset(added), frozenset(removed))


@pytest.mark.parametrize("name", ["verify", "all", "Rms_Norm", "rms-norm", "fusions"])
def test_fusion_names_that_cannot_be_settings(name):
    with pytest.raises(SettingsError, match="cannot be named"):
        settings.check_fusion_name(name)


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        settings.Settings().fusions = "all"


def test_the_variables_of_custom_ops_are_those_that_it_knows():
    assert tuple(settings.OPS_VARIABLES) == library.VARIABLES


def test_every_setting_is_in_the_table():
    variables = [row[0] for row in settings.environment_table()]
    assert {settings.variable(name) for name in settings.NAMES} < set(variables)
    assert all(all(row) for row in settings.environment_table())
