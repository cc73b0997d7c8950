"""Cases of Triton's part of a warm-up, for a machine without a GPU: run by test_jit_triton.py in a process of its own.

The other tests have Triton's interpreter, which compiles nothing. Here Triton compiles, for the H100 of
triton_machine.py. A case is a function of `FILES` whose name begins with `case_`; each has an empty cache, and what
it raises is its answer.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

from custom_ops import monitor
from tests.custom_ops import triton_planning_cases, triton_running_cases
from tests.custom_ops.triton_machine import define_ops, launched, loaded, pretend

FILES = (triton_planning_cases, triton_running_cases)


def main() -> None:
    pretend()
    define_ops()
    cases = {k: v for file in FILES for k, v in vars(file).items() if k.startswith("case_")}
    answers = {}
    for name, case in cases.items():
        monitor.disarm()
        loaded.clear()
        launched.clear()
        os.environ.pop("TRITON_CACHE_DIR", None)
        with tempfile.TemporaryDirectory() as folder:
            os.environ["CUSTOM_OPS_CACHE_DIR"] = folder
            try:
                case()
                answers[name] = ""
            except BaseException:
                answers[name] = traceback.format_exc()
    Path(sys.argv[1]).write_text(json.dumps(answers))
