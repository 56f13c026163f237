"""summer-convert: a run of ours <-> a folder of Hugging Face.

summer-convert --from runs/tiny --to tiny-hf                  then AutoModelForCausalLM ...
summer-convert --from runs/tiny --to tiny-hf --push me/tiny   and onto the Hub, private
summer-convert --from TinyLlama-1.1B --to runs/tinyllama      then summer-eval ... --run

A run with model.alibi=false becomes a plain LlamaForCausalLM, and with --gguf a file for llama.cpp.
With ALiBi its code goes along, and transformers runs it with trust_remote_code=True.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tools.command import FOLDER, command

if TYPE_CHECKING:
    from tools.conversion.conversion import Converted


@command("summer-convert --from TinyLlama-1.1B --to runs/tinyllama")
@click.option(
    "--from", "source", type=FOLDER, required=True, help="A run, checkpoint or HF folder."
)
@click.option("--to", "target", type=FOLDER, help="The folder to make.")
@click.option("--format", "wanted", type=click.Choice(["hf", "summer"]),
              help="What to make.  [default: other]")  # fmt: skip
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]),
              help="Of a Hugging Face folder's weights.  [default: bf16]")  # fmt: skip
@click.option("--license", help="For the model card, as apache-2.0.  [default: other]")
@click.option("--language", multiple=True, help="For the model card, as en.")
@click.option("--gguf", type=click.Choice(["f32", "f16", "bf16", "q8_0"]),
              help="Write a file for llama.cpp too.")  # fmt: skip
@click.option("--push", metavar="OWNER/NAME", help="Upload the folder to the Hub, private.")
@click.option("--public", is_flag=True, help="With --push: for everyone to see.")
def main(
    source: Path, target: Path | None, gguf: str | None, push: str | None, public: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Convert a model, and compare its logits with transformers before saying so.

    Without --to, --from names a folder that was made before, for --gguf or --push.
    """
    from tools.conversion import publish
    from tools.conversion.conversion import check_folder, convert

    if target is None and not (gguf or push):
        raise click.UsageError("give --to a new folder, or --gguf or --push for one that is there")
    if public and not push:
        raise click.UsageError("--public goes with --push")
    wanted, how = options.pop("wanted"), {name: given for name, given in options.items() if given}
    if target is None and (idle := [*how, *(["format"] if wanted else [])]):
        raise click.UsageError(f"--{idle[0]} is for a folder that is made: give --to")
    if push:
        publish.check_hub(push)  # before hours of work
    if target is None:
        click.echo(_text(check_folder(source, gguf or ""), source))
    else:
        click.echo(_text(convert(source, target, wanted, how, gguf or ""), target))
    folder = target or source
    if gguf:
        click.echo(f"llama.cpp:  {folder / f'{folder.name}-{gguf}.gguf'}")
    if push:
        click.echo(f"uploaded: {publish.push(folder, push, public=public)}")


def _text(made: Converted, target: Path) -> str:
    """What was made and how exact it is, and how to use it."""
    use = f"see {target / 'README.md'}"
    rounded = f"; {made.dtype} moves them by {made.rounding:.1e}" if made.dtype != "fp32" else ""
    if made.made == "summer":
        use = (
            f"summer-eval wikitext2 --run {target}\n"
            f"         summer-train --shards shards/ --set init_from={target}"
        )
    return (
        f"{made.source} -> {target} ({made.made}, {made.parameters:,} parameters)\n"
        "tokens equal SentencePiece's; logits differ from transformers' by"
        f" {made.largest_difference:.1e} at most (limit {made.limit:.1e}, fp32){rounded}\n"
        f"use it:  {use}"
    )


if __name__ == "__main__":
    main()
