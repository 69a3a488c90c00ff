"""Flags of XLA for programs that run for less long than they compile."""

from importlib import metadata

QUICK_TO_COMPILE = (
  "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
)
"""Half the time to compile."""
# Since jaxlib 0.11 there is no other kind of fusion, and an unknown flag ends
# the process.
if metadata.version("jaxlib").startswith("0.10."):
  QUICK_TO_COMPILE += " --xla_cpu_use_fusion_emitters=false"
