"""``gemma4-export plan``: its sums against formulas of this file and against a built artifact; what it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable

import pytest
import small

from gemma4_export.configs.errors import ConfigError
from gemma4_export.configs.evidence import ORACLE_FILE
from gemma4_export.configs.formats import BFLOAT16, INT8, WeightFormat
from gemma4_export.configs.manifest import MANIFEST_NAME
from gemma4_export.configs.model import ModelConfig
from gemma4_export.configs.models import ReleasedModel, load_model, model_names
from gemma4_export.configs.names import RECIPE_ROLES, decoder_tensors
from gemma4_export.configs.recipe import Recipe, load_recipe, recipe_names
from gemma4_export.configs.target import Target, load_target, target_names
from gemma4_export.exporter import plan as module
from gemma4_export.exporter.build import BuildOptions
from gemma4_export.exporter.commands import main
from gemma4_export.exporter.dummy import DummySource
from gemma4_export.exporter.oracle import oracle_bytes
from gemma4_export.exporter.plan import Plan, check_fits, make_plan, resolve_plan
from gemma4_export.runtime.bench import bytes_per_token

SIZES = [name for name in model_names() if not name.endswith("-base")]
PROCESS, OTHER_FILES = 370_000_000, 40 << 20
KEYS = {
    "model",
    "target",
    "recipe",
    "context",
    "role_bytes",
    "artifact_bytes",
    "download_bytes",
    "download_from",
    "engine_bytes",
    "build_disk_bytes",
    "weights_in_memory_bytes",
    "kv_bytes",
    "scratch_bytes",
    "process_bytes",
    "needed_bytes",
    "load_peak_bytes",
    "memory_bytes",
    "longest_context",
    "bytes_per_token",
    "kv_bytes_per_token",
    "decode_limit_tokens_per_s",
    "builtin_experts",
    "fits",
}


def planned(
    model: ReleasedModel | str, target: Target | str, recipe: Recipe | str, **lengths: int
) -> tuple[Plan, Callable[[], None]]:
    """A plan, and what refuses it if it does not fit."""
    released = load_model(model) if isinstance(model, str) else model
    options: BuildOptions = resolve_plan(
        released,
        target=load_target(target) if isinstance(target, str) else target,
        recipe=load_recipe(recipe) if isinstance(recipe, str) else recipe,
        dummy=False,
        context=lengths.get("context"),
        chunk=lengths.get("chunk"),
    )
    plan = make_plan(released, options)
    return plan, lambda: check_fits(plan, released, options)


def with_memory(target: str, gigabytes: float) -> Target:
    return dataclasses.replace(load_target(target), memory_bytes=int(gigabytes * 1e9))


def small_model(**hub: object) -> ReleasedModel:
    return dataclasses.replace(
        load_model("e2b"), name="small", config=small.model_config(**hub), checkpoint_bytes=123_456_789
    )


# ---------------------------------------------------------------------------------------------------------------------
# Sums


def role_bytes(config: ModelConfig, recipe: Recipe) -> dict[str, int]:
    """Codes and scales by role, as engines read them: 2 bytes a scale of a block of int4, 4 a row of 8 bits."""
    sizes: dict[str, int] = {}
    has_own_head = recipe.formats["decoder.head"] != recipe.formats["embeddings.tokens"]
    for spec in decoder_tensors(config).values():
        roles = [spec.role]
        if spec.role == "embeddings.tokens" and has_own_head:
            roles.append("decoder.head")
        for role in roles:
            (rows, columns), form = spec.row_shape, recipe.format_of(role)
            size = rows * columns * BITS[form.kind] // 8
            if form.is_quantized:
                size += rows * columns // (form.block or columns) * (2 if form.kind == "int4" else 4)
            sizes[role] = sizes.get(role, 0) + size
    return sizes


BITS = {"float32": 32, "bfloat16": 16, "fp8": 8, "int8": 8, "int4": 4}
OWN_HEAD = Recipe(
    name="own-head",
    title="",
    formats=dict.fromkeys(RECIPE_ROLES, WeightFormat("int4", 32)) | {"embeddings.tokens": INT8},
    prefers_qat=False,
)


def _name(value: object) -> str:
    return getattr(value, "name", str(value))


every_recipe = pytest.mark.parametrize("recipe", [*recipe_names(), OWN_HEAD], ids=_name)
every_size = pytest.mark.parametrize("model", SIZES)


@every_size
@every_recipe
def test_bytes_of_weights_and_artifact(model, recipe):
    plan, _ = planned(model, "h200", recipe)
    chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
    config = load_model(model).config
    assert plan.role_bytes == role_bytes(config, chosen)
    weights = sum(plan.role_bytes.values())
    padding = 2 * 64 * (len(decoder_tensors(config)) + 1)
    other_files = OTHER_FILES + oracle_bytes(config)
    assert other_files <= plan.artifact_bytes - weights <= other_files + padding
    released = load_model(model)
    if recipe == "int4":  # the files that the quantisation-aware checkpoints consist of are a third of the plain ones
        assert released.qat is not None
        expected = (released.qat.hub_id, released.qat.file_bytes)
        assert 0.2 < released.qat.file_bytes / released.checkpoint_bytes < 0.35
    else:
        expected = (released.hub_id, released.checkpoint_bytes)
    assert (plan.download_from, plan.download_bytes) == expected
    assert plan.engine_bytes == plan.weights_in_memory_bytes
    assert plan.build_disk_bytes == plan.download_bytes + plan.artifact_bytes + plan.engine_bytes


def test_dummy_weights_need_no_download():
    released, recipe = load_model("26b-a4b"), load_recipe("int4")
    options = resolve_plan(released, target=load_target("cpu"), recipe=recipe, dummy=True, context=None, chunk=None)
    plan = make_plan(released, options)
    assert plan.download_bytes == 0
    assert plan.build_disk_bytes == plan.artifact_bytes


@every_size
@pytest.mark.parametrize("target", target_names())
def test_bytes_of_the_kv_cache(model, target):
    config = load_model(model).config
    plan, _ = planned(model, target, "int4", context=10_000)
    item, chunk = 4 if target == "cpu" else 2, load_target(target).chunk
    wanted = 0
    for layer in config.layers:
        if layer.owns_kv:
            slots = 10_000 if layer.sliding_window is None else layer.sliding_window - 1 + chunk
            wanted += 2 * item * layer.num_kv_heads * layer.head_dim * slots
    assert plan.kv_bytes == wanted


@pytest.mark.parametrize("recipe", ["bf16", "int8", "int4", "int8-blocks", "int4-quality", OWN_HEAD], ids=_name)
@pytest.mark.parametrize("structure", ["e2b", "26b-a4b"])
def test_the_artifact_is_as_large_as_planned(structure, recipe, tmp_path):
    model = small_model(structure=structure, num_layers=2)
    plan, _ = planned(model, "cpu", recipe, context=512, chunk=7)
    manifest = small.build_artifact(DummySource(model.config), tmp_path / "artifact", recipe=recipe, context=512)
    assert {role: entry.bytes for role, entry in manifest.census.items()} == plan.role_bytes
    weights = sum(entry.bytes for file, entry in manifest.files.items() if file.startswith("graphs/weights/"))
    oracle = manifest.files[ORACLE_FILE].bytes
    assert 0 <= oracle - oracle_bytes(model.config) < 60_000  # a header of 100 bytes a tensor, and scalars
    assert weights == plan.artifact_bytes - OTHER_FILES - oracle_bytes(model.config)
    total = sum(entry.bytes for entry in manifest.files.values())
    total += (tmp_path / "artifact" / MANIFEST_NAME).stat().st_size
    assert weights < total <= plan.artifact_bytes
    assert manifest.kv.num_bytes(512) == plan.kv_bytes


@pytest.mark.parametrize("recipe", ["bf16", "fp8", "int8", "int4", "int8-blocks", "int4-quality", OWN_HEAD], ids=_name)
@every_size
def test_weights_in_the_memory_of_a_gpu(model, recipe):
    """Codes with canonical scales: float16 per int4 block, float32 per int8 row or block. Tables stay on the host."""
    chosen, config = (load_recipe(recipe) if isinstance(recipe, str) else recipe), load_model(model).config
    wanted = 0
    for spec in decoder_tensors(config).values():
        if spec.role == "embeddings.per_layer":
            continue
        # The token table is on the device as the head only.
        form = chosen.format_of("decoder.head" if spec.role == "embeddings.tokens" else spec.role)
        rows, columns = spec.row_shape
        wanted += rows * columns * BITS[form.kind] // 8
        if form.is_quantized:
            wanted += rows * (columns // (form.block or columns)) * (2 if form.kind == "int4" else 4)
    assert planned(model, "rtx4090", chosen)[0].weights_in_memory_bytes == wanted


@every_size
def test_a_cpu_holds_float_matrices_in_float32_and_no_tables(model):
    config = load_model(model).config
    matrices = sum(s.num_elements for s in decoder_tensors(config).values() if s.role != "embeddings.per_layer")
    for recipe in ("bf16", "fp32"):
        assert planned(model, "cpu", recipe)[0].weights_in_memory_bytes == 4 * matrices
    int8_table = dict.fromkeys(RECIPE_ROLES, BFLOAT16) | {"embeddings.tokens": INT8}
    own_head = Recipe(name="x", title="", formats=int8_table, prefers_qat=False)
    assert planned(model, "cpu", own_head)[0].weights_in_memory_bytes == 4 * matrices


# ---------------------------------------------------------------------------------------------------------------------
# Speed


def test_the_decode_limit_is_bandwidth_over_bytes_read():
    """E2B in int4 on a GPU with a short context, by hand."""
    config = load_model("e2b").config
    specs, recipe = decoder_tensors(config).values(), load_recipe("int4")
    weights = 0.0
    for spec in specs:
        if spec.role != "embeddings.per_layer":
            form = recipe.format_of("decoder.head" if spec.role == "embeddings.tokens" else spec.role)
            per_weight = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.5 + 2 / 32}[form.kind]
            weights += spec.num_elements * per_weight + (4 * spec.row_shape[0] if form.kind == "int8" else 0)
    kv = sum(
        2 * 2 * layer.num_kv_heads * layer.head_dim * min(1000, layer.sliding_window or 1000) for layer in config.layers
    )
    plan, _ = planned("e2b", "rtx4090", "int4", context=1000)
    assert plan.bytes_per_token == pytest.approx(weights + kv, rel=1e-9)
    assert 1.2e9 < plan.bytes_per_token < 1.4e9
    assert plan.decode_limit_tokens_per_s == pytest.approx(1008e9 / (weights + kv))


def test_a_step_reads_the_chosen_experts_only():
    plan, _ = planned("26b-a4b", "rtx4090", "int4", context=2)
    experts = plan.role_bytes["decoder.experts"]
    rest = plan.weights_in_memory_bytes - experts
    kv = plan.bytes_per_token - rest - experts * 8 / 128
    assert 0 <= kv < 2e6


@pytest.mark.parametrize(("recipe", "bytes_per_weight"), [("int4", 0.5 + 2 / 32), ("bf16", 2)])
def test_experts_of_standard_ops_are_written_out_and_read_again(recipe, bytes_per_weight):
    """30 layers of 8 experts, three matrices of 704 x 2816 each, by hand: codes, and 16 bits twice."""
    plan, _ = planned("26b-a4b", "h200", recipe, context=4096)
    builtin, chosen = plan.builtin_experts, 30 * 8 * 3 * 704 * 2816
    assert plan.role_bytes["decoder.experts"] * 8 / 128 == pytest.approx(chosen * bytes_per_weight, rel=1e-9)
    assert builtin.bytes_per_token - plan.bytes_per_token == 4 * chosen
    assert builtin.decode_limit_tokens_per_s == pytest.approx(4.8e12 / builtin.bytes_per_token)
    assert builtin.weights_in_memory_bytes == 2 * plan.weights_in_memory_bytes
    assert builtin.longest_context <= plan.longest_context


@pytest.mark.parametrize(("model", "target"), [("31b", "rtx4090"), ("26b-a4b", "cpu")])
def test_nothing_is_said_of_experts_where_there_are_none_or_no_engines(model, target):
    plan, _ = planned(model, target, "int4")
    assert plan.builtin_experts is None
    assert (plan.engine_bytes > 0) == (target == "rtx4090")


def test_plan_prints_both_speeds(monkeypatch, capsys):
    arguments = ("--model", "26b-a4b", "--target", "rtx4090", "--recipe", "int4", "--context", "4096")
    assert command(monkeypatch, *arguments) == 0
    text = capsys.readouterr().out
    mine = float(re.search(r"GB = (\d+) tok/s", text)[1])
    builtin, room = re.search(r"--experts builtin: (\d+) tok/s .*\((.*)\)$", text, re.MULTILINE).groups()
    assert 3 * float(builtin) < mine
    assert room == "does not fit"  # 28 GB of 26


@pytest.mark.parametrize("recipe", ["bf16", "int8", "int4", OWN_HEAD], ids=_name)
@pytest.mark.parametrize("structure", ["e2b", "26b-a4b"])
def test_plan_and_bench_count_the_same_bytes_per_token(structure, recipe, tmp_path):
    """Exactly, on layers that share KV (e2b) and on routed experts. Mutants: scales twice, owners of KV only."""
    config = ModelConfig.from_hf(small.hub_config(structure))
    assert structure != "e2b" or config.first_shared_layer < config.num_layers
    model = dataclasses.replace(small_model(structure=structure), config=config)
    manifest = small.build_artifact(DummySource(config), tmp_path / "artifact", recipe=recipe, context=64)
    assert planned(model, "cpu", recipe, context=64, chunk=7)[0].bytes_per_token == bytes_per_token(manifest, 64)
    kv = bytes_per_token(manifest, 64) - bytes_per_token(manifest, 0)
    wanted = [2 * 4 * n.num_kv_heads * n.head_dim * min(64, n.sliding_window or 64) for n in config.layers]
    assert kv == sum(wanted)


def test_the_limit_falls_with_the_context():
    limits = [planned("31b", "h200", "int4", context=length)[0] for length in (128, 4096, 131_072)]
    assert limits[0].bytes_per_token < limits[1].bytes_per_token < limits[2].bytes_per_token
    for plan in limits:
        assert plan.decode_limit_tokens_per_s == 4.8e12 / plan.bytes_per_token


def test_the_limit_of_an_unknown_machine_is_not_guessed():
    assert planned("e2b", "cpu", "int4")[0].decode_limit_tokens_per_s is None


# ---------------------------------------------------------------------------------------------------------------------
# What fits


def hint_of(refuse: Callable[[], None]) -> str:
    with pytest.raises(ConfigError) as error:
        refuse()
    assert error.value.hint is not None
    return error.value.hint


@pytest.mark.parametrize(
    ("model", "target", "recipe"),
    [("31b", "rtx4090", "int4"), ("12b", with_memory("cpu", 12), "int4"), ("26b-a4b", with_memory("l4", 27), "int8")],
    ids=_name,
)
def test_a_context_too_long_names_the_longest_that_fits(model, target, recipe):
    longest = load_model(model).config.max_position_embeddings
    plan, refuse = planned(model, target, recipe, context=longest)
    if plan.longest_context == 0:
        pytest.fail(f"choose a larger device: {plan.weights_in_memory_bytes / 1e9:.1f} GB of weights")
    assert not plan.fits
    assert hint_of(refuse) == f"--context {plan.longest_context} fits"
    exact, accept = planned(model, target, recipe, context=plan.longest_context)
    assert exact.fits
    accept()
    needed = exact.weights_in_memory_bytes + exact.kv_bytes + exact.scratch_bytes + PROCESS
    assert needed <= exact.memory_bytes
    more, refuse = planned(model, target, recipe, context=plan.longest_context + 1)
    assert not more.fits
    assert more.weights_in_memory_bytes + more.kv_bytes + more.scratch_bytes + PROCESS > more.memory_bytes
    assert hint_of(refuse) == f"--context {plan.longest_context} fits"


@pytest.mark.parametrize(
    ("model", "gigabytes", "nearest"),
    [
        ("31b", 24, "int4"),  # 61 GB in bfloat16, 31 in int8, 20 in int4
        ("31b", 40, "int8"),  # nearest to what was asked for, not the smallest
        ("12b", 16, "int8"),
        ("26b-a4b", 24, "int4-quality"),
        ("26b-a4b", 16, "int4"),
    ],
)
def test_weights_too_large_name_the_recipe_nearest_to_the_one_asked_for(model, gigabytes, nearest):
    target = with_memory("rtx4090", gigabytes)
    _, refuse = planned(model, target, "bf16", context=8192)
    hint = hint_of(refuse)
    recipe, context = re.fullmatch(r"--recipe (\S+) --context (\d+) fits", hint).groups()
    assert recipe == nearest
    plan, accept = planned(model, target, recipe, context=int(context))
    assert plan.fits
    accept()


def test_a_model_that_fits_in_no_recipe_says_so():
    _, refuse = planned("31b", with_memory("rtx4090", 8), "bf16")
    assert hint_of(refuse) == "no recipe of this model fits; try a smaller model or a target with more memory"


def test_the_cause_shows_what_is_needed_and_what_there_is():
    plan, refuse = planned("31b", "rtx4090", "bf16", context=4096)
    with pytest.raises(ConfigError) as error:
        refuse()
    needed = plan.weights_in_memory_bytes + plan.kv_bytes + plan.scratch_bytes + PROCESS
    assert error.value.cause == (f"31b as bf16 with 4096 tokens needs {needed / 1e9:.1f} GB, rtx4090 has 25.8 GB")


def test_the_memory_of_a_cpu_target_is_the_machines_own(monkeypatch):
    monkeypatch.setattr(module.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 500_000}.__getitem__)
    assert planned("e2b", "cpu", "int4")[0].memory_bytes == 4096 * 500_000


def test_lengths_out_of_range_are_refused():
    for lengths in ({"context": 0}, {"context": 10**7}, {"chunk": 0}, {"context": 100, "chunk": 101}):
        with pytest.raises(ConfigError, match=r"^--(context|chunk) "):
            planned("e2b", "cpu", "int4", **lengths)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of ``gemma4-export plan``."""
    monkeypatch.setattr(sys, "argv", ["gemma4-export", "plan", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_json_has_these_keys_and_nothing_else_on_stdout(monkeypatch, capsys):
    assert command(monkeypatch, "--model", "26b-a4b", "--target", "h200", "--recipe", "int4", "--json") == 0
    captured = capsys.readouterr()
    values = json.loads(captured.out)
    assert set(values) == KEYS
    assert captured.err == ""
    assert values["fits"] is True
    assert values["model"] == "26b-a4b"
    assert values["target"] == "h200"
    for key, value in values.items():
        if key.endswith("_bytes") and key != "role_bytes":
            assert type(value) is int, key
    plan, _ = planned("26b-a4b", "h200", "int4")
    assert values == json.loads(json.dumps(dataclasses.asdict(plan))) | {"fits": True}


def test_what_does_not_fit_is_shown_and_ends_with_2(monkeypatch, capsys):
    arguments = ("--model", "31b", "--target", "rtx4090", "--recipe", "bf16", "--context", "4096")
    assert command(monkeypatch, *arguments, "--json") == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["fits"] is False
    assert captured.err.startswith("error: 31b as bf16 with 4096 tokens needs ")
    assert "\nhint: --recipe " in captured.err
    assert captured.err.count("\n") == 2


def test_the_arithmetic_is_shown(monkeypatch, capsys):
    assert command(monkeypatch, "--model", "e2b", "--target", "rtx4090", "--recipe", "int4", "--context", "4096") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "e2b for rtx4090, int4, context 4096"
    limit = next(line for line in lines if line.startswith("limit"))
    bandwidth, size, rate = map(float, re.search(r"(\d+) GB/s / ([\d.]+) GB = (\d+) tok/s", limit).groups())
    assert bandwidth == 1008
    assert bandwidth / size == pytest.approx(rate, rel=1e-3)
    assert sum(line.endswith(tuple(RECIPE_ROLES)) for line in lines) == 5  # no experts, no router; the head is tied
    assert any("up to 131072 tokens fit" in line for line in lines)


def test_the_sums_on_screen_come_out(monkeypatch, capsys):
    arguments = ("--model", "e2b", "--target", "cpu", "--recipe", "int4", "--context", "4096", "--bandwidth", "40")
    monkeypatch.setattr(module.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096}.get(name, 4_000_000))
    assert command(monkeypatch, *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    memory = next(line for line in lines if line.startswith("memory"))
    *parts, total = map(float, re.findall(r"([\d.]+) GB", memory)[:5])
    assert len(parts) == 4
    assert sum(parts) == pytest.approx(total, abs=0.025)  # five numbers, each rounded by up to 0.005
    decode = next(line for line in lines if line.startswith("decode"))
    weights, kv, read = map(float, re.findall(r"([\d.]+) GB", decode))
    assert weights + kv == pytest.approx(read, abs=0.0015)
    assert kv > 0
    assert "          (more KV than is kept: layers that share a cache each read it)" in lines
    assert lines[-1] == f"limit     40 GB/s / {read:.3f} GB = {40 / read:.0f} tok/s"


def test_what_does_not_fit_gets_no_speed(monkeypatch, capsys):
    arguments = ("--model", "31b", "--target", "rtx4090", "--recipe", "bf16", "--context", "4096")
    assert command(monkeypatch, *arguments) == 2
    out = capsys.readouterr().out
    assert out.endswith("context   no token fits beside the weights\n")
    assert "tok/s" not in out


@pytest.mark.parametrize("value", ["0", "-3", "nan", "inf"])
def test_a_bandwidth_that_is_none_is_refused(monkeypatch, capsys, value):
    assert command(monkeypatch, "--model", "e2b", "--target", "cpu", "--bandwidth", value) == 2
    cause = f"error: --bandwidth {value}: expected GB/s above 0\nhint: --bandwidth 40\n"
    assert capsys.readouterr().err == cause


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("--model", "e2bb", "--target", "cpu"), "did you mean 'e2b'?"),
        (("--model", "e2b", "--target", "rtx409"), "did you mean 'rtx4090'?"),
        (("--model", "e2b", "--target", "cpu", "--recipe", "int5"), "did you mean 'int"),
    ],
)
def test_misspelt_names_end_with_2_and_the_nearest(monkeypatch, capsys, arguments, hint):
    assert command(monkeypatch, *arguments) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(("target", "recipe"), [("cpu", "bf16"), ("rtx4090", "int4"), ("h100", "bf16")])
def test_a_target_names_the_recipe_where_none_is_given(monkeypatch, capsys, target, recipe):
    assert command(monkeypatch, "--model", "e2b", "--target", target, "--json") == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == recipe
