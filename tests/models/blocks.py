"""Unmodified models of the kinds people have, as their authors would write them: none of them knows this library."""

from __future__ import annotations

import functools

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

DIM, HEADS = 32, 4


class ByAttribute(nn.Module):
    """Names ``F.scaled_dot_product_attention``, as timm does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x):
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, HEADS, dim // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0)
        return self.proj(x.transpose(1, 2).reshape(batch, length, dim))


class ByImport(ByAttribute):
    """Imported the function by its own name."""

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(scaled_dot_product_attention(q, k, v))  # 3-D: one head


class ByAlias(ByAttribute):
    """Imported it by another name."""

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(sdpa(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def attend(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def logged(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class ByFunction(ByAttribute):
    """Calls a function of its file, from a method that a decorator wraps."""

    def _split(self, x):
        return (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))

    @logged
    def forward(self, x):
        return self._attend(x)

    def _attend(self, x):
        return self.proj(attend(*self._split(x)).transpose(1, 2).flatten(2))


class Kernel:
    def __call__(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class ByObject(ByFunction):
    """Holds an object that computes the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = Kernel()

    def _attend(self, x):
        return self.proj(self.kernel(*self._split(x)).transpose(1, 2).flatten(2))


class OverridesMethod(ByFunction):
    """Its forward is inherited; the method that calls the function is not."""

    def _attend(self, x):
        q, k, v = self._split(x)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class KeepsFunction(ByFunction):
    """Keeps the function in an attribute, where nothing can reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.function = F.scaled_dot_product_attention

    def _attend(self, x):
        return self.proj(self.function(*self._split(x)).transpose(1, 2).flatten(2))


class HandWrittenAttention(ByAttribute):
    """Computes attention by hand."""

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj((q @ k.mT / DIM**0.5).softmax(-1) @ v)


class Block(nn.Module):
    def __init__(self, attention=ByAttribute) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.attn = attention()
        self.mlp = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.GELU())

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class VisionTransformer(nn.Module):
    """A small ViT in the manner of timm: images (B, 3, 16, 16) to (B, 10)."""

    def __init__(self, depth: int = 3, attention=ByAttribute) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, DIM, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.blocks = nn.Sequential(*(Block(attention) for _ in range(depth)))
        self.head = nn.Linear(DIM, 10)

    def forward(self, images):
        x = self.patch_embed(images).flatten(2).mT
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        return self.head(self.blocks(x)[:, 0])


class CrossBlock(nn.Module):
    """Self- and cross-attention under their usual names, and one that only lengths tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2, self.mixer = Pair(), Pair(), Pair()

    def forward(self, x, context):
        x = x + self.attn1(x, x)
        x = x + self.attn2(x, context)
        return x + self.mixer(x, x) + self.mixer(x, context)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM)

    def forward(self, x, context):
        parts = (self.q(x), *self.kv(context).chunk(2, dim=-1))
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class CrossModel(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CrossBlock() for _ in range(depth))

    def forward(self, x, context):
        for block in self.blocks:
            x = block(x, context)
        return x


class ExtraTail(nn.Module):
    """Calls attention itself, and holds another module that does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ByAttribute()

    def forward(self, x):
        heads = self.inner(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
