"""Reports on FP8 attention during training: what is sick is found, the same in every layout, and falls back for good."""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from gptface_dist.distributed.rank import RankInfo
from gptface_dist.distributed.spawn import spawn
from gptface_dist.engine import parity_case
from gptface_dist.engine.parity_case import MODEL, VOCABULARY, Case
from gptface_dist.errors import UserError
from gptface_dist.model.attention import AttentionOptions
from gptface_dist.model.options import ModelOptions
from gptface_dist.model.parameters import ParameterSpec
from gptface_dist.objectives.milm_itm import MilmItm
from gptface_dist.parallel import libraries
from gptface_dist.parallel.layout import Layout
from gptface_dist.parallel.options import EngineOptions, OptimizerOptions
from gptface_dist.tools.main import app
from gptface_dist.training.analysis.attention_report import LayerReport, entries, read
from gptface_dist.training.options import AttentionHealthOptions
from tests.corpus import VOCABULARY as CORPUS
from tests.corpus import write_tokens
from tests.training.test_train import config
from tests.training.test_train import train as train_as_a_user

SICK = 2
"""The layer that is given outliers."""
FP8 = AttentionOptions("fp8")
ALL_HERE = Layout(zero=0)
LIMIT = 0.3
FALLS = AttentionHealthOptions(interval=2, sequences=2, fall_back=LIMIT)


@dataclass(frozen=True)
class Job:
    """Train some steps with reports."""

    name: str
    layout: Layout = ALL_HERE
    attention: AttentionOptions = FP8
    options: AttentionHealthOptions = FALLS
    recompute: str = "none"
    model: ModelOptions = MODEL


NORMED = replace(MODEL, qk_norm=True)
ALONE = [
    Job("alone"),
    Job("sdpa", attention=AttentionOptions("sdpa"), options=AttentionHealthOptions(interval=2)),
    Job("recomputed", recompute="layer"),
    Job("normed", model=NORMED),
]
TWO = [
    Job("tensor", Layout(tp=2, zero=3, sp=True)),
    Job("pipeline", Layout(pp=2, vpp=2, zero=3), recompute="attention"),
    Job("data", Layout(dp=2, zero=3)),
    Job("normed tensor", Layout(tp=2, zero=3, sp=True), recompute="attention", model=NORMED),
]


def initial(entry: ParameterSpec, seed: int) -> torch.Tensor:
    """In the sick layer, one channel of every query is 10^7 times the others, and does nothing: that of keys is zero."""
    values = HEALTHY(entry, seed)
    if entry.name.startswith(f"layers.{SICK}.qkv"):
        heads = values.view(MODEL.heads, 3, MODEL.head_size, -1)
        heads[:, 1, 0] = 0
        if entry.name.endswith("bias"):
            heads[:, 0, 0] = 1e7
    return values


def initial_normed(entry: ParameterSpec, seed: int) -> torch.Tensor:
    """Likewise, but it is QK-norm that makes it so."""
    values = HEALTHY(entry, seed)
    if entry.name == f"layers.{SICK}.q_norm.bias":
        values[0] = 1e7
    if entry.name == f"layers.{SICK}.k_norm.weight":
        values[0] = 0
    return values


HEALTHY = ParameterSpec.initial


