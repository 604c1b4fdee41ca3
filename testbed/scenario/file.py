"""From a TOML file and overrides to a scenario, or to the list of everything that is wrong with them.

Rule 1: every problem is reported at once, one line each, with the path of the key that has it.
Rule 2: an override names a key as `section.key` or `section.list.INDEX.key`; it is checked like the file.
Rule 3: the name of a varied scenario is computed from what was varied, never written by hand.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from testbed.documents import Model
from testbed.errors import UsageError, did_you_mean
from testbed.scenario.balloon_keys import Balloon
from testbed.scenario.document import (
    SECTIONS,
    WORKLOADS,
    Guest,
    Scenario,
    conflicts,
    conflicts_of_faults,
    conflicts_of_legs,
)
from testbed.scenario.fault_keys import KINDS
from testbed.scenario.host_keys import host_conflicts
from testbed.scenario.migration_keys import CHECKED_KEYS, Migration

EXAMPLES = Path("scenarios")  # in a clone; below the directory in which the command runs
SomeModel = TypeVar("SomeModel", bound=Model)
TYPE_NAMES = {"int": "a whole number", "float": "a number", "string": "a text", "bool": "true or false"}


def load(path: Path, overrides: Sequence[str] = (), unnamed: Sequence[str] = ()) -> Scenario:
    """Reads a scenario file and applies overrides, see `parse`. Raises UsageError with every problem."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        meant = _meant(path) if isinstance(error, FileNotFoundError) else ""
        raise UsageError(f"{path}: cannot read the scenario: {reason}{meant}") from error
    try:
        return parse(text, default_name=path.stem, overrides=overrides, unnamed=unnamed)
    except UsageError as error:
        raise UsageError(*(f"{path}: {problem}" for problem in error.problems)) from None


def _meant(path: Path) -> str:
    """Which file there is for one that is not: beside it with its suffix, or an example by its name."""
    beside = path.with_suffix(".toml")
    if beside.is_file():
        return f"; did you mean '{beside}'?"
    examples = (example.stem for example in EXAMPLES.glob("*.toml"))
    return did_you_mean(path.stem, examples, f"{EXAMPLES}/{{}}.toml")


def parse(
    text: str, *, default_name: str, overrides: Sequence[str] = (), unnamed: Sequence[str] = ()
) -> Scenario:
    """The scenario that `text` (TOML) and the `key=value` overrides describe.

    Both kinds of override are applied; those in `unnamed` do not appear in the scenario's name.

    Raises:
        UsageError: with every problem.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"not valid TOML: {error}") from error
    document.setdefault("name", default_name)
    problems: list[str] = []
    varied: dict[str, object] = {}
    for override in (*unnamed, *overrides):
        try:
            key, value = split_override(override)
            set_key(document, key, value)
            if override in overrides:
                varied[key] = value
        except UsageError as error:
            problems.extend(error.problems)
    varied.pop("name", None)
    if isinstance(document["name"], str):
        document["name"] = varied_name(document["name"], varied)
    scenario, more = validate(document)
    problems.extend(more)
    if problems or scenario is None:
        raise UsageError(*problems)
    return scenario


def validate(document: Mapping[str, Any]) -> tuple[Scenario | None, list[str]]:
    """The scenario, or None, and every problem as one line."""
    problems: list[str] = []
    scenario: Scenario | None = None
    try:
        scenario = Scenario.model_validate(document)
    except ValidationError as error:
        problems = [_explain(details) for details in error.errors()]
    found = conflicts(
        _part(Guest, document, "guest", ("memory", "kind", "workload")),
        _part(Balloon, document, "balloon", tuple(Balloon.model_fields)),
        _part(Migration, document, "migration", CHECKED_KEYS),
        document.get("expect", "completed"),
    )
    problems += [f"{path}: {problem}" for path, problem in found]
    if scenario is not None:
        more = (
            *conflicts_of_legs(scenario),
            *conflicts_of_faults(scenario),
            *host_conflicts(scenario.hosts, scenario.guest.kind, scenario.guest.memory),
        )
        problems += [f"{path}: {problem}" for path, problem in more]
    return (None if problems else scenario), problems


def split_override(text: str) -> tuple[str, object]:
    """("guest.memory", "2GiB") of "guest.memory=2GiB"; the value is TOML where it is, else a text."""
    key, separator, value = text.partition("=")
    key = key.strip()
    if not separator or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise UsageError(f"'{text}' is no override; write key=value, as in migration.skip=hint")
    return key, parse_value(value.strip())


def parse_value(text: str) -> object:
    """A value of the command line: a TOML value such as 3, 0.5 or true, otherwise the text itself."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, int | float | str | bool | list | dict) else text


