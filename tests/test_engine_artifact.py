"""Artifacts with engines: both commands that compile them, what is kept and what is built again, and refusals."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import artifacts
import pytest
import tiny
from engine_twin import engine_artifact
from test_engine_build import HAS_WHEEL

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.command_line import parse_bytes
from gemma4_export.configs.errors import ArtifactError, ConfigError
from gemma4_export.configs.manifest import MANIFEST_NAME, Manifest
from gemma4_export.configs.target import load_target
from gemma4_export.exporter import child
from gemma4_export.exporter import commands as exporter_commands
from gemma4_export.runtime import Gemma4
from gemma4_export.runtime import commands as runtime_commands
from gemma4_export.runtime.engine import Compiled, EngineRecord, compile_artifact, read_record
from gemma4_export.runtime.engine import __main__ as service
from gemma4_export.runtime.engine import artifact as artifact_module
from gemma4_export.runtime.verify import verify
from gemma4_export.runtime.verify_table import html_page, text_lines

needs_wheel = pytest.mark.skipif(not HAS_WHEEL, reason="TensorRT-RTX's wheel exists for Linux on x86-64 only")
LOWERED = {"float_type": "bfloat16", "context": 64, "group_bytes": 100_000}  # a few groups

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line in this process: exit code, stdout, stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        main = exporter_commands.main if words[0] == "gemma4-export" else runtime_commands.main
        with artifacts.traces(fresh=False), pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture
def lowered(tmp_path: Path) -> Path:
    """A tiny 31B for rtx4090 whose engines are not compiled yet; to be written into."""
    return copy(engine_artifact(tiny.checkpoint("31b"), "int4", **LOWERED), tmp_path / "lowered")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its engines; not to be written into."""
    folder = tmp_path_factory.mktemp("compiled") / "artifact"
    copy(engine_artifact(tiny.checkpoint("31b"), "int4", **LOWERED), folder)
    compile_folder(folder)
    return folder


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def compile_folder(folder: Path, **options: object) -> Compiled:
    return compile_artifact(Artifact.open(folder, with_engines=False), **options)


def engines_of(folder: Path) -> dict[str, EngineRecord]:
    """Graph -> record of its engine, both hashed."""
    manifest = Artifact.open(folder, check="full").manifest
    assert manifest.engines is not None
    records = {g.file: read_record(folder / str(g.engine), check_engine=True) for g in manifest.engines.groups}
    assert sorted(path.name for path in (folder / "engines").iterdir()) == sorted(r.key for r in records.values())
    return records


# ---------------------------------------------------------------------------------------------------------------------
# What is built


@needs_wheel
def test_a_build_for_a_gpu_ends_in_engines(run: Run, tmp_path: Path) -> None:
    words = ("--recipe", "int4", "--context", 64, "--chunk", 7, "--out", tmp_path / "out", "--build-memory", "4GB")
    code, out, err = run(
        "gemma4-export", "build", "--checkpoint", tiny.checkpoint("31b"), "--target", "rtx4090", *words
    )
    assert code == 0, err
    assert re.search(r"^decoder\.00\.onnx: layers 0 to 5 and the head, [\d.]+ MB: [\d.]+ s, 0\.\d\d GB", err, re.M)
    assert "compiling engines: " in err
    engines, verdict, last = out.splitlines()[-3:]
    assert re.fullmatch(r"1 engines for compute capability 8\.9 by tensorrt-rtx 1\.7\.1, up to 0\.00 GB .*", engines)
    assert verdict.startswith("verify layers: passed: 1 drifts")
    assert verdict.endswith("; no layer was computed: engines cannot be run by this version")
    assert last == "engines are built; this version cannot run them yet"
    (record,) = engines_of(tmp_path / "out").values()
    assert record.compute_capabilities == (89,)
    assert list(record.profiles) == ["decode", "prefill"]
    assert {tensor.name for tensor in record.outputs} >= {"top_logits", "top_ids", "logsumexp", "present.0.key"}
    assert not (tmp_path / "out.partial").exists()
    assert "engine   decoder, layers 0 to 5 and the head" in run("gemma4-export", "inspect", tmp_path / "out")[1]
    code, out, err = run("gemma4-run", "generate", tmp_path / "out", "--prompt", "Hello")
    assert (code, out) == (1, "")
    assert err == (
        f"error: {tmp_path / 'out'}: tensorrt-rtx engines are built; this version cannot run them yet, only ort-cpu\n"
        "hint: build the model for --target cpu\n"
    )


