"""Saving and loading take the memory of a few pieces, not of the state."""

import json
import os
import subprocess
import sys
from pathlib import Path

MEASURE = """
import gc, json, sys, warnings
from pathlib import Path
warnings.filterwarnings("ignore")
from gptface_dist.benchmarks.checkpoint import _measure
from gptface_dist.checkpoint.tensor_shards import collect_shards
from gptface_dist.checkpoint.save import Content, save_checkpoint
from gptface_dist.checkpoint.load import damage, load_checkpoint
from gptface_dist.distributed.collectives import RankGroup
from gptface_dist.model.parameters import ParameterSpec
from tests.checkpoint.fake_state import FakeState, record, tiny, write

run = Path(sys.argv[1])
write(run / "warm", tiny(0.0), 1)
# Rows that no piece is a multiple of; 70 MB a tensor, 3 tensors.
state = FakeState(1.0, parameters=(ParameterSpec("matrix", (3001, 5861), None, None, None, 0.0, True, False),))
shards = collect_shards(state.local_shards(), written=True)
saving = _measure(lambda: save_checkpoint(run / "out", Content(shards, record(1), {}), RankGroup()))[1]
out = run / "out" / "step-00000001"
loading = _measure(lambda: (damage(out, RankGroup()), load_checkpoint(out, state, RankGroup())))[1]
print(json.dumps([saving, loading]))
"""


def test_a_few_pieces(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    saving, loading = json.loads(done.stdout.splitlines()[-1])
    # TensorShards are of 16 MiB, of which three are in memory, and the allocator's own; the state is of 211 MB.
    print(saving, loading)
    assert saving < 4 * 2**24
    assert loading < 4 * 2**24
