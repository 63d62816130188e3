"""A GPU that is not there: what code does on "cuda" is checked on a machine without one.

Tensors on "cuda" have shapes, types and a device, and no contents; tensors of the host are real. So code runs as it
would on a GPU, autocast of CUDA and backward passes included. `FakeCuda` notes, by file and line:

    mismatch   an operation on tensors of the GPU and of the host (raises, as on a GPU)
    wait       the host reads what the GPU computes: .item(), float(), bool(), .tolist(), .cpu(), masks as indices
    upload     a copy to the GPU that waits for what the GPU does, because its source is not pinned, or is to block
    unsafe     the host reads a copy from the GPU that may not have arrived, or changes a tensor that is still copied

    with FakeCuda() as gpu:
        model.to("cuda")(torch.randn(2, 3).pin_memory().to("cuda", non_blocking=True))
    print(gpu.report())

What it cannot see stays with `pytest -m gpu`: whether a kernel exists, is fast, or is right to the last bit; NCCL, and
all that several processes do; the order of several streams, since one is all it has; waits in libraries that do not go
through torch, such as bitsandbytes; how the allocator cuts memory up. An event that is waited for may be a step old,
which costs nothing, or new: both count as no wait.
"""

import collections
import contextlib
import heapq
import itertools
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Self
from unittest import mock

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map


ROOT = Path(__file__).parents[1]
TOTAL_MEMORY = 80 << 30  # bytes

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.is_nonzero, aten.equal}
INDEXING = {aten.index, aten.index_put, aten.index_put_}


class Event(NamedTuple):
    """Something that is wrong on a GPU, or slow.

    Attributes:
        kind: mismatch, wait, upload or unsafe.
        operation: Of torch.
        place: File and line that asked for it.
    """

    kind: str
    operation: str
    place: str


def is_cuda(value: object) -> bool:
    """Whether it is a tensor of the fake GPU."""
    return isinstance(value, FakeTensor) and value.fake_device.type == "cuda"


class _ShapesAlone(FakeTensorMode):
    """Never looks for a driver."""

    avoid_device_init = True


