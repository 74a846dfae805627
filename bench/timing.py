"""Time on a device: events, memory that is not in the cache, and CUDA graphs.

A call from Python at small sizes is timed with the host's part in it; what is captured in a graph
is the device's part alone. On a CPU the clock is read.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def _evictor(device: torch.device) -> torch.Tensor:
    """Memory of four times the cache's size."""
    size = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.zeros(4 * size, dtype=torch.uint8, device=device)


def empty_cache(device: torch.device) -> None:
    """Read so much that nothing of what was used before is in the cache; writes nothing."""
    if device.type == "cuda":
        _evictor(device).view(torch.int32).amax()


def seconds_of(call: Callable[[], Any], device: torch.device, launched: bool = False) -> float:
    """Seconds of a call whose operands are in memory, not in the cache.

    By events, from an idle device to its being idle again. With ``launched`` the call is given to
    the device while that is busy, so that what the host does for a launch is not in the time.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    empty_cache(device)
    if not launched:
        torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def capture(call: Callable[[], Any], warm: int = 2) -> Callable[[], Any]:
    """A replay of what ``call`` launches, which it returns the results of.

    ``call`` runs ``warm`` times before, so that kernels are compiled and chosen.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = call()

    def replay() -> Any:
        graph.replay()
        return results

    return replay


def kernels_of(call: Callable[[], Any], device: torch.device) -> dict[str, list[float]]:
    """Microseconds of every kernel that a call launches, by the kernel's name; none on a CPU."""
    if device.type != "cuda":
        return {}
    torch.cuda.synchronize(device)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize(device)
    found: dict[str, list[float]] = {}
    for event in profile.events():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu and not event.name.startswith(("Memcpy", "Memset")):
            found.setdefault(event.name, []).append(event.device_time_total)
    return found
