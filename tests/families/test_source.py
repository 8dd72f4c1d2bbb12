"""Status of a backend: what is missing, too old, broken, on the wrong machine, or not to be had offline."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from family_rows import BACKENDS, ROWS

from attention_dispatch import BackendUnavailableError, dispatch_attention_fn, registry
from attention_dispatch.backends import source
from attention_dispatch.capabilities import Capabilities
from contracts import load_record
from fakes import installed, kernel_repository, local_kernels

HUB = {name: record for name, record in ROWS if record.startswith("hub-")}
PACKAGES = {name: record for name, record in ROWS if not record.startswith("hub-")}


@pytest.fixture
def any_device(registered, monkeypatch):
    """The machine does not matter, only the package."""
    monkeypatch.setattr(source, "platform_reasons", lambda capabilities: ())


def codes(name: str) -> list[str]:
    registry.forget_status(name)
    found = registry.status(name)
    assert all(reason.fix for reason in found.reasons)
    return [reason.code for reason in found.reasons]


@pytest.mark.parametrize("name", PACKAGES)
def test_missing_package_has_an_install_line(name, any_device):
    assert codes(name) == ["package"]
    with pytest.raises(BackendUnavailableError, match="pip install"):
        dispatch_attention_fn(*[torch.zeros(1, 2, 1, 64, dtype=torch.bfloat16)] * 3, backend=name)


@pytest.mark.parametrize(
    ("name", "record", "version"),
    [
        ("flash", "flash_attn-2.6.3", "2.5.8"),
        ("xformers", "xformers-0.0.35", "0.0.28"),
        ("sage", "sageattention-1.0.6", "1.0.0"),
        ("_sage_qk_int8_pv_fp16_cuda", "sageattention-2.2.0", "1.0.6"),
        ("_native_xla", "torch_xla-2.9.0", "2.1.0"),
    ],
)
def test_old_package(name, record, version, any_device):
    with installed(record, version=version):
        source.forget()
        assert codes(name) == ["version"]
        assert version in str(registry.status(name))
    source.forget()


def test_the_old_cute_directory_of_flash_2_is_not_flash_4(any_device):
    old = ModuleType("flash_attn.cute")
    old.flash_attn_func = old.flash_attn_varlen_func = lambda q, k, v, softmax_scale=None, causal=False: None
    with installed("flash_attn-2.8.3"):
        source.forget()
        sys.modules["flash_attn.cute"] = old
        assert codes("flash_4") == ["package"]
    with installed("flash_attn_4-4.0.0b36"):
        source.forget()
        sys.modules["flash_attn.cute"] = old
        assert codes("flash_4") == ["version"]
    source.forget()


def test_broken_import_is_not_a_missing_package(any_device, tmp_path, monkeypatch):
    (tmp_path / "flash_attn_interface.py").write_text(
        'raise OSError("libcudart.so.12: cannot open shared object file")'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert codes("_flash_3") == ["import"]
    text = str(registry.status("_flash_3"))
    assert "libcudart.so.12" in text
    assert torch.__version__ in text
    with pytest.raises(BackendUnavailableError) as caught:
        registry.require("_flash_3")
    assert isinstance(caught.value.__cause__, OSError)


def test_flash_4_alone_breaks_what_takes_it_for_flash_2(any_device, tmp_path, monkeypatch):
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "xformers" / "ops").mkdir(parents=True)
    (tmp_path / "xformers" / "ops" / "__init__.py").write_text("import flash_attn.flash_attn_interface")
    (tmp_path / "xformers-0.0.35.dist-info").mkdir()
    (tmp_path / "xformers-0.0.35.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: xformers\nVersion: 0.0.35\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("xformers", "flash_attn")]:
        monkeypatch.delitem(sys.modules, name)
    assert codes("xformers") == ["import"]
    assert "pip uninstall flash-attn-4" in str(registry.status("xformers"))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("xformers", "flash_attn")]:
        del sys.modules[name]


def test_package_without_the_function(any_device, tmp_path, monkeypatch):
    (tmp_path / "flash_attn_interface.py").write_text("def flash_attn_func(q, k, v): ...")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn_interface", raising=False)
    assert codes("_flash_3") == ["version"]
    assert "flash_attn_varlen_func" in str(registry.status("_flash_3"))
    sys.modules.pop("flash_attn_interface", None)


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_listing_and_status_import_no_vendor_on_a_machine_without_the_device(name, registered, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")

    def forbidden(*_):
        raise AssertionError("a vendor package was imported")

    if "cuda" in BACKENDS[name].capabilities[0].devices:
        monkeypatch.setattr(source, "functions", forbidden)
        assert codes(name) == ["device"]


def test_wrong_architecture_is_settled_before_the_vendor_is_called(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(source, "architecture", lambda device, index: ("sm_75", "sm_89")[index])
    hopper = Capabilities(devices=("cuda",), dtypes=(torch.float16,), architectures=("sm_90",))
    [reason] = source.platform_reasons((hopper,))
    assert reason.code == "arch" and "sm_90" in reason.what and "sm_89" in reason.what
    ampere = replace(hopper, architectures=(), min_sm=80)
    assert source.platform_reasons((ampere,)) == ()
    assert source.platform_reasons((replace(ampere, min_sm=90),))[0].code == "arch"
    assert source.platform_reasons((replace(hopper, architectures=("gfx942",)),))[0].code == "arch"


def test_hub_kernels_offline_and_not_cached(tmp_path):
    pytest.importorskip("kernels", reason="the kernels library is not installed: pip install kernels")
    program = textwrap.dedent(
        f"""
        import sys
        sys.path[:0] = {sys.path!r}
        from attention_dispatch import registry
        from attention_dispatch.backends import source
        from family_rows import BACKENDS
        source.platform_reasons = lambda capabilities: ()
        for name in {sorted(HUB)!r}:
            registry.register_backend(BACKENDS[name], replace=True)
            [reason] = registry.status(name).reasons
            print(name, reason.code, "LOCAL_KERNELS" in reason.fix)
        """
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert child.stdout.splitlines() == [f"{name} offline True" for name in sorted(HUB)], child.stderr


def test_no_build_for_this_torch_is_told_apart(any_device, tmp_path):
    pytest.importorskip("kernels", reason="the kernels library is not installed: pip install kernels")
    record = HUB["flash_hub"]
    repository = kernel_repository(tmp_path, record, backends=("npu",))
    with local_kernels({load_record(record).distribution: repository}):
        assert codes("flash_hub") == ["build"]
    assert torch.__version__ in str(registry.status("flash_hub"))


def test_broken_hub_kernel_keeps_the_loaders_message(any_device, tmp_path):
    pytest.importorskip("kernels", reason="the kernels library is not installed: pip install kernels")
    record = HUB["flash_hub"]
    repository = kernel_repository(tmp_path, record, body='raise ImportError("undefined symbol: _ZN3c10")')
    with local_kernels({load_record(record).distribution: repository}):
        assert codes("flash_hub") == ["import"]
    assert "_ZN3c10" in str(registry.status("flash_hub"))


def test_missing_kernels_library(any_device, monkeypatch):
    version = source.installed_version
    without = functools.cache(lambda name: None if name == "kernels" else version(name))
    monkeypatch.setattr(source, "installed_version", without)
    assert codes("flash_hub") == ["package"]
    assert "kernels>=0.12" in str(registry.status("flash_hub"))


def test_a_folder_called_kernels_is_not_the_library(any_device, tmp_path, monkeypatch):
    pytest.importorskip("kernels", reason="the kernels library is not installed: pip install kernels")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "kernels"]:
        monkeypatch.delitem(sys.modules, name)
    assert codes("flash_hub") == ["import"]
    assert str(tmp_path / "kernels") in str(registry.status("flash_hub"))
    sys.modules.pop("kernels")


def test_both_rows_of_a_source_load_it_once_from_many_threads(any_device, monkeypatch):
    loads = []
    with installed("flash_attn-2.8.3"):
        source.forget()
        original = source.Package.load

        def counted(package):
            loads.append(package)
            return original(package)

        monkeypatch.setattr(source.Package, "load", counted)
        for name in ("flash", "flash_varlen"):
            registry.forget_status(name)
        threads = [threading.Thread(target=registry.status, args=(name,)) for name in ("flash", "flash_varlen") * 4]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert registry.status("flash").available and registry.status("flash_varlen").available
    assert len(loads) == 1
    source.forget()


def test_release_reads_the_numbers_of_a_version():
    assert source.release("2.8.3.post1") == (2, 8, 3)
    assert source.release("4.0.0b36") == (4, 0, 0)
    assert source.release("0.0.29") < source.release("0.0.35")
    assert source.release("unknown") == ()


def test_probe_in_child_reports_how_the_process_ended():
    assert source.probe_in_child("native") == ()
    [reason] = source.probe_in_child("no_such_backend")
    assert reason.code == "import" and "no_such_backend" in reason.what
