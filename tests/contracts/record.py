"""Write ``records/*.json`` from the published source of the attention packages, without importing or running them.

    python tests/contracts/record.py                                 every record that a registry publishes as a wheel
    python tests/contracts/record.py sageattention-1.0.6             one record
    python tests/contracts/record.py flash_attn-2.8.3 --source DIR   from an unpacked source tree
    python tests/contracts/record.py --list                          names, and where each source comes from

Wheels are fetched with ``pip download --no-deps --only-binary`` and read with ``ast``. Packages that publish no wheel
(pip runs the build script of an sdist to resolve it) are read from a source tree given with ``--source``.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

RECORDS = Path(__file__).parent / "records"
FLASH = ("flash_attn_func", "flash_attn_varlen_func")
SAGE_2 = (
    "sageattn",
    "sageattn_varlen",
    "sageattn_qk_int8_pv_fp16_triton",
    "sageattn_qk_int8_pv_fp16_cuda",
    "sageattn_qk_int8_pv_fp8_cuda",
    "sageattn_qk_int8_pv_fp8_cuda_sm90",
)
XFORMERS = (
    "memory_efficient_attention",
    "memory_efficient_attention_forward_requires_grad",
    "memory_efficient_attention_partial",
)
COMMUNITY = "https://github.com/huggingface/kernels-community"
FLASH_GIT = "https://github.com/Dao-AILab/flash-attention"


@dataclass(frozen=True)
class Source:
    """Where one record is read from.

    Attributes:
        distribution: Name on the package registry, or of the Hub repository.
        version: Published version; for a git commit that has none, the commit.
        module: Module a user imports the functions from.
        file: Path of the defining file inside the wheel or source tree.
        functions: Names to record, in the file.
        git: Repository and revision to unpack for ``--source``; empty when the registry has a wheel.
        suffix: Ending of the names in the file that the exported names lack.
    """

    distribution: str
    version: str
    module: str
    file: str
    functions: tuple[str, ...]
    git: str = ""
    suffix: str = ""

    @property
    def origin(self) -> str:
        return self.git or f"https://pypi.org/project/{self.distribution}/{self.version}/"


def _fa3(commit: str) -> Source:
    return Source(
        "flash_attn_3",
        commit,
        "flash_attn_interface",
        "hopper/flash_attn_interface.py",
        FLASH,
        f"{FLASH_GIT}/tree/{commit}",
    )


def _hub(repository: str, version: str, commit: str, file: str, functions: tuple[str, ...]) -> Source:
    package = repository.replace("-", "_")
    return Source(
        f"kernels-community/{repository}",
        version,
        package,
        f"{repository}/torch-ext/{package}/{file}",
        functions,
        f"{COMMUNITY}/tree/{commit}",
    )


_FLASH_FILE = "flash_attn/flash_attn_interface.py"
SOURCES = {
    "flash_attn-2.6.3": Source("flash-attn", "2.6.3", "flash_attn", _FLASH_FILE, FLASH, f"{FLASH_GIT}/tree/v2.6.3"),
    "flash_attn-2.8.3": Source("flash-attn", "2.8.3", "flash_attn", _FLASH_FILE, FLASH, f"{FLASH_GIT}/tree/v2.8.3"),
    "flash_attn_3-tuple": _fa3("ed209409~1"),
    "flash_attn_3-tensor": _fa3("ed209409"),
    "flash_attn_3-optional": _fa3("203b9b3d"),
    "flash_attn_4-4.0.0b36": Source(
        "flash-attn-4", "4.0.0b36", "flash_attn.cute", "flash_attn/cute/interface.py", FLASH
    ),
    "sageattention-1.0.6": Source("sageattention", "1.0.6", "sageattention", "sageattention/core.py", SAGE_2[:2]),
    "sageattention-2.2.0": Source(
        "sageattention",
        "2.2.0",
        "sageattention",
        "sageattention/core.py",
        SAGE_2,
        "https://github.com/thu-ml/SageAttention/tree/v2.2.0",
    ),
    "xformers-0.0.35": Source("xformers", "0.0.35", "xformers.ops", "xformers/ops/fmha/__init__.py", XFORMERS),
    "torch_npu-2.13.0": Source(
        "torch-npu",
        "2.13.0",
        "torch_npu",
        "torch_npu/op_plugin/meta/_meta_registrations.py",
        ("npu_fusion_attention_forward",),
        suffix="_forward",
    ),
    "torch_xla-2.9.0": Source(
        "torch-xla",
        "2.9.0",
        "torch_xla.experimental.custom_kernel",
        "torch_xla/experimental/custom_kernel.py",
        ("flash_attention",),
    ),
    "aiter-0.1.7": Source("amd-aiter", "0.1.7.post2.dev18", "aiter", "aiter/ops/mha.py", FLASH),
    "kernels-0.12.3": Source(
        "kernels", "0.12.3", "kernels", "kernels/utils.py", ("get_kernel", "get_local_kernel", "has_kernel")
    ),
    "kernels-0.17.2": Source(
        "kernels", "0.17.2", "kernels", "kernels/load.py", ("get_kernel", "get_local_kernel", "has_kernel")
    ),
    "hub-flash_attn2-v1": _hub("flash-attn2", "1", "2a8dac0d", "flash_attn_interface.py", FLASH),
    "hub-flash_attn3-v1": _hub("flash-attn3", "1", "40d4194f", "flash_attn_interface.py", FLASH),
    "hub-flash_attn4-v0": _hub("flash-attn4", "0", "40d4194f", "interface.py", FLASH),
    "hub-sage_attention-v1": _hub("sage-attention", "1", "46569dbf", "core.py", ("sageattn",)),
    "hub-aiter_flash_attn_ck-v1": _hub("aiter-flash-attn-ck", "1", "40d4194f", "mha.py", FLASH),
}


def describe(text: str, functions: tuple[str, ...], suffix: str = "") -> dict[str, dict]:
    """Read ``functions`` out of Python source ``text``.

    Returns:
        Function name (without ``suffix``) to its parameters, return expressions and the facts of its body, as
        ``FunctionContract`` documents them.

    Raises:
        LookupError: the source does not define one of ``functions`` at module level.
    """
    module = ast.parse(text)
    definitions = {node.name: node for node in ast.walk(module) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    top_level = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
    missing = [name for name in functions if name not in top_level]
    if missing:
        raise LookupError(f"not defined at module level: {', '.join(missing)}")
    return {
        name.removesuffix(suffix): _describe(top_level[name], definitions, stand_in=bool(suffix)) for name in functions
    }


def _describe(node: ast.FunctionDef, definitions: dict, stand_in: bool) -> dict:
    """Facts of one function. A ``stand_in`` (a shape rule for a compiled op) tells nothing of what the op reads."""
    returns = _returns(node, definitions)
    tuples = {
        statement.targets[0].id
        for statement in ast.walk(node)
        if isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
        and isinstance(statement.value, ast.Tuple)
    }
    read = {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Load)}
    written = {
        statement.target.id
        for statement in ast.walk(node)
        if isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name)
    }
    parameters = _parameters(node.args)
    names = [parameter["name"] for parameter in parameters]
    return {
        "parameters": parameters,
        "returns": [ast.unparse(value) for value in returns],
        "convention": _convention(returns, tuples),
        "unused": [] if stand_in else [name for name in names if name not in read | written],
        "in_place": [name for name in names if name in written],
    }


def _parameters(arguments: ast.arguments) -> list[dict]:
    described = []
    positional = arguments.posonlyargs + arguments.args
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    for index, (argument, default) in enumerate(zip(positional, defaults, strict=True)):
        kind = "POSITIONAL_ONLY" if index < len(arguments.posonlyargs) else "POSITIONAL_OR_KEYWORD"
        described.append(_parameter(argument.arg, kind, default))
    if arguments.vararg:
        described.append(_parameter(arguments.vararg.arg, "VAR_POSITIONAL", None))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        described.append(_parameter(argument.arg, "KEYWORD_ONLY", default))
    if arguments.kwarg:
        described.append(_parameter(arguments.kwarg.arg, "VAR_KEYWORD", None))
    return described


def _parameter(name: str, kind: str, default: ast.expr | None) -> dict:
    described = {"name": name, "kind": kind}
    if default is not None:
        described["default"] = ast.unparse(default)
    return described


def _returns(node: ast.FunctionDef, definitions: dict) -> list[ast.expr]:
    """Return expressions of ``node``, nested functions left out and ``X.apply(...)`` followed into ``X.forward``."""
    values = []
    for statement in _own_statements(node):
        if isinstance(statement, ast.Return) and statement.value is not None:
            values.extend(_followed(statement.value, definitions))
    return values


def _own_statements(node: ast.AST):
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            yield child
            yield from _own_statements(child)


def _followed(value: ast.expr, definitions: dict) -> list[ast.expr]:
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "apply":
        owner = definitions.get(getattr(value.func.value, "id", None))
        if isinstance(owner, ast.ClassDef):
            forward = next(item for item in owner.body if isinstance(item, ast.FunctionDef) and item.name == "forward")
            return _returns(forward, definitions)
    return [value]


def _convention(returns: list[ast.expr], tuples: set[str]) -> str:
    """``tuples`` are the local names that hold a tuple."""
    kinds = set()
    for value in returns:
        branches = [value.body, value.orelse] if isinstance(value, ast.IfExp) else [value]
        for branch in branches:
            if isinstance(branch, ast.Tuple) or getattr(branch, "id", None) in tuples:
                kinds.add("tuple")
            elif isinstance(branch, ast.Call) and getattr(branch.func, "id", None) != "tuple":
                kinds.add("delegated")
            else:
                kinds.add("tuple" if isinstance(branch, ast.Call) else "tensor")
    return kinds.pop() if len(kinds) == 1 else "delegated" if "delegated" in kinds else "either"


def record(name: str, root: Path) -> dict:
    """The record ``name``, read from the source tree or unpacked wheel at ``root``."""
    source = SOURCES[name]
    text = (root / source.file).read_text()
    return {
        "record": name,
        "distribution": source.distribution,
        "version": source.version,
        "module": source.module,
        "file": source.file,
        "origin": source.origin,
        "functions": describe(text, source.functions, source.suffix),
    }


def download(source: Source, directory: Path) -> Path:
    """Fetch the wheel of ``source`` with pip and unpack its Python files below ``directory``."""
    requirement = f"{source.distribution}=={source.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, "--dest", str(directory), requirement], check=True)
    wheel = next(directory.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory, [member for member in archive.namelist() if member.endswith(".py")])
    return directory


def write(described: dict, directory: Path = RECORDS) -> Path:
    """Write one record as JSON and return its path."""
    path = directory / f"{described['record']}.json"
    path.write_text(json.dumps(described, indent=1) + "\n")
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="records to write (default: all that have a wheel)")
    parser.add_argument("--source", type=Path, help="unpacked source tree to read instead of downloading a wheel")
    parser.add_argument("--into", type=Path, default=RECORDS, help="directory the records are written to")
    parser.add_argument("--list", action="store_true", help="print the names and origins of all records")
    options = parser.parse_args(arguments)
    if options.list:
        for name, source in SOURCES.items():
            print(f"{name:28} {source.origin}")
        return 0
    unknown = [name for name in options.names if name not in SOURCES]
    if unknown:
        parser.error(f"unknown record {', '.join(unknown)}; --list prints the names")
    for name in options.names or [name for name, source in SOURCES.items() if not source.git]:
        source = SOURCES[name]
        if options.source is None and source.git:
            parser.error(f"{name} has no wheel: unpack {source.git} and pass the directory with --source")
        with tempfile.TemporaryDirectory() as temporary:
            root = options.source or download(source, Path(temporary))
            print(write(record(name, root), options.into))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
