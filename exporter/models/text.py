"""The Gemma 4 text decoder as modules written to be exported: tensors in and out, semantic ops where kernels differ.

Parameters carry the checkpoint's names (prefix removed), so a weight has one name in checkpoint, module, graph and
artifact. The arithmetic is transformers'; tests hold it to that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma4_export.configs.model import LayerConfig, ModelConfig
from gemma4_export.plugins.attention.torch_op import attention, shared_attention
from gemma4_export.plugins.linear.torch_op import linear
from gemma4_export.plugins.moe.torch_op import moe


class Linear(nn.Module):
    """A bias-free projection; ``weight`` is [out, in] as stored."""

    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size), requires_grad=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return linear(hidden_states, self.weight)


class RMSNorm(nn.Module):
    """``x * rsqrt(mean(x ** 2) + eps) * weight`` over the last axis; the weight is used as is, not as 1 + weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.rms_norm(hidden_states, (hidden_states.shape[-1],), self.weight, self.eps)


def weightless_rms_norm(hidden_states: Tensor, eps: float) -> Tensor:
    return F.rms_norm(hidden_states, (hidden_states.shape[-1],), None, eps)


def gelu(hidden_states: Tensor) -> Tensor:
    return F.gelu(hidden_states, approximate="tanh")


@dataclass(frozen=True, slots=True)
class Rope:
    """Cosine and sine of this call's positions, [B, T, D // 2] each, one for dims that stand still."""

    cos: Tensor
    sin: Tensor

    @staticmethod
    def padded(rope: Tensor, head_dim: int) -> Rope:
        """Fill [B, T, 2, num_frequencies] up to every pair of a head: angle 0 leaves a pair as it is, exactly."""
        cos, sin = rope.unbind(2)
        missing = head_dim // 2 - rope.shape[-1]
        if missing:
            cos, sin = F.pad(cos, (0, missing), value=1.0), F.pad(sin, (0, missing), value=0.0)
        return Rope(cos, sin)

    def rotate(self, heads: Tensor) -> Tensor:
        """Turn the pairs (i, i + D // 2) of [B, T, H, D]."""
        batch, length, num_heads, head_dim = heads.shape
        flat = heads.reshape(batch, length, num_heads * head_dim)
        flat = torch.onnx.ops.rotary_embedding(flat, self.cos, self.sin, num_heads=num_heads)
        return flat.reshape(batch, length, num_heads, head_dim)

    def rows(self, index: Tensor) -> Rope:
        return Rope(take_rows(self.cos, index), take_rows(self.sin, index))


@dataclass(frozen=True, slots=True)
class Visibility:
    """Where a layer type's caches are written, and the run of slots that each query sees."""

    write_index: Tensor
    start: Tensor | None
    end: Tensor

    def rows(self, index: Tensor) -> Visibility:
        start = None if self.start is None else take_rows(self.start, index)
        return Visibility(self.write_index, start, take_rows(self.end, index))


def take_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """[B, T, …] -> [1, R, …]: the rows ``index`` of the flattened b * T + t axis."""
    return tensor.flatten(0, 1).index_select(0, index).unsqueeze(0)


