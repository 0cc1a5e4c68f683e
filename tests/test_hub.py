"""Downloads from a hub on the loopback interface: what is asked for, what is kept, what is checked, what is refused."""

import fcntl
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest
from hub_server import HubServer, Refusal, digest_of, only_hub

import gemma4_export
from gemma4_export.configs.errors import CheckpointError, ConfigError
from gemma4_export.exporter import hub, hub_cache, hub_client

HUB_ID = "someone/gemma-4-E2B-it-finetune"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
UNNEEDED = (
    "README.md",
    ".gitattributes",
    "pytorch_model.bin",
    "gemma-4-E2B-it-Q4_0.gguf",
    "consolidated.safetensors",
    "model-00003-of-00002.safetensors",
    "original/params.json",
    "model.safetensors",  # beside an index, the index decides
)


def small_files() -> dict[str, bytes]:
    models = Path(gemma4_export.__file__).parent / "configs" / "models"
    config = tomllib.loads((models / "e2b.toml").read_text())["config"]
    return {
        "config.json": json.dumps(config).encode(),
        "generation_config.json": b'{"do_sample": true}',
        "tokenizer.json": random.Random(1).randbytes(300_000),
        "tokenizer_config.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
    }


def sharded_files() -> dict[str, bytes]:
    """The files of a checkpoint in the order in which they are fetched."""
    index = {"metadata": {}, "weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}
    files = small_files()
    files[INDEX] = json.dumps(index).encode()
    files |= {
        name: random.Random(name).randbytes(size) for name, size in zip(SHARDS, (3_000_000, 1_000_000), strict=True)
    }
    return files


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub with a sharded checkpoint, and a huggingface_hub that knows no other hub, cache or token."""
    files = sharded_files() | dict.fromkeys(UNNEEDED, b"not wanted" * 1000)
    with HubServer(HUB_ID, files) as running, only_hub(running, tmp_path):
        monkeypatch.setattr(hub_client, "_RETRY_WAITS_S", (0.01, 0.01))
        yield running


@pytest.fixture
def go_offline(monkeypatch):
    def forbid() -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    return forbid


@pytest.fixture
def no_hashing(monkeypatch):
    """A function after whose call reading content to hash it fails the test."""

    def refuse(*args):
        raise AssertionError("content was hashed again")

    return lambda: monkeypatch.setattr(hub_cache, "hash_into", refuse)


def download(hub_id, **options):
    return hub.download(hub_id, **options).folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def state_of(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in folder.rglob("*") if not path.is_dir()}


def blob_of(folder: Path, name: str) -> Path:
    return (folder / name).resolve()


def partials(folder: Path) -> list[Path]:
    return list(folder.glob("**/*.incomplete"))


# What is fetched


def test_brings_exactly_the_files_of_a_checkpoint(server, capfd):
    seen = []
    folder = download(HUB_ID, on_progress=lambda *report: seen.append(report))
    assert contents(folder) == sharded_files()
    assert server.files_asked == set(sharded_files())
    total = sum(len(body) for body in sharded_files().values())
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert {total for _, _, total in seen} == {total}
    assert seen[-1] == (SHARDS[1], total, total)
    assert len({done for name, done, _ in seen if name == SHARDS[0]}) >= 3, "no progress within a file of 3 MB"
    assert capfd.readouterr() == ("", ""), "huggingface_hub's own bars are off, and nothing warns"


def test_brings_a_checkpoint_of_one_file(server):
    files = small_files() | {"model.safetensors": b"weights" * 1000}
    commit = server.publish(files | {"model.gguf": b"no"})
    folder = download(HUB_ID)
    assert (folder.name, contents(folder)) == (commit, files)


def test_another_revision_brings_its_own_files(server):
    files = small_files() | {"model.safetensors": b"older"}
    commit = server.publish(files, branch="v1")
    assert contents(download(HUB_ID, revision="v1")) == files
    assert contents(download(HUB_ID, revision=commit)) == files
    assert contents(download(HUB_ID)) == sharded_files()


def test_the_token_goes_to_the_hub_and_never_to_its_storage(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download(HUB_ID)
    assert {request.authorization for request in server.requests if not request.is_storage} == {"Bearer hf_secret"}
    assert {request.authorization for request in server.requests if request.is_storage} == {None}


def test_importing_the_module_does_not_import_huggingface_hub():
    code = "import sys, gemma4_export.exporter.hub; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# What is kept


def test_a_second_download_moves_and_hashes_nothing(server, no_hashing):
    first = download(HUB_ID)
    before = state_of(first.parents[2])
    server.requests.clear()
    no_hashing()
    seen = []
    assert download(HUB_ID, on_progress=lambda *report: seen.append(report)) == first
    assert state_of(first.parents[2]) == before
    assert [request.path for request in server.requests] == [f"/api/models/{HUB_ID}/revision/main"]
    assert seen[-1][1] == seen[-1][2] > 4_000_000


def test_a_pinned_commit_that_is_there_asks_nothing(server):
    first = download(HUB_ID)
    server.requests.clear()
    assert download(HUB_ID, revision=first.name) == first
    assert server.requests == []


def test_a_new_commit_brings_only_what_changed(server, no_hashing):
    download(HUB_ID)
    server.requests.clear()
    no_hashing()
    files = sharded_files() | {"generation_config.json": b'{"temperature": 1.0}'}
    server.publish(files)
    assert contents(download(HUB_ID)) == files
    assert server.files_asked == {"generation_config.json"}


def test_huggingface_hub_takes_our_files_as_its_own(server):
    import huggingface_hub

    folder = download(HUB_ID)
    server.requests.clear()
    for name in sharded_files():
        assert huggingface_hub.hf_hub_download(HUB_ID, name) == str(folder / name)
    assert server.bytes_sent == 0
    (repo,) = huggingface_hub.scan_cache_dir().repos
    assert (repo.repo_id, huggingface_hub.scan_cache_dir().warnings) == (HUB_ID, [])
    assert {ref for revision in repo.revisions for ref in revision.refs} == {"main"}


def test_we_take_huggingface_hubs_files_and_check_them(server, no_hashing):
    import huggingface_hub

    theirs = huggingface_hub.snapshot_download(HUB_ID, ignore_patterns=["original/*"])
    server.requests.clear()
    assert str(download(HUB_ID)) == theirs
    assert server.bytes_sent == 0
    no_hashing()
    download(HUB_ID)


def test_works_where_there_are_no_symbolic_links(server, monkeypatch):
    def unsupported(self, target, target_is_directory=False):
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", unsupported)
    folder = download(HUB_ID)
    assert contents(folder) == sharded_files()
    assert not any(path.is_symlink() for path in folder.iterdir())
    server.requests.clear()
    download(HUB_ID)
    assert server.bytes_sent == 0


def test_waits_for_another_process_that_writes_the_same_file(server, caplog):
    from huggingface_hub import constants

    digest = digest_of(SHARDS[1], sharded_files()[SHARDS[1]])
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / f"models--{HUB_ID.replace('/', '--')}" / f"{digest}.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        worker = threading.Thread(target=download, args=(HUB_ID,))
        worker.start()
        deadline = time.monotonic() + 20
        while "waiting" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.02)
        assert f"{SHARDS[1]}: another process is downloading it; waiting" in caplog.text
        assert SHARDS[1] not in server.files_asked
    worker.join(20)
    assert SHARDS[1] in server.files_asked


def test_where_there_are_no_locks_it_warns_and_works(server, monkeypatch, caplog):
    def unsupported(handle, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert contents(download(HUB_ID)) == sharded_files()
    assert "no locks here (Function not implemented)" in caplog.text


@pytest.mark.parametrize("name", ["", "..", "../outside", "/etc/passwd", "original/params.json"])
def test_no_listed_name_leads_out_of_the_snapshot(name):
    with pytest.raises(ValueError, match="no file of a model"):
        hub_cache.HubFile(name=name, bytes=1, digest="0" * 40)


@pytest.mark.parametrize("digest", ["", "../../x", "0" * 39, "Z" * 64])
def test_no_listed_hash_leads_out_of_the_cache(digest):
    with pytest.raises(ValueError, match="neither a sha256 nor a git id"):
        hub_cache.HubFile(name="config.json", bytes=1, digest=digest)


# Interruptions


def test_a_lost_connection_is_continued_where_it_broke(server, caplog):
    server.cuts[SHARDS[0]] = [1_000_000, 700_000]
    assert contents(download(HUB_ID)) == sharded_files()
    ranges = [r.range for r in server.requests if r.is_storage and r.path.endswith(SHARDS[0])]
    assert ranges == [None, "bytes=1000000-", "bytes=1700000-"]
    assert server.bytes_sent == sum(len(body) for body in sharded_files().values())
    assert "after 1000000 of 3000000 bytes; trying again" in caplog.text


def test_a_connection_that_stays_lost_keeps_its_bytes_for_the_next_command(server):
    server.cuts[SHARDS[0]] = [1_000_000, 0, 0]
    with pytest.raises(CheckpointError) as caught:
        download(HUB_ID)
    assert f"{SHARDS[0]}: the connection was lost after 1000000 of 3000000 bytes" in caught.value.cause
    assert caught.value.hint == "run the same command again: it continues at that byte"
    server.requests.clear()
    seen = []
    assert contents(download(HUB_ID, on_progress=lambda *report: seen.append(report))) == sharded_files()
    assert [r.range for r in server.requests if r.path.endswith(SHARDS[0])] == ["bytes=1000000-"] * 2
    assert server.bytes_sent == 3_000_000
    assert seen[-1][1] == seen[-1][2]


def test_a_hub_without_ranges_starts_over(server):
    server.cuts[SHARDS[0]] = [1_000_000]
    server.without_ranges = True
    seen = []
    assert contents(download(HUB_ID, on_progress=lambda *report: seen.append(report))) == sharded_files()
    assert seen[-1][1] == seen[-1][2]


def test_a_hub_without_ranges_that_breaks_off_each_time_is_given_up(server):
    server.cuts[SHARDS[0]] = [1_000_000] * 50
    server.without_ranges = True
    with pytest.raises(CheckpointError, match="connection was lost after 1000000 of 3000000 bytes"):
        download(HUB_ID)
    assert server.bytes_sent < 5_000_000


def test_a_killed_process_resumes_in_the_next_one(server, tmp_path):
    """Two real processes, configured as a user does it: HF_ENDPOINT and HF_HOME."""
    code = f"from gemma4_export.exporter.hub import download; print(download({HUB_ID!r}).folder)"
    environment = os.environ | {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    server.delay_s = 0.05
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + 30
        while not any(r.path.endswith(SHARDS[0]) and r.sent > 500_000 for r in server.requests):
            assert time.monotonic() < deadline, "no download began"
            time.sleep(0.01)
        first.send_signal(signal.SIGKILL)
    (partial,) = partials(tmp_path / "home")
    kept = partial.stat().st_size
    assert 0 < kept < 3_000_000
    server.delay_s = 0.0
    server.requests.clear()
    second = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert contents(Path(second.stdout.strip())) == sharded_files()
    assert [r.range for r in server.requests if r.is_storage and r.path.endswith(SHARDS[0])] == [f"bytes={kept}-"]
    assert second.stderr == ""
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    server.requests.clear()
    third = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True, check=True)
    assert (third.stdout, server.requests) == (second.stdout, [])
    assert f"{HUB_ID}: HF_HUB_OFFLINE is set; using commit" in third.stderr


# Damage


def test_a_wrong_checksum_is_refused_deleted_and_fetched_anew(server):
    good = sharded_files()[SHARDS[1]]
    server.damaged[SHARDS[1]] = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(CheckpointError) as caught:
        download(HUB_ID)
    expected, found = digest_of(SHARDS[1], good), digest_of(SHARDS[1], server.damaged[SHARDS[1]])
    for part in (SHARDS[1], f"sha256 {expected}", f"found {found}", "deleted"):
        assert part in caught.value.cause
    assert "run the same command again" in caught.value.hint
    del server.damaged[SHARDS[1]]
    server.requests.clear()
    assert contents(download(HUB_ID)) == sharded_files()
    assert server.bytes_sent == len(good)


@pytest.mark.parametrize("change", [lambda body: body[:-10], lambda body: body + b"more"], ids=["short", "long"])
def test_a_file_of_another_size_than_listed_is_refused(server, change):
    server.damaged[SHARDS[1]] = change(sharded_files()[SHARDS[1]])
    with pytest.raises(CheckpointError, match=rf"{SHARDS[1]}: the hub lists sha256 .* and 1000000 bytes, found"):
        download(HUB_ID)
    assert partials(Path(hub_client.open_cache(HUB_ID).folder)) == []


def test_a_small_file_is_held_to_its_git_id(server):
    good = sharded_files()["generation_config.json"]
    server.damaged["generation_config.json"] = good.replace(b"true", b"tRue")
    with pytest.raises(CheckpointError, match=f"generation_config.json: the hub lists sha1 {digest_of('', good)}"):
        download(HUB_ID)


@pytest.mark.parametrize(
    ("damage", "listed"),
    [(lambda body: bytes([body[0] ^ 1]) + body[1:], "sha256 [0-9a-f]{64}"), (lambda body: body[:-1], "1000000 bytes")],
    ids=["a bit flipped", "cut off"],
)
def test_content_that_went_bad_in_the_cache_is_found_and_deleted(server, damage, listed):
    folder = download(HUB_ID)
    blob = blob_of(folder, SHARDS[1])
    blob.write_bytes(damage(blob.read_bytes()))
    with pytest.raises(CheckpointError, match=rf"{SHARDS[1]}: the hub lists {listed}, found .* deleted"):
        download(HUB_ID)
    assert not blob.exists()
    server.requests.clear()
    assert contents(download(HUB_ID)) == sharded_files()
    assert server.files_asked == {SHARDS[1]}


def test_a_bad_file_that_another_tool_left_is_found(server):
    import huggingface_hub

    folder = Path(huggingface_hub.snapshot_download(HUB_ID, ignore_patterns=["original/*"]))
    blob = blob_of(folder, SHARDS[0])
    blob.write_bytes(bytes(3_000_000))
    with pytest.raises(CheckpointError, match=rf"{SHARDS[0]}: the hub lists sha256 {blob.name}, found"):
        download(HUB_ID)
    assert not os.path.lexists(folder / SHARDS[0])


# Refusals

_LOGIN = "run hf auth login"


@pytest.mark.parametrize(
    ("refusal", "cause", "hints"),
    [
        (
            Refusal(401, "GatedRepo", "Access to model x is restricted. Please log in."),
            "does not let this account read it (HTTP 401: Access to model x is restricted. Please log in.)",
            ("accept its licence at http://127.0.0.1", HUB_ID, _LOGIN),
        ),
        (
            Refusal(403, "GatedRepo", "You are not in the authorized list."),
            "does not let this account read it (HTTP 403: You are not in the authorized list.)",
            ("accept its licence at http://127.0.0.1", "hf auth whoami", "fine-grained"),
        ),
        (
            Refusal(403, None, "Please enable access to public gated repositories"),
            "(HTTP 403: Please enable access to public gated repositories)",
            ("hf auth whoami", "fine-grained"),
        ),
        (
            Refusal(401, None, "Invalid credentials in Authorization header"),
            "the hub refuses the token (HTTP 401: Invalid credentials in Authorization header)",
            ("run hf auth login with a new one", "unset HF_TOKEN"),
        ),
        (
            Refusal(401, "RepoNotFound", "Repository not found"),
            "the hub has no such model, or it is private (HTTP 401",
            ("check the spelling", _LOGIN),
        ),
        (
            Refusal(404, "RepoNotFound", "Repository not found"),
            "the hub has no such model, or it is private (HTTP 404",
            ("check the spelling", _LOGIN),
        ),
    ],
    ids=["gated-401", "gated-403", "403", "bad-token", "private", "404"],
)
@pytest.mark.parametrize("where", ["refuse_listing", "refuse_files"])
def test_a_refusal_says_what_to_type(server, where, refusal, cause, hints):
    setattr(server, where, refusal)
    with pytest.raises(ConfigError) as caught:
        download(HUB_ID)
    assert caught.value.cause.startswith(f"{HUB_ID}: ")
    assert cause in caught.value.cause
    for hint in hints:
        assert hint in caught.value.hint


def test_any_other_refusal_is_passed_on_in_the_hubs_words(server):
    server.refuse_listing = Refusal(451, None, "Unavailable For Legal Reasons")
    with pytest.raises(CheckpointError) as caught:
        hub.download(HUB_ID)
    assert caught.value.cause == f"{HUB_ID}: the hub refuses (HTTP 451: Unavailable For Legal Reasons)"
    assert HUB_ID in caught.value.hint


def test_a_revision_that_does_not_exist_is_named(server):
    with pytest.raises(ConfigError, match=rf"{HUB_ID}: no revision v9 \(HTTP 404"):
        download(HUB_ID, revision="v9")


@pytest.mark.parametrize("hub_id", ["a/b/c", "./folder/name", "two words", ""])
def test_what_cannot_be_an_id_is_refused_unasked(server, hub_id):
    with pytest.raises(ConfigError, match="is no model id") as caught:
        download(hub_id)
    assert "--checkpoint" in caught.value.hint
    assert server.requests == []


def test_a_listed_file_that_is_gone_is_named(server):
    server.refuse_files = Refusal(404, "EntryNotFound", "Entry not found")
    with pytest.raises(CheckpointError, match=rf"the hub lists /{HUB_ID}/resolve/\w+/{INDEX} and does not have it"):
        download(HUB_ID)


def test_a_sign_in_page_is_not_a_listing(server):
    server.listing_body = b"<html>Welcome to our WiFi</html>"
    with pytest.raises(CheckpointError, match="answers, but not as a hub does"):
        download(HUB_ID)


# What is no checkpoint


def test_a_shard_that_the_hub_lacks_is_named_before_any_weight_is_fetched(server):
    files = sharded_files()
    del files[SHARDS[1]]
    server.publish(files)
    with pytest.raises(CheckpointError, match=rf"the repository lacks 1 of the 8 files needed, first {SHARDS[1]}"):
        download(HUB_ID)
    assert server.files_asked == {INDEX}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_checkpoint_without_a_required_file_is_refused(server, name):
    files = sharded_files()
    del files[name]
    server.publish(files)
    with pytest.raises(CheckpointError, match=rf"lacks 1 of the 8 files needed, first {name}"):
        download(HUB_ID)


@pytest.mark.parametrize(
    ("weights", "found"),
    [
        (("adapter_model.safetensors",), "but adapter_model.safetensors"),
        (("pytorch_model.bin",), "but pytorch_model.bin"),
        ((), "but no weights at all"),
    ],
)
def test_other_kinds_of_weights_are_refused_by_name(server, weights, found):
    server.publish(small_files() | dict.fromkeys(weights, b"weights"))
    with pytest.raises(CheckpointError, match=found) as caught:
        download(HUB_ID)
    assert "merged into its base model" in caught.value.hint
    assert server.bytes_sent == 0


@pytest.mark.parametrize("index", [b"not json", b"{}", b'{"weight_map": ["a"]}'])
def test_an_index_that_is_none_is_refused(server, index):
    server.publish(sharded_files() | {INDEX: index})
    with pytest.raises(CheckpointError, match=f"{INDEX}: no weight_map"):
        download(HUB_ID)


def test_an_index_cannot_name_a_file_elsewhere(server):
    outside = json.dumps({"weight_map": {"a": "original/params.json", "b": "../../../etc/passwd"}}).encode()
    server.publish(sharded_files() | {INDEX: outside, "original/params.json": b"x"})
    with pytest.raises(CheckpointError, match=r"lacks 2 of the 8 files needed, first \.\./\.\./\.\./etc/passwd"):
        download(HUB_ID)


def test_another_family_is_refused_before_its_weights_are_fetched(server):
    server.publish(sharded_files() | {"config.json": b'{"model_type": "llama"}'})
    with pytest.raises(ConfigError, match="model_type 'llama' is no Gemma 4 model"):
        download(HUB_ID)
    assert server.files_asked == {INDEX, "config.json"}


# Without a connection


def test_offline_uses_a_complete_snapshot_and_says_so(server, go_offline, caplog):
    online = download(HUB_ID)
    server.requests.clear()
    go_offline()
    assert download(HUB_ID) == online
    assert server.requests == []
    assert f"{HUB_ID}: HF_HUB_OFFLINE is set; using commit {online.name[:12]} from the cache" in caplog.text


def test_offline_says_what_is_missing(server, go_offline):
    server.cuts[SHARDS[0]] = [1_000_000, 0, 0]
    with pytest.raises(CheckpointError, match="connection was lost"):
        download(HUB_ID)
    go_offline()
    with pytest.raises(CheckpointError) as caught:
        download(HUB_ID)
    missing = f"lacks 2 of 8 files (4000000 bytes), first {SHARDS[0]}"
    assert caught.value.cause == f"{HUB_ID}: HF_HUB_OFFLINE is set, and the cached snapshot {missing}"
    assert "unset HF_HUB_OFFLINE" in caught.value.hint


def test_offline_without_a_cache_says_where_it_looked(server, go_offline, tmp_path):
    go_offline()
    with pytest.raises(CheckpointError) as caught:
        download(HUB_ID)
    assert f"HF_HUB_OFFLINE is set, and {tmp_path / 'hub'} holds nothing of its revision main" in caught.value.cause
    assert "unset HF_HUB_OFFLINE" in caught.value.hint
    assert not (tmp_path / "hub").exists()


def test_offline_uses_and_checks_what_another_tool_downloaded(server, go_offline):
    import huggingface_hub

    folder = Path(huggingface_hub.snapshot_download(HUB_ID, ignore_patterns=["original/*", "model.safetensors"]))
    go_offline()
    assert download(HUB_ID) == folder
    blob_of(folder, SHARDS[0]).write_bytes(bytes(3_000_000))
    with pytest.raises(CheckpointError, match=rf"{SHARDS[0]}: the hub lists sha256"):
        download(HUB_ID)
    with pytest.raises(CheckpointError, match=rf"the cached snapshot lacks 1 of the 8 files needed, first {SHARDS[0]}"):
        download(HUB_ID)


def test_without_a_connection_the_cache_serves(server, monkeypatch, caplog):
    online = download(HUB_ID)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert download(HUB_ID) == online
    assert "the connection to http://127.0.0.1:9 failed" in caplog.text


def test_without_a_connection_and_a_cache_the_cause_is_told(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        CheckpointError, match=r"the connection to http://127.0.0.1:9 failed \(.*refused\), and .* holds nothing"
    ):
        download(HUB_ID)


def test_while_the_hub_is_down_the_cache_serves(server, caplog):
    online = download(HUB_ID)
    server.refuse_listing = Refusal(503)
    assert download(HUB_ID) == online
    assert "answers HTTP 503; using commit" in caplog.text


def test_a_new_commit_that_is_not_complete_does_not_hide_the_old_one(server, go_offline):
    old = download(HUB_ID)
    server.publish(sharded_files() | {SHARDS[0]: b"new weights" * 100_000})
    server.cuts[SHARDS[0]] = [100_000, 0, 0]
    with pytest.raises(CheckpointError, match="connection was lost"):
        download(HUB_ID)
    go_offline()
    assert download(HUB_ID) == old


def test_a_new_commit_that_is_complete_serves_offline(server, go_offline):
    old = download(HUB_ID)
    server.publish(sharded_files() | {SHARDS[0]: b"new weights" * 100_000})
    new = download(HUB_ID)
    go_offline()
    assert download(HUB_ID) == new != old


def test_a_damaged_record_of_the_listing_is_not_used(server, caplog):
    first = download(HUB_ID)
    record = first.parent.parent / ".gemma4-export" / f"{first.name}.json"
    record.write_text(record.read_text().replace('"bytes": 3000000', '"bytes": -1'))
    assert download(HUB_ID, revision=first.name) == first
    assert "is damaged" in caplog.text
    assert '"bytes": 3000000' in record.read_text()


# The disk


def test_what_does_not_fit_is_refused_before_the_first_byte(server, monkeypatch):
    free = 2_000_000
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: hub.shutil._ntuple_diskusage(free * 2, free, free))
    needed = sum(len(body) for body in sharded_files().values()) - len(sharded_files()[INDEX])
    with pytest.raises(CheckpointError, match=rf"{needed} bytes are still to be downloaded, .* has {free} free"):
        download(HUB_ID)
    assert server.files_asked == {INDEX}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full: a full disk cannot be had here")
def test_a_disk_that_fills_up_leaves_nothing_half_valid(server):
    body = sharded_files()[SHARDS[0]]
    partial = hub_client.open_cache(HUB_ID).partial(
        hub_cache.HubFile(name=SHARDS[0], bytes=len(body), digest=digest_of(SHARDS[0], body))
    )
    partial.parent.mkdir(parents=True)
    partial.symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"cache is full \(.*No space left on device") as caught:
        download(HUB_ID)
    assert "HF_HOME" in caught.value.hint
    partial.unlink()
    assert contents(download(HUB_ID)) == sharded_files()


def test_a_cache_that_cannot_be_written_is_named(server, monkeypatch):
    def refuse(path, text):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(hub_cache, "_write", refuse)
    with pytest.raises(ConfigError, match=r"cache cannot be written \(.*Permission denied.*refs/main") as caught:
        download(HUB_ID)
    assert "HF_HOME" in caught.value.hint


def test_a_read_only_cache_that_is_complete_still_serves(server, monkeypatch, caplog):
    import huggingface_hub

    folder = huggingface_hub.snapshot_download(HUB_ID, ignore_patterns=["original/*"])

    def refuse(path, text):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(hub_cache, "_write", refuse)
    with caplog.at_level(logging.WARNING):
        assert str(download(HUB_ID)) == folder
    assert "cannot be written (Read-only file system)" in caplog.text
