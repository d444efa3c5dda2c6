"""How much memory there is, and a refusal before long work that needs more."""

from __future__ import annotations

import psutil
import torch


def available_bytes(device: torch.device | str = "cpu") -> int:
    """Free memory of the device, in bytes."""
    device = torch.device(device)
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def refuse_more_than_available(needed: int, what: str, remedy: str, device: torch.device | str = "cpu") -> None:
    """MemoryError with both sizes and the remedy when `what` does not fit."""
    free = available_bytes(device)
    if needed > free:
        raise MemoryError(f"{what} needs about {size(needed)} and {size(free)} are available; {remedy}")


def size(count: float) -> str:
    """'12.3 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
