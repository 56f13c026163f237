"""Run logs are read back as they were meant, and become one self-sufficient page and a chart."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from tools.errors import ToolError
from tools.report import main
from tools.reporting.page import RunLog, smoothed, write_loss_chart, write_report


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny<1>"
    folder.mkdir()
    lines = [
        {"step": step, "loss": 8.0 - 0.1 * step, "tokens": 8192 * step, "tokens_per_s": 1000.0}
        for step in (1, 2, 3, 2, 3, 4)
    ]
    lines[-1] |= {"val_loss": 6.125, "val_bits_per_byte": 1.75, "tokens_per_s": float("nan")}
    spent = {"compute": 90.0, "data": 0.0, "restarts": 10.0}
    lines[-1] |= {"spent_s": spent}  # type: ignore[dict-item]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "lo'
    (folder / "metrics.jsonl").write_text(text)
    (folder / "events.jsonl").write_text('{"step": 2, "event": "resume", "note": "<b>"}\n')
    (folder / "config.json").write_text('{"max_steps": 4}')
    return folder


def test_a_step_counts_once_and_half_a_line_not_at_all(run: Path) -> None:
    log = RunLog.read(run)
    assert [line["step"] for line in log.steps] == [1, 2, 3, 4]
    steps, losses = zip(*log.series("loss"), strict=True)
    assert steps == (1, 2, 3, 4)
    assert losses == pytest.approx((7.9, 7.8, 7.7, 7.6))
    assert log.series("tokens_per_s") == [(1, 1000.0), (2, 1000.0), (3, 1000.0)]  # not the NaN
    assert log.series("grad_norm") == []


def test_the_chart_is_a_self_sufficient_svg_drawn_to_scale(run: Path, tmp_path: Path) -> None:
    root = ElementTree.parse(write_loss_chart([run], tmp_path / "loss.svg")).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    raw, average, held_out = (line.get("points") for line in root.findall(".//{*}polyline"))
    # x: 0 .. 4 on 60 .. 790; y: the held-out 6.125 on 305, the first loss 7.9 on 30
    assert raw == "242.5,30.0 425.0,45.5 607.5,61.0 790.0,76.5"
    assert average == raw  # so short a run is not averaged
    assert held_out == "790.0,305.0"
    assert [mark.text for mark in root.findall(".//{*}title")] == ["resume"]
    texts = ["".join(text.itertext()) for text in root.findall(".//{*}text")]
    assert "tiny<1>, held out" in texts[0] and {"7.9", "6.125", "4", "step"} <= set(texts)


def test_the_page_refers_to_nothing_and_escapes_what_it_shows(run: Path, tmp_path: Path) -> None:
    page = write_report([run, run], tmp_path / "page.html").read_text()
    assert page.count("<svg") == 2  # of gradient norms nothing was logged
    assert not re.search(r"(?:src|href|url)\s*[=(]", page)
    assert "tiny&lt;1&gt;" in page and "<1>" not in page
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert "32,768" in page  # tokens at the last step
    assert page.count("<td>6.125</td>") == 2
    assert page.count("<td>1.7500</td>") == 2
    assert "&#34;max_steps&#34;: 4" in page
    assert "<th>in all</th><th>compute</th><th>data</th><th>restarts</th>" in page
    assert "<td>100 s</td><td>90 s (90.0%)</td><td>–</td><td>10 s (10.0%)</td>" in page


def test_the_command_writes_into_the_run(run: Path) -> None:
    result = CliRunner().invoke(main, [str(run)])
    assert result.exit_code == 0, result.output
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert str(run / "report.html") in result.output


def test_a_page_that_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    for out, words in ((tmp_path, "is a directory"), (tmp_path / "no" / "a.html", "is no folder")):
        result = CliRunner().invoke(main, [str(tmp_path / "nothing"), "--out", str(out)])
        assert result.exit_code == 2 and words in result.stderr, result.output


def test_a_folder_without_logged_steps_is_named(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=r"no metrics\.jsonl"):
        RunLog.read(tmp_path)
    result = CliRunner().invoke(main, [str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ToolError, match="no step has been logged"):
        RunLog.read(tmp_path)


def test_smoothing_keeps_a_constant_and_follows_a_fall() -> None:
    assert [v for _, v in smoothed([(n, 3.0) for n in range(100)], 2)] == pytest.approx([3.0] * 100)
    falling = smoothed([(n, 1000.0 - n) for n in range(1000)], 20)
    assert falling == sorted(falling, key=lambda point: -point[1])
    assert falling[-1][1] < 60
    assert smoothed([(1, 2.5)], 0.02) == [(1, 2.5)]
