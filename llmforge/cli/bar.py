"""Progress on standard error, where that is a terminal."""

from typing import Any


class Bar:
    """Call it with what is done and what there is to do in all."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(total=total, unit=f" {self._unit}", unit_scale=True, leave=False, disable=None)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._bar.close()
