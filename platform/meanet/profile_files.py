"""Profiles as files: profiles.yaml beside this one, and a user's own in the same form. The home of yaml."""

import functools
import math
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from meanet.config import EnergyConfig
from meanet.errors import UserError
from meanet.profiles import Blocks, DeviceProfile, LinkProfile, PerMacDevice, Profiles, TimedDevice


@functools.cache
def built_in() -> Profiles:
    """Those of profiles.yaml."""
    return parse((resources.files("meanet") / "profiles.yaml").read_text(encoding="utf-8"), "profiles.yaml")


def available(own: str | None = None) -> Profiles:
    """The built-in profiles and a user's own.

    Args:
        own: a YAML file, or its text (which has line ends); None = built-in ones only.

    Raises:
        UserError: the file cannot be read, is not of the form, or gives a name that exists.
    """
    if own is None:
        return built_in()
    inline = "\n" in own
    where = "the recipe's own profiles" if inline else own
    mine, theirs = parse(own if inline else _read(own), where), built_in()
    for what, ours, known in (("device", mine.devices, theirs.devices), ("link", mine.links, theirs.links)):
        clash = sorted(set(ours) & set(known))
        if clash:
            raise UserError(f"{where}: {what} {clash[0]!r} exists already: give yours another name")
    return Profiles({**theirs.devices, **mine.devices}, {**theirs.links, **mine.links})


def embed(config: EnergyConfig) -> EnergyConfig:
    """The config with the text of the file that it names, so that a recipe holds its numbers wherever it goes.

    Raises:
        UserError: the file cannot be read, or is not of the form.
    """
    if config.profiles is None or "\n" in config.profiles:
        return config
    available(config.profiles)
    return replace(config, profiles=_read(config.profiles).rstrip("\n") + "\n")


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"energy.profiles: {path} does not exist: give a YAML file of profiles") from error
    except (OSError, ValueError) as error:
        raise UserError(f"energy.profiles: {path} cannot be read ({error}): give a YAML file of profiles") from error


def parse(text: str, where: str) -> Profiles:
    """Profiles of a YAML text.

    Args:
        text: as profiles.yaml has it.
        where: what to call it in a message.

    Raises:
        UserError: it is not of the form; the message says where.
    """
    plain = _mapping(_load(text, where), where, ("sources", "devices", "links"))
    sources = _mapping(plain.get("sources"), f"{where}: sources")
    for key, citation in sources.items():
        if not isinstance(citation, str) or not citation.strip():
            raise UserError(f"{where}: sources.{key} is {citation!r}: say where the numbers come from, in words")
    reader = _Reader(where, sources)
    devices = {name: reader.device(name, each) for name, each in reader.section(plain, "devices")}
    links = {name: reader.link(name, each) for name, each in reader.section(plain, "links")}
    if not devices and not links:
        raise UserError(f"{where} has neither devices nor links: give one or more")
    return Profiles(devices, links)


