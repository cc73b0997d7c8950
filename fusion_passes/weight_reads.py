"""Which linears of a model do more than multiply: their weight is read by the code around them as well.

T5 casts what goes into ``self.wo`` to ``self.wo.weight.dtype``, Mamba multiplies by ``self.dt_proj.weight`` itself,
and torch's ``TransformerEncoderLayer`` hands both of its weights to one op, where nothing is trained.
Where such a weight became 8-bit codes, a model would compute with codes that nobody scaled, and say nothing.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator

from torch import nn

_SETTING_UP = {
    "__init__",
    "__repr__",
    "_init_weights",
    "extra_repr",
    "init_weights",
    "reset_parameters",
    "tie_weights",
}


def weights_read(model: nn.Module) -> dict[str, str]:
    """{name of a linear: class whose code reads its weight}, of what the sources of a model's classes show.

    What reads ``self.x.weight`` only while it sets the model up does not count. A class without sources has no reads.
    """
    found: dict[str, str] = {}
    reads: dict[type, set[str]] = {}
    for prefix, module in model.named_modules():
        owner = type(module)
        if owner not in reads:
            reads[owner] = _reads(owner)
        for path in reads[owner]:
            name = f"{prefix}.{path}".lstrip(".")
            try:
                target = model.get_submodule(name)
            except AttributeError:
                continue
            if isinstance(target, nn.Linear):
                found[name] = owner.__name__
    return found


def _reads(owner: type) -> set[str]:
    """The paths x of ``self.x.weight`` in the methods that a class has or inherits."""
    paths: set[str] = set()
    overridden: set[str] = set()
    for base in owner.__mro__:
        if base in (nn.Module, object):
            continue
        for name, method in vars(base).items():
            if inspect.isfunction(method) and name not in overridden | _SETTING_UP:
                paths.update(_paths(method))
            overridden.add(name)
    return paths


def _paths(method: object) -> Iterator[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(method))))  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node.attr != "weight":
            continue
        names: list[str] = []
        inner = node.value
        while isinstance(inner, ast.Attribute):
            names.append(inner.attr)
            inner = inner.value
        if names and isinstance(inner, ast.Name) and inner.id == "self":
            yield ".".join(reversed(names))
