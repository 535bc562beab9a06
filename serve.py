"""A page in the browser to try prompts on.

    python serve.py
    python serve.py --checkpoint=runs/emoji --port=8080 --guidance=4

Serves this machine alone, unless --host says otherwise: whoever reaches the page can use it, there is no password. To look at it from
elsewhere, ssh -L 8000:localhost:8000 there. One picture is made at a time, in the order asked; every one is kept in --out.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")         # read once, by import torch: see train.py

import base64
import hashlib
import ipaddress
import json
import math
import re
import select
import socket
import sys
import threading
import time
from collections import deque
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import configs
from page import STYLE
from sample import command, example, generate, one_line, open_checkpoint, options, save_png, settings

FIELDS = ("prompt", "seed", "steps", "guidance", "size")
HISTORY = 20
STEPS, TIMES = 1000, 4                                      # a slip of the finger must not fill the memory: so many steps, and times the trained size

OWN_STYLE = STYLE + """
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.5rem 3rem; margin-top: 1.5rem }
form, #numbers, #buttons, #status { display: grid; gap: .75rem } form { align-content: start }
#numbers { grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)) }
#buttons { grid-template-columns: repeat(3, auto); justify-content: start }
label { font-size: .875rem; color: var(--soft) }
input, textarea, button { width: 100%; padding: .5rem .6rem; font: inherit; color: inherit; background: var(--lift); border: 1px solid var(--line) }
input, textarea, button, #error, #cut { border-radius: 6px }
textarea { min-height: 4.5rem; resize: vertical }
button { width: auto; cursor: pointer } button:disabled { opacity: .5; cursor: default }
button[type=submit] { background: var(--link); border-color: var(--link); color: var(--ground) }
progress { width: 100%; height: .75rem; accent-color: var(--link) } progress[hidden] { display: block; visibility: hidden }
#error:not(:empty), #cut:not(:empty) { padding: .6rem .75rem; background: var(--mark) }
#error, #cut, #words { margin: 0 }
img { background: var(--lift); border-radius: 4px } img.small { image-rendering: pixelated }
#now img { width: 100%; max-width: 32rem; height: auto } #now figcaption { margin-top: .5rem }
#history { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 9rem), 1fr)); gap: 1.25rem; padding: 0; list-style: none }
#history img { width: 100%; height: auto; margin-bottom: .4rem } #history p { margin: 0 0 .4rem; font-size: .875rem; line-height: 1.35 }
#history button { padding: .2rem .5rem; margin: 0 .3rem .3rem 0; font-size: .8125rem }
"""
SCRIPT = """
const at = id => document.getElementById(id), form = at("form"), fields = ["prompt", "seed", "steps", "guidance", "size"];
let abort = null, answered = false;

function add(parent, tag, values) { return parent.appendChild(Object.assign(document.createElement(tag), values)); }

function image(parent, made) {
  const alt = `${made.prompt}, seed ${made.seed}`, className = made.size < 256 ? "small" : "";
  add(parent, "img", {src: "pictures/" + encodeURIComponent(made.file), alt, className, width: made.size, height: made.size});
}

function words(made) { return `seed ${made.seed}, ${made.steps} steps, guidance ${made.guidance}, ${made.size} pixels, ${made.seconds} s`; }

function copier(parent, made) {
  const button = add(parent, "button", {type: "button", textContent: "Copy as command"});
  button.addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(made.command); button.textContent = "Copied"; }
    catch { window.prompt("The command:", made.command); }                // no clipboard without https, other than on this machine
  });
}

function remember(made) {
  const item = document.createElement("li");
  at("history").prepend(item);
  image(item, made);
  add(item, "p", {textContent: made.prompt});
  add(item, "p", {textContent: words(made), className: "soft"});
  add(item, "button", {type: "button", textContent: "Use"}).addEventListener("click", () => {
    for (const name of fields) form.elements[name].value = made[name];
    show(made);
    form.elements.prompt.focus();
  });
  copier(item, made);
  while (at("history").children.length > at("history").dataset.most) at("history").lastChild.remove();
}

