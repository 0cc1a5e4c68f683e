"""Quantised checkpoints from a hub on the loopback interface: which is taken, which files, and what they become."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import quantized
import tiny
from hub_server import HubServer, only_hub

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.errors import CheckpointError, ConfigError
from gemma4_export.configs.model import ModelConfig
from gemma4_export.configs.models import load_model, model_names, other_checkpoint, plain_id_of
from gemma4_export.configs.names import decoder_tensors
from gemma4_export.configs.recipe import load_recipe
from gemma4_export.exporter import hub
from gemma4_export.exporter.commands.build import build as build_command
from gemma4_export.exporter.gguf_file import is_auxiliary
from gemma4_export.exporter.oracle import oracle_bytes
from gemma4_export.exporter.weights import place_weights
from gemma4_export.exporter.write import _SPARE_BYTES

PLAIN, QAT = "google/gemma-4-31B-it", "google/gemma-4-31B-it-qat-q4_0-gguf"
W4A16 = "someone/gemma-4-31B-it-w4a16"
GGUF_FILE = "gemma-4-31B_q4_0-it.gguf"
COMPANIONS = {"config.json", "tokenizer.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubServer]:
    """The plain tiny 31B under its released name, and its Q4_0 file beside that of the towers, as Google has them."""
    made = quantized.gguf_checkpoint("31b")
    whole = (made.folder / quantized.GGUF_NAME).read_bytes()
    with HubServer(PLAIN, files_of(tiny.checkpoint("31b"))) as running, only_hub(running, tmp_path):
        running.publish({GGUF_FILE: whole, "gemma-4-31B-it-mmproj.gguf": b"no", "README.md": b"no"}, hub_id=QAT)
        yield running


@pytest.fixture
def go_offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# ---------------------------------------------------------------------------------------------------------------------
# Which checkpoint


@pytest.mark.parametrize("name", model_names())
def test_int4_takes_the_quantisation_aware_checkpoint_where_one_was_released(name: str) -> None:
    model = load_model(name)
    found = model.checkpoint_for(load_recipe("int4"))
    if name.endswith("-base"):
        assert (found.hub_id, found.plain_id) == (model.hub_id, None)
        assert (
            found.note == f"int4: no quantisation-aware checkpoint of {model.hub_id} is known; its weights are rounded"
        )
    else:
        assert (found.hub_id, found.plain_id) == (f"{model.hub_id}-qat-q4_0-gguf", model.hub_id)
        assert f"--recipe int4-rtn rounds {model.hub_id} instead" in found.note
    for recipe in ("int4-rtn", "int4-quality", "int8", "bf16"):
        plain = model.checkpoint_for(load_recipe(recipe))
        assert (plain.hub_id, plain.plain_id, plain.note) == (model.hub_id, None, "")
        assert plain.num_bytes == model.checkpoint_bytes


def test_of_a_fine_tune_int4_says_that_it_rounds() -> None:
    found = other_checkpoint("someone/gemma-4-E2B-it-pirate", load_recipe("int4"))
    assert (found.hub_id, found.plain_id) == ("someone/gemma-4-E2B-it-pirate", "google/gemma-4-E2B-it")
    assert "what is not 4-bit yet is rounded" in found.note
    assert other_checkpoint("someone/gemma-4-E2B-it-pirate", load_recipe("int4-rtn")).note == ""


@pytest.mark.parametrize(
    ("hub_id", "plain"),
    [
        (
            "bartowski/google_gemma-4-E2B-it-GGUF",
            "google/gemma-4-E2B-it",
        ),  # not the base model, whose name it holds too
        ("someone/gemma-4-e2b-gguf", "google/gemma-4-E2B"),
        ("unsloth/gemma-4-26B-A4B-it-qat-GGUF", "google/gemma-4-26B-A4B-it"),
        ("google/gemma-4-31B-it", "google/gemma-4-31B-it"),
        ("someone/pirate-GGUF", None),
        ("gemma-4-E2B-it/other", None),
    ],
)
def test_what_a_repository_was_made_from_by_its_name(hub_id: str, plain: str | None) -> None:
    assert plain_id_of(hub_id) == plain


@pytest.mark.parametrize(
    ("name", "expected"),
    [("mmproj-BF16.gguf", True), ("gemma-4-E2B-it-mmproj.gguf", True), ("mtp-gemma-4.gguf", True), (GGUF_FILE, False)],
)
def test_files_without_a_decoder_are_told_by_their_names(name: str, expected: bool) -> None:
    assert is_auxiliary(name) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Which files


def test_a_gguf_comes_with_config_and_tokenizer_of_the_plain_checkpoint(
    server: HubServer, caplog: pytest.LogCaptureFixture, go_offline: Callable[[], None]
) -> None:
    seen: list[tuple[str, int, int]] = []
    found = hub.download(QAT, plain_id=PLAIN, on_progress=lambda *report: seen.append(report))
    assert {path.name for path in found.folder.iterdir()} == {GGUF_FILE}
    assert {path.name for path in found.companions.iterdir()} == COMPANIONS
    assert server.files_asked == COMPANIONS | {GGUF_FILE}
    assert f"{QAT} has no config.json and tokenizer; they are taken from {PLAIN}" in caplog.text
    assert seen[0][0] == "config.json"
    assert seen[-1][0] == GGUF_FILE
    assert (
        seen[-1][1]
        == seen[-1][2]
        == sum(p.stat().st_size for f in (found.folder, found.companions) for p in f.iterdir())
    )
    go_offline()
    server.requests.clear()
    assert hub.download(QAT, plain_id=PLAIN) == found
    assert server.requests == []


def test_the_config_is_read_before_the_weights_are_fetched(server: HubServer) -> None:
    server.publish(files_of(tiny.checkpoint("31b")) | {"config.json": b'{"model_type": "llama"}'})
    with pytest.raises(ConfigError, match="model_type 'llama' is no Gemma 4 model"):
        hub.download(QAT, plain_id=PLAIN)
    assert GGUF_FILE not in server.files_asked


def test_a_drafter_is_refused_before_its_weights_are_fetched(server: HubServer) -> None:
    text = tiny.hub_config("31b", text_only=True)
    text |= {"num_kv_shared_layers": text["num_hidden_layers"]}
    drafter = {"model_type": "gemma4_assistant", "backbone_hidden_size": 96, "num_centroids": 8}
    drafter |= {"centroid_intermediate_top_k": 2, "text_config": text}
    server.publish(files_of(tiny.checkpoint("31b")) | {"config.json": json.dumps(drafter).encode()})
    with pytest.raises(ConfigError, match="gemma-4-31B-it: a drafter"):
        hub.download(PLAIN)
    assert "model.safetensors" not in server.files_asked


def test_a_gguf_repository_with_a_tokenizer_needs_no_other(server: HubServer) -> None:
    companions = {name: body for name, body in files_of(tiny.checkpoint("31b")).items() if name in COMPANIONS}
    server.publish(companions | {"model.gguf": b"codes"}, hub_id="someone/whole")
    found = hub.download("someone/whole")
    assert found.folder == found.companions
    assert {path.name for path in found.folder.iterdir()} == COMPANIONS | {"model.gguf"}


@pytest.mark.parametrize(
    ("files", "cause"),
    [
        (("a-Q4_0.gguf", "a-Q8_0.gguf", "mmproj.gguf"), "2 GGUF files of decoders, such as a-Q4_0.gguf"),
        (("mmproj.gguf",), "GGUF files, none of a decoder"),
    ],
)
def test_which_gguf_is_meant_must_be_clear(server: HubServer, files: tuple[str, ...], cause: str) -> None:
    server.publish(dict.fromkeys(files, b"codes"), hub_id="someone/many")
    with pytest.raises(ConfigError) as caught:
        hub.download("someone/many", plain_id=PLAIN)
    assert cause in caught.value.cause
    assert "--checkpoint" in caught.value.hint
    assert server.files_asked == set()


def test_a_gguf_of_an_unknown_model_says_what_it_lacks(server: HubServer) -> None:
    server.publish({"pirate.gguf": b"codes"}, hub_id="someone/pirate")
    with pytest.raises(
        ConfigError, match=r"without config.json and tokenizer, and the name is that of no released"
    ) as caught:
        hub.download("someone/pirate", plain_id=None)
    assert "generation_config.json" in caught.value.hint
    assert server.files_asked == set()


def test_a_plain_checkpoint_without_a_tokenizer_is_named(server: HubServer) -> None:
    files = files_of(tiny.checkpoint("31b"))
    server.publish({name: body for name, body in files.items() if name != "tokenizer.json"})
    with pytest.raises(
        CheckpointError, match=f"{PLAIN}: the repository lacks 1 of the 5 files needed, first tokenizer"
    ):
        hub.download(QAT, plain_id=PLAIN)
    assert server.files_asked == set()


# ---------------------------------------------------------------------------------------------------------------------
# The whole way


def build(model: str, recipe: str, out: Path) -> Artifact:
    build_command(target="cpu", model=model, recipe=recipe, context=64, chunk=8, out=out)
    return Artifact.open(out, check="full")


def test_int4_copies_the_codes_of_the_quantisation_aware_file(
    server: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = build("31b", "int4", tmp_path / "int4").manifest
    captured = capsys.readouterr()
    assert f"int4: taking the quantisation-aware checkpoint {QAT}" in captured.err
    assert set(taken.sources) == {GGUF_FILE, "config.json"}
    assert taken.model.name == "31b"
    assert taken.census["decoder.mlp"].codes == taken.census["decoder.mlp"].codes_kept > 0
    assert "0 of" in captured.out
    rounded = build("31b", "int4-rtn", tmp_path / "rtn").manifest
    assert "quantisation-aware" not in capsys.readouterr().err
    assert set(rounded.sources) == {"model.safetensors", "config.json"}
    assert rounded.census["decoder.mlp"].codes_kept == 0


@pytest.mark.parametrize("lacking", [1, 0])
def test_room_for_download_and_artifact_together_is_asked_for_before_the_weights(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: int
) -> None:
    config = ModelConfig.from_hf(json.loads(files_of(tiny.checkpoint("31b"))["config.json"]))
    artifact = sum(place_weights(decoder_tensors(config).values(), load_recipe("int4")).num_bytes.values())
    artifact += oracle_bytes(config)
    made = quantized.gguf_checkpoint("31b").folder
    others = [body for name, body in files_of(tiny.checkpoint("31b")).items() if name in COMPANIONS - {"config.json"}]
    download = (made / quantized.GGUF_NAME).stat().st_size + sum(map(len, others))
    usage = shutil.disk_usage(tmp_path)
    free = artifact + _SPARE_BYTES + download - lacking
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    monkeypatch.setattr("gemma4_export.exporter.requested.build_artifact", None)
    with pytest.raises(
        ConfigError if lacking else TypeError, match="the artifact needs" if lacking else "not callable"
    ):
        build("31b", "int4", tmp_path / "out")
    assert (GGUF_FILE in server.files_asked) == (not lacking)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_context_out_of_range_costs_no_download(server: HubServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--context 9999999: expected 2 to "):
        build_command(target="cpu", model="31b", recipe="int4", context=9999999, out=tmp_path / "out")
    assert server.files_asked == {"config.json"}


def test_a_compressed_tensors_repository_is_taken_as_it_is(server: HubServer, tmp_path: Path) -> None:
    server.publish(files_of(quantized.compressed_tensors("31b").folder), hub_id=W4A16)
    census = build(W4A16, "int4", tmp_path / "out").manifest.census
    assert census["decoder.attention"].codes == census["decoder.attention"].codes_kept > 0


def test_a_quantised_file_that_is_not_read_names_what_to_use(server: HubServer, tmp_path: Path) -> None:
    config = json.loads(files_of(tiny.checkpoint("31b"))["config.json"])
    config["quantization_config"] = {"quant_method": "gptq"}
    server.publish(files_of(tiny.checkpoint("31b")) | {"config.json": json.dumps(config).encode()}, hub_id=W4A16)
    with pytest.raises(ConfigError) as caught:
        build(W4A16, "int4", tmp_path / "out")
    assert "gptq" in caught.value.cause
    assert "w4a16" in caught.value.hint
