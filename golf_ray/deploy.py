"""Files that bring a cluster up: for Ray's own launcher, and for KubeRay.

They are templates in `golf_ray/assets`, each with the list of its settings at the top; this module
fills the settings in. Nothing is started here.

Invariant: what is rendered is valid YAML without a setting left open, whatever the values.
"""

from __future__ import annotations

import re
import shlex
import string
from dataclasses import asdict, dataclass
from importlib import metadata, resources
from pathlib import Path

import golf_ray
from golf_ray.errors import UsageError

CLUSTER_FILE = "cluster.yaml"
RAYJOB_FILE = "rayjob.yaml"
GPUS_PER_NODE = 8
DEFAULT_STORAGE = "s3://your-bucket/golf"
LAUNCHER_IMAGE = "rayproject/ray:{ray}-py312-gpu"
KUBE_IMAGE = "registry.example.com/golf-ray:{golf_ray}"
"""A KubeRay node starts with golf-ray installed, so that its image is the user's own."""

_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./?&~-]+")
"""Values of these characters mean the same to YAML, to a shell and to a person."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What differs from cluster to cluster.

    Raises:
        UsageError: a value has characters that a file could take for something else.
    """

    storage: str = DEFAULT_STORAGE
    """Folder or URI of runs and sweeps, which all nodes can write."""
    num_nodes: int = 2
    """Nodes of 8 GPUs."""
    image: str | None = None
    """Container image; None for the file's own default."""
    source: str = "."
    """Checkout of golf-ray that the launcher copies to every node."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, str) and not _PLAIN.fullmatch(value):
                raise UsageError(
                    f"{name} '{value}' has a character that may not stand in these files",
                    "use letters, digits and . / : - _ only",
                )

    @classmethod
    def of(cls, *, storage: str | None, num_nodes: int, image: str | None) -> Settings:
        """Settings with this installation's checkout, where it is one."""
        root = Path(__file__).resolve().parent.parent
        is_checkout = (root / "pyproject.toml").is_file() and _PLAIN.fullmatch(str(root))
        return cls(
            storage=storage or DEFAULT_STORAGE,
            num_nodes=num_nodes,
            image=image,
            source=str(root) if is_checkout else ".",
        )


def rendered(name: str, settings: Settings) -> str:
    """The text of a file with its settings filled in.

    Args:
        name: `CLUSTER_FILE` or `RAYJOB_FILE`.
    """
    versions = {"ray": metadata.version("ray"), "golf_ray": golf_ray.__version__}
    default = LAUNCHER_IMAGE if name == CLUSTER_FILE else KUBE_IMAGE
    text = resources.files("golf_ray").joinpath("assets", name).read_text(encoding="utf-8")
    return string.Template(text).substitute(
        storage=settings.storage,
        storage_word=shlex.quote(settings.storage),
        num_nodes=settings.num_nodes,
        image=settings.image or default.format(**versions),
        source=settings.source,
        ray_version=versions["ray"],
        gpus=GPUS_PER_NODE,
    )
