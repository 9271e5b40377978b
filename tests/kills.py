"""Runs recipes in child processes that the system kills at one file operation; see test_kills.py.

As a script it is the server of these children: it imports the libraries once, and forks a child for each line of its
input.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")
"""Audit events that change files, besides those of `open`."""
LIBRARIES = (
    "diffusers.guiders", "diffusers.loaders.peft", "matplotlib.backends.backend_svg", "peft.tuners.lora.bnb",
    "transformers.models.clip.modeling_clip", "distill.experiment.sharing", "distill.experiment.single",
)  # fmt: skip
"""Imported once, for all runs."""
TORN_BYTES = 20
"""What of a file is on the disk when its writer is killed in the middle."""
TIMES = re.compile(r".*seconds.*|date|peak_memory_gb|files")
"""Keys in JSON that differ from run to run. files: hashes of files, of which those of maps have their tensors in no
order."""


@dataclass(frozen=True)
class Kill:
    """Before the file operation of this number, from 1 on, or before the first that begins with this text.

    torn: in the middle of the first file that it or a later operation writes, by the signal of the system's limit of
    file sizes, which lets no more run than SIGKILL does.
    """

    at: int | str
    torn: bool = False


@dataclass(frozen=True)
class Ended:
    """status: as of os.waitpid. operations: all until the end or the kill. output: of stdout and stderr."""

    status: int
    operations: list[str]
    output: str


class Server:
    """Runs recipes, each in a fresh child of a process that has imported the libraries."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(scratch)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def run(self, recipe: str, argv: list[str], folder: Path, kill: Kill | None = None) -> Ended:
        """A recipe with a command line; operations in `folder` count, and the kill is at one of them."""
        assert self._process.stdin is not None and self._process.stdout is not None
        job = {"recipe": recipe, "argv": argv, "folder": str(folder), "kill": asdict(kill) if kill else None}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        operations = (self._scratch / "operations").read_text(encoding="utf-8").splitlines()
        return Ended(status, operations, (self._scratch / "output").read_text(encoding="utf-8"))

    def close(self) -> None:
        self._process.communicate(timeout=60)


# --- what a run leaves ----------------------------------------------------------------------------------------------


def result_of(folder: Path) -> dict[str, object]:
    """All files of a run folder by name, each as what must be equal in two runs of one command."""
    return {
        path.relative_to(folder).as_posix(): _comparable(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def _comparable(path: Path) -> object:
    if path.name in ("maps.safetensors", "word_maps.safetensors", "features.safetensors"):
        return {name: (array.shape, array.tobytes()) for name, array in load_file(path).items()}
    if path.name.startswith("report.") or path.name == "manifest.json":  # with times, and hashes of files with times
        return path.stat().st_size > 0
    if path.name == "README.md":
        return re.sub(r"(?<=steps in )[^;,\n]+|(?<=date )[^,\n]+", "", path.read_text(encoding="utf-8"))
    if path.suffix == ".json":
        return without_times(json.loads(path.read_bytes()))
    if path.name.endswith("_log.jsonl"):
        return [without_times(json.loads(line)) for line in path.read_bytes().splitlines()]
    return path.read_bytes()


def without_times(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_times(entry) for key, entry in value.items() if not TIMES.fullmatch(key)}
    return [without_times(entry) for entry in value] if isinstance(value, list) else value


# --- in the server and its children ---------------------------------------------------------------------------------


def serve(scratch: Path) -> None:
    import torch

    for name in LIBRARIES:
        importlib.import_module(name)
    torch.set_num_threads(1)
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _child(json.loads(line), scratch)
        print(os.waitpid(child, 0)[1], flush=True)


def _child(job: dict[str, Any], scratch: Path) -> None:
    """Run one recipe and end; 0 is the exit status of a whole run."""
    from recipe import config_class_of, recipe_module

    from distill.cli import parse

    created = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    output, operations = (os.open(scratch / name, created) for name in ("output", "operations"))
    os.dup2(output, 1)
    os.dup2(output, 2)
    status = 1
    try:
        recipe = recipe_module(job["recipe"])
        config = parse(config_class_of(recipe), job["argv"])
        watch(Path(job["folder"]), operations, Kill(**job["kill"]) if job["kill"] else None)
        getattr(recipe, job["recipe"])(config)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def watch(folder: Path, operations: int, kill: Kill | None) -> None:
    """Write each operation that changes files in `folder` to a file descriptor, and kill this process at one of
    them."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        paths = changed_paths(event, arguments)
        if not any(path.startswith(f"{folder}/") for path in paths) or _does_nothing(event, paths[0]):
            return
        count += 1
        operation = f"{event} {' -> '.join(path.removeprefix(f'{folder}/') for path in paths)}"
        os.write(operations, f"{operation}\n".encode())
        if kill is None or not (count == kill.at or (isinstance(kill.at, str) and operation.startswith(kill.at))):
            return
        if not kill.torn:
            os.kill(os.getpid(), signal.SIGKILL)
        _kill_at_a_write(operations)

    _announce_native_writes()
    sys.addaudithook(hook)


def changed_paths(event: str, arguments: tuple[Any, ...]) -> list[str]:
    """Full paths that an audit event of the interpreter changes; none for one that changes no file."""
    if event == "open":
        path, _, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return [os.path.abspath(os.fsdecode(path))] if writes and isinstance(path, (str, bytes)) else []
    if event not in CHANGES:
        return []
    if event in ("os.rename", "os.link"):
        source, target, *folders = arguments
        return [_full(source, folders[0]), _full(target, folders[1])]
    return [_full(arguments[0], arguments[-1] if event != "os.truncate" else -1)]


def _does_nothing(event: str, path: str) -> bool:
    return os.path.lexists(path) == (event == "os.mkdir") if event in ("os.mkdir", "os.remove", "os.rmdir") else False


def _full(path: Any, folder: Any) -> str:
    """The path of an operation relative to the file descriptor of a folder, which shutil.rmtree uses."""
    above = os.readlink(f"/proc/self/fd/{folder}") if isinstance(folder, int) and folder >= 0 else ""
    return os.path.abspath(os.path.join(above, os.fsdecode(path)))


def _kill_at_a_write(*descriptors: int) -> None:
    """From now on the system kills this process when it writes more than TORN_BYTES of a file, whatever library writes.

    descriptors: of files outside that are no longer written, besides stdout and stderr.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2, *descriptors):
        os.dup2(nowhere, descriptor)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (TORN_BYTES, TORN_BYTES))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it


def _announce_native_writes() -> None:
    """Files that Rust and C++ open raise no audit event of their own."""
    import safetensors.torch
    import torch

    def announced(write: Callable[..., Any], place: int) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            path = arguments[place] if len(arguments) > place else options["filename"]
            if isinstance(path, (str, Path)):
                sys.audit("open", str(path), "wb", os.O_WRONLY | os.O_CREAT)
            return write(*arguments, **options)

        return call

    safetensors.torch.serialize_file = announced(safetensors.torch.serialize_file, 1)
    torch.save = announced(torch.save, 1)  # type: ignore[assignment]


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
