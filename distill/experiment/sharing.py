"""A run folder that several processes share, and one of several training seeds."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from filelock import FileLock, Timeout
from rich.console import Console

from distill.cli import to_yaml
from distill.config import RunConfig
from distill.errors import UserError
from distill.evaluation.results import parse_metrics
from distill.evaluation.seeds import combine, run_folders
from distill.experiment.run import Run
from distill.files import write_json
from distill.processes import process_state
from distill.report import terminal_summary, terminal_table, write_report


@dataclass(frozen=True)
class Job:
    """call: makes one part of a run, or reads it if it is there. needs: names of jobs that have to be done before."""

    call: Callable[[], None]
    needs: Sequence[str] = ()


def share_out(run: Run, jobs: dict[str, Job]) -> None:
    """Do all jobs; if other processes share the run folder, each does those that no other is at, and waits for the rest.

    The locks are the operating system's and end with their process. Under `accelerate launch` with several processes
    these do every job together, in order.
    """
    waiting = list(jobs)
    locks = run.folder / ".locks"
    locks.mkdir(exist_ok=True)
    if run.accelerator.num_processes > 1:
        whole = FileLock(locks / "all", blocking=False)
        if run.accelerator.is_main_process:
            try:
                whole.acquire()
            except Timeout:
                raise UserError(
                    f"another launch is at {run.folder}; wait for it, or choose another output_dir"
                ) from None
        for name in waiting:
            jobs[name].call()
        whole.release()
        return
    told = False
    while waiting:
        for name in waiting:
            if set(jobs[name].needs) & set(waiting):
                continue
            try:
                with FileLock(locks / name, blocking=False):
                    jobs[name].call()
            except Timeout:
                continue
            waiting.remove(name)
            break
        else:
            if not told:
                run.say(f"waiting for {', '.join(waiting)}, which another process is at")
            told = True
            time.sleep(2)


def share_base(folder: Path, config: RunConfig) -> None:
    """Copy the base's evaluation from another seed of the same configuration, since no seed changes it."""
    target = Path(config.output_dir) / "base"
    if target.exists() or not process_state().is_main_process:
        return
    ignored = {"seeds": [], "output_dir": ""}
    for path in run_folders(folder).values():
        other = cast(dict[str, Any], yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")))
        mine = cast(dict[str, Any], yaml.safe_load(to_yaml(config)))
        if {**other, **ignored} == {**mine, **ignored}:
            partial = target.with_name(f"base.{os.getpid()}.partial")
            shutil.copytree(path / "base", partial)
            try:
                partial.rename(target)
            except OSError:  # another process was first
                shutil.rmtree(partial)
            return


def finish_seeds(folder: Path, compare_to: Sequence[str]) -> None:
    """metrics.json and report of all seeds in `folder`, the table in the terminal, and the paths."""
    if not process_state().is_main_process:
        return
    metrics = combine(folder, compare_to=compare_to)
    results = parse_metrics(metrics)
    write_json(folder / "metrics.json", metrics)
    html, markdown = write_report(folder)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(terminal_table(metrics))
    console.print(terminal_summary(results))
    seeds = ", ".join(map(str, metrics["provenance"]["seeds"]["training"]))
    console.print(f"seeds {seeds}\nreport: {html}\n        {markdown}\nnumbers: {folder / 'metrics.json'}")
