"""How tasks run and end: beside each other, over time, killed, and with results of earlier calls in the folder."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gptface_dist.benchmarks.gpu import driver, records
from gptface_dist.errors import UserError
from tests.benchmarks.running import PARTS, alive, kinds, numbers, run, until
from tests.processes import interruptible

ROOT = Path(__file__).resolve().parents[2]
DRIVE = """
import sys
from pathlib import Path
from tests.benchmarks.running import run
run(Path(sys.argv[1]), *sys.argv[2:], seconds=300, total=300)
"""


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, driver.Result], list[str]]:
    out = tmp_path_factory.mktemp("gpu")
    names = ("ok", "wrong", "raising", "poisoned", "uncaught", "crash", "hang", "silent", "impatient")
    return out, *run(out, *(f"fake-{name}" for name in names), "fake_speed-ok", seconds=8)


def test_every_task_is_recorded_as_it_ended(everything: tuple[Path, dict[str, driver.Result], list[str]]) -> None:
    _, results, said = everything
    ends = {name: (result.end or {})["how"] for name, result in results.items()}
    assert ends == {
        "fake-ok": "ended", "fake-wrong": "ended", "fake-raising": "ended", "fake-poisoned": "status 1",
        "fake-uncaught": "status 1", "fake-crash": "killed by SIGSEGV", "fake-hang": "killed after its 8 s",
        "fake-silent": "ended", "fake-impatient": "ended", "fake_speed-ok": "ended",
    }  # fmt: skip
    for name in results:
        assert sum(name in line and " began" in line for line in said) == 1
        assert sum(name in line and ends[name] in line for line in said) >= 1
    assert len(said) == 2 * len(results)


def test_a_task_s_file_begins_with_its_origin(everything: tuple[Path, dict[str, driver.Result], list[str]]) -> None:
    for result in everything[1].values():
        begin = result.file.records[0]
        assert begin["kind"] == "begin"
        assert begin["dry"] is True
        assert begin["device"] == f"{os.cpu_count()}-core CPU"
        assert begin["versions"]["python"] == sys.version.split()[0]
        assert begin["date"].startswith("20")


def test_what_was_recorded_before_the_end_stays(everything: tuple[Path, dict[str, driver.Result], list[str]]) -> None:
    _, results, _ = everything
    assert kinds(results["fake-crash"]) == ["begin", "started", "check", "end"]
    assert kinds(results["fake-hang"]) == ["begin", "started", "child", "check", "end"]
    assert kinds(results["fake-raising"]) == ["begin", "started", "failed", "check", "end"]
    assert results["fake-raising"].of("failed")[0]["why"] == "ValueError: first line"
    assert kinds(results["fake-poisoned"]) == ["begin", "started", "check", "failed", "end"], "it ends with the GPU"
    assert results["fake-uncaught"].of("failed")[0]["why"] == "KeyError: 'nothing caught this'"
    assert kinds(results["fake-impatient"]) == ["begin", "started", "check", "left out", "end"]


def test_nothing_is_left_of_a_task(everything: tuple[Path, dict[str, driver.Result], list[str]]) -> None:
    out, results, _ = everything
    (child,) = results["fake-hang"].of("child")
    until(lambda: not alive(child["pid"]), 5)
    for result in results.values():
        (started,) = result.of("started")
        assert not alive(started["pid"])
        assert not Path(started["folder"]).exists()
        assert started["gptface"] == str(ROOT / "gptface_dist" / "__init__.py")
    assert "Segmentation fault" in (out / "parts" / "fake-crash.log").read_text(), "the log says where it crashed"


def test_all_records_are_in_one_file(everything: tuple[Path, dict[str, driver.Result], list[str]]) -> None:
    out, results, _ = everything
    merged = json.loads((out / "gpu.json").read_text(), parse_constant=pytest.fail)
    assert merged["tasks"] == {name: result.file.records for name, result in results.items()}


def test_what_no_longer_fits_is_left_out(tmp_path: Path) -> None:
    results, said = run(tmp_path, "fake-ok", "fake_speed-ok", seconds=2, total=1)
    for result, line in zip(results.values(), said, strict=True):
        assert kinds(result) == ["end"]
        # Reading the clock takes time, too.
        assert result.file.records[0]["how"] in ("left out: 1 of 1 s were left", "left out: 0 of 1 s were left")
        assert f"{result.task.name} left out" in line


def test_a_later_call_replaces_what_it_runs_and_nothing_else(tmp_path: Path) -> None:
    run(tmp_path, "fake-ok", "fake-wrong")
    before = {path.name: path.read_bytes() for path in (tmp_path / "parts").iterdir()}
    run(tmp_path, "fake-wrong")
    after = {path.name: path.read_bytes() for path in (tmp_path / "parts").iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"fake-wrong.jsonl"}
    assert len(records.read(tmp_path / "parts" / "fake-wrong.jsonl").records) == 5
    assert set(json.loads((tmp_path / "gpu.json").read_text())["tasks"]) == {"fake-ok", "fake-wrong"}
    # One that is left out keeps what an earlier call recorded.
    results, _ = run(tmp_path, "fake-ok", total=0.1, seconds=1)
    assert kinds(results["fake-ok"]) == ["begin", "started", "check", "speed", "end", "end"]


def test_a_killed_part_loses_nothing_and_the_others_go_on(tmp_path: Path) -> None:
    file, killed = tmp_path / "parts" / "fake-endless.jsonl", []

    def kill() -> None:
        until(lambda: len(numbers(file)) > 20)
        (started,) = (one for one in records.read(file).records if one["kind"] == "started")
        killed.append(numbers(file))
        os.kill(started["pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    results, _ = run(tmp_path, "fake-endless", "fake_speed-ok", seconds=60)
    killer.join()
    assert (results["fake-endless"].end or {})["how"] == "killed by SIGKILL"
    (before,) = killed
    assert numbers(file)[: len(before)] == list(range(len(before)))
    assert (results["fake_speed-ok"].end or {})["how"] == "ended"


def test_a_killed_driver_loses_nothing_and_leaves_nobody_behind(tmp_path: Path) -> None:
    file = tmp_path / "parts" / "fake-endless.jsonl"
    with interruptible([sys.executable, "-c", DRIVE, str(tmp_path), "fake-ok", "fake-endless"], cwd=ROOT) as process:
        until(lambda: len(numbers(file)) > 20)
        until(lambda: "end" in kinds(driver.recorded(tmp_path, PARTS)[0]))
        before = numbers(file)
        with pytest.raises(UserError, match=r"--out .* is in use by process"):
            run(tmp_path, "fake-ok")
        os.kill(process.pid, signal.SIGKILL)
        (started,) = (one for one in records.read(file).records if one["kind"] == "started")
        (child,) = {one["child"] for one in records.read(file).records if one["kind"] == "number"}
        until(lambda: not alive(started["pid"]) and not alive(child), 10)
        assert not Path(started["folder"]).exists()
    ok, endless = driver.recorded(tmp_path, PARTS)
    assert numbers(file)[: len(before)] == list(range(len(before)))
    assert kinds(ok) == ["begin", "started", "check", "speed", "end"]
    assert endless.end is None
    assert endless.problems == ["has no end: the command was killed, or it is still running"]
    assert set(json.loads((tmp_path / "gpu.json").read_text())["tasks"]) >= {"fake-ok"}
    # The folder is free for the next call, which replaces its own part only.
    results, _ = run(tmp_path, "fake-ok")
    assert not results["fake-ok"].problems
    assert numbers(file)[: len(before)] == before


def test_an_interrupt_is_recorded(tmp_path: Path) -> None:
    file = tmp_path / "parts" / "fake-endless.jsonl"
    command = [sys.executable, "-c", DRIVE, str(tmp_path), "fake-endless"]
    with interruptible(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
        until(lambda: len(numbers(file)) > 5)
        os.kill(process.pid, signal.SIGINT)
        process.communicate(timeout=20)
    assert records.read(file).records[-1]["how"] == "interrupted"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*file/gpu cannot be written: Not a directory"):
        run(tmp_path / "file" / "gpu", "fake-ok")