class Attention(nn.Module):
    """Attention of one layer; where the layer shares KV it has no k and v of its own and only reads."""

    def __init__(self, layer: LayerConfig, config: ModelConfig) -> None:
        super().__init__()
        self.layer, self.eps = layer, config.rms_norm_eps
        hidden, queries = config.hidden_size, layer.num_heads * layer.head_dim
        keys = layer.num_kv_heads * layer.head_dim
        self.q_proj = Linear(hidden, queries)
        self.q_norm = RMSNorm(layer.head_dim, self.eps)
        self.o_proj = Linear(queries, hidden)
        if layer.owns_kv:
            self.k_proj = Linear(hidden, keys)
            self.k_norm = RMSNorm(layer.head_dim, self.eps)
            self.v_proj = None if layer.k_eq_v else Linear(hidden, keys)

    def forward(
        self, hidden_states: Tensor, rope: Rope, visible: Visibility, cache: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attend, and give back the cache with this call's keys and values in it (if shared, the donor's untouched)."""
        batch, length, _ = hidden_states.shape
        query = self._heads(self.q_proj(hidden_states), self.layer.num_heads)
        query = rope.rotate(self.q_norm(query))
        # Attention scores are not divided by sqrt(head_dim): q_norm and k_norm carry the scale.
        if self.layer.owns_kv:
            key_projection = self.k_proj(hidden_states)
            # With k_eq_v the values are the raw key projection, before k_norm and RoPE.
            value_projection = key_projection if self.v_proj is None else self.v_proj(hidden_states)
            key = rope.rotate(self.k_norm(self._heads(key_projection, self.layer.num_kv_heads)))
            value = weightless_rms_norm(self._heads(value_projection, self.layer.num_kv_heads), self.eps)
            output, *present = attention(
                query, key, value, *cache, visible.write_index, visible.start, visible.end, scale=1.0
            )
            cache = (present[0], present[1])
        else:
            output = shared_attention(query, *cache, visible.start, visible.end, scale=1.0)
        return self.o_proj(output.reshape(batch, length, -1)), cache

    def _heads(self, projection: Tensor, num_heads: int) -> Tensor:
        batch, length, _ = projection.shape
        return projection.reshape(batch, length, num_heads, self.layer.head_dim)


class MLP(nn.Module):
    def __init__(self, layer: LayerConfig, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, layer.intermediate_size)
        self.up_proj = Linear(config.hidden_size, layer.intermediate_size)
        self.down_proj = Linear(layer.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(gelu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class Router(nn.Module):
    """Logits over the experts, from the un-normed residual: ``proj(rms(r) * scale * E ** -0.5)``."""

    def __init__(self, num_experts: int, config: ModelConfig) -> None:
        super().__init__()
        self.proj = Linear(config.hidden_size, num_experts)
        self.scale = nn.Parameter(torch.empty(config.hidden_size), requires_grad=False)
        self.per_expert_scale = nn.Parameter(torch.empty(num_experts), requires_grad=False)
        self.eps = config.rms_norm_eps

    def forward(self, residual: Tensor) -> Tensor:
        normed = weightless_rms_norm(residual, self.eps)
        return self.proj(normed * self.scale * residual.shape[-1] ** -0.5)


class Experts(nn.Module):
    """Fused expert weights, expert-major: [X, 2F, E] (rows 0…F-1 gate, F…2F-1 up) and [X, E, F]."""

    def __init__(self, layer: LayerConfig, config: ModelConfig) -> None:
        super().__init__()
        assert layer.moe is not None
        num_experts, width, hidden = layer.moe.num_experts, layer.moe.intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden), requires_grad=False)
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, width), requires_grad=False)

    def forward(self, hidden_states: Tensor, router_logits: Tensor, per_expert_scale: Tensor, top_k: int) -> Tensor:
        return moe(hidden_states, router_logits, per_expert_scale, self.gate_up_proj, self.down_proj, top_k=top_k)


class DecoderLayer(nn.Module):
    def __init__(self, layer: LayerConfig, config: ModelConfig) -> None:
        super().__init__()
        self.layer = layer
        hidden, ple, eps = config.hidden_size, config.hidden_size_per_layer_input, config.rms_norm_eps
        self.self_attn = Attention(layer, config)
        self.mlp = MLP(layer, config)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = RMSNorm(hidden, eps)
        self.post_feedforward_layernorm = RMSNorm(hidden, eps)
        if layer.moe:
            self.router = Router(layer.moe.num_experts, config)
            self.experts = Experts(layer, config)
            self.pre_feedforward_layernorm_2 = RMSNorm(hidden, eps)
            self.post_feedforward_layernorm_1 = RMSNorm(hidden, eps)
            self.post_feedforward_layernorm_2 = RMSNorm(hidden, eps)
        if ple:
            self.per_layer_input_gate = Linear(hidden, ple)
            self.per_layer_projection = Linear(ple, hidden)
            self.post_per_layer_input_norm = RMSNorm(hidden, eps)
        self.layer_scalar = nn.Parameter(torch.empty(1), requires_grad=False)

    def forward(
        self,
        hidden_states: Tensor,
        per_layer_input: Tensor | None,
        rope: Rope,
        visible: Visibility,
        cache: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, cache = self.self_attn(self.input_layernorm(hidden_states), rope, visible, cache)
        hidden_states = hidden_states + self.post_attention_layernorm(attended)
        hidden_states = hidden_states + self.post_feedforward_layernorm(self._feed_forward(hidden_states))
        if per_layer_input is not None:
            gated = gelu(self.per_layer_input_gate(hidden_states)) * per_layer_input
            hidden_states = hidden_states + self.post_per_layer_input_norm(self.per_layer_projection(gated))
        return hidden_states * self.layer_scalar, cache

    def _feed_forward(self, residual: Tensor) -> Tensor:
        dense: Tensor = self.mlp(self.pre_feedforward_layernorm(residual))
        if self.layer.moe is None:
            return dense
        routed = self.experts(
            self.pre_feedforward_layernorm_2(residual),
            self.router(residual),
            self.router.per_expert_scale,
            self.layer.moe.top_k,
        )
        return self.post_feedforward_layernorm_1(dense) + self.post_feedforward_layernorm_2(routed)


class Decoder(nn.Module):
    """The whole text decoder, with the inputs and outputs of ``configs/names.py``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        hidden, ple = config.hidden_size, config.hidden_size_per_layer_input
        self.lm_head = Linear(hidden, config.vocab_size)  # the token table's values; the host embeds
        self.layers = nn.ModuleList(DecoderLayer(layer, config) for layer in config.layers)
        self.norm = RMSNorm(hidden, config.rms_norm_eps)
        if ple:
            self.per_layer_model_projection = Linear(hidden, config.num_layers * ple)
            self.per_layer_projection_norm = RMSNorm(ple, config.rms_norm_eps)

    def forward(self, inputs: dict[str, Tensor], caches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
        """Run T tokens.

        Args:
            inputs: everything in ``names.decoder_inputs`` before the caches, by name.
            caches: (key, value) of each layer that owns its KV, in layer order, [B, Hkv, slots, D].
        Returns:
            logits [R, V] float32, and the present keys and values in the order of the caches, flattened.
        """
        config, rows = self.config, inputs["output_rows"]
        hidden_states = inputs["inputs_embeds"]
        per_layer_inputs = None
        if "per_layer_inputs" in inputs:
            per_layer_inputs = self.merge_per_layer_inputs(hidden_states, inputs["per_layer_inputs"])
        ropes, visibles = self._positions(inputs)
        present: dict[int | None, tuple[Tensor, Tensor]] = {}
        owners = iter(caches)
        for layer, module in zip(config.layers, self.layers, strict=True):
            if layer.index == config.first_shared_layer:
                # From here on nothing writes KV, so only the rows whose logits are wanted need to go on.
                hidden_states = take_rows(hidden_states, rows)
                per_layer_inputs = None if per_layer_inputs is None else take_rows(per_layer_inputs, rows)
                ropes = {kind: rope.rows(rows) for kind, rope in ropes.items()}
                visibles = {kind: visible.rows(rows) for kind, visible in visibles.items()}
            cache = next(owners) if layer.owns_kv else present[layer.kv_source]
            hidden_states, cache = module(
                hidden_states,
                None if per_layer_inputs is None else per_layer_inputs.select(2, layer.index),
                ropes[layer.layer_type],
                visibles[layer.layer_type],
                cache,
            )
            if layer.owns_kv:
                present[layer.index] = cache
        if config.first_shared_layer == config.num_layers:
            hidden_states = take_rows(hidden_states, rows)
        logits = self.head(hidden_states.squeeze(0))
        return logits, [tensor for pair in present.values() for tensor in pair]

    def head(self, hidden_states: Tensor) -> Tensor:
        """[R, E] of the last layer -> logits [R, V], soft-capped."""
        logits: Tensor = self.lm_head(self.norm(hidden_states))
        if self.config.final_logit_softcapping is not None:
            logits = torch.tanh(logits / self.config.final_logit_softcapping) * self.config.final_logit_softcapping
        return logits

    def merge_per_layer_inputs(self, inputs_embeds: Tensor, token_rows: Tensor) -> Tensor:
        """(projection of the embedding + the token's own row) / sqrt(2), [B, T, L, P]."""
        batch, length, hidden = inputs_embeds.shape
        context = self.per_layer_model_projection(inputs_embeds) * hidden**-0.5
        context = context.reshape(batch, length, self.config.num_layers, self.config.hidden_size_per_layer_input)
        return (self.per_layer_projection_norm(context) + token_rows) * 2**-0.5

    def _positions(self, inputs: dict[str, Tensor]) -> tuple[dict[str, Rope], dict[str, Visibility]]:
        ropes: dict[str, Rope] = {}
        visibles: dict[str, Visibility] = {}
        for layer in self.config.layers:
            kind = layer.layer_type
            if kind in ropes:
                continue
            short = "sliding" if layer.is_sliding else "global"
            ropes[kind] = Rope.padded(inputs[f"rope_{short}"], layer.head_dim)
            visibles[kind] = Visibility(
                inputs[f"{short}_write_index"], inputs.get(f"{short}_start"), inputs[f"{short}_end"]
            )
        return ropes, visibles
