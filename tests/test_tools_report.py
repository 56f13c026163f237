"""Run logs are read back as they were meant, and become a picture and one self-sufficient page."""

import json
import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tools.errors import ReportError
from tools.report import main
from tools.reporting.figures import smoothed, write_loss_curve
from tools.reporting.page import report_page
from tools.reporting.run_log import read_run

pytest.importorskip("matplotlib")

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny<1>"
    folder.mkdir()
    lines = [
        {"step": step, "loss": 8.0 - 0.1 * step, "tokens": 8192 * step, "tokens_per_s": 1000.0}
        for step in (1, 2, 3, 2, 3, 4)
    ]
    lines[-1] |= {"val_loss": 6.125, "val_bits_per_byte": 1.75}
    spent = {"compute": 90.0, "data": 0.0, "restarts": 10.0}
    lines[-1] |= {"spent_s": spent}  # type: ignore[dict-item]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "lo'
    (folder / "metrics.jsonl").write_text(text)
    (folder / "events.jsonl").write_text('{"step": 2, "event": "resume", "note": "<b>"}\n')
    (folder / "config.json").write_text('{"max_steps": 4}')
    return folder


def test_a_step_counts_once_and_half_a_line_not_at_all(run: Path) -> None:
    log = read_run(run)
    assert [line["step"] for line in log.steps] == [1, 2, 3, 4]
    steps, losses = log.series("loss")
    assert steps == [1, 2, 3, 4]
    assert losses == pytest.approx([7.9, 7.8, 7.7, 7.6])
    assert log.series("grad_norm") == ([], [])


def test_the_picture_is_a_png(run: Path, tmp_path: Path) -> None:
    path = write_loss_curve([read_run(run)], tmp_path / "loss.png")
    assert path.read_bytes().startswith(PNG)
    assert len(path.read_bytes()) > 10_000


def test_the_page_is_whole_and_escapes_what_it_shows(run: Path) -> None:
    page = report_page([read_run(run), read_run(run)])
    assert page.count("data:image/png;base64,") == 1
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert "tiny&lt;1&gt;" in page and "<1>" not in page
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert "32,768" in page  # tokens at the last step
    assert page.count("<td>6.125</td>") == 2
    assert page.count("<td>1.7500</td>") == 2
    assert "&quot;max_steps&quot;: 4" in page


def test_the_page_says_where_the_time_went(run: Path) -> None:
    page = report_page([read_run(run)])
    assert "<th>in all</th><th>compute</th><th>data</th><th>restarts</th>" in page
    row = "<td>100 s</td><td>90 s (90.0%)</td><td>–</td><td>10 s (10.0%)</td>"
    assert row in page


def test_the_command_writes_beside_the_run(run: Path) -> None:
    result = CliRunner().invoke(main, [str(run)])
    assert result.exit_code == 0, result.output
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert str(run / "report.html") in result.output


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"no metrics\.jsonl"):
        read_run(tmp_path)
    result = CliRunner().invoke(main, [str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_a_run_without_steps_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ReportError, match="no step has been logged"):
        read_run(tmp_path)


def test_without_matplotlib_one_line_says_what_to_install(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = CliRunner().invoke(main, [str(run)])
    assert result.exit_code == 1
    assert "pip install 'summerlm[report]'" in result.stderr


def test_smoothing_keeps_a_constant_and_follows_a_fall() -> None:
    assert smoothed([3.0] * 100, 2) == pytest.approx([3.0] * 100)
    falling = smoothed([float(value) for value in range(1000, 0, -1)], 20)
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < 60
    assert smoothed([2.5], 0.02) == [2.5]
