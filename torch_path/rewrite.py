"""Rewriting a captured graph by rules.

A rule is an anchor (the operator that it looks for), a `check` that answers with a match or with the reason why this
place is none, and a `rewrite` that edits the graph. One file per fusion in `rules/`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule, Node

from trimaran.torch_path.graph import aten, settled, source_line
from trimaran.torch_path.ops import TORCH_OPS
from trimaran.torch_path.report import GraphReport, NearMiss
from trimaran.torch_path.rules import linear
from trimaran.torch_path.rules.activations import ACTIVATION_ANCHORS
from trimaran.torch_path.rules.attention import ATTENTION_ANCHORS, check_attention, rewrite_attention
from trimaran.torch_path.rules.layer_norm import LAYER_NORM_ANCHORS, check_layer_norm, rewrite_layer_norm
from trimaran.torch_path.rules.rms_norm import RMS_NORM_ANCHORS, check_rms_norm, rewrite_rms_norm
from trimaran.torch_path.rules.rotary_embedding import ROTARY_ANCHORS, check_rotary, rewrite_rotary
from trimaran.torch_path.simplify import simplify
from trimaran.torch_path.strides import pin_strides


@dataclass(frozen=True)
class Rule:
    """check(node) gives a match of the rule's own kind; or a str, the reason why this place is none though it looks
    like one; or None, where there is nothing to say. rewrite(graph, node, match) replaces it; what it calls goes before
    `node` unless it says otherwise."""

    name: str
    anchors: tuple[Any, ...]
    check: Callable[[Node], Any]
    rewrite: Callable[[Graph, Node, Any], None]


RULES: tuple[Rule, ...] = (
    Rule("rotary_embedding", ROTARY_ANCHORS, check_rotary, rewrite_rotary),
    Rule("attention", ATTENTION_ANCHORS, check_attention, rewrite_attention),
    Rule("layer_norm", LAYER_NORM_ANCHORS, check_layer_norm, rewrite_layer_norm),
    Rule("rms_norm", RMS_NORM_ANCHORS, check_rms_norm, rewrite_rms_norm),
    Rule("linear", linear.LINEAR_ANCHORS, linear.check_linear, linear.rewrite_linear),
    Rule("gated_linear", linear.GATED_ANCHORS, linear.check_gated, linear.rewrite_gated),
    Rule("activation", ACTIVATION_ANCHORS, linear.check_activation, linear.rewrite_activation),
    Rule("shared_input", linear.SHARED_ANCHORS, linear.check_shared, linear.rewrite_shared),
    Rule("linear_norm", linear.NORM_ANCHORS, linear.check_linear_norm, linear.rewrite_linear_norm),
    Rule("residual", linear.RESIDUAL_ANCHORS, linear.check_residual, linear.rewrite_residual),
)


# What is replaced where it stands; everything else is read together with what follows it.
_IN_PLACE = (aten.scaled_dot_product_attention.default, aten.layer_norm.default, aten.rms_norm.default,
             aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default)  # fmt: skip


def rewrite(module: GraphModule, rules: Sequence[Rule] = RULES) -> GraphReport:
    """Apply the rules to a pre-dispatch ATen graph, in place, and say what was replaced and what was not."""
    report = GraphReport()
    pinned = pin_strides(module.graph)
    if pinned is not None:
        reason = "as_strided reads memory between its input's elements, so nothing around it is moved"
        report.near_misses.append(NearMiss("any", pinned.name, reason, source_line(pinned)))
        return report
    simplify(module.graph)
    for rule in rules:
        report.near_misses += apply(rule, module.graph)
        simplify(module.graph)
    names = {bound.overload: name for name, bound in TORCH_OPS.items()}
    report.replaced.update(names[node.target] for node in module.graph.nodes if node.target in names)
    module.graph.lint()
    module.recompile()
    return report


def apply(rule: Rule, graph: Graph) -> list[NearMiss]:
    """Rewrite every match of one rule; what looked like one and is none comes back."""
    misses = []
    for node in [n for n in graph.nodes if n.op == "call_function" and n.target in rule.anchors]:
        if node._erased:  # went with an earlier match
            continue
        match = rule.check(node)
        if match is not None and node.target not in _IN_PLACE and not settled(node):
            match = "what it reads, or its result, is written into later"
        if isinstance(match, str):
            misses.append(NearMiss(rule.name, node.name, match, source_line(node)))
        elif match is not None:
            with graph.inserting_before(node):
                rule.rewrite(graph, node, match)
    return misses
