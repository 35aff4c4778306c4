"""The HTML report: one file, nothing from outside, no error in a real browser's console."""

import json
import re
import shutil
import subprocess

import pytest

from clipkit.errors import UserError
from clipkit.tracking.command import run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture
def written(recorder, capsys):
    """Two configurations of two seeds, one of one, and a result file."""
    for seed in (0, 1):
        recorder.run(f"seed{seed}", 0.55 + 0.01 * seed, seed=seed, examples=seed == 0)
        recorder.run(f"siglip{seed}", 0.8 + 0.01 * seed, seed=seed, model__loss="SigLIPLoss")
    recorder.run("other", 0.5, model__loss="</script><script>throw 1</script><!--")
    recorder.result("base.json", 0.7)

    def write(*words):
        assert run(["drawn", "base.json", "--html", "out/report.html", *words]) == 0
        assert "report: out/report.html" in capsys.readouterr().out
        return recorder.folder / "out" / "report.html"

    return write


def data_of(page):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return json.loads(text, parse_constant=pytest.fail)


def test_what_the_report_holds(written, recorder):
    page = written().read_text()
    data = data_of(page)
    curves = {curve["metric"]: curve for curve in data["curves"]}
    assert next(iter(curves)) == "zeroshot/digits/top1"
    one = curves["zeroshot/digits/top1"]["series"]["A1"]
    assert one["step"] == [0, 10, 20, 30, 40]
    assert one["samples"] == [0, 2560, 5120, 7680, 10240]
    assert one["hours"][0] == 0
    assert one["hours"] == sorted(one["hours"])
    lows, values, highs = one["low"], one["value"], one["high"]
    assert all(a < b < c for a, b, c in zip(lows, values, highs, strict=True))
    assert "train/loss" in curves
    classes = {found["run"]: found for found in data["classes"]}
    labels, (right, predicted) = recorder.labels, recorder.zeroshot(0.8, 0)
    worst = classes["B1"]["worst"][0]
    by_class = {number: right[labels == number].mean() for number in range(10)}
    assert worst["value"] == pytest.approx(min(by_class.values()))
    assert classes["B1"]["best"] == []
    most = classes["B1"]["confusions"][0]
    pairs = list(zip(labels[labels != predicted], predicted[labels != predicted], strict=True))
    assert most["count"] == max(pairs.count(pair) for pair in set(pairs))
    assert classes["B1"]["worst"][0]["base"] is not None
    (examples,) = data["examples"]
    assert examples["run"] == "A1"
    assert {item["right"] for item in examples["items"]} == {True, False}
    assert data["environment"]["A1"]["torch"] == "2.15.0"
    assert data["configuration_claims"]["made"]
    assert data["checkpoint_claims"]["made"]


def test_the_report_asks_nobody(written):
    page = written().read_text()
    assert "default-src 'none'" in page
    without_data = re.sub(r'<script type="application/json".*?</script>', "", page, flags=re.S)
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", without_data))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a namespace's name
    assert not re.search(r"<link[^>]+stylesheet|<script[^>]+src=|@import|url\(", without_data)


def test_examples_that_would_ask_are_refused(written, recorder):
    file = recorder.folder / "runs/drawn/seed0/outcomes/retrieval-own-last-examples.json"
    items = json.loads(file.read_text())
    items[0]["image"] = "https://example.org/tracker.png"
    file.write_text(json.dumps(items))
    with pytest.raises(UserError, match="a picture that is no data: address"):
        written()


def test_a_report_that_cannot_be_written(written, recorder):
    (recorder.folder / "out").write_text("in the way")
    with pytest.raises(UserError, match=r"--html out/report.html: cannot be written"):
        written()


def test_long_histories_are_thinned(recorder, capsys):
    folder = recorder.run("one", 0.6, mlflow=False)
    lines = [
        json.dumps({"time": 2000.0 + step, "step": 100 + step, "train/loss": 1.0 / (1 + step)})
        for step in range(5000)
    ]
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(f"{line}\n" for line in lines)
    assert run([str(folder), "--html", "report.html"]) == 0
    data = data_of((recorder.folder / "report.html").read_text())
    (curve,) = (curve for curve in data["curves"] if curve["metric"] == "train/loss")
    steps = curve["series"]["A"]["step"]
    assert len(steps) == 400
    assert steps[-1] == 5099


USE_EVERYTHING = """
<script>
addEventListener("load", () => {
  for (const select of document.querySelectorAll("select")) {
    for (const option of [...select.options]) {
      select.value = option.value;
      select.dispatchEvent(new Event("change"));
    }
  }
  for (const button of document.querySelectorAll("button")) button.click();
  for (const button of document.querySelectorAll(".legend button")) button.click();
  const chart = document.querySelector("#chart svg");
  const box = chart.getBoundingClientRect();
  const at = {clientX: box.left + box.width / 2, clientY: box.top + 50};
  chart.dispatchEvent(new PointerEvent("pointermove", at));
  document.body.dataset.tip = document.getElementById("tip").textContent;
  document.body.dataset.overflows = document.documentElement.scrollWidth > innerWidth;
});
</script></body>
"""


@pytest.fixture
def browse(tmp_path):
    """Opens a page in a real browser; gives what it made of it, and its console."""
    if BROWSER is None:
        pytest.skip("no chromium is installed: apt-get install chromium")

    def browse(page, width=1280):
        done = subprocess.run(
            [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},2000",
             f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000",
             "--enable-logging=stderr", "--dump-dom", page.as_uri()],
            capture_output=True, text=True, timeout=180, check=True,
        )  # fmt: skip
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return re.sub(r"<script.*?</script>", "", done.stdout, flags=re.S), console

    return browse


@pytest.mark.parametrize("words", [(), ("--best-over-epochs",), ("--chosen", "--baseline", "base")])
def test_a_real_browser_finds_no_error(written, browse, words):
    dom, console = browse(written(*words))
    assert not console
    assert 'data-ready="true"' in dom
    assert re.findall(r"<h2>(.*?)</h2>", dom) == [
        "Summary", "Curves", "Differences", "Classes", "Examples", "Configuration", "Environment",
    ]  # fmt: skip
    assert dom.count("<svg") > 40
    assert not re.search("NaN|undefined|Infinity", dom)
    assert "This checkpoint beats that one" in dom
    if not words:
        assert "<polygon" in dom  # the seeds' bands
        assert "As a configuration, <b>B</b>" in dom


@pytest.mark.parametrize("width", [390, 1280])
def test_every_control_works(written, browse, width):
    page = written()
    framed = page.with_name("used.html")
    framed.write_text(page.read_text().replace("</body>", USE_EVERYTHING))
    dom, console = browse(framed, width)
    assert not console
    assert not re.search("NaN|undefined|Infinity", dom)
    assert re.search(r'data-tip="[\d.]+ (hours|steps|samples)', dom)
    assert 'data-overflows="false"' in dom


def test_a_report_of_one_file_has_no_empty_sections(recorder, browse, capsys):
    recorder.result("base.json", 0.7)
    assert run(["base.json", "--html", "report.html"]) == 0
    dom, console = browse(recorder.folder / "report.html")
    assert not console
    titles = re.findall(r"<h2>(.*?)</h2>", dom)
    assert titles == ["Summary", "Classes", "Configuration", "Environment"]
