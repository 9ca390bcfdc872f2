"""A mode that speaks fast and wrong, for test_bench_suite.py."""

from typing import Any

from bench import engines
from bench.run import Run


def frames(run: Run, **arguments: Any) -> None:
    """Time frames of an engine whose codes are always others."""
    start = engines.begin

    class Wrong:
        def __init__(self, speech: Any) -> None:
            self.speech = speech

        def __iter__(self):
            return iter(self.speech)

        def __getattr__(self, name: str) -> Any:
            value = getattr(self.speech, name)
            return (value + 1) % 512 if name == "codes" else value

    engines.begin = lambda *given: Wrong(start(*given))
    engines.engine(run, **arguments)
