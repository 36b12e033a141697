"""``gptface bench``: speed and memory, as ratios to a named baseline in the same run. One file a command."""

import typer

from gptface_dist.tools.bench import attention, checkpoint, data, fp8, gpu, loss, train

app = typer.Typer(no_args_is_help=True, help="Measure speed against a named baseline in the same run.")
app.command("data")(data.data)
app.command("train")(train.train)
app.command("checkpoint")(checkpoint.checkpoint)
app.command("loss")(loss.loss)
app.command("attention")(attention.attention)
app.command("fp8")(fp8.fp8)
app.command("gpu")(gpu.gpu)
