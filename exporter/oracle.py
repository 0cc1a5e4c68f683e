"""Records the oracle: our own modules, layer by layer in float64, on the weights as the artifact stores them.

No weight is held: every matrix streams through memory a few rows at a time, twice, once for the recorded float64 pass
and once in float32 from the same inputs, whose distance says what float32 can be held to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from safetensors.numpy import save
from torch import Tensor

from gemma4_export.configs.evidence import IDENTITY_KEY, ORACLE_FILE, layer_taps
from gemma4_export.configs.model import LayerConfig, ModelConfig, RopeConfig
from gemma4_export.configs.names import EMBED_TOKENS, EMBED_TOKENS_PER_LAYER, decoder_tensors
from gemma4_export.configs.output import naming
from gemma4_export.exporter.models.probe import LayerProbe
from gemma4_export.exporter.models.text import Decoder
from gemma4_export.exporter.stored_weights import StoredWeights, streamed
from gemma4_export.exporter.weights import Placement
from gemma4_export.plugins.common.drift import drift

Array = np.ndarray[Any, np.dtype[Any]]

# Two prompts of 32 tokens: 64 rows send some four tokens through each of 26B-A4B's 128 experts, and every matrix is
# read once for all of them.
_TEXTS = (
    "The water in the harbour was still that morning, and the old man counted 17 boats before the fog came in. He knew "
    "each of them by the sound of its engine, and none by its name; names were for people who had time to paint them.",
    "def mean(values: list[float]) -> float:\n    # Zwei Worte für später: größer als erwartet, пусто, 東京.\n    "
    'total = sum(values)\n    return total / len(values) if values else float("nan")\n\nprint(mean([1.5, 2.25]))\n',
)
_TOKENS = 32
_LOGIT_ROWS = 8  # of each prompt, its last ones: all of 262144 logits for every token would be half of the file
_GREEDY_TOKENS = 8
SMALL_PARAMETERS = 10**9
"""Below, whole float32 passes cost little: greedy ids and the rounding of a whole pass are recorded as well."""


def encode_prompts(tokenizer_file: Path, *, context: int) -> Tensor:
    """[B, T] ids of the fixed prompts by the artifact's own tokenizer, T = 32 unless the context is shorter."""
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    bos = tokenizer.token_to_id("<bos>")
    rows = []
    for text in _TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        rows.append([*([] if bos is None else [bos]), *ids][: min(_TOKENS, context)])
    return torch.tensor([row[: min(map(len, rows))] for row in rows])


def oracle_bytes(config: ModelConfig) -> int:
    """Bytes of the file's tensors for a context of at least 32 tokens; what is left out is scalars and its header."""
    tokens, size = len(_TEXTS) * _TOKENS, config.hidden_size
    values = tokens * size + len(_TEXTS) * _LOGIT_ROWS * config.vocab_size
    values += 2 * tokens * config.num_layers * config.hidden_size_per_layer_input
    for layer in config.layers:
        widths = dict.fromkeys(("key", "value"), layer.num_kv_heads * layer.head_dim)
        widths["router"] = layer.moe.num_experts if layer.moe else 0
        values += tokens * sum(widths.get(tap, size) for tap in layer_taps(layer, config))
    for kind in ("sliding_attention", "full_attention"):
        rope = config.rope(kind)
        values += 2 * _TOKENS * rope.num_frequencies if rope else 0
    return 4 * values


def record_oracle(
    config: ModelConfig,
    placement: Placement,
    folder: Path,
    ids: Tensor,
    *,
    identity: str,
    on_layer: Callable[[int], None] = lambda done: None,
) -> None:
    """Write ``folder/oracle.safetensors`` from the weight files in ``folder``; its contents: ``configs/evidence.py``.

    Args:
        ids: [B, T] int64.
        identity: ``oracle_identity`` of the artifact.
        on_layer: called with the number of layers done.
    """
    with torch.inference_mode():
        tensors = _Oracle(config, StoredWeights(folder, placement)).record(ids, on_layer)
    arrays = {name: value.contiguous().numpy() for name, value in tensors.items()}
    # Not save_file: it makes a file that only its owner can read, whatever the umask.
    with naming(folder / ORACLE_FILE):
        (folder / ORACLE_FILE).write_bytes(save(arrays, metadata={IDENTITY_KEY: identity}))


