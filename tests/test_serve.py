"""The page for prompts: a real server and real requests, and a real browser that types, draws, stops and leaves."""
import http.client
import json
import re
import shlex
import signal
import socket
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import quote, urlencode

import numpy as np
import pytest
from PIL import Image
from test_sample import DEBUG, RANKS, command, randomise, setting, write_checkpoint

import pretrained
import sample
import serve
from model import Denoiser

ROOT = Path(__file__).parent.parent
ASK = {"prompt": "owl", "seed": "3", "steps": "2", "guidance": "2", "size": "32"}
LONG = {"steps": "1000", "size": "128"}                     # seconds


class Server:
    """serve.py as somebody starts it, in `folder`."""

    def __init__(self, folder, *args):
        argv = [sys.executable, ROOT / "serve.py", "--port=0", "--device=cpu", *args]
        self.process = subprocess.Popen(argv, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.said = self.process.stdout.readline()
        assert "http://127.0.0.1:" in self.said, self.process.communicate()[1]
        self.port, self.out = int(re.search(r":(\d+) ", self.said)[1]), folder / "out"
        self.url = f"http://127.0.0.1:{self.port}/"

    def request(self, method="GET", path="/", body=None, **headers):
        """-> the answer, its lines still to be read."""
        self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.connection.request(method, path, body, headers)
        return self.connection.getresponse()

    def ask(self, **changes):
        return self.request("POST", "/generate", urlencode({**ASK, **changes}))

    def draw(self, **changes):
        return [json.loads(line) for line in self.ask(**changes)]

    def history(self):
        return json.loads(unescape(re.search(r'data-made="(.*?)"', self.request().read().decode())[1]))

    def end(self):
        self.process.send_signal(signal.SIGINT)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    write_checkpoint(folder / "runs" / "tiny" / "step_00000020", randomise(Denoiser(DEBUG)))
    return folder


@pytest.fixture(scope="module")
def server(folder):
    server = Server(folder)
    yield server
    assert server.end()[::2] == (0, "")                     # nothing that the tests did left a trace in the terminal


def read(path):
    with Image.open(path) as image:
        return np.asarray(image), image.text


# ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prompt, seed", [("a red apple", 5), ("--it's \"りんご\" <b>", 2 ** 61 + 1)])
def test_the_picture_is_that_of_sample_py_and_its_command_draws_it_again(server, folder, monkeypatch, prompt, seed):
    *steps, made = [said for said in server.draw(prompt=prompt, seed=seed, steps=3, guidance=1.5, size=48)
                    if list(said) != ["cut"]]
    assert steps == [{"step": k, "of": 3} for k in range(4)]                    # the sampler's own
    assert (made["prompt"], made["seed"], made["steps"], made["guidance"], made["size"]) == (prompt, str(seed), 3, 1.5, 48)
    image, text = read(server.out / made["file"])
    want = sample.generate(randomise(Denoiser(DEBUG)), setting(steps=3, guidance=1.5), pretrained.tokenizer(DEBUG, RANKS), None, [prompt], [seed], size=48)
    assert np.abs(image.transpose(2, 0, 1).astype(int) - want[0].numpy()).max() <= 1 and image.std() > 5
    answer = server.request(path="/pictures/" + quote(made["file"]))
    assert answer.status == 200 and answer.headers["Content-Type"] == "image/png" and answer.read() == (server.out / made["file"]).read_bytes()
    python, script, *argv = shlex.split(made["command"])
    monkeypatch.chdir(folder)
    command(monkeypatch, "--out=again", "--device=cpu", *argv)
    again, = (read(path) for path in (folder / "again").glob(f"*-{seed}.png"))
    assert (python, script) == ("python", "sample.py") and np.array_equal(again[0], image) and again[1] == text and text["prompt"] == prompt


@pytest.mark.parametrize("changes, says", [
    ({"steps": "many"}, "sample.steps wants int, not 'many'"),
    ({"steps": "0"}, "sample.steps must be above zero"),
    ({"steps": "1_000_000_000"}, "at most 1000 steps"),
    ({"guidance": ""}, "sample.guidance wants float, not ''"),
    ({"guidance": "nan"}, "sample.guidance must be a number"),
    ({"size": "33"}, "model.size 33 must be a multiple of model.patch 8"),
    ({"size": "-8"}, "model.size must be above zero"),
    ({"size": "800000"}, "128 pixels"),
    ({"seed": "-1"}, "seed must be zero or more"),
    ({"seed": "1.5"}, "seed wants int, not '1.5'"),
    ({"prompt": " \n "}, "no prompt"),
])
def test_a_mistake_is_said_on_the_page(server, changes, says):
    before = server.history()
    answer, = server.draw(**changes)
    assert says in answer["error"] and list(answer) == ["error"] and server.history() == before


def test_a_full_or_missing_disk_is_said_on_the_page(server):
    server.out.rename(server.out.with_name("away"))
    try:
        assert "No such file" in server.draw()[-1]["error"]
    finally:
        server.out.with_name("away").rename(server.out)
    assert "file" in server.draw()[-1]


@pytest.mark.parametrize("method, path, headers, status", [
    ("GET", "/", {"Host": "evil.example"}, 403),                                # a name that was pointed at 127.0.0.1
    ("GET", "/", {"Host": "127.0.0.1.evil.example"}, 403),
    ("GET", "/", {"Host": "["}, 403),
    ("GET", "/", {"Origin": "http://evil.example"}, 403),
    ("POST", "/generate", {"Origin": "http://evil.example"}, 403),
    ("POST", "/generate", {"Origin": "null"}, 403),
    ("POST", "/generate", {"Origin": "http://127.0.0.1:1"}, 403),               # another server of this machine
    ("POST", "/generate", {"Host": "evil.example", "Origin": "http://evil.example"}, 403),
    ("POST", "/generate", {"Content-Length": "100000000"}, 413),
    ("POST", "/generate", {"Content-Length": "-5"}, 413),
    ("POST", "/", {}, 404),
    ("GET", "/generate", {}, 404),
    ("GET", "/serve.py", {}, 404),
    ("GET", "/pictures/", {}, 404),
    ("GET", "/pictures/../secret.png", {}, 404),
    ("GET", "/pictures/%2e%2e%2fsecret.png", {}, 404),
    ("GET", "/pictures/secret.png", {}, 404),                                   # in the folder, but not made here
    ("GET", "//evil.example/", {}, 404),
    ("PUT", "/", {}, 501),
    ("GET", "/", {"Host": "localhost:9000"}, 200),                              # through ssh -L
    ("GET", "/", {"Host": "[::1]:9000", "Origin": "http://[::1]:9000"}, 200),
])
def test_whoever_has_no_business_here_is_refused(server, folder, method, path, headers, status):
    for place in (folder, server.out):
        Image.new("RGB", (8, 8)).save(place / "secret.png")
    answer = server.request(method, path, None if method == "GET" else "" if "Content-Length" in headers else urlencode(ASK), **headers)
    assert answer.status == status
    if status in (200, 403, 404):
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"] and "unsafe" not in answer.headers["Content-Security-Policy"]
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"


def test_two_at_once_queue_and_draw_what_they_would_alone(server):
    first = server.ask(prompt="tiger face", steps=200, size=64)
    assert json.loads(first.readline())["step"] == 0
    second = server.ask()
    assert json.loads(second.readline()) == {"waiting": 1}
    assert json.loads(second.readline()) == {"step": 0, "of": 2}                # and now the first is made
    names = [made["prompt"] for made in server.history()]
    assert names[-1] == "tiger face" or names[-2:] == ["tiger face", "owl"]
    *steps, made = [json.loads(line) for line in first]
    assert [s["step"] for s in steps] == [*range(1, 201)]
    together = json.loads(second.read().splitlines()[-1])
    assert np.array_equal(read(server.out / together["file"])[0], read(server.out / server.draw()[-1]["file"])[0])
    assert "waiting" not in made


def test_whoever_leaves_frees_the_sampler(server):
    drawing, one = server.ask(prompt="left while drawn", **LONG), server.connection
    assert [json.loads(drawing.readline())["step"] for _ in range(3)] == [0, 1, 2]
    waiting, two = server.ask(prompt="left while waiting"), server.connection
    assert json.loads(waiting.readline()) == {"waiting": 1}
    third = server.ask(prompt="patient")
    assert json.loads(third.readline()) == {"waiting": 2}
    waiting.close(), two.close()
    assert json.loads(third.readline()) == {"waiting": 1} and not list(server.out.glob("left-*"))          # its place is free while the first is drawn
    drawing.close(), one.close()
    said = [json.loads(line) for line in third]
    assert said[-1]["prompt"] == "patient" and server.history()[-1]["prompt"] == "patient"
    assert not list(server.out.glob("left-*"))


def test_the_last_twenty_are_kept_and_no_file_is_written_over(server):
    made = [server.draw(prompt="same", steps=1)[-1] for _ in range(21)]
    assert len({m["file"] for m in made}) == 21 and all((server.out / m["file"]).exists() for m in made)
    assert server.history() == made[1:]
    assert server.request(path=f"/pictures/{made[0]['file']}").status == 404
    assert server.request(path=f"/pictures/{made[1]['file']}").status == 200


def test_mistakes_on_the_command_line_end_in_one_line(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for args, says in (((f"--port={port}",), f"--port={port}: Address already in use"), (("--port=70000",), "--port=70000"),
                           (("--host=1.2.3.4",), "--host=1.2.3.4"), (("--port=many",), "--port"), (("--port=0", "--steps=0"), "sample.steps"),
                           (("--checkpoint=nowhere", "--port=0"), "nowhere")):
            monkeypatch.setattr(sys, "argv", ["serve.py", *args])
            with pytest.raises(SystemExit) as stop:
                serve.main()
            assert stop.value.code.startswith("error: ") and "\n" not in stop.value.code and says in stop.value.code


def test_ctrl_c_ends_a_server_that_draws(folder):
    server = Server(folder, "--guidance=1.25")
    assert 'value="1.25"' in server.request().read().decode()
    answer, idle = server.ask(prompt="never", **LONG), socket.create_connection(("127.0.0.1", server.port))       # as browsers open ahead
    assert json.loads(answer.readline())["step"] == 0
    assert server.end() == (0, "ended\n", "") and b"file" not in answer.read()
    idle.close()


# ------------------------------------------------------------------------------------------------------------------

def test_in_a_browser_a_prompt_becomes_a_picture_and_another_seed_another(server, browser, quiet):
    tab = browser()
    tab.goto(server.url)
    tab.get_by_label("prompt").fill('<img src=x onerror="alert(1)">')
    tab.locator("#steps").fill("4")
    tab.get_by_role("button", name="Draw").click()
    tab.locator("#words", has_text="done in").wait_for()
    first = tab.locator("#now img")
    assert first.get_attribute("alt") == '<img src=x onerror="alert(1)">, seed 0' and first.evaluate("i => i.decode().then(() => i.naturalWidth)") == 32
    before, source = first.screenshot(), first.get_attribute("src")
    tab.get_by_role("button", name="Next seed").click()
    tab.locator("#now img[alt$='seed 1']").wait_for()
    assert tab.get_by_label("seed").input_value() == "1"
    second = tab.locator("#now img")
    second.evaluate("i => i.decode()")
    assert second.screenshot() != before and second.get_attribute("src") != source
    assert tab.locator("#history li").count() == len(server.history()) and server.history()[-1]["seed"] == "1"
    # what was drawn before comes back with its settings
    tab.locator("#steps").fill("7")
    tab.locator("#history li").nth(1).get_by_role("button", name="Use").click()
    assert tab.get_by_label("seed").input_value() == "0" and tab.locator("#steps").input_value() == "4"
    assert tab.locator("#now img").get_attribute("src") == source
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.locator("#now").get_by_role("button", name="Copy as command").click()
    tab.locator("#now").get_by_role("button", name="Copied").wait_for()
    assert tab.evaluate("navigator.clipboard.readText()") == server.history()[-2]["command"]
    tab.reload()
    assert tab.locator("#history li").count() == len(server.history())


def test_in_a_browser_a_mistake_is_shown_and_the_next_try_works(server, browser, quiet):
    tab = browser(360, "dark")
    tab.goto(server.url)
    tab.get_by_label("prompt").fill("owl")
    tab.locator("#steps").fill("many")
    tab.get_by_label("prompt").press("Enter")
    tab.get_by_role("alert", name="").filter(has_text="sample.steps wants int, not 'many'").wait_for()
    assert tab.locator("#now img").count() == 0 and tab.evaluate("document.documentElement.scrollWidth") <= 360
    tab.locator("#steps").fill("2")
    tab.get_by_role("button", name="Draw").click()
    tab.locator("#words", has_text="done in").wait_for()
    assert tab.locator("#error").inner_text() == "" and tab.locator("#now img").count() == 1
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360


def test_in_a_browser_a_prompt_that_is_cut_is_said_above_and_under_its_picture(server, browser, quiet):
    tab = browser(360)
    tab.goto(server.url)
    tab.get_by_label("prompt").fill("a lake at dawn behind hills " * 5)
    tab.locator("#steps").fill("400")
    tab.get_by_role("button", name="Draw").click()
    tab.locator("#cut", has_text="The prompt is cut: 16 of ").wait_for()
    tab.locator("#now figcaption", has_text="The prompt is cut: 16 of ").wait_for()
    assert tab.locator("#cut").inner_text() == ""
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    tab.get_by_label("prompt").fill("owl")
    tab.locator("#steps").fill("1")
    tab.get_by_role("button", name="Draw").click()
    tab.locator("#now figcaption", has_text="owl").wait_for()
    assert "is cut" not in tab.locator("#now").inner_text() + tab.locator("#status").inner_text()


def test_in_a_browser_steps_are_counted_and_leaving_frees_the_sampler(server, browser, quiet):
    tab, other = browser(), browser()
    for page in (tab, other):
        page.goto(server.url)
        page.get_by_label("prompt").fill("left in the browser")
        for name, value in LONG.items():
            page.locator(f"#{name}").fill(value)
    tab.get_by_role("button", name="Draw").click()
    tab.locator("#words", has_text=re.compile(r"step [1-9]\d* of 1000")).wait_for()
    assert 0 < float(tab.locator("#progress").evaluate("p => p.value")) <= 1000 == tab.locator("#progress").evaluate("p => p.max")
    other.get_by_role("button", name="Draw").click()
    other.locator("#words", has_text="waiting: 1 before this one").wait_for()
    tab.close()                                             # a closed tab ...
    other.locator("#words", has_text=re.compile(r"step \d+ of 1000")).wait_for()
    other.get_by_role("button", name="Stop").click()        # ... and a button
    other.locator("#error", has_text="stopped").wait_for()
    assert server.draw(prompt="after them", steps=1)[-1]["prompt"] == "after them" and not list(server.out.glob("left-in*"))


def test_in_a_browser_a_server_that_has_gone_is_said(folder, browser):
    own, tab = Server(folder), browser()
    tab.goto(own.url)
    tab.get_by_label("prompt").fill("owl")
    own.end()
    tab.get_by_role("button", name="Draw").click()
    tab.locator("#error", has_text="no picture came").wait_for()
