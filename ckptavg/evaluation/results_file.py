"""File of results, as JSON or CSV, that several processes may extend."""

from __future__ import annotations

import csv
import io
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ckptavg.display.json_text import json_text
from ckptavg.errors import OutputError, UsageError
from ckptavg.errors.printable import escape_unseen, without_secrets
from ckptavg.errors.system import guard_reads, guard_writes
from ckptavg.io import bounded_json
from ckptavg.io.atomic import Publication
from ckptavg.io.lock import lock_beside
from ckptavg.io.paths import check_output

Entry = Mapping[str, Any]

_CANDIDATES = "candidates"
_KEY = "key"
# Columns of every CSV file of results; a file without these is something else.
_COLUMNS = {"name", "kind", "checkpoints", "coefficients"}
_NESTED = ("metrics", "versus", "reliability", "bn_layers", _KEY)
_ELSEWHERE = "Name another file for the results, or move that one away."


def open_results(path: str | os.PathLike[str] | None, *, resume: bool) -> ResultsFile | None:
    """Return the file of results at a path; None where no file is wanted.

    Args:
        path: Local path that ends in ``.json`` or ``.csv``.
        resume: True to continue the results in the file, which only JSON allows.

    Raises:
        UsageError: The path has another suffix or is a URL, or CSV is to be continued.
    """
    suffix = ""
    if path is not None:
        suffix = Path(path).suffix
        if suffix not in (".json", ".csv"):
            raise UsageError(f"`results` is expected to end in .json or .csv but got {path}")
    if resume and suffix != ".json":
        raise UsageError("`resume` needs a `results` file that ends in .json")
    if path is None:
        return None
    check_output(path)
    return ResultsFile(Path(path))


class ResultsFile:
    """File of results with a key per candidate; several processes may add results concurrently.

    A file with other content is never replaced.

    Args:
        path: Path that ends in ``.json`` or ``.csv``. A link is followed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Publishing replaces the file at a path, which would replace a link instead of the target.
        self._target = Path(os.path.realpath(path))
        self._format = _JsonFormat() if path.suffix == ".json" else _CsvFormat()

    def check(self, *, resume: bool = False) -> None:
        """Make sure before any work that results can be stored.

        Args:
            resume: True to continue the results in the file, if there is one.

        Raises:
            OutputError: Results cannot be stored, or the file has other content.
        """
        size = self._size()
        outcome = "is not replaced"
        if resume:
            outcome = "cannot be resumed"
        with self._refuse_other_content(outcome):
            # An empty file, as mktemp makes, is fine for new results but cannot be continued.
            if size or (resume and size is not None):
                self._parse()
        # Only a trial shows whether disk, directory and file name permit writing. Another process
        # that adds results at this moment must not be disturbed.
        with guard_writes(self.path), lock_beside(self._target), self._publication():
            pass

    def entries(self) -> list[Entry]:
        """Read the stored results; empty if the file is missing or empty.

        Raises:
            OutputError: The file has other content.
        """
        if not self._size():
            return []
        with self._refuse_other_content("cannot be read"):
            return self._parse()

    def merge(self, results: Sequence[Entry]) -> int:
        """Add results to the file and replace results with the same keys.

        Args:
            results: Outputs of ``Result.as_json``, with a ``key`` each.

        Returns:
            The number of results of other candidates in the file.

        Raises:
            OutputError: The file has other content, or cannot be written.
        """
        added = [self._format.entry(result) for result in results]
        # Without the lock, results that another process adds in between would be lost.
        with lock_beside(self._target):
            stored = self.entries()
            retained = _drop_superseded(stored, added)
            text = self._format.text([*retained, *added])
            # Unchanged text is not written again: a write on a full disk would fail needlessly.
            if not stored or text != self._format.text(stored):
                self._write(text)
        return len(retained)

    def _parse(self) -> list[Entry]:
        with guard_reads(self.path):
            return self._format.parse(self._target)

    def _write(self, text: str) -> None:
        with guard_writes(self.path), self._publication() as publication:
            # newline="" keeps line ends as they are, the same on every system.
            publication.temporary.write_text(text, encoding="utf-8", newline="")
            publication.publish()

    def _publication(self) -> Publication:
        return Publication(self._target, directory=False, overwrite=True)

    def _size(self) -> int | None:
        """Return the size of the file in bytes; None if the file does not exist.

        Raises:
            OutputError: The path is not a regular file, or cannot be accessed.
        """
        with guard_writes(self.path):
            if not self._target.parent.is_dir():
                raise OutputError(
                    f"the directory {self._target.parent} does not exist", "Create it first."
                )
            try:
                info = self._target.stat()
            except FileNotFoundError:
                return None
        if not stat.S_ISREG(info.st_mode):
            raise OutputError(f"{self.path} is not a regular file", _ELSEWHERE)
        return info.st_size

    @contextmanager
    def _refuse_other_content(self, outcome: str) -> Iterator[None]:
        """Turn the error of a file that does not parse into a refusal.

        Args:
            outcome: Verb phrase for what is not done to the file.
        """
        try:
            yield
        except ValueError as error:
            raise OutputError(
                f"{self.path} {outcome}: it does not hold results of this command", _ELSEWHERE
            ) from error


class _JsonFormat:
    """JSON layout: results under ``candidates``; other entries of the file are kept."""

    def __init__(self) -> None:
        self._other_entries: dict[str, Any] = {}

    def parse(self, path: Path) -> list[Entry]:
        """Read the results in a file.

        Raises:
            ValueError: The file has other content.
        """
        content = bounded_json.read(path)
        if not isinstance(content, dict):
            raise ValueError("it is no object")  # noqa: TRY004 - a file's fault, not a caller's
        entries = content.pop(_CANDIDATES, None)
        if not isinstance(entries, list) or not all(map(_is_result, entries)):
            raise ValueError("it has no candidates")
        self._other_entries = content
        return entries

    def entry(self, result: Entry) -> Entry:
        """Return a result in the form of the file's entries."""
        return result

    def text(self, entries: Sequence[Entry]) -> str:
        """Write the file's text."""
        return json_text({_CANDIDATES: entries, **self._other_entries})


