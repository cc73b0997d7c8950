"""The report: what fired where, what it saves, and its forms."""

from __future__ import annotations

import pytest
import sympy
import torch

import fusion_passes
from fusion_passes import (
    registry,
    reporting,
)
from fusion_passes.reporting import NearMiss, Report, Site
from fusion_passes.testing import ModelFragment, fuse
from tests.fusion_passes.helpers import (
    everything,
    fuse_all,
    llama_norm,
    quantize,
    random,
)

pytestmark = pytest.mark.usefixtures("references", "fresh_reports")


def test_the_report():
    module = ModelFragment("norm", "llama", True, 2, 256, 128, torch.bfloat16, 0).eval()
    report = fuse(module, random(4, 256), random(4, 256, seed=1), only=everything()).report
    assert (
        report.matches
        == module.expected
        == {"block_scaled_linear": 2, "add_rms_norm_group_quant": 1, "shared_group_quant": 1}
    )
    by_name = {site.fusion: site for site in report.sites}
    norm = by_name["add_rms_norm_group_quant"]
    assert norm.module == "linears.0"  # where its output is made
    assert norm.implementations == ("add_rms_norm_group_quant:reference",)
    assert norm.sizes == {"num_tokens": "4", "num_groups": "2", "group_size": "128"}
    assert sorted(s.module for s in report.sites if s.fusion == "block_scaled_linear") == [
        "linears.0",
        "linears.1",
    ]
    assert report.bytes_saved["add_rms_norm_group_quant"] == (4 * 4 * 256, 4 * 4 * 256)
    assert report.nodes_after < report.nodes_before
    assert {"canonical", "near_misses", "tidy", *registry()} == report.seconds.keys()
    text = str(report)
    assert all(name in text for name in registry())
    assert "on, and fired nowhere: " in text
    assert f"{4 * 4 * 256:,}" in text


def test_bytes_are_expressions_over_the_sizes_of_the_graph():
    x = random(5, 256)
    torch._dynamo.mark_dynamic(x, 0)
    report = fuse_all(lambda x, w: quantize(llama_norm(x, w)), x, random(256)).report
    saved, here = report.bytes_saved["rms_norm_group_quant"]
    (symbol,) = saved.free_symbols
    assert saved == 4 * 256 * symbol
    assert here == 4 * 256 * 5
    assert isinstance(saved, sympy.Expr)


def test_the_report_is_json():
    report = fuse_all(
        lambda x, w: (*quantize(llama_norm(x, w)), quantize(x, 16)), random(4, 256), random(256)
    ).report
    assert report.near_misses
    assert report.sites
    again = Report.from_json(report.to_json())
    assert again == report
    assert (again.matches, again.bytes_saved, str(again)) == (
        report.matches,
        report.bytes_saved,
        str(report),
    )


def test_reports_are_kept_until_reset():
    with pytest.raises(LookupError, match="no graph was compiled"):
        fusion_passes.report()
    first, second = Report(graph="0/0"), Report(graph="1/0")
    reporting.add(first)
    reporting.add(second)
    assert fusion_passes.report().graph == "1/0"
    assert fusion_passes.reports() == [first, second]
    fusion_passes.reset_reports()
    assert fusion_passes.reports() == []


def test_like_near_misses_share_a_row():
    found = [
        NearMiss("rms_norm", f"layers.{i}", f"mul_{i}", f"mul_{i} has another dtype")
        for i in range(12)
    ]
    text = str(Report(states={"rms_norm": (True, "")}, near_misses=found))
    assert "layers.0 and 11 more" in " ".join(text.split())
    assert "layers.11" not in text


def test_a_site_without_known_sizes_has_no_number():
    sites = [
        Site("rms_norm", "a", bytes_saved="4*u0", bytes_saved_here=None),
        Site("rms_norm", "b", bytes_saved="8", bytes_saved_here=8),
    ]
    saved, here = Report(sites=sites).bytes_saved["rms_norm"]
    assert (str(saved), here) == ("4*u0 + 8", None)


def test_near_misses_of_every_layer_are_one_whatever_other_nodes_they_name():
    found = [
        NearMiss(
            "rms_norm", f"layers.{i}", f"mul_{i}", f"mul_{i} is read by fused_moe_default_{i + 1}"
        )
        for i in range(3)
    ]
    found.append(NearMiss("rms_norm", "head", "mul_7", "mul_7 has 3 rows"))
    found.append(NearMiss("rms_norm", "tail", "mul_8", "mul_8 has 4 rows"))
    text = " ".join(str(Report(states={"rms_norm": (True, "")}, near_misses=found)).split())
    assert "layers.0 and 2 more" in text
    assert "mul_0 is read by fused_moe_default_1" in text
    assert "mul_7 has 3 rows" in text
    assert "mul_8 has 4 rows" in text


def test_brackets_in_a_reason_are_printed():
    """They are no markup of the table."""
    miss = NearMiss("fused_moe", "a", "mul", "one weight has both, [num_experts, hidden_size]")
    text = str(Report(states={"fused_moe": (True, "")}, near_misses=[miss], notes=["[a] note"]))
    assert "[num_experts, hidden_size]" in text
    assert "[a] note" in text


def test_a_fusion_has_a_row_where_it_fired_or_is_off():
    states = {"a": (True, "on by default"), "b": (False, "behind"), "c": (True, "named")}
    report = Report(states=states, sites=[Site("c", "layers.0"), Site("c", "layers.1")])
    lines = str(report).splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert rows == [["c", "2", "0", "", "named"], ["b", "off", "", "", "behind"]]
    assert lines[-1] == "on, and fired nowhere: a"


def test_the_latest_report_tells_of_the_graphs_before_it():
    """A call breaks into graphs, the last of which has nothing to fuse: that is not all there is to say."""
    for fusions in (["a", "b", "a"], ["a"], []):
        reporting.add(Report(sites=[Site(name, "") for name in fusions]))
    (note,) = fusion_passes.report().notes
    assert note == "the latest of 3 graphs; fired in the others (fusion_passes.reports()): 3 a, 1 b"
    assert [report.notes for report in fusion_passes.reports()] == [[], [], []]
    fusion_passes.reset_reports()
    reporting.add(Report())
    assert fusion_passes.report().notes == []
