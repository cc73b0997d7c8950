"""The target that this machine is."""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

import torch

from custom_ops import cuda_build
from custom_ops.jit.kernel import Target


def here() -> Target:
    """The current GPU as a target; one of arch "cpu" where there is none."""
    arch = cuda_build.current_arch()
    if arch is None:
        return Target("cpu")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Target(arch, properties.multi_processor_count, _driver(), properties.name)


@functools.cache
def _driver() -> str:
    """The version of NVIDIA's driver: what the kernel module says, or else nvidia-smi."""
    try:
        said = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
        except (OSError, subprocess.TimeoutExpired):
            said = ""
    found = re.search(r"\d+\.\d+(\.\d+)?", said)
    return found.group(0) if found else "unknown"
