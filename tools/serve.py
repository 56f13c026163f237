"""summer-serve: a model behind OpenAI's API, and a page to talk to it.

summer-serve
summer-serve --hf SmolLM2-135M-Instruct --port 8080
summer-serve --run runs/summer-1b --host 0.0.0.0 --token "$TOKEN"
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from types import FrameType
from typing import Any

import click

from tools.command import command, model_options
from tools.errors import ToolError


@command("summer-serve --run runs/tiny")
@model_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--token", default="", envvar="SUMMER_TOKEN", help="What clients must know.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True,
              help="Answers written at once.")  # fmt: skip
@click.option("--waiting", type=click.IntRange(1), default=64, show_default=True,
              help="Requests that may wait; more are rejected.")  # fmt: skip
def main(host: str, port: int, token: str, batch: int, waiting: int, **options: Any) -> None:
    """Serve a model: /v1/models, /v1/completions, /v1/chat/completions, and a page at /."""
    if not _is_loopback(host) and not token:
        raise ToolError(
            f"--host {host}: others could reach it; give --token TEXT too (or SUMMER_TOKEN)"
        )
    from tools.models.loading import ModelSpec, has_conversed, load

    with _listening(host, port) as listener:
        loaded = load(ModelSpec(**options))
        try:
            import uvicorn

            from tools.serving.api import make_app
            from tools.serving.engine import Engine
        except ImportError as error:
            raise ToolError(f"{error}: pip install 'summerlm[serve]'") from error
        chat = loaded.checkpoint is None or has_conversed(loaded.checkpoint)
        engine = Engine(loaded, batch, waiting)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        hosts = ["localhost", "127.0.0.1", "[::1]", host] if _is_loopback(host) else ["*"]
        app = make_app(engine, hosts=hosts, token=token, chat=chat)
        click.echo(f"{loaded.name}: {address} (API at {address}/v1); Ctrl-C ends it")
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        ends = server.handle_exit

        def handle_exit(number: int, frame: FrameType | None) -> None:
            engine.end()  # uvicorn waits for answers that are being written
            ends(number, frame)

        vars(server).update(handle_exit=handle_exit)
        try:
            with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again
                server.run(sockets=[listener])
        finally:
            engine.stop()


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listening(host: str, port: int) -> socket.socket:
    """A socket that is taken before the model is loaded; ToolError where it cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, reuse_port=False)
    except OSError as error:
        raise ToolError(
            f"{host}:{port} cannot be listened on ({error}): choose a --port"
        ) from error


if __name__ == "__main__":
    main()
