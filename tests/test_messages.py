"""Messages that no other file triggers, how a command line ends without our errors, and the watch over all of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import artifacts
import every_message
import pytest

from gemma4_export.configs import target
from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.command_line import check_output, run
from gemma4_export.configs.errors import ArtifactError, CheckpointError, ConfigError, ContractError
from gemma4_export.runtime.chat_template import ChatTemplate, read_special_tokens
from gemma4_export.runtime.session_ort import OrtSession


def test_a_table_whose_format_and_scales_disagree_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(artifacts.artifact("31b", context=64, fresh_trace=False), tmp_path / "artifact")
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    for form, cause in (("int3", "weight format 'int3' is not known"), ("int8", "int8 without scales")):
        manifest["embed_tokens"]["format"] = form
        (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
        with pytest.raises(ArtifactError) as caught:
            Artifact.open(folder)
        assert caught.value.cause == f"manifest.json: embed_tokens: {cause}"


def test_a_target_file_that_contradicts_itself_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy.toml").write_text('name = "toy"\ntitle = "a toy"\nbackends = ["abacus"]\nchunk = 0\n')
    monkeypatch.setattr(target, "_FOLDER", tmp_path)
    with pytest.raises(ConfigError) as caught:
        target.load_target("toy")
    assert caught.value.cause == "targets/toy.toml: name 'toy', chunk 0, unknown backends ['abacus']"
    assert "ort-cpu" in str(caught.value.hint)


def test_a_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ '\xff' }}")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja: not UTF-8 \(invalid start byte\)"):
        ChatTemplate(tmp_path / "chat_template.jinja")


@pytest.mark.parametrize(
    ("content", "cause"),
    [("[]", "expected a JSON object, found list"), ('{"bos_token": 2}', "bos_token: expected a string, found 2")],
)
def test_special_tokens_of_the_wrong_kind_are_named(content: str, cause: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_special_tokens(tmp_path)
    assert caught.value.cause == f"{tmp_path / 'tokenizer_config.json'}: {cause}"


def test_a_graph_that_onnxruntime_does_not_load_is_named(tmp_path: Path) -> None:
    (tmp_path / "decoder.onnx").write_bytes(b"no graph")
    with pytest.raises(ArtifactError, match=r"decoder\.onnx: onnxruntime [0-9.]+ does not load it: "):
        OrtSession(tmp_path / "decoder.onnx")


def test_a_missing_onnxruntime_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ArtifactError, match="onnxruntime is not installed") as caught:
        OrtSession(tmp_path / "decoder.onnx")
    assert caught.value.hint is not None
    assert caught.value.hint.startswith('pip install "gemma4-export[cpu]"')


# ---------------------------------------------------------------------------------------------------------------------
# How a command line ends


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    check_output("--html", tmp_path / "report.html", ".html")
    with pytest.raises(ConfigError) as caught:
        check_output("--html", tmp_path, ".html")
    assert caught.value.cause == f"--html {tmp_path}: a folder, not a file"
    assert caught.value.hint == f"--html {tmp_path}/report.html"
    with pytest.raises(ConfigError) as caught:
        check_output("--html", tmp_path / "none" / "report.html", ".html")
    assert caught.value.cause == f"--html {tmp_path}/none/report.html: no folder {tmp_path}/none"


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (ConfigError("a cause", hint="a hint"), 2, "error: a cause\nhint: a hint\n"),
        (CheckpointError("a cause", hint="a hint"), 1, "error: a cause\nhint: a hint\n"),
        (ContractError("a cause"), 1, "error: a cause\n"),
        (FileNotFoundError(2, "No such file or directory", "x"), 1, "error: x: No such file or directory\n"),
        (OSError(28, "No space left on device"), 1, "error: No space left on device\n"),
        (
            MemoryError("of 3 GB"),
            1,
            "error: out of memory of 3 GB\nhint: give a smaller --context or recipe\n",
        ),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch.nn"),
            2,
            'error: torch is not installed\nhint: pip install "gemma4-export[export,cpu]"\n',
        ),
        (
            UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range(128)"),
            1,
            "error: the terminal's encoding ascii lacks a character\nhint: PYTHONUTF8=1\n",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_a_command_line_ends_in_two_lines_and_a_code(
    error: Exception, code: int, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run(command)
    assert (ended.value.code, *capsys.readouterr()) == (code, "", shown)


def test_our_own_mistakes_are_not_dressed_up() -> None:
    with pytest.raises(ModuleNotFoundError, match="of_ours"):
        run(lambda: __import__("gemma4_export.of_ours"))


# ---------------------------------------------------------------------------------------------------------------------
# The watch

_TRIGGER = """
import pytest
from gemma4_export.configs.errors import ConfigError
from gemma4_export.configs.recipe import load_recipe

def test_one():
    with pytest.raises(ConfigError):
        load_recipe("fp23")
"""


def watched_run(folder: Path, conftest: str, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(conftest)
    (folder / "test_trigger.py").write_text(_TRIGGER)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "every_message", "-p", "no:cacheprovider", *options, "."],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_message_that_no_test_triggers_fails_the_run(workers: str, tmp_path: Path) -> None:
    seen, unseen, *_ = every_message.places("configs/toml.py")  # the first is "recipe 'fp23' is not known"
    wanted = f'import every_message\nevery_message.all_places = lambda: [("configs/toml.py", {seen}), NEXT]'
    both = wanted.replace("NEXT", f'("configs/toml.py", {unseen})')
    done = watched_run(tmp_path, both, "--every-message", "-n", workers)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    assert f"configs/toml.py:{unseen}: raise ConfigError(" in done.stdout
    assert f"configs/toml.py:{seen}: " not in done.stdout
    one = wanted.replace(", NEXT", "")
    assert watched_run(tmp_path, one, "--every-message", "-n", workers).returncode == pytest.ExitCode.OK


def test_runs_that_were_not_asked_need_not_trigger_every_message(tmp_path: Path) -> None:
    assert watched_run(tmp_path, "").returncode == pytest.ExitCode.OK


def test_every_kind_of_place_is_found() -> None:
    found = set(every_message.all_places())
    lines = {place: every_message.source(*place) for place in found}
    for beginning in (
        'raise ConfigError(f"{what} {name!r} is not known"',  # the class
        "raise _error(",  # a helper
        'return CheckpointError(f"{hub_id}: the hub refuses',  # made here, raised elsewhere
        "raise Gemma4Error(",  # the base
    ):
        assert any(line.startswith(beginning) for line in lines.values()), beginning
    assert not any("raise typer.Exit" in line or "raise ValueError" in line for line in lines.values())


@pytest.mark.parametrize(
    ("error", "blame"),
    [
        (ConfigError("no hint"), "no hint"),
        (ConfigError("", hint="a hint"), "not a line each"),
        (ConfigError("expected {kind}", hint="a hint"), "lost its f"),
        (ConfigError("a cause", hint="give {size:.1f} GB"), "lost its f"),
    ],
)
def test_the_form_of_a_message_is_checked(error: ConfigError, blame: str) -> None:
    with pytest.raises(AssertionError, match=blame):
        every_message.check_form(error)


def test_what_cannot_be_printed_is_spelled_out() -> None:
    error: Any = ConfigError("a\nb\x1b[2J", hint="c\u2028d é")
    assert str(error) == "a\\nb\\x1b[2J\nhint: c\\u2028d é"
