"""Holds an artifact to the oracle in it: file hashes, tables, each layer by itself, the head, then the whole model.

Every layer gets the oracle's own input, so a drift belongs to the layer and role that show it and to none before them,
and memory stays at one layer whatever the model.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.errors import ConfigError
from gemma4_export.configs.evidence import TAP_ROLES, VerifiedRole, bound_of
from gemma4_export.configs.manifest import MANIFEST_NAME, GraphEntry, Manifest
from gemma4_export.plugins.common.drift import drift, row_scale
from gemma4_export.runtime.decoder import Decoder
from gemma4_export.runtime.memory import available_bytes
from gemma4_export.runtime.session_ort import Activations, open_graph
from gemma4_export.runtime.tables import EmbeddingTable
from gemma4_export.runtime.verify_feeds import check_graphs, head_feeds, head_slices, inputs_feeds, layer_feeds
from gemma4_export.runtime.verify_oracle import Oracle, open_oracle
from gemma4_export.runtime.verify_report import Level, Report, TapDrift, WholeModel, device_name

Array = np.ndarray[Any, np.dtype[Any]]

BEHIND_THE_ROUTER = ("experts", "ple", "output")
"""Taps that another choice of experts moves."""


def verify(
    folder: Path,
    *,
    backend: str | None = None,
    activations: Activations = "fp32",
    level: Level = "full",
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Verify the artifact in ``folder``; nothing is written.

    Args:
        backend: one that the artifact was packed for; None: the only one.
        activations: "fp32" is what the bounds hold; "int8" runs everything once more with activations rounded to int8,
            as artifacts run by default, and reports that drift beside.
        level: "layers" leaves out the pass of the whole model.
        say: called with one line per step.
    Raises:
        ArtifactError: a file is missing or not as the manifest says, or the oracle is another model's.
        ConfigError: the artifact lacks this backend.
    """
    say("hashing files")
    artifact = Artifact.open(folder, check="full")
    manifest = artifact.manifest
    chosen = _check_backend(manifest, backend)
    with open_oracle(artifact) as oracle:
        verification = _Verification(artifact, oracle, activations, say)
        taps = [*verification.tables()]
        if manifest.verify.graphs:
            taps += [*verification.per_layer_inputs(), *verification.layers(), *verification.head()]
        reason = verification.reason_not_to_run(level)
        whole = [] if reason else verification.whole()
        prompts, tokens = oracle.ids.shape
    return Report(
        model=manifest.model.name,
        recipe=manifest.recipe,
        manifest_sha256=hashlib.sha256(artifact.path(MANIFEST_NAME).read_bytes()).hexdigest(),
        backend=chosen,
        device=device_name(),
        versions={name: importlib.metadata.version(name) for name in ("gemma4-export", "onnxruntime", "numpy")},
        level=level,
        files=len(manifest.files),
        prompts=prompts,
        tokens=tokens,
        sliding_window=manifest.kv.sliding_window,
        taps=taps,
        whole=whole,
        whole_not_run=reason,
        not_covered=_not_covered(manifest, tokens, taps, has_whole=bool(whole)),
    )


def _check_backend(manifest: Manifest, backend: str | None) -> str:
    if manifest.engines is None:
        check_graphs(manifest)
        packed = sorted({graph.backend for graph in manifest.verify.graphs.values()})
    else:
        packed = [manifest.engines.backend]
    if backend is not None and backend not in packed:
        raise ConfigError(
            f"--backend {backend}: this artifact was packed for {', '.join(packed)}", hint=f"--backend {packed[0]}"
        )
    return backend or packed[0]


