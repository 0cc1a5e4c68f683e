"""What a mistake at the command line shows: one line of cause, one of hint, an exit code, and nothing written."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import artifacts
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from gemma4_export.configs.errors import ConfigError
from gemma4_export.configs.manifest import FORMAT
from gemma4_export.configs.target import check_buildable, load_target
from gemma4_export.exporter import commands as exporter_commands
from gemma4_export.exporter.commands.progress import BuildProgress
from gemma4_export.runtime import commands as runtime_commands

MAINS = {"gemma4-export": exporter_commands.main, "gemma4-run": runtime_commands.main}
CHECK_FAILED, MISUSE = 1, 2


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a sound checkpoint, a base one, and their artifacts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "checkpoint").symlink_to(tiny.checkpoint("31b"))
    (tmp_path / "artifact").symlink_to(artifacts.artifact("31b", context=64, fresh_trace=False))
    return tmp_path


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Outcome:
    """How a command line ended."""

    def __init__(self, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        words = shlex.split(line)
        monkeypatch.setattr(sys, "argv", words)
        before = tree(Path.cwd())
        capsys.readouterr()
        with artifacts.traces(fresh=False), pytest.raises(SystemExit) as ended:
            MAINS[words[0]]()
        self.code = ended.value.code
        self.out, self.err = capsys.readouterr()
        self.has_written = tree(Path.cwd()) != before

    def check_refused(self, code: int) -> None:
        """Nothing on stdout, no traceback, nothing written; stderr ends with one line of cause and one with a hint."""
        assert self.code == code, self.err
        assert self.out == ""
        assert "Traceback" not in self.err
        assert not self.has_written
        *_, cause, hint = self.err.splitlines()
        assert cause.startswith("error: ")
        assert hint.startswith("hint: ")


Run = Callable[[str], Outcome]


@pytest.fixture
def run(workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return lambda line: Outcome(line, capsys, monkeypatch)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


@pytest.mark.parametrize(
    ("line", "cause", "hint"),
    [
        (
            "gemma4-export build --checkpoint checkpoint --target rtx4091",
            "target 'rtx4091' is not known",
            "did you mean 'rtx4090'?",
        ),
        (
            "gemma4-export build --checkpoint checkpoint --target tpu",
            "target 'tpu' is not known",
            "did you mean 'cpu'?",
        ),
        (
            "gemma4-export build --checkpoint checkpoint --target cpu --recipe fp23",
            "recipe 'fp23' is not known",
            "did you mean 'fp32'?",
        ),
        (
            "gemma4-export build --checkpoint checkpoint --target cpu --recipe int3",
            "recipe 'int3' is not known",
            "did you mean 'int8'?",
        ),
        (
            "gemma4-export build --model 26b-a4 --target cpu",
            "model '26b-a4' is not known",
            "did you mean '26b-a4b'?",
        ),
        (
            "gemma4-export build --target cpu",
            "give one of --checkpoint and --model",
            "--checkpoint DIR, or --model e2b to download",
        ),
        (
            "gemma4-export build --target cpu --checkpoint checkpoint --model e2b",
            "give one of --checkpoint and --model",
            "--checkpoint DIR, or --model e2b to download",
        ),
        (
            "gemma4-export build --checkpoint checkpoint --target cpu --context 0",
            "--context 0: expected 2 to 4096, the model's max_position_embeddings",
            "leave --context out for 4096 tokens",
        ),
        (
            "gemma4-export build --checkpoint checkpoint --target cpu --context 4097",
            "--context 4097: expected 2 to 4096, the model's max_position_embeddings",
            "leave --context out for 4096 tokens",
        ),
        (
            "gemma4-export build --checkpoint checkpoint --target cpu --context 64 --chunk 65",
            "--chunk 65: expected 1 to 64, the context",
            "leave --chunk out for 64 tokens",
        ),
        (
            "gemma4-export build --checkpoint checkpoint --target cpu --chunk 0",
            "--chunk 0: expected 1 to 4096, the context",
            "leave --chunk out for 256 tokens",
        ),
        (
            "gemma4-run generate artifact",
            "give one of --prompt and --prompt-file",
            'gemma4-run generate ARTIFACT --prompt "Hello"',
        ),
        (
            "gemma4-run generate artifact --prompt hello --prompt-file -",
            "give one of --prompt and --prompt-file",
            'gemma4-run generate ARTIFACT --prompt "Hello"',
        ),
        (
            "gemma4-run generate artifact --prompt-file nowhere.txt",
            "nowhere.txt: no such file",
            "--prompt-file - reads standard input",
        ),
        (
            "gemma4-run generate artifact --prompt hello --temperature 0 --top-k 5",
            "temperature 0 picks the most likely token, top_k 5 would change nothing",
            "leave top_k out, or set a temperature above 0",
        ),
        (
            "gemma4-run generate artifact --prompt hello --temperature nan",
            "temperature: expected a finite number of at least 0, found nan",
            "0 picks the most likely token",
        ),
        (
            "gemma4-run generate artifact --prompt ''",
            "--prompt is empty",
            'gemma4-run generate ARTIFACT --prompt "Hello"',
        ),
        (
            "gemma4-export build --checkpoint checkpoint --target cpu --engines later",
            "--engines later: target cpu has none",
            "leave --engines out",
        ),
        (
            "gemma4-export build --checkpoint checkpoint --target rtx4090 --build-memory lots",
            "--build-memory 'lots': not a number of bytes",
            "--build-memory 12GB",
        ),
        (
            "gemma4-run generate artifact --raw --prompt ' \t'",
            "--prompt is empty",
            'gemma4-run generate ARTIFACT --prompt "Hello"',
        ),
        (
            "gemma4-run generate artifact --raw --prompt 'a\udcff'",
            "text: character 1 is half of a surrogate pair, not text",
            "pass valid UTF-8",
        ),
    ],
)
def test_argument_that_makes_no_sense_is_misuse(run: Run, line: str, cause: str, hint: str) -> None:
    outcome = run(line)
    assert outcome.err == f"error: {cause}\nhint: {hint}\n"
    outcome.check_refused(MISUSE)


def test_target_that_no_backend_of_ours_runs_on_is_refused() -> None:
    target = dataclasses.replace(load_target("h100"), backends=("ort-cuda",))
    with pytest.raises(ConfigError) as caught:
        check_buildable(target)
    assert caught.value.cause == ("target h100 runs ort-cuda; this version builds ort-cpu, tensorrt, tensorrt-rtx only")
    assert caught.value.hint == "--target cpu builds a folder that runs on any machine's processor"


def test_float_type_that_does_not_exist_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '\nname = "x"\ntitle = "X"\nbackends = ["tensorrt"]\nchunk = 8\nfloat_type = "bf16"\n'
    (tmp_path / "x.toml").write_text(text)
    monkeypatch.setattr("gemma4_export.configs.target._FOLDER", tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_target("x")
    assert caught.value.cause == "targets/x.toml: float_type 'bf16'"
    assert caught.value.hint == "one of float32, float16, bfloat16"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("gemma4-export build --checkpoint checkpoint", "--target"),
        ("gemma4-export build --target cpu --chekpoint checkpoint", "--chekpoint"),
        ("gemma4-export bild", "bild"),
        ("gemma4-export build --checkpoint checkpoint --target cpu --chunk many", "--chunk"),
        ("gemma4-export inspect", "artifact"),
        ("gemma4-run generate artifact --prompt hello --max-new-tokens 0", "--max-new-tokens"),
        ("gemma4-run generate artifact --prompt hello --temperature warm", "--temperature"),
    ],
)
def test_usage_error_names_the_argument(run: Run, line: str, named: str) -> None:
    outcome = run(line)
    assert (outcome.code, outcome.out, outcome.has_written) == (MISUSE, "", False)
    assert "Traceback" not in outcome.err
    message = outcome.err.split("--help' for help.")[1]  # typer's own words, which differ from version to version
    assert named in message.lower()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


PREFIX = "model.language_model."


def with_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_config(folder: Path, *, text: dict[str, object] | None = None, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8")) | changes
    config["text_config"] |= text or {}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def truncate(folder: Path, name: str, drop: int) -> None:
    os.truncate(folder / name, (folder / name).stat().st_size - drop)


BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), MISUSE, "bad: no config.json in it"),
    "config cut off": (lambda folder: truncate(folder, "config.json", 9), MISUSE, "bad/config.json: not JSON ("),
    "another model": (
        lambda folder: with_config(folder, model_type="gemma3"),
        MISUSE,
        "config.json: model_type 'gemma3' is no Gemma 4 model",
    ),
    "config contradicts itself": (
        lambda folder: with_config(folder, text={"layer_types": ["full_attention"]}),
        MISUSE,
        "config.json: num_hidden_layers is 6, layer_types lists 1",
    ),
    "quantised": (
        lambda folder: with_config(folder, quantization_config={"quant_method": "awq"}),
        MISUSE,
        "config.json: quantization_config: quant_method awq: this version reads compressed-tensors only",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        CHECK_FAILED,
        "bad: neither model.safetensors nor model.safetensors.index.json",
    ),
    "weights cut off": (
        lambda folder: truncate(folder, "model.safetensors", 1),
        CHECK_FAILED,
        "model.safetensors: its tensors end at byte ",
    ),
    "weights of another kind": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"GGUF" * 100),
        CHECK_FAILED,
        "model.safetensors: its header claims ",
    ),
    "missing tensor": (
        lambda folder: with_tensors(folder, lambda tensors: tensors.pop(f"{PREFIX}norm.weight")),
        CHECK_FAILED,
        "bad: 1 decoder tensors are missing, first norm.weight [96]",
    ),
    "extra tensor": (
        lambda folder: with_tensors(folder, lambda tensors: tensors.update({f"{PREFIX}a.lora_A": torch.zeros(2, 3)})),
        CHECK_FAILED,
        f"bad: 1 tensors are read by nobody, first {PREFIX}a.lora_A [2, 3]",
    ),
    "misshapen tensor": (
        lambda folder: with_tensors(folder, lambda tensors: tensors.update({f"{PREFIX}norm.weight": torch.zeros(95)})),
        CHECK_FAILED,
        f"{PREFIX}norm.weight: expected shape [96] (from config.json), found [95]",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), MISUSE, "bad: no tokenizer.json"),
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_bad_checkpoint_is_named_and_builds_nothing(run: Run, workplace: Path, kind: str) -> None:
    spoil, code, cause = BAD_CHECKPOINTS[kind]
    spoil(shutil.copytree(tiny.checkpoint("31b"), workplace / "bad"))
    outcome = run("gemma4-export build --checkpoint bad --target cpu --out out")
    outcome.check_refused(code)
    assert outcome.err.startswith(f"error: {cause}")


def test_folder_that_is_not_there_is_named(run: Run, workplace: Path) -> None:
    outcome = run("gemma4-export build --checkpoint nowhere --target cpu")
    outcome.check_refused(MISUSE)
    assert outcome.err.startswith("error: nowhere: no such folder\n")
    outcome = run("gemma4-export build --checkpoint checkpoint/config.json --target cpu")
    outcome.check_refused(MISUSE)
    assert outcome.err.startswith("error: checkpoint/config.json: no such folder\n")


def test_existing_out_is_refused_and_left_alone(run: Run, workplace: Path) -> None:
    (workplace / "out").mkdir()
    (workplace / "out" / "precious").write_text("kept")
    outcome = run("gemma4-export build --checkpoint checkpoint --target cpu --out out")
    outcome.check_refused(MISUSE)
    assert outcome.err == "error: out: exists already\nhint: give another --out\n"


def test_out_below_a_file_is_refused(run: Run, workplace: Path) -> None:
    (workplace / "file").write_text("")
    outcome = run("gemma4-export build --checkpoint checkpoint --target cpu --out file/out")
    assert (outcome.code, outcome.out, outcome.has_written) == (CHECK_FAILED, "", False)
    assert outcome.err == "error: file/out.partial: Not a directory\n"


def test_full_disk_is_one_line_and_leaves_what_the_next_build_goes_on_from(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gemma4_export.exporter.build.write_weights", no_space)
    outcome = run("gemma4-export build --checkpoint checkpoint --target cpu --out out")
    assert (outcome.code, outcome.out) == (CHECK_FAILED, "")
    assert "error: No space left on device" in outcome.err.splitlines()
    assert run("gemma4-run generate out.partial --prompt hello").code == CHECK_FAILED


# ---------------------------------------------------------------------------------------------------------------------
# Artifacts


def with_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / "manifest.json").read_text("utf-8"))
    edit(values)
    (folder / "manifest.json").write_text(json.dumps(values), encoding="utf-8")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


BAD_ARTIFACTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no manifest": (
        lambda folder: (folder / "manifest.json").unlink(),
        "bad: no manifest.json in it",
        "an artifact is a folder that gemma4-export build wrote",
    ),
    "manifest cut off": (
        lambda folder: truncate(folder, "manifest.json", 9),
        "manifest.json: not JSON (",
        "the folder is damaged; build it again with gemma4-export build",
    ),
    "newer": (
        lambda folder: with_manifest(folder, lambda values: values.update(format=FORMAT + 1)),
        f"manifest.json: format {FORMAT + 1}, this version reads format {FORMAT}",
        "pip install --upgrade gemma4-export",
    ),
    "outside": (
        lambda folder: with_manifest(folder, lambda values: values["graphs"]["decoder"].update(file="../decoder.onnx")),
        "manifest.json: '../decoder.onnx' is not a path inside the artifact",
        "do not use this folder: its manifest was not written by gemma4-export",
    ),
    "unknown key": (
        lambda folder: with_manifest(folder, lambda values: values.update(motors=[])),
        "manifest.json: key 'motors' is unknown",
        "the folder is damaged; build it again with gemma4-export build",
    ),
    "flipped bit": (
        lambda folder: flip(folder / "graphs" / "decoder.onnx"),
        "graphs/decoder.onnx: sha256 ",
        "copy the folder again, or build it again with gemma4-export build",
    ),
    "cut off": (
        lambda folder: truncate(folder, "graphs/weights/decoder.bin", 1),
        "graphs/weights/decoder.bin: expected ",
        "copy the folder again, or build it again with gemma4-export build",
    ),
    "missing file": (
        lambda folder: (folder / "tokenizer" / "tokenizer.json").unlink(),
        "tokenizer/tokenizer.json: listed in manifest.json, missing in bad",
        "copy the folder again, or build it again with gemma4-export build",
    ),
    "unfinished": (
        lambda folder: (folder / ".gemma4-export.lock").touch(),
        "bad: its build has not finished",
        "wait for it; if it was killed, run it again",
    ),
}


@pytest.mark.parametrize("kind", BAD_ARTIFACTS)
@pytest.mark.parametrize("command", ["gemma4-export inspect bad", "gemma4-run generate bad --prompt hello"])
def test_bad_artifact_is_named(run: Run, workplace: Path, kind: str, command: str) -> None:
    spoil, cause, hint = BAD_ARTIFACTS[kind]
    spoil(shutil.copytree(workplace / "artifact", workplace / "bad"))
    outcome = run(command)
    outcome.check_refused(CHECK_FAILED)
    assert outcome.err.startswith(f"error: {cause}")
    assert outcome.err.endswith(f"\nhint: {hint}\n")
    assert len(outcome.err.splitlines()) == 2


@pytest.mark.parametrize("command", ["gemma4-export inspect nowhere", "gemma4-run generate nowhere --prompt hello"])
def test_artifact_that_is_not_there_is_named(run: Run, command: str) -> None:
    outcome = run(command)
    outcome.check_refused(CHECK_FAILED)
    assert outcome.err.startswith("error: nowhere: no such folder\n")


def test_inspect_check_finds_damage_that_a_quick_look_does_not(
    run: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(workplace / "artifact", workplace / "bad")
    flip(workplace / "bad" / "graphs" / "weights" / "decoder.bin")
    monkeypatch.setattr("gemma4_export.configs.artifact.SMALL_FILE_BYTES", 1000)
    assert run("gemma4-export inspect bad").code == 0
    outcome = run("gemma4-export inspect bad --check")
    outcome.check_refused(CHECK_FAILED)
    assert outcome.err.startswith("error: graphs/weights/decoder.bin: sha256 ")


def test_prompt_longer_than_the_context_is_refused(run: Run) -> None:
    outcome = run(f"gemma4-run generate artifact --raw --prompt '{'hello ' * 100}'")
    outcome.check_refused(CHECK_FAILED)
    cause, hint = outcome.err.splitlines()
    assert cause.startswith("error: the prompt has ")
    assert cause.endswith(" tokens, the context 64, and the answer needs one at least")
    assert hint == "hint: shorten the prompt, or build with a larger --context"


def test_base_model_does_not_chat_and_continues_raw_text(run: Run, workplace: Path) -> None:
    (workplace / "base").symlink_to(artifacts.artifact("31b", context=64, fresh_trace=False, chat=False))
    outcome = run("gemma4-run generate base --prompt hello")
    outcome.check_refused(MISUSE)
    assert outcome.err.endswith(
        " is a base model: its checkpoint has no chat template\n"
        "hint: gemma4-run generate ARTIFACT --raw --prompt TEXT, or build the instruction-tuned checkpoint\n"
    )
    outcome = run("gemma4-run generate base --raw --prompt hello --max-new-tokens 2 --json")
    assert (outcome.code, outcome.err) == (0, "")
    assert len(json.loads(outcome.out)["ids"]) == 2


# ---------------------------------------------------------------------------------------------------------------------
# The installed commands, as processes


def test_installed_commands_end_without_traceback(workplace: Path) -> None:
    for line, code in (
        ("gemma4-export build --checkpoint checkpoint --target rtx4091", MISUSE),
        ("gemma4-run generate nowhere --prompt hello", CHECK_FAILED),
    ):
        name, *arguments = shlex.split(line)
        finished = subprocess.run(
            [Path(sys.executable).parent / name, *arguments], capture_output=True, text=True, check=False
        )
        assert (finished.returncode, finished.stdout) == (code, "")
        assert finished.stderr.startswith("error: ")
        assert len(finished.stderr.splitlines()) == 2


def end_midway(workplace: Path, sent: signal.Signals) -> tuple[int, str, str]:
    """Build into ``out``, send a signal once the work has begun; exit code, stdout, stderr."""
    command = [Path(sys.executable).parent / "gemma4-export", "build", "--checkpoint", "checkpoint", "--target", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "--out", "out"], **pipes) as process:
        try:
            for _ in range(600):
                if (workplace / "out.partial" / "tokenizer").exists() or process.poll() is not None:
                    break
                time.sleep(0.05)
            process.send_signal(sent)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    return process.returncode, out, err


def test_interrupted_command_leaves_what_the_next_build_goes_on_from(workplace: Path) -> None:
    code, out, err = end_midway(workplace, signal.SIGINT)
    assert (code, out) == (130, "")
    assert "Traceback" not in err
    assert sorted(path.name for path in workplace.iterdir()) == ["artifact", "checkpoint", "out.partial"]


def test_a_ctrl_c_that_is_dropped_on_its_way_ends_the_build_at_its_next_step() -> None:
    with BuildProgress() as progress:
        with contextlib.suppress(KeyboardInterrupt):  # what Python does around the callback of a weakref
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            progress("trace", "the next step", 0, 1)
        progress._is_interrupted = False  # it was heard
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_killed_command_leaves_what_never_loads_and_the_next_build_replaces(workplace: Path, run: Run) -> None:
    code, *_ = end_midway(workplace, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert sorted(path.name for path in workplace.iterdir()) == ["artifact", "checkpoint", "out.partial"]
    for command in ("gemma4-export inspect out.partial", "gemma4-run generate out.partial --prompt hello"):
        outcome = run(command)
        outcome.check_refused(CHECK_FAILED)
        assert outcome.err.startswith("error: out.partial: its build has not finished\n")
    assert run("gemma4-export build --checkpoint checkpoint --target cpu --out out").code == 0
    assert sorted(path.name for path in workplace.iterdir()) == ["artifact", "checkpoint", "out"]
    assert run("gemma4-export inspect out --check").code == 0
