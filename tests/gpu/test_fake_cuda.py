"""The GPU that is not there notices what a real one would: see `fake_cuda`."""

import pytest
import torch
from fake_cuda import FakeCuda
from torch.utils.checkpoint import checkpoint


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stands for a GPU where there is none")


@pytest.fixture
def gpu():
    with FakeCuda() as gpu:
        yield gpu


def on_gpu(*shape):
    return torch.zeros(*shape, device="cuda")


def kinds(gpu):
    return [event.kind for event in gpu.events]


def test_tensors_of_two_devices_do_not_mix_but_for_numbers(gpu):
    assert (on_gpu(3) + torch.tensor(1.0)).device == torch.device("cuda:0")
    with pytest.raises(Exception, match="device"):
        on_gpu(3) + torch.randn(3)
    assert kinds(gpu) == ["mismatch"]


READS = {
    "float": lambda value: float(value.sum()),
    "bool": lambda value: bool(value.sum() > 0),
    "item": lambda value: value[0].item(),
    "tolist": lambda value: value.tolist(),
    "cpu": lambda value: value.cpu(),
    "copy": lambda value: torch.empty(3).copy_(value),
    "synchronize": lambda value: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_what_the_host_reads_is_waited_for(gpu, read):
    read(on_gpu(3))
    (event,) = gpu.events
    assert event.kind == "wait"
    assert event.place.startswith("tests/gpu/test_fake_cuda.py:")


def test_how_many_there_are_is_waited_for_too(gpu):
    value = on_gpu(3)
    with pytest.raises(Exception, match="nonzero"):
        value[value > 0]
    assert kinds(gpu) == ["wait"]


def test_a_copy_to_the_gpu_waits_unless_it_comes_from_pinned_memory_and_may_be_late(gpu):
    pinned = torch.randn(3).pin_memory()
    pinned.to("cuda", non_blocking=True)
    on_gpu(3).copy_(pinned, non_blocking=True)
    assert not gpu.events
    for number, upload in enumerate(
        [
            lambda: torch.randn(3).to("cuda", non_blocking=True),
            lambda: pinned.to("cuda"),
            lambda: torch.tensor([1.0], device="cuda"),
            lambda: on_gpu(3)[torch.tensor([0])],
        ]
    ):
        upload()
        assert kinds(gpu) == ["upload"] * (number + 1)


def test_a_copy_to_the_host_must_have_arrived_before_it_is_read(gpu):
    copied, arrived = on_gpu(3).to("cpu", non_blocking=True), torch.cuda.Event()
    arrived.record()
    late = on_gpu(3).to("cpu", non_blocking=True)
    arrived.synchronize()
    copied.tolist(), copied + 1
    assert not gpu.events
    late.tolist(), late + 1
    assert kinds(gpu) == ["unsafe", "unsafe"]


def test_a_tensor_that_is_still_copied_must_not_be_changed(gpu):
    pinned = torch.randn(3).pin_memory()
    pinned.to("cuda", non_blocking=True)
    pinned + 1
    assert not gpu.events
    pinned.zero_()
    assert kinds(gpu) == ["unsafe"]


def test_a_backward_pass_gives_the_gradients_that_the_host_has_in_shape_and_type_and_recomputes_once(gpu):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.num_calls = torch.nn.Linear(4, 4), 0

        def forward(self, x):
            self.num_calls += 1
            return torch.nn.functional.gelu(self.linear(x)).square()

    model, x = Layer(), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        (checkpoint(model, x, use_reentrant=False) + model(x)).float().sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model, x = Layer().to("cuda"), x.to("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        loss = (checkpoint(model, x, use_reentrant=False) + model(x)).float().sum()
    assert model.num_calls == 2
    loss.backward()
    assert model.num_calls == 3
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert (parameter.grad.shape, parameter.grad.dtype) == (gradient.shape, gradient.dtype)
        assert parameter.grad.device.type == "cuda"


def test_memory_is_what_lives():
    with FakeCuda(counts_memory=True) as gpu:
        kept = on_gpu(256)
        on_gpu(1024)
        view = kept[:10]
        assert (gpu.allocated, gpu.peak) == (1024, 1024 + 4096)
        del kept
        assert gpu.allocated == 1024
        del view
        assert gpu.allocated == 0
