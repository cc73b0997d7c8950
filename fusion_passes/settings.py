"""Every toggle and environment variable, in one place.

A setting has the same name in the environment (`FUSION_PASSES_VERIFY=1`), in
`settings.patch(verify=True)` and in `torch.compile(..., options={"verify": True})`. Precedence,
setting by setting: options, then patch, then environment, then default. A fusion's own toggle is a
setting too, named after the fusion, and wins over the list in `fusions` wherever either was said.

Nothing is read when this module is imported. `current()` and `resolve()` read the environment on
each call and check all of it: a misspelt variable that is ignored looks exactly like a fusion that
never fires.
"""

from __future__ import annotations

import contextlib
import contextvars
import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "FUSION_PASSES"
OPS_VARIABLES = {
    "CUSTOM_OPS_DISABLE": "implementations to leave out, such as `triton,deep_gemm`",
    "CUSTOM_OPS_CACHE_DIR": "where built kernels go",
    "CUSTOM_OPS_MOE_CHUNK_TOKENS": "how many tokens `fused_moe` works on at a time; 16384 by default",
}


class SettingsError(ValueError):
    """A setting that does not exist or a value that it does not take; says which are accepted."""


class FusionList(NamedTuple):
    """What the `fusions` setting says: where to start from, what to add and what to remove."""

    base: str  # "default", "all" or "none"
    added: frozenset[str]
    removed: frozenset[str]

    @classmethod
    def parse(cls, text: str) -> FusionList:
        """Parses `default`, `all`, `none`, `a,b` (exactly these), `+a,-b` (adjust) or `all,-b`."""
        items = [item.strip() for item in text.split(",") if item.strip()]
        base = items.pop(0) if items and items[0] in ("default", "all", "none") else None
        signed = [item for item in items if item[0] in "+-"]
        plain = [item for item in items if item[0] not in "+-"]
        if plain and (signed or base):
            raise ValueError(f"{plain[0]!r} has no sign, but stands beside {(*signed, base)[0]!r}")
        added = frozenset(plain) | {item[1:].strip() for item in signed if item[0] == "+"}
        removed = frozenset(item[1:].strip() for item in signed if item[0] == "-")
        if added & removed:
            raise ValueError(f"{min(added & removed)!r} is both added and removed")
        return cls(base or ("none" if plain else "default"), added, removed)


def _fusions(value: object) -> str:
    """Checks the form here; the names are checked where the known fusions are at hand."""
    if not isinstance(value, str):
        raise ValueError(f"a {type(value).__name__}, not a string")
    FusionList.parse(value)
    return ",".join(item.strip() for item in value.split(",") if item.strip()) or "default"


def _verify(value: object) -> object:
    words = {"1": "on", "true": "on", "on": "on", "0": "off", "false": "off", "off": "off"}
    return words.get(str(value).lower(), value)


def _setting(default: Any, accepted: str, meaning: str) -> Any:
    return Field(default, description=meaning, json_schema_extra={"accepted": accepted})


