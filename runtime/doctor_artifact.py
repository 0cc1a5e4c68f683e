"""What of an artifact runs on a machine, what would fail, and the command that mends it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.errors import ArtifactError
from gemma4_export.configs.formats import WeightFormat
from gemma4_export.configs.manifest import EnginesEntry, GroupEntry, Manifest
from gemma4_export.configs.step_bytes import PROCESS_BYTES
from gemma4_export.configs.target import RUN_BACKEND
from gemma4_export.plugins.moe.contract import MOE
from gemma4_export.runtime.doctor import (
    COMPILE_PLUGINS,
    CUDA_MAJOR,
    INSTALL_DRIVER,
    INSTALL_ONNXRUNTIME,
    Finding,
    is_old,
    missing_resources,
    onnxruntime_finding,
    packages_finding,
    plugin_finding,
    targets_of,
)
from gemma4_export.runtime.doctor_facts import Disk, Facts, Failure
from gemma4_export.runtime.doctor_probe import read_disk
from gemma4_export.runtime.engine.artifact import needs_plugins
from gemma4_export.runtime.engine.build import build_memory
from gemma4_export.runtime.memory import size, weights_bytes

_REPORT_BYTES = 1_000_000
"""Room for a report of ``verify``; they take up to 100 kB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactFacts:
    """An artifact folder: its manifest, or why it does not open; ``disk`` is the one it lies on."""

    folder: str
    manifest: Manifest | None
    failure: Failure | None
    disk: Disk | None


def probe_artifact(folder: Path) -> ArtifactFacts:
    """Open ``folder`` as a load does: sizes of all files, hashes of small ones. Never raises."""
    try:
        manifest, failure = Artifact.open(folder).manifest, None
    except ArtifactError as error:
        manifest, failure = None, Failure(cause=error.cause, hint=error.hint)
    except OSError as error:
        cause = f"{error.filename or folder}: {error.strerror or error}"
        manifest, failure = None, Failure(cause=cause, hint=f"chmod -R u+rX '{folder}'")
    return ArtifactFacts(
        folder=str(folder),
        manifest=manifest,
        failure=failure,
        disk=read_disk(folder) if folder.is_dir() else None,
    )


def artifact_findings(artifact: ArtifactFacts, facts: Facts) -> list[Finding]:
    """What these facts mean for running the artifact; a ``problem`` is what keeps it from that."""
    manifest = artifact.manifest
    if manifest is None:
        failure = artifact.failure or Failure(cause=f"{artifact.folder}: not opened")
        return [Finding(level="problem", what="artifact", found=failure.cause, mend=failure.hint)]
    total = sum(entry.bytes for entry in manifest.files.values())
    made_by = manifest.versions.get("gemma4-export", "of unknown version")
    about = (
        f"{manifest.model.name} for {manifest.target}, {manifest.recipe}, format {manifest.format}, made by "
        f"gemma4-export {made_by}; {len(manifest.files)} files, {size(total)}, whole"
    )
    findings = [Finding(level="ok", what="artifact", found=about)]
    if manifest.has_dummy_weights:
        found = "random weights, for sizes and speed: what it says means nothing"
        findings.append(Finding(level="warning", what="weights", found=found))
    packages = packages_finding(facts)
    if packages.level != "ok":
        findings.append(packages)
    if "decoder" in manifest.graphs:
        findings += _decoder(manifest, facts)
    if manifest.engines is not None:
        findings += _engines(manifest, manifest.engines, artifact, facts)
    return [*findings, *_disk(artifact)]


# ---------------------------------------------------------------------------------------------------------------------
# The decoder as one graph


def _decoder(manifest: Manifest, facts: Facts) -> Iterator[Finding]:
    backend = manifest.graphs["decoder"].backend
    if backend != RUN_BACKEND:
        yield Finding(
            level="problem",
            what="backend",
            found=f"{backend}, which this version cannot run, only {RUN_BACKEND}",
            mend="gemma4-export build --target cpu …",
        )
        return
    yield _backend(facts)
    yield from _memory(manifest, facts)
    forms = {WeightFormat.parse(entry.format) for entry in manifest.census.values()}
    if any(form.is_quantized for form in forms) and manifest.activations == "int8":
        features = set(facts.processor.features)
        if features and not {"avx2", "asimd"} & features:
            found = "int8 products without AVX2 or NEON: it runs, many times slower"
            yield Finding(level="warning", what="processor", found=found)


