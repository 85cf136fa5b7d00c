"""The HTML report in a real browser: no console errors, nothing wider than a phone. Needs chromium."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr")
PROBE = """<script>
addEventListener("load", () => {
  const wide = document.documentElement.scrollWidth;
  document.title = `wide ${wide} of ${innerWidth}, ${document.querySelectorAll("svg rect").length} cells`;
});
</script>"""
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")]


def browse(page: Path, profile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.parametrize("kind", ["elastic", "dense"])
def test_the_report_opens_without_errors_at_any_width(edit, qwen_folder, tmp_path, kind):
    what = ["--dense"] if kind == "dense" else ["a cat", "--budget", "0.6"]
    ran = edit("profile", *what, "-m", qwen_folder, "--repeats", "1", "-o", "report", cwd=tmp_path)
    assert ran.code == 0, ran.err
    page = tmp_path / "report" / "report.html"
    page.write_text(page.read_text(encoding="utf-8") + PROBE, encoding="utf-8")
    for width in (390, 1280):
        shown = browse(page, tmp_path / f"user-{width}", f"--window-size={width},1200", "--dump-dom")
        assert "CONSOLE" not in shown.stderr, shown.stderr
        found = re.search(r"<title>wide (\d+) of (\d+), (\d+) cells", shown.stdout)
        assert found is not None, "the page's script did not run to its end"
        wide, inner, cells = map(int, found.groups())
        assert wide <= inner and cells > 8
