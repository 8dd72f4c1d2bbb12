"""Every command in this process: output, JSON, files, exit codes."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from attention_dispatch.cli.main import main
from attention_dispatch.support_table import support_table
from attention_dispatch.tuning import shapes, store
from tests.tuning.fakes import backend

TINY = ["--seq", "32", "--heads", "2", "--head-dim", "16", "--dtype", "float32", "--device", "cpu"]
QUICKLY = ["--budget", "0.001"]


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str):
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_list(capsys):
    code, rows = run_json(capsys, "list")
    ready = {row["backend"]: row["ready"] for row in rows}
    assert code == 0 and ready["native"]
    assert all(row["reasons"] and row["reasons"][0]["fix"] for row in rows if not row["ready"])
    assert main(["list"]) == 0 and "native" in capsys.readouterr().out


def test_list_markdown_is_the_documented_table(capsys):
    assert main(["list", "--markdown"]) == 0
    printed = capsys.readouterr().out
    documented = Path(__file__).parent.parent.parent / "docs" / "backends.md"
    assert printed == support_table() == documented.read_text(encoding="utf-8"), "run `make docs`"


def test_explain(capsys):
    code, [found] = run_json(capsys, "explain", *TINY, "--mask", "key_padding")
    assert code == 0 and found["backend"] == "native" and found["spec"]["mask"] == "key_padding"
    assert main(["explain", *TINY, "--deterministic", "--grad"]) == 0
    assert "excluded by your deterministic=True" in capsys.readouterr().out


def test_explain_of_a_refused_call_is_exit_code_1(capsys):
    code, [found] = run_json(capsys, "explain", *TINY, "--backend", "flash")
    assert code == 1 and found["backend"] is None and "sees no GPU" in found["error"]


@pytest.mark.parametrize("model", shapes.MODELS)
def test_every_model_can_be_explained_without_its_device(model, capsys):
    code, found = run_json(capsys, "explain", "--model", model, "--device", "cpu", "--backend", "_flash_3,native")
    assert code == 0 and [item["backend"] for item in found] == ["native"] * len(shapes.MODELS[model].shapes)


def test_bench_writes_every_format_and_compares_with_a_baseline(tmp_path, capsys):
    files = [tmp_path / f"out.{suffix}" for suffix in ("json", "csv", "html")]
    outputs = [argument for file in files for argument in ("-o", str(file))]
    assert main(["bench", *TINY, *QUICKLY, *outputs]) == 0
    printed = capsys.readouterr().out
    assert "rel. L2" in printed and "native" in printed
    rows = json.loads(files[0].read_text())["rows"]
    by_name = {row["backend"]: row for row in rows}
    assert by_name["native"]["speedup"] == 1.0 and by_name["native"]["relative_l2"] < 1e-5
    assert (by_name["_native_flash"]["lse"], by_name["_native_flash"]["grad"]) == ("ok", "ok")
    assert by_name["native"]["lse"] == "no"
    with open(files[1], newline="") as stream:
        assert [row["backend"] for row in csv.DictReader(stream)] == [row["backend"] for row in rows]
    page = files[2].read_text()
    assert "native" in page and "http" not in page.replace("http-equiv", ""), "the page loads nothing"
    again = [str(tmp_path / "again.json"), str(tmp_path / "again.html")]
    arguments = ["bench", *TINY, *QUICKLY, "--no-checks", "--baseline", str(files[0]), "-o", again[0], "-o", again[1]]
    assert main(arguments) == 0
    assert "%)" in capsys.readouterr().out
    compared = {row["backend"]: row["baseline_us"] for row in json.loads(Path(again[0]).read_text())["rows"]}
    assert compared["native"] == by_name["native"]["us"]
    assert "<th>change</th>" in Path(again[1]).read_text() and "<th>change</th>" not in page


def test_bench_plots(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    file = tmp_path / "out.png"
    assert main(["bench", *TINY, *QUICKLY, "--no-checks", "-o", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["fake_lie", "fake_nan"])
def test_bench_gives_no_speed_for_a_wrong_result(name, registered, capsys):
    registered(backend(name))
    code, found = run_json(capsys, "bench", *TINY, *QUICKLY, "--no-checks", "--backends", f"native,{name}")
    wrong = next(row for row in found["rows"] if row["backend"] == name)
    assert code == 1 and wrong["state"] == "wrong" and wrong["speedup"] is None and wrong["tflops"] is None
    assert wrong["us"] > 0


def test_bench_gives_no_speed_for_wrong_gradients(registered, capsys):
    registered(backend("fake_gradient"))
    arguments = ["bench", *TINY, *QUICKLY, "--no-checks", "--grad", "--backends", "native,fake_gradient"]
    code, found = run_json(capsys, *arguments)
    states = {row["backend"]: row for row in found["rows"]}
    assert code == 1 and states["fake_gradient"]["state"] == "wrong" and states["fake_gradient"]["speedup"] is None
    assert "gradient of key" in states["fake_gradient"]["what"] and states["native"]["gradient_l2"] < 1e-5


def test_bench_says_why_a_backend_did_not_run(registered, capsys):
    registered(backend("fake_raise"))
    code, found = run_json(capsys, "bench", *TINY, *QUICKLY, "--no-checks", "--backends", "native,flash,fake_raise")
    states = {row["backend"]: (row["state"], row["what"]) for row in found["rows"]}
    assert code == 0 and states["flash"][0] == "refused" and "cuda" in states["flash"][1]
    assert states["fake_raise"][0] == "failed" and "no kernel image" in states["fake_raise"][1]


def test_tune_show_export_import_clear(tmp_path, capsys):
    code, found = run_json(capsys, "tune", *TINY, *QUICKLY)
    assert code == 0 and len(found) == 1
    code, shown = run_json(capsys, "tune", "--show", "--device", "cpu")
    assert list(shown["entries"]) == list(found)
    assert main(["tune", "--show", "--device", "cpu"]) == 0 and "q~32" in capsys.readouterr().out
    file = tmp_path / "export.json"
    assert main(["tune", "--export", str(file), "--device", "cpu"]) == 0
    assert main(["tune", "--clear"]) == 0 and store.entries("cpu") == {}
    assert capsys.readouterr().out == ""
    done = {"measurements": 1, "file": str(file)}
    assert run_json(capsys, "tune", "--import", str(file)) == (0, done) and list(store.entries("cpu")) == list(found)
    assert run_json(capsys, "tune", "--export", str(file), "--device", "cpu") == (0, done)
    assert run_json(capsys, "tune", "--clear") == (0, {"deleted": [str(store.path("cpu"))]})


def test_tune_reads_shapes_and_runs_a_script(tmp_path, capsys):
    file = tmp_path / "shapes.json"
    file.write_text('[{"batch": 1, "q_len": 16, "heads": 2, "head_dim": 8, "dtype": "float32", "mask": "bias"}]')
    code, found = run_json(capsys, "tune", "--shapes", str(file), "--device", "cpu", *QUICKLY)
    assert code == 0 and "mask=bias" in next(iter(found))
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch, attention_dispatch as ad\n"
        "q = torch.randn(1, int(sys.argv[1]), 2, 8)\n"
        "ad.dispatch_attention_fn(q, q, q)\n"
    )
    before = list(sys.argv)
    assert main(["tune", "--device", "cpu", *QUICKLY, "--", "python", str(script), "24"]) == 0
    assert "q (1, 24, 2, 8)" in capsys.readouterr().out and sys.argv == before
    script.write_text("import torch\ntorch.zeros(2) @ torch.zeros(3)")
    assert main(["tune", "--device", "cpu", "--", str(script)]) == 2
    error = capsys.readouterr().err
    assert f'File "{script}", line 2' in error and "raised RuntimeError" in error
    script.write_text("raise SystemExit(3)")
    assert main(["tune", "--device", "cpu", "--", str(script)]) == 2
    assert "ended with code 3" in capsys.readouterr().err


def test_doctor_reports_fakes_and_auto_heeds_it(capsys):
    code, found = run_json(
        capsys, "doctor", "--device", "cpu", "--import", "tests.tuning.registered_fakes", "native", "fake_lie"
    )
    states = {result["backend"]: result["state"] for result in found["checked"]}
    assert code == 1 and states == {"native": "ok", "fake_lie": "wrong"}
    assert store.verdict("fake_lie", "cpu")["state"] == "wrong" and found["environment"]["torch"]


def test_doctor_says_what_is_missing_and_what_to_do(capsys):
    code, found = run_json(capsys, "doctor", "--device", "cpu", "--no-save", "native", "flash")
    assert code == 0 and [result["state"] for result in found["checked"]] == ["ok"]
    assert "->" in found["not_ready"]["flash"] and store.verdicts("cpu") == {}


def test_doctor_says_that_a_backend_is_for_another_device(registered, capsys):
    other = backend("fake_right")
    rows = tuple(replace(row, devices=("cuda",)) for row in other.capabilities)
    registered(replace(other, name="fake_elsewhere", capabilities=rows))
    code, found = run_json(capsys, "doctor", "--device", "cpu", "--no-save", "fake_elsewhere")
    assert code == 0 and found["checked"] == [] and "runs on cuda, not on cpu ->" in found["not_ready"]["fake_elsewhere"]


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["explain"], "say which call"),
        (["bench", "--model", "nothing"], "Known: flux"),
        (["bench", *TINY, "--backends", "natve"], "unknown backend natve"),
        (["bench", *TINY, "-o", "x.pdf"], "suffix"),
        (["tune"], "say what to measure"),
        (["tune", "--shapes", "absent.json"], "not a list of shapes"),
        (["explain", *TINY, "--backend", "natve"], "Did you mean"),
        (["doctor", "natve"], "Did you mean"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, text, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert text in error and "Traceback" not in error


@pytest.mark.parametrize("command", ["list", "explain", "doctor", "tune", "bench"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0 and f"attention-dispatch {command}" in capsys.readouterr().out


def test_it_works_without_rich_and_writes_no_colours_into_a_pipe():
    code = (
        "import sys; sys.modules['rich'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'rich' else find(name, *a)\n"
        "from attention_dispatch.cli.main import main; raise SystemExit(main(['list']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "native" in done.stdout and "\x1b" not in done.stdout