class Settings(BaseSettings):
    """The settings in force: immutable. Made by `current()` and `resolve()`, not by hand."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=f"{PREFIX}_",
        env_ignore_empty=True,
        populate_by_name=True,
    )

    fusions: Annotated[str, BeforeValidator(_fusions)] = Field(
        "default",
        validation_alias=PREFIX,
        description="which fusions to run; `+name` / `-name` adjust the default",
        json_schema_extra={
            "accepted": "`default`, `all`, `none`, or a comma list of names or `+name`, `-name`"
        },
    )
    toggles: dict[str, bool] = Field(
        default_factory=dict,
        description="that one fusion on or off; wins over the list",
        json_schema_extra={"accepted": "`1` / `0`"},
    )
    allow_reference: bool = _setting(
        False,
        "`1` / `0`",
        "rewrite even where only the reference implementation exists, such as on a CPU",
    )
    report: Annotated[bool | Path, Field(union_mode="left_to_right")] = _setting(
        False,
        "`1` / `0`, or a path",
        "print the report after each compile, or write it to the path as JSON",
    )
    verify: Annotated[Literal["off", "on", "raise"], BeforeValidator(_verify)] = _setting(
        "off",
        "`1` / `0`, or `raise`",
        "check each rewrite on the spot and undo it with a warning if it differs; or raise",
    )
    strict: bool = _setting(
        False, "`1` / `0`", "a fusion that was named on and fires nowhere is an error"
    )
    dump: Path | None = _setting(
        None, "a folder", "write the graph before and after each pass there"
    )
    warmup: Literal["skip", "relax", "full"] = _setting(
        "skip",
        "`skip`, `relax` or `full`",
        "at the end of each compilation, compile the JIT kernels that its graph reaches: all, or those of "
        "the powers of two and tile boundaries",
    )
    warmup_max_num_tokens: Annotated[int, Field(ge=1)] = _setting(
        8192, "a number", "the most tokens of one call that a warm-up covers"
    )
    warmup_timeout: Annotated[float, Field(ge=0)] = _setting(
        1800.0, "seconds", "how long a warm-up waits for another process that is compiling"
    )
    warmup_strict: bool = _setting(
        False, "`1` / `0`", "a JIT compilation after a warm-up is an error before it starts"
    )

    overlap_from: Annotated[int, Field(ge=1)] = _setting(
        1024,
        "a number",
        "from how many tokens of a rank on `two_batch_overlap` takes them in two halves",
    )

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def fusion_list(self) -> FusionList:
        """The `fusions` setting, parsed."""
        return FusionList.parse(self.fusions)

    @property
    def named_on(self) -> frozenset[str]:
        """The fusions that somebody asked for by name, which `strict` expects to fire."""
        on = {name for name, toggled in self.toggles.items() if toggled}
        return (self.fusion_list.added | on) - (self.toggles.keys() - on)

    def enabled(self, name: str, default_on: bool, why: str = "") -> tuple[bool, str]:
        """Whether fusion `name` may fire, and the reason as a sentence for the report.

        `default_on` and `why` are what the fusion itself says about this device.
        """
        if name in self.toggles:
            return self.toggles[name], self._said(name)
        wanted = self.fusion_list
        if name in wanted.added:
            return True, f"named in {self._said('fusions')}"
        if name in wanted.removed:
            return False, f"removed by {self._said('fusions')}"
        if wanted.base == "default":
            return default_on, f"{'on' if default_on else 'off'} by default" + (
                f": {why}" if why else ""
            )
        on = wanted.base == "all"
        return on, self._said("fusions") if on else f"not in {self._said('fusions')}"

    def by_default(self, name: str) -> bool:
        """Whether nobody said anything of a fusion, so that the tables decide."""
        wanted = self.fusion_list
        named = name in self.toggles or name in wanted.added or name in wanted.removed
        return wanted.base == "default" and not named

    def cache_key(self) -> tuple[Any, ...]:
        """Exactly what changes the compiler's output; the order of a list does not count.

        Strict is part of it: a graph that is found under this key was compiled with it, and so held what was named.
        """
        wanted = self.fusion_list
        return (
            ("fusions", wanted.base, tuple(sorted(wanted.added)), tuple(sorted(wanted.removed))),
            ("toggles", tuple(sorted(self.toggles.items()))),
            ("allow_reference", self.allow_reference),
            ("verify", self.verify),
            ("strict", self.strict),
            ("overlap_from", self.overlap_from),
        )

    def _said(self, name: str) -> str:
        """Where a setting got its value, as the user wrote it."""
        fallback = (
            f"{variable(name)}={self.fusions if name == 'fusions' else int(self.toggles[name])}"
        )
        return self._origins.get(name, fallback)


NAMES = tuple(name for name in Settings.model_fields if name != "toggles")
_patches: contextvars.ContextVar[tuple[dict[str, Any], ...]] = contextvars.ContextVar(
    "fusion_passes_patches", default=()
)


def variable(name: str) -> str:
    """The environment variable of a setting or of a fusion."""
    return PREFIX if name == "fusions" else f"{PREFIX}_{name.upper()}"


def check_fusion_name(name: str) -> None:
    """Raises `SettingsError` for a fusion name that a setting has, or that no variable can have."""
    if name in (*NAMES, "toggles", "default", "all", "none"):
        raise SettingsError(
            f"a fusion cannot be named {name!r}: that is a setting or one of its values"
        )
    if not name.isidentifier() or name != name.lower():
        raise SettingsError(
            f"a fusion cannot be named {name!r}: use lower-case letters, digits and underscores"
        )


def current(known_fusions: Iterable[str] | None = None) -> Settings:
    """The settings from the patches in force, the environment and the defaults.

    Args:
        known_fusions: the names that toggles and lists may hold; all registered fusions if None.
    Raises:
        SettingsError: an unknown `FUSION_PASSES_*` or `CUSTOM_OPS_*` variable, or a bad value.
    """
    return _build({}, known_fusions)


def resolve(
    options: Mapping[str, Any] | None, known_fusions: Iterable[str]
) -> tuple[Settings, dict[str, Any]]:
    """Splits the options of `torch.compile` into the settings in force and what is Inductor's.

    A name that is neither a setting nor a fusion is left to Inductor to take or to reject, unless
    it is a misspelling of one of ours, for Inductor's error would not name the right one.
    """
    known = tuple(known_fusions)
    ours: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in (options or {}).items():
        name = key.replace("-", "_")
        if name in NAMES or name in known:
            ours[name] = value
        elif (near := _nearest(name, (*NAMES, *known))) and not _is_inductor_option(name):
            raise SettingsError(f"options: unknown name {key!r}: did you mean {near!r}?")
        else:
            rest[key] = value
    return _build(ours, known), rest


@contextlib.contextmanager
def patch(**values: Any) -> Iterator[Settings]:
    """Sets settings and fusion toggles inside the `with` block, in this thread or task only.

    >>> with patch(fusions="none", rms_norm=True):
    ...     model(x)
    """
    known = _registered()
    _check_names("settings.patch", values, known)
    token = _patches.set((*_patches.get(), values))
    try:
        yield current(known)
    finally:
        _patches.reset(token)


@contextlib.contextmanager
def naming(name: str, path: object) -> Iterator[None]:
    """A file that cannot be written is an error of the setting that asks for it."""
    try:
        yield
    except OSError as error:
        raise SettingsError(f"{variable(name)}={path} cannot be written: {error}") from error


def environment_table() -> list[tuple[str, str, str]]:
    """(variable, accepted, meaning) for every variable: the table in `docs/configuration.md`."""
    rows = []
    for name, field in Settings.model_fields.items():
        extra = field.json_schema_extra
        accepted = str(extra["accepted"]) if isinstance(extra, dict) else ""
        rows.append(
            (
                f"{PREFIX}_<NAME>" if name == "toggles" else variable(name),
                accepted,
                field.description or "",
            )
        )
    for name, accepted in (
        ("CUSTOM_OPS_DISABLE", "a comma list"),
        ("CUSTOM_OPS_CACHE_DIR", "a folder"),
        ("CUSTOM_OPS_MOE_CHUNK_TOKENS", "a whole number >= 1"),
    ):
        rows.append((name, accepted, OPS_VARIABLES[name]))
    return rows


def _build(options: dict[str, Any], known_fusions: Iterable[str] | None) -> Settings:
    known = _registered() if known_fusions is None else tuple(known_fusions)
    toggles, origins = _read_environment(known)
    values: dict[str, Any] = {}
    layers = [("settings.patch({0}={1!r})", layer) for layer in _patches.get()]
    for spelling, layer in [*layers, ("options={{{0!r}: {1!r}}}", options)]:
        for name, value in layer.items():
            (values if name in NAMES else toggles)[name] = value
            origins[name] = spelling.format(name, value)
    try:
        settings = Settings(toggles=toggles, **values)
    except ValidationError as error:
        raise _bad_value(error, origins) from None
    wanted = settings.fusion_list
    for name in sorted(wanted.added | wanted.removed):
        if name not in known:
            hint = _suggest(name, (*known, "default", "all", "none"))
            raise SettingsError(f"{origins['fusions']}: no fusion named {name!r}{hint}")
    settings._origins.update(origins)
    return settings


def _read_environment(known: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """Checks the names; returns the fusion toggles there, and how each setting is spelt there."""
    settings = {variable(name): name for name in NAMES}
    fusions = {variable(name): name for name in known}
    toggles: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for key, value in sorted(os.environ.items()):
        if f"{key.upper()}_".startswith(f"{PREFIX}_"):
            valid = (*settings, *fusions)
        elif key.upper().startswith("CUSTOM_OPS_"):
            valid = tuple(OPS_VARIABLES)
        else:
            continue
        if key not in valid:  # not even in another case: pydantic-settings reads those
            hint = _suggest(key.upper(), valid)
            raise SettingsError(f"environment: unknown variable {key}{hint}")
        if key in OPS_VARIABLES:
            _check_ops_variable(key)
            continue
        if not value:  # empty is unset
            continue
        name = settings.get(key) or fusions[key]
        origins[name] = f"{key}={value}"
        if key in fusions:
            toggles[name] = value
    return toggles, origins


def _check_ops_variable(name: str) -> None:
    """custom_ops checks its own values, but where it reads them: in a fusion, which would then only not fire."""
    from custom_ops import library  # here, for importing this module must stay cheap
    from custom_ops.moe import parts

    checks = {
        "CUSTOM_OPS_DISABLE": library.check_environment,
        parts.CHUNK_VARIABLE: parts.chunk_tokens,
    }
    try:
        checks.get(name, lambda: None)()
    except ValueError as error:
        raise SettingsError(str(error)) from None


def _bad_value(error: ValidationError, origins: dict[str, str]) -> SettingsError:
    """One sentence on the first bad value: how it was set, the nearest, and what is accepted."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    field = "fusions" if place[0] == PREFIX else place[0]
    name = place[1] if field == "toggles" else field
    extra = Settings.model_fields[field].json_schema_extra
    accepted = str(extra["accepted"]) if isinstance(extra, dict) else ""
    near = (
        ""
        if field == "fusions"
        else _nearest(str(first["input"]), accepted.replace("`", " ").split())
    )
    because = (
        f" ({first['ctx']['error']})"
        if field == "fusions" and "error" in first.get("ctx", {})
        else ""
    )
    hint = f": did you mean {near!r}?" if near else ""
    return SettingsError(
        f"{origins.get(name, name)} is not valid{because}{hint}; accepted: {accepted}"
    )


def _check_names(where: str, values: Iterable[str], known: tuple[str, ...]) -> None:
    valid = (*NAMES, *known)
    for name in values:
        if name not in valid:
            raise SettingsError(f"{where}: unknown setting {name!r}{_suggest(name, valid)}")


def _suggest(name: str, valid: Iterable[str]) -> str:
    names = tuple(valid)
    near = _nearest(name, names)
    return (
        f": did you mean {near!r}?" if near else ""
    ) + f" (accepted: {', '.join(sorted(names)) or 'none'})"


def _nearest(name: str, valid: Iterable[str]) -> str | None:
    found = difflib.get_close_matches(name, tuple(valid), n=1, cutoff=0.75)
    return found[0] if found else None


def _registered() -> tuple[str, ...]:
    from fusion_passes.registered import registry  # here, for it imports this module

    return tuple(registry())


def _is_inductor_option(name: str) -> bool:
    import torch._inductor  # only on the way to an error: importing this module must stay cheap

    return name in torch._inductor.list_options()