class _Verification:
    """The steps of one verification over an opened artifact and its oracle."""

    def __init__(
        self, artifact: Artifact, oracle: Oracle, activations: Activations, say: Callable[[str], None]
    ) -> None:
        self.artifact, self.oracle, self.say = artifact, oracle, say
        self.manifest, self.graphs = artifact.manifest, artifact.manifest.verify.graphs
        self.levels: tuple[Activations, ...] = ("fp32",) if activations == "fp32" else ("fp32", "int8")
        self.prompts, self.tokens = oracle.ids.shape

    def tables(self) -> Iterator[TapDrift]:
        """The rows that the host gathers, whatever runs the layers."""
        manifest, model = self.manifest, self.manifest.model
        wanted = self.oracle.tensor("inputs_embeds", self.prompts, self.tokens, model.hidden_size)
        table = EmbeddingTable(self.artifact, manifest.embed_tokens)
        found = table.gather(self.oracle.ids.ravel()).reshape(wanted.shape)
        yield self._compare("inputs_embeds", None, "embedding", [found], wanted, bound=bound_of(0))
        if manifest.embed_tokens_per_layer is None:
            return
        rows = EmbeddingTable(self.artifact, manifest.embed_tokens_per_layer).gather(self.oracle.ids.ravel())
        shape = (self.prompts, self.tokens, model.num_layers, model.hidden_size_per_layer_input)
        given = self.oracle.tensor("per_layer_inputs", *shape)
        for layer in range(model.num_layers):
            one = (slice(None), slice(None), layer)
            name, found_rows = f"layers.{layer}.ple_rows", [rows.reshape(shape)[one]]
            yield self._compare(name, layer, "ple", found_rows, given[one], bound=bound_of(0))

    def per_layer_inputs(self) -> Iterator[TapDrift]:
        """With PLE, what the decoder makes of its rows for each layer."""
        model = self.manifest.model
        if self.manifest.embed_tokens_per_layer is None:
            return
        self.say("per-layer inputs")
        shape = (self.prompts, self.tokens, model.num_layers, model.hidden_size_per_layer_input)
        merged = self.oracle.tensor("merged_per_layer_inputs", *shape)
        found_merged = self._run_graph(
            self.graphs["inputs"],
            [inputs_feeds(self.oracle, b) for b in range(self.prompts)],
        )["merged_per_layer_inputs"]
        for layer in range(model.num_layers):
            one = (slice(None), slice(None), layer)
            bound = self.oracle.bound("merged_per_layer_inputs")
            found_inputs = [values[one] for values in found_merged]
            yield self._compare(f"layers.{layer}.ple_inputs", layer, "ple", found_inputs, merged[one], bound=bound)

    def layers(self) -> Iterator[TapDrift]:
        """Every tap of every layer."""
        for layer in range(self.manifest.model.num_layers):
            self.say(f"layer {layer + 1} of {self.manifest.model.num_layers}")
            graph = self.graphs[f"layers.{layer}"]
            feeds = [layer_feeds(self.manifest, self.oracle, layer, b) for b in range(self.prompts)]
            found = self._run_graph(graph, feeds)
            is_clear = np.ones((self.prompts, self.tokens), bool)
            for tap in graph.outputs:
                name = f"layers.{layer}.{tap}"
                wanted, bound = self.oracle.tensor(name, *found[tap][0].shape), self.oracle.bound(name)
                rows = is_clear if tap in BEHIND_THE_ROUTER else None
                yield self._compare(name, layer, TAP_ROLES[tap], found[tap], wanted, bound=bound, rows=rows)
                if tap == "router":
                    is_clear = clear_routes(wanted, self.manifest.model.top_k_experts, bound)

    def head(self) -> Iterator[TapDrift]:
        """Logits of the last rows, vocabulary slice by slice."""
        wanted, feeds = self.oracle.tensor("logits"), head_feeds(self.manifest, self.oracle)
        slices = head_slices(self.manifest)
        parts: list[list[Array]] = []
        for index, name in enumerate(slices):
            self.say(f"head, part {index + 1} of {len(slices)}")
            parts.append(self._run_graph(self.graphs[name], [feeds])["logits"])
        found = [np.concatenate(level, axis=-1).reshape(*wanted.shape[:2], -1) for level in zip(*parts, strict=True)]
        wanted = self.oracle.tensor("logits", *found[0].shape)
        yield self._compare("logits", None, "head", found, wanted, bound=self.oracle.bound("logits"))

    def reason_not_to_run(self, level: Level) -> str | None:
        """Why the whole model is not run; None: it is."""
        if self.manifest.engines is not None:
            return "this version cannot run engines"
        if level == "layers":
            return "--level layers"
        kv = self.manifest.kv
        needed = self.manifest.verify.load_peak_bytes + kv.num_bytes(max(kv.global_bucket, self.tokens))
        free = available_bytes()
        if free is not None and needed > free:
            return f"it needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
        return None

    def whole(self) -> list[WholeModel]:
        """The decoder's own graph on the oracle's prompts, once per kind of activations."""
        results = []
        for level in self.levels:
            self.say(f"whole model, {level} activations")
            results.append(run_whole(Decoder(self.artifact, activations=level), self.oracle, level))
        return results

    def _run_graph(self, graph: GraphEntry, feeds: Sequence[dict[str, Array]]) -> dict[str, list[Array]]:
        """Output -> its values with each kind of activations, prompts joined along the first axis."""
        outputs: dict[str, list[Array]] = {name: [] for name in graph.outputs}
        for level in self.levels:
            session = open_graph(self.artifact.path(graph.file), activations=level)
            results = [session.run(graph.outputs, one) for one in feeds]
            for index, name in enumerate(graph.outputs):
                outputs[name].append(np.concatenate([result[index] for result in results]))
        return outputs

    def _compare(
        self,
        name: str,
        layer: int | None,
        role: VerifiedRole,
        found: Sequence[Array],
        wanted: Array,
        *,
        bound: float,
        rows: Array | None = None,
    ) -> TapDrift:
        """``rows`` [B, T] picks the tokens that are compared; None: all of them."""
        drifts = [drift(values, wanted) if rows is None else drift(values[rows], wanted[rows]) for values in found]
        count = self.prompts * self.tokens if rows is None else int(rows.sum())
        return TapDrift(
            name=name,
            layer=layer,
            role=role,
            drift=drifts[0],
            bound=bound,
            int8_drift=drifts[1] if len(drifts) > 1 else None,
            rows=count,
            rows_near_a_tie=0 if rows is None else rows.size - count,
        )


