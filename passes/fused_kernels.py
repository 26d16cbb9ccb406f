"""PyTorch's own attention kernels in a lowered program: SDPA calls for which PyTorch has already chosen the kernel."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch.fx import Node

from ..graphs.nodes import value_of
from ..graphs.operators import arguments_of
from ..graphs.spellings import name_of

aten = torch.ops.aten
FUSED = (
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_fused_attention_overrideable,
)
FUSED_TARGETS = frozenset({*FUSED, *(each.default for each in FUSED)})
# is_causal is lower-right in FlashAttention, and upper-left, as in SDPA, in the others.
LOWER_RIGHT = frozenset({FUSED[0], FUSED[0].default})


def fused_arguments(node: Node, unread: Set[Node]) -> dict[str, Any]:
    """query, key, value, bias, dropout_p, is_causal and scale of such a node; and `obstacle`: why it must stay, or None.

    The node returns a tuple: the attention's output, then results for this kernel's backward (log-sum-exp, random state).
    unread: the nodes of the graph whose values nothing reads.
    """
    given = arguments_of(node)
    bias = given.get("attn_mask") if "attn_mask" in given else given.get("attn_bias")
    obstacle = None
    if results := obstacle_of_results(node, unread):
        obstacle = results
    elif isinstance(bias, Node) and value_of(bias).dtype == torch.bool:
        obstacle = "its kernel adds a boolean mask as 1 and 0"
    elif any(isinstance(given.get(name), Node) for name in ("dropout_p", "is_causal", "scale")):
        obstacle = "its dropout_p, is_causal or scale is computed in the graph"
    if obstacle:
        given |= {name: 0.0 for name in ("dropout_p",) if isinstance(given.get(name), Node)}
        given |= {name: None for name in ("is_causal", "scale") if isinstance(given.get(name), Node)}
    return {**given, "bias": bias, "obstacle": obstacle}


def obstacle_of_results(node: Node, unread: Set[Node]) -> str | None:
    """Why a node that returns a tuple must stay, if anything reads more than its first member."""
    others = [user.name for user in node.users if not _is_output(user) and not (_is_member(user) and user in unread)]
    return f"its kernel's other results are used ({others[0]})" if others else None


def _is_member(user: Node) -> bool:
    return name_of(user) == "getitem" and len(user.args) == 2


def _is_output(user: Node) -> bool:
    return _is_member(user) and user.args[1:] == (0,)
