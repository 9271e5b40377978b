"""Mutation testing: puts small faults into distill/, one at a time, and looks whether a fast test sees each.

    python tests/mutation/driver.py --count 300             # prints the kill rate of each room

Each fault is written into a private copy of the tree, and the tests that run its line are run there, the quickest
first, in a process forked from one that has already imported torch. Which tests run which lines is recorded once a test
file, with coverage, in .mutants/map/, and again when the file changes. Verdicts are lines of .mutants/verdicts.jsonl;
the same command continues after a stop. Needs Linux, and `pip install coverage`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import functools
import hashlib
import importlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from mutants import Mutant, mutants_of, parses, sample

ROOT = Path(__file__).parents[2]
WORK = ROOT / ".mutants"
EQUIVALENT = Path(__file__).with_name("equivalent.json")
PYTEST = ("-q", "-p", "no:cacheprovider")
CHUNKS = (4.0, 30.0)
"""Seconds of tests after which the next, slower ones are collected."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="how many mutants (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="which mutants (default 0)")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first so many of the sample")
    parser.add_argument("--only", default="", help="only modules whose path has this regular expression")
    parser.add_argument("--seconds", type=float, default=60.0, help="tests of one mutant, by their recorded time")
    parser.add_argument("--stale", action="store_true", help="test files that changed since are not recorded anew")
    parser.add_argument("--again", action="store_true", help="run the survivors of verdicts.jsonl again, nothing new")
    arguments = parser.parse_args()
    import_libraries()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = private_copy(Path(folder))
        tests = Tests(record(tree, arguments.stale))
        sources = {path: (tree / path).read_text(encoding="utf-8") for path in modules(tree)}
        survived = {entry["name"] for entry in verdicts() if entry["verdict"] == "survived"}
        done = {entry["name"] for entry in verdicts()} - (survived if arguments.again else set())
        chosen = [m for m in drawn(sources, arguments) if not arguments.again or m.name in survived]
        for place, mutant in enumerate(chosen, 1):
            if mutant.name not in done:
                entry = judge(mutant, sources[mutant.module], tree, tests, arguments.seconds)
                print(f"{place}/{len(chosen)} {entry['verdict']} {entry['seconds']} s  {mutant.name[:150]}", flush=True)
                with (WORK / "verdicts.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
        report({mutant.name for mutant in drawn(sources, arguments)}, tree)


def modules(root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in sorted((root / "distill").rglob("*.py"))]


def drawn(sources: dict[str, str], arguments: argparse.Namespace) -> Iterator[Mutant]:
    chosen = {module: source for module, source in sources.items() if re.search(arguments.only, module)}
    lines = {module: len(source.splitlines()) for module, source in chosen.items()}
    mutants = sample({module: mutants_of(module, source) for module, source in chosen.items()}, lines, arguments.seed)
    legal = (mutant for mutant in mutants if parses(mutant.apply(sources[mutant.module])))
    return itertools.islice(legal, arguments.skip, arguments.skip + arguments.count)


def import_libraries() -> None:
    """Import what the library and its tests import of others, so that a forked process need not."""
    own = {"distill"} | {
        path.stem for folder in ("tests", "tests/goldens", "recipes") for path in (ROOT / folder).glob("*.py")
    }
    for path in itertools.chain((ROOT / "distill").rglob("*.py"), (ROOT / "tests").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [(alias.name, "") for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [(node.module, alias.name) for alias in node.names]
            for module, name in names:
                if module.split(".")[0] not in own:
                    with contextlib.suppress(ImportError):  # optional
                        getattr(importlib.import_module(module), name or "__name__", None)


def private_copy(folder: Path) -> Path:
    """The tree as it is, what git ignores left out, with real data beside it where there are."""
    tree = folder / "tree"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    if (ROOT.parent / "shared").is_dir():
        (folder / "shared").symlink_to(ROOT.parent / "shared")
    return tree


def forked(work: Callable[[], int], tree: Path, seconds: float) -> int | None:
    """Exit status of `work` in a new process that sees the private copy; None after too many seconds."""
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        status = 70
        try:
            os.setsid()
            os.chdir(tree)
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 1)
                os.dup2(null.fileno(), 2)
            sys.path[:] = [
                str(tree),
                *(path for path in sys.path if path not in (str(ROOT), str(Path(__file__).parent))),
            ]
            os.environ["PYTHONPATH"] = str(tree)
            del sys.modules["__main__"].__file__  # processes that a test spawns would import this file
            status = work()
        finally:
            os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            stop(pid)  # what it started
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    stop(pid)
    os.waitpid(pid, 0)
    return None


def stop(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


# Which tests run which lines


class Recorder:
    """pytest plugin: lines of distill/ that each test runs, itself or in a fixture that it shares with others."""

    def __init__(self, tree: Path) -> None:
        import coverage

        self.tests: dict[str, dict[str, Any]] = {}
        self.shared: dict[str, float] = defaultdict(float)
        self.context, self.setup = "", 0.0
        self.coverage = coverage.Coverage(data_file=None, source=[str(tree / "distill")], config_file=False)
        self.coverage.start()

    def switch(self, context: str) -> str:
        before, self.context = self.context, context
        self.coverage.switch_context(context)
        return before

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: Any) -> None:
        self.switch(item.nodeid)
        self.tests[item.nodeid] = {"seconds": 0.0, "passed": True, "fixtures": list(item.fixturenames)}

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[None]:
        if fixturedef.scope == "function":
            return (yield)
        before, start = self.switch(f"fixture {fixturedef.argname}"), time.perf_counter()
        try:
            return (yield)
        finally:
            seconds = time.perf_counter() - start
            self.shared[fixturedef.argname] += seconds
            self.setup += seconds
            self.switch(before)

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = self.tests[report.nodeid]
        test["seconds"] += max(0.0, report.duration - self.setup)
        test["passed"] &= report.passed
        self.setup = 0.0

    def lines(self, tree: Path) -> tuple[list[str], dict[str, dict[int, list[int]]]]:
        """Contexts, and module -> line -> which of them."""
        self.coverage.stop()
        data = self.coverage.get_data()
        contexts = sorted(data.measured_contexts())
        place = {context: index for index, context in enumerate(contexts)}
        found = {}
        for file in data.measured_files():
            by_line = data.contexts_by_lineno(file)
            found[str(Path(file).relative_to(tree))] = {
                line: sorted(place[context] for context in some) for line, some in sorted(by_line.items()) if some
            }
        return contexts, found


class NoDeadline:
    """pytest plugin: a slow machine is no failure."""

    def pytest_sessionstart(self) -> None:
        settings.register_profile("mutants", settings.get_profile("repeatable"), deadline=None)
        settings.load_profile("mutants")


def record(tree: Path, stale: bool) -> list[dict[str, Any]]:
    """The maps of all test files; one that has none, or unless `stale` one of other content, is run."""
    found = []
    for test in sorted((tree / "tests").glob("test_*.py")):
        content, path = digest(test.read_text(encoding="utf-8")), WORK / "map" / f"{test.stem}.json"
        if not path.exists() or (json.loads(path.read_text(encoding="utf-8"))["content"] != content and not stale):
            print(f"recording {test.name}", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            forked(lambda test=test, content=content, path=path: record_file(test, content, path, tree), tree, 1800)
        if path.exists():
            found.append(json.loads(path.read_text(encoding="utf-8")))
    return found


def record_file(test: Path, content: str, path: Path, tree: Path) -> int:
    recorder = Recorder(tree)
    pytest.main([str(test.relative_to(tree)), *PYTEST, f"--basetemp={tree.parent / 'tmp'}"], [recorder, NoDeadline()])
    contexts, lines = recorder.lines(tree)
    sources = {}
    for module in lines:
        text = (tree / module).read_text(encoding="utf-8")
        sources[module] = digest(text)
        (WORK / "sources").mkdir(exist_ok=True)
        (WORK / "sources" / sources[module]).write_text(text, encoding="utf-8")
    record = {"content": content, "file": str(test.relative_to(tree)), "sources": sources, "tests": recorder.tests,
              "shared": recorder.shared, "contexts": contexts, "lines": lines}  # fmt: skip
    path.write_text(json.dumps(record), encoding="utf-8")
    return 0


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Tests:
    """Which tests can see a mutant, the quickest first."""

    def __init__(self, maps: list[dict[str, Any]]) -> None:
        self.maps = maps

    def of(self, mutant: Mutant, source: str, seconds: float) -> list[tuple[str, float]]:
        """(test, its seconds), of as many tests as there is time for: first those that run the lines; then, if lines
        run when the module is imported or in another process, those that run any of the module, and those that import
        it."""
        found = []
        for one in self.maps:
            lines = self.lines_now(one, mutant.module, source)
            if not lines:
                continue
            contexts = {
                context for line in range(mutant.start[0], mutant.end[0] + 1) for context in lines.get(line, ())
            }
            above = [line for line in lines if mutant.start[0] - 8 <= line < mutant.start[0]]
            if not contexts and above:
                contexts = set(lines[max(above)])
            touching = {context for some in lines.values() for context in some if context}
            for name, test in one["tests"].items():
                mine = {name, *(f"fixture {fixture}" for fixture in test["fixtures"])}
                rank = 0 if mine & contexts else 1 if mine & touching else 2
                if test["passed"] and (rank == 0 or not contexts - {""}):
                    shared = {(one["file"], f): one["shared"].get(f, 0.0) for f in test["fixtures"]}
                    found.append((rank, test["seconds"] + sum(shared.values()), name, test["seconds"], shared))
        chosen, spent, ready = [], 0.0, set()
        for _, _, name, own, shared in sorted(found, key=lambda entry: entry[:3]):
            cost = own + sum(value for fixture, value in shared.items() if fixture not in ready)
            if spent + cost <= seconds or not chosen:
                chosen.append((name, cost))
                spent += cost
                ready |= set(shared)
        return chosen

    def lines_now(self, one: dict[str, Any], module: str, source: str) -> dict[int, list[str]]:
        """Line of the module as it is now -> contexts."""
        names, lines = one["contexts"], one["lines"].get(module, {})
        moved = renumbered(one["sources"].get(module, ""), source) if lines else {}
        return {moved[int(k)]: [names[c] for c in some] for k, some in lines.items() if int(k) in moved}


@functools.cache
def renumbered(recorded: str, source: str) -> dict[int, int]:
    """Line of the recorded source -> line of the same text now."""
    old = (WORK / "sources" / recorded).read_text(encoding="utf-8").splitlines()
    if recorded == digest(source):
        return {line: line for line in range(1, len(old) + 1)}
    blocks = difflib.SequenceMatcher(None, old, source.splitlines(), autojunk=False).get_matching_blocks()
    return {block.a + i + 1: block.b + i + 1 for block in blocks for i in range(block.size)}


# Verdicts

TIMES = itertools.count(1_000_000_000)


class Chosen:
    """pytest plugin: only these tests, in this order; writes the name of one that fails."""

    def __init__(self, names: Sequence[str], failure: Path) -> None:
        self.order, self.failure = {name: place for place, name in enumerate(names)}, failure

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda item: self.order[item.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            with self.failure.open("a") as file:
                file.write(report.nodeid + "\n")


def run_tests(chosen: Sequence[tuple[str, float]], tree: Path, failure: Path) -> int:
    """Exit status of pytest: 0 if all pass. Quick tests are run before the files of slower ones are even imported."""
    limits = [*CHUNKS, math.inf]
    spent, chunks = 0.0, defaultdict(list)
    for name, seconds in chosen:
        spent += seconds
        chunks[next(limit for limit in limits if spent <= limit)].append(name)
    for names in chunks.values():
        files = sorted({name.split("::")[0] for name in names})
        options = [*PYTEST, "-x", f"--basetemp={tree.parent / 'tmp'}"]
        status = int(pytest.main([*files, *options], [Chosen(names, failure), NoDeadline()]))
        if status not in (0, 5):
            return status
    return 0


def judge(mutant: Mutant, source: str, tree: Path, tests: Tests, seconds: float) -> dict[str, Any]:
    chosen, start = tests.of(mutant, source, seconds), time.monotonic()
    failure = tree.parent / "failure"
    failure.unlink(missing_ok=True)
    write(tree / mutant.module, mutant.apply(source))
    try:
        limit = 30 + 4 * sum(cost for _, cost in chosen)
        status = forked(lambda: run_tests(chosen, tree, failure), tree, limit) if chosen else 0
    finally:
        write(tree / mutant.module, source)
    by = (
        "time limit" if status is None else failure.read_text().split("\n")[0] if failure.exists() else f"exit {status}"
    )
    line = source.splitlines()[mutant.start[0] - 1].strip()
    return {"name": mutant.name, "verdict": "survived" if status == 0 else "killed", "by": by if status != 0 else None,
            "module": mutant.module, "line": line, "change": mutant.change, "tests": len(chosen),
            "seconds": round(time.monotonic() - start, 1)}  # fmt: skip


def write(path: Path, text: str) -> None:
    """Each content gets a time of its own, by which Python knows whether the compiled file is of it."""
    path.write_text(text, encoding="utf-8")
    now = next(TIMES)
    os.utime(path, (now, now))


def verdicts() -> list[dict[str, Any]]:
    """The last verdict on each mutant."""
    path = WORK / "verdicts.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return list({entry["name"]: entry for entry in map(json.loads, lines)}.values())


def report(names: set[str], tree: Path) -> None:
    """Print the kill rate of each room, the survivors, and which tests that killed fail without a fault, too."""
    equivalent = {(e["module"], e["line"], e["change"]) for e in json.loads(EQUIVALENT.read_text(encoding="utf-8"))}
    rooms: dict[str, Counter[str]] = defaultdict(Counter)
    entries = [entry for entry in verdicts() if entry["name"] in names]
    for entry in entries:
        if (entry["module"], entry["line"], entry["change"]) in equivalent and entry["verdict"] == "survived":
            entry["verdict"] = "equivalent"
        rooms[entry["module"].split("/")[1]][entry["verdict"]] += 1
    rooms["all"] = sum(rooms.values(), Counter())
    print("\nsurvived:")
    for entry in entries:
        if entry["verdict"] == "survived":
            print(f"  {entry['name']}  ({entry['tests']} tests)")
    print(f"\n{'room':<20}{'killed':>8}{'survived':>10}{'equivalent':>12}{'kill rate':>11}")
    for room, found in rooms.items():
        rate = found["killed"] / max(1, found["killed"] + found["survived"])
        print(f"{room:<20}{found['killed']:>8}{found['survived']:>10}{found['equivalent']:>12}{rate:>10.1%}")
    killers = [(entry["by"], 1.0) for entry in entries if "::" in (entry["by"] or "")]
    failure = tree.parent / "failure"
    failure.unlink(missing_ok=True)
    forked(lambda: run_tests([*dict(killers).items()], tree, failure), tree, 3600)
    print("\nfails without a fault:", failure.read_text() if failure.exists() else "none")


if __name__ == "__main__":
    main()