def clear_routes(logits: Array, top_k: int, bound: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """[B, T]: tokens whose experts no drift within ``bound`` can change, from the oracle's router logits [B, T, X].

    The last expert taken and the first one left may each move by the bound, towards each other.
    """
    if top_k >= logits.shape[-1]:
        return np.ones(logits.shape[:-1], bool)
    ranked = np.sort(logits, axis=-1)[..., ::-1]
    margin = ranked[..., top_k - 1] - ranked[..., top_k]
    return np.asarray(margin > 2 * bound * row_scale(logits)[..., 0])


def run_whole(decoder: Decoder, oracle: Oracle, activations: Activations) -> WholeModel:
    """Every prompt through the decoder in its own chunks, and the first prompt's continuation where one is recorded."""
    wanted = oracle.tensor("logits")
    prompts, rows = wanted.shape[:2]
    tokens = oracle.ids.shape[1]
    found, compactions = np.empty_like(wanted), 0
    for prompt in range(prompts):
        cache = decoder.new_cache()
        last = list(range(tokens - rows, tokens))
        found[prompt] = decoder.forward(oracle.ids[prompt].tolist(), cache, rows=last)
        compactions = max(compactions, cache.num_compactions)
    is_held = activations == "fp32" and "rounding.model" in oracle
    bound = oracle.bound("model") if is_held else None
    agreement, agrees = _greedy(decoder, oracle, bound or 0.0) if is_held else (None, True)
    return WholeModel(
        activations=activations,
        drift=drift(found, wanted),
        bound=bound,
        kl_divergence=kl_divergence(wanted, found),
        top1_agreement=float((wanted.argmax(-1) == found.argmax(-1)).mean()),
        compactions=compactions,
        greedy_agreement=agreement,
        greedy_agrees=agrees,
    )


def _greedy(decoder: Decoder, oracle: Oracle, bound: float) -> tuple[str, bool]:
    """Ids after the first prompt, compared until one whose lead over the next is within twice the bound."""
    wanted, margins = oracle.tensor("greedy_ids").tolist(), oracle.tensor("greedy_margins").tolist()
    scale = float(row_scale(oracle.tensor("logits")).max())
    room = decoder.manifest.context - oracle.ids.shape[1]
    unclear = [index for index, margin in enumerate(margins) if margin <= 2 * bound * scale]
    count = min([len(wanted), room, *unclear])
    cache, step = decoder.new_cache(), oracle.ids[0].tolist()
    produced: list[int] = []
    while len(produced) < count:
        logits = decoder.forward(step, cache, rows=[len(step) - 1])
        step = [int(logits[0].argmax())]
        produced += step
    same = sum(a == b for a, b in zip(produced, wanted, strict=False))
    return f"{same} of {count} ids", same == count


def kl_divergence(wanted: Array, found: Array) -> float:
    """Mean over rows of sum p log(p / q), for p and q the softmax of logits [..., V]."""
    log_p, log_q = (_log_softmax(values.astype(np.float64)) for values in (wanted, found))
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean())


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _not_covered(manifest: Manifest, tokens: int, taps: Sequence[TapDrift], *, has_whole: bool) -> list[str]:
    """What this verification says nothing about, in words."""
    window, missing = manifest.kv.sliding_window, []
    if manifest.engines is not None:
        missing.append(f"every layer and the head: {manifest.engines.backend} engines by their hashes only")
    if window is not None and tokens <= window:
        missing.append(f"the sliding window: prompts of {tokens} tokens are not longer than its {window}")
    elif not has_whole:
        missing.append("chunks and sliding buffers: the whole model was not run")
    if manifest.embed_tokens_per_layer is not None or manifest.model.vocab_size > tokens * 2:
        missing.append("table rows of tokens that the prompts do not hold: their hashes only")
    near = max((tap.rows_near_a_tie for tap in taps), default=0)
    if near:
        missing.append(f"up to {near} tokens a layer whose last expert is too close to call")
    return missing