@needs_wheel
def test_engines_of_every_group_for_several_gpus(run: Run, lowered: Path) -> None:
    code, out, err = run("gemma4-run", "build", lowered, "--target", "rtx3090", "--target", "rtx4090")
    assert code == 0, err
    assert re.search(r"^\d engines for compute capability 8\.6, 8\.9 by tensorrt-rtx 1\.7\.1, [\d.]+ MB, 0 of", out)
    records = engines_of(lowered)
    assert len(records) >= 2
    assert len(err.splitlines()) == len(records)
    manifest = Artifact.open(lowered).manifest
    assert manifest.engines is not None
    for group in manifest.engines.groups:
        record = records[group.file]
        assert record.compute_capabilities == (86, 89)
        assert [tensor.name for tensor in record.inputs] == group.inputs
        assert [tensor.name for tensor in record.outputs] == group.outputs
        assert {p: {n: [list(s) for s in r] for n, r in t.items()} for p, t in record.profiles.items()} == (
            group.profiles
        )
        assert (lowered / str(group.engine) / "build.log").is_file()
    assert re.search(r"the head, ", err)


@needs_wheel
def test_building_again_takes_what_is_right_and_builds_what_is_not(run: Run, compiled: Path, tmp_path: Path) -> None:
    folder = copy(compiled, tmp_path / "copy")
    before = (folder / MANIFEST_NAME).read_bytes()
    names = sorted(path.name for path in (folder / "engines").iterdir())
    code, out, _ = run("gemma4-run", "build", folder, "--json")
    assert code == 0
    assert all(engine["was_cached"] for engine in json.loads(out)["engines"])
    assert (folder / MANIFEST_NAME).read_bytes() == before
    # An engine with a flipped bit, one that nothing names, and the log of a build that failed.
    engine = folder / "engines" / names[0] / "model.engine"
    content = bytearray(engine.read_bytes())
    content[5000] ^= 1
    engine.write_bytes(content)
    copy(folder / "engines" / names[1], folder / "engines" / "stale")
    (folder / "engines" / "failed.log").write_text("once")
    with pytest.raises(ArtifactError, match=r"model\.engine: sha256"):
        Artifact.open(folder, check="full")
    code, out, err = run("gemma4-run", "build", folder)
    assert code == 0
    assert err.count("as it was") == len(names) - 1
    assert "removed 1 engines that nothing names any more" in out
    engines_of(folder)


