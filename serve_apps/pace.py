"""How long what waits will take: micro-batches cost a fixed time and a time an image, both learned from recent ones."""

from dataclasses import dataclass

_KEPT = 0.9
"""Weight of what came before when another micro-batch is over: about the last ten count."""
_PRIOR = 1e-9
"""Of the least squares, so that batches of one size alone give their mean."""


@dataclass
class Pace:
    """Least squares of seconds = fixed + each * images, forgetting."""

    _weight: float = 0.0
    _images: float = 0.0
    _seconds: float = 0.0
    _images_squared: float = 0.0
    _product: float = 0.0

    def record(self, images: int, seconds: float) -> None:
        """A micro-batch is over."""
        self._weight = _KEPT * self._weight + 1
        self._images = _KEPT * self._images + images
        self._seconds = _KEPT * self._seconds + seconds
        self._images_squared = _KEPT * self._images_squared + images * images
        self._product = _KEPT * self._product + images * seconds

    def coefficients(self) -> tuple[float, float]:
        """(fixed, each) in seconds, neither below 0; zeros before the first micro-batch."""
        if not self._weight:
            return 0.0, 0.0
        mean, mean_seconds = self._images / self._weight, self._seconds / self._weight
        spread = self._images_squared / self._weight - mean * mean
        if spread <= _PRIOR * mean * mean:  # of one size: what a batch costs, it costs again
            return mean_seconds, 0.0
        each = (self._product / self._weight - mean * mean_seconds) / spread
        each = min(max(0.0, each), mean_seconds / mean)
        return mean_seconds - each * mean, each

    def wait(self, queued: int, max_batch: int) -> float:
        """Seconds until so many images that wait are through, in micro-batches as large as may be."""
        fixed, each = self.coefficients()
        return -(-queued // max_batch) * fixed + queued * each
