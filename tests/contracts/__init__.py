"""Recorded signatures of the attention packages: what each published version accepts and returns, as data.

``records/*.json`` is written by ``record.py`` from the published source, never by hand, and read with ``load_record``.
The fakes in ``tests/fakes`` take their signatures from these files.
"""

from __future__ import annotations

import ast
import inspect
import json
from dataclasses import dataclass
from pathlib import Path

RECORDS = Path(__file__).parent / "records"


@dataclass(frozen=True)
class FunctionContract:
    """One vendor function as its source states it.

    Attributes:
        name: Function name.
        signature: Parameters with their kinds and defaults. A default that is not a literal stays source text.
        returns: Source text of each return expression; ``X.apply(...)`` is replaced by what ``X.forward`` returns.
        convention: ``"tensor"``, ``"tuple"``, ``"either"`` (depends on the arguments) or ``"delegated"`` (another
            function decides).
        unused: Parameters the body never reads, so that the vendor drops whatever is passed.
        in_place: Parameters the body writes to with an augmented assignment.
    """

    name: str
    signature: inspect.Signature
    returns: tuple[str, ...]
    convention: str
    unused: frozenset[str]
    in_place: frozenset[str]


@dataclass(frozen=True)
class Contract:
    """One published version of one package: where it was read and the functions recorded from it."""

    record: str
    distribution: str
    version: str
    module: str
    file: str
    origin: str
    functions: dict[str, FunctionContract]


def names() -> list[str]:
    """Names of all records, sorted."""
    return sorted(path.stem for path in RECORDS.glob("*.json"))


def load_record(name: str) -> Contract:
    """Read ``records/<name>.json``."""
    data = json.loads((RECORDS / f"{name}.json").read_text())
    functions = {function: _function(function, fields) for function, fields in data.pop("functions").items()}
    return Contract(functions=functions, **data)


def _function(name: str, fields: dict) -> FunctionContract:
    parameters = [
        inspect.Parameter(
            parameter["name"],
            inspect._ParameterKind[parameter["kind"]],
            default=_literal(parameter["default"]) if "default" in parameter else inspect.Parameter.empty,
        )
        for parameter in fields["parameters"]
    ]
    return FunctionContract(
        name=name,
        signature=inspect.Signature(parameters),
        returns=tuple(fields["returns"]),
        convention=fields["convention"],
        unused=frozenset(fields["unused"]),
        in_place=frozenset(fields["in_place"]),
    )


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except ValueError:
        return text
