"""Runs commands of this repository in processes of their own, without the seconds that `import torch`
takes each time.

One helper process imports what is slow and knows nothing of the environment (torch, numpy, Pillow),
then forks for each command: the child gets the environment, the folder and the arguments of a new
process, and imports huggingface_hub, fsspec and our files anew.

    done = fresh.run("train.py", "--config=debug", env={"HF_ENDPOINT": hub.url}, cwd=tmp_path)
    done.code, done.out, done.err
    fresh.ranks(2, "train.py", ...)                 # as under torchrun, on one node
"""

import atexit
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
OTHERS = "aiohttp asyncio filelock fsspec httpx httpx2 jinja2 pyarrow.parquet s3fs tqdm.auto yaml".split()
helper = None  # the process that forks


@dataclass
class Done:
    """What a command left. `code` is negative if a signal ended it."""

    code: int
    out: str
    err: str

    @property
    def errors(self):
        """The lines that begin with "error: "."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


class Running:
    """A command that was started. Its output goes to files, which `out` and `err` read."""

    def __init__(self, script, args, env, cwd):
        self.kept = tempfile.TemporaryDirectory(prefix="nanot2i-")  # goes with this object
        self.folder = Path(self.kept.name)
        whole = {**os.environ, "PYTHONUNBUFFERED": "1", **env}
        whole = {key: str(value) for key, value in whole.items() if value is not None}
        request = {
            "script": str(script),
            "args": [str(arg) for arg in args],
            "env": whole,
            "cwd": str(cwd),
            "folder": str(self.folder),
        }
        self.pid = ask({"start": request})["pid"]

    @property
    def out(self):
        return (self.folder / "out").read_text(errors="replace") if (self.folder / "out").exists() else ""

    @property
    def err(self):
        return (self.folder / "err").read_text(errors="replace") if (self.folder / "err").exists() else ""

    def kill(self, number=signal.SIGKILL):
        """Sends a signal to the command and to what it started."""
        os.killpg(self.pid, number)

    def poll(self):
        """Its exit code, None while it runs."""
        return ask({"poll": self.pid})["code"]

    def wait(self, timeout=90):
        """Waits for its end. -> Done; after `timeout` seconds it is killed and the test fails with what it
        had said."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"still running after {timeout} s\n{self.out}\n{self.err}")
            time.sleep(0.02)
        return Done(code, self.out, self.err)


def start(script, *args, env=(), cwd="."):
    """Begins `script` (a path in the repository, or any other) with these arguments. A variable of `env`
    that is None is taken away."""
    return Running(ROOT / script, args, dict(env), cwd)


def run(script, *args, env=(), cwd=".", timeout=90):
    return start(script, *args, env=env, cwd=cwd).wait(timeout)


def ranks(world, script, *args, env=(), cwd=".", timeout=120):
    """The same command on `world` ranks of one node, with the variables that torchrun sets. -> [Done]"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for rank in range(world):
        mine = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": world,
            "GROUP_RANK": 0,
            "NODE_RANK": 0,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": 1,
            "TORCHELASTIC_RUN_ID": f"test-{port}",
        }
        running.append(start(script, *args, env={**dict(env), **mine}, cwd=cwd))
    return [process.wait(timeout) for process in running]


def ask(question):
    """Asks the helper, which is started at the first question."""
    global helper
    if helper is None:
        helper = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(lambda: (helper.stdin.close(), helper.wait()))
    helper.stdin.write(json.dumps(question) + "\n")
    helper.stdin.flush()
    return json.loads(helper.stdout.readline())


# The helper's side


def serve():
    """Answers questions until nobody asks any more. In a forked child: returns the command that it is to
    run."""
    answers = os.fdopen(os.dup(1), "w")  # a copy, so that a child's output is not taken for an answer
    codes = {}
    while line := sys.stdin.readline():
        question = json.loads(line)
        if "start" in question:
            pid = os.fork()
            if pid == 0:
                return question["start"]
            reply = {"pid": pid}
        else:
            pid = question["poll"]
            if pid not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            reply = {"code": codes.get(pid)}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()
    return None


def become(command):
    """Turns this process into a new one that runs the command."""
    os.setsid()
    for number, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, "out", os.O_WRONLY | os.O_CREAT),
        (2, "err", os.O_WRONLY | os.O_CREAT),
    ):
        file = os.open(os.path.join(command["folder"], name), flags)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(command["env"])
    os.chdir(command["cwd"])
    script = command["script"]
    sys.argv = [script, *command["args"]]
    sys.path[0] = os.path.dirname(script)
    sys.path.insert(1, str(ROOT))
    runpy.run_path(script, run_name="__main__")


def prepare():
    """Imports what is slow and reads nothing of the environment that the tests set."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import numpy  # noqa: F401
    import PIL.Image  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch  # noqa: F401
    import torch.distributed  # noqa: F401
    import torch.utils.data  # noqa: F401

    for name in OTHERS:
        try:
            importlib.import_module(name)
        except ImportError:
            pass


if __name__ == "__main__":
    prepare()
    if (wanted := serve()) is not None:
        become(wanted)