def set_key(document: dict[str, Any], key: str, value: object) -> None:
    """Sets one key in place; tables that do not exist are made, list items must exist."""
    *parents, last = key.split(".")
    place: Any = document
    for depth, part in enumerate(parents):
        if isinstance(place, dict):
            place = place.setdefault(part, {})
        else:
            place = place[_index(place, part, ".".join([*parents[: depth + 1]]))]
        if not isinstance(place, dict | list):
            raise UsageError(f"{key}: '{'.'.join(parents[: depth + 1])}' is a value, not a table")
    if isinstance(place, dict):
        place[last] = value
    else:
        place[_index(place, last, key)] = value


def varied_name(base: str, varied: Mapping[str, object]) -> str:
    """The name of a scenario with these keys varied: demo, {migration.skip: hint} -> demo-skip-hint."""
    shown = [base]
    for key, value in varied.items():
        short = _shortest_tail(key, varied)
        shown.append(f"{short}-{value}")
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", "-".join(shown))[:100]


def _shortest_tail(key: str, keys: Mapping[str, object]) -> str:
    parts = key.split(".")
    for length in range(1, len(parts) + 1):
        tail = parts[-length:]
        if sum(other.split(".")[-length:] == tail for other in keys) == 1:
            return ".".join(tail)
    return key


def _index(items: list[Any], part: str, path: str) -> int:
    if not part.isdecimal() or int(part) >= len(items):
        have = f"0 to {len(items) - 1}" if items else "none: the list is empty"
        raise UsageError(f"{path}: '{part}' is no item of this list; items are {have}")
    return int(part)


def _part(
    model: type[SomeModel], document: Mapping[str, Any], name: str, keys: Sequence[str]
) -> SomeModel | None:
    """A section with only the keys that checks across fields look at, or None when one of those is invalid.

    So a mistake elsewhere in the section does not hide what is wrong between these.
    """
    section = document.get(name, {})
    if not isinstance(section, Mapping):
        return None
    try:
        return model.model_validate({key: section[key] for key in keys if key in section})
    except ValidationError:
        return None


def _explain(error: ErrorDetails) -> str:
    """One pydantic error as a line for people: `path: what is wrong`."""
    location = list(error["loc"])
    # A tagged union adds the tag to the path; a reader looks for the key as it stands in the file.
    of_fault = location[:1] == ["fault"]
    at = 2 if of_fault else 3
    tagged = (of_fault or location[:2] == ["guest", "workload"]) and len(location) > at
    tag = str(location.pop(at)) if tagged else None
    if error["type"].startswith("union_tag"):
        location.append("kind" if of_fault else "name")
    path = ".".join(str(part) for part in location) or "scenario"
    if error["type"] == "extra_forbidden":
        return f"{path}: {_unknown_key(location, tag)}"
    return f"{path}: {problem_of(error)}"


def problem_of(error: ErrorDetails) -> str:
    """What is wrong with one value, for people, without its path."""
    value, kind = error.get("input"), error["type"]
    match kind:
        case "missing":
            return "is missing"
        case "union_tag_not_found":
            text = f"is missing; one of {_tags(error)}"
        case "union_tag_invalid":
            what = "fault" if error["loc"][0] == "fault" else "workload"
            text = f"{error['ctx']['tag']!r} is no {what}; one of {_tags(error)}"
        case "literal_error":
            text = f"{value!r} is not one of {error['ctx']['expected']}"
        case "value_error":
            text = str(error["ctx"]["error"])
        case _ if kind.endswith("_type"):
            wanted = TYPE_NAMES.get(kind.removesuffix("_type"), "a table" if "model" in kind else kind[:-5])
            text = f"{value!r} is not {wanted}"
        case _:
            message = error["msg"][:1].lower() + error["msg"][1:]
            text = f"{value!r}: {message.replace('input should', 'should')}"
    return text


def _tags(error: ErrorDetails) -> str:
    return ", ".join(KINDS if error["loc"][0] == "fault" else WORKLOADS)


def _unknown_key(location: Sequence[str | int], tag: str | None) -> str:
    model: type[Model] = Scenario
    if tag is not None:
        model = KINDS[tag] if location[0] == "fault" else WORKLOADS[tag]
    elif len(location) > 1:
        model = SECTIONS.get(str(location[0]), Scenario)
    known = [field.alias or name for name, field in model.model_fields.items()]
    hint = did_you_mean(str(location[-1]), known) or f"; known keys: {', '.join(known)}"
    return f"unknown key{hint}"
