"""Runs small cases of the recipes and fingerprints what they leave, so that a rebuild can prove that no number changed.

    python harness.py --tree TREE --record                      # write values.json from TREE
    python harness.py --tree TREE --check                       # compare TREE with values.json
    python harness.py --tree TREE --cases a,b --dump DIR        # every value, one JSON file a case
    python harness.py --diff DIR_A DIR_B                        # two dumps, key by key

A case (cases.yaml) is a list of command lines, each run in a process of its own, forked from one that has the libraries
imported, on one thread, in an empty folder. What lies in the folder then becomes a flat dictionary

    "<folder>/<arm>/losses/<step>/<term>": number        "<folder>/<arm>/metrics/<dotted or nested key>": value
    "<folder>/<arm>/tensors/<part>/<name>": sha256       "<folder>/<arm>/pictures/<name>": sha256

values.json keeps a short hash of each (arm, kind). How the package lays out its files is known to the functions under
"what a run leaves" alone: when the layout changes, change these so that the keys stay the same.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import json
import os
import pkgutil
import platform
import runpy
import shlex
import shutil
import signal
import string
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
CASES, VALUES = HERE / "cases.yaml", HERE / "values.json"
PACKAGE = "distill"
PACKAGES = (
    "torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "torchmetrics", "safetensors", "tokenizers",
    "numpy", "scipy", "pillow",
)  # fmt: skip
"""Their versions are part of the record: the bits of the numbers are theirs too."""
KINDS = ("losses", "tensors", "metrics", "pictures")
ERROR = "error"
"""Key of the dictionary of a case that failed."""
Values = dict[str, Any]

ONE_THREAD = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Of the environment: one thread, no GPU, no network. Set before torch is imported, which only functions here do."""

# --- the machine ------------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """What the bits of the numbers depend on besides the code."""
    import torch

    cpu = {"model name": platform.processor(), "cpu family": "", "model": "", "stepping": ""}
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict.fromkeys(cpu, "")
        for line in info.read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            if name.strip() in fields:
                fields[name.strip()] = value.strip()
        cpu = fields
    found = {"cpu": cpu["model name"], "cpu_family_model_stepping": " ".join(list(cpu.values())[1:])}
    found["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    found |= {"machine": platform.machine(), "python": ".".join(platform.python_version_tuple()[:2])}
    return found | {name: importlib.metadata.version(name) for name in PACKAGES}


def environment_differences(recorded: dict[str, str]) -> list[str]:
    """What differs from the record, one text each; numbers can be compared only where there is none."""
    now = environment()
    return [f"{k}: recorded {recorded.get(k)!r}, here {now.get(k)!r}" for k in now if recorded.get(k) != now.get(k)]


# --- what a run leaves ------------------------------------------------------------------------------------------------
# All that is known of names and formats of files is here.

LORA_FILE = "pytorch_lora_weights.safetensors"
NOT_WEIGHTS = ("maps.safetensors", "features.safetensors", "lora_for_comfyui_and_a1111.safetensors")
"""No weights, or those of LORA_FILE under other names."""
WORD_MAPS = "word_maps.safetensors"
"""Pictures for the report, made apart from every number."""
STATE = "state"
"""Folder of checkpoints, whose weights are those of the export or of an earlier step."""
RUN_FILE = "config.yaml"
"""Is in each run folder, and in no folder of an arm."""
BESIDES = {
    "gate.json": "gate",
    "key_lock.json": "key_lock",
    "localization.json": "subset",
    "pretraining.json": "pretraining",
}
"""Small files in an arm's folder -> what their values are called among its metrics."""
DROPPED = ("provenance", "config", "settings", "model", "training_data", "training_images")
"""Of metrics: where they come from, and `model`, a path."""


def is_dropped(name: str) -> bool:
    """Whether a value of this name is no result: a time, a rate, memory, or where the result comes from."""
    return name in DROPPED or any(part in name for part in ("seconds", "memory", "per_second"))


def label_of(folder: Path, root: Path) -> str:
    """Folder of an arm -> its label. A run of one arm has its weights in the run folder itself: the arm is `model`."""
    label = folder.relative_to(root).as_posix()
    return f"{label}/model" if (folder / RUN_FILE).exists() else label


def rows_of(path: Path) -> list[Any]:
    """A file of one JSON value a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of all that is not dropped; a list without dictionaries in it is a value."""
    if isinstance(value, dict):
        for name, item in value.items():
            if not is_dropped(name):
                yield from flat(item, f"{prefix}/{name}" if prefix else name)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for place, item in enumerate(value):
            yield from flat(item, f"{prefix}/{place}")
    else:
        yield prefix, value


def losses(root: Path) -> Values:
    """Each row of each training log."""
    found: Values = {}
    for path in root.rglob("train_log.jsonl"):
        if STATE in path.relative_to(root).parts:
            continue
        for row in rows_of(path):
            step = row.pop("step")
            found |= {f"{label_of(path.parent, root)}/losses/{step}/{k}": v for k, v in flat(row)}
    return found


def tensors(root: Path) -> Values:
    """Each tensor of each exported model: adapters, full weights, pipelines."""
    found: Values = {}
    for path in root.rglob("*.safetensors"):
        if path.name in (*NOT_WEIGHTS, WORD_MAPS) or {"latents", STATE} & set(path.relative_to(root).parts):
            continue
        if path.name == LORA_FILE:
            label, part = label_of(path.parent, root), "lora"
        else:
            above = path.parent.parent
            label = path.parent.name if above == root else label_of(above, root)
            part = path.parent.name
        found |= {f"{label}/tensors/{part}/{name}": digest for name, digest in tensor_digests(path)}
    return found


def tensor_digests(path: Path) -> Iterator[tuple[str, str]]:
    """(name, sha256 of type, shape and bytes) of a file's tensors."""
    import torch
    from safetensors.torch import load_file

    for name, tensor in load_file(path).items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        yield name, hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + raw).hexdigest()


