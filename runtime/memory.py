"""What a model takes in memory and what there is, so that a load that cannot fit is refused before it begins."""

from __future__ import annotations

from pathlib import Path

from gemma4_export.configs.errors import ArtifactError, ConfigError
from gemma4_export.configs.manifest import Manifest
from gemma4_export.configs.step_bytes import PROCESS_BYTES, cpu_memory_bytes


def check_memory(manifest: Manifest, max_memory_bytes: int | None) -> None:
    """Refuse a load that would pass ``max_memory_bytes``, or without one what the system has left.

    A cap is compared with weights, the KV cache of the whole context and the process; what the system has left with
    weights alone, because caches grow with the conversation.

    Raises:
        ConfigError: ``max_memory_bytes`` is no positive integer.
        ArtifactError: it does not fit.
    """
    weights = sum(cpu_memory_bytes(manifest.census, activations=manifest.activations).values())
    if max_memory_bytes is None:
        left = available_bytes()
        if left is not None and weights > left:
            raise ArtifactError(
                f"{manifest.model.name}: weights of {_gb(weights)} in memory, {_gb(left)} are left on this machine",
                hint="close another model, or build with a smaller recipe: --recipe int4",
            )
        return
    if isinstance(max_memory_bytes, bool) or not isinstance(max_memory_bytes, int) or max_memory_bytes < 1:
        raise ConfigError(
            f"max_memory_bytes: expected a positive integer, found {max_memory_bytes!r}", hint="4 GB is 4_000_000_000"
        )
    kv = manifest.kv.num_bytes(manifest.context)
    needed = weights + kv + PROCESS_BYTES
    if needed > max_memory_bytes:
        raise ArtifactError(
            f"{manifest.model.name}: needs {_gb(needed)} (weights {_gb(weights)}, KV of {manifest.context} tokens "
            f"{_gb(kv)}, process {_gb(PROCESS_BYTES)}), max_memory_bytes is {_gb(max_memory_bytes)}",
            hint="raise max_memory_bytes, or build with a smaller --context or --recipe int4",
        )


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that can still be had without swapping, the container's limit included; None where nothing says so."""
    left = [amount for amount in (_system_left(root), _container_left(root)) if amount is not None]
    return min(left, default=None)


def _system_left(root: Path) -> int | None:
    path = root / "proc/meminfo"
    lines = path.read_text(encoding="ascii").splitlines() if path.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _container_left(root: Path) -> int | None:
    """What cgroup v2 still allows; page cache can be dropped and does not count as used."""
    group = root / "sys/fs/cgroup"
    files = [group / name for name in ("memory.max", "memory.current", "memory.stat")]
    if not all(path.is_file() for path in files):
        return None
    limit, current, stat = (path.read_text(encoding="ascii").strip() for path in files)
    if limit == "max":
        return None
    counts = dict(line.split() for line in stat.splitlines())
    return max(0, int(limit) - int(current) + int(counts.get("file", 0)))


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
