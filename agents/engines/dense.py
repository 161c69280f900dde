"""The forward of Llama-like decoders (Llama, Mistral, Qwen2, Qwen3), written out for one flat row of tokens.

Small models spend most of a decoding step between the matrix products: module calls, norms cast back and
forth, rotary embeddings in many small pieces. Here the same numbers come from about a third of the
operations, on the model's own parameters where they can be used as they stand. `HFEngine` uses it for small
models of these classes, and only after it has reproduced the model's own log-probs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.engines.plan import Plan
from agents.engines.slots import Slots
from agents.lora import weight_of

_CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_ROPES = ("default", "linear", "llama3", "yarn")  # a function of the position alone
_LARGEST = 50_000_000  # parameters; beyond, the products dominate and a second copy of weights is not worth it


@dataclass(frozen=True)
class Layer:
    """One layer's weights as they are used."""

    qkv: Tensor
    """Query, key and value projections under each other, scaled by the norm before them; [(H + 2 Hkv) D,
    hidden].

    Within each query and key head the rotated pairs stand side by side, so that rotation is a complex
    product.
    """
    qkv_bias: Tensor | None
    head_norm: Tensor | None
    """Weights of the norms of query and key heads, the attention's scale included; [H + Hkv, D]."""
    out: Tensor
    """Output projection, transposed."""
    gate: Tensor
    up: Tensor
    down: Tensor
    """Feed-forward weights: gate and up scaled by the norm before them, down transposed."""


class DenseForward:
    """Logits of a plan's wanted tokens, with keys and values stored in slots on the way.

    Call `refresh` after the model's weights changed.
    """

    def __init__(self, model: Any, max_context: int) -> None:
        config = model.config
        self.model = model
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps, self.width = config.rms_norm_eps, config.hidden_size
        weight = model.get_input_embeddings().weight
        positions = torch.arange(max_context, device=weight.device)[None]
        cos, sin = model.model.rotary_emb(weight[:1], positions)
        half = self.head_dim // 2
        self.turn_T1F = torch.complex(cos[0, :, :half], sin[0, :, :half])[:, None]
        self.refresh()

    @staticmethod
    def suits(model: Any) -> bool:
        """Whether the model is of a class, size and make that this forward reproduces."""
        config = model.config
        if type(model).__name__ not in _CLASSES or model.num_parameters() > _LARGEST:
            return False
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
        plain = all(type(m) is nn.Linear for m in linears)
        sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
        # In float64 the models' own norms work in float32; the same numbers need the models' own code.
        single = model.dtype == torch.float32
        return plain and single and rope in _ROPES and config.hidden_act == "silu" and not sliding

    def refresh(self) -> None:
        """Take over the model's present weights."""
        inner = self.model.model
        self.embed = inner.embed_tokens.weight.detach()
        self.head = self.model.lm_head.weight.detach() * (inner.norm.weight.detach() * self.width**0.5)
        self.layers = [self._layer(layer) for layer in inner.layers]

    def _layer(self, layer: Any) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        before, after = (norm.weight.detach() * self.width**0.5 for norm in norms)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        order = self._paired(projections[0].weight.device)
        rotated = (self.heads + self.kv_heads) * self.head_dim
        qkv = torch.cat([_weight(p) for p in projections]) * before
        qkv[:rotated] = qkv[:rotated].view(-1, self.head_dim, qkv.shape[1])[:, order].reshape(rotated, -1)
        bias = None
        if projections[0].bias is not None:
            bias = torch.cat([p.bias.detach() for p in projections])
            bias[:rotated] = bias[:rotated].view(-1, self.head_dim)[:, order].flatten()
        norm = None
        scale = self.head_dim**-0.5
        if getattr(attention, "q_norm", None) is not None:
            q = (attention.q_norm.weight.detach() * scale)[order].expand(self.heads, -1)
            k = attention.k_norm.weight.detach()[order].expand(self.kv_heads, -1)
            norm = torch.cat([q, k]) * self.head_dim**0.5
        else:
            qkv[: self.heads * self.head_dim] *= scale
            if bias is not None:
                bias[: self.heads * self.head_dim] *= scale
        return Layer(
            qkv=qkv, qkv_bias=bias, head_norm=norm, out=_weight(attention.o_proj).t(),
            gate=_weight(mlp.gate_proj) * after, up=_weight(mlp.up_proj) * after, down=_weight(mlp.down_proj).t(),
        )  # fmt: skip

    def _paired(self, device: torch.device) -> Tensor:
        """Order of a head's entries that puts i and i + D/2, which are rotated together, side by side."""
        half = torch.arange(self.head_dim // 2, device=device)
        return torch.stack([half, half + self.head_dim // 2], 1).flatten()

    def __call__(self, plan: Plan, slots: Slots) -> Tensor:
        """Logits [R, V] of `plan.keep_R`."""
        turn_N1F = self.turn_T1F.index_select(0, plan.pos_N)
        x = F.embedding(plan.ids_N, self.embed)
        for index, layer in enumerate(self.layers):
            x = self._block(x, turn_N1F, layer, index, slots)
        return F.linear(_normed(x.index_select(0, plan.keep_R), self.eps), self.head)

    def _block(self, x: Tensor, turn_N1F: Tensor, layer: Layer, index: int, slots: Slots) -> Tensor:
        n, rotated = x.shape[0], self.heads + self.kv_heads
        qkv = F.linear(_normed(x, self.eps), layer.qkv, layer.qkv_bias).view(n, -1, self.head_dim)
        qk = qkv[:, :rotated]
        if layer.head_norm is not None:
            qk = _normed(qk, self.eps) * layer.head_norm
        qk = torch.view_as_real(torch.view_as_complex(qk.unflatten(-1, (-1, 2))) * turn_N1F).flatten(-2)
        slots.write(qk[:, self.heads :], qkv[:, rotated:], index)
        seen = slots.attend(qk[:, : self.heads], index, 1.0)
        x = torch.addmm(x, seen.reshape(n, -1), layer.out)
        h = _normed(x, self.eps)
        return torch.addmm(x, F.silu(F.linear(h, layer.gate), inplace=True).mul_(F.linear(h, layer.up)), layer.down)


def _weight(layer: Any) -> Tensor:
    """A projection's weight as it acts: with its adapter's product, where it has one."""
    return weight_of(layer).detach()


def _normed(x: Tensor, eps: float) -> Tensor:
    """x over its length in the last dimension: RMSNorm less its weights and a factor sqrt(n), which are part
    of the weights that follow.
    """
    return x * torch.linalg.vecdot(x, x).add_(x.shape[-1] * eps).rsqrt_()[..., None]
