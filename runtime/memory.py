"""What a model takes in memory and what there is, so that a load that cannot fit is refused before it begins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gemma4_export.configs.errors import ArtifactError
from gemma4_export.configs.manifest import Manifest
from gemma4_export.configs.step_bytes import PROCESS_BYTES, cpu_memory_bytes
from gemma4_export.runtime import checks


def check_memory(manifest: Manifest, max_memory_bytes: int | None) -> None:
    """Refuse a load that would pass ``max_memory_bytes``, or without one what the system has left.

    A cap is compared with weights, the KV cache of the whole context and the process; what the system has left with
    weights alone, because caches grow with the conversation.

    Raises:
        ConfigError: ``max_memory_bytes`` is no positive integer.
        ArtifactError: it does not fit.
    """
    weights = weights_bytes(manifest)
    if max_memory_bytes is None:
        left = available_bytes()
        if left is not None and weights > left:
            raise ArtifactError(
                f"{manifest.model.name}: weights of {size(weights)} in memory, {size(left)} are left on this machine",
                hint="close another model, or build with a smaller recipe: --recipe int4",
            )
        return
    checks.integer("max_memory_bytes", max_memory_bytes, 1, None, "4 GB is 4_000_000_000")
    kv = manifest.kv.num_bytes(manifest.context)
    needed = weights + kv + PROCESS_BYTES
    if needed > max_memory_bytes:
        raise ArtifactError(
            f"{manifest.model.name}: needs {size(needed)} (weights {size(weights)}, KV of {manifest.context} tokens "
            f"{size(kv)}, process {size(PROCESS_BYTES)}), max_memory_bytes is {size(max_memory_bytes)}",
            hint="raise max_memory_bytes, or build with a smaller --context or --recipe int4",
        )


def weights_bytes(manifest: Manifest) -> int:
    """Memory that the weights of a CPU artifact take once they are loaded."""
    return sum(cpu_memory_bytes(manifest.census, activations=manifest.activations).values())


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that can still be had without swapping, the container's limit included; None where nothing says so."""
    container = container_memory(root)
    left = [amount for amount in (_meminfo(root, "MemAvailable"), container and container.left) if amount is not None]
    return min(left, default=None)


def total_bytes(root: Path = Path("/")) -> int | None:
    """Memory of the machine; None where nothing says so."""
    return _meminfo(root, "MemTotal")


class Container(NamedTuple):
    """What a control group allows, and how much of that is left, in bytes."""

    limit: int
    left: int


def container_memory(root: Path = Path("/")) -> Container | None:
    """The tightest limit on this process; None without one."""
    groups = [group for group in map(_limit, _groups(root)) if group is not None]
    return min(groups, key=lambda group: group.left, default=None)


def _meminfo(root: Path, name: str) -> int | None:
    path = root / "proc/meminfo"
    lines = path.read_text(encoding="ascii").splitlines() if path.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _groups(root: Path) -> Iterator[Path]:
    """This process's own control group and those around it; a limit on any of them holds."""
    path = root / "proc/self/cgroup"
    own = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in own:
        _, controllers, name = line.split(":", 2)
        if controllers in ("", "memory"):  # version 2, or version 1 with a hierarchy of memory alone
            group = root / "sys/fs/cgroup" / controllers / name.lstrip("/")
            yield from (group, *(parent for parent in group.parents if (root / "sys/fs/cgroup") in parent.parents))
    # A container sees its own group as the root, whatever the file above calls it.
    yield from (root / "sys/fs/cgroup", root / "sys/fs/cgroup/memory")


_NO_LIMIT = 1 << 62
"""Version 1 writes about 2 ** 63 where there is none."""


def _limit(group: Path) -> Container | None:
    """What one group still allows; page cache can be dropped and does not count as used."""
    version_2 = ("memory.max", "memory.current")
    version_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for names in (version_2, version_1):
        files = [group / name for name in (*names, "memory.stat")]
        if all(path.is_file() for path in files):
            limit, current, stat = (path.read_text(encoding="ascii").strip() for path in files)
            if limit == "max" or int(limit) >= _NO_LIMIT:
                return None
            counts = dict(line.split() for line in stat.splitlines())
            cached = int(counts.get("file", counts.get("total_cache", 0)))
            return Container(int(limit), max(0, int(limit) - int(current) + cached))
    return None


def size(count: int) -> str:
    """Three digits or so: a cap of a megabyte is not 0.00 GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count} bytes"
