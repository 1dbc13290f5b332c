"""Where batches of rows are done: on processes of this machine or on Ray Data.

Both take calls as they are needed and give each back as it ends. A worker uses one thread: processes are the parallelism here,
more threads would wait for each other and could change sums.
"""

import errno
import importlib
import itertools
import logging
import multiprocessing
import os
import pickle
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures import TimeoutError as Overdue
from pathlib import Path
from typing import Any, NamedTuple

import cv2
from pebble import ProcessExpired, ProcessPool  # of the extra [data]

from data_tools import manifest
from data_tools.manifest import Job, Row

RAY_CALLS, RAY_TOGETHER = 1024, 16  # batches given to Ray at once; of these in a task, at most
ENVIRONMENT = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT}  # no clip's fault: the run ends


class Stage(NamedTuple):
    """Where a stage's code lies, and how its rows come."""

    module: str
    rows: int = 16  # in a batch, at most; or more, where they come together
    work: str = "work"
    settings: str = "Settings"
    whole: bool = False  # all rows at once, in this process

    def part(self, name: str) -> Any:
        """What the module calls so; None if there is no such thing."""
        return getattr(importlib.import_module(self.module), name, None)

    def here(self, settings: Any) -> bool:
        """Whether it looks at rows alone, which no worker is worth."""
        only = self.part("rows_alone")
        return self.whole or (only(settings) if only else self.rows >= manifest.ROWS)


class Call(NamedTuple):
    """A batch on its way to a worker."""

    stage: Stage
    job: Job
    rows: list[Row]
    part: Path  # what it leaves


def _do(call: Call) -> str | None:
    """Does a batch and leaves its part; gives the trace of what went wrong. Raises OSError for a full disk and its like."""
    _one_thread()
    try:
        rows = call.stage.part(call.stage.work)(call.rows, call.job)
        manifest.write(call.part, rows)
    except ImportError:
        raise
    except Exception as error:  # whatever it is, it is not to end the run
        if isinstance(error, OSError) and error.errno in ENVIRONMENT:
            raise
        return f"{traceback.format_exc()}\nfailed ({type(error).__name__}: {' '.join(str(error).split())})"
    return None


def _one_thread() -> None:
    cv2.setNumThreads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for what is yet to be imported
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _end_with_parent() -> None:
    """A worker whose program was killed must not go on beside the next one."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _pool(workers: int, module: str) -> ProcessPool:
    context = multiprocessing.get_context("forkserver")  # threads of this process would not survive a plain fork
    context.set_forkserver_preload([module])
    return ProcessPool(max_workers=workers, max_tasks=64, initializer=_end_with_parent, context=context)


def _wrong(future: Future, timeout_s: float) -> str | None:
    """What went wrong with a batch: the trace of an error, or what became of its process; None if nothing did."""
    try:
        return future.result()
    except Overdue:
        return f"took longer than {timeout_s:g} s"
    except ProcessExpired as error:
        return f"ended its process (code {error.exitcode})"


def on_processes(calls: Iterable[Call], workers: int, timeout_s: float) -> Iterator[tuple[Call, str | None]]:
    """Each batch as it ends, with what went wrong or None. A clip may take timeout_s."""
    calls, running = iter(calls), {}
    first = list(itertools.islice(calls, 1))
    if not first:
        return
    calls, pool = itertools.chain(first, calls), _pool(workers, first[0].stage.module)
    try:
        while True:
            for call in itertools.islice(calls, 2 * workers - len(running)):
                running[pool.schedule(_do, (call,), timeout=timeout_s * len(call.rows))] = call
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), _wrong(future, timeout_s)
        pool.close()
    finally:
        pool.stop()
        pool.join()


def on_ray(calls: Iterable[Call], workers: int, timeout_s: float, address: str = "") -> Iterator[tuple[Call, str | None]]:
    """The same on Ray Data; address: of a running cluster, or a new one on this machine.

    A task does several batches: Ray takes tenths of a second to hand out the next one. It knows no time limit, so a watch ends a
    worker that takes longer, and it does not tell why a worker ended.
    """
    try:
        import ray.data
    except ImportError as error:
        raise ValueError(f"executor: ray is not installed ({error}): pip install 'ray[data]'") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere unless the user wants it
    if not ray.is_initialized():
        here = {} if address else {"num_cpus": workers, "include_dashboard": False}
        ray.init(address=address or None, log_to_driver=False, logging_level="ERROR", **here)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars, context.print_on_execution_start = False, False
    context.max_errored_blocks = -1  # a batch that is lost is done again, alone
    cpus, calls = max(1, int(ray.cluster_resources().get("CPU", workers))), iter(calls)
    while chunk := list(itertools.islice(calls, RAY_CALLS)):
        waiting = {call.job.number: call for call in chunk}
        together = max(1, min(RAY_TOGETHER, len(chunk) // (8 * cpus)))  # eight tasks a worker, so that all end together
        items = [{"calls": pickle.dumps(part), "timeout_s": timeout_s} for part in (
            chunk[i:i + together] for i in range(0, len(chunk), together))]
        blocks = ray.data.from_items(items, override_num_blocks=len(items))
        for row in blocks.map(_do_on_ray, num_cpus=1, ray_remote_args_fn=lambda: {"max_retries": 0}).iter_rows():
            for number, wrong in pickle.loads(row["ended"]):
                yield waiting.pop(number), wrong
        for call in waiting.values():  # of tasks whose worker ended, which had done some of them
            yield call, None if call.part.is_file() else f"ended its process, or took longer than {timeout_s:g} s"


def _do_on_ray(item: dict[str, Any]) -> dict[str, bytes]:
    ended = []
    for call in pickle.loads(item["calls"]):
        watch = threading.Timer(item["timeout_s"] * len(call.rows), os._exit, (1,))
        watch.daemon = True
        watch.start()
        try:
            ended.append((call.job.number, _do(call)))
        finally:
            watch.cancel()
    return {"ended": pickle.dumps(ended)}