def train(job: Job, rank: int) -> dict[str, Any]:
    """Four steps and, with what a checkpoint kept, two more: records, lines of the log, and who attends how."""
    from megatron.core import parallel_state as groups

    from gptface_dist.engine.attention import attentions
    from gptface_dist.engine.engine import Engine
    from gptface_dist.training.callbacks.attention_health import AttentionHealth

    options = EngineOptions(attention=job.attention, recompute=job.recompute)
    # So small that the weights stay.
    engine = Engine(MilmItm(), job.model, VOCABULARY, job.layout, 0, OptimizerOptions(lr=1e-9), options)
    run: Any = SimpleNamespace(
        engine=engine, config=SimpleNamespace(engine=options), rank_info=RankInfo(rank), state=SimpleNamespace(step=0)
    )
    lines = Lines()
    logging.getLogger("gptface_dist").addHandler(lines)
    hook, records, kernels = AttentionHealth(job.options), [], []
    hook.start(run)
    case, number = Case(job.layout, micro_batches=4), groups.get_data_parallel_rank()
    each = case.micro_batches // job.layout.dp
    for step in range(6):
        if step == 4:
            kept = json.loads(json.dumps(hook.state()))
            for _, attention in attentions(engine):
                attention.options = job.attention
            hook = AttentionHealth(job.options)
            hook.restore(kept)
            hook.start(run)
        hook.before_step(run)
        engine.step(parity_case.batches(case, 0)[number * each : (number + 1) * each])
        run.state.step += 1
        record: dict[str, float] = {}
        hook.after_step(run, record)
        records.append(record)
        kernels.append({layer: attention.options.kernel for layer, attention in attentions(engine)})
    engine.close()
    logging.getLogger("gptface_dist").removeHandler(lines)
    return {"records": records, "kernels": kernels, "lines": lines.found}


class Lines(logging.Handler):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """One more line."""
        self.found.append(record.getMessage())


