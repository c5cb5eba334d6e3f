"""TensorRT itself, on the model's ONNX file, built for the range of shapes that is going to come."""

from __future__ import annotations

from typing import Any

import torch

from trimaran.benchmarks.engines.contract import Built, Engine, Inputs, Subject, missing
from trimaran.benchmarks.engines.graphs import Graphed
from trimaran.benchmarks.engines.onnx_files import file_of

LARGEST = (64, 1024)  # batch and length that the engine is built for; the best is (8, 128)


class Execution:
    """One execution context, called on torch's current stream."""

    def __init__(self, engine: Any) -> None:
        import tensorrt as trt

        self.context = engine.create_execution_context()
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.output = next(name for name in names if name not in self.inputs)
        self.dtype = getattr(torch, trt.nptype(engine.get_tensor_dtype(self.output)).__name__)

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        ones = {"attention_mask": torch.ones_like(next(iter(inputs.values())))}
        fed = {name: {**ones, **inputs}[name].contiguous() for name in self.inputs}
        for name, tensor in fed.items():
            self.context.set_input_shape(name, tuple(tensor.shape))
            self.context.set_tensor_address(name, tensor.data_ptr())
        shape = tuple(self.context.get_tensor_shape(self.output))
        result = torch.empty(shape, dtype=self.dtype, device=next(iter(fed.values())).device)
        self.context.set_tensor_address(self.output, result.data_ptr())
        self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        return result


def build(subject: Subject, example: Inputs) -> Built:
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(subject.file or file_of("dynamo-20", subject, example))):
        raise ValueError(f"TensorRT's parser: {parser.get_error(0).desc()}")
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for name, tensor in example.items():
        rest = tuple(tensor.shape[2:]) if tensor.dim() == 2 else tuple(tensor.shape[1:])
        ends = ((1, 1), (8, 128), LARGEST) if tensor.dim() == 2 else ((1,), (8,), LARGEST[:1])
        profile.set_shape(name, *(end + rest for end in ends))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    return Built(Graphed(Execution(engine)))


def why_not(subject: Subject) -> str | None:
    return missing("tensorrt") or (None if subject.cuda else "needs a CUDA device")


ENGINES = (Engine("TensorRT CUDA graph", "TensorRT", build, why_not, slow=True),)
