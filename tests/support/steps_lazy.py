"""A copy engine that is slow on purpose, and repeatably so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvoffload.copy.base import CANCELLED, LOAD, STORE, Fragment, JobDone
from kvoffload.copy.cpu import CpuCopyEngine


class LazyEngine:
    """A copy engine whose jobs start late: ``lag(kind)`` polls after they were submitted.

    Lag 0: done before ``submit`` returns (or almost: a load may wait for its slot). Lag -1: as it
    comes, while the steps go on.
    Deterministic slowness: a store that nobody waits for copies whatever its blocks hold by then.
    ``wait`` starts a store at once (a copy always moves on), a load only when its time has come.
    """

    def __init__(self, inner: CpuCopyEngine, lag: Callable[[int], int]) -> None:
        self.inner, self.lag = inner, lag
        self.fail_submit: Callable[[int], bool] = lambda kind: False
        self.behind_compute: Callable[[], bool] = lambda: (
            False
        )  # jobs wait for a forward, as on CUDA
        self._late: dict[int, tuple[int, int, tuple[Any, ...]]] = {}
        self._done: list[Any] = []
        self._sent: set[int] = set()
        self.stores = self.loads = 0

    def add_group(self, fragments: Sequence[Fragment], num_blocks: int, shard_bytes: int) -> int:
        return self.inner.add_group(fragments, num_blocks, shard_bytes)

    def submit_store(self, job: int, group: int, copies: Any, shard_offset: int) -> None:
        self._submit(STORE, job, (group, copies, shard_offset))
        self.stores += len(copies)

    def submit_load(
        self, job: int, group: int, copies: Any, shard_offset: int, deadline_ms: int
    ) -> None:
        self._submit(LOAD, job, (group, copies, shard_offset, deadline_ms))
        self.loads += len(copies)

    def _submit(self, kind: int, job: int, args: tuple[Any, ...]) -> None:
        if self.fail_submit(kind):
            raise OSError("planted: the device refused the copy")
        lag = self.lag(kind)
        if lag <= 0:
            self._start(kind, job, args)
            if lag == 0:
                self.inner.wait(job, 20)
        else:
            self._late[job] = (lag, kind, args)

    def _start(self, kind: int, job: int, args: tuple[Any, ...]) -> None:
        self._sent.add(job)
        (self.inner.submit_load if kind == LOAD else self.inner.submit_store)(job, *args)

    def cancel(self, job: int) -> None:
        late = self._late.pop(job, None)
        if late is None:
            self.inner.cancel(job)
            return
        _, kind, args = late
        if kind == STORE:
            # Like the real pool: whoever waits for the slots learns that nobody will fill them.
            self._start(kind, job, args)
            self.inner.cancel(job)
            return
        self._done.append(JobDone(job, kind, CANCELLED, 0, 4, 0, 0, 0))

    def poll(self) -> list[Any]:
        for job, (lag, kind, args) in list(self._late.items()):
            if lag > 1:
                self._late[job] = (lag - 1, kind, args)
                continue
            del self._late[job]
            self._start(kind, job, args)
            self.inner.wait(job, 20)  # for repeatability only
        done, self._done = self._done + list(self.inner.poll()), []
        self._sent.difference_update(d.job for d in done)
        return done

    def wait(self, job: int, timeout_ms: int) -> bool:
        late = self._late.get(job)
        if late is not None:
            if late[1] == LOAD:
                return False
            del self._late[job]
            self._start(late[1], job, late[2])
        return self.inner.wait(job, timeout_ms)

    def wait_begun(self, job: int, timeout_ms: int) -> bool:
        return not self.behind_compute() or (job not in self._late and job not in self._sent)

    def flush(self) -> None:
        """Copies end by themselves, whether or not an engine steps: start all, wait for all."""
        for job in [*self._late, *self._sent]:
            assert self.wait(job, 5000), f"copy job {job} does not end"
        self._sent.clear()

    def close(self) -> None:
        self._late.clear()
        self.inner.close()

    def inject(self, every: int) -> None:
        """Every n-th chunk load fails; 0 turns it off."""
        self.inner.inject(every)


def refuse_nth(kind: int, nth: int) -> Callable[[int], bool]:
    """For ``LazyEngine.fail_submit``: the nth submission (from 1) of this kind raises."""
    seen = 0

    def refuse(what: int) -> bool:
        nonlocal seen
        seen += what == kind
        return what == kind and seen == nth

    return refuse
