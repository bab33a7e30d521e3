"""Files of plain data in YAML: read safely, numbers as people write them, and no key twice."""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which here reads ``1e-3`` as a number and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping with every key once."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise ValueError(f"line {node.start_mark.line + 1}: {twice!r} stands twice.")
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a dot and a sign in `1.0e-3`; nobody writes them.
_FLOAT = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a file that holds one mapping.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no YAML, or something else than a mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    try:
        content = yaml.load(path.read_text("utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ValueError(f"{path}{where}: {getattr(error, 'problem', None) or 'this is no YAML'}.") from None
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: it holds {_brief(content)}: expected names and values.")
    return content


def check_keys(content: Any, known: Iterable[str], required: Iterable[str], where: str) -> Mapping[str, Any]:
    """A mapping that has the required keys and no unknown ones.

    Args:
        content: what a file holds at some place.
        known: all keys that may stand there.
        required: those that must.
        where: the place, for the message.

    Raises:
        ValueError: for another type, an unknown key or a missing one.
    """
    known, required = list(known), list(required)
    if not isinstance(content, dict):
        raise ValueError(f"{where}: {_brief(content)}: expected {', '.join(known)} and their values.")
    for key in content:
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else f": expected {', '.join(known)}"
            raise ValueError(f"{where}: unknown key {str(key)!r}{hint}.")
    missing = [key for key in required if key not in content]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} is missing.")
    return content


def _brief(value: Any) -> str:
    text = repr(value) if value is not None else "nothing"
    return text if len(text) <= 80 else f"{text[:77]}..."
