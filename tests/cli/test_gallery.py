"""`--gallery`: a folder's pictures on one page, whole in itself, in a real browser at a phone's width too."""

from __future__ import annotations

import re

import pytest

from tests.cli.test_report_browser import CHROMIUM, browse

PROMPT = 'a <b>"bold"</b> & $5 cat'
PROBE = """<script>
addEventListener("load", () => {
  const seen = [...document.images].filter(i => { i.loading = "eager"; return i.naturalWidth > 0; }).length;
  document.title = `wide ${document.documentElement.scrollWidth} of ${innerWidth}, ${seen} pictures`;
});
</script>"""


@pytest.fixture(scope="module")
def page(edit_here, qwen_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery")
    common = ["-m", qwen_folder, "--steps", "2", "--width", "64", "--height", "64", "--gallery", "-q"]
    ran = edit_here("generate", "a dog", "-n", "2", "-o", "{prompt}-{seed}.webp", *common, cwd=folder)
    assert ran.code == 0, ran.err
    (folder / "other.png").write_bytes(b"no picture")
    ran = edit_here("generate", PROMPT, "-b", "0.5", "--compare", "-o", "cat #1.png", *common, cwd=folder)
    assert ran.code == 0, ran.err
    return folder / "index.html"


def test_the_page_holds_every_picture_of_the_folder(page):
    text = page.read_text(encoding="utf-8")
    cards = re.findall(r"<figure>.*?</figure>", text)
    assert "3 pictures" in text and len(cards) == 3 and "http" not in text
    cat = next(card for card in cards if "cat%20%231.png" in card)
    assert "a &lt;b&gt;&quot;bold&quot;&lt;/b&gt; &amp; $5 cat" in cat and "<b>a &lt;b&gt;" in cat
    for words in ("seed 0", "budget 0.5", "dB, SSIM", 'href="cat%20%231-compare.png"', "data:image/jpeg"):
        assert words in cat
    assert all("dB" not in card for card in cards if card != cat)


def test_a_page_of_somebody_else_is_not_replaced(edit_here, qwen_folder, tmp_path):
    (tmp_path / "index.html").write_text("<p>mine")
    ran = edit_here("generate", "a cat", "-m", qwen_folder, "--steps", "2", "--gallery", cwd=tmp_path)
    assert ran.code == 2 and "which is another page; move it" in ran.err
    assert [file.name for file in tmp_path.iterdir()] == ["index.html"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(page, tmp_path, width):
    shown_page = tmp_path / "index.html"
    shown_page.write_text(page.read_text(encoding="utf-8") + PROBE, encoding="utf-8")
    shown = browse(shown_page, tmp_path / "user", f"--window-size={width},1200", "--dump-dom")
    assert "CONSOLE" not in shown.stderr, shown.stderr
    found = re.search(r"<title>wide (\d+) of (\d+), (\d+) pictures", shown.stdout)
    assert found is not None and int(found[1]) <= int(found[2]) and int(found[3]) == 3