def metrics(root: Path) -> Values:
    """Metrics of arms, of real images and of pairs of arms; scores of each image; and what gates, atlases and others
    say."""
    found: Values = {}

    def add(label: str, what: Any, prefix: str = "") -> None:
        for key, value in flat(what, prefix):
            assert f"{label}/metrics/{key}" not in found, f"two values for {label}/metrics/{key}"
            found[f"{label}/metrics/{key}"] = value

    for path in root.rglob("metrics.json"):
        document = json.loads(path.read_text(encoding="utf-8"))
        if "real" not in document:
            continue  # of one arm: the run's has it too
        run = path.parent.relative_to(root).as_posix()
        for arm, entry in document["arms"].items():
            add(f"{run}/{arm}", entry)
        add(f"{run}/real", document["real"])
        add(f"{run}/paired", document.get("paired", {}))
    for name in ("atlas", "robustness"):
        for path in root.rglob(f"{name}.json"):
            for model, entry in json.loads(path.read_text(encoding="utf-8"))["models"].items():
                add(f"{path.parent.relative_to(root).as_posix()}/{model}", entry, name)
    for name, prefix in BESIDES.items():
        for path in root.rglob(name):
            add(label_of(path.parent, root), json.loads(path.read_text(encoding="utf-8")), prefix)
    for path in root.rglob("validation_log.jsonl"):
        for row in rows_of(path):
            add(label_of(path.parent, root), row, f"localization_log/{row['step']}")
    for path in root.rglob("pairs.jsonl"):
        for row in rows_of(path)[1:]:  # the first names what the rows are of
            add(label_of(path.parent, root), row["scores"], f"pairs/{row['query']}/{row['finding']}")
    return found


