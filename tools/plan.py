"""summer-plan: what a run would need and cost, before anything is rented.

summer-plan --preset summer-4b --device mi300x --devices 8 --dollars-per-hour 2.31
summer-plan --preset summer-1b --device h100 --devices 1 --days 2 --json
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from tools.command import command

if TYPE_CHECKING:
    from tools.planning import CostPlan


@command("summer-plan --preset summer-4b --device mi300x --devices 8 --days 9")
@click.option("--preset", default="summer-4b", show_default=True, help="Shape and length of run.")
@click.option("--device", default="mi300x", show_default=True, help="Accelerator, by name.")
@click.option("--devices", default=8, show_default=True, help="How many of them.")
@click.option("--dollars-per-hour", type=float, help="Price of ONE device for an hour.")
@click.option("--tokens", type=float, help="Tokens to train on (8.4e10); else the preset's own.")
@click.option("--days", type=float, help="Time to spend instead; the tokens follow.")
@click.option("--mfu", type=float, help="Assumed share of the peak.  [default: 0.32]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(as_json: bool, tokens: float | None, **request: Any) -> None:
    """Work out parameters, memory, time, money and disk of a training run."""
    from tools.planning import PlanRequest, plan_cost

    given = {name: value for name, value in request.items() if value is not None}
    plan = plan_cost(PlanRequest(tokens=None if tokens is None else int(tokens), **given))
    click.echo(json.dumps(plan.to_json()) if as_json else "\n".join(_lines(plan)))


def _lines(plan: CostPlan) -> list[str]:
    """The plan, line by line, for a terminal."""
    parts = {part: size for part, size in plan.memory_bytes.items() if size}
    memory = [f"  {part:<12} {size / 1e9:9.2f} GB" for part, size in parts.items()]
    divided = f", --set shard_degree={plan.shard_degree}" if plan.shard_degree > 1 else ""
    return [
        f"{plan.preset}: {plan.parameters:,} parameters, "
        f"{plan.flops_per_token / 1e9:.2f} GFLOP per token (forward and backward, causal)",
        f"memory of one device, {plan.micro_batch_size} sequences at a time{divided}:",
        *memory,
        f"  {'together':<12} {sum(plan.memory_bytes.values()) / 1e9:9.2f} GB{_verdict(plan)}",
        f"tokens        {plan.tokens:,} in {plan.steps:,} steps",
        *_rates(plan),
        f"disk          {plan.shard_bytes / 1e9:,.1f} GB of shards if no sequence is seen twice; "
        f"checkpoints {plan.checkpoint_bytes / 1e9:,.1f} GB each, room for {plan.checkpoints_kept}",
    ]


def _verdict(plan: CostPlan) -> str:
    """Whether it fits, where that is known."""
    if plan.device_bytes is None:
        return ""
    verdict = "fits" if plan.fits else "does NOT fit"
    return f" of {plan.device_bytes / 1e9:.0f} GB: {verdict}"


def _rates(plan: CostPlan) -> list[str]:
    """Speed, time and money; or why they are withheld."""
    if plan.tokens_per_s is None or plan.days is None:
        from tools.planning import known_devices

        return [
            f"tokens/s, days and dollars are withheld: no peak is known for {plan.device!r} "
            f"({known_devices(plan.device)})"
        ]
    lines = [
        f"tokens/s      {plan.tokens_per_s:,.0f} on {plan.devices} x {plan.device}, ASSUMING "
        f"{plan.assumed_mfu:.0%} of the bf16 peak (an assumption, not a measurement)",
        f"time          {_duration(plan.days)}",
    ]
    if plan.dollars is not None:
        lines.append(f"money         ${plan.dollars:,.0f}")
    return lines


def _duration(days: float) -> str:
    """Days, or hours where it is less than two of them."""
    return f"{days:,.1f} days" if days >= 2 else f"{days * 24:,.2f} hours"


if __name__ == "__main__":
    main()
