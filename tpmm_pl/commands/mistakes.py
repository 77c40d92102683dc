"""One sentence for what the parser says over many lines about a setting it refuses."""

from __future__ import annotations

import re
from difflib import get_close_matches
from importlib import import_module
from inspect import signature

_OWNER = re.compile(r"Problem with given class_path '(.+)'")
_KEY = re.compile(r'Parser key "([^"]+)":')
_UNKNOWN = re.compile(r"Option '(.+)' is not accepted")
_EXPECTED = re.compile(r"Expected an? (?!path )(.+?)(?:\. Got value: .*)?$")
_VALUE = re.compile(r"(?:Got|Given) value: (?:NestedArg\(.*val=)?(.+?)(?:\. Got value: .*|\))?$")
_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "NoneType": "null",
    "dot import path string": "a class as package.module.Class",
}


def sentence(account: str) -> str:
    """Return what is wrong, where, and the way out.

    Args:
        account: Of jsonargparse 4.53: nested from the outermost setting to the one at fault, then
            back out. What has another form is returned in one line.
    """
    keys: list[str] = []
    owner = ""
    expected: list[str] = []
    for line in account.splitlines():
        if owner and (found := _UNKNOWN.search(line)):
            return _no_setting(".".join([*keys, found[1]]), owner)
        if found := _EXPECTED.search(line):
            expected.append(_plain(found[1]))
        if expected and (found := _VALUE.search(line)):
            kinds = " or ".join(dict.fromkeys(expected))
            return f"{'.'.join(keys)} is {found[1]}; it must be {kinds}"
        if found := _KEY.search(line):
            keys.append(found[1])
        if found := _OWNER.search(line):
            owner = found[1]
    return " ".join(account.split())


def _no_setting(name: str, owner: str) -> str:
    module, _, kind = owner.rpartition(".")
    known = list(signature(getattr(import_module(module), kind)).parameters)
    near = get_close_matches(name.rpartition(".")[2], known, n=2)
    way_out = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
    return f"there is no setting {name}; {way_out}"


def _plain(expected: str) -> str:
    if expected.startswith("typing.Literal["):
        return expected.removeprefix("typing.Literal[").rstrip("]").replace(", ", " or ")
    found = re.fullmatch(r"<class '(?:.*\.)?(.+)'>", expected)
    name = found[1] if found else expected.partition(":")[0]
    return _NAMES.get(name, name)
