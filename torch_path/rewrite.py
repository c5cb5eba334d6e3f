"""Rewriting a captured graph by rules.

A rule is an anchor (the operator that it looks for), a `check` that answers with a match or with the reason why this
place is none, and a `rewrite` that edits the graph. One file per fusion in `rules/`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule, Node

from trimaran.torch_path.graph import source_line
from trimaran.torch_path.report import GraphReport, NearMiss
from trimaran.torch_path.rules.attention import ATTENTION_ANCHORS, check_attention, rewrite_attention
from trimaran.torch_path.rules.layer_norm import LAYER_NORM_ANCHORS, check_layer_norm, rewrite_layer_norm
from trimaran.torch_path.rules.rms_norm import RMS_NORM_ANCHORS, check_rms_norm, rewrite_rms_norm
from trimaran.torch_path.simplify import simplify


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
    Rule("attention", ATTENTION_ANCHORS, check_attention, rewrite_attention),
    Rule("layer_norm", LAYER_NORM_ANCHORS, check_layer_norm, rewrite_layer_norm),
    Rule("rms_norm", RMS_NORM_ANCHORS, check_rms_norm, rewrite_rms_norm),
)


def rewrite(module: GraphModule, rules: Sequence[Rule] = RULES) -> GraphReport:
    """Apply the rules to a pre-dispatch ATen graph, in place, and say what was replaced and what was not."""
    report = GraphReport()
    simplify(module.graph)
    for rule in rules:
        for node in [n for n in module.graph.nodes if n.op == "call_function" and n.target in rule.anchors]:
            match = rule.check(node)
            if match is None:
                continue
            if isinstance(match, str):
                report.near_misses.append(NearMiss(rule.name, node.name, match, source_line(node)))
                continue
            with module.graph.inserting_before(node):
                rule.rewrite(module.graph, node, match)
            report.replaced[rule.name] += 1
    simplify(module.graph)
    module.graph.lint()
    module.recompile()
    return report
