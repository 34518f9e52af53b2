import math
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megagrow.cli.report import main
from megagrow.errors import DataError
from megagrow.report import write_report
from megagrow.report.curves import running_mean
from megagrow.report.log import encode_line
from megagrow.report.run import summarize
from tests.report.logs import (
    Page,
    diagnosed,
    growth_line,
    step_line,
    two_stage_run,
    validation_line,
)

ROOT = Path(__file__).resolve().parents[2]


def report_of(tmp_path, lines, config="run: {}\n"):
    run_dir = tmp_path / "run"
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_bytes(b"".join(encode_line(line) for line in lines))
    if config is not None:
        (run_dir / "config.yaml").write_text(config)
    return write_report(run_dir).read_text("utf-8")


def svgs(text):
    """The outermost SVG elements, each parsed as XML."""
    found, depth, start = [], 0, 0
    for match in re.finditer(r"<(/?)svg\b", text):
        if not match[1]:
            start = match.start() if depth == 0 else start
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                found.append(ElementTree.fromstring(text[start : match.end() + 1]))
    assert depth == 0
    return found


def labels(svg):
    return [t.text for t in svg.iter("text") if t.get("class") == "label"]


def test_the_page_is_whole_and_needs_nothing_else(tmp_path):
    text = report_of(tmp_path, two_stage_run())
    page = Page(text)
    plots = [svg for svg in svgs(text) if svg.get("class") == "plot"]
    assert len(plots) == 5
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe")]
    for _, attrs in page.tags:
        assert not {"src", "href"} & set(attrs)
    assert "url(" not in text and "@import" not in text and "http" not in text
    assert "nan" not in re.sub(r"<title>.*?</title>", "", text, flags=re.S)
    assert "prefers-color-scheme: dark" in text
    assert "9.8.7" in page.text and "all stages done" in page.text


def test_growths_are_marked_with_operator_and_jump_where_they_happened(tmp_path):
    text = report_of(tmp_path, two_stage_run())
    compute, tokens, *others = [svg for svg in svgs(text) if svg.get("class") == "plot"]
    for svg in (compute, tokens):
        assert labels(svg) == ["width +0.25"]
        (line,) = [e for e in svg.iter("line") if e.get("class") == "marker"]
        assert line.get("x1") == "33.33%"  # step 10 of 30
        assert "444 k" in " ".join(e.text for e in svg.iter("title"))
    for svg in others:
        assert labels(svg) == ["width"]


def test_the_tables_hold_the_numbers_of_the_log(tmp_path):
    page = Page(report_of(tmp_path, two_stage_run()))
    assert page.tables["growths"][1][2:] == [
        [10],
        [2.5],
        [2.75],
        [0.25],
        [111_111, 444_444],
        [0.5],
        [5_333_333],
        [1 << 20],
    ]
    _, first, second, total = page.tables["stages"]
    #           parameters steps tokens   FLOPs       time  first last validation
    assert first[2:] == [[111_111], [10], [1000], [100_000], [10], [4.6], [4.1]]
    assert second[2:] == [[444_444], [20], [2000], [200_000], [20], [4.2], [1.0625]]
    assert total[3:] == [[30], [3000], [300_000], [30], [], [1.0625]]
    assert "4 layers, 1\u202f024 hidden, 8 heads" in page.text
    assert "data 2, zero 1" in page.text


def stopped_run(reason, **end):
    """Steps to 747 of 1,200, validated every hundred."""
    return [
        {"event": "run_start", "total_steps": 1200, "time": 1000.0},
        *(step_line(step, 0) for step in range(690, 748)),
        validation_line(700, 0, 3.25),
        *(
            [{"event": "end", "step": 747, "reason": reason, "time": 2000.0, **end}]
            if reason
            else []
        ),
    ]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (stopped_run("SIGTERM"), "stopped by SIGTERM at 747 of 1\u202f200 steps"),
        (
            stopped_run("train.stop_after_steps", total_steps=900),
            "stopped by train.stop_after_steps at 747 of 900 steps",
        ),
        (stopped_run(None), "not at its end: at 747 of 1\u202f200 steps"),
        ([{**line, "total_steps": None} for line in stopped_run("SIGINT")],
         "stopped by SIGINT at 747"),
    ],
)  # fmt: skip
def test_a_run_that_was_stopped_is_not_called_finished_nor_its_loss_final(tmp_path, lines, said):
    text = report_of(tmp_path, lines)
    page = Page(text)
    assert said in page.text
    assert "finished" not in page.text and "chip good" not in text
    assert "Final validation loss" not in page.text
    assert "Validation loss of step 700" in page.text
    run = summarize(lines)
    assert not run.complete and math.isnan(run.final_validation)