@needs_wheel
def test_a_killed_run_goes_on_with_what_it_finished(lowered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(built: object) -> None:
        raise KeyboardInterrupt

    before = (lowered / MANIFEST_NAME).read_bytes()
    with pytest.raises(KeyboardInterrupt):
        compile_folder(lowered, on_built=stop)
    assert (lowered / MANIFEST_NAME).read_bytes() == before
    assert Artifact.open(lowered).manifest.engines is not None
    again = compile_folder(lowered)
    assert any(engine.was_cached for engine in again.engines)
    assert not all(engine.was_cached for engine in again.engines)


@needs_wheel
def test_a_killed_build_keeps_its_engines(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between its engines and its name: the same command finds them, and nothing else is listed."""
    words = ("--recipe", "int4", "--context", 64, "--chunk", 7, "--verify", "off", "--out", tmp_path / "out")
    line = ("gemma4-export", "build", "--checkpoint", tiny.checkpoint("31b"), "--target", "rtx4090", *words)
    original = child.compile_engines

    def killed(*arguments: object, **options: object) -> Manifest:
        original(*arguments, **options)
        raise ArtifactError("killed", hint="here")

    monkeypatch.setattr("gemma4_export.exporter.requested.compile_engines", killed)
    assert run(*line)[0] == 1
    (tmp_path / "out.partial" / "engines" / "abandoned").mkdir()
    (tmp_path / "out.partial" / "engines" / "abandoned" / "model.engine").write_text("half")
    monkeypatch.setattr("gemma4_export.exporter.requested.compile_engines", original)
    code, _, err = run(*line)
    assert code == 0
    assert "MB: as it was" in err
    assert len(engines_of(tmp_path / "out")) == 1


@needs_wheel
def test_every_byte_of_an_engine_is_verified(compiled: Path, tmp_path: Path) -> None:
    folder = copy(compiled, tmp_path / "copy")
    assert "no layer was computed" in verify(folder).verdict
    engine = next((folder / "engines").glob("*/model.engine"))
    content = bytearray(engine.read_bytes())
    content[-1] ^= 1
    engine.write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{engine.parent.name}/model\.engine: sha256"):
        verify(folder)


@pytest.mark.parametrize("structure", ["31b", "e2b"])
def test_of_engines_tables_are_compared_and_the_report_says_what_was_not(structure: str) -> None:
    folder = engine_artifact(tiny.checkpoint(structure), "int4", **LOWERED)
    report = verify(folder)
    num_layers = Artifact.open(folder).manifest.model.num_layers if structure == "e2b" else 0
    rows = [f"layers.{layer}.ple_rows" for layer in range(num_layers)]
    assert [tap.name for tap in report.taps] == ["inputs_embeds", *rows]
    assert report.passed
    assert report.whole_not_run == "this version cannot run engines"
    assert report.not_covered[0] == "every layer and the head: tensorrt-rtx engines by their hashes only"
    assert text_lines(report)[-1] == report.verdict
    assert report.verdict in html_page(report)
    with pytest.raises(ConfigError, match="--backend ort-cpu: this artifact was packed for tensorrt-rtx"):
        verify(folder, backend="ort-cpu")


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("target", ["h100", "h200", "a100", "jetson-orin", "jetson-thor"])
def test_a_target_whose_builder_is_not_here(run: Run, tmp_path: Path, target: str) -> None:
    out = tmp_path / "out"
    line = ("gemma4-export", "build", "--checkpoint", tiny.checkpoint("31b"), "--target", target, "--out", out)
    code, said, err = run(*line, "--context", 64)
    assert (code, said) == (1, "")
    assert err == (
        f"error: target {target}: TensorRT is not installed: engines for this GPU need it\n"
        'hint: pip install "gemma4-export[tensorrt]" on the device, then gemma4-run build ARTIFACT there; '
        "or --engines later here, and gemma4-run build ARTIFACT where it can\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_the_model_does_not_fit(run: Run, tmp_path: Path) -> None:
    line = ("gemma4-export", "build", "--model", "31b", "--weights", "dummy", "--target", "rtx4090")
    for words, cause, hint in (
        (("--recipe", "bf16"), "31b-dummy as bf16 with 262144 tokens needs ", "--recipe int4 --context "),
        (("--recipe", "int4"), "31b-dummy as int4 with 262144 tokens needs ", "--context "),
    ):
        code, out, err = run(*line, *words, "--out", tmp_path / "out")
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {cause}")
        assert "rtx4090 has 25.8 GB\nhint: " + hint in err
    assert list(tmp_path.iterdir()) == []


@needs_wheel
def test_the_disk_is_asked_for_engines_as_well(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as the folder without them needs is too little, before a weight is written."""
    asked: list[float] = []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    for engines in ((), ("--engines", "later")):
        line = ("gemma4-export", "build", "--model", "e2b", "--weights", "dummy", "--target", "rtx4090")
        code, _, err = run(*line, *engines, "--recipe", "int4", "--out", tmp_path / "out")
        assert code == 2
        asked.append(float(re.search(r"the artifact needs ([\d.]+) GB", err)[1]))  # type: ignore[index]
    assert asked[0] - asked[1] == pytest.approx(1.3, abs=0.05)  # E2B's decoder and head in int4


@needs_wheel
def test_fp8_for_a_gpu_that_has_none(run: Run, lowered: Path) -> None:
    path = lowered / MANIFEST_NAME
    manifest = Manifest.from_json(path.read_text("utf-8"))
    census = {role: dataclasses.replace(entry, format="fp8") for role, entry in manifest.census.items()}
    path.write_text(dataclasses.replace(manifest, recipe="fp8", census=census).to_json(), encoding="utf-8")
    code, _, err = run("gemma4-run", "build", lowered, "--target", "rtx4090", "--target", "rtx3090")
    assert code == 2
    assert err == (
        "error: recipe fp8 for rtx3090: fp8 needs compute capability 8.9, GeForce RTX 3090, 24 GB has 8.6\n"
        "hint: --recipe int8 takes as many bytes\n"
    )


def test_engines_later_names_the_command_that_compiles_them(run: Run, tmp_path: Path) -> None:
    line = ("gemma4-export", "build", "--checkpoint", tiny.checkpoint("31b"), "--target", "h100", "--engines", "later")
    code, out, _ = run(*line, "--context", 64, "--chunk", 7, "--recipe", "int4", "--out", tmp_path / "out")
    assert code == 0
    assert out.splitlines()[-3].startswith("1 engines to compile for tensorrt, compute capability 9.0, up to 0.00 GB")
    assert out.splitlines()[-1] == f"next: gemma4-run build {tmp_path / 'out'}"
    with pytest.raises(ArtifactError, match="TensorRT is not installed"):
        compile_folder(tmp_path / "out")
    with pytest.raises(ArtifactError) as caught:
        Gemma4.load(tmp_path / "out")
    assert "tensorrt engines are not compiled yet; this version cannot run them yet, only ort-cpu" in caught.value.cause


def test_plugins_that_are_missing_or_of_another_version(tmp_path: Path) -> None:
    folder = copy(engine_artifact(tiny.checkpoint("26b-a4b"), "int4", **LOWERED), tmp_path / "experts")
    with pytest.raises(ArtifactError) as caught:
        compile_folder(folder, plugins=tmp_path / "libnone.so")
    assert caught.value.cause == (
        f"{tmp_path}/libnone.so: no such file; the engines of this model contain nodes of ours"
    )
    assert caught.value.hint == "make plugins compiles it, or build the artifact with --experts builtin"
    for contracts, cause in (("", r"has no Gemma4MoE"), ("Gemma4MoE=9", r"Gemma4MoE version 9, this gemma4-export")):
        library = tmp_path / f"lib{len(contracts)}.so"
        source = f'const char* gemma4_plugin_contracts() {{ return "{contracts}"; }}'
        subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", library], input=source, text=True, check=True)
        with pytest.raises(ArtifactError, match=cause):
            compile_folder(folder, plugins=library)
    assert not (folder / "engines").exists()


def test_an_artifact_without_engines(run: Run) -> None:
    folder = artifacts.artifact("31b", recipe="int4", fresh_trace=False)
    code, _, err = run("gemma4-run", "build", folder)
    assert code == 2
    assert err == (
        f"error: {folder}: built for target cpu, which has no engines to compile\n"
        "hint: gemma4-export build --target rtx4090 --engines later writes what engines are compiled from\n"
    )


@needs_wheel
def test_targets_and_memory_that_do_not_fit(run: Run, lowered: Path) -> None:
    for words, cause, hint in (
        (("--target", "rtx4091"), "target 'rtx4091' is not known", "did you mean 'rtx4090'?"),
        (
            ("--target", "h100"),
            "--target h100: runs tensorrt, this artifact was lowered for tensorrt-rtx",
            "build another one: gemma4-export build --target h100",
        ),
        (("--build-memory", "much"), "--build-memory 'much': not a number of bytes", "--build-memory 12GB"),
        (
            ("--build-memory", "100MB"),
            "--build-memory 0.10 GB: building decoder.02.onnx with 0.00 GB of weights takes about 1.00 GB",
            "--build-memory 100",
        ),
    ):
        code, out, err = run("gemma4-run", "build", lowered, *words)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {cause}")
        assert f"\nhint: {hint}" in err
    assert not list((lowered / "engines").glob("*")) if (lowered / "engines").exists() else True


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12GB", 12 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("800M", 8 * 10**8),
        ("4096", 4096),
        ("2 kB", 2000),
        ("7GiB", 7 << 30),
    ],
)
def test_numbers_of_bytes(text: str, number: int) -> None:
    assert parse_bytes("--build-memory", text) == number


