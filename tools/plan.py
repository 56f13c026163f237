"""summer-plan: what a run would need and cost, before anything is rented.

summer-plan --preset summer-4b --device mi300x --devices 8 --dollars-per-hour 2.31
summer-plan --preset summer-1b --device h100 --devices 1 --days 2 --json
"""

from __future__ import annotations

import json
from typing import Any

import click

from tools.command import command


@command("summer-plan --preset summer-4b --device mi300x --devices 8 --days 9")
@click.option("--preset", default="summer-4b", show_default=True, help="Shape and length of run.")
@click.option("--device", default="mi300x", show_default=True, help="Accelerator, by name.")
@click.option("--devices", default=8, show_default=True, help="How many of them.")
@click.option("--dollars-per-hour", type=float, help="Price of ONE device for an hour.")
@click.option("--tokens", type=float, help="Tokens to train on (8.4e10); else the preset's own.")
@click.option("--days", type=float, help="Time to spend instead; the tokens follow.")
@click.option("--mfu", type=float, help="Assumed share of the peak.  [default: 0.32]")
@click.option("--roofline", is_flag=True, help="A step's time by part, at stated rates: a range.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(as_json: bool, **request: Any) -> None:
    """Work out parameters, memory, time, money and disk of a training run."""
    from tools.planning import plan_cost

    plan = plan_cost(**{name: value for name, value in request.items() if value is not None})
    click.echo(json.dumps(plan) if as_json else "\n".join(_lines(plan)))


def _lines(plan: dict[str, Any]) -> list[str]:
    """The plan, line by line, for a terminal."""
    parts = {part: size for part, size in plan["memory_bytes"].items() if size}
    limit, degree = plan["device_bytes"] or 0, plan["shard_degree"]
    verdict = f" of {limit / 1e9:.0f} GB: {'fits' if plan['fits'] else 'does NOT fit'}"
    divided = f", --set shard_degree={degree}" if degree > 1 else ""
    return [
        f"{plan['preset']}: {plan['parameters']:,} parameters, "
        f"{plan['flops_per_token'] / 1e9:.2f} GFLOP per token (forward and backward, causal)",
        f"memory of one device, {plan['micro_batch_size']} sequences at a time{divided}:",
        *(f"  {part:<12} {size / 1e9:9.2f} GB" for part, size in parts.items()),
        f"  {'together':<12} {sum(parts.values()) / 1e9:9.2f} GB{verdict if limit else ''}",
        f"served        {plan['served_by']}",
        f"tokens        {plan['tokens']:,} in {plan['steps']:,} steps",
        *_rates(plan),
        *_roofline(plan),
        f"disk          {plan['shard_bytes'] / 1e9:,.1f} GB of shards if no sequence is seen twice;"
        f" checkpoints {plan['checkpoint_bytes'] / 1e9:,.1f} GB each, room for"
        f" {plan['checkpoints_kept']}",
    ]


def _rates(plan: dict[str, Any]) -> list[str]:
    """Speed, time and money; or why they are withheld."""
    device, rate, days = plan["device"], plan["tokens_per_s"], plan["days"]
    if rate is None:
        from tools.planning import known_devices

        text = f"tokens/s, days and dollars are withheld: no peak is known for {device!r}"
        return [f"{text} ({known_devices(device)})"]
    lines = [
        f"tokens/s      {rate:,.0f} on {plan['devices']} x {device}, ASSUMING "
        f"{plan['assumed_mfu']:.0%} of the bf16 peak (an assumption, not a measurement)",
        f"time          {f'{days:,.1f} days' if days >= 2 else f'{days * 24:,.2f} hours'}",
    ]
    return lines if plan["dollars"] is None else [*lines, f"money         ${plan['dollars']:,.0f}"]


def _roofline(plan: dict[str, Any]) -> list[str]:
    """A step's parts, and what they add up to; nothing unless it was asked for."""
    if not (parts := plan["roofline_s"]):
        return []
    totals = [sum(ends) for ends in zip(*parts.values(), strict=True)]
    rates = [plan["step_tokens"] / total for total in totals]
    per_peak = plan["assumed_mfu"] / plan["tokens_per_s"]
    lines = [
        f"  {name:<12} {fast * 1e3:9,.0f} .. {slow * 1e3:,.0f} ms"
        for name, (fast, slow) in (*parts.items(), ("together", totals))
    ]
    lines[-1] += f": {rates[1]:,.0f} .. {rates[0]:,.0f} tokens/s, "
    lines[-1] += f"{rates[1] * per_peak:.0%} .. {rates[0] * per_peak:.0%} of the peak"
    return ["a step by part: ARITHMETIC, counted FLOPs and bytes at stated rates", *lines]


if __name__ == "__main__":
    main()