def test_only_the_loss_after_the_last_step_of_a_whole_run_is_called_final(tmp_path):
    lines = two_stage_run()
    page = Page(report_of(tmp_path, lines))
    assert "finished: all stages done" in page.text and "Final validation loss" in page.text
    assert summarize(lines).final_validation == 1.0625
    # The last validation is not a number, and the one before it is not final.
    lines.insert(-1, validation_line(30, 1, math.nan))
    lines.remove(validation_line(30, 1, 1.0625))
    page = Page(report_of(tmp_path, lines))
    assert "Validation loss of step 10" in page.text and "Final" not in page.text
    assert math.isnan(summarize(lines).final_validation)


HOSTILE = '"><script>alert(1)</script><b onload=x>&amp;\u202e\x00\ud800'


def test_hostile_strings_are_only_text(tmp_path):
    lines = two_stage_run()
    lines[0].update(version=HOSTILE, note=HOSTILE, model={"layers": HOSTILE, "family": HOSTILE})
    growth = next(line for line in lines if line["event"] == "growth")
    growth.update(operator=HOSTILE, state_policy=HOSTILE, layout={HOSTILE: HOSTILE})
    lines[-1]["reason"] = HOSTILE
    text = report_of(tmp_path, lines, config=HOSTILE.replace("\ud800", ""))
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "b" not in {tag for tag, _ in page.tags}
    assert page.text.count("<script>alert(1)</script>") >= 6
    assert "\0" not in text  # not allowed in XML, and HTML parsers differ
    assert len([svg for svg in svgs(text) if svg.get("class") == "plot"]) == 5


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"event": "run_start"}],
        [step_line(1, 0)],
        [step_line(1, 0), step_line(2, 0)],
        [validation_line(0, 0, 8.0)],
        [growth_line(0, 1)],
        [step_line(step, 0, loss=math.nan) for step in (1, 2, 3)],
        [step_line(step, 0, loss=loss) for step, loss in enumerate((3, math.nan, math.inf, 2), 1)],
        [step_line(1, 0, loss=-1e308), step_line(2, 0, loss=1e308), validation_line(2, 0, 1e308)],
        [step_line(1, 0, tokens=10**400), step_line(2, 0, flops=-5)],
        [growth_line(3, 1, before=math.nan), step_line(4, 1)],
        [{"event": "step"}, {"event": "validation"}, {"event": "growth"}, {"event": "end"}],
        [{"event": "step", "step": "x", "tokens": [], "loss": {}, "growth_stage": True, "time": 0}],
    ],
)
def test_short_and_odd_runs_get_a_whole_page(tmp_path, lines):
    text = report_of(tmp_path, lines, config=None)
    Page(text)
    for svg in svgs(text):
        for element in svg.iter():
            for key, value in element.attrib.items():
                assert "nan" not in value and "inf" not in value, (key, value)


def test_losses_that_are_not_numbers_are_counted(tmp_path):
    lines = [step_line(step, 0, loss=math.nan if step in (3, 4) else 2.0) for step in range(1, 9)]
    text = Page(report_of(tmp_path, lines)).text
    assert "2 steps with a loss that is not a number, the first is 3" in text
    assert "not at its end" in text


def test_time_between_a_kill_and_its_resume_is_not_run_time():
    lines = [step_line(1, 0), step_line(2, 0), {"event": "resume", "time": 9000.0}]
    lines += [{**step_line(3, 0), "time": 9004.0}]
    run = summarize(lines)
    assert run.seconds == 1 + 4
    assert run.resumes == 1


def test_the_running_mean_keeps_a_jump_sharp_and_does_not_lag():
    values = [1.0] * 20 + [5.0] * 20
    stages = [0] * 20 + [1] * 20
    assert running_mean(values, stages, 5) == values
    ramp = [float(i) for i in range(50)]
    assert running_mean(ramp, [0] * 50, 4) == pytest.approx(ramp)
    mean = running_mean([1.0, math.nan, 3.0], [0, 0, 0], 1)
    assert mean[0] == 1.0 and math.isnan(mean[1]) and mean[2] == 3.0


