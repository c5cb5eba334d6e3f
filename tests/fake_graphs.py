"""A stand-in for CUDA graphs on the CPU: what is recorded is run again, and writes where it wrote before."""

import torch

from trimaran.torch_path import graphs


class FakeRecorder:
    """recorded, replayed: counts over all recorders. fail: raised by the next capture."""

    recorded = replayed = 0
    fail = None
    bytes_each = 100

    def __init__(self):
        self.bytes = 0

    def ready(self):
        return True

    def prepare(self, run, inputs):
        pass

    def begin(self):
        pass

    def end(self):
        pass

    def record(self, run, inputs):
        if FakeRecorder.fail is not None:
            raise FakeRecorder.fail
        outputs = run(*inputs)
        FakeRecorder.recorded += 1
        self.bytes += self.bytes_each

        def replay():
            FakeRecorder.replayed += 1
            with torch.inference_mode(False), torch.no_grad(), torch._C._DisableAutocast():
                for out, new in zip(outputs, run(*inputs), strict=True):
                    if isinstance(out, torch.Tensor) and out.data_ptr() != new.data_ptr():
                        out.copy_(new)

        return replay, outputs


def use(monkeypatch):
    """Let CPU tensors be replayed; the counts start anew."""
    FakeRecorder.recorded = FakeRecorder.replayed = 0
    FakeRecorder.fail = None
    monkeypatch.setattr(graphs, "recorder_of", lambda device: FakeRecorder)
    return FakeRecorder