class _CsvFormat:
    """CSV layout: a row per result, columns for metrics and comparison, no bins, the key last."""

    def parse(self, path: Path) -> list[Entry]:
        """Read the rows of a file.

        Raises:
            ValueError: The file has other content.
        """
        # Spreadsheet programs write a byte-order mark.
        text = bounded_json.read_text(path).decode("utf-8-sig")
        # Lists of many checkpoints exceed the default limit. The limit holds for the whole process,
        # so it is restored below.
        limit = csv.field_size_limit(max(len(text), 1))
        try:
            reader = csv.DictReader(io.StringIO(text, newline=""))
            rows: list[Entry] = list(reader)
        except csv.Error as error:
            raise ValueError("it is no CSV") from error
        finally:
            csv.field_size_limit(limit)
        # DictReader keeps surplus cells of a row under None.
        if not _COLUMNS.issubset(reader.fieldnames or ()) or any(None in row for row in rows):
            raise ValueError("it has other columns")
        return rows

    def entry(self, result: Entry) -> Entry:
        """Make a result's row."""
        row = {name: value for name, value in result.items() if name not in _NESTED}
        row |= result["metrics"]
        for name, value in result.get("versus", {}).items():
            row[f"versus_{name}"] = value
        cells = {name: _cell(value) for name, value in row.items()}
        return cells | {_KEY: result[_KEY]}

    def text(self, entries: Sequence[Entry]) -> str:
        """Write the file's text."""
        # A dict for the order of first appearance.
        columns: dict[str, None] = {}
        for row in entries:
            columns |= dict.fromkeys(row)
        columns.pop(_KEY, None)
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, [*columns, _KEY], lineterminator="\n")
        writer.writeheader()
        writer.writerows(entries)
        return buffer.getvalue()


def _drop_superseded(stored: Sequence[Entry], added: Sequence[Entry]) -> list[Entry]:
    """Drop stored entries that added entries supersede; entries without a key match by name."""
    keys = {entry[_KEY] for entry in added}
    names = {entry["name"] for entry in added}
    retained = []
    for entry in stored:
        is_superseded = entry["name"] in names
        if entry.get(_KEY):
            is_superseded = entry[_KEY] in keys
        if not is_superseded:
            retained.append(entry)
    return retained


def _is_result(entry: Any) -> bool:
    """Tell a candidate's result from whatever else a JSON file may list."""
    if not isinstance(entry, dict) or not isinstance(entry.get("metrics"), dict):
        return False
    texts = (entry.get("name"), entry.get("kind"), entry.get("bn"), entry.get(_KEY, ""))
    return all(isinstance(text, str) for text in texts)


def _cell(value: Any) -> Any:
    """Convert a value to a CSV cell: lists joined by semicolons, text without secrets."""
    if isinstance(value, list):
        return ";".join(str(_cell(item)) for item in value)
    if isinstance(value, str):
        return escape_unseen(without_secrets(value))
    return value
