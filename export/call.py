"""An example call of a model as a flat list of named tensors, and the model as a module that takes such a list.

Names are optimum's: `past_key_values.0.key` and `present.0.key` ([B, Hkv, S, D]) for key caches, with
`.decoder` and `.encoder` before `.key` where a model has both; other containers are named by their keys and places.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

CACHE = "past_key_values"
NAMES = {"encoder_outputs.last_hidden_state": "encoder_hidden_states"}
ROLES = ("decoder", "encoder")


class Call:
    """A call by keywords. tensors: its tensors by their names in a file. The rest of it is constant."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = dict(arguments)
        self.tensors = dict(_tensors(self.arguments, "input"))
        self.has_cache = any(name.startswith(f"{CACHE}.") for name in self.tensors)

    def rebuild(self, values: Sequence[torch.Tensor]) -> dict[str, Any]:
        """The arguments, with other tensors in the places of its own. Caches are new, and keep all they are given."""
        left = iter(values)
        return {name: _rebuilt(value, left) for name, value in self.arguments.items()}

    def with_tensors(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Call:
        return Call(self.rebuild([change(name, tensor) for name, tensor in self.tensors.items()]))


class Flat(torch.nn.Module):
    """The model as a module from a call's tensors to the tensors of its output."""

    def __init__(self, model: torch.nn.Module, call: Call) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(named_outputs(self.model(**self.call.rebuild(values))).values())


def checked_call(model: Any, inputs: Any) -> Call:
    """The example call of `export_onnx`. TypeError or ValueError where model or inputs are none."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    if model.training:
        raise ValueError("model is in training mode, call model.eval() first")
    if isinstance(inputs, Mapping):
        arguments = {str(name): value for name, value in inputs.items()}
    else:
        positional = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
        arguments = dict(inspect.signature(model.forward).bind(*positional).arguments)
    if arguments.get("use_cache") and arguments.get(CACHE) is None:
        arguments[CACHE] = _empty_cache(model)
    call = Call(arguments)
    if not call.tensors:
        raise TypeError(f"inputs is a {type(inputs).__name__} without a tensor, expected a mapping or tuple of tensors")
    return call


def named_outputs(output: Any) -> dict[str, torch.Tensor]:
    """The tensors of a model's output by the names of its class, `output_<i>` where it has none."""
    if not isinstance(output, Mapping):
        leaves = pytree.tree_leaves(output)
        return {f"output_{i}": leaf for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    return {
        f"present{name.removeprefix(CACHE)}" if name.startswith(f"{CACHE}.") else name: tensor
        for name, tensor in _tensors(output, "output")
    }


def _tensors(mapping: Mapping[str, Any], what: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in mapping.items():
        if _is_cache(value):
            pairs = _cache_tensors(value, f"{what} {name}")
            yield from ((f"{name}.{place}", tensor) for place, tensor in pairs)
            continue
        leaves, _ = pytree.tree_flatten_with_path(value)
        for path, leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                keys = [_key(name, depth, key) for depth, key in enumerate(path)]
                full = ".".join([name, *keys])
                yield NAMES.get(full, full), leaf


def _key(name: str, depth: int, key: Any) -> str:
    if name == CACHE and depth == 1 and isinstance(key, pytree.SequenceKey) and key.idx < 2:
        return ("key", "value")[key.idx]
    return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length") and (hasattr(value, "layers") or hasattr(value, "self_attention_cache"))


def _caches(cache: Any) -> list[Any]:
    """The decoder's own keys, and those of the encoder where there are such."""
    if hasattr(cache, "self_attention_cache"):
        return [cache.self_attention_cache, cache.cross_attention_cache]
    return [cache]


def _cache_tensors(cache: Any, what: str) -> Iterator[tuple[str, torch.Tensor]]:
    caches = _caches(cache)
    for role, part in zip(ROLES, caches, strict=False):
        if "Static" in type(part).__name__ or any("Static" in type(layer).__name__ for layer in part.layers):
            raise TypeError(f"{what} is a {type(part).__name__}, expected a cache that grows (DynamicCache)")
        for index, layer in enumerate(part.layers):
            if _is_filled(layer):
                _check_whole(layer, what)
                place = f"{index}.{role}" if len(caches) == 2 else str(index)
                yield f"{place}.key", layer.keys
                yield f"{place}.value", layer.values


def _rebuilt(value: Any, left: Iterator[torch.Tensor]) -> Any:
    if _is_cache(value):
        counts = [sum(map(_is_filled, part.layers)) for part in _caches(value)]
        parts = [_grown([(next(left), next(left)) for _ in range(count)]) for count in counts]
        return parts[0] if len(parts) == 1 else type(value)(*parts)
    return pytree.tree_map(lambda leaf: next(left) if isinstance(leaf, torch.Tensor) else leaf, value)


def _is_filled(layer: Any) -> bool:
    return getattr(layer, "keys", None) is not None and layer.keys.dim() == 4


def _check_whole(layer: Any, what: str) -> None:
    if what.startswith("input") and layer.get_seq_length() != layer.keys.shape[2]:
        raise ValueError(
            f"{what} has dropped keys that its sliding window no longer sees ({layer.keys.shape[2]} of "
            f"{layer.get_seq_length()} are left), expected a cache that keeps all: transformers.DynamicCache()"
        )


def _grown(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """A cache that keeps every key, also those that a sliding window no longer sees: masks hide these."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for keys, values in pairs:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def _empty_cache(model: torch.nn.Module) -> Any:
    """What a model of transformers fills when it is asked for its keys and given none."""
    if not hasattr(model, "config"):
        return None
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    both = getattr(model.config, "is_encoder_decoder", False)
    return EncoderDecoderCache(DynamicCache(), DynamicCache()) if both else DynamicCache()