def _load(text: str, where: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """As SafeLoader, but a key given twice is a mistake."""

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        pairs = [(loader.construct_object(key), loader.construct_object(value, deep=True)) for key, value in node.value]
        keys = [str(key) for key, _ in pairs]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise UserError(f"{where}: {twice!r} is given twice: keep one")
        return {str(key): value for key, value in pairs}

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(text, Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is no YAML: {' '.join(str(error).split())}") from error


def _mapping(plain: Any, where: str, known: tuple[str, ...] | None = None) -> dict[str, Any]:
    if plain is None:
        return {}
    if not isinstance(plain, dict):
        raise UserError(f"{where} is {plain!r}: give `name: value` lines")
    unknown = sorted(set(plain) - set(known)) if known is not None else []
    if unknown:
        raise UserError(f"{where} has an unknown field {unknown[0]!r}: choose from {', '.join(known or ())}")
    return plain


_KINDS = {
    "per_mac": (("joules_per_mac",), ("joules_per_byte", "macs_per_second")),
    "timed": (("watts", "seconds.main", "seconds.adaptive", "seconds.extension"), ()),
}
_LINK = (("upload_mbps", "alpha_mw_per_mbps", "beta_mw"), ("isolated_joules", "tail_seconds", "rtt_seconds"))
"""Numbers that must and that may be given."""
_ABOVE_ZERO = ("upload_mbps", "macs_per_second")


class _Reader:
    """Checked profiles out of one file's plain content."""

    def __init__(self, where: str, sources: dict[str, str]) -> None:
        self._where, self._sources = where, sources

    def section(self, plain: dict[str, Any], name: str) -> list[tuple[str, Any]]:
        """Named profiles of one kind."""
        found = _mapping(plain.get(name), f"{self._where}: {name}")
        for each in found:
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", each):
                raise UserError(f"{self._where}: {name} has the name {each!r}: use letters, digits and _ . - only")
        return list(found.items())

    def device(self, name: str, plain: Any) -> DeviceProfile:
        """One device."""
        where = f"{self._where}: devices.{name}"
        rest = dict(_mapping(plain, where))
        kind = rest.pop("kind", None)
        if kind not in _KINDS:
            raise UserError(f"{where} has kind {kind!r}: choose one of {', '.join(_KINDS)}")
        numbers, sources = self._numbers(where, rest, *_KINDS[kind])
        if kind == "per_mac":
            return PerMacDevice(name, **numbers, sources=sources)
        blocks = {key: numbers[f"seconds.{key}"] for key in ("main", "adaptive", "extension")}
        return TimedDevice(name, numbers["watts"], Blocks(**blocks), sources)

    def link(self, name: str, plain: Any) -> LinkProfile:
        """One link."""
        where = f"{self._where}: links.{name}"
        numbers, sources = self._numbers(where, _mapping(plain, where), *_LINK)
        return LinkProfile(name, **numbers, sources=sources)

    def _numbers(
        self, where: str, plain: dict[str, Any], needed: tuple[str, ...], optional: tuple[str, ...]
    ) -> tuple[dict[str, float], dict[str, str]]:
        given = _flat(plain)
        unknown = [key for key in given if key not in needed + optional]
        missing = [key for key in needed if key not in given]
        if unknown:
            raise UserError(f"{where} has an unknown field {unknown[0]!r}: choose from {', '.join(needed + optional)}")
        if missing:
            raise UserError(f"{where} lacks {missing[0]}: give it as {{value: ..., source: ...}}")
        read = {key: self._number(f"{where}.{key}", key, value) for key, value in given.items()}
        return {key: number for key, (number, _) in read.items()}, {key: source for key, (_, source) in read.items()}

    def _number(self, where: str, key: str, plain: Any) -> tuple[float, str]:
        if not isinstance(plain, dict) or set(plain) != {"value", "source"}:
            raise UserError(f"{where} is {plain!r}: give it as {{value: ..., source: ...}}")
        value, source = _float(plain["value"]), plain["source"]
        if value is None or not math.isfinite(value) or value < 0 or (value == 0 and key in _ABOVE_ZERO):
            wanted = "a number above 0" if key in _ABOVE_ZERO else "a number, 0 or more"
            raise UserError(f"{where} has the value {plain['value']!r}: give {wanted}")
        if source not in self._sources:
            known = ", ".join(self._sources) or "none yet"
            raise UserError(f"{where} names the source {source!r}: add it under sources (there: {known})")
        return value, self._sources[source]


def _flat(plain: dict[str, Any]) -> dict[str, Any]:
    """`{seconds: {main: ...}}` -> `{seconds.main: ...}`; a number's own mapping stays."""
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, dict) and not {"value", "source"} & set(value):
            flat |= {f"{key}.{part}": each for part, each in value.items()}
        else:
            flat[key] = value
    return flat


def _float(value: Any) -> float | None:
    """YAML 1.1 reads 1e-3 as text: a number all the same."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def timed_device(name: str, watts: float, seconds: Blocks, watts_source: str, seconds_source: str) -> str:
    """The YAML text of a file with one timed device."""
    import yaml

    def number(value: float, source: str) -> dict[str, Any]:
        return {"value": value, "source": source}

    blocks = {key: number(value, "seconds") for key, value in vars(seconds).items()}
    device = {"kind": "timed", "watts": number(watts, "watts"), "seconds": blocks}
    sources = {"watts": watts_source, "seconds": seconds_source}
    return str(yaml.safe_dump({"sources": sources, "devices": {name: device}}, sort_keys=False, width=120))
