"""A run folder that several processes share, and one of several training seeds."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from distill.evaluation.results import parse_metrics
from distill.evaluation.seeds import combine, run_folders
from distill.experiment.folder import LOCKS
from distill.experiment.run import Run
from distill.files import whole_folder, write_json
from distill.processes import process_state
from distill.report import terminal_summary, terminal_table, write_report


@dataclass(frozen=True)
class Job:
    """call: makes one part of a run, or reads it if it is there. needs: names of jobs that have to be done before."""

    call: Callable[[], None]
    needs: Sequence[str] = ()


def share_out(run: Run, jobs: dict[str, Job]) -> None:
    """Do all jobs; if other processes share the run folder, each does those that no other is at, and waits for the
    rest.

    The locks are the operating system's and end with their process. Under `accelerate launch` with several processes
    these do every job together, in order; the folder is then theirs alone, see `held`.
    """
    if run.accelerator.num_processes > 1:
        for job in jobs.values():
            job.call()
        return
    waiting, told = list(jobs), False
    locks = run.folder / LOCKS
    locks.mkdir(exist_ok=True)
    while waiting:
        ready = [name for name in waiting if not set(jobs[name].needs) & set(waiting)]
        done = next((name for name in ready if _did(jobs[name], locks / name)), None)
        if done is not None:
            waiting.remove(done)
            continue
        if not told:
            run.say(f"waiting for {', '.join(waiting)}, which another process is at")
        told = True
        time.sleep(2)


def _did(job: Job, path: Path) -> bool:
    """Do a job, unless another process is at it."""
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        return False
    try:
        job.call()
    finally:
        lock.release()
    return True


def share_base(folders: Sequence[Path], target: Path) -> None:
    """Copy the base's evaluation from another seed's folder in `folders`, since no seed changes it; `evaluate_arm`
    checks what it is of."""
    if target.exists() or not process_state().is_main_process:
        return
    runs = (path for folder in folders for path in run_folders(folder).values())
    for path in (path for path in runs if (path / "base").is_dir()):
        with suppress(OSError), whole_folder(target) as partial:  # another process may be first
            shutil.copytree(path / "base", partial, dirs_exist_ok=True)
        return


def finish_seeds(folder: Path, compare_to: Sequence[str]) -> None:
    """metrics.json and report of all seeds in `folder`, the table in the terminal, and the paths."""
    if not process_state().is_main_process:
        return
    metrics = combine(folder, compare_to=compare_to)
    results = parse_metrics(metrics)
    write_json(folder / "metrics.json", metrics)
    report = write_report(folder)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(terminal_table(metrics))
    console.print(terminal_summary(results))
    seeds = ", ".join(map(str, metrics["provenance"]["seeds"]["training"]))
    console.print(f"seeds {seeds}\nreport: {report}\nnumbers: {folder / 'metrics.json'}")
