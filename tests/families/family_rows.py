"""The backends of external packages, and the records whose fakes stand in for them."""

from __future__ import annotations

from importlib import import_module

from attention_dispatch.registry import Backend

_RECORDS = {
    "flash": ("flash_attn-2.8.3", "flash_attn-2.6.3"),
    "flash_varlen": ("flash_attn-2.8.3", "flash_attn-2.6.3"),
    "flash_hub": ("hub-flash_attn2-v1",),
    "flash_varlen_hub": ("hub-flash_attn2-v1",),
    "_flash_3": ("flash_attn_3-optional", "flash_attn_3-tuple", "flash_attn_3-tensor"),
    "_flash_varlen_3": ("flash_attn_3-optional", "flash_attn_3-tuple", "flash_attn_3-tensor"),
    "_flash_3_hub": ("hub-flash_attn3-v1",),
    "_flash_3_varlen_hub": ("hub-flash_attn3-v1",),
    "flash_4": ("flash_attn_4-4.0.0b36",),
    "flash_4_hub": ("hub-flash_attn4-v0",),
    "sage": ("sageattention-1.0.6", "sageattention-2.2.0"),
    "sage_varlen": ("sageattention-1.0.6", "sageattention-2.2.0"),
    "sage_hub": ("hub-sage_attention-v1",),
    "_sage_qk_int8_pv_fp8_cuda": ("sageattention-2.2.0",),
    "_sage_qk_int8_pv_fp8_cuda_sm90": ("sageattention-2.2.0",),
    "_sage_qk_int8_pv_fp16_cuda": ("sageattention-2.2.0",),
    "_sage_qk_int8_pv_fp16_triton": ("sageattention-2.2.0",),
    "xformers": ("xformers-0.0.35",),
    "_native_npu": ("torch_npu-2.13.0",),
    "_native_xla": ("torch_xla-2.9.0",),
    "aiter_fa2_hub": ("hub-aiter_flash_attn_ck-v1",),
}
FAMILIES = ("flash", "sage", "xformers", "npu", "xla", "aiter")
BACKENDS: dict[str, Backend] = {
    name: backend
    for family in FAMILIES
    for name, backend in import_module(f"attention_dispatch.backends.{family}").BACKENDS.items()
}
ROWS = [(name, record) for name, records in _RECORDS.items() for record in records]
