"""Runs every snippet of README.md and CONTRIBUTING.md, and checks that the README's generated parts are fresh."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusion_passes
from bench import readme

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md")

SCRIPT = """
import torch

with torch.no_grad():
    torch.compile(torch.nn.functional.silu)(torch.ones(4))
"""


def snippets(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def test_every_snippet_has_a_language_that_is_run():
    for document in DOCUMENTS:
        fences = re.findall(r"^```(.*)$", (ROOT / document).read_text(), flags=re.MULTILINE)
        assert set(fences[::2]) == {"python", "sh"}
        assert set(fences[1::2]) == {""}


@pytest.fixture
def llama():
    """What the README's reader has: a stock model in bfloat16, and tokens for it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    return {"torch": torch, "model": model, "tokens": torch.randint(64, (1, 5))}


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_snippets(document, llama):
    """In order and in one namespace, as somebody who follows the document would type them."""
    from fusion_passes import registered

    before = dict(registered._registered)
    try:
        for index, snippet in enumerate(snippets(document, "python")):
            exec(compile(snippet, f"{document}, snippet {index}", "exec"), llama)
        if document == "README.md":
            # the last snippets leave the compiled model: it still runs, quantized since
            with torch.no_grad():
                logits = torch.compile(llama["model"], backend="fusion_passes")(
                    llama["tokens"]
                ).logits
            assert logits.isfinite().all()
    finally:
        registered._registered.clear()
        registered._registered.update(before)
        torch.compiler.reset()
        fusion_passes.reset_reports()


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_shell_snippets(document, tmp_path):
    """`make` only says what it would run: CI runs it, and it would run this test."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "MAKEFLAGS": "n", "MAKELEVEL": "0"}
    for snippet in snippets(document, "sh"):
        command = ["bash", "-euo", "pipefail", "-c", snippet]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{snippet}\n{done.stdout}\n{done.stderr}"
        assert done.stdout


def test_generated_parts_of_the_readme_are_fresh():
    text = readme.README.read_text()
    assert readme.render(text) == text, "README.md is stale: run `make readme`"


def test_a_readme_without_a_part_is_an_error():
    with pytest.raises(ValueError, match="generated parts"):
        readme.render("# no parts\n")


def test_links_lead_to_files():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text()):
            assert (ROOT / target).exists(), f"{document}: {target}"


def test_the_commands_that_the_text_names_exist():
    makefile = (ROOT / "Makefile").read_text()
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        for target in re.findall(r"`make ([\w-]+)", text):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), (
                f"{document}: make {target}"
            )
        for file in re.findall(r"`((?:tests|bench|custom_ops|fusion_passes)/[\w/.]*)`", text):
            assert (ROOT / file).exists(), f"{document}: {file}"
