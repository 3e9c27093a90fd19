# /// script
# requires-python = ">=3.10"
# dependencies = []
# ///
"""A test double of `worker.py` without WhisperX, which can fail on request.

`--model` selects how it starts, and the text in the "recording" how it answers. It needs the standard library only.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time


def say(message):
    print(json.dumps(message), flush=True)


def start(how):
    print(f"starting {how}", file=sys.stderr, flush=True)
    if how == "ends":
        print("Something is missing.", file=sys.stderr, flush=True)
        sys.exit(3)
    say({"event": "started", "pid": os.getpid()})
    if how == "fatal":
        say({"event": "fatal", "kind": "model", "message": "No such model.", "details": "a traceback"})
        sys.exit(1)
    if how == "garbage":
        os.write(1, b'\xff\xfe\nnot json\n[1, 2]\n"ready"\n{"event": "re\n' + b"x" * 100_000 + b"\n")
    if how == "slow":
        time.sleep(1.0)
    if how == "never":
        time.sleep(600)
    say({"event": "ready", "model": how})


def answer(request):
    with open(request["path"], "rb") as file:
        words = file.read().decode("latin-1")
    if words == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if words == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(f"hanging with {os.getpid()} and {child.pid}", file=sys.stderr, flush=True)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if words == "garbage":
        os.write(1, b"\x00\n{}\n[]\nnull\n" + json.dumps({"id": request["id"] - 1, "text": "of another"}).encode())
        os.write(1, b"\n")
    if words == "loud":  # more than a pipe holds: must be read all the time
        sys.stderr.write("noise " * 100_000 + "\n")
    if words == "error":
        return {"ok": False, "error": {"kind": "audio", "message": "Not a recording."}}
    if words == "strange":
        return {"ok": True, "text": "no length"}
    return {
        "ok": True,
        "text": words if words.isprintable() else "",
        "language": "en",
        "seconds": 1.0,
        "pid": os.getpid(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    options, _ = parser.parse_known_args()
    start(options.model)
    for line in sys.stdin:
        request = json.loads(line)
        say({"id": request["id"], **answer(request)})
    print("input has ended", file=sys.stderr, flush=True)
