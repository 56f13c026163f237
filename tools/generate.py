"""summer-generate: let a model write, or talk to it.

    summer-generate --prompt "The meaning of" --max-tokens 100 --temperature 0.7 --top-k 40
    summer-generate --checkpoint runs/tiny/checkpoints/step-20 --prompt "def "
    summer-generate --run runs/chat --chat

Text appears as it is written, never half a character. The same seed writes the same text.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from model.config import ModelError
from shards.errors import one_line_failures

if TYPE_CHECKING:
    from tools.generation.generation import Conversation

_FOLDER = click.Path(path_type=Path)


@click.command(epilog='Example: summer-generate --prompt "The meaning of" --temperature 0.7')
@click.option("--run", type=_FOLDER, help="A run, at its newest checkpoint.  [default: newest run]")
@click.option("--checkpoint", type=_FOLDER, help="One checkpoint: runs/NAME/checkpoints/step-N.")
@click.option("--hf", type=_FOLDER, help="A Llama-family folder (safetensors, tokenizer).")
@click.option("--prompt", default="", help="Text to go on from; with --chat, the one question.")
@click.option("--chat", is_flag=True, help="Use the chat template; without --prompt, converse.")
@click.option("--system", default="", help="With --chat: text before the first question.")
@click.option("--max-tokens", default=256, show_default=True)
@click.option("--temperature", default=0.8, show_default=True, help="0: greedy.")
@click.option(
    "--top-k", default=0, show_default=True, help="Draw from the k most probable; 0: all."
)
@click.option(
    "--top-p", default=1.0, show_default=True, help="Draw from the most probable that add up to p."
)
@click.option("--seed", default=0, show_default=True)
@click.option("--cache/--no-cache", default=True, help="Keep keys and values (same text, faster).")
@click.option("--dtype", type=click.Choice(["auto", "bf16", "fp32"]), default="auto")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto")
@one_line_failures(ModelError)
def main(prompt: str, chat: bool, system: str, **options: Any) -> None:
    """Write on from a prompt, or answer in a conversation."""
    from tools.generation.generation import Conversation, Generation, Sampling, complete
    from tools.models.loading import ModelSpec, load

    names = ("temperature", "top_k", "top_p", "seed")
    sampling = Sampling(**{name: options[name] for name in names})
    generation = Generation(
        max_tokens=options["max_tokens"], sampling=sampling, use_cache=options["cache"]
    )
    named = ("run", "checkpoint", "hf", "device", "dtype")
    loaded = load(ModelSpec(**{name: options[name] for name in named}))
    click.echo(loaded.name, err=True)
    if chat:
        _converse(Conversation(loaded, generation, system), prompt)
    else:
        click.echo(prompt, nl=False)
        complete(loaded, prompt, generation, _show)
        click.echo()


def _converse(conversation: Conversation, prompt: str) -> None:
    """One question and its answer; or as many as are typed, until the end of input."""
    if prompt:
        conversation.ask(prompt, _show)
        click.echo()
        return
    while True:
        if sys.stdin.isatty():
            click.echo("> ", nl=False)
        question = sys.stdin.readline()
        if not question:
            return
        if question.strip():
            conversation.ask(question.rstrip("\n"), _show)
            click.echo()


def _show(text: str) -> None:
    """Print at once; a terminal that cannot show a character gets a replacement."""
    encoding = sys.stdout.encoding or "utf-8"
    click.echo(text.encode(encoding, "replace").decode(encoding), nl=False)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
