"""summer-generate: let a model write, or talk to it.

    summer-generate --prompt "The meaning of" --max-tokens 100 --temperature 0.7 --top-k 40
    summer-generate --checkpoint runs/tiny/checkpoints/step-20 --prompt "def "
    summer-generate --run runs/chat --chat
    cat question.txt | summer-generate --prompt-file - --json

Text appears as it is written, never half a character. The same seed writes the same text.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import click

from tools.command import command, model_options
from tools.errors import ToolError


@command('summer-generate --prompt "The meaning of" --temperature 0.7')
@model_options
@click.option("--prompt", default="", help="Text to go on from; with --chat, the one question.")
@click.option("--prompt-file", type=click.File("rb"), help="The prompt from a file; - is stdin.")
@click.option("--chat", is_flag=True, help="Use the chat template; without --prompt, converse.")
@click.option("--system", default="", help="With --chat: text before the first question.")
@click.option("--max-tokens", default=256, show_default=True, help="The most that are written.")
@click.option("--temperature", default=0.8, show_default=True, help="0: greedy.")
@click.option(
    "--top-k", default=0, show_default=True, help="Draw from the k most probable; 0: all."
)
@click.option(
    "--top-p", default=1.0, show_default=True, help="Draw from the most probable that add up to p."
)
@click.option("--seed", default=0, show_default=True, help="The same seed writes the same text.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: prompt, text, model.")
@click.option("--cache/--no-cache", default=True, help="Keep keys and values (same text, faster).")
def main(prompt: str, chat: bool, system: str, as_json: bool, **options: Any) -> None:
    """Write on from a prompt, or answer in a conversation."""
    from tools.generation.generation import Conversation, Generation, Sampling, complete
    from tools.models.loading import ModelSpec, has_conversed, load

    prompt = _checked(prompt, options["prompt_file"])
    if as_json and chat and not prompt:
        raise click.UsageError("--json with --chat answers one question: give it with --prompt")
    names = ("temperature", "top_k", "top_p", "seed")
    generation = Generation(
        max_tokens=options["max_tokens"],
        sampling=Sampling(**{name: options[name] for name in names}),
        use_cache=options["cache"],
    )
    named = ("run", "checkpoint", "hf", "device", "dtype")
    loaded = load(ModelSpec(**{name: options[name] for name in named}))
    click.echo(loaded.name, err=True)
    conversation = Conversation(loaded, generation, system) if chat else None
    if conversation and loaded.checkpoint and not has_conversed(loaded.checkpoint):
        click.echo("! its run has read no conversations: answers are not to be expected", err=True)
    if as_json:
        text = conversation.ask(prompt) if conversation else complete(loaded, prompt, generation)
        click.echo(json.dumps({"prompt": prompt, "text": text, "model": loaded.name}))
    elif conversation:
        for question in [prompt] if prompt else _questions():
            conversation.ask(question, _show)
            click.echo()
    else:
        _show(prompt)
        complete(loaded, prompt, generation, _show)
        click.echo()


def _checked(prompt: str, file: BinaryIO | None) -> str:
    """The prompt, from one of both; ToolError where it is no UTF-8."""
    if file is not None and prompt:
        raise click.UsageError("--prompt and --prompt-file: give one of them")
    try:
        data = prompt.encode("utf-8", "surrogateescape") if file is None else file.read()
        return data.decode()
    except UnicodeError as error:
        raise ToolError(f"the prompt is no UTF-8 ({error}): convert it, or leave it out") from error


def _questions() -> Iterator[str]:
    """The lines that are typed, until the end of input."""
    while True:
        if sys.stdin.isatty():
            click.echo("> ", nl=False)
        if not (line := sys.stdin.readline()):
            return
        if line.strip():
            yield line.rstrip("\n")


def _show(text: str) -> None:
    """Print at once; a terminal that cannot show a character gets a replacement."""
    encoding = sys.stdout.encoding or "utf-8"
    click.echo(text.encode(encoding, "replace").decode(encoding), nl=False)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
