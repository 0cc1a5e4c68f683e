"""Recipe files: the shipped ones on every released model, and what a user's own may get wrong."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from gemma4_export.configs.errors import ConfigError
from gemma4_export.configs.formats import BFLOAT16, BLOCKS, FLOAT32, INT8, WeightFormat
from gemma4_export.configs.model import ModelConfig
from gemma4_export.configs.models import load_model, model_names
from gemma4_export.configs.names import LM_HEAD, RECIPE_ROLES, decoder_tensors
from gemma4_export.configs.recipe import load_recipe, recipe_names
from gemma4_export.configs.target import check_recipe, load_target
from gemma4_export.exporter.build import resolve_options
from gemma4_export.exporter.plan import resolve_plan
from gemma4_export.exporter.weights import place_weights

INT4 = WeightFormat("int4", 32)
SHIPPED = ("bf16", "fp32", "fp8", "int4", "int4-quality", "int4-rtn", "int8", "int8-blocks")


def test_the_shipped_recipes():
    assert tuple(recipe_names()) == SHIPPED
    for name in SHIPPED:
        recipe = load_recipe(name)
        assert recipe.name == name
        assert tuple(sorted(recipe.formats)) == tuple(sorted(RECIPE_ROLES))
        assert recipe.format_of("decoder.norm") == FLOAT32  # whatever the rest is
        assert recipe.prefers_qat == (name == "int4")


def test_what_each_shipped_recipe_promises():
    assert set(load_recipe("fp32").formats.values()) == {FLOAT32}
    assert set(load_recipe("bf16").formats.values()) == {BFLOAT16}
    int4, rtn, quality = (load_recipe(name).formats for name in ("int4", "int4-rtn", "int4-quality"))
    assert rtn == int4  # they differ in where the weights come from
    for role in ("decoder.attention", "decoder.mlp", "decoder.experts", "decoder.head", "embeddings.per_layer"):
        assert int4[role] == INT4
    assert quality["decoder.mlp"] == quality["decoder.head"] == INT8
    assert quality["decoder.attention"] == quality["decoder.experts"] == INT4
    for name in SHIPPED:  # a few MB that decide everything
        assert not load_recipe(name).formats["decoder.router"].is_quantized


@pytest.mark.parametrize("model", [name for name in model_names() if not name.endswith("-base")])
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_places_every_released_model(model, name):
    specs, recipe = decoder_tensors(load_model(model).config), load_recipe(name)
    stored = place_weights(specs.values(), recipe).stored
    assert {weight.source for weight in stored} == set(specs)
    # One copy serves as token table and head, unless it is to be multiplied with in a format that no table has.
    assert len(stored) == len(specs) + (name == "fp8")
    for weight in stored:
        assert weight.placed.format == recipe.format_of(weight.role)
        assert weight.name == LM_HEAD or weight.role == specs[weight.name].role


# ---------------------------------------------------------------------------------------------------------------------
# Files of users


def recipe_file(folder: Path, *, head: str = 'name = "mine"\ntitle = "mine"\n', **changes: str | None) -> str:
    """A complete recipe of bfloat16 with some roles (``__`` for the dot) changed, added or, with None, left out."""
    roles: dict[str, str | None] = dict.fromkeys(RECIPE_ROLES, "bfloat16")
    roles |= {role.replace("__", "."): form for role, form in changes.items()}
    lines = [f'"{role}" = "{form}"' for role, form in roles.items() if form is not None]
    path = folder / "mine.toml"
    path.write_text(f"{head}[roles]\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def refused(path: str) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        load_recipe(path)
    assert "mine.toml" in error.value.cause
    return error.value


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_file_of_ones_own_is_read(tmp_path, kind, block):
    recipe = load_recipe(recipe_file(tmp_path, decoder__mlp=f"{kind}/{block}", decoder__head="int8"))
    assert recipe.name == "mine"
    assert recipe.formats["decoder.mlp"] == WeightFormat(kind, block)
    assert recipe.formats["decoder.head"] == INT8
    assert recipe.formats["decoder.attention"] == BFLOAT16
    assert not recipe.prefers_qat


def test_an_unknown_role_names_the_nearest(tmp_path):
    error = refused(recipe_file(tmp_path, decoder__atention="int8"))
    assert "'decoder.atention' does not exist" in error.cause
    assert error.hint == "did you mean 'decoder.attention'?"


@pytest.mark.parametrize("role", ["decoder.experts", "decoder.router", "embeddings.tokens", "embeddings.per_layer"])
def test_fp8_for_what_nothing_multiplies_with_is_refused(tmp_path, role):
    error = refused(recipe_file(tmp_path, **{role.replace(".", "__"): "fp8"}))
    assert f"{role}: fp8 is for decoder.attention, decoder.mlp, decoder.per_layer, decoder.head only" in error.cause
    assert error.hint == f'"{role}" = "int8"'
    load_recipe(recipe_file(tmp_path, **tomllib.loads(error.hint.replace(".", "__")), decoder__mlp="fp8"))


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("cpu", "onnxruntime's CPU provider has no product with fp8 weights, it would hold them as float32"),
        ("rtx3090", "fp8 needs compute capability 8.9, GeForce RTX 3090, 24 GB has 8.6"),
        ("jetson-orin", "fp8 needs compute capability 8.9, Jetson AGX Orin, 64 GB has 8.7"),
    ],
)
def test_fp8_for_a_device_without_it_is_refused_by_build_and_plan(target, why):
    chosen, recipe = load_target(target), load_recipe("fp8")
    model = load_model("e2b")
    with pytest.raises(ConfigError) as built:
        resolve_options(model.config, model_name="e2b", target=chosen, recipe=recipe)
    with pytest.raises(ConfigError) as planned:
        resolve_plan(model, target=chosen, recipe=recipe, dummy=False, context=None, chunk=None)
    assert built.value.cause == planned.value.cause == f"recipe fp8 for {target}: {why}"
    assert built.value.hint == "--recipe int8 takes as many bytes"


@pytest.mark.parametrize("target", ["rtx4090", "l4", "rtx5090", "h100", "jetson-thor"])
def test_fp8_is_for_newer_gpus(target):
    check_recipe(load_target(target), load_recipe("fp8"))


def test_norms_are_no_role_of_a_recipe(tmp_path):
    assert "'decoder.norm' does not exist" in refused(recipe_file(tmp_path, decoder__norm="bfloat16")).cause


@pytest.mark.parametrize(
    ("form", "hint"),
    [
        ("int4", "known: int4/32, int4/64, int4/128"),
        ("int4/256", "known: int4/32, int4/64, int4/128"),
        ("int4/032", "known: int4/32, int4/64, int4/128"),
        ("int4/²", "known: int4/32, int4/64, int4/128"),
        ("int8/", "did you mean 'int8/32'?"),
        ("bfloat", "did you mean 'bfloat16'?"),
        ("q4_k_m", "known: bfloat16, float32, fp8, int4/128, int4/32, int4/64, int8, int8/128, int8/32, int8/64"),
    ],
)
def test_an_unknown_format_names_its_role_and_the_nearest(tmp_path, form, hint):
    error = refused(recipe_file(tmp_path, decoder__mlp=form))
    assert "decoder.mlp" in error.cause
    assert repr(form) in error.cause
    assert error.hint == hint


def test_a_missing_role_is_named_with_the_line_to_add(tmp_path):
    error = refused(recipe_file(tmp_path, decoder__router=None, embeddings__per_layer=None))
    assert "no format for decoder.router, embeddings.per_layer" in error.cause
    assert error.hint == 'add "decoder.router" = "bfloat16"'


def test_an_unknown_key_names_the_nearest(tmp_path):
    error = refused(recipe_file(tmp_path, head='name = "mine"\ntitle = "mine"\nprefer_qat = true\n'))
    assert "unknown key 'prefer_qat'" in error.cause
    assert error.hint == "did you mean 'prefers_qat'?"


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ('title = "x"\n[roles]\n', "key 'name' is missing"),
        ('name = "x"\ntitle = "x"\n', "key 'roles' is missing"),
        ('name = "x"\ntitle = "x"\nroles = 3\n', "roles: expected a table, found int"),
        ("name = [", "not a readable TOML file"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path, text, cause):
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    assert cause in refused(str(path)).cause


def test_a_file_that_is_not_there(tmp_path):
    assert "not a readable TOML file" in refused(str(tmp_path / "mine.toml")).cause


def test_a_shipped_name_misspelt_names_the_nearest():
    with pytest.raises(ConfigError, match=r"recipe 'int4-qality' is not known\nhint: did you mean 'int4-quality'\?"):
        load_recipe("int4-qality")


@pytest.mark.parametrize(
    ("role", "columns"),
    [("decoder.experts", 704), ("decoder.mlp", 2112)],  # of 26B-A4B: no multiples of 128
)
def test_a_block_that_does_not_divide_a_released_model_names_the_nearest_that_does(tmp_path, role, columns):
    specs = decoder_tensors(load_model("26b-a4b").config)
    recipe = load_recipe(recipe_file(tmp_path, **{role.replace(".", "__"): "int4/128"}))
    with pytest.raises(ConfigError) as error:
        place_weights(specs.values(), recipe)
    assert f"{role}, layers.0." in error.value.cause
    assert f"block 128 does not divide its {columns} columns" in error.value.cause
    line = re.fullmatch(r"write (.+) below \[roles\] in a recipe of your own, --recipe FILE\.toml .*", error.value.hint)
    typed = tomllib.loads(line[1])  # as it stands
    assert typed == {role: "int4/64"}
    place_weights(specs.values(), load_recipe(recipe_file(tmp_path, **{role.replace(".", "__"): typed[role]})))


def test_the_recipe_of_the_docs_fits_the_demo_model(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    text = (root / "docs" / "quantization.md").read_text(encoding="utf-8")
    block = text.split("```toml\n")[1].split("```")[0]
    path = tmp_path / "docs.toml"
    path.write_text(block, encoding="utf-8")
    values = json.loads((root / "demo" / "checkpoints" / "tiny-e" / "config.json").read_text(encoding="utf-8"))
    specs = decoder_tensors(ModelConfig.from_hf(values))
    assert {str(weight.placed.format) for weight in place_weights(specs.values(), load_recipe(str(path))).stored} == {
        "int4/32",
        "int8",
        "bfloat16",
        "float32",
    }
