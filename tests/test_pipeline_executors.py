"""Who runs the units: pools, parts of an array, Ray. Real processes, ended in every way."""

import contextlib
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import REPOSITORY
from listening import listening
from pipeline_samples import TEXTS, contents, tokenizer, write_jsonl

N_UNITS = 40
COMMAND = """
import os, signal, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
if "SPAWNED" in os.environ:  # beside a thread no process is forked
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
from pipeline.units import cluster
from pipeline.units import recipe
recipe.UNIT_BYTES = recipe.LEAST_UNIT_BYTES = 1 << 19
cluster.GONE_AFTER_S = 2.0
from pipeline.cli import main
main()
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "tests"),
                                                            str(REPOSITORY)])}  # fmt: skip


class Stage:
    """A source of forty units, the command that prepares it, and what comes of it undisturbed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, folder / "small.model"
        self.started: list[subprocess.Popen[str]] = []
        self.model.write_bytes(tokenizer().model)
        rng = random.Random(3)
        for number in range(N_UNITS):
            rows = [f"{number}/{n} {rng.choice(TEXTS)}" for n in range(4500)]
            write_jsonl(folder / "in" / f"{number:03}.jsonl", rows)
        assert self.run("complete", "--workers", "1").returncode == 0
        self.expected = contents(folder / "complete")
        assert sum(name.endswith(".rows.npy") for name in self.expected) > N_UNITS

    def arguments(self, out: str, *more: str) -> list[str]:
        return [sys.executable, "-c", COMMAND, "tokenize", "--source", "mine", "--data-files",
                str(self.folder / "in"), "--tokenizer", str(self.model), "--seq-len", "64",
                "--val-fraction", "0.1", "--check-encoding", "1",
                "--out", str(self.folder / out), *more]  # fmt: skip

    def start(self, out: str, *more: str, spawned: bool = False) -> "subprocess.Popen[str]":
        environment = {**ENVIRONMENT, "SPAWNED": "yes"} if spawned else ENVIRONMENT
        self.started.append(subprocess.Popen(
            self.arguments(out, *more), env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ))  # fmt: skip
        return self.started[-1]

    def run(self, out: str, *more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self.arguments(out, *more), env=ENVIRONMENT, text=True, capture_output=True,
            timeout=120, check=False,
        )  # fmt: skip

    def unit_records(self, out: str) -> int:
        return len(list((self.folder / out / "mine").glob("[0-9]*.json")))

    def wait_for(self, out: str, unit_records: int, process: "subprocess.Popen[str]") -> None:
        wait_until(lambda: self.unit_records(out) >= unit_records or process.poll() is not None)
        assert process.poll() is None

    def temporaries(self, out: str) -> list[str]:
        return [path.name for path in (self.folder / out / "mine").glob(".*")]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("stage"))
    yield stage
    for process in stage.started:
        if process.poll() is None:  # only where a test failed
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def wait_until(condition: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def children(pid: int) -> dict[int, str]:
    """The processes that a process started, and theirs, with their command lines."""
    found: dict[int, str] = {}
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(folder.name))
    ahead = [pid]
    while ahead:
        for child in parents.get(ahead.pop(), []):
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{child}/cmdline").read_bytes()
                found[child] = command.replace(b"\0", b" ").decode()
            ahead.append(child)
    return found


def lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# ------------------------------------------------------------------ a pool


def kill_a_worker(process: "subprocess.Popen[str]") -> None:
    workers = [
        pid for pid, command in children(process.pid).items() if "resource_tracker" not in command
    ]
    os.kill(workers[0], signal.SIGKILL)


ENDS: list[tuple[Callable[["subprocess.Popen[str]"], None], int, str]] = [
    (lambda process: process.send_signal(signal.SIGTERM), 143, "stopped: the same command goes on"),
    (lambda process: os.killpg(process.pid, signal.SIGINT), 130, "stopped: the same command"),
    (lambda process: os.killpg(process.pid, signal.SIGTERM), 143, "stopped: the same command"),
    (kill_a_worker, 1, "error: a worker process was ended from outside (out of memory?): start"),
]


@pytest.mark.parametrize("spawned", [False, True])
def test_a_pool_that_is_ended_in_any_way_goes_on_to_the_same_bytes(
    stage: Stage, spawned: bool
) -> None:
    out = f"ended-{spawned}"
    for number, (end, code, message) in enumerate(ENDS):
        process = stage.start(out, "--workers", "3", spawned=spawned)
        stage.wait_for(out, 3 + 7 * number, process)
        done = stage.unit_records(out)
        end(process)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == code, stderr
        assert stderr.splitlines()[-1].startswith(message) and "Traceback" not in stderr
        wait_until(lambda group=process.pid: not lives(group))  # type: ignore[misc]
        assert stage.temporaries(out) == []
        assert done <= stage.unit_records(out) < N_UNITS
    assert stage.run(out, "--workers", "2").returncode == 0
    assert contents(stage.folder / out) == stage.expected


