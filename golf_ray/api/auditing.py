"""The audit as one call: a ledger, the text it is of, and the weights to perturb.

The settings are the ledger's own, for they are what its scores were made under; the configuration
only says where the text is, and how to compute.

Invariant: nothing is audited against a text or weights other than those that the ledger names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from golf_ray.api.evaluating import digests_of_data, identity_of, validation_stream
from golf_ray.api.machine import cpu_threads, pick_device
from golf_ray.api.weights import StoredWeights, config_for, opened
from golf_ray.config import AdaptationConfig, Config
from golf_ray.errors import ConfigError, StorageError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from evaluators.audit import Audit, Perturbation
    from golf_ray.data.tokenizer import ByteTables


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerAudit:
    """What an audit found, and of what."""

    ledger: str
    """URI of the folder."""
    header: Mapping[str, Any]
    """What the ledger says that its scores follow from."""
    audit: Audit
    perturbation: Perturbation | None
    """Where weights were there to try."""

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        perturbed = self.perturbation is None or self.perturbation.passed
        return self.audit.passed and perturbed

    @property
    def findings(self) -> tuple[str, ...]:
        """A line for each kind of thing that was found."""
        perturbed = () if self.perturbation is None else self.perturbation.findings
        return (*self.audit.findings, *(f"perturbation: {line}" for line in perturbed))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        named = (
            "golf_ray", "weights", "weights_kind", "adaptation", "adapters", "arithmetic", "tokens",
            "tokenizer",
        )  # fmt: skip
        return {
            "ledger": self.ledger,
            "passed": self.passed,
            **{name: self.header.get(name) for name in named},
            **self.audit.to_dict(),
            "perturbation": None if self.perturbation is None else self.perturbation.to_dict(),
            "findings": list(self.findings),
        }


def audit(
    ledger: str | Path,
    config: Config | None = None,
    *,
    checkpoint: str | Path | StoredWeights | None = None,
    perturb: int | None = None,
    force: bool = False,
    told: Callable[[str, int, int], None] | None = None,
) -> LedgerAudit:
    """Prove from a ledger that test-time training scored a text by the rules.

    Args:
        ledger: folder or URI, as given to `evaluate`.
        config: says where the text is; None for the one that the checkpoint carries.
        checkpoint: the weights that the ledger is of.
        perturb: documents on which to try that no score depends on what it must not, 2 or more;
            with random adapters, also where those of a file were given.
        force: allow a model configuration other than the carried one.
        told: told how the perturbation goes on.

    Raises:
        GolfRayError: something given cannot be used, or is not what the ledger is of.
    """
    from evaluators.audit import audit_scores
    from evaluators.ledger import Ledger, read_header
    from golf_ray.data.documents import document_bounds, document_bytes

    if perturb is not None and checkpoint is None:
        raise UsageError("a perturbation needs the weights to try", "add --checkpoint FILE")
    weights = None if checkpoint is None else opened(checkpoint)
    if weights is not None:
        config = config_for(weights, config, force=force)
    if config is None:
        raise UsageError(
            "a ledger holds scores and not the text that they are of",
            "add --checkpoint FILE, --config FILE or --upstream-config FILE",
        )
    header = read_header(str(ledger))
    kept = Ledger(str(ledger), {k: v for k, v in header.items() if k != "version"})
    adaptation = _settings_of(header, kept.uri)
    tokens, tables = validation_stream(config)
    _require_same(header, kept.uri, digests_of_data(tokens, tables), "text", "its data")
    if weights is not None:
        _require_same(header, kept.uri, identity_of(weights, config), "weights", "its weights")
    bounds = document_bounds(tokens)
    found = audit_scores(
        kept.scores,
        chunk_size=adaptation.chunk_size,
        bounds=bounds,
        num_bytes=document_bytes(tokens, bounds, tables),
        repeated=kept.repeated,
        troubles=kept.troubles,
    )
    perturbation = None
    if perturb is not None:
        assert weights is not None
        perturbation = _perturb(
            weights, config, adaptation, tokens, tables, bounds, perturb, told=told
        )
    return LedgerAudit(ledger=kept.uri, header=header, audit=found, perturbation=perturbation)


def _settings_of(header: Mapping[str, Any], uri: str) -> AdaptationConfig:
    """The settings under which a ledger's scores were made.

    Raises:
        StorageError: the header does not say.
    """
    settings = header.get("adaptation")
    if not isinstance(settings, dict) or "chunk_size" not in settings:
        raise StorageError(
            f"the header of {uri} says nothing of the chunks", "give a ledger of 'golf-ray eval'"
        )
    try:
        return Config.from_dict({"adaptation": settings}).adaptation
    except ConfigError as error:
        raise StorageError(
            f"the header of {uri} has settings that cannot be ({error.problem})",
            "audit it with the version that made it",
        ) from None


def _require_same(
    header: Mapping[str, Any], uri: str, mine: Mapping[str, Any], what: str, remedy: str
) -> None:
    """See that a header names what is here.

    Raises:
        UsageError: it names another.
    """
    from evaluators.ledger import name_differences

    differing = name_differences({name: header.get(name) for name in mine}, mine)
    if differing:
        raise UsageError(f"{uri} is the ledger of other {what}: {differing}", f"give {remedy}")


def _perturb(
    weights: StoredWeights,
    config: Config,
    adaptation: AdaptationConfig,
    tokens: NDArray[np.uint16],
    tables: ByteTables,
    bounds: NDArray[np.int64],
    num_documents: int,
    *,
    told: Callable[[str, int, int], None] | None,
) -> Perturbation:
    from evaluators.audit import GPU_TOLERANCE_NATS, audit_perturbed
    from golf_ray.model.checkpoint import build_model
    from golf_ray.model.compute import choose_compute

    device = pick_device(config)
    with cpu_threads(config.evaluation.threads):
        return audit_perturbed(
            build_model(
                config.model,
                weights.state(config.model),
                device=device,
                compute=choose_compute(config, device),
            ),
            tokens,
            tables,
            adaptation,
            bounds=bounds,
            num_documents=num_documents,
            tolerance_nats=0.0 if device.type == "cpu" else GPU_TOLERANCE_NATS,
            told=None if told is None else lambda done, of: told("perturbing", done, of),
        )
