"""The digits example: its data, weights, sampling, training script and demo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for package in ("diffusers", "sklearn", "safetensors", "PIL", "rich"):
    pytest.importorskip(package, reason="pip install 'attention-dispatch[examples]'")

DIGITS = Path(__file__).parents[1] / "examples" / "digits"
sys.path.insert(0, str(DIGITS))

import comparison  # noqa: E402
import contact_sheet  # noqa: E402
import digit_generator  # noqa: E402
import digit_reader  # noqa: E402
import train  # noqa: E402
from diffusers.models.transformers import transformer_flux  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

ASKED = torch.arange(10).repeat_interleave(2)


@pytest.fixture(scope="module")
def scanned():
    return digit_reader.load_scanned_digits()


@pytest.fixture(scope="module")
def reader(scanned):
    return digit_reader.DigitReader(scanned)


@pytest.fixture(scope="module")
def generator():
    return digit_generator.load_generator()


@pytest.fixture(scope="module")
def images(generator):
    """Two pictures of each digit, drawn with diffusers as it comes or as another test left it: native either way."""
    return digit_generator.sample_digits(generator, ASKED, seed=11)


def run_script(name: str, *arguments: str, expect: int = 0) -> str:
    done = subprocess.run([sys.executable, str(DIGITS / name), *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, f"{name} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_weights_are_small_and_half_precision():
    assert digit_generator.WEIGHTS.stat().st_size < 3_000_000
    assert {tensor.dtype for tensor in load_file(digit_generator.WEIGHTS).values()} == {torch.float16}


def test_attention_has_the_shape_gpu_kernels_take(generator):
    assert generator.transformer.config.attention_head_dim == 64
    assert sum(generator.transformer.config.axes_dims_rope) == 64
    assert all(parameter.isfinite().all() for parameter in generator.parameters())


def test_missing_weights_say_how_to_train_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.py"):
        digit_generator.load_generator(tmp_path / "absent.safetensors")


def test_held_out_digits_are_not_trained_on(scanned):
    assert (len(scanned.images), len(scanned.held_out_images)) == (1437, 360)
    assert torch.cdist(scanned.held_out_images.flatten(1), scanned.images.flatten(1)).min() > 0


def test_reader_reads_held_out_digits(reader):
    assert reader.held_out_accuracy > 0.97


def test_generated_digits_are_read_as_asked(images, reader):
    assert images.shape == (20, 8, 8)
    assert images.min() >= 0 and images.max() <= 1
    assert reader.accuracy(images, ASKED) >= 0.9


def test_generated_digits_are_not_copies_of_the_training_images(images, scanned):
    held_out = torch.cdist(scanned.held_out_images.flatten(1), scanned.images.flatten(1)).min(dim=1).values
    drawn = torch.cdist(images.flatten(1), scanned.images.flatten(1)).min(dim=1).values
    assert drawn.mean() > 0.7 * held_out.mean()


def test_a_seed_means_the_same_pictures(generator):
    first = digit_generator.sample_digits(generator, ASKED[:4], seed=5, steps=3)
    assert torch.equal(first, digit_generator.sample_digits(generator, ASKED[:4], seed=5, steps=3))
    assert not torch.equal(first, digit_generator.sample_digits(generator, ASKED[:4], seed=6, steps=3))


def test_pictures_depend_on_attention(generator, reader, monkeypatch):
    """Uniform weights in place of softmax must spoil the digits, or the demo would compare nothing."""

    def uniform(query, key, value, **options):
        return value.mean(dim=1, keepdim=True).expand_as(query)

    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", uniform)
    assert reader.accuracy(digit_generator.sample_digits(generator, ASKED, seed=11), ASKED) < 0.5


def test_training_script_writes_a_loadable_file_and_is_reproducible(tmp_path):
    by_script, again, other = (tmp_path / f"{name}.safetensors" for name in ("script", "again", "other"))
    printed = run_script("train.py", "--steps=2", "--batch-size=8", f"--output={by_script}")
    assert "held-out real digits" in printed
    train.train(2, 8, 2e-3, seed=0, output=again)
    train.train(2, 8, 2e-3, seed=1, output=other)
    assert by_script.read_bytes() == again.read_bytes() != other.read_bytes()
    trained = digit_generator.load_generator(by_script)
    images = digit_generator.sample_digits(trained, ASKED[:2], seed=0, steps=2)
    assert images.isfinite().all()


def test_contact_sheet_has_a_row_per_backend_and_frames_misread_digits(tmp_path):
    path = tmp_path / "new" / "sheet.png"
    images = torch.zeros(3, 8, 8)
    misread = torch.tensor([False, True, False])
    rows = {"native": images, "flex": images}
    contact_sheet.write_contact_sheet(path, rows, torch.tensor([1, 2, 3]), {"native": misread, "flex": ~misread})
    colours = {colour: count for count, colour in Image.open(path).convert("RGB").getcolors(1 << 20)}
    side = 8 * contact_sheet.SCALE
    assert colours[(255, 0, 0)] == 3 * 4 * (side - 1)


def test_demo_compares_backends(tmp_path, monkeypatch):
    monkeypatch.delenv("ATTENTION_DISPATCH_BACKEND", raising=False)
    monkeypatch.delenv("DIFFUSERS_ATTN_BACKEND", raising=False)
    sheet = tmp_path / "digits.png"
    names = ["native", "_native_math", "flex", "reference", "_native_cudnn"]
    report = json.loads(
        run_script("demo.py", "--json", "--device=cpu", "--count=10", f"--output={sheet}", "--backends", *names)
    )
    ran = {row["backend"]: row for row in report["ran"]}
    assert list(ran) == names[:-1]
    for row in ran.values():
        assert row["faults"] == [] and row["agreement"] == 1.0 and row["accuracy"] >= 0.9
        assert row["largest_pixel_difference"] <= report["pixel_difference_explained_by_rounding"] < 1e-3
        assert row["attention_calls"] == (1 + 12) * 3, "three blocks, one observed step and one observed run of twelve"
    (missing,) = report["not_run"]
    assert missing["backend"] == "_native_cudnn"
    assert all(reason["what"] and reason["fix"] for reason in missing["reasons"])
    assert Image.open(sheet).height > 4 * 8


def test_demo_names_the_nearest_backend():
    done = subprocess.run([sys.executable, DIGITS / "demo.py", "--backends", "nativ"], capture_output=True, text=True)
    assert done.returncode == 2 and "'native'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.gpu
def test_demo_on_a_gpu(cuda, tmp_path):
    report = json.loads(run_script("demo.py", "--json", "--device=cuda", f"--output={tmp_path / 'digits.png'}"))
    ran = {row["backend"]: row for row in report["ran"]}
    assert {"native", "_native_flash", "_native_cudnn", "_native_efficient", "_native_math", "flex"} <= set(ran)
    assert ran["native"]["accuracy"] >= 0.9


@pytest.fixture
def outcomes(images):
    return [comparison.Outcome("native", False, images.clone()), comparison.Outcome("other", False, images.clone())]


class TestJudgement:
    """What the demo calls a fault."""

    def judged(self, outcomes, reader):
        comparison.judge(outcomes, outcomes[0], 1e-3, ASKED, reader)
        return [outcome.faults for outcome in outcomes]

    def test_equal_pictures_pass(self, outcomes, reader):
        assert self.judged(outcomes, reader) == [[], []]

    def test_an_exact_backend_may_not_change_a_pixel_beyond_rounding(self, outcomes, reader):
        outcomes[1].images[3, 4, 4] += 0.01
        assert "rounding" in self.judged(outcomes, reader)[1][0]

    def test_a_quantised_backend_may_change_pixels_but_not_digits(self, outcomes, reader):
        outcomes[1].quantised = True
        outcomes[1].images[3, 4, 4] += 0.01
        assert self.judged(outcomes, reader) == [[], []]
        outcomes[1].images = outcomes[1].images.roll(2, dims=0)
        assert "read as native's" in self.judged(outcomes, reader)[1][0]

    @pytest.mark.parametrize("quantised", [False, True])
    def test_nan_is_a_fault(self, outcomes, reader, quantised):
        outcomes[1].quantised = quantised
        outcomes[1].images[0, 0, 0] = float("nan")
        assert self.judged(outcomes, reader)[1]

    def test_a_scope_that_draws_something_else_is_a_fault(self, outcomes, reader):
        outcomes[1].scope_difference = 0.5
        assert "scope" in self.judged(outcomes, reader)[1][0]

    def test_unreadable_digits_are_a_fault(self, outcomes, reader):
        for outcome in outcomes:
            outcome.images = outcome.images.flip(0)
        assert "asked" in self.judged(outcomes, reader)[0][0]
