"""The scenario's `[link]`: what the network between the hosts is like, from before the migration to the end.

Rule 1: it is made of the same faults as `[[fault]]`, at every host: what leaves is limited, what arrives is late or
        lost. Both directions are alike.
Rule 2: `offload = false` has packets as they would be on a wire; with offloads a packet may be 64 KiB, and its loss
        is one decision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from testbed.documents import Model
from testbed.faults.delay import Delay
from testbed.faults.loss import Loss
from testbed.faults.parameters import BytesPerSecond, DurationMs, Share, parse_share
from testbed.faults.rate import Rate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.faults.fault import Fault


class Link(Model):
    """0 and true stand for a link as the machine gives it."""

    rate: BytesPerSecond = 0
    delay: DurationMs = 0  # one way
    jitter: DurationMs = 0
    loss: Share = 0.0
    offload: bool = True

    @property
    def shaped(self) -> bool:
        """Whether anything is asked for."""
        return self != Link()

    def faults(self) -> list[Fault]:
        """What every host gets."""
        made: list[Fault] = []
        if self.rate:
            made.append(Rate(kind="rate", rate=self.rate, direction="out"))
        if self.delay or self.jitter:
            made.append(Delay(kind="delay", delay=self.delay, jitter=self.jitter, direction="in"))
        if self.loss:
            made.append(Loss(kind="loss", share=parse_share(self.loss), direction="in"))
        return made

    def facts(self) -> dict[str, Any]:
        """For the result."""
        return {
            "rate_bytes_per_s": self.rate,
            "delay_ms": self.delay,
            "jitter_ms": self.jitter,
            "loss": self.loss,
            "offload": self.offload,
        }


def link_conflicts(link: Link, hosts_kind: str) -> Iterator[tuple[str, str]]:
    """What is wrong with the section, as (path, problem)."""
    if hosts_kind != "local":
        return
    for key in sorted(link.model_fields_set):
        if getattr(link, key) != Link.model_fields[key].default:
            problem = (
                "needs hosts.kind = 'docker': hosts that are processes of this machine share its loopback"
            )
            yield f"link.{key}", problem