def test_a_directory_of_no_run_and_a_damaged_log_are_refused_and_the_old_report_stays(tmp_path):
    with pytest.raises(DataError, match="not a run directory"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
    old = report_of(tmp_path, two_stage_run())
    run_dir = tmp_path / "run"
    (run_dir / "metrics.jsonl").write_text("broken\n")
    with pytest.raises(DataError, match="line 1"):
        write_report(run_dir)
    assert (run_dir / "report.html").read_text("utf-8") == old


def test_the_command_rewrites_the_report(tmp_path, capsys):
    report_of(tmp_path, two_stage_run())
    report = tmp_path / "run" / "report.html"
    report.unlink()
    assert main([str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.strip() == str(report)
    assert report.exists()
    assert main([str(tmp_path / "absent")]) != 0
    assert "not a run directory" in capsys.readouterr().err


def test_reporting_needs_neither_torch_nor_deepspeed():
    code = (
        "import sys, megagrow.report; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'deepspeed', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def long_run(steps):
    """A log that is too long for a page: one spike of each kind, one gap, a growth."""
    yield {"event": "run_start", "total_steps": steps, "time": 1000.0}
    for step in range(1, steps + 1):
        line = step_line(step, 0 if step <= steps // 2 else 1, loss=4.0 if step % 2 else 2.0)
        if step == 1001:
            line["loss"] = 77.0
        if step == 2001:
            line["loss"] = 0.25
        if step == 3001:
            line["grad_norm"] = 55.0
        if step in (4001, 4002):
            line["loss"] = math.nan
        yield line
        if step % 10 == 0:
            yield validation_line(step, line["growth_stage"], 3.0)
        if step == steps // 2:
            yield growth_line(step, 1)


def test_a_long_log_is_thinned_as_it_is_read_without_losing_what_a_picture_must_show():
    whole, thin = summarize(long_run(20_000)), summarize(long_run(20_000), most=500)
    assert (whole.steps_each, len(whole.steps), whole.means) == (1, 20_000, whole.steps)
    assert thin.steps_each == 64 and len(thin.means) <= 500 and len(thin.steps) <= 1500
    assert thin.steps_counted == 20_000
    assert len(thin.validations) <= 501 and thin.validations[-1] == whole.validations[-1]
    # Totals cover all lines; extremes and gaps are kept; means do not mix stages.
    for name in ("stages", "growths", "seconds", "goodput", "last_step", "not_finite",
                 "first_not_finite", "final_validation", "complete"):  # fmt: skip
        assert getattr(thin, name) == getattr(whole, name), name
    by_number = {step.step: step for step in thin.steps}
    assert (by_number[1001].loss, by_number[2001].loss, by_number[3001].grad_norm) == (77, 0.25, 55)
    assert 4001 in by_number or 4002 in by_number
    assert all(step in whole.steps for step in thin.steps if math.isfinite(step.loss))
    usual = [step for step in thin.means if 5000 < step.step < 9000]
    assert {step.loss for step in usual} == {3.0} and len({step.stage for step in thin.means}) == 2
    middle = next(step for step in thin.means if step.stage == 1)
    assert middle.tokens > thin.growths[0].tokens


def test_a_page_says_that_its_curves_are_thinned_and_of_what(tmp_path, monkeypatch):
    monkeypatch.setattr("megagrow.report.page._MOST", 300)
    text = report_of(tmp_path, list(long_run(6000)))
    page = Page(text)
    assert "drawn from 6\u202f000 steps: of every 32 neighbours" in page.text
    assert "Of 2 validations in a row one is drawn" in page.text and "count every one" in page.text
    assert "extremes of 32 steps" in page.text
    assert "neighbours" not in Page(report_of(tmp_path, two_stage_run())).text
    for svg in svgs(text):
        for element in svg.iter():
            assert not any("nan" in value for value in element.attrib.values())


# --- growth diagnostics -------------------------------------------------------------------


def test_diagnostics_are_drawn_and_mixing_times_reported(tmp_path):
    foretold = {"foretold": {"capacity": 1.0, "s_scale": 10.0, "s_power": 0.5, "floor": 1.0}}
    mixing = {"event": "mixing", "step": 25, "tokens": 2500, "growth_stage": 1,
              "mixing_tokens": 1500, "loss": 2.0, "foretold": 2.1, "time": 1025.5}  # fmt: skip
    lines = [line | foretold if line["event"] == "growth" else line for line in two_stage_run()]
    lines += [
        diagnosed(20, twin_cosine=0.9, participation=3.5, gradient_share=0.2, dead_units=0.0),
        diagnosed(30, twin_cosine=0.5, participation=4.5, gradient_share="nan"),
        mixing,
    ]
    run = summarize(lines)
    assert [one.step for one in run.diagnoses] == [20, 30]
    assert run.diagnoses[1].values == {"twin_cosine": 0.5, "participation": 4.5}
    assert dict(run.mixing) == {1: 1500.0}
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(map(encode_line, lines)))
    page = write_report(tmp_path).read_text()
    for words in ("Growth diagnostics", "Participation ratio", "cosine of twins", "Mixing time",
                  "1.5 ktokens", "Share of the new parameters"):  # fmt: skip
        assert words in page, words
    unmixed = [line for line in lines if line["event"] != "mixing"]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(map(encode_line, unmixed)))
    assert "not in this run" in write_report(tmp_path).read_text()
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(map(encode_line, two_stage_run())))
    plain = write_report(tmp_path).read_text()
    assert "Growth diagnostics" not in plain and "Mixing time" not in plain
