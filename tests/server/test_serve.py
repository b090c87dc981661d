"""The command: it says where it listens, answers, and ends when it is interrupted."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from flashmoe_lab.cli import main
from flashmoe_lab.server.app import listen


def test_serves_until_interrupted(speaking: Path, tmp_path: Path):
    key = tmp_path / "key"
    key.write_text("secret\n")
    command = [sys.executable, "-m", "flashmoe_lab", "serve", str(speaking), "--port", "0"]
    command += ["--api-key-file", str(key), "--name", "mine"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        try:
            found = re.fullmatch(r"mine at (http://\S+) .*\n", process.stderr.readline())
            assert found
            headers = {"Authorization": "Bearer secret"}
            models = httpx.get(found[1] + "/models", headers=headers).json()
            assert models["data"][0]["id"] == "mine"
            assert httpx.get(found[1] + "/models").status_code == 401
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--host", "0.0.0.0"], "give it an API key, in the environment's FLASHMOE_API_KEY"),
        (["--queue", "-1"], "longest_queue is -1; it must be at least 0"),
        (["--api-key-file", "{empty}"], "is empty; it should hold the API key"),
        (["--port", "{taken}"], "cannot listen at 127.0.0.1:"),
        (["--port", "70000"], "port is 70000; it must be between 0 and 65535"),
    ],
)
def test_what_cannot_be_served(
    speaking: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    fault: str,
):
    monkeypatch.delenv("FLASHMOE_API_KEY", raising=False)
    (tmp_path / "empty").touch()
    with listen("127.0.0.1", 0) as taken:
        names = {"empty": tmp_path / "empty", "taken": taken.getsockname()[1]}
        given = [option.format(**names) for option in options]
        assert main(["serve", str(speaking), *given]) == 2
    assert fault in capsys.readouterr().err
