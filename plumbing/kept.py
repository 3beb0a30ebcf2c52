"""Not the method, skip it at first reading: what need not be made again, and what can be made beside the rest."""
import contextlib
import functools
import weakref

import torch

from plumbing.kernels import full_float32

_makers = []                     # methods that @kept_while_frozen decorates
_ahead = {}                      # (module, method) -> what `ahead` made, and the event of its end


def kept(make):
    """Decorator: make(*args) -> a tensor made of args alone, kept until somebody writes to it."""
    memory = {}

    @functools.wraps(make)
    def remember(*args, **kwargs):
        if torch.compiler.is_compiling():            # what a compiler sees is nothing to keep
            return make(*args, **kwargs)
        key = args, *kwargs.items()
        if key not in memory or memory[key]._version:
            with torch.inference_mode(False):        # for later calls, too, and those may need gradients
                result = make(*args, **kwargs)
            if type(result) is not torch.Tensor:     # an exporter's stand-in
                return result
            memory[key] = result
        return memory[key]
    return remember


def kept_while_frozen(make):
    """Decorator: make(module) -> tensors; once it has nothing to train, anew only where a mode or tensor changed."""
    memory = weakref.WeakKeyDictionary()             # not the module's own: copies and pickles begin with nothing

    @functools.wraps(make)
    def remember(module):
        if (module, remember) in _ahead and torch.cuda.is_current_stream_capturing():        # not in another thread
            return _arrived(*_ahead[module, remember])
        parts = module, *module._modules.values()    # a layer and its quantizers
        buffers = [v for part in parts for v in part._buffers.values()]
        if (torch.compiler.is_compiling() or any(part._parameters for part in parts)
                or any(v.is_inference() for v in buffers)):      # those do not say when they are written to
            return make(module)
        mode, tensors = [vars(module).get(n) for n in ("integer", "view")], [(v, v._version) for v in buffers]
        last_mode, last_tensors, result = memory.get(module, (None, (), None))
        if mode != last_mode or any(a is not b or i != j for (a, i), (b, j) in zip(tensors, last_tensors)):
            with torch.inference_mode(False):
                result = make(module)
            if type(result[0]) is torch.Tensor:      # not an exporter's stand-in
                memory[module] = mode, tensors, result
        return result
    _makers.append(remember)
    return remember


@contextlib.contextmanager
def ahead(network):
    """Inside, while a CUDA graph of a training step is recorded: weights and scales come from a second stream.

    Those of all layers, in training, are thousands of small kernels, which leave most of a GPU idle. None waits for an
    image, so they can run beside the large ones; and autograd runs their way back on that stream, too. Around forward
    and backward: a block that is computed again wants the same tensors again. Nothing inside may write to the weights.
    """
    if network is None or not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        yield
        return
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()        # a new one: the last may be of one that failed
    side.wait_stream(main)
    try:
        with torch.cuda.stream(side), full_float32(main.device):
            for module in network.modules():
                for make in _makers:
                    if getattr(type(module), make.__name__, None) is make:
                        _ahead[module, make] = make(module), side.record_event()
        yield
    finally:
        _ahead.clear()                               # first: a recording that failed cannot wait
        main.wait_stream(side)


def _arrived(result, event):
    """What ahead made, once it is there."""
    here = torch.cuda.current_stream()
    here.wait_event(event)
    for v in filter(torch.is_tensor, result):
        v.record_stream(here)                        # it is the second stream's memory, and in use here
    return result