function show(made) {
  at("now").replaceChildren();
  image(at("now"), made);
  const caption = add(at("now"), "figcaption", {});
  add(caption, "p", {textContent: `${made.prompt}; ${words(made)}`});
  if (made.cut) add(caption, "p", {textContent: made.cut});
  copier(caption, made);
}

function hear(said) {
  answered = said.error || said.file;
  if (said.waiting) at("words").textContent = `waiting: ${said.waiting} before this one`;
  if (said.of) {
    at("progress").max = said.of;
    at("progress").value = said.step;
    at("words").textContent = `step ${said.step} of ${said.of}`;
  }
  if (said.cut) at("cut").textContent = said.cut;
  if (said.error) at("error").textContent = said.error;
  if (said.file) {
    show(said);
    remember(said);
    at("words").textContent = `done in ${said.seconds} s`;
    at("cut").textContent = "";                                           // now under the picture
  }
}

form.addEventListener("submit", async event => {
  event.preventDefault();
  if (abort) return;
  abort = new AbortController(), answered = false;
  at("error").textContent = at("cut").textContent = "";
  at("words").textContent = "asked";
  at("progress").value = 0;
  at("progress").hidden = at("stop").disabled = false;
  at("go").disabled = at("next").disabled = true;
  try {
    const body = new URLSearchParams(new FormData(form));
    const reader = (await fetch("generate", {method: "POST", body, signal: abort.signal})).body.getReader(), decoder = new TextDecoder();
    for (let text = "", part; !(part = await reader.read()).done;) {
      const lines = (text + decoder.decode(part.value, {stream: true})).split("\\n");
      text = lines.pop();
      lines.forEach(line => hear(JSON.parse(line)));
    }
  } catch { if (abort.signal.aborted) at("error").textContent = "stopped"; }
  if (!answered && !abort.signal.aborted) at("error").textContent = "no picture came: does serve.py still run, and what does its terminal say?";
  if (at("error").textContent) at("words").textContent = "";
  abort = null;
  at("progress").hidden = at("stop").disabled = true;
  at("go").disabled = at("next").disabled = false;
});

