"""Stand-ins for the attention packages, built from ``tests/contracts/records``.

A fake has the recorded signature, refuses what the vendor refuses (unknown or missing arguments, dtypes, layouts, head
dimensions) and computes with plain float64 math in the vendor's own layout, causal alignment, mask polarity and LSE
convention. Where the vendor surprises, so does the fake: arguments swallowed by ``**kwargs``, keys centred in place,
+inf for the LSE of an empty row, rows it never writes.

``installed("flash_attn-2.8.3")`` makes one importable; ``kernel_repository`` builds a Hub kernel out of one.
"""

from fakes.build import FakeCalls, functions
from fakes.hub import kernel_repository, local_kernels
from fakes.install import installed

__all__ = ["FakeCalls", "functions", "installed", "kernel_repository", "local_kernels"]
