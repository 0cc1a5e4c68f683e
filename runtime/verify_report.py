"""What a verification found: every drift beside its bound, the first one outside, and how that is written down."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gemma4_export.configs.evidence import REPORTS_FOLDER, TAP_ROLES, VerifiedRole
from gemma4_export.configs.output import naming

Level = Literal["layers", "full"]
Against = Literal["onnxruntime", "tensorrt"]
"""Another runner that the same graphs are compared with; its report is in ``polygraphy_report.py``."""
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TapDrift:
    """How far one tensor is from the oracle's, as ``plugins/common/drift.py`` measures it."""

    name: str
    """As the oracle spells it, such as ``layers.3.mlp``."""
    layer: int | None
    role: VerifiedRole
    drift: float
    bound: float
    int8_drift: float | None
    """With activations rounded to int8; reported, held to nothing."""
    rows: int
    rows_near_a_tie: int
    """Tokens left out because rounding may send them to another expert."""

    @property
    def is_compared(self) -> bool:
        """Whether there was a token to judge; where there was none, ``drift`` is 0 and says nothing."""
        return self.rows > 0

    @property
    def is_inside(self) -> bool:
        return self.is_compared and self.drift <= self.bound

    @property
    def finding(self) -> str:
        """What the drift of one that is outside says, for a sentence."""
        if not self.is_compared:
            return f"not compared: every token, all {self.rows_near_a_tie}, is too near a tie between two experts"
        return f"drifts {self.drift:.2e}, bound {self.bound:.2e}"


def worst(taps: Iterable[TapDrift]) -> TapDrift | None:
    """The tap that is furthest out, measured in its own bound."""
    return max(taps, key=lambda tap: (not tap.is_inside, tap.drift / tap.bound), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeModel:
    """All layers after one another in the decoder's own graph, on the oracle's prompts."""

    activations: Literal["fp32", "int8"]
    drift: float
    bound: float | None
    """None: reported, held to nothing (int8 activations, or a model whose float32 pass was not recorded)."""
    kl_divergence: float
    """Mean over tokens of KL(oracle || artifact), in nats."""
    top1_agreement: float
    compactions: int
    """Times that the sliding buffers were moved during the longest prompt."""
    greedy_agreement: str | None
    """Such as ``8 of 8 ids``: up to the first one that rounding decides; None where none was recorded."""
    greedy_agrees: bool

    @property
    def is_inside(self) -> bool:
        finite = self.drift < float("inf")
        return finite and (self.bound is None or (self.drift <= self.bound and self.greedy_agrees))


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One verification of one artifact on one device."""

    model: str
    recipe: str
    manifest_sha256: str
    backend: str
    device: str
    versions: dict[str, str]
    level: Level
    files: int
    """Files whose sha256 is as the manifest says."""
    prompts: int
    tokens: int
    """Of each prompt."""
    sliding_window: int | None
    taps: list[TapDrift]
    whole: list[WholeModel]
    whole_not_run: str | None
    """Why the whole model was not run."""
    not_covered: list[str]

    @property
    def first_outside(self) -> TapDrift | None:
        """The first drift outside its bound, in the order in which a forward pass computes."""
        return next((tap for tap in self.taps if not tap.is_inside), None)

    @property
    def has_layers(self) -> bool:
        """Whether anything was computed; tables alone are read."""
        return any(tap.role not in ("embedding", "ple") for tap in self.taps)

    @property
    def layer_roles(self) -> list[VerifiedRole]:
        """Roles of which layers have taps, in the order in which a layer computes them."""
        present = {tap.role for tap in self.taps if tap.layer is not None}
        return [role for role in dict.fromkeys(TAP_ROLES.values()) if role in present]

    def by_layer(self) -> dict[int, list[TapDrift]]:
        """Layer -> its taps; what lies outside the layers is in none."""
        layers: dict[int, list[TapDrift]] = {}
        for tap in self.taps:
            if tap.layer is not None:
                layers.setdefault(tap.layer, []).append(tap)
        return dict(sorted(layers.items()))

    @property
    def lengths(self) -> str:
        """What was run, in tokens, and whether the sliding window was crossed."""
        prompts = f"{self.prompts} prompts of {self.tokens} tokens"
        if self.sliding_window is None:
            return f"{prompts}; no layer slides"
        reach = "longer than" if self.tokens > self.sliding_window else "within"
        return f"{prompts}, {reach} the sliding window of {self.sliding_window}"

    @property
    def passed(self) -> bool:
        return self.first_outside is None and all(one.is_inside for one in self.whole)

    @property
    def verdict(self) -> str:
        """One line."""
        first = self.first_outside
        if first is not None:
            where = "outside the layers" if first.layer is None else f"layer {first.layer}"
            return f"failed: {where}, {first.role}: {first.name} {first.finding}"
        for one in self.whole:
            if not one.is_inside:
                bound = "finite" if one.bound is None else f"{one.bound:.2e}"
                ids = "" if one.greedy_agrees else f", {one.greedy_agreement}"
                return f"failed: every layer passes alone, the whole model drifts {one.drift:.2e}, bound {bound}{ids}"
        unseen = "" if self.has_layers else "; no layer was computed: engines cannot be run by this version"
        return f"passed: {len(self.taps)} drifts inside their bounds, {self.files} files as recorded{unseen}"

    def to_json(self) -> str:
        """Everything, with ``passed``, ``verdict`` and ``first_outside`` spelt out; drifts that are inf become null."""
        values = {"format": FORMAT, "passed": self.passed, "verdict": self.verdict, **dataclasses.asdict(self)}
        values["first_outside"] = None if self.first_outside is None else self.first_outside.name
        return json.dumps(finite(values), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, artifact: Path) -> Path:
        """Write ``verify/<device>.json`` into the artifact: one report per backend and device, the newest."""
        path = artifact / REPORTS_FOLDER / f"{slug(f'{self.backend} {self.device}')}.json"
        path.parent.mkdir(exist_ok=True)
        with naming(path):
            path.write_text(self.to_json(), encoding="utf-8")
        return path


def finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if value == float("inf") else value


def slug(text: str) -> str:
    """Small letters, digits and single dashes: a file name everywhere."""
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


def device_name() -> str:
    """The processor's own name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
