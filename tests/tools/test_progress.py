"""The bar of long commands: there for who watches, nothing in a log."""

import pytest

from gptface_dist.tools.progress import bar


@pytest.mark.parametrize(("terminal", "shown"), [(True, True), (True, False), (False, True)])
def test_a_bar_is_shown_on_terminals_alone(
    terminal: bool, shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", str(int(terminal)))
    with bar("faces at {task.fields[rate]}/s", shown) as progress:
        task = progress.add_task("drawing", total=3, rate=7)
        progress.advance(task, 2)
        print("a result")
    out, error = capsys.readouterr()
    assert "a result" in out
    if terminal and shown:
        for word in ("drawing", "2/3", "faces at 7/s"):
            assert word in error
    else:
        assert error == ""
