"""What a comparison through polygraphy found: two runners beside each other and beside the oracle, output by output."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from gemma4_export.configs.evidence import REPORTS_FOLDER, VerifiedRole
from gemma4_export.configs.output import naming
from gemma4_export.runtime.polygraphy_runners import SHIPPED
from gemma4_export.runtime.verify_report import Against, finite, slug

FORMAT = 1
_OUTPUTS_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputApart:
    """One output of one graph. Differences are drifts, as ``plugins/common/drift.py`` measures them."""

    name: str
    """As the oracle spells it; the head's parts are ``logits.0`` and on."""
    layer: int | None
    role: VerifiedRole
    apart: float
    """Between the two runners; up to twice the bound passes: each may be one away from the oracle."""
    shipped: float
    """From the oracle, the artifact as gemma4-run loads it with activations in float32."""
    against: float
    """From the oracle, the other runner."""
    bound: float
    agrees: bool
    """Polygraphy's own verdict on all three, and whether there were rows to judge."""
    rows: int
    """Rows that were compared; without those that rounding may send to another expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgainstReport:
    """One artifact on two runners."""

    model: str
    recipe: str
    manifest_sha256: str
    backend: str
    against: Against
    device: str
    versions: dict[str, str]
    outputs: list[OutputApart]

    @property
    def first_apart(self) -> OutputApart | None:
        """The first output that does not agree, in the order in which a forward pass computes."""
        return next((output for output in self.outputs if not output.agrees), None)

    @property
    def passed(self) -> bool:
        return self.first_apart is None

    @property
    def verdict(self) -> str:
        """One line; of a failure, where it is and who is off."""
        first = self.first_apart
        if first is None:
            worst = max(self.outputs, key=lambda output: output.apart / output.bound)
            return (
                f"passed: {SHIPPED} and {self.against} agree on {len(self.outputs)} outputs; "
                f"furthest apart is {worst.name} with {worst.apart:.2e}, limit {2 * worst.bound:.2e}"
            )
        where = "outside the layers" if first.layer is None else f"layer {first.layer}"
        off = [name for name, drift in ((SHIPPED, first.shipped), (self.against, first.against)) if drift > first.bound]
        blame = f"{' and '.join(off)} off the oracle" if off else "no row that rounding cannot send elsewhere"
        return (
            f"failed: {where}, {first.role}: {first.name}: {first.apart:.2e} apart, limit {2 * first.bound:.2e}; "
            f"{blame} ({SHIPPED} {first.shipped:.2e}, {self.against} {first.against:.2e}, bound {first.bound:.2e})"
        )

    def to_json(self) -> str:
        """Everything, with ``passed``, ``verdict`` and ``first_apart`` spelt out; drifts that are inf become null."""
        values = {"format": FORMAT, "passed": self.passed, "verdict": self.verdict, **dataclasses.asdict(self)}
        values["first_apart"] = None if self.first_apart is None else self.first_apart.name
        return json.dumps(finite(values), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, artifact: Path) -> Path:
        """Write ``verify/<device>-against-<runner>.json`` into the artifact, beside the report of ``verify``."""
        name = slug(f"{self.backend} {self.device} against {self.against}")
        path = artifact / REPORTS_FOLDER / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        with naming(path):
            path.write_text(self.to_json(), encoding="utf-8")
        return path


def text_lines(report: AgainstReport) -> list[str]:
    """The outputs that do not agree, or else those furthest apart; then the verdict."""
    chosen = [output for output in report.outputs if not output.agrees]
    kind = "do not agree" if chosen else "furthest apart"
    if not chosen:
        chosen = sorted(report.outputs, key=lambda output: output.apart / output.bound, reverse=True)
    shown = chosen[:_OUTPUTS_SHOWN]
    width = max(len(output.name) for output in shown)
    lines = [
        f"{SHIPPED} against {report.against}, {kind}, {len(shown)} of {len(chosen)}:",
        f"{'':{width}}{'apart':>12}{'limit':>12}{SHIPPED:>14}{report.against:>14}{'bound':>12}",
    ]
    for one in shown:
        drifts = f"{one.apart:>12.1e}{2 * one.bound:>12.1e}{one.shipped:>14.1e}{one.against:>14.1e}{one.bound:>12.1e}"
        lines.append(f"{one.name:{width}}{drifts}{'' if one.agrees else ' !'}")
    return [*lines, report.verdict]