def pictures(root: Path) -> Values:
    """Pixels of sample images, heat maps, and features and scores of generated images."""
    import numpy as np
    from PIL import Image

    found: Values = {}
    for path in root.rglob("*.png"):
        if path.parent.name in ("samples", "progress", "real"):
            with Image.open(path) as image:
                pixels = np.asarray(image)
            digest = hashlib.sha256(f"{pixels.shape} ".encode() + pixels.tobytes()).hexdigest()
            arm = path.parent if path.parent.name == "real" else path.parent.parent
            found[f"{label_of(arm, root)}/pictures/{path.parent.name}/{path.stem}"] = digest
    for name in NOT_WEIGHTS:
        for path in root.rglob(name):
            label = label_of(path.parent, root)
            found |= {f"{label}/pictures/{path.stem}/{key}": digest for key, digest in tensor_digests(path)}
    return found


def logged_steps(root: Path) -> int:
    """Steps that the first training log tells of so far, to know when to kill its run."""
    return max((path.read_bytes().count(b"\n") for path in root.rglob("train_log.jsonl")), default=0)


def is_result(path: Path) -> bool:
    """Whether a folder of a case's working folder holds results, and not a cache."""
    return path.is_dir() and path.name != "checkpoints"


# --- running ----------------------------------------------------------------------------------------------------------


def fork(work: Callable[[], None], log: Path) -> int:
    """Process id of a child that does `work`, prints into `log`, and exits."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work()
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(child: int) -> int:
    """Its exit status; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_command(tree: Path, words: list[str]) -> None:
    """As `python <words>` in the tree: a script by its path in the tree, or `-m module`."""
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [str(tree / words[0]), *words[1:]]
        runpy.run_path(sys.argv[0], run_name="__main__")


