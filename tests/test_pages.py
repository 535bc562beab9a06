"""The page of a run: curves and tables against plain recomputation, and the whole page in a real browser."""
import functools
import http.server
import io
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import configs
import data
import page

ROOT = Path(__file__).parent.parent
EVIL = '<img src=x onerror="alert(1)"> & "owl"'
PROMPTS = [EVIL, "red apple on a blue background"]
ROWS = [{"device": "a CPU", "torch": "2", "git": "abc"}, {"step": 1, "images": 16, "loss": 2.0, "img_s": 9.0, "mfu": 0.1, "minutes": 1.0, "gib": 0.5, "bad": 0}]


def train(folder, *args):
    argv = ["--config=debug", "--train.images=64", "--train.eval_every=32", "--train.save_every=64", "--train.log_every=1", "--train.val_images=8",
            "--sample.steps=1", f"--out={folder}", *args]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "train.py", *argv], cwd=ROOT, capture_output=True, text=True, timeout=120, env=one)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr + done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of four steps and two evaluations, named as if by somebody who means ill."""
    folder = tmp_path_factory.mktemp("runs") / "a <b>run"
    train(folder, f"--sample.prompts={'|'.join(PROMPTS)}")
    return folder


@pytest.fixture(scope="module")
def emoji():
    return data.load(configs.debug)


# ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [0, 1, 499, 500, 501, 300_000])
def test_thinned_points_are_means_of_all(n):
    points = np.random.default_rng(0).normal(size=(n, 2))
    begin, thin = time.perf_counter(), page.thin([tuple(p) for p in points.tolist()])
    assert time.perf_counter() - begin < 5 and len(thin) == (n if n <= 500 else math.ceil(n / math.ceil(n / 500)))
    each = math.ceil(n / 500) or 1
    for i, point in enumerate(thin):
        assert np.allclose(point, points[i * each:(i + 1) * each].mean(0), atol=1e-12)
    if n <= 500:
        assert np.array_equal(np.array(thin).reshape(-1, 2), points)


def test_ticks_are_few_round_and_inside():
    generator = np.random.default_rng(1)
    for _ in range(2000):
        a, b = np.sort(10 ** generator.uniform(-6, 9, 2))
        for low, high, found in ((0, b, page.ticks(0, b)), (a, b, page.log_ticks(a, b)), (a, a * 1.3, page.log_ticks(a, a * 1.3))):
            assert 2 <= len(found) <= 6 and found == sorted(set(found))
            assert found[0] >= low * (1 - 1e-6) and found[-1] <= high * (1 + 1e-6)
            if low == 0:
                assert f"{found[1] - found[0]:.0e}"[0] in "125" and found[0] == 0 and np.diff(found) == pytest.approx(found[1])
    assert page.ticks(0, 192.3) == [0, 50, 100, 150] and page.ticks(0, 102_400) == [0, 20_000, 40_000, 60_000, 80_000, 100_000]
    assert page.log_ticks(0.03, 2.4) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2])


@pytest.mark.parametrize("log", [True, False])
def test_a_curve_lies_where_its_axes_say(log):
    """The values read off the drawing by its own labels are those that were drawn."""
    values = [(100 * i, 3.7 * 0.8 ** i) for i in range(1, 20)]
    svg = page.chart("Loss", [("training", values)], 2000, log=log)
    across = [(float(x), float(text)) for x, text in re.findall(r'<text x="([\d.]+)" y="\d+" text-anchor="middle">([\d.]+)k?</text>', svg)]
    across = [(x, n * 1000 if 0 < n < 10 else n) for x, n in across]
    up = [(float(y) - 4, float(text)) for y, text in re.findall(r'y="([\d.]+)" text-anchor="end">([\d.e-]+)</text>', svg)]
    kind = np.log if log else np.asarray
    x_of, y_of = np.polyfit(*zip(*across), 1), np.polyfit([y for y, _ in up], kind([v for _, v in up]), 1)
    drawn = [tuple(map(float, pair.split())) for pair in re.findall(r"[\d.]+ [\d.]+", re.search(r'class="first" d="M([^"]+)"', svg)[1])]
    assert len(drawn) == 19 and len(across) >= 3 and len(up) >= 3
    for (x, y), (images, loss) in zip(drawn, values):
        assert np.polyval(x_of, x) == pytest.approx(images, abs=5)
        assert np.polyval(y_of, y) == pytest.approx(kind(loss), abs=0.02 if log else 0.03)


def test_what_cannot_be_drawn_is_left_out(tmp_path):
    rows = [(1, math.nan), (2, math.inf), (3, 0.0), (4, 0.5)]
    assert "0.5 at first, 0.5 at last" in page.chart("Loss", [("training", rows)], 10, log=True)
    assert "nothing logged yet" in page.chart("Loss", [("training", rows[:3])], 10, log=True)
    assert "0 at first" in page.chart("Speed", [("img", [(1, 0.0)])], 10)
    assert not re.search("nan|inf", page.chart("Loss", [("training", rows), ("validation", rows)], 10, log=True))
    lost = [ROWS[0], {**ROWS[1], **dict.fromkeys(("loss", "img_s", "mfu", "minutes", "gib"), math.nan)}, {"images": 16, "val_loss": math.inf}]
    assert "the loss is nan" in page.html(tmp_path, configs.debug, lost, PROMPTS, "none")
    assert "None yet." in page.html(tmp_path, configs.debug, ROWS[:1], [], "")


def test_the_nearest_training_picture_is_found_and_drawn(emoji, tmp_path):
    train, held_out = emoji[0], emoji[1].emoji
    dataset = train.emoji
    generator = torch.Generator().manual_seed(0)
    pairs = [*(dataset.pairs[i] for i in (0, 50, 99)), held_out.pairs[0]]
    clean = torch.stack([torch.from_numpy(dataset.render(*pair)) for pair in pairs])
    images = (clean.int() + torch.randint(-20, 21, clean.shape, generator=generator)).clamp(0, 255).to(torch.uint8)
    found = page.nearest(images, PROMPTS * 2, train, tmp_path)
    gallery = np.stack([dataset.render(*pair) for pair in dataset.pairs]).astype(np.float64) / 255
    for i, (image, (prompt, caption, away)) in enumerate(zip(images, found)):
        distances = np.sqrt(((image.numpy().astype(np.float64) / 255 - gallery) ** 2).mean((1, 2, 3)))
        best = distances.argmin()
        assert (prompt, caption) == ((PROMPTS * 2)[i], dataset.caption(*dataset.pairs[best])) and away == pytest.approx(distances[best], abs=1e-6)
        with Image.open(tmp_path / "nearest" / f"{i:02d}.png") as both:
            assert both.size == (2 * 128 + 8, 128)
            left, right = (np.asarray(both.convert("RGB"))[::4, start:start + 128:4].transpose(2, 0, 1) for start in (0, 136))
        assert np.array_equal(left, image.numpy()) and np.array_equal(right, dataset.render(*dataset.pairs[best]))
    assert [caption for _, caption, _ in found[:3]] == [dataset.caption(*pair) for pair in pairs[:3]]
    assert found[3][1] != dataset.caption(*pairs[3])                            # never trained, so not among them


def test_where_the_nearest_are_not_looked_for_the_page_says_so(emoji, tmp_path, monkeypatch):
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    assert "built-in set only" in page.nearest(images, PROMPTS, SimpleNamespace(emoji=None), tmp_path)
    monkeypatch.setattr(page, "SEARCH", 100_000)
    assert "Not looked for" in (why := page.nearest(images, PROMPTS, emoji[0], tmp_path)) and "100k" in why
    assert why in page.html(tmp_path, configs.debug, ROWS, PROMPTS, why) and not (tmp_path / "nearest").exists()


def test_what_differs_from_the_recipe_is_marked():
    c = replace(configs.debug, seed=7, model=replace(configs.debug.model, route=None), sample=replace(configs.debug.sample, prompts=EVIL))
    text = page.config_tables(c)
    marked = re.findall(r'<tr class="differs"><th scope="row">(\w+)</th><td><b>(.*?)</b> \(recipe: (.*?)\)</td>', text)
    assert marked == [("seed", "7", "0"), ("route", "None", "1,2,0.5"), ("prompts", page.escape(EVIL), "—")] and "3 of " in text
    assert text.count("<tr") == sum(not is_dataclass(functools.reduce(getattr, key.split("."), c)) for key in configs.keys(c)) and EVIL not in text
    route = configs.override(configs.debug, "model.route", "1,2,0.25")
    assert '<b>1,2,0.25</b> (recipe: 1,2,0.5)' in page.config_tables(route)
    assert "0 of" in page.config_tables(configs.debug) and "differs" not in page.config_tables(configs.debug)
    assert "no recipe" in page.config_tables(replace(c, name="mine")) and "differs" not in page.config_tables(replace(c, name="mine"))


def test_warnings_of_the_log():
    assert "None." in page.warnings(ROWS)
    rows = [*ROWS, {"step": 2, "images": 32, "slow": "rank 1 <slept>"}, {"step": 3, "images": 48, "failed": "no checkpoint"}, {"resumed": 3, "device": "GPU"},
            {"step": 4, "images": 64, "loss": math.nan, "bad": 2}]
    said = re.findall("<li>(.*?)</li>", page.warnings(rows))
    assert len(said) == 5 and "rank 1 &lt;slept&gt;" in said[-1] and "image 32" in said[-1]
    assert "loss is nan" in said[0] and "not finite (2 in a row)" in said[1] and "resumed at step 3" in said[2] and "no checkpoint" in said[3]
    many = page.warnings([{"images": i, "slow": f"number {i}."} for i in range(1000)])
    assert many.count("<li>") == 50 and "The last 50 of 1,000" in many and "number 999." in many and "number 949." not in many


def test_a_long_log_makes_a_small_page_soon(tmp_path):
    rows = [ROWS[0], *({**ROWS[1], "step": i, "images": 16 * i, "loss": 1 / i} for i in range(1, 100_001))]
    c = replace(configs.debug, train=replace(configs.debug.train, images=1_600_000))
    begin = time.perf_counter()
    page.write(tmp_path, c, rows, PROMPTS, "none")
    assert time.perf_counter() - begin < 5                                      # 0.2 s on busy cores
    assert (tmp_path / "index.html").stat().st_size < 50_000 and [f.name for f in tmp_path.iterdir()] == ["index.html"]
    assert "mean of 200 log lines" in (tmp_path / "index.html").read_text()


# ------------------------------------------------------------------------------------------------------------------

def test_a_run_writes_its_page(run):
    text = (run / "index.html").read_text()
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert "<title>a &lt;b&gt;run · nanoT2I run</title>" in text and EVIL not in text and page.escape(EVIL) in text
    assert all(f"{r['val_loss']:.4g}" in text for r in rows if "val_loss" in r) and sum("val_loss" in r for r in rows) == 2
    assert 'data-names="0000000032 0000000064"' in text and text.count('class="differs"') == 8
    assert set(re.findall(r'src="([^"?]+)', text)) == {"samples/0000000064.png", "nearest/00.png", "nearest/01.png"}
    assert not re.search(r"https?:|//[a-z]", re.sub(r"out</th>.*", "", text))                             # nothing from elsewhere


def test_a_page_that_cannot_be_written_stops_nothing(tmp_path):
    for i in range(24):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), (10 * i, 100, 0)).save(tmp_path / f"pictures/{i}.png")
        (tmp_path / f"pictures/{i}.txt").write_text(f"a square of colour {i}")
    (tmp_path / "run" / "index.html").mkdir(parents=True)                       # in its way
    said = train(tmp_path / "run", f"--data={tmp_path / 'pictures'}", "--train.eval_every=0")
    assert said.count("WARNING: no pictures of step 4") == 1 and "Traceback" not in said and (tmp_path / "run" / "step_00000004").is_dir()


@pytest.fixture(params=["disk", "http.server"])
def address(run, request):
    if request.param == "disk":
        yield run.as_uri()
        return
    class Handler(http.server.SimpleHTTPRequestHandler):
        log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=run)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def shot(tab):
    return np.asarray(Image.open(io.BytesIO(tab.screenshot(full_page=True))).convert("L"), dtype=float)


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (360, "dark")])
def test_the_page_in_a_browser(address, browser, quiet, width, scheme):
    tab, asked = browser(width, scheme), []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(f"{address}/index.html")
    tab.wait_for_load_state("networkidle")
    assert tab.title() == "a <b>run · nanoT2I run" and tab.locator("h1").inner_text() == "a <b>run"
    assert all(url.startswith((address, "data:")) for url in asked)
    assert tab.evaluate("[...document.images].every(i => i.naturalWidth > 0 && i.alt)") and tab.locator("img").count() == 3
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    picture = shot(tab)
    ground = 253 if scheme == "light" else 22
    assert abs(np.median(picture) - ground) < 3 and picture.std() > 15          # neither blank nor of the other scheme
    for part in tab.locator("svg, .time img, .pairs img, .config table").all():
        box = part.bounding_box()
        inside = picture[int(box["y"]):int(box["y"] + box["height"]), int(box["x"]):int(box["x"] + box["width"])]
        assert box["width"] > 100 and inside.std() > 3, part
    # the slider, by keyboard: another picture, and back
    slider = tab.get_by_role("slider", name="Images seen")
    before = tab.locator("#grid").screenshot()
    slider.focus()
    tab.keyboard.press("ArrowLeft")
    assert tab.locator("#which").inner_text() == "after 32 of 64 images" == slider.get_attribute("aria-valuetext")
    tab.wait_for_function("document.getElementById('grid').complete")
    assert tab.locator("#grid").get_attribute("src") == "samples/0000000032.png" and tab.locator("#grid").screenshot() != before
    tab.keyboard.press("End")
    assert tab.locator("#which").inner_text() == "after 64 of 64 images"