at("stop").addEventListener("click", () => abort?.abort());
at("next").addEventListener("click", () => {
  const seed = form.elements.seed.value.trim();
  if (/^\\d+$/.test(seed)) form.elements.seed.value = BigInt(seed) + 1n;            // exact beyond 2^53
  form.requestSubmit();
});
form.elements.prompt.addEventListener("keydown", event => {
  if (event.key == "Enter" && !event.shiftKey) { event.preventDefault(); form.requestSubmit(); }
});
JSON.parse(at("history").dataset.made).forEach(remember);
"""
ONLY = lambda text: f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
HEADERS = {"Content-Security-Policy": f"default-src 'none'; script-src {ONLY(SCRIPT)}; style-src {ONLY(OWN_STYLE)}; img-src 'self' data:; "
           "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
           "Cross-Origin-Resource-Policy": "same-origin", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}


# ------------------------------------------------------------------------------------------------------------------
# Pictures

class Gone(Exception):
    """Nobody waits for the picture any more."""


class Studio:
    """The model, whoever waits for it, and what it made last."""

    def __init__(self, args):
        self.path, self.model, self.c, self.tokenize, self.encode, self.vae = open_checkpoint(args)
        self.args, self.out, self.history = args, Path(args.out), deque(maxlen=HISTORY)
        self.waiting, self.turn, self.closing = deque(), threading.Condition(), False

    def wanted(self, form):
        """-> prompt, seed, config; what cannot be is said as sample.py says it."""
        text = {name: form.get(name, [""])[0].strip() for name in FIELDS}
        if not text["prompt"]:
            configs.fail("no prompt: say what to draw")
        seed = configs.cast(text["seed"], int, "seed")
        if not 0 <= seed < 2 ** 62:
            configs.fail("seed must be zero or more, and below 2^62")
        c = self.c
        for key in ("sample.steps", "sample.guidance", "model.size"):
            c = configs.override(c, key, text[key.split(".")[1]])
        if not math.isfinite(c.sample.guidance):
            configs.fail(f"sample.guidance must be a number, not {text['guidance']!r}")
        if c.sample.steps > STEPS or c.model.size > TIMES * self.c.model.size:
            configs.fail(f"this page draws in at most {STEPS} steps and {TIMES * self.c.model.size} pixels: python sample.py knows no limit")
        return text["prompt"], seed, configs.check(c)

    def cut(self, prompt):
        """What the page says of a prompt that is not read to its end; "" of others."""
        cut = self.tokenize.cut(prompt)
        return cut and f"The prompt is cut: {cut}"

    def make(self, form, tell):
        """Waits for its turn, makes the picture. `tell` sends a dict to the one who asked, and raises Gone when they left."""
        prompt, seed, c = self.wanted(form)
        ticket, done, said = object(), count(), None
        step = lambda: tell(step=next(done), of=c.sample.steps)
        try:
            with self.turn:
                self.waiting.append(ticket)
                while (before := self.waiting.index(ticket)):
                    tell(**{"waiting": before} if before != said else {})
                    said = before
                    self.turn.wait(0.2)
            if cut := self.cut(prompt):                     # not while another thread tokenizes
                tell(cut=cut)
            start = time.perf_counter()
            step()
            image, = generate(self.model, c, self.tokenize, self.encode, [prompt], [seed], step, vae=self.vae)
            made = self.keep(image, prompt, seed, c, time.perf_counter() - start)
        finally:
            with self.turn:
                self.waiting.remove(ticket)
                self.turn.notify_all()
        tell(**made)

    def keep(self, image, prompt, seed, c, seconds):
        slug = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:50] or "image"
        file = next(name for k in count(1) if not (self.out / (name := f"{slug}-{seed}{f'-{k}' * (k > 1)}.png")).exists())
        save_png(image, self.out / file, prompt, seed, settings(c, self.path, self.args))
        s = c.sample
        also = {name: getattr(self.args, name) for name in ("text", "vae", "weights", "guide", "sampler", "lo", "hi")}
        flags = {"checkpoint": self.path, "seed": seed, "n": 1, "steps": s.steps, "guidance": s.guidance, "size": c.model.size, **also}
        flags = [f"--{name}={value}" for name, value in flags.items() if value is not None]
        print(f"{self.out / file}: {prompt!r}, {seconds:.3g} s", flush=True)
        made = {"file": file, "prompt": prompt, "seed": str(seed), "steps": s.steps, "guidance": s.guidance, "size": c.model.size,
                "seconds": round(seconds, 2), "command": command(prompt, *flags), "cut": self.cut(prompt)}
        self.history.append(made)
        return made

    def close(self):
        """Ends what is being made at its next step."""
        with self.turn:
            self.closing = True
            self.turn.wait_for(lambda: not self.waiting, timeout=60)

    def html(self):
        s, name = self.c.sample, escape(str(self.path))
        number = lambda key, value, note: f'<div><label for="{key}">{note}</label><input id="{key}" name="{key}" value="{value}" inputmode="decimal"></div>'
        numbers = "".join((number("seed", 0, "seed"), number("steps", s.steps, "steps"), number("guidance", s.guidance, "guidance"),
                           number("size", self.c.model.size, "size, pixels")))
        return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(self.c.name)} · nanoT2I</title><link rel="icon" href="data:,"><style>{OWN_STYLE}</style></head>
<body><header><h1>{escape(self.c.name)}</h1><p class="soft">{name}</p></header>
<main><form id="form"><div><label for="prompt">prompt</label>
<textarea id="prompt" name="prompt" placeholder="{escape(example(self.path))}" autofocus></textarea></div>
<div id="numbers">{numbers}</div>
<div id="buttons"><button id="go" type="submit">Draw</button><button id="next" type="button">Next seed</button>
<button id="stop" type="button" disabled>Stop</button></div>
<div id="status"><progress id="progress" value="0" max="1" aria-label="sampling steps" hidden></progress><p id="words" class="soft"></p>
<p id="cut" role="status"></p><p id="error" role="alert"></p></div></form>
<figure id="now" aria-label="the picture" aria-live="polite"></figure></main>
<h2>The last {HISTORY}</h2><ol id="history" data-most="{HISTORY}" data-made="{escape(json.dumps(list(self.history)))}"></ol>
<script>{SCRIPT}</script></body></html>
"""


