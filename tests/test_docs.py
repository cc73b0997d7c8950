"""Runs every snippet of README.md, CONTRIBUTING.md and docs/, and checks that their generated parts are fresh."""

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
from bench import pages, readme
from bench.results import load_all
from bench.suites import suites
from custom_ops import library
from fusion_passes.registered import registry

ROOT = Path(__file__).parent.parent
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *PAGES)

SCRIPT = """
import torch

with torch.no_grad():
    torch.compile(torch.nn.functional.silu)(torch.ones(4))
"""


def snippets(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def having(language: str) -> list[str]:
    return [document for document in DOCUMENTS if snippets(document, language)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_snippet_has_a_language_that_is_run(document):
    fences = re.findall(r"^```(.*)$", (ROOT / document).read_text(), flags=re.MULTILINE)
    assert set(fences[::2]) <= {"python", "sh"}
    assert set(fences[1::2]) <= {""}


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
@pytest.mark.parametrize("document", having("python"))
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
@pytest.mark.parametrize("document", having("sh"))
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


def test_generated_parts_are_fresh():
    texts = readme.documents()
    stale = [path.name for path, text in readme.render(texts).items() if text != texts[path]]
    assert not stale, "run `make readme`"


@pytest.mark.parametrize("texts", [("# no parts\n",), None])
def test_a_part_that_is_missing_or_there_twice_is_an_error(texts):
    found = readme.documents()
    if texts is None:
        found = {**found, ROOT / "docs" / "again.md": found[readme.README]}
    else:
        found = dict.fromkeys(found, *texts)
    with pytest.raises(ValueError, match="generated parts"):
        readme.render(found)


def test_the_readme_is_short_and_leads_to_every_page():
    text = readme.README.read_text()
    assert text.count("\n") <= 250
    assert set(re.findall(r"\]\((docs/[^)#]+)", text)) == set(PAGES)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files_and_headings(document):
    path = ROOT / document
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", path.read_text()):
        file = path.parent / target if target else path
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
            assert anchor in [
                re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings
            ]


def test_every_fusion_op_and_suite_has_a_page():
    """The page of an op is that of the folder it is in, and a fusion that has an op's name is beside it."""
    for op in library.ops().values():
        assert (op.public.__module__ or "").split(".")[1] in pages.of_name(op.name).families, (
            op.name
        )
    for page in pages.PAGES:
        text = (ROOT / "docs" / f"{page.name}.md").read_text()
        assert text.startswith("# ")
        assert f"<!-- begin: performance_{page.name} -->" in text
    assert all(pages.of_name(name) for name in registry())
    committed = {run.suite for run in load_all()}
    unshown = {name for name in {*suites(), *committed} if pages.of_suite(name) is None}
    assert unshown <= {"compile", "warmup"}, "they have seconds to tell, not ratios"
    with pytest.raises(ValueError, match="'swim' has no page"):
        pages.of_name("swim")


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