@pytest.mark.parametrize("text", ["", "0", "-1GB", "12XB", "GB", "1e9", "0.1"])
def test_what_is_no_number_of_bytes(text: str) -> None:
    with pytest.raises(ConfigError, match="not a number of bytes"):
        parse_bytes("--build-memory", text)


@needs_wheel
def test_too_little_memory_is_said_before_it_is_tried(
    lowered: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(artifact_module, "available_bytes", lambda: 10**8)
    monkeypatch.setattr(artifact_module, "build_engines", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compile_folder(lowered)
    assert re.search(r"building decoder\.0\d\.onnx takes about 1\.00 GB of memory, 0\.10 GB are left", caplog.text)


@needs_wheel
def test_no_room_on_the_disk(lowered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(lowered)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ArtifactError, match=r"engines need 0\.26 GB, the disk has 0\.00 GB free"):
        compile_folder(lowered)


@needs_wheel
def test_two_at_once_in_one_folder(lowered: Path) -> None:
    (lowered / "engines").mkdir()
    handle = os.open(lowered / "engines", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ArtifactError) as caught:
        compile_folder(lowered)
    os.close(handle)
    assert caught.value.cause == f"{lowered / 'engines'}: another process compiles engines here"
    assert caught.value.hint == "wait for it; finished engines are kept"


# ---------------------------------------------------------------------------------------------------------------------
# Between the two processes


def service_says(request: dict[str, object], capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    service.answer(request)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@needs_wheel
def test_what_the_exporter_is_told(lowered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rtx = {"backend": "tensorrt-rtx", "compute_capability": "8.9", "plugins": False}
    assert service_says(rtx, capsys) == [{}]
    (answer,) = service_says(rtx | {"backend": "tensorrt", "compute_capability": "9.0"}, capsys)
    assert answer["error"]["kind"] == "ArtifactError"  # type: ignore[index]
    *lines, last = service_says({"folder": str(lowered), "memory_bytes": None}, capsys)
    assert last == {}
    assert [line["done"] for line in lines] == list(range(1, len(lines) + 1))
    assert len(engines_of(lowered)) == len(lines) == lines[0]["total"]
    (answer,) = service_says({"folder": str(tmp_path / "none"), "memory_bytes": None}, capsys)
    absent = f"{tmp_path / 'none' / MANIFEST_NAME}: No such file or directory"
    assert answer["error"] == {"kind": "ArtifactError", "cause": absent, "hint": "mend that and run it again"}


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "free some space and run it again"),
        (errno.EDQUOT, "free some space and run it again"),
        (errno.EACCES, "mend that and run it again"),
    ],
)
def test_only_a_full_disk_is_told_to_be_freed(
    number: int, hint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path, memory_bytes: int | None) -> None:
        raise OSError(number, os.strerror(number), "engines/x")

    monkeypatch.setattr(service, "_compile", fail)
    (answer,) = service_says({"folder": "absent", "memory_bytes": None}, capsys)
    cause = f"engines/x: {os.strerror(number)}"
    assert answer["error"] == {"kind": "ArtifactError", "cause": cause, "hint": hint}


def test_only_the_lock_is_taken_for_another_builder(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError), artifact_module._only_one(tmp_path):
        raise BlockingIOError(errno.EAGAIN, "of a pipe")


def test_a_builder_that_ends_without_an_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho \'{"line": "one", "done": 1, "total": 2}\'\nkill -9 $$\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    seen: list[str] = []
    with pytest.raises(ArtifactError) as caught:
        child.compile_engines(tmp_path, memory_bytes=None, on_engine=lambda line, done, total: seen.append(line))
    assert seen == ["one"]
    assert caught.value.cause == f"{program} -m gemma4_export.runtime.engine ended without an answer (exit code -9)"
    assert caught.value.hint == "run the same build again: what is finished is kept"


LATER = "--engines later here, and gemma4-run build ARTIFACT where it can"


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("ConfigError", "no\nhint: yes"),
        ("ArtifactError", f"target rtx4090: no\nhint: yes; or {LATER}"),
    ],
)
def test_what_the_builder_refuses_is_raised_here(
    kind: str, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "python"
    error = json.dumps({"error": {"kind": kind, "cause": "no", "hint": "yes"}})
    program.write_text(f"#!/bin/sh\necho '{error}'\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises((ConfigError, ArtifactError)) as caught:
        child.check_engine_builder(load_target("rtx4090"), needs_plugins=False)
    assert str(caught.value) == told


@needs_wheel
def test_ctrl_c_ends_the_builds_under_way(lowered: Path) -> None:
    """A terminal sends it to all processes of the group; the children are inside the library and do not see it."""
    command = [sys.executable, "-m", "gemma4_export.runtime", "build", str(lowered)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as running:
        partials: list[Path] = []
        while not partials:
            partials = list((lowered / "engines").glob("*.partial-*/request.json"))
        os.killpg(running.pid, signal.SIGINT)
        _, err = running.communicate(timeout=20)
    assert running.returncode not in (0, -9)
    assert "as it was" not in err
    assert not list((lowered / "engines").glob("*.partial-*"))
