"""summer-convert: a run of ours <-> a folder of Hugging Face.

summer-convert --from runs/tiny --to tiny-hf                  then AutoModelForCausalLM ...
summer-convert --from TinyLlama-1.1B --to runs/tinyllama      then summer-eval ... --run

A run with model.alibi=false becomes a plain LlamaForCausalLM. With ALiBi its code goes along, and
transformers runs it with trust_remote_code=True.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tools.command import FOLDER, command

if TYPE_CHECKING:
    from tools.conversion.conversion import Format


@command("summer-convert --from TinyLlama-1.1B --to runs/tinyllama")
@click.option(
    "--from", "source", type=FOLDER, required=True, help="A run, checkpoint or HF folder."
)
@click.option("--to", "target", type=FOLDER, required=True, help="The folder to make.")
@click.option(
    "--format",
    "wanted",
    type=click.Choice(["hf", "summer"]),
    help="What to make.  [default: other]",
)
def main(source: Path, target: Path, wanted: Format | None) -> None:
    """Convert a model, and compare its logits with transformers before saying so."""
    from tools.conversion.conversion import convert

    made, name, parameters, difference, limit = convert(source, target, wanted)
    click.echo(
        f"{name} -> {target} ({made}, {parameters:,} parameters)\n"
        f"tokens equal SentencePiece's; logits differ from transformers' by"
        f" {difference:.1e} at most (limit {limit:.1e}, fp32)"
    )
    if made == "summer":
        click.echo(
            f"use it:  summer-eval wikitext2 --run {target}\n"
            f"         summer-train --shards shards/ --set init_from={target}"
        )
    else:
        click.echo(f"use it:  see {target / 'README.md'}")


if __name__ == "__main__":
    main()
