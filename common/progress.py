"""Uniform progress bars for everything that takes more than a few seconds; none is drawn where stderr is a pipe."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], *, total: int, task: str, unit: str) -> Iterator[T]:
    """The items, with a bar that counts them."""
    with progress_bar(total=total, task=task, unit=unit) as bar:
        for item in items:
            yield item
            bar.update()


def progress_bar(*, total: float | None, task: str, unit: str, shown: bool = True) -> Any:
    """A bar that the caller moves: a context manager with `update(steps)`; `write(line)` prints above it.

    total: None where it is not known; the bar then only counts.
    """
    # smoothing=0: the time left is computed from the average of all steps, since their cost varies.
    return tqdm(total=total, desc=task, unit=unit, smoothing=0, leave=False, disable=None if shown else True)
