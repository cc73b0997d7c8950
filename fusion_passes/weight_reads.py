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
            for name, target in _at(module, path.split(".")):
                if isinstance(target, nn.Linear):
                    found[f"{prefix}.{name}".lstrip(".")] = owner.__name__
    return found


def _at(module: nn.Module, path: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """The modules at a path, of which ``*`` is every child, with their names."""
    if not path:
        yield "", module
        return
    for name, child in module.named_children():
        if path[0] in (name, "*"):
            for rest, target in _at(child, path[1:]):
                yield f"{name}.{rest}".rstrip("."), target


def _reads(owner: type) -> set[str]:
    """The paths x of ``self.x.weight`` in the methods that a class has or inherits.

    And ``layers.*.x`` of ``layer.x.weight`` in a loop over ``self.layers``.
    """
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
    loops: dict[str, set[str]] = {}
    for name, paths in _loops(tree):
        loops.setdefault(name, set()).update(paths)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node.attr != "weight":
            continue
        base, names = _chain(node.value)
        if names and base == "self":
            yield ".".join(names)
        yield from (".".join([path, "*", *names]) for path in loops.get(base, ()))


def _loops(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """Each name that a loop gives a value, and the paths x of ``self.x`` in what it runs over."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.For, ast.comprehension)):
            chains = [
                _chain(part) for part in ast.walk(node.iter) if isinstance(part, ast.Attribute)
            ]
            paths = [".".join(names) for base, names in chains if base == "self"]
            for target in ast.walk(node.target):
                if isinstance(target, ast.Name):
                    yield target.id, [path for path in paths if path]


def _chain(node: ast.expr) -> tuple[str, list[str]]:
    """("self", ["a", "b"]) of ``self.a.b``; an empty name where it is of no name."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return node.id if isinstance(node, ast.Name) else "", names[::-1]