def run_step(tree: Path, step: Any, folder: Path, log: Path, options: dict[str, str]) -> None:
    """One entry of a case's commands. Raises RuntimeError if it fails, or was to be killed and was not."""
    entry = step if isinstance(step, dict) else {"run": step}
    text = expand(entry["run"], options)
    with log.open("a") as file:
        file.write(f"$ {text}\n")

    def work() -> None:
        os.chdir(folder)
        run_command(tree, shlex.split(text))

    child = fork(work, log)
    after = entry.get("kill_after_step")
    if after is None:
        if status := wait(child):
            raise RuntimeError(f"exit status {status}: {text}\n{log.read_text(errors='replace')[-3000:]}")
        return
    while logged_steps(folder) < after:
        if os.waitpid(child, os.WNOHANG)[0]:
            raise RuntimeError(f"it ended before step {after}: {text}\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    wait(child)


def expand(text: str, options: dict[str, str]) -> str:
    """`text` with $names of `options`, which may hold others, in their place."""
    while "$" in text:
        text = string.Template(text).substitute(options)
    return text


def start(tree: Path) -> None:
    """Import the libraries and the tree's package once, for all children. Starts no thread and draws no number."""
    sys.path.insert(0, str(tree))
    import torch

    torch.set_num_threads(1)
    package = importlib.import_module(PACKAGE)
    if not Path(package.__file__ or "").resolve().is_relative_to(tree):
        raise SystemExit(f"{PACKAGE} was imported from {package.__file__}, not from {tree}")
    for module in pkgutil.walk_packages(package.__path__, f"{PACKAGE}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def fingerprint(root: Path) -> Values:
    """The flat dictionary of all that a case left."""
    found: Values = {}
    for read in (losses, tensors, metrics, pictures):
        found |= read(root)
    tops = {path.name for path in root.iterdir() if is_result(path)}
    return {key: found[key] for key in sorted(found) if key.split("/")[0] in tops}


def run_case(tree: Path, case: dict[str, Any], options: dict[str, str], work: Path, name: str) -> Values:
    """Run a case in work/<name>; what it left, or {"error": text}."""
    folder, log = work / name, work / f"{name}.log"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log.unlink(missing_ok=True)
    try:
        for step in case["commands"]:
            run_step(tree, step, folder, log, options)
        found = fingerprint(folder)
        if not found:
            raise RuntimeError("no result was found")
        for one, other in case.get("equal", []):
            for kind in ("losses", "tensors"):
                first, second = (
                    {k[len(label) :]: v for k, v in found.items() if k.startswith(f"{label}/{kind}/")}
                    for label in (one, other)
                )
                if not first or first != second:
                    raise RuntimeError(f"{kind} of {one} and {other} should be equal")
    except RuntimeError as error:
        return {ERROR: str(error)}
    ignored = case.get("ignore", [])
    return {key: value for key, value in found.items() if not any(fnmatch(key, pattern) for pattern in ignored)}


def run_cases(tree: Path, names: list[str], work: Path, keep: bool = False) -> Iterator[tuple[str, Values, float]]:
    """(name, values, seconds) of each case, in the order given. Inputs are written first."""
    document = load_cases()
    start(tree)
    write_inputs(work)
    for name in names:
        began = time.perf_counter()
        found = run_case(tree, document["cases"][name], document["options"], work, name)
        if not keep and ERROR not in found:
            shutil.rmtree(work / name)
        yield name, found, time.perf_counter() - began


def write_inputs(work: Path) -> None:
    """Base models and data sets, in work/inputs."""

    def work_of_child() -> None:
        sys.path.insert(0, str(HERE))
        importlib.import_module("inputs").write_inputs(work / "inputs")

    log = work / "inputs.log"
    if wait(fork(work_of_child, log)):
        raise SystemExit(f"the inputs could not be written:\n{log.read_text(errors='replace')[-3000:]}")


def load_cases() -> dict[str, Any]:
    """cases.yaml: {"options": {name: words}, "cases": {name: {"commands": [...], ...}}}."""
    document: dict[str, Any] = yaml.safe_load(CASES.read_text(encoding="utf-8"))
    return document


# --- comparing --------------------------------------------------------------------------------------------------------


def group_of(key: str) -> tuple[str, str]:
    """(label, kind) of a key of the flat dictionary."""
    parts = key.split("/")
    place = next(i for i, part in enumerate(parts) if part in KINDS)
    return "/".join(parts[:place]), parts[place]


def digests(found: Values) -> dict[str, dict[str, str]]:
    """Label -> kind -> 16 hexadecimal digits."""
    groups: dict[tuple[str, str], Values] = {}
    for key, value in found.items():
        groups.setdefault(group_of(key), {})[key] = value
    result: dict[str, dict[str, str]] = {}
    for (label, kind), values in sorted(groups.items()):
        text = json.dumps(values, sort_keys=True, allow_nan=True)
        result.setdefault(label, {})[kind] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return result


def compare(found: Values, recorded: dict[str, dict[str, str]], reference: Values | None = None) -> list[str]:
    """What differs from the record, one text each. reference: all values of the recorded tree, to name differing
    keys."""
    if ERROR in found:
        return [f"failed: {found[ERROR]}"]
    now, faults = digests(found), []
    groups = {(label, kind) for side in (now, recorded) for label, kinds in side.items() for kind in kinds}
    for label, kind in sorted(groups):
        new, old = (side.get(label, {}).get(kind) for side in (now, recorded))
        if new == old:
            continue
        what = "is missing" if new is None else "is new" if old is None else "differs"
        faults.append(f"{label}/{kind} {what}")
        if reference is not None:
            prefix = f"{label}/{kind}/"
            own, theirs = ({k: v for k, v in side.items() if k.startswith(prefix)} for side in (found, reference))
            faults += [f"    {line}" for line in differences(theirs, own)[:5]]
    return faults


def differences(old: Values, new: Values) -> list[str]:
    """Keys whose values differ, with both values, in the order of the old."""
    lines = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key, "(absent)"), new.get(key, "(absent)")
        if json.dumps(before) != json.dumps(after):
            lines.append(f"{key}: {before!r} -> {after!r}")
    return lines


def read_dump(folder: Path, name: str) -> Values | None:
    """All values of a case, if `folder` has them."""
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    found: Values = json.loads(path.read_text(encoding="utf-8"))
    return found


def diff_dumps(one: Path, other: Path) -> int:
    """Print the first differences of each case that both folders have; how many cases differ."""
    count = 0
    for name in sorted({p.stem for p in one.glob("*.json")} | {p.stem for p in other.glob("*.json")}):
        first, second = read_dump(one, name), read_dump(other, name)
        if first is None or second is None:
            print(f"{name}: only in {other if first is None else one}")
            continue
        lines = differences(first, second)
        count += bool(lines)
        print(f"{name}: {f'{len(lines)} of {len(first)} values differ' if lines else f'{len(first)} values equal'}")
        print("".join(f"    {line}\n" for line in lines[:10]), end="")
    return count


# --- command line -----------------------------------------------------------------------------------------------------


def main() -> int:
    """0 if all cases ran and, with --check or --diff, nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, help="checkout whose recipes are run")
    parser.add_argument("--cases", help="names or patterns, joined by commas; all without it")
    parser.add_argument("--dump", type=Path, help="folder for every value, one JSON file a case")
    parser.add_argument("--record", action="store_true", help="write the hashes of these cases into values.json")
    parser.add_argument("--check", action="store_true", help="compare with values.json")
    parser.add_argument("--against", type=Path, help="with --check: dumps of the recorded tree, to name differing keys")
    parser.add_argument("--work", type=Path, help="working folder that stays; else a temporary one")
    parser.add_argument(
        "--diff", nargs=2, type=Path, metavar="DIR", help="compare two folders of dumps, and run nothing"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases, and run nothing")
    asked = parser.parse_args()
    everything = list(load_cases()["cases"])
    if asked.list:
        print("\n".join(everything))
        return 0
    if asked.diff:
        return int(diff_dumps(*asked.diff) > 0)
    if asked.tree is None:
        parser.error("--tree is missing")
    patterns = asked.cases.split(",") if asked.cases else ["*"]
    names = [name for pattern in patterns for name in everything if fnmatch(name, pattern)]
    if unknown := [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in everything)]:
        parser.error(f"no such case: {', '.join(unknown)}")
    os.environ |= ONE_THREAD
    record: dict[str, Any] = json.loads(VALUES.read_text(encoding="utf-8")) if VALUES.exists() else {"cases": {}}
    if asked.check and (other := environment_differences(record["environment"])):
        print("warning: not the machine or the versions of the record: " + "; ".join(other))
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        work = (asked.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        for name, found, seconds in run_cases(asked.tree.resolve(), names, work, keep=asked.work is not None):
            faults = [f"failed: {found[ERROR]}"] if ERROR in found else []
            if asked.dump:
                asked.dump.mkdir(parents=True, exist_ok=True)
                text = json.dumps(found, indent=0, ensure_ascii=False)
                (asked.dump / f"{name}.json").write_text(text, encoding="utf-8")
            if asked.check and not faults:
                reference = read_dump(asked.against, name) if asked.against else None
                faults = compare(found, record["cases"].get(name, {}), reference)
            if asked.record and not faults:
                record["environment"] = environment()
                record["cases"][name] = digests(found)
                write_record(record, everything)
            failed += bool(faults)
            print(f"{name}: {seconds:.1f} s, {len(found):,} values{', FAULTS' if faults else ''}", flush=True)
            print("".join(f"    {fault}\n" for fault in faults), end="", flush=True)
    return int(failed > 0)


def write_record(record: dict[str, Any], order: list[str]) -> None:
    """values.json, one line a label, cases in the order of cases.yaml."""
    lines = ['{"environment": ' + json.dumps(record["environment"], indent=1) + ',\n"cases": {']
    cases = []
    for name in (name for name in order if name in record["cases"]):
        labels = [f" {json.dumps(label)}: {json.dumps(kinds)}" for label, kinds in record["cases"][name].items()]
        cases.append(f"{json.dumps(name)}: {{\n" + ",\n".join(labels) + "}")
    VALUES.write_text("\n".join([*lines, ",\n".join(cases), "}}"]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
