"""Forward pass for packed training batches through transformers' own Gemma 4 modules.

transformers' outer forward handles one conversation per row; here a row holds several. So the towers, decoder layers
and head are called one by one, with masks built from segments; a test holds the result to transformers' own forward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.pictures import GROUND, INK


def dense_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What ``Gemma4TextExperts.forward`` computes, as matrix products over all experts: no loop, no synchronisation.

    With 8 of 14 experts chosen this nearly doubles the arithmetic and is still far quicker on a GPU.
    hidden_states [T, E], top_k_index and top_k_weights [T, K].
    """
    experts, double, width = self.gate_up_proj.shape
    weights = torch.zeros(len(hidden_states), experts, dtype=top_k_weights.dtype, device=hidden_states.device)
    weights = weights.scatter(1, top_k_index, top_k_weights)
    gate, up = F.linear(hidden_states, self.gate_up_proj.reshape(-1, width)).view(-1, experts, double).chunk(2, dim=-1)
    inner = self.act_fn(gate) * up * weights[..., None].to(gate.dtype)  # [T, X, F]
    return inner.flatten(1) @ self.down_proj.permute(0, 2, 1).reshape(-1, width).to(inner.dtype)


def paint(levels: Tensor, colors: Tensor) -> Tensor:
    """Grey patches [N, P, 256] uint8, colours [N, 2, 3] -> RGB patches [N, P, 768] in [0, 1] (``pictures.colors``)."""
    share = (levels.float() - GROUND) / (INK - GROUND)
    ground, ink = colors[:, None, None, 0], colors[:, None, None, 1]
    return (ground + share[..., None] * (ink - ground)).round().clamp(0, 255).flatten(2) / 255


def image_soft_tokens(model: Any, pixels: Tensor, places: Tensor) -> Tensor:
    """[N, 9b, 768] patches in [0, 1] and [N, 9b, 2] positions -> [N * b, E]; rows past a picture's end are junk."""
    tower = model.model.vision_tower
    places = places.long()
    padding = (places == -1).all(-1)
    hidden = tower.patch_embedder(pixels, places, padding)
    rope = tower.encoder.rotary_emb(hidden, places)
    mask = (~padding)[:, None, None, :].expand(-1, 1, padding.shape[1], -1)
    for layer in tower.encoder.layers:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rope, position_ids=places)
    hidden, _ = tower.pooler(
        hidden_states=hidden, pixel_position_ids=places, padding_positions=padding, output_length=pixels.shape[1] // 9
    )
    if tower.config.standardize:
        hidden = (hidden - tower.std_bias.float()) * tower.std_scale.float()
    return model.model.embed_vision(hidden).flatten(0, 1)


def sound_soft_tokens(model: Any, mel: Tensor, frames: Tensor) -> Tensor:
    """[N, 300, 128] log-mel and [N] valid frames -> [N * 75, E]; rows past a sound's end are junk."""
    mask = torch.arange(mel.shape[1], device=mel.device) < frames[:, None]
    hidden = model.model.audio_tower(mel.float() * mask[..., None], mask).last_hidden_state
    return model.model.embed_audio(hidden).flatten(0, 1)


def masks(batch: dict[str, Tensor], window: int, *, blocks: bool) -> dict[str, Tensor]:
    """Bool [B, 1, T, T] per layer type, True where a query may look; padding looks at itself."""
    segment, block = batch["segment"], batch["block"]
    at = torch.arange(segment.shape[1], device=segment.device)
    same = segment[:, :, None] == segment[:, None, :]
    causal = at[None, :, None] >= at[None, None, :]
    near = at[None, :, None] - at[None, None, :] < window
    sliding = causal
    if blocks:
        sliding = causal | ((block[:, :, None] == block[:, None, :]) & (block[:, :, None] >= 0))
    return {"full_attention": (same & causal)[:, None], "sliding_attention": (same & sliding & near)[:, None]}


def logits(model: Any, batch: dict[str, Tensor], soft: Tensor | None) -> Tensor:
    """[B, T, V] for a packed batch; ``soft`` are the concatenated soft tokens that ``source`` points into."""
    text = model.model.language_model
    config = text.config
    source = batch["source"].long()
    is_soft = source >= 0
    ids = batch["ids"].long().masked_fill(is_soft, config.pad_token_id)
    embeds = text.embed_tokens(ids)
    if soft is not None:
        # row 0 stands for "no soft token"; as padding_idx it costs nothing in the backward pass
        table = torch.cat([soft.new_zeros(1, soft.shape[1]), soft]).to(embeds.dtype)
        embeds = torch.where(is_soft[..., None], F.embedding(source + 1, table, padding_idx=0), embeds)
    per_layer = None
    if config.hidden_size_per_layer_input:
        per_layer = text.project_per_layer_inputs(embeds, text.get_per_layer_inputs(ids, None))
    position = batch["position"].long()
    rope = {kind: text.rotary_emb(embeds, position, kind) for kind in set(config.layer_types)}
    visible = masks(batch, config.sliding_window, blocks=config.use_bidirectional_attention == "vision")
    hidden, shared = embeds, {}
    for index, layer in enumerate(text.layers):
        kind = config.layer_types[index]
        hidden = layer(
            hidden,
            None if per_layer is None else per_layer[:, :, index],
            shared_kv_states=shared,
            position_embeddings=rope[kind],
            attention_mask=visible[kind],
            position_ids=position,
        )
    out = model.lm_head(text.norm(hidden)).float()
    return config.final_logit_softcapping * torch.tanh(out / config.final_logit_softcapping)


def forward(model: Any, batch: dict[str, Tensor], budgets: list[int]) -> Tensor:
    """Logits [B, T, V] of a batch, its pictures and its sounds."""
    soft = []
    for budget in budgets:
        pixels = paint(batch[f"levels_{budget}"], batch[f"colors_{budget}"])
        soft.append(image_soft_tokens(model, pixels, batch[f"places_{budget}"]))
    if "mel" in batch:
        soft.append(sound_soft_tokens(model, batch["mel"], batch["frames"]))
    return logits(model, batch, torch.cat(soft) if soft else None)


def loss(out: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the tokens of replies."""
    return F.cross_entropy(out.flatten(0, 1), labels.long().flatten(), ignore_index=-100)


@torch.no_grad()
def whole_replies(out: Tensor, batch: dict[str, Tensor], tasks: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Per task, how many replies greedy decoding would give token for token, and how many there are."""
    wrong = ((out.argmax(-1) != batch["labels"]) & (batch["labels"] != -100)).cpu()
    segment, task = batch["segment"].cpu(), batch["task"].cpu()
    longest = int(segment.max()) + 1
    index = (torch.arange(len(segment))[:, None] * longest + segment).flatten()
    misses = torch.zeros(len(segment) * longest, dtype=torch.int64).index_add_(0, index, wrong.flatten().long())
    kind = torch.full_like(misses, -1).index_copy_(0, index, task.flatten().long())
    kind[torch.arange(len(segment)) * longest] = -1  # segment 0 is padding
    return {
        name: (int(((kind == i) & (misses == 0)).sum()), int((kind == i).sum()))
        for i, name in enumerate(tasks)
        if (kind == i).any()
    }