def work(rank_info: RankInfo, jobs: list[Job], folder: Path) -> None:
    """One spawned process."""
    rank = rank_info.rank
    with libraries.quiet_imports():
        libraries.import_libraries()
        from gptface_dist.parallel import groups

        groups.join(rank_info, None, 300)
        for job in jobs:
            ParameterSpec.initial = initial_normed if job.model.qk_norm else initial  # type: ignore[method-assign]
            groups.start(job.layout, 0)
            (folder / f"{job.name}-{rank}.json").write_text(json.dumps(train(job, rank)))
            groups.stop_layout()
        groups.stop()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each rank of each job found."""
    folder = tmp_path_factory.mktemp("health")
    for jobs in (ALONE, TWO):
        spawn(work, jobs[0].layout.world, jobs, folder)
    return {
        job.name: [json.loads((folder / f"{job.name}-{rank}.json").read_text()) for rank in range(job.layout.world)]
        for job in (*ALONE, *TWO)
    }


def test_reports_are_made_when_they_are_due(found: dict[str, list[dict[str, Any]]]) -> None:
    for ranks in found.values():
        for one in ranks:
            assert [bool(record) for record in one["records"]] == [False, True] * 3


@pytest.mark.parametrize("name", ["alone", "normed"])
def test_the_sick_layer_alone_is_found_and_falls_back_for_good(found: dict[str, list[dict[str, Any]]], name: str) -> None:
    (alone,) = found[name]
    for step in (1, 3, 5):
        record = alone["records"][step]
        for layer in range(MODEL.layers):
            error = max(record[f"attention/{layer:02}/{result}_error"] for result in ("out", "gradient"))
            assert (error > LIMIT) == (layer == SICK), (layer, error)
            assert record[f"attention/{layer:02}/fallen_back"] == (layer == SICK)
            assert (record[f"attention/{layer:02}/q_flushed"] > 0.5) == (layer == SICK)
    kernels = {str(layer): "sdpa" if layer == SICK else "fp8" for layer in range(MODEL.layers)}
    # Step 5 is the first after the resumption, before its first report.
    assert alone["kernels"] == [dict.fromkeys(kernels, "fp8")] + [kernels] * 5
    (line,) = alone["lines"]
    assert line.startswith(f"step 2: attention of layer {SICK} goes on without FP8: its error against bf16 is ")
    assert line.endswith(f"above attention_health.fall_back {LIMIT}")


@pytest.mark.parametrize("name", ["recomputed", *(job.name for job in TWO)])
def test_every_layout_and_rank_finds_what_one_process_finds(found: dict[str, list[dict[str, Any]]], name: str) -> None:
    (alone,) = found["normed" if name.startswith("normed") else "alone"]
    ranks = found[name]
    for one in ranks:
        assert one["records"] == ranks[0]["records"]
    for mine, wanted in zip(ranks[0]["records"], alone["records"], strict=True):
        assert mine.keys() == wanted.keys()
        for key, value in wanted.items():
            assert mine[key] == pytest.approx(value, rel=0.02, abs=1e-3), key
    assert ranks[0]["lines"] == alone["lines"]
    for step, kernels in enumerate(alone["kernels"]):
        merged: dict[str, str] = {}
        for one in ranks:
            merged |= one["kernels"][step]
        assert merged == kernels
    assert not any(one["lines"] for one in ranks[1:]), "one rank speaks"


def test_without_fp8_it_is_told_how_it_would_fare(found: dict[str, list[dict[str, Any]]]) -> None:
    (alone,), (sdpa,) = found["alone"], found["sdpa"]
    mine, wanted = sdpa["records"][1], alone["records"][1]
    assert mine.keys() == wanted.keys()
    # The first layer is given the same in the forward pass.
    assert mine["attention/00/out_error"] == pytest.approx(wanted["attention/00/out_error"], rel=1e-3)
    assert mine[f"attention/{SICK:02}/out_error"] > LIMIT
    assert sdpa["lines"] == []
    assert sdpa["kernels"][-1] == {str(layer): "sdpa" for layer in range(MODEL.layers)}


def test_a_report_is_read_back_from_the_journal(tmp_path: Path) -> None:
    layers = {
        0: LayerReport(0.05, None, False, {"q": (0.0, 0.25), "p": (0.0, 0.5)}),
        11: LayerReport(0.5, 0.7, True, {"q": (0.0, 0.75), "p": (0.0, 0.5), "ds": (0.125, 0.0)}),
    }
    records: list[dict[str, Any]] = [{"loss": 1.0}, entries(0, layers[0]) | entries(11, layers[11]), {"loss": 1.0}]
    lines = [json.dumps({"step": step + 1, "kind": "train", **record}) + "\n" for step, record in enumerate(records)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert read(tmp_path).step == 2
    assert read(tmp_path).layers == layers
    assert read(tmp_path, 2) == read(tmp_path)
    with pytest.raises(UserError, match="no report on attention at step 3; there are 2"):
        read(tmp_path, 3)


def test_a_resumed_run_keeps_the_fall_back_and_the_last_report_is_shown(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", [60])
    (tmp_path / "tokenizers").mkdir()
    CORPUS.save(tmp_path / "tokenizers" / "vocabulary.json")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config(tmp_path) | {"evaluation": {}}))
    options = ["engine.attention.kernel=fp8", "attention_health.interval=2", "attention_health.fall_back=1e-6"]
    options += [f"run.folder={tmp_path / 'run'}", "tracking.mlflow=false"]
    falls = "goes on without FP8"
    assert train_as_a_user(tmp_path, *options, "run.steps=3").stderr.count(falls) == 2
    assert falls not in train_as_a_user(tmp_path, *options, "run.steps=4").stderr
    shown = CliRunner().invoke(app, ["health", str(tmp_path / "run")])
    assert shown.exit_code == 0, shown.output
    lines = [line.strip() for line in shown.output.splitlines()]
    assert lines[0].startswith("step 4: ")
    assert [line.split()[0] for line in lines[2:] if "/" in line] == ["0*", "1*"]
    assert lines[-1] == "* goes on without FP8"


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"fall_back must be above 0 or null, got -1"):
        AttentionHealthOptions(interval=1, fall_back=-1)
    with pytest.raises(UserError, match=r"set attention_health\.interval above 0"):
        AttentionHealthOptions(fall_back=0.1)
    with pytest.raises(UserError, match=r"\.interval must be at least 0 and \.sequences at least 1, got 1 and 0"):
        AttentionHealthOptions(interval=1, sequences=0)
    with pytest.raises(UserError, match="kernel sdpa never takes FP8"):
        FALLS.check(AttentionOptions("sdpa"), 64)
    with pytest.raises(UserError, match="kernel auto never takes FP8"):
        FALLS.check(AttentionOptions(), 64)
    FALLS.check(AttentionOptions(fp8_from=1024), 64)
    with pytest.raises(UserError, match="heads of up to 128, the model of 192"):
        replace(FALLS, fall_back=None).check(AttentionOptions("sdpa"), 192)
    with pytest.raises(UserError, match="no metrics of a run"):
        read(tmp_path)
