"""An S3-compatible server on loopback, with one bucket: moto's, in a thread of this process."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

KEY, SECRET, BUCKET = "golf-key", "golf-secret", "golf-bucket"


@dataclass(frozen=True)
class Server:
    """Where it listens, and what a user would set to reach it."""

    host: str

    @property
    def environment(self) -> dict[str, str]:
        """Variables that pyarrow, boto and s3fs read."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{self.host}",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def uri(self, path: str, *, keys: bool = True) -> str:
        """A URI that says all of it by itself."""
        user = f"{KEY}:{SECRET}@" if keys else ""
        query = f"endpoint_override={self.host}&scheme=http&region=us-east-1"
        return f"s3://{user}{BUCKET}/{path}?{query}"


@contextlib.contextmanager
def s3_server() -> Iterator[Server]:
    """A server that ends with the block."""
    from moto.server import ThreadedMotoServer
    from pyarrow import fs

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        made = Server(f"{host}:{port}")
        fs.S3FileSystem(
            access_key=KEY, secret_key=SECRET, endpoint_override=made.host, scheme="http",
            region="us-east-1", allow_bucket_creation=True,
        ).create_dir(BUCKET)  # fmt: skip
        yield made
    finally:
        server.stop()