class _Oracle:
    """Two decoders over one set of streamed weights: float64 says what is right, float32 what rounding costs."""

    def __init__(self, config: ModelConfig, weights: StoredWeights) -> None:
        self.config, self.weights = config, weights
        with torch.device("meta"):
            self.exact = streamed(Decoder(config), weights, torch.float64)
            self.rounded = streamed(Decoder(config), weights, torch.float32)

    def record(self, ids: Tensor, on_layer: Callable[[int], None]) -> dict[str, Tensor]:
        tensors = {"ids": ids} | self._inputs(ids)
        for layer in self.config.layers:
            self._record_layer(layer, tensors)
            on_layer(layer.index + 1)
        hidden = tensors[f"layers.{self.config.num_layers - 1}.output"][:, -_LOGIT_ROWS:]
        logits = [decoder.head(hidden.to(_dtype(decoder))) for decoder in (self.exact, self.rounded)]
        _keep(tensors, "logits", *logits)
        if sum(spec.num_elements for spec in decoder_tensors(self.config).values()) < SMALL_PARAMETERS:
            tensors |= self._whole_passes(ids, tensors["logits"])
        return tensors

    def _inputs(self, ids: Tensor) -> dict[str, Tensor]:
        """Embeddings, PLE and RoPE of ``ids`` from position 0 on, float32."""
        config = self.config
        tensors = {"inputs_embeds": self._embed(EMBED_TOKENS, ids, config.hidden_size).float()}
        for name, kind in (("rope_sliding", "sliding_attention"), ("rope_global", "full_attention")):
            rope = config.rope(kind)  # type: ignore[arg-type]  # the table holds the two literals
            if rope is not None:
                tensors[name] = rope_table(rope, ids.shape[1])
        if config.has_per_layer_inputs:
            size = config.hidden_size_per_layer_input
            rows = self._embed(EMBED_TOKENS_PER_LAYER, ids, size).reshape(*ids.shape, config.num_layers, size).float()
            tensors["per_layer_inputs"] = rows
            exact, rounded = (
                decoder.merge_per_layer_inputs(tensors["inputs_embeds"].to(dtype), rows.to(dtype))
                for decoder, dtype in ((self.exact, torch.float64), (self.rounded, torch.float32))
            )
            _keep(tensors, "merged_per_layer_inputs", exact, rounded)
        return tensors

    def _embed(self, table: str, ids: Tensor, size: int) -> Tensor:
        # The scale is rounded to float32, as the host does.
        rows = self.weights.gather(table, ids.flatten(), torch.float64) * float(np.float32(math.sqrt(size)))
        return rows.reshape(*ids.shape, -1)

    def _record_layer(self, layer: LayerConfig, tensors: dict[str, Tensor]) -> None:
        inputs = self._layer_inputs(layer, tensors)
        exact, rounded = (_run(decoder, layer, inputs) for decoder in (self.exact, self.rounded))
        for tap in layer_taps(layer, self.config):
            _keep(tensors, f"layers.{layer.index}.{tap}", exact[tap], rounded[tap])

    def _layer_inputs(self, layer: LayerConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        batch, length = tensors["inputs_embeds"].shape[:2]
        ends = torch.arange(1, length + 1, dtype=torch.int32).expand(batch, -1)
        before = "inputs_embeds" if layer.index == 0 else f"layers.{layer.index - 1}.output"
        rope = tensors["rope_sliding" if layer.is_sliding else "rope_global"].expand(batch, -1, -1, -1)
        inputs = {"hidden_states": tensors[before], "rope": rope, "end": ends}
        if layer.sliding_window is not None:
            inputs["start"] = (ends - layer.sliding_window).clamp(min=0)
        if self.config.has_per_layer_inputs:
            inputs["per_layer_input"] = tensors["merged_per_layer_inputs"].select(2, layer.index)
        if layer.owns_kv:
            inputs["write_index"] = torch.zeros(batch, dtype=torch.int64)
            empty = torch.zeros(batch, layer.num_kv_heads, length, layer.head_dim)
            return inputs | {"past_key": empty, "past_value": empty}
        donor = f"layers.{layer.kv_source}."
        return inputs | {"past_key": tensors[f"{donor}key"], "past_value": tensors[f"{donor}value"]}

    def _whole_passes(self, ids: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """What float32 loses from the first layer to the last, and the first prompt's continuation."""
        passes = self._logits(self.rounded, ids, _LOGIT_ROWS)
        rounding = drift(passes.numpy(), logits.numpy())
        sequence, margins = ids[:1], []
        for _ in range(_GREEDY_TOKENS):
            best = self._logits(self.exact, sequence, 1)[0, -1].topk(2)
            margins.append(best.values[0] - best.values[1])
            sequence = torch.cat([sequence, best.indices[None, :1]], dim=1)
        return {
            "rounding.model": torch.tensor(rounding, dtype=torch.float32),
            "greedy_ids": sequence[0, ids.shape[1] :],
            "greedy_margins": torch.stack(margins).float(),
        }

    def _logits(self, decoder: Decoder, ids: Tensor, rows: int) -> Tensor:
        """[B, rows, V] of the last tokens, one pass in the decoder's own precision from the first layer to the last."""
        dtype = _dtype(decoder)
        tensors = {name: value.to(dtype) for name, value in self._inputs(ids).items()}
        for layer in self.config.layers:
            taps = _run(decoder, layer, self._layer_inputs(layer, tensors))
            tensors |= {f"layers.{layer.index}.{tap}": taps[tap] for tap in ("key", "value", "output") if tap in taps}
        return decoder.head(tensors[f"layers.{self.config.num_layers - 1}.output"][:, -rows:])


def _run(decoder: Decoder, layer: LayerConfig, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The taps of one layer, computed in the decoder's precision."""
    dtype = _dtype(decoder)
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    probe = LayerProbe(decoder.layers[layer.index], decoder.config)  # type: ignore[arg-type]  # a ModuleList of them
    return dict(zip(layer_taps(layer, decoder.config), probe(cast), strict=True))


def _keep(tensors: dict[str, Tensor], name: str, exact: Tensor, rounded: Tensor) -> None:
    """Record ``exact`` in float32, and the drift of ``rounded`` from it."""
    tensors[name] = exact.float()
    tensors[f"rounding.{name}"] = torch.tensor(drift(rounded.numpy(), exact.numpy()), dtype=torch.float32)


def _dtype(decoder: Decoder) -> torch.dtype:
    return decoder.norm.weight.dtype


def rope_table(rope: RopeConfig, length: int) -> Tensor:
    """[1, T, 2, num_frequencies] cosines and sines of positions 0 … T - 1, float32."""
    exponents = torch.arange(0, 2 * rope.num_frequencies, 2, dtype=torch.float64) / rope.head_dim
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rope.theta**-exponents
    return torch.stack([angles.cos(), angles.sin()], dim=1)[None].float()
