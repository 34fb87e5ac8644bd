"""The pages as a reader meets them: in a real browser, on a phone, in the dark, on paper, with no other host asked."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

from halfrank.doctor.checks import Plan, examine
from halfrank.doctor.page import Curve, Mark, curves, doctor_page, page
from halfrank.errors import DataError
from halfrank.model import folder
from halfrank.train.report import read_journal, write_report
from tiny import make_folder

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (apt-get install chromium)")
LOOK = """<script>
const drawn = [...document.querySelectorAll("svg rect.cell, svg path.curve")].map(e => e.getBoundingClientRect());
document.body.dataset.seen = JSON.stringify({
  cells: document.querySelectorAll("svg.heat rect.cell").length,
  curves: [...document.querySelectorAll("svg path.curve")].filter(e => e.getTotalLength() > 20).length,
  empty: drawn.filter(r => r.width + r.height === 0).length,
  wider: document.documentElement.scrollWidth - window.innerWidth,
  paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color});
</script>"""


class Seen(NamedTuple):
    """What a browser saw of a page."""

    page: dict[str, Any]
    console: list[str]
    asked: list[str]  # addresses that the page asked for


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The doctor's page of a model that overflows, and the report of a run in which things happened."""
    place = tmp_path_factory.mktemp("pages")
    scorer = folder.load(make_folder("bert", place / "m"), folder.LoadOptions(compute="emulated-float16"))
    scorer.model.bert.encoder.layer[0].output.dense.weight.data *= 3e5
    report = examine(scorer, None, None, Plan(), name="<model> & more")
    (place / "doctor.html").write_text(doctor_page(report), encoding="utf-8")
    steps = [
        {"step": n, "loss": 1 / n if n != 7 else "nan", "gradient_norm": 2.0**-n, "loss_scale": 65536.0, "lr": 1e-5 * n,
         "headroom_bits": 9.0, "underflow_share": 0.01 * n}
        for n in range(1, 21)
    ]  # fmt: skip
    events = [
        {"event": "recovery", "rung": "widen", "step": 8, "reason": "overflow in <layer>"},
        {"event": "evaluation", "step": 10, "score": 0.5, "ndcg@10": 0.5},
        {"event": "evaluation", "step": 20, "score": 0.7, "ndcg@10": 0.7},
        {"event": "certificate", "step": 20, "passed": True, "text": "fine"},
        {"event": "end", "step": 20, "skipped": 1},
    ]
    lines = [{"event": "start", "step": 0, "precision": "float16"}, *steps, *events]
    (place / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 21, "lo')
    write_report(place)
    for name in ("doctor", "report"):
        text = (place / f"{name}.html").read_text(encoding="utf-8")
        (place / f"{name}-look.html").write_text(text.replace("</body>", LOOK + "</body>"), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def host(pages: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(pages)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def browse(address: str, place: Path, *flags: str, size: str = "1100,900") -> Seen:
    assert BROWSER is not None
    log = place / "net.json"
    words = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-default-apps", "--disable-sync",
        f"--user-data-dir={place / 'profile'}", f"--log-net-log={log}", "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--window-size={size}", *flags, "--dump-dom",
        address,
    ]  # fmt: skip
    ran = subprocess.run(words, capture_output=True, text=True, timeout=90)
    assert ran.returncode == 0, ran.stderr[-500:]
    found = re.search(r'data-seen="([^"]*)"', ran.stdout)
    seen = json.loads(found[1].replace("&quot;", '"')) if found else {}
    own = f"{urlsplit(address).scheme}://{urlsplit(address).netloc}"
    netlog = json.loads(log.read_text(errors="replace"))
    begun = netlog["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    events = [event.get("params", {}) for event in netlog["events"] if event["type"] == begun]
    requests = [params for params in events if "url" in params]
    # The browser asks for things of its own as well; what the page asks for names the page's origin.
    asked = [r["url"] for r in requests if r["url"].startswith(own) or r.get("initiator") == own]
    return Seen(seen, re.findall(r"CONSOLE.*", ran.stderr), asked)


def hosts(seen: Seen) -> set[str]:
    return {urlsplit(address).netloc for address in seen.asked}


@needs_browser
@pytest.mark.parametrize("name", ["doctor", "report"])
def test_pages_are_drawn_without_errors_and_ask_no_other_host(name: str, host: str, tmp_path: Path) -> None:
    seen = browse(f"{host}/{name}-look.html", tmp_path)
    assert seen.console == []
    assert hosts(seen) == {urlsplit(host).netloc}
    assert {urlsplit(address).path for address in seen.asked} == {f"/{name}-look.html"}
    assert seen.page["empty"] == 0
    if name == "doctor":
        assert seen.page["cells"] > 60
    else:
        assert seen.page["curves"] >= 6


@needs_browser
@pytest.mark.parametrize("name", ["doctor", "report"])
def test_pages_fit_a_phone_and_turn_dark(name: str, host: str, tmp_path: Path) -> None:
    seen = browse(f"{host}/{name}-look.html", tmp_path, "--force-dark-mode", size="500,900")
    assert seen.page["wider"] <= 0
    assert max(map(int, re.findall(r"\d+", seen.page["paper"]))) < 60
    assert min(map(int, re.findall(r"\d+", seen.page["ink"]))) > 180


@needs_browser
def test_pages_print(host: str, pages: Path, tmp_path: Path) -> None:
    assert BROWSER is not None
    target = tmp_path / "doctor.pdf"
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'p'}"]
    subprocess.run([*words, f"--print-to-pdf={target}", f"{host}/doctor.html"], capture_output=True, timeout=90)
    assert target.read_bytes()[:5] == b"%PDF-"
    assert target.stat().st_size > 20_000


@needs_browser
def test_the_watchers_see_what_they_watch_for(host: str, pages: Path, tmp_path: Path) -> None:
    bad = '<script>console.error("seen");</script><img src="http://other.invalid/x.png">'
    (pages / "bad.html").write_text(page("bad", [bad]))
    seen = browse(f"{host}/bad.html", tmp_path)
    assert any("seen" in line for line in seen.console)
    assert "other.invalid" in hosts(seen)


def test_pages_name_no_address_and_run_no_script(pages: Path) -> None:
    for name in ("doctor", "report"):
        text = (pages / f"{name}.html").read_text(encoding="utf-8")
        assert not re.findall(r"(?:https?:)?//[\w.]+|<script|@import|url\(|src=", text)
    assert "&lt;model&gt; &amp; more" in (pages / "doctor.html").read_text(encoding="utf-8")
    assert "overflow in &lt;layer&gt;" in (pages / "report.html").read_text(encoding="utf-8")


def test_curves_leave_out_what_cannot_be_drawn() -> None:
    nan = float("nan")
    drawn = curves("loss", [Curve("loss", [(1, 2.0), (2, nan), (3, 1.0)])], [Mark(2, "a < b", "fix")])
    assert "1 points are not finite" in drawn
    assert "a &lt; b" in drawn
    assert "nan" not in drawn
    assert curves("loss", [Curve("loss", [(1, nan)])]) == ""
    assert curves("norm", [Curve("norm", [(1, 0.0)])], log=True) == ""
    flat = curves("scale", [Curve("scale", [(1, 0.0), (2, 0.0)])])
    assert "inf" not in flat


def test_a_curve_without_any_finite_point_is_named_beside_one_that_has_some() -> None:
    drawn = curves("loss", [Curve("train", [(1, 1.0), (2, 0.5)]), Curve("eval", [(1, float("nan"))])])
    assert drawn.count('class="curve"') == 1
    assert "eval (1 points are not finite)" in drawn


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        write_report(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"train\.jsonl:2"):
        read_journal(tmp_path / "train.jsonl")
