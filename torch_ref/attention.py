"""Makes unmodified transformers models attend within rows, with a mask of one integer per key.

A row holds several responses, which may share a prompt. Key `k` is visible to query `q` iff `k <= q < key_end[k]`, and
in a layer with a sliding window only if `positions[q] - positions[k] < window`. A window is measured in positions,
because tokens of one sequence may lie farther apart in a row than in the sequence.

No model code is patched. transformers looks up its attention function by name in a registry, and passes it the keyword
arguments of the model's forward call together with the layer's own settings (scale, window, soft cap):

    register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation=ROW_ATTENTION["sdpa"])
    model.model(input_ids=tokens, position_ids=positions, rows=RowMask(key_end, positions))
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

ROW_ATTENTION = {"sdpa": "rows_sdpa", "flex": "rows_flex", "dense": "rows_dense"}
"""Name of an implementation in the config -> name under which it is registered."""

_SHAPES = 64  # that FlexAttention may be compiled for in a process


@dataclass
class RowMask:
    """The mask of a batch of rows. Each form of it is built when a layer first needs it, and kept for the other layers.

    Attributes:
        key_end: key `k` is visible to query `q` iff `k <= q < key_end[k]`; 0 for padding.
        positions: position of each token in its own sequence.
    """

    key_end: Int[Tensor, "B L"]
    positions: Int[Tensor, "B L"]
    _built: dict[Any, Any] = field(default_factory=dict, repr=False)

    def visible(self, window: int | None) -> Bool[Tensor, "B 1 L L"]:
        """Returns the whole mask, query by key."""
        key = ("visible", self._narrow(window))
        if key not in self._built:
            index = torch.arange(self.key_end.shape[1], device=self.key_end.device)
            query, to_key = index[:, None], index[None, :]
            mask = (to_key <= query) & (query < self.key_end[:, None, :])
            if key[1] is not None:
                mask &= self.positions[:, :, None] - self.positions[:, None, :] < key[1]
            self._built[key] = mask[:, None]
        return self._built[key]

    def sdpa_mask(self, window: int | None) -> Bool[Tensor, "B 1 L L"]:
        """Returns `visible`, with each query that sees no key seeing itself: a softmax over no key would be NaN."""
        key = ("sdpa", self._narrow(window))
        if key not in self._built:
            blind = ~self.seeing[:, None, :, None]
            itself = torch.eye(self.key_end.shape[1], dtype=torch.bool, device=self.key_end.device)
            self._built[key] = self.visible(window) | (blind & itself)
        return self._built[key]

    def block_mask(self, window: int | None) -> Any:
        """Returns FlexAttention's form of the mask: empty, full and mixed blocks, and the rule inside mixed ones."""
        from torch.nn.attention.flex_attention import create_block_mask

        key = ("block", self._narrow(window))
        if key not in self._built:
            key_end, positions, narrow = self.key_end, self.positions, key[1]

            def rule(b: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
                seen = (k <= q) & (q < key_end[b, k])
                if narrow is not None:
                    seen &= positions[b, q] - positions[b, k] < narrow
                return seen

            rows, length = key_end.shape
            # Compiled code never holds the whole mask. A CPU has no kernel for the blocks anyway.
            compiled = key_end.device.type == "cuda"
            self._built[key] = create_block_mask(
                rule, rows, None, length, length, device=str(key_end.device), _compile=compiled
            )
        return self._built[key]

    @property
    def seeing(self) -> Bool[Tensor, "B L"]:
        """True for queries that see a key: every token sees itself, and padding sees nothing."""
        return self.key_end > 0

    def _narrow(self, window: int | None) -> int | None:
        """Returns the window, or None if it is at least as long as the row and so hides nothing."""
        return None if window is None or window >= self.key_end.shape[1] else window


def sdpa_attention(
    query: Float[Tensor, "B H L Dh"], key: Tensor, value: Tensor, mask: Bool[Tensor, "B 1 L L"], scale: float
) -> Float[Tensor, "B H L Dh"]:
    """Computes attention with PyTorch's own kernel under a boolean mask. The kernel has no soft cap."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def dense_attention(
    query: Float[Tensor, "B H L Dh"],
    key: Tensor,
    value: Tensor,
    visible: Bool[Tensor, "B 1 L L"],
    scale: float,
    softcap: float | None = None,
) -> Float[Tensor, "B H L Dh"]:
    """Computes attention by its formula: scale, soft cap, mask, softmax in float32. It holds all scores in memory."""
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float().masked_fill(~visible, torch.finfo(torch.float32).min)
    # The second mask is for queries that see no key: their softmax is over equal numbers, and must become zero.
    weights = torch.softmax(scores, dim=-1).masked_fill(~visible, 0.0)
    return weights.to(value.dtype) @ value


def flex_attention(
    query: Float[Tensor, "B H L Dh"],
    key: Float[Tensor, "B K L Dh"],
    value: Float[Tensor, "B K L Dh"],
    block_mask: Any,
    scale: float,
    softcap: float | None,
) -> Float[Tensor, "B H L Dh"]:
    """Computes attention with FlexAttention, which skips masked blocks in both passes. CUDA only (no CPU backward).

    Query heads may share keys and values; the kernel reads these once for each of them and stores no copies.
    """
    return _compiled_flex(query.device.type)(
        query, key, value, score_mod=_soft_cap(softcap), block_mask=block_mask, scale=scale, enable_gqa=True
    )


@lru_cache
def _compiled_flex(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention as flex

    if device != "cuda":
        return flex
    import torch._dynamo

    # With `fullgraph`, what cannot be compiled raises. Uncompiled it would run too, and hold all scores in memory. That
    # also counts for one shape more than the limit, which is 8: rows of training and evaluation, with and without
    # gradients, times the layers' windows.
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, limit, max(getattr(config, limit), _SHAPES))
    return torch.compile(flex, dynamic=False, fullgraph=True)


@lru_cache  # one function per cap, so that FlexAttention is compiled once for it
def _soft_cap(softcap: float | None) -> Any:
    if softcap is None:
        return None

    def capped(score: Tensor, _b: Tensor, _h: Tensor, _q: Tensor, _k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def _attend(implementation: str) -> Any:
    """Returns the function that transformers calls in every layer."""

    def attend(
        module: nn.Module,
        query: Float[Tensor, "B H L Dh"],
        key: Float[Tensor, "B K L Dh"],
        value: Float[Tensor, "B K L Dh"],
        attention_mask: None,
        *,
        rows: RowMask,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[Float[Tensor, "B L H Dh"], None]:
        if attention_mask is not None or dropout:
            raise ValueError("rows have their own mask, and the prefix they share allows no dropout")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if implementation != "flex":
            groups = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        if implementation == "flex":
            out = flex_attention(query, key, value, rows.block_mask(sliding_window), scale, softcap)
        elif implementation == "dense" or softcap is not None:
            out = dense_attention(query, key, value, rows.visible(sliding_window), scale, softcap)
        else:
            out = sdpa_attention(query, key, value, rows.sdpa_mask(sliding_window), scale)
        return out.masked_fill(~rows.seeing[:, None, :, None], 0.0).transpose(1, 2).contiguous(), None

    return attend


def _no_mask(**_: Any) -> None:
    """Returns None instead of a mask of transformers: rows have their own."""


def register() -> None:
    """Registers the implementations with transformers, under the names in `ROW_ATTENTION`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for implementation, name in ROW_ATTENTION.items():
        AttentionInterface.register(name, _attend(implementation))
        AttentionMaskInterface.register(name, _no_mask)
