"""The most memory that torch's allocator had given out during a call."""

from torch.profiler import ProfilerActivity, profile


def peak_of(call) -> int:
    """Bytes beyond those before the call, at the moment when there were most; by the allocator's
    own word, so that what an operator makes inside of itself counts too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
