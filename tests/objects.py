"""A real S3 server (moto's) in a process of its own, which a test may kill."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping

import pytest

BUCKET = "bucket"
_SERVE = """
import signal, sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=int(sys.argv[1]), verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
signal.pause()
"""


class Server:
    """The server; it keeps its objects in memory, so one that is started again has none.

    Attributes:
        environment: what its clients need.
    """

    def __init__(self, port: int = 0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        # The first line that is a number: moto itself prints one before it.
        self.port = next(int(x) for x in self._process.stdout if x.strip().isdigit())
        self.pid = self._process.pid
        self.environment: Mapping[str, str] = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self.make_bucket()

    def make_bucket(self) -> None:
        import boto3

        boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        ).create_bucket(Bucket=BUCKET)

    def url(self, *names: str) -> str:
        return "/".join((f"s3://{BUCKET}", *names))

    def use(self, patch: pytest.MonkeyPatch) -> None:
        """Let this process, and those that it starts, be clients."""
        for name, value in self.environment.items():
            patch.setenv(name, value)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def be_a_client(rank: int, environment: Mapping[str, str]) -> None:
    """A hook of `tests.jobs.launch`: ranks do not inherit this process's environment."""
    os.environ.update(environment)
