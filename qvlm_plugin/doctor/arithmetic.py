"""Whether the processor has instructions for bfloat16, the dtype of most checkpoints."""

import torch

from qvlm_plugin.doctor.finding import Finding, Status

INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16", "sve_bf16")
"""Names in `torch.cpu.get_capabilities` of instruction sets with bfloat16, on x86 and ARM."""


def check_arithmetic() -> list[Finding]:
    """A warning if models run on a CPU without bfloat16; nothing if torch does not report it."""
    if torch.cuda.is_available() or not hasattr(torch.cpu, "get_capabilities"):
        return []
    capabilities = torch.cpu.get_capabilities()
    known = [name for name in INSTRUCTIONS if name in capabilities]
    if not known or any(capabilities[name] for name in known):
        return []
    message = "this CPU has no bfloat16 instructions: bfloat16 models run several times slower than float32"
    return [Finding("bfloat16", Status.WARN, message, "run with dtype=float32")]