def test_ctrl_c_as_the_workers_start_is_one_line(stage: Stage) -> None:
    process = stage.start("early", "--workers", "3", spawned=True)
    wait_until(lambda: any("spawn_main" in c for c in children(process.pid).values()))
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in stderr


SCRIPT = """
import sys
import threading
import time
from pathlib import Path
from pipeline_samples import prepared, request
print("once")
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()  # so they are spawned
prepared(request(Path(sys.argv[1]), sys.argv[2], unit_bytes=1 << 19), workers=2)
"""


def test_a_script_needs_no_guard_against_its_workers(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path), str(stage.folder / "in")]
    message = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
                          check=False)  # fmt: skip
    assert (message.returncode, message.stdout, message.stderr) == (0, "once\n", "")


# ------------------------------------------------------------------ parts of an array


@pytest.mark.parametrize(("files", "n_parts"), [("in", 4), ("in/00[0-2].jsonl", 5)])
def test_parts_at_once_and_in_any_order_give_the_same_bytes(
    stage: Stage, tmp_path: Path, files: str, n_parts: int
) -> None:
    """The second has more parts than units."""
    source = ("--data-files", str(stage.folder / files))
    arguments = stage.arguments("unused", "--workers", "1")
    arguments[arguments.index("--data-files") : arguments.index("--data-files") + 2] = source

    def start(out: str, part: str) -> "subprocess.Popen[str]":
        return subprocess.Popen([*arguments, "--out", str(tmp_path / out), "--part", part],
                                env=ENVIRONMENT, text=True, stdout=subprocess.PIPE)  # fmt: skip

    parts = [f"{number}/{n_parts}" for number in range(1, n_parts + 1)]
    random.Random(n_parts).shuffle(parts)
    message = []
    for at_once in (parts[:1], parts[1:]):
        running = [start("parts", part) for part in at_once]
        message += [process.communicate(timeout=120)[0] for process in running]
        assert [process.returncode for process in running] == [0] * len(at_once)
    assert "others are not, so there is no manifest yet" in message[0]
    assert (
        sum("documents" in line for line in message) >= 1
    )  # the last one, or two that end at once
    if files == "in":
        assert contents(tmp_path / "parts") == stage.expected
        return
    process = start("complete", "1/1")
    process.communicate(timeout=120)
    assert contents(tmp_path / "parts") == contents(tmp_path / "complete")


def test_the_array_script_of_the_readme_does_each_part_once(tmp_path: Path) -> None:
    readme = (REPOSITORY / "README.md").read_text()
    (script,) = [block for block in re.findall(r"```bash\n(.*?)```", readme, re.DOTALL)
                 if "#SBATCH --array" in block]  # fmt: skip
    first, last = map(int, re.findall(r"--array=(\d+)-(\d+)", script)[0])
    (cores,) = re.findall(r"--cpus-per-task=(\d+)", script)
    message = set()
    for task in (first, last):
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(task),
                       "SLURM_ARRAY_TASK_COUNT": str(last - first + 1)}  # fmt: skip
        called = 'srun() { "$@"; }; summer-prep() { echo "$@"; }\n' + script
        out = subprocess.check_output(["bash", "-c", called], env=environment, text=True)
        assert f"--workers {cores} " in out
        message.add(out.split("--part ")[1].strip())
    assert message == {f"1/{last}", f"{last}/{last}"}


# ------------------------------------------------------------------ limits


def test_limited_runs_at_once_and_with_any_number_of_workers_take_the_same(stage: Stage) -> None:
    limit = ("--max-documents", "12000", "--max-tokens", "9000000")
    both = [stage.start("limited", "--workers", workers, *limit) for workers in ("1", "3")]
    message = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], message
    assert stage.run("alone", "--workers", "2", *limit).returncode == 0
    assert contents(stage.folder / "limited") == contents(stage.folder / "alone")
    assert message[0][0] == message[1][0].replace("alone", "limited")
    assert "12,000 documents" in message[0][0]
    for other in ((), ("--max-documents", "12001", "--max-tokens", "9000000")):
        rejected = stage.run("alone", *other)
        assert rejected.returncode == 1 and "was begun with max_" in rejected.stderr


# ------------------------------------------------------------------ Ray


