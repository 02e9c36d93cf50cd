"""``ckptavg inspect --verify``."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

from ckptavg.cli.console import Report
from ckptavg.errors import IntegrityError, first_few
from ckptavg.errors.printable import split_directory
from ckptavg.inspection.verify import Finding, verify
from ckptavg.runs.run import Run


def show(report: Report, path: str, run: Run, key: str | None) -> None:
    """Verify the checkpoints of a run, and the averages beside them that record digests.

    Args:
        report: Shows the findings.
        path: The path as the user gave it.
        run: The checkpoints to verify.
        key: Dotted path of the entry that holds the weights; None to find the entry.

    Raises:
        IntegrityError: Something is not what it was, or nothing was recorded.
    """
    with report.bytes_progress("verifying") as progress:
        findings = verify(run, key=key, progress=progress)
    if all(f.state == "nothing recorded" for f in findings):
        raise IntegrityError(
            f"nothing was recorded that {path} could be verified by",
            "`ckptavg average --digests` records digests.",
        )
    directory, names = split_directory([finding.path for finding in findings])
    rows = []
    for name, finding in zip(names, findings, strict=True):
        is_changed = finding.state == "changed"
        rows.append((name, finding.part, finding.state.upper() if is_changed else finding.state))
    report.table(("file", "part", "result"), rows, title=directory)
    for finding in findings:
        if finding.why:
            report.line(f"{finding.path}: {finding.why}")
    report.result({"path": path, "verified": [asdict(finding) for finding in findings]})
    wrong = [f for f in findings if f.wrong]
    if wrong:
        raise _failure(wrong)
    states = Counter(f.state for f in findings)
    report.line(", ".join(f"{count} {state}" for state, count in states.items()))


def _failure(wrong: list[Finding]) -> IntegrityError:
    descriptions = [f"{f.part} {f.path} ({f.state})" for f in wrong]
    return IntegrityError(
        f"not what was recorded: {first_few(descriptions)}",
        "Restore the file from a copy, or average again from intact checkpoints.",
    )
