"""Rewriting a captured graph by rules.

A rule is an anchor (the operator that it looks for), a `check` that answers with a match or with the reason why this
place is none, and a `rewrite` that edits the graph. One file per fusion in `rules/`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule, Node

from trimaran.torch_path.graph import simplify, source_line
from trimaran.torch_path.report import GraphReport, NearMiss
from trimaran.torch_path.rules.attention import ATTENTION_ANCHORS, check_attention, rewrite_attention
from trimaran.torch_path.rules.layer_norm import LAYER_NORM_ANCHORS, check_layer_norm, rewrite_layer_norm


@dataclass(frozen=True)
class Rule:
    """check(node) -> a match of the rule's own kind, or a str: the reason why not. rewrite(graph, node, match)."""

    name: str
    anchors: tuple[Any, ...]
    check: Callable[[Node], Any]
    rewrite: Callable[[Graph, Node, Any], None]


RULES: tuple[Rule, ...] = (
    Rule("attention", ATTENTION_ANCHORS, check_attention, rewrite_attention),
    Rule("layer_norm", LAYER_NORM_ANCHORS, check_layer_norm, rewrite_layer_norm),
)


def rewrite(module: GraphModule, rules: Sequence[Rule] = RULES) -> GraphReport:
    """Apply the rules to a pre-dispatch ATen graph, in place, and say what was replaced and what was not."""
    report = GraphReport()
    simplify(module.graph)
    for rule in rules:
        for node in [n for n in module.graph.nodes if n.op == "call_function" and n.target in rule.anchors]:
            match = rule.check(node)
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