@contextlib.contextmanager
def ray_cluster() -> Iterator[Any]:
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        environment = {**ENVIRONMENT, "RAY_TMPDIR": folder}  # the names of its sockets are long
        process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "tests" / "ray_cluster.py")], env=environment,
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        started: set[int] = set()
        try:
            yield json.loads(process.stdout.readline())
            started = set(children(process.pid))
            process.stdin.close()
            process.wait(timeout=60)
        finally:
            started |= set(children(process.pid))
            for pid in (*started, process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            process.stdin.close()
            process.stdout.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    with ray_cluster() as cluster:
        yield cluster


def ray_workers(raylet: int) -> list[int]:
    """Those of a node that are at a unit."""
    return [pid for pid, command in children(raylet).items() if command.startswith("ray::_in_ray")]


@pytest.mark.slow
def test_ray_loses_a_worker_and_a_node_and_gives_the_same_bytes(stage: Stage, cluster: Any) -> None:
    process = stage.start("ray", "--executor", "ray", "--address", cluster["address"])
    stage.wait_for("ray", 2, process)
    wait_until(lambda: ray_workers(cluster["raylets"][1]))
    for pid in ray_workers(cluster["raylets"][1]):
        os.kill(pid, signal.SIGKILL)
    stage.wait_for("ray", 4, process)
    wait_until(lambda: ray_workers(cluster["raylets"][2]))
    node = children(cluster["raylets"][2])
    for pid in (cluster["raylets"][2], *node):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert contents(stage.folder / "ray") == stage.expected
    assert f"{N_UNITS}/{N_UNITS} units, 180,000 documents" in stderr and "Traceback" not in stderr


@pytest.mark.slow
def test_a_ray_cluster_of_our_own_listens_on_loopback(stage: Stage) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    process = stage.start("own-ray", "--executor", "ray")
    stage.wait_for("own-ray", 1, process)
    heard = listening(process.pid)
    process.terminate()
    process.communicate(timeout=120)
    assert heard and heard <= {"127.0.0.1", "::ffff:127.0.0.1"}


@pytest.mark.slow
def test_a_limit_on_ray_takes_what_one_worker_takes(stage: Stage, cluster: Any) -> None:
    limit = ("--max-tokens", "2000000")
    message = stage.run("few-ray", "--executor", "ray", "--address", cluster["address"], *limit)
    assert message.returncode == 0, message.stderr
    assert stage.run("few", "--workers", "1", *limit).returncode == 0
    assert contents(stage.folder / "few-ray") == contents(stage.folder / "few")


@pytest.mark.slow
def test_what_ends_a_run_on_ray_is_one_line_and_it_goes_on(stage: Stage, cluster: Any) -> None:
    """A signal, input that is gone, and the cluster itself: this test is its last."""
    files = stage.folder / "in"

    def stop(process: "subprocess.Popen[str]") -> None:
        process.send_signal(signal.SIGTERM)

    def take_the_input_away(_: Any) -> None:
        files.rename(stage.folder / "elsewhere")

    def kill_the_head(_: Any) -> None:
        os.kill(cluster["gcs"], signal.SIGKILL)  # its workers would finish what they were given
        workers = {pid: c for raylet in cluster["raylets"] for pid, c in children(raylet).items()}
        for pid in [pid for pid, command in workers.items() if command.startswith("ray::")]:
            os.kill(pid, signal.SIGKILL)

    for end, code, message in (
        (stop, 143, r"stopped: the same command goes on"),
        (take_the_input_away, 1, r"error: \d+\.jsonl: No such file"),
        (kill_the_head, 1, rf"error: the Ray cluster at {cluster['address']} is gone: start the"),
    ):
        process = stage.start("stopped", "--executor", "ray", "--address", cluster["address"])
        stage.wait_for("stopped", stage.unit_records("stopped") + 2, process)
        end(process)
        _, stderr = process.communicate(timeout=120)
        if end is take_the_input_away:
            (stage.folder / "elsewhere").rename(files)
        assert process.returncode == code, stderr
        # Ray may add an empty line, or news of its own, when it is late
        assert any(re.match(message, line) for line in stderr.splitlines()), stderr
        assert "Traceback" not in stderr
    (stage.folder / "stopped" / "mine" / "00000.json").unlink(missing_ok=True)  # work for the next
    rejected = stage.run("stopped", "--executor", "ray", "--address", cluster["address"])
    assert rejected.returncode == 1
    assert rejected.stderr.splitlines()[-1].startswith("error: no Ray cluster answers at")
    assert stage.run("stopped", "--workers", "2").returncode == 0
    assert contents(stage.folder / "stopped") == stage.expected