class FakeCuda(TorchDispatchMode):
    """The GPU, while it is entered.

    Args:
        sources: Folder of the code that is watched; the innermost line of it is the place of an event.
        counts_memory: Whether to keep book of the GPU's memory, which takes time.

    Attributes:
        events: How often each was noted.
        allocated, peak: Bytes of the GPU's tensors that came to life while it was entered: now, and at most.
    """

    def __init__(self, sources: Path = ROOT, *, counts_memory: bool = False) -> None:
        super().__init__()
        self.sources, self.counts_memory = str(sources), counts_memory
        self.events: collections.Counter[Event] = collections.Counter()
        self.allocated = self.peak = 0
        self._alive: set[int] = set()
        self._pinned: set[int] = set()
        self._arriving: dict[int, int] = {}  # storage of the host -> number of the copy that writes it
        self._leaving: dict[int, int] = {}  # ... that reads it
        self._num_copies = 0
        self._shapes = _ShapesAlone(allow_non_fake_inputs=False)

    def __enter__(self) -> Self:
        torch._C._ensureCUDADeviceGuardSet()
        with contextlib.ExitStack() as stack:
            stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
            torch._C._set_only_lift_cpu_tensors(True)
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            for patch in self._patches():
                stack.enter_context(patch)
            self._stack = stack.pop_all()
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._stack.close()

    def found(self, *kinds: str) -> list[Event]:
        """The events of some kinds."""
        return sorted(event for event in self.events if event.kind in kinds)

    def report(self) -> str:
        """A line for each event, and how often it was."""
        return "\n".join(f"{count:5d} x {' '.join(event)}" for event, count in sorted(self.events.items()))

    def note(self, kind: str, operation: object) -> None:
        """Notes an event of the code that runs."""
        frame: Any = sys._getframe(1)
        while frame is not None and not self._watches(frame.f_code.co_filename):
            frame = frame.f_back
        place = "?"
        if frame is not None:
            place = f"{frame.f_code.co_filename.removeprefix(self.sources).lstrip('/')}:{frame.f_lineno}"
        self.events[Event(kind, str(operation), place)] += 1

    def _watches(self, path: str) -> bool:
        return path.startswith(self.sources) and path != __file__ and "site-packages" not in path

    # --- operations --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        kwargs = dict(kwargs or {})
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
        device = kwargs.get("device")
        is_made_there = device is not None and torch.device(device).type == "cuda"
        if not is_made_there and not any(map(is_cuda, tensors)):
            return self._on_host(func, args, kwargs, tensors)
        packet = func.overloadpacket
        if packet in READS:
            self._wait(func)
            return _one(tensors[0].dtype if packet is aten._local_scalar_dense else torch.bool)
        if packet is aten._to_copy and device is not None and not is_made_there:
            return self._download(func, torch.zeros(tensors[0].shape, dtype=kwargs.get("dtype")), kwargs, pins=True)
        if packet is aten.copy_ and not is_cuda(tensors[0]):
            return self._download(func, tensors[0].zero_(), _of_copy(args, kwargs))
        if packet in (aten._to_copy, aten.copy_) and not is_cuda(tensors[-1]):
            self._upload(func, tensors[-1], _of_copy(args, kwargs) if packet is aten.copy_ else kwargs)
        if packet in INDEXING and any(index is not None and not is_cuda(index) for index in args[1]):
            self._wait(f"{func} by an index of the host", "upload")
        return self._on_gpu(func, types, args, kwargs)

    def _on_host(self, func: Any, args: tuple, kwargs: dict, tensors: list[torch.Tensor]) -> Any:
        if self._arriving or self._leaving:
            self._check_copies(func, args, kwargs, tensors)
        pins = kwargs.pop("pin_memory", False)
        result = func(*args, **kwargs)
        if pins:
            self._pin(result)
        return result

    def _on_gpu(self, func: Any, types: Any, args: tuple, kwargs: dict) -> Any:
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type == "cpu":
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        kwargs.pop("pin_memory", None)
        args, kwargs = tree_map(self._without_contents, (args, kwargs))
        try:
            result = self._shapes.dispatch(func, types, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            self._wait(f"{func} (its shape)")
            raise
        except Exception as error:
            if "device" in str(error):
                self.note("mismatch", func)
            raise
        if result is NotImplemented:
            raise NotImplementedError(f"{func} of {types}")
        if self.counts_memory:
            self._count_memory(result)
        return result

    def _without_contents(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
            return self._shapes.from_tensor(value, static_shapes=True)
        return value

    def _count_memory(self, result: Any) -> None:
        for tensor in filter(is_cuda, tree_iter(result)):
            storage = tensor.untyped_storage()
            key, num_bytes = storage._cdata, storage.nbytes()
            if key not in self._alive:
                self._alive.add(key)
                self.allocated += num_bytes
                self.peak = max(self.peak, self.allocated)
                weakref.finalize(storage, self._free, key, num_bytes)

    def _free(self, key: int, num_bytes: int) -> None:
        self._alive.discard(key)
        self.allocated -= num_bytes

    # --- copies ------------------------------------------------------------------------------------------------------

    def _wait(self, func: object, kind: str = "wait") -> None:
        self.note(kind, func)
        self.land()

    def land(self, last: int | None = None) -> None:
        """Copies up to that of a number have been waited for; None is all."""
        for copies in (self._arriving, self._leaving):
            for key in [key for key, number in copies.items() if last is None or number <= last]:
                del copies[key]

    def _download(self, func: Any, target: torch.Tensor, settings: dict, *, pins: bool = False) -> torch.Tensor:
        """Copies to a tensor of the host; torch itself pins one that it makes for a copy that does not block."""
        if settings.get("non_blocking") and pins:
            self._pin(target)
        if settings.get("non_blocking") and self.is_pinned(target):
            self._num_copies += 1
            self._arriving[_key(target)] = self._num_copies
        else:
            self._wait(f"{func} to the host")
        return target

    def _upload(self, func: Any, source: torch.Tensor, settings: dict) -> None:
        if settings.get("non_blocking") and self.is_pinned(source):
            self._num_copies += 1
            self._leaving[_key(source)] = self._num_copies
        else:
            self._wait(f"{func} from the host, {source.dtype} {tuple(source.shape)}", "upload")

    def _check_copies(self, func: Any, args: tuple, kwargs: dict, tensors: list[torch.Tensor]) -> None:
        if any(_key(tensor) in self._arriving for tensor in tensors):
            self.note("unsafe", f"{func} of what may not have arrived")
        named = itertools.zip_longest(func._schema.arguments, args)
        written = [kwargs.get(argument.name, value) for argument, value in named if argument and argument.is_write]
        if any(isinstance(value, torch.Tensor) and _key(value) in self._leaving for value in written):
            self.note("unsafe", f"{func} of what is still copied")

    def _pin(self, tensor: torch.Tensor) -> None:
        key = _key(tensor)
        self._pinned.add(key)
        weakref.finalize(tensor.untyped_storage(), self._forget, key)

    def _forget(self, key: int) -> None:
        for known in (self._pinned, self._arriving, self._leaving):
            known.discard(key) if isinstance(known, set) else known.pop(key, None)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor of the host lies in pinned memory."""
        return _key(tensor) in self._pinned

    def pin_memory(self, tensor: torch.Tensor) -> torch.Tensor:
        """What `tensor.pin_memory()` gives."""
        if is_cuda(tensor):
            raise RuntimeError("cannot pin a tensor of the GPU: only dense CPU tensors can be pinned")
        if self.is_pinned(tensor):
            return tensor
        copy = tensor.clone()
        self._pin(copy)
        return copy

    # --- torch -------------------------------------------------------------------------------------------------------

    def _patches(self) -> Iterator[contextlib.AbstractContextManager]:
        """What torch would do with a driver."""
        stream = FakeStream(self)
        functions: dict[str, Any] = {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "get_device_capability": lambda *given: (9, 0),
            "get_device_name": lambda *given: "fake",
            "get_device_properties": lambda *given: SimpleNamespace(total_memory=TOTAL_MEMORY, major=9, minor=0),
            "is_bf16_supported": lambda *given, **settings: True,
            "mem_get_info": lambda *given: (TOTAL_MEMORY, TOTAL_MEMORY),
            "max_memory_allocated": lambda *given: self.peak,
            "reset_peak_memory_stats": lambda *given: None,
            "empty_cache": lambda: None,
            "synchronize": lambda *given: self._wait("torch.cuda.synchronize"),
            "current_stream": lambda *given: stream,
            "is_current_stream_capturing": lambda: False,
            "Event": lambda *given, **settings: FakeEvent(self),
            "_lazy_init": lambda: None,
        }
        for name, function in functions.items():
            yield mock.patch.object(torch.cuda, name, function)
        functions = {
            "is_available": lambda: True,
            "current_accelerator": lambda *given, **settings: torch.device("cuda"),
            "set_device_index": lambda *given: None,
            "current_device_index": lambda: 0,
        }
        for name, function in functions.items():
            yield mock.patch.object(torch.accelerator, name, function)
        yield mock.patch("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None)
        yield mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        yield mock.patch.object(torch.Tensor, "pin_memory", lambda tensor, *given: self.pin_memory(tensor))
        yield mock.patch.object(torch.Tensor, "is_pinned", lambda tensor, *given: self.is_pinned(tensor))
        for name in ("tolist", "numpy"):  # which read without an operation
            yield mock.patch.object(torch.Tensor, name, self._reads(getattr(torch.Tensor, name)))
        yield mock.patch.object(torch.Tensor, "backward", _backward(torch.Tensor.backward))
        yield mock.patch.object(torch.nn.Module, "_apply", _apply)
        attention = torch.nn.functional.scaled_dot_product_attention
        yield mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", _attention(attention))

    def _reads(self, stock: Callable) -> Callable:
        def read(tensor: torch.Tensor, *given: Any, **settings: Any) -> Any:
            if is_cuda(tensor):
                self._wait(stock.__name__)
                return torch.full(tensor.shape, _one(tensor.dtype), dtype=tensor.dtype).tolist()
            if _key(tensor) in self._arriving:
                self.note("unsafe", f"{stock.__name__} of what may not have arrived")
            return stock(tensor, *given, **settings)

        return read


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _one(dtype: torch.dtype) -> bool | int | float:
    """What the host reads of any tensor of the GPU."""
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


def _of_copy(args: tuple, kwargs: dict) -> dict:
    """The settings of `copy_`."""
    return {**kwargs, "non_blocking": args[2]} if len(args) > 2 else kwargs


class FakeEvent:
    """A point among the copies."""

    def __init__(self, gpu: FakeCuda) -> None:
        self.gpu, self.last = gpu, 0

    def record(self, *given: object) -> None:
        self.last = self.gpu._num_copies

    def synchronize(self) -> None:
        self.gpu.land(self.last)

    def wait(self, *given: object) -> None: ...

    def query(self) -> bool:
        self.synchronize()
        return True

    def elapsed_time(self, other: "FakeEvent") -> float:
        return 1.0


class FakeStream:
    """The only one."""

    def __init__(self, gpu: FakeCuda) -> None:
        self.gpu, self.device = gpu, torch.device("cuda:0")

    def synchronize(self) -> None:
        self.gpu._wait("Stream.synchronize")

    def wait_stream(self, other: object) -> None: ...

    def wait_event(self, event: FakeEvent) -> None: ...

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        event = event or FakeEvent(self.gpu)
        event.record()
        return event


def _attention(stock: Callable) -> Callable:
    """Attention by the kernels that a GPU takes; without a driver torch falls back to one that writes all scores."""

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if not is_cuda(query) or attn_mask is not None or enable_gqa:
            settings = {"scale": scale, "enable_gqa": enable_gqa}
            return stock(query, key, value, attn_mask, dropout_p, is_causal, **settings)
        if torch.is_autocast_enabled("cuda"):
            query, key, value = (states.to(torch.get_autocast_dtype("cuda")) for states in (query, key, value))
        if not query.dtype == key.dtype == value.dtype:
            types = ", ".join(str(states.dtype) for states in (query, key, value))
            raise RuntimeError(f"Expected query, key, and value to have the same dtype, but got {types}")
        if query.dtype in (torch.float16, torch.bfloat16):
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        needs_lse = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
        given = (query, key, value, None, needs_lse, dropout_p, is_causal)
        return aten._scaled_dot_product_efficient_attention(*given, scale=scale)[0]

    return attend


def _apply(module: torch.nn.Module, fn: Callable, recurse: bool = True) -> torch.nn.Module:
    """`Module._apply`, for weights that are real before and without contents after, which cannot change places."""
    for part in module.modules() if recurse else [module]:
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            with torch.no_grad():
                moved = fn(parameter)
            if moved is not parameter:
                part._parameters[name] = torch.nn.Parameter(moved.detach(), requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer if buffer is None else fn(buffer)
    return module


# --- backward passes -------------------------------------------------------------------------------------------------


def _backward(stock: Callable) -> Callable:
    def backward(tensor: torch.Tensor, *given: Any, **settings: Any) -> None:
        if not is_cuda(tensor):
            return stock(tensor, *given, **settings)
        assert not given and not settings, "only plain backward passes are known here"
        task = mock.patch.object(torch._C, "_current_graph_task_id", lambda: 0)  # recomputed layers ask for it
        with torch.no_grad(), task:
            return run_backward(tensor)

    return backward


def run_backward(loss: torch.Tensor) -> None:
    """What torch's engine does, which wants a driver: nodes of the graph in the order of its threads, one at a time.

    Tensor hooks are not called, and what nodes have saved lives as long as the graph.
    """
    assert loss.grad_fn is not None and loss.ndim == 0, "the loss must be a scalar that has a gradient"
    num_waiting = _count_edges(loss.grad_fn)
    gradients: dict[Any, dict[int, torch.Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    order = itertools.count()
    ready = [(0, next(order), loss.grad_fn)]
    while ready:
        _, _, node = heapq.heappop(ready)
        found = _run_node(node, gradients.pop(node, {}))
        for (following, number), gradient in zip(node.next_functions, found, strict=False):
            if following is None:
                continue
            if gradient is not None:
                gradient = _fit(gradient, following, number)
                sums = gradients.setdefault(following, {})
                sums[number] = sums[number] + gradient if number in sums else gradient
            num_waiting[following] -= 1
            if num_waiting[following] == 0:
                heapq.heappush(ready, (-following._sequence_nr(), next(order), following))


def _count_edges(root: Any) -> dict[Any, int]:
    """How many gradients each node of a graph waits for."""
    counts: dict[Any, int] = {root: 0}
    waiting = [root]
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None:
                if node not in counts:
                    waiting.append(node)
                counts[node] = counts.get(node, 0) + 1
    return counts


def _run_node(node: Any, gradients: dict[int, torch.Tensor]) -> Iterable[torch.Tensor | None]:
    """Gradients of a node's inputs."""
    if hasattr(node, "variable"):
        if 0 in gradients:
            parameter, gradient = node.variable, gradients[0]
            if parameter.grad is None:
                parameter.grad = gradient.detach()
            else:
                parameter.grad.add_(gradient)
        return ()
    if not gradients:
        return [None] * len(node.next_functions)
    given = [gradients.get(number) for number in range(len(node._input_metadata))]
    if isinstance(node, torch.autograd.function.BackwardCFunction):  # of a Function of ours
        made = zip(given, node._input_metadata, strict=True)
        given = [torch.zeros(of.shape, dtype=of.dtype, device=of.device) if g is None else g for g, of in made]
        found = node.apply(*given)
    else:
        found = node(*given)
    return found if isinstance(found, tuple) else (found,)


def _fit(gradient: torch.Tensor, node: Any, number: int) -> torch.Tensor:
    """A gradient as the engine hands it on: in the shape and type of what it is of."""
    if hasattr(node, "variable"):
        shape, dtype, device = node.variable.shape, node.variable.dtype, node.variable.device
    else:
        of = node._input_metadata[number]
        shape, dtype, device = of.shape, of.dtype, of.device
    assert gradient.device == device, f"a gradient on {gradient.device} of a tensor on {device}"
    if gradient.shape != shape:
        gradient = gradient.sum_to_size(shape)
    return gradient.to(dtype)


# --- scripts ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def on_fake_gpu(*, has_weights: bool = True, **settings: Any) -> Iterator[FakeCuda]:
    """A `FakeCuda` in which a script of the project takes the GPU for its own, from the first import to the result.

    Models come to it when they are loaded. Step checkpoints are not written, and memory is not planned.

    Args:
        has_weights: Whether checkpoints hold weights; else their configurations say what is loaded, without contents.
        settings: Of `FakeCuda`.
    """
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

    import causal_wan.runs.plan
    import causal_wan.training.loop

    load = _load_and_move if has_weights else _load_configuration
    with FakeCuda(**settings) as gpu, contextlib.ExitStack() as stack:
        for model_class in (ModelMixin, PreTrainedModel):
            method = _with_first(load, model_class.from_pretrained.__func__)
            stack.enter_context(mock.patch.object(model_class, "from_pretrained", classmethod(method)))
        stack.enter_context(
            mock.patch.object(causal_wan.training.loop, "save_checkpoint", lambda *given, **others: None)
        )
        stack.enter_context(mock.patch.object(causal_wan.runs.plan, "describe_memory", lambda *given: ""))
        yield gpu


def _with_first(function: Callable, first: Any) -> Callable:
    """Like `functools.partial`, but a method."""
    return lambda *given, **settings: function(first, *given, **settings)


def _load_and_move(
    stock: Callable, cls: type, *given: Any, device_map: dict | None = None, **settings: Any
) -> torch.nn.Module:
    """`from_pretrained` on the host, since weights are read past torch, and then where they are wanted."""
    model = stock(cls, *given, **settings)
    return model if device_map is None else model.to(device_map[""])


def _load_configuration(
    stock: Callable,
    cls: Any,
    pretrained_model_name_or_path: str,
    *,
    subfolder: str,
    dtype: torch.dtype,
    device_map: dict | None = None,
    **settings: Any,
) -> torch.nn.Module:
    """`from_pretrained` of a folder without weights: a model of the types that weights would have."""
    for name in ("revision", "use_safetensors", "quantization_config"):
        settings.pop(name, None)
    of_diffusers = hasattr(cls, "load_config")
    with torch.device("meta"):
        if of_diffusers:
            model = cls.from_config(cls.load_config(pretrained_model_name_or_path, subfolder=subfolder), **settings)
        else:
            model = cls(cls.config_class.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder))
    kept = set(cls._keep_in_fp32_modules or ()) if of_diffusers else set()
    for name, parameter in model.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model.to_empty(device="cpu" if device_map is None else device_map[""]).eval()
