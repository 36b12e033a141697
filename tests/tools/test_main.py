"""The `gptface` program itself: how it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.processes import interruptible


def test_an_interrupt_is_one_line_and_status_130(tmp_path: Path) -> None:
    out = tmp_path / "faces"
    arguments = ["faces", "render", str(out), "--count", "100000", "--size", "32", "--workers", "1"]
    command = [sys.executable, "-m", "gptface_dist.tools.main", *arguments]
    with interruptible(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(3000):
            # It draws.
            if (out / "render.json").exists() or process.poll() is not None:
                break
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "gptface: interrupted\n")
    assert process.returncode == 130
    assert [path.name for path in out.iterdir()] == ["render.json"]
