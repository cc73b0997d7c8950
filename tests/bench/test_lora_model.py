"""The bench of a whole model with adapters: every way that it has, on tiny sizes, and what it does when time is up."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from bench import lora_model, results

pytest.importorskip("transformers", reason="needs the extra 'models'")
pytest.importorskip("peft", reason="needs the extra 'models'")


@pytest.fixture(autouse=True)
def references(monkeypatch):
    monkeypatch.setenv("FUSION_PASSES_ALLOW_REFERENCE", "1")
    yield
    torch.compiler.reset()


def run(tmp_path, *options: str) -> tuple[int, results.Run]:
    import typer

    app = typer.Typer()
    app.command()(lora_model.main)
    sizes = ["--tiny", "--layers", "1", "--adapters", "2", "--rank", "4", "--tokens", "4"]
    done = CliRunner().invoke(app, [*sizes, "--out", str(tmp_path), *options])
    (session,) = results.load_all(tmp_path)
    return done.exit_code, session


def test_adapters_beside_pefts_mixed_batch(tmp_path):
    """The check of each way compares the two."""
    code, session = run(tmp_path, "--way", "adapters", "--way", "peft_mixed", "--way", "base")
    (row,) = session.rows
    assert (code, row.errors) == (0, {})
    assert set(row.warm_us) == {"adapters", "peft_mixed", "base"}
    assert row.sizes == {"tokens": 4, "adapters": 2, "layers": 1, "rank": 4}
    assert row.ratios["of_base"] == row.warm_us["base"] / row.warm_us["adapters"]


def test_nothing_new_begins_when_time_is_up(tmp_path):
    code, session = run(tmp_path, "--seconds", "0")
    assert code == 0
    assert [row.warm_us for row in session.rows] == [{}]


def test_another_adapter_would_be_seen(tmp_path, monkeypatch):
    """The adapters of a batch are random: a step with those of other rows is far off."""
    original = lora_model.way

    def exchanged(models, name, hidden, names):
        return original(models, name, hidden, names[::-1] if name == "adapters" else names)

    monkeypatch.setattr(lora_model, "way", exchanged)
    code, session = run(tmp_path, "--way", "adapters")
    assert code == 1
    assert "differs from eager" in session.rows[0].errors["adapters"]
