"""`gptface bench data` and `gptface data batch`, as a user calls them."""

import csv
import io
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gptface_dist.errors import UserError
from gptface_dist.tools.main import app
from tests.corpus import VOCABULARY, write_tokens

runner = CliRunner()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_tokens(tmp_path / "tokens", [40, 30])
    (tmp_path / "tokenizers").mkdir()
    VOCABULARY.save(tmp_path / "tokenizers" / "vocabulary.json")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"data:\n  tokenizers: {tmp_path}/tokenizers\n  sources: [{{path: {tmp_path}/tokens}}]\n"
        "  global_batch: 16\n  micro_batch: 8\n  order: {block: 4, streams: 2}\n"
    )
    return config


def test_bench_prints_a_ratio_to_the_baseline(run: Path) -> None:
    result = runner.invoke(app, ["bench", "data", str(run.parent / "tokens"), "--seconds", "0.1", "--rounds", "2"])
    assert result.exit_code == 0, result.output
    assert "webdataset loop" in result.output
    assert "1.00" in result.output, "the baseline's own ratio"


def test_bench_of_too_little_is_refused(tmp_path: Path) -> None:
    write_tokens(tmp_path, [10])
    result = runner.invoke(app, ["bench", "data", str(tmp_path)])
    assert isinstance(result.exception, UserError)
    assert "needs at least 64" in str(result.exception)


def test_batch_lists_the_samples_of_a_step(run: Path) -> None:
    def rows(*more: str) -> list[dict[str, str]]:
        result = runner.invoke(app, ["data", "batch", str(run), *more])
        assert result.exit_code == 0, result.output
        lines = list(csv.reader(io.StringIO(result.output), delimiter="\t"))
        return [dict(zip(lines[0], line, strict=False)) for line in lines[1:]]

    first, second = rows(), rows("--step", "1")
    assert len(first) == len(second) == 16
    assert len({row["text key"] for row in first + second}) > 16
    assert rows("data.micro_batch=16") == first
    assert {row["itm"] for row in first} == {"0", "1"}
    masked = [int(row["text masked"]) + int(row["image masked"]) for row in first]
    assert [number == 0 for number in masked] == [row["itm"] == "0" for row in first]


def test_batch_refuses_other_tokenizers(run: Path) -> None:
    path = run.parent / "tokenizers" / "vocabulary.json"
    path.write_text(path.read_text().replace("a" * 64, "c" * 64))
    result = runner.invoke(app, ["data", "batch", str(run)])
    assert isinstance(result.exception, UserError)
    assert "text tokenizer aaaaaaaaaaaa, the vocabulary has cccccccccccc" in str(result.exception)


@pytest.mark.parametrize("native", [True, False])
def test_emulated_bfloat16_is_warned_of(
    native: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before anything is measured; three processes are then refused."""
    monkeypatch.setattr("gptface_dist.host.native_bfloat16", lambda device: native)
    result = runner.invoke(app, ["bench", "train", "--dtype", "bfloat16", "--processes", "3"])
    assert isinstance(result.exception, UserError), result.exception
    assert ("--dtype bfloat16: this CPU" in caplog.text) == (not native)


@pytest.mark.parametrize("command", [["bench", "train"], ["bench", "checkpoint"], ["bench", "loss"], ["parity"]])
def test_a_type_that_is_refused_is_not_warned_of(
    command: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gptface_dist.host.native_bfloat16", lambda device: False)
    result = runner.invoke(app, [*command, "--dtype", "bf16"])
    assert isinstance(result.exception, UserError), result.exception
    assert "bf16" in str(result.exception)
    assert caplog.text == ""
