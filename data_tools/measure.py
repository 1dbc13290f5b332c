"""How well a repair or a detector did against known truth; also what the gates of the repairs compare with."""

import numpy as np

CAP_DB = 99.0  # stands for equal pictures


def psnr(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None, cap: float = CAP_DB) -> float:
    """Peak signal to noise ratio in dB of two uint8 arrays of one shape, where mask is true; CAP_DB when equal or mask is empty."""
    if a.shape != b.shape:
        raise ValueError(f"cannot compare pictures of shapes {a.shape} and {b.shape}")
    total, count = 0.0, 0
    for i in range(len(a)) if a.ndim == 3 else [...]:  # picture by picture: a long clip's squares would fill the memory
        difference = a[i].astype(np.float32) - b[i]
        if mask is not None:
            difference = difference[mask[i]]
        total, count = total + float(np.square(difference, dtype=np.float64).sum()), count + difference.size
    return cap if total == 0 else min(cap, float(10 * np.log10(255**2 * count / total)))


def moving(y: np.ndarray, threshold: int = 12) -> np.ndarray:
    """Where pictures [f h w] differ from the one before or after by more than `threshold` levels: bool [f h w]."""
    change = np.abs(np.diff(y.astype(np.int16), axis=0)) > threshold
    out = np.zeros(y.shape, bool)
    out[1:] |= change
    out[:-1] |= change
    return out


def f1(found: np.ndarray, true: np.ndarray) -> float:
    """Harmonic mean of precision and recall of two bool arrays; 1 when nothing is true and nothing was found."""
    hits, wrong = int((found & true).sum()), int((found ^ true).sum())
    return 1.0 if hits + wrong == 0 else 2 * hits / (2 * hits + wrong)


def auc(scores: np.ndarray, true: np.ndarray) -> float:
    """The chance that a true sample scores above a false one; ties count half."""
    positive, negative = np.asarray(scores)[true], np.sort(np.asarray(scores)[~np.asarray(true)])
    below, upto = (np.searchsorted(negative, positive, side) for side in ("left", "right"))
    return float((below + upto).mean() / 2 / len(negative))


def recall_at(scores: np.ndarray, true: np.ndarray, false_positive_rate: float = 0.01) -> float:
    """Share of true samples above the threshold that only `false_positive_rate` of the false ones pass."""
    negative = np.sort(np.asarray(scores)[~np.asarray(true)])[::-1]
    return float((np.asarray(scores)[true] > negative[int(false_positive_rate * len(negative))]).mean())


def matched(out: np.ndarray, truth: np.ndarray, reach: int = 12) -> list[int]:
    """The number of the true picture that each of `out` [f h w] shows, never falling: the path of least squared error.

    Dynamic programming on pictures shrunk to an eighth; `reach` bounds how far a place may run from the diagonal, in pictures.
    """
    small_out, small_truth = (planes[:, 4::8, 4::8].astype(np.float32).reshape(len(planes), -1) for planes in (out, truth))
    n, m = len(out), len(truth)
    cost = np.full((n, m), np.inf)
    for i in range(n):
        middle = round(i * (m - 1) / max(n - 1, 1))
        span = slice(max(0, middle - reach), min(m, middle + reach + 1))
        cost[i, span] = np.square(small_truth[span] - small_out[i]).mean(1)
    best, came = cost[0].copy(), np.zeros((n, m), int)
    for i in range(1, n):
        before = np.minimum.accumulate(best)
        where = np.zeros(m, int)
        for j in range(1, m):
            where[j] = j if best[j] <= before[j - 1] else where[j - 1]
        came[i], best = where, before + cost[i]
    path = [int(np.argmin(best))]
    for i in range(n - 1, 0, -1):
        path.append(int(came[i, path[-1]]))
    return path[::-1]
