"""Parts of the decoder alone, with what happens inside them as outputs: traced for verification, run for the oracle."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemma4_export.configs.evidence import layer_taps
from gemma4_export.configs.model import LayerConfig, ModelConfig
from gemma4_export.exporter.models.text import Decoder, DecoderLayer, Rope, Visibility


class LayerProbe(nn.Module):
    """One decoder layer, its weights named as in the whole decoder, giving out ``layer_taps``."""

    def __init__(self, module: DecoderLayer, config: ModelConfig) -> None:
        super().__init__()
        self.layer: LayerConfig = module.layer
        self.config = config
        self.layers = nn.ModuleDict({str(self.layer.index): module})

    def forward(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """The layer's taps in order, from its inputs by name (``layer_inputs``)."""
        module = self.layers[str(self.layer.index)]
        taps: dict[str, Tensor] = {}

        def keep(tap: str) -> object:
            return lambda _module, _inputs, output: taps.__setitem__(tap, output)

        sources = {"attention": "post_attention_layernorm", "router": "router", "ple": "post_per_layer_input_norm"}
        sources["mlp"] = "post_feedforward_layernorm_1" if self.layer.moe else "post_feedforward_layernorm"
        sources["experts"] = "post_feedforward_layernorm_2"
        wanted = layer_taps(self.layer, self.config)
        hooks = [
            module.get_submodule(source).register_forward_hook(keep(tap))  # type: ignore[arg-type]
            for tap, source in sources.items()
            if tap in wanted
        ]
        try:
            taps["output"], cache = module(
                inputs["hidden_states"],
                inputs.get("per_layer_input"),
                Rope.padded(inputs["rope"], self.layer.head_dim),
                Visibility(inputs.get("write_index", _NOWHERE), inputs.get("start"), inputs["end"]),
                (inputs["past_key"], inputs["past_value"]),
            )
        finally:
            for hook in hooks:
                hook.remove()
        if self.layer.owns_kv:
            taps["key"], taps["value"] = cache
        return [taps[tap] for tap in wanted]


class PerLayerInputsProbe(Decoder):
    """What E2B and E4B compute once per call, before their first layer."""

    def forward(self, inputs_embeds: Tensor, per_layer_inputs: Tensor) -> Tensor:  # type: ignore[override]
        """[B, T, E] and [B, T, L, P] -> [B, T, L, P], what the layers read."""
        return self.merge_per_layer_inputs(inputs_embeds, per_layer_inputs)


class HeadProbe(Decoder):
    """Final norm, head and soft cap."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """[R, E] -> [R, V]."""
        return self.head(hidden_states)


_NOWHERE = torch.zeros(1, dtype=torch.int64)  # a layer that shares KV writes none