def _backend(facts: Facts) -> Finding:
    found = onnxruntime_finding(facts.onnxruntime)
    text = f"{RUN_BACKEND}: {found.found}"
    runs = facts.onnxruntime.version is not None and "CPUExecutionProvider" in facts.onnxruntime.providers
    if not runs:
        return Finding(level="problem", what="backend", found=text, mend=found.mend or INSTALL_ONNXRUNTIME)
    level = "warning" if found.level == "problem" else found.level
    return Finding(level=level, what="backend", found=text, mend=found.mend)


def _memory(manifest: Manifest, facts: Facts) -> Iterator[Finding]:
    """Weights that do not fit are what a load refuses; a full context that does not fit may never come."""
    available = facts.memory.available_bytes
    weights, kv = weights_bytes(manifest), manifest.kv
    whole = kv.num_bytes(manifest.context)
    needs = (
        f"weights {size(weights)} + KV of {manifest.context} tokens {size(whole)} + process "
        f"{size(PROCESS_BYTES)} = {size(weights + whole + PROCESS_BYTES)}"
    )
    if available is None:
        yield Finding(level="warning", what="memory", found=f"{needs}; how much there is, nothing says")
        return
    mend = "close what else runs" if manifest.recipe.startswith("int4") else "gemma4-export build --recipe int4 …"
    left = f"{size(available)} can be had"
    if weights > available:
        yield Finding(level="problem", what="memory", found=f"{needs}; {left}, less than the weights", mend=mend)
        return
    room = available - weights - PROCESS_BYTES
    if kv.num_bytes(manifest.context) <= room:
        yield Finding(level="ok", what="memory", found=f"{needs}; {left}")
    else:
        fits = f"{left}: about {_fitting_tokens(manifest, room)} tokens fit"
        yield Finding(level="warning", what="memory", found=f"{needs}; {fits}", mend=mend)
    peak = manifest.verify.load_peak_bytes
    if peak > available:
        found = f"loading takes {size(peak)} for a moment; {left}"
        yield Finding(level="warning", what="memory", found=found, mend="close what else runs while it loads")


