"""Copies, pickles, state dicts and wrappers of routed models."""

import copy
import io
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import attention_dispatch as ad

from . import blocks
from .blocks import DIM, HEADS, Block, VisionTransformer

MODELS = {
    "function": lambda: Block(),
    "import": lambda: Block(blocks.ByImport),
    "multihead": lambda: nn.TransformerEncoderLayer(DIM, HEADS, 64, batch_first=True),
}


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled, _saved])
@pytest.mark.parametrize("kind", MODELS)
def test_a_copy_is_routed_whatever_happens_to_the_original(kind, copied, probe):
    torch_function = F.scaled_dot_product_attention
    model, x = MODELS[kind]().eval(), torch.randn(2, 5, DIM)
    plain = model(x)
    ad.set_attention_backend(model, "probe_a")
    twin = copied(model)
    ad.reset_attention_backend(model)
    torch.testing.assert_close(twin(x), plain)
    assert probe.taken() == 1
    assert torch.equal(model(x), plain)
    assert probe.taken() == 0
    ad.reset_attention_backend(twin)
    assert torch.equal(twin(x), plain)
    assert probe.taken() == 0
    assert F.scaled_dot_product_attention is torch_function is blocks.sdpa


def test_shallow_copies_are_refused():
    model, x = Block().eval(), torch.randn(2, 5, DIM)
    ad.set_attention_backend(model, "native")
    for twin in (copy.copy(model.attn), model.attn._replicate_for_data_parallel()):
        with pytest.raises(ad.InvalidCallError, match="shallow copy"):
            twin(x)
    model(x)
    ad.reset_attention_backend(model)
    copy.copy(model.attn)(x)


def test_changing_a_copy_does_not_change_the_original(probes):
    model, x = Block().eval(), torch.randn(2, 5, DIM)
    ad.set_attention_backend(model, "probe_a")
    twin = copy.deepcopy(model)
    ad.set_attention_backend(twin, "probe_b")
    model(x), twin(x)
    assert [probe.taken() for probe in probes] == [1, 1]
    ad.reset_attention_backend(twin)
    model(x), twin(x)
    assert [probe.taken() for probe in probes] == [1, 0]
    ad.reset_attention_backend(model)


def test_a_fresh_process_reads_a_routed_model(tmp_path):
    model = nn.TransformerEncoderLayer(DIM, HEADS, 64, batch_first=True).eval()
    ad.set_attention_backend(model, "reference")
    x = torch.randn(2, 5, DIM)
    torch.save({"model": model, "x": x, "expected": model(x)}, tmp_path / "model.pt")
    ad.reset_attention_backend(model)
    code = """
        import sys, torch
        import torch.nn.functional as F
        before = F.scaled_dot_product_attention
        saved = torch.load(sys.argv[1], weights_only=False)
        import attention_dispatch as ad
        from attention_dispatch.request import current
        calls = []
        current.observer = lambda call, spec, request, plan, output: calls.append(plan.backend.name) or output
        current.refresh()
        torch.testing.assert_close(saved["model"](saved["x"]), saved["expected"])
        assert calls == ["reference"], calls
        ad.reset_attention_backend(saved["model"])
        assert F.scaled_dot_product_attention is before
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "model.pt")], check=True)


def test_state_dicts_and_parameters_are_untouched():
    model = VisionTransformer()
    before = list(model.state_dict())
    ad.set_attention_backend(model, "native")
    assert list(model.state_dict()) == before
    other = VisionTransformer()
    other.load_state_dict(model.state_dict())
    ad.reset_attention_backend(model)
    assert list(model.state_dict()) == before


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def _wrapped(kind, model, mesh):
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_distributed_wrappers(kind, when, one_process, probe):
    model, images = VisionTransformer(2), torch.randn(2, 3, 16, 16)
    # Where there is a GPU, FSDP would take it.
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    plain = model(images).detach()
    if when == "before":
        ad.set_attention_backend(model, "probe_a")
    wrapped = _wrapped(kind, model, mesh)
    if when == "after":
        report = ad.set_attention_backend(wrapped, "probe_a")
        assert [name for name, _ in report.routed] == ["blocks.0.attn", "blocks.1.attn"]
    out = wrapped(images)
    torch.testing.assert_close(out.detach(), plain)
    out.sum().backward()
    assert probe.taken() == 2
    ad.reset_attention_backend(wrapped)
    wrapped(images)
    assert probe.taken() == 0


def test_names_are_those_of_the_model_inside_a_wrapper(probe):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = VisionTransformer(2)
    model.blocks[1] = checkpoint_wrapper(model.blocks[1])
    run = torch.compile(model, backend="eager")
    report = ad.set_attention_backend(run, "probe_a", include="blocks.1.*")
    assert report.routed == (("blocks.1.attn", "'probe_a'"),)
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert probe.taken() == 2  # once more while the backward pass recomputes the block
    ad.reset_attention_backend(run)