# ------------------------------------------------------------------------------------------------------------------
# HTTP

class Handler(BaseHTTPRequestHandler):
    """GET / and /pictures/<file>; POST /generate, answered in lines of JSON as the sampler goes. `studio` and `host` are its class's."""
    timeout = 30                                            # seconds that a request may take to arrive
    server_version, sys_version = "nanoT2I", ""

    def foreign(self):
        """Whether the request comes from another site's page, or by a name that somebody's DNS has pointed at us."""
        host, name = self.headers.get("Host", ""), ""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            ipaddress.ip_address(name)
            known = True
        except ValueError:
            known = name in ("localhost", self.host.lower(), socket.gethostname().lower())
        return not known or self.headers.get("Origin", f"http://{host}") != f"http://{host}"

    def begin(self, status, kind):
        self.send_response(status)
        for name, value in {"Content-Type": kind, **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()

    def refuse(self, status):
        self.begin(status, "text/plain; charset=utf-8")
        self.wfile.write(f"{status.value} {status.phrase}\n".encode())

    def do_GET(self):
        if self.foreign():
            return self.refuse(HTTPStatus.FORBIDDEN)
        path = unquote(self.path)
        files = {f"/pictures/{made['file']}": made["file"] for made in list(self.studio.history)}      # these, and nothing else on the disk
        if self.path == "/":
            self.begin(HTTPStatus.OK, "text/html; charset=utf-8")
            self.wfile.write(self.studio.html().encode())
        elif path in files:
            try:
                blob = (self.studio.out / files[path]).read_bytes()
            except OSError:
                return self.refuse(HTTPStatus.NOT_FOUND)
            self.begin(HTTPStatus.OK, "image/png")
            self.wfile.write(blob)
        else:
            self.refuse(HTTPStatus.NOT_FOUND)

    def do_POST(self):
        if self.foreign():
            return self.refuse(HTTPStatus.FORBIDDEN)
        if self.path != "/generate":
            return self.refuse(HTTPStatus.NOT_FOUND)
        length = self.headers.get("Content-Length", "")
        if not (length.isdecimal() and len(length) < 6 and int(length) <= 2 ** 16):
            return self.refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        form = parse_qs(self.rfile.read(int(length)).decode(errors="replace"), keep_blank_values=True)
        self.begin(HTTPStatus.OK, "application/x-ndjson")
        try:
            with one_line("a smaller size needs less"):
                self.studio.make(form, self.tell)
        except SystemExit as stop:                          # what sample.py would say in its one line
            self.tell(error=stop.message)

    def tell(self, **said):
        """A line of JSON, when there is something to say, to a client that is still there."""
        try:
            if self.studio.closing or select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                raise Gone
            if said:
                self.wfile.write(json.dumps(said).encode() + b"\n")
        except OSError as error:
            raise Gone from error

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, *request):
        if not isinstance(sys.exc_info()[1], (Gone, OSError)):      # a tab that was closed is no error
            super().handle_error(*request)


def main():
    parser = options(__doc__)
    add = parser.add_argument
    add("--port", type=int, default=8000, help="(default: 8000; 0: any that is free)")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    add("--out", default="out", help="folder of the PNGs (default: out)")
    args = parser.parse_args()
    with one_line("try --device=cpu"):
        Path(args.out).mkdir(parents=True, exist_ok=True)
        Server.address_family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        try:
            server = Server((args.host, args.port), Handler)
        except (OSError, OverflowError) as error:
            configs.fail(f"cannot listen on --host={args.host} --port={args.port}: {getattr(error, 'strerror', None) or error}")
        Handler.studio, Handler.host = Studio(args), args.host
        place = f"[{args.host}]" if ":" in args.host else args.host
        print(f"{Handler.studio.path} at http://{place}:{server.server_port} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            Handler.studio.close()
            print("ended", flush=True)
            os._exit(0)                                     # a thread that is still letting go of its tensors would abort an orderly exit


if __name__ == "__main__":
    main()
