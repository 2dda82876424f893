"""Mixed precision: which dtype a device can use, and its autocast context."""

import torch

from .images import DataError

PRECISIONS = ("auto", "bf16", "fp16", "off")


def cpu_has_bf16() -> bool:
    """Tell if this CPU multiplies bfloat16 matrices in hardware: AVX512-BF16, AMX, or Arm's BF16."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    has_arm = any("bf16" in name and bool(value) for name, value in capabilities.items())
    return has_arm or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def amp_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast dtype for `auto | bf16 | fp16 | off`, or None for float32.

    `auto` is bfloat16 on a GPU, float16 if the GPU lacks it, and float32 on other devices. Raise DataError if the
    device lacks the requested dtype.
    """
    if precision == "off" or (precision == "auto" and device.type != "cuda"):
        return None
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = device.type == "cpu" and cpu_has_bf16()
    if precision == "bf16" and not has_bf16:
        raise DataError(f"AMP_DTYPE, --amp: {device} has no bfloat16 arithmetic. Use auto or off.")
    if precision == "fp16" and device.type != "cuda":
        raise DataError("AMP_DTYPE, --amp: fp16 needs an NVIDIA GPU. Use auto, bf16 or off.")
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and has_bf16) else torch.float16


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the autocast context for `auto | bf16 | fp16 | off`, see :func:`amp_dtype`."""
    dtype = amp_dtype(precision, device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