def _fitting_tokens(manifest: Manifest, room: int) -> int:
    """Longest sequence whose caches take ``room`` bytes."""
    fixed = manifest.kv.num_bytes(0)
    per_token = manifest.kv.num_bytes(1) - fixed
    if per_token == 0:  # sliding layers alone
        return manifest.context if fixed <= room else 0
    return max(0, min(manifest.context, (room - fixed) // per_token))


# ---------------------------------------------------------------------------------------------------------------------
# Engines


def _engines(manifest: Manifest, engines: EnginesEntry, artifact: ArtifactFacts, facts: Facts) -> Iterator[Finding]:
    state = "not compiled yet" if engines.compiled is None else f"compiled by {engines.compiled.library_version}"
    yield Finding(
        level="problem",
        what="backend",
        found=f"{len(engines.groups)} {engines.backend} engines, {state}; this version compiles engines and runs "
        f"{RUN_BACKEND} only",
        mend="gemma4-export build --target cpu …",
    )
    yield _device(engines, facts)
    yield _builder(engines, facts)
    if needs_plugins(manifest):
        yield _plugins(facts)
    if engines.compiled is None:
        yield from _build_room(engines.groups, artifact, facts)


def _device(engines: EnginesEntry, facts: Facts) -> Finding:
    """Whether a GPU of this machine is one that they are for; compiling for RTX cards does without."""
    compiled = engines.compiled
    wanted = [engines.compute_capability] if compiled is None else compiled.compute_capabilities
    here = sorted({gpu.compute_capability for gpu in facts.driver.gpus})
    fitting = [capability for capability in here if capability in wanted]
    if fitting and is_old(facts.driver):
        found = f"driver {facts.driver.version} runs CUDA up to {facts.driver.cuda_version}, engines need {CUDA_MAJOR}"
        return Finding(level="problem", what="device", found=found, mend=INSTALL_DRIVER)
    if fitting:
        found = f"a GPU of compute capability {', '.join(fitting)} is here"
        return Finding(level="ok", what="device", found=found)
    found = f"here: {', '.join(here)}" if here else "here is none"
    others = [name for each in here for name in targets_of(each, engines.backend)]
    elsewhere = "copy the folder to a machine with such a GPU and run gemma4-run doctor ARTIFACT there"
    return Finding(
        level="warning" if engines.backend == "tensorrt-rtx" and compiled is None else "problem",
        what="device",
        found=f"for a GPU of compute capability {', '.join(wanted)}, {found}",
        mend=f"gemma4-run build ARTIFACT --target {others[0]}" if others else elsewhere,
    )


def _builder(engines: EnginesEntry, facts: Facts) -> Finding:
    """Whether what compiles the engines is here, and is what compiled them: they load into one version only."""
    is_rtx = engines.backend == "tensorrt-rtx"
    library = facts.tensorrt_rtx if is_rtx else facts.tensorrt
    install = f'pip install "gemma4-export[{"rtx" if is_rtx else "tensorrt"}]"'

    def finding(text: str, mend: str | None) -> Finding:
        return Finding(level="problem" if mend else "ok", what="builder", found=text, mend=mend)

    if library.failure is not None:
        return finding(f"{engines.backend}: {library.failure.cause}", library.failure.hint or install)
    if library.version is None:
        return finding(f"{engines.backend} is not installed: no engine can be compiled here", install)
    absent = f"sm{engines.compute_capability.replace('.', '')}"
    if not is_rtx and absent in missing_resources(facts):
        text = f"{engines.backend} {library.version} without libnvinfer_builder_resource_{absent}"
        return finding(text, "pip install --force-reinstall tensorrt-cu13-libs")
    compiled = engines.compiled
    if compiled is not None and compiled.library_version != library.version:
        text = f"engines load into {engines.backend} {compiled.library_version} only, here is {library.version}"
        return finding(text, "gemma4-run build ARTIFACT")
    return finding(f"{engines.backend} {library.version}", None)


def _plugins(facts: Facts) -> Finding:
    found = plugin_finding(facts)
    if found.level == "ok" and MOE.name in facts.plugins.contracts:
        return found
    return Finding(level="problem", what="plugins", found=f"{MOE.name} is needed; {found.found}", mend=COMPILE_PLUGINS)


def _build_room(groups: list[GroupEntry], artifact: ArtifactFacts, facts: Facts) -> Iterator[Finding]:
    """Memory for the largest group alone, disk for all engines: each is about as large as its weights."""
    largest, engines = max(group.weight_bytes for group in groups), sum(group.weight_bytes for group in groups)
    needed, available = build_memory(largest), facts.memory.available_bytes
    found = f"compiling the largest group ({size(largest)}) takes {size(needed)}"
    if available is not None and needed > available:
        text = f"{found}; {size(available)} can be had"
        yield Finding(level="problem", what="memory", found=text, mend="close what else runs, or compile elsewhere")
    else:
        yield Finding(level="ok", what="memory", found=found)
    if artifact.disk is not None and engines > artifact.disk.free_bytes:
        free = f"{size(artifact.disk.free_bytes)} free in {artifact.disk.path}"
        text = f"engines take about {size(engines)}; {free}"
        yield Finding(level="problem", what="disk", found=text, mend=f"free some space, or move {artifact.folder}")


def _disk(artifact: ArtifactFacts) -> Iterator[Finding]:
    if artifact.disk is not None and artifact.disk.free_bytes < _REPORT_BYTES:
        found = f"{artifact.disk.free_bytes} bytes free in {artifact.folder}: verify cannot write its report"
        yield Finding(level="warning", what="disk", found=found, mend=f"df -h '{artifact.folder}'")
