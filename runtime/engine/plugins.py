"""Plugin libraries of ours, by the contracts that they were compiled from."""

from __future__ import annotations

import ctypes
from pathlib import Path

from gemma4_export.configs.errors import ArtifactError
from gemma4_export.plugins.moe.contract import MOE

CONTRACTS = {contract.name: contract.version for contract in (MOE,)}
"""op -> version of its contract, as the graphs of this version mean it."""


def library_contracts(library: Path) -> dict[str, int]:
    """What ``library`` says that it implements.

    Raises:
        ArtifactError: it does not load, is none of ours, or implements another contract version than graphs of today.
    """
    try:
        describe = ctypes.CDLL(str(library)).gemma4_plugin_contracts
    except (OSError, AttributeError) as error:
        raise ArtifactError(f"{library}: not a plugin library of ours ({error})", hint="make plugins") from error
    describe.restype = ctypes.c_char_p
    found = {name: int(version) for name, _, version in (entry.partition("=") for entry in describe().decode().split())}
    for name, version in found.items():
        if CONTRACTS.get(name) != version:
            expected = f"version {CONTRACTS[name]}" if name in CONTRACTS else "no such op"
            raise ArtifactError(
                f"{library}: {name} version {version}, this gemma4-export has {expected}",
                hint="make plugins compiles the library of this version",
            )
    return found
