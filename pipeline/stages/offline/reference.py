"""The reference's log-probabilities: computed ahead of the trainer, kept for the next run that needs them."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from actors.errors import RunFailure, UserError
from pipeline.artifacts.manifest import Manifest, fingerprint, new_directory, read_manifest, verify, versions
from pipeline.data.tokens.batch_order import BatchOrder
from pipeline.data.tokens.tokenize import TokenizedData

if TYPE_CHECKING:
    from actors.cluster import AgreedFuture
    from pipeline.stages.views import View

FILE = "logps.arrow"

CHUNKS_AHEAD = 4
"""Chunks handed out beyond the one that the trainer needs: enough that the
ranks never idle, few enough that the object store holds a fraction of the data."""

ABANDONED_SECONDS = 24 * 3600
"""Age from which a half-written directory is one that a kill left: nobody writes this cache for a day."""


class ReferenceLogps:
    """Summed log-probabilities of the sequences of every row that training uses, filled chunk by chunk: both
    answers of a pair, or an answer and the mismatched one.

    Chunks are cut along the order in which training first uses the rows, so that the trainer's first
    batch waits for one chunk and the later ones are ready before they are asked for. Rows that an
    earlier run left in the artifact are not computed again.

    What is kept is a cache: where it can't be read it is computed again, and where it can't be written
    (another's directory, a full disk) the next run computes it again. `notes` says so.
    """

    def __init__(
        self,
        data: TokenizedData,
        first_use: np.ndarray,
        *,
        reference: str,
        columns: Sequence[str],
        ld_alpha: float | None,
        cache: Path,
        chunk_rows: int,
        fresh: bool = False,
    ) -> None:
        self.data, self.ld_alpha = data, ld_alpha
        self._columns = tuple(columns)
        """Names under which the loss reads them, one for each sequence of a row."""
        self.key = fingerprint([reference, data.fingerprint, ld_alpha, *columns])
        self.path = cache / self.key[:24]
        self.notes: list[str] = []
        self.logps = self._unknown() if fresh else self._load()
        self._reference = reference
        missing = first_use[np.isnan(self.logps[first_use]).any(axis=1)]
        self._chunks = [missing[i : i + chunk_rows] for i in range(0, len(missing), chunk_rows)]
        self._chunk_of = np.full(data.n_rows, -1, dtype=np.int64)
        for number, rows in enumerate(self._chunks):
            self._chunk_of[rows] = number
        self._waiting: deque[tuple[np.ndarray, AgreedFuture[np.ndarray]]] = deque()
        self._submitted = self._done = 0
        self._ask: Callable[[int], AgreedFuture[np.ndarray]] | None = None
        self.cached = not self._chunks

    def _unknown(self) -> np.ndarray:
        return np.full((self.data.n_rows, len(self._columns)), np.nan)

    def _load(self) -> np.ndarray:
        """float64 (rows, sequences of a row), NaN where nothing is known yet."""
        why = f"{self.path} is damaged"
        try:
            if self._is_kept():
                import pyarrow as pa

                with pa.memory_map(str(self.path / FILE)) as source:
                    table = pa.ipc.open_file(source).read_all()
                return np.stack([table[name].to_numpy() for name in self._columns], axis=1)
            if not self.path.exists():
                return self._unknown()
        except OSError as error:
            why = str(error)
        self.notes.append(f"the reference's log-probabilities are computed again: {why}")
        return self._unknown()

    def _is_kept(self) -> bool:
        """True where a whole artifact of this reference and data is in place."""
        try:
            manifest = read_manifest(self.path)
        except UserError:
            return False
        return manifest is not None and manifest.fingerprint == self.key and not verify(self.path, manifest)

    def start(self, view: View) -> None:
        """Begin on the first chunks, without waiting for them."""
        if self.cached:
            return

        def ask(number: int) -> AgreedFuture[np.ndarray]:
            return view.logprobs(self.data.batch(self._chunks[number]), self.ld_alpha)

        self._ask = ask
        self._fill(0)

    def columns(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The reference's columns of the given rows; waits for their chunks."""
        self._wait_for(int(self._chunk_of[rows].max()))
        return {name: self.logps[rows, place] for place, name in enumerate(self._columns)}

    def _fill(self, needed: int) -> None:
        """Keep the reference's ranks busy up to a window beyond the chunk that is needed now."""
        while self._ask and self._submitted < min(len(self._chunks), needed + CHUNKS_AHEAD):
            self._waiting.append((self._chunks[self._submitted], self._ask(self._submitted)))
            self._submitted += 1

    def _wait_for(self, number: int) -> None:
        if self.cached:
            return
        self._fill(number + 1)
        while self._done <= number:
            rows, pending = self._waiting.popleft()
            self.logps[rows] = pending.result().reshape(-1, len(self._columns))
            self._done += 1
        if self._done == len(self._chunks):
            self.cached = True
            try:
                self._keep()
            except (RunFailure, OSError) as error:
                why = error.reason if isinstance(error, RunFailure) else str(error)
                self.notes.append(
                    f"the reference's log-probabilities are not kept for the next run, which computes them "
                    f"again: {why}"
                )

    def _keep(self) -> None:
        """Write the artifact; a run with the same reference and data picks it up.

        Two runs may do so at once, so each writes under a name of its own, and the last rename stays.
        """
        import pyarrow as pa

        manifest = Manifest(
            type="reference_logps",
            stage="reference",
            fingerprint=self.key,
            inputs={"reference": self._reference},
            data={"fingerprint": self.data.fingerprint, "rows": self.data.n_rows},
            versions=versions(),
        )
        table = pa.table({name: self.logps[:, place] for place, name in enumerate(self._columns)})
        self._drop_abandoned()
        own = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex[:12]}")
        with (
            new_directory(own, manifest) as aside,
            pa.OSFile(str(aside / FILE), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as writer,
        ):
            writer.write_table(table)
        try:
            if not _take_place(own, self.path) and not self._is_kept():
                shutil.rmtree(self.path)
                _take_place(own, self.path)
        finally:
            shutil.rmtree(own, ignore_errors=True)

    def _drop_abandoned(self) -> None:
        """Remove what killed runs left half-written here."""
        folder, name = self.path.parent, self.path.name
        for left in (*folder.glob(f"{name}.*"), *folder.glob(f".{name}.*")):
            # Another run may be faster.
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                    shutil.rmtree(left)

    def finish(self) -> None:
        """Wait for what training never asked for, so that the kept artifact is whole."""
        self._wait_for(len(self._chunks) - 1)


class ReferenceFeed:
    """Reference log-probabilities of a stage's training rows and of its held-out rows."""

    def __init__(self, train: ReferenceLogps, held_out: ReferenceLogps | None) -> None:
        self.train, self.held_out = train, held_out

    def parts(self) -> list[ReferenceLogps]:
        return [part for part in (self.train, self.held_out) if part is not None]

    def notes(self) -> list[str]:
        """Remarks for the user on what could not be read or kept."""
        return list(dict.fromkeys(note for part in self.parts() for note in part.notes))

    @property
    def cached(self) -> bool:
        """True where nothing has to be computed."""
        return all(part.cached for part in self.parts())

    def columns(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return self.train.columns(rows)

    def eval_columns(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        assert self.held_out is not None
        return self.held_out.columns(rows)

    def start(self, view: View) -> None:
        for part in self.parts():
            part.start(view)

    def finish(self) -> None:
        for part in self.parts():
            part.finish()


def _take_place(own: Path, place: Path) -> bool:
    """Rename a directory to a name that is free; False where another run was faster."""
    try:
        os.rename(own, place)
    except OSError as error:
        if place.is_dir():
            return False
        raise error
    return True


def first_use_order(order: BatchOrder) -> np.ndarray:
    """Rows that training uses, each once, in the order in which it first does."""
    steps = min(len(order), order.steps_per_epoch)
    return np.concatenate([order[step] for step in range(steps)])
